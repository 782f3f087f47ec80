//! The processes of a machine in one life of it: what connects them, their birth, and the handles
//! to talk to and kill them.
//!
//! Windows, the legacy page and doorbells are made here and forgotten as soon as the processes have
//! them: the broker maps none and keeps none. A process that takes another's place gets the window that
//! the vCPU process hands back, and is born like the first one.

use super::consoles::{Ring, Rings};
use super::devices::DevicePlan;
use super::disk_hold::{Claimed, DiskHold};
use super::group_limits::{self, group_name};
use super::keeper::Keeper;
use super::record::{HelperRecord, ProcessRecord, start_time};
use super::resources::{DiskFiles, Hold, Resources, SharedFolder};
use super::session::{Restart, RunError, RunOptions};
use super::spec::{DiskSpec, HostShare, NetSource, ShareSpec, VmSpec};
use super::vsock::{self, MachineSocket};
use crate::launch::cgroup::{Device, Group, GroupLimits, Place, Reach, device_of};
use crate::launch::cores;
use crate::launch::{FolderTerms, Gift, LaunchError, Launched, Launcher};
use crate::network::board::{PortFds, Switchboard};
use crate::network::passt::Passt;
use crate::network::{Hold as NetHold, Tap};
use crate::supervisor::state::Rule;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::legacy_page::{self, LEGACY_PAGE_BYTES};
use bulkhead_ipc::protocol::birth::{
    DeviceOwn, FdRole, ImageFormat, KindConfig, LegacyConfig, VcpuConfig,
};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_ipc::window;
use bulkhead_policies::cache::Compiled;
use nix::sys::statfs::{TMPFS_MAGIC, fstatfs};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

/// A process of the machine.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) launched: Arc<Launched>,
    /// Name in messages.
    pub(super) name: String,
    /// virtio-mmio slot of a device.
    pub(super) slot: Option<u8>,
    pub(super) rule: Rule,
    /// Device and inode of its program.
    pub(super) program: (u64, u64),
    /// Version of its program, once it is locked.
    pub(super) version: Option<String>,
    /// A restart that will be told of when the version is known.
    pub(super) restart: Option<Restart>,
    /// Limits of its control group.
    group_limits: GroupLimits,
    group: Option<Group>,
}

/// All of them, the vCPU process first. Dropped, it leaves no process behind.
#[derive(Debug)]
pub(super) struct Household {
    pub(super) members: Vec<Member>,
    /// The host disks that its images are on.
    devices: Vec<Device>,
    /// What the first device processes will be given.
    rest: Option<Rest>,
    /// What their successors will be given.
    standing: Standing,
    /// The group around those of the processes and helpers: removed after them.
    machine_group: Option<Group>,
    place: Option<Place>,
}

/// What every birth of a machine needs.
pub(super) struct Nursery<'a> {
    pub(super) launcher: &'a mut Launcher,
    pub(super) compiled: &'a Compiled,
    /// Directory of policy overrides.
    pub(super) policies: Option<&'a Path>,
    pub(super) spec: &'a VmSpec,
    pub(super) devices: &'a [DevicePlan],
    pub(super) rings: &'a Rings,
    pub(super) keeper: &'a mut Keeper,
    /// Where control groups are.
    pub(super) reach: Reach,
}

/// Resources of the processes that are not started yet.
#[derive(Debug)]
struct Rest {
    wirings: Vec<DeviceWiring>,
    disks: Vec<DiskFiles>,
    generation: u32,
    console: Positions,
}

/// What device processes are given, whichever generation they are.
#[derive(Debug)]
struct Standing {
    /// `None` for one that cannot be had again.
    disks: Vec<Option<DiskHold>>,
    /// `None` for one that cannot be had again.
    folders: Vec<Option<SharedFolder>>,
    /// `None` for one that has to be opened again.
    nets: Vec<Option<NetHold>>,
    entropy: File,
    vsock: Option<MachineSocket>,
    /// Size of all disks together.
    disk_bytes: u64,
}

/// Where the streams of a console go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Positions {
    /// Position in the output ring up to which everything is stored.
    pub(super) output: u64,
    /// Bytes of input that the guest has been given.
    pub(super) input: u64,
}

/// When a device process is born.
#[derive(Debug, Clone, Copy)]
enum Occasion {
    /// With the machine. A console's streams go on there.
    First(Positions),
    /// In the place of one that is dead; the terminal has this size unless it was never resized.
    Again(Positions, Option<(u16, u16)>),
}

