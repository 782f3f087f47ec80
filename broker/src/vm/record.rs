//! The instance record: what a later broker must know of a machine that lives.
//!
//! One file for each machine, in its runtime directory, for the broker's user alone. The owner of the
//! machine replaces it whole, *before* the step that it announces: a process is on record before it
//! gets its birth message, and until then it ends with its broker. It is not synchronised to disk: it
//! says nothing that outlives the host's kernel, and one that a power failure has cut is found out.
//!
//! ```text
//!   bulkhead-record 1 CRC32\n        version of the form, checksum of the rest
//!   { … }                            JSON; unknown fields are ignored
//! ```
//!
//! It is a file, so it is believed only after a check: owner, mode, size, checksum, boot of the host,
//! every field. What it says of processes is a claim that `adopt.rs` verifies with the kernel and the
//! processes themselves. A field that is added needs a default, so that a new broker can take over
//! what an old one has started.

use super::session::RunOptions;
use super::spec::{DiskSpec, VmSpec};
use super::state::Verdict;
use crate::authority::sys::open_process;
use crate::escape::escaped;
use crate::launch::kill_process;
use crate::launch::users::UserRange;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::DiskLimits;
use nix::fcntl::{OFlag, openat, renameat};
use nix::sys::stat::Mode;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// File name of the record in its directory.
pub const FILE_NAME: &str = "record";
const NEW_NAME: &str = "record.new";
const MAGIC: &str = "bulkhead-record";
/// Version of the form.
const VERSION: u32 = 1;
/// Longest record in bytes; a machine with every device has less than 32 KiB.
pub const RECORD_BYTES_MAX: u64 = 1 << 20;
/// How long the kernel may take to end processes.
const KILL_PATIENCE: std::time::Duration = std::time::Duration::from_secs(5);
/// Most processes of a machine.
const PROCESSES_MAX: usize = 64;

/// Why a record is not believed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It cannot be read or written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// There is none.
    #[error("there is no record")]
    Missing,
    /// Somebody else could have written it.
    #[error("it belongs to user {owner} with mode {mode:o}, expected this user's alone")]
    Owner {
        /// Its owner.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
    /// It is no record, or not all of one.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It was written by another version of the program.
    #[error("its form has version {0}, expected {VERSION}")]
    Version(u32),
    /// The host has been started since: nothing that it names can be alive.
    #[error("it is of an earlier start of the host")]
    OtherBoot,
    /// It is too long to be kept.
    #[error("it would have {0} bytes, at most {RECORD_BYTES_MAX} are kept")]
    TooLong(usize),
}

/// How far a machine is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its processes are being started.
    Starting,
    /// All of them serve, or served once.
    Running,
    /// They are being ended, for this reason.
    Stopping(Verdict),
}

/// A process of the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Who.
    pub id: ProcId,
    /// Name in messages.
    pub name: String,
    /// virtio-mmio slot of a device.
    pub slot: Option<u8>,
    /// What proves a broker to it.
    pub token: [u8; 32],
    /// Its pid on the host.
    pub pid: i32,
    /// When it was started, in the kernel's ticks since the host's start: with the pid it names one
    /// process for ever.
    pub start_time: u64,
    /// Device and inode of its program.
    pub program: (u64, u64),
    /// The program's version, once the process has said it.
    #[serde(default)]
    pub version: Option<String>,
    /// Its control groups.
    #[serde(default)]
    pub groups: Vec<PathBuf>,
    /// The range that its user is of; `None` when it has no user of its own.
    #[serde(default)]
    pub users: Option<UserRange>,
}

/// A program of the host that a device is served with, and that ends with the device's process by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelperRecord {
    /// Name of the device.
    pub device: String,
    /// Its pid on the host.
    pub pid: i32,
    /// As [`ProcessRecord::start_time`].
    pub start_time: u64,
    /// Its control groups.
    #[serde(default)]
    pub groups: Vec<PathBuf>,
}

