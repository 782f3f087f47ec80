//! Moves and bitwise operations on XMM registers.
//!
//! Kernels copy and clear with these outside of `kernel_fpu_begin` sections too rarely to matter for
//! speed; each costs a read and a write of the vCPU's extended state. Only the legacy encodings are
//! known here, which leave the upper lanes of wider registers alone.

use iced_x86::{Code, Mnemonic, OpKind, Register};
use kvm_bindings::kvm_xsave;
use vm_memory::GuestMemoryBackend;

use super::super::machine::{Exception, Machine, Next, Stop};
use super::super::ops::VcpuOps;
use super::float::check_sse;
use super::xstate::{IN_USE_SSE, mark_in_use};

/// First word of XMM0 in the extended state.
const XMM_WORD: usize = 40;

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    use Mnemonic as Is;
    // AVX forms have mnemonics of their own, MMX forms MM registers: both end up Unknown.
    match machine.insn.mnemonic() {
        Is::Movups | Is::Movupd | Is::Movdqu | Is::Lddqu => whole_move(machine, false)?,
        Is::Movaps | Is::Movapd | Is::Movdqa | Is::Movntdq | Is::Movntdqa => {
            whole_move(machine, true)?;
        }
        Is::Movntps | Is::Movntpd => whole_move(machine, true)?,
        Is::Movd | Is::Movq | Is::Movss | Is::Movsd => low_move(machine)?,
        Is::Movlps | Is::Movlpd | Is::Movhps | Is::Movhpd => half_move(machine)?,
        Is::Pxor | Is::Xorps | Is::Xorpd => combine(machine, |a, b| a ^ b)?,
        Is::Por | Is::Orps | Is::Orpd => combine(machine, |a, b| a | b)?,
        Is::Pand | Is::Andps | Is::Andpd => combine(machine, |a, b| a & b)?,
        Is::Pandn | Is::Andnps | Is::Andnpd => combine(machine, |a, b| !a & b)?,
        Is::Punpcklqdq => combine(machine, |a, b| a & u128::from(u64::MAX) | b << 64)?,
        Is::Punpckhqdq => combine(machine, |a, b| a >> 64 | b >> 64 << 64)?,
        Is::Paddq => combine(machine, |a, b| {
            let high = (a >> 64).wrapping_add(b >> 64) << 64;
            high | a.wrapping_add(b) & u128::from(u64::MAX)
        })?,
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

fn xmm_index(register: Register) -> Result<usize, Stop> {
    if register.is_xmm() && register.number() < 16 {
        Ok(register.number())
    } else {
        Err(Stop::Unknown)
    }
}

fn get(image: &kvm_xsave, index: usize) -> u128 {
    let start = XMM_WORD + index * 4;
    let words = image.region.get(start..start + 4).unwrap_or_default();
    words
        .iter()
        .rev()
        .fold(0, |value, word| value << 32 | u128::from(*word))
}

fn put(image: &mut kvm_xsave, index: usize, value: u128) {
    let start = XMM_WORD + index * 4;
    let bytes = value.to_le_bytes();
    let (words, _) = bytes.as_chunks::<4>();
    for (slot, word) in image.region.iter_mut().skip(start).zip(words) {
        *slot = u32::from_le_bytes(*word);
    }
    mark_in_use(image, IN_USE_SSE);
}

/// Reads operand `index`: an XMM register, or `len` bytes of memory.
fn source<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    index: u32,
    len: usize,
    aligned: bool,
) -> Result<u128, Stop> {
    if machine.insn.op_kind(index) == OpKind::Register {
        let register = machine.insn.op_register(index);
        if register.is_gpr() {
            return machine.gpr(register).map(u128::from);
        }
        let register = xmm_index(register)?;
        return Ok(get(machine.xsave()?, register));
    }
    let linear = memory(machine, len, aligned)?;
    let mut bytes = [0; 16];
    machine.read(linear, bytes.get_mut(..len).ok_or(Stop::Unknown)?)?;
    Ok(u128::from_le_bytes(bytes))
}

