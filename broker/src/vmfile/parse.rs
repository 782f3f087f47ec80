//! From the text of a VM file to a [`Draft`]. Pure: looks at nothing but the text.

use super::draft::{
    Draft, DraftCloudInit, DraftDisk, DraftLimits, DraftNet, DraftShare, DraftVsock,
};
use super::problem::{Located, Problem, Problems};
use super::section::{Key, Section, Source, key, later};
use crate::network::card::{ADDRESSES_RULE, TRUNK_RULE};
use crate::network::publish::NoPublish;
use crate::vm::spec::{
    CIDS, ConsoleChoice, DISK_QUEUES_MAX, HostShare, NET_QUEUES_MAX, OnDiskFull, OnEnd,
    SHARE_CACHE_MS_MAX, parse_mac,
};
use bulkhead_ipc::platform::VCPUS_MAX;
use bulkhead_ipc::protocol::birth::{HugePages, ImageFormat};
use std::net::AddrParseError;
use std::path::{Path, PathBuf};
use toml::de::{DeTable, DeValue};

/// Least bytes a second of a disk: one page, or the kernel would never let one through.
const RATE_MIN: u64 = 4096;
/// Largest VM file in bytes.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

pub(super) const ROOT_KEYS: &[Key] = &[
    key("name"),
    key("machine"),
    key("boot"),
    key("disk"),
    key("vsock"),
    key("cloud_init"),
    key("net"),
    key("console"),
    key("lifecycle"),
    key("limits"),
    key("autostart"),
    key("share"),
    later("snapshots"),
    later("policy"),
];
pub(super) const MACHINE_KEYS: &[Key] = &[
    key("cpus"),
    key("memory"),
    key("hugepages"),
    later("transport"),
];
pub(super) const BOOT_KEYS: &[Key] = &[
    key("from_disk"),
    key("kernel"),
    key("initrd"),
    key("cmdline"),
    later("firmware"),
];
pub(super) const DISK_KEYS: &[Key] = &[
    key("name"),
    key("path"),
    key("format"),
    key("extents"),
    key("backing"),
    key("readonly"),
    key("ephemeral"),
    key("shareable"),
    key("serial"),
    key("queues"),
    key("limits"),
];
pub(super) const DISK_LIMITS_KEYS: &[Key] = &[
    key("bytes_per_s"),
    key("bytes_burst"),
    key("requests_per_s"),
    key("requests_burst"),
];
pub(super) const VSOCK_KEYS: &[Key] = &[key("cid"), key("path")];
pub(super) const CLOUD_INIT_KEYS: &[Key] = &[
    key("user_data"),
    key("meta_data"),
    key("network_config"),
    key("ssh_keys"),
    key("hostname"),
];
pub(super) const SHARE_KEYS: &[Key] = &[
    key("name"),
    key("path"),
    key("readonly"),
    key("owner"),
    key("guest_owner"),
    key("cache_ms"),
];
pub(super) const NET_KEYS: &[Key] = &[
    key("name"),
    key("user"),
    key("publish"),
    key("network"),
    key("tap"),
    key("bridge"),
    key("mac"),
    key("mtu"),
    key("queues"),
    key("link"),
    key("tenant"),
    key("addresses"),
    key("vlan"),
    key("trunk"),
    key("limits"),
];
pub(super) const NET_LIMITS_KEYS: &[Key] = &[
    key("bytes_per_s"),
    key("bytes_burst"),
    key("packets_per_s"),
    key("packets_burst"),
];
pub(super) const LINKS: [(&str, bool); 2] = [("up", true), ("down", false)];
pub(super) const CONSOLE_KEYS: &[Key] = &[
    key("virtio"),
    key("attach"),
    key("on_cmdline"),
    key("history"),
    key("size"),
];
pub(super) const LIFECYCLE_KEYS: &[Key] = &[
    key("on_poweroff"),
    key("on_reboot"),
    key("on_crash"),
    key("on_host_shutdown"),
    key("on_disk_full"),
];

