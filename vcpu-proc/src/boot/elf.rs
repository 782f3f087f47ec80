//! ELF kernels: headers parsed once into checked types, segments placed at physical addresses.
//!
//! Both classes are read, because Multiboot kernels are mostly 32-bit. A file is copied segment by
//! segment straight into guest memory; a stream (the payload of a bzImage) goes through
//! [`super::elf_stream`], which uses the same checks. Memory beyond a segment's file bytes is not
//! touched: guest memory is zero already.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::error::BootError;
use super::guest::Guest;
use super::recognise;
use super::source::Source;

/// The first bytes of every ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";
/// Bytes that hold the header of either class.
pub(super) const HEADER_BYTES: usize = size_of::<RawHeader64>();

const CLASS_64: u8 = 2;
const DATA_LITTLE: u8 = 1;
const KIND_EXECUTABLE: u16 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_INTERPRETER: u32 = 3;
const SEGMENT_NOTE: u32 = 4;
/// Kernels have fewer than ten; this bounds the work for a hostile file.
const SEGMENTS_MAX: u16 = 64;

/// The two sizes of ELF structures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    Elf32,
    Elf64,
}

/// The file header, checked to be an x86 executable.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) class: Class,
    /// False for object files and for what expects to be relocated before it runs.
    pub(super) fixed: bool,
    entry: u64,
    table_offset: u64,
    table_entries: u16,
}

/// One program header.
#[derive(Debug, Clone)]
pub(super) struct Segment {
    kind: u32,
    pub(super) offset: u64,
    virtual_address: u64,
    pub(super) address: u64,
    pub(super) file_bytes: u64,
    pub(super) memory_bytes: u64,
    alignment: u64,
}

/// A checked ELF kernel whose segments are not loaded yet.
#[derive(Debug, Clone)]
pub(super) struct Elf {
    pub(super) header: Header,
    segments: Vec<Segment>,
}

impl Header {
    /// Parses the first bytes of a file, whose magic the caller has seen.
    pub(super) fn parse(head: &[u8]) -> Result<Self, BootError> {
        let (class, data) = (head.get(4), head.get(5));
        if data != Some(&DATA_LITTLE) {
            return Err(not_a_kernel(head));
        }
        let (header, size, machine, wanted) = match class {
            Some(1) => {
                let raw = prefix::<RawHeader32>(head)?;
                let header = Self {
                    class: Class::Elf32,
                    fixed: raw.kind.get() == KIND_EXECUTABLE,
                    entry: raw.entry.get().into(),
                    table_offset: raw.table_offset.get().into(),
                    table_entries: raw.table_entries.get(),
                };
                (
                    header,
                    raw.table_entry_bytes.get(),
                    raw.machine.get(),
                    MACHINE_386,
                )
            }
            Some(&CLASS_64) => {
                let raw = prefix::<RawHeader64>(head)?;
                let header = Self {
                    class: Class::Elf64,
                    fixed: raw.kind.get() == KIND_EXECUTABLE,
                    entry: raw.entry.get(),
                    table_offset: raw.table_offset.get(),
                    table_entries: raw.table_entries.get(),
                };
                (
                    header,
                    raw.table_entry_bytes.get(),
                    raw.machine.get(),
                    MACHINE_X86_64,
                )
            }
            _ => return Err(not_a_kernel(head)),
        };
        if machine != wanted {
            return Err(not_a_kernel(head));
        }
        if usize::from(size) != header.class.segment_bytes() {
            let expected = format!("{}", header.class.segment_bytes());
            return Err(BootError::field("ELF header: e_phentsize", size, expected));
        }
        if !(1..=SEGMENTS_MAX).contains(&header.table_entries) {
            let expected = format!("1 to {SEGMENTS_MAX} program headers");
            return Err(BootError::field(
                "ELF header: e_phnum",
                header.table_entries,
                expected,
            ));
        }
        Ok(header)
    }

    /// Where the program headers are in the file: offset and length.
    pub(super) fn table(&self) -> (u64, usize) {
        (
            self.table_offset,
            usize::from(self.table_entries) * self.class.segment_bytes(),
        )
    }
}

impl Class {
    fn segment_bytes(self) -> usize {
        match self {
            Self::Elf32 => size_of::<RawSegment32>(),
            Self::Elf64 => size_of::<RawSegment64>(),
        }
    }
}

