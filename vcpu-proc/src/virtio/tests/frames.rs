//! Queues of a network device: buffers of one frame are seen at once, frames to send may get lost.

use super::*;
use bulkhead_runtime::used::{put_together, wants_news};
use std::collections::VecDeque;

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const BUFFERS_AT: usize = bulkhead_ipc::device_kind::NET_BUFFERS_AT as usize;
const MERGEABLE: u32 = 1 << 15;
const EVENT_INDEX: u32 = 1 << 29;
/// Of the longest frame, with its header.
const LONGEST: usize = 65_565;

fn buffer_at(n: u16) -> GuestAddress {
    GuestAddress(0x10000 + u64::from(n) * 0x2000)
}

/// A frame without anything in its header that a driver would have to look at.
fn frame_of(bytes: usize, seed: usize) -> Vec<u8> {
    let body = |n: usize| u8::try_from((n * 7 + n / 256 + seed) % 251).unwrap();
    (0..bytes)
        .map(|n| if n < 12 { 0 } else { body(n) })
        .collect()
}

/// What is received of it: nothing but the number of buffers differs.
fn same(got: &[u8], sent: &[u8]) -> bool {
    got[..BUFFERS_AT] == sent[..BUFFERS_AT] && got[12..] == sent[12..]
}

fn receiving(features: u32) -> Machine {
    let mut m = Machine::of(VirtioKind::Net, RECEIVE);
    m.publish();
    m.start_receiving(features);
    m
}

fn running(queue: u16) -> Machine {
    let mut m = Machine::of(VirtioKind::Net, queue);
    m.publish();
    m.start();
    m
}

impl Machine {
    /// Buffer `n` of so many bytes.
    fn offer_buffer(&mut self, n: u16, bytes: u32) {
        self.describe(n, buffer_at(n).0, bytes, WRITE, 0);
        self.offer(n);
    }

    /// The device receives a frame, and fills as many rooms as it takes.
    fn device_frame(&mut self, frame: &[u8]) {
        let (mut rooms, mut at) = (Vec::new(), 0);
        while at < frame.len() {
            let (head, readable, writable) = self.device_pop();
            assert!(readable.is_empty());
            let len = (frame.len() - at).min(writable[0].1 as usize);
            let part = &frame[at..at + len];
            self.device_memory.write_slice(part, writable[0].0).unwrap();
            rooms.push((head, u32::try_from(len).unwrap(), writable[0].0));
            at += len;
        }
        let buffers = u16::try_from(rooms.len()).unwrap();
        self.claim(rooms[0].2, buffers);
        let elements: Vec<_> = rooms.iter().map(|&(head, len, _)| (head, len)).collect();
        self.device_completes(&elements);
    }

    /// Writes into the room at `at` that the frame that begins there has so many.
    fn claim(&self, at: GuestAddress, rooms: u16) {
        let place = GuestAddress(at.0 + BUFFERS_AT as u64);
        self.device_memory.write_obj(rooms, place).unwrap();
    }

    /// The device completes these in one step.
    fn device_completes(&mut self, elements: &[(u16, u32)]) {
        put_together(&mut self.device, &self.device_memory, elements).unwrap();
        self.call.ring();
    }

    /// The next used buffers, which hold a frame of `bytes` bytes in as many as it says.
    fn frame(&mut self, bytes: usize) -> Vec<u8> {
        let (mut frame, mut buffers) = (Vec::new(), 0u16);
        while frame.len() < bytes {
            let (head, len) = self.used();
            let mut part = vec![0; len as usize];
            let at = buffer_at(u16::try_from(head).unwrap());
            self.memory.read_slice(&mut part, at).unwrap();
            frame.extend(part);
            buffers += 1;
        }
        let says = u16::from_le_bytes([frame[BUFFERS_AT], frame[BUFFERS_AT + 1]]);
        assert_eq!(says, buffers);
        frame
    }

    fn start_receiving(&mut self, features: u32) {
        self.start_as(features, &[(RECEIVE, [DESC, AVAIL, USED])]);
        self.device = device_queue(&self.window, RECEIVE);
    }

