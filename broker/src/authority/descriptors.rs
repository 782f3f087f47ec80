//! The descriptors of a process and what each of them is, from duplicates of them.
//!
//! A duplicate made by `pidfd_getfd` tells more than `/proc/PID/fd`: seals, modes and the peers of
//! sockets; and it can be had without root. `/proc/PID/fd` of a process that is not dumpable belongs to
//! the host's root, but whoever owns a user namespace may trace the processes in it, which is what
//! `pidfd_getfd` asks for. Each duplicate is closed before the next one is made, so that at most one
//! lock or socket of a process lives on for a moment when the process dies meanwhile.

use super::peers;
use super::status::field;
use super::sys;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat, major, minor};
use serde::Serialize;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// A descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Descriptor {
    /// Its number.
    pub number: i32,
    /// `r`, `w` or `rw`.
    pub access: &'static str,
    /// What it refers to.
    pub of: Object,
}

/// What a descriptor refers to. Two descriptors with equal identities reach the same thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Object {
    /// A regular file or a block device.
    File {
        /// Where it is, or was when it was opened.
        path: String,
        /// Device number of the file system; of the device itself for a block device.
        device: u64,
        /// Inode.
        inode: u64,
        /// Whether it is a block device.
        block: bool,
    },
    /// A directory.
    Folder {
        /// Where it is, or was when it was opened.
        path: String,
        /// Device number of the file system.
        device: u64,
        /// Inode.
        inode: u64,
    },
    /// A character device.
    CharDevice {
        /// Its path.
        path: String,
        /// Major and minor number.
        device: (u64, u64),
    },
    /// Shared memory without a file.
    Memfd {
        /// The name that its maker gave it.
        name: String,
        /// Inode.
        inode: u64,
        /// Size in bytes.
        bytes: u64,
        /// Seals by name.
        seals: Vec<&'static str>,
    },
    /// A doorbell.
    Eventfd {
        /// The kernel's number of it.
        id: u64,
    },
    /// A set of descriptors that are waited for.
    Epoll {
        /// Their numbers when they were added; they are watched even when they are closed here.
        watches: Vec<i32>,
    },
    /// A ring.
    IoUring {
        /// Inode.
        inode: u64,
        /// Its registered files.
        files: Vec<String>,
    },
    /// One end of a pipe.
    Pipe {
        /// Inode.
        inode: u64,
    },
    /// A socket.
    Socket {
        /// Inode.
        inode: u64,
        /// Such as `unix seqpacket`.
        kind: String,
        /// Whether it accepts connections.
        listening: bool,
        /// Inode of the socket that it is connected to; `None` for none, or where the kernel does not
        /// tell.
        peer: Option<u64>,
    },
    /// A virtual machine of KVM.
    KvmVm,
    /// A virtual processor of KVM.
    KvmVcpu {
        /// Its number.
        index: u32,
    },
    /// Something else, by the kernel's name.
    Other {
        /// Such as `anon_inode:[userfaultfd]`.
        name: String,
    },
}

/// Measures all descriptors of `pid`.
pub(super) fn measure(pid: i32) -> io::Result<Vec<Descriptor>> {
    let process = sys::open_process(pid)?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    // The size of the table, which limits of the process do not bound.
    let size = field(&status, "FDSize").and_then(|size| size.parse().ok());
    let size: i32 = size.ok_or_else(|| io::Error::other("status has no FDSize"))?;
    let mut all = Vec::new();
    for number in 0..size {
        match sys::duplicate(process.as_fd(), number) {
            Ok(duplicate) => all.push(look(number, &duplicate)?),
            Err(Errno::EBADF) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(all)
}

/// A duplicate of descriptor `number` of process `pid`.
///
/// # Errors
/// When there is none, or the caller may not trace the process.
pub fn duplicate(pid: i32, number: i32) -> io::Result<OwnedFd> {
    let process = sys::open_process(pid)?;
    Ok(sys::duplicate(process.as_fd(), number)?)
}

fn look(number: i32, fd: &OwnedFd) -> io::Result<Descriptor> {
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL)?);
    let access = match flags & OFlag::O_ACCMODE {
        OFlag::O_RDONLY => "r",
        OFlag::O_WRONLY => "w",
        _ => "rw",
    };
    let of = object(fd)?;
    Ok(Descriptor { number, access, of })
}

