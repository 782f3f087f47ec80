//! What the host and other machines are kept from: a machine's memory in core files and merged
//! pages, its disk image beyond its end, its files, its share of a crowded host.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]
#![allow(unsafe_code, reason = "prctl has no safe wrapper")]

use bulkhead::launch::cgroup::{Place, Reach};
use bulkhead::launch::users::UserRange;
use bulkhead::vm::spec::HostShare;
use bulkhead_tests::{Daemon, Fate, Intruder, Machine};
use nix::sys::signal::Signal;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const KINDS: [&str; 6] = ["vcpu", "legacy", "console", "rng", "blk", "vsock"];
const DISK_BYTES: u64 = (1 << 20) + 512;

fn idle() -> (Machine, tempfile::NamedTempFile) {
    let disk = bulkhead_tests::disk(DISK_BYTES);
    let path = disk.path().to_str().unwrap().to_owned();
    let mut machine = Machine::test_guest("mode=idle", &["--vsock", "--disk", &path]);
    machine.expect("BH idle ");
    (machine, disk)
}

fn proc_file(pid: u32, name: &str) -> String {
    fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap()
}

fn limit(pid: u32, name: &str) -> String {
    let text = proc_file(pid, "limits");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.unwrap().split_whitespace().nth(1).unwrap().to_owned()
}

#[test]
fn host_short_of_memory_ends_machines_before_brokers() {
    let (machine, _disk) = idle();
    let score = |pid| -> i32 { proc_file(pid, "oom_score_adj").trim().parse().unwrap() };
    let broker = score(machine.pid());
    for kind in KINDS {
        let own = score(machine.process(kind));
        assert!(own >= broker + 100, "{kind} has {own}, its broker {broker}");
    }
}

#[test]
fn guest_bytes_reach_no_core_file_and_are_never_merged() {
    const PR_SET_MEMORY_MERGE: i32 = 67;
    // As a service manager does with MemoryKSM=yes; an older kernel refuses and has nothing to inherit.
    // SAFETY: plain integers; the only effect is a flag of this process.
    let merges = unsafe { libc::prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0) } == 0;
    let (machine, _disk) = idle();
    if merges && Path::new("/proc/self/ksm_stat").exists() {
        let broker = proc_file(machine.pid(), "ksm_stat");
        assert!(!broker.contains("ksm_merge_any: no"), "{broker}");
    }
    for kind in KINDS {
        let pid = machine.process(kind);
        assert_eq!(limit(pid, "Max core file size"), "0", "{kind}");
        let mut windows = 0;
        for mapping in proc_file(pid, "smaps")
            .split("VmFlags:")
            .collect::<Vec<_>>()
            .windows(2)
        {
            let (head, flags) = (mapping[0], mapping[1].lines().next().unwrap());
            let has = |flag| flags.split_whitespace().any(|f| f == flag);
            assert!(!has("mg"), "{kind} may be merged: {head}");
            let size = head.lines().find_map(|l| l.strip_prefix("Size:"));
            let kib = size.map_or(0, |s| s.trim().trim_end_matches(" kB").parse().unwrap());
            let guest_memory = kind == "vcpu" && kib >= 32 << 10;
            if head.contains("memfd:bulkhead") || guest_memory {
                assert!(has("dd"), "{kind} would be dumped: {head}");
                windows += 1;
            }
        }
        assert!(
            windows >= if kind == "vcpu" { 5 } else { 2 },
            "{kind}: {windows} mappings"
        );
    }
}

