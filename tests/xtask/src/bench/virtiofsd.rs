//! `virtiofsd`, what QEMU shares a folder with: made from crates.io once for each version, outside of the tree.

use crate::cache::{self, Key};
use crate::{command, packages, process};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// The version that Bulkhead is compared with.
const VERSION: &str = "1.14.0";
/// Who the peer is, in figures.
pub(super) const PEER: &str = "qemu-microvm, virtiofsd 1.14.0";
/// Libraries that it is linked with.
const LIBRARIES: [&str; 2] = ["libcap-ng-dev", "libseccomp-dev"];
/// How long one may take to listen.
const PATIENCE: Duration = Duration::from_secs(20);

/// Makes the program when it is missing, and returns its path.
pub(super) fn build() -> Result<PathBuf> {
    let mut key = Key::new("virtiofsd 1");
    key.add(VERSION);
    let folder = cache::artifact("virtiofsd", &key, |folder| {
        packages::ensure(&LIBRARIES)?;
        let target = folder.join("target");
        let mut install = command::cargo();
        // Flags of this tree make static programs, which cannot load these libraries.
        install
            .current_dir(folder)
            .env_remove("RUSTFLAGS")
            .env_remove("CARGO_ENCODED_RUSTFLAGS");
        install.args(["install", "virtiofsd", "--locked", "--version"]);
        install.arg(format!("={VERSION}")).arg("--root").arg(folder);
        install.arg("--target-dir").arg(&target);
        // Standard output carries figures alone.
        command::run(install.stdout(std::io::stderr()))?;
        Ok(std::fs::remove_dir_all(&target)?)
    })?;
    Ok(folder.join("bin/virtiofsd"))
}

/// One that serves a folder, until it is dropped. It serves one machine, and ends with it.
pub(super) struct Virtiofsd {
    child: Child,
    socket: PathBuf,
}

impl Virtiofsd {
    /// Has `program` share `folder` on a socket in `directory`, sandboxed as it is by default.
    pub(super) fn start(program: &Path, folder: &Path, directory: &Path) -> Result<Self> {
        let socket = directory.join("virtiofsd.sock");
        if socket.exists() {
            std::fs::remove_file(&socket)?;
        }
        let log = directory.join("virtiofsd.log");
        let mut serve = command::command(program);
        serve.arg("--shared-dir").arg(folder);
        serve.arg("--socket-path").arg(&socket);
        serve.stdout(Stdio::null()).stderr(File::create(&log)?);
        let child = serve
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let mut started = Self { child, socket };
        let until = Instant::now() + PATIENCE;
        while !started.socket.exists() {
            if started.child.try_wait()?.is_some() || Instant::now() >= until {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                bail!("virtiofsd does not listen: {}", said.trim());
            }
            sleep(Duration::from_millis(2));
        }
        Ok(started)
    }

    /// Where it listens.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Virtiofsd {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            process::end_tree(self.child.id(), Duration::from_secs(2));
            let _ended = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_name_the_version_that_is_run() {
        assert!(PEER.ends_with(VERSION), "{PEER}");
    }
}
