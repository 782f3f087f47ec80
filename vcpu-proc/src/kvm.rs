//! Every request that this process makes to KVM, and the decoding of what KVM answers.
//!
//! The rest of the process sees typed calls and [`Exit`]; nothing outside of this file names an
//! ioctl, except the quirks layer, which has its own list. What the guest can influence here is the
//! content of an exit; the `kvm_run` page itself is written by the kernel alone.
#![allow(
    unsafe_code,
    reason = "memory is handed to KVM, and unions of the kvm_run page are read"
)]

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::{
    CpuId, KVM_EXIT_DEBUG, KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, KVM_EXIT_X86_WRMSR, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, Msrs, kvm_debug_exit_arch, kvm_fpu, kvm_lapic_state, kvm_msr_entry,
    kvm_pit_config, kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_bindings::{KVM_API_VERSION, KVM_EXIT_INTERNAL_ERROR};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::EventFd;

/// A request that KVM refused.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("{request}: {errno}")]
pub struct KvmError {
    /// Name of the request.
    pub request: &'static str,
    /// The kernel's errno.
    pub errno: kvm_ioctls::Error,
}

fn named(request: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |errno| KvmError { request, errno }
}

/// What a guest may do with memory of its.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read it.
    Read,
    /// Read and write it.
    ReadWrite,
}

/// The system-wide KVM device.
#[derive(Debug)]
pub struct Host(Kvm);

impl Host {
    /// Takes an open `/dev/kvm`.
    ///
    /// # Errors
    /// If it is not KVM, or of a version that does not exist any more.
    pub fn new(fd: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned and given up here; a wrong one only makes ioctls fail.
        let kvm = unsafe { Kvm::from_raw_fd(fd.into_raw_fd()) };
        if kvm.get_api_version() != KVM_API_VERSION.cast_signed() {
            let errno = kvm_ioctls::Error::new(libc::ENOTTY);
            return Err(named("KVM_GET_API_VERSION")(errno));
        }
        Ok(Self(kvm))
    }

    /// Makes a VM without memory or vCPUs.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn create_vm(&self) -> Result<Vm, KvmError> {
        self.0.create_vm().map(Vm).map_err(named("KVM_CREATE_VM"))
    }

    /// The CPUID leaves that KVM can give a guest.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.0
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(named("KVM_GET_SUPPORTED_CPUID"))
    }
}

/// One VM.
#[derive(Debug)]
pub struct Vm(VmFd);

