//! TAP interfaces: what a namespace sends is read, what is written it receives.
#![allow(
    unsafe_code,
    reason = "the one ioctl that gives a descriptor of /dev/net/tun its interface"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

nix::ioctl_write_ptr_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    libc::ifreq
);

/// Makes interface `name` in the calling thread's namespace. Reads and writes do not block; each is one
/// Ethernet frame. The interface ends with the file.
///
/// # Errors
/// The kernel's, when there is no TUN driver or there is an interface of that name.
pub(super) fn open(name: &str) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true);
    let tap = options
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    let mut characters = [0; libc::IFNAMSIZ];
    // The last one stays 0.
    let places = characters.iter_mut().take(libc::IFNAMSIZ - 1);
    for (place, byte) in places.zip(name.bytes()) {
        *place = byte.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI;
    let request = libc::ifreq {
        ifr_name: characters,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: libc::c_short::try_from(flags).map_err(io::Error::other)?,
        },
    };
    // SAFETY: TUNSETIFF reads name and flags of an `ifreq`, which lives until it returns.
    unsafe { set_interface(tap.as_raw_fd(), &raw const request) }?;
    Ok(tap)
}