pub(super) const LIMITS_KEYS: &[Key] = &[
    key("cpu_weight"),
    key("cpu_percent"),
    key("disk_read_per_s"),
    key("disk_write_per_s"),
    key("disk_read_iops"),
    key("disk_write_iops"),
];

pub(super) const HUGE_PAGES: [(&str, HugePages); 3] = [
    ("off", HugePages::Off),
    ("transparent", HugePages::Transparent),
    ("reserved", HugePages::Reserved),
];
pub(super) const CONSOLES: [(&str, ConsoleChoice); 2] = [
    ("serial", ConsoleChoice::Serial),
    ("virtio", ConsoleChoice::Virtio),
];
pub(super) const ON_END: [(&str, OnEnd); 3] = [
    ("destroy", OnEnd::Destroy),
    ("restart", OnEnd::Restart),
    ("preserve", OnEnd::Preserve),
];
pub(super) const ON_DISK_FULL: [(&str, OnDiskFull); 2] =
    [("pause", OnDiskFull::Pause), ("error", OnDiskFull::Error)];

/// Reads `COLUMNSxROWS`.
///
/// # Errors
/// What was expected.
pub fn parse_console_size(text: &str) -> Result<(u16, u16), String> {
    text.split_once('x')
        .and_then(|(columns, rows)| Some((columns.parse().ok()?, rows.parse().ok()?)))
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
        .ok_or_else(|| "expected columns and rows, such as \"80x25\"".to_owned())
}

/// Reads `USER:GROUP`, two numbers.
///
/// # Errors
/// What was expected.
pub fn parse_owner(text: &str) -> Result<(u32, u32), String> {
    let id = |text: &str| text.parse().ok().filter(|id| *id != u32::MAX);
    text.split_once(':')
        .and_then(|(user, group)| Some((id(user)?, id(group)?)))
        .ok_or_else(|| "expected user and group as numbers, such as \"1000:1000\"".to_owned())
}

/// The format of an image; formats are never probed.
///
/// # Errors
/// What was expected.
pub fn parse_format(format: &str) -> Result<ImageFormat, String> {
    match format {
        "raw" => Ok(ImageFormat::Raw),
        "qcow2" => Ok(ImageFormat::Qcow2),
        "vmdk" => Ok(ImageFormat::Vmdk),
        "vhd" | "vpc" | "vhdx" | "vdi" => Err(format!(
            "images of this format are not used as they are; convert it with \
             `bulkhead image convert --from {format}` first"
        )),
        _ => Err("expected \"raw\", \"qcow2\" or \"vmdk\"".to_owned()),
    }
}

/// Parses the text of a VM file. `file` is its name for messages, `directory` the place that
/// relative paths start from.
///
/// # Errors
/// Everything that is wrong with it.
pub fn parse(file: &str, directory: &Path, text: &str) -> Result<Draft, Problems> {
    let source = Source { file, text };
    let root = DeTable::parse(text).map_err(|error| {
        Problems(vec![Problem {
            place: source.place("", error.span().unwrap_or(0..0), false),
            expectation: error.message().trim_end().replace('\n', "; "),
        }])
    })?;
    let root = Section::root(source, &root);
    let mut problems = Vec::new();
    let draft = read_root(&root, directory, &mut problems);
    if problems.is_empty() {
        Ok(draft)
    } else {
        problems.sort_by_key(|problem| match problem.place {
            super::problem::Place::File { line, column, .. } => (line, column),
            _ => (0, 0),
        });
        Err(Problems(problems))
    }
}

