//! Claims about the block device, on a temporary file.

use super::*;
use bulkhead_ipc::protocol::birth::{DeviceConfig, FdRole, ImageFormat, ImageLayer, UringGrant};
use bulkhead_ipc::ring::{RequestLayout, Span as RawSpan};
use bulkhead_runtime::testing::Rig;
use proptest::prelude::*;
use std::fs::File;
use std::os::unix::fs::FileExt;

pub(super) const OK: u8 = 0;
pub(super) const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;
pub(super) const SECTORS: u64 = 2048;
const OFFERED: u64 = 0xffff_ffff;
/// READ, WRITE, FSYNC, FALLOCATE.
pub(super) const OPCODES: [u8; 4] = [22, 23, 3, 17];

pub(super) struct Bench {
    pub(super) rig: Rig<Blk>,
    pub(super) file: File,
}

fn config_image() -> Vec<u8> {
    let mut config = vec![0; 60];
    config[36..40].copy_from_slice(&1024u32.to_le_bytes());
    config[48..52].copy_from_slice(&1024u32.to_le_bytes());
    config
}

/// A device on a chain; the roles and files of its grants in the order of the layers.
pub(super) fn bench_of(
    layers: Vec<ImageLayer>,
    files: &[(FdRole, u16, &File)],
    read_only: bool,
    opcodes: &[u8],
) -> Result<Bench, Stillbirth> {
    let config = DeviceConfig {
        kind: VirtioKind::Blk,
        queue_sizes: vec![16, 16],
        window_bytes: 4 << 20,
        features: OFFERED,
        config: config_image(),
        own: DeviceOwn::Blk {
            read_only,
            serial: "disk-0001".to_owned(),
            waits_for_room: true,
            limits: DiskLimits::default(),
            ephemeral: false,
            layers,
            bytes_min: 0,
        },
    };
    let held = files
        .iter()
        .map(|&(role, index, file)| (role, index, file.try_clone().unwrap().into()));
    let uring = UringGrant {
        opcodes: opcodes.to_vec(),
    };
    let rig = Rig::new(&config, held.collect(), &uring)?;
    let file = files[0].2.try_clone().unwrap();
    Ok(Bench { rig, file })
}

fn bench_on(file: File, read_only: bool, opcodes: &[u8]) -> Result<Bench, Stillbirth> {
    let layers = vec![ImageLayer {
        format: ImageFormat::Raw,
        files: vec!["disk.img".to_owned()],
    }];
    bench_of(layers, &[(FdRole::Disk, 0, &file)], read_only, opcodes)
}

pub(super) fn disk_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    file
}

pub(super) fn memory_file() -> File {
    let name = "disk";
    let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::empty()).unwrap();
    let file = File::from(fd);
    file.set_len(SECTORS * 512).unwrap();
    file
}

fn bench_with(read_only: bool) -> Bench {
    bench_on(disk_file(), read_only, &OPCODES).unwrap()
}

fn bench() -> Bench {
    bench_with(false)
}

/// One on a file system, one in memory.
fn benches() -> [Bench; 2] {
    [disk_file(), memory_file()].map(|file| bench_on(file, false, &OPCODES).unwrap())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

pub(super) fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

impl Bench {
    /// One request; returns status, data that the device says it wrote.
    pub(super) fn ask(&mut self, kind: u32, sector: u64, out: &[u8], into: usize) -> (u8, Vec<u8>) {
        let mut readable = header(kind, sector);
        readable.extend(out);
        self.rig.submit(0, None, &readable, into + 1).unwrap();
        self.rig.run().unwrap();
        let answers = self.rig.answers(0);
        let [answer] = answers.as_slice() else {
            panic!("one answer expected, got {answers:?}");
        };
        let (status, data) = answer.bytes.split_last().unwrap();
        (*status, data[..answer.written as usize - 1].to_vec())
    }

    fn contents(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(SECTORS * 512).unwrap()];
        self.file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }
}

