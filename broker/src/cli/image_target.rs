//! An image that is made: under another name until it is whole.

use super::failure::{Failure, START, USAGE};
use crate::image::chain::{Chain, name_of};
use bulkhead_ipc::protocol::birth::{ImageFormat, ImageLayer};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Files that get their names when everything is in them, and are gone otherwise.
#[derive(Debug)]
pub(super) struct Target {
    chain: Chain,
    /// What they are called now, and what they will be.
    files: Vec<(PathBuf, PathBuf)>,
    replace: bool,
    kept: bool,
}

impl Target {
    /// Makes the empty files of an image at `path`.
    ///
    /// # Errors
    /// When there is something at `path` already that is not to be replaced, or is no file.
    pub(super) fn make(path: &Path, format: ImageFormat, replace: bool) -> Result<Self, Failure> {
        let fails = |error: &io::Error| {
            let code = match error.kind() {
                io::ErrorKind::AlreadyExists
                | io::ErrorKind::NotFound
                | io::ErrorKind::PermissionDenied => USAGE,
                _ => START,
            };
            Failure::because(code, format!("making the image {}", path.display()), error)
        };
        let mut names = vec![path.to_owned()];
        if format == ImageFormat::Vmdk {
            let stem = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            names.push(path.with_file_name(format!("{stem}-flat.vmdk")));
        }
        let mut target = Self {
            chain: Chain::default(),
            files: Vec::new(),
            replace,
            kept: false,
        };
        let mut opened = Vec::new();
        for name in &names {
            match fs::symlink_metadata(name) {
                Ok(found) if !found.is_file() || !replace => {
                    return Err(fails(&nix::errno::Errno::EEXIST.into()));
                }
                _ => {}
            }
            let now = partial(name);
            let file = File::options()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o666)
                .open(&now)
                .map_err(|error| fails(&error))?;
            target.files.push((now, name.clone()));
            opened.push(file);
        }
        let layer = ImageLayer {
            format,
            files: names.iter().map(|name| name_of(name)).collect(),
        };
        target.chain = Chain::of(vec![layer], opened);
        Ok(target)
    }

    /// Its files.
    pub(super) const fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Gives the files their names, the image last.
    ///
    /// # Errors
    /// The file system's; somebody else may have made such a file meanwhile.
    pub(super) fn keep(mut self) -> Result<(), Failure> {
        for (now, name) in self.files.iter().rev() {
            let named = match self.replace {
                true => fs::rename(now, name),
                false => fs::hard_link(now, name).and_then(|()| fs::remove_file(now)),
            };
            named.map_err(|error| {
                Failure::because(
                    START,
                    format!("naming the image {}", name.display()),
                    &error,
                )
            })?;
        }
        self.kept = true;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.kept {
            for (now, _) in &self.files {
                let _gone_or_not = fs::remove_file(now);
            }
        }
    }
}

fn partial(name: &Path) -> PathBuf {
    let mut file = std::ffi::OsString::from(".");
    file.push(name.file_name().unwrap_or_default());
    file.push(format!(".partial-{}", std::process::id()));
    name.with_file_name(file)
}
