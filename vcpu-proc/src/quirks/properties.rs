//! Whatever a guest puts into memory and registers, this layer ends without a panic.

use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::ops::InternalError;
use super::recorder::Recorder;
use super::{MSR_LSTAR, VcpuQuirks};
use crate::paging::{Access, Paging};

type Memory = GuestMemoryMmap<()>;
const MEMORY_BYTES: usize = 64 << 10;

/// Addresses inside of memory, at its end, at page ends, and anywhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        0..MEMORY_BYTES as u64,
        (1..16_u64).prop_map(|page| page * 4096 - 3),
        Just(MEMORY_BYTES as u64 - 1),
        Just(u64::MAX),
        Just(0x7fff_ffff_fff8),
        any::<u64>(),
    ]
}

/// Instruction bytes: prefixes and opcodes of the groups that are completed, then anything.
fn instruction() -> impl Strategy<Value = Vec<u8>> {
    let prefix = prop::sample::subsequence(vec![0x66_u8, 0xf2, 0xf3, 0xf0, 0x64, 0x65, 0x67], 0..3);
    let rex = prop_oneof![Just(vec![]), (0x40..0x50_u8).prop_map(|rex| vec![rex])];
    let opcode = prop_oneof![
        Just(vec![0x0f, 0xae]),
        Just(vec![0x0f, 0xc7]),
        Just(vec![0x0f, 0x01]),
        Just(vec![0x0f, 0x00]),
        (0x10..0x18_u8).prop_map(|opcode| vec![0x0f, opcode]),
        (0x54..0x80_u8).prop_map(|opcode| vec![0x0f, opcode]),
        (0xb8..0xbe_u8).prop_map(|opcode| vec![0x0f, opcode]),
        (0xf0..=0xff_u8).prop_map(|opcode| vec![0x0f, 0x38, opcode]),
        (0x80..0x84_u8).prop_map(|opcode| vec![0x0f, 0x38, opcode]),
        (any::<u8>(), any::<u8>()).prop_map(|(a, b)| vec![0xc4, 0xe2, a, b]),
        prop::collection::vec(any::<u8>(), 1..4),
    ];
    (prefix, rex, opcode, any::<[u8; 7]>())
        .prop_map(|(prefix, rex, opcode, rest)| [prefix, rex, opcode, rest.to_vec()].concat())
}

prop_compose! {
    fn vcpu()(
        gprs in prop::collection::vec(address(), 12),
        tables in prop::collection::vec(address(), 6),
        cr0 in prop_oneof![Just(0x8001_0033_u64), Just(0x8000_0001), Just(0x11), Just(0x10), any::<u64>()],
        cr4 in prop_oneof![Just(0x7_06b0_u64), Just(0x37_06b0), Just(0x10), any::<u64>()],
        efer in prop_oneof![Just(0xd01_u64), Just(0), any::<u64>()],
        bits in any::<[u8; 6]>(),
        limit in any::<u16>(),
        rflags in any::<u64>(),
        image in prop::collection::vec(any::<u32>(), 8),
    ) -> Recorder {
        let mut vcpu = Recorder::default();
        let r = &mut vcpu.regs;
        (r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi) =
            (gprs[0], gprs[1], gprs[2], gprs[3], gprs[4], gprs[5]);
        (r.rsp, r.rbp, r.r8, r.r9, r.r12, r.rip) =
            (gprs[6], gprs[7], gprs[8], gprs[9], gprs[10], gprs[11]);
        r.rflags = rflags;
        let s = &mut vcpu.sregs;
        (s.cr0, s.cr4, s.efer, s.cr3) = (cr0, cr4, efer, tables[0]);
        (s.fs.base, s.gs.base, s.ds.base, s.cs.base) = (tables[1], tables[2], tables[3], tables[4]);
        (s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit) = (tables[5], limit, tables[4], limit);
        (s.cs.l, s.cs.db, s.ss.dpl) = (bits[0] & 1, bits[1] & 1, bits[2] & 3);
        vcpu.xcr0 = u64::from(bits[3]);
        for (slot, word) in image.into_iter().enumerate() {
            vcpu.xsave.region[slot] = word;
            vcpu.xsave.region[128 + slot] = word;
        }
        vcpu.error = InternalError { suberror: 1, ..InternalError::default() };
        vcpu.msrs.insert(MSR_LSTAR, tables[3]);
        vcpu
    }
}