fn object(fd: &OwnedFd) -> io::Result<Object> {
    let raw = fd.as_raw_fd();
    let link = fs::read_link(format!("/proc/self/fd/{raw}"))?;
    let name = link.to_string_lossy().into_owned();
    let about = fstat(fd)?;
    let info = || fs::read_to_string(format!("/proc/self/fdinfo/{raw}"));
    let inode = about.st_ino;
    Ok(
        match SFlag::from_bits_truncate(about.st_mode & SFlag::S_IFMT.bits()) {
            SFlag::S_IFSOCK => socket(fd, inode),
            SFlag::S_IFIFO => Object::Pipe { inode },
            SFlag::S_IFCHR => Object::CharDevice {
                path: name,
                device: (major(about.st_rdev), minor(about.st_rdev)),
            },
            SFlag::S_IFBLK => Object::File {
                path: name,
                device: about.st_rdev,
                inode,
                block: true,
            },
            SFlag::S_IFDIR => Object::Folder {
                path: name,
                device: about.st_dev,
                inode,
            },
            SFlag::S_IFREG => match memfd_name(&name) {
                Some(memfd) => Object::Memfd {
                    name: memfd.to_owned(),
                    inode,
                    bytes: about.st_size.unsigned_abs(),
                    seals: seals(fcntl(fd, FcntlArg::F_GET_SEALS)?),
                },
                None => Object::File {
                    path: name,
                    device: about.st_dev,
                    inode,
                    block: false,
                },
            },
            _ => anonymous(name, inode, &info()?),
        },
    )
}

/// The name of a memfd in what the kernel calls its file.
fn memfd_name(file: &str) -> Option<&str> {
    let name = file.strip_prefix("/memfd:")?;
    Some(name.strip_suffix(" (deleted)").unwrap_or(name))
}

/// Objects that have no place in a file system.
fn anonymous(name: String, inode: u64, info: &str) -> Object {
    let lines = || info.lines().map(str::trim);
    match name.as_str() {
        "anon_inode:[eventfd]" => {
            let id = lines().find_map(|line| line.strip_prefix("eventfd-id:"));
            match id.and_then(|id| id.trim().parse().ok()) {
                Some(id) => Object::Eventfd { id },
                None => Object::Other { name },
            }
        }
        "anon_inode:[eventpoll]" => {
            let number = |line: &str| {
                line.strip_prefix("tfd:")?
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            };
            let watches = lines().filter_map(number).collect();
            Object::Epoll { watches }
        }
        "anon_inode:[io_uring]" => {
            let after = lines().skip_while(|line| !line.starts_with("UserFiles:"));
            let files = after
                .skip(1)
                .take_while(|line| !line.starts_with("UserBufs:"));
            let file = |line: &str| Some(line.split_once(':')?.1.trim().to_owned());
            let files = files.filter_map(file).collect();
            Object::IoUring { inode, files }
        }
        "anon_inode:kvm-vm" => Object::KvmVm,
        other => match other.strip_prefix("anon_inode:kvm-vcpu:").map(str::parse) {
            Some(Ok(index)) => Object::KvmVcpu { index },
            _ => Object::Other { name },
        },
    }
}

fn seals(bits: i32) -> Vec<&'static str> {
    let known = [
        (libc::F_SEAL_SEAL, "seal"),
        (libc::F_SEAL_SHRINK, "shrink"),
        (libc::F_SEAL_GROW, "grow"),
        (libc::F_SEAL_WRITE, "write"),
        (libc::F_SEAL_FUTURE_WRITE, "future-write"),
        (0x20, "exec"),
    ];
    let set = known.iter().filter(|(bit, _)| bits & bit != 0);
    set.map(|&(_, name)| name).collect()
}

