use super::*;
use crate::link::{ANSWER_TIMEOUT, DRAIN_TIMEOUT, LINGER};
use crate::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

const CID: u64 = 3;
const BUFFER: u32 = 64 * 1024;

/// An exchange, and a guest that says what a test tells it to.
struct Rig {
    exchange: Exchange<UnixStream>,
    now: Instant,
    /// What the guest says of its room with each packet.
    room: u32,
    passed: u32,
}

fn pair() -> (UnixStream, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_nonblocking(true).unwrap();
    (near, far)
}

fn pattern(bytes: usize) -> Vec<u8> {
    let step = |x: &mut u32| {
        *x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        Some(x.to_be_bytes()[0])
    };
    std::iter::successors(Some(()), |()| Some(()))
        .scan(1, |x, ()| step(x))
        .take(bytes)
        .collect()
}

impl Rig {
    fn new() -> Self {
        Self {
            exchange: Exchange::new(CID),
            now: Instant::now(),
            room: BUFFER,
            passed: 0,
        }
    }

    fn header(&self, ports: Ports, op: Op) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: ports.guest,
            dst_port: ports.host,
            len: 0,
            kind: TYPE_STREAM,
            op: op.number(),
            flags: 0,
            buf_alloc: self.room,
            fwd_cnt: self.passed,
        }
    }

    fn hear(&mut self, ports: Ports, op: Op, flags: u32, payload: &[u8]) {
        let len = u32::try_from(payload.len()).unwrap();
        let header = Header {
            len,
            flags,
            ..self.header(ports, op)
        };
        self.exchange.hear(&header, payload, self.now);
    }

    fn say(&mut self) -> Option<(Op, Header, Vec<u8>)> {
        let mut buffer = vec![0; 4096];
        let header = self.exchange.say(&mut buffer, self.now)?;
        assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, CID));
        buffer.truncate(usize::try_from(header.len).unwrap());
        Some((Op::from_number(header.op).unwrap(), header, buffer))
    }

    fn says(&mut self) -> Vec<Op> {
        std::iter::from_fn(|| self.say().map(|(op, ..)| op)).collect()
    }

    /// A connection that a client has asked for and the guest has accepted.
    fn connected(&mut self, port: u32) -> (Ports, LinkId, UnixStream) {
        let (near, mut client) = pair();
        writeln!(client, "CONNECT {port}").unwrap();
        let id = self.exchange.accept(near, self.now).unwrap();
        let (op, header, _) = self.say().unwrap();
        assert_eq!((op, header.dst_port), (Op::Request, port));
        let ports = Ports {
            host: header.src_port,
            guest: port,
        };
        self.hear(ports, Op::Response, 0, &[]);
        assert_eq!(
            heard(&mut client),
            format!("OK {}\n", ports.host).as_bytes()
        );
        assert_eq!(self.says(), []);
        (ports, id, client)
    }

    /// A connection that the guest has asked for and a listener has accepted.
    fn dialled(&mut self, ports: Ports) -> (LinkId, UnixStream) {
        let (near, listener) = pair();
        self.hear(ports, Op::Request, 0, &[]);
        let dial = self.exchange.next_dial().unwrap();
        assert_eq!(dial.port, ports.host);
        assert!(self.exchange.dialled(dial.id, Some(near)));
        assert_eq!(self.says(), [Op::Response]);
        (dial.id, listener)
    }
}

/// What there is to read now.
fn heard(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    match client.read_to_end(&mut bytes) {
        Ok(_) => {}
        Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
    }
    bytes
}

fn is_at_end(client: &mut UnixStream) -> bool {
    matches!(Read::read(client, &mut [0]), Ok(0))
}

const HERE: Ports = Ports {
    host: 80,
    guest: 1024,
};

#[test]
fn client_is_connected_when_the_guest_accepts() {
    let mut rig = Rig::new();
    let (ports, id, mut client) = rig.connected(52);
    client.write_all(b"to the guest").unwrap();
    rig.exchange.wake(id, false, rig.now);
    let (op, header, payload) = rig.say().unwrap();
    assert_eq!(
        (op, payload.as_slice()),
        (Op::Payload, b"to the guest".as_slice())
    );
    assert_eq!((header.src_port, header.dst_port), (ports.host, 52));
    rig.hear(ports, Op::Payload, 0, b"to the client");
    assert_eq!(heard(&mut client), b"to the client");
}

