//! Everything that a machine may do, in as few and as short runs as that takes.

use super::stage::{Clock, Stage};
use bulkhead::launch::users::UserRange;
use bulkhead::vm::session::{Command, EVENTS_CAPACITY, Ending, Event};
use bulkhead::vm::take_over;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_tests::network::{self, Network};
use bulkhead_tests::{Ended, Machine, kill, tool};
use nix::sys::signal::Signal;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::{NamedTempFile, TempDir};
use tokio::sync::mpsc;

/// One run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) clock: Clock,
    /// A call that is denied in it, so that the process reports and ends.
    pub(crate) denies: Option<(ProcKind, &'static str, &'static str)>,
    /// A process that may have so few descriptors that its start fails, after it has mapped what it shares.
    pub(crate) starves: Option<(ProcKind, u32)>,
    pub(crate) play: fn(&Stage),
}

/// All of them; where several need a grant, the first is the one that is tried without it.
pub(crate) const SCENARIOS: &[Scenario] = &[
    plain("a disk served by a ring", disk_on_a_ring),
    plain("a disk in memory", disk_in_memory),
    plain("a disk that is an image", disk_image),
    plain("an image is converted", image_is_converted),
    plain("a damaged image is not converted", damaged_image_is_not),
    plain(
        "entropy, legacy devices, consoles, several CPUs",
        other_devices,
    ),
    plain("sockets of both sides", sockets),
    plain("a shared folder", shared_folder),
    plain("a network device", network_device),
    plain("a console that is typed at", typed_at),
    plain("a guest that resets", resets),
    plain("a guest that crashes, with a core", crashes),
    plain("instructions that KVM lacks", lacking_instructions),
    plain("each device dies and is replaced", devices_die),
    plain("another broker pauses, resumes and stops", next_broker),
    plain("the longest chains on many disks", longest_chains),
    without_vdso("every device where clocks take a system call", every_device),
    without_vdso("sockets where clocks take a system call", sockets),
    without_vdso(
        "another broker where clocks take a system call",
        next_broker,
    ),
    starved("blk cannot start", ProcKind::Blk, 14),
    starved("console cannot start", ProcKind::Console, 17),
    starved("rng cannot start", ProcKind::Rng, 14),
    starved("vsock cannot start", ProcKind::Vsock, 14),
    starved("fs cannot start", ProcKind::Fs, 14),
    starved("net cannot start", ProcKind::Net, 14),
    denied("blk reports a denial", ProcKind::Blk, "main", "epoll_wait"),
    Scenario {
        denies: Some((ProcKind::Image, "main", "fdatasync")),
        ..plain("work on images reports a denial", conversion_is_denied)
    },
    denied(
        "console reports a denial",
        ProcKind::Console,
        "main",
        "epoll_wait",
    ),
    denied("rng reports a denial", ProcKind::Rng, "main", "epoll_wait"),
    denied("fs reports a denial", ProcKind::Fs, "main", "epoll_wait"),
    denied(
        "vsock reports a denial",
        ProcKind::Vsock,
        "main",
        "epoll_wait",
    ),
    denied("net reports a denial", ProcKind::Net, "main", "epoll_wait"),
    denied(
        "legacy reports a denial",
        ProcKind::Legacy,
        "main",
        "epoll_wait",
    ),
    denied(
        "the control thread reports a denial",
        ProcKind::Vcpu,
        "main",
        "ppoll",
    ),
    denied(
        "the gate thread reports a denial",
        ProcKind::Vcpu,
        "gate",
        "epoll_wait",
    ),
    denied(
        "a vCPU thread reports a denial",
        ProcKind::Vcpu,
        "vcpu",
        "ioctl",
    ),
    denied(
        "a vCPU thread with quirks reports a denial",
        ProcKind::Vcpu,
        "vcpu-quirks",
        "ioctl",
    ),
];

const fn plain(name: &'static str, play: fn(&Stage)) -> Scenario {
    Scenario {
        name,
        clock: Clock::AsItIs,
        denies: None,
        starves: None,
        play,
    }
}

const fn without_vdso(name: &'static str, play: fn(&Stage)) -> Scenario {
    Scenario {
        clock: Clock::WithoutVdso,
        ..plain(name, play)
    }
}

