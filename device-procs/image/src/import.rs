//! Images that are read once, to be converted: VHD (Microsoft, "Virtual Hard Disk Image Format
//! Specification"; big endian) and VMDK with grain tables (VMware, "Virtual Disk Format 5.0"; little endian).

use crate::ImageError;
use crate::header::read_at;
use crate::offline::Readable;
use nix::errno::Errno;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::sync::Arc;

const SECTOR_BYTES: u64 = 512;
/// Most entries of a table that is kept in memory.
const ENTRIES_MAX: u64 = 4 << 20;
/// Largest block or grain in bytes.
const BLOCK_BYTES_MAX: u64 = 64 << 20;
const UNUSED: u32 = u32::MAX;

fn field(name: &str, field: &'static str, got: impl ToString, expected: &str) -> ImageError {
    ImageError::Field {
        file: name.to_owned(),
        field,
        got: got.to_string(),
        expected: expected.to_owned(),
    }
}

fn bytes_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let found = bytes.get(at..at + N).and_then(|b| b.try_into().ok());
    found.unwrap_or([0; N])
}

fn file_bytes(mut file: &File, name: &str) -> Result<u64, ImageError> {
    file.seek(SeekFrom::End(0))
        .map_err(|e| ImageError::io(name, e))
}

fn table(file: &File, at: u64, entries: u64, name: &str) -> Result<Vec<[u8; 4]>, ImageError> {
    if entries > ENTRIES_MAX {
        return Err(field(
            name,
            "table",
            format!("{entries} entries"),
            "at most 4194304",
        ));
    }
    let mut bytes = vec![0; usize::try_from(entries * 4).unwrap_or(0)];
    read_at(file, at, &mut bytes).map_err(|e| ImageError::io(name, e))?;
    Ok(bytes.as_chunks::<4>().0.to_vec())
}

/// A VHD image.
#[derive(Debug)]
pub(crate) struct Vhd {
    file: Arc<File>,
    bytes: u64,
    /// Sector of each block; empty for a fixed image.
    blocks: Vec<u32>,
    block_bytes: u64,
}

impl Vhd {
    pub(crate) fn open(file: Arc<File>, name: &str) -> Result<Self, ImageError> {
        let end = file_bytes(&file, name)?;
        let mut footer = vec![0; 512];
        let at = end.saturating_sub(512);
        read_at(&file, at, &mut footer).map_err(|e| ImageError::io(name, e))?;
        if !footer.starts_with(b"conectix") {
            return Err(field(name, "footer", "something else", "a VHD image"));
        }
        let sum = u32::from_be_bytes(bytes_at(&footer, 64));
        let all = footer
            .iter()
            .zip(0usize..)
            .filter(|(_, at)| !(64..68).contains(at));
        let has = !all.fold(0u32, |sum, (&byte, _)| sum.wrapping_add(byte.into()));
        if sum != has {
            return Err(field(name, "checksum of the footer", sum, &has.to_string()));
        }
        let bytes = u64::from_be_bytes(bytes_at(&footer, 48));
        let kind = u32::from_be_bytes(bytes_at(&footer, 60));
        let (blocks, block_bytes) = match kind {
            2 if bytes <= at => (Vec::new(), 0),
            2 => {
                return Err(field(
                    name,
                    "current size",
                    bytes,
                    "a size that the file has",
                ));
            }
            3 => Self::dynamic(&file, &footer, bytes, name)?,
            _ => return Err(field(name, "disk type", kind, "2 (fixed) or 3 (dynamic)")),
        };
        Ok(Self {
            file,
            bytes,
            blocks,
            block_bytes,
        })
    }

    fn dynamic(
        file: &File,
        footer: &[u8],
        bytes: u64,
        name: &str,
    ) -> Result<(Vec<u32>, u64), ImageError> {
        let mut header = vec![0; 1024];
        let at = u64::from_be_bytes(bytes_at(footer, 16));
        read_at(file, at, &mut header).map_err(|e| ImageError::io(name, e))?;
        if !header.starts_with(b"cxsparse") {
            return Err(field(
                name,
                "dynamic disk header",
                "something else",
                "cxsparse",
            ));
        }
        let block_bytes = u64::from(u32::from_be_bytes(bytes_at(&header, 32)));
        if !block_bytes.is_power_of_two()
            || !(SECTOR_BYTES..=BLOCK_BYTES_MAX).contains(&block_bytes)
        {
            return Err(field(
                name,
                "block size",
                block_bytes,
                "a power of two up to 64 MiB",
            ));
        }
        let entries = u64::from(u32::from_be_bytes(bytes_at(&header, 28)));
        if entries < bytes.div_ceil(block_bytes) {
            return Err(field(
                name,
                "max table entries",
                entries,
                "one for each block of the disk",
            ));
        }
        let at = u64::from_be_bytes(bytes_at(&header, 16));
        let blocks = table(file, at, bytes.div_ceil(block_bytes), name)?;
        Ok((
            blocks.into_iter().map(u32::from_be_bytes).collect(),
            block_bytes,
        ))
    }

