//! The instructions around RIP.

use std::fmt::Write as _;

use iced_x86::{Decoder, DecoderOptions, Formatter as _, Instruction, IntelFormatter};
use vm_memory::GuestMemoryBackend;

use super::VcpuReport;

/// How far back the search for instructions in front of RIP goes.
const BEFORE_BYTES: u64 = 48;
/// Instructions shown in front of RIP.
const BEFORE: usize = 6;
/// Instructions shown from RIP on.
const FROM_RIP: usize = 8;
const INSTRUCTION_BYTES_MAX: u64 = 15;

/// Writes them, the one at RIP marked.
pub(super) fn write<M: GuestMemoryBackend>(
    out: &mut String,
    report: &VcpuReport<'_, M>,
    linear_rip: u64,
) -> std::fmt::Result {
    writeln!(out, "  code")?;
    let rip = report.vcpu.regs.rip;
    let before = readable_before(report, linear_rip);
    for instruction in leading(&before, report.code_bits(), rip) {
        let start = before
            .len()
            .saturating_sub(usize_of(rip.wrapping_sub(instruction.ip())));
        let bytes = before
            .get(start..start + instruction.len())
            .unwrap_or_default();
        write_line(out, report, "   ", &instruction, bytes)?;
    }
    let after = (0..INSTRUCTION_BYTES_MAX * FROM_RIP as u64)
        .map_while(|offset| report.byte(linear_rip.wrapping_add(offset)))
        .collect::<Vec<u8>>();
    if after.is_empty() {
        return writeln!(out, "    => {rip:016x}: unreadable");
    }
    let mut decoder = Decoder::with_ip(report.code_bits(), &after, rip, DecoderOptions::NONE);
    for index in 0..FROM_RIP {
        if !decoder.can_decode() {
            break;
        }
        let start = decoder.position();
        let instruction = decoder.decode();
        let bytes = after.get(start..decoder.position()).unwrap_or_default();
        write_line(
            out,
            report,
            if index == 0 { "=> " } else { "   " },
            &instruction,
            bytes,
        )?;
    }
    Ok(())
}

fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The bytes directly in front of RIP, as many as can be read.
fn readable_before<M: GuestMemoryBackend>(report: &VcpuReport<'_, M>, linear_rip: u64) -> Vec<u8> {
    let mut bytes = (1..=BEFORE_BYTES)
        .map_while(|back| report.byte(linear_rip.checked_sub(back)?))
        .collect::<Vec<u8>>();
    bytes.reverse();
    bytes
}

/// Decodes `before` from the earliest byte from which instructions end exactly at `rip`; such a start
/// is mostly a true one, since decoding falls into step within a few instructions.
fn leading(before: &[u8], bits: u32, rip: u64) -> Vec<Instruction> {
    for skipped in 0..before.len() {
        let bytes = before.get(skipped..).unwrap_or_default();
        let ip = rip.wrapping_sub(bytes.len() as u64);
        let decoder = Decoder::with_ip(bits, bytes, ip, DecoderOptions::NONE);
        let mut instructions: Vec<Instruction> = decoder.into_iter().collect();
        if instructions
            .iter()
            .all(|instruction| !instruction.is_invalid())
        {
            let surplus = instructions.len().saturating_sub(BEFORE);
            instructions.drain(..surplus);
            return instructions;
        }
    }
    Vec::new()
}

fn write_line<M: GuestMemoryBackend>(
    out: &mut String,
    report: &VcpuReport<'_, M>,
    mark: &str,
    instruction: &Instruction,
    bytes: &[u8],
) -> std::fmt::Result {
    write!(out, "    {mark}{:016x}:", instruction.ip())?;
    for byte in bytes {
        write!(out, " {byte:02x}")?;
    }
    let width = usize_of(INSTRUCTION_BYTES_MAX).saturating_sub(bytes.len()) * 3;
    let mut text = String::new();
    IntelFormatter::new().format(instruction, &mut text);
    let target = instruction.near_branch_target();
    let symbol = if target == 0 {
        String::new()
    } else {
        report.symbol(target)
    };
    writeln!(out, "{:width$}  {text}{symbol}", "")
}
