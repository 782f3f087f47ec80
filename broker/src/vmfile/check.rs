//! From a [`Draft`] to a [`VmSpec`]: fills in the defaults and checks the draft against the rules
//! of machines and against this host, before any process is started.

use super::draft::{
    Draft, DraftCloudInit, DraftDisk, DraftLimits, DraftNet, DraftShare, DraftVsock,
};
use super::host::{Facts, HostMemory, inspect, inspect_directory};
use super::problem::{Located, Place, Problem, Problems};
use super::quantity::show_size;
use crate::network::card::{
    ADDRESSES_RULE, CARD_RULE, CardSpec, CardVlan, TENANT_RULE, TRUNK_RULE, VLAN_RULE,
    are_addresses, are_vlans, is_vlan,
};
use crate::network::is_interface_name;
use crate::vm::spec::{
    BackingSpec, BootDisk, CMDLINE_BYTES_MAX, CloudInitSpec, ConsoleChoice, DEVICES_MAX, DiskSpec,
    FILES_MAX, FileSpec, GUEST_PATH_BYTES_MAX, HISTORY_BYTES, KernelSource, MTU_BYTES,
    NAME_BYTES_MAX, NETWORK_NAME_RULE, NetSource, NetSpec, SEED_DISK, SERIAL_BYTES_MAX,
    SOCKET_NAME_BYTES_MAX, ShareSpec, TAG_BYTES_MAX, TAKEN_NAMES, VmSpec, VsockSpec, is_guest_path,
    is_network_name, is_published,
};
use bulkhead_ipc::platform::MEMORY_BYTES_MIN;
use bulkhead_ipc::protocol::birth::{DiskLimits, HugePages, ImageFormat, Rate};
use std::path::PathBuf;

/// Fewest bytes a second of a disk: a request of one page takes a second then.
const BYTES_MIN: u64 = 4096;

const PAGE_BYTES: u64 = 4096;
const HUGE_PAGE_BYTES: u64 = 2 << 20;
const SECTOR_BYTES: u64 = 512;
const NAME_RULE: &str =
    "expected 1 to 64 letters, digits, '-', '_' or '.', beginning with a letter or a digit";

/// What a machine is measured against, and what fills its gaps.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Name of a machine that has none.
    pub name: String,
    /// Kernel of a machine that has none; `None` when a kernel must be named.
    pub kernel: Option<PathBuf>,
    /// The host's memory.
    pub memory: HostMemory,
    /// Whether a machine may be larger than the memory that is available now.
    pub overcommit: bool,
}

/// Makes a specification of a draft. Looks at the files that it names and opens none.
///
/// # Errors
/// Everything that is wrong with it.
pub fn check(draft: Draft, around: &Surroundings) -> Result<VmSpec, Problems> {
    let mut checker = Checker {
        problems: Vec::new(),
        files: Vec::new(),
    };
    let spec = checker.machine(draft, around);
    let mut problems = checker.problems;
    if let (true, Err(error)) = (problems.is_empty(), spec.check()) {
        problems.push(Problem {
            place: Place::Default {
                key: error.field.clone(),
            },
            expectation: error.to_string(),
        });
    }
    if problems.is_empty() {
        Ok(spec)
    } else {
        Err(Problems(problems))
    }
}

/// Whether `name` may be the name of a machine or a device.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.chars().all(plain)
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// Whether a device that has no name in a VM file is called so.
fn is_taken(name: &str) -> bool {
    TAKEN_NAMES.contains(&name)
}

/// Whether the disk that cloud-init reads is called so.
fn is_seed(spec: &VmSpec, name: &str) -> bool {
    spec.cloud_init.is_some() && name == SEED_DISK
}

struct Checker {
    problems: Vec<Problem>,
    files: Vec<(Located<PathBuf>, Facts, bool)>,
}

