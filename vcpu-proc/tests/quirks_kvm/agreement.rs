//! Instructions that both rings have: ring 0 has to agree with ring 3.
#![allow(
    unsafe_code,
    reason = "bytes of machine code between two labels of this image"
)]

use kvm_bindings::kvm_regs;

use crate::code::guest_code;
use crate::harness::{ABSENT, DATA, Guest, Raised, Ring, pattern};

/// Flags that an instruction may leave undefined: AF, PF and OF of bit operations.
const ALL_FLAGS: u64 = !0;
const WITHOUT_PF_AF_OF: u64 = !0x814;

/// Values with interesting bits for the operand registers.
const VALUES: [u64; 8] = [
    0,
    1,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_ffff,
    0x0123_4567_89ab_cdef,
    0x8000_0000,
    0x0000_0000_0000_0d08,
    0xfedc_ba98_7654_3210,
];

fn inputs() -> impl Iterator<Item = kvm_regs> {
    (0..VALUES.len()).flat_map(|first| {
        [3, 6].map(|step| {
            let value = |n: usize| VALUES[(first + step * n) % VALUES.len()];
            kvm_regs {
                rax: value(0),
                rbx: value(1),
                rcx: value(2),
                rdx: value(3),
                rsi: DATA,
                rdi: DATA + 0x400,
                r8: value(4),
                r9: value(5),
                ..Default::default()
            }
        })
    })
}

/// Runs `code` in both rings with each of `inputs`; results must agree, apart from `flags`.
fn agree_with(inputs: impl Iterator<Item = kvm_regs>, code: &[u8], flags: u64) {
    let mut guest = Guest::new();
    for regs in inputs {
        let mut results = [Ring::User, Ring::Kernel].map(|ring| {
            guest.fill_data(pattern);
            let mut outcome = guest.run(ring, regs, code);
            outcome.regs.rflags &= flags;
            if let Some(raised) = &mut outcome.exception {
                raised.rflags &= flags;
                // Which ring it came from.
                raised.error_code &= !4;
            }
            (outcome, guest.data())
        });
        if let Some(Raised { vector: 6, .. }) = results[0].0.exception {
            // The processor does not have the instruction: no kernel uses it.
            continue;
        }
        // The frame of an exception is at another place for each ring.
        if results[0].0.exception.is_some() {
            results[0].0.regs.rsp = results[1].0.regs.rsp;
        }
        assert_eq!(
            results[1].0, results[0].0,
            "ring 0 against ring 3, input {regs:x?}"
        );
        let difference = results[0]
            .1
            .iter()
            .zip(&results[1].1)
            .position(|(a, b)| a != b);
        assert_eq!(
            difference, None,
            "first byte of memory that differs, input {regs:x?}"
        );
    }
}

fn agree(code: &[u8], flags: u64) {
    agree_with(inputs(), code, flags);
}

