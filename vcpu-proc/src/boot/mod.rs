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

mod bzimage;
mod elf;
mod elf_stream;
mod entry;
mod error;
#[cfg(test)]
mod fixtures;
mod guest;
pub mod layout;
mod linux;
mod lz4_legacy;
mod multiboot;
mod payload;
mod pvh;
mod recognise;
mod source;
#[cfg(test)]
mod tests;

use std::fs::File;

use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::bzimage::BzImage;
use self::elf::{Class, Elf};
pub use self::entry::Entry;
pub use self::error::{ACCEPTED_KERNELS, BootError};
use self::guest::Guest;
use self::linux::{InitrdPlace, Placed};
pub use self::payload::{Compression, PayloadError};
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
    /// Where [`crate::acpi::write_tables`] wrote the RSDP; it is there already.
    pub rsdp: GuestAddress,
}

/// The boot protocol that was chosen for a kernel file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelFormat {
    /// ELF entered through its PVH note.
    ElfPvh,
    /// ELF entered by the 64-bit Linux protocol at its entry point.
    ElfLinux,
    /// bzImage, unpacked by the host and entered at the kernel proper.
    BzImage {
        /// How the kernel was packed.
        compression: Compression,
    },
    /// bzImage that the host could not unpack, entered at its own decompressor.
    BzImageUnpackedByGuest,
    /// Multiboot 1.
    Multiboot1,
    /// Multiboot 2.
    Multiboot2,
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
#[derive(Debug)]
pub struct LoadedKernel {
    /// How the boot vCPU begins.
    pub entry: Entry,
    /// What the file was recognised as.
    pub format: KernelFormat,
    /// Where symbols can be found.
    pub symbols: SymbolSource,
    /// Why the guest has to unpack its kernel itself, if so; worth a warning, as it may be slow.
    pub fallback: Option<PayloadError>,
}

/// Loads kernel, initrd and command line into `memory` and says how the boot vCPU begins.
///
/// `memory` is zero wherever the guest has not been given anything; no vCPU runs yet.
pub fn load(memory: &GuestMemoryMmap, params: &BootParams<'_>) -> Result<LoadedKernel, BootError> {
    let result = prepare(memory, params);
    bulkhead_ipc::shed::free_heap();
    result
}

fn prepare(memory: &GuestMemoryMmap, params: &BootParams<'_>) -> Result<LoadedKernel, BootError> {
    let kernel = Source::new(params.kernel, "kernel")?;
    let initrd = params
        .initrd
        .map(|file| Source::new(file, "initrd"))
        .transpose()?;
    let mut head = vec![0; HEAD_BYTES];
    let read = kernel.read_up_to(0, &mut head)?;
    head.truncate(read);
    let mut loader = Loader {
        guest: Guest::new(memory, params.memory_bytes),
        kernel,
        initrd,
        cmdline: params.cmdline,
        rsdp: params.rsdp.0,
    };
    let loaded = loader.load(&head)?;
    loaded.entry.write_tables(&loader.guest)?;
    Ok(loaded)
}

/// Bytes from the start of a file by which every format is recognised.
const HEAD_BYTES: usize = 0x9000;
const _: () = assert!(HEAD_BYTES >= multiboot::SEARCH_BYTES && HEAD_BYTES >= bzimage::HEAD_BYTES);

struct Loader<'a> {
    guest: Guest<'a>,
    kernel: Source<'a>,
    initrd: Option<Source<'a>>,
    cmdline: &'a str,
    rsdp: u64,
}

impl<'a> Loader<'a> {
    fn load(&mut self, head: &[u8]) -> Result<LoadedKernel, BootError> {
        if BzImage::recognise(head) {
            return self.load_bzimage(&BzImage::parse(head)?);
        }
        if head.starts_with(&elf::MAGIC) {
            let elf = Elf::read(&self.kernel, head)?;
            if let Some(rip) = elf.pvh_entry(&self.kernel)? {
                return self.load_pvh(&elf, rip);
            }
            return match multiboot::find(head)? {
                Some(header) => self.load_multiboot(&header, Some(&elf)),
                None => self.load_elf(&elf, head),
            };
        }
        match multiboot::find(head)? {
            Some(header) => self.load_multiboot(&header, None),
            None => {
                let recognised = recognise::contents(head, self.kernel.length());
                Err(BootError::NotAKernel { recognised })
            }
        }
    }

