//! What a virtual machine is to be: plain, checked data, as the VM file or the options of `run`
//! describe it.
//!
//! The parser of VM files makes a [`VmSpec`]; [`VmSpec::check`] holds the rules that do not depend
//! on the notation. Nothing here opens a file or starts a process.

use super::any_path;
pub use super::net_spec::{
    MTU_BYTES, NET_QUEUES_MAX, NETWORK_NAME_RULE, NetSource, NetSpec, is_network_name,
    is_published, is_unicast, parse_mac, show_mac,
};
use bulkhead_ipc::platform::{MEMORY_BYTES_MIN, VCPUS_MAX, VIRTIO_MMIO_SLOTS};
use bulkhead_ipc::protocol::birth::{DiskLimits, HugePages, ImageFormat};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

/// Longest name of a VM or a device in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest kernel command line in bytes.
pub const CMDLINE_BYTES_MAX: usize = 4096;
/// Longest serial number of a disk in bytes (virtio 1.2, section 5.2.6).
pub const SERIAL_BYTES_MAX: usize = 20;
/// Most queues of one disk.
pub const DISK_QUEUES_MAX: u8 = 8;
/// Most files of one disk: its image and extents, and as many below it.
pub const FILES_MAX: usize = 32;
/// Longest name of a shared folder in bytes: its tag in the guest (virtio 1.2, section 5.11.4).
pub const TAG_BYTES_MAX: usize = 36;
/// How long a guest may believe what it was told of a shared folder, in milliseconds, unless it is said.
pub const SHARE_CACHE_MS: u32 = 1000;
/// The same, at most.
pub const SHARE_CACHE_MS_MAX: u32 = 3_600_000;
/// Slots for disks, network devices and others: all but console's and rng's.
pub const DEVICES_MAX: usize = VIRTIO_MMIO_SLOTS - 2;
/// What no device may be called that has a name: so the others are called in commands.
pub const TAKEN_NAMES: [&str; 5] = ["vcpu", "legacy", "console", "rng", "vsock"];
/// Context ids that a guest may have: those below are the host's, the last means any (virtio 1.2, section
/// 5.10.4).
pub const CIDS: std::ops::RangeInclusive<u32> = 3..=u32::MAX - 1;
/// Longest file name of a machine's Unix socket in bytes: with a port behind it, it has to fit a socket's
/// address, in which its directory is a descriptor.
pub const SOCKET_NAME_BYTES_MAX: usize = 64;
/// Smallest and largest history of a console in bytes.
pub const HISTORY_BYTES: (u64, u64) = (4096, 64 << 20);

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Name; letters, digits, `-`, `_`, `.`; at most [`NAME_BYTES_MAX`] bytes.
    pub name: String,
    /// Number of vCPUs, 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 4096, at least [`MEMORY_BYTES_MIN`].
    pub memory_bytes: u64,
    /// Backing of guest memory.
    pub huge_pages: HugePages,
    /// What is booted.
    pub kernel: KernelSource,
    /// Initial RAM disk.
    #[serde(with = "any_path::option")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, at most [`CMDLINE_BYTES_MAX`] bytes, without the `console=` that
    /// [`ConsoleSpec::on_cmdline`] adds.
    pub cmdline: String,
    /// Disks, in slot order.
    pub disks: Vec<DiskSpec>,
    /// The socket device.
    #[serde(default)]
    pub vsock: Option<VsockSpec>,
    /// Shared folders, in slot order, behind the disks.
    #[serde(default)]
    pub shares: Vec<ShareSpec>,
    /// Network devices, in slot order.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// The consoles.
    pub console: ConsoleSpec,
    /// What cloud-init finds on a disk of its own, [`SEED_DISK`].
    #[serde(default)]
    pub cloud_init: Option<CloudInitSpec>,
    /// What happens when the guest ends by itself.
    pub lifecycle: Lifecycle,
    /// Whether the daemon starts it when the host starts; `run` does not care.
    pub autostart: bool,
    /// Deadlines and caps.
    pub limits: Limits,
}

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KernelSource {
    /// A file of the host.
    File(#[serde(with = "any_path")] PathBuf),
    /// An image inside this program: the built-in guest.
    Image {
        /// For messages.
        name: Cow<'static, str>,
        /// Its bytes.
        bytes: Cow<'static, [u8]>,
    },
    /// A file on one of the machine's disks, looked for at each start.
    Disk(BootDisk),
}

/// What is booted from a disk. Paths are those of the guest, from the root of the file system that the kernel is
/// found in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootDisk {
    /// Name of the disk.
    pub disk: String,
    /// The kernel; `None` for the newest.
    pub kernel: Option<String>,
    /// The initial RAM disk; `None` for that of the kernel, if there is one.
    pub initrd: Option<String>,
}

