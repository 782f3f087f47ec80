//! `cargo xtask test`: every check, in the order in which failures are cheapest to learn about.
//!
//! Responsible for: what the end-to-end tests find in their environment. They never build anything:
//! guests come from `guest`, the processes of Bulkhead from one release build, and each path is
//! handed over in a `BULKHEAD_…` variable.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::guest::{Image, TEST_GUEST};
use crate::{command, mutants, packages, tidy, workspace};

/// The package of end-to-end tests.
const END_TO_END: &str = "bulkhead-tests";
/// The smoke set of the fault-injection harness.
const FAULTS: [&str; 4] = ["--package", "bulkhead-faults", "--test", "smoke"];
/// The command line that the small Linux needs to be quick where ring 0 is emulated.
pub(crate) const LINUX_CMDLINE: &str = include_str!("../../guests/linux/cmdline");
/// The same for the stock Debian kernel, which also has to do without what no emulator knows.
const STOCK_CMDLINE: &str = include_str!("../../guests/linux/stock-cmdline");
/// What the Debian root disk needs beside it.
const DEBIAN_CMDLINE: &str = include_str!("../../guests/debian/cmdline");
/// How many guests the end-to-end tests may run side by side: a machine of two CPUs that is busy
/// with something else must still keep their time limits.
const GUESTS_AT_ONCE: &str = "2";
/// The name under which `bulkhead run` without a kernel finds its guest, beside the processes.
const BUILT_IN_GUEST: &str = "bulkhead-guest.elf";

/// The program of all device processes, and the kinds under whose names it is installed.
const DEVICE_PROGRAM: &str = "bulkhead-devices";
const DEVICE_KINDS: [&str; 8] = [
    "blk", "console", "fs", "legacy", "net", "rng", "switch", "vsock",
];

/// `cargo xtask test …`
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Run the slow suites too: stock Debian kernels, long soaks (tens of minutes).
    #[arg(long)]
    slow: bool,
    /// Only those end-to-end tests whose name contains this, and nothing else.
    filter: Option<String>,
}

/// Runs all suites; the first failure ends the run. How long each took is told in any case.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut stages = Stages::default();
    let result = run_stages(options, &mut stages);
    stages.tell();
    result
}

fn run_stages(options: &Options, stages: &mut Stages) -> Result<()> {
    require_kvm()?;
    // What the tests themselves call: they look into disk images after the guest is done (qemu-img reads what
    // we write, and writes what we read), have a
    // debugger open cores, assemble kernels of a few instructions, disassemble ACPI tables, and make networks of their own.
    stages.run("packages", || {
        packages::ensure(&[
            "acpica-tools",
            "binutils",
            "busybox-static",
            "cpio",
            "dosfstools",
            "e2fsprogs",
            "fdisk",
            "gdb",
            "mtools",
            "iproute2",
            "passt",
            "qemu-utils",
        ])
    })?;
    if options.filter.is_none() {
        stages.run("tidy", tidy::run)?;
        stages.run("build for unit tests", build_programs)?;
        stages.run("unit tests", unit_tests)?;
        stages.run("models", models)?;
    }
    let binaries = stages.run("release build", release_binaries)?;
    let images = stages.run("guests", || images(options.slow))?;
    stages.run("end-to-end tests", || {
        end_to_end(options, &binaries, &images)
    })?;
    if options.slow && options.filter.is_none() {
        stages.run("mutants", || mutants::run(&mutants::Options::default()))?;
    }
    Ok(())
}