fn read_root(root: &Section<'_>, directory: &Path, problems: &mut Vec<Problem>) -> Draft {
    root.check_keys(ROOT_KEYS, problems);
    let mut draft = Draft {
        name: root.string("name", problems),
        autostart: root.boolean("autostart", problems),
        ..Draft::default()
    };
    if let Some(machine) = root.table("machine", problems) {
        machine.check_keys(MACHINE_KEYS, problems);
        draft.vcpus = machine.small("cpus", (1, VCPUS_MAX), problems);
        draft.memory = machine.size("memory", problems);
        draft.huge_pages = machine.choice("hugepages", &HUGE_PAGES, problems);
    }
    if let Some(boot) = root.table("boot", problems) {
        boot.check_keys(BOOT_KEYS, problems);
        let from_disk = boot.string("from_disk", problems);
        draft.from_disk = from_disk.map(|disk| disk.with(Some(disk.value.clone())));
        // Paths on a disk have nothing to do with the directory of the VM file.
        let directory = match draft.from_disk {
            Some(_) => Path::new("/"),
            None => directory,
        };
        draft.kernel = path(&boot, "kernel", directory, problems);
        draft.initrd = path(&boot, "initrd", directory, problems);
        draft.cmdline = boot.string("cmdline", problems);
    }
    for disk in root.tables("disk", problems) {
        draft.disks.push(read_disk(&disk, directory, problems));
    }
    if let Some(vsock) = root.table("vsock", problems) {
        vsock.check_keys(VSOCK_KEYS, problems);
        draft.vsock = Some(DraftVsock {
            cid: vsock.number("cid", (*CIDS.start(), *CIDS.end()), problems),
            path: path(&vsock, "path", directory, problems),
        });
    }
    if let Some(section) = root.table("cloud_init", problems) {
        section.check_keys(CLOUD_INIT_KEYS, problems);
        draft.cloud_init = Some(DraftCloudInit {
            user_data: path(&section, "user_data", directory, problems),
            meta_data: path(&section, "meta_data", directory, problems),
            network_config: path(&section, "network_config", directory, problems),
            ssh_keys: section.get("ssh_keys", problems, read_texts),
            hostname: section.string("hostname", problems),
        });
    }
    for share in root.tables("share", problems) {
        draft.shares.push(read_share(&share, directory, problems));
    }
    for net in root.tables("net", problems) {
        draft.nets.push(read_net(&net, problems));
    }
    if let Some(console) = root.table("console", problems) {
        console.check_keys(CONSOLE_KEYS, problems);
        draft.console_virtio = console.boolean("virtio", problems);
        draft.console_attach = console.choice("attach", &CONSOLES, problems);
        draft.console_on_cmdline = console.boolean("on_cmdline", problems);
        draft.console_history = console.size("history", problems);
        draft.console_size = console.get("size", problems, |value| {
            parse_console_size(value.as_str().unwrap_or(""))
        });
    }
    if let Some(lifecycle) = root.table("lifecycle", problems) {
        lifecycle.check_keys(LIFECYCLE_KEYS, problems);
        draft.on_poweroff = lifecycle.choice("on_poweroff", &ON_END, problems);
        draft.on_reboot = lifecycle.choice("on_reboot", &ON_END, problems);
        draft.on_crash = lifecycle.choice("on_crash", &ON_END, problems);
        draft.on_host_shutdown = lifecycle.choice("on_host_shutdown", &ON_END, problems);
        draft.on_disk_full = lifecycle.choice("on_disk_full", &ON_DISK_FULL, problems);
    }
    if let Some(limits) = root.table("limits", problems) {
        draft.share = read_limits(&limits, problems);
    }
    draft
}

fn read_limits(limits: &Section<'_>, problems: &mut Vec<Problem>) -> HostShare {
    limits.check_keys(LIMITS_KEYS, problems);
    let mut number = |key, range| Some(limits.number(key, range, problems)?.value);
    let (cpu_weight, cpu_percent) = (
        number("cpu_weight", (1, 10_000)),
        number("cpu_percent", (1, 100_000)),
    );
    let (disk_read_iops, disk_write_iops) = (
        number("disk_read_iops", (1, u32::MAX)),
        number("disk_write_iops", (1, u32::MAX)),
    );
    let mut rate = |key| {
        let rate = limits.size(key, problems)?;
        if rate.value < RATE_MIN {
            problems.push(rate.problem("expected at least \"4KiB\" a second"));
        }
        Some(rate.value)
    };
    HostShare {
        cpu_weight,
        cpu_percent,
        disk_read_per_s: rate("disk_read_per_s"),
        disk_write_per_s: rate("disk_write_per_s"),
        disk_read_iops,
        disk_write_iops,
    }
}

