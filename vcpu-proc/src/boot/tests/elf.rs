//! ELF kernels by the PVH and the Linux protocol.

use proptest::prelude::*;

use super::super::fixtures::{
    self, Segment, bytes, elf32, elf64, load, load_with, long, text, word,
};
use super::super::{BootError, Entry, KernelFormat, layout};

const TEXT: u64 = 0x10_0000;

fn pvh_kernel() -> Vec<u8> {
    elf64(
        TEXT,
        &[Segment::load(TEXT, b"code"), Segment::pvh_note(0x10_0002)],
    )
}

#[test]
fn a_kernel_with_a_pvh_note_is_entered_there_with_its_start_info() {
    let (loaded, memory) = load_with(&pvh_kernel(), Some(&[7; 5000]), "a=b", 64 << 20).unwrap();
    assert_eq!(loaded.format, KernelFormat::ElfPvh);
    assert_eq!(
        loaded.entry,
        Entry::Pvh32 {
            rip: 0x10_0002,
            rbx: 0x6000
        }
    );
    assert_eq!(bytes(&memory, TEXT, 4), b"code");
    let info = layout::PVH_START_INFO;
    assert_eq!(
        (word(&memory, info), word(&memory, info + 4)),
        (0x336e_c578, 1)
    );
    assert_eq!(text(&memory, long(&memory, info + 24)), "a=b");
    assert_eq!(long(&memory, info + 32), fixtures::RSDP.0);
    assert_eq!(word(&memory, info + 12), 1, "one module");
    let module = long(&memory, info + 16);
    assert_eq!(long(&memory, module + 8), 5000);
    let initrd = long(&memory, module);
    assert_eq!(bytes(&memory, initrd, 5000), [7; 5000]);
    assert_eq!(
        initrd,
        (64 << 20) - 0x2000,
        "as high as possible, page aligned"
    );
    let map = long(&memory, info + 40);
    let entries = layout::memory_map(64 << 20).len();
    assert_eq!(usize::try_from(word(&memory, info + 48)), Ok(entries));
    assert_eq!((long(&memory, map), word(&memory, map + 16)), (0, 1));
}

#[test]
fn a_kernel_without_a_note_is_entered_by_the_linux_protocol() {
    let (loaded, memory) = load(&elf64(TEXT + 2, &[Segment::load(TEXT, b"code")])).unwrap();
    assert_eq!(loaded.format, KernelFormat::ElfLinux);
    assert_eq!(
        loaded.entry,
        Entry::Linux64 {
            rip: TEXT + 2,
            rsi: layout::ZERO_PAGE
        }
    );
    let page = layout::ZERO_PAGE;
    assert_eq!(long(&memory, page + 0x70), fixtures::RSDP.0);
    assert_eq!(word(&memory, page + 0x202), 0x5372_6448);
    assert_eq!(
        text(&memory, word(&memory, page + 0x228).into()),
        "console=ttyS0"
    );
    assert_eq!(
        bytes(&memory, page + 0x1e8, 1),
        [5],
        "e820 entries of a small guest"
    );
    assert_eq!(
        long(&memory, page + 0x2d0 + 3 * 20),
        0x10_0000,
        "high memory"
    );
    assert_eq!(bytes(&memory, page + 0x1ef, 1), [0], "sentinel");
}

#[test]
fn the_identity_map_reaches_its_last_page() {
    let (_, memory) = load(&elf64(TEXT, &[Segment::load(TEXT, b"code")])).unwrap();
    let walk = |address: u64| {
        let mut table = layout::PAGE_TABLES;
        for shift in [39, 30] {
            let slot = long(&memory, table + (address >> shift & 511) * 8);
            assert_eq!(slot & 1, 1, "present");
            table = slot & !0xfff;
        }
        long(&memory, table + (address >> 21 & 511) * 8)
    };
    assert_eq!(walk(0), 0x83);
    assert_eq!(walk(0xffff_f000), 0xffe0_0083);
}

#[test]
fn a_virtual_entry_of_the_higher_half_is_translated() {
    let segment = Segment {
        virtual_address: 0xffff_ffff_8010_0000,
        ..Segment::load(TEXT, b"code")
    };
    let (loaded, _) = load(&elf64(0xffff_ffff_8010_0003, &[segment])).unwrap();
    assert_eq!(loaded.entry.rip(), TEXT + 3);
}