fn socket(fd: &OwnedFd, inode: u64) -> Object {
    let kind = getsockopt(fd, sockopt::SockType).map_or("unknown", |kind| match kind {
        SockType::Stream => "stream",
        SockType::Datagram => "datagram",
        SockType::SeqPacket => "seqpacket",
        _ => "raw",
    });
    let family = nix::sys::socket::getsockname::<nix::sys::socket::SockaddrStorage>(raw(fd));
    use nix::sys::socket::SockaddrLike as _;
    let family = match family.ok().and_then(|address| address.family()) {
        Some(nix::sys::socket::AddressFamily::Unix) => "unix".to_owned(),
        Some(other) => format!("{other:?}").to_lowercase(),
        None => "unknown".to_owned(),
    };
    let peer = match family.as_str() {
        "unix" => peers::of(inode),
        _ => None,
    };
    Object::Socket {
        inode,
        kind: format!("{family} {kind}"),
        listening: getsockopt(fd, sockopt::AcceptConn).unwrap_or(false),
        peer,
    }
}

fn raw(fd: &OwnedFd) -> i32 {
    fd.as_raw_fd()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::shared::sealed_memfd;
    use nix::sys::socket::{AddressFamily, SockFlag, socketpair};

    fn of(fd: &OwnedFd) -> Object {
        object(fd).unwrap()
    }

    #[test]
    fn own_descriptors_are_what_they_are() {
        let memfd = sealed_memfd("x", 8192).unwrap();
        let Object::Memfd {
            name, bytes, seals, ..
        } = of(&memfd)
        else {
            panic!("{:?}", of(&memfd));
        };
        assert_eq!((name.as_str(), bytes), ("x", 8192));
        assert_eq!(seals[..3], ["seal", "shrink", "grow"]);
        let null: OwnedFd = fs::File::open("/dev/null").unwrap().into();
        let device = (1, 3);
        let path = "/dev/null".to_owned();
        assert_eq!(of(&null), Object::CharDevice { path, device });
        let bell: OwnedFd = nix::sys::eventfd::EventFd::new().unwrap().into();
        let copy = bell.try_clone().unwrap();
        assert!(matches!(of(&bell), Object::Eventfd { .. }));
        assert_eq!(of(&bell), of(&copy));
    }

    #[test]
    fn both_ends_of_a_socket_know_each_other() {
        let kind = SockType::SeqPacket;
        let (a, b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let end = |fd: &OwnedFd| match of(fd) {
            Object::Socket {
                inode,
                kind,
                listening,
                peer,
            } => {
                assert_eq!((kind.as_str(), listening), ("unix seqpacket", false));
                (inode, peer)
            }
            other => panic!("{other:?}"),
        };
        let ((one, his), (other, hers)) = (end(&a), end(&b));
        // Where the kernel has no unix_diag, neither knows.
        assert!(his == Some(other) && hers == Some(one) || (his, hers) == (None, None));
    }

    #[test]
    fn descriptors_of_this_process_are_found_by_number() {
        let memfd = sealed_memfd("found", 4096).unwrap();
        let all = measure(i32::try_from(std::process::id()).unwrap()).unwrap();
        let found = all.iter().find(|d| d.number == memfd.as_raw_fd()).unwrap();
        assert_eq!(found.access, "rw");
        assert!(matches!(&found.of, Object::Memfd { name, .. } if name == "found"));
    }

    #[test]
    fn files_of_a_ring_and_watches_of_an_epoll_are_read() {
        let info = "SqThread:\t-1\nUserFiles:\t1\n    0: /d.img\nUserBufs:\t0\nPollList:\n";
        let ring = anonymous("anon_inode:[io_uring]".to_owned(), 7, info);
        let files = vec!["/d.img".to_owned()];
        assert_eq!(ring, Object::IoUring { inode: 7, files });
        let info = "pos:\t0\ntfd:       11 events: 80000019 data: 8\ntfd:        6 events: 1\n";
        let epoll = anonymous("anon_inode:[eventpoll]".to_owned(), 7, info);
        let watches = vec![11, 6];
        assert_eq!(epoll, Object::Epoll { watches });
    }
}
