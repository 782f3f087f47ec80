//! Where on a disk file systems may be: the partitions of an MBR or a GPT, and the disk as a whole.
//!
//! A guest wrote the tables. What they say is checked against the disk's size and counted; a table
//! that makes no sense is as good as none.

use super::Reader;
use nix::errno::Errno;

/// The sector size that guests see.
const SECTOR: u64 = 512;
/// Most partitions that are looked at.
const PARTITIONS_MAX: usize = 128;
/// Most entries of a GPT.
const ENTRIES_MAX: u32 = 256;
/// Longest entry of a GPT in bytes.
const ENTRY_BYTES_MAX: u32 = 4096;
/// Types of an MBR's entries: a container of logical partitions, and the cover of a GPT.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];
const PROTECTIVE: u8 = 0xee;

/// A part of a disk that may have a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Volume {
    /// Its number in the partition table, as Linux counts; `None` for the disk as a whole.
    pub(super) number: Option<usize>,
    /// First byte.
    pub(super) start: u64,
    /// Size in bytes.
    pub(super) bytes: u64,
}

impl std::fmt::Display for Volume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.number {
            Some(number) => write!(f, "partition {number}"),
            None => f.write_str("the whole disk"),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(field.unwrap_or_default())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(field.unwrap_or_default())
}

/// An entry of an MBR.
struct Entry {
    kind: u8,
    first: u64,
    sectors: u64,
}

/// The entries of the boot record in `sector`, if it is one.
fn boot_record(sector: &[u8]) -> Option<[Entry; 4]> {
    if sector.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let entry = |n: usize| {
        let entry = sector.get(446 + n * 16..).unwrap_or_default();
        Entry {
            kind: entry.get(4).copied().unwrap_or_default(),
            first: u32_at(entry, 8).into(),
            sectors: u32_at(entry, 12).into(),
        }
    };
    Some([entry(0), entry(1), entry(2), entry(3)])
}

fn sector(disk: &dyn Reader, number: u64) -> Result<[u8; 512], Errno> {
    let mut sector = [0; 512];
    let at = number.checked_mul(SECTOR).ok_or(Errno::EIO)?;
    if at.checked_add(SECTOR).is_none_or(|end| end > disk.bytes()) {
        return Ok(sector);
    }
    disk.read(at, &mut sector)?;
    Ok(sector)
}

/// A partition, unless it is empty or reaches behind the end of the disk.
fn volume(disk: &dyn Reader, number: usize, first: u64, sectors: u64) -> Option<Volume> {
    let start = first.checked_mul(SECTOR)?;
    let bytes = sectors.checked_mul(SECTOR)?;
    let fits = start.checked_add(bytes)? <= disk.bytes();
    (fits && start > 0 && bytes > 0).then_some(Volume {
        number: Some(number),
        start,
        bytes,
    })
}

/// Everything on the disk that may have a file system: its partitions in order, then the disk itself.
///
/// # Errors
/// The kernel's errno, when the disk cannot be read.
pub(super) fn volumes(disk: &dyn Reader) -> Result<Vec<Volume>, Errno> {
    let mut found = Vec::new();
    if let Some(entries) = boot_record(&sector(disk, 0)?) {
        if entries.iter().any(|entry| entry.kind == PROTECTIVE) {
            found = guid_table(disk)?;
        } else {
            for (number, entry) in (1..).zip(&entries) {
                match entry.kind {
                    0 => {}
                    kind if EXTENDED.contains(&kind) => logical(disk, entry.first, &mut found)?,
                    _ => found.extend(volume(disk, number, entry.first, entry.sectors)),
                }
            }
        }
    }
    found.truncate(PARTITIONS_MAX);
    found.push(Volume {
        number: None,
        start: 0,
        bytes: disk.bytes(),
    });
    Ok(found)
}

