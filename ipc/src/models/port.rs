//! A port's packet ring: no record is lost or torn, and neither side sleeps for ever.

use super::bell::Bell;
use super::check;
use crate::port::small::{CONTENT, late_card, ring};
use crate::port::{PacketReader, PacketWriter, Port, PortEnd};
use crate::shared::SharedMemory;
use loom::thread;

fn put(writer: &mut PacketWriter, memory: &SharedMemory, number: u8) -> bool {
    let Some(mut record) = writer.reserve(memory, CONTENT).unwrap() else {
        return false;
    };
    assert_eq!(record.write(&[number; CONTENT]), CONTENT);
    record.commit();
    true
}

/// Takes what is there. Returns the number of the last record.
fn drain(reader: &mut PacketReader, memory: &SharedMemory, mut last: u8) -> u8 {
    while let Some(len) = reader.peek(memory).unwrap() {
        let mut content = [0; CONTENT];
        assert_eq!(
            reader.copy_out(memory, 0, &mut content),
            len,
            "a whole record"
        );
        last += 1;
        assert_eq!(content, [last; CONTENT], "in order, and not torn");
        reader.take();
    }
    last
}

#[test]
fn no_record_is_lost_and_a_sleeping_reader_is_woken() {
    check(|| {
        let (mut writer, mut reader, memory) = ring(2);
        let bell = Bell::default();
        let other = (memory.clone(), bell.clone());
        let reading = thread::spawn(move || {
            let (memory, bell) = other;
            let mut last = 0;
            while last < 2 {
                last = drain(&mut reader, &memory, last);
                if last < 2 && !reader.ask_for_records(&memory).unwrap() {
                    bell.wait();
                }
            }
        });
        for number in 1..=2 {
            assert!(put(&mut writer, &memory, number));
            if writer.publish(&memory) {
                bell.ring();
            }
        }
        reading.join().unwrap();
    });
}

#[test]
fn writer_without_room_is_woken_and_overwrites_nothing() {
    check(|| {
        let (mut writer, mut reader, memory) = ring(1);
        let (records, room) = (Bell::default(), Bell::default());
        let other = (memory.clone(), records.clone(), room.clone());
        let reading = thread::spawn(move || {
            let (memory, records, room) = other;
            let mut last = 0;
            while last < 2 {
                last = drain(&mut reader, &memory, last);
                if reader.release(&memory) {
                    room.ring();
                }
                if last < 2 && !reader.ask_for_records(&memory).unwrap() {
                    records.wait();
                }
            }
        });
        for number in 1..=2 {
            while !put(&mut writer, &memory, number) {
                if !writer.ask_for_room(&memory, CONTENT).unwrap() {
                    room.wait();
                }
            }
            if writer.publish(&memory) {
                records.ring();
            }
        }
        reading.join().unwrap();
    });
}

#[test]
fn late_card_and_next_switch_meet_and_neither_sees_what_was_before() {
    check(|| {
        let (mut card, memory) = late_card();
        let sending = thread::spawn(move || {
            // It has not noticed that its switch is another one.
            assert!(put(&mut card.writer, &card.memory, 7));
            let _rung = card.writer.publish(&card.memory);
            assert!(card.renew());
            while !card.is_met() {
                thread::yield_now();
            }
            assert!(put(&mut card.writer, &card.memory, 1));
            let _rung = card.writer.publish(&card.memory);
        });
        let mut switch = Port::over(memory, PortEnd::Switch);
        while !switch.is_met() {
            thread::yield_now();
        }
        let mut last = 0;
        while last < 1 {
            last = drain(&mut switch.reader, &switch.memory, last);
            thread::yield_now();
        }
        sending.join().unwrap();
    });
}
