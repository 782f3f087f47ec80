//! Loading a kernel leaves no heap behind: every VM would carry it for its whole life.
//!
//! A test binary of its own, because it measures the process that it runs in.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use std::fs::File;
use std::io::Write;

use bulkhead_vcpu::boot::{self, BootParams, Compression, KernelFormat, layout};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MEMORY_BYTES: u64 = 64 << 20;

/// A bzImage whose xz payload makes the decoder allocate a dictionary of 32 MiB.
const KERNEL: &[u8] = include_bytes!("../src/boot/tests/data/vmlinuz");

/// Anonymous memory of this process in KiB.
fn anonymous_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn load(kernel: &File) {
    let ranges: Vec<_> = layout::memory_ranges(MEMORY_BYTES)
        .into_iter()
        .map(|(start, bytes)| (start, usize::try_from(bytes).unwrap()))
        .collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let params = BootParams {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        memory_bytes: MEMORY_BYTES,
        rsdp: GuestAddress(0xe_0000),
    };
    let loaded = boot::load(&memory, &params).unwrap();
    assert_eq!(
        loaded.format,
        KernelFormat::BzImage {
            compression: Compression::Xz
        }
    );
}

#[test]
fn loading_a_kernel_leaves_no_heap_behind() {
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(KERNEL).unwrap();
    load(&kernel); // What the C library sets up once is not counted.
    let before = anonymous_kib();
    for _ in 0..4 {
        load(&kernel);
    }
    let grown = anonymous_kib().saturating_sub(before);
    assert!(grown <= 64, "{grown} KiB stayed after loading four kernels");
}