impl HelperRecord {
    /// Of a process that is not reaped.
    #[must_use]
    pub fn of(device: &str, pid: i32) -> Self {
        Self {
            device: device.to_owned(),
            pid,
            start_time: start_time(pid).unwrap_or(0),
            groups: Vec::new(),
        }
    }

    /// Kills it, and no other that has its pid by now.
    pub fn kill(&self) {
        kill(self.pid, self.start_time);
    }

    /// As [`ProcessRecord::is_alive`].
    #[must_use]
    pub fn is_alive(&self) -> bool {
        is_alive(self.pid, self.start_time)
    }
}

impl ProcessRecord {
    /// Kills the process, and no other that has its pid by now.
    pub fn kill(&self) {
        kill(self.pid, self.start_time);
    }

    /// Whether the process is alive: that one, and no other with its pid. One that is dead and not
    /// reaped counts as dead.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        is_alive(self.pid, self.start_time)
    }
}

fn kill(pid: i32, start_time: u64) {
    let Ok(handle) = open_process(pid) else {
        return;
    };
    // The handle is of whoever has the pid; if that is still it, no other can come between.
    if is_alive(pid, start_time) {
        // Dead meanwhile is as good.
        let _killed = kill_process(handle.as_fd());
    }
}

fn is_alive(pid: i32, start_time: u64) -> bool {
    Stat::of(pid).is_some_and(|stat| stat.start_time == start_time && !stat.dead)
}

/// The record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which start of the host it belongs to.
    pub boot_id: String,
    /// What the machine is.
    pub spec: VmSpec,
    /// Where things are, and what it is allowed.
    pub options: RunOptions,
    /// When it was started, in milliseconds since the host's start.
    pub began_ms: u64,
    /// How far it is.
    pub phase: Phase,
    /// How often it was started again.
    pub restarts: u32,
    /// The newest generation of its processes.
    pub generation: u32,
    /// Its processes, the vCPU process first. Of each place the newest alone.
    pub processes: Vec<ProcessRecord>,
    /// Programs of the host that its devices are served with, one for each device at most.
    #[serde(default)]
    pub helpers: Vec<HelperRecord>,
    /// Control groups around those of the processes.
    #[serde(default)]
    pub groups: Vec<PathBuf>,
    /// Devices that were lost on the way: name and reason.
    #[serde(default)]
    pub degraded: Vec<(String, String)>,
    /// Whether its owner has paused it.
    #[serde(default)]
    pub pause_wanted: bool,
    /// Disks for which the host has no room, for which it is paused.
    #[serde(default)]
    pub no_room: Vec<String>,
    /// Network devices whose cable was plugged in or pulled out, and whether it is in now.
    #[serde(default)]
    pub links: Vec<(String, bool)>,
    /// Disks whose limits were changed, and what they are now.
    #[serde(default)]
    pub limits: Vec<(String, DiskLimits)>,
    /// Disks that were given another size or another medium, as they are now.
    #[serde(default)]
    pub changed_disks: Vec<DiskSpec>,
}

impl Record {
    /// Of a machine that is about to be started.
    ///
    /// # Errors
    /// When the kernel does not say which start of the host this is.
    pub fn new(spec: &VmSpec, options: &RunOptions) -> io::Result<Self> {
        Ok(Self {
            boot_id: boot_id()?,
            spec: spec.clone(),
            options: options.clone(),
            began_ms: since_boot_ms(),
            phase: Phase::Starting,
            restarts: 0,
            generation: 0,
            processes: Vec::new(),
            helpers: Vec::new(),
            groups: Vec::new(),
            degraded: Vec::new(),
            pause_wanted: false,
            no_room: Vec::new(),
            links: Vec::new(),
            limits: Vec::new(),
            changed_disks: Vec::new(),
        })
    }

    /// Removes the control groups of processes that are dead.
    pub fn remove_groups(&self) {
        let inner = self.processes.iter().flat_map(|process| &process.groups);
        let helpers = self.helpers.iter().flat_map(|helper| &helper.groups);
        for group in inner.chain(helpers).chain(&self.groups) {
            // Busy while a process is not reaped; an empty group costs next to nothing.
            let _removed = fs::remove_dir(group);
        }
    }

