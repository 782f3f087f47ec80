//! The network device as a device of `smoltcp`: pairs of queues, frames in one buffer or in many, with
//! or without offloads.

use core::cell::Cell;

use smoltcp::phy::{Checksum, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::machine::Machine;
use crate::report::{Failure, expect};
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{QUEUE_SIZE_MAX, Queue, Segment};

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;

/// Bytes of the header in front of each frame.
const HEADER: usize = 12;
/// Bytes of a buffer: a frame of a usual wire with its header.
const BUFFER: usize = 2048;
/// Buffers of each queue.
const BUFFERS: usize = QUEUE_SIZE_MAX;
/// Largest frame that is put together of many buffers.
const FRAME_MAX: usize = 66_000;
/// Most pairs of queues.
const PAIRS_MAX: usize = 4;
const MTU: usize = 1514;

/// One direction of one pair.
struct Ring {
    queue: Queue,
    buffers: Dma,
    /// Which buffer each head has.
    owner: [u16; QUEUE_SIZE_MAX],
}

/// What has been received.
#[derive(Debug, Clone, Copy, Default)]
pub struct Seen {
    /// Frames.
    pub frames: u64,
    /// Bytes of the largest.
    pub largest: u64,
    /// Frames of more than one buffer.
    pub spread: u64,
    /// Pairs that a frame has come through, one bit each.
    pub pairs: u64,
}

/// The receiving side.
pub struct Receiver {
    rings: [Option<Ring>; PAIRS_MAX],
    frame: Dma,
    next: usize,
    /// What has been received.
    pub seen: Seen,
}

/// The sending side.
pub struct Sender {
    rings: [Option<Ring>; PAIRS_MAX],
    pairs: usize,
    next: usize,
    free: [[u16; BUFFERS]; PAIRS_MAX],
    free_count: [usize; PAIRS_MAX],
}

/// The device.
pub struct Net {
    /// Its registers.
    pub device: Device,
    /// Its address.
    pub mac: [u8; 6],
    /// What was negotiated.
    pub features: u64,
    /// The receiving side.
    pub receiver: Receiver,
    sender: Sender,
    // The rest of the device is borrowed by tokens when something goes wrong.
    failure: Cell<Option<Failure>>,
}

impl Net {
    /// Starts network device `index` with `pairs` pairs of queues, and with offloads and buffers that a frame is
    /// spread over if `offload`.
    pub fn open(
        machine: &Machine,
        index: u64,
        pairs: usize,
        offload: bool,
    ) -> Result<Net, Failure> {
        let device = mmio::find(machine, id::NET, index)?;
        let mut wanted = MAC | STATUS | feature::EVENT_IDX;
        if offload {
            wanted |= CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MRG_RXBUF;
        }
        if pairs > 1 {
            wanted |= CTRL_VQ | MQ;
        }
        let features = device.negotiate(wanted)?;
        expect("net_features", features, wanted | feature::VERSION_1)?;
        if !(1..=PAIRS_MAX).contains(&pairs) {
            return Err(Failure::Parameter("pairs"));
        }
        let mut receiver = Receiver {
            rings: [const { None }; PAIRS_MAX],
            frame: phys::allocate(FRAME_MAX),
            next: 0,
            seen: Seen::default(),
        };
        let mut sender = Sender {
            rings: [const { None }; PAIRS_MAX],
            pairs,
            next: 0,
            free: [[0; BUFFERS]; PAIRS_MAX],
            free_count: [BUFFERS; PAIRS_MAX],
        };
        for pair in 0..pairs {
            let number = 2 * pair as u16;
            receiver.rings[pair] = Some(Ring::new(device.queue(number, features)?));
            sender.rings[pair] = Some(Ring::new(device.queue(number + 1, features)?));
            for (n, place) in sender.free[pair].iter_mut().enumerate() {
                *place = n as u16;
            }
        }
        let control = match pairs {
            1 => None,
            _ => {
                let most: u16 = device.config(8);
                Some(device.queue(2 * most, features)?)
            }
        };
        device.start()?;
        for ring in receiver.rings.iter_mut().flatten() {
            for buffer in 0..BUFFERS {
                ring.give(buffer)?;
            }
            ring.queue.kick();
        }
        if let Some(mut control) = control {
            let mut memory = phys::allocate(64);
            memory.all_mut()[..4].copy_from_slice(&[4, 0, pairs as u8, 0]);
            memory.write(32, 0xff_u8);
            let segments = [
                Segment::readable(memory.part(0, 2)),
                Segment::readable(memory.part(2, 2)),
                Segment::writable(memory.part(32, 1)),
            ];
            control.transfer(&segments, Deadline::after_ms(10_000))?;
            expect("net_ack", u64::from(memory.read::<u8>(32)), 0)?;
        }
        let mut mac = [0; 6];
        for (place, byte) in (0..).zip(&mut mac) {
            *byte = device.config(place);
        }
        Ok(Net {
            device,
            mac,
            features,
            receiver,
            sender,
            failure: Cell::new(None),
        })
    }

    /// Whether the cable is plugged in.
    pub fn link_is_up(&self) -> bool {
        self.device.config::<u16>(6) & 1 != 0
    }

    /// Tells the device of everything that was put since the last call.
    pub fn flush(&mut self) -> Result<(), Failure> {
        for ring in self.sender.rings.iter_mut().flatten() {
            ring.queue.kick();
        }
        self.receiver.flush();
        self.failure.take().map_or(Ok(()), Err)
    }

    /// Takes the first pair apart, for a sender whose chains are its own. Every frame that was sent is off before.
    pub fn into_parts(mut self, deadline: Deadline) -> Result<(Receiver, Queue), Failure> {
        self.flush()?;
        while self.sender.ready()?.is_none() || self.sender.free_count[0] < BUFFERS {
            if deadline.passed() {
                return Err(Failure::Timeout("used_ring"));
            }
        }
        let ring = self.sender.rings[0].take();
        let ring = ring.ok_or(Failure::Parameter("pairs"))?;
        Ok((self.receiver, ring.queue))
    }
}

impl Ring {
    fn new(queue: Queue) -> Ring {
        Ring {
            queue,
            buffers: phys::allocate(BUFFERS * BUFFER),
            owner: [0; QUEUE_SIZE_MAX],
        }
    }

    fn buffer(&self, buffer: usize, len: usize) -> Dma {
        self.buffers.part(buffer * BUFFER, len)
    }

    /// Offers a buffer to receive into.
    fn give(&mut self, buffer: usize) -> Result<(), Failure> {
        let segment = Segment::writable(self.buffer(buffer, BUFFER));
        let head = self.queue.build(&[segment]);
        let head = head.ok_or(Failure::Parameter("queue_size"))?;
        self.owner[usize::from(head)] = buffer as u16;
        self.queue.offer(head);
        Ok(())
    }

    /// Takes a used buffer: which, and its bytes.
    fn take(&mut self) -> Result<Option<(usize, usize)>, Failure> {
        let Some(used) = self.queue.poll()? else {
            return Ok(None);
        };
        self.queue.release(used.head);
        let buffer = usize::from(self.owner[usize::from(used.head)]);
        Ok(Some((buffer, used.len as usize)))
    }
}

impl Receiver {
    /// The next frame of any pair, without its header. The bytes are in `frame`.
    fn next_frame(&mut self) -> Result<Option<usize>, Failure> {
        let mut frame = self.frame;
        let mut len = 0;
        self.next_parts(|part| {
            let place = frame.all_mut().get_mut(len..len + part.len());
            let place = place.ok_or(Failure::Parameter("frame"))?;
            place.copy_from_slice(part);
            len += part.len();
            Ok(())
        })
    }

    /// Hands what the buffers of the next frame of any pair hold to `take`, without the header. Returns the bytes
    /// of the frame.
    pub fn next_parts(
        &mut self,
        mut take: impl FnMut(&[u8]) -> Result<(), Failure>,
    ) -> Result<Option<usize>, Failure> {
        for _ in 0..PAIRS_MAX {
            let pair = self.next;
            self.next = (pair + 1) % PAIRS_MAX;
            let Some(ring) = &mut self.rings[pair] else {
                continue;
            };
            let Some((buffer, bytes)) = ring.take()? else {
                continue;
            };
            if bytes < HEADER {
                return Err(Failure::Wrong {
                    what: "net_header",
                    got: bytes as u64,
                    expected: HEADER as u64,
                });
            }
            let count: u16 = ring.buffer(buffer, BUFFER).read(10);
            let mut len = bytes - HEADER;
            take(ring.buffers.part(buffer * BUFFER + HEADER, len).all())?;
            ring.give(buffer)?;
            for _ in 1..count {
                // A driver sees all buffers of a frame or none.
                let missing = Failure::Wrong {
                    what: "net_buffers",
                    got: 0,
                    expected: u64::from(count),
                };
                let (buffer, bytes) = ring.take()?.ok_or(missing)?;
                take(ring.buffer(buffer, bytes).all())?;
                len += bytes;
                ring.give(buffer)?;
            }
            expect("net_count", u64::from(count == 0), 0)?;
            self.seen.frames += 1;
            self.seen.largest = self.seen.largest.max(len as u64);
            self.seen.spread += u64::from(count > 1);
            self.seen.pairs |= 1 << pair;
            return Ok(Some(len));
        }
        Ok(None)
    }

    /// Tells the device of buffers that were given back.
    pub fn flush(&mut self) {
        for ring in self.rings.iter_mut().flatten() {
            ring.queue.kick();
        }
    }

    /// Asks for an interrupt when a frame comes.
    pub fn want_interrupt(&mut self) {
        for ring in self.rings.iter_mut().flatten() {
            ring.queue.want_interrupt();
        }
    }

    /// Whether a frame has come.
    pub fn has_frames(&self) -> bool {
        let mut rings = self.rings.iter().flatten();
        rings.any(|ring| ring.queue.has_used())
    }

    /// Asks for no interrupts, as [`Queue::suppress_interrupts`] does.
    pub fn suppress_interrupts(&mut self) {
        for ring in self.rings.iter_mut().flatten() {
            ring.queue.suppress_interrupts();
        }
    }
}

impl Sender {
    /// A pair with a free buffer.
    fn ready(&mut self) -> Result<Option<usize>, Failure> {
        for _ in 0..self.pairs {
            let pair = self.next;
            self.next = (pair + 1) % self.pairs;
            let Some(ring) = &mut self.rings[pair] else {
                continue;
            };
            while let Some((buffer, written)) = ring.take()? {
                expect("net_sent", written as u64, 0)?;
                self.free[pair][self.free_count[pair]] = buffer as u16;
                self.free_count[pair] += 1;
            }
            ring.queue.suppress_interrupts();
            if self.free_count[pair] > 0 {
                return Ok(Some(pair));
            }
        }
        Ok(None)
    }
}

/// A received frame.
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

/// Room for a frame to send.
pub struct Room<'a> {
    sender: &'a mut Sender,
    pair: usize,
    failure: &'a Cell<Option<Failure>>,
}

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let pair = self.pair;
        let sender = self.sender;
        sender.free_count[pair] -= 1;
        let buffer = usize::from(sender.free[pair][sender.free_count[pair]]);
        let Some(ring) = &mut sender.rings[pair] else {
            return f(&mut []);
        };
        let len = len.min(BUFFER - HEADER);
        let mut memory = ring.buffer(buffer, HEADER + len);
        let (header, frame) = memory.all_mut().split_at_mut(HEADER);
        header.fill(0);
        let result = f(frame);
        match ring.queue.build(&[Segment::readable(memory)]) {
            Some(head) => {
                ring.owner[usize::from(head)] = buffer as u16;
                ring.queue.offer(head);
            }
            None => self.failure.set(Some(Failure::Parameter("queue_size"))),
        }
        result
    }
}

impl smoltcp::phy::Device for Net {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, now: Instant) -> Option<(Received<'_>, Room<'_>)> {
        // What cannot be answered is not taken.
        self.transmit(now)?;
        let len = match self.receiver.next_frame() {
            Ok(len) => len?,
            Err(failure) => {
                self.failure.set(Some(failure));
                return None;
            }
        };
        let pair = match self.sender.ready() {
            Ok(pair) => pair?,
            Err(failure) => {
                self.failure.set(Some(failure));
                return None;
            }
        };
        let room = Room {
            sender: &mut self.sender,
            pair,
            failure: &self.failure,
        };
        Some((Received(&self.receiver.frame.all()[..len]), room))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Room<'_>> {
        match self.sender.ready() {
            Ok(pair) => Some(Room {
                pair: pair?,
                sender: &mut self.sender,
                failure: &self.failure,
            }),
            Err(failure) => {
                self.failure.set(Some(failure));
                None
            }
        }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        if self.features & GUEST_CSUM != 0 {
            // Those of frames that have never been on a wire are not filled in.
            capabilities.checksum.tcp = Checksum::Tx;
            capabilities.checksum.udp = Checksum::Tx;
        }
        capabilities
    }
}
