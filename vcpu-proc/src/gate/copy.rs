//! Copies between guest memory and a window. The bytes are never looked at.

use super::journal::GuestSpan;
use bulkhead_ipc::shared::{self, SharedMemory};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

/// Guest memory that a descriptor named does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{len} bytes at guest address {address:#x} are not guest memory")]
pub(crate) struct NotMemory {
    /// Guest-physical address.
    pub(crate) address: u64,
    /// Length in bytes.
    pub(crate) len: usize,
}

/// Direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    /// Guest memory to window.
    ToWindow,
    /// Window to guest memory.
    ToGuest,
}

/// Copies up to `len` bytes of `spans`, starting `skip` bytes into them, to or from the window
/// bytes at `at`. Returns the bytes copied.
pub(crate) fn copy_spans(
    memory: &GuestMemoryMmap,
    window: &SharedMemory,
    direction: Direction,
    spans: &[GuestSpan],
    mut skip: usize,
    mut at: usize,
    len: usize,
) -> Result<usize, NotMemory> {
    let mut left = len;
    for span in spans {
        if left == 0 {
            break;
        }
        if skip >= span.len {
            skip -= span.len;
            continue;
        }
        let n = (span.len - skip).min(left);
        let fault = NotMemory {
            address: span.address.0,
            len: span.len,
        };
        let start = span.address.0.checked_add(skip as u64).ok_or(fault)?;
        skip = 0;
        for piece in memory.get_slices(vm_memory::GuestAddress(start), n) {
            let piece = piece.map_err(|_| fault)?;
            let there = window.slice(at, piece.len());
            match direction {
                Direction::ToWindow => shared::copy(&piece, &there),
                Direction::ToGuest => shared::copy(&there, &piece),
            }
            at += piece.len();
            left -= piece.len();
        }
    }
    Ok(len - left)
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::shared::sealed_memfd;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn spans_are_gathered_and_scattered_in_order() {
        let base = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&base).unwrap();
        let window = SharedMemory::map(sealed_memfd("w", 8192).unwrap(), 8192).unwrap();
        let text: Vec<u8> = (0..200).collect();
        // The first span crosses the border between two regions.
        memory
            .write_slice(&text[..100], GuestAddress(0xfd0))
            .unwrap();
        memory
            .write_slice(&text[100..], GuestAddress(0x100))
            .unwrap();
        let spans = [
            GuestSpan {
                address: GuestAddress(0xfd0),
                len: 100,
            },
            GuestSpan {
                address: GuestAddress(0x100),
                len: 100,
            },
        ];
        let go = |d, skip, at, len| copy_spans(&memory, &window, d, &spans, skip, at, len);
        assert_eq!(go(Direction::ToWindow, 16, 4096, 1000), Ok(184));
        let mut got = [0u8; 184];
        window.slice(4096, 184).copy_to(&mut got[..]);
        assert_eq!(got, text[16..]);
        window.slice(0, 4).copy_from(&[7u8; 4]);
        assert_eq!(go(Direction::ToGuest, 98, 0, 4), Ok(4));
        assert_eq!(
            memory
                .read_obj::<[u8; 2]>(GuestAddress(0xfd0 + 98))
                .unwrap(),
            [7, 7]
        );
        assert_eq!(
            memory.read_obj::<[u8; 3]>(GuestAddress(0x100)).unwrap(),
            [7, 7, 102]
        );
    }

    #[test]
    fn what_is_no_memory_is_an_error() {
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let window = SharedMemory::map(sealed_memfd("w", 8192).unwrap(), 8192).unwrap();
        for address in [0xff0, 0x2000, u64::MAX - 4] {
            let spans = [GuestSpan {
                address: GuestAddress(address),
                len: 32,
            }];
            let r = copy_spans(&memory, &window, Direction::ToWindow, &spans, 0, 0, 32);
            assert!(r.is_err(), "{address:#x}");
        }
    }
}
