//! The descriptor tables, entry by entry.

use std::fmt::Write as _;

use kvm_bindings::kvm_dtable;
use vm_memory::GuestMemoryBackend;

use super::read_linear;
use crate::paging::{Mode, Paging};

/// Entries of the GDT that are printed.
const GDT_ENTRIES_MAX: u64 = 24;
/// Entries of the IDT that are printed: the processor's own vectors.
const IDT_ENTRIES_MAX: u64 = 32;

/// Writes the GDT's used entries.
pub(super) fn write_gdt<M: GuestMemoryBackend>(
    out: &mut String,
    table: &kvm_dtable,
    paging: &Paging,
    mem: &M,
) -> std::fmt::Result {
    writeln!(
        out,
        "  gdt base {:016x}  limit {:04x}",
        table.base, table.limit
    )?;
    let entries = ((u64::from(table.limit) + 1) / 8).min(GDT_ENTRIES_MAX);
    for index in 0..entries {
        let Some(bytes) = read_linear::<M, 8>(paging, mem, table.base.wrapping_add(index * 8))
        else {
            return writeln!(out, "    {:04x}: unreadable", index * 8);
        };
        let entry = u64::from_le_bytes(bytes);
        if entry != 0 {
            writeln!(out, "    {:04x}: {entry:016x}", index * 8)?;
        }
    }
    Ok(())
}

/// Writes the handlers of the processor's own vectors.
pub(super) fn write_idt<M: GuestMemoryBackend>(
    out: &mut String,
    table: &kvm_dtable,
    paging: &Paging,
    mem: &M,
    symbol: &dyn Fn(u64) -> String,
) -> std::fmt::Result {
    writeln!(
        out,
        "  idt base {:016x}  limit {:04x}",
        table.base, table.limit
    )?;
    let long = matches!(paging.mode, Mode::Level4 | Mode::Level5);
    let entry_bytes = if long { 16 } else { 8 };
    let entries = ((u64::from(table.limit) + 1) / entry_bytes).min(IDT_ENTRIES_MAX);
    for vector in 0..entries {
        let linear = table.base.wrapping_add(vector * entry_bytes);
        let gate = if long {
            read_linear::<M, 16>(paging, mem, linear).map(u128::from_le_bytes)
        } else {
            read_linear::<M, 8>(paging, mem, linear).map(|low| u128::from(u64::from_le_bytes(low)))
        };
        let Some(gate) = gate else {
            return writeln!(out, "    vector {vector:2}: unreadable");
        };
        if gate == 0 {
            continue;
        }
        let field =
            |shift: u32, mask: u64| u64::try_from(gate >> shift & u128::from(mask)).unwrap_or(0);
        let handler = field(0, 0xffff) | field(48, 0xffff) << 16 | field(64, 0xffff_ffff) << 32;
        writeln!(
            out,
            "    vector {vector:2}: {:04x}:{handler:016x}  attributes {:04x}{}{}",
            field(16, 0xffff),
            field(32, 0xffff),
            if field(47, 1) == 1 {
                ""
            } else {
                "  not present"
            },
            symbol(handler),
        )?;
    }
    Ok(())
}
