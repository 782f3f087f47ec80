//! I/O ports and memory-mapped registers: who answers what the guest reads and writes.
//!
//! Accesses are taken apart into bytes, as a bus does for eight-bit devices; each byte has one
//! owner. What nobody owns reads as all ones and ignores writes, as on a PC. Registers of virtio
//! devices belong to [`VirtioBus`], ports of serial port, clock and keyboard controller to
//! [`LegacyClient`]; what is left are registers whose only effect is on the VM itself, so they need
//! no process of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bulkhead_ipc::legacy_page;
use bulkhead_ipc::platform::{
    ACPI_GED_PORT, ACPI_RESET_PORT, ACPI_S5_SLEEP_TYPE, ACPI_SLEEP_CONTROL_PORT,
    ACPI_SLEEP_STATUS_PORT, DEBUG_EXIT_PORT, PVPANIC_PORT, VIRTIO_MMIO_BASE, VIRTIO_MMIO_SLOTS,
    VIRTIO_MMIO_STRIDE,
};
use bulkhead_ipc::protocol::vcpu::Outcome;

use crate::legacy_client::{ALL_ONES, LegacyClient};
use crate::virtio::VirtioBus;

const VIRTIO_RANGE: std::ops::Range<u64> =
    VIRTIO_MMIO_BASE..VIRTIO_MMIO_BASE + VIRTIO_MMIO_STRIDE * VIRTIO_MMIO_SLOTS as u64;
const SLEEP_ENABLE: u8 = 1 << 5;
const RESET_VALUE: u8 = 1;
const GED_POWER_BUTTON: u8 = 1 << 0;
const PVPANIC_PANICKED: u8 = 1 << 0;
const PVPANIC_CRASH_LOADED: u8 = 1 << 1;

/// Everything that vCPU threads reach without memory.
#[derive(Debug)]
pub struct Ports {
    legacy: Arc<LegacyClient>,
    virtio: Arc<VirtioBus>,
    events: AtomicU8,
}

impl Ports {
    /// The machine's ports.
    #[must_use]
    pub fn new(legacy: Arc<LegacyClient>, virtio: Arc<VirtioBus>) -> Self {
        Self {
            legacy,
            virtio,
            events: AtomicU8::new(0),
        }
    }

    /// Control thread: the power button is pressed. The caller raises the event interrupt.
    pub fn press_power_button(&self) {
        self.events.fetch_or(GED_POWER_BUTTON, Ordering::SeqCst);
    }

    /// The guest writes elements of `size` bytes. Returns how the VM ends, if it does by that.
    #[must_use]
    pub fn write(&self, port: u16, size: u8, data: &[u8]) -> Option<Outcome> {
        let mut ended = None;
        for element in data.chunks(usize::from(size).max(1)) {
            for (port, byte) in (port..=u16::MAX).zip(element) {
                ended = ended.or(self.write_byte(port, *byte));
            }
        }
        ended
    }

    /// The guest reads elements of `size` bytes.
    pub fn read(&self, port: u16, size: u8, data: &mut [u8]) {
        for element in data.chunks_mut(usize::from(size).max(1)) {
            element.fill(ALL_ONES);
            for (port, byte) in (port..=u16::MAX).zip(element) {
                *byte = self.read_byte(port);
            }
        }
    }

    /// The guest writes to `address`, where it has no memory.
    pub fn write_mmio(&self, address: u64, data: &[u8]) {
        if VIRTIO_RANGE.contains(&address) {
            self.virtio.write(address, data);
        }
    }

    /// The guest reads from `address`, where it has no memory.
    pub fn read_mmio(&self, address: u64, data: &mut [u8]) {
        data.fill(ALL_ONES);
        if VIRTIO_RANGE.contains(&address) {
            self.virtio.read(address, data);
        }
    }

    fn write_byte(&self, port: u16, value: u8) -> Option<Outcome> {
        match port {
            ACPI_SLEEP_CONTROL_PORT => {
                let soft_off = SLEEP_ENABLE | ACPI_S5_SLEEP_TYPE << 2;
                let mask = SLEEP_ENABLE | 0b111 << 2;
                (value & mask == soft_off).then_some(Outcome::PowerOff)
            }
            ACPI_RESET_PORT => (value == RESET_VALUE).then_some(Outcome::Reset),
            DEBUG_EXIT_PORT => Some(Outcome::DebugExit(value)),
            // A guest that has loaded a crash kernel goes on with it: only bit 0 ends the VM.
            PVPANIC_PORT => (value & PVPANIC_PANICKED != 0).then_some(Outcome::GuestPanic),
            _ if legacy_page::owns_port(port) => {
                self.legacy.write(port, value);
                None
            }
            _ => None,
        }
    }

    fn read_byte(&self, port: u16) -> u8 {
        match port {
            ACPI_SLEEP_CONTROL_PORT | ACPI_SLEEP_STATUS_PORT | ACPI_RESET_PORT => 0,
            ACPI_GED_PORT => self.events.swap(0, Ordering::SeqCst),
            PVPANIC_PORT => PVPANIC_PANICKED | PVPANIC_CRASH_LOADED,
            _ if legacy_page::owns_port(port) => self.legacy.read(port),
            _ => ALL_ONES,
        }
    }
}
