//! Control groups: what a process may use of the host at most, whatever it does.
//!
//! A group for each process, with limits of memory and of tasks, below a place that the broker can
//! write: `bulkhead/` of a unified hierarchy as root, or the broker's own groups of the separate
//! hierarchies. Where there is neither, processes have their rlimits only, and `bulkhead doctor` says
//! so. A machine whose VM file limits what it takes of processors and disks gets a group around
//! those of its processes; others get none, because a group of its own also changes when the
//! scheduler lets a process run. A group is removed when its processes are gone.

mod share;

use crate::vm::spec::HostShare;
pub use share::{Device, device_of};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where groups can be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A unified hierarchy: a directory whose children have `memory` and `pids`.
    Unified(PathBuf),
    /// Separate hierarchies; at least one is there.
    Separate {
        /// Directory for groups with a memory limit.
        memory: Option<PathBuf>,
        /// Directory for groups with a task limit.
        pids: Option<PathBuf>,
        /// Groups of a machine that all its processes are put into.
        around: Vec<PathBuf>,
    },
    /// Nowhere.
    None,
}

/// The limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimits {
    /// Memory in bytes, with what the kernel holds for it.
    pub memory_bytes: u64,
    /// Tasks.
    pub tasks: u64,
}

/// The group of one process. Dropped, it is removed.
#[derive(Debug)]
pub struct Group {
    directories: Vec<PathBuf>,
}

impl Drop for Group {
    fn drop(&mut self) {
        for directory in &self.directories {
            // Busy when the process is not reaped yet; an empty group costs next to nothing.
            let _removed = fs::remove_dir(directory);
        }
    }
}

impl Place {
    /// Looks for one, as `/proc/self` tells.
    #[must_use]
    pub fn find() -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let unified = mount_of(&mounts, "cgroup2", None);
        if let Some(place) = unified.and_then(|root| unified_place(&root)) {
            return Self::Unified(place);
        }
        match (separate_place("memory"), separate_place("pids")) {
            (None, None) => Self::None,
            (memory, pids) => Self::Separate {
                memory,
                pids,
                around: Vec::new(),
            },
        }
    }

    /// A group `name` for a machine that may take `share` of the host's processors, and of the block
    /// devices `disks`; with the place for its processes. None when nothing is limited.
    ///
    /// # Errors
    /// The kernel's error, or that there is no controller for what is to be limited; groups that
    /// were made are removed.
    pub fn machine(
        &self,
        name: &str,
        share: &HostShare,
        disks: &[Device],
    ) -> io::Result<Option<(Self, Group)>> {
        let mut group = Group {
            directories: Vec::new(),
        };
        match self {
            _ if *share == HostShare::default() => Ok(None),
            Self::Unified(place) => {
                let at = place.join(name);
                let files = share::unified(share, disks);
                for controller in ["cpu", "io"] {
                    if files.iter().any(|(file, _)| file.starts_with(controller)) {
                        enable(place, &format!("+{controller}"))?;
                    }
                }
                group.create(&at, &files)?;
                enable(&at, "+memory +pids")?;
                Ok(Some((Self::Unified(at), group)))
            }
            Self::Separate { memory, pids, .. } => {
                let mut around = Vec::new();
                for (controller, files) in share::separate(share, disks) {
                    let parent = separate_place(controller).ok_or_else(|| lacking(controller))?;
                    let at = parent.join(name);
                    group.create(&at, &files)?;
                    around.push(at);
                }
                let (memory, pids) = (memory.clone(), pids.clone());
                let place = Self::Separate {
                    memory,
                    pids,
                    around,
                };
                Ok(Some((place, group)))
            }
            Self::None => Err(lacking("cpu and io")),
        }
    }

    /// Puts the process `pid` into a new group `name` with `limits`.
    ///
    /// # Errors
    /// The kernel's error; groups that were made for it are removed.
    pub fn put(&self, name: &str, pid: i32, limits: GroupLimits) -> io::Result<Group> {
        let mut group = Group {
            directories: Vec::new(),
        };
        let memory = limits.memory_bytes.to_string();
        let tasks = limits.tasks.to_string();
        match self {
            Self::Unified(place) => {
                let files = [("memory.max", memory.as_str()), ("pids.max", &tasks)];
                group.make(&place.join(name), pid, &files)?;
            }
            Self::Separate {
                memory: at,
                pids,
                around,
            } => {
                for machine in around {
                    fs::write(machine.join("cgroup.procs"), pid.to_string())?;
                }
                if let Some(place) = at {
                    let files = [("memory.limit_in_bytes", memory.as_str())];
                    group.make(&place.join(name), pid, &files)?;
                }
                if let Some(place) = pids {
                    group.make(&place.join(name), pid, &[("pids.max", tasks.as_str())])?;
                }
            }
            Self::None => {}
        }
        Ok(group)
    }
}