    fn offer_frame(&mut self, n: u16) {
        self.memory
            .write_slice(&[7; 112], GuestAddress(0x4000))
            .unwrap();
        self.describe(n, 0x4000, 112, 0, 0);
        self.offer(n);
    }

    fn used_index(&self) -> u16 {
        let at = GuestAddress(USED + 2);
        self.memory.load(at, Ordering::Acquire).unwrap()
    }
}

#[test]
fn driver_sees_all_buffers_of_a_frame_at_once() {
    for features in [MERGEABLE, MERGEABLE | EVENT_INDEX] {
        let mut m = receiving(features);
        for round in 0..50 {
            let before = m.used_index();
            (0..3).for_each(|n| m.offer_buffer(n, 20));
            let sent = frame_of(50, round);
            m.device_frame(&sent);
            let seen = m.wait("the frame", |m| {
                let now = m.used_index();
                (now != before).then_some(now)
            });
            assert_eq!(seen.wrapping_sub(before), 3, "round {round}");
            let got = m.frame(50);
            assert!(same(&got, &sent), "round {round}");
        }
    }
}

#[test]
fn longest_frame_is_dealt_to_many_buffers() {
    let mut m = receiving(MERGEABLE);
    for round in 0..20 {
        (0..QUEUE).for_each(|n| m.offer_buffer(n, 5000));
        let sent = frame_of(LONGEST, round);
        m.device_frame(&sent);
        let got = m.frame(LONGEST);
        assert!(same(&got, &sent), "round {round}");
        // Two of the sixteen are left, and have to go as well.
        let rest = frame_of(6000, round);
        m.device_frame(&rest);
        assert!(same(&m.frame(6000), &rest));
    }
}

#[test]
fn frame_waits_for_as_many_buffers_as_it_needs() {
    for features in [MERGEABLE, MERGEABLE | EVENT_INDEX] {
        let mut m = receiving(features);
        for round in 0..20 {
            m.offer_buffer(0, 100);
            let sent = frame_of(250, round);
            m.device_frame(&sent);
            std::thread::sleep(Duration::from_millis(2));
            let before = m.used_index();
            m.offer_buffer(1, 100);
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(m.used_index(), before, "fifty bytes have no room");
            m.offer_buffer(2, 100);
            assert!(same(&m.frame(250), &sent), "round {round}");
        }
    }
}

#[test]
fn frame_that_can_never_fit_is_lost_and_costs_no_buffer() {
    // In one buffer, which is all that this driver takes.
    let mut m = receiving(0);
    m.offer_buffer(0, 100);
    m.device_frame(&frame_of(101, 0));
    let sent = frame_of(100, 1);
    m.device_frame(&sent);
    assert!(same(&m.frame(100), &sent));
    // In all of a queue's buffers.
    let mut m = receiving(MERGEABLE);
    (0..QUEUE).for_each(|n| m.offer_buffer(n, 20));
    m.device_frame(&frame_of(16 * 20 + 1, 0));
    let sent = frame_of(16 * 20, 1);
    m.device_frame(&sent);
    assert!(same(&m.frame(16 * 20), &sent));
}

#[test]
fn device_that_lies_about_a_frame_is_found_out() {
    // Bytes in each room, and how many rooms the frame claims to have.
    let lies: [(&[u32], u16); 4] = [(&[60], 0), (&[60], 2), (&[60; 6], 6), (&[11], 1)];
    for (lengths, claimed) in lies {
        let mut m = receiving(MERGEABLE);
        m.offer_buffer(0, 100);
        let rooms: Vec<_> = lengths.iter().map(|_| m.device_pop()).collect();
        m.claim(rooms[0].2[0].0, claimed);
        let heads = rooms.iter().map(|&(head, ..)| head);
        let elements: Vec<_> = heads.zip(lengths.iter().copied()).collect();
        m.device_completes(&elements);
        assert!(matches!(m.wait_fault(), FromVcpu::DeviceFault { .. }));
        assert_eq!(m.used_index(), 0, "the guest sees nothing of it");
    }
}

