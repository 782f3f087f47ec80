//! Saving and restoring of extended state: the FXSAVE and XSAVE families, and XCR0.
//!
//! The vCPU's state comes from KVM as a 4 KiB image in the standard format, whose components lie where
//! CPUID leaf 0xd of the processor says; the guest's area is in that format or in the compacted one.
//! Components beyond the image (AMX tiles, which are never granted to a guest here) and supervisor
//! components are in their initial state always: they are saved as such and restored as nothing.

use std::arch::x86_64::__cpuid_count;
use std::ops::Range;

use iced_x86::Mnemonic;
use kvm_bindings::kvm_xsave;
use vm_memory::GuestMemoryBackend;

use super::super::machine::{Exception, Machine, Next, Stop};
use super::super::ops::VcpuOps;
use super::float::NO_DEVICE;

/// Word of MXCSR in the image.
pub(super) const MXCSR_WORD: usize = 6;
/// Bits of MXCSR that exist.
pub(super) const MXCSR_MASK: u32 = 0xffff;
/// Component bit of the XMM registers.
pub(super) const IN_USE_SSE: u64 = 2;
/// Component bit of the x87 registers.
pub(super) const IN_USE_X87: u64 = 1;
const IN_USE_AVX: u64 = 4;

const MXCSR_INITIAL: [u8; 4] = 0x1f80_u32.to_le_bytes();
const X87_CONTROL_INITIAL: [u8; 2] = 0x37f_u16.to_le_bytes();
const X87: [Range<usize>; 2] = [0..24, 32..160];
const MXCSR: Range<usize> = 24..28;
const MXCSR_AND_MASK: Range<usize> = 24..32;
const XMM: Range<usize> = 160..416;
const HEADER: Range<usize> = 512..576;
const EXTENDED: usize = 576;
const COMPACTED: u64 = 1 << 63;
const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;
const IMAGE_BYTES: usize = 4096;

/// Says that a component of the image is not in its initial state.
pub(super) fn mark_in_use(image: &mut kvm_xsave, component: u64) {
    let (low, _) = words(component);
    image.region[HEADER.start / 4] |= low;
}

fn words(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

pub(super) fn complete<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<Next, Stop> {
    use Mnemonic as Is;
    match machine.insn.mnemonic() {
        Is::Fxsave | Is::Fxsave64 => fxsave(machine)?,
        Is::Fxrstor | Is::Fxrstor64 => fxrstor(machine)?,
        Is::Xsave | Is::Xsave64 => save(machine, Form::Plain)?,
        Is::Xsaveopt | Is::Xsaveopt64 => save(machine, Form::Optimised)?,
        Is::Xsavec | Is::Xsavec64 => save(machine, Form::Compacted)?,
        Is::Xsaves | Is::Xsaves64 => {
            supervisor(machine)?;
            save(machine, Form::Compacted)?;
        }
        Is::Xrstor | Is::Xrstor64 => restore(machine)?,
        Is::Xrstors | Is::Xrstors64 => {
            supervisor(machine)?;
            restore(machine)?;
        }
        Is::Xgetbv => xgetbv(machine)?,
        _ => return Err(Stop::Unknown),
    }
    Ok(Next::Advance)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// Every requested component, in the standard format.
    Plain,
    /// The standard format, without components in their initial state.
    Optimised,
    /// The compacted format, without components in their initial state.
    Compacted,
}

/// Where a component beyond the legacy area lies, from CPUID leaf 0xd.
#[derive(Clone, Copy)]
struct Component {
    bit: u64,
    bytes: usize,
    standard: usize,
    aligned: bool,
}

/// The components of `mask` beyond the legacy area, in ascending order.
fn components(mask: u64) -> impl Iterator<Item = Component> {
    (2..63_u32)
        .filter(move |index| mask >> index & 1 == 1)
        .map(|index| {
            let leaf = __cpuid_count(0xd, index);
            Component {
                bit: 1 << index,
                bytes: usize::try_from(leaf.eax).unwrap_or(0),
                standard: usize::try_from(leaf.ebx).unwrap_or(0),
                aligned: leaf.ecx & 2 != 0,
            }
        })
}

impl Component {
    /// Its place in the image; `None` if it is not there.
    fn image_range(&self) -> Option<Range<usize>> {
        let range = self.standard..self.standard.checked_add(self.bytes)?;
        (self.standard >= EXTENDED && range.end <= IMAGE_BYTES).then_some(range)
    }
}

/// Gives each component of `mask` its offset in a compacted area.
fn compacted(mask: u64) -> impl Iterator<Item = (usize, Component)> {
    components(mask).scan(EXTENDED, |next, component| {
        let start = if component.aligned {
            next.next_multiple_of(64)
        } else {
            *next
        };
        *next = start + component.bytes;
        Some((start, component))
    })
}

fn image_bytes(image: &kvm_xsave) -> [u8; IMAGE_BYTES] {
    let mut bytes = [0; IMAGE_BYTES];
    let (slots, _) = bytes.as_chunks_mut::<4>();
    for (slot, word) in slots.iter_mut().zip(image.region) {
        *slot = word.to_le_bytes();
    }
    bytes
}

fn set_image(image: &mut kvm_xsave, bytes: &[u8; IMAGE_BYTES]) {
    let (words, _) = bytes.as_chunks::<4>();
    for (slot, word) in image.region.iter_mut().zip(words) {
        *slot = u32::from_le_bytes(*word);
    }
}

fn header_word(bytes: &[u8], offset: usize) -> u64 {
    let word = bytes.get(offset..offset + 8).unwrap_or_default();
    word.try_into().map_or(0, u64::from_le_bytes)
}

fn supervisor<V: VcpuOps, M: GuestMemoryBackend>(machine: &Machine<'_, V, M>) -> Result<(), Stop> {
    if machine.paging.cpl() == 0 {
        Ok(())
    } else {
        Err(Stop::Fault(Exception::PROTECTION))
    }
}

fn xcr0<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<u64, Stop> {
    if machine.sregs.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::Fault(Exception::UNDEFINED));
    }
    let xcrs = machine.ops.xcrs()?;
    let used = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
    let found = xcrs.xcrs.iter().take(used).find(|entry| entry.xcr == 0);
    Ok(found.map_or(1, |entry| entry.value))
}

