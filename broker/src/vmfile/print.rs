//! The VM file as a type: what `--print-config` writes and what the JSON schema describes.
//!
//! Reading is [`super::parse`]'s business, since only it knows lines and columns. Tests hold the
//! two together: what is printed reads back as the same machine, and the schema knows exactly the
//! keys that the parser knows.

use super::parse::{CONSOLES, HUGE_PAGES, LINKS, ON_DISK_FULL, ON_END};
use super::quantity::show_size;
use crate::vm::spec::{
    CloudInitSpec, DiskSpec, HostShare, KernelSource, NetSource, NetSpec, SEED_DISK, ShareSpec,
    VmSpec, VsockSpec, show_mac,
};
use bulkhead_ipc::protocol::birth::DiskLimits;
use schemars::JsonSchema;
use serde::Serialize;
use std::net::IpAddr;
use std::path::Path;

/// A virtual machine of Bulkhead.
///
/// Sizes are strings with a unit such as "512MiB". Paths are relative to the VM file.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "Bulkhead VM file")]
pub(super) struct VmFile {
    /// Name of the machine: 1 to 64 letters, digits, '-', '_' or '.'. Default: the file's name.
    #[schemars(
        length(min = 1, max = 64),
        regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$")
    )]
    name: Option<String>,
    /// Whether the daemon starts the machine when the host starts. Default: false.
    autostart: Option<bool>,
    /// Processors and memory.
    machine: Option<Machine>,
    /// What is started.
    boot: Option<Boot>,
    /// The disks, in the order in which the guest finds them.
    #[serde(default)]
    #[schemars(length(max = 14))]
    disk: Vec<Disk>,
    /// Sockets between programs of the guest and of the host.
    vsock: Option<Vsock>,
    /// What cloud-init finds in the guest: a read-only disk labelled CIDATA, the last one. It is made anew
    /// whenever the machine starts.
    cloud_init: Option<CloudInit>,
    /// Directories of the host that the guest can mount, with the name as the tag: `mount -t virtiofs NAME /mnt`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(default, length(max = 14))]
    share: Vec<Share>,
    /// The network devices, in the order in which the guest finds them, after the disks.
    #[serde(default)]
    #[schemars(length(max = 14))]
    net: Vec<Net>,
    /// Serial port and virtio console.
    console: Option<Console>,
    /// What happens when the guest ends by itself.
    lifecycle: Option<Lifecycle>,
    /// What all processes of the machine together may take of the host.
    limits: Option<Limits>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Machine {
    /// Number of virtual processors. Default: 1.
    #[schemars(range(min = 1, max = 32))]
    cpus: Option<u8>,
    /// Memory, from "16MiB" up. Default: "256MiB".
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    memory: Option<String>,
    /// Size of the host pages behind the memory: "off" for 4 KiB, "transparent" for huge pages
    /// where the kernel finds some, "reserved" for 2 MiB pages of the host's pool. Default:
    /// "transparent".
    #[schemars(extend("enum" = ["off", "transparent", "reserved"]))]
    hugepages: Option<&'static str>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Boot {
    /// Name of the disk that kernel and initial RAM disk are read from at each start: from an ext4 file system on
    /// it or on one of its partitions. `kernel` and `initrd` are paths there then; without them the newest kernel
    /// is started (/vmlinuz, /boot/vmlinuz, /boot/vmlinuz-VERSION) with the initial RAM disk that belongs to it.
    /// The command line says what the guest's root is, as `root=/dev/vda1`.
    from_disk: Option<String>,
    /// Kernel: bzImage, ELF (PVH, Linux or Multiboot). Required, here or as --kernel, unless `from_disk` is given.
    kernel: Option<String>,
    /// Initial RAM disk.
    initrd: Option<String>,
    /// Kernel command line. `console=` is added unless given.
    cmdline: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Disk {
    /// Name in messages. Default: disk0, disk1, …
    #[schemars(
        length(min = 1, max = 64),
        regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$")
    )]
    name: Option<String>,
    /// Image file or block device.
    path: String,
    /// Image format. It is never probed, since a guest can write any header. Default: "raw".
    #[schemars(extend("enum" = ["raw", "qcow2", "vmdk"]))]
    format: Option<String>,
    /// Files with the data of a VMDK image, in the order of its descriptor. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    extents: Vec<String>,
    /// Images below a qcow2 image, the one next to it first. Nothing is opened only because an image
    /// names it. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    backing: Vec<Backing>,
    /// Whether the guest's writes are refused. Default: false.
    readonly: Option<bool>,
    /// Whether the guest's writes are discarded at the end. Default: false.
    ephemeral: Option<bool>,
    /// Whether other machines may write to the raw image at the same time: for cluster file systems. Any other
    /// file system would be destroyed. Default: false.
    shareable: Option<bool>,
    /// What the disk may do in a second; its process waits when it has done so much. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<DiskLimit>,
    /// Identifier that the guest reads. Default: the name.
    #[schemars(length(max = 20))]
    serial: Option<String>,
    /// Number of queues. Default: 1.
    #[schemars(range(min = 1, max = 8))]
    queues: Option<u8>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Share {
    /// Name in messages, and the guest's tag. Default: share0, share1, …
    #[schemars(
        length(min = 1, max = 36),
        regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$")
    )]
    name: Option<String>,
    /// The directory.
    path: String,
    /// Whether the guest's changes are refused. Default: false.
    readonly: Option<bool>,
    /// User and group on the host, as numbers, whose files the guest can use as their owner, and which own what it
    /// makes. Others can be given only by root. Default: those that own the directory, or without root
    /// the user and group that start the machine.
    #[schemars(regex(pattern = "^[0-9]+:[0-9]+$"))]
    owner: Option<String>,
    /// User and group that these are in the guest. Default: the same numbers.
    #[schemars(regex(pattern = "^[0-9]+:[0-9]+$"))]
    guest_owner: Option<String>,
    /// How long the guest may believe names and attributes without asking again, in milliseconds: what others change
    /// meanwhile it sees late. Default: 1000.
    #[schemars(range(max = 3_600_000))]
    cache_ms: Option<u32>,
}

