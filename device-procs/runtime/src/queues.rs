//! The device half of the shadow virtqueues in a window: ordinary `virtio-queue` queues over a guest
//! memory that is the window.
//!
//! What comes out of a queue is a [`Chain`] whose descriptors have each been read once and lie
//! inside of the window. Gates make nothing else, whatever a guest has put: a chain or a ring that is not
//! sound is a fault. The process ends then, and what was asked for is asked of its successor: any
//! answer to a request that nobody can read would be a lie.

use crate::device::DeviceFault;
use crate::sys;
use crate::used;
use bulkhead_ipc::shared::{SharedError, SharedMemory};
use bulkhead_ipc::window::{DESCRIPTORS_PER_SLOT, WindowLayout};
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileSlice,
};

/// Descriptors that one chain may have.
const PARTS_MAX: usize = DESCRIPTORS_PER_SLOT as usize;

/// A range of bytes inside of the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Span {
    offset: u32,
    len: u32,
}

impl Span {
    /// Length in bytes.
    #[must_use]
    pub const fn len(self) -> u32 {
        self.len
    }

    /// Whether it has no bytes.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Its part from `at` on, at most `len` bytes; shorter where the span ends.
    #[must_use]
    pub const fn part(self, at: u32, len: u32) -> Self {
        let at = if at > self.len { self.len } else { at };
        let rest = self.len - at;
        Self {
            offset: self.offset + at,
            len: if len > rest { rest } else { len },
        }
    }
}

/// Up to four spans.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Parts {
    spans: [Span; PARTS_MAX],
    used: usize,
}

impl Parts {
    fn push(&mut self, span: Span) -> bool {
        let Some(place) = self.spans.get_mut(self.used) else {
            return false;
        };
        *place = span;
        self.used += 1;
        true
    }

    fn as_slice(&self) -> &[Span] {
        self.spans.get(..self.used).unwrap_or_default()
    }
}

/// A request: what the device may read, and what it may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain {
    head: u16,
    readable: Parts,
    writable: Parts,
}

impl Chain {
    /// The name under which it is completed.
    #[must_use]
    pub const fn head(&self) -> u16 {
        self.head
    }

    /// The readable spans, in order.
    #[must_use]
    pub fn readable(&self) -> &[Span] {
        self.readable.as_slice()
    }

    /// The writable spans, in order.
    #[must_use]
    pub fn writable(&self) -> &[Span] {
        self.writable.as_slice()
    }
}

/// The queues of one device, and the memory they are in.
#[derive(Debug)]
pub struct Queues {
    memory: GuestMemoryMmap,
    bytes: u32,
    queues: Vec<Queue>,
    /// Where each used ring was when the gate was last told of it.
    told: Vec<u16>,
    completed: bool,
}

