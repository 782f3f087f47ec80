//! Disk images as files: making raw ones, telling their sizes, files for ephemeral disks, and work on them.
//!
//! Nothing here looks into an image: what it holds was written by a guest, and the broker parses
//! nothing that a guest wrote. The format is what the user says it is.

pub mod chain;
pub mod ephemeral;
pub mod raw;
pub mod work;
