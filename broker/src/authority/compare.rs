//! What was measured against what the policies grant. Every difference is an error of the product or
//! an attack, and is named.
//!
//! Descriptors are matched by what they are: the kernel does not know roles. Doorbells are all alike,
//! so their number is compared; who shares which of them with whom is compared over all processes.

use super::descriptors::{Descriptor, Object};
use super::filters::Thread;
use super::graph::Graph;
use super::landlock::Landlock;
use super::memory::Memory;
use super::status::Status;
use super::{Authority, Measured};
use crate::launch::users::UserRange;
use bulkhead_ipc::control_page::CONTROL_PAGE_BYTES;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::birth::{ADOPTION_FD, CONTROL_FD, FIRST_GRANT_FD, FdRole, PAGE_FD};
use bulkhead_policies::cache::Compiled;
use bulkhead_policies::compile::Filters;
use bulkhead_policies::evaluate::{Instruction, instructions, permitted};
use bulkhead_policies::plan::{Limits, MadeGrant, Policy};
use bulkhead_policies::schema::{Access, FdType, Held, LandlockDeny, MadeType, Namespace};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

/// The seals that shared memory has.
const SEALS: [&str; 3] = ["seal", "shrink", "grow"];
/// Name of the memory of control pages.
const PAGE_NAME: &str = "bulkhead-page";
/// Name of the memory of ports.
const PORT_NAME: &str = "bulkhead-port";

/// A difference between what a process has and what its policy grants.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Difference {
    /// Which process.
    pub process: String,
    /// `descriptors`, `memory`, `identity`, `namespaces`, `limits`, `filters` or `sharing`.
    pub aspect: &'static str,
    /// What was found, and what was expected.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.process, self.aspect, self.what)
    }
}

/// Differences of one process under collection.
struct Differences<'a> {
    process: &'a str,
    found: &'a mut Vec<Difference>,
}

impl Differences<'_> {
    fn add(&mut self, aspect: &'static str, what: impl Into<String>) {
        self.found.push(Difference {
            process: self.process.to_owned(),
            aspect,
            what: what.into(),
        });
    }

    fn unless(&mut self, holds: bool, aspect: &'static str, what: impl FnOnce() -> String) {
        if !holds {
            self.add(aspect, what());
        }
    }
}

/// Everything in which `authority` differs from `policies`; empty when it is what it should be.
#[must_use]
pub fn differences(authority: &Authority, policies: &Compiled) -> Vec<Difference> {
    let mut found = Vec::new();
    for measured in &authority.processes {
        let mut differences = Differences {
            process: &measured.name,
            found: &mut found,
        };
        let granted = measured.id.and_then(|id| policies.get(id.kind));
        match granted {
            Some((policy, filters)) => process(measured, policy, filters, &mut differences),
            None => broker(measured, &mut differences),
        }
    }
    sharing(authority, &mut found);
    found
}

fn process(measured: &Measured, policy: &Policy, filters: &Filters, out: &mut Differences<'_>) {
    let vcpus = measured.threads.iter().filter(|t| is_vcpu(t)).count();
    if let Some(all) = &measured.descriptors {
        descriptors(all, policy, vcpus, out);
    }
    if let Some(memory) = &measured.memory {
        mappings(memory, measured.program.as_ref(), policy, out);
    }
    identity(&measured.status, out);
    if let Some(users) = measured.users {
        own_user(measured, users, out);
    }
    namespaces(&measured.status, policy, out);
    limits(&measured.status, &policy.limits, out);
    if policy.limits.file_size_of_disk {
        disk_ends(measured, out);
    }
    threads(measured, filters, out);
    if let Some(measured) = measured.landlock {
        landlock(measured, &policy.landlock, out);
    }
}

