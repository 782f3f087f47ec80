//! The instructions that this layer carries out, by group.
//!
//! Each group takes a decoded instruction that the [`Machine`] stands in front of, reads its operands,
//! and writes its results into the machine's copy of the registers or into guest memory. Groups
//! never write registers back and never move RIP: [`Machine::commit`] does, so that a fault leaves
//! no trace. A mnemonic that no group lists is [`Stop::Unknown`].

mod atomic;
mod bits;
mod float;
mod native;
mod system;
mod vector;
mod xstate;

use iced_x86::Mnemonic;
use vm_memory::GuestMemoryBackend;

use super::machine::{Exception, Machine, Next, Stop};
use super::ops::VcpuOps;

/// Carries out the decoded instruction.
///
/// # Errors
/// The exception that it raises, or that it is none of this layer's.
pub fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    if machine.insn.is_invalid() {
        return Err(Stop::Fault(Exception::UNDEFINED));
    }
    let groups = [
        system::complete::<V, M>,
        bits::complete,
        atomic::complete,
        float::complete,
        xstate::complete,
        vector::complete,
    ];
    for group in groups {
        match group(machine) {
            Err(Stop::Unknown) => {}
            done => return done,
        }
    }
    Err(Stop::Unknown)
}

/// Carries out an instruction with which handlers begin and that touches flags at most; `None` if
/// it is another.
pub fn entry_instruction<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Option<Next> {
    match machine.insn.mnemonic() {
        Mnemonic::Clac => machine.set_flags(system::ALIGNMENT_CHECK, 0),
        Mnemonic::Cld => machine.set_flags(1 << 10, 0),
        Mnemonic::Cli => machine.set_flags(1 << 9, 0),
        Mnemonic::Nop | Mnemonic::Endbr64 => {}
        _ => return None,
    }
    Some(Next::Advance)
}
