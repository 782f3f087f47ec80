//! A port of a virtual network in the hands of a process that was taken over: the card's end or the switch's.

use crate::edges::{below, edge16, edge32};
use crate::prng::Prng;
use bulkhead_ipc::port::{
    PACKET_BYTES_MAX, PACKET_HEADER_BYTES, PORT_RING_BYTES, Port, PortEnd, PortError,
};
use bulkhead_ipc::shared::Doorbell;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;

/// Where the words of a port are (`ipc/src/port/mod.rs`).
const HEADER: usize = 0x00;
const TO_SWITCH: usize = 0x100;
const TO_DEVICE: usize = 0x200;
const PRODUCED: usize = 0x00;
const ROOM_EVENT: usize = 0x08;
const CONSUMED: usize = 0x40;
const DATA_EVENT: usize = 0x48;
const DATA: usize = 0x1000;
/// Longest frame that is made up.
const FORGED_BYTES: usize = 1600;

/// One end of a port.
#[derive(Debug)]
pub(crate) struct PortPrey {
    port: Port,
    end: PortEnd,
    /// The other end's.
    bell: Doorbell,
}

impl PortPrey {
    pub(crate) fn take(memory: OwnedFd, end: PortEnd, bell: Doorbell) -> Result<Self, PortError> {
        let port = Port::find(memory, end)?;
        bell.ring();
        Ok(Self { port, end, bell })
    }

    pub(crate) fn ring(&self) {
        self.bell.ring();
    }

    pub(crate) const fn bell(&self) -> &Doorbell {
        &self.bell
    }

    /// Random words all over, the positions of both rings mostly.
    pub(crate) fn scribble(&self, prng: &mut Prng) {
        let memory = &self.port.memory;
        for _ in 0..64 {
            let at = match below(prng, 3) {
                0 => below(prng, 0x280),
                1 => DATA + below(prng, 2 * PORT_RING_BYTES),
                _ => TO_SWITCH + below(prng, 4) * 0x40 + below(prng, 16),
            };
            memory.write(at & !7, word(prng));
        }
        self.ring();
    }

    /// Sound records, whose headers and frames are anything.
    pub(crate) fn forge(&mut self, prng: &mut Prng) {
        self.port.renew();
        let Port {
            memory,
            writer,
            reader,
            ..
        } = &mut self.port;
        for _ in 0..16 {
            let len = PACKET_HEADER_BYTES + below(prng, FORGED_BYTES);
            // Nobody who is honest is at the other end, or it has had enough.
            let Ok(Some(mut record)) = writer.reserve(memory, len) else {
                break;
            };
            let mut header = [0; PACKET_HEADER_BYTES];
            if below(prng, 4) > 0 {
                for pair in header.chunks_exact_mut(2) {
                    pair.copy_from_slice(&edge16(prng).to_le_bytes());
                }
            }
            record.write(&header);
            let everybody = below(prng, 2) == 0;
            let first = if everybody { u64::MAX } else { prng.draw() };
            record.write(&first.to_le_bytes());
            while record.write(&prng.draw().to_le_bytes()) > 0 {}
            record.commit();
        }
        while let Ok(Some(_)) = reader.peek(memory) {
            reader.take();
        }
        self.port.settle();
        self.ring();
    }

    /// One lie, of a kind that a careless other end would believe.
    pub(crate) fn lie(&self, prng: &mut Prng) {
        let memory = &self.port.memory;
        let (out, back, data) = match self.end {
            PortEnd::Device => (TO_SWITCH, TO_DEVICE, DATA),
            PortEnd::Switch => (TO_DEVICE, TO_SWITCH, DATA + PORT_RING_BYTES),
        };
        let load = |at: usize| memory.load::<u64>(at, Ordering::Relaxed);
        let store = |at: usize, word: u64| memory.store(at, word, Ordering::Release);
        let produced = load(out + PRODUCED);
        match below(prng, 8) {
            // More than the ring has, or what is no position.
            0 => store(out + PRODUCED, produced.wrapping_add(word(prng))),
            // Backwards.
            1 => store(out + PRODUCED, produced.wrapping_sub(8)),
            // A record that is longer than it can be.
            2 => {
                let place = (usize::try_from(produced).unwrap_or(0) % PORT_RING_BYTES) & !7;
                memory.write(data + place, word(prng));
                store(out + PRODUCED, produced.wrapping_add(64));
            }
            // Every place of the ring.
            3 => {
                for place in (0..PORT_RING_BYTES).step_by(4096) {
                    memory.write(data + place, PACKET_BYTES_MAX as u64 + 1);
                }
                store(out + PRODUCED, produced.wrapping_add(4096));
            }
            // It has taken what was never sent.
            4 => store(
                back + CONSUMED,
                load(back + CONSUMED).wrapping_add(word(prng)),
            ),
            // It waits for everything, or for nothing ever.
            5 => {
                store(out + ROOM_EVENT, word(prng));
                store(back + DATA_EVENT, word(prng));
            }
            // Another generation, in which it is there, or is not.
            6 => {
                let generation = u64::from(edge32(prng));
                for at in [0x08, 0x10, 0x18] {
                    store(HEADER + at, generation);
                }
            }
            // What the other end has said of itself.
            _ => {
                store(out + CONSUMED, word(prng));
                store(back + PRODUCED, word(prng));
            }
        }
        self.ring();
    }
}

/// A word: a small one, one at an edge, or any.
fn word(prng: &mut Prng) -> u64 {
    match below(prng, 4) {
        0 => u64::from(edge16(prng)) * 8,
        1 => u64::from(edge32(prng)),
        2 => u64::MAX - u64::from(edge16(prng)),
        _ => prng.draw(),
    }
}
