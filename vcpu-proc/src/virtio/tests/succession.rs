//! A device process dies and another takes its place: the guest sees a delay and nothing else.

use super::*;
use crate::gate::{Attachment, Phase, Successor};

impl Machine {
    fn attachment(&self) -> Attachment {
        self.bus.attachments().next().unwrap().1
    }

    fn wait_phase(&mut self, generation: u32, phase: Phase) {
        self.wait("the gate", |m| {
            let now = m.attachment();
            ((now.generation, now.phase) == (generation, phase)).then_some(())
        });
    }

    fn prepare(&self, generation: u32, blame: bool, fields_change: bool) {
        let successor = Successor {
            generation,
            blame,
            fields_change,
        };
        self.bus.prepare_slot(0, successor);
    }

    /// The process is dead; the window is ready for the next one, which has not published yet.
    fn die(&mut self, generation: u32, blame: bool) {
        self.prepare(generation, blame, false);
        self.wait_phase(generation, Phase::Prepared);
        assert!(self.window.is_generation(generation));
        self.device = device_queue(&self.window, self.queue);
    }

    /// The process is dead and there is another.
    pub(super) fn succeed(&mut self, generation: u32, blame: bool) {
        self.die(generation, blame);
        self.publish();
        self.wait_phase(generation, Phase::Serving);
    }

    pub(super) fn complete_one(&mut self) -> u16 {
        let (head, readable, _) = self.device_pop();
        self.device_complete(head, 1);
        u16::from_le_bytes([readable[0], readable[1]])
    }

    /// Shows that nothing reaches the device for a while.
    fn device_gets_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(20));
        let chain = self.device.pop_descriptor_chain(&self.device_memory);
        assert!(chain.is_none());
    }
}

pub(super) fn running() -> Machine {
    let mut m = Machine::new();
    m.publish();
    m.start();
    m
}

#[test]
fn requests_of_a_dead_process_are_given_to_its_successor_in_their_order() {
    let mut m = running();
    for first in [9, 0, 6, 3] {
        m.offer_request(first, 512, false);
    }
    for _ in 0..2 {
        let _dies_with_it = m.device_pop();
    }
    m.die(2, true);
    m.offer_request(12, 512, false);
    m.device_gets_nothing();
    m.publish();
    let order = [9, 0, 6, 3, 12];
    for first in order {
        assert_eq!(m.complete_one(), first);
        assert_eq!(m.used(), (first.into(), 1));
    }
    assert_eq!(m.get(0x70), 15, "the guest has noticed nothing");
    assert!(m.bus.take_faults().is_empty());
}

#[test]
fn what_was_completed_before_the_death_is_not_done_again() {
    let mut m = running();
    m.offer_request(0, 512, false);
    m.offer_request(3, 512, false);
    let (first, ..) = m.device_pop();
    let _second = m.device_pop();
    // Without ringing: nobody may have seen it yet.
    m.device.add_used(&m.device_memory, first, 1).unwrap();
    m.succeed(2, true);
    assert_eq!(m.used(), (0, 1));
    assert_eq!(m.complete_one(), 3);
    assert_eq!(m.used(), (3, 1));
}

#[test]
fn nonsense_that_a_dead_process_leaves_in_its_window_is_forgotten() {
    let mut m = running();
    m.offer_request(0, 512, false);
    let _dies_with_it = m.device_pop();
    let junk = vec![0xeeu8; m.window.layout.bytes];
    m.window.memory.slice(0, junk.len()).copy_from(&junk[..]);
    m.call.ring();
    m.wait_fault();
    m.succeed(2, true);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
    m.offer_request(3, 4096, true);
    assert_eq!(m.complete_one(), 3);
    assert_eq!(m.used(), (3, 1));
}

