//! The wire: where frames of the guest go to and those for it come from.

use crate::request::{HEADER_BYTES, feature};
use bulkhead_runtime::{Queues, Span};
use nix::errno::Errno;
use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What one side of a wire leaves to the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Offloads {
    /// Checksums that are not filled in.
    pub(crate) checksum: bool,
    /// Large TCP segments over IPv4.
    pub(crate) tso4: bool,
    /// Large TCP segments over IPv6.
    pub(crate) tso6: bool,
    /// Large UDP datagrams.
    pub(crate) uso: bool,
}

/// What there was on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// So many bytes, a header of [`HEADER_BYTES`] first: in the spans and, what they have no room for, in the rest.
    Frame(usize),
    /// The same, whole in the rest: as it is it may be nothing for the driver.
    Unfit(usize),
    /// Nothing; whoever waits is woken by [`Backend::watched`] when there is.
    Nothing,
}

/// One end of a wire. It has as many queues as it likes, each with frames of its own; nothing here blocks.
pub(crate) trait Backend: Debug {
    /// Number of queues.
    fn queues(&self) -> usize;

    /// What becomes readable when something has come to a queue, edge-triggered.
    fn watched(&self, queue: usize) -> Option<BorrowedFd<'_>>;

    /// What it takes of the guest.
    fn takes(&self) -> Offloads;

    /// Takes the next frame with its header, for a driver with `features`: into the spans and, what they have no room
    /// for, into `rest`, which has room for the largest.
    fn receive(
        &mut self,
        queue: usize,
        features: u64,
        to: &[Span],
        rest: &mut [u8],
        window: &Queues,
    ) -> Received;

    /// Sends a frame. Returns whether it is on its way; one that is not is lost.
    fn send(
        &mut self,
        queue: usize,
        header: &[u8; HEADER_BYTES],
        frame: &[Span],
        window: &Queues,
    ) -> bool;

    /// Whether the next frame to send has room. When it has none, whoever waits is woken by [`Backend::watched`] when
    /// there is.
    fn has_room(&mut self, window: &Queues) -> bool {
        let _room_for_ever = window;
        true
    }

    /// Whoever is at the other end is gone.
    fn hung_up(&mut self) {}

    /// Whether nothing will ever go over it again.
    fn is_over(&self) -> bool {
        false
    }

    /// What was sent and received in this turn is over.
    fn settle(&mut self) {}

    /// [`Backend::watched`] has woken the process.
    fn woken(&mut self, window: &Queues) {
        let _nothing_kept = window;
    }
}

/// A TAP interface of the host, set up by the broker: with headers (IFF_VNET_HDR) of
/// [`HEADER_BYTES`], without packet information, and non-blocking.
#[derive(Debug)]
pub(crate) struct Tap {
    queues: Vec<OwnedFd>,
    cuts_udp: bool,
    /// Whether it was said that the interface is gone.
    gone: bool,
}

impl Tap {
    /// Over the descriptors of its queues.
    pub(crate) const fn new(queues: Vec<OwnedFd>, cuts_udp: bool) -> Self {
        Self {
            queues,
            cuts_udp,
            gone: false,
        }
    }

    fn failed(&mut self, errno: Errno) {
        // An interface that is down (EIO), or deleted (EBADFD), is a wire that nothing comes out of.
        if !matches!(errno, Errno::EAGAIN | Errno::EINTR)
            && !std::mem::replace(&mut self.gone, true)
        {
            tracing::warn!(%errno, "the TAP interface carries nothing");
        }
    }
}

impl Backend for Tap {
    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn watched(&self, queue: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(queue).map(AsFd::as_fd)
    }

    fn takes(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            uso: self.cuts_udp,
        }
    }

    fn receive(
        &mut self,
        queue: usize,
        features: u64,
        to: &[Span],
        rest: &mut [u8],
        window: &Queues,
    ) -> Received {
        // What comes is known when it is there, and the kernel sends all of these.
        let all = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
        let fits = features & all == all;
        let to = if fits { to } else { &[] };
        let Some(fd) = self.queues.get(queue) else {
            return Received::Nothing;
        };
        match window.read_scattered(fd, to.iter().copied(), rest) {
            Ok(0) => Received::Nothing,
            Ok(n) => {
                self.gone = false;
                if fits {
                    Received::Frame(n)
                } else {
                    Received::Unfit(n)
                }
            }
            Err(errno) => {
                self.failed(errno);
                Received::Nothing
            }
        }
    }

    fn send(
        &mut self,
        queue: usize,
        header: &[u8; HEADER_BYTES],
        frame: &[Span],
        window: &Queues,
    ) -> bool {
        let Some(fd) = self.queues.get(queue) else {
            return false;
        };
        match window.write_gathered(fd, header, frame.iter().copied()) {
            Ok(_) => true,
            Err(errno) => {
                // EINVAL is a frame that the kernel does not believe.
                if errno != Errno::EINVAL {
                    self.failed(errno);
                }
                false
            }
        }
    }
}
