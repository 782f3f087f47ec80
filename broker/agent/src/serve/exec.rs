//! Runs a command with its streams on the connection.
//!
//! Nothing here waits for one side while the other has something to say: each stream moves when both its
//! ends are ready, and never has more under way than the receiver has room for.
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::sys::{self, Before};
use super::users::{Account, account};
use crate::tree::kind_of;
use crate::wire::{Wire, WireError, poll_timeout};
use bulkhead_ipc::protocol::agent::{
    DATA_BYTES_MAX, Exec, Exit, Failure, FailureKind, FromAgent, Output, STREAM_BYTES_MAX,
    Terminal, ToAgent,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, openpty};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, pipe2, tcgetpgrp};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Messages that may wait to be sent before no more output is read.
const QUEUE_BYTES_MAX: usize = 128 << 10;
/// Room that is given at a time, unless nothing is left.
const ROOM_STEP: u64 = STREAM_BYTES_MAX / 4;
/// How long output is waited for after the command has ended: something that it has started may keep the
/// streams open for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the host may take for the end.
const LINGER: Duration = Duration::from_secs(10);

/// Runs `exec` and tells how it went.
pub(super) fn run(mut wire: Wire, exec: Exec) -> Result<(), WireError> {
    let running = match start(exec) {
        Ok(running) => running,
        Err(failure) => {
            wire.send(&FromAgent::Failed(failure))?;
            wire.linger(LINGER);
            return Ok(());
        }
    };
    wire.send(&FromAgent::Started {
        pid: running.child.id(),
    })?;
    let mut session = Session {
        wire,
        streams: running,
        over: false,
        last_words: None,
    };
    match session.serve() {
        Ok(()) => session.end(),
        Err(error) => {
            session.streams.kill();
            Err(error)
        }
    }
}

/// An output stream.
struct Out {
    fd: OwnedFd,
    which: Output,
    room: u64,
}

/// The input.
struct In {
    /// `None` once it is closed, by either side.
    fd: Option<OwnedFd>,
    waiting: Vec<u8>,
    ends: bool,
    is_terminal: bool,
    /// Bytes that are gone and for which no room was given yet.
    taken: u64,
}

struct Running {
    child: Child,
    /// Hangs up when the child has ended.
    ended: OwnedFd,
    input: In,
    outputs: Vec<Out>,
}

impl Drop for Running {
    /// Nothing may stay behind that nobody waits for. One that has ended and was waited for is not there.
    fn drop(&mut self) {
        self.kill();
    }
}

impl Running {
    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap_or(0))
    }

    /// Kills the whole session of the command.
    fn kill(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // Its number is the command's until that is waited for, which is below.
        kill_session(self.pid());
        let _waited = self.child.wait();
    }
}

fn start(exec: Exec) -> Result<Running, Failure> {
    let invalid = |text: &str| Failure::new(FailureKind::Invalid, text);
    let texts = exec
        .argv
        .iter()
        .chain(exec.env.iter().flat_map(|(k, v)| [k, v]));
    if texts.chain(&exec.cwd).any(|text| text.contains(&0)) {
        return Err(invalid(
            "a NUL byte in an argument, a variable or the directory",
        ));
    }
    if exec
        .env
        .iter()
        .any(|(k, _)| k.is_empty() || k.contains(&b'='))
    {
        return Err(invalid("a variable without a name"));
    }
    let Some((program, arguments)) = exec.argv.split_first() else {
        return Err(invalid("no command"));
    };
    let account = account(exec.user.as_deref())?;
    let cwd = match &exec.cwd {
        Some(cwd) => cwd.clone(),
        None => home(&account),
    };
    let before = Before {
        ids: account.ids(),
        cwd: CString::new(cwd).map_err(|_| invalid("a NUL byte in the directory"))?,
        terminal: exec.terminal.is_some(),
    };
    #[expect(
        clippy::disallowed_methods,
        reason = "whatever the host asks for is started, inside the guest"
    )]
    let mut command = Command::new(OsStr::from_bytes(program));
    command.args(arguments.iter().map(|a| OsStr::from_bytes(a)));
    command.env_clear().env("PATH", PATH);
    command
        .env("HOME", &account.home)
        .env("SHELL", &account.shell);
    command
        .env("USER", &account.name)
        .env("LOGNAME", &account.name);
    if let Some(terminal) = &exec.terminal {
        command.env("TERM", terminal.kind.replace('\0', ""));
    }
    for (key, value) in &exec.env {
        command.env(OsStr::from_bytes(key), OsStr::from_bytes(value));
    }
    let started = match &exec.terminal {
        Some(terminal) => on_terminal(command, before, terminal),
        None => on_pipes(command, before, exec.stdin),
    };
    started.map_err(|error| {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let shown = String::from_utf8_lossy(program);
        // A program may be missing, or its directory, or what interprets it: the kernel does not say.
        Failure::new(kind_of(errno), format!("{shown}: {}", errno.desc()))
    })
}

