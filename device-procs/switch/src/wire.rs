//! The fixed headers of frames: Ethernet, ARP, IPv4, IPv6 with its extension headers, and where the
//! upper layer begins. Reading only; nothing is allocated.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

/// Bytes of an Ethernet header without a tag.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG_BYTES: usize = 4;
/// Bytes of an IPv4 header without options.
pub const IPV4_BYTES: usize = 20;
/// Bytes of an IPv6 header without extensions.
pub const IPV6_BYTES: usize = 40;
/// Bytes of a UDP header.
pub const UDP_BYTES: usize = 8;

/// Ethertype of IPv4.
pub const TYPE_IPV4: u16 = 0x0800;
/// Ethertype of ARP.
pub const TYPE_ARP: u16 = 0x0806;
/// Ethertype of a VLAN tag (802.1Q).
pub const TYPE_VLAN: u16 = 0x8100;
/// Ethertype of a service tag (802.1ad).
pub const TYPE_SERVICE_VLAN: u16 = 0x88a8;
/// Ethertype of IPv6.
pub const TYPE_IPV6: u16 = 0x86dd;

/// IP protocol numbers.
pub const PROTOCOL_ICMP: u8 = 1;
/// TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// ICMP for IPv6.
pub const PROTOCOL_ICMPV6: u8 = 58;

/// Extension headers that are followed; a packet with more is malformed.
const EXTENSIONS_MAX: usize = 8;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// Everybody.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether it means several receivers.
    #[must_use]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Whether it is the address of one card.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// Whether frames to it never leave a link: bridges, pause, link discovery (802.1D, table 7-10).
    #[must_use]
    pub fn is_link_control(self) -> bool {
        matches!(self.0, [0x01, 0x80, 0xc2, 0, 0, 0..=0x0f])
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `N` bytes at `at`.
#[must_use]
pub fn bytes_at<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// A big-endian number at `at`.
#[must_use]
pub fn u16_at(from: &[u8], at: usize) -> Option<u16> {
    bytes_at(from, at).map(u16::from_be_bytes)
}

/// A byte at `at`.
#[must_use]
pub fn u8_at(from: &[u8], at: usize) -> Option<u8> {
    from.get(at).copied()
}

/// An IPv4 address at `at`.
#[must_use]
pub fn ipv4_at(from: &[u8], at: usize) -> Option<Ipv4Addr> {
    bytes_at::<4>(from, at).map(Ipv4Addr::from)
}

/// An IPv6 address at `at`.
#[must_use]
pub fn ipv6_at(from: &[u8], at: usize) -> Option<Ipv6Addr> {
    bytes_at::<16>(from, at).map(Ipv6Addr::from)
}

/// An Ethernet address at `at`.
#[must_use]
pub fn mac_at(from: &[u8], at: usize) -> Option<Mac> {
    bytes_at(from, at).map(Mac)
}

/// Overwrites bytes at `at`; outside nothing happens, and false is returned.
pub fn put(to: &mut [u8], at: usize, bytes: &[u8]) -> bool {
    let place = at
        .checked_add(bytes.len())
        .and_then(|end| to.get_mut(at..end));
    match place {
        Some(place) => {
            place.copy_from_slice(bytes);
            true
        }
        None => false,
    }
}

/// An Ethernet header without tags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ethernet {
    /// Receiver.
    pub dst: Mac,
    /// Sender.
    pub src: Mac,
    /// What follows.
    pub kind: u16,
}

impl Ethernet {
    /// Of a frame.
    #[must_use]
    pub fn read(frame: &[u8]) -> Option<Self> {
        Some(Self {
            dst: mac_at(frame, 0)?,
            src: mac_at(frame, 6)?,
            kind: u16_at(frame, 12)?,
        })
    }
}

/// An ARP packet for Ethernet and IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arp {
    /// 1 asks, 2 answers.
    pub operation: u16,
    /// Sender's Ethernet address.
    pub sender: Mac,
    /// Sender's IP address; unspecified in probes.
    pub sender_ip: Ipv4Addr,
    /// The address that is asked for, or the asker's.
    pub target_ip: Ipv4Addr,
}

impl Arp {
    /// From behind an Ethernet header.
    #[must_use]
    pub fn read(packet: &[u8]) -> Option<Self> {
        let is_ethernet = u16_at(packet, 0)? == 1 && u16_at(packet, 2)? == TYPE_IPV4;
        if !is_ethernet || bytes_at::<2>(packet, 4)? != [6, 4] {
            return None;
        }
        mac_at(packet, 18)?;
        Some(Self {
            operation: u16_at(packet, 6)?,
            sender: mac_at(packet, 8)?,
            sender_ip: ipv4_at(packet, 14)?,
            target_ip: ipv4_at(packet, 24)?,
        })
    }
}

