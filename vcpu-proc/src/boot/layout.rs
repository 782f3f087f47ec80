//! Where everything is in a guest's physical address space when its first instruction runs.
//!
//! One table for the loader, the ACPI tables and whoever registers guest memory with KVM. Memory
//! surrounds the MMIO hole of [`bulkhead_ipc::platform`]; the first mebibyte is divided as a PC
//! firmware would have left it. Nothing here touches guest memory.

use bulkhead_ipc::platform;
use vm_memory::GuestAddress;

/// Global descriptor table of the boot vCPU: six entries.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of a PVH kernel, with its module list and memory map behind it.
pub const PVH_START_INFO: u64 = 0x6000;
/// The zero page (`boot_params`) of a Linux kernel.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer; the page below it is the stack.
pub const STACK_TOP: u64 = 0x8ff0;
/// Page tables of a 64-bit entry: one PML4, one PDPT, four page directories map 4 GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Information structure of a Multiboot kernel.
pub const MULTIBOOT_INFO: u64 = 0x1_0000;
/// The kernel's command line, NUL-terminated.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// First address after the space of the command line.
pub const COMMAND_LINE_END: u64 = 0x3_0000;
/// First address after everything that the loader itself writes; kernels begin above.
pub const BOOT_DATA_END: u64 = COMMAND_LINE_END;

/// First address that is not conventional memory (the extended BIOS data area begins).
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Where memory goes on above the legacy video and firmware ranges.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// First address after the space of the ACPI tables.
pub const ACPI_TABLES_END: u64 = platform::ACPI_TABLES_START + 0x1_0000;
/// First address after the reserved range in which kernels look for firmware tables.
const FIRMWARE_END: u64 = HIGH_MEMORY_START;

/// What a range of the guest's memory map is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// The guest may use it.
    Ram,
    /// The guest must leave it alone.
    Reserved,
}

impl MapKind {
    /// The type number that e820, PVH and Multiboot share.
    pub fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range of the memory map that the guest is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapEntry {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes, never zero.
    pub bytes: u64,
    /// What the range is for.
    pub kind: MapKind,
}

impl MapEntry {
    fn new(start: u64, end: u64, kind: MapKind) -> Self {
        Self {
            start,
            bytes: end - start,
            kind,
        }
    }

    /// The address after the last byte.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes)
    }
}

/// The ranges of guest memory for a guest of `bytes` bytes, in ascending order: one up to the MMIO
/// hole and, for larger guests, one from 4 GiB on.
pub fn memory_ranges(bytes: u64) -> Vec<(GuestAddress, u64)> {
    let low = bytes.min(platform::MMIO_HOLE_START);
    let mut ranges = vec![(GuestAddress(0), low)];
    if bytes > low {
        ranges.push((GuestAddress(platform::MMIO_HOLE_END), bytes - low));
    }
    ranges
}

/// The memory map of a guest of `bytes` bytes as its kernel is told: ascending and disjoint.
///
/// `bytes` is at least [`platform::MEMORY_BYTES_MIN`] by the check of the VM file; a smaller value
/// gives a map without high memory, never a wrong one.
pub fn memory_map(bytes: u64) -> Vec<MapEntry> {
    let mut map = Vec::with_capacity(6);
    let low_end = bytes.min(platform::MMIO_HOLE_START);
    let mut push = |start: u64, end: u64, kind| {
        if start < end {
            map.push(MapEntry::new(start, end, kind));
        }
    };
    push(0, low_end.min(CONVENTIONAL_END), MapKind::Ram);
    push(CONVENTIONAL_END, 0xa_0000, MapKind::Reserved);
    push(platform::ACPI_TABLES_START, FIRMWARE_END, MapKind::Reserved);
    push(HIGH_MEMORY_START, low_end, MapKind::Ram);
    push(
        platform::KVM_IDENTITY_MAP_BASE,
        platform::MMIO_HOLE_END,
        MapKind::Reserved,
    );
    if bytes > low_end {
        let high = platform::MMIO_HOLE_END;
        push(high, high.saturating_add(bytes - low_end), MapKind::Ram);
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_small_guest_has_one_range_from_zero() {
        assert_eq!(memory_ranges(128 << 20), vec![(GuestAddress(0), 128 << 20)]);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_at_4_gib() {
        let ranges = memory_ranges(6 << 30);
        assert_eq!(
            ranges,
            vec![
                (GuestAddress(0), platform::MMIO_HOLE_START),
                (GuestAddress(4 << 30), (6 << 30) - platform::MMIO_HOLE_START),
            ]
        );
    }

    #[test]
    fn the_acpi_tables_and_the_video_range_are_not_ram() {
        for entry in memory_map(64 << 20)
            .iter()
            .filter(|entry| entry.kind == MapKind::Ram)
        {
            assert!(
                entry.end() <= 0xa_0000 || entry.start >= 0x10_0000,
                "{entry:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn ranges_have_exactly_the_bytes_asked_for(bytes in platform::MEMORY_BYTES_MIN..1 << 44) {
            let ranges = memory_ranges(bytes);
            prop_assert_eq!(ranges.iter().map(|range| range.1).sum::<u64>(), bytes);
            for (start, length) in ranges {
                prop_assert!(length > 0);
                let end = start.0 + length;
                prop_assert!(end <= platform::MMIO_HOLE_START || start.0 >= platform::MMIO_HOLE_END);
            }
        }

        #[test]
        fn the_map_is_sorted_disjoint_and_its_ram_is_backed(bytes in 0u64..1 << 44) {
            let map = memory_map(bytes);
            for pair in map.windows(2) {
                prop_assert!(pair[0].end() <= pair[1].start);
            }
            let ranges = memory_ranges(bytes);
            for entry in map.iter().filter(|entry| entry.kind == MapKind::Ram) {
                let backed = ranges.iter().any(|(start, length)| {
                    start.0 <= entry.start && entry.end() <= start.0 + length
                });
                prop_assert!(backed);
            }
        }
    }
}
