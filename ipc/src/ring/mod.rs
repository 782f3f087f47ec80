//! Shadow virtqueues: the driver half (the gate's), and the gate's allocator of window pages.
//!
//! The device half is `virtio-queue`.

mod driver;
mod pages;

pub use driver::{Completion, RequestLayout, RingFault, ShadowDriver, Span};
pub use pages::{PageRange, WindowPages};