fn read_disk(disk: &Section<'_>, directory: &Path, problems: &mut Vec<Problem>) -> DraftDisk {
    disk.check_keys(DISK_KEYS, problems);
    let format = disk.get("format", problems, |value| {
        parse_format(value.as_str().unwrap_or_default())
    });
    let extents = disk.get("extents", problems, |value| read_extents(value, directory));
    let limits = disk.table_named("limits", "disk.limits", problems);
    let limits = limits.map_or(DraftLimits::NONE, |limits| {
        read_disk_limits(&limits, problems)
    });
    let backing = disk.get("backing", problems, |value| read_backing(value, directory));
    DraftDisk {
        format,
        limits,
        extents: extents.map_or_else(Vec::new, |extents| {
            let place = extents.place;
            let located = |value| Located {
                value,
                place: place.clone(),
            };
            extents.value.into_iter().map(located).collect()
        }),
        backing: backing.map_or_else(Vec::new, |backing| {
            let place = backing.place;
            let located = |(value, format)| {
                let place = place.clone();
                (Located { value, place }, format)
            };
            backing.value.into_iter().map(located).collect()
        }),
        place: disk.place(),
        name: disk.string("name", problems),
        path: path(disk, "path", directory, problems),
        read_only: disk.boolean("readonly", problems),
        ephemeral: disk.boolean("ephemeral", problems),
        shareable: disk.boolean("shareable", problems),
        serial: disk.string("serial", problems),
        queues: disk.small("queues", (1, DISK_QUEUES_MAX), problems),
    }
}

fn read_share(share: &Section<'_>, directory: &Path, problems: &mut Vec<Problem>) -> DraftShare {
    share.check_keys(SHARE_KEYS, problems);
    let mut owner = |key| {
        share.get(key, problems, |value| {
            parse_owner(value.as_str().unwrap_or_default())
        })
    };
    let (owner, guest_owner) = (owner("owner"), owner("guest_owner"));
    DraftShare {
        place: share.place(),
        name: share.string("name", problems),
        path: path(share, "path", directory, problems),
        read_only: share.boolean("readonly", problems),
        owner,
        guest_owner,
        cache_ms: share.number("cache_ms", (0, SHARE_CACHE_MS_MAX), problems),
    }
}

fn read_net(net: &Section<'_>, problems: &mut Vec<Problem>) -> DraftNet {
    net.check_keys(NET_KEYS, problems);
    let limits = net.table_named("limits", "net.limits", problems);
    let limits = limits.map_or(DraftLimits::NONE, |limits| {
        limits.check_keys(NET_LIMITS_KEYS, problems);
        DraftLimits {
            bytes_per_s: limits.size("bytes_per_s", problems),
            bytes_burst: limits.size("bytes_burst", problems),
            requests_per_s: limits.number("packets_per_s", (1, u32::MAX), problems),
            requests_burst: limits.number("packets_burst", (1, u32::MAX), problems),
        }
    });
    DraftNet {
        place: net.place(),
        name: net.string("name", problems),
        tap: net.string("tap", problems),
        bridge: net.string("bridge", problems),
        network: net.string("network", problems),
        user: net.boolean("user", problems),
        publish: net.get("publish", problems, |value| {
            let texts = read_texts(value)?;
            let ports = texts
                .iter()
                .map(|text| text.parse().map_err(|e: NoPublish| e.to_string()));
            ports.collect()
        }),
        mac: net.get("mac", problems, |value| {
            parse_mac(value.as_str().unwrap_or_default())
        }),
        mtu: net.number("mtu", (0, u32::MAX), problems),
        queues: net.small("queues", (1, NET_QUEUES_MAX), problems),
        link: net.choice("link", &LINKS, problems),
        tenant: net.string("tenant", problems),
        addresses: net.get("addresses", problems, |value| {
            let texts = read_texts(value)?;
            let all = texts.iter().map(|text| text.parse());
            let all = all.collect::<Result<_, AddrParseError>>();
            all.map_err(|_| format!("expected {ADDRESSES_RULE}"))
        }),
        vlan: net.number("vlan", (1, 4094), problems),
        trunk: net.get("trunk", problems, read_vlans),
        limits,
    }
}

