//! The switch: ports, their turns, and the way of a frame.
//!
//! Each port that has something has a turn after the other, and in it so many bytes: what a frame
//! costs is what was delivered of it, so a port that has each frame sent to everybody has fewer turns'
//! worth. A receiver whose queue is full loses the frame and holds nobody up.

use crate::bindings::Bindings;
use crate::bucket::Bucket;
use crate::capture::{Capture, Direction};
use crate::gateway::{Handled, Services};
use crate::guard::{Origin, home};
use crate::leases::{Lease, Leases};
use crate::offload::PacketHeader;
use crate::settings::{NetworkSettings, PortSettings, Role, SettingsError, Vlan};
use crate::table::Table;
use crate::wire::{ETHERNET_BYTES, Ethernet, Mac, TAG_BYTES, TYPE_SERVICE_VLAN, TYPE_VLAN, u16_at};
use crate::{Cause, Counters, Rate};
use bulkhead_ipc::port::{PACKET_BYTES_MAX, PACKET_HEADER_BYTES};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Names a port for as long as it is attached.
pub type PortId = u16;
/// Ports of one network.
pub const PORTS_MAX: usize = 256;
/// Frames that a port may send in one turn.
pub const FRAMES_PER_TURN: usize = 64;
/// Bytes that a port may have delivered in one turn.
pub(crate) const BYTES_PER_TURN: i64 = 128 * 1024;
/// What a frame costs besides its bytes.
const FRAME_COST: i64 = 256;
/// Questions to the gateway.
const SERVICE: Rate = Rate {
    per_s: 500,
    burst: 500,
};
/// Bytes of the two addresses in front of a frame.
const ADDRESSES_BYTES: usize = 12;

/// Whether a packet was taken by a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It was.
    Yes,
    /// The port's queue is full.
    NoRoom,
}

/// How packets come and go: rings, a TAP device, a socket. Nothing of it waits.
pub trait Ports {
    /// Takes the next packet of `port` and copies it into `to`: a `virtio_net_hdr` of
    /// [`PACKET_HEADER_BYTES`] bytes, and a frame. Returns its length.
    fn receive(&mut self, port: PortId, to: &mut [u8]) -> Option<usize>;

    /// Puts a packet into the queue of `port`: its header, and its frame in parts.
    fn send(&mut self, port: PortId, header: [u8; PACKET_HEADER_BYTES], frame: &[&[u8]]) -> Sent;
}

/// What a pass over the ports has done.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Passed {
    /// Frames that were taken.
    pub frames: usize,
    /// What they have cost, in bytes: as many as were delivered, and a little for each of them.
    pub cost: i64,
    /// Ports that have nothing any more.
    pub idle: Vec<PortId>,
    /// Ports that have sent as much as they may, and for how long they rest.
    pub resting: Vec<(PortId, Duration)>,
}

/// What a port is at.
#[derive(Debug)]
struct State {
    counters: Counters,
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
    storm: Bucket,
    service: Bucket,
    /// Bytes that it may still have delivered in its turn.
    credit: i64,
}

impl State {
    fn new(settings: &PortSettings, counters: Counters, now: Instant) -> Self {
        let limits = &settings.limits;
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self {
            counters,
            bytes: bucket(limits.bytes),
            frames: bucket(limits.frames),
            storm: Bucket::new(limits.storm, now),
            service: Bucket::new(SERVICE, now),
            credit: 0,
        }
    }

    /// How long the port is not to send.
    fn rest(&mut self, now: Instant) -> Option<Duration> {
        let bytes = self.bytes.as_mut().and_then(|bucket| bucket.wait(now));
        let frames = self.frames.as_mut().and_then(|bucket| bucket.wait(now));
        bytes.max(frames)
    }

    fn took(&mut self, bytes: usize) {
        if let Some(bucket) = &mut self.bytes {
            bucket.take(bytes as u64);
        }
        if let Some(bucket) = &mut self.frames {
            bucket.take(1);
        }
        self.counters.frames_in += 1;
        self.counters.bytes_in += bytes as u64;
    }
}

