//! Carries frames between the interfaces of the hosts, as a hub does: each frame to all others, whose kernels
//! drop what is not theirs. Rules lose, delay, double, reorder and spoil frames, by the dice of their faults.

use crate::random::Dice;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Longest frame: an MTU of 1500 bytes and its head, with room.
const FRAME_BYTES_MAX: usize = 2048;
/// Most frames that are on their way; more are lost.
const ON_THEIR_WAY_MAX: usize = 4096;
/// How long a frame that is reordered waits for others to pass it.
const PASSED_BY: Duration = Duration::from_millis(20);
/// Bytes at a frame's begin that are not spoiled: the addresses and the type of what is in it.
const ETHERNET_BYTES: usize = 14;

/// What happens to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameAction {
    /// It never arrives.
    Lose,
    /// It arrives later.
    Delay(Duration),
    /// It arrives twice.
    Duplicate,
    /// It arrives after those behind it.
    Reorder,
    /// One of its bits is flipped.
    Corrupt,
}

/// A rule for frames.
#[derive(Debug, Clone)]
pub struct FrameRule {
    /// Number of its fault.
    pub fault: u32,
    /// What happens.
    pub action: FrameAction,
    /// Of a hundred frames, to so many.
    pub percent: u8,
    /// Only to frames that this host sends.
    pub from: Option<usize>,
    /// Only to frames that this host would get.
    pub to: Option<usize>,
    /// Only to frames that this host sends or would get.
    pub beside: Option<usize>,
    /// When it ends.
    pub until: Instant,
    /// Seed of its dice.
    pub seed: u64,
}

impl FrameRule {
    fn is_about(&self, from: usize, to: usize) -> bool {
        let is = |wanted: Option<usize>, host| wanted.is_none_or(|wanted| wanted == host);
        let beside = self.beside.is_none_or(|host| host == from || host == to);
        is(self.from, from) && is(self.to, to) && beside
    }
}

/// A frame that arrives later.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Later {
    due: Instant,
    /// Keeps those of one moment in their order.
    number: u64,
    to: usize,
    frame: Vec<u8>,
}

#[derive(Debug)]
struct Ruled {
    rule: FrameRule,
    dice: Dice,
    is_hit: bool,
}

/// What becomes of a frame on its way to one host.
#[derive(Debug, Default)]
struct Fate {
    is_lost: bool,
    copies: u32,
    later: Duration,
    /// Which of its bits are flipped.
    flips: Vec<u64>,
    /// Faults that were met for the first time.
    hits: Vec<u32>,
}

/// The rules as they are applied. Nothing in here knows of descriptors or clocks.
#[derive(Debug, Default)]
struct Rulebook(Vec<Ruled>);

impl Rulebook {
    fn add(&mut self, rule: FrameRule) {
        let dice = Dice::new(rule.seed);
        self.0.push(Ruled {
            rule,
            dice,
            is_hit: false,
        });
    }

    fn fate(&mut self, now: Instant, from: usize, to: usize) -> Fate {
        self.0.retain(|ruled| ruled.rule.until > now);
        let mut fate = Fate {
            copies: 1,
            ..Fate::default()
        };
        for ruled in &mut self.0 {
            if !ruled.rule.is_about(from, to) {
                continue;
            }
            if ruled.dice.between(1, 100) > u64::from(ruled.rule.percent) {
                continue;
            }
            if !std::mem::replace(&mut ruled.is_hit, true) {
                fate.hits.push(ruled.rule.fault);
            }
            match ruled.rule.action {
                FrameAction::Lose => fate.is_lost = true,
                FrameAction::Delay(time) => fate.later += time,
                FrameAction::Duplicate => fate.copies += 1,
                FrameAction::Reorder => fate.later += PASSED_BY,
                FrameAction::Corrupt => fate.flips.push(ruled.dice.roll()),
            }
        }
        fate
    }
}

/// Flips a bit behind the Ethernet head.
fn flip(frame: &mut [u8], which: u64) {
    let Some(body) = frame.get_mut(ETHERNET_BYTES..) else {
        return;
    };
    let bits = u64::try_from(body.len()).unwrap_or(0) * 8;
    if let Some(bit) = which.checked_rem(bits)
        && let Some(byte) = usize::try_from(bit / 8)
            .ok()
            .and_then(|at| body.get_mut(at))
    {
        *byte ^= 1 << (bit % 8);
    }
}

#[derive(Debug)]
struct Shared {
    rules: Mutex<Rulebook>,
    carried: AtomicU64,
    is_over: AtomicBool,
    bell: EventFd,
}

/// The thread that carries.
#[derive(Debug)]
pub(super) struct Relay {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Relay {
    /// Between these interfaces.
    pub(super) fn start(taps: Vec<File>, hit: impl Fn(u32) + Send + 'static) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            rules: Mutex::default(),
            carried: AtomicU64::new(0),
            is_over: AtomicBool::new(false),
            bell: EventFd::from_value_and_flags(0, flags)?,
        });
        let carrier = Carrier {
            shared: Arc::clone(&shared),
            taps,
            later: BinaryHeap::new(),
            number: 0,
        };
        let thread = std::thread::spawn(move || carrier.carry(hit));
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn add(&self, rule: FrameRule) {
        let mut rules = self
            .shared
            .rules
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        rules.add(rule);
    }

