//! `blk`: everything that a disk promises. Destroys the contents of a writable disk, and leaves the
//! pattern of `seed=` in its first `sectors=` sectors, where a host program can check it.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::prng::Prng;
use bulkhead_guest::record::Escaped;

use super::blk_sweep::{self, Op, QD_MAX, Sweep};
use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::sys::{irq, ring0};
use crate::virtio::blk::{Blk, WANTED, answer, bit, kind};
use crate::virtio::queue::Segment;

const SECTORS: u64 = 8192;
const INTERRUPTS: u64 = 16;

struct Test {
    blk: Blk,
    buffer: Dma,
    timeout_ms: u64,
}

/// Runs all checks.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let qd = machine.number("qd", 8)? as usize;
    if qd == 0 || qd > QD_MAX {
        return Err(Failure::Parameter("qd"));
    }
    let errors_before = crate::report::errors();
    let blk = Blk::open(machine, machine.number("disk", 0)?, WANTED)?;
    let sectors = machine.number("sectors", SECTORS)?.min(blk.capacity);
    let timeout_ms = super::timeout_ms(machine)?;
    let mut test = Test {
        blk,
        buffer: phys::allocate(64 * SECTOR),
        timeout_ms,
    };
    test.describe();
    test.id()?;
    test.refusals()?;
    let mut prng = Prng::new(seed);
    if test.blk.has(bit::RO) {
        test.write_to_read_only()?;
        test.checksum_only(sectors)?;
    } else {
        if test.blk.has(bit::DISCARD) {
            test.discard(sectors)?;
        }
        if test.blk.has(bit::WRITE_ZEROES) {
            test.write_zeroes(sectors, seed)?;
        }
        let sweep = Sweep {
            op: Op::Write,
            sectors,
            seed,
            qd,
            timeout_ms,
            poison: None,
        };
        let written = blk_sweep::run(&mut test.blk, sweep, &mut prng)?;
        test.flush()?;
        let sweep = Sweep {
            op: Op::Verify,
            ..sweep
        };
        let read = blk_sweep::run(&mut test.blk, sweep, &mut prng)?;
        expect("checksum", read.checksum, written.checksum)?;
        say!(
            "blk.verify result={} sectors={sectors} seed={seed} checksum={:#018x} requests={} segments={} indirect={} kicks={}",
            if crate::report::errors() == errors_before {
                "ok"
            } else {
                "failed"
            },
            read.checksum,
            written.requests + read.requests,
            written.segments + read.segments,
            written.indirect + read.indirect,
            test.blk.kicks()
        );
    }
    test.interrupts()
}

impl Test {
    fn deadline(&self) -> Deadline {
        Deadline::after_ms(self.timeout_ms)
    }

    fn describe(&mut self) {
        let size = self.blk.queue(0).size;
        say!(
            "blk.info slot={} gsi={} capacity_sectors={} readonly={} size_max={} seg_max={} queues={} queue_size={size} features={:#x} offered={:#x}",
            self.blk.device.slot,
            self.blk.device.gsi,
            self.blk.capacity,
            u8::from(self.blk.has(bit::RO)),
            self.blk.limits.size_max,
            self.blk.limits.seg_max,
            self.blk.queue_count(),
            self.blk.features,
            self.blk.device.offered()
        );
    }

    fn id(&mut self) -> Result<(), Failure> {
        let memory = self.buffer.part(0, 20);
        let data = Some(Segment::writable(memory));
        let (status, _) = self
            .blk
            .request(0, kind::GET_ID, 0, data, self.deadline())?;
        expect("get_id_status", u64::from(status), u64::from(answer::OK))?;
        let id = memory.all();
        let len = id.iter().position(|byte| *byte == 0).unwrap_or(id.len());
        say!("blk.id text={}", Escaped(&id[..len]));
        Ok(())
    }

    /// Requests that a device must refuse, each with its own status.
    fn refusals(&mut self) -> Result<(), Failure> {
        let capacity = self.blk.capacity;
        let one = self.buffer.part(0, SECTOR);
        let two = self.buffer.part(0, 2 * SECTOR);
        let cases = [
            ("read_at_end", kind::IN, capacity, one, answer::IOERR),
            (
                "read_across_end",
                kind::IN,
                capacity.saturating_sub(1),
                two,
                answer::IOERR,
            ),
            (
                "read_far_beyond",
                kind::IN,
                u64::MAX / SECTOR as u64,
                one,
                answer::IOERR,
            ),
            (
                "read_sector_overflow",
                kind::IN,
                u64::MAX,
                one,
                answer::IOERR,
            ),
            ("write_at_end", kind::OUT, capacity, one, answer::IOERR),
            (
                "write_across_end",
                kind::OUT,
                capacity.saturating_sub(1),
                two,
                answer::IOERR,
            ),
            ("unknown_type", 0x7777, 0, one, answer::UNSUPP),
        ];
        let mut refused = 0;
        for (name, request, sector, memory, expected) in cases {
            let write = request != kind::OUT;
            let data = Segment {
                write,
                ..Segment::readable(memory)
            };
            let (status, _) = self
                .blk
                .request(0, request, sector, Some(data), self.deadline())?;
            if status == expected {
                refused += 1;
            } else {
                fail!(
                    "blk",
                    "kind=refusal case={name} status={status} expected={expected}"
                );
            }
        }
        say!("blk.refusals refused={refused} of={}", cases.len());
        Ok(())
    }

