//! One vCPU, stopped in front of an instruction: its registers by name, its memory by linear address.
//!
//! Registers are fetched once and written back once, when the instruction has completed; one that
//! faults half-way leaves them as they were. Memory is reached the way the processor would reach
//! it: segment base, page walk, permission check, accessed and dirty bits. Addresses that lead
//! outside of guest memory (device registers) are refused: no instruction completed here is one
//! with which drivers talk to devices.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};
use kvm_bindings::{kvm_regs, kvm_sregs, kvm_xsave};
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory as _};

use super::ops::{Errno, VcpuOps};
use crate::paging::{Access, Mode, Paging, Step};

/// An exception that the processor raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Its vector.
    pub vector: u8,
    /// The error code that it pushes.
    pub error_code: Option<u32>,
    /// What it leaves in CR2.
    pub address: Option<u64>,
}

impl Exception {
    /// #UD, an undefined opcode.
    pub const UNDEFINED: Self = Self {
        vector: 6,
        error_code: None,
        address: None,
    };
    /// #GP(0).
    pub const PROTECTION: Self = Self {
        vector: 13,
        error_code: Some(0),
        address: None,
    };
    /// #BP, the breakpoint of `int3`.
    pub const BREAKPOINT: Self = Self {
        vector: 3,
        error_code: None,
        address: None,
    };
    /// #DB, the debug exception.
    pub const DEBUG: Self = Self {
        vector: 1,
        error_code: None,
        address: None,
    };

    fn page_fault(code: u32, address: u64) -> Self {
        Self {
            vector: 14,
            error_code: Some(code),
            address: Some(address),
        }
    }
}

/// Why an instruction was not carried out.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// It faults: the guest gets the exception at this instruction.
    Fault(Exception),
    /// This layer does not know it, or not in this form.
    Unknown,
    /// An ioctl failed.
    Kvm(Errno),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Kvm(errno)
    }
}

/// How the guest goes on after an instruction that was carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// With the next instruction.
    Advance,
    /// With this exception, taken after the instruction (a trap).
    Trap(Exception),
}

/// The stopped vCPU.
#[derive(Debug)]
pub struct Machine<'a, V, M> {
    /// The ioctls.
    pub ops: &'a mut V,
    /// Guest memory.
    pub mem: &'a M,
    /// General registers, written back on completion.
    pub regs: kvm_regs,
    /// System registers as they are.
    pub sregs: kvm_sregs,
    /// Set when `sregs` has to be written back.
    pub sregs_changed: bool,
    /// How linear addresses are translated.
    pub paging: Paging,
    /// The instruction.
    pub insn: Instruction,
    xsave: Option<Box<kvm_xsave>>,
    xsave_changed: bool,
}

/// RFLAGS.RF.
const RESUME: u64 = 1 << 16;
/// Longest instruction in bytes.
const INSTRUCTION_BYTES_MAX: usize = 15;

impl<'a, V: VcpuOps, M: GuestMemoryBackend> Machine<'a, V, M> {
    /// Fetches the registers of a stopped vCPU.
    ///
    /// # Errors
    /// If KVM refuses one of the ioctls.
    pub fn new(ops: &'a mut V, mem: &'a M) -> Result<Self, Errno> {
        let regs = ops.regs()?;
        let sregs = ops.sregs()?;
        let paging = Paging::new(&sregs);
        Ok(Self {
            ops,
            mem,
            regs,
            sregs,
            sregs_changed: false,
            paging,
            insn: Instruction::default(),
            xsave: None,
            xsave_changed: false,
        })
    }

    /// Width of the code segment: 16, 32 or 64.
    #[must_use]
    pub fn code_bits(&self) -> u32 {
        match (self.paging.mode, self.sregs.cs.l, self.sregs.cs.db) {
            (Mode::Level4 | Mode::Level5, 1, _) => 64,
            (_, _, 0) => 16,
            _ => 32,
        }
    }

    /// The linear address of the instruction.
    #[must_use]
    pub fn linear_rip(&self) -> u64 {
        match self.code_bits() {
            64 => self.regs.rip,
            _ => self.sregs.cs.base.wrapping_add(self.regs.rip) & 0xffff_ffff,
        }
    }

    /// Reads as many bytes at RIP as there are, up to the longest instruction.
    #[must_use]
    pub fn fetch(&self) -> ([u8; INSTRUCTION_BYTES_MAX], usize) {
        let mut bytes = [0; INSTRUCTION_BYTES_MAX];
        let mut fetched = 0;
        let start = self.linear_rip();
        for (offset, byte) in (0_u64..).zip(bytes.iter_mut()) {
            let linear = start.wrapping_add(offset);
            let Ok(mapping) = self.paging.access(self.mem, linear, Access::Fetch, 0) else {
                break;
            };
            let Ok(value) = self.mem.read_obj(GuestAddress(mapping.gpa)) else {
                break;
            };
            *byte = value;
            fetched += 1;
        }
        (bytes, fetched)
    }

