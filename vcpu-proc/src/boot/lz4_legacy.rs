//! The legacy framing of lz4, which Linux uses for its own image: a magic number, then blocks of
//! at most 8 MiB, each behind its compressed length.

use std::io::{self, Read};

const MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
const BLOCK_BYTES: usize = 8 << 20;
/// lz4's own bound for a block that does not compress.
const COMPRESSED_BYTES_MAX: usize = BLOCK_BYTES + BLOCK_BYTES / 255 + 16;

/// Unpacks block by block.
pub(super) struct Lz4Legacy<R> {
    inner: R,
    compressed: Vec<u8>,
    block: Vec<u8>,
    filled: usize,
    taken: usize,
}

impl<R: Read> Lz4Legacy<R> {
    /// Takes the magic number from `inner`.
    pub(super) fn new(mut inner: R) -> io::Result<Self> {
        let mut magic = [0; MAGIC.len()];
        inner.read_exact(&mut magic)?;
        if magic != MAGIC {
            return Err(invalid("no legacy lz4 magic"));
        }
        Ok(Self {
            inner,
            compressed: Vec::new(),
            block: vec![0; BLOCK_BYTES],
            filled: 0,
            taken: 0,
        })
    }

    /// Unpacks the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        loop {
            let mut length = [0; 4];
            if !read_whole(&mut self.inner, &mut length)? {
                return Ok(false);
            }
            if length == MAGIC {
                continue; // Another frame may follow.
            }
            let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
            if length == 0 {
                return Ok(false);
            }
            if length > COMPRESSED_BYTES_MAX {
                return Err(invalid("an lz4 block is larger than 8 MiB"));
            }
            self.compressed.resize(length, 0);
            self.inner.read_exact(&mut self.compressed)?;
            self.filled = lz4_flex::block::decompress_into(&self.compressed, &mut self.block)
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
            self.taken = 0;
            return Ok(true);
        }
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.filled {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let rest = self.block.get(self.taken..self.filled).unwrap_or_default();
        let count = rest.len().min(bytes.len());
        if let (Some(to), Some(from)) = (bytes.get_mut(..count), rest.get(..count)) {
            to.copy_from_slice(from);
        }
        self.taken += count;
        Ok(count)
    }
}

/// Fills `bytes`, or returns false when the input ends before the first byte.
fn read_whole(inner: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match inner.read(rest) {
            Ok(0) if done == 0 => return Ok(false),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

fn invalid(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message)
}
