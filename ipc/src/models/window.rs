//! The window's header: what a device publishes is seen whole or not at all.

use super::check;
use crate::shared::SharedMemory;
use crate::window::{DriverView, Window, WindowLayout};
use loom::thread;

/// Every eight bytes of the header: its fields, and its configuration.
fn windows() -> (Window, Window) {
    let layout = WindowLayout::new(1 << 20, &[1]).unwrap();
    let fields = [0x40, 0x48, 0x80, 0x84, 0x88, 0x100, 0x108];
    let memory = SharedMemory::with_cells(fields);
    let other = Window {
        layout: layout.clone(),
        memory: memory.clone(),
    };
    (Window { layout, memory }, other)
}

#[test]
fn publication_is_seen_whole_or_not_at_all() {
    check(|| {
        let (gate, device) = windows();
        let gate = thread::spawn(move || {
            let mut known = 0;
            for _ in 0..2 {
                if let Some(published) = gate.published(known) {
                    let round = u8::try_from(published.features).unwrap();
                    assert_eq!(published.config[..16], [round; 16]);
                    known = published.seq;
                }
            }
            (gate, known)
        });
        for round in 1..=2u8 {
            device.publish(round.into(), &[round; 16]);
        }
        let (gate, known) = gate.join().unwrap();
        if let Some(published) = gate.published(known) {
            assert_eq!((published.features, published.config[15]), (2, 2));
        }
    });
}

#[test]
fn features_belong_to_an_epoch_that_is_seen() {
    check(|| {
        let (gate, device) = windows();
        let gate = thread::spawn(move || {
            gate.set_driver(DriverView {
                features: 7,
                epoch: 1,
            });
        });
        let seen = device.driver();
        if seen.epoch == 1 {
            assert_eq!(seen.features, 7);
        }
        gate.join().unwrap();
    });
}
