//! bzImages: each compression as the kernel's build makes it, damage of every kind, and the way
//! back to the guest's own decompressor.

use proptest::prelude::*;

use super::super::fixtures::{bytes, bzimage, file, load, load_with, long, word};
use super::super::{BootError, Compression, Entry, KernelFormat, PayloadError, layout};

const KERNEL: &[u8] = include_bytes!("data/kernel.elf");
const GZIP: &[u8] = include_bytes!("data/kernel.gz");
const XZ: &[u8] = include_bytes!("data/kernel.xz");
const TEXT: u64 = 0x100_0000;

const SAMPLES: [(&[u8], Compression); 7] = [
    (KERNEL, Compression::None),
    (GZIP, Compression::Gzip),
    (XZ, Compression::Xz),
    (include_bytes!("data/kernel.zst"), Compression::Zstd),
    (include_bytes!("data/kernel.lz4"), Compression::Lz4),
    (include_bytes!("data/kernel.bz2"), Compression::Bzip2),
    (include_bytes!("data/kernel.lzma"), Compression::Lzma),
];

#[test]
fn a_payload_of_every_compression_is_unpacked_by_the_host() {
    for (payload, compression) in SAMPLES {
        let (loaded, memory) = load(&bzimage(payload)).unwrap();
        assert!(
            loaded.fallback.is_none(),
            "{compression}: {:?}",
            loaded.fallback
        );
        assert_eq!(loaded.format, KernelFormat::BzImage { compression });
        let entry = Entry::Linux64 {
            rip: TEXT + 0x10,
            rsi: layout::ZERO_PAGE,
        };
        assert_eq!(loaded.entry, entry, "{compression}");
        let code = &KERNEL[0x1000..];
        assert!(bytes(&memory, TEXT, code.len()) == code, "{compression}");
    }
}

#[test]
fn the_zero_page_begins_with_the_header_of_the_image() {
    let (_, memory) = load(&bzimage(XZ)).unwrap();
    let page = layout::ZERO_PAGE;
    assert_eq!(word(&memory, page + 0x202), 0x5372_6448);
    assert_eq!(long(&memory, page + 0x258), TEXT, "pref_address");
    assert_eq!(
        bytes(&memory, page + 0x210, 2),
        [0xff, 0x01],
        "loader, and KASLR is off"
    );
    assert_eq!(word(&memory, page + 0x228), 0x2_0000, "command line");
}

#[test]
fn a_damaged_payload_is_left_to_the_guest_with_the_reason() {
    for (payload, compression) in SAMPLES {
        let mut payload = payload.to_vec();
        let middle = payload.len() / 2;
        if compression == Compression::None {
            payload.truncate(0x2000); // Only a missing part shows without a checksum.
        } else {
            payload[middle] ^= 0x55;
            payload[middle + 1] ^= 0xaa;
        }
        let (loaded, memory) = load(&bzimage(&payload)).unwrap();
        assert_eq!(
            loaded.format,
            KernelFormat::BzImageUnpackedByGuest,
            "{compression}"
        );
        let entry = Entry::Linux64 {
            rip: TEXT + 0x200,
            rsi: layout::ZERO_PAGE,
        };
        assert_eq!(loaded.entry, entry);
        assert_eq!(bytes(&memory, TEXT, 12), b"decompressor");
        let reason = loaded.fallback.unwrap().to_string();
        assert!(reason.contains(&compression.to_string()), "{reason}");
    }
}

#[test]
fn an_unknown_compression_is_left_to_the_guest() {
    let (loaded, memory) = load(&bzimage(b"\x89LZO kernel")).unwrap();
    assert!(matches!(
        loaded.fallback,
        Some(PayloadError::Unknown { .. })
    ));
    assert_eq!(bytes(&memory, TEXT + 0x400, 11), b"\x89LZO kernel");
}

#[test]
fn a_payload_that_does_not_unpack_to_its_size_is_left_to_the_guest() {
    let mut payload = XZ.to_vec();
    let last = payload.len() - 4;
    payload[last] ^= 1;
    let (loaded, _) = load(&bzimage(&payload)).unwrap();
    assert!(
        matches!(loaded.fallback, Some(PayloadError::Size { .. })),
        "{:?}",
        loaded.fallback
    );
}

#[test]
fn a_decompression_bomb_stops_at_its_stated_size() {
    let mut bomb = Vec::new();
    let zeros = vec![0; 1 << 20];
    let mut writer = flate2::write::GzEncoder::new(&mut bomb, flate2::Compression::fast());
    std::io::Write::write_all(&mut writer, KERNEL).unwrap();
    for _ in 0..64 {
        std::io::Write::write_all(&mut writer, &zeros).unwrap();
    }
    writer.finish().unwrap();
    let last = bomb.len() - 4;
    bomb[last..].copy_from_slice(&u32::try_from(KERNEL.len()).unwrap().to_le_bytes());
    let (loaded, _) = load(&bzimage(&bomb)).unwrap();
    let Some(PayloadError::Size { bytes, .. }) = loaded.fallback else {
        panic!("{loaded:?}")
    };
    assert!(bytes < KERNEL.len() as u64 + (64 << 10));
}

