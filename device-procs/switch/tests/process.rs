//! The program as a process: born with nothing behind its built-in policy, given ports, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::control_page::Phase;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::port::{PACKET_HEADER_BYTES, PORT_BYTES, Port, PortEnd, stamp};
use bulkhead_ipc::protocol::birth::{Born, KindConfig};
use bulkhead_ipc::protocol::switch::{
    FromSwitch, IsolationTerms, LeaseTerms, PortTerms, SubnetTerms, SwitchConfig, ToSwitch,
    VlanTerms,
};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::testing::process::{Process, Upbringing};
use etherparse::PacketBuilder;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(30);
const GATEWAY: [u8; 6] = [2, 0, 0, 0, 1, 0];
const EVERYBODY: [u8; 6] = [0xff; 6];

fn config() -> SwitchConfig {
    SwitchConfig {
        mtu: 1500,
        subnet: Some(SubnetTerms {
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            prefix: 24,
            mac: GATEWAY,
            pool: (Ipv4Addr::new(10, 0, 0, 10), Ipv4Addr::new(10, 0, 0, 20)),
            router: None,
            lease_s: 3600,
        }),
        domain: "lab.internal".to_owned(),
        dns: Vec::new(),
    }
}

fn spawn(config: SwitchConfig) -> Process {
    let upbringing = Upbringing::new(ProcKind::Switch, KindConfig::Switch(config));
    let mut process = Process::spawn(env!("CARGO_BIN_EXE_bulkhead-switch"), upbringing, vec![]);
    process.assert_serving();
    assert_eq!(process.page.phase(), Phase::Locked);
    process
}

fn mac(id: u16) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(id).unwrap() + 1]
}

fn address(id: u16) -> [u8; 4] {
    [10, 0, 0, 100 + u8::try_from(id).unwrap()]
}

fn terms(id: u16) -> PortTerms {
    PortTerms {
        name: format!("m{id}"),
        mac: mac(id),
        addresses: vec![Ipv4Addr::from(address(id)).into()],
        vlan: VlanTerms::Access(0),
        isolation: IsolationTerms::Open,
        guard: (true, true),
        bytes: None,
        frames: None,
        storm: None,
    }
}

fn said(process: &Process) -> FromSwitch {
    match process.channel.recv_within::<FromSwitch>(PATIENCE) {
        Ok((message, _)) => message,
        Err(error) => panic!("{error}; denied: {:?}", process.page.denial()),
    }
}

/// A machine's card.
struct Card {
    id: u16,
    port: Port,
    switch: Doorbell,
    own: Doorbell,
}

impl Card {
    fn plug_in(process: &Process, id: u16) -> Self {
        Self::plug_in_as(process, id, terms(id))
    }

    /// One that has to ask for an address.
    fn plug_in_bare(process: &Process, id: u16) -> Self {
        let addresses = Vec::new();
        Self::plug_in_as(
            process,
            id,
            PortTerms {
                addresses,
                ..terms(id)
            },
        )
    }

    fn plug_in_as(process: &Process, id: u16, terms: PortTerms) -> Self {
        let memory = sealed_memfd("bulkhead-port", PORT_BYTES).unwrap();
        stamp(memory.as_fd(), 1).unwrap();
        let port = Port::find(memory, PortEnd::Device).unwrap();
        let (switch, own) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
        let card = Self {
            id,
            port,
            switch,
            own,
        };
        card.give(process, 1, terms);
        card
    }

    fn give(&self, process: &Process, generation: u32, terms: PortTerms) {
        let message = ToSwitch::SetPort {
            id: self.id,
            generation,
            terms,
        };
        let fds = [
            self.port.memory.descriptor().unwrap(),
            self.switch.as_fd(),
            self.own.as_fd(),
        ];
        process.channel.send(&message, &fds).unwrap();
    }

    fn send(&mut self, frame: &[u8]) {
        let len = PACKET_HEADER_BYTES + frame.len();
        let Port { memory, writer, .. } = &mut self.port;
        let mut record = writer.reserve(memory, len).unwrap().unwrap();
        record.write(&[0; PACKET_HEADER_BYTES]);
        record.write(frame);
        record.commit();
        if writer.publish(memory) {
            self.switch.ring();
        }
    }

