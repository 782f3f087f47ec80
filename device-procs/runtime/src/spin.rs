//! How long to look for work before going to sleep.
//!
//! Waking a process on another core costs tens of microseconds (72 µs measured on a two-core
//! virtual machine), seeing a store of its peer 0.4 µs. So a process that is woken again soon after it
//! went to sleep should have looked a little longer, and one that slept long should not look at all.
//! The budget follows that rule, as the halt polling of KVM does: an idle process spends nothing.

use std::time::Duration;

/// First budget after a short sleep.
const START: Duration = Duration::from_micros(20);
/// Longest budget: the time that waking would take, and a little more.
const LONGEST: Duration = Duration::from_micros(100);
/// A sleep of at most this was worth avoiding. It contains the time that waking took.
const NEAR: Duration = Duration::from_micros(250);
/// A shorter sleep cost nothing: the peer is on the same CPU and could only go on once this process slept,
/// so that looking keeps it from its work.
const CHEAP: Duration = Duration::from_micros(25);

/// The budget, decided from how long the process slept. Pure: the caller measures time.
#[derive(Debug, Clone, Copy)]
pub struct Spin {
    budget: Duration,
    max: Duration,
}

impl Spin {
    /// A budget that grows up to `max`; zero for none, as on a machine with one CPU.
    #[must_use]
    pub const fn new(max: Duration) -> Self {
        Self {
            budget: Duration::ZERO,
            max,
        }
    }

    /// A budget for a machine with `cpus` CPUs, of which the peers in whose work this process waits
    /// keep `busy`: where no CPU is left, looking only keeps a peer from running.
    #[must_use]
    pub const fn beside(busy: usize, cpus: usize) -> Self {
        Self::new(if cpus > busy { LONGEST } else { Duration::ZERO })
    }

    /// How long to look before the next sleep.
    #[must_use]
    pub const fn budget(&self) -> Duration {
        self.budget
    }

    /// The process spun for its budget in vain, slept for `slept`, and was woken.
    pub fn slept(&mut self, slept: Duration) {
        if slept > NEAR || slept < CHEAP || self.max.is_zero() {
            self.budget = Duration::ZERO;
        } else {
            self.budget = (self.budget * 2).max(START).min(self.max);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_micros(100);

    #[test]
    fn idle_process_does_not_spin() {
        let mut spin = Spin::new(MAX);
        assert_eq!(spin.budget(), Duration::ZERO);
        spin.slept(Duration::from_micros(30));
        assert!(spin.budget() > Duration::ZERO);
        spin.slept(Duration::from_millis(10));
        assert_eq!(spin.budget(), Duration::ZERO);
    }

    #[test]
    fn busy_process_spins_up_to_the_limit() {
        let mut spin = Spin::new(MAX);
        for _ in 0..10 {
            spin.slept(Duration::from_micros(50));
        }
        assert_eq!(spin.budget(), MAX);
    }

    #[test]
    fn peer_on_the_same_cpu_is_not_kept_waiting() {
        let mut spin = Spin::new(MAX);
        spin.slept(Duration::from_micros(120));
        assert!(spin.budget() > Duration::ZERO);
        spin.slept(Duration::from_micros(8));
        assert_eq!(spin.budget(), Duration::ZERO);
    }

    #[test]
    fn spinning_can_be_switched_off() {
        let mut spin = Spin::new(Duration::ZERO);
        spin.slept(Duration::ZERO);
        assert_eq!(spin.budget(), Duration::ZERO);
    }
}
