//! `bulkhead console`: terminals that come and go at a machine that lives on.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::Daemon;
use nix::pty::{Winsize, openpty};
use nix::sys::signal::Signal;
use nix::sys::termios::{LocalFlags, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// What arrives at a reader.
struct Heard {
    pieces: Receiver<Vec<u8>>,
    seen: String,
}

impl Heard {
    fn new(mut from: impl Read + Send + 'static) -> Self {
        let (send, pieces) = sync_channel(1024);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        let seen = String::new();
        Self { pieces, seen }
    }

    fn until(&mut self, part: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.seen.contains(part) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(error) => panic!("no `{part}` ({error}) in {:?}", self.seen),
            }
        }
    }
}

fn attached(daemon: &Daemon, arguments: &[&str]) -> (Child, Heard) {
    let mut child = daemon.begin(&[&["console"], arguments].concat());
    let heard = Heard::new(child.stdout.take().unwrap());
    (child, heard)
}

fn code_of(mut child: Child) -> Option<i32> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        assert!(Instant::now() < deadline, "console does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn several_readers_see_the_same_and_any_of_them_types() {
    let daemon = Daemon::start();
    daemon.fails(&["console", "web"], 2, "there is no machine web");
    let cmdline = "mode=console,idle lines=1 count=2 timeout=120";
    daemon.create("web", cmdline, &["--console", "virtio"]);
    daemon.fails(&["console", "web"], 6, "is not running");
    daemon.good(&["start", "web"]);
    let (mut first, mut one) = attached(&daemon, &["web", "--history"]);
    let (mut second, mut two) = attached(&daemon, &["web", "--console", "virtio", "--history"]);
    // It never reads: nobody waits for it.
    let silent = daemon.begin(&["console", "web", "--history"]);
    one.until("console line 1 of 1");
    two.until("console line 1 of 1");
    for (from, text) in [(&mut first, "first\n"), (&mut second, "second\n")] {
        from.stdin
            .as_mut()
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        one.until(text.trim_end());
        two.until(text.trim_end());
    }
    // Detaching leaves the machine and the others alone.
    drop(first.stdin.take());
    first.kill().unwrap();
    first.wait().unwrap();
    daemon.until_output("web", "BH idle");
    assert_eq!(daemon.state_of("web"), "running");
    daemon.good(&["kill", "web"]);
    assert_eq!(
        code_of(second),
        Some(0),
        "the machine's end is the console's"
    );
    assert_eq!(code_of(silent), Some(0));
}

#[test]
fn reader_that_stops_loses_its_own_oldest_bytes_and_is_told() {
    let daemon = Daemon::start();
    // Each round floods and then waits for a line.
    let cmdline = "mode=console,console,idle lines=0 count=1 size=4194304 timeout=120";
    let more = ["--console", "virtio", "--console-history", "64KiB"];
    daemon.create_and_start("web", cmdline, &more);
    let bulk = "BH console.bulk bytes=4194304";
    daemon.until_output("web", bulk);
    let mut slow = daemon.begin(&["console", "web"]);
    let mut keys = slow.stdin.take().unwrap();
    keys.write_all(b"go\n").unwrap();
    let deadline = Instant::now() + PATIENCE;
    // The guest is not held up by a reader that reads nothing.
    while daemon.output_of("web").matches(bulk).count() < 2 {
        assert!(Instant::now() < deadline, "{}", daemon.output_of("web"));
        std::thread::sleep(Duration::from_millis(20));
    }
    keys.write_all(b"last words\n").unwrap();
    daemon.until_output("web", "BH idle");
    daemon.good(&["kill", "web"]);
    let mut output = Vec::new();
    slow.stdout
        .take()
        .unwrap()
        .read_to_end(&mut output)
        .unwrap();
    let mut errors = String::new();
    slow.stderr
        .take()
        .unwrap()
        .read_to_string(&mut errors)
        .unwrap();
    assert!(
        errors.contains("bytes of console output were lost"),
        "{errors}"
    );
    assert!(output.len() < 4 << 20);
    let end = String::from_utf8_lossy(&output[output.len().saturating_sub(200)..]).into_owned();
    assert!(end.contains("last words"), "{end:?}");
    assert_eq!(code_of(slow), Some(0));
}

#[expect(
    clippy::disallowed_methods,
    reason = "a terminal of its own is what setsid gives a program"
)]
fn at_terminal(daemon: &Daemon, terminal: &File) -> Child {
    let mut command = std::process::Command::new("setsid");
    let program = bulkhead_tests::path("BULKHEAD_BIN_DIR").join("bulkhead");
    command.args(["--ctty", "--wait"]).arg(program);
    command.args(["console", "web", "--history"]);
    command.env("BULKHEAD_HOST", daemon.runtime().join("bulkhead.sock"));
    let copy = || Stdio::from(terminal.try_clone().unwrap());
    command.stdin(copy()).stdout(copy()).stderr(copy());
    command.spawn().unwrap()
}

#[test]
fn terminal_is_raw_while_attached_and_restored_on_every_way_out() {
    let daemon = Daemon::start();
    let cmdline = "mode=console,idle lines=1 resizes=1 timeout=120";
    daemon.create_and_start("web", cmdline, &["--console", "virtio"]);
    let size = Winsize {
        ws_row: 33,
        ws_col: 99,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    for way in ["escape", "signal", "end"] {
        let pty = openpty(Some(&size), None).unwrap();
        let (keyboard, terminal) = (File::from(pty.master), File::from(pty.slave));
        let before = tcgetattr(&terminal).unwrap();
        let child = at_terminal(&daemon, &terminal);
        let mut screen = Heard::new(keyboard.try_clone().unwrap());
        screen.until("to leave press Ctrl-]");
        screen.until("console line 1 of 1");
        let raw = tcgetattr(&terminal).unwrap();
        assert!(!raw.local_flags.contains(LocalFlags::ICANON), "{way}");
        // The guest has learned the size of the terminal.
        daemon.until_output("web", "cols=99 rows=33");
        match way {
            "escape" => (&keyboard).write_all(b"\x1d").unwrap(),
            "signal" => {
                // setsid passes no signal on; the program is its only child.
                let children = format!("/proc/{0}/task/{0}/children", child.id());
                let pid = std::fs::read_to_string(children).unwrap();
                let pid = pid.trim().parse().unwrap_or(child.id().cast_signed());
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), Signal::SIGTERM).unwrap();
            }
            _ => drop(daemon.good(&["kill", "web"])),
        }
        let code = code_of(child);
        assert_eq!(code == Some(0), way != "signal", "{way}: {code:?}");
        assert_eq!(tcgetattr(&terminal).unwrap(), before, "{way}");
        if way != "end" {
            assert_eq!(daemon.state_of("web"), "running", "{way}");
        }
    }
}