    fn wait(&self, process: &Process) {
        assert!(
            readable(self.own.as_fd()),
            "nobody rang; denied: {:?}",
            process.page.denial()
        );
        self.own.take();
    }

    /// Waits until the switch is there.
    fn meet(&mut self, process: &Process) {
        while !self.port.is_met() {
            self.wait(process);
            if self.port.renew() {
                self.switch.ring();
            }
        }
    }

    fn receive(&mut self, process: &Process) -> Vec<u8> {
        loop {
            let Port { memory, reader, .. } = &mut self.port;
            if let Some(len) = reader.peek(memory).unwrap() {
                let mut record = vec![0; len];
                reader.copy_out(memory, 0, &mut record);
                reader.take();
                let _nobody_waits = reader.release(memory);
                return record.split_off(PACKET_HEADER_BYTES);
            }
            if !reader.ask_for_records(memory).unwrap() {
                self.wait(process);
            }
        }
    }
}

fn readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::try_from(PATIENCE).unwrap()) == Ok(1)
}

fn udp(from: ([u8; 6], [u8; 4], u16), to: ([u8; 6], [u8; 4], u16), payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(from.0, to.0)
        .ipv4(from.1, to.1, 64)
        .udp(from.2, to.2)
        .write(&mut frame, payload)
        .unwrap();
    frame
}

fn frame(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let end = |id: u16| (mac(id), address(id), 7);
    udp(end(from), end(to), payload)
}

/// A DHCP message of `id` of this kind.
fn dhcp(id: u16, kind: u8, requested: Option<[u8; 4]>) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[..3].copy_from_slice(&[1, 1, 6]);
    message[4..8].copy_from_slice(b"bulk");
    message[28..34].copy_from_slice(&mac(id));
    message[236..].copy_from_slice(&[99, 130, 83, 99]);
    message.extend([53, 1, kind]);
    if let Some(address) = requested {
        message.extend([50, 4]);
        message.extend(address);
    }
    message.push(255);
    udp((mac(id), [0; 4], 68), (EVERYBODY, [255; 4], 67), &message)
}

/// The kind of a DHCP answer and the address in it.
fn answered(frame: &[u8]) -> (u8, [u8; 4]) {
    let message = &frame[14 + 20 + 8..];
    assert_eq!((message[0], &message[4..8]), (2, &b"bulk"[..]));
    assert_eq!(message[240], 53);
    (message[242], message[16..20].try_into().unwrap())
}

fn lease(process: &Process, card: &mut Card) -> LeaseTerms {
    let id = card.id;
    card.send(&dhcp(id, 1, None));
    let (kind, offered) = answered(&card.receive(process));
    assert_eq!(kind, 2);
    card.send(&dhcp(id, 3, Some(offered)));
    let (kind, address) = answered(&card.receive(process));
    assert_eq!((kind, address), (5, offered));
    // It was told before the machine was.
    let heard = process.channel.try_recv::<FromSwitch>().unwrap();
    let Some((FromSwitch::Leased(leases), _)) = heard else {
        panic!("{heard:?}");
    };
    assert_eq!(leases.len(), 1);
    assert_eq!(
        (leases[0].mac, leases[0].address),
        (mac(id), address.into())
    );
    leases[0]
}

#[test]
fn ports_come_and_go_and_frames_pass_between_them() {
    let mut process = spawn(config());
    let mut cards: Vec<_> = (0..3).map(|id| Card::plug_in(&process, id)).collect();
    for card in &mut cards {
        card.meet(&process);
    }
    for n in 0..50u8 {
        let (to, bytes) = (
            1 + u16::from(n % 2),
            frame(0, 1 + u16::from(n % 2), &[n; 40]),
        );
        cards[0].send(&bytes);
        assert_eq!(cards[usize::from(to)].receive(&process), bytes);
    }
    process.channel.send(&ToSwitch::Report, &[]).unwrap();
    let FromSwitch::Ports(ports) = said(&process) else {
        panic!("no report");
    };
    let counted: Vec<_> = ports
        .iter()
        .map(|p| (p.id, p.frames_in, p.is_met))
        .collect();
    assert_eq!(counted, [(0, 50, true), (1, 0, true), (2, 0, true)]);
    process.channel.send(&ToSwitch::RemovePort(1), &[]).unwrap();
    // The same memory in another generation: as when another switch has taken the place of this one.
    let descriptor = cards[2].port.memory.descriptor().unwrap();
    stamp(descriptor, 2).unwrap();
    cards[2].give(&process, 2, terms(2));
    cards[2].wait(&process);
    assert!(cards[2].port.renew());
    cards[2].switch.ring();
    cards[2].meet(&process);
    cards[0].send(&frame(0, 1, b"lost"));
    cards[0].send(&frame(0, 2, b"kept"));
    assert_eq!(cards[2].receive(&process), frame(0, 2, b"kept"));
    process.assert_ends_quietly();
}

