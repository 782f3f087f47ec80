//! The writing end of a packet ring. All its state is private; of the memory it reads the reader's two
//! positions only, each once.

use super::{
    LENGTH_BYTES, OFFSET_CONSUMED, OFFSET_DATA_EVENT, OFFSET_PRODUCED, OFFSET_ROOM_EVENT,
    PortFault, RingLayout, record_bytes,
};
use crate::shared::SharedMemory;
#[cfg(not(loom))]
use crate::shared::copy;
use crate::sync::{Ordering, fence};
#[cfg(not(loom))]
use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

/// Puts records into a ring.
#[derive(Debug)]
pub struct PacketWriter {
    layout: RingLayout,
    /// Everything before it is written.
    written: u64,
    /// Everything before it is published.
    announced: u64,
    /// Everything before it was taken by the reader, as far as it is known.
    consumed: u64,
}

impl PacketWriter {
    pub(super) const fn new(layout: RingLayout) -> Self {
        Self {
            layout,
            written: 0,
            announced: 0,
            consumed: 0,
        }
    }

    /// Room for a record with up to `len` bytes of content, or `None` when there is none now. For more
    /// than [`super::PACKET_BYTES_MAX`] there never is: callers drop what is longer.
    ///
    /// # Errors
    /// [`PortFault`] when the reader lies; the port is not used again.
    pub fn reserve<'a>(
        &'a mut self,
        memory: &'a SharedMemory,
        len: usize,
    ) -> Result<Option<Record<'a>>, PortFault> {
        if !self.has_room(memory, len)? {
            return Ok(None);
        }
        Ok(Some(Record {
            writer: self,
            memory,
            limit: len,
            filled: 0,
        }))
    }

    /// Whether a record with `len` bytes of content fits now.
    ///
    /// # Errors
    /// As [`PacketWriter::reserve`].
    pub fn has_room(&mut self, memory: &SharedMemory, len: usize) -> Result<bool, PortFault> {
        let len = len as u64;
        if len > self.layout.content_max() {
            return Ok(false);
        }
        if !self.fits(len) {
            self.look(memory)?;
        }
        Ok(self.fits(len))
    }

    /// Makes what was written visible. Returns whether the reader sleeps, so that its doorbell has to
    /// be rung.
    #[must_use]
    pub fn publish(&mut self, memory: &SharedMemory) -> bool {
        if self.announced == self.written {
            return false;
        }
        let produced = self.layout.positions + OFFSET_PRODUCED;
        memory.store(produced, self.written, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.layout.positions + OFFSET_DATA_EVENT;
        let event = memory.load::<u64>(event, Ordering::Relaxed);
        let old = std::mem::replace(&mut self.announced, self.written);
        (old..self.written).contains(&event)
    }

    /// Asks to be woken when there is room for `len` bytes of content, and for half of the ring if possible.
    /// What was written has to be published before.
    /// Returns whether there is room already, in which case the caller goes on instead of sleeping.
    ///
    /// # Errors
    /// As [`PacketWriter::reserve`].
    pub fn ask_for_room(&mut self, memory: &SharedMemory, len: usize) -> Result<bool, PortFault> {
        let len = (len as u64).min(self.layout.content_max());
        let needed = (self.written + record_bytes(len)).saturating_sub(self.layout.capacity);
        let half = self.announced.saturating_sub(self.layout.capacity / 2);
        let event = self.layout.positions + OFFSET_ROOM_EVENT;
        memory.store(event, needed.max(half), Ordering::Relaxed);
        fence(Ordering::SeqCst);
        self.look(memory)?;
        Ok(self.fits(len))
    }

    fn fits(&self, len: u64) -> bool {
        self.written - self.consumed + record_bytes(len) <= self.layout.capacity
    }

    fn look(&mut self, memory: &SharedMemory) -> Result<(), PortFault> {
        let at = self.layout.positions + OFFSET_CONSUMED;
        let got = memory.load::<u64>(at, Ordering::Acquire);
        if got < self.consumed || got > self.announced || !got.is_multiple_of(8) {
            return Err(PortFault::Consumed {
                got,
                from: self.consumed,
                until: self.announced,
            });
        }
        self.consumed = got;
        Ok(())
    }
}

/// A record that is being written. One that is dropped without [`Record::commit`] was never there.
#[derive(Debug)]
#[must_use = "a record that is not committed is not sent"]
pub struct Record<'a> {
    writer: &'a mut PacketWriter,
    memory: &'a SharedMemory,
    limit: usize,
    filled: usize,
}

impl Record<'_> {
    /// Appends bytes; what is beyond the reserved length is cut. Returns how many were taken.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.limit - self.filled);
        let (at, first, _rest) = self.place(len);
        let (before, behind) = bytes
            .get(..len)
            .unwrap_or_default()
            .split_at(first.min(len));
        self.memory.copy_in(at, before);
        if !behind.is_empty() {
            self.memory.copy_in(self.writer.layout.data, behind);
        }
        self.filled += len;
        len
    }

    /// Appends bytes that somebody else may change meanwhile, without looking at them. As
    /// [`Record::write`].
    #[cfg(not(loom))]
    pub fn write_volatile<B: BitmapSlice>(&mut self, from: &VolatileSlice<'_, B>) -> usize {
        let len = from.len().min(self.limit - self.filled);
        let (at, first, rest) = self.place(len);
        if let Ok(part) = from.subslice(0, first) {
            copy(&part, &self.memory.slice(at, first));
        }
        if let Ok(part) = from.subslice(first, rest)
            && rest > 0
        {
            copy(&part, &self.memory.slice(self.writer.layout.data, rest));
        }
        self.filled += len;
        len
    }

    /// Ends the record with what it holds. The reader sees it after [`PacketWriter::publish`].
    pub fn commit(self) {
        let (at, _, _) = self.writer.layout.place(self.writer.written, 8);
        self.memory.write(at, self.filled as u64);
        self.writer.written += record_bytes(self.filled as u64);
    }

    fn place(&self, len: usize) -> (usize, usize, usize) {
        let position = self.writer.written + LENGTH_BYTES + self.filled as u64;
        self.writer.layout.place(position, len)
    }
}
