//! The compressed kernel inside a bzImage: recognised by its first bytes, unpacked as a stream.
//!
//! Doing this on the host instead of letting the guest do it matters most where guest kernel code is
//! emulated (minutes instead of a second), and saves the guest's memory from the compressed copy.
//! Input and output are bounded; the decoders allocate at most [`WINDOW_KIB_MAX`] and are dropped
//! before this module returns.

use std::fmt;
use std::io::{self, BufReader, Read};

use super::elf::Elf;
use super::elf_stream::ElfStream;
use super::error::BootError;
use super::guest::Guest;
use super::lz4_legacy::Lz4Legacy;
use super::source::Source;

/// No kernel is larger; more output is a decompression bomb.
const OUTPUT_BYTES_MAX: u64 = 512 << 20;
/// Largest dictionary or window: what `zstd --ultra -22` and `xz -9` with kernel options use.
const WINDOW_KIB_MAX: u32 = 192 << 10;
const WINDOW_BYTES_MAX: u64 = 192 << 20;
const CHUNK_BYTES: usize = 64 << 10;
/// The build appends the unpacked size to every payload; gzip has it as its own last field.
const SIZE_BYTES: u64 = size_of::<u32>() as u64;

/// The compressions that Linux offers for its own image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not compressed (`CONFIG_KERNEL_UNCOMPRESSED`).
    None,
    /// gzip.
    Gzip,
    /// xz with the x86 branch filter.
    Xz,
    /// zstd.
    Zstd,
    /// lz4 in its legacy framing.
    Lz4,
    /// bzip2.
    Bzip2,
    /// lzma ("lzma alone").
    Lzma,
}

impl fmt::Display for Compression {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::None => "none",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Bzip2 => "bzip2",
            Self::Lzma => "lzma",
        })
    }
}

/// Why the host could not unpack a payload. The guest may still be able to.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The setup header names no payload.
    #[error("the setup header has payload_length 0, expected a compressed kernel")]
    Missing,
    /// The first bytes are those of no compression that the host knows (lzo, for example).
    #[error(
        "the payload begins with {magic:02x?}, expected gzip, xz, zstd, lz4, bzip2 or lzma data"
    )]
    Unknown {
        /// The first bytes.
        magic: Vec<u8>,
    },
    /// The decoder found the data damaged, or a need for more memory than it may have.
    #[error("the {compression} payload cannot be unpacked: {source}")]
    Damaged {
        /// The compression.
        compression: Compression,
        /// What the decoder said.
        source: io::Error,
    },
    /// The payload is longer or shorter than it says at its end.
    #[error("the {compression} payload unpacks to {bytes} bytes or more, expected {expected}")]
    Size {
        /// The compression.
        compression: Compression,
        /// The size found.
        bytes: u64,
        /// The size that the payload's last four bytes say, or the limit.
        expected: u64,
    },
    /// What was unpacked is not an ELF kernel.
    #[error("the {compression} payload holds no kernel: {source}")]
    Contents {
        /// The compression.
        compression: Compression,
        /// What is wrong with it.
        source: Box<BootError>,
    },
}

/// How an attempt to unpack a payload ended. What no other way to boot the kernel would survive
/// either, such as too little memory, is a [`BootError`] instead.
#[derive(Debug)]
pub(super) enum Unpacked {
    /// The kernel is in guest memory.
    Loaded(Elf, Compression),
    /// Nothing useful is in guest memory; the claims are undone by the caller.
    Failed(PayloadError),
}

/// Unpacks the payload at `offset` into guest memory.
pub(super) fn unpack(
    source: &Source<'_>,
    offset: u64,
    length: u64,
    guest: &mut Guest<'_>,
) -> Result<Unpacked, BootError> {
    source.check(
        "the payload (payload_offset, payload_length)",
        offset,
        length,
    )?;
    let Some(data_bytes) = length.checked_sub(SIZE_BYTES).filter(|bytes| *bytes > 0) else {
        return Ok(Unpacked::Failed(PayloadError::Missing));
    };
    let mut magic = [0; 8];
    let read = source.read_up_to(offset, &mut magic)?;
    let magic = magic.get(..read).unwrap_or_default();
    let Some(compression) = recognise(magic) else {
        return Ok(Unpacked::Failed(PayloadError::Unknown {
            magic: magic.to_vec(),
        }));
    };
    let mut size = [0; size_of::<u32>()];
    source.read_up_to(offset + data_bytes, &mut size)?;
    let expected = u64::from(u32::from_le_bytes(size));
    // The size field is no part of the data, but for gzip it is, and the uncompressed form has none.
    let data_bytes = match compression {
        Compression::Gzip | Compression::None => length,
        _ => data_bytes,
    };
    let expected = if compression == Compression::None {
        length
    } else {
        expected
    };
    if expected > OUTPUT_BYTES_MAX {
        let (bytes, expected) = (expected, OUTPUT_BYTES_MAX);
        return Ok(Unpacked::Failed(PayloadError::Size {
            compression,
            bytes,
            expected,
        }));
    }
    let reader = PayloadReader {
        source,
        position: offset,
        left: data_bytes,
    };
    let reader = BufReader::with_capacity(CHUNK_BYTES, reader);
    pump(reader, compression, expected, guest)
}

