//! The device on a port of a network: the switch's end is in the test.

use crate::device::Net;
use crate::offload::tests::{frame, plain, tcp, with_header};
use crate::request::{Header, feature};
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::port::{PORT_BYTES, Port, PortEnd, stamp};
use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, DiskLimits, FdRole, UringGrant};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::testing::Rig;
use bulkhead_runtime::{Device, Stillbirth};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const ALL: u64 = feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::CSUM
    | feature::HOST_TSO4
    | feature::HOST_TSO6
    | feature::MRG_RXBUF;

struct Desk {
    rig: Rig<Net>,
    memory: OwnedFd,
    /// The switch's end; there may be no switch.
    switch: Option<Port>,
    /// Wakes the switch.
    kick: Doorbell,
    /// Wakes the card.
    call: Doorbell,
}

pub(crate) fn config(pairs: usize) -> DeviceConfig {
    DeviceConfig {
        kind: VirtioKind::Net,
        queue_sizes: vec![64; 2 * pairs],
        window_bytes: 8 << 20,
        features: u64::MAX,
        config: Vec::new(),
        own: DeviceOwn::Net {
            link_up: true,
            cuts_udp: true,
            limits: DiskLimits::default(),
        },
    }
}

fn rig(pairs: usize, port: &OwnedFd, bells: [&Doorbell; 2]) -> Result<Rig<Net>, Stillbirth> {
    let [kick, call] = bells.map(|bell| OwnedFd::from(bell.try_clone().unwrap()));
    let held = vec![
        (FdRole::Port, 0, port.try_clone().unwrap()),
        (FdRole::PortKick, 0, kick),
        (FdRole::PortCall, 0, call),
    ];
    Rig::new(&config(pairs), held, &UringGrant::default())
}

fn port() -> (OwnedFd, Doorbell, Doorbell) {
    let memory = sealed_memfd("bulkhead-port", PORT_BYTES).unwrap();
    stamp(memory.as_fd(), 1).unwrap();
    (memory, Doorbell::new().unwrap(), Doorbell::new().unwrap())
}

/// A card with nothing at the other end yet.
fn alone(features: u64) -> Desk {
    let (memory, kick, call) = port();
    let mut rig = rig(1, &memory, [&kick, &call]).unwrap();
    rig.start_driver(features);
    Desk {
        rig,
        memory,
        switch: None,
        kick,
        call,
    }
}

fn desk(features: u64) -> Desk {
    let mut desk = alone(features);
    desk.switch_comes(1);
    desk
}

fn with_one_buffer(mut message: Vec<u8>) -> Vec<u8> {
    message[10] = 1;
    message
}

impl Desk {
    /// A switch begins to serve the port in this generation.
    fn switch_comes(&mut self, generation: u32) {
        stamp(self.memory.as_fd(), generation).unwrap();
        let memory = self.memory.try_clone().unwrap();
        self.switch = Some(Port::map(memory, PortEnd::Switch, generation).unwrap());
        self.call.ring();
        self.rig.run().unwrap();
    }

    fn comes(&mut self, message: &[u8]) {
        let Port { memory, writer, .. } = self.switch.as_mut().unwrap();
        let mut record = writer.reserve(memory, message.len()).unwrap().unwrap();
        assert_eq!(record.write(message), message.len());
        record.commit();
        if writer.publish(memory) {
            self.call.ring();
        }
        self.rig.run().unwrap();
    }

    /// What has gone to the switch, at most `most` records.
    fn gone(&mut self, most: usize) -> Vec<Vec<u8>> {
        let port = self.switch.as_mut().unwrap();
        let mut all = Vec::new();
        if !port.is_met() {
            return all;
        }
        let Port { memory, reader, .. } = port;
        while all.len() < most
            && let Some(len) = reader.peek(memory).unwrap()
        {
            let mut record = vec![0; len];
            reader.copy_out(memory, 0, &mut record);
            reader.take();
            all.push(record);
        }
        if reader.release(memory) {
            self.call.ring();
        }
        self.rig.run().unwrap();
        all
    }