/// Between gate and device.
#[derive(Debug)]
pub(super) struct DeviceWiring {
    window: OwnedFd,
    kick: Doorbell,
    call: Doorbell,
}

/// Between the vCPUs and legacy.
pub(super) struct LegacyWiring {
    page: OwnedFd,
    kick: Doorbell,
    interrupt: Doorbell,
    reply: Doorbell,
}

impl DeviceWiring {
    fn new(device: &DevicePlan, generation: u32) -> io::Result<Self> {
        let window = sealed_memfd("bulkhead-window", u64::from(device.window_bytes))?;
        window::stamp(window.as_fd(), generation)?;
        Ok(Self {
            window,
            kick: Doorbell::new()?,
            call: Doorbell::new()?,
        })
    }

    /// Takes the rings of a dead process, which may have filled the doorbells so that they would never
    /// ring again.
    pub(super) fn silence(&self) {
        self.kick.take();
        self.call.take();
    }

    fn gifts(&self, index: u16) -> [Gift<'_>; 3] {
        [
            Gift::numbered(FdRole::Window, index, self.window.as_fd()),
            Gift::numbered(FdRole::Kick, index, self.kick.as_fd()),
            Gift::numbered(FdRole::Call, index, self.call.as_fd()),
        ]
    }
}

impl From<[OwnedFd; 3]> for DeviceWiring {
    fn from([window, kick, call]: [OwnedFd; 3]) -> Self {
        Self {
            window,
            kick: kick.into(),
            call: call.into(),
        }
    }
}

impl From<[OwnedFd; 4]> for LegacyWiring {
    fn from([page, kick, interrupt, reply]: [OwnedFd; 4]) -> Self {
        Self {
            page,
            kick: kick.into(),
            interrupt: interrupt.into(),
            reply: reply.into(),
        }
    }
}

impl LegacyWiring {
    fn new(generation: u32) -> io::Result<Self> {
        let page = sealed_memfd("bulkhead-legacy-page", LEGACY_PAGE_BYTES)?;
        legacy_page::stamp(page.as_fd(), generation)?;
        Ok(Self {
            page,
            kick: Doorbell::new()?,
            interrupt: Doorbell::new()?,
            reply: Doorbell::new()?,
        })
    }

    /// As [`DeviceWiring::silence`].
    pub(super) fn silence(&self) {
        self.kick.take();
        self.interrupt.take();
        self.reply.take();
    }

    fn gifts(&self) -> [Gift<'_>; 4] {
        [
            Gift::new(FdRole::LegacyPage, self.page.as_fd()),
            Gift::new(FdRole::LegacyKick, self.kick.as_fd()),
            Gift::new(FdRole::LegacyInterrupt, self.interrupt.as_fd()),
            Gift::new(FdRole::LegacyReply, self.reply.as_fd()),
        ]
    }
}

/// What the births of one life have in common.
struct Midwife<'m, 'n> {
    nursery: &'m mut Nursery<'n>,
    household: &'m mut Household,
}

impl Household {
    /// Starts the processes without which a guest can do nothing, the vCPU process first, and sends
    /// each its birth message. Does not wait for any.
    pub(super) fn start(
        nursery: &mut Nursery<'_>,
        mut resources: Resources,
        generation: u32,
    ) -> Result<Self, RunError> {
        let host = |cause: io::Error| RunError::Host {
            lacks: format!("shared memory or descriptors: {cause}"),
        };
        let legacy = LegacyWiring::new(generation).map_err(host)?;
        let wiring = |device| DeviceWiring::new(device, generation);
        let wirings: io::Result<Vec<_>> = nursery.devices.iter().map(wiring).collect();
        let wirings = wirings.map_err(host)?;
        let holds = nursery.spec.disks.iter().zip(&resources.disks);
        let in_use = |spec: &DiskSpec, cause: io::Error| {
            let name = &spec.name;
            RunError::Configuration(format!(
                "disk {name}: is in use by another machine: {cause}"
            ))
        };
        let hold = |spec, files| DiskHold::new(spec, files).map_err(|cause| in_use(spec, cause));
        let holds = holds.map(|(spec, files)| hold(spec, files).map(Some));
        let serial = nursery.rings.serial.positions();
        let console = nursery.rings.console.as_ref();
        let console = console.map(Ring::positions).unwrap_or_default();
        let disk_bytes = resources.disks.iter().flat_map(bytes_in_memory);
        let mut household = Self {
            members: Vec::new(),
            machine_group: None,
            devices: Vec::new(),
            rest: None,
            standing: Standing {
                disks: holds.collect::<Result<_, _>>()?,
                folders: std::mem::take(&mut resources.folders)
                    .into_iter()
                    .map(Some)
                    .collect(),
                nets: resources.nets.drain(..).map(Some).collect(),
                entropy: resources.entropy.try_clone().map_err(host)?,
                vsock: resources.vsock.take(),
                disk_bytes: disk_bytes.fold(0, u64::saturating_add),
            },
            place: None,
        };
        let devices = resources.disks.iter().flat_map(DiskFiles::all);
        let devices = devices.filter_map(device_of);
        household.devices = devices.collect::<BTreeSet<_>>().into_iter().collect();
        let mut midwife = Midwife {
            nursery,
            household: &mut household,
        };
        midwife.vcpu(generation, &wirings, &legacy, &resources, serial, console)?;
        midwife.legacy(generation, &legacy, serial)?;
        household.rest = Some(Rest {
            wirings,
            disks: resources.disks,
            generation,
            console,
        });
        Ok(household)
    }

