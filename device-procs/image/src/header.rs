//! What the header of a qcow2 image says (QEMU, `docs/interop/qcow2.rst`; big endian).

use crate::ImageError;
use nix::errno::Errno;
use nix::sys::uio::pread;
use std::fs::File;

const MAGIC: &[u8] = b"QFI\xfb";
const V2_BYTES: usize = 72;
pub(crate) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_BITMAPS: u32 = 0x2385_2875;
const NAME_BYTES_MAX: usize = 1023;
/// Refcounts are being changed without being written at once.
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// The fields that this project looks at by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of a cluster in bytes, 512 to 2 MiB.
    pub cluster_bytes: u64,
    /// Size of the disk in bytes.
    pub bytes: u64,
    /// Name of the backing image.
    pub backing: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Number of internal snapshots.
    pub snapshots: u32,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// Whether its data are in another file.
    pub data_file: bool,
    /// Whether it was not closed by a writer with lazy refcounts.
    pub dirty: bool,
    /// Whether somebody has marked it as corrupt.
    pub corrupt: bool,
    /// Whether it has persistent bitmaps.
    pub bitmaps: bool,
    /// Whether L2 entries have subclusters.
    pub extended_l2: bool,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table is.
    pub l1_at: u64,
    /// Where the refcount table is.
    pub refcounts_at: u64,
    /// Its length in clusters.
    pub refcounts_clusters: u32,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
}

/// Reads `to.len()` bytes; what is behind the end of the file is zero.
pub(crate) fn read_at(file: &File, at: u64, to: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while let Some(rest) = to.get_mut(done..)
        && !rest.is_empty()
    {
        let from = at
            .checked_add(done as u64)
            .and_then(|at| i64::try_from(at).ok());
        match pread(file, rest, from.ok_or(Errno::EIO)?) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_be_bytes(field.unwrap_or_default())
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    let field = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_be_bytes(field.unwrap_or_default())
}

impl Header {
    /// Reads the header of `file`. Blocks.
    ///
    /// # Errors
    /// [`ImageError`] when it is no qcow2 image, or one that nobody could use.
    pub fn read(file: &File, name: &str) -> Result<Self, ImageError> {
        let mut bytes = vec![0; 64 * 1024];
        read_at(file, 0, &mut bytes).map_err(|e| ImageError::io(name, e))?;
        Self::parse(&bytes, name)
    }

    /// The same from the first 64 KiB of a file.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub fn parse(bytes: &[u8], name: &str) -> Result<Self, ImageError> {
        let field = |field, got: String, expected: &str| ImageError::Field {
            file: name.to_owned(),
            field,
            got,
            expected: expected.to_owned(),
        };
        if bytes.get(..4) != Some(MAGIC) {
            let expected = "a qcow2 image; say `format=raw` if it is one without a format";
            return Err(field("magic", "another file".to_owned(), expected));
        }
        let version = be32(bytes, 4);
        if !matches!(version, 2 | 3) {
            return Err(field("version", version.to_string(), "2 or 3"));
        }
        let cluster_bits = be32(bytes, 20);
        if !(9..=21).contains(&cluster_bits) {
            return Err(field("cluster_bits", cluster_bits.to_string(), "9 to 21"));
        }
        let v3 = version == 3;
        let (incompatible, refcount_order) = if v3 {
            (be64(bytes, 72), be32(bytes, 96))
        } else {
            (0, 4)
        };
        if refcount_order > 6 {
            return Err(field(
                "refcount_order",
                refcount_order.to_string(),
                "0 to 6",
            ));
        }
        let header_bytes = if v3 {
            be32(bytes, 100) as usize
        } else {
            V2_BYTES
        };
        let (name_at, name_bytes) = (be64(bytes, 8), be32(bytes, 16) as usize);
        if name_bytes > NAME_BYTES_MAX {
            return Err(field(
                "backing_file_size",
                name_bytes.to_string(),
                "at most 1023",
            ));
        }
        let backing = (name_at != 0 && name_bytes != 0).then(|| {
            let from = usize::try_from(name_at).unwrap_or(usize::MAX);
            let name = bytes.get(from..from.saturating_add(name_bytes));
            String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
        });
        let (mut backing_format, mut bitmaps) = (None, false);
        let mut at = header_bytes;
        while let Some(head) = bytes.get(at..at.saturating_add(8)) {
            let (kind, len) = (be32(head, 0), be32(head, 4) as usize);
            if kind == 0 {
                break;
            }
            let data = bytes.get(at + 8..(at + 8).saturating_add(len));
            let Some(data) = data else { break };
            match kind {
                EXTENSION_BACKING_FORMAT => {
                    backing_format = Some(String::from_utf8_lossy(data).into_owned());
                }
                EXTENSION_BITMAPS => bitmaps = true,
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(Self {
            version,
            cluster_bytes: 1 << cluster_bits,
            bytes: be64(bytes, 24),
            backing,
            backing_format,
            snapshots: be32(bytes, 60),
            encrypted: be32(bytes, 32) != 0,
            data_file: incompatible & INCOMPATIBLE_DATA_FILE != 0,
            dirty: incompatible & INCOMPATIBLE_DIRTY != 0,
            corrupt: incompatible & INCOMPATIBLE_CORRUPT != 0,
            bitmaps,
            extended_l2: incompatible & INCOMPATIBLE_EXTENDED_L2 != 0,
            l1_entries: be32(bytes, 36),
            l1_at: be64(bytes, 40),
            refcounts_at: be64(bytes, 48),
            refcounts_clusters: be32(bytes, 56),
            refcount_bits: 1 << refcount_order,
        })
    }
}