/// A frame that was judged and has lost its tag.
struct Judged {
    header: PacketHeader,
    vlan: u16,
    ethernet: Ethernet,
    /// Where in the record it begins.
    start: usize,
}

/// The switch of one network.
#[derive(Debug)]
pub struct Switch {
    network: NetworkSettings,
    settings: BTreeMap<PortId, PortSettings>,
    states: BTreeMap<PortId, State>,
    table: Table,
    bindings: Bindings,
    leases: Leases,
    capture: Option<Capture>,
    record: Vec<u8>,
    segment: Vec<u8>,
    first: usize,
}

impl Switch {
    /// A switch without ports.
    ///
    /// # Errors
    /// [`SettingsError`] when the settings contradict themselves.
    pub fn new(network: NetworkSettings) -> Result<Self, SettingsError> {
        network.check()?;
        Ok(Self {
            network,
            settings: BTreeMap::new(),
            states: BTreeMap::new(),
            table: Table::default(),
            bindings: Bindings::default(),
            leases: Leases::default(),
            capture: None,
            record: vec![0; PACKET_BYTES_MAX],
            segment: Vec::new(),
            first: 0,
        })
    }

    /// Adds a port, or gives the one of this name other settings; its counters go on.
    ///
    /// # Errors
    /// [`SettingsError`] when they contradict themselves or another port's; nothing has changed.
    pub fn set_port(
        &mut self,
        port: PortId,
        settings: PortSettings,
        now: Instant,
    ) -> Result<(), SettingsError> {
        settings.check()?;
        self.check_against_others(port, &settings)?;
        let before = self.states.get(&port);
        let counters = before.map(|state| state.counters).unwrap_or_default();
        self.detach(port);
        let vlan = home(&settings.vlan);
        if is_held_to_its_address(&settings) && matches!(settings.vlan, Vlan::Access(_)) {
            self.table.fix(vlan, settings.mac, port, now);
        }
        if settings.role == Role::Machine {
            for address in &settings.addresses {
                self.bindings.fix(vlan, *address, port, now);
            }
            let leased = self.leases.current(settings.mac, now);
            if let Some(address) = leased.filter(|_| vlan == 0) {
                self.bindings.fix(vlan, address.into(), port, now);
            }
        }
        self.states
            .insert(port, State::new(&settings, counters, now));
        self.settings.insert(port, settings);
        Ok(())
    }

    /// Takes a port away with everything that is known of it but its lease.
    pub fn detach(&mut self, port: PortId) {
        self.settings.remove(&port);
        self.states.remove(&port);
        self.table.forget(port);
        self.bindings.forget(port);
    }

    /// Leases that the switch before this one had given. Before the first port is set.
    pub fn restore_leases(&mut self, leases: &[Lease], now: Instant) {
        if let Some(subnet) = &self.network.subnet {
            self.leases.restore(subnet, leases, now);
        }
    }

    /// What is leased.
    #[must_use]
    pub fn leases(&self, now: Instant) -> Vec<Lease> {
        self.leases.list(now)
    }

    /// Leases that a successor has to know of and nobody was told of yet.
    pub fn take_lease_news(&mut self, now: Instant) -> Vec<Lease> {
        self.leases.take_news(now)
    }

    /// The ports with their counters.
    pub fn counters(&self) -> impl Iterator<Item = (PortId, &Counters)> {
        self.states.iter().map(|(id, state)| (*id, &state.counters))
    }

    /// Begins a capture in the place of one that may be going on, which is returned.
    pub fn set_capture(&mut self, capture: Option<Capture>) -> Option<Capture> {
        std::mem::replace(&mut self.capture, capture)
    }

    /// The capture that goes on.
    pub fn capture(&mut self) -> Option<&mut Capture> {
        self.capture.as_mut()
    }

    /// Gives each of `active` a turn.
    pub fn pass(&mut self, active: &[PortId], ports: &mut impl Ports, now: Instant) -> Passed {
        let mut passed = Passed::default();
        // Who begins is another one each time, so that nobody always comes behind a flood.
        self.first = self.first.wrapping_add(1);
        let start = self.first.checked_rem(active.len()).unwrap_or(0);
        let (before, behind) = active.split_at(start.min(active.len()));
        for &port in behind.iter().chain(before) {
            self.turn(port, ports, now, &mut passed);
        }
        passed
    }

