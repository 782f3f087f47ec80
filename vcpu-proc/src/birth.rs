//! The process `bulkhead-vcpu`: its birth from the runtime, its grants, its exit.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::sync::Arc;

use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{FdRole, KindConfig, VcpuConfig};
use bulkhead_runtime::birth::EXIT_STILLBORN;
use bulkhead_runtime::grants::GrantError;
use bulkhead_runtime::{Grants, Newborn, Stillbirth, leave};

use crate::setup::{LegacyFds, Resources};
use crate::start::{self, Walls};
use crate::virtio::SlotFds;

/// The whole process. Does not return when it was born: ending is leaving, without destructors.
#[must_use]
pub fn run() -> ExitCode {
    let mut newborn = match Newborn::receive(ProcKind::Vcpu) {
        Ok(newborn) => newborn,
        // The broker has been told.
        Err(_) => return ExitCode::from(EXIT_STILLBORN.to_le_bytes()[0]),
    };
    let (config, resources) = match take(&mut newborn) {
        Ok(taken) => taken,
        Err(cause) => newborn.fail(&cause),
    };
    let walls = Arc::new(Sandbox { newborn });
    let channel = &walls.newborn.channel;
    match start::run(config, resources, channel, &walls) {
        // What remains of the VM is the kernel's to clean up.
        Ok(_remains) => leave(0),
        Err(cause) => walls.newborn.fail(&Stillbirth::setup(cause)),
    }
}

/// The walls that the runtime puts up.
#[derive(Debug)]
struct Sandbox {
    newborn: Newborn,
}

impl Walls for Sandbox {
    fn lock_thread(&self, thread: &'static str) -> Result<(), String> {
        let locks = &self.newborn.locks;
        locks.lock_thread(thread).map_err(|error| error.to_string())
    }

    fn announce(&self) -> Result<(), String> {
        let announced = self.newborn.announce_locked();
        announced.map_err(|error| error.to_string())
    }
}

/// Takes configuration and descriptors; whatever is left over stops the birth.
fn take(newborn: &mut Newborn) -> Result<(VcpuConfig, Resources), Stillbirth> {
    let KindConfig::Vcpu(config) = newborn.config.clone() else {
        return Err(Stillbirth::setup("the birth message is not a vCPU group's"));
    };
    let mut grants = std::mem::take(&mut newborn.grants);
    let mut resources = take_resources(&config, &mut grants)?;
    let kept = take_kept(&mut grants)?;
    grants.finish()?;
    resources.adoption = newborn.take_adoption().map(|mut adoption| {
        adoption.keep(kept);
        adoption
    });
    Ok((config, resources))
}

/// The consoles' descriptors, which it keeps for later brokers and does not use: of each console the
/// input ring and its doorbell, and the doorbell of the output's readers.
fn take_kept(grants: &mut Grants) -> Result<Vec<OwnedFd>, GrantError> {
    let mut kept = Vec::new();
    for index in (0..).take_while(|&index| index < CONSOLES_MAX) {
        if grants.has(FdRole::Input, index) {
            for role in [FdRole::Input, FdRole::InputBell, FdRole::OutputBell] {
                kept.push(grants.take(role, index)?);
            }
        }
    }
    Ok(kept)
}

/// The serial port, and the virtio console.
const CONSOLES_MAX: u16 = 2;

fn take_resources(config: &VcpuConfig, grants: &mut Grants) -> Result<Resources, GrantError> {
    let mut optional = |role| -> Result<Option<File>, GrantError> {
        let granted = grants.has(role, 0);
        granted
            .then(|| grants.take(role, 0).map(File::from))
            .transpose()
    };
    let initrd = optional(FdRole::Initrd)?;
    let core = optional(FdRole::Core)?;
    let devices = config
        .devices
        .iter()
        .map(|device| {
            let index = device.slot.into();
            Ok(SlotFds {
                window: grants.take(FdRole::Window, index)?,
                kick: grants.take(FdRole::Kick, index)?,
                call: grants.take(FdRole::Call, index)?,
            })
        })
        .collect::<Result<Vec<_>, GrantError>>()?;
    Ok(Resources {
        kvm: grants.take(FdRole::Kvm, 0)?,
        kernel: grants.take(FdRole::Kernel, 0)?.into(),
        initrd,
        core,
        legacy: LegacyFds {
            page: grants.take(FdRole::LegacyPage, 0)?,
            kick: grants.take(FdRole::LegacyKick, 0)?,
            interrupt: grants.take(FdRole::LegacyInterrupt, 0)?,
            reply: grants.take(FdRole::LegacyReply, 0)?,
        },
        devices,
        adoption: None,
    })
}
