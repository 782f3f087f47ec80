//! What the driver writes to one virtio-mmio device, and what it reads then (virtio 1.2 section 4.2.2).

use crate::gate::thread::{Command, CommandSender};
use crate::gate::{GateLink, STATUS_NEEDS_RESET};
use crate::virtio::registers::Register;
use bulkhead_ipc::protocol::birth::VirtioSlot;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

const MAGIC: u32 = 0x7472_6976; // "virt"
const VERSION: u32 = 2;
const VENDOR: u32 = 0x484b_4c42; // "BLKH"

/// Offset of the register that a driver writes to what it has seen of the interrupt status.
pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;

const DEVICE_FEATURES_SEL: u64 = 0x14;
const STATUS: u64 = Register::Status as u64;

const STATUS_DRIVER: u32 = 2;
const STATUS_FEATURES_OK: u32 = 8;
const STATUS_DRIVER_OK: u32 = 4;

/// How long a guest waits for a device to publish its configuration, counted from the start.
const PUBLISH_DEADLINE: Duration = Duration::from_secs(10);
/// How long a guest waits for the gate thread of its own process to carry a reset out.
const RESET_DEADLINE: Duration = Duration::from_secs(5);

/// Feature bits of the transport, which the gate implements for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
const _: () = assert!(TRANSPORT_FEATURES & 1 << VIRTIO_F_RING_RESET == 0);

#[derive(Debug, Clone, Default)]
struct QueueRegisters {
    size_max: u16,
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

impl QueueRegisters {
    fn reset(&mut self) {
        *self = Self {
            size_max: self.size_max,
            ..Self::default()
        };
    }

    /// The queue as programmed, or nothing when it is not valid.
    fn build(&self, event_index: bool) -> Option<Queue> {
        let size = u16::try_from(self.size).ok()?;
        let mut queue = Queue::new(self.size_max).ok()?;
        queue.try_set_size(size).ok()?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .ok()?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.driver))
            .ok()?;
        queue
            .try_set_used_ring_address(GuestAddress(self.device))
            .ok()?;
        queue.set_event_idx(event_index);
        queue.set_ready(true);
        Some(queue)
    }
}

#[derive(Debug)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
    status: u32,
    resets_asked: u64,
    /// A queue was programmed with values that no queue can have.
    broken: bool,
}

/// One device. The lock is taken by vCPU threads alone; the gate thread is reached by commands. Whoever changes what depends on a
/// selecting register holds it.
#[derive(Debug)]
pub(crate) struct Transport {
    slot: u8,
    registers: Mutex<Registers>,
    link: Arc<GateLink>,
    commands: CommandSender,
    interrupted: Arc<AtomicBool>,
    born: Instant,
}

impl Transport {
    pub(crate) fn new(
        slot: &VirtioSlot,
        link: Arc<GateLink>,
        commands: CommandSender,
        interrupted: Arc<AtomicBool>,
    ) -> Self {
        let queue = |&size_max: &u16| QueueRegisters {
            size_max,
            ..Default::default()
        };
        let registers = Registers {
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
            queues: slot.queue_sizes.iter().map(queue).collect(),
            status: 0,
            resets_asked: 0,
            broken: false,
        };
        let shown = &link.registers;
        for (register, value) in [
            (Register::Magic, MAGIC),
            (Register::Version, VERSION),
            (Register::DeviceId, slot.kind.virtio_id()),
            (Register::VendorId, VENDOR),
            // All ones: no shared memory region exists.
            (Register::SharedMemoryLengthLow, u32::MAX),
            (Register::SharedMemoryLengthHigh, u32::MAX),
            (Register::SharedMemoryBaseLow, u32::MAX),
            (Register::SharedMemoryBaseHigh, u32::MAX),
        ] {
            shown.set(register, value);
        }
        let transport = Self {
            slot: slot.slot,
            registers: Mutex::new(registers),
            link,
            commands,
            interrupted,
            born: Instant::now(),
        };
        transport.show_queue(&transport.registers());
        transport
    }

    /// Wakes a thread that waits for the device.
    pub(crate) fn wake(&self) {
        // Taking the lock orders the wake-up after the check of a thread about to wait.
        drop(self.link.config());
        self.link.notify();
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        if let Ok(bytes) = <[u8; 4]>::try_from(data)
            && offset < 0x100
        {
            self.write_register(offset, u32::from_le_bytes(bytes));
        }
        // No device here has configuration fields that the driver may write.
    }

