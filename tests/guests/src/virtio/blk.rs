//! The block device: configuration, and requests that are built in slots.

use bulkhead_guest::pattern::SECTOR;
use bulkhead_guest::split::{Limits, SEGMENTS_MAX, Segments};

use crate::machine::Machine;
use crate::report::Failure;
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{DESCRIPTOR, Queue, Segment, Used};

/// Feature bits of the device.
pub mod bit {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const SEG_MAX: u64 = 1 << 2;
    pub const RO: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const MQ: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Request types.
pub mod kind {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes.
pub mod answer {
    #![allow(
        missing_docs,
        reason = "the names are those of the virtio specification"
    )]
    pub const OK: u8 = 0;
    pub const IOERR: u8 = 1;
    pub const UNSUPP: u8 = 2;
    /// What a slot holds until the device answers.
    pub const NONE: u8 = 0xee;
}

/// Everything that the driver can use.
pub const WANTED: u64 = bit::SIZE_MAX
    | bit::SEG_MAX
    | bit::RO
    | bit::BLK_SIZE
    | bit::FLUSH
    | bit::MQ
    | bit::DISCARD
    | bit::WRITE_ZEROES
    | feature::INDIRECT_DESC
    | feature::EVENT_IDX;

const QUEUES_MAX: usize = 8;
const STATUS_AT: usize = 16;
const TABLE_AT: usize = 64;
const CONTROL_LEN: usize = TABLE_AT + (SEGMENTS_MAX + 2) * DESCRIPTOR;

/// A started block device.
#[derive(Debug)]
pub struct Blk {
    /// Its slot.
    pub device: Device,
    /// Negotiated features.
    pub features: u64,
    /// Size in sectors of 512 bytes.
    pub capacity: u64,
    /// Limits of one request.
    pub limits: Limits,
    queues: [Option<Queue>; QUEUES_MAX],
    queue_count: usize,
    control: Slot,
}

/// Memory for one request in flight.
#[derive(Debug, Clone, Copy)]
pub struct Slot {
    control: Dma,
    /// The data.
    pub data: Dma,
}

impl Slot {
    /// A slot with room for so many bytes.
    pub fn new(data_len: usize) -> Slot {
        Slot {
            control: phys::allocate(CONTROL_LEN),
            data: phys::allocate(data_len.max(1)),
        }
    }

    /// Sets another sector for the same request.
    #[inline]
    pub fn set_sector(&self, sector: u64) {
        self.control.write(8, sector);
    }

    /// Sets type and sector, and forgets the last answer.
    pub fn prepare(&self, kind: u32, sector: u64) {
        self.control.write(0, kind);
        self.control.write(4, 0_u32);
        self.control.write(8, sector);
        self.control.write(STATUS_AT, answer::NONE);
    }

    /// The status byte.
    #[inline]
    pub fn status(&self) -> u8 {
        self.control.read(STATUS_AT)
    }

    /// Header, data segments and status as a chain.
    pub fn chain(
        &self,
        data: &Segments,
        device_writes: bool,
    ) -> ([Segment; SEGMENTS_MAX + 2], usize) {
        let header = Segment::readable(self.control.part(0, 16));
        let mut chain = [header; SEGMENTS_MAX + 2];
        let mut offset = 0;
        for (segment, len) in chain[1..].iter_mut().zip(data.lens()) {
            let part = self.data.part(offset, *len as usize);
            *segment = Segment {
                write: device_writes,
                ..Segment::readable(part)
            };
            offset += *len as usize;
        }
        let count = data.lens().len() + 2;
        chain[count - 1] = Segment::writable(self.control.part(STATUS_AT, 1));
        (chain, count)
    }

    /// Memory for an indirect table.
    pub fn table(&self) -> Dma {
        self.control.part(TABLE_AT, CONTROL_LEN - TABLE_AT)
    }
}

impl Blk {
    /// Finds disk number `index`, negotiates what it offers of `wanted`, and starts it.
    pub fn open(machine: &Machine, index: u64, wanted: u64) -> Result<Blk, Failure> {
        Blk::start(mmio::find(machine, id::BLK, index)?, wanted)
    }

    /// The same for a device that was found already.
    pub fn start(device: Device, wanted: u64) -> Result<Blk, Failure> {
        let features = device.negotiate(wanted)?;
        let has = |bit: u64| features & bit != 0;
        let field = |bit: u64, at: u64| {
            if has(bit) {
                device.config::<u32>(at)
            } else {
                0
            }
        };
        let limits = Limits {
            size_max: if has(bit::SIZE_MAX) {
                field(bit::SIZE_MAX, 8)
            } else {
                u32::MAX
            },
            seg_max: if has(bit::SEG_MAX) {
                field(bit::SEG_MAX, 12)
            } else {
                1
            },
        };
        let offered = if has(bit::MQ) {
            usize::from(device.config::<u16>(34))
        } else {
            1
        };
        let queue_count = offered.clamp(1, QUEUES_MAX);
        let mut queues = [const { None }; QUEUES_MAX];
        for (queue, index) in queues.iter_mut().take(queue_count).zip(0..) {
            *queue = Some(device.queue(index, features)?);
        }
        device.start()?;
        Ok(Blk {
            device,
            features,
            capacity: device.config_u64(0),
            limits,
            queues,
            queue_count,
            control: Slot::new(64),
        })
    }

    /// Whether a feature was negotiated.
    pub fn has(&self, bit: u64) -> bool {
        self.features & bit != 0
    }

    /// Number of queues in use.
    pub fn queue_count(&self) -> usize {
        self.queue_count
    }

    /// One of the queues, modulo their number.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        let index = index % self.queue_count;
        self.queues[index]
            .as_mut()
            .expect("queues up to queue_count exist")
    }

    /// Notifications sent on all queues.
    pub fn kicks(&self) -> u64 {
        self.queues.iter().flatten().map(|queue| queue.kicks).sum()
    }

    /// Sends one request on one queue and waits for it. Gives the status byte and the length that
    /// the device reported.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: Option<Segment>,
        deadline: Deadline,
    ) -> Result<(u8, Used), Failure> {
        let slot = self.control;
        slot.prepare(kind, sector);
        let header = Segment::readable(slot.control.part(0, 16));
        let status = Segment::writable(slot.control.part(STATUS_AT, 1));
        let used = match data {
            Some(data) => self
                .queue(queue)
                .transfer(&[header, data, status], deadline)?,
            None => self.queue(queue).transfer(&[header, status], deadline)?,
        };
        Ok((slot.status(), used))
    }

    /// Sends a discard or write-zeroes request for one range.
    pub fn range_request(
        &mut self,
        kind: u32,
        sector: u64,
        sectors: u32,
        flags: u32,
        deadline: Deadline,
    ) -> Result<u8, Failure> {
        let range = self.control.data.part(0, 16);
        range.write(0, sector);
        range.write(8, sectors);
        range.write(12, flags);
        self.request(0, kind, 0, Some(Segment::readable(range)), deadline)
            .map(|(status, _)| status)
    }

    /// Reads one sector into memory of the caller.
    pub fn read_sector(
        &mut self,
        sector: u64,
        into: &mut [u8; SECTOR],
        deadline: Deadline,
    ) -> Result<(), Failure> {
        let memory = phys::allocate(SECTOR);
        let data = Segment::writable(memory.part(0, SECTOR));
        let (status, _) = self.request(0, kind::IN, sector, Some(data), deadline)?;
        crate::report::expect("status", u64::from(status), u64::from(answer::OK))?;
        into.copy_from_slice(&memory.all()[..SECTOR]);
        Ok(())
    }
}
