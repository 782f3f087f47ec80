//! The requests that TAP interfaces and bridges are set up with, for which there is no safe interface.
#![allow(unsafe_code, reason = "ioctl with structures of netdevice(7)")]

use bulkhead_ipc::device_kind::NET_HEADER_BYTES;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Large UDP datagrams over IPv4 and IPv6 (Linux 6.2).
const TUN_F_USO: libc::c_uint = 0x20 | 0x40;

/// Descriptors of programs that are not Bulkhead's begin here, out of the way of what the standard library has between fork and
/// exec.
const FIRST_HANDED_OVER: RawFd = 100;

/// Has a program find a descriptor. Returns its number there. It is the command's from here on, and closed with it.
pub(super) fn hand_over(command: &mut Command, fd: &OwnedFd) -> Result<RawFd, Errno> {
    let number = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(FIRST_HANDED_OVER))?;
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    let keep = move || {
        let kept = fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()));
        kept.map(drop).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec it makes one system call and allocates nothing.
    unsafe { command.pre_exec(keep) };
    Ok(number)
}

/// `struct ifreq`, with nothing in its union.
fn request(name: &str) -> Result<libc::ifreq, Errno> {
    if !super::is_interface_name(name) {
        return Err(Errno::EINVAL);
    }
    // SAFETY: all zeroes are a valid `ifreq`: an empty name, and integers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The name is shorter than its place, so that a zero stays at the end.
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    Ok(request)
}

fn short(flags: libc::c_int) -> Result<libc::c_short, Errno> {
    libc::c_short::try_from(flags).map_err(|_| Errno::EINVAL)
}

/// Makes `queue` a queue of the TAP interface `name`, which is made if it is not there: whole frames with
/// headers in front.
pub(super) fn attach(queue: &OwnedFd, name: &str, several: bool) -> Result<(), Errno> {
    let several = if several { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = short(flags)?;
    // SAFETY: the structure outlives the call, which reads and writes it.
    Errno::result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map(drop)
}

/// Headers of virtio 1.0 are in front of each frame.
pub(super) fn set_header_bytes(queue: &OwnedFd) -> Result<(), Errno> {
    let bytes = libc::c_int::from(NET_HEADER_BYTES);
    // SAFETY: the integer outlives the call, which reads it.
    Errno::result(unsafe {
        libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes)
    })
    .map(drop)
}

/// The kernel may leave checksums and large TCP segments to the other side. Returns whether it can cut
/// UDP datagrams; it may not deliver large ones.
pub(super) fn set_offloads(queue: &OwnedFd) -> Result<bool, Errno> {
    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
    // SAFETY: plain integers.
    let asked = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, tcp | TUN_F_USO) };
    // SAFETY: as above.
    Errno::result(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, tcp) })?;
    Ok(asked == 0)
}

/// A network interface in the broker's network namespace, to be changed.
#[derive(Debug)]
pub(super) struct Interface {
    socket: OwnedFd,
    name: String,
}

impl Interface {
    pub(super) fn named(name: &str) -> Result<Self, Errno> {
        let (kind, flags) = (SockType::Datagram, SockFlag::SOCK_CLOEXEC);
        Ok(Self {
            socket: socket(AddressFamily::Inet, kind, flags, None)?,
            name: name.to_owned(),
        })
    }

    fn ask(&self, what: libc::Ioctl, request: &mut libc::ifreq) -> Result<(), Errno> {
        // SAFETY: the structure outlives the call, which reads and writes it.
        Errno::result(unsafe { libc::ioctl(self.socket.as_raw_fd(), what, request) }).map(drop)
    }

    /// Sets the largest packet, unless it is that already.
    pub(super) fn set_mtu(&self, mtu: u16) -> Result<(), Errno> {
        let mut asked = request(&self.name)?;
        self.ask(libc::SIOCGIFMTU, &mut asked)?;
        // SAFETY: the call has filled in this member.
        let is = unsafe { asked.ifr_ifru.ifru_mtu };
        if is == libc::c_int::from(mtu) {
            return Ok(());
        }
        let mut wanted = request(&self.name)?;
        wanted.ifr_ifru.ifru_mtu = mtu.into();
        self.ask(libc::SIOCSIFMTU, &mut wanted)
    }

    /// Brings it up, unless it is.
    pub(super) fn bring_up(&self) -> Result<(), Errno> {
        let up = short(libc::IFF_UP)?;
        let mut flags = request(&self.name)?;
        self.ask(libc::SIOCGIFFLAGS, &mut flags)?;
        // SAFETY: the call has filled in this member.
        let are = unsafe { flags.ifr_ifru.ifru_flags };
        if are & up != 0 {
            return Ok(());
        }
        flags.ifr_ifru.ifru_flags = are | up;
        self.ask(libc::SIOCSIFFLAGS, &mut flags)
    }

    /// Puts it into a bridge.
    pub(super) fn put_into(&self, bridge: &str) -> Result<(), Errno> {
        let mut own = request(&self.name)?;
        self.ask(libc::SIOCGIFINDEX, &mut own)?;
        let mut wanted = request(bridge)?;
        // SAFETY: the call has filled in this member.
        wanted.ifr_ifru.ifru_ifindex = unsafe { own.ifr_ifru.ifru_ifindex };
        const SIOCBRADDIF: libc::Ioctl = 0x89a2;
        self.ask(SIOCBRADDIF, &mut wanted)
    }
}
