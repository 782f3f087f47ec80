//! Kicks that vCPU threads serve themselves, beside the gate thread.

use super::*;

/// The queue of a shared folder that requests are put into.
const REQUESTS: u16 = 1;
/// Bytes of a request.
const BYTES: u32 = 64;

/// Set when it goes out of scope, also when a test fails.
struct AtEnd<'a>(&'a AtomicBool);

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

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

/// What a vCPU finds while it serves its kick is told like what the gate thread finds.
#[test]
fn faults_that_a_kick_brings_to_light_are_told() {
    let mut m = folder();
    // A chain that ends in the middle.
    m.describe(0, 0x8000, BYTES, NEXT, QUEUE);
    m.offer(0);
    assert!(matches!(
        m.wait_fault(),
        FromVcpu::GuestFault { slot: 0, .. }
    ));
    m.wait("the bit", |m| (m.get(0x70) & 0x40 != 0).then_some(()));
    m.start();
    m.describe_round_trip(0);
    m.offer(0);
    let _taken = m.device_pop();
    // Nothing of the sort is in flight, and the device does not ring for it.
    m.device.add_used(&m.device_memory, 40, 16).unwrap();
    m.kick_queue(REQUESTS);
    assert!(matches!(
        m.wait_fault(),
        FromVcpu::DeviceFault { slot: 0, .. }
    ));
}

/// Others wait for the gate thread that waits for the gate: it gets its turn between vCPUs that have it all the time.
#[test]
fn gate_thread_gets_its_turn_beside_vcpus_that_kick_without_a_pause() {
    let mut m = folder();
    let stop = AtomicBool::new(false);
    let bus = Arc::clone(&m.bus);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let queue = u32::from(REQUESTS).to_le_bytes();
                    bus.write(BASE + QUEUE_NOTIFY, &queue);
                }
            });
        }
        let _stops = AtEnd(&stop);
        for _ in 0..20 {
            m.describe_round_trip(0);
            m.offer(0);
            let (head, ..) = m.device_pop();
            m.device_complete(head, 16);
            assert_eq!(m.used(), (0, 16));
            // Carried out by the gate thread, for which the driver waits.
            m.start();
        }
    });
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
