//! A shared folder is a file system to Linux and its programs: two suites of what POSIX demands are run in one, and what
//! they find missing is listed here, each with a reason. Only in `cargo xtask test --slow`.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::{Machine, RamDisk};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::time::{Duration, Instant};

/// Who owns the folder: nobody that exists here.
const OWNER: u32 = 61_234;
/// One check after the other comes, where ring 0 is emulated and the host is busy.
const PATIENCE: Duration = Duration::from_secs(900);
/// After so many lines it is told how far the guest is.
const LINES_TOLD: usize = 25;

/// pjdfstest's own settings, with the cases of its that fail here.
const PJDFSTEST: &str = include_str!("pjdfstest.toml");
/// The users that it wants.
const USERS: &str =
    "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\ntests:x:64001:64001::/:/bin/sh\n";
const GROUPS: &str = "root:x:0:\nnogroup:x:65534:\ntests:x:64001:\n";

/// Why a check of `posix-suite` fails in a shared folder (decisions 0023 and 0025).
const ONE_OWNER: &str = "all files have one owner, whoever makes them";
const NO_SET_ID: &str = "nothing is set-user-id or set-group-id: it would be so on the host";
const NO_NODES: &str = "pipes, sockets and device nodes would be the host's as well";
const NO_XATTR: &str = "there are no extended attributes";
const NO_OVERRIDE: &str =
    "the folder's process has the owner's rights, and root in the guest has no others";
const NO_TEMPORARY: &str = "a file is made by its name";
/// The checks of `posix-suite` that fail in a shared folder.
const MISSING: &[(&str, &str)] = &[
    ("names::pipes", NO_NODES),
    ("names::sockets", NO_NODES),
    ("names::device_nodes", NO_NODES),
    ("attributes::set_user_and_group_id_are_kept", NO_SET_ID),
    ("attributes::writing_ends_set_user_id", NO_SET_ID),
    (
        "attributes::new_in_a_set_group_id_directory_is_of_its_group",
        NO_SET_ID,
    ),
    ("attributes::files_are_given_away", ONE_OWNER),
    ("attributes::links_are_given_away", ONE_OWNER),
    ("attributes::extended_attributes", NO_XATTR),
    ("unnamed::made_without_a_name", NO_TEMPORARY),
    (
        "rights::sticky_directories_let_go_what_is_ones_own",
        ONE_OWNER,
    ),
    ("rights::a_new_file_is_its_makers", ONE_OWNER),
    ("rights::an_owner_is_held_by_his_own_rights", ONE_OWNER),
    ("rights::root_opens_what_nobody_may", NO_OVERRIDE),
    ("rights::root_truncates_what_nobody_may", NO_OVERRIDE),
    ("rights::root_searches_what_nobody_may", NO_OVERRIDE),
];

/// Waits for a line that begins with `last`, and tells how far the guest is meanwhile.
fn follow(machine: &mut Machine, last: &str) -> Vec<String> {
    let begin = Instant::now();
    let mut lines: Vec<String> = Vec::new();
    loop {
        let line = machine.expect_within("\n", PATIENCE);
        let line = line.trim().to_owned();
        if line.is_empty() {
            continue;
        }
        let is_last = line.starts_with(last);
        if is_last || lines.len() % LINES_TOLD == LINES_TOLD - 1 {
            println!("{:>5} s: {line}", begin.elapsed().as_secs());
        }
        lines.push(line);
        if is_last {
            return lines;
        }
    }
}

fn ram_disk(to: &Path) {
    let suite = Path::new(env!("CARGO_BIN_EXE_posix-suite"));
    let pjdfstest = bulkhead_tests::path("BULKHEAD_TEST_PJDFSTEST");
    RamDisk::linux()
        .file("etc/passwd", USERS.as_bytes())
        .file("etc/group", GROUPS.as_bytes())
        .file("pjdfstest.toml", PJDFSTEST.as_bytes())
        .copy("pjdfstest", &pjdfstest)
        .copy("posix-suite", suite)
        // Programs that pjdfstest starts; of busybox it cannot copy one.
        .link("bin/sleep", "/posix-suite")
        .link("bin/which", "busybox")
        .link("bin/mount", "busybox")
        .link("bin/umount", "busybox")
        .write(to);
}

#[test]
fn a_shared_folder_is_what_posix_demands_of_a_file_system() {
    if !bulkhead_tests::slow() {
        return;
    }
    let outside = tempfile::tempdir().unwrap();
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let initrd = outside.path().join("initrd");
    ram_disk(&initrd);
    let inside = outside.path().join("shared");
    let work = inside.join("d");
    fs::create_dir_all(&work).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(&inside, Some(OWNER), Some(OWNER)).unwrap();
        chown(&work, Some(OWNER), Some(OWNER)).unwrap();
    }
    let run = "mount -t virtiofs host /mnt && mount -t tmpfs tmpfs /tmp && /posix-suite /mnt/d; \
               NO_COLOR=1 /pjdfstest -c /pjdfstest.toml -p /mnt/d -s /tmp; umount /mnt; echo UNMOUNTED $?";
    let cmdline = format!("{} quiet bh.run=\"{run}\"", bulkhead_tests::linux_cmdline());
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
    // A second there is what ten milliseconds are elsewhere, and nobody else changes the folder.
    let folder = format!(
        "{},tag=host,guest_owner=0:0,cache_ms=60000",
        inside.display()
    );
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "-m",
        "256MiB",
        "--timeout=2h",
        "--share",
        &folder,
    ]);
    machine.expect_within("bh: ready", PATIENCE);
    let begin = Instant::now();
    let lines = follow(&mut machine, "SUITE-DONE");
    println!("posix-suite took {} s", begin.elapsed().as_secs());
    let begin = Instant::now();
    let pjdfstest = follow(&mut machine, "Summary: ");
    println!("pjdfstest took {} s", begin.elapsed().as_secs());
    machine.expect_within("UNMOUNTED 0", PATIENCE);
    let ended = machine.wait_within(PATIENCE);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0);

    let named = |line: &'_ String| {
        let name = line.strip_prefix("FAILED ")?.split(": ").next()?;
        Some((name.to_owned(), line.clone()))
    };
    let mut failed: BTreeMap<String, String> = lines.iter().filter_map(named).collect();
    for (name, why) in MISSING {
        let is_missing = failed.remove(*name).is_some();
        assert!(is_missing, "{name} is there, in spite of: {why}");
    }
    assert!(failed.is_empty(), "{failed:#?}");
    let summary = pjdfstest.last().unwrap();
    assert!(summary.starts_with("Summary: 0 failed"), "{pjdfstest:#?}");
}
