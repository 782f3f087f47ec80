//! Multiboot 1 and 2 kernels: headers honoured or refused, and the information that they get.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::super::fixtures::{
    self, Segment, bytes, elf32, elf64, file, load, load_with, long, text, word,
};
use super::super::{BootError, BootParams, Entry, KernelFormat, SymbolSource, layout};

const TEXT: u64 = 0x10_0000;
const INFO: u64 = layout::MULTIBOOT_INFO;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A Multiboot 1 header with `flags` and the fields behind the checksum.
fn header1(flags: u32, fields: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    words(&[&[magic, flags, checksum], fields].concat())
}

/// A Multiboot 2 header with `tags`, each of type, flags and body; the end tag is added.
fn header2(tags: &[(u16, u16, &[u32])]) -> Vec<u8> {
    let mut body = Vec::new();
    for (kind, flags, fields) in tags.iter().chain(&[(0, 0, &[][..])]) {
        body.extend(kind.to_le_bytes());
        body.extend(flags.to_le_bytes());
        body.extend(u32::try_from(8 + fields.len() * 4).unwrap().to_le_bytes());
        body.extend(words(fields));
        body.resize(body.len().next_multiple_of(8), 0);
    }
    let length = u32::try_from(16 + body.len()).unwrap();
    let magic = 0xe852_50d6u32;
    let mut header = words(&[
        magic,
        0,
        length,
        0u32.wrapping_sub(magic).wrapping_sub(length),
    ]);
    header.extend(body);
    header
}

/// A 32-bit ELF kernel with `header` at the start of its text, at a multiple of 8 in the file.
fn kernel32(header: &[u8]) -> Vec<u8> {
    let mut text = vec![0; 4]; // The headers of the file take 84 bytes.
    text.extend(header);
    text.extend(b"code");
    elf32(0x10_0000, &[Segment::load(TEXT, &text)])
}

#[test]
fn a_multiboot_1_kernel_gets_memory_map_command_line_and_module() {
    let kernel = kernel32(&header1(0b11, &[]));
    let (loaded, memory) = load_with(&kernel, Some(b"module"), "a=b", 64 << 20).unwrap();
    assert_eq!(loaded.format, KernelFormat::Multiboot1);
    assert_eq!(loaded.symbols, SymbolSource::KernelFile);
    let entry = Entry::Multiboot {
        rip: 0x10_0000,
        rax: 0x2bad_b002,
        rbx: 0x1_0000,
    };
    assert_eq!(loaded.entry, entry);
    assert_eq!(
        word(&memory, INFO),
        0b10_0100_1101,
        "memory, command line, modules, map, name"
    );
    assert_eq!(
        (word(&memory, INFO + 4), word(&memory, INFO + 8)),
        (639, 63 << 10)
    );
    assert_eq!(text(&memory, word(&memory, INFO + 16).into()), "a=b");
    assert_eq!(word(&memory, INFO + 20), 1, "one module");
    let module = u64::from(word(&memory, INFO + 24));
    let (start, end) = (word(&memory, module), word(&memory, module + 4));
    assert_eq!(
        (start, end),
        (0x10_1000, 0x10_1006),
        "on the page behind the kernel"
    );
    assert_eq!(bytes(&memory, start.into(), 6), b"module");
    assert_eq!(text(&memory, word(&memory, module + 8).into()), "");
    let (length, map) = (
        word(&memory, INFO + 44),
        u64::from(word(&memory, INFO + 48)),
    );
    assert_eq!(length, 5 * 24);
    assert_eq!(word(&memory, map), 20);
    assert_eq!(
        long(&memory, map + 3 * 24 + 4),
        TEXT,
        "the fourth range is high memory"
    );
    assert_eq!(word(&memory, map + 3 * 24 + 20), 1);
    assert_eq!(text(&memory, word(&memory, INFO + 64).into()), "Bulkhead");
}

#[test]
fn a_64_bit_elf_with_a_multiboot_header_starts_in_32_bit_mode() {
    let mut text = header1(0, &[]);
    text.extend(b"code");
    let (loaded, _) = load(&elf64(TEXT + 12, &[Segment::load(TEXT, &text)])).unwrap();
    let entry = Entry::Multiboot {
        rip: 0x10_000c,
        rax: 0x2bad_b002,
        rbx: 0x1_0000,
    };
    assert_eq!(loaded.entry, entry);
}

