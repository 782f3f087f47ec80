//! The legacy page: posted writes arrive in order, nobody sleeps over work, calls are answered.

use super::bell::Bell;
use super::check;
use crate::legacy_page::{Call, LegacyPage, Posted};
use crate::shared::SharedMemory;
use loom::thread;

const WRITES: u32 = 2;

fn pages() -> (LegacyPage, LegacyPage) {
    let mut cells = vec![0x80, 0xc0, 0x100, 0x104, 0x180, 0x184, 0x186, 0x1c0, 0x1c4];
    cells.push(0x40 + 5);
    for at in (0..WRITES as usize).map(|n| 0x1000 + 16 * n) {
        cells.extend([at, at + 2, at + 4, at + 8]);
    }
    let memory = SharedMemory::with_cells(cells);
    (LegacyPage::over(memory.clone()), LegacyPage::over(memory))
}

fn write(number: u32) -> Posted {
    Posted {
        port: 0x3f8,
        size: 1,
        value: number,
        stream_position: number.into(),
    }
}

#[test]
fn posted_writes_arrive_in_order_and_wake_a_sleeper() {
    check(|| {
        let (vcpu, legacy) = pages();
        let kick = Bell::default();
        let other = kick.clone();
        let legacy = thread::spawn(move || {
            let mut taken = 0;
            while taken < WRITES {
                while let Some(posted) = legacy.take_posted(taken) {
                    assert_eq!(posted, write(taken));
                    taken += 1;
                    legacy.set_mirror(5, u8::try_from(taken).unwrap());
                    legacy.set_consumed(taken);
                }
                if taken < WRITES && legacy.may_sleep(taken, 0) {
                    other.wait();
                    legacy.set_awake();
                }
            }
        });
        for number in 0..WRITES {
            if vcpu.post(number, write(number)) {
                kick.ring();
            }
        }
        let consumed = vcpu.consumed();
        // A mirrored register is never older than what was reported as done.
        assert!(u32::from(vcpu.mirror(5)) >= consumed);
        legacy.join().unwrap();
    });
}

#[test]
fn call_is_seen_whole_answered_and_wakes_a_sleeper() {
    check(|| {
        let (vcpu, legacy) = pages();
        let (kick, reply) = (Bell::default(), Bell::default());
        let other = (kick.clone(), reply.clone());
        let legacy = thread::spawn(move || {
            loop {
                if let Some((seq, call)) = legacy.take_call(0) {
                    assert_eq!((call.port, call.size), (0x71, 1));
                    legacy.answer(seq, 0x26);
                    other.1.ring();
                    return;
                }
                if legacy.may_sleep(0, 0) {
                    other.0.wait();
                    legacy.set_awake();
                }
            }
        });
        let call = Call {
            port: 0x71,
            size: 1,
        };
        if vcpu.call(1, call) {
            kick.ring();
        }
        // A vCPU looks for a while before it sleeps.
        if let Some(value) = vcpu.reply(1) {
            assert_eq!(value, 0x26);
        }
        reply.wait();
        assert_eq!(vcpu.reply(1), Some(0x26));
        legacy.join().unwrap();
    });
}

#[test]
fn interrupt_requests_are_taken_once_each() {
    check(|| {
        let (vcpu, legacy) = pages();
        let legacy = thread::spawn(move || {
            legacy.request(1 << 4);
            legacy.request(1 << 8);
        });
        let first = vcpu.take_requests();
        legacy.join().unwrap();
        let second = vcpu.take_requests();
        assert_eq!((first | second, first & second), (1 << 4 | 1 << 8, 0));
    });
}
