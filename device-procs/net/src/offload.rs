//! What a wire may leave undone and a driver may not be able to do: filling checksums in, and cutting large
//! TCP segments into those of a wire.
//!
//! A TAP interface delivers both whatever the driver negotiates, since telling it otherwise is an `ioctl`, which
//! this process may not make. Everything is read from a copy in private memory.

use crate::request::{FRAME_BYTES_MIN, GSO_TCPV4, GSO_TCPV6, HEADER_BYTES, Header};

const VLAN: [u8; 2] = [0x81, 0x00];
const VLAN_BYTES: usize = 4;
const IPV4_BYTES_MIN: usize = 20;
const IPV6_BYTES: usize = 40;
const TCP_BYTES_MIN: usize = 20;
const PROTOCOL_TCP: u8 = 6;
const FLAG_FIN: u8 = 0x01;
const FLAG_PSH: u8 = 0x08;
const FLAG_CWR: u8 = 0x80;

/// The ones' complement sum of `bytes`, not folded.
fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let words: u64 = words
        .iter()
        .map(|&w| u64::from(u16::from_be_bytes(w)))
        .sum();
    words + rest.first().map_or(0, |&last| u64::from(last) << 8)
}

fn fold(mut sum: u64) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap_or(0xffff)
}

fn put(frame: &mut [u8], at: usize, value: [u8; 2]) -> Option<()> {
    frame
        .get_mut(at..at.checked_add(2)?)?
        .copy_from_slice(&value);
    Some(())
}

fn word(frame: &[u8], at: usize) -> Option<u16> {
    let bytes = frame.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes(bytes.try_into().ok()?))
}

/// Fills in the checksum that `header` says is lacking. The place of it holds the sum over the pseudo header.
/// `None` when it is not in the frame.
pub fn fill_checksum(header: &Header, frame: &mut [u8]) -> Option<()> {
    let start = usize::from(header.checksum_start);
    let at = start + usize::from(header.checksum_offset);
    if !header.checksum_is_inside(frame.len()) {
        return None;
    }
    let filled = !fold(sum(frame.get(start..)?));
    // Zero would say that there is none (UDP); all ones means the same sum.
    let filled = if filled == 0 { 0xffff } else { filled };
    put(frame, at, filled.to_be_bytes())
}

/// A large TCP segment on its way to become several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cutter {
    ip: usize,
    tcp: usize,
    payload: usize,
    end: usize,
    piece: usize,
    is_v6: bool,
    /// Where in the payload the next piece begins.
    at: usize,
}

impl Cutter {
    /// Of a frame with a header that says that it is large. `None` when it is not what the header says.
    #[must_use]
    pub fn new(header: &Header, frame: &[u8]) -> Option<Self> {
        let is_v6 = match header.gso_type {
            GSO_TCPV4 => false,
            GSO_TCPV6 => true,
            _ => return None,
        };
        let mut ip = FRAME_BYTES_MIN;
        if frame.get(12..14)? == VLAN {
            ip += VLAN_BYTES;
        }
        let (tcp, end) = if is_v6 {
            let packet = usize::from(word(frame, ip + 4)?) + IPV6_BYTES;
            // Headers between are not cut: the wire does not deliver such as large ones.
            let plain = frame.get(ip)? >> 4 == 6 && *frame.get(ip + 6)? == PROTOCOL_TCP;
            (plain.then_some(ip + IPV6_BYTES)?, ip + packet)
        } else {
            let first = *frame.get(ip)?;
            let header_bytes = usize::from(first & 0xf) * 4;
            let sound = first >> 4 == 4
                && header_bytes >= IPV4_BYTES_MIN
                && *frame.get(ip + 9)? == PROTOCOL_TCP;
            let packet = usize::from(word(frame, ip + 2)?);
            (sound.then_some(ip + header_bytes)?, ip + packet)
        };
        let tcp_bytes = usize::from(*frame.get(tcp + 12)? >> 4) * 4;
        let payload = tcp + tcp_bytes;
        let piece = usize::from(header.gso_size);
        let sound = tcp_bytes >= TCP_BYTES_MIN && payload < end && end <= frame.len() && piece > 0;
        sound.then_some(Self {
            ip,
            tcp,
            payload,
            end,
            piece,
            is_v6,
            at: payload,
        })
    }

    /// Writes the next segment with an empty header in front to `out`. Returns its bytes; `None` when there is
    /// none any more, or no room for it.
    pub fn cut(&mut self, frame: &[u8], out: &mut [u8]) -> Option<usize> {
        if self.at >= self.end {
            return None;
        }
        let n = self.piece.min(self.end - self.at);
        let (first, last) = (self.at == self.payload, self.at + n == self.end);
        let len = HEADER_BYTES + self.payload + n;
        let out = out.get_mut(..len)?;
        let (header, segment) = out.split_at_mut(HEADER_BYTES);
        header.fill(0);
        segment
            .get_mut(..self.payload)?
            .copy_from_slice(frame.get(..self.payload)?);
        segment
            .get_mut(self.payload..)?
            .copy_from_slice(frame.get(self.at..self.at + n)?);
        let done = self.at - self.payload;
        self.mend_ip(segment, u16::try_from(done / self.piece).ok()?)?;
        self.mend_tcp(segment, u32::try_from(done).ok()?, first, last)?;
        self.at += n;
        Some(len)
    }

