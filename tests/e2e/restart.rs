//! A device process can be killed, stopped or spoilt at any moment: another takes its place, and the
//! guest sees a delay and nothing else.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead::vm::devices::DISK_QUEUE;
use bulkhead_ipc::window::WindowLayout;
use bulkhead_tests::pattern::{self, SECTOR};
use bulkhead_tests::{Fate, Intruder, Machine, Restart, disk, kill, signal_process, window_of};
use nix::sys::signal::Signal;
use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};
use tempfile::NamedTempFile;

/// The keys of the first record that begins with `name`.
fn record(console: &str, name: &str) -> HashMap<String, u64> {
    let line = console
        .lines()
        .find_map(|line| line.trim().strip_prefix("BH ")?.strip_prefix(name))
        .unwrap_or_else(|| panic!("no record {name}:\n{console}"));
    let pairs = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

/// Reads the image behind the guest's back and compares it with what its last round has written.
fn verify_image(disk: &NamedTempFile, console: &str) {
    let end = record(console, "blk-load.end ");
    let (seed, sectors) = (end["seed"], end["sectors"]);
    let mut image = vec![0; usize::try_from(sectors).unwrap() * SECTOR];
    disk.as_file().read_exact_at(&mut image, 0).unwrap();
    assert_eq!(pattern::first_difference(seed, 0, &image), None);
}

/// Runs a guest that writes, flushes and verifies for `seconds`; `meanwhile` does what it does.
fn under_load(seconds: u32, meanwhile: impl FnOnce(&mut Machine)) -> (String, Vec<Restart>) {
    let disk = disk(4 << 20);
    let path = disk.path().to_str().unwrap();
    let load = format!("mode=blk-load seconds={seconds} qd=32 timeout=60");
    let mut machine = Machine::test_guest(&load, &["--disk", path]);
    machine.expect("BH blk-load.begin");
    meanwhile(&mut machine);
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
    verify_image(&disk, &ended.console);
    let restarts = Restart::all(&ended.errors);
    let mut times: Vec<u64> = restarts.iter().map(|r| r.after_us).collect();
    times.sort_unstable();
    if let (Some(p50), Some(max)) = (times.get(times.len() / 2), times.last()) {
        println!("{} restarts: p50 {p50} us, longest {max} us", times.len());
    }
    (ended.errors, restarts)
}

#[test]
fn disk_is_killed_fifty_times_under_load_and_the_guest_sees_no_error() {
    let (errors, restarts) = under_load(8, |machine| {
        for n in 1..=50 {
            kill(machine.process("blk"));
            machine.expect_restarts(n);
            std::thread::sleep(Duration::from_millis(20 + n as u64 % 7 * 10));
        }
    });
    assert_eq!(restarts.len(), 50, "{errors}");
    assert!(!errors.contains("degraded"), "{errors}");
    for (restart, generation) in restarts.iter().zip(2..) {
        assert_eq!(
            (restart.name.as_str(), restart.generation),
            ("disk0", generation)
        );
    }
}

#[test]
fn disk_process_that_tries_what_is_not_granted_is_replaced() {
    let (errors, restarts) = under_load(3, |machine| {
        let mut intruder = Intruder::enter(machine.process("blk"), None);
        let fate = intruder.call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]);
        assert!(matches!(fate, Fate::Stopped { .. }), "{fate:?}");
        machine.expect_restarts(1);
    });
    assert!(
        restarts[0].reason.contains("system call socket("),
        "{errors}"
    );
}

#[test]
fn disk_process_that_stands_still_is_found_out_and_replaced() {
    let start = Instant::now();
    let (errors, restarts) = under_load(12, |machine| {
        signal_process(machine.process("blk"), Signal::SIGSTOP);
        machine.expect_restarts(1);
    });
    println!("found out after {:?}", start.elapsed());
    assert!(restarts[0].reason.contains("heartbeats"), "{errors}");
}

/// Where the rings of a disk's first queue end, in bytes from the window's begin.
fn rings_end() -> u32 {
    // Offsets do not depend on the window's size, if only it is large enough.
    let layout = WindowLayout::new(64 << 20, &[DISK_QUEUE]).unwrap();
    layout.queues[0].heads.try_into().unwrap()
}

#[test]
fn nonsense_in_the_window_costs_the_process_and_not_the_guest() {
    let (errors, restarts) = under_load(8, |machine| {
        for n in 1..=10u8 {
            let victim = machine.process("blk");
            // All of header and rings, but for the driver's half of the header; not the answers behind them:
            // what a disk says of its own requests is believed.
            let (memory, window) = window_of(victim);
            let junk: Vec<u8> = (0..rings_end() - 0x1000)
                .map(|at| (at.wrapping_mul(2_654_435_761) >> 13).to_le_bytes()[0] ^ n)
                .collect();
            // It may be dead before everything is written.
            let _spoilt = memory.write_all_at(&junk, window + 0x1000);
            machine.expect_restarts(n.into());
            // A request that is with three processes in a row when they break would be given up.
            std::thread::sleep(Duration::from_millis(250));
        }
    });
    assert_eq!(restarts.len(), 10, "{errors}");
}

