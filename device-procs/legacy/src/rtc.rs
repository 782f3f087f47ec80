//! The CMOS real-time clock (MC146818) with its 114 bytes of memory, as registers without I/O.
//!
//! Time is the host's plus an offset; setting the clock changes the offset. Nothing ticks: what the
//! chip would have done since the last access is worked out when somebody looks, and
//! [`Rtc::deadline`] says when the guest wants an interrupt. The caller passes the host's time in.

use crate::calendar::DateTime;
use crate::saved_state::{Reader, Writer};
use std::time::Duration;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Where PCs keep the century; the FADT says so.
const CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 0x80;
const A_DIVIDER: u8 = 0x70;
/// Both upper divider bits hold the divider in reset.
const A_DIVIDER_RESET: u8 = 0x60;
const A_RATE: u8 = 0x0f;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 0x04;
const B_24_HOURS: u8 = 0x02;
const C_REQUEST: u8 = 0x80;
const C_EVENTS: u8 = B_PERIODIC | B_ALARM | B_UPDATE;
const D_VALID: u8 = 0x80;
const HOUR_PM: u8 = 0x80;
/// Alarm registers from this value on match anything.
const ALARM_ANY: u8 = 0xc0;

const SECOND_NS: i128 = 1_000_000_000;
/// Time before each update in which UIP warns of it.
const UPDATE_WARNING_NS: i128 = 244_000;
/// Part of a second that has passed when the divider leaves reset.
const DIVIDER_START_NS: i128 = SECOND_NS / 2;
/// No clock with four digits for the year is farther from 1970 or from its host.
const FARTHEST_NS: i128 = 20_000 * 366 * 86_400 * SECOND_NS;
const ALARM_SEARCH_SECONDS: i64 = 2 * 86_400;

/// The chip. Times are nanoseconds since 1970.
#[derive(Debug)]
pub(crate) struct Rtc {
    index: u8,
    registers: [u8; 128],
    /// Guest time minus host time.
    offset_ns: i128,
    /// While the clock stands (SET, or divider in reset) the time registers hold what was written.
    stands: bool,
    /// Part of the second at which the clock goes on.
    resume_ns: i128,
    /// Guest time up to which events are in register C.
    seen_ns: i128,
}

impl Rtc {
    /// A chip that runs `offset_s` seconds ahead of the host.
    pub(crate) fn new(offset_s: i64, host_now: Duration) -> Self {
        let mut registers = [0; 128];
        registers[usize::from(STATUS_A)] = 0x26;
        registers[usize::from(STATUS_B)] = B_24_HOURS;
        registers[usize::from(STATUS_D)] = D_VALID;
        let mut rtc = Self {
            index: 0,
            registers,
            offset_ns: i128::from(offset_s) * SECOND_NS,
            stands: false,
            resume_ns: 0,
            seen_ns: 0,
        };
        rtc.seen_ns = rtc.guest_ns(host_now);
        rtc
    }

    /// Writes its state.
    pub(crate) fn save(&self, to: &mut Writer) {
        to.put(&[self.index]);
        to.put(&self.registers);
        to.put(&self.offset_ns.to_le_bytes());
        to.put(&[u8::from(self.stands)]);
        to.put(&self.resume_ns.to_le_bytes());
        to.put(&self.seen_ns.to_le_bytes());
    }

    /// Reads its state.
    pub(crate) fn restore(from: &mut Reader<'_>) -> Option<Self> {
        let index = from.byte()?;
        let registers = from.take()?;
        let nanoseconds = |from: &mut Reader<'_>| from.take().map(i128::from_le_bytes);
        let offset_ns = nanoseconds(from)?;
        let stands = from.flag()?;
        let resume_ns = nanoseconds(from)?;
        let seen_ns = nanoseconds(from)?;
        let sound = index < 0x80
            && offset_ns.abs() <= FARTHEST_NS
            && seen_ns.abs() <= FARTHEST_NS
            && (0..SECOND_NS).contains(&resume_ns);
        sound.then_some(Self {
            index,
            registers,
            offset_ns,
            stands,
            resume_ns,
            seen_ns,
        })
    }

    /// The guest writes the index port; bit 7 masks NMIs, of which there are none.
    pub(crate) const fn select(&mut self, value: u8) {
        self.index = value & 0x7f;
    }

    /// The guest reads the index port.
    pub(crate) const fn selected(&self) -> u8 {
        self.index
    }

    /// The guest reads the data port.
    pub(crate) fn read(&mut self, host_now: Duration) -> u8 {
        let now = self.guest_ns(host_now);
        match self.index {
            STATUS_A => {
                let warns = SECOND_NS - now.rem_euclid(SECOND_NS) <= UPDATE_WARNING_NS;
                let updating = if warns && !self.stands {
                    A_UPDATE_IN_PROGRESS
                } else {
                    0
                };
                self.get(STATUS_A) | updating
            }
            STATUS_C => {
                self.catch_up(now);
                let events = self.get(STATUS_C);
                self.put(STATUS_C, 0);
                events
            }
            index if is_time(index) && !self.stands => {
                self.time_register(index, DateTime::from_seconds(whole_seconds(now)), now)
            }
            index => self.get(index),
        }
    }

