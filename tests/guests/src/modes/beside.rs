//! `beside`: a disk and memory are verified, round after round, while requests are kept in flight on
//! every other device, other disks included. Whatever those devices do, and whoever they belong to, nothing else changes:
//! neither the disk, nor memory, nor the bytes around the buffers in flight.

use bulkhead_guest::pattern::SECTOR;
use bulkhead_guest::prng::Prng;

use super::blk_sweep::{self, Op, QD_MAX, Sweep};
use super::changing::{fill_page, page_is_right, working_memory};
use super::spare::Spare;
use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys::{self, Dma};
use crate::sys::time::{self, Deadline};
use crate::virtio::blk::{Blk, WANTED, answer, kind};
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{QUEUE_SIZE_MAX, Queue, Segment};

const MIB: u64 = 1 << 20;
/// Bytes of memory that are verified, by default.
const SIZE: u64 = 4 * MIB;
/// Bytes for queues and buffers of all devices, when no other memory may be used.
const ROOM: u64 = MIB;
const SECTORS: u64 = 4096;
/// Buffers in flight on each queue of the company.
const BUFFERS: usize = 8;
const BUFFER: usize = 1024;
/// Bytes on either side of a buffer that nobody may touch.
const FENCE: usize = 512;
const FENCE_BYTE: u8 = 0x5c;
const COMPANY_MAX: usize = 8;

/// Of the buffer of a disk request: the header, the data of one sector, the status byte.
const HEADER: usize = 16;
const DATA_AT: usize = 64;
const STATUS_AT: usize = BUFFER - 1;

/// What a buffer in flight is to its device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// It is read.
    Output,
    /// It is filled.
    Input,
    /// It holds a request to read a sector.
    Sector,
}

impl Shape {
    /// Bytes that the device may write.
    fn writable(self) -> usize {
        match self {
            Shape::Output => 0,
            Shape::Input => BUFFER,
            Shape::Sector => SECTOR + 1,
        }
    }
}

/// A queue on which requests are kept in flight.
struct Line {
    device: Device,
    queue: Queue,
    shape: Shape,
    memory: Dma,
    /// The buffer of each descriptor that heads a request.
    buffer_of: [Option<usize>; QUEUE_SIZE_MAX],
    done: u64,
    resets: u64,
}

impl Line {
    fn new(device: Device, index: u16, features: u64, shape: Shape) -> Result<Line, Failure> {
        let queue = device.queue(index, features)?;
        let mut memory = phys::allocate(BUFFERS * (BUFFER + 2 * FENCE));
        memory.all_mut().fill(FENCE_BYTE);
        Ok(Line {
            device,
            queue,
            shape,
            memory,
            buffer_of: [None; QUEUE_SIZE_MAX],
            done: 0,
            resets: 0,
        })
    }

    fn buffer(&self, number: usize) -> Dma {
        self.memory
            .part(number * (BUFFER + 2 * FENCE) + FENCE, BUFFER)
    }

    fn offer(&mut self, number: usize) -> Result<(), Failure> {
        let mut memory = self.buffer(number);
        let head = match self.shape {
            Shape::Output => {
                memory.all_mut().fill(b'.');
                self.queue.build(&[Segment::readable(memory)])
            }
            Shape::Input => self.queue.build(&[Segment::writable(memory)]),
            Shape::Sector => {
                memory.all_mut().fill(FENCE_BYTE);
                memory.write(0, kind::IN);
                memory.write(4, 0_u32);
                memory.write(8, number as u64);
                self.queue.build(&[
                    Segment::readable(memory.part(0, HEADER)),
                    Segment::writable(memory.part(DATA_AT, SECTOR)),
                    Segment::writable(memory.part(STATUS_AT, 1)),
                ])
            }
        };
        let head = head.ok_or(Failure::Parameter("queue_size"))?;
        self.buffer_of[usize::from(head)] = Some(number);
        self.queue.offer(head);
        Ok(())
    }

    /// Takes what came back and offers it again. What a device says of a request must still be a
    /// request in flight, with no more bytes than it has.
    fn tend(&mut self) -> Result<(), Failure> {
        let mut again = false;
        // One round: a device that answers at once must not hold the others up.
        for _ in 0..BUFFERS {
            let Some(used) = self.queue.poll()? else {
                break;
            };
            let Some(number) = self.buffer_of[usize::from(used.head)].take() else {
                fail!(
                    "beside",
                    "kind=used_id slot={} head={}",
                    self.device.slot,
                    used.head
                );
                continue;
            };
            if used.len as usize > self.shape.writable() {
                fail!(
                    "beside",
                    "kind=used_len slot={} len={}",
                    self.device.slot,
                    used.len
                );
            }
            self.queue.release(used.head);
            self.done += 1;
            self.offer(number)?;
            again = true;
        }
        if again {
            self.queue.suppress_interrupts();
            self.queue.kick();
        }
        Ok(())
    }

    /// What a disk request keeps from its device: the header, which it may only read, and the bytes
    /// between the parts.
    fn request_holds(&self, number: usize) -> bool {
        let buffer = self.buffer(number);
        let between = |from: usize, to: usize| {
            let part = buffer.part(from, to - from);
            part.all().iter().all(|b| *b == FENCE_BYTE)
        };
        buffer.read::<u32>(0) == kind::IN
            && buffer.read::<u32>(4) == 0
            && buffer.read::<u64>(8) == number as u64
            && between(HEADER, DATA_AT)
            && between(DATA_AT + SECTOR, STATUS_AT)
    }

