//! A process of each kind is taken over and tries what it was not granted: a system call, an
//! io_uring of its own, a file, a socket. The kernel stops each attempt, and the machine says so.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::network::Network;
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
        let disk = bulkhead_tests::disk(1 << 20);
        let disk_path = disk.path().to_str().unwrap();
        let mut arguments = vec!["--vsock", "--disk", disk_path];
        if kind == "net" {
            let _network = Network::enter().unwrap();
            arguments.extend(["--net", "tap=tap0"]);
        }
        let mut machine = Machine::test_guest("mode=idle", &arguments);
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
fn taken_over_vsock_gains_nothing() {
    try_everything("vsock", None);
}

#[test]
fn taken_over_net_gains_nothing() {
    try_everything("net", None);
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

/// A vCPU thread runs its guest: it is taken over in the middle of KVM_RUN.
#[test]
fn taken_over_vcpu_thread_gains_nothing() {
    let incomplete = std::path::Path::new("/sys/module/kvm_pvm").exists();
    let thread = if incomplete { "vcpu-quirks" } else { "vcpu" };
    let mut machine = Machine::test_guest("mode=idle", &[]);
    machine.expect("BH idle ");
    let intruder = Intruder::enter(machine.process("vcpu"), Some(thread));
    let (ioctl, kvm_run) = (libc::SYS_ioctl.cast_unsigned(), 0xae80);
    assert_eq!(intruder.interrupted(), (ioctl, kvm_run));
    drop(intruder);
    try_everything("vcpu", Some(thread));
}

/// The ring of a living blk process, as `/proc` shows it.
struct Ring {
    descriptor: u64,
    queue: u64,
    entries: u64,
    count: u64,
}

/// Offsets in `struct io_rings`.
struct Layout {
    sq_tail: u64,
    cq_head: u64,
    cq_tail: u64,
    sq_mask: u64,
    cq_mask: u64,
    cqes: u64,
}

/// Each index in a cache line of its own, and all in one: kernels have had both.
const LAYOUTS: [Layout; 2] = [
    Layout {
        sq_tail: 64,
        cq_head: 128,
        cq_tail: 192,
        sq_mask: 256,
        cq_mask: 260,
        cqes: 320,
    },
    Layout {
        sq_tail: 4,
        cq_head: 8,
        cq_tail: 12,
        sq_mask: 16,
        cq_mask: 20,
        cqes: 64,
    },
];

impl Ring {
    fn of(pid: u32) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mapping = |offset: &str| {
            let mut lines = maps
                .lines()
                .filter(|l| l.ends_with("anon_inode:[io_uring]"));
            let line = lines.find(|l| l.split(' ').nth(2) == Some(offset)).unwrap();
            let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            (number(start), number(end) - number(start))
        };
        let (entries, bytes) = mapping("10000000");
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten();
        let ring = |path: std::path::PathBuf| {
            let link = std::fs::read_link(&path).unwrap();
            let number = path.file_name()?.to_str()?.parse().ok()?;
            (link.to_str() == Some("anon_inode:[io_uring]")).then_some(number)
        };
        Self {
            descriptor: fds.map(|fd| fd.path()).find_map(ring).unwrap(),
            queue: mapping("00000000").0,
            entries,
            count: bytes / 64,
        }
    }

    fn word(&self, intruder: &Intruder, offset: u64) -> u64 {
        let bytes = intruder.look(self.queue + offset, 4);
        u32::from_ne_bytes(bytes.try_into().unwrap()).into()
    }

    fn set(&self, intruder: &Intruder, offset: u64, value: u64) {
        let word = u32::try_from(value & 0xffff_ffff).unwrap();
        intruder.write(self.queue + offset, &word.to_ne_bytes());
    }

    /// Has the kernel do one operation on descriptor (or registered file) `fd`; returns its result.
    fn submit(&self, intruder: &mut Intruder, operation: u8, flags: u8, fd: u32, at: u64) -> i32 {
        let fits = |l: &&Layout| self.word(intruder, l.sq_mask) + 1 == self.count;
        let layout = LAYOUTS.iter().find(fits).expect("a known layout of rings");
        let (mask, cqes) = (self.count - 1, layout.cqes);
        let cq_mask = self.word(intruder, layout.cq_mask);
        let array = (cqes + 16 * (cq_mask + 1)).next_multiple_of(64);
        let tail = self.word(intruder, layout.sq_tail);
        let mut entry = [0; 64];
        (entry[0], entry[1]) = (operation, flags);
        entry[4..8].copy_from_slice(&fd.to_ne_bytes());
        entry[16..24].copy_from_slice(&at.to_ne_bytes());
        entry[24..28].copy_from_slice(&8u32.to_ne_bytes());
        intruder.write(self.entries + 64 * (tail & mask), &entry);
        self.set(intruder, array + 4 * (tail & mask), tail & mask);
        self.set(intruder, layout.sq_tail, tail + 1);
        let done = self.word(intruder, layout.cq_tail);
        let enter = [self.descriptor, 1, 1, 1, 0, 0];
        let fate = intruder.call(libc::SYS_io_uring_enter, enter);
        assert_eq!(fate, Fate::Returned(1), "operation {operation}");
        let result = self.queue + cqes + 16 * (done & cq_mask) + 8;
        let result = intruder.look(result, 4);
        // The process never hears of it.
        self.set(
            intruder,
            layout.cq_head,
            self.word(intruder, layout.cq_tail),
        );
        i32::from_ne_bytes(result.try_into().unwrap())
    }
}

#[test]
fn taken_over_blk_gains_no_operation_of_its_ring() {
    // Not in memory: such a disk needs no ring.
    let disk = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    let path = disk.path().to_str().unwrap();
    let mut machine = Machine::test_guest("mode=idle", &["--disk", path]);
    machine.expect("BH idle ");
    let pid = machine.process("blk");
    let policy = bulkhead_policies::load(bulkhead_ipc::ident::ProcKind::Blk, None, false).unwrap();
    let granted: Vec<u8> = policy.opcodes.iter().map(|opcode| opcode.number).collect();
    let ring = Ring::of(pid);
    let mut intruder = Intruder::enter(pid, None);
    let at = intruder.place(b"/canary\0");
    let refused = -libc::EACCES;
    let mut tried = 0;
    for operation in 0..=u8::MAX {
        if granted.contains(&operation) {
            // On any descriptor but the registered file.
            let result = ring.submit(&mut intruder, operation, 0, 3, at);
            assert_eq!(result, refused, "operation {operation} on a descriptor");
            continue;
        }
        let result = ring.submit(&mut intruder, operation, 1, 0, at);
        // A kernel that does not know an operation says so before it looks at restrictions.
        let unknown = result == -libc::EINVAL && operation > 40;
        assert!(
            result == refused || unknown,
            "operation {operation}: {result}"
        );
        tried += i32::from(!unknown);
    }
    assert!(tried >= 40, "only {tried} operations are known");
    // What is granted is no canary's work: the ring itself still works for the disk.
    let read = granted
        .iter()
        .find(|&&n| Some(n) == bulkhead_policies::constants::opcode("READ"));
    let result = ring.submit(&mut intruder, *read.unwrap(), 1, 0, at);
    assert_eq!(result, 8, "READ of the disk");
    assert_eq!(intruder.look(at, 8), [0; 8]);
}
