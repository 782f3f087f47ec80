//! The driver half of a shadow virtqueue: split rings of virtio 1.2 section 2.7 with event indexes,
//! in a window. Called by the gate thread alone.
//!
//! A request occupies one *slot*: four consecutive descriptors, of which it uses up to four, and one
//! head slot of 64 bytes. The head descriptor of slot `n` is `4 n`, so there is no descriptor free
//! list. All bookkeeping is in private memory; the window is written, and of it only the used ring
//! is read, each field once.

use crate::shared::SharedMemory;
use crate::sync::{Ordering, fence};
use crate::window::{DESCRIPTORS_PER_SLOT, QueueLayout};
use std::num::Wrapping;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;

/// A range of window bytes in a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Offset from the start of the window.
    pub offset: usize,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

/// Up to four spans, readable ones first.
#[derive(Debug, Clone, Copy, Default)]
pub struct RequestLayout {
    spans: [Option<Span>; DESCRIPTORS_PER_SLOT as usize],
    used: usize,
}

impl RequestLayout {
    /// Appends a span; empty ones are left out. A fifth is ignored, which no framing produces.
    pub fn push(&mut self, span: Span) {
        if span.len > 0
            && let Some(place) = self.spans.get_mut(self.used)
        {
            *place = Some(span);
            self.used += 1;
        }
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.spans
            .iter()
            .flatten()
            .filter(|s| s.writable)
            .map(|s| s.len)
            .sum()
    }

    /// Whether there is no span at all.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.used == 0
    }
}

/// A request that the device has completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// Its slot, which is free again.
    pub slot: u16,
    /// Bytes that the device says it wrote; at most the writable bytes of the request.
    pub written: u32,
}

/// A device broke the ring protocol. The queue is not used again in this generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The used index ran ahead of what was submitted.
    #[error("used index {got} claims more completions than the {in_flight} requests in flight")]
    UsedIndex {
        /// The index read.
        got: u16,
        /// Requests in flight.
        in_flight: u16,
    },
    /// A used element names a descriptor that is no head in flight.
    #[error("used element names descriptor {id}, which heads no request in flight")]
    UsedId {
        /// The id read.
        id: u32,
    },
    /// A used element claims more bytes than the device could write.
    #[error("used element claims {got} bytes written, at most {limit} were writable")]
    UsedLength {
        /// The length read.
        got: u32,
        /// The writable bytes of the request.
        limit: u32,
    },
    /// A used element says that not even the status was written.
    #[error(
        "used element claims {got} bytes written, at least the {least} of the status were expected"
    )]
    NoStatus {
        /// The length read.
        got: u32,
        /// Bytes of the status.
        least: u32,
    },
    /// A frame is shorter than its header.
    #[error("used element claims {got} bytes written, a frame's header alone has {least}")]
    NoHeader {
        /// The length read.
        got: u32,
        /// Bytes of the header.
        least: u32,
    },
    /// A frame has more buffers than were completed with it.
    #[error("a frame claims to have {got} buffers, expected 1 to {most}")]
    Buffers {
        /// The number read.
        got: u16,
        /// The largest possible.
        most: u16,
    },
}

/// The driver half of one shadow virtqueue.
#[derive(Debug)]
pub struct ShadowDriver {
    layout: QueueLayout,
    /// Writable bytes of the request in each slot; `None` when the slot is free.
    in_flight: Vec<Option<u32>>,
    free: Vec<u16>,
    avail_next: Wrapping<u16>,
    avail_announced: Wrapping<u16>,
    used_next: Wrapping<u16>,
}

impl ShadowDriver {
    /// A driver for a queue whose window memory is still zero.
    #[must_use]
    pub fn new(layout: QueueLayout) -> Self {
        Self {
            layout,
            in_flight: vec![None; usize::from(layout.slots)],
            free: (0..layout.slots).rev().collect(),
            avail_next: Wrapping(0),
            avail_announced: Wrapping(0),
            used_next: Wrapping(0),
        }
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        let free = u16::try_from(self.free.len()).unwrap_or(self.layout.slots);
        self.layout.slots - free
    }