    /// Decodes `bytes` as the instruction at RIP; false if they are none.
    pub fn decode(&mut self, bytes: &[u8]) -> bool {
        let mut decoder =
            Decoder::with_ip(self.code_bits(), bytes, self.regs.rip, DecoderOptions::NONE);
        self.insn = decoder.decode();
        !self.insn.is_invalid()
    }

    /// The general register `register`, zero-extended.
    ///
    /// # Errors
    /// [`Stop::Unknown`] if it is not a general register.
    pub fn gpr(&self, register: Register) -> Result<u64, Stop> {
        let r = &self.regs;
        let full = match register.full_register() {
            Register::RAX => r.rax,
            Register::RCX => r.rcx,
            Register::RDX => r.rdx,
            Register::RBX => r.rbx,
            Register::RSP => r.rsp,
            Register::RBP => r.rbp,
            Register::RSI => r.rsi,
            Register::RDI => r.rdi,
            Register::R8 => r.r8,
            Register::R9 => r.r9,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::R12 => r.r12,
            Register::R13 => r.r13,
            Register::R14 => r.r14,
            Register::R15 => r.r15,
            _ => return Err(Stop::Unknown),
        };
        Ok(match (register.size(), register) {
            (8, _) => full,
            (4, _) => full & 0xffff_ffff,
            (2, _) => full & 0xffff,
            (1, Register::AH | Register::CH | Register::DH | Register::BH) => full >> 8 & 0xff,
            (1, _) => full & 0xff,
            _ => return Err(Stop::Unknown),
        })
    }

