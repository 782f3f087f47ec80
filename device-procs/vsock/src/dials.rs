//! How often the broker is asked for connections: a guest that asks for more than it may waits.

use crate::exchange::LinkId;
use bulkhead_ipc::protocol::device::{DIALS_MAX, DIALS_PER_S};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// After this an answer comes no more: the broker that was asked is dead.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(10);
/// Time after which one more question may be asked.
const REFILL: Duration = Duration::from_millis(1000 / DIALS_PER_S as u64);

/// The questions that wait for an answer, and how many more may be asked.
#[derive(Debug)]
pub(crate) struct Dials {
    asked: VecDeque<(LinkId, Instant)>,
    left: usize,
    refilled: Instant,
}

impl Dials {
    /// None yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            asked: VecDeque::with_capacity(DIALS_MAX),
            left: DIALS_MAX,
            refilled: now,
        }
    }

    /// Whether a question may be asked; if so it counts as asked by [`Dials::ask`] alone.
    pub(crate) fn may_ask(&mut self, now: Instant) -> bool {
        while let Some(&(_, at)) = self.asked.front()
            && now.saturating_duration_since(at) >= FORGOTTEN_AFTER
        {
            self.asked.pop_front();
        }
        let periods = now.saturating_duration_since(self.refilled).as_nanos() / REFILL.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        let more = usize::try_from(periods).unwrap_or(usize::MAX);
        self.left = self.left.saturating_add(more).min(DIALS_MAX);
        self.refilled = if self.left == DIALS_MAX {
            now
        } else {
            self.refilled + REFILL * periods
        };
        self.left > 0 && self.asked.len() < DIALS_MAX
    }

    /// The broker is asked for a connection of `id`.
    pub(crate) fn ask(&mut self, id: LinkId, now: Instant) {
        self.left = self.left.saturating_sub(1);
        self.asked.push_back((id, now));
    }

    /// It has answered.
    pub(crate) fn answer(&mut self, id: LinkId) {
        self.asked.retain(|&(asked, _)| asked != id);
    }

    /// When [`Dials::may_ask`] is worth another look after it has said no.
    pub(crate) fn next_chance(&self) -> Instant {
        match self.asked.front() {
            Some(&(_, at)) if self.asked.len() >= DIALS_MAX => at + FORGOTTEN_AFTER,
            _ => self.refilled + REFILL,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Asks as often as it may for `time`, with answers after `delay` if any.
    fn asked_within(time: Duration, delay: Option<Duration>) -> usize {
        let start = Instant::now();
        let (mut dials, mut asked, mut now) = (Dials::new(start), 0, start);
        let mut answers = VecDeque::new();
        while now < start + time {
            while let Some(&(id, at)) = answers.front()
                && at <= now
            {
                dials.answer(id);
                answers.pop_front();
            }
            while dials.may_ask(now) {
                dials.ask(asked, now);
                answers.extend(delay.map(|delay| (asked, now + delay)));
                asked += 1;
            }
            assert!(dials.next_chance() > now, "it would look again at once");
            now += Duration::from_millis(1);
        }
        usize::try_from(asked).unwrap()
    }

    #[test]
    fn broker_is_asked_no_more_often_than_agreed() {
        let asked = asked_within(Duration::from_secs(5), Some(Duration::from_millis(1)));
        let agreed = DIALS_MAX + 5 * DIALS_PER_S as usize;
        assert!((agreed - 10..=agreed).contains(&asked), "{asked}");
    }

    #[test]
    fn dead_broker_is_asked_a_few_times_and_again_later() {
        assert_eq!(asked_within(Duration::from_secs(9), None), DIALS_MAX);
        assert_eq!(asked_within(Duration::from_secs(19), None), 2 * DIALS_MAX);
    }
}