impl Checker {
    fn expect<T>(&mut self, holds: bool, at: &Located<T>, expectation: impl Into<String>) {
        if !holds {
            self.problems.push(at.problem(expectation));
        }
    }

    fn machine(&mut self, draft: Draft, around: &Surroundings) -> VmSpec {
        // A kernel on a disk is looked for when it is known which disks there are.
        let kernel = match &draft.from_disk {
            Some(_) => PathBuf::new(),
            None => self.kernel(&draft, around),
        };
        let mut spec = VmSpec::new(around.name.clone(), KernelSource::File(kernel));
        if let Some(name) = &draft.name {
            self.expect(is_name(&name.value), name, NAME_RULE);
            spec.name.clone_from(&name.value);
        }
        if let Some(vcpus) = &draft.vcpus {
            spec.vcpus = vcpus.value;
        }
        if let Some(pages) = &draft.huge_pages {
            spec.huge_pages = pages.value;
        }
        spec.memory_bytes = self.memory(&draft, spec.memory_bytes, spec.huge_pages, around);
        if draft.from_disk.is_none() {
            spec.initrd = self.initrd(&draft, spec.memory_bytes);
        }
        if let Some(cmdline) = &draft.cmdline {
            self.expect(
                cmdline.value.len() <= CMDLINE_BYTES_MAX && !cmdline.value.contains('\0'),
                cmdline,
                format!("expected at most {CMDLINE_BYTES_MAX} bytes without NUL"),
            );
            spec.cmdline.clone_from(&cmdline.value);
        }
        self.room(&draft);
        self.disks(&draft.disks, &mut spec);
        spec.vsock = draft.vsock.as_ref().map(|vsock| self.vsock(vsock));
        spec.cloud_init = draft
            .cloud_init
            .clone()
            .map(|told| self.cloud_init(told, &draft.disks));
        if let Some(disk) = &draft.from_disk {
            spec.kernel = KernelSource::Disk(self.boot_disk(disk, &draft, &spec.disks));
        }
        self.shares(&draft.shares, &mut spec);
        self.nets(&draft.nets, &mut spec);
        if let Some(virtio) = &draft.console_virtio {
            spec.console.virtio = virtio.value;
        }
        if let Some(attach) = &draft.console_attach {
            let exists = spec.console.virtio || attach.value == ConsoleChoice::Serial;
            self.expect(exists, attach, "expected a console that the machine has");
            spec.console.attach = attach.value;
        }
        if let Some(on) = &draft.console_on_cmdline {
            spec.console.on_cmdline = on.value;
        }
        if let Some(history) = &draft.console_history {
            let (least, most) = HISTORY_BYTES;
            self.expect(
                (least..=most).contains(&history.value),
                history,
                format!("expected {} to {}", show_size(least), show_size(most)),
            );
            spec.console.history_bytes = history.value;
        }
        if let Some(size) = &draft.console_size {
            spec.console.size = size.value;
        }
        spec.autostart = draft.autostart.as_ref().is_some_and(|on| on.value);
        let ends = [
            (&draft.on_poweroff, &mut spec.lifecycle.on_poweroff),
            (&draft.on_reboot, &mut spec.lifecycle.on_reboot),
            (&draft.on_crash, &mut spec.lifecycle.on_crash),
            (
                &draft.on_host_shutdown,
                &mut spec.lifecycle.on_host_shutdown,
            ),
        ];
        for (wish, end) in ends {
            if let Some(wish) = wish {
                *end = wish.value;
            }
        }
        if let Some(full) = &draft.on_disk_full {
            spec.lifecycle.on_disk_full = full.value;
        }
        spec.limits.share = draft.share;
        spec
    }

