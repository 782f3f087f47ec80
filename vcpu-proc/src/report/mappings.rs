//! The guest's virtual memory as runs of contiguous guest-physical memory, for the core file.
//!
//! Every present entry of the tables is followed once per place where it is used. Tables that refer
//! to themselves would make this endless, so the number of tables and of runs is bounded; kernel
//! addresses come first, because there the bound should not bite.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend};

use crate::paging::{Mode, Paging};

/// Tables read at most; the direct mapping of 16 GiB in 2 MiB pages needs 17.
const TABLES_MAX: usize = 16_384;
/// Runs given at most.
const RUNS_MAX: usize = 8_192;
const ENTRIES: usize = 512;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// Virtual memory that is contiguous in guest-physical memory too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) linear: u64,
    pub(super) physical: u64,
    pub(super) bytes: u64,
}

/// The runs of a vCPU in 64-bit paging; `None` in any other mode.
pub(super) fn runs<M: GuestMemoryBackend>(sregs: &kvm_sregs, mem: &M) -> Option<Vec<Run>> {
    let top = match Paging::new(sregs).mode {
        Mode::Level4 => 4,
        Mode::Level5 => 5,
        Mode::Off | Mode::Bits32 | Mode::Pae => return None,
    };
    let mut walk = Walk {
        mem,
        tables_left: TABLES_MAX,
        runs: Vec::new(),
    };
    let root = sregs.cr3 & FRAME;
    walk.table(root, top, 0, ENTRIES / 2..ENTRIES, top);
    walk.table(root, top, 0, 0..ENTRIES / 2, top);
    Some(walk.runs)
}

struct Walk<'a, M> {
    mem: &'a M,
    tables_left: usize,
    runs: Vec<Run>,
}

impl<M: GuestMemoryBackend> Walk<'_, M> {
    /// Follows the entries `range` of the table at `gpa`, which maps from `base` on. Recursion is as
    /// deep as there are levels.
    fn table(&mut self, gpa: u64, level: u32, base: u64, range: std::ops::Range<usize>, top: u32) {
        let mut bytes = [0; ENTRIES * 8];
        if self.tables_left == 0 || self.mem.read_slice(&mut bytes, GuestAddress(gpa)).is_err() {
            return;
        }
        self.tables_left -= 1;
        let shift = 12 + 9 * (level - 1);
        let (words, _) = bytes.as_chunks::<8>();
        for (index, word) in words.iter().enumerate().skip(range.start).take(range.len()) {
            let entry = u64::from_le_bytes(*word);
            if entry & PRESENT == 0 || self.runs.len() >= RUNS_MAX {
                continue;
            }
            let mut linear = base | (index as u64) << shift;
            if level == top && index >= ENTRIES / 2 {
                // The upper half has all higher bits set.
                linear |= u64::MAX << (shift + 9);
            }
            if level == 1 || (entry & LARGE != 0 && level <= 3) {
                let page_bytes = 1 << shift;
                self.page(linear, entry & FRAME & !(page_bytes - 1), page_bytes);
            } else {
                self.table(entry & FRAME, level - 1, linear, 0..ENTRIES, top);
            }
        }
    }

    fn page(&mut self, linear: u64, physical: u64, bytes: u64) {
        if let Some(last) = self.runs.last_mut()
            && last.linear.checked_add(last.bytes) == Some(linear)
            && last.physical.checked_add(last.bytes) == Some(physical)
        {
            last.bytes += bytes;
        } else {
            self.runs.push(Run {
                linear,
                physical,
                bytes,
            });
        }
    }
}