    fn fences_hold(&self) -> bool {
        if self.shape == Shape::Sector && !(0..BUFFERS).all(|number| self.request_holds(number)) {
            return false;
        }
        (0..BUFFERS).all(|number| {
            let start = number * (BUFFER + 2 * FENCE);
            let (before, after) = (start, start + FENCE + BUFFER);
            let holds = |at| {
                self.memory
                    .part(at, FENCE)
                    .all()
                    .iter()
                    .all(|b| *b == FENCE_BYTE)
            };
            holds(before) && holds(after)
        })
    }
}

/// The lines of every device but the disk that is verified.
fn company(machine: &Machine, disk: u64, lines: &mut [Option<Line>]) -> Result<usize, Failure> {
    let mut devices = [None; COMPANY_MAX];
    let mut count = 0;
    let verified = mmio::find(machine, id::BLK, disk)?.slot;
    mmio::each(machine, |device| {
        let wanted = match device.id {
            id::RNG | id::CONSOLE | id::VSOCK | id::NET => true,
            id::BLK => device.slot != verified,
            _ => false,
        };
        if wanted && count < COMPANY_MAX {
            devices[count] = Some(device);
            count += 1;
        }
        None::<()>
    });
    let mut used = 0;
    for device in devices.into_iter().flatten() {
        match join(device, &mut lines[used..]) {
            Ok(joined) => used += joined,
            // It is lost already, as a taken-over device may be at any time; the rest is what counts.
            Err(failure) => say!("beside.absent slot={} {failure}", device.slot),
        }
    }
    Ok(used)
}

/// Starts a device and puts requests in flight on its queues. Returns how many lines that took.
fn join(device: Device, lines: &mut [Option<Line>]) -> Result<usize, Failure> {
    let features = device.negotiate(feature::EVENT_IDX)?;
    // Of whatever receives and sends the queues for either, of everything else the first one. What is sent is
    // no packet or frame that anybody takes.
    let queues = match device.id {
        id::CONSOLE | id::VSOCK | id::NET => 2,
        _ => 1,
    };
    let lines = lines
        .get_mut(..queues)
        .ok_or(Failure::Parameter("devices"))?;
    for (line, index) in lines.iter_mut().zip(0..) {
        let shape = match (device.id, index) {
            (id::BLK, _) => Shape::Sector,
            (_, 0) => Shape::Input,
            _ => Shape::Output,
        };
        *line = Some(Line::new(device, index, features, shape)?);
    }
    let started = device.start();
    if started.is_err() {
        lines.fill_with(|| None);
    }
    started?;
    for line in lines.iter_mut().flatten() {
        for number in 0..BUFFERS {
            line.offer(number)?;
        }
        line.queue.kick();
    }
    Ok(queues)
}

/// Verifies until the time is over, or the power button is pressed. With `fill=1` all memory that is not
/// used meanwhile is filled before, and verified after.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    if machine.number("fill", 0)? == 0 {
        return rounds(machine);
    }
    let room = machine.number("size", SIZE)?.saturating_add(ROOM);
    let spare = Spare::fill(machine, room, machine.number("seed", 1)?)?;
    let result = rounds(machine);
    spare.verify("beside");
    result
}

fn rounds(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let seconds = machine.number("seconds", 10)?;
    let qd = machine.number("qd", 8)? as usize;
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let timeout_ms = super::timeout_ms(machine)?;
    let memory = working_memory(machine, SIZE)?;
    let pages = memory.len / 4096;
    let mut lines = [const { None::<Line> }; COMPANY_MAX];
    let disk = machine.number("disk", 0)?;
    let used = company(machine, disk, &mut lines)?;
    let mut blk = Blk::open(machine, disk, WANTED)?;
    let sectors = machine.number("sectors", SECTORS)?.min(blk.capacity);
    let mut prng = Prng::new(seed);
    say!("beside pages={pages} sectors={sectors} lines={used} seconds={seconds}");
    for page in 0..pages {
        fill_page(memory, page, seed, 0);
    }
    let khz = time::khz();
    let start = time::cycles();
    let mut round = 0_u64;
    // A press from before is none.
    super::button::pressed();
    while time::cycles().wrapping_sub(start) < seconds.saturating_mul(1000 * khz) {
        for op in [Op::Write, Op::Verify] {
            let sweep = Sweep {
                op,
                sectors,
                seed: seed ^ round << 32,
                qd,
                timeout_ms,
                poison: None,
            };
            let mark = phys::heap_mark();
            blk_sweep::run(&mut blk, sweep, &mut prng)?;
            phys::heap_release(mark);
            let deadline = Deadline::after_ms(timeout_ms);
            let (status, _) = blk.request(0, kind::FLUSH, 0, None, deadline)?;
            expect("flush_status", u64::from(status), u64::from(answer::OK))?;
            for line in lines.iter_mut().flatten() {
                line.tend()?;
                if line.device.needs_reset() {
                    line.resets = 1;
                }
            }
        }
        for page in 0..pages {
            if !page_is_right(memory, page, seed, round) {
                fail!("beside", "kind=memory page={page} round={round}");
            }
            fill_page(memory, page, seed, round + 1);
        }
        for line in lines.iter().flatten() {
            if !line.fences_hold() {
                fail!(
                    "beside",
                    "kind=fence slot={} round={round}",
                    line.device.slot
                );
            }
        }
        round += 1;
        if super::button::pressed() {
            break;
        }
        if round == 1 {
            // From now on it uses no memory that it has not used before.
            say!("beside.round value=1");
        }
    }
    for line in lines.iter().flatten() {
        say!(
            "beside.line slot={} id={} queue={} done={} needs_reset={}",
            line.device.slot,
            line.device.id,
            line.queue.index,
            line.done,
            line.resets
        );
    }
    let ms = time::cycles().wrapping_sub(start) / khz;
    say!("beside.end rounds={round} ms={ms} sectors={sectors} pages={pages}");
    expect("no_rounds", u64::from(round == 0), 0)
}
