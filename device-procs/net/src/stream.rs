//! A wire that leads to a program beside the machine, which speaks for the guest with the host's own sockets (passt): a stream
//! socket with one frame after the other, each behind its length in 4 bytes, big endian, as QEMU's `-netdev stream` has them.
//!
//! The program is not Bulkhead's, and what the guest sends may have taken it over: lengths are checked before use, and after
//! one that cannot be nothing on the stream means anything. Then, and when the program is gone, the wire is over: the process ends,
//! and its successor is born with another program.

use crate::backend::{Backend, Offloads, Received};
use crate::request::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES};
use bulkhead_runtime::{Queues, Span};
use nix::errno::Errno;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};

/// An Ethernet header, its type last.
const ETHERNET_BYTES: usize = 14;
/// It with an IPv6 header, or with the part of an IPv4 header that has the addresses.
const ADDRESSES_BYTES: usize = ETHERNET_BYTES + 40;
/// What is in front of a frame.
const LENGTH_BYTES: usize = 4;
/// The longest frame that is sent: more is more than newer passts believe.
const SENT_BYTES_MAX: usize = 65_535;
/// The largest frame with its length.
const WHOLE_BYTES_MAX: usize = LENGTH_BYTES + FRAME_BYTES_MAX;
/// Room for what one read takes.
const INBOUND_BYTES: usize = 4 * WHOLE_BYTES_MAX;

/// The card's end.
#[derive(Debug)]
pub(crate) struct Stream {
    socket: OwnedFd,
    /// What was read and not delivered is in [`Stream::unread`] of it.
    inbound: Box<[u8]>,
    unread: Range<usize>,
    /// What the socket had no room for is in [`Stream::unsent`] of it: the end of one frame.
    outbound: Box<[u8]>,
    unsent: Range<usize>,
    is_over: bool,
}

impl Stream {
    /// Over a connected socket that does not block.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            inbound: vec![0; INBOUND_BYTES].into(),
            unread: 0..0,
            outbound: vec![0; WHOLE_BYTES_MAX].into(),
            unsent: 0..0,
            is_over: false,
        }
    }

    /// The program has ended, or nothing that comes from it means anything.
    fn end(&mut self, why: &dyn std::fmt::Display) {
        if !std::mem::replace(&mut self.is_over, true) {
            tracing::warn!(%why, "the wire is over");
        }
    }

    /// Where in [`Stream::inbound`] the next frame is, if all of it has come.
    fn whole(&mut self) -> Option<Range<usize>> {
        let unread = self.inbound.get(self.unread.clone())?;
        let (length, rest) = unread.split_first_chunk::<LENGTH_BYTES>()?;
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&length) {
            self.end(&format_args!("a frame of {length} bytes was announced"));
            return None;
        }
        if rest.len() < length {
            return None;
        }
        let start = self.unread.start + LENGTH_BYTES;
        Some(start..start + length)
    }

    /// Reads more. Returns whether there was any.
    fn fill(&mut self, window: &Queues) -> bool {
        if self.is_over {
            return false;
        }
        if self.unread.is_empty() {
            self.unread = 0..0;
        }
        if self.inbound.len() - self.unread.start < WHOLE_BYTES_MAX {
            let bytes = self.unread.len();
            self.inbound.copy_within(self.unread.clone(), 0);
            self.unread = 0..bytes;
        }
        let room = self.inbound.get_mut(self.unread.end..).unwrap_or_default();
        match window.read_scattered(&self.socket, std::iter::empty(), room) {
            Ok(0) => self.end(&"the program at its other end is gone"),
            Ok(n) => {
                self.unread.end += n;
                return true;
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(errno) => self.end(&errno),
        }
        false
    }

    /// Sends on what the socket had no room for.
    fn flush(&mut self, window: &Queues) {
        while !self.unsent.is_empty() && !self.is_over {
            let left = self.outbound.get(self.unsent.clone()).unwrap_or_default();
            match window.write_gathered(&self.socket, left, std::iter::empty()) {
                Ok(n) => self.unsent.start += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(errno) => self.end(&errno),
            }
        }
    }
}

/// Whether a packet is for the host itself, or says that it is from there. Older passts connect to any address that a guest names, from
/// where the host's loopback is: what listens there trusts whoever reaches it.
fn leads_to_host(frame: &[u8]) -> bool {
    let part = |at: usize, len: usize| frame.get(ETHERNET_BYTES + at..ETHERNET_BYTES + at + len);
    let v4 = |at| {
        let bytes = part(at, 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok());
        bytes.map(Ipv4Addr::from)
    };
    let v6 = |at| {
        let bytes = part(at, 16).and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
        bytes.map(Ipv6Addr::from)
    };
    // An IPv4 address in the form of an IPv6 address is that of whatever it means.
    let embedded =
        |address: &Ipv6Addr| matches!(address.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, _, _]);
    match frame.get(ETHERNET_BYTES - 2..ETHERNET_BYTES) {
        Some([8, 0]) => {
            let to_host = |to: Ipv4Addr| to.is_loopback() || to.octets().first() == Some(&0);
            v4(16).is_some_and(to_host) || v4(12).is_some_and(|from| from.is_loopback())
        }
        Some([0x86, 0xdd]) => {
            // Who looks for an address has none yet.
            let from_host = |from: Ipv6Addr| embedded(&from) && !from.is_unspecified();
            v6(24).is_some_and(|to| embedded(&to)) || v6(8).is_some_and(from_host)
        }
        _ => false,
    }
}

