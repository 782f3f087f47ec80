//! A guest that programs anything into virtio-mmio registers, rings and descriptors, and a device
//! that completes whatever reaches it: the gate neither panics nor leaves guest memory, and a reset
//! always works.
#![no_main]

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::platform::VIRTIO_MMIO_BASE;
use bulkhead_ipc::protocol::birth::VirtioSlot;
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_ipc::window::{Window, WindowLayout};
use bulkhead_vcpu::virtio::registers::RegisterFile;
use bulkhead_vcpu::virtio::{Cpus, SlotFds, build};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const WINDOW_BYTES: u32 = 1 << 18;
const RINGS: u64 = 0x1000;

/// They stay mapped until a process ends, so that there is one for all machines; each begins with a reset.
static REGISTERS: OnceLock<RegisterFile> = OnceLock::new();

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let layout = WindowLayout::new(WINDOW_BYTES as usize, &[16]).unwrap();
    let fd = sealed_memfd("w", u64::from(WINDOW_BYTES)).unwrap();
    let window = Window::map(fd.try_clone().unwrap(), layout).unwrap();
    let (kick, call) = (Doorbell::new().unwrap(), Doorbell::new().unwrap());
    let fds = SlotFds {
        window: fd,
        kick: kick.into(),
        call: call.try_clone().unwrap().into(),
    };
    let slot = VirtioSlot {
        slot: 0,
        name: "disk".to_owned(),
        kind: VirtioKind::Blk,
        generation: 1,
        queue_sizes: vec![16],
        window_bytes: WINDOW_BYTES,
        features: 1 << 9,
        config: vec![0; 60],
        output_position: 0,
        input_position: 0,
    };
    let registers = REGISTERS.get_or_init(|| RegisterFile::new().unwrap());
    let (bus, thread) = build(
        memory.clone(),
        registers,
        vec![(slot, fds)],
        Cpus { host: 1, guest: 1 },
    )
    .unwrap();
    let gate = std::thread::spawn(move || thread.run().unwrap());
    window.publish(u64::MAX, &[1]);
    call.ring();
    let set = |offset: u64, value: u32| {
        bus.write(VIRTIO_MMIO_BASE + offset, &value.to_le_bytes());
    };
    let start = || {
        set(0x70, 0);
        set(0x70, 3);
        set(0x24, 1);
        set(0x20, 1);
        set(0x70, 11);
        set(0x38, 16);
        for (register, address) in [(0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000)] {
            set(register, address);
        }
        set(0x44, 1);
        set(0x70, 15);
    };
    let (rings, registers) = data.split_at(data.len() / 2);
    start();
    let rings = &rings[..rings.len().min(0x3000)];
    memory.write_slice(rings, GuestAddress(RINGS)).unwrap();
    bus.wiring()[0].notify[0].write(1).unwrap();
    for step in registers.chunks_exact(6) {
        let offset = u64::from(u16::from_le_bytes([step[0], step[1]]) % 0x120 & !3);
        set(
            offset,
            u32::from_le_bytes([step[2], step[3], step[4], step[5]]),
        );
        let mut value = [0; 4];
        bus.read(VIRTIO_MMIO_BASE + offset, &mut value);
    }
    set(0x70, 0);
    let mut status = [0xff; 4];
    bus.read(VIRTIO_MMIO_BASE + 0x70, &mut status);
    assert_eq!(status, [0; 4]);
    bus.interrupt_waits();
    bus.stop();
    gate.join().unwrap();
});
