//! One connection: a Unix socket on the one side, packets of the guest on the other.

use crate::credit::Credit;
use crate::packet::{Op, PAYLOAD_BYTES_MAX, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// How long the guest has to accept a client, or the host to connect to a listener.
pub const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the guest has to end a connection whose client is gone.
pub const LINGER: Duration = Duration::from_secs(8);
/// How long a client has to read what the guest sent before it closed the connection.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// The host's side of a connection. Nothing of it may block: what cannot be done now fails with
/// [`ErrorKind::WouldBlock`].
pub trait Stream {
    /// Reads bytes of the client; 0 is the end.
    ///
    /// # Errors
    /// Those of the socket.
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize>;

    /// Writes bytes for the client. Returns how many.
    ///
    /// # Errors
    /// Those of the socket.
    fn write(&mut self, from: &[u8]) -> io::Result<usize>;

    /// Ends one direction or both.
    ///
    /// # Errors
    /// Those of the socket.
    fn shutdown(&mut self, how: Shutdown) -> io::Result<()>;
}

/// A socket that has been set to be nonblocking.
impl Stream for UnixStream {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        Read::read(self, to)
    }

    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        Write::write(self, from)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        Self::shutdown(self, how)
    }
}

/// The two ports that name a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ports {
    /// The port on the host's side.
    pub host: u32,
    /// The port on the guest's side.
    pub guest: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// The guest asked; the host's listener has not been reached yet.
    Dialling,
    /// A client asked; the guest has not answered yet.
    Asked,
    /// Both sides agreed.
    Open,
    /// The guest is done with it; the client is given the rest.
    Draining,
}

/// What becomes of a connection after something has happened to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It goes on.
    Lives,
    /// The guest is told that it has ended, and may use its port again; the client gets the rest.
    Drains,
    /// It has ended, and the guest is told.
    Reset,
    /// It has ended, and the guest knows.
    Gone,
}

/// What is said to the guest: an operation, its flags, and how many bytes of payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) op: Op,
    pub(crate) flags: u32,
    pub(crate) len: usize,
}

#[derive(Debug)]
pub(crate) struct Link<S> {
    pub(crate) ports: Ports,
    pub(crate) deadline: Option<Instant>,
    /// Whether it waits in the exchange's line of those that have something for the guest.
    pub(crate) queued: bool,
    stream: Option<S>,
    phase: Phase,
    credit: Credit,
    /// What the client said behind its greeting.
    early: VecDeque<u8>,
    /// What the client is told before the guest's bytes, and those.
    preface: VecDeque<u8>,
    kept: VecDeque<u8>,
    /// A request or the answer to one that has to be said.
    opening: Option<Op>,
    credit_asked: bool,
    tells_credit: bool,
    may_read: bool,
    /// Flags of SHUTDOWN that the guest has said, that hold for the client, and that the guest knows.
    guest_ended: u32,
    client_ended: u32,
    told_ended: u32,
}

impl<S: Stream> Link<S> {
    fn new(ports: Ports, phase: Phase, now: Instant) -> Self {
        Self {
            ports,
            deadline: Some(now + ANSWER_TIMEOUT),
            queued: false,
            stream: None,
            phase,
            credit: Credit::default(),
            early: VecDeque::new(),
            preface: VecDeque::new(),
            kept: VecDeque::new(),
            opening: None,
            credit_asked: false,
            tells_credit: false,
            may_read: true,
            guest_ended: 0,
            client_ended: 0,
            told_ended: 0,
        }
    }

    /// The guest asks for a connection.
    pub(crate) fn dialling(ports: Ports, now: Instant) -> Self {
        Self::new(ports, Phase::Dialling, now)
    }

    /// A client asks for one; `early` is what it said behind its greeting.
    pub(crate) fn asked(ports: Ports, stream: S, early: &[u8], now: Instant) -> Self {
        Self {
            stream: Some(stream),
            early: early.iter().copied().collect(),
            opening: Some(Op::Request),
            ..Self::new(ports, Phase::Asked, now)
        }
    }

