//! From a dead device process to its successor, on the gate's side.
//!
//! ```text
//!   dead and fenced ── completions that are in the used rings answered ── requests taken back
//!     ── window as if new ── successor publishes: is it like its predecessor? ── suspects, one by
//!     one ── the other requests, oldest first ── the guest's new ones
//! ```
//!
//! The journal is the truth: whatever the dead process left in its window is not looked at again, and
//! the guest sees a delay. A request that two processes died with is a *suspect* and is tried alone;
//! if the third dies with it too, it is answered with an error, so that it costs itself and not
//! the device.

use super::device::{Fault, Gate};
use super::journal::Entry;
use super::link::{Attachment, Phase};
use super::queue::{Backing, GateQueue, GuestFault, is_input};
use super::rings::RingAccount;
use bulkhead_ipc::ring::{ShadowDriver, WindowPages};
use bulkhead_ipc::window::{DriverView, Published};
use vm_memory::GuestMemoryMmap;

/// Deaths after which a request is tried alone.
const DEATHS_SUSPECT: u8 = 2;
/// Deaths after which it is not tried any more.
const DEATHS_MAX: u8 = 3;

/// What takes a dead device process's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Successor {
    /// Its generation.
    pub generation: u32,
    /// Whether what the dead one was working on may have killed it.
    pub blame: bool,
    /// Whether its disk may have another size than before, as its owner wants it.
    pub fields_change: bool,
}

impl Gate {
    /// The device process is dead and nothing of its I/O is left: makes everything ready for the next one. A
    /// generation that is not newer changes nothing.
    pub(crate) fn prepare(&mut self, memory: &GuestMemoryMmap, successor: Successor) {
        let Successor {
            generation,
            blame,
            fields_change,
        } = successor;
        if generation <= self.generation {
            return;
        }
        if self.is_attached() {
            self.take_last_completions(memory);
        }
        let blame = blame && self.published;
        let mut output_position = None;
        for n in 0..self.queues.len() {
            let Some(queue) = self.queues.get_mut(n) else {
                break;
            };
            let Retired { condemned, dropped } = queue.retire(self.epoch, blame);
            for head in dropped {
                queue.put_used(memory, head, 0);
            }
            for entry in &condemned {
                queue.fail(memory, entry);
                self.faults.push(Fault::GivenUp(describe(n, entry)));
            }
            if queue.is_positioned() {
                let stream = self.streams.get(n).copied().unwrap_or(0);
                output_position = Some(queue.first_position().unwrap_or(stream));
            }
        }
        self.pages = WindowPages::new(self.channel.window.layout.data_pages);
        self.raise_if_wanted(memory);
        self.generation = generation;
        self.fields_change = fields_change;
        self.published = false;
        self.rings = RingAccount::new();
        let suspects = self.queues.iter().any(GateQueue::has_suspects);
        self.hold(suspects);
        self.known_seq = 0;
        self.link.set_needs_reset(self.guest_at_fault);
        self.channel.window.renew(generation, self.driver_view());
        let input = self.queues.iter().zip(&self.streams);
        let input = input.filter(|(queue, _)| queue.waits_for_input());
        let input_position = input.map(|(_, &stream)| stream).next();
        self.phase = Phase::Prepared;
        self.tell(Attachment {
            generation,
            phase: Phase::Prepared,
            output_position: output_position.unwrap_or(0),
            input_position: input_position.unwrap_or(0),
        });
    }

    /// What the dead process completed and nobody has seen yet is as good as ever. Nonsense only means
    /// that the rest is done again.
    fn take_last_completions(&mut self, memory: &GuestMemoryMmap) {
        self.each_queue(memory, |queue, backing| {
            let mut no_limit = u32::MAX;
            if let Err(fault) = queue.complete(backing, &mut no_limit) {
                tracing::debug!(%fault, "the dead process left nonsense in a used ring");
            }
            // Nonsense of the guest's stays where it is, and the next turn finds it.
            let _dealt = queue.deal(backing, &mut no_limit);
        });
    }

