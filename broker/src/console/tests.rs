//! The terminal is a pseudo-terminal, the guest a ring in memory.

use super::attach::{Attachment, Streams, Summary, UserEvent, attach};
use super::keys::{ESCAPE_DEFAULT, Keys};
use super::terminal::is_raw;
use crate::vm::session::ConsoleEnds;
use bulkhead_ipc::input_ring::{INPUT_RING_BYTES, InputReader, InputWriter};
use bulkhead_ipc::output_ring::{self, OutputReader, OutputRing};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use nix::fcntl::OFlag;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

const CAPACITY: u64 = 64 << 10;

/// The guest's side of a console.
struct Guest {
    output: OutputRing,
    output_bell: Doorbell,
    keys: InputReader,
}

fn console() -> (Guest, ConsoleEnds) {
    let file: File = tempfile::tempfile().unwrap();
    output_ring::create(&file, CAPACITY).unwrap();
    let keys = sealed_memfd("keys", INPUT_RING_BYTES).unwrap();
    let output_bell = Doorbell::new().unwrap();
    let guest = Guest {
        output: OutputRing::new(file.try_clone().unwrap(), CAPACITY, 0),
        output_bell: output_bell.try_clone().unwrap(),
        keys: InputReader::map(keys.try_clone().unwrap(), 0).unwrap(),
    };
    let ends = ConsoleEnds {
        output: OutputReader::new(file).unwrap(),
        output_bell,
        input: InputWriter::map(keys).unwrap(),
        input_bell: Doorbell::new().unwrap(),
    };
    (guest, ends)
}

impl Guest {
    fn print(&mut self, bytes: &[u8]) {
        self.output.write_at(self.output.head(), bytes).unwrap();
        self.output_bell.ring();
    }

    fn typed(&mut self, wanted: usize) -> Vec<u8> {
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        let start = Instant::now();
        while all.len() < wanted && start.elapsed() < Duration::from_secs(10) {
            let n = self.keys.peek(&mut buffer);
            self.keys.take(n);
            all.extend_from_slice(&buffer[..n]);
            std::thread::sleep(Duration::from_millis(1));
        }
        all
    }
}

fn pipe() -> (File, OwnedFd) {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
    (File::from(read), write)
}

fn null() -> OwnedFd {
    File::options()
        .write(true)
        .open("/dev/null")
        .unwrap()
        .into()
}

struct Rig {
    guest: Guest,
    attached: Attachment,
    input: File,
    output: File,
    events: Receiver<UserEvent>,
}

/// Attaches to pipes: nothing is a terminal.
fn rig() -> Rig {
    let (guest, ends) = console();
    let (input_read, input) = pipe();
    let (output, output_write) = pipe();
    let streams = Streams {
        input: input_read.into(),
        output: output_write,
        notices: null(),
    };
    let (tell, events) = sync_channel(64);
    let attached = attach(
        ends,
        streams,
        Keys::new(Some(ESCAPE_DEFAULT)),
        move |event| {
            tell.try_send(event).unwrap();
        },
    )
    .unwrap();
    Rig {
        guest,
        attached,
        input: input.into(),
        output,
        events,
    }
}

#[test]
fn output_comes_raw_and_whole_and_input_goes_through_unchanged() {
    let mut rig = rig();
    rig.guest.print(b"\x1b[2J\0\xffhello\r\n");
    let mut got = [0; 13];
    rig.output.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"\x1b[2J\0\xffhello\r\n");
    // Escapes are for terminals: a script's bytes all reach the guest, more than fit at once.
    let script: Vec<u8> = (0..20_000u32).map(|n| n.to_le_bytes()[0]).collect();
    rig.input.write_all(&script).unwrap();
    assert_eq!(rig.guest.typed(script.len()), script);
    drop(rig.input);
    // End of input is not the end of output.
    rig.guest.print(b"after");
    let summary = rig.attached.finish();
    assert_eq!(summary, Summary { shown: 18, lost: 0 });
    let mut rest = String::new();
    rig.output.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "after");
    assert!(rig.events.try_recv().is_err());
}

#[test]
fn reader_that_stops_loses_output_and_holds_up_nobody() {
    let mut rig = rig();
    let start = Instant::now();
    for _ in 0..1000 {
        rig.guest.print(&[b'x'; 4096]);
    }
    assert!(
        start.elapsed() < Duration::from_secs(30),
        "the guest was held up"
    );
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        rig.output.read_to_end(&mut all).unwrap();
        all.len() as u64
    });
    let summary = rig.attached.finish();
    assert_eq!(reader.join().unwrap(), summary.shown);
    assert_eq!(summary.shown + summary.lost, 1000 * 4096);
    assert!(summary.lost > 0);
}

#[test]
fn stuck_reader_does_not_keep_the_end_waiting_for_ever() {
    let mut rig = rig();
    // Less than the ring holds, more than the pipe takes.
    let small = nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096);
    nix::fcntl::fcntl(&rig.output, small).unwrap();
    for _ in 0..10 {
        rig.guest.print(&[b'x'; 4096]);
    }
    let start = Instant::now();
    let summary = rig.attached.finish();
    let waited = start.elapsed();
    assert!(waited > Duration::from_secs(4), "gave up after {waited:?}");
    assert!(waited < Duration::from_secs(30), "waited {waited:?}");
    assert_eq!(
        summary,
        Summary {
            shown: 4096,
            lost: 0
        }
    );
    drop(rig.output);
}

#[test]
fn reader_that_goes_away_is_reported() {
    let mut rig = rig();
    drop(rig.output);
    let event = rig.events.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(event, UserEvent::OutputClosed);
    rig.guest.print(b"nobody");
    assert_eq!(rig.attached.finish().shown, 0);
}

#[test]
fn terminal_in_the_background_is_left_alone() {
    let (guest, ends) = console();
    let pty = nix::pty::openpty(None, None).unwrap();
    let before = nix::sys::termios::tcgetattr(&pty.slave).unwrap();
    let streams = Streams {
        input: pty.slave.try_clone().unwrap(),
        output: null(),
        notices: null(),
    };
    // It is not this process's controlling terminal, so this process is not in its foreground.
    let attached = attach(ends, streams, Keys::new(None), |_| {}).unwrap();
    assert_eq!(nix::sys::termios::tcgetattr(&pty.slave).unwrap(), before);
    File::from(pty.master).write_all(b"keys\n").unwrap();
    assert!(!is_raw());
    drop(attached);
    assert_eq!(guest.keys.peek(&mut [0; 8]), 0);
}