const fn denied(
    name: &'static str,
    kind: ProcKind,
    thread: &'static str,
    call: &'static str,
) -> Scenario {
    Scenario {
        denies: Some((kind, thread, call)),
        ..plain(name, reports_a_denial)
    }
}

const fn starved(name: &'static str, kind: ProcKind, descriptors: u32) -> Scenario {
    Scenario {
        starves: Some((kind, descriptors)),
        ..plain(name, cannot_start)
    }
}

/// A disk on a file system that is no memory, so that it is served by a ring.
fn on_a_ring() -> NamedTempFile {
    let disk = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    disk.as_file().set_len(8 << 20).unwrap();
    disk
}

fn in_memory() -> NamedTempFile {
    let disk = NamedTempFile::new_in("/dev/shm").unwrap();
    disk.as_file().set_len(8 << 20).unwrap();
    disk
}

fn path(file: &NamedTempFile) -> &str {
    file.path().to_str().unwrap()
}

/// The machine ends as its guest wants, which has found no error.
fn good(machine: Machine) {
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

fn disk_on_a_ring(stage: &Stage) {
    let disk = on_a_ring();
    good(stage.guest("mode=blk", &["--disk", path(&disk)]));
}

fn disk_in_memory(stage: &Stage) {
    let disk = in_memory();
    good(stage.guest("mode=blk", &["--disk", path(&disk)]));
}

/// Clusters so large that their tables do not fit the heap that a process starts with.
fn disk_image(stage: &Stage) {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("d.qcow2");
    let image = image.to_str().unwrap();
    let options = ["-o", "cluster_size=1M", image, "64M"];
    tool(
        "qemu-img",
        &[&["create", "-q", "-f", "qcow2"], &options[..]].concat(),
    );
    let disk = format!("{image},format=qcow2");
    good(stage.guest("mode=blk", &["--disk", &disk]));
}

/// A directory with an image `a.qcow2` that is compressed, and its path and that of `b.img` beside it.
fn packed_image() -> (TempDir, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (packed, made) = (path("a.qcow2"), path("b.img"));
    // What deflate makes smaller, and what takes a heap of some size.
    let bytes: Vec<u8> = (0..4u32 << 20).map(|n| (n >> 9).to_le_bytes()[0]).collect();
    fs::write(&made, bytes).unwrap();
    tool(
        "qemu-img",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "cluster_size=1M",
            &made,
            &packed,
        ],
    );
    fs::remove_file(&made).unwrap();
    (directory, packed, made)
}

fn convert(stage: &Stage, packed: &str, made: &str) -> Ended {
    let arguments = [
        "image", "convert", packed, made, "--from", "qcow2", "--to", "raw",
    ];
    stage.verb(&arguments).wait()
}

fn image_is_converted(stage: &Stage) {
    let (_directory, packed, made) = packed_image();
    let ended = convert(stage, &packed, &made);
    assert_eq!(ended.code, 0, "{ended:?}");
}

fn damaged_image_is_not(stage: &Stage) {
    let (_directory, packed, made) = packed_image();
    let mut bytes = fs::read(&packed).unwrap();
    // Behind the tables: compressed data.
    let from = bytes.len() - 2000;
    bytes[from..].fill(0xff);
    fs::write(&packed, bytes).unwrap();
    let ended = convert(stage, &packed, &made);
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.errors.contains("Input/output error"), "{ended:?}");
}

fn conversion_is_denied(stage: &Stage) {
    let (_directory, packed, made) = packed_image();
    let ended = convert(stage, &packed, &made);
    assert_eq!(ended.code, 6, "{ended:?}");
    assert!(
        ended.errors.contains("is not granted to thread"),
        "{ended:?}"
    );
}

fn other_devices(stage: &Stage) {
    good(stage.guest("mode=rng,legacy,console,smp,memory,hello", &["-c", "4"]));
}