#[test]
fn a_pvh_note_is_preferred_to_a_multiboot_header() {
    let text = header1(0, &[]);
    let segments = [Segment::load(TEXT, &text), Segment::pvh_note(0x10_0000)];
    let (loaded, _) = load(&elf64(TEXT, &segments)).unwrap();
    assert_eq!(loaded.format, KernelFormat::ElfPvh);
}

#[test]
fn a_flat_kernel_is_placed_by_the_addresses_of_its_header() {
    let mut kernel = vec![0xcc; 32];
    // The header is at 32 in the file and at 0x100010 in memory: the file is used from byte 16 on.
    kernel.extend(header1(
        1 << 16,
        &[0x10_0010, 0x10_0000, 0x10_0040, 0x10_2000, 0x10_0030],
    ));
    kernel.resize(80, 0x90);
    kernel.extend(b"not loaded");
    let (loaded, memory) = load(&kernel).unwrap();
    assert_eq!(loaded.symbols, SymbolSource::None);
    assert_eq!(loaded.entry.rip(), 0x10_0030);
    assert_eq!(bytes(&memory, TEXT, 16), [0xcc; 16]);
    assert_eq!(word(&memory, TEXT + 0x10), 0x1bad_b002);
    assert_eq!(bytes(&memory, TEXT + 0x40, 10), [0; 10], "bss is zero");
}

#[test]
fn addresses_of_a_flat_kernel_that_contradict_each_other_are_refused() {
    let cases = [
        (
            [0x10_0000, 0x10_0010, 0, 0, 0x10_0000],
            "load_addr is 0x100010",
        ),
        (
            [0x10_1000, 0x10_0000, 0, 0, 0x10_0000],
            "load_addr is 0x100000",
        ),
        (
            [0x10_0000, 0x10_0000, 0xf_0000, 0, 0x10_0000],
            "load_end_addr is 0xf0000",
        ),
        (
            [0x10_0000, 0x10_0000, 0, 0x10_0001, 0x10_0000],
            "bss_end_addr is 0x100001",
        ),
    ];
    for (fields, expected) in cases {
        let error = load(&header1(1 << 16, &fields)).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let beyond = header1(1 << 16, &[0x10_0000, 0x10_0000, 0x10_1000, 0, 0x10_0000]);
    assert!(matches!(
        load(&beyond).unwrap_err(),
        BootError::Truncated { .. }
    ));
}

#[test]
fn a_flat_kernel_without_addresses_is_refused() {
    let error = load(&header1(0, &[])).unwrap_err().to_string();
    assert!(error.contains("address fields"), "{error}");
}

#[test]
fn a_demand_for_a_video_mode_is_refused() {
    let error = load(&kernel32(&header1(0b100, &[])))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("flags is 0x4, expected bit 2 clear"),
        "{error}"
    );
}

#[test]
fn an_unknown_mandatory_flag_is_refused_and_an_optional_one_is_not() {
    assert!(load(&kernel32(&header1(1 << 5, &[]))).is_err());
    assert!(load(&kernel32(&header1(1 << 20, &[]))).is_ok());
}

#[test]
fn a_header_with_a_wrong_checksum_is_none() {
    let mut header = header1(0, &[]);
    header[8] ^= 1;
    let error = load(&kernel32(&header)).unwrap_err().to_string();
    assert!(error.contains("nor a Multiboot header"), "{error}");
}

#[test]
fn a_header_behind_the_first_8_kib_is_none() {
    let found = |at: usize| {
        let mut text = vec![0; at - 84];
        text.extend(header1(0, &[]));
        load(&elf32(0x10_0000, &[Segment::load(TEXT, &text)])).is_ok()
    };
    assert!(found(8192 - 12));
    assert!(!found(8192 - 8));
}

/// The body of the information tag of type `kind`.
fn information_tag(memory: &vm_memory::GuestMemoryMmap, kind: u32) -> Option<Vec<u8>> {
    let total = u64::from(word(memory, INFO));
    let mut at = 8;
    while at < total {
        let (found, size) = (
            word(memory, INFO + at),
            u64::from(word(memory, INFO + at + 4)),
        );
        if found == kind {
            let count = usize::try_from(size - 8).unwrap();
            return Some(bytes(memory, INFO + at + 8, count));
        }
        assert!(found != 0, "the end tag comes too early");
        at += size.next_multiple_of(8);
    }
    None
}

