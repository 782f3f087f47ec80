//! What a file is that is not a kernel, said in the words that its owner would use.
//!
//! Only for error messages: nothing is decided by it.

use std::borrow::Cow;
use std::fs::FileType;
use std::os::unix::fs::FileTypeExt;

/// The kind of a file that is not regular.
pub(super) fn special(kind: FileType) -> Option<&'static str> {
    if kind.is_dir() {
        Some("a directory")
    } else if kind.is_block_device() {
        Some("a block device")
    } else if kind.is_char_device() {
        Some("a character device")
    } else if kind.is_fifo() {
        Some("a pipe")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        None
    }
}

/// What a regular file with these first bytes and this length is.
pub(super) fn contents(head: &[u8], length: u64) -> Cow<'static, str> {
    if length == 0 {
        return Cow::Borrowed("an empty file");
    }
    if head.starts_with(b"\x7fELF") {
        return elf(head).into();
    }
    if head.starts_with(b"MZ") {
        return pe(head).into();
    }
    for (offset, magic, name) in SIGNATURES {
        if head
            .get(*offset..)
            .is_some_and(|bytes| bytes.starts_with(magic))
        {
            return Cow::Borrowed(name);
        }
    }
    if head.iter().all(|byte| *byte == 0) {
        return Cow::Borrowed("a file of zeros");
    }
    let text = |byte: &u8| byte.is_ascii_graphic() || byte.is_ascii_whitespace();
    if head.iter().all(text) {
        return Cow::Borrowed("a text file");
    }
    format!("data of {length} bytes in no known format").into()
}

/// Position, bytes, and name; the more specific before the less.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (0, &[0x1f, 0x8b], "gzip-compressed data (unpack it first)"),
    (
        0,
        &[0xfd, b'7', b'z', b'X', b'Z', 0],
        "xz-compressed data (unpack it first)",
    ),
    (
        0,
        &[0x28, 0xb5, 0x2f, 0xfd],
        "zstd-compressed data (unpack it first)",
    ),
    (
        0,
        &[0x02, 0x21, 0x4c, 0x18],
        "lz4-compressed data (unpack it first)",
    ),
    (
        0,
        &[0x04, 0x22, 0x4d, 0x18],
        "lz4-compressed data (unpack it first)",
    ),
    (0, b"BZh", "bzip2-compressed data (unpack it first)"),
    (
        0,
        &[0x89, b'L', b'Z', b'O'],
        "lzo-compressed data (unpack it first)",
    ),
    (0, b"QFI\xfb", "a qcow2 image (a disk, not a kernel)"),
    (0, b"KDMV", "a VMDK image (a disk, not a kernel)"),
    (0, b"vhdxfile", "a VHDX image (a disk, not a kernel)"),
    (0, b"conectix", "a VHD image (a disk, not a kernel)"),
    (0, b"070701", "a cpio archive (an initrd, not a kernel)"),
    (0, b"070702", "a cpio archive (an initrd, not a kernel)"),
    (0, b"hsqs", "a squashfs file system"),
    (0, b"!<arch>", "an ar archive or Debian package"),
    (0, &[0xed, 0xab, 0xee, 0xdb], "an RPM package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, &[0xd0, 0x0d, 0xfe, 0xed], "a device tree"),
    (0, &[0x27, 0x05, 0x19, 0x56], "a U-Boot image"),
    (0, b"#!", "a script"),
    (0x38, b"ARM\x64", "an aarch64 Linux kernel"),
    (0x38, b"RSC\x05", "a RISC-V Linux kernel"),
    (257, b"ustar", "a tar archive"),
    (0x438, &[0x53, 0xef], "an ext2, ext3 or ext4 file system"),
    (0x8001, b"CD001", "an ISO 9660 image"),
    (510, &[0x55, 0xaa], "a disk image or boot sector"),
];

fn elf(head: &[u8]) -> String {
    let class = match head.get(4) {
        Some(1) => "32-bit",
        Some(2) => "64-bit",
        _ => "damaged",
    };
    let half = |at: usize| {
        let bytes = [
            head.get(at).copied().unwrap_or(0),
            head.get(at + 1).copied().unwrap_or(0),
        ];
        if head.get(5) == Some(&2) {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        }
    };
    let kind = match half(16) {
        1 => "object file",
        2 => "executable",
        3 => "shared object or position-independent executable",
        4 => "core dump",
        _ => "file of unknown type",
    };
    let machine: Cow<'_, str> = match half(18) {
        3 => "x86".into(),
        8 => "MIPS".into(),
        20 | 21 => "PowerPC".into(),
        22 => "s390".into(),
        40 => "ARM".into(),
        62 => "x86-64".into(),
        183 => "aarch64".into(),
        243 => "RISC-V".into(),
        258 => "LoongArch".into(),
        other => format!("machine {other}").into(),
    };
    format!("an ELF {class} {kind} for {machine}")
}

fn pe(head: &[u8]) -> String {
    if head
        .get(0x38..)
        .is_some_and(|bytes| bytes.starts_with(b"ARM\x64"))
    {
        return "an aarch64 Linux kernel (PE/EFI executable)".to_owned();
    }
    let bytes = |at: usize| head.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let offset = bytes(0x3c).and_then(|bytes| usize::try_from(u32::from_le_bytes(bytes)).ok());
    let header = offset.and_then(|at| head.get(at..at.checked_add(6)?));
    let Some([b'P', b'E', 0, 0, low, high]) = header else {
        return "a DOS executable".to_owned();
    };
    match u16::from_le_bytes([*low, *high]) {
        0x14c => "a PE/EFI executable for x86".to_owned(),
        0x8664 => "a PE/EFI executable for x86-64 without a Linux boot header".to_owned(),
        0xaa64 => "a PE/EFI executable for aarch64".to_owned(),
        0x5064 => "a PE/EFI executable for RISC-V".to_owned(),
        other => format!("a PE/EFI executable for machine {other:#x}"),
    }
}
