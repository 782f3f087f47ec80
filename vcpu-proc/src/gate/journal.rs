//! The in-flight journal of one queue: for each slot of the shadow queue, which guest request is in
//! it and where its buffers are. Private memory; the device never sees it.

use bulkhead_ipc::ring::PageRange;
use vm_memory::GuestAddress;

/// A piece of guest memory named by a descriptor. Checked to be guest memory when it was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GuestSpan {
    /// Guest-physical address.
    pub(crate) address: GuestAddress,
    /// Length in bytes.
    pub(crate) len: usize,
}

/// One request in flight.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// Head descriptor of the guest's chain.
    pub(crate) head: u16,
    /// Device-readable bytes of the guest, in order.
    pub(crate) readable: Vec<GuestSpan>,
    /// Device-writable bytes of the guest, in order.
    pub(crate) writable: Vec<GuestSpan>,
    /// Total readable bytes.
    pub(crate) readable_bytes: usize,
    /// Total writable bytes.
    pub(crate) writable_bytes: usize,
    /// Descriptors of the chain, empty ones included.
    pub(crate) descriptors: usize,
    /// Window pages that hold the data.
    pub(crate) pages: Option<PageRange>,
    /// Offset in the window of the device-writable data, behind the readable data.
    pub(crate) writable_at: usize,
    /// Position in the output stream, for positioned queues.
    pub(crate) stream_position: u64,
    /// Count of guest resets at submission; an older one is a leftover that only frees its pages.
    pub(crate) epoch: u64,
    /// Whether the slot is in use.
    pub(crate) in_flight: bool,
    /// Whether the guest has its answer already: only slot and pages are waited for.
    pub(crate) answered: bool,
    /// Place among all requests of the device, in the order in which the guest put them.
    pub(crate) order: u64,
    /// Device processes that died with it in their hands.
    pub(crate) deaths: u8,
}

impl Entry {
    /// Forgets the request but keeps the allocations.
    pub(crate) fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_bytes = 0;
        self.writable_bytes = 0;
        self.descriptors = 0;
        self.pages = None;
        self.in_flight = false;
        self.answered = false;
    }
}
