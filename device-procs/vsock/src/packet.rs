//! The header of each packet (virtio 1.2, section 5.10.6). All fields are little endian.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// Bytes of payload that one packet carries at most, in either direction.
pub const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// The context id of the host (section 5.10.4).
pub const HOST_CID: u64 = 2;
/// The port that means any port, which nobody can listen on.
pub const PORT_ANY: u32 = u32::MAX;
/// The type of stream sockets.
pub const TYPE_STREAM: u16 = 1;
/// Flag of [`Op::Shutdown`]: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// Flag of [`Op::Shutdown`]: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both flags of [`Op::Shutdown`].
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one.
    Reset,
    /// Says that no more is sent, received or both.
    Shutdown,
    /// Carries payload.
    Payload,
    /// Tells how much room there is.
    CreditUpdate,
    /// Asks how much room there is.
    CreditRequest,
}

impl Op {
    /// The number that stands for it.
    #[must_use]
    pub const fn number(self) -> u16 {
        match self {
            Self::Request => 1,
            Self::Response => 2,
            Self::Reset => 3,
            Self::Shutdown => 4,
            Self::Payload => 5,
            Self::CreditUpdate => 6,
            Self::CreditRequest => 7,
        }
    }

    /// What `number` stands for, if anything.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        match number {
            1 => Some(Self::Request),
            2 => Some(Self::Response),
            3 => Some(Self::Reset),
            4 => Some(Self::Shutdown),
            5 => Some(Self::Payload),
            6 => Some(Self::CreditUpdate),
            7 => Some(Self::CreditRequest),
            _ => None,
        }
    }
}

/// A header, with fields as the sender has set them: nothing is checked yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    /// Type of the sockets.
    pub kind: u16,
    /// Number of the [`Op`].
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Bytes that the sender can keep of this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has passed on since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// The header in `bytes`.
    #[must_use]
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.as_slice();
        Self {
            src_cid: u64::from_le_bytes(next(&mut rest)),
            dst_cid: u64::from_le_bytes(next(&mut rest)),
            src_port: u32::from_le_bytes(next(&mut rest)),
            dst_port: u32::from_le_bytes(next(&mut rest)),
            len: u32::from_le_bytes(next(&mut rest)),
            kind: u16::from_le_bytes(next(&mut rest)),
            op: u16::from_le_bytes(next(&mut rest)),
            flags: u32::from_le_bytes(next(&mut rest)),
            buf_alloc: u32::from_le_bytes(next(&mut rest)),
            fwd_cnt: u32::from_le_bytes(next(&mut rest)),
        }
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let all = fields.into_iter().flatten();
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = *from);
        bytes
    }
}

/// The first `N` bytes of `rest`, which is left without them; zeros where there are fewer.
fn next<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((first, behind)) = rest.split_first_chunk() else {
        return [0; N];
    };
    *rest = behind;
    *first
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fields_are_where_the_standard_has_them() {
        let mut bytes = [0; HEADER_BYTES];
        for (at, value) in [(0, 3), (8, 2), (16, 52), (20, 7), (24, 9), (28, 1), (30, 5)] {
            bytes[at] = value;
        }
        (bytes[32], bytes[36], bytes[40]) = (2, 64, 33);
        let expected = Header {
            src_cid: 3,
            dst_cid: 2,
            src_port: 52,
            dst_port: 7,
            len: 9,
            kind: TYPE_STREAM,
            op: Op::Payload.number(),
            flags: SHUTDOWN_SEND,
            buf_alloc: 64,
            fwd_cnt: 33,
        };
        assert_eq!(Header::decode(&bytes), expected);
    }

    #[test]
    fn every_number_of_an_operation_stands_for_itself_or_nothing() {
        for number in 0..=u16::MAX {
            let op = Op::from_number(number);
            assert_eq!(op.is_some(), (1..=7).contains(&number));
            assert!(op.is_none_or(|op| op.number() == number));
        }
    }

    proptest! {
        #[test]
        fn any_header_is_the_same_after_encoding(low in any::<[u8; 32]>(), high in any::<[u8; 12]>()) {
            let mut bytes = [0; HEADER_BYTES];
            bytes[..32].copy_from_slice(&low);
            bytes[32..].copy_from_slice(&high);
            prop_assert_eq!(Header::decode(&bytes).encode(), bytes);
        }
    }
}
