//! `hello`: what the VMM told about the machine.

use core::arch::x86_64::__cpuid;

use bulkhead_guest::pattern;
use bulkhead_guest::pvh::MEMORY_RAM;
use bulkhead_guest::record::Escaped;

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::{phys, time};

/// Sum of the usable memory.
pub fn ram_bytes(machine: &Machine) -> u64 {
    machine
        .memory()
        .iter()
        .filter(|range| range.kind == MEMORY_RAM)
        .map(|range| range.len)
        .sum()
}

/// Prints it.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    for range in machine.memory() {
        say!(
            "hello.memory start={:#x} bytes={} type={}",
            range.start,
            range.len,
            range.kind
        );
    }
    for (index, module) in machine.modules().iter().enumerate() {
        let mapped = module.start.saturating_add(module.len) <= 1 << 32;
        let data = if mapped {
            phys::bytes(module.start, module.len as usize)
        } else {
            &[]
        };
        let checksum = pattern::checksum(0, data);
        say!(
            "hello.module index={index} bytes={} checksum={checksum:#018x}",
            module.len
        );
    }
    let vendor = __cpuid(0);
    let mut name = [0; 12];
    name[..4].copy_from_slice(&vendor.ebx.to_le_bytes());
    name[4..8].copy_from_slice(&vendor.edx.to_le_bytes());
    name[8..].copy_from_slice(&vendor.ecx.to_le_bytes());
    let hypervisor = __cpuid(1).ecx & (1 << 31) != 0;
    say!(
        "hello.cpu vendor={} hypervisor={} tsc_khz={}",
        Escaped(&name),
        u8::from(hypervisor),
        time::khz_from_cpuid()
    );
    match &machine.acpi {
        Some(acpi) => say!(
            "hello.acpi tables={} bad_tables={} cpus={} ioapics={} hardware_reduced={}",
            acpi.tables,
            acpi.bad_tables,
            acpi.apic_ids().len(),
            acpi.ioapics,
            u8::from(acpi.hardware_reduced)
        ),
        None => say!("hello.acpi tables=0"),
    }
    say!("hello.cmdline text={}", Escaped(machine.cmdline()));
    Ok(())
}
