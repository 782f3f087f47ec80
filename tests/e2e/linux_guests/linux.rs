//! A Linux guest with two CPUs: its shell, its disk with ext4, its entropy, its power-off.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Machine, tool};
use std::path::Path;
use std::time::Duration;

/// Ring 0 is emulated on some hosts; a program takes tens of milliseconds to start there.
const PATIENCE: Duration = Duration::from_secs(300);
const DISK_BYTES: u64 = 64 << 20;

fn boot(kernel: &str, disk: &Path, arguments: &[&str]) -> Machine {
    let kernel = bulkhead_tests::path(kernel);
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    let cmdline = bulkhead_tests::linux_cmdline();
    let mut all = vec!["--kernel", kernel.to_str().unwrap()];
    all.extend(["--initrd", initrd.to_str().unwrap(), "--cmdline", &cmdline]);
    all.extend(["-m", "96MiB", "-c", "2", "--disk", disk.to_str().unwrap()]);
    all.extend(arguments);
    Machine::run(all)
}

#[test]
fn shell_session_uses_disk_entropy_and_both_cpus() {
    let disk = bulkhead_tests::disk(DISK_BYTES);
    let path = disk.path().to_str().unwrap();
    tool("mkfs.ext4", &["-q", "-F", path]);

    let mut machine = boot(
        "BULKHEAD_TEST_LINUX_BZIMAGE",
        disk.path(),
        &["--timeout=900s"],
    );
    machine.expect_within("bh: ready", PATIENCE);
    machine.expect_within("# ", PATIENCE);
    let mut shell = |command: &str, answer: &str| -> String {
        machine.type_keys(&format!("{command}; echo =$?=\n"));
        let before = machine.expect_within("=0=", PATIENCE);
        assert!(
            before.contains(answer),
            "{command}: no `{answer}` in {before}"
        );
        before
    };
    shell("mount -t ext4 /dev/vda /mnt", "");
    shell(
        "dd if=/dev/hwrng of=/mnt/random bs=4k count=64 2>&1",
        "64+0 records out",
    );
    shell("sync", "");
    let guest_sum = shell("md5sum /mnt/random", "/mnt/random");
    // Past the page cache: from the disk again.
    shell("umount /mnt && mount -t ext4 /dev/vda /mnt", "");
    let again = shell("md5sum /mnt/random", "/mnt/random");
    let sum = |text: &str| -> String {
        let mut words = text.split_whitespace();
        let at = words.position(|w| w == "/mnt/random").unwrap_or_default();
        text.split_whitespace()
            .find(|w| w.len() == 32 && w.bytes().all(|b| b.is_ascii_hexdigit()))
            .unwrap_or_else(|| panic!("no sum before word {at} of {text}"))
            .to_owned()
    };
    assert_eq!(sum(&guest_sum), sum(&again));
    shell("grep -c ^processor /proc/cpuinfo", "2");
    // Both CPUs work: each burns ticks of its own.
    let burn = "for c in 1 2; do (i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done) & done; wait";
    shell(burn, "");
    let stat = shell("cat /proc/stat", "cpu1");
    for cpu in ["cpu0", "cpu1"] {
        let line = stat
            .lines()
            .find(|l| l.trim_start().starts_with(cpu))
            .unwrap();
        let user: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(user > 0, "{cpu} has done nothing: {line}");
    }
    machine.type_keys("umount /mnt; poweroff -f\n");
    let ended = machine.wait_within(PATIENCE);
    assert_eq!(ended.code, 0, "{ended:?}");

    tool("e2fsck", &["-f", "-n", path]);
    let copy = tempfile::NamedTempFile::new().unwrap();
    let dump = format!("dump /random {}", copy.path().display());
    tool("debugfs", &["-R", &dump, path]);
    let host_sum = tool("md5sum", &[copy.path().to_str().unwrap()]);
    assert!(
        host_sum.starts_with(&sum(&guest_sum)),
        "{host_sum} against {guest_sum}"
    );
}

#[test]
fn elf_kernel_boots_as_well() {
    let cmdline = format!("{} bh.run=true", bulkhead_tests::linux_cmdline());
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    let machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "-m",
        "96MiB",
        "--timeout=600s",
    ]);
    let ended = machine.wait_within(Duration::from_secs(610));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("bh: exit 0"), "{ended:?}");
}
