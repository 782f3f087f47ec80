//! Which socket a Unix socket is connected to, as `unix_diag` of the kernel says.

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::os::fd::AsRawFd;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const NLM_F_REQUEST: u16 = 1;
/// UDIAG_SHOW_PEER.
const SHOW_PEER: u32 = 4;
/// UNIX_DIAG_PEER.
const PEER: u16 = 2;
/// Bytes of `struct nlmsghdr` and of `struct unix_diag_msg`.
const HEADER_BYTES: usize = 16;
const MESSAGE_BYTES: usize = 16;

/// The inode of the socket that the one with `inode` is connected to. `None` when there is none, or
/// the kernel cannot be asked.
pub(super) fn of(inode: u64) -> Option<u64> {
    let inode = u32::try_from(inode).ok()?;
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkSockDiag,
    )
    .ok()?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(fd.as_raw_fd(), &request(inode), &kernel, MsgFlags::empty()).ok()?;
    let mut answer = [0; 4096];
    // The kernel answers within the call above.
    let len = recv(fd.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).ok()?;
    peer(answer.get(..len)?).map(u64::from)
}

/// `struct nlmsghdr`, then `struct unix_diag_req`.
fn request(inode: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40);
    let mut put = |part: &[u8]| bytes.extend_from_slice(part);
    put(&40u32.to_ne_bytes());
    put(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    put(&NLM_F_REQUEST.to_ne_bytes());
    put(&[0; 8]);
    // AF_UNIX, protocol, padding; sockets in every state.
    put(&[1, 0, 0, 0]);
    put(&u32::MAX.to_ne_bytes());
    put(&inode.to_ne_bytes());
    put(&SHOW_PEER.to_ne_bytes());
    // No cookie: the inode is enough.
    put(&[0xff; 8]);
    bytes
}

/// The peer among the attributes of an answer.
fn peer(answer: &[u8]) -> Option<u32> {
    let short = |at: usize| Some(u16::from_ne_bytes(answer.get(at..at + 2)?.try_into().ok()?));
    let long = |at: usize| Some(u32::from_ne_bytes(answer.get(at..at + 4)?.try_into().ok()?));
    if short(4)? != SOCK_DIAG_BY_FAMILY {
        return None;
    }
    let mut at = HEADER_BYTES + MESSAGE_BYTES;
    loop {
        let (len, kind) = (usize::from(short(at)?), short(at + 2)?);
        if kind == PEER && len == 8 {
            return long(at + 4).filter(|&inode| inode != 0);
        }
        // Attributes are padded to four bytes; an empty one would never end.
        at += len.max(4).next_multiple_of(4);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_that_is_cut_short_names_nobody() {
        let mut answer = vec![0; HEADER_BYTES + MESSAGE_BYTES];
        answer[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        assert_eq!(peer(&answer), None);
        answer.extend([8, 0, 2, 0, 77, 0]);
        assert_eq!(peer(&answer), None);
        answer.extend([0, 0]);
        assert_eq!(peer(&answer), Some(77));
        // NLMSG_ERROR
        answer[4..6].copy_from_slice(&2u16.to_ne_bytes());
        assert_eq!(peer(&answer), None);
    }
}
