//! One virtio device behind its gates: all its queues, its window, and what its device process has
//! published.
//!
//! Called by the gate thread alone. What other threads need of it is in [`GateLink`]. What happens
//! when the device process dies is in [`super::succession`].

use super::frames::Frames;
use super::link::{Attachment, ConfigImage, GateLink, INTERRUPT_CONFIG, INTERRUPT_VRING, Phase};
use super::queue::{Backing, GateQueue, GuestFault};
use super::rings::RingAccount;
use bulkhead_ipc::device_kind::{CONFIG_BYTES_MAX, NET_MQ, NET_MRG_RXBUF, VirtioKind};
use bulkhead_ipc::protocol::birth::VirtioSlot;
use bulkhead_ipc::ring::WindowPages;
use bulkhead_ipc::window::{DeviceState, Doorbells, Published, Window};
use std::sync::Arc;
use std::time::Instant;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Requests and completions that one device may take up in one pass, so that a flood on one device
/// does not starve the others on the same thread.
const PASS_BUDGET: u32 = 256;

/// What a pass over a device left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pass {
    /// Nothing to do. The doorbells are not armed: see [`Gate::arm`].
    Quiet,
    /// It did something, so there may be more; run again after the other devices.
    Again,
}

/// A fault to be told to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    Guest(String),
    Device(String),
    /// A request that killed too many device processes.
    GivenUp(String),
}

/// What one round has found.
#[derive(Debug, Default)]
struct Faults {
    guest: Option<GuestFault>,
    device: Option<String>,
}

/// What a gate shares with the device process, whichever it is: it outlives all of them.
#[derive(Debug)]
pub(crate) struct DeviceChannel {
    /// The window.
    pub(crate) window: Window,
    /// The doorbells.
    pub(crate) bells: Doorbells,
}

/// One device.
#[derive(Debug)]
pub(crate) struct Gate {
    pub(super) kind: VirtioKind,
    pub(super) channel: Arc<DeviceChannel>,
    pub(super) pages: WindowPages,
    pub(super) queues: Vec<GateQueue>,
    pub(super) streams: Vec<u64>,
    pub(super) link: Arc<GateLink>,
    /// Generation of the device process that the window is for.
    pub(super) generation: u32,
    pub(super) phase: Phase,
    /// Whether that process may publish other fields than the one before.
    pub(super) fields_change: bool,
    /// Whether that process has published its configuration.
    pub(super) published: bool,
    /// Whether any process of this device has.
    known: bool,
    /// Sequence number of the last publication taken.
    pub(super) known_seq: u32,
    /// Feature bits negotiated; meaningful while running.
    pub(super) features: u64,
    /// Guest resets so far; requests of earlier epochs are leftovers.
    pub(super) epoch: u64,
    /// Requests so far.
    pub(super) order: u64,
    pub(super) running: bool,
    /// The guest broke the protocol and has not reset the device since.
    pub(super) guest_at_fault: bool,
    /// A suspicious request is alone with the device.
    pub(super) alone: bool,
    /// Queues that start once the leftovers of the last epoch have come back.
    starting: Option<Vec<Option<Queue>>>,
    pub(super) faults: Vec<Fault>,
    news: bool,
    /// What the device process may still ring for.
    pub(super) rings: RingAccount,
    is_crowded: bool,
}

impl Gate {
    /// `is_crowded` says whether vCPUs, gate thread and device process have not a CPU each.
    pub(crate) fn new(
        slot: &VirtioSlot,
        channel: Arc<DeviceChannel>,
        link: Arc<GateLink>,
        is_crowded: bool,
    ) -> Self {
        channel.window.initialise(slot.generation);
        let queues: Vec<_> = (0..slot.queue_sizes.len())
            .filter_map(|n| GateQueue::new(n, slot.kind, &channel.window))
            .collect();
        let streams = (0..queues.len()).map(|n| match slot.kind.framing(n) {
            framing if framing.positioned => slot.output_position,
            framing if framing.waits_for_input => slot.input_position,
            _ => 0,
        });
        Self {
            kind: slot.kind,
            pages: WindowPages::new(channel.window.layout.data_pages),
            streams: streams.collect(),
            queues,
            channel,
            link,
            generation: slot.generation,
            phase: Phase::Starting,
            fields_change: false,
            published: false,
            known: false,
            known_seq: 0,
            features: 0,
            epoch: 0,
            order: 0,
            running: false,
            guest_at_fault: false,
            alone: false,
            starting: None,
            faults: Vec::new(),
            news: false,
            rings: RingAccount::new(),
            is_crowded,
        }
    }