/// Every policy has Landlock deny files; TCP is denied where the kernel's Landlock knows it (ABI 4).
fn landlock(measured: Landlock, denied: &[LandlockDeny], out: &mut Differences<'_>) {
    // What is tried is its root, which is no folder of its.
    let files = denied.contains(&LandlockDeny::Filesystem)
        || denied.contains(&LandlockDeny::FilesystemOutsideFolder);
    out.unless(measured.denies_files == files, "landlock", || {
        format!("denies {measured}, expected files among it: {files}")
    });
    let tcp = denied.contains(&LandlockDeny::Network);
    out.unless(
        measured.denies_tcp.is_none_or(|is| is == tcp),
        "landlock",
        || format!("denies {measured}, expected tcp among it: {tcp}"),
    );
}

fn is_vcpu(thread: &Thread) -> bool {
    !thread.is_kernel_worker && thread.name.starts_with("vcpu")
}

/// The broker is on no data path: it holds nothing of KVM and maps no window.
fn broker(measured: &Measured, out: &mut Differences<'_>) {
    for descriptor in measured.descriptors.iter().flatten() {
        let kvm = match &descriptor.of {
            Object::KvmVm | Object::KvmVcpu { .. } => true,
            Object::CharDevice { path, .. } => path == "/dev/kvm",
            _ => false,
        };
        out.unless(!kvm, "descriptors", || {
            format!("{} is KVM's, expected none", descriptor.number)
        });
    }
    let windows = measured.memory.iter().flat_map(|m| &m.mappings);
    for mapping in windows.filter(|m| m.of.starts_with("/memfd:bulkhead-window")) {
        out.add("memory", format!("maps {}, expected no window", mapping.of));
    }
}

/// What makes descriptors interchangeable here: type and, where that is known, name.
fn class_of(object: &Object) -> String {
    match object {
        Object::File { .. } => "file".to_owned(),
        Object::Folder { .. } => "folder".to_owned(),
        Object::CharDevice { path, .. } => path.clone(),
        Object::Memfd { name, .. } => format!("memory {name}"),
        Object::Eventfd { .. } => "doorbell".to_owned(),
        Object::Epoll { .. } => "epoll".to_owned(),
        Object::IoUring { .. } => "io_uring".to_owned(),
        Object::Pipe { .. } => "pipe".to_owned(),
        Object::Socket {
            kind, listening, ..
        } => {
            let how = if *listening { "listening " } else { "" };
            format!("{how}{kind} socket")
        }
        Object::KvmVm => "virtual machine of KVM".to_owned(),
        Object::KvmVcpu { .. } => "vCPU of KVM".to_owned(),
        Object::Other { name } => name.clone(),
    }
}

/// The name of shared memory by its role, as the broker gives it.
const fn memory_name(role: FdRole) -> &'static str {
    match role {
        FdRole::LegacyPage => "bulkhead-legacy-page",
        FdRole::Input => "bulkhead-input",
        FdRole::Port => PORT_NAME,
        _ => "bulkhead-window",
    }
}

/// Fewest and most descriptors of a class, and how many of them may be written.
#[derive(Debug, Clone, Copy, Default)]
struct Bounds {
    min: usize,
    max: usize,
    writable_max: usize,
}

/// What every process keeps for the next broker, besides its descriptors of fixed numbers: the far
/// ends of its control channel and of its log, its control page.
fn kept() -> BTreeMap<String, Bounds> {
    let one = |writable_max| Bounds {
        min: 1,
        max: 1,
        writable_max,
    };
    let page = format!("memory {PAGE_NAME}");
    BTreeMap::from([
        ("unix seqpacket socket".to_owned(), one(1)),
        ("pipe".to_owned(), one(0)),
        (page, one(1)),
    ])
}

