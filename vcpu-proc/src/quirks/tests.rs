//! Claims about the quirks layer that need no KVM.

use kvm_bindings::{
    CpuId, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_SINGLESTEP, kvm_cpuid_entry2, kvm_debug_exit_arch,
    kvm_segment,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::machine::Exception;
use super::ops::{InternalError, VcpuOps};
use super::recorder::{Call, Recorder};
use super::{Handled, MSR_LSTAR, QuirkError, VcpuQuirks, filter_cpuid};

const CODE: u64 = 0x1_0000;
const STACK: u64 = 0x2_0000;
const DATA: u64 = 0x3_0000;
const IDT: u64 = 0x4_0000;
const HANDLER: u64 = 0x5_0000;
const LSTAR: u64 = 0xffff_8000_0000_1000;
const USER_CODE: u64 = 0x6_0000;

type Memory = GuestMemoryMmap<()>;

/// 2 MiB of memory, mapped one to one for every ring by one large page.
fn memory() -> Memory {
    let mem = Memory::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("anonymous memory");
    let put = |at: u64, entry: u64| mem.write_obj(entry, GuestAddress(at)).expect("in range");
    put(0x1000, 0x2007);
    put(0x2000, 0x3007);
    put(0x3000, 0x87);
    mem
}

/// A vCPU in 64-bit ring 0.
fn vcpu() -> Recorder {
    let mut vcpu = Recorder {
        xcr0: 7,
        ..Recorder::default()
    };
    vcpu.sregs.cr0 = 0x8001_0033;
    vcpu.sregs.cr3 = 0x1000;
    vcpu.sregs.cr4 = 0x0004_06b0 | 1 << 16;
    vcpu.sregs.efer = 0xd01;
    vcpu.sregs.cs = kvm_segment {
        selector: 0x10,
        l: 1,
        present: 1,
        s: 1,
        ..Default::default()
    };
    vcpu.sregs.ss = kvm_segment {
        selector: 0x18,
        db: 1,
        present: 1,
        s: 1,
        ..Default::default()
    };
    vcpu.regs.rip = CODE;
    vcpu.regs.rsp = STACK;
    vcpu.regs.rflags = 2;
    vcpu.xsave.region[0] = 0x37f;
    vcpu.xsave.region[6] = 0x1f80;
    vcpu.error = InternalError {
        suberror: 1,
        ..InternalError::default()
    };
    vcpu
}

/// Lets the quirks layer complete `code`, which KVM is said to have given up on.
fn run(vcpu: &mut Recorder, mem: &Memory, code: &[u8]) -> Result<Handled, QuirkError> {
    mem.write_slice(code, GuestAddress(vcpu.regs.rip))
        .expect("code fits");
    VcpuQuirks::default().on_internal_error(vcpu, mem)
}

/// What the set-up of a vCPU does as far as quirks are concerned, as the run loop does it.
fn set_up(vcpu: &mut Recorder, host_needs_quirks: bool) -> Option<VcpuQuirks> {
    host_needs_quirks.then(|| VcpuQuirks::new(vcpu).expect("recorder"))
}

#[test]
fn complete_kvm_sees_no_request_of_this_layer() {
    let mut without = vcpu();
    let mut with = vcpu();
    assert!(set_up(&mut without, false).is_none());
    assert!(set_up(&mut with, true).is_some());
    assert_eq!(without.calls, []);
    assert_eq!(with.calls, [Call::GetMsr(MSR_LSTAR)]);
}

#[test]
fn a_guest_that_never_sets_lstar_costs_no_request_an_exit() {
    let (mut vcpu, mem) = (vcpu(), memory());
    let mut quirks = VcpuQuirks::new(&mut vcpu).expect("recorder");
    vcpu.calls.clear();
    for _ in 0..1000 {
        quirks.after_exit(&mut vcpu, &mem).expect("recorder");
    }
    assert_eq!(vcpu.calls, []);
}

#[test]
fn paravirtual_features_that_hypercall_are_taken_away_and_others_stay() {
    let leaf = |function, eax| kvm_cpuid_entry2 {
        function,
        eax,
        ..Default::default()
    };
    let mut cpuid =
        CpuId::from_entries(&[leaf(1, !0), leaf(0x4000_0001, !0)]).expect("two entries");
    filter_cpuid(&mut cpuid);
    assert_eq!(cpuid.as_slice()[0].eax, !0);
    assert_eq!(cpuid.as_slice()[1].eax, !0x7af0);
}

fn set_gate(mem: &Memory, handler: u64) {
    let gate = (handler & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    mem.write_obj(gate, GuestAddress(IDT + 14 * 16))
        .expect("in range");
    mem.write_obj(handler >> 32, GuestAddress(IDT + 14 * 16 + 8))
        .expect("in range");
}

/// A vCPU whose guest has an IDT and has just written LSTAR.
fn armed() -> (Recorder, Memory, VcpuQuirks) {
    let (mut vcpu, mem) = (vcpu(), memory());
    vcpu.sregs.idt.base = IDT;
    vcpu.sregs.idt.limit = 0xfff;
    set_gate(&mem, HANDLER);
    let mut quirks = VcpuQuirks::new(&mut vcpu).expect("recorder");
    assert!(
        quirks
            .on_wrmsr(&mut vcpu, MSR_LSTAR, LSTAR)
            .expect("recorder")
    );
    quirks.after_exit(&mut vcpu, &mem).expect("recorder");
    (vcpu, mem, quirks)
}

#[test]
fn writing_lstar_sets_the_breakpoint_on_the_page_fault_handler() {
    let (vcpu, _, _) = armed();
    assert_eq!(vcpu.msrs[&MSR_LSTAR], LSTAR);
    assert_eq!(vcpu.guest_debug.arch.debugreg[3], HANDLER);
    assert_eq!(
        vcpu.guest_debug.arch.debugreg[7] & 0xff,
        0x80,
        "slot 3, execution"
    );
}

#[test]
fn the_breakpoint_follows_the_gate_and_an_exit_without_change_makes_no_ioctl() {
    let (mut vcpu, mem, mut quirks) = armed();
    vcpu.calls.clear();
    quirks.after_exit(&mut vcpu, &mem).expect("recorder");
    assert_eq!(vcpu.calls, [Call::GetSregs]);
    set_gate(&mem, HANDLER + 0x100);
    quirks.after_exit(&mut vcpu, &mem).expect("recorder");
    assert_eq!(vcpu.guest_debug.arch.debugreg[3], HANDLER + 0x100);
    vcpu.sregs.idt.limit = 0;
    quirks.after_exit(&mut vcpu, &mem).expect("recorder");
    assert_eq!(vcpu.guest_debug.control, 0, "no gate, no breakpoint");
}

/// Puts the frame of a page fault on the stack and stops the vCPU at the handler.
fn fault_at_handler(vcpu: &mut Recorder, mem: &Memory, rip: u64, cs: u64) -> kvm_debug_exit_arch {
    for (word, slot) in [0x15, rip, cs, 0x1_0246, 0x7ffe_0000, 0x2b]
        .into_iter()
        .zip(0_u64..)
    {
        mem.write_obj::<u64>(word, GuestAddress(STACK + slot * 8))
            .expect("in range");
    }
    vcpu.regs.rip = HANDLER;
    vcpu.regs.rcx = USER_CODE + 2;
    mem.write_slice(&[0x0f, 0x05], GuestAddress(USER_CODE))
        .expect("in range");
    kvm_debug_exit_arch {
        exception: 1,
        pc: HANDLER,
        dr6: 8,
        ..Default::default()
    }
}

#[test]
fn a_syscall_from_ring_3_is_entered() {
    let (mut vcpu, mem, mut quirks) = armed();
    vcpu.set_msr(0xc000_0081, 0x0023_0010_0000_0000)
        .expect("recorder");
    vcpu.set_msr(0xc000_0084, 0x4_7700).expect("recorder");
    let exit = fault_at_handler(&mut vcpu, &mem, LSTAR, 0x33);
    vcpu.regs.r11 = 0x646;
    let handled = quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder");
    assert_eq!(handled, Handled::Syscall);
    assert_eq!(vcpu.regs.rip, LSTAR);
    assert_eq!(vcpu.regs.rsp, 0x7ffe_0000);
    assert_eq!(vcpu.regs.r11, 0x646);
    assert_eq!(vcpu.regs.rflags, 0x46, "FMASK clears IF and DF");
    assert_eq!(
        (vcpu.sregs.cs.selector, vcpu.sregs.ss.selector),
        (0x10, 0x18)
    );
    assert_eq!((vcpu.sregs.cs.dpl, vcpu.sregs.cs.l), (0, 1));
    assert_eq!(quirks.counters().syscalls, 1);
}

#[test]
fn a_page_fault_of_the_guests_own_goes_on_by_a_single_step() {
    let (mut vcpu, mem, mut quirks) = armed();
    for (rip, cs) in [(0x40_0000, 0x33), (LSTAR, 0x10)] {
        mem.write_slice(&[0x50], GuestAddress(HANDLER))
            .expect("in range");
        let exit = fault_at_handler(&mut vcpu, &mem, rip, cs);
        let handled = quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder");
        assert_eq!(handled, Handled::PageFault);
        assert_eq!(vcpu.regs.rip, HANDLER);
        let step = KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_BLOCKIRQ;
        assert_eq!(vcpu.guest_debug.control & step, step);
        assert_eq!(
            vcpu.guest_debug.arch.debugreg[7], 0,
            "no breakpoint while stepping"
        );
        let stepped = quirks.on_debug(&mut vcpu, &mem, &kvm_debug_exit_arch::default());
        assert_eq!(stepped.expect("recorder"), Handled::Stepped);
        assert_eq!(vcpu.guest_debug.arch.debugreg[3], HANDLER);
        assert_eq!(vcpu.guest_debug.control & step, 0);
    }
}

#[test]
fn a_handler_that_begins_with_clac_needs_no_single_step() {
    let (mut vcpu, mem, mut quirks) = armed();
    mem.write_slice(&[0x0f, 0x01, 0xca], GuestAddress(HANDLER))
        .expect("in range");
    let exit = fault_at_handler(&mut vcpu, &mem, 0x40_0000, 0x33);
    vcpu.regs.rflags |= 1 << 18;
    quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder");
    assert_eq!(vcpu.regs.rip, HANDLER + 3);
    assert_eq!(vcpu.regs.rflags >> 18 & 1, 0);
    assert_eq!(vcpu.guest_debug.control & KVM_GUESTDBG_SINGLESTEP, 0);
}

#[test]
fn a_program_that_jumps_to_lstar_gets_its_page_fault() {
    let (mut vcpu, mem, mut quirks) = armed();
    let exit = fault_at_handler(&mut vcpu, &mem, LSTAR, 0x33);
    mem.write_slice(&[0xff, 0xe0], GuestAddress(USER_CODE))
        .expect("in range");
    assert_eq!(
        quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder"),
        Handled::PageFault
    );
    vcpu.regs.rip = HANDLER;
    vcpu.regs.rcx = 0xffff_ffff_8000_0000;
    quirks = armed().2;
    assert_eq!(
        quirks.on_debug(&mut vcpu, &mem, &exit).expect("recorder"),
        Handled::PageFault
    );
}

#[test]
fn int3_traps_after_the_instruction() {
    let (mut vcpu, mem) = (vcpu(), memory());
    assert_eq!(
        run(&mut vcpu, &mem, &[0xcc]).expect("completes"),
        Handled::Completed
    );
    assert_eq!(vcpu.regs.rip, CODE + 1);
    assert_eq!(
        (vcpu.events.exception.injected, vcpu.events.exception.nr),
        (1, 3)
    );
}

#[test]
fn ud2_faults_at_the_instruction() {
    let (mut vcpu, mem) = (vcpu(), memory());
    let handled = run(&mut vcpu, &mem, &[0x0f, 0x0b]).expect("completes");
    assert_eq!(handled, Handled::Faulted(Exception::UNDEFINED));
    assert_eq!(vcpu.regs.rip, CODE);
    assert_eq!(vcpu.events.exception.nr, 6);
}

#[test]
fn an_unknown_instruction_of_the_kernel_is_reported_with_its_bytes() {
    let (mut vcpu, mem) = (vcpu(), memory());
    // vaddps ymm0, ymm1, ymm2
    let error = run(&mut vcpu, &mem, &[0xc5, 0xf4, 0x58, 0xc2]).expect_err("unknown");
    let text = error.to_string();
    assert!(
        text.contains("0x10000") && text.contains("c5 f4 58 c2"),
        "{text}"
    );
    assert_eq!(vcpu.regs.rip, CODE);
}

#[test]
fn an_unknown_instruction_of_a_program_is_undefined_there() {
    let (mut vcpu, mem) = (vcpu(), memory());
    vcpu.sregs.ss.dpl = 3;
    vcpu.sregs.cs.dpl = 3;
    let handled = run(&mut vcpu, &mem, &[0xc5, 0xf4, 0x58, 0xc2]).expect("goes on");
    assert_eq!(handled, Handled::Faulted(Exception::UNDEFINED));
}

#[test]
fn a_fault_half_way_leaves_registers_alone_and_tells_the_address() {
    let (mut vcpu, mem) = (vcpu(), memory());
    vcpu.regs.rbx = 0x20_0ff8;
    vcpu.regs.rax = 7;
    // movbe rax, [rbx]
    let handled = run(&mut vcpu, &mem, &[0x48, 0x0f, 0x38, 0xf0, 0x03]).expect("goes on");
    let fault = Exception {
        vector: 14,
        error_code: Some(0),
        address: Some(0x20_0ff8),
    };
    assert_eq!(handled, Handled::Faulted(fault));
    assert_eq!(
        (vcpu.regs.rip, vcpu.regs.rax, vcpu.sregs.cr2),
        (CODE, 7, 0x20_0ff8)
    );
    assert_eq!(
        (
            vcpu.events.exception.nr,
            vcpu.events.exception.has_error_code
        ),
        (14, 1)
    );
}

#[test]
fn cmpxchg16b_exchanges_or_tells_what_it_saw() {
    let (mut vcpu, mem) = (vcpu(), memory());
    mem.write_obj(0x11_u64, GuestAddress(DATA))
        .expect("in range");
    mem.write_obj(0x22_u64, GuestAddress(DATA + 8))
        .expect("in range");
    vcpu.regs.rdi = DATA;
    (vcpu.regs.rax, vcpu.regs.rdx, vcpu.regs.rbx, vcpu.regs.rcx) = (0x11, 0x22, 0x33, 0x44);
    let code = [0xf0, 0x48, 0x0f, 0xc7, 0x0f];
    run(&mut vcpu, &mem, &code).expect("completes");
    assert_ne!(vcpu.regs.rflags & 0x40, 0);
    assert_eq!(
        mem.read_obj::<u64>(GuestAddress(DATA)).expect("in range"),
        0x33
    );
    vcpu.regs.rip = CODE;
    run(&mut vcpu, &mem, &code).expect("completes");
    assert_eq!(vcpu.regs.rflags & 0x40, 0);
    assert_eq!((vcpu.regs.rax, vcpu.regs.rdx), (0x33, 0x44));
}

#[test]
fn cmpxchg16b_of_many_vcpus_loses_no_update() {
    const VCPUS: u64 = 32;
    const UPDATES: u64 = 200;
    let mem = memory();
    mem.write_slice(&[0xf0, 0x48, 0x0f, 0xc7, 0x0f], GuestAddress(CODE))
        .expect("in range");
    std::thread::scope(|scope| {
        for _ in 0..VCPUS {
            scope.spawn(|| {
                let (mut vcpu, mut quirks) = (vcpu(), VcpuQuirks::default());
                vcpu.regs.rdi = DATA;
                let mut done = 0;
                while done < UPDATES {
                    // Both halves count, the upper one downwards.
                    vcpu.regs.rip = CODE;
                    vcpu.regs.rbx = vcpu.regs.rax.wrapping_add(1);
                    vcpu.regs.rcx = vcpu.regs.rdx.wrapping_sub(1);
                    quirks
                        .on_internal_error(&mut vcpu, &mem)
                        .expect("completes");
                    vcpu.calls.clear();
                    done += vcpu.regs.rflags >> 6 & 1;
                }
            });
        }
    });
    let total = VCPUS * UPDATES;
    assert_eq!(
        mem.read_obj::<u64>(GuestAddress(DATA)).expect("in range"),
        total
    );
    assert_eq!(
        mem.read_obj::<u64>(GuestAddress(DATA + 8))
            .expect("in range"),
        total.wrapping_neg()
    );
}

#[test]
fn another_internal_error_is_not_taken_for_an_instruction() {
    let (mut vcpu, mem) = (vcpu(), memory());
    vcpu.error.suberror = 3;
    let error = run(&mut vcpu, &mem, &[0x90]).expect_err("not emulation");
    assert!(matches!(error, QuirkError::NotEmulation { suberror: 3 }));
}

#[test]
fn the_bytes_that_kvm_failed_on_are_believed_before_memory() {
    let (mut vcpu, mem) = (vcpu(), memory());
    vcpu.error.instruction[0] = 0xcc;
    vcpu.error.instruction_len = 1;
    run(&mut vcpu, &mem, &[0x90]).expect("completes");
    assert_eq!(vcpu.events.exception.nr, 3);
}
