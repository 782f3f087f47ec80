//! The virtio boundary without its gates: what a program of tests needs in order to give a device
//! guest memory directly, as a measure of what the gates cost (`tests/direct`).
//!
//! No process of Bulkhead does that. Nothing here is called by `bulkhead-vcpu`, so that its program does
//! not contain it, which `tests/policy/ungated.rs` shows.

use super::link::{GateLink, INTERRUPT_VRING};
use super::thread::{Command, GateThread};
use bulkhead_ipc::shared::Doorbell;
use flume::Receiver;
use std::sync::Arc;
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;

/// One device without a gate.
#[derive(Debug)]
pub struct Ungated {
    /// Guest memory.
    pub memory: GuestMemoryMmap,
    /// Rung by the guest, one for each queue.
    pub notify: Vec<Doorbell>,
    /// Rung when the driver has asked for something: see [`Ungated::asked`].
    pub bell: Doorbell,
    link: Arc<GateLink>,
    commands: Receiver<Command>,
}

/// What the driver asks of a device as a whole.
#[derive(Debug)]
pub enum Asked {
    /// To forget everything. Answered by [`Ungated::reset_is_done`].
    Reset,
    /// To start, with the features that both agreed on and the queues that the driver has made.
    Start {
        /// Feature bits.
        features: u64,
        /// Queues, in order; those that the driver does not use are missing.
        queues: Vec<Option<Queue>>,
    },
    /// To end.
    Stop,
}

impl GateThread {
    /// The first device of the machine, without its gate; the others are never served.
    #[inline(never)]
    #[must_use]
    pub fn ungated(self) -> Option<Ungated> {
        let first = self.devices.into_iter().next()?;
        Some(Ungated {
            memory: self.memory,
            notify: first.notify.into_iter().map(Doorbell::from).collect(),
            bell: self.command_bell.try_clone().ok()?.into(),
            link: first.gate.into_link(),
            commands: self.commands,
        })
    }
}

impl Ungated {
    /// What the driver has asked for since the last call. Never blocks.
    pub fn asked(&self) -> Vec<Asked> {
        let commands = self.commands.try_iter();
        commands
            .filter_map(|command| match command {
                Command::Reset { .. } => Some(Asked::Reset),
                Command::Activate {
                    features, queues, ..
                } => Some(Asked::Start { features, queues }),
                Command::Stop => Some(Asked::Stop),
                Command::Prepare { .. } | Command::Lost { .. } => None,
            })
            .collect()
    }

    /// Says what the device is: of the features on offer those in `features`, and its configuration image.
    pub fn publish(&self, features: u64, config: &[u8]) {
        self.link.settle(|image| {
            image.features &= features;
            image.bytes = config.to_vec();
        });
    }

    /// The driver's reset has been carried out.
    pub fn reset_is_done(&self) {
        self.link.reset_is_done();
    }

    /// Interrupts the guest for what is in a used ring.
    #[inline(never)]
    pub fn interrupt(&self) {
        self.link.raise(INTERRUPT_VRING);
    }
}
