//! The virtio-mmio transport (version 2): finding devices, negotiating, queues, interrupts.

use core::sync::atomic::{AtomicBool, Ordering};

use crate::machine::Machine;
use crate::report::{Failure, expect, fail};
use crate::sys::{phys, ring0, time::Deadline};
use crate::virtio::queue::{QUEUE_SIZE_MAX, Queue};

/// Device ids.
pub mod id {
    /// Network device.
    pub const NET: u32 = 1;
    /// Block device.
    pub const BLK: u32 = 2;
    /// Console.
    pub const CONSOLE: u32 = 3;
    /// Entropy source.
    pub const RNG: u32 = 4;
    /// Socket device.
    pub const VSOCK: u32 = 19;
    /// Shared folder.
    pub const FS: u32 = 26;
}

/// Register offsets.
pub mod reg {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    pub const QUEUE_NUM: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

/// Device status bits.
pub mod status {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 0x40;
}

/// Feature bits of every device.
pub mod feature {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

const MAGIC: u32 = 0x7472_6976;
static SCANNED: AtomicBool = AtomicBool::new(false);

/// One slot with a device in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Address of its registers.
    pub base: u64,
    /// Slot number.
    pub slot: u32,
    /// Virtio device id.
    pub id: u32,
    /// Interrupt line.
    pub gsi: u32,
}

/// A family of VMMs: where the slots are.
struct Platform {
    base: u64,
    stride: u64,
    slots: u32,
    gsi: fn(&Machine, u32) -> u32,
}

const BULKHEAD_GSI: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
const PLATFORMS: [Platform; 2] = [
    Platform {
        base: 0xd000_0000,
        stride: 0x1000,
        slots: BULKHEAD_GSI.len() as u32,
        gsi: |_, slot| BULKHEAD_GSI[slot as usize],
    },
    Platform {
        base: 0xfeb0_0000,
        stride: 0x200,
        slots: 24,
        gsi: qemu_gsi,
    },
];

/// QEMU's microvm: a second I/O APIC serves the slots where there is one.
fn qemu_gsi(machine: &Machine, slot: u32) -> u32 {
    match &machine.acpi {
        Some(acpi) if acpi.ioapics > 1 => 24 + slot,
        Some(_) => 16 + slot,
        None => 5 + slot,
    }
}

/// Calls `found` for each device; stops when it gives something.
pub fn each<T>(machine: &Machine, mut found: impl FnMut(Device) -> Option<T>) -> Option<T> {
    SCANNED.store(true, Ordering::Relaxed);
    for platform in &PLATFORMS {
        let mut any = false;
        for slot in 0..platform.slots {
            let base = platform.base + u64::from(slot) * platform.stride;
            if phys::read::<u32>(base) != MAGIC {
                continue;
            }
            any = true;
            let id = phys::read::<u32>(base + reg::DEVICE_ID);
            if id != 0 {
                let device = Device {
                    base,
                    slot,
                    id,
                    gsi: (platform.gsi)(machine, slot),
                };
                if let Some(result) = found(device) {
                    return Some(result);
                }
            }
        }
        if any {
            return None;
        }
    }
    None
}

/// Takes every started device back, so that none can touch memory that is given to others.
pub fn reset_all(machine: &Machine) {
    if !SCANNED.load(Ordering::Relaxed) {
        return;
    }
    each(machine, |device| {
        if device.read(reg::STATUS) != 0 && device.reset().is_err() {
            fail!("boot", "kind=timeout what=reset slot={}", device.slot);
        }
        None::<()>
    });
}

/// The device number `index` of a kind, by slot order.
pub fn find(machine: &Machine, id: u32, index: u64) -> Result<Device, Failure> {
    let mut before = index;
    each(machine, |device| {
        if device.id != id {
            return None;
        }
        let hit = before == 0;
        before = before.wrapping_sub(1);
        hit.then_some(device)
    })
    .ok_or(Failure::NoDevice { id, index })
}

impl Device {
    /// Whether it is at a place of Bulkhead's machine.
    pub fn is_bulkhead(&self) -> bool {
        self.base < PLATFORMS[1].base
    }

