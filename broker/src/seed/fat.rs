//! Writes a FAT file system that holds a few files in its root directory. It reads none.
//!
//! ```text
//!   boot sector │ table │ its copy │ root directory: label, files │ clusters of 4 KiB
//! ```
//!
//! The same files give the same bytes: every time is the first day that FAT knows, and the serial number is
//! a checksum. FAT12, since the file system is small (Microsoft, "FAT: General Overview of On-Disk Format").
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

const SECTOR_BYTES: usize = 512;
const CLUSTER_SECTORS: usize = 8;
const CLUSTER_BYTES: usize = CLUSTER_SECTORS * SECTOR_BYTES;
const ENTRY_BYTES: usize = 32;
const ROOT_ENTRIES: usize = 512;
const ROOT_SECTORS: usize = ROOT_ENTRIES * ENTRY_BYTES / SECTOR_BYTES;
/// From here on it would be FAT16.
const CLUSTERS_MAX: usize = 4084;
/// Fewest clusters, so that no reader takes the file system for something else.
const CLUSTERS_MIN: usize = 64;
/// The first of January 1980.
const DAY: u16 = 0x21;
const LABEL_BYTES: usize = 11;
/// Letters of a long name in one entry.
const PIECE: usize = 13;
const FIXED_DISK: u8 = 0xf8;

/// A file for the root directory. The name is plain ASCII.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) name: &'static str,
    /// Its name of eight and three letters, padded with blanks.
    pub(super) short: [u8; LABEL_BYTES],
    pub(super) content: Vec<u8>,
}

/// The files do not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the files are larger than {} MiB together", (CLUSTERS_MAX * CLUSTER_BYTES) >> 20)]
pub struct TooLarge;

/// The image of a file system with that label.
///
/// # Errors
/// When the files do not fit.
pub(super) fn image(label: [u8; LABEL_BYTES], files: &[File]) -> Result<Vec<u8>, TooLarge> {
    let clusters_of = |file: &File| file.content.len().div_ceil(CLUSTER_BYTES);
    let used: usize = files.iter().map(clusters_of).sum();
    let clusters = used.max(CLUSTERS_MIN).next_multiple_of(16);
    if clusters > CLUSTERS_MAX {
        return Err(TooLarge);
    }
    let mut table = Table::default();
    let (mut root, mut data) = (label_entry(label), Vec::new());
    for file in files {
        let first = table.chain(clusters_of(file));
        root.extend(entries(file, first));
        data.extend(&file.content);
        data.resize(data.len().next_multiple_of(CLUSTER_BYTES), 0);
    }
    root.resize(ROOT_SECTORS * SECTOR_BYTES, 0);
    data.resize(clusters * CLUSTER_BYTES, 0);
    let table = table.bytes(clusters);
    let table_sectors = table.len() / SECTOR_BYTES;
    let sectors = 1 + 2 * table_sectors + ROOT_SECTORS + clusters * CLUSTER_SECTORS;
    let serial = crc32fast::hash(&[root.as_slice(), &data].concat());
    let mut image = boot_sector(label, serial, table_sectors, sectors);
    for part in [&table, &table, &root, &data] {
        image.extend(part);
    }
    Ok(image)
}

fn boot_sector(label: [u8; LABEL_BYTES], serial: u32, table: usize, sectors: usize) -> Vec<u8> {
    let small = |n: usize| u16::try_from(n).unwrap_or(0).to_le_bytes();
    let large = u32::try_from(sectors).unwrap_or(u32::MAX);
    let mut out = Vec::with_capacity(SECTOR_BYTES);
    out.extend([0xeb, 0x3c, 0x90]);
    out.extend(b"BULKHEAD");
    out.extend(small(SECTOR_BYTES));
    out.push(8); // sectors of a cluster: CLUSTER_SECTORS
    out.extend(small(1)); // sectors before the first table
    out.push(2); // tables
    out.extend(small(ROOT_ENTRIES));
    // One of two fields holds the size, and the other nothing.
    let fits = sectors <= usize::from(u16::MAX);
    out.extend(small(if fits { sectors } else { 0 }));
    out.push(FIXED_DISK);
    out.extend(small(table));
    out.extend(small(32)); // sectors of a track, and heads: nobody asks any more
    out.extend(small(64));
    out.extend(0u32.to_le_bytes()); // sectors before the file system
    out.extend(if fits { 0 } else { large }.to_le_bytes());
    out.extend([0x80, 0, 0x29]); // drive, nothing, "the next three fields are there"
    out.extend(serial.to_le_bytes());
    out.extend(label);
    out.extend(b"FAT12   ");
    out.resize(SECTOR_BYTES - 2, 0);
    out.extend([0x55, 0xaa]);
    out
}

