//! The machine that every guest sees: addresses, ports and interrupt lines (x86_64).
//!
//! One table, used by the vCPU process (which decodes exits), the ACPI tables (which describe it),
//! the broker (which assigns slots) and the tests. A number here is guest ABI: it never changes
//! within a machine type.

/// First guest-physical address of the hole below 4 GiB that holds no memory.
pub const MMIO_HOLE_START: u64 = 0xd000_0000;
/// First guest-physical address after the hole; memory beyond 3.25 GiB goes on here.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// Guest-physical address of virtio-mmio slot 0.
pub const VIRTIO_MMIO_BASE: u64 = MMIO_HOLE_START;
/// Distance in bytes between the register blocks of two slots.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// Interrupt lines (GSI, edge triggered, active high) of the virtio-mmio slots, by slot number.
pub const VIRTIO_MMIO_GSI: [u32; 16] =
    [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];
/// Number of virtio-mmio slots a machine has.
pub const VIRTIO_MMIO_SLOTS: usize = VIRTIO_MMIO_GSI.len();

/// Guest-physical address of the registers of virtio-mmio slot `slot`.
#[must_use]
pub const fn virtio_mmio_address(slot: u8) -> u64 {
    VIRTIO_MMIO_BASE + slot as u64 * VIRTIO_MMIO_STRIDE
}

/// I/O port of the first 8250 (COM1); eight registers.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;
/// I/O port of the CMOS RTC index register; the data register follows it.
pub const RTC_PORT: u16 = 0x70;
/// Interrupt line of the CMOS RTC.
pub const RTC_GSI: u32 = 8;
/// I/O port of the i8042 data register.
pub const I8042_DATA_PORT: u16 = 0x60;
/// I/O port of the i8042 status and command register; command 0xfe resets the machine.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// I/O port whose bytes appear on the serial transcript (the Bochs debug console).
pub const DEBUG_CONSOLE_PORT: u16 = 0xe9;
/// QEMU's `isa-debug-exit`: writing `v` ends the VM with exit code `(v << 1) | 1`.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// QEMU's pvpanic; reads give the supported events, bit 0 written is a guest panic.
pub const PVPANIC_PORT: u16 = 0x505;

/// ACPI sleep control register (hardware-reduced); bit 5 is SLP_EN, bits 4:2 SLP_TYP.
pub const ACPI_SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register; the value 1 resets the machine.
pub const ACPI_RESET_PORT: u16 = 0x602;
/// Generic event device: one byte, bit 0 the power button; reading it clears it.
pub const ACPI_GED_PORT: u16 = 0x604;
/// Interrupt line of the generic event device.
pub const ACPI_GED_GSI: u32 = 9;
/// SLP_TYP value of S5 (soft off) in the DSDT.
pub const ACPI_S5_SLEEP_TYPE: u8 = 5;

/// Guest-physical address of the ACPI RSDP; the other tables follow within 128 KiB.
pub const ACPI_TABLES_START: u64 = 0xe_0000;
/// Guest-physical address of the local APICs.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Guest-physical address of the I/O APIC (24 pins).
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Guest-physical address of KVM's three-page TSS (used on hosts without unrestricted guest).
pub const KVM_TSS_BASE: u64 = 0xfffb_d000;
/// Guest-physical address of KVM's identity map page.
pub const KVM_IDENTITY_MAP_BASE: u64 = 0xfffb_c000;

/// Largest number of vCPUs of one VM.
pub const VCPUS_MAX: u8 = 32;
/// Smallest memory of one VM in bytes (16 MiB).
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
