//! Compare-and-exchange of two machine words, atomic against other vCPUs and the DMA gates.

use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::Mnemonic;
use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory as _};

use super::super::machine::{Exception, Machine, Next, Stop};
use super::super::ops::VcpuOps;
use super::native;
use crate::paging::Access;

const ZERO: u64 = 1 << 6;

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    match machine.insn.mnemonic() {
        Mnemonic::Cmpxchg16b => exchange_16(machine)?,
        Mnemonic::Cmpxchg8b => exchange_8(machine)?,
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

fn exchange_16<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    let linear = machine.effective_address()?;
    if !linear.is_multiple_of(16) {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    let (gpa, _) = machine.piece(linear, 16, Access::Write)?;
    let regs = machine.regs;
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let old = pair(regs.rdx, regs.rax);
    let new = pair(regs.rcx, regs.rbx);
    let seen = native::exchange_16(machine.mem, gpa, old, new).ok_or(Stop::Unknown)?;
    machine.set_flags(ZERO, if seen == old { ZERO } else { 0 });
    if seen != old {
        let [low, high] = native::halves(seen);
        machine.regs.rax = low;
        machine.regs.rdx = high;
    }
    Ok(())
}

fn exchange_8<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    let linear = machine.effective_address()?;
    let (gpa, room) = machine.piece(linear, 8, Access::Write)?;
    if room < 8 {
        // Split over two pages it could not be atomic.
        return Err(Stop::Unknown);
    }
    let regs = machine.regs;
    let pair = |high: u64, low: u64| (high & 0xffff_ffff) << 32 | low & 0xffff_ffff;
    let old = pair(regs.rdx, regs.rax);
    let new = pair(regs.rcx, regs.rbx);
    let slice = machine
        .mem
        .get_slice(GuestAddress(gpa), 8)
        .map_err(|_| Stop::Unknown)?;
    let target = slice
        .get_atomic_ref::<AtomicU64>(0)
        .map_err(|_| Stop::Unknown)?;
    let seen = match target.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst) {
        Ok(seen) | Err(seen) => seen,
    };
    slice.bitmap().mark_dirty(0, 8);
    machine.set_flags(ZERO, if seen == old { ZERO } else { 0 });
    if seen != old {
        machine.regs.rax = seen & 0xffff_ffff;
        machine.regs.rdx = seen >> 32;
    }
    Ok(())
}
