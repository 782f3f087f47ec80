//! Broker to a newborn process of any kind, and its answer.
//!
//! A process is executed with its control socket as descriptor [`CONTROL_FD`], its control page as
//! [`PAGE_FD`], its adoption socket as [`ADOPTION_FD`], a bounded log pipe as descriptor 2, and the
//! descriptors of its policy from [`FIRST_GRANT_FD`] on. The first message is [`Birth`]; the process
//! installs the start-up filter, takes its descriptors, sets itself up, installs the locked filter
//! and answers [`Born`].
//!
//! A process whose control channel closes before [`Birth`] has come exits. With [`Birth`] come the
//! broker's end of the control channel and the reading end of the log pipe: from then on the process
//! keeps both open itself, so that neither ends with the broker, and hands them to the next one
//! ([`super::adopt`]).

use crate::device_kind::VirtioKind;
use crate::ident::ProcId;
use crate::protocol::image::ImageConfig;
use crate::protocol::switch::SwitchConfig;
use serde::{Deserialize, Serialize};

/// Descriptor of the control socket at exec.
pub const CONTROL_FD: i32 = 3;
/// Descriptor of the control page at exec.
pub const PAGE_FD: i32 = 4;
/// Descriptor of the adoption socket at exec.
pub const ADOPTION_FD: i32 = 5;
/// First descriptor of the policy's grants at exec.
pub const FIRST_GRANT_FD: i32 = 6;
/// Descriptors that come with [`Birth`]: the broker's end of the control channel, and the reading end
/// of the log pipe.
pub const BIRTH_FDS: usize = 2;
/// Most descriptors that a process is born with.
pub const GRANTS_MAX: usize = 128;

/// What a granted descriptor is for. The names are those of the policy files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FdRole {
    /// `/dev/kvm`, for `vcpu` alone.
    Kvm,
    /// The kernel file, read only; closed before lock unless symbols are wanted.
    Kernel,
    /// The initial RAM disk, read only; closed before lock.
    Initrd,
    /// The ELF core file to write on a crash.
    Core,
    /// A device window (sealed memfd). The index is the virtio slot in `vcpu`, 0 elsewhere.
    Window,
    /// The doorbell gate to device. Index as [`FdRole::Window`].
    Kick,
    /// The doorbell device to gate. Index as [`FdRole::Window`].
    Call,
    /// The legacy page (sealed memfd).
    LegacyPage,
    /// Doorbell vCPU to legacy.
    LegacyKick,
    /// Doorbell legacy to vCPU: interrupt requests.
    LegacyInterrupt,
    /// Doorbell legacy to vCPU: replies to calls.
    LegacyReply,
    /// The disk image or block device that ends where the disk ends; the extents of a VMDK image
    /// follow its descriptor.
    Disk,
    /// A disk image that grows: qcow2.
    Image,
    /// Backing images of a qcow2 disk, read only, the one next to it first.
    Backing,
    /// The files of an image that is made.
    Target,
    /// The console output ring file, writable.
    Output,
    /// Doorbell to readers of the output ring.
    OutputBell,
    /// The console input ring (sealed memfd).
    Input,
    /// Doorbell of the console input ring.
    InputBell,
    /// The host's entropy source (`/dev/urandom`), read only.
    Entropy,
    /// The machine's Unix socket, at which clients ask for connections to the guest.
    Listener,
    /// The directory that is shared: where the broker is root, the root of a mount of its own.
    Folder,
    /// A queue of a TAP interface (`/dev/net/tun`). One for each pair of virtqueues.
    Tap,
    /// A connected stream socket on which frames come and go, each behind its length in 4 bytes, big endian: how QEMU's
    /// `-netdev stream` and passt have them.
    Frames,
    /// The memory between a network card and the switch of its network (sealed memfd).
    Port,
    /// Doorbell card to switch.
    PortKick,
    /// Doorbell switch to card.
    PortCall,
}

/// One granted descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// What it is for.
    pub role: FdRole,
    /// Which of several of its role.
    pub index: u16,
    /// Its number at exec.
    pub fd: i32,
}

