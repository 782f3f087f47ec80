//! The Internet checksum (RFC 1071).

use crate::wire::PROTOCOL_UDP;
use std::net::{IpAddr, Ipv4Addr};

/// Adds `bytes` to a sum; an odd last byte counts as if a zero followed.
pub(crate) fn add(sum: u64, bytes: &[u8]) -> u64 {
    let mut words = bytes.chunks_exact(2);
    let mut sum = sum;
    for word in &mut words {
        if let [high, low] = *word {
            sum += u64::from(u16::from_be_bytes([high, low]));
        }
    }
    match *words.remainder() {
        [last] => sum + (u64::from(last) << 8),
        _ => sum,
    }
}

/// The checksum of a sum.
pub(crate) fn fold(mut sum: u64) -> u16 {
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(u16::MAX)
}

/// The sum of the addresses, protocol and length that TCP, UDP and ICMPv6 take into their checksums.
pub(crate) fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: usize) -> u64 {
    let sum = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => add(add(0, &src.octets()), &dst.octets()),
        (IpAddr::V6(src), IpAddr::V6(dst)) => add(add(0, &src.octets()), &dst.octets()),
        // No packet has addresses of two kinds.
        _ => 0,
    };
    sum + u64::from(protocol) + len as u64
}

/// The checksum of a segment whose own checksum field is zero, as it is sent.
pub(crate) fn transport(src: IpAddr, dst: IpAddr, protocol: u8, segment: &[u8]) -> u16 {
    match fold(add(pseudo(src, dst, protocol, segment.len()), segment)) {
        // Zero would say that there is none.
        0 if protocol == PROTOCOL_UDP => 0xffff,
        sum => sum,
    }
}

/// Whether a segment's checksum is right.
pub(crate) fn is_right(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, segment: &[u8]) -> bool {
    fold(add(
        pseudo(src.into(), dst.into(), protocol, segment.len()),
        segment,
    )) == 0
}
