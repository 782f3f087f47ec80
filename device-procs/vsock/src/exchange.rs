//! All connections of one guest.

use crate::greeting::{self, GREETING_BYTES_MAX};
use crate::link::{Fate, Link, Ports, Stream};
use crate::packet::{HOST_CID, Header, Op, PAYLOAD_BYTES_MAX, PORT_ANY, TYPE_STREAM};
use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::time::{Duration, Instant};

/// Connections at most, with clients that have not said yet what they want.
pub const CONNECTIONS_MAX: usize = 1023;
/// How long a client has for its greeting.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(10);
/// Resets that wait for the guest to take them. A guest that provokes more without taking any is
/// not answered.
const RESETS_MAX: usize = 1024;
/// First port of the host's side of connections that clients ask for, as with Firecracker.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Ports on the host's side that the processes of one device begin with in turn.
const PORTS_PER_BLOCK: u32 = 1 << 20;
const PORT_BLOCKS: u32 = (u32::MAX - FIRST_HOST_PORT) / PORTS_PER_BLOCK;

/// A name of a connection for the caller, never used again.
pub type LinkId = u64;

/// The guest asks for a connection to a listener of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dial {
    /// Which connection it is for.
    pub id: LinkId,
    /// The port on the host's side.
    pub port: u32,
}

#[derive(Debug)]
struct Greeter<S> {
    stream: S,
    said: Vec<u8>,
    deadline: Instant,
}

/// The connections, and what there is to say to the guest.
#[derive(Debug)]
pub struct Exchange<S> {
    guest_cid: u64,
    links: BTreeMap<LinkId, Link<S>>,
    /// The links that the guest knows, or is to be told of.
    by_ports: BTreeMap<Ports, LinkId>,
    greeters: BTreeMap<LinkId, Greeter<S>>,
    /// Links that may have something to say, in turn.
    ready: VecDeque<LinkId>,
    resets: VecDeque<Ports>,
    dials: VecDeque<Dial>,
    next_id: LinkId,
    next_port: u32,
}

impl<S: Stream> Exchange<S> {
    /// An exchange without connections for the guest with context id `guest_cid`.
    #[must_use]
    pub const fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            links: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            greeters: BTreeMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            dials: VecDeque::new(),
            next_id: 0,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// As [`Exchange::new`], for a process of generation `generation`: its ports on the host's side are
    /// not those of the processes before it, of whose connections a guest may still know.
    #[must_use]
    pub const fn of_generation(guest_cid: u64, generation: u32) -> Self {
        let mut exchange = Self::new(guest_cid);
        exchange.next_port = FIRST_HOST_PORT + (generation % PORT_BLOCKS) * PORTS_PER_BLOCK;
        exchange
    }

    /// Number of connections, with clients that have not said yet what they want.
    #[must_use]
    pub fn len(&self) -> usize {
        self.links.len() + self.greeters.len()
    }

    /// Whether there is no connection.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The socket of a connection, while there is one.
    #[must_use]
    pub fn stream(&self, id: LinkId) -> Option<&S> {
        let greeter = self.greeters.get(&id).map(|greeter| &greeter.stream);
        greeter.or_else(|| self.links.get(&id)?.stream())
    }

    /// A client has connected. `None` when there are too many; it is then let go.
    pub fn accept(&mut self, stream: S, now: Instant) -> Option<LinkId> {
        if self.len() >= CONNECTIONS_MAX {
            return None;
        }
        let id = self.new_id();
        let greeter = Greeter {
            stream,
            said: Vec::with_capacity(GREETING_BYTES_MAX),
            deadline: now + GREETING_TIMEOUT,
        };
        self.greeters.insert(id, greeter);
        self.listen_to_greeter(id, now);
        Some(id)
    }

