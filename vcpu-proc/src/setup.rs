//! From a birth configuration to a VM that can take its first step.
//!
//! The order is the cheapest one that KVM allows. Filtering registers and registering memory each wait
//! for a grace period of the kernel: the filter comes first (0.02 ms instead of 15 ms), memory
//! before the interrupt controllers (0.1 ms instead of 7 ms), and both are left to a thread of
//! their own ([`Groundwork`]) while the kernel is loaded. Everything that vCPUs need is there before
//! they are made. Nothing runs yet when [`build`] returns, and everything that may fail has been done.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bulkhead_ipc::legacy_page::LegacyPage;
use bulkhead_ipc::platform::{KVM_IDENTITY_MAP_BASE, KVM_TSS_BASE, VCPUS_MAX, virtio_mmio_address};
use bulkhead_ipc::protocol::birth::{VcpuConfig, VirtioSlot};
use bulkhead_ipc::shared::{Doorbell, SharedError};
use bulkhead_runtime::adoption::Adoption;
use flume::Receiver;
use kvm_bindings::{CpuId, kvm_fpu, kvm_lapic_state, kvm_msr_entry};
use vm_memory::GuestMemoryMmap;

use crate::acpi::{self, AcpiError, MachineDescription};
use crate::boot::{self, BootError, BootParams, LoadedKernel};
use crate::cpuid;
use crate::gate::GateThread;
use crate::group::Group;
use crate::irq::{LineError, Lines};
use crate::kick::Kick;
use crate::kvm::{Host, KvmError, Vcpu, Vm};
use crate::legacy_client::{LegacyClient, LegacyWiring};
use crate::memory::{self, MemoryError};
use crate::ports::Ports;
use crate::quirks::{self, QuirkError, VcpuQuirks};
use crate::run_loop::VcpuLoop;
use crate::virtio::registers::RegisterFile;
use crate::virtio::{self, Cpus, SlotFds, VirtioBus, VirtioError};

/// Offset of the queue notification register in a virtio-mmio slot.
const QUEUE_NOTIFY: u64 = 0x50;

/// The descriptors that a vCPU process was born with.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// Where a core is written to when the guest crashes.
    pub core: Option<File>,
    /// The boundary to the legacy process.
    pub legacy: LegacyFds,
    /// The boundary to each device process, in the order of the configuration.
    pub devices: Vec<SlotFds>,
    /// What is kept for later brokers.
    pub adoption: Option<Adoption>,
}

/// The descriptors of the legacy boundary.
#[derive(Debug)]
pub struct LegacyFds {
    /// The shared page.
    pub page: OwnedFd,
    /// Doorbell vCPU to legacy.
    pub kick: OwnedFd,
    /// Doorbell legacy to vCPU: interrupts.
    pub interrupt: OwnedFd,
    /// Doorbell legacy to vCPU: replies.
    pub reply: OwnedFd,
}

