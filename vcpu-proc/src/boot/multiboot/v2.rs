//! Multiboot 2 (specification 2.0): header tags and information tags.

use super::super::address32;
use super::super::error::BootError;
use super::super::guest::Guest;
use super::super::linux::Placed;
use super::{Addresses, Header, LOADER_NAME, Version, basic_memory, word};

/// EAX at the kernel's first instruction.
pub(super) const LOADER_MAGIC: u32 = 0x36d7_6289;
/// Bytes of a file in which the header must lie.
pub(super) const SEARCH_BYTES: usize = 32768;

const HEADER_MAGIC: u32 = 0xe852_50d6;
const ARCHITECTURE_I386: u32 = 0;
const ALIGNMENT: usize = 8;
const FIXED_BYTES: usize = 16;

const OPTIONAL: u16 = 1;

/// Tags of the header, by number.
mod request {
    pub(super) const END: u16 = 0;
    pub(super) const INFORMATION: u16 = 1;
    pub(super) const ADDRESSES: u16 = 2;
    pub(super) const ENTRY: u16 = 3;
    pub(super) const CONSOLE: u16 = 4;
    pub(super) const FRAMEBUFFER: u16 = 5;
    pub(super) const MODULE_ALIGNMENT: u16 = 6;
    pub(super) const EFI_BOOT_SERVICES: u16 = 7;
    pub(super) const EFI_ENTRY_I386: u16 = 8;
    pub(super) const EFI_ENTRY_AMD64: u16 = 9;
    pub(super) const RELOCATABLE: u16 = 10;
}

/// Tags of the information structure, by number.
mod tag {
    pub(super) const END: u32 = 0;
    pub(super) const COMMAND_LINE: u32 = 1;
    pub(super) const LOADER_NAME: u32 = 2;
    pub(super) const MODULE: u32 = 3;
    pub(super) const BASIC_MEMORY: u32 = 4;
    pub(super) const MEMORY_MAP: u32 = 6;
    pub(super) const RSDP: u32 = 15;
    /// What a kernel may demand.
    pub(super) const GIVEN: [u32; 6] = [
        COMMAND_LINE,
        LOADER_NAME,
        MODULE,
        BASIC_MEMORY,
        MEMORY_MAP,
        RSDP,
    ];
}

const CONSOLE_REQUIRED: u32 = 1;
const RSDP_BYTES: usize = 36;

/// Finds and checks a header.
pub(super) fn find(head: &[u8]) -> Result<Option<Header>, BootError> {
    let last = head.len().min(SEARCH_BYTES);
    for offset in (0..last).step_by(ALIGNMENT) {
        let (Some(HEADER_MAGIC), Some(architecture), Some(length), Some(checksum)) = (
            word(head, offset),
            word(head, offset + 4),
            word(head, offset + 8),
            word(head, offset + 12),
        ) else {
            continue;
        };
        let sum = [architecture, length, checksum]
            .iter()
            .fold(HEADER_MAGIC, |sum, word| sum.wrapping_add(*word));
        if sum == 0 {
            return parse(head, offset, architecture, length).map(Some);
        }
    }
    Ok(None)
}

fn parse(head: &[u8], offset: usize, architecture: u32, length: u32) -> Result<Header, BootError> {
    if architecture != ARCHITECTURE_I386 {
        let field = "Multiboot 2 header: architecture";
        return Err(BootError::field(field, architecture, "0 (i386)"));
    }
    let tags = usize::try_from(length)
        .ok()
        .and_then(|length| offset.checked_add(length))
        .filter(|end| *end <= SEARCH_BYTES)
        .and_then(|end| head.get(offset + FIXED_BYTES..end));
    let Some(mut tags) = tags else {
        let expected = "a length that ends within the file and its first 32 KiB";
        return Err(BootError::field(
            "Multiboot 2 header: header_length",
            length,
            expected,
        ));
    };
    let mut header = Header {
        version: Version::Two,
        offset: offset as u64,
        addresses: None,
        entry: None,
    };
    while !tags.is_empty() {
        let (Some(first), Some(size)) = (word(tags, 0), word(tags, 4)) else {
            break;
        };
        let body = usize::try_from(size)
            .ok()
            .and_then(|size| tags.get(8..size));
        let Some(body) = body else {
            let expected = "8 or more bytes that end within the header";
            return Err(BootError::field(
                "Multiboot 2 header tag: size",
                size,
                expected,
            ));
        };
        let [low, high, upper_low, upper_high] = first.to_le_bytes();
        let kind = u16::from_le_bytes([low, high]);
        let optional = u16::from_le_bytes([upper_low, upper_high]) & OPTIONAL != 0;
        if kind == request::END {
            break;
        }
        header.take(kind, optional, body)?;
        let next = (body.len() + 8).next_multiple_of(ALIGNMENT);
        tags = tags.get(next..).unwrap_or_default();
    }
    Ok(header)
}

