//! Tests of both ends of a port over one memory.

use super::*;
use crate::shared::sealed_memfd;
use proptest::prelude::*;
use std::collections::VecDeque;
use std::os::fd::AsFd;
use vm_memory::VolatileSlice;

fn memory() -> OwnedFd {
    let fd = sealed_memfd("p", PORT_BYTES).unwrap();
    stamp(fd.as_fd(), 3).unwrap();
    fd
}

fn pair() -> (Port, Port) {
    let fd = memory();
    let device = Port::map(fd.try_clone().unwrap(), PortEnd::Device, 3).unwrap();
    (device, Port::map(fd, PortEnd::Switch, 3).unwrap())
}

fn send(port: &mut Port, content: &[u8]) -> bool {
    let reserved = port.writer.reserve(&port.memory, content.len()).unwrap();
    let Some(mut record) = reserved else {
        return false;
    };
    assert_eq!(record.write(content), content.len());
    record.commit();
    true
}

fn receive(port: &mut Port) -> Result<Option<Vec<u8>>, PortFault> {
    let Some(len) = port.reader.peek(&port.memory)? else {
        return Ok(None);
    };
    let mut content = vec![0; len];
    assert_eq!(port.reader.copy_out(&port.memory, 0, &mut content), len);
    port.reader.take();
    Ok(Some(content))
}

fn content(number: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| u8::try_from((at + usize::from(number)) % 251).unwrap())
        .collect()
}

#[test]
fn both_directions_are_apart() {
    let (mut device, mut switch) = pair();
    assert!(send(&mut device, &content(1, 60)) && send(&mut switch, &content(2, 70)));
    assert!(
        device.writer.publish(&device.memory),
        "who never looked is rung"
    );
    assert!(switch.writer.publish(&switch.memory));
    assert_eq!(receive(&mut switch), Ok(Some(content(1, 60))));
    assert_eq!(receive(&mut device), Ok(Some(content(2, 70))));
    assert_eq!(receive(&mut switch), Ok(None));
}

#[test]
fn nothing_is_seen_before_it_is_published_nor_when_it_was_given_up() {
    let (mut device, mut switch) = pair();
    let reserved = device.writer.reserve(&device.memory, 100).unwrap();
    drop(reserved.unwrap());
    assert!(send(&mut device, &content(1, 20)));
    assert_eq!(receive(&mut switch), Ok(None));
    assert!(device.writer.publish(&device.memory));
    assert!(
        !device.writer.publish(&device.memory),
        "nothing new, nobody is rung"
    );
    assert_eq!(receive(&mut switch), Ok(Some(content(1, 20))));
}

#[test]
fn busy_reader_is_not_rung_and_a_sleeping_one_is() {
    let (mut device, mut switch) = pair();
    let mut rung = Vec::new();
    for round in 0..4 {
        assert!(send(&mut device, &content(round, 64)));
        rung.push(device.writer.publish(&device.memory));
    }
    assert_eq!(rung, [true, false, false, false]);
    assert_eq!(switch.reader.ask_for_records(&switch.memory), Ok(true));
    while receive(&mut switch).unwrap().is_some() {}
    assert_eq!(switch.reader.ask_for_records(&switch.memory), Ok(false));
    assert!(send(&mut device, &content(9, 64)));
    assert!(device.writer.publish(&device.memory));
}

#[test]
fn full_ring_takes_no_more_and_its_writer_is_woken_when_half_is_free() {
    let (mut device, mut switch) = pair();
    let mut sent = 0u8;
    while send(&mut device, &content(sent, 10_000)) {
        sent += 1;
    }
    assert_eq!(usize::from(sent), PORT_RING_BYTES / 10_008);
    let _rung = device.writer.publish(&device.memory);
    assert_eq!(
        device.writer.ask_for_room(&device.memory, 10_000),
        Ok(false)
    );
    let mut woken_at = None;
    for number in 0..sent {
        assert_eq!(receive(&mut switch), Ok(Some(content(number, 10_000))));
        if switch.reader.release(&switch.memory) {
            assert_eq!(woken_at.replace(number), None, "woken once");
        }
    }
    assert_eq!(woken_at, Some(sent / 2 - 1));
    assert!(send(&mut device, &content(0, PACKET_BYTES_MAX)));
}

#[test]
fn what_is_longer_than_records_are_never_has_room() {
    let (mut device, _switch) = pair();
    let writer = &mut device.writer;
    assert_eq!(writer.has_room(&device.memory, PACKET_BYTES_MAX), Ok(true));
    for len in [PACKET_BYTES_MAX + 1, PORT_RING_BYTES, usize::MAX] {
        assert_eq!(writer.has_room(&device.memory, len), Ok(false));
    }
}