    /// Ends every process on record that is alive, and waits for it a moment.
    pub fn kill_all(&self) {
        self.processes.iter().for_each(ProcessRecord::kill);
        self.helpers.iter().for_each(HelperRecord::kill);
        let until = std::time::Instant::now() + KILL_PATIENCE;
        let alive = || self.processes.iter().any(ProcessRecord::is_alive);
        while alive() && std::time::Instant::now() < until {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.remove_groups();
    }

    /// Whether the cable of a network device is plugged in, where that was changed.
    #[must_use]
    pub fn link_of(&self, device: &str) -> Option<bool> {
        let changed = self.links.iter().find(|(name, _)| name == device)?;
        Some(changed.1)
    }

    /// What a disk or network device may do now, where that was changed.
    #[must_use]
    pub fn limits_of(&self, device: &str) -> Option<DiskLimits> {
        let changed = self.limits.iter().find(|(name, _)| name == device)?;
        Some(changed.1)
    }

    /// A disk as it is now, where that was changed.
    #[must_use]
    pub fn changed_disk(&self, device: &str) -> Option<&DiskSpec> {
        self.changed_disks.iter().find(|disk| disk.name == device)
    }

    /// The machine with its disks as they are now.
    #[must_use]
    pub fn spec_now(&self) -> VmSpec {
        let mut spec = self.spec.clone();
        for disk in &mut spec.disks {
            if let Some(changed) = self.changed_disk(&disk.name) {
                disk.clone_from(changed);
            }
        }
        spec
    }

    /// The process with the place of `id`, whichever its generation.
    #[must_use]
    pub fn in_place_of(&self, id: ProcId) -> Option<&ProcessRecord> {
        let same = |p: &&ProcessRecord| (p.id.kind, p.id.index) == (id.kind, id.index);
        self.processes.iter().find(same)
    }

    /// Puts a program on record, in the place of the one that its device had before.
    pub fn put_helper(&mut self, helper: HelperRecord) {
        self.helpers.retain(|before| before.device != helper.device);
        self.helpers.push(helper);
    }

    /// Puts a process on record, in the place of the generation before it.
    pub fn put(&mut self, process: ProcessRecord) {
        let id = process.id;
        self.generation = self.generation.max(id.generation);
        let same = |p: &&mut ProcessRecord| (p.id.kind, p.id.index) == (id.kind, id.index);
        match self.processes.iter_mut().find(same) {
            Some(place) => *place = process,
            None => self.processes.push(process),
        }
    }

    /// The file's content.
    ///
    /// # Errors
    /// [`RecordError::TooLong`].
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        let json = serde_json::to_vec(self).map_err(|e| RecordError::Damaged(e.to_string()))?;
        let mut bytes = format!("{MAGIC} {VERSION} {:08x}\n", crc32fast::hash(&json)).into_bytes();
        bytes.extend(json);
        if bytes.len() as u64 > RECORD_BYTES_MAX {
            return Err(RecordError::TooLong(bytes.len()));
        }
        Ok(bytes)
    }

    /// Reads a file's content and checks every field that can be checked without the host.
    ///
    /// # Errors
    /// As [`RecordError`].
    pub fn decode(bytes: &[u8]) -> Result<Self, RecordError> {
        let damaged = |what: &str| RecordError::Damaged(what.to_owned());
        let line = bytes.iter().position(|&b| b == b'\n');
        let (head, json) = line
            .and_then(|at| Some((bytes.get(..at)?, bytes.get(at + 1..)?)))
            .ok_or_else(|| damaged("it has no first line"))?;
        let head = std::str::from_utf8(head).map_err(|_| damaged("its first line is no text"))?;
        let mut words = head.split(' ');
        if words.next() != Some(MAGIC) {
            return Err(damaged("it does not begin as a record does"));
        }
        let version = words.next().and_then(|word| word.parse().ok());
        match version {
            Some(VERSION) => {}
            Some(other) => return Err(RecordError::Version(other)),
            None => return Err(damaged("it names no version")),
        }
        let sum = format!("{:08x}", crc32fast::hash(json));
        if words.next() != Some(&sum) || words.next().is_some() {
            return Err(damaged("its checksum is wrong"));
        }
        let record: Self =
            serde_json::from_slice(json).map_err(|e| RecordError::Damaged(e.to_string()))?;
        record.check().map_err(RecordError::Damaged)?;
        Ok(record)
    }

