//! What the VMM told us, copied out of its memory before anything else uses memory: command line,
//! memory map, modules, ACPI facts. Called once, by `guest_main`.

use bulkhead_guest::acpi::{self, Acpi};
use bulkhead_guest::args::{Args, BadValue};
use bulkhead_guest::pattern;
use bulkhead_guest::pvh::{self, Range, StartInfo};
use bulkhead_guest::record::Escaped;

use crate::report::{Failure, fail};
use crate::sys::phys;

const CMDLINE_MAX: usize = 4096;
const RANGES_MAX: usize = 32;
/// What lies beyond is not mapped while the tables are read.
const MAPPED_END: u64 = 1 << 32;

unsafe extern "C" {
    static __image_start: u8;
    static __image_end: u8;
    static __constant_start: u8;
    static __constant_end: u8;
}

/// A checksum of what nothing ever writes: the guest's own code and constants.
pub fn constant_checksum() -> u64 {
    let start = &raw const __constant_start as u64;
    let end = &raw const __constant_end as u64;
    pattern::checksum(0, phys::bytes(start, (end - start) as usize))
}

/// What the guest itself writes of its image: data and stacks. The tables of the processor before it
/// are set when ring 3 begins, and stay.
pub fn variable() -> Range {
    let start = (&raw const __constant_end as u64).next_multiple_of(4096);
    Range {
        start,
        len: &raw const __image_end as u64 - start,
        kind: 0,
    }
}

/// All of the image.
pub fn image() -> Range {
    let start = &raw const __image_start as u64;
    Range {
        start,
        len: &raw const __image_end as u64 - start,
        kind: 0,
    }
}

/// The machine that we run on.
#[derive(Debug)]
pub struct Machine {
    cmdline: [u8; CMDLINE_MAX],
    cmdline_len: usize,
    memory: [Range; RANGES_MAX],
    memory_count: usize,
    modules: [Range; RANGES_MAX],
    module_count: usize,
    /// ACPI facts, when there is a root pointer.
    pub acpi: Option<Acpi>,
    /// Version of `hvm_start_info`.
    pub start_info_version: u32,
}

impl Machine {
    /// The command line.
    pub fn args(&self) -> Args<'_> {
        Args::new(core::str::from_utf8(&self.cmdline[..self.cmdline_len]).unwrap_or(""))
    }

    /// The command line as bytes.
    pub fn cmdline(&self) -> &[u8] {
        &self.cmdline[..self.cmdline_len]
    }

    /// A number from the command line, or its default; a bad one ends the mode.
    pub fn number(&self, key: &'static str, default: u64) -> Result<u64, Failure> {
        match self.args().number(key) {
            Ok(value) => Ok(value.unwrap_or(default)),
            Err(BadValue { .. }) => Err(Failure::Parameter(key)),
        }
    }

    /// The memory map.
    pub fn memory(&self) -> &[Range] {
        &self.memory[..self.memory_count]
    }

    /// Modules, an initrd for one.
    pub fn modules(&self) -> &[Range] {
        &self.modules[..self.module_count]
    }
}

fn readable(address: u64, len: usize) -> Option<&'static [u8]> {
    let end = address.checked_add(len as u64)?;
    (address != 0 && end <= MAPPED_END).then(|| phys::bytes(address, len))
}

/// Copies everything and sets up memory for DMA.
pub fn discover(start_info_address: u64) -> Machine {
    let mut machine = Machine {
        cmdline: [0; CMDLINE_MAX],
        cmdline_len: 0,
        memory: [Range::default(); RANGES_MAX],
        memory_count: 0,
        modules: [Range::default(); RANGES_MAX],
        module_count: 0,
        acpi: None,
        start_info_version: 0,
    };
    let info = readable(start_info_address, pvh::START_INFO_SIZE).and_then(StartInfo::parse);
    let Some(info) = info else {
        fail!("boot", "kind=start_info address={start_info_address:#x}");
        return machine;
    };
    machine.start_info_version = info.version;
    machine.copy_cmdline(info.cmdline_address);
    machine.memory_count = copy_ranges(
        info.memory_map_address,
        info.memory_map_entries,
        pvh::MEMORY_ENTRY_SIZE,
        pvh::memory_entry,
        &mut machine.memory,
    );
    machine.module_count = copy_ranges(
        info.modules_address,
        info.modules,
        pvh::MODULE_ENTRY_SIZE,
        pvh::module_entry,
        &mut machine.modules,
    );
    if info.rsdp_address != 0 {
        machine.acpi = acpi::parse(info.rsdp_address, readable);
        if machine.acpi.is_none() {
            fail!("boot", "kind=acpi rsdp={:#x}", info.rsdp_address);
        }
    }
    let image_end = &raw const __image_end as u64;
    match pvh::largest_free(machine.memory(), machine.modules(), image_end) {
        Some((start, end)) => phys::set_heap(start, end),
        None => fail!("boot", "kind=no_memory ranges={}", machine.memory_count),
    }
    for word in machine.args().unknown() {
        fail!(
            "boot",
            "kind=unknown_word word={}",
            Escaped(word.as_bytes())
        );
    }
    machine
}

impl Machine {
    fn copy_cmdline(&mut self, address: u64) {
        let room = MAPPED_END.saturating_sub(address).min(CMDLINE_MAX as u64) as usize;
        let Some(bytes) = readable(address, room) else {
            return;
        };
        let Some(len) = bytes.iter().position(|byte| *byte == 0) else {
            fail!("boot", "kind=cmdline_too_long bytes_max={room}");
            return;
        };
        if core::str::from_utf8(&bytes[..len]).is_err() {
            fail!("boot", "kind=cmdline_not_utf8");
            return;
        }
        self.cmdline[..len].copy_from_slice(&bytes[..len]);
        self.cmdline_len = len;
    }
}

fn copy_ranges(
    address: u64,
    count: u32,
    size: usize,
    parse: fn(&[u8]) -> Option<Range>,
    into: &mut [Range],
) -> usize {
    let count = into.len().min(count as usize);
    let Some(bytes) = readable(address, count * size) else {
        return 0;
    };
    let parsed = bytes.chunks_exact(size).filter_map(parse);
    into.iter_mut()
        .zip(parsed)
        .map(|(to, range)| *to = range)
        .count()
}