#[test]
fn device_that_wants_no_room_is_offered_none_until_there_are_further_buffers() {
    let mut m = receiving(MERGEABLE);
    m.offer_buffer(0, 100);
    for buffers in 1..5 {
        // At least one, then as many as there are.
        let (head, _, _) = m.device_pop();
        m.device_complete(head, 0);
        let (mut returned, mut last) = (0, Instant::now());
        while last.elapsed() < Duration::from_millis(30) {
            let Some(chain) = m.device.pop_descriptor_chain(&m.device_memory) else {
                std::thread::sleep(Duration::from_millis(1));
                continue;
            };
            m.device_complete(chain.head_index(), 0);
            (returned, last) = (returned + 1, Instant::now());
            assert!(returned < 100, "it is offered rooms without end");
        }
        assert_eq!(m.used_index(), 0);
        m.offer_buffer(buffers, 100);
    }
    m.offer_buffer(5, 100);
    let sent = frame_of(90, 0);
    m.device_frame(&sent);
    assert!(same(&m.frame(90), &sent));
}

#[test]
fn no_room_is_offered_for_a_queue_without_buffers() {
    let mut m = receiving(MERGEABLE);
    std::thread::sleep(Duration::from_millis(20));
    assert!(m.device.pop_descriptor_chain(&m.device_memory).is_none());
    m.offer_buffer(0, 100);
    let _room = m.device_pop();
}

#[test]
fn what_arrives_before_a_reset_is_not_received_after_it() {
    let mut m = receiving(MERGEABLE);
    for round in 0..20 {
        m.offer_buffer(0, 100);
        m.device_frame(&frame_of(200, 0));
        // The driver resets; the device gives back all that it has.
        m.set(0x70, 0);
        while let Some(chain) = m.device.pop_descriptor_chain(&m.device_memory) {
            let head = chain.head_index();
            m.device.add_used(&m.device_memory, head, 0).unwrap();
        }
        let (next_avail, next_used) = (m.device.next_avail(), m.device.next_used());
        m.call.ring();
        m.start_receiving(MERGEABLE);
        m.device.set_next_avail(next_avail);
        m.device.set_next_used(next_used);
        m.offer_buffer(1, 100);
        let sent = frame_of(80, round);
        m.device_frame(&sent);
        assert!(same(&m.frame(80), &sent), "round {round}");
    }
}

#[test]
fn buffers_are_the_guests_whatever_becomes_of_the_device() {
    let mut m = receiving(MERGEABLE);
    m.offer_buffer(0, 100);
    let _taken = m.device_pop();
    m.bus.device_lost(0);
    m.wait("the loss", |m| (m.get(0x70) & 0x40 != 0).then_some(()));
    m.offer_buffer(1, 100);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(m.used_index(), 0, "a driver would offer the next at once");
    m.succeed(2, false);
    let sent = frame_of(180, 0);
    m.device_frame(&sent);
    assert!(same(&m.frame(180), &sent));
}

#[test]
fn frame_is_done_as_soon_as_the_device_may_have_it_and_waits_where_there_is_no_slot() {
    let mut m = running(TRANSMIT);
    let slots = m.window.layout.queues[usize::from(TRANSMIT)].slots;
    for n in 0..slots {
        m.offer_frame(n);
        assert_eq!(m.used(), (n.into(), 0), "the device has done nothing");
    }
    m.offer_frame(0);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(m.used_index(), slots, "the device has all slots");
    for _ in 0..slots {
        let (head, readable, _) = m.device_pop();
        assert_eq!(readable, [7; 112]);
        m.device_complete(head, 0);
    }
    assert_eq!(m.used(), (0, 0));
    let _last = m.device_pop();
    assert_eq!(m.used_index(), slots + 1, "each is done once");
}