#[test]
fn request_that_is_completed_without_a_status_is_done_again() {
    let mut m = running();
    m.offer_request(0, 512, false);
    let (head, ..) = m.device_pop();
    m.device_complete(head, 0);
    let fault = m.wait_fault();
    assert!(
        matches!(&fault, FromVcpu::DeviceFault { reason, .. } if reason.contains("status")),
        "{fault:?}"
    );
    m.succeed(2, true);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
}

#[test]
fn guest_that_resets_while_there_is_no_process_starts_afresh_with_the_next() {
    let mut m = running();
    m.offer_request(0, 512, false);
    let _dies_with_it = m.device_pop();
    m.die(2, true);
    m.start();
    m.offer_request(3, 512, false);
    m.publish();
    assert_eq!(m.complete_one(), 3, "the old guest's request is forgotten");
    assert_eq!(m.used(), (3, 1));
}

#[test]
fn disk_that_becomes_another_is_at_fault_and_an_honest_successor_is_not() {
    let mut m = running();
    m.window.publish(u64::MAX, &78u64.to_le_bytes());
    m.call.ring();
    let FromVcpu::DeviceFault { reason, .. } = m.wait_fault() else {
        panic!("no fault of the device");
    };
    assert!(reason.contains("another configuration"), "{reason}");
    m.succeed(2, true);
    m.offer_request(0, 512, false);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
}

#[test]
fn successor_with_another_size_is_accepted_once_where_the_owner_wants_it() {
    let mut m = running();
    let capacity = |m: &Machine| {
        let mut capacity = [0; 8];
        m.bus.read(BASE + 0x100, &mut capacity);
        u64::from_le_bytes(capacity)
    };
    let generation = m.get(0xfc);
    m.prepare(2, false, true);
    m.wait_phase(2, Phase::Prepared);
    m.device = device_queue(&m.window, m.queue);
    m.window.publish(u64::MAX, &78u64.to_le_bytes());
    m.call.ring();
    m.wait("the driver to be told", |m| {
        (m.get(0x60) & 2 != 0).then_some(())
    });
    assert_eq!(capacity(&m), 78);
    assert_ne!(m.get(0xfc), generation, "the guest's driver reads it again");
    m.set(0x64, 3);
    assert_eq!(m.get(0x60) & 2, 0, "it has seen that");
    m.offer_request(0, 512, false);
    assert_eq!(m.complete_one(), 0);
    // Once it serves it stays what it is, and so do those that follow.
    m.window.publish(u64::MAX, &79u64.to_le_bytes());
    m.call.ring();
    let FromVcpu::DeviceFault { reason, .. } = m.wait_fault() else {
        panic!("no fault of the device");
    };
    assert!(reason.contains("another configuration"), "{reason}");
    assert_eq!(capacity(&m), 78);
}

#[test]
fn successor_that_serves_another_disk_is_not_accepted() {
    let mut m = running();
    m.die(2, true);
    m.window.publish(u64::MAX, &78u64.to_le_bytes());
    m.call.ring();
    assert!(matches!(m.wait_fault(), FromVcpu::DeviceFault { .. }));
    m.die(3, true);
    m.window.publish(0, &77u64.to_le_bytes());
    m.call.ring();
    let FromVcpu::DeviceFault { reason, .. } = m.wait_fault() else {
        panic!("no fault of the device");
    };
    assert!(reason.contains("lacks features 0x200"), "{reason}");
    m.succeed(4, true);
    m.offer_request(0, 512, false);
    assert_eq!(m.complete_one(), 0);
}

