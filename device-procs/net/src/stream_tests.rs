//! The device on a stream socket: the program at its other end is in the test.

use crate::device::Net;
use crate::offload::tests::{frame, plain};
use crate::port_tests::config;
use crate::request::{FRAME_BYTES_MAX, HEADER_BYTES, feature};
use bulkhead_ipc::protocol::birth::{FdRole, UringGrant};
use bulkhead_runtime::testing::Rig;
use bulkhead_runtime::{Device, DeviceFault};
use proptest::prelude::*;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const BUFFER_BYTES: usize = 70_000;

struct Desk {
    rig: Rig<Net>,
    /// The program's end.
    far: UnixStream,
}

fn desk() -> Desk {
    let (near, far) = UnixStream::pair().unwrap();
    for socket in [&near, &far] {
        socket.set_nonblocking(true).unwrap();
    }
    let held = vec![(FdRole::Frames, 0, near.into())];
    let mut rig: Rig<Net> = Rig::new(&config(1), held, &UringGrant::default()).unwrap();
    rig.start_driver(feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6);
    Desk { rig, far }
}

fn whole(frame: &[u8]) -> Vec<u8> {
    let length = u32::try_from(frame.len()).unwrap();
    [&length.to_be_bytes(), frame].concat()
}

impl Desk {
    fn offer(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.rig.submit(RECEIVE, None, &[], BUFFER_BYTES).unwrap();
        }
        self.rig.run().unwrap();
    }

    fn comes(&mut self, bytes: &[u8]) -> Result<(), DeviceFault> {
        self.far.write_all(bytes).unwrap();
        self.rig.run()
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        let answers = self.rig.answers(RECEIVE).into_iter();
        let frames = answers.map(|answer| {
            let mut header = [0; HEADER_BYTES];
            header[10] = 1;
            assert_eq!(answer.bytes[..HEADER_BYTES], header);
            answer.bytes[HEADER_BYTES..answer.written as usize].to_vec()
        });
        frames.collect()
    }

    fn transmit(&mut self, frame: &[u8]) {
        self.rig.submit(TRANSMIT, None, &plain(frame), 0).unwrap();
        self.rig.run().unwrap();
    }

    /// What has gone to the program, at most `most` bytes.
    fn gone(&mut self, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        match self.far.read(&mut bytes) {
            Ok(n) => bytes.truncate(n),
            Err(e) if e.kind() == ErrorKind::WouldBlock => bytes.clear(),
            Err(e) => panic!("{e}"),
        }
        bytes
    }
}

#[test]
fn frames_go_both_ways_behind_their_lengths() {
    let mut desk = desk();
    desk.offer(2);
    for len in [14, 33, 54, 55, 60, 1514, FRAME_BYTES_MAX] {
        desk.transmit(&frame(len));
        // Newer passts believe no larger one.
        let sent = if len > 65_535 {
            Vec::new()
        } else {
            whole(&frame(len))
        };
        assert_eq!(desk.gone(BUFFER_BYTES), sent);
        desk.comes(&whole(&frame(len))).unwrap();
        assert_eq!(desk.received(), [frame(len)]);
        desk.offer(1);
    }
    let offloads = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_USO;
    assert_eq!(desk.rig.device().features() & offloads, 0);
}

#[test]
fn frames_wait_for_buffers_and_none_is_lost() {
    let mut desk = desk();
    let frames: Vec<_> = (60..70).map(frame).collect();
    let bytes: Vec<u8> = frames.iter().flat_map(|frame| whole(frame)).collect();
    desk.comes(&bytes).unwrap();
    desk.offer(4);
    assert_eq!(desk.received(), frames[..4]);
    desk.offer(6);
    assert_eq!(desk.received(), frames[4..]);
}

