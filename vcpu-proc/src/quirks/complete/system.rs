//! Breakpoints, flags, fences, segment bases, cache and translation control, random numbers.

use iced_x86::Mnemonic;
use vm_memory::GuestMemoryBackend;

use super::super::machine::{Exception, Machine, Next, Stop};
use super::super::ops::VcpuOps;
use super::native;
use crate::paging::Mode;

/// RFLAGS.AC, which opens user pages to the kernel while SMAP is on.
pub(super) const ALIGNMENT_CHECK: u64 = 1 << 18;
/// CF, PF, AF, ZF, SF and OF.
const ARITHMETIC: u64 = 0x8d5;
const CARRY: u64 = 1;
const ZERO: u64 = 1 << 6;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_PGE: u64 = 1 << 7;
const MSR_TSC_AUX: u32 = 0xc000_0103;

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    match machine.insn.mnemonic() {
        Mnemonic::Int3 => return Ok(Next::Trap(Exception::BREAKPOINT)),
        Mnemonic::Int1 => return Ok(Next::Trap(Exception::DEBUG)),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => {
            return Err(Stop::Fault(Exception::UNDEFINED));
        }
        Mnemonic::Clac | Mnemonic::Stac => {
            if machine.paging.cpl() != 0 {
                return Err(Stop::Fault(Exception::UNDEFINED));
            }
            let open = machine.insn.mnemonic() == Mnemonic::Stac;
            machine.set_flags(ALIGNMENT_CHECK, if open { ALIGNMENT_CHECK } else { 0 });
        }
        // The exit itself has ordered everything that these order, and caches are coherent.
        Mnemonic::Lfence
        | Mnemonic::Mfence
        | Mnemonic::Sfence
        | Mnemonic::Serialize
        | Mnemonic::Pause
        | Mnemonic::Nop
        | Mnemonic::Endbr64
        | Mnemonic::Endbr32
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetch
        | Mnemonic::Cldemote => {}
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => touch(machine)?,
        Mnemonic::Wbinvd | Mnemonic::Wbnoinvd | Mnemonic::Invd => privileged(machine)?,
        Mnemonic::Invpcid => invpcid(machine)?,
        Mnemonic::Rdfsbase | Mnemonic::Rdgsbase | Mnemonic::Wrfsbase | Mnemonic::Wrgsbase => {
            segment_base(machine)?
        }
        Mnemonic::Rdpid => {
            let aux = machine.ops.msr(MSR_TSC_AUX)?.unwrap_or(0);
            machine.set_operand(0, aux & 0xffff_ffff)?;
        }
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            let value = native::random().ok_or(Stop::Fault(Exception::UNDEFINED))?;
            machine.set_flags(ARITHMETIC, CARRY);
            machine.set_operand(0, value)?;
        }
        Mnemonic::Verr | Mnemonic::Verw => verify(machine)?,
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

fn privileged<V: VcpuOps, M: GuestMemoryBackend>(machine: &Machine<'_, V, M>) -> Result<(), Stop> {
    if machine.paging.cpl() == 0 {
        Ok(())
    } else {
        Err(Stop::Fault(Exception::PROTECTION))
    }
}

/// Faults where a read of the operand would.
fn touch<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let linear = machine.effective_address()?;
    machine
        .piece(linear, 1, crate::paging::Access::Read)
        .map(|_| ())
}

/// Drops every translation, which is more than any form asks for: a change of CR4.PGE and back makes
/// KVM build its translations anew.
fn invpcid<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    const INDIVIDUAL: u64 = 0;
    const ALL_BUT_GLOBAL: u64 = 3;
    privileged(machine)?;
    let kind = machine.operand(0)?;
    let mut descriptor = [0; 16];
    let linear = machine.effective_address()?;
    machine.read(linear, &mut descriptor)?;
    let [pcid, address] = [&descriptor[..8], &descriptor[8..]]
        .map(|half| half.try_into().map_or(0, u64::from_le_bytes));
    let reserved = pcid >> 12 != 0;
    let bad_address = kind == INDIVIDUAL && !machine.paging.is_canonical(address);
    if kind > ALL_BUT_GLOBAL || reserved || bad_address {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    let mut toggled = machine.sregs;
    toggled.cr4 ^= CR4_PGE;
    machine.ops.set_sregs(&toggled);
    machine.ops.apply()?;
    machine.sregs_changed = true;
    Ok(())
}

fn segment_base<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    if machine.sregs.cr4 & CR4_FSGSBASE == 0 || machine.code_bits() != 64 {
        return Err(Stop::Fault(Exception::UNDEFINED));
    }
    let register = machine.insn.op0_register();
    match machine.insn.mnemonic() {
        Mnemonic::Rdfsbase => return machine.set_gpr(register, machine.sregs.fs.base),
        Mnemonic::Rdgsbase => return machine.set_gpr(register, machine.sregs.gs.base),
        _ => {}
    }
    let base = machine.gpr(register)?;
    if !machine.paging.is_canonical(base) {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    if machine.insn.mnemonic() == Mnemonic::Wrfsbase {
        machine.sregs.fs.base = base;
    } else {
        machine.sregs.gs.base = base;
    }
    machine.sregs_changed = true;
    Ok(())
}

/// `verr`, `verw`: ZF says whether the segment may be read or written. Kernels use `verw` for its side
/// effect on the processor's buffers, which the host's own kernel takes care of.
fn verify<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    if machine.sregs.cr0 & 1 == 0 {
        return Err(Stop::Fault(Exception::UNDEFINED));
    }
    let selector = machine.operand(0)? & 0xffff;
    let write = machine.insn.mnemonic() == Mnemonic::Verw;
    let good = descriptor(machine, selector)
        .is_some_and(|entry| may_access(machine, selector, entry, write));
    machine.set_flags(ZERO, if good { ZERO } else { 0 });
    Ok(())
}

fn descriptor<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &Machine<'_, V, M>,
    selector: u64,
) -> Option<u64> {
    let index = selector & 0xfff8;
    let (base, limit) = if selector & 4 == 0 {
        (machine.sregs.gdt.base, u64::from(machine.sregs.gdt.limit))
    } else {
        (machine.sregs.ldt.base, u64::from(machine.sregs.ldt.limit))
    };
    if selector & !3 == 0 || index + 7 > limit {
        return None;
    }
    let mut bytes = [0; 8];
    let linear = base.wrapping_add(index);
    let linear = if matches!(machine.paging.mode, Mode::Level4 | Mode::Level5) {
        linear
    } else {
        linear & 0xffff_ffff
    };
    machine.read(linear, &mut bytes).ok()?;
    Some(u64::from_le_bytes(bytes))
}

fn may_access<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &Machine<'_, V, M>,
    selector: u64,
    entry: u64,
    write: bool,
) -> bool {
    let bit = |shift: u32| entry >> shift & 1 == 1;
    let (present, code_or_data, code) = (bit(47), bit(44), bit(43));
    let (conforming_or_down, readable_or_writable) = (bit(42), bit(41));
    let dpl = entry >> 45 & 3;
    let rpl = selector & 3;
    let privilege =
        (code && conforming_or_down) || (dpl >= rpl && dpl >= u64::from(machine.paging.cpl()));
    let kind = match (code, write) {
        (true, true) => false,
        (true, false) | (false, true) => readable_or_writable,
        (false, false) => true,
    };
    present && code_or_data && privilege && kind
}
