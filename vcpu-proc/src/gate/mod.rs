//! DMA gates: what stands between a guest's virtqueues and the process that serves a device.
//!
//! For each virtqueue a gate walks the guest's ring, copies headers and write data into the
//! device's window, publishes the request on the shadow virtqueue there, and on completion copies
//! read data back, puts the used element and raises the interrupt. The device process sees neither
//! guest memory nor an irqfd.
//!
//! All gates of a VM run on one thread ([`thread`]), which never waits for a device: it looks at
//! rings, and sleeps in epoll. The journal of requests in flight ([`journal`]) is in private memory. What a guest receives
//! from a network is not requested, and comes another way ([`frames`]).
//!
//! A guest that breaks the virtio protocol gets DEVICE_NEEDS_RESET. A device that does, dies, or rings its
//! doorbell without a cause ([`rings`]) is replaced
//! by a new process, which is given its requests ([`succession`]); only when the broker has given
//! up on it are they answered with errors.

mod copy;
mod device;
mod frames;
mod journal;
mod link;
mod queue;
mod rings;
mod succession;
pub(crate) mod thread;
mod ungated;

pub(crate) use device::{DeviceChannel, Gate};
pub(crate) use link::{Attachment, GateLink, Line, Phase, STATUS_NEEDS_RESET};
pub(crate) use rings::RingAccount;
pub use succession::Successor;
pub use thread::GateThread;
pub use ungated::{Asked, Ungated};
