//! `bulkhead serve` and its verbs: machines in the background, as a user meets them.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead::launch::users::UserRange;
use bulkhead_tests::{Daemon, is_alive};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::time::{Duration, Instant};

#[test]
fn machine_lives_through_every_verb() {
    let daemon = Daemon::start();
    daemon.create("web", "mode=button,button", &[]);
    let made = daemon.inspect("web");
    assert_eq!(
        (&made["state"], &made["desired"]),
        (&"stopped".into(), &"stopped".into())
    );
    assert!(made["vm_file"].as_str().unwrap().contains("64MiB"));
    daemon.good(&["start", "web"]);
    daemon.until_output("web", "button.ready");
    let pids = daemon.pids();
    assert_eq!(pids.len(), 4, "vcpu, legacy, console, rng");

    daemon.good(&["pause", "web"]);
    assert_eq!(daemon.state_of("web"), "paused");
    daemon.fails(&["stop", "web"], 6, "is paused");
    daemon.good(&["resume", "web"]);
    daemon.good(&["reset", "web"]);
    assert_eq!(daemon.inspect("web")["restarts"], 1);
    assert!(pids.iter().all(|pid| !is_alive(*pid)), "new processes");

    daemon.until_output("web", "button.ready");
    let id = daemon.inspect("web")["id"].clone();
    daemon.good(&["restart", "web", "--timeout", "100ms", "--force"]);
    assert_eq!(daemon.inspect("web")["id"], id);
    daemon.until_output("web", "button.ready");
    let stats = daemon.json(&["stats", "web"]);
    assert!(stats["cpu_time_us"].as_u64().unwrap() > 0, "{stats}");
    assert!(stats["pss_bytes"].as_u64().unwrap() > 1 << 20, "{stats}");
    assert_eq!(stats["processes"].as_array().unwrap().len(), 4);

    daemon.good(&["kill", "web"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 12);
    let list = daemon.good(&["ps"]);
    assert!(list.contains("web") && list.contains("killed"), "{list}");
    let events = daemon.events_of("web");
    for event in [
        "starting",
        "process_locked",
        "running",
        "paused",
        "resumed",
        "restarting",
        "ended",
    ] {
        assert!(
            events.iter().any(|e| e == event),
            "no {event} in {events:?}"
        );
    }
    daemon.good(&["rm", "web"]);
    daemon.fails(&["inspect", "web"], 2, "there is no machine web");
    assert!(!daemon.state().join("vms/web").exists());
}

/// The user of a living process, by the kernel.
fn user_of(pid: u32) -> u32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ids = text
        .lines()
        .find_map(|line| line.strip_prefix("Uid:"))
        .unwrap();
    let ids: Vec<u32> = ids
        .split_whitespace()
        .map(|id| id.parse().unwrap())
        .collect();
    assert_eq!(ids, [ids[0]; 4], "{pid}");
    ids[0]
}