impl Elf {
    /// Parses the program headers in `table` and checks each loadable segment in itself.
    pub(super) fn parse(header: Header, table: &[u8]) -> Result<Self, BootError> {
        let parse = match header.class {
            Class::Elf32 => |bytes: &[u8]| prefix::<RawSegment32>(bytes).map(Segment::from),
            Class::Elf64 => |bytes: &[u8]| prefix::<RawSegment64>(bytes).map(Segment::from),
        };
        let segments = table
            .chunks_exact(header.class.segment_bytes())
            .map(parse)
            .collect::<Result<Vec<_>, _>>()?;
        let elf = Self { header, segments };
        for segment in elf.load_segments() {
            if segment.file_bytes > segment.memory_bytes {
                let expected = format!("at most p_memsz, {:#x}", segment.memory_bytes);
                return Err(BootError::field(
                    "ELF segment: p_filesz",
                    segment.file_bytes,
                    expected,
                ));
            }
        }
        if elf.load_segments().next().is_none() {
            return Err(BootError::field(
                "ELF header: loadable segments",
                0u8,
                "at least one",
            ));
        }
        if elf
            .segments
            .iter()
            .any(|segment| segment.kind == SEGMENT_INTERPRETER)
        {
            return Err(BootError::NotAKernel {
                recognised: "a program for an operating system (ELF with an interpreter)".into(),
            });
        }
        Ok(elf)
    }

    /// Parses the header in `head`, the first bytes of the file, which begin with the ELF magic,
    /// and reads and parses the program headers.
    pub(super) fn read(source: &Source<'_>, head: &[u8]) -> Result<Self, BootError> {
        source.check("the ELF header", 0, HEADER_BYTES as u64)?;
        let header = Header::parse(head)?;
        let (offset, bytes) = header.table();
        let table = source.read_exact("the ELF program header table", offset, bytes)?;
        Self::parse(header, &table)
    }

    /// The segments that occupy memory.
    pub(super) fn load_segments(&self) -> impl Iterator<Item = &Segment> {
        self.segments
            .iter()
            .filter(|segment| segment.kind == SEGMENT_LOAD && segment.memory_bytes > 0)
    }

    /// Claims the memory of every segment.
    pub(super) fn claim(&self, guest: &mut Guest<'_>) -> Result<(), BootError> {
        for (index, segment) in self.load_segments().enumerate() {
            guest.claim(
                format!("ELF segment {index} (p_paddr, p_memsz)"),
                segment.address,
                segment.memory_bytes,
            )?;
        }
        Ok(())
    }

    /// Claims the memory of every segment and copies the file's bytes there.
    pub(super) fn load(&self, source: &Source<'_>, guest: &mut Guest<'_>) -> Result<(), BootError> {
        for segment in self.load_segments() {
            source.check(
                "an ELF segment (p_offset, p_filesz)",
                segment.offset,
                segment.file_bytes,
            )?;
        }
        self.claim(guest)?;
        for segment in self
            .load_segments()
            .filter(|segment| segment.file_bytes > 0)
        {
            guest.read_from(
                source,
                "an ELF segment (p_offset, p_filesz)",
                segment.offset,
                segment.address,
                segment.file_bytes,
            )?;
        }
        Ok(())
    }

    /// Guest-physical address of the first instruction. `e_entry` is taken as physical where a
    /// segment is placed there, otherwise as virtual, which kernels of the higher half use.
    pub(super) fn entry(&self) -> Result<u64, BootError> {
        let entry = self.header.entry;
        let within = |start: u64, segment: &Segment| {
            entry
                .checked_sub(start)
                .filter(|offset| *offset < segment.memory_bytes)
        };
        let physical = self
            .load_segments()
            .any(|segment| within(segment.address, segment).is_some());
        if physical {
            return Ok(entry);
        }
        self.load_segments()
            .find_map(|segment| {
                let offset = within(segment.virtual_address, segment)?;
                segment.address.checked_add(offset)
            })
            .ok_or_else(|| {
                BootError::field("ELF header: e_entry", entry, "an address in a segment")
            })
    }

