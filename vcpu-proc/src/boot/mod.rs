//! From a kernel file to the state of the boot vCPU at its first instruction.
//!
//! The loader reads files that were opened elsewhere, writes guest memory before any vCPU runs, and
//! returns a pure description of registers. It never opens a file, never talks to KVM, and keeps no
//! heap after [`load`] returns. The files are a user's, perhaps a stranger's: every value in them is
//! hostile, so the parsers deny panics and bound every loop and allocation.
//!
//! ```text
//! File -> recognise -> bzImage --payload--> ELF stream --.
//!                   -> ELF + PVH note ------------------ +--> guest memory + Entry -> registers
//!                   -> Multiboot 1, 2 (ELF or addresses) |
//!                   -> ELF otherwise: Linux 64-bit ------'
//! ```
#![deny(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing)]

mod elf;
mod entry;
mod error;
#[cfg(test)]
mod fixtures;
mod guest;
pub mod layout;
mod linux;
mod pvh;
mod source;
#[cfg(test)]
mod tests;

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryMmap};

pub use self::entry::Entry;
pub use self::error::{ACCEPTED_KERNELS, BootError};
use self::guest::Guest;
use self::linux::Placed;
use self::source::Source;

/// What [`load`] needs to know of the guest.
#[derive(Debug, Clone, Copy)]
pub struct BootParams<'a> {
    /// The kernel, open for reading.
    pub kernel: &'a File,
    /// The initial RAM disk, or the one module of a Multiboot kernel.
    pub initrd: Option<&'a File>,
    /// The kernel's command line, complete.
    pub cmdline: &'a str,
    /// Size of guest memory, laid out by [`layout::memory_ranges`].
    pub memory_bytes: u64,
    /// Where [`crate::acpi`] wrote the RSDP.
    pub rsdp: GuestAddress,
}

/// The boot protocol that was chosen for a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// ELF entered through its PVH note.
    ElfPvh,
    /// ELF entered by the 64-bit Linux protocol at its entry point.
    ElfLinux,
}

/// Where a crash report finds the names of addresses. It reads the file again when it needs them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SymbolSource {
    /// The kernel file is an ELF file and may have a symbol table; addresses in it are virtual.
    KernelFile,
    /// The kernel file has no symbols.
    None,
}

/// A kernel in guest memory, ready to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadedKernel {
    /// How the boot vCPU begins.
    pub entry: Entry,
    /// What the file was recognised as.
    pub format: KernelFormat,
    /// Where symbols can be found.
    pub symbols: SymbolSource,
}

/// Loads kernel, initrd and command line into `memory` and says how the boot vCPU begins.
///
/// `memory` is zero wherever the guest has not been given anything; no vCPU runs yet.
pub fn load(memory: &GuestMemoryMmap, params: &BootParams<'_>) -> Result<LoadedKernel, BootError> {
    let kernel = Source::new(params.kernel, "kernel")?;
    let initrd = params
        .initrd
        .map(|file| Source::new(file, "initrd"))
        .transpose()?;
    let mut guest = Guest::new(memory, params.memory_bytes);
    let loaded = load_elf(&mut guest, &kernel, initrd.as_ref(), params)?;
    loaded.entry.write_tables(&guest)?;
    Ok(loaded)
}

fn load_elf(
    guest: &mut Guest<'_>,
    kernel: &Source<'_>,
    initrd: Option<&Source<'_>>,
    params: &BootParams<'_>,
) -> Result<LoadedKernel, BootError> {
    let elf = elf::Elf::read(kernel)?;
    let pvh = elf.pvh_entry(kernel)?;
    if pvh.is_none() && elf.header.class == elf::Class::Elf32 {
        let recognised = "a 32-bit ELF executable with neither a PVH note nor a Multiboot header";
        return Err(BootError::NotAKernel {
            recognised: recognised.into(),
        });
    }
    elf.load(kernel, guest)?;
    let placed = place(
        guest,
        initrd,
        params,
        linux::COMMAND_LINE_MAX,
        linux::INITRD_LIMIT,
    )?;
    let (entry, format) = if let Some(rip) = pvh {
        pvh::write_start_info(guest, &placed)?;
        let rbx = address32("PVH start info", layout::PVH_START_INFO)?;
        (Entry::Pvh32 { rip, rbx }, KernelFormat::ElfPvh)
    } else {
        linux::write_zero_page(guest, &placed, linux::default_header())?;
        let entry = Entry::Linux64 {
            rip: elf.entry()?,
            rsi: layout::ZERO_PAGE,
        };
        (entry, KernelFormat::ElfLinux)
    };
    Ok(LoadedKernel {
        entry,
        format,
        symbols: SymbolSource::KernelFile,
    })
}

/// Places command line and initrd; the kernel's memory is claimed already.
fn place(
    guest: &mut Guest<'_>,
    initrd: Option<&Source<'_>>,
    params: &BootParams<'_>,
    command_line_limit: usize,
    initrd_limit: u64,
) -> Result<Placed, BootError> {
    linux::write_command_line(guest, params.cmdline, command_line_limit)?;
    let initrd = initrd
        .map(|initrd| linux::place_initrd(guest, initrd, initrd_limit))
        .transpose()?;
    Ok(Placed {
        initrd,
        command_line_bytes: params.cmdline.len(),
        rsdp: params.rsdp.0,
    })
}

fn address32(field: &'static str, value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::field(field, value, "an address below 4 GiB"))
}