impl Vm {
    /// The bare VM, for the quirks layer.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.0
    }

    /// Says where KVM may keep its task state segment and identity map in guest-physical memory.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn reserve_kvm_pages(&self, tss: u64, identity_map: u64) -> Result<(), KvmError> {
        let tss = usize::try_from(tss).unwrap_or(usize::MAX);
        self.0
            .set_tss_address(tss)
            .map_err(named("KVM_SET_TSS_ADDR"))?;
        self.0
            .set_identity_map_address(identity_map)
            .map_err(named("KVM_SET_IDENTITY_MAP_ADDR"))
    }

    /// Gives the guest `bytes` bytes at `guest`, which are this process's memory at `host`. Writes to memory that it may only read
    /// exit, as those to no memory do (KVM API section 4.35, `KVM_MEM_READONLY`).
    ///
    /// # Safety
    /// `host..host + bytes` is mapped until the process ends, and nobody holds references into it other than to atomics.
    ///
    /// # Errors
    /// KVM's errno.
    pub unsafe fn add_memory(
        &self,
        slot: u32,
        guest: u64,
        host: *mut u8,
        bytes: u64,
        access: Access,
    ) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: match access {
                Access::ReadWrite => 0,
                Access::Read => KVM_MEM_READONLY,
            },
            guest_phys_addr: guest,
            memory_size: bytes,
            userspace_addr: host.addr() as u64,
        };
        // SAFETY: the caller vouches for the memory; the kernel checks alignment and overlap.
        unsafe { self.0.set_user_memory_region(region) }
            .map_err(named("KVM_SET_USER_MEMORY_REGION"))
    }

    /// Makes PIC, I/O APIC and local APICs in the kernel, and the timer with port 0x61.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        self.0
            .create_irq_chip()
            .map_err(named("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.0.create_pit2(pit).map_err(named("KVM_CREATE_PIT2"))
    }

    /// Makes vCPU `index`.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn create_vcpu(&self, index: u8) -> Result<Vcpu, KvmError> {
        let fd = self
            .0
            .create_vcpu(index.into())
            .map_err(named("KVM_CREATE_VCPU"))?;
        Ok(Vcpu { fd })
    }

    /// Makes each write to `interrupt` an edge on line `gsi`.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn connect_interrupt(&self, interrupt: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.0
            .register_irqfd(interrupt, gsi)
            .map_err(named("KVM_IRQFD"))
    }

    /// An edge on line `gsi`, now: KVM hands one that comes through an irqfd to a kernel thread when the line is one of an
    /// I/O APIC (KVM API, section 4.25 `KVM_IRQ_LINE`).
    ///
    /// # Errors
    /// KVM's errno.
    pub fn pulse(&self, gsi: u32) -> Result<(), KvmError> {
        for level in [true, false] {
            let set = self.0.set_irq_line(gsi, level);
            set.map_err(named("KVM_IRQ_LINE"))?;
        }
        Ok(())
    }

    /// Makes each 32-bit guest write of `value` to `address` ring `doorbell` instead of an exit.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn connect_doorbell(
        &self,
        doorbell: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.0
            .register_ioevent(doorbell, &IoEventAddress::Mmio(address), value)
            .map_err(named("KVM_IOEVENTFD"))
    }

    /// Takes back what [`Vm::connect_doorbell`] did with the same arguments.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn disconnect_doorbell(
        &self,
        doorbell: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.0
            .unregister_ioevent(doorbell, &IoEventAddress::Mmio(address), value)
            .map_err(named("KVM_IOEVENTFD"))
    }
}

/// Why a vCPU came back from [`Vcpu::run`].
#[derive(Debug)]
pub enum Exit<'a> {
    /// The guest wrote to an I/O port: one or, for string instructions, several elements.
    PortWrite {
        /// The port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        size: u8,
        /// The elements.
        data: &'a [u8],
    },
    /// The guest reads from an I/O port; the elements are to be filled in.
    PortRead {
        /// The port.
        port: u16,
        /// Bytes of one element: 1, 2 or 4.
        size: u8,
        /// The elements.
        data: &'a mut [u8],
    },
    /// The guest wrote where it has no memory.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// What it wrote, 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest reads where it has no memory; the bytes are to be filled in.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// A kick. Every access that came before is complete.
    Interrupted,
    /// KVM wants to be called again (a waiting processor was woken).
    Again,
    /// A triple fault.
    Shutdown,
    /// The guest asked KVM to shut down, reset or crash the machine (KVM_SYSTEM_EVENT_*).
    SystemEvent(u32),
    /// KVM cannot go on, usually with an instruction that it cannot emulate.
    InternalError,
    /// A hardware breakpoint or a single step.
    Debug(kvm_debug_exit_arch),
    /// A write of a model-specific register that was asked to be handed over.
    WriteMsr {
        /// The register.
        index: u32,
        /// The value.
        data: u64,
    },
    /// An exit that this VM never asks for.
    Unexpected(u32),
    /// KVM_RUN itself failed.
    Failed(KvmError),
}

/// One vCPU, owned by its thread.
#[derive(Debug)]
pub struct Vcpu {
    fd: VcpuFd,
}

