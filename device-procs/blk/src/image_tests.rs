//! Claims about disks that are images: what is written is there, also when the process ends at once.

use super::tests::{Act, Bench, IO_ERROR, OK, OPCODES, SECTORS, act, bench_of, disk_file};
use super::tests::{memory_file, pattern, range};
use super::*;
use bulkhead_image::{CLUSTER_BYTES, Source, check, create_qcow2, header::Header};
use bulkhead_ipc::protocol::birth::{FdRole, ImageFormat, ImageLayer};
use proptest::prelude::*;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

const BYTES: u64 = SECTORS * 512;

fn layer(format: ImageFormat, files: &[&str]) -> ImageLayer {
    ImageLayer {
        format,
        files: files.iter().map(|&name| name.to_owned()).collect(),
    }
}

fn empty(in_memory: bool) -> File {
    let file = if in_memory {
        memory_file()
    } else {
        disk_file()
    };
    file.set_len(0).unwrap();
    file
}

fn qcow2(file: &File, bytes: u64, backing: Option<(&str, ImageFormat)>) {
    let source = Source {
        file: file.try_clone().unwrap().into(),
        number: 0,
        name: "top.qcow2".to_owned(),
    };
    create_qcow2(source, bytes, backing).unwrap();
}

/// A chain: what a disk is made of, and what is in it at first.
struct Chain {
    files: Vec<(FdRole, u16, File)>,
    layers: Vec<ImageLayer>,
    contents: Vec<u8>,
}

impl Chain {
    fn plain(in_memory: bool) -> Self {
        let file = empty(in_memory);
        qcow2(&file, BYTES, None);
        Self {
            files: vec![(FdRole::Image, 0, file)],
            layers: vec![layer(ImageFormat::Qcow2, &["top.qcow2"])],
            contents: vec![0; usize::try_from(BYTES).unwrap()],
        }
    }

    /// On top of a raw image that is shorter than the disk.
    fn on_raw(in_memory: bool) -> Self {
        let mut chain = Self::plain(in_memory);
        let data = pattern(3 * CLUSTER_BYTES + 512 * 5, 11);
        let mut base = empty(in_memory);
        base.write_all(&data).unwrap();
        qcow2(
            &chain.files[0].2,
            BYTES,
            Some(("base.img", ImageFormat::Raw)),
        );
        chain.contents[..data.len()].copy_from_slice(&data);
        chain.files.push((FdRole::Backing, 0, base));
        chain.layers.push(layer(ImageFormat::Raw, &["base.img"]));
        chain
    }

    /// On top of a qcow2 image that is on top of a raw one.
    fn on_qcow2(in_memory: bool) -> Self {
        let below = Self::on_raw(in_memory);
        let mut middle = below.open(false);
        let data = pattern(CLUSTER_BYTES, 77);
        assert_eq!(middle.ask(1, 200, &data, 0).0, OK);
        drop(middle);
        let mut chain = Self::plain(in_memory);
        qcow2(
            &chain.files[0].2,
            BYTES,
            Some(("middle.qcow2", ImageFormat::Qcow2)),
        );
        chain.contents = below.contents;
        chain.contents[200 * 512..][..data.len()].copy_from_slice(&data);
        for ((_, _, file), index) in below.files.into_iter().zip(0..) {
            chain.files.push((FdRole::Backing, index, file));
        }
        chain.layers.extend(below.layers);
        chain
    }

    fn vmdk() -> Self {
        let mut descriptor = empty(false);
        let text = "# Disk DescriptorFile\nversion=1\nCID=00000001\nparentCID=ffffffff\n\
                    createType=\"twoGbMaxExtentFlat\"\nRW 1000 FLAT \"a.vmdk\" 8\nRW 1048 FLAT \"b.vmdk\" 0\n";
        descriptor.write_all(text.as_bytes()).unwrap();
        let (a, b) = (disk_file(), disk_file());
        Self {
            files: vec![
                (FdRole::Disk, 0, descriptor),
                (FdRole::Disk, 1, a),
                (FdRole::Disk, 2, b),
            ],
            layers: vec![layer(ImageFormat::Vmdk, &["d.vmdk", "a.vmdk", "b.vmdk"])],
            contents: vec![0; usize::try_from(BYTES).unwrap()],
        }
    }

