//! Ports: a network card's process and the switch of its network pass packets through one sealed
//! memfd that both map.
//!
//! ```text
//! 0x0000  header: magic, generation, and for each end the generation that it is in
//! 0x0100  ring device to switch: positions     0x0200  ring switch to device: positions
//! 0x1000  data of the first ring, then of the second, PORT_RING_BYTES each
//!
//! positions of a ring:
//! 0x00  produced (u64, writer)    0x08  room_event (u64, writer)
//! 0x40  consumed (u64, reader)    0x48  data_event (u64, reader)
//! ```
//!
//! Positions count bytes from the birth of the port and never wrap; the byte at position `p` is at
//! `p % capacity` of the ring's data. A *record* is a length (u64) and that many bytes, a
//! `virtio_net_hdr` of [`PACKET_HEADER_BYTES`] bytes and a frame, padded to a multiple of eight. One
//! doorbell for each direction tells of both: records that came, and room that was made for those to
//! go. Each is rung only when the other side has said that it sleeps (event indexes, as in virtio).
//!
//! Both ends are hostile to each other: every position and length is read once and checked, a lie is a
//! [`PortFault`], and a port with a fault is not used again. A reader copies a record before it looks at
//! it.
//!
//! When a card's process dies its port dies with it: the successor is given a fresh one. When a switch dies the cards'
//! processes live on and can map nothing any more, so the ports stay and begin anew: the broker gives each another
//! generation ([`stamp`]), the new switch maps it, and the card is woken. Each end makes the words that it writes as
//! new before it says that it is in the generation, and touches the rings only when the other end says so as well
//! ([`Port::is_met`]); an end that is late writes nothing that the other looks at. What was in the rings is lost like on a wire.

mod reader;
mod writer;

pub use reader::PacketReader;
pub use writer::{PacketWriter, Record};

use crate::shared::{SharedError, SharedMemory};
use crate::sync::Ordering;
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Bytes of the `virtio_net_hdr` (virtio 1.2, section 5.1.6, with `num_buffers`) before each frame.
pub const PACKET_HEADER_BYTES: usize = 12;
/// Longest frame: an IP packet of 65,535 bytes behind an Ethernet header with a VLAN tag.
pub const FRAME_BYTES_MAX: usize = 65_535 + 18;
/// Longest record's content.
pub const PACKET_BYTES_MAX: usize = PACKET_HEADER_BYTES + FRAME_BYTES_MAX;
/// Data bytes of each of the two rings: room for seven of the longest records.
pub const PORT_RING_BYTES: usize = 512 * 1024;
/// Size of a port's memory in bytes.
pub const PORT_BYTES: u64 = (OFFSET_DATA + 2 * PORT_RING_BYTES) as u64;

const MAGIC: u32 = 0x3150_4842; // "BHP1"
const OFFSET_MAGIC: usize = 0x00;
const OFFSET_GENERATION: usize = 0x08;
const OFFSET_DEVICE_IN: usize = 0x10;
const OFFSET_SWITCH_IN: usize = 0x18;
const OFFSET_TO_SWITCH: usize = 0x100;
const OFFSET_TO_DEVICE: usize = 0x200;
const OFFSET_DATA: usize = 0x1000;

const OFFSET_PRODUCED: usize = 0x00;
const OFFSET_ROOM_EVENT: usize = 0x08;
const OFFSET_CONSUMED: usize = 0x40;
const OFFSET_DATA_EVENT: usize = 0x48;

/// Bytes of a record before its content: the length.
const LENGTH_BYTES: u64 = 8;

const _: () = assert!(PORT_RING_BYTES.is_power_of_two());
const _: () = assert!(PORT_RING_BYTES >= 3 * (PACKET_BYTES_MAX + 16));
const _: () = assert!(PORT_BYTES.is_multiple_of(4096));

/// The other end broke the ring protocol. The port is not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PortFault {
    /// The writer's position went back, ran ahead of the ring's room, or is between records.
    #[error(
        "a port's writer claims position {got}, expected a multiple of 8 from {from} to {until}"
    )]
    Produced {
        /// The position read.
        got: u64,
        /// The smallest possible.
        from: u64,
        /// The largest possible.
        until: u64,
    },
    /// The reader's position went back, or overtook the writer.
    #[error("a port's reader claims position {got}, expected one from {from} to {until}")]
    Consumed {
        /// The position read.
        got: u64,
        /// The smallest possible.
        from: u64,
        /// The largest possible.
        until: u64,
    },
    /// A record is shorter or longer than records are, or than what was written.
    #[error("a record of {got} bytes, expected {PACKET_HEADER_BYTES} to {until}")]
    Length {
        /// The length read.
        got: u64,
        /// The largest possible here.
        until: u64,
    },
}

