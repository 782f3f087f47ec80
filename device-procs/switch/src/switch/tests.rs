//! The switch with ports that are queues in memory.

use super::*;
use crate::capture::CaptureSettings;
use crate::dhcp::testing::{ask, told};
use crate::dns::testing::{query, read};
use crate::offload::Offload;
use crate::settings::{Guard, Isolation, Limits, Subnet};
use crate::testing::{arp_frame, gso, mac, tcp_frame, udp_frame};
use crate::wire::{Arp, IPV4_BYTES, Ipv4, PROTOCOL_UDP, TYPE_ARP, UDP_BYTES, put};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use std::collections::VecDeque;
use std::net::{Ipv4Addr, Ipv6Addr};

type Packet = ([u8; PACKET_HEADER_BYTES], Vec<u8>);

const PLAIN: [u8; PACKET_HEADER_BYTES] = [0; PACKET_HEADER_BYTES];
const GATEWAY_MAC: Mac = mac(0xfe);
const GATEWAY: [u8; 4] = [10, 0, 0, 1];
const UPLINK: PortId = 9;

#[derive(Default)]
struct Queues {
    come: BTreeMap<PortId, VecDeque<Packet>>,
    go: BTreeMap<PortId, VecDeque<Packet>>,
    full: Option<PortId>,
}

impl Ports for Queues {
    fn receive(&mut self, port: PortId, to: &mut [u8]) -> Option<usize> {
        let (header, frame) = self.come.get_mut(&port)?.pop_front()?;
        let record = [&header[..], &frame].concat();
        to[..record.len()].copy_from_slice(&record);
        Some(record.len())
    }

    fn send(&mut self, port: PortId, header: [u8; PACKET_HEADER_BYTES], frame: &[&[u8]]) -> Sent {
        if self.full == Some(port) {
            return Sent::NoRoom;
        }
        let queue = self.go.entry(port).or_default();
        queue.push_back((header, frame.concat()));
        Sent::Yes
    }
}

struct Lab {
    switch: Switch,
    queues: Queues,
    now: Instant,
}

fn subnet() -> Subnet {
    Subnet {
        gateway: GATEWAY.into(),
        prefix: 24,
        mac: GATEWAY_MAC,
        pool: (Ipv4Addr::new(10, 0, 0, 100), Ipv4Addr::new(10, 0, 0, 199)),
        router: None,
        lease_s: 3600,
    }
}

/// Machine `n` has the address 10.0.0.(10 + n).
fn machine(n: u8) -> PortSettings {
    PortSettings {
        name: format!("m{n}"),
        role: Role::Machine,
        mac: mac(n),
        addresses: vec![Ipv4Addr::new(10, 0, 0, 10 + n).into()],
        vlan: Vlan::Access(0),
        isolation: Isolation::Open,
        guard: Guard::FULL,
        offload: Offload::ALL,
        limits: Limits::default(),
    }
}

fn uplink() -> PortSettings {
    PortSettings {
        name: "uplink".to_owned(),
        role: Role::Uplink,
        mac: Mac::default(),
        addresses: Vec::new(),
        vlan: Vlan::Trunk(vec![]),
        isolation: Isolation::Open,
        guard: Guard::FULL,
        offload: Offload::default(),
        limits: Limits::default(),
    }
}

fn lab(ports: impl IntoIterator<Item = (PortId, PortSettings)>) -> Lab {
    let network = NetworkSettings {
        mtu: 1500,
        subnet: Some(subnet()),
        domain: "lab.internal".to_owned(),
        dns: vec![],
    };
    let (mut switch, now) = (Switch::new(network).unwrap(), Instant::now());
    for (id, settings) in ports {
        switch.set_port(id, settings, now).unwrap();
    }
    Lab {
        switch,
        queues: Queues::default(),
        now,
    }
}

/// Machines 1 to 3, and an uplink.
fn usual() -> Lab {
    let machines = (1..=3).map(|n| (n.into(), machine(n)));
    lab(machines.chain([(UPLINK, uplink())]))
}

impl Lab {
    fn put(&mut self, port: PortId, header: [u8; PACKET_HEADER_BYTES], frame: &[u8]) {
        let queue = self.queues.come.entry(port).or_default();
        queue.push_back((header, frame.to_vec()));
    }

