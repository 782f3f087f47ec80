//! Claims about the tables, by walking them as a kernel does and by asking the ACPICA compiler.

use std::collections::BTreeMap;
use std::process::Command;

use bulkhead_ipc::platform;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{AcpiError, MachineDescription, write_tables};

fn memory() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap()
}

fn read(memory: &GuestMemoryMmap, address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Follows RSDP, XSDT and FADT; checks each checksum; returns the tables by signature.
fn walk(memory: &GuestMemoryMmap, rsdp: GuestAddress) -> BTreeMap<String, Vec<u8>> {
    let root = read(memory, rsdp.0, 36);
    assert_eq!(&root[..8], b"RSD PTR ");
    assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
    let table = |address: u64| {
        let length = read(memory, address + 4, 4);
        let length = u32::from_le_bytes(length.try_into().unwrap());
        let bytes = read(memory, address, usize::try_from(length).unwrap());
        assert_eq!(sum(&bytes), 0, "checksum of {:?}", &bytes[..4]);
        assert!(address + u64::from(length) <= 0x10_0000);
        bytes
    };
    let xsdt = table(long(&root, 24));
    let mut tables = BTreeMap::new();
    for entry in xsdt[36..].chunks_exact(8) {
        let bytes = table(long(entry, 0));
        tables.insert(String::from_utf8(bytes[..4].to_vec()).unwrap(), bytes);
    }
    let rsdt = table(u32::from_le_bytes(root[16..20].try_into().unwrap()).into());
    let narrow: Vec<_> = rsdt[36..]
        .chunks_exact(4)
        .map(|entry| u32::from_le_bytes(entry.try_into().unwrap()))
        .collect();
    let wide: Vec<_> = xsdt[36..]
        .chunks_exact(8)
        .map(|entry| long(entry, 0))
        .collect();
    assert_eq!(narrow.into_iter().map(u64::from).collect::<Vec<_>>(), wide);
    let dsdt = table(long(&tables["FACP"], 140));
    tables.insert("DSDT".into(), dsdt);
    tables
}

fn tables(vcpus: u8, slots: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let memory = memory();
    let machine = MachineDescription {
        vcpus,
        virtio_slots: slots,
    };
    let rsdp = write_tables(&memory, &machine).unwrap();
    assert_eq!(rsdp.0, platform::ACPI_TABLES_START);
    walk(&memory, rsdp)
}

#[test]
fn every_vcpu_has_a_local_apic_in_the_madt() {
    let madt = &tables(32, &[])["APIC"];
    let apics: Vec<_> = madt[44..]
        .chunks(8)
        .take(32)
        .map(|apic| (apic[0], apic[3], apic[4]))
        .collect();
    let expected: Vec<_> = (0..32).map(|id| (0, id, 1)).collect();
    assert_eq!(apics, expected);
    assert_eq!(madt.len(), 44 + 32 * 8 + 12, "and one I/O APIC follows");
}

#[test]
fn the_fadt_names_the_power_off_and_reset_registers() {
    let fadt = &tables(1, &[])["FACP"];
    let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
    assert_eq!(flags >> 20 & 1, 1, "hardware-reduced");
    assert_eq!(flags >> 10 & 1, 1, "reset register");
    let register = |at: usize| (fadt[at], long(fadt, at + 4));
    assert_eq!((register(116), fadt[128]), ((1, 0x602), 1));
    assert_eq!(register(244), (1, 0x600));
    assert_eq!(register(256), (1, 0x601));
}

#[test]
fn the_madt_overrides_no_interrupt() {
    let madt = &tables(1, &[])["APIC"];
    assert_eq!(madt[44 + 8], 1, "the I/O APIC is the last structure");
    assert_eq!(madt.len(), 44 + 8 + 12);
}

#[test]
fn zero_vcpus_and_unknown_or_repeated_slots_are_refused() {
    let refuse = |vcpus, slots: &[u8]| {
        write_tables(
            &memory(),
            &MachineDescription {
                vcpus,
                virtio_slots: slots,
            },
        )
        .unwrap_err()
    };
    assert!(matches!(refuse(0, &[]), AcpiError::Vcpus { vcpus: 0 }));
    assert!(matches!(refuse(33, &[]), AcpiError::Vcpus { vcpus: 33 }));
    assert!(matches!(refuse(1, &[16]), AcpiError::Slot { slot: 16 }));
    assert!(matches!(refuse(1, &[3, 3]), AcpiError::Slot { slot: 3 }));
}

#[test]
fn memory_that_ends_below_the_tables_is_an_error() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0xe_0000)]).unwrap();
    let machine = MachineDescription {
        vcpus: 1,
        virtio_slots: &[],
    };
    assert!(matches!(
        write_tables(&memory, &machine),
        Err(AcpiError::Unbacked { .. })
    ));
}

