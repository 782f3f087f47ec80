//! What machines need to run at all, and to run well.

use super::probe::Probed;
use super::{Check, Host};
use crate::vmfile::meminfo_bytes;
use nix::errno::Errno;

/// The API version of every KVM since Linux 2.6.22.
const KVM_API_VERSION: i32 = 12;
/// Oldest kernel that has been thought of: io_uring restrictions, memfd seals, pidfds, Landlock.
const KERNEL_OLDEST: (u32, u32) = (5, 13);

pub(super) fn checks(host: &Host, probed: &Probed) -> Vec<Check> {
    let mut checks = vec![kernel(host), kvm_device(host, probed)];
    if let Ok(kvm) = &probed.kvm {
        checks.push(if kvm.api_version == KVM_API_VERSION {
            Check::ok("kvm.api", format!("version {KVM_API_VERSION}"))
        } else {
            let found = format!("version {}", kvm.api_version);
            let cure = format!("install a kernel whose KVM has API version {KVM_API_VERSION}");
            Check::fail("kvm.api", found, cure)
        });
        checks.push(if kvm.lacking.is_empty() {
            let found = format!("all there; up to {} vCPUs", kvm.vcpus_max);
            Check::ok("kvm.capabilities", found)
        } else {
            let found = format!("lacks {}", kvm.lacking.join(", "));
            let cure = "install a newer kernel, or one built with these features";
            Check::fail("kvm.capabilities", found, cure)
        });
    }
    checks.push(kvm_kind(host));
    checks.push(namespaces(host, probed));
    checks.push(seccomp(host));
    checks.push(landlock(probed));
    checks.push(io_uring(host, probed));
    checks.push(cgroup(host));
    checks.push(memory(host));
    checks.push(huge_pages(host));
    checks.push(match probed.entropy {
        Ok(()) => Check::ok("entropy", "the kernel's random number generator is seeded"),
        Err(errno) => Check::warn(
            "entropy",
            format!("not seeded yet: {}", errno.desc()),
            "wait until boot has finished, or give this host an entropy source",
        ),
    });
    checks
}

