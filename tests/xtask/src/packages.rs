//! Debian packages that tasks need: finds out what is missing and has apt-get install it.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};

use crate::command;

/// Installs those of `packages` that are missing. Needs root or `sudo` only when there are any.
pub(crate) fn ensure(packages: &[&str]) -> Result<()> {
    let missing: Vec<&str> = packages
        .iter()
        .copied()
        .filter(|package| version(package).is_none())
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!(
            "these tools are needed, and only Debian's apt-get can be used to install them: {}",
            missing.join(" ")
        );
    }
    update_lists()?;
    let mut install = as_root("apt-get")?;
    install.env("DEBIAN_FRONTEND", "noninteractive");
    install
        .args([
            "install",
            "--yes",
            "--no-upgrade",
            "--no-install-recommends",
        ])
        .args(&missing);
    command::run(&mut install)
        .with_context(|| format!("cannot install the packages {}", missing.join(" ")))
}

/// The installed version of a package, or `None` when it is not (completely) installed.
pub(crate) fn version(package: &str) -> Option<String> {
    let format = "--showformat=${db:Status-Status} ${Version}";
    let mut query = command::command("dpkg-query");
    query
        .args(["--show", format, package])
        .stderr(std::process::Stdio::null());
    let output = query.output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

/// Fetches apt's package lists, at most once in a run.
pub(crate) fn update_lists() -> Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.get().is_none() {
        command::run(as_root("apt-get")?.arg("update"))?;
        DONE.get_or_init(|| ());
    }
    Ok(())
}

/// A program to start as root, by `sudo` where that is needed.
pub(crate) fn as_root(program: &str) -> Result<std::process::Command> {
    if nix::unistd::geteuid().is_root() {
        return Ok(command::command(program));
    }
    if !which("sudo") {
        bail!("`{program}` must be run as root: run this task as root once, or install sudo");
    }
    let mut sudo = command::command("sudo");
    sudo.args([
        "--non-interactive",
        "--preserve-env=DEBIAN_FRONTEND",
        program,
    ]);
    Ok(sudo)
}

/// Whether a program of this name can be started.
pub(crate) fn which(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