impl Queues {
    /// The queues of a window that starts empty.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd, layout: &WindowLayout) -> Result<Self, SharedError> {
        let map_error = |e: &dyn std::fmt::Display| SharedError::Map(e.to_string());
        let region = SharedMemory::map(fd, layout.bytes as u64)?.into_region();
        let region = GuestRegionMmap::new(region, GuestAddress(0))
            .ok_or_else(|| map_error(&"the window does not fit at address 0"))?;
        let memory = GuestMemoryMmap::from_regions(vec![region]).map_err(|e| map_error(&e))?;
        let mut queues = Vec::with_capacity(layout.queues.len());
        for place in &layout.queues {
            let mut queue = Queue::new(place.descriptors).map_err(|e| map_error(&e))?;
            let at = |offset: usize| u32::try_from(offset).ok();
            queue.set_size(place.descriptors);
            queue.set_desc_table_address(at(place.desc_table), Some(0));
            queue.set_avail_ring_address(at(place.avail_ring), Some(0));
            queue.set_used_ring_address(at(place.used_ring), Some(0));
            queue.set_event_idx(true);
            queue.set_ready(true);
            queues.push(queue);
        }
        let bytes = u32::try_from(layout.bytes).map_err(|e| map_error(&e))?;
        Ok(Self::over(memory, bytes, queues))
    }

    /// Queues that are set up already. `memory` has one region, from 0 to `bytes`.
    #[must_use]
    pub fn over(memory: GuestMemoryMmap, bytes: u32, queues: Vec<Queue>) -> Self {
        Self {
            memory,
            bytes,
            told: queues.iter().map(QueueT::next_used).collect(),
            queues,
            completed: false,
        }
    }

    /// Number of queues.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.queues.len()
    }

    /// Whether the device has no queues (none has).
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// A second handle to the window's memory, for what outlives a borrow of the queues.
    #[must_use]
    pub fn memory(&self) -> WindowMemory {
        WindowMemory(self.memory.clone())
    }

    /// Takes the next request of a queue.
    ///
    /// # Errors
    /// [`DeviceFault::Ring`] when the gate's half of the ring is nonsense, [`DeviceFault::Chain`] when the
    /// request is.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, DeviceFault> {
        let fault = |cause| DeviceFault::Ring { index, cause };
        let Some(queue) = self.queues.get_mut(index) else {
            return Ok(None);
        };
        let mut waiting = queue.iter(&self.memory).map_err(fault)?;
        let Some(descriptors) = waiting.next() else {
            return Ok(None);
        };
        let head = descriptors.head_index();
        let chain = read_chain(head, descriptors, self.bytes);
        chain.map(Some).ok_or(DeviceFault::Chain { index, head })
    }

    /// Completes a request of which `written` bytes were written.
    ///
    /// # Errors
    /// [`DeviceFault::Ring`] when `head` is no head: nonsense of the gate that came out of
    /// [`Queues::pop`].
    pub fn complete(&mut self, index: usize, head: u16, written: u32) -> Result<(), DeviceFault> {
        if let Some(queue) = self.queues.get_mut(index) {
            queue
                .add_used(&self.memory, head, written)
                .map_err(|cause| DeviceFault::Ring { index, cause })?;
            self.completed = true;
        }
        Ok(())
    }

    /// Completes several requests (head, bytes written) in one step: the gate sees all of them or none.
    ///
    /// # Errors
    /// As [`Queues::complete`].
    pub fn complete_together(
        &mut self,
        index: usize,
        requests: &[(u16, u32)],
    ) -> Result<(), DeviceFault> {
        if let Some(queue) = self.queues.get_mut(index) {
            used::put_together(queue, &self.memory, requests)
                .map_err(|cause| DeviceFault::Ring { index, cause })?;
            self.completed |= !requests.is_empty();
        }
        Ok(())
    }

    /// Copies bytes out of the window. Returns how many: less than asked for where the span ends.
    pub fn read(&self, span: Span, to: &mut [u8]) -> usize {
        self.slice(span).copy_to(to)
    }

    /// Copies bytes into the window. Returns how many: less than given where the span ends.
    pub fn write(&self, span: Span, from: &[u8]) -> usize {
        let span = span.part(0, u32::try_from(from.len()).unwrap_or(u32::MAX));
        let n = span.len() as usize;
        self.slice(span).copy_from(from.get(..n).unwrap_or(from));
        n
    }

    /// The bytes of a span, for system calls that read or write them directly.
    #[must_use]
    pub fn slice(&self, span: Span) -> VolatileSlice<'_> {
        slice(&self.memory, span)
    }

    /// Reads file bytes into the window, now: blocks if the file does.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn read_file(&self, file: impl AsFd, at: u64, to: Span) -> Result<u32, Errno> {
        sys::read_at(file.as_fd(), at, &self.slice(to))
    }

    /// Writes window bytes to a file, now: blocks if the file does.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn write_file(&self, file: impl AsFd, at: u64, from: Span) -> Result<u32, Errno> {
        sys::write_at(file.as_fd(), at, &self.slice(from))
    }

    /// Reads once from a descriptor that is not a file, such as a network interface: into the spans and, what they
    /// have no room for, into `rest`. No more than 63 spans are used.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn read_scattered(
        &self,
        from: impl AsFd,
        to: impl Iterator<Item = Span>,
        rest: &mut [u8],
    ) -> Result<usize, Errno> {
        let slices = to.map(|span| self.slice(span));
        sys::read_scattered(from.as_fd(), slices, rest)
    }

    /// Writes `front` and the spans at once to a descriptor that is not a file.
    ///
    /// # Errors
    /// The kernel's errno; EMSGSIZE for more than 63 spans.
    pub fn write_gathered(
        &self,
        to: impl AsFd,
        front: &[u8],
        from: impl Iterator<Item = Span>,
    ) -> Result<usize, Errno> {
        let slices = from.map(|span| self.slice(span));
        sys::write_gathered(to.as_fd(), front, slices)
    }

    /// Whether the gate asked to be called for what was completed since the last question.
    ///
    /// # Errors
    /// [`DeviceFault::Ring`] when the gate's half of a ring is nonsense.
    pub fn call_needed(&mut self) -> Result<bool, DeviceFault> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let mut needed = false;
        for (index, (queue, told)) in self.queues.iter().zip(&mut self.told).enumerate() {
            needed |= used::wants_news(queue, &self.memory, told)
                .map_err(|cause| DeviceFault::Ring { index, cause })?;
        }
        Ok(needed)
    }

    /// Whether there is a request. Cheap: one load for each queue.
    #[must_use]
    pub fn any_waiting(&self) -> bool {
        self.queues.iter().any(|queue| {
            queue
                .avail_idx(&self.memory, Ordering::Acquire)
                .is_ok_and(|index| index.0 != queue.next_avail())
        })
    }

    /// Asks the gate for a kick at the next request of the queues that are wanted. Returns whether there is one already.
    ///
    /// # Errors
    /// As [`Queues::call_needed`].
    pub fn ask_for_kicks(&mut self, wanted: impl Fn(usize) -> bool) -> Result<bool, DeviceFault> {
        let mut waiting = false;
        let queues = self.queues.iter_mut().enumerate();
        for (index, queue) in queues.filter(|(index, _)| wanted(*index)) {
            waiting |= queue
                .enable_notification(&self.memory)
                .map_err(|cause| DeviceFault::Ring { index, cause })?;
        }
        Ok(waiting)
    }
}

