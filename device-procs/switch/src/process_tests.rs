//! The process without its birth: the broker's end of its channel is in the test.

use super::*;
use crate::testing::{mac, udp_frame};
use bulkhead_ipc::port::{PACKET_HEADER_BYTES, PORT_BYTES, stamp};
use bulkhead_ipc::protocol::switch::{IsolationTerms, PORTS_MAX, VlanTerms};
use bulkhead_ipc::shared::sealed_memfd;
use proptest::prelude::*;
use std::os::fd::BorrowedFd;

const GENERATION: u32 = 1;
/// Turns until an answer: more than there are between two looks at the broker.
const TURNS_MAX: u32 = 4 * PASSES_BETWEEN_LOOKS;

struct Desk {
    server: Server,
    broker: Channel,
    /// What a port comes with.
    memory: OwnedFd,
    bells: [Doorbell; 2],
    /// An end of what can be an interface or a pipe.
    pipe: (OwnedFd, OwnedFd),
}

fn desk() -> Desk {
    let config = SwitchConfig {
        mtu: 9000,
        subnet: None,
        domain: "lab".to_owned(),
        dns: vec![],
    };
    let (broker, channel) = Channel::pair().unwrap();
    let memory = sealed_memfd("p", PORT_BYTES).unwrap();
    stamp(memory.as_fd(), GENERATION).unwrap();
    let (near, far) = std::os::unix::net::UnixDatagram::pair().unwrap();
    for end in [&near, &far] {
        end.set_nonblocking(true).unwrap();
    }
    Desk {
        server: Server::unborn(&config, channel).unwrap(),
        broker,
        memory,
        bells: [(); 2].map(|()| Doorbell::new().unwrap()),
        pipe: (near.into(), far.into()),
    }
}

fn terms(name: &str, last: u8) -> PortTerms {
    PortTerms {
        name: name.to_owned(),
        mac: [2, 0, 0, 0, 0, last],
        addresses: vec![],
        vlan: VlanTerms::Access(0),
        isolation: IsolationTerms::Open,
        guard: (true, true),
        bytes: None,
        frames: None,
        storm: None,
    }
}

fn set_port(id: u16, generation: u32) -> ToSwitch {
    ToSwitch::SetPort {
        id,
        generation,
        terms: terms("m1", 1),
    }
}

impl Desk {
    fn port(&self) -> Vec<BorrowedFd<'_>> {
        let bells = self.bells.iter().map(AsFd::as_fd);
        [self.memory.as_fd()].into_iter().chain(bells).collect()
    }

    fn tell(&self, message: &ToSwitch, fds: &[BorrowedFd<'_>]) {
        self.broker.send(message, fds).unwrap();
    }

    /// What the switch says until it answers a ping, or `None` when it ends.
    fn answers(&mut self) -> Option<Vec<FromSwitch>> {
        self.tell(&ToSwitch::Ping(7), &[]);
        let mut answers = Vec::new();
        for _ in 0..TURNS_MAX {
            if let Some(status) = self.server.turn(Some(Duration::ZERO)) {
                assert_eq!(status, 0);
                return None;
            }
            while let Some((message, fds)) = self.broker.try_recv::<FromSwitch>().unwrap() {
                assert!(fds.is_empty());
                if message == FromSwitch::Pong(7) {
                    return Some(answers);
                }
                answers.push(message);
            }
        }
        panic!("no answer: {answers:?}");
    }
}