    /// Reads a register.
    pub fn read(&self, register: u64) -> u32 {
        phys::read(self.base + register)
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        phys::write(self.base + register, value);
    }

    fn write_address(&self, register: u64, address: u64) {
        self.write(register, address as u32);
        self.write(register + 4, (address >> 32) as u32);
    }

    /// Reads a field of the device configuration.
    pub fn config<T: Copy>(&self, offset: u64) -> T {
        phys::read(self.base + reg::CONFIG + offset)
    }

    /// Reads a 64-bit configuration field, again if it changed in between.
    pub fn config_u64(&self, offset: u64) -> u64 {
        loop {
            let generation = self.read(reg::CONFIG_GENERATION);
            let low: u32 = self.config(offset);
            let high: u32 = self.config(offset + 4);
            if self.read(reg::CONFIG_GENERATION) == generation {
                return u64::from(high) << 32 | u64::from(low);
            }
        }
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> Result<(), Failure> {
        self.write(reg::STATUS, 0);
        let deadline = Deadline::after_ms(5000);
        while self.read(reg::STATUS) != 0 {
            if deadline.passed() {
                return Err(Failure::Timeout("reset"));
            }
        }
        Ok(())
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        self.write(reg::DEVICE_FEATURES_SEL, 0);
        let low = self.read(reg::DEVICE_FEATURES);
        self.write(reg::DEVICE_FEATURES_SEL, 1);
        u64::from(self.read(reg::DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Resets the device and takes those of the wanted features that it offers.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, Failure> {
        expect("mmio_version", u64::from(self.read(reg::VERSION)), 2)?;
        self.reset()?;
        let mut bits = status::ACKNOWLEDGE | status::DRIVER;
        self.write(reg::STATUS, bits);
        let features = self.offered() & (wanted | feature::VERSION_1);
        self.write(reg::DRIVER_FEATURES_SEL, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
        bits |= status::FEATURES_OK;
        self.write(reg::STATUS, bits);
        expect("status", u64::from(self.read(reg::STATUS)), u64::from(bits))?;
        Ok(features)
    }

    /// Sets one queue up, as large as device and driver allow.
    pub fn queue(&self, index: u16, features: u64) -> Result<Queue, Failure> {
        self.write(reg::QUEUE_SEL, u32::from(index));
        expect("queue_ready", u64::from(self.read(reg::QUEUE_READY)), 0)?;
        let max = self.read(reg::QUEUE_NUM_MAX);
        if max == 0 {
            return Err(Failure::Wrong {
                what: "queue_num_max",
                got: 0,
                expected: 1,
            });
        }
        let size = (max.min(QUEUE_SIZE_MAX as u32) as u16).max(1);
        let queue = Queue::new(*self, index, size, features);
        self.program(index, u32::from(size), queue.addresses());
        self.write(reg::QUEUE_READY, 1);
        expect("queue_ready", u64::from(self.read(reg::QUEUE_READY)), 1)?;
        Ok(queue)
    }

    /// Writes size and addresses (descriptors, driver area, device area) of a queue.
    pub fn program(&self, index: u16, size: u32, addresses: [u64; 3]) {
        self.write(reg::QUEUE_SEL, u32::from(index));
        self.write(reg::QUEUE_NUM, size);
        self.write_address(reg::QUEUE_DESC, addresses[0]);
        self.write_address(reg::QUEUE_DRIVER, addresses[1]);
        self.write_address(reg::QUEUE_DEVICE, addresses[2]);
    }

    /// Sets DRIVER_OK.
    pub fn start(&self) -> Result<(), Failure> {
        let bits = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
        self.write(reg::STATUS, bits);
        expect("status", u64::from(self.read(reg::STATUS)), u64::from(bits))
    }

    /// Whether the device asks for a reset.
    pub fn needs_reset(&self) -> bool {
        self.read(reg::STATUS) & status::NEEDS_RESET != 0
    }

    /// Reads and acknowledges the interrupt causes.
    pub fn take_interrupt(&self) -> u32 {
        ring0::take_interrupt(self.base + reg::INTERRUPT_STATUS)
    }
}
