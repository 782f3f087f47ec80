//! The thread between the user's terminal and a console's rings.

use super::keys::Keys;
use super::link::Link;
use super::stream::OutStream;
use super::terminal::{RawTerminal, is_foreground, is_raw, terminal_size};
use bulkhead_ipc::shared::Doorbell;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that are moved at a time.
const BUFFER_BYTES: usize = 64 << 10;
/// How often a guest whose keyboard is full is asked again: it does not ring when it reads.
const INPUT_RETRY: Duration = Duration::from_millis(5);
/// How often at most lost output is reported.
const REPORT_EVERY: Duration = Duration::from_secs(1);
/// Rings in a row that announce no output, after which a bell is not listened to for [`DEAF`]: an honest
/// one may ring for output that has been shown already.
const RINGS_FOR_NOTHING: u32 = 8;
const DEAF: Duration = Duration::from_millis(1);
/// How long a reader that takes nothing is waited for at the end.
const DRAIN_PATIENCE: Duration = Duration::from_secs(5);

/// What the user or the terminal did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserEvent {
    /// The user pressed an escape.
    Leave,
    /// The terminal has this many columns and rows.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Nobody can read the output any more.
    OutputClosed,
    /// The console is gone, and everything it wrote has been shown.
    Over,
}

/// The user's side of an attached console.
#[derive(Debug)]
pub struct Streams {
    /// Keys come from here. Raw mode if it is a terminal that this program may use.
    pub input: OwnedFd,
    /// The guest's output goes here.
    pub output: OwnedFd,
    /// Notices go here.
    pub notices: OwnedFd,
}

impl Streams {
    /// The program's own standard streams.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn standard() -> io::Result<Self> {
        Ok(Self {
            input: io::stdin().as_fd().try_clone_to_owned()?,
            output: io::stdout().as_fd().try_clone_to_owned()?,
            notices: io::stderr().as_fd().try_clone_to_owned()?,
        })
    }
}

/// How the attachment went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Bytes of output that were shown.
    pub shown: u64,
    /// Bytes of output that were overwritten before they could be shown.
    pub lost: u64,
}

/// An attached console.
#[derive(Debug)]
pub struct Attachment {
    stop: Doorbell,
    thread: Option<JoinHandle<Summary>>,
}

/// Attaches `streams` to a console. Signals that the caller handles must have their handlers
/// already. `keys` is what keys mean at a terminal; `tell` hears what the user does and must not
/// block.
///
/// # Errors
/// The kernel's error.
pub fn attach(
    link: impl Link + 'static,
    streams: Streams,
    keys: Keys,
    tell: impl FnMut(UserEvent) + Send + 'static,
) -> io::Result<Attachment> {
    let stop = Doorbell::new()?;
    let resized = leaked_bell()?;
    let notices = OutStream::new(&streams.notices)?;
    let output = OutStream::new(&streams.output)?;
    let is_terminal = streams.input.is_terminal();
    // Reading from a terminal in the background would stop the whole program.
    let reads = !is_terminal || is_foreground(&streams.input);
    let (keys, raw) = if is_terminal && reads {
        notice_to(&notices, &format!("bulkhead: attached; {}", keys.banner()));
        let raw = RawTerminal::enter(streams.input.try_clone()?, resized.as_raw_fd())?;
        (keys, Some(raw))
    } else {
        (Keys::pass_through(), None)
    };
    let worker = Worker {
        link: Box::new(link),
        keys,
        raw,
        input: reads.then_some(streams.input),
        output: Some(output),
        output_fd: streams.output,
        notices,
        stop: stop.try_clone()?,
        resized,
        size: (0, 0),
        typed: Vec::new(),
        unsent: false,
        shown: Pending::default(),
        rings_for_nothing: 0,
        summary: Summary::default(),
        reported: (0, None),
        tell: Box::new(tell),
    };
    let thread = std::thread::Builder::new()
        .name("console".to_owned())
        .spawn(move || worker.run())?;
    Ok(Attachment {
        stop,
        thread: Some(thread),
    })
}

/// The bell of the signal handlers, made once: it must outlive every handler.
pub(crate) fn leaked_bell() -> io::Result<&'static Doorbell> {
    static BELL: std::sync::OnceLock<Doorbell> = std::sync::OnceLock::new();
    if let Some(bell) = BELL.get() {
        return Ok(bell);
    }
    let made = Doorbell::new()?;
    Ok(BELL.get_or_init(|| made))
}

