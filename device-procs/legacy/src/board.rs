//! The devices behind the legacy page: takes posted writes and calls, keeps the mirrored registers
//! right, gathers output and asks for interrupts.
//!
//! Before anything is reported as done, the state after it is left in the page ([`crate::saved_state`]), so
//! that a successor neither repeats nor misses it. Output alone may be repeated: it has its position.
//!
//! Output bytes are gathered for as long as more keep coming and stored with one write. A posted
//! write counts as consumed only when what it put out is in the file, so that a vCPU which waits for the
//! ring to drain knows that nothing can be lost any more.

use crate::keyboard::Controller;
use crate::rtc::Rtc;
use crate::saved_state;
use crate::uart::{Input, Uart};
use bulkhead_ipc::input_ring::InputReader;
use bulkhead_ipc::legacy_page::{
    Call, LegacyPage, MIRROR_I8042_STATUS, POSTED_ENTRIES, Posted, Progress, RESET_REQUEST,
};
use bulkhead_ipc::platform::{
    COM1_GSI, COM1_PORT, DEBUG_CONSOLE_PORT, I8042_COMMAND_PORT, I8042_DATA_PORT, RTC_GSI, RTC_PORT,
};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::transcript::Transcript;
use std::time::Duration;

const COM1_LAST: u16 = COM1_PORT + 7;
const RTC_DATA_PORT: u16 = RTC_PORT + 1;
/// What a debug console reads as, by which guests know it.
const DEBUG_CONSOLE_PRESENT: u8 = 0xe9;
const NOTHING: u8 = 0xff;
/// Mirrored registers of the serial port.
const MIRRORED: [u8; 6] = [1, 3, 4, 5, 6, 7];

impl Input for InputReader {
    fn peek(&self) -> Option<u8> {
        let mut byte = [0];
        (Self::peek(self, &mut byte) == 1).then_some(byte[0])
    }

    fn take(&mut self) {
        // The place is given back when the state that says so has been left.
        self.advance(1);
    }
}

/// What the board is connected to.
#[derive(Debug)]
pub(crate) struct Wiring {
    /// The page shared with the vCPUs.
    pub(crate) page: LegacyPage,
    /// Wakes a vCPU that waits for a reply.
    pub(crate) reply: Doorbell,
    /// Says that interrupts are requested.
    pub(crate) interrupt: Doorbell,
    /// Where output goes.
    pub(crate) transcript: Transcript,
    /// Where input comes from.
    pub(crate) input: InputReader,
}

/// The devices.
#[derive(Debug)]
pub(crate) struct Board {
    wiring: Wiring,
    uart: Uart,
    rtc: Rtc,
    controller: Controller,
    /// Posted writes taken, and calls answered, in this generation.
    taken: u32,
    answered: u32,
    reply: u32,
    /// States left in the page by this process.
    saved: u32,
    /// The clock's interrupt line as it was last seen: the interrupt is asked for when it rises.
    rtc_line: bool,
    pending: Vec<u8>,
    pending_at: u64,
    mirrored: [Option<u8>; MIRRORED.len()],
    mirrored_status: Option<u8>,
}

impl Board {
    /// The board after power-on, with this clock, or as the last process has left it.
    pub(crate) fn new(wiring: Wiring, rtc: Rtc) -> Self {
        let (progress, state) = wiring.page.saved().unwrap_or_default();
        let restored = saved_state::restore(&state);
        let (uart, rtc, controller) =
            restored.unwrap_or_else(|| (Uart::default(), rtc, Controller::default()));
        Self {
            wiring,
            uart,
            rtc,
            controller,
            taken: progress.taken,
            answered: progress.answered,
            reply: progress.reply,
            saved: 1,
            rtc_line: false,
            pending: Vec::with_capacity(POSTED_ENTRIES as usize),
            pending_at: 0,
            mirrored: [None; MIRRORED.len()],
            mirrored_status: None,
        }
    }