    /// There is news on the socket of a connection; `hung_up` is whether both of its directions
    /// have ended. A connection that is no more has none.
    pub fn wake(&mut self, id: LinkId, hung_up: bool, now: Instant) {
        self.listen_to_greeter(id, now);
        if let Some(link) = self.links.get_mut(&id) {
            let fate = link.wake(hung_up, now);
            self.meet(id, fate);
        }
    }

    fn listen_to_greeter(&mut self, id: LinkId, now: Instant) {
        let Some(greeter) = self.greeters.get_mut(&id) else {
            return;
        };
        let mut bytes = [0; GREETING_BYTES_MAX];
        let found = loop {
            let rest = GREETING_BYTES_MAX.saturating_sub(greeter.said.len());
            match greeter
                .stream
                .read(bytes.get_mut(..rest).unwrap_or_default())
            {
                Ok(n) if n > 0 => greeter.said.extend(bytes.iter().take(n.min(rest))),
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Ok(_) | Err(_) => break None,
            }
            match greeting::parse(&greeter.said) {
                Ok(None) => {}
                Ok(Some(found)) => break Some(found),
                Err(_) => break None,
            }
        };
        let Some(Greeter { stream, said, .. }) = self.greeters.remove(&id) else {
            return;
        };
        // A client that says something else is let go, which is all that the convention has for it.
        if let Some(found) = found {
            let early = said.get(found.bytes..).unwrap_or_default();
            let ports = Ports {
                host: self.new_host_port(),
                guest: found.port,
            };
            self.add(id, Link::asked(ports, stream, early, now));
        }
    }

    fn add(&mut self, id: LinkId, link: Link<S>) {
        self.by_ports.insert(link.ports, id);
        self.links.insert(id, link);
        self.meet(id, Fate::Lives);
    }

    const fn new_id(&mut self) -> LinkId {
        self.next_id += 1;
        self.next_id
    }

