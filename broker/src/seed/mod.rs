//! Seed disks for cloud-init: the NoCloud data source finds a file system labelled CIDATA and reads from it what
//! the machine is to become.
//!
//! The broker writes them from files of the user, and never reads one back: a guest sees it as a read-only disk.

mod fat;

pub use fat::TooLarge;

use crate::vm::session::RunOptions;
use crate::vm::spec::{CloudInitSpec, DiskSpec, SEED_DISK, VmSpec};
use bulkhead_ipc::protocol::birth::{DiskLimits, ImageFormat};
use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// Largest file of a seed in bytes. cloud-init takes less than that from any cloud.
pub const FILE_BYTES_MAX: u64 = 4 << 20;
/// A machine's seed in its state directory.
const IMAGE: &str = "cloud-init.img";
const LABEL: [u8; 11] = *b"CIDATA     ";
/// cloud-init finds nothing on a disk without this file.
const NOTHING: &[u8] = b"#cloud-config\n{}\n";

/// Why there is no seed.
#[derive(Debug, thiserror::Error)]
pub enum SeedError {
    /// A file cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A file is too large.
    #[error("{}: expected at most {} MiB", .0.display(), FILE_BYTES_MAX >> 20)]
    Large(PathBuf),
    /// They are too large together.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The image cannot be written.
    #[error("writing {path}: {cause}")]
    Write {
        /// Where.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

/// The image of a seed disk for the machine `name`.
///
/// # Errors
/// When a file cannot be read.
pub fn image(spec: &CloudInitSpec, name: &str) -> Result<Vec<u8>, SeedError> {
    let content = |path: &Option<PathBuf>| path.as_deref().map(read).transpose();
    let meta_data = content(&spec.meta_data)?.unwrap_or_else(|| meta_data(spec, name));
    let user_data = content(&spec.user_data)?.unwrap_or_else(|| NOTHING.to_vec());
    let mut files = vec![
        fat::File {
            name: "meta-data",
            short: *b"META-D~1   ",
            content: meta_data,
        },
        fat::File {
            name: "user-data",
            short: *b"USER-D~1   ",
            content: user_data,
        },
    ];
    if let Some(content) = content(&spec.network_config)? {
        files.push(fat::File {
            name: "network-config",
            short: *b"NETWOR~1   ",
            content,
        });
    }
    Ok(fat::image(LABEL, &files)?)
}

/// What a machine without a file of it is told of itself. The instance is the machine: as long as it has its name,
/// cloud-init does once what is to be done once.
fn meta_data(spec: &CloudInitSpec, name: &str) -> Vec<u8> {
    // A JSON string is a YAML string, whatever is in it.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let hostname = spec.hostname.as_deref().unwrap_or(name);
    let mut text = format!(
        "instance-id: {}\nlocal-hostname: {}\n",
        quoted(&format!("bulkhead-{name}")),
        quoted(hostname)
    );
    if !spec.ssh_keys.is_empty() {
        text.push_str("public-keys:\n");
        for key in &spec.ssh_keys {
            text.push_str(&format!("  - {}\n", quoted(key)));
        }
    }
    text.into_bytes()
}

fn read(path: &Path) -> Result<Vec<u8>, SeedError> {
    let wrong = |cause| SeedError::Read {
        path: path.to_owned(),
        cause,
    };
    let file = File::open(path).map_err(wrong)?;
    let mut content = Vec::new();
    let mut most = file.take(FILE_BYTES_MAX + 1);
    most.read_to_end(&mut content).map_err(wrong)?;
    if most.limit() == 0 {
        return Err(SeedError::Large(path.to_owned()));
    }
    Ok(content)
}

/// Writes an image; whoever reads the one before it goes on to do so.
///
/// # Errors
/// When it cannot be written, or is there already and not to be replaced.
pub fn write(path: &Path, image: &[u8], replace: bool) -> Result<(), SeedError> {
    let hidden = path.with_file_name(format!(".cloud-init.partial-{}", std::process::id()));
    let write = || -> io::Result<()> {
        if !replace && fs::symlink_metadata(path).is_ok() {
            return Err(nix::errno::Errno::EEXIST.into());
        }
        // What is left of a broker of the same number that was killed.
        let _left = fs::remove_file(&hidden);
        // Passwords are in it, as often as not.
        let mut options = File::options();
        let mut file = options
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&hidden)?;
        let written = file
            .write_all(image)
            .and_then(|()| fs::rename(&hidden, path));
        if written.is_err() {
            let _left = fs::remove_file(&hidden);
        }
        written
    };
    write().map_err(|cause| SeedError::Write {
        path: path.to_owned(),
        cause,
    })
}

/// The machine with its seed disk, which is written anew: the files may have changed since it last ran.
///
/// # Errors
/// When that cannot be made.
pub fn with_disk<'a>(spec: &'a VmSpec, options: &RunOptions) -> Result<Cow<'a, VmSpec>, SeedError> {
    let Some(cloud_init) = &spec.cloud_init else {
        return Ok(Cow::Borrowed(spec));
    };
    let path = options.state.join(IMAGE);
    let image = image(cloud_init, &spec.name)?;
    fs::create_dir_all(&options.state).map_err(|cause| SeedError::Write {
        path: options.state.clone(),
        cause,
    })?;
    write(&path, &image, true)?;
    let mut spec = spec.clone();
    // It may come from a record of when it ran.
    spec.disks.retain(|disk| disk.name != SEED_DISK);
    spec.disks.push(disk(path));
    Ok(Cow::Owned(spec))
}

fn disk(path: PathBuf) -> DiskSpec {
    DiskSpec {
        name: SEED_DISK.to_owned(),
        path,
        format: ImageFormat::Raw,
        extents: Vec::new(),
        backing: Vec::new(),
        read_only: true,
        ephemeral: false,
        limits: DiskLimits::default(),
        bytes_min: 0,
        shareable: false,
        serial: SEED_DISK.to_owned(),
        queues: 1,
    }
}

/// The files in a folder as cloud-init calls them, or one file of user data.
///
/// # Errors
/// When there is nothing to use.
pub fn of_path(path: &Path) -> Result<CloudInitSpec, String> {
    let found = fs::metadata(path).map_err(|error| format!("expected user data: {error}"))?;
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if !found.is_dir() {
        return Ok(CloudInitSpec {
            user_data: Some(path),
            ..CloudInitSpec::default()
        });
    }
    let file = |name: &str| Some(path.join(name)).filter(|path| path.exists());
    let spec = CloudInitSpec {
        user_data: file("user-data"),
        meta_data: file("meta-data"),
        network_config: file("network-config"),
        ..CloudInitSpec::default()
    };
    if spec == CloudInitSpec::default() {
        return Err("expected user-data, meta-data or network-config in the folder".to_owned());
    }
    Ok(spec)
}

#[cfg(test)]
mod tests;
