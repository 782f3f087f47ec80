//! `fuzz`: programs nonsense into every register and descriptor of every virtio device, `iterations=`
//! times each, resets the device in between, and at the end uses it correctly. The device may refuse
//! anything, but it must answer, and a reset must always help. Overwrites disks.

use bulkhead_guest::pattern::{self, SECTOR};
use bulkhead_guest::prng::Prng;

use super::fuzz_shapes::{Arena, SHAPES, Shape};
use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys;
use crate::sys::time::Deadline;
use crate::virtio::blk::{Blk, WANTED};
use crate::virtio::mmio::{self, Device, feature, id, reg, status};
use crate::virtio::queue::Segment;
use crate::virtio::vsock::{Task, Vsock};

const CANARY: usize = 64 << 10;
const ITERATIONS: u64 = 100;
/// A port of the host at which nobody listens.
const CLOSED_PORT: u32 = 0xdead;
/// How long a device may think about nonsense that it need not answer.
const PATIENCE_MS: u64 = 3;

#[derive(Debug, Clone, Copy, Default)]
struct Tally {
    needs_reset: u64,
    completed: u64,
    silent: u64,
}

/// Fuzzes all devices, one after the other.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seed = machine.number("seed", 1)?;
    let iterations = machine.number("iterations", ITERATIONS)?;
    let timeout_ms = super::timeout_ms(machine)?;
    let code = crate::machine::constant_checksum();
    let mut canary = phys::allocate(CANARY);
    pattern::fill(!seed, 0, canary.all_mut());
    let mut devices = 0_u64;
    mmio::each(machine, |device| {
        devices += 1;
        let mark = phys::heap_mark();
        if let Err(failure) = fuzz(device, seed, iterations, timeout_ms) {
            fail!("fuzz", "slot={} id={} {failure}", device.slot, device.id);
        }
        if device.reset().is_ok() {
            phys::heap_release(mark);
        }
        // Nothing that was programmed points below the arena.
        if let Some(sector) = pattern::first_difference(!seed, 0, canary.all()) {
            fail!(
                "fuzz",
                "kind=overwritten slot={} what=canary sector={sector}",
                device.slot
            );
        }
        if crate::machine::constant_checksum() != code {
            fail!("fuzz", "kind=overwritten slot={} what=code", device.slot);
        }
        None::<()>
    });
    say!("fuzz devices={devices} iterations={iterations} seed={seed}");
    if devices == 0 {
        Err(Failure::NoDevice { id: 0, index: 0 })
    } else {
        Ok(())
    }
}

fn fuzz(device: Device, seed: u64, iterations: u64, timeout_ms: u64) -> Result<(), Failure> {
    let mut prng = Prng::new(seed ^ u64::from(device.slot) << 32);
    let mut tally = Tally::default();
    for iteration in 0..iterations {
        let mark = phys::heap_mark();
        let result = match prng.below(8) {
            0 => {
                Arena::new(device).registers(device, &mut prng, 40);
                Ok(())
            }
            1 => rings(device, &mut prng),
            2 => order(device, &mut prng),
            _ => descriptors(device, &mut prng, timeout_ms, &mut tally),
        };
        let result = result.and_then(|()| device.reset());
        if let Err(failure) = result {
            fail!(
                "fuzz",
                "slot={} id={} iteration={iteration} seed={seed} {failure}",
                device.slot,
                device.id
            );
            device.reset()?;
        }
        phys::heap_release(mark);
    }
    works(device, timeout_ms)?;
    say!(
        "fuzz.device slot={} id={} iterations={iterations} needs_reset={} completed={} silent={} works=1",
        device.slot,
        device.id,
        tally.needs_reset,
        tally.completed,
        tally.silent
    );
    Ok(())
}

/// Number of queues that a device without optional features serves.
fn queue_count(device: Device) -> u16 {
    let most = if device.id == id::CONSOLE { 2 } else { 4 };
    let exists = |index: &u16| {
        device.write(reg::QUEUE_SEL, u32::from(*index));
        device.read(reg::QUEUE_NUM_MAX) != 0
    };
    (0..most).take_while(exists).count() as u16
}

/// Queues of impossible sizes at impossible addresses.
fn rings(device: Device, prng: &mut Prng) -> Result<(), Failure> {
    device.negotiate(feature::INDIRECT_DESC | feature::EVENT_IDX)?;
    let mut arena = Arena::new(device);
    let index = prng.below(u64::from(queue_count(device).max(1)) + 1) as u16;
    let size = if prng.one_in(2) {
        16
    } else {
        Arena::word(prng)
    };
    device.program(index, size, arena.ring_addresses(prng));
    device.write(reg::QUEUE_READY, 1);
    device.write(reg::STATUS, 0xf);
    device.write(reg::QUEUE_NOTIFY, u32::from(index));
    device.write(reg::QUEUE_NOTIFY, Arena::word(prng));
    device.take_interrupt();
    Ok(())
}