pub(super) fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    let byte = |n: usize| u8::try_from((n / 512 + n) % 256).unwrap() ^ seed;
    (0..bytes).map(byte).collect()
}

#[test]
fn what_is_written_is_on_the_disk_and_read_back() {
    for mut b in benches() {
        let data = pattern(128 * 1024, 7);
        assert_eq!(b.ask(1, 100, &data, 0), (OK, vec![]));
        assert_eq!(b.contents()[51200..51200 + data.len()], data);
        assert_eq!(b.ask(0, 100, &[], data.len()), (OK, data));
    }
}

#[test]
fn capacity_identifier_and_features_are_published() {
    let mut b = bench();
    let p = b.rig.published();
    assert_eq!(p.config[..8], SECTORS.to_le_bytes());
    assert_eq!(p.features & F_READ_ONLY, 0);
    assert_eq!(
        p.features & (1 << 11),
        0,
        "the cache mode is not the guest's choice"
    );
    let mut id = b"disk-0001".to_vec();
    id.resize(ID_BYTES, 0);
    assert_eq!(b.ask(8, 0, &[], 20), (OK, id));
    assert_eq!(b.ask(8, 0, &[], 19).0, IO_ERROR);
}

#[test]
fn requests_past_the_end_or_of_odd_length_are_refused() {
    let mut b = bench();
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 0),
        (0, 511),
        (0, 513),
    ] {
        assert_eq!(
            b.ask(0, sector, &[], bytes).0,
            IO_ERROR,
            "read {sector} {bytes}"
        );
        let data = vec![1; bytes];
        assert_eq!(
            b.ask(1, sector, &data, 0).0,
            IO_ERROR,
            "write {sector} {bytes}"
        );
    }
    assert!(b.contents().iter().all(|&byte| byte == 0));
    assert_eq!(b.ask(0, SECTORS - 1, &[], 512).0, OK);
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut b = bench();
    for kind in [2, 3, 5, 9, 10, 14, u32::MAX] {
        assert_eq!(b.ask(kind, 0, &[], 512).0, UNSUPPORTED, "{kind}");
    }
}