/// Why a port could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    /// Its memory is not usable.
    #[error(transparent)]
    Memory(#[from] SharedError),
    /// It was never stamped.
    #[error("the memory is no port's")]
    Blank,
    /// It is another one's.
    #[error("the port is not of generation {expected}")]
    Generation {
        /// The generation that was told.
        expected: u32,
    },
}

/// Which of a port's ends a process has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortEnd {
    /// The network card's.
    Device,
    /// The switch's.
    Switch,
}

/// Where a ring is in the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RingLayout {
    positions: usize,
    data: usize,
    /// A power of two.
    capacity: u64,
}

impl RingLayout {
    const TO_SWITCH: Self = Self {
        positions: OFFSET_TO_SWITCH,
        data: OFFSET_DATA,
        capacity: PORT_RING_BYTES as u64,
    };
    const TO_DEVICE: Self = Self {
        positions: OFFSET_TO_DEVICE,
        data: OFFSET_DATA + PORT_RING_BYTES,
        capacity: PORT_RING_BYTES as u64,
    };

    /// The place of `len` bytes from `position`: offset and length of the part before the end of the
    /// ring, and the length of the part at its beginning. More than the capacity is cut.
    fn place(&self, position: u64, len: usize) -> (usize, usize, usize) {
        let at = usize::try_from(position & (self.capacity - 1)).unwrap_or(0);
        let capacity = usize::try_from(self.capacity).unwrap_or(0);
        let len = len.min(capacity);
        let first = len.min(capacity - at);
        (self.data + at, first, len - first)
    }

    /// Bytes of content that a record in this ring can have.
    fn content_max(&self) -> u64 {
        (PACKET_BYTES_MAX as u64).min(self.capacity - LENGTH_BYTES)
    }
}

/// Bytes that a record with `len` bytes of content takes.
const fn record_bytes(len: u64) -> u64 {
    LENGTH_BYTES + len.next_multiple_of(8)
}

/// One end of a port. Whoever has it also holds the doorbells: the peer's, which it rings when
/// [`PacketWriter::publish`] or [`PacketReader::release`] says so, and its own, which wakes it.
#[derive(Debug)]
pub struct Port {
    /// The memory of both rings.
    pub memory: SharedMemory,
    /// What this end sends.
    pub writer: PacketWriter,
    /// What this end receives.
    pub reader: PacketReader,
    end: PortEnd,
    generation: u64,
    met: bool,
}

impl Port {
    /// Maps a port of this generation.
    ///
    /// # Errors
    /// [`PortError`] when the memory is not sealed or of another generation.
    pub fn map(fd: OwnedFd, end: PortEnd, generation: u32) -> Result<Self, PortError> {
        let port = Self::find(fd, end)?;
        if port.generation == u64::from(generation) {
            return Ok(port);
        }
        Err(PortError::Generation {
            expected: generation,
        })
    }

    /// Maps a port of whichever generation it is now.
    ///
    /// # Errors
    /// [`PortError`] when the memory is not sealed, or, at the switch's end, no port's.
    pub fn find(fd: OwnedFd, end: PortEnd) -> Result<Self, PortError> {
        let memory = SharedMemory::map(fd, PORT_BYTES)?;
        // A card is given its port by the broker alone, at its birth. A switch that was taken over could otherwise keep it
        // from being born.
        let is_stamped = memory.load::<u32>(OFFSET_MAGIC, Ordering::Acquire) == MAGIC;
        if end == PortEnd::Switch && !is_stamped {
            return Err(PortError::Blank);
        }
        Ok(Self::over(memory, end))
    }

    /// An end of the port in this memory, in whichever generation it is now.
    pub(crate) fn over(memory: SharedMemory, end: PortEnd) -> Self {
        let (out, back) = end.rings();
        let mut port = Self {
            writer: PacketWriter::new(out),
            reader: PacketReader::new(back),
            end,
            generation: memory.load(OFFSET_GENERATION, Ordering::Acquire),
            met: false,
            memory,
        };
        port.enter();
        port
    }

    /// Makes visible what was sent, and gives back the places of what was taken. Returns whether the other end
    /// waits for either, and has to be rung.
    pub fn settle(&mut self) -> bool {
        let records = self.writer.publish(&self.memory);
        let room = self.reader.release(&self.memory);
        records || room
    }

    /// Whether the other end is there. Until then the rings are not used. Only as true as the other end is honest: what it
    /// writes is checked all the same.
    pub fn is_met(&mut self) -> bool {
        if !self.met {
            let other = match self.end {
                PortEnd::Device => OFFSET_SWITCH_IN,
                PortEnd::Switch => OFFSET_DEVICE_IN,
            };
            self.met = self.memory.load::<u64>(other, Ordering::Acquire) == self.generation;
        }
        self.met
    }

    /// Begins anew when the broker has given the port another generation, which it does when the other end has
    /// died. Returns whether it has, so that the other end has to be rung.
    pub fn renew(&mut self) -> bool {
        let generation = self.memory.load(OFFSET_GENERATION, Ordering::Acquire);
        if generation == self.generation {
            return false;
        }
        let (out, back) = self.end.rings();
        self.writer = PacketWriter::new(out);
        self.reader = PacketReader::new(back);
        self.generation = generation;
        self.met = false;
        self.enter();
        true
    }

