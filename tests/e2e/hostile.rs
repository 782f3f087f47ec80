//! A device process that its guest has taken over attacks everything it holds, while the guest uses
//! all its other devices. Nothing else changes: no verified byte, no descriptor, no mapping; nobody
//! crashes, hangs or grows.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Machine, Programs, tool};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const METHODS: [&str; 8] = [
    "scribble", "rings", "publish", "ring", "fill", "flood", "lie", "silent",
];
/// How much more memory gate and broker may use under attack than at its begin, in KiB.
const GROWTH_KIB: u64 = 4096;
/// The share of its undisturbed pace that a guest keeps at least: it is not brought to a standstill. How
/// much it keeps depends on the CPUs that the attacker can take from it (docs/known-debt.md).
const PACE_MIN: f64 = 0.01;

fn start(name: &str, programs: &Path, disk: &Path, seconds: u32) -> Machine {
    let cmdline = format!("mode=beside seconds={seconds}");
    let (programs, disk) = (programs.to_str().unwrap(), disk.to_str().unwrap());
    Machine::test_guest(
        &cmdline,
        &["--name", name, "--libexec-dir", programs, "--disk", disk],
    )
}

/// What a process holds: its descriptors by number, and its mappings that are no heap or stack.
#[derive(Debug, PartialEq, Eq)]
struct Holdings {
    descriptors: BTreeMap<String, String>,
    shared_maps: Vec<String>,
}

fn holdings(pid: u32) -> Holdings {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let descriptors = entries.map(|entry| {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        (
            entry.file_name().to_string_lossy().into_owned(),
            target.to_string_lossy().into_owned(),
        )
    });
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    // Everything shared or executable. Private memory grows and shrinks as a process works.
    let shared = |line: &&str| {
        line.split_whitespace()
            .nth(1)
            .is_some_and(|p| p.ends_with('s') || p.contains('x'))
    };
    Holdings {
        descriptors: descriptors.collect(),
        shared_maps: maps.lines().filter(shared).map(str::to_owned).collect(),
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = |l: &str| {
        l.strip_prefix("RssAnon:")?
            .trim()
            .strip_suffix(" kB")?
            .parse()
            .ok()
    };
    status.lines().find_map(line).unwrap()
}

fn rounds(console: &str) -> f64 {
    let end = console.lines().find(|l| l.contains("BH beside.end"));
    let end = end.unwrap_or_else(|| panic!("the guest did not end its rounds: {console}"));
    let value = |key: &str| -> f64 {
        let word = end.split_whitespace().find_map(|w| w.strip_prefix(key));
        word.unwrap().parse().unwrap()
    };
    value("rounds=") / value("ms=")
}

fn attacked_by(kind: &str) {
    let disk = bulkhead_tests::disk(4 << 20);
    let canary = tempfile::NamedTempFile::new().unwrap();
    fs::write(canary.path(), [0xc7; 4096]).unwrap();

    let binaries = bulkhead_tests::path("BULKHEAD_BIN_DIR");
    let undisturbed = start("undisturbed", &binaries, disk.path(), 2).wait();
    assert_eq!(undisturbed.code, 0, "{undisturbed:?}");
    let pace = rounds(&undisturbed.console);

    let programs = Programs::with(kind, "bulkhead-hostile");
    for (method, seed) in METHODS.into_iter().zip(1..) {
        let name = format!("hostile-{method}-{seed}");
        let mut machine = start(&name, programs.path(), disk.path(), 2);
        if kind == "legacy" {
            // The guest's console is what is attacked.
            std::thread::sleep(std::time::Duration::from_secs(1));
        } else {
            machine.expect("BH beside.round ");
        }
        // The control processes, and a device that is not attacked.
        let others: Vec<u32> = ["vcpu", "blk"].map(|kind| machine.process(kind)).into();
        let before: Vec<Holdings> = others.iter().map(|pid| holdings(*pid)).collect();
        let broker = machine.pid();
        let kib: Vec<u64> = [others[0], broker].map(resident_kib).into();
        std::thread::sleep(std::time::Duration::from_millis(800));
        let after: Vec<Holdings> = others.iter().map(|pid| holdings(*pid)).collect();
        assert_eq!(before, after, "{kind} {method}");
        for (pid, before) in [others[0], broker].into_iter().zip(kib) {
            let now = resident_kib(pid);
            assert!(
                now <= before + GROWTH_KIB,
                "{kind} {method}: process {pid} grew from {before} to {now} KiB"
            );
        }
        // A guest that counted an error says so by its exit code, whoever owns its console.
        let ended = machine.wait();
        assert_eq!(ended.code, 0, "{kind} {method}: {ended:?}");
        assert!(
            !ended.errors.contains('\u{1b}'),
            "{kind} {method}: a process wrote to the terminal unescaped: {ended:?}"
        );
        if kind != "legacy" {
            let kept = rounds(&ended.console) / pace;
            assert!(kept >= PACE_MIN, "{kind} {method}: {kept}");
        }
    }
    assert_eq!(fs::read(canary.path()).unwrap(), [0xc7; 4096]);
    let path = disk.path().to_str().unwrap();
    let bytes = tool("stat", &["-c", "%s", path]);
    assert_eq!(
        bytes.trim(),
        (4u64 << 20).to_string(),
        "the disk has its size"
    );
}

#[test]
fn taken_over_rng_harms_nobody_else() {
    attacked_by("rng");
}

#[test]
fn taken_over_console_harms_nobody_else() {
    attacked_by("console");
}

#[test]
fn taken_over_legacy_harms_nobody_else() {
    attacked_by("legacy");
}