#[test]
fn leases_are_told_before_they_are_given_and_a_successor_keeps_them() {
    let mut process = spawn(config());
    let mut card = Card::plug_in_bare(&process, 0);
    card.meet(&process);
    let first = lease(&process, &mut card);
    assert!((3590..=3600).contains(&first.left_s), "{first:?}");
    process.assert_ends_quietly();

    let process = spawn(config());
    // Everything but one address is somebody else's.
    let others = (10..=20).filter(|n| Ipv4Addr::new(10, 0, 0, *n) != first.address);
    let mut leases: Vec<_> = others
        .map(|n| LeaseTerms {
            mac: [2, 9, 9, 9, 9, n],
            address: Ipv4Addr::new(10, 0, 0, n),
            left_s: 1000,
        })
        .collect();
    leases.push(first);
    let restore = ToSwitch::Restore(leases);
    process.channel.send(&restore, &[]).unwrap();
    let mut other = Card::plug_in_bare(&process, 1);
    let mut card = Card::plug_in_bare(&process, 0);
    other.meet(&process);
    card.meet(&process);
    // Nobody else gets it, and its owner does.
    other.send(&dhcp(1, 1, None));
    assert_eq!(lease(&process, &mut card).address, first.address);
    let Port { memory, reader, .. } = &mut other.port;
    assert_eq!(reader.peek(memory), Ok(None), "there is no address for it");
}

#[test]
fn uplinks_and_captures_are_written_and_read() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let mut process = spawn(config());
    let mut card = Card::plug_in(&process, 0);
    card.meet(&process);
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let (near, far) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).unwrap();
    let uplink = ToSwitch::SetUplink {
        id: 200,
        generation: 1,
        terms: PortTerms {
            name: "outside".to_owned(),
            ..terms(9)
        },
    };
    process.channel.send(&uplink, &[near.as_fd()]).unwrap();
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    let capture = ToSwitch::Capture {
        port: None,
        snap_bytes: 100,
        file_bytes: 1 << 20,
        within_ms: 60_000,
    };
    process.channel.send(&capture, &[write.as_fd()]).unwrap();
    drop(write);
    // The head of the file: from here on it is captured.
    assert!(readable(read.as_fd()));
    let outside = udp(
        ([2, 7, 7, 7, 7, 7], [10, 0, 0, 77], 5),
        (mac(0), [10, 0, 0, 100], 5),
        b"in",
    );
    let packet = [&[0; PACKET_HEADER_BYTES], &outside[..]].concat();
    assert_eq!(nix::unistd::write(&far, &packet), Ok(packet.len()));
    assert_eq!(card.receive(&process), outside);
    let out = udp(
        (mac(0), [10, 0, 0, 100], 5),
        ([2, 7, 7, 7, 7, 7], [10, 0, 0, 77], 5),
        b"out",
    );
    card.send(&out);
    assert!(readable(far.as_fd()), "denied: {:?}", process.page.denial());
    let mut got = [0; 2048];
    let n = nix::unistd::read(&far, &mut got).unwrap();
    assert_eq!(got[PACKET_HEADER_BYTES..n], out[..]);
    process.channel.send(&ToSwitch::EndCapture, &[]).unwrap();
    assert_eq!(said(&process), FromSwitch::Captured { missed: 0 });
    let file = all_of(&read);
    for frame in [&outside, &out] {
        let times = file.windows(frame.len()).filter(|part| part == frame);
        assert_eq!(times.count(), 2, "from its port, and to the other");
    }
    // A reader that goes away ends a capture.
    let (read, write) = nix::unistd::pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
    process.channel.send(&capture, &[write.as_fd()]).unwrap();
    drop(write);
    assert!(readable(read.as_fd()));
    drop(read);
    assert_eq!(said(&process), FromSwitch::Captured { missed: 0 });
    process.assert_ends_quietly();
}