#[test]
fn read_only_disk_refuses_every_change() {
    let mut b = bench_with(true);
    assert_ne!(b.rig.published().features & F_READ_ONLY, 0);
    assert_eq!(b.rig.published().features & (F_DISCARD | F_WRITE_ZEROES), 0);
    assert_eq!(b.ask(1, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(b.ask(11, 0, &range(0, 8, 0), 0).0, UNSUPPORTED);
    assert_eq!(b.ask(13, 0, &range(0, 8, 0), 0).0, UNSUPPORTED);
    assert_eq!(b.ask(0, 0, &[], 512).0, OK);
    assert!(b.contents().iter().all(|&byte| byte == 0));
}

#[test]
fn flush_succeeds_with_and_without_writes() {
    let mut b = bench();
    assert_eq!(b.ask(4, 0, &[], 0).0, OK);
    b.ask(1, 0, &[9; 4096], 0);
    assert_eq!(b.ask(4, 0, &[], 0).0, OK);
}

#[test]
fn driver_without_flush_gets_durable_writes() {
    let mut b = bench();
    b.rig.start_driver(0);
    assert_eq!(b.ask(1, 0, &[9; 4096], 0).0, OK);
    assert_eq!(b.contents()[..4096], [9; 4096]);
}

#[test]
fn discard_and_write_zeroes_leave_zeroes_in_their_ranges_only() {
    let kinds = [(11, 0), (13, 0), (13, 1)];
    for (mut b, (kind, flags)) in benches()
        .into_iter()
        .chain(benches())
        .chain(benches())
        .zip(kinds.into_iter().flat_map(|k| [k, k]))
    {
        let data = pattern(1 << 20, 3);
        b.file.write_all_at(&data, 0).unwrap();
        let mut ranges = range(16, 8, flags);
        ranges.extend(range(64, 0, flags));
        ranges.extend(range(128, 1024, flags));
        assert_eq!(b.ask(kind, 0, &ranges, 0).0, OK);
        let mut expected = data;
        expected[16 * 512..24 * 512].fill(0);
        expected[128 * 512..1152 * 512].fill(0);
        assert!(b.contents() == expected, "{kind}/{flags}");
    }
}

#[test]
fn discards_that_break_their_limits_are_refused() {
    let mut b = bench();
    for (ranges, status) in [
        (range(0, 1025, 0), IO_ERROR),
        (range(SECTORS, 1, 0), IO_ERROR),
        (range(SECTORS - 1, 2, 0), IO_ERROR),
        (range(u64::MAX, 1, 0), IO_ERROR),
        (range(0, 1, 1), UNSUPPORTED),
        (range(0, 1, 2), UNSUPPORTED),
        (vec![], IO_ERROR),
        (vec![0; 15], IO_ERROR),
        (vec![0; 17], IO_ERROR),
        (vec![0; 257 * 16], IO_ERROR),
    ] {
        assert_eq!(b.ask(11, 0, &ranges, 0).0, status, "{ranges:?}");
    }
    assert_eq!(b.ask(13, 0, &range(0, 1, 2), 0).0, UNSUPPORTED);
}

#[test]
fn file_that_was_cut_short_gives_errors_not_garbage() {
    for mut b in benches() {
        b.file.set_len(512 * 10).unwrap();
        assert_eq!(b.ask(0, 100, &[], 512).0, IO_ERROR);
        assert_eq!(b.ask(0, 8, &[], 4096), (IO_ERROR, vec![]));
    }
}

#[test]
fn operations_that_are_not_granted_fail() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SECTORS * 512).unwrap();
    let mut b = bench_on(file, false, &OPCODES[..1]).unwrap();
    assert_eq!(b.ask(0, 0, &[], 512).0, OK);
    assert_eq!(b.ask(1, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(b.ask(4, 0, &[], 0).0, IO_ERROR);
    assert!(b.contents().iter().all(|&byte| byte == 0));
}

#[test]
fn full_queues_are_answered_completely() {
    let mut b = bench();
    b.file.write_all_at(&pattern(1 << 20, 1), 0).unwrap();
    for round in 0..10 {
        for n in 0..32u64 {
            let queue = usize::try_from(n % 2).unwrap();
            let sector = (n * 8 + round) % SECTORS;
            b.rig.submit(queue, None, &header(0, sector), 4097).unwrap();
        }
        b.rig.run().unwrap();
        assert_eq!(b.rig.answers(0).len() + b.rig.answers(1).len(), 32);
    }
}

#[derive(Debug, Clone)]
pub(super) enum Act {
    Read(u64, u32),
    Write(u64, u32, u8),
    Discard(u64, u32),
    Zero(u64, u32, bool),
    Flush,
}

pub(super) fn act() -> impl Strategy<Value = Act> {
    let place = || (0..SECTORS + 4, 0u32..40);
    prop_oneof![
        place().prop_map(|(s, n)| Act::Read(s, n)),
        (place(), any::<u8>()).prop_map(|((s, n), seed)| Act::Write(s, n, seed)),
        place().prop_map(|(s, n)| Act::Discard(s, n)),
        (place(), any::<bool>()).prop_map(|((s, n), unmap)| Act::Zero(s, n, unmap)),
        Just(Act::Flush),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn disk_behaves_like_an_array_of_bytes(
        acts in prop::collection::vec(act(), 1..40),
        in_memory: bool,
    ) {
        let file = if in_memory { memory_file() } else { disk_file() };
        let mut b = bench_on(file, false, &OPCODES).unwrap();
        let mut model = vec![0u8; usize::try_from(SECTORS * 512).unwrap()];
        let slot = |s: u64, n: u32| {
            let (from, len) = (usize::try_from(s * 512).unwrap(), n as usize * 512);
            (from + len <= usize::try_from(SECTORS * 512).unwrap()).then_some(from..from + len)
        };
        for act in acts {
            match act {
                Act::Read(s, n) => {
                    let expected = match slot(s, n) {
                        Some(range) if n > 0 => (OK, model[range].to_vec()),
                        _ => (IO_ERROR, vec![]),
                    };
                    prop_assert_eq!(b.ask(0, s, &[], n as usize * 512), expected);
                }
                Act::Write(s, n, seed) => {
                    let data = pattern(n as usize * 512, seed);
                    let status = b.ask(1, s, &data, 0).0;
                    match slot(s, n) {
                        Some(range) if n > 0 => {
                            prop_assert_eq!(status, OK);
                            model[range].copy_from_slice(&data);
                        }
                        _ => prop_assert_eq!(status, IO_ERROR),
                    }
                }
                Act::Discard(s, n) | Act::Zero(s, n, _) => {
                    let (kind, flags) = match act {
                        Act::Zero(_, _, unmap) => (13, u32::from(unmap)),
                        _ => (11, 0),
                    };
                    let status = b.ask(kind, 0, &range(s, n, flags), 0).0;
                    match slot(s, n) {
                        Some(range) => {
                            prop_assert_eq!(status, OK);
                            model[range].fill(0);
                        }
                        None => prop_assert_eq!(status, IO_ERROR),
                    }
                }
                Act::Flush => prop_assert_eq!(b.ask(4, 0, &[], 0).0, OK),
            }
        }
        prop_assert!(b.contents() == model);
    }

    #[test]
    fn chain_that_no_gate_makes_is_answered_by_nobody(
        before in 0usize..4, wrong in (0usize..3, any::<usize>(), 1u32..),
    ) {
        let mut b = bench();
        let data = b.rig.window.layout.data;
        let bytes = b.rig.window.layout.bytes;
        let header = RawSpan { offset: data, len: 16, writable: false };
        let status = RawSpan { offset: data + 4096, len: 1, writable: true };
        let layout = |spans: &[RawSpan]| {
            let mut layout = RequestLayout::default();
            spans.iter().for_each(|&span| layout.push(span));
            layout
        };
        for _ in 0..before {
            b.rig.submit_raw(0, &layout(&[header, status]));
        }
        b.rig.run().unwrap();
        prop_assert_eq!(b.rig.answers(0).len(), before);
        let (how, at, len) = wrong;
        let chain = match how {
            0 => [status, header],
            1 => [header, RawSpan { offset: at.max(bytes), len, writable: true }],
            _ => {
                let len = len.max(u32::try_from(bytes).unwrap());
                [header, RawSpan { offset: status.offset + at % 4096, len, writable: true }]
            }
        };
        b.rig.submit_raw(0, &layout(&chain));
        let fault = b.rig.run().unwrap_err();
        prop_assert!(fault.to_string().contains("impossible descriptors"), "{fault}");
        prop_assert_eq!(b.rig.answers(0).len(), 0);
    }

    #[test]
    fn any_chain_of_a_gate_is_answered_and_the_disk_keeps_its_size(
        requests in prop::collection::vec((any::<[u8; 24]>(), prop::collection::vec(
            (0usize..1 << 23, any::<u32>(), any::<bool>()), 1..4)), 1..12),
    ) {
        let mut b = bench();
        let data = b.rig.window.layout.data;
        let mut submitted = 0;
        for (head, spans) in requests {
            // Now and then a header that is nearly right.
            b.rig.window.memory.slice(data, 24).copy_from(&head);
            if head[0] % 2 == 0 {
                b.rig.window.memory.write(data, u32::from(head[0] % 16));
                b.rig.window.memory.write(data + 8, u64::from(head[1]));
            }
            let header = RawSpan { offset: data, len: 16 + u32::from(head[2] % 8), writable: false };
            let spans = spans.into_iter().map(|(at, len, writable)| (at.max(4096), len % (1 << 18), writable));
            b.rig.submit_any(0, Some(header), spans.collect());
            submitted += 1;
        }
        b.rig.run().unwrap();
        prop_assert_eq!(b.rig.answers(0).len(), submitted);
        prop_assert_eq!(b.file.metadata().unwrap().len(), SECTORS * 512);
    }
}
