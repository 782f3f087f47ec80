//! Integer instructions on general registers that KVM's emulator lacks: counts, bit fields, wide
//! carries, byte-swapping moves, CRC-32C.
//!
//! Semantics are those of the processor manuals; where they leave a flag undefined it is cleared.

use iced_x86::Mnemonic;
use vm_memory::GuestMemoryBackend;

use super::super::machine::{Machine, Next, Stop};
use super::super::ops::VcpuOps;

const CARRY: u64 = 1;
const ZERO: u64 = 1 << 6;
const SIGN: u64 = 1 << 7;
const OVERFLOW: u64 = 1 << 11;
/// CF, PF, AF, ZF, SF and OF.
const ARITHMETIC: u64 = 0x8d5;

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    match machine.insn.mnemonic() {
        Mnemonic::Popcnt | Mnemonic::Lzcnt | Mnemonic::Tzcnt => count(machine)?,
        Mnemonic::Blsi | Mnemonic::Blsr | Mnemonic::Blsmsk => lowest_bit(machine)?,
        Mnemonic::Andn | Mnemonic::Bextr | Mnemonic::Bzhi => field(machine)?,
        Mnemonic::Rorx | Mnemonic::Sarx | Mnemonic::Shlx | Mnemonic::Shrx => shift(machine)?,
        Mnemonic::Pdep | Mnemonic::Pext => scatter(machine)?,
        Mnemonic::Mulx => multiply(machine)?,
        Mnemonic::Adcx => wide_add(machine, CARRY)?,
        Mnemonic::Adox => wide_add(machine, OVERFLOW)?,
        Mnemonic::Movbe => {
            let bits = machine.operand_bytes(0) * 8;
            let value = machine.operand(1)?;
            machine.set_operand(0, value.swap_bytes() >> (64 - bits))?;
        }
        Mnemonic::Movnti | Mnemonic::Movdiri => {
            let value = machine.operand(1)?;
            machine.set_operand(0, value)?;
        }
        Mnemonic::Crc32 => crc32(machine)?,
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

/// Width in bits of the first operand, and a mask of as many ones.
fn width<V: VcpuOps, M: GuestMemoryBackend>(machine: &Machine<'_, V, M>) -> (u32, u64) {
    match machine.operand_bytes(0) {
        2 => (16, 0xffff),
        4 => (32, 0xffff_ffff),
        _ => (64, u64::MAX),
    }
}

fn count<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let (bits, _) = width(machine);
    let source = machine.operand(1)?;
    let result = match machine.insn.mnemonic() {
        Mnemonic::Popcnt => {
            machine.set_flags(ARITHMETIC, if source == 0 { ZERO } else { 0 });
            return machine.set_operand(0, u64::from(source.count_ones()));
        }
        Mnemonic::Lzcnt => source.leading_zeros() - (64 - bits),
        _ => source.trailing_zeros().min(bits),
    };
    let zero = if result == 0 { ZERO } else { 0 };
    let carry = if source == 0 { CARRY } else { 0 };
    machine.set_flags(ARITHMETIC, zero | carry);
    machine.set_operand(0, u64::from(result))
}

/// SF and ZF of a result, and CF as given; the rest cleared.
fn result_flags(result: u64, bits: u32, carry: bool) -> u64 {
    let sign = if result >> (bits - 1) & 1 == 1 {
        SIGN
    } else {
        0
    };
    let zero = if result == 0 { ZERO } else { 0 };
    sign | zero | u64::from(carry)
}

fn lowest_bit<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    let (bits, mask) = width(machine);
    let source = machine.operand(1)?;
    let below = source.wrapping_sub(1);
    let (result, carry) = match machine.insn.mnemonic() {
        Mnemonic::Blsi => (source & source.wrapping_neg(), source != 0),
        Mnemonic::Blsr => (source & below, source == 0),
        _ => (source ^ below, source == 0),
    };
    let result = result & mask;
    machine.set_flags(ARITHMETIC, result_flags(result, bits, carry));
    machine.set_operand(0, result)
}

