//! Interrupt lines that this process raises itself: those of the legacy devices, on their request,
//! and the event device's. Each is an eventfd that KVM turns into edges. Lines of virtio devices
//! belong to their gates.

use bulkhead_ipc::platform::{ACPI_GED_GSI, COM1_GSI, RTC_GSI};
use bulkhead_ipc::shared::Doorbell;

use crate::kvm::{KvmError, Vm};

/// Why an interrupt line could not be made.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The kernel has no eventfd for it.
    #[error("eventfd for interrupt line {gsi}: {source}")]
    EventFd {
        /// The line.
        gsi: u32,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// KVM refused to connect it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The lines.
#[derive(Debug)]
pub struct Lines {
    com1: Doorbell,
    rtc: Doorbell,
    events: Doorbell,
}

impl Lines {
    /// Makes the lines and connects them to the VM's interrupt controllers.
    ///
    /// # Errors
    /// The kernel's or KVM's.
    pub fn connect(vm: &Vm) -> Result<Self, LineError> {
        let line = |gsi| -> Result<Doorbell, LineError> {
            let doorbell = Doorbell::new().map_err(|source| LineError::EventFd { gsi, source })?;
            vm.connect_interrupt(doorbell.eventfd(), gsi)?;
            Ok(doorbell)
        };
        Ok(Self {
            com1: line(COM1_GSI)?,
            rtc: line(RTC_GSI)?,
            events: line(ACPI_GED_GSI)?,
        })
    }

    /// An edge on each line that the legacy process asks for; bits that are not its own are dropped.
    pub fn raise_legacy(&self, requests: u32) {
        for (gsi, line) in [(COM1_GSI, &self.com1), (RTC_GSI, &self.rtc)] {
            if requests & (1 << gsi) != 0 {
                line.ring();
            }
        }
    }

    /// An edge on the event device's line.
    pub fn raise_events(&self) {
        self.events.ring();
    }
}