#[test]
fn record_ends_with_what_was_written() {
    let (mut device, mut switch) = pair();
    let mut record = device
        .writer
        .reserve(&device.memory, 30)
        .unwrap()
        .expect("an empty ring");
    let mut bytes = content(7, 40);
    let part = VolatileSlice::from(&mut bytes[..20]);
    assert_eq!(record.write_volatile(&part), 20);
    record.commit();
    assert!(device.writer.publish(&device.memory));
    let len = switch.reader.peek(&switch.memory).unwrap().unwrap();
    assert_eq!(len, 20);
    let mut got = [0; 64];
    let to = VolatileSlice::from(&mut got[..]);
    let copied = switch.reader.copy_out_volatile(&switch.memory, 5, &to);
    assert_eq!((copied, &got[..15]), (15, &bytes[5..20]));
    assert_eq!(
        switch.reader.copy_out(&switch.memory, 21, &mut [0; 4]),
        0,
        "behind the end"
    );
}

#[test]
fn port_of_another_generation_or_of_none_is_refused() {
    let other = Port::map(memory(), PortEnd::Device, 4);
    assert!(matches!(other, Err(PortError::Generation { expected: 4 })));
    let blank = sealed_memfd("p", PORT_BYTES).unwrap();
    assert!(Port::map(blank, PortEnd::Switch, 0).is_err());
    let short = sealed_memfd("p", PORT_BYTES - 4096).unwrap();
    let refused = Port::map(short, PortEnd::Switch, 0);
    assert!(matches!(refused, Err(PortError::Memory(_))));
}

#[test]
fn port_begins_anew_in_another_generation_and_a_late_end_does_no_harm() {
    let (mut device, mut switch) = pair();
    assert!(device.is_met() && switch.is_met());
    for number in 0..3 {
        assert!(
            send(&mut device, &content(number, 900)) && send(&mut switch, &content(number, 50))
        );
    }
    let _rung = (
        device.writer.publish(&device.memory),
        switch.writer.publish(&switch.memory),
    );
    assert_eq!(receive(&mut switch), Ok(Some(content(0, 900))));
    let fd = device.memory.descriptor().unwrap().try_clone_to_owned();
    let fd = fd.unwrap();
    assert_eq!(generation_of(fd.as_fd()), Ok(3));
    drop(switch);
    stamp(fd.as_fd(), 4).unwrap();
    assert_eq!(generation_of(fd.as_fd()), Ok(4));
    let mut switch = Port::map(fd, PortEnd::Switch, 4).unwrap();
    // The card has not noticed yet.
    assert!(send(&mut device, &content(9, 70)));
    let _rung = device.writer.publish(&device.memory);
    assert!(!switch.is_met());
    assert!(device.renew() && !device.renew());
    assert!(device.is_met() && switch.is_met());
    assert_eq!(
        (receive(&mut switch), receive(&mut device)),
        (Ok(None), Ok(None))
    );
    assert!(send(&mut device, &content(1, 60)) && send(&mut switch, &content(2, 70)));
    assert!(device.writer.publish(&device.memory) && switch.writer.publish(&switch.memory));
    assert_eq!(receive(&mut switch), Ok(Some(content(1, 60))));
    assert_eq!(receive(&mut device), Ok(Some(content(2, 70))));
}

#[test]
fn end_that_is_alone_knows_it() {
    let fd = memory();
    let mut device = Port::find(fd.try_clone().unwrap(), PortEnd::Device).unwrap();
    assert!(!device.is_met() && !device.renew());
    let mut switch = Port::map(fd, PortEnd::Switch, 3).unwrap();
    assert!(device.is_met() && switch.is_met());
    let blank = sealed_memfd("p", PORT_BYTES).unwrap();
    assert_eq!(generation_of(blank.as_fd()), Err(Errno::EINVAL));
    assert!(matches!(
        Port::find(blank.try_clone().unwrap(), PortEnd::Switch),
        Err(PortError::Blank)
    ));
    // The switch can write all of it, and does not keep a card from being born by that.
    assert!(Port::find(blank, PortEnd::Device).is_ok());
}