    /// The most recently used free slot, if any. It stays free until [`ShadowDriver::submit`].
    #[must_use]
    pub fn next_slot(&self) -> Option<u16> {
        self.free.last().copied()
    }

    /// Offset of the head slot of `slot` in the window.
    #[must_use]
    pub fn head_offset(&self, slot: u16) -> usize {
        self.layout.heads + usize::from(slot) * crate::device_kind::HEAD_SLOT_BYTES
    }

    /// Puts a request into the slot that [`ShadowDriver::next_slot`] named. The device may see it
    /// at once; [`ShadowDriver::announce`] tells whether it must be woken.
    ///
    /// # Panics
    /// When no slot is free or the request has no spans: bugs of the gate.
    pub fn submit(&mut self, memory: &SharedMemory, request: &RequestLayout) -> u16 {
        assert!(!request.is_empty(), "a request has at least one span");
        #[expect(clippy::expect_used, reason = "documented panic on a bug of the gate")]
        let slot = self.free.pop().expect("a free slot");
        if let Some(place) = self.in_flight.get_mut(usize::from(slot)) {
            *place = Some(request.writable_bytes());
        }
        let head = slot * DESCRIPTORS_PER_SLOT;
        for ((span, index), n) in request.spans.iter().flatten().zip(head..).zip(1usize..) {
            let more = n < request.used;
            let at = self.layout.desc_table + usize::from(index) * 16;
            memory.write(at, span.offset as u64);
            memory.write(at + 8, span.len);
            let flags =
                if more { DESC_NEXT } else { 0 } | if span.writable { DESC_WRITE } else { 0 };
            memory.write(at + 12, flags);
            memory.write(at + 14, index + 1);
        }
        let place = usize::from(self.avail_next.0 & (self.layout.descriptors - 1));
        memory.write(self.layout.avail_ring + 4 + 2 * place, head);
        self.avail_next += 1;
        memory.store(
            self.layout.avail_ring + 2,
            self.avail_next.0,
            Ordering::Release,
        );
        slot
    }

    /// Whether the device asked to be woken for what was submitted since the last call.
    pub fn announce(&mut self, memory: &SharedMemory) -> bool {
        if self.avail_announced == self.avail_next {
            return false;
        }
        fence(Ordering::SeqCst);
        let at = self.layout.used_ring + 4 + 8 * usize::from(self.layout.descriptors);
        let event = Wrapping(memory.load::<u16>(at, Ordering::Relaxed));
        let old = self.avail_announced;
        self.avail_announced = self.avail_next;
        self.avail_next - event - Wrapping(1) < self.avail_next - old
    }

    /// Takes the next completion.
    ///
    /// # Errors
    /// [`RingFault`] when the device wrote nonsense.
    pub fn complete(&mut self, memory: &SharedMemory) -> Result<Option<Completion>, RingFault> {
        let got = memory.load::<u16>(self.layout.used_ring + 2, Ordering::Acquire);
        let ready = Wrapping(got) - self.used_next;
        if ready.0 == 0 {
            return Ok(None);
        }
        let in_flight = self.in_flight();
        if ready.0 > in_flight {
            return Err(RingFault::UsedIndex { got, in_flight });
        }
        let place = usize::from(self.used_next.0 & (self.layout.descriptors - 1));
        let at = self.layout.used_ring + 4 + 8 * place;
        let id = memory.load::<u32>(at, Ordering::Relaxed);
        let written = memory.load::<u32>(at + 4, Ordering::Relaxed);
        let slot = u16::try_from(id / u32::from(DESCRIPTORS_PER_SLOT))
            .ok()
            .filter(|_| id.is_multiple_of(u32::from(DESCRIPTORS_PER_SLOT)))
            .ok_or(RingFault::UsedId { id })?;
        let place = self
            .in_flight
            .get_mut(usize::from(slot))
            .ok_or(RingFault::UsedId { id })?;
        let limit = place.ok_or(RingFault::UsedId { id })?;
        if written > limit {
            return Err(RingFault::UsedLength {
                got: written,
                limit,
            });
        }
        *place = None;
        self.free.push(slot);
        self.used_next += 1;
        Ok(Some(Completion { slot, written }))
    }

