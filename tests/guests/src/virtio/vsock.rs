//! The socket device: packets, and connections with their flow control.

use bulkhead_guest::pattern;

use crate::machine::Machine;
use crate::report::{Failure, expect, say};
use crate::sys::irq;
use crate::sys::phys::{self, Dma};
use crate::sys::time::Deadline;
use crate::virtio::mmio::{self, Device, feature, id};
use crate::virtio::queue::{Queue, Segment, Used};

/// Bytes of a packet's header.
const HEADER: usize = 44;
/// Payload of one buffer for packets, as Linux offers it.
const RECEIVE_BYTES: usize = 4096;
const RECEIVE_BUFFERS: usize = 64;
const EVENT_BUFFERS: usize = 4;
/// Payload of a packet at most.
const SEND_BYTES: usize = 16 << 10;
const SEND_SLOTS: usize = 16;
/// Bytes that a connection keeps.
pub const KEPT_BYTES: usize = 64 << 10;
/// Bytes passed on from which on the other side is told.
const UNTOLD_MAX: u32 = (KEPT_BYTES / 4) as u32;
/// Connections at a time.
pub const CONNECTIONS_MAX: usize = 32;
const RESETS_MAX: usize = 128;
const HOST: u64 = 2;
const STREAM: u16 = 1;

mod op {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const RESPONSE: u16 = 2;
    pub(super) const RST: u16 = 3;
    pub(super) const SHUTDOWN: u16 = 4;
    pub(super) const RW: u16 = 5;
    pub(super) const CREDIT_UPDATE: u16 = 6;
    pub(super) const CREDIT_REQUEST: u16 = 7;
}

const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;

#[derive(Debug, Clone, Copy)]
struct Header {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Header {
    fn read(at: Dma) -> Header {
        Header {
            src_cid: at.read(0),
            dst_cid: at.read(8),
            src_port: at.read(16),
            dst_port: at.read(20),
            len: at.read(24),
            kind: at.read(28),
            op: at.read(30),
            flags: at.read(32),
            buf_alloc: at.read(36),
            fwd_cnt: at.read(40),
        }
    }

    fn write(&self, at: Dma) {
        at.write(0, self.src_cid);
        at.write(8, self.dst_cid);
        at.write(16, self.src_port);
        at.write(20, self.dst_port);
        at.write(24, self.len);
        at.write(28, self.kind);
        at.write(30, self.op);
        at.write(32, self.flags);
        at.write(36, self.buf_alloc);
        at.write(40, self.fwd_cnt);
    }
}

/// What a connection does with its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// Sends back what it receives, up to the end.
    Echo,
    /// Sends so many bytes of a pattern, and verifies that the same come back.
    Ask {
        /// How many.
        bytes: u64,
        /// Of which pattern.
        seed: u64,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Asked,
    Open,
}

/// How a connection has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Both sides said all that they had.
    Whole,
    /// The other side refused it.
    Refused,
    /// It was cut.
    Cut,
}

#[derive(Debug, Clone, Copy)]
struct Connection {
    state: State,
    task: Task,
    local: u32,
    peer: u32,
    room: u32,
    peer_passed: u32,
    sent: u64,
    received: u64,
    passed: u64,
    told: u64,
    tells: bool,
    asked_room: bool,
    peer_ended: bool,
    ended: bool,
    kept: Dma,
    wrong: u64,
}

/// A started socket device.
#[derive(Debug)]
pub struct Vsock {
    device: Device,
    receive: Queue,
    send: Queue,
    event: Queue,
    /// Context id of this guest.
    pub cid: u64,
    receive_memory: Dma,
    receive_index: [u16; crate::virtio::queue::QUEUE_SIZE_MAX],
    event_memory: Dma,
    event_index: [u16; crate::virtio::queue::QUEUE_SIZE_MAX],
    send_memory: Dma,
    send_index: [u16; crate::virtio::queue::QUEUE_SIZE_MAX],
    send_free: [bool; SEND_SLOTS],
    connections: [Connection; CONNECTIONS_MAX],
    resets: [(u32, u32); RESETS_MAX],
    reset_count: usize,
    listens: Option<u32>,
    next_port: u32,
    ends: [u64; 3],
    /// Connections that clients have made.
    pub accepted: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Events that all connections have ended.
    pub transport_resets: u64,
    timeout_ms: u64,
}

