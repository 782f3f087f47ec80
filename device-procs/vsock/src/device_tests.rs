use super::*;
use crate::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM};
use bulkhead_ipc::protocol::birth::{DeviceConfig, UringGrant};
use bulkhead_runtime::testing::Rig;
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use tempfile::TempDir;

const GUEST: u64 = 3;
const BUFFER: usize = HEADER_BYTES + 4096;

struct Bench {
    rig: Rig<Sockets>,
    dir: TempDir,
}

fn bench_of(generation: u32, is_successor: bool) -> Bench {
    let config = DeviceConfig {
        kind: VirtioKind::Vsock,
        queue_sizes: vec![16, 16, 8],
        window_bytes: 2 << 20,
        features: 0,
        config: Vec::new(),
        own: DeviceOwn::Vsock {
            guest_cid: 3,
            generation,
            is_successor,
        },
    };
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let held = vec![(FdRole::Listener, 0, listener.into())];
    let rig = Rig::new(&config, held, &UringGrant::default()).unwrap();
    Bench { rig, dir }
}

fn bench() -> Bench {
    let mut bench = bench_of(1, false);
    bench.rig.start_driver(0);
    bench
}

impl Bench {
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("s")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    fn offer(&mut self, count: usize) {
        for _ in 0..count {
            self.rig.submit(RECEIVE, None, &[], BUFFER).unwrap();
        }
        self.rig.run().unwrap();
    }

    fn hear(&mut self, header: &Header, payload: &[u8]) {
        let packet = [&header.encode()[..], payload].concat();
        self.rig.submit(SEND, None, &packet, 0).unwrap();
        self.rig.run().unwrap();
        assert!(self.rig.answers(SEND).iter().all(|a| a.written == 0));
    }

    /// What the device says.
    fn said(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.rig.run().unwrap();
        let answers = self.rig.answers(RECEIVE).into_iter();
        answers
            .map(|answer| {
                let header = answer.bytes.first_chunk::<HEADER_BYTES>().unwrap();
                let header = Header::decode(header);
                let payload = &answer.bytes[HEADER_BYTES..answer.written as usize];
                assert_eq!(payload.len(), header.len as usize);
                (header, payload.to_vec())
            })
            .collect()
    }

    fn said_one(&mut self) -> (Header, Vec<u8>) {
        let mut said = self.said();
        assert_eq!(said.len(), 1, "{said:?}");
        said.remove(0)
    }

    /// A connection that a client has asked for, and the guest's answers are to.
    fn connected(&mut self) -> (UnixStream, Header) {
        let mut client = self.client();
        client.write_all(b"CONNECT 52\n").unwrap();
        let (asked, _) = self.said_one();
        assert_eq!((asked.op, asked.dst_port), (Op::Request.number(), 52));
        let guest = answer(&asked, Op::Response);
        self.hear(&guest, &[]);
        let greeting = format!("OK {}\n", asked.src_port);
        assert_eq!(text(&mut client), greeting.as_bytes());
        (client, guest)
    }
}

/// The guest's answer to a packet.
fn answer(to: &Header, op: Op) -> Header {
    Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: to.dst_port,
        dst_port: to.src_port,
        len: 0,
        kind: TYPE_STREAM,
        op: op.number(),
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    }
}

fn text(client: &mut UnixStream) -> Vec<u8> {
    let mut text = Vec::new();
    match client.read_to_end(&mut text) {
        Ok(_) => text.extend(b"<end>"),
        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
    }
    text
}

#[test]
fn client_reaches_the_guest_and_each_side_ends_by_itself() {
    let mut bench = bench();
    bench.offer(8);
    let (mut client, guest) = bench.connected();
    client.write_all(b"hello").unwrap();
    let (packet, payload) = bench.said_one();
    assert_eq!(
        (packet.op, &payload[..]),
        (Op::Payload.number(), &b"hello"[..])
    );
    let payload = Header {
        op: Op::Payload.number(),
        len: 2,
        ..guest
    };
    bench.hear(&payload, b"hi");
    assert_eq!(text(&mut client), b"hi");
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let (packet, _) = bench.said_one();
    assert_eq!(
        (packet.op, packet.flags),
        (Op::Shutdown.number(), SHUTDOWN_SEND)
    );
    let end = Header {
        op: Op::Shutdown.number(),
        flags: SHUTDOWN_BOTH,
        ..guest
    };
    bench.hear(&end, &[]);
    assert_eq!(bench.said_one().0.op, Op::Reset.number());
    assert_eq!(text(&mut client), b"<end>");
    assert!(bench.rig.device().exchange.is_empty());
}

#[test]
fn clients_wait_for_buffers_of_the_guest() {
    let mut bench = bench();
    let mut client = bench.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    assert!(bench.said().is_empty());
    bench.offer(1);
    assert_eq!(bench.said_one().0.op, Op::Request.number());
}

#[test]
fn client_that_is_gone_ends_its_connection() {
    let mut bench = bench();
    bench.offer(8);
    let (client, guest) = bench.connected();
    drop(client);
    let (packet, _) = bench.said_one();
    assert_eq!(
        (packet.op, packet.flags),
        (Op::Shutdown.number(), SHUTDOWN_BOTH)
    );
    bench.hear(
        &Header {
            op: Op::Reset.number(),
            ..guest
        },
        &[],
    );
    assert!(bench.rig.device().exchange.is_empty());
}

