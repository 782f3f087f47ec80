//! A bare machine: 2 MiB of memory mapped one to one, 64-bit mode, an IDT whose every gate halts.
//!
//! Code runs in ring 0 or in ring 3 until it halts; `hlt` in ring 3 is a protection fault, which ends
//! the run as well. On hosts whose KVM is incomplete the quirks layer is in place, elsewhere not.
#![allow(unsafe_code, reason = "KVM_SET_USER_MEMORY_REGION")]

use std::path::Path;

use bulkhead_ipc::host::host_needs_quirks;
use bulkhead_vcpu::cpuid;
use bulkhead_vcpu::quirks::{self, Counters, VcpuQuirks};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

pub(crate) const CODE: u64 = 0x1_0000;
pub(crate) const STACK_TOP: u64 = 0x2_0000;
/// Where ring 0 finds its stack when ring 3 faults.
const FAULT_STACK_TOP: u64 = 0x2_8000;
pub(crate) const DATA: u64 = 0x3_0000;
pub(crate) const DATA_BYTES: usize = 0x4000;
const IDT: u64 = 0x4_0000;
const STUBS: u64 = 0x4_2000;
const GDT: u64 = 0x4_4000;
const TSS: u64 = 0x4_5000;
/// A page that only ring 0 may touch, with the system-call entry point.
pub(crate) const ENTRY: u64 = 0x7_0000;
/// A page that is not present.
pub(crate) const ABSENT: u64 = 0x8_0000;
const PAGE_TABLE: u64 = 0x4000;
const MEMORY_BYTES: usize = 2 << 20;

const KERNEL_CODE: u16 = 0x10;
const USER_CODE: u16 = 0x33;

