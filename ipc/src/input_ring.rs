//! Console input: a numbered ring in shared memory that the broker writes and a device process
//! reads. It outlives the device, so no key press is lost or doubled when the device restarts.
//!
//! ```text
//! 0x00  produced: bytes ever written (u64, broker)    0x40  consumed: bytes taken (u64, device)
//! 0x1000  data; byte n is at 0x1000 + n % 4096
//! ```

use crate::shared::{SharedError, SharedMemory};
use crate::sync::Ordering;
use nix::errno::Errno;
use nix::sys::uio::pread;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Size of the shared memory in bytes.
pub const INPUT_RING_BYTES: u64 = 0x2000;
const CAPACITY: u64 = 4096;
const OFFSET_PRODUCED: usize = 0x00;
const OFFSET_CONSUMED: usize = 0x40;
const OFFSET_DATA: usize = 0x1000;

/// Bytes that the last reader says it has taken, from a ring that is not mapped. A reader may lie.
///
/// # Errors
/// The kernel's error.
pub fn taken(ring: BorrowedFd<'_>) -> Result<u64, Errno> {
    let mut bytes = [0; 8];
    pread(ring, &mut bytes, 0x40)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The writing end (broker).
#[derive(Debug)]
pub struct InputWriter {
    memory: SharedMemory,
    produced: u64,
    consumed: u64,
}

impl InputWriter {
    /// Maps a ring that holds nothing yet.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd) -> Result<Self, SharedError> {
        SharedMemory::map(fd, INPUT_RING_BYTES).map(Self::over)
    }

    pub(crate) const fn over(memory: SharedMemory) -> Self {
        Self {
            memory,
            produced: 0,
            consumed: 0,
        }
    }

    /// Maps a ring that another writer has written, and goes on where it stopped.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn go_on(fd: OwnedFd) -> Result<Self, SharedError> {
        let mut writer = Self::map(fd)?;
        // A hostile reader may have changed both: it can only lose or repeat what was typed at it.
        writer.produced = writer.memory.load(OFFSET_PRODUCED, Ordering::Acquire);
        let claimed: u64 = writer.memory.load(OFFSET_CONSUMED, Ordering::Acquire);
        let oldest = writer.produced.saturating_sub(CAPACITY);
        writer.consumed = claimed.clamp(oldest, writer.produced);
        Ok(writer)
    }

    /// Writes as many of `bytes` as fit and returns how many. The caller rings the doorbell.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        // A hostile reader can only claim to be slower or faster; it cannot go back or overtake.
        let claimed = self.memory.load::<u64>(OFFSET_CONSUMED, Ordering::Acquire);
        if claimed > self.consumed && claimed <= self.produced {
            self.consumed = claimed;
        }
        let room = CAPACITY - (self.produced - self.consumed);
        let n = bytes.len().min(usize::try_from(room).unwrap_or(0));
        for &byte in bytes.iter().take(n) {
            let at = usize::try_from(self.produced % CAPACITY).unwrap_or(0);
            self.memory.write(OFFSET_DATA + at, byte);
            self.produced = self.produced.wrapping_add(1);
        }
        self.memory
            .store(OFFSET_PRODUCED, self.produced, Ordering::Release);
        n
    }
}

/// The reading end (device process).
#[derive(Debug)]
pub struct InputReader {
    memory: SharedMemory,
    consumed: u64,
}

impl InputReader {
    /// Maps a ring of which `position` bytes have been taken. What a slower reader has missed by more
    /// than the ring holds is lost.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd, position: u64) -> Result<Self, SharedError> {
        SharedMemory::map(fd, INPUT_RING_BYTES).map(|memory| Self::over(memory, position))
    }

    pub(crate) fn over(memory: SharedMemory, position: u64) -> Self {
        let produced = memory.load::<u64>(OFFSET_PRODUCED, Ordering::Acquire);
        let consumed = position.clamp(produced.saturating_sub(CAPACITY), produced);
        memory.store(OFFSET_CONSUMED, consumed, Ordering::Release);
        Self { memory, consumed }
    }

    /// Bytes taken so far.
    #[must_use]
    pub const fn position(&self) -> u64 {
        self.consumed
    }

    /// Copies what is there, up to the buffer's length, without taking it.
    #[must_use]
    pub fn peek(&self, buffer: &mut [u8]) -> usize {
        let produced = self.memory.load::<u64>(OFFSET_PRODUCED, Ordering::Acquire);
        let there = produced.saturating_sub(self.consumed).min(CAPACITY);
        let n = buffer.len().min(usize::try_from(there).unwrap_or(0));
        for (place, byte) in buffer.iter_mut().take(n).zip(self.consumed..) {
            let at = usize::try_from(byte % CAPACITY).unwrap_or(0);
            *place = self.memory.read(OFFSET_DATA + at);
        }
        n
    }

    /// Takes `n` bytes that [`InputReader::peek`] showed, once their effect is safe.
    pub fn take(&mut self, n: usize) {
        self.advance(n);
        self.release();
    }

    /// Takes `n` bytes, whose places the writer must not use before [`InputReader::release`].
    pub const fn advance(&mut self, n: usize) {
        self.consumed = self.consumed.saturating_add(n as u64);
    }

    /// Gives the places of everything that was taken back to the writer.
    pub fn release(&self) {
        self.memory
            .store(OFFSET_CONSUMED, self.consumed, Ordering::Release);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;
    use std::os::fd::AsFd;

    fn pair() -> (InputWriter, InputReader) {
        let fd = sealed_memfd("i", INPUT_RING_BYTES).unwrap();
        let reader = InputReader::map(fd.try_clone().unwrap(), 0).unwrap();
        (InputWriter::map(fd).unwrap(), reader)
    }

    #[test]
    fn keys_arrive_in_order_and_only_what_fits_is_taken() {
        let (mut w, mut r) = pair();
        let mut buffer = [0u8; 8192];
        for round in 0..5 {
            let keys: Vec<u8> = (0..5000u32)
                .map(|n| u8::try_from((n + round) % 256).unwrap())
                .collect();
            assert_eq!(w.write(&keys), 4096);
            assert_eq!(r.peek(&mut buffer), 4096);
            assert_eq!(buffer[..4096], keys[..4096]);
            r.take(4096);
            assert_eq!(r.peek(&mut buffer), 0);
        }
    }

    #[test]
    fn successor_reads_on_from_where_it_is_told_and_nothing_is_read_twice() {
        let (mut w, mut r) = pair();
        w.write(b"abcdef");
        r.take(4);
        let fd = r.memory.descriptor().unwrap().try_clone_to_owned().unwrap();
        assert_eq!(taken(fd.as_fd()), Ok(4));
        // The guest was given two bytes only: the other two are typed again.
        let next = InputReader::map(fd.try_clone().unwrap(), 2).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(next.peek(&mut buffer), 4);
        assert_eq!(buffer[..4], *b"cdef");
        for lie in [7, u64::MAX] {
            let next = InputReader::map(fd.try_clone().unwrap(), lie).unwrap();
            assert_eq!((next.position(), next.peek(&mut buffer)), (6, 0));
        }
    }

    #[test]
    fn hostile_reader_cannot_make_the_writer_overtake_itself() {
        let (mut w, r) = pair();
        w.write(&[1; 10]);
        for claim in [u64::MAX, 11, 4096] {
            r.memory.store(OFFSET_CONSUMED, claim, Ordering::Release);
            assert!(w.write(&[2; 4096]) <= 4096);
            assert!(w.produced - w.consumed <= CAPACITY);
        }
    }
}