    fn turn(&mut self, port: PortId, ports: &mut impl Ports, now: Instant, passed: &mut Passed) {
        match self.states.get_mut(&port) {
            Some(state) => state.credit = (state.credit + BYTES_PER_TURN).min(BYTES_PER_TURN),
            None => {
                passed.idle.push(port);
                return;
            }
        }
        let mut record = std::mem::take(&mut self.record);
        record.resize(PACKET_BYTES_MAX, 0);
        for _ in 0..FRAMES_PER_TURN {
            let Some(state) = self.states.get_mut(&port).filter(|s| s.credit > 0) else {
                break;
            };
            if let Some(rest) = state.rest(now) {
                passed.resting.push((port, rest));
                break;
            }
            let Some(len) = ports.receive(port, &mut record) else {
                state.credit = 0;
                passed.idle.push(port);
                break;
            };
            passed.frames += 1;
            state.took(len.saturating_sub(PACKET_HEADER_BYTES));
            let packet = record.get_mut(..len).unwrap_or_default();
            let cost = self.forward(port, packet, ports, now);
            passed.cost = passed.cost.saturating_add(cost);
            if let Some(state) = self.states.get_mut(&port) {
                state.credit -= cost;
            }
        }
        self.record = record;
    }

    /// Sends a record on. Returns what it has cost.
    fn forward(
        &mut self,
        from: PortId,
        record: &mut [u8],
        ports: &mut impl Ports,
        now: Instant,
    ) -> i64 {
        let received = i64::try_from(record.len()).unwrap_or(0) + FRAME_COST;
        match self.route(from, record, ports, now) {
            Ok(delivered) => delivered.max(received),
            Err(cause) => {
                if let Some(state) = self.states.get_mut(&from) {
                    state.counters.drop(cause);
                }
                received
            }
        }
    }

    fn route(
        &mut self,
        from: PortId,
        record: &mut [u8],
        ports: &mut impl Ports,
        now: Instant,
    ) -> Result<i64, Cause> {
        if let (Some(capture), Some(settings)) = (&mut self.capture, self.settings.get(&from)) {
            let frame = record.get(PACKET_HEADER_BYTES..).unwrap_or_default();
            capture.keep(from, &settings.name, Direction::In, &[frame], now);
        }
        let judged = self.judge(from, record, now)?;
        let frame = record.get_mut(judged.start..).unwrap_or_default();
        if judged.vlan == 0 {
            match self.serve(from, &judged, frame, now) {
                Handled::Passed => {}
                Handled::Silent => return Ok(0),
                Handled::Unserved => return Err(Cause::Unserved),
                Handled::Answered(mut answer) => {
                    let state = self.states.get_mut(&from);
                    if !state.is_some_and(|state| state.service.take_one(now)) {
                        return Err(Cause::Unserved);
                    }
                    let header = PacketHeader::default();
                    return Ok(self.deliver(&[from], 0, header, &mut answer, ports, now));
                }
            }
        }
        let targets = self.targets(from, &judged, now)?;
        Ok(self.deliver(&targets, judged.vlan, judged.header, frame, ports, now))
    }

