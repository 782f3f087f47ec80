//! Freezing of file systems, so that what is on a guest's disks fits together while they are copied.
//!
//! A frozen file system stops whoever writes to it, the agent included, and nobody but its freezer knows that
//! it is frozen. So a process of its own does it, the *guard*, which thaws again when it is told to, when the
//! time is over, and when the agent is gone, whatever it has died of.
//!
//! ```text
//!   agent ── freeze-guard MS ──► guard: freezes, says what, waits
//!     │  "FROZEN /mnt\n" … "\n" ◄───┤
//!     │  (closes its end)      ────►│  or the time is over
//!     │  "3\n"                 ◄────┘  thawed so many, ends
//! ```
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::{stats, sys};
use crate::wire::poll_timeout;
use bulkhead_ipc::protocol::agent::{
    FREEZE_MS_MAX, Failure, FailureKind, Frozen, LIST_MAX, text_of,
};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The argument that makes this program a guard.
pub const GUARD: &str = "freeze-guard";
/// Longest that the kernel may take to write out what it has in memory, and to thaw.
const PATIENCE: Duration = Duration::from_secs(120);
/// A thread that only waits.
const STACK_BYTES: usize = 64 << 10;
/// Most that a guard says.
const SAID_BYTES_MAX: u64 = 256 << 10;

/// The guard, while file systems are frozen.
struct Guard {
    child: Child,
    /// Closed to have it thaw.
    leash: Option<ChildStdin>,
    said: Said,
}

type Said = BufReader<io::Take<ChildStdout>>;

static GUARDS: Mutex<Option<Guard>> = Mutex::new(None);

fn broken(doing: &str, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Other, format!("{doing}: {error}"))
}

/// Freezes the file systems of disks.
pub(super) fn freeze(timeout_ms: u32) -> Result<Vec<Frozen>, Failure> {
    if !(1..=FREEZE_MS_MAX).contains(&timeout_ms) {
        let text = format!("expected a time-out of 1 to {FREEZE_MS_MAX} ms");
        return Err(Failure::new(FailureKind::Invalid, text));
    }
    let mut guards = GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(guard) = guards.as_mut() {
        match guard.child.try_wait() {
            Ok(Some(_)) => *guards = None,
            _ => {
                let text = "file systems are frozen already";
                return Err(Failure::new(FailureKind::Busy, text));
            }
        }
    }
    #[expect(clippy::disallowed_methods, reason = "the guard is this program again")]
    let mut command = Command::new("/proc/self/exe");
    command.args([GUARD, &timeout_ms.to_string()]).env_clear();
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command
        .spawn()
        .map_err(|e| broken("starting a guard for frozen file systems", &e))?;
    let leash = child.stdin.take();
    let said = child
        .stdout
        .take()
        .ok_or_else(|| Failure::new(FailureKind::Other, "a guard without a voice"))?;
    let mut guard = Guard {
        child,
        leash,
        said: BufReader::new(said.take(SAID_BYTES_MAX)),
    };
    // It says everything at once.
    let frozen = match answers(&guard.said) {
        true => hear(&mut guard.said),
        false => Err(io::ErrorKind::TimedOut.into()),
    };
    *guards = Some(guard);
    match frozen {
        Ok(frozen) if frozen.iter().any(|one| one.refused.is_none()) => Ok(frozen),
        Ok(frozen) => {
            let first = frozen.into_iter().next();
            let why = first.and_then(|one| Some(format!("{}: {}", one.mount_point, one.refused?)));
            let why = why.unwrap_or_else(|| "there is no file system of a disk".to_owned());
            release(&mut guards);
            Err(Failure::new(FailureKind::Unsupported, why))
        }
        Err(error) => {
            release(&mut guards);
            Err(broken("freezing file systems", &error))
        }
    }
}

/// Thaws what [`freeze`] has frozen.
pub(super) fn thaw() -> Result<u32, Failure> {
    let mut guards = GUARDS.lock().unwrap_or_else(PoisonError::into_inner);
    release(&mut guards).ok_or_else(|| {
        let text = "the guard of the frozen file systems does not answer";
        Failure::new(FailureKind::Other, text)
    })
}