/// Those of other queues were answered already, so that nobody else would ask to be told when they come back.
#[test]
fn pages_that_another_queue_gives_back_are_seen_by_the_one_that_waits() {
    const QUEUES: [u16; 5] = [1, 3, 5, 7, 9];
    let rings = |n: u64| [0, 0x1000, 0x2000].map(|at| 0x4000 + n * 0x3000 + at);
    let mut m = Machine::of(VirtioKind::Net, 9);
    m.publish();
    let queues: Vec<_> = QUEUES.into_iter().zip((0..).map(rings)).collect();
    m.start_with(&queues);
    let bytes = u32::try_from(m.window.layout.request_bytes_max()).unwrap();
    let used = |m: &Machine, [_, _, used]: [u64; 3]| -> u16 {
        let at = GuestAddress(used + 2);
        m.memory.load(at, Ordering::Acquire).unwrap()
    };
    for &(queue, [desc, avail, used_ring]) in &queues {
        m.memory.write_obj(0x20000u64, GuestAddress(desc)).unwrap();
        m.memory.write_obj(bytes, GuestAddress(desc + 8)).unwrap();
        let ring: [u16; 3] = [0, 1, 0];
        m.memory.write_obj(ring, GuestAddress(avail)).unwrap();
        m.bus.wiring()[0].notify[usize::from(queue)]
            .write(1)
            .unwrap();
        if queue != 9 {
            let seen = |m: &mut Machine| (used(m, [0, 0, used_ring]) == 1).then_some(());
            m.wait("a frame", seen);
        }
    }
    let (_, last) = queues[4];
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(used(&m, last), 0, "four quarters are all");
    let mut first = device_queue(&m.window, 1);
    let mut told = first.next_used();
    let chain = first.pop_descriptor_chain(&m.device_memory).unwrap();
    let head = chain.head_index();
    first.add_used(&m.device_memory, head, 0).unwrap();
    assert!(wants_news(&first, &m.device_memory, &mut told).unwrap());
    m.call.ring();
    m.wait("the last frame", |m| (used(m, last) == 1).then_some(()));
}

#[test]
fn frames_in_the_hands_of_a_dead_process_count_as_sent() {
    let mut m = running(TRANSMIT);
    for n in 0..3 {
        m.offer_frame(n);
    }
    let (_, readable, _) = m.device_pop();
    assert_eq!(readable, [7; 112]);
    // Until all three are with the process.
    m.wait("the frames", |m| {
        let avail = m.device.avail_idx(&m.device_memory, Ordering::Acquire);
        (avail.unwrap().0 == 3).then_some(())
    });
    m.succeed(2, true);
    let mut sent: Vec<_> = (0..3).map(|_| m.used()).collect();
    sent.sort_unstable();
    assert_eq!(sent, [(0, 0), (1, 0), (2, 0)]);
    assert!(m.device.pop_descriptor_chain(&m.device_memory).is_none());
    m.offer_frame(4);
    let (head, _, _) = m.device_pop();
    m.device_complete(head, 0);
    assert_eq!(m.used(), (4, 0));
}

/// CPU time of this process so far, in ticks of 10 ms.
fn cpu_ticks() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split(' ').collect();
    fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap()
}

/// A card with a queue to receive, which has a buffer, and a control queue with a command that two processes died with: the third
/// has it, and nothing else.
#[test]
fn gate_sleeps_while_a_command_that_kills_is_tried_alone() {
    const CONTROL: u16 = 2;
    let receive = [0x6000, 0x7000, 0x8000];
    let mut m = Machine::of(VirtioKind::Net, CONTROL);
    m.publish();
    m.start_as(
        MERGEABLE,
        &[(RECEIVE, receive), (CONTROL, [DESC, AVAIL, USED])],
    );
    m.memory
        .write_obj(0x20000u64, GuestAddress(receive[0]))
        .unwrap();
    let (len, flags) = (GuestAddress(receive[0] + 8), GuestAddress(receive[0] + 12));
    m.memory.write_obj(2000u32, len).unwrap();
    m.memory.write_obj(WRITE, flags).unwrap();
    m.memory
        .write_obj([0u16, 1, 0], GuestAddress(receive[1]))
        .unwrap();
    m.bus.wiring()[0].notify[usize::from(RECEIVE)]
        .write(1)
        .unwrap();
    m.describe(0, 0x9000, 8, NEXT, 1);
    m.describe(1, 0xa000, 1, WRITE, 0);
    m.offer(0);
    for generation in 2..4 {
        let _command = m.device_pop();
        m.succeed(generation, true);
    }
    let (head, readable, _) = m.device_pop();
    assert_eq!(readable.len(), 8);
    // The least of several times: other tests may run in this process.
    let spent = (0..5).map(|_| {
        let before = cpu_ticks();
        std::thread::sleep(Duration::from_millis(200));
        cpu_ticks() - before
    });
    let spent = spent.min().unwrap();
    assert!(spent < 10, "{spent} of 20 ticks");
    m.device_complete(head, 1);
    assert_eq!(m.used(), (0, 1));
    // Then there are rooms again.
    m.device = device_queue(&m.window, RECEIVE);
    m.device_pop();
}

