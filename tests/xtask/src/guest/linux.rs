//! Builds the small Linux kernel from Debian's kernel sources and `tests/guests/linux/config`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::cache::{self, Key};
use crate::{command, packages, workspace};

const SOURCE_PACKAGE: &str = "linux-source-6.1";
const CONFIG: &str = "tests/guests/linux/config";
/// What building a kernel needs on Debian, besides the sources.
const BUILD_PACKAGES: [&str; 10] = [
    "bc",
    "binutils",
    "bison",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "tar",
    "xz-utils",
];
/// Change this when the steps below change what they produce.
const RECIPE: &str = "linux 2";

/// Builds the kernel when it is missing; the folder holds `vmlinux`, `bzImage`, `config`.
pub(super) fn build() -> Result<PathBuf> {
    packages::ensure(&[SOURCE_PACKAGE])?;
    let version = packages::version(SOURCE_PACKAGE).context("no kernel sources")?;
    let config = workspace::root().join(CONFIG);
    let mut key = Key::new(RECIPE);
    key.add(&version);
    key.add_file(&config)?;
    cache::artifact("linux", &key, |folder| {
        packages::ensure(&BUILD_PACKAGES)?;
        eprintln!("building the small Linux kernel from {SOURCE_PACKAGE} {version} (minutes)");
        build_in(folder, &config)
    })
}

fn build_in(folder: &Path, config: &Path) -> Result<()> {
    let work = folder.join("work");
    let (source, objects) = (work.join("source"), work.join("objects"));
    fs::create_dir_all(&source)?;
    fs::create_dir_all(&objects)?;
    let log = folder.join("build.log");
    let archive = format!("/usr/src/{SOURCE_PACKAGE}.tar.xz");
    let mut unpack = command::command("tar");
    unpack.args(["--extract", "--strip-components=1", "--file", &archive]);
    command::run_logged(unpack.arg("--directory").arg(&source), &log)?;

    let make = |targets: &[&str]| {
        let mut make = command::command("make");
        // cargo's own job server must not reach make.
        make.env_remove("MAKEFLAGS")
            .env_remove("CARGO_MAKEFLAGS")
            .env("LC_ALL", "C");
        make.env("KBUILD_BUILD_USER", "bulkhead")
            .env("KBUILD_BUILD_HOST", "xtask");
        make.env("KBUILD_BUILD_TIMESTAMP", "1970-01-01");
        make.arg("-C")
            .arg(&source)
            .arg(format!("O={}", objects.display()));
        make.arg(format!("KCONFIG_ALLCONFIG={}", config.display()));
        make.arg(format!(
            "--jobs={}",
            std::thread::available_parallelism().map_or(1, usize::from)
        ));
        command::run_logged(make.args(targets), &log)
    };
    make(&["allnoconfig"])?;
    let wanted = fs::read_to_string(config)?;
    check_config(&wanted, &fs::read_to_string(objects.join(".config"))?)?;
    make(&["vmlinux", "bzImage"])?;

    for (from, to) in [
        ("vmlinux", "vmlinux"),
        ("arch/x86/boot/bzImage", "bzImage"),
        (".config", "config"),
    ] {
        fs::copy(objects.join(from), folder.join(to)).with_context(|| format!("no {from}"))?;
    }
    fs::remove_dir_all(&work)?;
    Ok(())
}

/// Fails unless every line of our configuration holds in the finished one: `allnoconfig` silently
/// drops options whose dependencies are missing.
fn check_config(wanted: &str, finished: &str) -> Result<()> {
    let holds = |line: &&str| match line.strip_prefix("# ") {
        Some(unset) => match unset.strip_suffix(" is not set") {
            Some(option) => {
                let setting = format!("{option}=");
                !finished.lines().any(|line| line.starts_with(&setting))
            }
            None => true, // a comment
        },
        None => line.is_empty() || *line == "#" || finished.lines().any(|found| found == *line),
    };
    let refused: Vec<&str> = wanted.lines().filter(|line| !holds(line)).collect();
    if !refused.is_empty() {
        bail!(
            "{CONFIG}: the kernel's configuration refused: {}",
            refused.join(", ")
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FINISHED: &str = "CONFIG_A=y\nCONFIG_B=32\n# CONFIG_C is not set\n";

    #[test]
    fn a_configuration_that_holds_is_accepted() {
        let wanted = "# Why.\n#\n\nCONFIG_A=y\nCONFIG_B=32\n# CONFIG_C is not set\n\
                      # CONFIG_UNKNOWN is not set\n";
        check_config(wanted, FINISHED).unwrap();
    }

    #[test]
    fn options_that_the_kernel_dropped_are_named() {
        for line in [
            "CONFIG_C=y",
            "CONFIG_B=3",
            "# CONFIG_A is not set",
            "CONFIG_D=y",
        ] {
            let error = check_config(line, FINISHED).unwrap_err().to_string();
            assert!(error.contains(line), "{error}");
        }
    }
}