/// Lets the guard thaw. Says of how many file systems it says that, or nothing if it says nothing.
fn release(guards: &mut Option<Guard>) -> Option<u32> {
    let Some(mut guard) = guards.take() else {
        return Some(0);
    };
    let by_itself = matches!(guard.child.try_wait(), Ok(Some(_)));
    drop(guard.leash.take());
    let mut line = String::new();
    let said = answers(&guard.said) && guard.said.read_line(&mut line).is_ok();
    // One that is stuck in the kernel thaws as soon as it is not; killed it never would.
    let waiter = std::thread::Builder::new().stack_size(STACK_BYTES);
    let _waited = waiter.spawn(move || guard.child.wait());
    if by_itself {
        return Some(0);
    }
    line.trim().parse().ok().filter(|_| said)
}

/// Whether a guard says something in time.
fn answers(said: &Said) -> bool {
    if !said.buffer().is_empty() {
        return true;
    }
    let mut fds = [PollFd::new(
        said.get_ref().get_ref().as_fd(),
        PollFlags::POLLIN,
    )];
    poll(&mut fds, poll_timeout(PATIENCE)).is_ok_and(|n| n > 0)
}

/// Reads what a guard has frozen: a line each, and an empty one.
fn hear(said: &mut impl BufRead) -> io::Result<Vec<Frozen>> {
    let mut frozen = Vec::new();
    loop {
        let mut line = String::new();
        if said.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let line = line.trim_end_matches('\n');
        if line.is_empty() {
            return Ok(frozen);
        }
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let (refused, mount_point) = match word {
            "FROZEN" => (None, rest),
            _ => {
                let (why, mount_point) = rest.split_once('\t').unwrap_or(("", rest));
                (Some(text_of(why)), mount_point)
            }
        };
        if frozen.len() < LIST_MAX {
            frozen.push(Frozen {
                mount_point: text_of(mount_point),
                refused,
            });
        }
    }
}

/// The guard: freezes, waits, thaws.
#[must_use]
pub fn guard(timeout_ms: u32) -> ExitCode {
    // Whoever ends services ends the agent as well, and that is what the guard waits for.
    let all = SigSet::all();
    let _kept = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&all), None);
    let until = Instant::now() + Duration::from_millis(timeout_ms.into());
    let mut frozen = Vec::new();
    let mut report = String::new();
    // What is mounted last first, for it may lie on what is mounted before.
    for mount in stats::mounts().iter().rev() {
        // The report has a line for each.
        let shown = mount.point.replace(['\n', '\t'], "?");
        let done = open(&mount.point).and_then(|folder| {
            sys::freeze(&folder)?;
            frozen.push(folder);
            Ok(())
        });
        let line = match done {
            Ok(()) => format!("FROZEN {shown}\n"),
            // Frozen already, by whoever; or mounted twice.
            Err(Errno::EBUSY) => format!("REFUSED frozen already\t{shown}\n"),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => {
                format!("REFUSED its kind cannot be frozen\t{shown}\n")
            }
            Err(errno) => format!("REFUSED {}\t{shown}\n", errno.desc()),
        };
        report.push_str(&line);
    }
    report.push('\n');
    let mut out = io::stdout();
    let told = out.write_all(report.as_bytes()).and_then(|()| out.flush());
    if told.is_ok() {
        wait_for_end(until);
    }
    let thawed = frozen
        .iter()
        .rev()
        .filter(|folder| sys::thaw(folder).is_ok());
    let count = thawed.count();
    // The agent may be gone.
    let _unheard = writeln!(out, "{count}");
    ExitCode::SUCCESS
}

/// Waits until nobody holds the other end of standard input, or the time is over.
fn wait_for_end(until: Instant) {
    let stdin = io::stdin();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, poll_timeout(left)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return,
        }
    }
}

fn open(path: &str) -> nix::Result<File> {
    File::open(path).map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guards_report_is_read() {
        let report = "FROZEN /mnt data\nREFUSED its kind cannot be frozen\t/boot\n\nnot read\n";
        let frozen = hear(&mut report.as_bytes()).unwrap();
        assert_eq!(frozen.len(), 2);
        assert_eq!(frozen[0].mount_point, "/mnt data");
        assert_eq!(frozen[0].refused, None);
        assert_eq!(frozen[1].mount_point, "/boot");
        assert_eq!(
            frozen[1].refused.as_deref(),
            Some("its kind cannot be frozen")
        );
        assert!(hear(&mut "FROZEN /\n".as_bytes()).is_err());
    }

    #[test]
    fn no_time_and_too_much_of_it_are_refused() {
        for wrong in [0, FREEZE_MS_MAX + 1, u32::MAX] {
            assert_eq!(freeze(wrong).unwrap_err().kind, FailureKind::Invalid);
        }
    }
}
