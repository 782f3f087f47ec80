//! What the process holds, laid open: mappings of everything shared, and every doorbell.

use crate::port::PortPrey;
use bulkhead_ipc::input_ring::INPUT_RING_BYTES;
use bulkhead_ipc::legacy_page::LEGACY_PAGE_BYTES;
use bulkhead_ipc::port::PortEnd;
use bulkhead_ipc::protocol::birth::{FdRole, KindConfig};
use bulkhead_ipc::shared::{Doorbell, SharedMemory};
use bulkhead_ipc::window::{Window, WindowLayout};
use bulkhead_runtime::wait::Waiter;
use bulkhead_runtime::{Newborn, Stillbirth};
use std::fs::File;
use std::io::{Seek, SeekFrom};

/// Roles whose descriptors a device process may have, doorbells apart.
const FILES: [FdRole; 6] = [
    FdRole::Disk,
    FdRole::Folder,
    FdRole::Entropy,
    FdRole::Tap,
    FdRole::Output,
    FdRole::Listener,
];
/// Doorbells of all kinds.
pub(crate) const BELLS: [FdRole; 7] = [
    FdRole::Kick,
    FdRole::Call,
    FdRole::LegacyKick,
    FdRole::LegacyInterrupt,
    FdRole::LegacyReply,
    FdRole::OutputBell,
    FdRole::InputBell,
];

#[derive(Debug)]
pub(crate) struct Prey {
    /// A virtio device's window.
    pub(crate) window: Option<Window>,
    /// What a driver would be offered, for a publication that is believed.
    pub(crate) features: u64,
    pub(crate) config: Vec<u8>,
    /// The legacy page or the input ring.
    pub(crate) pages: Vec<SharedMemory>,
    /// A network card's end of the port to its switch.
    pub(crate) port: Option<PortPrey>,
    pub(crate) bells: Vec<Doorbell>,
    pub(crate) waiter: Waiter,
    /// Its resource. Held, as a device would.
    _files: Vec<File>,
}

impl Prey {
    pub(crate) fn take(newborn: &mut Newborn) -> Result<Self, Stillbirth> {
        let grants = &mut newborn.grants;
        let (mut features, mut config, mut window) = (0, Vec::new(), None);
        if let KindConfig::Device(device) = &newborn.config {
            let bytes = usize::try_from(device.window_bytes).map_err(Stillbirth::setup)?;
            let layout = WindowLayout::of(device.kind, bytes, &device.queue_sizes)
                .map_err(Stillbirth::setup)?;
            window = Some(Window::map(grants.take(FdRole::Window, 0)?, layout)?);
            features = device.features;
            config.clone_from(&device.config);
        }
        let mut pages = Vec::new();
        for (role, bytes) in [
            (FdRole::LegacyPage, LEGACY_PAGE_BYTES),
            (FdRole::Input, INPUT_RING_BYTES),
        ] {
            if grants.has(role, 0) {
                pages.push(SharedMemory::map(grants.take(role, 0)?, bytes)?);
            }
        }
        let waiter = Waiter::new().map_err(Stillbirth::setup)?;
        let (mut bells, mut files) = (Vec::new(), Vec::new());
        for role in BELLS {
            if grants.has(role, 0) {
                bells.push(Doorbell::from(grants.take(role, 0)?));
            }
        }
        let mut port = None;
        if grants.has(FdRole::Port, 0) {
            let bell = Doorbell::from(grants.take(FdRole::PortKick, 0)?);
            bells.push(bell.try_clone().map_err(Stillbirth::setup)?);
            let memory = grants.take(FdRole::Port, 0)?;
            let taken = PortPrey::take(memory, PortEnd::Device, bell);
            port = Some(taken.map_err(Stillbirth::setup)?);
            // What wakes it is held, as a card would.
            files.push(File::from(grants.take(FdRole::PortCall, 0)?));
        }
        for role in FILES {
            if grants.has(role, 0) {
                let mut file = File::from(grants.take(role, 0)?);
                if role == FdRole::Disk {
                    believable_disk(&mut file, &mut config).map_err(Stillbirth::setup)?;
                }
                files.push(file);
            }
        }
        Ok(Self {
            window,
            features,
            config,
            pages,
            port,
            bells,
            waiter,
            _files: files,
        })
    }

    pub(crate) fn ring_all(&self) {
        self.bells.iter().for_each(Doorbell::ring);
    }
}

/// Publishes the disk's true size, as its driver would not use it otherwise.
fn believable_disk(disk: &mut File, config: &mut [u8]) -> std::io::Result<()> {
    let sectors = disk.seek(SeekFrom::End(0))? / 512;
    for (byte, value) in config.iter_mut().zip(sectors.to_le_bytes()) {
        *byte = value;
    }
    Ok(())
}
