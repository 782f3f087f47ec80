//! The ring-3 `syscall` that arrives at LSTAR with CPL still 3.
//!
//! On such hosts RIP, RCX and R11 change, CS and SS do not; fetching at LSTAR then faults, because the
//! entry point is a supervisor page, and the guest's page-fault handler runs with RIP = LSTAR in its
//! frame. A hardware breakpoint on that handler stops the vCPU before its first instruction; the
//! frame tells a system call from a fault of the guest's own. For the former the rest of `syscall`
//! is done and the frame forgotten; for the latter the handler goes on.
//!
//! A program that jumps to LSTAR by itself makes the same frame. It is told apart by the bytes in
//! front of RCX, which hardware guarantees to be a `syscall`.
//!
//! The handler's address is in guest memory and moves as a kernel boots, so the gate is read again
//! after each exit, from `kvm_run`'s copy of the registers, without an ioctl.

use kvm_bindings::{kvm_debug_exit_arch, kvm_segment, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::complete;
use super::debug::DebugRegisters;
use super::machine::Machine;
use super::ops::{Errno, OpResult, VcpuOps};
use super::{Handled, MSR_LSTAR};
use crate::paging::{Mode, Paging};

const MSR_STAR: u32 = 0xc000_0081;
const MSR_FMASK: u32 = 0xc000_0084;
/// RFLAGS.RF, which `syscall` clears.
const RFLAGS_RF: u64 = 1 << 16;
/// Offset of the page-fault gate in a 64-bit IDT.
const GATE_OFFSET: u64 = 14 * 16;
/// Exits after which the address of the gate is translated again although IDTR has not changed.
const TRANSLATION_EXITS_MAX: u8 = 64;

/// Follows the guest's page-fault gate.
#[derive(Debug, Default)]
pub(super) struct SyscallWatch {
    on: bool,
    idt_base: u64,
    gate_gpa: Option<u64>,
    exits: u8,
}

impl SyscallWatch {
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    pub(super) fn start(&mut self) {
        self.on = true;
    }

    /// Reads the gate and moves the breakpoint if the handler has moved; true if it did.
    pub(super) fn follow<V: VcpuOps, M: GuestMemoryBackend>(
        &mut self,
        vcpu: &mut V,
        mem: &M,
        debug: &mut DebugRegisters,
    ) -> OpResult<bool> {
        if debug.is_stepping() {
            return Ok(false);
        }
        let sregs = vcpu.sregs()?;
        let handler = self.handler(&sregs, mem);
        if handler == debug.handler() {
            return Ok(false);
        }
        debug.set_handler(vcpu, handler)?;
        Ok(true)
    }

    fn handler<M: GuestMemoryBackend>(&mut self, sregs: &kvm_sregs, mem: &M) -> Option<u64> {
        let paging = Paging::new(sregs);
        let long = matches!(paging.mode, Mode::Level4 | Mode::Level5);
        if !long || u64::from(sregs.idt.limit) < GATE_OFFSET + 15 {
            self.gate_gpa = None;
            return None;
        }
        self.exits = self.exits.wrapping_add(1) % TRANSLATION_EXITS_MAX;
        if self.exits == 0 || self.idt_base != sregs.idt.base || self.gate_gpa.is_none() {
            let linear = sregs.idt.base.wrapping_add(GATE_OFFSET);
            self.idt_base = sregs.idt.base;
            self.gate_gpa = paging
                .walk(mem, linear, |_| ())
                .ok()
                .map(|mapping| mapping.gpa);
        }
        let gate: u128 = mem.read_obj(GuestAddress(self.gate_gpa?)).ok()?;
        gate_handler(gate)
    }
}

/// The handler that a present 64-bit gate names.
fn gate_handler(gate: u128) -> Option<u64> {
    const PRESENT: u128 = 1 << 47;
    let low = gate & 0xffff;
    let middle = (gate >> 48) & 0xffff;
    let high = (gate >> 64) & 0xffff_ffff;
    let address = low | middle << 16 | high << 32;
    (gate & PRESENT != 0).then_some(u64::try_from(address).ok()?)
}

/// What the processor pushes for a page fault.
#[derive(Clone, Copy, Debug)]
struct Frame {
    rip: u64,
    cs: u64,
    rsp: u64,
}

impl Frame {
    fn read<V: VcpuOps, M: GuestMemoryBackend>(machine: &Machine<'_, V, M>) -> Option<Self> {
        let mut bytes = [0; 40];
        machine.read(machine.regs.rsp, &mut bytes).ok()?;
        let mut words = bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|word| u64::from_le_bytes(*word));
        let _error_code = words.next()?;
        Some(Self {
            rip: words.next()?,
            cs: words.next()?,
            // The flags lie between.
            rsp: words.nth(1)?,
        })
    }
}