    fn kernel(&mut self, draft: &Draft, around: &Surroundings) -> PathBuf {
        let expected = "a kernel image";
        if let Some(kernel) = &draft.kernel {
            self.file(kernel, expected, false, false);
            return kernel.value.clone();
        }
        around.kernel.clone().unwrap_or_else(|| {
            self.problems.push(Problem {
                place: Place::Default {
                    key: "boot.kernel".to_owned(),
                },
                expectation: "the VM file names no kernel; expected `kernel = \"FILE\"` or \
                    `from_disk = \"DISK\"` in [boot], or the option --kernel FILE"
                    .to_owned(),
            });
            PathBuf::new()
        })
    }

    fn boot_disk(
        &mut self,
        from: &Located<Option<String>>,
        draft: &Draft,
        disks: &[DiskSpec],
    ) -> BootDisk {
        let disk = match &from.value {
            Some(name) => disks.iter().find(|disk| disk.name == *name),
            None => disks.first(),
        };
        let names: Vec<_> = disks.iter().map(|disk| disk.name.as_str()).collect();
        let expectation = match names.as_slice() {
            [] => "expected a disk of the machine, which has none".to_owned(),
            names => format!("expected one of the machine's disks: {}", names.join(", ")),
        };
        self.expect(disk.is_some(), from, expectation);
        let mut path = |path: &Option<Located<PathBuf>>| {
            let path = path.as_ref()?;
            let text = path.value.to_str().filter(|text| is_guest_path(text));
            let rule = format!(
                "expected a path on the disk, as UTF-8 of at most {GUEST_PATH_BYTES_MAX} bytes"
            );
            self.expect(text.is_some(), path, rule);
            text.map(str::to_owned)
        };
        BootDisk {
            disk: disk.map_or_else(String::new, |disk| disk.name.clone()),
            kernel: path(&draft.kernel),
            initrd: path(&draft.initrd),
        }
    }

    fn memory(
        &mut self,
        draft: &Draft,
        default: u64,
        pages: HugePages,
        around: &Surroundings,
    ) -> u64 {
        let memory = draft.memory.clone().unwrap_or_else(|| Located {
            value: default,
            place: Place::Default {
                key: format!("machine.memory = {}", show_size(default)),
            },
        });
        let (bytes, reserved) = (memory.value, pages == HugePages::Reserved);
        self.expect(
            bytes >= MEMORY_BYTES_MIN,
            &memory,
            format!("expected at least {}", show_size(MEMORY_BYTES_MIN)),
        );
        let unit = if reserved {
            HUGE_PAGE_BYTES
        } else {
            PAGE_BYTES
        };
        self.expect(
            bytes.is_multiple_of(unit),
            &memory,
            format!("expected a multiple of {}", show_size(unit)),
        );
        if reserved {
            let free = around.memory.huge_pages_free;
            let expectation = format!(
                "expected at most the {} that are free in the host's pool of huge pages \
                 (raise vm.nr_hugepages)",
                show_size(free)
            );
            self.expect(bytes <= free, &memory, expectation);
        } else if let (Some(available), false) = (around.memory.available, around.overcommit) {
            let expectation = format!(
                "expected at most the {} MiB that this host has available now \
                 (--overcommit starts the machine all the same)",
                available >> 20
            );
            self.expect(bytes <= available, &memory, expectation);
        }
        bytes
    }

    fn initrd(&mut self, draft: &Draft, memory_bytes: u64) -> Option<PathBuf> {
        let initrd = draft.initrd.as_ref()?;
        if let Some(facts) = self.file(initrd, "an initial RAM disk", false, false) {
            let fits = facts.bytes < memory_bytes;
            let have = show_size(memory_bytes);
            let expectation = format!(
                "expected a file that fits the machine's memory of {have}, found {} bytes",
                facts.bytes
            );
            self.expect(fits, initrd, expectation);
        }
        Some(initrd.value.clone())
    }