/// How long each stage took.
#[derive(Default)]
struct Stages(Vec<(&'static str, Duration)>);

impl Stages {
    fn run<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        eprintln!("== {name}");
        let start = Instant::now();
        let result = work();
        self.0.push((name, start.elapsed()));
        result.context(name)
    }

    fn tell(&self) {
        eprintln!("\nHow long each stage took:");
        let total: Duration = self.0.iter().map(|(_, time)| *time).sum();
        for (name, time) in self.0.iter().chain([&("together", total)]) {
            let seconds = time.as_secs();
            eprintln!("  {name:<22} {:>3} min {:>2} s", seconds / 60, seconds % 60);
        }
    }
}

pub(crate) fn require_kvm() -> Result<()> {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .map(drop)
        .context("/dev/kvm: tests boot real guests, and need to read and write it")
}

/// Builds every program before any test: some tests start programs of other packages, which cargo
/// does not build for them.
fn build_programs() -> Result<()> {
    command::run(command::cargo().args(["build", "--workspace", "--bins"]))
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
        cargo_test(&["nextest", "run", "--no-fail-fast"])?;
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

/// The shared-memory protocols under loom. Their build differs from every other by a flag, so it has
/// a folder of its own.
fn models() -> Result<()> {
    let mut models = command::cargo();
    models.args(["test", "--package", "bulkhead-ipc", "--lib"]);
    models
        .arg("--target-dir")
        .arg(workspace::target_directory()?.join("loom"));
    models.args(["models::"]).env("RUSTFLAGS", "--cfg loom");
    command::run(&mut models)
}

/// The guests that the end-to-end tests boot, each with the variable that tells its path.
pub(crate) fn images(with_slow: bool) -> Result<Vec<(&'static str, PathBuf)>> {
    let slow: &[Image] = if with_slow { &Image::SLOW } else { &[] };
    let all = Image::BUILT.iter().chain(slow);
    all.map(|image| Ok((image.variable(), image.path()?)))
        .collect()
}

/// Runs the tests that drive the programs. All that fails is told in one run.
fn end_to_end(options: &Options, binaries: &Path, images: &[(&str, PathBuf)]) -> Result<()> {
    if !packages::which("cargo-nextest") {
        let drive = |which: &[&str]| {
            let mut tests = command::cargo();
            tests.args(["test", "--no-fail-fast"]).args(which);
            tests.args(["--", "--test-threads", GUESTS_AT_ONCE]);
            tests.args(&options.filter);
            drive(tests, options, binaries, images)
        };
        return drive(&["--package", END_TO_END]).and(drive(&FAULTS));
    }
    // One program's tests do not wait for another's.
    let mut tests = command::cargo();
    let [_, package, _, smoke] = FAULTS;
    tests.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"]);
    tests.args(["--package", END_TO_END, "--package", package]);
    // The smoke set is no test of its package unless it is named.
    tests.args(["--lib", "--test", "*"]);
    let which = format!("package({END_TO_END}) or binary_id({package}::{smoke})");
    tests.args(["--filterset", &which, "--test-threads", GUESTS_AT_ONCE]);
    if options.slow {
        // They print what they have measured.
        tests.args(["--success-output", "final"]);
    }
    tests.args(&options.filter);
    drive(tests, options, binaries, images)
}

fn drive(
    mut tests: Command,
    options: &Options,
    binaries: &Path,
    images: &[(&str, PathBuf)],
) -> Result<()> {
    tests.env("BULKHEAD_BIN_DIR", binaries);
    tests.env("BULKHEAD_TEST_LINUX_CMDLINE", LINUX_CMDLINE.trim());
    tests.env("BULKHEAD_TEST_STOCK_CMDLINE", STOCK_CMDLINE.trim());
    tests.env("BULKHEAD_TEST_DEBIAN_CMDLINE", DEBIAN_CMDLINE.trim());
    if options.slow {
        tests.env("BULKHEAD_SLOW", "1");
    }
    tests.envs(images.iter().map(|(variable, path)| (variable, path)));
    command::run(&mut tests)
}

/// Builds all processes as users run them, puts the built-in guest beside them, and returns the
/// folder.
pub(crate) fn release_binaries() -> Result<PathBuf> {
    let mut build = command::cargo();
    build.args([
        "build",
        "--release",
        "--workspace",
        "--bins",
        "--exclude",
        "xtask",
        "--exclude",
        END_TO_END,
    ]);
    // In their place comes the program that is all of them.
    for kind in DEVICE_KINDS {
        build.arg("--exclude").arg(format!("bulkhead-{kind}"));
    }
    command::run(&mut build)?;
    // `.cargo/config.toml` names the target, which adds a folder.
    let folder = workspace::target_directory()?.join("x86_64-unknown-linux-gnu/release");
    link_device_programs(&folder)?;
    install_built_in_guest(&Image::TestGuest.path()?, &folder)?;
    Ok(folder)
}

/// Puts the multi-call program in the place of each kind's own, as an installation does. Cargo puts
/// its own back with the next build, so this is done after each.
fn link_device_programs(folder: &Path) -> Result<()> {
    let program = folder.join(DEVICE_PROGRAM);
    for kind in DEVICE_KINDS {
        let place = folder.join(format!("bulkhead-{kind}"));
        let new = folder.join(format!(".bulkhead-{kind}.{}", std::process::id()));
        fs::hard_link(&program, &new).with_context(|| format!("cannot link {}", new.display()))?;
        fs::rename(&new, &place).with_context(|| format!("cannot write {}", place.display()))?;
        // Two names of one file are left alone by `rename`, both of them.
        if new.exists() {
            fs::remove_file(&new)?;
        }
    }
    Ok(())
}

/// By `rename`: a machine that is reading the old one keeps it.
fn install_built_in_guest(guest: &Path, folder: &Path) -> Result<()> {
    let place = folder.join(BUILT_IN_GUEST);
    let new = folder.join(format!(".{BUILT_IN_GUEST}.{}", std::process::id()));
    fs::copy(guest, &new).with_context(|| format!("cannot copy {}", guest.display()))?;
    fs::rename(&new, &place).with_context(|| format!("cannot write {}", place.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readme_tells_users_the_command_line_that_is_tested() {
        let readme = fs::read_to_string(workspace::root().join("README.md")).unwrap();
        let line = STOCK_CMDLINE.trim();
        assert!(readme.lines().any(|l| l == line), "{line}");
    }
}
