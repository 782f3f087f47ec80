//! Which virtio devices a machine has, where, and with which features: plain data from the
//! specification, the same for the gates and for the device processes.

use super::household::Positions;
use super::record::Record;
use super::session::default_name;
use super::spec::{
    ConsoleSpec, DiskSpec, NetSource, NetSpec, OnDiskFull, ShareSpec, VmSpec, VsockSpec,
};
use crate::image::chain::name_of;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{DeviceConfig, DeviceOwn, ImageFormat, ImageLayer, VirtioSlot};
use bulkhead_ipc::window::WindowLayout;

/// Slot of the virtio console.
const CONSOLE_SLOT: u8 = 0;
/// Slot of the entropy source.
const RNG_SLOT: u8 = 1;
/// Slot of the first of all others: disks, then network devices, folders and the socket device.
const FIRST_OTHER_SLOT: u8 = 2;

const SMALL_QUEUE: u16 = 64;
/// Size of each queue of a disk.
pub const DISK_QUEUE: u16 = 256;
/// A console's window holds every receive buffer that a driver keeps posted, and output besides.
const CONSOLE_WINDOW_BYTES: u32 = 1 << 20;
const RNG_WINDOW_BYTES: u32 = 256 << 10;
/// Sizes of the queues of a socket device: buffers for packets, packets of the guest, buffers for events.
const VSOCK_QUEUES: [u16; 3] = [128, 128, 8];
/// A third of it, which one queue may have, is room for all buffers for packets, of a little more than a page as
/// Linux offers them, or for twenty packets of 64 KiB.
const VSOCK_WINDOW_BYTES: u32 = 4 << 20;
/// Room for 32 requests of 128 KiB in flight, and for one of a quarter of it.
const DISK_WINDOW_BYTES: u32 = 8 << 20;
/// Room for a request of 1 MiB of data in a quarter of it, and for seven of them at a time.
const SHARE_DATA_BYTES: u32 = 8 << 20;
/// Size of the queue for what must not wait; forgetting, mostly.
const SHARE_URGENT_QUEUE: u16 = 64;
/// Size of the queue of a shared folder's requests. Linux makes requests of no more pages than this.
const SHARE_QUEUE: u16 = 256;
/// Longest segment of a disk request in bytes.
const SEGMENT_BYTES_MAX: u32 = 32 << 10;
const SECTOR_BYTES: u32 = 512;
const BLOCK_BYTES: u32 = 512;

/// Size of each queue of frames.
pub const NET_QUEUE: u16 = 256;
/// What a pair of queues, and everything together once more, adds to the window of a network device. A half of
/// it is for buffers to receive into: one page for each. The other takes 14 frames of 64 KiB.
const NET_WINDOW_BYTES: u32 = 2 << 20;

/// Feature bits of virtio 1.2, sections 5.1.3, 5.2.3 and 5.3.3.
mod feature {
    pub(super) const BLK_SIZE_MAX: u64 = 1 << 1;
    pub(super) const BLK_SEG_MAX: u64 = 1 << 2;
    pub(super) const BLK_RO: u64 = 1 << 5;
    pub(super) const BLK_BLK_SIZE: u64 = 1 << 6;
    pub(super) const BLK_FLUSH: u64 = 1 << 9;
    pub(super) const BLK_MQ: u64 = 1 << 12;
    pub(super) const BLK_DISCARD: u64 = 1 << 13;
    pub(super) const BLK_WRITE_ZEROES: u64 = 1 << 14;
    pub(super) const CONSOLE_SIZE: u64 = 1;
    pub(super) const NET_CSUM: u64 = 1 << 0;
    pub(super) const NET_GUEST_CSUM: u64 = 1 << 1;
    pub(super) const NET_MTU: u64 = 1 << 3;
    pub(super) const NET_MAC: u64 = 1 << 5;
    pub(super) const NET_GUEST_TSO: u64 = 1 << 7 | 1 << 8;
    pub(super) const NET_HOST_TSO: u64 = 1 << 11 | 1 << 12;
    pub(super) const NET_MRG_RXBUF: u64 = 1 << 15;
    pub(super) const NET_STATUS: u64 = 1 << 16;
    pub(super) const NET_CTRL_VQ: u64 = 1 << 17;
    pub(super) const NET_MQ: u64 = 1 << 22;
    pub(super) const NET_HOST_USO: u64 = 1 << 56;
}