impl Drop for Vsock {
    fn drop(&mut self) {
        irq::disable(self.device.gsi);
    }
}

impl Vsock {
    /// Finds it and starts it.
    pub fn open(machine: &Machine, timeout_ms: u64) -> Result<Vsock, Failure> {
        Vsock::start(mmio::find(machine, id::VSOCK, 0)?, timeout_ms)
    }

    /// Starts it with buffers for packets and events.
    pub fn start(device: Device, timeout_ms: u64) -> Result<Vsock, Failure> {
        let features = device.negotiate(feature::INDIRECT_DESC | feature::EVENT_IDX)?;
        let receive = device.queue(0, features)?;
        let send = device.queue(1, features)?;
        let event = device.queue(2, features)?;
        let connections = [(); CONNECTIONS_MAX].map(|()| Connection {
            state: State::Free,
            task: Task::Echo,
            local: 0,
            peer: 0,
            room: 0,
            peer_passed: 0,
            sent: 0,
            received: 0,
            passed: 0,
            told: 0,
            tells: false,
            asked_room: false,
            peer_ended: false,
            ended: false,
            kept: phys::allocate(KEPT_BYTES),
            wrong: 0,
        });
        let mut vsock = Vsock {
            device,
            receive,
            send,
            event,
            cid: device.config_u64(0),
            receive_memory: phys::allocate(RECEIVE_BUFFERS * (RECEIVE_BYTES + 64)),
            receive_index: [0; _],
            event_memory: phys::allocate(EVENT_BUFFERS * 4),
            event_index: [0; _],
            send_memory: phys::allocate(SEND_SLOTS * (SEND_BYTES + 64)),
            send_index: [0; _],
            send_free: [true; SEND_SLOTS],
            connections,
            resets: [(0, 0); RESETS_MAX],
            reset_count: 0,
            listens: None,
            next_port: 1024,
            ends: [0; 3],
            accepted: 0,
            bytes: 0,
            transport_resets: 0,
            timeout_ms,
        };
        device.start()?;
        for index in 0..RECEIVE_BUFFERS.min(usize::from(vsock.receive.size) / 2) {
            let buffer = vsock.receive_buffer(index);
            // As Linux did for long: the header apart from the payload.
            let segments = [
                Segment::writable(buffer.part(0, HEADER)),
                Segment::writable(buffer.part(64, RECEIVE_BYTES)),
            ];
            let head = vsock.receive.build(&segments);
            let head = head.ok_or(Failure::Parameter("queue_size"))?;
            vsock.receive_index[usize::from(head)] = index as u16;
            vsock.receive.offer(head);
        }
        for index in 0..EVENT_BUFFERS.min(usize::from(vsock.event.size)) {
            let buffer = vsock.event_memory.part(index * 4, 4);
            buffer.write(0, u32::MAX);
            let head = vsock.event.build(&[Segment::writable(buffer)]);
            let head = head.ok_or(Failure::Parameter("queue_size"))?;
            vsock.event_index[usize::from(head)] = index as u16;
            vsock.event.offer(head);
        }
        vsock.receive.kick();
        vsock.event.kick();
        irq::enable(device.gsi);
        Ok(vsock)
    }

    fn receive_buffer(&self, index: usize) -> Dma {
        self.receive_memory
            .part(index * (RECEIVE_BYTES + 64), RECEIVE_BYTES + 64)
    }

    fn send_buffer(&self, slot: usize) -> Dma {
        self.send_memory
            .part(slot * (SEND_BYTES + 64), SEND_BYTES + 64)
    }

    /// Accepts connections to `port` from now on.
    pub fn listen(&mut self, port: u32) {
        self.listens = Some(port);
    }

    /// Connections that there are, or are asked for.
    pub fn open_connections(&self) -> usize {
        let all = self.connections.iter();
        all.filter(|c| c.state != State::Free).count()
    }

    /// How many connections have ended so.
    pub fn ended(&self, how: End) -> u64 {
        self.ends[how as usize]
    }

    /// Asks for a connection to `port` of the host. False when there are too many.
    pub fn connect(&mut self, port: u32, task: Task) -> Result<bool, Failure> {
        let free = self.free_connection();
        let (Some(index), true) = (free, self.has_slot()) else {
            return Ok(false);
        };
        let local = self.next_port;
        self.next_port += 1;
        self.begin(index, State::Asked, task, local, port);
        self.say(index, op::REQUEST, 0)?;
        Ok(true)
    }

