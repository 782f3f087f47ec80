//! A process is really launched, and the kernel is asked what became of it. Needs root.
#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead::launch::users::UserRange;
use bulkhead::launch::{Gift, Launched, Launcher};
use bulkhead_ipc::adoption::{bind_in, knock};
use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::control_page::{ControlPage, Phase};
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::adopt::{Adopt, Adopted};
use bulkhead_ipc::protocol::birth::{Birth, Born, DeviceConfig, DeviceOwn, FdRole, KindConfig};
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_ipc::window::{Window, WindowLayout};
use bulkhead_policies::cache::Compiled;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const QUEUES: [u16; 1] = [64];
const WINDOW_BYTES: u32 = 1 << 20;

fn binaries() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let directory = me.parent().and_then(|deps| deps.parent()).unwrap();
    assert!(
        directory.join("bulkhead-rng").exists(),
        "{} has no bulkhead-rng: run 'cargo build --workspace' first",
        directory.display()
    );
    directory.to_owned()
}

fn need_root() {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test shows how root is dropped, so it needs to be root"
    );
}

/// Launches an entropy device and sends its birth message.
fn rng(launcher: &mut Launcher, compiled: &Compiled) -> Launched {
    let home = tempfile::tempdir().unwrap();
    let (launched, birth) = unborn_rng(launcher, compiled, home.path());
    launched.bear(&birth).unwrap();
    launched
}

/// Launches an entropy device that can be found as `s` in `home`; its birth message.
fn unborn_rng(launcher: &mut Launcher, compiled: &Compiled, home: &Path) -> (Launched, Birth) {
    let (policy, filters) = compiled.get(ProcKind::Rng).unwrap();
    let home = File::open(home).unwrap();
    let adoption = bind_in(home.as_fd(), "s").unwrap();
    let id = ProcId {
        kind: ProcKind::Rng,
        index: 0,
        generation: 1,
    };
    let entropy = File::open("/dev/urandom").unwrap();
    let window = sealed_memfd("w", u64::from(WINDOW_BYTES)).unwrap();
    let layout = WindowLayout::new(WINDOW_BYTES as usize, &QUEUES).unwrap();
    Window::map(window.try_clone().unwrap(), layout)
        .unwrap()
        .initialise(1);
    let (kick, call) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let gift = |role, fd| Gift { role, index: 0, fd };
    let gifts = [
        gift(FdRole::Entropy, entropy.as_fd()),
        gift(FdRole::Window, window.as_fd()),
        gift(FdRole::Kick, kick.as_fd()),
        gift(FdRole::Call, call.as_fd()),
    ];
    let launched = launcher.launch(id, policy, &gifts, &adoption).unwrap();
    let birth = Birth {
        version: PROTOCOL_VERSION,
        id,
        vm: "test".to_owned(),
        token: [7; 32],
        grants: launched.grants.clone(),
        startup: filters.startup.clone(),
        locked: filters.locked.clone(),
        uring: filters.uring.clone(),
        config: KindConfig::Device(DeviceConfig {
            kind: VirtioKind::Rng,
            queue_sizes: QUEUES.to_vec(),
            window_bytes: WINDOW_BYTES,
            features: 0,
            config: Vec::new(),
            own: DeviceOwn::Rng,
        }),
    };
    (launched, birth)
}

fn log_of(launched: &Launched) -> String {
    use std::io::Read;
    let mut text = vec![0; 65536];
    let mut log = File::from(launched.log.try_clone().unwrap());
    let n = log.read(&mut text).unwrap_or(0);
    String::from_utf8_lossy(&text[..n]).into_owned()
}

fn await_locked(launched: &Launched) {
    let born = launched
        .control
        .recv_within::<Born>(Duration::from_secs(30));
    assert!(
        matches!(born, Ok((Born::Locked { .. }, _))),
        "{born:?}; before exec: {:?}; claims: {:?}; log: {}",
        launched.unborn(),
        launched.page.denial(),
        log_of(launched),
    );
}

fn status(pid: i32, key: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_default()
        .trim_start_matches(':')
        .trim()
        .to_owned()
}

fn kill(launched: &Launched) {
    let fd = launched.pidfd.as_raw_fd();
    let pid = nix::unistd::Pid::from_raw(launched.pid);
    assert!(fd >= 0);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    nix::sys::wait::waitpid(pid, None).unwrap();
}

#[test]
fn launched_process_is_what_its_policy_says() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let mut launcher = Launcher::new(&binaries(), UserRange::DEFAULT).unwrap();
    let begin = Instant::now();
    let launched = rng(&mut launcher, &compiled);
    await_locked(&launched);
    println!("from clone to locked: {:?}", begin.elapsed());
    let pid = launched.pid;

    for namespace in ["user", "pid", "mnt", "ipc", "uts", "cgroup", "net"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "Seccomp_filters"), "2");
    assert_eq!(status(pid, "Groups"), "");
    let user = UserRange::DEFAULT.user_of(u32::try_from(pid).unwrap());
    let user = user.unwrap().to_string();
    assert_eq!(status(pid, "Uid"), [user.as_str(); 4].join("\t"));
    assert_eq!(status(pid, "Gid"), [user.as_str(); 4].join("\t"));

    let mut fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| fs::read_link(entry.unwrap().path()).unwrap())
        .map(|target| target.display().to_string())
        .collect();
    fds.sort();
    println!("{fds:#?}");
    let count = |prefix: &str| fds.iter().filter(|f| f.starts_with(prefix)).count();
    assert_eq!(count("/dev/null"), 2);
    assert_eq!(count("/dev/urandom"), 1);
    // Both ends of the control channel and the adoption socket; both ends of the log.
    assert_eq!(count("socket:"), 3);
    assert_eq!(count("pipe:"), 2);
    assert_eq!(count("/memfd:bulkhead-page"), 2);
    assert!(count("/memfd:w") >= 1);
    assert_eq!(count("/"), 2 + 1 + count("/memfd:"));

    let root: Vec<_> = fs::read_dir(format!("/proc/{pid}/root")).unwrap().collect();
    assert!(root.is_empty(), "{root:?}");
    let write = File::create(format!("/proc/{pid}/root/x")).unwrap_err();
    assert_eq!(write.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    kill(&launched);
}

