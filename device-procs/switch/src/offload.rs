//! The `virtio_net_hdr` before each frame: what a sender has left for others to do, checksums and
//! segmentation of TCP.
//!
//! What a machine says there would be believed by the kernel of the receiver, so it is judged against the
//! frame first ([`PacketHeader::check`]) and passed on only where the receiver has agreed to do that work. For the
//! others it is done here.

use crate::Cause;
use crate::checksum;
use crate::wire::{
    ETHERNET_BYTES, IPV6_BYTES, Ipv4, Ipv6, PROTOCOL_TCP, TYPE_IPV4, TYPE_IPV6, bytes_at, put,
    u8_at, u16_at,
};
use bulkhead_ipc::port::PACKET_HEADER_BYTES;
use std::net::IpAddr;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_ECN: u8 = 0x80;

/// Smallest segment that is asked for: smaller ones would make one frame many hundreds. Kernels' own limit
/// is 256 with options.
const SEGMENT_BYTES_MIN: u16 = 200;
/// Where the checksum is in a TCP header.
const TCP_CHECKSUM: usize = 16;
const TCP_BYTES: usize = 20;
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// What a receiver does itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offload {
    /// It takes frames whose TCP or UDP checksum is still to be made.
    pub checksum: bool,
    /// It takes TCP over IPv4 that is still to be cut into segments.
    pub tcp4: bool,
    /// The same over IPv6.
    pub tcp6: bool,
    /// The same where the sender uses explicit congestion notification.
    pub ecn: bool,
}

impl Offload {
    /// All of it.
    pub const ALL: Self = Self {
        checksum: true,
        tcp4: true,
        tcp6: true,
        ecn: true,
    };
}

/// What is left to do of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PacketHeader {
    flags: u8,
    gso: u8,
    header_bytes: u16,
    segment_bytes: u16,
    checksum_start: u16,
    checksum_offset: u16,
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes_at(bytes, at).map(u16::from_le_bytes)
}

impl PacketHeader {
    /// From the front of a record.
    #[must_use]
    pub fn read(record: &[u8]) -> Option<Self> {
        record.get(..PACKET_HEADER_BYTES)?;
        Some(Self {
            flags: u8_at(record, 0)?,
            gso: u8_at(record, 1)?,
            header_bytes: le16(record, 2)?,
            segment_bytes: le16(record, 4)?,
            checksum_start: le16(record, 6)?,
            checksum_offset: le16(record, 8)?,
        })
    }

    /// As it stands before a frame, for a receiver that has one buffer for it.
    #[must_use]
    pub fn bytes(&self) -> [u8; PACKET_HEADER_BYTES] {
        let [h0, h1] = self.header_bytes.to_le_bytes();
        let [s0, s1] = self.segment_bytes.to_le_bytes();
        let [c0, c1] = self.checksum_start.to_le_bytes();
        let [o0, o1] = self.checksum_offset.to_le_bytes();
        [self.flags, self.gso, h0, h1, s0, s1, c0, c1, o0, o1, 1, 0]
    }

