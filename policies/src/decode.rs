//! Arguments of system calls in words: flags by name, ioctl requests by name, descriptors by what
//! the caller knows of them.
//!
//! For reports of denials. Everything that is decoded was chosen by a process that may have been
//! taken over, so nothing is looked up in its memory: a pointer stays a number.

use crate::constants;
use crate::syscalls;
use std::fmt::Write as _;

/// What an argument is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A descriptor.
    Fd,
    /// A pointer.
    Pointer,
    /// A size or any other unsigned number.
    Number,
    /// A signed 32-bit number.
    Int,
    /// An ioctl request.
    Request,
    /// One of these values.
    One(&'static [(&'static str, u64)]),
    /// A set of these bits.
    Bits(&'static [(&'static str, u64)]),
    /// One of the values in the low bits of the mask, and a set of bits beyond.
    OneAndBits(
        u64,
        &'static [(&'static str, u64)],
        &'static [(&'static str, u64)],
    ),
}

use Kind::{Bits, Fd, Int, Number, One, OneAndBits, Pointer, Request};

const ACCESS: &[(&str, u64)] = &[("O_RDONLY", 0), ("O_WRONLY", 1), ("O_RDWR", 2)];
const OPEN: &[(&str, u64)] = &[
    ("O_CREAT", 0o100),
    ("O_EXCL", 0o200),
    ("O_NOCTTY", 0o400),
    ("O_TRUNC", 0o1000),
    ("O_APPEND", 0o2000),
    ("O_NONBLOCK", 0o4000),
    ("O_DIRECT", 0o40000),
    ("O_DIRECTORY", 0o200_000),
    ("O_NOFOLLOW", 0o400_000),
    ("O_CLOEXEC", 0o2_000_000),
    ("O_PATH", 0o10_000_000),
];
const PROT: &[(&str, u64)] = &[("PROT_READ", 1), ("PROT_WRITE", 2), ("PROT_EXEC", 4)];
const MAP_TYPE: &[(&str, u64)] = &[
    ("MAP_SHARED", 1),
    ("MAP_PRIVATE", 2),
    ("MAP_SHARED_VALIDATE", 3),
];
const MAP: &[(&str, u64)] = &[
    ("MAP_FIXED", 0x10),
    ("MAP_ANONYMOUS", 0x20),
    ("MAP_NORESERVE", 0x4000),
    ("MAP_POPULATE", 0x8000),
    ("MAP_STACK", 0x2_0000),
    ("MAP_HUGETLB", 0x4_0000),
];
const DOMAIN: &[(&str, u64)] = &[
    ("AF_UNIX", 1),
    ("AF_INET", 2),
    ("AF_INET6", 10),
    ("AF_NETLINK", 16),
    ("AF_PACKET", 17),
    ("AF_VSOCK", 40),
];
const SOCKET_TYPE: &[(&str, u64)] = &[
    ("SOCK_STREAM", 1),
    ("SOCK_DGRAM", 2),
    ("SOCK_RAW", 3),
    ("SOCK_SEQPACKET", 5),
];
const SOCKET_FLAGS: &[(&str, u64)] = &[("SOCK_NONBLOCK", 0o4000), ("SOCK_CLOEXEC", 0o2_000_000)];
const FCNTL: &[(&str, u64)] = &[
    ("F_DUPFD", 0),
    ("F_GETFD", 1),
    ("F_SETFD", 2),
    ("F_GETFL", 3),
    ("F_SETFL", 4),
    ("F_SETOWN", 8),
    ("F_OFD_SETLK", 37),
    ("F_DUPFD_CLOEXEC", 1030),
    ("F_SETPIPE_SZ", 1031),
    ("F_ADD_SEALS", 1033),
    ("F_GET_SEALS", 1034),
];
const MADVICE: &[(&str, u64)] = &[
    ("MADV_NORMAL", 0),
    ("MADV_DONTNEED", 4),
    ("MADV_FREE", 8),
    ("MADV_REMOVE", 9),
    ("MADV_DONTFORK", 10),
    ("MADV_MERGEABLE", 12),
    ("MADV_HUGEPAGE", 14),
    ("MADV_DONTDUMP", 16),
    ("MADV_DODUMP", 17),
    ("MADV_POPULATE_WRITE", 23),
    ("MADV_COLLAPSE", 25),
];
const CLONE: &[(&str, u64)] = &[
    ("CLONE_VM", 0x100),
    ("CLONE_FS", 0x200),
    ("CLONE_FILES", 0x400),
    ("CLONE_SIGHAND", 0x800),
    ("CLONE_VFORK", 0x4000),
    ("CLONE_THREAD", 0x1_0000),
    ("CLONE_NEWNS", 0x2_0000),
    ("CLONE_NEWCGROUP", 0x200_0000),
    ("CLONE_NEWUTS", 0x400_0000),
    ("CLONE_NEWIPC", 0x800_0000),
    ("CLONE_NEWUSER", 0x1000_0000),
    ("CLONE_NEWPID", 0x2000_0000),
    ("CLONE_NEWNET", 0x4000_0000),
];
const SIGNALS: &[(&str, u64)] = &[
    ("SIGHUP", 1),
    ("SIGINT", 2),
    ("SIGABRT", 6),
    ("SIGKILL", 9),
    ("SIGUSR1", 10),
    ("SIGSEGV", 11),
    ("SIGUSR2", 12),
    ("SIGTERM", 15),
    ("SIGCHLD", 17),
    ("SIGSTOP", 19),
    ("SIGSYS", 31),
];
const PRCTL: &[(&str, u64)] = &[
    ("PR_SET_PDEATHSIG", 1),
    ("PR_SET_DUMPABLE", 4),
    ("PR_SET_NAME", 15),
    ("PR_SET_SECCOMP", 22),
    ("PR_SET_TIMERSLACK", 29),
    ("PR_SET_MM", 35),
    ("PR_SET_NO_NEW_PRIVS", 38),
    ("PR_CAP_AMBIENT", 47),
    ("PR_SET_VMA", 0x5356_4d41),
];
const SECCOMP: &[(&str, u64)] = &[
    ("SECCOMP_SET_MODE_STRICT", 0),
    ("SECCOMP_SET_MODE_FILTER", 1),
];
const PTRACE: &[(&str, u64)] = &[
    ("PTRACE_TRACEME", 0),
    ("PTRACE_PEEKDATA", 2),
    ("PTRACE_POKEDATA", 5),
    ("PTRACE_ATTACH", 16),
    ("PTRACE_SEIZE", 0x4206),
];
const FUTEX: &[(&str, u64)] = &[
    ("FUTEX_WAIT", 0),
    ("FUTEX_WAKE", 1),
    ("FUTEX_WAIT_PRIVATE", 128),
    ("FUTEX_WAKE_PRIVATE", 129),
    ("FUTEX_WAIT_BITSET_PRIVATE", 137),
];
const REGISTER: &[(&str, u64)] = &[
    ("IORING_REGISTER_BUFFERS", 0),
    ("IORING_REGISTER_FILES", 2),
    ("IORING_UNREGISTER_FILES", 3),
    ("IORING_REGISTER_FILES_UPDATE", 6),
    ("IORING_REGISTER_RESTRICTIONS", 11),
    ("IORING_REGISTER_ENABLE_RINGS", 12),
];
const EPOLL_OPERATION: &[(&str, u64)] = &[
    ("EPOLL_CTL_ADD", 1),
    ("EPOLL_CTL_DEL", 2),
    ("EPOLL_CTL_MOD", 3),
];
const SEEK: &[(&str, u64)] = &[("SEEK_SET", 0), ("SEEK_CUR", 1), ("SEEK_END", 2)];

