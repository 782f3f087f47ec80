//! Any sequence of messages to the process of a network, with the descriptors that belong to them or with others, of
//! scribbling and of frames in the ports that it was given: it answers afterwards, and says nothing that a broker
//! would hold against it.
#![no_main]

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::port::{PORT_BYTES, Port, PortEnd, stamp};
use bulkhead_ipc::protocol::switch::{
    FromSwitch, IsolationTerms, LEASES_MAX, LeaseTerms, PORTS_MAX, PortTerms, SubnetTerms,
    SwitchConfig, ToSwitch, VlanTerms,
};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_switch::Server;
use libfuzzer_sys::fuzz_target;
use serde::ser::{Serialize, SerializeTuple, Serializer};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::Duration;

const CARDS: u8 = 3;
const STEPS_MAX: usize = 64;
/// Turns after each message, and until an answer: more than there are between two looks at the broker.
const TURNS: usize = 3;
const TURNS_MAX: usize = 200;
/// Where positions and the first lengths of both rings are.
const PLACES: [usize; 3] = [0x100, 0x200, 0x1000];
const LAST_PING: u64 = u64::MAX;

/// Bytes as they are, without the length that a slice has.
struct Raw<'a>(&'a [u8]);

impl Serialize for Raw<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut bytes = serializer.serialize_tuple(self.0.len())?;
        self.0.iter().try_for_each(|b| bytes.serialize_element(b))?;
        bytes.end()
    }
}

/// A machine's end of a port.
struct Card {
    memory: OwnedFd,
    end: Port,
    kick: Doorbell,
    call: Doorbell,
}

impl Card {
    fn new() -> Self {
        let memory = sealed_memfd("p", PORT_BYTES).unwrap();
        stamp(memory.as_fd(), 1).unwrap();
        Self {
            end: Port::map(memory.try_clone().unwrap(), PortEnd::Device, 1).unwrap(),
            memory,
            kick: Doorbell::new().unwrap(),
            call: Doorbell::new().unwrap(),
        }
    }

    fn send(&mut self, mac: u8, frame: &[u8]) {
        let Port { memory, writer, .. } = &mut self.end;
        let Ok(Some(mut record)) = writer.reserve(memory, 12 + 12 + frame.len()) else {
            return;
        };
        record.write(&[0; 12]);
        record.write(&[255; 6]);
        record.write(&[2, 0, 0, 0, 0, mac]);
        record.write(frame);
        record.commit();
        let _asleep = writer.publish(memory);
        self.kick.ring();
    }
}

struct Lab {
    server: Server,
    broker: Channel,
    cards: Vec<Card>,
    /// Both ends of what goes for an interface, and for a capture's pipe.
    uplink: (UnixDatagram, UnixDatagram),
    ended: bool,
}

fn config() -> SwitchConfig {
    SwitchConfig {
        mtu: 1500,
        subnet: Some(SubnetTerms {
            gateway: [10, 0, 0, 254].into(),
            prefix: 24,
            mac: [2, 0, 0, 0, 0, 0xfe],
            pool: ([10, 0, 0, 100].into(), [10, 0, 0, 120].into()),
            router: None,
            lease_s: 600,
        }),
        domain: "lab.internal".to_owned(),
        dns: vec![],
    }
}

fn terms(n: u8, what: u8) -> PortTerms {
    PortTerms {
        name: format!("m{n}"),
        mac: [2, 0, 0, 0, 0, n],
        addresses: vec![[10, 0, 0, n].into()],
        vlan: match what % 3 {
            0 => VlanTerms::Trunk(vec![what.into()]),
            _ => VlanTerms::Access(0),
        },
        isolation: match what % 5 {
            0 => IsolationTerms::Alone,
            1 => IsolationTerms::Tenant(1),
            _ => IsolationTerms::Open,
        },
        guard: (what & 0x40 == 0, what & 0x80 == 0),
        bytes: None,
        frames: None,
        storm: None,
    }
}

impl Lab {
    fn new() -> Self {
        let (broker, channel) = Channel::pair().unwrap();
        let uplink = UnixDatagram::pair().unwrap();
        for end in [&uplink.0, &uplink.1] {
            end.set_nonblocking(true).unwrap();
        }
        Self {
            server: Server::unborn(&config(), channel).unwrap(),
            broker,
            cards: (0..CARDS).map(|_| Card::new()).collect(),
            uplink,
            ended: false,
        }
    }