#[test]
fn payload_behind_the_greeting_is_the_first_that_the_guest_gets() {
    let mut rig = Rig::new();
    let (near, mut client) = pair();
    client
        .write_all(b"CONNECT 9\nat once, and more than a greeting holds")
        .unwrap();
    rig.exchange.accept(near, rig.now).unwrap();
    let (_, header, _) = rig.say().unwrap();
    rig.hear(
        Ports {
            host: header.src_port,
            guest: 9,
        },
        Op::Response,
        0,
        &[],
    );
    let got: Vec<u8> = std::iter::from_fn(|| rig.say())
        .flat_map(|(.., payload)| payload)
        .collect();
    assert_eq!(got, b"at once, and more than a greeting holds");
}

#[test]
fn client_that_the_guest_refuses_sees_the_end() {
    let mut rig = Rig::new();
    let (near, mut client) = pair();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.exchange.accept(near, rig.now).unwrap();
    let (_, header, _) = rig.say().unwrap();
    rig.hear(
        Ports {
            host: header.src_port,
            guest: 52,
        },
        Op::Reset,
        0,
        &[],
    );
    assert!(is_at_end(&mut client));
    assert!(rig.exchange.is_empty());
    assert_eq!(rig.says(), []);
}

#[test]
fn client_with_another_greeting_or_none_is_let_go() {
    let mut rig = Rig::new();
    let (near, mut rude) = pair();
    rude.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    rig.exchange.accept(near, rig.now).unwrap();
    assert!(is_at_end(&mut rude));
    let (near, mut silent) = pair();
    rig.exchange.accept(near, rig.now).unwrap();
    assert_eq!(
        rig.exchange.next_deadline(),
        Some(rig.now + GREETING_TIMEOUT)
    );
    rig.now += GREETING_TIMEOUT;
    rig.exchange.expire(rig.now);
    assert!(is_at_end(&mut silent));
    assert!(rig.exchange.is_empty());
}

#[test]
fn guest_that_does_not_answer_is_given_up() {
    let mut rig = Rig::new();
    let (near, mut client) = pair();
    client.write_all(b"CONNECT 52\n").unwrap();
    rig.exchange.accept(near, rig.now).unwrap();
    assert_eq!(rig.says(), [Op::Request]);
    rig.now += ANSWER_TIMEOUT;
    rig.exchange.expire(rig.now);
    assert_eq!(rig.says(), [Op::Reset]);
    assert!(is_at_end(&mut client));
}

#[test]
fn guest_reaches_a_listener_or_is_refused() {
    let mut rig = Rig::new();
    let (_, mut listener) = rig.dialled(HERE);
    rig.hear(HERE, Op::Payload, 0, b"hello");
    assert_eq!(heard(&mut listener), b"hello");
    let nobody = Ports {
        host: 81,
        guest: 1025,
    };
    rig.hear(nobody, Op::Request, 0, &[]);
    let dial = rig.exchange.next_dial().unwrap();
    assert!(!rig.exchange.dialled(dial.id, None));
    let (op, header, _) = rig.say().unwrap();
    assert_eq!(
        (op, header.src_port, header.dst_port),
        (Op::Reset, 81, 1025)
    );
    assert_eq!(rig.exchange.len(), 1);
}

#[test]
fn listener_that_is_reached_too_late_is_let_go() {
    let mut rig = Rig::new();
    rig.hear(HERE, Op::Request, 0, &[]);
    let dial = rig.exchange.next_dial().unwrap();
    rig.hear(HERE, Op::Reset, 0, &[]);
    let (near, mut listener) = pair();
    assert!(!rig.exchange.dialled(dial.id, Some(near)));
    assert!(is_at_end(&mut listener));
    rig.hear(HERE, Op::Request, 0, &[]);
    rig.hear(HERE, Op::Reset, 0, &[]);
    assert_eq!(
        rig.exchange.next_dial(),
        None,
        "what was given up is not dialled"
    );
    for _ in 0..5000 {
        rig.hear(HERE, Op::Request, 0, &[]);
        rig.hear(HERE, Op::Reset, 0, &[]);
    }
    assert_eq!(rig.exchange.dials.len(), 0, "nor is it kept");
}

