//! Shared folders: what a guest does in one is there on the host and for another machine, its process can be killed
//! at any moment, and nothing outside of the folder can be reached, whoever the process has become.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::pattern;
use bulkhead_tests::{Daemon, Ended, Fate, Intruder, Machine, Restart, is_alive, kill};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Who owns the shared folders of these tests, as root: nobody that exists here.
const OWNER: u32 = 61_234;
/// Linux where ring 0 is emulated.
const PATIENCE: Duration = Duration::from_secs(300);

/// A folder whose owner is not root, where that can be, inside of one that nobody else may enter.
fn folder() -> (TempDir, std::path::PathBuf) {
    let outside = tempfile::tempdir().unwrap();
    fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(outside.path().join("secret"), b"outside").unwrap();
    let inside = outside.path().join("shared");
    fs::create_dir(&inside).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(&inside, Some(OWNER), Some(OWNER)).unwrap();
    }
    (outside, inside)
}

fn share(folder: &Path, options: &str) -> String {
    format!("{}{options}", folder.to_str().unwrap())
}

/// The keys of the first record that begins with `name`.
fn record(console: &str, name: &str) -> HashMap<String, u64> {
    let line = console
        .lines()
        .find_map(|line| line.trim().strip_prefix("BH ")?.strip_prefix(name))
        .unwrap_or_else(|| panic!("no record {name}:\n{console}"));
    let pairs = line
        .split_whitespace()
        .filter_map(|word| word.split_once('='));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

fn good(ended: &Ended) {
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

/// Reads a file behind the guest's back and compares it with the pattern of `seed`.
fn verify(file: &Path, seed: u64, bytes: u64) {
    let data = fs::read(file).unwrap();
    assert_eq!(data.len() as u64, bytes, "{}", file.display());
    assert_eq!(pattern::first_difference(seed, 0, &data), None);
}

#[test]
fn what_a_guest_leaves_in_a_folder_is_there_on_the_host() {
    let (_outside, inside) = folder();
    let machine = Machine::test_guest(
        "mode=share seed=7 timeout=60",
        &["--share", &share(&inside, ",tag=work")],
    );
    let ended = machine.wait();
    good(&ended);
    assert!(ended.console.contains("BH share tag=work"), "{ended:?}");
    let names: Vec<_> = fs::read_dir(&inside).unwrap().flatten().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let kept = inside.join("kept");
    verify(&kept, 7, record(&ended.console, "share.end ")["bytes"]);
    let (about, parent) = (fs::metadata(&kept).unwrap(), fs::metadata(&inside).unwrap());
    assert_eq!((about.uid(), about.gid()), (parent.uid(), parent.gid()));
    assert_eq!((about.mode(), about.mtime()), (0o100_640, 1_000_000_000));
}

/// Runs a guest that works in a folder for `seconds`; `meanwhile` does what it does.
fn under_load(seconds: u32, meanwhile: impl FnOnce(&mut Machine)) -> (Ended, Vec<Restart>) {
    let (_outside, inside) = folder();
    let load = format!("mode=share-load seconds={seconds} timeout=60");
    let mut machine = Machine::test_guest(&load, &["--share", &share(&inside, "")]);
    machine.expect("BH share-load.begin");
    meanwhile(&mut machine);
    let ended = machine.wait();
    good(&ended);
    let end = record(&ended.console, "share-load.end ");
    verify(&inside.join("kept"), end["seed"], end["bytes"]);
    verify(&inside.join("held"), end["held"], end["bytes"]);
    let restarts = Restart::all(&ended.errors);
    let mut times: Vec<u64> = restarts.iter().map(|r| r.after_us).collect();
    times.sort_unstable();
    if let (Some(p50), Some(max)) = (times.get(times.len() / 2), times.last()) {
        println!(
            "{} restarts in {} rounds: p50 {p50} us, longest {max} us",
            times.len(),
            end["rounds"]
        );
    }
    (ended, restarts)
}

#[test]
fn folder_is_killed_fifty_times_under_load_and_the_guest_sees_no_error() {
    let (ended, restarts) = under_load(10, |machine| {
        for n in 1..=50 {
            kill(machine.process("fs"));
            machine.expect_restarts(n);
            std::thread::sleep(Duration::from_millis(10 + n as u64 % 7 * 10));
        }
    });
    assert_eq!(restarts.len(), 50, "{ended:?}");
    assert!(!ended.errors.contains("degraded"), "{ended:?}");
    assert!(restarts.iter().all(|r| r.name == "share0"), "{ended:?}");
}

#[test]
fn folder_that_is_lost_for_good_gives_errors_and_the_machine_lives() {
    let (_outside, inside) = folder();
    let load = "mode=share-load,idle seconds=60 timeout=20";
    let mut machine = Machine::test_guest(load, &["--share", &share(&inside, "")]);
    machine.expect("BH share-load.begin");
    let start = Instant::now();
    while !machine.errors().contains("degraded: share0 is lost") {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{}",
            machine.errors()
        );
        if let Some(victim) = machine.processes().of("fs") {
            kill(victim);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // EIO, and not success without having done anything.
    let before = machine.expect("BH idle");
    assert!(before.contains("error mode=share-load"), "{before}");
    assert!(before.contains("got=0x5"), "{before}");
}

#[test]
fn two_machines_share_a_folder() {
    let (_outside, inside) = folder();
    let folder = share(&inside, "");
    let look = "mode=share-look seed=9 timeout=60";
    let mut reader = Machine::test_guest(look, &["--share", &share(&inside, ",readonly")]);
    reader.expect("BH share tag=share0");
    good(&Machine::test_guest("mode=share seed=9 timeout=60", &["--share", &folder]).wait());
    good(&reader.wait());
}

#[test]
fn guest_changes_nothing_in_a_folder_that_is_read_only() {
    let (_outside, inside) = folder();
    let mut data = vec![0; 3 << 19];
    pattern::fill(3, 0, &mut data);
    fs::write(inside.join("kept"), &data).unwrap();
    let machine = Machine::test_guest(
        "mode=share-refused seed=3 timeout=60",
        &["--share", &share(&inside, ",readonly")],
    );
    let fs_process = machine.process("fs");
    // Not the server alone says so: the mount does.
    if nix::unistd::geteuid().is_root() {
        let mut intruder = Intruder::enter(fs_process, None);
        let folder = folder_of(fs_process);
        let made = open_below(&mut intruder, folder, "new", libc::O_CREAT | libc::O_WRONLY);
        assert_eq!(made, Fate::Returned(-i64::from(libc::EROFS)));
    }
    good(&machine.wait());
    assert_eq!(fs::read_dir(&inside).unwrap().count(), 1);
    verify(&inside.join("kept"), 3, 3 << 19);
}

/// The number of the folder's descriptor in its process.
fn folder_of(pid: u32) -> u64 {
    let all = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let mut folders =
        all.filter(|entry| fs::metadata(entry.path()).is_ok_and(|about| about.is_dir()));
    let first = folders.next().expect("it has its folder");
    first.file_name().to_str().unwrap().parse().unwrap()
}

/// `openat2` without any of the flags that the server gives.
fn open_below(intruder: &mut Intruder, folder: u64, path: &str, flags: i32) -> Fate {
    let mut bytes = Vec::new();
    let flags = u64::from(flags.cast_unsigned());
    let mode = if flags & u64::from(libc::O_CREAT.cast_unsigned()) == 0 {
        0
    } else {
        0o644u64
    };
    for word in [flags, mode, 0] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(path.as_bytes());
    bytes.push(0);
    let how = intruder.place(&bytes);
    intruder.call(libc::SYS_openat2, [folder, how + 24, how, 24, 0, 0])
}

fn descriptor(fate: Fate) -> u64 {
    match fate {
        Fate::Returned(fd) if fd >= 0 => fd.cast_unsigned(),
        other => panic!("{other:?}"),
    }
}

/// What a process that was taken over can find of a path: its identity, if anything.
fn identity(intruder: &mut Intruder, folder: u64, path: &str) -> Option<(u64, u64)> {
    let fd = match open_below(intruder, folder, path, libc::O_PATH) {
        Fate::Returned(fd) if fd >= 0 => fd.cast_unsigned(),
        _ => return None,
    };
    let room = intruder.place(&[0; 256]);
    let empty = room + 200;
    let flags = u64::from(libc::AT_EMPTY_PATH.cast_unsigned());
    let told = intruder.call(libc::SYS_newfstatat, [fd, empty, room, flags, 0, 0]);
    assert_eq!(told, Fate::Returned(0));
    let stat = intruder.look(room, 16);
    intruder.call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
    let word = |at: usize| u64::from_le_bytes(stat[at..at + 8].try_into().unwrap());
    Some((word(0), word(8)))
}

#[test]
fn guest_of_a_user_works_in_his_own_folder() {
    let (_outside, inside) = folder();
    let arguments = ["--cmdline", "mode=share,idle seed=5 timeout=60", "--share"];
    let share = share(&inside, ",guest_owner=0:0");
    let mut machine = Machine::run_as(OWNER, &[&arguments[..], &[&share]].concat());
    let before = machine.expect("BH idle");
    assert!(!before.contains("BH error"), "{before}");
    let bytes = record(&before, "share.end ")["bytes"];
    verify(&inside.join("kept"), 5, bytes);
    // His process has a mount of its own as well, by its own namespaces.
    let pid = machine.process("fs");
    let mut intruder = Intruder::enter(pid, None);
    let folder = folder_of(pid);
    let own = fs::metadata(&inside).unwrap();
    for path in [".", "..", "../.."] {
        let found = identity(&mut intruder, folder, path);
        assert_eq!(found, Some((own.dev(), own.ino())), "{path}");
    }
    for path in ["../secret", "/etc/passwd"] {
        let fate = open_below(&mut intruder, folder, path, libc::O_RDONLY);
        assert!(matches!(fate, Fate::Returned(..0)), "{path}: {fate:?}");
    }
}

#[test]
fn process_that_is_taken_over_reaches_nothing_outside_of_its_folder() {
    let (outside, inside) = folder();
    fs::create_dir(inside.join("deep")).unwrap();
    fs::write(inside.join("deep/own"), b"inside").unwrap();
    fs::set_permissions(inside.join("deep"), fs::Permissions::from_mode(0o777)).unwrap();
    symlink("../secret", inside.join("up")).unwrap();
    symlink(outside.path().join("secret"), inside.join("away")).unwrap();
    symlink("/proc/self/root/etc/passwd", inside.join("magic")).unwrap();
    let machine = Machine::test_guest("mode=idle", &["--share", &share(&inside, "")]);
    let pid = machine.process("fs");
    let mut intruder = Intruder::enter(pid, None);
    let folder = folder_of(pid);
    let own = fs::metadata(&inside).unwrap();
    let own = (own.dev(), own.ino());
    let root = u64::MAX - 99; // AT_FDCWD

    // It can use what is inside, so that a refusal below means something.
    assert_eq!(identity(&mut intruder, folder, "."), Some(own));
    let fd = descriptor(open_below(
        &mut intruder,
        folder,
        "deep/own",
        libc::O_RDONLY,
    ));
    intruder.call(libc::SYS_close, [fd, 0, 0, 0, 0, 0]);

    // Upwards there is nothing but the folder itself.
    for path in ["..", "../..", "deep/../..", "deep/../../.."] {
        assert_eq!(identity(&mut intruder, folder, path), Some(own), "{path}");
    }
    let outside_name = format!("..{}/secret", outside.path().display());
    for path in [
        "../secret",
        &outside_name,
        "up",
        "away",
        "magic",
        "/etc/passwd",
    ] {
        for flags in [libc::O_RDONLY, libc::O_PATH] {
            let fate = open_below(&mut intruder, folder, path, flags);
            let refused = matches!(fate, Fate::Returned(e) if (-40..0).contains(&e));
            assert!(refused, "{path}: {fate:?}");
        }
    }
    // Its root is empty, and it may not even read that.
    for (path, flags) in [
        ("/", libc::O_RDONLY),
        ("/proc", libc::O_PATH),
        ("etc", libc::O_PATH),
    ] {
        let fate = open_below(&mut intruder, root, path, flags);
        assert!(matches!(fate, Fate::Returned(..0)), "{path}: {fate:?}");
    }
    // A directory that the host moves out takes whoever held it along, but not to anything above it.
    let deep = descriptor(open_below(&mut intruder, folder, "deep", libc::O_PATH));
    fs::rename(inside.join("deep"), outside.path().join("moved")).unwrap();
    for path in ["..", "../secret", "../moved/own", "../.."] {
        assert_eq!(identity(&mut intruder, deep, path), None, "{path}");
    }
    assert_eq!(identity(&mut intruder, folder, "deep"), None);
    // Nothing is made that means something elsewhere, and nothing is executed.
    let name = intruder.place(b"node\0");
    let device = u64::from(libc::S_IFCHR | 0o666);
    let fate = intruder.call(libc::SYS_mknodat, [folder, name, device, 0x103, 0, 0]);
    assert!(matches!(fate, Fate::Stopped { .. }), "{fate:?}");
    drop(intruder);
    machine.expect_restarts(1);
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"outside");
}

/// Waits until the folder of `web` has a process that is not `old`.
fn another(daemon: &Daemon, old: u32) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = daemon.process("web", "fs");
        if now != old && is_alive(now) {
            return now;
        }
        assert!(Instant::now() < deadline, "{}", daemon.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn broker_is_killed_and_the_next_one_has_the_folder() {
    let (_outside, inside) = folder();
    let mut daemon = Daemon::start();
    let load = "mode=share-load,idle seconds=20 timeout=60";
    let folder = share(&inside, "");
    daemon.create_and_start("web", load, &["--share", &folder]);
    daemon.until_output("web", "BH share-load.begin");
    for _ in 0..3 {
        let first = daemon.process("web", "fs");
        kill(first);
        daemon.crash();
        daemon.serve();
        let second = another(&daemon, first);
        kill(second);
        another(&daemon, second);
    }
    daemon.until_output("web", "BH share-load.end");
    daemon.until_output("web", "BH idle");
    let console = daemon.output_of("web");
    assert!(!console.contains("BH error"), "{console}");
    let end = record(&console, "share-load.end ");
    verify(&inside.join("kept"), end["seed"], end["bytes"]);
}

/// What programs expect of a file system, as a shell finds it.
const SUITE: &str = include_str!("share_suite.sh");

#[test]
fn linux_mounts_a_folder_and_finds_the_semantics_of_a_file_system() {
    // Each program that the suite starts takes a second or more where ring 0 is emulated.
    if !bulkhead_tests::slow() {
        return;
    }
    let (_outside, inside) = folder();
    fs::write(inside.join("suite"), SUITE).unwrap();
    let work = inside.join("d");
    fs::create_dir(&work).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(&work, Some(OWNER), Some(OWNER)).unwrap();
        chown(inside.join("suite"), Some(OWNER), Some(OWNER)).unwrap();
    }
    let run =
        "mount -t virtiofs host /mnt && sh /mnt/suite /mnt/d guest; umount /mnt; echo UNMOUNTED $?";
    let cmdline = format!("{} bh.run=\"{run}\"", bulkhead_tests::linux_cmdline());
    let kernel = bulkhead_tests::path("BULKHEAD_TEST_LINUX_VMLINUX");
    let initrd = bulkhead_tests::path("BULKHEAD_TEST_LINUX_INITRD");
    let folder = share(&inside, ",tag=host,guest_owner=0:0");
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        initrd.to_str().unwrap(),
        "--cmdline",
        &cmdline,
        "-m",
        "96MiB",
        "--timeout=600s",
        "--share",
        &folder,
    ]);
    let before = machine.expect_within("SUITE-DONE", PATIENCE);
    assert!(!before.contains("FAILED"), "{before}");
    machine.expect_within("UNMOUNTED 0", PATIENCE);
    let ended = machine.wait_within(PATIENCE);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0);
}