/// A virtio device of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DevicePlan {
    /// virtio-mmio slot.
    pub slot: u8,
    /// Name in messages.
    pub name: String,
    /// Which of the machine's devices of its kind.
    pub index: u16,
    /// What it is.
    pub kind: VirtioKind,
    /// Size of each queue.
    pub queue_sizes: Vec<u16>,
    /// Size of the window in bytes.
    pub window_bytes: u32,
    /// Feature bits that may be offered.
    pub features: u64,
    /// Configuration image.
    pub config: Vec<u8>,
    /// What only this kind needs.
    pub own: DeviceOwn,
}

/// The devices of `spec`, by slot.
#[must_use]
pub fn plan(spec: &VmSpec) -> Vec<DevicePlan> {
    let console = spec.console.virtio.then(|| console(&spec.console));
    let waits = spec.lifecycle.on_disk_full == OnDiskFull::Pause;
    let disks = (0..).zip(&spec.disks);
    let disks = disks.map(|(index, disk)| self::disk(index, disk, waits));
    let nets = (0..).zip(&spec.nets);
    let nets = nets.map(|(index, net)| self::net(index, net));
    let shares = (0..).zip(&spec.shares);
    let shares = shares.map(|(index, share)| self::share(index, share));
    let vsock = spec.vsock.as_ref().map(vsock);
    let others = disks.chain(nets).chain(shares).chain(vsock);
    let others = (FIRST_OTHER_SLOT..).zip(others);
    let others = others.map(|(slot, plan)| DevicePlan { slot, ..plan });
    console.into_iter().chain([rng()]).chain(others).collect()
}

fn net(index: u16, spec: &NetSpec) -> DevicePlan {
    let pairs = usize::from(spec.queues);
    let mut features = feature::NET_GUEST_CSUM
        | feature::NET_MAC
        | feature::NET_GUEST_TSO
        | feature::NET_MRG_RXBUF
        | feature::NET_STATUS;
    features |= match &spec.source {
        NetSource::Tap(_) | NetSource::Bridge(_) => {
            feature::NET_CSUM | feature::NET_HOST_TSO | feature::NET_HOST_USO
        }
        // A switch cuts no datagrams.
        NetSource::Network(_) => feature::NET_CSUM | feature::NET_HOST_TSO,
        NetSource::User { .. } => 0,
    };
    let mut config = Image::new(VirtioKind::Net);
    config.put(0, &spec.mac);
    config.put(6, &u16::from(spec.link_up).to_le_bytes());
    config.put(8, &u16::from(spec.queues).to_le_bytes());
    if let Some(mtu) = spec.mtu {
        features |= feature::NET_MTU;
        config.put(10, &mtu.to_le_bytes());
    }
    let mut queue_sizes = vec![NET_QUEUE; 2 * pairs];
    if pairs > 1 {
        features |= feature::NET_CTRL_VQ | feature::NET_MQ;
        queue_sizes.push(SMALL_QUEUE);
    }
    DevicePlan {
        slot: 0,
        name: spec.name.clone(),
        index,
        kind: VirtioKind::Net,
        queue_sizes,
        window_bytes: NET_WINDOW_BYTES * (1 + u32::from(spec.queues)),
        features,
        config: config.0,
        own: DeviceOwn::Net {
            link_up: spec.link_up,
            cuts_udp: false,
            limits: spec.limits,
        },
    }
}

