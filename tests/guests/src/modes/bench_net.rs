//! `bench-net`: frames of one size from machine to machine, from ring 3. Whoever has nothing to do sleeps: two guests
//! that poll would leave hosts of two CPUs none for what is between them.
//!
//! `op=answer` counts what comes, and answers the frames that ask for it. `op=send` keeps `qd=` frames of `bs=` bytes
//! on their way to the machine with the addresses `mac=` and `peer=`; of as many, four ask, or the only one. An answer
//! says what has arrived, and so a frame is counted where it came to. Frames that are lost make room when
//! a later one is answered, or when nothing has been heard for a while. `op=flood` sends what it can to `mac=` and
//! `peer=` for `seconds=`, whether or not anybody hears of it.
//!
//! The chains of what is sent are built once, each over memory of its own. With one frame on its way the time between
//! two answers is that of a round trip.

use bulkhead_guest::frames::{self, Kind, Note, Station};
use smoltcp::iface::SocketStorage;
use smoltcp::phy::{Device as _, TxToken as _};
use smoltcp::wire::{EthernetAddress, Ipv4Address};

use super::net::now;
use super::net_peer::Stack;
use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::irq;
use crate::sys::phys::{self, Dma};
use crate::sys::time::{self, Deadline};
use crate::virtio::mmio::Device;
use crate::virtio::net::{Net, Receiver};
use crate::virtio::queue::{QUEUE_SIZE_MAX, Queue, Segment};

/// How long frames are sent before the measurement.
const WARM_MS: u64 = 100;
/// When frames that nobody has answered are lost.
const LOST_MS: u64 = 20;
/// Most times between answers that are kept.
const GAPS_MAX: usize = 1 << 17;
const WORD: usize = size_of::<u64>();

/// Answers or measures.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let net = Net::open(machine, machine.number("disk", 0)?, 1, true)?;
    let mac = net.mac;
    let mut storage = [const { SocketStorage::EMPTY }; 1];
    let mut stack = Stack::new(net, mac, &mut storage);
    stack.settle(machine)?;
    let ip = stack.interface.ipv4_addr();
    let own = Station {
        mac: EthernetAddress(mac),
        ip: ip.ok_or(Failure::Timeout("lease"))?,
    };
    let net = stack.net;
    let gsi = net.device.gsi;
    match machine.args().text("op").unwrap_or("answer") {
        "answer" => answer(machine, net, own)?,
        "send" => send(machine, net, own)?,
        "flood" => flood(machine, net, own)?,
        _ => return Err(Failure::Parameter("op")),
    }
    irq::disable(gsi);
    Ok(())
}

fn answer(machine: &Machine, mut net: Net, own: Station) -> Result<(), Failure> {
    let end = Deadline::after_ms(machine.number("seconds", 60)?.saturating_mul(1000));
    say!("bench-net.ready ip={} mac={}", own.ip, own.mac);
    let mut bytes = 0;
    while !end.passed() {
        let (mut is_own, mut found) = (false, None);
        let frame = next(&mut net.receiver, |frame| {
            is_own = frame.starts_with(&own.mac.0);
            found = frames::read_note(frame).zip(frames::sender(frame));
        })?;
        let Some(len) = frame else {
            sleep(net.device, &mut net.receiver, None);
            continue;
        };
        // What somebody has cut comes as several, of which the first has the note.
        bytes += if is_own { len as u64 } else { 0 };
        let Some((note, from)) = found.filter(|(note, _)| note.kind == Kind::Ask) else {
            continue;
        };
        let Some(room) = net.transmit(now()) else {
            continue;
        };
        room.consume(frames::FRAME_BYTES_MIN, |frame| {
            frames::lay(frame, own, from);
            let kind = Kind::Answer;
            frames::write_note(
                frame,
                Note {
                    kind,
                    bytes,
                    ..note
                },
            );
        });
        net.flush()?;
    }
    say!("bench-net.answered bytes={bytes}");
    Ok(())
}

/// Shows the beginning of the next frame, if there is one, and returns its bytes.
fn next(receiver: &mut Receiver, mut look: impl FnMut(&[u8])) -> Result<Option<usize>, Failure> {
    let mut is_first = true;
    receiver.next_parts(|part| {
        if core::mem::replace(&mut is_first, false) {
            look(part);
        }
        Ok(())
    })
}

/// Sleeps until a frame comes or, if that is asked for, one has been sent.
fn sleep(device: Device, receiver: &mut Receiver, mut queue: Option<&mut Queue>) {
    receiver.want_interrupt();
    receiver.flush();
    if let Some(queue) = &mut queue {
        queue.want_interrupt();
    }
    let is_sent = || queue.as_ref().is_some_and(|queue| queue.has_used());
    irq::sleep_until(Deadline::after_ms(LOST_MS), || {
        receiver.has_frames() || is_sent()
    });
    device.take_interrupt();
    receiver.suppress_interrupts();
    if let Some(queue) = queue {
        queue.suppress_interrupts();
    }
}