    /// Makes the words that this end writes as new, and then says that it is in the generation.
    fn enter(&mut self) {
        let (out, back) = self.end.rings();
        let zero = |at: usize| self.memory.store(at, 0u64, Ordering::Relaxed);
        zero(out.positions + OFFSET_PRODUCED);
        zero(out.positions + OFFSET_ROOM_EVENT);
        zero(back.positions + OFFSET_CONSUMED);
        zero(back.positions + OFFSET_DATA_EVENT);
        let own = match self.end {
            PortEnd::Device => OFFSET_DEVICE_IN,
            PortEnd::Switch => OFFSET_SWITCH_IN,
        };
        self.memory.store(own, self.generation, Ordering::Release);
    }
}

impl PortEnd {
    /// The ring that this end writes, and the one that it reads.
    const fn rings(self) -> (RingLayout, RingLayout) {
        match self {
            Self::Device => (RingLayout::TO_SWITCH, RingLayout::TO_DEVICE),
            Self::Switch => (RingLayout::TO_DEVICE, RingLayout::TO_SWITCH),
        }
    }
}

/// Broker: writes the identity into the memory of a port without mapping it, so that both ends
/// may start in either order. Of a port that has had one, when one end is dead: no generation is ever used again.
///
/// # Errors
/// The kernel's error.
pub fn stamp(port: BorrowedFd<'_>, generation: u32) -> Result<(), Errno> {
    pwrite(port, &u64::from(generation).to_le_bytes(), 8)?;
    pwrite(port, &MAGIC.to_le_bytes(), 0).map(drop)
}

/// Broker: the generation of a port that another broker has made.
///
/// # Errors
/// The kernel's error; EINVAL for what is no port.
pub fn generation_of(port: BorrowedFd<'_>) -> Result<u32, Errno> {
    let mut header = [0; 16];
    if pread(port, &mut header, 0)? != header.len() {
        return Err(Errno::EINVAL);
    }
    let [m0, m1, m2, m3, _, _, _, _, generation @ ..] = header;
    let is_port = u32::from_le_bytes([m0, m1, m2, m3]) == MAGIC;
    let generation = u32::try_from(u64::from_le_bytes(generation)).ok();
    generation.filter(|_| is_port).ok_or(Errno::EINVAL)
}

#[cfg(test)]
#[cfg(loom)]
pub(crate) mod small {
    //! A ring that has room for one short record, for the models.
    use super::*;

    /// Bytes of content of the records of the models.
    pub(crate) const CONTENT: usize = PACKET_HEADER_BYTES;

    /// Both ends of a ring with a cell for each of its places.
    pub(crate) fn ring(records: usize) -> (PacketWriter, PacketReader, SharedMemory) {
        let capacity = (records * 24).next_power_of_two();
        let layout = RingLayout {
            positions: 0,
            data: 0x1000,
            capacity: capacity as u64,
        };
        let fields = [
            OFFSET_PRODUCED,
            OFFSET_ROOM_EVENT,
            OFFSET_CONSUMED,
            OFFSET_DATA_EVENT,
        ];
        let data = (0x1000..0x1000 + capacity).step_by(8);
        let memory = SharedMemory::with_cells(fields.into_iter().chain(data));
        (PacketWriter::new(layout), PacketReader::new(layout), memory)
    }

    /// A card that is in generation 1 of a port, of which a switch that is dead has read nothing, and the memory, in
    /// which the broker has just written generation 2.
    pub(crate) fn late_card() -> (Port, SharedMemory) {
        let header = [OFFSET_GENERATION, OFFSET_DEVICE_IN, OFFSET_SWITCH_IN];
        let fields = [
            OFFSET_PRODUCED,
            OFFSET_ROOM_EVENT,
            OFFSET_CONSUMED,
            OFFSET_DATA_EVENT,
        ];
        let rings = [RingLayout::TO_SWITCH, RingLayout::TO_DEVICE];
        let positions = rings
            .iter()
            .flat_map(|ring| fields.map(|field| ring.positions + field));
        // Three of the records of the models.
        let data = (OFFSET_DATA..OFFSET_DATA + 72).step_by(8);
        let cells = header.into_iter().chain(positions).chain(data);
        let memory = SharedMemory::with_cells(cells.collect::<Vec<_>>());
        for at in [OFFSET_GENERATION, OFFSET_SWITCH_IN] {
            memory.store(at, 1u64, Ordering::Relaxed);
        }
        let mut card = Port::over(memory.clone(), PortEnd::Device);
        assert!(card.is_met());
        memory.store(OFFSET_GENERATION, 2u64, Ordering::Release);
        (card, memory)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests;