    pub(crate) fn is_dialling(&self) -> bool {
        self.phase == Phase::Dialling
    }

    pub(crate) const fn stream(&self) -> Option<&S> {
        self.stream.as_ref()
    }

    /// The host's listener has been reached.
    pub(crate) fn reached(&mut self, stream: S) {
        self.stream = Some(stream);
        self.phase = Phase::Open;
        self.opening = Some(Op::Response);
        self.deadline = None;
    }

    /// The guest has told its room.
    pub(crate) fn hear_room(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        if self.credit.hear(buf_alloc, fwd_cnt) {
            self.credit_asked = false;
        }
    }

    /// A packet of the guest for this connection; never a request or a reset.
    pub(crate) fn hear(
        &mut self,
        op: Op,
        flags: u32,
        payload: &[u8],
        greeting: &[u8],
        now: Instant,
    ) -> Fate {
        match (self.phase, op) {
            (Phase::Asked, Op::Response) => {
                self.phase = Phase::Open;
                self.deadline = None;
                self.preface.extend(greeting);
                self.flush(now)
            }
            (Phase::Open, Op::Payload) => self.keep(payload, now),
            (Phase::Open, Op::Shutdown) => self.guest_ends(flags, now),
            (Phase::Open, Op::CreditUpdate) => Fate::Lives,
            (Phase::Open, Op::CreditRequest) => {
                self.tells_credit = true;
                Fate::Lives
            }
            _ => Fate::Reset,
        }
    }

    fn keep(&mut self, payload: &[u8], now: Instant) -> Fate {
        let Ok(len) = u32::try_from(payload.len()) else {
            return Fate::Reset;
        };
        if self.guest_ended & SHUTDOWN_SEND != 0 || !self.credit.receive(len) {
            return Fate::Reset;
        }
        if self.client_ended & SHUTDOWN_RECEIVE != 0 {
            // On its way before the guest heard that nobody reads it.
            self.credit.pass_on(len);
            return Fate::Lives;
        }
        self.kept.extend(payload);
        self.flush(now)
    }

