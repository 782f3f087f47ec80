//! Counts who uses each cluster of a qcow2 image, and compares that with its refcounts.
//!
//! A writer that is killed leaves clusters that are counted and not used; that costs room and nothing
//! else, and is put right when the image is next opened for writing. What is used and not counted
//! would be given away a second time: that is put right first of all.

use crate::ImageError;
use crate::header::{Header, read_at};
use crate::offline::write_all;
use nix::errno::Errno;
use std::fs::File;
use std::io::{Seek, SeekFrom};

/// Most clusters of a file that are counted: one byte of memory for each.
const CLUSTERS_MAX: u64 = 32 << 20;
/// Most L2 tables that a repair at opening reads, so that it takes a fraction of a second.
const TABLES_MAX: usize = 1024;
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// Longest table of refcount blocks in bytes, as imago has it.
const TABLE_BYTES_MAX: u64 = 32 << 20;
/// A count that stands for itself and everything above.
const MANY: u8 = 127;

/// What differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Clusters that are counted more often than they are used.
    pub leaks: u64,
    /// Clusters that are used more often than they are counted, and references to nowhere.
    pub corruptions: u64,
    /// Those among them that no repair of refcounts puts right.
    pub lasting: u64,
    /// Clusters in use.
    pub used: u64,
}

/// What a repair has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// This has been put right; corruptions that could not be are still there.
    Done(Count),
    /// Nothing was looked at: the image is too large, or has internal snapshots or bitmaps.
    Skipped,
}

/// Compares. Blocks for as long as reading all tables takes.
///
/// # Errors
/// [`ImageError`] when a table cannot be read.
pub fn check(file: &File, header: &Header, name: &str) -> Result<Option<Count>, ImageError> {
    match scan(file, header, false, usize::MAX) {
        Ok(Repair::Done(count)) => Ok(Some(count)),
        Ok(Repair::Skipped) => Ok(None),
        Err(errno) => Err(ImageError::io(name, errno)),
    }
}

/// Compares and puts right. Blocks as [`check`], within bounds.
///
/// # Errors
/// As [`check`], and when a refcount cannot be written.
pub fn repair(file: &File, header: &Header, name: &str) -> Result<Repair, ImageError> {
    scan(file, header, true, TABLES_MAX).map_err(|errno| ImageError::io(name, errno))
}

/// Whether every cluster of the file has a place for its refcount, which a writer relies on.
///
/// # Errors
/// [`ImageError`] when it has not, or the table cannot be read.
pub(crate) fn covered(file: &File, header: &Header, name: &str) -> Result<(), ImageError> {
    let read = || -> Result<bool, Errno> {
        let mut end = file;
        let file_bytes = end.seek(SeekFrom::End(0)).map_err(errno_of)?;
        let per_block = header.cluster_bytes * 8 / u64::from(header.refcount_bits);
        let blocks = file_bytes
            .div_ceil(header.cluster_bytes)
            .div_ceil(per_block);
        let bytes = u64::from(header.refcounts_clusters) * header.cluster_bytes;
        if blocks * 8 > bytes || bytes > TABLE_BYTES_MAX {
            return Ok(false);
        }
        let blocks = usize::try_from(blocks).map_err(|_| Errno::EIO)?;
        let table = table(file, header.refcounts_at, blocks)?;
        Ok(table.iter().all(|entry| entry & OFFSET_MASK != 0))
    };
    match read() {
        Ok(true) => Ok(()),
        Ok(false) => Err(ImageError::Field {
            file: name.to_owned(),
            field: "refcount table",
            got: "one that leaves out clusters of the file".to_owned(),
            expected: "a place for the count of each; the image is damaged and can only be read"
                .to_owned(),
        }),
        Err(errno) => Err(ImageError::io(name, errno)),
    }
}

/// The clusters of a file and how often each is used.
struct Uses {
    cluster_bytes: u64,
    counts: Vec<u8>,
    /// References to nowhere, and to what somebody else has.
    wrong: u64,
}

/// Set in the count of a cluster that may have one user only.
const ALONE: u8 = 1 << 7;

impl Uses {
    /// Somebody has these bytes to himself: everything but compressed clusters.
    fn add(&mut self, at: u64, bytes: u64) {
        if !at.is_multiple_of(self.cluster_bytes) {
            self.wrong += 1;
        }
        self.count(at, bytes, ALONE);
    }

