//! Random numbers of the host's kernel.

use std::fs::File;
use std::io::{self, Read};

/// Bytes that nobody can guess.
///
/// # Errors
/// When there is no `/dev/urandom`.
pub(crate) fn bytes<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}
