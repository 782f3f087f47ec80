//! The shadow virtqueue: no request and no completion is lost, and nobody sleeps for ever.

use super::bell::Bell;
use super::check;
use super::device::Device;
use crate::ring::{RequestLayout, ShadowDriver, Span};
use crate::shared::SharedMemory;
use crate::window::{QueueLayout, WindowLayout};
use loom::thread;

const REQUESTS: u32 = 2;

/// The queue with `REQUESTS` slots, and memory with a cell for each of its fields.
fn queue() -> (QueueLayout, SharedMemory) {
    let size = u16::try_from(REQUESTS).unwrap();
    let q = WindowLayout::new(1 << 20, &[size]).unwrap().queues[0];
    let n = usize::from(q.descriptors);
    let mut cells = Vec::new();
    // Of a request with one span only the first descriptor of a slot is used.
    for at in (0..n).step_by(4).map(|d| q.desc_table + 16 * d) {
        cells.extend([at, at + 8, at + 12, at + 14]);
    }
    cells.push(q.avail_ring + 2);
    cells.extend((0..REQUESTS as usize).map(|i| q.avail_ring + 4 + 2 * i));
    cells.push(q.avail_ring + 4 + 2 * n);
    cells.push(q.used_ring + 2);
    for at in (0..REQUESTS as usize).map(|i| q.used_ring + 4 + 8 * i) {
        cells.extend([at, at + 4]);
    }
    cells.push(q.used_ring + 4 + 8 * n);
    (q, SharedMemory::with_cells(cells))
}

fn request(number: u32) -> RequestLayout {
    let mut layout = RequestLayout::default();
    layout.push(Span {
        offset: 0x4000 + number as usize,
        len: 100 + number,
        writable: true,
    });
    layout
}

/// A device that serves until it has seen all requests, and sleeps in between.
fn serve(layout: QueueLayout, memory: &SharedMemory, kick: &Bell, call: &Bell) {
    let mut device = Device::new(layout);
    let mut served = 0;
    while served < REQUESTS {
        while let Some(chain) = device.pop(memory) {
            assert_eq!(
                chain.address,
                u64::from(0x4000 + served),
                "the whole request is seen"
            );
            assert_eq!(chain.len, 100 + served);
            device.add_used(memory, chain.head, chain.len);
            served += 1;
        }
        if device.needs_notification(memory) {
            call.ring();
        }
        if served < REQUESTS && !device.enable_notification(memory) {
            kick.wait();
        }
    }
}

#[test]
fn no_request_is_lost_and_a_sleeping_device_is_woken() {
    check(|| {
        let (layout, memory) = queue();
        let (kick, call) = (Bell::default(), Bell::default());
        let other = (memory.clone(), kick.clone(), call.clone());
        let device = thread::spawn(move || serve(layout, &other.0, &other.1, &other.2));
        let mut driver = ShadowDriver::new(layout);
        driver.disable_calls(&memory);
        for number in 0..REQUESTS {
            driver.submit(&memory, &request(number));
            if driver.announce(&memory) {
                kick.ring();
            }
        }
        device.join().unwrap();
    });
}

#[test]
fn no_completion_is_lost_and_a_sleeping_gate_is_woken() {
    check(|| {
        let (layout, memory) = queue();
        let (kick, call) = (Bell::default(), Bell::default());
        let mut driver = ShadowDriver::new(layout);
        for number in 0..REQUESTS {
            driver.submit(&memory, &request(number));
        }
        let other = (memory.clone(), kick, call.clone());
        let device = thread::spawn(move || serve(layout, &other.0, &other.1, &other.2));
        let mut done = 0;
        while done < REQUESTS {
            driver.disable_calls(&memory);
            while let Some(completion) = driver.complete(&memory).unwrap() {
                assert_eq!(completion.written, 100 + done, "the whole element is seen");
                done += 1;
            }
            if done < REQUESTS && !driver.enable_calls(&memory) {
                call.wait();
            }
        }
        device.join().unwrap();
    });
}
