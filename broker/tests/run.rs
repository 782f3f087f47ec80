//! Machines are really run: every process, a real guest of a few instructions, root and KVM.
#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

mod tiny_guest;

use bulkhead::launch::cgroup::Reach;
use bulkhead::launch::users::UserRange;
use bulkhead::vm::run;
use bulkhead::vm::session::{Command, Ending, Event, Finished, RunError, RunOptions};
use bulkhead::vm::spec::{DiskSpec, KernelSource, OnEnd, VmSpec};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{DiskLimits, ImageFormat};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tiny_guest::Guest;
use tokio::sync::mpsc;

fn binaries() -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let directory = me.parent().and_then(|deps| deps.parent()).unwrap();
    assert!(
        directory.join("bulkhead-vcpu").exists(),
        "{} has no bulkhead-vcpu: run 'cargo build --workspace' first",
        directory.display()
    );
    directory.to_owned()
}

fn options(directory: &Path) -> RunOptions {
    RunOptions {
        binaries: binaries(),
        policies: None,
        allow_looser_policy: false,
        cache: Some(directory.join("cache")),
        state: directory.join("state"),
        runtime: directory.join("run"),
        core: None,
        reach: Reach::Within,
        reboot: true,
        id: None,
        users: UserRange::DEFAULT,
        networks: bulkhead::network::board::Switchboard::default(),
    }
}

fn spec(directory: &Path, guest: Guest) -> VmSpec {
    assert!(
        nix::unistd::geteuid().is_root() && Path::new("/dev/kvm").exists(),
        "this test runs real machines, so it needs root and /dev/kvm"
    );
    let disk = directory.join("disk.img");
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let kernel = KernelSource::Image {
        name: "tiny".into(),
        bytes: guest.elf().into(),
    };
    let mut spec = VmSpec::new("test", kernel);
    spec.memory_bytes = 32 << 20;
    spec.limits.run_timeout = Some(Duration::from_secs(30));
    spec.disks.push(DiskSpec {
        name: "disk".into(),
        path: disk,
        read_only: false,
        ephemeral: false,
        serial: "serial".into(),
        format: ImageFormat::Raw,
        extents: Vec::new(),
        backing: Vec::new(),
        limits: DiskLimits::default(),
        shareable: false,
        queues: 1,
        bytes_min: 0,
    });
    spec
}

/// What was seen of a run.
struct Seen {
    result: Result<Finished, RunError>,
    events: Vec<Event>,
    serial: Vec<u8>,
    took: Duration,
}

/// Runs `spec`; `on_event` may send commands.
fn watch(
    spec: &VmSpec,
    options: &RunOptions,
    mut on_event: impl FnMut(&Event, &mpsc::Sender<Command>),
) -> Seen {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .unwrap();
    let began = Instant::now();
    let (result, events, serial) = runtime.block_on(async {
        let (commander, commands) = mpsc::channel(16);
        let (sender, mut receiver) = mpsc::channel(256);
        let listen = async {
            let mut events = Vec::new();
            let mut serial = Vec::new();
            let mut consoles = None;
            while let Some(event) = receiver.recv().await {
                on_event(&event, &commander);
                match event {
                    Event::Consoles(ends) => consoles = Some(ends),
                    other => events.push(other),
                }
            }
            let mut buffer = [0; 4096];
            while let Some(ends) = &mut consoles {
                let got = ends.serial.output.read(&mut buffer).unwrap();
                serial.extend_from_slice(&buffer[..got.bytes]);
                if got.bytes == 0 {
                    break;
                }
            }
            (events, serial)
        };
        let (result, (events, serial)) = tokio::join!(run(spec, options, commands, sender), listen);
        (result, events, serial)
    });
    Seen {
        result,
        events,
        serial,
        took: began.elapsed(),
    }
}

fn ending(seen: &Seen) -> &Ending {
    match &seen.result {
        Ok(finished) => &finished.ending,
        Err(error) => panic!("{error}; {:#?}", seen.events),
    }
}

fn no_process_is_left(seen: &Seen) {
    for event in &seen.events {
        if let Event::Started { pid, .. } = event {
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{event:?}");
        }
    }
}

#[test]
fn guest_prints_and_powers_off() {
    let dir = tempfile::tempdir().unwrap();
    let options = options(dir.path());
    for _ in 0..3 {
        let seen = watch(&spec(dir.path(), Guest::PowerOff), &options, |event, _| {
            if let Event::Locked { id, after, .. } = event {
                println!("{id} locked after {after:?}");
            }
        });
        println!("took {:?}", seen.took);
        assert_eq!(*ending(&seen), Ending::PoweredOff);
        assert_eq!(seen.serial, b"!");
        no_process_is_left(&seen);
    }
}