    fn all() -> Vec<Self> {
        let both = [false, true].into_iter();
        let mut chains = vec![Self::vmdk()];
        for make in [Self::plain, Self::on_raw, Self::on_qcow2] {
            chains.extend(both.clone().map(make));
        }
        chains
    }

    fn open(&self, read_only: bool) -> Bench {
        self.try_open(read_only).unwrap()
    }

    fn try_open(&self, read_only: bool) -> Result<Bench, Stillbirth> {
        let files: Vec<_> = self
            .files
            .iter()
            .map(|(role, n, file)| (*role, *n, file))
            .collect();
        bench_of(self.layers.clone(), &files, read_only, &OPCODES)
    }

    /// The image is sound: nothing is used twice, nothing leaks.
    fn assert_sound(&self) {
        if self.layers[0].format == ImageFormat::Qcow2 {
            let file = &self.files[0].2;
            let header = Header::read(file, "top").unwrap();
            let count = check(file, &header, "top").unwrap().unwrap();
            assert_eq!((count.leaks, count.corruptions), (0, 0));
        }
    }
}

fn read_all(b: &mut Bench) -> Vec<u8> {
    let mut contents = Vec::new();
    for sector in (0..SECTORS).step_by(256) {
        let (status, data) = b.ask(0, sector, &[], 256 * 512);
        assert_eq!(status, OK);
        contents.extend(data);
    }
    contents
}

#[test]
fn chain_reads_as_its_layers_say() {
    for chain in Chain::all() {
        assert!(read_all(&mut chain.open(true)) == chain.contents);
        assert!(read_all(&mut chain.open(false)) == chain.contents);
    }
}

#[test]
fn what_is_completed_is_in_the_image_without_a_flush() {
    for chain in Chain::all() {
        let mut b = chain.open(false);
        let mut expected = chain.contents.clone();
        for (n, sector) in [0u64, 3, 130, 131, 500, 999, 1001, 1500, SECTORS - 9]
            .into_iter()
            .enumerate()
        {
            let data = pattern(512 * 9, u8::try_from(n).unwrap());
            assert_eq!(b.ask(1, sector, &data, 0).0, OK);
            let at = usize::try_from(sector).unwrap() * 512;
            expected[at..at + data.len()].copy_from_slice(&data);
            // As the next process finds it while this one is still there, as if it had been killed.
            let mut next = chain.open(true);
            assert!(read_all(&mut next) == expected, "after write {n}");
        }
        chain.assert_sound();
        // What the first device has in its tables never gets written any more.
        let _killed = std::mem::ManuallyDrop::new(b);
    }
}

