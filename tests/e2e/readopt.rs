//! The daemon is expendable: it can be killed at any moment, and the next one has every machine that
//! the last one had. No guest notices, and nothing is left half done.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has seen"
)]

use bulkhead_tests::prng::Prng;
use bulkhead_tests::{Daemon, disk, is_alive, kill};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until something is so.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn code_of(mut child: Child) -> Option<i32> {
    let mut code = None;
    until("it does not end", || match child.try_wait().unwrap() {
        Some(status) => {
            code = Some(status.code());
            true
        }
        None => false,
    });
    code.unwrap()
}

/// Whether a disk can be written by somebody new.
fn is_free(disk: &Path) -> bool {
    let file = File::options().read(true).write(true).open(disk).unwrap();
    let mut asked = libc::flock {
        l_type: i16::try_from(libc::F_WRLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut asked)).unwrap();
    i32::from(asked.l_type) == libc::F_UNLCK
}

/// The control groups of machine `vm` whose processes were `pids` and are gone.
fn empty_groups(vm: &str, pids: &[u32]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut places = vec![PathBuf::from("/sys/fs/cgroup")];
    while let Some(place) = places.pop() {
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if !path.is_dir() {
                continue;
            }
            let name = name.to_str().unwrap_or_default();
            let is_of = |pid: &u32| name.ends_with(&format!("-{pid}"));
            let of_vm = name.starts_with(&format!("{vm}-")) && pids.iter().any(is_of);
            let processes = fs::read_to_string(path.join("cgroup.procs"));
            if of_vm && processes.is_ok_and(|text| text.is_empty()) {
                found.push(path.clone());
            }
            places.push(path);
        }
    }
    found
}

/// After whatever was done to its broker a machine is running and complete, or stopped and nothing is
/// left of it. `before` are the processes of the broker that was killed.
fn whole_or_gone(daemon: &Daemon, vm: &str, disk: &Path, before: &[u32]) -> &'static str {
    until(&format!("{vm} comes to no end\n{}", daemon.log()), || {
        matches!(daemon.state_of(vm).as_str(), "running" | "stopped")
    });
    let about = daemon.inspect(vm);
    let running = about["state"] == "running";
    let processes: Vec<u32> = about["processes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| u32::try_from(p["pid"].as_u64().unwrap()).unwrap())
        .collect();
    let expected = if running { 5 } else { 0 };
    assert_eq!(processes.len(), expected, "{about}\n{}", daemon.log());
    assert_eq!(about["degraded"].as_array().unwrap().len(), 0, "{about}");
    assert!(processes.iter().all(|pid| is_alive(*pid)), "{about}");
    until(&format!("processes are left: {before:?}, {about}"), || {
        let mut left = before.iter().filter(|pid| is_alive(**pid));
        left.all(|pid| processes.contains(pid))
    });
    if running {
        daemon.until_output(vm, "BH idle");
        return "running";
    }
    let home = daemon.runtime().join("vms").join(vm);
    until(&format!("{} is left", home.display()), || !home.exists());
    until("its disk is in use", || is_free(disk));
    until("control groups are left", || {
        empty_groups(vm, before).is_empty()
    });
    "stopped"
}

#[test]
fn daemon_is_killed_twenty_times_under_load_and_the_guest_sees_nothing() {
    const KILLS: usize = 20;
    let mut daemon = Daemon::start();
    let disk = disk(8 << 20);
    let load = "mode=beside seconds=20 qd=16 timeout=60";
    let path = disk.path().to_str().unwrap();
    daemon.create_and_start("web", load, &["--disk", path]);
    daemon.until_output("web", "BH beside.round");
    let processes = daemon.pids();
    assert_eq!(processes.len(), 5);
    let mut prng = Prng::new(7);
    for n in 0..KILLS {
        daemon.crash();
        daemon.serve();
        assert_eq!(daemon.pids(), processes, "{}", daemon.log());
        let log = daemon.events_of("web");
        let over = log.iter().filter(|event| *event == "taken_over").count();
        assert_eq!(over, n + 1, "{log:?}");
        assert_eq!(daemon.state_of("web"), "running");
        std::thread::sleep(Duration::from_millis(prng.below(300)));
    }
    let output = daemon.output_of("web");
    assert!(!output.contains("BH beside.end"), "too late: {output}");
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    let output = daemon.output_of("web");
    assert!(output.contains("BH done errors=0"), "{output}");
    assert_eq!(output.matches("BH hello ").count(), 1, "the same guest");
    let about = daemon.inspect("web");
    assert_eq!(about["last_run"]["ending"], "powered_off", "{about}");
    assert_eq!(
        whole_or_gone(&daemon, "web", disk.path(), &processes),
        "stopped"
    );
}

