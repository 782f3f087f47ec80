//! A machine as far as it has been described, each setting with its place.
//!
//! VM files ([`super::parse`]) and options both make drafts; [`Draft::or`] lays one over the other;
//! [`super::check`] turns the result into a [`crate::vm::spec::VmSpec`].

use super::problem::{Located, Place};
use crate::network::publish::Publish;
use crate::vm::spec::{ConsoleChoice, HostShare, OnDiskFull, OnEnd};
use bulkhead_ipc::protocol::birth::{HugePages, ImageFormat};
use std::net::IpAddr;
use std::path::PathBuf;

/// A machine, perhaps with gaps. Paths are as good as absolute: relative ones start at the
/// directory of the VM file, or at the working directory for options.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct Draft {
    pub name: Option<Located<String>>,
    pub vcpus: Option<Located<u8>>,
    pub memory: Option<Located<u64>>,
    pub huge_pages: Option<Located<HugePages>>,
    /// The disk that the kernel is on, and `None` in it for the first. The paths of kernel and initial RAM disk
    /// are those on this disk then.
    pub from_disk: Option<Located<Option<String>>>,
    pub kernel: Option<Located<PathBuf>>,
    pub initrd: Option<Located<PathBuf>>,
    pub cmdline: Option<Located<String>>,
    pub disks: Vec<DraftDisk>,
    pub vsock: Option<DraftVsock>,
    pub cloud_init: Option<DraftCloudInit>,
    pub shares: Vec<DraftShare>,
    pub nets: Vec<DraftNet>,
    pub console_virtio: Option<Located<bool>>,
    pub console_attach: Option<Located<ConsoleChoice>>,
    pub console_on_cmdline: Option<Located<bool>>,
    pub console_history: Option<Located<u64>>,
    pub console_size: Option<Located<(u16, u16)>>,
    pub on_poweroff: Option<Located<OnEnd>>,
    pub on_reboot: Option<Located<OnEnd>>,
    pub on_crash: Option<Located<OnEnd>>,
    pub on_host_shutdown: Option<Located<OnEnd>>,
    pub on_disk_full: Option<Located<OnDiskFull>>,
    pub autostart: Option<Located<bool>>,
    /// Nothing of it depends on anything else, so no place is kept.
    pub share: HostShare,
}

/// A socket device, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftVsock {
    pub cid: Option<Located<u32>>,
    pub path: Option<Located<PathBuf>>,
}

impl DraftVsock {
    fn or(self, other: Self) -> Self {
        Self {
            cid: self.cid.or(other.cid),
            path: self.path.or(other.path),
        }
    }
}

/// A disk, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftDisk {
    /// Where the disk's description begins.
    pub place: Place,
    pub name: Option<Located<String>>,
    pub path: Option<Located<PathBuf>>,
    pub format: Option<Located<ImageFormat>>,
    pub extents: Vec<Located<PathBuf>>,
    pub backing: Vec<(Located<PathBuf>, ImageFormat)>,
    pub read_only: Option<Located<bool>>,
    pub ephemeral: Option<Located<bool>>,
    pub shareable: Option<Located<bool>>,
    pub limits: DraftLimits,
    pub serial: Option<Located<String>>,
    pub queues: Option<Located<u8>>,
}

/// What cloud-init is told, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftCloudInit {
    pub user_data: Option<Located<PathBuf>>,
    pub meta_data: Option<Located<PathBuf>>,
    pub network_config: Option<Located<PathBuf>>,
    pub ssh_keys: Option<Located<Vec<String>>>,
    pub hostname: Option<Located<String>>,
}

impl DraftCloudInit {
    fn or(self, other: Self) -> Self {
        Self {
            user_data: self.user_data.or(other.user_data),
            meta_data: self.meta_data.or(other.meta_data),
            network_config: self.network_config.or(other.network_config),
            ssh_keys: self.ssh_keys.or(other.ssh_keys),
            hostname: self.hostname.or(other.hostname),
        }
    }
}

/// A shared folder, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftShare {
    /// Where the folder's description begins.
    pub place: Place,
    pub name: Option<Located<String>>,
    pub path: Option<Located<PathBuf>>,
    pub read_only: Option<Located<bool>>,
    pub owner: Option<Located<(u32, u32)>>,
    pub guest_owner: Option<Located<(u32, u32)>>,
    pub cache_ms: Option<Located<u32>>,
}

impl DraftShare {
    /// A folder of which nothing is known but where it is described.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self {
            place,
            name: None,
            path: None,
            read_only: None,
            owner: None,
            guest_owner: None,
            cache_ms: None,
        }
    }
}