/// What a locked process may hold besides its descriptors of fixed numbers, by class.
fn expected(policy: &Policy, vcpus: usize) -> BTreeMap<String, Bounds> {
    let mut classes = kept();
    for grant in &policy.fds {
        let class = match grant.is {
            FdType::File | FdType::FileOrBlock => "file".to_owned(),
            FdType::CharDevice => grant.path.clone().unwrap_or_default(),
            FdType::Memfd => format!("memory {}", memory_name(grant.role)),
            FdType::Eventfd => "doorbell".to_owned(),
            FdType::Seqpacket => "unix seqpacket socket".to_owned(),
            FdType::StreamSocket => "unix stream socket".to_owned(),
            FdType::ListeningSocket => "listening unix stream socket".to_owned(),
            FdType::Folder => "folder".to_owned(),
        };
        let (min, max) = (usize::from(grant.min), usize::from(grant.max));
        let bounds = classes.entry(class).or_default();
        match grant.held {
            Held::UntilLock => continue,
            Held::Maybe => {}
            Held::Always => bounds.min += min,
        }
        bounds.max += max;
        if grant.access != Access::Read {
            bounds.writable_max += max;
        }
    }
    let files = policy
        .made
        .iter()
        .filter(|made| made.is == MadeType::BelowFolder);
    for made in files {
        // Each may be a directory as well.
        let bounds = classes.entry("folder".to_owned()).or_default();
        bounds.max += usize::from(made.max);
    }
    for made in &policy.made {
        let bounds = classes.entry(made_class(made)).or_default();
        let times = if made.per_vcpu { vcpus } else { 1 };
        bounds.min += usize::from(made.min) * times;
        bounds.max += usize::from(made.max) * times;
        bounds.writable_max += usize::from(made.max) * times;
    }
    classes
}

fn made_class(made: &MadeGrant) -> String {
    match made.is {
        MadeType::Epoll => "epoll",
        MadeType::Eventfd => "doorbell",
        MadeType::IoUring => "io_uring",
        MadeType::KvmVm => "virtual machine of KVM",
        MadeType::KvmVcpu => "vCPU of KVM",
        MadeType::WindowCopy => "memory bulkhead-window",
        MadeType::StreamSocket => "unix stream socket",
        MadeType::BelowFolder => "file",
        MadeType::Port => "memory bulkhead-port",
        MadeType::Tap => "/dev/net/tun",
        MadeType::Pipe => "pipe",
    }
    .to_owned()
}

fn descriptors(all: &[Descriptor], policy: &Policy, vcpus: usize, out: &mut Differences<'_>) {
    let (fixed, own): (Vec<_>, Vec<_>) = all.iter().partition(|d| d.number < FIRST_GRANT_FD);
    for descriptor in &fixed {
        if let Some(expected) = wrong_fixed(descriptor) {
            let (number, found) = (descriptor.number, class_of(&descriptor.of));
            out.add(
                "descriptors",
                format!("{number} is {found}, expected {expected}"),
            );
        }
    }
    for number in 0..FIRST_GRANT_FD {
        out.unless(
            fixed.iter().any(|d| d.number == number),
            "descriptors",
            || format!("{number} is closed, expected what every process has"),
        );
    }
    let mut found: BTreeMap<String, Vec<&Descriptor>> = BTreeMap::new();
    for &descriptor in &own {
        let of = found.entry(class_of(&descriptor.of)).or_default();
        of.push(descriptor);
    }
    let expected = expected(policy, vcpus);
    for (class, held) in &found {
        let bounds = expected.get(class).copied().unwrap_or_default();
        let numbers: Vec<String> = held.iter().map(|d| d.number.to_string()).collect();
        let numbers = numbers.join(", ");
        out.unless(held.len() <= bounds.max, "descriptors", || {
            let (count, max) = (held.len(), bounds.max);
            format!("has {count} × {class} ({numbers}), expected at most {max}")
        });
        let writable = held.iter().filter(|d| d.access != "r").count();
        out.unless(writable <= bounds.writable_max, "descriptors", || {
            let max = bounds.writable_max;
            format!("may write {writable} × {class} ({numbers}), expected at most {max}")
        });
    }
    for (class, bounds) in &expected {
        let count = found.get(class).map_or(0, Vec::len);
        out.unless(count >= bounds.min, "descriptors", || {
            format!("has {count} × {class}, expected at least {}", bounds.min)
        });
    }
    for descriptor in all {
        if let Object::Memfd { seals, name, .. } = &descriptor.of {
            let sealed = SEALS.iter().all(|seal| seals.contains(seal));
            out.unless(sealed, "descriptors", || {
                let number = descriptor.number;
                format!("{number} (memory {name}) has the seals {seals:?}, expected {SEALS:?}")
            });
        }
    }
}

