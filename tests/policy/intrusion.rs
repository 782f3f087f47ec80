//! A process of each kind is taken over and tries what it was not granted: a system call, an
//! io_uring of its own, a file, a socket. The kernel stops each attempt, and the machine says so.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Fate, Intruder, Machine};

/// Exit code of a process whose system call was not granted.
const DENIED: i32 = 159;

struct Attempt {
    what: &'static str,
    number: i64,
    /// Whether the first pointer argument is the path.
    arguments: fn(u64) -> [u64; 6],
}

const ATTEMPTS: [Attempt; 9] = [
    Attempt {
        what: "open a path",
        number: libc::SYS_openat,
        arguments: |p| [AT_FDCWD, p, 0, 0, 0, 0],
    },
    Attempt {
        what: "make a socket",
        number: libc::SYS_socket,
        arguments: |_| [1, 1, 0, 0, 0, 0],
    },
    Attempt {
        what: "connect a socket",
        number: libc::SYS_connect,
        arguments: |p| [3, p, 16, 0, 0, 0],
    },
    Attempt {
        what: "execute a program",
        number: libc::SYS_execve,
        arguments: |p| [p, 0, 0, 0, 0, 0],
    },
    Attempt {
        what: "trace a process",
        number: libc::SYS_ptrace,
        arguments: |_| [16, 1, 0, 0, 0, 0],
    },
    Attempt {
        what: "make an io_uring",
        number: libc::SYS_io_uring_setup,
        arguments: |p| [8, p, 0, 0, 0, 0],
    },
    Attempt {
        what: "lift io_uring restrictions",
        number: libc::SYS_io_uring_register,
        arguments: |p| [3, 11, p, 1, 0, 0],
    },
    Attempt {
        what: "map executable memory",
        number: libc::SYS_mmap,
        arguments: |_| [0, 4096, 7, 0x22, u64::MAX, 0],
    },
    Attempt {
        what: "make a doorbell blocking",
        number: libc::SYS_fcntl,
        arguments: |_| [5, 4, 0, 0, 0, 0],
    },
];
const AT_FDCWD: u64 = (-100i64).cast_unsigned();

fn try_everything(kind: &str, thread: Option<&str>) {
    for attempt in &ATTEMPTS {
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(1 << 20).unwrap();
        let disk_path = disk.path().to_str().unwrap();
        let mut machine = Machine::test_guest("mode=idle", &["--disk", disk_path]);
        machine.expect("BH idle ");
        let pid = machine.process(kind);
        let mut intruder = Intruder::enter(pid, thread);
        let path = intruder.place(b"/etc/passwd\0\0\0\0\0");
        let fate = intruder.call(attempt.number, (attempt.arguments)(path));
        let what = attempt.what;
        assert_eq!(
            fate,
            Fate::Stopped { code: DENIED },
            "{kind} {thread:?} tried to {what}"
        );
        drop(intruder);
        machine.expect_error("not granted");
        // The report names the call, the thread, and the place in the policy.
        let thread = thread.unwrap_or("main");
        machine.expect_error(&format!(
            "is not granted to thread {thread}; policies/{kind}.toml:"
        ));
    }
}

#[test]
fn taken_over_blk_gains_nothing() {
    try_everything("blk", None);
}

#[test]
fn taken_over_console_gains_nothing() {
    try_everything("console", None);
}

#[test]
fn taken_over_rng_gains_nothing() {
    try_everything("rng", None);
}

#[test]
fn taken_over_legacy_gains_nothing() {
    try_everything("legacy", None);
}

#[test]
fn taken_over_vcpu_control_thread_gains_nothing() {
    try_everything("vcpu", None);
}

#[test]
fn taken_over_gate_thread_gains_nothing() {
    try_everything("vcpu", Some("gate"));
}