    /// Asks to be called at the next completion. Returns whether one is there already, in which
    /// case the caller goes on taking completions.
    pub fn enable_calls(&self, memory: &SharedMemory) -> bool {
        let at = self.layout.avail_ring + 4 + 2 * usize::from(self.layout.descriptors);
        memory.store(at, self.used_next.0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        memory.load::<u16>(self.layout.used_ring + 2, Ordering::Relaxed) != self.used_next.0
    }

    /// How many completions the device has put that were not taken yet, as it says.
    #[must_use]
    pub fn completions(&self, memory: &SharedMemory) -> u16 {
        let index = memory.load::<u16>(self.layout.used_ring + 2, Ordering::Acquire);
        (Wrapping(index) - self.used_next).0
    }

    /// Whether the device has put completions that were not taken yet.
    #[must_use]
    pub fn has_completions(&self, memory: &SharedMemory) -> bool {
        memory.load::<u16>(self.layout.used_ring + 2, Ordering::Relaxed) != self.used_next.0
    }

    /// Asks not to be called while the gate is looking anyway.
    pub fn disable_calls(&self, memory: &SharedMemory) {
        let at = self.layout.avail_ring + 4 + 2 * usize::from(self.layout.descriptors);
        memory.store(at, (self.used_next - Wrapping(1)).0, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;
    use crate::window::{Window, WindowLayout};
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueT};
    use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

    /// A window mapped by both sides: the driver under test, and `virtio-queue` as the device.
    struct Pair {
        window: Window,
        driver: ShadowDriver,
        device_memory: GuestMemoryMmap,
        device: Queue,
    }

    fn pair(size: u16) -> Pair {
        let layout = WindowLayout::new(1 << 20, &[size]).unwrap();
        let q = layout.queues[0];
        let fd = sealed_memfd("w", layout.bytes as u64).unwrap();
        let other = SharedMemory::map(fd.try_clone().unwrap(), layout.bytes as u64).unwrap();
        let region = GuestRegionMmap::new(other.into_region(), GuestAddress(0)).unwrap();
        let device_memory = GuestMemoryMmap::from_regions(vec![region]).unwrap();
        let mut device = Queue::new(q.descriptors).unwrap();
        device.set_size(q.descriptors);
        let addr = |a: usize| (Some(u32::try_from(a).unwrap()), Some(0));
        device.set_desc_table_address(addr(q.desc_table).0, Some(0));
        device.set_avail_ring_address(addr(q.avail_ring).0, Some(0));
        device.set_used_ring_address(addr(q.used_ring).0, Some(0));
        device.set_event_idx(true);
        device.set_ready(true);
        assert!(device.is_valid(&device_memory));
        let window = Window::map(fd, layout).unwrap();
        Pair {
            window,
            driver: ShadowDriver::new(q),
            device_memory,
            device,
        }
    }

    fn request(window: &Window, read: u32, write: u32) -> RequestLayout {
        let mut r = RequestLayout::default();
        let data = window.layout.data;
        r.push(Span {
            offset: data,
            len: read,
            writable: false,
        });
        r.push(Span {
            offset: data + 4096,
            len: write,
            writable: true,
        });
        r
    }

    #[test]
    fn device_sees_what_was_submitted_and_driver_what_was_completed() {
        let mut p = pair(8);
        let r = request(&p.window, 16, 513);
        for round in 0..100u32 {
            let slot = p.driver.submit(&p.window.memory, &r);
            assert!(
                p.driver.announce(&p.window.memory),
                "an idle device is woken"
            );
            let chain = p.device.pop_descriptor_chain(&p.device_memory).unwrap();
            let head = chain.head_index();
            let parts: Vec<_> = chain.map(|d| (d.len(), d.is_write_only())).collect();
            assert_eq!(parts, [(16, false), (513, true)]);
            p.device.add_used(&p.device_memory, head, round).unwrap();
            assert!(!p.device.enable_notification(&p.device_memory).unwrap());
            let done = p.driver.complete(&p.window.memory).unwrap().unwrap();
            assert_eq!(
                done,
                Completion {
                    slot,
                    written: round
                }
            );
            assert_eq!(p.driver.complete(&p.window.memory).unwrap(), None);
        }
    }

    #[test]
    fn busy_device_is_not_woken_again() {
        let mut p = pair(8);
        let r = request(&p.window, 16, 1);
        p.driver.submit(&p.window.memory, &r);
        assert!(p.driver.announce(&p.window.memory));
        p.driver.submit(&p.window.memory, &r);
        assert!(
            !p.driver.announce(&p.window.memory),
            "it was woken and has not slept since"
        );
        assert!(!p.driver.announce(&p.window.memory), "nothing new");
    }

    #[test]
    fn slots_run_out_and_the_latest_comes_back_first() {
        let mut p = pair(2);
        let r = request(&p.window, 1, 1);
        let a = p.driver.submit(&p.window.memory, &r);
        let b = p.driver.submit(&p.window.memory, &r);
        assert_eq!(p.driver.next_slot(), None);
        let chain = p.device.pop_descriptor_chain(&p.device_memory).unwrap();
        assert_eq!(chain.head_index(), a * 4);
        let chain = p.device.pop_descriptor_chain(&p.device_memory).unwrap();
        p.device
            .add_used(&p.device_memory, chain.head_index(), 0)
            .unwrap();
        p.driver.complete(&p.window.memory).unwrap().unwrap();
        assert_eq!(p.driver.next_slot(), Some(b));
    }

    #[test]
    fn lying_device_is_caught() {
        let mut p = pair(4);
        let r = request(&p.window, 16, 10);
        p.driver.submit(&p.window.memory, &r);
        let used = p.window.layout.queues[0].used_ring;
        let memory = &p.window.memory;
        let say = |idx: u16, id: u32, len: u32| {
            memory.write(used + 4, id);
            memory.write(used + 8, len);
            memory.store(used + 2, idx, Ordering::Release);
        };
        say(2, 0, 0);
        assert!(matches!(
            p.driver.complete(memory),
            Err(RingFault::UsedIndex { .. })
        ));
        for id in [1, 4, 16, 400, u32::MAX] {
            say(1, id, 0);
            assert!(
                matches!(p.driver.complete(memory), Err(RingFault::UsedId { .. })),
                "{id}"
            );
        }
        say(1, 0, 11);
        assert!(matches!(
            p.driver.complete(memory),
            Err(RingFault::UsedLength { .. })
        ));
        say(1, 0, 10);
        assert!(p.driver.complete(memory).unwrap().is_some());
    }

    proptest! {
        #[test]
        fn random_rings_never_panic_and_never_free_a_slot_twice(
            bytes in prop::collection::vec(any::<u8>(), 4 + 8 * 16 + 2),
            submits in 1u16..4,
        ) {
            let mut p = pair(4);
            let r = request(&p.window, 16, 10);
            for _ in 0..submits {
                p.driver.submit(&p.window.memory, &r);
            }
            let used = p.window.layout.queues[0].used_ring;
            p.window.memory.slice(used, bytes.len()).copy_from(&bytes);
            let mut seen = Vec::new();
            while let Ok(Some(done)) = p.driver.complete(&p.window.memory) {
                prop_assert!(done.slot < submits && !seen.contains(&done.slot));
                seen.push(done.slot);
            }
        }
    }
}