#[test]
fn start_that_is_interrupted_at_any_moment_is_finished_or_undone() {
    const ROUNDS: u64 = 25;
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    let vm = format!("half-{}", std::process::id());
    daemon.create(&vm, "mode=idle", &["--disk", disk.path().to_str().unwrap()]);
    let began = Instant::now();
    daemon.good(&["start", &vm]);
    let whole_ms = u64::try_from(began.elapsed().as_millis()).unwrap();
    daemon.good(&["kill", &vm]);
    let mut prng = Prng::new(3);
    let mut phases = Vec::new();
    for n in 0..ROUNDS {
        let starting = daemon.begin(&["start", &vm]);
        std::thread::sleep(Duration::from_micros(prng.below(whole_ms * 1200)));
        let record = daemon.runtime().join("vms").join(&vm).join("record");
        let children = daemon.crash();
        let record = fs::read_to_string(record).unwrap_or_default();
        let phase = ["starting", "running"];
        let phase = phase
            .iter()
            .find(|p| record.contains(&format!("\"phase\":\"{p}\"")));
        phases.push(phase.copied().unwrap_or("before"));
        code_of(starting);
        daemon.serve();
        let state = whole_or_gone(&daemon, &vm, disk.path(), &children);
        let begun = phase.is_some();
        assert!(!begun || state == "running", "{n}: {phase:?} is {state}");
        daemon.good(&["kill", &vm]);
        let none = whole_or_gone(&daemon, &vm, disk.path(), &children);
        assert_eq!(none, "stopped");
    }
    println!("killed while: {phases:?}");
    assert!(phases.contains(&"starting"), "{phases:?}");
}

#[test]
fn end_that_is_interrupted_at_any_moment_is_finished_or_undone() {
    const ROUNDS: u64 = 12;
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    let vm = format!("end-{}", std::process::id());
    daemon.create(&vm, "mode=idle", &["--disk", disk.path().to_str().unwrap()]);
    let mut prng = Prng::new(5);
    let mut states = Vec::new();
    for _ in 0..ROUNDS {
        daemon.good(&["start", &vm]);
        let ending = daemon.begin(&["kill", &vm]);
        std::thread::sleep(Duration::from_micros(prng.below(60_000)));
        let children = daemon.crash();
        code_of(ending);
        daemon.serve();
        // What was not asked for yet is not done; what was is done to its end.
        if daemon.inspect(&vm)["desired"] == "stopped" {
            daemon.until_state(&vm, "stopped");
        }
        states.push(whole_or_gone(&daemon, &vm, disk.path(), &children));
        if states.last() == Some(&"stopped") {
            let about = daemon.inspect(&vm);
            assert_eq!(about["last_run"]["ending"], "killed", "{about}");
        }
        daemon.good(&["kill", &vm]);
    }
    println!("{states:?}");
    assert!(states.contains(&"stopped"), "{states:?}");
}

#[test]
fn creation_and_removal_that_are_interrupted_leave_all_or_nothing() {
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let guest = guest.to_str().unwrap();
    let mut prng = Prng::new(11);
    for n in 0..10 {
        let vm = format!("web{n}");
        let making = ["create", "--name", &vm, "--kernel", guest];
        let more = [
            "-m",
            "64MiB",
            "--cmdline",
            "mode=idle",
            "--disk",
            disk.path().to_str().unwrap(),
        ];
        let child = daemon.begin(&[&making[..], &more].concat());
        std::thread::sleep(Duration::from_micros(prng.below(30_000)));
        daemon.crash();
        code_of(child);
        daemon.serve();
        if daemon.run(&["inspect", &vm]).code != 0 {
            daemon.good(&[&making[..], &more].concat());
        }
        daemon.good(&["start", &vm]);
        daemon.good(&["kill", &vm]);
        let child = daemon.begin(&["rm", &vm]);
        std::thread::sleep(Duration::from_micros(prng.below(30_000)));
        daemon.crash();
        code_of(child);
        daemon.serve();
        let state = daemon.state().join("vms").join(&vm);
        let there = daemon.run(&["inspect", &vm]).code == 0;
        assert_eq!(state.join("events.jsonl").exists(), there, "{vm}");
        if there {
            // It is as it was.
            assert!(daemon.events_of(&vm).iter().any(|event| event == "ended"));
            daemon.good(&["rm", &vm]);
        }
        assert!(!state.exists());
        let removed = fs::read_dir(daemon.state().join("removed"));
        assert_eq!(removed.map_or(0, Iterator::count), 0);
    }
}

