//! Hosts whose KVM is incomplete.
//!
//! Some clouds offer KVM by the `kvm_pvm` module: guest user code runs natively, guest kernel code is
//! run by KVM's instruction emulator, which lacks instructions that stock kernels use, and a ring-3
//! `syscall` arrives as a page fault. This layer completes what is missing, so that unmodified
//! kernels run. On other hosts nothing of it is constructed: the broker looks
//! (`bulkhead_ipc::host::host_needs_quirks`), `bulkhead-vcpu` is told at birth, and
//! [`VcpuQuirks::new`] is then never called.
//!
//! What the run loop does on such hosts, and only there:
//! 1. after creating the VM, [`prepare_vm`];
//! 2. [`filter_cpuid`] on what it gives to KVM_SET_CPUID2; one [`VcpuQuirks::new`] for each vCPU, owned
//!    by that vCPU's thread (there is no state shared between vCPUs, and no lock);
//! 3. after *every* return from KVM_RUN (EINTR included), once the exit is handled,
//!    [`VcpuQuirks::after_exit`];
//! 4. KVM_EXIT_INTERNAL_ERROR → [`VcpuQuirks::on_internal_error`]; KVM_EXIT_DEBUG →
//!    [`VcpuQuirks::on_debug`]; KVM_EXIT_X86_WRMSR → [`VcpuQuirks::on_wrmsr`].
//!
//! Beyond what every vCPU thread needs this takes the ioctls KVM_GET/SET_{MSRS, XSAVE, XCRS, DEBUGREGS} and
//! KVM_SET_GUEST_DEBUG after lock, and KVM_ENABLE_CAP and KVM_X86_SET_MSR_FILTER before it. Registers and
//! pending events travel in the `kvm_run` page ([`ops`]).
//!
//! # What is completed
//! - [`complete`]: instructions that KVM cannot emulate (KVM_EXIT_INTERNAL_ERROR, sub-error 1), one
//!   module for each group. What is not in its table is reported with its bytes and RIP, never
//!   guessed; in ring 3 it raises #UD, so that a program cannot end its machine.
//! - [`syscall`]: a ring-3 `syscall` that arrives at LSTAR with CPL still 3 and faults there. A hardware
//!   breakpoint on the handler in `IDT[14]` catches it, from the moment on that the guest has written
//!   LSTAR; a guest that never does pays nothing.
//!
//! # What is not
//! Where KVM does not exit, nothing can be completed: `int 0x80` from ring 3 and `movbe` and `rdpid` in
//! ring 0 raise #UD, `lzcnt` and `tzcnt` in ring 0 run as `bsr` and `bsf`, and `rdpid` and `rdtscp` in ring 3
//! tell the number of the host's CPU. (Stock kernels use neither count; the kernel parameter
//! `clearcpuid=rdpid,movbe` keeps them off the others.) A guest's own hardware breakpoints do not work
//! while the one on the page-fault handler is set. Instructions of the completed kinds that address
//! device registers are refused.

pub mod complete;
pub mod debug;
pub mod machine;
pub mod ops;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod recorder;
pub mod syscall;
#[cfg(test)]
mod tests;

use kvm_bindings::{
    CpuId, KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X86_USER_SPACE_MSR, kvm_debug_exit_arch,
    kvm_enable_cap,
};
use kvm_ioctls::{
    MsrExitReason, MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd,
};
use vm_memory::GuestMemoryBackend;

use self::debug::DebugRegisters;
use self::machine::{Exception, Machine, Stop};
use self::ops::{Errno, VcpuOps};
use self::syscall::SyscallWatch;

/// KVM's sub-error for an instruction that it could not emulate.
pub const SUBERROR_EMULATION: u32 = 1;

/// Register of the 64-bit system-call entry point.
pub const MSR_LSTAR: u32 = 0xc000_0082;

/// Events that this layer handled, for statistics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions completed.
    pub completed: u64,
    /// Exceptions given to the guest in place of an instruction.
    pub faults: u64,
    /// Ring-3 system calls entered.
    pub syscalls: u64,
    /// Page faults that met the breakpoint and were the guest's own.
    pub page_faults: u64,
    /// Times the breakpoint moved.
    pub breakpoint_moves: u64,
}