    /// The processes of a machine that another broker has started, those that are dead included.
    pub(super) fn adopt(
        nursery: &Nursery<'_>,
        options: &RunOptions,
        found: Vec<Launched>,
    ) -> Result<Self, RunError> {
        let record = nursery.keeper.record();
        let disks: Vec<_> = nursery.spec.disks.iter().map(found_again).collect();
        let ends = disks.iter().flatten().flat_map(bytes_in_memory);
        let disk_bytes = ends.fold(0, u64::saturating_add);
        let nets = (0..).zip(&nursery.spec.nets).map(|(index, net)| {
            let mut serving = found.iter();
            let serving = serving.find(|p| (p.id.kind, p.id.index) == (ProcKind::Net, index))?;
            match net.source {
                // Its next process has another port, and the network knows of this one no more.
                NetSource::Network(_) => None,
                NetSource::Tap(_) | NetSource::Bridge(_) => taps_of(serving).map(NetHold::Tap),
                NetSource::User { .. } => {
                    let helper = record.helpers.iter().find(|h| h.device == net.name)?;
                    Some(NetHold::User(Passt::found(helper.clone())))
                }
            }
        });
        let nets = nets.collect();
        let mut members = Vec::new();
        for launched in found {
            let id = launched.id;
            let Some((policy, _)) = nursery.compiled.get(id.kind) else {
                let lacking = format!("no policy for {}", id.kind);
                return Err(RunError::Configuration(lacking));
            };
            let process = record.in_place_of(id);
            members.push(Member {
                launched: Arc::new(launched),
                name: process.map_or_else(|| id.to_string(), |p| p.name.clone()),
                slot: process.and_then(|p| p.slot),
                rule: Rule::of(policy, nursery.spec.limits.birth_timeout),
                program: process.map(|p| p.program).unwrap_or_default(),
                version: process.and_then(|p| p.version.clone()),
                restart: None,
                group_limits: group_limits::of(
                    nursery.spec,
                    nursery.devices,
                    disk_bytes,
                    id,
                    &policy.limits,
                ),
                // Whatever group it has, it keeps; one that has none yet gets one.
                group: process
                    .filter(|p| !p.groups.is_empty())
                    .map(|p| Group::known(p.groups.clone())),
            });
        }
        let hold = |(spec, files): (&DiskSpec, &Option<DiskFiles>)| {
            // What is written to an ephemeral disk has no name: it lives and dies with its process.
            let files = files.as_ref().filter(|_| !spec.ephemeral)?;
            DiskHold::new(spec, files)
                .inspect_err(|error| tracing::warn!(disk = spec.name, %error, "not held"))
                .ok()
        };
        let folder = |spec: &ShareSpec| {
            SharedFolder::open(spec)
                .inspect_err(|error| tracing::warn!(share = spec.name, %error, "not found"))
                .ok()
        };
        let entropy = File::open("/dev/urandom").map_err(|cause| RunError::Host {
            lacks: format!("/dev/urandom: {cause}"),
        })?;
        // Without it no successor of the device would start, but the machine lives.
        let vsock = vsock::path_for(nursery.spec, options).and_then(|path| {
            MachineSocket::at(&path)
                .inspect_err(
                    |error| tracing::warn!(?path, %error, "the machine's socket is out of reach"),
                )
                .ok()
        });
        let around = (!record.groups.is_empty()).then(|| Group::known(record.groups.clone()));
        let devices = disks
            .iter()
            .flatten()
            .flat_map(DiskFiles::all)
            .filter_map(device_of)
            .collect::<BTreeSet<_>>();
        Ok(Self {
            members,
            machine_group: around,
            devices: devices.into_iter().collect(),
            rest: None,
            standing: Standing {
                disks: nursery.spec.disks.iter().zip(&disks).map(hold).collect(),
                folders: nursery.spec.shares.iter().map(folder).collect(),
                nets,
                entropy,
                vsock,
                disk_bytes,
            },
            place: None,
        })
    }