/// What a descriptor that every process has should have been, if it is something else.
fn wrong_fixed(descriptor: &Descriptor) -> Option<&'static str> {
    let (right, expected) = match descriptor.number {
        0 | 1 => (
            matches!(&descriptor.of, Object::CharDevice { device: (1, 3), .. }),
            "/dev/null",
        ),
        2 => (
            matches!(&descriptor.of, Object::Pipe { .. }) && descriptor.access == "w",
            "the writing end of a pipe",
        ),
        CONTROL_FD => (
            matches!(&descriptor.of, Object::Socket { kind, listening: false, .. }
                if kind == "unix seqpacket"),
            "a connected unix seqpacket socket",
        ),
        PAGE_FD => (
            matches!(&descriptor.of, Object::Memfd { name, bytes: CONTROL_PAGE_BYTES, .. }
                if name == PAGE_NAME),
            "the control page",
        ),
        ADOPTION_FD => (
            matches!(&descriptor.of, Object::Socket { kind, peer: None, .. }
                if kind == "unix datagram"),
            "an unconnected unix datagram socket",
        ),
        _ => return None,
    };
    (!right).then_some(expected)
}

fn mappings(
    memory: &Memory,
    program: Option<&(String, u64)>,
    policy: &Policy,
    out: &mut Differences<'_>,
) {
    let granted = policy.fds.iter().filter(|grant| grant.is == FdType::Memfd);
    let mut shared: BTreeSet<String> = granted
        .map(|grant| format!("/memfd:{} (deleted)", memory_name(grant.role)))
        .collect();
    shared.insert(format!("/memfd:{PAGE_NAME} (deleted)"));
    for made in &policy.made {
        match made.is {
            MadeType::IoUring => drop(shared.insert("anon_inode:[io_uring]".to_owned())),
            MadeType::KvmVcpu => drop(shared.insert("anon_inode:kvm-vcpu".to_owned())),
            MadeType::Port => drop(shared.insert(format!("/memfd:{PORT_NAME} (deleted)"))),
            _ => {}
        }
    }
    for mapping in &memory.mappings {
        let what = || {
            let of = if mapping.of.is_empty() {
                "anonymous memory"
            } else {
                &mapping.of
            };
            format!("{of}, {} KiB, {}", mapping.bytes >> 10, mapping.protection)
        };
        let of_kernel = matches!(mapping.of.as_str(), "[vdso]" | "[vsyscall]");
        let of_program = program
            .is_some_and(|(device, inode)| (&mapping.device, mapping.inode) == (device, *inode));
        out.unless(
            !(mapping.is_executable() && mapping.is_writable()),
            "memory",
            || format!("can write and execute {}", what()),
        );
        out.unless(
            !mapping.is_executable() || of_kernel || of_program,
            "memory",
            || format!("can execute {}, expected its program alone", what()),
        );
        if mapping.shared {
            // The number of a vCPU is part of its name.
            let of = match mapping.of.strip_prefix("anon_inode:kvm-vcpu:") {
                Some(_) => "anon_inode:kvm-vcpu",
                None => &mapping.of,
            };
            out.unless(shared.contains(of), "memory", || {
                format!("shares {}, expected {shared:?} alone", what())
            });
        } else {
            out.unless(mapping.inode == 0 || of_program, "memory", || {
                format!("maps the file {}, expected its program alone", what())
            });
        }
    }
}