/// Bytes to fill memory with that do not repeat soon.
pub(crate) fn pattern(index: usize) -> u8 {
    u8::try_from(index * 7 % 251).expect("below 251")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ring {
    Kernel,
    User,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) regs: kvm_regs,
    pub(crate) cr2: u64,
    /// The exception that ended it, unless it was the `hlt` at the end of the code.
    pub(crate) exception: Option<Raised>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Raised {
    pub(crate) vector: u8,
    pub(crate) error_code: u64,
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
}

pub(crate) struct Guest {
    pub(crate) mem: GuestMemoryMmap<()>,
    pub(crate) vcpu: VcpuFd,
    quirks: Option<VcpuQuirks>,
    _vm: VmFd,
}

fn segment(selector: u16, dpl: u8, code: bool) -> kvm_segment {
    let (type_, l, db) = if code { (11, 1, 0) } else { (3, 0, 1) };
    kvm_segment {
        limit: !0,
        selector,
        type_,
        present: 1,
        dpl,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

impl Guest {
    /// # Panics
    /// Without a usable /dev/kvm: these tests are worth nothing then.
    pub(crate) fn new() -> Self {
        let kvm = Kvm::new().expect("these tests need read and write access to /dev/kvm");
        let vm = kvm.create_vm().expect("KVM_CREATE_VM");
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES)]).expect("memory");
        let host = mem.get_host_address(GuestAddress(0)).expect("first byte");
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY_BYTES as u64,
            userspace_addr: host.expose_provenance() as u64,
            ..Default::default()
        };
        // SAFETY: the mapping lives as long as the VM: both are fields of the same value.
        unsafe { vm.set_user_memory_region(region) }.expect("KVM_SET_USER_MEMORY_REGION");
        let incomplete = host_needs_quirks(Path::new("/sys"));
        if incomplete {
            quirks::prepare_vm(&vm).expect("facilities of the quirks layer");
        }
        let mut vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .expect("CPUID");
        let mut answers = cpuid::base_cpuid(&supported, 0, 1);
        if incomplete {
            quirks::filter_cpuid(&mut answers);
        }
        vcpu.set_cpuid2(&answers).expect("KVM_SET_CPUID2");
        let quirks = incomplete.then(|| VcpuQuirks::new(&mut vcpu).expect("quirks"));
        let mut guest = Self {
            mem,
            vcpu,
            quirks,
            _vm: vm,
        };
        guest.write_tables();
        guest.set_system_registers();
        guest
    }

    fn put(&self, at: u64, word: u64) {
        self.mem
            .write_obj(word, GuestAddress(at))
            .expect("in range");
    }

    fn write_tables(&self) {
        self.put(0x1000, 0x2007);
        self.put(0x2000, 0x3007);
        self.put(0x3000, PAGE_TABLE | 7);
        for page in 0..512 {
            let flags = match page << 12 {
                ABSENT => 0,
                ENTRY | IDT => 3,
                _ => 7,
            };
            self.put(PAGE_TABLE + page * 8, page << 12 | flags);
        }
        for (index, entry) in [
            (2, 0x00af_9b00_0000_ffff),
            (3, 0x00cf_9300_0000_ffff),
            (5, 0x00cf_f300_0000_ffff),
            (6, 0x00af_fb00_0000_ffff_u64),
        ] {
            self.put(GDT + index * 8, entry);
        }
        self.put(TSS + 4, FAULT_STACK_TOP);
        for vector in 0..=0xff_u64 {
            // push vector; hlt
            let stub = STUBS + vector * 16;
            self.put(stub, 0x00f4_006a | (vector & 0x7f) << 8);
            let dpl = if vector == 3 { 0xee00 } else { 0x8e00 };
            let code = u64::from(KERNEL_CODE);
            self.put(
                IDT + vector * 16,
                stub & 0xffff | code << 16 | dpl << 32 | (stub >> 16) << 48,
            );
        }
    }

    fn set_system_registers(&mut self) {
        const OSXSAVE: u64 = 1 << 18;
        const FSGSBASE: u64 = 1 << 16;
        let mut sregs = self.vcpu.get_sregs().expect("KVM_GET_SREGS");
        sregs.cr0 = 0x8001_0033;
        sregs.cr3 = 0x1000;
        sregs.cr4 = 0x6a0 | OSXSAVE | FSGSBASE;
        sregs.efer = 0x501;
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x3f);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        sregs.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: 0x38,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        sregs.cs = segment(KERNEL_CODE, 0, true);
        sregs.ss = segment(0x18, 0, false);
        self.vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = 7;
        self.vcpu.set_xcrs(&xcrs).expect("x87, SSE and AVX state");
    }

    pub(crate) fn fill_data(&self, byte: impl Fn(usize) -> u8) {
        let bytes: Vec<u8> = (0..DATA_BYTES).map(byte).collect();
        self.mem
            .write_slice(&bytes, GuestAddress(DATA))
            .expect("in range");
    }

    pub(crate) fn data(&self) -> Vec<u8> {
        let mut bytes = vec![0; DATA_BYTES];
        self.mem
            .read_slice(&mut bytes, GuestAddress(DATA))
            .expect("in range");
        bytes
    }

    pub(crate) fn counters(&self) -> Option<Counters> {
        self.quirks.as_ref().map(VcpuQuirks::counters)
    }

    /// Runs `code` from its first byte to its `hlt`, with these registers but RIP, RSP and RFLAGS.
    pub(crate) fn run(&mut self, ring: Ring, regs: kvm_regs, code: &[u8]) -> Outcome {
        self.mem
            .write_slice(code, GuestAddress(CODE))
            .expect("code fits");
        let mut sregs = self.vcpu.get_sregs().expect("KVM_GET_SREGS");
        let (cs, ss) = match ring {
            Ring::Kernel => (segment(KERNEL_CODE, 0, true), segment(0x18, 0, false)),
            Ring::User => (segment(USER_CODE, 3, true), segment(0x2b, 3, false)),
        };
        (sregs.cs, sregs.ss, sregs.cr2) = (cs, ss, 0);
        (sregs.ds, sregs.es) = (ss, ss);
        (sregs.fs.base, sregs.gs.base) = (DATA + 0x1000, DATA + 0x2000);
        self.vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
        let regs = kvm_regs {
            rip: CODE,
            rsp: STACK_TOP,
            rflags: 0x202,
            ..regs
        };
        self.vcpu.set_regs(&regs).expect("KVM_SET_REGS");
        self.go();
        self.outcome()
    }

    fn go(&mut self) {
        for _ in 0..10_000 {
            match self.vcpu.run().expect("KVM_RUN") {
                VcpuExit::Hlt => return,
                VcpuExit::InternalError => {
                    let quirks = self.quirks.as_mut().expect("KVM is complete here");
                    quirks
                        .on_internal_error(&mut self.vcpu, &self.mem)
                        .expect("completes");
                }
                VcpuExit::Debug(exit) => {
                    let quirks = self.quirks.as_mut().expect("nobody debugs here");
                    quirks
                        .on_debug(&mut self.vcpu, &self.mem, &exit)
                        .expect("known");
                }
                VcpuExit::X86Wrmsr(exit) => {
                    let (index, data) = (exit.index, exit.data);
                    *exit.error = 0;
                    let quirks = self.quirks.as_mut().expect("nobody filters here");
                    assert!(quirks.on_wrmsr(&mut self.vcpu, index, data).expect("ioctl"));
                }
                other => panic!("unexpected exit {other:?}"),
            }
            if let Some(quirks) = &mut self.quirks {
                quirks.after_exit(&mut self.vcpu, &self.mem).expect("ioctl");
            }
        }
        panic!("the guest does not end");
    }

    fn outcome(&self) -> Outcome {
        let mut regs = self.vcpu.get_regs().expect("KVM_GET_REGS");
        let cr2 = self.vcpu.get_sregs().expect("KVM_GET_SREGS").cr2;
        let stub = (STUBS..STUBS + 0x1000).contains(&regs.rip);
        if !stub {
            return Outcome {
                regs,
                cr2,
                exception: None,
            };
        }
        let word = |slot: u64| {
            self.mem
                .read_obj::<u64>(GuestAddress(regs.rsp + slot * 8))
                .expect("frame on the stack")
        };
        let vector = u8::try_from(word(0)).expect("a vector");
        let has_code = matches!(vector, 8 | 10..=14 | 17);
        let base = if has_code { 2 } else { 1 };
        let error_code = if has_code { word(1) } else { 0 };
        let raised = Raised {
            vector,
            error_code,
            rip: word(base),
            rflags: word(base + 2),
        };
        let rsp = word(base + 3);
        let instruction: u8 = self.mem.read_obj(GuestAddress(raised.rip)).unwrap_or(0);
        if vector == 13 && instruction == 0xf4 {
            // The `hlt` of ring 3: as if it had halted there.
            (regs.rip, regs.rsp, regs.rflags) = (raised.rip + 1, rsp, raised.rflags & !(1 << 16));
            return Outcome {
                regs,
                cr2,
                exception: None,
            };
        }
        (regs.rip, regs.rsp, regs.rflags) = (raised.rip, rsp, raised.rflags);
        Outcome {
            regs,
            cr2,
            exception: Some(raised),
        }
    }
}