    /// A port that no connection has on the host's side.
    fn new_host_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = match port + 1 {
                PORT_ANY => FIRST_HOST_PORT,
                next => next,
            };
            // There are far more ports than connections.
            if self.links.values().all(|link| link.ports.host != port) {
                return port;
            }
        }
    }

    /// A packet of the guest: its header, and as many bytes behind it as its buffers held. What is
    /// not from this guest to the host is ignored, and so is a packet that is shorter than it says.
    pub fn hear(&mut self, header: &Header, behind: &[u8], now: Instant) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let payload = usize::try_from(header.len)
            .ok()
            .filter(|&len| len <= PAYLOAD_BYTES_MAX)
            .and_then(|len| behind.get(..len));
        let op = Op::from_number(header.op).filter(|_| header.kind == TYPE_STREAM);
        let id = self.by_ports.get(&ports).copied();
        match (op, payload, id) {
            (Some(Op::Reset), _, None) => {}
            (Some(Op::Reset), _, Some(id)) => self.meet(id, Fate::Gone),
            (Some(Op::Request), Some(_), None) => self.dial(ports, header, now),
            (None | Some(Op::Request), _, Some(id)) | (_, None, Some(id)) => {
                self.meet(id, Fate::Reset);
            }
            (_, _, None) => self.reset(ports),
            (Some(op), Some(payload), Some(id)) => {
                let Some(link) = self.links.get_mut(&id) else {
                    return;
                };
                link.hear_room(header.buf_alloc, header.fwd_cnt);
                let greeting = greeting::accepted(ports.host);
                let fate = link.hear(op, header.flags, payload, &greeting, now);
                self.meet(id, fate);
            }
        }
    }

    fn dial(&mut self, ports: Ports, header: &Header, now: Instant) {
        if self.len() >= CONNECTIONS_MAX || ports.host == PORT_ANY {
            return self.reset(ports);
        }
        let id = self.new_id();
        let mut link = Link::dialling(ports, now);
        link.hear_room(header.buf_alloc, header.fwd_cnt);
        self.add(id, link);
        self.dials.push_back(Dial {
            id,
            port: ports.host,
        });
    }

    /// The next connection to a listener of the host that the guest wants.
    pub fn next_dial(&mut self) -> Option<Dial> {
        loop {
            let dial = self.dials.pop_front()?;
            if self.links.contains_key(&dial.id) {
                return Some(dial);
            }
        }
    }

    /// Whether [`Exchange::next_dial`] may have one.
    #[must_use]
    pub fn wants_to_dial(&self) -> bool {
        !self.dials.is_empty()
    }

    /// What became of a [`Dial`]: `None` when nobody listens. A connection that the guest has given up
    /// meanwhile is let go. Returns whether there is a connection now.
    pub fn dialled(&mut self, id: LinkId, stream: Option<S>) -> bool {
        let Some(link) = self.links.get_mut(&id).filter(|link| link.is_dialling()) else {
            return false;
        };
        let reached = stream.is_some();
        let fate = match stream {
            Some(stream) => {
                link.reached(stream);
                Fate::Lives
            }
            None => Fate::Reset,
        };
        self.meet(id, fate);
        reached
    }

    fn meet(&mut self, id: LinkId, fate: Fate) {
        let Some(link) = self.links.get_mut(&id) else {
            return;
        };
        let ports = link.ports;
        let is_known = self.by_ports.get(&ports) == Some(&id);
        if fate == Fate::Lives {
            if !link.queued && link.has_news() {
                link.queued = true;
                self.ready.push_back(id);
            }
            return;
        }
        if is_known {
            self.by_ports.remove(&ports);
            if fate != Fate::Gone {
                self.reset(ports);
            }
        }
        if fate != Fate::Drains {
            self.links.remove(&id);
            self.dials.retain(|dial| dial.id != id);
        }
    }

    fn reset(&mut self, ports: Ports) {
        if self.resets.len() < RESETS_MAX {
            self.resets.push_back(ports);
        }
    }

    /// The next packet for the guest, which has room for `to` behind the header; its payload is put
    /// there, and the header says how many bytes. Connections take turns.
    pub fn say(&mut self, to: &mut [u8], now: Instant) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(self.header(ports, Op::Reset));
        }
        // Each once: one that has payload, but no room for it here, stays in the line.
        for _ in 0..self.ready.len() {
            let id = self.ready.pop_front()?;
            let Some(link) = self.links.get_mut(&id) else {
                continue;
            };
            link.queued = false;
            let said = link.say(to, now);
            let ports = link.ports;
            let room = said.map(|_| link.tell_room());
            self.meet(id, Fate::Lives);
            if let (Some(said), Some((buf_alloc, fwd_cnt))) = (said, room) {
                return Some(Header {
                    len: u32::try_from(said.len).unwrap_or(u32::MAX),
                    flags: said.flags,
                    buf_alloc,
                    fwd_cnt,
                    ..self.header(ports, said.op)
                });
            }
        }
        None
    }

    const fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: op.number(),
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        }
    }

    /// The driver was reset: every connection has ended, and the guest knows of none.
    pub fn forget(&mut self) {
        self.links.clear();
        self.by_ports.clear();
        self.greeters.clear();
        self.ready.clear();
        self.resets.clear();
        self.dials.clear();
    }

    /// When [`Exchange::expire`] has something to do, if ever.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        let links = self.links.values().filter_map(|link| link.deadline);
        let greeters = self.greeters.values().map(|greeter| greeter.deadline);
        links.chain(greeters).min()
    }

    /// Ends what has waited for too long.
    pub fn expire(&mut self, now: Instant) {
        self.greeters.retain(|_, greeter| greeter.deadline > now);
        let late = self.links.iter();
        let late = late.filter(|(_, link)| link.deadline.is_some_and(|deadline| deadline <= now));
        let late: Vec<LinkId> = late.map(|(&id, _)| id).collect();
        for id in late {
            self.meet(id, Fate::Reset);
        }
    }
}

#[cfg(test)]
#[path = "exchange_tests.rs"]
mod tests;
