//! One queue of the wire on its way to the guest: what was taken from the wire and has no buffers yet.
//!
//! ```text
//!   wire ──────────────────── straight into the guest's buffers ──▶ guest     (the usual way)
//!     └▶ packet ─▶ made fit for the driver, piece by piece ─▶ ready ─▶ guest
//! ```
//!
//! A frame waits here only when the guest has too few buffers for it; nothing more is taken from that
//! queue of the wire meanwhile.

use crate::offload::{Cutter, fill_checksum};
use crate::request::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Header};

/// Room for the largest frame with its header.
const ROOM_BYTES: usize = HEADER_BYTES + FRAME_BYTES_MAX + 31;

/// What a frame from the wire is for a driver with certain features.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fit {
    /// It is ready.
    Ready,
    /// It is no frame that the driver could take.
    Unsound,
}

/// The queue.
#[derive(Debug)]
pub(crate) struct Inbox {
    /// There may be something on the wire.
    pub(crate) readable: bool,
    /// The guest had too few buffers for what comes next.
    pub(crate) starved: bool,
    /// Buffers that the next frame is expected to need.
    pub(crate) expected: usize,
    /// As it came from the wire.
    pub(crate) packet: Box<[u8]>,
    taken: usize,
    cutter: Option<Cutter>,
    ready: Box<[u8]>,
    ready_bytes: usize,
}

impl Inbox {
    pub(crate) fn new() -> Self {
        let room = || vec![0; ROOM_BYTES].into_boxed_slice();
        Self {
            readable: true,
            starved: false,
            expected: 1,
            packet: room(),
            taken: 0,
            cutter: None,
            ready: room(),
            ready_bytes: 0,
        }
    }

    /// Forgets what waits. Returns whether anything did.
    pub(crate) fn clear(&mut self) -> bool {
        let cutter = self.cutter.take().is_some();
        std::mem::take(&mut self.ready_bytes) > 0 || cutter
    }

    /// What waits for buffers: a frame that is ready, or else the next piece of one.
    pub(crate) fn waiting(&mut self) -> Option<&[u8]> {
        if self.ready_bytes == 0 {
            let frame = self
                .packet
                .get(HEADER_BYTES..self.taken)
                .unwrap_or_default();
            match self.cutter.as_mut()?.cut(frame, &mut self.ready) {
                Some(n) => self.ready_bytes = n,
                None => self.cutter = None,
            }
        }
        self.ready
            .get(..self.ready_bytes)
            .filter(|ready| !ready.is_empty())
    }

    /// What was waiting is with the guest, or lost.
    pub(crate) const fn done(&mut self) {
        self.ready_bytes = 0;
    }

    /// A frame of which the beginning is `front` and the rest the first `rest` bytes of [`Inbox::packet`] waits
    /// for more buffers.
    pub(crate) fn keep(&mut self, front: impl FnOnce(&mut [u8]) -> usize, rest: usize) {
        let n = front(&mut self.ready);
        let rest = self.packet.get(..rest).unwrap_or_default();
        let end = n.saturating_add(rest.len());
        if let Some(place) = self.ready.get_mut(n..end) {
            place.copy_from_slice(rest);
            self.ready_bytes = end;
        }
    }

    /// Makes the first `bytes` of [`Inbox::packet`] fit for a driver with `features`.
    pub(crate) fn admit(&mut self, bytes: usize, features: u64) -> Fit {
        let Some((head, frame)) = self
            .packet
            .get_mut(..bytes)
            .and_then(<[u8]>::split_first_chunk_mut::<HEADER_BYTES>)
        else {
            return Fit::Unsound;
        };
        if frame.len() < FRAME_BYTES_MIN {
            return Fit::Unsound;
        }
        let header = Header::parse(head);
        self.taken = bytes;
        if header.is_large() && !header.suits(features) {
            self.cutter = Cutter::new(&header, frame);
            return match self.cutter {
                Some(_) => Fit::Ready,
                None => Fit::Unsound,
            };
        }
        if header.needs_checksum() && !header.suits(features) {
            if fill_checksum(&header, frame).is_none() {
                return Fit::Unsound;
            }
            head.fill(0);
        }
        let packet = self.packet.get(..bytes).unwrap_or_default();
        if let Some(place) = self.ready.get_mut(..packet.len()) {
            place.copy_from_slice(packet);
            self.ready_bytes = bytes;
        }
        Fit::Ready
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::tests::{is_whole, tcp};
    use crate::request::feature;

    const ALL: u64 = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;

    fn inbox(is_v6: bool, payload: usize) -> (Inbox, usize) {
        let (header, frame) = tcp(is_v6, false, &vec![9; payload]);
        let mut inbox = Inbox::new();
        let bytes = HEADER_BYTES + frame.len();
        inbox.packet[..HEADER_BYTES].copy_from_slice(&header.bytes());
        inbox.packet[HEADER_BYTES..bytes].copy_from_slice(&frame);
        (inbox, bytes)
    }

    fn frames(inbox: &mut Inbox) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(frame) = inbox.waiting() {
            frames.push(frame.to_vec());
            inbox.done();
        }
        frames
    }

    #[test]
    fn driver_that_takes_large_segments_gets_them_as_they_are() {
        for (is_v6, bit) in [(false, feature::GUEST_TSO4), (true, feature::GUEST_TSO6)] {
            let (mut whole, bytes) = inbox(is_v6, 5000);
            assert_eq!(whole.admit(bytes, feature::GUEST_CSUM | bit), Fit::Ready);
            let expected = whole.packet[..bytes].to_vec();
            assert_eq!(frames(&mut whole), [expected]);
        }
    }

    #[test]
    fn driver_that_does_not_gets_pieces_with_checksums() {
        for (is_v6, features) in [
            (false, 0),
            (false, ALL & !feature::GUEST_TSO4),
            (true, feature::GUEST_TSO6),
        ] {
            let (mut cut, bytes) = inbox(is_v6, 5000);
            assert_eq!(cut.admit(bytes, features), Fit::Ready);
            let got = frames(&mut cut);
            assert_eq!(got.len(), 5);
            assert!(got.iter().all(|f| f[..12] == [0; 12] && is_whole(&f[12..])));
        }
    }

    #[test]
    fn frame_that_waits_is_kept_until_it_is_done() {
        let mut inbox = Inbox::new();
        inbox.packet[..3].copy_from_slice(b"def");
        inbox.keep(
            |front| {
                front[..3].copy_from_slice(b"abc");
                3
            },
            3,
        );
        assert_eq!(inbox.waiting(), Some(&b"abcdef"[..]));
        assert_eq!(inbox.waiting(), Some(&b"abcdef"[..]));
        assert!(inbox.clear());
        assert_eq!(inbox.waiting(), None);
        assert!(!inbox.clear());
    }

    #[test]
    fn what_the_driver_cannot_take_is_unsound() {
        let (mut short, _) = inbox(false, 10);
        assert_eq!(short.admit(HEADER_BYTES + 13, ALL), Fit::Unsound);
        assert_eq!(short.admit(0, ALL), Fit::Unsound);
        let (mut unknown, bytes) = inbox(false, 10);
        unknown.packet[1] = 5;
        assert_eq!(unknown.admit(bytes, ALL), Fit::Unsound);
        let (mut outside, bytes) = inbox(false, 10);
        outside.packet[1] = 0;
        outside.packet[8] = 200;
        assert_eq!(outside.admit(bytes, 0), Fit::Unsound);
        assert_eq!(outside.waiting(), None);
    }
}