    fn free_connection(&self) -> Option<usize> {
        let mut all = self.connections.iter();
        all.position(|c| c.state == State::Free)
    }

    fn begin(&mut self, index: usize, state: State, task: Task, local: u32, peer: u32) {
        let kept = self.connections[index].kept;
        self.connections[index] = Connection {
            state,
            task,
            local,
            peer,
            room: 0,
            peer_passed: 0,
            sent: 0,
            received: 0,
            passed: 0,
            told: 0,
            tells: false,
            asked_room: false,
            peer_ended: false,
            ended: false,
            kept,
            wrong: 0,
        };
    }

    fn end(&mut self, index: usize, how: End) {
        self.connections[index].state = State::Free;
        self.ends[how as usize] += 1;
    }

    fn has_slot(&self) -> bool {
        self.send_free.iter().any(|free| *free)
    }

    /// Sends a packet without payload. There must be a slot.
    fn say(&mut self, index: usize, op: u16, flags: u32) -> Result<(), Failure> {
        let (local, peer) = (self.connections[index].local, self.connections[index].peer);
        let passed = self.connections[index].passed;
        self.connections[index].told = passed;
        self.connections[index].tells = false;
        let header = self.header(local, peer, op, flags, passed);
        self.put(header, None)
    }

    fn header(&self, local: u32, peer: u32, op: u16, flags: u32, passed: u64) -> Header {
        Header {
            src_cid: self.cid,
            dst_cid: HOST,
            src_port: local,
            dst_port: peer,
            len: 0,
            kind: STREAM,
            op,
            flags,
            buf_alloc: KEPT_BYTES as u32,
            fwd_cnt: passed as u32,
        }
    }

    /// Puts a packet whose payload, if any, is in the slot already.
    fn put(&mut self, header: Header, slot: Option<usize>) -> Result<(), Failure> {
        let free = || self.send_free.iter().position(|free| *free);
        let slot = slot.or_else(free).ok_or(Failure::Parameter("slots"))?;
        let buffer = self.send_buffer(slot);
        header.write(buffer.part(0, HEADER));
        let segments = [
            Segment::readable(buffer.part(0, HEADER)),
            Segment::readable(buffer.part(64, (header.len as usize).max(1))),
        ];
        let used = if header.len > 0 { 2 } else { 1 };
        let head = self.send.build(&segments[..used]);
        let head = head.ok_or(Failure::Parameter("queue_size"))?;
        self.send_index[usize::from(head)] = slot as u16;
        self.send_free[slot] = false;
        self.send.offer(head);
        Ok(())
    }

    /// Does what there is to do until `done`, or nothing happens for the time-out.
    pub fn run(
        &mut self,
        deadline: Deadline,
        mut done: impl FnMut(&mut Vsock) -> Result<bool, Failure>,
    ) -> Result<bool, Failure> {
        loop {
            while self.step()? {}
            if done(self)? {
                return Ok(true);
            }
            while self.step()? {}
            if deadline.passed() {
                return Ok(false);
            }
            self.receive.want_interrupt();
            self.send.want_interrupt();
            self.event.want_interrupt();
            let mut failure = None;
            irq::sleep_until(deadline.min(Deadline::after_ms(20)), || {
                self.device.take_interrupt();
                self.step().unwrap_or_else(|error| {
                    failure = Some(error);
                    true
                })
            });
            if let Some(failure) = failure {
                return Err(failure);
            }
            if self.device.needs_reset() {
                return Err(Failure::NeedsReset("vsock"));
            }
        }
    }

