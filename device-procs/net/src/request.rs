//! The header in front of each frame (virtio 1.2, section 5.1.6), and what of it a driver may ask for.

use bulkhead_ipc::device_kind::NET_HEADER_BYTES;

/// Bytes of the header.
pub const HEADER_BYTES: usize = NET_HEADER_BYTES as usize;
/// Shortest frame: what Ethernet puts in front.
pub const FRAME_BYTES_MIN: usize = 14;
/// Longest frame: 64 KiB of IP behind what Ethernet puts in front, with two VLAN tags.
pub const FRAME_BYTES_MAX: usize = 65_535 + 14 + 8;

/// Feature bits (virtio 1.2, section 5.1.3).
pub mod feature {
    /// The host fills checksums in.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes frames whose checksum is to be filled in.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The configuration tells the largest packet.
    pub const MTU: u64 = 1 << 3;
    /// The configuration tells the address.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes TCP segments over IPv4 that are too large for a wire.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The same over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The host cuts TCP segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The same over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A received frame may be spread over several buffers.
    pub const MRG_RXBUF: u64 = bulkhead_ipc::device_kind::NET_MRG_RXBUF;
    /// The configuration tells whether the link is up.
    pub const STATUS: u64 = 1 << 16;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There are several pairs of queues.
    pub const MQ: u64 = bulkhead_ipc::device_kind::NET_MQ;
    /// The host cuts UDP datagrams.
    pub const HOST_USO: u64 = 1 << 56;
}

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
/// TCP over IPv4.
pub(crate) const GSO_TCPV4: u8 = 1;
/// TCP over IPv6.
pub(crate) const GSO_TCPV6: u8 = 4;
/// UDP datagrams of equal length.
const GSO_UDP_L4: u8 = 5;

/// A header as it was read, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Header {
    /// Whether a checksum is to be filled in.
    pub flags: u8,
    /// How the frame is to be cut.
    pub gso_type: u8,
    /// Bytes of headers in front of what is cut; a hint.
    pub header_len: u16,
    /// Bytes of each piece.
    pub gso_size: u16,
    /// Where the checksummed bytes begin.
    pub checksum_start: u16,
    /// Where from there the checksum goes.
    pub checksum_offset: u16,
}

/// Why a frame is not sent. The driver is not told, as on any wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unsound {
    /// It is no Ethernet frame.
    #[error("a frame of {0} bytes")]
    Length(usize),
    /// It asks for what was not negotiated.
    #[error("asks for what was not negotiated: flags {flags:#x}, cut {gso_type:#x}")]
    NotNegotiated {
        /// Flags.
        flags: u8,
        /// How it is to be cut.
        gso_type: u8,
    },
    /// The checksum is not in the frame.
    #[error("a checksum outside of the frame")]
    Checksum,
    /// It cannot be cut as it says.
    #[error("pieces of {gso_size} bytes behind {header_len}")]
    Pieces {
        /// Bytes of each piece.
        gso_size: u16,
        /// Bytes of headers in front.
        header_len: u16,
    },
}

