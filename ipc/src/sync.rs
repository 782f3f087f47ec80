//! Fences and orderings: the CPU's, or loom's when the rings are model-checked (`models`).

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{Ordering, fence};