    /// Takes what has come and says what there is to say. Returns whether there was anything.
    fn step(&mut self) -> Result<bool, Failure> {
        let mut busy = false;
        while let Some(used) = self.send.poll()? {
            expect("used_len", u64::from(used.len), 0)?;
            self.send_free[usize::from(self.send_index[usize::from(used.head)])] = true;
            self.send.release(used.head);
            busy = true;
        }
        while let Some(used) = self.event.poll()? {
            expect("event_len", u64::from(used.len), 4)?;
            let at = 4 * usize::from(self.event_index[usize::from(used.head)]);
            let what: u32 = self.event_memory.read(at);
            expect("event", u64::from(what), 0)?;
            self.event_memory.write(at, u32::MAX);
            self.transport_resets += 1;
            for index in 0..CONNECTIONS_MAX {
                if self.connections[index].state != State::Free {
                    self.end(index, End::Cut);
                }
            }
            self.event.offer(used.head);
            self.event.kick();
            say!("vsock.transport_reset count={}", self.transport_resets);
            busy = true;
        }
        let mut received = false;
        while let Some(used) = self.receive.poll()? {
            self.hear(used)?;
            self.receive.offer(used.head);
            received = true;
        }
        if received {
            self.receive.kick();
        }
        while self.reset_count > 0 && self.has_slot() {
            self.reset_count -= 1;
            let (local, peer) = self.resets[self.reset_count];
            self.put(self.header(local, peer, op::RST, 0, 0), None)?;
            busy = true;
        }
        for index in 0..CONNECTIONS_MAX {
            busy |= self.speak(index)?;
        }
        self.send.kick();
        Ok(busy | received)
    }