/// An IPv4 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv4<'a> {
    /// Sender.
    pub src: Ipv4Addr,
    /// Receiver.
    pub dst: Ipv4Addr,
    /// What follows.
    pub protocol: u8,
    /// Bytes of the header with its options.
    pub header_bytes: usize,
    /// Bytes of the packet, as it says.
    pub total_bytes: usize,
    /// Whether it is a fragment, the first one included.
    pub is_fragment: bool,
    /// Whether it has the beginning of its payload.
    pub has_start: bool,
    /// What it carries, without padding of the frame.
    pub payload: &'a [u8],
}

impl<'a> Ipv4<'a> {
    /// From behind an Ethernet header; what is behind the packet's end is padding.
    #[must_use]
    pub fn read(packet: &'a [u8]) -> Option<Self> {
        let first = u8_at(packet, 0)?;
        let header_bytes = usize::from(first & 0x0f) * 4;
        let total_bytes = usize::from(u16_at(packet, 2)?);
        if first >> 4 != 4 || header_bytes < IPV4_BYTES {
            return None;
        }
        let payload = packet.get(header_bytes..total_bytes)?;
        let fragment = u16_at(packet, 6)?;
        Some(Self {
            src: ipv4_at(packet, 12)?,
            dst: ipv4_at(packet, 16)?,
            protocol: u8_at(packet, 9)?,
            header_bytes,
            total_bytes,
            is_fragment: fragment & 0x3fff != 0,
            has_start: fragment & 0x1fff == 0,
            payload,
        })
    }
}

/// An IPv6 header with its extension headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6<'a> {
    /// Sender.
    pub src: Ipv6Addr,
    /// Receiver.
    pub dst: Ipv6Addr,
    /// What follows the extension headers.
    pub protocol: u8,
    /// Bytes of all headers.
    pub header_bytes: usize,
    /// Bytes of the packet, as it says.
    pub total_bytes: usize,
    /// Whether it is a fragment, the first one included.
    pub is_fragment: bool,
    /// Whether it has the beginning of its payload.
    pub has_start: bool,
    /// What it carries, without padding of the frame.
    pub payload: &'a [u8],
}

impl<'a> Ipv6<'a> {
    /// From behind an Ethernet header. A packet whose headers do not all fit into it, or are too many,
    /// is none: what is behind them could not be judged.
    #[must_use]
    pub fn read(packet: &'a [u8]) -> Option<Self> {
        if u8_at(packet, 0)? >> 4 != 6 {
            return None;
        }
        let total_bytes = IPV6_BYTES + usize::from(u16_at(packet, 4)?);
        let packet = packet.get(..total_bytes)?;
        let (src, dst) = (ipv6_at(packet, 8)?, ipv6_at(packet, 24)?);
        let mut protocol = u8_at(packet, 6)?;
        let (mut at, mut is_fragment, mut has_start) = (IPV6_BYTES, false, true);
        for _ in 0..=EXTENSIONS_MAX {
            let bytes = match protocol {
                // Hop-by-hop, routing, destination options, mobility, HIP, shim.
                0 | 43 | 60 | 135 | 139 | 140 => (usize::from(u8_at(packet, at + 1)?) + 1) * 8,
                // Authentication.
                51 => (usize::from(u8_at(packet, at + 1)?) + 2) * 4,
                44 => {
                    let fragment = u16_at(packet, at + 2)?;
                    is_fragment = true;
                    has_start = fragment & 0xfff8 == 0;
                    8
                }
                _ => {
                    return Some(Self {
                        src,
                        dst,
                        protocol,
                        header_bytes: at,
                        total_bytes,
                        is_fragment,
                        has_start,
                        payload: packet.get(at..)?,
                    });
                }
            };
            protocol = u8_at(packet, at)?;
            at += bytes;
            if !has_start {
                // What follows is the middle of something.
                return Some(Self {
                    src,
                    dst,
                    protocol,
                    header_bytes: at,
                    total_bytes,
                    is_fragment,
                    has_start,
                    payload: packet.get(at..)?,
                });
            }
        }
        None
    }
}

