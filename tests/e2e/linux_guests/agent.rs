//! The agent inside a Linux guest, by way of its socket device and the daemon.
//!
//! One boot for all of it, since a boot takes half a minute where ring 0 is emulated; lies of a guest need
//! none (`broker/tests/agent.rs`).

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Daemon, tool};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(300);
const VM: &str = "guest";

/// The small Linux's initramfs with the agent in it: the kernel unpacks one archive after the other.
fn initrd(folder: &Path) -> String {
    let program = bulkhead_tests::path("BULKHEAD_BIN_DIR").join("bulkhead-agent");
    let more = folder.join("more/bin");
    fs::create_dir_all(&more).unwrap();
    let stripped = more.join("bulkhead-agent");
    let (program, stripped) = (program.to_str().unwrap(), stripped.to_str().unwrap());
    tool("strip", &["-o", stripped, program]);
    let archive = folder.join("initrd.cpio");
    fs::copy(bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD"), &archive).unwrap();
    let pack = "cd \"$1\" && find . -mindepth 1 | cpio -o -H newc --quiet >> \"$2\"";
    let archive = archive.to_str().unwrap();
    let more = folder.join("more");
    tool("sh", &["-c", pack, "sh", more.to_str().unwrap(), archive]);
    archive.to_owned()
}

struct Guest {
    daemon: Daemon,
    folder: tempfile::TempDir,
    _disk: tempfile::NamedTempFile,
}

impl Guest {
    fn boot() -> Self {
        let (daemon, folder) = (Daemon::start(), tempfile::tempdir().unwrap());
        let disk = bulkhead_tests::disk(64 << 20);
        let path = disk.path().to_str().unwrap();
        tool("mkfs.ext4", &["-q", "-F", path]);
        let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
        let initrd = initrd(folder.path());
        // As an init would have it: another one follows one that has died.
        let run = "while true; do bulkhead-agent; done";
        let cmdline = bulkhead_tests::linux_cmdline();
        let cmdline = format!("{cmdline} bh.mount=/dev/vda bh.run=\"{run}\"");
        let all = ["create", "--name", VM, "--kernel", kernel.to_str().unwrap()];
        let more = ["--initrd", &initrd, "--cmdline", &cmdline, "-m", "96MiB"];
        daemon.good(&[&all[..], &more, &["--vsock", "--disk", path]].concat());
        daemon.good(&["start", VM]);
        let guest = Self {
            daemon,
            folder,
            _disk: disk,
        };
        guest.until_agent();
        guest
    }

    /// Until there is one, there is a socket and nobody behind it.
    fn until_agent(&self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let done = self.daemon.run(&["agent", "ping", VM]);
            if done.code == 0 {
                return;
            }
            let clear = done.errors.contains("does bulkhead-agent run in it?");
            assert!(clear, "{}", done.errors);
            assert!(Instant::now() < until, "{}", self.daemon.output_of(VM));
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    fn exec(&self, script: &str) -> (i32, String) {
        let done = self.daemon.run(&["exec", VM, "--", "sh", "-c", script]);
        (done.code, done.output)
    }

    /// What a script prints that has to end well.
    fn shell(&self, script: &str) -> String {
        let (code, out) = self.exec(script);
        assert_eq!(code, 0, "{script}: {out}");
        out.trim().to_owned()
    }
}

#[test]
fn agent_does_in_a_guest_what_its_host_asks() {
    let guest = Guest::boot();
    commands_have_streams_and_codes(&guest);
    large_file_comes_back_as_it_went(&guest);
    frozen_disks_wait(&guest);
    guest_becomes_another_one(&guest);
    dead_agent_is_a_clear_error(&guest);
}

fn commands_have_streams_and_codes(guest: &Guest) {
    let daemon = &guest.daemon;
    let done = daemon.run(&[
        "exec",
        VM,
        "--",
        "sh",
        "-c",
        "echo out; echo err >&2; exit 7",
    ]);
    assert_eq!(
        (done.code, done.output.as_str()),
        (7, "out\n"),
        "{}",
        done.errors
    );
    assert_eq!(done.errors, "err\n");
    assert_eq!(guest.exec("kill -9 $$").0, 137);
    assert_eq!(daemon.run(&["exec", VM, "--", "/no/such"]).code, 127);
    let stats = daemon.json(&["agent", "stats", VM]);
    let memory = stats["memory_bytes"].as_u64().unwrap();
    assert!((64 << 20..96 << 20).contains(&memory), "{stats}");
    assert_eq!(stats["file_systems"][0]["mount_point"], "/mnt", "{stats}");
    // A terminal that the guest's shell takes for one; the small Linux mounts none by itself.
    let mounted = guest.exec("mkdir -p /dev/pts && mount -t devpts devpts /dev/pts");
    assert_eq!(mounted.0, 0);
    let done = daemon.run(&[
        "exec",
        "-t",
        VM,
        "--",
        "sh",
        "-c",
        "[ -t 1 ] && echo terminal",
    ]);
    assert_eq!(
        (done.code, done.output.as_str()),
        (0, "terminal\r\n"),
        "{}",
        done.errors
    );
}

fn large_file_comes_back_as_it_went(guest: &Guest) {
    let from = guest.folder.path().join("from");
    let bytes: Vec<u8> = (0..3u32 << 20)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    fs::write(&from, &bytes).unwrap();
    let from = from.to_str().unwrap();
    let sum = tool("md5sum", &[from]);
    let sum = sum.split_whitespace().next().unwrap();
    guest.daemon.good(&["cp", from, &format!("{VM}:/mnt/copy")]);
    let there = guest.shell("md5sum /mnt/copy; ls -a /mnt");
    assert!(
        there.starts_with(sum) && !there.contains("partial"),
        "{there}"
    );
    let back = guest.folder.path().join("back");
    guest.daemon.good(&[
        "cp",
        "-r",
        &format!("{VM}:/mnt/copy"),
        back.to_str().unwrap(),
    ]);
    assert!(fs::read(back).unwrap() == bytes);
}

fn frozen_disks_wait(guest: &Guest) {
    let daemon = &guest.daemon;
    let frozen = daemon.json(&["agent", "freeze", VM, "--timeout", "300s"]);
    assert_eq!(frozen["file_systems"][0]["mount_point"], "/mnt", "{frozen}");
    assert!(frozen["file_systems"][0]["refused"].is_null(), "{frozen}");
    daemon.fails(&["agent", "freeze", VM], 6, "frozen already");
    let write = ["exec", VM, "--", "sh", "-c", "echo written > /mnt/new"];
    let mut writer = daemon.begin(&write);
    std::thread::sleep(Duration::from_secs(5));
    assert!(writer.try_wait().unwrap().is_none(), "it has written");
    let thawed = daemon.json(&["agent", "thaw", VM]);
    assert_eq!(thawed["thawed"], 1, "{thawed}");
    assert!(writer.wait().unwrap().success());
    assert_eq!(guest.shell("cat /mnt/new"), "written");

    // By themselves when the time is over.
    daemon.good(&["agent", "freeze", VM, "--timeout", "2s"]);
    guest.shell("echo again > /mnt/new");
    let thawed = daemon.json(&["agent", "thaw", VM]);
    assert_eq!(thawed["thawed"], 0, "{thawed}");
}

fn guest_becomes_another_one(guest: &Guest) {
    let id = "0123456789abcdef0123456789abcdef";
    let words = [
        "--hostname",
        "another",
        "--machine-id",
        id,
        "--seed",
        "--ssh-host-keys",
    ];
    let told = guest
        .daemon
        .json(&[&["agent", "reidentify", VM][..], &words].concat());
    let steps = told["steps"].as_array().unwrap();
    let outcomes: Vec<_> = steps
        .iter()
        .map(|step| {
            (
                step["step"].as_str().unwrap(),
                step["outcome"].as_str().unwrap(),
            )
        })
        .collect();
    let expected = [
        ("seed", "done"),
        ("machine_id", "done"),
        ("hostname", "done"),
        ("ssh_host_keys", "skipped"),
    ];
    assert_eq!(outcomes, expected, "{told}");
    assert_eq!(
        guest.shell("hostname; cat /etc/hostname /etc/machine-id"),
        format!("another\nanother\n{id}")
    );
}

fn dead_agent_is_a_clear_error(guest: &Guest) {
    let daemon = &guest.daemon;
    daemon.good(&["agent", "freeze", VM, "--timeout", "300s"]);
    let done = daemon.run(&["exec", VM, "--", "sh", "-c", "kill -9 $PPID; sleep 1000"]);
    assert_eq!(done.code, 125, "{}", done.errors);
    assert!(
        done.errors.contains("hung up") || done.errors.contains("connection broke"),
        "{}",
        done.errors
    );
    guest.until_agent();
    // Whoever has to wait for the disk waits no longer than its agent lives.
    guest.shell("echo thawed > /mnt/new");
    daemon.good(&["kill", VM]);
    daemon.fails(&["agent", "ping", VM], 6, "nothing in it answers");
}