#[test]
fn driver_whose_buffers_are_none_has_to_reset_the_device() {
    // Less than a header.
    let mut m = receiving(MERGEABLE);
    m.offer_buffer(0, 11);
    m.device_frame(&frame_of(60, 0));
    assert!(matches!(m.wait_fault(), FromVcpu::GuestFault { .. }));
    // Too many pieces, most of them empty.
    let mut m = receiving(MERGEABLE);
    let table = 0x40000;
    let piece = |n: u64| GuestAddress(table + 16 * n);
    for n in 0..600u64 {
        let last = n == 599;
        let len = if last { 100u32 } else { 0 };
        m.memory.write_obj(0x60000u64, piece(n)).unwrap();
        m.memory
            .write_obj(len, GuestAddress(piece(n).0 + 8))
            .unwrap();
        let flags = if last { WRITE } else { WRITE | NEXT };
        let next = u16::try_from(n + 1).unwrap();
        m.memory
            .write_obj([flags, next], GuestAddress(piece(n).0 + 12))
            .unwrap();
    }
    for n in 0..2 {
        m.describe(n, table, 600 * 16, INDIRECT, 0);
        m.offer(n);
    }
    m.device_frame(&frame_of(150, 0));
    assert!(matches!(m.wait_fault(), FromVcpu::GuestFault { .. }));
    assert_eq!(m.used_index(), 0);
}

/// Whoever gives a buffer back is about to answer, unless frames come in numbers.
#[test]
fn driver_is_asked_to_tell_of_buffers_where_frames_come_one_at_a_time() {
    let mut m = receiving(MERGEABLE);
    let wants_kicks = |m: &Machine| -> bool {
        let flags: u16 = m
            .memory
            .load(GuestAddress(USED), Ordering::Acquire)
            .unwrap();
        flags == 0
    };
    for round in 0..10 {
        (0..3).for_each(|n| m.offer_buffer(n, 100));
        m.device_frame(&frame_of(60, round));
        m.frame(60);
        m.wait("the wish", |m| wants_kicks(m).then_some(()));
        let rooms = [m.device_pop(), m.device_pop()];
        let elements = rooms.map(|(head, _, writable)| {
            m.claim(writable[0].0, 1);
            (head, 60)
        });
        m.device_completes(&elements);
        let _both = [m.frame(60), m.frame(60)];
        std::thread::sleep(Duration::from_millis(5));
        assert!(!wants_kicks(&m));
    }
}

/// The header may be parted anywhere.
#[test]
fn number_of_buffers_is_put_where_the_driver_has_the_header() {
    let mut m = receiving(MERGEABLE);
    m.describe(0, 0x20000, 11, WRITE | NEXT, 1);
    m.describe(1, 0x21000, 9, WRITE, 0);
    m.offer(0);
    m.describe(2, 0x22000, 100, WRITE, 0);
    m.offer(2);
    let sent = frame_of(70, 3);
    m.device_frame(&sent);
    assert_eq!([m.used(), m.used()], [(0, 20), (2, 50)]);
    let mut got = vec![0; 70];
    for (at, place) in [(0..11, 0x20000), (11..20, 0x21000), (20..70, 0x22000)] {
        m.memory
            .read_slice(&mut got[at], GuestAddress(place))
            .unwrap();
    }
    assert_eq!(got[10..12], [2, 0]);
    assert!(same(&got, &sent));
}

