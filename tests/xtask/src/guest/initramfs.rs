//! The initramfs of the Linux guests: busybox, an init script, and for stock kernels their modules.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::cpio::Archive;
use crate::cache::{self, Key};
use crate::packages;

const BUSYBOX: &str = "/bin/busybox";
const INIT: &[u8] = include_bytes!("../../../guests/linux/init");
const POWER_BUTTON: &[u8] = include_bytes!("../../../guests/linux/power-button");
const FSTAB: &[u8] = include_bytes!("../../../guests/linux/fstab");

/// A kernel module to load at boot: its file name and content.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) content: Vec<u8>,
}

/// Makes the initramfs of the small Linux and returns its path.
pub(super) fn build() -> Result<PathBuf> {
    let key = key()?;
    let folder = cache::artifact("linux-initrd", &key, |folder| {
        Ok(fs::write(folder.join("initrd.cpio"), archive(&[])?)?)
    })?;
    Ok(folder.join("initrd.cpio"))
}

/// A cache key of everything in an initramfs but the modules.
pub(super) fn key() -> Result<Key> {
    packages::ensure(&["busybox-static"])?;
    let mut key = Key::new(include_str!("initramfs.rs"));
    key.add(packages::version("busybox-static").unwrap_or_default());
    for part in [INIT, POWER_BUTTON, FSTAB, include_bytes!("cpio.rs")] {
        key.add(part);
    }
    Ok(key)
}

/// The archive, with modules to be loaded by the init script in the given order.
pub(super) fn archive(modules: &[Module]) -> Result<Vec<u8>> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("cannot read {BUSYBOX}"))?;
    let mut archive = Archive::default();
    for folder in [
        "bin",
        "dev",
        "etc",
        "etc/acpi",
        "etc/acpi/PWRF",
        "mnt",
        "modules",
        "proc",
        "root",
        "sys",
        "tmp",
        "var",
        "var/log",
        "var/run",
    ] {
        archive.folder(folder);
    }
    // The kernel opens the console for init before devtmpfs is mounted.
    archive.character_device("dev/console", 5, 1);
    archive.character_device("dev/null", 1, 3);
    archive.program("init", INIT);
    archive.file("etc/fstab", FSTAB);
    archive.program("etc/acpi/PWRF/00000080", POWER_BUTTON);
    archive.program("bin/busybox", &busybox);
    // Debian's busybox finds its applets itself; four hundred links would cost seconds to unpack.
    archive.link("bin/sh", "busybox");
    let order: String = modules
        .iter()
        .map(|module| format!("{}\n", module.name))
        .collect();
    archive.file("modules/order", order.as_bytes());
    for module in modules {
        archive.file(&format!("modules/{}", module.name), &module.content);
    }
    Ok(archive.finish())
}
