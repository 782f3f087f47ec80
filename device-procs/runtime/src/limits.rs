//! What a device may do in a second: token buckets for bytes and for requests (disks) or frames (networks).
//!
//! A request is taken while both buckets have something, and may take more than they have: what is owed is
//! waited for before the next one is taken. So a request of any size gets through, and the rate holds in the mean.

use bulkhead_ipc::protocol::birth::{DiskLimits, Rate};
use std::time::{Duration, Instant};

const NANOS_PER_S: u128 = 1_000_000_000;

/// One bucket.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    rate: Rate,
    /// What is in it; negative when it owes.
    level: i128,
    filled: Instant,
}

impl Bucket {
    /// A full one.
    fn new(rate: Rate, now: Instant) -> Self {
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

    fn take(&mut self, tokens: u64) {
        self.level -= i128::from(tokens);
    }

    /// How long until there is something in it.
    fn wait(&self) -> Option<Duration> {
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
}

/// The buckets of a disk, or of one direction of a network device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    requests: Option<Bucket>,
}

impl Limiter {
    /// With full buckets.
    #[must_use]
    pub fn new(limits: &DiskLimits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self {
            bytes: bucket(limits.bytes),
            requests: bucket(limits.requests),
        }
    }

    /// Other limits; what is owed stays owed where there still is a limit.
    pub fn change(&mut self, limits: &DiskLimits, now: Instant) {
        let changed = |before: Option<Bucket>, rate: Option<Rate>| {
            let mut bucket = Bucket::new(rate?, now);
            if let Some(mut before) = before {
                before.fill(now);
                bucket.level = before.level.min(bucket.level);
            }
            Some(bucket)
        };
        self.bytes = changed(self.bytes, limits.bytes);
        self.requests = changed(self.requests, limits.requests);
    }

    /// Whether there is a limit at all.
    #[must_use]
    pub const fn limits(&self) -> bool {
        self.bytes.is_some() || self.requests.is_some()
    }

    /// A request with so many bytes of data was taken.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes);
        }
        if let Some(bucket) = &mut self.requests {
            bucket.take(1);
        }
    }

    /// How long no request is to be taken.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let mut longest = None;
        for bucket in [&mut self.bytes, &mut self.requests].into_iter().flatten() {
            bucket.fill(now);
            longest = longest.max(bucket.wait());
        }
        longest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits(bytes: Option<(u64, u64)>, requests: Option<(u64, u64)>) -> DiskLimits {
        let rate = |(per_s, burst)| Rate { per_s, burst };
        DiskLimits {
            bytes: bytes.map(rate),
            requests: requests.map(rate),
        }
    }

    /// Requests of `bytes` bytes that are taken in `seconds` by somebody who always has another one.
    fn taken(limits: &DiskLimits, bytes: u64, seconds: u64) -> u64 {
        let begin = Instant::now();
        let (mut now, mut count) = (begin, 0);
        let mut limiter = Limiter::new(limits, now);
        while now < begin + Duration::from_secs(seconds) {
            match limiter.wait(now) {
                // As a timer of milliseconds wakes.
                Some(wait) => now += wait.max(Duration::from_millis(1)),
                None => {
                    limiter.take(bytes);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn rates_hold_after_the_burst() {
        assert_eq!(taken(&limits(None, Some((100, 1))), 4096, 10) / 10, 100);
        let count = taken(&limits(None, Some((100, 500))), 4096, 10);
        assert!((1490..=1510).contains(&count), "{count}");
        let count = taken(&limits(Some((1 << 20, 1 << 20)), None), 64 << 10, 10);
        assert!((170..=180).contains(&count), "{count}");
        // The tighter one counts.
        let count = taken(&limits(Some((1 << 20, 1)), Some((5, 1))), 4096, 10);
        assert!((49..=52).contains(&count), "{count}");
    }

    #[test]
    fn request_larger_than_the_burst_gets_through_and_is_paid_for() {
        let count = taken(&limits(Some((1000, 1)), None), 4000, 20);
        assert!((4..=6).contains(&count), "{count}");
    }

    #[test]
    fn limit_that_is_changed_holds_from_then_on_and_forgives_nothing() {
        let now = Instant::now();
        let mut limiter = Limiter::new(&limits(Some((1000, 1)), None), now);
        limiter.take(10_000);
        limiter.change(&limits(Some((100_000, 1)), None), now);
        let wait = limiter.wait(now).unwrap();
        assert!((Duration::from_millis(99)..Duration::from_millis(101)).contains(&wait));
        limiter.change(&DiskLimits::default(), now);
        assert_eq!(limiter.wait(now), None);
        assert!(!limiter.limits());
    }

    proptest! {
        #[test]
        fn any_rate_ends_its_waits(per_s in 1u64.., burst in 1u64.., bytes: u64) {
            let now = Instant::now();
            let mut limiter = Limiter::new(&limits(Some((per_s, burst)), None), now);
            limiter.take(bytes);
            if let Some(wait) = limiter.wait(now) {
                prop_assert!(wait > Duration::ZERO);
                if let Some(later) = now.checked_add(wait) {
                    prop_assert_eq!(limiter.wait(later), None);
                }
            }
        }
    }
}