/// What the arguments of a system call are; empty for one that is not known here.
fn signature(name: &str) -> &'static [Kind] {
    const OPENS: Kind = OneAndBits(3, ACCESS, OPEN);
    const MAPS: Kind = OneAndBits(3, MAP_TYPE, MAP);
    match name {
        "read" | "write" | "getdents64" => &[Fd, Pointer, Number],
        "readv" | "writev" | "sendmmsg" | "recvmmsg" => &[Fd, Pointer, Number],
        "pread64" | "pwrite64" => &[Fd, Pointer, Number, Number],
        "open" => &[Pointer, OPENS, Number],
        "openat" => &[Fd, Pointer, OPENS, Number],
        "openat2" => &[Fd, Pointer, Pointer, Number],
        "close" | "fsync" | "fdatasync" | "dup" | "fchdir" => &[Fd],
        "dup2" | "dup3" => &[Fd, Int, Number],
        "stat" | "lstat" | "access" | "execve" | "chdir" | "unlink" | "mkdir" => {
            &[Pointer, Pointer, Pointer]
        }
        "fstat" | "fstatfs" | "fchmod" => &[Fd, Pointer],
        "newfstatat" | "execveat" | "unlinkat" | "mkdirat" | "statx" | "faccessat" => {
            &[Fd, Pointer, Pointer, Number, Number]
        }
        "ftruncate" | "listen" | "shutdown" => &[Fd, Number],
        "fallocate" => &[Fd, Number, Number, Number],
        "lseek" => &[Fd, Number, One(SEEK)],
        "mmap" => &[Pointer, Number, Bits(PROT), MAPS, Fd, Number],
        "mprotect" | "pkey_mprotect" => &[Pointer, Number, Bits(PROT)],
        "munmap" | "mlock" => &[Pointer, Number],
        "mremap" => &[Pointer, Number, Number, Number, Pointer],
        "madvise" => &[Pointer, Number, One(MADVICE)],
        "brk" => &[Pointer],
        "ioctl" => &[Fd, Request, Pointer],
        "fcntl" => &[Fd, One(FCNTL), Number],
        "socket" | "socketpair" => &[
            One(DOMAIN),
            OneAndBits(15, SOCKET_TYPE, SOCKET_FLAGS),
            Number,
            Pointer,
        ],
        "connect" | "bind" => &[Fd, Pointer, Number],
        "accept" | "accept4" => &[Fd, Pointer, Pointer, Number],
        "sendmsg" | "recvmsg" => &[Fd, Pointer, Number],
        "sendto" | "recvfrom" => &[Fd, Pointer, Number, Number, Pointer, Number],
        "setsockopt" | "getsockopt" => &[Fd, Number, Number, Pointer, Pointer],
        "clone" => &[Bits(CLONE), Pointer, Pointer, Pointer, Pointer],
        "unshare" => &[Bits(CLONE)],
        "setns" => &[Fd, Bits(CLONE)],
        "kill" | "tkill" => &[Int, One(SIGNALS)],
        "tgkill" => &[Int, Int, One(SIGNALS)],
        "pidfd_send_signal" => &[Fd, One(SIGNALS), Pointer, Number],
        "rt_sigaction" => &[One(SIGNALS), Pointer, Pointer, Number],
        "prctl" => &[One(PRCTL), Number, Number, Number, Number],
        "seccomp" => &[One(SECCOMP), Number, Pointer],
        "ptrace" => &[One(PTRACE), Int, Pointer, Pointer],
        "futex" => &[Pointer, One(FUTEX), Number, Pointer, Pointer, Number],
        "epoll_ctl" => &[Fd, One(EPOLL_OPERATION), Fd, Pointer],
        "epoll_wait" => &[Fd, Pointer, Number, Int],
        "ppoll" => &[Pointer, Number, Pointer, Pointer, Number],
        "poll" => &[Pointer, Number, Int],
        "io_uring_setup" => &[Number, Pointer],
        "io_uring_enter" => &[Fd, Number, Number, Number, Pointer, Number],
        "io_uring_register" => &[Fd, One(REGISTER), Pointer, Number],
        "exit" | "exit_group" => &[Int],
        "getpid" | "gettid" | "fork" | "vfork" | "sched_yield" | "getuid" | "geteuid" => &[],
        _ => &[Number; 6],
    }
}

