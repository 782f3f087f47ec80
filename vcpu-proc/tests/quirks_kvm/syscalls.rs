//! System calls of ring 3, and page faults beside them.
#![allow(
    unsafe_code,
    reason = "bytes of machine code between two labels of this image"
)]

use kvm_bindings::kvm_regs;
use vm_memory::{Bytes as _, GuestAddress};

use crate::code::guest_code;
use crate::harness::{ABSENT, DATA, ENTRY, Guest, Ring, pattern};

guest_code! {
    set_up_syscall: "mov ecx, 0xc0000081", "xor eax, eax", "mov edx, 0x00230010", "wrmsr",
        "mov ecx, 0xc0000082", "mov eax, 0x70000", "xor edx, edx", "wrmsr",
        "mov ecx, 0xc0000084", "mov eax, 0x400", "xor edx, edx", "wrmsr",
        "mov ecx, 0xc0000080", "rdmsr", "or eax, 1", "wrmsr";
    enter_and_return: "mov r15, 5", "2: std", "mov rax, 77", "syscall", "dec r15", "jnz 2b",
        "mov rbx, [rsi]";
    entry: "mov r10, cs", "mov r12, rcx", "mov r13, r11", "pushfq", "pop r14", "inc r9",
        "sysretq";
    jump_to_entry: "mov rcx, 0x10000", "mov rax, 0x70000", "jmp rax";
    touch_absent: "mov rbx, [r14]";
}

fn with_syscall() -> Guest {
    let mut guest = Guest::new();
    let outcome = guest.run(Ring::Kernel, kvm_regs::default(), set_up_syscall());
    assert_eq!(outcome.exception, None);
    guest
        .mem
        .write_slice(entry(), GuestAddress(ENTRY))
        .expect("in range");
    guest.fill_data(pattern);
    guest
}

#[test]
fn a_system_call_of_ring_3_enters_the_kernel_and_returns() {
    let mut guest = with_syscall();
    let regs = kvm_regs {
        rsi: DATA,
        ..Default::default()
    };
    let outcome = guest.run(Ring::User, regs, enter_and_return());
    assert_eq!(outcome.exception, None, "{:x?}", outcome.regs);
    assert_eq!((outcome.regs.r9, outcome.regs.r15), (5, 0), "five calls");
    assert_eq!(outcome.regs.r10, 0x10, "the kernel's code segment");
    assert_eq!(
        outcome.regs.r13 & 0x400,
        0x400,
        "R11 has the caller's flags"
    );
    assert_eq!(
        outcome.regs.r14 & 0x400,
        0,
        "FMASK cleared the direction flag"
    );
    assert_eq!(outcome.regs.rax, 77);
    if let Some(counters) = guest.counters() {
        assert_eq!(counters.syscalls, 5);
    }
}

#[test]
fn a_jump_to_the_entry_point_is_a_page_fault() {
    let mut guest = with_syscall();
    let outcome = guest.run(Ring::User, kvm_regs::default(), jump_to_entry());
    let raised = outcome.exception.expect("#PF");
    assert_eq!((raised.vector, raised.rip, outcome.cr2), (14, ENTRY, ENTRY));
    assert_eq!(outcome.regs.r9, 0);
}

#[test]
fn page_faults_arrive_while_system_calls_are_watched() {
    let mut guest = with_syscall();
    for ring in [Ring::User, Ring::Kernel] {
        let regs = kvm_regs {
            r14: ABSENT + 8,
            ..Default::default()
        };
        let outcome = guest.run(ring, regs, touch_absent());
        let raised = outcome.exception.expect("#PF");
        assert_eq!((raised.vector, outcome.cr2), (14, ABSENT + 8));
        assert_eq!(raised.error_code, if ring == Ring::User { 4 } else { 0 });
    }
}
