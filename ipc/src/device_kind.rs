//! What a DMA gate must know of each kind of virtio device: how its requests are framed, how they
//! may be replayed, and which configuration fields only the device knows. Everything else about a
//! device lives in its own process.

use crate::ident::ProcKind;
use crate::window::DATA_PAGE_BYTES;
use serde::{Deserialize, Serialize};

/// A kind of virtio device (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VirtioKind {
    /// Block device (section 5.2).
    Blk,
    /// Console (section 5.3).
    Console,
    /// Entropy device (section 5.4).
    Rng,
    /// Socket device (section 5.10).
    Vsock,
    /// Shared folder (section 5.11).
    Fs,
    /// Network device (section 5.1).
    Net,
}

/// What may be done with requests in flight when a device process dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplayClass {
    /// Submitted again.
    Idempotent,
    /// Submitted again with the stream position that the journal assigned at first.
    Positioned,
    /// Completed as if done.
    Droppable,
    /// Submitted again to a successor that begins with nothing, which tells the guest so.
    Reset,
    /// Submitted again with the number that they had at first; the device keeps in its window what it has
    /// begun and done ([`VirtioKind::kept_bytes`]).
    Numbered,
}

/// How a gate lays a guest's request out in the window. The data between head and tail goes to
/// page-aligned memory, so that direct I/O can use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Framing {
    /// Device-readable bytes at the front that go into the head slot (blk: the 16-byte header).
    pub head_bytes: u8,
    /// Device-writable bytes at the back that go into the head slot (blk: the status byte).
    pub tail_bytes: u8,
    /// Device-writable bytes that stand before the data (fs: the answer's header). They go to the end of a page, so
    /// that the data begins one: kernels copy to memory that is not aligned at a third of the speed.
    pub answer_bytes: u8,
    /// The gate puts the stream position (u64, little endian) of the request's first byte in front
    /// of the readable bytes.
    pub positioned: bool,
    /// The gate puts the request's number (u64, little endian, from 1) in front of the readable bytes.
    /// It stays the same when the request is done again, so that a device can tell what its
    /// predecessor has begun.
    pub numbered: bool,
    /// How a request that no device answers is answered.
    pub failure: Failure,
    /// Requests are buffers that wait for something from outside (what is typed). The gate counts
    /// the bytes that the guest is given, and a request that was in flight when its device died
    /// had nothing to do with that.
    pub waits_for_input: bool,
    /// Requests are buffers for frames, unless the queue turns out to be another one (the control queue): the gate
    /// offers the device rooms of its own, and deals what comes in them to the guest's buffers.
    pub frames: bool,
}

/// How a gate answers a request that failed, so that the guest's driver understands it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The tail says it, if there is one; nothing else is written.
    Status,
    /// A FUSE answer (virtio 1.2, section 5.11.6) with EIO, to requests that have room for one.
    Fuse,
}

/// Bytes of one head slot: the head at 0, the tail at [`TAIL_OFFSET`].
pub const HEAD_SLOT_BYTES: usize = 64;
/// Where in a head slot the device-writable tail starts.
pub const TAIL_OFFSET: usize = 32;
/// Bytes that a stream position takes at the front of a positioned request, or a number at that of a numbered one.
pub const POSITION_BYTES: usize = 8;
/// Bytes of the header of a packet of a socket device (section 5.10.6).
const VSOCK_HEADER_BYTES: u8 = 44;
const _: () = assert!(VSOCK_HEADER_BYTES as usize <= HEAD_SLOT_BYTES);
/// Bytes of the header in front of each frame (virtio 1.2, section 5.1.6): `struct virtio_net_hdr_v1`.
pub const NET_HEADER_BYTES: u8 = 12;
/// Where in that header the number of buffers is that the frame has (u16, little endian).
pub const NET_BUFFERS_AT: u32 = 10;
/// VIRTIO_NET_F_MRG_RXBUF: frames come in as many buffers as they need.
pub const NET_MRG_RXBUF: u64 = 1 << 15;
/// VIRTIO_NET_F_MQ: the driver uses several pairs of queues.
pub const NET_MQ: u64 = 1 << 22;
/// Bytes of the header in front of an answer to a FUSE request (virtio 1.2, section 5.11.6): `struct fuse_out_header`.
pub const FUSE_ANSWER_BYTES: u8 = 16;
/// Largest device configuration in bytes.
pub const CONFIG_BYTES_MAX: usize = 256;

impl Framing {
    /// Requests of which no byte means anything to a gate.
    const PLAIN: Self = Self {
        head_bytes: 0,
        tail_bytes: 0,
        answer_bytes: 0,
        positioned: false,
        waits_for_input: false,
        frames: false,
        numbered: false,
        failure: Failure::Status,
    };

    /// Where the device-writable bytes of a request begin, counted from its first page: behind its `readable` bytes,
    /// so that what follows [`Framing::answer_bytes`] begins a page.
    #[must_use]
    pub const fn writable_at(&self, readable: usize) -> usize {
        if readable == 0 {
            return 0;
        }
        let before = self.answer_bytes as usize;
        (readable + before).next_multiple_of(DATA_PAGE_BYTES) - before
    }
}

impl VirtioKind {
    /// The virtio device id.
    #[must_use]
    pub const fn virtio_id(self) -> u32 {
        match self {
            Self::Blk => 2,
            Self::Console => 3,
            Self::Rng => 4,
            Self::Vsock => 19,
            Self::Fs => 26,
            Self::Net => 1,
        }
    }

