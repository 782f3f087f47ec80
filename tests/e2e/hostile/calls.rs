//! System calls that the policies deny, made by a process that was taken over, one in each of its lives,
//! while its guest works and all memory is watched. Each ends it and is told.

use super::{
    beside_others, canary_lives, disk_with_canary, errors_are_sound, expected_memory,
    nothing_changes, server_of, start, while_watched, with_folder, with_network,
};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::denied::Attempt;
use bulkhead_policies::explain::{self, Denied};
use bulkhead_policies::load;
use bulkhead_tests::{Machine, Programs};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ops::Range;
use std::time::{Duration, Instant};

/// What a process says by its exit code if a call did not end it (`tests/hostile/src/calls.rs`).
const ESCAPED: &str = "code 77";
/// Calls that a device makes in a default run; `--slow` makes all.
const SAMPLE: usize = 24;
/// Calls that vCPU processes make then, each of which ends a machine.
const SAMPLE_VCPU: usize = 6;
/// Calls that are made beside one guest, which has two minutes.
const LIVES: usize = 150;
/// Machines that end beside one neighbour.
const BESIDE: usize = 50;

/// As `tests/hostile/src/calls.rs` has them.
fn denied(kind: ProcKind) -> Vec<Attempt> {
    load(kind, None, false).unwrap().stopped("main")
}

/// Which of `count` calls are made.
fn chosen(count: usize, sample: usize) -> Range<usize> {
    if bulkhead_tests::slow() {
        return 0..count;
    }
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let first = usize::try_from(now.as_micros() % u128::try_from(count - sample).unwrap()).unwrap();
    first..first + sample
}

/// What is said of a call.
fn told(kind: ProcKind, attempt: &Attempt) -> String {
    let denied = Denied {
        thread: Some("main"),
        number: attempt.number,
        args: attempt.args,
    };
    let told = explain::denial(kind, None, &denied, &|_| None).unwrap();
    told.to_string()
}

fn until_all_are_told(machine: &Machine, kind: ProcKind, attempts: &[Attempt]) {
    let patience = Duration::from_secs(60)
        + Duration::from_millis(300) * u32::try_from(attempts.len()).unwrap();
    let deadline = Instant::now() + patience;
    for attempt in attempts {
        let told = told(kind, attempt);
        while !machine.errors().contains(&told) {
            assert!(Instant::now() < deadline, "{told}: {}", machine.errors());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn calls_of_device(kind: ProcKind) {
    let all = denied(kind);
    let chosen: Vec<usize> = chosen(all.len(), SAMPLE).collect();
    for some in chosen.chunks(LIVES) {
        calls_of_machine(kind, &all, some[0]..some[0] + some.len());
    }
}

fn calls_of_machine(kind: ProcKind, all: &[Attempt], chosen: Range<usize>) {
    let _others = beside_others();
    let mut disks = vec![disk_with_canary()];
    if kind == ProcKind::Blk {
        disks.insert(0, disk_with_canary());
    }
    let verified = disks.last().unwrap();
    let what = format!("{kind}, denied calls {chosen:?} of {}", all.len());
    let attempts = &all[chosen.clone()];

    let programs = Programs::with(kind.name(), "bulkhead-hostile");
    let name = format!("hostile-calls-{}-{}", chosen.start + 1, attempts.len());
    // Half of it where nobody else works: a life is over within an eighth of a second.
    let seconds = 4 + u32::try_from(attempts.len()).unwrap() / 4;
    let mut machine = start(&name, programs.path(), &disks, seconds);
    let (expected, memory) = expected_memory(&mut machine);
    if kind == ProcKind::Legacy {
        let honest = machine.process("legacy").cast_signed();
        kill(Pid::from_raw(honest), Signal::SIGKILL).unwrap();
    }
    let vcpu = machine.process("vcpu");
    let others = [vcpu, server_of(&machine, verified)];
    let ended = while_watched(&what, (&expected, &memory), || {
        nothing_changes(&what, &others, &[vcpu, machine.pid()]);
        until_all_are_told(&machine, kind, attempts);
        machine.wait()
    });
    assert_eq!(ended.code, 0, "{what}: {ended:?}");
    assert!(!ended.errors.contains(ESCAPED), "{what}: {ended:?}");
    errors_are_sound(&what, &ended);
    canary_lives(verified);
}

#[test]
fn denied_calls_of_a_taken_over_rng_end_it_and_harm_nobody_else() {
    calls_of_device(ProcKind::Rng);
}

#[test]
fn denied_calls_of_a_taken_over_vsock_end_it_and_harm_nobody_else() {
    calls_of_device(ProcKind::Vsock);
}

#[test]
fn denied_calls_of_a_taken_over_net_end_it_and_harm_nobody_else() {
    if with_network() {
        calls_of_device(ProcKind::Net);
    }
}

#[test]
fn denied_calls_of_a_taken_over_fs_end_it_and_harm_nobody_else() {
    let _folder = with_folder();
    calls_of_device(ProcKind::Fs);
}

#[test]
fn denied_calls_of_a_taken_over_console_end_it_and_harm_nobody_else() {
    calls_of_device(ProcKind::Console);
}

#[test]
fn denied_calls_of_a_taken_over_legacy_end_it_and_harm_nobody_else() {
    calls_of_device(ProcKind::Legacy);
}

#[test]
fn denied_calls_of_a_taken_over_blk_end_it_and_harm_nobody_else() {
    calls_of_device(ProcKind::Blk);
}

#[test]
fn denied_calls_of_a_taken_over_vcpu_end_its_machine_and_harm_no_neighbour() {
    let kind = ProcKind::Vcpu;
    let binaries = bulkhead_tests::path("BULKHEAD_BIN_DIR");
    let programs = Programs::with("vcpu", "bulkhead-hostile");
    let all = denied(kind);
    let chosen: Vec<usize> = chosen(all.len(), SAMPLE_VCPU).collect();
    for some in chosen.chunks(BESIDE) {
        let _others = beside_others();
        let what = format!("vcpu, denied calls {some:?} of {}", all.len());
        let disks = [disk_with_canary()];
        // Each machine ends within half of one.
        let seconds = 4 + u32::try_from(some.len()).unwrap();
        let mut neighbour = start("neighbour", &binaries, &disks, seconds);
        let (expected, memory) = expected_memory(&mut neighbour);
        let ended = while_watched(&what, (&expected, &memory), || {
            let kinds = ["vcpu", "blk", "console", "legacy", "rng", "vsock"];
            let pids = kinds.map(|kind| neighbour.process(kind));
            nothing_changes(&what, &pids, &[pids[0], neighbour.pid()]);
            for &at in some {
                let own = [disk_with_canary()];
                let name = format!("hostile-calls-{}-1", at + 1);
                let machine = start(&name, programs.path(), &own, 3);
                until_all_are_told(&machine, kind, &all[at..=at]);
                let ended = machine.wait();
                assert_eq!(ended.code, 14, "{what}: {ended:?}");
                assert!(!ended.errors.contains(ESCAPED), "{what}: {ended:?}");
                errors_are_sound(&what, &ended);
            }
            neighbour.wait()
        });
        assert_eq!(ended.code, 0, "{what}: {ended:?}");
        canary_lives(&disks[0]);
    }
}
