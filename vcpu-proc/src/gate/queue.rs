//! One virtqueue behind a gate: the guest's ring on one side, the shadow queue on the other.
//!
//! Invariant: every in-flight slot of the shadow queue has a journal entry, and the other way
//! round. A guest reset ends the guest's interest in its entries at once, but their window pages
//! stay taken until the device has returned them, since it may still be writing there.
//!
//! What counts as done when its device process dies, counts as done as soon as the device may have it: a frame that is
//! sent is in the window then, and the guest's buffer is nobody's concern any more. Its slot comes back when
//! somebody looks, and nobody is woken for it while there are others.
//!
//! When the device process has died, [`GateQueue::retire`] takes its requests back, and they are the
//! first that its successor is given.

use super::copy::{Direction, NotMemory, copy_spans};
use super::frames::Frames;
use super::journal::{Entry, GuestSpan};
use bulkhead_ipc::device_kind::{
    FUSE_ANSWER_BYTES, Failure, Framing, HEAD_SLOT_BYTES, POSITION_BYTES, ReplayClass, TAIL_OFFSET,
    VirtioKind,
};
use bulkhead_ipc::ring::{
    Completion, PageRange, RequestLayout, RingFault, ShadowDriver, Span, WindowPages,
};
use bulkhead_ipc::shared::SharedMemory;
use bulkhead_ipc::window::{DATA_PAGE_BYTES, QueueLayout, Window};
use bulkhead_runtime::used;
use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Longest chain of descriptors, indirect ones included.
pub(super) const CHAIN_DESCRIPTORS_MAX: usize = 1024;
/// Window pages that a device which answers at once has of a queue at a time. Data crosses a window twice, and
/// costs half as much when the pages are still in the cache of a CPU; more requests would not make
/// such a device faster.
const HOT_PAGES: usize = 128;
/// The same where vCPUs, gate and device have not a CPU each, so that mostly one of the last two is at work. Two requests of
/// 128 KiB fit with their headers, or four large frames.
const HOT_PAGES_CROWDED: usize = 72;
const STATUS_IOERR: u8 = 1;
const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// The guest broke the virtio protocol (virtio 1.2 section 2.7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GuestFault {
    /// A descriptor names memory that is not there.
    #[error(transparent)]
    NotMemory(#[from] NotMemory),
    /// The chain loops, is longer than the queue, or points outside of its table.
    #[error("descriptor chain {head} ends in the middle")]
    Truncated {
        /// Head descriptor.
        head: u16,
    },
    /// A readable descriptor follows a writable one.
    #[error("descriptor chain {head} has a readable descriptor after a writable one")]
    Order {
        /// Head descriptor.
        head: u16,
    },
    /// The request is larger than the device advertised.
    #[error("descriptor chain {head} has {bytes} bytes, at most {limit} are accepted")]
    TooLarge {
        /// Head descriptor.
        head: u16,
        /// Bytes in the chain.
        bytes: usize,
        /// Largest that is accepted.
        limit: usize,
    },
    /// A buffer to receive frames into has not even room for their header (section 5.1.6.3).
    #[error("receive buffer {head} has {bytes} bytes, a frame's header alone has {least}")]
    TooSmall {
        /// Head descriptor.
        head: u16,
        /// Bytes that the device may write.
        bytes: usize,
        /// Bytes of the header.
        least: usize,
    },
    /// Buffers for one frame are in more pieces than any driver makes of them.
    #[error("buffers for a frame of {bytes} bytes have more than {limit} descriptors")]
    Scattered {
        /// Bytes of the frame.
        bytes: usize,
        /// Most descriptors.
        limit: usize,
    },
    /// The avail index jumped by more than the queue size.
    #[error("avail index runs ahead of the queue size")]
    AvailIndex,
    /// A ring is not in guest memory, or misaligned.
    #[error("queue {queue} has a ring outside of guest memory")]
    Ring {
        /// Queue number.
        queue: usize,
    },
}

