//! The shared-memory protocols under loom: every interleaving of two sides, and every value that
//! the memory model lets a load see. A lost wake-up shows as a deadlock. `cargo xtask test` runs
//! them: `RUSTFLAGS="--cfg loom" cargo test -p bulkhead-ipc --lib models::`.
//!
//! The device half of the shadow virtqueues is `virtio-queue`'s, which loom cannot build; [`device`]
//! repeats its accesses with their orderings (virtio-queue 0.18, `Queue`).

mod bell;
mod device;
mod input;
mod legacy;
mod port;
mod queue;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A model with fewer orders than this does not let its two sides meet.
const ORDERS_MIN: usize = 5;
/// Interleavings with more preemptions than this are left out: bugs of this kind need two or three.
const PREEMPTIONS: usize = 3;

/// Explores `model`. Loom remembers the last access to a place only, so it misses orders around a
/// place that one side reads and then writes; a side that does so comes first in the model. That
/// orders were explored at all is checked: a model with one order proves nothing.
fn check(model: impl Fn() + Sync + Send + 'static) {
    let orders = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&orders);
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(move || {
        count.fetch_add(1, Ordering::Relaxed);
        model();
    });
    let orders = orders.load(Ordering::Relaxed);
    assert!(orders >= ORDERS_MIN, "only {orders} orders were explored");
}