    /// The guest writes the data port.
    pub(crate) fn write(&mut self, value: u8, host_now: Duration) {
        self.catch_up(self.guest_ns(host_now));
        match self.index {
            STATUS_A => {
                self.put(STATUS_A, value & !A_UPDATE_IN_PROGRESS);
                self.stand_or_run(host_now);
            }
            STATUS_B => {
                // Update interrupts are off while the clock is being set.
                let value = if value & B_SET != 0 {
                    value & !B_UPDATE
                } else {
                    value
                };
                if value & B_SET != 0 {
                    self.freeze(host_now);
                }
                self.put(STATUS_B, value);
                self.stand_or_run(host_now);
                self.raise();
            }
            STATUS_C | STATUS_D => {}
            index if is_time(index) && !self.stands => {
                self.freeze(host_now);
                self.put(index, value);
                self.resume(host_now);
            }
            index => self.put(index, value),
        }
    }

    /// Whether the interrupt line is up.
    pub(crate) fn is_requesting(&self) -> bool {
        self.get(STATUS_C) & C_REQUEST != 0
    }

    /// Brings register C up to date.
    pub(crate) fn look(&mut self, host_now: Duration) {
        self.catch_up(self.guest_ns(host_now));
    }

    /// How long until the chip raises its line; `None` while it is up or nothing can raise it.
    pub(crate) fn deadline(&self, host_now: Duration) -> Option<Duration> {
        if self.is_requesting() {
            return None;
        }
        let now = self.guest_ns(host_now);
        let enabled = self.get(STATUS_B);
        let mut next: Option<i128> = None;
        let mut consider = |bit: u8, at: Option<i128>| {
            if enabled & bit != 0
                && let Some(at) = at
            {
                next = Some(next.map_or(at, |n| n.min(at)));
            }
        };
        let period = self.period_ns();
        consider(B_PERIODIC, period.map(|p| (now.div_euclid(p) + 1) * p));
        let running = !self.stands;
        let update = (now.div_euclid(SECOND_NS) + 1) * SECOND_NS;
        consider(B_UPDATE, running.then_some(update));
        let alarm = (running && enabled & B_ALARM != 0).then(|| self.next_alarm(now));
        consider(B_ALARM, alarm.flatten());
        let wait = next? - now;
        Some(Duration::from_nanos(
            u64::try_from(wait).unwrap_or(u64::MAX),
        ))
    }

