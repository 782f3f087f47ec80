//! Frames on their way to a guest: received in *rooms*, window pages that are the gate's own, and dealt to the guest's
//! buffers when they are there.
//!
//! ```text
//!   rooms offered ── device fills one or, for a large frame, several and completes them in one step
//!     ── the guest's buffers taken, as many as the frame needs ── copied ── rooms offered again
//! ```
//!
//! A guest's buffers are small, and a large frame takes dozens of them. None has a slot, a page or a journal entry here:
//! the device sees a few rooms, and a process that dies takes no buffer of the guest's with it. A frame for
//! which there are too few buffers waits in its rooms until there are more.

use super::copy::{Direction, copy_spans};
use super::journal::{Entry, GuestSpan};
use super::queue::{Backing, CHAIN_DESCRIPTORS_MAX, GateQueue, GuestFault, give_back};
use bulkhead_ipc::device_kind::NET_HEADER_BYTES;
use bulkhead_ipc::port::PACKET_BYTES_MAX;
use bulkhead_ipc::ring::{PageRange, RequestLayout, RingFault, Span, WindowPages};
use bulkhead_ipc::window::DATA_PAGE_BYTES;
use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes of a room: more than a frame of a usual wire needs, so that a large one takes a few.
const ROOM_BYTES: usize = ROOM_PAGES * DATA_PAGE_BYTES;
const ROOM_PAGES: usize = 4;
/// Rooms that the longest frame takes.
const FRAME_ROOMS_MAX: u16 = 5;
const _: () = assert!(PACKET_BYTES_MAX.div_ceil(ROOM_BYTES) == FRAME_ROOMS_MAX as usize);
/// Rooms of one queue; more would only be colder.
const ROOMS_MAX: usize = 96;
/// Most descriptors of the buffers of one frame.
const FRAME_DESCRIPTORS_MAX: usize = CHAIN_DESCRIPTORS_MAX;
const HEADER_BYTES: usize = NET_HEADER_BYTES as usize;
const BUFFERS_AT: usize = bulkhead_ipc::device_kind::NET_BUFFERS_AT as usize;

/// A room that the device has filled.
#[derive(Debug)]
struct Filled {
    pages: PageRange,
    /// Offset in the window.
    at: usize,
    len: usize,
    /// In the first room of a frame, how many it has.
    rooms: u16,
}

/// The receiving side of a queue, from its start by the guest to its reset.
#[derive(Debug)]
pub(super) struct Frames {
    /// Whether the driver takes frames in several buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    filled: VecDeque<Filled>,
    /// Whether the guest has ever offered a buffer: a pair of queues that it does not use has none, by which the device's
    /// process knows.
    is_used: bool,
    /// The guest's avail index when the device gave a room back empty: it does not want any.
    declined: Option<u16>,
    /// The guest's avail index when its buffers were too few.
    short: Option<u16>,
    /// Chains for the frame at hand, of which so many are taken. The others keep their allocations.
    chains: Vec<Entry>,
    taken: usize,
    /// Whether the last frame came alone.
    is_single: bool,
}

/// Whether the guest's buffers are enough for a frame.
enum Gathered {
    /// They were taken.
    Enough,
    /// There may be more.
    Short,
    /// It cannot have as much as that.
    Small,
}

impl Frames {
    pub(super) const fn new(mergeable: bool) -> Self {
        Self {
            mergeable,
            filled: VecDeque::new(),
            is_used: false,
            declined: None,
            short: None,
            chains: Vec::new(),
            taken: 0,
            is_single: false,
        }
    }

    /// The guest's reset: what has arrived is nobody's, and its pages are given back.
    pub(super) fn discard(self, held: &mut usize, pages: &mut WindowPages) {
        for room in self.filled {
            give_back(held, pages, room.pages);
        }
    }

    /// The device's process is dead, and its window begins anew: what is in it is lost, as on a wire.
    pub(super) fn begin_anew(&mut self) {
        self.filled.clear();
        self.is_used = false;
        self.declined = None;
        self.short = None;
    }