#[test]
fn packets_of_another_guest_end_nothing() {
    let mut rig = Rig::new();
    let (ports, _, mut client) = rig.connected(52);
    let reset = rig.header(ports, Op::Reset);
    for foreign in [
        Header {
            src_cid: CID + 1,
            ..reset
        },
        Header {
            dst_cid: CID,
            ..reset
        },
    ] {
        rig.exchange.hear(&foreign, &[], rig.now);
    }
    rig.hear(ports, Op::Payload, 0, b"still there");
    assert_eq!(heard(&mut client), b"still there");
}

#[test]
fn half_closed_connection_goes_on_in_the_other_direction() {
    let mut rig = Rig::new();
    let (ports, id, mut client) = rig.connected(52);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    rig.exchange.wake(id, false, rig.now);
    assert_eq!(rig.say().unwrap().2, b"last words");
    let (op, header, _) = rig.say().unwrap();
    assert_eq!((op, header.flags), (Op::Shutdown, SHUTDOWN_SEND));
    rig.hear(ports, Op::Payload, 0, b"an answer");
    rig.hear(ports, Op::Shutdown, SHUTDOWN_SEND, &[]);
    assert_eq!(heard(&mut client), b"an answer");
    assert!(is_at_end(&mut client));
    assert_eq!(rig.exchange.len(), 1, "the guest has not closed it");
    rig.hear(ports, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.says(), [Op::Reset]);
    assert!(rig.exchange.is_empty());
}

#[test]
fn guest_may_use_a_port_again_while_its_last_bytes_are_read() {
    let mut rig = Rig::new();
    let (old, mut slow) = rig.dialled(HERE);
    let sent = fill(&mut rig, HERE, &slow);
    rig.hear(HERE, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.says(), [Op::Reset]);
    let (_, mut new) = rig.dialled(HERE);
    rig.hear(HERE, Op::Payload, 0, b"new");
    assert_eq!(heard(&mut new), b"new");
    let mut got = heard(&mut slow);
    rig.exchange.wake(old, false, rig.now);
    got.extend(heard(&mut slow));
    assert!(got == sent, "{} of {} bytes", got.len(), sent.len());
    assert!(is_at_end(&mut slow));
    assert_eq!(rig.exchange.len(), 1);
    assert_eq!(rig.says(), [], "the guest hears nothing of the old one");
    rig.hear(HERE, Op::Payload, 0, b"still there");
    assert_eq!(heard(&mut new), b"still there");
}

/// Has the guest send until something is kept in the exchange; returns what it sent.
fn fill(rig: &mut Rig, ports: Ports, _unread: &UnixStream) -> Vec<u8> {
    let mut sent = Vec::new();
    loop {
        let part = pattern(16 * 1024);
        rig.hear(ports, Op::Payload, 0, &part);
        sent.extend(part);
        rig.hear(ports, Op::CreditRequest, 0, &[]);
        let (op, header, _) = rig.say().unwrap();
        assert_eq!(op, Op::CreditUpdate);
        if header.fwd_cnt < u32::try_from(sent.len()).unwrap() {
            return sent;
        }
    }
}

#[test]
fn last_bytes_that_nobody_reads_are_not_kept_for_ever() {
    let mut rig = Rig::new();
    let (_, slow) = rig.dialled(HERE);
    fill(&mut rig, HERE, &slow);
    rig.hear(HERE, Op::Shutdown, SHUTDOWN_BOTH, &[]);
    assert_eq!(rig.exchange.len(), 1);
    rig.now += DRAIN_TIMEOUT;
    rig.exchange.expire(rig.now);
    assert!(rig.exchange.is_empty());
}

#[test]
fn guest_that_sends_more_than_there_is_room_for_loses_the_connection() {
    let mut rig = Rig::new();
    let (_, slow) = rig.dialled(HERE);
    fill(&mut rig, HERE, &slow);
    for _ in 0..5 {
        rig.hear(HERE, Op::Payload, 0, &pattern(16 * 1024));
    }
    assert!(rig.says().contains(&Op::Reset));
    assert!(rig.exchange.is_empty());
}

