//! The vCPU side of the legacy page: how port accesses reach `bulkhead-legacy`.
//!
//! vCPU threads take turns under a lock that only they share, and keep book of everything that is not
//! done yet. When the process is silent for [`PATIENCE`] or breaks the protocol, that is reported once,
//! and the turn waits: for a successor, which finds in the renewed page what is unfinished, or for word
//! that there will be none; then writes are dropped and registers read as all ones. Nothing that
//! the process writes into the page is believed beyond its type.
//!
//! ```text
//!   Serving ── broke, silent ──▶ Broken ── prepare ──▶ Prepared ── says that it serves ──▶ Serving
//!      └── lost ──▶ Lost ────────────────────▲
//! ```

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::legacy_page::{
    self, Access, Call, LegacyPage, POSTED_ENTRIES, Posted, Progress, Unfinished,
};
use bulkhead_ipc::platform::{COM1_PORT, DEBUG_CONSOLE_PORT};
use bulkhead_ipc::shared::Doorbell;

use crate::group::Group;
use crate::wait;

/// Longest time that one access waits for a legacy process that serves.
pub const PATIENCE: Duration = Duration::from_secs(1);
/// How long an access waits for the first process, which may still be on its way when the guest begins.
pub const FIRST_PATIENCE: Duration = Duration::from_secs(10);
/// How long to look before sleeping: a peer that is awake answers within microseconds.
const SPIN: Duration = Duration::from_micros(20);
/// Longest sleep: draining the ring is not announced by a doorbell.
const NAP: Duration = Duration::from_millis(1);

/// What a register of a lost device reads as.
pub const ALL_ONES: u8 = 0xff;

const COM1_LINE_CONTROL: u16 = COM1_PORT + 3;
const COM1_MODEM_CONTROL: u16 = COM1_PORT + 4;
const DIVISOR_LATCH: u8 = 1 << 7;
const LOOPBACK: u8 = 1 << 4;

/// There is no legacy process any more, or the VM is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GivenUp;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    Broken,
    Prepared,
    Lost,
}

/// What a legacy process has been asked, whichever it is. Locked for moments only, and never while
/// anybody waits.
#[derive(Debug)]
struct Book {
    phase: Phase,
    generation: u32,
    /// Nobody has been there yet.
    awaits_first: bool,
    produced: u32,
    /// As far as the process was believed.
    consumed: u32,
    calls: u32,
    /// The call that a vCPU waits for.
    call: Option<Call>,
    /// Copies of the ring's entries.
    posted: Vec<Posted>,
    input_position: u64,
    /// Where the console output stream goes on.
    stream_position: u64,
    line_control: u8,
    modem_control: u8,
    fault: Option<&'static str>,
    prepared: Prepared,
}

/// Where a successor goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Prepared {
    /// Generation of the successor.
    pub generation: u32,
    /// Position in the output stream up to which everything is stored.
    pub output_position: u64,
    /// Bytes of input that the guest has been given.
    pub input_position: u64,
    /// Interrupts that the dead process had asked for.
    pub requests: u32,
}

/// The descriptors of the legacy boundary.
#[derive(Debug)]
pub struct LegacyWiring {
    /// The shared page.
    pub page: LegacyPage,
    /// Doorbell vCPU to legacy.
    pub kick: Doorbell,
    /// Doorbell legacy to vCPU: calls were answered.
    pub reply: Doorbell,
    /// Doorbell legacy to vCPU: interrupts are requested.
    pub interrupt: Doorbell,
}

/// The legacy devices as vCPU threads see them.
#[derive(Debug)]
pub struct LegacyClient {
    wiring: LegacyWiring,
    group: Arc<Group>,
    /// Whether the mirrored registers are those of a process that serves.
    serving: AtomicBool,
    turn: Mutex<()>,
    book: Mutex<Book>,
}

impl LegacyClient {
    /// The client of a fresh page; writes its identity. Output goes on at `output_position`.
    #[must_use]
    pub fn new(
        wiring: LegacyWiring,
        generation: u32,
        output_position: u64,
        group: Arc<Group>,
    ) -> Self {
        const NOTHING: Posted = Posted {
            port: 0,
            size: 0,
            value: 0,
            stream_position: 0,
        };
        wiring.page.initialise(generation);
        Self {
            wiring,
            group,
            serving: AtomicBool::new(true),
            turn: Mutex::new(()),
            book: Mutex::new(Book {
                phase: Phase::Serving,
                generation,
                awaits_first: true,
                produced: 0,
                consumed: 0,
                calls: 0,
                call: None,
                posted: vec![NOTHING; POSTED_ENTRIES as usize],
                input_position: 0,
                stream_position: output_position,
                line_control: 0,
                modem_control: 0,
                fault: None,
                prepared: Prepared::default(),
            }),
        }
    }

    /// Control thread: the process is gone, and there is no other.
    pub fn set_lost(&self) {
        self.enter(&mut self.book(), Phase::Lost);
    }

