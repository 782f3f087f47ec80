//! Console output: a bounded ring file on disk that one device process writes and any number of
//! readers follow.
//!
//! ```text
//! 0      magic "BHRING1\0"
//! 8      capacity in bytes, u64 little endian
//! 16     head: bytes ever written, u64 little endian
//! 4096   data; stream byte n is at 4096 + n % capacity
//! ```
//!
//! Writing bytes at a position twice is harmless: that is what makes console output replayable.
//! A reader that is too slow loses the oldest bytes and learns how many; it never holds up a writer.
//! The file is written by a process that its guest may have taken over, so readers check it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes before the data.
pub const HEADER_BYTES: u64 = 4096;
/// Capacity of a console's ring unless the VM file says otherwise (1 MiB).
pub const CAPACITY_BYTES_DEFAULT: u64 = 1 << 20;
const MAGIC: [u8; 8] = *b"BHRING1\0";
const OFFSET_HEAD: u64 = 16;

/// Makes `file` an empty ring of `capacity` data bytes.
///
/// # Errors
/// The file system's error.
pub fn create(file: &File, capacity: u64) -> io::Result<()> {
    file.set_len(0)?;
    file.set_len(HEADER_BYTES + capacity)?;
    file.write_all_at(&capacity.to_le_bytes(), 8)?;
    file.write_all_at(&MAGIC, 0)
}

/// Bytes that were ever written to the ring in `file`, as its header claims.
///
/// # Errors
/// The file system's error.
pub fn head(file: &File) -> io::Result<u64> {
    read_u64(file, OFFSET_HEAD)
}

fn read_u64(file: &File, at: u64) -> io::Result<u64> {
    let mut bytes = [0u8; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_le_bytes(bytes))
}

/// The writing end. Its owner's policy allows `pwrite64` on this file and nothing else.
#[derive(Debug)]
pub struct OutputRing {
    file: File,
    capacity: u64,
    head: u64,
}

impl OutputRing {
    /// Takes over a ring of known `capacity` in which everything before `head` is stored, without reading
    /// it: a dead process may have written anything there.
    #[must_use]
    pub const fn new(file: File, capacity: u64, head: u64) -> Self {
        Self {
            file,
            capacity,
            head,
        }
    }

    /// Bytes written so far.
    #[must_use]
    pub const fn head(&self) -> u64 {
        self.head
    }

    /// Puts `bytes` at stream position `position`. Of more than the capacity only the end is kept.
    ///
    /// # Errors
    /// The file system's error (disk full); the stream then has a hole.
    pub fn write_at(&mut self, position: u64, bytes: &[u8]) -> io::Result<()> {
        let end = position.saturating_add(bytes.len() as u64);
        let kept = bytes
            .len()
            .min(usize::try_from(self.capacity).unwrap_or(usize::MAX));
        let (_, mut rest) = bytes.split_at(bytes.len() - kept);
        let mut at = end - kept as u64;
        while !rest.is_empty() {
            let place = at % self.capacity;
            let room = usize::try_from(self.capacity - place).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at(rest.len().min(room));
            self.file.write_all_at(now, HEADER_BYTES + place)?;
            at += now.len() as u64;
            rest = later;
        }
        if end > self.head {
            self.head = end;
            self.file.write_all_at(&end.to_le_bytes(), OFFSET_HEAD)?;
        }
        Ok(())
    }
}

/// A reading end.
#[derive(Debug)]
pub struct OutputReader {
    file: File,
    capacity: u64,
    next: u64,
}

/// What a reader got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Got {
    /// Bytes read into the buffer.
    pub bytes: usize,
    /// Bytes before them that were overwritten before they could be read.
    pub lost: u64,
}