    fn pass(&mut self) -> Passed {
        let active: Vec<PortId> = self.queues.come.keys().copied().collect();
        self.switch.pass(&active, &mut self.queues, self.now)
    }

    /// Sends one frame, and returns what went where.
    fn send(&mut self, port: PortId, frame: &[u8]) -> Vec<(PortId, Vec<u8>)> {
        self.put(port, PLAIN, frame);
        self.pass();
        let went = std::mem::take(&mut self.queues.go).into_iter();
        went.flat_map(|(port, queue)| queue.into_iter().map(move |(_, frame)| (port, frame)))
            .collect()
    }

    fn dropped(&self, port: PortId, cause: Cause) -> u64 {
        let mut all = self.switch.counters();
        all.find(|(id, _)| *id == port)
            .map_or(0, |(_, counters)| counters.of(cause))
    }

    /// Sends a frame that must be dropped for `cause`.
    #[track_caller]
    fn refused(&mut self, port: PortId, frame: &[u8], cause: Cause) {
        let before = self.dropped(port, cause);
        assert_eq!(self.send(port, frame), []);
        assert_eq!(self.dropped(port, cause), before + 1, "{cause:?}");
    }
}

fn ip(n: u8) -> [u8; 4] {
    [10, 0, 0, n.wrapping_add(10)]
}

fn datagram(from: u8, to: u8) -> Vec<u8> {
    udp_frame((mac(from), ip(from), 500), (mac(to), ip(to), 600), b"hello")
}

fn ports_of(went: &[(PortId, Vec<u8>)]) -> Vec<PortId> {
    went.iter().map(|(port, _)| *port).collect()
}

#[test]
fn frame_reaches_its_receiver_alone_and_as_it_was() {
    let mut lab = usual();
    assert_eq!(lab.send(1, &datagram(1, 2)), [(2, datagram(1, 2))]);
    let everybody = arp_frame((mac(1), Mac::BROADCAST), 1, (mac(1), ip(1)), ip(2));
    assert_eq!(ports_of(&lab.send(1, &everybody)), [2, 3, UPLINK]);
    // Nobody but the uplink may be where an unknown address is.
    let far = udp_frame((mac(1), ip(1), 5), (mac(77), [9, 9, 9, 9], 6), b"");
    assert_eq!(ports_of(&lab.send(1, &far)), [UPLINK]);
    let back = udp_frame((mac(77), [9, 9, 9, 9], 6), (mac(1), ip(1), 5), b"");
    assert_eq!(lab.send(UPLINK, &back), [(1, back.clone())]);
    assert_eq!(lab.send(1, &datagram(1, 1)), [], "to itself");
    let counters: BTreeMap<_, _> = lab.switch.counters().map(|(id, c)| (id, *c)).collect();
    assert_eq!((counters[&1].frames_in, counters[&1].frames_out), (4, 1));
    assert_eq!(
        counters[&2].bytes_out,
        (datagram(1, 2).len() + everybody.len()) as u64
    );
    assert!(
        counters
            .values()
            .all(|c| c.dropped.iter().sum::<u64>() == 0)
    );
}

#[test]
fn machine_cannot_speak_in_anothers_name() {
    let mut lab = usual();
    let spoofed_mac = udp_frame((mac(2), ip(1), 5), (mac(3), ip(3), 6), b"");
    lab.refused(1, &spoofed_mac, Cause::Mac);
    for source in [
        ip(2),
        GATEWAY,
        [8, 8, 8, 8],
        [224, 0, 0, 1],
        [0; 4],
        [127, 0, 0, 1],
    ] {
        let frame = udp_frame((mac(1), source, 5), (mac(3), ip(3), 6), b"");
        lab.refused(1, &frame, Cause::Address);
    }
    let lie =
        |sender, sender_ip| arp_frame((mac(1), Mac::BROADCAST), 2, (sender, sender_ip), ip(3));
    lab.refused(1, &lie(mac(1), ip(2)), Cause::Address);
    lab.refused(1, &lie(mac(1), GATEWAY), Cause::Address);
    lab.refused(1, &lie(mac(2), ip(1)), Cause::Mac);
    assert_eq!(lab.send(1, &lie(mac(1), ip(1))).len(), 3);
    assert_eq!(lab.send(1, &lie(mac(1), [0; 4])).len(), 3, "a probe");
    // Nor in a server's.
    let dhcp = udp_frame((mac(1), ip(1), 67), (mac(2), ip(2), 68), b"");
    lab.refused(1, &dhcp, Cause::Role);
    // An uplink cannot be the gateway or a machine.
    for other in [GATEWAY_MAC, mac(1), Mac::BROADCAST] {
        let frame = udp_frame((other, [1, 1, 1, 1], 5), (mac(2), ip(2), 6), b"");
        lab.refused(UPLINK, &frame, Cause::Mac);
    }
    assert_eq!(lab.send(1, &datagram(1, 2)).len(), 1, "honest frames pass");
}