#[test]
fn lz4_kernels_larger_than_a_block_are_unpacked() {
    let mut kernel = KERNEL.to_vec();
    kernel.resize(20 << 20, 0xa5);
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    for block in kernel.chunks(8 << 20) {
        let block = lz4_flex::block::compress(block);
        payload.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
        payload.extend(block);
    }
    payload.extend(u32::try_from(kernel.len()).unwrap().to_le_bytes());
    let (loaded, _) = load(&bzimage(&payload)).unwrap();
    assert_eq!(
        loaded.format,
        KernelFormat::BzImage {
            compression: Compression::Lz4
        }
    );
}

#[test]
fn a_truncated_image_is_refused() {
    let image = bzimage(XZ);
    for length in [0x280, 1024, 1500, image.len() - 100] {
        let error = load(&image[..length]).unwrap_err();
        assert!(
            matches!(error, BootError::Truncated { .. }),
            "{length}: {error}"
        );
    }
}

#[test]
fn a_kernel_for_more_memory_than_there_is_is_refused() {
    let error = load_with(&bzimage(XZ), None, "", 16 << 20).unwrap_err();
    assert!(matches!(error, BootError::OutsideMemory { .. }), "{error}");
}

#[test]
fn an_old_boot_protocol_is_refused_with_its_version() {
    let mut image = bzimage(XZ);
    image[0x206] = 0x02;
    let error = load(&image).unwrap_err().to_string();
    assert!(
        error.contains("version is 0x202, expected 0x20a"),
        "{error}"
    );
}

#[test]
fn a_kernel_without_a_64_bit_entry_starts_in_protected_mode() {
    let mut image = bzimage(b"not compressed");
    image[0x236] = 0;
    let (loaded, _) = load(&image).unwrap();
    assert_eq!(
        loaded.entry,
        Entry::Linux32 {
            rip: 0x100_0000,
            rsi: 0x7000
        }
    );
}

#[test]
fn the_initrd_stays_below_the_limit_of_the_header() {
    let mut image = bzimage(XZ);
    image[0x22c..0x230].copy_from_slice(&0x1ff_ffffu32.to_le_bytes());
    let (_, memory) = load_with(&image, Some(b"initrd"), "", 64 << 20).unwrap();
    assert_eq!(word(&memory, layout::ZERO_PAGE + 0x218), 0x1ff_f000);
    assert_eq!(word(&memory, layout::ZERO_PAGE + 0x21c), 6);
}

#[test]
fn the_command_line_limit_comes_from_the_header() {
    let mut image = bzimage(XZ);
    image[0x238..0x23c].copy_from_slice(&255u32.to_le_bytes());
    let error = load_with(&image, None, &"x".repeat(256), 64 << 20).unwrap_err();
    assert!(
        matches!(
            error,
            BootError::CommandLineTooLong {
                bytes: 256,
                limit: 255
            }
        ),
        "{error}"
    );
}

/// A distribution's kernel, where the environment names one. Unpacking takes a second at most on an
/// idle machine; the bound leaves room for a busy one.
#[test]
fn a_stock_kernel_is_unpacked_by_the_host() {
    let Some(path) = std::env::var_os("BULKHEAD_TEST_STOCK_KERNEL") else {
        return;
    };
    let kernel = std::fs::read(path).unwrap();
    let started = std::time::Instant::now();
    let (loaded, memory) = load_with(&kernel, None, "console=ttyS0", 256 << 20).unwrap();
    assert!(loaded.fallback.is_none(), "{:?}", loaded.fallback);
    assert_eq!(loaded.entry.rip(), TEXT);
    assert_ne!(long(&memory, TEXT), 0);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
}

#[test]
fn nothing_that_is_no_kernel_is_taken_for_one() {
    let cases: [(&[u8], &str); 9] = [
        (b"", "an empty file"),
        (GZIP, "gzip-compressed data"),
        (b"QFI\xfb\0\0\0\x03", "a qcow2 image"),
        (b"#!/bin/sh\n", "a script"),
        (b"hello\n", "a text file"),
        (b"070701000", "a cpio archive"),
        (
            b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x28\0",
            "an ELF 32-bit executable for ARM",
        ),
        (b"MZ", "a DOS executable"),
        (&[0; 512], "a file of zeros"),
    ];
    for (contents, expected) in cases {
        let mut contents = contents.to_vec();
        if contents.starts_with(b"\x7fELF") {
            contents.resize(100, 0);
        }
        let error = load(&contents).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(error.contains("accepted are a Linux bzImage"), "{error}");
    }
}

#[test]
fn a_directory_is_no_kernel() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = std::fs::File::open(folder.path()).unwrap();
    let params = super::super::BootParams {
        kernel: &kernel,
        initrd: Some(&file(b"x")),
        cmdline: "",
        memory_bytes: 16 << 20,
        rsdp: vm_memory::GuestAddress(0xe_0000),
    };
    let error = super::super::load(&super::super::fixtures::memory(16 << 20), &params);
    assert_eq!(
        error.unwrap_err().to_string(),
        "the kernel is a directory, expected a regular file"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damaged_images_never_panic(
        sample in 0usize..SAMPLES.len(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        header_damage in prop::collection::vec((0x1f1usize..0x270, any::<u8>()), 0..3),
        cut in any::<prop::sample::Index>(),
        cut_it in any::<bool>(),
    ) {
        let mut image = bzimage(SAMPLES[sample].0);
        for (at, value) in damage {
            let at = at.index(image.len() - 1024) + 1024;
            image[at] = value;
        }
        for (at, value) in header_damage {
            image[at] = value;
        }
        if cut_it {
            image.truncate(cut.index(image.len()));
        }
        let _ = load(&image);
    }
}
