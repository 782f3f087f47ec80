//! What drivers ask for: the bytes of a request, checked once and for all against the disk.
//!
//! A request is a 16-byte header and data to write (readable), then data to read and one status byte
//! (writable). What is wrong with one is answered in its status.

use bulkhead_runtime::{Chain, Queues, Span};

/// Unit of addresses and lengths in bytes.
pub(crate) const SECTOR_BYTES: u64 = 512;
/// Bytes of the identifier that GET_ID returns.
pub(crate) const ID_BYTES: usize = 20;
/// Ranges that one discard or write-zeroes request may have.
pub(crate) const RANGES_MAX: u32 = 256;

const HEADER_BYTES: u32 = 16;
/// Size of one range of a discard or write-zeroes request.
pub(crate) const RANGE_BYTES: u32 = 16;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;
const FLAG_UNMAP: u32 = 1;

/// Status byte of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Ok,
    IoError,
    Unsupported,
}

impl Status {
    pub(crate) const fn byte(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::IoError => 1,
            Self::Unsupported => 2,
        }
    }
}

/// What the disk can do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Geometry {
    /// Size in sectors.
    pub(crate) sectors: u64,
    /// Whether it may not be changed.
    pub(crate) read_only: bool,
    /// Largest range of a discard request in sectors; 0 when discards are not offered.
    pub(crate) discard_sectors_max: u32,
    /// Largest range of a write-zeroes request in sectors; 0 when they are not offered.
    pub(crate) zeroes_sectors_max: u32,
}

/// A checked request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Read disk bytes from `at` into the window.
    Read { at: u64, to: Span },
    /// Write window bytes to the disk at `at`.
    Write { at: u64, from: Span },
    /// Make completed writes durable.
    Flush,
    /// Return the identifier.
    GetId { to: Span },
    /// Deallocate ranges of the disk; they are read when their turn comes.
    Discard { ranges: Span },
    /// Zero ranges of the disk.
    WriteZeroes { ranges: Span },
}

/// A range of the disk in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) at: u64,
    pub(crate) bytes: u64,
    /// Whether the range may be deallocated.
    pub(crate) unmap: bool,
}

/// A request as far as it could be understood.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parsed {
    /// Where the status goes; `None` when there is no place for it.
    pub(crate) status_at: Option<Span>,
    /// What to do, or the status that says why not.
    pub(crate) operation: Result<Operation, Status>,
}

/// Reads and checks a request.
pub(crate) fn parse(chain: &Chain, queues: &Queues, disk: &Geometry) -> Parsed {
    let (data_in, status_at) = split_status(chain.writable());
    let operation = match header(chain, queues) {
        Some((kind, sector, data_out)) => check(kind, sector, data_in, data_out, disk),
        None => Err(Status::IoError),
    };
    Parsed {
        status_at,
        operation,
    }
}

/// The data to read and the status byte: the last writable byte. Data in several pieces is none
/// that a gate makes.
fn split_status(writable: &[Span]) -> (Option<Span>, Option<Span>) {
    let Some((last, before)) = writable.split_last() else {
        return (None, None);
    };
    let data_bytes = last.len() - 1;
    let status = last.part(data_bytes, 1);
    let data = match before {
        [] => Some(last.part(0, data_bytes)),
        [data] if data_bytes == 0 => Some(*data),
        _ => None,
    };
    (data, Some(status))
}

fn header(chain: &Chain, queues: &Queues) -> Option<(u32, u64, Option<Span>)> {
    let (first, rest) = chain.readable().split_first()?;
    let mut bytes = [0; HEADER_BYTES as usize];
    if queues.read(*first, &mut bytes) < bytes.len() {
        return None;
    }
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = bytes;
    let after = first.part(HEADER_BYTES, u32::MAX);
    let data = match rest {
        [] => Some(after),
        [data] if after.is_empty() => Some(*data),
        _ => None,
    };
    let kind = u32::from_le_bytes([k0, k1, k2, k3]);
    Some((kind, u64::from_le_bytes(sector), data))
}

fn check(
    kind: u32,
    sector: u64,
    data_in: Option<Span>,
    data_out: Option<Span>,
    disk: &Geometry,
) -> Result<Operation, Status> {
    let data_in = data_in.ok_or(Status::IoError)?;
    let data_out = data_out.ok_or(Status::IoError)?;
    let changes_allowed = if disk.read_only {
        Err(Status::IoError)
    } else {
        Ok(())
    };
    match kind {
        T_IN => {
            let at = place(sector, data_in.len(), disk)?;
            Ok(Operation::Read { at, to: data_in })
        }
        T_OUT => {
            changes_allowed?;
            let at = place(sector, data_out.len(), disk)?;
            Ok(Operation::Write { at, from: data_out })
        }
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID if data_in.len() as usize >= ID_BYTES => Ok(Operation::GetId { to: data_in }),
        T_GET_ID => Err(Status::IoError),
        T_DISCARD | T_WRITE_ZEROES => {
            let offered = if kind == T_DISCARD {
                disk.discard_sectors_max
            } else {
                disk.zeroes_sectors_max
            };
            if offered == 0 {
                return Err(Status::Unsupported);
            }
            changes_allowed?;
            let ranges = data_out;
            let count = ranges.len() / RANGE_BYTES;
            if !ranges.len().is_multiple_of(RANGE_BYTES) || !(1..=RANGES_MAX).contains(&count) {
                return Err(Status::IoError);
            }
            Ok(if kind == T_DISCARD {
                Operation::Discard { ranges }
            } else {
                Operation::WriteZeroes { ranges }
            })
        }
        _ => Err(Status::Unsupported),
    }
}

/// First byte of `bytes` bytes from `sector` on: whole sectors, at least one, inside of the disk.
fn place(sector: u64, bytes: u32, disk: &Geometry) -> Result<u64, Status> {
    let bytes = u64::from(bytes);
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES) {
        return Err(Status::IoError);
    }
    bounded(sector, bytes / SECTOR_BYTES, disk)
}

fn bounded(sector: u64, count: u64, disk: &Geometry) -> Result<u64, Status> {
    let left = disk.sectors.checked_sub(sector).ok_or(Status::IoError)?;
    if count > left {
        return Err(Status::IoError);
    }
    Ok(sector * SECTOR_BYTES)
}

/// Reads and checks range number `index` of a discard (`discard`) or write-zeroes request.
pub(crate) fn range(
    ranges: Span,
    index: u32,
    discard: bool,
    queues: &Queues,
    disk: &Geometry,
) -> Result<Range, Status> {
    let mut bytes = [0; RANGE_BYTES as usize];
    queues.read(ranges.part(index * RANGE_BYTES, RANGE_BYTES), &mut bytes);
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = bytes;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes(flags);
    let (limit, flags_known) = if discard {
        (disk.discard_sectors_max, 0)
    } else {
        (disk.zeroes_sectors_max, FLAG_UNMAP)
    };
    if flags & !flags_known != 0 {
        return Err(Status::Unsupported);
    }
    if count > limit {
        return Err(Status::IoError);
    }
    let at = bounded(sector, count.into(), disk)?;
    Ok(Range {
        at,
        bytes: u64::from(count) * SECTOR_BYTES,
        unmap: discard || flags & FLAG_UNMAP != 0,
    })
}