fn kernel(host: &Host) -> Check {
    let Some(release) = host.text("proc/sys/kernel/osrelease") else {
        return Check::warn("kernel", "release unknown", "mount /proc");
    };
    let mut numbers = release.split(['.', '-', '+']).map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    let found = crate::escape::escaped(&release).to_string();
    match version {
        (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= KERNEL_OLDEST => {
            Check::ok("kernel", format!("Linux {found}"))
        }
        _ => {
            let (major, minor) = KERNEL_OLDEST;
            let cure = format!("install Linux {major}.{minor} or newer");
            Check::fail("kernel", format!("Linux {found}"), cure)
        }
    }
}

fn kvm_device(host: &Host, probed: &Probed) -> Check {
    let id = "kvm.device";
    let Err(errno) = &probed.kvm else {
        return Check::ok(id, "/dev/kvm can be opened");
    };
    let found = format!("/dev/kvm cannot be opened: {}", errno.desc());
    match errno {
        Errno::EACCES | Errno::EPERM => {
            let cure = "add this user to the group that owns /dev/kvm (usermod -aG kvm USER), \
                then log in again";
            Check::fail(id, found, cure)
        }
        Errno::ENOENT | Errno::ENODEV | Errno::ENXIO => {
            let flags = host.text("proc/cpuinfo").unwrap_or_default();
            let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
            let cure = if has("vmx") {
                "modprobe kvm_intel"
            } else if has("svm") {
                "modprobe kvm_amd"
            } else {
                "switch virtualisation on in the firmware; in a virtual machine, switch nested \
                 virtualisation on at its host; in a container, pass /dev/kvm in"
            };
            Check::fail(id, found, cure)
        }
        _ => Check::fail(id, found, "see the kernel's log (dmesg) for KVM's messages"),
    }
}

fn kvm_kind(host: &Host) -> Check {
    let id = "kvm.kind";
    if host.exists("sys/module/kvm_pvm") {
        return Check::warn(
            id,
            "kvm_pvm: guest kernels run in an emulator at about 4 million instructions a second; \
             what it lacks is completed by bulkhead",
            "none needed; use a host with hardware virtualisation for speed",
        );
    }
    let module = ["kvm_intel", "kvm_amd"]
        .into_iter()
        .find(|name| host.exists(&format!("sys/module/{name}")));
    match module {
        Some(name) => Check::ok(id, format!("{name}: hardware virtualisation")),
        None => Check::warn(
            id,
            "no KVM module that is known",
            "modprobe kvm_intel or kvm_amd",
        ),
    }
}

fn namespaces(host: &Host, probed: &Probed) -> Check {
    let id = "sandbox.namespaces";
    let Err(errno) = probed.user_namespace else {
        return Check::ok(
            id,
            "user, pid, mount, ipc, uts and net namespaces can be made",
        );
    };
    let found = format!("namespaces cannot be made: {}", errno.desc());
    let cure = if host.number("proc/sys/user/max_user_namespaces") == Some(0) {
        "sysctl user.max_user_namespaces=15000"
    } else if host.number("proc/sys/kernel/unprivileged_userns_clone") == Some(0) {
        "sysctl kernel.unprivileged_userns_clone=1"
    } else if host.number("proc/sys/kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
        "give bulkhead an AppArmor profile with `userns,`, or sysctl \
         kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        "in a container, allow unshare(CLONE_NEWUSER) in its seccomp profile"
    };
    Check::fail(id, found, cure)
}

fn seccomp(host: &Host) -> Check {
    let id = "sandbox.seccomp";
    let Some(actions) = host.text("proc/sys/kernel/seccomp/actions_avail") else {
        let cure = "install a kernel with CONFIG_SECCOMP_FILTER";
        return Check::fail(id, "no seccomp filters", cure);
    };
    let needed = ["kill_process", "trap", "errno", "allow"];
    let lacking: Vec<_> = needed
        .into_iter()
        .filter(|action| !actions.split_ascii_whitespace().any(|a| a == *action))
        .collect();
    if lacking.is_empty() {
        return Check::ok(id, "filters with all actions that are needed");
    }
    let found = format!("actions lacking: {}", lacking.join(", "));
    Check::fail(id, found, "install Linux 4.14 or newer")
}

fn landlock(probed: &Probed) -> Check {
    let id = "sandbox.landlock";
    let abi = probed.landlock_abi;
    match abi {
        ..=0 => Check::warn(
            id,
            "not there; seccomp and namespaces still confine every process",
            "add landlock to the lsm= list on the host's kernel command line",
        ),
        1..=5 => Check::warn(
            id,
            format!("ABI {abi}: signals and abstract sockets are not scoped"),
            "install Linux 6.12 or newer for ABI 6",
        ),
        _ => Check::ok(id, format!("ABI {abi}")),
    }
}

fn io_uring(host: &Host, probed: &Probed) -> Check {
    let id = "io_uring";
    let Err(errno) = probed.io_uring else {
        return Check::ok(id, "can be used");
    };
    let found = format!("cannot be used: {}", errno.desc());
    let cure = match host.number("proc/sys/kernel/io_uring_disabled") {
        Some(1 | 2) => "sysctl kernel.io_uring_disabled=0",
        _ => {
            "allow io_uring_setup in this container's seccomp profile, or install a kernel with it"
        }
    };
    Check::fail(id, found, cure)
}

fn cgroup(host: &Host) -> Check {
    let id = "cgroup";
    let Some(controllers) = host.text("sys/fs/cgroup/cgroup.controllers") else {
        return Check::warn(
            id,
            "version 2 is not mounted at /sys/fs/cgroup; memory and tasks are limited by rlimits only",
            "boot the host with systemd.unified_cgroup_hierarchy=1",
        );
    };
    let own = host.text("proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"));
    let group = format!("sys/fs/cgroup/{}", own.unwrap_or(""));
    let delegated = nix::unistd::access(&host.path(&group), nix::unistd::AccessFlags::W_OK).is_ok();
    let lacking: Vec<_> = ["memory", "pids", "cpu"]
        .into_iter()
        .filter(|name| !controllers.split_ascii_whitespace().any(|c| c == *name))
        .collect();
    if !delegated {
        return Check::warn(
            id,
            "version 2, but this process's group is not delegated to this user",
            "start with systemd-run --user --scope -p Delegate=yes bulkhead …",
        );
    }
    if lacking.is_empty() {
        return Check::ok(id, "version 2, delegated, with memory, pids and cpu");
    }
    Check::warn(
        id,
        format!("version 2, without the controllers {}", lacking.join(", ")),
        "enable them in cgroup.subtree_control of the parent groups",
    )
}

fn memory(host: &Host) -> Check {
    let id = "memory";
    let meminfo = host.text("proc/meminfo").unwrap_or_default();
    let Some(available) = meminfo_bytes(&meminfo, "MemAvailable") else {
        return Check::warn(id, "unknown", "mount /proc");
    };
    let found = format!("{} MiB available", available >> 20);
    if available >= 64 << 20 {
        Check::ok(id, found)
    } else {
        let cure = "end other programs or add memory; a machine needs 16 MiB and its processes";
        Check::warn(id, found, cure)
    }
}

fn huge_pages(host: &Host) -> Check {
    let id = "memory.huge_pages";
    let pool = host.number("sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let pool = pool.map_or_else(String::new, |n| {
        format!("; {n} reserved pages of 2 MiB are free")
    });
    let modes = host.text("sys/kernel/mm/transparent_hugepage/enabled");
    let chosen = modes
        .as_deref()
        .and_then(|modes| modes.split_once('[')?.1.split_once(']'))
        .map(|(mode, _)| mode.to_owned());
    match chosen.as_deref() {
        Some(mode @ ("always" | "madvise")) => {
            Check::ok(id, format!("transparent huge pages: {mode}{pool}"))
        }
        _ => Check::warn(
            id,
            format!("no transparent huge pages{pool}"),
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        ),
    }
}