    /// The machine's Unix socket.
    pub(super) const fn vsock(&self) -> Option<&MachineSocket> {
        self.standing.vsock.as_ref()
    }

    /// Starts the device processes, unless that was done. They come last because the guest runs
    /// while they come up: what it asks of them waits.
    pub(super) fn start_devices(&mut self, nursery: &mut Nursery<'_>) -> Result<(), RunError> {
        let Some(rest) = self.rest.take() else {
            return Ok(());
        };
        let mut midwife = Midwife {
            nursery,
            household: self,
        };
        for (device, wiring) in midwife.nursery.devices.iter().zip(&rest.wirings) {
            let disk = (device.kind == VirtioKind::Blk)
                .then(|| rest.disks.get(usize::from(device.index)))
                .flatten();
            let first = Occasion::First(rest.console);
            midwife.device(device, rest.generation, wiring, disk, first)?;
        }
        Ok(())
    }

    /// Tries to have the disk of process `id` for it. `None` while something of the process before it
    /// may still reach the disk; a device without a disk is always free.
    pub(super) fn claim_disk(&self, id: ProcId) -> io::Result<Option<Option<Claimed>>> {
        if id.kind != ProcKind::Blk {
            return Ok(Some(None));
        }
        let disk = self.standing.disks.get(usize::from(id.index));
        let disk = disk
            .and_then(Option::as_ref)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        disk.claim().map(|free| free.map(Some))
    }

    /// The files that the next process of disk `index` gets.
    pub(super) fn disk_hold(&mut self, index: u16) -> Option<&mut Option<DiskHold>> {
        self.standing.disks.get_mut(usize::from(index))
    }

    /// Starts `id` in the place of the generation before it, which is dead.
    pub(super) fn launch_again(
        &mut self,
        nursery: &mut Nursery<'_>,
        id: ProcId,
        wiring: &DeviceWiring,
        disk: Option<&DiskFiles>,
        positions: Positions,
        size: Option<(u16, u16)>,
    ) -> Result<(), RunError> {
        let mut devices = nursery.devices.iter();
        let device = devices.find(|d| (d.kind.proc_kind(), d.index) == (id.kind, id.index));
        let device = device.ok_or_else(|| RunError::Start {
            who: id.to_string(),
            reason: "there is no such device".to_owned(),
        })?;
        let mut midwife = Midwife {
            nursery,
            household: self,
        };
        let again = Occasion::Again(positions, size);
        midwife.device(device, id.generation, wiring, disk, again)
    }

    /// The same for the legacy process.
    pub(super) fn launch_legacy_again(
        &mut self,
        nursery: &mut Nursery<'_>,
        id: ProcId,
        wiring: &LegacyWiring,
        positions: Positions,
    ) -> Result<(), RunError> {
        let mut midwife = Midwife {
            nursery,
            household: self,
        };
        midwife.legacy(id.generation, wiring, positions)
    }

    /// Puts every process into a control group with the limits of its policy. Not part of the start,
    /// of which the guest's first instruction would be the later.
    pub(super) fn limit(&mut self, spec: &VmSpec, reach: Reach, keeper: &mut Keeper) {
        let place = self.place.take().unwrap_or_else(|| {
            let place = Place::find(reach);
            self.limit_machine(spec, &place).unwrap_or(place)
        });
        let mut made = Vec::new();
        for member in self.members.iter_mut().filter(|m| m.group.is_none()) {
            let id = member.launched.id;
            let name = group_name(&spec.name, &member.launched);
            match place.put(&name, &member.launched, member.group_limits, &self.devices) {
                Ok(group) => {
                    made.push((id, group.directories().to_vec()));
                    member.group = Some(group);
                }
                Err(error) => {
                    tracing::warn!(proc = %id, %error, "no control group: only rlimits apply");
                }
            }
        }
        for hold in self.standing.nets.iter_mut().flatten() {
            if let NetHold::User(passt) = hold
                && passt.limit(&place, &spec.name)
            {
                keeper.note(|record| record.put_helper(passt.record().clone()));
            }
        }
        self.place = Some(place);
        let around = self.machine_group.as_ref().map(Group::directories);
        keeper.note(|record| {
            record.groups = around.unwrap_or_default().to_vec();
            for (id, directories) in made {
                let mut processes = record.processes.iter_mut();
                if let Some(process) = processes.find(|process| process.id == id) {
                    process.groups = directories;
                }
            }
        });
    }