/// System call `number` with its arguments, as a reader of manual pages would write it.
/// `descriptor` says what a descriptor is, where that is known.
#[must_use]
pub fn call(number: u32, args: &[u64; 6], descriptor: &dyn Fn(i32) -> Option<String>) -> String {
    let Some(name) = syscalls::name(number) else {
        let args = args.map(|arg| format!("{arg:#x}"));
        return format!("number {number}({})", args.join(", "));
    };
    let args = signature(name).iter().zip(args);
    let args: Vec<String> = args
        .map(|(kind, &value)| argument(*kind, value, descriptor))
        .collect();
    format!("{name}({})", args.join(", "))
}

/// The low half as the kernel's `int`.
fn int(value: u64) -> i32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

fn argument(kind: Kind, value: u64, descriptor: &dyn Fn(i32) -> Option<String>) -> String {
    let low = value & 0xffff_ffff;
    match kind {
        Fd => match int(value) {
            libc::AT_FDCWD => "AT_FDCWD".to_owned(),
            fd => match descriptor(fd) {
                Some(what) => format!("{fd} ({what})"),
                None => fd.to_string(),
            },
        },
        Pointer if value == 0 => "NULL".to_owned(),
        Pointer => format!("{value:#x}"),
        Number if value < 10 => value.to_string(),
        Number => format!("{value:#x}"),
        Int => int(value).to_string(),
        Request => {
            let name = u32::try_from(low).ok().and_then(constants::request_name);
            name.map_or_else(|| format!("{low:#x}"), str::to_owned)
        }
        One(names) => {
            let found = names.iter().find(|(_, v)| *v == low);
            found.map_or_else(|| format!("{low:#x}"), |(name, _)| (*name).to_owned())
        }
        Bits(names) => bits(value, names, String::new()),
        OneAndBits(mask, values, names) => {
            let first = values.iter().find(|(_, v)| *v == low & mask);
            let first = first.map_or_else(
                || format!("{:#x}", low & mask),
                |(name, _)| (*name).to_owned(),
            );
            bits(low & !mask, names, first)
        }
    }
}