    pub(super) fn carried(&self) -> u64 {
        self.shared.carried.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::SeqCst);
        let _rung = self.shared.bell.write(1);
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

struct Carrier {
    shared: Arc<Shared>,
    taps: Vec<File>,
    later: BinaryHeap<Reverse<Later>>,
    number: u64,
}

impl Carrier {
    fn carry(mut self, hit: impl Fn(u32)) {
        let mut frame = [0; FRAME_BYTES_MAX];
        while !self.shared.is_over.load(Ordering::SeqCst) {
            let readable = self.wait();
            for from in readable {
                // As many as are there; other interfaces come in between.
                while let Some(Ok(len)) = self.taps.get(from).map(|mut tap| tap.read(&mut frame)) {
                    for fault in self.take(from, frame.get(..len).unwrap_or_default()) {
                        hit(fault);
                    }
                    self.deliver();
                }
            }
            self.deliver();
        }
    }

    /// Waits until something is to be done, and says which interfaces have frames.
    fn wait(&self) -> Vec<usize> {
        let bell = PollFd::new(self.shared.bell.as_fd(), PollFlags::POLLIN);
        let taps = self.taps.iter();
        let taps = taps.map(|tap| PollFd::new(tap.as_fd(), PollFlags::POLLIN));
        let mut wanted: Vec<PollFd<'_>> = taps.chain([bell]).collect();
        let next = self.later.peek().map(|Reverse(later)| later.due);
        let timeout = next.map_or(PollTimeout::NONE, |due| {
            let left = due.saturating_duration_since(Instant::now());
            // A millisecond that has begun is waited for to its end.
            PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX)
        });
        let polled = poll(&mut wanted, timeout);
        let ready = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
        match polled {
            Ok(_) => {
                let taps = wanted.iter().take(self.taps.len()).enumerate();
                taps.filter_map(|(n, fd)| ready(fd).then_some(n)).collect()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Decides what becomes of a frame. Returns the faults that it is the first to meet.
    fn take(&mut self, from: usize, frame: &[u8]) -> Vec<u32> {
        let now = Instant::now();
        let mut hits = Vec::new();
        for to in (0..self.taps.len()).filter(|&to| to != from) {
            let mut rules = self
                .shared
                .rules
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let fate = rules.fate(now, from, to);
            drop(rules);
            hits.extend(&fate.hits);
            if fate.is_lost {
                continue;
            }
            for _ in 0..fate.copies {
                if self.later.len() >= ON_THEIR_WAY_MAX {
                    break;
                }
                let mut frame = frame.to_vec();
                fate.flips.iter().for_each(|&which| flip(&mut frame, which));
                self.number += 1;
                self.later.push(Reverse(Later {
                    due: now + fate.later,
                    number: self.number,
                    to,
                    frame,
                }));
            }
        }
        hits
    }

    /// Delivers what is due.
    fn deliver(&mut self) {
        let now = Instant::now();
        while self
            .later
            .peek()
            .is_some_and(|Reverse(next)| next.due <= now)
        {
            let Some(Reverse(next)) = self.later.pop() else {
                return;
            };
            // An interface whose queue is full loses the frame, as a wire does.
            if let Some(mut tap) = self.taps.get(next.to)
                && tap.write(&next.frame).is_ok()
            {
                self.shared.carried.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(action: FrameAction, percent: u8) -> FrameRule {
        FrameRule {
            fault: 7,
            action,
            percent,
            from: None,
            to: None,
            beside: None,
            until: Instant::now() + Duration::from_secs(60),
            seed: 1,
        }
    }

    fn fates(rule: FrameRule, count: usize) -> Vec<Fate> {
        let mut book = Rulebook::default();
        book.add(rule);
        (0..count)
            .map(|_| book.fate(Instant::now(), 0, 1))
            .collect()
    }

    #[test]
    fn share_of_the_frames_is_lost_and_the_first_one_is_told() {
        let lost = |seed| {
            let rule = FrameRule {
                seed,
                ..rule(FrameAction::Lose, 30)
            };
            let fates = fates(rule, 1000);
            let hits: usize = fates.iter().map(|fate| fate.hits.len()).sum();
            assert_eq!(hits, 1);
            fates.iter().map(|fate| fate.is_lost).collect::<Vec<_>>()
        };
        assert_eq!(lost(1), lost(1));
        assert_ne!(lost(1), lost(2));
        let share = lost(1).iter().filter(|lost| **lost).count();
        assert!((200..400).contains(&share), "{share}");
        assert!(
            fates(rule(FrameAction::Lose, 100), 9)
                .iter()
                .all(|f| f.is_lost)
        );
    }

    #[test]
    fn rules_know_whose_frames_they_are_about() {
        let (left, right, third) = (0, 1, 2);
        let of = |from, to, beside| FrameRule {
            from,
            to,
            beside,
            ..rule(FrameAction::Lose, 100)
        };
        let one_way = of(Some(left), Some(right), None);
        assert!(one_way.is_about(left, right));
        assert!(!one_way.is_about(right, left) && !one_way.is_about(left, third));
        let beside = of(None, None, Some(right));
        assert!(beside.is_about(left, right) && beside.is_about(right, third));
        assert!(!beside.is_about(left, third));
    }

    #[test]
    fn rule_that_is_over_does_nothing() {
        let mut over = rule(FrameAction::Lose, 100);
        over.until = Instant::now();
        assert!(!fates(over, 1)[0].is_lost);
    }

    #[test]
    fn flipped_bit_is_behind_the_head() {
        for which in 0..999 {
            let mut frame = [0; 20];
            flip(&mut frame, which);
            assert_eq!(frame[..ETHERNET_BYTES], [0; ETHERNET_BYTES]);
            let ones: u32 = frame.iter().map(|byte| byte.count_ones()).sum();
            assert_eq!(ones, 1);
        }
        flip(&mut [0; 14], 1);
        flip(&mut [], 1);
    }
}
