//! The reading end of a packet ring. All its state is private; of the memory it reads the writer's
//! positions, the records' lengths and their content, each once.

use super::{
    LENGTH_BYTES, OFFSET_CONSUMED, OFFSET_DATA_EVENT, OFFSET_PRODUCED, OFFSET_ROOM_EVENT,
    PACKET_HEADER_BYTES, PortFault, RingLayout, record_bytes,
};
use crate::shared::SharedMemory;
#[cfg(not(loom))]
use crate::shared::copy;
use crate::sync::{Ordering, fence};
#[cfg(not(loom))]
use vm_memory::{VolatileSlice, bitmap::BitmapSlice};

/// Takes records out of a ring.
#[derive(Debug)]
pub struct PacketReader {
    layout: RingLayout,
    /// Everything before it is taken.
    taken: u64,
    /// Everything before it was given back to the writer.
    released: u64,
    /// Everything before it is written, as far as it is known.
    produced: u64,
    /// Length of the record at `taken`, once it was read.
    next: Option<usize>,
}

impl PacketReader {
    pub(super) const fn new(layout: RingLayout) -> Self {
        Self {
            layout,
            taken: 0,
            released: 0,
            produced: 0,
            next: None,
        }
    }

    /// Length of the next record's content, if there is one. It stays the next one until
    /// [`PacketReader::take`].
    ///
    /// # Errors
    /// [`PortFault`] when the writer lies; the port is not used again.
    pub fn peek(&mut self, memory: &SharedMemory) -> Result<Option<usize>, PortFault> {
        if self.next.is_some() {
            return Ok(self.next);
        }
        if self.taken == self.produced {
            self.look(memory)?;
        }
        if self.taken == self.produced {
            return Ok(None);
        }
        let (at, _, _) = self.layout.place(self.taken, 8);
        let got = memory.read::<u64>(at);
        let until = (self.produced - self.taken - LENGTH_BYTES).min(self.layout.content_max());
        if got < PACKET_HEADER_BYTES as u64 || got > until {
            return Err(PortFault::Length { got, until });
        }
        self.next = usize::try_from(got).ok();
        Ok(self.next)
    }

    /// Copies from byte `from` of the next record's content on into `to`. Returns how many bytes there were.
    /// The writer may change them at any time, so nobody should copy the same twice.
    pub fn copy_out(&self, memory: &SharedMemory, from: usize, to: &mut [u8]) -> usize {
        let (at, first, rest) = self.place(from, to.len());
        let (before, behind) = to.split_at_mut(first.min(to.len()));
        memory.copy_out(at, before);
        if let Some(behind) = behind.get_mut(..rest)
            && rest > 0
        {
            memory.copy_out(self.layout.data, behind);
        }
        first + rest
    }

    /// As [`PacketReader::copy_out`], into memory that somebody else may change.
    #[cfg(not(loom))]
    pub fn copy_out_volatile<B: BitmapSlice>(
        &self,
        memory: &SharedMemory,
        from: usize,
        to: &VolatileSlice<'_, B>,
    ) -> usize {
        let (at, first, rest) = self.place(from, to.len());
        if let Ok(part) = to.subslice(0, first) {
            copy(&memory.slice(at, first), &part);
        }
        if let Ok(part) = to.subslice(first, rest)
            && rest > 0
        {
            copy(&memory.slice(self.layout.data, rest), &part);
        }
        first + rest
    }

    /// Takes the record that [`PacketReader::peek`] showed. Its place is the writer's again after
    /// [`PacketReader::release`].
    pub fn take(&mut self) {
        if let Some(len) = self.next.take() {
            self.taken += record_bytes(len as u64);
        }
    }

    /// Gives the places of everything that was taken back. Returns whether the writer waits for that, so
    /// that its doorbell has to be rung.
    #[must_use]
    pub fn release(&mut self, memory: &SharedMemory) -> bool {
        if self.released == self.taken {
            return false;
        }
        let consumed = self.layout.positions + OFFSET_CONSUMED;
        memory.store(consumed, self.taken, Ordering::Release);
        fence(Ordering::SeqCst);
        let event = self.layout.positions + OFFSET_ROOM_EVENT;
        let event = memory.load::<u64>(event, Ordering::Relaxed);
        let old = std::mem::replace(&mut self.released, self.taken);
        old < event && event <= self.taken
    }

    /// Asks to be woken by the next record. Returns whether there is one already, in which case the
    /// caller goes on instead of sleeping.
    ///
    /// # Errors
    /// As [`PacketReader::peek`].
    pub fn ask_for_records(&mut self, memory: &SharedMemory) -> Result<bool, PortFault> {
        if self.taken == self.produced {
            let event = self.layout.positions + OFFSET_DATA_EVENT;
            memory.store(event, self.taken, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            self.look(memory)?;
        }
        Ok(self.taken != self.produced)
    }

    fn look(&mut self, memory: &SharedMemory) -> Result<(), PortFault> {
        let at = self.layout.positions + OFFSET_PRODUCED;
        let got = memory.load::<u64>(at, Ordering::Acquire);
        // Places that were taken and not given back are not the writer's yet.
        let until = self.released.saturating_add(self.layout.capacity);
        if got < self.produced || got > until || !got.is_multiple_of(8) {
            return Err(PortFault::Produced {
                got,
                from: self.produced,
                until,
            });
        }
        self.produced = got;
        Ok(())
    }

    fn place(&self, from: usize, len: usize) -> (usize, usize, usize) {
        let has = self.next.unwrap_or(0).saturating_sub(from);
        let position = self.taken + LENGTH_BYTES + from as u64;
        self.layout.place(position, len.min(has))
    }
}
