//! Clocks: the guest tells its time-stamp counter and its CMOS clock, and the checker compares them with
//! the moments at which it hears of them.
//!
//! A line may come late, never early. So the *lead* of the outside clock over the guest's, taken at each
//! tick, has a lower bound that must stay where it is: a lead below it is a guest clock that has jumped
//! ahead, a bound that has risen one that has lost time. The two clocks of the guest are read at one moment
//! and are compared directly.

use super::record::{Console, Record};
use super::{Checker, Verified};
use std::time::Duration;

/// What no clock may be off by.
const TOLERANCE_NS: i128 = 250_000_000;
/// Nor may its rate: the guest has measured the frequency for 50 ms only.
const TOLERANCE_PPM: i128 = 2000;
/// The least that is judged: in each of four parts of a life so many ticks.
const TICKS_MIN: usize = 5;
const NS: i128 = 1_000_000_000;
const DAY_SECONDS: i128 = 86_400;

#[derive(Debug, Clone, Copy)]
struct Tick {
    guest_ns: i128,
    outside_ns: i128,
}

impl Tick {
    fn lead(&self) -> i128 {
        self.outside_ns - self.guest_ns
    }
}

#[derive(Debug, Clone, Copy)]
struct Life {
    khz: u64,
    interval_ns: i128,
}

/// The checker.
#[derive(Debug, Default)]
pub struct Clock {
    console: Console,
    life: Option<Life>,
    ticks: Vec<Tick>,
    /// Seconds of the CMOS clock since the first tick, and its last reading.
    rtc: Option<(i128, i128)>,
    verified: u64,
}

impl Clock {
    /// For any guest.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn begin(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let khz: u64 = found.number(record, "khz")?;
        let interval_ms: i128 = found.number(record, "interval")?;
        if khz == 0 {
            found.add("the guest does not know its frequency");
            return None;
        }
        let interval_ns = interval_ms * 1_000_000;
        self.life = Some(Life { khz, interval_ns });
        Some(())
    }

    fn tick(&mut self, at: Duration, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let number: usize = found.number(record, "n")?;
        let cycles: i128 = found.number(record, "cycles")?;
        let rtc: i128 = found.number(record, "rtc")?;
        let Some(life) = self.life else {
            found.add("ticks before `clock.begin`");
            return None;
        };
        if number != self.ticks.len() {
            found.add(format!(
                "tick {number} is heard as number {}",
                self.ticks.len()
            ));
        }
        let tick = Tick {
            guest_ns: cycles * 1_000_000 / i128::from(life.khz),
            outside_ns: i128::try_from(at.as_nanos()).unwrap_or(i128::MAX),
        };
        self.compare_with_last(number, life, tick);
        self.compare_rtc(number, tick, rtc);
        self.ticks.push(tick);
        Some(())
    }

    fn compare_with_last(&mut self, number: usize, life: Life, tick: Tick) {
        let Some(last) = self.ticks.last() else {
            return;
        };
        let step = tick.guest_ns - last.guest_ns;
        if step <= 0 {
            let error = format!("tick {number}: the clock steps back by {} ms", ms(-step));
            self.console.found.add(error);
        }
        // Had the guest stood still for the step, this tick would not lead less than any before it.
        let bound = self.ticks.iter().map(Tick::lead).min().unwrap_or(i128::MAX);
        let ahead = bound - tick.lead();
        if ahead > TOLERANCE_NS && step > life.interval_ns + TOLERANCE_NS {
            let error = format!("tick {number}: the clock jumps ahead by {} ms", ms(ahead));
            self.console.found.add(error);
        }
    }

    fn compare_rtc(&mut self, number: usize, tick: Tick, rtc: i128) {
        let (elapsed, last) = self.rtc.unwrap_or((0, rtc));
        let step = (rtc - last).rem_euclid(DAY_SECONDS);
        if step > DAY_SECONDS / 2 {
            let error = format!(
                "tick {number}: the CMOS clock steps back by {} s",
                DAY_SECONDS - step
            );
            return self.console.found.add(error);
        }
        let elapsed = elapsed + step;
        self.rtc = Some((elapsed, rtc));
        let first = self.ticks.first().unwrap_or(&tick);
        let apart = elapsed * NS - (tick.guest_ns - first.guest_ns);
        // It shows whole seconds.
        if apart.abs() > NS + allowed(tick.guest_ns - first.guest_ns) {
            self.console.found.add(format!(
                "tick {number}: the CMOS clock is {} ms apart from the time-stamp counter",
                ms(apart)
            ));
        }
    }

    /// Judges the rate over all ticks of a life.
    fn end_of_life(&mut self) {
        let ticks = std::mem::take(&mut self.ticks);
        (self.life, self.rtc) = (None, None);
        let part = ticks.len() / 4;
        if part < TICKS_MIN {
            return;
        }
        // Who listens too late hears the first ones all at once: the first part bounds from below only.
        let bounds: Vec<i128> = ticks
            .chunks_exact(part)
            .take(4)
            .filter_map(|ticks| ticks.iter().map(Tick::lead).min())
            .collect();
        let span = ticks[ticks.len() - 1].guest_ns - ticks[0].guest_ns;
        let allowed = allowed(span);
        for (at, bound) in bounds.iter().enumerate() {
            for later in &bounds[at + 1..] {
                let lost = later - bound;
                if lost > allowed {
                    let error = format!("the clock loses {} ms in part {at} of 4", ms(lost));
                    return self.console.found.add(error);
                }
                if at > 0 && -lost > allowed {
                    let error = format!("the clock gains {} ms in part {at} of 4", ms(-lost));
                    return self.console.found.add(error);
                }
            }
        }
        self.verified += ticks.len() as u64;
    }
}

