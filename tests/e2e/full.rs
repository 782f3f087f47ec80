//! A host that has no room for what a guest writes: the machine waits for it, and loses nothing.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, Machine, SmallDisk, kill};
use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, Instant};

/// Size of a disk; half of it is written.
const DISK_BYTES: u64 = 8 << 20;
/// Verifies what it has written, round after round, and every answer.
const LOAD: &str = "mode=blk-load sectors=8192 seconds=1 timeout=100";
const DISK: &str = "disk0";

fn sparse_disk(directory: &Path) -> String {
    let path = directory.join("disk.img");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Waits until the machine is paused for want of room.
fn until_full(daemon: &Daemon, name: &str) {
    daemon.until_state(name, "paused");
    assert_eq!(daemon.inspect(name)["no_room"][0], DISK);
}

fn until_room(daemon: &Daemon, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.inspect(name)["no_room"][0] == DISK {
        assert!(Instant::now() < deadline, "{}", daemon.inspect(name));
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn ends_well(daemon: &Daemon, name: &str) {
    let waited = daemon.run(&["wait", name]);
    let output = daemon.output_of(name);
    assert_eq!(waited.code, 0, "{output}");
    assert!(output.contains("BH done errors=0"), "{output}");
}

#[test]
fn machine_waits_for_room_and_goes_on_by_itself() {
    let daemon = Daemon::start();
    let small = SmallDisk::memory("2m");
    let disk = sparse_disk(small.path());
    daemon.create_and_start("web", LOAD, &["--disk", &disk]);
    until_full(&daemon, "web");
    let list = daemon.good(&["list"]);
    assert!(list.contains("no room on the host for: disk0"), "{list}");
    // Somebody who insists learns what it waits for.
    daemon.fails(&["resume", "web"], 6, "has room for disk0");
    // Its other devices are served meanwhile, and the disk by whoever comes next.
    daemon.good(&["device", "restart", "web/rng"]);
    kill(daemon.process("web", "blk"));
    std::thread::sleep(Duration::from_secs(1));
    until_full(&daemon, "web");

    small.resize("32m");
    ends_well(&daemon, "web");
    let events = daemon.events_of("web");
    for event in ["no_room", "paused", "has_room", "resumed"] {
        assert!(events.iter().any(|e| e == event), "{event}: {events:?}");
    }
    assert!(!events.iter().any(|e| e == "device_lost"), "{events:?}");
}

#[test]
fn owners_pause_lasts_longer_and_the_next_daemon_waits_on() {
    let mut daemon = Daemon::start();
    let small = SmallDisk::ext4(16 << 20);
    let ballast = small.path().join("ballast");
    let disk = sparse_disk(small.path());
    // What does not fit is not missed.
    let _fills_it = fs::write(&ballast, vec![1; 14 << 20]);
    daemon.create_and_start("web", LOAD, &["--disk", &disk]);
    until_full(&daemon, "web");
    let _lives = daemon.crash();
    daemon.serve();
    until_full(&daemon, "web");

    daemon.good(&["pause", "web"]);
    fs::remove_file(&ballast).unwrap();
    until_room(&daemon, "web");
    assert_eq!(daemon.state_of("web"), "paused");
    daemon.good(&["resume", "web"]);
    ends_well(&daemon, "web");
}

#[test]
fn machine_whose_file_says_so_gets_the_error() {
    let daemon = Daemon::start();
    let small = SmallDisk::memory("2m");
    let disk = sparse_disk(small.path());
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let file = daemon.scratch().join("web.toml");
    let text = format!(
        "[machine]\nmemory = \"64MiB\"\n[boot]\nkernel = {guest:?}\ncmdline = \"{LOAD}\"\n\
         [[disk]]\npath = \"{disk}\"\n[lifecycle]\non_disk_full = \"error\"\n"
    );
    fs::write(&file, text).unwrap();
    daemon.good(&["create", file.to_str().unwrap()]);
    daemon.good(&["start", "web"]);
    daemon.until_output("web", "BH mode.end name=blk-load result=failed");
    let events = daemon.events_of("web");
    assert!(!events.iter().any(|e| e == "paused"), "{events:?}");
}

#[test]
fn run_says_what_it_waits_for() {
    let small = SmallDisk::memory("2m");
    let disk = sparse_disk(small.path());
    let machine = Machine::test_guest(LOAD, &["--disk", &disk]);
    machine.expect_error("paused: the host has no room for what the guest writes to disk0");
    small.resize("32m");
    machine.expect_error("the host has room for disk0 again");
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}
