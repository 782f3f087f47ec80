//! Disks are images of the usual formats, alone or in layers: what the guest has written is in them, also
//! when a process dies before it was told to flush, and other tools read them.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::pattern::{self, SECTOR};
use bulkhead_tests::{Ended, Machine, kill, tool};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const BYTES: u64 = 8 << 20;

/// The keys of the record that begins with `name`.
fn record(console: &str, name: &str) -> HashMap<String, u64> {
    let line = console
        .lines()
        .find_map(|line| line.trim().strip_prefix("BH ")?.strip_prefix(name))
        .unwrap_or_else(|| panic!("no record {name}:\n{console}"));
    let pairs = line.split_whitespace().filter_map(|w| w.split_once('='));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

/// A disk on the host: how it is named to `bulkhead`, and how its contents are read by another program.
struct Disk {
    home: TempDir,
    argument: String,
    image: PathBuf,
    format: &'static str,
}

fn path(home: &TempDir, name: &str) -> String {
    home.path().join(name).to_str().unwrap().to_owned()
}

/// Bytes that are no pattern of the test guest's.
fn base(home: &TempDir) -> String {
    let path = path(home, "base.img");
    let bytes: Vec<u8> = (0..BYTES)
        .map(|n| u8::try_from(n / 4096 % 251).unwrap())
        .collect();
    fs::write(&path, bytes).unwrap();
    path
}

fn qemu_img(arguments: &[&str]) -> String {
    tool("qemu-img", arguments)
}

impl Disk {
    fn new(home: TempDir, name: &str, format: &'static str, options: &str) -> Self {
        let image = home.path().join(name);
        let argument = format!("{},format={format}{options}", image.display());
        Self {
            home,
            argument,
            image,
            format,
        }
    }

    fn qcow2(options: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let size = BYTES.to_string();
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            options,
            &path(&home, "d.qcow2"),
            &size,
        ]);
        Self::new(home, "d.qcow2", "qcow2", "")
    }

    fn overlay_on_raw() -> Self {
        let home = tempfile::tempdir().unwrap();
        let below = base(&home);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &below,
            "-F",
            "raw",
            &path(&home, "d.qcow2"),
        ]);
        let options = format!(",backing={below}:raw");
        Self::new(home, "d.qcow2", "qcow2", &options)
    }

    /// Three layers, the middle one compressed.
    fn overlay_on_compressed() -> Self {
        let home = tempfile::tempdir().unwrap();
        let (below, middle) = (base(&home), path(&home, "middle.qcow2"));
        qemu_img(&["convert", "-q", "-c", "-O", "qcow2", &below, &middle]);
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            &middle,
            "-F",
            "qcow2",
            &path(&home, "d.qcow2"),
        ]);
        let options = format!(",backing={middle}:qcow2");
        Self::new(home, "d.qcow2", "qcow2", &options)
    }

    fn vmdk() -> Self {
        let home = tempfile::tempdir().unwrap();
        let size = BYTES.to_string();
        let options = "subformat=monolithicFlat";
        qemu_img(&[
            "create",
            "-q",
            "-f",
            "vmdk",
            "-o",
            options,
            &path(&home, "d.vmdk"),
            &size,
        ]);
        let extent = format!(",extent={}", path(&home, "d-flat.vmdk"));
        Self::new(home, "d.vmdk", "vmdk", &extent)
    }

    /// As another program reads it.
    fn contents(&self) -> Vec<u8> {
        let (image, raw) = (self.image.to_str().unwrap(), path(&self.home, "as.raw"));
        qemu_img(&["convert", "-q", "-f", self.format, "-O", "raw", image, &raw]);
        fs::read(raw).unwrap()
    }

    /// No leak, no corruption.
    fn check(&self) {
        if self.format == "qcow2" {
            let image = self.image.to_str().unwrap();
            let said = qemu_img(&["check", "-f", "qcow2", image]);
            assert!(said.contains("No errors were found"), "{said}");
        }
    }
}

