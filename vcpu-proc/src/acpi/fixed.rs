//! The tables with a fixed layout: FADT and MADT.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use bulkhead_ipc::platform;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};

/// Writing this to the reset register resets the machine.
const RESET_VALUE: u8 = 1;
/// IAPC_BOOT_ARCH: there are devices on the ISA bus (the serial port).
const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
/// IAPC_BOOT_ARCH: the operating system must not touch VGA registers.
const BOOT_NO_VGA: u16 = 1 << 2;

/// The FADT of hardware-reduced ACPI. The i8042 is not announced: it exists for `reboot=k` alone,
/// and probing it for a keyboard takes a kernel longer than the rest of its start.
pub(super) fn fadt(dsdt: u64) -> FADT {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    table.iapc_boot_arch = (BOOT_LEGACY_DEVICES | BOOT_NO_VGA).into();
    table.reset_reg = port(platform::ACPI_RESET_PORT);
    table.reset_value = RESET_VALUE;
    table.sleep_control_reg = port(platform::ACPI_SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(platform::ACPI_SLEEP_STATUS_PORT);
    table.hypervisor_vendor_identity = u64::from_le_bytes(*b"BULKHEAD").into();
    table.finalize()
}

/// The MADT: a local APIC for each vCPU and one I/O APIC for GSI 0 to 23. No interrupt is
/// overridden, because KVM's default routing has GSI n at I/O APIC pin n, the PIT at 0 included.
pub(super) fn madt(vcpus: u8) -> MADT {
    let lapic = LocalInterruptController::Address(LAPIC_BASE);
    let mut table = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, lapic);
    for vcpu in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(IOAPIC_ID, IOAPIC_BASE, 0));
    table
}

/// KVM's I/O APIC has this id after reset.
const IOAPIC_ID: u8 = 0;

#[expect(clippy::cast_possible_truncation, reason = "checked below")]
const LAPIC_BASE: u32 = platform::LAPIC_BASE as u32;
#[expect(clippy::cast_possible_truncation, reason = "checked below")]
const IOAPIC_BASE: u32 = platform::IOAPIC_BASE as u32;
const _: () = assert!(LAPIC_BASE as u64 == platform::LAPIC_BASE);
const _: () = assert!(IOAPIC_BASE as u64 == platform::IOAPIC_BASE);

/// A register of one byte at an I/O port.
fn port(port: u16) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        port.into(),
    )
}