#[test]
fn lying_writer_is_caught() {
    let claims = [
        1u64,
        7,
        12,
        PORT_RING_BYTES as u64 + 8,
        u64::MAX - 7,
        u64::MAX,
    ];
    for claim in claims {
        let (device, mut switch) = pair();
        device
            .memory
            .store(OFFSET_TO_SWITCH, claim, Ordering::Release);
        let caught = receive(&mut switch);
        assert!(
            matches!(caught, Err(PortFault::Produced { got, .. }) if got == claim),
            "{claim}"
        );
    }
    let (device, mut switch) = pair();
    let say = |position: u64, len: u64| {
        device.memory.write(OFFSET_DATA, len);
        device
            .memory
            .store(OFFSET_TO_SWITCH, position, Ordering::Release);
    };
    say(64, 56);
    assert!(receive(&mut switch).unwrap().is_some());
    device
        .memory
        .store(OFFSET_TO_SWITCH, 56u64, Ordering::Release);
    let back = receive(&mut switch);
    assert!(
        matches!(back, Err(PortFault::Produced { .. })),
        "it went back"
    );
    for len in [0, 11, 57, PACKET_BYTES_MAX as u64 + 1, u64::MAX] {
        let (device, mut switch) = pair();
        device.memory.write(OFFSET_DATA, len);
        device
            .memory
            .store(OFFSET_TO_SWITCH, 64u64, Ordering::Release);
        let caught = receive(&mut switch);
        assert!(
            matches!(caught, Err(PortFault::Length { .. })),
            "{len}: {caught:?}"
        );
    }
}

#[test]
fn lying_reader_is_caught() {
    let consumed = OFFSET_TO_SWITCH + OFFSET_CONSUMED;
    for claim in [8u64, 81, u64::MAX] {
        let (mut device, switch) = pair();
        switch.memory.store(consumed, claim, Ordering::Release);
        let caught = device.writer.ask_for_room(&device.memory, 64);
        assert!(
            matches!(caught, Err(PortFault::Consumed { .. })),
            "{claim}: {caught:?}"
        );
    }
    let (mut device, mut switch) = pair();
    assert!(send(&mut device, &content(1, 72)));
    assert!(device.writer.publish(&device.memory));
    assert!(receive(&mut switch).unwrap().is_some());
    let _rung = switch.reader.release(&switch.memory);
    assert_eq!(device.writer.ask_for_room(&device.memory, 64), Ok(true));
    switch.memory.store(consumed, 0u64, Ordering::Release);
    let back = device.writer.ask_for_room(&device.memory, 64);
    assert!(
        matches!(back, Err(PortFault::Consumed { .. })),
        "it went back"
    );
}

proptest! {
    /// Whatever is sent arrives in order and whole, around the end of the ring many times.
    #[test]
    fn records_arrive_as_they_were_sent(
        steps in prop::collection::vec((any::<bool>(), any::<u8>(), 12usize..=PACKET_BYTES_MAX), 1..80),
    ) {
        let (mut device, mut switch) = pair();
        let mut under_way = VecDeque::new();
        for (sends, number, len) in steps {
            if sends {
                let record = content(number, len);
                if send(&mut device, &record) {
                    under_way.push_back(record);
                } else {
                    prop_assert!(!under_way.is_empty(), "an empty ring has room for any record");
                }
                let _rung = device.writer.publish(&device.memory);
            } else {
                prop_assert_eq!(receive(&mut switch).unwrap(), under_way.pop_front());
                let _rung = switch.reader.release(&switch.memory);
            }
        }
        while let Some(record) = under_way.pop_front() {
            prop_assert_eq!(receive(&mut switch).unwrap(), Some(record));
        }
        prop_assert_eq!(receive(&mut switch).unwrap(), None);
    }

    /// Anything in the positions and lengths is a fault or a record within bounds, and ends.
    #[test]
    fn random_memory_never_panics(
        scribbles in prop::collection::vec((0usize..16, any::<u64>(), any::<bool>()), 1..60),
    ) {
        let (mut device, mut switch) = pair();
        for (place, value, small) in scribbles {
            let at = match place {
                0..4 => OFFSET_TO_SWITCH + [0, 8, 0x40, 0x48][place],
                4..8 => OFFSET_TO_DEVICE + [0, 8, 0x40, 0x48][place - 4],
                _ => OFFSET_DATA + (place - 8) * 8,
            };
            switch.memory.write(at, if small { value % 0x800 } else { value });
            for port in [&mut device, &mut switch] {
                for _ in 0..8 {
                    let Ok(Some(record)) = receive(port) else { break };
                    prop_assert!((PACKET_HEADER_BYTES..=PACKET_BYTES_MAX).contains(&record.len()));
                }
                let _rung = port.reader.release(&port.memory);
                let _fault = port.reader.ask_for_records(&port.memory);
                if let Ok(Some(mut record)) = port.writer.reserve(&port.memory, 100) {
                    prop_assert_eq!(record.write(&[1; 200]), 100);
                    record.commit();
                }
                let _rung = port.writer.publish(&port.memory);
                let _fault = port.writer.ask_for_room(&port.memory, PACKET_BYTES_MAX);
            }
        }
    }
}
