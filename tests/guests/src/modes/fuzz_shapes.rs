//! The nonsense that `fuzz` programs. All of it is either outside of memory or inside one arena at
//! the top of what this guest uses, so that a device that obeys it to the letter does no harm to
//! the guest itself.

use bulkhead_guest::prng::Prng;

use crate::sys::phys::{self, Dma};
use crate::virtio::mmio::{Device, reg};
use crate::virtio::queue::{DESCRIPTOR, Queue};

const ARENA: usize = 256 << 10;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Addresses that no memory is at. The first two are interrupt controllers: QEMU lets a device write
/// there (a write to the second is a message-signalled interrupt, an INIT for instance), Bulkhead
/// must not.
const NOWHERE: &[u64] = &[
    0xfec0_0000,
    0xfee0_0000,
    0xd000_0000,
    0xd000_0ff8,
    0xfeb0_0000,
    0xffff_f000,
    1 << 40,
    1 << 52,
    1 << 63,
    u64::MAX - 4095,
    u64::MAX - 15,
    u64::MAX,
];
const LENGTHS: &[u32] = &[
    0,
    1,
    2,
    15,
    16,
    17,
    511,
    512,
    513,
    4096,
    65536,
    1 << 20,
    1 << 31,
    u32::MAX - 15,
    u32::MAX,
];
const WORDS: &[u32] = &[
    0,
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    64,
    127,
    128,
    255,
    256,
    257,
    1024,
    32767,
    32768,
    65535,
    65536,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX,
];

/// A way to make a queue wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A chain that leads back into itself.
    Loop,
    /// A chain with a segment where there is no memory.
    OutOfRange,
    /// The first segment, which holds the header, is for the device to write.
    WriteOnlyHeader,
    /// A link to a descriptor beyond the table.
    NextBeyondTable,
    /// An indirect table longer than the queue, fully linked.
    LongerThanQueue,
    /// An indirect table inside of an indirect table.
    NestedIndirect,
    /// An indirect table whose length is no multiple of 16, zero, or huge.
    IndirectLength,
    /// An indirect table where there is no memory.
    IndirectOutOfRange,
    /// INDIRECT and NEXT on one descriptor.
    IndirectAndNext,
    /// A head beyond the table in the available ring.
    HeadBeyondTable,
    /// The available index jumps further than the queue is long.
    IndexJump,
    /// Segments that overlap each other and the used ring.
    Overlapping,
    /// Readable segments after writable ones.
    WrongOrder,
    /// Segments of no or enormous length.
    Lengths,
    /// Everything at random.
    Random,
}

/// All of them.
pub const SHAPES: &[Shape] = &[
    Shape::Loop,
    Shape::OutOfRange,
    Shape::WriteOnlyHeader,
    Shape::NextBeyondTable,
    Shape::LongerThanQueue,
    Shape::NestedIndirect,
    Shape::IndirectLength,
    Shape::IndirectOutOfRange,
    Shape::IndirectAndNext,
    Shape::HeadBeyondTable,
    Shape::IndexJump,
    Shape::Overlapping,
    Shape::WrongOrder,
    Shape::Lengths,
    Shape::Random,
];

impl Shape {
    /// Whether a device must notice it, whatever kind of device it is: nothing about the chain can
    /// be served, so silence would be a request that is lost.
    pub fn must_be_answered(self) -> bool {
        matches!(
            self,
            Shape::Loop
                | Shape::NextBeyondTable
                | Shape::LongerThanQueue
                | Shape::HeadBeyondTable
                | Shape::IndexJump
                | Shape::IndirectOutOfRange
                | Shape::IndirectAndNext
        )
    }

    /// Whether it needs the feature INDIRECT_DESC.
    pub fn needs_indirect(self) -> bool {
        matches!(
            self,
            Shape::LongerThanQueue
                | Shape::NestedIndirect
                | Shape::IndirectLength
                | Shape::IndirectOutOfRange
                | Shape::IndirectAndNext
        )
    }
}

