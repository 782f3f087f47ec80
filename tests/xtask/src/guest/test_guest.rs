//! Builds the freestanding test guest, a package and workspace of its own in `tests/guests`.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::TEST_GUEST;
use crate::cache::{self, Key};
use crate::{command, workspace};

const BINARY: &str = "bulkhead-guest";
/// Change this when the steps below change what they produce.
const RECIPE: &str = "test guest 1";

/// Builds the guest when its sources have changed, and returns the path of the ELF file.
pub(super) fn build() -> Result<PathBuf> {
    let package = workspace::root().join(TEST_GUEST);
    let mut key = Key::new(RECIPE);
    for part in ["Cargo.toml", "Cargo.lock", "build.rs", "linker.ld"] {
        key.add_file(&package.join(part))?;
    }
    key.add_tree(&package.join(".cargo"))?;
    key.add_tree(&package.join("src"))?;
    key.add(command::output(&mut rustc_version())?);
    let folder = cache::artifact("test-guest", &key, |folder| {
        let target = folder.join("target");
        let mut build = command::cargo();
        // The folder's own .cargo/config.toml has the flags of bare metal.
        build
            .current_dir(&package)
            .args(["build", "--release", "--locked", "--target-dir"]);
        build.arg(&target);
        build
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        command::run(&mut build)?;
        let built = target.join("x86_64-unknown-linux-gnu/release").join(BINARY);
        fs::copy(&built, folder.join(BINARY)).with_context(|| format!("no {}", built.display()))?;
        Ok(fs::remove_dir_all(&target)?)
    })?;
    Ok(folder.join(BINARY))
}

fn rustc_version() -> std::process::Command {
    let mut rustc = command::command(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.arg("--version");
    rustc
}