    /// Looks at everything that a frame claims, takes its tag away, and learns where its sender is.
    fn judge(&mut self, from: PortId, record: &mut [u8], now: Instant) -> Result<Judged, Cause> {
        let settings = self.settings.get(&from).ok_or(Cause::Malformed)?;
        let mut header = PacketHeader::read(record).ok_or(Cause::Malformed)?;
        let mut start = PACKET_HEADER_BYTES;
        let mut vlan = home(&settings.vlan);
        let frame = record.get_mut(start..).unwrap_or_default();
        if u16_at(frame, ADDRESSES_BYTES) == Some(TYPE_VLAN) {
            let tag = u16_at(frame, ETHERNET_BYTES).ok_or(Cause::Malformed)? & 0x0fff;
            if tag != 0 {
                // With a priority alone it belongs where an untagged one does.
                vlan = tag;
                if settings.vlan.carries(tag) != Some(true) {
                    return Err(Cause::Vlan);
                }
            }
            frame.copy_within(..ADDRESSES_BYTES, TAG_BYTES);
            start += TAG_BYTES;
            header = header.moved_back(4);
        }
        let frame = record.get(start..).unwrap_or_default();
        let ethernet = Ethernet::read(frame).ok_or(Cause::Malformed)?;
        if matches!(ethernet.kind, TYPE_VLAN | TYPE_SERVICE_VLAN) {
            return Err(Cause::Vlan);
        }
        if ethernet.dst.is_link_control() {
            return Err(Cause::Control);
        }
        let origin = Origin {
            port: from,
            settings,
            vlan,
            subnet: self.network.subnet.as_ref(),
            now,
        };
        origin.judge(ethernet, frame, &mut self.bindings)?;
        let header = header.check(frame)?;
        if header.frame_bytes(frame) > ETHERNET_BYTES + usize::from(self.network.mtu) {
            return Err(Cause::TooLong);
        }
        let is_uplink = settings.role == Role::Uplink;
        let learned = self.table.learn(vlan, ethernet.src, from, is_uplink, now);
        if !learned {
            return Err(Cause::Mac);
        }
        Ok(Judged {
            header,
            vlan,
            ethernet,
            start,
        })
    }

    fn serve(&mut self, from: PortId, judged: &Judged, frame: &[u8], now: Instant) -> Handled {
        let Some(settings) = self.settings.get(&from) else {
            return Handled::Passed;
        };
        let origin = Origin {
            port: from,
            settings,
            vlan: judged.vlan,
            subnet: self.network.subnet.as_ref(),
            now,
        };
        let mut services = Services {
            settings: &self.network,
            ports: &self.settings,
            leases: &mut self.leases,
            bindings: &mut self.bindings,
            unchecked: judged.header.needs_checksum(),
        };
        services.handle(&origin, judged.ethernet, frame)
    }

    fn targets(
        &mut self,
        from: PortId,
        judged: &Judged,
        now: Instant,
    ) -> Result<Vec<PortId>, Cause> {
        let source = self.settings.get(&from).ok_or(Cause::Malformed)?;
        let dst = judged.ethernet.dst;
        let reaches = |port: &PortSettings| {
            port.vlan.carries(judged.vlan).is_some() && port.may_talk_to(source)
        };
        if let Some(target) = self
            .table
            .find(judged.vlan, dst, now)
            .filter(|_| !dst.is_group())
        {
            if target == from {
                return Ok(Vec::new());
            }
            let settings = self.settings.get(&target);
            return match settings.is_some_and(reaches) {
                true => Ok(vec![target]),
                false => Err(Cause::Isolated),
            };
        }
        let may = source.role == Role::Uplink
            || self
                .states
                .get_mut(&from)
                .is_some_and(|state| state.storm.take_one(now));
        if !may {
            return Err(Cause::Storm);
        }
        // Whoever is held to its address has no other, so an unknown one is not there.
        let others = self.settings.iter().filter(|(id, port)| {
            **id != from && reaches(port) && (dst.is_group() || !is_held_to_its_address(port))
        });
        Ok(others.map(|(id, _)| *id).collect())
    }

    /// Puts a frame into the queues of `targets`. Returns what that has cost.
    fn deliver(
        &mut self,
        targets: &[PortId],
        vlan: u16,
        header: PacketHeader,
        frame: &mut [u8],
        ports: &mut impl Ports,
        now: Instant,
    ) -> i64 {
        let mut header = header;
        let offload = |settings: &BTreeMap<PortId, PortSettings>, target: &PortId| {
            settings
                .get(target)
                .is_none_or(|port| header.fits(port.offload))
        };
        let all_fit = targets.iter().all(|t| offload(&self.settings, t));
        if !all_fit && !header.needs_segments() {
            header = header.make_checksum(frame);
        }
        let mut cost = 0;
        for target in targets {
            let (Some(settings), Some(state)) =
                (self.settings.get(target), self.states.get_mut(target))
            else {
                continue;
            };
            let Some(tagged) = settings.vlan.carries(vlan) else {
                continue;
            };
            let mut outlet = Outlet {
                port: *target,
                name: &settings.name,
                tag: tagged.then_some(vlan),
                counters: &mut state.counters,
                capture: self.capture.as_mut(),
                now,
            };
            if header.fits(settings.offload) {
                cost += outlet.send(header, frame, ports);
            } else {
                header.cut(frame, &mut self.segment, |segment| {
                    cost += outlet.send(PacketHeader::default(), segment, ports);
                });
            }
        }
        cost
    }

