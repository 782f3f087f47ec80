//! The PVH boot protocol: `hvm_start_info` version 1 with memory map, command line and initrd.
//!
//! Layout from Xen's `include/public/arch-x86/hvm/start_info.h`, which Linux, FreeBSD and several
//! hobby kernels implement.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::error::BootError;
use super::guest::Guest;
use super::layout;
use super::linux::Placed;

const START_MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct StartInfo {
    magic: U32,
    version: U32,
    flags: U32,
    modules: U32,
    module_list: U64,
    command_line: U64,
    rsdp: U64,
    memory_map: U64,
    memory_map_entries: U32,
    reserved: U32,
}

#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct Module {
    address: U64,
    bytes: U64,
    command_line: U64,
    reserved: U64,
}

#[derive(Debug, IntoBytes, Immutable)]
#[repr(C)]
struct MapEntry {
    address: U64,
    bytes: U64,
    kind: U32,
    reserved: U32,
}

const MODULE_LIST: u64 = layout::PVH_START_INFO + size_of::<StartInfo>() as u64;
const MEMORY_MAP: u64 = MODULE_LIST + size_of::<Module>() as u64;
const _: () = assert!(MEMORY_MAP + 16 * size_of::<MapEntry>() as u64 <= layout::ZERO_PAGE);

/// Writes the start info; the command line is already at its place.
pub(super) fn write_start_info(guest: &Guest<'_>, placed: &Placed<'_>) -> Result<(), BootError> {
    let mut entries = 0u32;
    let mut map = Vec::new();
    for range in guest.map() {
        entries += 1;
        map.extend_from_slice(
            MapEntry {
                address: range.start.into(),
                bytes: range.bytes.into(),
                kind: range.kind.number().into(),
                reserved: U32::ZERO,
            }
            .as_bytes(),
        );
    }
    guest.write(MEMORY_MAP, &map)?;
    if let Some((address, bytes)) = placed.initrd {
        let module = Module {
            address: address.into(),
            bytes: bytes.into(),
            command_line: U64::ZERO,
            reserved: U64::ZERO,
        };
        guest.write(MODULE_LIST, module.as_bytes())?;
    }
    let info = StartInfo {
        magic: START_MAGIC.into(),
        version: VERSION.into(),
        flags: U32::ZERO,
        modules: u32::from(placed.initrd.is_some()).into(),
        module_list: placed.initrd.map_or(0, |_| MODULE_LIST).into(),
        command_line: layout::COMMAND_LINE.into(),
        rsdp: placed.rsdp.into(),
        memory_map: MEMORY_MAP.into(),
        memory_map_entries: entries.into(),
        reserved: U32::ZERO,
    };
    guest.write(layout::PVH_START_INFO, info.as_bytes())
}
