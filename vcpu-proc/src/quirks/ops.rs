//! What the quirks layer asks of KVM, behind a trait so that tests can record and answer it.
//!
//! General and system registers and pending events travel in the `kvm_run` page (KVM_CAP_SYNC_REGS): KVM
//! takes changed ones with the next KVM_RUN and leaves those that were asked for with each exit, so
//! they need no ioctl of their own. `kvm_valid_regs` says which of them the page holds; where one
//! is missing, [`exchange`] fetches all. Everything else is one ioctl each. Nothing else in this layer
//! talks to KVM, so a recording of these calls is a recording of all it does.
#![allow(unsafe_code, reason = "fields of the kvm_run union, and KVM_SET_XSAVE")]

use kvm_bindings::{
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_SYNC_X86_VALID_FIELDS, Msrs,
    kvm_debugregs, kvm_guest_debug, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sync_regs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{SyncReg, VcpuFd};

use crate::kvm::exchange;

/// The error of a failed ioctl.
pub type Errno = kvm_ioctls::Error;
/// The outcome of one ioctl.
pub type OpResult<T> = Result<T, Errno>;

/// What KVM_EXIT_INTERNAL_ERROR said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InternalError {
    /// KVM's sub-error; 1 is "this instruction could not be emulated".
    pub suberror: u32,
    /// The instruction bytes that KVM fetched, padded with zeros.
    pub instruction: [u8; 15],
    /// Number of bytes in `instruction`; 0 if KVM gave none.
    pub instruction_len: u8,
}

/// The vCPU as the quirks layer sees it. Every method that returns a result may be an ioctl, and its
/// error is the ioctl's.
#[allow(clippy::missing_errors_doc, reason = "said once, above")]
pub trait VcpuOps {
    /// The general registers.
    fn regs(&mut self) -> OpResult<kvm_regs>;
    /// Changes the general registers. KVM forgets a pending exception with it.
    fn set_regs(&mut self, regs: &kvm_regs);
    /// The system registers.
    fn sregs(&mut self) -> OpResult<kvm_sregs>;
    /// Changes the system registers.
    fn set_sregs(&mut self, sregs: &kvm_sregs);
    /// Pending exceptions and interrupts.
    fn events(&mut self) -> OpResult<kvm_vcpu_events>;
    /// Changes pending exceptions and interrupts, after changed registers.
    fn set_events(&mut self, events: &kvm_vcpu_events);
    /// Has KVM take what was changed now instead of with the next KVM_RUN.
    fn apply(&mut self) -> OpResult<()>;
    /// The last exit is done with: what the page holds is forgotten, and the next exit leaves the
    /// system registers there if `sregs`. Changes that were made are kept. No ioctl.
    fn expect(&mut self, sregs: bool);
    /// KVM_GET_XSAVE: the 4 KiB image, which holds everything up to AVX-512.
    fn xsave(&mut self) -> OpResult<Box<kvm_xsave>>;
    /// KVM_SET_XSAVE.
    fn set_xsave(&mut self, image: &kvm_xsave) -> OpResult<()>;
    /// KVM_GET_XCRS.
    fn xcrs(&mut self) -> OpResult<kvm_xcrs>;
    /// KVM_GET_MSRS of one register; `None` where KVM does not know it.
    fn msr(&mut self, index: u32) -> OpResult<Option<u64>>;
    /// KVM_SET_MSRS of one register; false where KVM refuses the value.
    fn set_msr(&mut self, index: u32, value: u64) -> OpResult<bool>;
    /// KVM_GET_DEBUGREGS.
    fn debug_regs(&mut self) -> OpResult<kvm_debugregs>;
    /// KVM_SET_DEBUGREGS.
    fn set_debug_regs(&mut self, regs: &kvm_debugregs) -> OpResult<()>;
    /// KVM_SET_GUEST_DEBUG.
    fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> OpResult<()>;
    /// The details of the last exit, which was KVM_EXIT_INTERNAL_ERROR; no ioctl.
    fn internal_error(&mut self) -> InternalError;
}

impl VcpuOps for VcpuFd {
    fn regs(&mut self) -> OpResult<kvm_regs> {
        Ok(held(self, SyncReg::Register)?.regs)
    }

    fn set_regs(&mut self, regs: &kvm_regs) {
        self.sync_regs_mut().regs = *regs;
        change(self, SyncReg::Register);
    }

    fn sregs(&mut self) -> OpResult<kvm_sregs> {
        Ok(held(self, SyncReg::SystemRegister)?.sregs)
    }

