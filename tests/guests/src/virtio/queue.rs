//! The driver half of a split virtqueue. Everything that the device could have overwritten is kept
//! in private memory as well and never read back.

use core::sync::atomic::{Ordering, fence};

use crate::report::Failure;
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{Device, feature, reg};

/// Largest queue that the driver uses.
pub const QUEUE_SIZE_MAX: usize = 256;
/// Bytes of a descriptor.
pub const DESCRIPTOR: usize = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One segment of a request.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub write: bool,
}

impl Segment {
    /// Memory that the device reads.
    pub fn readable(memory: Dma) -> Segment {
        Segment {
            address: memory.address,
            len: memory.len as u32,
            write: false,
        }
    }

    /// Memory that the device writes.
    pub fn writable(memory: Dma) -> Segment {
        Segment {
            write: true,
            ..Segment::readable(memory)
        }
    }
}

/// A used element.
#[derive(Debug, Clone, Copy)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes that the device says to have written.
    pub len: u32,
}

/// A queue.
#[derive(Debug)]
pub struct Queue {
    device: Device,
    /// Its number.
    pub index: u16,
    /// Its size.
    pub size: u16,
    event_idx: bool,
    memory: Dma,
    next: [u16; QUEUE_SIZE_MAX],
    /// For each head, how many bytes the device may write; [`UNBOUNDED`] for chains built elsewhere.
    writable: [u32; QUEUE_SIZE_MAX],
    free: u16,
    free_count: u16,
    avail_index: u16,
    kicked_index: u16,
    used_index: u16,
    /// Notifications sent, for the records.
    pub kicks: u64,
}

const NONE: u16 = u16::MAX;
const UNBOUNDED: u32 = u32::MAX;

impl Queue {
    /// Lays a queue out in fresh memory, with interrupts suppressed.
    pub fn new(device: Device, index: u16, size: u16, features: u64) -> Queue {
        let memory = phys::allocate(3 * 4096);
        let mut next = [NONE; QUEUE_SIZE_MAX];
        for (entry, following) in next.iter_mut().zip(1..size) {
            *entry = following;
        }
        let mut queue = Queue {
            device,
            index,
            size,
            event_idx: features & feature::EVENT_IDX != 0,
            memory,
            next,
            writable: [UNBOUNDED; QUEUE_SIZE_MAX],
            free: 0,
            free_count: size,
            avail_index: 0,
            kicked_index: 0,
            used_index: 0,
            kicks: 0,
        };
        queue.suppress_interrupts();
        queue
    }

    /// Addresses of descriptor table, driver area and device area.
    pub fn addresses(&self) -> [u64; 3] {
        [
            self.memory.address,
            self.memory.address + 4096,
            self.memory.address + 8192,
        ]
    }

    /// The descriptor table, for those who want to write nonsense.
    pub fn table(&self) -> Dma {
        self.memory.part(0, 4096)
    }

    /// The available ring: flags, index, entries.
    pub fn avail(&self) -> Dma {
        self.memory.part(4096, 4096)
    }

    /// The used ring: flags, index, elements.
    pub fn used(&self) -> Dma {
        self.memory.part(8192, 4096)
    }

    /// Descriptors that are free.
    pub fn room(&self) -> usize {
        usize::from(self.free_count)
    }

    /// Writes one descriptor of a table.
    fn describe(table: Dma, at: usize, segment: Segment, next: Option<u16>) {
        let flags = if segment.write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
        Queue::describe_raw(
            table,
            at,
            segment.address,
            segment.len,
            flags,
            next.unwrap_or(0),
        );
    }

    /// Writes one descriptor with any flags.
    pub fn describe_raw(table: Dma, at: usize, address: u64, len: u32, flags: u16, next: u16) {
        table.write(at * DESCRIPTOR, address);
        table.write(at * DESCRIPTOR + 8, len);
        table.write(at * DESCRIPTOR + 12, flags);
        table.write(at * DESCRIPTOR + 14, next);
    }

    /// Builds a chain and returns its head, without making it available; `None` without room.
    pub fn build(&mut self, segments: &[Segment]) -> Option<u16> {
        if segments.is_empty() || segments.len() > self.room() {
            return None;
        }
        let head = self.free;
        let mut at = head;
        for (index, segment) in segments.iter().enumerate() {
            let next = self.next[usize::from(at)];
            let last = index + 1 == segments.len();
            let link = (!last).then_some(next);
            Queue::describe(self.memory, usize::from(at), *segment, link);
            if last {
                self.free = next;
                self.next[usize::from(at)] = NONE;
            }
            at = next;
        }
        self.free_count -= segments.len() as u16;
        self.bound(head, segments);
        Some(head)
    }