    /// Whether a successor is what its predecessor was, so that the guest need not know of it.
    ///
    /// # Errors
    /// How it differs.
    pub(super) fn compare(&self, published: &Published) -> Result<(), String> {
        let image = self.link.config();
        let lacking = image.features & !published.features;
        if lacking != 0 {
            return Err(format!("lacks features {lacking:#x} of its predecessor"));
        }
        if !self.kind.fields_are_fixed() || (self.fields_change && !self.published) {
            return Ok(());
        }
        for &(offset, len) in self.kind.device_fields() {
            let range = usize::from(offset)..usize::from(offset) + usize::from(len);
            if image.bytes.get(range.clone()) != published.config.get(range) {
                return Err(format!(
                    "has another configuration at offset {offset} than its predecessor"
                ));
            }
        }
        Ok(())
    }

    /// Gives the next suspect to the device once nothing else is with it; lets the other requests go
    /// when none is left.
    pub(super) fn try_suspects(
        &mut self,
        memory: &GuestMemoryMmap,
        budget: &mut u32,
    ) -> Result<(), GuestFault> {
        if self.waits_for_device() || *budget == 0 {
            return Ok(());
        }
        *budget -= 1;
        let mut tried = None;
        self.each_queue(memory, |queue, backing| {
            if tried.is_none() && queue.has_suspects() {
                tried = Some(queue.submit_suspect(backing));
            }
        });
        tried.unwrap_or_else(|| {
            self.hold(false);
            Ok(())
        })
    }

    /// While suspects are tried nothing else is taken.
    fn hold(&mut self, alone: bool) {
        self.alone = alone;
        self.queues.iter_mut().for_each(|queue| queue.held = alone);
    }

    pub(super) fn driver_view(&self) -> DriverView {
        DriverView {
            features: if self.running {
                self.features | self.kind.gate_features()
            } else {
                0
            },
            epoch: self.epoch * 2 + u64::from(self.running),
        }
    }
}

/// What a dead process had that its successor is not given.
struct Retired {
    /// Too many died with it.
    condemned: Vec<Entry>,
    /// Heads of what counts as done: frames, which may get lost on any wire.
    dropped: Vec<u16>,
}

impl GateQueue {
    /// The device process is dead: takes back what it had. Returns the requests that are not to be
    /// tried again.
    fn retire(&mut self, epoch: u64, blame: bool) -> Retired {
        let mut back = Vec::new();
        let mut dropped = Vec::new();
        for place in &mut self.journal {
            if !place.in_flight {
                continue;
            }
            let mut entry = std::mem::take(place);
            (entry.in_flight, entry.pages) = (false, None);
            let is_room = self.frames.is_some();
            if entry.epoch != epoch || self.guest.is_none() || entry.answered || is_room {
                // A leftover of before the guest's reset, or nobody waits for it.
                continue;
            }
            if self.droppable {
                dropped.push(entry.head);
                continue;
            }
            if blame && !(self.framing.waits_for_input && is_input(&entry)) {
                entry.deaths = entry.deaths.saturating_add(1);
            }
            back.push(entry);
        }
        back.extend(self.suspects.drain(..));
        back.extend(self.replay.drain(..));
        back.extend(self.waiting.take());
        back.sort_by_key(|entry| entry.order);
        self.shadow = ShadowDriver::new(self.layout);
        self.answered = 0;
        self.pages_held = 0;
        if let Some(frames) = &mut self.frames {
            frames.begin_anew();
        }
        let mut condemned = Vec::new();
        for entry in back {
            match entry.deaths {
                DEATHS_MAX.. => condemned.push(entry),
                DEATHS_SUSPECT.. => self.suspects.push_back(entry),
                _ => self.replay.push_back(entry),
            }
        }
        Retired { condemned, dropped }
    }

    fn has_suspects(&self) -> bool {
        !self.suspects.is_empty()
    }

    fn submit_suspect(&mut self, backing: &mut Backing<'_>) -> Result<(), GuestFault> {
        assert!(self.waiting.is_none(), "nothing is taken beside a suspect");
        self.waiting = self.suspects.pop_front();
        let submitted = self.submit_waiting(backing)?;
        assert!(submitted, "an empty window has room for any one request");
        Ok(())
    }

    fn is_positioned(&self) -> bool {
        self.framing.positioned
    }

    /// Position of the oldest request that is to be done again.
    fn first_position(&self) -> Option<u64> {
        let again = self.suspects.iter().chain(&self.replay);
        again.map(|entry| entry.stream_position).min()
    }
}

fn describe(queue: usize, entry: &Entry) -> String {
    format!(
        "a request of queue {queue} with {} bytes to read and {} to write: {} processes died with it",
        entry.readable_bytes, entry.writable_bytes, entry.deaths
    )
}
