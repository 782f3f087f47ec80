//! The tables with a fixed layout: the root tables, FADT and MADT.

use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::sdt::Sdt;
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
pub(super) fn fadt(dsdt: u32) -> FADT {
    let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.into())
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .flag(Flags::HwReducedAcpi);
    table.dsdt = dsdt.into();
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

/// Size of the RSDP of ACPI 2.0 and later.
pub(super) const RSDP_BYTES: usize = 36;
const HEADER_BYTES: u32 = 36;

/// The root pointer, which names both root tables (`acpi_tables` leaves the 32-bit one out). The
/// first 20 bytes, which ACPI 1.0 knew, have a checksum of their own.
pub(super) fn rsdp(rsdt: u32, xsdt: u64) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0".to_vec();
    bytes.extend(OEM_ID);
    bytes.push(2);
    bytes.extend(rsdt.to_le_bytes());
    let sum = bytes.iter().copied().fold(0, u8::wrapping_add);
    if let Some(checksum) = bytes.get_mut(8) {
        *checksum = 0u8.wrapping_sub(sum);
    }
    bytes.extend([36, 0, 0, 0]);
    bytes.extend(xsdt.to_le_bytes());
    let sum = bytes.iter().copied().fold(0, u8::wrapping_add);
    bytes.extend([0u8.wrapping_sub(sum), 0, 0, 0]);
    bytes
}

/// The root table of ACPI 1.0.
pub(super) fn rsdt(tables: &[u32]) -> Vec<u8> {
    let mut table = Sdt::new(
        *b"RSDT",
        HEADER_BYTES,
        1,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    for address in tables {
        table.append_slice(&address.to_le_bytes());
    }
    table.as_slice().to_vec()
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
