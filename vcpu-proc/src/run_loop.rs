//! One vCPU's thread: KVM_RUN and what its exits ask for.
//!
//! The thread holds its vCPU alone. It waits for nobody but, within a deadline, for the legacy
//! process or a device's configuration, and for the control thread while it holds. It never ends:
//! what it leaves behind is given to the group, and the process ends with the control thread.

use std::sync::Arc;

use bulkhead_ipc::protocol::vcpu::Outcome;
use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_debug_exit_arch,
};
use vm_memory::GuestMemoryMmap;

use crate::crash;
use crate::group::{Ending, Group};
use crate::kvm::{Exit, Vcpu};
use crate::ports::Ports;
use crate::quirks::{Handled, QuirkError, VcpuQuirks};
use crate::report::{self, VcpuState};

/// One vCPU with everything that its thread needs.
#[derive(Debug)]
pub struct VcpuLoop {
    /// Its number.
    pub index: u8,
    /// The vCPU.
    pub vcpu: Vcpu,
    /// What completes KVM where it is incomplete; nothing elsewhere.
    pub quirks: Option<VcpuQuirks>,
    /// Guest memory, for the quirks.
    pub memory: GuestMemoryMmap,
    /// Who answers ports and registers.
    pub ports: Arc<Ports>,
    /// The vCPUs as one.
    pub group: Arc<Group>,
}

/// Why the loop is left by itself.
type Ended = (Outcome, String);

impl VcpuLoop {
    /// Runs the guest until the group stops. The vCPU is then complete and can be looked at.
    pub fn run(&mut self) {
        let (_, mut go_on) = self.group.obey(self.index);
        while go_on {
            match self.step() {
                Ok(still) => go_on = still,
                Err((outcome, detail)) => {
                    self.group.end(Ending {
                        outcome,
                        vcpu: self.index,
                        detail,
                    });
                    // It must not run again, whatever else the others are told meanwhile.
                    self.group.wait_for_stop();
                    go_on = false;
                }
            }
        }
    }

    /// What the vCPU looks like, if the guest has crashed.
    pub fn scene(&mut self) -> Option<VcpuState> {
        let ending = self.group.ending()?;
        if !crash::is_crash(ending.outcome) {
            return None;
        }
        let collected = report::collect(self.vcpu.fd_mut(), self.index);
        collected
            .inspect_err(|error| tracing::error!(%error, "registers for the crash report"))
            .ok()
    }

    /// One KVM_RUN. Returns whether to go on.
    fn step(&mut self) -> Result<bool, Ended> {
        let mut go_on = true;
        match self.vcpu.run() {
            Exit::PortWrite { port, size, data } => {
                if let Some(outcome) = self.ports.write(port, size, data) {
                    return Err((outcome, String::new()));
                }
            }
            Exit::PortRead { port, size, data } => self.ports.read(port, size, data),
            Exit::MmioWrite { address, data } => self.ports.write_mmio(address, data),
            Exit::MmioRead { address, data } => self.ports.read_mmio(address, data),
            Exit::Interrupted => go_on = self.obey(),
            Exit::Again => {}
            Exit::Shutdown => return Err((Outcome::TripleFault, String::new())),
            Exit::SystemEvent(event) => return Err(system_event(event)),
            Exit::InternalError => self.complete_instruction()?,
            Exit::Debug(debug) => self.take_debug(&debug)?,
            Exit::WriteMsr { index, data } => self.write_msr(index, data)?,
            Exit::Unexpected(reason) => {
                return Err(internal(format!("unexpected exit {reason} of KVM_RUN")));
            }
            Exit::Failed(error) => return Err(internal(error.to_string())),
        }
        if let Some(quirks) = &mut self.quirks {
            quirks
                .after_exit(self.vcpu.fd_mut(), &self.memory)
                .map_err(quirk)?;
        }
        Ok(go_on)
    }

    fn obey(&self) -> bool {
        let (held, go_on) = self.group.obey(self.index);
        if held && go_on {
            self.vcpu.mark_clock_paused();
        }
        go_on
    }

    fn complete_instruction(&mut self) -> Result<(), Ended> {
        let vcpu = self.vcpu.fd_mut();
        let Some(quirks) = &mut self.quirks else {
            let error = crate::quirks::ops::VcpuOps::internal_error(vcpu);
            let suberror = error.suberror;
            return Err(internal(format!("KVM internal error {suberror}")));
        };
        let completed = quirks.on_internal_error(vcpu, &self.memory);
        completed.map(drop).map_err(quirk)
    }

    fn take_debug(&mut self, debug: &kvm_debug_exit_arch) -> Result<(), Ended> {
        let Some(quirks) = &mut self.quirks else {
            return Err(internal("debug exit that nobody asked for".to_owned()));
        };
        match quirks.on_debug(self.vcpu.fd_mut(), &self.memory, debug) {
            Ok(Handled::NotOurs) => Err(internal("debug exit that nobody asked for".to_owned())),
            Ok(_) => Ok(()),
            Err(error) => Err(quirk(error)),
        }
    }

    fn write_msr(&mut self, index: u32, data: u64) -> Result<(), Ended> {
        let done = match &mut self.quirks {
            Some(quirks) => quirks
                .on_wrmsr(self.vcpu.fd_mut(), index, data)
                .map_err(quirk)?,
            None => false,
        };
        if !done {
            self.vcpu.refuse_msr();
        }
        Ok(())
    }
}

fn system_event(event: u32) -> Ended {
    let outcome = match event {
        KVM_SYSTEM_EVENT_SHUTDOWN => Outcome::PowerOff,
        KVM_SYSTEM_EVENT_RESET => Outcome::Reset,
        KVM_SYSTEM_EVENT_CRASH => Outcome::GuestPanic,
        _ => return internal(format!("unknown system event {event}")),
    };
    (outcome, String::new())
}

fn internal(detail: String) -> Ended {
    (Outcome::InternalError, detail)
}

fn quirk(error: QuirkError) -> Ended {
    internal(error.to_string())
}