#[test]
fn guest_without_room_is_sent_nothing_but_one_question() {
    let mut rig = Rig::new();
    rig.room = 5;
    let (ports, id, mut client) = rig.connected(52);
    client.write_all(b"123456789").unwrap();
    rig.exchange.wake(id, false, rig.now);
    assert_eq!(rig.say().unwrap().2, b"12345");
    assert_eq!(rig.says(), [Op::CreditRequest]);
    rig.exchange.wake(id, false, rig.now);
    assert_eq!(rig.says(), []);
    rig.passed = 5;
    rig.hear(ports, Op::CreditUpdate, 0, &[]);
    assert_eq!(rig.say().unwrap().2, b"6789");
    rig.passed = 7;
    rig.hear(ports, Op::CreditUpdate, 0, &[]);
    client.write_all(b"and so on").unwrap();
    rig.exchange.wake(id, false, rig.now);
    assert_eq!(rig.say().unwrap().2, b"and", "of 5 bytes it has 2 in use");
    assert_eq!(
        rig.says(),
        [Op::CreditRequest],
        "news of room allow another"
    );
}

#[test]
fn client_that_is_gone_is_told_once_and_the_guest_has_time_to_close() {
    let mut rig = Rig::new();
    let (ports, id, client) = rig.connected(52);
    drop(client);
    rig.exchange.wake(id, true, rig.now);
    let flags: Vec<u32> = std::iter::from_fn(|| rig.say())
        .map(|(_, h, _)| h.flags)
        .collect();
    assert_eq!(flags, [SHUTDOWN_BOTH]);
    rig.hear(ports, Op::Payload, 0, b"on its way before the guest knew");
    assert_eq!(rig.exchange.len(), 1);
    rig.now += LINGER;
    rig.exchange.expire(rig.now);
    assert_eq!(rig.says(), [Op::Reset]);
    assert!(rig.exchange.is_empty());
}

#[test]
fn guest_whose_client_is_gone_has_room_for_what_nobody_reads() {
    let mut rig = Rig::new();
    let (id, gone) = rig.dialled(HERE);
    let mut sent = fill(&mut rig, HERE, &gone).len();
    drop(gone);
    rig.exchange.wake(id, true, rig.now);
    for _ in 0..10 {
        rig.hear(HERE, Op::Payload, 0, &pattern(16 * 1024));
        sent += 16 * 1024;
    }
    let mut told = 0;
    while let Some((op, header, _)) = rig.say() {
        assert_ne!(op, Op::Reset);
        told = header.fwd_cnt;
    }
    assert_eq!(usize::try_from(told).unwrap(), sent);
}