fn share(share: &ShareSpec) -> Result<Share, PrintError> {
    let owner = |owner: (u32, u32)| format!("{}:{}", owner.0, owner.1);
    Ok(Share {
        name: Some(share.name.clone()),
        path: utf8(&share.path)?,
        readonly: Some(share.read_only),
        owner: share.owner.map(owner),
        guest_owner: share.guest_owner.map(owner),
        cache_ms: Some(share.cache_ms),
    })
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct DiskLimit {
    /// Bytes read and written, at least "4KiB".
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    bytes_per_s: Option<String>,
    /// Bytes that may be read and written at once after a time of rest. Default: those of a second.
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    bytes_burst: Option<String>,
    /// Requests of any kind.
    #[schemars(range(min = 1))]
    requests_per_s: Option<u64>,
    /// Requests that may come at once after a time of rest. Default: those of a second.
    #[schemars(range(min = 1))]
    requests_burst: Option<u64>,
}

fn disk_limit(limits: &DiskLimits) -> Option<DiskLimit> {
    (limits != &DiskLimits::default()).then(|| DiskLimit {
        bytes_per_s: limits.bytes.map(|rate| show_size(rate.per_s)),
        bytes_burst: limits.bytes.map(|rate| show_size(rate.burst)),
        requests_per_s: limits.requests.map(|rate| rate.per_s),
        requests_burst: limits.requests.map(|rate| rate.burst),
    })
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Net {
    /// Name in messages. Default: net0, net1, …
    #[schemars(
        length(min = 1, max = 64),
        regex(pattern = "^[A-Za-z0-9][A-Za-z0-9._-]*$")
    )]
    name: Option<String>,
    /// User networking: passt, a program of the host, speaks for the guest with the host's own sockets. One of this, `network`,
    /// `tap` and `bridge`. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    user: Option<bool>,
    /// Ports of the host that lead to the guest with user networking: `[ADDRESS:]PORT:GUEST_PORT[/tcp|udp]`. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    publish: Vec<String>,
    /// Virtual network of the daemon (`bulkhead network create`) that it is plugged into.
    #[schemars(
        length(min = 1, max = 32),
        regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    )]
    network: Option<String>,
    /// TAP interface of the host that it is plugged into; one that is not there is made, and removed with the
    /// machine.
    #[schemars(length(min = 1, max = 15), regex(pattern = "^[A-Za-z0-9._-]+$"))]
    tap: Option<String>,
    /// Bridge of the host: a TAP interface is made, put into it, and removed with the machine.
    #[schemars(length(min = 1, max = 15), regex(pattern = "^[A-Za-z0-9._-]+$"))]
    bridge: Option<String>,
    /// Address. Default: one of the name of the machine and the number of the device, always the same.
    #[schemars(regex(pattern = "^[0-9A-Fa-f][02468ACEace](:[0-9A-Fa-f]{2}){5}$"))]
    mac: Option<String>,
    /// Largest packet in bytes, for host and guest. Default: what it is.
    #[schemars(range(min = 68, max = 65521))]
    mtu: Option<u16>,
    /// Pairs of queues, 1 in a network and with user networking. Default: 1.
    #[schemars(range(min = 1, max = 8))]
    queues: Option<u8>,
    /// Whether the cable is plugged in at the start. Default: "up".
    #[schemars(extend("enum" = ["up", "down"]))]
    link: Option<&'static str>,
    /// Whose it is, in a network: it talks to cards of the same tenant only, and one without a tenant to those without.
    #[schemars(
        length(min = 1, max = 32),
        regex(pattern = "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    tenant: Option<String>,
    /// Addresses that it has in its network without asking for a lease; the first of the subnet is what it is leased.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    addresses: Vec<IpAddr>,
    /// VLAN in its network, of which the guest sees no tag. Default: that of the network.
    #[schemars(range(min = 1, max = 4094))]
    #[serde(skip_serializing_if = "Option::is_none")]
    vlan: Option<u16>,
    /// VLANs in its network, whose tags the guest sees; none means all.
    #[schemars(length(max = 64), inner(range(min = 1, max = 4094)))]
    #[serde(skip_serializing_if = "Option::is_none")]
    trunk: Option<Vec<u16>>,
    /// What it may send in a second, and as much receive. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    limits: Option<NetLimit>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NetLimit {
    /// Bytes of frames, at least "4KiB".
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    bytes_per_s: Option<String>,
    /// Bytes at once after a time of rest. Default: those of a second.
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    bytes_burst: Option<String>,
    /// Frames; one that is to be cut up by the host, or has not been yet, counts as one.
    #[schemars(range(min = 1))]
    packets_per_s: Option<u64>,
    /// Frames at once after a time of rest. Default: those of a second.
    #[schemars(range(min = 1))]
    packets_burst: Option<u64>,
}

