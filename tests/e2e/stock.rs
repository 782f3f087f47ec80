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
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(64 << 20).unwrap();
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_STOCK_KERNEL");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_STOCK_INITRD");
    let cmdline = std::env::var("BULKHEAD_TEST_STOCK_CMDLINE").unwrap_or_default();
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "-m",
        "1GiB",
        // One: on two busy CPUs of a host that emulates ring 0, timer interrupts at 250 Hz take longer
        // than the time between them, and the guest does nothing else any more.
        "-c",
        "1",
        "--disk",
        disk.path().to_str().unwrap(),
        "--timeout=3600s",
    ]);
    machine.expect_within("bh: ready", Duration::from_secs(2700));
    machine.type_keys("uname -r; head -c 512 /dev/vda | md5sum; echo =$?=; poweroff -f\n");
    machine.expect_within("=0=", Duration::from_secs(600));
    let ended = machine.wait_within(Duration::from_secs(600));
    assert_eq!(ended.code, 0, "{ended:?}");
}
