//! A seed disk: Linux finds it by its label, and reads what cloud-init would.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::Machine;
use std::fs;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(300);

/// What a guest sees of a disk that `arguments` give it.
fn seen(commands: &str, arguments: &[&str]) -> String {
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    let run = format!("mount -t vfat -o ro /dev/vda /mnt; {commands}");
    let cmdline = format!("{} bh.run=\"{run}\"", bulkhead_tests::linux_cmdline());
    let mut all = vec![
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
    ];
    all.extend(["--cmdline", &cmdline, "-m", "96MiB", "--timeout=280s"]);
    all.extend(arguments);
    let ended = Machine::run(all).wait_within(PATIENCE);
    assert_eq!(ended.code, 0, "{ended:?}");
    ended.console.replace('\r', "")
}

#[test]
fn linux_reads_what_cloud_init_is_to_read() {
    let dir = tempfile::tempdir().unwrap();
    let user_data = format!(
        "#cloud-config\n# {}\nruncmd: [\"echo hi\"]\n",
        "x".repeat(10_000)
    );
    fs::write(dir.path().join("user-data"), &user_data).unwrap();
    fs::write(dir.path().join("network-config"), "version: 2\n").unwrap();
    let sum = bulkhead_tests::tool("md5sum", &[dir.path().join("user-data").to_str().unwrap()]);
    let sum = sum.split_whitespace().next().unwrap();
    let commands = "dd if=/dev/vda bs=1 skip=43 count=11 2>/dev/null; echo; ls -1 /mnt; \
                    md5sum /mnt/user-data; cat /mnt/meta-data; cat /mnt/network-config; \
                    cat /sys/block/vda/ro; cat /sys/block/vda/serial";
    let arguments = [
        "--name",
        "seeded",
        "--cloud-init",
        dir.path().to_str().unwrap(),
    ];
    let console = seen(commands, &arguments);
    for wanted in [
        "CIDATA     \n",
        "meta-data\nnetwork-config\nuser-data\n",
        sum,
        "instance-id: \"bulkhead-seeded\"\nlocal-hostname: \"seeded\"\n",
        "version: 2\n1\ncloud-init",
    ] {
        assert!(console.contains(wanted), "no {wanted:?} in {console}");
    }
}