impl Vcpu {
    /// The bare vCPU, for the quirks layer and crash reports.
    pub fn fd_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }

    /// Lets the guest run until something is to be done. What was read before is completed first.
    pub fn run(&mut self) -> Exit<'_> {
        if let Err(errno) = self.fd.run().map(drop) {
            return match errno.errno() {
                libc::EINTR => Exit::Interrupted,
                libc::EAGAIN => Exit::Again,
                _ => Exit::Failed(named("KVM_RUN")(errno)),
            };
        }
        decode(self.fd.get_kvm_run())
    }

    /// Answers [`Exit::WriteMsr`]: the guest gets a general protection fault.
    pub fn refuse_msr(&mut self) {
        self.fd.get_kvm_run().__bindgen_anon_1.msr.error = 1;
    }

    /// A handle by which other threads make [`Vcpu::run`] return.
    ///
    /// # Errors
    /// The kernel's errno of `mmap`.
    pub fn kicker(&self) -> Result<ImmediateExit, KvmError> {
        ImmediateExit::map(&self.fd).map_err(named("mmap of kvm_run"))
    }

    /// Sets the CPUID leaves that the guest sees.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn set_cpuid(&self, cpuid: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(cpuid).map_err(named("KVM_SET_CPUID2"))
    }

    /// Sets model-specific registers; all must be known.
    ///
    /// # Errors
    /// KVM's errno, or ENXIO when it knows not all of them.
    pub fn set_msrs(&self, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
        let request = named("KVM_SET_MSRS");
        let msrs = Msrs::from_entries(entries)
            .map_err(|_| request(kvm_ioctls::Error::new(libc::E2BIG)))?;
        match self.fd.set_msrs(&msrs).map_err(&request)? {
            done if done == entries.len() => Ok(()),
            _ => Err(request(kvm_ioctls::Error::new(libc::ENXIO))),
        }
    }

    /// Changes the local APIC's registers.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn change_lapic(&self, change: impl FnOnce(&mut kvm_lapic_state)) -> Result<(), KvmError> {
        let mut lapic = self.fd.get_lapic().map_err(named("KVM_GET_LAPIC"))?;
        change(&mut lapic);
        self.fd.set_lapic(&lapic).map_err(named("KVM_SET_LAPIC"))
    }

    /// Sets the floating-point state.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn set_fpu(&self, fpu: &kvm_fpu) -> Result<(), KvmError> {
        self.fd.set_fpu(fpu).map_err(named("KVM_SET_FPU"))
    }

    /// Changes system and general registers from their state after reset.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn change_registers(
        &self,
        change: impl FnOnce(&mut kvm_sregs, &mut kvm_regs),
    ) -> Result<(), KvmError> {
        let mut sregs = self.fd.get_sregs().map_err(named("KVM_GET_SREGS"))?;
        let mut regs = kvm_regs::default();
        change(&mut sregs, &mut regs);
        self.fd.set_sregs(&sregs).map_err(named("KVM_SET_SREGS"))?;
        self.fd.set_regs(&regs).map_err(named("KVM_SET_REGS"))
    }

    /// Tells the guest's clock that it was stopped, so that its watchdogs stay calm.
    pub fn mark_clock_paused(&self) {
        // EINVAL says that the guest does not use KVM's clock; there is nobody to tell then.
        let _unused_clock = self.fd.kvmclock_ctrl();
    }
}

/// Reads the part of the `kvm_run` page that belongs to its exit reason.
fn decode(run: &mut kvm_run) -> Exit<'_> {
    match run.exit_reason {
        KVM_EXIT_IO => decode_port(run),
        KVM_EXIT_MMIO => {
            // SAFETY: for this reason KVM fills this member; its fields are plain integers.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let address = mmio.phys_addr;
            let length = mmio.len as usize;
            let write = mmio.is_write != 0;
            match mmio.data.get_mut(..length) {
                Some(data) if write => Exit::MmioWrite { address, data },
                Some(data) => Exit::MmioRead { address, data },
                None => Exit::Unexpected(KVM_EXIT_MMIO),
            }
        }
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: as above.
            Exit::SystemEvent(unsafe { run.__bindgen_anon_1.system_event.type_ })
        }
        KVM_EXIT_INTERNAL_ERROR => Exit::InternalError,
        KVM_EXIT_DEBUG => {
            // SAFETY: as above.
            Exit::Debug(unsafe { run.__bindgen_anon_1.debug.arch })
        }
        KVM_EXIT_X86_WRMSR => {
            // SAFETY: as above.
            let msr = unsafe { run.__bindgen_anon_1.msr };
            Exit::WriteMsr {
                index: msr.index,
                data: msr.data,
            }
        }
        reason => Exit::Unexpected(reason),
    }
}

