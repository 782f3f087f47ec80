//! One virtio device behind its gates: all its queues, its window, and what its device process has
//! published.
//!
//! Called by the gate thread alone. What vCPU threads need of it is in [`GateLink`], which both
//! hold: a few atomics, and the configuration image under a lock that is only ever held for a copy.

use super::queue::{Backing, GateQueue, GuestFault, Taken};
use bulkhead_ipc::device_kind::{CONFIG_BYTES_MAX, VirtioKind};
use bulkhead_ipc::protocol::birth::VirtioSlot;
use bulkhead_ipc::ring::WindowPages;
use bulkhead_ipc::window::{DeviceState, Doorbells, DriverView, Published, Window};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// Requests and completions that one device may take up in one pass, so that a flood on one device
/// does not starve the others on the same thread.
const PASS_BUDGET: u32 = 256;
/// Bit in the interrupt status register: used ring.
const INTERRUPT_VRING: u32 = 1;
/// Bit in the interrupt status register: configuration or status.
const INTERRUPT_CONFIG: u32 = 2;

/// The configuration space as the guest reads it.
#[derive(Debug, Clone)]
pub(crate) struct ConfigImage {
    /// Configuration bytes.
    pub(crate) bytes: Vec<u8>,
    /// Device feature bits on offer, without the transport's.
    pub(crate) features: u64,
    /// Counts changes (virtio-mmio ConfigGeneration).
    pub(crate) generation: u32,
    /// Whether the device has published its own fields, or never will.
    pub(crate) settled: bool,
    /// Guest resets that the gate has carried out.
    pub(crate) resets_done: u64,
}

/// What vCPU threads and the gate thread share about one device.
#[derive(Debug)]
pub(crate) struct GateLink {
    /// InterruptStatus register.
    pub(crate) interrupt_status: AtomicU32,
    /// Nonzero when the device needs a reset by the driver.
    pub(crate) needs_reset: AtomicU32,
    /// The irqfd.
    pub(crate) interrupt: EventFd,
    config: Mutex<ConfigImage>,
    changed: Condvar,
}

impl GateLink {
    pub(crate) fn new(slot: &VirtioSlot, interrupt: EventFd) -> Self {
        let mut bytes = slot.config.clone();
        bytes.resize(slot.kind.config_bytes(), 0);
        let config = ConfigImage {
            bytes,
            features: slot.features,
            generation: 0,
            settled: false,
            resets_done: 0,
        };
        Self {
            interrupt_status: AtomicU32::new(0),
            needs_reset: AtomicU32::new(0),
            interrupt,
            config: Mutex::new(config),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn config(&self) -> MutexGuard<'_, ConfigImage> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most `within`; woken by every change. Returns the image as it is then.
    pub(crate) fn wait_config(
        &self,
        within: Duration,
        mut done: impl FnMut(&ConfigImage) -> bool,
    ) -> MutexGuard<'_, ConfigImage> {
        let guard = self.config();
        let waited = self
            .changed
            .wait_timeout_while(guard, within, |image| !done(image));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Tells the driver to look at configuration and status.
    pub(crate) fn raise_config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    fn raise(&self, bits: u32) {
        self.interrupt_status.fetch_or(bits, Ordering::AcqRel);
        // An irqfd that cannot count further has an interrupt pending already.
        let _already_pending = self.interrupt.write(1);
    }
}

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
}

/// One device.
#[derive(Debug)]
pub(crate) struct Gate {
    kind: VirtioKind,
    window: Window,
    bells: Doorbells,
    pages: WindowPages,
    queues: Vec<GateQueue>,
    streams: Vec<u64>,
    link: std::sync::Arc<GateLink>,
    /// Sequence number of the last publication taken.
    known_seq: u32,
    /// Feature bits negotiated; meaningful while running.
    features: u64,
    /// Guest resets so far; requests of earlier epochs are leftovers.
    epoch: u64,
    running: bool,
    /// Queues that start once the leftovers of the last epoch have come back.
    starting: Option<Vec<Option<Queue>>>,
    dead: bool,
    faults: Vec<Fault>,
}

impl Gate {
    pub(crate) fn new(
        slot: &VirtioSlot,
        window: Window,
        bells: Doorbells,
        link: std::sync::Arc<GateLink>,
    ) -> Self {
        window.initialise(slot.generation);
        let queues: Vec<_> = (0..slot.queue_sizes.len())
            .filter_map(|n| GateQueue::new(n, slot.kind.framing(n), &window))
            .collect();
        Self {
            kind: slot.kind,
            pages: WindowPages::new(window.layout.data_pages),
            streams: vec![0; queues.len()],
            queues,
            window,
            bells,
            link,
            known_seq: 0,
            features: 0,
            epoch: 0,
            running: false,
            starting: None,
            dead: false,
            faults: Vec::new(),
        }
    }