/// Longest path on a guest's disk in bytes.
pub const GUEST_PATH_BYTES_MAX: usize = 4096;

/// Whether `path` can be that of a file on a guest's disk.
#[must_use]
pub fn is_guest_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= GUEST_PATH_BYTES_MAX && !path.contains('\0')
}

/// A file by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSpec {
    /// Where it is.
    #[serde(with = "any_path")]
    pub path: PathBuf,
}

/// An image below another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackingSpec {
    /// Where it is.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
}

/// A disk: an image or a block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// Name in messages, as [`VmSpec::name`].
    pub name: String,
    /// The image.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Its format.
    #[serde(default = "raw")]
    pub format: ImageFormat,
    /// The files with the data of a VMDK image, in the order of its descriptor.
    #[serde(default)]
    pub extents: Vec<FileSpec>,
    /// The images below it, the one next to it first.
    #[serde(default)]
    pub backing: Vec<BackingSpec>,
    /// Whether the guest's writes are refused.
    pub read_only: bool,
    /// Whether the guest's writes go to a private layer that is gone at the end.
    pub ephemeral: bool,
    /// What it may do in a second.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Whether other machines may write to it at the same time.
    #[serde(default)]
    pub shareable: bool,
    /// What the guest reads as the disk's identifier, at most [`SERIAL_BYTES_MAX`] bytes.
    pub serial: String,
    /// Number of virtqueues, 1 to [`DISK_QUEUES_MAX`].
    pub queues: u8,
    /// What it was grown to in bytes while its machine ran; 0 where it was not.
    #[serde(default)]
    pub bytes_min: u64,
}

/// What cloud-init is told. Files that are not given are made up, but for that of the network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CloudInitSpec {
    /// What to do.
    #[serde(with = "any_path::option")]
    pub user_data: Option<PathBuf>,
    /// Which machine it is.
    #[serde(with = "any_path::option")]
    pub meta_data: Option<PathBuf>,
    /// How its network is configured.
    #[serde(with = "any_path::option")]
    pub network_config: Option<PathBuf>,
    /// Public keys that may log in; only without [`CloudInitSpec::meta_data`], which says that, too.
    pub ssh_keys: Vec<String>,
    /// Host name, the machine's name unless it is given; as above.
    pub hostname: Option<String>,
}

/// Name of the disk that cloud-init reads.
pub const SEED_DISK: &str = "cloud-init";

/// A directory of the host that the guest can mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareSpec {
    /// Name in messages and tag in the guest, as [`VmSpec::name`], at most [`TAG_BYTES_MAX`] bytes.
    pub name: String,
    /// The directory.
    #[serde(with = "any_path")]
    pub path: PathBuf,
    /// Whether the guest's changes are refused.
    pub read_only: bool,
    /// User and group on the host whose files it can use, and which own what it makes; `None` for those that own
    /// the directory.
    pub owner: Option<(u32, u32)>,
    /// Who these are in the guest; `None` for the same numbers.
    pub guest_owner: Option<(u32, u32)>,
    /// How long the guest may believe names and attributes without asking, in milliseconds.
    pub cache_ms: u32,
}