/// The memory that nonsense may point to.
#[derive(Debug)]
pub struct Arena {
    memory: Dma,
    nowhere: &'static [u64],
}

impl Arena {
    /// To be allocated after everything that must survive.
    pub fn new(device: Device) -> Arena {
        let nowhere = if device.is_bulkhead() {
            NOWHERE
        } else {
            &NOWHERE[2..]
        };
        Arena {
            memory: phys::allocate(ARENA),
            nowhere,
        }
    }

    fn place(&self, prng: &mut Prng) -> u64 {
        self.memory.address + prng.below((ARENA / 4096) as u64) * 4096
    }

    /// Address and length of a segment.
    fn segment(&self, prng: &mut Prng) -> (u64, u32) {
        match prng.below(8) {
            0 | 1 => (*prng.pick(self.nowhere), *prng.pick(LENGTHS)),
            2 => (prng.below(0x800), prng.below(0x800) as u32),
            3 => (self.place(prng) + prng.below(4096), *prng.pick(LENGTHS)),
            _ => (self.place(prng), *prng.pick(&[1, 16, 512, 4096])),
        }
    }

    /// Fills the arena with descriptors of which every field is nonsense.
    pub fn scatter(&self, prng: &mut Prng) {
        for at in 0..ARENA / DESCRIPTOR {
            let (address, len) = self.segment(prng);
            // Only page addresses, and flags and links in place: read at any multiple of 16 these
            // are descriptors.
            let flags = prng.below(8) as u16;
            let next = prng.below(300) as u16;
            Queue::describe_raw(self.memory, at, address & !15, len, flags, next);
        }
    }

    /// Addresses of rings: misaligned, overlapping, or where there is no memory.
    pub fn ring_addresses(&mut self, prng: &mut Prng) -> [u64; 3] {
        // A table at any offset reads as nothing but zeros, or as nothing but ones.
        let byte = *prng.pick(&[0x00, 0xff]);
        self.memory.all_mut().fill(byte);
        let mut one = || match prng.below(4) {
            0 => *prng.pick(self.nowhere),
            1 => self.place(prng) + prng.below(64),
            _ => self.place(prng),
        };
        [one(), one(), one()]
    }