#[test]
fn device_that_died_while_no_broker_was_there_is_replaced() {
    let mut daemon = Daemon::start();
    let disk = disk(8 << 20);
    let load = "mode=beside seconds=15 qd=16 timeout=60";
    daemon.create_and_start("web", load, &["--disk", disk.path().to_str().unwrap()]);
    daemon.until_output("web", "BH beside.round");
    let vcpu = daemon.process("web", "vcpu");
    for kind in ["blk", "console", "rng", "legacy", "blk"] {
        let victim = daemon.process("web", kind);
        daemon.crash();
        kill(victim);
        until("it does not die", || !is_alive(victim));
        daemon.serve();
        let about = || daemon.inspect("web");
        until("it is not replaced", || {
            let processes = about()["processes"].as_array().cloned().unwrap();
            let of = |p: &&serde_json::Value| p["kind"] == kind && p["locked"] == true;
            processes
                .iter()
                .find(of)
                .is_some_and(|p| p["pid"] != victim)
        });
        until("it is not told", || {
            daemon
                .events_of("web")
                .last()
                .is_some_and(|e| e == "device_restarted")
        });
    }
    assert_eq!(daemon.process("web", "vcpu"), vcpu);
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    let output = daemon.output_of("web");
    assert!(output.contains("BH done errors=0"), "{output}");
}

#[test]
fn replacement_that_is_interrupted_at_any_moment_is_finished() {
    const ROUNDS: usize = 15;
    let mut daemon = Daemon::start();
    let disk = disk(8 << 20);
    let load = "mode=beside seconds=25 qd=16 timeout=60";
    daemon.create_and_start("web", load, &["--disk", disk.path().to_str().unwrap()]);
    daemon.until_output("web", "BH beside.round");
    let mut prng = Prng::new(13);
    for _ in 0..ROUNDS {
        let victim = daemon.process("web", "blk");
        kill(victim);
        std::thread::sleep(Duration::from_micros(prng.below(15_000)));
        daemon.crash();
        daemon.serve();
        until("its disk is not served", || {
            let about = daemon.inspect("web");
            assert_eq!(about["degraded"].as_array().unwrap().len(), 0, "{about}");
            let blk = about["processes"].as_array().unwrap().iter();
            let blk = blk.clone().find(|p| p["kind"] == "blk");
            blk.is_some_and(|p| p["pid"] != victim && p["locked"] == true)
        });
    }
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    let output = daemon.output_of("web");
    assert!(output.contains("BH done errors=0"), "{output}");
}

#[test]
fn machine_whose_processes_all_died_has_ended_and_is_started_again_if_it_is_to_be() {
    let mut daemon = Daemon::start();
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let vms = [("once", "destroy"), ("again", "restart")];
    for (name, on_crash) in vms {
        let file = daemon.scratch().join(format!("{name}.toml"));
        let text = format!(
            "[machine]\nmemory = \"32MiB\"\n[boot]\nkernel = {guest:?}\ncmdline = \"mode=idle\"\n\
             [lifecycle]\non_crash = \"{on_crash}\"\n"
        );
        fs::write(&file, text).unwrap();
        daemon.good(&["create", file.to_str().unwrap()]);
        daemon.good(&["start", name]);
        daemon.until_output(name, "BH idle");
    }
    let before = daemon.pids();
    daemon.crash();
    before.iter().copied().for_each(kill);
    until("they live", || !before.iter().any(|pid| is_alive(*pid)));
    daemon.serve();
    daemon.until_state("once", "stopped");
    let about = daemon.inspect("once");
    assert_eq!(about["last_run"]["exit_code"], 14, "{about}");
    assert_eq!(daemon.run(&["wait", "once"]).code, 14);
    assert!(!daemon.runtime().join("vms/once").exists());
    daemon.until_state("again", "running");
    until("it does not come up", || {
        daemon.output_of("again").matches("BH idle").count() == 2
    });
}