/// A compiled seccomp filter: `struct sock_filter` records, 8 bytes each, native byte order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Filter {
    /// The instructions.
    pub bpf: Vec<u8>,
}

/// The locked filter of one kind of thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadFilter {
    /// Thread name in the policy: `main`, `vcpu`, `gate`.
    pub thread: String,
    /// Its filter.
    pub filter: Filter,
}

/// An io_uring opcode grant: the only operations that the ring is registered for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct UringGrant {
    /// Opcode numbers (IORING_OP_*).
    pub opcodes: Vec<u8>,
}

/// The first message. Sender: broker, with [`BIRTH_FDS`] descriptors. Not idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Birth {
    /// [`crate::protocol::PROTOCOL_VERSION`].
    pub version: u32,
    /// Who the process is.
    pub id: ProcId,
    /// Name of the VM, for logs; at most 64 bytes.
    pub vm: String,
    /// The broker's proof of identity for later connections.
    pub token: [u8; 32],
    /// The descriptors it was born with.
    pub grants: Vec<Grant>,
    /// Filter of the start-up phase.
    pub startup: Filter,
    /// Filters of the locked phase.
    pub locked: Vec<ThreadFilter>,
    /// io_uring opcodes; empty for kinds without a ring.
    pub uring: UringGrant,
    /// What it is to do.
    pub config: KindConfig,
}

/// Configuration by kind of process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KindConfig {
    /// The vCPU group.
    Vcpu(VcpuConfig),
    /// Serial port, clock, keyboard controller.
    Legacy(LegacyConfig),
    /// A virtio device.
    Device(DeviceConfig),
    /// Work on disk images.
    Image(ImageConfig),
    /// The switch of a network.
    Switch(SwitchConfig),
}

/// Size of the pages that back guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HugePages {
    /// 4 KiB pages.
    Off,
    /// Transparent huge pages where the kernel has them.
    Transparent,
    /// 2 MiB pages from the host's reserved pool; starting fails when it is too small.
    Reserved,
}

/// Configuration of `bulkhead-vcpu`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuConfig {
    /// Number of vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in bytes, a multiple of 4096.
    pub memory_bytes: u64,
    /// Backing of guest memory.
    pub huge_pages: HugePages,
    /// Kernel command line, at most 4096 bytes.
    pub cmdline: String,
    /// Whether the host's KVM needs the quirks layer.
    pub quirks: bool,
    /// The virtio devices, by slot.
    pub devices: Vec<VirtioSlot>,
    /// Generation of the legacy process that the page belongs to.
    pub legacy_generation: u32,
    /// Position in the ring file at which the serial port's output goes on.
    pub legacy_output_position: u64,
}

/// A virtio device as the gates see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioSlot {
    /// virtio-mmio slot number.
    pub slot: u8,
    /// Name in the VM file, for messages; at most 64 bytes.
    pub name: String,
    /// What it is.
    pub kind: VirtioKind,
    /// Generation of the device process.
    pub generation: u32,
    /// Largest size of each queue, powers of two up to 256.
    pub queue_sizes: Vec<u16>,
    /// Size of the window in bytes.
    pub window_bytes: u32,
    /// Device feature bits (virtio 1.2) that may be offered; transport bits are the gate's.
    pub features: u64,
    /// Configuration image; the fields only the device knows are filled in by it.
    pub config: Vec<u8>,
    /// Position in the ring file at which the guest's output goes on (consoles only).
    pub output_position: u64,
    /// Bytes of the input ring that were taken before the guest started (consoles only).
    pub input_position: u64,
}

/// Configuration of `bulkhead-legacy`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LegacyConfig {
    /// Capacity in bytes of the output ring.
    pub output_capacity: u64,
    /// Position in the output ring up to which everything is stored.
    pub output_position: u64,
    /// Bytes of the input ring that the guest has been given.
    pub input_position: u64,
    /// Offset of the guest's real-time clock from the host's in seconds.
    pub rtc_offset_s: i64,
}