/// Source and destination port at the start of a UDP or TCP header.
#[must_use]
pub fn ports(segment: &[u8]) -> Option<(u16, u16)> {
    Some((u16_at(segment, 0)?, u16_at(segment, 2)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{LaxNetSlice, LaxSlicedPacket, PacketBuilder};
    use proptest::prelude::*;

    proptest! {
        /// What another author's parser sees in packets, this one sees too.
        #[test]
        fn headers_are_read_as_others_read_them(
            src in any::<[u8; 4]>(), dst in any::<[u8; 4]>(), payload in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            let builder = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(src, dst, 9).udp(5, 7);
            let mut frame = Vec::new();
            builder.write(&mut frame, &payload).unwrap();
            let ethernet = Ethernet::read(&frame).unwrap();
            prop_assert_eq!((ethernet.src, ethernet.dst, ethernet.kind), (Mac([2; 6]), Mac([4; 6]), TYPE_IPV4));
            // Padding is not payload.
            frame.extend([0xee; 9]);
            let ip = Ipv4::read(&frame[ETHERNET_BYTES..]).unwrap();
            prop_assert_eq!((ip.src, ip.dst, ip.protocol), (src.into(), dst.into(), PROTOCOL_UDP));
            prop_assert_eq!(ports(ip.payload), Some((5, 7)));
            prop_assert_eq!(&ip.payload[UDP_BYTES..], &payload[..]);
        }

        #[test]
        fn random_packets_are_read_within_their_bounds(
            bytes in prop::collection::vec(any::<u8>(), 0..200), first in prop::sample::select(vec![0x45u8, 0x46, 0x4f, 0x60]),
        ) {
            let mut bytes = bytes;
            if let Some(byte) = bytes.first_mut() {
                *byte = first;
            }
            let _checked = (Ethernet::read(&bytes), Arp::read(&bytes));
            if let Some(ip) = Ipv4::read(&bytes) {
                prop_assert!(ip.header_bytes + ip.payload.len() == ip.total_bytes);
                prop_assert!(ip.total_bytes <= bytes.len());
            }
            if let Some(ip) = Ipv6::read(&bytes) {
                prop_assert!(ip.header_bytes + ip.payload.len() == ip.total_bytes);
                prop_assert!(ip.total_bytes <= bytes.len());
            }
        }

        /// Random chains of extension headers end where another author's parser says.
        #[test]
        fn extension_headers_are_followed_as_others_follow_them(
            kinds in prop::collection::vec(prop::sample::select(vec![0u8, 43, 60]), 0..5),
            payload in prop::collection::vec(any::<u8>(), 8..40),
        ) {
            // Hop-by-hop options come first or not at all.
            let mut kinds = kinds;
            let mut seen_first = true;
            kinds.retain(|&kind| kind != 0 || std::mem::take(&mut seen_first));
            kinds.sort_by_key(|&kind| kind != 0);
            kinds.dedup();
            let mut packet = vec![0x60, 0, 0, 0, 0, 0, 0, 64];
            packet.extend([0xfe; 32]);
            let mut next = 6;
            for &kind in &kinds {
                packet[next] = kind;
                next = packet.len();
                packet.extend([0, 0, 1, 4, 0, 0, 0, 0]);
            }
            packet[next] = PROTOCOL_UDP;
            let header_bytes = packet.len();
            packet.extend(&payload);
            let len = u16::try_from(packet.len() - IPV6_BYTES).unwrap();
            packet[4..6].copy_from_slice(&len.to_be_bytes());
            let ip = Ipv6::read(&packet).unwrap();
            prop_assert_eq!((ip.protocol, ip.header_bytes), (PROTOCOL_UDP, header_bytes));
            prop_assert_eq!(ip.payload, &payload[..]);
            let other = LaxSlicedPacket::from_ip(&packet).unwrap();
            let Some(LaxNetSlice::Ipv6(other)) = other.net else { panic!("no IPv6") };
            prop_assert_eq!(other.payload().payload, ip.payload);
        }
    }

    #[test]
    fn packet_with_endless_extension_headers_is_malformed() {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, 60, 64];
        packet.extend([0; 32]);
        for _ in 0..20 {
            packet.extend([60, 0, 0, 0, 0, 0, 0, 0]);
        }
        packet[4..6].copy_from_slice(&160u16.to_be_bytes());
        assert_eq!(Ipv6::read(&packet), None);
        // Beyond the end, too.
        packet[41] = 255;
        assert_eq!(Ipv6::read(&packet), None);
    }
}
