//! What programs may expect of a file system, tried out in one directory: `posix-suite DIRECTORY [GROUP…]`. It runs
//! inside of a Linux guest in a shared folder, for `e2e/posix.rs`, and on any file system of the host to compare.
//!
//! Prints `FAILED group::check: why` for each check that fails, a line for each group, and a total. It looks for what
//! pjdfstest leaves out (`e2e/posix.rs` runs that too): data, maps, locks, directories that change while they are read, files
//! without a name, rights of other users. `posix-suite SECONDS` sleeps: pjdfstest wants a program that does. It has to be started by root for those, and is in the initial RAM disk of a
//! guest, so it links to nothing.
#![allow(
    clippy::print_stdout,
    reason = "a test's program: what it prints is the result"
)]

mod attributes;
mod content;
mod listing;
mod locks;
mod map;
mod names;
mod opening;
mod place;
mod rights;
mod unnamed;

use place::{Check, Failure, Place};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// All checks, by group.
const GROUPS: [(&str, &[(&str, Check)]); 9] = [
    ("names", names::CHECKS),
    ("opening", opening::CHECKS),
    ("content", content::CHECKS),
    ("map", map::CHECKS),
    ("attributes", attributes::CHECKS),
    ("listing", listing::CHECKS),
    ("unnamed", unnamed::CHECKS),
    ("locks", locks::CHECKS),
    ("rights", rights::CHECKS),
];

#[derive(Default)]
struct Count {
    ok: u32,
    failed: u32,
    skipped: u32,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match *arguments.as_slice() {
        [locks::PROBE, file] => locks::probe(Path::new(file)),
        [seconds] if let Ok(seconds) = seconds.parse() => {
            std::thread::sleep(Duration::from_secs(seconds));
            ExitCode::SUCCESS
        }
        [directory, ref groups @ ..] => run(Path::new(directory), groups),
        [] => {
            println!("posix-suite DIRECTORY [GROUP...]");
            ExitCode::FAILURE
        }
    }
}

fn run(directory: &Path, groups: &[&str]) -> ExitCode {
    nix::sys::stat::umask(nix::sys::stat::Mode::empty());
    let begin = Instant::now();
    let mut total = Count::default();
    for (group, checks) in GROUPS {
        if !groups.is_empty() && !groups.contains(&group) {
            continue;
        }
        let count = run_group(directory, group, checks);
        println!(
            "{group}: ok {}, failed {}, skipped {} (after {} s)",
            count.ok,
            count.failed,
            count.skipped,
            begin.elapsed().as_secs()
        );
        total.ok += count.ok;
        total.failed += count.failed;
        total.skipped += count.skipped;
    }
    println!(
        "SUITE-DONE ok {}, failed {}, skipped {}",
        total.ok, total.failed, total.skipped
    );
    match total.failed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

fn run_group(directory: &Path, group: &str, checks: &[(&str, Check)]) -> Count {
    let mut count = Count::default();
    for (name, check) in checks {
        let done = Place::make(directory).and_then(|place| check(&place));
        match done {
            Ok(()) => count.ok += 1,
            Err(Failure::Skipped(why)) => {
                count.skipped += 1;
                println!("skipped {group}::{name}: {why}");
            }
            Err(Failure::Failed(why)) => {
                count.failed += 1;
                println!("FAILED {group}::{name}: {why}");
            }
        }
    }
    count
}