#[test]
fn no_two_processes_are_the_same_user() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let mut launcher = Launcher::new(&binaries(), UserRange::DEFAULT).unwrap();
    let begin = Instant::now();
    let all: Vec<Launched> = (0..5).map(|_| rng(&mut launcher, &compiled)).collect();
    println!("five launched after {:?}", begin.elapsed());
    for launched in &all {
        await_locked(launched);
    }
    println!("five locked after {:?}", begin.elapsed());
    let mut users: Vec<String> = all.iter().map(|l| status(l.pid, "Uid")).collect();
    users.sort();
    users.dedup();
    assert_eq!(users.len(), all.len());
    all.iter().for_each(kill);
}

#[test]
fn process_has_the_user_of_the_range_and_is_not_started_beyond_it() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let users: UserRange = "100000-4294967294".parse().unwrap();
    let mut launcher = Launcher::new(&binaries(), users).unwrap();
    let launched = rng(&mut launcher, &compiled);
    await_locked(&launched);
    let user = (100_000 + launched.pid).to_string();
    assert_eq!(status(launched.pid, "Uid"), [user.as_str(); 4].join("\t"));
    assert_eq!(status(launched.pid, "Gid"), [user.as_str(); 4].join("\t"));
    assert_eq!(launched.users, Some(users));
    kill(&launched);

    // As when the kernel was told of larger pids after the range was checked.
    let mut launcher = Launcher::new(&binaries(), "100000-100001".parse().unwrap()).unwrap();
    let home = tempfile::tempdir().unwrap();
    let (launched, _birth) = unborn_rng(&mut launcher, &compiled, home.path());
    let pid = nix::unistd::Pid::from_raw(launched.pid);
    nix::sys::wait::waitpid(pid, None).unwrap();
    let reason = launched.unborn().unwrap();
    assert!(reason.starts_with("BecomeUser"), "{reason}");
    assert!(reason.contains("ERANGE"), "{reason}");
}

#[test]
fn newborn_ends_with_a_broker_that_dies_before_its_birth() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let mut launcher = Launcher::new(&binaries(), UserRange::DEFAULT).unwrap();
    let home = tempfile::tempdir().unwrap();
    let (launched, _birth) = unborn_rng(&mut launcher, &compiled, home.path());
    let pid = nix::unistd::Pid::from_raw(launched.pid);
    drop(launched);
    let began = Instant::now();
    nix::sys::wait::waitpid(pid, None).unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "it waits in vain");
}

#[test]
fn process_lives_on_without_its_broker_and_serves_the_next_one() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let mut launcher = Launcher::new(&binaries(), UserRange::DEFAULT).unwrap();
    let home = tempfile::tempdir().unwrap();
    let (launched, birth) = unborn_rng(&mut launcher, &compiled, home.path());
    launched.bear(&birth).unwrap();
    let pid = launched.pid;
    await_locked(&launched);
    drop(launched);
    let directory = File::open(home.path()).unwrap();
    let adopt = |token| {
        let version = PROTOCOL_VERSION;
        knock(directory.as_fd(), "s", &Adopt { version, token }).unwrap()
    };
    let patience = Duration::from_secs(20);
    let refused = adopt([8; 32]).recv_within::<Adopted>(patience);
    assert!(refused.is_err(), "{refused:?}");
    // More often than it may have descriptors.
    for round in 0..100 {
        let answer = adopt([7; 32]);
        let (adopted, mut fds) = answer.recv_within::<Adopted>(patience).unwrap();
        assert_eq!((adopted.id, fds.len()), (birth.id, 3));
        let page = ControlPage::map(fds.remove(1)).unwrap();
        assert_eq!(page.phase(), Phase::Locked);
        let control = Channel::from(fds.remove(0));
        control.send(&ToDevice::Ping(round), &[]).unwrap();
        let (answer, _) = control.recv_within::<FromDevice>(patience).unwrap();
        assert_eq!(answer, FromDevice::Pong(round));
        if round == 99 {
            control.send(&ToDevice::Shutdown, &[]).unwrap();
        }
    }
    let pid = nix::unistd::Pid::from_raw(pid);
    let status = nix::sys::wait::waitpid(pid, None).unwrap();
    assert_eq!(status, nix::sys::wait::WaitStatus::Exited(pid, 0));
}

#[test]
fn program_that_cannot_be_executed_is_explained() {
    need_root();
    let compiled = Compiled::fresh(None, false).unwrap();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bulkhead-rng"), b"not a program").unwrap();
    let mut launcher = Launcher::new(dir.path(), UserRange::DEFAULT).unwrap();
    // It is dead before it could be given anything.
    let home = tempfile::tempdir().unwrap();
    let (launched, _birth) = unborn_rng(&mut launcher, &compiled, home.path());
    let pid = nix::unistd::Pid::from_raw(launched.pid);
    nix::sys::wait::waitpid(pid, None).unwrap();
    assert_eq!(
        launched.unborn().unwrap(),
        "Execute before exec: EACCES: Permission denied"
    );
}
