//! `nonce`: prints the first 64 bytes of a sector (`sector=`, 0 by default) of a disk.

use bulkhead_guest::pattern::SECTOR;
use bulkhead_guest::record::Hex;

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, WANTED};

/// Reads and prints it.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let disk = machine.number("disk", 0)?;
    let sector = machine.number("sector", 0)?;
    let mut blk = Blk::open(machine, disk, WANTED)?;
    let mut data = [0; SECTOR];
    blk.read_sector(
        sector,
        &mut data,
        Deadline::after_ms(super::timeout_ms(machine)?),
    )?;
    say!("nonce disk={disk} sector={sector} hex={}", Hex(&data[..64]));
    Ok(())
}
