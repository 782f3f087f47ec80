//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{
    DeviceConfig, DeviceOwn, DiskLimits, FdRole, ImageFormat, ImageLayer, KindConfig,
};
use bulkhead_runtime::testing::Gate;
use bulkhead_runtime::testing::process::{Process, Upbringing, gate_grants};
use std::fs::File;
use std::os::unix::fs::FileExt;

const DISK_BYTES: u64 = 1 << 20;
const WINDOW_BYTES: u32 = 4 << 20;

fn process_on(file: &File) -> (Gate, Process) {
    file.set_len(DISK_BYTES).unwrap();
    let gate = Gate::new(VirtioKind::Blk, WINDOW_BYTES, &[64, 64]);
    let mut image = vec![0; 60];
    image[36..40].copy_from_slice(&1024u32.to_le_bytes());
    image[48..52].copy_from_slice(&1024u32.to_le_bytes());
    let config = DeviceConfig {
        kind: VirtioKind::Blk,
        queue_sizes: vec![64, 64],
        window_bytes: WINDOW_BYTES,
        features: u64::MAX,
        config: image,
        own: DeviceOwn::Blk {
            read_only: false,
            serial: "s".to_owned(),
            waits_for_room: true,
            limits: DiskLimits::default(),
            ephemeral: false,
            layers: vec![ImageLayer {
                format: ImageFormat::Raw,
                files: vec!["disk.img".to_owned()],
            }],
            bytes_min: 0,
        },
    };
    let upbringing = Upbringing::new(ProcKind::Blk, KindConfig::Device(config));
    let mut grants = gate_grants(&gate);
    grants.push((FdRole::Disk, 0, file.try_clone().unwrap().into()));
    let process = Process::spawn(env!("CARGO_BIN_EXE_bulkhead-blk"), upbringing, grants);
    (gate, process)
}

fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// Every operation, many at once, on a disk of either sort.
fn serve(file: &File) {
    let (mut gate, mut process) = process_on(file);
    process.assert_serving();
    for round in 0..20u8 {
        for n in 0..32 {
            let data = [round ^ n; 4096];
            gate.submit(0, None, &request(1, u64::from(n) * 8, &data), 1)
                .unwrap();
        }
        let answers = gate.await_answers(0, 32);
        let denial = process.page.denial();
        assert_eq!(answers.len(), 32, "denied: {denial:?}");
        assert!(answers.iter().all(|a| a.bytes == [0]));
        for n in 0..32 {
            gate.submit(1, None, &request(0, n * 8, &[]), 4097).unwrap();
        }
        let answers = gate.await_answers(1, 32);
        assert_eq!(answers.len(), 32);
        assert!(
            answers
                .iter()
                .all(|a| a.bytes[4096] == 0 && a.written == 4097)
        );
    }
    let mut stored = [0; 4096];
    file.read_exact_at(&mut stored, 5 * 4096).unwrap();
    assert_eq!(stored, [19 ^ 5; 4096]);
    let mut range = 0u64.to_le_bytes().to_vec();
    range.extend(8u32.to_le_bytes());
    range.extend([0; 4]);
    for (kind, data) in [(4, &[][..]), (11, &range), (13, &range)] {
        gate.submit(0, None, &request(kind, 0, data), 1).unwrap();
        let answers = gate.await_answers(0, 1);
        assert_eq!(answers[0].bytes, [0], "request {kind}");
    }
    process.assert_ends_quietly();
}

#[test]
fn disk_on_a_file_system_is_served() {
    serve(&tempfile::tempfile().unwrap());
}

#[test]
fn disk_in_memory_is_served() {
    let flags = nix::sys::memfd::MFdFlags::empty();
    serve(&File::from(
        nix::sys::memfd::memfd_create("disk", flags).unwrap(),
    ));
}