#[test]
fn disk_that_dies_too_often_gives_errors_and_the_machine_lives() {
    let disk = disk(16 << 20);
    let path = disk.path().to_str().unwrap();
    let load = "mode=bench-blk,idle op=rand_read bs=4k qd=8 seconds=20 timeout=5";
    let mut machine = Machine::test_guest(load, &["--disk", path]);
    machine.expect("BH bench-blk.begin");
    let start = Instant::now();
    while !machine.errors().contains("degraded: disk0 is lost") {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{}",
            machine.errors()
        );
        if let Some(victim) = machine.processes().of("blk") {
            kill(victim);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    println!("given up after {:?}", start.elapsed());
    // The guest goes on: its driver counts failed requests and its next mode begins.
    let said = machine.expect("BH idle ");
    assert!(record(&said, "bench-blk.end ")["failed"] > 0, "{said}");
    assert!(machine.processes().of("vcpu").is_some());
}

/// Values of `key` in the records named `name`, in order.
fn values<'a>(console: &'a str, name: &str, key: &str) -> Vec<&'a str> {
    let lines = console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("BH "));
    let records = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = |record: &'a str| {
        record
            .split(' ')
            .find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
    };
    records.filter_map(value).collect()
}

/// Kills the process of `kind` again and again while it is being typed at the console.
fn kill_while_typing(machine: &mut Machine, kind: &str, rounds: usize) {
    for n in 0..rounds {
        machine.type_keys(&format!("key-{n:03}\n"));
        std::thread::sleep(Duration::from_millis(15 + n as u64 % 5 * 7));
        kill(machine.process(kind));
        machine.type_keys(&format!("and-{n:03}\n"));
        machine.expect_restarts(n + 1);
    }
}

fn typed(rounds: usize) -> Vec<String> {
    let lines = (0..rounds).flat_map(|n| [format!("key-{n:03}"), format!("and-{n:03}")]);
    lines.collect()
}

#[test]
fn serial_port_prints_and_reads_everything_once_while_its_process_is_killed() {
    const ROUNDS: usize = 30;
    let mut machine = Machine::test_guest("mode=serial seconds=8 timeout=60", &[]);
    machine.expect("BH serial.begin");
    kill_while_typing(&mut machine, "legacy", ROUNDS);
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let lines: Vec<u64> = values(&ended.console, "serial.line", "n")
        .iter()
        .map(|n| n.parse().unwrap())
        .collect();
    let first_wrong = lines
        .iter()
        .zip(lines[0]..)
        .find(|(n, expected)| **n != *expected);
    assert_eq!(first_wrong, None, "of {} lines", lines.len());
    assert_eq!(
        record(&ended.console, "serial.end ")["lines"],
        lines.last().unwrap() + 1
    );
    assert_eq!(values(&ended.console, "serial.echo", "text"), typed(ROUNDS));
    let restarts = Restart::all(&ended.errors);
    assert_eq!(restarts.len(), ROUNDS, "{}", ended.errors);
    let mut times: Vec<u64> = restarts.iter().map(|r| r.after_us).collect();
    times.sort_unstable();
    println!(
        "{} lines; restart p50 {} us",
        lines.len(),
        times[ROUNDS / 2]
    );
}

#[test]
fn virtio_console_prints_and_reads_everything_once_while_its_process_is_killed() {
    const ROUNDS: usize = 30;
    let load = format!("mode=console lines=0 count={} timeout=60", 2 * ROUNDS);
    let mut machine = Machine::test_guest(&load, &["--console", "virtio"]);
    // The guest's records go to the serial port, which nobody sees.
    machine.type_keys("\n");
    kill_while_typing(&mut machine, "console", ROUNDS);
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let echoed = ended
        .console
        .lines()
        .filter_map(|line| line.trim().strip_prefix("echo: "));
    assert_eq!(
        echoed.collect::<Vec<_>>(),
        typed(ROUNDS),
        "{}",
        ended.errors
    );
    assert_eq!(
        Restart::all(&ended.errors).len(),
        ROUNDS,
        "{}",
        ended.errors
    );
}

#[test]
fn entropy_source_that_is_killed_costs_nothing() {
    let mut machine = Machine::test_guest("mode=rng,rng,rng,rng size=4194304 timeout=60", &[]);
    machine.expect("BH hello");
    for n in 1..=20 {
        kill(machine.process("rng"));
        machine.expect_restarts(n);
        std::thread::sleep(Duration::from_millis(15));
    }
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}
