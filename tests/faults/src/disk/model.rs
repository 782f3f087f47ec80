//! A disk with a volatile cache, as a model without I/O: what is read from it now, and what a power cut
//! leaves of it.
//!
//! What has been written is read at once, and survives for certain once a flush has succeeded that began
//! after it. Until then a power cut may leave any of its sectors or none. Two things a disk may do besides:
//! to *tear* a write (its first bytes reach the medium, the rest waits for the flush like any other) and to
//! *lie* about a flush (it says that it is done, and nothing has reached the medium).
//!
//! Invariant: applying every change that is not flushed to the medium, in order, gives the content.

use crate::prng;
use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a sector, which is the least that survives or is lost as one.
pub const SECTOR_BYTES: u64 = 512;
/// So much is kept unflushed. Beyond it the disk writes its oldest changes back by itself, as any cache
/// of limited size has to.
pub const CACHE_BYTES_MAX: usize = 64 << 20;

/// What a power cut leaves of changes that were not flushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cut {
    /// Nothing but the first bytes of torn writes.
    #[default]
    Everything,
    /// Of each change each sector or not, by this seed.
    Seeded(u64),
}

/// A place that is not on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at {offset} are not on the disk")]
pub struct OffDisk {
    /// Where it begins.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
}

#[derive(Debug)]
enum Data {
    Bytes(Box<[u8]>),
    Zeroes,
}

/// Something that has not reached the medium.
#[derive(Debug)]
struct Change {
    place: Range<usize>,
    data: Data,
    /// How many of its first bytes have, whatever comes.
    torn: Option<usize>,
}

impl Change {
    /// Bytes that it keeps in memory.
    fn kept(&self) -> usize {
        match &self.data {
            Data::Bytes(bytes) => bytes.len(),
            Data::Zeroes => 0,
        }
    }

    /// Applies the part of it that lies in `part`.
    fn apply(&self, medium: &mut [u8], part: Range<usize>) {
        let within = part.start.max(self.place.start)..part.end.min(self.place.end);
        let Some(to) = medium.get_mut(within.clone()) else {
            return;
        };
        match &self.data {
            Data::Bytes(bytes) => {
                let from = within.start - self.place.start;
                to.copy_from_slice(&bytes[from..from + to.len()]);
            }
            Data::Zeroes => to.fill(0),
        }
    }

    fn apply_all(&self, medium: &mut [u8]) {
        self.apply(medium, self.place.clone());
    }

    /// The parts of it that survive or are lost as one.
    fn sectors(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let sector = usize::try_from(SECTOR_BYTES).unwrap_or(usize::MAX);
        let end = self.place.end;
        let starts = std::iter::successors(Some(self.place.start), move |start| {
            Some((start / sector + 1) * sector).filter(|next| *next < end)
        });
        starts
            .map(move |start| start..end.min((start / sector + 1) * sector))
            .filter(|part| !part.is_empty())
    }
}

/// The disk.
#[derive(Debug)]
pub struct Model {
    content: Vec<u8>,
    medium: Vec<u8>,
    unflushed: VecDeque<Change>,
    unflushed_bytes: usize,
    cache_bytes_max: usize,
}

impl Model {
    /// A disk that holds `image`, all of it flushed.
    #[must_use]
    pub fn new(image: Vec<u8>) -> Self {
        Self::with_cache(image, CACHE_BYTES_MAX)
    }

    /// As [`Model::new`], with another size of its cache.
    #[must_use]
    pub fn with_cache(image: Vec<u8>, cache_bytes_max: usize) -> Self {
        Self {
            medium: image.clone(),
            content: image,
            unflushed: VecDeque::new(),
            unflushed_bytes: 0,
            cache_bytes_max,
        }
    }

    /// Its size.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.content.len() as u64
    }

    /// What is read from it.
    #[must_use]
    pub fn content(&self) -> &[u8] {
        &self.content
    }

    /// What has been flushed.
    #[must_use]
    pub fn medium(&self) -> &[u8] {
        &self.medium
    }

    /// Whether a power cut may lose anything.
    #[must_use]
    pub fn is_flushed(&self) -> bool {
        self.unflushed.is_empty()
    }

    /// Reads; beyond its end there is nothing.
    #[must_use]
    pub fn read(&self, offset: u64, bytes: u64) -> &[u8] {
        let len = self.content.len();
        let end = |at: u64| usize::try_from(at).unwrap_or(len).min(len);
        &self.content[end(offset)..end(offset.saturating_add(bytes))]
    }

    /// Writes. Of a torn write the first `torn` bytes reach the medium at once.
    ///
    /// # Errors
    /// When not all of it is on the disk; then nothing is written.
    pub fn write(&mut self, offset: u64, data: &[u8], torn: Option<u64>) -> Result<(), OffDisk> {
        let place = self.place(offset, data.len() as u64)?;
        let torn = torn.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        self.change(Change {
            place,
            data: Data::Bytes(data.into()),
            torn,
        });
        Ok(())
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// When not all of it is on the disk; then nothing is changed.
    pub fn zero(&mut self, offset: u64, bytes: u64) -> Result<(), OffDisk> {
        let place = self.place(offset, bytes)?;
        self.change(Change {
            place,
            data: Data::Zeroes,
            torn: None,
        });
        Ok(())
    }

    /// Everything that was written reaches the medium.
    pub fn flush(&mut self) {
        while self.write_back_oldest() {}
    }

    /// What a power cut leaves.
    #[must_use]
    pub fn survivors(&self, cut: Cut) -> Vec<u8> {
        let mut image = self.medium.clone();
        let mut random = match cut {
            Cut::Everything => None,
            Cut::Seeded(seed) => Some(prng::Prng::new(seed)),
        };
        for change in &self.unflushed {
            if let Some(torn) = change.torn {
                let start = change.place.start;
                change.apply(&mut image, start..start.saturating_add(torn));
            } else if let Some(random) = &mut random {
                for sector in change.sectors() {
                    if random.one_in(2) {
                        change.apply(&mut image, sector);
                    }
                }
            }
        }
        image
    }

    /// Cuts the power: what survives is all that there is.
    pub fn power_cut(&mut self, cut: Cut) {
        self.medium = self.survivors(cut);
        self.content.clone_from(&self.medium);
        self.unflushed.clear();
        self.unflushed_bytes = 0;
    }

    fn place(&self, offset: u64, bytes: u64) -> Result<Range<usize>, OffDisk> {
        let end = offset.checked_add(bytes).filter(|end| *end <= self.bytes());
        let range = end.and_then(|end| Some((offset.try_into().ok()?, end.try_into().ok()?)));
        let (start, end) = range.ok_or(OffDisk { offset, bytes })?;
        Ok(start..end)
    }

    fn change(&mut self, change: Change) {
        change.apply_all(&mut self.content);
        self.unflushed_bytes += change.kept();
        self.unflushed.push_back(change);
        while self.unflushed_bytes > self.cache_bytes_max && self.write_back_oldest() {}
    }

    /// Returns whether there was anything to write back.
    fn write_back_oldest(&mut self) -> bool {
        let Some(oldest) = self.unflushed.pop_front() else {
            return false;
        };
        oldest.apply_all(&mut self.medium);
        self.unflushed_bytes -= oldest.kept();
        true
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