#[test]
fn disk_process_cannot_grow_its_image() {
    let (machine, disk) = idle();
    let pid = machine.process("blk");
    assert_eq!(limit(pid, "Max file size"), DISK_BYTES.to_string());
    let image = fs::canonicalize(disk.path()).unwrap();
    let fd = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == image));
    let fd: u64 = fd.unwrap().file_name().to_str().unwrap().parse().unwrap();
    let mut intruder = Intruder::enter(pid, None);
    let bytes = intruder.place(b"more");
    let inside = intruder.call(libc::SYS_pwrite64, [fd, bytes, 4, DISK_BYTES - 4, 0, 0]);
    assert_eq!(inside, Fate::Returned(4));
    let beyond = intruder.call(libc::SYS_pwrite64, [fd, bytes, 4, DISK_BYTES, 0, 0]);
    let refused = Fate::Returned(-i64::from(libc::EFBIG));
    assert!(
        beyond == refused || beyond == Fate::Killed(Signal::SIGXFSZ),
        "{beyond:?}"
    );
    assert_eq!(fs::metadata(&image).unwrap().len(), DISK_BYTES);
}

#[test]
fn files_of_a_machine_are_its_users_alone() {
    let (machine, _disk) = idle();
    let mut folders = vec![
        machine.scratch().join("state"),
        machine.scratch().join("run"),
    ];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                folders.push(entry.path());
                continue;
            }
            files += 1;
            let mode = metadata.permissions().mode() & 0o777;
            assert_eq!(mode & 0o077, 0, "{}: {mode:o}", entry.path().display());
        }
    }
    assert!(files >= 2, "only {files} files were found");
}

/// Directories of a machine to be, with this `bulkhead.toml`.
fn configured(text: &str) -> tempfile::TempDir {
    let scratch = tempfile::tempdir().unwrap();
    fs::create_dir(scratch.path().join("etc")).unwrap();
    fs::write(scratch.path().join("etc/bulkhead.toml"), text).unwrap();
    scratch
}

#[test]
fn processes_of_a_run_are_users_of_the_configured_range() {
    let users: UserRange = "300000000-304194303".parse().unwrap();
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let scratch = configured(&format!("[host]\nusers = \"{users}\"\n"));
    let arguments = [
        "--kernel",
        guest.to_str().unwrap(),
        "--cmdline",
        "mode=idle",
    ];
    let mut machine = Machine::run_in(scratch, &arguments);
    machine.expect("BH idle ");
    let mut seen = Vec::new();
    for kind in ["vcpu", "legacy", "console", "rng"] {
        let pid = machine.process(kind);
        let expected = match users.exists() {
            true => users.first() + pid,
            false => nix::unistd::geteuid().as_raw(),
        };
        for key in ["Uid:", "Gid:"] {
            let text = proc_file(pid, "status");
            let ids = text
                .lines()
                .find_map(|line| line.strip_prefix(key))
                .unwrap();
            let ids: Vec<u32> = ids
                .split_whitespace()
                .map(|id| id.parse().unwrap())
                .collect();
            assert_eq!(ids, [expected; 4], "{kind} ({pid}), {key}");
        }
        assert!(!users.exists() || !seen.contains(&expected), "{kind}");
        seen.push(expected);
    }
    assert_eq!(machine.errors(), "");
}

#[test]
fn run_refuses_users_that_are_fewer_than_pids() {
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let scratch = configured("[host]\nusers = \"300000000-300000009\"\n");
    let file = scratch
        .path()
        .join("etc/bulkhead.toml")
        .display()
        .to_string();
    let ended = Machine::run_in(scratch, &["--kernel", guest.to_str().unwrap()]).wait();
    assert_eq!(ended.code, 2, "{}", ended.errors);
    let told = "host.users = \"300000000-300000009\": holds 10 ids, expected at least ";
    assert!(ended.errors.contains(&file), "{}", ended.errors);
    assert!(ended.errors.contains(told), "{}", ended.errors);
}

#[test]
fn users_that_do_not_exist_for_the_broker_are_told() {
    let scratch = configured("");
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let arguments = ["--kernel", guest.to_str().unwrap(), "--timeout=1s"];
    // Root of a user namespace that has one user.
    let unshare = Path::new("/usr/bin/unshare");
    let arguments = [&["run"], &arguments[..]].concat();
    let machine = Machine::followed(scratch, unshare, &["--user", "--map-root-user"], &arguments);
    machine.expect_error("user ids 1879048192-1883242495 do not exist in this user namespace");
}

