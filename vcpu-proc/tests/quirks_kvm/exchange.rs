//! Registers that travel in the `kvm_run` page are those that the ioctls tell.

use bulkhead_vcpu::quirks::ops::VcpuOps;
use kvm_bindings::kvm_regs;

use crate::code::guest_code;
use crate::harness::{CODE, Guest, Ring, STACK_TOP};

guest_code! {
    count: "add rax, 2", "mov rbx, rax";
}

fn ran() -> Guest {
    let mut guest = Guest::new();
    let regs = kvm_regs {
        rax: 40,
        ..Default::default()
    };
    assert_eq!(guest.run(Ring::Kernel, regs, count()).regs.rbx, 42);
    guest
}

#[test]
fn page_holds_what_the_ioctls_tell() {
    let mut guest = ran();
    let vcpu = &mut guest.vcpu;
    vcpu.expect(false);
    assert_eq!(VcpuOps::regs(vcpu).unwrap(), vcpu.get_regs().unwrap());
    assert_eq!(VcpuOps::sregs(vcpu).unwrap(), vcpu.get_sregs().unwrap());
    let (page, ioctl) = (vcpu.events().unwrap(), vcpu.get_vcpu_events().unwrap());
    assert_eq!(page, ioctl);
}

#[test]
fn changes_arrive_when_applied_and_with_the_next_run() {
    let mut guest = ran();
    let vcpu = &mut guest.vcpu;
    vcpu.expect(false);
    let (mut regs, mut sregs) = (VcpuOps::regs(vcpu).unwrap(), VcpuOps::sregs(vcpu).unwrap());
    regs.r9 = 0x1234_5678_9abc;
    sregs.cr2 = 0x7000;
    VcpuOps::set_regs(vcpu, &regs);
    VcpuOps::set_sregs(vcpu, &sregs);
    // Read back before KVM has it, and not taken by KVM before its time.
    assert_eq!(VcpuOps::regs(vcpu).unwrap().r9, 0x1234_5678_9abc);
    assert_ne!(vcpu.get_regs().unwrap().r9, 0x1234_5678_9abc);
    vcpu.apply().unwrap();
    assert_eq!(vcpu.get_regs().unwrap().r9, 0x1234_5678_9abc);
    assert_eq!(vcpu.get_sregs().unwrap().cr2, 0x7000);

    (regs.rip, regs.rsp, regs.rax) = (CODE, STACK_TOP, 5);
    VcpuOps::set_regs(vcpu, &regs);
    vcpu.expect(false);
    vcpu.run().map(drop).unwrap();
    assert_eq!(VcpuOps::regs(vcpu).unwrap().rbx, 7);
}

#[test]
fn kick_during_an_exchange_is_kept() {
    let mut guest = ran();
    let vcpu = &mut guest.vcpu;
    vcpu.set_kvm_immediate_exit(1);
    vcpu.expect(false);
    VcpuOps::regs(vcpu).unwrap();
    assert_eq!(vcpu.get_kvm_run().immediate_exit, 1);
    vcpu.set_kvm_immediate_exit(0);
    vcpu.expect(false);
    VcpuOps::regs(vcpu).unwrap();
    assert_eq!(vcpu.get_kvm_run().immediate_exit, 0);
}

#[test]
fn registers_that_kvm_refuses_are_an_error() {
    let mut guest = ran();
    let vcpu = &mut guest.vcpu;
    let mut sregs = VcpuOps::sregs(vcpu).unwrap();
    // Paging without protection.
    sregs.cr0 = 1 << 31;
    VcpuOps::set_sregs(vcpu, &sregs);
    assert_eq!(vcpu.apply().unwrap_err().errno(), libc::EINVAL);
}