    /// Whether a device process serves, or the first one is about to.
    pub(super) const fn is_attached(&self) -> bool {
        matches!(self.phase, Phase::Starting | Phase::Serving)
    }

    /// Lets the control thread know which process there is.
    pub(super) fn tell(&mut self, attachment: Attachment) {
        self.link.set_attachment(attachment);
        self.news = true;
    }

    fn enter(&mut self, phase: Phase) {
        self.phase = phase;
        let before = self.link.attachment();
        self.tell(Attachment { phase, ..before });
    }

    /// Whether [`GateLink::attachment`] has changed since the last call.
    pub(crate) fn take_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    /// The doorbell that the device rings.
    pub(crate) fn call_bell(&self) -> &EventFd {
        self.channel.bells.call.eventfd()
    }

    /// The device rang. Returns whether there is a reason to look at it: not when its process is to be
    /// replaced anyway.
    pub(crate) fn rung(&mut self) -> bool {
        if matches!(self.phase, Phase::Broken | Phase::Lost) {
            return false;
        }
        if self.rings.draw(Instant::now).is_err() {
            self.device_fault("rings its doorbell without a pause, for nothing".to_owned());
        }
        true
    }

    /// Faults since the last call.
    pub(crate) fn take_faults(&mut self) -> Vec<Fault> {
        std::mem::take(&mut self.faults)
    }

    /// The guest reset the device. Its requests are forgotten; what the device still holds is
    /// waited for before the next start, without holding the guest up.
    pub(crate) fn reset(&mut self) {
        self.epoch += 1;
        self.running = false;
        self.guest_at_fault = false;
        self.starting = None;
        self.detach();
        self.tell_driver();
        self.link.reset_is_done();
    }

    /// Gives up everything but what it shares with other threads.
    pub(super) fn into_link(self) -> Arc<GateLink> {
        self.link
    }

    /// The guest set DRIVER_OK.
    pub(crate) fn activate(
        &mut self,
        memory: &GuestMemoryMmap,
        features: u64,
        queues: Vec<Option<Queue>>,
    ) {
        self.features = features;
        self.starting = Some(queues);
        self.start_if_drained(memory);
    }

    /// The device process is gone for good, or until somebody asks for a new one.
    pub(crate) fn lost(&mut self) {
        if self.phase != Phase::Lost {
            self.enter(Phase::Lost);
            self.link.settle(|_| {});
            self.need_reset();
        }
    }

    fn tell_driver(&mut self) {
        // The device may answer each start with a ring for each of its queues.
        let queues = u32::try_from(self.queues.len()).unwrap_or(0);
        self.rings.earn(1 + queues);
        self.channel.window.set_driver(self.driver_view());
        self.channel.bells.kick.ring();
    }

    /// Returns whether queues were started.
    fn start_if_drained(&mut self, memory: &GuestMemoryMmap) -> bool {
        if self.starting.is_none() {
            return false;
        }
        if self.phase != Phase::Lost && self.queues.iter().any(|q| q.in_flight() > 0) {
            return false;
        }
        let Some(queues) = self.starting.take() else {
            return false;
        };
        self.running = true;
        // A driver that has event indexes looks at its queues and not at why it was interrupted (decision 0035).
        let event_index = self.features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        self.link.take_acknowledgements(event_index);
        self.tell_driver();
        let frames: Vec<_> = (0..self.queues.len()).map(|n| self.frames(n)).collect();
        let started: Result<(), GuestFault> = self
            .queues
            .iter_mut()
            .zip(queues.into_iter().zip(frames))
            .filter_map(|(gate, (guest, frames))| Some((gate, guest?, frames)))
            .try_for_each(|(gate, guest, frames)| gate.activate(guest, frames, memory));
        if let Err(fault) = started {
            self.guest_fault(&fault);
        }
        true
    }

    fn guest_fault(&mut self, fault: &GuestFault) {
        self.faults.push(Fault::Guest(fault.to_string()));
        self.guest_at_fault = true;
        self.need_reset();
        self.running = false;
        self.detach();
    }