impl Group {
    /// A group that another broker has made, by its directories.
    #[must_use]
    pub const fn known(directories: Vec<PathBuf>) -> Self {
        Self { directories }
    }

    /// Its directories, one in each hierarchy.
    #[must_use]
    pub fn directories(&self) -> &[PathBuf] {
        &self.directories
    }

    fn make(&mut self, at: &Path, pid: i32, files: &[(&str, &str)]) -> io::Result<()> {
        self.create(at, files)?;
        fs::write(at.join("cgroup.procs"), pid.to_string())
    }

    fn create<V: AsRef<str>>(&mut self, at: &Path, files: &[(&str, V)]) -> io::Result<()> {
        fs::create_dir(at)?;
        self.directories.push(at.to_owned());
        for (file, value) in files {
            // One write a line: each is a command of its own.
            for line in value.as_ref().lines() {
                fs::write(at.join(file), line)?;
            }
        }
        Ok(())
    }
}

fn lacking(controller: &str) -> io::Error {
    let what = format!("there is no {controller} controller that this process may use");
    io::Error::new(io::ErrorKind::Unsupported, what)
}

fn enable(group: &Path, controllers: &str) -> io::Result<()> {
    fs::write(group.join("cgroup.subtree_control"), controllers)
}

/// The broker's own group in the separate hierarchy of `controller`, if it may make groups there.
fn separate_place(controller: &str) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let root = mount_of(&mounts, "cgroup", Some(controller))?;
    let place = root.join(own_group(&own, controller)?);
    writable(&place).then_some(place)
}

/// Where the file system `kind` (with `option`) is mounted.
fn mount_of(mounts: &str, kind: &str, option: Option<&str>) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (at, found, options) = (fields.next()?, fields.next()?, fields.next()?);
        let fits = option.is_none_or(|wanted| options.split(',').any(|o| o == wanted));
        (found == kind && fits).then(|| PathBuf::from(at))
    })
}

/// The broker's own group in the hierarchy of `controller`, relative to its mount.
fn own_group(groups: &str, controller: &str) -> Option<PathBuf> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let fits = controllers.split(',').any(|c| c == controller);
        fits.then(|| PathBuf::from(path.trim_start_matches('/')))
    })
}

/// `bulkhead/` below the root of a unified hierarchy that has both controllers.
fn unified_place(root: &Path) -> Option<PathBuf> {
    let has_both = |file: PathBuf| {
        let text = fs::read_to_string(file).unwrap_or_default();
        let has = |name| text.split_ascii_whitespace().any(|c| c == name);
        has("memory") && has("pids")
    };
    if !has_both(root.join("cgroup.subtree_control")) {
        return None;
    }
    let place = root.join("bulkhead");
    match fs::create_dir(&place) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return None,
        _ => {}
    }
    fs::write(place.join("cgroup.subtree_control"), "+memory +pids").ok()?;
    Some(place)
}

fn writable(place: &Path) -> bool {
    use nix::unistd::{AccessFlags, access};
    access(place, AccessFlags::W_OK).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hierarchies_are_found_in_mounts_and_own_groups() {
        let mounts = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
            cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(
            mount_of(mounts, "cgroup", Some("memory")),
            Some("/sys/fs/cgroup/memory".into())
        );
        assert_eq!(mount_of(mounts, "cgroup", Some("pids")), None);
        let own = "9:name=systemd:/\n4:memory,x:/a/b\n0::/\n";
        assert_eq!(own_group(own, "memory"), Some("a/b".into()));
        assert_eq!(own_group(own, "pids"), None);
    }

    #[test]
    fn group_limits_are_written_and_the_group_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::Unified(dir.path().to_owned());
        let limits = GroupLimits {
            memory_bytes: 5,
            tasks: 2,
        };
        let group = place.put("g", 77, limits).unwrap();
        let read = |name: &str| fs::read_to_string(dir.path().join("g").join(name)).unwrap();
        assert_eq!(read("memory.max"), "5");
        assert_eq!(read("pids.max"), "2");
        assert_eq!(read("cgroup.procs"), "77");
        assert_eq!(group.directories.len(), 1);
    }

    #[test]
    fn machine_without_limits_has_no_group_around_it() {
        let place = Place::Unified("/nowhere".into());
        let made = place.machine("m", &HostShare::default(), &[]).unwrap();
        assert!(made.is_none());
    }

    #[test]
    fn limit_that_no_controller_enforces_is_an_error() {
        let share = HostShare {
            cpu_percent: Some(50),
            ..HostShare::default()
        };
        let error = Place::None.machine("m", &share, &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }
}
