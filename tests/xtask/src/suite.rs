//! `cargo xtask test`: every check, in the order in which failures are cheapest to learn about.
//!
//! Responsible for: what the end-to-end tests find in their environment. They never build anything:
//! guests come from `guest`, the processes of Bulkhead from one release build, and each path is
//! handed over in a `BULKHEAD_…` variable.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::guest::{Image, TEST_GUEST};
use crate::{command, packages, tidy, workspace};

/// The package of end-to-end tests.
const END_TO_END: &str = "bulkhead-tests";
/// The command line that the small Linux needs to be quick where ring 0 is emulated.
const LINUX_CMDLINE: &str = include_str!("../../guests/linux/cmdline");

/// `cargo xtask test …`
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run the slow suites too: stock Debian kernels, long soaks (tens of minutes).
    #[arg(long)]
    slow: bool,
    /// Only those end-to-end tests whose name contains this.
    filter: Option<String>,
}

/// Runs all suites; the first failure ends the run.
pub(crate) fn run(options: &Options) -> Result<()> {
    require_kvm()?;
    // What the tests themselves call: they look into disk images after the guest is done.
    packages::ensure(&["busybox-static", "cpio", "e2fsprogs"])?;
    tidy::run()?;
    unit_tests()?;
    end_to_end(options)
}

pub(crate) fn require_kvm() -> Result<()> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .context("/dev/kvm: tests boot real guests, and need to read and write it")
}

fn unit_tests() -> Result<()> {
    let cargo_test = |arguments: &[&str]| {
        let mut tests = command::cargo();
        tests
            .args(arguments)
            .args(["--workspace", "--exclude", END_TO_END]);
        command::run(&mut tests)
    };
    if packages::which("cargo-nextest") {
        cargo_test(&["nextest", "run"])?;
        // nextest leaves the examples in documentation out.
        cargo_test(&["test", "--doc"])?;
    } else {
        cargo_test(&["test"])?;
    }
    let mut guest_tests = command::cargo();
    guest_tests
        .args(["test", "--lib"])
        .current_dir(workspace::root().join(TEST_GUEST));
    command::run(&mut guest_tests)
}

fn end_to_end(options: &Options) -> Result<()> {
    let binaries = release_binaries()?;
    let mut tests = command::cargo();
    tests.args(["test", "--package", END_TO_END]);
    if let Some(filter) = &options.filter {
        tests.args(["--", filter]);
    }
    tests.env("BULKHEAD_BIN_DIR", binaries);
    tests.env("BULKHEAD_TEST_LINUX_CMDLINE", LINUX_CMDLINE.trim());
    let mut images = Image::BUILT.to_vec();
    if options.slow {
        images.extend(Image::STOCK);
        tests.env("BULKHEAD_SLOW", "1");
    }
    for image in images {
        tests.env(image.variable(), image.path()?);
    }
    command::run(&mut tests)
}

/// Builds all processes as users run them and returns the folder of the binaries.
pub(crate) fn release_binaries() -> Result<PathBuf> {
    let mut build = command::cargo();
    build.args([
        "build",
        "--release",
        "--workspace",
        "--bins",
        "--exclude",
        "xtask",
    ]);
    command::run(&mut build)?;
    // `.cargo/config.toml` names the target, which adds a folder.
    Ok(workspace::target_directory()?.join("x86_64-unknown-linux-gnu/release"))
}
