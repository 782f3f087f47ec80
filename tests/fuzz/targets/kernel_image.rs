//! Any file as a kernel: bzImage, ELF, Multiboot, or nothing of the kind.
#![no_main]

use bulkhead_vcpu::boot::{BootParams, layout, load};
use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::io::Write;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: u64 = 32 << 20;

fuzz_target!(|data: &[u8]| {
    let fd = nix::sys::memfd::memfd_create("kernel", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let mut kernel = File::from(fd);
    kernel.write_all(data).unwrap();
    let ranges: Vec<_> = layout::memory_ranges(MEMORY_BYTES)
        .into_iter()
        .map(|(address, len)| (address, usize::try_from(len).unwrap()))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let params = BootParams {
        kernel: &kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        memory_bytes: MEMORY_BYTES,
        rsdp: GuestAddress(0xe0000),
    };
    let _result = load(&memory, &params);
});