impl ShareSpec {
    /// One that is writable, with every default.
    #[must_use]
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            read_only: false,
            owner: None,
            guest_owner: None,
            cache_ms: SHARE_CACHE_MS,
        }
    }

    fn check(&self, n: usize) -> Result<(), SpecError> {
        check_name(&format!("share[{n}].name"), &self.name)?;
        expect(
            self.name.len() <= TAG_BYTES_MAX,
            &format!("share[{n}].name"),
            &self.name,
            "at most 36 bytes, for it is the guest's tag",
        )?;
        expect(
            self.cache_ms <= SHARE_CACHE_MS_MAX,
            &format!("share[{n}].cache_ms"),
            self.cache_ms,
            "at most an hour",
        )
    }
}

const fn raw() -> ImageFormat {
    ImageFormat::Raw
}

#[cfg(test)]
impl DiskSpec {
    /// A disk with nothing special about it.
    pub(super) fn for_test(path: &std::path::Path, read_only: bool) -> Self {
        Self {
            name: "d".into(),
            path: path.into(),
            format: ImageFormat::Raw,
            extents: Vec::new(),
            backing: Vec::new(),
            read_only,
            ephemeral: false,
            limits: DiskLimits::default(),
            shareable: false,
            serial: String::new(),
            queues: 1,
            bytes_min: 0,
        }
    }
}

/// A socket device: connections between programs of the guest and Unix sockets of the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockSpec {
    /// Context id of the guest, in [`CIDS`].
    pub cid: u32,
    /// The Unix socket at which clients ask for connections to the guest; listeners for connections from
    /// the guest are beside it, as `PATH_PORT`. `None` for the one in the machine's runtime directory.
    #[serde(with = "any_path::option")]
    pub path: Option<PathBuf>,
}

impl Default for VsockSpec {
    fn default() -> Self {
        Self {
            cid: *CIDS.start(),
            path: None,
        }
    }
}

/// The consoles: a serial port always, and a virtio console.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleSpec {
    /// Whether there is a virtio console.
    pub virtio: bool,
    /// The console that a terminal attaches to.
    pub attach: ConsoleChoice,
    /// Whether `console=` for [`ConsoleSpec::attach`] is added to a command line that has none.
    pub on_cmdline: bool,
    /// Bytes of output kept of each console.
    pub history_bytes: u64,
    /// Columns and rows of the virtio console at start.
    pub size: (u16, u16),
}

/// One of the consoles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum ConsoleChoice {
    /// The 8250 at COM1 (`ttyS0`).
    Serial,
    /// The virtio console (`hvc0`).
    Virtio,
}

/// What happens when the guest ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifecycle {
    /// After power-off.
    pub on_poweroff: OnEnd,
    /// After a reset.
    pub on_reboot: OnEnd,
    /// After a guest panic, a triple fault, a KVM internal error or the loss of the vCPU process.
    pub on_crash: OnEnd,
    /// When the host shuts down and the power button has not ended it in time: its power is cut
    /// ([`OnEnd::Destroy`]), its power is cut and it starts again with the host
    /// ([`OnEnd::Restart`]), or nothing is done to it ([`OnEnd::Preserve`]).
    pub on_host_shutdown: OnEnd,
    /// When the host has no room for what the guest writes to a disk.
    #[serde(default)]
    pub on_disk_full: OnDiskFull,
}

/// What to do when the host has no room for what the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum OnDiskFull {
    /// The machine is paused, and goes on when there is room. Nothing is lost.
    #[default]
    Pause,
    /// The write fails; the guest has to cope.
    Error,
}

/// What to do with a machine that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum OnEnd {
    /// It is over.
    Destroy,
    /// It starts again from the beginning, in new processes.
    Restart,
    /// It stays as it is, stopped, until it is killed.
    Preserve,
}

/// Deadlines and caps. Nothing waits without one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// After this the machine is killed and the exit code is 124; `None` for no time-out.
    pub run_timeout: Option<Duration>,
    /// Time a process has from its start to being locked.
    pub birth_timeout: Duration,
    /// Time a process has to end when told to.
    pub shutdown_timeout: Duration,
    /// Restarts by [`OnEnd::Restart`] within one run before the machine is given up.
    pub restarts_max: u32,
    /// What the machine may take of the host's processors and disks.
    #[serde(default)]
    pub share: HostShare,
}

