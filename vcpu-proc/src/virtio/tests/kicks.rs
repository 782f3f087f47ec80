//! Kicks that vCPU threads serve themselves, beside the gate thread.

use super::*;

/// The queue of a shared folder that requests are put into.
const REQUESTS: u16 = 1;
/// Bytes of a request.
const BYTES: u32 = 64;

fn folder() -> Machine {
    let mut m = Machine::of(VirtioKind::Fs, REQUESTS);
    m.publish();
    m.start();
    m
}

impl Machine {
    fn describe_round_trip(&self, head: u16) {
        let at = 0x8000 + u64::from(head) * 0x100;
        self.describe(head, at, BYTES, NEXT, head + 1);
        self.describe(head + 1, at + 0x80, 16, WRITE, 0);
    }

    /// Requests that the device has not taken yet.
    fn device_has(&self) -> u16 {
        let published = self
            .device
            .avail_idx(&self.device_memory, Ordering::Acquire);
        published.unwrap().0.wrapping_sub(self.device.next_avail())
    }
}

#[test]
fn request_is_with_the_device_when_its_kick_is_done() {
    let mut m = folder();
    let mut at_once = 0;
    for _ in 0..20 {
        // The gate thread is asleep by then, if the host lets it.
        std::thread::sleep(Duration::from_millis(5));
        m.describe_round_trip(0);
        m.offer(0);
        at_once += m.device_has();
        let (head, readable, _) = m.device_pop();
        assert_eq!(readable.len(), 8 + BYTES as usize);
        m.device_complete(head, 16);
        assert_eq!(m.used(), (0, 16));
    }
    assert!(at_once > 0, "all of them came later");
}

/// The gate thread is rung for a completion and a vCPU kicks for the next request at the same time, again and again:
/// whichever of them has the gate, nothing is lost and nothing answered twice.
#[test]
fn kicks_and_completions_at_the_same_time_lose_nothing() {
    const ROUNDS: u16 = 5000;
    /// Requests in flight.
    const DEPTH: u16 = 3;
    let mut m = folder();
    let (mut offered, mut answered) = (0u16, 0u16);
    let mut free: Vec<u16> = (0..DEPTH).map(|n| 2 * n).collect();
    while answered < ROUNDS {
        while offered < ROUNDS
            && let Some(head) = free.pop()
        {
            m.describe_round_trip(head);
            m.offer(head);
            offered += 1;
        }
        let (head, readable, _) = m.device_pop();
        let number: [u8; 8] = readable[..8].try_into().unwrap();
        assert_eq!(u64::from_le_bytes(number), u64::from(answered) + 1);
        m.device_complete(head, 16);
        // Before the gate thread is awake, more often than not.
        if answered.is_multiple_of(2) && offered < ROUNDS {
            m.kick_queue(REQUESTS);
        }
        let (id, bytes) = m.used();
        assert_eq!(bytes, 16);
        free.push(u16::try_from(id).unwrap());
        answered += 1;
    }
    assert!(m.bus.take_faults().is_empty());
}

/// A gate thread that has its hands full, or a device that is gone, is no reason for a kick to get lost.
#[test]
fn kicks_of_a_device_that_is_lost_are_answered_with_errors() {
    let mut m = folder();
    m.bus.device_lost(0);
    m.wait("the loss", |m| (m.get(0x70) & 0x40 != 0).then_some(()));
    for _ in 0..3 {
        m.describe_round_trip(0);
        m.offer(0);
        assert_eq!(m.used(), (0, 16), "an answer that says EIO");
    }
    m.succeed(2, false);
    m.describe_round_trip(2);
    m.offer(2);
    let (head, ..) = m.device_pop();
    m.device_complete(head, 16);
    assert_eq!(m.used(), (2, 16));
}