    fn offer(&mut self, buffers: usize, len: usize) {
        for _ in 0..buffers {
            self.rig.submit(RECEIVE, None, &[], len).unwrap();
        }
        self.rig.run().unwrap();
    }

    fn transmit(&mut self, message: &[u8]) {
        self.rig.submit(TRANSMIT, None, message, 0).unwrap();
        self.rig.run().unwrap();
    }

    fn received(&mut self) -> Vec<Vec<u8>> {
        let answers = self.rig.answers(RECEIVE).into_iter();
        answers
            .map(|answer| answer.bytes[..answer.written as usize].to_vec())
            .collect()
    }
}

#[test]
fn frames_pass_both_ways_as_they_are_and_the_switch_is_woken() {
    let mut desk = desk(ALL);
    desk.kick.take();
    let (header, large) = tcp(false, false, &[3; 60_000]);
    let messages = [plain(&frame(60)), with_header(&header, &large)];
    for message in &messages {
        desk.transmit(message);
    }
    assert!(desk.kick.take(), "it sleeps");
    assert_eq!(desk.gone(9), messages);
    desk.offer(8, 70_000);
    for message in &messages {
        desk.comes(message);
    }
    assert_eq!(desk.received(), messages.map(with_one_buffer));
}

#[test]
fn segments_are_cut_for_a_driver_that_takes_none_and_large_datagrams_are_not_offered() {
    let mut desk = desk(0);
    desk.offer(8, 1600);
    let (header, large) = tcp(true, false, &[7; 5000]);
    desk.comes(&with_header(&header, &large));
    let got = desk.received();
    assert!(got.len() == 5 && got.iter().all(|f| f[..10] == [0; 10]));
    let features = desk.rig.device().features();
    assert_eq!(features & feature::HOST_USO, 0);
    assert_eq!(features & ALL, ALL);
}

#[test]
fn driver_gets_each_frame_as_it_can_take_it() {
    let mut desk = desk(ALL & !feature::GUEST_TSO6);
    desk.offer(16, 70_000);
    let (header, v4) = tcp(false, false, &[7; 5000]);
    let whole = with_header(&header, &v4);
    desk.comes(&whole);
    assert_eq!(desk.received(), [with_one_buffer(whole)]);
    let (header, v6) = tcp(true, false, &[7; 5000]);
    desk.comes(&with_header(&header, &v6));
    assert_eq!(desk.received().len(), 5);
}

#[test]
fn new_buffers_need_no_kick_while_there_are_many_and_no_frame_waits_for_them() {
    let mut desk = desk(ALL);
    assert!(desk.rig.device().wants_kicks(RECEIVE), "it has none");
    desk.offer(64, 60);
    assert!(!desk.rig.device().wants_kicks(RECEIVE));
    assert!(desk.rig.device().wants_kicks(TRANSMIT));
    desk.comes(&plain(&frame(5000)));
    assert!(desk.rig.device().wants_kicks(RECEIVE), "they are too small");
}

#[test]
fn header_of_a_switch_is_believed_no_more_than_a_drivers() {
    let mut desk = desk(ALL);
    desk.offer(8, 2000);
    let wrong = |change: fn(&mut Header)| {
        let (mut header, frame) = tcp(false, false, &[1; 900]);
        change(&mut header);
        with_header(&header, &frame)
    };
    for message in [
        wrong(|header| header.gso_type = 5),
        wrong(|header| header.gso_type = 0x81),
        wrong(|header| header.gso_size = 0),
        wrong(|header| header.checksum_start = 5000),
        wrong(|header| header.flags = 0),
        plain(&frame(5)),
        plain(&[]),
    ] {
        desk.comes(&message);
    }
    let mut odd = plain(&frame(80));
    odd[0] = 0xf6;
    odd[10..12].copy_from_slice(&[7, 7]);
    desk.comes(&odd);
    assert_eq!(desk.received(), [with_one_buffer(plain(&frame(80)))]);
}

