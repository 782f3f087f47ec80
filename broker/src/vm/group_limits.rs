//! What each process's control group allows: by its policy, and for what its machine gives it. Pure, but
//! for [`check`].

use super::devices::DevicePlan;
use super::session::RunError;
use super::spec::{HostShare, VmSpec};
use crate::launch::Launched;
use crate::launch::cgroup::{GroupLimits, Place, Reach};
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_policies::cache::Compiled;
use bulkhead_policies::plan::Limits;

/// The policy's limits, and what the machine itself takes: guest memory with the kernel's page tables
/// for it, windows, and files whose pages may stay in memory (on a tmpfs, all of them).
pub(super) fn of(
    spec: &VmSpec,
    devices: &[DevicePlan],
    disk_bytes: u64,
    id: ProcId,
    limits: &Limits,
) -> GroupLimits {
    let window = |device: &DevicePlan| u64::from(device.window_bytes);
    let memory_bytes = match id.kind {
        ProcKind::Vcpu => {
            let windows = devices.iter().map(window).sum::<u64>();
            spec.memory_bytes + spec.memory_bytes / 16 + windows
        }
        ProcKind::Legacy => spec.console.history_bytes,
        kind => {
            let same = |d: &&DevicePlan| (d.kind.proc_kind(), d.index) == (kind, id.index);
            devices.iter().find(same).map_or(0, |device| {
                window(device)
                    + match device.kind {
                        VirtioKind::Console => spec.console.history_bytes,
                        VirtioKind::Blk => disk_bytes,
                        VirtioKind::Rng | VirtioKind::Net | VirtioKind::Vsock | VirtioKind::Fs => 0,
                    }
            })
        }
    };
    let vcpus = if limits.plus_vcpus { spec.vcpus } else { 0 };
    GroupLimits {
        memory_bytes: limits.memory_bytes.saturating_add(memory_bytes),
        tasks: u64::from(limits.tasks) + u64::from(vcpus),
        share: share(limits, &spec.limits.share),
    }
}

/// What a process may take of the host by its policy. A group may not have more of a processor than the one
/// around it.
fn share(limits: &Limits, machine: &HostShare) -> HostShare {
    let most = machine.cpu_percent.unwrap_or(u32::MAX);
    HostShare {
        cpu_weight: None,
        cpu_percent: limits.cpu_percent.map(|percent| percent.min(most)),
        disk_read_per_s: limits.disk_read_per_s,
        disk_write_per_s: limits.disk_write_per_s,
        disk_read_iops: limits.disk_read_iops,
        disk_write_iops: limits.disk_write_iops,
    }
}

/// Checks that this host can limit what the VM file and the policies of the machine's processes limit of
/// processors and disks. Looks at nothing where they limit nothing.
///
/// # Errors
/// [`RunError::Host`]: what limits it, and the controller that is not there.
pub(super) fn check(
    spec: &VmSpec,
    devices: &[DevicePlan],
    compiled: &Compiled,
    reach: Reach,
) -> Result<(), RunError> {
    let mut kinds = vec![ProcKind::Vcpu, ProcKind::Legacy];
    kinds.extend(devices.iter().map(|device| device.kind.proc_kind()));
    let policies = kinds.into_iter().filter_map(|kind| {
        let (policy, _) = compiled.get(kind)?;
        let share = share(&policy.limits, &spec.limits.share);
        Some((format!("the policy of {kind}"), share))
    });
    let machine = ("the VM file".to_owned(), spec.limits.share);
    let mut shares: Vec<_> = policies.chain([machine]).collect();
    shares.retain(|(_, share)| *share != HostShare::default());
    if shares.is_empty() {
        return Ok(());
    }
    let place = Place::find(reach);
    for (whose, share) in shares {
        place.check(&share).map_err(|cause| RunError::Host {
            lacks: format!("[limits] of {whose} cannot be in force: {cause}"),
        })?;
    }
    Ok(())
}

/// The name of a process's control groups: no other process has it at the same time.
pub(super) fn group_name(vm: &str, process: &Launched) -> String {
    format!("{vm}-{}-{}", process.id, process.pid)
}

#[cfg(test)]
mod tests {
    use super::super::devices;
    use super::super::spec::KernelSource;
    use super::*;

    #[test]
    fn processor_time_of_a_process_is_within_that_of_its_machine() {
        let policy = bulkhead_policies::load(ProcKind::Rng, None, false).unwrap();
        let mut spec = VmSpec::new("vm", KernelSource::File("k".into()));
        let id = ProcId {
            kind: ProcKind::Rng,
            index: 0,
            generation: 1,
        };
        let share =
            |limits: &Limits, spec: &VmSpec| of(spec, &devices::plan(spec), 0, id, limits).share;
        assert_eq!(share(&policy.limits, &spec), HostShare::default());
        let limited = Limits {
            cpu_percent: Some(20),
            disk_read_iops: Some(7),
            ..policy.limits
        };
        let found = share(&limited, &spec);
        assert_eq!(
            (found.cpu_percent, found.disk_read_iops),
            (Some(20), Some(7))
        );
        spec.limits.share.cpu_percent = Some(10);
        assert_eq!(share(&limited, &spec).cpu_percent, Some(10));
        // What limits the machine is no limit of each process.
        assert_eq!(share(&policy.limits, &spec), HostShare::default());
    }
}