/// What is sent, to whom, and how much of it at once.
fn wanted(machine: &Machine) -> Result<(Station, usize, usize), Failure> {
    let bs = machine.number("bs", 64)? as usize;
    let qd = machine.number("qd", 1)? as usize;
    if !(frames::FRAME_BYTES_MIN..=frames::FRAME_BYTES_MAX).contains(&bs) {
        return Err(Failure::Parameter("bs"));
    }
    if !(1..=QUEUE_SIZE_MAX).contains(&qd) {
        return Err(Failure::Parameter("qd"));
    }
    let parse = |key| machine.args().text(key).ok_or(Failure::Parameter(key));
    let ip: Result<Ipv4Address, _> = parse("peer")?.parse();
    let mac: Result<EthernetAddress, _> = parse("mac")?.parse();
    let peer = Station {
        mac: mac.map_err(|()| Failure::Parameter("mac"))?,
        ip: ip.map_err(|_| Failure::Parameter("peer"))?,
    };
    Ok((peer, qd, bs))
}

fn flood(machine: &Machine, net: Net, own: Station) -> Result<(), Failure> {
    let (peer, qd, bs) = wanted(machine)?;
    let end = Deadline::after_ms(machine.number("seconds", 1)?.saturating_mul(1000));
    let timeout_ms = super::timeout_ms(machine)?;
    let device = net.device;
    let (receiver, queue) = net.into_parts(Deadline::after_ms(timeout_ms))?;
    let mut sending = Sending::new((device, receiver, queue), [own, peer], qd, bs)?;
    // Nobody is asked, so nothing is ever over.
    (sending.window, sending.asks_each) = (u64::MAX, u64::MAX);
    say!("bench-net.flood qd={qd} bs={bs}");
    while !end.passed() {
        sending.fill()?;
        while next(&mut sending.receiver, |_| {})?.is_some() {}
        sleep(device, &mut sending.receiver, Some(&mut sending.queue));
    }
    say!("bench-net.flooded frames={}", sending.sent);
    Ok(())
}

fn send(machine: &Machine, net: Net, own: Station) -> Result<(), Failure> {
    let (peer, qd, bs) = wanted(machine)?;
    // Measured now if CPUID does not tell: nothing may come between the last answer and its record.
    let khz = time::khz();
    let timeout_ms = super::timeout_ms(machine)?;
    let device = net.device;
    let (receiver, queue) = net.into_parts(Deadline::after_ms(timeout_ms))?;
    let mut sending = Sending::new((device, receiver, queue), [own, peer], qd, bs)?;
    let mut gaps = Gaps::new();
    say!("bench-net.begin qd={qd} bs={bs}");
    let first = sending.until(WARM_MS * khz, timeout_ms, |_| {})?;
    sending.lost = 0;
    let cycles = machine.number("seconds", 1)?.saturating_mul(1000 * khz);
    let last = sending.until(cycles, timeout_ms, |gap| gaps.keep(gap))?;
    let bytes = last.bytes - first.bytes;
    let cycles = last.at - first.at;
    say!(
        "bench-net.end qd={qd} bs={bs} frames={} bytes={bytes} lost={} kicks={} gap_median={} cycles={cycles} tsc_khz={khz}",
        bytes / bs as u64,
        sending.lost,
        sending.queue.kicks,
        gaps.median()
    );
    Ok(())
}

/// An answer.
#[derive(Debug, Clone, Copy)]
struct Answer {
    number: u64,
    bytes: u64,
    /// When it came, in cycles.
    at: u64,
}

/// The sending side.
struct Sending {
    device: Device,
    receiver: Receiver,
    queue: Queue,
    /// What each head sends.
    packets: [Option<Dma>; QUEUE_SIZE_MAX],
    free: [u16; QUEUE_SIZE_MAX],
    free_count: usize,
    /// Frames on their way at most.
    window: u64,
    /// Every so many frames one asks.
    asks_each: u64,
    sent: u64,
    /// All frames before are no longer on their way.
    over: u64,
    /// How often nothing was heard for a while.
    lost: u64,
    heard: Answer,
}