fn console(spec: &ConsoleSpec) -> DevicePlan {
    let (columns, rows) = spec.size;
    let mut config = Image::new(VirtioKind::Console);
    config.put(0, &columns.to_le_bytes());
    config.put(2, &rows.to_le_bytes());
    config.put(4, &1u32.to_le_bytes());
    DevicePlan {
        slot: CONSOLE_SLOT,
        name: default_name(VirtioKind::Console).to_owned(),
        index: 0,
        kind: VirtioKind::Console,
        queue_sizes: vec![SMALL_QUEUE; 2],
        window_bytes: CONSOLE_WINDOW_BYTES,
        features: feature::CONSOLE_SIZE,
        config: config.0,
        own: DeviceOwn::Console {
            output_capacity: spec.history_bytes,
            output_position: 0,
            input_position: 0,
            size: spec.size,
        },
    }
}

fn rng() -> DevicePlan {
    DevicePlan {
        slot: RNG_SLOT,
        name: default_name(VirtioKind::Rng).to_owned(),
        index: 0,
        kind: VirtioKind::Rng,
        queue_sizes: vec![SMALL_QUEUE],
        window_bytes: RNG_WINDOW_BYTES,
        features: 0,
        config: Vec::new(),
        own: DeviceOwn::Rng,
    }
}

fn vsock(spec: &VsockSpec) -> DevicePlan {
    let mut config = Image::new(VirtioKind::Vsock);
    config.put(0, &u64::from(spec.cid).to_le_bytes());
    DevicePlan {
        slot: 0,
        name: default_name(VirtioKind::Vsock).to_owned(),
        index: 0,
        kind: VirtioKind::Vsock,
        queue_sizes: VSOCK_QUEUES.to_vec(),
        window_bytes: VSOCK_WINDOW_BYTES,
        features: 0,
        config: config.0,
        own: DeviceOwn::Vsock {
            guest_cid: spec.cid,
            generation: 0,
            is_successor: false,
        },
    }
}

fn disk(index: u16, spec: &DiskSpec, waits_for_room: bool) -> DevicePlan {
    let queue_sizes = vec![DISK_QUEUE; usize::from(spec.queues)];
    let window_bytes = DISK_WINDOW_BYTES;
    let layout = WindowLayout::new(window_bytes as usize, &queue_sizes);
    // Any one legal request fits a quarter of the window, and a chain with header and status fits
    // the queue.
    let request_bytes = layout.map_or(0, |layout| layout.request_bytes_max());
    let request_bytes = u32::try_from(request_bytes).unwrap_or(0);
    let segments = (request_bytes / SEGMENT_BYTES_MAX).clamp(1, u32::from(DISK_QUEUE) - 2);
    let mut features =
        feature::BLK_SIZE_MAX | feature::BLK_SEG_MAX | feature::BLK_BLK_SIZE | feature::BLK_FLUSH;
    let mut config = Image::new(VirtioKind::Blk);
    config.put(8, &SEGMENT_BYTES_MAX.to_le_bytes());
    config.put(12, &segments.to_le_bytes());
    config.put(20, &BLOCK_BYTES.to_le_bytes());
    config.put(34, &u16::from(spec.queues).to_le_bytes());
    if spec.queues > 1 {
        features |= feature::BLK_MQ;
    }
    if spec.read_only {
        features |= feature::BLK_RO;
    } else {
        features |= feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
        let sectors_max = u32::MAX / SECTOR_BYTES;
        config.put(36, &sectors_max.to_le_bytes());
        config.put(40, &1u32.to_le_bytes());
        config.put(44, &(4096 / SECTOR_BYTES).to_le_bytes());
        config.put(48, &sectors_max.to_le_bytes());
        config.put(52, &1u32.to_le_bytes());
        config.put(56, &[1]);
    }
    DevicePlan {
        slot: 0,
        name: spec.name.clone(),
        index,
        kind: VirtioKind::Blk,
        queue_sizes,
        window_bytes,
        features,
        config: config.0,
        own: DeviceOwn::Blk {
            read_only: spec.read_only,
            serial: spec.serial.clone(),
            waits_for_room,
            limits: spec.limits,
            ephemeral: spec.ephemeral,
            layers: layers(spec),
            bytes_min: spec.bytes_min,
        },
    }
}