#[test]
fn machine_that_ran_when_the_host_went_down_has_ended_with_it() {
    let mut daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    let before = daemon.pids();
    daemon.crash();
    before.iter().copied().for_each(kill);
    until("they live", || !before.iter().any(|pid| is_alive(*pid)));
    fs::remove_dir_all(daemon.runtime()).unwrap();
    for _ in 0..2 {
        daemon.serve();
        let about = daemon.inspect("web");
        assert_eq!(about["state"], "stopped", "{about}");
        assert_eq!(about["desired"], "stopped", "{about}");
        assert_eq!(about["last_run"]["exit_code"], 14, "{about}");
        daemon.end(Signal::SIGTERM);
    }
}

#[test]
fn end_that_nobody_heard_of_is_recorded() {
    let mut daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle seconds=2", &[]);
    daemon.until_output("web", "BH idle");
    daemon.crash();
    std::thread::sleep(Duration::from_secs(4));
    daemon.serve();
    daemon.until_state("web", "stopped");
    let about = daemon.inspect("web");
    assert_eq!(about["last_run"]["ending"], "powered_off", "{about}");
    assert_eq!(about["desired"], "stopped", "{about}");
    assert_eq!(about["processes"].as_array().unwrap().len(), 0);
}

#[test]
fn paused_machine_stays_paused_and_its_console_and_log_go_on() {
    let mut daemon = Daemon::start();
    let chat = "mode=console,idle lines=1 count=1 timeout=120";
    daemon.create_and_start("web", chat, &["--console", "virtio"]);
    daemon.good(&["pause", "web"]);
    daemon.crash();
    daemon.serve();
    assert_eq!(daemon.state_of("web"), "paused");
    assert_eq!(
        daemon.inspect("web")["vm_file"]
            .as_str()
            .unwrap()
            .matches("64MiB")
            .count(),
        1
    );
    daemon.good(&["resume", "web"]);
    let mut console = daemon.begin(&["console", "web", "--console", "virtio", "--history"]);
    console
        .stdin
        .as_mut()
        .unwrap()
        .write_all(b"after\n")
        .unwrap();
    daemon.until_output("web", "BH idle");
    daemon.good(&["kill", "web"]);
    let mut seen = String::new();
    console
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut seen)
        .unwrap();
    assert!(
        seen.contains("console line 1 of 1") && seen.contains("echo: after"),
        "{seen}"
    );
    assert_eq!(code_of(console), Some(0));
    let events = daemon.events_of("web");
    let count = |name: &str| events.iter().filter(|event| *event == name).count();
    assert_eq!(
        (count("starting"), count("taken_over"), count("resumed")),
        (1, 1, 1),
        "{events:?}"
    );
}

/// `bulkhead run` in the daemon's directories, until its guest is up.
fn run(daemon: &Daemon, vm: &str, more: &[&str]) -> Child {
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let all = [
        "run",
        "--name",
        vm,
        "--kernel",
        guest.to_str().unwrap(),
        "-m",
        "64MiB",
    ];
    let child = daemon.begin(&[&all[..], &["--cmdline", "mode=button"], more].concat());
    let record = daemon.runtime().join("vms").join(vm).join("record");
    until("it does not run", || {
        fs::read_to_string(&record).is_ok_and(|text| text.contains("\"phase\":\"running\""))
    });
    child
}

