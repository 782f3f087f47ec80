//! Control of the x87 and SSE units: exceptions and control words, kept in the extended state.

use iced_x86::Mnemonic;
use vm_memory::GuestMemoryBackend;

use super::super::machine::{Exception, Machine, Next, Stop};
use super::super::ops::VcpuOps;
use super::xstate::{IN_USE_SSE, IN_USE_X87, MXCSR_MASK, MXCSR_WORD, mark_in_use};

const CR0_MP: u64 = 1 << 1;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
/// #NM, device not available.
pub(super) const NO_DEVICE: Exception = Exception {
    vector: 7,
    error_code: None,
    address: None,
};

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    match machine.insn.mnemonic() {
        Mnemonic::Wait => {
            // Unmasked x87 exceptions that are pending stay so: kernels run with all masked.
            let both = CR0_MP | CR0_TS;
            if machine.sregs.cr0 & both == both {
                return Err(Stop::Fault(NO_DEVICE));
            }
        }
        Mnemonic::Emms => {
            let image = machine.xsave_mut()?;
            // The abridged tag word: all registers empty.
            image.region[1] &= !0xff;
        }
        Mnemonic::Fldcw => {
            let control = machine.operand(0)?;
            let control = u32::try_from(control & 0xffff).unwrap_or(0);
            let image = machine.xsave_mut()?;
            image.region[0] = image.region[0] & 0xffff_0000 | control;
            mark_in_use(image, IN_USE_X87);
        }
        Mnemonic::Fnstsw => {
            let status = machine.xsave()?.region[0] >> 16;
            machine.set_operand(0, u64::from(status))?;
        }
        Mnemonic::Fnclex => {
            // Exception flags, stack fault, summary and busy.
            machine.xsave_mut()?.region[0] &= !(0x80ff << 16);
        }
        Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
            check_sse(machine)?;
            let value = machine.operand(0)?;
            let value = u32::try_from(value).map_err(|_| Stop::Unknown)?;
            if value & !MXCSR_MASK != 0 {
                return Err(Stop::Fault(Exception::PROTECTION));
            }
            let image = machine.xsave_mut()?;
            image.region[MXCSR_WORD] = value;
            mark_in_use(image, IN_USE_SSE);
        }
        Mnemonic::Stmxcsr | Mnemonic::Vstmxcsr => {
            check_sse(machine)?;
            let value = machine.xsave()?.region[MXCSR_WORD];
            machine.set_operand(0, u64::from(value))?;
        }
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

/// Raises what an SSE instruction raises where the system has not enabled it.
pub(super) fn check_sse<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &Machine<'_, V, M>,
) -> Result<(), Stop> {
    const CR0_EM: u64 = 1 << 2;
    if machine.sregs.cr0 & CR0_EM != 0 || machine.sregs.cr4 & CR4_OSFXSR == 0 {
        Err(Stop::Fault(Exception::UNDEFINED))
    } else if machine.sregs.cr0 & CR0_TS != 0 {
        Err(Stop::Fault(NO_DEVICE))
    } else {
        Ok(())
    }
}
