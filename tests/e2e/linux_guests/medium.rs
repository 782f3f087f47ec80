//! A disk grows, and is given another medium, while its guest uses it.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, kill, tool};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
/// Ring 0 is emulated on some hosts, where Linux boots slowly.
const PATIENCE: Duration = Duration::from_secs(300);
/// Says when the disk has another size, then reads and writes it, for as many sizes as are to come.
const WATCH: &str = "p=$(cat /sys/block/vda/size); echo size $p; for n in 1 2; do \
    while s=$(cat /sys/block/vda/size); [ $s = $p ]; do sleep 1; done; \
    blockdev --flushbufs /dev/vda; echo size $s; p=$s; \
    echo reads $(dd if=/dev/vda bs=512 count=1 2>/dev/null); \
    echo end-$n | dd of=/dev/vda bs=512 seek=$((s-1)) conv=sync,fsync 2>/dev/null; \
    echo wrote $n; done";

fn create_linux(daemon: &Daemon, disk: &str) {
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    let cmdline = bulkhead_tests::linux_cmdline();
    let cmdline = format!("{cmdline} quiet bh.run=\"{WATCH}\"");
    daemon.good(&[
        "create",
        "--name",
        "web",
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "-m",
        "128MiB",
        "--disk",
        disk,
    ]);
    daemon.good(&["start", "web"]);
}

fn until_output(daemon: &Daemon, part: &str) {
    let deadline = Instant::now() + PATIENCE;
    while !daemon.output_of("web").contains(part) {
        assert!(
            Instant::now() < deadline,
            "no `{part}` in:\n{}",
            daemon.output_of("web")
        );
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Changes a disk whose process was killed a moment ago.
fn once_served(daemon: &Daemon, change: &[&str]) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let done = daemon.run(change);
        if done.code == 0 {
            return;
        }
        let waits = done.errors.contains("it is being replaced");
        assert!(waits && Instant::now() < deadline, "{done:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn raw(path: &Path, text: &str, bytes: u64) {
    fs::write(path, text).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

fn line_at(path: &Path, at: u64) -> String {
    let mut bytes = [0; 8];
    let read = File::open(path).unwrap().read_at(&mut bytes, at).unwrap();
    let text = String::from_utf8_lossy(&bytes[..read]).into_owned();
    text.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn raw_disk_grows_under_its_guest_and_is_never_made_smaller() {
    let daemon = Daemon::start();
    let path = daemon.scratch().join("d.img");
    raw(&path, "first\n", 8 * MIB);
    create_linux(&daemon, path.to_str().unwrap());
    until_output(&daemon, "size 16384");
    daemon.fails(
        &["device", "resize", "web/disk0", "4MiB"],
        6,
        "a disk is not made smaller while its machine runs",
    );
    daemon.fails(
        &["device", "resize", "web/disk0", "9999999B"],
        6,
        "expected a multiple of 512",
    );
    daemon.fails(
        &["device", "resize", "web/rng", "16MiB"],
        2,
        "expected a disk",
    );
    daemon.good(&["device", "resize", "web/disk0", "16MiB"]);
    until_output(&daemon, "wrote 1");
    // The process that was told is not the last one.
    kill(daemon.process("web", "blk"));
    once_served(&daemon, &["device", "resize", "web/disk0", "24MiB"]);
    until_output(&daemon, "wrote 2");
    daemon.until_state("web", "stopped");
    let output = daemon.output_of("web");
    for said in ["size 32768", "size 49152", "reads first"] {
        assert!(output.contains(said), "{said}: {output}");
    }
    assert_eq!(line_at(&path, 16 * MIB - 512), "end-1");
    assert_eq!(line_at(&path, 24 * MIB - 512), "end-2");
}

#[test]
fn qcow2_disk_grows_and_has_its_new_size_after_the_daemon_was_killed() {
    let mut daemon = Daemon::start();
    let path = daemon.scratch().join("d.qcow2");
    let name = path.to_str().unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", name, "8M"]);
    create_linux(&daemon, &format!("{name},format=qcow2"));
    until_output(&daemon, "size 16384");
    daemon.good(&["device", "resize", "web/disk0", "16MiB"]);
    until_output(&daemon, "wrote 1");
    daemon.crash();
    daemon.serve();
    // Its disk is known to be another one, so that its next process is accepted.
    kill(daemon.process("web", "blk"));
    once_served(&daemon, &["device", "resize", "web/disk0", "24MiB"]);
    until_output(&daemon, "wrote 2");
    daemon.until_state("web", "stopped");
    let info = tool("qemu-img", &["info", "--output=json", name]);
    assert!(info.contains("\"virtual-size\": 25165824"), "{info}");
    tool("qemu-img", &["check", "-q", name]);
    let flat = daemon.scratch().join("flat.img");
    tool(
        "qemu-img",
        &["convert", "-O", "raw", name, flat.to_str().unwrap()],
    );
    assert_eq!(line_at(&flat, 16 * MIB - 512), "end-1");
    assert_eq!(line_at(&flat, 24 * MIB - 512), "end-2");
}

#[test]
fn medium_is_changed_and_one_that_cannot_be_served_is_taken_back() {
    let daemon = Daemon::start();
    let scratch = daemon.scratch().to_owned();
    let place = |name: &str| scratch.join(name).to_str().unwrap().to_owned();
    raw(&scratch.join("a.img"), "first\n", 8 * MIB);
    raw(&scratch.join("b.img"), "second\n", 4 * MIB);
    raw(&scratch.join("c.img"), "third\n", 12 * MIB);
    create_linux(&daemon, &place("a.img"));
    until_output(&daemon, "size 16384");
    let medium = |name: &str| daemon.run(&["device", "medium", "web/disk0", &place(name)]);
    daemon.fails(
        &["device", "medium", "web/disk0", &place("none.img")],
        6,
        "No such file",
    );
    // What is no qcow2 image is found out by the disk's process alone.
    daemon.fails(
        &[
            "device",
            "medium",
            "web/disk0",
            &place("b.img"),
            "--format",
            "qcow2",
        ],
        6,
        "the disk is what it was",
    );
    assert_eq!(medium("b.img").code, 0);
    until_output(&daemon, "wrote 1");
    // The old medium is nobody's any more; the new one is this machine's.
    let idle = ["mode=idle seconds=1"];
    daemon.create("db", idle[0], &["--disk", &place("a.img")]);
    daemon.good(&["start", "db"]);
    daemon.create("other", idle[0], &["--disk", &place("b.img")]);
    daemon.fails(&["start", "other"], 2, "is in use: machine web");
    kill(daemon.process("web", "blk"));
    once_served(&daemon, &["device", "medium", "web/disk0", &place("c.img")]);
    until_output(&daemon, "wrote 2");
    daemon.until_state("web", "stopped");
    let output = daemon.output_of("web");
    for said in ["size 8192", "reads second", "size 24576", "reads third"] {
        assert!(output.contains(said), "{said}: {output}");
    }
    assert_eq!(line_at(&scratch.join("b.img"), 4 * MIB - 512), "end-1");
    assert_eq!(line_at(&scratch.join("c.img"), 12 * MIB - 512), "end-2");
}
