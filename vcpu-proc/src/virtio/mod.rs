//! The virtio-mmio transport (virtio 1.2 section 4.2, version 2) and its connection to the gates.
//!
//! Writes to registers are served here, on the vCPU thread that made them. What is read is memory ([`registers`]), so that a
//! read costs nothing. Writes after which the driver reads what the device alone knows wait for it, with a deadline.

mod mmio;
pub mod registers;
#[cfg(test)]
mod tests;

use crate::gate::thread::{COMMANDS_MAX, Command, CommandSender, FAULTS_MAX, Served};
use crate::gate::{Attachment, DeviceChannel, Gate, GateLink, GateThread, Line, Successor};
use crate::kvm::Vm;
use bulkhead_ipc::platform;
use bulkhead_ipc::protocol::birth::VirtioSlot;
use bulkhead_ipc::protocol::vcpu::FromVcpu;
use bulkhead_ipc::shared::{Doorbell, SharedError};
use bulkhead_ipc::window::{Doorbells, LayoutError, Window, WindowLayout};
use bulkhead_runtime::spin::Spin;
use mmio::Transport;
use registers::RegisterFile;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The descriptors of one device.
#[derive(Debug)]
pub struct SlotFds {
    /// Its window.
    pub window: OwnedFd,
    /// Gate to device.
    pub kick: OwnedFd,
    /// Device to gate.
    pub call: OwnedFd,
}

/// What KVM must know of one device.
#[derive(Debug)]
pub struct SlotWiring {
    /// virtio-mmio slot.
    pub slot: u8,
    /// Interrupt line.
    pub gsi: u32,
    /// To be registered as irqfd for `gsi`.
    pub interrupt: EventFd,
    /// For each queue, to be registered as ioeventfd: a 32-bit write of the queue's number to
    /// offset 0x50 of the slot.
    pub notify: Vec<EventFd>,
}

/// Why the virtio devices could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The birth configuration names a slot that the machine does not have, or one twice.
    #[error("virtio slot {slot} of device '{name}' is not free, expected 0 to {max}")]
    Slot {
        /// Device name.
        name: String,
        /// The slot asked for.
        slot: u8,
        /// The last slot.
        max: usize,
    },
    /// The window cannot be laid out.
    #[error("window of device '{name}'")]
    Layout {
        /// Device name.
        name: String,
        /// Cause.
        source: LayoutError,
    },
    /// The window cannot be mapped.
    #[error("window of device '{name}'")]
    Window {
        /// Device name.
        name: String,
        /// Cause.
        source: SharedError,
    },
    /// The kernel refused an eventfd or epoll.
    #[error("event descriptors")]
    Events(#[from] io::Error),
}

/// All virtio-mmio devices of the machine, as vCPU threads see them.
#[derive(Debug)]
pub struct VirtioBus {
    registers: RegisterFile,
    slots: Vec<Option<Transport>>,
    wiring: Vec<SlotWiring>,
    shared: Vec<(u8, Arc<DeviceChannel>, Arc<GateLink>)>,
    commands: CommandSender,
    faults: flume::Receiver<FromVcpu>,
    fault_bell: Arc<EventFd>,
    interrupted: Arc<AtomicBool>,
}

fn eventfd() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// The CPUs that a VM may run on, which decide whether looking at a ring beats sleeping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cpus {
    /// CPUs of the host that this process may use.
    pub host: usize,
    /// vCPUs of the machine.
    pub guest: usize,
}

impl Cpus {
    /// How the gate thread waits.
    const fn spin(self) -> Spin {
        Spin::beside(1, self.host)
    }

    /// Whether vCPUs, gate thread and a device process have a CPU each.
    const fn all_run_at_once(self) -> bool {
        self.host >= self.guest + 2
    }
}

/// Sets all devices up, which the guest reads in `registers`. The gate thread is returned to be run on a thread of its own.
///
/// # Errors
/// [`VirtioError`] when configuration or descriptors are not usable.
pub fn build(
    memory: GuestMemoryMmap,
    registers: &RegisterFile,
    devices: Vec<(VirtioSlot, SlotFds)>,
    cpus: Cpus,
) -> Result<(Arc<VirtioBus>, GateThread), VirtioError> {
    let (command_queue, commands) = flume::bounded(COMMANDS_MAX);
    let (faults_in, faults) = flume::bounded(FAULTS_MAX);
    let command_bell = Arc::new(eventfd()?);
    let fault_bell = Arc::new(eventfd()?);
    let interrupted = Arc::new(AtomicBool::new(false));
    let commands_wait = Arc::new(AtomicBool::new(false));
    let sender = CommandSender {
        queue: command_queue,
        bell: Arc::clone(&command_bell),
        waits: Arc::clone(&commands_wait),
    };
    let mut slots: Vec<Option<Transport>> = Vec::new();
    slots.resize_with(platform::VIRTIO_MMIO_SLOTS, || None);
    let mut wiring = Vec::with_capacity(devices.len());
    let mut served = Vec::with_capacity(devices.len());
    let mut shared = Vec::with_capacity(devices.len());
    for (slot, fds) in devices {
        let number = usize::from(slot.slot);
        let (Some(place @ None), Some(gsi)) =
            (slots.get_mut(number), platform::VIRTIO_MMIO_GSI.get(number))
        else {
            let max = platform::VIRTIO_MMIO_SLOTS - 1;
            return Err(VirtioError::Slot {
                name: slot.name,
                slot: slot.slot,
                max,
            });
        };
        let name = || slot.name.clone();
        let bytes = usize::try_from(slot.window_bytes).unwrap_or(0);
        let layout = WindowLayout::of(slot.kind, bytes, &slot.queue_sizes).map_err(|source| {
            VirtioError::Layout {
                name: name(),
                source,
            }
        })?;
        let window = Window::map(fds.window, layout).map_err(|source| VirtioError::Window {
            name: name(),
            source,
        })?;
        let bells = Doorbells {
            kick: fds.kick.into(),
            call: Doorbell::from(fds.call),
        };
        let channel = Arc::new(DeviceChannel { window, bells });
        let interrupt = eventfd()?;
        let notify = slot
            .queue_sizes
            .iter()
            .map(|_| eventfd())
            .collect::<Result<Vec<_>, _>>()?;
        let own = registers.of(slot.slot);
        let link = Arc::new(GateLink::new(&slot, interrupt.try_clone()?, own));
        let gate = Gate::new(
            &slot,
            Arc::clone(&channel),
            Arc::clone(&link),
            !cpus.all_run_at_once(),
        );
        shared.push((slot.slot, channel, Arc::clone(&link)));
        served.push(Served {
            slot: slot.slot,
            gate,
            notify: notify
                .iter()
                .map(EventFd::try_clone)
                .collect::<Result<_, _>>()?,
            ready: true,
            guest_faults_reported: 0,
        });
        wiring.push(SlotWiring {
            slot: slot.slot,
            gsi: *gsi,
            interrupt,
            notify,
        });
        *place = Some(Transport::new(
            &slot,
            link,
            sender.clone(),
            Arc::clone(&interrupted),
        ));
    }
    let thread = GateThread {
        memory,
        devices: served,
        commands,
        command_bell,
        commands_wait,
        faults: faults_in,
        fault_bell: Arc::clone(&fault_bell),
        epoll: Epoll::new()?,
        spin: cpus.spin(),
        parallel: cpus.all_run_at_once(),
    };
    thread.register()?;
    let bus = VirtioBus {
        registers: registers.clone(),
        slots,
        wiring,
        shared,
        commands: sender,
        faults,
        fault_bell,
        interrupted,
    };
    Ok((Arc::new(bus), thread))
}

