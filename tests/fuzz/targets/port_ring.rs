//! Both ends of a port against a peer that writes anything into the positions and lengths of its rings.
#![no_main]

use bulkhead_ipc::port::{PACKET_BYTES_MAX, PACKET_HEADER_BYTES, PORT_BYTES, Port, PortEnd, stamp};
use bulkhead_ipc::shared::sealed_memfd;
use libfuzzer_sys::fuzz_target;
use std::os::fd::AsFd;

/// Where positions and the first lengths of both rings are.
const PLACES: [usize; 3] = [0x100, 0x200, 0x1000];

fuzz_target!(|data: &[u8]| {
    let fd = sealed_memfd("p", PORT_BYTES).unwrap();
    stamp(fd.as_fd(), 1).unwrap();
    let device = Port::map(fd.try_clone().unwrap(), PortEnd::Device, 1).unwrap();
    let mut ends = [device, Port::map(fd, PortEnd::Switch, 1).unwrap()];
    let mut content = vec![0; PACKET_BYTES_MAX];
    for step in data.chunks(16) {
        let [what, place, at, rest @ ..] = step else {
            break;
        };
        // Scribbling reaches every byte of a line of positions, or of the first records.
        let at = PLACES[usize::from(*place) % 3] + usize::from(*at % 240);
        if what % 4 != 0 {
            ends[0].memory.slice(at, rest.len()).copy_from(rest);
        }
        for port in &mut ends {
            let reserved = port.writer.reserve(&port.memory, usize::from(*what) * 300);
            if let Ok(Some(mut record)) = reserved {
                record.write(&content[..usize::from(*what) * 300]);
                record.commit();
            }
            let _rings = port.writer.publish(&port.memory);
            let _fault = port.writer.ask_for_room(&port.memory, PACKET_BYTES_MAX);
            for _ in 0..4 {
                let Ok(Some(len)) = port.reader.peek(&port.memory) else {
                    break;
                };
                assert!((PACKET_HEADER_BYTES..=PACKET_BYTES_MAX).contains(&len));
                assert_eq!(port.reader.copy_out(&port.memory, 0, &mut content), len);
                port.reader.take();
            }
            let _rings = port.reader.release(&port.memory);
            let _fault = port.reader.ask_for_records(&port.memory);
        }
    }
});