#[test]
fn layers_below_are_never_written() {
    for chain in [Chain::on_raw(false), Chain::on_qcow2(false)] {
        let contents = |file: &File| {
            let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let before: Vec<_> = chain.files[1..].iter().map(|f| contents(&f.2)).collect();
        let mut b = chain.open(false);
        for sector in (0..SECTORS - 8).step_by(8) {
            assert_eq!(b.ask(1, sector, &pattern(4096, 1), 0).0, OK);
        }
        assert_eq!(b.ask(11, 0, &range(0, 1024, 0), 0).0, OK);
        assert_eq!(b.ask(13, 0, &range(1024, 1024, 1), 0).0, OK);
        assert_eq!(b.ask(4, 0, &[], 0).0, OK);
        let after: Vec<_> = chain.files[1..].iter().map(|f| contents(&f.2)).collect();
        assert!(before == after);
        let zeroes = vec![0; usize::try_from(BYTES).unwrap()];
        assert!(read_all(&mut b) == zeroes);
        drop(b);
        chain.assert_sound();
    }
}

#[test]
fn chain_that_is_not_the_images_is_refused_with_the_reason() {
    let mut lacking = Chain::on_raw(false);
    lacking.files.truncate(1);
    lacking.layers.truncate(1);
    let mut other_format = Chain::on_raw(false);
    other_format.layers[1].format = ImageFormat::Qcow2;
    let mut too_many = Chain::plain(false);
    too_many.files.push((FdRole::Backing, 0, disk_file()));
    too_many.layers.push(layer(ImageFormat::Raw, &["base.img"]));
    let mut raw_as_qcow2 = Chain::plain(false);
    raw_as_qcow2.files[0].2 = disk_file();
    for (chain, wanted) in [
        (lacking, "it needs its backing image \"base.img\" (raw)"),
        (other_format, "base.img: magic"),
        (too_many, "has no backing image, but one was given"),
        (raw_as_qcow2, "say `format=raw`"),
    ] {
        let error = chain.try_open(false).err().unwrap().to_string();
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn image_whose_refcounts_are_missing_can_only_be_read() {
    let chain = Chain::plain(false);
    let file = &chain.files[0].2;
    let mut b = chain.open(false);
    assert_eq!(b.ask(1, 0, &pattern(4096, 1), 0).0, OK);
    drop(b);
    let header = Header::read(file, "top").unwrap();
    // A writer would allocate a block of refcounts for the block of refcounts, for ever.
    file.write_all_at(&[0; 8], header.refcounts_at).unwrap();
    let error = chain.try_open(false).err().unwrap().to_string();
    assert!(error.contains("leaves out clusters of the file"), "{error}");
    assert_eq!(
        chain.open(true).ask(0, 0, &[], 4096),
        (OK, pattern(4096, 1))
    );
    // A reference to what is no part of the file.
    let chain = Chain::plain(false);
    let file = &chain.files[0].2;
    let nowhere = (1u64 << 63 | 1 << 40).to_be_bytes();
    file.write_all_at(&nowhere, header.l1_at).unwrap();
    let error = chain.try_open(false).err().unwrap().to_string();
    assert!(error.contains("the image is damaged"), "{error}");
}

#[test]
fn requests_past_the_end_of_an_image_are_refused() {
    for chain in Chain::all() {
        let mut b = chain.open(false);
        assert_eq!(b.ask(0, SECTORS, &[], 512).0, IO_ERROR);
        assert_eq!(b.ask(1, SECTORS - 1, &[1; 1024], 0).0, IO_ERROR);
        assert_eq!(b.ask(0, SECTORS - 1, &[], 512).0, OK);
    }
}

#[test]
fn leaks_of_a_killed_writer_are_repaired_at_the_next_opening() {
    let chain = Chain::plain(false);
    let file = &chain.files[0].2;
    let mut b = chain.open(false);
    assert_eq!(b.ask(1, 0, &pattern(4096, 1), 0).0, OK);
    drop(b);
    let header = Header::read(file, "top").unwrap();
    // A cluster at the end that is counted and that nobody uses.
    let end = file
        .metadata()
        .unwrap()
        .len()
        .next_multiple_of(header.cluster_bytes);
    file.set_len(end + header.cluster_bytes).unwrap();
    let mut table = [0; 8];
    file.read_exact_at(&mut table, header.refcounts_at).unwrap();
    let block = u64::from_be_bytes(table);
    let at = block + end / header.cluster_bytes * 2;
    file.write_all_at(&1u16.to_be_bytes(), at).unwrap();
    assert_eq!(check(file, &header, "top").unwrap().unwrap().leaks, 1);
    let mut b = chain.open(false);
    chain.assert_sound();
    assert_eq!(b.ask(0, 0, &[], 4096), (OK, pattern(4096, 1)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn image_behaves_like_an_array_of_bytes(
        acts in prop::collection::vec((act(), 0u8..10), 1..60),
        which in 0usize..7,
    ) {
        let chain = Chain::all().swap_remove(which);
        let mut b = chain.open(false);
        let mut model = chain.contents.clone();
        let slot = |s: u64, n: u32| {
            let (from, len) = (usize::try_from(s * 512).unwrap(), n as usize * 512);
            (from + len <= usize::try_from(BYTES).unwrap()).then_some(from..from + len)
        };
        for (act, dies) in acts {
            if dies == 0 {
                // Killed: what is only in its memory is lost.
                let next = chain.open(false);
                let _killed = std::mem::ManuallyDrop::new(std::mem::replace(&mut b, next));
            }
            match act {
                Act::Read(s, n) => {
                    let expected = match slot(s, n) {
                        Some(range) if n > 0 => (OK, model[range].to_vec()),
                        _ => (IO_ERROR, vec![]),
                    };
                    prop_assert!(b.ask(0, s, &[], n as usize * 512) == expected);
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
                    if let Some(range) = slot(s, n) {
                        prop_assert_eq!(status, OK);
                        model[range].fill(0);
                    }
                }
                Act::Flush => prop_assert_eq!(b.ask(4, 0, &[], 0).0, OK),
            }
        }
        prop_assert!(read_all(&mut b) == model);
        drop(b);
        chain.assert_sound();
    }
}