#[test]
fn a_multiboot_2_kernel_gets_its_information_tags() {
    let kernel = file(&kernel32(&header2(&[
        (1, 0, &[1, 2, 3, 4, 6, 15]),
        (6, 0, &[]),
    ])));
    let memory = fixtures::memory(64 << 20);
    let machine = crate::acpi::MachineDescription {
        vcpus: 1,
        virtio_slots: &[],
    };
    let rsdp = crate::acpi::write_tables(&memory, &machine).unwrap();
    let params = BootParams {
        kernel: &kernel,
        initrd: Some(&file(b"module")),
        cmdline: "a=b",
        memory_bytes: 64 << 20,
        rsdp,
    };
    let loaded = super::super::load(&memory, &params).unwrap();
    assert_eq!(loaded.format, KernelFormat::Multiboot2);
    let entry = Entry::Multiboot {
        rip: 0x10_0000,
        rax: 0x36d7_6289,
        rbx: 0x1_0000,
    };
    assert_eq!(loaded.entry, entry);
    assert_eq!(information_tag(&memory, 1).unwrap(), b"a=b\0");
    assert_eq!(information_tag(&memory, 2).unwrap(), b"Bulkhead\0");
    let module = [&words(&[0x10_1000, 0x10_1006])[..], b"\0"].concat();
    assert_eq!(information_tag(&memory, 3).unwrap(), module);
    assert_eq!(
        information_tag(&memory, 4).unwrap(),
        words(&[639, 63 << 10])
    );
    let map = information_tag(&memory, 6).unwrap();
    assert_eq!(map[..8], words(&[24, 0]));
    assert_eq!(map.len(), 8 + 5 * 24);
    let mut root = vec![0; 36];
    memory
        .read_slice(&mut root, GuestAddress(0xe_0000))
        .unwrap();
    assert_eq!(information_tag(&memory, 15).unwrap(), root);
    assert!(root.starts_with(b"RSD PTR "));
}

#[test]
fn addresses_and_entry_of_a_multiboot_2_header_are_honoured() {
    let tags: [(u16, u16, &[u32]); 2] = [
        (2, 0, &[0x20_0000, 0x20_0000, 0, 0x20_1000]),
        (3, 0, &[0x20_0020]),
    ];
    let (loaded, memory) = load(&header2(&tags)).unwrap();
    assert_eq!(loaded.entry.rip(), 0x20_0020);
    assert_eq!(word(&memory, 0x20_0000), 0xe852_50d6);
}

#[test]
fn a_required_framebuffer_is_refused_and_an_optional_one_is_not() {
    let framebuffer = |flags| load(&kernel32(&header2(&[(5, flags, &[1024, 768, 32])])));
    let error = framebuffer(0).unwrap_err().to_string();
    assert!(error.contains("framebuffer"), "{error}");
    assert!(framebuffer(1).is_ok());
}

#[test]
fn a_required_console_and_unknown_requests_are_refused() {
    assert!(load(&kernel32(&header2(&[(4, 0, &[1])]))).is_err());
    assert!(load(&kernel32(&header2(&[(4, 0, &[2])]))).is_ok());
    let error = load(&kernel32(&header2(&[(1, 0, &[8])])))
        .unwrap_err()
        .to_string();
    assert!(error.contains("type is 0x8"), "{error}");
    assert!(load(&kernel32(&header2(&[(1, 1, &[8])]))).is_ok());
    assert!(load(&kernel32(&header2(&[(77, 0, &[])]))).is_err());
    assert!(load(&kernel32(&header2(&[(77, 1, &[])]))).is_ok());
}

#[test]
fn a_multiboot_2_header_for_mips_is_refused() {
    let mut header = header2(&[]);
    header[4] = 4;
    header[12] = header[12].wrapping_sub(4);
    let error = load(&kernel32(&header)).unwrap_err().to_string();
    assert!(error.contains("architecture is 0x4, expected 0"), "{error}");
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(
        second in any::<bool>(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let fields = [0x10_0000, 0x10_0000, 0x10_0040, 0x10_2000, 0x10_0030];
        let mut kernel = if second {
            header2(&[(2, 0, &fields[..4]), (1, 0, &[1, 2, 3]), (3, 0, &fields[4..])])
        } else {
            header1(1 << 16 | 3, &fields)
        };
        let fixed = if second { 16 } else { 12 };
        kernel.resize(kernel.len() + 64, 0x90);
        for (at, value) in damage {
            let at = fixed + at.index(kernel.len() - fixed);
            kernel[at] = value;
        }
        kernel.truncate(cut.index(kernel.len()) + 1);
        let _ = load(&kernel);
    }
}