#[test]
fn request_that_kills_is_tried_alone_and_then_costs_itself_only() {
    let mut m = running();
    for first in [0, 3, 6] {
        m.offer_request(first, 512, false);
    }
    for _ in 0..3 {
        let _dies_with_it = m.device_pop();
    }
    m.succeed(2, true);
    assert_eq!(
        m.complete_one(),
        0,
        "at one death everything is replayed at once"
    );
    assert_eq!(m.used(), (0, 1));
    m.device_pop();
    m.device_pop();
    m.succeed(3, true);
    let (_, suspect, _) = m.device_pop();
    assert_eq!(suspect[0], 3);
    m.offer_request(9, 512, false);
    m.device_gets_nothing();
    m.succeed(4, true);
    assert_eq!(m.used(), (3, 1), "it is answered");
    let status = |m: &Machine, n: u64| m.memory.read_obj::<u8>(GuestAddress(0x5000 + n));
    assert_eq!(status(&m, 3).unwrap(), 1, "I/O error");
    let given_up = m.wait_fault();
    assert!(matches!(given_up, FromVcpu::RequestGivenUp { slot: 0, .. }));
    assert_eq!(m.complete_one(), 6, "the other suspect is innocent");
    assert_eq!(m.used(), (6, 1));
    assert_eq!(
        m.complete_one(),
        9,
        "and then nothing is held back any more"
    );
    assert_eq!(m.used(), (9, 1));
    assert_eq!(m.get(0x70), 15);
}

#[test]
fn deaths_that_no_request_can_have_caused_condemn_none() {
    let mut m = running();
    m.offer_request(0, 512, false);
    m.device_pop();
    for generation in 2..6 {
        m.succeed(generation, false);
        m.device_pop();
    }
    // Nor do deaths of processes that were never given anything.
    for generation in 6..10 {
        m.die(generation, true);
    }
    m.publish();
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
    assert!(m.bus.take_faults().is_empty());
}

#[test]
fn device_that_was_given_up_comes_back_without_a_reset_of_the_guest() {
    let mut m = running();
    m.bus.device_lost(0);
    m.offer_request(0, 512, false);
    assert_eq!(m.used(), (0, 1));
    assert_ne!(m.get(0x70) & 0x40, 0);
    m.succeed(2, true);
    assert_eq!(m.get(0x70), 15);
    m.offer_request(3, 512, false);
    assert_eq!(m.complete_one(), 3);
    assert_eq!(m.used(), (3, 1));
}

#[test]
fn old_generations_change_nothing() {
    let mut m = running();
    m.succeed(5, true);
    m.prepare(5, true, false);
    m.prepare(4, true, false);
    m.offer_request(0, 512, false);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
    assert_eq!(m.attachment().generation, 5);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever dies whenever, each request is answered once and none is forgotten.
    #[test]
    fn every_request_is_answered_once(
        steps in prop::collection::vec((0u8..5, any::<bool>()), 1..40),
    ) {
        let mut m = running();
        let mut generation = 1;
        let mut held = Vec::new();
        let mut free: Vec<u16> = vec![0, 3, 6, 9, 12];
        let mut asked = 0u32;
        let mut answered = 0u32;
        for (step, flag) in steps {
            match step {
                0 | 1 => if let Some(first) = free.pop() {
                    m.offer_request(first, 512, flag);
                    asked += 1;
                },
                2 => if let Some(chain) = m.device.pop_descriptor_chain(&m.device_memory) {
                    held.push(chain.head_index());
                },
                3 => if let Some(head) = held.pop() {
                    m.device_complete(head, 1);
                },
                _ => {
                    generation += 1;
                    held.clear();
                    m.succeed(generation, false);
                }
            }
            // Answers that are there already free their descriptors.
            let idx: u16 = m.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
            while idx != m.used {
                free.push(u16::try_from(m.used().0).unwrap());
                answered += 1;
            }
        }
        held.into_iter().for_each(|head| m.device_complete(head, 1));
        while answered < asked {
            if let Some(chain) = m.device.pop_descriptor_chain(&m.device_memory) {
                let head = chain.head_index();
                m.device_complete(head, 1);
            }
            let idx: u16 = m.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
            if idx != m.used {
                m.used();
                answered += 1;
            }
        }
        m.device_gets_nothing();
        let idx: u16 = m.memory.load(GuestAddress(USED + 2), Ordering::Acquire).unwrap();
        prop_assert_eq!(idx, m.used);
    }
}