/// The compression that data beginning with `magic` has.
pub(super) fn recognise(magic: &[u8]) -> Option<Compression> {
    const TABLE: [(&[u8], Compression); 7] = [
        (&[0x1f, 0x8b], Compression::Gzip),
        (&[0xfd, b'7', b'z', b'X', b'Z', 0], Compression::Xz),
        (&[0x28, 0xb5, 0x2f, 0xfd], Compression::Zstd),
        (&[0x02, 0x21, 0x4c, 0x18], Compression::Lz4),
        (b"BZh", Compression::Bzip2),
        (&[0x5d, 0, 0], Compression::Lzma),
        (b"\x7fELF", Compression::None),
    ];
    TABLE
        .iter()
        .find(|(start, _)| magic.starts_with(start))
        .map(|(_, compression)| *compression)
}

fn pump(
    reader: BufReader<PayloadReader<'_>>,
    compression: Compression,
    expected: u64,
    guest: &mut Guest<'_>,
) -> Result<Unpacked, BootError> {
    let damaged = |source| {
        Unpacked::Failed(PayloadError::Damaged {
            compression,
            source,
        })
    };
    let mut decoder = match decoder(reader, compression) {
        Ok(decoder) => decoder,
        Err(error) => return Ok(damaged(error)),
    };
    let mut stream = ElfStream::new(guest);
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut total = 0u64;
    loop {
        let read = match decoder.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Ok(damaged(error)),
        };
        total = total.saturating_add(read as u64);
        if total > expected {
            let bytes = total;
            return Ok(Unpacked::Failed(PayloadError::Size {
                compression,
                bytes,
                expected,
            }));
        }
        if let Err(error) = stream.push(chunk.get(..read).unwrap_or_default()) {
            return contents(error, compression);
        }
    }
    if total != expected {
        let bytes = total;
        return Ok(Unpacked::Failed(PayloadError::Size {
            compression,
            bytes,
            expected,
        }));
    }
    match stream.finish() {
        Ok(elf) => Ok(Unpacked::Loaded(elf, compression)),
        Err(error) => contents(error, compression),
    }
}

/// A kernel that does not fit into memory fails for good, a strange one is left to the guest.
fn contents(error: BootError, compression: Compression) -> Result<Unpacked, BootError> {
    match error {
        BootError::OutsideMemory { .. } | BootError::Unbacked { .. } => Err(error),
        other => {
            let source = Box::new(other);
            Ok(Unpacked::Failed(PayloadError::Contents {
                compression,
                source,
            }))
        }
    }
}

fn decoder<'r, R: io::BufRead + 'r>(
    reader: R,
    compression: Compression,
) -> io::Result<Box<dyn Read + 'r>> {
    Ok(match compression {
        Compression::None => Box::new(reader),
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(reader)),
        Compression::Xz => Box::new(lzma_rust2::XzReader::new_mem_limit(
            reader,
            false,
            WINDOW_KIB_MAX,
        )),
        Compression::Zstd => Box::new(
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(reader, WINDOW_BYTES_MAX)
                .map_err(io::Error::other)?,
        ),
        Compression::Lz4 => Box::new(Lz4Legacy::new(reader)?),
        Compression::Bzip2 => Box::new(bzip2_rs::DecoderReader::new(reader)),
        Compression::Lzma => Box::new(lzma_rust2::LzmaReader::new_mem_limit(
            reader,
            WINDOW_KIB_MAX,
            None,
        )?),
    })
}

/// The payload's bytes and no others.
struct PayloadReader<'a> {
    source: &'a Source<'a>,
    position: u64,
    left: u64,
}

impl Read for PayloadReader<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = bytes
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let Some(bytes) = bytes.get_mut(..count) else {
            return Ok(0);
        };
        let read = self
            .source
            .read_up_to(self.position, bytes)
            .map_err(io::Error::other)?;
        self.position += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}