/// The account's home if it is there.
fn home(account: &Account) -> Vec<u8> {
    match std::fs::metadata(&account.home) {
        Ok(found) if found.is_dir() => account.home.clone().into_bytes(),
        _ => b"/".to_vec(),
    }
}

fn unblocked(fd: OwnedFd) -> io::Result<OwnedFd> {
    fcntl(&fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(fd)
}

fn on_pipes(mut command: Command, before: Before, stdin: bool) -> io::Result<Running> {
    command.stdin(if stdin { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = sys::spawn(&mut command, before)?;
    let input = child.stdin.take().map(OwnedFd::from);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let outputs = [
        (Output::Stdout, out.map(OwnedFd::from)),
        (Output::Stderr, err.map(OwnedFd::from)),
    ];
    running(child, input, outputs, false)
}

fn on_terminal(mut command: Command, before: Before, terminal: &Terminal) -> io::Result<Running> {
    let OpenptyResult { master, slave } = openpty(None, None)?;
    // Neither end may reach anything else that is started.
    for end in [&master, &slave] {
        fcntl(end, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    }
    sys::resize(&master, terminal.columns, terminal.rows)?;
    if let Some((uid, gid, _)) = &before.ids {
        // The terminal of somebody who may open it again.
        nix::unistd::fchown(&slave, Some(*uid), Some(*gid))?;
    }
    command.stdin(slave.try_clone()?).stdout(slave.try_clone()?);
    command.stderr(slave);
    let child = sys::spawn(&mut command, before)?;
    // With it the last copies of the far end that are ours.
    drop(command);
    let output = master.try_clone()?;
    let outputs = [(Output::Stdout, Some(output)), (Output::Stderr, None)];
    running(child, Some(master), outputs, true)
}

fn running(
    child: Child,
    input: Option<OwnedFd>,
    outputs: [(Output, Option<OwnedFd>); 2],
    is_terminal: bool,
) -> io::Result<Running> {
    let (ended, end) = pipe2(OFlag::O_CLOEXEC)?;
    let mut running = Running {
        child,
        ended,
        input: In {
            fd: None,
            waiting: Vec::new(),
            ends: false,
            is_terminal,
            taken: 0,
        },
        outputs: Vec::new(),
    };
    running.input.fd = input.map(unblocked).transpose()?;
    for (which, fd) in outputs {
        if let Some(fd) = fd {
            let (fd, room) = (unblocked(fd)?, STREAM_BYTES_MAX);
            running.outputs.push(Out { fd, which, room });
        }
    }
    let pid = running.pid();
    let waiter = std::thread::Builder::new().stack_size(64 << 10);
    waiter.spawn(move || {
        let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(pid), flags) == Err(Errno::EINTR) {}
        drop(end);
    })?;
    Ok(running)
}

struct Session {
    wire: Wire,
    streams: Running,
    /// Whether the command has ended.
    over: bool,
    /// When its streams are given up.
    last_words: Option<Instant>,
}

/// What is ready.
#[derive(Default)]
struct Ready {
    input: bool,
    outputs: Vec<Output>,
}

impl Session {
    /// Moves bytes until the command has ended and its output has been sent.
    fn serve(&mut self) -> Result<(), WireError> {
        loop {
            self.hear()?;
            self.wire.flush_now()?;
            let streams_over = self.streams.outputs.is_empty();
            let given_up = self.last_words.is_some_and(|until| until <= Instant::now());
            if self.over && (streams_over || given_up) {
                return Ok(());
            }
            let ready = self.wait()?;
            if ready.input {
                self.feed();
            }
            for which in ready.outputs {
                self.drain(which)?;
            }
            self.give_room()?;
        }
    }

    /// Takes what the host says.
    fn hear(&mut self) -> Result<(), WireError> {
        while let Some(message) = self.wire.receive_now()? {
            match message {
                ToAgent::Stdin(bytes) => {
                    let waiting = u64::try_from(self.streams.input.waiting.len());
                    let more = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
                    let all = waiting.unwrap_or(u64::MAX).saturating_add(more);
                    // It was told how much room there is.
                    if all > STREAM_BYTES_MAX || self.streams.input.ends {
                        return Err(WireError::Stranger);
                    }
                    match self.streams.input.fd {
                        Some(_) => self.streams.input.waiting.extend(bytes),
                        None => self.streams.input.taken += more,
                    }
                }
                ToAgent::StdinEnd => {
                    self.streams.input.ends = true;
                    self.end_input();
                }
                ToAgent::Room { stream, bytes } => {
                    let mut outputs = self.streams.outputs.iter_mut();
                    if let Some(out) = outputs.find(|out| out.which == stream) {
                        out.room = out.room.saturating_add(bytes.into());
                    }
                }
                ToAgent::Signal(number) => self.signal(number),
                ToAgent::Size { columns, rows } => {
                    let terminal = self.streams.input.fd.as_ref();
                    if let Some(fd) = terminal.filter(|_| self.streams.input.is_terminal) {
                        // A command that has closed its terminal needs no size.
                        let _gone = sys::resize(fd, columns, rows);
                    }
                }
                _ => return Err(WireError::Stranger),
            }
        }
        self.give_room()
    }

    fn signal(&self, number: u8) {
        let Ok(signal) = Signal::try_from(i32::from(number)) else {
            return;
        };
        if self.over {
            return;
        }
        let input = &self.streams.input;
        let terminal = input.fd.as_ref().filter(|_| input.is_terminal);
        let foreground = terminal.and_then(|fd| tcgetpgrp(fd).ok());
        // Whoever has just ended needs none.
        let _gone = killpg(foreground.unwrap_or(self.streams.pid()), signal);
    }

    /// Sleeps until something can be done.
    fn wait(&mut self) -> Result<Ready, WireError> {
        let streams = &self.streams;
        let mut wire = PollFlags::POLLIN;
        wire.set(PollFlags::POLLOUT, self.wire.queued() > 0);
        let mut fds = vec![PollFd::new(self.wire.as_fd(), wire)];
        if !self.over {
            fds.push(PollFd::new(streams.ended.as_fd(), PollFlags::empty()));
        }
        let input_at = fds.len();
        let input = streams.input.fd.as_ref();
        if let Some(fd) = input.filter(|_| !streams.input.waiting.is_empty()) {
            fds.push(PollFd::new(fd.as_fd(), PollFlags::POLLOUT));
        }
        let outputs_at = fds.len();
        let may_read = self.wire.queued() < QUEUE_BYTES_MAX;
        let open: Vec<&Out> = streams.outputs.iter().filter(|o| o.room > 0).collect();
        let open = if may_read { open } else { Vec::new() };
        for out in &open {
            fds.push(PollFd::new(out.fd.as_fd(), PollFlags::POLLIN));
        }
        let timeout = match self.last_words {
            Some(until) => poll_timeout(until.saturating_duration_since(Instant::now())),
            None => PollTimeout::NONE,
        };
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(WireError::Os(errno.into())),
        }
        let happened = |fd: &PollFd<'_>| fd.revents().is_some_and(|r| !r.is_empty());
        let over = !self.over && fds.get(1).is_some_and(happened);
        let input = input_at < outputs_at && fds.get(input_at).is_some_and(happened);
        let outputs = fds.iter().skip(outputs_at).zip(open);
        let outputs = outputs.filter(|(fd, _)| happened(fd)).map(|(_, o)| o.which);
        let ready = Ready {
            input,
            outputs: outputs.collect(),
        };
        if over {
            self.over = true;
            self.last_words = Some(Instant::now() + LAST_WORDS);
        }
        // A host that does not read must not cost the command its last words.
        let blocked = !may_read || self.streams.outputs.iter().any(|out| out.room == 0);
        if self.over && (blocked || !ready.outputs.is_empty()) {
            self.last_words = Some(Instant::now() + LAST_WORDS);
        }
        Ok(ready)
    }

    /// Gives the command what waits for it.
    fn feed(&mut self) {
        let input = &mut self.streams.input;
        let Some(fd) = &input.fd else { return };
        match nix::unistd::write(fd, &input.waiting) {
            Ok(n) => {
                input.waiting.drain(..n);
                input.taken += u64::try_from(n).unwrap_or(0);
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(_) => {
                // Nobody reads it any more. What comes still is thrown away, as a pipe would.
                input.taken += u64::try_from(input.waiting.len()).unwrap_or(0);
                input.waiting.clear();
                if !input.is_terminal {
                    input.fd = None;
                }
            }
        }
        self.end_input();
    }

    /// Passes the end of the input on, once everything before it has been.
    fn end_input(&mut self) {
        let input = &mut self.streams.input;
        if !input.ends || !input.waiting.is_empty() {
            return;
        }
        match (&input.fd, input.is_terminal) {
            // A terminal has no end but the key for it.
            (Some(fd), true) => {
                const END_OF_FILE: u8 = 4;
                let _full = nix::unistd::write(fd, &[END_OF_FILE]);
                input.ends = false;
            }
            _ => input.fd = None,
        }
    }

    fn give_room(&mut self) -> Result<(), WireError> {
        let input = &mut self.streams.input;
        let due = input.taken >= ROOM_STEP || input.waiting.is_empty();
        if input.taken == 0 || !due {
            return Ok(());
        }
        let more = u32::try_from(input.taken).unwrap_or(u32::MAX);
        input.taken = 0;
        self.wire.queue(&FromAgent::Room(more))
    }

    /// Sends what the command has written.
    fn drain(&mut self, which: Output) -> Result<(), WireError> {
        let mut outputs = self.streams.outputs.iter_mut();
        let Some(out) = outputs.find(|out| out.which == which) else {
            return Ok(());
        };
        let most = usize::try_from(out.room).unwrap_or(DATA_BYTES_MAX);
        let mut bytes = vec![0; most.min(DATA_BYTES_MAX)];
        match nix::unistd::read(&out.fd, &mut bytes) {
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(()),
            // A terminal that nobody has open any more says EIO.
            Ok(0) | Err(_) => {
                self.streams.outputs.retain(|out| out.which != which);
                Ok(())
            }
            Ok(n) => {
                bytes.truncate(n);
                out.room = out
                    .room
                    .saturating_sub(u64::try_from(n).unwrap_or(u64::MAX));
                let stream = which;
                self.wire.queue(&FromAgent::Output { stream, bytes })
            }
        }
    }

    /// Tells how the command has ended.
    fn end(mut self) -> Result<(), WireError> {
        let status = self.streams.child.wait()?;
        let exit = match (status.code(), status.signal()) {
            (Some(code), _) => Exit::Status(u8::try_from(code & 0xff).unwrap_or(u8::MAX)),
            (None, signal) => {
                let signal = signal.unwrap_or(libc::SIGKILL);
                Exit::Signal(u8::try_from(signal).unwrap_or(u8::MAX))
            }
        };
        self.wire.send(&FromAgent::Exited(exit))?;
        self.wire.linger(LINGER);
        Ok(())
    }
}

/// Kills every process of a session.
fn kill_session(session: Pid) {
    if session.as_raw() <= 1 {
        return;
    }
    // Twice: the first round may have missed what was just being started.
    for _ in 0..2 {
        let _gone = killpg(session, Signal::SIGKILL);
        let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        for process in processes {
            let name = process.file_name();
            let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            if session_of(pid) == Some(session.as_raw()) {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }
}

/// The session of a process: the fourth field behind its name, which may hold anything.
fn session_of(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_ascii_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_found_whatever_a_process_is_called() {
        let me = nix::unistd::getpid();
        let session = nix::unistd::getsid(None).unwrap();
        assert_eq!(session_of(me.as_raw()), Some(session.as_raw()));
    }
}
