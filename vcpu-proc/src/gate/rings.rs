//! How often a device may ring for nothing.
//!
//! A device rings when it has put completions that the gate asked to be called for, when it has published
//! something, and once or so after each start or reset. Each ring but those few is for at least one
//! completion that no earlier ring was for, so whoever is woken by a device more often than it completes
//! requests is being kept busy. The gate counts wake-ups against completions and finds an overdraft.
//!
//! The account is exact, and needs no clock while a device is honest: an honest device cannot overdraw it, at
//! whatever pace it works (`honest_device_never_overdraws`).

use std::time::{Duration, Instant};

/// Wake-ups that are free. An honest device is in debt by a few: a ring may come before its completion
/// is taken or long after, and it rings when it is started or publishes.
pub(super) const FREE_RINGS: u32 = 64;
/// An empty account gets one more wake-up for each of these, for devices that publish now and then.
const REFILL_EVERY: Duration = Duration::from_millis(1);

/// What one device process may still ring for nothing.
#[derive(Debug)]
pub(crate) struct RingAccount {
    left: u32,
    refilled: Option<Instant>,
}

/// The device rings without a cause.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Overdrawn;

impl RingAccount {
    /// That of a process which has done nothing yet.
    pub(crate) const fn new() -> Self {
        Self {
            left: FREE_RINGS,
            refilled: None,
        }
    }

    /// The device has, or was given, `causes` to ring.
    pub(crate) fn earn(&mut self, causes: u32) {
        self.left = self.left.saturating_add(causes).min(FREE_RINGS);
    }

    /// The device rang, once or more. The clock is only asked when nothing is left.
    ///
    /// # Errors
    /// [`Overdrawn`] when it had no cause to, and has been given every benefit of the doubt.
    pub(crate) fn draw(&mut self, now: impl FnOnce() -> Instant) -> Result<(), Overdrawn> {
        if self.left == 0 {
            let now = now();
            let since = self
                .refilled
                .replace(now)
                .map_or(REFILL_EVERY, |before| now.saturating_duration_since(before));
            let earned = since.as_nanos() / REFILL_EVERY.as_nanos();
            self.earn(u32::try_from(earned).unwrap_or(FREE_RINGS));
        }
        self.left = self.left.checked_sub(1).ok_or(Overdrawn)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What may happen between an honest device and its gate, in any order.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        /// The device completes this many requests, and remembers to ring.
        Complete(u32),
        /// It rings, if it has something to ring for. It is one thread, so it does before it goes on.
        Ring,
        /// The gate takes this many completions, whether it was rung or not.
        Take(u32),
        /// The gate looks at its doorbells.
        Look,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            (1u32..300).prop_map(Step::Complete),
            Just(Step::Ring),
            (1u32..300).prop_map(Step::Take),
            Just(Step::Look),
        ];
        prop::collection::vec(step, 0..2000)
    }

    proptest! {
        /// With a clock that stands still: not even a device that is infinitely fast overdraws.
        #[test]
        fn honest_device_never_overdraws(steps in steps()) {
            let now = Instant::now();
            let mut account = RingAccount::new();
            let (mut put, mut announced, mut rung) = (0u32, false, false);
            for step in steps {
                match step {
                    Step::Complete(n) if !announced => {
                        put += n;
                        announced = true;
                    }
                    Step::Complete(_) => {}
                    Step::Ring => rung |= std::mem::take(&mut announced),
                    Step::Take(most) => {
                        let taken = most.min(put);
                        put -= taken;
                        account.earn(taken);
                    }
                    Step::Look => {
                        if std::mem::take(&mut rung) {
                            prop_assert_eq!(account.draw(|| now), Ok(()));
                            // The gate makes a pass over a device that rang.
                            account.earn(std::mem::take(&mut put).min(256));
                        }
                    }
                }
            }
        }

        /// However it is timed, a flood gets no more than it is due.
        #[test]
        fn flood_wakes_nobody_more_often_than_it_may(
            pauses_us in prop::collection::vec(0u64..3000, 1..3000),
        ) {
            let start = Instant::now();
            let (mut now, mut account, mut woken) = (start, RingAccount::new(), 0u128);
            for pause in pauses_us {
                now += Duration::from_micros(pause);
                woken += u128::from(account.draw(|| now).is_ok());
            }
            let due = (now - start).as_nanos() / REFILL_EVERY.as_nanos();
            prop_assert!(woken <= due + 2 * u128::from(FREE_RINGS));
        }
    }

    #[test]
    fn device_that_rings_for_nothing_is_found_at_once() {
        let now = Instant::now();
        let mut account = RingAccount::new();
        let rings = (0..).take_while(|_| account.draw(|| now).is_ok()).count();
        assert!((64..=66).contains(&rings), "{rings}");
    }

    #[test]
    fn device_that_publishes_now_and_then_may_ring_for_ever() {
        let mut now = Instant::now();
        let mut account = RingAccount::new();
        for _ in 0..10_000 {
            now += REFILL_EVERY;
            assert_eq!(account.draw(|| now), Ok(()));
        }
    }
}