#[test]
fn reset_starts_again_in_new_processes_until_it_may_not() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path(), Guest::Reset);
    spec.limits.restarts_max = 2;
    let seen = watch(&spec, &options(dir.path()), |_, _| {});
    assert_eq!(*ending(&seen), Ending::PoweredOff);
    assert_eq!(seen.serial, b"!!!", "output goes on where it was");
    let vcpus = seen.events.iter().filter_map(|event| match event {
        Event::Started { id, pid, .. } if id.kind == ProcKind::Vcpu => Some((id.generation, *pid)),
        _ => None,
    });
    let vcpus: Vec<(u32, i32)> = vcpus.collect();
    assert_eq!(vcpus.iter().map(|v| v.0).collect::<Vec<_>>(), [1, 2, 3]);
    no_process_is_left(&seen);

    spec.lifecycle.on_reboot = OnEnd::Destroy;
    let seen = watch(&spec, &options(dir.path()), |_, _| {});
    assert_eq!((ending(&seen), seen.serial.len()), (&Ending::PoweredOff, 1));
}

#[test]
fn debug_exit_has_its_value() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), Guest::DebugExit(5));
    let seen = watch(&spec, &options(dir.path()), |_, _| {});
    assert_eq!(*ending(&seen), Ending::DebugExit(5));
}

#[test]
fn triple_fault_is_told_with_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), Guest::TripleFault);
    let seen = watch(&spec, &options(dir.path()), |_, _| {});
    assert_eq!(*ending(&seen), Ending::TripleFault);
    let report = seen.result.unwrap().report.unwrap();
    assert!(report.contains("rip"), "{report}");
}

#[test]
fn killed_paused_and_timed_out_machines_end_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path(), Guest::Spin);
    let seen = watch(&spec, &options(dir.path()), |event, to| match event {
        Event::AllLocked { .. } => to.try_send(Command::Pause).unwrap(),
        Event::Paused => to.try_send(Command::Resume).unwrap(),
        Event::Resumed => to.try_send(Command::Kill).unwrap(),
        _ => {}
    });
    assert_eq!(*ending(&seen), Ending::Killed, "{:#?}", seen.events);
    no_process_is_left(&seen);

    spec.limits.run_timeout = Some(Duration::from_millis(500));
    let seen = watch(&spec, &options(dir.path()), |_, _| {});
    assert!(matches!(ending(&seen), Ending::TimedOut(_)));
    assert!(seen.took < Duration::from_secs(10), "{:?}", seen.took);
    no_process_is_left(&seen);
}

/// Kills the process of `kind` when every process is locked.
fn losing(kind: ProcKind, guest: Guest) -> Seen {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), guest);
    let mut victim = 0;
    let seen = watch(&spec, &options(dir.path()), |event, _| match event {
        Event::Started { id, pid, .. } if id.kind == kind => victim = *pid,
        Event::AllLocked { .. } => {
            kill(victim);
        }
        _ => {}
    });
    no_process_is_left(&seen);
    seen
}

fn kill(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

#[test]
fn killed_device_is_followed_by_another_and_the_machine_is_whole() {
    for kind in [
        ProcKind::Blk,
        ProcKind::Rng,
        ProcKind::Console,
        ProcKind::Legacy,
    ] {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path(), Guest::Spin);
        let mut pid_now = 0;
        let mut left = 5;
        let seen = watch(&spec, &options(dir.path()), |event, to| match event {
            Event::Started { id, pid, .. } if id.kind == kind => pid_now = *pid,
            Event::AllLocked { .. } => kill(pid_now),
            Event::Restarted(_) => {
                left -= 1;
                match left {
                    0 => to.try_send(Command::Kill).unwrap(),
                    _ => kill(pid_now),
                }
            }
            _ => {}
        });
        assert_eq!(*ending(&seen), Ending::Killed);
        no_process_is_left(&seen);
        let finished = seen.result.unwrap();
        assert!(finished.degraded.is_empty(), "{finished:?}");
        assert_eq!(finished.restarts.len(), 5);
        for (restart, generation) in finished.restarts.iter().zip(2..) {
            println!("{} serves after {:?}", restart.id, restart.after);
            assert_eq!((restart.id.kind, restart.id.generation), (kind, generation));
            let expected = format!("bulkhead-{kind} was killed by SIGKILL, while serving");
            assert_eq!(restart.reason, expected);
            assert_eq!(restart.program, env!("CARGO_PKG_VERSION"));
        }
    }
}

