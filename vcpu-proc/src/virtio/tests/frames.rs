//! Queues of a network device: buffers of one frame are seen at once, frames to send may get lost.

use super::*;
use bulkhead_runtime::used::{put_together, wants_news};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

fn running(queue: u16) -> Machine {
    let mut m = Machine::of(VirtioKind::Net, queue);
    m.publish();
    m.start();
    m
}

impl Machine {
    fn offer_buffer(&mut self, n: u16) {
        self.describe(n, 0x10000 + u64::from(n) * 0x1000, 1526, WRITE, 0);
        self.offer(n);
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
    let mut m = running(RECEIVE);
    for round in 0..50u16 {
        let before = m.used_index();
        let heads: Vec<u16> = (0..3)
            .map(|n| {
                m.offer_buffer(n);
                let (head, readable, writable) = m.device_pop();
                assert!(readable.is_empty());
                let data = [n.to_le_bytes()[0]; 20];
                m.device_memory.write_slice(&data, writable[0].0).unwrap();
                head
            })
            .collect();
        let elements: Vec<_> = heads.iter().map(|&head| (head, 20)).collect();
        put_together(&mut m.device, &m.device_memory, &elements).unwrap();
        m.call.ring();
        let seen = m.wait("the frame", |m| {
            let now = m.used_index();
            (now != before).then_some(now)
        });
        assert_eq!(seen.wrapping_sub(before), 3, "round {round}");
        for n in 0..3 {
            assert_eq!(m.used(), (n, 20));
            let at = GuestAddress(0x10000 + u64::from(n) * 0x1000);
            let got: [u8; 20] = m.memory.read_obj(at).unwrap();
            assert_eq!(got, [n.to_le_bytes()[0]; 20]);
        }
    }
}

#[test]
fn buffers_stay_with_a_device_that_is_lost_until_it_has_a_process_again() {
    let mut m = running(RECEIVE);
    m.offer_buffer(0);
    let _taken = m.device_pop();
    m.bus.device_lost(0);
    m.wait("the loss", |m| (m.get(0x70) & 0x40 != 0).then_some(()));
    m.offer_buffer(1);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(m.used_index(), 0, "a driver would offer the next at once");
    m.succeed(2, false);
    for n in 0..2 {
        let (head, _, writable) = m.device_pop();
        assert_eq!(writable[0].1, 1526);
        m.device_complete(head, 60);
        assert_eq!(m.used(), (n, 60));
    }
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