/// Checks what the whole XSAVE family checks; gives the requested components and the area.
fn begin<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
) -> Result<(u64, u64, u64), Stop> {
    let enabled = xcr0(machine)?;
    if machine.sregs.cr0 & CR0_TS != 0 {
        return Err(Stop::Fault(NO_DEVICE));
    }
    let area = machine.effective_address()?;
    if !area.is_multiple_of(64) {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    let mask = machine.regs.rdx << 32 | machine.regs.rax & 0xffff_ffff;
    Ok((mask & enabled, enabled, area))
}

fn save<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &mut Machine<'_, V, M>,
    form: Form,
) -> Result<(), Stop> {
    let (wanted, _, area) = begin(machine)?;
    let image = image_bytes(machine.xsave()?);
    let mut in_use = header_word(&image, HEADER.start);
    if image.get(MXCSR) != Some(&MXCSR_INITIAL[..]) {
        in_use |= IN_USE_SSE;
    }
    let written = if form == Form::Plain {
        wanted
    } else {
        wanted & in_use
    };
    let out = |machine: &Machine<'_, V, M>, to: usize, from: Range<usize>| {
        machine.write(
            area.wrapping_add(to as u64),
            image.get(from).unwrap_or_default(),
        )
    };
    if written & IN_USE_X87 != 0 {
        for part in X87 {
            out(machine, part.start, part)?;
        }
    }
    let saves_mxcsr = match form {
        Form::Compacted => written & IN_USE_SSE != 0,
        Form::Plain | Form::Optimised => wanted & (IN_USE_SSE | IN_USE_AVX) != 0,
    };
    if saves_mxcsr {
        out(machine, MXCSR_AND_MASK.start, MXCSR_AND_MASK)?;
    }
    if written & IN_USE_SSE != 0 {
        out(machine, XMM.start, XMM)?;
    }
    let place = |(offset, component): (usize, Component)| {
        component
            .image_range()
            .filter(|_| written & component.bit != 0)
            .map(|from| (offset, from))
    };
    let mut header = [0; 16];
    if form == Form::Compacted {
        for (to, from) in compacted(wanted).filter_map(place) {
            out(machine, to, from)?;
        }
        header[..8].copy_from_slice(&(in_use & wanted).to_le_bytes());
        header[8..].copy_from_slice(&(wanted | COMPACTED).to_le_bytes());
        return machine.write(area.wrapping_add(HEADER.start as u64), &header);
    }
    for (to, from) in components(wanted)
        .map(|c| (c.standard, c))
        .filter_map(place)
    {
        out(machine, to, from)?;
    }
    let at = area.wrapping_add(HEADER.start as u64);
    let mut old = [0; 8];
    machine.read(at, &mut old)?;
    let merged = u64::from_le_bytes(old) & !wanted | in_use & wanted;
    machine.write(at, &merged.to_le_bytes())
}

