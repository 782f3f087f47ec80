//! The device against a gate in the same process, with a pair of sockets in the place of a TAP interface: they keep
//! messages apart as it does.

use crate::device::Net;
use crate::offload::tests::{frame, is_whole, plain, tcp, with_header};
use crate::request::{HEADER_BYTES, feature};
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{
    DeviceConfig, DeviceOwn, DiskLimits, FdRole, Rate, UringGrant,
};
use bulkhead_ipc::protocol::device::Direction;
use bulkhead_runtime::Device;
use bulkhead_runtime::testing::Rig;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};
use proptest::prelude::*;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const LARGE: u64 = feature::GUEST_CSUM | feature::GUEST_TSO4 | feature::GUEST_TSO6;
const ALL: u64 = LARGE
    | feature::CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::MRG_RXBUF
    | feature::STATUS
    | feature::CTRL_VQ
    | feature::MQ;

struct Desk {
    rig: Rig<Net>,
    /// The far ends of the wire's queues.
    far: Vec<OwnedFd>,
}

fn desk_of(pairs: usize, features: u64, limits: DiskLimits) -> Desk {
    let mut queue_sizes = vec![64; 2 * pairs];
    if pairs > 1 {
        queue_sizes.push(16);
    }
    let config = DeviceConfig {
        kind: VirtioKind::Net,
        queue_sizes,
        window_bytes: 8 << 20,
        features: u64::MAX,
        config: Vec::new(),
        own: DeviceOwn::Net {
            link_up: true,
            cuts_udp: false,
            limits,
        },
    };
    let (mut held, mut far) = (Vec::new(), Vec::new());
    for index in (0..).take(pairs) {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let (near, end) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        for socket in [&near, &end] {
            setsockopt(socket, sockopt::SndBuf, &(1 << 20)).unwrap();
        }
        held.push((FdRole::Tap, index, near));
        far.push(end);
    }
    let mut rig: Rig<Net> = Rig::new(&config, held, &UringGrant::default()).unwrap();
    rig.start_driver(features);
    Desk { rig, far }
}

fn desk(features: u64) -> Desk {
    desk_of(1, features, DiskLimits::default())
}

impl Desk {
    /// Something comes from the wire.
    fn comes(&mut self, message: &[u8]) {
        self.comes_to(0, message);
    }

    fn comes_to(&mut self, queue: usize, message: &[u8]) {
        let fd = self.far[queue].as_raw_fd();
        assert_eq!(send(fd, message, MsgFlags::empty()), Ok(message.len()));
        self.rig.run().unwrap();
    }

    /// What has gone to the wire.
    fn gone(&self, queue: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        let mut buffer = vec![0; 70_000];
        loop {
            match recv(self.far[queue].as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(n) => all.push(buffer[..n].to_vec()),
                Err(Errno::EAGAIN) => return all,
                Err(errno) => panic!("{errno}"),
            }
        }
    }

    fn offer(&mut self, queue: usize, buffers: usize, len: usize) {
        for _ in 0..buffers {
            self.rig.submit(queue, None, &[], len).unwrap();
        }
        self.rig.run().unwrap();
    }

    fn transmit(&mut self, message: &[u8]) {
        self.rig.submit(TRANSMIT, None, message, 0).unwrap();
        self.rig.run().unwrap();
    }

    /// The frames that the guest got, put together by the number of buffers in their headers.
    fn received(&mut self, queue: usize) -> Vec<Vec<u8>> {
        let mut answers = self.rig.answers(queue).into_iter();
        let mut frames = Vec::new();
        while let Some(first) = answers.next() {
            let mut bytes = first.bytes[..first.written as usize].to_vec();
            let buffers = u16::from_le_bytes(bytes[10..12].try_into().unwrap());
            for _ in 1..buffers {
                let next = answers
                    .next()
                    .expect("all buffers of a frame come together");
                bytes.extend(&next.bytes[..next.written as usize]);
            }
            frames.push(bytes);
        }
        frames
    }