/// Why a VM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// A number of vCPUs that no machine has.
    #[error("vcpus is {got}, expected 1 to {VCPUS_MAX}")]
    Vcpus {
        /// The number asked for.
        got: u8,
    },
    /// The descriptors do not fit the configuration.
    #[error("{got} virtio devices granted, but {expected} configured")]
    Devices {
        /// Granted.
        got: usize,
        /// Configured.
        expected: usize,
    },
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The virtio devices.
    #[error(transparent)]
    Virtio(#[from] VirtioError),
    /// An interrupt line.
    #[error(transparent)]
    Line(#[from] LineError),
    /// The legacy page.
    #[error("legacy page: {0}")]
    Legacy(#[from] SharedError),
    /// The layer for incomplete KVMs.
    #[error(transparent)]
    Quirk(#[from] QuirkError),
    /// The thread that does the groundwork is gone.
    #[error("the thread that registers memory: {0}")]
    Groundwork(flume::RecvError),
    /// The kernel refused an event or a signal handler.
    #[error("{what}: {source}")]
    Os {
        /// What was wanted.
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// A VM at rest before its first instruction.
#[derive(Debug)]
pub struct Machine {
    /// The VM, which ends when this is dropped.
    pub vm: Arc<Vm>,
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// The kernel that was loaded.
    pub loaded: LoadedKernel,
    /// The kernel file, for symbols.
    pub kernel: File,
    /// Where a core goes.
    pub core: Option<File>,
    /// One loop for each vCPU, to be run on threads of their own.
    pub loops: Vec<VcpuLoop>,
    /// The vCPUs as one.
    pub group: Arc<Group>,
    /// The legacy boundary.
    pub legacy: Arc<LegacyClient>,
    /// The virtio boundary.
    pub virtio: Arc<VirtioBus>,
    /// The gates, to be run on a thread of their own.
    pub gates: GateThread,
    /// Ports.
    pub ports: Arc<Ports>,
    /// Interrupt lines.
    pub lines: Lines,
}

/// What a VM needs before it can have interrupt controllers: two requests that wait for the kernel.
#[derive(Debug)]
pub struct Groundwork {
    vm: Arc<Vm>,
    memory: GuestMemoryMmap,
    registers: RegisterFile,
    quirks: bool,
}

impl Groundwork {
    /// Filters registers where that is needed, and gives the VM its memory.
    ///
    /// # Errors
    /// KVM's errno.
    pub fn lay(self) -> Result<(), SetupError> {
        if self.quirks {
            quirks::prepare_vm(self.vm.fd()).map_err(QuirkError::from)?;
        }
        Ok(memory::register(&self.vm, &self.memory, &self.registers)?)
    }
}

/// Sets the VM up. `aside` has somebody else do the groundwork meanwhile, and tells where the result
/// will be.
///
/// # Errors
/// [`SetupError`] says which part of the configuration or of the host is at fault.
pub fn build(
    config: VcpuConfig,
    resources: Resources,
    aside: impl FnOnce(Groundwork) -> Result<Receiver<Result<(), SetupError>>, SetupError>,
) -> Result<Machine, SetupError> {
    if !(1..=VCPUS_MAX).contains(&config.vcpus) {
        return Err(SetupError::Vcpus { got: config.vcpus });
    }
    let host = Host::new(resources.kvm)?;
    let vm = Arc::new(host.create_vm()?);
    vm.reserve_kvm_pages(KVM_TSS_BASE, KVM_IDENTITY_MAP_BASE)?;
    let memory = memory::map(config.memory_bytes, config.huge_pages)?;
    let registers = RegisterFile::new().map_err(os("memory for registers"))?;
    let groundwork = aside(Groundwork {
        vm: Arc::clone(&vm),
        memory: memory.clone(),
        registers: registers.clone(),
        quirks: config.quirks,
    })?;
    let loaded = load(
        &config,
        &memory,
        &resources.kernel,
        resources.initrd.as_ref(),
    )?;
    let supported = host.supported_cpuid()?;
    let laid = groundwork.recv();
    laid.unwrap_or_else(|gone| Err(SetupError::Groundwork(gone)))?;
    vm.create_interrupt_controllers()?;
    let vcpus = (0..config.vcpus)
        .map(|index| make_vcpu(&vm, index, &config, &supported))
        .collect::<Result<Vec<_>, _>>()?;
    if let Some(boot_vcpu) = vcpus.first() {
        boot_vcpu.change_registers(|sregs, regs| loaded.entry.apply(sregs, regs))?;
    }
    let lines = Lines::connect(&vm)?;
    let cpus = Cpus {
        host: bulkhead_runtime::cpus(),
        guest: config.vcpus.into(),
    };
    let devices = pair_up(config.devices, resources.devices)?;
    let (virtio, gates) = virtio::build(memory.clone(), &registers, devices, cpus)?;
    connect_devices(&vm, &virtio)?;
    let flags = vcpus
        .iter()
        .map(Vcpu::kicker)
        .collect::<Result<Vec<_>, _>>()?;
    let kick = Kick::install().map_err(|errno| os("signal handler")(errno.into()))?;
    let wake = Doorbell::new().map_err(os("eventfd"))?;
    let group = Arc::new(Group::new(flags, kick, wake));
    let wiring = LegacyWiring {
        page: LegacyPage::map(resources.legacy.page)?,
        kick: resources.legacy.kick.into(),
        reply: resources.legacy.reply.into(),
        interrupt: resources.legacy.interrupt.into(),
    };
    let legacy = LegacyClient::new(
        wiring,
        config.legacy_generation,
        config.legacy_output_position,
        Arc::clone(&group),
    );
    let legacy = Arc::new(legacy);
    let ports = Arc::new(Ports::new(Arc::clone(&legacy), Arc::clone(&virtio)));
    let make_loop = |(index, mut vcpu): (u8, Vcpu)| {
        Ok(VcpuLoop {
            index,
            quirks: config
                .quirks
                .then(|| VcpuQuirks::new(vcpu.fd_mut()))
                .transpose()?,
            vcpu,
            memory: memory.clone(),
            ports: Arc::clone(&ports),
            group: Arc::clone(&group),
        })
    };
    let loops = (0..)
        .zip(vcpus)
        .map(make_loop)
        .collect::<Result<Vec<_>, SetupError>>()?;
    Ok(Machine {
        vm,
        memory,
        loaded,
        kernel: resources.kernel,
        core: resources.core,
        loops,
        group,
        legacy,
        virtio,
        gates,
        ports,
        lines,
    })
}

fn os(what: &'static str) -> impl Fn(std::io::Error) -> SetupError {
    move |source| SetupError::Os { what, source }
}

fn load(
    config: &VcpuConfig,
    memory: &GuestMemoryMmap,
    kernel: &File,
    initrd: Option<&File>,
) -> Result<LoadedKernel, SetupError> {
    let slots: Vec<u8> = config.devices.iter().map(|device| device.slot).collect();
    let machine = MachineDescription {
        vcpus: config.vcpus,
        virtio_slots: &slots,
    };
    let rsdp = acpi::write_tables(memory, &machine)?;
    let params = BootParams {
        kernel,
        initrd,
        cmdline: &config.cmdline,
        memory_bytes: config.memory_bytes,
        rsdp,
    };
    Ok(boot::load(memory, &params)?)
}

/// A vCPU in its state after reset; the boot vCPU's registers come later.
fn make_vcpu(vm: &Vm, index: u8, config: &VcpuConfig, supported: &CpuId) -> Result<Vcpu, KvmError> {
    let vcpu = vm.create_vcpu(index)?;
    let mut leaves = cpuid::base_cpuid(supported, index, config.vcpus);
    if config.quirks {
        quirks::filter_cpuid(&mut leaves);
    }
    vcpu.set_cpuid(&leaves)?;
    vcpu.set_msrs(&INITIAL_MSRS)?;
    vcpu.set_fpu(&kvm_fpu {
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })?;
    vcpu.change_lapic(connect_local_interrupts)?;
    Ok(vcpu)
}

/// What firmware leaves behind: fast string instructions on, all memory write-back.
const INITIAL_MSRS: [kvm_msr_entry; 2] = [msr(0x1a0, 1), msr(0x2ff, 1 << 11 | 6)];

const fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        reserved: 0,
    }
}

/// LINT0 takes the PIC's interrupts (ExtINT), LINT1 the NMI.
fn connect_local_interrupts(lapic: &mut kvm_lapic_state) {
    const LINT0: usize = 0x350;
    const LINT1: usize = 0x360;
    const DELIVERY_MODE_EXTINT: u16 = 0b111 << 8;
    const DELIVERY_MODE_NMI: u16 = 0b100 << 8;
    for (offset, mode) in [(LINT0, DELIVERY_MODE_EXTINT), (LINT1, DELIVERY_MODE_NMI)] {
        for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(mode.to_le_bytes()) {
            *register = i8::from_le_bytes([byte]);
        }
    }
}

fn pair_up(
    slots: Vec<VirtioSlot>,
    fds: Vec<SlotFds>,
) -> Result<Vec<(VirtioSlot, SlotFds)>, SetupError> {
    if slots.len() != fds.len() {
        return Err(SetupError::Devices {
            got: fds.len(),
            expected: slots.len(),
        });
    }
    Ok(slots.into_iter().zip(fds).collect())
}

fn connect_devices(vm: &Arc<Vm>, bus: &VirtioBus) -> Result<(), SetupError> {
    bus.connect_lines(vm).map_err(os("eventfd"))?;
    for wiring in bus.wiring() {
        vm.connect_interrupt(&wiring.interrupt, wiring.gsi)?;
        let base = virtio_mmio_address(wiring.slot);
        for (queue, doorbell) in (0u32..).zip(&wiring.notify) {
            vm.connect_doorbell(doorbell, base + QUEUE_NOTIFY, queue)?;
        }
    }
    Ok(())
}
