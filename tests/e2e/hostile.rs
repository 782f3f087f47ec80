//! A process that its guest has taken over attacks everything it holds. A device does while the guest
//! uses all its other devices, the process of the guest itself while a neighbour's guest does. Nothing
//! else changes: no verified byte, no descriptor, no mapping; nobody crashes, hangs or grows.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]
#![allow(
    clippy::print_stdout,
    reason = "the measured shares are printed besides being asserted"
)]

use bulkhead_tests::{Ended, Machine, Programs};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;
use tempfile::NamedTempFile;

const METHODS: [&str; 8] = [
    "scribble", "rings", "publish", "ring", "fill", "flood", "lie", "silent",
];
/// How much more memory gate and broker may use under attack than at its begin, in KiB.
const GROWTH_KIB: u64 = 4096;
/// The share of its undisturbed pace that a guest keeps at least, on two CPUs of which the attacker may
/// burn one, beside whatever else the host does.
const PACE_MIN: f64 = 0.1;
/// Lines about a machine at most: a process that sends more messages than the broker allows
/// (`broker/src/supervisor/allowance.rs`) is ended. One that lies without a pause makes as many in a blink.
const SAID_MAX: usize = 4000;
/// Private memory of a device process at most, in KiB: several times what an honest guest makes it use.
const DEVICE_KIB_MAX: u64 = 8192;
/// Bytes of a disk; the guest uses the first half of it.
const DISK_BYTES: usize = 4 << 20;
const CANARY: u8 = 0xc7;

/// A machine whose guest verifies the last of `disks` and keeps requests in flight on everything else.
fn start(name: &str, programs: &Path, disks: &[NamedTempFile], seconds: u32) -> Machine {
    let cmdline = format!("mode=beside seconds={seconds} disk={}", disks.len() - 1);
    let mut arguments = vec!["--name", name, "--libexec-dir", programs.to_str().unwrap()];
    for disk in disks {
        arguments.extend(["--disk", disk.path().to_str().unwrap()]);
    }
    Machine::test_guest(&cmdline, &arguments)
}

/// A disk with a canary where no guest goes.
fn disk_with_canary() -> NamedTempFile {
    let disk = bulkhead_tests::disk(0);
    let mut bytes = vec![0; DISK_BYTES / 2];
    bytes.resize(DISK_BYTES, CANARY);
    fs::write(disk.path(), bytes).unwrap();
    disk
}

fn canary_lives(disk: &NamedTempFile) {
    let bytes = fs::read(disk.path()).unwrap();
    assert_eq!(bytes.len(), DISK_BYTES, "the disk has its size");
    assert!(bytes[DISK_BYTES / 2..].iter().all(|byte| *byte == CANARY));
}