/// What a machine may take of its host at most, all its processes together; `None` for no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostShare {
    /// Its weight when processors are short, 1 to 10,000; others have 100.
    pub cpu_weight: Option<u32>,
    /// Processor time in percent of one processor, 1 to 100,000.
    pub cpu_percent: Option<u32>,
    /// Bytes a second read from each host disk that its images are on.
    pub disk_read_per_s: Option<u64>,
    /// The same for writes.
    pub disk_write_per_s: Option<u64>,
    /// Reads a second of each host disk that its images are on.
    pub disk_read_iops: Option<u32>,
    /// The same for writes.
    pub disk_write_iops: Option<u32>,
}

impl HostShare {
    /// Whether it limits anything of disks.
    #[must_use]
    pub fn limits_disks(&self) -> bool {
        let processors = Self {
            cpu_weight: self.cpu_weight,
            cpu_percent: self.cpu_percent,
            ..Self::default()
        };
        *self != processors
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            run_timeout: None,
            birth_timeout: Duration::from_secs(20),
            shutdown_timeout: Duration::from_secs(5),
            restarts_max: 1000,
            share: HostShare::default(),
        }
    }
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            on_poweroff: OnEnd::Destroy,
            on_reboot: OnEnd::Restart,
            on_crash: OnEnd::Destroy,
            on_host_shutdown: OnEnd::Destroy,
            on_disk_full: OnDiskFull::Pause,
        }
    }
}

impl Default for ConsoleSpec {
    fn default() -> Self {
        Self {
            virtio: true,
            attach: ConsoleChoice::Serial,
            on_cmdline: true,
            history_bytes: bulkhead_ipc::output_ring::CAPACITY_BYTES_DEFAULT,
            size: (80, 25),
        }
    }
}

impl VmSpec {
    /// A machine with the defaults: one vCPU, 256 MiB, no disks.
    #[must_use]
    pub fn new(name: impl Into<String>, kernel: KernelSource) -> Self {
        Self {
            name: name.into(),
            vcpus: 1,
            memory_bytes: 256 << 20,
            huge_pages: HugePages::Transparent,
            kernel,
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            vsock: None,
            shares: Vec::new(),
            nets: Vec::new(),
            console: ConsoleSpec::default(),
            cloud_init: None,
            lifecycle: Lifecycle::default(),
            autostart: false,
            limits: Limits::default(),
        }
    }

    /// Checks every rule that can be checked without looking at the host.
    ///
    /// # Errors
    /// The first field that is wrong.
    pub fn check(&self) -> Result<(), SpecError> {
        check_name("name", &self.name)?;
        expect(
            (1..=VCPUS_MAX).contains(&self.vcpus),
            "vcpus",
            self.vcpus,
            "1 to 32",
        )?;
        let memory_fits =
            self.memory_bytes >= MEMORY_BYTES_MIN && self.memory_bytes.is_multiple_of(4096);
        expect(
            memory_fits,
            "memory",
            self.memory_bytes,
            "at least 16MiB, in whole 4 KiB pages",
        )?;
        expect(
            self.cmdline_in_full().len() <= CMDLINE_BYTES_MAX && !self.cmdline.contains('\0'),
            "cmdline",
            format!("{} bytes", self.cmdline.len()),
            "at most 4096 bytes without NUL",
        )?;
        if let Some(vsock) = &self.vsock {
            vsock.check()?;
        }
        expect(
            self.devices() <= DEVICES_MAX,
            "devices",
            self.devices(),
            "at most 14 disks, network devices, shared folders and socket devices together",
        )?;
        for (n, disk) in self.disks.iter().enumerate() {
            disk.check(n)?;
        }
        if let KernelSource::Disk(boot) = &self.kernel {
            self.check_boot_disk(boot)?;
        }
        for (n, share) in self.shares.iter().enumerate() {
            share.check(n)?;
        }
        for (n, net) in self.nets.iter().enumerate() {
            net.check(n)?;
        }
        self.check_names()?;
        let (least, most) = HISTORY_BYTES;
        expect(
            (least..=most).contains(&self.console.history_bytes),
            "console.history",
            self.console.history_bytes,
            "4KiB to 64MiB",
        )?;
        expect(
            self.console.virtio || self.console.attach == ConsoleChoice::Serial,
            "console.attach",
            "virtio",
            "a console that exists",
        )
    }

