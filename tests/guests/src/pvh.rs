//! What a VMM hands over at a PVH entry: `hvm_start_info` and the tables that it points to.

/// Value of the first field.
pub const MAGIC: u32 = 0x336e_c578;
/// Size of the structure, version 1.
pub const START_INFO_SIZE: usize = 56;
/// Size of a memory map entry.
pub const MEMORY_ENTRY_SIZE: usize = 24;
/// Size of a module entry.
pub const MODULE_ENTRY_SIZE: usize = 32;
/// Memory map type of usable memory.
pub const MEMORY_RAM: u32 = 1;

/// `hvm_start_info`, as far as it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartInfo {
    /// Version; memory map fields exist from 1 on.
    pub version: u32,
    /// Number of modules (an initrd is one).
    pub modules: u32,
    /// Address of the module list.
    pub modules_address: u64,
    /// Address of the zero-terminated command line; 0 without one.
    pub cmdline_address: u64,
    /// Address of the ACPI root pointer; 0 without ACPI.
    pub rsdp_address: u64,
    /// Address of the memory map.
    pub memory_map_address: u64,
    /// Number of its entries.
    pub memory_map_entries: u32,
}

/// A range of the memory map, or a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// Size in bytes.
    pub len: u64,
    /// Type as in the E820 map; 1 is usable memory.
    pub kind: u32,
}

impl StartInfo {
    /// `None` when the magic is wrong or the bytes are too few.
    pub fn parse(bytes: &[u8]) -> Option<StartInfo> {
        if u32_at(bytes, 0)? != MAGIC {
            return None;
        }
        let version = u32_at(bytes, 4)?;
        let mapped = version >= 1;
        Some(StartInfo {
            version,
            modules: u32_at(bytes, 12)?,
            modules_address: u64_at(bytes, 16)?,
            cmdline_address: u64_at(bytes, 24)?,
            rsdp_address: u64_at(bytes, 32)?,
            memory_map_address: if mapped { u64_at(bytes, 40)? } else { 0 },
            memory_map_entries: if mapped { u32_at(bytes, 48)? } else { 0 },
        })
    }
}

/// Parses one entry of the memory map.
pub fn memory_entry(bytes: &[u8]) -> Option<Range> {
    Some(Range {
        start: u64_at(bytes, 0)?,
        len: u64_at(bytes, 8)?,
        kind: u32_at(bytes, 16)?,
    })
}

/// Parses one entry of the module list.
pub fn module_entry(bytes: &[u8]) -> Option<Range> {
    Some(Range {
        start: u64_at(bytes, 0)?,
        len: u64_at(bytes, 8)?,
        kind: 0,
    })
}

/// Calls `found` with start and end of each run of whole pages of `ram` below 4 GiB, from `floor` on,
/// that nothing in `taken` overlaps.
pub fn each_free(ram: &[Range], taken: &[Range], floor: u64, mut found: impl FnMut(u64, u64)) {
    const CEILING: u64 = 1 << 32;
    for range in ram.iter().filter(|range| range.kind == MEMORY_RAM) {
        let end = range.start.saturating_add(range.len).min(CEILING) & !0xfff;
        let mut start = range.start.max(floor).next_multiple_of(4096);
        while start < end {
            let next = taken
                .iter()
                .filter(|taken| taken.len > 0 && taken.start.saturating_add(taken.len) > start)
                .min_by_key(|taken| taken.start);
            let stop = next.map_or(end, |taken| taken.start.clamp(start, end) & !0xfff);
            if stop > start {
                found(start, stop);
            }
            let Some(taken) = next else { break };
            start = taken
                .start
                .saturating_add(taken.len)
                .min(CEILING)
                .next_multiple_of(4096);
        }
    }
}

/// The largest part of `ram` below 4 GiB that starts at `floor` or above and that no module overlaps.
pub fn largest_free(ram: &[Range], modules: &[Range], floor: u64) -> Option<(u64, u64)> {
    let mut best: Option<(u64, u64)> = None;
    each_free(ram, modules, floor, |start, stop| {
        if best.is_none_or(|(from, to)| stop - start > to - from) {
            best = Some((start, stop));
        }
    });
    best
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_le_bytes(
        bytes.get(offset..offset + 4)?.try_into().ok()?,
    ))
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_le_bytes(
        bytes.get(offset..offset + 8)?.try_into().ok()?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ram(start: u64, len: u64) -> Range {
        Range {
            start,
            len,
            kind: MEMORY_RAM,
        }
    }

    #[test]
    fn the_fields_are_where_the_boot_protocol_puts_them() {
        let mut bytes = [0; START_INFO_SIZE];
        bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = 1;
        bytes[24..32].copy_from_slice(&0x7000_u64.to_le_bytes());
        bytes[48] = 3;
        let info = StartInfo::parse(&bytes).unwrap();
        assert_eq!(
            (info.version, info.cmdline_address, info.memory_map_entries),
            (1, 0x7000, 3)
        );
        bytes[0] = 0;
        assert_eq!(StartInfo::parse(&bytes), None);
    }

    #[test]
    fn free_memory_avoids_the_image_and_modules() {
        let map = [
            ram(0, MIB / 2),
            ram(MIB, 127 * MIB),
            Range {
                kind: 2,
                ..ram(512 * MIB, 512 * MIB)
            },
        ];
        assert_eq!(largest_free(&map, &[], 3 * MIB), Some((3 * MIB, 128 * MIB)));
        let initrd = [Range {
            start: 100 * MIB + 5,
            len: 10 * MIB,
            kind: 0,
        }];
        assert_eq!(
            largest_free(&map, &initrd, 3 * MIB),
            Some((3 * MIB, 100 * MIB))
        );
        let early = [Range {
            start: 2 * MIB,
            len: 10 * MIB,
            kind: 0,
        }];
        assert_eq!(
            largest_free(&map, &early, 3 * MIB),
            Some((12 * MIB, 128 * MIB))
        );
    }

    #[test]
    fn every_free_page_is_found_and_no_other() {
        let map = [ram(0, 0x9_fc00), ram(MIB, 63 * MIB)];
        let taken = |start, len| Range {
            start,
            len,
            kind: 0,
        };
        // The image, a heap behind it, and nothing.
        let taken = [
            taken(3 * MIB + 1, 1),
            taken(2 * MIB, MIB),
            taken(5 * MIB, 0),
        ];
        let mut free = Vec::new();
        each_free(&map, &taken, 0x1000, |start, end| free.push((start, end)));
        let expected = [
            (0x1000, 0x9_f000),
            (MIB, 2 * MIB),
            (3 * MIB + 0x1000, 64 * MIB),
        ];
        assert_eq!(free, expected);
    }

    #[test]
    fn memory_beyond_4_gib_is_not_used() {
        let map = [ram(0, 3 << 30), ram(4 << 30, 8 << 30)];
        assert_eq!(largest_free(&map, &[], 3 * MIB), Some((3 * MIB, 3 << 30)));
        assert_eq!(largest_free(&map[1..], &[], 3 * MIB), None);
    }
}
