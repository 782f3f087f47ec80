//! Every system call that a policy does not grant is denied in the living process, and reported: the
//! filters that the kernel has decide each call that is generated from the policies as these say, and
//! real calls end the process and are told by name, arguments and line of the policy.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has tried"
)]

use bulkhead::authority::filters;
use bulkhead_ipc::host::host_needs_quirks;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::denied::Attempt;
use bulkhead_policies::evaluate::{RET_ALLOW, RET_TRAP, action};
use bulkhead_policies::explain::{self, Denied};
use bulkhead_policies::grant::STARTUP;
use bulkhead_policies::load;
use bulkhead_policies::plan::Policy;
use bulkhead_tests::network::Network;
use bulkhead_tests::prng::Prng;
use bulkhead_tests::{Daemon, Fate, Intruder, Machine};
use std::path::Path;
use std::time::{Duration, Instant};

/// The kinds of process of the machines here.
const KINDS: [ProcKind; 6] = [
    ProcKind::Vcpu,
    ProcKind::Legacy,
    ProcKind::Console,
    ProcKind::Blk,
    ProcKind::Rng,
    ProcKind::Net,
];
/// Exit code of a process whose system call was not granted.
const DENIED: i32 = 159;

fn machine(disk: &tempfile::NamedTempFile) -> Machine {
    let _network = Network::enter().unwrap();
    let path = disk.path().to_str().unwrap();
    let folder = format!("{},readonly", env!("CARGO_MANIFEST_DIR"));
    let more = [
        "--vsock", "--disk", path, "--share", &folder, "--net", "tap=tap0",
    ];
    let mut machine = Machine::test_guest("mode=idle", &more);
    machine.expect("BH idle ");
    machine
}

/// The threads of `policy` that there are on this host.
fn threads(policy: &Policy) -> Vec<String> {
    let quirks = host_needs_quirks(Path::new("/sys"));
    let absent = if quirks { "vcpu" } else { "vcpu-quirks" };
    let names = policy.locked.iter().map(|thread| thread.name.clone());
    names.filter(|name| name != absent).collect()
}

#[test]
fn filters_of_living_processes_decide_every_call_as_the_policies_say() {
    let disk = bulkhead_tests::disk(1 << 20);
    let machine = machine(&disk);
    let mut decided = 0;
    for kind in KINDS {
        let policy = load(kind, None, false).unwrap();
        let pid = i32::try_from(machine.process(kind.name())).unwrap();
        let measured = filters::measure(pid).unwrap();
        let mut seen = Vec::new();
        for thread in measured.iter().filter(|thread| !thread.is_kernel_worker) {
            let name = if thread.tid == pid {
                "main"
            } else {
                &thread.name
            };
            seen.push(name.to_owned());
            // Needs root, as all tests of what is measured do.
            let [startup, locked] = &thread.programs.as_ref().unwrap()[..] else {
                panic!("{kind} {name} has {} filters", thread.filters);
            };
            for (phase, filter) in [(STARTUP, startup), (name, locked)] {
                for attempt in policy.attempts(phase) {
                    let permits = policy.permits(phase, attempt.number, &attempt.args);
                    let expected = if permits { RET_ALLOW } else { RET_TRAP };
                    let found = action(filter, &attempt).unwrap();
                    assert_eq!(found, expected, "{kind} {phase} {attempt:?}");
                    decided += 1;
                }
            }
        }
        seen.sort();
        let mut expected = threads(&policy);
        expected.sort();
        assert_eq!(seen, expected, "{kind}");
    }
    println!("{decided} calls are decided as the policies say");
}

/// One call that some thread may not make.
#[derive(Debug, Clone)]
struct Forbidden {
    kind: ProcKind,
    thread: String,
    attempt: Attempt,
}

fn everything() -> Vec<Forbidden> {
    let mut all = Vec::new();
    for kind in KINDS {
        let policy = load(kind, None, false).unwrap();
        for thread in threads(&policy) {
            let stopped = policy.stopped(&thread).into_iter();
            all.extend(stopped.map(|attempt| Forbidden {
                kind,
                thread: thread.clone(),
                attempt,
            }));
        }
    }
    all
}

/// What a default run tries; `--slow` tries all.
const SAMPLE: usize = 24;

fn chosen(mut all: Vec<Forbidden>) -> Vec<Forbidden> {
    if bulkhead_tests::slow() {
        return all;
    }
    let given = std::env::var("BULKHEAD_DENIALS_SEED").ok();
    let seed = given.and_then(|seed| seed.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
        u64::try_from(now.as_nanos() & u128::from(u32::MAX)).unwrap()
    });
    let count = all.len();
    println!("BULKHEAD_DENIALS_SEED={seed} tries the same {SAMPLE} of {count} calls again");
    let mut random = Prng::new(seed);
    let mut chosen = Vec::new();
    while chosen.len() < SAMPLE && !all.is_empty() {
        let at = random.below(u64::try_from(all.len()).unwrap());
        chosen.push(all.swap_remove(usize::try_from(at).unwrap()));
    }
    // Calls of one kind share machines.
    chosen.sort_by_key(|forbidden| forbidden.kind);
    chosen
}