impl Sending {
    fn new(
        (device, receiver, mut queue): (Device, Receiver, Queue),
        [own, peer]: [Station; 2],
        qd: usize,
        bs: usize,
    ) -> Result<Sending, Failure> {
        let len = frames::HEADER_BYTES + bs;
        let stride = len.next_multiple_of(64);
        let memory = phys::allocate(qd * stride);
        let mut packets = [None; QUEUE_SIZE_MAX];
        let mut free = [0; QUEUE_SIZE_MAX];
        for (place, free) in free[..qd].iter_mut().enumerate() {
            let mut packet = memory.part(place * stride, len);
            let (header, frame) = packet.all_mut().split_at_mut(frames::HEADER_BYTES);
            header.copy_from_slice(&frames::header(bs));
            frames::lay(frame, own, peer);
            let head = queue.build(&[Segment::readable(packet)]);
            *free = head.ok_or(Failure::Parameter("qd"))?;
            packets[usize::from(*free)] = Some(packet);
        }
        Ok(Sending {
            device,
            receiver,
            queue,
            packets,
            free,
            free_count: qd,
            window: qd as u64,
            asks_each: (qd as u64 / 4).max(1),
            sent: 0,
            over: 0,
            lost: 0,
            heard: Answer {
                number: 0,
                bytes: 0,
                at: time::cycles(),
            },
        })
    }

    /// Sends until an answer comes that is so many cycles younger than the last one before. Each time between two
    /// is told to `gap`.
    fn until(
        &mut self,
        cycles: u64,
        timeout_ms: u64,
        mut gap: impl FnMut(u64),
    ) -> Result<Answer, Failure> {
        let start = self.heard.at;
        let lost_after = LOST_MS * time::khz();
        let mut tried_at = time::cycles();
        let mut deadline = Deadline::after_ms(timeout_ms);
        loop {
            self.fill()?;
            if let Some(answer) = self.hear()? {
                gap(answer.at - self.heard.at);
                self.heard = answer;
                self.over = self.over.max(answer.number);
                tried_at = answer.at;
                if answer.at - start >= cycles {
                    return Ok(answer);
                }
                deadline = Deadline::after_ms(timeout_ms);
            } else if time::cycles() - tried_at > lost_after {
                if deadline.passed() {
                    return Err(Failure::Timeout("answer"));
                }
                self.lost += 1;
                self.over = self.sent;
                tried_at = time::cycles();
            } else {
                // With a frame to send and none that is free, one that has been sent is waited for, too.
                let is_full = self.sent - self.over == self.window;
                let queue = Some(&mut self.queue).filter(|_| !is_full);
                sleep(self.device, &mut self.receiver, queue);
            }
        }
    }

    /// Sends what may be on its way.
    fn fill(&mut self) -> Result<(), Failure> {
        while let Some(used) = self.queue.poll()? {
            self.free[self.free_count] = used.head;
            self.free_count += 1;
        }
        let before = self.sent;
        while self.sent - self.over < self.window && self.free_count > 0 {
            self.free_count -= 1;
            let head = self.free[self.free_count];
            let Some(mut packet) = self.packets[usize::from(head)] else {
                return Err(Failure::Wrong {
                    what: "used_id",
                    got: head.into(),
                    expected: 0,
                });
            };
            self.sent += 1;
            let asks = self.sent.is_multiple_of(self.asks_each);
            let note = Note {
                kind: if asks { Kind::Ask } else { Kind::Count },
                number: self.sent,
                bytes: 0,
            };
            frames::write_note(&mut packet.all_mut()[frames::HEADER_BYTES..], note);
            self.queue.offer(head);
        }
        if self.sent > before {
            self.queue.kick();
        }
        Ok(())
    }

    /// The next answer, if it has come.
    fn hear(&mut self) -> Result<Option<Answer>, Failure> {
        let mut found = None;
        let frame = next(&mut self.receiver, |frame| {
            found = frames::read_note(frame);
        })?;
        if frame.is_some() {
            self.receiver.flush();
        }
        let answer = found.filter(|note| note.kind == Kind::Answer);
        Ok(answer.map(|note| Answer {
            number: note.number,
            bytes: note.bytes,
            at: time::cycles(),
        }))
    }
}

/// Times between answers in cycles, the first [`GAPS_MAX`] of them.
struct Gaps {
    memory: Dma,
    count: usize,
}

impl Gaps {
    fn new() -> Gaps {
        Gaps {
            memory: phys::allocate(GAPS_MAX * WORD),
            count: 0,
        }
    }

    fn keep(&mut self, gap: u64) {
        if self.count < GAPS_MAX {
            self.memory.write(self.count * WORD, gap);
            self.count += 1;
        }
    }

    fn median(&mut self) -> u64 {
        let (words, _) = self.memory.all_mut().as_chunks_mut::<WORD>();
        let words = &mut words[..self.count];
        words.sort_unstable_by_key(|word| u64::from_ne_bytes(*word));
        let middle = words.get(self.count / 2);
        middle.map_or(0, |word| u64::from_ne_bytes(*word))
    }
}
