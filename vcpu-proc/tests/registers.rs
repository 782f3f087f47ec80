//! On real KVM: which accesses to virtio registers leave the guest, and what they find (decision 0035).

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use std::fs::File;

use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::platform::VIRTIO_MMIO_BASE;
use bulkhead_ipc::protocol::birth::{HugePages, VirtioSlot};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_vcpu::kvm::{Exit, Host, KvmError, Vm};
use bulkhead_vcpu::memory;
use bulkhead_vcpu::virtio::registers::RegisterFile;
use bulkhead_vcpu::virtio::{self, Cpus, SlotFds};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const CODE: u64 = 0x1000;
const WINDOW_BYTES: u32 = 1 << 18;
const ACKNOWLEDGE: u64 = VIRTIO_MMIO_BASE + 0x64;

/// In real mode, with the registers at the beginning of the data segment; each value that was read is told to a port.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x66, 0xa1, 0x00, 0x00,                               // mov eax, [0]: MagicValue
    0x66, 0xe7, 0x80,                                     // out 0x80, eax
    0x66, 0xa1, 0x00, 0x10,                               // mov eax, [0x1000]: of a slot without a device
    0x66, 0xe7, 0x80,
    0x66, 0xc7, 0x06, 0x64, 0x00, 0x01, 0x00, 0x00, 0x00, // mov dword [0x64], 1
    0x66, 0xc7, 0x06, 0x64, 0x00, 0x03, 0x00, 0x00, 0x00, // mov dword [0x64], 3
    0x66, 0x81, 0x0e, 0x08, 0x00, 0x00, 0x01, 0x00, 0x00, // or dword [8], 0x100: DeviceID
    0x66, 0xa1, 0x08, 0x00,                               // mov eax, [8]
    0x66, 0xe7, 0x80,
    0xf4,                                                 // hlt
];

/// What left the guest.
#[derive(Debug, PartialEq)]
enum Seen {
    Port(u32),
    Write(u64, u32),
}

fn word(data: &[u8]) -> u32 {
    u32::from_le_bytes(data.try_into().unwrap())
}

/// One disk, whose process never says a word.
fn disk() -> (VirtioSlot, SlotFds) {
    let slot = VirtioSlot {
        slot: 0,
        name: "disk".to_owned(),
        kind: VirtioKind::Blk,
        generation: 1,
        queue_sizes: vec![16],
        window_bytes: WINDOW_BYTES,
        features: 0,
        config: vec![0; VirtioKind::Blk.config_bytes()],
        output_position: 0,
        input_position: 0,
    };
    let fds = SlotFds {
        window: sealed_memfd("w", u64::from(WINDOW_BYTES)).unwrap(),
        kick: Doorbell::new().unwrap().into(),
        call: Doorbell::new().unwrap().into(),
    };
    (slot, fds)
}

/// Runs the program in a VM that was prepared like that.
fn run(prepare: impl FnOnce(&Vm) -> Result<(), KvmError>) -> Vec<Seen> {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let vm = Host::new(kvm.unwrap().into()).unwrap().create_vm().unwrap();
    let ram = memory::map(16 << 20, HugePages::Off).unwrap();
    ram.write_slice(PROGRAM, GuestAddress(CODE)).unwrap();
    let registers = RegisterFile::new().unwrap();
    memory::register(&vm, &ram, &registers).unwrap();
    let cpus = Cpus { host: 1, guest: 1 };
    let (_bus, _gates) = virtio::build(ram, &registers, vec![disk()], cpus).unwrap();
    prepare(&vm).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.change_registers(|sregs, regs| {
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        (sregs.ds.base, sregs.ds.limit, sregs.ds.g) = (VIRTIO_MMIO_BASE, u32::MAX, 1);
        (regs.rip, regs.rflags) = (CODE, 2);
    })
    .unwrap();
    let mut seen = Vec::new();
    loop {
        match vcpu.run() {
            Exit::PortWrite {
                port: 0x80, data, ..
            } => seen.push(Seen::Port(word(data))),
            Exit::MmioWrite { address, data } => seen.push(Seen::Write(address, word(data))),
            Exit::Interrupted | Exit::Again => {}
            // KVM_EXIT_HLT: there is no interrupt controller.
            Exit::Unexpected(5) => return seen,
            other => panic!("after {seen:x?}: {other:x?}"),
        }
    }
}

#[test]
fn reads_stay_in_the_guest_and_writes_leave_it() {
    let magic = Seen::Port(u32::from_le_bytes(*b"virt"));
    let rest = [
        Seen::Write(ACKNOWLEDGE, 3),
        Seen::Write(VIRTIO_MMIO_BASE + 8, 0x102),
        // What was written has changed nothing.
        Seen::Port(2),
    ];
    let doorbell = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let connect = |vm: &Vm| vm.connect_doorbell(&doorbell, ACKNOWLEDGE, 1);
    let disconnect = |vm: &Vm| vm.disconnect_doorbell(&doorbell, ACKNOWLEDGE, 1);
    let exits = || vec![Seen::Write(ACKNOWLEDGE, 1)];
    for (seen, acknowledged) in [
        (run(|_| Ok(())), exits()),
        (run(connect), vec![]),
        (run(|vm| connect(vm).and_then(|()| disconnect(vm))), exits()),
    ] {
        let mut seen = seen.into_iter();
        assert_eq!(seen.next().as_ref(), Some(&magic));
        assert_eq!(seen.next(), Some(Seen::Port(0)), "no device");
        let seen: Vec<_> = seen.collect();
        let expected: Vec<_> = acknowledged.iter().chain(&rest).collect();
        assert_eq!(seen.iter().collect::<Vec<_>>(), expected);
    }
    assert_eq!(doorbell.read().unwrap(), 1);
}