    /// Devices besides console and rng, with the disk that cloud-init reads, which is made at each start.
    fn devices(&self) -> usize {
        let has_seed = self.disks.iter().any(|disk| disk.name == SEED_DISK);
        let seed = usize::from(self.cloud_init.is_some() && !has_seed);
        let socket = usize::from(self.vsock.is_some());
        self.disks.len() + seed + self.nets.len() + self.shares.len() + socket
    }

    /// Whether a disk, folder or network device is called so.
    #[must_use]
    pub fn has_device(&self, name: &str) -> bool {
        self.names().any(|(_, _, other)| other == name)
    }

    /// The names of devices, each with its key in the VM file and its place there.
    fn names(&self) -> impl Iterator<Item = (&'static str, usize, &String)> {
        let disks = self.disks.iter().map(|disk| &disk.name).enumerate();
        let shares = self.shares.iter().map(|share| &share.name).enumerate();
        let nets = self.nets.iter().map(|net| &net.name).enumerate();
        let all = disks.map(|named| ("disk", named));
        let all = all.chain(shares.map(|named| ("share", named)));
        let all = all.chain(nets.map(|named| ("net", named)));
        all.map(|(key, (n, name))| (key, n, name))
    }

    fn check_names(&self) -> Result<(), SpecError> {
        let mut taken: HashSet<&str> = TAKEN_NAMES.into();
        for (key, n, name) in self.names() {
            if key != "disk" && self.cloud_init.is_some() {
                taken.insert(SEED_DISK);
            }
            expect(
                taken.insert(name),
                &format!("{key}[{n}].name"),
                name,
                "a name that no other device has",
            )?;
        }
        Ok(())
    }

    fn check_boot_disk(&self, boot: &BootDisk) -> Result<(), SpecError> {
        expect(
            self.disks.iter().any(|disk| disk.name == boot.disk),
            "boot.from_disk",
            &boot.disk,
            "the name of one of the machine's disks",
        )?;
        for (field, path) in [("boot.kernel", &boot.kernel), ("boot.initrd", &boot.initrd)] {
            let path = path.as_deref().unwrap_or("/");
            let expected = "a path on the disk, from `/`, of at most 4096 bytes without NUL";
            expect(is_guest_path(path), field, path, expected)?;
        }
        expect(
            self.initrd.is_none(),
            "initrd",
            self.initrd
                .as_deref()
                .map_or(String::new(), |path| path.display().to_string()),
            "none beside a kernel from a disk, which has its own",
        )
    }

    /// The command line with the `console=` of the attached console, unless it has one.
    #[must_use]
    pub fn cmdline_in_full(&self) -> String {
        let has = self
            .cmdline
            .split_ascii_whitespace()
            .any(|word| word.starts_with("console="));
        if has || !self.console.on_cmdline {
            return self.cmdline.clone();
        }
        let console = match self.console.attach {
            ConsoleChoice::Serial => "console=ttyS0",
            ConsoleChoice::Virtio => "console=hvc0",
        };
        format!("{console} {}", self.cmdline).trim_end().to_owned()
    }
}

impl VsockSpec {
    fn check(&self) -> Result<(), SpecError> {
        expect(
            CIDS.contains(&self.cid),
            "vsock.cid",
            self.cid,
            "3 to 4294967294",
        )?;
        let Some(path) = &self.path else {
            return Ok(());
        };
        let name = path.file_name();
        expect(
            name.is_some_and(|name| name.len() <= SOCKET_NAME_BYTES_MAX),
            "vsock.path",
            path.display(),
            "a path whose last part has at most 64 bytes",
        )
    }
}

impl DiskSpec {
    pub(super) fn check(&self, n: usize) -> Result<(), SpecError> {
        check_name(&format!("disk[{n}].name"), &self.name)?;
        expect(
            self.serial.len() <= SERIAL_BYTES_MAX && self.serial.is_ascii(),
            &format!("disk[{n}].serial"),
            &self.serial,
            "at most 20 ASCII characters",
        )?;
        expect(
            (1..=DISK_QUEUES_MAX).contains(&self.queues),
            &format!("disk[{n}].queues"),
            self.queues,
            "1 to 8",
        )
    }
}

