//! Faults on system calls: they fail, do less, take longer, or their caller dies before or after them.

use super::{Engine, Occurrence};
use crate::notify::{Notification, read, take_descriptor, write};
use crate::points::{Point, When, can_be_made};
use crate::random::Planned;
use crate::scenario::Action;
use crate::who::descriptor;
use bulkhead_policies::syscalls;
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

/// Most bytes that the harness moves in the place of a process.
const TRANSFER_MAX: usize = 8 << 20;

/// A process is about to make a call that is no control message.
pub(super) fn seen(engine: &Arc<Engine>, host: usize, pid: i32, n: Notification) {
    let Some(call) = syscalls::name(n.number) else {
        return n.go_on();
    };
    let known = engine.directory.with_pid(pid);
    let kind = match &known {
        // What it does before it serves is another phase.
        Some(known) if !known.is_locked => return n.go_on(),
        Some(known) => Some(known.id.kind),
        None if engine.directory.broker(host) == Some(pid) => None,
        // A child of the broker that is no process of a machine yet.
        None => return n.go_on(),
    };
    let names = match kind {
        Some(kind) => format!("call.{kind}.{call}"),
        None => format!("call.broker.{call}"),
    };
    let (before, after) = (format!("{names}:before"), format!("{names}:after"));
    let place = known.as_ref().map(crate::who::Known::place);
    let fd = i32::try_from(n.arguments[0]).ok();
    let file = fd.and_then(|fd| descriptor(pid, fd));
    let meet = |name: &str, when: When| match Point::named(name) {
        Some(Point::Call(kind, call, _)) => engine.meet(&Occurrence {
            point: Point::Call(kind, call, when),
            name,
            host,
            vm: known.as_ref().map(|known| known.vm.as_str()),
            process: place.as_deref(),
            is_anonymous: file.as_ref().is_some_and(|f| f.starts_with("anon_inode:")),
        }),
        _ => Vec::new(),
    };
    let hits = [meet(&before, When::Before), meet(&after, When::After)];
    let [before, after] = hits;
    if before.is_empty() && after.is_empty() {
        return n.go_on();
    }
    let whose = known.map_or("broker".to_owned(), |k| format!("{}/{}", k.vm, k.id));
    for planned in before.iter().chain(&after) {
        let file = file.as_deref().unwrap_or("-");
        let what = format!(
            "{:?} at {} ({whose}, {file})",
            planned.fault.action, planned.fault.point
        );
        engine.timeline.injected(planned.id, what);
    }
    let engine = Arc::clone(engine);
    std::thread::spawn(move || inject(&engine, pid, call, n, &before, &after));
}

fn inject(
    engine: &Engine,
    pid: i32,
    call: &str,
    n: Notification,
    before: &[Planned],
    after: &[Planned],
) {
    let mut short = None;
    for planned in before {
        let fault = &planned.fault;
        match fault.action {
            Action::Kill => return engine.kill(pid, fault),
            Action::Delay => std::thread::sleep(Duration::from_millis(fault.ms.unwrap_or(0))),
            Action::Fail => return n.fails(fault.errno().unwrap_or(Errno::EIO)),
            Action::Short => short = fault.bytes,
            _ => {}
        }
    }
    if short.is_none() && after.is_empty() {
        return n.go_on();
    }
    let done = make(&n, pid, call, short);
    for planned in after {
        match planned.fault.action {
            Action::Kill => return engine.kill(pid, &planned.fault),
            _ => std::thread::sleep(Duration::from_millis(planned.fault.ms.unwrap_or(0))),
        }
    }
    match done {
        Ok(value) => n.returns(value),
        Err(errno) => n.fails(errno),
    }
}

/// Makes the call on a duplicate of the process's descriptor, of at most `short` bytes.
fn make(n: &Notification, pid: i32, call: &str, short: Option<u64>) -> Result<i64, Errno> {
    if !can_be_made(call) {
        return Err(Errno::ENOSYS);
    }
    let [fd, at, len, offset, ..] = n.arguments;
    let file = take_descriptor(pid, i32::try_from(fd).map_err(|_| Errno::EBADF)?)?;
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    let len = usize::try_from(len.min(short.unwrap_or(u64::MAX)))
        .unwrap_or(TRANSFER_MAX)
        .min(TRANSFER_MAX);
    let count = match call {
        "fsync" => nix::unistd::fsync(&file).map(|()| 0)?,
        "fdatasync" => nix::unistd::fdatasync(&file).map(|()| 0)?,
        "ftruncate" => {
            let length = i64::try_from(at).map_err(|_| Errno::EINVAL)?;
            nix::unistd::ftruncate(&file, length).map(|()| 0)?
        }
        "write" => nix::unistd::write(&file, &read(n.thread, at, len)?)?,
        "pwrite64" => pwrite(&file, &read(n.thread, at, len)?, offset)?,
        "read" | "pread64" => fill(
            n.thread,
            &file,
            at,
            len,
            (call == "pread64").then_some(offset),
        )?,
        _ => return Err(Errno::ENOSYS),
    };
    i64::try_from(count).map_err(|_| Errno::EOVERFLOW)
}

fn fill(
    thread: i32,
    file: &OwnedFd,
    at: u64,
    len: usize,
    offset: Option<i64>,
) -> Result<usize, Errno> {
    let mut bytes = vec![0; len];
    let count = match offset {
        Some(offset) => pread(file, &mut bytes, offset)?,
        None => nix::unistd::read(file, &mut bytes)?,
    };
    write(thread, at, bytes.get(..count).unwrap_or_default())?;
    Ok(count)
}