    fn vsock(&mut self, draft: &DraftVsock) -> VsockSpec {
        if let Some(path) = &draft.path {
            let name = path.value.file_name();
            self.expect(
                name.is_some_and(|name| name.len() <= SOCKET_NAME_BYTES_MAX),
                path,
                format!("expected a file name of at most {SOCKET_NAME_BYTES_MAX} bytes"),
            );
            let directory = path.value.parent();
            self.expect(
                directory.is_some_and(std::path::Path::is_dir),
                path,
                "expected a socket to be made in a directory that is there",
            );
        }
        VsockSpec {
            path: draft.path.as_ref().map(|path| path.value.clone()),
            ..draft
                .cid
                .as_ref()
                .map_or_else(VsockSpec::default, |cid| VsockSpec {
                    cid: cid.value,
                    path: None,
                })
        }
    }

    /// Every device but console and entropy source takes one of the slots that these leave.
    fn room(&mut self, draft: &Draft) {
        let disks = draft.disks.iter().map(|disk| &disk.place);
        let nets = draft.nets.iter().map(|net| &net.place);
        let shares = draft.shares.iter().map(|share| &share.place);
        let seed = usize::from(draft.cloud_init.is_some());
        let socket = usize::from(draft.vsock.is_some());
        let room = DEVICES_MAX - seed - socket;
        if let Some(place) = disks.chain(nets).chain(shares).nth(room) {
            let mut beside = String::new();
            if socket > 0 {
                beside.push_str(", beside the socket device");
            }
            if seed > 0 {
                beside.push_str(", beside the disk that cloud-init reads");
            }
            self.problems.push(Problem {
                place: place.clone(),
                expectation: format!(
                    "expected at most {room} disks, network devices and shared folders together{beside}"
                ),
            });
        }
    }

    fn disks(&mut self, drafts: &[DraftDisk], spec: &mut VmSpec) {
        for (n, draft) in drafts.iter().enumerate() {
            let Some(path) = &draft.path else {
                self.problems.push(Problem {
                    place: draft.place.clone(),
                    expectation: "expected a `path` for the disk".to_owned(),
                });
                continue;
            };
            let disk = self.disk(n, draft, path, drafts);
            let twin = spec.has_device(&disk.name) || is_taken(&disk.name);
            if let (Some(name), true) = (&draft.name, twin) {
                let message = "expected a name that no other device has";
                self.problems.push(name.problem(message));
            }
            spec.disks.push(disk);
        }
    }

    fn cloud_init(&mut self, draft: DraftCloudInit, disks: &[DraftDisk]) -> CloudInitSpec {
        for file in [&draft.user_data, &draft.meta_data, &draft.network_config] {
            let Some(path) = file else { continue };
            if let Some(facts) = self.file(path, "a file for cloud-init", false, false) {
                let most = crate::seed::FILE_BYTES_MAX;
                let expectation = format!("expected at most {}", show_size(most));
                self.expect(facts.bytes <= most, path, expectation);
            }
        }
        let told = "expected no meta_data beside it: that file says this, too";
        if let Some(hostname) = &draft.hostname {
            self.expect(draft.meta_data.is_none(), hostname, told);
            let rule = "expected letters, digits, '-' and '.', at most 64";
            self.expect(is_hostname(&hostname.value), hostname, rule);
        }
        if let Some(keys) = &draft.ssh_keys {
            self.expect(draft.meta_data.is_none(), keys, told);
            let rule = "expected public keys, one line each, such as \"ssh-ed25519 AAAA… me\"";
            self.expect(keys.value.iter().all(|key| is_public_key(key)), keys, rule);
        }
        for disk in disks {
            if let Some(name) = disk.name.as_ref().filter(|name| name.value == SEED_DISK) {
                let rule = "expected another name: the disk that cloud-init reads has it";
                self.problems.push(name.problem(rule));
            }
        }
        let path = |path: Option<Located<PathBuf>>| path.map(|path| path.value);
        CloudInitSpec {
            user_data: path(draft.user_data),
            meta_data: path(draft.meta_data),
            network_config: path(draft.network_config),
            ssh_keys: draft.ssh_keys.map(|keys| keys.value).unwrap_or_default(),
            hostname: draft.hostname.map(|name| name.value),
        }
    }

