//! Fetches the stock Debian cloud kernel, without installing it, and makes an initramfs for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::initramfs::{self, Module};
use crate::cache;
use crate::{command, packages};

/// The package that always depends on the newest kernel.
const META_PACKAGE: &str = "linux-image-cloud-amd64";
/// The modules that a guest needs, in the order in which they are wanted; each is preceded by what
/// it depends on. Loading one takes seconds where ring 0 is emulated, so the list is short.
const MODULES: [&str; 6] = [
    "virtio_mmio",
    "virtio_blk",
    // ext4 asks for this one by itself, and nothing in an initramfs could load it for it.
    "crc32c_generic",
    "ext4",
    "virtio-rng",
    "virtio_console",
];

/// Fetches the kernel when it is missing; the folder holds `vmlinuz` and `initrd.cpio`.
pub(super) fn fetch() -> Result<PathBuf> {
    let kernel = resolve()?;
    let mut key = initramfs::key()?;
    key.add(include_str!("stock.rs"));
    key.add(&kernel);
    cache::artifact("stock", &key, |folder| {
        packages::ensure(&["dpkg", "kmod"])?;
        fetch_into(folder, &kernel)
    })
}

/// The exact kernel package and version, as `package=version`.
pub(super) fn resolve() -> Result<String> {
    let show = || {
        let mut show = command::command("apt-cache");
        show.args(["show", "--no-all-versions", META_PACKAGE]);
        command::output(&mut show)
    };
    let description = match show() {
        Ok(description) => description,
        Err(_) => {
            packages::update_lists()?;
            show()?
        }
    };
    kernel_package(&description)
        .with_context(|| format!("{META_PACKAGE} does not depend on exactly one kernel"))
}

/// Finds `package (= version)` among the dependencies of the meta package.
fn kernel_package(description: &str) -> Option<String> {
    let depends = description
        .lines()
        .find_map(|line| line.strip_prefix("Depends: "))?;
    let kernel = depends
        .split(", ")
        .find(|package| package.starts_with("linux-image-"))?;
    let (package, version) = kernel.split_once(" (= ")?;
    Some(format!("{package}={}", version.strip_suffix(')')?))
}

fn fetch_into(folder: &Path, kernel: &str) -> Result<()> {
    let work = folder.join("work");
    fs::create_dir(&work)?;
    let download = || {
        let mut download = command::command("apt-get");
        download
            .args(["download", "--quiet", kernel])
            .current_dir(&work);
        // Only paths are for standard output.
        download.stdout(std::io::stderr());
        command::run(&mut download)
    };
    if download().is_err() {
        packages::update_lists()?;
        download()?;
    }
    let package = only_entry(&work)?;
    let root = work.join("root");
    command::run(
        command::command("dpkg-deb")
            .arg("--extract")
            .arg(&package)
            .arg(&root),
    )?;

    let (release, modules) = modules(&root)?;
    fs::write(folder.join("initrd.cpio"), initramfs::archive(&modules)?)?;
    fs::copy(
        root.join(format!("boot/vmlinuz-{release}")),
        folder.join("vmlinuz"),
    )?;
    fs::write(folder.join("package"), format!("{kernel}\n"))?;
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// The kernel's release name and the modules to load, in order.
fn modules(root: &Path) -> Result<(String, Vec<Module>)> {
    let folder = only_entry(&root.join("lib/modules"))?;
    let release = folder
        .file_name()
        .and_then(|name| name.to_str())
        .context("no release name")?;
    command::run(
        command::command("depmod")
            .arg("--basedir")
            .arg(root)
            .arg(release),
    )?;
    let dependencies = fs::read_to_string(folder.join("modules.dep"))?;
    let builtin = fs::read_to_string(folder.join("modules.builtin"))?;
    let modules = load_order(&dependencies, &builtin, &MODULES)?;
    let modules = modules.iter().map(|path| read_module(&folder.join(path)));
    Ok((release.to_owned(), modules.collect::<Result<_>>()?))
}

/// Orders the wanted modules so that each comes after those that it needs.
fn load_order(dependencies: &str, builtin: &str, wanted: &[&str]) -> Result<Vec<String>> {
    let table: BTreeMap<String, (&str, Vec<&str>)> = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| {
            (
                module_name(path),
                (path, needs.split_whitespace().collect()),
            )
        })
        .collect();
    let mut order: Vec<String> = Vec::new();
    for module in wanted {
        let name = module_name(module);
        let Some((path, needs)) = table.get(&name) else {
            if builtin.lines().any(|line| module_name(line) == name) {
                continue;
            }
            bail!("the stock kernel has no module {module}");
        };
        // depmod lists what must be loaded last first.
        for path in needs.iter().rev().chain([path]) {
            if !order.iter().any(|ordered| ordered == path) {
                order.push((*path).to_owned());
            }
        }
    }
    Ok(order)
}

/// The name under which a kernel knows a module file: `-` and `_` are the same to it.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn read_module(path: &Path) -> Result<Module> {
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .context("no module name")?;
    let (name, path) = match name.strip_suffix(".xz") {
        Some(plain) => {
            command::run(
                command::command("xz")
                    .args(["--decompress", "--keep"])
                    .arg(path),
            )?;
            (plain, path.with_extension(""))
        }
        None => (name, path.to_path_buf()),
    };
    let content = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Module {
        name: name.to_owned(),
        content,
    })
}

fn only_entry(folder: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(folder)
        .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
        .with_context(|| format!("cannot list {}", folder.display()))?;
    match entries.as_slice() {
        [entry] => Ok(entry.path()),
        _ => bail!(
            "{}: {} entries, expected one",
            folder.display(),
            entries.len()
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_package_is_found_behind_the_meta_package() {
        let description = "Package: meta\nVersion: 6.1.9-1\n\
                           Depends: linux-image-6.1.0-9-cloud-amd64 (= 6.1.9-1)\n";
        let kernel = kernel_package(description);
        assert_eq!(
            kernel.as_deref(),
            Some("linux-image-6.1.0-9-cloud-amd64=6.1.9-1")
        );
        assert_eq!(kernel_package("Package: meta\n"), None);
    }

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let dependencies = "k/virtio.ko: k/ring.ko\nk/ring.ko:\n\
                            k/virtio_mmio.ko: k/virtio.ko k/ring.ko\n\
                            k/virtio-rng.ko: k/virtio.ko k/ring.ko\n";
        let order = load_order(
            dependencies,
            "k/evdev.ko\n",
            &["virtio_mmio", "virtio_rng", "evdev"],
        );
        assert_eq!(
            order.unwrap(),
            [
                "k/ring.ko",
                "k/virtio.ko",
                "k/virtio_mmio.ko",
                "k/virtio-rng.ko"
            ]
        );
    }

    #[test]
    fn a_module_that_the_kernel_lacks_is_an_error() {
        let error = load_order("", "", &["virtio_mmio"])
            .unwrap_err()
            .to_string();
        assert!(error.contains("virtio_mmio"), "{error}");
    }
}
