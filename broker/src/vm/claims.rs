//! How often what a sandboxed process says is passed on to people.
//!
//! A process that was taken over can say of itself, and `bulkhead-vcpu` of its devices and its guest,
//! whatever it likes, as often as it likes. What follows from that is the supervisor's to decide; who reads
//! it, on a terminal or in a log, is spared the repetition. Each process has an allowance of its own, so
//! that none can hide behind another's noise.

use bulkhead_ipc::ident::ProcKind;
use std::collections::BTreeMap;
use std::time::Duration;

/// Claims that are passed on at once.
const BURST: u32 = 50;
/// Each time this has passed, one more is.
const ONE_MORE_EVERY: Duration = Duration::from_millis(200);

/// A process, whichever generation it is of: kind and index.
pub(super) type Speaker = (ProcKind, u16);

#[derive(Debug)]
struct Allowance {
    left: u32,
    refilled: Duration,
    withheld: u64,
}

/// What each process of a machine may still say.
#[derive(Debug, Default)]
pub(super) struct Claims(BTreeMap<Speaker, Allowance>);

impl Claims {
    /// Whether something that `who` says is passed on, at the time `now`. If so, how much of the same
    /// process was withheld before.
    pub(super) fn admit(&mut self, who: Speaker, now: Duration) -> Option<u64> {
        let allowance = self.0.entry(who).or_insert(Allowance {
            left: BURST,
            refilled: now,
            withheld: 0,
        });
        allowance.refill(now);
        match allowance.left.checked_sub(1) {
            Some(left) => {
                allowance.left = left;
                Some(std::mem::take(&mut allowance.withheld))
            }
            None => {
                allowance.withheld += 1;
                None
            }
        }
    }
}

impl Allowance {
    fn refill(&mut self, now: Duration) {
        let since = now.saturating_sub(self.refilled);
        let more = since.as_nanos() / ONE_MORE_EVERY.as_nanos();
        if more > 0 {
            let more = u32::try_from(more).unwrap_or(BURST);
            self.left = self.left.saturating_add(more).min(BURST);
            self.refilled = now;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn flood_of_claims_is_passed_on_at_a_bounded_rate(
            pauses_us in prop::collection::vec(0u64..100_000, 1..1000),
        ) {
            let mut claims = Claims::default();
            let (mut now, mut passed, mut withheld, mut told) = (Duration::ZERO, 0u128, 0u64, 0u64);
            for pause in pauses_us {
                now += Duration::from_micros(pause);
                match claims.admit((ProcKind::Vcpu, 0), now) {
                    Some(before) => {
                        passed += 1;
                        told += before;
                    }
                    None => withheld += 1,
                }
            }
            let due = now.as_nanos() / ONE_MORE_EVERY.as_nanos();
            prop_assert!(passed <= due + u128::from(BURST));
            prop_assert!(told <= withheld);
        }
    }

    #[test]
    fn silence_is_broken_with_how_much_was_withheld() {
        let mut claims = Claims::default();
        let who = (ProcKind::Rng, 0);
        while claims.admit(who, Duration::ZERO).is_some() {}
        assert_eq!(claims.admit(who, Duration::ZERO), None);
        assert_eq!(claims.admit(who, ONE_MORE_EVERY), Some(2));
    }

    #[test]
    fn noise_of_one_process_does_not_silence_another() {
        let mut claims = Claims::default();
        while claims.admit((ProcKind::Rng, 0), Duration::ZERO).is_some() {}
        assert_eq!(claims.admit((ProcKind::Blk, 0), Duration::ZERO), Some(0));
        assert_eq!(claims.admit((ProcKind::Rng, 1), Duration::ZERO), Some(0));
    }
}
