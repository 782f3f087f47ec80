//! A disk on a file system that takes its time: what a dead process has begun to write lands before
//! anything of its successor, or never, and nobody else waits for it.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::pattern::{self, SECTOR};
use bulkhead_tests::{Daemon, HeldFile, kill};
use serde_json::Value;
use std::time::{Duration, Instant};

const BYTES: usize = 4 << 20;
/// Where the guest writes first, and the write that is held.
const HELD: u64 = 2048;

fn disk(daemon: &Daemon) -> Value {
    let list = daemon.json(&["device", "list", "web"]);
    let devices = list["devices"].as_array().unwrap();
    devices
        .iter()
        .find(|d| d["name"] == "disk0")
        .unwrap()
        .clone()
}

fn pid(device: &Value) -> u32 {
    u32::try_from(device["pid"].as_u64().unwrap()).unwrap()
}

/// A machine whose first write is stuck in the file system, and whose disk's process is killed then.
fn killed_while_it_writes(modes: &str) -> (Daemon, HeldFile, Value) {
    let file = HeldFile::new(BYTES, HELD * SECTOR as u64);
    let daemon = Daemon::start();
    let path = file.path();
    let load = format!("mode={modes} sector={HELD} seconds=1 timeout=100");
    daemon.create_and_start("web", &load, &["--disk", path.to_str().unwrap()]);
    file.until_held();
    let victim = disk(&daemon);
    kill(pid(&victim));
    (daemon, file, victim)
}

/// The generations that the log tells of never mix: when the next one has begun, the one before it is
/// over. Returns how many changed the image at the place of the write that was held.
fn generations_in_turn(file: &HeldFile) -> usize {
    let log = file.log();
    let mut handles: Vec<u64> = log.iter().map(|access| access.handle).collect();
    handles.dedup();
    let mut sorted = handles.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(handles, sorted, "one after the other: {log:?}");
    let place = HELD * SECTOR as u64;
    let at_place = log.iter().filter(|a| a.write && a.offset == place);
    let mut writers: Vec<u64> = at_place.map(|access| access.handle).collect();
    writers.dedup();
    writers.len()
}

fn verify_place(file: &HeldFile, seed: u64) {
    let image = file.image();
    let at = usize::try_from(HELD).unwrap() * SECTOR;
    let place = &image[at..at + 8 * SECTOR];
    assert_eq!(pattern::first_difference(seed, HELD, place), None);
}

#[test]
fn write_of_a_dead_process_lands_before_its_successor_begins_and_nobody_else_waits() {
    let (daemon, file, victim) = killed_while_it_writes("blk-held");
    // The broker answers, the gate works, and the guest's other devices are served.
    let told = || {
        daemon
            .output_of("web")
            .matches("BH blk-held.beside")
            .count()
    };
    let (before, deadline) = (told(), Instant::now() + Duration::from_secs(60));
    let other = daemon.json(&["device", "restart", "web/rng"]);
    assert_eq!(other["changed"], true, "{other}");
    while told() < before + 2 {
        assert!(Instant::now() < deadline, "the guest stands still");
    }
    // The dead process has not left the kernel, so nobody has its place, and the guest no answer.
    let now = disk(&daemon);
    assert_eq!(now["generation"], victim["generation"], "{now}");
    assert!(!daemon.output_of("web").contains("blk-held.end"));
    assert!(
        !file.log().iter().any(|access| access.write),
        "{:?}",
        file.log()
    );

    file.let_go();
    let waited = daemon.run(&["wait", "web"]);
    let output = daemon.output_of("web");
    assert_eq!(waited.code, 0, "{output}");
    assert!(output.contains("BH blk-held.end "), "{output}");
    assert!(output.contains("BH done errors=0"), "{output}");
    assert_eq!(generations_in_turn(&file), 2, "both wrote it");
    verify_place(&file, 2);
    let events = daemon.events_of("web");
    assert!(events.iter().any(|e| e == "device_restarted"), "{events:?}");
    assert!(!events.iter().any(|e| e == "device_lost"), "{events:?}");
}

#[test]
fn disk_that_cannot_be_fenced_is_given_up_and_comes_back_when_its_file_answers() {
    let (daemon, file, victim) = killed_while_it_writes("blk-held,button,blk-load");
    let deadline = Instant::now() + Duration::from_secs(60);
    while disk(&daemon)["state"] != "lost" {
        assert!(Instant::now() < deadline, "{}", disk(&daemon));
        std::thread::sleep(Duration::from_millis(50));
    }
    // The guest has its error, and nobody may write beside the process that is not gone.
    daemon.until_output("web", "BH mode.end name=blk-held result=failed");
    let refused = daemon.run(&["device", "restart", "web/disk0"]);
    assert_eq!(refused.code, 6, "{refused:?}");
    assert!(
        !file.log().iter().any(|access| access.write),
        "{:?}",
        file.log()
    );

    file.let_go();
    while daemon.run(&["device", "restart", "web/disk0"]).code != 0 {
        assert!(Instant::now() < deadline, "{}", disk(&daemon));
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_ne!(pid(&disk(&daemon)), pid(&victim));
    let _button = daemon.run(&["stop", "web", "--timeout", "10ms"]);
    daemon.until_output("web", "BH mode.end name=blk-load result=ok");
    assert_eq!(generations_in_turn(&file), 2);
}