fn read_disk_limits(limits: &Section<'_>, problems: &mut Vec<Problem>) -> DraftLimits {
    limits.check_keys(DISK_LIMITS_KEYS, problems);
    DraftLimits {
        bytes_per_s: limits.size("bytes_per_s", problems),
        bytes_burst: limits.size("bytes_burst", problems),
        requests_per_s: limits.number("requests_per_s", (1, u32::MAX), problems),
        requests_burst: limits.number("requests_burst", (1, u32::MAX), problems),
    }
}

fn read_extents(value: &DeValue<'_>, directory: &Path) -> Result<Vec<PathBuf>, String> {
    let expected = || "expected a list of paths, such as [\"disk-flat.vmdk\"]".to_owned();
    let read = |value: &DeValue<'_>| {
        let path = value.as_str().filter(|path| is_path(path));
        path.map(|path| directory.join(path)).ok_or_else(expected)
    };
    let values = value.as_array().ok_or_else(expected)?;
    values.iter().map(|value| read(value.get_ref())).collect()
}

fn read_texts(value: &DeValue<'_>) -> Result<Vec<String>, String> {
    let expected = || "expected a list of strings".to_owned();
    let read = |value: &DeValue<'_>| value.as_str().map(str::to_owned).ok_or_else(expected);
    let values = value.as_array().ok_or_else(expected)?;
    values.iter().map(|value| read(value.get_ref())).collect()
}

fn read_vlans(value: &DeValue<'_>) -> Result<Vec<u16>, String> {
    let expected = || format!("expected {TRUNK_RULE}");
    let read = |value: &DeValue<'_>| {
        let number = value.as_integer()?;
        u16::from_str_radix(number.as_str(), number.radix()).ok()
    };
    let values = value.as_array().ok_or_else(expected)?;
    let values = values.iter().map(|value| read(value.get_ref()));
    values.collect::<Option<_>>().ok_or_else(expected)
}

fn read_backing(
    value: &DeValue<'_>,
    directory: &Path,
) -> Result<Vec<(PathBuf, ImageFormat)>, String> {
    let expected =
        || "expected a list such as [{ path = \"base.img\", format = \"raw\" }]".to_owned();
    let read = |value: &DeValue<'_>| {
        let table = value.as_table().filter(|table| table.len() == 2);
        let field = |name: &str| table?.get(name)?.get_ref().as_str();
        match (field("path").filter(|path| is_path(path)), field("format")) {
            (Some(path), Some(format)) => {
                parse_format(format).map(|format| (directory.join(path), format))
            }
            _ => Err(expected()),
        }
    };
    let values = value.as_array().ok_or_else(expected)?;
    values.iter().map(|value| read(value.get_ref())).collect()
}

fn is_path(text: &str) -> bool {
    !text.is_empty() && !text.contains('\0')
}

fn path(
    section: &Section<'_>,
    key: &str,
    directory: &Path,
    problems: &mut Vec<Problem>,
) -> Option<Located<PathBuf>> {
    let path = section.string(key, problems)?;
    if !is_path(&path.value) {
        problems.push(path.problem("expected the path of a file"));
        return None;
    }
    Some(path.with(directory.join(&path.value)))
}