    fn hear(&mut self, used: Used) -> Result<(), Failure> {
        let index = usize::from(self.receive_index[usize::from(used.head)]);
        let buffer = self.receive_buffer(index);
        let header = Header::read(buffer.part(0, HEADER));
        let payload = (used.len as usize).checked_sub(HEADER);
        let payload = payload.ok_or(Failure::Wrong {
            what: "packet_len",
            got: u64::from(used.len),
            expected: HEADER as u64,
        })?;
        expect("packet_payload", payload as u64, u64::from(header.len))?;
        expect("src_cid", header.src_cid, HOST)?;
        expect("dst_cid", header.dst_cid, self.cid)?;
        expect("socket_type", u64::from(header.kind), u64::from(STREAM))?;
        let ports = (header.dst_port, header.src_port);
        let mut all = self.connections.iter();
        let known = all.position(|c| c.state != State::Free && (c.local, c.peer) == ports);
        let Some(at) = known else {
            return self.hear_stranger(&header);
        };
        self.connections[at].room = header.buf_alloc;
        self.connections[at].peer_passed = header.fwd_cnt;
        self.connections[at].asked_room = false;
        let state = self.connections[at].state;
        match header.op {
            op::RST if state == State::Asked => self.end(at, End::Refused),
            op::RST => {
                let is_whole = self.is_whole(at);
                self.end(at, if is_whole { End::Whole } else { End::Cut });
            }
            op::RESPONSE if state == State::Asked => self.connections[at].state = State::Open,
            op::RW if state == State::Open => self.take(at, buffer.part(64, payload))?,
            op::SHUTDOWN if state == State::Open => {
                self.connections[at].peer_ended |= header.flags & SHUTDOWN_SEND != 0;
                if header.flags & (SHUTDOWN_SEND | SHUTDOWN_RECEIVE)
                    == SHUTDOWN_SEND | SHUTDOWN_RECEIVE
                {
                    // Nobody is there any more.
                    let is_whole = self.is_whole(at);
                    self.reset(ports);
                    self.end(at, if is_whole { End::Whole } else { End::Cut });
                }
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.connections[at].tells = true,
            other => {
                return Err(Failure::Wrong {
                    what: "op",
                    got: u64::from(other),
                    expected: 0,
                });
            }
        }
        Ok(())
    }

    fn hear_stranger(&mut self, header: &Header) -> Result<(), Failure> {
        let ports = (header.dst_port, header.src_port);
        let wanted = header.op == op::REQUEST && self.listens == Some(header.dst_port);
        match self.free_connection().filter(|_| wanted) {
            Some(index) => {
                self.begin(index, State::Open, Task::Echo, ports.0, ports.1);
                self.connections[index].room = header.buf_alloc;
                self.connections[index].peer_passed = header.fwd_cnt;
                self.accepted += 1;
                if self.has_slot() {
                    return self.say(index, op::RESPONSE, 0);
                }
                // It asks again.
                self.connections[index].state = State::Free;
                self.reset(ports);
            }
            None if header.op != op::RST => self.reset(ports),
            None => {}
        }
        Ok(())
    }

    fn reset(&mut self, ports: (u32, u32)) {
        if self.reset_count < RESETS_MAX {
            self.resets[self.reset_count] = ports;
            self.reset_count += 1;
        }
    }

    /// Whether everything was said and received.
    fn is_whole(&self, index: usize) -> bool {
        let c = &self.connections[index];
        match c.task {
            Task::Echo => c.peer_ended && c.sent == c.received,
            Task::Ask { bytes, .. } => c.received == bytes && c.wrong == 0,
        }
    }

    fn take(&mut self, index: usize, payload: Dma) -> Result<(), Failure> {
        let c = &mut self.connections[index];
        let len = payload.all().len() as u64;
        let under_way = c.received + len - c.passed;
        if under_way > KEPT_BYTES as u64 {
            return Err(Failure::Wrong {
                what: "credit",
                got: under_way,
                expected: KEPT_BYTES as u64,
            });
        }
        match c.task {
            Task::Echo => {
                for (byte, place) in payload.all().iter().zip(c.received..) {
                    let at = (place % KEPT_BYTES as u64) as usize;
                    c.kept.all_mut()[at] = *byte;
                }
            }
            Task::Ask { bytes, seed } => {
                let wrong = (payload.all().iter().zip(c.received..))
                    .find(|(byte, place)| **byte != pattern::stream_byte(seed, *place));
                if wrong.is_some() || c.received + len > bytes {
                    c.wrong += 1;
                    let place = wrong.map_or(bytes, |(_, place)| place);
                    return Err(Failure::Wrong {
                        what: "data_at",
                        got: place,
                        expected: bytes,
                    });
                }
                c.passed += len;
            }
        }
        c.received += len;
        self.bytes += len;
        Ok(())
    }

    /// Says what a connection has to say. Returns whether that was anything.
    fn speak(&mut self, index: usize) -> Result<bool, Failure> {
        let mut said = false;
        while self.connections[index].state == State::Open {
            let c = &self.connections[index];
            let under_way = (c.sent as u32).wrapping_sub(c.peer_passed);
            let room = c.room.saturating_sub(under_way);
            let left = match c.task {
                Task::Echo => c.received - c.sent,
                Task::Ask { bytes, .. } => bytes - c.sent,
            };
            let slot = self.send_free.iter().position(|free| *free);
            let Some(slot) = slot else {
                return Ok(said);
            };
            let n = left.min(u64::from(room)).min(SEND_BYTES as u64) as usize;
            if n > 0 {
                self.send_payload(index, slot, n)?;
            } else if left > 0 {
                if c.asked_room {
                    return Ok(said);
                }
                self.connections[index].asked_room = true;
                self.say(index, op::CREDIT_REQUEST, 0)?;
            } else if !c.ended && (c.peer_ended || matches!(c.task, Task::Ask { .. })) {
                self.connections[index].ended = true;
                self.say(index, op::SHUTDOWN, SHUTDOWN_SEND)?;
            } else if c.ended && c.peer_ended && matches!(c.task, Task::Ask { .. }) {
                // Both have said all. Who was asked waits for the end of who asked, since that shows
                // that everything has arrived.
                let both = SHUTDOWN_SEND | SHUTDOWN_RECEIVE;
                self.say(index, op::SHUTDOWN, both)?;
                self.end(index, End::Whole);
            } else if c.tells || (c.passed - c.told) as u32 >= UNTOLD_MAX {
                self.say(index, op::CREDIT_UPDATE, 0)?;
            } else {
                return Ok(said);
            }
            said = true;
        }
        Ok(said)
    }

    fn send_payload(&mut self, index: usize, slot: usize, n: usize) -> Result<(), Failure> {
        let mut to = self.send_buffer(slot).part(64, n);
        let c = &mut self.connections[index];
        match c.task {
            Task::Echo => {
                for (byte, place) in to.all_mut().iter_mut().zip(c.sent..) {
                    *byte = c.kept.all()[(place % KEPT_BYTES as u64) as usize];
                }
                c.passed += n as u64;
            }
            Task::Ask { seed, .. } => {
                for (byte, place) in to.all_mut().iter_mut().zip(c.sent..) {
                    *byte = pattern::stream_byte(seed, place);
                }
            }
        }
        c.sent += n as u64;
        c.told = c.passed;
        c.tells = false;
        let (local, peer, passed) = (c.local, c.peer, c.passed);
        let header = Header {
            len: n as u32,
            ..self.header(local, peer, op::RW, 0, passed)
        };
        self.put(header, Some(slot))
    }

    /// How long a mode waits for something to happen.
    pub fn patience(&self) -> Deadline {
        Deadline::after_ms(self.timeout_ms)
    }
}