/// A client of the host is answered by the guest, and the guest by a listener of the host.
fn sockets(stage: &Stage) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let listener = UnixListener::bind(directory.path().join("s_5000")).unwrap();
    let vsock = format!("--vsock={}", socket.display());
    let load = "mode=vsock-echo,vsock-ask count=1 size=256k timeout=20";
    let mut machine = stage.guest(load, &[&vsock]);
    machine.expect("BH vsock-echo.ready");
    let mut client = UnixStream::connect(&socket).unwrap();
    let patience = Some(Duration::from_secs(20));
    client.set_read_timeout(patience).unwrap();
    client.write_all(b"CONNECT 5000\nhello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    let read = client.read_to_string(&mut answer);
    assert!(
        answer.starts_with("OK ") && answer.ends_with("\nhello"),
        "{read:?} {answer}"
    );
    std::thread::spawn(move || {
        let (mut from, _) = listener.accept().unwrap();
        let mut to = from.try_clone().unwrap();
        let _cut = std::io::copy(&mut from, &mut to);
        let _gone = to.shutdown(Shutdown::Write);
        let _end = from.read(&mut [0; 1]);
    });
    let ended = machine.wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended.console.contains("BH vsock-ask.end whole=1 "),
        "{ended:?}"
    );
}

fn shared_folder(stage: &Stage) {
    let folder = tempfile::tempdir().unwrap();
    let share = ["--share", folder.path().to_str().unwrap()];
    good(stage.guest("mode=share,hello timeout=60", &share));
}

/// A network device in a network of its own.
const NET: [&str; 2] = ["--net", "tap=tap0"];

fn network_device(stage: &Stage) {
    let network = Network::enter().unwrap();
    let mut machine = stage.guest("mode=net seconds=3 size=100k", &NET);
    machine.expect("BH net.ready");
    network.address("tap0", "10.0.0.1/24");
    network::ping("10.0.0.2");
    network::give("10.0.0.2", 100_000);
    good(machine);
}

fn typed_at(stage: &Stage) {
    let load = "mode=console lines=2 count=2 timeout=60";
    let mut machine = stage.guest(load, &["--console", "virtio"]);
    machine.type_keys("one\ntwo\n");
    machine.expect("echo: one");
    machine.expect("echo: two");
    assert_eq!(machine.wait().code, 0);
}

fn resets(stage: &Stage) {
    let mut machine = stage.guest("mode=hello end=reset", &[]);
    machine.expect("BH done");
    machine.expect("BH done");
    machine.signal(Signal::SIGTERM);
    assert_eq!(machine.wait().code, 12);
}

fn crashes(stage: &Stage) {
    let directory = tempfile::tempdir().unwrap();
    let core = directory.path().join("core");
    let more = ["-c", "2", "--core", core.to_str().unwrap()];
    let ended = stage.guest("mode=hello end=triple", &more).wait();
    assert_eq!(ended.code, 10, "{ended:?}");
    assert!(
        ended.errors.contains("the core file is complete"),
        "{ended:?}"
    );
}

fn lacking_instructions(stage: &Stage) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = assembled(&directory);
    let kernel = ["--kernel", &kernel, "-m", "32MiB", "--timeout=60s"];
    let ended = stage.run(&kernel).wait();
    assert_eq!(ended.code, 0, "{ended:?}");
}

fn assembled(directory: &TempDir) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("policy/grants/quirks.s");
    let object = directory.path().join("kernel.o");
    let kernel = directory.path().join("kernel.elf");
    let (object, kernel) = (object.to_str().unwrap(), kernel.to_str().unwrap());
    tool("as", &["--32", "-o", object, source.to_str().unwrap()]);
    let place = ["-m", "elf_i386", "-N", "-Ttext=0x100000", "-e", "_start"];
    tool("ld", &[&place[..], &["-o", kernel, object]].concat());
    kernel.to_owned()
}

fn devices_die(stage: &Stage) {
    let disk = on_a_ring();
    let load = "mode=rng,blk-load,legacy,console seconds=2 qd=32 timeout=60";
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().to_str().unwrap();
    let _network = Network::enter().unwrap();
    let more = [&["--disk", path(&disk), "--share", share], &NET[..]].concat();
    let mut machine = stage.guest(load, &more);
    machine.expect("BH blk-load.begin");
    for (n, kind) in (1..).zip(["blk", "rng", "console", "fs", "legacy", "net"]) {
        kill(machine.process(kind));
        machine.expect_restarts(n);
    }
    good(machine);
}

