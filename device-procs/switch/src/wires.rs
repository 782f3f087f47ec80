//! Where packets of the switch come and go: machines' ports as rings in shared memory ([`bulkhead_ipc::port`]), uplinks as
//! queues of TAP interfaces; and who is to be woken.
//!
//! ```text
//!   loop: pass over the awake ports ── settle (publish, give back, ring) ── idle ports asked for records
//!           └ none awake: sleep until a doorbell rings, which awakes its port
//! ```
//!
//! A port that never sends costs nothing, and one that breaks the ring protocol is broken for good: nothing
//! comes from it and nothing goes to it until it is attached anew.

use crate::switch::{Passed, PortId, Ports, Sent, Switch};
use bulkhead_ipc::port::{PACKET_HEADER_BYTES, Port, PortFault};
use bulkhead_ipc::shared::Doorbell;
use nix::errno::Errno;
use nix::sys::uio::writev;
use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most parts of a frame that are written at once: a header in front of the frame's own.
const PARTS_MAX: usize = 8;

/// One port.
#[derive(Debug)]
enum Wire {
    /// A machine's.
    Ring(Box<Ring>),
    /// A queue of a TAP interface: with headers (IFF_VNET_HDR) of [`PACKET_HEADER_BYTES`], non-blocking.
    Tap(Arc<OwnedFd>),
}

#[derive(Debug)]
struct Ring {
    port: Port,
    /// The other end's.
    bell: Doorbell,
    fault: Option<PortFault>,
}

impl Ring {
    /// Does something with the rings of a port whose other end is there and that is not broken.
    fn attempt<T>(&mut self, work: impl FnOnce(&mut Port) -> Result<T, PortFault>) -> Option<T> {
        if self.fault.is_some() || !self.port.is_met() {
            return None;
        }
        match work(&mut self.port) {
            Ok(done) => Some(done),
            Err(fault) => {
                self.fault = Some(fault);
                None
            }
        }
    }

    fn receive(&mut self, to: &mut [u8]) -> Option<usize> {
        self.attempt(|port| {
            let there = port.reader.peek(&port.memory)?;
            Ok(there.map(|_| {
                let len = port.reader.copy_out(&port.memory, 0, to);
                port.reader.take();
                len
            }))
        })?
    }

    fn send(&mut self, header: [u8; PACKET_HEADER_BYTES], frame: &[&[u8]]) -> bool {
        let len = PACKET_HEADER_BYTES + frame.iter().map(|part| part.len()).sum::<usize>();
        let sent = self.attempt(|port| {
            let Some(mut record) = port.writer.reserve(&port.memory, len)? else {
                return Ok(false);
            };
            record.write(&header);
            for part in frame {
                record.write(part);
            }
            record.commit();
            Ok(true)
        });
        sent == Some(true)
    }

    /// Makes visible what was sent and gives back the places of what was taken; rings whoever waits for either.
    fn settle(&mut self) {
        if self.port.settle() {
            self.bell.ring();
        }
    }
}

/// An interface that is down (EIO), or gone (EBADFD), is one that nothing comes from.
fn read_tap(tap: &OwnedFd, to: &mut [u8]) -> Option<usize> {
    loop {
        match nix::unistd::read(tap, to) {
            Ok(len) if len > PACKET_HEADER_BYTES => return Some(len),
            Err(Errno::EINTR) => {}
            Ok(_) | Err(_) => return None,
        }
    }
}

fn write_tap(tap: &OwnedFd, header: &[u8], frame: &[&[u8]]) -> bool {
    let mut parts = [IoSlice::new(&[]); PARTS_MAX];
    let all = [header].into_iter().chain(frame.iter().copied());
    let mut used = 0;
    for part in all {
        let Some(place) = parts.get_mut(used) else {
            return false;
        };
        *place = IoSlice::new(part);
        used += 1;
    }
    writev(tap, parts.get(..used).unwrap_or_default()).is_ok()
}

/// The ports of a network.
#[derive(Debug, Default)]
pub struct Wires {
    wires: BTreeMap<PortId, Wire>,
    /// Ports that may have something to send.
    awake: BTreeSet<PortId>,
    /// Ports that have sent as much as they may, and until when they rest.
    resting: BTreeMap<PortId, Instant>,
    /// Ports whose rings were used and not settled.
    used: BTreeSet<PortId>,
}