#[test]
fn ports_with_other_descriptors_are_refused_and_the_next_message_is_heard() {
    let mut desk = desk();
    let port = desk.port();
    let (short, wrong) = (&port[..2], [port[1], port[0], port[2]]);
    let none: &[BorrowedFd<'_>] = &[];
    for fds in [none, short, &wrong] {
        desk.tell(&set_port(3, GENERATION), fds);
    }
    // Its memory is of a generation that has passed.
    desk.tell(&set_port(3, GENERATION + 1), &port);
    desk.tell(&set_port(3, GENERATION), &port);
    desk.tell(&ToSwitch::Report, &[]);
    let answers = desk.answers().unwrap();
    let (ports, refused) = answers.split_last().unwrap();
    assert_eq!(refused.len(), 4, "{answers:?}");
    for answer in refused {
        assert!(
            matches!(answer, FromSwitch::Refused { id: 3, .. }),
            "{answer:?}"
        );
    }
    assert!(
        matches!(ports, FromSwitch::Ports(ports) if ports.len() == 1 && ports[0].id == 3),
        "{ports:?}"
    );
    desk.tell(&ToSwitch::Shutdown, &[]);
    assert_eq!(desk.answers(), None);
}

/// A machine's end of a port, and what wakes the switch.
struct Card {
    port: Port,
    bell: Doorbell,
}

impl Card {
    /// The card `last` at a port of that number.
    fn plugged_into(desk: &Desk, last: u8) -> Self {
        let memory = sealed_memfd("p", PORT_BYTES).unwrap();
        stamp(memory.as_fd(), GENERATION).unwrap();
        let [switch, own] = [(); 2].map(|()| Doorbell::new().unwrap());
        let message = ToSwitch::SetPort {
            id: last.into(),
            generation: GENERATION,
            terms: terms(&format!("m{last}"), last),
        };
        desk.tell(&message, &[memory.as_fd(), switch.as_fd(), own.as_fd()]);
        Self {
            port: Port::map(memory, PortEnd::Device, GENERATION).unwrap(),
            bell: switch,
        }
    }

    /// Sends this frame as often as there is room for, but at most `most` times.
    fn send(&mut self, frame: &[u8], most: usize) {
        let Port { memory, writer, .. } = &mut self.port;
        for _ in 0..most {
            let len = PACKET_HEADER_BYTES + frame.len();
            let Some(mut record) = writer.reserve(memory, len).unwrap() else {
                break;
            };
            record.write(&[0; PACKET_HEADER_BYTES]);
            record.write(frame);
            record.commit();
        }
        if writer.publish(memory) {
            self.bell.ring();
        }
    }
}

/// A frame from the card `last` to nobody.
fn lost_frame(last: u8, payload: &[u8]) -> Vec<u8> {
    let from = (mac(last), [10, 0, 0, last], 5);
    udp_frame(from, (mac(99), [10, 0, 0, 99], 6), payload)
}

#[test]
fn port_that_has_slept_is_heard_in_a_flood() {
    for bytes in [0, 1400, 8900] {
        let mut desk = desk();
        let [mut floods, mut sleeper] = [1, 2].map(|last| Card::plugged_into(&desk, last));
        desk.answers().unwrap();
        let [flood, one] = [lost_frame(1, &vec![0; bytes]), lost_frame(2, &[])];
        let taken = |desk: &Desk, port| {
            let mut all = desk.server.switch.counters();
            all.find(|(id, _)| *id == port).unwrap().1.frames_in
        };
        for round in 1..=20 {
            // The flood has no end, and begins before the other wakes up.
            for _ in 0..round {
                floods.send(&flood, usize::MAX);
                assert_eq!(desk.server.turn(Some(Duration::ZERO)), None);
            }
            let before = taken(&desk, 1);
            sleeper.send(&one, 1);
            while taken(&desk, 2) < round {
                floods.send(&flood, usize::MAX);
                assert_eq!(desk.server.turn(Some(Duration::ZERO)), None);
                let ahead = usize::try_from(taken(&desk, 1) - before).unwrap();
                let ahead_bytes = i64::try_from(ahead * flood.len()).unwrap();
                let turns = 2 + TURNS_BETWEEN_LOOKS;
                assert!(
                    ahead <= usize::from(turns) * FRAMES_PER_TURN
                        && ahead_bytes <= i64::from(turns) * BYTES_PER_TURN,
                    "{ahead} frames of {bytes} went ahead"
                );
            }
        }
    }
}

/// A message with what it is about, of which some choices are sound.
fn message() -> impl Strategy<Value = (ToSwitch, u8)> {
    let id = prop_oneof![0u16..4, Just(240), Just(PORT_NUMBER_WRONG)];
    let (generation, name) = (0u32..3, prop_oneof![Just("m1"), Just(""), Just("a b")]);
    let message = (0u8..9, id, generation, name, any::<u8>(), any::<u64>());
    let message = message.prop_map(|(what, id, generation, name, last, number)| {
        let (wide, terms) = (u32::try_from(number >> 32).unwrap(), terms(name, last));
        match what {
            0 => ToSwitch::Ping(number),
            1 => ToSwitch::Restore(vec![
                LeaseTerms {
                    mac: [2, 0, 0, 0, 0, last],
                    address: wide.into(),
                    left_s: wide,
                };
                usize::from(last) * 4
            ]),
            2 | 3 => ToSwitch::SetPort {
                id,
                generation,
                terms,
            },
            4 => ToSwitch::SetUplink {
                id,
                generation,
                terms,
            },
            5 => ToSwitch::RemovePort(id),
            6 => ToSwitch::Capture {
                port: (last % 2 == 0).then_some(id),
                snap_bytes: wide,
                file_bytes: number >> (last % 64),
                within_ms: number >> (last % 63),
            },
            7 => ToSwitch::EndCapture,
            _ => ToSwitch::Report,
        }
    });
    (message, any::<u8>())
}

const PORT_NUMBER_WRONG: u16 = u16::MAX;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_sequence_of_messages_is_too_strange(messages in prop::collection::vec(message(), 0..40)) {
        let mut desk = desk();
        for (message, choice) in messages {
            let port = desk.port();
            let pipe = [desk.pipe.0.as_fd(), desk.pipe.1.as_fd()];
            match choice % 6 {
                0..3 => desk.tell(&message, &port),
                3 => desk.tell(&message, &pipe[..1]),
                4 => desk.tell(&message, &pipe),
                _ => desk.tell(&message, &[]),
            }
            for answer in desk.answers().unwrap() {
                let is_sound = match answer {
                    FromSwitch::Leased(leases) => leases.len() <= LEASES_MAX,
                    FromSwitch::Ports(ports) => ports.len() <= PORTS_MAX,
                    _ => true,
                };
                prop_assert!(is_sound);
            }
        }
    }
}
