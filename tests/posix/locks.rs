//! Locks, between open files and between processes.

use crate::place::{Check, Failure, Outcome, Place, fails, ok, open, same, want};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::{FlockOperation, OFlags, fcntl_lock, flock, unlink};
use rustix::io::Errno;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};

pub(crate) const CHECKS: &[(&str, Check)] = &[
    ("whole_files_are_locked", whole),
    (
        "locks_of_whole_files_end_with_the_last_descriptor",
        whole_ends,
    ),
    ("ranges_are_locked", ranges),
    ("ranges_are_joined_and_split", split),
    ("locks_are_of_the_file_and_not_of_its_name", names),
    ("processes_lock_each_other_out", processes),
];

/// Started as `posix-suite lock FILE`, says how locks of the whole file are refused: in turn flock's and fcntl's.
pub(crate) const PROBE: &str = "lock";
/// Started so, it waits for the end of its input.
const HOLD: &str = "-";

#[expect(
    clippy::disallowed_methods,
    reason = "a test's program, which starts itself"
)]
fn command(program: &Path, file: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg(PROBE).arg(file);
    command
}

/// Starts a copy of this program, which runs as long as its input is open.
pub(crate) fn start_holder(program: &Path) -> std::io::Result<Child> {
    let mut holder = command(program, Path::new(HOLD));
    holder.stdin(Stdio::piped()).spawn()
}

pub(crate) fn probe(file: &Path) -> ExitCode {
    if file == Path::new(HOLD) {
        let done = std::io::stdin().read_to_end(&mut Vec::new());
        return ExitCode::from(u8::from(done.is_err()));
    }
    let Ok(file) = open(file, OFlags::RDWR) else {
        return ExitCode::FAILURE;
    };
    let by_flock = flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    let by_fcntl = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
    println!("refused {} {}", u8::from(by_flock), u8::from(by_fcntl));
    ExitCode::SUCCESS
}

fn whole(p: &Place) -> Outcome {
    use FlockOperation::{NonBlockingLockExclusive, NonBlockingLockShared, Unlock};
    let f = p.file("f", b"")?;
    let (a, b) = (ok!(open(&f, OFlags::RDONLY)), ok!(open(&f, OFlags::RDONLY)));
    ok!(flock(&a, NonBlockingLockShared));
    ok!(flock(&b, NonBlockingLockShared));
    fails!(flock(&a, NonBlockingLockExclusive), WOULDBLOCK);
    ok!(flock(&b, Unlock));
    ok!(flock(&a, NonBlockingLockExclusive));
    fails!(flock(&b, NonBlockingLockShared), WOULDBLOCK);
    ok!(flock(&a, Unlock));
    ok!(flock(&b, NonBlockingLockExclusive));
    Ok(())
}

fn whole_ends(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let (a, b) = (ok!(open(&f, OFlags::RDONLY)), ok!(open(&f, OFlags::RDONLY)));
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    ok!(flock(&a, exclusive));
    let copy = ok!(rustix::io::dup(&a));
    drop(a);
    fails!(flock(&b, exclusive), WOULDBLOCK);
    drop(copy);
    ok!(flock(&b, exclusive));
    Ok(())
}

/// Locks a range for the open file, not for the process: so that two can be had here.
fn range(file: &OwnedFd, kind: i32, start: i64, len: i64) -> Result<(), Errno> {
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock))
        .map(drop)
        .map_err(|e| Errno::from_raw_os_error(e as i32))
}

fn two(p: &Place) -> Result<(OwnedFd, OwnedFd), Failure> {
    let f = p.file("f", b"0123456789")?;
    Ok((ok!(open(&f, OFlags::RDWR)), ok!(open(&f, OFlags::RDWR))))
}

fn ranges(p: &Place) -> Outcome {
    let (a, b) = two(p)?;
    ok!(range(&a, libc::F_WRLCK, 0, 5));
    ok!(range(&b, libc::F_WRLCK, 5, 5));
    fails!(range(&b, libc::F_RDLCK, 4, 1), AGAIN | ACCESS);
    fails!(range(&a, libc::F_WRLCK, 9, 100), AGAIN | ACCESS);
    ok!(range(&a, libc::F_WRLCK, 100, 0));
    fails!(range(&b, libc::F_WRLCK, 1 << 40, 1), AGAIN | ACCESS);
    ok!(range(&a, libc::F_RDLCK, 0, 5));
    ok!(range(&b, libc::F_RDLCK, 0, 5));
    drop(a);
    ok!(range(&b, libc::F_WRLCK, 0, 0));
    let reader = ok!(open(&p.at("f"), OFlags::RDONLY));
    fails!(range(&reader, libc::F_WRLCK, 0, 1), BADF);
    Ok(())
}

fn split(p: &Place) -> Outcome {
    let (a, b) = two(p)?;
    ok!(range(&a, libc::F_WRLCK, 0, 30));
    ok!(range(&a, libc::F_UNLCK, 10, 10));
    ok!(range(&b, libc::F_WRLCK, 10, 10));
    fails!(range(&b, libc::F_WRLCK, 9, 1), AGAIN | ACCESS);
    fails!(range(&b, libc::F_WRLCK, 20, 1), AGAIN | ACCESS);
    ok!(range(&b, libc::F_UNLCK, 0, 0));
    ok!(range(&a, libc::F_WRLCK, 0, 30));
    fails!(range(&b, libc::F_RDLCK, 15, 1), AGAIN | ACCESS);
    Ok(())
}

fn names(p: &Place) -> Outcome {
    let (a, _) = two(p)?;
    ok!(range(&a, libc::F_WRLCK, 0, 0));
    ok!(rustix::fs::link(p.at("f"), p.at("l")));
    ok!(unlink(p.at("f")));
    let b = ok!(open(&p.at("l"), OFlags::RDWR));
    fails!(range(&b, libc::F_WRLCK, 0, 0), AGAIN | ACCESS);
    let other = p.file("f", b"")?;
    ok!(range(&ok!(open(&other, OFlags::RDWR)), libc::F_WRLCK, 0, 0));
    Ok(())
}

fn processes(p: &Place) -> Outcome {
    let f = p.file("f", b"")?;
    let said = || -> Result<String, Failure> {
        let done = ok!(command(Path::new("/proc/self/exe"), &f).output());
        want!(done.status.success());
        Ok(String::from_utf8_lossy(&done.stdout).trim().to_owned())
    };
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    let file = ok!(open(&f, OFlags::RDWR));
    ok!(fcntl_lock(&file, exclusive));
    same!(said()?, "refused 0 1");
    ok!(flock(&file, exclusive));
    // Whoever closes any descriptor of a file gives its fcntl locks up.
    drop(ok!(open(&f, OFlags::RDONLY)));
    same!(said()?, "refused 1 0");
    Ok(())
}