#[test]
fn guest_is_refused_when_no_broker_can_be_asked() {
    let mut bench = bench();
    bench.offer(2);
    let request = Header {
        src_cid: GUEST,
        dst_cid: HOST_CID,
        src_port: 1024,
        dst_port: 9,
        len: 0,
        kind: TYPE_STREAM,
        op: Op::Request.number(),
        flags: 0,
        buf_alloc: 4096,
        fwd_cnt: 0,
    };
    bench.hear(&request, &[]);
    let (packet, _) = bench.said_one();
    assert_eq!(packet.op, Op::Reset.number());
    assert_eq!((packet.src_port, packet.dst_port), (9, 1024));
}

#[test]
fn successor_tells_of_the_end_and_is_quiet_until_that_is_known() {
    let mut bench = bench_of(2, true);
    bench.rig.start_driver(0);
    bench.offer(4);
    // A packet of a connection of the process before.
    let mut stale = answer(
        &Header {
            src_port: 1 << 30,
            dst_port: 52,
            ..Header::decode(&[0; HEADER_BYTES])
        },
        Op::Payload,
    );
    stale.len = 1;
    bench.hear(&stale, b"x");
    assert!(bench.said().is_empty(), "the guest has not been told yet");
    for _ in 0..4 {
        bench.rig.submit(EVENT, None, &[], 4).unwrap();
    }
    bench.rig.run().unwrap();
    let events = bench.rig.answers(EVENT);
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].written, &events[0].bytes[..]), (4, &[0; 4][..]));
    assert!(bench.said().is_empty(), "the guest has not taken it in yet");
    bench.rig.submit(EVENT, None, &[], 4).unwrap();
    bench.rig.run().unwrap();
    let (packet, _) = bench.said_one();
    assert_eq!(packet.op, Op::Reset.number());
    let (_client, guest) = bench.connected();
    assert!(guest.dst_port > 1 << 30, "no port of its predecessor");
    assert!(bench.rig.answers(EVENT).is_empty(), "it is told once");
}

#[test]
fn guest_that_takes_no_event_in_is_served_after_a_while() {
    let mut bench = bench_of(2, true);
    bench.rig.start_driver(0);
    bench.offer(4);
    let mut client = bench.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    assert!(bench.said().is_empty());
    assert!(bench.rig.device().wakes_in().is_some());
    std::thread::sleep(QUIET);
    assert_eq!(bench.said_one().0.op, Op::Request.number());
}

#[test]
fn reset_of_the_driver_ends_everything_and_gives_buffers_back() {
    let mut bench = bench();
    bench.offer(4);
    bench.rig.submit(EVENT, None, &[], 4).unwrap();
    let (mut client, _) = bench.connected();
    bench.rig.reset_driver();
    bench.rig.run().unwrap();
    let empty = |queue, bench: &mut Bench| {
        let answers = bench.rig.answers(queue);
        assert!(answers.iter().all(|answer| answer.written == 0));
        answers.len()
    };
    assert_eq!(empty(RECEIVE, &mut bench), 3);
    assert_eq!(empty(EVENT, &mut bench), 1);
    assert_eq!(text(&mut client), b"<end>");
    bench.rig.start_driver(0);
    bench.offer(4);
    bench.connected();
}

#[test]
fn buffers_that_hold_no_header_are_given_back_empty() {
    let mut bench = bench();
    bench.rig.submit(RECEIVE, None, &[], 43).unwrap();
    bench.offer(1);
    let mut client = bench.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    bench.rig.run().unwrap();
    let answers = bench.rig.answers(RECEIVE);
    let written: Vec<u32> = answers.iter().map(|answer| answer.written).collect();
    assert_eq!(written, [0, 44]);
}

#[test]
fn clients_come_in_any_number_and_go() {
    let mut bench = bench();
    for _ in 0..3 {
        // More than are taken in one turn.
        let clients: Vec<_> = (0..100).map(|_| bench.client()).collect();
        bench.rig.run().unwrap();
        bench.rig.run().unwrap();
        assert_eq!(bench.rig.device().exchange.len(), 100);
        drop(clients);
        bench.rig.run().unwrap();
        bench.rig.run().unwrap();
        assert!(bench.rig.device().exchange.is_empty());
    }
}

proptest! {
    #[test]
    fn any_chain_on_any_queue_is_survived(
        requests in prop::collection::vec((0usize..3, prop::collection::vec(
            (0usize..1 << 21, any::<u32>(), any::<bool>()), 1..4)), 1..8),
    ) {
        let mut bench = bench();
        let mut client = bench.client();
        client.write_all(b"CONNECT 1\nand so on").unwrap();
        for (queue, spans) in requests {
            let spans = spans.into_iter().map(|(at, len, writable)| (at, len % 70_000, writable));
            bench.rig.submit_any(queue, None, spans.collect());
        }
        bench.rig.run().unwrap();
        bench.rig.reset_driver();
        bench.rig.run().unwrap();
    }
}