    fn counted(&mut self) -> (Direction, Direction) {
        let traffic = self.rig.device().traffic().unwrap();
        (traffic.received, traffic.sent)
    }
}

fn with_buffers(mut message: Vec<u8>, buffers: u16) -> Vec<u8> {
    message[10..12].copy_from_slice(&buffers.to_le_bytes());
    message
}

#[test]
fn frames_go_out_as_they_are() {
    let mut desk = desk(ALL);
    let frames = [frame(60), frame(1514), frame(9000)];
    for frame in &frames {
        desk.transmit(&plain(frame));
    }
    assert_eq!(desk.gone(0), frames.each_ref().map(|f| plain(f)));
    let answers = desk.rig.answers(TRANSMIT);
    assert!(answers.len() == 3 && answers.iter().all(|a| a.written == 0));
    let sent = desk.counted().1;
    assert_eq!(
        (sent.packets, sent.bytes, sent.dropped),
        (3, 60 + 1514 + 9000, 0)
    );
}

#[test]
fn large_segment_goes_out_with_its_header() {
    let mut desk = desk(ALL);
    let (header, frame) = tcp(false, false, &[3; 60_000]);
    desk.transmit(&with_header(&header, &frame));
    assert_eq!(desk.gone(0), [with_header(&header, &frame)]);
}

#[test]
fn unsound_frames_are_completed_and_go_nowhere() {
    let mut desk = desk(ALL & !feature::HOST_TSO4);
    let (header, large) = tcp(false, false, &[3; 6000]);
    for message in [
        with_header(&header, &large),
        plain(&frame(13)),
        frame(5),
        plain(&[]),
        plain(&frame(65_600)),
    ] {
        desk.transmit(&message);
    }
    assert_eq!(desk.rig.answers(TRANSMIT).len(), 5);
    assert!(desk.gone(0).is_empty());
    assert_eq!(desk.counted().1.dropped, 5);
}

#[test]
fn frame_fills_one_buffer_or_as_many_as_it_needs() {
    let mut desk = desk(ALL);
    desk.offer(RECEIVE, 50, 1526);
    for len in [60, 1514, 20_000, 64, 40_000] {
        desk.comes(&plain(&frame(len)));
        let buffers = (len + HEADER_BYTES).div_ceil(1526);
        let expected = with_buffers(plain(&frame(len)), u16::try_from(buffers).unwrap());
        assert_eq!(desk.received(RECEIVE), [expected], "{len}");
    }
    assert_eq!(desk.counted().0.packets, 5);
}

#[test]
fn frame_waits_for_the_buffers_that_it_lacks() {
    let mut desk = desk(ALL);
    desk.offer(RECEIVE, 3, 1526);
    desk.comes(&plain(&frame(9000)));
    assert!(desk.received(RECEIVE).is_empty());
    desk.comes(&plain(&frame(70)));
    desk.offer(RECEIVE, 2, 1526);
    assert!(desk.received(RECEIVE).is_empty());
    desk.offer(RECEIVE, 2, 1526);
    let got = desk.received(RECEIVE);
    assert_eq!(got[0], with_buffers(plain(&frame(9000)), 6));
    assert_eq!(got[1], with_buffers(plain(&frame(70)), 1));
    assert_eq!(desk.counted().0.dropped, 0);
}

#[test]
fn frame_too_large_for_a_driver_that_does_not_merge_is_lost() {
    let mut desk = desk(ALL & !feature::MRG_RXBUF);
    desk.offer(RECEIVE, 4, 1526);
    desk.comes(&plain(&frame(2000)));
    desk.comes(&plain(&frame(100)));
    assert_eq!(
        desk.received(RECEIVE),
        [with_buffers(plain(&frame(100)), 1)]
    );
    assert_eq!(desk.counted().0.dropped, 1);
    let mut cut = desk_of(1, 0, DiskLimits::default());
    cut.offer(RECEIVE, 4, 500);
    cut.comes(&plain(&frame(600)));
    cut.comes(&plain(&frame(100)));
    assert_eq!(cut.received(RECEIVE), [with_buffers(plain(&frame(100)), 1)]);
}