/// Configuration of a virtio device process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceConfig {
    /// What it is.
    pub kind: VirtioKind,
    /// As in [`VirtioSlot`].
    pub queue_sizes: Vec<u16>,
    /// As in [`VirtioSlot`].
    pub window_bytes: u32,
    /// As in [`VirtioSlot`].
    pub features: u64,
    /// As in [`VirtioSlot`].
    pub config: Vec<u8>,
    /// What only this kind needs.
    pub own: DeviceOwn,
}

/// Format of a disk image. It is told, never found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageFormat {
    /// The disk's bytes as they are, in a file or a block device.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// A VMDK descriptor and its flat extents.
    Vmdk,
}

impl std::fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        })
    }
}

/// So much a second in the mean, and so much at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// At least 1.
    pub per_s: u64,
    /// What may be used at once after a time of rest; at least 1.
    pub burst: u64,
}

/// What a disk may do in a second, or a network device in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskLimits {
    /// Bytes read and written; of frames.
    pub bytes: Option<Rate>,
    /// Requests of any kind; frames.
    pub requests: Option<Rate>,
}

/// One image of a disk's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Its format.
    pub format: ImageFormat,
    /// Names of its files without directories, for messages; at most 255 bytes each. There is one more
    /// than it has extents.
    pub files: Vec<String>,
}

/// Configuration of one kind of virtio device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceOwn {
    /// Block device.
    Blk {
        /// Whether writes are refused.
        read_only: bool,
        /// Identifier for VIRTIO_BLK_T_GET_ID, at most 20 bytes.
        serial: String,
        /// Whether a write waits that the host's disk has no room for; else it fails.
        waits_for_room: bool,
        /// What it may do in a second.
        limits: DiskLimits,
        /// Whether the first image is an empty file that ends with the machine, and is to be made an image
        /// on top of the others; nothing of it has to be durable.
        ephemeral: bool,
        /// The images, the writable one first.
        layers: Vec<ImageLayer>,
        /// A disk that is smaller is grown to as many bytes before it is served; 0 for none.
        bytes_min: u64,
    },
    /// Console.
    Console {
        /// Capacity in bytes of the output ring.
        output_capacity: u64,
        /// Position in the output ring up to which everything is stored.
        output_position: u64,
        /// Bytes of the input ring that the guest has been given.
        input_position: u64,
        /// Columns and rows at birth.
        size: (u16, u16),
    },
    /// Entropy source.
    Rng,
    /// Socket device.
    Vsock {
        /// Context id of the guest.
        guest_cid: u32,
        /// Generation of the process.
        generation: u32,
        /// Whether it takes the place of a process whose connections have ended with it, which the guest
        /// has to be told.
        is_successor: bool,
    },
    /// Shared folder.
    Fs {
        /// Whether changes are refused.
        read_only: bool,
        /// User and group of the process as it sees itself: those of the files that it may own.
        own: (u32, u32),
        /// Which user and group these are in the guest.
        guest_owner: (u32, u32),
        /// How long the guest may believe names and attributes without asking, in milliseconds.
        cache_ms: u32,
    },
    /// Network device.
    Net {
        /// Whether its cable is plugged in.
        link_up: bool,
        /// Whether the host cuts UDP datagrams.
        cuts_udp: bool,
        /// What it may send in a second, and as much receive.
        limits: DiskLimits,
    },
}

impl DeviceOwn {
    /// For a process of this generation, which takes the place of another or is the first.
    #[must_use]
    pub fn born_as(self, generation: u32, is_successor: bool) -> Self {
        match self {
            Self::Vsock { guest_cid, .. } => Self::Vsock {
                guest_cid,
                generation,
                is_successor,
            },
            other => other,
        }
    }
}

/// Answer to [`Birth`]. Sender: the process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Born {
    /// Locked and serving.
    Locked {
        /// Protocol version of the process.
        version: u32,
        /// Landlock ABI in force, 0 for none.
        landlock_abi: u8,
        /// Version of the program, at most 32 bytes.
        program: String,
    },
    /// It could not start and exits now.
    Failed {
        /// Cause chain, one line.
        reason: String,
    },
}