    /// The kind of process that serves it.
    #[must_use]
    pub const fn proc_kind(self) -> ProcKind {
        match self {
            Self::Blk => ProcKind::Blk,
            Self::Console => ProcKind::Console,
            Self::Rng => ProcKind::Rng,
            Self::Vsock => ProcKind::Vsock,
            Self::Fs => ProcKind::Fs,
            Self::Net => ProcKind::Net,
        }
    }

    /// Framing of the requests of queue `queue`.
    #[must_use]
    pub const fn framing(self, queue: usize) -> Framing {
        match self {
            Self::Blk => Framing {
                head_bytes: 16,
                tail_bytes: 1,
                ..Framing::PLAIN
            },
            Self::Console => Framing {
                positioned: queue % 2 == 1,
                waits_for_input: queue.is_multiple_of(2),
                ..Framing::PLAIN
            },
            Self::Rng => Framing::PLAIN,
            // The data of a write stands behind two headers, so it is not aligned: folders are served through the
            // host's page cache, which is.
            Self::Fs => Framing {
                answer_bytes: FUSE_ANSWER_BYTES,
                numbered: true,
                failure: Failure::Fuse,
                ..Framing::PLAIN
            },
            // Queue 1 sends; the others offer buffers for packets and for events.
            Self::Vsock => Framing {
                head_bytes: if queue == 1 { VSOCK_HEADER_BYTES } else { 0 },
                waits_for_input: queue != 1,
                ..Framing::PLAIN
            },
            // Frames to send begin with a header. The control queue is where a receive queue would be, and
            // which number it has depends on what the driver negotiates, so that it is framed like one.
            Self::Net if queue % 2 == 1 => Framing {
                head_bytes: NET_HEADER_BYTES,
                ..Framing::PLAIN
            },
            Self::Net => Framing {
                waits_for_input: true,
                frames: true,
                ..Framing::PLAIN
            },
        }
    }

    /// Features that a device has to do with whatever the driver wants, for the gate needs them: frames come in as many rooms
    /// as they take.
    #[must_use]
    pub const fn gate_features(self) -> u64 {
        match self {
            Self::Net => NET_MRG_RXBUF,
            Self::Blk | Self::Console | Self::Rng | Self::Vsock | Self::Fs => 0,
        }
    }

    /// Replay class of the requests of queue `queue`.
    #[must_use]
    pub const fn replay_class(self, queue: usize) -> ReplayClass {
        match self {
            Self::Console if queue % 2 == 1 => ReplayClass::Positioned,
            Self::Vsock => ReplayClass::Reset,
            Self::Fs => ReplayClass::Numbered,
            Self::Net if queue % 2 == 1 => ReplayClass::Droppable,
            Self::Blk | Self::Rng | Self::Console | Self::Net => ReplayClass::Idempotent,
        }
    }

    /// Number of bytes of the configuration space that the guest may read.
    #[must_use]
    pub const fn config_bytes(self) -> usize {
        match self {
            Self::Blk => 60,
            Self::Console => 12,
            Self::Rng => 0,
            Self::Vsock => 8,
            Self::Fs => 40,
            Self::Net => 12,
        }
    }

    /// Whether what only the device knows stays the same as long as the guest runs, so that a new
    /// process that publishes something else serves another resource.
    #[must_use]
    pub const fn fields_are_fixed(self) -> bool {
        matches!(self, Self::Blk)
    }

    /// Ranges (offset, length in bytes) of the configuration that only the device knows. Guest
    /// reads of the configuration wait until the device has published them.
    #[must_use]
    pub const fn device_fields(self) -> &'static [(u16, u16)] {
        match self {
            Self::Blk => &[(0, 8)],
            Self::Console => &[(0, 4)],
            Self::Rng | Self::Vsock | Self::Fs => &[],
            Self::Net => &[(6, 2)],
        }
    }

    /// Bytes at the end of the window that the gate leaves alone: what a device keeps there is still
    /// there for its successor.
    #[must_use]
    pub const fn kept_bytes(self) -> usize {
        match self {
            Self::Blk | Self::Console | Self::Rng | Self::Net | Self::Vsock => 0,
            Self::Fs => FS_KEPT_BYTES,
        }
    }
}

/// What a shared folder's process keeps: two journals of what the guest knows, of which one is in use.
/// Untouched pages of it cost nothing.
const FS_KEPT_BYTES: usize = 80 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_reads_from_elsewhere_begins_a_page() {
        use VirtioKind::{Blk, Console, Fs, Net, Rng, Vsock};
        for kind in [Blk, Console, Rng, Vsock, Fs, Net] {
            let framing = kind.framing(1);
            let before = usize::from(framing.answer_bytes);
            for readable in 1..3 * DATA_PAGE_BYTES {
                let at = framing.writable_at(readable);
                assert!(at >= readable, "{kind:?} {readable}");
                assert!((at + before).is_multiple_of(DATA_PAGE_BYTES));
                assert!(
                    at < readable + DATA_PAGE_BYTES,
                    "{kind:?} {readable}: more than a page is lost"
                );
            }
            // Room alone, for what comes from outside.
            assert_eq!(framing.writable_at(0), 0);
        }
    }
}
