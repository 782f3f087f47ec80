//! The agent as its program, over a Unix socket, with a client that knows the protocol and may break it.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_agent::wire::{Wire, WireError};
use bulkhead_ipc::protocol::agent::{
    Ask, Entry, Exec, Exit, FailureKind, FromAgent, Output, STREAM_BYTES_MAX, ToAgent,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Agent {
    child: Child,
    dir: tempfile::TempDir,
}

impl Agent {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-agent"));
        let child = command.arg("--unix").arg(&socket).spawn().unwrap();
        let agent = Self { child, dir };
        // It is there a moment before anybody listens.
        agent.until(|| UnixStream::connect(&socket).is_ok());
        agent
    }

    fn until(&self, mut done: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < until, "not within {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn socket(&self) -> UnixStream {
        let mut stream = UnixStream::connect(self.path("agent.sock")).unwrap();
        stream.write_all(b"CONNECT 10240\n").unwrap();
        let mut line = [0; 14];
        stream.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"OK 1073741824\n");
        stream
    }

    fn wire(&self) -> Wire {
        let mut wire = Wire::new(self.socket()).unwrap();
        wire.shake_hands().unwrap();
        wire
    }

    fn ask(&self, question: Ask) -> (Wire, FromAgent) {
        let mut wire = self.wire();
        wire.send(&ToAgent::Ask(question)).unwrap();
        let answer = wire.receive(PATIENCE).unwrap();
        (wire, answer)
    }

    fn answers(&self) {
        let (_, answer) = self.ask(Ask::Ping);
        assert!(matches!(answer, FromAgent::Pong { .. }), "{answer:?}");
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn shell(script: &str, stdin: bool) -> Ask {
    Ask::Exec(Exec {
        argv: ["sh", "-c", script]
            .map(|word| word.as_bytes().to_vec())
            .into(),
        stdin,
        ..Exec::default()
    })
}

fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, state)| !state.starts_with(['Z', 'X']))
}

#[test]
fn nonsense_costs_its_own_connection_alone() {
    let agent = Agent::start();
    let mut quiet = Vec::new();
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], b""] {
        let mut socket = agent.socket();
        let _closed = socket.write_all(nonsense);
        quiet.push(socket);
    }
    let mut wire = agent.wire();
    wire.send(&ToAgent::Stdin(vec![1])).unwrap();
    let answer: FromAgent = wire.receive(PATIENCE).unwrap();
    assert!(matches!(answer, FromAgent::Failed(_)), "{answer:?}");
    agent.answers();
}

#[test]
fn too_many_connections_are_let_go_and_others_served_later() {
    let agent = Agent::start();
    let idle: Vec<_> = (0..64)
        .map(|_| UnixStream::connect(agent.path("agent.sock")).unwrap())
        .collect();
    drop(idle);
    agent.until(|| {
        let mut stream = UnixStream::connect(agent.path("agent.sock")).unwrap();
        let mut line = [0; 14];
        let greeted = stream.write_all(b"CONNECT 10240\n");
        greeted.and_then(|()| stream.read_exact(&mut line)).is_ok()
    });
    agent.answers();
}

#[test]
fn command_dies_with_its_connection_and_whatever_it_has_started() {
    let agent = Agent::start();
    let pids = agent.path("pids");
    let script = format!("sleep 1000 & echo $! $$ > {}; cat", pids.display());
    let (wire, answer) = agent.ask(shell(&script, true));
    assert!(matches!(answer, FromAgent::Started { .. }), "{answer:?}");
    let read = || -> Vec<u32> {
        let text = std::fs::read_to_string(&pids).unwrap_or_default();
        text.split_whitespace()
            .map(|pid| pid.parse().unwrap())
            .collect()
    };
    agent.until(|| read().len() == 2);
    let pids = read();
    assert!(pids.iter().all(|&pid| is_alive(pid)));
    drop(wire);
    agent.until(|| !pids.iter().any(|&pid| is_alive(pid)));
    agent.answers();
}

#[test]
fn command_dies_with_the_agent() {
    let mut agent = Agent::start();
    let (_wire, answer) = agent.ask(shell("exec sleep 1000", false));
    let FromAgent::Started { pid } = answer else {
        panic!("{answer:?}");
    };
    assert!(is_alive(pid));
    agent.child.kill().unwrap();
    agent.child.wait().unwrap();
    agent.until(|| !is_alive(pid));
}