impl OutputReader {
    /// Opens a ring for reading from its oldest byte.
    ///
    /// # Errors
    /// `InvalidData` when the file is no ring.
    pub fn new(file: File) -> io::Result<Self> {
        let mut magic = [0u8; 8];
        file.read_exact_at(&mut magic, 0)?;
        let capacity = read_u64(&file, 8)?;
        let len = file.metadata()?.len();
        if magic != MAGIC || capacity == 0 || Some(len) != capacity.checked_add(HEADER_BYTES) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not a console ring file",
            ));
        }
        let head = read_u64(&file, OFFSET_HEAD)?;
        Ok(Self {
            file,
            capacity,
            next: head.saturating_sub(capacity),
        })
    }

    /// Goes to the end, so that only new output is read.
    ///
    /// # Errors
    /// The file system's error.
    pub fn seek_to_end(&mut self) -> io::Result<()> {
        self.next = read_u64(&self.file, OFFSET_HEAD)?.max(self.next);
        Ok(())
    }

    /// Reads what is there, up to the buffer's length. Zero bytes mean that nothing is new.
    ///
    /// # Errors
    /// The file system's error.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<Got> {
        let head = read_u64(&self.file, OFFSET_HEAD)?;
        let oldest = head.saturating_sub(self.capacity);
        let from = self.next.max(oldest);
        let lost = from - self.next;
        let there = head.saturating_sub(from);
        let place = from % self.capacity;
        let run = there.min(self.capacity - place);
        let len = buffer.len().min(usize::try_from(run).unwrap_or(usize::MAX));
        let Some(target) = buffer.get_mut(..len) else {
            return Ok(Got { bytes: 0, lost });
        };
        self.file.read_exact_at(target, HEADER_BYTES + place)?;
        // What was overwritten while it was being read is lost, not garbled.
        let head = read_u64(&self.file, OFFSET_HEAD)?;
        if head.saturating_sub(self.capacity) > from {
            return Ok(Got { bytes: 0, lost });
        }
        self.next = from + len as u64;
        Ok(Got { bytes: len, lost })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;

    fn memfile() -> File {
        let name = "ring";
        let fd: OwnedFd =
            nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).unwrap();
        File::from(fd)
    }

    fn ring(capacity: u64) -> (OutputRing, OutputReader) {
        let file = memfile();
        create(&file, capacity).unwrap();
        let reader = OutputReader::new(file.try_clone().unwrap()).unwrap();
        (OutputRing::new(file, capacity, 0), reader)
    }

    fn all(reader: &mut OutputReader) -> (Vec<u8>, u64) {
        let (mut out, mut lost, mut buffer) = (Vec::new(), 0, [0u8; 7]);
        loop {
            let got = reader.read(&mut buffer).unwrap();
            out.extend_from_slice(&buffer[..got.bytes]);
            lost += got.lost;
            if got.bytes == 0 {
                return (out, lost);
            }
        }
    }

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let (mut w, mut r) = ring(64);
        w.write_at(0, b"hello ").unwrap();
        w.write_at(6, b"world").unwrap();
        assert_eq!(all(&mut r), (b"hello world".to_vec(), 0));
        w.write_at(6, b"world").unwrap();
        assert_eq!(all(&mut r), (vec![], 0), "a replayed write adds nothing");
    }

    #[test]
    fn successor_repeats_what_may_be_missing_and_nothing_is_read_twice() {
        let (mut w, mut r) = ring(64);
        w.write_at(0, b"first ").unwrap();
        w.write_at(6, b"second ").unwrap();
        assert_eq!(all(&mut r), (b"first second ".to_vec(), 0));
        // All that is known to be stored is the first word.
        let mut w = OutputRing::new(w.file, 64, 6);
        w.write_at(6, b"sec").unwrap();
        assert_eq!(all(&mut r), (vec![], 0));
        w.write_at(9, b"ond ").unwrap();
        w.write_at(13, b"third").unwrap();
        assert_eq!(all(&mut r), (b"third".to_vec(), 0));
    }

    #[test]
    fn slow_reader_loses_the_oldest_and_is_told() {
        let (mut w, mut r) = ring(16);
        let text: Vec<u8> = (0..100).collect();
        for (n, chunk) in text.chunks(9).enumerate() {
            w.write_at(n as u64 * 9, chunk).unwrap();
        }
        let (out, lost) = all(&mut r);
        assert_eq!((out.as_slice(), lost), (&text[84..], 84));
    }

    #[test]
    fn write_larger_than_the_ring_keeps_its_end() {
        let (mut w, mut r) = ring(16);
        let text: Vec<u8> = (0..50).collect();
        w.write_at(0, &text).unwrap();
        assert_eq!(all(&mut r), (text[34..].to_vec(), 34));
    }

    #[test]
    fn other_files_are_refused() {
        let file = memfile();
        assert!(OutputReader::new(file.try_clone().unwrap()).is_err());
        create(&file, 64).unwrap();
        file.write_all_at(&u64::MAX.to_le_bytes(), 8).unwrap();
        assert!(OutputReader::new(file).is_err());
    }

    #[test]
    fn head_that_runs_backwards_yields_nothing() {
        let (mut w, mut r) = ring(16);
        w.write_at(0, b"0123456789").unwrap();
        all(&mut r);
        w.file
            .write_all_at(&3u64.to_le_bytes(), OFFSET_HEAD)
            .unwrap();
        assert_eq!(all(&mut r), (vec![], 0));
    }
}