    fn shares(&mut self, drafts: &[DraftShare], spec: &mut VmSpec) {
        for (n, draft) in drafts.iter().enumerate() {
            let Some(path) = &draft.path else {
                self.problems.push(Problem {
                    place: draft.place.clone(),
                    expectation: "expected a `path` for the shared folder".to_owned(),
                });
                continue;
            };
            if let Err(expectation) = inspect_directory(&path.value) {
                self.problems.push(path.problem(expectation));
            }
            let name = draft.name.as_ref().map(|name| &name.value);
            let name = name.cloned().unwrap_or_else(|| format!("share{n}"));
            if let Some(given) = &draft.name {
                let fits = is_name(&name) && name.len() <= TAG_BYTES_MAX;
                let rule =
                    format!("{NAME_RULE}; at most {TAG_BYTES_MAX}, for it is the guest's tag");
                self.expect(fits, given, rule);
                let twin = spec.has_device(&name) || is_taken(&name) || is_seed(spec, &name);
                self.expect(!twin, given, "expected a name that no other device has");
            }
            let mut share = ShareSpec::new(name, path.value.clone());
            share.read_only = draft.read_only.as_ref().is_some_and(|on| on.value);
            share.owner = draft.owner.as_ref().map(|owner| owner.value);
            share.guest_owner = draft.guest_owner.as_ref().map(|owner| owner.value);
            if let Some(ms) = &draft.cache_ms {
                share.cache_ms = ms.value;
            }
            spec.shares.push(share);
        }
    }

    fn disk(
        &mut self,
        n: usize,
        draft: &DraftDisk,
        path: &Located<PathBuf>,
        all: &[DraftDisk],
    ) -> DiskSpec {
        let read_only = draft.read_only.as_ref().is_some_and(|on| on.value);
        let ephemeral = draft.ephemeral.as_ref().is_some_and(|on| on.value);
        let writes = !read_only && !ephemeral;
        let format = draft
            .format
            .as_ref()
            .map_or(ImageFormat::Raw, |format| format.value);
        let expected = "an image file or a block device";
        if let Some(facts) = self.file(path, expected, true, writes) {
            self.expect(
                facts.is_block
                    || format != ImageFormat::Raw
                    || facts.bytes.is_multiple_of(SECTOR_BYTES),
                path,
                format!(
                    "expected an image of whole 512-byte sectors, found {} bytes",
                    facts.bytes
                ),
            );
        }
        self.chain(draft, format, ephemeral, writes);
        if let Some(name) = &draft.name {
            self.expect(is_name(&name.value), name, NAME_RULE);
        }
        if let Some(serial) = &draft.serial {
            let plain = serial.value.bytes().all(|b| b.is_ascii_graphic());
            self.expect(
                plain && serial.value.len() <= SERIAL_BYTES_MAX,
                serial,
                format!("expected at most {SERIAL_BYTES_MAX} visible ASCII characters"),
            );
        }
        let name = draft
            .name
            .as_ref()
            .map_or_else(|| default_name(n, all), |name| name.value.clone());
        DiskSpec {
            path: path.value.clone(),
            format,
            extents: draft
                .extents
                .iter()
                .map(|extent| FileSpec {
                    path: extent.value.clone(),
                })
                .collect(),
            backing: draft
                .backing
                .iter()
                .map(|(path, format)| BackingSpec {
                    path: path.value.clone(),
                    format: *format,
                })
                .collect(),
            read_only,
            ephemeral,
            limits: self.limits(&draft.limits),
            shareable: draft.shareable.as_ref().is_some_and(|on| on.value),
            serial: draft.serial.as_ref().map_or_else(
                || name.chars().take(SERIAL_BYTES_MAX).collect(),
                |serial| serial.value.clone(),
            ),
            queues: draft.queues.as_ref().map_or(1, |queues| queues.value),
            name,
            bytes_min: 0,
        }
    }