fn share(index: u16, spec: &ShareSpec) -> DevicePlan {
    let mut config = Image::new(VirtioKind::Fs);
    config.put(0, spec.name.as_bytes());
    config.put(36, &1u32.to_le_bytes());
    let kept = u32::try_from(VirtioKind::Fs.kept_bytes()).unwrap_or(0);
    DevicePlan {
        slot: 0,
        name: spec.name.clone(),
        index,
        kind: VirtioKind::Fs,
        queue_sizes: vec![SHARE_URGENT_QUEUE, SHARE_QUEUE],
        window_bytes: SHARE_DATA_BYTES + kept,
        features: 0,
        config: config.0,
        own: DeviceOwn::Fs {
            read_only: spec.read_only,
            // Who that is, is known when the folder is open.
            own: (0, 0),
            guest_owner: (0, 0),
            cache_ms: spec.cache_ms,
        },
    }
}

/// The images of a disk as its process is told of them, in the order of their descriptors.
pub(super) fn layers(spec: &DiskSpec) -> Vec<ImageLayer> {
    let layer = |format, files| ImageLayer { format, files };
    let own = std::iter::once(&spec.path).chain(spec.extents.iter().map(|extent| &extent.path));
    let own = layer(spec.format, own.map(|path| name_of(path)).collect());
    let below = spec.backing.iter();
    let below = below.map(|below| layer(below.format, vec![name_of(&below.path)]));
    let scratch = spec.ephemeral.then(|| {
        layer(
            ImageFormat::Qcow2,
            vec![format!("changes of {}", spec.name)],
        )
    });
    scratch.into_iter().chain([own]).chain(below).collect()
}

/// A configuration image under construction.
struct Image(Vec<u8>);

impl Image {
    fn new(kind: VirtioKind) -> Self {
        Self(vec![0; kind.config_bytes()])
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        let places = self.0.iter_mut().skip(at);
        for (place, &byte) in places.zip(bytes) {
            *place = byte;
        }
    }
}

impl DevicePlan {
    /// As the gates see it; a console's streams go on at `positions`.
    #[must_use]
    pub(super) fn as_slot(&self, generation: u32, positions: Positions) -> VirtioSlot {
        VirtioSlot {
            slot: self.slot,
            name: self.name.clone(),
            kind: self.kind,
            generation,
            queue_sizes: self.queue_sizes.clone(),
            window_bytes: self.window_bytes,
            features: self.features,
            config: self.config.clone(),
            output_position: positions.output,
            input_position: positions.input,
        }
    }

