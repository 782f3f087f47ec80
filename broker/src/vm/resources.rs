//! Everything that the broker opens on behalf of a machine's processes.
//!
//! A file that is missing, of the wrong kind or in use is an error here, before any process is
//! started. The broker keeps none of it once the processes have it.

use super::boot_files;
use super::home::MACHINES;
use super::record::Record;
use super::session::{RunError, RunOptions};
use super::spec::{DiskSpec, KernelSource, ShareSpec, VmSpec};
use super::vsock::{self, MachineSocket, SocketError};
use crate::escape::escaped;
use crate::image::ephemeral;
use crate::launch::{FolderTerms, Gift, Launcher};
use crate::network::Hold as NetHold;
use crate::remains;
use bulkhead_ipc::protocol::birth::{FdRole, ImageFormat};
use bulkhead_policies::cache::Compiled;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

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
    /// The files of the disks, in order, locked.
    pub disks: Vec<DiskFiles>,
    /// The shared folders, in order.
    pub folders: Vec<SharedFolder>,
    /// What the network devices are plugged into, in order.
    pub nets: Vec<NetHold>,
    /// The host's random numbers.
    pub entropy: File,
    /// The machine's Unix socket.
    pub vsock: Option<MachineSocket>,
    /// Whether the host's KVM is incomplete.
    pub quirks: bool,
}

/// A shared folder.
#[derive(Debug)]
pub struct SharedFolder {
    /// The directory, without any right to it.
    pub directory: File,
    /// How it is handed over.
    pub terms: FolderTerms,
    /// User and group of the guest that the owner's are.
    pub guest_owner: (u32, u32),
}

impl SharedFolder {
    /// Finds the directory of `spec`.
    ///
    /// # Errors
    /// When it cannot be had, or this user may not choose whose files are shared.
    pub fn open(spec: &ShareSpec) -> Result<Self, RunError> {
        let what = format!("share {}", spec.name);
        let fault = |e: &io::Error| configuration(&what, &spec.path, plain(e));
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
            .open(&spec.path);
        let directory = opened.map_err(|e| fault(&e))?;
        let about = directory.metadata().map_err(|e| fault(&e))?;
        let user = nix::unistd::geteuid();
        let owner = if user.is_root() {
            spec.owner.unwrap_or((about.uid(), about.gid()))
        } else {
            let own = (user.as_raw(), nix::unistd::getegid().as_raw());
            if spec.owner.is_some_and(|owner| owner != own) {
                let (user, group) = own;
                let expected = format!(
                    "only root shares files of others, expected owner = \"{user}:{group}\""
                );
                return Err(configuration(&what, &spec.path, expected));
            }
            own
        };
        Ok(Self {
            directory,
            terms: FolderTerms {
                owner,
                read_only: spec.read_only,
            },
            guest_owner: spec.guest_owner.unwrap_or(owner),
        })
    }
}

/// The files of one disk.
#[derive(Debug)]
pub struct DiskFiles {
    /// Those that are written, unless the disk is read only: its image with its extents, or what is
    /// written to an ephemeral disk.
    pub own: Vec<File>,
    /// The images below, the one next to it first. Only read.
    pub below: Vec<File>,
    /// Whether the first of its own grows.
    pub grows: bool,
}

impl DiskFiles {
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &File> {
        self.own.iter().chain(&self.below)
    }

    /// As they are handed over.
    pub fn gifts(&self) -> impl Iterator<Item = Gift<'_>> {
        let role = if self.grows {
            FdRole::Image
        } else {
            FdRole::Disk
        };
        let own = self.own.iter().zip(0..);
        let own = own.map(move |(file, index)| Gift::numbered(role, index, file.as_fd()));
        let below = self.below.iter().zip(0..);
        let below = below.map(|(file, index)| Gift::numbered(FdRole::Backing, index, file.as_fd()));
        own.chain(below)
    }
}

fn configuration(what: &str, path: &Path, cause: impl std::fmt::Display) -> RunError {
    let path = escaped(path.as_os_str().as_encoded_bytes()).to_string();
    RunError::Configuration(format!("{what} {path}: {cause}"))
}