    fn nets(&mut self, drafts: &[DraftNet], spec: &mut VmSpec) {
        for (n, draft) in drafts.iter().enumerate() {
            if let Some(net) = self.net(n, draft, spec, drafts) {
                spec.nets.push(net);
            }
        }
    }

    /// What the device is plugged into.
    fn net_source(&mut self, draft: &DraftNet, spec: &VmSpec) -> Option<NetSource> {
        let rule =
            "expected the name of a network interface: at most 15 letters, digits, '-', '_' or '.'";
        let named = |name: &Option<Located<String>>, make: fn(String) -> NetSource| {
            name.as_ref().map(|name| make(name.value.clone()))
        };
        let user = draft.user.as_ref().filter(|user| user.value);
        let publish = || {
            let publish = draft.publish.as_ref();
            publish
                .map(|publish| publish.value.clone())
                .unwrap_or_default()
        };
        let sources = [
            named(&draft.tap, NetSource::Tap),
            named(&draft.bridge, NetSource::Bridge),
            named(&draft.network, NetSource::Network),
            user.map(|_| NetSource::User { publish: publish() }),
        ];
        let mut sources = sources.into_iter().flatten();
        let (Some(source), None) = (sources.next(), sources.next()) else {
            self.problems.push(Problem {
                place: draft.place.clone(),
                expectation: "expected one of `user`, `network`, `tap` and `bridge`".to_owned(),
            });
            return None;
        };
        for interface in draft.tap.iter().chain(&draft.bridge) {
            self.expect(is_interface_name(&interface.value), interface, rule);
        }
        if let Some(network) = &draft.network {
            let rule = format!("expected {NETWORK_NAME_RULE}");
            self.expect(is_network_name(&network.value), network, rule);
            if let Some(mtu) = &draft.mtu {
                let rule = "expected none in a network, which has one for all";
                self.expect(false, mtu, rule);
            }
        }
        let single = user.is_some() || draft.network.is_some();
        if let Some(queues) = draft.queues.as_ref().filter(|_| single) {
            let rule = "expected 1 in a network, and with user networking";
            self.expect(queues.value == 1, queues, rule);
        }
        if let Some(publish) = &draft.publish {
            let rule = "expected only beside `user = true`: what is published leads through it";
            self.expect(user.is_some(), publish, rule);
            let others = spec.nets.iter().flat_map(NetSpec::published);
            let mut others: Vec<_> = others.cloned().collect();
            let twice = publish.value.iter().any(|port| {
                let taken = is_published(port, &others);
                others.push(port.clone());
                taken
            });
            self.expect(!twice, publish, "expected each port of the host once");
        }
        Some(source)
    }

    fn net(
        &mut self,
        n: usize,
        draft: &DraftNet,
        spec: &VmSpec,
        all: &[DraftNet],
    ) -> Option<NetSpec> {
        let source = self.net_source(draft, spec)?;
        let tap = |net: &DraftNet| net.tap.as_ref().map(|tap| tap.value.clone());
        let twin = tap(draft).is_some() && all.iter().take(n).any(|other| tap(other) == tap(draft));
        if let Some(tap) = &draft.tap {
            let rule = "expected an interface that no other device has";
            self.expect(!twin, tap, rule);
        }
        let default_name = format!("net{n}");
        let name = draft
            .name
            .as_ref()
            .map_or(&default_name, |name| &name.value);
        let taken = spec.has_device(name) || is_taken(name) || is_seed(spec, name);
        match &draft.name {
            Some(given) => {
                self.expect(is_name(name), given, NAME_RULE);
                self.expect(!taken, given, "expected a name that no other device has");
            }
            None if taken => self.problems.push(Problem {
                place: draft.place.clone(),
                expectation: format!("expected a `name`, since another device is called {name}"),
            }),
            None => {}
        }
        let (least, most) = MTU_BYTES;
        let mtu = draft.mtu.as_ref().and_then(|mtu| {
            let fits = u16::try_from(mtu.value).ok();
            let fits = fits.filter(|bytes| (least..=most).contains(bytes));
            self.expect(fits.is_some(), mtu, format!("expected {least} to {most}"));
            fits
        });
        Some(NetSpec {
            name: name.clone(),
            source,
            mac: draft
                .mac
                .as_ref()
                .map_or_else(|| NetSpec::default_mac(&spec.name, n), |mac| mac.value),
            mtu,
            queues: draft.queues.as_ref().map_or(1, |queues| queues.value),
            link_up: draft.link.as_ref().is_none_or(|link| link.value),
            limits: self.limits_named(&draft.limits, "packets_per_s"),
            card: self.card(draft),
        })
    }

