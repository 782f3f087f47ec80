//! Devices are listed, restarted and upgraded while their guest uses and verifies them.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, Programs, disk, is_alive, kill, with_version};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// The version that every program of this build has.
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// So much of a program is its heading and constants; half of a build with debugging information
/// would still be all that runs.
const CUT_BYTES: usize = 64 << 10;
/// One that no program has.
const OTHER: &str = "9.8.7";

fn device(daemon: &Daemon, name: &str) -> Value {
    let list = daemon.json(&["device", "list", "web"]);
    let devices = list["devices"].as_array().unwrap();
    let found = devices.iter().find(|device| device["name"] == name);
    found.unwrap_or_else(|| panic!("no {name}: {list}")).clone()
}

fn pid(device: &Value) -> u32 {
    u32::try_from(device["pid"].as_u64().unwrap()).unwrap()
}

/// The file that a process was started from, as the kernel says.
fn inode_of(device: &Value) -> u64 {
    let program = fs::metadata(format!("/proc/{}/exe", pid(device)));
    program.unwrap().ino()
}

/// The guest verifies a disk and memory while it uses every other device, and counts what is wrong,
/// until its power button is pressed.
fn guest_under_load(daemon: &Daemon, disk: &str) {
    let load = "mode=beside seconds=600 qd=16 timeout=60";
    daemon.create_and_start("web", load, &["--disk", disk]);
    daemon.until_output("web", "BH beside.round ");
}

fn guest_found_nothing(daemon: &Daemon) {
    daemon.good(&["stop", "web"]);
    let waited = daemon.run(&["wait", "web"]);
    let output = daemon.output_of("web");
    assert_eq!(waited.code, 0, "{output}");
    assert!(output.contains("BH beside.end rounds="), "{output}");
    assert!(output.contains("BH done errors=0"), "{output}");
}

#[test]
fn devices_are_listed_and_restarted_by_name_and_the_guest_sees_no_error() {
    let daemon = Daemon::start();
    let image = disk(4 << 20);
    let path = image.path().to_str().unwrap();
    daemon.create("web", "mode=beside", &["--disk", path]);
    assert_eq!(
        daemon.json(&["device", "list", "web"])["devices"],
        Value::Array(vec![])
    );
    daemon.fails(&["device", "restart", "web/disk0"], 6, "is stopped");
    daemon.good(&["rm", "web"]);

    guest_under_load(&daemon, path);
    let names = ["legacy", "disk0", "console", "rng"];
    let before = names.map(|name| device(&daemon, name));
    for known in &before {
        assert_eq!(
            (&known["state"], &known["version"], &known["restarts"]),
            (&"serving".into(), &VERSION.into(), &0.into()),
            "{known}"
        );
        assert!(is_alive(pid(known)));
    }
    for (name, n) in names.iter().zip(1..) {
        let target = format!("web/{name}");
        let done = daemon.json(&["device", "restart", &target]);
        assert_eq!(done["changed"], true, "{done}");
        assert!(!is_alive(pid(&done["old"])), "{done}");
        assert!(is_alive(pid(&done["new"])), "{done}");
        assert_eq!(done["new"]["restarts"], 1, "{done}");
        let old = done["old"]["generation"].as_u64().unwrap();
        assert_eq!(done["new"]["generation"], old + 1, "number {n}: {done}");
    }
    let two = daemon.json(&["device", "restart", "web/disk0", "web/rng"]);
    assert_eq!(two.as_array().unwrap().len(), 2);
    let table = daemon.good(&["device", "list", "web"]);
    assert!(
        table.contains("disk0") && table.contains("serving"),
        "{table}"
    );

    daemon.fails(&["device", "list", "nobody"], 2, "there is no machine");
    daemon.fails(&["device", "restart", "web/disk7"], 2, "expected one of");
    // The vCPUs' process is the machine and no device.
    daemon.fails(&["device", "restart", "web/vcpu"], 2, "no device vcpu");
    daemon.fails(&["device", "restart", "web"], 2, "VM/DEVICE");
    guest_found_nothing(&daemon);
}

#[test]
fn device_is_upgraded_under_load_to_the_program_on_disk_and_to_no_other() {
    let programs = Programs::copied();
    let daemon = Daemon::of(&programs);
    let image = disk(4 << 20);
    guest_under_load(&daemon, image.path().to_str().unwrap());

    let same = daemon.json(&["device", "upgrade", "web/disk0"]);
    assert_eq!(same["changed"], false, "{same}");
    for kind in ["blk", "console", "legacy", "rng"] {
        programs.put(kind, &with_version(programs.read(kind), OTHER));
    }
    let done = daemon.json(&["device", "upgrade", "web/disk0"]);
    let (old, new) = (&done["old"], &done["new"]);
    assert_eq!(
        (&done["changed"], &old["version"]),
        (&true.into(), &VERSION.into())
    );
    assert_eq!(new["version"], OTHER, "{done}");
    assert_ne!(old["program"], new["program"], "{done}");
    assert_eq!(new["program"]["inode"], programs.inode("blk"));
    assert_eq!(inode_of(new), programs.inode("blk"), "as the kernel says");
    assert!(!is_alive(pid(old)), "the old process is gone");
    assert_eq!(device(&daemon, "rng")["version"], VERSION, "nobody else is");

    let all = daemon.json(&["device", "upgrade", "web"]);
    let all = all.as_array().unwrap();
    assert_eq!(all.len(), 4, "{all:?}");
    for one in all {
        assert_eq!(one["new"]["version"], OTHER, "{one}");
        assert_eq!(one["changed"], one["new"]["name"] != "disk0", "{one}");
        let kind = one["new"]["kind"].as_str().unwrap();
        assert_eq!(inode_of(&one["new"]), programs.inode(kind), "{one}");
    }
    // One that dies later is followed by the version that it was.
    kill(pid(&device(&daemon, "disk0")));
    let deadline = Instant::now() + Duration::from_secs(60);
    while device(&daemon, "disk0")["restarts"] != 2 {
        assert!(Instant::now() < deadline, "{}", device(&daemon, "disk0"));
    }
    assert_eq!(device(&daemon, "disk0")["version"], OTHER);
    guest_found_nothing(&daemon);
}

