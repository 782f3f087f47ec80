use super::probe::{Kvm, Probed};
use super::{Check, Host, Status};
use crate::launch::users::UserRange;
use nix::errno::Errno;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use tempfile::TempDir;

/// A host on which everything is as it should be.
fn good() -> (TempDir, Probed) {
    let root = tempfile::tempdir().unwrap();
    for (path, text) in [
        ("proc/sys/kernel/osrelease", "6.12.1-amd64\n"),
        (
            "proc/sys/kernel/seccomp/actions_avail",
            "kill_process kill_thread trap errno user_notif trace log allow\n",
        ),
        (
            "proc/meminfo",
            "MemAvailable:  1048576 kB\nSwapTotal: 0 kB\n",
        ),
        ("proc/self/cgroup", "0::/mine\n"),
        ("proc/self/uid_map", "0 0 4294967295\n"),
        ("proc/self/gid_map", "0 0 4294967295\n"),
        (
            "etc/subuid",
            "ann:100000:65536\nbulkhead:1879048192:4194304\n",
        ),
        ("proc/cpuinfo", "flags : fpu vmx\n"),
        ("sys/module/kvm_intel/parameters/nested", "N\n"),
        ("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n"),
        ("sys/fs/cgroup/mine/cgroup.procs", ""),
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always [madvise] never\n",
        ),
        ("sys/kernel/mm/ksm/run", "0\n"),
        ("sys/devices/system/cpu/smt/active", "0\n"),
        (
            "sys/devices/system/cpu/vulnerabilities/meltdown",
            "Not affected\n",
        ),
        ("dev/kvm", ""),
    ] {
        put(root.path(), path, text);
    }
    chmod(root.path(), 0o660);
    let probed = Probed {
        kvm: Ok(Kvm {
            api_version: 12,
            lacking: vec![],
            vcpus_max: 1024,
        }),
        landlock_abi: 7,
        core_scheduling: Ok(()),
        user_namespace: Ok(()),
        io_uring: Ok(()),
        entropy: Ok(()),
        is_root: false,
    };
    (root, probed)
}

fn examine(root: &Path, probed: &Probed) -> Vec<Check> {
    super::examine::<String>(root, probed, &Ok(UserRange::DEFAULT))
}