impl VirtioBus {
    fn find(&self, address: u64) -> Option<(&Transport, u64)> {
        let offset = address.checked_sub(platform::VIRTIO_MMIO_BASE)?;
        let slot = usize::try_from(offset / platform::VIRTIO_MMIO_STRIDE).ok()?;
        let transport = self.slots.get(slot)?.as_ref()?;
        Some((transport, offset % platform::VIRTIO_MMIO_STRIDE))
    }

    /// A guest read of `data.len()` bytes at guest-physical `address`, if it was an exit.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        let offset = address.checked_sub(platform::VIRTIO_MMIO_BASE);
        let offset = offset.and_then(|offset| usize::try_from(offset).ok());
        self.registers.read(offset.unwrap_or(usize::MAX), data);
    }

    /// A guest write. Writes without a device are ignored. May wait for the device to publish
    /// its configuration, until [`VirtioBus::interrupt_waits`] or a deadline.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((transport, offset)) = self.find(address) {
            transport.write(offset, data);
        }
    }

    /// What KVM must know of each device.
    #[must_use]
    pub fn wiring(&self) -> &[SlotWiring] {
        &self.wiring
    }

    /// Tells the gates their interrupt lines.
    pub(crate) fn connect_lines(&self, vm: &Arc<Vm>) -> io::Result<()> {
        let acknowledged = Arc::new(eventfd()?);
        for (wiring, (_, _, link)) in self.wiring.iter().zip(&self.shared) {
            let base = platform::virtio_mmio_address(wiring.slot);
            link.connect(Line {
                vm: Arc::clone(vm),
                gsi: wiring.gsi,
                acknowledge: base + mmio::INTERRUPT_ACKNOWLEDGE,
                acknowledged: Arc::clone(&acknowledged),
            });
        }
        Ok(())
    }

    /// The device process in `slot` is dead: everything is made ready for `successor`, as
    /// [`VirtioBus::attachments`] will say.
    pub fn prepare_slot(&self, slot: u8, successor: Successor) {
        self.commands.send(Command::Prepare { slot, successor });
    }

    /// Which device process each slot has. When it changes, [`VirtioBus::fault_bell`] is rung.
    pub(crate) fn attachments(&self) -> impl Iterator<Item = (u8, Attachment)> {
        let shared = self.shared.iter();
        shared.map(|(slot, _, link)| (*slot, link.attachment()))
    }

    /// Window, kick and call doorbell of `slot`, for a new device process.
    #[must_use]
    pub fn descriptors(&self, slot: u8) -> Option<[BorrowedFd<'_>; 3]> {
        let (_, channel, _) = self.shared.iter().find(|(number, ..)| *number == slot)?;
        let window = channel.window.memory.descriptor()?;
        let bells = &channel.bells;
        Some([window, bells.kick.as_fd(), bells.call.as_fd()])
    }

    /// The device process in `slot` is gone: its requests are answered with errors from now on.
    pub fn device_lost(&self, slot: u8) {
        self.commands.send(Command::Lost { slot });
    }

    /// Ends all waits of vCPU threads for device configuration, now and later: the VM is ending.
    pub fn interrupt_waits(&self) {
        self.interrupted.store(true, Ordering::Release);
        self.slots.iter().flatten().for_each(Transport::wake);
    }

    /// Ends the gate thread.
    pub fn stop(&self) {
        self.commands.send(Command::Stop);
    }

    /// Rung when there are faults to take.
    #[must_use]
    pub fn fault_bell(&self) -> &EventFd {
        &self.fault_bell
    }

    /// Faults of devices and of the guest towards devices, for the broker. Bounded; never blocks.
    #[must_use]
    pub fn take_faults(&self) -> Vec<FromVcpu> {
        self.faults.try_iter().collect()
    }
}
