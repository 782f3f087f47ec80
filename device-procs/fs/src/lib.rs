//! `bulkhead-fs`: one shared folder (virtio 1.2, section 5.11).
//!
//! It holds the folder's descriptor and its window, and serves the guest's FUSE requests from the one
//! through the other ([`Server`]: one request as bytes, one answer as bytes).
//!
//! It must never reach a file outside of its folder. Every path is resolved anew from the folder's
//! own descriptor by `openat2` with RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_MAGICLINKS,
//! and what is found must be the file that the guest was told of, by device and inode number.
//! There is no descriptor for each node (`docs/decisions/0023-fuse-on-paths-and-identities.md`). A process
//! that is not what it should be is held back by the mount that the descriptor is the root of and by
//! Landlock (`docs/decisions/0025-a-folder-is-a-mount-of-its-own.md`).
#![forbid(unsafe_code)]

mod device;
mod folder;
mod ids;
mod journal;
mod nodes;
mod server;
mod wire;

#[cfg(test)]
mod server_tests;
#[cfg(test)]
mod succession_tests;

pub use ids::{IdMap, IdMapError};
pub use server::{Access, Data, Held, Ids, Server, Terms, front_bytes};
pub use wire::REQUEST_BYTES_MAX;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    bulkhead_runtime::run::<device::FolderDevice>()
}