#[test]
fn machine_of_run_is_listed_and_obeys_once_its_broker_is_dead() {
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    let mut broker = run(&daemon, "web", &["--disk", disk.path().to_str().unwrap()]);
    assert!(!daemon.good(&["list"]).contains("web"), "it has a broker");
    broker.kill().unwrap();
    broker.wait().unwrap();
    let list = daemon.json(&["list"]);
    assert_eq!(list[0]["name"], "web", "{list}");
    assert_eq!(list[0]["state"], "running", "{list}");
    let mut console = daemon.begin(&["console", "web", "--history"]);
    daemon.until_output("web", "BH button.ready");
    let waiting = daemon.begin(&["wait", "web"]);
    // Another broker's death changes nothing.
    let processes = daemon.pids();
    assert_eq!(processes.len(), 5);
    daemon.crash();
    code_of(waiting);
    daemon.serve();
    assert_eq!(daemon.pids(), processes);
    let waiting = daemon.begin(&["wait", "web"]);
    daemon.good(&["stop", "web"]);
    assert_eq!(code_of(waiting), Some(0));
    assert_eq!(
        whole_or_gone(&daemon, "web", disk.path(), &processes),
        "stopped"
    );
    assert_eq!(daemon.inspect("web")["last_run"]["ending"], "powered_off");
    let mut seen = String::new();
    console
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut seen)
        .unwrap();
    assert!(seen.contains("BH button.ready"), "{seen}");
    console.wait().unwrap();
    // From now on it is a machine like any other.
    daemon.good(&["start", "web"]);
    daemon.good(&["kill", "web"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 12);
    daemon.good(&["rm", "web"]);
    assert_eq!(daemon.json(&["list"]).as_array().unwrap().len(), 0);
}

#[test]
fn machine_of_run_has_its_name_to_itself_with_and_without_its_broker() {
    let daemon = Daemon::start();
    let mut broker = run(&daemon, "web", &[]);
    daemon.create("web", "mode=idle", &[]);
    let owner = format!("process {} is its broker", broker.id());
    daemon.fails(&["start", "web"], 2, &owner);
    daemon.fails(&["rm", "web"], 6, &owner);
    broker.kill().unwrap();
    broker.wait().unwrap();
    daemon.good(&["list"]);
    assert_eq!(daemon.state_of("web"), "running");
    daemon.until_output("web", "BH button.ready");
    daemon.good(&["stop", "web"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    // The name is the registry's machine's again.
    daemon.good(&["start", "web"]);
    daemon.until_output("web", "BH idle");
    daemon.good(&["kill", "web"]);
    daemon.good(&["rm", "web"]);
}

#[test]
fn nobody_takes_what_a_daemon_owns() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    let owner = format!("process {} is its broker", daemon.pid());
    daemon.fails(&["run", "--name", "web"], 2, &owner);
    daemon.fails(&["serve"], 6, "in use by another");
    assert_eq!(daemon.state_of("web"), "running");
}

#[test]
fn machine_that_cannot_be_taken_over_is_told_of_tried_again_and_can_be_killed() {
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    daemon.create_and_start(
        "web",
        "mode=idle",
        &["--disk", disk.path().to_str().unwrap()],
    );
    daemon.until_output("web", "BH idle");
    let processes = daemon.pids();
    let ring = daemon.state().join("vms/web/serial.ring");
    let aside = ring.with_extension("aside");
    daemon.crash();
    fs::rename(&ring, &aside).unwrap();
    daemon.serve();
    let about = daemon.inspect("web");
    assert_eq!(about["degraded"][0]["device"], "broker", "{about}");
    daemon.fails(&["pause", "web"], 6, "cannot be taken over");
    daemon.fails(&["rm", "web"], 6, "is running");
    fs::rename(&aside, &ring).unwrap();
    until("it is not tried again", || {
        daemon.inspect("web")["degraded"]
            .as_array()
            .unwrap()
            .is_empty()
    });
    assert_eq!(daemon.pids(), processes);
    daemon.crash();
    fs::rename(&ring, &aside).unwrap();
    daemon.serve();
    daemon.good(&["kill", "web"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 12);
    assert_eq!(
        whole_or_gone(&daemon, "web", disk.path(), &processes),
        "stopped"
    );
}

#[test]
fn daemon_that_ends_in_order_leaves_its_machines_to_the_next_one_too() {
    let mut daemon = Daemon::start();
    let disk = disk(4 << 20);
    let path = disk.path().to_str().unwrap();
    daemon.create_and_start("web", "mode=idle", &["--disk", path]);
    let (processes, devices) = (daemon.pids(), daemon.json(&["device", "list", "web"]));
    assert_eq!(daemon.end(Signal::SIGTERM), Some(0));
    daemon.serve();
    assert_eq!(daemon.pids(), processes);
    assert_eq!(daemon.json(&["device", "list", "web"]), devices);
    daemon.good(&["device", "restart", "web/disk0"]);
    assert_ne!(daemon.pids(), processes);
    daemon.good(&["kill", "web"]);
}