    fn check(&self) -> Result<(), String> {
        self.spec.check().map_err(|e| e.to_string())?;
        if self.processes.len() > PROCESSES_MAX || self.helpers.len() > PROCESSES_MAX {
            return Err(format!(
                "{} processes with {} helpers",
                self.processes.len(),
                self.helpers.len()
            ));
        }
        if let Some(helper) = self.helpers.iter().find(|helper| helper.pid < 2) {
            return Err(format!("helper with pid {} cannot be", helper.pid));
        }
        for (n, process) in self.processes.iter().enumerate() {
            let id = process.id;
            let before = self.processes.iter().take(n);
            let twin = before
                .clone()
                .any(|p| (p.id.kind, p.id.index) == (id.kind, id.index) || p.pid == process.pid);
            let first = (n == 0) == (id.kind == ProcKind::Vcpu);
            // Pid 1 is the host's, 0 and less are groups.
            if twin || !first || process.pid < 2 || id.generation == 0 {
                return Err(format!("process {id} with pid {} cannot be", process.pid));
            }
            if id.generation > self.generation {
                return Err(format!("process {id} is of a generation to come"));
            }
        }
        Ok(())
    }

    /// Replaces the file in `directory`, all at once.
    ///
    /// # Errors
    /// [`RecordError::TooLong`], or the kernel's error; the old record is then still there.
    pub fn write(&self, directory: BorrowedFd<'_>) -> Result<(), RecordError> {
        let bytes = self.encode()?;
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC;
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let file = openat(directory, NEW_NAME, flags, mode).map_err(io::Error::from)?;
        File::from(file).write_all(&bytes)?;
        renameat(directory, NEW_NAME, directory, FILE_NAME).map_err(io::Error::from)?;
        Ok(())
    }

    /// Reads the record of the machine that lives in `home`.
    ///
    /// # Errors
    /// As [`RecordError`]: [`RecordError::Missing`] and [`RecordError::OtherBoot`] say that nothing of
    /// the machine can be alive.
    pub fn read(home: &Path) -> Result<Self, RecordError> {
        use std::os::unix::fs::OpenOptionsExt;
        let mut options = fs::OpenOptions::new();
        options.read(true);
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        let mut file = match options.open(home.join(FILE_NAME)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(RecordError::Missing),
            opened => opened?,
        };
        let about = file.metadata()?;
        if !about.is_file() || about.len() > RECORD_BYTES_MAX {
            return Err(RecordError::Damaged("it is no file of its size".into()));
        }
        // The directory decides who may replace the file.
        for about in [&about, &fs::symlink_metadata(home)?] {
            let (owner, mode) = (about.uid(), about.mode() & 0o7777);
            if owner != nix::unistd::geteuid().as_raw() || mode & 0o077 != 0 {
                return Err(RecordError::Owner { owner, mode });
            }
        }
        let mut bytes = Vec::new();
        (&mut file).take(RECORD_BYTES_MAX).read_to_end(&mut bytes)?;
        let record = Self::decode(&bytes)?;
        let named = home
            .file_name()
            .is_some_and(|name| name == record.spec.name.as_str());
        if !named {
            let name = escaped(record.spec.name.as_bytes()).to_string();
            return Err(RecordError::Damaged(format!(
                "it is of a machine named {name}"
            )));
        }
        if record.boot_id != boot_id()? {
            return Err(RecordError::OtherBoot);
        }
        Ok(record)
    }
}

/// Which start of the host this is.
fn boot_id() -> io::Result<String> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    Ok(id.trim().to_owned())
}

