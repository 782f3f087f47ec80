//! Windows: the memory that a DMA gate shares with one device process.
//!
//! ```text
//! 0x0000  header: identity, what the driver negotiated, what the device published
//! 0x1000  for each queue: descriptor table, avail ring, used ring, head slots (64 bytes each)
//!         data area, page aligned, shared by all queues, handed out by the gate alone
//!         what the device keeps for its successor, of kinds that do
//! ```
//!
//! Both sides compute the offsets from the birth configuration with [`WindowLayout::new`]; no offset
//! is ever read from the window. The shadow virtqueues have the split-ring layout of virtio 1.2
//! section 2.7, with descriptor addresses that are offsets into the window, so that a device uses
//! `virtio-queue` over a one-region guest memory at address 0.
//!
//! Device and gate distrust each other: each reads a field once and checks it.

use crate::device_kind::{CONFIG_BYTES_MAX, HEAD_SLOT_BYTES, VirtioKind};
use crate::shared::{Doorbell, SharedError, SharedMemory};
use crate::sync::{Ordering, fence};
use nix::errno::Errno;
use nix::sys::uio::pwrite;
use serde::{Deserialize, Serialize};
use std::os::fd::{BorrowedFd, OwnedFd};

/// Descriptors that one request may take: head, readable data, writable data, tail.
pub const DESCRIPTORS_PER_SLOT: u16 = 4;
/// Largest number of requests in flight per queue, and largest guest queue.
pub const SLOTS_MAX: u16 = 256;
/// Unit of the data area in bytes.
pub const DATA_PAGE_BYTES: usize = 4096;

const HEADER_BYTES: usize = 4096;
const MAGIC: u32 = 0x3157_4842; // "BHW1"

const OFFSET_MAGIC: usize = 0x00;
const OFFSET_GENERATION: usize = 0x08;
const OFFSET_DRIVER_FEATURES: usize = 0x40;
const OFFSET_DRIVER_EPOCH: usize = 0x48;
const OFFSET_DEVICE_STATE: usize = 0x80;
const OFFSET_CONFIG_SEQ: usize = 0x84;
const OFFSET_DEVICE_FEATURES: usize = 0x88;
const OFFSET_AT_ONCE: usize = 0xc0;
const OFFSET_CONFIG: usize = 0x100;

/// What a device says of itself in the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// It has not published its configuration yet.
    Starting,
    /// It serves its queues.
    Ready,
    /// It cannot go on (or wrote nonsense here): the gate sets DEVICE_NEEDS_RESET.
    Failed,
}

/// Offsets of one shadow virtqueue in the window, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueLayout {
    /// Requests that can be in flight.
    pub slots: u16,
    /// Descriptors: four for each slot.
    pub descriptors: u16,
    /// Descriptor table.
    pub desc_table: usize,
    /// Avail ring.
    pub avail_ring: usize,
    /// Used ring.
    pub used_ring: usize,
    /// Head slots.
    pub heads: usize,
}

/// Offsets of everything in a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowLayout {
    /// Size of the whole window in bytes.
    pub bytes: usize,
    /// The shadow virtqueues.
    pub queues: Vec<QueueLayout>,
    /// First byte of the data area.
    pub data: usize,
    /// Pages of [`DATA_PAGE_BYTES`] in the data area.
    pub data_pages: usize,
    /// First byte of what the device keeps for its successor: up to the end. The gate leaves it alone.
    pub kept: usize,
}

/// A window that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A queue size is not a power of two in range.
    #[error("queue {queue} has size {size}, expected a power of two from 1 to {SLOTS_MAX}")]
    QueueSize {
        /// Queue number.
        queue: usize,
        /// The size asked for.
        size: u16,
    },
    /// The queues leave no room for data.
    #[error("window of {bytes} bytes is too small, expected at least {needed}")]
    TooSmall {
        /// The size asked for.
        bytes: usize,
        /// The smallest that works.
        needed: usize,
    },
}

