//! VM files: TOML in, a checked [`crate::vm::spec::VmSpec`] out, or errors that name file, line,
//! column, key, value and what was expected.
//!
//! The way: [`parse`] (text to draft, pure) → options laid over it ([`Draft::or`]) → [`check()`]
//! (draft to specification, looking at this host and the files named) → [`print()`] for the way
//! back. Nothing here starts a process or opens a file that a machine names. Called by the command
//! line.

mod check;
mod draft;
mod host;
mod nearest;
#[cfg(test)]
mod net_tests;
mod parse;
mod print;
mod problem;
mod quantity;
mod section;
#[cfg(test)]
mod tests;

pub use check::{Surroundings, check, is_name};
pub use draft::{Draft, DraftCloudInit, DraftDisk, DraftLimits, DraftNet, DraftShare, DraftVsock};
pub use host::{HostMemory, meminfo_bytes};
pub use nearest::nearest;
pub use parse::{FILE_BYTES_MAX, parse, parse_console_size, parse_format, parse_owner};
pub use print::{PrintError, json_schema, print};
pub use problem::{Located, Place, Problem, Problems};
pub use quantity::{QuantityError, parse_duration, parse_size, show_size};

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Reads and parses the VM file at `path`.
///
/// # Errors
/// Everything that is wrong with it; a file that cannot be read is one problem.
pub fn load(path: &Path) -> Result<Draft, Problems> {
    let file = path.display().to_string();
    let unreadable = |error: &io::Error| {
        Problems(vec![Problem {
            place: Place::File {
                file: file.clone(),
                line: 1,
                column: 1,
                key: String::new(),
                value: String::new(),
            },
            expectation: format!("expected a readable VM file: {error}"),
        }])
    };
    let text = read_bounded(path).map_err(|e| unreadable(&e))?;
    let absolute = std::path::absolute(path).map_err(|e| unreadable(&e))?;
    let directory = absolute.parent().unwrap_or_else(|| Path::new("/"));
    parse(&file, directory, &text)
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let kind = std::fs::metadata(path)?;
    if kind.is_dir() {
        return Err(io::Error::other("it is a directory"));
    }
    let mut text = String::new();
    File::open(path)?
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        let limit = show_size(FILE_BYTES_MAX);
        return Err(io::Error::other(format!("it is larger than {limit}")));
    }
    Ok(text)
}