/// The memory of a window. Keeps it mapped.
#[derive(Debug, Clone)]
pub struct WindowMemory(GuestMemoryMmap);

impl WindowMemory {
    pub(crate) fn slice(&self, span: Span) -> VolatileSlice<'_> {
        slice(&self.0, span)
    }
}

/// What a device keeps at the end of its window for its successor ([`WindowLayout::kept`]). The gate leaves it
/// alone, so what is read there is what this process or one before it has written, or the guest that
/// took the gate over: it is to be checked like any other input.
#[derive(Debug, Clone)]
pub struct Kept {
    memory: WindowMemory,
    at: u64,
    bytes: usize,
}

impl Kept {
    /// Of a device that keeps nothing.
    #[must_use]
    pub const fn nothing(memory: WindowMemory) -> Self {
        Self {
            memory,
            at: 0,
            bytes: 0,
        }
    }

    pub(crate) fn of(queues: &Queues, layout: &WindowLayout) -> Self {
        Self {
            memory: queues.memory(),
            at: layout.kept as u64,
            bytes: layout.bytes.saturating_sub(layout.kept),
        }
    }

    /// Memory that nobody shares, of `bytes` bytes, for tests.
    ///
    /// # Panics
    /// When there is no memory.
    #[cfg(any(test, feature = "testing"))]
    #[must_use]
    #[expect(clippy::unwrap_used, reason = "a test that cannot set itself up fails")]
    pub fn of_its_own(bytes: usize) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap();
        Self {
            memory: WindowMemory(memory),
            at: 0,
            bytes,
        }
    }

    /// Its size in bytes; 0 for kinds that keep nothing.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.bytes
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    fn place(&self, at: usize, bytes: usize) -> Option<GuestAddress> {
        let end = at.checked_add(bytes)?;
        (end <= self.bytes).then(|| GuestAddress(self.at + at as u64))
    }

    /// Copies bytes out. False, and nothing, when they are not inside.
    #[must_use]
    pub fn read(&self, at: usize, to: &mut [u8]) -> bool {
        let place = self.place(at, to.len());
        place.is_some_and(|place| self.memory.0.read_slice(to, place).is_ok())
    }

    /// Copies bytes in. False, and nothing, when they are not inside.
    #[must_use]
    pub fn write(&self, at: usize, from: &[u8]) -> bool {
        let place = self.place(at, from.len());
        place.is_some_and(|place| self.memory.0.write_slice(from, place).is_ok())
    }

    /// Reads the word at `at`, a multiple of 8; 0 when it is not inside.
    #[must_use]
    pub fn load(&self, at: usize) -> u64 {
        let place = self.place(at, size_of::<u64>());
        place.map_or(0, |place| {
            self.memory.0.load(place, Ordering::Acquire).unwrap_or(0)
        })
    }

    /// Writes the word at `at`, a multiple of 8, after everything that was written before it.
    pub fn store(&self, at: usize, word: u64) {
        if let Some(place) = self.place(at, size_of::<u64>()) {
            // It is inside, and aligned by its callers.
            let _stored = self.memory.0.store(word, place, Ordering::Release);
        }
    }
}

