//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::control_page::Phase;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{
    Born, DeviceConfig, DeviceOwn, DiskLimits, FdRole, KindConfig,
};
use bulkhead_runtime::testing::Gate;
use bulkhead_runtime::testing::process::{Process, Upbringing, gate_grants};
use nix::fcntl::OFlag;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

const WINDOW_BYTES: u32 = 2 << 20;

fn upbringing() -> Upbringing {
    let config = DeviceConfig {
        kind: VirtioKind::Net,
        queue_sizes: vec![16, 16],
        window_bytes: WINDOW_BYTES,
        features: u64::MAX,
        config: Vec::new(),
        own: DeviceOwn::Net {
            link_up: true,
            cuts_udp: false,
            limits: DiskLimits::default(),
        },
    };
    Upbringing::new(ProcKind::Net, KindConfig::Device(config))
}

/// A device of the right kind that can be waited for: a terminal's far end, from which nothing comes.
fn grants(gate: &Gate) -> Vec<(FdRole, u16, OwnedFd)> {
    let mut grants = gate_grants(gate);
    let terminal = File::options()
        .read(true)
        .write(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open("/dev/ptmx");
    grants.push((FdRole::Tap, 0, terminal.unwrap().into()));
    grants
}

fn spawn(upbringing: Upbringing, grants: Vec<(FdRole, u16, OwnedFd)>) -> Process {
    Process::spawn(env!("CARGO_BIN_EXE_bulkhead-net"), upbringing, grants)
}

fn gate() -> Gate {
    Gate::new(VirtioKind::Net, WINDOW_BYTES, &[16, 16])
}

#[test]
fn process_is_born_locked_sends_and_ends_when_told() {
    let mut gate = gate();
    let mut process = spawn(upbringing(), grants(&gate));
    process.assert_serving();
    assert_eq!(process.page.phase(), Phase::Locked);
    gate.start_driver(0);
    for _ in 0..20 {
        gate.submit(1, None, &[0; 72], 0).unwrap();
        let answers = gate.await_answers(1, 1);
        let denial = process.page.denial();
        assert_eq!(answers.len(), 1, "denied: {denial:?}");
        assert_eq!(answers[0].written, 0);
    }
    process.assert_ends_quietly();
}

#[test]
fn missing_and_superfluous_queues_of_the_interface_stop_the_birth() {
    let gate = gate();
    for (change, word) in [(0, "not granted"), (1, "no use")] {
        let mut held = grants(&gate);
        if change == 0 {
            held.pop();
        } else {
            let extra = File::open("/dev/null").unwrap();
            held.push((FdRole::Tap, 1, extra.into()));
        }
        let mut process = spawn(upbringing(), held);
        match process.born() {
            Ok(Born::Failed { reason }) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(process.end().0.code(), Some(70));
    }
}