impl Attachment {
    /// Shows what is left of the output, as long as somebody reads it, and restores the terminal.
    #[must_use]
    pub fn finish(mut self) -> Summary {
        self.end()
    }

    fn end(&mut self) -> Summary {
        self.stop.ring();
        self.thread
            .take()
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.end();
    }
}

/// Writes one line to a stream, whatever mode the terminal is in. A stream that takes nothing now
/// gets nothing: a notice holds up nobody.
fn notice_to(stream: &OutStream, line: &str) {
    let end = if is_raw() { "\r\n" } else { "\n" };
    let _best_effort = stream.write(format!("{line}{end}").as_bytes());
}

/// Writes one line to standard error, whatever mode the terminal is in.
pub fn notice(line: &str) {
    if let Ok(stream) = OutStream::new(io::stderr()) {
        notice_to(&stream, line);
    }
}

/// Output that has been read and not yet been shown.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    from: usize,
}

impl Pending {
    fn rest(&self) -> &[u8] {
        self.bytes.get(self.from..).unwrap_or(&[])
    }
}

struct Worker {
    link: Box<dyn Link>,
    keys: Keys,
    raw: Option<RawTerminal>,
    input: Option<OwnedFd>,
    output: Option<OutStream>,
    output_fd: OwnedFd,
    notices: OutStream,
    stop: Doorbell,
    resized: &'static Doorbell,
    size: (u16, u16),
    typed: Vec<u8>,
    /// Whether the link has bytes that could not be sent yet.
    unsent: bool,
    shown: Pending,
    /// Rings in a row that announced nothing.
    rings_for_nothing: u32,
    summary: Summary,
    reported: (u64, Option<Instant>),
    tell: Box<dyn FnMut(UserEvent) + Send>,
}

impl Worker {
    fn run(mut self) -> Summary {
        self.check_size();
        let mut draining: Option<Instant> = None;
        loop {
            if self.stop.take() {
                draining = Some(Instant::now());
                self.input = None;
                self.typed.clear();
            }
            if self.resized.take() {
                if let Some(raw) = &self.raw {
                    raw.enter_again();
                }
                self.check_size();
            }
            self.type_on();
            let moved = self.show_on();
            if moved {
                draining = draining.map(|_| Instant::now());
            }
            if draining.is_none() && self.link.is_over() && self.shown.rest().is_empty() {
                draining = Some(Instant::now());
                self.input = None;
                self.typed.clear();
                (self.tell)(UserEvent::Over);
            }
            self.report_lost(draining.is_some() && self.shown.rest().is_empty());
            if let Some(since) = draining {
                let done = self.output.is_none() || self.shown.rest().is_empty();
                if done && !moved || since.elapsed() > DRAIN_PATIENCE {
                    break;
                }
            }
            if !moved {
                self.wait(draining.is_some());
            }
        }
        let left = self.shown.rest().len();
        if left > 0 && self.output.is_some() {
            self.say(&format!(
                "bulkhead: nobody read the last {left} bytes of console output"
            ));
        }
        self.summary
    }