#[test]
fn device_that_dies_too_often_is_given_up_and_comes_back_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), Guest::Spin);
    let mut pid_now = 0;
    let mut given_up = false;
    let seen = watch(&spec, &options(dir.path()), |event, to| match event {
        Event::Started { id, pid, .. } if id.kind == ProcKind::Blk => pid_now = *pid,
        Event::AllLocked { .. } => kill(pid_now),
        Event::Restarted(_) if given_up => to.try_send(Command::Kill).unwrap(),
        Event::Restarted(_) => {
            // Not at once: a process that dies before it has served for a while waits for its successor.
            let victim = pid_now;
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(12));
                kill(victim);
            });
        }
        Event::Degraded { name, .. } => {
            given_up = true;
            to.try_send(Command::RestartDevice("rgn".into())).unwrap();
            to.try_send(Command::RestartDevice(name.clone())).unwrap();
        }
        _ => {}
    });
    assert_eq!(*ending(&seen), Ending::Killed);
    no_process_is_left(&seen);
    let refused =
        |e: &&Event| matches!(e, Event::Refused { command, .. } if command == "restart rgn");
    assert_eq!(seen.events.iter().filter(refused).count(), 1);
    let finished = seen.result.unwrap();
    let [(name, reason)] = finished.degraded.as_slice() else {
        panic!("{finished:?}");
    };
    assert!(
        name == "disk" && reason.contains("restarted 100 times"),
        "{reason}"
    );
    assert_eq!(finished.restarts.len(), 101);
}

#[test]
fn lost_vcpu_process_ends_the_machine() {
    let seen = losing(ProcKind::Vcpu, Guest::Spin);
    let Ending::Lost { reason } = ending(&seen) else {
        panic!("{:?}", seen.result);
    };
    assert_eq!(reason, "bulkhead-vcpu was killed by SIGKILL, while serving");
    assert_eq!(ending(&seen).exit_code(), 14);
}

#[test]
fn second_machine_on_a_disk_is_refused_before_anything_is_started() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), Guest::Spin);
    let mut second = None;
    let seen = watch(&spec, &options(dir.path()), |event, to| {
        if matches!(event, Event::AllLocked { .. }) {
            let (spec, directory) = (spec.clone(), dir.path().to_owned());
            let other = std::thread::spawn(move || {
                let options = options(&directory.join("second"));
                watch(&spec, &options, |_, _| {})
            });
            second = Some(other.join().unwrap());
            to.try_send(Command::Kill).unwrap();
        }
    });
    assert_eq!(*ending(&seen), Ending::Killed);
    let second = second.unwrap();
    let error = second.result.unwrap_err();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(
        text.contains("is in use: process") && text.contains("(bulkhead-blk)"),
        "{text}"
    );
    let started = |event: &Event| matches!(event, Event::Started { .. });
    assert!(!second.events.iter().any(started));
}

#[test]
fn processes_have_control_groups_where_the_host_has_them_and_leave_none() {
    use bulkhead::launch::cgroup::Place;
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), Guest::Spin);
    let mut pids = Vec::new();
    let mut groups = Vec::new();
    let seen = watch(&spec, &options(dir.path()), |event, to| match event {
        Event::Started { pid, .. } => pids.push(*pid),
        Event::AllLocked { .. } => to.try_send(Command::Pause).unwrap(),
        Event::Paused => {
            let of = |pid| std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
            groups = pids.iter().map(of).collect();
            to.try_send(Command::Kill).unwrap();
        }
        _ => {}
    });
    assert_eq!(*ending(&seen), Ending::Killed);
    let expected = Place::find(Reach::Within) != Place::default();
    let named = |line: &&str| line.contains(&format!("/bulkhead/{}-", spec.name));
    for group in &groups {
        assert_eq!(group.lines().any(|line| named(&line)), expected, "{group}");
    }
    assert_eq!(groups.len(), 5);
    for line in groups.iter().flat_map(|group| group.lines()).filter(named) {
        let path = line.splitn(3, ':').nth(2).unwrap().trim_start_matches('/');
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let at = hierarchy.path().join(path);
            assert!(!at.exists(), "{} is left", at.display());
        }
    }
}

#[test]
fn missing_program_is_a_failed_start() {
    let dir = tempfile::tempdir().unwrap();
    let options = RunOptions {
        binaries: dir.path().to_owned(),
        ..options(dir.path())
    };
    let seen = watch(&spec(dir.path(), Guest::PowerOff), &options, |_, _| {});
    let error = seen.result.unwrap_err();
    assert_eq!(error.exit_code(), 6);
    assert!(error.to_string().contains("bulkhead-vcpu"), "{error}");
}