    fn get(&self, index: u8) -> u8 {
        self.registers.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn put(&mut self, index: u8, value: u8) {
        if let Some(place) = self.registers.get_mut(usize::from(index)) {
            *place = value;
        }
    }

    fn guest_ns(&self, host_now: Duration) -> i128 {
        i128::try_from(host_now.as_nanos()).unwrap_or(i128::MAX / 2) + self.offset_ns
    }

    /// Puts the events between the last look and `now` into register C.
    fn catch_up(&mut self, now: i128) {
        let then = self.seen_ns.min(now);
        self.seen_ns = now;
        let mut events = 0;
        if let Some(period) = self.period_ns()
            && now.div_euclid(period) != then.div_euclid(period)
        {
            events |= B_PERIODIC;
        }
        if !self.stands && now.div_euclid(SECOND_NS) != then.div_euclid(SECOND_NS) {
            events |= B_UPDATE;
            if self.next_alarm(then).is_some_and(|at| at <= now) {
                events |= B_ALARM;
            }
        }
        self.put(STATUS_C, self.get(STATUS_C) | events);
        self.raise();
    }

    fn raise(&mut self) {
        let events = self.get(STATUS_C) & C_EVENTS;
        let request = if events & self.get(STATUS_B) != 0 {
            C_REQUEST
        } else {
            0
        };
        self.put(STATUS_C, events | request);
    }

    /// Period of the periodic event: none at rate 0 or while the divider is in reset.
    fn period_ns(&self) -> Option<i128> {
        let a = self.get(STATUS_A);
        let rate = match a & A_RATE {
            0 => return None,
            // The first two rates are those of 8 and 9.
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        let divider_runs = a & A_DIVIDER_RESET != A_DIVIDER_RESET;
        divider_runs.then(|| (SECOND_NS << (rate - 1)) / 32_768)
    }

    fn in_divider_reset(&self) -> bool {
        self.get(STATUS_A) & A_DIVIDER & A_DIVIDER_RESET == A_DIVIDER_RESET
    }

    fn stand_or_run(&mut self, host_now: Duration) {
        let must_stand = self.get(STATUS_B) & B_SET != 0 || self.in_divider_reset();
        if must_stand {
            self.freeze(host_now);
            if self.in_divider_reset() {
                self.resume_ns = DIVIDER_START_NS;
            }
        } else if self.stands {
            self.resume(host_now);
        }
    }

    /// Stops the clock: the time registers now hold the time.
    fn freeze(&mut self, host_now: Duration) {
        if self.stands {
            return;
        }
        let now = self.guest_ns(host_now);
        let date = DateTime::from_seconds(whole_seconds(now));
        for index in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            self.put(index, self.time_register(index, date, now));
        }
        self.stands = true;
        self.resume_ns = now.rem_euclid(SECOND_NS);
    }

    /// Lets the clock go on from the time in the registers. A time that does not exist leaves it
    /// where it would have been.
    fn resume(&mut self, host_now: Duration) {
        self.stands = false;
        if let Some(seconds) = self.registers_as_date().and_then(DateTime::to_seconds) {
            let target = i128::from(seconds) * SECOND_NS + self.resume_ns;
            self.offset_ns += target - self.guest_ns(host_now);
        }
        self.seen_ns = self.guest_ns(host_now);
    }

    fn registers_as_date(&self) -> Option<DateTime> {
        let number = |index| self.decode(self.get(index)).map(i64::from);
        Some(DateTime {
            year: number(CENTURY)? * 100 + number(YEAR)?,
            month: self.decode(self.get(MONTH))?,
            day: self.decode(self.get(DAY))?,
            hour: self.decode_hour(self.get(HOURS))?,
            minute: self.decode(self.get(MINUTES))?,
            second: self.decode(self.get(SECONDS))?,
        })
    }

    fn time_register(&self, index: u8, date: DateTime, now: i128) -> u8 {
        let part = |value: i64| u8::try_from(value).unwrap_or(0);
        match index {
            SECONDS => self.encode(date.second),
            MINUTES => self.encode(date.minute),
            HOURS => self.encode_hour(date.hour),
            WEEKDAY => self.encode(DateTime::weekday(whole_seconds(now))),
            DAY => self.encode(date.day),
            MONTH => self.encode(date.month),
            YEAR => self.encode(part(date.year.rem_euclid(100))),
            _ => self.encode(part(date.year.div_euclid(100).rem_euclid(100))),
        }
    }

    fn is_binary(&self) -> bool {
        self.get(STATUS_B) & B_BINARY != 0
    }

    fn encode(&self, value: u8) -> u8 {
        if self.is_binary() {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, raw: u8) -> Option<u8> {
        if self.is_binary() {
            return Some(raw);
        }
        let (tens, ones) = (raw >> 4, raw & 0x0f);
        (tens < 10 && ones < 10).then_some(tens * 10 + ones)
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.get(STATUS_B) & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, raw: u8) -> Option<u8> {
        if self.get(STATUS_B) & B_24_HOURS != 0 {
            return self.decode(raw);
        }
        let hour = self.decode(raw & !HOUR_PM)?;
        let pm = if raw & HOUR_PM == 0 { 0 } else { 12 };
        (1..=12).contains(&hour).then_some(hour % 12 + pm)
    }

    /// The first alarm after `after`.
    fn next_alarm(&self, after: i128) -> Option<i128> {
        let wanted = |index, decoded: Option<u8>, limit: u8| {
            if self.get(index) >= ALARM_ANY {
                Some(None)
            } else {
                decoded.filter(|&v| v < limit).map(|v| Some(i64::from(v)))
            }
        };
        let raw = |index| self.decode(self.get(index));
        let second = wanted(SECONDS_ALARM, raw(SECONDS_ALARM), 60)?;
        let minute = wanted(MINUTES_ALARM, raw(MINUTES_ALARM), 60)?;
        let hour = wanted(HOURS_ALARM, self.decode_hour(self.get(HOURS_ALARM)), 24)?;
        let misses = |wanted: Option<i64>, value: i64| wanted.is_some_and(|w| w != value);
        let start = whole_seconds(after) + 1;
        let mut at = start;
        while at - start < ALARM_SEARCH_SECONDS {
            if misses(hour, at.rem_euclid(86_400) / 3600) {
                at = (at.div_euclid(3600) + 1) * 3600;
            } else if misses(minute, at.rem_euclid(3600) / 60) {
                at = (at.div_euclid(60) + 1) * 60;
            } else if misses(second, at.rem_euclid(60)) {
                at += 1;
            } else {
                return Some(i128::from(at) * SECOND_NS);
            }
        }
        None
    }
}

const fn is_time(index: u8) -> bool {
    matches!(
        index,
        SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
    )
}

fn whole_seconds(ns: i128) -> i64 {
    i64::try_from(ns.div_euclid(SECOND_NS)).unwrap_or(0)
}

#[cfg(test)]
#[path = "rtc_tests.rs"]
mod tests;