guest_code! {
    counts: "popcnt rax, rbx", "pushfq", "pop r10", "popcnt ecx, r8d", "popcnt dx, r9w",
        "popcnt r12, [rsi+8]";
    lowest_bits: "blsi rax, rbx", "pushfq", "pop r10", "blsr ecx, edx", "pushfq", "pop r11",
        // PF and AF are what the processor's maker pleases.
        "and r10, -21", "and r11, -21", "blsmsk r12, r8", "blsr r13, [rsi+16]";
    fields: "andn rax, rbx, rcx", "bextr r10, rdx, r8", "bextr r11d, ebx, r9d", "bzhi r12, rdx, r8";
    shifts: "shlx rax, rbx, rcx", "shrx r10d, ebx, ecx", "sarx r11, rdx, r8", "sarx r12d, edx, r9d",
        "rorx r13, rbx, 13", "rorx r14d, ebx, 13", "rorx r15d, ebx, 0";
    scatters: "pdep rax, rbx, rcx", "pext r10, rbx, rcx", "pdep r11d, edx, r8d", "pext r12d, edx, r8d";
    wide: "mulx rax, rbx, rcx", "mulx r10d, r10d, r8d", "mulx r12, r13, [rsi+24]",
        "stc", "adcx rbx, r9", "adox rcx, r8", "adcx ecx, edx";
    checksums: "crc32 eax, bl", "crc32 ecx, edx", "crc32 rbx, r8", "crc32 r9d, byte ptr [rsi+77]";
    compare_exchange: "lock cmpxchg16b [rsi]", "mov r10, rax", "mov r11, rdx", "pushfq", "pop r12",
        "lock cmpxchg16b [rsi]", "cmpxchg8b [rdi]", "cmpxchg8b [rdi]";
    quiet: "lfence", "mfence", "sfence", "prefetcht0 [rsi]", "prefetchnta [rsi]", "prefetchw [rsi]",
        "clflush [rsi]", "endbr64", "pause", "nop dword ptr [rax]", "fwait",
        ".byte 0x0f,0x1c,0x06", "movnti [rdi+64], rax", "movnti [rdi+80], ebx";
    quiet_new: "clflushopt [rsi]", "clwb [rsi]", "serialize";
    control_words: "ldmxcsr [rip+2f]", "stmxcsr [rdi]", "jmp 3f", "2: .long 0x3f80", "3:",
        "fninit", "fnstcw [rdi+8]", "fnstsw ax";
    bad_control_word: "ldmxcsr [rsi+4]";
    moves: "movdqu xmm0, [rsi+3]", "movups xmm1, [rsi+35]", "movaps xmm2, [rsi+64]",
        "movdqa xmm15, [rsi+80]", "movdqa xmm9, xmm2", "movq xmm3, rax", "movd xmm4, ebx",
        "movq xmm5, [rsi+8]", "movq xmm6, xmm0", "movss xmm7, [rsi+4]", "movss xmm1, xmm2",
        "movsd xmm8, [rsi+4]", "movsd xmm2, xmm0", "movlps xmm0, [rsi+88]", "movhps xmm9, [rsi+99]",
        "pxor xmm3, xmm0", "xorps xmm4, xmm1", "por xmm5, [rsi+16]", "pand xmm6, xmm2",
        "pandn xmm7, xmm0", "punpcklqdq xmm8, xmm3", "punpckhqdq xmm9, xmm3", "paddq xmm15, xmm0",
        "movq rcx, xmm0", "movd edx, xmm15", "movntdq [rdi+256], xmm1", "movntps [rdi+272], xmm2",
        "movups [rdi+3], xmm0", "movaps [rdi+32], xmm3", "movdqu [rdi+49], xmm4",
        "movdqa [rdi+80], xmm5", "movups [rdi+97], xmm6", "movups [rdi+113], xmm7",
        "movups [rdi+129], xmm8", "movups [rdi+145], xmm9", "movups [rdi+161], xmm15",
        "movq [rdi+180], xmm0", "movhps [rdi+190], xmm1", "movlpd [rdi+200], xmm2",
        "movss [rdi+210], xmm3";
    misaligned: "movaps xmm0, [rsi+1]";
    legacy_state: "movdqu xmm0, [rsi+3]", "movdqu xmm11, [rsi+35]", "fninit", "fldcw [rsi+6]",
        "fxsave64 [rdi+512]", "pxor xmm0, xmm0", "pxor xmm11, xmm11", "fninit",
        "fxrstor64 [rdi+512]", "movdqu [rdi+1536], xmm0", "movdqu [rdi+1552], xmm11",
        "fnstsw [rdi+1600]", "fxsave64 [rdi+2048]", "mov ecx, 12",
        "2: mov qword ptr [rdi+rcx*8+920], 0", "mov qword ptr [rdi+rcx*8+2456], 0", "loop 2b";
    extended_state: "mov edx, 0", "mov eax, 7", "fninit", "movdqu xmm0, [rsi+3]",
        "movdqu xmm11, [rsi+35]", "lea r12, [rsi+0x1000]", "mov rcx, 8",
        "2: mov qword ptr [r12+rcx*8+504], 0", "loop 2b", "xsave [r12]",
        "pxor xmm0, xmm0", "pxor xmm11, xmm11", "fninit",
        "mov eax, 3", "xrstor [r12]", "movdqu [rdi], xmm0", "movdqu [rdi+16], xmm11", "fnstsw [rdi+32]",
        "mov eax, 2", "mov qword ptr [r12+512], 0", "xrstor [r12]",
        "movdqu [rdi+48], xmm0", "mov qword ptr [r12+512], 4", "mov eax, 4", "xrstor [r12]", "xor eax, eax";
    compacted_state: "mov edx, 0", "movdqu xmm0, [rsi+3]", "movdqu xmm11, [rsi+35]",
        "lea r12, [rsi+0x1000]", "mov rcx, 8",
        "2: mov qword ptr [r12+rcx*8+504], 0", "loop 2b", "mov eax, 2", "xsavec [r12]",
        "pxor xmm0, xmm0", "xrstor [r12]", "movdqu [rdi], xmm0", "xor eax, eax";
    bad_state: "mov eax, 7", "mov edx, 0", "mov qword ptr [rsi+520], 1", "xrstor [rsi]";
    segment_bases: "rdfsbase r10", "rdgsbase r11", "wrfsbase rsi", "mov r12, fs:[8]", "wrgsbase rdi",
        "mov r13, gs:[8]", "rdfsbase r14d";
    absent_read: "popcnt rax, [r14]";
    absent_write: "stmxcsr [r14]";
    absent_write_part: "movups [r14-8], xmm0";
}