impl Header {
    /// Takes one tag of the header.
    fn take(&mut self, kind: u16, optional: bool, body: &[u8]) -> Result<(), BootError> {
        let field = |index: usize| {
            word(body, 4 * index).ok_or_else(|| {
                let bytes = body.len() as u64 + 8;
                BootError::field("Multiboot 2 header tag: size", bytes, "room for its fields")
            })
        };
        let refuse = |expected: &'static str| {
            if optional {
                return Ok(());
            }
            Err(BootError::field(
                "Multiboot 2 header tag: type",
                kind,
                expected,
            ))
        };
        match kind {
            request::INFORMATION if !optional => {
                for wanted in body.chunks_exact(4).filter_map(|bytes| word(bytes, 0)) {
                    if !tag::GIVEN.contains(&wanted) {
                        let expected = "command line (1), loader name (2), modules (3), memory (4, \
                                        6) or ACPI (15); anything else must be optional";
                        let name = "Multiboot 2 information request: type";
                        return Err(BootError::field(name, wanted, expected));
                    }
                }
            }
            request::ADDRESSES => {
                self.addresses = Some(Addresses {
                    header: field(0)?,
                    load: field(1)?,
                    load_end: field(2)?,
                    bss_end: field(3)?,
                });
            }
            request::ENTRY => self.entry = Some(field(0)?),
            request::CONSOLE if field(0)? & CONSOLE_REQUIRED != 0 => {
                refuse("no required console (4): this machine has no display, only a serial port")?;
            }
            request::FRAMEBUFFER => {
                refuse(
                    "no required framebuffer (5): this machine has no display; mark the tag optional",
                )?;
            }
            request::EFI_BOOT_SERVICES => refuse("no EFI boot services (7)")?,
            // Optional information, a console that is not required, entries for EFI only, aligned
            // modules, and a permission to relocate that is not used.
            request::INFORMATION
            | request::CONSOLE
            | request::EFI_ENTRY_I386
            | request::EFI_ENTRY_AMD64
            | request::MODULE_ALIGNMENT
            | request::RELOCATABLE => {}
            _ => refuse("a tag of specification 2.0 (1 to 10)")?,
        }
        Ok(())
    }
}

/// The information structure.
pub(super) fn information(guest: &Guest<'_>, placed: &Placed<'_>) -> Result<Vec<u8>, BootError> {
    let mut tags = Tags(vec![0; 8]);
    let mut command_line = placed.command_line.as_bytes().to_vec();
    command_line.push(0);
    tags.push(tag::COMMAND_LINE, &command_line);
    tags.push(tag::LOADER_NAME, LOADER_NAME);
    if let Some((start, bytes)) = placed.initrd {
        let mut body = address32("module start", start)?.to_le_bytes().to_vec();
        body.extend(address32("module end", start.saturating_add(bytes))?.to_le_bytes());
        body.push(0);
        tags.push(tag::MODULE, &body);
    }
    let (lower, upper) = basic_memory(guest);
    let mut body = lower.to_le_bytes().to_vec();
    body.extend(upper.to_le_bytes());
    tags.push(tag::BASIC_MEMORY, &body);
    let mut body = 24u32.to_le_bytes().to_vec();
    body.extend(0u32.to_le_bytes());
    for range in guest.map() {
        body.extend(range.start.to_le_bytes());
        body.extend(range.bytes.to_le_bytes());
        body.extend(range.kind.number().to_le_bytes());
        body.extend(0u32.to_le_bytes());
    }
    tags.push(tag::MEMORY_MAP, &body);
    tags.push(tag::RSDP, &guest.read(placed.rsdp, RSDP_BYTES)?);
    tags.push(tag::END, &[]);
    Ok(tags.finish())
}

/// Information tags, each aligned to eight bytes.
struct Tags(Vec<u8>);

impl Tags {
    fn push(&mut self, kind: u32, body: &[u8]) {
        let size = u32::try_from(body.len() + 8).unwrap_or(u32::MAX);
        self.0.extend(kind.to_le_bytes());
        self.0.extend(size.to_le_bytes());
        self.0.extend(body);
        self.0.resize(self.0.len().next_multiple_of(ALIGNMENT), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        let size = u32::try_from(self.0.len()).unwrap_or(u32::MAX);
        if let Some(place) = self.0.get_mut(..4) {
            place.copy_from_slice(&size.to_le_bytes());
        }
        self.0
    }
}