pub(super) fn plain(error: &io::Error) -> String {
    let errno = error.raw_os_error().map(Errno::from_raw);
    errno.map_or_else(|| error.to_string(), |errno| errno.desc().to_owned())
}

impl Resources {
    /// Opens everything that `spec` names. A kernel on a disk is read by a process that `launcher` starts.
    ///
    /// # Errors
    /// The first thing that cannot be had, and why.
    pub fn open(
        spec: &VmSpec,
        options: &RunOptions,
        launcher: &mut Launcher,
        compiled: &Compiled,
    ) -> Result<Self, RunError> {
        let named = match &spec.kernel {
            KernelSource::File(path) => Some(read_only("kernel", path)?),
            KernelSource::Image { name, bytes } => Some(image(name, bytes)?),
            KernelSource::Disk(_) => None,
        };
        let initrd = spec.initrd.as_deref();
        let initrd = initrd.map(|path| read_only("initrd", path)).transpose()?;
        let open_disk = |spec: &DiskSpec| disk_files(spec, options);
        let disks: Result<Vec<_>, _> = spec.disks.iter().map(open_disk).collect();
        let disks = disks?;
        let (kernel, initrd) = match (named, &spec.kernel) {
            // The locks are held from here on until the machine is over: what is read now is what the
            // guest finds.
            (None, KernelSource::Disk(boot)) => {
                boot_files::take_out(spec, boot, &disks, options, launcher, compiled)?
            }
            (named, _) => (
                named.ok_or_else(|| RunError::Configuration("there is no kernel".to_owned()))?,
                initrd,
            ),
        };
        let folders: Result<_, _> = spec.shares.iter().map(SharedFolder::open).collect();
        Ok(Self {
            kernel,
            initrd,
            disks,
            folders: folders?,
            nets: spec
                .nets
                .iter()
                .enumerate()
                .map(|(n, net)| NetHold::open(&spec.name, n, net, &options.networks, false))
                .collect::<Result<_, _>>()?,
            core: options.core.as_deref().map(core_file).transpose()?,
            kvm: device("/dev/kvm", true)?,
            entropy: device("/dev/urandom", false)?,
            vsock: vsock(spec, options)?,
            quirks: Path::new("/sys/module/kvm_pvm").exists(),
        })
    }
}

/// Binds the machine's Unix socket.
fn vsock(spec: &VmSpec, options: &RunOptions) -> Result<Option<MachineSocket>, RunError> {
    let Some(path) = vsock::path_for(spec, options) else {
        return Ok(None);
    };
    let fault = |cause| match cause {
        SocketError::Io(cause) => configuration("vsock", &path, plain(&cause)),
        other => configuration("vsock", &path, other),
    };
    let mut socket = MachineSocket::at(&path).map_err(fault)?;
    let until = Instant::now() + remains::LONGEST;
    loop {
        match socket.listener() {
            Ok(_) => return Ok(Some(socket)),
            // Perhaps a process that is just being started has its descriptors from whoever is dead.
            Err(SocketError::InUse) if Instant::now() < until => {
                std::thread::sleep(REMAINS_POLL);
            }
            Err(error) => return Err(fault(error)),
        }
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
        let written = written.filter(|(spec, _)| Hold::of(spec) == Hold::Write);
        // A file description of its own, without a lock.
        let probe = |file: &File| File::open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let probes = written.flat_map(|(_, files)| &files.own).map(probe);
        let probes = probes.collect::<io::Result<_>>()?;
        Ok(Self { probes })
    }

    /// The same around the disks of a machine that another broker has started. One whose name is
    /// gone cannot be watched, nor be used by the next machine.
    #[must_use]
    pub fn around(spec: &VmSpec) -> Self {
        let written = spec.disks.iter().filter(|d| Hold::of(d) == Hold::Write);
        let paths = written.flat_map(|disk| {
            let extents = disk.extents.iter().map(|extent| &extent.path);
            std::iter::once(&disk.path).chain(extents)
        });
        let probes = paths.filter_map(|path| File::open(path).ok());
        Self {
            probes: probes.collect(),
        }
    }

    /// Whether nobody has a lock on any of the disks.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.probes.iter().all(|file| {
            let mut lock = range(libc::F_WRLCK, 0, 0);
            let asked = fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut lock));
            asked.is_err() || i32::from(lock.l_type) == libc::F_UNLCK
        })
    }
}