/// The logical partitions in the container that begins at `base`: a chain of boot records. Linux counts
/// them from 5 on.
fn logical(disk: &dyn Reader, base: u64, found: &mut Vec<Volume>) -> Result<(), Errno> {
    let mut at = base;
    for number in 5..5 + PARTITIONS_MAX {
        let Some([own, next, ..]) = boot_record(&sector(disk, at)?) else {
            break;
        };
        // A boot record fits 32-bit numbers, so nothing wraps.
        found.extend(volume(disk, number, at + own.first, own.sectors));
        if !EXTENDED.contains(&next.kind) {
            break;
        }
        at = base + next.first;
    }
    Ok(())
}

/// The partitions of a GPT: of the first table, or of the second at the disk's end when that is damaged.
fn guid_table(disk: &dyn Reader) -> Result<Vec<Volume>, Errno> {
    let last = (disk.bytes() / SECTOR).saturating_sub(1);
    for place in [1, last] {
        if let Some(found) = guid_table_at(disk, place)? {
            return Ok(found);
        }
    }
    Ok(Vec::new())
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn guid_table_at(disk: &dyn Reader, place: u64) -> Result<Option<Vec<Volume>>, Errno> {
    let mut header = sector(disk, place)?;
    let bytes = usize::try_from(u32_at(&header, 12)).unwrap_or(usize::MAX);
    let told = u32_at(&header, 16);
    if let Some(field) = header.get_mut(16..20) {
        field.fill(0);
    }
    let sound = header.starts_with(b"EFI PART")
        && (92..=512).contains(&bytes)
        && header.get(..bytes).map(checksum) == Some(told);
    let (count, size) = (u32_at(&header, 80), u32_at(&header, 84));
    if !sound || count > ENTRIES_MAX || !(128..=ENTRY_BYTES_MAX).contains(&size) {
        return Ok(None);
    }
    let size = usize::try_from(size).unwrap_or_default();
    let mut entries = vec![0; usize::try_from(count).unwrap_or_default() * size];
    let at = u64_at(&header, 72).checked_mul(SECTOR);
    let end = at.and_then(|at| at.checked_add(entries.len() as u64));
    let (Some(at), Some(true)) = (at, end.map(|end| end <= disk.bytes())) else {
        return Ok(None);
    };
    disk.read(at, &mut entries)?;
    if checksum(&entries) != u32_at(&header, 88) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries.chunks_exact(size)) {
        let unused = entry.iter().take(16).all(|&byte| byte == 0);
        let (first, last) = (u64_at(entry, 32), u64_at(entry, 40));
        let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1));
        if let (false, Some(sectors)) = (unused, sectors) {
            found.extend(volume(disk, number, first, sectors));
        }
    }
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn entry(disk: &mut [u8], sector: usize, n: usize, kind: u8, first: u32, sectors: u32) {
        let at = sector * 512 + 446 + n * 16;
        disk[at + 4] = kind;
        put(disk, at + 8, &first.to_le_bytes());
        put(disk, at + 12, &sectors.to_le_bytes());
        put(disk, sector * 512 + 510, &[0x55, 0xaa]);
    }

    /// A GPT header at `place` whose two entries are at `entries_at`.
    fn gpt(disk: &mut [u8], place: usize, entries_at: usize) {
        entry(disk, 0, 0, 0xee, 1, 0xffff_ffff);
        let at = entries_at * 512;
        for (n, (first, last)) in [(40u64, 47u64), (48, 63)].into_iter().enumerate() {
            put(disk, at + n * 128, &[1; 16]);
            put(disk, at + n * 128 + 32, &first.to_le_bytes());
            put(disk, at + n * 128 + 40, &last.to_le_bytes());
        }
        let sum = checksum(&disk[at..at + 256]);
        let header = place * 512;
        put(disk, header, b"EFI PART");
        put(disk, header + 12, &92u32.to_le_bytes());
        put(disk, header + 72, &(entries_at as u64).to_le_bytes());
        put(disk, header + 80, &2u32.to_le_bytes());
        put(disk, header + 84, &128u32.to_le_bytes());
        put(disk, header + 88, &sum.to_le_bytes());
        put(disk, header + 16, &[0; 4]);
        let sum = checksum(&disk[header..header + 92]);
        put(disk, header + 16, &sum.to_le_bytes());
    }

    fn found(disk: &[u8]) -> Vec<(Option<usize>, u64, u64)> {
        let found = volumes(&disk.to_vec()).unwrap();
        found.iter().map(|v| (v.number, v.start, v.bytes)).collect()
    }

    const BYTES: usize = 128 * 512;
    const WHOLE: (Option<usize>, u64, u64) = (None, 0, BYTES as u64);

    #[test]
    fn disk_without_a_table_is_one_volume() {
        assert_eq!(found(&[0; BYTES]), [WHOLE]);
        assert_eq!(found(&[]), [(None, 0, 0)]);
    }

    #[test]
    fn primary_and_logical_partitions_are_numbered_as_linux_does() {
        let mut disk = vec![0; BYTES];
        entry(&mut disk, 0, 0, 0x83, 8, 8);
        entry(&mut disk, 0, 2, 0x05, 32, 64);
        entry(&mut disk, 32, 0, 0x83, 1, 7);
        entry(&mut disk, 32, 1, 0x05, 16, 16);
        entry(&mut disk, 48, 0, 0x83, 1, 15);
        let part = |number, first: u64, sectors: u64| (Some(number), first * 512, sectors * 512);
        let expected = [part(1, 8, 8), part(5, 33, 7), part(6, 49, 15), WHOLE];
        assert_eq!(found(&disk), expected);
    }

    #[test]
    fn chain_of_logical_partitions_that_bites_its_tail_ends() {
        let mut disk = vec![0; BYTES];
        entry(&mut disk, 0, 0, 0x05, 32, 64);
        entry(&mut disk, 32, 0, 0x83, 1, 7);
        entry(&mut disk, 32, 1, 0x05, 0, 16);
        assert_eq!(found(&disk).len(), PARTITIONS_MAX + 1);
    }

    #[test]
    fn partition_that_reaches_behind_the_disk_is_left_out() {
        let mut disk = vec![0; BYTES];
        entry(&mut disk, 0, 0, 0x83, 8, 121);
        entry(&mut disk, 0, 1, 0x83, u32::MAX, u32::MAX);
        entry(&mut disk, 0, 2, 0x83, 8, 120);
        assert_eq!(found(&disk), [(Some(3), 8 * 512, 120 * 512), WHOLE]);
    }

    #[test]
    fn second_table_stands_in_for_a_damaged_first() {
        let mut disk = vec![0; BYTES];
        gpt(&mut disk, 1, 2);
        gpt(&mut disk, 127, 120);
        let expected = [
            (Some(1), 40 * 512, 8 * 512),
            (Some(2), 48 * 512, 16 * 512),
            WHOLE,
        ];
        assert_eq!(found(&disk), expected);
        disk[512 + 72] ^= 1;
        assert_eq!(found(&disk), expected);
        disk[120 * 512 + 32] ^= 1;
        assert_eq!(found(&disk), [WHOLE]);
    }

    proptest! {
        #[test]
        fn any_table_names_volumes_inside_of_the_disk(
            changes in prop::collection::vec((0..BYTES, any::<u8>()), 0..64),
            guid in any::<bool>(),
        ) {
            let mut disk = vec![0; BYTES];
            if guid {
                gpt(&mut disk, 1, 2);
            } else {
                entry(&mut disk, 0, 0, 0x83, 8, 8);
                entry(&mut disk, 0, 1, 0x05, 32, 64);
                entry(&mut disk, 32, 1, 0x05, 16, 16);
            }
            for (at, byte) in changes {
                // Mostly where the tables are.
                let at = if at % 4 == 0 { at } else { at % 1024 };
                disk[at] = byte;
            }
            for (_, start, bytes) in found(&disk) {
                prop_assert!(start + bytes <= BYTES as u64);
            }
        }
    }
}