impl WindowLayout {
    /// Lays a window of `bytes` bytes out for guest queues of the given sizes.
    ///
    /// # Errors
    /// [`LayoutError`] when a size is not usable.
    pub fn new(bytes: usize, queue_sizes: &[u16]) -> Result<Self, LayoutError> {
        let mut at = HEADER_BYTES;
        let mut queues = Vec::with_capacity(queue_sizes.len());
        for (queue, &size) in queue_sizes.iter().enumerate() {
            if !size.is_power_of_two() || size > SLOTS_MAX {
                return Err(LayoutError::QueueSize { queue, size });
            }
            let descriptors = size * DESCRIPTORS_PER_SLOT;
            let n = usize::from(descriptors);
            let desc_table = at;
            let avail_ring = desc_table + 16 * n;
            let used_ring = align(avail_ring + 6 + 2 * n, 64);
            let heads = align(used_ring + 6 + 8 * n, 64);
            at = align(heads + HEAD_SLOT_BYTES * usize::from(size), 64);
            queues.push(QueueLayout {
                slots: size,
                descriptors,
                desc_table,
                avail_ring,
                used_ring,
                heads,
            });
        }
        let data = align(at, DATA_PAGE_BYTES);
        let needed = data + 4 * DATA_PAGE_BYTES;
        if bytes < needed || !bytes.is_multiple_of(DATA_PAGE_BYTES) || u32::try_from(bytes).is_err()
        {
            return Err(LayoutError::TooSmall { bytes, needed });
        }
        Ok(Self {
            bytes,
            queues,
            data,
            data_pages: (bytes - data) / DATA_PAGE_BYTES,
            kept: bytes,
        })
    }

    /// The window of a device of `kind`: as [`WindowLayout::new`], with what such a device keeps at the end.
    ///
    /// # Errors
    /// As [`WindowLayout::new`].
    pub fn of(kind: VirtioKind, bytes: usize, queue_sizes: &[u16]) -> Result<Self, LayoutError> {
        let kept = kind.kept_bytes();
        let layout = Self::new(bytes.saturating_sub(kept), queue_sizes)?;
        Ok(Self { bytes, ..layout })
    }

    /// Largest request in data bytes that is accepted: a quarter of the data area.
    #[must_use]
    pub fn request_bytes_max(&self) -> usize {
        self.data_pages / 4 * DATA_PAGE_BYTES
    }
}

const fn align(value: usize, to: usize) -> usize {
    value.next_multiple_of(to)
}

/// What the driver has negotiated, as the device reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DriverView {
    /// Negotiated feature bits.
    pub features: u64,
    /// Counts resets and starts; odd while the driver is running (DRIVER_OK).
    pub epoch: u64,
}

/// What the device has published, as the gate reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Published {
    /// Changes with each publication.
    pub seq: u32,
    /// Feature bits that the device can serve; it can only narrow what policy offers.
    pub features: u64,
    /// Configuration bytes; only the device's own fields are used.
    pub config: [u8; CONFIG_BYTES_MAX],
}

/// A mapped window. Used by both sides; each side has its own methods.
#[derive(Debug)]
pub struct Window {
    /// The offsets.
    pub layout: WindowLayout,
    /// The memory.
    pub memory: SharedMemory,
}

/// The doorbells of a device: the gate rings `kick`, the device rings `call`.
#[derive(Debug)]
pub struct Doorbells {
    /// Gate to device: there is something in an avail ring, or the header changed.
    pub kick: Doorbell,
    /// Device to gate: there is something in a used ring, or the header changed.
    pub call: Doorbell,
}

/// Broker: writes the identity into a new window without mapping it, so that gate and device may
/// start in either order.
///
/// # Errors
/// The kernel's error.
pub fn stamp(window: BorrowedFd<'_>, generation: u32) -> Result<(), Errno> {
    pwrite(window, &u64::from(generation).to_le_bytes(), 8)?;
    pwrite(window, &MAGIC.to_le_bytes(), 0).map(drop)
}