/// What stands behind a queue besides its rings.
pub(crate) struct Backing<'a> {
    pub(crate) memory: &'a GuestMemoryMmap,
    pub(crate) window: &'a Window,
    pub(crate) pages: &'a mut WindowPages,
    /// Bytes of output so far, for positioned queues; of input, for queues that wait for it.
    pub(crate) stream: &'a mut u64,
    /// Requests so far.
    pub(crate) order: &'a mut u64,
    /// Count of guest resets.
    pub(crate) epoch: u64,
    /// Whether vCPUs, gate and device have not a CPU each.
    pub(crate) is_crowded: bool,
}

#[derive(Debug)]
pub(crate) struct GateQueue {
    pub(super) index: usize,
    pub(super) framing: Framing,
    /// Whether what a dead process had in its hands counts as done.
    pub(super) droppable: bool,
    pub(super) layout: QueueLayout,
    pub(super) guest: Option<Queue>,
    pub(super) shadow: ShadowDriver,
    pub(super) journal: Vec<Entry>,
    /// A chain that was taken from the guest but did not fit the window yet.
    pub(super) waiting: Option<Entry>,
    /// Requests that a dead device process had, to be given to its successor, oldest first.
    pub(super) replay: VecDeque<Entry>,
    /// Those of them that two device processes died with: each is tried alone.
    pub(super) suspects: VecDeque<Entry>,
    /// A suspect is alone with the device, so nothing else is taken.
    pub(super) held: bool,
    spare: Entry,
    used_added: bool,
    /// Requests in the hands of the device that the guest has its answer to.
    pub(super) answered: u16,
    /// Where the guest's used ring was when it was last asked whether it wants an interrupt.
    told: u16,
    /// Used elements that the guest is to see in one step.
    pub(super) together: Vec<(u16, u32)>,
    /// Window pages that this queue holds, and how many it may: a queue whose requests stay with
    /// the device (console input) must not starve the others.
    pub(super) pages_held: usize,
    pub(super) pages_limit: usize,
    /// Of a queue that receives frames, while the guest has it started.
    pub(super) frames: Option<Frames>,
}

impl GateQueue {
    pub(crate) fn new(index: usize, kind: VirtioKind, window: &Window) -> Option<Self> {
        let layout = *window.layout.queues.get(index)?;
        let framing = kind.framing(index);
        let (pages, queues) = (window.layout.data_pages, window.layout.queues.len());
        let pages_limit = if framing.waits_for_input {
            // All of these together get a half, for what they hold stays with the device.
            let alike = (0..queues).filter(|&n| kind.framing(n).waits_for_input);
            pages / 2 / alike.count().max(1)
        } else {
            (pages / queues.max(1)).max(pages.div_ceil(4))
        };
        let mut journal = Vec::new();
        journal.resize_with(usize::from(layout.slots), Entry::default);
        Some(Self {
            index,
            framing,
            droppable: kind.replay_class(index) == ReplayClass::Droppable,
            layout,
            guest: None,
            shadow: ShadowDriver::new(layout),
            journal,
            waiting: None,
            replay: VecDeque::new(),
            suspects: VecDeque::new(),
            held: false,
            spare: Entry::default(),
            used_added: false,
            answered: 0,
            told: 0,
            together: Vec::with_capacity(layout.slots.into()),
            pages_held: 0,
            pages_limit,
            frames: None,
        })
    }

    /// Whether its requests are buffers for what comes from outside. A control queue is framed like one that receives
    /// frames, and is none.
    pub(super) const fn waits_for_input(&self) -> bool {
        self.framing.waits_for_input && (!self.framing.frames || self.frames.is_some())
    }

    /// Whether requests are still in the hands of the device.
    pub(crate) fn in_flight(&self) -> u16 {
        self.shadow.in_flight()
    }

    /// Starts serving a guest's queue; with `frames` if it receives some.
    pub(crate) fn activate(
        &mut self,
        guest: Queue,
        frames: Option<Frames>,
        memory: &GuestMemoryMmap,
    ) -> Result<(), GuestFault> {
        if !guest.is_valid(memory) {
            return Err(GuestFault::Ring { queue: self.index });
        }
        self.told = guest.next_used();
        self.guest = Some(guest);
        self.frames = frames;
        Ok(())
    }

