//! Anything that a guest, clients, listeners and the clock may do, in any order.

use super::*;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Event {
    Heard {
        ports: Ports,
        op: u16,
        flags: u32,
        len: u16,
        room: u32,
        passed: u32,
    },
    Client(Vec<u8>),
    Dialled(bool),
    Woken {
        id: u64,
        hung_up: bool,
    },
    Said(usize),
    Closed(usize),
    Passed(u64),
}

fn events() -> impl Strategy<Value = Event> {
    let ports = (
        prop_oneof![0u32..3, FIRST_HOST_PORT..FIRST_HOST_PORT + 8],
        0u32..3,
    )
        .prop_map(|(host, guest)| Ports { host, guest });
    prop_oneof![
        6 => (ports, 0u16..9, 0u32..5, 0u16..9000, prop_oneof![Just(BUFFER), any::<u32>()], 0u32..9000)
            .prop_map(|(ports, op, flags, len, room, passed)|
                Event::Heard { ports, op, flags, len, room, passed }),
        2 => prop_oneof![Just(b"CONNECT 1\nabc".to_vec()), Just(b"CONN".to_vec()), any::<Vec<u8>>()]
            .prop_map(Event::Client),
        2 => any::<bool>().prop_map(Event::Dialled),
        2 => (0u64..20, any::<bool>()).prop_map(|(id, hung_up)| Event::Woken { id, hung_up }),
        4 => (0usize..5000).prop_map(Event::Said),
        1 => any::<usize>().prop_map(Event::Closed),
        1 => (0u64..12).prop_map(Event::Passed),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_the_exchange_keeps_its_bounds(events in prop::collection::vec(events(), 1..120)) {
        let mut rig = Rig::new();
        let mut clients = Vec::new();
        for event in events {
            match event {
                Event::Heard { ports, op, flags, len, room, passed } => {
                    let payload = vec![7; usize::from(len)];
                    let header = Header {
                        op, flags, len: len.into(), buf_alloc: room, fwd_cnt: passed,
                        ..rig.header(ports, Op::Request)
                    };
                    rig.exchange.hear(&header, &payload, rig.now);
                }
                Event::Client(said) => {
                    let (near, mut client) = pair();
                    client.write_all(&said).unwrap();
                    rig.exchange.accept(near, rig.now);
                    clients.push(client);
                }
                Event::Dialled(reached) => if let Some(dial) = rig.exchange.next_dial() {
                    let (near, client) = pair();
                    rig.exchange.dialled(dial.id, reached.then_some(near));
                    clients.push(client);
                },
                Event::Woken { id, hung_up } => rig.exchange.wake(id, hung_up, rig.now),
                Event::Said(room) => {
                    let mut buffer = vec![0; room];
                    if let Some(header) = rig.exchange.say(&mut buffer, rig.now) {
                        prop_assert!(header.len as usize <= room);
                    }
                }
                Event::Closed(n) => if !clients.is_empty() {
                    clients.swap_remove(n % clients.len());
                },
                Event::Passed(seconds) => {
                    rig.now += Duration::from_secs(seconds);
                    rig.exchange.expire(rig.now);
                }
            }
            let exchange = &rig.exchange;
            prop_assert!(exchange.by_ports.len() <= exchange.links.len());
            prop_assert!(exchange.ready.len() <= exchange.links.len() + 120);
            prop_assert!(exchange.by_ports.iter().all(|(p, id)| exchange.links[id].ports == *p));
            prop_assert!(exchange.next_deadline().is_none_or(|deadline| deadline > rig.now));
        }
        drop(clients);
        let ids: Vec<LinkId> = rig.exchange.links.keys().copied().collect();
        for id in ids {
            rig.exchange.wake(id, true, rig.now);
        }
        // With room at the guest, everything that waits for it is said, and then there is silence.
        let mut said = 0;
        while rig.say().is_some() {
            said += 1;
            prop_assert!(said < 10_000);
        }
    }
}