#[test]
fn driver_without_offloads_gets_whole_segments() {
    for features in [
        0,
        feature::MRG_RXBUF,
        feature::MRG_RXBUF | feature::GUEST_CSUM,
    ] {
        let mut desk = desk(features);
        desk.offer(RECEIVE, 20, 1600);
        let payload = frame(9500);
        let (header, large) = tcp(true, false, &payload);
        desk.comes(&with_header(&header, &large));
        let got = desk.received(RECEIVE);
        assert_eq!(got.len(), 10);
        let mut joined: Vec<u8> = Vec::new();
        for piece in &got {
            assert_eq!(piece[..2], [0, 0]);
            assert!(is_whole(&piece[12..]));
            joined.extend(&piece[12 + 14 + 40 + 32..]);
        }
        assert_eq!(joined, payload);
    }
}

#[test]
fn pieces_wait_for_buffers_one_by_one() {
    let mut desk = desk(0);
    desk.offer(RECEIVE, 2, 1600);
    let (header, large) = tcp(false, false, &frame(4500));
    desk.comes(&with_header(&header, &large));
    assert_eq!(desk.received(RECEIVE).len(), 2);
    desk.offer(RECEIVE, 9, 1600);
    assert_eq!(desk.received(RECEIVE).len(), 3);
}

#[test]
fn pulled_cable_carries_nothing_in_either_direction() {
    let mut desk = desk(ALL);
    desk.offer(RECEIVE, 4, 1526);
    assert_eq!(desk.rig.published().config[6..8], [1, 0]);
    assert!(desk.rig.device().on_link(false) && !desk.rig.device().on_link(false));
    desk.rig.publish();
    assert_eq!(desk.rig.published().config[6..8], [0, 0]);
    desk.comes(&plain(&frame(100)));
    desk.transmit(&plain(&frame(100)));
    assert!(desk.gone(0).is_empty() && desk.received(RECEIVE).is_empty());
    let (received, sent) = desk.counted();
    assert_eq!((received.dropped, sent.dropped), (1, 1));
    assert!(desk.rig.device().on_link(true));
    desk.comes(&plain(&frame(101)));
    assert_eq!(desk.received(RECEIVE).len(), 1);
}

#[test]
fn reset_gives_buffers_back_and_forgets_what_waits() {
    let mut desk = desk(ALL);
    desk.offer(RECEIVE, 2, 1526);
    desk.comes(&plain(&frame(9000)));
    desk.rig.reset_driver();
    desk.rig.run().unwrap();
    let back = desk.rig.answers(RECEIVE);
    assert!(back.len() == 2 && back.iter().all(|a| a.written == 0));
    // Nobody listens.
    desk.comes(&plain(&frame(80)));
    desk.rig.start_driver(ALL);
    desk.offer(RECEIVE, 9, 1526);
    assert!(desk.received(RECEIVE).is_empty());
    desk.comes(&plain(&frame(81)));
    assert_eq!(desk.received(RECEIVE), [with_buffers(plain(&frame(81)), 1)]);
}

#[test]
fn buffer_without_room_for_a_header_is_given_back() {
    let mut desk = desk(ALL);
    desk.offer(RECEIVE, 1, 12);
    assert_eq!(desk.rig.answers(RECEIVE)[0].written, 0);
    desk.rig.submit(RECEIVE, None, b"readable", 0).unwrap();
    desk.rig.run().unwrap();
    assert_eq!(desk.rig.answers(RECEIVE).len(), 1);
}