#[test]
fn memory_beyond_the_file_bytes_is_left_zero() {
    let segment = Segment {
        memory_bytes: 0x4000,
        ..Segment::load(TEXT, b"code")
    };
    let (_, memory) = load(&elf64(TEXT, &[segment, Segment::load(TEXT + 0x4000, b"x")])).unwrap();
    assert!(
        bytes(&memory, TEXT + 4, 0x3ffc)
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn a_segment_outside_of_memory_is_refused_with_its_addresses() {
    let kernel = elf64(1 << 30, &[Segment::load(1 << 30, b"code")]);
    let error = load(&kernel).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::OutsideMemory {
                start: 0x4000_0000,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("0x40000000"), "{error}");
}

#[test]
fn a_segment_over_the_acpi_tables_is_refused() {
    let error = load(&elf64(0xe_0000, &[Segment::load(0xe_0000, b"code")])).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

#[test]
fn elf_headers_on_the_page_below_1_mib_are_loaded() {
    let segments = [
        Segment::load(0xf_f000, b"headers"),
        Segment::load(TEXT, b"code"),
    ];
    let (_, memory) = load(&elf64(TEXT, &segments)).unwrap();
    assert_eq!(bytes(&memory, 0xf_f000, 7), b"headers");
}

#[test]
fn a_segment_over_the_zero_page_is_refused() {
    let error = load(&elf64(0x7000, &[Segment::load(0x7000, b"code")])).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

#[test]
fn overlapping_segments_are_refused() {
    let kernel = elf64(
        TEXT,
        &[
            Segment::load(TEXT, b"code"),
            Segment::load(TEXT + 3, b"data"),
        ],
    );
    let error = load(&kernel).unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

#[test]
fn a_segment_that_wraps_around_is_refused() {
    let segment = Segment {
        memory_bytes: u64::MAX,
        ..Segment::load(TEXT, b"code")
    };
    let error = load(&elf64(TEXT, &[segment])).unwrap_err();
    assert!(matches!(error, BootError::OutsideMemory { .. }), "{error}");
}

#[test]
fn a_32_bit_kernel_is_entered_through_its_pvh_note_only() {
    let note = Segment::pvh_note(0x10_0001);
    let (loaded, _) = load(&elf32(0x10_0000, &[Segment::load(TEXT, b"code"), note])).unwrap();
    assert_eq!(loaded.entry.rip(), 0x10_0001);
    let error = load(&elf32(0x10_0000, &[Segment::load(TEXT, b"code")])).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("an ELF 32-bit executable for x86 with neither"),
        "{error}"
    );
}

#[test]
fn a_position_independent_program_is_no_linux_kernel() {
    let mut kernel = elf64(TEXT, &[Segment::load(TEXT, b"code")]);
    kernel[16] = 3;
    let error = load(&kernel).unwrap_err().to_string();
    assert!(
        error.contains("position-independent executable for x86-64"),
        "{error}"
    );
}

#[test]
fn an_entry_outside_of_every_segment_is_refused() {
    let error = load(&elf64(0x20_0000, &[Segment::load(TEXT, b"code")])).unwrap_err();
    assert!(error.to_string().contains("e_entry is 0x200000"), "{error}");
}

#[test]
fn an_initrd_larger_than_memory_is_refused_with_both_sizes() {
    let initrd = vec![1; 17 << 20];
    let error = load_with(&pvh_kernel(), Some(&initrd), "", 16 << 20).unwrap_err();
    let BootError::InitrdTooLarge {
        bytes, available, ..
    } = error
    else {
        panic!("{error}")
    };
    assert_eq!((bytes, available), (17 << 20, (15 << 20) - 0x1000));
}

#[test]
fn an_empty_initrd_is_refused() {
    let error = load_with(&pvh_kernel(), Some(&[]), "", 16 << 20).unwrap_err();
    assert!(matches!(error, BootError::InitrdEmpty), "{error}");
}

#[test]
fn a_command_line_that_linux_would_cut_is_refused() {
    let cmdline = "x".repeat(2048);
    let error = load_with(&pvh_kernel(), None, &cmdline, 16 << 20).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::CommandLineTooLong {
                bytes: 2048,
                limit: 2047
            }
        ),
        "{error}"
    );
}

#[test]
fn a_nul_in_the_command_line_is_refused() {
    let error = load_with(&pvh_kernel(), None, "a\0b", 16 << 20).unwrap_err();
    assert!(
        matches!(error, BootError::CommandLineNul { position: 1 }),
        "{error}"
    );
}

proptest! {
    #[test]
    fn a_truncated_elf_is_an_error(length in 0usize..200) {
        let kernel = pvh_kernel();
        prop_assert!(length < kernel.len());
        prop_assert!(load(&kernel[..length]).is_err());
    }

    #[test]
    fn damaged_elf_headers_never_panic(damage in prop::collection::vec((0usize..200, any::<u8>()), 1..6)) {
        let mut kernel = pvh_kernel();
        for (at, value) in damage {
            kernel[at] = value;
        }
        let _ = load(&kernel);
    }
}
