//! `rng`: reads `size=` bytes (64 KiB by default) from the entropy source in requests of many sizes
//! and shapes, and checks that they look random.

use bulkhead_guest::prng::Prng;
use bulkhead_guest::record::Hex;

use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::phys;
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, feature, id};
use crate::virtio::queue::{Queue, Segment};

const BUFFER: usize = 16384;
/// Two requests of at least so many bytes are never equal by chance.
const DISTINCT_MIN: usize = 16;

/// Reads them.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let wanted = machine.number("size", 65536)?;
    let mut prng = Prng::new(machine.number("seed", 1)?);
    let timeout = super::timeout_ms(machine)?;
    let device = mmio::find(machine, id::RNG, 0)?;
    let features = device.negotiate(feature::INDIRECT_DESC | feature::EVENT_IDX)?;
    let mut queue = device.queue(0, features)?;
    device.start()?;

    let mut ones = 0_u64;
    let (mut bytes, mut requests, mut short) = (0_u64, 0_u64, 0_u64);
    let mut last = [0_u8; DISTINCT_MIN];
    let mut memory = phys::allocate(BUFFER);
    let table = phys::allocate(4096);
    while bytes < wanted {
        let len = match requests {
            0 => 1,
            1 => 64,
            2 => 4096,
            3 => BUFFER,
            _ => prng.within(1, BUFFER as u64) as usize,
        };
        memory.all_mut().fill(0);
        let cut = prng.within(1, len as u64) as usize;
        let segments = [
            Segment::writable(memory.part(0, cut)),
            Segment::writable(memory.part(cut, len - cut)),
        ];
        let segments = if cut == len {
            &segments[..1]
        } else {
            &segments[..]
        };
        let indirect = features & feature::INDIRECT_DESC != 0 && prng.one_in(2);
        let head = if indirect {
            queue.build_indirect(segments, table)
        } else {
            queue.build(segments)
        };
        let got = finish(&mut queue, head, Deadline::after_ms(timeout))?;
        if got == 0 || got > len {
            return Err(Failure::Wrong {
                what: "used_len",
                got: got as u64,
                expected: len as u64,
            });
        }
        short += u64::from(got < len);
        let data = memory.all();
        if data[got..].iter().any(|byte| *byte != 0) {
            fail!("rng", "kind=data what=bytes_beyond_used_len len={got}");
        }
        if got >= DISTINCT_MIN {
            if data[..DISTINCT_MIN] == last || data[..got].iter().all(|byte| *byte == data[0]) {
                fail!(
                    "rng",
                    "kind=data what=not_random first={}",
                    Hex(&data[..DISTINCT_MIN])
                );
            }
            last.copy_from_slice(&data[..DISTINCT_MIN]);
        }
        ones += data[..got]
            .iter()
            .map(|byte| u64::from(byte.count_ones()))
            .sum::<u64>();
        bytes += got as u64;
        requests += 1;
    }
    // Half of the bits are set, give or take far more than chance allows.
    let per_mille = ones * 125 / bytes.max(1);
    if bytes >= 4096 && !(450..550).contains(&per_mille) {
        fail!("rng", "kind=data what=bits_set per_mille={per_mille}");
    }
    say!(
        "rng result=ok bytes={bytes} requests={requests} short={short} ones_per_mille={per_mille} sample={}",
        Hex(&last)
    );
    Ok(())
}

fn finish(queue: &mut Queue, head: Option<u16>, deadline: Deadline) -> Result<usize, Failure> {
    let head = head.ok_or(Failure::Parameter("segments"))?;
    queue.offer(head);
    queue.kick();
    let used = queue.wait(deadline)?;
    expect("used_id", u64::from(used.head), u64::from(head))?;
    Ok(used.len as usize)
}