/// `text`, and the names of the bits of `value`.
fn bits(value: u64, names: &[(&str, u64)], mut text: String) -> String {
    let mut rest = value;
    for (name, bit) in names {
        if rest & bit == *bit {
            rest &= !bit;
            separate(&mut text);
            text.push_str(name);
        }
    }
    if rest != 0 || text.is_empty() {
        separate(&mut text);
        let _infallible = write!(text, "{rest:#x}");
    }
    text
}

fn separate(text: &mut String) {
    if !text.is_empty() {
        text.push('|');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(name: &str, args: [u64; 6]) -> String {
        let disk = |fd| (fd == 5).then(|| "disk".to_owned());
        call(syscalls::number(name).unwrap(), &args, &disk)
    }

    #[test]
    fn flags_requests_and_descriptors_have_names() {
        let cwd = u64::from((-100i32).cast_unsigned());
        assert_eq!(
            shown("openat", [cwd, 0x7f00, 0o2_000_102, 0o600, 0, 0]),
            "openat(AT_FDCWD, 0x7f00, O_RDWR|O_CREAT|O_CLOEXEC, 0x180)"
        );
        assert_eq!(
            shown("ioctl", [5, 0xae80, 0, 9, 9, 9]),
            "ioctl(5 (disk), KVM_RUN, NULL)"
        );
        assert_eq!(
            shown("mmap", [0, 4096, 7, 0x22, u64::MAX, 0]),
            "mmap(NULL, 0x1000, PROT_READ|PROT_WRITE|PROT_EXEC, MAP_PRIVATE|MAP_ANONYMOUS, -1, 0)"
        );
        assert_eq!(
            shown("socket", [1, 0o2_000_005, 0, 0, 0, 0]),
            "socket(AF_UNIX, SOCK_SEQPACKET|SOCK_CLOEXEC, 0, NULL)"
        );
        assert_eq!(
            shown("fcntl", [5, 4, 0, 0, 0, 0]),
            "fcntl(5 (disk), F_SETFL, 0)"
        );
    }

    #[test]
    fn nothing_unknown_is_hidden() {
        assert_eq!(
            call(9999, &[1; 6], &|_| None),
            "number 9999(0x1, 0x1, 0x1, 0x1, 0x1, 0x1)"
        );
        assert_eq!(
            shown("ioctl", [5, 0xdead, 16, 0, 0, 0]),
            "ioctl(5 (disk), 0xdead, 0x10)"
        );
        assert_eq!(
            shown("mprotect", [0, 0, 0x100, 0, 0, 0]),
            "mprotect(NULL, 0, 0x100)"
        );
    }

    #[test]
    fn every_name_in_a_signature_fits_its_table() {
        for (name, number) in syscalls::SYSCALLS {
            assert!(signature(name).len() <= 6);
            assert!(call(*number, &[u64::MAX; 6], &|_| None).starts_with(name));
        }
    }
}
