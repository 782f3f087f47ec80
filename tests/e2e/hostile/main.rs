//! A process that its guest has taken over attacks everything it holds. A device does while the guest
//! uses all its other devices, the process of the guest itself while a neighbour's guest does. Nothing
//! else changes: no verified byte, no byte of guest memory that the guest itself does not use, no
//! descriptor, no mapping; nobody crashes, hangs or grows.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]
#![allow(
    clippy::print_stdout,
    reason = "the measured shares are printed besides being asserted"
)]

use bulkhead_tests::network::Network;
use bulkhead_tests::{Difference, Ended, Expected, GuestMemory, Look, Machine, Programs};
use nix::sys::signal::Signal;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::{NamedTempFile, TempDir};

mod calls;
mod network;
mod paused;

const METHODS: [&str; 8] = [
    "scribble", "rings", "publish", "ring", "fill", "flood", "lie", "silent",
];
/// The kinds of devices that are taken over.
const KINDS: [&str; 7] = ["blk", "console", "rng", "legacy", "vsock", "net", "fs"];
/// How much more memory gate and broker may use under attack than at its begin, in KiB.
const GROWTH_KIB: u64 = 4096;
/// A guest beside an attacker keeps this share at least of the pace that it has beside a process which only
/// computes. On two CPUs anybody who takes one costs a guest two thirds of its pace; each attack
/// costs it less than half.
const PACE_MIN: f64 = 0.7;
/// Lines about a machine at most: a process that sends more messages than the broker allows
/// (`broker/src/supervisor/allowance.rs`) is ended. One that lies without a pause makes as many in a blink.
const SAID_MAX: usize = 4000;
/// Private memory of a device process at most, in KiB: several times what an honest guest makes it use.
const DEVICE_KIB_MAX: u64 = 8192;
/// Bytes of a disk; the guest uses the first half of it.
const DISK_BYTES: usize = 4 << 20;
const CANARY: u8 = 0xc7;
/// Memory of every guest here ([`Machine::test_guest`]).
const MEMORY_BYTES: usize = 64 << 20;
/// The share of it that is filled with a pattern and compared from outside at least. Most of the rest is
/// what the guest itself writes: its data and stacks, the memory that it verifies, its buffers.
const FILLED_MIN: f64 = 0.9;
/// How often it is compared under each attack at least.
const LOOKS_MIN: usize = 3;

/// The methods that a process of this kind attacks with, each with its seed: every other one, and its neighbour of the next kind
/// the ones between them, so that each is tried on several kinds. All of them on all in the slow suites.
fn methods_of(kind: &str) -> impl Iterator<Item = (&'static str, usize)> {
    let number = KINDS.iter().position(|k| *k == kind).unwrap();
    let all = METHODS.into_iter().zip(1..);
    all.filter(move |(_, seed)| bulkhead_tests::slow() || (number + seed).is_multiple_of(2))
}

thread_local! {
    /// Whether the machines of this test have a network device, which is in a network of the test's own.
    static HAS_NETWORK: Cell<bool> = const { Cell::new(false) };
    /// The folder that the machines of this test share, if they do.
    static FOLDER: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// The machines of this test have a network device from now on. False without root.
fn with_network() -> bool {
    HAS_NETWORK.set(Network::enter().is_some());
    HAS_NETWORK.get()
}

/// The machines of this test share a folder from now on, which is returned.
fn with_folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    FOLDER.set(Some(folder.path().to_owned()));
    folder
}

/// Whoever runs machines here shares its lock; whoever wants to be alone has it for itself. The tests may be
/// processes of their own.
fn machines() -> File {
    File::open(bulkhead_tests::path("BULKHEAD_BIN_DIR")).unwrap()
}

fn beside_others() -> File {
    let machines = machines();
    machines.lock_shared().unwrap();
    machines
}

fn without_others() -> File {
    let machines = machines();
    machines.lock().unwrap();
    machines
}