fn field<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let (bits, mask) = width(machine);
    let first = machine.operand(1)?;
    let second = machine.operand(2)?;
    let (result, flags) = match machine.insn.mnemonic() {
        Mnemonic::Andn => {
            let result = !first & second & mask;
            (result, result_flags(result, bits, false))
        }
        Mnemonic::Bextr => {
            let start = u32::from(second.to_le_bytes()[0]);
            let length = u32::from(second.to_le_bytes()[1]);
            let result = low_bits(first.checked_shr(start).unwrap_or(0), length);
            (result, if result == 0 { ZERO } else { 0 })
        }
        _ => {
            let index = u32::from(second.to_le_bytes()[0]);
            let result = low_bits(first, index);
            (result, result_flags(result, bits, index > bits - 1))
        }
    };
    machine.set_flags(ARITHMETIC, flags);
    machine.set_operand(0, result)
}

fn low_bits(value: u64, count: u32) -> u64 {
    1_u64
        .checked_shl(count)
        .map_or(value, |bit| value & (bit - 1))
}

/// Shifts without flags.
fn shift<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let (bits, mask) = width(machine);
    let value = machine.operand(1)?;
    let [low, ..] = machine.operand(2)?.to_le_bytes();
    let by = u32::from(low) & (bits - 1);
    let result = match machine.insn.mnemonic() {
        Mnemonic::Shlx => value << by,
        Mnemonic::Shrx => value >> by,
        Mnemonic::Rorx if bits == 32 => value >> by | value << (32 - by),
        Mnemonic::Rorx => value.rotate_right(by),
        _ => {
            // Shift the sign bit to bit 63, then back with copies of it.
            let up = 64 - bits;
            ((value << up).cast_signed() >> (up + by)).cast_unsigned()
        }
    };
    machine.set_operand(0, result & mask)
}

fn scatter<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let source = machine.operand(1)?;
    let selector = machine.operand(2)?;
    let deposit = machine.insn.mnemonic() == Mnemonic::Pdep;
    let mut result = 0;
    let selected = (0..64_u32).filter(|position| selector >> position & 1 == 1);
    for (position, taken) in selected.zip(0..) {
        let (from, to) = if deposit {
            (taken, position)
        } else {
            (position, taken)
        };
        result |= (source >> from & 1) << to;
    }
    machine.set_operand(0, result)
}

fn multiply<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    let (bits, mask) = width(machine);
    let factor = machine.regs.rdx & mask;
    let product = u128::from(factor) * u128::from(machine.operand(2)?);
    let part = |value: u128| u64::try_from(value & u128::from(mask)).unwrap_or(0);
    // The second destination first: if both are the same register, it keeps the upper half.
    machine.set_operand(1, part(product))?;
    machine.set_operand(0, part(product >> bits))
}

/// `adcx`, `adox`: an addition whose carry goes in and out of one flag, the others untouched.
fn wide_add<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    flag: u64,
) -> Result<(), Stop> {
    let (bits, mask) = width(machine);
    let carry = u128::from(machine.regs.rflags & flag != 0);
    let sum = u128::from(machine.operand(0)?) + u128::from(machine.operand(1)?) + carry;
    machine.set_flags(flag, if sum >> bits != 0 { flag } else { 0 });
    machine.set_operand(0, u64::try_from(sum & u128::from(mask)).unwrap_or(0))
}

fn crc32<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    const POLYNOMIAL: u32 = 0x82f6_3b78;
    let [a, b, c, d, ..] = machine.operand(0)?.to_le_bytes();
    let size = machine.operand_bytes(1);
    let source = machine.operand(1)?.to_le_bytes();
    let mut crc = u32::from_le_bytes([a, b, c, d]);
    for byte in source.iter().take(size) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { POLYNOMIAL } else { 0 };
        }
    }
    machine.set_operand(0, u64::from(crc))
}
