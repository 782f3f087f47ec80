//! Virtio 1 drivers over virtio-mmio, polled, small, and able to misbehave for `fuzz`.

pub mod blk;
pub mod fs;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod vsock;