    fn load_bzimage(&mut self, image: &BzImage) -> Result<LoadedKernel, BootError> {
        let loaded = image.load(&self.kernel, &mut self.guest)?;
        let place = InitrdPlace::HighBelow(image.initrd_limit());
        let placed = self.place(image.command_line_max(), place)?;
        linux::write_zero_page(&self.guest, &placed, image.header())?;
        Ok(LoadedKernel {
            entry: loaded.entry,
            format: loaded.format,
            symbols: SymbolSource::None,
            fallback: loaded.fallback,
        })
    }

    fn load_pvh(&mut self, elf: &Elf, rip: u32) -> Result<LoadedKernel, BootError> {
        elf.load(&self.kernel, &mut self.guest)?;
        let place = InitrdPlace::HighBelow(linux::INITRD_LIMIT);
        let placed = self.place(linux::COMMAND_LINE_MAX, place)?;
        pvh::write_start_info(&self.guest, &placed)?;
        let rbx = address32("PVH start info", layout::PVH_START_INFO)?;
        Ok(from_elf(Entry::Pvh32 { rip, rbx }, KernelFormat::ElfPvh))
    }

    fn load_elf(&mut self, elf: &Elf, head: &[u8]) -> Result<LoadedKernel, BootError> {
        if elf.header.class == Class::Elf32 || !elf.header.fixed {
            let what = recognise::contents(head, self.kernel.length());
            let recognised = format!("{what} with neither a PVH note nor a Multiboot header");
            return Err(BootError::NotAKernel {
                recognised: recognised.into(),
            });
        }
        let rip = elf.entry()?;
        elf.load(&self.kernel, &mut self.guest)?;
        let place = InitrdPlace::HighBelow(linux::INITRD_LIMIT);
        let placed = self.place(linux::COMMAND_LINE_MAX, place)?;
        linux::write_zero_page(&self.guest, &placed, linux::default_header())?;
        Ok(from_elf(
            Entry::Linux64 {
                rip,
                rsi: layout::ZERO_PAGE,
            },
            KernelFormat::ElfLinux,
        ))
    }

    fn load_multiboot(
        &mut self,
        header: &multiboot::Header,
        elf: Option<&Elf>,
    ) -> Result<LoadedKernel, BootError> {
        let rip = header.load(&self.kernel, elf, &mut self.guest)?;
        let placed = self.place(usize::MAX, InitrdPlace::BehindKernel)?;
        let entry = header.enter(&self.guest, &placed, rip)?;
        let symbols = match elf {
            Some(_) => SymbolSource::KernelFile,
            None => SymbolSource::None,
        };
        Ok(LoadedKernel {
            entry,
            format: header.format(),
            symbols,
            fallback: None,
        })
    }

    /// Places command line and initrd; the kernel's memory is claimed already.
    fn place(
        &mut self,
        command_line_limit: usize,
        place: InitrdPlace,
    ) -> Result<Placed<'a>, BootError> {
        linux::write_command_line(&self.guest, self.cmdline, command_line_limit)?;
        let guest = &mut self.guest;
        let initrd = self
            .initrd
            .as_ref()
            .map(|initrd| linux::place_initrd(guest, initrd, place))
            .transpose()?;
        Ok(Placed {
            initrd,
            command_line: self.cmdline,
            rsdp: self.rsdp,
        })
    }
}

fn from_elf(entry: Entry, format: KernelFormat) -> LoadedKernel {
    LoadedKernel {
        entry,
        format,
        symbols: SymbolSource::KernelFile,
        fallback: None,
    }
}

fn address32(field: &'static str, value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::field(field, value, "an address below 4 GiB"))
}