impl Header {
    /// Reads one. All values are possible.
    #[must_use]
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let &[flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1, ..] = bytes;
        Self {
            flags,
            gso_type,
            header_len: u16::from_le_bytes([h0, h1]),
            gso_size: u16::from_le_bytes([g0, g1]),
            checksum_start: u16::from_le_bytes([s0, s1]),
            checksum_offset: u16::from_le_bytes([o0, o1]),
        }
    }

    /// As it is handed on, with the number of buffers left at zero.
    #[must_use]
    pub fn bytes(&self) -> [u8; HEADER_BYTES] {
        let [h0, h1] = self.header_len.to_le_bytes();
        let [g0, g1] = self.gso_size.to_le_bytes();
        let [s0, s1] = self.checksum_start.to_le_bytes();
        let [o0, o1] = self.checksum_offset.to_le_bytes();
        [
            self.flags,
            self.gso_type,
            h0,
            h1,
            g0,
            g1,
            s0,
            s1,
            o0,
            o1,
            0,
            0,
        ]
    }

    /// Whether the checksum is to be filled in.
    #[must_use]
    pub const fn needs_checksum(&self) -> bool {
        self.flags & NEEDS_CHECKSUM != 0
    }

    /// Whether the frame is to be cut.
    #[must_use]
    pub const fn is_large(&self) -> bool {
        self.gso_type != GSO_NONE
    }

    /// Whether a driver with `features` takes a frame with this header as it is.
    #[must_use]
    pub const fn suits(&self, features: u64) -> bool {
        let needed = match self.gso_type {
            GSO_NONE if self.needs_checksum() => feature::GUEST_CSUM,
            GSO_NONE => 0,
            GSO_TCPV4 => feature::GUEST_CSUM | feature::GUEST_TSO4,
            GSO_TCPV6 => feature::GUEST_CSUM | feature::GUEST_TSO6,
            _ => return false,
        };
        features & needed == needed
    }

    /// Whether the two bytes of the checksum lie in a frame of `len` bytes.
    #[must_use]
    pub fn checksum_is_inside(&self, len: usize) -> bool {
        usize::from(self.checksum_start) + usize::from(self.checksum_offset) + 2 <= len
    }

    /// What of a driver's header is handed to the wire for a frame of `len` bytes, when `features` were
    /// negotiated: nothing that they do not cover and nothing that points outside of the frame.
    ///
    /// # Errors
    /// [`Unsound`]: the frame is dropped.
    pub fn checked(self, len: usize, features: u64) -> Result<Self, Unsound> {
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&len) {
            return Err(Unsound::Length(len));
        }
        let not_negotiated = Unsound::NotNegotiated {
            flags: self.flags,
            gso_type: self.gso_type,
        };
        if !self.needs_checksum() {
            return if self.is_large() {
                Err(not_negotiated)
            } else {
                Ok(Self::default())
            };
        }
        if features & feature::CSUM == 0 {
            return Err(not_negotiated);
        }
        if !self.checksum_is_inside(len) {
            return Err(Unsound::Checksum);
        }
        let plain = Self {
            flags: NEEDS_CHECKSUM,
            checksum_start: self.checksum_start,
            checksum_offset: self.checksum_offset,
            ..Self::default()
        };
        let needed = match self.gso_type {
            GSO_NONE => return Ok(plain),
            GSO_TCPV4 => feature::HOST_TSO4,
            GSO_TCPV6 => feature::HOST_TSO6,
            GSO_UDP_L4 => feature::HOST_USO,
            _ => return Err(not_negotiated),
        };
        if features & needed == 0 {
            return Err(not_negotiated);
        }
        let header_len = usize::from(self.header_len);
        if self.gso_size == 0
            || header_len > len
            || (header_len > 0 && header_len < usize::from(self.checksum_start))
        {
            return Err(Unsound::Pieces {
                gso_size: self.gso_size,
                header_len: self.header_len,
            });
        }
        Ok(Self {
            gso_type: self.gso_type,
            gso_size: self.gso_size,
            header_len: self.header_len,
            ..plain
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: u64 = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO;

    fn large() -> Header {
        Header {
            flags: NEEDS_CHECKSUM,
            gso_type: GSO_TCPV4,
            header_len: 54,
            gso_size: 1448,
            checksum_start: 34,
            checksum_offset: 16,
        }
    }

    #[test]
    fn sound_headers_pass() {
        assert_eq!(large().checked(60_000, ALL), Ok(large()));
        let plain = Header::default();
        assert_eq!(plain.checked(60, 0), Ok(plain));
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        assert!(large().checked(60_000, ALL & !feature::HOST_TSO4).is_err());
        assert!(large().checked(60_000, ALL & !feature::CSUM).is_err());
        for gso_type in [2, 3, 6, 0x81, 255] {
            let header = Header {
                gso_type,
                ..large()
            };
            assert!(header.checked(60_000, u64::MAX).is_err(), "{gso_type}");
        }
        let without = Header {
            flags: 0,
            ..large()
        };
        assert!(without.checked(60_000, ALL).is_err());
    }

    #[test]
    fn what_lies_outside_of_the_frame_is_refused() {
        assert_eq!(large().checked(51, ALL), Err(Unsound::Checksum));
        assert!(large().checked(53, ALL).is_err());
        let header = Header {
            gso_size: 0,
            ..large()
        };
        assert!(header.checked(60_000, ALL).is_err());
        let header = Header {
            header_len: 20,
            ..large()
        };
        assert!(header.checked(60_000, ALL).is_err());
        for len in [0, 13, FRAME_BYTES_MAX + 1] {
            assert_eq!(
                Header::default().checked(len, ALL),
                Err(Unsound::Length(len))
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_passes_is_inside_of_the_frame(bytes: [u8; 12], len in 0usize..70_000, features: u64) {
            if let Ok(header) = Header::parse(&bytes).checked(len, features) {
                prop_assert_eq!(Header::parse(&header.bytes()), header);
                if header.needs_checksum() {
                    prop_assert!(header.checksum_is_inside(len));
                    prop_assert!(features & feature::CSUM != 0);
                }
                prop_assert!(usize::from(header.header_len) <= len);
                prop_assert!(!header.is_large() || header.gso_size > 0);
            }
        }
    }
}