#[test]
fn what_the_socket_has_no_room_for_goes_when_it_has() {
    let mut desk = desk();
    let sent: Vec<_> = (0..20).map(|n| frame(60_000 + n)).collect();
    for frame in &sent {
        desk.transmit(frame);
    }
    let done = desk.rig.answers(TRANSMIT).len();
    assert!(done < sent.len(), "the rest waits in the queue");
    let expected: Vec<u8> = sent.iter().flat_map(|frame| whole(frame)).collect();
    let mut got = Vec::new();
    while got.len() < expected.len() {
        let more = desk.gone(50_000);
        assert!(!more.is_empty(), "stuck after {} bytes", got.len());
        got.extend(more);
        desk.rig.run().unwrap();
    }
    assert!(got == expected);
    assert_eq!(done + desk.rig.answers(TRANSMIT).len(), sent.len());
}

#[test]
fn lengths_that_cannot_be_end_the_process() {
    for length in [0, 13, 65_558, u32::MAX] {
        let mut desk = desk();
        desk.offer(1);
        let ended = desk.comes(&length.to_be_bytes());
        assert!(matches!(ended, Err(DeviceFault::Ended { .. })), "{length}");
    }
}

#[test]
fn program_that_is_gone_ends_the_process_even_if_the_guest_has_no_buffers() {
    let Desk { mut rig, far } = desk();
    drop(far);
    let ended = rig.run();
    assert!(matches!(ended, Err(DeviceFault::Ended { .. })), "{ended:?}");
}

fn packet(ethernet_type: [u8; 2], addresses_at: usize, addresses: &[&[u8]]) -> Vec<u8> {
    let mut packet = frame(100);
    packet[12..14].copy_from_slice(&ethernet_type);
    let addresses = addresses.concat();
    packet[14 + addresses_at..][..addresses.len()].copy_from_slice(&addresses);
    packet
}

#[test]
fn packets_to_the_hosts_loopback_go_nowhere() {
    let v4 = |from: [u8; 4], to: [u8; 4]| packet([8, 0], 12, &[&from, &to]);
    let v6 = |from: &str, to: &str| {
        let octets = |text: &str| text.parse::<std::net::Ipv6Addr>().unwrap().octets();
        packet([0x86, 0xdd], 8, &[&octets(from), &octets(to)])
    };
    let guest = [10, 0, 2, 15];
    for dropped in [
        v4(guest, [127, 0, 0, 1]),
        v4(guest, [127, 255, 1, 2]),
        v4(guest, [0, 0, 0, 0]),
        v4([127, 0, 0, 1], [192, 0, 2, 1]),
        v6("fd00::2", "::1"),
        v6("fd00::2", "::"),
        v6("fd00::2", "::ffff:127.0.0.1"),
        v6("::1", "fd00::1"),
    ] {
        let mut desk = desk();
        desk.transmit(&dropped);
        assert!(desk.gone(BUFFER_BYTES).is_empty(), "{dropped:?}");
        assert_eq!(desk.rig.answers(TRANSMIT).len(), 1);
    }
    for passed in [
        v4(guest, [192, 0, 2, 1]),
        v4([0; 4], [255; 4]),
        v6("::", "ff02::1:ff00:2"),
        v6("fd00::2", "2001:db8::1"),
    ] {
        let mut desk = desk();
        desk.transmit(&passed);
        assert_eq!(desk.gone(BUFFER_BYTES), whole(&passed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn stream_is_the_same_however_it_is_cut(
        lengths in prop::collection::vec(14usize..3000, 1..20), cuts in prop::collection::vec(1usize..4000, 1..40),
    ) {
        let mut desk = desk();
        desk.offer(lengths.len());
        let frames: Vec<_> = lengths.into_iter().map(frame).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| whole(frame)).collect();
        let mut left = bytes.as_slice();
        for cut in cuts.into_iter().cycle() {
            let (part, rest) = left.split_at(cut.min(left.len()));
            desk.comes(part).unwrap();
            left = rest;
            if left.is_empty() { break; }
        }
        prop_assert_eq!(desk.received(), frames);
    }

    #[test]
    fn no_stream_is_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..2000), sound in 14u32..200) {
        let mut desk = desk();
        desk.offer(8);
        let begin = [&sound.to_be_bytes(), bytes.as_slice()].concat();
        if desk.comes(&begin).is_ok() {
            desk.transmit(&frame(60));
        }
        for frame in desk.received() {
            prop_assert!((14..=FRAME_BYTES_MAX).contains(&frame.len()));
        }
    }
}