    fn block(&self, at: u64) -> Option<u32> {
        let index = usize::try_from(at / self.block_bytes).ok()?;
        self.blocks
            .get(index)
            .copied()
            .filter(|&sector| sector != UNUSED)
    }
}

impl Readable for Vhd {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn has_data(&self, at: u64) -> Result<(bool, u64), Errno> {
        if self.block_bytes == 0 {
            return Ok((true, self.bytes.saturating_sub(at).max(1)));
        }
        Ok((
            self.block(at).is_some(),
            self.block_bytes - at % self.block_bytes,
        ))
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        if self.block_bytes == 0 {
            return read_at(&self.file, at, to);
        }
        let (mut at, mut rest) = (at, to);
        while !rest.is_empty() {
            let inside = at % self.block_bytes;
            let has = usize::try_from(self.block_bytes - inside)
                .map_or(rest.len(), |n| n.min(rest.len()));
            let (now, later) = rest.split_at_mut(has);
            match self.block(at) {
                None => now.fill(0),
                Some(sector) => {
                    // In front of a block, one bit for each of its sectors that was written.
                    let sectors = self.block_bytes / SECTOR_BYTES;
                    let bitmap_bytes = sectors.div_ceil(8).next_multiple_of(SECTOR_BYTES);
                    let block = u64::from(sector) * SECTOR_BYTES;
                    let mut bitmap =
                        vec![0; usize::try_from(bitmap_bytes).map_err(|_| Errno::EIO)?];
                    read_at(&self.file, block, &mut bitmap)?;
                    read_at(&self.file, block + bitmap_bytes + inside, now)?;
                    for (index, part) in now.chunks_mut(512).enumerate() {
                        let sector = inside / SECTOR_BYTES + index as u64;
                        let byte = usize::try_from(sector / 8)
                            .ok()
                            .and_then(|at| bitmap.get(at));
                        if byte.is_none_or(|byte| byte & (0x80 >> (sector % 8)) == 0) {
                            part.fill(0);
                        }
                    }
                }
            }
            at += has as u64;
            rest = later;
        }
        Ok(())
    }
}

/// A VMDK image with grain tables.
#[derive(Debug)]
pub(crate) struct Grains {
    file: Arc<File>,
    bytes: u64,
    grain_bytes: u64,
    /// Sector of each grain; 0 and 1 stand for zeroes.
    grains: Vec<u32>,
    compressed: bool,
}

const FLAG_COMPRESSED: u32 = 1 << 16;
const AT_END: u64 = u64::MAX;

impl Grains {
    pub(crate) fn open(file: Arc<File>, name: &str) -> Result<Self, ImageError> {
        let end = file_bytes(&file, name)?;
        let mut header = vec![0; 512];
        read_at(&file, 0, &mut header).map_err(|e| ImageError::io(name, e))?;
        let le64 = |header: &[u8], at| u64::from_le_bytes(bytes_at(header, at));
        if !header.starts_with(b"KDMV") {
            return Err(field(
                name,
                "magic",
                "something else",
                "a VMDK image with grain tables",
            ));
        }
        if le64(&header, 56) == AT_END {
            // Written as a stream: what was known at its end is in a footer.
            let at = end.saturating_sub(1024);
            read_at(&file, at, &mut header).map_err(|e| ImageError::io(name, e))?;
            if !header.starts_with(b"KDMV") {
                return Err(field(
                    name,
                    "footer",
                    "something else",
                    "a copy of the header",
                ));
            }
        }
        let flags = u32::from_le_bytes(bytes_at(&header, 8));
        let compressed = flags & FLAG_COMPRESSED != 0;
        let algorithm = u16::from_le_bytes(bytes_at(&header, 77));
        if compressed && algorithm != 1 {
            return Err(field(name, "compressAlgorithm", algorithm, "1 (deflate)"));
        }
        Self::refuse_parent(&file, &header, name)?;
        let grain_bytes = le64(&header, 20).saturating_mul(SECTOR_BYTES);
        if !grain_bytes.is_power_of_two() || !(4096..=BLOCK_BYTES_MAX).contains(&grain_bytes) {
            return Err(field(
                name,
                "grainSize",
                grain_bytes,
                "4 KiB to 64 MiB, a power of two",
            ));
        }
        let bytes = le64(&header, 12).checked_mul(SECTOR_BYTES);
        let count = bytes.map(|bytes| bytes.div_ceil(grain_bytes));
        let (Some(bytes), Some(count)) = (bytes, count.filter(|&count| count <= ENTRIES_MAX))
        else {
            return Err(field(
                name,
                "capacity",
                le64(&header, 12),
                "at most 4194304 grains",
            ));
        };
        let per_table = u64::from(u32::from_le_bytes(bytes_at(&header, 44)));
        if !(1..=ENTRIES_MAX).contains(&per_table) {
            return Err(field(name, "numGTEsPerGT", per_table, "usually 512"));
        }
        let directory = le64(&header, 56).saturating_mul(SECTOR_BYTES);
        let mut grains = Vec::new();
        for place in table(&file, directory, count.div_ceil(per_table), name)? {
            let sector = u32::from_le_bytes(place);
            let left = per_table.min(count - grains.len() as u64);
            if sector == 0 {
                grains.resize(grains.len() + usize::try_from(left).unwrap_or(0), 0);
                continue;
            }
            let entries = table(&file, u64::from(sector) * SECTOR_BYTES, left, name)?;
            grains.extend(entries.into_iter().map(u32::from_le_bytes));
        }
        Ok(Self {
            file,
            bytes,
            grain_bytes,
            grains,
            compressed,
        })
    }