    /// What the device is in its network.
    fn card(&mut self, draft: &DraftNet) -> CardSpec {
        let rule = format!("expected {CARD_RULE}");
        let is_in_network = draft.network.is_some();
        if let Some(tenant) = &draft.tenant {
            self.expect(is_in_network, tenant, rule.clone());
            let rule = format!("expected {TENANT_RULE}");
            self.expect(is_network_name(&tenant.value), tenant, rule);
        }
        if let Some(addresses) = &draft.addresses {
            self.expect(is_in_network, addresses, rule.clone());
            let rule = format!("expected {ADDRESSES_RULE}");
            self.expect(are_addresses(&addresses.value), addresses, rule);
        }
        let access = draft.vlan.as_ref().map(|vlan| {
            self.expect(is_in_network, vlan, rule.clone());
            let number = u16::try_from(vlan.value).unwrap_or(u16::MAX);
            self.expect(is_vlan(number), vlan, format!("expected {VLAN_RULE}"));
            CardVlan::Access(number)
        });
        let trunk = draft.trunk.as_ref().map(|trunk| {
            self.expect(is_in_network, trunk, rule);
            let rule = format!("expected {TRUNK_RULE}");
            self.expect(are_vlans(&trunk.value), trunk, rule);
            self.expect(draft.vlan.is_none(), trunk, "expected no `vlan` beside it");
            CardVlan::Trunk(trunk.value.clone())
        });
        CardSpec {
            tenant: draft.tenant.as_ref().map(|tenant| tenant.value.clone()),
            addresses: draft
                .addresses
                .as_ref()
                .map_or_else(Vec::new, |a| a.value.clone()),
            vlan: access.or(trunk).unwrap_or_default(),
        }
    }

    fn limits(&mut self, draft: &DraftLimits) -> DiskLimits {
        self.limits_named(draft, "requests_per_s")
    }

    fn limits_named(&mut self, draft: &DraftLimits, requests_key: &str) -> DiskLimits {
        let bytes = self.rate(
            &draft.bytes_per_s,
            &draft.bytes_burst,
            "bytes_per_s",
            BYTES_MIN,
        );
        let wide = |n: &Located<u32>| n.with(u64::from(n.value));
        let per_s = draft.requests_per_s.as_ref().map(wide);
        let burst = draft.requests_burst.as_ref().map(wide);
        let requests = self.rate(&per_s, &burst, requests_key, 1);
        DiskLimits { bytes, requests }
    }

    fn rate(
        &mut self,
        per_s: &Option<Located<u64>>,
        burst: &Option<Located<u64>>,
        key: &str,
        least: u64,
    ) -> Option<Rate> {
        for value in per_s.iter().chain(burst) {
            let rule = format!("expected at least {least}");
            self.expect(value.value >= least, value, rule);
        }
        match (per_s, burst) {
            (None, Some(burst)) => {
                self.problems
                    .push(burst.problem(format!("expected {key} beside it")));
                None
            }
            (None, None) => None,
            (Some(per_s), burst) => Some(Rate {
                per_s: per_s.value,
                burst: burst.as_ref().map_or(per_s.value, |burst| burst.value),
            }),
        }
    }

