//! The device half of a split ring with event indexes, access by access as `virtio-queue` 0.18 does it.

use crate::shared::SharedMemory;
use crate::sync::{Ordering, fence};
use crate::window::QueueLayout;
use std::num::Wrapping;

#[derive(Debug)]
pub(super) struct Device {
    layout: QueueLayout,
    next_avail: Wrapping<u16>,
    next_used: Wrapping<u16>,
    num_added: Wrapping<u16>,
}

/// A chain: its head, and the first descriptor's address and length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chain {
    pub(super) head: u16,
    pub(super) address: u64,
    pub(super) len: u32,
}

impl Device {
    pub(super) const fn new(layout: QueueLayout) -> Self {
        Self {
            layout,
            next_avail: Wrapping(0),
            next_used: Wrapping(0),
            num_added: Wrapping(0),
        }
    }

    pub(super) fn pop(&mut self, memory: &SharedMemory) -> Option<Chain> {
        let index = memory.load::<u16>(self.layout.avail_ring + 2, Ordering::Acquire);
        if index == self.next_avail.0 {
            return None;
        }
        let place = usize::from(self.next_avail.0 & (self.layout.descriptors - 1));
        let head = memory.load::<u16>(self.layout.avail_ring + 4 + 2 * place, Ordering::Acquire);
        self.next_avail += 1;
        let at = self.layout.desc_table + 16 * usize::from(head);
        Some(Chain {
            head,
            address: memory.read(at),
            len: memory.read(at + 8),
        })
    }

    pub(super) fn add_used(&mut self, memory: &SharedMemory, head: u16, len: u32) {
        let place = usize::from(self.next_used.0 & (self.layout.descriptors - 1));
        let at = self.layout.used_ring + 4 + 8 * place;
        memory.write(at, u32::from(head));
        memory.write(at + 4, len);
        self.next_used += 1;
        self.num_added += 1;
        memory.store(
            self.layout.used_ring + 2,
            self.next_used.0,
            Ordering::Release,
        );
    }

    pub(super) fn enable_notification(&self, memory: &SharedMemory) -> bool {
        let event = self.layout.used_ring + 4 + 8 * usize::from(self.layout.descriptors);
        memory.store(event, self.next_avail.0, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        memory.load::<u16>(self.layout.avail_ring + 2, Ordering::Relaxed) != self.next_avail.0
    }

    pub(super) fn needs_notification(&mut self, memory: &SharedMemory) -> bool {
        fence(Ordering::SeqCst);
        let event = self.layout.avail_ring + 4 + 2 * usize::from(self.layout.descriptors);
        let event = Wrapping(memory.load::<u16>(event, Ordering::Relaxed));
        let old = self.next_used - std::mem::take(&mut self.num_added);
        self.next_used - event - Wrapping(1) < self.next_used - old
    }
}