impl Wires {
    /// Has `port` carried by these rings from now on; `bell` wakes the other end.
    pub fn attach(&mut self, id: PortId, port: Port, bell: Doorbell) {
        // Whoever waits at the other end may do so in an earlier generation.
        bell.ring();
        let ring = Ring {
            port,
            bell,
            fault: None,
        };
        self.add(id, Wire::Ring(Box::new(ring)));
    }

    /// Has `port` carried by this queue of a TAP interface from now on.
    pub fn attach_tap(&mut self, id: PortId, tap: Arc<OwnedFd>) {
        self.add(id, Wire::Tap(tap));
    }

    fn add(&mut self, id: PortId, wire: Wire) {
        self.detach(id);
        self.wires.insert(id, wire);
        self.awake.insert(id);
    }

    /// Whether somebody is at the other end.
    pub fn is_met(&mut self, id: PortId) -> bool {
        match self.wires.get_mut(&id) {
            Some(Wire::Ring(ring)) => ring.fault.is_none() && ring.port.is_met(),
            Some(Wire::Tap(_)) => true,
            None => false,
        }
    }

    /// Lets go of a port's rings.
    pub fn detach(&mut self, id: PortId) {
        self.wires.remove(&id);
        self.awake.remove(&id);
        self.resting.remove(&id);
        self.used.remove(&id);
    }

    /// The port's own doorbell has rung.
    pub fn wake(&mut self, id: PortId) {
        if self.wires.contains_key(&id) && !self.resting.contains_key(&id) {
            self.awake.insert(id);
        }
    }

    /// Makes one pass over the ports that may have something. Returns how many frames were taken.
    pub fn pass(&mut self, switch: &mut Switch, now: Instant) -> usize {
        self.pass_and(switch, now, |_| {}).0
    }

    /// As [`Wires::pass`], and returns what the frames have cost as well ([`Passed::cost`]); `before` is called when
    /// everything is done and nobody has seen anything of it yet.
    pub fn pass_and(
        &mut self,
        switch: &mut Switch,
        now: Instant,
        before: impl FnOnce(&mut Switch),
    ) -> (usize, i64) {
        let over: Vec<PortId> = self.rested(now).collect();
        for id in over {
            self.resting.remove(&id);
            self.awake.insert(id);
        }
        let active: Vec<PortId> = self.awake.iter().copied().collect();
        let Passed {
            frames,
            cost,
            idle,
            resting,
        } = switch.pass(&active, self, now);
        before(switch);
        self.settle();
        for (id, rest) in resting {
            self.awake.remove(&id);
            self.resting.insert(id, now + rest);
        }
        for id in idle {
            let has_more = match self.wires.get_mut(&id) {
                Some(Wire::Ring(ring)) => {
                    ring.attempt(|port| port.reader.ask_for_records(&port.memory))
                }
                // It is watched edge-triggered, and was read to its end.
                Some(Wire::Tap(_)) | None => None,
            };
            if has_more != Some(true) {
                self.awake.remove(&id);
            }
        }
        (frames, cost)
    }

    /// How long there is nothing to do unless a doorbell rings; `None` is for ever.
    #[must_use]
    pub fn sleep(&self, now: Instant) -> Option<Duration> {
        if !self.awake.is_empty() {
            return Some(Duration::ZERO);
        }
        let next = self.resting.values().min()?;
        Some(next.saturating_duration_since(now))
    }

    /// Ports that broke the ring protocol, and how.
    pub fn faults(&self) -> impl Iterator<Item = (PortId, PortFault)> {
        let broken = self.wires.iter();
        broken.filter_map(|(id, wire)| match wire {
            Wire::Ring(ring) => Some((*id, ring.fault?)),
            Wire::Tap(_) => None,
        })
    }

    fn rested(&self, now: Instant) -> impl Iterator<Item = PortId> {
        let resting = self.resting.iter();
        resting
            .filter(move |(_, until)| **until <= now)
            .map(|(id, _)| *id)
    }

    /// Makes visible what was sent, gives back the places of what was taken, and rings whoever waits for
    /// either, each port once.
    fn settle(&mut self) {
        for id in std::mem::take(&mut self.used) {
            match self.wires.get_mut(&id) {
                Some(Wire::Ring(ring)) if ring.fault.is_none() => ring.settle(),
                _ => {}
            }
        }
    }
}

impl Ports for Wires {
    fn receive(&mut self, id: PortId, to: &mut [u8]) -> Option<usize> {
        match self.wires.get_mut(&id)? {
            Wire::Tap(tap) => read_tap(tap, to),
            Wire::Ring(ring) => {
                let len = ring.receive(to)?;
                self.used.insert(id);
                Some(len)
            }
        }
    }

