//! Shared memory as loom sees it: one atomic for each place that the layouts use, each always
//! accessed as a whole. Only `models` are built with it.

use super::SharedError;
use crate::sync::Ordering;
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use nix::errno::Errno;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use vm_memory::{AtomicAccess, ByteValued};

/// A handle to modelled memory; clones are the other processes' mappings.
#[derive(Debug, Clone)]
pub struct SharedMemory {
    cells: Arc<BTreeMap<usize, AtomicU64>>,
}

impl SharedMemory {
    /// Memory with a zero cell at each of `offsets`. An access anywhere else is a bug of the model.
    pub(crate) fn with_cells(offsets: impl IntoIterator<Item = usize>) -> Self {
        let cells = offsets.into_iter().map(|at| (at, AtomicU64::new(0)));
        Self {
            cells: Arc::new(cells.collect()),
        }
    }

    /// A model has no descriptors to map.
    ///
    /// # Errors
    /// Always.
    pub fn map(_fd: OwnedFd, _bytes: u64) -> Result<Self, SharedError> {
        Err(Errno::ENOTSUP.into())
    }

    /// As the mapped memory's.
    #[must_use]
    pub fn load<T: AtomicAccess>(&self, offset: usize, order: Ordering) -> T {
        self.get(offset, order)
    }

    /// As the mapped memory's.
    pub fn store<T: AtomicAccess>(&self, offset: usize, value: T, order: Ordering) {
        self.set(offset, value, order);
    }

    /// As the mapped memory's: a peer may write at any time, which is not a data race there either.
    #[must_use]
    pub fn read<T: ByteValued>(&self, offset: usize) -> T {
        self.get(offset, Ordering::Relaxed)
    }

    /// As the mapped memory's.
    pub fn write<T: ByteValued>(&self, offset: usize, value: T) {
        self.set(offset, value, Ordering::Relaxed);
    }

    /// As the mapped memory's, by cells of eight bytes.
    pub fn copy_in(&self, offset: usize, bytes: &[u8]) {
        for (piece, at) in bytes.chunks(8).zip((offset..).step_by(8)) {
            let mut word = [0; 8];
            word[..piece.len()].copy_from_slice(piece);
            self.set(at, u64::from_le_bytes(word), Ordering::Relaxed);
        }
    }

    /// As the mapped memory's, by cells of eight bytes; places without a cell read as zero.
    pub fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        for (piece, at) in bytes.chunks_mut(8).zip((offset..).step_by(8)) {
            let word = match self.cells.get(&at) {
                Some(cell) => cell.load(Ordering::Relaxed).to_le_bytes(),
                None => [0; 8],
            };
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }

    /// As the mapped memory's.
    pub fn set_bits(&self, offset: usize, bits: u32, order: Ordering) {
        self.cell(offset).fetch_or(bits.into(), order);
    }

    /// As the mapped memory's.
    #[must_use]
    pub fn take_bits(&self, offset: usize, order: Ordering) -> u32 {
        u32::try_from(self.cell(offset).swap(0, order)).expect("a cell of 32 bits")
    }

    fn cell(&self, offset: usize) -> &AtomicU64 {
        let cell = self.cells.get(&offset);
        cell.unwrap_or_else(|| panic!("the model has no cell at {offset:#x}"))
    }

    fn get<T: ByteValued>(&self, offset: usize, order: Ordering) -> T {
        let bytes = self.cell(offset).load(order).to_le_bytes();
        let value = T::from_slice(&bytes[..size_of::<T>()]);
        *value.expect("cells are aligned for every value of up to eight bytes")
    }

    fn set<T: ByteValued>(&self, offset: usize, value: T, order: Ordering) {
        let mut bytes = [0; 8];
        bytes[..size_of::<T>()].copy_from_slice(value.as_slice());
        self.cell(offset).store(u64::from_le_bytes(bytes), order);
    }
}
