//! Linux bzImage: the setup header, the way into the unpacked kernel, and the way into the image
//! itself when the guest must unpack it.
//!
//! From the kernel's `Documentation/arch/x86/boot.rst`.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::elf::Class;
use super::entry::Entry;
use super::error::BootError;
use super::guest::Guest;
use super::layout;
use super::linux;
use super::payload::{self, PayloadError, Unpacked};
use super::source::Source;
use super::{KernelFormat, address32};

const HEADER_OFFSET: usize = 0x1f1;
const BOOT_FLAG_OFFSET: usize = 0x1fe;
const JUMP_OFFSET: usize = 0x201;
const MAGIC_OFFSET: usize = 0x202;
/// Bytes of a file that hold the largest setup header.
pub(super) const HEAD_BYTES: usize = 0x280;

const SECTOR: u64 = 512;
/// `setup_sects` 0 means this, for compatibility with 1992.
const SETUP_SECTORS_DEFAULT: u8 = 4;
/// Version 2.10 (Linux 2.6.31) brought `pref_address` and `init_size`.
const VERSION_MIN: u16 = 0x20a;
/// Version 2.12 brought `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x20c;
const XLOADFLAGS_KERNEL_64: u16 = 1 << 0;
const LOADFLAGS_LOADED_HIGH: u8 = 1 << 0;
/// The 64-bit entry of an image is so far behind its 32-bit entry.
const ENTRY_64: u64 = 0x200;

/// A checked setup header with what is computed from it.
pub(super) struct BzImage {
    header: setup_header,
    /// Where the protected-mode part begins in the file.
    image_offset: u64,
}

/// A bzImage in guest memory.
pub(super) struct Loaded {
    pub(super) entry: Entry,
    pub(super) format: KernelFormat,
    pub(super) fallback: Option<PayloadError>,
}

impl BzImage {
    /// Whether a file that begins with `head` says that it is a bzImage.
    pub(super) fn recognise(head: &[u8]) -> bool {
        let flag = head.get(BOOT_FLAG_OFFSET..BOOT_FLAG_OFFSET + 2);
        let magic = head.get(MAGIC_OFFSET..MAGIC_OFFSET + 4);
        flag == Some(&linux::BOOT_FLAG.to_le_bytes())
            && magic == Some(&linux::HEADER_MAGIC.to_le_bytes())
    }

    /// Parses the setup header in the first bytes of a file.
    pub(super) fn parse(head: &[u8]) -> Result<Self, BootError> {
        let mut header = setup_header::default();
        let jump = head.get(JUMP_OFFSET).copied().unwrap_or(0);
        let end = MAGIC_OFFSET + usize::from(jump);
        let available = end.min(HEADER_OFFSET + size_of::<setup_header>());
        let Some(bytes) = head.get(HEADER_OFFSET..available) else {
            return Err(BootError::field(
                "setup header: jump",
                jump,
                "the length of the header",
            ));
        };
        if let Some(place) = header.as_mut_slice().get_mut(..bytes.len()) {
            place.copy_from_slice(bytes);
        }
        let version = header.version;
        if version < VERSION_MIN {
            let expected = "0x20a or later (Linux 2.6.31 or later)";
            return Err(BootError::field("setup header: version", version, expected));
        }
        if header.loadflags & LOADFLAGS_LOADED_HIGH == 0 {
            let expected = "bit 0 set (a bzImage, no zImage)";
            return Err(BootError::field(
                "setup header: loadflags",
                header.loadflags,
                expected,
            ));
        }
        let sectors = match header.setup_sects {
            0 => SETUP_SECTORS_DEFAULT,
            sectors => sectors,
        };
        Ok(Self {
            header,
            image_offset: (u64::from(sectors) + 1) * SECTOR,
        })
    }

    /// The header, which the zero page begins with.
    pub(super) fn header(&self) -> setup_header {
        self.header
    }

    /// Longest command line of this kernel.
    pub(super) fn command_line_max(&self) -> usize {
        let limit = self.header.cmdline_size;
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    /// First address at which this kernel does not look for its initrd.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// Brings the kernel into guest memory: unpacked by the host, or whole for the guest to unpack.
    pub(super) fn load(
        &self,
        source: &Source<'_>,
        guest: &mut Guest<'_>,
    ) -> Result<Loaded, BootError> {
        let (offset, length) = (self.header.payload_offset, self.header.payload_length);
        let offset = self.image_offset + u64::from(offset);
        match payload::unpack(source, offset, length.into(), guest)? {
            Unpacked::Loaded(elf, compression) => {
                let rip = elf.entry()?;
                let format = KernelFormat::BzImage { compression };
                let entry = linux_entry(elf.header.class == Class::Elf64, rip)?;
                Ok(Loaded {
                    entry,
                    format,
                    fallback: None,
                })
            }
            Unpacked::Failed(reason) => {
                guest.release_claims();
                let entry = self.load_whole(source, guest)?;
                let format = KernelFormat::BzImageUnpackedByGuest;
                Ok(Loaded {
                    entry,
                    format,
                    fallback: Some(reason),
                })
            }
        }
    }

    /// Copies the protected-mode part to the address it prefers, with the memory that it needs to
    /// unpack itself.
    fn load_whole(&self, source: &Source<'_>, guest: &mut Guest<'_>) -> Result<Entry, BootError> {
        let (paragraphs, init_size) = (self.header.syssize, self.header.init_size);
        let address = self.header.pref_address;
        let promised = u64::from(paragraphs) * 16;
        let present = source.length().saturating_sub(self.image_offset);
        // The size is in units of 16 bytes; the file may end within the last one.
        if present.saturating_add(15) < promised || promised == 0 {
            source.check("the kernel (syssize)", self.image_offset, promised.max(1))?;
        }
        let bytes = promised.min(present);
        guest.claim(
            "the bzImage with room to unpack (pref_address, init_size)",
            address,
            bytes.max(init_size.into()),
        )?;
        guest.read_from(
            source,
            "the kernel (syssize)",
            self.image_offset,
            address,
            bytes,
        )?;
        let flags = self.header.xloadflags;
        let long = self.header.version >= VERSION_XLOADFLAGS && flags & XLOADFLAGS_KERNEL_64 != 0;
        linux_entry(
            long,
            if long {
                address.saturating_add(ENTRY_64)
            } else {
                address
            },
        )
    }
}

fn linux_entry(long: bool, rip: u64) -> Result<Entry, BootError> {
    if long {
        return Ok(Entry::Linux64 {
            rip,
            rsi: layout::ZERO_PAGE,
        });
    }
    Ok(Entry::Linux32 {
        rip: address32("32-bit kernel: entry", rip)?,
        rsi: address32("zero page", layout::ZERO_PAGE)?,
    })
}