/// The steps of initialisation, in no order.
fn order(device: Device, prng: &mut Prng) -> Result<(), Failure> {
    let mut arena = Arena::new(device);
    for _ in 0..16 {
        match prng.below(8) {
            0 => device.write(reg::STATUS, 1 << prng.below(8)),
            1 => device.write(reg::STATUS, *prng.pick(&[1, 3, 0xb, 0xf, 7, 0x8f, 0xcf])),
            2 => {
                device.write(reg::DRIVER_FEATURES_SEL, *prng.pick(&[0, 1, 2, u32::MAX]));
                device.write(reg::DRIVER_FEATURES, prng.draw() as u32);
            }
            3 => device.write(reg::QUEUE_NOTIFY, Arena::word(prng)),
            4 => device.write(reg::QUEUE_READY, Arena::word(prng)),
            5 => device.program(
                prng.below(5) as u16,
                Arena::word(prng),
                arena.ring_addresses(prng),
            ),
            6 => device.write(reg::QUEUE_SEL, Arena::word(prng)),
            _ => device.write(reg::INTERRUPT_ACK, prng.draw() as u32),
        }
    }
    Ok(())
}

/// One wrong chain in a queue that is otherwise right.
fn descriptors(
    device: Device,
    prng: &mut Prng,
    timeout_ms: u64,
    tally: &mut Tally,
) -> Result<(), Failure> {
    let features =
        device.negotiate(feature::INDIRECT_DESC | (prng.below(2) * feature::EVENT_IDX))?;
    let count = queue_count(device).max(1);
    let index = prng.below(u64::from(count)) as u16;
    let mut queue = device.queue(index, features)?;
    device.start()?;
    let arena = Arena::new(device);
    let mut shape = *prng.pick(SHAPES);
    if shape.needs_indirect() && features & feature::INDIRECT_DESC == 0 {
        shape = Shape::Random;
    }
    arena.spoil(&queue, shape, prng);
    queue.kick_always();
    // Who has no input owes nothing for the buffers that wait for it.
    let waits = match device.id {
        id::CONSOLE => index == 0,
        id::VSOCK => index != 1,
        _ => false,
    };
    let owed = shape.must_be_answered() && !waits;
    let deadline = Deadline::after_ms(if owed { timeout_ms } else { PATIENCE_MS });
    loop {
        if queue.used().read::<u16>(2) != 0 {
            tally.completed += 1;
            return Ok(());
        }
        if device.read(reg::STATUS) & status::NEEDS_RESET != 0 {
            tally.needs_reset += 1;
            return Ok(());
        }
        if deadline.passed() {
            tally.silent += 1;
            if owed {
                fail!(
                    "fuzz",
                    "kind=silent slot={} queue={index} shape={shape:?}",
                    device.slot
                );
            }
            return Ok(());
        }
    }
}

/// Uses the device as it should be used.
fn works(device: Device, timeout_ms: u64) -> Result<(), Failure> {
    let deadline = Deadline::after_ms(timeout_ms);
    if device.id == id::BLK {
        let mut sector = [0; SECTOR];
        return Blk::start(device, WANTED)?.read_sector(0, &mut sector, deadline);
    }
    if device.id == id::VSOCK {
        let mut vsock = Vsock::start(device, timeout_ms)?;
        let task = Task::Ask { bytes: 0, seed: 0 };
        vsock.connect(CLOSED_PORT, task)?;
        let answered = vsock.run(deadline, |vsock| Ok(vsock.open_connections() == 0))?;
        return match answered {
            true => Ok(()),
            false => Err(Failure::Timeout("refusal")),
        };
    }
    let features = device.negotiate(feature::INDIRECT_DESC | feature::EVENT_IDX)?;
    match device.id {
        id::RNG => {
            let mut queue = device.queue(0, features)?;
            device.start()?;
            let memory = phys::allocate(64);
            let used = queue.transfer(&[Segment::writable(memory.part(0, 64))], deadline)?;
            if used.len == 0 || used.len > 64 {
                let got = u64::from(used.len);
                return Err(Failure::Wrong {
                    what: "used_len",
                    got,
                    expected: 64,
                });
            }
            Ok(())
        }
        id::CONSOLE => {
            let _receive = device.queue(0, features)?;
            let mut transmit = device.queue(1, features)?;
            device.start()?;
            let mut memory = phys::allocate(64);
            let text = b"after fuzz\r\n";
            memory.all_mut()[..text.len()].copy_from_slice(text);
            let segment = Segment::readable(memory.part(0, text.len()));
            let used = transmit.transfer(&[segment], deadline)?;
            expect("used_len", u64::from(used.len), 0)
        }
        _ => device.start(),
    }
}
