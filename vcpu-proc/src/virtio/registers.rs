//! The registers of all virtio-mmio slots, as the guest reads them (virtio 1.2 section 4.2.2).
//!
//! They are memory that the guest may read and not write (`KVM_MEM_READONLY`, KVM API section 4.35): a read is a load
//! like any other and costs no exit, a write comes to the vCPU thread, which changes what is read. Where KVM has no such memory, reads
//! exit as well, and are answered from here.

use crate::memory;
use bulkhead_ipc::device_kind::CONFIG_BYTES_MAX;
use bulkhead_ipc::platform::{VIRTIO_MMIO_SLOTS, VIRTIO_MMIO_STRIDE};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vm_memory::{Bytes, MmapRegion, VolatileMemory};

/// Bytes of a slot.
#[expect(clippy::cast_possible_truncation, reason = "4096")]
const SLOT_BYTES: usize = VIRTIO_MMIO_STRIDE as usize;
const WORD: usize = size_of::<u64>();
/// Offset of the configuration space in a slot.
pub(super) const CONFIG: usize = 0x100;

const _: () = assert!(CONFIG + CONFIG_BYTES_MAX <= SLOT_BYTES);

/// A register of a slot that is read, by its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Register {
    Magic = 0x000,
    Version = 0x004,
    DeviceId = 0x008,
    VendorId = 0x00c,
    DeviceFeatures = 0x010,
    QueueSizeMax = 0x034,
    QueueReady = 0x044,
    InterruptStatus = 0x060,
    Status = 0x070,
    SharedMemoryLengthLow = 0x0b0,
    SharedMemoryLengthHigh = 0x0b4,
    SharedMemoryBaseLow = 0x0b8,
    SharedMemoryBaseHigh = 0x0bc,
    ConfigGeneration = 0x0fc,
}

/// The registers of all slots. Those without a device read as zero, which a driver takes for an empty slot.
#[derive(Debug, Clone)]
pub struct RegisterFile(Arc<MmapRegion>);

impl RegisterFile {
    /// Without a device.
    ///
    /// # Errors
    /// The kernel has no memory.
    pub fn new() -> io::Result<Self> {
        let region = memory::map_registers(VIRTIO_MMIO_SLOTS * SLOT_BYTES)?;
        Ok(Self(Arc::new(region)))
    }

    /// Where they are in this process, and how many bytes.
    pub(crate) fn memory(&self) -> (*mut u8, u64) {
        (self.0.as_ptr(), self.0.size() as u64)
    }

    /// Those of one slot.
    pub(super) fn of(&self, slot: u8) -> SlotRegisters {
        SlotRegisters {
            file: self.clone(),
            start: usize::from(slot) * SLOT_BYTES,
        }
    }

    /// What a read at `offset` from the first slot finds, zeroes beyond the last.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        let _part_beyond_the_end = self.0.as_volatile_slice().read(data, offset);
    }
}

/// The registers of one slot. The gate thread may ask for a reset in the status and has the configuration, all threads change their bits
/// of the interrupt status; everything else is the vCPU threads', with the lock of the transport.
#[derive(Debug)]
pub(crate) struct SlotRegisters {
    file: RegisterFile,
    start: usize,
}

impl SlotRegisters {
    fn change<T>(&self, register: Register, change: impl FnOnce(&AtomicU32) -> T) -> T {
        let cell = self.file.0.get_atomic_ref(self.start + register as usize);
        // `of` is given slots that exist, whose registers all lie in the memory.
        change(cell.unwrap_or(&AtomicU32::new(0)))
    }

    pub(crate) fn set(&self, register: Register, value: u32) {
        self.change(register, |cell| cell.store(value, Ordering::Release));
    }

    /// Sets these bits and leaves the others as they are.
    pub(crate) fn raise(&self, register: Register, bits: u32) {
        self.change(register, |cell| cell.fetch_or(bits, Ordering::AcqRel));
    }

    /// Clears these bits and leaves the others as they are.
    pub(crate) fn clear(&self, register: Register, bits: u32) {
        self.change(register, |cell| cell.fetch_and(!bits, Ordering::AcqRel));
    }

    /// Has the guest read `bytes` as its configuration space, in which a field that is aligned changes as a whole. Of one
    /// thread at a time.
    ///
    /// If something changes, the generation does, before and after. A driver that reads a field in two halves, all of it and the
    /// generation twice between these two, may still have one half of each (decision 0035).
    pub(crate) fn show_config(&self, bytes: &[u8]) {
        let words = || {
            let cells = (self.start + CONFIG..).step_by(WORD);
            cells.zip(bytes.chunks(WORD)).filter_map(|(at, chunk)| {
                let mut word = [0; WORD];
                word.iter_mut()
                    .zip(chunk)
                    .for_each(|(to, from)| *to = *from);
                let cell: &AtomicU64 = self.file.0.get_atomic_ref(at).ok()?;
                Some((cell, u64::from_ne_bytes(word)))
            })
        };
        if words().all(|(cell, word)| cell.load(Ordering::Relaxed) == word) {
            return;
        }
        let count = |cell: &AtomicU32| cell.fetch_add(1, Ordering::SeqCst);
        self.change(Register::ConfigGeneration, count);
        for (cell, word) in words() {
            cell.store(word, Ordering::SeqCst);
        }
        self.change(Register::ConfigGeneration, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(file: &RegisterFile, offset: usize) -> u32 {
        let mut data = [0; 4];
        file.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn generation_counts_changes_of_the_configuration_alone() {
        let file = RegisterFile::new().unwrap();
        let slot = file.of(1);
        let generation = || word(&file, SLOT_BYTES + Register::ConfigGeneration as usize);
        let mut seen = Vec::new();
        for bytes in [[1, 2, 3].as_slice(), &[1, 2, 3], &[1, 2, 4], &[1, 2, 4, 5]] {
            slot.show_config(bytes);
            seen.push(generation());
            let shown = word(&file, SLOT_BYTES + CONFIG).to_le_bytes();
            assert!(shown.starts_with(bytes));
        }
        assert_eq!(seen, [2, 2, 4, 6]);
        assert_eq!(word(&file, CONFIG), 0, "another slot is another device");
    }

    #[test]
    fn aligned_fields_change_as_a_whole() {
        let file = RegisterFile::new().unwrap();
        let slot = file.of(0);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                for _ in 0..200_000 {
                    let field: &AtomicU64 = file.0.get_atomic_ref(CONFIG + 8).unwrap();
                    let field = field.load(Ordering::Acquire).to_ne_bytes();
                    assert_eq!(field, [field[0]; 8]);
                }
            });
            for n in (0..=u8::MAX).cycle() {
                slot.show_config(&[n; 24]);
                if reader.is_finished() {
                    break;
                }
            }
        });
    }
}
