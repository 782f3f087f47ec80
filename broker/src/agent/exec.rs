//! The user's side of a command in a guest: streams between this program's own and the agent.
//!
//! Whatever the guest sends, no more of it is kept than this side has given room for, and the terminal is
//! put back by whoever drops [`Streams`].
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

use super::plain::Plain;
use super::{ANSWER_TIMEOUT, AgentError};
use crate::console::attach::leaked_bell;
use crate::console::keys::Keys;
use crate::console::stream::OutStream;
use crate::console::terminal::{RawTerminal, is_foreground, terminal_size};
use bulkhead_agent::wire::{Wire, poll_timeout};
use bulkhead_ipc::protocol::agent::{
    Ask, DATA_BYTES_MAX, Exec, Exit, FromAgent, Output, STREAM_BYTES_MAX, Terminal, ToAgent,
};
use bulkhead_ipc::shared::Doorbell;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Room that is given at a time, unless nothing is left to show.
const ROOM_STEP: u64 = STREAM_BYTES_MAX / 4;
/// Bytes that may wait to be sent before no more input is read.
const QUEUE_BYTES_MAX: usize = 64 << 10;
/// How long a reader that takes nothing is waited for at the end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);
/// Columns and rows where there is no terminal to ask.
const SIZE_DEFAULT: (u16, u16) = (80, 24);

/// How a command went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It has ended.
    Exited(Exit),
    /// The user has left; it is killed.
    Left,
    /// Nobody reads its output any more; it is killed.
    Unread,
}

/// One of the program's own output streams.
#[derive(Debug)]
struct Shown {
    which: Output,
    stream: Option<OutStream>,
    /// Where the guest must not control a terminal.
    plain: Option<Plain>,
    waiting: Vec<u8>,
    /// What the guest may still send.
    room: u64,
    /// What it has sent, and has no new room for yet.
    taken: u64,
}