/// Milliseconds since the host's start, suspended time included.
#[must_use]
pub fn since_boot_ms() -> u64 {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |now| {
        let now = std::time::Duration::from(now);
        u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
    })
}

/// What the kernel says of a process in `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    start_time: u64,
    dead: bool,
}

impl Stat {
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may hold anything.
        let (_, rest) = stat.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let state = fields.next()?;
        Some(Self {
            // The state is field 3, the start field 22.
            start_time: fields.nth(22 - 4)?.parse().ok()?,
            dead: matches!(state, "Z" | "X"),
        })
    }
}

/// When process `pid` was started, in the kernel's ticks since the host's start; `None` when there is
/// none.
#[must_use]
pub fn start_time(pid: i32) -> Option<u64> {
    Stat::of(pid).map(|stat| stat.start_time)
}

/// Whether there is no process `pid`, or only what its parent has not reaped.
#[must_use]
pub fn is_dead(pid: i32) -> bool {
    Stat::of(pid).is_none_or(|stat| stat.dead)
}

#[cfg(test)]
mod tests {
    use super::super::session::Ending;
    use super::super::spec::{BackingSpec, DiskSpec, FileSpec, KernelSource};
    use super::*;
    use bulkhead_ipc::protocol::birth::{DiskLimits, ImageFormat};
    use proptest::prelude::*;
    use std::ffi::OsStr;
    use std::os::fd::AsFd;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;

    fn process(kind: ProcKind, index: u16, generation: u32, pid: i32) -> ProcessRecord {
        ProcessRecord {
            id: ProcId {
                kind,
                index,
                generation,
            },
            name: kind.name().to_owned(),
            slot: None,
            token: [7; 32],
            pid,
            start_time: 99,
            program: (1, 2),
            version: None,
            groups: vec!["/sys/fs/cgroup/x".into()],
            users: Some(UserRange::DEFAULT),
        }
    }

    fn record() -> Record {
        let odd = Path::new(OsStr::from_bytes(b"/k\xffernel"));
        let mut spec = VmSpec::new("web", KernelSource::File(odd.to_owned()));
        spec.disks.push(DiskSpec {
            name: "root".into(),
            path: "/d.img".into(),
            read_only: false,
            ephemeral: true,
            serial: "s".into(),
            format: ImageFormat::Qcow2,
            extents: vec![FileSpec { path: "/x".into() }],
            backing: vec![BackingSpec {
                path: odd.to_owned(),
                format: ImageFormat::Raw,
            }],
            limits: DiskLimits::default(),
            shareable: true,
            queues: 2,
            bytes_min: 1 << 30,
        });
        let options = RunOptions {
            cache: Some("/c".into()),
            ..RunOptions::for_test("/r".as_ref())
        };
        let mut record = Record::new(&spec, &options).unwrap();
        record.put(process(ProcKind::Vcpu, 0, 1, 100));
        record.put(process(ProcKind::Blk, 0, 1, 101));
        record.put(process(ProcKind::Blk, 0, 4, 102));
        record
    }

