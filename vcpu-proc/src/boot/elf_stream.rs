//! An ELF kernel that arrives as a stream, decompressed on the fly, and goes straight to its place.
//!
//! No copy of the whole kernel ever exists: the headers are gathered, checked like those of a file,
//! and each later byte is written where its segment wants it. Pages of zeros are left out, because
//! guest memory is zero already; half of a distribution kernel is such pages.

use super::elf::{self, Elf};
use super::error::BootError;
use super::guest::Guest;

/// Headers must lie within so many bytes of the start; linkers put them right there.
const HEAD_BYTES_MAX: usize = 0x1_0000;

/// The file bytes of one segment and where they go.
#[derive(Debug)]
struct Piece {
    start: u64,
    end: u64,
    address: u64,
}

/// Receives a kernel from its first byte to its last.
#[derive(Debug)]
pub(super) struct ElfStream<'g, 'm> {
    guest: &'g mut Guest<'m>,
    head: Vec<u8>,
    elf: Option<Elf>,
    pieces: Vec<Piece>,
    position: u64,
}

impl<'g, 'm> ElfStream<'g, 'm> {
    pub(super) fn new(guest: &'g mut Guest<'m>) -> Self {
        Self {
            guest,
            head: Vec::new(),
            elf: None,
            pieces: Vec::new(),
            position: 0,
        }
    }

    /// Takes the next bytes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<(), BootError> {
        if self.elf.is_some() {
            return self.distribute(bytes);
        }
        self.head.extend_from_slice(bytes);
        if self.parse_head()? {
            let head = std::mem::take(&mut self.head);
            return self.distribute(&head);
        }
        Ok(())
    }

    /// Ends the stream; every segment must have been complete.
    pub(super) fn finish(self) -> Result<Elf, BootError> {
        let length = self.position;
        let Some(elf) = self.elf else {
            let bytes = self.head.len() as u64;
            return Err(BootError::field(
                "kernel payload: bytes",
                bytes,
                "an ELF kernel",
            ));
        };
        match self.pieces.iter().find(|piece| piece.end > length) {
            None => Ok(elf),
            Some(piece) => Err(BootError::Truncated {
                what: "kernel payload",
                field: "an ELF segment (p_offset, p_filesz)",
                offset: piece.start,
                bytes: piece.end - piece.start,
                length,
            }),
        }
    }

    /// Parses the headers once enough bytes are there and claims the segments' memory.
    fn parse_head(&mut self) -> Result<bool, BootError> {
        if self.head.len() < elf::HEADER_BYTES {
            return Ok(false);
        }
        if !self.head.starts_with(&elf::MAGIC) {
            return Err(BootError::NotAKernel {
                recognised: "a bzImage whose payload is not an ELF file".into(),
            });
        }
        let header = elf::Header::parse(&self.head)?;
        let (offset, bytes) = header.table();
        let range = usize::try_from(offset)
            .ok()
            .and_then(|start| Some((start, start.checked_add(bytes)?)))
            .filter(|(_, end)| *end <= HEAD_BYTES_MAX);
        let Some((start, end)) = range else {
            let expected = format!("a table that ends within the first {HEAD_BYTES_MAX:#x} bytes");
            return Err(BootError::field("ELF header: e_phoff", offset, expected));
        };
        let Some(table) = self.head.get(start..end) else {
            return Ok(false);
        };
        let elf = Elf::parse(header, table)?;
        for segment in elf.load_segments() {
            let Some(end) = segment.offset.checked_add(segment.file_bytes) else {
                let expected = "a range of the file";
                return Err(BootError::field(
                    "ELF segment: p_offset",
                    segment.offset,
                    expected,
                ));
            };
            self.pieces.push(Piece {
                start: segment.offset,
                end,
                address: segment.address,
            });
        }
        elf.claim(self.guest)?;
        self.elf = Some(elf);
        Ok(true)
    }

    fn distribute(&mut self, bytes: &[u8]) -> Result<(), BootError> {
        let (from, to) = (
            self.position,
            self.position.saturating_add(bytes.len() as u64),
        );
        for piece in &self.pieces {
            let (start, end) = (piece.start.max(from), piece.end.min(to));
            if start >= end {
                continue;
            }
            let part = usize::try_from(start - from)
                .ok()
                .zip(usize::try_from(end - from).ok())
                .and_then(|(start, end)| bytes.get(start..end));
            if let Some(part) = part {
                self.guest
                    .write_sparse(piece.address + (start - piece.start), part)?;
            }
        }
        self.position = to;
        Ok(())
    }
}