fn discovery(from: u8, src: Ipv6Addr, kind: u8, target: Ipv6Addr, link: Mac) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
    message.extend(target.octets());
    message.extend([if kind == 135 { 1 } else { 2 }, 1]);
    message.extend(link.0);
    if src.is_unspecified() {
        message.truncate(24);
    }
    let mut frame = [&[0x33, 0x33, 0, 0, 0, 1][..], &mac(from).0, &[0x86, 0xdd]].concat();
    frame.extend([
        0x60,
        0,
        0,
        0,
        0,
        u8::try_from(message.len()).unwrap(),
        58,
        255,
    ]);
    frame.extend(src.octets());
    frame.extend(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1).octets());
    frame.extend(message);
    frame
}

#[test]
fn ipv6_addresses_belong_to_who_claims_them_first() {
    let mut lab = usual();
    let (none, link) = (Ipv6Addr::UNSPECIFIED, |n| {
        Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, n)
    });
    let advertises = |from, address, link| discovery(from, address, 136, address, link);
    assert_eq!(
        lab.send(1, &discovery(1, none, 135, link(1), mac(1))).len(),
        3
    );
    lab.refused(2, &advertises(2, link(1), mac(2)), Cause::Address);
    lab.refused(2, &discovery(2, none, 135, link(1), mac(2)), Cause::Address);
    assert_eq!(lab.send(2, &advertises(2, link(2), mac(2))).len(), 3);
    // An own address that leads to another's card, and a target that is not the sender's.
    lab.refused(2, &advertises(2, link(2), mac(1)), Cause::Mac);
    lab.refused(
        2,
        &discovery(2, link(2), 136, link(1), mac(2)),
        Cause::Address,
    );
    // Routers are behind uplinks.
    let router = discovery(3, link(3), 134, link(3), mac(3));
    lab.refused(3, &router, Cause::Role);
    lab.refused(3, &discovery(3, link(3), 137, link(3), mac(3)), Cause::Role);
    assert_eq!(
        lab.send(UPLINK, &discovery(77, link(77), 134, link(77), mac(77)))
            .len(),
        3
    );
    // Hidden behind extension headers, and cut into fragments.
    let mut hidden = router.clone();
    hidden.splice(54..54, [58, 0, 1, 4, 0, 0, 0, 0]);
    (hidden[20], hidden[19]) = (60, hidden[19] + 8);
    lab.refused(3, &hidden, Cause::Role);
    (hidden[20], hidden[56], hidden[57]) = (44, 0, 1);
    lab.refused(3, &hidden, Cause::Role);
    let mut fragment = advertises(3, link(3), mac(3));
    fragment.splice(54..54, [58, 0, 0, 1, 0, 0, 0, 0]);
    (fragment[20], fragment[19]) = (44, fragment[19] + 8);
    lab.refused(3, &fragment, Cause::Malformed);
}