    /// Puts a group around those of the processes, when the machine's share of the host is limited.
    fn limit_machine(&mut self, spec: &VmSpec, place: &Place) -> Option<Place> {
        let share = &spec.limits.share;
        let first = self.members.first().map_or(0, |m| m.launched.pid);
        let name = format!("{}-{first}", spec.name);
        let mut members = self.members.iter().map(|m| &m.group_limits.share);
        let limits_disks = share.limits_disks() || members.any(HostShare::limits_disks);
        if limits_disks && self.devices.is_empty() {
            tracing::warn!("limits of disks are not in force: no image is on a block device");
        }
        match place.machine(&name, share, &self.devices) {
            Ok(made) => {
                let (place, group) = made?;
                self.machine_group = Some(group);
                Some(place)
            }
            Err(error) => {
                tracing::warn!(%error, "the [limits] of the VM file are not in force");
                None
            }
        }
    }

    /// A device is lost for good: what it was plugged into is nobody's any more.
    pub(super) fn unplug(&mut self, id: ProcId) {
        let place = self.standing.nets.get_mut(usize::from(id.index));
        if let Some(place) = place.filter(|_| id.kind == ProcKind::Net) {
            *place = None;
        }
    }

    pub(super) fn member(&self, id: ProcId) -> Option<&Member> {
        self.members.iter().find(|m| m.launched.id == id)
    }

    /// The member in the place of `id`, whichever its generation.
    pub(super) fn in_place_of(&mut self, id: ProcId) -> Option<&mut Member> {
        let same = |m: &&mut Member| {
            let member = m.launched.id;
            (member.kind, member.index) == (id.kind, id.index)
        };
        self.members.iter_mut().find(same)
    }

    /// The newest generation of any process.
    pub(super) fn newest_generation(&self) -> u32 {
        let generations = self.members.iter().map(|m| m.launched.id.generation);
        generations.max().unwrap_or(0)
    }

    pub(super) fn of_kind(&self, kind: ProcKind) -> Option<&Member> {
        self.members.iter().find(|m| m.launched.id.kind == kind)
    }
}

impl Drop for Household {
    fn drop(&mut self) {
        for member in &self.members {
            // Already dead is as good.
            let _killed = member.launched.kill();
        }
    }
}

impl Midwife<'_, '_> {
    fn vcpu(
        &mut self,
        generation: u32,
        wirings: &[DeviceWiring],
        legacy: &LegacyWiring,
        resources: &Resources,
        serial: Positions,
        console: Positions,
    ) -> Result<(), RunError> {
        let (devices, spec) = (self.nursery.devices, self.nursery.spec);
        let mut gifts = vec![
            Gift::new(FdRole::Kvm, resources.kvm.as_fd()),
            Gift::new(FdRole::Kernel, resources.kernel.as_fd()),
        ];
        let optional = [
            (FdRole::Initrd, &resources.initrd),
            (FdRole::Core, &resources.core),
        ];
        for (role, file) in optional {
            gifts.extend(file.as_ref().map(|file| Gift::new(role, file.as_fd())));
        }
        for (device, wiring) in devices.iter().zip(wirings) {
            gifts.extend(wiring.gifts(device.slot.into()));
        }
        gifts.extend(legacy.gifts());
        let rings = self.nursery.rings;
        gifts.extend(rings.serial.keepsakes(0));
        if let Some(console) = &rings.console {
            gifts.extend(console.keepsakes(1));
        }
        let positions = |device: &DevicePlan| match device.kind {
            VirtioKind::Console => console,
            VirtioKind::Blk
            | VirtioKind::Rng
            | VirtioKind::Net
            | VirtioKind::Vsock
            | VirtioKind::Fs => Positions::default(),
        };
        let slots = devices.iter().map(|d| d.as_slot(generation, positions(d)));
        let config = VcpuConfig {
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            huge_pages: spec.huge_pages,
            cmdline: spec.cmdline_in_full(),
            quirks: resources.quirks,
            devices: slots.collect(),
            legacy_generation: generation,
            legacy_output_position: serial.output,
        };
        let id = ProcId {
            kind: ProcKind::Vcpu,
            index: 0,
            generation,
        };
        self.birth(id, "vcpu", None, &gifts, KindConfig::Vcpu(config))
    }