    fn mend_ip(&self, segment: &mut [u8], number: u16) -> Option<()> {
        let packet = u16::try_from(segment.len() - self.ip).ok()?;
        if self.is_v6 {
            let payload = packet.checked_sub(u16::try_from(IPV6_BYTES).ok()?)?;
            return put(segment, self.ip + 4, payload.to_be_bytes());
        }
        put(segment, self.ip + 2, packet.to_be_bytes())?;
        let id = word(segment, self.ip + 4)?.wrapping_add(number);
        put(segment, self.ip + 4, id.to_be_bytes())?;
        put(segment, self.ip + 10, [0, 0])?;
        let checksum = !fold(sum(segment.get(self.ip..self.tcp)?));
        put(segment, self.ip + 10, checksum.to_be_bytes())
    }

    fn mend_tcp(&self, segment: &mut [u8], done: u32, first: bool, last: bool) -> Option<()> {
        let at = self.tcp + 4;
        let sequence = segment.get_mut(at..at + 4)?;
        let number = u32::from_be_bytes(<[u8; 4]>::try_from(&*sequence).ok()?);
        sequence.copy_from_slice(&number.wrapping_add(done).to_be_bytes());
        let flags = segment.get_mut(self.tcp + 13)?;
        if !first {
            *flags &= !FLAG_CWR;
        }
        if !last {
            *flags &= !(FLAG_FIN | FLAG_PSH);
        }
        let addresses = if self.is_v6 {
            self.ip + 8..self.ip + 40
        } else {
            self.ip + 12..self.ip + 20
        };
        put(segment, self.tcp + 16, [0, 0])?;
        let tcp = segment.get(self.tcp..)?;
        let pseudo = sum(segment.get(addresses)?)
            + u64::from(PROTOCOL_TCP)
            + u64::try_from(tcp.len()).ok()?;
        let checksum = !fold(pseudo + sum(tcp));
        put(segment, self.tcp + 16, checksum.to_be_bytes())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A frame of `len` bytes that no other length has.
    pub(crate) fn frame(len: usize) -> Vec<u8> {
        (0..=255u8).cycle().skip(len % 7).take(len).collect()
    }

    /// A frame as it is on a wire with headers.
    pub(crate) fn with_header(header: &Header, frame: &[u8]) -> Vec<u8> {
        [&header.bytes()[..], frame].concat()
    }

    /// One that leaves nothing to do.
    pub(crate) fn plain(frame: &[u8]) -> Vec<u8> {
        with_header(&Header::default(), frame)
    }

    /// A TCP segment with `payload`, as Linux would hand it to a driver: without its checksum.
    pub(crate) fn tcp(is_v6: bool, vlan: bool, payload: &[u8]) -> (Header, Vec<u8>) {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        if vlan {
            frame.extend([0x81, 0, 0, 7]);
        }
        let tcp_len = u16::try_from(32 + payload.len()).unwrap();
        let pseudo = if is_v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(tcp_len.to_be_bytes());
            frame.extend([6, 64]);
            frame.extend([0xfd; 16]);
            frame.extend([0xfc; 16]);
            sum(&[0xfd; 16]) + sum(&[0xfc; 16]) + 6 + u64::from(tcp_len)
        } else {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((tcp_len + 20).to_be_bytes());
            frame.extend([0xff, 0xfe, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            sum(&[10, 0, 0, 1, 10, 0, 0, 2]) + 6 + u64::from(tcp_len)
        };
        let start = frame.len();
        frame.extend([0x1f, 0x90, 0xc0, 0x00]);
        frame.extend(0xffff_ff00u32.to_be_bytes());
        frame.extend([
            0,
            0,
            0,
            9,
            0x80,
            FLAG_FIN | FLAG_PSH | FLAG_CWR | 0x10,
            1,
            0,
        ]);
        frame.extend(fold(pseudo).to_be_bytes());
        frame.extend([0, 0, 1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]);
        frame.extend(payload);
        let mut bytes = [0; 12];
        bytes[0] = 1;
        bytes[1] = if is_v6 { GSO_TCPV6 } else { GSO_TCPV4 };
        bytes[2..4].copy_from_slice(&u16::try_from(start + 32).unwrap().to_le_bytes());
        bytes[4..6].copy_from_slice(&1000u16.to_le_bytes());
        bytes[6..8].copy_from_slice(&u16::try_from(start).unwrap().to_le_bytes());
        bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
        (Header::parse(&bytes), frame)
    }

    /// Checks the checksums of a segment by the rule of receivers, which is not how they were made.
    pub(crate) fn is_whole(frame: &[u8]) -> bool {
        let ip = if frame[12..14] == VLAN { 18 } else { 14 };
        let (tcp, addresses, ip_is_good) = if frame[ip] >> 4 == 6 {
            let len = usize::from(word(frame, ip + 4).unwrap());
            (ip + 40, ip + 8..ip + 40, len == frame.len() - ip - 40)
        } else {
            let len = usize::from(word(frame, ip + 2).unwrap());
            let good = fold(sum(&frame[ip..ip + 20])) == 0xffff && len == frame.len() - ip;
            (ip + 20, ip + 12..ip + 20, good)
        };
        let all = sum(&frame[addresses]) + 6 + (frame.len() - tcp) as u64 + sum(&frame[tcp..]);
        ip_is_good && fold(all) == 0xffff
    }

    #[test]
    fn filled_checksum_is_what_a_receiver_expects() {
        for is_v6 in [false, true] {
            let (header, mut frame) = tcp(is_v6, false, b"odd number");
            if !is_v6 {
                let ip = fold(sum(&frame[14..34]));
                put(&mut frame, 24, (!ip).to_be_bytes()).unwrap();
            }
            assert!(!is_whole(&frame));
            fill_checksum(&header, &mut frame).unwrap();
            assert!(is_whole(&frame));
        }
    }

    #[test]
    fn only_the_last_piece_ends_and_only_the_first_answers_congestion() {
        let (header, frame) = tcp(false, false, &[7; 2500]);
        let mut cutter = Cutter::new(&header, &frame).unwrap();
        let mut out = vec![0; 2000];
        let mut flags = Vec::new();
        let mut ids = Vec::new();
        while let Some(n) = cutter.cut(&frame, &mut out) {
            flags.push(out[12..n][34 + 13]);
            ids.push(word(&out[12..n], 18).unwrap());
        }
        let ack = 0x10;
        assert_eq!(flags, [ack | FLAG_CWR, ack, ack | FLAG_FIN | FLAG_PSH]);
        assert_eq!(ids, [0xfffe, 0xffff, 0]);
    }

    #[test]
    fn what_is_no_large_segment_is_not_cut() {
        let (header, frame) = tcp(false, false, &[1; 3000]);
        let v6 = Header {
            gso_type: GSO_TCPV6,
            ..header
        };
        assert_eq!(Cutter::new(&v6, &frame), None);
        let none = Header {
            gso_type: 5,
            ..header
        };
        assert_eq!(Cutter::new(&none, &frame), None);
        let nothing = Header {
            gso_size: 0,
            ..header
        };
        assert_eq!(Cutter::new(&nothing, &frame), None);
        for len in [0, 13, 30, 60, 3000] {
            assert_eq!(Cutter::new(&header, &frame[..len]), None, "{len}");
        }
    }

    proptest! {
        #[test]
        fn pieces_are_whole_and_make_up_the_segment(
            is_v6: bool, vlan: bool, piece in 1u16..9000,
            payload in prop::collection::vec(any::<u8>(), 1..20_000),
        ) {
            let (header, frame) = tcp(is_v6, vlan, &payload);
            let header = Header { gso_size: piece.max(u16::try_from(payload.len() / 60).unwrap() + 1), ..header };
            let mut cutter = Cutter::new(&header, &frame).unwrap();
            let mut out = vec![0xee; 65_600];
            let (mut got, mut next) = (Vec::new(), 0xffff_ff00u32);
            while let Some(n) = cutter.cut(&frame, &mut out) {
                prop_assert_eq!(&out[..12], &[0; 12]);
                let segment = &out[12..n];
                prop_assert!(is_whole(segment));
                let tcp = cutter.tcp;
                let sequence = u32::from_be_bytes(segment[tcp + 4..tcp + 8].try_into().unwrap());
                prop_assert_eq!(sequence, next);
                let part = &segment[tcp + 32..];
                prop_assert!(!part.is_empty() && part.len() <= usize::from(header.gso_size));
                next = next.wrapping_add(u32::try_from(part.len()).unwrap());
                got.extend_from_slice(part);
            }
            prop_assert_eq!(got, payload);
        }

        #[test]
        fn no_frame_is_too_strange(
            bytes: [u8; 12], mut frame in prop::collection::vec(any::<u8>(), 0..200), v6: bool, sound: bool,
        ) {
            if sound && frame.len() > 60 {
                let (_, like) = tcp(v6, false, &[]);
                frame[..like.len().min(60)].copy_from_slice(&like[..like.len().min(60)]);
            }
            let header = Header::parse(&bytes);
            for gso_type in [GSO_TCPV4, GSO_TCPV6] {
                let header = Header { gso_type, ..header };
                if let Some(mut cutter) = Cutter::new(&header, &frame) {
                    let mut out = [0; 300];
                    let mut pieces = 0;
                    while cutter.cut(&frame, &mut out).is_some() { pieces += 1; }
                    prop_assert!(pieces <= 200);
                }
            }
            let _outside = fill_checksum(&header, &mut frame);
        }
    }
}