/// Memory whose first pages are tables that map it one to one, followed by `contents`.
fn memory(contents: &[u8]) -> Memory {
    let mem = Memory::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("anonymous memory");
    for start in (0x4000..MEMORY_BYTES).step_by(contents.len()) {
        let room = contents.len().min(MEMORY_BYTES - start);
        mem.write_slice(&contents[..room], GuestAddress(start as u64))
            .expect("in range");
    }
    for (at, entry) in [
        (0, 0x1007_u64),
        (0x1000, 0x2007),
        (0x2000, 0x87),
        (0x3000, 0x87),
    ] {
        mem.write_obj(entry, GuestAddress(at)).expect("in range");
    }
    mem
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn completing_any_instruction_in_any_state_never_panics(
        vcpu in vcpu(),
        code in instruction(),
        contents in prop::collection::vec(any::<u8>(), 64..512),
        sane in any::<bool>(),
    ) {
        let mut vcpu = vcpu;
        if sane {
            // 64-bit ring 0 over the prepared tables, so that memory operands get somewhere.
            (vcpu.sregs.cr0, vcpu.sregs.cr3, vcpu.sregs.efer) = (0x8001_0033, 0, 0xd01);
            (vcpu.sregs.cr4, vcpu.sregs.cs.l, vcpu.sregs.ss.dpl) = (0x5_06b0, 1, 0);
        }
        vcpu.error.instruction[..code.len().min(15)].copy_from_slice(&code[..code.len().min(15)]);
        vcpu.error.instruction_len = u8::try_from(code.len().min(15)).expect("at most 15");
        let mem = memory(&contents);
        let rip = vcpu.regs.rip;
        match VcpuQuirks::default().on_internal_error(&mut vcpu, &mem) {
            Ok(super::Handled::Completed) => prop_assert_ne!(vcpu.regs.rip, rip),
            Ok(super::Handled::Faulted(_)) | Err(_) => prop_assert_eq!(vcpu.regs.rip, rip),
            Ok(other) => prop_assert!(false, "{:?} is no outcome of an instruction", other),
        }
    }

    #[test]
    fn following_the_gate_and_breakpoints_never_panic(
        vcpu in vcpu(),
        contents in prop::collection::vec(any::<u8>(), 64..512),
        dr6 in any::<u64>(),
    ) {
        let mut vcpu = vcpu;
        let mem = memory(&contents);
        let mut quirks = VcpuQuirks::new(&mut vcpu).expect("recorder");
        quirks.after_exit(&mut vcpu, &mem).expect("recorder");
        let pc = quirks.debug.handler().unwrap_or(0);
        let exit = kvm_bindings::kvm_debug_exit_arch { dr6, pc, ..Default::default() };
        for _ in 0..3 {
            quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder");
            quirks.after_exit(&mut vcpu, &mem).expect("recorder");
        }
    }

    #[test]
    fn any_walk_ends_at_memory_or_with_a_reason(
        vcpu in vcpu(),
        contents in prop::collection::vec(any::<u8>(), 64..512),
        linear in address(),
    ) {
        let mem = memory(&contents);
        let paging = Paging::new(&vcpu.sregs);
        let mut steps = 0;
        let walked = paging.walk(&mem, linear, |_| steps += 1);
        prop_assert!(steps <= 5);
        if let Ok(mapping) = walked {
            prop_assert_eq!(mapping.gpa & 0xfff, linear & 0xfff);
        }
        for access in [Access::Read, Access::Write, Access::Fetch] {
            if paging.access(&mem, linear, access, vcpu.regs.rflags).is_ok() {
                prop_assert!(walked.is_ok());
            }
        }
    }
}