#[test]
fn output_waits_for_room_and_errors_do_not_wait_for_it() {
    let agent = Agent::start();
    let script = "head -c 3000000 /dev/zero & sleep 0.3; echo here >&2; wait";
    let (mut wire, answer) = agent.ask(shell(script, false));
    assert!(matches!(answer, FromAgent::Started { .. }), "{answer:?}");
    let (mut zeros, mut given, mut errors) = (0, STREAM_BYTES_MAX, Vec::new());
    loop {
        match wire.receive(PATIENCE).unwrap() {
            FromAgent::Output { stream, bytes } => match stream {
                Output::Stdout => zeros += bytes.len() as u64,
                Output::Stderr => {
                    // Standard output is stuck by now, since nobody has given it room.
                    assert_eq!(zeros, STREAM_BYTES_MAX);
                    errors.extend(bytes);
                    given += 4_000_000;
                    let (stream, bytes) = (Output::Stdout, 4_000_000);
                    wire.send(&ToAgent::Room { stream, bytes }).unwrap();
                }
            },
            FromAgent::Exited(exit) => {
                assert_eq!(exit, Exit::Status(0));
                break;
            }
            other => panic!("{other:?}"),
        }
        assert!(zeros <= given);
    }
    assert_eq!((zeros, errors.as_slice()), (3_000_000, &b"here\n"[..]));
}

#[test]
fn host_that_sends_more_input_than_there_is_room_for_is_hung_up_on() {
    let agent = Agent::start();
    let (mut wire, answer) = agent.ask(shell("exec sleep 1000", true));
    let FromAgent::Started { pid } = answer else {
        panic!("{answer:?}");
    };
    let mut sent = 0;
    let hung_up = loop {
        match wire.send(&ToAgent::Stdin(vec![0; 32 << 10])) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1000, "nobody stopped us");
    };
    assert!(matches!(hung_up, WireError::Closed), "{hung_up}");
    agent.until(|| !is_alive(pid));
}

#[test]
fn streams_that_a_daemon_keeps_open_do_not_keep_the_command() {
    let agent = Agent::start();
    let (mut wire, _started) = agent.ask(shell("sleep 30 & echo started", false));
    let begun = Instant::now();
    let mut said = Vec::new();
    loop {
        match wire.receive(PATIENCE).unwrap() {
            FromAgent::Output { bytes, .. } => said.extend(bytes),
            FromAgent::Exited(exit) => break assert_eq!(exit, Exit::Status(0)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(said, b"started\n");
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn copies_that_are_not_wanted_fail_with_a_reason_and_leave_nothing() {
    let agent = Agent::start();
    let folder = agent.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let path = folder.to_str().unwrap().as_bytes().to_vec();
    let name = b"file".to_vec();
    let mut wire = agent.wire();
    wire.send(&ToAgent::Ask(Ask::Put { path, name })).unwrap();
    let mode = 0o600;
    let file = |name: &[u8], bytes| {
        let (name, bytes) = (name.to_vec(), Some(bytes));
        ToAgent::Entry(Entry::File { name, mode, bytes })
    };
    wire.send(&file(b"x", 10)).unwrap();
    wire.send(&ToAgent::Entry(Entry::Data(vec![1; 11])))
        .unwrap();
    let answer: FromAgent = wire.receive(PATIENCE).unwrap();
    assert!(matches!(answer, FromAgent::Failed(_)), "{answer:?}");
    agent.until(|| std::fs::read_dir(&folder).unwrap().count() == 0);

    let path = agent.path("none").to_str().unwrap().as_bytes().to_vec();
    let recursive = true;
    let (_, answer) = agent.ask(Ask::Get { path, recursive });
    match answer {
        FromAgent::Failed(failure) => assert_eq!(failure.kind, FailureKind::NotFound),
        other => panic!("{other:?}"),
    }
}

#[test]
fn machine_as_a_whole_is_left_alone_outside_of_a_guest() {
    let agent = Agent::start();
    for question in [
        Ask::Freeze { timeout_ms: 1000 },
        Ask::Thaw,
        Ask::Reidentify(Default::default()),
    ] {
        let (_, answer) = agent.ask(question);
        match answer {
            FromAgent::Failed(failure) => assert_eq!(failure.kind, FailureKind::Unsupported),
            other => panic!("{other:?}"),
        }
    }
}