/// Takes what the guest has been given, and compares it with what was sent. Frames that it has not been given were too large for
/// all buffers together.
fn take_frames(m: &mut Machine, free: &mut VecDeque<u16>, sent: &mut VecDeque<Vec<u8>>) {
    while m.used_index() != m.used {
        let (mut got, mut heads) = (Vec::new(), Vec::new());
        loop {
            let (head, len) = m.used();
            let head = u16::try_from(head).unwrap();
            let mut part = vec![0; len as usize];
            m.memory.read_slice(&mut part, buffer_at(head)).unwrap();
            got.extend(part);
            heads.push(head);
            if got.len() >= 12 && usize::from(u16::from_le_bytes([got[10], got[11]])) == heads.len()
            {
                break;
            }
        }
        while sent
            .front()
            .is_some_and(|frame| frame.len() != got.len() || !same(&got, frame))
        {
            sent.pop_front();
        }
        assert!(sent.pop_front().is_some(), "a frame that was never sent");
        free.extend(heads);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever the sizes of frames and buffers are and in which order they come: what the guest is given is what was
    /// received, whole and in order, but for frames that its buffers can never hold.
    #[test]
    fn frames_are_dealt_whole_and_in_order(
        steps in proptest::collection::vec((any::<bool>(), 13usize..9000, 12u32..3000), 1..60),
        event_index in any::<bool>(),
    ) {
        let index = if event_index { EVENT_INDEX } else { 0 };
        let mut m = receiving(MERGEABLE | index);
        // One that is there from the start, so that there are rooms.
        m.offer_buffer(0, 12);
        let mut free: VecDeque<u16> = (1..QUEUE).collect();
        let mut sent: VecDeque<Vec<u8>> = VecDeque::new();
        for (seed, (is_frame, bytes, room)) in steps.into_iter().enumerate() {
            if is_frame && sent.len() < 12 {
                let frame = frame_of(bytes, seed);
                m.device_frame(&frame);
                sent.push_back(frame);
            } else if let Some(n) = free.pop_front() {
                m.offer_buffer(n, room);
            }
            take_frames(&mut m, &mut free, &mut sent);
        }
        // Everything gets through with buffers enough, or is too large for sixteen of them.
        let deadline = Instant::now() + Duration::from_secs(10);
        let last = frame_of(600, 9999);
        m.device_frame(&last);
        sent.push_back(last);
        while !sent.is_empty() {
            assert!(Instant::now() < deadline, "{} frames are left", sent.len());
            take_frames(&mut m, &mut free, &mut sent);
            if let Some(n) = free.pop_front() {
                m.offer_buffer(n, 2000);
            }
            std::thread::yield_now();
        }
        assert!(m.bus.take_faults().is_empty());
    }

    /// Whatever a device does with its rooms, the gate goes on, and what the guest is given was offered by it.
    #[test]
    fn no_device_is_too_strange(
        steps in proptest::collection::vec((0u8..4, 0u32..17_000, 0u16..8, 0u16..70), 1..40),
    ) {
        let mut m = receiving(MERGEABLE);
        (0..QUEUE).for_each(|n| m.offer_buffer(n, 1526));
        let mut rooms: VecDeque<(u16, GuestAddress)> = VecDeque::new();
        for (what, len, claim, head) in steps {
            while let Some(mut chain) = m.device.pop_descriptor_chain(&m.device_memory) {
                let head = chain.head_index();
                rooms.push_back((head, chain.next().unwrap().addr()));
            }
            match what {
                0 | 1 => {
                    let count = rooms.len().min(usize::from(head % 7));
                    let filled: Vec<_> = rooms.drain(..count).collect();
                    if let Some(&(_, at)) = filled.first() {
                        m.claim(at, claim);
                    }
                    let elements: Vec<_> = filled.iter().map(|&(head, _)| (head, len)).collect();
                    m.device_completes(&elements);
                }
                2 => {
                    // No head, one twice, or one of another time.
                    let _refused = m.device.add_used(&m.device_memory, head, len);
                    m.call.ring();
                }
                _ => {
                    while m.used_index() != m.used {
                        let (head, len) = m.used();
                        assert!(len <= 1526);
                        let head = u16::try_from(head).unwrap();
                        assert!(head < QUEUE);
                        m.offer_buffer(head, 1526);
                    }
                }
            }
        }
        m.set(0x70, 0);
        assert_eq!(m.get(0x70), 0, "the gate thread still carries resets out");
    }
}
