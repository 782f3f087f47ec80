//! What vCPU threads, the control thread and the gate thread share about one device: a few atomics,
//! the configuration image, and how far its process is. Locks are only ever held for a copy.

use crate::kvm::Vm;
use crate::virtio::registers::{Register, SlotRegisters};
use bulkhead_ipc::protocol::birth::VirtioSlot;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use vmm_sys_util::eventfd::EventFd;

/// Bit in the interrupt status register: used ring.
pub(super) const INTERRUPT_VRING: u32 = 1;
/// Bit in the interrupt status register: configuration or status.
pub(super) const INTERRUPT_CONFIG: u32 = 2;
/// Bit in the status register: the driver has to reset the device.
pub(crate) const STATUS_NEEDS_RESET: u32 = 0x40;

/// How far the device process of a gate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The first one has not published its configuration yet.
    Starting,
    /// It serves.
    Serving,
    /// It broke its protocol or said that it failed; the broker has to decide.
    Broken,
    /// The window is ready for a successor, which has not published its configuration yet.
    Prepared,
    /// There is none any more.
    Lost,
}

/// Which device process a gate works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attachment {
    /// Its generation.
    pub(crate) generation: u32,
    /// How far it is.
    pub(crate) phase: Phase,
    /// When prepared: position in the output stream up to which everything is stored.
    pub(crate) output_position: u64,
    /// When prepared: bytes of input that the guest has been given.
    pub(crate) input_position: u64,
}

/// The configuration space as the guest reads it.
#[derive(Debug, Clone)]
pub(crate) struct ConfigImage {
    /// Configuration bytes.
    pub(crate) bytes: Vec<u8>,
    /// Device feature bits on offer, without the transport's.
    pub(crate) features: u64,
    /// Whether the device has published its own fields, or never will.
    pub(crate) settled: bool,
    /// Guest resets that the gate has carried out.
    pub(crate) resets_done: u64,
}

/// An interrupt line of a machine's.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) vm: Arc<Vm>,
    pub(crate) gsi: u32,
    /// Guest-physical address of the register in which the driver acknowledges interrupts.
    pub(crate) acknowledge: u64,
    /// Rung by acknowledgements that KVM takes. Nobody listens.
    pub(crate) acknowledged: Arc<EventFd>,
}

/// What the threads share about one device.
#[derive(Debug)]
pub(crate) struct GateLink {
    /// What the guest reads.
    pub(crate) registers: SlotRegisters,
    /// The irqfd, for whoever may do no more than write.
    pub(crate) interrupt: EventFd,
    /// The line that it leads to, for the gate thread.
    line: OnceLock<Line>,
    /// Whether KVM takes acknowledgements.
    is_acknowledged: AtomicBool,
    config: Mutex<ConfigImage>,
    changed: Condvar,
    attachment: Mutex<Attachment>,
}

impl GateLink {
    pub(crate) fn new(slot: &VirtioSlot, interrupt: EventFd, registers: SlotRegisters) -> Self {
        let mut bytes = slot.config.clone();
        bytes.resize(slot.kind.config_bytes(), 0);
        registers.show_config(&bytes);
        let config = ConfigImage {
            bytes,
            features: slot.features,
            settled: false,
            resets_done: 0,
        };
        Self {
            registers,
            interrupt,
            line: OnceLock::new(),
            is_acknowledged: AtomicBool::new(false),
            config: Mutex::new(config),
            changed: Condvar::new(),
            attachment: Mutex::new(Attachment {
                generation: slot.generation,
                phase: Phase::Starting,
                output_position: slot.output_position,
                input_position: slot.input_position,
            }),
        }
    }

    pub(crate) fn config(&self) -> MutexGuard<'_, ConfigImage> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `done`, at most `within`; woken by every change. Returns the image as it is then.
    pub(crate) fn wait_config(
        &self,
        within: Duration,
        mut done: impl FnMut(&ConfigImage) -> bool,
    ) -> MutexGuard<'_, ConfigImage> {
        let guard = self.config();
        let waited = self
            .changed
            .wait_timeout_while(guard, within, |image| !done(image));
        waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Changes the configuration, which is settled then.
    pub(super) fn settle(&self, change: impl FnOnce(&mut ConfigImage)) {
        let mut image = self.config();
        change(&mut image);
        image.settled = true;
        self.registers.show_config(&image.bytes);
        drop(image);
        self.notify();
    }

    /// Tells the driver, if it looks, whether it has to reset the device.
    pub(crate) fn set_needs_reset(&self, is_needed: bool) {
        if is_needed {
            self.registers.raise(Register::Status, STATUS_NEEDS_RESET);
        } else {
            self.registers.clear(Register::Status, STATUS_NEEDS_RESET);
        }
    }

    pub(crate) fn notify(&self) {
        self.changed.notify_all();
    }

    /// The driver's reset has been carried out: interrupts are as new, and it may go on.
    pub(super) fn reset_is_done(&self) {
        self.set_needs_reset(false);
        self.registers.set(Register::InterruptStatus, 0);
        self.config().resets_done += 1;
        self.notify();
    }

    /// Tells the driver to look at configuration and status.
    pub(crate) fn raise_config(&self) {
        self.raise(INTERRUPT_CONFIG);
    }

    /// Which device process there is.
    pub(crate) fn attachment(&self) -> Attachment {
        *self.lock_attachment()
    }

    pub(super) fn set_attachment(&self, attachment: Attachment) {
        *self.lock_attachment() = attachment;
    }

    fn lock_attachment(&self) -> MutexGuard<'_, Attachment> {
        self.attachment
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Names the interrupt line, once.
    pub(crate) fn connect(&self, line: Line) {
        let _it_has_one = self.line.set(line);
    }

    /// Has KVM take acknowledgements of used buffers, and of nothing else, from now on, or not. While it does, they leave bit 0 of the
    /// interrupt status as it is. Of the gate thread alone, between a reset and the first interrupt.
    pub(super) fn take_acknowledgements(&self, is_wanted: bool) {
        let Some(line) = self.line.get() else {
            return;
        };
        if self.is_acknowledged.load(Ordering::Relaxed) == is_wanted {
            return;
        }
        let change = if is_wanted {
            Vm::connect_doorbell
        } else {
            Vm::disconnect_doorbell
        };
        let (bell, address) = (&line.acknowledged, line.acknowledge);
        match change(&line.vm, bell, address, INTERRUPT_VRING) {
            Ok(()) => self.is_acknowledged.store(is_wanted, Ordering::Relaxed),
            Err(error) => tracing::warn!(%error, is_wanted, "acknowledgements stay as they are"),
        }
    }

    /// As [`GateLink::raise`], without the kernel thread in between. Of the gate thread alone, which may do that, and for all
    /// that it raises: KVM takes an edge that comes between the two halves of another for the same one.
    pub(super) fn raise_at_once(&self, bits: u32) {
        self.registers.raise(Register::InterruptStatus, bits);
        let line = self.line.get();
        if line.is_none_or(|line| line.vm.pulse(line.gsi).is_err()) {
            let _already_pending = self.interrupt.write(1);
        }
    }

    pub(super) fn raise(&self, bits: u32) {
        self.registers.raise(Register::InterruptStatus, bits);
        // An irqfd that cannot count further has an interrupt pending already.
        let _already_pending = self.interrupt.write(1);
    }
}
