//! The io_uring of a traced process: which operations it hands over.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Where a ring has its submission queue: offsets of `struct io_uring_params`.
const SQ_OFF: u64 = 40;
/// Offset of the mapping of submission entries.
const OFFSET_SQES: u64 = 0x1000_0000;
/// Bytes of a submission entry.
const ENTRY_BYTES: u64 = 64;
/// Most entries that a ring has.
const ENTRIES_MAX: u32 = 32768;

/// A ring in the memory of a traced process.
#[derive(Debug, Clone, Default)]
pub(super) struct Ring {
    descriptor: u64,
    /// Offsets of head, tail, mask and array in the mapping of the queue.
    offsets: [u64; 4],
    queue: Option<u64>,
    entries: Option<u64>,
}

impl Ring {
    /// The ring that `io_uring_setup` has made, whose parameters are at `params`.
    pub(super) fn made(memory: &File, descriptor: u64, params: u64) -> Option<Self> {
        let at = |field: u64| word(memory, params + SQ_OFF + 4 * field).map(u64::from);
        Some(Self {
            descriptor,
            offsets: [at(0)?, at(1)?, at(2)?, at(6)?],
            queue: None,
            entries: None,
        })
    }

    /// `mmap` has mapped the descriptor at `offset` to `address`.
    pub(super) fn mapped(&mut self, descriptor: u64, offset: u64, address: u64) {
        if descriptor & 0xffff_ffff != self.descriptor {
            return;
        }
        match offset {
            0 => self.queue = Some(address),
            OFFSET_SQES => self.entries = Some(address),
            _ => {}
        }
    }

    /// The operations that wait to be handed over, at most `count`.
    pub(super) fn waiting(&self, memory: &File, count: u64) -> Option<Vec<u8>> {
        let (queue, entries) = (self.queue?, self.entries?);
        let [head, tail, mask, array] = self.offsets.map(|offset| queue + offset);
        let (head, tail) = (word(memory, head)?, word(memory, tail)?);
        let mask = word(memory, mask)?;
        let count = u32::try_from(count).ok()?.min(tail.wrapping_sub(head));
        let mut operations = Vec::new();
        for n in 0..count.min(ENTRIES_MAX) {
            let place = u64::from(head.wrapping_add(n) & mask);
            let index = u64::from(word(memory, array + 4 * place)?);
            let mut operation = [0];
            let at = entries + ENTRY_BYTES * index;
            memory.read_exact_at(&mut operation, at).ok()?;
            operations.push(operation[0]);
        }
        Some(operations)
    }
}

fn word(memory: &File, at: u64) -> Option<u32> {
    let mut bytes = [0; 4];
    memory.read_exact_at(&mut bytes, at).ok()?;
    Some(u32::from_ne_bytes(bytes))
}