#[test]
fn client_of_a_guest_that_does_not_receive_cannot_send() {
    let mut rig = Rig::new();
    let (ports, _, mut client) = rig.connected(52);
    rig.hear(ports, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    let error = client.write_all(b"for nobody").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    rig.hear(ports, Op::Payload, 0, b"but hears");
    assert_eq!(heard(&mut client), b"but hears");
}

#[test]
fn guest_that_sends_after_its_end_loses_the_connection() {
    let mut rig = Rig::new();
    let (ports, ..) = rig.connected(52);
    rig.hear(ports, Op::Shutdown, SHUTDOWN_SEND, &[]);
    rig.hear(ports, Op::Payload, 0, b"more");
    assert_eq!(rig.says(), [Op::Reset]);
    assert!(rig.exchange.is_empty());
}

#[test]
fn client_that_is_gone_is_noticed_though_the_guest_does_not_receive() {
    let mut rig = Rig::new();
    let (ports, id, client) = rig.connected(52);
    rig.hear(ports, Op::Shutdown, SHUTDOWN_RECEIVE, &[]);
    drop(client);
    rig.exchange.wake(id, true, rig.now);
    assert_eq!(rig.says(), [Op::Shutdown]);
    assert_eq!(rig.exchange.next_deadline(), Some(rig.now + LINGER));
}

#[test]
fn packets_that_make_no_sense_are_answered_by_a_reset_or_not_at_all() {
    let mut rig = Rig::new();
    let (ports, ..) = rig.connected(52);
    let sound = rig.header(ports, Op::CreditUpdate);
    for ignored in [
        Header {
            src_cid: CID + 1,
            ..sound
        },
        Header {
            dst_cid: 9,
            ..sound
        },
        Header {
            op: Op::Reset.number(),
            src_port: 77,
            ..sound
        },
    ] {
        rig.exchange.hear(&ignored, &[], rig.now);
        assert_eq!(rig.says(), []);
        assert_eq!(rig.exchange.len(), 1);
    }
    for strange in [
        Header {
            op: Op::Payload.number(),
            src_port: 77,
            ..sound
        },
        Header { op: 0, ..sound },
        Header { op: 8, ..sound },
        Header { kind: 2, ..sound },
        Header {
            op: Op::Request.number(),
            ..sound
        },
        Header {
            op: Op::Response.number(),
            ..sound
        },
        Header {
            op: Op::Payload.number(),
            len: 1,
            ..sound
        },
        Header {
            op: Op::Payload.number(),
            len: u32::MAX,
            ..sound
        },
    ] {
        let (ports, ..) = rig.connected(strange.src_port + 1);
        let (port, known) = (strange.src_port, strange.src_port == sound.src_port);
        let strange = Header {
            src_port: port + u32::from(known),
            dst_port: ports.host,
            ..strange
        };
        let before = rig.exchange.len();
        rig.exchange.hear(&strange, &[], rig.now);
        assert_eq!(rig.says(), [Op::Reset], "{strange:?}");
        assert_eq!(
            rig.exchange.len(),
            before - usize::from(known),
            "{strange:?}"
        );
    }
}

#[test]
fn there_are_no_more_connections_than_the_limit() {
    let mut rig = Rig::new();
    for guest in 0..2000 {
        rig.hear(Ports { host: 80, guest }, Op::Request, 0, &[]);
    }
    assert_eq!(rig.exchange.len(), CONNECTIONS_MAX);
    assert_eq!(rig.says(), vec![Op::Reset; 2000 - CONNECTIONS_MAX]);
    let (near, mut client) = pair();
    assert_eq!(rig.exchange.accept(near, rig.now), None);
    assert!(is_at_end(&mut client));
    for guest in 0..10_000 {
        rig.hear(
            Ports {
                host: 80,
                guest: 5000 + guest,
            },
            Op::Request,
            0,
            &[],
        );
    }
    assert_eq!(
        rig.says().len(),
        RESETS_MAX,
        "what the guest does not take is not kept"
    );
    rig.exchange.forget();
    assert!(rig.exchange.is_empty() && rig.exchange.next_dial().is_none());
}

#[test]
fn buffer_without_room_for_payload_loses_nothing() {
    let mut rig = Rig::new();
    let (_, id, mut client) = rig.connected(52);
    client.write_all(b"patience").unwrap();
    rig.exchange.wake(id, false, rig.now);
    assert_eq!(rig.exchange.say(&mut [], rig.now), None);
    assert_eq!(rig.say().unwrap().2, b"patience");
}

#[test]
fn connections_take_turns() {
    let mut rig = Rig::new();
    let mut open: Vec<_> = (0..3).map(|n| rig.connected(100 + n)).collect();
    for (_, id, client) in &mut open {
        client.write_all(&pattern(20_000)).unwrap();
        rig.exchange.wake(*id, false, rig.now);
    }
    let ports: Vec<u32> = (0..9).map(|_| rig.say().unwrap().1.dst_port).collect();
    assert_eq!(ports, [100, 101, 102, 100, 101, 102, 100, 101, 102]);
}

#[test]
fn megabytes_arrive_whole_in_both_directions() {
    let mut rig = Rig::new();
    let (ports, id, mut client) = rig.connected(52);
    let data = pattern(3 << 20);
    let (mut written, mut at_guest) = (0, Vec::new());
    let (mut sent, mut at_client) = (0usize, Vec::new());
    let mut known = 0;
    while at_guest.len() < data.len() || at_client.len() < data.len() {
        if let Ok(n) = Write::write(&mut client, &data[written..]) {
            written += n;
        }
        at_client.extend(heard(&mut client));
        rig.exchange.wake(id, false, rig.now);
        while let Some((_, header, payload)) = rig.say() {
            at_guest.extend(payload);
            known = usize::try_from(header.fwd_cnt).unwrap();
        }
        rig.passed = u32::try_from(at_guest.len()).unwrap();
        rig.hear(ports, Op::CreditUpdate, 0, &[]);
        let room = (usize::try_from(BUFFER).unwrap() - (sent - known)).min(data.len() - sent);
        let part = &data[sent..sent + room.min(10_000)];
        rig.hear(ports, Op::Payload, 0, part);
        sent += part.len();
    }
    assert!(at_guest == data && at_client == data);
}

#[path = "exchange_random_tests.rs"]
mod random;
