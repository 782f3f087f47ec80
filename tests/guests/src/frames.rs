//! The frames of `bench-net`: UDP datagrams, or TCP segments where they are longer than those of a usual wire, and
//! in each a note for the other side. No stack takes part: nothing is ever connected, or sent again.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Address, Ipv4Packet,
    Ipv4Repr, TcpPacket, UdpPacket, checksum,
};

/// Bytes of the header in front of each frame.
pub const HEADER_BYTES: usize = 12;
/// Shortest frame: it has room for a note.
pub const FRAME_BYTES_MIN: usize = 64;
/// Longest frame: the longest IP packet.
pub const FRAME_BYTES_MAX: usize = 14 + 65_535;

/// Longest frame that is not cut.
const WIRE_BYTES: usize = 1514;
const IP_AT: usize = 14;
const TRANSPORT_AT: usize = IP_AT + 20;
const UDP_BYTES: usize = 8;
const TCP_BYTES: usize = 20;
const TCP_CHECKSUM_AT: usize = 16;
/// TCP's bytes in each of the frames that a long one is cut into.
const SEGMENT_BYTES: u16 = 1460;
const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const PORT: u16 = 9;
const WORD: usize = 8;

/// A machine's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Station {
    /// Of its card.
    pub mac: EthernetAddress,
    /// Of the machine.
    pub ip: Ipv4Address,
}

/// What the other side is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Count the frame.
    Count = 0x4248_4e31,
    /// The same, and answer.
    Ask = 0x4248_4e32,
    /// Nothing: this is the answer.
    Answer = 0x4248_4e33,
}

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Note {
    /// What is to be done.
    pub kind: Kind,
    /// Number of the frame, or of the one that is answered.
    pub number: u64,
    /// Bytes of all frames that came to whoever sent this one.
    pub bytes: u64,
}

/// Fills a frame of [`FRAME_BYTES_MIN`] to [`FRAME_BYTES_MAX`] bytes but for its note.
pub fn lay(frame: &mut [u8], from: Station, to: Station) {
    let payload_len = frame.len() - TRANSPORT_AT;
    let is_long = frame.len() > WIRE_BYTES;
    let mut ethernet = EthernetFrame::new_unchecked(frame);
    ethernet.set_src_addr(from.mac);
    ethernet.set_dst_addr(to.mac);
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let mut packet = Ipv4Packet::new_unchecked(ethernet.payload_mut());
    let protocol = if is_long {
        IpProtocol::Tcp
    } else {
        IpProtocol::Udp
    };
    let about = Ipv4Repr {
        src_addr: from.ip,
        dst_addr: to.ip,
        next_header: protocol,
        payload_len,
        hop_limit: 64,
    };
    about.emit(&mut packet, &ChecksumCapabilities::default());
    if is_long {
        let mut tcp = TcpPacket::new_unchecked(packet.payload_mut());
        tcp.set_src_port(PORT);
        tcp.set_dst_port(PORT);
        tcp.set_header_len(TCP_BYTES as u8);
        tcp.set_ack(true);
        tcp.set_window_len(u16::MAX);
        // Whoever cuts it adds the rest.
        let sum = checksum::pseudo_header_v4(&from.ip, &to.ip, protocol, payload_len as u32);
        tcp.set_checksum(sum);
    } else {
        let mut udp = UdpPacket::new_unchecked(packet.payload_mut());
        udp.set_src_port(PORT);
        udp.set_dst_port(PORT);
        udp.set_len(payload_len as u16);
        udp.set_checksum(0);
    }
}

/// The header in front of a frame that was laid, of so many bytes.
pub fn header(frame_bytes: usize) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    if frame_bytes > WIRE_BYTES {
        header[..2].copy_from_slice(&[NEEDS_CHECKSUM, GSO_TCPV4]);
        let fields = [
            (TRANSPORT_AT + TCP_BYTES) as u16,
            SEGMENT_BYTES,
            TRANSPORT_AT as u16,
            TCP_CHECKSUM_AT as u16,
        ];
        for (place, field) in header[2..].as_chunks_mut::<2>().0.iter_mut().zip(fields) {
            *place = field.to_le_bytes();
        }
    }
    header
}