/// How often it is looked whether a dead process's lock is gone.
const REMAINS_POLL: Duration = Duration::from_millis(10);
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

/// Half of a part of a lock: readers take the first, those who share a disk that is written the second, and
/// a writer both. Readers and sharers each look at the other half when they have theirs, so that never
/// both succeed.
const HALF: i64 = 1 << 61;

/// Takes a part of the lock of a disk on its file description: one writer, any number of readers, or any
/// number of those who share it.
///
/// # Errors
/// EAGAIN or EACCES when it is taken.
pub(super) fn lock(file: &File, part: Part, hold: Hold) -> Result<(), Errno> {
    let start = match part {
        Part::Use => 0,
        Part::Guard => GUARD_FROM,
    };
    let both = range(libc::F_WRLCK, start, 2 * HALF);
    let set = |lock: libc::flock| fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&lock)).map(drop);
    let (own, others) = match hold {
        Hold::Write => return set(both),
        Hold::Read => (start, start + HALF),
        Hold::Share => (start + HALF, start),
    };
    set(range(libc::F_RDLCK, own, HALF))?;
    let mut other = range(libc::F_WRLCK, others, HALF);
    fcntl(file.as_fd(), FcntlArg::F_OFD_GETLK(&mut other))?;
    if i32::from(other.l_type) == libc::F_UNLCK {
        return Ok(());
    }
    set(range(libc::F_UNLCK, own, HALF))?;
    Err(Errno::EAGAIN)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    // A length that would pass the end of all files means up to there.
    let len = if start.checked_add(len).is_some() {
        len
    } else {
        0
    };
    libc::flock {
        l_type: i16::try_from(kind).unwrap_or(0),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or(0),
        l_start: start,
        l_len: len,
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
        sealed(&file)
    };
    make().map_err(|e| RunError::Host {
        lacks: format!("memory for the kernel {name}: {}", plain(&e)),
    })
}

/// Memory that nobody changes any more, open for reading alone.
pub(super) fn sealed(file: &File) -> io::Result<File> {
    fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(SealFlag::all()))?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
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

/// Opens everything that a disk is made of and takes the locks.
///
/// # Errors
/// As [`Resources::open`].
pub(super) fn disk_files(spec: &DiskSpec, options: &RunOptions) -> Result<DiskFiles, RunError> {
    let what = format!("disk {}", spec.name);
    let image = |path: &Path, hold| image_file(&what, path, hold, &options.runtime);
    let hold = Hold::of(spec);
    let paths = std::iter::once(&spec.path).chain(spec.extents.iter().map(|extent| &extent.path));
    let mut own: Vec<File> = paths
        .map(|path| image(path, hold))
        .collect::<Result<_, _>>()?;
    let mut below = Vec::new();
    if spec.ephemeral {
        below = own;
        let state = &options.state;
        let fault =
            |e: io::Error| configuration("directory for what is written to", state, plain(&e));
        fs::create_dir_all(state).map_err(fault)?;
        let scratch = ephemeral::unnamed_file(state).map_err(fault)?;
        lock(&scratch, Part::Use, Hold::Write).map_err(|e| fault(e.into()))?;
        own = vec![scratch];
    }
    for layer in &spec.backing {
        below.push(image(&layer.path, Hold::Read)?);
    }
    Ok(DiskFiles {
        own,
        below,
        grows: spec.ephemeral || spec.format == ImageFormat::Qcow2,
    })
}

