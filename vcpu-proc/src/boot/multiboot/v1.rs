//! Multiboot 1 (specification 0.6.96): header and information structure.

use super::super::address32;
use super::super::error::BootError;
use super::super::guest::Guest;
use super::super::layout;
use super::super::linux::Placed;
use super::{Addresses, Header, LOADER_NAME, Version, basic_memory, word};

/// EAX at the kernel's first instruction.
pub(super) const LOADER_MAGIC: u32 = 0x2bad_b002;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const SEARCH_BYTES: usize = 8192;
const ALIGNMENT: usize = 4;

const WANTS_ALIGNED_MODULES: u32 = 1 << 0;
const WANTS_MEMORY: u32 = 1 << 1;
const WANTS_VIDEO: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
/// Bits that a loader must understand or refuse; the upper half is optional.
const MANDATORY: u32 = 0xffff;

const HAS_MEMORY: u32 = 1 << 0;
const HAS_COMMAND_LINE: u32 = 1 << 2;
const HAS_MODULES: u32 = 1 << 3;
const HAS_MEMORY_MAP: u32 = 1 << 6;
const HAS_LOADER_NAME: u32 = 1 << 9;

const INFORMATION_BYTES: usize = 116;
const MODULE_BYTES: usize = 16;

/// Finds and checks a header.
pub(super) fn find(head: &[u8]) -> Result<Option<Header>, BootError> {
    let last = head.len().min(SEARCH_BYTES);
    for offset in (0..last).step_by(ALIGNMENT) {
        let (Some(HEADER_MAGIC), Some(flags), Some(checksum)) = (
            word(head, offset),
            word(head, offset + 4),
            word(head, offset + 8),
        ) else {
            continue;
        };
        // All 12 bytes must lie within the first 8 KiB.
        if offset + 12 <= SEARCH_BYTES
            && HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0
        {
            return parse(head, offset, flags).map(Some);
        }
    }
    Ok(None)
}

fn parse(head: &[u8], offset: usize, flags: u32) -> Result<Header, BootError> {
    let unknown = flags & MANDATORY & !(WANTS_ALIGNED_MODULES | WANTS_MEMORY | WANTS_VIDEO);
    if unknown != 0 {
        let expected = "no bits of 0 to 15 but 0 and 1 (modules aligned, memory information)";
        return Err(BootError::field("Multiboot header: flags", flags, expected));
    }
    if flags & WANTS_VIDEO != 0 {
        let expected = "bit 2 clear: the kernel demands a video mode and this machine has no \
                        display; build it to use the serial port";
        return Err(BootError::field("Multiboot header: flags", flags, expected));
    }
    let (mut addresses, mut entry) = (None, None);
    if flags & HAS_ADDRESSES != 0 {
        let field = |index: usize| {
            word(head, offset + 12 + 4 * index).ok_or_else(|| {
                let bytes = (head.len() - offset.min(head.len())) as u64;
                BootError::field(
                    "Multiboot header: bytes",
                    bytes,
                    "at least 32 (address fields)",
                )
            })
        };
        addresses = Some(Addresses {
            header: field(0)?,
            load: field(1)?,
            load_end: field(2)?,
            bss_end: field(3)?,
        });
        entry = Some(field(4)?);
    }
    Ok(Header {
        version: Version::One,
        offset: offset as u64,
        addresses,
        entry,
    })
}

/// The information structure with everything that it points to behind it, except for the command
/// line and the module.
pub(super) fn information(guest: &Guest<'_>, placed: &Placed<'_>) -> Result<Vec<u8>, BootError> {
    let mut modules = Vec::new();
    if let Some((start, bytes)) = placed.initrd {
        for word in [
            address32("module start", start)?,
            address32("module end", start.saturating_add(bytes))?,
            address32("module string", placed.empty_string())?,
            0,
        ] {
            modules.extend(word.to_le_bytes());
        }
    }
    let mut map = Vec::new();
    for range in guest.map() {
        map.extend(20u32.to_le_bytes());
        map.extend(range.start.to_le_bytes());
        map.extend(range.bytes.to_le_bytes());
        map.extend(range.kind.number().to_le_bytes());
    }
    let base = address32("Multiboot information", layout::MULTIBOOT_INFO)?;
    let at = |offset: usize| {
        u32::try_from(offset)
            .map(|offset| base.saturating_add(offset))
            .map_err(|_| BootError::field("Multiboot information", offset as u64, "64 KiB"))
    };
    let modules_at = INFORMATION_BYTES;
    let map_at = modules_at + modules.len();
    let name_at = map_at + map.len();
    let (lower, upper) = basic_memory(guest);
    let flags = HAS_MEMORY | HAS_COMMAND_LINE | HAS_MODULES | HAS_MEMORY_MAP | HAS_LOADER_NAME;
    let length = |bytes: &[u8], unit: usize| u32::try_from(bytes.len() / unit).unwrap_or(0);
    let mut words = [0u32; INFORMATION_BYTES / 4];
    let fields = [
        (0, flags),
        (4, lower),
        (8, upper),
        (16, address32("command line", layout::COMMAND_LINE)?),
        (20, length(&modules, MODULE_BYTES)),
        (24, at(modules_at)?),
        (44, length(&map, 1)),
        (48, at(map_at)?),
        (64, at(name_at)?),
    ];
    for (offset, value) in fields {
        if let Some(word) = words.get_mut(offset / 4) {
            *word = value;
        }
    }
    let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(modules);
    bytes.extend(map);
    bytes.extend(LOADER_NAME);
    Ok(bytes)
}