    /// Sends a message with some descriptors, of which one choice is what belongs to it.
    fn tell<T: Serialize>(&self, message: &T, card: u8, choice: u8) {
        let card = &self.cards[usize::from(card % CARDS)];
        let (memory, uplink) = (card.memory.as_fd(), self.uplink.0.as_fd());
        let (kick, call) = (card.kick.as_fd(), card.call.as_fd());
        let fds: &[BorrowedFd<'_>] = match choice % 8 {
            0..4 => &[memory, kick, call],
            4 => &[uplink],
            5 => &[kick, memory, uplink],
            6 => &[uplink, uplink],
            _ => &[],
        };
        let _full_or_too_large = self.broker.send(message, fds);
    }

    fn turn(&mut self) {
        self.ended |= self.server.turn(Some(Duration::ZERO)).is_some();
    }

    /// Hears what the switch says. Returns whether the last ping was answered.
    fn hear(&self) -> bool {
        let mut answered = false;
        while let Some((message, fds)) = self.broker.try_recv::<FromSwitch>().unwrap() {
            assert!(fds.is_empty());
            match message {
                FromSwitch::Pong(number) => answered |= number == LAST_PING,
                FromSwitch::Leased(leases) => assert!(leases.len() <= LEASES_MAX),
                FromSwitch::Ports(ports) => assert!(ports.len() <= PORTS_MAX),
                FromSwitch::Refused { reason, .. } | FromSwitch::Broke { reason, .. } => {
                    assert!(!reason.is_empty() && reason.len() < 500);
                }
                FromSwitch::Captured { .. } => {}
            }
        }
        answered
    }

    fn step(&mut self, [what, card, choice, number]: [u8; 4], piece: &[u8]) {
        let id = u16::from(card % CARDS);
        match what % 10 {
            0 => self.tell(&Raw(piece), card, choice),
            1 => {
                let message = ToSwitch::SetPort {
                    id,
                    generation: if number < 200 { 1 } else { number.into() },
                    terms: terms(card % CARDS + 1, number),
                };
                self.tell(&message, card, choice);
            }
            2 => {
                let message = ToSwitch::SetUplink {
                    id: 240,
                    generation: number.into(),
                    terms: terms(9, number),
                };
                self.tell(&message, card, if choice < 200 { 4 } else { choice });
            }
            3 => self.tell(&ToSwitch::RemovePort(id), card, 7),
            4 => {
                let message = ToSwitch::Capture {
                    port: (choice & 0x80 == 0).then_some(id),
                    snap_bytes: u32::from(number) * 20,
                    file_bytes: u64::from(number) << (choice % 16),
                    within_ms: u64::from(number) << (choice % 56),
                };
                self.tell(&message, card, if choice < 200 { 4 } else { choice });
            }
            5 => self.tell(&ToSwitch::EndCapture, card, 7),
            6 => self.tell(&ToSwitch::Report, card, 7),
            7 => {
                let leases = piece.chunks_exact(4).map(|word| LeaseTerms {
                    mac: [2, 0, 0, 0, word[0], word[1]],
                    address: [10, 0, word[2] % 2, word[3]].into(),
                    left_s: u32::from(word[2]) << (word[0] % 24),
                });
                self.tell(&ToSwitch::Restore(leases.collect()), card, 7);
            }
            8 => {
                let card = &self.cards[usize::from(card % CARDS)];
                let at = PLACES[usize::from(choice % 3)] + usize::from(number % 240);
                let piece = &piece[..piece.len().min(16)];
                card.end.memory.slice(at, piece.len()).copy_from(piece);
                card.kick.ring();
            }
            _ if choice >= 128 => {
                let record = [&[0; 12], piece].concat();
                let _full = self.uplink.1.send(&record);
                let mut taken = [0; 2000];
                while self.uplink.1.recv(&mut taken).is_ok() {}
            }
            _ => self.cards[usize::from(card % CARDS)].send(card % CARDS + 1, piece),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut lab = Lab::new();
    let mut rest = data;
    for _ in 0..STEPS_MAX {
        let Some((&[what, card, choice, number, len], behind)) = rest.split_first_chunk() else {
            break;
        };
        let (piece, left) = behind.split_at(usize::from(len).min(behind.len()));
        rest = left;
        lab.step([what, card, choice, number], piece);
        for _ in 0..TURNS {
            lab.turn();
            if lab.ended {
                return;
            }
        }
        lab.hear();
    }
    lab.tell(&ToSwitch::Ping(LAST_PING), 0, 7);
    for _ in 0..TURNS_MAX {
        lab.turn();
        if lab.ended || lab.hear() {
            return;
        }
    }
    panic!("the switch does not answer");
});
