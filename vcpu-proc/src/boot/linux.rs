//! The 64-bit Linux boot protocol: the zero page, and what every protocol shares with it, namely
//! the placing of command line and initrd.
//!
//! From the kernel's `Documentation/arch/x86/boot.rst` and `zero-page.rst`.

use bulkhead_ipc::platform;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::error::BootError;
use super::guest::Guest;
use super::layout;
use super::source::Source;

/// Things that were placed for the kernel before its own structures are written.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed<'a> {
    /// Address and length of the initrd.
    pub(super) initrd: Option<(u64, u64)>,
    /// The command line, which is at [`layout::COMMAND_LINE`].
    pub(super) command_line: &'a str,
    /// Guest-physical address of the ACPI RSDP.
    pub(super) rsdp: u64,
}

impl Placed<'_> {
    /// Address of a NUL byte, the one that ends the command line.
    pub(super) fn empty_string(&self) -> u64 {
        layout::COMMAND_LINE + self.command_line.len() as u64
    }
}

/// "HdrS", the magic of the setup header.
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
/// The value at byte 0x1fe of every bzImage.
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// Linux takes command lines of at most this many bytes, unless the setup header says otherwise.
pub(super) const COMMAND_LINE_MAX: usize = 2047;
/// An initrd of a kernel without a setup header stays below 2 GiB, as the protocol's default.
pub(super) const INITRD_LIMIT: u64 = 0x8000_0000;

const LOADER_UNDEFINED: u8 = 0xff;
const LOADFLAGS_LOADED_HIGH: u8 = 1 << 0;
const LOADFLAGS_KASLR: u8 = 1 << 1;
const LOADFLAGS_CAN_USE_HEAP: u8 = 1 << 7;
const VIDEO_MODE_NORMAL: u16 = 0xffff;
const KERNEL_ALIGNMENT: u32 = 0x100_0000;

/// Writes the command line at its fixed place, which has room for 64 KiB.
pub(super) fn write_command_line(
    guest: &Guest<'_>,
    text: &str,
    limit: usize,
) -> Result<(), BootError> {
    let room = layout::COMMAND_LINE_END - layout::COMMAND_LINE - 1;
    let limit = usize::try_from(room).unwrap_or(limit).min(limit);
    if text.len() > limit {
        return Err(BootError::CommandLineTooLong {
            bytes: text.len(),
            limit,
        });
    }
    if let Some(position) = text.bytes().position(|byte| byte == 0) {
        return Err(BootError::CommandLineNul { position });
    }
    guest.write(layout::COMMAND_LINE, text.as_bytes())?;
    guest.write(layout::COMMAND_LINE + text.len() as u64, &[0])
}

/// Where an initrd may be.
#[derive(Debug, Clone, Copy)]
pub(super) enum InitrdPlace {
    /// As high as possible below the address, as Linux likes it.
    HighBelow(u64),
    /// Right behind the kernel, where simple kernels have memory mapped.
    BehindKernel,
}

/// Copies the initrd to its place, after everything else has been claimed.
pub(super) fn place_initrd(
    guest: &mut Guest<'_>,
    initrd: &Source<'_>,
    place: InitrdPlace,
) -> Result<(u64, u64), BootError> {
    let bytes = initrd.length();
    if bytes == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let (found, limit) = match place {
        InitrdPlace::HighBelow(limit) => (guest.highest_free(bytes, limit), limit),
        InitrdPlace::BehindKernel => (guest.free_behind_claims(bytes), platform::MMIO_HOLE_START),
    };
    let address = found.map_err(|available| BootError::InitrdTooLarge {
        bytes,
        available,
        limit,
    })?;
    guest.claim("the initrd", address, bytes)?;
    guest.read_from(initrd, "the initrd", 0, address, bytes)?;
    Ok((address, bytes))
}

/// The setup header for a kernel that comes without one.
pub(super) fn default_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: 0x20f,
        loadflags: LOADFLAGS_LOADED_HIGH,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    }
}

/// Writes the zero page: `header` completed with what the loader decided, and the memory map.
pub(super) fn write_zero_page(
    guest: &Guest<'_>,
    placed: &Placed<'_>,
    mut header: setup_header,
) -> Result<(), BootError> {
    header.type_of_loader = LOADER_UNDEFINED;
    // KASLR is the business of the decompressor, which may not run; it sets the flag itself.
    header.loadflags &= !(LOADFLAGS_KASLR | LOADFLAGS_CAN_USE_HEAP);
    header.vid_mode = VIDEO_MODE_NORMAL;
    header.setup_data = 0;
    header.cmd_line_ptr = narrow("command line address", layout::COMMAND_LINE)?;
    header.cmdline_size = narrow("command line length", placed.command_line.len() as u64)?;
    if let Some((address, bytes)) = placed.initrd {
        header.ramdisk_image = narrow("initrd address", address)?;
        header.ramdisk_size = narrow("initrd length", bytes)?;
    }
    let mut page = boot_params {
        hdr: header,
        acpi_rsdp_addr: placed.rsdp,
        ..boot_params::default()
    };
    let map = guest.map();
    for (slot, range) in page.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry {
            addr: range.start,
            size: range.bytes,
            r#type: range.kind.number(),
        };
        page.e820_entries = page.e820_entries.saturating_add(1);
    }
    guest.write(layout::ZERO_PAGE, page.as_slice())
}

fn narrow(field: &'static str, value: u64) -> Result<u32, BootError> {
    u32::try_from(value).map_err(|_| BootError::field(field, value, "a 32-bit value"))
}