fn net(net: &NetSpec) -> Net {
    let (mut network, mut tap, mut bridge) = (None, None, None);
    let (mut user, mut published) = (None, Vec::new());
    match &net.source {
        NetSource::Network(name) => network = Some(name.clone()),
        NetSource::Tap(name) => tap = Some(name.clone()),
        NetSource::Bridge(name) => bridge = Some(name.clone()),
        NetSource::User { publish } => {
            user = Some(true);
            published = publish.iter().map(ToString::to_string).collect();
        }
    }
    let limits = &net.limits;
    Net {
        name: Some(net.name.clone()),
        user,
        publish: published,
        network,
        tap,
        bridge,
        mac: Some(show_mac(net.mac)),
        mtu: net.mtu,
        queues: Some(net.queues),
        link: word(&LINKS, &net.link_up),
        tenant: net.card.tenant.clone(),
        addresses: net.card.addresses.clone(),
        vlan: net.card.vlan.access(),
        trunk: net.card.vlan.trunk().cloned(),
        limits: (limits != &DiskLimits::default()).then(|| NetLimit {
            bytes_per_s: limits.bytes.map(|rate| show_size(rate.per_s)),
            bytes_burst: limits.bytes.map(|rate| show_size(rate.burst)),
            packets_per_s: limits.requests.map(|rate| rate.per_s),
            packets_burst: limits.requests.map(|rate| rate.burst),
        }),
    }
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Backing {
    /// Image file or block device; it is only read.
    path: String,
    /// Its format.
    #[schemars(extend("enum" = ["raw", "qcow2"]))]
    format: String,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CloudInit {
    /// File of user data. Default: nothing is to be done.
    user_data: Option<String>,
    /// File of meta data. Default: the machine's name as instance and host name, and the keys.
    meta_data: Option<String>,
    /// File of network configuration. Default: none.
    network_config: Option<String>,
    /// Public SSH keys of the image's default user; not beside meta_data. Default: none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(default)]
    ssh_keys: Vec<String>,
    /// Host name; not beside meta_data. Default: the machine's name.
    hostname: Option<String>,
}

fn cloud_init(spec: &CloudInitSpec) -> Result<CloudInit, PrintError> {
    let path = |path: &Option<std::path::PathBuf>| path.as_deref().map(utf8).transpose();
    Ok(CloudInit {
        user_data: path(&spec.user_data)?,
        meta_data: path(&spec.meta_data)?,
        network_config: path(&spec.network_config)?,
        ssh_keys: spec.ssh_keys.clone(),
        hostname: spec.hostname.clone(),
    })
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Console {
    /// Whether there is a virtio console beside the serial port. Default: true.
    virtio: Option<bool>,
    /// The console that a terminal attaches to. Default: "serial".
    #[schemars(extend("enum" = ["serial", "virtio"]))]
    attach: Option<&'static str>,
    /// Whether `console=` is added to a kernel command line that has none. Default: true.
    on_cmdline: Option<bool>,
    /// How much output is kept of each console, "4KiB" to "64MiB". Default: "1MiB".
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    history: Option<String>,
    /// Columns and rows of the virtio console while no terminal is attached. Default: "80x25".
    #[schemars(regex(pattern = "^[0-9]+x[0-9]+$"))]
    size: Option<String>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Lifecycle {
    /// After power-off. Default: "destroy".
    #[schemars(extend("enum" = ["destroy", "restart", "preserve"]))]
    on_poweroff: Option<&'static str>,
    /// After a reset. Default: "restart".
    #[schemars(extend("enum" = ["destroy", "restart", "preserve"]))]
    on_reboot: Option<&'static str>,
    /// After a panic, a triple fault or the loss of a vital process. Default: "destroy".
    #[schemars(extend("enum" = ["destroy", "restart", "preserve"]))]
    on_crash: Option<&'static str>,
    /// When the host shuts down and the power button has not ended the machine in time: "destroy"
    /// cuts its power, "restart" cuts it and starts the machine again with the host, "preserve"
    /// does nothing. Default: "destroy".
    #[schemars(extend("enum" = ["destroy", "restart", "preserve"]))]
    on_host_shutdown: Option<&'static str>,
    /// When the host has no room for what the guest writes to a disk: "pause" pauses the machine until there
    /// is, "error" has the write fail. Default: "pause".
    #[schemars(extend("enum" = ["pause", "error"]))]
    on_disk_full: Option<&'static str>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Limits {
    /// Weight when processors are short; others have 100. Default: none of its own.
    #[schemars(range(min = 1, max = 10000))]
    cpu_weight: Option<u32>,
    /// Most processor time, in percent of one processor. Default: no limit.
    #[schemars(range(min = 1, max = 100_000))]
    cpu_percent: Option<u32>,
    /// Most bytes a second read from each host disk that its images are on. Default: no limit.
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    disk_read_per_s: Option<String>,
    /// The same for writes.
    #[schemars(regex(pattern = "^[0-9]+([.][0-9]+)? ?(B|[KMGT](iB|B)?|kB)$"))]
    disk_write_per_s: Option<String>,
    /// Most reads a second of each host disk that its images are on. Default: no limit.
    #[schemars(range(min = 1))]
    disk_read_iops: Option<u32>,
    /// The same for writes.
    #[schemars(range(min = 1))]
    disk_write_iops: Option<u32>,
}

#[derive(Debug, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Vsock {
    /// Context id of the guest. Default: 3.
    #[schemars(range(min = 3, max = 4_294_967_294_u32))]
    cid: Option<u32>,
    /// Unix socket for connections to the guest, which begin with "CONNECT PORT" in a line; connections
    /// from the guest go to PATH_PORT. The file name has at most 64 bytes. Default: vsock.sock in the
    /// machine's runtime directory.
    path: Option<String>,
}

fn vsock(spec: &VsockSpec) -> Result<Vsock, PrintError> {
    Ok(Vsock {
        cid: Some(spec.cid),
        path: spec.path.as_deref().map(utf8).transpose()?,
    })
}

fn limits(share: &HostShare) -> Option<Limits> {
    (*share != HostShare::default()).then(|| Limits {
        cpu_weight: share.cpu_weight,
        cpu_percent: share.cpu_percent,
        disk_read_per_s: share.disk_read_per_s.map(show_size),
        disk_write_per_s: share.disk_write_per_s.map(show_size),
        disk_read_iops: share.disk_read_iops,
        disk_write_iops: share.disk_write_iops,
    })
}

/// Why a machine cannot be written as a VM file.
#[derive(Debug, thiserror::Error)]
pub enum PrintError {
    /// TOML is UTF-8; this path is not.
    #[error("the path {0:?} cannot be written in a VM file because it is not UTF-8")]
    NotUtf8(std::path::PathBuf),
    /// The built-in image has no path.
    #[error("the kernel {0} is part of this program and cannot be named in a VM file")]
    NoPath(String),
    /// The TOML writer failed.
    #[error("writing TOML: {0}")]
    Toml(#[from] toml::ser::Error),
}

fn word<T: PartialEq>(words: &[(&'static str, T)], value: &T) -> Option<&'static str> {
    words
        .iter()
        .find(|(_, v)| v == value)
        .map(|(word, _)| *word)
}

fn utf8(path: &Path) -> Result<String, PrintError> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| PrintError::NotUtf8(path.to_owned()))
}

/// Writes the VM file that describes exactly this machine.
///
/// # Errors
/// When the machine cannot be described in a file.
pub fn print(spec: &VmSpec) -> Result<String, PrintError> {
    let cmdline = Some(spec.cmdline.clone());
    let boot = match &spec.kernel {
        KernelSource::File(path) => Boot {
            from_disk: None,
            kernel: Some(utf8(path)?),
            initrd: spec.initrd.as_deref().map(utf8).transpose()?,
            cmdline,
        },
        KernelSource::Disk(boot) => Boot {
            from_disk: Some(boot.disk.clone()),
            kernel: boot.kernel.clone(),
            initrd: boot.initrd.clone(),
            cmdline,
        },
        KernelSource::Image { name, .. } => return Err(PrintError::NoPath(name.to_string())),
    };
    let (columns, rows) = spec.console.size;
    // One that runs has its seed among its disks; the next start makes another.
    let is_seed = |disk: &DiskSpec| spec.cloud_init.is_some() && disk.name == SEED_DISK;
    let disks = spec.disks.iter().filter(|disk| !is_seed(disk));
    let file = VmFile {
        name: Some(spec.name.clone()),
        autostart: Some(spec.autostart),
        machine: Some(Machine {
            cpus: Some(spec.vcpus),
            memory: Some(show_size(spec.memory_bytes)),
            hugepages: word(&HUGE_PAGES, &spec.huge_pages),
        }),
        boot: Some(boot),
        disk: disks.map(disk).collect::<Result<_, _>>()?,
        net: spec.nets.iter().map(net).collect(),
        share: spec.shares.iter().map(share).collect::<Result<_, _>>()?,
        vsock: spec.vsock.as_ref().map(vsock).transpose()?,
        cloud_init: spec.cloud_init.as_ref().map(cloud_init).transpose()?,
        console: Some(Console {
            virtio: Some(spec.console.virtio),
            attach: word(&CONSOLES, &spec.console.attach),
            on_cmdline: Some(spec.console.on_cmdline),
            history: Some(show_size(spec.console.history_bytes)),
            size: Some(format!("{columns}x{rows}")),
        }),
        lifecycle: Some(Lifecycle {
            on_poweroff: word(&ON_END, &spec.lifecycle.on_poweroff),
            on_reboot: word(&ON_END, &spec.lifecycle.on_reboot),
            on_crash: word(&ON_END, &spec.lifecycle.on_crash),
            on_host_shutdown: word(&ON_END, &spec.lifecycle.on_host_shutdown),
            on_disk_full: word(&ON_DISK_FULL, &spec.lifecycle.on_disk_full),
        }),
        limits: limits(&spec.limits.share),
    };
    Ok(toml::to_string(&file)?)
}

fn disk(disk: &DiskSpec) -> Result<Disk, PrintError> {
    Ok(Disk {
        name: Some(disk.name.clone()),
        path: utf8(&disk.path)?,
        format: Some(disk.format.to_string()),
        extents: disk
            .extents
            .iter()
            .map(|e| utf8(&e.path))
            .collect::<Result<_, PrintError>>()?,
        backing: disk
            .backing
            .iter()
            .map(|below| {
                Ok(Backing {
                    path: utf8(&below.path)?,
                    format: below.format.to_string(),
                })
            })
            .collect::<Result<_, PrintError>>()?,
        readonly: Some(disk.read_only),
        ephemeral: Some(disk.ephemeral),
        shareable: Some(disk.shareable),
        limits: disk_limit(&disk.limits),
        serial: Some(disk.serial.clone()),
        queues: Some(disk.queues),
    })
}

/// The JSON schema of VM files, as committed in `docs/vm-file.schema.json`.
#[must_use]
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(VmFile).to_value()
}