/// Where the note of a frame is; `None` for one that is not ours.
fn note_at(frame: &[u8]) -> Option<usize> {
    let is_ip = frame.get(12..14)? == [0x08, 0x00];
    let transport_bytes = match IpProtocol::from(*frame.get(IP_AT + 9)?) {
        IpProtocol::Tcp => TCP_BYTES,
        IpProtocol::Udp => UDP_BYTES,
        _ => return None,
    };
    is_ip.then_some(TRANSPORT_AT + transport_bytes)
}

/// Writes the note of a frame that was laid.
pub fn write_note(frame: &mut [u8], note: Note) {
    let Some(at) = note_at(frame) else {
        return;
    };
    let (kind, words) = frame[at..].split_at_mut(4);
    kind.copy_from_slice(&(note.kind as u32).to_le_bytes());
    words[..WORD].copy_from_slice(&note.number.to_le_bytes());
    words[WORD..2 * WORD].copy_from_slice(&note.bytes.to_le_bytes());
}

/// Reads the note of a frame, of which the beginning is enough. `None` when it has none.
pub fn read_note(frame: &[u8]) -> Option<Note> {
    let at = note_at(frame)?;
    let kind = u32::from_le_bytes(*frame.get(at..)?.first_chunk()?);
    let word = |place: usize| Some(u64::from_le_bytes(*frame.get(place..)?.first_chunk()?));
    Some(Note {
        kind: [Kind::Count, Kind::Ask, Kind::Answer]
            .into_iter()
            .find(|known| *known as u32 == kind)?,
        number: word(at + 4)?,
        bytes: word(at + 4 + WORD)?,
    })
}

/// Who sent a frame that has a note.
pub fn sender(frame: &[u8]) -> Option<Station> {
    let mac = *frame.get(6..)?.first_chunk()?;
    let ip: [u8; 4] = *frame.get(IP_AT + 12..)?.first_chunk()?;
    Some(Station {
        mac: EthernetAddress(mac),
        ip: ip.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FROM: Station = Station {
        mac: EthernetAddress([2, 0, 0, 0, 0, 1]),
        ip: Ipv4Address::new(10, 0, 0, 2),
    };
    const TO: Station = Station {
        mac: EthernetAddress([2, 0, 0, 0, 0, 2]),
        ip: Ipv4Address::new(10, 0, 0, 3),
    };

    #[test]
    fn notes_come_back_out_of_every_size() {
        let note = Note {
            kind: Kind::Ask,
            number: 1 << 40,
            bytes: u64::MAX,
        };
        for len in [FRAME_BYTES_MIN, WIRE_BYTES, WIRE_BYTES + 1, FRAME_BYTES_MAX] {
            let mut frame = vec![0; len];
            lay(&mut frame, FROM, TO);
            assert_eq!(read_note(&frame), None);
            write_note(&mut frame, note);
            assert_eq!(read_note(&frame), Some(note));
            assert_eq!(sender(&frame), Some(FROM));
            let packet = Ipv4Packet::new_checked(&frame[IP_AT..]).unwrap();
            assert!(packet.verify_checksum());
            assert_eq!(usize::from(packet.total_len()), len - IP_AT);
        }
        assert_eq!(read_note(&[0; 30]), None);
    }

    #[test]
    fn long_frames_are_left_to_be_cut() {
        assert_eq!(header(WIRE_BYTES), [0; HEADER_BYTES]);
        let mut frame = vec![0xa5; FRAME_BYTES_MAX];
        lay(&mut frame, FROM, TO);
        let header = header(frame.len());
        assert_eq!(header[..2], [NEEDS_CHECKSUM, GSO_TCPV4]);
        assert_eq!(header[2..], [54, 0, 0xb4, 0x05, 34, 0, 16, 0, 0, 0]);
        // Filled in as the header says, the checksum is that of the segment.
        let sum = !checksum::data(&frame[34..]);
        frame[50..52].copy_from_slice(&sum.to_be_bytes());
        let tcp = TcpPacket::new_checked(&frame[34..]).unwrap();
        assert!(tcp.verify_checksum(&FROM.ip.into(), &TO.ip.into()));
    }
}