    /// The same with the chain in `table`, which must live until the request is done.
    pub fn build_indirect(&mut self, segments: &[Segment], table: Dma) -> Option<u16> {
        if segments.is_empty() || self.room() == 0 {
            return None;
        }
        for (index, segment) in segments.iter().enumerate() {
            let next = (index + 1 < segments.len()).then_some(index as u16 + 1);
            Queue::describe(table, index, *segment, next);
        }
        let head = self.free;
        let len = (segments.len() * DESCRIPTOR) as u32;
        Queue::describe_raw(
            self.memory,
            usize::from(head),
            table.address,
            len,
            INDIRECT,
            0,
        );
        self.free = self.next[usize::from(head)];
        self.next[usize::from(head)] = NONE;
        self.free_count -= 1;
        self.bound(head, segments);
        Some(head)
    }

    /// From now on the device may say to have written as much as these segments hold.
    fn bound(&mut self, head: u16, segments: &[Segment]) {
        let writable = segments.iter().filter(|segment| segment.write);
        self.writable[usize::from(head)] = writable.map(|segment| segment.len).sum();
    }

    /// Gives the descriptors of a chain back.
    pub fn release(&mut self, head: u16) {
        let mut last = head;
        let mut count = 1;
        while self.next[usize::from(last)] != NONE {
            last = self.next[usize::from(last)];
            count += 1;
        }
        self.next[usize::from(last)] = self.free;
        self.writable[usize::from(head)] = UNBOUNDED;
        self.free = head;
        self.free_count += count;
    }

    /// Puts a built chain into the available ring; `kick` makes it visible.
    #[inline]
    pub fn offer(&mut self, head: u16) {
        let slot = usize::from(self.avail_index & (self.size - 1));
        self.avail().write(4 + 2 * slot, head);
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Publishes what was offered and notifies the device if it wants that.
    #[inline]
    pub fn kick(&mut self) {
        fence(Ordering::Release);
        self.avail().write(2, self.avail_index);
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event: u16 = self.used().read(4 + 8 * usize::from(self.size));
            self.avail_index.wrapping_sub(event).wrapping_sub(1)
                < self.avail_index.wrapping_sub(self.kicked_index)
        } else {
            self.used().read::<u16>(0) & 1 == 0
        };
        self.kicked_index = self.avail_index;
        if wanted {
            self.kick_always();
        }
    }

    /// Notifies the device whatever it wants.
    pub fn kick_always(&mut self) {
        self.kicks += 1;
        self.device.write(reg::QUEUE_NOTIFY, u32::from(self.index));
    }

    /// Whether there is a used element.
    pub fn has_used(&self) -> bool {
        self.used().read::<u16>(2) != self.used_index
    }

    /// The next used element, checked; the chain is not released.
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Used>, Failure> {
        let index: u16 = self.used().read(2);
        if index == self.used_index {
            return Ok(None);
        }
        fence(Ordering::Acquire);
        let slot = usize::from(self.used_index & (self.size - 1));
        let id: u32 = self.used().read(4 + 8 * slot);
        let len: u32 = self.used().read(8 + 8 * slot);
        if id >= u32::from(self.size) {
            let expected = u64::from(self.size) - 1;
            return Err(Failure::Wrong {
                what: "used_id",
                got: u64::from(id),
                expected,
            });
        }
        let writable = self.writable[id as usize];
        if len > writable {
            return Err(Failure::Wrong {
                what: "used_len",
                got: u64::from(len),
                expected: u64::from(writable),
            });
        }
        self.used_index = self.used_index.wrapping_add(1);
        Ok(Some(Used {
            head: id as u16,
            len,
        }))
    }

    /// Waits for a used element and releases its chain.
    pub fn wait(&mut self, deadline: Deadline) -> Result<Used, Failure> {
        let mut spins = 0_u32;
        loop {
            if let Some(used) = self.poll()? {
                self.release(used.head);
                return Ok(used);
            }
            spins += 1;
            if spins & 0x3f_ffff == 0 && self.device.needs_reset() {
                return Err(Failure::NeedsReset("used_ring"));
            }
            if spins & 0xff == 0 && deadline.passed() {
                return Err(Failure::Timeout("used_ring"));
            }
            core::hint::spin_loop();
        }
    }

    /// One request from start to end.
    pub fn transfer(&mut self, segments: &[Segment], deadline: Deadline) -> Result<Used, Failure> {
        let head = self.build(segments).ok_or(Failure::Parameter("segments"))?;
        self.offer(head);
        self.kick();
        let used = self.wait(deadline)?;
        crate::report::expect("used_id", u64::from(used.head), u64::from(head))?;
        Ok(used)
    }

    /// Asks the device not to interrupt. With event indexes one interrupt in 2^15 comes anyway,
    /// unless this is called now and then.
    #[inline]
    pub fn suppress_interrupts(&mut self) {
        if self.event_idx {
            self.avail().write(
                4 + 2 * usize::from(self.size),
                self.used_index.wrapping_sub(1),
            );
        } else {
            self.avail().write(0, 1_u16);
        }
    }

    /// Asks for an interrupt with the next completion.
    pub fn want_interrupt(&mut self) {
        self.avail().write(0, 0_u16);
        self.avail()
            .write(4 + 2 * usize::from(self.size), self.used_index);
        fence(Ordering::SeqCst);
    }
}