/// What a file of a disk is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    /// Reading, beside others who read.
    Read,
    /// Reading and writing, alone.
    Write,
    /// Reading and writing, beside others who do the same and know of each other.
    Share,
}

impl Hold {
    /// How a machine holds a disk's own image.
    #[must_use]
    pub(super) const fn of(spec: &DiskSpec) -> Self {
        match (spec.read_only || spec.ephemeral, spec.shareable) {
            (true, _) => Self::Read,
            (false, true) => Self::Share,
            (false, false) => Self::Write,
        }
    }

    /// Whether anything is written.
    pub(super) const fn writes(self) -> bool {
        !matches!(self, Self::Read)
    }
}

/// Opens a file of a disk and takes its lock: one writer, or any number of readers, on the whole host.
/// `runtime` is where machines are looked for that may have it.
///
/// # Errors
/// What cannot be had, and who has it.
pub fn image_file(what: &str, path: &Path, hold: Hold, runtime: &Path) -> Result<File, RunError> {
    let read_only = hold == Hold::Read;
    let fault = |e: io::Error| configuration(what, path, plain(&e));
    let about = fs::metadata(path).map_err(fault)?;
    let block = about.file_type().is_block_device();
    if !about.is_file() && !block {
        let expected = "expected a regular file or a block device";
        return Err(configuration(what, path, expected));
    }
    // O_EXCL refuses a block device that is mounted or otherwise taken.
    let exclusive = if block && hold == Hold::Write {
        libc::O_EXCL
    } else {
        0
    };
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
            what,
            path,
            "was replaced while it was opened",
        ));
    }
    let until = Instant::now() + remains::LONGEST;
    loop {
        match lock(&file, Part::Use, hold) {
            Ok(()) => return Ok(file),
            Err(Errno::EAGAIN | Errno::EACCES) => {}
            Err(errno) => return Err(fault(errno.into())),
        }
        let holder = holding_process(now.dev(), now.ino());
        if holder.is_none() && Instant::now() < until {
            // Nobody has the file open: the kernel has not given up the ring of a process that is dead.
            std::thread::sleep(REMAINS_POLL);
            continue;
        }
        let holder = called(holder, runtime);
        let cause = match hold {
            Hold::Read => format!("is in use: {holder} may write to it"),
            Hold::Write => format!("is in use: {holder} may use it"),
            Hold::Share => format!(
                "is in use: {holder} may use it; a disk that machines share is `shareable` in all of them"
            ),
        };
        return Err(configuration(what, path, cause));
    }
}

/// Who has a file open: the machine whose process that is, or a process as "process pid (name)".
fn called(holder: Option<(u32, String)>, runtime: &Path) -> String {
    let Some((pid, name)) = holder else {
        return "another process".to_owned();
    };
    match machine_of(pid, runtime) {
        Some(vm) => format!("machine {vm} (its process {pid}, {name})"),
        None => format!("process {pid} ({name})"),
    }
}

/// The machine of this runtime directory that a process belongs to, where its record can be read.
fn machine_of(pid: u32, runtime: &Path) -> Option<String> {
    let pid = i32::try_from(pid).ok()?;
    let homes = fs::read_dir(runtime.join(MACHINES)).ok()?.flatten();
    let mut records = homes.filter_map(|home| Record::read(&home.path()).ok());
    let record = records.find(|record| record.processes.iter().any(|p| p.pid == pid))?;
    Some(record.spec.name)
}