/// Everything in a pipe, to its end.
fn all_of(pipe: &OwnedFd) -> Vec<u8> {
    let (mut all, mut part) = (Vec::new(), [0; 4096]);
    while readable(pipe.as_fd()) {
        match nix::unistd::read(pipe, &mut part).unwrap() {
            0 => break,
            n => all.extend_from_slice(&part[..n]),
        }
    }
    all
}

#[test]
fn what_makes_no_sense_is_refused_and_costs_nobody_else_anything() {
    let mut process = spawn(config());
    let mut cards: Vec<_> = (0..2).map(|id| Card::plug_in(&process, id)).collect();
    for card in &mut cards {
        card.meet(&process);
    }
    let set = |id, generation, terms| ToSwitch::SetPort {
        id,
        generation,
        terms,
    };
    let refused = |message: &ToSwitch, fds: &[BorrowedFd<'_>], word: &str| {
        process.channel.send(message, fds).unwrap();
        match said(&process) {
            FromSwitch::Refused { id: 7, reason, .. } => assert!(reason.contains(word), "{reason}"),
            other => panic!("{other:?}"),
        }
    };
    let memory = sealed_memfd("bulkhead-port", PORT_BYTES).unwrap();
    stamp(memory.as_fd(), 4).unwrap();
    let short = sealed_memfd("bulkhead-port", 4096).unwrap();
    let (a, b) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let (memory, short, a, b) = (memory.as_fd(), short.as_fd(), a.as_fd(), b.as_fd());
    refused(&set(7, 4, terms(7)), &[memory, a], "descriptors");
    refused(&set(7, 4, terms(7)), &[short, a, b], "sealed");
    refused(&set(7, 5, terms(7)), &[memory, a, b], "generation 5");
    // A file cannot be waited for.
    refused(&set(7, 4, terms(7)), &[memory, memory, b], "EPERM");
    let nameless = PortTerms {
        name: "no name".to_owned(),
        ..terms(7)
    };
    refused(&set(7, 4, nameless), &[memory, a, b], "name");
    // Another machine's address.
    refused(&set(7, 4, terms(0)), &[memory, a, b], "mac");
    process.channel.send(&(250u8, 1u8), &[]).unwrap();
    // One whose card does not keep to the protocol.
    cards[0].port.memory.write(0x100, u64::MAX);
    cards[0].switch.ring();
    let broke = said(&process);
    assert!(
        matches!(
            broke,
            FromSwitch::Broke {
                id: 0,
                generation: 1,
                ..
            }
        ),
        "{broke:?}"
    );
    let mut other = Card::plug_in(&process, 2);
    other.meet(&process);
    other.send(&frame(2, 1, b"x"));
    assert_eq!(cards[1].receive(&process), frame(2, 1, b"x"));
    process.channel.send(&ToSwitch::Shutdown, &[]).unwrap();
    assert!(process.end().0.success());
}

#[test]
fn network_that_contradicts_itself_is_not_born() {
    let mut wrong = config();
    wrong.mtu = 7;
    let upbringing = Upbringing::new(ProcKind::Switch, KindConfig::Switch(wrong));
    let mut process = Process::spawn(env!("CARGO_BIN_EXE_bulkhead-switch"), upbringing, vec![]);
    match process.born() {
        Ok(Born::Failed { reason }) => assert!(reason.contains("mtu"), "{reason}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(process.end().0.code(), Some(70));
}

#[test]
fn idle_switch_sleeps() {
    let process = spawn(config());
    let mut cards: Vec<_> = (0..4).map(|id| Card::plug_in(&process, id)).collect();
    for card in &mut cards {
        card.meet(&process);
    }
    let switches = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    };
    std::thread::sleep(Duration::from_millis(300));
    let before = switches();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(switches(), before, "it wakes up though nothing happens");
}