#[test]
fn users_are_those_of_the_daemon_that_starts_a_process() {
    let (first, second) = ("300000000-304194303", "400000000-404194303");
    let config = |users: &str| format!("[host]\nusers = \"{users}\"\n");
    let parsed = |users: &str| users.parse::<UserRange>().unwrap();
    if !parsed(first).exists() {
        assert!(
            !nix::unistd::geteuid().is_root(),
            "this host lacks user ids"
        );
        return;
    }
    let mut daemon = Daemon::configured(&config(first));
    daemon.create_and_start("web", "mode=idle", &[]);
    daemon.until_output("web", "BH idle ");
    let before = daemon.pids();
    assert_eq!(before.len(), 4, "vcpu, legacy, console, rng");
    for pid in &before {
        assert_eq!(user_of(*pid), parsed(first).first() + pid);
    }
    let _same = daemon.good(&["inspect", "web", "--authority"]);

    daemon.crash();
    std::fs::write(daemon.scratch().join("etc/bulkhead.toml"), config(second)).unwrap();
    daemon.serve();
    daemon.until_state("web", "running");
    let rng = daemon.process("web", "rng");
    daemon.good(&["device", "restart", "web/rng"]);
    let now = daemon.process("web", "rng");
    assert_ne!(now, rng);
    assert_eq!(user_of(now), parsed(second).first() + now);
    for pid in before.into_iter().filter(|pid| *pid != rng) {
        assert_eq!(user_of(pid), parsed(first).first() + pid, "it is as it was");
    }
    let _same = daemon.good(&["inspect", "web", "--authority"]);

    // What a daemon does not accept it says, and the machine runs on.
    daemon.crash();
    std::fs::write(
        daemon.scratch().join("etc/bulkhead.toml"),
        config("0-5000000"),
    )
    .unwrap();
    let refused = daemon.run(&["serve"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    let told = "line 2: host.users = \"0-5000000\": holds 0, expected a range without 0";
    assert!(refused.errors.contains(told), "{refused:?}");
    assert!(is_alive(now));
}

#[test]
fn power_button_ends_a_guest_that_listens() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=button", &[]);
    daemon.until_output("web", "button.ready");
    let waiting = daemon.begin(&["wait", "web", "--json"]);
    daemon.good(&["shutdown", "web"]);
    let waited = waiting.wait_with_output().unwrap();
    assert_eq!(waited.status.code(), Some(0));
    let waited: Value = serde_json::from_slice(&waited.stdout).unwrap();
    assert_eq!(waited["ending"], "powered_off");
    assert!(daemon.output_of("web").contains("button pressed=1"));
}

#[test]
fn guest_that_ignores_the_power_button_runs_on_unless_forced() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    let pids = daemon.pids();
    daemon.fails(&["stop", "web", "--timeout", "300ms"], 124, "runs on");
    assert_eq!(daemon.state_of("web"), "running");
    assert!(pids.iter().all(|pid| is_alive(*pid)));
    daemon.good(&["stop", "web", "--timeout", "300ms", "--force"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 12);
}

#[test]
fn verbs_take_several_names_and_may_be_repeated() {
    let daemon = Daemon::start();
    for name in ["a", "b"] {
        daemon.create(name, "mode=idle", &[]);
        daemon.create(name, "mode=idle", &[]);
    }
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let other = ["create", "--name", "a", "--kernel", guest.to_str().unwrap()];
    daemon.fails(&other, 6, "there is a machine a already");
    let verbs: [&[&str]; 6] = [
        &["start", "a", "b"],
        &["pause", "a", "b"],
        &["resume", "a", "b"],
        &["kill", "a", "b"],
        &["stop", "a", "b"],
        &["rm", "a", "b"],
    ];
    for verb in verbs {
        let changed = |done: &Value| -> Vec<bool> {
            let all = done.as_array().unwrap().iter();
            all.map(|one| one["changed"].as_bool().unwrap()).collect()
        };
        let first = changed(&daemon.json(verb));
        assert_eq!(first, [verb[0] != "stop"; 2], "{verb:?}");
        assert_eq!(changed(&daemon.json(verb)), [false; 2], "{verb:?} again");
    }
    // What can be done is done, and the exit code tells of the rest.
    daemon.create("a", "mode=idle", &[]);
    daemon.fails(&["start", "nobody", "a"], 2, "there is no machine nobody");
    assert_eq!(daemon.state_of("a"), "running");
    daemon.fails(&["rm", "a"], 6, "is running");
    daemon.good(&["rm", "--force", "a"]);
}

#[test]
fn exit_code_of_wait_tells_how_the_guest_ended() {
    let daemon = Daemon::start();
    let ends = [
        ("off", "mode=hello", 0),
        ("panic", "mode=hello end=panic", 8),
        ("triple", "mode=hello end=triple", 10),
    ];
    for (name, cmdline, _) in ends {
        daemon.create_and_start(name, cmdline, &[]);
    }
    for (name, _, code) in ends {
        assert_eq!(daemon.run(&["wait", name]).code, code, "{name}");
    }
    assert_eq!(
        daemon.run(&["wait", "off", "panic", "triple"]).code,
        8,
        "the first"
    );
    daemon.create("never", "mode=hello", &[]);
    daemon.fails(&["wait", "never"], 6, "has not been started yet");
    daemon.fails(&["wait", "nobody"], 2, "there is no machine");
}

#[test]
fn life_cycle_is_what_the_vm_file_says() {
    let daemon = Daemon::start();
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let create = |name: &str, cmdline: &str, lifecycle: &str| {
        let file = daemon.scratch().join(format!("{name}.toml"));
        let text = format!(
            "[machine]\nmemory = \"32MiB\"\n[boot]\nkernel = {guest:?}\ncmdline = \"{cmdline}\"\n\
             [lifecycle]\n{lifecycle}\n"
        );
        std::fs::write(&file, text).unwrap();
        daemon.good(&["create", file.to_str().unwrap()]);
        daemon.good(&["start", name]);
    };
    create("again", "mode=hello", "on_poweroff = \"restart\"");
    create("kept", "mode=hello end=panic", "on_crash = \"preserve\"");
    create("over", "mode=hello end=reset", "on_reboot = \"destroy\"");
    create("button", "mode=button", "on_poweroff = \"restart\"");
    assert_eq!(daemon.run(&["wait", "over"]).code, 0);
    daemon.until_state("kept", "preserved");
    daemon.fails(&["start", "kept"], 6, "is preserved");
    assert!(is_alive(daemon.process("kept", "vcpu")));
    daemon.good(&["kill", "kept"]);
    assert_eq!(
        daemon.run(&["wait", "kept"]).code,
        8,
        "it ended as it ended"
    );
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.inspect("again")["restarts"].as_u64() < Some(3) {
        assert!(Instant::now() < deadline, "{}", daemon.inspect("again"));
        std::thread::sleep(Duration::from_millis(10));
    }
    // Somebody who stops a machine wants it to stop.
    daemon.until_output("button", "button.ready");
    daemon.good(&["stop", "button"]);
    assert_eq!(daemon.state_of("button"), "stopped");
}

#[test]
fn failed_start_says_why_and_may_be_repeated() {
    let daemon = Daemon::start();
    let disk = daemon.scratch().join("disk.img");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let disk = disk.to_str().unwrap();
    daemon.create("web", "mode=idle", &["--disk", disk]);
    std::fs::rename(disk, format!("{disk}.away")).unwrap();
    daemon.fails(&["start", "web"], 2, "disk.img");
    assert_eq!(daemon.state_of("web"), "stopped");
    std::fs::rename(format!("{disk}.away"), disk).unwrap();
    daemon.good(&["start", "web"]);
    daemon.create("twin", "mode=idle", &["--disk", disk]);
    daemon.fails(&["start", "twin"], 2, "is in use");
}

#[test]
fn guest_memory_is_admitted_against_the_budget() {
    let daemon = Daemon::configured("[host]\nmemory = \"100MiB\"\n[limits]\nmachines = 2\n");
    daemon.create("a", "mode=idle", &[]);
    daemon.create("b", "mode=idle", &[]);
    daemon.good(&["start", "a"]);
    daemon.fails(
        &["start", "b"],
        4,
        "64 MiB does not fit the 36 MiB that are left",
    );
    daemon.good(&["kill", "a"]);
    daemon.good(&["start", "b"]);
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let third = ["create", "--name", "c", "--kernel", guest.to_str().unwrap()];
    daemon.fails(&third, 4, "limits.machines");
}

#[test]
fn registry_survives_the_daemon() {
    let mut daemon = Daemon::start();
    daemon.create("web", "mode=hello", &[]);
    daemon.good(&["start", "web"]);
    assert_eq!(daemon.run(&["wait", "web"]).code, 0);
    let before = daemon.inspect("web");
    assert_eq!(daemon.end(Signal::SIGTERM), Some(0));
    daemon.fails(&["list"], 4, "bulkhead serve");
    daemon.serve();
    assert_eq!(daemon.inspect("web"), before);
    daemon.end(Signal::SIGKILL);
    daemon.serve();
    assert_eq!(daemon.inspect("web"), before);
}

#[test]
fn second_daemon_is_refused() {
    let daemon = Daemon::start();
    let holder = format!("(process {})", daemon.pid());
    daemon.fails(&["serve"], 6, &holder);
    let elsewhere = daemon.scratch().join("elsewhere");
    let elsewhere = elsewhere.to_str().unwrap();
    daemon.fails(
        &["serve", "--runtime-dir", elsewhere],
        6,
        "in use by another",
    );
    daemon.fails(&["serve", "--state-dir", elsewhere], 6, "in use by another");
    daemon.good(&["list"]);
}

#[test]
fn machines_that_start_with_the_host_start_once_with_it() {
    let mut daemon = Daemon::start();
    let file = daemon.scratch().join("auto.toml");
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let text = format!("autostart = true\n[boot]\nkernel = {guest:?}\ncmdline = \"mode=idle\"\n");
    std::fs::write(&file, text).unwrap();
    daemon.good(&["create", file.to_str().unwrap()]);
    assert_eq!(daemon.state_of("auto"), "stopped", "it is only created");
    daemon.end(Signal::SIGTERM);
    daemon.serve();
    assert_eq!(
        daemon.state_of("auto"),
        "stopped",
        "the host has not started"
    );
    daemon.end(Signal::SIGTERM);
    // What a host's start does.
    std::fs::remove_dir_all(daemon.runtime()).unwrap();
    daemon.serve();
    daemon.until_state("auto", "running");
    daemon.good(&["kill", "auto"]);
    daemon.end(Signal::SIGTERM);
    daemon.serve();
    assert_eq!(daemon.state_of("auto"), "stopped", "somebody stopped it");
}

#[test]
fn host_shutdown_ends_machines_as_their_vm_files_say() {
    let mut daemon = Daemon::start();
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    for (name, mode, then) in [
        ("listens", "button", "destroy"),
        ("deaf", "idle", "destroy"),
        ("back", "idle", "restart"),
        ("kept", "idle", "preserve"),
    ] {
        let file = daemon.scratch().join(format!("{name}.toml"));
        let text = format!(
            "[machine]\nmemory = \"32MiB\"\n[boot]\nkernel = {guest:?}\ncmdline = \"mode={mode}\"\n\
             [lifecycle]\non_host_shutdown = \"{then}\"\n"
        );
        std::fs::write(&file, text).unwrap();
        daemon.good(&["create", file.to_str().unwrap()]);
        daemon.good(&["start", name]);
    }
    daemon.until_output("listens", "button.ready");
    let began = Instant::now();
    let ended = daemon.json(&["shutdown-host", "--deadline", "2s"]);
    assert!(began.elapsed() < Duration::from_secs(30));
    let outcome = |name: &str| {
        let all = ended.as_array().unwrap();
        let one = all.iter().find(|vm| vm["name"] == name).unwrap();
        one["outcome"].as_str().unwrap().to_owned()
    };
    assert_eq!(outcome("listens"), "powered_off");
    assert_eq!(outcome("deaf"), "power_cut");
    assert_eq!(outcome("back"), "power_cut");
    assert_eq!(outcome("kept"), "left_running");
    daemon.fails(&["start", "deaf"], 4, "shutting down");
    daemon.good(&["kill", "kept"]);
    daemon.end(Signal::SIGTERM);
    std::fs::remove_dir_all(daemon.runtime()).unwrap();
    daemon.serve();
    daemon.until_state("back", "running");
    for name in ["listens", "deaf", "kept"] {
        assert_eq!(daemon.state_of(name), "stopped", "{name}");
    }
}

#[test]
fn hostile_requests_get_errors_and_harm_nobody() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    let long = "a".repeat(100_000);
    let cases = [
        "\0\0\0\0\0\0".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        format!("GET /{long} HTTP/1.1\r\n\r\n"),
        format!("GET /v1/vms HTTP/1.1\r\nx: {long}\r\n\r\n"),
        format!("GET /v1/vms HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000)),
        "POST /v1/vms HTTP/1.1\r\ncontent-length: 99999999999999999999\r\n\r\n".to_owned(),
        "POST /v1/vms HTTP/1.1\r\ncontent-length: -1\r\n\r\n".to_owned(),
        "POST /v1/vms HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nffffffffffffffff\r\n"
            .to_owned(),
    ];
    for case in cases {
        let answer = daemon.raw(case.as_bytes());
        let status = answer.split(' ').nth(1).unwrap_or_default();
        let refused = answer.is_empty() || status.starts_with('4') || status.starts_with('5');
        let head: String = case.chars().take(60).collect();
        assert!(refused, "{head:?}: {answer}");
    }
    let typed = [
        ("GET /v1/nothing", "not_found"),
        ("PUT /v1/vms", "bad_request"),
        ("GET /v1/vms/..%2f..%2fetc", "not_found"),
        ("GET /v1/vms/%ff", "bad_request"),
        ("GET /v1/vms/web/console?console=serial", "bad_request"),
        ("GET /v1/vms/web/events?follow=perhaps", "bad_request"),
        ("POST /v1/vms", "bad_request"),
    ];
    for (line, code) in typed {
        let answer = daemon.raw(format!("{line} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes());
        let (_, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
        let error: Value =
            serde_json::from_str(body).unwrap_or_else(|e| panic!("{line}: {e}: {answer}"));
        assert_eq!(error["code"], code, "{line}: {error}");
        assert_eq!(error["schema_version"], 1);
    }
    let huge = format!("{{\"vm_file\": \"{}\"}}", "x".repeat(5 << 20));
    let head = format!(
        "POST /v1/vms HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n",
        huge.len()
    );
    let answer = daemon.raw((head + &huge).as_bytes());
    assert!(
        answer.is_empty() || answer.contains("larger than"),
        "{answer}"
    );
    assert_eq!(daemon.state_of("web"), "running");
}
