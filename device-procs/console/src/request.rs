//! What a transmit request looks like: the stream position that the gate put in front, then text.

use bulkhead_ipc::device_kind::POSITION_BYTES;
use bulkhead_runtime::{Chain, Queues, Span};

/// A piece of output.
#[derive(Debug)]
pub(crate) struct Output {
    /// Where in the console's output stream it belongs.
    pub(crate) position: u64,
    /// The text, in one or two spans of the window.
    pub(crate) text: [Span; 2],
}

/// Reads a transmit request; `None` when it has no position.
pub(crate) fn output(chain: &Chain, queues: &Queues) -> Option<Output> {
    let [first, rest @ ..] = chain.readable() else {
        return None;
    };
    let mut position = [0; POSITION_BYTES];
    if queues.read(*first, &mut position) < POSITION_BYTES {
        return None;
    }
    let after = first.part(u32::try_from(POSITION_BYTES).ok()?, u32::MAX);
    Some(Output {
        position: u64::from_le_bytes(position),
        text: [after, rest.first().copied().unwrap_or_default()],
    })
}
