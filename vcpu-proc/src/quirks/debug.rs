//! Who owns which hardware breakpoint of a vCPU.
//!
//! KVM takes the debug registers as one block (KVM_SET_GUEST_DEBUG), so everybody who wants a
//! breakpoint or a single step asks here. Slots 0 to 2 are a debugger's, slot 3 belongs to the
//! quirks layer. A block equal to the one in force costs no ioctl.

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
};

use super::ops::{OpResult, VcpuOps};

/// The breakpoint slot of the quirks layer.
const QUIRK_SLOT: u32 = 3;

/// A debugger's own breakpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Breakpoint {
    /// Linear address.
    pub linear: u64,
    /// The four DR7 bits of the slot: R/W in bits 1:0, LEN in bits 3:2; 0 is execution.
    pub kind: u8,
}

/// What a debugger wants of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DebuggerWish {
    /// Hardware breakpoints in slots 0 to 2.
    pub hardware: [Option<Breakpoint>; 3],
    /// `int3` exits to the debugger.
    pub software: bool,
    /// One instruction, then an exit.
    pub step: bool,
}

/// The debug registers of one vCPU.
#[derive(Debug, Default)]
pub struct DebugRegisters {
    debugger: DebuggerWish,
    handler: Option<u64>,
    stepping: bool,
    in_force: kvm_guest_debug,
}

impl DebugRegisters {
    /// Sets what the debugger wants.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn set_debugger<V: VcpuOps>(&mut self, vcpu: &mut V, wish: DebuggerWish) -> OpResult<()> {
        self.debugger = wish;
        self.apply(vcpu)
    }

    /// Where the quirks layer's breakpoint is.
    #[must_use]
    pub fn handler(&self) -> Option<u64> {
        self.handler
    }

    /// Moves the quirks layer's breakpoint, or takes it away.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn set_handler<V: VcpuOps>(&mut self, vcpu: &mut V, at: Option<u64>) -> OpResult<()> {
        self.handler = at;
        self.apply(vcpu)
    }

    /// Whether the quirks layer is stepping over its breakpoint.
    #[must_use]
    pub fn is_stepping(&self) -> bool {
        self.stepping
    }

    /// Starts or ends a single step over the quirks layer's breakpoint, without interrupts and
    /// without that breakpoint.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn set_stepping<V: VcpuOps>(&mut self, vcpu: &mut V, stepping: bool) -> OpResult<()> {
        self.stepping = stepping;
        self.apply(vcpu)
    }

    /// Ends a step over the breakpoint whose instruction was completed without the processor.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn end_step_over<V: VcpuOps>(&mut self, vcpu: &mut V) -> OpResult<()> {
        if self.stepping {
            self.set_stepping(vcpu, false)
        } else {
            Ok(())
        }
    }

    /// Whether the debugger wants to hear of the end of a single step.
    #[must_use]
    pub fn debugger_steps(&self) -> bool {
        self.debugger.step
    }

    fn apply<V: VcpuOps>(&mut self, vcpu: &mut V) -> OpResult<()> {
        let wanted = self.block();
        if wanted != self.in_force {
            vcpu.set_guest_debug(&wanted)?;
            self.in_force = wanted;
        }
        Ok(())
    }

    fn block(&self) -> kvm_guest_debug {
        const GLOBAL_EXACT: u64 = 1 << 9;
        const RESERVED_ONE: u64 = 1 << 10;
        let mut block = kvm_guest_debug::default();
        let mut dr7 = 0;
        let handler = self.handler.filter(|_| !self.stepping);
        let quirk = handler.map(|linear| Breakpoint { linear, kind: 0 });
        let [first, second, third] = self.debugger.hardware;
        for (slot, wish) in [first, second, third, quirk].into_iter().enumerate() {
            let (Some(wish), Some(register)) = (wish, block.arch.debugreg.get_mut(slot)) else {
                continue;
            };
            *register = wish.linear;
            dr7 |= 2 << (slot * 2) | u64::from(wish.kind & 0xf) << (16 + slot * 4);
        }
        if dr7 != 0 {
            block.control |= KVM_GUESTDBG_USE_HW_BP;
            block.arch.debugreg[7] = dr7 | GLOBAL_EXACT | RESERVED_ONE;
        }
        if self.debugger.software {
            block.control |= KVM_GUESTDBG_USE_SW_BP;
        }
        if self.stepping {
            block.control |= KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        } else if self.debugger.step {
            block.control |= KVM_GUESTDBG_SINGLESTEP;
        }
        if block.control != 0 {
            block.control |= KVM_GUESTDBG_ENABLE;
        }
        block
    }

    /// Whether a KVM_EXIT_DEBUG with this DR6 and RIP is the quirks layer's breakpoint.
    #[must_use]
    pub fn is_handler_hit(&self, dr6: u64, pc: u64) -> bool {
        !self.stepping && dr6 & (1 << QUIRK_SLOT) != 0 && self.handler == Some(pc)
    }
}