impl Window {
    /// Maps a window.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd, layout: WindowLayout) -> Result<Self, SharedError> {
        let memory = SharedMemory::map(fd, layout.bytes as u64)?;
        Ok(Self { layout, memory })
    }

    /// Gate: writes the identity, before the device is told of the window.
    pub fn initialise(&self, generation: u32) {
        self.memory.write(OFFSET_GENERATION, u64::from(generation));
        self.memory.store(OFFSET_MAGIC, MAGIC, Ordering::Release);
    }

    /// Gate: makes the window of a dead process ready for its successor: nothing of what the dead one wrote
    /// into header and rings is left. The data area is the gate's to hand out and stays as it is.
    pub fn renew(&self, generation: u32, view: DriverView) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut at = 0;
        while at < self.layout.data {
            let len = ZEROES.len().min(self.layout.data - at);
            self.memory
                .copy_in(at, ZEROES.get(..len).unwrap_or(&ZEROES));
            at += len;
        }
        self.set_driver(view);
        self.initialise(generation);
    }

    /// Gate: tells the device what was negotiated. The caller rings the kick doorbell.
    pub fn set_driver(&self, view: DriverView) {
        self.memory
            .store(OFFSET_DRIVER_FEATURES, view.features, Ordering::Relaxed);
        self.memory
            .store(OFFSET_DRIVER_EPOCH, view.epoch, Ordering::Release);
    }

    /// Device: what the driver negotiated.
    #[must_use]
    pub fn driver(&self) -> DriverView {
        let epoch = self.memory.load(OFFSET_DRIVER_EPOCH, Ordering::Acquire);
        let features = self.memory.load(OFFSET_DRIVER_FEATURES, Ordering::Relaxed);
        DriverView { features, epoch }
    }

    /// Device: publishes features and configuration and becomes ready. The caller rings `call`.
    /// `config` longer than [`CONFIG_BYTES_MAX`] is cut.
    pub fn publish(&self, features: u64, config: &[u8]) {
        let seq = self
            .memory
            .load::<u32>(OFFSET_CONFIG_SEQ, Ordering::Relaxed)
            | 1;
        self.memory.store(OFFSET_CONFIG_SEQ, seq, Ordering::Relaxed);
        fence(Ordering::Release);
        self.memory
            .store(OFFSET_DEVICE_FEATURES, features, Ordering::Relaxed);
        let len = config.len().min(CONFIG_BYTES_MAX);
        if let Some(config) = config.get(..len) {
            self.memory.copy_in(OFFSET_CONFIG, config);
        }
        self.memory
            .store(OFFSET_CONFIG_SEQ, seq.wrapping_add(1), Ordering::Release);
        self.set_device_state(DeviceState::Ready);
    }

    /// Device: says how it is.
    pub fn set_device_state(&self, state: DeviceState) {
        let value: u32 = match state {
            DeviceState::Starting => 0,
            DeviceState::Ready => 1,
            DeviceState::Failed => 2,
        };
        self.memory
            .store(OFFSET_DEVICE_STATE, value, Ordering::Release);
    }

    /// Device: says whether its requests are done as soon as it has looked at them, with nothing to wait for.
    pub fn set_at_once(&self, at_once: bool) {
        self.memory
            .store(OFFSET_AT_ONCE, u32::from(at_once), Ordering::Relaxed);
    }

    /// Gate: whether the device says that more requests in its hands would not make it faster. One that lies
    /// makes itself slow.
    #[must_use]
    pub fn is_at_once(&self) -> bool {
        self.memory.load::<u32>(OFFSET_AT_ONCE, Ordering::Relaxed) == 1
    }

    /// Gate: how the device says it is.
    #[must_use]
    pub fn device_state(&self) -> DeviceState {
        match self
            .memory
            .load::<u32>(OFFSET_DEVICE_STATE, Ordering::Acquire)
        {
            0 => DeviceState::Starting,
            1 => DeviceState::Ready,
            _ => DeviceState::Failed,
        }
    }

    /// Gate: the device's publication if it is newer than `known_seq` and not being written.
    #[must_use]
    pub fn published(&self, known_seq: u32) -> Option<Published> {
        let seq = self
            .memory
            .load::<u32>(OFFSET_CONFIG_SEQ, Ordering::Acquire);
        if seq == known_seq || seq % 2 == 1 {
            return None;
        }
        let features = self.memory.load(OFFSET_DEVICE_FEATURES, Ordering::Relaxed);
        let mut config = [0u8; CONFIG_BYTES_MAX];
        self.memory.copy_out(OFFSET_CONFIG, &mut config);
        fence(Ordering::Acquire);
        let after = self
            .memory
            .load::<u32>(OFFSET_CONFIG_SEQ, Ordering::Relaxed);
        (after == seq).then_some(Published {
            seq,
            features,
            config,
        })
    }

    /// Device: whether this is the window of `generation`.
    #[must_use]
    pub fn is_generation(&self, generation: u32) -> bool {
        self.memory.load::<u32>(OFFSET_MAGIC, Ordering::Acquire) == MAGIC
            && self.memory.read::<u64>(OFFSET_GENERATION) == u64::from(generation)
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;
    use std::os::fd::AsFd;

    fn window() -> Window {
        let layout = WindowLayout::new(1 << 20, &[64, 128]).unwrap();
        let fd = sealed_memfd("w", layout.bytes as u64).unwrap();
        Window::map(fd, layout).unwrap()
    }

    #[test]
    fn layout_does_not_overlap_and_stays_inside() {
        for sizes in [&[1u16][..], &[256, 256, 256, 256], &[64, 1, 128]] {
            let l = WindowLayout::new(8 << 20, sizes).unwrap();
            let mut end = HEADER_BYTES;
            for q in &l.queues {
                assert!(q.desc_table >= end);
                assert!(q.avail_ring >= q.desc_table + 16 * usize::from(q.descriptors));
                assert!(q.used_ring >= q.avail_ring + 6 + 2 * usize::from(q.descriptors));
                assert!(q.heads >= q.used_ring + 6 + 8 * usize::from(q.descriptors));
                end = q.heads + HEAD_SLOT_BYTES * usize::from(q.slots);
            }
            assert!(l.data >= end);
            assert_eq!(l.data + l.data_pages * DATA_PAGE_BYTES, l.bytes);
        }
    }

    #[test]
    fn bad_sizes_are_refused() {
        assert!(matches!(
            WindowLayout::new(1 << 20, &[3]),
            Err(LayoutError::QueueSize { .. })
        ));
        assert!(matches!(
            WindowLayout::new(1 << 20, &[512]),
            Err(LayoutError::QueueSize { .. })
        ));
        assert!(matches!(
            WindowLayout::new(8192, &[256]),
            Err(LayoutError::TooSmall { .. })
        ));
    }

    #[test]
    fn publication_is_seen_once_and_whole() {
        let w = window();
        assert_eq!(w.device_state(), DeviceState::Starting);
        assert_eq!(w.published(0), None);
        w.publish(5, &[1, 2, 3]);
        let p = w.published(0).unwrap();
        assert_eq!((p.features, &p.config[..4]), (5, &[1, 2, 3, 0][..]));
        assert_eq!(w.published(p.seq), None);
        assert_eq!(w.device_state(), DeviceState::Ready);
        w.memory
            .store(OFFSET_DEVICE_STATE, 77u32, Ordering::Relaxed);
        assert_eq!(w.device_state(), DeviceState::Failed);
    }

    #[test]
    fn stamped_window_has_its_generation_before_anyone_maps_it() {
        let layout = WindowLayout::new(1 << 20, &[64]).unwrap();
        let fd = sealed_memfd("w", layout.bytes as u64).unwrap();
        stamp(fd.as_fd(), 7).unwrap();
        let w = Window::map(fd, layout).unwrap();
        assert!(w.is_generation(7) && !w.is_generation(8));
    }

    #[test]
    fn renewed_window_has_nothing_of_the_dead_process() {
        let w = window();
        let junk = vec![0xeeu8; w.layout.bytes];
        w.memory.slice(0, junk.len()).copy_from(&junk[..]);
        let view = DriverView {
            features: 5,
            epoch: 3,
        };
        w.renew(2, view);
        assert!(w.is_generation(2));
        assert_eq!((w.driver(), w.published(0)), (view, None));
        assert_eq!(w.device_state(), DeviceState::Starting);
        let mut rings = vec![1u8; w.layout.data - HEADER_BYTES];
        w.memory
            .slice(HEADER_BYTES, rings.len())
            .copy_to(&mut rings[..]);
        assert!(rings.iter().all(|&byte| byte == 0));
    }

    #[test]
    fn half_written_publication_is_not_seen() {
        let w = window();
        w.memory.store(OFFSET_CONFIG_SEQ, 3u32, Ordering::Relaxed);
        assert_eq!(w.published(0), None);
    }
}
