//! The name under which the program is executed is the kind that it is.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{Born, DeviceConfig, DeviceOwn, KindConfig};
use bulkhead_runtime::testing::process::{Process, Upbringing};

/// The program, linked as `name`, in the hands of a broker that wants an entropy device.
fn born_as(name: &str) -> (Process, Result<Born, String>) {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join(name);
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_bulkhead-devices"), &program).unwrap();
    let config = DeviceConfig {
        kind: VirtioKind::Rng,
        queue_sizes: vec![16],
        window_bytes: 1 << 20,
        features: 0,
        config: Vec::new(),
        own: DeviceOwn::Rng,
    };
    let upbringing = Upbringing::new(ProcKind::Rng, KindConfig::Device(config));
    let mut process = Process::spawn(program.to_str().unwrap(), upbringing, Vec::new());
    let born = process.born();
    (process, born)
}

fn refusal(name: &str) -> String {
    match born_as(name).1 {
        Ok(Born::Failed { reason }) => reason,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn program_is_the_kind_whose_name_it_is_executed_under() {
    for kind in [ProcKind::Blk, ProcKind::Console, ProcKind::Legacy] {
        let reason = refusal(&format!("bulkhead-{kind}"));
        let expected = format!("this program is {kind}");
        assert!(reason.contains(&expected), "{kind}: {reason}");
    }
    // The kind that was asked for gets further: it misses its window.
    let reason = refusal("bulkhead-rng");
    assert!(reason.contains("Window"), "{reason}");
}

#[test]
fn program_of_any_other_name_says_what_it_is_and_ends() {
    for name in ["bulkhead-devices", "bulkhead-vcpu", "rng"] {
        let (mut process, born) = born_as(name);
        let cause = born.unwrap_err();
        assert!(cause.contains("started by `bulkhead`"), "{name}: {cause}");
        assert_eq!(process.end().0.code(), Some(70));
    }
}