/// The process that serves `disk`.
fn server_of(machine: &Machine, disk: &NamedTempFile) -> u32 {
    let path = disk.path().to_str().unwrap();
    let servers = machine.processes().all_of("blk");
    let serves = |pid: &u32| holdings(*pid).descriptors.values().any(|link| link == path);
    let server = servers.into_iter().find(serves);
    server.unwrap_or_else(|| panic!("nobody serves {path}: {}", machine.errors()))
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

/// None for a process that is dead.
fn resident_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
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

/// Neither `pids` nor what they hold changes for a while, nor does anybody of `growing` grow.
fn nothing_changes(what: &str, pids: &[u32], growing: &[u32]) {
    let before: Vec<Holdings> = pids.iter().map(|pid| holdings(*pid)).collect();
    let kib: Vec<Option<u64>> = growing.iter().map(|pid| resident_kib(*pid)).collect();
    std::thread::sleep(Duration::from_millis(800));
    let after: Vec<Holdings> = pids.iter().map(|pid| holdings(*pid)).collect();
    assert_eq!(before, after, "{what}");
    for (pid, before) in growing.iter().zip(kib) {
        // One that has ended meanwhile is its own test's matter.
        if let (Some(before), Some(now)) = (before, resident_kib(*pid)) {
            assert!(
                now <= before + GROWTH_KIB,
                "{what}: process {pid} grew from {before} to {now} KiB"
            );
        }
    }
}

/// What is said of a hostile process never reaches the terminal as it is, and nobody honest gives up.
fn errors_are_sound(what: &str, ended: &Ended) {
    assert!(
        !ended.errors.contains('\u{1b}'),
        "{what}: a process wrote to the terminal unescaped: {ended:?}"
    );
    assert!(!ended.errors.contains("panicked"), "{what}: {ended:?}");
    let lines = ended.errors.lines();
    let said = lines.filter(|line| line.starts_with("bulkhead: ")).count();
    assert!(said <= SAID_MAX, "{what}: {said} lines");
}

fn attacked_by(kind: &str) {
    let canary = NamedTempFile::new().unwrap();
    fs::write(canary.path(), [CANARY; 4096]).unwrap();
    // A hostile disk process is that of the first disk.
    let mut disks = vec![disk_with_canary()];
    if kind == "blk" {
        disks.insert(0, disk_with_canary());
    }
    let verified = disks.last().unwrap();

    let binaries = bulkhead_tests::path("BULKHEAD_BIN_DIR");
    let undisturbed = start("undisturbed", &binaries, &disks, 2).wait();
    assert_eq!(undisturbed.code, 0, "{undisturbed:?}");
    let pace = rounds(&undisturbed.console);

    let programs = Programs::with(kind, "bulkhead-hostile");
    for (method, seed) in METHODS.into_iter().zip(1..) {
        let what = format!("{kind} {method}");
        let name = format!("hostile-{method}-{seed}");
        let mut machine = start(&name, programs.path(), &disks, 2);
        if kind == "legacy" {
            // The guest's console is what is attacked.
            std::thread::sleep(Duration::from_secs(1));
        } else {
            machine.expect("BH beside.round ");
        }
        let vcpu = machine.process("vcpu");
        let others = [vcpu, server_of(&machine, verified)];
        nothing_changes(&what, &others, &[vcpu, machine.pid()]);
        // A guest that counted an error says so by its exit code, whoever owns its console.
        let ended = machine.wait();
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
        errors_are_sound(&what, &ended);
        if kind != "legacy" {
            let kept = rounds(&ended.console) / pace;
            println!("{what}: the guest kept {:.0} % of its pace", kept * 100.0);
            assert!(kept >= PACE_MIN, "{what}: {kept}");
        }
        canary_lives(verified);
    }
    assert_eq!(fs::read(canary.path()).unwrap(), [CANARY; 4096]);
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

#[test]
fn taken_over_blk_harms_nobody_else() {
    attacked_by("blk");
}

/// The guest of a hostile vCPU process is its own affair. Its broker stays the master of its processes, its
/// devices stay sound, and a neighbour notices nothing.
#[test]
fn taken_over_vcpu_harms_neither_its_broker_nor_a_neighbour() {
    let binaries = bulkhead_tests::path("BULKHEAD_BIN_DIR");
    let programs = Programs::with("vcpu", "bulkhead-hostile");
    for (method, seed) in METHODS.into_iter().zip(1..) {
        let what = format!("vcpu {method}");
        let [own, neighbours] = [(); 2].map(|()| [disk_with_canary()]);
        let mut neighbour = start("neighbour", &binaries, &neighbours, 3);
        neighbour.expect("BH beside.round ");
        let name = format!("hostile-{method}-{seed}");
        let machine = start(&name, programs.path(), &own, 3);
        let _locked = machine.process("vcpu");
        let kinds = ["vcpu", "blk", "console", "legacy", "rng"];
        let pids = kinds.map(|kind| neighbour.process(kind));
        let growing = [neighbour.process("vcpu"), neighbour.pid(), machine.pid()];
        nothing_changes(&what, &pids, &growing);
        for (kind, kib) in device_sizes(&machine) {
            assert!(kib <= DEVICE_KIB_MAX, "{what}: {kind} uses {kib} KiB");
        }
        // Whatever it says of itself, it ends when it is told to, and nothing of it stays.
        machine.signal(Signal::SIGTERM);
        let ended = machine.wait();
        assert!(ended.code >= 0, "{what}: {ended:?}");
        errors_are_sound(&what, &ended);
        // What is on its disk is its own affair; that of the host is how large it is.
        let bytes = fs::metadata(own[0].path()).unwrap().len();
        assert_eq!(bytes, DISK_BYTES as u64, "{what}");
        let ended = neighbour.wait();
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
        canary_lives(&neighbours[0]);
    }
}

/// Kind and private memory of each device process that is alive.
fn device_sizes(machine: &Machine) -> Vec<(&'static str, u64)> {
    let processes = machine.processes();
    let sizes = ["blk", "console", "legacy", "rng"]
        .map(|kind| Some((kind, resident_kib(processes.of(kind)?)?)));
    sizes.into_iter().flatten().collect()
}
