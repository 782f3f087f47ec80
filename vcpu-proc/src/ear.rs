//! How often the control thread listens to the legacy process, whatever that does with its doorbell.
//!
//! A process asks for an interrupt because of what the guest did to its registers, what was typed, or what
//! time it is. The first is counted exactly, and the guest answers each of the others by an access. Without a
//! cause it is heard once a millisecond.

use std::time::{Duration, Instant};

use crate::gate::RingAccount;

/// How long nobody listens to a process that rings without a cause.
const CLOSED: Duration = Duration::from_millis(1);

/// What the legacy process may still ring for nothing.
#[derive(Debug)]
pub struct Ear {
    account: RingAccount,
    accesses: u32,
    closed_until: Option<Instant>,
}

impl Default for Ear {
    fn default() -> Self {
        Self {
            account: RingAccount::new(),
            accesses: 0,
            closed_until: None,
        }
    }
}

impl Ear {
    /// For how long the doorbell is not listened to; `None` when it is.
    pub(crate) fn closed(&mut self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        let left = self.closed_until?.saturating_duration_since(now());
        if left.is_zero() {
            self.closed_until = None;
            return None;
        }
        Some(left)
    }

    /// The doorbell was rung, once or more. `accesses` is how many the guest has made so far, wrapping.
    pub(crate) fn heard(&mut self, accesses: u32, now: impl Fn() -> Instant) {
        let causes = accesses.wrapping_sub(self.accesses);
        self.accesses = accesses;
        self.account.earn(causes);
        if self.account.draw(&now).is_err() {
            self.closed_until = Some(now() + CLOSED);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_is_heard_once_a_millisecond() {
        let start = Instant::now();
        let mut ear = Ear::default();
        let mut heard = 0;
        // One second of a doorbell that is rung whenever anybody looks, each look taking 2 us.
        for us in (0..1_000_000u64).step_by(2) {
            let now = start + Duration::from_micros(us);
            if ear.closed(|| now).is_none() {
                ear.heard(0, || now);
                heard += 1;
            }
        }
        assert!((500..=2100).contains(&heard), "{heard}");
    }

    #[test]
    fn process_that_answers_accesses_is_always_heard() {
        let now = Instant::now();
        let mut ear = Ear::default();
        for accesses in (u32::MAX - 5000)..=u32::MAX {
            assert_eq!(ear.closed(|| now), None);
            ear.heard(accesses, || now);
        }
        ear.heard(0, || now);
        assert_eq!(ear.closed(|| now), None);
    }
}