impl Shown {
    fn new(which: Output, fd: impl AsFd + IsTerminal, controls: bool) -> io::Result<Self> {
        Ok(Self {
            which,
            plain: (fd.is_terminal() && !controls).then(Plain::default),
            stream: Some(OutStream::new(fd)?),
            waiting: Vec::new(),
            room: STREAM_BYTES_MAX,
            taken: 0,
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        let n = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        self.room = self.room.checked_sub(n).ok_or(AgentError::Nonsense)?;
        self.taken += n;
        match &mut self.plain {
            Some(plain) => self.waiting.extend(plain.show(bytes)),
            None => self.waiting.extend(bytes),
        }
        Ok(())
    }

    /// Shows what can be shown now. Whether there is still a reader.
    fn show(&mut self) -> bool {
        let Some(stream) = &self.stream else {
            return false;
        };
        while !self.waiting.is_empty() {
            match stream.write(&self.waiting) {
                Ok(Some(n)) if n > 0 => drop(self.waiting.drain(..n)),
                Ok(_) => break,
                Err(_) => {
                    self.stream = None;
                    self.waiting.clear();
                    return false;
                }
            }
        }
        true
    }

    /// Room that is due.
    fn due(&mut self) -> Option<ToAgent> {
        let due = self.waiting.is_empty() && self.taken >= ROOM_STEP;
        // What waits is a part of what was taken, or more of it where it is shown escaped.
        if !due {
            return None;
        }
        let bytes = u32::try_from(self.taken).ok()?;
        self.room += self.taken;
        self.taken = 0;
        Some(ToAgent::Room {
            stream: self.which,
            bytes,
        })
    }
}

/// The program's own streams.
#[derive(Debug)]
pub struct Streams {
    input: Option<OwnedFd>,
    outputs: [Shown; 2],
    keys: Keys,
    raw: Option<RawTerminal>,
    resized: &'static Doorbell,
    size: (u16, u16),
}

impl Streams {
    /// The standard streams: with `interactive` the input goes to the command, with `terminal` it has a
    /// terminal, and this one is raw meanwhile. `keys` is what keys mean there.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn standard(interactive: bool, terminal: bool, keys: Keys) -> io::Result<Self> {
        let stdin = io::stdin();
        let input = interactive.then(|| stdin.as_fd().try_clone_to_owned());
        let input = input.transpose()?;
        let resized = leaked_bell()?;
        let at_terminal = stdin.is_terminal() && is_foreground(&stdin);
        let size = match terminal && stdin.is_terminal() {
            true => terminal_size(&stdin),
            false => SIZE_DEFAULT,
        };
        let size = if size.0 == 0 || size.1 == 0 {
            SIZE_DEFAULT
        } else {
            size
        };
        let outputs = [
            Shown::new(Output::Stdout, io::stdout(), terminal)?,
            Shown::new(Output::Stderr, io::stderr(), terminal)?,
        ];
        let raw = match &input {
            Some(input) if terminal && at_terminal => {
                Some(RawTerminal::enter(input.try_clone()?, resized.as_raw_fd())?)
            }
            _ => None,
        };
        Ok(Self {
            // Reading from a terminal in the background would stop the whole program.
            input: input.filter(|input| !input.is_terminal() || at_terminal),
            keys: if raw.is_some() {
                keys
            } else {
                Keys::pass_through()
            },
            outputs,
            raw,
            resized,
            size,
        })
    }

    /// The terminal that the command gets.
    #[must_use]
    pub fn terminal(&self) -> Terminal {
        let kind = std::env::var("TERM").unwrap_or_default();
        let plain = |c: char| c.is_ascii_alphanumeric() || "+-._".contains(c);
        let usable = (1..64).contains(&kind.len()) && kind.chars().all(plain);
        Terminal {
            kind: if usable { kind } else { "xterm".to_owned() },
            columns: self.size.0,
            rows: self.size.1,
        }
    }
}

/// Runs a command and stays until it has ended.
///
/// # Errors
/// When it cannot be run, or the agent is lost.
pub fn run(wire: Wire, exec: Exec, streams: Streams) -> Result<Ending, AgentError> {
    let mut session = Session {
        wire,
        room: STREAM_BYTES_MAX,
        typed: Vec::new(),
        streams,
    };
    session.wire.send(&ToAgent::Ask(Ask::Exec(exec)))?;
    match session.wire.receive(ANSWER_TIMEOUT)? {
        FromAgent::Started { .. } => session.live(),
        FromAgent::Failed(failure) => Err(AgentError::Refused(failure)),
        _ => Err(AgentError::Nonsense),
    }
}

struct Session {
    wire: Wire,
    /// What the agent takes of the input.
    room: u64,
    /// Input that was read and not yet sent.
    typed: Vec<u8>,
    streams: Streams,
}

/// What is ready.
#[derive(Default)]
struct Ready {
    input: bool,
    gone: bool,
}

impl Session {
    fn live(&mut self) -> Result<Ending, AgentError> {
        loop {
            if let Some(exit) = self.hear()? {
                self.drain();
                return Ok(Ending::Exited(exit));
            }
            if !self.show()? {
                return Ok(Ending::Unread);
            }
            self.resize()?;
            self.say()?;
            self.wire.flush_now()?;
            let ready = self.wait(PollTimeout::NONE, false)?;
            if ready.gone {
                return Ok(Ending::Unread);
            }
            if ready.input && self.read_input()? {
                return Ok(Ending::Left);
            }
        }
    }

    /// Takes what the agent says.
    fn hear(&mut self) -> Result<Option<Exit>, AgentError> {
        while let Some(message) = self.wire.receive_now()? {
            match message {
                // What costs the guest nothing could come for ever.
                FromAgent::Output { bytes, .. } if bytes.is_empty() => {
                    return Err(AgentError::Nonsense);
                }
                FromAgent::Room(0) => return Err(AgentError::Nonsense),
                FromAgent::Output { stream, bytes } => {
                    let mut outputs = self.streams.outputs.iter_mut();
                    let output = outputs.find(|output| output.which == stream);
                    output.ok_or(AgentError::Nonsense)?.take(&bytes)?;
                }
                FromAgent::Room(more) => {
                    self.room = self.room.saturating_add(more.into());
                    if self.room > STREAM_BYTES_MAX {
                        return Err(AgentError::Nonsense);
                    }
                }
                FromAgent::Exited(exit) => return Ok(Some(exit)),
                FromAgent::Failed(failure) => return Err(AgentError::Refused(failure)),
                _ => return Err(AgentError::Nonsense),
            }
        }
        Ok(None)
    }

    /// Shows output and gives room for more. Whether somebody reads it.
    fn show(&mut self) -> Result<bool, AgentError> {
        for output in &mut self.streams.outputs {
            if !output.show() {
                return Ok(false);
            }
            if let Some(room) = output.due() {
                self.wire.queue(&room)?;
            }
        }
        Ok(true)
    }