    /// The descriptor inside of the image says whether it is a layer on top of another.
    fn refuse_parent(file: &File, header: &[u8], name: &str) -> Result<(), ImageError> {
        let at = u64::from_le_bytes(bytes_at(header, 28)).saturating_mul(SECTOR_BYTES);
        let bytes = u64::from_le_bytes(bytes_at(header, 36)).saturating_mul(SECTOR_BYTES);
        let mut text = vec![0; usize::try_from(bytes.min(64 << 10)).unwrap_or(0)];
        read_at(file, at, &mut text).map_err(|e| ImageError::io(name, e))?;
        let text = String::from_utf8_lossy(&text);
        let parent = text
            .lines()
            .find_map(|line| line.trim().strip_prefix("parentCID="));
        match parent.map(|cid| cid.trim().trim_end_matches('\0')) {
            Some(cid) if !cid.eq_ignore_ascii_case("ffffffff") => {
                let cid: String = cid.escape_debug().take(20).collect();
                Err(field(
                    name,
                    "parentCID",
                    cid,
                    "ffffffff: an image without a parent",
                ))
            }
            _ => Ok(()),
        }
    }

    fn grain(&self, at: u64) -> Option<u64> {
        let index = usize::try_from(at / self.grain_bytes).ok()?;
        let sector = self
            .grains
            .get(index)
            .copied()
            .filter(|&sector| sector > 1)?;
        Some(u64::from(sector) * SECTOR_BYTES)
    }

    fn inflate(&self, at: u64) -> Result<Vec<u8>, Errno> {
        let mut head = [0; 12];
        read_at(&self.file, at, &mut head)?;
        let bytes = u64::from(u32::from_le_bytes(bytes_at(&head, 8)));
        if bytes > 2 * self.grain_bytes + 1024 {
            return Err(Errno::EIO);
        }
        let mut packed = vec![0; usize::try_from(bytes).map_err(|_| Errno::EIO)?];
        read_at(&self.file, at + 12, &mut packed)?;
        let mut grain = Vec::new();
        let mut decoder = flate2::read::ZlibDecoder::new(packed.as_slice()).take(self.grain_bytes);
        decoder.read_to_end(&mut grain).map_err(|_| Errno::EIO)?;
        grain.resize(
            usize::try_from(self.grain_bytes).map_err(|_| Errno::EIO)?,
            0,
        );
        Ok(grain)
    }
}

impl Readable for Grains {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn has_data(&self, at: u64) -> Result<(bool, u64), Errno> {
        Ok((
            self.grain(at).is_some(),
            self.grain_bytes - at % self.grain_bytes,
        ))
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let (mut at, mut rest) = (at, to);
        while !rest.is_empty() {
            let inside = at % self.grain_bytes;
            let has = usize::try_from(self.grain_bytes - inside)
                .map_or(rest.len(), |n| n.min(rest.len()));
            let (now, later) = rest.split_at_mut(has);
            match self.grain(at) {
                None => now.fill(0),
                Some(place) if self.compressed => {
                    let grain = self.inflate(place)?;
                    let from = usize::try_from(inside).map_err(|_| Errno::EIO)?;
                    now.copy_from_slice(grain.get(from..from + has).ok_or(Errno::EIO)?);
                }
                Some(place) => read_at(&self.file, place + inside, now)?,
            }
            at += has as u64;
            rest = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    fn file(bytes: &[u8]) -> Arc<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.into()
    }

    fn read_all(from: &dyn Readable) {
        let mut seen = [0; 1000];
        for at in [0, 511, 70_000] {
            if at + 1000 <= from.bytes() {
                let _either = (from.has_data(at), from.read(at, &mut seen));
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(mut bytes: Vec<u8>, patch in prop::collection::vec((0usize..600, any::<u8>()), 0..8)) {
            let _refused = Vhd::open(file(&bytes), "x").map(|vhd| read_all(&vhd));
            bytes.resize(4096, 0);
            bytes[..4].copy_from_slice(b"KDMV");
            bytes[12..20].copy_from_slice(&1000u64.to_le_bytes());
            bytes[20..28].copy_from_slice(&128u64.to_le_bytes());
            bytes[44..48].copy_from_slice(&512u32.to_le_bytes());
            bytes[56..64].copy_from_slice(&1u64.to_le_bytes());
            for (at, byte) in patch {
                bytes[at] = byte;
            }
            let _either = Grains::open(file(&bytes), "x").map(|grains| read_all(&grains));
        }
    }
}