const _: () = assert!(CLUSTER_SECTORS == 8);

/// What follows each cluster: the next one, or the end.
#[derive(Debug)]
struct Table(Vec<u16>);

impl Default for Table {
    fn default() -> Self {
        // Two entries that no cluster has: the kind of disk, and an end.
        Self(vec![0xf00 | FIXED_DISK as u16, 0xfff])
    }
}

impl Table {
    /// Chains the next `clusters` clusters; their first, or 0 for none.
    fn chain(&mut self, clusters: usize) -> u16 {
        let first = self.next();
        for n in 1..=clusters {
            let following = self.next() + 1;
            self.0.push(if n == clusters { 0xfff } else { following });
        }
        if clusters == 0 { 0 } else { first }
    }

    fn next(&self) -> u16 {
        u16::try_from(self.0.len()).unwrap_or(0xff0)
    }

    /// Twelve bits each, in whole sectors.
    fn bytes(&self, clusters: usize) -> Vec<u8> {
        let mut entries = self.0.clone();
        entries.resize((clusters + 2).next_multiple_of(2), 0);
        let mut bytes = Vec::new();
        for pair in entries.chunks_exact(2) {
            if let [a, b] = pair {
                let both = u32::from(*a) | u32::from(*b) << 12;
                let [low, middle, high, _] = both.to_le_bytes();
                bytes.extend([low, middle, high]);
            }
        }
        bytes.resize(bytes.len().next_multiple_of(SECTOR_BYTES), 0);
        bytes
    }
}

fn label_entry(label: [u8; LABEL_BYTES]) -> Vec<u8> {
    const VOLUME: u8 = 0x08;
    short_entry(label, VOLUME, 0, 0)
}

fn short_entry(name: [u8; LABEL_BYTES], kind: u8, cluster: u16, bytes: u32) -> Vec<u8> {
    let mut out = name.to_vec();
    out.extend([kind, 0, 0, 0, 0]);
    out.extend(DAY.to_le_bytes()); // made
    out.extend(DAY.to_le_bytes()); // read
    out.extend([0, 0, 0, 0]);
    out.extend(DAY.to_le_bytes()); // written
    out.extend(cluster.to_le_bytes());
    out.extend(bytes.to_le_bytes());
    out
}

/// A file's entries: the pieces of its long name, last first, and the short one.
fn entries(file: &File, cluster: u16) -> Vec<u8> {
    const READ_ONLY_FILE: u8 = 0x21;
    const LONG_NAME: u8 = 0x0f;
    const LAST: u8 = 0x40;
    let sum = file
        .short
        .iter()
        .fold(0u8, |sum, &letter| sum.rotate_right(1).wrapping_add(letter));
    let mut letters: Vec<u16> = file.name.bytes().map(u16::from).collect();
    // An end, where there is room for one, and filling behind it.
    if !letters.len().is_multiple_of(PIECE) {
        letters.push(0);
        letters.resize(letters.len().next_multiple_of(PIECE), 0xffff);
    }
    let pieces = letters.chunks_exact(PIECE);
    let last = pieces.len();
    let mut out = Vec::new();
    for (n, piece) in pieces.enumerate().rev() {
        let number = u8::try_from(n + 1).unwrap_or(1);
        out.push(if n + 1 == last { number | LAST } else { number });
        let bytes: Vec<u8> = piece
            .iter()
            .flat_map(|letter| letter.to_le_bytes())
            .collect();
        let (first, rest) = bytes.split_at(10);
        let (second, third) = rest.split_at(12);
        out.extend(first);
        out.extend([LONG_NAME, 0, sum]);
        out.extend(second);
        out.extend([0, 0]);
        out.extend(third);
    }
    let bytes = u32::try_from(file.content.len()).unwrap_or(u32::MAX);
    out.extend(short_entry(file.short, READ_ONLY_FILE, cluster, bytes));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_twelve_bits_for_each_cluster() {
        let mut table = Table::default();
        assert_eq!(table.chain(3), 2);
        assert_eq!(table.chain(0), 0);
        assert_eq!(table.chain(1), 5);
        let bytes = table.bytes(64);
        assert_eq!(
            &bytes[..9],
            [0xf8, 0xff, 0xff, 0x03, 0x40, 0x00, 0xff, 0xff, 0xff]
        );
        assert_eq!(bytes.len(), 512);
    }

    #[test]
    fn files_that_do_not_fit_are_refused() {
        let file = File {
            name: "user-data",
            short: *b"USER-D~1   ",
            content: vec![0; (CLUSTERS_MAX + 1) * CLUSTER_BYTES],
        };
        assert_eq!(image(*b"CIDATA     ", &[file]), Err(TooLarge));
    }
}