    fn legacy(
        &mut self,
        generation: u32,
        wiring: &LegacyWiring,
        positions: Positions,
    ) -> Result<(), RunError> {
        let rings = self.nursery.rings;
        let gifts: Vec<Gift<'_>> = rings
            .serial
            .gifts()
            .into_iter()
            .chain(wiring.gifts())
            .collect();
        let config = LegacyConfig {
            output_capacity: self.nursery.spec.console.history_bytes,
            output_position: positions.output,
            input_position: positions.input,
            rtc_offset_s: 0,
        };
        let config = KindConfig::Legacy(config);
        let id = ProcId {
            kind: ProcKind::Legacy,
            index: 0,
            generation,
        };
        self.birth(id, "legacy", None, &gifts, config)
    }

    /// The first process of a device as well as any later one.
    fn device(
        &mut self,
        device: &DevicePlan,
        generation: u32,
        wiring: &DeviceWiring,
        disk: Option<&DiskFiles>,
        occasion: Occasion,
    ) -> Result<(), RunError> {
        let rings = self.nursery.rings;
        if device.kind == VirtioKind::Net {
            let networks = &self.nursery.keeper.record().options.networks;
            let again = matches!(occasion, Occasion::Again(..));
            self.household
                .standing
                .plug_in(self.nursery.spec, device.index, networks, again)?;
        }
        let standing = &mut self.household.standing;
        let entropy = standing
            .entropy
            .try_clone()
            .map_err(|cause| RunError::Host {
                lacks: format!("a descriptor: {cause}"),
            })?;
        let (positions, size, is_successor) = match occasion {
            Occasion::First(positions) => (positions, None, false),
            Occasion::Again(positions, size) => (positions, size, true),
        };
        let listener = (device.kind == VirtioKind::Vsock).then(|| listener(standing));
        let listener = listener.transpose()?;
        let place = usize::from(device.index);
        let folder = (device.kind == VirtioKind::Fs)
            .then(|| standing.folders.get(place).and_then(Option::as_ref))
            .flatten();
        let folder = folder.map(|folder| {
            let fd = folder.directory.try_clone();
            fd.map(|fd| (fd, (folder.terms, folder.guest_owner)))
        });
        let folder = folder.transpose().map_err(|cause| RunError::Host {
            lacks: format!("a descriptor: {cause}"),
        })?;
        let (taps, cuts_udp) = standing.tap(device)?;
        let port = standing.port(device)?;
        let (user, helper) = standing.user(device).unzip();
        if let Some(helper) = helper {
            self.nursery.keeper.note(|record| record.put_helper(helper));
        }
        let mut gifts = Vec::from(wiring.gifts(0));
        gifts.extend(
            listener
                .as_ref()
                .map(|fd| Gift::new(FdRole::Listener, fd.as_fd())),
        );
        match (device.kind, &rings.console) {
            (VirtioKind::Blk, _) => gifts.extend(disk.into_iter().flat_map(DiskFiles::gifts)),
            (VirtioKind::Rng, _) => gifts.push(Gift::new(FdRole::Entropy, entropy.as_fd())),
            (VirtioKind::Net, _) => {
                let queues = taps.iter().zip(0..);
                gifts.extend(
                    queues.map(|(queue, index)| Gift::numbered(FdRole::Tap, index, queue.as_fd())),
                );
                gifts.extend(user.iter().map(|fd| Gift::new(FdRole::Frames, fd.as_fd())));
                gifts.extend(port.iter().flat_map(|port| {
                    [
                        Gift::new(FdRole::Port, port.memory.as_fd()),
                        Gift::new(FdRole::PortKick, port.kick.as_fd()),
                        Gift::new(FdRole::PortCall, port.call.as_fd()),
                    ]
                }));
            }
            (VirtioKind::Console, Some(ring)) => gifts.extend(ring.gifts()),
            (VirtioKind::Console, None) | (VirtioKind::Vsock, _) => {}
            (VirtioKind::Fs, _) => {
                gifts.extend(
                    folder
                        .as_ref()
                        .map(|(fd, _)| Gift::new(FdRole::Folder, fd.as_fd())),
                );
            }
        }
        let record = self.nursery.keeper.record();
        let mut config = device.as_device(positions, size, record, cuts_udp);
        config.own = config.own.born_as(generation, is_successor);
        let terms = folder.as_ref().map(|(_, (terms, _))| *terms);
        if let (
            DeviceOwn::Fs {
                own, guest_owner, ..
            },
            Some((_, (terms, guest))),
        ) = (&mut config.own, &folder)
        {
            *own = self.nursery.launcher.inside(terms);
            *guest_owner = *guest;
        }
        let config = KindConfig::Device(config);
        let id = ProcId {
            kind: device.kind.proc_kind(),
            index: device.index,
            generation,
        };
        self.birth_with(id, &device.name, Some(device.slot), &gifts, config, terms)
    }