    fn guest_ends(&mut self, flags: u32, now: Instant) -> Fate {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            self.early.clear();
            self.end_of_client(Shutdown::Read);
            // Nobody reads up to the end of what the client sends any more.
            self.client_ends(0, now);
        }
        if self.guest_ended != SHUTDOWN_BOTH {
            return self.flush(now);
        }
        self.phase = Phase::Draining;
        self.deadline = Some(now + DRAIN_TIMEOUT);
        match self.flush(now) {
            Fate::Lives => Fate::Drains,
            _ => Fate::Reset,
        }
    }

    fn end_of_client(&mut self, how: Shutdown) {
        // A socket whose other end is gone has nothing to be ended.
        if let Some(stream) = &mut self.stream {
            let _already_ended = stream.shutdown(how);
        }
    }

    /// The client's socket has news.
    pub(crate) fn wake(&mut self, hung_up: bool, now: Instant) -> Fate {
        self.may_read = true;
        if hung_up {
            self.client_ends(SHUTDOWN_RECEIVE, now);
        }
        self.flush(now)
    }

    fn client_ends(&mut self, flags: u32, now: Instant) {
        self.client_ended |= flags;
        if flags & SHUTDOWN_RECEIVE != 0 {
            let lost = u32::try_from(self.kept.len()).unwrap_or(u32::MAX);
            self.credit.pass_on(lost);
            self.kept.clear();
            self.preface.clear();
        }
        if self.client_ended & self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            self.client_ended = SHUTDOWN_BOTH;
        }
        if self.client_ended == SHUTDOWN_BOTH
            && self.phase == Phase::Open
            && self.deadline.is_none()
        {
            self.deadline = Some(now + LINGER);
        }
    }

    /// Gives the client what is kept for it, as far as it takes it.
    fn flush(&mut self, now: Instant) -> Fate {
        let Some(stream) = &mut self.stream else {
            return Fate::Lives;
        };
        let mut broken = false;
        while !broken {
            let is_preface = !self.preface.is_empty();
            let queue = if is_preface {
                &mut self.preface
            } else {
                &mut self.kept
            };
            let (front, _) = queue.as_slices();
            if front.is_empty() {
                break;
            }
            match stream.write(front) {
                Ok(n) if n > 0 => {
                    let n = n.min(front.len());
                    queue.drain(..n);
                    if !is_preface {
                        self.credit.pass_on(u32::try_from(n).unwrap_or(u32::MAX));
                    }
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => broken = true,
            }
        }
        if broken {
            self.client_ends(SHUTDOWN_RECEIVE, now);
        }
        let is_flushed = self.preface.is_empty() && self.kept.is_empty();
        if is_flushed && self.phase == Phase::Draining {
            return Fate::Gone;
        }
        if is_flushed && self.guest_ended & SHUTDOWN_SEND != 0 {
            self.end_of_client(Shutdown::Write);
        }
        Fate::Lives
    }

    /// Whether there may be something to say to the guest.
    pub(crate) fn has_news(&self) -> bool {
        if self.phase == Phase::Draining {
            return false;
        }
        let open = self.phase == Phase::Open;
        self.opening.is_some()
            || open
                && (self.tells_credit
                    || self.credit.is_worth_telling()
                    || self.client_ended != self.told_ended
                    || self.has_input() && (self.credit.room() > 0 || !self.credit_asked))
    }

    fn has_input(&self) -> bool {
        let ended = self.client_ended & SHUTDOWN_SEND != 0;
        let unwanted = self.guest_ended & SHUTDOWN_RECEIVE != 0;
        !unwanted && (!self.early.is_empty() || self.may_read && !ended)
    }

    /// The next thing to say to the guest; payload is put into `to`.
    pub(crate) fn say(&mut self, to: &mut [u8], now: Instant) -> Option<Said> {
        let said = |op| Said {
            op,
            flags: 0,
            len: 0,
        };
        if let Some(op) = self.opening.take() {
            return Some(said(op));
        }
        if self.phase != Phase::Open {
            return None;
        }
        if self.has_input() {
            let room = usize::try_from(self.credit.room()).unwrap_or(usize::MAX);
            let bytes = to.len().min(room).min(PAYLOAD_BYTES_MAX);
            let len = self.take_input(to.get_mut(..bytes).unwrap_or_default(), now);
            if len > 0 {
                self.credit.send(u32::try_from(len).unwrap_or(u32::MAX));
                return Some(Said {
                    len,
                    ..said(Op::Payload)
                });
            }
            if room == 0 && !self.credit_asked {
                self.credit_asked = true;
                return Some(said(Op::CreditRequest));
            }
        }
        // That the client sends no more is known when its last byte has been taken.
        if self.client_ended != self.told_ended {
            self.told_ended = self.client_ended;
            return Some(Said {
                flags: self.told_ended,
                ..said(Op::Shutdown)
            });
        }
        if self.tells_credit || self.credit.is_worth_telling() {
            return Some(said(Op::CreditUpdate));
        }
        None
    }

    fn take_input(&mut self, to: &mut [u8], now: Instant) -> usize {
        if to.is_empty() {
            return 0;
        }
        if !self.early.is_empty() {
            return Read::read(&mut self.early, to).unwrap_or(0);
        }
        let Some(stream) = &mut self.stream else {
            return 0;
        };
        loop {
            match stream.read(to) {
                Ok(0) => self.client_ends(SHUTDOWN_SEND, now),
                Ok(n) => return n.min(to.len()),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => self.may_read = false,
                Err(_) => self.client_ends(SHUTDOWN_BOTH, now),
            }
            return 0;
        }
    }

    /// What goes with every packet: `buf_alloc` and `fwd_cnt`.
    pub(crate) const fn tell_room(&mut self) -> (u32, u32) {
        self.tells_credit = false;
        self.credit.tell()
    }
}
