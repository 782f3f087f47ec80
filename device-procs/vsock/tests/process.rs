//! The program as a process: born behind its built-in policy, serving, ending.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, FdRole, KindConfig};
use bulkhead_ipc::protocol::device::{DIALS_MAX, FromDevice, ToDevice};
use bulkhead_runtime::testing::Gate;
use bulkhead_runtime::testing::process::{Process, Upbringing, gate_grants};
use bulkhead_vsock::packet::{HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);
const BUFFER: usize = HEADER_BYTES + 4096;

struct Served {
    gate: Gate,
    process: Process,
    dir: TempDir,
}

fn served() -> Served {
    let gate = Gate::new(VirtioKind::Vsock, 2 << 20, &[128, 128, 8]);
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    listener.set_nonblocking(true).unwrap();
    let config = DeviceConfig {
        kind: VirtioKind::Vsock,
        queue_sizes: vec![128, 128, 8],
        window_bytes: 2 << 20,
        features: 0,
        config: Vec::new(),
        own: DeviceOwn::Vsock {
            guest_cid: 3,
            generation: 1,
            is_successor: false,
        },
    };
    let mut grants = gate_grants(&gate);
    grants.push((FdRole::Listener, 0, listener.into()));
    let upbringing = Upbringing::new(ProcKind::Vsock, KindConfig::Device(config));
    let program = env!("CARGO_BIN_EXE_bulkhead-vsock");
    let process = Process::spawn(program, upbringing, grants);
    let mut served = Served { gate, process, dir };
    served.process.assert_serving();
    served.gate.start_driver(0);
    served
}

impl Served {
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.dir.path().join("s")).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client
    }

    fn hear(&mut self, header: &Header, payload: &[u8]) {
        let packet = [&header.encode()[..], payload].concat();
        self.gate.submit(1, None, &packet, 0).unwrap();
        assert_eq!(self.gate.await_answers(1, 1).len(), 1, "{}", self.end());
    }

    /// The next packet, for which a buffer is offered.
    fn said(&mut self) -> (Header, Vec<u8>) {
        self.gate.submit(0, None, &[], BUFFER).unwrap();
        let answers = self.gate.await_answers(0, 1);
        assert_eq!(answers.len(), 1, "{}", self.end());
        let bytes = &answers[0].bytes[..answers[0].written as usize];
        let header = Header::decode(bytes.first_chunk().unwrap());
        (header, bytes[HEADER_BYTES..].to_vec())
    }

    fn end(&self) -> String {
        format!("denied: {:?}", self.process.page.denial())
    }
}

fn packet(op: Op, ports: (u32, u32)) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: ports.0,
        dst_port: ports.1,
        len: 0,
        kind: TYPE_STREAM,
        op: op.number(),
        flags: 0,
        buf_alloc: 1 << 16,
        fwd_cnt: 0,
    }
}

#[test]
fn process_carries_connections_of_both_sides_and_ends() {
    let mut served = served();
    let mut client = served.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    let (asked, _) = served.said();
    assert_eq!((asked.op, asked.dst_port), (Op::Request.number(), 52));
    let ports = (52, asked.src_port);
    served.hear(&packet(Op::Response, ports), &[]);
    let expected = format!("OK {}\n", asked.src_port);
    let mut greeting = vec![0; expected.len()];
    client.read_exact(&mut greeting).unwrap();
    assert_eq!(greeting, expected.as_bytes());
    client.write_all(b"hello").unwrap();
    assert_eq!(served.said().1, b"hello");
    let end = Header {
        flags: SHUTDOWN_BOTH,
        ..packet(Op::Shutdown, ports)
    };
    served.hear(&end, &[]);
    assert_eq!(served.said().0.op, Op::Reset.number());
    assert_eq!(client.read(&mut [0; 1]).unwrap(), 0);

    served.hear(&packet(Op::Request, (1024, 9)), &[]);
    let (near, mut far) = UnixStream::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    let (dial, _) = served.process.channel.recv_within(PATIENCE).unwrap();
    let FromDevice::Dial { id, port: 9, .. } = dial else {
        panic!("{dial:?}");
    };
    let answer = ToDevice::Dialled { id };
    let channel = &served.process.channel;
    channel.send(&answer, &[near.as_fd()]).unwrap();
    drop(near);
    assert_eq!(served.said().0.op, Op::Response.number());
    far.write_all(b"from afar").unwrap();
    assert_eq!(served.said().1, b"from afar");
    let payload = Header {
        len: 2,
        ..packet(Op::Payload, (1024, 9))
    };
    served.hear(&payload, b"hi");
    let mut got = [0; 2];
    far.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hi");
    drop(far);
    let (packet, _) = served.said();
    assert_eq!(
        (packet.op, packet.flags),
        (Op::Shutdown.number(), SHUTDOWN_BOTH)
    );
    served.process.assert_ends_quietly();
}

#[test]
fn guest_that_asks_for_more_than_the_broker_answers_waits() {
    let mut served = served();
    for port in 0..100 {
        served.hear(&packet(Op::Request, (1024 + port, 9)), &[]);
    }
    let dials = |channel: &Channel| {
        std::iter::from_fn(|| {
            let next = channel.recv_within::<FromDevice>(Duration::from_millis(200));
            match next.ok()?.0 {
                FromDevice::Dial { id, .. } => Some(id),
                other => panic!("{other:?}"),
            }
        })
        .collect::<Vec<_>>()
    };
    let channel = &served.process.channel;
    let asked = dials(channel);
    assert_eq!(asked.len(), DIALS_MAX);
    for &id in &asked[..10] {
        channel.send(&ToDevice::Dialled { id }, &[]).unwrap();
    }
    assert_eq!(dials(channel).len(), 10);
    for _ in 0..10 {
        assert_eq!(served.said().0.op, Op::Reset.number());
    }
}