fn identity(status: &Status, out: &mut Differences<'_>) {
    const ASPECT: &str = "identity";
    out.unless(status.uid != 0 && status.gid != 0, ASPECT, || {
        format!("is user {} and group {}", status.uid, status.gid)
    });
    out.unless(status.one_identity, ASPECT, || {
        "has saved or effective ids of somebody else".to_owned()
    });
    out.unless(
        status
            .groups
            .iter()
            .all(|group| unavoidable(*group, status)),
        ASPECT,
        || format!("is in the groups {:?}, expected none", status.groups),
    );
    out.unless(status.capabilities == 0, ASPECT, || {
        format!(
            "has the capabilities {:#x}, expected none",
            status.capabilities
        )
    });
    out.unless(!status.may_gain_privileges, ASPECT, || {
        "may gain privileges by executing programs".to_owned()
    });
}

/// A process with a user of its own is the one of its range that its pid says, and no other can be.
fn own_user(measured: &Measured, users: UserRange, out: &mut Differences<'_>) {
    let expected = u32::try_from(measured.pid)
        .ok()
        .and_then(|pid| users.user_of(pid));
    let (uid, gid) = (measured.status.uid, measured.status.gid);
    out.unless(expected == Some(uid) && uid == gid, "identity", || {
        let (first, pid) = (users.first(), measured.pid);
        format!("is user {uid} and group {gid}, expected {first} + {pid} of the range {users}")
    });
}

/// Whether a process could not leave the group: only root can take groups away.
fn unavoidable(group: u32, status: &Status) -> bool {
    let own = || nix::unistd::getgroups().unwrap_or_default();
    group == status.gid
        || (!nix::unistd::geteuid().is_root() && own().iter().any(|g| g.as_raw() == group))
}

fn namespaces(status: &Status, policy: &Policy, out: &mut Differences<'_>) {
    let name = |namespace: &Namespace| match namespace {
        Namespace::User => "user",
        Namespace::Pid => "pid",
        Namespace::Mount => "mnt",
        Namespace::Ipc => "ipc",
        Namespace::Uts => "uts",
        Namespace::Cgroup => "cgroup",
    };
    for name in policy.namespaces.iter().map(name).chain(["net"]) {
        let own = status.namespaces.get(name).is_some_and(|ns| !ns.is_readers);
        out.unless(own, "namespaces", || {
            format!("is in the {name} namespace of the host")
        });
    }
    if let Some(entries) = status.root_entries {
        out.unless(entries == 0, "namespaces", || {
            format!("its root directory has {entries} entries, expected none")
        });
    }
}

fn limits(status: &Status, limits: &Limits, out: &mut Differences<'_>) {
    let granted = [
        ("Max open files", Some(u64::from(limits.open_files))),
        ("Max locked memory", Some(limits.locked_memory_bytes)),
        ("Max stack size", Some(limits.stack_bytes)),
        ("Max core file size", Some(0)),
        ("Max msgqueue size", Some(0)),
        ("Max file size", limits.file_size_bytes),
        ("Max address space", limits.address_space_bytes),
    ];
    for (name, most) in granted {
        let Some(most) = most else { continue };
        let found = status.limits.get(name).copied().flatten();
        // A host may allow less than a policy.
        let kept = found.is_some_and(|found| found <= most);
        out.unless(kept, "limits", || {
            let found = found.map_or("unlimited".to_owned(), |n| n.to_string());
            format!("{name} is {found}, expected at most {most}")
        });
    }
}

/// A process with a disk image may write no file beyond the image's end. A block device ends by itself.
fn disk_ends(measured: &Measured, out: &mut Differences<'_>) {
    let images = measured
        .descriptors
        .iter()
        .flatten()
        .filter_map(|d| match &d.of {
            Object::File {
                path, block: false, ..
            } => Some(path),
            _ => None,
        });
    let limit = measured
        .status
        .limits
        .get("Max file size")
        .copied()
        .flatten();
    for path in images {
        out.unless(limit.is_some(), "limits", || {
            format!("Max file size is unlimited, expected the size of {path}")
        });
    }
}

