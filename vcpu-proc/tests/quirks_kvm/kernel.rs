//! Instructions of ring 0, and those whose result is not to be compared.
#![allow(
    unsafe_code,
    reason = "bytes of machine code between two labels of this image"
)]

use kvm_bindings::kvm_regs;

use crate::code::guest_code;
use crate::harness::{CODE, DATA, Guest, Outcome, Raised, Ring, pattern};

guest_code! {
    random_numbers: "rdrand rax", "setc bl", "rdseed rcx", "rdrand edx";
    breakpoint: "nop", "int3", "nop";
    undefined: "nop", "ud2";
    user_access: "stac", "pushfq", "pop rax", "clac", "pushfq", "pop rbx";
    translations: "invpcid rax, [rsi]", "mov ebx, 1";
    bad_translations: "invpcid rax, [rsi]";
    supervisor_state: "mov edx, 0", "movdqu xmm0, [rsi+3]", "lea r12, [rsi+0x1000]", "mov rcx, 8",
        "2: mov qword ptr [r12+rcx*8+504], 0", "loop 2b", "mov eax, 7", "xsaves [r12]",
        "pxor xmm0, xmm0", "xrstors [r12]", "movdqu [rdi], xmm0";
    write_features: "xor ecx, ecx", "xor edx, edx", "mov eax, 3", "xsetbv", "xgetbv", "mov ebx, eax",
        "mov eax, 7", "xsetbv", "xgetbv";
    verify_segments: "mov ax, 0x18", "verw ax", "pushfq", "pop rbx", "mov ax, 0x10", "verw ax",
        "pushfq", "pop rcx", "mov ax, 0x10", "verr ax", "pushfq", "pop rdx";
    caches: "wbinvd", "mov ebx, 1";
    remap: "mov r12, [r14]", "mov [r15], rbx", "mov qword ptr [rsi], 0", "mov qword ptr [rsi+8], 0",
        "mov eax, 2", "invpcid rax, [rsi]", "mov rcx, [r14]";
}

fn kernel(code: &[u8], regs: kvm_regs) -> (Guest, Outcome) {
    let mut guest = Guest::new();
    guest.fill_data(|_| 0);
    let outcome = guest.run(Ring::Kernel, regs, code);
    (guest, outcome)
}

#[test]
fn a_breakpoint_of_the_kernel_traps_behind_it() {
    let (_, outcome) = kernel(breakpoint(), kvm_regs::default());
    let raised = outcome.exception.expect("#BP");
    assert_eq!((raised.vector, raised.rip), (3, CODE + 2));
}

#[test]
fn an_undefined_instruction_of_the_kernel_faults_at_it() {
    let (_, outcome) = kernel(undefined(), kvm_regs::default());
    let raised = outcome.exception.expect("#UD");
    assert_eq!((raised.vector, raised.rip), (6, CODE + 1));
}

#[test]
fn user_access_opens_and_closes() {
    let (_, outcome) = kernel(user_access(), kvm_regs::default());
    assert_eq!(outcome.exception, None);
    assert_eq!(
        (outcome.regs.rax >> 18 & 1, outcome.regs.rbx >> 18 & 1),
        (1, 0)
    );
}

#[test]
fn translations_are_dropped_on_request() {
    for rax in 0..4 {
        let regs = kvm_regs {
            rax,
            rsi: DATA,
            ..Default::default()
        };
        let (_, outcome) = kernel(translations(), regs);
        assert_eq!(
            (outcome.exception, outcome.regs.rbx),
            (None, 1),
            "type {rax}"
        );
    }
    let regs = kvm_regs {
        rax: 4,
        rsi: DATA,
        ..Default::default()
    };
    let (_, outcome) = kernel(bad_translations(), regs);
    assert_eq!(outcome.exception.map(|raised| raised.vector), Some(13));
}

#[test]
fn a_changed_translation_is_seen_after_its_invalidation() {
    let mut guest = Guest::new();
    guest.fill_data(|index| u8::try_from(index >> 12).expect("four pages"));
    // The table entry of DATA's second page, and what would make it the third.
    let regs = kvm_regs {
        rsi: DATA,
        r14: DATA + 0x1000,
        r15: 0x4000 + (DATA + 0x1000) / 4096 * 8,
        rbx: (DATA + 0x2000) | 7,
        ..Default::default()
    };
    let outcome = guest.run(Ring::Kernel, regs, remap());
    assert_eq!(outcome.exception, None);
    assert_eq!((outcome.regs.r12 & 0xff, outcome.regs.rcx & 0xff), (1, 2));
}

#[test]
fn supervisor_state_is_saved_and_restored() {
    let mut guest = Guest::new();
    guest.fill_data(pattern);
    let regs = kvm_regs {
        rsi: DATA,
        rdi: DATA + 0x400,
        ..Default::default()
    };
    let outcome = guest.run(Ring::Kernel, regs, supervisor_state());
    assert_eq!(outcome.exception, None);
    let data = guest.data();
    assert_eq!(data[0x400..0x410], data[3..19]);
    assert_eq!(
        data[0x1000 + 527],
        0x80,
        "the area is in the compacted format"
    );
}

#[test]
fn enabled_features_can_be_changed() {
    let (_, outcome) = kernel(write_features(), kvm_regs::default());
    assert_eq!(outcome.exception, None);
    assert_eq!((outcome.regs.rbx, outcome.regs.rax), (3, 7));
}

#[test]
fn segments_are_verified() {
    let (_, outcome) = kernel(verify_segments(), kvm_regs::default());
    assert_eq!(outcome.exception, None);
    let zero = [outcome.regs.rbx, outcome.regs.rcx, outcome.regs.rdx].map(|flags| flags >> 6 & 1);
    assert_eq!(
        zero,
        [1, 0, 1],
        "data is writable, code is not, but readable"
    );
}

#[test]
fn caches_can_be_written_back() {
    let (_, outcome) = kernel(caches(), kvm_regs::default());
    assert_eq!((outcome.exception, outcome.regs.rbx), (None, 1));
}

#[test]
fn random_numbers_are_given_and_differ() {
    let mut guest = Guest::new();
    let first = guest.run(Ring::Kernel, kvm_regs::default(), random_numbers());
    if matches!(first.exception, Some(Raised { vector: 6, .. })) {
        return;
    }
    assert_eq!((first.exception, first.regs.rbx & 0xff), (None, 1));
    let second = guest.run(Ring::Kernel, kvm_regs::default(), random_numbers());
    assert_ne!(
        (first.regs.rax, first.regs.rcx),
        (second.regs.rax, second.regs.rcx)
    );
}