    /// Checks the files that a disk has besides its image.
    fn chain(&mut self, draft: &DraftDisk, format: ImageFormat, ephemeral: bool, writes: bool) {
        for extent in &draft.extents {
            self.file(extent, "a file with data of the image", false, writes);
        }
        for (below, _) in &draft.backing {
            self.file(below, "an image file or a block device", true, false);
        }
        if let Some(extent) = draft.extents.first() {
            let fits = format == ImageFormat::Vmdk && draft.extents.len() < FILES_MAX;
            let rule = "expected at most 31 extents, of an image with format = \"vmdk\"";
            self.expect(fits, extent, rule);
        }
        for (n, (below, format_below)) in draft.backing.iter().enumerate() {
            let last = n + 1 == draft.backing.len();
            let fits = match format_below {
                ImageFormat::Qcow2 => true,
                ImageFormat::Raw => last,
                ImageFormat::Vmdk => false,
            };
            let rule = "expected qcow2 images, and below them at most one raw image";
            self.expect(fits && n + 1 < FILES_MAX, below, rule);
            let rule = "expected backing images only for a disk with format = \"qcow2\"";
            self.expect(format == ImageFormat::Qcow2, below, rule);
        }
        if let Some(on) = draft.shareable.as_ref().filter(|on| on.value) {
            let rule = "expected a raw image for a disk that machines share: whoever uses another one keeps \
                        its tables in memory";
            self.expect(format == ImageFormat::Raw, on, rule);
        }
        if let Some(on) = draft.ephemeral.as_ref().filter(|_| ephemeral) {
            let rule = "expected a raw or qcow2 image for an ephemeral disk; \
                        convert it with `bulkhead image convert` first";
            self.expect(format != ImageFormat::Vmdk, on, rule);
        }
    }

    /// Looks at a file and checks that nobody else in this machine writes it.
    fn file(
        &mut self,
        path: &Located<PathBuf>,
        expected: &str,
        may_be_block: bool,
        writes: bool,
    ) -> Option<Facts> {
        let facts = match inspect(&path.value, expected, may_be_block, writes) {
            Ok(facts) => facts,
            Err(expectation) => {
                self.problems.push(path.problem(expectation));
                return None;
            }
        };
        let twin = self
            .files
            .iter()
            .find(|(_, other, w)| other.identity == facts.identity && (writes || *w));
        if let Some((other, ..)) = twin {
            let message = format!(
                "the same file is used at {}; \
                 expected a file of its own, or readonly = true for all who use it",
                other.place
            );
            self.problems.push(path.problem(message));
        }
        self.files.push((path.clone(), facts, writes));
        Some(facts)
    }
}

fn is_hostname(name: &str) -> bool {
    let plain = |label: &str| {
        let inner = label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-');
        (1..=63).contains(&label.len()) && inner && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 64 && name.split('.').all(plain)
}

/// Whether it looks like one; what it is worth is for the guest to find out.
fn is_public_key(key: &str) -> bool {
    let kind = key.split(' ').next().unwrap_or_default();
    let known = ["ssh-", "ecdsa-", "sk-"]
        .iter()
        .any(|known| kind.starts_with(known));
    known && key.contains(' ') && key.len() <= 16 << 10 && !key.chars().any(char::is_control)
}

/// `disk0` for the first disk and so on, past the names that other disks have been given.
fn default_name(n: usize, all: &[DraftDisk]) -> String {
    let given = |name: &str| {
        all.iter()
            .any(|d| d.name.as_ref().is_some_and(|given| given.value == name))
    };
    let name = format!("disk{n}");
    if !given(&name) {
        return name;
    }
    // One of these is free, for there are fewer disks than letters.
    ('a'..='z')
        .map(|letter| format!("disk{n}{letter}"))
        .find(|name| !given(name))
        .unwrap_or(name)
}