    /// Control thread: what the process did that it must be replaced for, once.
    #[must_use]
    pub fn take_fault(&self) -> Option<&'static str> {
        self.book().fault.take()
    }

    /// Control thread: the process is dead. Makes the page ready for generation `generation`; asked again,
    /// it says the same. `None` for an old generation.
    #[must_use]
    pub fn prepare(&self, generation: u32) -> Option<Prepared> {
        let mut book = self.book();
        if book.phase == Phase::Prepared && book.generation == generation {
            return Some(Prepared {
                requests: 0,
                ..book.prepared
            });
        }
        if generation <= book.generation {
            return None;
        }
        let page = &self.wiring.page;
        let mut requests = 0;
        if book.phase == Phase::Serving {
            requests = page.take_requests();
            let _nonsense_ends_here = book.outstanding(page);
        }
        let saved = page.saved().filter(|(progress, _)| book.accepts(*progress));
        if let Some((progress, _)) = &saved {
            book.input_position = progress.input_position;
        }
        let (progress, state) = saved.unwrap_or_else(|| (book.believed(), Vec::new()));
        let unfinished = Unfinished {
            produced: book.produced,
            posted: &book.posted,
            calls: book.calls,
            call: book.call,
        };
        page.renew(generation, &unfinished, progress, &state);
        book.consumed = progress.taken;
        book.generation = generation;
        book.awaits_first = false;
        book.prepared = Prepared {
            generation,
            output_position: book.output_position(),
            input_position: progress.input_position,
            requests,
        };
        self.enter(&mut book, Phase::Prepared);
        Some(book.prepared)
    }

    /// Control thread: whether a successor has begun to serve since the last call; its generation.
    #[must_use]
    pub fn take_service(&self) -> Option<u32> {
        let mut book = self.book();
        let serves = book.phase == Phase::Prepared && self.wiring.page.serving() == book.generation;
        serves.then(|| {
            self.enter(&mut book, Phase::Serving);
            book.generation
        })
    }

    /// Page, kick, interrupt and reply doorbell, for a new process.
    #[must_use]
    pub fn descriptors(&self) -> Option<[BorrowedFd<'_>; 4]> {
        let wiring = &self.wiring;
        let page = wiring.page.descriptor()?;
        let bells = [&wiring.kick, &wiring.interrupt, &wiring.reply];
        let [kick, interrupt, reply] = bells.map(AsFd::as_fd);
        Some([page, kick, interrupt, reply])
    }

    /// The doorbell that says that [`LegacyClient::take_requests`] has something.
    #[must_use]
    pub fn interrupt(&self) -> &Doorbell {
        &self.wiring.interrupt
    }

    /// Control thread: interrupt lines that want an edge; 0 from a process that does not serve.
    #[must_use]
    pub fn take_requests(&self) -> u32 {
        let book = self.book();
        match book.phase {
            Phase::Serving => self.wiring.page.take_requests(),
            Phase::Broken | Phase::Prepared | Phase::Lost => 0,
        }
    }

    /// Control thread: accesses of the guest that the process has been told of so far, wrapping.
    #[must_use]
    pub fn accesses(&self) -> u32 {
        let book = self.book();
        book.produced.wrapping_add(book.calls)
    }

    /// vCPU thread: writes one byte to a port of the legacy process.
    pub fn write(&self, port: u16, value: u8) {
        let page = &self.wiring.page;
        let _turn = self.turn();
        let posted = self.wait_until(|book| {
            if book.outstanding(page)? >= POSTED_ENTRIES {
                return Ok(None);
            }
            let write = Posted {
                port,
                size: 1,
                value: value.into(),
                stream_position: book.stream_position,
            };
            book.follow(port, value);
            let number = book.produced;
            if let Some(place) = book.posted.get_mut((number % POSTED_ENTRIES) as usize) {
                *place = write;
            }
            book.produced = number.wrapping_add(1);
            Ok(Some(page.post(number, write)))
        });
        if posted == Ok(true) {
            self.wiring.kick.ring();
        }
    }

    /// vCPU thread: reads one byte from a port of the legacy process.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        let page = &self.wiring.page;
        let register = match legacy_page::read_access(port) {
            Access::Mirror(register) if self.serving.load(Ordering::Acquire) => {
                return page.mirror(register);
            }
            Access::Mirror(register) => {
                self.wait_until(|book| Ok(book.serves().then(|| page.mirror(register))))
            }
            Access::MirrorAfterPosted(register) => {
                let _turn = self.turn();
                self.wait_until(|book| {
                    let done = book.outstanding(page)? == 0 && book.serves();
                    Ok(done.then(|| page.mirror(register)))
                })
            }
            Access::Call | Access::Post => self.call(port),
        };
        register.unwrap_or(ALL_ONES)
    }

    fn call(&self, port: u16) -> Result<u8, GivenUp> {
        let page = &self.wiring.page;
        let _turn = self.turn();
        let call = Call { port, size: 1 };
        let (number, kick) = {
            let mut book = self.book();
            if book.phase == Phase::Lost {
                return Err(GivenUp);
            }
            book.calls = book.calls.wrapping_add(1);
            book.call = Some(call);
            (book.calls, page.call(book.calls, call))
        };
        if kick {
            self.wiring.kick.ring();
        }
        let answer = self.wait_until(|book| match book.phase {
            Phase::Serving | Phase::Prepared => Ok(page.reply(number)),
            Phase::Broken | Phase::Lost => Ok(None),
        });
        self.book().call = None;
        Ok(answer?.to_le_bytes()[0])
    }

    /// Asks `look` until it has something: at first in a spin, then between naps that the reply
    /// doorbell and kicks cut short. A process that serves has [`PATIENCE`]; the next one is waited for.
    fn wait_until<T>(
        &self,
        mut look: impl FnMut(&mut Book) -> Result<Option<T>, &'static str>,
    ) -> Result<T, GivenUp> {
        let mut since = Instant::now();
        let start = since;
        loop {
            {
                let mut book = self.book();
                if book.phase == Phase::Lost {
                    return Err(GivenUp);
                }
                match look(&mut book) {
                    Ok(Some(found)) => return Ok(found),
                    Ok(None) if !book.serves() => since = Instant::now(),
                    Ok(None)
                        if book.awaits_first(&self.wiring.page)
                            && start.elapsed() < FIRST_PATIENCE =>
                    {
                        since = Instant::now();
                    }
                    Ok(None) if since.elapsed() < PATIENCE => {}
                    Ok(None) => {
                        let silent = "did not answer a register access within a second";
                        self.complain(&mut book, silent);
                    }
                    Err(nonsense) => self.complain(&mut book, nonsense),
                }
            }
            if start.elapsed() < SPIN {
                std::hint::spin_loop();
                continue;
            }
            if self.group.is_stopping() {
                return Err(GivenUp);
            }
            if wait::readable(self.wiring.reply.as_fd(), NAP) {
                self.wiring.reply.take();
            }
        }
    }

    fn complain(&self, book: &mut Book, fault: &'static str) {
        book.fault = Some(fault);
        self.enter(book, Phase::Broken);
        self.group.wake().ring();
    }

    fn enter(&self, book: &mut Book, phase: Phase) {
        book.phase = phase;
        self.serving
            .store(phase == Phase::Serving, Ordering::Release);
        // Whoever waits looks again.
        self.wiring.reply.ring();
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    fn serves(&self) -> bool {
        self.phase == Phase::Serving
    }

    /// Whether no process has said yet that it serves.
    fn awaits_first(&mut self, page: &LegacyPage) -> bool {
        self.awaits_first &= page.serving() != self.generation;
        self.awaits_first
    }

    /// Posted writes that are not carried out. Only a process that serves is asked.
    fn outstanding(&mut self, page: &LegacyPage) -> Result<u32, &'static str> {
        if self.serves() {
            let claimed = page.consumed();
            let more = claimed.wrapping_sub(self.consumed);
            if more > self.produced.wrapping_sub(self.consumed) {
                return Err("claims to have carried out more writes than there were");
            }
            self.consumed = claimed;
        }
        Ok(self.produced.wrapping_sub(self.consumed))
    }

    /// Whether a process can have come as far as it claims.
    fn accepts(&self, claimed: Progress) -> bool {
        let more = claimed.taken.wrapping_sub(self.consumed);
        let unanswered = self.calls.wrapping_sub(claimed.answered);
        more <= self.produced.wrapping_sub(self.consumed)
            && unanswered <= u32::from(self.call.is_some())
            && claimed.input_position >= self.input_position
    }

    /// How far the process is certain to have come, where its own word is worth nothing.
    fn believed(&self) -> Progress {
        Progress {
            taken: self.consumed,
            answered: self.calls.wrapping_sub(self.call.is_some().into()),
            reply: 0,
            // What was typed and may have been read already is not typed again.
            input_position: u64::MAX,
        }
    }

    fn output_position(&self) -> u64 {
        if self.consumed == self.produced {
            return self.stream_position;
        }
        let first = self.posted.get((self.consumed % POSTED_ENTRIES) as usize);
        first.map_or(self.stream_position, |write| write.stream_position)
    }

    /// Follows what decides whether a byte is output: with the divisor latch open the transmit
    /// register is something else, and in loopback mode the byte comes back as input.
    fn follow(&mut self, port: u16, value: u8) {
        match port {
            COM1_PORT if self.line_control & DIVISOR_LATCH == 0 => {
                let sent = self.modem_control & LOOPBACK == 0;
                self.stream_position += u64::from(sent);
            }
            DEBUG_CONSOLE_PORT => self.stream_position += 1,
            COM1_LINE_CONTROL => self.line_control = value,
            COM1_MODEM_CONTROL => self.modem_control = value,
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "legacy_client_tests.rs"]
mod tests;