#[test]
fn bit_counts_agree_with_the_processor() {
    agree(counts(), WITHOUT_PF_AF_OF);
}

#[test]
fn lowest_bit_operations_agree_with_the_processor() {
    agree(lowest_bits(), WITHOUT_PF_AF_OF);
}

#[test]
fn bit_fields_agree_with_the_processor() {
    agree(fields(), WITHOUT_PF_AF_OF);
}

#[test]
fn shifts_without_flags_agree_with_the_processor() {
    agree(shifts(), ALL_FLAGS);
}

#[test]
fn deposits_and_extracts_agree_with_the_processor() {
    agree(scatters(), ALL_FLAGS);
}

#[test]
fn wide_arithmetic_agrees_with_the_processor() {
    agree(wide(), ALL_FLAGS);
}

#[test]
fn checksums_agree_with_the_processor() {
    agree(checksums(), ALL_FLAGS);
}

#[test]
fn compare_exchange_agrees_with_the_processor() {
    let matching = kvm_regs {
        rax: u64::from_le_bytes(std::array::from_fn(pattern)),
        rdx: u64::from_le_bytes(std::array::from_fn(|index| pattern(index + 8))),
        rbx: 0x1111,
        rcx: 0x2222,
        rsi: DATA,
        rdi: DATA + 0x400,
        ..Default::default()
    };
    agree_with(inputs().chain([matching]), compare_exchange(), ALL_FLAGS);
}

#[test]
fn fences_hints_and_flushes_change_nothing() {
    agree(quiet(), ALL_FLAGS);
    agree(quiet_new(), ALL_FLAGS);
}

#[test]
fn control_words_agree_with_the_processor() {
    agree(control_words(), ALL_FLAGS);
    agree(bad_control_word(), ALL_FLAGS);
}

#[test]
fn vector_moves_agree_with_the_processor() {
    agree(moves(), ALL_FLAGS);
    agree(misaligned(), ALL_FLAGS);
}

#[test]
fn legacy_state_agrees_with_the_processor() {
    agree_with(inputs().take(1), legacy_state(), ALL_FLAGS);
}

#[test]
fn extended_state_agrees_with_the_processor() {
    agree_with(inputs().take(1), extended_state(), ALL_FLAGS);
    agree_with(inputs().take(1), compacted_state(), ALL_FLAGS);
    agree_with(inputs().take(1), bad_state(), ALL_FLAGS);
}

#[test]
fn segment_bases_agree_with_the_processor() {
    agree_with(inputs().take(1), segment_bases(), ALL_FLAGS);
}

#[test]
fn faults_of_completed_instructions_agree_with_the_processor() {
    let regs = kvm_regs {
        r14: ABSENT,
        rax: 7,
        ..Default::default()
    };
    for code in [absent_read(), absent_write(), absent_write_part()] {
        agree_with([regs].into_iter(), code, ALL_FLAGS);
    }
}
