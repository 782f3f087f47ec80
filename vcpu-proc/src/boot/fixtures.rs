//! Small kernels made for tests: ELF images with chosen segments and notes, and files of them.

use std::fs::File;
use std::io::{Seek, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, BootParams, LoadedKernel, layout};

/// Memory of the guests in tests.
pub(crate) const MEMORY_BYTES: u64 = 64 << 20;
/// Where the RSDP is said to be.
pub(crate) const RSDP: GuestAddress = GuestAddress(0xe_0000);

/// Zeroed guest memory of `bytes` bytes.
pub(crate) fn memory(bytes: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = layout::memory_ranges(bytes)
        .into_iter()
        .map(|(start, length)| (start, usize::try_from(length).unwrap()))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

/// An unnamed file with `bytes` in it.
pub(crate) fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// Loads `kernel` without an initrd into a guest of [`MEMORY_BYTES`].
pub(crate) fn load(kernel: &[u8]) -> Result<(LoadedKernel, GuestMemoryMmap), BootError> {
    load_with(kernel, None, "console=ttyS0", MEMORY_BYTES)
}

/// Loads `kernel` and `initrd` into a guest of `bytes` bytes.
pub(crate) fn load_with(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
    bytes: u64,
) -> Result<(LoadedKernel, GuestMemoryMmap), BootError> {
    let memory = memory(bytes);
    let kernel = file(kernel);
    let initrd = initrd.map(file);
    let params = BootParams {
        kernel: &kernel,
        initrd: initrd.as_ref(),
        cmdline,
        memory_bytes: bytes,
        rsdp: RSDP,
    };
    super::load(&memory, &params).map(|loaded| (loaded, memory))
}

/// `count` bytes of guest memory.
pub(crate) fn bytes(memory: &GuestMemoryMmap, address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    memory
        .read_slice(&mut bytes, GuestAddress(address))
        .unwrap();
    bytes
}

/// A little-endian 32-bit word of guest memory.
pub(crate) fn word(memory: &GuestMemoryMmap, address: u64) -> u32 {
    u32::from_le_bytes(bytes(memory, address, 4).try_into().unwrap())
}

/// A little-endian 64-bit word of guest memory.
pub(crate) fn long(memory: &GuestMemoryMmap, address: u64) -> u64 {
    u64::from_le_bytes(bytes(memory, address, 8).try_into().unwrap())
}

/// The NUL-terminated text at `address`.
pub(crate) fn text(memory: &GuestMemoryMmap, address: u64) -> String {
    let bytes = bytes(memory, address, 256);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

/// One program header and the bytes that it refers to.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    pub(crate) kind: u32,
    pub(crate) virtual_address: u64,
    pub(crate) address: u64,
    pub(crate) memory_bytes: u64,
    pub(crate) data: Vec<u8>,
}

impl Segment {
    /// A loadable segment at `address` with as much memory as data.
    pub(crate) fn load(address: u64, data: &[u8]) -> Self {
        Self {
            kind: 1,
            virtual_address: address,
            address,
            memory_bytes: data.len() as u64,
            data: data.to_vec(),
        }
    }

    /// A note segment that names the PVH entry `entry`.
    pub(crate) fn pvh_note(entry: u32) -> Self {
        let mut data = Vec::new();
        for word in [4u32, 4, 18] {
            data.extend(word.to_le_bytes());
        }
        data.extend(b"Xen\0");
        data.extend(entry.to_le_bytes());
        Self {
            kind: 4,
            virtual_address: 0,
            address: 0,
            memory_bytes: 0,
            data,
        }
    }
}

/// An ELF64 executable for x86-64.
pub(crate) fn elf64(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for long in [entry, 64, 0] {
        file.extend(long.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    let count = u16::try_from(segments.len()).unwrap();
    for half in [64u16, 56, count, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 64 + 56 * u64::from(count);
    for segment in segments {
        file.extend(segment.kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let bytes = segment.data.len() as u64;
        let memory_bytes = segment.memory_bytes;
        for long in [
            offset,
            segment.virtual_address,
            segment.address,
            bytes,
            memory_bytes,
            4,
        ] {
            file.extend(long.to_le_bytes());
        }
        offset += bytes;
    }
    for segment in segments {
        file.extend(&segment.data);
    }
    file
}

/// An ELF32 executable for i386.
pub(crate) fn elf32(entry: u32, segments: &[Segment]) -> Vec<u8> {
    let mut file = b"\x7fELF\x01\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(3u16.to_le_bytes());
    for word in [1u32, entry, 52, 0, 0] {
        file.extend(word.to_le_bytes());
    }
    let count = u16::try_from(segments.len()).unwrap();
    for half in [52u16, 32, count, 40, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 52 + 32 * u32::from(count);
    for segment in segments {
        let bytes = u32::try_from(segment.data.len()).unwrap();
        let narrow = |long| u32::try_from(long).unwrap();
        for word in [
            segment.kind,
            offset,
            narrow(segment.virtual_address),
            narrow(segment.address),
            bytes,
            narrow(segment.memory_bytes),
            7,
            4,
        ] {
            file.extend(word.to_le_bytes());
        }
        offset += bytes;
    }
    for segment in segments {
        file.extend(&segment.data);
    }
    file
}

/// A bzImage of protocol 2.15 around `payload`, whose own code is `b"decompressor"`.
pub(crate) fn bzimage(payload: &[u8]) -> Vec<u8> {
    const SETUP: usize = 1024;
    const PAYLOAD_OFFSET: u32 = 0x400;
    let mut image = b"decompressor".to_vec();
    image.resize(usize::try_from(PAYLOAD_OFFSET).unwrap(), 0x90);
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let mut file = vec![0; SETUP];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(
        0x1f4,
        &u32::try_from(image.len() / 16).unwrap().to_le_bytes(),
    ); // syssize
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes()); // version
    put(0x211, &[0x83]); // loadflags: loaded high, KASLR, heap
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(0x236, &0x7fu16.to_le_bytes()); // xloadflags
    put(0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(0x248, &PAYLOAD_OFFSET.to_le_bytes());
    put(0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes()); // pref_address
    put(0x260, &0x10_0000u32.to_le_bytes()); // init_size
    file.extend(image);
    file
}