fn decode_port(run: &mut kvm_run) -> Exit<'_> {
    // SAFETY: the caller saw KVM_EXIT_IO, for which KVM fills this member with plain integers.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = usize::from(io.size) * io.count as usize;
    let offset = usize::try_from(io.data_offset).unwrap_or(usize::MAX);
    let base: NonNull<u8> = NonNull::from(run).cast();
    // SAFETY: KVM places the data inside of the mapping of the vCPU, whose first page `run` is.
    let data = unsafe { base.add(offset) };
    // SAFETY: KVM filled that many bytes there, and they belong to this process until the next
    // KVM_RUN, which needs the vCPU that this slice borrows.
    let data = unsafe { NonNull::slice_from_raw_parts(data, length).as_mut() };
    let (port, size) = (io.port, io.size);
    if u32::from(io.direction) == KVM_EXIT_IO_OUT {
        Exit::PortWrite { port, size, data }
    } else {
        Exit::PortRead { port, size, data }
    }
}

/// The flag in a vCPU's `kvm_run` page that makes KVM_RUN complete what is pending and return. It
/// has a mapping of its own, so that it outlives the vCPU's and can be used by any thread.
#[derive(Debug)]
pub struct ImmediateExit {
    page: NonNull<u8>,
}

const RUN_PAGE_BYTES: usize = 4096;

/// Who wants KVM_RUN to return at once, as bits of `immediate_exit`, of which KVM only asks whether it
/// is zero: another thread, or [`exchange`].
const EXIT_KICKED: u8 = 1;
const EXIT_EXCHANGE: u8 = 2;

/// Has KVM take the registers that are marked dirty in the `kvm_run` page, and leave there those that
/// are marked valid, without letting the guest run: a KVM_RUN that returns at once.
///
/// An access of the guest that its last exit asked for is completed by that, so the exit must
/// have been handled. Where such an access has a further part, that part is lost: the vCPU can be
/// looked at, but not run any more.
///
/// # Errors
/// KVM's errno; EINVAL for registers that it does not accept.
pub fn exchange(vcpu: &mut VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let flag = NonNull::from(&mut vcpu.get_kvm_run().immediate_exit);
    // SAFETY: the byte is in the vCPU's mapping, which outlives this call, and every access of this
    // process to it is atomic.
    let flag = unsafe { AtomicU8::from_ptr(flag.as_ptr()) };
    flag.fetch_or(EXIT_EXCHANGE, Ordering::SeqCst);
    let outcome = vcpu.run().map(drop);
    flag.fetch_and(!EXIT_EXCHANGE, Ordering::SeqCst);
    match outcome {
        Err(errno) if !matches!(errno.errno(), libc::EINTR | libc::EAGAIN) => Err(errno),
        _ => Ok(()),
    }
}

// SAFETY: the page is only accessed through an atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn map(vcpu: &VcpuFd) -> Result<Self, kvm_ioctls::Error> {
        // SAFETY: a new mapping at an address of the kernel's choice disturbs nothing.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                RUN_PAGE_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                0,
            )
        };
        NonNull::new(page)
            .filter(|page| page.as_ptr() != libc::MAP_FAILED)
            .map(|page| Self { page: page.cast() })
            .ok_or_else(kvm_ioctls::Error::last)
    }

    /// Sets or clears the flag.
    pub fn set(&self, on: bool) {
        let offset = std::mem::offset_of!(kvm_run, immediate_exit);
        // SAFETY: the field lies in the page, which stays mapped as long as `self`.
        let flag = unsafe { self.page.add(offset) };
        // SAFETY: it is one byte, aligned, and every access of this process to it is atomic.
        let flag = unsafe { AtomicU8::from_ptr(flag.as_ptr()) };
        if on {
            flag.fetch_or(EXIT_KICKED, Ordering::SeqCst);
        } else {
            flag.fetch_and(!EXIT_KICKED, Ordering::SeqCst);
        }
    }
}

impl Drop for ImmediateExit {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `map` and nothing refers to it any more.
        unsafe { libc::munmap(self.page.as_ptr().cast(), RUN_PAGE_BYTES) };
    }
}
