//! A Debian root disk boots from the kernel in its own `/boot` to a login prompt. Slow where ring 0 is emulated:
//! `cargo xtask test --slow`.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::{Machine, tool};
use std::time::{Duration, Instant};

/// The whole of it where ring 0 is emulated and the host is busy.
const BOOT: Duration = Duration::from_secs(3 * 3600);
/// One program after the other is started.
const STEP: Duration = Duration::from_secs(1800);

#[test]
fn debian_boots_from_its_own_disk_to_a_login() {
    if !bulkhead_tests::slow() {
        return;
    }
    let home = tempfile::tempdir().unwrap();
    let disk = home.path().join("debian.img");
    let disk = disk.to_str().unwrap();
    let original = bulkhead_tests::path("BULKHEAD_TEST_DEBIAN_DISK");
    tool("cp", &["--sparse=always", original.to_str().unwrap(), disk]);

    let variable = |name| std::env::var(name).unwrap_or_default();
    let cmdline = format!(
        "{} {}",
        variable("BULKHEAD_TEST_STOCK_CMDLINE"),
        variable("BULKHEAD_TEST_DEBIAN_CMDLINE")
    );
    let begin = Instant::now();
    let mut machine = Machine::run([
        "--disk",
        disk,
        "--boot-from-disk",
        "--cmdline",
        &cmdline,
        "-m",
        "1GiB",
        // One: as for the stock kernel (`stock.rs`).
        "-c",
        "1",
        "--timeout=5h",
    ]);
    machine.expect_within("Linux version", STEP);
    machine.expect_within("debian login: ", BOOT);
    println!("login prompt after {} s", begin.elapsed().as_secs());
    machine.type_keys("root\n");
    machine.expect_within("Password: ", STEP);
    machine.type_keys("bulkhead\n");
    machine.expect_within("root@debian:~# ", STEP);
    println!("logged in after {} s", begin.elapsed().as_secs());
    machine.type_keys("uname -r >/var/release; cat /etc/debian_version; echo =$?=\n");
    let said = machine.expect_within("=0=", STEP);
    // Its line may begin with what the shell tells the terminal, which ends with an `l`.
    let mut lines = said
        .lines()
        .map(|line| line.trim().rsplit(['\r', 'l']).next());
    let is_there = lines.any(|version| version.is_some_and(|text| text.starts_with("12.")));
    assert!(is_there, "{said}");
    machine.type_keys("systemctl poweroff\n");
    let ended = machine.wait_within(STEP);
    println!("powered off after {} s", begin.elapsed().as_secs());
    assert_eq!(ended.code, 0, "{ended:?}");

    tool("e2fsck", &["-f", "-n", disk]);
    let release = tool("debugfs", &["-R", "cat /var/release", disk]);
    assert!(release.contains("cloud-amd64"), "{release}");
}