    fn set_sregs(&mut self, sregs: &kvm_sregs) {
        self.sync_regs_mut().sregs = *sregs;
        change(self, SyncReg::SystemRegister);
    }

    fn events(&mut self) -> OpResult<kvm_vcpu_events> {
        Ok(held(self, SyncReg::VcpuEvents)?.events)
    }

    fn set_events(&mut self, events: &kvm_vcpu_events) {
        self.sync_regs_mut().events = *events;
        change(self, SyncReg::VcpuEvents);
    }

    fn apply(&mut self) -> OpResult<()> {
        exchange(self)
    }

    fn expect(&mut self, sregs: bool) {
        let run = self.get_kvm_run();
        run.kvm_valid_regs = if sregs {
            SyncReg::SystemRegister as u64
        } else {
            0
        };
    }

    fn xsave(&mut self) -> OpResult<Box<kvm_xsave>> {
        self.get_xsave().map(Box::new)
    }

    fn set_xsave(&mut self, image: &kvm_xsave) -> OpResult<()> {
        // SAFETY: KVM reads more than the 4 KiB of `kvm_xsave` only where the process has asked
        // the kernel for dynamic features by arch_prctl(ARCH_REQ_XCOMP_GUEST_PERM); it never does.
        unsafe { Self::set_xsave(self, image) }
    }

    fn xcrs(&mut self) -> OpResult<kvm_xcrs> {
        self.get_xcrs()
    }

    fn msr(&mut self, index: u32) -> OpResult<Option<u64>> {
        read_msr(self, index)
    }

    fn set_msr(&mut self, index: u32, value: u64) -> OpResult<bool> {
        Ok(self.set_msrs(&one_msr(index, value)?)? == 1)
    }

    fn debug_regs(&mut self) -> OpResult<kvm_debugregs> {
        self.get_debug_regs()
    }

    fn set_debug_regs(&mut self, regs: &kvm_debugregs) -> OpResult<()> {
        Self::set_debug_regs(self, regs)
    }

    fn set_guest_debug(&mut self, debug: &kvm_guest_debug) -> OpResult<()> {
        // A single step starts where KVM thinks that the guest is.
        if self.get_kvm_run().kvm_dirty_regs != 0 {
            exchange(self)?;
        }
        Self::set_guest_debug(self, debug)
    }

    fn internal_error(&mut self) -> InternalError {
        // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR, for which KVM fills this member;
        // all its fields are integers, so any bytes are valid.
        let failure = unsafe { self.get_kvm_run().__bindgen_anon_1.emulation_failure };
        let mut error = InternalError {
            suberror: failure.suberror,
            ..InternalError::default()
        };
        let has_bytes = failure.ndata >= 3
            && failure.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        if error.suberror == super::SUBERROR_EMULATION && has_bytes {
            // SAFETY: the union has one member, of integers.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            error.instruction = bytes.insn_bytes;
            error.instruction_len = bytes.insn_size.min(15);
        }
        error
    }
}

/// The registers in the page, `wanted` among them.
fn held(vcpu: &mut VcpuFd, wanted: SyncReg) -> OpResult<kvm_sync_regs> {
    if vcpu.get_kvm_run().kvm_valid_regs & wanted as u64 == 0 {
        // What follows mostly needs the others too.
        vcpu.get_kvm_run().kvm_valid_regs = u64::from(KVM_SYNC_X86_VALID_FIELDS);
        exchange(vcpu)?;
    }
    Ok(vcpu.sync_regs())
}

/// Marks a register block that was written to the page.
fn change(vcpu: &mut VcpuFd, changed: SyncReg) {
    let run = vcpu.get_kvm_run();
    run.kvm_dirty_regs |= changed as u64;
    run.kvm_valid_regs |= changed as u64;
}

/// KVM_GET_MSRS of one register; `None` where KVM does not know it.
///
/// # Errors
/// If KVM refuses the ioctl.
pub fn read_msr(vcpu: &VcpuFd, index: u32) -> OpResult<Option<u64>> {
    let mut msrs = one_msr(index, 0)?;
    let read = vcpu.get_msrs(&mut msrs)?;
    Ok(msrs
        .as_slice()
        .first()
        .filter(|_| read == 1)
        .map(|entry| entry.data))
}

fn one_msr(index: u32, data: u64) -> OpResult<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }])
    .map_err(|_| Errno::new(libc::E2BIG))
}