#[test]
fn tenants_and_lonely_machines_are_apart() {
    let with = |n, isolation| {
        (
            PortId::from(n),
            PortSettings {
                isolation,
                ..machine(n)
            },
        )
    };
    let mut lab = lab([
        with(1, Isolation::Tenant(1)),
        with(2, Isolation::Tenant(1)),
        with(3, Isolation::Tenant(2)),
        with(4, Isolation::Alone),
        (UPLINK, uplink()),
    ]);
    assert_eq!(ports_of(&lab.send(1, &datagram(1, 2))), [2]);
    lab.refused(1, &datagram(1, 3), Cause::Isolated);
    lab.refused(3, &datagram(3, 4), Cause::Isolated);
    let everybody = |n| arp_frame((mac(n), Mac::BROADCAST), 1, (mac(n), ip(n)), ip(9));
    assert_eq!(ports_of(&lab.send(1, &everybody(1))), [2, UPLINK]);
    assert_eq!(ports_of(&lab.send(4, &everybody(4))), [UPLINK]);
    let outside = udp_frame((mac(77), [9; 4], 5), (mac(4), ip(4), 6), b"");
    assert_eq!(ports_of(&lab.send(UPLINK, &outside)), [4]);
    // Names of others are not told either.
    let mut name = |asker: u8, name: &str| {
        let question = query(name, 1);
        let frame = udp_frame(
            (mac(asker), ip(asker), 999),
            (GATEWAY_MAC, GATEWAY, 53),
            &question,
        );
        let went = lab.send(asker.into(), &frame);
        read(
            &question,
            &went[0].1[ETHERNET_BYTES + IPV4_BYTES + UDP_BYTES..],
        )
    };
    assert_eq!(
        name(1, "m2.lab.internal"),
        (0, vec!["10.0.0.12".to_owned()])
    );
    assert_eq!(name(1, "m1"), (0, vec!["10.0.0.11".to_owned()]));
    assert_eq!(name(1, "m3.lab.internal"), (3, vec![]));
    assert_eq!(name(4, "m1.lab.internal"), (3, vec![]));
    assert_eq!(name(4, "m4.lab.internal").1, ["10.0.0.14"]);
    assert_eq!(name(4, "gateway.lab.internal").1, ["10.0.0.1"]);
}

fn tagged(frame: &[u8], vlan: u16) -> Vec<u8> {
    let [a, b] = vlan.to_be_bytes();
    [&frame[..12], &[0x81, 0, a, b], &frame[12..]].concat()
}

#[test]
fn vlans_are_apart_and_their_tags_are_seen_on_trunks_alone() {
    let access = |n, vlan| {
        (
            PortId::from(n),
            PortSettings {
                vlan: Vlan::Access(vlan),
                ..machine(n)
            },
        )
    };
    let trunk = PortSettings {
        vlan: Vlan::Trunk(vec![7]),
        ..uplink()
    };
    let mut lab = lab([access(1, 7), access(2, 7), access(3, 8), (UPLINK, trunk)]);
    assert_eq!(lab.send(1, &datagram(1, 2)), [(2, datagram(1, 2))]);
    let everybody = arp_frame((mac(1), Mac::BROADCAST), 1, (mac(1), ip(1)), ip(9));
    let went = lab.send(1, &everybody);
    assert_eq!(
        went,
        [(2, everybody.clone()), (UPLINK, tagged(&everybody, 7))]
    );
    assert_eq!(
        lab.send(
            3,
            &arp_frame((mac(3), Mac::BROADCAST), 1, (mac(3), ip(3)), ip(9))
        ),
        []
    );
    assert_eq!(
        lab.send(1, &datagram(1, 3)).len(),
        1,
        "unknown there: to the trunk"
    );
    let back = udp_frame((mac(77), [9; 4], 5), (mac(1), ip(1), 6), b"");
    assert_eq!(lab.send(UPLINK, &tagged(&back, 7)), [(1, back.clone())]);
    lab.refused(UPLINK, &tagged(&back, 8), Cause::Vlan);
    lab.refused(UPLINK, &tagged(&tagged(&back, 7), 7), Cause::Vlan);
    lab.refused(1, &tagged(&datagram(1, 2), 7), Cause::Vlan);
    lab.refused(1, &tagged(&datagram(1, 2), 8), Cause::Vlan);
    assert_eq!(
        lab.send(1, &tagged(&datagram(1, 2), 0)),
        [(2, datagram(1, 2))],
        "a priority"
    );
}

