//! `bulkhead-devices`: every kind of device process in one program, which is what gets installed,
//! under the name of each kind.
//!
//! Processes of one program share the pages of its code, so that a machine with four devices pays
//! for the runtime, the C library and the allocator once instead of four times
//! (`docs/decisions/0009-device-programs-are-links-to-one.md`). The name that the launcher gives to
//! `exec` chooses the kind; whether it is the kind that the broker meant is checked at birth. It
//! must never share anything but code: what a process may do comes from its kind's policy alone.
#![forbid(unsafe_code)]

use bulkhead_runtime::birth::EXIT_STILLBORN;
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let name = std::env::args_os().next().map(PathBuf::from);
    let name = name.as_deref().and_then(|path| path.file_name()?.to_str());
    match name {
        Some("bulkhead-blk") => bulkhead_blk::run(),
        Some("bulkhead-console") => bulkhead_console::run(),
        Some("bulkhead-image") => bulkhead_image::run(),
        Some("bulkhead-legacy") => bulkhead_legacy::run(),
        Some("bulkhead-net") => bulkhead_net::run(),
        Some("bulkhead-rng") => bulkhead_rng::run(),
        Some("bulkhead-switch") => bulkhead_switch::run(),
        Some("bulkhead-vsock") => bulkhead_vsock::run(),
        Some("bulkhead-fs") => bulkhead_fs::run(),
        _ => {
            bulkhead_runtime::log::line(
                "this program serves devices under the names bulkhead-blk, bulkhead-console, \
                 bulkhead-fs, bulkhead-image, bulkhead-legacy, bulkhead-net, bulkhead-rng, \
                 bulkhead-switch and bulkhead-vsock, and is started by `bulkhead`, not by hand",
            );
            bulkhead_runtime::leave(EXIT_STILLBORN)
        }
    }
}