/// Disassembles the DSDT with ACPICA, or says why it could not.
#[expect(
    clippy::disallowed_methods,
    reason = "a test runs the ACPICA compiler, no VM process"
)]
fn disassemble(dsdt: &[u8]) -> Result<String, std::io::Error> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dsdt.aml");
    std::fs::write(&file, dsdt).unwrap();
    let output = Command::new("iasl").arg("-d").arg(&file).output()?;
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{log}");
    let source = folder.path().join("dsdt.dsl");
    let text = std::fs::read_to_string(&source).unwrap();
    // What was disassembled must compile again without an error.
    let again = Command::new("iasl")
        .arg("-p")
        .arg(folder.path().join("again"))
        .arg(&source)
        .output()?;
    assert!(
        again.status.success(),
        "{}",
        String::from_utf8_lossy(&again.stderr)
    );
    Ok(text)
}

#[test]
fn acpica_finds_every_device_in_the_dsdt() {
    let slots: Vec<u8> = (0..16).collect();
    let text = match disassemble(&tables(2, &slots)["DSDT"]) {
        Ok(text) => text,
        // `cargo xtask test` installs acpica-tools; a bare `cargo test` may do without.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => panic!("iasl: {error}"),
    };
    let flat: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    for id in ["PNP0501", "PNP0B00", "PNP0C0C"] {
        assert!(
            flat.contains(&format!("EisaId (\"{id}\")")),
            "{id} in {text}"
        );
    }
    for id in ["QEMU0001", "ACPI0013"] {
        assert!(
            flat.contains(&format!("Name (_HID, \"{id}\"")),
            "{id} in {text}"
        );
    }
    assert_eq!(flat.matches("\"LNRO0005\"").count(), 16);
    assert!(flat.contains("Notify (\\_SB.PWRB, 0x80)"), "{text}");
    assert!(
        flat.contains("OperationRegion (EREG, SystemIO, 0x0604, One)"),
        "{text}"
    );
    assert!(flat.contains("0xD000F000, // Address Base"), "{text}");
    for gsi in platform::VIRTIO_MMIO_GSI {
        assert!(
            flat.contains(&format!("{{ 0x{gsi:08X}, }}")),
            "GSI {gsi} in {text}"
        );
    }
    assert!(
        flat.contains("Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive"),
        "{text}"
    );
    assert!(flat.contains("{ 0x05, Zero, Zero, Zero }"), "{text}");
}

proptest! {
    #[test]
    fn tables_of_every_machine_are_whole(
        vcpus in 1u8..=platform::VCPUS_MAX,
        slots in proptest::sample::subsequence((0u8..16).collect::<Vec<_>>(), 0..=16),
    ) {
        let tables = tables(vcpus, &slots);
        let names = tables["DSDT"].windows(8).filter(|bytes| bytes == b"LNRO0005").count();
        prop_assert_eq!(names, slots.len());
        prop_assert_eq!(tables["APIC"].len(), 44 + usize::from(vcpus) * 8 + 12);
    }
}