    /// Whether only the guest can tell that there is more to do.
    pub(super) const fn waits_for_guest(&self) -> bool {
        self.short.is_some() || self.declined.is_some() || !self.is_used
    }
}

impl GateQueue {
    /// Offers the device as many rooms as it may have.
    pub(super) fn offer_rooms(&mut self, backing: &mut Backing<'_>) -> Result<(), GuestFault> {
        let index = self.avail_index(backing.memory)?;
        let (Some(frames), Some(guest)) = (&mut self.frames, &self.guest) else {
            return Ok(());
        };
        frames.is_used |= index != guest.next_avail();
        if !frames.is_used || frames.declined == Some(index) {
            return Ok(());
        }
        frames.declined = None;
        while self.may_hold_a_room() && self.shadow.next_slot().is_some() {
            let Some(pages) = backing.pages.take(ROOM_BYTES) else {
                break;
            };
            self.pages_held += ROOM_PAGES;
            let at = backing.window.layout.data + pages.offset();
            let mut room = RequestLayout::default();
            room.push(Span {
                offset: at,
                len: u32::try_from(ROOM_BYTES).unwrap_or(0),
                writable: true,
            });
            let slot = self.shadow.submit(&backing.window.memory, &room);
            if let Some(entry) = self.journal.get_mut(usize::from(slot)) {
                entry.clear();
                entry.pages = Some(pages);
                entry.writable_at = at;
                entry.epoch = backing.epoch;
                entry.in_flight = true;
            }
        }
        Ok(())
    }

    fn may_hold_a_room(&self) -> bool {
        self.pages_held + ROOM_PAGES <= self.pages_limit.min(ROOMS_MAX * ROOM_PAGES)
    }

    /// Whether the window has had too few pages for as many rooms as a frame may need.
    pub(super) fn lacks_rooms(&self) -> bool {
        let wants = |frames: &Frames| frames.is_used && frames.declined.is_none();
        self.frames.as_ref().is_some_and(wants)
            && self.in_flight() < FRAME_ROOMS_MAX
            && self.may_hold_a_room()
    }

