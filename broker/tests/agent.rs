//! `exec`, `cp` and `agent` through the real command, against the agent in a thread of this test, and
//! against agents that lie.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]
#![allow(
    clippy::disallowed_methods,
    reason = "the command under test, as a user starts it"
)]

use bulkhead_agent::serve::{Place, serve};
use bulkhead_agent::wire::Wire;
use bulkhead_ipc::protocol::agent::{
    AGENT_VERSION, Copied, DATA_BYTES_MAX, Entry, Exit, Failure, FailureKind, FromAgent, Output,
    STREAM_BYTES_MAX, ToAgent, hello,
};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

struct Done {
    code: i32,
    out: Vec<u8>,
    err: String,
}

/// A machine's socket with somebody behind it.
struct Guest {
    dir: tempfile::TempDir,
}

impl Guest {
    fn honest() -> Self {
        let guest = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let socket = guest.socket();
        std::thread::spawn(move || serve(&Place::Unix(socket)));
        let until = Instant::now() + PATIENCE;
        while !guest.socket().exists() {
            assert!(Instant::now() < until);
            std::thread::sleep(Duration::from_millis(5));
        }
        guest
    }

    /// Somebody who does `behave` with each connection, from its first byte on.
    fn raw(behave: impl Fn(UnixStream) + Send + 'static) -> Self {
        let guest = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        let listener = UnixListener::bind(guest.socket()).unwrap();
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                behave(stream);
            }
        });
        guest
    }

    /// Somebody who knows the greeting, and then does `behave`.
    fn lying(behave: impl Fn(&mut Wire) + Send + 'static) -> Self {
        Self::raw(move |mut stream| {
            let mut line = [0; 14];
            stream.read_exact(&mut line).unwrap();
            assert_eq!(&line, b"CONNECT 10240\n");
            stream.write_all(b"OK 1024\n").unwrap();
            let mut wire = Wire::new(stream).unwrap();
            wire.shake_hands().unwrap();
            let _ask: ToAgent = wire.receive(PATIENCE).unwrap();
            behave(&mut wire);
            wire.linger(Duration::from_secs(5));
        })
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vsock.sock")
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead"));
        let (verb, rest) = words.split_first().unwrap();
        command.arg(verb);
        let rest = match *verb {
            "agent" => {
                command.arg(rest[0]);
                &rest[1..]
            }
            _ => rest,
        };
        command.arg("--socket").arg(self.socket()).args(rest);
        command.current_dir(self.dir.path());
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn run(&self, words: &[&str]) -> Done {
        self.run_with(words, b"")
    }

    fn run_with(&self, words: &[&str], input: &[u8]) -> Done {
        let mut child = self.command(words).stdin(Stdio::piped()).spawn().unwrap();
        let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_vec());
        // A command may not want to read it.
        let typing = std::thread::spawn(move || stdin.write_all(&input).is_ok());
        let output = child.wait_with_output().unwrap();
        typing.join().unwrap();
        Done {
            code: output.status.code().unwrap_or(-1),
            out: output.stdout,
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn exit_codes_are_those_of_the_command() {
    let guest = Guest::honest();
    for (words, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -9 $$"], 137),
        (&["/no/such/program"], 127),
        (&["/etc/passwd"], 126),
    ] {
        let done = guest.run(&[&["exec", "vm", "--"], words].concat());
        assert_eq!(done.code, code, "{words:?}: {}", done.err);
    }
    let done = guest.run(&["exec", "-u", "no-such-user", "vm", "--", "true"]);
    assert_eq!(done.code, 127, "{}", done.err);
    assert!(
        done.err.contains("there is no user no-such-user"),
        "{}",
        done.err
    );
}

#[test]
fn streams_and_surroundings_are_the_commands_own() {
    let guest = Guest::honest();
    let script = "pwd; echo $A; echo oops >&2; id -u";
    let words = [
        "exec", "-e", "A=b c", "-w", "/tmp", "-u", "65534", "vm", "--", "sh", "-c", script,
    ];
    let done = guest.run(&words);
    assert_eq!(
        (done.code, done.out.as_slice()),
        (0, &b"/tmp\nb c\n65534\n"[..]),
        "{}",
        done.err
    );
    assert_eq!(done.err, "oops\n");
    // Nothing is read unless that is asked for.
    let done = guest.run_with(&["exec", "vm", "--", "cat"], b"not read");
    assert_eq!((done.code, done.out.as_slice()), (0, &b""[..]));
    let input: Vec<u8> = (0..3_000_000u32).map(|n| n.to_le_bytes()[1]).collect();
    let done = guest.run_with(&["exec", "-i", "vm", "--", "cat"], &input);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out == input, "{} bytes", done.out.len());
    // A command that reads nothing of it does not hold up the end.
    let done = guest.run_with(&["exec", "-i", "vm", "--", "true"], &input);
    assert_eq!(done.code, 0, "{}", done.err);
}

#[test]
fn terminal_is_one_for_the_command() {
    let guest = Guest::honest();
    let done = guest.run(&[
        "exec",
        "-t",
        "vm",
        "--",
        "sh",
        "-c",
        "tty; stty size; echo $TERM >&2",
    ]);
    let out = String::from_utf8(done.out).unwrap();
    assert_eq!(done.code, 0, "{out} {}", done.err);
    assert!(
        out.starts_with("/dev/pts/") && out.contains("24 80\r\n"),
        "{out:?}"
    );
    let done = guest.run_with(
        &["exec", "-it", "vm", "--", "sh"],
        b"echo $((6*7))\nexit 3\n",
    );
    let out = String::from_utf8(done.out).unwrap();
    assert!(out.contains("42\r\n"), "{out:?}");
    assert_eq!(done.code, 3);
}

#[test]
fn command_is_killed_with_the_client() {
    let guest = Guest::honest();
    let pid = guest.path("pid");
    let script = format!("echo $$ > {}; exec sleep 1000", pid.display());
    let mut client = guest
        .command(&["exec", "vm", "--", "sh", "-c", &script])
        .spawn()
        .unwrap();
    let until = Instant::now() + PATIENCE;
    let read = || fs::read_to_string(&pid).unwrap_or_default();
    while !read().ends_with('\n') {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    let process = PathBuf::from(format!("/proc/{}", read().trim()));
    assert!(process.exists());
    client.kill().unwrap();
    client.wait().unwrap();
    while process.exists() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn files_and_folders_are_copied_both_ways() {
    let guest = Guest::honest();
    let (from, there, back) = (guest.path("from"), guest.path("there"), guest.path("back"));
    fs::create_dir_all(from.join("a/b")).unwrap();
    let content: Vec<u8> = (0..10 << 20)
        .map(|n: u32| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect();
    fs::write(from.join("a/large"), &content).unwrap();
    fs::write(from.join("a/b/small"), b"x").unwrap();
    std::os::unix::fs::symlink("/etc", from.join("link")).unwrap();
    let to = format!("vm:{}", there.display());
    let done = guest.run(&["cp", "from", &to]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(
        done.err.contains("is a folder; -r copies it"),
        "{}",
        done.err
    );
    let done = guest.run(&["cp", "-r", "from", &to]);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(
        done.err
            .contains("neither a file nor a folder was left out: 1"),
        "{}",
        done.err
    );
    let done = guest.run(&["cp", "-r", "--json", &to, "back"]);
    assert_eq!(done.code, 0, "{}", done.err);
    let shown: serde_json::Value = serde_json::from_slice(&done.out).unwrap();
    assert_eq!((&shown["files"], &shown["folders"]), (&2.into(), &3.into()));
    for place in [there, back] {
        assert!(fs::read(place.join("a/large")).unwrap() == content);
        assert_eq!(names(&place), ["a"]);
        assert_eq!(names(&place.join("a")), ["b", "large"]);
    }
    let done = guest.run(&["cp", "vm:/no/such/file", "x"]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(!guest.path("x").exists());
    let done = guest.run(&["cp", "--max-size", "1MiB", &format!("{to}/a/large"), "x"]);
    assert_eq!(done.code, 6, "{}", done.err);
    assert!(!guest.path("x").exists());
}

#[test]
fn agent_answers_questions() {
    let guest = Guest::honest();
    let done = guest.run(&["agent", "ping", "--json", "vm"]);
    let pong: serde_json::Value = serde_json::from_slice(&done.out).unwrap();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    assert_eq!(pong["boot_id"], boot.trim());
    let done = guest.run(&["agent", "stats", "vm"]);
    let text = String::from_utf8(done.out).unwrap();
    assert!(
        text.contains("memory") && text.contains("127.0.0.1"),
        "{text}"
    );
    let done = guest.run(&["agent", "freeze", "vm"]);
    assert_eq!(done.code, 4, "{}", done.err);
    let done = guest.run(&["agent", "reidentify", "vm"]);
    assert_eq!(done.code, 2, "{}", done.err);
}

#[test]
fn nobody_and_nonsense_are_clear_errors() {
    type Behave = fn(UnixStream);
    let behaviours: [(Behave, &str); 6] = [
        (drop, "does bulkhead-agent run in it?"),
        (
            |mut s| {
                let _full = s.write_all(&[b'O'; 1 << 20]);
            },
            "does bulkhead-agent run in it?",
        ),
        (
            |mut s| {
                let _closed = s.write_all(b"OK 1\nSSH-2.0-OpenSSH_9.2\r\n");
                std::thread::sleep(Duration::from_millis(300));
            },
            "does not speak the protocol",
        ),
        (
            |mut s| {
                let _closed = s.write_all(&[b"OK 1\n", hello(99).as_slice()].concat());
                std::thread::sleep(Duration::from_millis(300));
            },
            "speaks version 99",
        ),
        (
            |mut s| {
                let hello = hello(AGENT_VERSION);
                let _closed = s.write_all(&[b"OK 1\n", hello.as_slice(), &[0xff; 100]].concat());
                std::thread::sleep(Duration::from_millis(300));
            },
            "sent nonsense",
        ),
        (
            |mut s| {
                let hello = hello(AGENT_VERSION);
                let _closed = s.write_all(&[b"OK 1\n", hello.as_slice()].concat());
                std::thread::sleep(Duration::from_millis(300));
            },
            "hung up",
        ),
    ];
    for (behave, wanted) in behaviours {
        let guest = Guest::raw(behave);
        let done = guest.run(&["agent", "ping", "vm"]);
        assert_eq!(done.code, 6, "{wanted}: {}", done.err);
        assert!(done.err.contains(wanted), "{wanted}: {}", done.err);
        let done = guest.run(&["exec", "vm", "--", "true"]);
        assert_eq!(done.code, 125, "{wanted}: {}", done.err);
    }
    let nowhere = Guest {
        dir: tempfile::tempdir().unwrap(),
    };
    assert_eq!(nowhere.run(&["agent", "ping", "vm"]).code, 4);
}

#[test]
fn guest_that_floods_a_command_or_ends_it_in_the_middle_is_caught() {
    let output = |n: usize| FromAgent::Output {
        stream: Output::Stdout,
        bytes: vec![b'x'; n],
    };
    let flood = move |wire: &mut Wire| {
        wire.send(&FromAgent::Started { pid: 1 }).unwrap();
        let many = STREAM_BYTES_MAX / DATA_BYTES_MAX as u64 + 2;
        // It takes room that is given, and more.
        for _ in 0..many * 1000 {
            if wire.send(&output(DATA_BYTES_MAX)).is_err() {
                return;
            }
        }
    };
    // Nobody reads its output, so no room is given.
    let guest = Guest::lying(flood);
    let mut client = guest.command(&["exec", "vm", "--", "x"]).spawn().unwrap();
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = client.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < until, "it takes everything");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(125));

    for (behave, wanted) in [
        ((|_: &mut Wire| ()) as fn(&mut Wire), "hung up"),
        (
            |wire| wire.send(&FromAgent::Started { pid: 1 }).unwrap(),
            "hung up",
        ),
        (
            |wire| wire.send(&FromAgent::Done).unwrap(),
            "does not keep to its protocol",
        ),
        (
            |wire| {
                wire.send(&FromAgent::Started { pid: 1 }).unwrap();
                wire.send(&FromAgent::Room(u32::MAX)).unwrap();
            },
            "does not keep to its protocol",
        ),
        (
            |wire| {
                let failure = Failure::new(FailureKind::Other, "\x1b[31mevil\x07");
                wire.send(&FromAgent::Failed(failure)).unwrap();
            },
            "\\x1b[31mevil\\x07",
        ),
    ] {
        let guest = Guest::lying(behave);
        let done = guest.run(&["exec", "vm", "--", "x"]);
        assert_eq!(done.code, 125, "{wanted}: {}", done.err);
        assert!(done.err.contains(wanted), "{wanted}: {}", done.err);
    }
    let guest = Guest::lying(|wire| {
        wire.send(&FromAgent::Started { pid: 1 }).unwrap();
        wire.send(&FromAgent::Exited(Exit::Status(9))).unwrap();
    });
    assert_eq!(guest.run(&["exec", "vm", "--", "x"]).code, 9);
}

#[test]
fn nothing_that_a_guest_sends_is_written_outside_of_the_destination() {
    let mode = 0o777;
    let folder = |name: &str| Entry::Folder {
        name: name.into(),
        mode,
    };
    let file = |name: &str, bytes| Entry::File {
        name: name.into(),
        mode,
        bytes: Some(bytes),
    };
    let evil = || Entry::Data(b"evil".to_vec());
    let trees = [
        vec![folder("x"), file("../evil", 4), evil(), Entry::FileEnd],
        vec![
            folder("x"),
            file("/tmp/bulkhead-evil", 4),
            evil(),
            Entry::FileEnd,
        ],
        vec![
            folder("x"),
            folder(".."),
            file("evil", 4),
            evil(),
            Entry::FileEnd,
        ],
        vec![
            folder("x"),
            Entry::Leave,
            file("evil", 4),
            evil(),
            Entry::FileEnd,
        ],
        vec![
            folder("x"),
            folder("link"),
            file("evil", 4),
            evil(),
            Entry::FileEnd,
        ],
        vec![file("x", 1 << 62)],
        vec![file("x", 4), evil(), evil()],
        vec![file("x", 4), evil()],
        vec![folder("x"), Entry::Leave, Entry::Leave],
        std::iter::repeat_with(|| folder("d")).take(1000).collect(),
    ];
    for tree in trees {
        let shown = format!("{:?}", tree.iter().take(6).collect::<Vec<_>>());
        let guest = Guest::lying(move |wire| {
            for entry in &tree {
                if wire.send(&FromAgent::Entry(entry.clone())).is_err() {
                    return;
                }
            }
            let _closed = wire.send(&FromAgent::Copied(Copied::default()));
        });
        let (to, outside) = (guest.path("to"), guest.path("outside"));
        fs::create_dir(&outside).unwrap();
        fs::create_dir_all(to.join("dir")).unwrap();
        std::os::unix::fs::symlink(&outside, to.join("dir/link")).unwrap();
        let done = guest.run(&["cp", "-r", "vm:/srv/dir", "to"]);
        assert_ne!(done.code, 0, "{shown}");
        assert_eq!(
            names(guest.dir.path()),
            ["outside", "to", "vsock.sock"],
            "{shown}"
        );
        assert!(names(&outside).is_empty(), "{shown}");
        assert_eq!(names(&to), ["dir"], "{shown}");
        assert!(!Path::new("/tmp/bulkhead-evil").exists());
    }
}

#[test]
fn endless_files_and_folders_end_at_the_limits() {
    let guest = Guest::lying(|wire| {
        let mode = 0o755;
        let name = b"x".to_vec();
        let entry = |entry| FromAgent::Entry(entry);
        wire.send(&entry(Entry::Folder { name, mode })).unwrap();
        for n in 0..u64::MAX {
            let name = n.to_string().into_bytes();
            let bytes = Some(0);
            let file = Entry::File { name, mode, bytes };
            // It keeps to the room that it is given, and does not stop.
            let sent = wire
                .send(&entry(file))
                .and_then(|()| wire.send(&entry(Entry::FileEnd)));
            if sent.is_err() {
                return;
            }
            while let Ok(Some(ToAgent::CopyRoom(_))) = wire.receive_now() {}
            std::thread::sleep(Duration::from_micros(50));
        }
    });
    let done = guest.run(&["cp", "-r", "--max-files", "100", "vm:/srv/dir", "to"]);
    assert_eq!(done.code, 6, "{}", done.err);
    assert!(
        done.err.contains("more than 100 files and folders"),
        "{}",
        done.err
    );
    assert!(names(&guest.path("to")).len() <= 100);
}
