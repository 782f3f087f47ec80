//! The FUSE server of a shared folder (virtio 1.2, section 5.11.6): the part of the virtio file
//! system device that knows files. It takes one request as bytes and gives one answer as bytes, so
//! it knows nothing of windows and queues.
//!
//! It must never reach a file outside of its folder. Every path is resolved anew from the folder's
//! own descriptor by `openat2` with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS,
//! and what is found must be the file that the guest was told of, by device and inode number.
//! There is no descriptor for each node (`docs/decisions/0023-fuse-on-paths-and-identities.md`).
#![forbid(unsafe_code)]

mod folder;
mod ids;
mod nodes;
mod server;
mod wire;

#[cfg(test)]
mod server_tests;

pub use ids::{IdMap, IdMapError};
pub use server::{Access, Ids, Server};
pub use wire::REQUEST_BYTES_MAX;
