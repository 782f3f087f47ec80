//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::control_page::Phase;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{Born, DeviceConfig, DeviceOwn, FdRole, KindConfig};
use bulkhead_runtime::testing::Gate;
use bulkhead_runtime::testing::process::{Process, Upbringing, gate_grants};
use std::fs::File;
use std::os::fd::OwnedFd;

fn upbringing() -> Upbringing {
    let config = DeviceConfig {
        kind: VirtioKind::Rng,
        queue_sizes: vec![16],
        window_bytes: 1 << 20,
        features: 0,
        config: Vec::new(),
        own: DeviceOwn::Rng,
    };
    Upbringing::new(ProcKind::Rng, KindConfig::Device(config))
}

fn grants(gate: &Gate) -> Vec<(FdRole, u16, OwnedFd)> {
    let mut grants = gate_grants(gate);
    grants.push((
        FdRole::Entropy,
        0,
        File::open("/dev/urandom").unwrap().into(),
    ));
    grants
}

fn spawn(upbringing: Upbringing, grants: Vec<(FdRole, u16, OwnedFd)>) -> Process {
    Process::spawn(env!("CARGO_BIN_EXE_bulkhead-rng"), upbringing, grants)
}

#[test]
fn process_is_born_locked_serves_and_ends_when_told() {
    let mut gate = Gate::new(VirtioKind::Rng, 1 << 20, &[16]);
    let mut process = spawn(upbringing(), grants(&gate));
    process.assert_serving();
    assert_eq!(process.page.phase(), Phase::Locked);
    for _ in 0..100 {
        gate.submit(0, None, &[], 64).unwrap();
        let answers = gate.await_answers(0, 1);
        let denial = process.page.denial();
        assert_eq!(answers[0].written, 64, "denied: {denial:?}");
    }
    process.assert_ends_quietly();
}

#[test]
fn missing_and_superfluous_grants_stop_the_birth() {
    let gate = Gate::new(VirtioKind::Rng, 1 << 20, &[16]);
    for (change, word) in [(0, "not granted"), (1, "no use")] {
        let mut held = grants(&gate);
        if change == 0 {
            held.pop();
        } else {
            let extra = File::open("/dev/urandom").unwrap();
            held.push((FdRole::Entropy, 1, extra.into()));
        }
        let mut process = spawn(upbringing(), held);
        match process.born() {
            Ok(Born::Failed { reason }) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(process.end().0.code(), Some(70));
    }
}

#[test]
fn window_of_another_generation_is_refused() {
    let gate = Gate::new(VirtioKind::Rng, 1 << 20, &[16]);
    let mut later = upbringing();
    later.id.generation = 2;
    let mut process = spawn(later, grants(&gate));
    match process.born() {
        Ok(Born::Failed { reason }) => assert!(reason.contains("generation"), "{reason}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn system_call_outside_of_the_policy_ends_the_process_with_a_report() {
    let gate = Gate::new(VirtioKind::Rng, 1 << 20, &[16]);
    let mut strict = upbringing();
    // A policy that lacks what the start-up needs, as after a change of the program.
    strict.startup = strict.locked[0].filter.clone();
    let mut process = spawn(strict, grants(&gate));
    assert!(process.born().is_err());
    assert_eq!(process.end().0.code(), Some(159));
    assert_eq!(process.page.phase(), Phase::Startup);
    assert!(process.page.denial().is_some());
}