    /// Lets only this machine's processes run beside each other on one core.
    fn share_cores(&self, newborn: &Launched) {
        let done = match self.household.of_kind(ProcKind::Vcpu) {
            Some(vcpu) => cores::share(vcpu.launched.pid, newborn.pid),
            None => cores::create(newborn.pid),
        };
        if let Err(errno) = done {
            tracing::warn!(proc = %newborn.id, %errno, "no core-scheduling cookie");
        }
    }

    fn birth(
        &mut self,
        id: ProcId,
        name: &str,
        slot: Option<u8>,
        gifts: &[Gift<'_>],
        config: KindConfig,
    ) -> Result<(), RunError> {
        self.birth_with(id, name, slot, gifts, config, None)
    }

    fn birth_with(
        &mut self,
        id: ProcId,
        name: &str,
        slot: Option<u8>,
        gifts: &[Gift<'_>],
        config: KindConfig,
        folder: Option<FolderTerms>,
    ) -> Result<(), RunError> {
        let fails = |cause: LaunchError| RunError::Start {
            who: name.to_owned(),
            reason: cause.to_string(),
        };
        let Some((policy, filters)) = self.nursery.compiled.get(id.kind) else {
            let lacking = format!("no policy for {}", id.kind);
            return Err(RunError::Configuration(lacking));
        };
        let adoption = self.nursery.keeper.home().adoption_socket(id);
        let adoption = adoption.map_err(|cause| {
            let what = "its adoption socket";
            fails(LaunchError::Os { what, cause })
        })?;
        let launcher = &mut self.nursery.launcher;
        let launched = launcher.launch_with(id, policy, gifts, &adoption, folder);
        let launched = launched.map_err(fails)?;
        self.share_cores(&launched);
        let program = self.nursery.launcher.program(id).unwrap_or_default();
        // From here on it is killed when anything goes wrong.
        let launched = Arc::new(launched);
        let bytes = self.household.standing.disk_bytes;
        let (spec, devices) = (self.nursery.spec, self.nursery.devices);
        let group_limits = group_limits::of(spec, devices, bytes, id, &policy.limits);
        let member = Member {
            launched: Arc::clone(&launched),
            name: name.to_owned(),
            slot,
            rule: Rule::of(policy, self.nursery.spec.limits.birth_timeout),
            program,
            version: None,
            restart: None,
            group_limits,
            group: None,
        };
        match self.household.in_place_of(id) {
            Some(place) => *place = member,
            None => self.household.members.push(member),
        }
        let token = crate::random::bytes().map_err(|cause| RunError::Host {
            lacks: format!("random numbers: {cause}"),
        })?;
        let record = ProcessRecord {
            id,
            name: name.to_owned(),
            slot,
            token,
            pid: launched.pid,
            // It is not reaped, so there is one even if it is dead.
            start_time: start_time(launched.pid).unwrap_or(0),
            program,
            version: None,
            groups: Vec::new(),
            users: launched.users,
        };
        // From here on it lives without this broker, so the next one must be able to find it.
        let put = self.nursery.keeper.put(record);
        put.map_err(|cause| RunError::Host {
            lacks: format!("a place for the machine's record: {cause}"),
        })?;
        let birth = launched.birth(self.nursery.spec.name.clone(), token, filters, config);
        let sent = launched.bear(&birth);
        sent.map_err(|cause| fails(cause.into()))
    }
}

/// The machine's listening socket, for another process.
fn listener(standing: &mut Standing) -> Result<OwnedFd, RunError> {
    let fails = |reason: String| RunError::Start {
        who: "vsock".to_owned(),
        reason: format!("the machine's socket {reason}"),
    };
    let socket = standing.vsock.as_mut();
    let socket = socket.ok_or_else(|| fails("is out of reach".to_owned()))?;
    let listener = socket
        .listener()
        .map_err(|error| fails(error.to_string()))?;
    listener
        .try_clone_to_owned()
        .map_err(|error| fails(error.to_string()))
}

impl Standing {
    /// Sees to it that the interface of network device `index` is there, or that a process which follows
    /// another has a port of its own.
    fn plug_in(
        &mut self,
        spec: &VmSpec,
        index: u16,
        networks: &Switchboard,
        again: bool,
    ) -> Result<(), RunError> {
        let n = usize::from(index);
        let (Some(place), Some(net)) = (self.nets.get_mut(n), spec.nets.get(n)) else {
            return Ok(());
        };
        match place {
            Some(NetHold::Tap(_)) => return Ok(()),
            Some(NetHold::Port(_) | NetHold::User(_)) if !again => return Ok(()),
            // One before it has ports of the host that the next one needs.
            Some(NetHold::User(_)) => *place = None,
            Some(NetHold::Port(_)) | None => {}
        }
        *place = Some(NetHold::open(&spec.name, n, net, networks, again)?);
        Ok(())
    }

    /// The wire to the program that speaks for the guest on a network device, if there is one, and what to know of that.
    fn user(&mut self, device: &DevicePlan) -> Option<(OwnedFd, HelperRecord)> {
        let hold = self.nets.get_mut(usize::from(device.index));
        let is_net = device.kind == VirtioKind::Net;
        let Some(NetHold::User(passt)) = hold.and_then(Option::as_mut).filter(|_| is_net) else {
            return None;
        };
        Some((passt.take_wire()?, passt.record().clone()))
    }

    /// Second descriptors of a network device's port, if it has one.
    fn port(&self, device: &DevicePlan) -> Result<Option<PortFds>, RunError> {
        let hold = self.nets.get(usize::from(device.index));
        let is_net = device.kind == VirtioKind::Net;
        let Some(NetHold::Port(plugged)) = hold.and_then(Option::as_ref).filter(|_| is_net) else {
            return Ok(None);
        };
        let port = plugged.port.try_clone();
        port.map(Some).map_err(|cause| RunError::Host {
            lacks: format!("a descriptor: {cause}"),
        })
    }

    /// Second descriptors of it, and whether the host cuts UDP datagrams. None for what is no network device.
    fn tap(&self, device: &DevicePlan) -> Result<(Vec<OwnedFd>, bool), RunError> {
        let tap = self.nets.get(usize::from(device.index));
        let is_net = device.kind == VirtioKind::Net;
        let Some(NetHold::Tap(tap)) = tap.and_then(Option::as_ref).filter(|_| is_net) else {
            return Ok((Vec::new(), false));
        };
        let queues = tap.queues.iter().map(OwnedFd::try_clone);
        let queues = queues.collect::<io::Result<_>>();
        let queues = queues.map_err(|cause| RunError::Host {
            lacks: format!("a descriptor: {cause}"),
        })?;
        Ok((queues, tap.cuts_udp))
    }
}

/// Second descriptors of the interface that a living process of a network device serves, so that it stays when
/// the process does not.
fn taps_of(process: &Launched) -> Option<Tap> {
    let queues = process.descriptors_of(Path::new("/dev/net/tun"));
    let queues = queues
        .inspect_err(
            |error| tracing::warn!(proc = %process.id, %error, "its interface goes with it"),
        )
        .ok()
        .filter(|queues| !queues.is_empty())?;
    Tap::found(queues)
}

/// How much of the host's memory the files of a disk may take, which is charged to its process: each as
/// long as it is, and one that grows on a file system in memory as much as that has.
fn bytes_in_memory(files: &DiskFiles) -> Vec<u64> {
    // The length of a block device is where its end is.
    let bytes = |mut file: &File| file.seek(SeekFrom::End(0)).unwrap_or(0);
    let mut all: Vec<_> = files.all().map(bytes).collect();
    let growing = files.own.first().filter(|_| files.grows);
    let growing = growing.and_then(|file| fstatfs(file).ok());
    if let Some(place) = growing.filter(|place| place.filesystem_type() == TMPFS_MAGIC) {
        let block = u64::try_from(place.block_size()).unwrap_or(0);
        all.push(place.blocks().saturating_mul(block));
    }
    all
}

/// The files of a disk of a machine that another broker has started, where they can be found by name.
fn found_again(spec: &DiskSpec) -> Option<DiskFiles> {
    let writes = Hold::of(spec).writes();
    let open = |path: &Path, writes: bool| {
        let mut options = File::options();
        options.read(true).write(writes).open(path).ok()
    };
    let own = std::iter::once(&spec.path).chain(spec.extents.iter().map(|extent| &extent.path));
    let below = spec.backing.iter().map(|below| open(&below.path, false));
    Some(DiskFiles {
        own: own.map(|path| open(path, writes)).collect::<Option<_>>()?,
        below: below.collect::<Option<_>>()?,
        grows: spec.format == ImageFormat::Qcow2,
    })
}
