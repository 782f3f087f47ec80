//! The guests that tests, the demo and the benchmarks boot, by name.
//!
//! Responsible for: making each image when it is missing (see `cache.rs`) and telling its path. Tests
//! never build guests themselves: `cargo xtask test` hands them paths in environment variables.

mod cpio;
mod debian;
mod disk;
mod initramfs;
mod linux;
mod pjdfstest;
mod stock;
mod test_guest;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Subcommand, ValueEnum};

/// The package of the freestanding test guest, a workspace of its own.
pub(crate) const TEST_GUEST: &str = "tests/guests";

/// `cargo xtask guest …`
#[derive(Subcommand)]
pub(crate) enum Task {
    /// Build the freestanding test guest.
    Test,
    /// Build the small Linux kernel and its initramfs from Debian's kernel sources.
    Linux,
    /// Fetch the stock Debian cloud kernel and make an initramfs with its own modules.
    Stock,
    /// Make a disk with a Debian root file system, its kernel in its /boot.
    Debian,
    /// Print the path of an image, after building it when it is missing.
    Path {
        /// Which image.
        image: Image,
    },
    /// Make a raw disk image that holds an ext4 file system.
    Disk(disk::Options),
}

/// One file that a guest is booted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Image {
    /// The freestanding test guest (ELF).
    TestGuest,
    /// The small Linux kernel as an ELF file with symbols.
    LinuxVmlinux,
    /// The small Linux kernel as a bzImage (gzip).
    LinuxBzimage,
    /// The initramfs of the small Linux: busybox and an init script.
    LinuxInitrd,
    /// The stock Debian cloud kernel, untouched.
    StockKernel,
    /// An initramfs for the stock kernel: busybox, an init script, the kernel's virtio modules.
    StockInitrd,
    /// A disk with a Debian root file system (ext4, raw) that holds its own kernel.
    DebianDisk,
    /// No image, but a program for Linux guests: the suite pjdfstest.
    Pjdfstest,
}

impl Image {
    /// Every image that can be made without downloading a stock kernel.
    pub(crate) const BUILT: [Self; 4] = [
        Self::TestGuest,
        Self::LinuxVmlinux,
        Self::LinuxBzimage,
        Self::LinuxInitrd,
    ];
    /// The images of the stock Debian kernel.
    pub(crate) const STOCK: [Self; 2] = [Self::StockKernel, Self::StockInitrd];
    /// What only the slow suites use: everything from Debian's packages, and what is built from crates.io.
    pub(crate) const SLOW: [Self; 4] = [
        Self::StockKernel,
        Self::StockInitrd,
        Self::DebianDisk,
        Self::Pjdfstest,
    ];

    /// The path of the image, which is built first when it is missing.
    pub(crate) fn path(self) -> Result<PathBuf> {
        Ok(match self {
            Self::TestGuest => test_guest::build()?,
            Self::LinuxVmlinux => linux::build()?.join("vmlinux"),
            Self::LinuxBzimage => linux::build()?.join("bzImage"),
            Self::LinuxInitrd => initramfs::build()?,
            Self::StockKernel => stock::fetch()?.join("vmlinuz"),
            Self::StockInitrd => stock::fetch()?.join("initrd.cpio"),
            Self::DebianDisk => debian::build()?,
            Self::Pjdfstest => pjdfstest::build()?,
        })
    }

    /// The environment variable that tells the end-to-end tests where the image is.
    pub(crate) const fn variable(self) -> &'static str {
        match self {
            Self::TestGuest => "BULKHEAD_TEST_GUEST",
            Self::LinuxVmlinux => "BULKHEAD_TEST_LINUX_VMLINUX",
            Self::LinuxBzimage => "BULKHEAD_TEST_LINUX_BZIMAGE",
            Self::LinuxInitrd => "BULKHEAD_TEST_LINUX_INITRD",
            Self::StockKernel => "BULKHEAD_TEST_STOCK_KERNEL",
            Self::StockInitrd => "BULKHEAD_TEST_STOCK_INITRD",
            Self::DebianDisk => "BULKHEAD_TEST_DEBIAN_DISK",
            Self::Pjdfstest => "BULKHEAD_TEST_PJDFSTEST",
        }
    }
}

/// Runs one `guest` task.
pub(crate) fn run(task: Task) -> Result<()> {
    let images: &[Image] = match &task {
        Task::Test => &[Image::TestGuest],
        Task::Linux => &[Image::LinuxVmlinux, Image::LinuxBzimage, Image::LinuxInitrd],
        Task::Stock => &Image::STOCK,
        Task::Debian => &[Image::DebianDisk],
        Task::Path { image } => std::slice::from_ref(image),
        Task::Disk(options) => return disk::make(options),
    };
    for image in images {
        println!("{}", image.path()?.display());
    }
    Ok(())
}