fn every_device(stage: &Stage) {
    let (ring, memory) = (on_a_ring(), in_memory());
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().to_str().unwrap();
    let disks = [
        "--disk",
        path(&ring),
        "--disk",
        path(&memory),
        "--share",
        share,
        "-c",
        "2",
    ];
    let _network = Network::enter().unwrap();
    let devices = [&disks, &NET[..]].concat();
    // So many names that what the folder's process knows of them does not fit what its heap begins with.
    let modes = "mode=blk,rng,share,legacy,console,smp names=4000 timeout=100";
    good(stage.guest(modes, &devices));
}

fn longest_chains(stage: &Stage) {
    let disks: Vec<NamedTempFile> = (0..8).map(|_| in_memory()).collect();
    let more: Vec<&str> = disks
        .iter()
        .flat_map(|disk| ["--disk", path(disk)])
        .collect();
    good(stage.guest("mode=fuzz iterations=100", &more));
}

fn next_broker(stage: &Stage) {
    let disk = in_memory();
    let folder = tempfile::tempdir().unwrap();
    let share = folder.path().to_str().unwrap();
    let _network = Network::enter().unwrap();
    let more = [
        "--vsock",
        "--disk",
        path(&disk),
        "--share",
        share,
        "--name=web",
    ];
    let more = [&more, &NET[..]].concat();
    let mut machine = stage.guest("mode=button", &more);
    machine.expect("BH button.ready");
    for kind in ProcKind::OF_EVERY_MACHINE
        .into_iter()
        .chain([ProcKind::Net])
    {
        let _locked = machine.process(kind.name());
    }
    machine.expect_phase("running");
    machine.kill_broker();
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut ending = adopt(stage, &machine);
    // Threads of the dead broker may still be on their way out, and with them its lock.
    while ending.is_none()
        && machine.runtime().join("vms/web").exists()
        && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(50));
        ending = adopt(stage, &machine);
    }
    assert_eq!(ending, Some(Ending::PoweredOff), "{}", stage.said());
}

/// Takes the machine over, pauses it, has it go on, and presses its power button.
fn adopt(stage: &Stage, machine: &Machine) -> Option<Ending> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (commander, asked) = mpsc::channel(16);
    commander.try_send(Command::Pause).unwrap();
    let (events, mut heard) = mpsc::channel(EVENTS_CAPACITY);
    runtime.block_on(async {
        let listen = async {
            while let Some(event) = heard.recv().await {
                let next = match event {
                    Event::Paused => Some(Command::Resume),
                    Event::Resumed => Some(Command::PowerButton),
                    Event::Denied { id, denial, .. } => {
                        stage.hear(&format!("{id}: {denial}"));
                        None
                    }
                    _ => None,
                };
                let _asked = next.map(|command| commander.try_send(command));
            }
        };
        let directory = machine.runtime();
        let (finished, ()) = tokio::join!(
            take_over(&directory, "web", None, UserRange::DEFAULT, asked, events),
            listen
        );
        match finished {
            Ok(finished) => Some(finished.ending),
            Err(error) => {
                stage.hear(&error.to_string());
                None
            }
        }
    })
}

/// The policy denies what the process cannot do without: it says so, and ends by itself.
fn reports_a_denial(stage: &Stage) {
    let (disk, folder) = (on_a_ring(), tempfile::tempdir().unwrap());
    let share = folder.path().to_str().unwrap();
    let _network = Network::enter().unwrap();
    let devices = ["--vsock", "--disk", path(&disk), "--share", share];
    let machine = stage.guest("mode=idle", &[&devices, &NET[..]].concat());
    machine.expect_error("is not granted to thread");
    machine.expect_error("was stopped by the kernel");
    machine.signal(Signal::SIGTERM);
    drop(machine.wait());
}

/// A process that cannot start says why, for which it first gives up what it had.
fn cannot_start(stage: &Stage) {
    let (disk, folder) = (on_a_ring(), tempfile::tempdir().unwrap());
    let share = folder.path().to_str().unwrap();
    let _network = Network::enter().unwrap();
    let devices = ["--vsock", "--disk", path(&disk), "--share", share];
    let devices = [&devices, &NET[..]].concat();
    let ended = stage.guest("mode=idle seconds=60", &devices).wait();
    assert_eq!(ended.code, 6, "{ended:?}");
    assert!(ended.errors.contains("Too many open files"), "{ended:?}");
}
