//! The terminal is raw while a console is attached and as before on every way out.
//!
//! The test starts itself again as the foreground program of a pseudo-terminal; the child attaches
//! its console and leaves in the way that it is told.
#![allow(
    unsafe_code,
    clippy::disallowed_methods,
    clippy::tests_outside_test_module,
    reason = "an integration test that starts a child on a terminal of its own"
)]

use bulkhead::console::attach::{Streams, UserEvent, attach};
use bulkhead::console::keys::Keys;
use bulkhead::vm::session::ConsoleEnds;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputWriter};
use bulkhead_ipc::output_ring::{self, OutputReader};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, Termios, tcgetattr};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const WAY: &str = "BULKHEAD_TEST_WAY_OUT";

/// Not a test of its own: the child's side of the others.
#[test]
fn child_leaves_as_it_is_told() {
    let Ok(way) = std::env::var(WAY) else { return };
    let file = tempfile::tempfile().unwrap();
    output_ring::create(&file, 4096).unwrap();
    let ends = ConsoleEnds {
        output: OutputReader::new(file).unwrap(),
        output_bell: Doorbell::new().unwrap(),
        input: InputWriter::map(sealed_memfd("keys", INPUT_RING_BYTES).unwrap()).unwrap(),
        input_bell: Doorbell::new().unwrap(),
    };
    let (tell, told) = std::sync::mpsc::sync_channel(16);
    let attached = attach(
        ends,
        Streams::standard().unwrap(),
        Keys::new(Some(0x1d)),
        move |event| {
            let _full = tell.try_send(event);
        },
    )
    .unwrap();
    match way.as_str() {
        "return" => drop(attached),
        "panic" => panic!("as told"),
        "abort" => std::process::abort(),
        "escape" => {
            while told.recv_timeout(Duration::from_secs(10)).unwrap() != UserEvent::Leave {}
            drop(attached);
        }
        _ => std::thread::sleep(Duration::from_secs(20)),
    }
}

struct Rig {
    master: File,
    slave: OwnedFd,
    before: Termios,
    child: Child,
}

fn start(way: &str) -> Rig {
    let pty = nix::pty::openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    let end = || pty.slave.try_clone().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "child_leaves_as_it_is_told", "--nocapture"])
        .env(WAY, way)
        .stdin(end())
        .stdout(end())
        .stderr(end());
    let take_terminal = || {
        nix::unistd::setsid()?;
        // SAFETY: the request takes an integer and touches no memory of this process.
        match unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // SAFETY: both calls in it are async-signal-safe.
    unsafe { command.pre_exec(take_terminal) };
    Rig {
        child: command.spawn().unwrap(),
        master: pty.master.into(),
        slave: pty.slave,
        before,
    }
}

impl Rig {
    fn is_raw(&self) -> bool {
        let now = tcgetattr(&self.slave).unwrap();
        !now.local_flags
            .intersects(LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::ECHO)
    }

    fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < Duration::from_secs(30), "never {what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn ends_restored(mut self) -> std::process::ExitStatus {
        let status = self.child.wait().unwrap();
        assert_eq!(tcgetattr(&self.slave).unwrap(), self.before, "{status}");
        status
    }
}

#[test]
fn every_way_out_restores_the_terminal() {
    use std::os::unix::process::ExitStatusExt;
    for (way, code) in [("return", Some(0)), ("panic", Some(101)), ("abort", None)] {
        assert_eq!(start(way).ends_restored().code(), code, "{way}");
    }
    let signals = [
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
    ];
    for signal in signals {
        let rig = start("signal");
        rig.wait_until("raw", Rig::is_raw);
        rig.signal(signal);
        let status = rig.ends_restored();
        assert_eq!(
            status.signal(),
            Some(signal as i32),
            "it did not die of the signal"
        );
    }
}

#[test]
fn control_c_is_a_key_and_the_escape_leaves() {
    let mut rig = start("escape");
    rig.wait_until("raw", Rig::is_raw);
    rig.master.write_all(b"\x03\x1a\x1c").unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert!(rig.child.try_wait().unwrap().is_none(), "a key killed it");
    rig.master.write_all(b"\x1d").unwrap();
    assert_eq!(rig.ends_restored().code(), Some(0));
}

#[test]
fn stopped_program_gives_the_terminal_back_until_it_continues() {
    let rig = start("signal");
    rig.wait_until("raw", Rig::is_raw);
    rig.signal(Signal::SIGTSTP);
    rig.wait_until("restored", |rig| {
        tcgetattr(&rig.slave).unwrap() == rig.before
    });
    rig.signal(Signal::SIGCONT);
    rig.wait_until("raw again", Rig::is_raw);
    rig.signal(Signal::SIGTERM);
    rig.ends_restored();
}