    /// Whether the frame's checksum is still to be made.
    #[must_use]
    pub const fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CHECKSUM != 0
    }

    /// Whether the frame is still to be cut into segments.
    #[must_use]
    pub const fn needs_segments(&self) -> bool {
        self.gso != GSO_NONE
    }

    /// Bytes of the longest frame that it becomes.
    #[must_use]
    pub fn frame_bytes(&self, frame: &[u8]) -> usize {
        if self.needs_segments() {
            usize::from(self.header_bytes) + usize::from(self.segment_bytes)
        } else {
            frame.len()
        }
    }

    /// Judges what a sender said of an untagged `frame` and keeps of it what is needed.
    ///
    /// # Errors
    /// [`Cause::Offload`] when it does not fit the frame.
    pub fn check(self, frame: &[u8]) -> Result<Self, Cause> {
        let gso = self.gso & !GSO_ECN;
        if gso == GSO_NONE && self.gso != GSO_NONE {
            return Err(Cause::Offload);
        }
        if !self.needs_checksum() {
            return match gso {
                GSO_NONE => Ok(Self::default()),
                _ => Err(Cause::Offload),
            };
        }
        let start = usize::from(self.checksum_start);
        let field = start + usize::from(self.checksum_offset);
        if start < ETHERNET_BYTES || field + 2 > frame.len() {
            return Err(Cause::Offload);
        }
        let plain = Self {
            flags: NEEDS_CHECKSUM,
            checksum_start: self.checksum_start,
            checksum_offset: self.checksum_offset,
            ..Self::default()
        };
        if gso == GSO_NONE {
            return Ok(plain);
        }
        let headers = Headers::read(frame).ok_or(Cause::Offload)?;
        let is_as_it_says = headers.transport == start
            && usize::from(self.checksum_offset) == TCP_CHECKSUM
            && headers.is_v6 == (gso == GSO_TCPV6)
            && matches!(gso, GSO_TCPV4 | GSO_TCPV6)
            && headers.end == frame.len()
            && headers.payload < frame.len()
            && self.segment_bytes >= SEGMENT_BYTES_MIN;
        if !is_as_it_says {
            return Err(Cause::Offload);
        }
        Ok(Self {
            gso: self.gso,
            header_bytes: u16::try_from(headers.payload).map_err(|_| Cause::Offload)?,
            segment_bytes: self.segment_bytes,
            ..plain
        })
    }

    /// Whether a receiver with `offload` takes the frame as it is.
    #[must_use]
    pub const fn fits(&self, offload: Offload) -> bool {
        let segments = match self.gso & !GSO_ECN {
            GSO_TCPV4 => offload.tcp4,
            GSO_TCPV6 => offload.tcp6,
            _ => true,
        };
        let ecn = self.gso & GSO_ECN == 0 || offload.ecn;
        (!self.needs_checksum() || offload.checksum) && segments && ecn
    }

    /// The same for a frame that gets `more` bytes behind its Ethernet addresses.
    #[must_use]
    pub const fn moved(self, more: u16) -> Self {
        if !self.needs_checksum() {
            return self;
        }
        Self {
            checksum_start: self.checksum_start.saturating_add(more),
            header_bytes: if self.needs_segments() {
                self.header_bytes.saturating_add(more)
            } else {
                self.header_bytes
            },
            ..self
        }
    }

    /// What is left of a header of a tagged frame when the tag of `less` bytes is taken away.
    #[must_use]
    pub const fn moved_back(self, less: u16) -> Self {
        Self {
            checksum_start: self.checksum_start.saturating_sub(less),
            ..self
        }
    }

    /// Makes the checksum of a frame that is not to be segmented. Returns what is left to do: nothing.
    pub fn make_checksum(self, frame: &mut [u8]) -> Self {
        let start = usize::from(self.checksum_start);
        // The field holds the sum of the pseudo header.
        let sum = match checksum::fold(checksum::add(0, frame.get(start..).unwrap_or_default())) {
            0 => 0xffff,
            sum => sum,
        };
        put(
            frame,
            start + usize::from(self.checksum_offset),
            &sum.to_be_bytes(),
        );
        Self::default()
    }

    /// Cuts a frame that was judged into segments, each whole with its checksums, and calls `each` with
    /// them in order. `buffer` is room that is used again.
    pub fn cut(&self, frame: &[u8], buffer: &mut Vec<u8>, mut each: impl FnMut(&mut [u8])) {
        let Some(headers) = Headers::read(frame) else {
            return;
        };
        let (Some(head), Some(payload)) =
            (frame.get(..headers.payload), frame.get(headers.payload..))
        else {
            return;
        };
        let size = usize::from(self.segment_bytes.max(SEGMENT_BYTES_MIN));
        let count = payload.len().div_ceil(size);
        for (number, part) in payload.chunks(size).enumerate() {
            buffer.clear();
            buffer.extend_from_slice(head);
            buffer.extend_from_slice(part);
            headers.finish(buffer, number, number * size, number + 1 == count);
            each(buffer);
        }
    }
}

/// Where the headers of a TCP packet are in an untagged frame.
#[derive(Debug, Clone, Copy)]
struct Headers {
    is_v6: bool,
    src: IpAddr,
    dst: IpAddr,
    transport: usize,
    payload: usize,
    /// Where the packet ends by its own account.
    end: usize,
}