#[test]
fn storm_is_cut_and_the_limits_of_a_port_hold_without_loss() {
    let mut noisy = machine(1);
    noisy.limits.storm = Rate {
        per_s: 10,
        burst: 5,
    };
    let mut slow = machine(2);
    slow.limits.bytes = Some(Rate {
        per_s: 10_000,
        burst: 1000,
    });
    let mut lab = lab([(1, noisy), (2, slow), (3, machine(3))]);
    let everybody = arp_frame((mac(1), Mac::BROADCAST), 1, (mac(1), ip(1)), ip(9));
    for _ in 0..50 {
        lab.send(1, &everybody);
    }
    assert_eq!(lab.dropped(1, Cause::Storm), 45);
    assert_eq!(lab.send(1, &datagram(1, 3)).len(), 1, "others of it pass");
    let big = udp_frame((mac(2), ip(2), 5), (mac(3), ip(3), 6), &[0; 958]);
    assert_eq!(big.len(), 1000);
    for _ in 0..10 {
        lab.put(2, PLAIN, &big);
    }
    let start = lab.now;
    while lab.queues.go.get(&3).map_or(0, VecDeque::len) < 10 {
        let passed = lab.pass();
        let rest = passed.resting.iter().find(|(port, _)| *port == 2);
        lab.now += rest.map_or(Duration::ZERO, |(_, rest)| *rest);
    }
    let took = lab.now - start;
    assert!((800..=1000).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn flood_costs_another_port_one_turn() {
    let mut lab = usual();
    let everybody = udp_frame(
        (mac(1), ip(1), 5),
        (Mac::BROADCAST, [255; 4], 6),
        &[0; 1400],
    );
    for _ in 0..5000 {
        lab.put(1, PLAIN, &everybody);
    }
    lab.put(2, PLAIN, &datagram(2, 3));
    let passed = lab.pass();
    assert!(passed.frames <= FRAMES_PER_TURN + 1, "{passed:?}");
    assert_eq!(passed.idle, [2]);
    let arrived = lab.queues.go[&3]
        .iter()
        .any(|(_, frame)| *frame == datagram(2, 3));
    assert!(arrived, "in the first pass");
    // What goes to three ports costs three times as much.
    let floods = lab.queues.go[&UPLINK].len();
    assert!(floods * 3 * 1400 <= 160 * 1024, "{floods}");
}

#[test]
fn full_receiver_loses_its_frames_and_holds_nobody_up() {
    let mut lab = usual();
    lab.queues.full = Some(2);
    let everybody = arp_frame((mac(1), Mac::BROADCAST), 1, (mac(1), ip(1)), ip(9));
    assert_eq!(ports_of(&lab.send(1, &everybody)), [3, UPLINK]);
    assert_eq!(lab.dropped(2, Cause::NoRoom), 1);
}

#[test]
fn offloads_pass_between_machines_and_are_done_for_others() {
    for is_v6 in [false, true] {
        let mut open = machine(1);
        open.addresses
            .push(Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1).into());
        let mut lab = lab([(1, open), (2, machine(2)), (UPLINK, uplink())]);
        let mut frame = tcp_frame(is_v6, &[7; 5000]);
        let header = gso(&frame, 1400);
        lab.put(1, header, &frame);
        lab.pass();
        let (got, whole) = lab.queues.go.get_mut(&2).unwrap().pop_front().unwrap();
        let mut expected = header;
        expected[10] = 1;
        assert_eq!((got, &whole), (expected, &frame));
        put(&mut frame, 0, &mac(77).0);
        lab.put(1, header, &frame);
        lab.pass();
        let segments = &lab.queues.go[&UPLINK];
        assert_eq!(segments.len(), 4);
        for (header, segment) in segments {
            assert_eq!((header[0], header[1]), (0, 0));
            assert!(segment.len() <= 1514);
            let packet = SlicedPacket::from_ethernet(segment).unwrap();
            assert!(matches!(packet.transport, Some(TransportSlice::Tcp(_))));
        }
        lab.queues.go.clear();
        // Longer than the network's packets, in segments or whole.
        lab.put(1, gso(&frame, 1500), &frame);
        lab.pass();
        assert_eq!(lab.dropped(1, Cause::TooLong), 1);
        lab.refused(1, &tcp_frame(is_v6, &[7; 1500]), Cause::TooLong);
        let mut lie = header;
        lie[6] += 2;
        lab.put(1, lie, &frame);
        lab.pass();
        assert_eq!(lab.dropped(1, Cause::Offload), 1);
    }
}

#[test]
fn machine_gets_a_lease_and_may_use_it_alone() {
    let mut dynamic = machine(1);
    dynamic.addresses.clear();
    let mut lab = lab([(1, dynamic), (2, machine(2)), (UPLINK, uplink())]);
    let none = Ipv4Addr::UNSPECIFIED;
    fn talk(lab: &mut Lab, n: u8, message: &[u8]) -> Option<(u8, Ipv4Addr)> {
        let frame = udp_frame(
            (mac(n), [0; 4], 68),
            (Mac::BROADCAST, [255; 4], 67),
            message,
        );
        let mut went = lab.send(n.into(), &frame);
        let (port, answer) = went.pop()?;
        assert!(
            went.is_empty() && port == PortId::from(n),
            "an answer is the asker's alone"
        );
        let packet = SlicedPacket::from_ethernet(&answer).unwrap();
        let Some(TransportSlice::Udp(udp)) = packet.transport else {
            panic!("no UDP")
        };
        assert_eq!((udp.source_port(), udp.destination_port()), (67, 68));
        let ip = Ipv4::read(&answer[ETHERNET_BYTES..]).unwrap();
        assert!(crate::checksum::is_right(
            ip.src,
            ip.dst,
            PROTOCOL_UDP,
            ip.payload
        ));
        let (kind, address, _) = told(udp.payload());
        Some((kind, address))
    }
    let leased = |lab: &mut Lab, address: Ipv4Addr| {
        let frame = udp_frame((mac(1), address.octets(), 5), (mac(2), ip(2), 6), b"");
        !lab.send(1, &frame).is_empty()
    };
    let (kind, address) = talk(&mut lab, 1, &ask(mac(1), 1, none, &[])).unwrap();
    assert_eq!(kind, 2);
    assert!(subnet().pool.0 <= address && address <= subnet().pool.1);
    assert!(!leased(&mut lab, address), "offered and not taken");
    let (server, wanted) = (GATEWAY, address.octets());
    let wrong: [(u8, &[u8]); 2] = [(54, &server), (50, &[10, 0, 0, 55])];
    assert_eq!(
        talk(&mut lab, 1, &ask(mac(1), 3, none, &wrong)),
        Some((6, none))
    );
    let other: [(u8, &[u8]); 2] = [(54, &[10, 0, 0, 99]), (50, &wanted)];
    assert_eq!(
        talk(&mut lab, 1, &ask(mac(1), 3, none, &other)),
        None,
        "another server's"
    );
    let right: [(u8, &[u8]); 2] = [(54, &server), (50, &wanted)];
    assert_eq!(
        talk(&mut lab, 1, &ask(mac(1), 3, none, &right)),
        Some((5, address))
    );
    assert!(leased(&mut lab, address));
    assert!(!leased(&mut lab, Ipv4Addr::new(10, 0, 0, 150)));
    // A machine that is told an address is leased that one.
    assert_eq!(
        talk(&mut lab, 2, &ask(mac(2), 1, none, &[])),
        Some((2, ip(2).into()))
    );
    // Nobody asks for another.
    assert_eq!(talk(&mut lab, 2, &ask(mac(1), 1, none, &[])), None);
    // The next switch knows the lease.
    let leases = lab.switch.leases(lab.now);
    let mut network = lab.switch.network.clone();
    network.dns.clear();
    lab.switch = Switch::new(network).unwrap();
    lab.switch.restore_leases(&leases, lab.now);
    let mut again = machine(1);
    again.addresses.clear();
    lab.switch.set_port(1, again.clone(), lab.now).unwrap();
    lab.switch.set_port(2, machine(2), lab.now).unwrap();
    assert!(leased(&mut lab, address));
    lab.now += Duration::from_secs(3600);
    lab.switch.set_port(1, again, lab.now).unwrap();
    assert!(!leased(&mut lab, address), "it has run out");
}

#[test]
fn gateway_answers_arp_and_echo_and_serves_nothing_else() {
    let mut lab = usual();
    let who = arp_frame((mac(1), Mac::BROADCAST), 1, (mac(1), ip(1)), GATEWAY);
    let went = lab.send(1, &who);
    assert_eq!(ports_of(&went), [1], "nobody else is asked");
    let arp = Arp::read(&went[0].1[ETHERNET_BYTES..]).unwrap();
    assert_eq!((arp.operation, arp.sender), (2, GATEWAY_MAC));
    assert_eq!(
        (arp.sender_ip.octets(), arp.target_ip.octets()),
        (GATEWAY, ip(1))
    );
    let mut echo = Vec::new();
    PacketBuilder::ethernet2(mac(1).0, GATEWAY_MAC.0)
        .ipv4(ip(1), GATEWAY, 64)
        .icmpv4_echo_request(7, 9)
        .write(&mut echo, b"0123456")
        .unwrap();
    let went = lab.send(1, &echo);
    let packet = SlicedPacket::from_ethernet(&went[0].1).unwrap();
    let Some(TransportSlice::Icmpv4(icmp)) = packet.transport else {
        panic!("no ICMP")
    };
    assert!(
        matches!(icmp.icmp_type(), etherparse::Icmpv4Type::EchoReply(e) if e.id == 7 && e.seq == 9)
    );
    assert_eq!(icmp.payload(), b"0123456");
    assert_eq!(
        crate::checksum::fold(crate::checksum::add(0, icmp.slice())),
        0
    );
    echo[40] ^= 1;
    lab.refused(1, &echo, Cause::Unserved);
    let to_gateway = |port| udp_frame((mac(1), ip(1), 5), (GATEWAY_MAC, GATEWAY, port), b"x");
    lab.refused(1, &to_gateway(80), Cause::Unserved);
    let routed = udp_frame((mac(1), ip(1), 5), (GATEWAY_MAC, [8; 4], 53), b"x");
    lab.refused(1, &routed, Cause::Unserved);
    // A machine that asks without a pause is not always answered.
    for _ in 0..600 {
        lab.send(1, &who);
    }
    assert!(lab.dropped(1, Cause::Unserved) > 50);
}

#[test]
fn unguarded_port_may_have_many_cards_and_cannot_take_what_is_anothers() {
    let mut nested = machine(1);
    nested.guard = Guard {
        mac: false,
        address: false,
    };
    let mut lab = lab([
        (1, nested),
        (2, machine(2)),
        (3, machine(3)),
        (UPLINK, uplink()),
    ]);
    let from = |n| udp_frame((mac(n), ip(n), 5), (mac(2), ip(2), 6), b"");
    for n in 30..40 {
        assert_eq!(ports_of(&lab.send(1, &from(n))), [2]);
        assert_eq!(ports_of(&lab.send(2, &datagram(2, n))), [1]);
    }
    let outside = udp_frame((mac(77), [9; 4], 5), (mac(2), ip(2), 6), b"");
    assert_eq!(lab.send(UPLINK, &outside).len(), 1);
    for n in [3, 77, 0xfe] {
        lab.refused(1, &from(n), Cause::Mac);
    }
    assert_eq!(ports_of(&lab.send(2, &datagram(2, 77))), [UPLINK]);
}

#[test]
fn settings_that_collide_are_refused_and_change_nothing() {
    let mut lab = usual();
    let now = lab.now;
    let mut field = |settings| lab.switch.set_port(5, settings, now).unwrap_err().field;
    assert_eq!(
        field(PortSettings {
            mac: mac(1),
            ..machine(5)
        }),
        "mac"
    );
    assert_eq!(
        field(PortSettings {
            mac: GATEWAY_MAC,
            ..machine(5)
        }),
        "mac"
    );
    assert_eq!(
        field(PortSettings {
            addresses: machine(1).addresses,
            ..machine(5)
        }),
        "addresses"
    );
    let gateways = vec![Ipv4Addr::from(GATEWAY).into()];
    assert_eq!(
        field(PortSettings {
            addresses: gateways,
            ..machine(5)
        }),
        "addresses"
    );
    assert_eq!(
        field(PortSettings {
            name: "a.b".to_owned(),
            ..machine(5)
        }),
        "name"
    );
    assert_eq!(lab.send(1, &datagram(1, 2)).len(), 1);
    lab.switch
        .set_port(
            1,
            PortSettings {
                isolation: Isolation::Alone,
                ..machine(1)
            },
            now,
        )
        .unwrap();
    lab.refused(1, &datagram(1, 2), Cause::Isolated);
    let frames = lab.switch.counters().next().unwrap().1.frames_in;
    assert_eq!(frames, 2, "counters go on");
    lab.switch.detach(2);
    lab.switch
        .set_port(
            5,
            PortSettings {
                mac: mac(2),
                ..machine(5)
            },
            now,
        )
        .unwrap();
    assert_eq!(ports_of(&lab.send(3, &datagram(3, 2))), [5]);
}

#[test]
fn capture_has_what_passes_and_also_what_is_dropped() {
    let mut lab = usual();
    let settings = CaptureSettings {
        port: Some(1),
        snap_bytes: 1500,
        file_bytes: 1 << 20,
        within: Duration::from_secs(10),
    };
    let capture = Capture::new(settings, lab.now, Duration::ZERO);
    assert!(lab.switch.set_capture(Some(capture)).is_none());
    let start = lab.switch.capture().unwrap().take().len();
    lab.send(1, &datagram(1, 2));
    lab.send(2, &datagram(2, 1));
    lab.send(2, &datagram(2, 3));
    lab.send(1, &datagram(3, 2));
    let file = lab.switch.capture().unwrap().take();
    let times = |needle: &[u8]| {
        file.windows(needle.len())
            .filter(|part| *part == needle)
            .count()
    };
    assert_eq!(start, 28);
    let captured = [(1, 2), (2, 1), (2, 3), (3, 2)].map(|(a, b)| times(&datagram(a, b)));
    assert_eq!(captured, [1, 1, 0, 1]);
}

#[test]
fn cards_without_an_address_get_one_that_stays() {
    let a = mac_of("lab", "web", 0);
    assert_eq!(a, mac_of("lab", "web", 0));
    assert!(a.is_unicast());
    for other in [
        mac_of("lab", "web", 1),
        mac_of("lab", "we", 0),
        mac_of("la", "bweb", 0),
    ] {
        assert_ne!(a, other);
    }
}

proptest! {
    /// Whatever machines send: nothing panics, no frame reaches a port that its sender may not talk to, and
    /// every frame that arrives has its sender's address.
    #[test]
    fn random_frames_stay_where_they_belong(
        frames in prop::collection::vec(
            (1u8..=4, any::<[u8; 12]>(), 0usize..8, prop::collection::vec(any::<u8>(), 0..120), any::<u64>()), 1..60),
    ) {
        let with = |n, isolation| (PortId::from(n), PortSettings { isolation, ..machine(n) });
        let mut lab = lab([
            with(1, Isolation::Tenant(1)), with(2, Isolation::Tenant(1)), with(3, Isolation::Tenant(2)),
            with(4, Isolation::Alone),
        ]);
        for (port, header, shape, junk, seed) in frames {
            let [at0, at1, v, ..] = seed.to_le_bytes();
            let other = seed.to_be_bytes()[0] % 5;
            let mut frame = match shape {
                0 => junk.clone(),
                1 => datagram(port, other),
                2 => arp_frame((mac(port), Mac::BROADCAST), 1, (mac(port), ip(port)), ip(other)),
                3 => tcp_frame(seed % 2 == 0, &junk),
                4 => udp_frame((mac(port), ip(port), 68), (Mac::BROADCAST, [255; 4], 67), &ask(mac(port), at0 % 9, ip(port).into(), &[])),
                5 => udp_frame((mac(port), ip(port), 9), (GATEWAY_MAC, GATEWAY, 53), &junk),
                6 => discovery(port, Ipv6Addr::from(u128::from(seed)), 130 + at0 % 9, Ipv6Addr::LOCALHOST, mac(other)),
                _ => tagged(&datagram(port, other), u16::from(at0)),
            };
            if seed % 3 == 0 && !frame.is_empty() {
                let at = usize::from(u16::from_le_bytes([at0, at1])) % frame.len();
                frame[at] ^= v | 1;
            }
            let header = if seed % 4 == 0 { header } else { PLAIN };
            lab.put(port.into(), header, &frame);
            lab.pass();
            for (to, queue) in std::mem::take(&mut lab.queues.go) {
                for (_, frame) in queue {
                    let ethernet = Ethernet::read(&frame).unwrap();
                    let own = ethernet.src == GATEWAY_MAC && to == PortId::from(port);
                    let partner = matches!((port, to), (1, 2) | (2, 1)) && ethernet.src == mac(port);
                    prop_assert!(own || partner, "{port} to {to}: {ethernet:?}");
                    prop_assert!(frame.len() <= 1514 || partner);
                    if ethernet.kind == TYPE_ARP {
                        prop_assert_eq!(Arp::read(&frame[ETHERNET_BYTES..]).unwrap().sender, ethernet.src);
                    }
                }
            }
        }
    }
}