/// Writes the parts one behind the other into the spans and, what they have no room for, into `rest`. Returns their
/// length, or less if there was no room.
fn put(parts: [&[u8]; 2], to: &[Span], rest: &mut [u8], window: &Queues) -> usize {
    let (mut spans, mut span) = (to.iter(), Span::default());
    let (mut total, mut copied) = (0, 0);
    for mut part in parts {
        while !part.is_empty() {
            if span.is_empty() {
                match spans.next() {
                    Some(next) => span = *next,
                    None => {
                        let rest = rest.get_mut(copied..).unwrap_or_default();
                        let n = part.len().min(rest.len());
                        let (front, _) = part.split_at(n);
                        rest.iter_mut()
                            .zip(front)
                            .for_each(|(to, from)| *to = *from);
                        (copied, total) = (copied + n, total + n);
                        break;
                    }
                }
                continue;
            }
            let n = window.write(span, part);
            span = span.part(u32::try_from(n).unwrap_or(u32::MAX), u32::MAX);
            part = part.get(n..).unwrap_or_default();
            total += n;
        }
    }
    total
}

impl Backend for Stream {
    fn queues(&self) -> usize {
        1
    }

    /// It is watched as a socket, for room as well.
    fn watched(&self, _queue: usize) -> Option<BorrowedFd<'_>> {
        None
    }

    fn takes(&self) -> Offloads {
        Offloads::default()
    }

    fn receive(
        &mut self,
        _queue: usize,
        _features: u64,
        to: &[Span],
        rest: &mut [u8],
        window: &Queues,
    ) -> Received {
        loop {
            if let Some(place) = self.whole() {
                let frame = self.inbound.get(place.clone()).unwrap_or_default();
                let bytes = put([&[0; HEADER_BYTES], frame], to, rest, window);
                self.unread.start = place.end;
                return Received::Frame(bytes);
            }
            if !self.fill(window) {
                return Received::Nothing;
            }
        }
    }

    fn send(
        &mut self,
        _queue: usize,
        _header: &[u8; HEADER_BYTES],
        frame: &[Span],
        window: &Queues,
    ) -> bool {
        let bytes: usize = frame.iter().map(|span| span.len() as usize).sum();
        if self.is_over || !self.unsent.is_empty() || bytes > SENT_BYTES_MAX {
            return false;
        }
        let length = u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes();
        let mut front = [0; LENGTH_BYTES + ADDRESSES_BYTES];
        let (place, head) = front.split_at_mut(LENGTH_BYTES);
        place.copy_from_slice(&length);
        // What is judged is what is sent: the guest can write to its frame meanwhile.
        let mut got = 0;
        for &span in frame {
            got += window.read(span, head.get_mut(got..).unwrap_or_default());
        }
        if leads_to_host(head.get(..got).unwrap_or_default()) {
            tracing::debug!("a packet to the host's loopback is dropped");
            return false;
        }
        let rest = || {
            let mut skip = got;
            frame.iter().map(move |span| {
                let skipped = skip.min(span.len() as usize);
                skip -= skipped;
                span.part(u32::try_from(skipped).unwrap_or(u32::MAX), u32::MAX)
            })
        };
        let front = front.get(..LENGTH_BYTES + got).unwrap_or_default();
        let sent = window.write_gathered(&self.socket, front, rest());
        let sent = match sent {
            Ok(n) => n,
            Err(Errno::EAGAIN | Errno::EINTR) => 0,
            Err(errno) => {
                self.end(&errno);
                return false;
            }
        };
        if sent == LENGTH_BYTES + bytes {
            return true;
        }
        // The other end believes what it was told of the length, so that the rest is owed.
        let (owed, mut place) = self.outbound.split_at_mut(front.len());
        owed.copy_from_slice(front);
        for span in rest() {
            let n = window.read(span, place);
            place = place.get_mut(n..).unwrap_or_default();
        }
        self.unsent = sent..LENGTH_BYTES + bytes;
        true
    }

    fn has_room(&mut self, window: &Queues) -> bool {
        self.flush(window);
        // What is sent when it is over is lost, at once.
        self.is_over || self.unsent.is_empty()
    }

    fn woken(&mut self, window: &Queues) {
        self.flush(window);
    }

    fn hung_up(&mut self) {
        self.end(&"the program at its other end is gone");
    }

    fn is_over(&self) -> bool {
        self.is_over
    }
}