/// A machine whose guest fills the memory that it does not use, verifies the last of `disks` and keeps
/// requests in flight on everything else.
fn start(name: &str, programs: &Path, disks: &[NamedTempFile], seconds: u32) -> Machine {
    let cmdline = format!(
        "mode=beside fill=1 seconds={seconds} disk={}",
        disks.len() - 1
    );
    let mut arguments = vec!["--name", name, "--libexec-dir", programs.to_str().unwrap()];
    arguments.push("--vsock");
    if HAS_NETWORK.get() {
        arguments.extend(["--net", "tap=tap0"]);
    }
    let folder = FOLDER.with_borrow(Clone::clone);
    if let Some(folder) = &folder {
        arguments.extend(["--share", folder.to_str().unwrap()]);
    }
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

/// What the memory of a guest that works has to be, and that memory.
fn expected_memory(machine: &mut Machine) -> (Expected, GuestMemory) {
    machine.expect("BH beside.round ");
    let memory = GuestMemory::of(machine.process("vcpu"), MEMORY_BYTES);
    let expected = Expected::of(&memory);
    let (compared, filled) = (expected.compared(), expected.filled());
    println!("compared: {:.1} % of memory", compared * 100.0);
    assert!(filled <= compared && filled >= FILLED_MIN, "{filled}");
    (expected, memory)
}

/// Does `work`, during which the guest ends, while its memory is compared.
fn while_watched(
    what: &str,
    (expected, memory): (&Expected, &GuestMemory),
    work: impl FnOnce() -> Ended,
) -> Ended {
    std::thread::scope(|scope| {
        let watch = scope.spawn(|| expected.watch(memory));
        let ended = work();
        let looks = watch.join().unwrap();
        let looks = looks.unwrap_or_else(|other| panic!("{what}: {other:x?} {ended:?}"));
        println!("{what}: all memory was the same {looks} times");
        assert!(looks >= LOOKS_MIN, "{what}: only {looks} looks");
        ended
    })
}

/// The pace of a guest beside a hostile process that uses `method`.
fn pace_beside(method: &str, programs: &Programs, disks: &[NamedTempFile]) -> f64 {
    let name = format!("hostile-{method}-1");
    let mut machine = start(&name, programs.path(), disks, 2);
    machine.expect("BH beside.round ");
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{method}: {ended:?}");
    rounds(&ended.console)
}

/// The guest keeps its pace, but for what a CPU costs that anybody burns. Whatever else the host does may
/// come while one is measured and not the other, so what fails is tried again, both after each other.
fn keeps_its_pace(
    method: &str,
    pace: f64,
    burnt: f64,
    programs: &Programs,
    disks: &[NamedTempFile],
) {
    const TRIES: usize = 5;
    let (mut pace, mut burnt) = (pace, burnt);
    let mut alone = None;
    for _ in 0..TRIES {
        let kept = pace / burnt;
        println!(
            "{method}: {:.0} % of the pace beside one that only computes",
            kept * 100.0
        );
        if kept >= PACE_MIN {
            return;
        }
        // Without the other tests of this program.
        alone.get_or_insert_with(without_others);
        burnt = pace_beside("burn", programs, disks);
        pace = pace_beside(method, programs, disks);
    }
    panic!("{method} costs a guest more than a CPU");
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
    let mut undisturbed = start("undisturbed", &binaries, &disks, 4);
    let (expected, memory) = expected_memory(&mut undisturbed);
    let undisturbed = while_watched("undisturbed", (&expected, &memory), || undisturbed.wait());
    assert_eq!(undisturbed.code, 0, "{undisturbed:?}");
    let programs = Programs::with(kind, "bulkhead-hostile");
    // A guest whose console is attacked tells nothing.
    let burnt = (kind != "legacy").then(|| pace_beside("burn", &programs, &disks));
    if let Some(burnt) = burnt {
        let left = burnt / rounds(&undisturbed.console);
        println!(
            "a CPU that is taken leaves {:.0} % of the pace",
            left * 100.0
        );
    }
    // How long a guest goes on that tells nothing: a process of this kind waits for its broker before it attacks.
    let seconds = if kind == "legacy" { 6 } else { 2 };
    for (method, seed) in methods_of(kind) {
        let beside = beside_others();
        let what = format!("{kind} {method}");
        let name = format!("hostile-{method}-{seed}");
        let mut machine = start(&name, programs.path(), &disks, seconds);
        if kind == "legacy" {
            // The guest's console is what is attacked.
            std::thread::sleep(Duration::from_secs(1));
        } else {
            machine.expect("BH beside.round ");
        }
        let vcpu = machine.process("vcpu");
        let memory = GuestMemory::of(vcpu, MEMORY_BYTES);
        if kind == "legacy" {
            expected.await_filled(&memory);
        }
        let others = [vcpu, server_of(&machine, verified)];
        let ended = while_watched(&what, (&expected, &memory), || {
            nothing_changes(&what, &others, &[vcpu, machine.pid()]);
            machine.wait()
        });
        // A guest that counted an error says so by its exit code, whoever owns its console.
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
        errors_are_sound(&what, &ended);
        drop(beside);
        if let Some(burnt) = burnt {
            keeps_its_pace(method, rounds(&ended.console), burnt, &programs, &disks);
        }
        canary_lives(verified);
    }
    assert_eq!(fs::read(canary.path()).unwrap(), [CANARY; 4096]);
}

/// What the other tests rely on: one changed byte of a guest that runs, wherever the guest does not work, is
/// found from outside, and in filled memory by the guest as well.
#[test]
fn changed_byte_of_guest_memory_is_found_and_its_address_named() {
    /// Both sides of where filled memory begins, the ACPI tables, the published page, what is between the
    /// guest's code and its tables, and the end of memory.
    const PLACES: [u64; 6] = [0xfff, 0x1000, 0x1f_ffff, 0xe_0100, 0x20_fff0, LAST];
    const LAST: u64 = MEMORY_BYTES as u64 - 1;
    let binaries = bulkhead_tests::path("BULKHEAD_BIN_DIR");
    let disks = [disk_with_canary()];
    let mut machine = start("spoilt", &binaries, &disks, 4);
    let (expected, memory) = expected_memory(&mut machine);
    assert_eq!(expected.look(&memory), Look::Same);
    for address in PLACES {
        memory.spoil(address);
        let Look::Differs(found) = expected.look(&memory) else {
            panic!("{address:#x} is not seen to differ");
        };
        assert_eq!((found.address, found.is), (address, !found.was));
        memory.spoil(address);
        assert_eq!(expected.look(&memory), Look::Same);
    }
    memory.spoil(LAST);
    let found = expected.watch(&memory);
    assert!(
        matches!(found, Err(Difference { address: LAST, .. })),
        "{found:x?}"
    );
    let ended = machine.wait();
    assert_ne!(ended.code, 0, "{ended:?}");
    let said = format!("BH error mode=beside kind=spare address={LAST:#x}");
    assert!(ended.console.contains(&said), "{ended:?}");
}

#[test]
fn taken_over_rng_harms_nobody_else() {
    attacked_by("rng");
}

#[test]
fn taken_over_vsock_harms_nobody_else() {
    attacked_by("vsock");
}

#[test]
fn taken_over_net_harms_nobody_else() {
    if with_network() {
        attacked_by("net");
    }
}

#[test]
fn taken_over_fs_harms_nobody_else() {
    let folder = with_folder();
    fs::write(folder.path().join("mine"), [CANARY; 4096]).unwrap();
    attacked_by("fs");
    let names: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let mine = fs::read(folder.path().join("mine")).unwrap();
    assert_eq!(mine, [CANARY; 4096]);
}

#[test]
fn taken_over_console_harms_nobody_else() {
    attacked_by("console");
}

#[test]
fn taken_over_legacy_harms_nobody_else() {
    attacked_by("legacy");
}

/// Each access to a register waits for the process, or the next one. That must have an end, however late and
/// silent they are, each for less than it takes to give up on one that dies.
#[test]
fn guest_that_prints_much_gets_over_a_taken_over_legacy() {
    let _others = beside_others();
    let disks = [disk_with_canary()];
    let programs = Programs::with("legacy", "bulkhead-hostile");
    let arguments = [
        "--name",
        "hostile-rings-1",
        "--libexec-dir",
        programs.argument(),
    ];
    let disk = ["--disk", disks[0].path().to_str().unwrap()];
    let cmdline = "mode=hello,beside,hello seconds=2";
    let machine = Machine::test_guest(cmdline, &[&arguments[..], &disk].concat());
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let given_up = ["degraded: legacy is lost", "at fault 4 times"];
    assert!(
        given_up.iter().all(|part| ended.errors.contains(part)),
        "{ended:?}"
    );
    canary_lives(&disks[0]);
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
        let _others = beside_others();
        let what = format!("vcpu {method}");
        let [own, neighbours] = [(); 2].map(|()| [disk_with_canary()]);
        let mut neighbour = start("neighbour", &binaries, &neighbours, 5);
        let (expected, memory) = expected_memory(&mut neighbour);
        let ended = while_watched(&what, (&expected, &memory), || {
            let name = format!("hostile-{method}-{seed}");
            attacked_by_vcpu(&what, start(&name, programs.path(), &own, 3), &neighbour);
            // What is on its disk is its own affair; that of the host is how large it is.
            let bytes = fs::metadata(own[0].path()).unwrap().len();
            assert_eq!(bytes, DISK_BYTES as u64, "{what}");
            neighbour.wait()
        });
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
        canary_lives(&neighbours[0]);
    }
}

/// Whatever a hostile vCPU process says of itself, its machine ends when it is told to, and nothing of it stays.
fn attacked_by_vcpu(what: &str, machine: Machine, neighbour: &Machine) {
    let _locked = machine.process("vcpu");
    let kinds = ["vcpu", "blk", "console", "legacy", "rng", "vsock"];
    let pids = kinds.map(|kind| neighbour.process(kind));
    let growing = [neighbour.process("vcpu"), neighbour.pid(), machine.pid()];
    nothing_changes(what, &pids, &growing);
    for (kind, kib) in device_sizes(&machine) {
        assert!(kib <= DEVICE_KIB_MAX, "{what}: {kind} uses {kib} KiB");
    }
    machine.signal(Signal::SIGTERM);
    let ended = machine.wait();
    assert!(ended.code >= 0, "{what}: {ended:?}");
    errors_are_sound(what, &ended);
}

/// Kind and private memory of each device process that is alive.
fn device_sizes(machine: &Machine) -> Vec<(&'static str, u64)> {
    let processes = machine.processes();
    let sizes = ["blk", "console", "legacy", "rng", "vsock"]
        .map(|kind| Some((kind, resident_kib(processes.of(kind)?)?)));
    sizes.into_iter().flatten().collect()
}