fn assert_done(ended: &Ended) {
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

/// A guest writes, flushes and verifies while the disk's process is killed again and again.
fn survives_kills(disk: &Disk) {
    let before = disk.contents();
    let load = "mode=blk-load seconds=8 qd=32 timeout=60";
    let mut machine = Machine::test_guest(load, &["--disk", &disk.argument]);
    machine.expect("BH blk-load.begin");
    for n in 1..=12 {
        kill(machine.process("blk"));
        machine.expect_restarts(n);
        std::thread::sleep(Duration::from_millis(20 + n as u64 * 37 % 90));
    }
    let ended = machine.wait();
    assert_done(&ended);
    let end = record(&ended.console, "blk-load.end ");
    let written = usize::try_from(end["sectors"]).unwrap() * SECTOR;
    let contents = disk.contents();
    assert_eq!(
        pattern::first_difference(end["seed"], 0, &contents[..written]),
        None
    );
    assert!(
        contents[written..] == before[written..],
        "{}",
        disk.argument
    );
    disk.check();
}

#[test]
fn qcow2_loses_nothing_when_its_process_is_killed() {
    survives_kills(&Disk::qcow2("cluster_size=65536"));
}

#[test]
fn qcow2_of_the_old_version_with_small_clusters_loses_nothing_either() {
    survives_kills(&Disk::qcow2("compat=0.10,cluster_size=4096"));
}

#[test]
fn layer_on_a_raw_image_loses_nothing_when_its_process_is_killed() {
    let disk = Disk::overlay_on_raw();
    let below = fs::read(disk.home.path().join("base.img")).unwrap();
    survives_kills(&disk);
    assert!(fs::read(disk.home.path().join("base.img")).unwrap() == below);
}

#[test]
fn layer_on_a_compressed_image_loses_nothing_when_its_process_is_killed() {
    survives_kills(&Disk::overlay_on_compressed());
}

#[test]
fn flat_vmdk_loses_nothing_when_its_process_is_killed() {
    survives_kills(&Disk::vmdk());
}

#[test]
fn image_is_sound_after_the_whole_machine_was_killed() {
    let disk = Disk::overlay_on_raw();
    for round in 0..3 {
        let load = format!(
            "mode=blk-load seconds=30 qd=32 timeout=60 seed={}",
            100 * round + 1
        );
        let mut machine = Machine::test_guest(&load, &["--disk", &disk.argument]);
        machine.expect("BH blk-load.begin");
        std::thread::sleep(Duration::from_millis(150 + round * 130));
        for pid in machine.processes().pids() {
            kill(pid);
        }
        let ended = machine.wait();
        assert_ne!(ended.code, 0, "{ended:?}");
    }
    // Whoever opens it next puts right what was left.
    let ended = Machine::test_guest("mode=blk sectors=64", &["--disk", &disk.argument]).wait();
    assert_done(&ended);
    disk.check();
}

#[test]
fn one_image_is_below_the_disks_of_many_machines() {
    let home = tempfile::tempdir().unwrap();
    let below = base(&home);
    let contents = fs::read(&below).unwrap();
    let mut machines: Vec<_> = (0..3)
        .map(|n| {
            let top = path(&home, &format!("{n}.qcow2"));
            qemu_img(&[
                "create", "-q", "-f", "qcow2", "-b", &below, "-F", "raw", &top,
            ]);
            let argument = format!("{top},format=qcow2,backing={below}:raw");
            let load = format!("mode=blk-load seconds=2 seed={} timeout=60", n * 1000 + 1);
            Machine::test_guest(&load, &["--disk", &argument])
        })
        .collect();
    for machine in &mut machines {
        machine.expect("BH blk-load.begin");
    }
    // Nobody may write what others build upon.
    let writer = machines[0].another(&["--disk", &below]);
    assert_ne!(writer.code, 0, "{writer:?}");
    assert!(writer.errors.contains("is in use"), "{writer:?}");
    for machine in machines {
        assert_done(&machine.wait());
    }
    assert!(fs::read(&below).unwrap() == contents);
}

#[test]
fn what_is_written_to_an_ephemeral_disk_is_gone() {
    let disk = Disk::overlay_on_compressed();
    let before = fs::read(&disk.image).unwrap();
    let argument = format!("{},ephemeral", disk.argument);
    let load = "mode=blk-load seconds=2 timeout=60";
    let mut machine = Machine::test_guest(load, &["--disk", &argument]);
    machine.expect("BH blk-load.begin");
    kill(machine.process("blk"));
    machine.expect_restarts(1);
    assert_done(&machine.wait());
    assert!(fs::read(&disk.image).unwrap() == before);
}

#[test]
fn name_inside_of_an_image_opens_nothing() {
    let disk = Disk::overlay_on_raw();
    let image = disk.image.to_str().unwrap();
    let refused = |argument: &str, wanted: &str| {
        // A guest that was done before would have ended well.
        let ended = Machine::test_guest("mode=button", &["--disk", argument]).wait();
        assert_eq!(ended.code, 6, "{ended:?}");
        assert!(ended.errors.contains(wanted), "{ended:?}");
    };
    let alone = format!("{image},format=qcow2");
    refused(&alone, "add `backing=PATH:FORMAT` to the disk");
    // A guest that writes a qcow2 header to its raw disk still has a raw disk.
    let sectors = fs::metadata(image).unwrap().len().next_multiple_of(512);
    let file = fs::OpenOptions::new().write(true).open(image).unwrap();
    file.set_len(sectors).unwrap();
    let raw = format!("{image},readonly");
    let ended = Machine::test_guest("mode=hello", &["--disk", &raw]).wait();
    assert_done(&ended);
    let other = format!(
        "{},format=qcow2",
        Path::new(&path(&disk.home, "base.img")).display()
    );
    refused(&other, "say `format=raw`");
}

#[test]
fn disk_is_shared_by_the_machines_that_say_so() {
    let home = tempfile::tempdir().unwrap();
    let shared = base(&home);
    let argument = format!("{shared},shareable");
    let load = "mode=blk-load seconds=3 timeout=60";
    let mut machine = Machine::test_guest(load, &["--name", "first", "--disk", &argument]);
    machine.expect("BH blk-load.begin");
    let second = machine.another(&["--name", "second", "--disk", &argument]);
    assert_eq!(second.code, 0, "{second:?}");
    for other in [
        shared.clone(),
        format!("{shared},readonly"),
        format!("{shared},ephemeral"),
    ] {
        let refused = machine.another(&["--name", "other", "--disk", &other]);
        assert_ne!(refused.code, 0, "{refused:?}");
        assert!(refused.errors.contains("machine first"), "{refused:?}");
    }
    kill(machine.process("blk"));
    machine.expect_restarts(1);
    assert_done(&machine.wait());
    let alone = Machine::test_guest("mode=blk sectors=64", &["--disk", &shared]).wait();
    assert_done(&alone);
}

#[test]
fn machine_that_has_an_image_is_named_to_the_next_who_wants_it() {
    let disk = Disk::qcow2("cluster_size=65536");
    let load = "mode=blk-load seconds=3 timeout=60";
    let mut machine = Machine::test_guest(load, &["--name", "first", "--disk", &disk.argument]);
    machine.expect("BH blk-load.begin");
    let second = machine.another(&["--name", "second", "--disk", &disk.argument]);
    assert_ne!(second.code, 0, "{second:?}");
    assert!(second.errors.contains("machine first"), "{second:?}");
    assert_done(&machine.wait());
}
