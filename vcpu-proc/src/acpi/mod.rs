//! The ACPI tables of the machine: what a stock kernel needs to find every device by itself.
//!
//! Hardware-reduced ACPI: no PM timer, no SCI, no fixed events. Power-off and reset are single
//! registers that the vCPU process decodes, the power button is a generic event device. Addresses
//! come from [`bulkhead_ipc::platform`] and nowhere else. The tables are written once, before any
//! vCPU runs; nothing here reads guest memory.
//!
//! ```text
//! RSDP 0xe0000 -> XSDT -> FADT -> DSDT (devices)
//!                      -> MADT (local APICs, I/O APIC)
//!              -> RSDT, the same in 32 bits for kernels that know only ACPI 1.0
//! ```

mod dsdt;
mod fixed;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::xsdt::XSDT;
use bulkhead_ipc::platform;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::boot::layout;

const OEM_ID: [u8; 6] = *b"BLKHD ";
const OEM_TABLE_ID: [u8; 8] = *b"BLKHDVM ";
const OEM_REVISION: u32 = 1;
const ALIGNMENT: u64 = 64;

/// What differs between the tables of two machines.
#[derive(Debug, Clone, Copy)]
pub struct MachineDescription<'a> {
    /// Number of vCPUs; their APIC ids are 0 to `vcpus - 1`.
    pub vcpus: u8,
    /// Slots of [`platform::VIRTIO_MMIO_GSI`] that hold a device.
    pub virtio_slots: &'a [u8],
}

/// Why the tables cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// A machine has at least one vCPU and no more than the platform allows.
    #[error("vcpus is {vcpus}, expected 1 to {}", platform::VCPUS_MAX)]
    Vcpus {
        /// The number asked for.
        vcpus: u8,
    },
    /// A slot that no machine has, or the same one twice.
    #[error(
        "virtio_slots holds {slot}, expected each slot once and below {}",
        platform::VIRTIO_MMIO_SLOTS
    )]
    Slot {
        /// The slot asked for.
        slot: u8,
    },
    /// The tables outgrew the range reserved for them.
    #[error(
        "a table of {bytes} bytes at {address:#x} does not end below {:#x}",
        layout::ACPI_TABLES_END
    )]
    Space {
        /// Where the table would begin.
        address: u64,
        /// Its size.
        bytes: usize,
    },
    /// Guest memory does not reach the range of the tables.
    #[error("guest address {address:#x}, expected to hold an ACPI table, is not backed by memory")]
    Unbacked {
        /// Where the table would begin.
        address: u64,
    },
}

/// Writes all tables and returns the address of the RSDP.
pub fn write_tables(
    memory: &GuestMemoryMmap,
    machine: &MachineDescription<'_>,
) -> Result<GuestAddress, AcpiError> {
    check(machine)?;
    let mut writer = Writer {
        memory,
        next: platform::ACPI_TABLES_START,
    };
    let rsdp = writer.reserve(fixed::RSDP_BYTES)?;
    let dsdt = writer.place(&dsdt::build(machine.virtio_slots))?;
    let fadt = writer.place(&bytes_of(&fixed::fadt(narrow(dsdt)?)))?;
    let madt = writer.place(&bytes_of(&fixed::madt(machine.vcpus)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = writer.place(&bytes_of(&xsdt))?;
    let rsdt = writer.place(&fixed::rsdt(&[narrow(fadt)?, narrow(madt)?]))?;
    writer.write(rsdp, &fixed::rsdp(narrow(rsdt)?, xsdt))?;
    Ok(GuestAddress(rsdp))
}

fn check(machine: &MachineDescription<'_>) -> Result<(), AcpiError> {
    if !(1..=platform::VCPUS_MAX).contains(&machine.vcpus) {
        return Err(AcpiError::Vcpus {
            vcpus: machine.vcpus,
        });
    }
    let mut seen = [false; platform::VIRTIO_MMIO_SLOTS];
    for &slot in machine.virtio_slots {
        match seen.get_mut(usize::from(slot)) {
            Some(seen @ false) => *seen = true,
            _ => return Err(AcpiError::Slot { slot }),
        }
    }
    Ok(())
}

/// Tables lie below 1 MiB, so their addresses have 32 bits.
fn narrow(address: u64) -> Result<u32, AcpiError> {
    u32::try_from(address).map_err(|_| AcpiError::Space { address, bytes: 0 })
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Places tables one behind the other.
struct Writer<'a> {
    memory: &'a GuestMemoryMmap,
    next: u64,
}

impl Writer<'_> {
    fn reserve(&mut self, bytes: usize) -> Result<u64, AcpiError> {
        let address = self.next;
        let end = address + bytes as u64;
        if end > layout::ACPI_TABLES_END {
            return Err(AcpiError::Space { address, bytes });
        }
        self.next = end.next_multiple_of(ALIGNMENT);
        Ok(address)
    }

    fn place(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let address = self.reserve(table.len())?;
        self.write(address, table)?;
        Ok(address)
    }

    fn write(&self, address: u64, table: &[u8]) -> Result<(), AcpiError> {
        self.memory
            .write_slice(table, GuestAddress(address))
            .map_err(|_| AcpiError::Unbacked { address })
    }
}