/// What became of an exit that this layer was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handled {
    /// The instruction was completed. A debugger that steps has to be told.
    Completed,
    /// The guest gets an exception.
    Faulted(Exception),
    /// A ring-3 system call was entered.
    Syscall,
    /// A page fault of the guest's own goes on.
    PageFault,
    /// A single step of this layer's own ended.
    Stepped,
    /// Not an event of this layer (a debugger's breakpoint).
    NotOurs,
}

/// Why a vCPU cannot go on.
#[derive(Clone, Copy, Debug, thiserror::Error)]
pub enum QuirkError {
    /// KVM stopped for a reason other than an instruction.
    #[error("KVM internal error {suberror} is not an emulation failure")]
    NotEmulation {
        /// KVM's sub-error.
        suberror: u32,
    },
    /// Neither KVM nor this layer can carry out the instruction.
    #[error("no emulation of the instruction at RIP {rip:#x}, bytes {}", Hex(bytes, *len))]
    Unsupported {
        /// Where it is.
        rip: u64,
        /// Its bytes; as many as `len` are valid.
        bytes: [u8; 15],
        /// Number of valid bytes.
        len: usize,
    },
    /// An ioctl failed.
    #[error("ioctl of the quirks layer failed: {0}")]
    Kvm(Errno),
}

impl From<Errno> for QuirkError {
    fn from(errno: Errno) -> Self {
        Self::Kvm(errno)
    }
}

struct Hex<'a>(&'a [u8; 15], usize);

impl std::fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, byte) in self.0.iter().take(self.1).enumerate() {
            let space = if index == 0 { "" } else { " " };
            write!(f, "{space}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Asks a VM's KVM to hand over what this layer completes: failed emulation in every ring, and
/// writes of LSTAR. Called once, before the first KVM_RUN.
///
/// # Errors
/// If KVM lacks one of the facilities.
pub fn prepare_vm(vm: &VmFd) -> Result<(), Errno> {
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE,
        ..Default::default()
    };
    cap.args[0] = 1;
    vm.enable_cap(&cap)?;
    let mut cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        ..Default::default()
    };
    cap.args[0] = u64::from(MsrExitReason::Filter.bits());
    vm.enable_cap(&cap)?;
    // A zero bit denies, which sends the write to the run loop.
    let lstar = MsrFilterRange {
        flags: MsrFilterRangeFlags::WRITE,
        base: MSR_LSTAR,
        msr_count: 1,
        bitmap: &[0],
    };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[lstar])
}

/// Takes away the paravirtual features that make guests use `vmcall`, which hangs on such a host
/// (leaf 0x4000_0001, EAX bits 4-7, 9 and 11-14). Most other bits the guest sees as the processor has
/// them, whatever is set here.
pub fn filter_cpuid(cpuid: &mut CpuId) {
    const KVM_FEATURES: u32 = 0x4000_0001;
    const HYPERCALLS: u32 = 0xf0 | 1 << 9 | 0xf << 11;
    for entry in cpuid.as_mut_slice() {
        if entry.function == KVM_FEATURES {
            entry.eax &= !HYPERCALLS;
        }
    }
}

/// The quirks of one vCPU. Owned by its thread.
#[derive(Debug, Default)]
pub struct VcpuQuirks {
    /// Owner of the debug registers, through which a debugger asks for its own breakpoints.
    pub debug: DebugRegisters,
    watch: SyscallWatch,
    counters: Counters,
}

impl VcpuQuirks {
    /// The quirks of a vCPU that has not run yet, or was restored: an LSTAR that is set already is
    /// watched from the start.
    ///
    /// # Errors
    /// If KVM refuses to tell LSTAR.
    pub fn new<V: VcpuOps>(vcpu: &mut V) -> Result<Self, QuirkError> {
        let mut quirks = Self::default();
        if vcpu.msr(MSR_LSTAR)?.is_some_and(|entry| entry != 0) {
            quirks.watch.start();
        }
        vcpu.expect(quirks.watch.is_on());
        Ok(quirks)
    }