    fn send(&mut self, id: PortId, header: [u8; PACKET_HEADER_BYTES], frame: &[&[u8]]) -> Sent {
        let sent = match self.wires.get_mut(&id) {
            Some(Wire::Tap(tap)) => write_tap(tap, &header, frame),
            Some(Wire::Ring(ring)) => ring.send(header, frame),
            None => false,
        };
        if !sent {
            return Sent::NoRoom;
        }
        self.used.insert(id);
        Sent::Yes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::offload::Offload;
    use crate::settings::{Guard, Isolation, Limits, NetworkSettings, PortSettings, Role, Vlan};
    use crate::testing::{mac, udp_frame};
    use crate::{Cause, Rate};
    use bulkhead_ipc::port::{PORT_BYTES, PortEnd, stamp};
    use bulkhead_ipc::shared::sealed_memfd;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A machine's end of a port.
    struct Card {
        port: Port,
        /// Wakes the switch.
        switch: Doorbell,
        /// Wakes this end.
        own: Doorbell,
    }

    impl Card {
        fn send(&mut self, frame: &[u8]) -> bool {
            let len = PACKET_HEADER_BYTES + frame.len();
            let Port { memory, writer, .. } = &mut self.port;
            let Some(mut record) = writer.reserve(memory, len).unwrap() else {
                return false;
            };
            record.write(&[0; PACKET_HEADER_BYTES]);
            record.write(frame);
            record.commit();
            if writer.publish(memory) {
                self.switch.ring();
            }
            true
        }

        fn receive(&mut self) -> Option<Vec<u8>> {
            let Port { memory, reader, .. } = &mut self.port;
            let mut record = vec![0; reader.peek(memory).unwrap()?];
            reader.copy_out(memory, 0, &mut record);
            reader.take();
            let _nobody_waits = reader.release(memory);
            Some(record.split_off(PACKET_HEADER_BYTES))
        }

        /// Waits for a frame, asleep on the doorbell.
        fn wait(&mut self) -> Vec<u8> {
            loop {
                if let Some(frame) = self.receive() {
                    return frame;
                }
                let Port { memory, reader, .. } = &mut self.port;
                if !reader.ask_for_records(memory).unwrap() {
                    assert!(
                        sleep(&[&self.own], Some(Duration::from_secs(20))),
                        "nobody rang"
                    );
                    self.own.take();
                }
            }
        }
    }

    /// Whether one of the bells has rung in time.
    fn sleep(bells: &[&Doorbell], within: Option<Duration>) -> bool {
        let mut fds: Vec<PollFd<'_>> = bells
            .iter()
            .map(|bell| PollFd::new(bell.as_fd(), PollFlags::POLLIN))
            .collect();
        let within = within.map_or(PollTimeout::NONE, |within| {
            PollTimeout::try_from(within + Duration::from_micros(999)).unwrap()
        });
        poll(&mut fds, within).unwrap() > 0
    }

    struct Lab {
        switch: Switch,
        wires: Wires,
        bells: Vec<Doorbell>,
    }

    fn lab(count: u8, limits: Limits) -> (Lab, Vec<Card>) {
        let network = NetworkSettings {
            mtu: 1500,
            subnet: None,
            domain: "lab".to_owned(),
            dns: vec![],
        };
        let mut lab = Lab {
            switch: Switch::new(network).unwrap(),
            wires: Wires::default(),
            bells: Vec::new(),
        };
        let mut cards = Vec::new();
        for n in 0..count {
            let settings = PortSettings {
                name: format!("m{n}"),
                role: Role::Machine,
                mac: mac(n + 1),
                addresses: Vec::new(),
                vlan: Vlan::Access(0),
                isolation: Isolation::Open,
                guard: Guard::FULL,
                offload: Offload::ALL,
                limits,
            };
            let now = Instant::now();
            lab.switch.set_port(n.into(), settings, now).unwrap();
            let fd = sealed_memfd("p", PORT_BYTES).unwrap();
            stamp(fd.as_fd(), 1).unwrap();
            let port = Port::map(fd.try_clone().unwrap(), PortEnd::Device, 1).unwrap();
            let (switch, own) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
            lab.bells.push(switch.try_clone().unwrap());
            let end = Port::map(fd, PortEnd::Switch, 1).unwrap();
            lab.wires.attach(n.into(), end, own.try_clone().unwrap());
            cards.push(Card { port, switch, own });
        }
        (lab, cards)
    }

    impl Lab {
        /// Works until nothing is left to do. Returns the frames that were taken.
        fn settle(&mut self) -> usize {
            for (id, bell) in (0..).zip(&self.bells) {
                if bell.take() {
                    self.wires.wake(id);
                }
            }
            let mut frames = 0;
            while self.wires.sleep(Instant::now()) == Some(Duration::ZERO) {
                frames += self.wires.pass(&mut self.switch, Instant::now());
            }
            frames
        }

        /// Works and sleeps until it is told to end. Returns how often it was woken.
        fn serve(&mut self, ends: &AtomicBool) -> u64 {
            let mut woken = 0;
            while !ends.load(Ordering::Relaxed) {
                self.settle();
                let bells: Vec<&Doorbell> = self.bells.iter().collect();
                let within = self.wires.sleep(Instant::now());
                sleep(&bells, within);
                woken += 1;
            }
            woken
        }
    }

    fn frame(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
        udp_frame(
            (mac(from + 1), [10, 0, 0, from + 1], 5),
            (mac(to + 1), [10, 0, 0, to + 1], 6),
            payload,
        )
    }

    #[test]
    fn frames_pass_both_ways_and_nobody_sleeps_for_ever() {
        let (mut lab, mut cards) = lab(2, Limits::default());
        let ends = Arc::new(AtomicBool::new(false));
        let (mut b, mut a) = (cards.pop().unwrap(), cards.pop().unwrap());
        let bell = lab.bells[0].try_clone().unwrap();
        let other = Arc::clone(&ends);
        let serving = std::thread::spawn(move || lab.serve(&other));
        const ROUNDS: u32 = 2000;
        let answering = std::thread::spawn(move || {
            for round in 0..ROUNDS {
                assert_eq!(b.wait(), frame(0, 1, &round.to_be_bytes()));
                assert!(b.send(&frame(1, 0, &round.to_be_bytes())));
            }
        });
        for round in 0..ROUNDS {
            assert!(a.send(&frame(0, 1, &round.to_be_bytes())));
            assert_eq!(a.wait(), frame(1, 0, &round.to_be_bytes()));
        }
        answering.join().unwrap();
        ends.store(true, Ordering::Relaxed);
        bell.ring();
        assert!(serving.join().unwrap() > 0);
    }

    #[test]
    fn idle_ports_cost_nothing() {
        let (mut lab, mut cards) = lab(100, Limits::default());
        assert_eq!(lab.settle(), 0);
        assert_eq!(lab.wires.sleep(Instant::now()), None, "for ever");
        assert!(cards[7].send(&frame(7, 8, b"x")));
        assert_eq!(lab.settle(), 1);
        assert_eq!(cards[8].receive(), Some(frame(7, 8, b"x")));
        assert_eq!(lab.wires.sleep(Instant::now()), None);
    }

    #[test]
    fn writer_that_waits_for_room_is_woken_and_a_full_reader_loses_frames() {
        let (mut lab, mut cards) = lab(2, Limits::default());
        let big = frame(0, 1, &[7; 1400]);
        let mut sent = 0;
        for _ in 0..3 {
            while cards[0].send(&big) {
                sent += 1;
            }
            let Port { memory, writer, .. } = &mut cards[0].port;
            assert!(!writer.ask_for_room(memory, 2000).unwrap());
            cards[0].own.take();
            lab.settle();
            assert!(cards[0].own.take(), "there is room again");
        }
        let arrived = std::iter::from_fn(|| cards[1].receive()).count();
        let counters: Vec<_> = lab.switch.counters().map(|(_, c)| *c).collect();
        assert_eq!(counters[0].frames_in, sent);
        assert_eq!(counters[1].frames_out, arrived as u64);
        assert_eq!(counters[1].of(Cause::NoRoom), sent - arrived as u64);
        assert!(arrived > 100 && sent > 2 * arrived as u64);
    }

    #[test]
    fn port_at_its_limit_rests_with_its_frames_and_others_do_not() {
        let limits = Limits {
            frames: Some(Rate {
                per_s: 20,
                burst: 2,
            }),
            ..Limits::default()
        };
        let (mut lab, mut cards) = lab(2, limits);
        let begun = Instant::now();
        for n in 0..6 {
            assert!(cards[0].send(&frame(0, 1, &[n])));
        }
        assert_eq!(lab.settle(), 2);
        assert!(cards[1].send(&frame(1, 0, b"now")));
        assert_eq!(lab.settle(), 1);
        let mut left = 4;
        while left > 0 {
            // Ringing does not end a rest.
            lab.bells[0].ring();
            let rest = lab.wires.sleep(Instant::now()).unwrap();
            assert!(rest <= Duration::from_millis(51), "{rest:?}");
            std::thread::sleep(rest);
            left -= lab.settle();
        }
        assert!(begun.elapsed() >= Duration::from_millis(199));
        for n in 0..6 {
            assert_eq!(cards[1].receive(), Some(frame(0, 1, &[n])));
        }
    }

    #[test]
    fn port_that_breaks_the_protocol_is_broken_alone_until_it_is_attached_anew() {
        let (mut lab, mut cards) = lab(3, Limits::default());
        lab.settle();
        // Its position is one that no writer has.
        cards[0].port.memory.write(0x100, u64::MAX);
        lab.bells[0].ring();
        assert_eq!(lab.settle(), 0);
        let faults: Vec<_> = lab.wires.faults().collect();
        assert!(
            matches!(faults[..], [(0, PortFault::Produced { got: u64::MAX, .. })]),
            "{faults:?}"
        );
        lab.bells[0].ring();
        assert_eq!(lab.settle(), 0);
        assert_eq!(
            lab.wires.sleep(Instant::now()),
            None,
            "it does not keep the switch awake"
        );
        assert!(cards[1].send(&frame(1, 0, b"lost")) && cards[1].send(&frame(1, 2, b"kept")));
        assert_eq!(lab.settle(), 2);
        assert_eq!(cards[2].receive(), Some(frame(1, 2, b"kept")));
        let fd = sealed_memfd("p", PORT_BYTES).unwrap();
        stamp(fd.as_fd(), 2).unwrap();
        let end = Port::map(fd.try_clone().unwrap(), PortEnd::Switch, 2).unwrap();
        let bell = cards[0].own.try_clone().unwrap();
        lab.wires.attach(0, end, bell);
        cards[0].port = Port::map(fd, PortEnd::Device, 2).unwrap();
        assert_eq!(lab.wires.faults().count(), 0);
        assert!(cards[1].send(&frame(1, 0, b"again")) && cards[0].send(&frame(0, 2, b"back")));
        assert_eq!(lab.settle(), 2);
        assert_eq!(cards[0].receive(), Some(frame(1, 0, b"again")));
        assert_eq!(cards[2].receive(), Some(frame(0, 2, b"back")));
    }

    #[test]
    fn uplink_is_a_queue_that_keeps_frames_apart() {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
        let (mut lab, mut cards) = lab(1, Limits::default());
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        // It keeps packets apart as an interface does.
        let (near, far) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).unwrap();
        let settings = PortSettings {
            name: "outside".to_owned(),
            role: Role::Uplink,
            mac: mac(0),
            addresses: Vec::new(),
            vlan: Vlan::Access(0),
            isolation: Isolation::Open,
            guard: Guard::FULL,
            offload: Offload::ALL,
            limits: Limits::default(),
        };
        lab.switch.set_port(7, settings, Instant::now()).unwrap();
        lab.wires.attach_tap(7, Arc::new(near));
        assert!(lab.wires.is_met(7) && lab.wires.is_met(0));
        assert_eq!(lab.settle(), 0);
        let packet = |frame: &[u8]| [&[0; PACKET_HEADER_BYTES], frame].concat();
        for n in 0..3u8 {
            let bytes = packet(&frame(9, 0, &[n]));
            assert_eq!(nix::unistd::write(&far, &bytes), Ok(bytes.len()));
        }
        // Too short for a frame: nobody's.
        assert_eq!(nix::unistd::write(&far, &[0; 5]), Ok(5));
        lab.wires.wake(7);
        assert_eq!(lab.settle(), 3);
        for n in 0..3u8 {
            assert_eq!(cards[0].receive(), Some(frame(9, 0, &[n])));
        }
        assert_eq!(lab.wires.sleep(Instant::now()), None);
        assert!(cards[0].send(&frame(0, 9, b"out")));
        assert_eq!(lab.settle(), 1);
        let mut got = [0; 2048];
        let n = nix::unistd::read(&far, &mut got).unwrap();
        assert_eq!(got[PACKET_HEADER_BYTES..n], frame(0, 9, b"out"));
        assert_eq!(got[..10], [0; 10], "nothing is left to do");
        drop(far);
        assert!(cards[0].send(&frame(0, 9, b"lost")));
        assert_eq!(lab.settle(), 1);
        lab.wires.detach(7);
        assert!(!lab.wires.is_met(7));
    }
}
