//! Everything that the broker opens on behalf of a machine's processes.
//!
//! A file that is missing, of the wrong kind or in use is an error here, before any process is
//! started. The broker keeps none of it once the processes have it.

use super::session::{RunError, RunOptions};
use super::spec::{DiskSpec, KernelSource, VmSpec};
use crate::escape::escaped;
use crate::image::ephemeral;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

/// What a machine's processes are given, besides what they share with each other.
#[derive(Debug)]
pub struct Resources {
    /// `/dev/kvm`.
    pub kvm: File,
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The core file.
    pub core: Option<File>,
    /// The disks, in order, locked.
    pub disks: Vec<File>,
    /// The host's random numbers.
    pub entropy: File,
    /// Whether the host's KVM is incomplete.
    pub quirks: bool,
}

fn configuration(what: &str, path: &Path, cause: impl std::fmt::Display) -> RunError {
    let path = escaped(path.as_os_str().as_encoded_bytes()).to_string();
    RunError::Configuration(format!("{what} {path}: {cause}"))
}

fn plain(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_owned())
}

impl Resources {
    /// Opens everything that `spec` names.
    ///
    /// # Errors
    /// The first thing that cannot be had, and why.
    pub fn open(spec: &VmSpec, options: &RunOptions) -> Result<Self, RunError> {
        let kernel = match &spec.kernel {
            KernelSource::File(path) => read_only("kernel", path)?,
            KernelSource::Image { name, bytes } => image(name, bytes)?,
        };
        let initrd = spec.initrd.as_deref();
        let initrd = initrd.map(|path| read_only("initrd", path)).transpose()?;
        let open_disk = |spec: &DiskSpec| {
            let file = disk(spec)?;
            if !spec.ephemeral {
                return Ok(file);
            }
            let copy = private_copy(spec, &file, &options.state)?;
            lock(&copy, Part::Use, true)
                .map_err(|e| configuration("copy of disk", &spec.path, e))?;
            Ok(copy)
        };
        let disks: Result<_, _> = spec.disks.iter().map(open_disk).collect();
        Ok(Self {
            kernel,
            initrd,
            disks: disks?,
            core: options.core.as_deref().map(core_file).transpose()?,
            kvm: device("/dev/kvm", true)?,
            entropy: device("/dev/urandom", false)?,
            quirks: Path::new("/sys/module/kvm_pvm").exists(),
        })
    }
}

/// Tells when the disks of a machine that has ended are free again: the kernel gives a lock up with
/// the last reference to the file, which a dead process's ring may hold a little longer.
#[derive(Debug)]
pub struct Fence {
    probes: Vec<File>,
}

impl Fence {
    /// Around the disks that are locked for writing.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(spec: &VmSpec, resources: &Resources) -> io::Result<Self> {
        let written = spec.disks.iter().zip(&resources.disks);
        let written = written.filter(|(spec, _)| !spec.read_only && !spec.ephemeral);
        // A file description of its own, without a lock.
        let probe =
            |(_, file): (_, &File)| File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let probes = written.map(probe).collect::<io::Result<_>>()?;
        Ok(Self { probes })
    }

    /// The same around the disks of a machine that another broker has started. One whose name is
    /// gone cannot be watched, nor be used by the next machine.
    #[must_use]
    pub fn around(spec: &VmSpec) -> Self {
        let written = spec.disks.iter().filter(|d| !d.read_only && !d.ephemeral);
        let probes = written.filter_map(|disk| File::open(&disk.path).ok());
        Self {
            probes: probes.collect(),
        }
    }

    /// Whether nobody has a lock on any of the disks.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.probes.iter().all(|file| {
            let mut lock = whole_file(libc::F_WRLCK);
            let asked = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock));
            asked.is_err() || i32::from(lock.l_type) == libc::F_UNLCK
        })
    }
}

/// First byte of the part of a disk's lock that its broker holds. Disks end before it.
const GUARD_FROM: i64 = 1 << 62;

/// The two parts of a disk's lock. Whoever uses a disk takes both, on two file descriptions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// On the file description that does the I/O: given up with its last reference.
    Use,
    /// On a file description of the broker's, so that nobody else has the disk while one process
    /// takes the other's place.
    Guard,
}

/// Takes a part of the lock of a disk on its file description: one writer, or any number of readers.
///
/// # Errors
/// EAGAIN or EACCES when it is taken.
pub(super) fn lock(file: &File, part: Part, writes: bool) -> Result<(), Errno> {
    let kind = if writes { libc::F_WRLCK } else { libc::F_RDLCK };
    let mut lock = whole_file(kind);
    match part {
        Part::Use => lock.l_len = GUARD_FROM,
        Part::Guard => lock.l_start = GUARD_FROM,
    }
    fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop)
}

fn whole_file(kind: i32) -> libc::flock {
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

fn device(path: &str, write: bool) -> Result<File, RunError> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(write).open(path);
    opened.map_err(|e| RunError::Host {
        lacks: format!("{path}: {}", plain(&e)),
    })
}

fn read_only(what: &str, path: &Path) -> Result<File, RunError> {
    // Non-blocking, so that a pipe is found out instead of waited for.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = opened.map_err(|e| configuration(what, path, plain(&e)))?;
    let about = file
        .metadata()
        .map_err(|e| configuration(what, path, plain(&e)))?;
    if !about.is_file() {
        return Err(configuration(what, path, "expected a regular file"));
    }
    Ok(file)
}

/// A kernel inside this program, as sealed memory.
fn image(name: &str, bytes: &[u8]) -> Result<File, RunError> {
    let make = || -> io::Result<File> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let mut file = File::from(memfd_create("bulkhead-kernel", flags)?);
        file.write_all(bytes)?;
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
        // Opened again, so that what is handed over is read only.
        File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    };
    make().map_err(|e| RunError::Host {
        lacks: format!("memory for the kernel {name}: {}", plain(&e)),
    })
}