fn restore<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let (wanted, enabled, area) = begin(machine)?;
    let mut legacy = [0; EXTENDED];
    machine.read(area, &mut legacy)?;
    let saved = header_word(&legacy, HEADER.start);
    let layout = header_word(&legacy, HEADER.start + 8);
    let is_compacted = layout & COMPACTED != 0;
    let reserved = legacy
        .get(HEADER.start + 16..HEADER.end)
        .unwrap_or_default();
    let known = if is_compacted {
        layout & !COMPACTED
    } else {
        enabled
    };
    let foreign = layout & !COMPACTED & !enabled != 0 || (!is_compacted && layout != 0);
    if saved & !known != 0 || foreign || reserved.iter().any(|byte| *byte != 0) {
        return Err(Stop::Fault(Exception::PROTECTION));
    }
    let mut image = image_bytes(machine.xsave()?);
    restore_legacy(&mut image, &legacy, wanted, saved, is_compacted)?;
    let mut in_use = header_word(&image, HEADER.start) & !(wanted & !IN_USE_SSE);
    in_use |= wanted & saved;
    let places: Vec<(usize, Component)> = if is_compacted {
        compacted(known).collect()
    } else {
        components(known)
            .map(|component| (component.standard, component))
            .collect()
    };
    for (from, component) in places {
        if wanted & saved & component.bit == 0 {
            continue;
        }
        match component
            .image_range()
            .and_then(|range| image.get_mut(range))
        {
            Some(target) => machine.read(area.wrapping_add(from as u64), target)?,
            None => in_use &= !component.bit,
        }
    }
    if wanted & IN_USE_SSE != 0 {
        in_use |= IN_USE_SSE;
    }
    image[HEADER.start..HEADER.start + 8].copy_from_slice(&in_use.to_le_bytes());
    set_image(machine.xsave_mut()?, &image);
    Ok(())
}

/// The x87 state, MXCSR and the XMM registers. The latter are always marked in use, because KVM
/// keeps an MXCSR only beside them.
fn restore_legacy(
    image: &mut [u8; IMAGE_BYTES],
    legacy: &[u8; EXTENDED],
    wanted: u64,
    saved: u64,
    is_compacted: bool,
) -> Result<(), Stop> {
    let mut initial = [0; EXTENDED];
    initial[..2].copy_from_slice(&X87_CONTROL_INITIAL);
    initial[MXCSR].copy_from_slice(&MXCSR_INITIAL);
    let from = |bit: u64| if saved & bit != 0 { legacy } else { &initial };
    if wanted & IN_USE_X87 != 0 {
        for part in X87 {
            image[part.clone()].copy_from_slice(&from(IN_USE_X87)[part]);
        }
    }
    let mxcsr_from = if is_compacted {
        from(IN_USE_SSE)
    } else {
        legacy
    };
    if wanted & IN_USE_SSE != 0 || (!is_compacted && wanted & IN_USE_AVX != 0) {
        check_mxcsr(&mxcsr_from[MXCSR])?;
        image[MXCSR].copy_from_slice(&mxcsr_from[MXCSR]);
    }
    if wanted & IN_USE_SSE != 0 {
        image[XMM].copy_from_slice(&from(IN_USE_SSE)[XMM]);
    }
    Ok(())
}

fn check_mxcsr(bytes: &[u8]) -> Result<(), Stop> {
    let value = bytes.try_into().map_or(u32::MAX, u32::from_le_bytes);
    if value & !MXCSR_MASK == 0 {
        Ok(())
    } else {
        Err(Stop::Fault(Exception::PROTECTION))
    }
}

fn fxsave_area<V: VcpuOps, M: GuestMemoryBackend>(
    machine: &Machine<'_, V, M>,
) -> Result<u64, Stop> {
    if machine.sregs.cr0 & CR0_TS != 0 {
        return Err(Stop::Fault(NO_DEVICE));
    }
    let area = machine.effective_address()?;
    if area.is_multiple_of(16) {
        Ok(area)
    } else {
        Err(Stop::Fault(Exception::PROTECTION))
    }
}

fn fxsave<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let area = fxsave_area(machine)?;
    let image = image_bytes(machine.xsave()?);
    machine.write(area, &image[..XMM.end])
}

fn fxrstor<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let area = fxsave_area(machine)?;
    let mut legacy = [0; EXTENDED];
    machine.read(area, &mut legacy[..512])?;
    let mut image = image_bytes(machine.xsave()?);
    let both = IN_USE_X87 | IN_USE_SSE;
    restore_legacy(&mut image, &legacy, both, both, false)?;
    let in_use = header_word(&image, HEADER.start) | both;
    image[HEADER.start..HEADER.start + 8].copy_from_slice(&in_use.to_le_bytes());
    set_image(machine.xsave_mut()?, &image);
    Ok(())
}

fn xgetbv<V: VcpuOps, M: GuestMemoryBackend>(machine: &mut Machine<'_, V, M>) -> Result<(), Stop> {
    let enabled = xcr0(machine)?;
    let value = match machine.regs.rcx & 0xffff_ffff {
        0 => enabled,
        1 => enabled & header_word(&image_bytes(machine.xsave()?), HEADER.start),
        _ => return Err(Stop::Fault(Exception::PROTECTION)),
    };
    machine.regs.rax = value & 0xffff_ffff;
    machine.regs.rdx = value >> 32;
    Ok(())
}
