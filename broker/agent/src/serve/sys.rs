//! System calls that nix does not wrap, and what a new process does before its program.
#![allow(unsafe_code, reason = "ioctls, and code between fork and exec")]

use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setgid, setgroups, setsid, setuid};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

nix::ioctl_readwrite!(fi_freeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(fi_thaw, b'X', 120, libc::c_int);
nix::ioctl_write_ptr_bad!(set_size, libc::TIOCSWINSZ, libc::winsize);
nix::ioctl_write_int_bad!(set_controlling_terminal, libc::TIOCSCTTY);
nix::ioctl_write_ptr!(add_entropy, b'R', 3, [libc::c_int; 2]);

const SIOCSIFHWADDR: libc::c_ulong = 0x8924;
const SIOCGIFFLAGS: libc::c_ulong = 0x8913;
const SIOCSIFFLAGS: libc::c_ulong = 0x8914;
/// Ethernet, for the kernel's type of hardware addresses.
const ARPHRD_ETHER: libc::sa_family_t = 1;
/// What RNDADDENTROPY takes at once here.
const ENTROPY_BYTES_MAX: usize = 512;

/// A descriptor that a system call has just made.
pub(super) fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the caller got it from the kernel and gives it to nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// Freezes the file system of an open folder.
pub(super) fn freeze(folder: impl AsFd) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: the kernel does not look at the argument; the pointer is valid in any case.
    unsafe { fi_freeze(folder.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Undoes [`freeze`].
pub(super) fn thaw(folder: impl AsFd) -> nix::Result<()> {
    let mut unused = 0;
    // SAFETY: as above.
    unsafe { fi_thaw(folder.as_fd().as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Gives a terminal a size.
pub(super) fn resize(terminal: impl AsFd, columns: u16, rows: u16) -> nix::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one winsize.
    unsafe { set_size(terminal.as_fd().as_raw_fd(), &raw const size) }.map(drop)
}

/// As the kernel's `struct rand_pool_info`.
#[repr(C)]
struct Pool {
    head: [libc::c_int; 2],
    bytes: [u8; ENTROPY_BYTES_MAX],
}

/// Adds random bytes to the kernel's, and credits them in full.
pub(super) fn credit(random: impl AsFd, seed: &[u8]) -> nix::Result<()> {
    let mut pool = Pool {
        head: [0; 2],
        bytes: [0; ENTROPY_BYTES_MAX],
    };
    let room = pool.bytes.get_mut(..seed.len()).ok_or(Errno::EINVAL)?;
    room.copy_from_slice(seed);
    let length = libc::c_int::try_from(seed.len()).map_err(|_| Errno::EINVAL)?;
    pool.head = [length * 8, length];
    let pointer = (&raw const pool).cast();
    // SAFETY: the head says how many of the bytes behind it the kernel reads: at most all.
    unsafe { add_entropy(random.as_fd().as_raw_fd(), pointer) }.map(drop)
}

fn request(name: &str) -> nix::Result<libc::ifreq> {
    let bytes = CString::new(name).map_err(|_| Errno::EINVAL)?;
    // SAFETY: an ifreq of zeroes is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = bytes.as_bytes();
    if bytes.is_empty() || bytes.len() >= request.ifr_name.len() {
        return Err(Errno::EINVAL);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    Ok(request)
}

fn ask(socket: impl AsFd, what: libc::c_ulong, request: &mut libc::ifreq) -> nix::Result<()> {
    // SAFETY: the three requests that are used read and write one ifreq.
    let done = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), what, &raw mut *request) };
    Errno::result(done).map(drop)
}

/// Gives a network interface another hardware address; one that refuses while it is up is taken down
/// for a moment.
pub(super) fn set_mac(socket: impl AsFd, interface: &str, mac: [u8; 6]) -> nix::Result<()> {
    let mut address = request(interface)?;
    let mut hardware = libc::sockaddr {
        sa_family: ARPHRD_ETHER,
        sa_data: [0; 14],
    };
    for (to, from) in hardware.sa_data.iter_mut().zip(mac) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    address.ifr_ifru.ifru_hwaddr = hardware;
    match ask(&socket, SIOCSIFHWADDR, &mut address) {
        Err(Errno::EBUSY) => {}
        done => return done,
    }
    let mut up = request(interface)?;
    ask(&socket, SIOCGIFFLAGS, &mut up)?;
    // SAFETY: the kernel has just written the flags.
    let flags = unsafe { up.ifr_ifru.ifru_flags };
    let mut down = up;
    let bit = libc::c_short::try_from(libc::IFF_UP).unwrap_or(1);
    down.ifr_ifru.ifru_flags = flags & !bit;
    ask(&socket, SIOCSIFFLAGS, &mut down)?;
    let done = ask(&socket, SIOCSIFHWADDR, &mut address);
    ask(&socket, SIOCSIFFLAGS, &mut up)?;
    done
}

/// What a new process becomes before its program starts.
#[derive(Debug)]
pub(super) struct Before {
    /// Whose it is; the agent's own when nothing is said.
    pub(super) ids: Option<(Uid, Gid, Vec<Gid>)>,
    /// Where it works.
    pub(super) cwd: CString,
    /// Whether its standard input is its terminal.
    pub(super) terminal: bool,
}

/// Starts a program in a session of its own, which dies with the thread that calls this.
pub(super) fn spawn(command: &mut Command, before: Before) -> io::Result<Child> {
    let prepare = move || -> io::Result<()> {
        setsid()?;
        if before.terminal {
            // SAFETY: standard input is open, and the argument is a number.
            unsafe { set_controlling_terminal(0, 0) }?;
        }
        if let Some((uid, gid, groups)) = &before.ids {
            setgroups(groups)?;
            setgid(*gid)?;
            setuid(*uid)?;
        }
        // After the user was changed, which forgets it.
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        nix::unistd::chdir(before.cwd.as_c_str())?;
        Ok(())
    };
    // SAFETY: the closure makes system calls only; it neither allocates nor takes locks. Errors that it
    // returns carry a number alone.
    unsafe { command.pre_exec(prepare) };
    command.spawn()
}
