//! The death of the disk's process, in the middle of a write of the guest, and what came of it.

use crate::process;
use crate::restart::Restart;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long the guest may take until its first byte is in the image.
const WRITE_WITHIN: Duration = Duration::from_secs(10);

/// Watches the disk image until the guest's writing changes it, and kills the process that writes it.
/// Returns who that was.
pub(super) fn kill_while_writing(root: u32, image: &Path) -> Result<u32> {
    let victim = process::of_kind(root, "blk").context("there is no process of the disk")?;
    let before = fs::read(image)?;
    let deadline = Instant::now() + WRITE_WITHIN;
    while fs::read(image)? == before {
        ensure!(Instant::now() < deadline, "the guest does not write");
    }
    kill(Pid::from_raw(i32::try_from(victim)?), Signal::SIGKILL)?;
    println!(
        "\nThe guest is writing its disk: process {victim}, which serves it, gets SIGKILL now."
    );
    Ok(victim)
}

/// Shows what the broker says about the successor, and checks that it is one.
pub(super) fn show_successor(victim: u32, restart: &Restart) -> Result<()> {
    let Restart {
        name,
        pid,
        generation,
        ..
    } = restart;
    let after_ms = restart.after_ms();
    ensure!(*pid != victim, "the disk is served by the dead process");
    ensure!(*generation > 1, "the successor is not another generation");
    println!(
        "The broker: {name} is served by process {pid} (generation {generation}), {after_ms:.1} ms \
         after that death.\n"
    );
    Ok(())
}
