//! The vCPU side of the legacy page: how port accesses reach `bulkhead-legacy`.
//!
//! vCPU threads take turns under a lock that only they share. A turn waits for the legacy process
//! for [`PATIENCE`] at most; then the process counts as lost, writes are dropped and registers read
//! as all ones, so that a guest is never held up twice. Nothing that the process writes into the
//! page is believed beyond its type: a consumer count that cannot be is the end of it.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bulkhead_ipc::legacy_page::{self, Access, Call, LegacyPage, POSTED_ENTRIES, Posted};
use bulkhead_ipc::platform::{COM1_PORT, DEBUG_CONSOLE_PORT};
use bulkhead_ipc::shared::Doorbell;

use crate::group::Group;
use crate::wait;

/// Longest time that one access waits for the legacy process.
pub const PATIENCE: Duration = Duration::from_secs(1);
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

/// The legacy process did not answer, or the VM is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct GivenUp;

#[derive(Debug, Default)]
struct Turn {
    produced: u32,
    calls: u32,
    /// Bytes of the console output stream so far.
    stream_position: u64,
    line_control: u8,
    modem_control: u8,
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
    lost: AtomicBool,
    fault: OnceLock<&'static str>,
    turn: Mutex<Turn>,
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
        wiring.page.initialise(generation);
        Self {
            wiring,
            group,
            lost: AtomicBool::new(false),
            fault: OnceLock::new(),
            turn: Mutex::new(Turn {
                stream_position: output_position,
                ..Turn::default()
            }),
        }
    }

    /// Control thread: the process is gone.
    pub fn set_lost(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Why the process was given up, if it was. The control thread is woken when it is.
    #[must_use]
    pub fn fault(&self) -> Option<&'static str> {
        self.fault.get().copied()
    }

    /// Whether the process is gone or was given up.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Acquire)
    }

    /// The doorbell that says that [`LegacyClient::take_requests`] has something.
    #[must_use]
    pub fn interrupt(&self) -> &Doorbell {
        &self.wiring.interrupt
    }

    /// Control thread: interrupt lines that want an edge; 0 from a lost process.
    #[must_use]
    pub fn take_requests(&self) -> u32 {
        if self.is_lost() {
            0
        } else {
            self.wiring.page.take_requests()
        }
    }

    /// vCPU thread: writes one byte to a port of the legacy process.
    pub fn write(&self, port: u16, value: u8) {
        if self.is_lost() {
            return;
        }
        let mut turn = self.turn();
        if self.wait_for(&turn, POSTED_ENTRIES - 1).is_err() {
            return;
        }
        let stream_position = turn.stream_position;
        turn.follow(port, value);
        let write = Posted {
            port,
            size: 1,
            value: value.into(),
            stream_position,
        };
        let must_kick = self.wiring.page.post(turn.produced, write);
        turn.produced = turn.produced.wrapping_add(1);
        if must_kick {
            self.wiring.kick.ring();
        }
    }

    /// vCPU thread: reads one byte from a port of the legacy process.
    #[must_use]
    pub fn read(&self, port: u16) -> u8 {
        if self.is_lost() {
            return ALL_ONES;
        }
        match legacy_page::read_access(port) {
            Access::Mirror(register) => self.wiring.page.mirror(register),
            Access::MirrorAfterPosted(register) => {
                let turn = self.turn();
                match self.wait_for(&turn, 0) {
                    Ok(()) => self.wiring.page.mirror(register),
                    Err(GivenUp) => ALL_ONES,
                }
            }
            Access::Call | Access::Post => self.call(port).unwrap_or(ALL_ONES),
        }
    }

    fn call(&self, port: u16) -> Result<u8, GivenUp> {
        let mut turn = self.turn();
        turn.calls = turn.calls.wrapping_add(1);
        let number = turn.calls;
        if self.wiring.page.call(number, Call { port, size: 1 }) {
            self.wiring.kick.ring();
        }
        let answer = self.wait_until(|| Ok(self.wiring.page.reply(number)))?;
        Ok(answer.to_le_bytes()[0])
    }

    /// Waits until at most `outstanding` posted writes are not carried out.
    fn wait_for(&self, turn: &Turn, outstanding: u32) -> Result<(), GivenUp> {
        self.wait_until(|| {
            let left = turn.produced.wrapping_sub(self.wiring.page.consumed());
            if left > POSTED_ENTRIES {
                return Err(self.give_up("claims to have carried out more writes than there were"));
            }
            Ok((left <= outstanding).then_some(()))
        })
    }

    /// Asks `look` until it has something: at first in a spin, then between naps that the reply
    /// doorbell and kicks cut short.
    fn wait_until<T>(
        &self,
        mut look: impl FnMut() -> Result<Option<T>, GivenUp>,
    ) -> Result<T, GivenUp> {
        if let Some(found) = look()? {
            return Ok(found);
        }
        let start = Instant::now();
        while start.elapsed() < SPIN {
            std::hint::spin_loop();
            if let Some(found) = look()? {
                return Ok(found);
            }
        }
        loop {
            if self.is_lost() || self.group.is_stopping() {
                return Err(GivenUp);
            }
            if wait::readable(self.wiring.reply.as_fd(), NAP) {
                self.wiring.reply.take();
            }
            if let Some(found) = look()? {
                return Ok(found);
            }
            if start.elapsed() >= PATIENCE {
                return Err(self.give_up("did not answer a register access within a second"));
            }
        }
    }

    fn give_up(&self, fault: &'static str) -> GivenUp {
        let _first = self.fault.set(fault);
        self.set_lost();
        self.group.wake().ring();
        GivenUp
    }

    fn turn(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
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