/// A field of a [`VmSpec`] that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} is {value:?}, expected {expected}")]
pub struct SpecError {
    /// The field.
    pub field: String,
    /// Its value.
    pub value: String,
    /// What it may be.
    pub expected: &'static str,
}

pub(super) fn expect(
    holds: bool,
    field: &str,
    value: impl ToString,
    expected: &'static str,
) -> Result<(), SpecError> {
    if holds {
        return Ok(());
    }
    Err(SpecError {
        field: field.to_owned(),
        value: value.to_string(),
        expected,
    })
}

pub(super) fn check_name(field: &str, name: &str) -> Result<(), SpecError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let good = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric());
    expect(
        good,
        field,
        name,
        "1 to 64 letters, digits, '-', '_' or '.', starting with a letter or digit",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec::new("vm", KernelSource::File("vmlinux".into()))
    }

    fn disk(name: &str) -> DiskSpec {
        DiskSpec {
            name: name.into(),
            path: "d.img".into(),
            read_only: false,
            ephemeral: false,
            serial: "s".into(),
            format: ImageFormat::Raw,
            extents: Vec::new(),
            backing: Vec::new(),
            limits: DiskLimits::default(),
            shareable: false,
            queues: 1,
            bytes_min: 0,
        }
    }

    #[test]
    fn defaults_are_accepted() {
        assert_eq!(spec().check(), Ok(()));
    }

    #[test]
    fn each_wrong_field_is_named() {
        type Break = fn(&mut VmSpec);
        let faults: [(&str, Break); 14] = [
            ("name", |s| s.name = "a b".into()),
            ("name", |s| s.name = "..".into()),
            ("vcpus", |s| s.vcpus = 33),
            ("memory", |s| s.memory_bytes = 8 << 20),
            ("memory", |s| s.memory_bytes = (64 << 20) + 1),
            ("cmdline", |s| s.cmdline = "x".repeat(4097)),
            ("disk[1].name", |s| s.disks = vec![disk("a"), disk("a")]),
            ("disk[0].name", |s| s.disks = vec![disk("rng")]),
            ("share[0].name", |s| {
                s.cloud_init = Some(CloudInitSpec::default());
                s.shares = vec![ShareSpec::new(SEED_DISK.to_owned(), "/")];
            }),
            ("share[0].name", |s| {
                s.disks = vec![disk("a")];
                s.shares = vec![ShareSpec::new("a".to_owned(), "/")];
            }),
            ("devices", |s| {
                s.disks = (0..8).map(|n| disk(&format!("d{n}"))).collect();
                let shares = (0..6).map(|n| ShareSpec::new(format!("s{n}"), "/"));
                s.shares = shares.collect();
                s.vsock = Some(VsockSpec::default());
            }),
            ("disk[0].queues", |s| {
                s.disks = vec![DiskSpec {
                    format: ImageFormat::Raw,
                    extents: Vec::new(),
                    backing: Vec::new(),
                    limits: DiskLimits::default(),
                    shareable: false,
                    queues: 9,
                    ..disk("a")
                }];
            }),
            ("console.history", |s| s.console.history_bytes = 1),
            ("console.attach", |s| {
                s.console.virtio = false;
                s.console.attach = ConsoleChoice::Virtio;
            }),
        ];
        for (field, breaks) in faults {
            let mut s = spec();
            breaks(&mut s);
            assert_eq!(s.check().unwrap_err().field, field);
        }
    }

    #[test]
    fn console_is_added_unless_given() {
        let mut s = spec();
        s.cmdline = "quiet".into();
        assert_eq!(s.cmdline_in_full(), "console=ttyS0 quiet");
        s.console.attach = ConsoleChoice::Virtio;
        assert_eq!(s.cmdline_in_full(), "console=hvc0 quiet");
        s.cmdline = "console=tty0".into();
        assert_eq!(s.cmdline_in_full(), "console=tty0");
    }
}