    /// What this layer has done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Ends the handling of an exit, and follows changes of the guest's page-fault handler. Called
    /// after each return from KVM_RUN; costs one branch until the guest has written LSTAR, then a read of guest memory, and an
    /// ioctl only when the handler moves.
    ///
    /// # Errors
    /// If KVM refuses to move the breakpoint.
    pub fn after_exit<V: VcpuOps, M: GuestMemoryBackend>(
        &mut self,
        vcpu: &mut V,
        mem: &M,
    ) -> Result<(), QuirkError> {
        if self.watch.is_on() && self.watch.follow(vcpu, mem, &mut self.debug)? {
            self.counters.breakpoint_moves += 1;
        }
        vcpu.expect(self.watch.is_on());
        Ok(())
    }

    /// Takes a write of an MSR that KVM handed over. Gives true if the write was carried out, false
    /// if the guest has to get #GP (`error = 1` in the exit).
    ///
    /// # Errors
    /// If KVM refuses the ioctl itself.
    pub fn on_wrmsr<V: VcpuOps>(
        &mut self,
        vcpu: &mut V,
        index: u32,
        data: u64,
    ) -> Result<bool, QuirkError> {
        let done = vcpu.set_msr(index, data)?;
        if done && index == MSR_LSTAR && data != 0 {
            self.watch.start();
        }
        Ok(done)
    }

    /// Completes the instruction that KVM gave up on.
    ///
    /// # Errors
    /// If the exit is something else, or nobody knows the instruction: then the vCPU cannot go on.
    pub fn on_internal_error<V: VcpuOps, M: GuestMemoryBackend>(
        &mut self,
        vcpu: &mut V,
        mem: &M,
    ) -> Result<Handled, QuirkError> {
        let error = vcpu.internal_error();
        if error.suberror != SUBERROR_EMULATION {
            return Err(QuirkError::NotEmulation {
                suberror: error.suberror,
            });
        }
        let mut machine = Machine::new(vcpu, mem)?;
        // KVM's bytes are those that it failed on; a second fetch may see what another vCPU has
        // patched there since. They end where KVM stopped to fetch, so they may be too few.
        let mut bytes = error.instruction;
        let mut len = usize::from(error.instruction_len).min(bytes.len());
        if len == 0 || !machine.decode(bytes.get(..len).unwrap_or_default()) {
            (bytes, len) = machine.fetch();
            machine.decode(bytes.get(..len).unwrap_or_default());
        }
        let stop = match complete::complete(&mut machine) {
            Ok(next) => {
                machine.commit(next)?;
                self.debug.end_step_over(machine.ops)?;
                self.counters.completed += 1;
                return Ok(Handled::Completed);
            }
            Err(stop) => stop,
        };
        let exception = match stop {
            Stop::Fault(exception) => exception,
            Stop::Unknown if machine.paging.cpl() == 3 => Exception::UNDEFINED,
            Stop::Unknown => {
                return Err(QuirkError::Unsupported {
                    rip: machine.regs.rip,
                    bytes,
                    len,
                });
            }
            Stop::Kvm(errno) => return Err(errno.into()),
        };
        machine.inject(exception)?;
        self.debug.end_step_over(machine.ops)?;
        self.counters.faults += 1;
        Ok(Handled::Faulted(exception))
    }

    /// Takes KVM_EXIT_DEBUG.
    ///
    /// # Errors
    /// If KVM refuses an ioctl.
    pub fn on_debug<V: VcpuOps, M: GuestMemoryBackend>(
        &mut self,
        vcpu: &mut V,
        mem: &M,
        exit: &kvm_debug_exit_arch,
    ) -> Result<Handled, QuirkError> {
        let handled = syscall::on_debug(vcpu, mem, &mut self.debug, exit)?;
        match handled {
            Handled::Syscall => self.counters.syscalls += 1,
            Handled::PageFault => self.counters.page_faults += 1,
            _ => {}
        }
        Ok(handled)
    }
}