#[expect(
    clippy::expect_used,
    reason = "spans are only made of ranges inside of the window: a bug of this module otherwise"
)]
fn slice(memory: &GuestMemoryMmap, span: Span) -> VolatileSlice<'_> {
    memory
        .get_slice(GuestAddress(span.offset.into()), span.len as usize)
        .expect("a span inside of the window")
}

/// Reads the descriptors of one request, each once. `None` when they are not sound: outside of the
/// window, more than four, readable after writable, or empty.
fn read_chain(
    head: u16,
    descriptors: impl Iterator<Item = virtio_queue::desc::split::Descriptor>,
    window_bytes: u32,
) -> Option<Chain> {
    let mut chain = Chain {
        head,
        ..Chain::default()
    };
    // It ends early where it leaves the table.
    let mut goes_on = true;
    for descriptor in descriptors {
        goes_on = descriptor.has_next();
        let offset = u32::try_from(descriptor.addr().0).ok()?;
        let len = descriptor.len();
        let span = Span { offset, len };
        if len == 0 || offset.checked_add(len)? > window_bytes {
            return None;
        }
        let fits = if descriptor.is_write_only() {
            chain.writable.push(span)
        } else {
            chain.writable.used == 0 && chain.readable.push(span)
        };
        if !fits || chain.readable.used + chain.writable.used > PARTS_MAX {
            return None;
        }
    }
    (!goes_on).then_some(chain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::desc::split::Descriptor;

    const NEXT: u16 = 1;
    const WRITE: u16 = 2;

    #[test]
    fn sound_chain_is_split_by_direction() {
        let list = [
            Descriptor::new(4096, 16, NEXT, 1),
            Descriptor::new(8192, 100, NEXT, 2),
            Descriptor::new(4128, 1, WRITE, 3),
        ];
        let chain = read_chain(8, list.into_iter(), 16384).unwrap();
        assert_eq!(chain.head(), 8);
        assert_eq!(
            chain.readable().iter().map(|s| s.len()).collect::<Vec<_>>(),
            [16, 100]
        );
        assert_eq!(
            chain.writable()[0],
            Span {
                offset: 4128,
                len: 1
            }
        );
    }

    #[test]
    fn unsound_chains_are_refused() {
        let one = |addr, len, flags| Descriptor::new(addr, len, flags, 0);
        for list in [
            vec![],
            vec![one(0, 0, 0)],
            vec![one(16384, 1, 0)],
            vec![one(16383, 2, 0)],
            vec![one(u64::MAX, 1, 0)],
            vec![one(8, u32::MAX, 0)],
            vec![one(0, 1, NEXT | WRITE), one(0, 1, 0)],
            vec![one(0, 1, NEXT), one(0, 1, NEXT)],
            [vec![one(0, 1, NEXT); 4], vec![one(0, 1, 0)]].concat(),
            [vec![one(0, 1, NEXT | WRITE); 4], vec![one(0, 1, WRITE)]].concat(),
        ] {
            assert_eq!(
                read_chain(0, list.clone().into_iter(), 16384),
                None,
                "{list:?}"
            );
        }
    }

    #[test]
    fn part_of_a_span_stays_inside() {
        let span = Span {
            offset: 100,
            len: 10,
        };
        assert_eq!(
            span.part(4, 100),
            Span {
                offset: 104,
                len: 6
            }
        );
        assert_eq!(
            span.part(40, 1),
            Span {
                offset: 110,
                len: 0
            }
        );
        assert!(span.part(10, 5).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_lies_inside(
            list in prop::collection::vec((any::<u64>(), any::<u32>(), 0u16..4), 0..6),
            small in prop::collection::vec((0u64..20000, 0u32..20000, 0u16..4), 0..6),
        ) {
            for list in [list, small] {
                let descriptors = list.iter().map(|&(a, l, f)| Descriptor::new(a, l, f, 0));
                if let Some(chain) = read_chain(0, descriptors, 16384) {
                    for span in chain.readable().iter().chain(chain.writable()) {
                        prop_assert!(span.offset + span.len <= 16384 && span.len > 0);
                    }
                }
            }
        }
    }
}
