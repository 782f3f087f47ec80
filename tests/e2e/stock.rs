//! The stock Debian cloud kernel, untouched, with its own virtio modules. Slow where ring 0 is
//! emulated: `cargo xtask test --slow`.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::Machine;
use std::time::Duration;

#[test]
fn stock_debian_kernel_mounts_its_disk() {
    if !bulkhead_tests::slow() {
        return;
    }
    let disk = bulkhead_tests::disk(64 << 20);
    let path = disk.path().to_str().unwrap();
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("greeting"), "written by the host\n").unwrap();
    let from = files.path().to_str().unwrap();
    bulkhead_tests::tool("mkfs.ext4", &["-q", "-F", "-d", from, path]);

    let kernel = bulkhead_tests::path("BULKHEAD_TEST_STOCK_KERNEL");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_STOCK_INITRD");
    let cmdline = std::env::var("BULKHEAD_TEST_STOCK_CMDLINE").unwrap_or_default();
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &format!("{cmdline} bh.mount=/dev/vda"),
        "-m",
        "1GiB",
        // One: on two busy CPUs of a host that emulates ring 0, timer interrupts at 250 Hz take longer
        // than the time between them, and the guest does nothing else any more.
        "-c",
        "1",
        "--disk",
        path,
        "--timeout=3600s",
    ]);
    machine.expect_within("bh: mounted /dev/vda", Duration::from_secs(2700));
    machine.expect_within("bh: ready", Duration::from_secs(300));
    machine.type_keys("cat /mnt/greeting; uname -r >/mnt/release; umount /mnt; echo =$?=\n");
    let said = machine.expect_within("=0=", Duration::from_secs(600));
    assert!(said.contains("written by the host"), "{said}");
    machine.type_keys("poweroff -f\n");
    let ended = machine.wait_within(Duration::from_secs(600));
    assert_eq!(ended.code, 0, "{ended:?}");

    bulkhead_tests::tool("e2fsck", &["-f", "-n", path]);
    let release = bulkhead_tests::tool("debugfs", &["-R", "cat /release", path]);
    assert!(release.contains("cloud-amd64"), "{release}");
}
