//! Every device works through its gate, from a process that holds no guest memory; one that dies
//! neither hangs the guest nor its shutdown.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Machine, disk, tool};
use std::io::Write;

fn succeeds(cmdline: &str, arguments: &[&str]) -> String {
    let ended = Machine::test_guest(cmdline, arguments).wait();
    assert_eq!(ended.code, 0, "{cmdline}: {ended:?}");
    assert!(
        ended.console.contains("BH done errors=0"),
        "{cmdline}: {ended:?}"
    );
    ended.console
}

#[test]
fn disk_keeps_every_promise_of_a_disk() {
    let disk = disk(64 << 20);
    let path = disk.path().to_str().unwrap();
    let console = succeeds("mode=blk sectors=16384 qd=32 seed=7", &["--disk", path]);
    assert!(
        console.contains("BH blk.verify result=ok sectors=16384"),
        "{console}"
    );
}

#[test]
fn what_the_host_wrote_is_what_the_guest_reads() {
    let mut disk = disk(1 << 20);
    let nonce: Vec<u8> = std::fs::read("/proc/sys/kernel/random/uuid").unwrap();
    disk.write_all(&nonce).unwrap();
    let path = disk.path().to_str().unwrap();
    let console = succeeds("mode=nonce", &["--disk", path]);
    let hex: String = nonce.iter().map(|b| format!("{b:02x}")).collect();
    assert!(console.contains(&hex), "{console}");
}

/// A block device of the host over a file. It goes with the test.
struct LoopDevice(String);

impl LoopDevice {
    fn over(path: &str) -> Self {
        let name = tool("losetup", &["--find", "--show", path]);
        Self(name.trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        tool("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn block_device_of_the_host_is_a_disk() {
    let disk = disk(8 << 20);
    let device = LoopDevice::over(disk.path().to_str().unwrap());
    let console = succeeds("mode=blk sectors=16384 seed=3", &["--disk", &device.0]);
    assert!(
        console.contains("BH blk.info slot=2 gsi=7 capacity_sectors=16384"),
        "{console}"
    );
    drop(device);
    let bytes = std::fs::read(disk.path()).unwrap();
    assert!(bytes.iter().any(|byte| *byte != 0), "nothing was written");
}

#[test]
fn read_only_disk_stays_as_it_is() {
    let mut disk = disk(1 << 20);
    disk.write_all(&[0xa5; 4096]).unwrap();
    let before = std::fs::read(disk.path()).unwrap();
    let argument = format!("{},readonly", disk.path().display());
    let console = succeeds("mode=blk", &["--disk", &argument]);
    assert!(console.contains("BH blk.readonly "), "{console}");
    assert!(
        std::fs::read(disk.path()).unwrap() == before,
        "the image changed"
    );
}

#[test]
fn entropy_and_legacy_devices_work() {
    succeeds("mode=rng,legacy size=262144", &[]);
}

#[test]
fn console_flood_fills_its_ring_and_no_more() {
    let flood = "mode=console,idle size=1048576";
    let mut machine = Machine::test_guest(flood, &["--console-history=64KiB"]);
    machine.expect("BH console.bulk bytes=1048576 ");
    machine.expect("BH idle ");
    assert_eq!(machine.ring_bytes("console.ring"), (64 << 10) + 4096);
}

#[test]
fn nonsense_from_the_guest_harms_nothing() {
    for seed in [1, 2, 3] {
        let disk = disk(4 << 20);
        let path = disk.path().to_str().unwrap();
        succeeds(
            &format!("mode=fuzz seed={seed} iterations=200"),
            &["--disk", path],
        );
    }
}
