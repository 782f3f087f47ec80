//! Broker and `bulkhead-vcpu`, after birth.

use serde::{Deserialize, Serialize};

/// Sender: broker. All are idempotent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToVcpu {
    /// Stop all vCPUs now and exit; answered by [`FromVcpu::Ended`] unless it has been sent.
    Kill,
    /// Answer with the same number.
    Ping(u64),
    /// Say again whether the vCPUs run: answered by [`FromVcpu::Resumed`], [`FromVcpu::Paused`] or
    /// [`FromVcpu::Ended`]. A broker asks this that is new to the process.
    Tell,
    /// Press the ACPI power button.
    PowerButton,
    /// Stop the vCPUs, keep everything. Answered by [`FromVcpu::Paused`].
    Pause,
    /// Undo [`ToVcpu::Pause`]. Answered by [`FromVcpu::Resumed`].
    Resume,
    /// The device process in this virtio slot is dead, and nothing of its I/O is left in the kernel: the
    /// window is made ready for its successor. Answered by [`FromVcpu::SlotPrepared`]; what the
    /// guest asks of the device meanwhile waits.
    PrepareSlot {
        /// virtio-mmio slot.
        slot: u8,
        /// Generation of the successor.
        generation: u32,
        /// Whether what the dead process was working on may have killed it.
        blame: bool,
        /// Whether what only the device knows may be another from now on: its owner has changed the
        /// disk's size or its medium. The guest is told of what is different.
        fields_change: bool,
    },
    /// The device process in this virtio slot is gone and will have no successor; its requests are
    /// answered with errors.
    DeviceLost {
        /// virtio-mmio slot.
        slot: u8,
    },
    /// The legacy process is dead: its page is made ready for its successor. Answered by
    /// [`FromVcpu::LegacyPrepared`]; register accesses wait.
    PrepareLegacy {
        /// Generation of the successor.
        generation: u32,
    },
    /// The legacy process is gone and will have no successor; its registers read as all ones.
    LegacyLost,
}

/// How a virtual machine ended. Sent once, and once more to each broker that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The guest powered itself off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest reported a panic (pvpanic).
    GuestPanic,
    /// A vCPU took a triple fault.
    TripleFault,
    /// The guest wrote this byte to the debug exit port.
    DebugExit(u8),
    /// KVM cannot run the guest.
    InternalError,
    /// The broker said so.
    Killed,
}

/// Sender: `bulkhead-vcpu`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromVcpu {
    /// Answer to [`ToVcpu::Ping`].
    Pong(u64),
    /// The vCPUs are stopped and nothing of them is in flight.
    Paused,
    /// The vCPUs run again.
    Resumed,
    /// Answer to [`ToVcpu::PrepareSlot`], with the descriptors of window, kick and call doorbell.
    SlotPrepared {
        /// virtio-mmio slot.
        slot: u8,
        /// Generation that the window is ready for.
        generation: u32,
        /// Position in the output stream up to which everything is stored, for positioned queues.
        output_position: u64,
        /// Bytes of input that the guest has been given.
        input_position: u64,
    },
    /// The device process of this generation has published its configuration, and its requests are with it.
    SlotServing {
        /// virtio-mmio slot.
        slot: u8,
        /// Its generation.
        generation: u32,
    },
    /// A request was in the hands of three device processes that died, the last time alone; it was
    /// answered with an error.
    RequestGivenUp {
        /// virtio-mmio slot.
        slot: u8,
        /// Which; one line.
        reason: String,
    },
    /// A device broke its protocol or said it failed. Its requests wait until the broker has decided.
    DeviceFault {
        /// virtio-mmio slot.
        slot: u8,
        /// What it did; one line.
        reason: String,
    },
    /// The guest broke the protocol of a device; it sees DEVICE_NEEDS_RESET. Rate-limited.
    GuestFault {
        /// virtio-mmio slot.
        slot: u8,
        /// What it did; one line.
        reason: String,
    },
    /// Answer to [`ToVcpu::PrepareLegacy`], with the descriptors of page, kick, interrupt and reply
    /// doorbell.
    LegacyPrepared {
        /// Generation that the page is ready for.
        generation: u32,
        /// Position in the output stream up to which everything is stored.
        output_position: u64,
        /// Bytes of input that the guest has been given.
        input_position: u64,
    },
    /// The legacy process of this generation serves.
    LegacyServing {
        /// Its generation.
        generation: u32,
    },
    /// The legacy process broke its protocol or did not answer in time. Register accesses wait until the
    /// broker has decided. Sent at most once for each generation.
    LegacyFault {
        /// What it did; one line.
        reason: String,
    },
    /// A piece of the crash report, in order; the text may hold escaped guest bytes.
    Report {
        /// At most [`super::TEXT_BYTES_MAX`] bytes.
        text: String,
    },
    /// The VM has ended; the process stays until `Kill`, so that a broker hears of it.
    Ended(Outcome),
}
