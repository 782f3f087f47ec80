//! Frames for tests, made by another author's code.

use crate::wire::{ETHERNET_BYTES, Mac, TYPE_IPV6, u16_at};
use etherparse::PacketBuilder;

pub(crate) const fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

/// A frame from machine 1 to machine 2 with a TCP segment that ends a stream.
pub(crate) fn tcp_frame(is_v6: bool, payload: &[u8]) -> Vec<u8> {
    let ethernet = PacketBuilder::ethernet2(mac(1).0, mac(2).0);
    let mut frame = Vec::new();
    let tcp = if is_v6 {
        let address = |last| [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last];
        ethernet.ipv6(address(1), address(2), 64)
    } else {
        ethernet.ipv4([10, 0, 0, 11], [10, 0, 0, 12], 64)
    };
    let tcp = tcp.tcp(5001, 80, 1000, 9000).ack(7).psh().fin();
    tcp.write(&mut frame, payload).unwrap();
    frame
}

/// The header that asks for `frame` to be cut into segments of `size` bytes.
pub(crate) fn gso(frame: &[u8], size: u16) -> [u8; 12] {
    let is_v6 = u16_at(frame, 12) == Some(TYPE_IPV6);
    let start = ETHERNET_BYTES + if is_v6 { 40 } else { 20 };
    let [s0, s1] = size.to_le_bytes();
    let start = u8::try_from(start).unwrap();
    [
        1,
        if is_v6 { 4 } else { 1 },
        start + 20,
        0,
        s0,
        s1,
        start,
        0,
        16,
        0,
        0,
        0,
    ]
}

/// A frame with a UDP datagram.
pub(crate) fn udp_frame(
    (src, src_ip, src_port): (Mac, [u8; 4], u16),
    (dst, dst_ip, dst_port): (Mac, [u8; 4], u16),
    payload: &[u8],
) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(src.0, dst.0)
        .ipv4(src_ip, dst_ip, 64)
        .udp(src_port, dst_port)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

/// An ARP packet in a frame.
pub(crate) fn arp_frame(
    (src, dst): (Mac, Mac),
    operation: u8,
    (sender, sender_ip): (Mac, [u8; 4]),
    target_ip: [u8; 4],
) -> Vec<u8> {
    let mut frame = [&dst.0[..], &src.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, operation]].concat();
    frame.extend(sender.0);
    frame.extend(sender_ip);
    frame.extend([0; 6]);
    frame.extend(target_ip);
    frame
}