#[test]
fn frames_are_received_in_as_many_pairs_as_the_driver_says() {
    let mut desk = desk_of(4, ALL, DiskLimits::default());
    for pair in 0..4 {
        desk.offer(2 * pair, 8, 1526);
    }
    for queue in 0..4 {
        desk.comes_to(queue, &plain(&frame(100 + queue)));
    }
    assert_eq!(
        desk.received(0).len(),
        4,
        "one pair until it says otherwise"
    );
    let mut command = |bytes: &[u8]| {
        desk.rig.submit(8, None, bytes, 1).unwrap();
        desk.rig.run().unwrap();
        desk.rig.answers(8)[0].bytes[0]
    };
    assert_eq!(command(&[4, 0, 5, 0]), 1);
    assert_eq!(command(&[1, 0, 1, 0]), 1);
    assert_eq!(command(&[4, 0, 2, 0]), 0);
    for queue in 0..4 {
        desk.comes_to(queue, &plain(&frame(200 + queue)));
    }
    let pairs = [0, 1, 2, 3].map(|pair| desk.received(2 * pair).len());
    assert_eq!(pairs, [2, 2, 0, 0]);
    for pair in 0..4 {
        desk.rig
            .submit(2 * pair + 1, None, &plain(&frame(90 + pair)), 0)
            .unwrap();
    }
    desk.rig.run().unwrap();
    for queue in 0..4 {
        assert_eq!(desk.gone(queue), [plain(&frame(90 + queue))]);
    }
}

#[test]
fn driver_without_several_queues_has_its_control_queue_behind_the_first_pair() {
    let mut desk = desk_of(4, ALL & !feature::MQ, DiskLimits::default());
    desk.rig.submit(2, None, &[4, 0, 1, 0], 1).unwrap();
    desk.rig.submit(8, None, &[4, 0, 1, 0], 1).unwrap();
    desk.rig.run().unwrap();
    assert_eq!(desk.rig.answers(2)[0].bytes, [1], "there is one pair only");
    assert_eq!(desk.rig.answers(8)[0].written, 0, "it is no queue at all");
}

#[test]
fn limits_hold_for_each_direction_and_lose_nothing() {
    let requests = Some(Rate {
        per_s: 200,
        burst: 1,
    });
    let limits = DiskLimits {
        bytes: None,
        requests,
    };
    let mut desk = desk_of(1, ALL, limits);
    desk.offer(RECEIVE, 40, 1526);
    let begin = Instant::now();
    for n in 0..40 {
        desk.rig
            .submit(TRANSMIT, None, &plain(&frame(60 + n)), 0)
            .unwrap();
        let fd = desk.far[0].as_raw_fd();
        send(fd, &plain(&frame(60 + n)), MsgFlags::empty()).unwrap();
    }
    let (mut sent, mut received) = (0, 0);
    while sent < 40 || received < 40 {
        desk.rig.run().unwrap();
        sent += desk.rig.answers(TRANSMIT).len();
        received += desk.received(RECEIVE).len();
        let rest = desk.rig.device().wakes_in();
        if sent < 40 || received < 40 {
            let rest = rest.expect("what waits wakes it");
            std::thread::sleep(rest.max(Duration::from_millis(1)));
        }
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
    let took = begin.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    assert_eq!(desk.gone(0).len(), 40);
    let (r, s) = desk.counted();
    assert_eq!((r.dropped, s.dropped), (0, 0));
}

proptest! {
    #[test]
    fn any_chain_on_any_queue_is_survived(
        features: u64,
        requests in prop::collection::vec((0usize..5, prop::collection::vec(
            (0usize..1 << 21, any::<u32>(), any::<bool>()), 1..4)), 1..8),
        messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..3000), 0..6),
    ) {
        let mut desk = desk_of(2, features, DiskLimits::default());
        for (queue, spans) in requests {
            let spans = spans.into_iter().map(|(at, len, writable)| (at, len % 70_000, writable));
            desk.rig.submit_any(queue, None, spans.collect());
        }
        for message in messages {
            desk.comes(&message);
        }
        desk.rig.run().unwrap();
        desk.rig.reset_driver();
        desk.rig.run().unwrap();
    }
}