    fn check_against_others(
        &self,
        port: PortId,
        settings: &PortSettings,
    ) -> Result<(), SettingsError> {
        let refuse = |field, expected| Err(SettingsError { field, expected });
        if !self.settings.contains_key(&port) && self.settings.len() >= PORTS_MAX {
            return refuse("port", "at most 256 of a network");
        }
        let subnet = self.network.subnet.as_ref();
        let has_gateways = |address: &IpAddr| subnet.is_some_and(|s| *address == s.gateway);
        if settings.addresses.iter().any(has_gateways) {
            return refuse("addresses", "others than the gateway's");
        }
        if subnet.is_some_and(|s| s.mac == settings.mac) {
            return refuse("mac", "another than the gateway's");
        }
        if settings.role == Role::Uplink {
            return Ok(());
        }
        let others = self.settings.iter().filter(|(id, other)| {
            **id != port && other.role == Role::Machine && home(&other.vlan) == home(&settings.vlan)
        });
        for (_, other) in others {
            if other.mac == settings.mac {
                return refuse("mac", "one that no other port has");
            }
            if settings
                .addresses
                .iter()
                .any(|a| other.addresses.contains(a))
            {
                return refuse("addresses", "ones that no other port has");
            }
        }
        Ok(())
    }
}

fn is_held_to_its_address(port: &PortSettings) -> bool {
    port.role == Role::Machine && port.guard.mac
}

/// Where frames of one port leave.
struct Outlet<'a> {
    port: PortId,
    name: &'a str,
    tag: Option<u16>,
    counters: &'a mut Counters,
    capture: Option<&'a mut Capture>,
    now: Instant,
}

impl Outlet<'_> {
    fn send(&mut self, header: PacketHeader, frame: &[u8], ports: &mut impl Ports) -> i64 {
        let (addresses, rest) = frame.split_at(frame.len().min(ADDRESSES_BYTES));
        let [t0, t1] = TYPE_VLAN.to_be_bytes();
        let [v0, v1] = self.tag.unwrap_or(0).to_be_bytes();
        let tag = [t0, t1, v0, v1];
        let (header, tag) = match self.tag {
            Some(_) => (header.moved(4), &tag[..]),
            None => (header, &[][..]),
        };
        let parts = [addresses, tag, rest];
        let len = frame.len() + tag.len();
        match ports.send(self.port, header.bytes(), &parts) {
            Sent::Yes => {
                self.counters.frames_out += 1;
                self.counters.bytes_out += len as u64;
                if let Some(capture) = &mut self.capture {
                    capture.keep(self.port, self.name, Direction::Out, &parts, self.now);
                }
            }
            Sent::NoRoom => self.counters.drop(Cause::NoRoom),
        }
        i64::try_from(len).unwrap_or(0) + FRAME_COST
    }
}

/// The Ethernet address that a machine's card gets when it is told none: made of the name of its network
/// and of its own, so it is the same each time.
#[must_use]
pub fn mac_of(network: &str, machine: &str, card: u16) -> Mac {
    let text = network.bytes().chain([0]).chain(machine.bytes());
    let text = text.chain([0]).chain(card.to_be_bytes());
    let hash = text.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [_, _, _, a, b, c, d, e] = hash.to_be_bytes();
    // Locally administered, of one card.
    Mac([0x52, a, b, c, d, e])
}

#[cfg(test)]
mod tests;
