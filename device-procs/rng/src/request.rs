//! What the driver asks for: a buffer to fill. There is no header and no status.

use bulkhead_runtime::{Chain, Span};

/// Bytes that one request is given at most, so that one cannot hold the others up. The driver
/// learns how many from the used length and asks again.
pub(crate) const FILL_BYTES_MAX: u32 = 64 * 1024;

/// The buffer to fill: what the chain offers first. Readable bytes mean nothing to this device.
pub(crate) fn buffer(chain: &Chain) -> Option<Span> {
    chain
        .writable()
        .first()
        .map(|span| span.part(0, FILL_BYTES_MAX))
}