/// A network device, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftNet {
    /// Where the device's description begins.
    pub place: Place,
    pub name: Option<Located<String>>,
    pub tap: Option<Located<String>>,
    pub bridge: Option<Located<String>>,
    pub network: Option<Located<String>>,
    pub user: Option<Located<bool>>,
    pub publish: Option<Located<Vec<Publish>>>,
    pub mac: Option<Located<[u8; 6]>>,
    pub mtu: Option<Located<u32>>,
    pub queues: Option<Located<u8>>,
    pub link: Option<Located<bool>>,
    pub tenant: Option<Located<String>>,
    pub addresses: Option<Located<Vec<IpAddr>>>,
    pub vlan: Option<Located<u32>>,
    pub trunk: Option<Located<Vec<u16>>>,
    /// Of packets, where a disk's are of requests.
    pub limits: DraftLimits,
}

impl DraftNet {
    /// A device of which nothing is known but where it is described.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self {
            place,
            name: None,
            tap: None,
            bridge: None,
            network: None,
            user: None,
            publish: None,
            mac: None,
            mtu: None,
            queues: None,
            link: None,
            tenant: None,
            addresses: None,
            vlan: None,
            trunk: None,
            limits: DraftLimits::NONE,
        }
    }
}

/// What a disk may do in a second, or a network device in each direction, perhaps with gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are those of the VM file")]
pub struct DraftLimits {
    pub bytes_per_s: Option<Located<u64>>,
    pub bytes_burst: Option<Located<u64>>,
    pub requests_per_s: Option<Located<u32>>,
    pub requests_burst: Option<Located<u32>>,
}

impl DraftLimits {
    /// No limit.
    pub const NONE: Self = Self {
        bytes_per_s: None,
        bytes_burst: None,
        requests_per_s: None,
        requests_burst: None,
    };
}

impl DraftDisk {
    /// A disk of which nothing is known but where it is described.
    #[must_use]
    pub const fn new(place: Place) -> Self {
        Self {
            place,
            name: None,
            path: None,
            format: None,
            extents: Vec::new(),
            backing: Vec::new(),
            read_only: None,
            ephemeral: None,
            shareable: None,
            limits: DraftLimits::NONE,
            serial: None,
            queues: None,
        }
    }
}

impl Draft {
    /// This draft, with its gaps filled from `other` and `other`'s disks, folders and network devices before its own.
    #[must_use]
    pub fn or(self, mut other: Self) -> Self {
        // A path on a disk and one on the host do not fill each other's gaps.
        if self.from_disk.is_some() && other.from_disk.is_none() {
            (other.kernel, other.initrd) = (None, None);
        } else if self.kernel.is_some() && self.from_disk.is_none() && other.from_disk.is_some() {
            (other.from_disk, other.initrd) = (None, None);
        }
        let mut disks = other.disks;
        disks.extend(self.disks);
        let mut shares = other.shares;
        shares.extend(self.shares);
        let mut nets = other.nets;
        nets.extend(self.nets);
        Self {
            name: self.name.or(other.name),
            vcpus: self.vcpus.or(other.vcpus),
            memory: self.memory.or(other.memory),
            huge_pages: self.huge_pages.or(other.huge_pages),
            from_disk: self.from_disk.or(other.from_disk),
            kernel: self.kernel.or(other.kernel),
            initrd: self.initrd.or(other.initrd),
            cmdline: self.cmdline.or(other.cmdline),
            disks,
            vsock: match (self.vsock, other.vsock) {
                (Some(own), Some(other)) => Some(own.or(other)),
                (own, other) => own.or(other),
            },
            cloud_init: match (self.cloud_init, other.cloud_init) {
                (Some(own), Some(other)) => Some(own.or(other)),
                (own, other) => own.or(other),
            },
            shares,
            nets,
            console_virtio: self.console_virtio.or(other.console_virtio),
            console_attach: self.console_attach.or(other.console_attach),
            console_on_cmdline: self.console_on_cmdline.or(other.console_on_cmdline),
            console_history: self.console_history.or(other.console_history),
            console_size: self.console_size.or(other.console_size),
            on_poweroff: self.on_poweroff.or(other.on_poweroff),
            on_reboot: self.on_reboot.or(other.on_reboot),
            on_crash: self.on_crash.or(other.on_crash),
            on_host_shutdown: self.on_host_shutdown.or(other.on_host_shutdown),
            on_disk_full: self.on_disk_full.or(other.on_disk_full),
            autostart: self.autostart.or(other.autostart),
            share: HostShare {
                cpu_weight: self.share.cpu_weight.or(other.share.cpu_weight),
                cpu_percent: self.share.cpu_percent.or(other.share.cpu_percent),
                disk_read_per_s: self.share.disk_read_per_s.or(other.share.disk_read_per_s),
                disk_write_per_s: self.share.disk_write_per_s.or(other.share.disk_write_per_s),
                disk_read_iops: self.share.disk_read_iops.or(other.share.disk_read_iops),
                disk_write_iops: self.share.disk_write_iops.or(other.share.disk_write_iops),
            },
        }
    }
}