fn threads(measured: &Measured, filters: &Filters, out: &mut Differences<'_>) {
    const ASPECT: &str = "filters";
    let decode = |bpf: &[u8]| instructions(bpf).unwrap_or_default();
    let startup = decode(&filters.startup.bpf);
    let locked: BTreeMap<&str, Vec<Instruction>> = filters
        .locked
        .iter()
        .map(|locked| (locked.thread.as_str(), decode(&locked.filter.bpf)))
        .collect();
    for thread in &measured.threads {
        let name = if thread.tid == measured.pid {
            "main"
        } else {
            &thread.name
        };
        out.unless(thread.filters >= 2, ASPECT, || {
            let count = thread.filters;
            format!("thread {name} has {count} filters, expected those of start-up and lock")
        });
        let Some(programs) = &thread.programs else {
            continue;
        };
        let fits = |lock: &Vec<Instruction>| {
            matches!(&programs[..], [oldest, newest]
            if newest == lock && *oldest == startup)
        };
        if thread.is_kernel_worker {
            out.unless(locked.values().any(fits), ASPECT, || {
                format!("task {name} of the kernel has filters that are no thread's")
            });
            continue;
        }
        let Some(lock) = locked.get(name) else {
            out.add(
                ASPECT,
                format!("there is a thread {name}, which the policy does not know"),
            );
            continue;
        };
        out.unless(fits(lock), ASPECT, || {
            let granted = permitted(&[lock.clone(), startup.clone()]).unwrap_or_default();
            let has = thread.permitted.clone().unwrap_or_default();
            let names = |set: Vec<_>| {
                let names: Vec<String> = set.iter().map(ToString::to_string).collect();
                if names.is_empty() { "nothing".to_owned() } else { names.join(", ") }
            };
            format!(
                "thread {name} has other filters than its policy: it permits {} beyond it, and {} of it is missing",
                names(has.difference(&granted).collect()),
                names(granted.difference(&has).collect()),
            )
        });
    }
    for name in locked.keys().filter(|name| !name.starts_with("vcpu")) {
        let there = measured.threads.iter().any(|thread| {
            let main = thread.tid == measured.pid;
            (*name == "main" && main) || (!main && thread.name == **name)
        });
        out.unless(there, ASPECT, || format!("there is no thread {name}"));
    }
}

/// Who shares what with whom, over all processes.
fn sharing(authority: &Authority, found: &mut Vec<Difference>) {
    let graph = Graph::of(authority);
    let kind = |name: &str| {
        let process = authority.processes.iter().find(|p| p.name == name);
        process.and_then(|p| p.id).map(|id| id.kind)
    };
    let mut add = |process: &str, what: String| {
        found.push(Difference {
            process: process.to_owned(),
            aspect: "sharing",
            what,
        });
    };
    for thing in &graph.things {
        let sandboxed: Vec<&str> = thing
            .reached_by
            .iter()
            .map(|reach| reach.process.as_str())
            .filter(|name| kind(name).is_some())
            .collect();
        let with_vcpu = sandboxed.iter().any(|n| kind(n) == Some(ProcKind::Vcpu));
        let only_read = thing.reached_by.iter().all(|reach| reach.access == "r");
        let [first, second, ..] = sandboxed[..] else {
            continue;
        };
        // Shared by two: the gate's side and the device's, or a card's and the switch's.
        let card_and_switch = [ProcKind::Net, ProcKind::Switch]
            .iter()
            .all(|end| sandboxed.iter().any(|n| kind(n) == Some(*end)));
        let between_two =
            sandboxed.len() == 2 && (with_vcpu || card_and_switch) && thing.is_channel();
        if !(between_two || thing.is_common || (only_read && thing.is_file())) {
            let others = sandboxed.get(1..).unwrap_or_default().join(", ");
            add(first, format!("shares {} with {others}", thing.label));
        }
        if thing.is_window() && !with_vcpu {
            add(second, format!("shares {} past the gate", thing.label));
        }
    }
    let mut users: BTreeMap<u32, &str> = BTreeMap::new();
    for process in authority.processes.iter().filter(|p| p.id.is_some()) {
        if process.users.is_some()
            && let Some(other) = users.insert(process.status.uid, &process.name)
        {
            add(
                &process.name,
                format!("is user {}, and so is {other}", process.status.uid),
            );
        }
    }
}