    fn detach(&mut self) {
        let pages = &mut self.pages;
        self.queues.iter_mut().for_each(|queue| queue.detach(pages));
    }

    /// What queue `n` needs besides its rings if it is to receive frames.
    fn frames(&self, n: usize) -> Option<Frames> {
        let pairs = match self.features & NET_MQ {
            0 => 1,
            _ => self.queues.len() / 2,
        };
        let receives = self.kind.framing(n).frames && n / 2 < pairs;
        receives.then(|| Frames::new(self.features & NET_MRG_RXBUF != 0))
    }

    fn device_fault(&mut self, reason: String) {
        self.faults.push(Fault::Device(reason));
        self.enter(Phase::Broken);
    }

    fn need_reset(&self) {
        self.link.set_needs_reset(true);
        if self.running {
            self.link.raise_at_once(INTERRUPT_CONFIG);
        }
    }

    /// Takes over what the device published: its own fields, and fewer features.
    fn take_publication(&mut self) {
        if matches!(self.phase, Phase::Broken | Phase::Lost) {
            return;
        }
        if self.channel.window.device_state() == DeviceState::Failed {
            self.device_fault("the device says that it failed".to_owned());
            return;
        }
        let Some(published) = self.channel.window.published(self.known_seq) else {
            return;
        };
        self.known_seq = published.seq;
        // What one process after the other must have in common, one of them has for as long as it lives.
        if self.known
            && let Err(difference) = self.compare(&published)
        {
            self.device_fault(difference);
            return;
        }
        self.known = true;
        if !std::mem::replace(&mut self.published, true) {
            self.enter(Phase::Serving);
        }
        let fields = self.kind.device_fields();
        let mut changed = false;
        self.link.settle(|image| {
            let first = !image.settled;
            changed = apply(image, fields, &published) && !first;
            if first {
                image.features &= published.features;
            }
        });
        if changed && self.running {
            self.link.raise_at_once(INTERRUPT_CONFIG);
        }
    }

    /// Does what there is to do now, without asking anybody to ring.
    pub(crate) fn pass(&mut self, memory: &GuestMemoryMmap) -> Pass {
        self.take_publication();
        self.start_if_drained(memory);
        if self.phase == Phase::Lost {
            return self.dead_pass(memory);
        }
        for queue in &mut self.queues {
            queue.quiet(memory, &self.channel.window.memory);
        }
        if !self.is_attached() {
            return Pass::Quiet;
        }
        let mut budget = PASS_BUDGET;
        while self.turn(memory, &mut budget) && self.is_attached() && budget > 0 {}
        if !self.is_attached() || budget < PASS_BUDGET {
            Pass::Again
        } else {
            Pass::Quiet
        }
    }

    /// Asks guest and device to ring at the next request or completion. Returns whether there is
    /// something to do already, in which case the caller must not sleep.
    pub(crate) fn arm(&mut self, memory: &GuestMemoryMmap) -> bool {
        let window = &self.channel.window.memory;
        let phase = self.phase;
        // It may be the pages of another queue that one waits for.
        let lacks_pages = self.queues.iter().any(GateQueue::has_waiting);
        self.queues.iter_mut().fold(false, |more, queue| {
            let here = match phase {
                Phase::Lost => queue.listen_guest(memory),
                // A successor rings when it is there, and everything is looked at then.
                Phase::Broken | Phase::Prepared => false,
                Phase::Starting | Phase::Serving => queue.listen(memory, window, lacks_pages),
            };
            more | here
        })
    }

    /// Whether there is something to do. Cheap, and changes nothing.
    pub(crate) fn has_work(&self, memory: &GuestMemoryMmap) -> bool {
        let window = &self.channel.window.memory;
        self.is_attached() && self.queues.iter().any(|q| q.has_work(memory, window))
    }

    /// Whether a driver is likely to be waiting for this device's answers, so that looking for its
    /// next request for a moment pays.
    pub(crate) const fn is_latency_bound(&self) -> bool {
        matches!(self.kind, VirtioKind::Blk | VirtioKind::Fs) && self.running && self.is_attached()
    }

    /// Whether the device process is working on requests.
    pub(crate) fn waits_for_device(&self) -> bool {
        self.queues.iter().any(|queue| queue.in_flight() > 0)
    }

