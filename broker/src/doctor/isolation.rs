//! The security audit: what lets one machine learn about another, or about the host.

use super::probe::Probed;
use super::{Check, Host};
use crate::escape::escaped;
use crate::vmfile::meminfo_bytes;
use nix::errno::Errno;
use std::fs;
use std::os::unix::fs::MetadataExt;

pub(super) fn checks(host: &Host, probed: &Probed) -> Vec<Check> {
    vec![
        kvm_permissions(host),
        smt(host),
        core_scheduling(host, probed),
        ksm(host),
        swap(host),
        vulnerabilities(host),
        root(probed),
    ]
}

fn kvm_permissions(host: &Host) -> Check {
    let id = "audit.kvm_permissions";
    let Ok(found) = fs::metadata(host.path("dev/kvm")) else {
        return Check::warn(id, "/dev/kvm is not there", "see kvm.device");
    };
    let mode = found.mode() & 0o777;
    let shown = format!(
        "mode {mode:04o}, user {}, group {}",
        found.uid(),
        found.gid()
    );
    if mode & 0o006 == 0 {
        return Check::ok(id, shown);
    }
    Check::warn(
        id,
        format!("{shown}: every user of this host may use KVM"),
        "chmod 0660 /dev/kvm, and keep it with a udev rule: KERNEL==\"kvm\", MODE=\"0660\"",
    )
}

fn smt(host: &Host) -> Check {
    let id = "audit.smt";
    match host.number("sys/devices/system/cpu/smt/active") {
        Some(0) => Check::ok(id, "hyper-threading is off"),
        Some(_) => Check::warn(
            id,
            "hyper-threading is on: machines that share a core can observe each other",
            "echo off > /sys/devices/system/cpu/smt/control, or boot the host with nosmt",
        ),
        None => Check::warn(
            id,
            "unknown: the kernel does not say",
            "check the firmware's settings for hyper-threading",
        ),
    }
}

fn core_scheduling(host: &Host, probed: &Probed) -> Check {
    let id = "audit.core_scheduling";
    let smt_off = host.number("sys/devices/system/cpu/smt/active") == Some(0);
    match probed.core_scheduling {
        Ok(()) => Check::ok(id, "available"),
        Err(_) if smt_off => Check::ok(id, "not needed, since hyper-threading is off"),
        Err(errno) => Check::warn(
            id,
            match errno {
                Errno::ENODEV => "not available: the kernel sees no hyper-threads".to_owned(),
                errno => format!("not available: {}", errno.desc()),
            },
            "install a kernel with CONFIG_SCHED_CORE (5.14 or newer), or switch hyper-threading off",
        ),
    }
}

fn ksm(host: &Host) -> Check {
    let id = "audit.ksm";
    match host.number("sys/kernel/mm/ksm/run") {
        None | Some(0 | 2) => Check::ok(id, "kernel same-page merging is off"),
        Some(_) => Check::warn(
            id,
            "kernel same-page merging is on: machines can learn which pages others hold",
            "echo 2 > /sys/kernel/mm/ksm/run",
        ),
    }
}

fn swap(host: &Host) -> Check {
    let id = "audit.swap";
    let meminfo = host.text("proc/meminfo").unwrap_or_default();
    match meminfo_bytes(&meminfo, "SwapTotal") {
        Some(0) => Check::ok(id, "no swap"),
        Some(bytes) => Check::warn(
            id,
            format!("{} MiB: guest memory can reach a disk", bytes >> 20),
            "swapoff -a, or encrypt swap with a random key (crypttab option swap)",
        ),
        None => Check::warn(id, "unknown", "mount /proc"),
    }
}

fn vulnerabilities(host: &Host) -> Check {
    let id = "audit.cpu_vulnerabilities";
    let Ok(entries) = fs::read_dir(host.path("sys/devices/system/cpu/vulnerabilities")) else {
        let cure = "install a kernel that reports them (4.15 or newer)";
        return Check::warn(id, "unknown: the kernel does not say", cure);
    };
    let (mut known, mut open) = (0, Vec::new());
    for entry in entries.flatten() {
        let name = entry.file_name();
        let state = fs::read_to_string(entry.path()).unwrap_or_default();
        known += 1;
        if state.starts_with("Vulnerable") {
            let name = escaped(name.as_encoded_bytes()).to_string();
            let state = escaped(state.trim()).to_string();
            open.push(format!("{name} ({state})"));
        }
    }
    open.sort();
    if open.is_empty() {
        return Check::ok(id, format!("{known} known, none open"));
    }
    Check::warn(
        id,
        format!("open: {}", open.join("; ")),
        "install current microcode and kernel, and do not boot the host with mitigations=off",
    )
}

fn root(probed: &Probed) -> Check {
    let id = "audit.user";
    if !probed.is_root {
        return Check::ok(id, "not root");
    }
    Check::warn(
        id,
        "root: processes of machines drop it, but this program keeps it",
        "run bulkhead as a user of the group kvm",
    )
}