    fn registers(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the driver the queue that it has selected.
    fn show_queue(&self, registers: &Registers) {
        let queue = usize::try_from(registers.queue_sel)
            .ok()
            .and_then(|sel| registers.queues.get(sel));
        let (size_max, ready) = queue.map_or((0, false), |queue| (queue.size_max, queue.ready));
        let shown = &self.link.registers;
        shown.set(Register::QueueSizeMax, size_max.into());
        shown.set(Register::QueueReady, ready.into());
    }

    /// Shows the driver the half of the features that it has selected. These are known when the device has published them.
    fn show_features(&self, registers: &Registers, offered: u64) {
        let value = half(offered, registers.device_features_sel);
        self.link.registers.set(Register::DeviceFeatures, value);
    }

    /// What is on offer once the device has published it, or what there is at the deadline. The driver can read the
    /// configuration then.
    fn offered(&self) -> u64 {
        let within = PUBLISH_DEADLINE.saturating_sub(self.born.elapsed());
        let image = self.link.wait_config(within, |image| {
            image.settled || self.interrupted.load(Ordering::Acquire)
        });
        image.features | TRANSPORT_FEATURES
    }

    fn write_register(&self, offset: u64, value: u32) {
        if offset == INTERRUPT_ACKNOWLEDGE {
            self.link.registers.clear(Register::InterruptStatus, value);
            return;
        }
        if offset == STATUS {
            self.write_status(value);
            return;
        }
        if offset == DEVICE_FEATURES_SEL {
            let offered = self.offered();
            let mut registers = self.registers();
            registers.device_features_sel = value;
            self.show_features(&registers, offered);
            return;
        }
        // QueueNotify is an ioeventfd; a write that reaches this place names no queue.
        let mut registers = self.registers();
        let registers = &mut *registers;
        match offset {
            0x24 => registers.driver_features_sel = value,
            0x20 if registers.status & STATUS_FEATURES_OK == 0 => {
                set_half(
                    &mut registers.driver_features,
                    registers.driver_features_sel,
                    value,
                );
            }
            0x30 => registers.queue_sel = value,
            _ => write_queue(registers, offset, value),
        }
        self.show_queue(registers);
    }

    fn write_status(&self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver that says that it is one reads features and configuration next.
        let reads = value & (STATUS_DRIVER | STATUS_FEATURES_OK | STATUS_DRIVER_OK) != 0;
        let offered = if reads { self.offered() } else { 0 };
        let mut registers = self.registers();
        let registers = &mut *registers;
        if reads {
            self.show_features(registers, offered);
        }
        let mut new = value & !STATUS_NEEDS_RESET;
        let acceptable = registers.driver_features & !offered == 0
            && registers.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        if !acceptable {
            // The driver reads the bit back and learns that its choice was refused.
            new &= !STATUS_FEATURES_OK;
        }
        let starts = new & !registers.status & STATUS_DRIVER_OK != 0;
        // The driver may only add bits, and only start after the features were agreed on.
        registers.status |= new;
        self.link.registers.raise(Register::Status, new);
        if starts && registers.status & STATUS_FEATURES_OK != 0 {
            self.activate(registers);
        }
    }

    fn activate(&self, registers: &mut Registers) {
        let features = registers.driver_features;
        let event_index = features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(registers.queues.len());
        for queue in &registers.queues {
            let built = if queue.ready {
                queue.build(event_index)
            } else {
                None
            };
            registers.broken |= queue.ready && built.is_none();
            queues.push(built);
        }
        if registers.broken {
            self.link.set_needs_reset(true);
            self.link.raise_config();
            return;
        }
        self.commands.send(Command::Activate {
            slot: self.slot,
            features,
            queues,
        });
    }

    /// Carried out when this returns: a driver need not poll the status register.
    fn reset(&self) {
        let mut registers = self.registers();
        let registers = &mut *registers;
        registers.device_features_sel = 0;
        registers.driver_features_sel = 0;
        registers.driver_features = 0;
        registers.queue_sel = 0;
        registers.queues.iter_mut().for_each(QueueRegisters::reset);
        registers.status = 0;
        registers.broken = false;
        registers.resets_asked += 1;
        let asked = registers.resets_asked;
        self.commands.send(Command::Reset { slot: self.slot });
        let image = self.link.wait_config(RESET_DEADLINE, |image| {
            image.resets_done >= asked || self.interrupted.load(Ordering::Acquire)
        });
        let offered = image.features | TRANSPORT_FEATURES;
        let is_settled = image.settled;
        drop(image);
        let shown = &self.link.registers;
        // If the gate thread is late, its own word alone stays until it has come.
        shown.clear(Register::Status, !STATUS_NEEDS_RESET);
        self.show_queue(registers);
        if is_settled {
            self.show_features(registers, offered);
        }
    }
}

fn write_queue(registers: &mut Registers, offset: u64, value: u32) {
    let running = registers.status & STATUS_DRIVER_OK != 0;
    let Some(queue) = usize::try_from(registers.queue_sel)
        .ok()
        .and_then(|sel| registers.queues.get_mut(sel))
    else {
        return;
    };
    if running {
        // Queues are programmed before DRIVER_OK; VIRTIO_F_RING_RESET is not offered.
        return;
    }
    match offset {
        0x38 => queue.size = value,
        0x44 => queue.ready = value & 1 != 0,
        0x80 => set_half(&mut queue.descriptors, 0, value),
        0x84 => set_half(&mut queue.descriptors, 1, value),
        0x90 => set_half(&mut queue.driver, 0, value),
        0x94 => set_half(&mut queue.driver, 1, value),
        0xa0 => set_half(&mut queue.device, 0, value),
        0xa4 => set_half(&mut queue.device, 1, value),
        _ => {}
    }
}

/// The 32-bit half `sel` of a 64-bit register; halves past the second are zero.
fn half(value: u64, sel: u32) -> u32 {
    let [low, high] = split(value);
    match sel {
        0 => low,
        1 => high,
        _ => 0,
    }
}

fn set_half(target: &mut u64, sel: u32, value: u32) {
    let [low, high] = split(*target);
    *target = match sel {
        0 => u64::from(high) << 32 | u64::from(value),
        1 => u64::from(value) << 32 | u64::from(low),
        _ => return,
    };
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "the two halves of a u64 are u32s"
)]
const fn split(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}