fn core_file(path: &Path) -> Result<File, RunError> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path);
    opened.map_err(|e| configuration("core", path, plain(&e)))
}

/// Opens a disk and takes its lock: one writer, or any number of readers, on the whole host.
fn disk(spec: &DiskSpec) -> Result<File, RunError> {
    let what = format!("disk {}", spec.name);
    let path = spec.path.as_path();
    let fault = |e: io::Error| configuration(&what, path, plain(&e));
    let about = fs::metadata(path).map_err(fault)?;
    let block = about.file_type().is_block_device();
    if !about.is_file() && !block {
        let expected = "expected a regular file or a block device";
        return Err(configuration(&what, path, expected));
    }
    let read_only = spec.read_only || spec.ephemeral;
    // O_EXCL refuses a block device that is mounted or otherwise taken.
    let exclusive = if block && !read_only { libc::O_EXCL } else { 0 };
    let file = OpenOptions::new()
        .read(true)
        .write(!read_only)
        .custom_flags(exclusive | libc::O_NONBLOCK)
        .open(path)
        .map_err(fault)?;
    let flags = fcntl(file.as_fd(), FcntlArg::F_GETFL).map_err(|e| fault(e.into()))?;
    let blocking = OFlag::from_bits_truncate(flags) & !OFlag::O_NONBLOCK;
    fcntl(file.as_fd(), FcntlArg::F_SETFL(blocking)).map_err(|e| fault(e.into()))?;
    let now = file.metadata().map_err(fault)?;
    if (now.dev(), now.ino()) != (about.dev(), about.ino()) {
        return Err(configuration(
            &what,
            path,
            "was replaced while it was opened",
        ));
    }
    match lock(&file, Part::Use, !read_only) {
        Ok(()) => Ok(file),
        Err(Errno::EAGAIN | Errno::EACCES) => {
            let holder = holder(now.dev(), now.ino()).map_or_else(
                || "another process".to_owned(),
                |who| format!("process {who}"),
            );
            let how = if read_only { "write to" } else { "use" };
            let cause = format!("is in use: {holder} may {how} it");
            Err(configuration(&what, path, cause))
        }
        Err(errno) => Err(fault(errno.into())),
    }
}

/// A copy of a disk in a file without a name, which is gone with the last process that has it.
fn private_copy(spec: &DiskSpec, from: &File, directory: &Path) -> Result<File, RunError> {
    let what = format!("copy of disk {}", spec.name);
    fs::create_dir_all(directory).map_err(|e| configuration(&what, directory, plain(&e)))?;
    ephemeral::private_copy(from, directory)
        .map_err(|e| configuration(&what, directory, e.to_string()))
}

/// A process that has the file open, as "pid (name)", where `/proc` tells: a device process rather
/// than its broker.
fn holder(device: u64, inode: u64) -> Option<String> {
    let me = std::process::id();
    let mut found = None;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        if pid == me {
            continue;
        }
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        let same =
            |path: &Path| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (device, inode));
        if fds.flatten().any(|fd| same(&fd.path())) {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = command.split(|&b| b == 0).next().unwrap_or_default();
            let holder = format!("{pid} ({})", escaped(command));
            if command.starts_with(b"bulkhead-") {
                return Some(holder);
            }
            found.get_or_insert(holder);
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn second_writer_is_refused_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        fs::write(&path, [0; 512]).unwrap();
        let first = disk(&DiskSpec::for_test(&path, false)).unwrap();
        for read_only in [false, true] {
            let error = disk(&DiskSpec::for_test(&path, read_only))
                .unwrap_err()
                .to_string();
            assert!(error.contains("is in use"), "{error}");
        }
        drop(first);
        let reader = disk(&DiskSpec::for_test(&path, true)).unwrap();
        assert!(disk(&DiskSpec::for_test(&path, true)).is_ok());
        assert!(disk(&DiskSpec::for_test(&path, false)).is_err());
        drop(reader);
        assert!(disk(&DiskSpec::for_test(&path, false)).is_ok());
    }

    #[test]
    fn ephemeral_disk_is_a_copy_and_leaves_the_original_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        let original = File::create(&path).unwrap();
        original.set_len(3 << 20).unwrap();
        original.write_all_at(b"data", 2 << 20).unwrap();
        let spec = DiskSpec {
            ephemeral: true,
            ..DiskSpec::for_test(&path, false)
        };
        let copy = private_copy(&spec, &disk(&spec).unwrap(), dir.path()).unwrap();
        copy.write_all_at(b"DATA", 2 << 20).unwrap();
        let read = fs::read(&path).unwrap();
        assert_eq!((read.len(), &read[2 << 20..][..4]), (3 << 20, &b"data"[..]));
        assert!(copy.metadata().unwrap().blocks() < 4096, "holes stay holes");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_disk_is_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let error = disk(&DiskSpec::for_test(dir.path(), true))
            .unwrap_err()
            .to_string();
        assert!(error.contains("expected a regular file or a block device"));
        let missing = dir.path().join("missing\n.img");
        let error = disk(&DiskSpec::for_test(&missing, true))
            .unwrap_err()
            .to_string();
        assert!(error.contains("missing\\n.img"), "{error}");
        assert!(read_only("kernel", dir.path()).is_err());
    }

    #[test]
    fn built_in_kernel_is_sealed() {
        let file = image("guest", b"kernel").unwrap();
        assert!((&file).write_all(b"x").is_err());
        assert!(file.set_len(0).is_err());
    }
}