/// A process that has the file open, and its name: a device process rather than its broker. This process
/// counts when it has it open more than once, for it has just opened it.
fn holding_process(device: u64, inode: u64) -> Option<(u32, String)> {
    let me = std::process::id();
    let mut found = None;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(fds) = fs::read_dir(entry.path().join("fd")) else {
            continue;
        };
        let same =
            |path: &Path| fs::metadata(path).is_ok_and(|m| (m.dev(), m.ino()) == (device, inode));
        let open = fds.flatten().filter(|fd| same(&fd.path())).count();
        if open > usize::from(pid == me) {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = command.split(|&b| b == 0).next().unwrap_or_default();
            let holder = (pid, escaped(command).to_string());
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
    use super::super::spec::BackingSpec;
    use super::*;

    fn open(path: &Path, writes: bool) -> Result<File, RunError> {
        let hold = if writes { Hold::Write } else { Hold::Read };
        image_file("disk d", path, hold, Path::new("/nowhere"))
    }

    #[test]
    fn second_writer_is_refused_and_readers_share() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        fs::write(&path, [0; 512]).unwrap();
        let first = open(&path, true).unwrap();
        for writes in [true, false] {
            let error = open(&path, writes).unwrap_err().to_string();
            assert!(error.contains("is in use"), "{error}");
        }
        drop(first);
        let reader = open(&path, false).unwrap();
        assert!(open(&path, false).is_ok());
        assert!(open(&path, true).is_err());
        drop(reader);
        assert!(open(&path, true).is_ok());
    }

    #[test]
    fn shared_disk_is_shared_with_those_alone_who_share_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        fs::write(&path, [0; 512]).unwrap();
        let open = |hold| image_file("disk d", &path, hold, Path::new("/nowhere"));
        let first = open(Hold::Share).unwrap();
        let second = open(Hold::Share).unwrap();
        for hold in [Hold::Read, Hold::Write] {
            let error = open(hold).unwrap_err().to_string();
            assert!(error.contains("is in use"), "{error}");
        }
        // Who was refused has left nothing behind.
        drop(first);
        drop(open(Hold::Share).unwrap());
        drop(second);
        let reader = open(Hold::Read).unwrap();
        let error = open(Hold::Share).unwrap_err().to_string();
        assert!(error.contains("`shareable` in all of them"), "{error}");
        drop(reader);
        drop(open(Hold::Write).unwrap());
        assert!(open(Hold::Share).is_ok());
    }

    #[test]
    fn ephemeral_disk_is_a_layer_and_leaves_the_original_to_others() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("d.img");
        fs::write(&path, [7; 512]).unwrap();
        let spec = DiskSpec {
            ephemeral: true,
            ..DiskSpec::for_test(&path, false)
        };
        let options = RunOptions {
            state: dir.path().join("state"),
            ..RunOptions::for_test("/nowhere".as_ref())
        };
        let files = disk_files(&spec, &options).unwrap();
        let _another = disk_files(&spec, &options).unwrap();
        let roles: Vec<_> = files.gifts().map(|gift| (gift.role, gift.index)).collect();
        assert_eq!(roles, [(FdRole::Image, 0), (FdRole::Backing, 0)]);
        assert!((&files.own[0]).write_all(b"x").is_ok());
        assert!((&files.below[0]).write_all(b"x").is_err());
    }

    #[test]
    fn files_of_a_chain_are_handed_over_in_its_order() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let below = |path, format| BackingSpec { path, format };
        let spec = DiskSpec {
            format: ImageFormat::Qcow2,
            backing: vec![
                below(file("middle"), ImageFormat::Qcow2),
                below(file("base"), ImageFormat::Raw),
            ],
            ..DiskSpec::for_test(&file("top"), false)
        };
        let options = RunOptions::for_test("/nowhere".as_ref());
        let files = disk_files(&spec, &options).unwrap();
        let names: Vec<_> = files
            .all()
            .map(|mut file| {
                let mut text = String::new();
                io::Read::read_to_string(&mut file, &mut text).unwrap();
                text
            })
            .collect();
        assert_eq!(names, ["top", "middle", "base"]);
        // Whoever writes to an image below would change this disk.
        assert!(open(&spec.backing[1].path, true).is_err());
        let error = open(&spec.path, false).unwrap_err().to_string();
        assert!(error.contains("is in use"), "{error}");
    }

    #[test]
    fn what_is_no_disk_is_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let error = open(dir.path(), false).unwrap_err().to_string();
        assert!(error.contains("expected a regular file or a block device"));
        let missing = dir.path().join("missing\n.img");
        let error = open(&missing, false).unwrap_err().to_string();
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
