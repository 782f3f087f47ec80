//! `pjdfstest`, a suite of what POSIX demands of file systems: made from crates.io once for each version, outside of
//! the tree, as a static program that needs nothing of the guest that runs it.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::{self, Key};
use crate::{command, packages};

/// The version whose checks `tests/e2e/pjdfstest.toml` names.
const VERSION: &str = "0.2.2";
/// What it is linked with.
const LIBRARIES: [&str; 1] = ["libacl1-dev"];
const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Makes the program when it is missing, and returns its path.
pub(super) fn build() -> Result<PathBuf> {
    let mut key = Key::new("pjdfstest 1");
    key.add(VERSION);
    let folder = cache::artifact("pjdfstest", &key, |folder| {
        packages::ensure(&LIBRARIES)?;
        let target = folder.join("target");
        let mut install = command::cargo();
        // The target is named so that the flags do not reach build scripts and procedural macros.
        install
            .current_dir(folder)
            .env_remove("CARGO_ENCODED_RUSTFLAGS")
            .env(
                "RUSTFLAGS",
                "-C target-feature=+crt-static -C strip=symbols",
            );
        install.args(["install", "pjdfstest", "--locked", "--target", TARGET]);
        install.arg("--version").arg(format!("={VERSION}"));
        install.arg("--root").arg(folder);
        install.arg("--target-dir").arg(&target);
        // Only paths are for standard output.
        command::run(install.stdout(std::io::stderr()))?;
        Ok(std::fs::remove_dir_all(&target)?)
    })?;
    Ok(folder.join("bin/pjdfstest"))
}