fn allowed(span_ns: i128) -> i128 {
    TOLERANCE_NS + span_ns.abs() * TOLERANCE_PPM / 1_000_000
}

fn ms(ns: i128) -> i128 {
    ns / 1_000_000
}

impl Checker for Clock {
    fn record(&mut self, at: Duration, line: &str) {
        let Some(record) = self.console.take(line) else {
            return;
        };
        match record.name {
            "hello" => self.end_of_life(),
            "clock.begin" => {
                let _life = self.begin(&record);
            }
            "clock.tick" => {
                let _tick = self.tick(at, &record);
            }
            _ => {}
        }
    }

    fn finish(mut self: Box<Self>) -> Verified {
        self.end_of_life();
        Verified::new(self.verified, 0, self.console.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each tick: when it is heard and what the guest's clocks show, in milliseconds, and seconds.
    fn heard(ticks: &[(u64, u64, u64)]) -> Verified {
        let mut checker = Box::new(Clock::new());
        checker.record(Duration::ZERO, "BH hello version=1 mode=clock");
        checker.record(
            Duration::ZERO,
            "BH clock.begin khz=1000000 interval=50 seconds=5",
        );
        for (n, (at, guest, rtc)) in ticks.iter().enumerate() {
            let cycles = 77_000_000_000 + guest * 1_000_000;
            let line = format!("BH clock.tick n={n} cycles={cycles} rtc={rtc}");
            checker.record(Duration::from_millis(*at), &line);
        }
        checker.finish()
    }

    fn good() -> Vec<(u64, u64, u64)> {
        // The lines take 3 to 8 ms.
        let tick = |n: u64| {
            (
                1000 + 50 * n + 3 + n % 6,
                50 * n,
                (86_398_300 + 50 * n) / 1000 % 86_400,
            )
        };
        (0..80).map(tick).collect()
    }

    fn refuses(ticks: &[(u64, u64, u64)], text: &str) {
        let found = heard(ticks);
        let told = found.errors.iter().any(|error| error.contains(text));
        assert!(told && !found.held(), "no `{text}`: {found:?}");
    }

    #[test]
    fn steady_clocks_are_accepted_over_midnight() {
        let found = heard(&good());
        assert!(found.held(), "{found:?}");
        assert_eq!(found.count, 80);
    }

    #[test]
    fn too_few_ticks_verify_nothing() {
        refuses(&[], "nothing was verified");
        refuses(&good()[..19], "nothing was verified");
    }

    #[test]
    fn lines_that_come_late_and_a_guest_that_stood_still_are_no_jump() {
        // All of one second at once.
        let mut ticks = good();
        ticks[20..40].iter_mut().for_each(|tick| tick.0 = 3100);
        assert!(heard(&ticks).held());
        // The listener came late.
        let mut ticks = good();
        ticks[..30].iter_mut().for_each(|tick| tick.0 = 2600);
        assert!(heard(&ticks).held());
        // The guest stood still for two seconds; its clocks went on. The line before that came afterwards.
        let mut ticks = good();
        for tick in &mut ticks[30..] {
            *tick = (tick.0 + 2000, tick.1 + 2000, (tick.2 + 2) % 86_400);
        }
        ticks[29].0 = ticks[30].0;
        let found = heard(&ticks);
        assert!(found.held(), "{found:?}");
    }

    #[test]
    fn step_back_is_refused() {
        let mut ticks = good();
        ticks[30].1 = ticks[29].1 - 1;
        refuses(&ticks, "tick 30: the clock steps back");
        let mut ticks = good();
        ticks[30..].iter_mut().for_each(|tick| tick.1 -= 500);
        refuses(&ticks, "tick 30: the clock steps back by 450 ms");
    }

    #[test]
    fn jump_ahead_is_refused() {
        let mut ticks = good();
        ticks[30..].iter_mut().for_each(|tick| tick.1 += 400);
        refuses(&ticks, "tick 30: the clock jumps ahead");
    }

    #[test]
    fn lost_time_is_refused() {
        let mut ticks = good();
        ticks[30..].iter_mut().for_each(|tick| tick.0 += 400);
        refuses(&ticks, "the clock loses");
    }

    #[test]
    fn wrong_rate_is_refused() {
        for (percent, text) in [(80, "the clock loses"), (120, "the clock gains")] {
            let mut ticks = good();
            ticks
                .iter_mut()
                .for_each(|tick| tick.1 = tick.1 * percent / 100);
            refuses(&ticks, text);
        }
    }

    #[test]
    fn cmos_clock_that_steps_or_stands_is_refused() {
        let mut ticks = good();
        ticks[70].2 = (ticks[70].2 + 86_397) % 86_400;
        refuses(&ticks, "the CMOS clock steps back");
        let mut ticks = good();
        ticks[30..]
            .iter_mut()
            .for_each(|tick| tick.2 = (tick.2 + 3) % 86_400);
        refuses(&ticks, "the CMOS clock is");
        let mut ticks = good();
        ticks.iter_mut().for_each(|tick| tick.2 = 86_398);
        refuses(&ticks, "the CMOS clock is");
    }

    #[test]
    fn missing_tick_is_refused() {
        let mut checker = Box::new(Clock::new());
        checker.record(Duration::ZERO, "BH hello version=1");
        checker.record(Duration::ZERO, "BH clock.begin khz=1000000 interval=50");
        checker.record(Duration::ZERO, "BH clock.tick n=1 cycles=5 rtc=1");
        assert!(checker.finish().errors[0].contains("tick 1 is heard as number 0"));
    }

    #[test]
    fn each_life_has_clocks_of_its_own() {
        let mut checker = Box::new(Clock::new());
        for life in [90_000_000_000_u64, 1_000_000_000] {
            checker.record(Duration::ZERO, "BH hello version=1");
            checker.record(Duration::ZERO, "BH clock.begin khz=1000000 interval=50");
            for (n, (at, guest, rtc)) in good().iter().enumerate() {
                let line = format!(
                    "BH clock.tick n={n} cycles={} rtc={rtc}",
                    life + guest * 1_000_000
                );
                checker.record(Duration::from_millis(*at), &line);
            }
        }
        let found = checker.finish();
        assert_eq!((found.count, found.errors.len()), (160, 0), "{found:?}");
    }
}