fn memory<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &Machine<'_, V, M>,
    len: usize,
    aligned: bool,
) -> Result<u64, Stop> {
    let linear = machine.effective_address()?;
    if aligned && !linear.is_multiple_of(len as u64) {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    Ok(linear)
}

fn whole_move<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    aligned: bool,
) -> Result<(), Stop> {
    check_sse(machine)?;
    let value = source(machine, 1, 16, aligned)?;
    if machine.is_memory(0) {
        let linear = memory(machine, 16, aligned)?;
        return machine.write(linear, &value.to_le_bytes());
    }
    let target = xmm_index(machine.insn.op0_register())?;
    put(machine.xsave_mut()?, target, value);
    Ok(())
}

/// Moves of the lowest 4 or 8 bytes, between XMM, memory and general registers.
fn low_move<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    let wide = match machine.insn.code() {
        Code::Movd_xmm_rm32 | Code::Movd_rm32_xmm => false,
        Code::Movq_xmm_rm64 | Code::Movq_rm64_xmm => true,
        Code::Movq_xmm_xmmm64 | Code::Movq_xmmm64_xmm => true,
        Code::Movss_xmm_xmmm32 | Code::Movss_xmmm32_xmm => false,
        Code::Movsd_xmm_xmmm64 | Code::Movsd_xmmm64_xmm => true,
        _ => return Err(Stop::Unknown),
    };
    check_sse(machine)?;
    let (len, mask) = if wide {
        (8, u128::from(u64::MAX))
    } else {
        (4, 0xffff_ffff)
    };
    let value = source(machine, 1, len, false)? & mask;
    let [low, high] = [value, value >> 32].map(|half| u64::try_from(half & 0xffff_ffff));
    let integer = low.unwrap_or(0) | high.unwrap_or(0) << 32;
    if machine.is_memory(0) {
        let linear = memory(machine, len, false)?;
        return machine.write(linear, integer.to_le_bytes().get(..len).unwrap_or_default());
    }
    let target = machine.insn.op0_register();
    if target.is_gpr() {
        return machine.set_gpr(target, integer);
    }
    let target = xmm_index(target)?;
    // Scalar moves between registers keep the rest; from anywhere else they clear it.
    let scalar = matches!(machine.insn.mnemonic(), Mnemonic::Movss | Mnemonic::Movsd);
    let image = machine.xsave_mut()?;
    let old = get(image, target);
    let keeps = scalar && machine.insn.op_kind(1) == OpKind::Register;
    let image = machine.xsave_mut()?;
    put(
        image,
        target,
        if keeps { old & !mask | value } else { value },
    );
    Ok(())
}

/// Moves between memory and one half of a register.
fn half_move<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(), Stop> {
    check_sse(machine)?;
    let high = matches!(machine.insn.mnemonic(), Mnemonic::Movhps | Mnemonic::Movhpd);
    let shift = if high { 64 } else { 0 };
    let mask = u128::from(u64::MAX) << shift;
    if machine.is_memory(0) {
        let value = source(machine, 1, 16, false)? >> shift;
        let linear = memory(machine, 8, false)?;
        return machine.write(linear, value.to_le_bytes().get(..8).unwrap_or_default());
    }
    if !machine.is_memory(1) {
        return Err(Stop::Unknown);
    }
    let value = source(machine, 1, 8, false)? << shift;
    let target = xmm_index(machine.insn.op0_register())?;
    let image = machine.xsave_mut()?;
    let old = get(image, target);
    put(image, target, old & !mask | value);
    Ok(())
}

fn combine<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    operation: impl Fn(u128, u128) -> u128,
) -> Result<(), Stop> {
    check_sse(machine)?;
    let target = xmm_index(machine.insn.op0_register())?;
    let second = source(machine, 1, 16, true)?;
    let image = machine.xsave_mut()?;
    let first = get(image, target);
    put(image, target, operation(first, second));
    Ok(())
}
