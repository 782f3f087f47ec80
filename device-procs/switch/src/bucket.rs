//! So much a second, and so much at once: what a port may send.

use bulkhead_ipc::protocol::birth::Rate;
use std::time::{Duration, Instant};

const NANOS_PER_S: u128 = 1_000_000_000;

/// A token bucket. What is taken may be more than there is: what is owed is waited for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bucket {
    rate: Rate,
    /// Negative when it owes.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            level: rate.burst.into(),
            filled: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let nanos = now.saturating_duration_since(self.filled).as_nanos();
        let tokens = nanos.saturating_mul(self.rate.per_s.into()) / NANOS_PER_S;
        if tokens == 0 {
            return;
        }
        let tokens = i128::try_from(tokens).unwrap_or(i128::MAX);
        self.level = self
            .level
            .saturating_add(tokens)
            .min(self.rate.burst.into());
        self.filled = now;
    }

    /// How long until there is something in it.
    pub(crate) fn wait(&mut self, now: Instant) -> Option<Duration> {
        self.fill(now);
        let owed = u128::try_from(1 - self.level)
            .ok()
            .filter(|&owed| owed > 0)?;
        let nanos = owed
            .saturating_mul(NANOS_PER_S)
            .div_ceil(u128::from(self.rate.per_s).max(1));
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }

    /// Takes so much, whether or not it is there.
    pub(crate) fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(tokens.into());
    }

    /// Takes one if there is one.
    pub(crate) fn take_one(&mut self, now: Instant) -> bool {
        self.fill(now);
        let there = self.level > 0;
        if there {
            self.level -= 1;
        }
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn burst_goes_through_and_then_the_rate_holds() {
        let start = Instant::now();
        let rate = Rate {
            per_s: 100,
            burst: 10,
        };
        let mut bucket = Bucket::new(rate, start);
        let at_once = (0..50).filter(|_| bucket.take_one(start)).count();
        assert_eq!(at_once, 10);
        let later = (1..=1000u64)
            .filter(|ms| bucket.take_one(start + Duration::from_millis(*ms)))
            .count();
        assert!((99..=100).contains(&later), "{later}");
    }

    #[test]
    fn what_is_owed_is_waited_for() {
        let start = Instant::now();
        let rate = Rate {
            per_s: 1000,
            burst: 1000,
        };
        let mut bucket = Bucket::new(rate, start);
        assert_eq!(bucket.wait(start), None);
        bucket.take(3000);
        let wait = bucket.wait(start).unwrap();
        assert_eq!(wait.as_millis(), 2001);
        assert_eq!(bucket.wait(start + wait), None);
    }
}