    /// Makes a queue that is otherwise in order wrong, with a new available index.
    pub fn spoil(&self, queue: &Queue, shape: Shape, prng: &mut Prng) {
        let table = queue.table();
        let size = queue.size;
        let good = |prng: &mut Prng| (self.place(prng), 512);
        let put = |at: usize, (address, len): (u64, u32), flags: u16, next: u16| {
            Queue::describe_raw(table, at, address, len, flags, next);
        };
        // A plausible request first: header, data, status.
        let header = self.place(prng);
        phys::write::<u64>(header, prng.below(2));
        phys::write::<u64>(header + 8, prng.below(64));
        put(0, (header, 16), NEXT, 1);
        put(1, good(prng), NEXT | (prng.below(2) as u16 * WRITE), 2);
        put(2, (self.place(prng), 1), WRITE, 0);
        let (mut head, mut offered) = (0_u16, 1_u16);
        match shape {
            Shape::Loop => {
                let back = prng.below(3) as u16;
                put(2, good(prng), NEXT | WRITE, back);
            }
            Shape::OutOfRange => {
                let at = prng.below(3) as usize;
                let (flags, next) = ([NEXT, NEXT | WRITE, WRITE][at], [1, 2, 0][at]);
                put(
                    at,
                    (*prng.pick(self.nowhere), *prng.pick(LENGTHS)),
                    flags,
                    next,
                );
            }
            Shape::WriteOnlyHeader => put(0, (header, 16), NEXT | WRITE, 1),
            Shape::NextBeyondTable => {
                put(
                    1,
                    good(prng),
                    NEXT | WRITE,
                    *prng.pick(&[size, size + 1, 0x7fff, u16::MAX]),
                );
            }
            Shape::LongerThanQueue => {
                let count = size + 1 + prng.below(64) as u16;
                for at in 0..count {
                    let flags = if at + 1 < count { NEXT | WRITE } else { WRITE };
                    let address = self.memory.address + 0x8000;
                    Queue::describe_raw(self.memory, usize::from(at), address, 1, flags, at + 1);
                }
                put(0, (self.memory.address, u32::from(count) * 16), INDIRECT, 0);
            }
            Shape::NestedIndirect => {
                let inner = self.memory;
                Queue::describe_raw(inner, 0, inner.address, 32, INDIRECT, 0);
                Queue::describe_raw(inner, 1, inner.address, 32, INDIRECT | NEXT, 0);
                put(0, (inner.address, 32), INDIRECT, 0);
            }
            Shape::IndirectLength => {
                self.scatter(prng);
                let len = *prng.pick(&[0, 1, 15, 17, 40, 1 << 20, u32::MAX]);
                put(0, (self.memory.address, len), INDIRECT, 0);
            }
            Shape::IndirectOutOfRange => put(0, (*prng.pick(self.nowhere), 64), INDIRECT, 0),
            Shape::IndirectAndNext => put(0, (self.memory.address, 64), INDIRECT | NEXT, 1),
            Shape::HeadBeyondTable => head = *prng.pick(&[size, size + 1, 0x7fff, u16::MAX]),
            Shape::IndexJump => offered = *prng.pick(&[size + 1, size * 2, 0x7fff, 0x8000, 0xffff]),
            Shape::Overlapping => {
                let used = queue.used().address;
                put(0, (header, 16), NEXT, 1);
                put(
                    1,
                    (*prng.pick(&[header, used, used + 2, table.address]), 512),
                    NEXT | WRITE,
                    2,
                );
                put(2, (header + 8, 1), WRITE, 0);
            }
            Shape::WrongOrder => {
                put(1, good(prng), NEXT | WRITE, 2);
                put(2, good(prng), 0, 0);
            }
            Shape::Lengths => {
                let at = prng.below(3) as usize;
                let (flags, next) = ([NEXT, NEXT | WRITE, WRITE][at], [1, 2, 0][at]);
                put(at, (self.place(prng), *prng.pick(LENGTHS)), flags, next);
            }
            Shape::Random => {
                for at in 0..size {
                    let flags = prng.below(8) as u16;
                    let next = prng.below(u64::from(size) + 2) as u16;
                    put(usize::from(at), self.segment(prng), flags, next);
                }
                for at in 0..usize::from(size) {
                    let any = prng.below(u64::from(size) + 2) as u16;
                    queue.avail().write(4 + 2 * at, any);
                }
                head = prng.below(u64::from(size)) as u16;
                offered = prng.within(1, u64::from(size)) as u16;
            }
        }
        queue.avail().write(4, head);
        queue.avail().write(2, offered);
    }

    /// Writes and reads registers at random, with random widths.
    pub fn registers(&self, device: Device, prng: &mut Prng, count: u64) {
        self.scatter(prng);
        for _ in 0..count {
            let offset = prng.below(0x140);
            let value = match prng.below(3) {
                0 => prng.draw() as u32,
                1 => 1 << prng.below(32),
                _ => *prng.pick(WORDS),
            };
            let aligned = offset & !3;
            let address_register = (reg::QUEUE_DESC..reg::QUEUE_DEVICE + 8).contains(&aligned);
            if prng.one_in(4) {
                device.read(aligned);
            } else if address_register && aligned & 4 == 0 {
                device.write(aligned, self.place(prng) as u32);
            } else if address_register || prng.one_in(2) {
                device.write(aligned, value);
            } else {
                match prng.below(4) {
                    0 => phys::write(device.base + offset, value as u8),
                    1 => phys::write(device.base + (offset & !1), value as u16),
                    2 => _ = phys::read::<u8>(device.base + offset),
                    _ => _ = phys::read::<u16>(device.base + (offset & !1)),
                }
            }
        }
    }

    /// A register value of the kind that finds off-by-one errors.
    pub fn word(prng: &mut Prng) -> u32 {
        *prng.pick(WORDS)
    }
}
