//! A Debian root file system on a disk, with its kernel in its `/boot`: what users have.
//!
//! Made with `mmdebstrap` from the packages of the sources that this machine's apt knows. What makes it quick where
//! ring 0 is emulated is in the image (`tests/guests/debian`), and on the command line of its test.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::stock;
use crate::cache::{self, Key};
use crate::{command, packages, workspace};

/// The release, by its code name.
const SUITE: &str = "bookworm";
/// What runs on the new root directory, before and after most packages are installed.
const HOOKS: &str = "tests/guests/debian";
/// What is installed besides the packages that every Debian has.
const INCLUDED: [&str; 7] = [
    "e2fsprogs",
    "kmod",
    "linux-image-cloud-amd64",
    "login",
    "systemd-sysv",
    "tiny-initramfs",
    "udev",
];
/// Packages whose versions tell whether the image is out of date, besides the kernel's.
const WATCHED: [&str; 4] = ["base-files", "libc6", "systemd", "tiny-initramfs"];
/// What apt is told on this machine that holds for another root directory as well.
const APT_OPTIONS: [&str; 4] = [
    "Acquire::Check-",
    "Acquire::Retries",
    "Acquire::http",
    "Acquire::https",
];
const SIZE_BYTES: u64 = 1 << 30;

/// Makes the disk when it is missing, and returns its path.
pub(super) fn build() -> Result<PathBuf> {
    let kernel = stock::resolve()?;
    let mut key = Key::new(include_str!("debian.rs"));
    key.add(&kernel);
    key.add(versions()?);
    for hook in ["before", "after"] {
        key.add_file(&workspace::root().join(HOOKS).join(hook))?;
    }
    let folder = cache::artifact("debian", &key, |folder| {
        packages::ensure(&["e2fsprogs", "mmdebstrap"])?;
        build_in(folder)
    })?;
    Ok(folder.join("disk.img"))
}

/// The versions of the watched packages that apt would install.
fn versions() -> Result<String> {
    let mut show = command::command("apt-cache");
    show.args(["show", "--no-all-versions"]).args(WATCHED);
    let text = command::output(&mut show)?;
    let wanted = |line: &&str| line.starts_with("Package: ") || line.starts_with("Version: ");
    Ok(text.lines().filter(wanted).collect::<Vec<_>>().join("\n"))
}

fn build_in(folder: &Path) -> Result<()> {
    let work = folder.join("work");
    fs::create_dir(&work)?;
    let (root, list) = (work.join("root"), work.join("sources.list"));
    fs::write(&list, sources()?)?;
    let hooks = workspace::root().join(HOOKS);
    let hook = |option: &str, name: &str| {
        let path = hooks.join(name);
        path.to_str()
            .map(|path| format!("--{option}-hook={path}"))
            .context("a path that is not UTF-8")
    };
    // As root: files of all users are made.
    let mut bootstrap = packages::as_root("mmdebstrap")?;
    bootstrap.args(["--mode=root", "--variant=minbase", "--quiet"]);
    bootstrap.arg(format!("--include={}", INCLUDED.join(",")));
    bootstrap.arg("--aptopt=APT::Install-Recommends \"false\"");
    bootstrap.args(apt_options()?);
    // A machine without a name of its own would go through all units at its first boot.
    bootstrap.arg("--skip=cleanup/reproducible");
    bootstrap.arg(hook("essential", "before")?);
    bootstrap.arg(hook("customize", "after")?);
    bootstrap.arg(SUITE).arg(&root).arg(&list);
    // Only paths are for standard output.
    command::run(bootstrap.stdout(std::io::stderr()))?;

    let disk = folder.join("disk.img");
    File::create_new(&disk)?.set_len(SIZE_BYTES)?;
    let mut mkfs = packages::as_root("mkfs.ext4")?;
    // Everything is initialised here: a guest must not find work that mkfs put off.
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
    command::run(mkfs.arg("-d").arg(&root).arg(&disk))?;
    command::run(packages::as_root("rm")?.arg("-rf").arg(&work))
}

/// The sources of Debian's release that this machine's apt has, in the form of `sources.list`.
fn sources() -> Result<String> {
    let list = || {
        let format = "$(ORIGIN) $(RELEASE) $(REPO_URI) $(COMPONENT)";
        let mut list = command::command("apt-get");
        list.args(["indextargets", "--format", format, "Created-By: Packages"]);
        command::output(&mut list)
    };
    let mut found = sources_of(&list()?);
    if found.is_empty() {
        packages::update_lists()?;
        found = sources_of(&list()?);
    }
    if found.is_empty() {
        bail!("apt has no source of Debian {SUITE} on this machine");
    }
    Ok(found)
}

/// The lines of `apt-get indextargets` that are of the release.
fn sources_of(targets: &str) -> String {
    let mut lines: Vec<String> = targets
        .lines()
        .filter_map(|line| match *line.split(' ').collect::<Vec<_>>() {
            ["Debian", release, uri, component] => {
                let suffix = release.strip_prefix(SUITE)?;
                let known = ["", "-updates", "-security"].contains(&suffix);
                known.then(|| format!("deb {uri} {release} {component}\n"))
            }
            _ => None,
        })
        .collect();
    lines.sort();
    lines.dedup();
    lines.concat()
}

/// What this machine's apt is told of proxies and the like.
fn apt_options() -> Result<Vec<String>> {
    let dump = command::output(command::command("apt-config").arg("dump"))?;
    Ok(apt_options_of(&dump))
}

fn apt_options_of(dump: &str) -> Vec<String> {
    let lines = dump.lines().filter(|line| {
        let known = APT_OPTIONS.iter().any(|option| line.starts_with(option));
        known && !line.ends_with("\"\";")
    });
    lines
        .map(|line| format!("--aptopt={}", line.trim_end_matches(';')))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_sources_of_the_release_are_used() {
        let targets = "Debian bookworm http://a/debian/ main\n\
                       Debian bookworm-security http://a/security/ main\n\
                       Debian bookworm-backports http://a/debian/ main\n\
                       Debian trixie http://a/debian/ main\n\
                       Other bookworm http://b/ main\n\
                       Debian bookworm http://a/debian/ main\n";
        assert_eq!(
            sources_of(targets),
            "deb http://a/debian/ bookworm main\ndeb http://a/security/ bookworm-security main\n"
        );
    }

    #[test]
    fn options_of_apt_that_concern_fetching_are_passed_on() {
        let dump = "Acquire::http::Proxy \"http://p:1\";\nAcquire::Check-Date \"false\";\n\
                    Acquire::http \"\";\nDir \"/\";\nAcquire::Languages:: \"none\";\n";
        assert_eq!(
            apt_options_of(dump),
            [
                "--aptopt=Acquire::http::Proxy \"http://p:1\"",
                "--aptopt=Acquire::Check-Date \"false\""
            ]
        );
    }
}