    /// The guest reset the device: nothing of it is answered any more.
    pub(crate) fn detach(&mut self, pages: &mut WindowPages) {
        self.guest = None;
        if let Some(frames) = self.frames.take() {
            frames.discard(&mut self.pages_held, pages);
        }
        // A waiting request holds no window pages yet.
        if let Some(mut entry) = self.waiting.take() {
            assert!(
                entry.pages.is_none(),
                "pages are taken right before submission"
            );
            entry.clear();
            self.spare = entry;
        }
        self.replay.clear();
        self.suspects.clear();
        self.used_added = false;
    }

    /// Takes requests from the guest and gives them to the device.
    pub(crate) fn take(
        &mut self,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<(), GuestFault> {
        if self.frames.is_some() {
            self.deal(backing, budget)?;
            return self.offer_rooms(backing);
        }
        loop {
            if self.waiting.is_none() {
                if *budget == 0 || self.shadow.next_slot().is_none() {
                    return Ok(());
                }
                self.waiting = self.next_request(backing)?;
                if self.waiting.is_none() {
                    return Ok(());
                }
                *budget -= 1;
            }
            if !self.submit_waiting(backing)? {
                return Ok(());
            }
        }
    }

    /// The oldest request that is to be done again, else the guest's next one.
    fn next_request(&mut self, backing: &mut Backing<'_>) -> Result<Option<Entry>, GuestFault> {
        if let Some(entry) = self.replay.pop_front() {
            return Ok(Some(entry));
        }
        let mut entry = std::mem::take(&mut self.spare);
        entry.clear();
        let got = self.pop(backing, &mut entry);
        if matches!(got, Ok(true)) {
            return Ok(Some(entry));
        }
        self.spare = entry;
        got.map(|_| None)
    }

    /// Reads the guest's next chain into `entry`. False when there is none.
    pub(super) fn pop(
        &mut self,
        backing: &mut Backing<'_>,
        entry: &mut Entry,
    ) -> Result<bool, GuestFault> {
        let Some(guest) = self.guest.as_mut() else {
            return Ok(false);
        };
        let idx = guest
            .avail_idx(backing.memory, Ordering::Acquire)
            .map_err(|_| GuestFault::Ring { queue: self.index })?;
        let ready = idx.0.wrapping_sub(guest.next_avail());
        if ready == 0 {
            return Ok(false);
        }
        if ready > guest.size() {
            return Err(GuestFault::AvailIndex);
        }
        let Some(chain) = guest.pop_descriptor_chain(backing.memory) else {
            return Err(GuestFault::Ring { queue: self.index });
        };
        let head = chain.head_index();
        let limit = backing.window.layout.request_bytes_max();
        let mut more = true;
        for (descriptor, n) in chain.zip(0usize..) {
            if n >= CHAIN_DESCRIPTORS_MAX {
                return Err(GuestFault::Truncated { head });
            }
            more = descriptor.has_next();
            entry.descriptors = n + 1;
            collect(entry, backing.memory, head, &descriptor)?;
            let bytes = entry.readable_bytes.saturating_add(entry.writable_bytes);
            if bytes > limit && (self.framing.tail_bytes > 0 || entry.readable_bytes > 0) {
                return Err(GuestFault::TooLarge { head, bytes, limit });
            }
        }
        if more || entry.readable_bytes + entry.writable_bytes == 0 {
            return Err(GuestFault::Truncated { head });
        }
        // A device may fill less than a pure input buffer, so a huge one is offered in part.
        let limit = limit.min(self.pages_limit * DATA_PAGE_BYTES);
        if is_input(entry) {
            entry.writable_bytes = entry.writable_bytes.min(limit);
        }
        entry.head = head;
        entry.epoch = backing.epoch;
        entry.deaths = 0;
        entry.order = *backing.order;
        *backing.order += 1;
        if self.framing.positioned {
            entry.stream_position = *backing.stream;
            *backing.stream += entry.readable_bytes as u64;
        }
        Ok(true)
    }

    /// Gives the waiting request to the device. False when the window is full.
    pub(super) fn submit_waiting(&mut self, backing: &mut Backing<'_>) -> Result<bool, GuestFault> {
        let Some(slot) = self.shadow.next_slot() else {
            return Ok(false);
        };
        let Some(entry) = self.waiting.as_mut() else {
            return Ok(true);
        };
        let head_len = usize::from(self.framing.head_bytes).min(entry.readable_bytes);
        let tail_len = usize::from(self.framing.tail_bytes).min(entry.writable_bytes);
        let read_len = entry.readable_bytes - head_len;
        let write_len = entry.writable_bytes - tail_len;
        let write_offset = self.framing.writable_at(read_len);
        let need = if write_len > 0 {
            write_offset + write_len
        } else {
            read_len
        };
        if need > 0 && entry.pages.is_none() {
            let pages = need.div_ceil(DATA_PAGE_BYTES);
            if pages > self.pages_limit {
                // It would wait for ever: there may be a gap between what is read and what is written.
                return Err(GuestFault::TooLarge {
                    head: entry.head,
                    bytes: need,
                    limit: self.pages_limit * DATA_PAGE_BYTES,
                });
            }
            let held = self.pages_held;
            let hot = match backing.is_crowded {
                true => HOT_PAGES_CROWDED,
                false => HOT_PAGES,
            };
            let enough = held > 0
                && held + pages > hot
                && !self.framing.waits_for_input
                && backing.window.is_at_once();
            if enough || held + pages > self.pages_limit {
                return Ok(false);
            }
            let Some(pages) = backing.pages.take(need) else {
                return Ok(false);
            };
            self.pages_held += pages.len() / DATA_PAGE_BYTES;
            entry.pages = Some(pages);
        }
        let data = backing.window.layout.data + entry.pages.map_or(0, |p| p.offset());
        entry.writable_at = data + write_offset;

        let window = &backing.window.memory;
        let head_at = self.shadow.head_offset(slot);
        let mut head_bytes = 0;
        if self.framing.positioned {
            window.write(head_at, entry.stream_position);
            head_bytes = POSITION_BYTES;
        } else if self.framing.numbered {
            // From 1, so that 0 is none.
            window.write(head_at, entry.order.saturating_add(1));
            head_bytes = POSITION_BYTES;
        }
        let gather = |skip, at, len| {
            copy_spans(
                backing.memory,
                window,
                Direction::ToWindow,
                &entry.readable,
                skip,
                at,
                len,
            )
        };
        let copied = gather(0, head_at + head_bytes, head_len)
            .and_then(|_| gather(head_len, data, read_len));
        if let Err(e) = copied {
            release(&mut self.pages_held, backing.pages, entry);
            return Err(e.into());
        }
        let mut request = RequestLayout::default();
        let mut push = |offset, len: usize, writable| {
            let len = u32::try_from(len).unwrap_or(0);
            request.push(Span {
                offset,
                len,
                writable,
            });
        };
        push(head_at, head_bytes + head_len, false);
        push(data, read_len, false);
        push(data + write_offset, write_len, true);
        push(head_at + TAIL_OFFSET, tail_len, true);
        let slot = self.shadow.submit(window, &request);
        if let (Some(place), Some(mut entry)) =
            (self.journal.get_mut(usize::from(slot)), self.waiting.take())
        {
            entry.in_flight = true;
            entry.answered = self.droppable && entry.writable_bytes == 0;
            let early = entry.answered.then_some(entry.head);
            std::mem::swap(place, &mut entry);
            self.spare = entry;
            if let Some(head) = early {
                self.answered += 1;
                self.put_used(backing.memory, head, 0);
            }
        }
        Ok(true)
    }

    /// Whether the device must be woken for what was submitted.
    pub(crate) fn announce(&mut self, window: &SharedMemory) -> bool {
        self.shadow.announce(window)
    }

    /// Takes completions from the device and answers the guest. Returns how many there were.
    pub(crate) fn complete(
        &mut self,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<u32, RingFault> {
        if self.frames.is_some() {
            return self.take_filled(backing, budget);
        }
        let mut done = 0;
        while *budget > 0 {
            let Some(completion) = self.shadow.complete(&backing.window.memory)? else {
                break;
            };
            // What would be told to the guest otherwise is the status of a request before this one.
            self.has_status(completion, backing.epoch)?;
            *budget -= 1;
            done += 1;
            if self.framing.waits_for_input {
                *backing.stream = backing.stream.saturating_add(completion.written.into());
            }
            let mut entry = match self.journal.get_mut(usize::from(completion.slot)) {
                Some(place) => std::mem::take(place),
                None => continue,
            };
            if entry.answered {
                self.answered = self.answered.saturating_sub(1);
            } else if entry.epoch == backing.epoch && self.guest.is_some() {
                let head_at = self.shadow.head_offset(completion.slot);
                let written = usize::try_from(completion.written).unwrap_or(0);
                self.answer(backing, &entry, head_at, written);
            }
            release(&mut self.pages_held, backing.pages, &mut entry);
            entry.clear();
            if let Some(place) = self.journal.get_mut(usize::from(completion.slot)) {
                *place = entry;
            }
        }
        Ok(done)
    }

    /// Whether the device has written the status that its request has room for, where anybody is told.
    fn has_status(&self, completion: Completion, epoch: u64) -> Result<(), RingFault> {
        let entry = self.journal.get(usize::from(completion.slot));
        let entry = entry.filter(|entry| entry.epoch == epoch);
        let room = entry.map_or(0, |entry| entry.writable_bytes);
        let least = usize::from(self.framing.tail_bytes).min(room);
        let least = u32::try_from(least).unwrap_or(u32::MAX);
        let got = completion.written;
        if got < least {
            return Err(RingFault::NoStatus { got, least });
        }
        Ok(())
    }

    /// Copies what the device wrote to the guest and puts the used element. Guest memory cannot
    /// vanish while a request is in flight, so the copies cannot fail.
    fn answer(&mut self, backing: &Backing<'_>, entry: &Entry, head_at: usize, written: usize) {
        let tail_len = usize::from(self.framing.tail_bytes).min(entry.writable_bytes);
        let data_len = entry.writable_bytes - tail_len;
        let data_written = written.saturating_sub(tail_len).min(data_len);
        let window = &backing.window.memory;
        let scatter = |skip, at, len| {
            copy_spans(
                backing.memory,
                window,
                Direction::ToGuest,
                &entry.writable,
                skip,
                at,
                len,
            )
        };
        let copied = scatter(0, entry.writable_at, data_written)
            .and_then(|_| scatter(data_len, head_at + TAIL_OFFSET, tail_len));
        debug_assert!(
            copied.is_ok(),
            "guest memory was checked when the request was taken"
        );
        self.put_used(backing.memory, entry.head, written);
    }

    /// Puts what the guest is to see in one step.
    pub(super) fn put_together(&mut self, memory: &GuestMemoryMmap) {
        if let Some(guest) = self.guest.as_mut().filter(|_| !self.together.is_empty()) {
            // The rings were checked at activation, the heads came out of this queue, and a guest has no more
            // of them in flight than fit; one that has put a head twice only confuses itself.
            self.used_added |= used::put_together(guest, memory, &self.together).is_ok();
        }
        self.together.clear();
    }

    pub(super) fn put_used(&mut self, memory: &GuestMemoryMmap, head: u16, written: usize) {
        let Some(guest) = self.guest.as_mut() else {
            return;
        };
        let len = u32::try_from(written).unwrap_or(u32::MAX);
        // The rings were checked at activation and the head came out of this queue.
        if guest.add_used(memory, head, len).is_ok() {
            self.used_added = true;
        }
    }

    /// The device is gone: answers everything in flight, and everything that the guest has put
    /// since, with an error that its driver understands. What waits for input waits on.
    pub(crate) fn fail_all(
        &mut self,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<(), GuestFault> {
        if self.waits_for_input() {
            // Buffers for what will never come: a driver that got them back empty would offer them again at
            // once, and for ever.
            return Ok(());
        }
        for slot in 0..self.journal.len() {
            let Some(place) = self.journal.get_mut(slot) else {
                break;
            };
            if !place.in_flight {
                continue;
            }
            let mut entry = std::mem::take(place);
            release(&mut self.pages_held, backing.pages, &mut entry);
            entry.in_flight = false;
            if entry.epoch == backing.epoch && !entry.answered {
                self.fail(backing.memory, &entry);
            }
        }
        self.answered = 0;
        let mut kept = std::mem::take(&mut self.suspects);
        kept.append(&mut self.replay);
        kept.extend(self.waiting.take());
        for entry in kept {
            self.fail(backing.memory, &entry);
        }
        while *budget > 0 {
            *budget -= 1;
            let mut entry = Entry::default();
            if !self.pop(backing, &mut entry)? {
                break;
            }
            self.fail(backing.memory, &entry);
        }
        Ok(())
    }

    /// Answers one request with an error that the guest's driver understands.
    pub(crate) fn fail(&mut self, memory: &GuestMemoryMmap, entry: &Entry) {
        let tail_len = usize::from(self.framing.tail_bytes);
        if tail_len > 0
            && let Some(last) = entry.writable.last()
            && last.len > 0
        {
            // The status is the last writable byte; the span was checked when it was taken.
            let at = last.address.0 + (last.len as u64 - 1);
            let written = memory.write_obj(STATUS_IOERR, GuestAddress(at));
            debug_assert!(written.is_ok(), "guest memory was checked");
        }
        let written = match self.framing.failure {
            Failure::Status => tail_len.min(entry.writable_bytes),
            Failure::Fuse => fuse_error(memory, entry),
        };
        self.put_used(memory, entry.head, written);
    }

    /// Whether the guest wants an interrupt for the used elements put since the last call.
    pub(crate) fn wants_interrupt(&mut self, memory: &GuestMemoryMmap) -> bool {
        if !std::mem::take(&mut self.used_added) {
            return false;
        }
        let told = &mut self.told;
        let Some(guest) = self.guest.as_mut() else {
            return false;
        };
        if !guest.event_idx_enabled() {
            // The used index must be visible before the flag is read: a driver that clears the flag
            // looks at the index afterwards.
            fence(Ordering::SeqCst);
            let flags = memory
                .load::<u16>(GuestAddress(guest.avail_ring()), Ordering::Acquire)
                .map(u16::from_le);
            return flags.is_ok_and(|f| f & VRING_AVAIL_F_NO_INTERRUPT == 0);
        }
        used::wants_news(guest, memory, told).unwrap_or(false)
    }

    /// Stops kicks and calls while the gate is looking anyway.
    pub(crate) fn quiet(&mut self, memory: &GuestMemoryMmap, window: &SharedMemory) {
        if let Some(guest) = self.guest.as_mut() {
            // Failing to suppress a kick only costs a wake-up.
            let _suppressed = if guest.event_idx_enabled() {
                // `virtio-queue` leaves the avail event where it was armed, so that the very next
                // request would still ring. One behind never matches.
                let behind = guest.next_avail().wrapping_sub(1);
                let at = guest.used_ring() + 4 + 8 * u64::from(guest.size());
                memory
                    .store(behind.to_le(), GuestAddress(at), Ordering::Relaxed)
                    .is_ok()
            } else {
                guest.disable_notification(memory).is_ok()
            };
        }
        self.shadow.disable_calls(window);
    }

    /// Asks guest and device to ring again; the device for every completion if some queue `lacks_pages`. Returns whether
    /// something is there already.
    pub(crate) fn listen(
        &mut self,
        memory: &GuestMemoryMmap,
        window: &SharedMemory,
        lacks_pages: bool,
    ) -> bool {
        let waits = lacks_pages || self.waits_for_completions();
        let completions = waits && self.shadow.enable_calls(window);
        if self.frames.is_some() && !self.held {
            return completions | self.listen_for_buffers(memory);
        }
        if self.is_blocked() {
            // Requests wait for completions; a kick would tell nothing new.
            return completions;
        }
        let requests = match self.guest.as_mut() {
            Some(guest) => guest.enable_notification(memory).unwrap_or(false),
            None => false,
        };
        completions || requests
    }

    /// Whether a request that was taken from the guest has no room in the window yet.
    pub(crate) fn has_waiting(&self) -> bool {
        self.waiting.is_some() || self.lacks_rooms()
    }

    /// Whether a completion would change anything for the guest, as far as this queue goes.
    fn waits_for_completions(&self) -> bool {
        self.is_blocked() || self.guest.is_none() || self.answered < self.in_flight()
    }

    /// Whether nothing can be taken before something is completed.
    fn is_blocked(&self) -> bool {
        self.held || self.waiting.is_some() || self.shadow.next_slot().is_none()
    }

    /// Whether there is something to do, without changing any notification state.
    pub(crate) fn has_work(&self, memory: &GuestMemoryMmap, window: &SharedMemory) -> bool {
        self.shadow.has_completions(window)
            || (!self.is_blocked()
                // Buffers for frames are not requests.
                && self.frames.is_none()
                && self.guest.as_ref().is_some_and(|guest| {
                    guest
                        .avail_idx(memory, Ordering::Relaxed)
                        .is_ok_and(|idx| idx.0 != guest.next_avail())
                }))
    }

    /// Asks the guest for kicks only; used when the device is gone.
    pub(crate) fn listen_guest(&mut self, memory: &GuestMemoryMmap) -> bool {
        if self.waits_for_input() {
            return false;
        }
        self.guest
            .as_mut()
            .is_some_and(|g| g.enable_notification(memory).unwrap_or(false))
    }
}

/// Tells EIO as a FUSE server would: an answer header whose identifier is that of the request. Without it Linux
/// would take an empty answer for success. Returns the bytes written: none where there is no room,
/// since nobody expects an answer then.
fn fuse_error(memory: &GuestMemoryMmap, entry: &Entry) -> usize {
    const ANSWER_BYTES: usize = FUSE_ANSWER_BYTES as usize;
    const UNIQUE_AT: usize = 8;
    let mut unique = [0u8; 8];
    let mut skip = UNIQUE_AT;
    let mut filled = 0;
    for span in &entry.readable {
        let at = skip.min(span.len);
        skip -= at;
        let rest = unique.get_mut(filled..).unwrap_or_default();
        let n = rest.len().min(span.len - at);
        let from = GuestAddress(span.address.0.saturating_add(at as u64));
        let part = rest.get_mut(..n).unwrap_or_default();
        if memory.read_slice(part, from).is_err() {
            return 0;
        }
        filled += n;
    }
    if filled < unique.len() || entry.writable_bytes < ANSWER_BYTES {
        return 0;
    }
    let mut answer = [0u8; ANSWER_BYTES];
    let fields = [(0, u32::to_le_bytes(16)), (4, (-libc::EIO).to_le_bytes())];
    for (at, bytes) in fields {
        for (place, byte) in answer.iter_mut().skip(at).zip(bytes) {
            *place = byte;
        }
    }
    for (place, byte) in answer.iter_mut().skip(8).zip(unique) {
        *place = byte;
    }
    let mut left = answer.as_slice();
    for span in &entry.writable {
        let (part, rest) = left.split_at(span.len.min(left.len()));
        if memory.write_slice(part, span.address).is_err() {
            return 0;
        }
        left = rest;
    }
    ANSWER_BYTES
}

/// Whether a request is nothing but room for what comes from outside.
pub(super) const fn is_input(entry: &Entry) -> bool {
    entry.readable_bytes == 0
}

fn release(held: &mut usize, pages: &mut WindowPages, entry: &mut Entry) {
    if let Some(range) = entry.pages.take() {
        give_back(held, pages, range);
    }
}

/// Pages of a queue are free again.
pub(super) fn give_back(held: &mut usize, pages: &mut WindowPages, range: PageRange) {
    *held -= range.len() / DATA_PAGE_BYTES;
    pages.give(range);
}

fn collect(
    entry: &mut Entry,
    memory: &GuestMemoryMmap,
    head: u16,
    descriptor: &Descriptor,
) -> Result<(), GuestFault> {
    let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
    let address = descriptor.addr();
    if len == 0 {
        return Ok(());
    }
    if !GuestMemoryBackend::check_range(memory, address, len) {
        return Err(NotMemory {
            address: address.0,
            len,
        }
        .into());
    }
    let span = GuestSpan { address, len };
    if descriptor.is_write_only() {
        entry.writable.push(span);
        entry.writable_bytes = entry.writable_bytes.saturating_add(len);
    } else if entry.writable.is_empty() {
        entry.readable.push(span);
        entry.readable_bytes = entry.readable_bytes.saturating_add(len);
    } else {
        return Err(GuestFault::Order { head });
    }
    Ok(())
}

const _: () = assert!(HEAD_SLOT_BYTES == 64 && TAIL_OFFSET == 32);