    /// Shows its registers, says that it serves, and asks for interrupts that the last process may not have
    /// asked for.
    pub(crate) fn begin(&mut self, generation: u32, now: Duration) {
        self.mirror();
        self.wiring.page.set_serving(generation);
        self.interrupt(now);
        self.wiring.interrupt.ring();
    }

    /// Takes what has been posted, at most one ring full, and answers a call. Returns whether there
    /// was anything.
    pub(crate) fn pass(&mut self, now: Duration) -> bool {
        // The call first: writes posted before it are then certain to be seen.
        let call = self.wiring.page.take_call(self.answered);
        let busy = self.drain(now) | call.is_some();
        if let Some((number, call)) = call {
            while self.drain(now) {}
            let value = self.read_all(call, now);
            self.mirror();
            (self.answered, self.reply) = (number, value);
            self.flush();
            self.wiring.page.answer(number, value);
            self.wiring.reply.ring();
        }
        if busy {
            self.interrupt(now);
        }
        busy
    }

    fn drain(&mut self, now: Duration) -> bool {
        let mut drained = 0;
        while drained < POSTED_ENTRIES
            && let Some(write) = self.wiring.page.take_posted(self.taken)
        {
            self.taken = self.taken.wrapping_add(1);
            drained += 1;
            self.write_all(write, now);
        }
        if drained > 0 {
            self.mirror();
            if self.pending.len() >= POSTED_ENTRIES as usize / 2 {
                self.flush();
            } else if self.pending.is_empty() {
                self.commit();
            }
        }
        drained > 0
    }

    /// Whether output is being gathered.
    pub(crate) const fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Stores the gathered output and reports the posted writes as done.
    pub(crate) fn flush(&mut self) {
        if !self.pending.is_empty() {
            self.wiring.transcript.put(self.pending_at, &self.pending);
            self.pending.clear();
        }
        self.commit();
    }

    /// Leaves the state for a successor and reports what has been taken as done.
    fn commit(&mut self) {
        let state = saved_state::save(&self.uart, &self.rtc, &self.controller);
        let progress = Progress {
            taken: self.taken,
            answered: self.answered,
            reply: self.reply,
            input_position: self.wiring.input.position(),
        };
        // The other place is the next one, also when the numbers begin again.
        self.saved = self.saved.checked_add(1).unwrap_or(2);
        self.wiring
            .page
            .save(self.saved, progress, state.as_bytes());
        self.wiring.input.release();
        self.wiring.page.set_consumed(self.taken);
    }

    /// Wakes a vCPU that sleeps until the ring has drained. For use after this process has slept
    /// itself: a vCPU that finds it awake does not sleep.
    pub(crate) fn wake_writer(&self) {
        self.wiring.reply.ring();
    }

    /// Something was typed.
    pub(crate) fn input_arrived(&mut self, now: Duration) {
        self.uart.input_arrived();
        self.mirror();
        self.interrupt(now);
    }

    /// A clock interrupt may be due.
    pub(crate) fn clock(&mut self, now: Duration) {
        self.rtc.look(now);
        let was_up = std::mem::replace(&mut self.rtc_line, self.rtc.is_requesting());
        if self.rtc_line && !was_up {
            self.wiring.page.request(1 << RTC_GSI);
            self.wiring.interrupt.ring();
        }
    }

    /// The guest has touched the clock: its line may have fallen, to rise again before it is looked at.
    fn clock_touched(&mut self) {
        self.rtc_line &= self.rtc.is_requesting();
    }

    /// When [`Board::clock`] must be called next.
    pub(crate) fn deadline(&self, now: Duration) -> Option<Duration> {
        self.rtc.deadline(now)
    }

    /// Whether there is something to take. Cheap.
    pub(crate) fn has_work(&self) -> bool {
        self.wiring.page.take_posted(self.taken).is_some()
            || self.wiring.page.take_call(self.answered).is_some()
    }

    /// Announces that the process is about to sleep. False when it must not.
    pub(crate) fn may_sleep(&self) -> bool {
        self.wiring.page.may_sleep(self.taken, self.answered)
    }