    /// As its process sees it; a console's streams go on at `positions`, and its terminal has `size`
    /// unless it was never resized; a disk or network device is what `record` says that it was changed to, and
    /// `cuts_udp` what the host does for the latter.
    #[must_use]
    pub(super) fn as_device(
        &self,
        positions: Positions,
        size: Option<(u16, u16)>,
        record: &Record,
        cuts_udp: bool,
    ) -> DeviceConfig {
        let mut own = self.own.clone();
        if let DeviceOwn::Net {
            link_up,
            cuts_udp: cuts,
            limits,
        } = &mut own
        {
            *link_up = record.link_of(&self.name).unwrap_or(*link_up);
            *limits = record.limits_of(&self.name).unwrap_or(*limits);
            *cuts = cuts_udp;
        }
        if let DeviceOwn::Blk {
            limits,
            layers,
            bytes_min,
            ..
        } = &mut own
        {
            *limits = record.limits_of(&self.name).unwrap_or(*limits);
            if let Some(disk) = record.changed_disk(&self.name) {
                (*layers, *bytes_min) = (self::layers(disk), disk.bytes_min);
            }
        }
        if let DeviceOwn::Console {
            output_position,
            input_position,
            size: at_start,
            ..
        } = &mut own
        {
            (*output_position, *input_position) = (positions.output, positions.input);
            *at_start = size.unwrap_or(*at_start);
        }
        DeviceConfig {
            kind: self.kind,
            queue_sizes: self.queue_sizes.clone(),
            window_bytes: self.window_bytes,
            features: self.features,
            config: self.config.clone(),
            own,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::spec::KernelSource;
    use super::*;

    fn spec(disks: usize, queues: u8, read_only: bool) -> VmSpec {
        let mut spec = VmSpec::new("vm", KernelSource::File("k".into()));
        spec.disks = (0..disks)
            .map(|n| DiskSpec {
                name: format!("disk{n}"),
                queues,
                ..DiskSpec::for_test("d".as_ref(), read_only)
            })
            .collect();
        spec
    }

    #[test]
    fn largest_machine_fits_the_slots_and_every_window_can_be_laid_out() {
        let devices = plan(&spec(14, 8, false));
        let slots: Vec<u8> = devices.iter().map(|d| d.slot).collect();
        assert_eq!(slots, (0..16).collect::<Vec<u8>>());
        for device in &devices {
            WindowLayout::of(
                device.kind,
                device.window_bytes as usize,
                &device.queue_sizes,
            )
            .unwrap();
            assert_eq!(device.config.len(), device.kind.config_bytes());
        }
    }

    #[test]
    fn socket_device_comes_last_and_its_window_holds_what_a_guest_offers() {
        let mut spec = spec(2, 1, false);
        spec.vsock = Some(VsockSpec::default());
        let devices = plan(&spec);
        let vsock = devices.last().unwrap();
        assert_eq!((vsock.slot, vsock.kind), (4, VirtioKind::Vsock));
        assert_eq!(vsock.config, 3u64.to_le_bytes());
        let layout = WindowLayout::new(vsock.window_bytes as usize, &vsock.queue_sizes).unwrap();
        let share = layout.data_pages / 3;
        // Linux offers buffers of a page and a header.
        assert!(share >= 2 * usize::from(VSOCK_QUEUES[0]));
        assert!(layout.request_bytes_max() >= (64 << 10) + 44);
        spec.disks.truncate(0);
        assert_eq!(plan(&spec).last().unwrap().slot, 2);
    }

    #[test]
    fn largest_legal_disk_request_fits_a_quarter_of_the_window() {
        for queues in 1..=8 {
            let disk = &plan(&spec(1, queues, false))[2];
            let word = |at: usize| {
                let bytes = disk.config[at..at + 4].try_into().unwrap();
                u32::from_le_bytes(bytes) as usize
            };
            let layout = WindowLayout::new(disk.window_bytes as usize, &disk.queue_sizes).unwrap();
            assert!(word(8) * word(12) <= layout.request_bytes_max());
            assert!(word(12) >= 32, "128 KiB in scattered pages is one request");
        }
    }

    #[test]
    fn largest_request_of_a_shared_folder_fits_a_quarter_of_the_window() {
        let mut spec = spec(2, 1, false);
        spec.shares = vec![ShareSpec::new("home", "/home")];
        let share = &plan(&spec)[4];
        assert_eq!((share.slot, share.kind), (4, VirtioKind::Fs));
        assert_eq!(share.config[..5], *b"home\0");
        let layout = WindowLayout::of(share.kind, share.window_bytes as usize, &share.queue_sizes);
        let layout = layout.unwrap();
        // Headers and arguments begin on pages of their own.
        assert!(layout.request_bytes_max() >= (1 << 20) + 2 * 4096);
        assert_eq!(layout.bytes - layout.kept, VirtioKind::Fs.kept_bytes());
    }

    #[test]
    fn read_only_disk_offers_no_way_to_write() {
        let disk = &plan(&spec(1, 1, true))[2];
        let writes = feature::BLK_DISCARD | feature::BLK_WRITE_ZEROES;
        assert_eq!(disk.features & writes, 0);
        assert_ne!(disk.features & feature::BLK_RO, 0);
    }
}
