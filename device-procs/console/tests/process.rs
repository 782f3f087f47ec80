//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::output_ring::{self, OutputReader};
use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, FdRole, KindConfig};
use bulkhead_ipc::protocol::device::ToDevice;
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::testing::Gate;
use bulkhead_runtime::testing::process::{Process, Upbringing, gate_grants};
use std::time::{Duration, Instant};

const CAPACITY: u64 = 4096;

#[test]
fn process_carries_text_both_ways_resizes_and_ends() {
    let mut gate = Gate::new(VirtioKind::Console, 1 << 20, &[16, 16]);
    let file = tempfile::tempfile().unwrap();
    output_ring::create(&file, CAPACITY).unwrap();
    let mut reader = OutputReader::new(file.try_clone().unwrap()).unwrap();
    let input = sealed_memfd("input", INPUT_RING_BYTES).unwrap();
    let mut keys = InputWriter::map(input.try_clone().unwrap()).unwrap();
    let key_bell = Doorbell::new().unwrap();
    let config = DeviceConfig {
        kind: VirtioKind::Console,
        queue_sizes: vec![16, 16],
        window_bytes: 1 << 20,
        features: 1,
        config: Vec::new(),
        own: DeviceOwn::Console {
            output_capacity: CAPACITY,
            output_position: 0,
            input_position: 0,
            size: (80, 25),
        },
    };
    let mut grants = gate_grants(&gate);
    grants.push((FdRole::Output, 0, file.into()));
    grants.push((FdRole::OutputBell, 0, Doorbell::new().unwrap().into()));
    grants.push((FdRole::Input, 0, input));
    grants.push((FdRole::InputBell, 0, key_bell.try_clone().unwrap().into()));
    let upbringing = Upbringing::new(ProcKind::Console, KindConfig::Device(config));
    let program = env!("CARGO_BIN_EXE_bulkhead-console");
    let mut process = Process::spawn(program, upbringing, grants);
    process.assert_serving();
    gate.start_driver(1);

    gate.submit(1, Some(0), b"# ", 0).unwrap();
    assert_eq!(gate.await_answers(1, 1).len(), 1);
    let mut text = [0; 16];
    assert_eq!(reader.read(&mut text).unwrap().bytes, 2);
    assert_eq!(&text[..2], b"# ");

    gate.submit(0, None, &[], 16).unwrap();
    assert!(gate.answers(0).is_empty());
    gate.announce(0);
    keys.write(b"ls\n");
    key_bell.ring();
    let typed = gate.await_answers(0, 1);
    assert_eq!(&typed[0].bytes[..3], b"ls\n");

    let resize = ToDevice::Resize {
        columns: 100,
        rows: 40,
    };
    process.channel.send(&resize, &[]).unwrap();
    let deadline = Instant::now() + Duration::from_secs(30);
    let size = [100, 0, 40, 0];
    let published = |gate: &Gate| {
        gate.window
            .published(0)
            .is_some_and(|p| p.config[..4] == size)
    };
    while !published(&gate) && Instant::now() < deadline {
        std::thread::yield_now();
    }
    assert!(published(&gate));
    process.assert_ends_quietly();
}