/// Has a thread of the machine make the call, and compares what is told with what the policy says.
fn is_stopped_and_told(machine: &Machine, forbidden: &Forbidden) {
    let Forbidden {
        kind,
        thread,
        attempt,
    } = forbidden;
    let name = (thread != "main").then_some(thread.as_str());
    let before = machine.errors().len();
    let mut intruder = Intruder::enter(machine.process(kind.name()), name);
    let fate = intruder.call(attempt.number.into(), attempt.args);
    assert_eq!(fate, Fate::Stopped { code: DENIED }, "{forbidden:?}");
    drop(intruder);
    let denied = Denied {
        thread: Some(thread),
        number: attempt.number,
        args: attempt.args,
    };
    let told = explain::denial(*kind, None, &denied, &|_| None)
        .unwrap()
        .to_string();
    machine.expect_error(&told);
    let errors = machine.errors();
    assert!(errors[before..].contains(&told), "{forbidden:?}: {errors}");
}

#[test]
fn switch_is_stopped_told_and_replaced() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    daemon.create_and_start("web", "mode=idle", &["--net", "network=lab"]);
    daemon.until_output("web", "BH idle");
    let policy = load(ProcKind::Switch, None, false).unwrap();
    let switch = |before: u64| {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let shown = daemon.json(&["network", "show", "lab"]);
            match (shown["state"].as_str(), shown["pid"].as_u64()) {
                (Some("serving"), Some(pid)) if pid != before => return pid,
                _ => assert!(Instant::now() < deadline, "{shown}: {}", daemon.log()),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let pid = i32::try_from(switch(0)).unwrap();
    let measured = filters::measure(pid).unwrap();
    let [startup, locked] = &measured[0].programs.as_ref().unwrap()[..] else {
        panic!("it has {} filters", measured[0].filters);
    };
    for (phase, filter) in [(STARTUP, startup), ("main", locked)] {
        for attempt in policy.attempts(phase) {
            let permits = policy.permits(phase, attempt.number, &attempt.args);
            let expected = if permits { RET_ALLOW } else { RET_TRAP };
            assert_eq!(
                action(filter, &attempt).unwrap(),
                expected,
                "{phase} {attempt:?}"
            );
        }
    }
    let mut before = 0;
    for name in [
        "socket",
        "openat",
        "execve",
        "mprotect",
        "ioctl",
        "pidfd_getfd",
    ] {
        let stopped = policy.stopped("main");
        let number = bulkhead_policies::syscalls::number(name).unwrap();
        let attempt = stopped.iter().find(|attempt| attempt.number == number);
        let attempt = attempt.unwrap_or_else(|| panic!("{name} is permitted"));
        before = switch(before);
        let mut intruder = Intruder::enter(u32::try_from(before).unwrap(), None);
        let fate = intruder.call(attempt.number.into(), attempt.args);
        assert_eq!(fate, Fate::Stopped { code: DENIED }, "{name}");
        drop(intruder);
        let denied = Denied {
            thread: Some("main"),
            number: attempt.number,
            args: attempt.args,
        };
        let told = explain::denial(ProcKind::Switch, None, &denied, &|_| None);
        let told = told.unwrap().to_string();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !daemon.log().contains(&told) {
            assert!(Instant::now() < deadline, "{told}: {}", daemon.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let _next = switch(before);
    assert_eq!(daemon.state_of("web"), "running");
}

#[test]
fn inspect_tells_a_denial_as_the_log_does() {
    let daemon = Daemon::start();
    daemon.create_and_start("web", "mode=idle", &[]);
    daemon.until_output("web", "BH idle");
    assert_eq!(daemon.inspect("web")["denials"], serde_json::json!([]));
    let socket = Attempt {
        number: u32::try_from(libc::SYS_socket).unwrap(),
        args: [2, 1, 0, 0, 0, 0],
    };
    let mut intruder = Intruder::enter(daemon.process("web", "rng"), None);
    let fate = intruder.call(socket.number.into(), socket.args);
    assert_eq!(fate, Fate::Stopped { code: DENIED });
    drop(intruder);
    let denied = Denied {
        thread: Some("main"),
        number: socket.number,
        args: socket.args,
    };
    let told = explain::denial(ProcKind::Rng, None, &denied, &|_| None).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.inspect("web")["denials"] == serde_json::json!([]) {
        assert!(Instant::now() < deadline, "no denial: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let denial = &daemon.inspect("web")["denials"][0];
    assert_eq!(denial["process"], "rng0.1");
    assert_eq!(denial["call"], told.call);
    assert_eq!(denial["thread"], "main");
    assert_eq!(denial["policy"], "policies/rng.toml");
    assert_eq!(denial["line"], told.line);
    let said = told.to_string();
    assert!(daemon.good(&["inspect", "web"]).contains(&said));
    assert!(daemon.good(&["logs", "web"]).contains(&said));
}

#[test]
fn denied_calls_end_the_process_and_are_told_by_name_arguments_and_line() {
    /// Restarts of a device that are well within what its policy allows.
    const SHARED: usize = 40;
    let disk = bulkhead_tests::disk(1 << 20);
    let chosen = chosen(everything());
    let mut at = 0;
    while let Some(first) = chosen.get(at) {
        let machine = machine(&disk);
        // Without its vCPU process a machine is lost.
        let most = if first.kind == ProcKind::Vcpu {
            1
        } else {
            SHARED
        };
        let same = chosen[at..]
            .iter()
            .take_while(|f| f.kind == first.kind)
            .take(most);
        for (n, forbidden) in (1..).zip(same) {
            is_stopped_and_told(&machine, forbidden);
            at += 1;
            if forbidden.kind != ProcKind::Vcpu {
                machine.expect_restarts(n);
            }
        }
    }
    println!("{at} calls were stopped and told");
}