    fn write_to_read_only(&mut self) -> Result<(), Failure> {
        let data = Some(Segment::readable(self.buffer.part(0, SECTOR)));
        let (status, _) = self.blk.request(0, kind::OUT, 0, data, self.deadline())?;
        say!("blk.readonly write_status={status}");
        expect("write_status", u64::from(status), u64::from(answer::IOERR))
    }

    fn checksum_only(&mut self, sectors: u64) -> Result<(), Failure> {
        let mut sum = 0_u64;
        for sector in 0..sectors {
            let memory = self.buffer.part(0, SECTOR);
            let data = Some(Segment::writable(memory));
            let (status, _) = self
                .blk
                .request(0, kind::IN, sector, data, self.deadline())?;
            expect("read_status", u64::from(status), u64::from(answer::OK))?;
            sum = sum.wrapping_add(pattern::sectors_checksum(memory.all()));
        }
        say!("blk.read result=ok sectors={sectors} checksum={sum:#018x}");
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        if !self.blk.has(bit::FLUSH) {
            say!("blk.flush supported=0");
            return Ok(());
        }
        let (status, _) = self.blk.request(0, kind::FLUSH, 0, None, self.deadline())?;
        say!("blk.flush supported=1 status={status}");
        expect("flush_status", u64::from(status), u64::from(answer::OK))
    }

    /// A range inside of the tested sectors that the device's limit allows.
    fn range(&self, sectors: u64, limit_at: u64) -> (u64, u32) {
        let limit = u64::from(self.blk.device.config::<u32>(limit_at)).max(1);
        let first = (sectors / 4) & !7;
        (first, (sectors / 8).clamp(1, limit.min(64)) as u32)
    }

    /// What a discard leaves is undefined; the request and a refusal are all that can be checked.
    fn discard(&mut self, sectors: u64) -> Result<(), Failure> {
        let (first, count) = self.range(sectors, 36);
        let deadline = self.deadline();
        let status = self
            .blk
            .range_request(kind::DISCARD, first, count, 0, deadline)?;
        let beyond = self.blk.capacity;
        let refused = self
            .blk
            .range_request(kind::DISCARD, beyond, 8, 0, deadline)?;
        say!("blk.discard first={first} count={count} status={status} beyond_status={refused}");
        expect("discard_status", u64::from(status), u64::from(answer::OK))?;
        expect(
            "discard_beyond_status",
            u64::from(refused),
            u64::from(answer::IOERR),
        )
    }

    fn write_zeroes(&mut self, sectors: u64, seed: u64) -> Result<(), Failure> {
        let (first, count) = self.range(sectors, 48);
        for unmap in 0..=u32::from(self.blk.device.config::<u8>(56) != 0) {
            let mut memory = self.buffer.part(0, count as usize * SECTOR);
            pattern::fill(!seed, first, memory.all_mut());
            let data = Some(Segment::readable(memory));
            let (status, _) = self
                .blk
                .request(0, kind::OUT, first, data, self.deadline())?;
            expect("write_status", u64::from(status), u64::from(answer::OK))?;
            let deadline = self.deadline();
            let status =
                self.blk
                    .range_request(kind::WRITE_ZEROES, first, count, unmap, deadline)?;
            expect(
                "write_zeroes_status",
                u64::from(status),
                u64::from(answer::OK),
            )?;
            let data = Some(Segment::writable(memory));
            let (status, _) = self
                .blk
                .request(0, kind::IN, first, data, self.deadline())?;
            expect("read_status", u64::from(status), u64::from(answer::OK))?;
            let left = memory.all().iter().filter(|byte| **byte != 0).count();
            say!("blk.write_zeroes first={first} count={count} unmap={unmap} nonzero={left}");
            expect("nonzero_bytes", left as u64, 0)?;
        }
        Ok(())
    }

    /// Completions interrupt when they are asked to, and the cause can be read.
    fn interrupts(&mut self) -> Result<(), Failure> {
        let gsi = self.blk.device.gsi;
        irq::enable(gsi);
        self.blk.device.take_interrupt();
        let before = ring0::interrupts_of(gsi);
        let mut causes = 0;
        for count in 0..INTERRUPTS {
            self.blk.queue(0).want_interrupt();
            let data = Some(Segment::writable(self.buffer.part(0, SECTOR)));
            let (status, _) = self.blk.request(0, kind::IN, 0, data, self.deadline())?;
            expect("read_status", u64::from(status), u64::from(answer::OK))?;
            let arrived = || ring0::interrupts_of(gsi) - before > count;
            if !irq::sleep_until(Deadline::after_ms(self.timeout_ms.min(2000)), arrived) {
                irq::disable(gsi);
                return Err(Failure::Timeout("interrupt"));
            }
            causes |= self.blk.device.take_interrupt();
        }
        irq::disable(gsi);
        let seen = ring0::interrupts_of(gsi) - before;
        self.blk.queue(0).suppress_interrupts();
        say!("blk.interrupts wanted={INTERRUPTS} seen={seen} causes={causes:#x}");
        expect("interrupt_causes", u64::from(causes), 1)
    }
}
