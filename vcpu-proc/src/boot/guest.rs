//! Placing things in guest memory: every range is claimed before it is written.
//!
//! A claim is refused unless it lies wholly within the guest's memory and overlaps neither the
//! loader's own structures, nor the ACPI tables, nor an earlier claim. Callers write only what they
//! claimed. A kernel may claim what its memory map calls reserved (linkers like to put ELF headers
//! on the page below 1 MiB); an initrd is only put into RAM.

use std::borrow::Cow;

use bulkhead_ipc::platform;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::error::BootError;
use super::layout::{self, MapEntry, MapKind};
use super::source::Source;

/// A range of guest memory that something occupies.
#[derive(Debug, Clone)]
struct Claim {
    start: u64,
    end: u64,
    what: Cow<'static, str>,
}

/// The memory of a guest that does not run yet.
#[derive(Debug)]
pub(super) struct Guest<'a> {
    memory: &'a GuestMemoryMmap,
    ranges: Vec<(GuestAddress, u64)>,
    map: Vec<MapEntry>,
    claims: Vec<Claim>,
}

impl<'a> Guest<'a> {
    /// A guest of `bytes` bytes whose memory is `memory`, with the loader's own range claimed.
    pub(super) fn new(memory: &'a GuestMemoryMmap, bytes: u64) -> Self {
        let own = |start, end, what| Claim {
            start,
            end,
            what: Cow::Borrowed(what),
        };
        let claims = vec![
            own(0, layout::BOOT_DATA_END, "the loader's own structures"),
            own(
                platform::ACPI_TABLES_START,
                layout::ACPI_TABLES_END,
                "the ACPI tables",
            ),
        ];
        Self {
            memory,
            ranges: layout::memory_ranges(bytes),
            map: layout::memory_map(bytes),
            claims,
        }
    }

    /// The memory map that the guest is told.
    pub(super) fn map(&self) -> &[MapEntry] {
        &self.map
    }

    /// Takes `bytes` bytes from `start` for `what`.
    pub(super) fn claim(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        start: u64,
        bytes: u64,
    ) -> Result<(), BootError> {
        let what = what.into();
        let end = start.saturating_add(bytes);
        let inside = self.ranges.iter().any(|(range, length)| {
            start
                .checked_sub(range.0)
                .is_some_and(|offset| offset.checked_add(bytes).is_some_and(|end| end <= *length))
        });
        if !inside {
            let available = self.describe_memory();
            return Err(BootError::OutsideMemory {
                what,
                start,
                end,
                available,
            });
        }
        if let Some(other) = self
            .claims
            .iter()
            .find(|other| start < other.end && other.start < end)
        {
            return Err(BootError::Overlap {
                what,
                start,
                end,
                other: other.what.clone(),
                other_start: other.start,
                other_end: other.end,
            });
        }
        self.claims.push(Claim { start, end, what });
        Ok(())
    }

    /// Gives back every claim but the loader's own: a kernel is loaded anew in another way.
    pub(super) fn release_claims(&mut self) {
        self.claims.truncate(OWN_CLAIMS);
    }

    /// The highest page-aligned address below `limit` where `bytes` bytes of RAM from 1 MiB on are
    /// free, or the size of the largest free range.
    pub(super) fn highest_free(&self, bytes: u64, limit: u64) -> Result<u64, u64> {
        let mut largest = 0;
        let mut best = None;
        for range in self
            .ram()
            .filter(|range| range.start >= layout::HIGH_MEMORY_START)
        {
            for (start, end) in self.free_within(range.start, range.end().min(limit)) {
                let start = start.next_multiple_of(PAGE);
                largest = largest.max(end.saturating_sub(start));
                if let Some(place) = end.checked_sub(bytes).map(|place| place / PAGE * PAGE)
                    && place >= start
                {
                    best = best.max(Some(place));
                }
            }
        }
        best.ok_or(largest)
    }

    /// The page behind everything that is claimed from 1 MiB to the MMIO hole, if `bytes` bytes of
    /// RAM follow, or how many do.
    pub(super) fn free_behind_claims(&self, bytes: u64) -> Result<u64, u64> {
        let Some(range) = self
            .ram()
            .find(|range| range.start == layout::HIGH_MEMORY_START)
        else {
            return Err(0);
        };
        let claims = self
            .claims
            .iter()
            .map(|claim| claim.end)
            .filter(|end| *end <= range.end());
        let start = claims.fold(range.start, u64::max).next_multiple_of(PAGE);
        let available = range.end().saturating_sub(start);
        if bytes <= available {
            Ok(start)
        } else {
            Err(available)
        }
    }

    /// Copies `count` bytes at `address` out of guest memory.
    pub(super) fn read(&self, address: u64, count: usize) -> Result<Vec<u8>, BootError> {
        let mut bytes = vec![0; count];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .map_err(|_| BootError::Unbacked {
                address,
                bytes: count as u64,
            })?;
        Ok(bytes)
    }

    /// Writes `bytes` at `address`; the range is claimed or the loader's own.
    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .map_err(|_| BootError::Unbacked {
                address,
                bytes: bytes.len() as u64,
            })
    }

    /// Writes `bytes` at `address` but leaves out whole pages of zeros: guest memory is zero
    /// wherever nothing was written, and a page that nobody touches costs nothing.
    pub(super) fn write_sparse(&self, address: u64, bytes: &[u8]) -> Result<(), BootError> {
        const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        let (mut address, mut rest) = (address, bytes);
        while !rest.is_empty() {
            let to_boundary = usize::try_from(PAGE - address % PAGE).unwrap_or(PAGE_BYTES);
            let (page, after) = rest.split_at(to_boundary.min(rest.len()));
            if ZEROS.get(..page.len()) != Some(page) {
                self.write(address, page)?;
            }
            address = address.saturating_add(page.len() as u64);
            rest = after;
        }
        Ok(())
    }

    /// Copies `count` bytes from `offset` of `source` to `address`, a claimed range.
    pub(super) fn read_from(
        &self,
        source: &Source<'_>,
        field: &'static str,
        offset: u64,
        address: u64,
        count: u64,
    ) -> Result<(), BootError> {
        source.read_into_guest(field, offset, self.memory, address, count)
    }

    fn ram(&self) -> impl Iterator<Item = &MapEntry> {
        self.map.iter().filter(|range| range.kind == MapKind::Ram)
    }

    /// The parts of `start..end` that nobody has claimed, ascending.
    fn free_within(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut claims: Vec<_> = self
            .claims
            .iter()
            .map(|claim| (claim.start, claim.end))
            .collect();
        claims.sort_unstable();
        let mut free = Vec::new();
        let mut at = start;
        for (claim_start, claim_end) in claims {
            if claim_start >= end {
                break;
            }
            if claim_start > at {
                free.push((at, claim_start));
            }
            at = at.max(claim_end);
        }
        if at < end {
            free.push((at, end));
        }
        free
    }

    fn describe_memory(&self) -> String {
        let range = |(start, bytes): &(GuestAddress, u64)| {
            format!("{:#x} to {:#x}", start.0, start.0.saturating_add(*bytes))
        };
        self.ranges.iter().map(range).collect::<Vec<_>>().join(", ")
    }
}

/// The first claims, which are the loader's and stay.
const OWN_CLAIMS: usize = 2;
const PAGE: u64 = 0x1000;
const PAGE_BYTES: usize = 0x1000;
