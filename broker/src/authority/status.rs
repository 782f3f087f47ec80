//! Who a process is and what surrounds it: credentials, namespaces, root, limits.

use serde::Serialize;
use std::collections::BTreeMap;
use std::fs;
use std::io;

/// The namespaces that are looked at.
pub const NAMESPACES: [&str; 7] = ["user", "pid", "mnt", "net", "ipc", "uts", "cgroup"];

/// What `/proc/PID/status`, `ns/`, `root/` and `limits` say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Status {
    /// Real user id as the reader's namespace sees it.
    pub uid: u32,
    /// Real group id.
    pub gid: u32,
    /// Whether effective, saved and file system ids are the same.
    pub one_identity: bool,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// All capability sets together.
    pub capabilities: u64,
    /// Whether executing a program can gain rights: `false` under no-new-privileges.
    pub may_gain_privileges: bool,
    /// Namespaces by name: the inode, and whether it is the reader's own.
    pub namespaces: BTreeMap<&'static str, NamespaceOf>,
    /// Entries of its root directory; `None` where it is not measurable.
    pub root_entries: Option<usize>,
    /// Hard limits by the kernel's names in `/proc/PID/limits`; `None` is unlimited.
    pub limits: BTreeMap<String, Option<u64>>,
}

/// A namespace of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NamespaceOf {
    /// Its inode, which is its identity.
    pub inode: u64,
    /// Whether the reader is in it.
    pub is_readers: bool,
}

/// Reads it all for `pid`.
pub(super) fn measure(pid: i32) -> io::Result<Status> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let mut namespaces = BTreeMap::new();
    for name in NAMESPACES {
        let inode = namespace(&format!("/proc/{pid}/ns/{name}"))?;
        let own = namespace(&format!("/proc/self/ns/{name}"))?;
        let is_readers = inode == own;
        namespaces.insert(name, NamespaceOf { inode, is_readers });
    }
    let parsed = Parsed::of(&status).ok_or_else(|| io::Error::other("status is incomplete"))?;
    Ok(Status {
        uid: parsed.uid,
        gid: parsed.gid,
        one_identity: parsed.one_identity,
        groups: parsed.groups,
        capabilities: parsed.capabilities,
        may_gain_privileges: parsed.may_gain_privileges,
        namespaces,
        root_entries: fs::read_dir(format!("/proc/{pid}/root/"))
            .ok()
            .map(Iterator::count),
        limits: limits.lines().skip(1).filter_map(limit).collect(),
    })
}

/// The number in `user:[4026531837]`.
fn namespace(path: &str) -> io::Result<u64> {
    let link = fs::read_link(path)?;
    let text = link.to_string_lossy();
    let inode = text.split_once('[').and_then(|(_, rest)| {
        let (inode, _) = rest.split_once(']')?;
        inode.parse().ok()
    });
    inode.ok_or_else(|| io::Error::other(format!("{path} is no namespace")))
}

/// The name and the hard limit of a line of `/proc/PID/limits`, whose columns are 26, 21, 21 and 10
/// bytes wide.
fn limit(line: &str) -> Option<(String, Option<u64>)> {
    let name = line.get(..26)?.trim().to_owned();
    let hard = line.get(47..)?.split_ascii_whitespace().next()?;
    Some((name, hard.parse().ok()))
}

struct Parsed {
    uid: u32,
    gid: u32,
    one_identity: bool,
    groups: Vec<u32>,
    capabilities: u64,
    may_gain_privileges: bool,
}

impl Parsed {
    fn of(status: &str) -> Option<Self> {
        let numbers = |name: &str| -> Option<Vec<u32>> {
            let fields = field(status, name)?.split_ascii_whitespace();
            fields.map(|id| id.parse().ok()).collect()
        };
        let (uids, gids) = (numbers("Uid")?, numbers("Gid")?);
        let (&uid, &gid) = (uids.first()?, gids.first()?);
        let mut capabilities = 0;
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            capabilities |= u64::from_str_radix(field(status, set)?, 16).ok()?;
        }
        Some(Self {
            uid,
            gid,
            one_identity: uids.iter().all(|&id| id == uid) && gids.iter().all(|&id| id == gid),
            groups: numbers("Groups")?,
            capabilities,
            may_gain_privileges: field(status, "NoNewPrivs")? != "1",
        })
    }
}

/// The value of a field of `/proc/PID/status`.
pub(crate) fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut lines = status.lines();
    lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_status_is_read() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let status = measure(pid).unwrap();
        assert_eq!(status.uid, nix::unistd::getuid().as_raw());
        assert!(status.namespaces.values().all(|ns| ns.is_readers));
        assert!(status.root_entries > Some(0));
        let files = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
        assert_eq!(status.limits["Max open files"], Some(files.unwrap().1));
    }

    #[test]
    fn every_capability_set_counts() {
        let status = "Uid:\t1 1 1 1\nGid:\t1 1 1 2\nGroups:\t\nCapInh:\t0\nCapPrm:\t0\nCapEff:\t0\n\
            CapBnd:\t8\nCapAmb:\t0\nNoNewPrivs:\t1\n";
        let parsed = Parsed::of(status).unwrap();
        assert_eq!((parsed.capabilities, parsed.one_identity), (8, false));
        assert!(Parsed::of("Uid:\t1\n").is_none());
    }
}