fn put(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn chmod(root: &Path, mode: u32) {
    fs::set_permissions(root.join("dev/kvm"), fs::Permissions::from_mode(mode)).unwrap();
}

/// The one check that changes when the good host is spoilt.
fn spoilt(spoil: impl FnOnce(&Path, &mut Probed)) -> Check {
    let (root, mut probed) = good();
    spoil(root.path(), &mut probed);
    let mut bad = examine(root.path(), &probed);
    bad.retain(|check| check.status != Status::Ok);
    assert_eq!(bad.len(), 1, "{bad:#?}");
    bad.remove(0)
}

#[test]
fn good_host_has_nothing_to_cure() {
    let (root, probed) = good();
    for check in examine(root.path(), &probed) {
        assert_eq!(
            (check.status, check.cure.as_str()),
            (Status::Ok, ""),
            "{check:?}"
        );
        assert!(!check.found.is_empty());
    }
}

type Spoil = fn(&Path, &mut Probed);

#[test]
fn each_lack_fails_with_its_cure() {
    let cases: [(&str, &str, Spoil); 10] = [
        ("kernel", "5.13", |r, _| {
            put(r, "proc/sys/kernel/osrelease", "4.19.0")
        }),
        ("kvm.device", "usermod", |_, p| p.kvm = Err(Errno::EACCES)),
        ("kvm.device", "kvm_intel", |_, p| p.kvm = Err(Errno::ENOENT)),
        ("kvm.api", "API", |_, p| {
            p.kvm.as_mut().unwrap().api_version = 11
        }),
        ("kvm.capabilities", "kernel", |_, p| {
            p.kvm.as_mut().unwrap().lacking = vec!["KVM_CAP_IRQFD"]
        }),
        ("sandbox.namespaces", "max_user_namespaces", |r, p| {
            p.user_namespace = Err(Errno::ENOSPC);
            put(r, "proc/sys/user/max_user_namespaces", "0");
        }),
        ("sandbox.namespaces", "AppArmor", |r, p| {
            p.user_namespace = Err(Errno::EACCES);
            put(
                r,
                "proc/sys/kernel/apparmor_restrict_unprivileged_userns",
                "1",
            );
        }),
        ("sandbox.seccomp", "4.14", |r, _| {
            put(
                r,
                "proc/sys/kernel/seccomp/actions_avail",
                "kill trap errno allow",
            )
        }),
        ("io_uring", "io_uring_disabled=0", |r, p| {
            p.io_uring = Err(Errno::EPERM);
            put(r, "proc/sys/kernel/io_uring_disabled", "2");
        }),
        ("io_uring", "container", |_, p| {
            p.io_uring = Err(Errno::EPERM)
        }),
    ];
    for (id, cure, spoil) in cases {
        let check = spoilt(spoil);
        assert_eq!((check.id, check.status), (id, Status::Fail), "{check:?}");
        assert!(check.cure.contains(cure), "{check:?}");
    }
}

#[test]
fn each_weakness_warns_with_its_cure() {
    let cases: [(&str, &str, Spoil); 14] = [
        ("kvm.kind", "none needed", |r, _| {
            put(r, "sys/module/kvm_pvm/refcnt", "")
        }),
        ("sandbox.landlock", "lsm=", |_, p| p.landlock_abi = 0),
        ("sandbox.landlock", "6.12", |_, p| p.landlock_abi = 5),
        ("cgroup", "unified", |r, _| {
            fs::remove_file(r.join("sys/fs/cgroup/cgroup.controllers")).unwrap()
        }),
        ("cgroup", "subtree_control", |r, _| {
            put(r, "sys/fs/cgroup/cgroup.controllers", "cpu pids")
        }),
        ("cgroup", "Delegate", |r, _| {
            put(r, "proc/self/cgroup", "0::/nowhere\n")
        }),
        ("memory", "16 MiB", |r, _| {
            put(r, "proc/meminfo", "MemAvailable: 9 kB\nSwapTotal: 0 kB\n")
        }),
        ("memory.huge_pages", "madvise", |r, _| {
            put(
                r,
                "sys/kernel/mm/transparent_hugepage/enabled",
                "always madvise [never]",
            )
        }),
        ("entropy", "entropy source", |_, p| {
            p.entropy = Err(Errno::EAGAIN)
        }),
        ("audit.kvm_permissions", "0660", |r, _| chmod(r, 0o666)),
        ("audit.smt", "nosmt", |r, _| {
            put(r, "sys/devices/system/cpu/smt/active", "1")
        }),
        ("audit.ksm", "ksm/run", |r, _| {
            put(r, "sys/kernel/mm/ksm/run", "1")
        }),
        ("audit.swap", "swapoff", |r, _| {
            put(
                r,
                "proc/meminfo",
                "MemAvailable: 1048576 kB\nSwapTotal: 9 kB\n",
            )
        }),
        ("audit.cpu_vulnerabilities", "microcode", |r, _| {
            put(
                r,
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Vulnerable: no\x1b[2J\n",
            )
        }),
    ];
    for (id, cure, spoil) in cases {
        let check = spoilt(spoil);
        assert_eq!((check.id, check.status), (id, Status::Warn), "{check:?}");
        assert!(check.cure.contains(cure), "{check:?}");
        assert!(!check.found.contains('\x1b'));
    }
}

#[test]
fn users_of_processes_exist_and_are_nobody_else_s() {
    let check = |spoil: &dyn Fn(&Path, &mut Probed), users: Result<&str, &str>| {
        let (root, mut probed) = good();
        probed.is_root = true;
        spoil(root.path(), &mut probed);
        let users = users.map(|text| text.parse::<UserRange>().unwrap());
        super::users::check(&Host::at(root.path()), &probed, &users)
    };
    let default = UserRange::DEFAULT.to_string();
    let found = check(&|_, _| {}, Ok(&default));
    assert_eq!(found.status, Status::Ok);
    assert!(found.found.contains("1879048192 + its pid"), "{found:?}");

    let found = check(&|_, probed| probed.is_root = false, Ok(&default));
    assert_eq!(found.status, Status::Ok);
    assert!(found.found.contains("not root"), "{found:?}");

    for map in ["uid_map", "gid_map"] {
        let short =
            |root: &Path, _: &mut Probed| put(root, &format!("proc/self/{map}"), "0 1000 65536\n");
        let found = check(&short, Ok(&default));
        assert_eq!(found.status, Status::Warn);
        assert!(found.found.contains("user 65534"), "{found:?}");
        assert!(found.cure.contains("pid_max"), "{found:?}");
    }

    // Those that are kept for it are no overlap; those of others are.
    let found = check(&|_, _| {}, Ok("165535-200000"));
    assert_eq!(found.status, Status::Warn);
    assert!(found.found.contains("ann in /etc/subuid"), "{found:?}");
    assert_eq!(check(&|_, _| {}, Ok("165536-200000")).status, Status::Ok);

    let found = check(&|_, _| {}, Err("bulkhead.toml: is wrong"));
    assert_eq!(found.status, Status::Fail);
    assert!(
        found.found.contains("is wrong") && !found.cure.is_empty(),
        "{found:?}"
    );
}

#[test]
fn core_scheduling_matters_only_with_hyper_threading() {
    let check = spoilt(|root, probed| {
        probed.core_scheduling = Err(Errno::EINVAL);
        fs::remove_file(root.join("sys/devices/system/cpu/smt/active")).unwrap();
        put(root, "sys/devices/system/cpu/smt/active", "0");
        probed.is_root = true;
    });
    assert_eq!(check.id, "audit.user");
}

#[test]
fn empty_host_is_reported_not_trusted() {
    let root = tempfile::tempdir().unwrap();
    let (_, mut probed) = good();
    probed.kvm = Err(Errno::ENOENT);
    let checks = examine(root.path(), &probed);
    assert!(checks.iter().any(|c| c.status == Status::Fail));
    for check in checks.iter().filter(|c| c.status != Status::Ok) {
        assert!(!check.cure.is_empty(), "{check:?}");
    }
}
