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

/// A longer copy is done from its end, in steps. Half of a CPU's own cache is about this size: of what the one
/// before has written, the end is still there, and who comes after starts with what was copied last. Both going
/// the same way, each would evict what it comes to next.
const BACKWARD_FROM: usize = 256 << 10;
/// Bytes of a step.
const STEP_BYTES: usize = 64 << 10;

/// Copies up to `len` bytes of `spans`, starting `skip` bytes into them, to or from the window
/// bytes at `at`. Returns the bytes copied.
pub(crate) fn copy_spans(
    memory: &GuestMemoryMmap,
    window: &SharedMemory,
    direction: Direction,
    spans: &[GuestSpan],
    skip: usize,
    at: usize,
    len: usize,
) -> Result<usize, NotMemory> {
    let forward = |from: usize, len| {
        let (skip, at) = (skip + from, at + from);
        copy_forward(memory, window, direction, spans, skip, at, len)
    };
    if len <= BACKWARD_FROM {
        return forward(0, len);
    }
    let there: usize = spans.iter().map(|span| span.len).sum();
    let len = len.min(there.saturating_sub(skip));
    for (from, len) in steps(len) {
        forward(from, len)?;
    }
    Ok(len)
}

/// The steps in which `len` bytes are copied from their end: where each begins, and its length.
fn steps(len: usize) -> impl Iterator<Item = (usize, usize)> {
    let from = (0..len).step_by(STEP_BYTES).rev();
    from.map(move |from| (from, STEP_BYTES.min(len - from)))
}

fn copy_forward(
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
    fn steps_go_from_the_end_to_the_start() {
        let len = 2 * STEP_BYTES + 1;
        let wanted = [
            (2 * STEP_BYTES, 1),
            (STEP_BYTES, STEP_BYTES),
            (0, STEP_BYTES),
        ];
        assert!(steps(len).eq(wanted));
        assert!(steps(0).eq([]));
    }

    #[test]
    fn long_copies_are_whole_whatever_the_pieces() {
        const SKIP: usize = 5000;
        let size = 4 * BACKWARD_FROM;
        let memory: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size)]).unwrap();
        let window = SharedMemory::map(sealed_memfd("w", size as u64).unwrap(), size as u64);
        let window = window.unwrap();
        let content: Vec<u8> = (0u32..)
            .map(|n| (n / 7).to_le_bytes()[0])
            .take(size)
            .collect();
        memory.write_slice(&content, GuestAddress(0)).unwrap();
        // Of all sizes, with holes between them.
        let (mut spans, mut wanted, mut next) = (Vec::new(), Vec::new(), 0);
        for len in [
            1,
            4096,
            3 * STEP_BYTES + 77,
            12,
            STEP_BYTES,
            BACKWARD_FROM + 5,
        ] {
            let address = GuestAddress(next as u64);
            spans.push(GuestSpan { address, len });
            wanted.extend_from_slice(&content[next..][..len]);
            next += len + 100;
        }
        wanted.drain(..SKIP);
        let go = |d, len| copy_spans(&memory, &window, d, &spans, SKIP, 64, len);
        for len in [BACKWARD_FROM, BACKWARD_FROM + 1, wanted.len(), size] {
            window.slice(0, size).copy_from(&vec![0xee_u8; size]);
            let n = len.min(wanted.len());
            assert_eq!(go(Direction::ToWindow, len), Ok(n));
            let mut got = vec![0; 64 + n + 1];
            window.slice(0, got.len()).copy_to(&mut got[..]);
            assert!(got[..64].iter().all(|&byte| byte == 0xee), "{len}");
            assert!(
                got[64..64 + n] == wanted[..n] && got[64 + n] == 0xee,
                "{len}"
            );

            memory.write_slice(&vec![0; size], GuestAddress(0)).unwrap();
            assert_eq!(go(Direction::ToGuest, len), Ok(n));
            let mut back = Vec::new();
            for span in &spans {
                let mut part = vec![0; span.len];
                memory.read_slice(&mut part, span.address).unwrap();
                back.extend(part);
            }
            assert!(back[..SKIP].iter().all(|&byte| byte == 0), "{len}");
            assert!(back[SKIP..][..n] == wanted[..n], "{len}");
            assert!(back[SKIP + n..].iter().all(|&byte| byte == 0), "{len}");
            memory.write_slice(&content, GuestAddress(0)).unwrap();
        }
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