    /// Sleeps until there is something to do.
    fn wait(&mut self, draining: bool) {
        if self.rings_for_nothing > RINGS_FOR_NOTHING {
            std::thread::sleep(DEAF);
        }
        let shows = !self.shown.rest().is_empty();
        let mut fds = vec![
            PollFd::new(bell_fd(&self.stop), PollFlags::POLLIN),
            PollFd::new(bell_fd(self.resized), PollFlags::POLLIN),
        ];
        if let Some(output) = self.output.as_ref().filter(|_| shows) {
            fds.push(PollFd::new(output.as_fd(), PollFlags::POLLOUT));
        } else {
            fds.push(PollFd::new(self.link.bell(), PollFlags::POLLIN));
            if let Some(output) = &self.output {
                // No events asked for: poll reports by itself that the reader has gone.
                fds.push(PollFd::new(output.as_fd(), PollFlags::empty()));
            }
        }
        let input_at = fds.len();
        if let Some(input) = self.input.as_ref().filter(|_| self.typed.is_empty()) {
            fds.push(PollFd::new(input.as_fd(), PollFlags::POLLIN));
        }
        let timeout = if !self.typed.is_empty() || self.unsent {
            PollTimeout::try_from(INPUT_RETRY).unwrap_or(PollTimeout::ZERO)
        } else if draining || self.reported.0 != self.summary.lost {
            PollTimeout::from(200u16)
        } else {
            PollTimeout::NONE
        };
        if poll(&mut fds, timeout).is_err() {
            return;
        }
        let happened = |fd: Option<&PollFd<'_>>, flags: PollFlags| {
            fd.and_then(PollFd::revents)
                .is_some_and(|r| r.intersects(flags))
        };
        let gone = !shows && happened(fds.get(3).filter(|_| input_at > 3), PollFlags::POLLERR);
        let typed = happened(fds.get(input_at), PollFlags::all());
        if gone {
            self.close_output();
        }
        if typed {
            self.read_keys();
        }
    }

    fn read_keys(&mut self) {
        let Some(input) = &self.input else { return };
        let mut buffer = [0u8; 4096];
        match nix::unistd::read(input, &mut buffer) {
            Ok(0) => self.input = None,
            Ok(n) => {
                let typed = buffer.get(..n).unwrap_or(&[]);
                let verdict = self.keys.feed(typed, &mut self.typed);
                if verdict.help {
                    for line in self.keys.help() {
                        self.say(&line);
                    }
                }
                if verdict.leave {
                    (self.tell)(UserEvent::Leave);
                }
            }
            Err(nix::errno::Errno::EINTR | nix::errno::Errno::EAGAIN) => {}
            Err(_) => self.input = None,
        }
    }

    /// Gives the guest as many keys as it has room for.
    fn type_on(&mut self) {
        if !self.typed.is_empty() {
            let taken = self.link.write(&self.typed);
            self.typed.drain(..taken);
        }
        self.unsent = self.link.flush();
    }

    /// Moves output. Returns whether anything moved.
    fn show_on(&mut self) -> bool {
        if self.output.is_none() {
            return self.discard();
        }
        if self.shown.rest().is_empty() {
            // The bell is taken first: output that comes after this rings it again.
            self.link.take_bell();
            self.shown.bytes.resize(BUFFER_BYTES, 0);
            self.shown.from = 0;
            let got = self.link.read(&mut self.shown.bytes);
            let bytes = match got {
                Ok(got) => {
                    if got.bytes > 0 {
                        self.summary.lost = self.summary.lost.saturating_add(got.lost);
                    }
                    got.bytes
                }
                Err(error) => {
                    self.shown.bytes.clear();
                    let mut line = String::from("bulkhead: console output cannot be read: ");
                    let _written = write!(line, "{error}");
                    self.say(&line);
                    self.output = None;
                    return false;
                }
            };
            self.shown.bytes.truncate(bytes);
            if bytes == 0 {
                self.rings_for_nothing = self.rings_for_nothing.saturating_add(1);
                return false;
            }
            self.rings_for_nothing = 0;
        }
        let Some(output) = &self.output else {
            return false;
        };
        match output.write(self.shown.rest()) {
            Ok(Some(n)) => {
                self.shown.from += n;
                self.summary.shown += n as u64;
                n > 0
            }
            Ok(None) => false,
            Err(_) => {
                self.close_output();
                false
            }
        }
    }

    /// Keeps up with output that nobody can see.
    fn discard(&mut self) -> bool {
        self.link.take_bell();
        self.rings_for_nothing = self.rings_for_nothing.saturating_add(1);
        false
    }

    fn close_output(&mut self) {
        self.output = None;
        self.shown = Pending::default();
        (self.tell)(UserEvent::OutputClosed);
    }

    fn check_size(&mut self) {
        let size = match &self.raw {
            Some(raw) => raw.size(),
            None if self.output_fd.is_terminal() => terminal_size(&self.output_fd),
            None => return,
        };
        let (columns, rows) = size;
        if size != self.size && columns > 0 && rows > 0 {
            self.size = size;
            self.link.resize(columns, rows);
            (self.tell)(UserEvent::Resize { columns, rows });
        }
    }

    fn report_lost(&mut self, now: bool) {
        let (told, when) = self.reported;
        let due = now || when.is_none_or(|when| when.elapsed() >= REPORT_EVERY);
        if self.summary.lost != told && due {
            let lost = self.summary.lost - told;
            self.reported = (self.summary.lost, Some(Instant::now()));
            self.say(&format!(
                "bulkhead: {lost} bytes of console output were lost, because they were not read in time"
            ));
        }
    }

    fn say(&self, line: &str) {
        notice_to(&self.notices, line);
    }
}

fn bell_fd(bell: &Doorbell) -> BorrowedFd<'_> {
    bell.as_fd()
}
