//! The daemon as a service: what ends it ends no machine, and what it cannot write costs nobody.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, Groups, SmallDisk, is_alive};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

#[test]
fn machines_are_in_no_control_group_of_the_daemon() {
    // Dropped after the daemon that is in them.
    let groups = Groups::new("daemon");
    let daemon = Daemon::start();
    if groups.is_empty() {
        assert!(!nix::unistd::geteuid().is_root(), "root has control groups");
        return;
    }
    groups.add(daemon.pid());
    let disk = bulkhead_tests::disk(1 << 20);
    daemon.create_and_start(
        "web",
        "mode=idle",
        &["--disk", disk.path().to_str().unwrap()],
    );
    let pids = daemon.pids();
    assert_eq!(pids.len(), 5);
    for pid in pids {
        let of = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(!of.contains("test-of-bulkhead-"), "{pid}: {of}");
        assert!(of.contains("/bulkhead/web-"), "{pid}: {of}");
    }
}

#[test]
fn what_ends_all_control_groups_of_the_daemon_ends_no_machine() {
    let groups = Groups::new("killed");
    let mut daemon = Daemon::start();
    if groups.is_empty() {
        assert!(!nix::unistd::geteuid().is_root(), "root has control groups");
        return;
    }
    groups.add(daemon.pid());
    let disk = bulkhead_tests::disk(8 << 20);
    let load = "mode=beside seconds=5 qd=16 timeout=60";
    daemon.create_and_start("web", load, &["--disk", disk.path().to_str().unwrap()]);
    daemon.until_output("web", "BH beside.round");
    let processes = daemon.pids();
    assert_eq!(processes.len(), 5);
    groups.kill();
    daemon.gone();
    assert!(processes.iter().all(|pid| is_alive(*pid)), "{processes:?}");
    daemon.serve();
    assert_eq!(daemon.pids(), processes);
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    assert!(daemon.output_of("web").contains("BH done errors=0"));
}

#[test]
fn full_disk_costs_changes_and_logs_and_no_machine() {
    assert!(nix::unistd::geteuid().is_root(), "a file system is mounted");
    let mut daemon = Daemon::start();
    daemon.end(Signal::SIGTERM);
    let _small = SmallDisk::memory_at(daemon.state(), "2m");
    daemon.serve();
    daemon.create_and_start("lives", "mode=idle", &[]);
    daemon.create("waits", "mode=idle", &[]);
    let fill = daemon.state().join("fill");
    let full = fs::write(&fill, vec![1; 4 << 20]).unwrap_err();
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let mut refused = 0;
    // What still fits in the registry's own file may succeed; nothing may hang or be half done.
    for n in 0..200 {
        let name = format!("new-{n}");
        let create = [
            "create",
            "--name",
            &name,
            "--kernel",
            guest.to_str().unwrap(),
        ];
        let done = daemon.run(&create);
        if done.code == 6 {
            assert!(done.errors.contains("registry"), "{done:?}");
            refused += 1;
            assert_eq!(
                daemon.run(&["inspect", &name]).code,
                2,
                "it is not half there"
            );
        } else {
            assert_eq!(done.code, 0, "{done:?}");
        }
        if refused == 3 {
            break;
        }
    }
    assert_eq!(refused, 3, "the disk was never full for the registry");
    // A start that cannot be recorded does not happen, and one that runs is not touched.
    let start = daemon.run(&["start", "waits"]);
    let told = start.errors.contains("registry") || start.errors.contains("No space left");
    assert!(start.code != 0 && told, "{start:?}");
    assert_eq!(daemon.state_of("waits"), "stopped");
    assert_eq!(daemon.state_of("lives"), "running");
    daemon.good(&["pause", "lives"]);
    daemon.good(&["resume", "lives"]);
    daemon.good(&["kill", "lives"]);
    assert_eq!(daemon.run(&["wait", "lives"]).code, 12);
    fs::remove_file(&fill).unwrap();
    daemon.good(&["start", "waits"]);
    daemon.good(&["kill", "waits"]);
    // The end is recorded as soon as there is room.
    let deadline = Instant::now() + Duration::from_secs(30);
    let pending = daemon.log().contains("is not recorded yet");
    while pending && !daemon.log().contains("is recorded now") {
        assert!(Instant::now() < deadline, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    daemon.end(Signal::SIGTERM);
    daemon.serve();
    assert_eq!(daemon.inspect("lives")["last_run"]["ending"], "killed");
}

#[test]
fn shipped_units_keep_machines_alive() {
    let dist = Path::new(env!("CARGO_MANIFEST_DIR")).join("../broker/dist");
    let unit = |name: &str| fs::read_to_string(dist.join(name)).unwrap();
    let service = unit("bulkhead.service");
    for line in [
        "KillMode=process",
        "Delegate=yes",
        "Restart=always",
        "Type=notify",
        // For passt, and to put interfaces into bridges.
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "CapabilityBoundingSet=CAP_NET_ADMIN CAP_NET_BIND_SERVICE",
    ] {
        assert!(service.lines().any(|l| l == line), "no {line}");
    }
    // Stopped before the broker, which is what it talks to.
    let shutdown = unit("bulkhead-shutdown.service");
    assert!(shutdown.lines().any(|l| l == "After=bulkhead.service"));
    assert!(shutdown.contains("ExecStop=") && shutdown.contains("bulkhead shutdown-host"));
}