    /// The process is awake and looks by itself.
    pub(crate) fn set_awake(&self) {
        self.wiring.page.set_awake();
    }

    fn interrupt(&mut self, now: Duration) {
        if self.uart.take_edge(&self.wiring.input) {
            self.wiring.page.request(1 << COM1_GSI);
            self.wiring.interrupt.ring();
        }
        self.clock(now);
    }

    fn write_all(&mut self, write: Posted, now: Duration) {
        let bytes = write.value.to_le_bytes();
        let size = usize::from(write.size).min(bytes.len());
        for (port, &byte) in ports(write.port).zip(bytes.iter().take(size)) {
            self.write(port, byte, write.stream_position, now);
        }
    }

    fn write(&mut self, port: u16, value: u8, position: u64, now: Duration) {
        match port {
            COM1_PORT..=COM1_LAST => {
                if let Some(byte) = self.uart.write(port - COM1_PORT, value) {
                    self.put_out(position, byte);
                }
            }
            DEBUG_CONSOLE_PORT => self.put_out(position, value),
            RTC_PORT => self.rtc.select(value),
            RTC_DATA_PORT => {
                self.rtc.write(value, now);
                self.clock_touched();
            }
            I8042_DATA_PORT | I8042_COMMAND_PORT => {
                let reset = if port == I8042_DATA_PORT {
                    self.controller.write(value)
                } else {
                    self.controller.command(value)
                };
                if reset {
                    // Not reported as done yet: if this process dies now, its successor asks.
                    self.flush_pending_only();
                    self.wiring.page.request(RESET_REQUEST);
                    self.wiring.interrupt.ring();
                }
            }
            _ => {}
        }
    }

    fn put_out(&mut self, position: u64, byte: u8) {
        let next = self.pending_at.wrapping_add(self.pending.len() as u64);
        if !self.pending.is_empty() && position != next {
            self.flush_pending_only();
        }
        if self.pending.is_empty() {
            self.pending_at = position;
        }
        self.pending.push(byte);
    }

    fn flush_pending_only(&mut self) {
        self.wiring.transcript.put(self.pending_at, &self.pending);
        self.pending.clear();
    }

    fn read_all(&mut self, call: Call, now: Duration) -> u32 {
        let mut bytes = [0u8; 4];
        let size = usize::from(call.size).min(bytes.len());
        for (port, place) in ports(call.port).zip(bytes.iter_mut().take(size)) {
            *place = self.read(port, now);
        }
        u32::from_le_bytes(bytes)
    }

    fn read(&mut self, port: u16, now: Duration) -> u8 {
        match port {
            COM1_PORT..=COM1_LAST => self.uart.read(port - COM1_PORT, &mut self.wiring.input),
            DEBUG_CONSOLE_PORT => DEBUG_CONSOLE_PRESENT,
            RTC_PORT => self.rtc.selected(),
            RTC_DATA_PORT => {
                let value = self.rtc.read(now);
                self.clock_touched();
                value
            }
            I8042_DATA_PORT => self.controller.read(),
            I8042_COMMAND_PORT => self.controller.status(),
            _ => NOTHING,
        }
    }

    /// Writes the mirrored registers that have changed.
    fn mirror(&mut self) {
        for (&register, known) in MIRRORED.iter().zip(&mut self.mirrored) {
            let value = self.uart.quiet(register.into(), &self.wiring.input);
            if known.replace(value) != Some(value) {
                self.wiring.page.set_mirror(register, value);
            }
        }
        let status = self.controller.status();
        if self.mirrored_status.replace(status) != Some(status) {
            self.wiring.page.set_mirror(MIRROR_I8042_STATUS, status);
        }
    }
}

/// `first` and the ports behind it, as far as there are any.
fn ports(first: u16) -> impl Iterator<Item = u16> {
    first..=u16::MAX
}

#[cfg(test)]
#[path = "board_tests.rs"]
mod tests;
