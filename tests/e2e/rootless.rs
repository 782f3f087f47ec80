//! A user without any right of root runs a machine, with every wall that root's machines have.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, Machine};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A user that no distribution gives to anybody.
const USER: u32 = 60_606;
const KINDS: [&str; 6] = ["vcpu", "legacy", "console", "rng", "blk", "vsock"];
const NAMESPACES: [&str; 7] = ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"];

fn status<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in\n{text}")).trim()
}

fn with_disk() -> (tempfile::NamedTempFile, String) {
    let disk = bulkhead_tests::disk(16 << 20);
    let path = disk.path().to_str().unwrap().to_owned();
    if nix::unistd::geteuid().is_root() {
        bulkhead_tests::tool("chown", &[&USER.to_string(), &path]);
    }
    (disk, path)
}

#[test]
fn guest_of_a_user_writes_and_verifies_its_disk() {
    let (_disk, path) = with_disk();
    let machine = Machine::run_as(USER, &["--cmdline", "mode=blk", "--disk", &path]);
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("blk.verify result=ok"), "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

#[test]
fn processes_of_a_user_have_every_wall() {
    let (_disk, path) = with_disk();
    let mut machine = Machine::run_as(
        USER,
        &["--cmdline", "mode=idle", "--vsock", "--disk", &path],
    );
    machine.expect("BH idle ");
    let broker = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap();
    let user = status(&broker, "Uid").to_owned();
    assert!(
        user.split_whitespace().all(|id| id != "0"),
        "the broker is {user}"
    );
    assert_eq!(status(&broker, "CapEff"), "0000000000000000");
    let mut seen: Vec<BTreeSet<String>> = vec![BTreeSet::new(); NAMESPACES.len()];
    for kind in KINDS {
        let pid = machine.process(kind);
        let proc_dir = format!("/proc/{pid}");
        let text = fs::read_to_string(format!("{proc_dir}/status")).unwrap();
        assert_eq!(status(&text, "Uid"), user, "{kind}");
        assert_eq!(status(&text, "NoNewPrivs"), "1", "{kind}");
        assert_eq!(status(&text, "Seccomp"), "2", "{kind}");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(&text, set), "0000000000000000", "{kind} {set}");
        }
        let inside = status(&text, "NSpid").split_whitespace().last();
        assert_eq!(inside, Some("1"), "{kind}");
        if !nix::unistd::geteuid().is_root() {
            // The kernel shows the rest of a non-dumpable process to root alone.
            continue;
        }
        for (name, seen) in NAMESPACES.iter().zip(&mut seen) {
            let link = |path: &str| fs::read_link(path).unwrap().display().to_string();
            let own = link(&format!("{proc_dir}/ns/{name}"));
            assert_ne!(
                own,
                link(&format!("/proc/self/ns/{name}")),
                "{kind}: {name}"
            );
            assert!(seen.insert(own), "{kind} shares its {name} namespace");
        }
        let root = Path::new(&proc_dir).join("root");
        assert_eq!(
            fs::read_dir(root).unwrap().count(),
            0,
            "{kind}: its root is not empty"
        );
        let map = fs::read_to_string(format!("{proc_dir}/uid_map")).unwrap();
        assert_eq!(map.split_whitespace().last(), Some("1"), "{kind}: {map}");
    }
    machine.signal(Signal::SIGINT);
    assert_eq!(machine.wait().code, 130);
}

#[test]
fn daemon_of_a_user_is_killed_and_its_machine_goes_on() {
    let (_disk, path) = with_disk();
    let mut daemon = Daemon::start_as(USER);
    let load = "mode=beside seconds=6 qd=16 timeout=60";
    // The programs' own guest: the tests' may be where that user cannot look.
    let guest = daemon.programs().join("bulkhead-guest.elf");
    let guest = guest.to_str().unwrap();
    let create = ["create", "--name=web", "--kernel", guest, "-m", "64MiB"];
    let more = ["--cmdline", load, "--vsock", "--disk", &path];
    daemon.good(&[&create[..], &more].concat());
    daemon.good(&["start", "web"]);
    daemon.until_output("web", "BH beside.round ");
    let pids: Vec<u32> = KINDS.map(|kind| daemon.process("web", kind)).into();
    for pid in pids.iter().chain([&daemon.pid()]) {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert_eq!(status(&text, "CapEff"), "0000000000000000");
        assert_ne!(status(&text, "Uid").split_whitespace().next(), Some("0"));
    }
    // Nothing is shown that the kernel does not tell this user.
    let shown = daemon.good(&["inspect", "web", "--authority"]);
    assert!(shown.contains("not measurable here"), "{shown}");

    daemon.end(Signal::SIGKILL);
    daemon.serve();
    assert_eq!(KINDS.map(|kind| daemon.process("web", kind)), *pids);
    let ended = daemon.run(&["wait", "web"]);
    assert_eq!(ended.code, 0, "{ended:?}\n{}", daemon.log());
    let console = daemon.good(&["logs", "web", "--console"]);
    assert!(console.contains("BH done errors=0"), "{console}");
}