impl Headers {
    fn read(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET_BYTES..)?;
        let (is_v6, src, dst, protocol, header_bytes, total_bytes, is_fragment) =
            match u16_at(frame, 12)? {
                TYPE_IPV4 => {
                    let ip = Ipv4::read(packet)?;
                    let (src, dst) = (ip.src.into(), ip.dst.into());
                    let (protocol, header) = (ip.protocol, ip.header_bytes);
                    (
                        false,
                        src,
                        dst,
                        protocol,
                        header,
                        ip.total_bytes,
                        ip.is_fragment,
                    )
                }
                TYPE_IPV6 => {
                    let ip = Ipv6::read(packet)?;
                    let (src, dst) = (ip.src.into(), ip.dst.into());
                    let (protocol, header) = (ip.protocol, ip.header_bytes);
                    (
                        true,
                        src,
                        dst,
                        protocol,
                        header,
                        ip.total_bytes,
                        ip.is_fragment,
                    )
                }
                _ => return None,
            };
        let transport = ETHERNET_BYTES + header_bytes;
        let tcp_bytes = usize::from(u8_at(frame, transport + 12)? >> 4) * 4;
        let payload = transport + tcp_bytes;
        let end = ETHERNET_BYTES + total_bytes;
        if protocol != PROTOCOL_TCP || is_fragment || tcp_bytes < TCP_BYTES || payload > end {
            return None;
        }
        Some(Self {
            is_v6,
            src,
            dst,
            transport,
            payload,
            end,
        })
    }

    /// Makes the headers of segment `number`, whose payload begins `at` bytes into the whole, its own.
    fn finish(&self, segment: &mut [u8], number: usize, at: usize, is_last: bool) {
        let ip_bytes = segment.len() - ETHERNET_BYTES;
        if self.is_v6 {
            let len = u16::try_from(ip_bytes - IPV6_BYTES).unwrap_or(u16::MAX);
            put(segment, ETHERNET_BYTES + 4, &len.to_be_bytes());
        } else {
            let len = u16::try_from(ip_bytes).unwrap_or(u16::MAX);
            put(segment, ETHERNET_BYTES + 2, &len.to_be_bytes());
            let id = u16_at(segment, ETHERNET_BYTES + 4).unwrap_or(0);
            let id = id.wrapping_add(u16::try_from(number).unwrap_or(0));
            put(segment, ETHERNET_BYTES + 4, &id.to_be_bytes());
            put(segment, ETHERNET_BYTES + 10, &[0, 0]);
            let header = segment
                .get(ETHERNET_BYTES..self.transport)
                .unwrap_or_default();
            let sum = checksum::fold(checksum::add(0, header));
            put(segment, ETHERNET_BYTES + 10, &sum.to_be_bytes());
        }
        let tcp = self.transport;
        let sequence = bytes_at(segment, tcp + 4).map_or(0, u32::from_be_bytes);
        let sequence = sequence.wrapping_add(u32::try_from(at).unwrap_or(0));
        put(segment, tcp + 4, &sequence.to_be_bytes());
        let mut flags = u8_at(segment, tcp + 13).unwrap_or(0);
        if !is_last {
            flags &= !(TCP_FIN | TCP_PSH);
        }
        if number > 0 {
            flags &= !TCP_CWR;
        }
        put(segment, tcp + 13, &[flags]);
        put(segment, tcp + TCP_CHECKSUM, &[0, 0]);
        let whole = segment.get(tcp..).unwrap_or_default();
        let sum = checksum::transport(self.src, self.dst, PROTOCOL_TCP, whole);
        put(segment, tcp + TCP_CHECKSUM, &sum.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{gso, tcp_frame};
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    #[test]
    fn header_is_written_as_it_was_read() {
        let bytes = [1, 0x81, 54, 0, 0xb4, 5, 34, 0, 16, 0, 1, 0];
        assert_eq!(PacketHeader::read(&bytes).unwrap().bytes(), bytes);
        assert_eq!(PacketHeader::read(&bytes[..11]), None);
    }

    #[test]
    fn what_contradicts_the_frame_is_refused() {
        for is_v6 in [false, true] {
            let frame = tcp_frame(is_v6, &[7; 3000]);
            let good = gso(&frame, 1000);
            let read = |bytes: [u8; 12]| PacketHeader::read(&bytes).unwrap();
            assert!(read(good).check(&frame).is_ok());
            let spoiled = |at: usize, value: u8| {
                let mut bytes = good;
                bytes[at] = value;
                read(bytes)
            };
            let gso_type = good[1];
            let cases = [
                (0, 0),            // segments without a checksum
                (1, 5 - gso_type), // the other IP version
                (1, 3),            // UDP fragmentation
                (1, 5),            // UDP segmentation
                (1, 0x80),         // congestion of nothing
                (4, 100),          // segment size 868
                (6, good[6] + 1),  // another place of the checksum
                (7, 0xff),         // far outside
                (8, 18),           // not TCP's field
                (5, 0),            // segments of 232 bytes
            ];
            for (at, value) in cases {
                let judged = spoiled(at, value).check(&frame);
                let is_fine = matches!((at, value), (4, 100) | (5, 0));
                assert_eq!(judged.is_ok(), is_fine, "{at} {value}");
            }
            let mut tiny = good;
            tiny[4..6].copy_from_slice(&199u16.to_le_bytes());
            assert_eq!(read(tiny).check(&frame), Err(Cause::Offload));
            // A frame that ends before its packet does, or after.
            assert!(read(good).check(&frame[..frame.len() - 1]).is_err());
            let mut longer = frame.clone();
            longer.push(0);
            assert!(read(good).check(&longer).is_err());
        }
    }

    #[test]
    fn nothing_is_left_of_what_a_sender_may_not_say() {
        let frame = tcp_frame(false, b"x");
        let bytes = [2, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
        let judged = PacketHeader::read(&bytes).unwrap().check(&frame).unwrap();
        assert_eq!(judged, PacketHeader::default());
    }

    proptest! {
        /// Segments put together are the data, and another author's parser finds every checksum right.
        #[test]
        fn segments_are_whole_and_their_data_is_what_was_sent(
            is_v6: bool, payload in prop::collection::vec(any::<u8>(), 1..20_000), size in SEGMENT_BYTES_MIN..3000,
        ) {
            let frame = tcp_frame(is_v6, &payload);
            let header = PacketHeader::read(&gso(&frame, size)).unwrap().check(&frame).unwrap();
            let mut data = Vec::new();
            let mut lasts = Vec::new();
            header.cut(&frame, &mut Vec::new(), |segment| {
                let packet = SlicedPacket::from_ethernet(segment).unwrap();
                let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP") };
                let first = u32::try_from(data.len()).unwrap();
                assert_eq!(tcp.sequence_number(), 1000u32.wrapping_add(first));
                let sum = match packet.net {
                    Some(NetSlice::Ipv4(ip)) => {
                        assert_eq!(ip.header().to_header().calc_header_checksum(), ip.header().header_checksum());
                        tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination())
                            .unwrap()
                    }
                    Some(NetSlice::Ipv6(ip)) => tcp.calc_checksum_ipv6(ip.header().source(), ip.header().destination()).unwrap(),
                    _ => panic!("no IP"),
                };
                assert_eq!(tcp.checksum(), sum);
                assert!(tcp.payload().len() <= size.into());
                lasts.push((tcp.psh(), tcp.fin()));
                data.extend_from_slice(tcp.payload());
            });
            prop_assert_eq!(data, payload);
            let last = lasts.pop();
            prop_assert_eq!(last, Some((true, true)));
            prop_assert!(lasts.iter().all(|&flags| flags == (false, false)));
        }

        #[test]
        fn checksum_is_made_as_others_make_it(is_v6: bool, payload in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut frame = tcp_frame(is_v6, &payload);
            let whole = frame.clone();
            let mut bytes = gso(&frame, 1000);
            (bytes[1], bytes[2], bytes[4], bytes[5]) = (0, 0, 0, 0);
            // As a driver leaves it: the sum of the pseudo header.
            let headers = Headers::read(&frame).unwrap();
            let sum = !checksum::fold(checksum::pseudo(headers.src, headers.dst, PROTOCOL_TCP, frame.len() - headers.transport));
            put(&mut frame, headers.transport + TCP_CHECKSUM, &sum.to_be_bytes());
            let header = PacketHeader::read(&bytes).unwrap().check(&frame).unwrap();
            prop_assert!(header.needs_checksum() && !header.needs_segments());
            prop_assert_eq!(header.make_checksum(&mut frame), PacketHeader::default());
            prop_assert_eq!(frame, whole);
        }

        #[test]
        fn random_headers_and_frames_never_panic(
            header in any::<[u8; 12]>(), frame in prop::collection::vec(any::<u8>(), 0..300), is_ip in 0..3,
        ) {
            let mut frame = frame;
            if is_ip > 0 && frame.len() > 40 {
                put(&mut frame, 12, &[[8, 0], [0x86, 0xdd]][usize::from(is_ip == 2)]);
                frame[14] = if is_ip == 1 { 0x45 } else { 0x60 };
            }
            if let Ok(header) = PacketHeader::read(&header).unwrap().check(&frame) {
                if header.needs_segments() {
                    header.cut(&frame, &mut Vec::new(), |_| ());
                } else if header.needs_checksum() {
                    header.make_checksum(&mut frame);
                }
            }
        }
    }
}