/// Takes KVM_EXIT_DEBUG.
pub(super) fn on_debug<V: VcpuOps, M: GuestMemoryBackend>(
    vcpu: &mut V,
    mem: &M,
    debug: &mut DebugRegisters,
    exit: &kvm_debug_exit_arch,
) -> OpResult<Handled> {
    if debug.is_stepping() {
        debug.set_stepping(vcpu, false)?;
        return Ok(if debug.debugger_steps() {
            Handled::NotOurs
        } else {
            Handled::Stepped
        });
    }
    if !debug.is_handler_hit(exit.dr6, exit.pc) {
        return Ok(Handled::NotOurs);
    }
    let mut machine = Machine::new(vcpu, mem)?;
    let frame = Frame::read(&machine).filter(|frame| frame.cs & 3 == 3);
    if let Some(frame) = frame
        && machine.ops.msr(MSR_LSTAR)? == Some(frame.rip)
        && came_by_syscall(&machine)
    {
        enter(&mut machine, frame)?;
        return Ok(Handled::Syscall);
    }
    // The first instruction of a handler is mostly one that this layer can carry out by itself,
    // which saves ioctls and an entry into the guest.
    let (bytes, len) = machine.fetch();
    if machine.decode(bytes.get(..len).unwrap_or_default())
        && let Some(next) = complete::entry_instruction(&mut machine)
    {
        machine.commit(next)?;
    } else {
        debug.set_stepping(vcpu, true)?;
    }
    Ok(Handled::PageFault)
}

/// Whether RCX follows a `syscall` instruction. Code that cannot be read any more had to be there a
/// moment ago, so only readable bytes speak against it; a kernel address always does.
fn came_by_syscall<V: VcpuOps, M: GuestMemoryBackend>(machine: &Machine<'_, V, M>) -> bool {
    let rcx = machine.regs.rcx;
    if rcx < 2 || rcx >> 63 != 0 || !machine.paging.is_canonical(rcx) {
        return false;
    }
    [(rcx - 2, 0x0f_u8), (rcx - 1, 0x05)]
        .into_iter()
        .all(|(linear, expected)| {
            let Ok(mapping) = machine.paging.walk(machine.mem, linear, |_| ()) else {
                return true;
            };
            let byte = machine.mem.read_obj::<u8>(GuestAddress(mapping.gpa));
            byte.map_or(true, |byte| byte == expected)
        })
}

/// Does what `syscall` had left undone, as of the registers in the fault's frame.
fn enter<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    frame: Frame,
) -> Result<(), Errno> {
    let star = machine.ops.msr(MSR_STAR)?.unwrap_or(0);
    let fmask = machine.ops.msr(MSR_FMASK)?.unwrap_or(0);
    // R11 has the caller's flags already; those in the frame have lost some.
    machine.regs.rip = frame.rip;
    machine.regs.rsp = frame.rsp;
    machine.regs.rflags = (machine.regs.r11 & !fmask & !RFLAGS_RF) | 2;
    let [_, _, _, _, low, high, _, _] = star.to_le_bytes();
    let selector = u16::from_le_bytes([low, high]) & !3;
    let flat = kvm_segment {
        limit: 0xffff_ffff,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    machine.sregs.cs = kvm_segment {
        selector,
        type_: 11,
        l: 1,
        ..flat
    };
    let stack = selector.wrapping_add(8);
    machine.sregs.ss = kvm_segment {
        selector: stack,
        type_: 3,
        db: 1,
        ..flat
    };
    machine.ops.set_sregs(&machine.sregs);
    machine.ops.set_regs(&machine.regs);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_address_is_put_together_from_three_fields() {
        let gate = 0x0000_0000_ffff_ffff_8160_8e00_0010_0a80_u128;
        assert_eq!(gate_handler(gate), Some(0xffff_ffff_8160_0a80));
    }

    #[test]
    fn absent_gate_has_no_handler() {
        assert_eq!(
            gate_handler(0x0000_0000_ffff_ffff_8160_0e00_0010_0a80),
            None
        );
    }
}