    /// Somebody has a part of the clusters of these bytes.
    fn add_part(&mut self, at: u64, bytes: u64) {
        self.count(at, bytes, 0);
    }

    fn count(&mut self, at: u64, bytes: u64, alone: u8) {
        let first = at / self.cluster_bytes;
        let last = at.saturating_add(bytes.max(1) - 1) / self.cluster_bytes;
        for cluster in first..=last {
            let place = usize::try_from(cluster).ok();
            let Some(count) = place.and_then(|place| self.counts.get_mut(place)) else {
                self.wrong += 1;
                return;
            };
            if *count & ALONE != 0 || (alone != 0 && *count != 0) {
                self.wrong += 1;
            }
            *count = (*count & !ALONE).saturating_add(1).min(MANY) | *count & ALONE | alone;
        }
    }

    /// How often each cluster is used.
    fn finish(self) -> Vec<u8> {
        self.counts
            .into_iter()
            .map(|count| count & !ALONE)
            .collect()
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used in map_err")]
fn errno_of(error: std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

fn table(file: &File, at: u64, entries: usize) -> Result<Vec<u64>, Errno> {
    let mut bytes = vec![0; entries * 8];
    read_at(file, at, &mut bytes)?;
    let (entries, _) = bytes.as_chunks::<8>();
    Ok(entries
        .iter()
        .map(|&entry| u64::from_be_bytes(entry))
        .collect())
}

/// The same, however long it takes.
///
/// # Errors
/// As [`repair`].
pub(crate) fn repair_all(file: &File, header: &Header, name: &str) -> Result<Repair, ImageError> {
    scan(file, header, true, usize::MAX).map_err(|errno| ImageError::io(name, errno))
}

fn scan(file: &File, header: &Header, fix: bool, tables_max: usize) -> Result<Repair, Errno> {
    let cluster_bytes = header.cluster_bytes;
    let mut end = file;
    let file_bytes = end.seek(SeekFrom::End(0)).map_err(errno_of)?;
    let clusters = file_bytes.div_ceil(cluster_bytes);
    let l1_entries = usize::try_from(header.l1_entries).map_err(|_| Errno::EIO)?;
    let per_cluster = usize::try_from(cluster_bytes / 8).map_err(|_| Errno::EIO)?;
    let refcount_tables = (header.refcounts_clusters as usize).saturating_mul(per_cluster);
    let unknown = header.snapshots > 0 || header.bitmaps || header.extended_l2 || header.data_file;
    // What imago accepts, too.
    let large = clusters > CLUSTERS_MAX || l1_entries > 4 << 20 || refcount_tables > 4 << 20;
    if unknown || large || header.encrypted {
        return Ok(Repair::Skipped);
    }
    let l1 = table(file, header.l1_at, l1_entries)?;
    if l1.iter().filter(|&&entry| entry & OFFSET_MASK != 0).count() > tables_max {
        return Ok(Repair::Skipped);
    }
    let mut uses = Uses {
        cluster_bytes,
        counts: vec![0; usize::try_from(clusters).map_err(|_| Errno::EIO)?],
        wrong: 0,
    };
    uses.add(0, cluster_bytes);
    uses.add(header.l1_at, u64::from(header.l1_entries) * 8);
    let refcounts_bytes = u64::from(header.refcounts_clusters) * cluster_bytes;
    uses.add(header.refcounts_at, refcounts_bytes);
    count_mappings(file, header, &l1, per_cluster, &mut uses)?;
    let refcounts = table(file, header.refcounts_at, refcount_tables)?;
    for &entry in &refcounts {
        if entry & OFFSET_MASK != 0 {
            uses.add(entry & OFFSET_MASK, cluster_bytes);
        }
    }
    let mut found = Count {
        corruptions: uses.wrong,
        lasting: uses.wrong,
        ..Count::default()
    };
    let counts = uses.finish();
    found.used = counts.iter().filter(|&&count| count > 0).count() as u64;
    let per_block = cluster_bytes * 8 / u64::from(header.refcount_bits);
    let per_block = usize::try_from(per_block).map_err(|_| Errno::EIO)?;
    for (index, uses) in counts.chunks(per_block).enumerate() {
        let at = refcounts.get(index).map_or(0, |entry| entry & OFFSET_MASK);
        if at == 0 {
            // Nothing is counted there, so nothing may be used there.
            let used = uses.iter().filter(|&&count| count > 0).count() as u64;
            found.corruptions += used;
            found.lasting += used;
            continue;
        }
        let mut block = vec![0; usize::try_from(cluster_bytes).map_err(|_| Errno::EIO)?];
        read_at(file, at, &mut block)?;
        let changed = compare(&mut block, uses, header.refcount_bits, &mut found);
        if fix && changed {
            write_all(file, at, &block)?;
        }
    }
    Ok(Repair::Done(found))
}

fn count_mappings(
    file: &File,
    header: &Header,
    l1: &[u64],
    per_cluster: usize,
    uses: &mut Uses,
) -> Result<(), Errno> {
    let cluster_bits = header.cluster_bytes.ilog2();
    // A compressed cluster's place and length share an entry.
    let offset_bits = 62 - (cluster_bits - 8);
    for &entry in l1 {
        let at = entry & OFFSET_MASK;
        if at == 0 {
            continue;
        }
        uses.add(at, header.cluster_bytes);
        for entry in table(file, at, per_cluster)? {
            if entry & COMPRESSED != 0 {
                let at = entry & ((1 << offset_bits) - 1);
                let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
                let bytes = (sectors + 1) * 512 - at % 512;
                uses.add_part(at, bytes);
            } else if entry & OFFSET_MASK != 0 {
                uses.add(entry & OFFSET_MASK, header.cluster_bytes);
            }
        }
    }
    Ok(())
}

/// Compares a block of refcounts with the uses of its clusters, and makes it right. Returns whether
/// that has changed it.
fn compare(block: &mut [u8], uses: &[u8], bits: u32, found: &mut Count) -> bool {
    let mut changed = false;
    for (index, &uses) in uses.iter().enumerate() {
        let has = get(block, index, bits);
        let wanted = u64::from(uses);
        if has == wanted || (uses == MANY && has >= wanted) {
            continue;
        }
        if has > wanted {
            found.leaks += 1;
        } else {
            found.corruptions += 1;
        }
        if uses < MANY && set(block, index, bits, wanted) {
            changed = true;
        } else {
            found.lasting += 1;
        }
    }
    changed
}

fn get(block: &[u8], index: usize, bits: u32) -> u64 {
    let width = bits as usize;
    if width < 8 {
        let bit = index * width;
        let byte = block.get(bit / 8).copied().unwrap_or(0);
        return u64::from(byte >> (bit % 8)) & ((1 << width) - 1);
    }
    let bytes = width / 8;
    let field = block.get(index * bytes..(index + 1) * bytes);
    let fold = |value: u64, &byte: &u8| value << 8 | u64::from(byte);
    field.unwrap_or_default().iter().fold(0, fold)
}

/// Returns whether it fits.
fn set(block: &mut [u8], index: usize, bits: u32, value: u64) -> bool {
    let width = bits as usize;
    if width < 64 && value >> width != 0 {
        return false;
    }
    if width < 8 {
        let bit = index * width;
        let mask = (1u8 << width) - 1;
        if let Some(byte) = block.get_mut(bit / 8) {
            let value = u8::try_from(value).unwrap_or(0);
            *byte = *byte & !(mask << (bit % 8)) | value << (bit % 8);
        }
        return true;
    }
    let bytes = width / 8;
    let value = value.to_be_bytes();
    if let Some(field) = block.get_mut(index * bytes..(index + 1) * bytes)
        && let Some(low) = value.get(8 - bytes..)
    {
        field.copy_from_slice(low);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn refcount_of_any_width_is_read_as_it_was_written(
            order in 0u32..7, index in 0usize..64, value: u64, noise in prop::collection::vec(any::<u8>(), 512),
        ) {
            let bits = 1u32 << order;
            let mut block = noise.clone();
            let value = if bits < 64 { value & ((1 << bits) - 1) } else { value };
            prop_assert!(set(&mut block, index, bits, value));
            prop_assert_eq!(get(&block, index, bits), value);
            for other in (0..64).filter(|&other| other != index) {
                prop_assert_eq!(get(&block, other, bits), get(&noise, other, bits));
            }
        }
    }
}