    /// The doorbell that the device rings.
    pub(crate) fn call_bell(&self) -> &EventFd {
        self.bells.call.eventfd()
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
        self.starting = None;
        self.queues.iter_mut().for_each(GateQueue::detach);
        self.tell_driver(0);
        self.link.needs_reset.store(0, Ordering::Release);
        self.link.interrupt_status.store(0, Ordering::Release);
        self.link.config().resets_done += 1;
        self.link.notify();
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

    /// The device process is gone.
    pub(crate) fn lost(&mut self) {
        if !self.dead {
            self.dead = true;
            self.settle(|_| {});
            self.need_reset();
        }
    }

    fn tell_driver(&self, features: u64) {
        let epoch = self.epoch * 2 + u64::from(self.running);
        self.window.set_driver(DriverView { features, epoch });
        self.bells.kick.ring();
    }

    /// Returns whether queues were started.
    fn start_if_drained(&mut self, memory: &GuestMemoryMmap) -> bool {
        if self.starting.is_none() {
            return false;
        }
        if !self.dead && self.queues.iter().any(|q| q.in_flight() > 0) {
            return false;
        }
        let Some(queues) = self.starting.take() else {
            return false;
        };
        self.running = true;
        self.tell_driver(self.features);
        let started: Result<(), GuestFault> = self
            .queues
            .iter_mut()
            .zip(queues)
            .filter_map(|(gate, guest)| guest.map(|guest| (gate, guest)))
            .try_for_each(|(gate, guest)| gate.activate(guest, memory));
        if let Err(fault) = started {
            self.guest_fault(&fault);
        }
        true
    }

    fn guest_fault(&mut self, fault: &GuestFault) {
        self.faults.push(Fault::Guest(fault.to_string()));
        self.need_reset();
        self.running = false;
        self.queues.iter_mut().for_each(GateQueue::detach);
    }

    fn device_fault(&mut self, reason: String) {
        self.faults.push(Fault::Device(reason));
        self.lost();
    }

    fn need_reset(&self) {
        self.link.needs_reset.store(1, Ordering::Release);
        if self.running {
            self.link.raise(INTERRUPT_CONFIG);
        }
    }

    /// Changes the configuration image and marks it settled.
    fn settle(&self, change: impl FnOnce(&mut ConfigImage)) {
        let mut image = self.link.config();
        change(&mut image);
        image.settled = true;
        drop(image);
        self.link.notify();
    }

    /// Takes over what the device published: its own fields, and fewer features.
    fn take_publication(&mut self) {
        if self.dead {
            return;
        }
        if self.window.device_state() == DeviceState::Failed {
            self.device_fault("the device says that it failed".to_owned());
            return;
        }
        let Some(published) = self.window.published(self.known_seq) else {
            return;
        };
        self.known_seq = published.seq;
        let fields = self.kind.device_fields();
        let mut changed = false;
        self.settle(|image| {
            let first = !image.settled;
            changed = apply(image, fields, &published) && !first;
            if first {
                image.features &= published.features;
            }
            if changed {
                image.generation = image.generation.wrapping_add(1);
            }
        });
        if changed && self.running {
            self.link.raise(INTERRUPT_CONFIG);
        }
    }

    /// Does what there is to do now, without asking anybody to ring.
    pub(crate) fn pass(&mut self, memory: &GuestMemoryMmap) -> Pass {
        self.take_publication();
        self.start_if_drained(memory);
        if self.dead {
            return self.dead_pass(memory);
        }
        for queue in &mut self.queues {
            queue.quiet(memory, &self.window.memory);
        }
        let mut budget = PASS_BUDGET;
        while self.turn(memory, &mut budget) && !self.dead && budget > 0 {}
        if self.dead || budget < PASS_BUDGET {
            Pass::Again
        } else {
            Pass::Quiet
        }
    }

    /// Asks guest and device to ring at the next request or completion. Returns whether there is
    /// something to do already, in which case the caller must not sleep.
    pub(crate) fn arm(&mut self, memory: &GuestMemoryMmap) -> bool {
        let window = &self.window.memory;
        let dead = self.dead;
        self.queues.iter_mut().fold(false, |more, queue| {
            let here = if dead {
                queue.listen_guest(memory)
            } else {
                queue.listen(memory, window)
            };
            more | here
        })
    }

    /// Whether there is something to do. Cheap, and changes nothing.
    pub(crate) fn has_work(&self, memory: &GuestMemoryMmap) -> bool {
        self.queues
            .iter()
            .any(|queue| queue.has_work(memory, &self.window.memory))
    }

    /// Whether a driver is likely to be waiting for this device's answers, so that looking for its
    /// next request for a moment pays.
    pub(crate) const fn is_latency_bound(&self) -> bool {
        matches!(self.kind, VirtioKind::Blk) && self.running && !self.dead
    }

    /// Whether the device process is working on requests.
    pub(crate) fn waits_for_device(&self) -> bool {
        self.queues.iter().any(|queue| queue.in_flight() > 0)
    }

    /// One round over the queues: completions first, since they free slots and pages. Returns
    /// whether it did anything.
    fn turn(&mut self, memory: &GuestMemoryMmap, budget: &mut u32) -> bool {
        let before = *budget;
        let mut guest_fault = None;
        let mut device_fault = None;
        let mut kick = false;
        let mut interrupt = false;
        for (queue, stream) in self.queues.iter_mut().zip(&mut self.streams) {
            let mut backing = Backing {
                memory,
                window: &self.window,
                pages: &mut self.pages,
                stream,
                epoch: self.epoch,
            };
            if let Err(fault) = queue.complete(&mut backing, budget) {
                device_fault = Some(fault.to_string());
                break;
            }
            match queue.take(&mut backing, budget) {
                Ok(Taken::All | Taken::Some) => {}
                Err(fault) => guest_fault = Some(fault),
            }
            kick |= queue.announce(&self.window.memory);
            interrupt |= queue.wants_interrupt(memory);
        }
        if kick {
            self.bells.kick.ring();
        }
        if interrupt {
            self.link.raise(INTERRUPT_VRING);
        }
        if let Some(fault) = guest_fault {
            self.guest_fault(&fault);
        }
        if let Some(reason) = device_fault {
            self.device_fault(reason);
        }
        let started = self.start_if_drained(memory);
        started || *budget != before
    }

    /// A device without a process answers with errors, so that nothing hangs.
    fn dead_pass(&mut self, memory: &GuestMemoryMmap) -> Pass {
        let mut budget = PASS_BUDGET;
        let mut interrupt = false;
        let mut fault = None;
        for (queue, stream) in self.queues.iter_mut().zip(&mut self.streams) {
            let mut backing = Backing {
                memory,
                window: &self.window,
                pages: &mut self.pages,
                stream,
                epoch: self.epoch,
            };
            if let Err(e) = queue.fail_all(&mut backing, &mut budget) {
                fault = Some(e);
                continue;
            }
            interrupt |= queue.wants_interrupt(memory);
        }
        if interrupt {
            self.link.raise(INTERRUPT_VRING);
        }
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