    #[test]
    fn what_was_written_is_read_and_of_each_place_the_newest_process() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("web");
        fs::create_dir(&home).unwrap();
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        assert!(matches!(Record::read(&home), Err(RecordError::Missing)));
        let directory = File::open(&home).unwrap();
        let mut record = record();
        for phase in [
            Phase::Starting,
            Phase::Running,
            Phase::Stopping(Verdict::Finished(Ending::Killed)),
        ] {
            record.phase = phase;
            record.write(directory.as_fd()).unwrap();
            assert_eq!(Record::read(&home).unwrap(), record);
        }
        assert_eq!((record.processes.len(), record.generation), (2, 4));
        let mode = fs::metadata(home.join(FILE_NAME)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(&home).unwrap().count(), 1);
    }

    #[test]
    fn record_that_somebody_else_could_have_written_is_not_believed() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("web");
        fs::create_dir(&home).unwrap();
        record().write(File::open(&home).unwrap().as_fd()).unwrap();
        for (path, mode) in [(home.clone(), 0o777), (home.join(FILE_NAME), 0o660)] {
            fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Record::read(&home);
            assert!(matches!(read, Err(RecordError::Owner { .. })), "{read:?}");
        }
        fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
        fs::rename(home.join(FILE_NAME), home.join("real")).unwrap();
        std::os::unix::fs::symlink("real", home.join(FILE_NAME)).unwrap();
        assert!(matches!(Record::read(&home), Err(RecordError::Io(_))));
    }

    #[test]
    fn record_of_another_machine_or_another_boot_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let home = |name: &str| {
            let home = dir.path().join(name);
            fs::create_dir(&home).unwrap();
            fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
            home
        };
        let (mine, other) = (home("web"), home("other"));
        let mut record = record();
        record.write(File::open(&other).unwrap().as_fd()).unwrap();
        assert!(matches!(Record::read(&other), Err(RecordError::Damaged(_))));
        record.boot_id = "earlier".into();
        record.write(File::open(&mine).unwrap().as_fd()).unwrap();
        assert!(matches!(Record::read(&mine), Err(RecordError::OtherBoot)));
    }

    #[test]
    fn fields_that_cannot_be_are_refused() {
        type Break = fn(&mut Record);
        let faults: [Break; 7] = [
            |r| r.spec.name = "../x".into(),
            |r| r.spec.vcpus = 0,
            |r| r.processes[1].pid = 1,
            |r| r.processes[1].pid = -7,
            |r| r.processes[1].pid = r.processes[0].pid,
            |r| r.processes[1].id.kind = ProcKind::Vcpu,
            |r| r.generation = 3,
        ];
        for (n, breaks) in faults.into_iter().enumerate() {
            let mut record = record();
            breaks(&mut record);
            let read = Record::decode(&record.encode().unwrap());
            assert!(
                matches!(read, Err(RecordError::Damaged(_))),
                "{n}: {read:?}"
            );
        }
    }

    #[test]
    fn record_of_an_older_program_is_read_and_of_another_form_is_not() {
        let record = record();
        let bytes = record.encode().unwrap();
        let text = String::from_utf8(bytes.clone()).unwrap();
        let (_, json) = text.split_once('\n').unwrap();
        let signed = |version: u32, json: &str| {
            let sum = crc32fast::hash(json.as_bytes());
            format!("{MAGIC} {version} {sum:08x}\n{json}").into_bytes()
        };
        let newer = json.replacen('{', "{\"added_later\":[1],", 1);
        assert_eq!(Record::decode(&signed(1, &newer)).unwrap(), record);
        let older = json.replace(",\"degraded\":[]", "");
        assert!(older.len() < json.len());
        assert_eq!(Record::decode(&signed(1, &older)).unwrap(), record);
        let next = Record::decode(&signed(2, json));
        assert!(matches!(next, Err(RecordError::Version(2))));
    }

    #[test]
    fn process_is_named_by_pid_and_start() {
        let me = i32::try_from(std::process::id()).unwrap();
        let started = start_time(me).unwrap();
        assert!(started > 0);
        assert_eq!(start_time(me), Some(started));
        assert_eq!(start_time(-1), None);
        let mut record = process(ProcKind::Rng, 0, 1, me);
        record.start_time = started;
        assert!(record.is_alive());
        record.start_time += 1;
        assert!(!record.is_alive(), "another process has its pid");
    }

    proptest! {
        #[test]
        fn damage_anywhere_is_found(at in 0usize..4096, flip in 1u8..=255) {
            let mut bytes = record().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= flip;
            prop_assert!(Record::decode(&bytes).is_err());
        }

        #[test]
        fn record_cut_anywhere_is_refused(len in 0usize..4096) {
            let bytes = record().encode().unwrap();
            let len = len % bytes.len();
            prop_assert!(Record::decode(&bytes[..len]).is_err());
        }

        #[test]
        fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(Record::decode(&bytes).is_err());
            let mut signed = format!("{MAGIC} 1 {:08x}\n", crc32fast::hash(&bytes)).into_bytes();
            signed.extend(bytes);
            prop_assert!(Record::decode(&signed).is_err());
        }
    }
}