    /// Writes the general register `register`; a 32-bit write clears the upper half.
    ///
    /// # Errors
    /// [`Stop::Unknown`] if it is not a general register of 16 bits or more.
    pub fn set_gpr(&mut self, register: Register, value: u64) -> Result<(), Stop> {
        let r = &mut self.regs;
        let slot = match register.full_register() {
            Register::RAX => &mut r.rax,
            Register::RCX => &mut r.rcx,
            Register::RDX => &mut r.rdx,
            Register::RBX => &mut r.rbx,
            Register::RSP => &mut r.rsp,
            Register::RBP => &mut r.rbp,
            Register::RSI => &mut r.rsi,
            Register::RDI => &mut r.rdi,
            Register::R8 => &mut r.r8,
            Register::R9 => &mut r.r9,
            Register::R10 => &mut r.r10,
            Register::R11 => &mut r.r11,
            Register::R12 => &mut r.r12,
            Register::R13 => &mut r.r13,
            Register::R14 => &mut r.r14,
            Register::R15 => &mut r.r15,
            _ => return Err(Stop::Unknown),
        };
        *slot = match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => (*slot & !0xffff) | (value & 0xffff),
            _ => return Err(Stop::Unknown),
        };
        Ok(())
    }

    /// Whether operand `index` is memory.
    #[must_use]
    pub fn is_memory(&self, index: u32) -> bool {
        index < self.insn.op_count() && self.insn.op_kind(index) == OpKind::Memory
    }

    /// Size of operand `index` in bytes.
    #[must_use]
    pub fn operand_bytes(&self, index: u32) -> usize {
        if self.is_memory(index) {
            self.insn.memory_size().size()
        } else {
            self.insn.op_register(index).size()
        }
    }

    /// Operand `index`, an integer in a general register, in memory or an immediate.
    ///
    /// # Errors
    /// The fault of the memory access.
    pub fn operand(&mut self, index: u32) -> Result<u64, Stop> {
        match self.insn.op_kind(index) {
            OpKind::Register => self.gpr(self.insn.op_register(index)),
            OpKind::Memory => {
                let mut bytes = [0; 8];
                let size = self.operand_bytes(index);
                let linear = self.effective_address()?;
                self.read(linear, bytes.get_mut(..size).ok_or(Stop::Unknown)?)?;
                Ok(u64::from_le_bytes(bytes))
            }
            _ => self.insn.try_immediate(index).map_err(|_| Stop::Unknown),
        }
    }

    /// Writes operand `index`, an integer in a general register or in memory.
    ///
    /// # Errors
    /// The fault of the memory access.
    pub fn set_operand(&mut self, index: u32, value: u64) -> Result<(), Stop> {
        if self.insn.op_kind(index) == OpKind::Register {
            return self.set_gpr(self.insn.op_register(index), value);
        }
        let size = self.operand_bytes(index);
        let linear = self.effective_address()?;
        self.write(
            linear,
            value.to_le_bytes().get(..size).ok_or(Stop::Unknown)?,
        )
    }

    /// The linear address of the memory operand.
    ///
    /// # Errors
    /// [`Stop::Unknown`] for forms that general registers cannot express (VSIB).
    pub fn effective_address(&self) -> Result<u64, Stop> {
        let long = self.code_bits() == 64;
        let linear = self
            .insn
            .virtual_address(self.memory_operand()?, 0, |register, _, _| {
                let s = &self.sregs;
                match register {
                    Register::FS => Some(s.fs.base),
                    Register::GS => Some(s.gs.base),
                    Register::CS | Register::DS | Register::ES | Register::SS if long => Some(0),
                    Register::CS => Some(s.cs.base),
                    Register::DS => Some(s.ds.base),
                    Register::ES => Some(s.es.base),
                    Register::SS => Some(s.ss.base),
                    _ => self.gpr(register).ok(),
                }
            })
            .ok_or(Stop::Unknown)?;
        Ok(if long { linear } else { linear & 0xffff_ffff })
    }

    fn memory_operand(&self) -> Result<u32, Stop> {
        (0..self.insn.op_count())
            .find(|index| self.is_memory(*index))
            .ok_or(Stop::Unknown)
    }

    /// Reads `bytes` at a linear address.
    ///
    /// # Errors
    /// The fault that the processor would raise.
    pub fn read(&self, linear: u64, bytes: &mut [u8]) -> Result<(), Stop> {
        let mut linear = linear;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (gpa, now) = self.piece(linear, rest.len(), Access::Read)?;
            let (piece, later) = rest.split_at_mut_checked(now).ok_or(Stop::Unknown)?;
            self.mem
                .read_slice(piece, GuestAddress(gpa))
                .map_err(|_| Stop::Unknown)?;
            linear = linear.wrapping_add(now as u64);
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` at a linear address; nothing is written if any part would fault.
    ///
    /// # Errors
    /// The fault that the processor would raise.
    pub fn write(&self, linear: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.check_write(linear, bytes.len())?;
        let mut linear = linear;
        let mut rest = bytes;
        while !rest.is_empty() {
            let (gpa, now) = self.piece(linear, rest.len(), Access::Write)?;
            let (piece, later) = rest.split_at_checked(now).ok_or(Stop::Unknown)?;
            self.write_piece(gpa, piece).map_err(|_| Stop::Unknown)?;
            linear = linear.wrapping_add(now as u64);
            rest = later;
        }
        Ok(())
    }

    /// Raises the fault that a write of `len` bytes would raise.
    ///
    /// # Errors
    /// That fault.
    pub fn check_write(&self, linear: u64, len: usize) -> Result<(), Stop> {
        let mut done = 0;
        while done < len {
            done += self
                .piece(linear.wrapping_add(done as u64), len - done, Access::Write)?
                .1;
        }
        Ok(())
    }

    /// Aligned writes of a machine word are single stores, as other vCPUs expect them.
    fn write_piece(&self, gpa: u64, piece: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
        let at = GuestAddress(gpa);
        if let Ok(word) = <[u8; 8]>::try_from(piece)
            && gpa.is_multiple_of(8)
        {
            return self
                .mem
                .store(u64::from_le_bytes(word), at, Ordering::SeqCst);
        }
        if let Ok(word) = <[u8; 4]>::try_from(piece)
            && gpa.is_multiple_of(4)
        {
            return self
                .mem
                .store(u32::from_le_bytes(word), at, Ordering::SeqCst);
        }
        self.mem.write_slice(piece, at)
    }

    /// Translates `linear` for `access`: the guest-physical address, and how many of `len` bytes lie
    /// on that page.
    ///
    /// # Errors
    /// The fault that the processor would raise.
    pub fn piece(&self, linear: u64, len: usize, access: Access) -> Result<(u64, usize), Stop> {
        let mapping = self
            .paging
            .access(self.mem, linear, access, self.regs.rflags)
            .map_err(|code| match code {
                Some(code) => Stop::Fault(Exception::page_fault(code, linear)),
                None => Stop::Fault(Exception::PROTECTION),
            })?;
        self.mark_used(linear, access);
        let on_page = 4096 - (linear & 0xfff);
        Ok((
            mapping.gpa,
            usize::try_from(on_page).map_or(len, |room| room.min(len)),
        ))
    }

    /// Sets the accessed bits, and the dirty bit of the last entry for a write, as the processor
    /// does. An entry that changes meanwhile is left alone: its new owner decides.
    fn mark_used(&self, linear: u64, access: Access) {
        const ACCESSED: u64 = 1 << 5;
        const DIRTY: u64 = 1 << 6;
        let mut steps = [None::<Step>; 5];
        let mut seen = steps.iter_mut();
        let walked = self.paging.walk(self.mem, linear, |step| {
            if let Some(slot) = seen.next() {
                *slot = Some(step);
            }
        });
        if walked.is_err() {
            return;
        }
        let last = steps.iter().flatten().last().copied();
        for step in steps.iter().flatten() {
            if self.paging.mode == Mode::Pae && step.level == 3 {
                continue;
            }
            let dirty = access == Access::Write && Some(*step) == last;
            let wanted = step.entry | ACCESSED | if dirty { DIRTY } else { 0 };
            if wanted != step.entry {
                self.exchange_entry(step, wanted);
            }
        }
    }

    fn exchange_entry(&self, step: &Step, wanted: u64) {
        let narrow = self.paging.mode == Mode::Bits32;
        let bytes = if narrow { 4 } else { 8 };
        let Ok(slice) = self.mem.get_slice(GuestAddress(step.entry_gpa), bytes) else {
            return;
        };
        let relaxed = Ordering::Relaxed;
        if narrow {
            let (Ok(old), Ok(new)) = (u32::try_from(step.entry), u32::try_from(wanted)) else {
                return;
            };
            if let Ok(entry) = slice.get_atomic_ref::<AtomicU32>(0) {
                let _ = entry.compare_exchange(old, new, Ordering::SeqCst, relaxed);
            }
        } else if let Ok(entry) = slice.get_atomic_ref::<AtomicU64>(0) {
            let _ = entry.compare_exchange(step.entry, wanted, Ordering::SeqCst, relaxed);
        }
        slice.bitmap().mark_dirty(0, bytes);
    }

    /// The extended state in KVM's standard format, fetched at first use.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn xsave(&mut self) -> Result<&kvm_xsave, Stop> {
        let image = match self.xsave.take() {
            Some(image) => image,
            None => self.ops.xsave()?,
        };
        Ok(self.xsave.insert(image))
    }

    /// The same for changing; it is written back on completion.
    ///
    /// # Errors
    /// If KVM refuses the ioctl.
    pub fn xsave_mut(&mut self) -> Result<&mut kvm_xsave, Stop> {
        let image = match self.xsave.take() {
            Some(image) => image,
            None => self.ops.xsave()?,
        };
        self.xsave_changed = true;
        Ok(self.xsave.insert(image))
    }

    /// Sets the flags in `mask` to those of `value`.
    pub fn set_flags(&mut self, mask: u64, value: u64) {
        self.regs.rflags = (self.regs.rflags & !mask) | (value & mask);
    }

    /// Writes everything back that a completed instruction changed, and steps over it.
    ///
    /// # Errors
    /// If KVM refuses one of the ioctls.
    pub fn commit(&mut self, next: Next) -> Result<(), Errno> {
        const TRAP: u64 = 1 << 8;
        let rip = self.regs.rip.wrapping_add(self.insn.len() as u64);
        self.regs.rip = if self.code_bits() == 64 {
            rip
        } else {
            rip & 0xffff_ffff
        };
        self.regs.rflags &= !RESUME;
        if self.xsave_changed
            && let Some(image) = &self.xsave
        {
            self.ops.set_xsave(image)?;
        }
        if self.sregs_changed {
            self.ops.set_sregs(&self.sregs);
        }
        self.ops.set_regs(&self.regs);
        match next {
            Next::Advance if self.regs.rflags & TRAP != 0 => self.inject(Exception::DEBUG),
            Next::Advance => Ok(()),
            Next::Trap(exception) => self.inject(exception),
        }
    }

    /// Gives the guest an exception with the registers that KVM has now.
    ///
    /// # Errors
    /// If KVM refuses one of the ioctls.
    pub fn inject(&mut self, exception: Exception) -> Result<(), Errno> {
        if let Some(address) = exception.address {
            // The registers as they were: a faulting instruction changes nothing but CR2.
            let mut sregs = self.ops.sregs()?;
            sregs.cr2 = address;
            self.ops.set_sregs(&sregs);
        }
        if exception == Exception::DEBUG {
            const SINGLE_STEP: u64 = 1 << 14;
            let mut debug = self.ops.debug_regs()?;
            debug.dr6 |= SINGLE_STEP;
            self.ops.set_debug_regs(&debug)?;
        }
        let is_trap = matches!(exception, Exception::DEBUG | Exception::BREAKPOINT);
        if !is_trap {
            // The frame of a fault has RF set; KVM sees to that only where the fault is its own.
            let mut regs = self.ops.regs()?;
            regs.rflags |= RESUME;
            self.ops.set_regs(&regs);
        }
        let mut events = self.ops.events()?;
        // Only what is said here: flags of the reply would write back NMI and SMM state that
        // may have changed since.
        events.flags = 0;
        events.exception.injected = 1;
        events.exception.pending = 0;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error_code.is_some());
        events.exception.error_code = exception.error_code.unwrap_or(0);
        self.ops.set_events(&events);
        Ok(())
    }
}