    /// The PVH entry point, if a note of the file names one.
    pub(super) fn pvh_entry(&self, source: &Source<'_>) -> Result<Option<u32>, BootError> {
        for segment in self
            .segments
            .iter()
            .filter(|segment| segment.kind == SEGMENT_NOTE)
        {
            let bytes = usize::try_from(segment.file_bytes)
                .ok()
                .filter(|bytes| *bytes <= NOTES_MAX);
            let Some(bytes) = bytes else {
                let expected = format!("at most {NOTES_MAX:#x} bytes of notes");
                return Err(BootError::field(
                    "ELF notes: p_filesz",
                    segment.file_bytes,
                    expected,
                ));
            };
            let notes = source.read_exact("the ELF notes", segment.offset, bytes)?;
            if let Some(entry) = pvh_note(&notes, segment.alignment)? {
                let inside = self.load_segments().any(|segment| {
                    u64::from(entry)
                        .checked_sub(segment.address)
                        .is_some_and(|offset| offset < segment.memory_bytes)
                });
                if !inside {
                    let expected = "an address in a segment";
                    return Err(BootError::field("PVH note: entry", entry, expected));
                }
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }
}

const NOTES_MAX: usize = 1 << 20;
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Finds the note `XEN_ELFNOTE_PHYS32_ENTRY` and returns its address.
fn pvh_note(mut notes: &[u8], alignment: u64) -> Result<Option<u32>, BootError> {
    // Notes are padded to 4 bytes; some linkers write 8-byte alignment and mean it.
    let align = if alignment == 8 { 8 } else { 4 };
    while let Ok((head, rest)) = RawNote::ref_from_prefix(notes) {
        let (Ok(name_bytes), Ok(value_bytes)) = (
            usize::try_from(head.name_bytes.get()),
            usize::try_from(head.value_bytes.get()),
        ) else {
            break;
        };
        // Offsets count from the note's own header, which has 12 bytes.
        let name_end = name_bytes.saturating_add(size_of::<RawNote>());
        let value_start = name_end.saturating_add(align - 1) / align * align;
        let value_end = value_start.saturating_add(value_bytes);
        let name = rest.get(..name_bytes);
        let value = notes.get(value_start..value_end);
        if head.kind.get() == NOTE_PHYS32_ENTRY && name == Some(b"Xen\0") {
            let entry = match value {
                Some(value) if value.len() == 4 => U32::read_from_bytes(value)
                    .ok()
                    .map(|entry| u64::from(entry.get())),
                Some(value) => U64::read_from_bytes(value).ok().map(U64::get),
                None => None,
            };
            let Some(entry) = entry else {
                let length = value_bytes as u64;
                return Err(BootError::field("PVH note: length", length, "4 or 8 bytes"));
            };
            return u32::try_from(entry)
                .map(Some)
                .map_err(|_| BootError::field("PVH note: entry", entry, "a 32-bit address"));
        }
        let next = value_end.saturating_add(align - 1) / align * align;
        match notes.get(next..) {
            Some(rest) => notes = rest,
            None => break,
        }
    }
    Ok(None)
}

fn not_a_kernel(head: &[u8]) -> BootError {
    BootError::NotAKernel {
        recognised: recognise::contents(head, head.len() as u64),
    }
}

fn prefix<T: FromBytes + KnownLayout + Immutable>(bytes: &[u8]) -> Result<T, BootError> {
    T::read_from_prefix(bytes)
        .map(|(value, _)| value)
        .map_err(|_| {
            let expected = format!("at least {}", size_of::<T>());
            BootError::field("ELF header: bytes", bytes.len() as u64, expected)
        })
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader64 {
    identification: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U64,
    table_offset: U64,
    sections_offset: U64,
    flags: U32,
    header_bytes: U16,
    table_entry_bytes: U16,
    table_entries: U16,
    section_entry_bytes: U16,
    section_entries: U16,
    section_names: U16,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawHeader32 {
    identification: [u8; 16],
    kind: U16,
    machine: U16,
    version: U32,
    entry: U32,
    table_offset: U32,
    sections_offset: U32,
    flags: U32,
    header_bytes: U16,
    table_entry_bytes: U16,
    table_entries: U16,
    section_entry_bytes: U16,
    section_entries: U16,
    section_names: U16,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSegment64 {
    kind: U32,
    flags: U32,
    offset: U64,
    virtual_address: U64,
    address: U64,
    file_bytes: U64,
    memory_bytes: U64,
    alignment: U64,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawSegment32 {
    kind: U32,
    offset: U32,
    virtual_address: U32,
    address: U32,
    file_bytes: U32,
    memory_bytes: U32,
    flags: U32,
    alignment: U32,
}

#[derive(Debug, FromBytes, KnownLayout, Immutable)]
#[repr(C)]
struct RawNote {
    name_bytes: U32,
    value_bytes: U32,
    kind: U32,
}

const _: () = assert!(size_of::<RawHeader64>() == 64 && size_of::<RawSegment64>() == 56);
const _: () = assert!(size_of::<RawHeader32>() == 52 && size_of::<RawSegment32>() == 32);

impl From<RawSegment64> for Segment {
    fn from(raw: RawSegment64) -> Self {
        Self {
            kind: raw.kind.get(),
            offset: raw.offset.get(),
            virtual_address: raw.virtual_address.get(),
            address: raw.address.get(),
            file_bytes: raw.file_bytes.get(),
            memory_bytes: raw.memory_bytes.get(),
            alignment: raw.alignment.get(),
        }
    }
}

impl From<RawSegment32> for Segment {
    fn from(raw: RawSegment32) -> Self {
        Self {
            kind: raw.kind.get(),
            offset: raw.offset.get().into(),
            virtual_address: raw.virtual_address.get().into(),
            address: raw.address.get().into(),
            file_bytes: raw.file_bytes.get().into(),
            memory_bytes: raw.memory_bytes.get().into(),
            alignment: raw.alignment.get().into(),
        }
    }
}