#[test]
fn frames_without_room_wait_in_their_order() {
    let mut desk = desk(ALL);
    let message = |n: u8| plain(&[vec![n; 60], frame(20_000)].concat());
    for n in 0..40 {
        desk.transmit(&message(n));
    }
    let sent = desk.rig.answers(TRANSMIT).len();
    assert!((4..40).contains(&sent), "{sent} of 40 had room");
    let mut got = Vec::new();
    while got.len() < 40 {
        let more = desk.gone(3);
        assert!(!more.is_empty(), "{} of 40", got.len());
        got.extend(more);
    }
    assert_eq!(got, (0..40).map(message).collect::<Vec<_>>());
    assert_eq!(sent + desk.rig.answers(TRANSMIT).len(), 40);
    assert_eq!(desk.rig.device().wakes_in(), None::<Duration>);
}

#[test]
fn without_a_switch_frames_are_lost_and_with_the_next_one_they_pass() {
    let mut desk = alone(ALL);
    desk.offer(8, 2000);
    desk.transmit(&plain(&frame(60)));
    assert_eq!(desk.rig.answers(TRANSMIT).len(), 1);
    desk.switch_comes(2);
    assert_eq!(desk.gone(9).len(), 0);
    desk.transmit(&plain(&frame(70)));
    assert_eq!(desk.gone(9), [plain(&frame(70))]);
    // That one dies with what it has not read, and with what it was about to say.
    for n in 0..30 {
        desk.transmit(&plain(&frame(1000 + n)));
    }
    desk.rig.answers(TRANSMIT);
    desk.switch_comes(3);
    desk.transmit(&plain(&frame(80)));
    assert_eq!(desk.gone(9), [plain(&frame(80))]);
    desk.comes(&plain(&frame(90)));
    assert_eq!(desk.received(), [with_one_buffer(plain(&frame(90)))]);
    assert_eq!(desk.rig.answers(TRANSMIT).len(), 1);
}

#[test]
fn frames_that_wait_for_room_go_to_the_next_switch() {
    let mut desk = desk(ALL);
    for _ in 0..30 {
        desk.transmit(&plain(&frame(40_000)));
    }
    let sent = desk.rig.answers(TRANSMIT).len();
    desk.switch_comes(2);
    let mut got = 0;
    while sent + got < 30 {
        let more = desk.gone(2).len();
        assert!(more > 0, "{got} and {sent} of 30");
        got += more;
    }
}

#[test]
fn switch_that_breaks_the_protocol_is_believed_nothing_until_there_is_another() {
    let mut desk = desk(ALL);
    desk.offer(8, 2000);
    let port = desk.switch.as_mut().unwrap();
    // A position that no writer has, and one that no reader has.
    port.memory.write(0x200, 7u64);
    port.memory.write(0x140, u64::MAX);
    desk.call.ring();
    desk.rig.run().unwrap();
    for _ in 0..10 {
        desk.transmit(&plain(&frame(60_000)));
    }
    assert_eq!(desk.rig.answers(TRANSMIT).len(), 10, "lost, as on a wire");
    assert!(desk.received().is_empty());
    desk.switch_comes(2);
    desk.transmit(&plain(&frame(80)));
    assert_eq!(desk.gone(9), [plain(&frame(80))]);
    desk.comes(&plain(&frame(90)));
    assert_eq!(desk.received(), [with_one_buffer(plain(&frame(90)))]);
}

#[test]
fn port_has_one_pair_of_queues() {
    let (memory, kick, call) = port();
    let refused = rig(2, &memory, [&kick, &call]).unwrap_err();
    assert!(refused.to_string().contains("one pair"), "{refused}");
}