#[test]
fn devices_are_listed_and_upgraded_by_a_daemon_that_has_taken_the_machine_over() {
    let programs = Programs::copied();
    let mut daemon = Daemon::of(&programs);
    let image = disk(4 << 20);
    guest_under_load(&daemon, image.path().to_str().unwrap());
    let before = device(&daemon, "disk0");
    daemon.end(Signal::SIGKILL);
    daemon.serve();
    daemon.until_state("web", "running");
    let found = device(&daemon, "disk0");
    for key in ["pid", "generation", "version", "program", "state"] {
        assert_eq!(found[key], before[key], "{found}");
    }
    programs.put("blk", b"no program");
    daemon.fails(&["device", "upgrade", "web/disk0"], 6, "does not serve");
    programs.put("blk", &with_version(Programs::copied().read("blk"), OTHER));
    let done = daemon.json(&["device", "upgrade", "web/disk0"]);
    assert_eq!(done["new"]["version"], OTHER, "{done}");
    assert_eq!(inode_of(&done["new"]), programs.inode("blk"));
    guest_found_nothing(&daemon);
}

#[test]
fn program_that_does_not_start_is_given_up_and_the_one_before_it_serves() {
    let programs = Programs::copied();
    let daemon = Daemon::of(&programs);
    let image = disk(4 << 20);
    guest_under_load(&daemon, image.path().to_str().unwrap());
    for (name, kind) in [("disk0", "blk"), ("rng", "rng"), ("legacy", "legacy")] {
        let (whole, inode) = (programs.read(kind), programs.inode(kind));
        // Cut off before its code, no program at all, and nothing.
        let cut = whole[..CUT_BYTES].to_vec();
        for damaged in [cut, b"no program".to_vec(), Vec::new()] {
            programs.put(kind, &damaged);
            let target = format!("web/{name}");
            daemon.fails(&["device", "upgrade", &target], 6, "does not serve");
            let now = device(&daemon, name);
            assert_eq!(now["state"], "serving", "{now}");
            assert_eq!(now["program"]["inode"], inode, "{now}");
            assert_eq!(inode_of(&now), inode, "as the kernel says");
        }
        // What is on disk is taken by no restart either.
        let again = daemon.json(&["device", "restart", &format!("web/{name}")]);
        assert_eq!(inode_of(&again["new"]), inode);
        let serving = pid(&again["new"]);
        programs.remove(kind);
        let target = format!("web/{name}");
        daemon.fails(&["device", "upgrade", &target], 4, "bulkhead-");
        assert_eq!(pid(&device(&daemon, name)), serving, "nothing has happened");
        programs.put(kind, &with_version(whole, OTHER));
        let done = daemon.json(&["device", "upgrade", &target]);
        assert_eq!(done["new"]["version"], OTHER, "{done}");
    }
    guest_found_nothing(&daemon);
}

#[test]
fn device_that_was_given_up_comes_back_when_it_is_asked_for() {
    let daemon = Daemon::start();
    let image = disk(4 << 20);
    // The power button is what the guest waits for between its modes.
    let modes = "mode=button,bench-blk,button,blk-load op=rand_read bs=4k qd=8 requests=64 \
                 seconds=1 timeout=10";
    let path = image.path().to_str().unwrap();
    daemon.create_and_start("web", modes, &["--disk", path]);
    let until_ready = |times: usize| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while daemon.output_of("web").matches("BH button.ready").count() < times {
            assert!(Instant::now() < deadline, "{}", daemon.output_of("web"));
        }
    };
    until_ready(1);
    let go_on = || daemon.run(&["stop", "web", "--timeout", "10ms"]);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let disk = device(&daemon, "disk0");
        if disk["state"] == "lost" {
            assert_eq!(disk["pid"], Value::Null);
            break;
        }
        if disk["state"] == "serving" {
            kill(pid(&disk));
        }
        assert!(Instant::now() < deadline, "it is never given up: {disk}");
    }
    // The guest is told so by its device, and lives.
    go_on();
    daemon.until_output("web", "BH mode.end name=bench-blk result=failed");
    assert_eq!(daemon.state_of("web"), "running");

    let done = daemon.json(&["device", "restart", "web/disk0"]);
    assert_eq!(done["old"]["state"], "lost", "{done}");
    assert_eq!(done["new"]["state"], "serving", "{done}");
    assert_eq!(daemon.inspect("web")["degraded"], Value::Array(vec![]));
    until_ready(2);
    go_on();
    daemon.until_output("web", "BH mode.end name=blk-load result=ok");
}
