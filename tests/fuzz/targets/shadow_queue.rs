//! The driver half of a shadow virtqueue against a device that writes anything into the used ring.
#![no_main]

use bulkhead_ipc::ring::{RequestLayout, ShadowDriver, Span};
use bulkhead_ipc::shared::sealed_memfd;
use bulkhead_ipc::window::{Window, WindowLayout};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let layout = WindowLayout::new(1 << 18, &[16]).unwrap();
    let queue = layout.queues[0];
    let fd = sealed_memfd("w", layout.bytes as u64).unwrap();
    let window = Window::map(fd, layout).unwrap();
    let mut driver = ShadowDriver::new(queue);
    let mut in_flight = 0u16;
    let used_bytes = 6 + 8 * usize::from(queue.descriptors);
    // Each step: submit some, let the device scribble, take completions.
    for step in data.chunks(32) {
        let submits = step[0] % 8;
        for n in 0..submits {
            if driver.next_slot().is_none() {
                break;
            }
            let mut request = RequestLayout::default();
            request.push(Span {
                offset: window.layout.data,
                len: 16,
                writable: false,
            });
            let len = u32::from(n) * 100 + 1;
            request.push(Span {
                offset: window.layout.data + 4096,
                len,
                writable: true,
            });
            driver.submit(&window.memory, &request);
            in_flight += 1;
        }
        driver.announce(&window.memory);
        if let [_, a, b, rest @ ..] = step {
            let at = usize::from(u16::from_le_bytes([*a, *b])) % (used_bytes - rest.len());
            window
                .memory
                .slice(queue.used_ring + at, rest.len())
                .copy_from(rest);
        }
        while let Ok(Some(_)) = driver.complete(&window.memory) {
            in_flight -= 1;
        }
        assert_eq!(driver.in_flight(), in_flight);
        driver.enable_calls(&window.memory);
    }
});