    fn resize(&mut self) -> Result<(), AgentError> {
        let Some(raw) = self
            .streams
            .raw
            .as_ref()
            .filter(|_| self.streams.resized.take())
        else {
            return Ok(());
        };
        raw.enter_again();
        let size = raw.size();
        if size != self.streams.size && size.0 > 0 && size.1 > 0 {
            self.streams.size = size;
            let (columns, rows) = size;
            self.wire.queue(&ToAgent::Size { columns, rows })?;
        }
        Ok(())
    }

    /// Sends input for which there is room.
    fn say(&mut self) -> Result<(), AgentError> {
        while !self.typed.is_empty() && self.room > 0 && self.wire.queued() < QUEUE_BYTES_MAX {
            let room = usize::try_from(self.room).unwrap_or(usize::MAX);
            let most = self.typed.len().min(DATA_BYTES_MAX).min(room);
            let bytes: Vec<u8> = self.typed.drain(..most).collect();
            self.room -= u64::try_from(bytes.len()).unwrap_or(self.room);
            self.wire.queue(&ToAgent::Stdin(bytes))?;
        }
        Ok(())
    }

    /// Reads input. Whether the user leaves.
    fn read_input(&mut self) -> Result<bool, AgentError> {
        let Some(input) = &self.streams.input else {
            return Ok(false);
        };
        let mut buffer = [0; DATA_BYTES_MAX];
        match nix::unistd::read(input, &mut buffer) {
            Ok(n) if n > 0 => {
                let read = buffer.get(..n).unwrap_or_default();
                let verdict = self.streams.keys.feed(read, &mut self.typed);
                Ok(verdict.leave)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => Ok(false),
            Ok(_) | Err(_) => {
                self.streams.input = None;
                self.wire.queue(&ToAgent::StdinEnd)?;
                Ok(false)
            }
        }
    }

    /// Sleeps until there is something to do; with `at_end` only output counts.
    fn wait(&mut self, timeout: PollTimeout, at_end: bool) -> Result<Ready, AgentError> {
        let streams = &self.streams;
        let mut wire = PollFlags::POLLIN;
        wire.set(PollFlags::POLLOUT, self.wire.queued() > 0);
        let mut fds = Vec::new();
        for output in &streams.outputs {
            if let Some(stream) = &output.stream {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLOUT, !output.waiting.is_empty());
                // Asked for or not, poll reports that the reader has gone.
                fds.push(PollFd::new(stream.as_fd(), flags));
            }
        }
        let outputs = fds.len();
        if !at_end {
            fds.push(PollFd::new(self.wire.as_fd(), wire));
            fds.push(PollFd::new(streams.resized.as_fd(), PollFlags::POLLIN));
            if let Some(input) = streams.input.as_ref().filter(|_| self.typed.is_empty()) {
                fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
            }
        }
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(Errno::EINTR) => return Ok(Ready::default()),
            Err(errno) => return Err(AgentError::Socket(errno.into())),
        }
        let revents = |fd: &PollFd<'_>| fd.revents().unwrap_or(PollFlags::empty());
        let gone = fds
            .iter()
            .take(outputs)
            .any(|fd| revents(fd).contains(PollFlags::POLLERR));
        let input = fds
            .get(outputs + 2)
            .is_some_and(|fd| !revents(fd).is_empty());
        Ok(Ready { input, gone })
    }

    /// Shows what is left, as long as somebody reads it.
    fn drain(&mut self) {
        for output in &mut self.streams.outputs {
            if let Some(plain) = &mut output.plain {
                output.waiting.extend(plain.finish());
            }
        }
        let left = |session: &Self| -> usize {
            session
                .streams
                .outputs
                .iter()
                .map(|o| o.waiting.len())
                .sum()
        };
        let (mut since, mut before) = (Instant::now(), left(self));
        loop {
            for output in &mut self.streams.outputs {
                output.show();
            }
            let now = left(self);
            if now == 0 || since.elapsed() > DRAIN_PATIENCE {
                return;
            }
            if now < before {
                (since, before) = (Instant::now(), now);
            }
            if self.wait(poll_timeout(DRAIN_PATIENCE), true).is_err() {
                return;
            }
        }
    }
}