    /// Lets `work` do something with every queue, and with what all of them work on.
    pub(super) fn each_queue(
        &mut self,
        memory: &GuestMemoryMmap,
        mut work: impl FnMut(&mut GateQueue, &mut Backing<'_>),
    ) {
        for (queue, stream) in self.queues.iter_mut().zip(&mut self.streams) {
            let mut backing = Backing {
                memory,
                window: &self.channel.window,
                pages: &mut self.pages,
                stream,
                order: &mut self.order,
                epoch: self.epoch,
                is_crowded: self.is_crowded,
            };
            work(queue, &mut backing);
        }
    }

    /// One round over the queues: completions first, since they free slots and pages. Returns whether it did anything.
    /// The device hears of what is to be sent before it is dealt what has come: the other end waits for it.
    fn turn(&mut self, memory: &GuestMemoryMmap, budget: &mut u32) -> bool {
        let before = *budget;
        let mut faults = Faults::default();
        // Half of it, so that who sends without a pause receives as well.
        let half = budget.div_ceil(2);
        let mut sending = half;
        self.serve(memory, &mut sending, &mut faults, |queue| queue.droppable);
        *budget -= half - sending;
        self.serve(memory, budget, &mut faults, |queue| !queue.droppable);
        if self.alone && faults.device.is_none() {
            let tried = self.try_suspects(memory, budget);
            faults.guest = tried.err();
            self.announce();
        }
        self.raise_if_wanted(memory);
        if let Some(fault) = faults.guest {
            self.guest_fault(&fault);
        }
        if let Some(reason) = faults.device {
            self.device_fault(reason);
        }
        let started = self.start_if_drained(memory);
        started || *budget != before
    }

    /// Takes completions and requests of those queues that `are_meant`, and wakes the device if it has asked for that.
    fn serve(
        &mut self,
        memory: &GuestMemoryMmap,
        budget: &mut u32,
        faults: &mut Faults,
        are_meant: impl Fn(&GateQueue) -> bool,
    ) {
        let alone = self.alone;
        let mut completions = 0;
        self.each_queue(memory, |queue, backing| {
            if faults.device.is_some() || !are_meant(queue) {
                return;
            }
            match queue.complete(backing, budget) {
                Ok(done) => completions += done,
                Err(fault) => {
                    faults.device = Some(fault.to_string());
                    return;
                }
            }
            if !alone && let Err(fault) = queue.take(backing, budget) {
                faults.guest = Some(fault);
            }
        });
        self.rings.earn(completions);
        self.announce();
    }

    fn announce(&mut self) {
        let window = &self.channel.window.memory;
        let queues = self.queues.iter_mut();
        if queues.fold(false, |kick, queue| kick | queue.announce(window)) {
            self.channel.bells.kick.ring();
        }
    }

    pub(super) fn raise_if_wanted(&mut self, memory: &GuestMemoryMmap) {
        let queues = self.queues.iter_mut();
        let wanted = queues.fold(false, |wanted, queue| {
            wanted | queue.wants_interrupt(memory)
        });
        if wanted {
            self.link.raise_at_once(INTERRUPT_VRING);
        }
    }

    /// A device without a process answers with errors, so that nothing hangs.
    fn dead_pass(&mut self, memory: &GuestMemoryMmap) -> Pass {
        let mut budget = PASS_BUDGET;
        let mut fault = None;
        self.each_queue(memory, |queue, backing| {
            if let Err(e) = queue.fail_all(backing, &mut budget) {
                fault = Some(e);
            }
        });
        self.raise_if_wanted(memory);
        if let Some(fault) = fault {
            self.guest_fault(&fault);
        }
        if budget == 0 && self.running {
            Pass::Again
        } else {
            Pass::Quiet
        }
    }
}

/// Copies the device's own fields into the image. Returns whether anything changed.
fn apply(image: &mut ConfigImage, fields: &[(u16, u16)], published: &Published) -> bool {
    let mut changed = false;
    for &(offset, len) in fields {
        let range = usize::from(offset)..usize::from(offset) + usize::from(len);
        debug_assert!(range.end <= CONFIG_BYTES_MAX);
        if let (Some(to), Some(from)) = (
            image.bytes.get_mut(range.clone()),
            published.config.get(range),
        ) && to != from
        {
            to.copy_from_slice(from);
            changed = true;
        }
    }
    changed
}
