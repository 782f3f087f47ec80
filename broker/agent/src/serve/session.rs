//! One connection: a handshake, one question, and what it leads to.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{exec, freeze, identity, log, power, stats};
use crate::copy::{self, CopyError, GuestEnd};
use crate::tree::{Limits, Plant, TreeError, Walk};
use crate::wire::{HELLO_TIMEOUT, Wire, WireError};
use bulkhead_ipc::protocol::agent::{Ask, Copied, Entry, Failure, FailureKind, FromAgent, ToAgent};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long the host has to hang up after the last answer.
const LINGER: Duration = Duration::from_secs(10);

/// Serves a connection to its end. Outside of a guest (`in_guest`) nothing is done that its machine as a
/// whole would notice.
pub(super) fn run(stream: UnixStream, in_guest: bool) {
    match Wire::new(stream).map_err(WireError::Os) {
        Ok(wire) => {
            if let Err(error) = talk(wire, in_guest) {
                log(&format!("a connection: {error}"));
            }
        }
        Err(error) => log(&format!("a connection: {error}")),
    }
}

fn talk(mut wire: Wire, in_guest: bool) -> Result<(), WireError> {
    wire.shake_hands()?;
    let ask = match wire.receive(HELLO_TIMEOUT)? {
        ToAgent::Ask(ask) => ask,
        _ => {
            return fail(
                wire,
                Failure::new(FailureKind::Invalid, "expected a question"),
            );
        }
    };
    let of_machine = matches!(
        ask,
        Ask::Freeze { .. } | Ask::Thaw | Ask::Power { .. } | Ask::Reidentify(_)
    );
    if of_machine && !in_guest {
        let text = "this agent does not run in a guest: it listens on a Unix socket";
        return fail(wire, Failure::new(FailureKind::Unsupported, text));
    }
    let answer = match ask {
        Ask::Exec(exec) => return exec::run(wire, exec),
        Ask::Put { path, name } => {
            let done = put(&mut wire, &path, &name);
            return copied(wire, done);
        }
        Ask::Get { path, recursive } => {
            let done = get(&mut wire, &path, recursive);
            return copied(wire, done);
        }
        Ask::Ping => FromAgent::Pong {
            agent: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: stats::line("/proc/sys/kernel/random/boot_id"),
        },
        Ask::Freeze { timeout_ms } => match freeze::freeze(timeout_ms) {
            Ok(frozen) => FromAgent::Frozen(frozen),
            Err(failure) => FromAgent::Failed(failure),
        },
        Ask::Thaw => match freeze::thaw() {
            Ok(count) => FromAgent::Thawed(count),
            Err(failure) => FromAgent::Failed(failure),
        },
        Ask::Power { how, force } => {
            // Said first: there may be nobody left to say it afterwards.
            if force {
                wire.send(&FromAgent::Done)?;
            }
            match power::end(how, force) {
                Ok(()) => FromAgent::Done,
                Err(failure) => FromAgent::Failed(failure),
            }
        }
        Ask::Stats => FromAgent::Stats(Box::new(stats::stats())),
        Ask::Reidentify(wish) => FromAgent::Reidentified(identity::reidentify(wish)),
    };
    wire.send(&answer)?;
    wire.linger(LINGER);
    Ok(())
}

fn fail(mut wire: Wire, failure: Failure) -> Result<(), WireError> {
    wire.send(&FromAgent::Failed(failure))?;
    wire.linger(LINGER);
    Ok(())
}

fn copied(mut wire: Wire, done: Result<Copied, CopyError>) -> Result<(), WireError> {
    match done {
        Ok(copied) => wire.send(&FromAgent::Copied(copied))?,
        Err(CopyError::Wire(error)) => return Err(error),
        Err(error) => match error.to_tell() {
            Some(failure) => return fail(wire, failure),
            None => return Ok(()),
        },
    }
    wire.linger(LINGER);
    Ok(())
}

fn path_of(path: &[u8]) -> Result<&Path, CopyError> {
    if path.is_empty() || path.contains(&0) {
        let shown = String::from_utf8_lossy(path).into_owned();
        return Err(CopyError::Tree(TreeError::Name(shown)));
    }
    Ok(Path::new(OsStr::from_bytes(path)))
}

fn put(wire: &mut Wire, path: &[u8], name: &[u8]) -> Result<Copied, CopyError> {
    let plant = Plant::new(path_of(path)?, name, Limits::default())?;
    copy::receive::<GuestEnd>(wire, plant, |_| ())
}

fn get(wire: &mut Wire, path: &[u8], recursive: bool) -> Result<Copied, CopyError> {
    let mut walk = Walk::new(path_of(path)?, recursive)?;
    let mut sent = Copied::default();
    copy::send::<GuestEnd>(wire, &mut walk, |entry| match entry {
        Entry::Folder { .. } => sent.folders += 1,
        Entry::FileEnd => sent.files += 1,
        Entry::Data(bytes) => sent.bytes += u64::try_from(bytes.len()).unwrap_or(0),
        Entry::Skipped { .. } => sent.skipped += 1,
        Entry::File { .. } | Entry::Leave => {}
    })?;
    Ok(sent)
}