    /// Takes the rooms that the device has filled. What it has completed in one step belongs together. Returns how many there
    /// were.
    ///
    /// # Errors
    /// [`RingFault`] when the device lies, also about how many rooms a frame has.
    pub(super) fn take_filled(
        &mut self,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<u32, RingFault> {
        if *budget == 0 {
            return Ok(0);
        }
        let window = &backing.window.memory;
        let there = self.shadow.completions(window);
        let mut done = 0;
        // Rooms of the frame at hand that are still to come.
        let (mut to_come, mut claimed) = (0, 0);
        for n in 0..there {
            let Some(completion) = self.shadow.complete(window)? else {
                break;
            };
            done += 1;
            *budget = budget.saturating_sub(1);
            let Some(place) = self.journal.get_mut(usize::from(completion.slot)) else {
                continue;
            };
            let (epoch, at) = (place.epoch, place.writable_at);
            let pages = place.pages.take();
            place.clear();
            let Some(pages) = pages else { continue };
            let len = usize::try_from(completion.written).unwrap_or(0);
            if epoch != backing.epoch || self.frames.is_none() {
                // A leftover of before the guest's reset.
                give_back(&mut self.pages_held, backing.pages, pages);
                continue;
            }
            if to_come == 0 && len == 0 {
                give_back(&mut self.pages_held, backing.pages, pages);
                self.decline(backing.memory);
                continue;
            }
            let mut rooms = 0;
            if to_come == 0 {
                let least = u32::from(NET_HEADER_BYTES);
                if completion.written < least {
                    let got = completion.written;
                    give_back(&mut self.pages_held, backing.pages, pages);
                    return Err(RingFault::NoHeader { got, least });
                }
                let got = u16::from_le_bytes(window.read(at + BUFFERS_AT));
                let most = (there - n).min(FRAME_ROOMS_MAX);
                if !(1..=most).contains(&got) {
                    give_back(&mut self.pages_held, backing.pages, pages);
                    return Err(RingFault::Buffers { got, most });
                }
                (rooms, to_come, claimed) = (got, got, got);
            }
            to_come -= 1;
            if let Some(frames) = &mut self.frames {
                frames.filled.push_back(Filled {
                    pages,
                    at,
                    len,
                    rooms,
                });
            }
        }
        if to_come > 0 {
            // Its index went back in between.
            let most = claimed - to_come;
            return Err(RingFault::Buffers { got: claimed, most });
        }
        Ok(done)
    }

    fn decline(&mut self, memory: &GuestMemoryMmap) {
        let index = self.avail_index(memory).unwrap_or(0);
        if let Some(frames) = &mut self.frames {
            frames.declined = Some(index);
        }
    }

    /// Deals frames to the guest's buffers, as long as there are enough.
    ///
    /// # Errors
    /// [`GuestFault`] when the guest's buffers are none.
    pub(super) fn deal(
        &mut self,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<(), GuestFault> {
        let Some(mut frames) = self.frames.take() else {
            return Ok(());
        };
        let dealt = self.deal_to(&mut frames, backing, budget);
        self.frames = Some(frames);
        self.put_together(backing.memory);
        dealt
    }

    fn deal_to(
        &mut self,
        frames: &mut Frames,
        backing: &mut Backing<'_>,
        budget: &mut u32,
    ) -> Result<(), GuestFault> {
        if frames.filled.is_empty() {
            return Ok(());
        }
        let index = self.avail_index(backing.memory)?;
        if frames.short == Some(index) {
            return Ok(());
        }
        frames.short = None;
        let mut dealt = 0;
        while let Some(rooms) = frames.filled.front().map(|room| usize::from(room.rooms)) {
            if *budget == 0 {
                return Ok(());
            }
            let rooms = rooms.max(1).min(frames.filled.len());
            let bytes = frames.filled.iter().take(rooms).map(|room| room.len).sum();
            let begin = self.guest.as_ref().map_or(0, QueueT::next_avail);
            let gathered = self.gather(frames, bytes, backing);
            *budget = budget.saturating_sub(u32::try_from(frames.taken).unwrap_or(u32::MAX).max(1));
            if !matches!(gathered, Ok(Gathered::Enough))
                && let Some(guest) = &mut self.guest
            {
                guest.set_next_avail(begin);
            }
            match gathered? {
                Gathered::Enough => self.scatter(frames, rooms, bytes, backing),
                Gathered::Short => {
                    frames.short = Some(index);
                    return Ok(());
                }
                // It will never fit: lost.
                Gathered::Small => {}
            }
            for room in frames.filled.drain(..rooms) {
                give_back(&mut self.pages_held, backing.pages, room.pages);
            }
            dealt += 1;
            frames.is_single = dealt == 1;
        }
        Ok(())
    }

    /// Takes buffers of the guest's for a frame of `bytes` bytes. Unless they are enough the caller gives them back.
    fn gather(
        &mut self,
        frames: &mut Frames,
        bytes: usize,
        backing: &mut Backing<'_>,
    ) -> Result<Gathered, GuestFault> {
        frames.taken = 0;
        let size = self.guest.as_ref().map_or(0, QueueT::size);
        let (mut room, mut descriptors) = (0, 0);
        while room < bytes {
            if frames.taken > 0 && (!frames.mergeable || frames.taken == usize::from(size)) {
                return Ok(Gathered::Small);
            }
            if frames.chains.len() == frames.taken {
                frames.chains.push(Entry::default());
            }
            let Some(chain) = frames.chains.get_mut(frames.taken) else {
                return Ok(Gathered::Short);
            };
            chain.clear();
            if !self.pop(backing, chain)? {
                return Ok(Gathered::Short);
            }
            if chain.writable_bytes < HEADER_BYTES {
                return Err(GuestFault::TooSmall {
                    head: chain.head,
                    bytes: chain.writable_bytes,
                    least: HEADER_BYTES,
                });
            }
            room += chain.writable_bytes;
            descriptors += chain.descriptors;
            frames.taken += 1;
            if descriptors > FRAME_DESCRIPTORS_MAX {
                let limit = FRAME_DESCRIPTORS_MAX;
                return Err(GuestFault::Scattered { bytes, limit });
            }
        }
        Ok(Gathered::Enough)
    }

    /// Copies the first frame, of so many rooms and bytes, to the buffers that were taken for it.
    fn scatter(&mut self, frames: &Frames, rooms: usize, bytes: usize, backing: &Backing<'_>) {
        let window = &backing.window.memory;
        let chains = frames.chains.get(..frames.taken).unwrap_or_default();
        let mut rooms = frames.filled.iter().take(rooms);
        let Some(mut room) = rooms.next() else { return };
        let (mut left, mut read) = (bytes, 0);
        for chain in chains {
            let want = chain.writable_bytes.min(left);
            let mut written = 0;
            while written < want {
                if read == room.len {
                    let Some(next) = rooms.next() else { break };
                    (room, read) = (next, 0);
                }
                let len = (want - written).min(room.len - read);
                let copied = copy_spans(
                    backing.memory,
                    window,
                    Direction::ToGuest,
                    &chain.writable,
                    written,
                    room.at + read,
                    len,
                );
                debug_assert!(copied.is_ok(), "guest memory was checked by the caller");
                written += len;
                read += len;
            }
            left -= want;
            let len = u32::try_from(want).unwrap_or(u32::MAX);
            self.together.push((chain.head, len));
        }
        // Over the number of rooms, where no device can change it any more.
        if let Some(first) = chains.first() {
            let buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
            put(backing.memory, &first.writable, BUFFERS_AT, buffers);
        }
    }

    /// Asks the guest to tell of further buffers, if somebody waits for them. Returns whether there are some already.
    ///
    /// So it does where frames come one at a time: a driver that gives a buffer back is about to answer, and to be awake then
    /// saves more than the kick costs (decision 0034).
    pub(super) fn listen_for_buffers(&mut self, memory: &GuestMemoryMmap) -> bool {
        let (Some(frames), Some(guest)) = (&self.frames, &mut self.guest) else {
            return false;
        };
        // What is there already is no news: the kick is to come for what is behind it.
        let waits = frames.waits_for_guest();
        let begin = guest.next_avail();
        let known = match guest.avail_idx(memory, Ordering::Acquire) {
            _ if waits => frames.short.or(frames.declined).unwrap_or(begin),
            Ok(index) if frames.is_single => index.0,
            _ => return false,
        };
        guest.set_next_avail(known);
        let more = guest.enable_notification(memory).unwrap_or(false);
        guest.set_next_avail(begin);
        waits && more
    }

    fn avail_index(&self, memory: &GuestMemoryMmap) -> Result<u16, GuestFault> {
        let Some(guest) = &self.guest else {
            return Ok(0);
        };
        let index = guest.avail_idx(memory, Ordering::Acquire);
        let index = index.map_err(|_| GuestFault::Ring { queue: self.index })?;
        Ok(index.0)
    }
}

/// Puts a little-endian number at `at` bytes into the spans, which are guest memory and may part anywhere.
fn put(memory: &GuestMemoryMmap, spans: &[GuestSpan], at: usize, number: u16) {
    for (byte, mut skip) in number.to_le_bytes().into_iter().zip(at..) {
        for span in spans {
            if skip < span.len {
                let place = GuestAddress(span.address.0.saturating_add(skip as u64));
                let written = memory.write_obj(byte, place);
                debug_assert!(written.is_ok(), "guest memory was checked");
                break;
            }
            skip -= span.len;
        }
    }
}
