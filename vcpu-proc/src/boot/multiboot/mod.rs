//! Multiboot 1 and 2: how most hobby kernels are booted.
//!
//! A header near the start of the file asks for things; what the loader cannot give is refused with
//! its name, as both specifications demand. The kernel is placed by its ELF headers or, where the
//! Multiboot header has addresses, by those. It starts in 32-bit protected mode with EAX the magic
//! and EBX the information structure, which [`v1`] or [`v2`] writes.

mod v1;
mod v2;

use zerocopy::FromBytes;
use zerocopy::little_endian::U32;

use super::elf::Elf;
use super::entry::Entry;
use super::error::BootError;
use super::guest::Guest;
use super::layout::{self, MapKind};
use super::linux::Placed;
use super::source::Source;
use super::{KernelFormat, address32};

/// Bytes of a file in which a header may begin, the larger of the two.
pub(super) const SEARCH_BYTES: usize = v2::SEARCH_BYTES;

/// What the information structures name as the loader.
const LOADER_NAME: &[u8] = b"Bulkhead\0";

/// Which of the two specifications a header follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A header without requests that cannot be met.
#[derive(Debug, Clone)]
pub(super) struct Header {
    version: Version,
    /// Where the header is in the file.
    offset: u64,
    addresses: Option<Addresses>,
    entry: Option<u32>,
}

/// Where a kernel wants to be that is no ELF file, or whose ELF headers are not to be used.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
}

/// Finds a header in the first bytes of a file. A header whose checksum is wrong is none; one that
/// asks for what cannot be given is an error.
pub(super) fn find(head: &[u8]) -> Result<Option<Header>, BootError> {
    match v1::find(head)? {
        Some(header) => Ok(Some(header)),
        None => v2::find(head),
    }
}

impl Header {
    pub(super) fn format(&self) -> KernelFormat {
        match self.version {
            Version::One => KernelFormat::Multiboot1,
            Version::Two => KernelFormat::Multiboot2,
        }
    }

    /// Places the kernel, and returns its first instruction. `elf` is given for ELF files.
    pub(super) fn load(
        &self,
        source: &Source<'_>,
        elf: Option<&Elf>,
        guest: &mut Guest<'_>,
    ) -> Result<u32, BootError> {
        let elf_entry = match (&self.addresses, elf) {
            (Some(addresses), _) => {
                addresses.load(self.offset, source, guest)?;
                None
            }
            (None, Some(elf)) => {
                elf.load(source, guest)?;
                Some(elf.entry()?)
            }
            (None, None) => {
                let field = "Multiboot header: address fields";
                let expected = "load addresses, because the file is not ELF";
                return Err(BootError::field(field, 0u8, expected));
            }
        };
        match (self.entry, elf_entry) {
            (Some(entry), _) => Ok(entry),
            (None, Some(entry)) => address32("Multiboot kernel: e_entry", entry),
            (None, None) => {
                let field = "Multiboot header: entry address";
                Err(BootError::field(
                    field,
                    0u8,
                    "an entry tag, because load addresses are given",
                ))
            }
        }
    }

    /// Writes the information structure and says how the kernel starts.
    pub(super) fn enter(
        &self,
        guest: &Guest<'_>,
        placed: &Placed<'_>,
        rip: u32,
    ) -> Result<Entry, BootError> {
        let (magic, information) = match self.version {
            Version::One => (v1::LOADER_MAGIC, v1::information(guest, placed)?),
            Version::Two => (v2::LOADER_MAGIC, v2::information(guest, placed)?),
        };
        let room = layout::COMMAND_LINE - layout::MULTIBOOT_INFO;
        if information.len() as u64 > room {
            let expected = format!("at most {room:#x}");
            let bytes = information.len() as u64;
            return Err(BootError::field(
                "Multiboot information: bytes",
                bytes,
                expected,
            ));
        }
        guest.write(layout::MULTIBOOT_INFO, &information)?;
        let rbx = address32("Multiboot information", layout::MULTIBOOT_INFO)?;
        Ok(Entry::Multiboot {
            rip,
            rax: magic,
            rbx,
        })
    }
}

impl Addresses {
    fn load(
        &self,
        header_offset: u64,
        source: &Source<'_>,
        guest: &mut Guest<'_>,
    ) -> Result<(), BootError> {
        const FIELD: &str = "the kernel (Multiboot load_addr, load_end_addr)";
        let before = u64::from(self.header)
            .checked_sub(self.load.into())
            .filter(|before| *before <= header_offset);
        let Some(before) = before else {
            let expected = format!(
                "at most header_addr ({:#x}) and at least header_addr - {header_offset:#x}",
                self.header
            );
            return Err(BootError::field(
                "Multiboot header: load_addr",
                self.load,
                expected,
            ));
        };
        let offset = header_offset - before;
        let load = u64::from(self.load);
        let file_bytes = if self.load_end == 0 {
            source.length() - offset.min(source.length())
        } else {
            let Some(bytes) = u64::from(self.load_end).checked_sub(load) else {
                let expected = format!("0 or at least load_addr ({load:#x})");
                let field = "Multiboot header: load_end_addr";
                return Err(BootError::field(field, self.load_end, expected));
            };
            bytes
        };
        source.check(FIELD, offset, file_bytes)?;
        let end = load + file_bytes;
        if self.bss_end != 0 && u64::from(self.bss_end) < end {
            let expected = format!("0 or at least the end of the loaded part ({end:#x})");
            return Err(BootError::field(
                "Multiboot header: bss_end_addr",
                self.bss_end,
                expected,
            ));
        }
        let memory_bytes = end.max(self.bss_end.into()) - load;
        guest.claim(
            "the kernel (Multiboot load_addr to bss_end_addr)",
            load,
            memory_bytes,
        )?;
        guest.read_from(source, FIELD, offset, load, file_bytes)
    }
}

/// Kilobytes of memory below 640 KiB and from 1 MiB to the first hole.
fn basic_memory(guest: &Guest<'_>) -> (u32, u32) {
    let kib = |bytes: u64| u32::try_from(bytes >> 10).unwrap_or(u32::MAX);
    let upper = guest
        .map()
        .iter()
        .find(|range| range.kind == MapKind::Ram && range.start == layout::HIGH_MEMORY_START)
        .map_or(0, |range| range.bytes);
    (kib(layout::CONVENTIONAL_END), kib(upper))
}

/// The 32-bit word at `offset`, if it is there.
fn word(bytes: &[u8], offset: usize) -> Option<u32> {
    let bytes = bytes.get(offset..)?;
    U32::read_from_prefix(bytes)
        .ok()
        .map(|(word, _)| word.get())
}
