//! DMA gates: what stands between a guest's virtqueues and the process that serves a device.
//!
//! For each virtqueue a gate walks the guest's ring, copies headers and write data into the
//! device's window, publishes the request on the shadow virtqueue there, and on completion copies
//! read data back, puts the used element and raises the interrupt. The device process sees neither
//! guest memory nor an irqfd.
//!
//! All gates of a VM run on one thread ([`thread`]), which never waits for a device: it looks at
//! rings, and sleeps in epoll. The journal of requests in flight ([`journal`]) is in private memory.
//!
//! A guest that breaks the virtio protocol gets DEVICE_NEEDS_RESET; a device that does is dropped:
//! its requests are answered with errors from then on.

mod copy;
mod device;
mod journal;
mod queue;
pub(crate) mod thread;

pub(crate) use device::{ConfigImage, Gate, GateLink};
pub use thread::GateThread;
