//! What requests look like: a packet of the guest, and buffers for packets and events.

use crate::packet::{HEADER_BYTES, Header, PAYLOAD_BYTES_MAX};
use bulkhead_runtime::{Chain, Queues, Span};

/// Copies a packet of the guest: its header, and how many bytes behind it are in `payload` now.
/// `None` when it is shorter than a header.
pub(crate) fn packet(
    chain: &Chain,
    queues: &Queues,
    payload: &mut [u8; PAYLOAD_BYTES_MAX],
) -> Option<(Header, usize)> {
    let mut header = [0; HEADER_BYTES];
    let (mut headed, mut filled) = (0, 0);
    for &span in chain.readable() {
        let to = header.get_mut(headed..).unwrap_or_default();
        let of_header = queues.read(span, to);
        headed += of_header;
        let rest = span.part(u32::try_from(of_header).ok()?, u32::MAX);
        let to = payload.get_mut(filled..).unwrap_or_default();
        filled += queues.read(rest, to);
    }
    (headed == HEADER_BYTES).then(|| (Header::decode(&header), filled))
}

/// Bytes that a buffer of the guest holds.
pub(crate) fn room(chain: &Chain) -> usize {
    let spans = chain.writable().iter();
    let bytes = spans.fold(0u32, |sum, span| sum.saturating_add(span.len()));
    usize::try_from(bytes).unwrap_or(0)
}

/// Copies `parts` into a buffer of the guest, one behind the other. Returns how many bytes it took.
pub(crate) fn fill(chain: &Chain, queues: &Queues, parts: &[&[u8]]) -> u32 {
    let mut spans = chain.writable().iter().copied();
    let (mut span, mut written) = (Span::default(), 0u32);
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            if span.is_empty() {
                let Some(next) = spans.next() else {
                    return written;
                };
                span = next;
                continue;
            }
            let n = queues.write(span, rest);
            rest = rest.get(n..).unwrap_or_default();
            let n = u32::try_from(n).unwrap_or(u32::MAX);
            span = span.part(n, u32::MAX);
            written = written.saturating_add(n);
        }
    }
    written
}