/// What the file `unified`, or `separate` of the separate hierarchy of `controller`, says of the
/// process's group or one around it; None without that controller.
fn group_says(pid: u32, controller: &str, unified: &str, separate: &str) -> Option<String> {
    let groups = proc_file(pid, "cgroup");
    let path = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let has = controllers.split(',').any(|c| c == wanted);
            has.then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let root = Path::new("/sys/fs/cgroup");
    let separate_root = root.join(controller);
    let (mut at, file) = match path(controller) {
        Some(path) => (separate_root.join(path), separate),
        None => (root.join(path("")?).parent()?.to_owned(), unified),
    };
    if file == unified && !at.join(unified).exists() {
        at = root.join(path("")?);
    }
    fs::read_to_string(at.join(file)).ok()
}

/// Whether this host lets the user of this test limit processors.
fn can_limit_processors() -> bool {
    let share = HostShare {
        cpu_percent: Some(20),
        ..HostShare::default()
    };
    Place::find(Reach::Within).check(&share).is_ok()
}

/// The directory of a process's own group for processors, once it has one.
fn processor_group(pid: u32) -> PathBuf {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let groups = proc_file(pid, "cgroup");
        let own = groups.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            let relative = path.trim_start_matches('/');
            let root = Path::new("/sys/fs/cgroup");
            let at = match controllers.split(',').any(|c| c == "cpu") {
                true => root.join("cpu").join(relative),
                false if controllers.is_empty() => root.join(relative),
                false => return None,
            };
            let limits = at.join("cpu.cfs_quota_us").exists() || at.join("cpu.max").exists();
            (limits && path.contains("bulkhead")).then_some(at)
        });
        if let Some(own) = own {
            return own;
        }
        assert!(Instant::now() < deadline, "{groups}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Its processor time by the kernel, in microseconds of each period of 100 ms.
fn quota(group: &Path) -> String {
    let text = fs::read_to_string(group.join("cpu.cfs_quota_us"))
        .or_else(|_| fs::read_to_string(group.join("cpu.max")))
        .unwrap();
    text.split_whitespace().next().unwrap().to_owned()
}

fn members(group: &Path) -> String {
    fs::read_to_string(group.join("cgroup.procs")).unwrap()
}

/// Directories with policies that limit processes of these kinds.
fn with_policies(policies: &[(&str, &str)]) -> tempfile::TempDir {
    let scratch = configured("");
    let directory = scratch.path().join("etc/policies.d");
    fs::create_dir(&directory).unwrap();
    for (kind, limits) in policies {
        let text = format!("kind = \"{kind}\"\n[limits]\n{limits}\n");
        fs::write(directory.join(format!("{kind}.toml")), text).unwrap();
    }
    scratch
}

#[test]
fn process_takes_no_more_of_its_host_than_its_policy_says() {
    let disk = bulkhead_tests::disk(1 << 20);
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let scratch = with_policies(&[
        ("rng", "cpu_percent = 20"),
        ("blk", "cpu_percent = 150\ndisk_write_per_s = \"1MiB\""),
    ]);
    let disk = disk.path().to_str().unwrap();
    let guest = guest.to_str().unwrap();
    let arguments = ["--kernel", guest, "--cmdline", "mode=idle", "--disk", disk];
    let mut machine = Machine::run_in(scratch, &arguments);
    if !can_limit_processors() {
        machine.expect_error("cannot be in force: there is no cpu controller");
        assert_eq!(machine.wait().code, 4);
        return;
    }
    machine.expect("BH idle ");
    let (rng, blk) = (machine.process("rng"), machine.process("blk"));
    let groups = [rng, blk].map(processor_group);
    for (group, pid, expected) in [(&groups[0], rng, "20000"), (&groups[1], blk, "150000")] {
        assert_eq!(quota(group), expected, "{}", group.display());
        assert_eq!(members(group).trim(), pid.to_string());
    }
    // The groups of one process are made one after the other.
    let deadline = Instant::now() + Duration::from_secs(60);
    let write = || group_says(blk, "blkio", "io.max", "blkio.throttle.write_bps_device");
    while !write().is_some_and(|limits| limits.contains("1048576")) {
        assert!(Instant::now() < deadline, "{:?}", write());
        std::thread::sleep(Duration::from_millis(10));
    }
    // Nobody else's scheduling changes.
    for kind in ["vcpu", "legacy", "console"] {
        let text = proc_file(machine.process(kind), "cgroup");
        assert!(!text.contains(&format!("rng0.1-{rng}")), "{kind}: {text}");
        let separate = text.lines().find(|line| line.contains(":cpu:"));
        assert!(
            separate.is_none_or(|line| !line.contains("bulkhead")),
            "{kind}: {text}"
        );
    }
    machine.signal(Signal::SIGTERM);
    let _ended = machine.wait();
    for group in &groups {
        assert!(!group.exists(), "{} is left", group.display());
    }
}

#[test]
fn groups_of_limited_processes_outlive_their_daemon_and_go_with_their_processes() {
    if !can_limit_processors() {
        return;
    }
    let mut daemon = Daemon::start();
    let policies = daemon.scratch().join("etc/policies.d");
    fs::create_dir(&policies).unwrap();
    let text = "kind = \"rng\"\n[limits]\ncpu_percent = 20\n";
    fs::write(policies.join("rng.toml"), text).unwrap();
    // A daemon looks for the directory when it starts.
    daemon.crash();
    daemon.serve();
    daemon.create_and_start("web", "mode=idle", &[]);
    daemon.until_output("web", "BH idle ");
    let first = daemon.process("web", "rng");
    let group = processor_group(first);
    assert_eq!(quota(&group), "20000");

    daemon.crash();
    daemon.serve();
    daemon.until_state("web", "running");
    assert_eq!(daemon.process("web", "rng"), first);
    assert_eq!(
        (processor_group(first), quota(&group)),
        (group.clone(), "20000".into())
    );
    daemon.good(&["device", "restart", "web/rng"]);
    let second = daemon.process("web", "rng");
    let of_second = processor_group(second);
    assert_eq!(quota(&of_second), "20000");
    assert_eq!(members(&of_second).trim(), second.to_string());
    assert!(!group.exists(), "{} is left", group.display());
    daemon.good(&["kill", "web"]);
    daemon.until_state("web", "stopped");
    assert!(!of_second.exists(), "{} is left", of_second.display());
}

#[test]
fn policy_that_the_host_cannot_enforce_ends_the_run_before_the_guest() {
    let policies = with_policies(&[("console", "cpu_percent = 20")]);
    fs::set_permissions(policies.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let etc = policies.path().join("etc").display().to_string();
    if !nix::unistd::geteuid().is_root() && can_limit_processors() {
        // There is no user here who cannot.
        return;
    }
    // A user whom nobody has given a group.
    let arguments = ["--config-dir", &etc, "--cmdline", "mode=idle"];
    let ended = Machine::run_as(70_003, &arguments).wait();
    assert_eq!(ended.code, 4, "{}", ended.errors);
    let told = "[limits] of the policy of console cannot be in force: there is no cpu controller";
    assert!(ended.errors.contains(told), "{}", ended.errors);
    assert!(!ended.console.contains("BH idle"));
}

#[test]
fn machine_takes_no_more_of_its_host_than_its_file_says() {
    let disk = bulkhead_tests::disk(1 << 20);
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = format!(
        "[boot]\nkernel = {:?}\ncmdline = \"mode=idle\"\n[machine]\nmemory = \"64MiB\"\n\
         [[disk]]\npath = {:?}\n[limits]\ncpu_percent = 40\ncpu_weight = 50\n\
         disk_write_per_s = \"1MiB\"\n[vsock]\n",
        bulkhead_tests::path("BULKHEAD_TEST_GUEST"),
        disk.path(),
    );
    fs::write(file.path(), text).unwrap();
    let mut machine = Machine::run([file.path()]);
    if !can_limit_processors() {
        machine.expect_error("[limits] of the VM file cannot be in force: there is no ");
        return;
    }
    machine.expect("BH idle ");
    let groups = || KINDS.map(|kind| proc_file(machine.process(kind), "cgroup"));
    let deadline = Instant::now() + Duration::from_secs(20);
    // Groups are made a moment after the guest has started.
    while !groups().iter().all(|text| text.contains("/bulkhead/")) {
        let told = machine.errors();
        assert!(Instant::now() < deadline, "{:?}\n{told}", groups());
        std::thread::sleep(Duration::from_millis(20));
    }
    for kind in KINDS {
        let pid = machine.process(kind);
        let says = |unified, separate| group_says(pid, "cpu", unified, separate).unwrap();
        let quota = says("cpu.max", "cpu.cfs_quota_us");
        assert!(
            ["40000", "40000 100000"].contains(&quota.trim()),
            "{kind}: {quota}"
        );
        let weight = says("cpu.weight", "cpu.shares");
        assert!(["50", "512"].contains(&weight.trim()), "{kind}: {weight}");
    }
    let blk = machine.process("blk");
    let write = group_says(blk, "blkio", "io.max", "blkio.throttle.write_bps_device");
    let on_disk = !machine.errors().contains("no image is on a block device");
    assert_eq!(write.unwrap_or_default().contains("1048576"), on_disk);
}

/// The core-scheduling cookie of a process; None where there is no core scheduling.
fn cookie(pid: u32) -> Option<u64> {
    const PR_SCHED_CORE: i32 = 62;
    let mut cookie = 0u64;
    // SAFETY: command 0 writes eight bytes to `cookie`.
    let result = unsafe { libc::prctl(PR_SCHED_CORE, 0u64, u64::from(pid), 0u64, &raw mut cookie) };
    (result == 0).then_some(cookie)
}

#[test]
fn machine_shares_its_cores_with_no_other() {
    let ((one, _), (other, _)) = (idle(), idle());
    let cookies = |machine: &Machine| KINDS.map(|kind| cookie(machine.process(kind)));
    let (ours, theirs) = (cookies(&one), cookies(&other));
    if cookie(std::process::id()).is_none() {
        // Without core scheduling there is no cookie to have, and nobody was told otherwise.
        assert!(ours.iter().chain(&theirs).all(Option::is_none));
        assert!(!one.errors().contains("cookie"), "{}", one.errors());
        return;
    }
    assert!(ours[0].is_some_and(|cookie| cookie != 0));
    assert!(ours.iter().all(|cookie| *cookie == ours[0]), "{ours:?}");
    assert!(
        theirs.iter().all(|cookie| *cookie == theirs[0]),
        "{theirs:?}"
    );
    assert_ne!(ours[0], theirs[0]);
    assert_eq!(cookie(one.pid()), Some(0), "the broker shares with nobody");
}

#[test]
fn device_processes_give_up_store_bypass_where_there_is_a_switch() {
    let (machine, _disk) = idle();
    let line = |pid| {
        let text = proc_file(pid, "status");
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix("Speculation_Store_Bypass:"));
        line.unwrap_or_default().trim().to_owned()
    };
    let own = line(std::process::id());
    for kind in ["legacy", "console", "rng", "blk"] {
        let theirs = line(machine.process(kind));
        if own == "thread vulnerable" {
            assert_eq!(theirs, "thread force mitigated", "{kind}");
        } else {
            // The host has no switch, or has it on for all.
            assert_eq!(theirs, own, "{kind}");
        }
    }
}
