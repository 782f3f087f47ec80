//! Control groups: what a process may use of the host at most, whatever it does, and whom it lives
//! and dies with.
//!
//! A group for each process, with limits of memory and of tasks, in a directory `bulkhead` that the
//! broker can write. Where that is depends on [`Reach`]: below the broker's own groups, or outside of
//! them, so that what ends the broker's groups as a whole (a service manager, say) does not reach
//! its machines. Where there is no such place, processes have their rlimits only, and `bulkhead
//! doctor` says so. A machine whose VM file limits what it takes of processors and disks gets a group
//! around those of its processes, and a process whose policy does gets a group for that; others get
//! none, because a group of its own also changes when the scheduler lets a process run. A group is removed when
//! its processes are gone.

mod share;

use super::Launched;
use crate::vm::spec::HostShare;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
pub use share::{Device, device_of};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// The directory that all groups are in.
const DIRECTORY: &str = "bulkhead";

/// Where the groups of processes are, in relation to the broker's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// Below the broker's groups: what it may use, they may use together.
    Within,
    /// Outside of the broker's groups, in every hierarchy where the broker is not at the root.
    Outside,
}

/// What is done in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Role {
    /// A group for each process, with these limits.
    Limits {
        /// File of the memory limit.
        memory: Option<&'static str>,
        /// File of the task limit.
        tasks: Option<&'static str>,
    },
    /// One group for all, which only is not the broker's.
    Membership,
}

/// One hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tree {
    place: PathBuf,
    role: Role,
    /// The group around `place` that this program has made, which has to hand controllers on to it.
    above: Option<PathBuf>,
}

/// Where groups can be made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Place {
    trees: Vec<Tree>,
    /// Groups of a machine that all its processes are put into.
    around: Vec<PathBuf>,
    /// Groups of separate hierarchies that a machine's or a process's can be made in, by controller.
    parents: Vec<(String, PathBuf)>,
}

/// The limits of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimits {
    /// Memory in bytes, with what the kernel holds for it.
    pub memory_bytes: u64,
    /// Tasks.
    pub tasks: u64,
    /// Processors and disks.
    pub share: HostShare,
}

/// The groups of one process. Dropped, they are removed.
#[derive(Debug)]
pub struct Group {
    directories: Vec<PathBuf>,
}

impl Drop for Group {
    fn drop(&mut self) {
        for directory in &self.directories {
            // Busy when the process is not reaped yet; an empty group costs next to nothing, and
            // goes with the next sweep.
            let _removed = fs::remove_dir(directory);
        }
    }
}

/// A mounted hierarchy, and the broker's own group in it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    /// Relative to the root.
    own: PathBuf,
    /// Controllers of a separate hierarchy; `None` of the unified one.
    controllers: Option<Vec<String>>,
}

impl Place {
    /// Looks for one, as `/proc/self` tells.
    #[must_use]
    pub fn find(reach: Reach) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::among(&hierarchies(&mounts, &own), reach)
    }

    fn among(hierarchies: &[Hierarchy], reach: Reach) -> Self {
        let mut trees: Vec<_> = hierarchies.iter().filter_map(|h| h.tree(reach)).collect();
        // The unified hierarchy has both controllers, so no other one has them.
        if trees.iter().any(Tree::is_unified) {
            trees.retain(|tree| tree.is_unified() || tree.role == Role::Membership);
        }
        let parents = hierarchies.iter().flat_map(|h| {
            let parent = h.parent(reach);
            let names = h.controllers.iter().flatten();
            names.filter_map(move |name| Some((name.clone(), parent.clone()?)))
        });
        Self {
            trees,
            around: Vec::new(),
            parents: parents.collect(),
        }
    }

    /// Checks that there is a controller for everything that `share` limits. Changes nothing.
    ///
    /// # Errors
    /// The one that there is not.
    pub fn check(&self, share: &HostShare) -> io::Result<()> {
        if let Some(tree) = self.trees.iter().find(|tree| tree.is_unified()) {
            let there = fs::read_to_string(tree.place.join("cgroup.controllers"));
            let there = there.unwrap_or_default();
            let has = |name: &str| there.split_ascii_whitespace().any(|c| c == name);
            let mut needed = share::controllers(share);
            return needed.find(|c| !has(c)).map_or(Ok(()), |c| Err(lacking(c)));
        }
        for (controller, _) in share::separate(share, &[]) {
            self.parent(controller)?;
        }
        Ok(())
    }

    /// The group of a separate hierarchy that groups for `controller` are made in.
    fn parent(&self, controller: &str) -> io::Result<&Path> {
        let found = self.parents.iter().find(|(known, _)| known == controller);
        let (_, parent) = found.ok_or_else(|| lacking(controller))?;
        Ok(parent)
    }

    /// A group for the machine `name` that may take `share` of the host's processors, and of the
    /// block devices `disks`; with the place for its processes. None when nothing is limited.
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
        if *share == HostShare::default() {
            return Ok(None);
        }
        let mut group = Group {
            directories: Vec::new(),
        };
        let mut place = self.clone();
        if let Some(tree) = place.trees.iter_mut().find(|tree| tree.is_unified()) {
            let files = share::unified(share, disks);
            tree.hand_on(share)?;
            let at = tree.place.join(name);
            group.create(&at, &files)?;
            enable(&at, "+memory +pids")?;
            tree.above = Some(std::mem::replace(&mut tree.place, at));
            return Ok(Some((place, group)));
        }
        for (controller, files) in share::separate(share, disks) {
            let at = self.parent(controller)?.join(group_directory(name));
            group.create(&at, &files)?;
            let own = place
                .parents
                .iter_mut()
                .filter(|(known, _)| known == controller);
            own.for_each(|(_, parent)| parent.clone_from(&at));
            place.around.push(at);
        }
        Ok(Some((place, group)))
    }

    /// Puts a process into a new group `name` with `limits`, those of disks being for each of `disks`. One that
    /// is dead needs none.
    ///
    /// # Errors
    /// The kernel's error, or that there is no controller for what is to be limited; groups that were made
    /// for it are removed.
    pub fn put(
        &self,
        name: &str,
        process: &Launched,
        limits: GroupLimits,
        disks: &[Device],
    ) -> io::Result<Group> {
        // A pid is another process's only after its own was reaped, which this broker does itself,
        // and not meanwhile: who is alive now is who is moved.
        if is_dead(process)? {
            let directories = Vec::new();
            return Ok(Group { directories });
        }
        self.put_pid(name, process.pid, limits, disks)
    }

    /// As [`Place::put`], of a process that the caller has not reaped.
    ///
    /// # Errors
    /// As [`Place::put`].
    pub(crate) fn put_pid(
        &self,
        name: &str,
        pid: i32,
        limits: GroupLimits,
        disks: &[Device],
    ) -> io::Result<Group> {
        let mut group = Group {
            directories: Vec::new(),
        };
        let join = |at: &Path| fs::write(at.join("cgroup.procs"), pid.to_string());
        // The broker's groups are left first, since a machine's may be in the same hierarchy.
        for tree in self.trees.iter().filter(|t| t.role == Role::Membership) {
            join(&tree.place)?;
        }
        for machine in &self.around {
            join(machine)?;
        }
        for tree in &self.trees {
            let Role::Limits { memory, tasks } = tree.role else {
                continue;
            };
            let at = tree.place.join(name);
            let numbers = [(memory, limits.memory_bytes), (tasks, limits.tasks)];
            let files = numbers.map(|(file, value)| Some((file?, value.to_string())));
            let mut files: Vec<_> = files.into_iter().flatten().collect();
            if tree.is_unified() {
                tree.hand_on(&limits.share)?;
                files.extend(share::unified(&limits.share, disks));
            }
            group.create(&at, &files)?;
            join(&at)?;
        }
        if !self.trees.iter().any(Tree::is_unified) {
            for (controller, files) in share::separate(&limits.share, disks) {
                let at = self.parent(controller)?.join(group_directory(name));
                group.create(&at, &files)?;
                join(&at)?;
            }
        }
        Ok(group)
    }

    /// Removes every group whose process is gone.
    pub fn sweep(&self) {
        for tree in self.trees.iter().filter(|t| t.role != Role::Membership) {
            remove_empty(&tree.place, |_| true);
        }
        for (_, parent) in &self.parents {
            remove_empty(parent, |name| name.starts_with(&group_directory("")));
        }
    }
}

impl Tree {
    fn is_unified(&self) -> bool {
        let memory = Some("memory.max");
        matches!(self.role, Role::Limits { memory: found, .. } if found == memory)
    }

    /// Has the controllers that `share` needs handed on to the groups in this place.
    fn hand_on(&self, share: &HostShare) -> io::Result<()> {
        for controller in share::controllers(share) {
            for group in self.above.iter().chain([&self.place]) {
                enable(group, &format!("+{controller}"))?;
            }
        }
        Ok(())
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

    fn create<V: AsRef<str>>(&mut self, at: &Path, files: &[(&str, V)]) -> io::Result<()> {
        match fs::create_dir(at) {
            // A broker has made it that was killed before it could note that: nobody else gives a
            // group this name.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            made => made?,
        }
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

/// The directory of a group in a separate hierarchy, beside those of others.
fn group_directory(name: &str) -> String {
    format!("{DIRECTORY}-{name}")
}

/// Removes the groups in `place` whose name `fits` and that are empty, with the groups in them. Those with a process
/// are busy, and everything else is no directory.
fn remove_empty(place: &Path, fits: impl Fn(&str) -> bool) {
    let groups = |place: &Path| fs::read_dir(place).into_iter().flatten().flatten();
    let named = groups(place).filter(|entry| entry.file_name().to_str().is_some_and(&fits));
    for group in named.map(|entry| entry.path()) {
        for inner in groups(&group) {
            let _removed = fs::remove_dir(inner.path());
        }
        let _removed = fs::remove_dir(group);
    }
}

fn lacking(controller: &str) -> io::Error {
    let what = format!("there is no {controller} controller that this process may use");
    io::Error::new(io::ErrorKind::Unsupported, what)
}

fn enable(group: &Path, controllers: &str) -> io::Result<()> {
    fs::write(group.join("cgroup.subtree_control"), controllers)
}

fn is_dead(process: &Launched) -> io::Result<bool> {
    let mut fds = [PollFd::new(process.pidfd.as_fd(), PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
}

impl Hierarchy {
    fn tree(&self, reach: Reach) -> Option<Tree> {
        let limits = match &self.controllers {
            None => None,
            Some(names) => {
                let has = |name: &str| names.iter().any(|n| n == name);
                let memory = has("memory").then_some("memory.limit_in_bytes");
                let tasks = has("pids").then_some("pids.max");
                let any = memory.is_some() || tasks.is_some();
                any.then_some(Role::Limits { memory, tasks })
            }
        };
        let at_root = self.own.as_os_str().is_empty();
        let outside = reach == Reach::Outside && !at_root;
        let place = match (&self.controllers, &limits) {
            (None, _) => return self.unified(outside),
            (Some(_), None) if !outside => return None,
            (Some(_), _) if outside => self.outside(make_separate).or_else(|| {
                // Better limits that end with the broker than none.
                limits
                    .as_ref()
                    .and_then(|_| make_separate(&self.root.join(&self.own)))
            }),
            (Some(_), _) => make_separate(&self.root.join(&self.own)),
        };
        let role = limits.unwrap_or(Role::Membership);
        let above = None;
        place.map(|place| Tree { place, role, above })
    }

    /// The group of a separate hierarchy that machines' groups can be made in.
    fn parent(&self, reach: Reach) -> Option<PathBuf> {
        use nix::unistd::{AccessFlags, access};
        let can = |group: &Path| access(group, AccessFlags::W_OK).is_ok();
        let own = self.root.join(&self.own);
        match reach {
            Reach::Within => can(&own).then_some(own),
            Reach::Outside => self.outside(|group| can(group).then(|| group.to_owned())),
        }
    }

    /// Limits where both controllers are to be had, else membership if that is of use.
    fn unified(&self, outside: bool) -> Option<Tree> {
        let both = Role::Limits {
            memory: Some("memory.max"),
            tasks: Some("pids.max"),
        };
        // No process may be in a group whose children have limits, so even those that are to stay
        // within the broker's reach are beside its group.
        if let Some(place) = self.outside(make_unified) {
            return Some(Tree {
                place,
                role: both,
                above: None,
            });
        }
        let place = outside.then(|| self.outside(make_plain)).flatten()?;
        let role = Role::Membership;
        let above = None;
        Some(Tree { place, role, above })
    }

    /// The directory in the outermost group, but the broker's own, where `make` can make it.
    fn outside(&self, make: impl Fn(&Path) -> Option<PathBuf>) -> Option<PathBuf> {
        let mut groups: Vec<_> = self.own.ancestors().skip(1).collect();
        if groups.is_empty() {
            groups.push(Path::new(""));
        }
        groups.reverse();
        groups
            .into_iter()
            .find_map(|group| make(&self.root.join(group)))
    }
}

fn make_plain(group: &Path) -> Option<PathBuf> {
    use nix::unistd::{AccessFlags, access};
    let place = group.join(DIRECTORY);
    match fs::create_dir(&place) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return None,
        _ => {}
    }
    access(&place.join("cgroup.procs"), AccessFlags::W_OK).ok()?;
    Some(place)
}

/// In a separate hierarchy. Groups of cpuset have nothing until they are given something.
fn make_separate(group: &Path) -> Option<PathBuf> {
    let place = make_plain(group)?;
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (group.join(file), place.join(file));
        if let (Ok(all), Ok(now)) = (fs::read_to_string(from), fs::read_to_string(&to))
            && now.trim().is_empty()
        {
            fs::write(to, all.trim()).ok()?;
        }
    }
    Some(place)
}

/// In the unified hierarchy, where the group hands both controllers on.
fn make_unified(group: &Path) -> Option<PathBuf> {
    let handed = fs::read_to_string(group.join("cgroup.subtree_control")).unwrap_or_default();
    let has = |name| handed.split_ascii_whitespace().any(|c| c == name);
    if !(has("memory") && has("pids")) {
        return None;
    }
    let place = make_plain(group)?;
    enable(&place, "+memory +pids").ok()?;
    Some(place)
}

/// Every mounted hierarchy in which the broker's own group is known.
fn hierarchies(mounts: &str, own: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(1);
        let (Some(root), Some(kind), Some(options)) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let options: Vec<_> = options.split(',').collect();
        let (own, controllers) = match kind {
            "cgroup2" => (own_group(own, |names| names.is_empty()), None),
            "cgroup" => {
                let is_this = |names: &str| names.split(',').all(|n| options.contains(&n));
                let own = own_group(own, |names| !names.is_empty() && is_this(names));
                let names = options.iter().map(|&name| name.to_owned());
                (own, Some(names.collect()))
            }
            _ => continue,
        };
        found.extend(own.map(|own| Hierarchy {
            root: root.into(),
            own,
            controllers,
        }));
    }
    found
}

/// The broker's own group, relative to its mount, in the hierarchy whose controllers `fit`.
fn own_group(groups: &str, fit: impl Fn(&str) -> bool) -> Option<PathBuf> {
    groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        fit(controllers).then(|| PathBuf::from(path.trim_start_matches('/')))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
        cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
        cgroup /sys/fs/cgroup/systemd cgroup rw,xattr,name=systemd 0 0\n\
        cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";

    #[test]
    fn hierarchies_are_found_in_mounts_and_own_groups() {
        let own = "9:name=systemd:/x\n4:memory:/a/b\n3:cpu:/\n0::/\n";
        let found = hierarchies(MOUNTS, own);
        let roots: Vec<_> = found
            .iter()
            .map(|h| (h.root.to_str().unwrap(), h.own.to_str().unwrap()))
            .collect();
        assert_eq!(
            roots,
            [
                ("/sys/fs/cgroup/memory", "a/b"),
                ("/sys/fs/cgroup/systemd", "x"),
                ("/sys/fs/cgroup/unified", ""),
            ]
        );
        assert_eq!(found[2].controllers, None);
    }

    /// A directory that looks like a mounted hierarchy with the group `service/own`.
    fn tree(dir: &Path, name: &str, controllers: Option<&str>, own: &str) -> Hierarchy {
        let root = dir.join(name);
        for group in [
            "",
            "bulkhead",
            "service",
            "service/bulkhead",
            "service/own",
            "service/own/bulkhead",
        ] {
            fs::create_dir_all(root.join(group)).unwrap();
            fs::write(root.join(group).join("cgroup.procs"), "").unwrap();
            let handed = if controllers.is_none() {
                "memory pids"
            } else {
                ""
            };
            fs::write(root.join(group).join("cgroup.subtree_control"), handed).unwrap();
        }
        Hierarchy {
            root,
            own: own.into(),
            controllers: controllers.map(|c| c.split(',').map(str::to_owned).collect()),
        }
    }

    fn places(place: &Place, dir: &Path) -> Vec<String> {
        let trees = place.trees.iter();
        let shown = trees.map(|t| {
            t.place
                .strip_prefix(dir)
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        });
        shown.collect()
    }

    #[test]
    fn groups_outside_are_in_nobody_s_group_and_those_within_in_the_brokers() {
        let dir = tempfile::tempdir().unwrap();
        let all = [
            tree(dir.path(), "memory", Some("memory"), "service/own"),
            tree(dir.path(), "pids", Some("pids"), ""),
            tree(dir.path(), "systemd", Some("name=systemd"), "service/own"),
            tree(dir.path(), "freezer", Some("freezer"), ""),
        ];
        let within = Place::among(&all, Reach::Within);
        assert_eq!(
            places(&within, dir.path()),
            ["memory/service/own/bulkhead", "pids/bulkhead"]
        );
        let outside = Place::among(&all, Reach::Outside);
        let expected = ["memory/bulkhead", "pids/bulkhead", "systemd/bulkhead"];
        assert_eq!(places(&outside, dir.path()), expected);
        assert_eq!(outside.trees[2].role, Role::Membership);
    }

    #[test]
    fn unified_hierarchy_with_controllers_is_the_only_one_with_limits() {
        let dir = tempfile::tempdir().unwrap();
        let all = [
            tree(dir.path(), "pids", Some("pids"), "service/own"),
            tree(dir.path(), "unified", None, "service/own"),
        ];
        let place = Place::among(&all, Reach::Outside);
        assert_eq!(places(&place, dir.path()), ["unified/bulkhead"]);
        // Without controllers it still is where a service manager counts its processes.
        fs::write(dir.path().join("unified/cgroup.subtree_control"), "cpu").unwrap();
        fs::write(
            dir.path().join("unified/service/cgroup.subtree_control"),
            "",
        )
        .unwrap();
        let place = Place::among(&all, Reach::Outside);
        assert_eq!(
            places(&place, dir.path()),
            ["pids/bulkhead", "unified/bulkhead"]
        );
        let place = Place::among(&all, Reach::Within);
        assert_eq!(places(&place, dir.path()), ["pids/service/own/bulkhead"]);
    }

    #[test]
    fn group_limits_are_written_and_empty_groups_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = tree(dir.path(), "unified", None, "service/own");
        let place = Place::among(&[hierarchy], Reach::Outside);
        let limits = GroupLimits {
            memory_bytes: 5,
            tasks: 2,
            share: HostShare::default(),
        };
        let group = place.put_pid("g", 77, limits, &[]).unwrap();
        let at = dir.path().join("unified/bulkhead/g");
        let read = |name: &str| fs::read_to_string(at.join(name)).unwrap();
        assert_eq!(read("memory.max"), "5");
        assert_eq!(read("pids.max"), "2");
        assert_eq!(read("cgroup.procs"), "77");
        assert!(!at.join("cpu.max").exists() && !at.join("io.max").exists());
        assert_eq!(group.directories, std::slice::from_ref(&at));
        let empty = dir.path().join("unified/bulkhead/empty");
        fs::create_dir(&empty).unwrap();
        place.sweep();
        assert!(!empty.exists());
    }

    /// As a policy that limits everything.
    const SHARED: GroupLimits = GroupLimits {
        memory_bytes: 5,
        tasks: 2,
        share: HostShare {
            cpu_weight: None,
            cpu_percent: Some(20),
            disk_read_per_s: None,
            disk_write_per_s: Some(4096),
            disk_read_iops: None,
            disk_write_iops: None,
        },
    };

    fn read(at: &Path, file: &str) -> String {
        fs::read_to_string(at.join(file)).unwrap()
    }

    /// What is limited of a machine beside.
    fn machine_share() -> HostShare {
        HostShare {
            cpu_percent: Some(40),
            ..HostShare::default()
        }
    }

    #[test]
    fn process_that_its_policy_limits_has_groups_in_separate_hierarchies() {
        let dir = tempfile::tempdir().unwrap();
        let all =
            ["memory", "pids", "cpu", "blkio"].map(|name| tree(dir.path(), name, Some(name), ""));
        let place = Place::among(&all, Reach::Within);
        place.check(&SHARED.share).unwrap();
        let group = place.put_pid("g", 77, SHARED, &[(8, 0)]).unwrap();
        let (cpu, blkio) = (
            dir.path().join("cpu/bulkhead-g"),
            dir.path().join("blkio/bulkhead-g"),
        );
        assert_eq!(read(&cpu, "cpu.cfs_period_us"), "100000");
        assert_eq!(read(&cpu, "cpu.cfs_quota_us"), "20000");
        assert_eq!(read(&cpu, "cgroup.procs"), "77");
        assert_eq!(read(&blkio, "blkio.throttle.write_bps_device"), "8:0 4096");
        assert_eq!(read(&blkio, "cgroup.procs"), "77");
        let expected = [
            "memory/bulkhead/g",
            "pids/bulkhead/g",
            "cpu/bulkhead-g",
            "blkio/bulkhead-g",
        ];
        assert_eq!(group.directories, expected.map(|at| dir.path().join(at)));
        // One that is not limited stays in the CPU group that it was born in.
        let free = GroupLimits {
            share: HostShare::default(),
            ..SHARED
        };
        let group = place.put_pid("f", 78, free, &[(8, 0)]).unwrap();
        assert_eq!(group.directories.len(), 2);
        assert!(!dir.path().join("cpu/bulkhead-f").exists());
    }

    #[test]
    fn process_group_is_within_its_machines() {
        let dir = tempfile::tempdir().unwrap();
        let all = ["memory", "cpu", "blkio"].map(|name| tree(dir.path(), name, Some(name), ""));
        let place = Place::among(&all, Reach::Within);
        let (within, machine) = place.machine("m", &machine_share(), &[]).unwrap().unwrap();
        let around = dir.path().join("cpu/bulkhead-m");
        assert_eq!(machine.directories, std::slice::from_ref(&around));
        let group = within.put_pid("g", 77, SHARED, &[]).unwrap();
        let own = around.join("bulkhead-g");
        assert_eq!(read(&own, "cpu.cfs_quota_us"), "20000");
        // The machine has no group for disks, so the process's is beside.
        let expected = [
            dir.path().join("memory/bulkhead/g"),
            own,
            dir.path().join("blkio/bulkhead-g"),
        ];
        assert_eq!(group.directories, expected);
    }

    #[test]
    fn unified_hierarchy_hands_controllers_on_to_processes_that_are_limited() {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = tree(dir.path(), "unified", None, "service/own");
        let place = Place::among(&[hierarchy], Reach::Outside);
        let bulkhead = dir.path().join("unified/bulkhead");
        fs::write(bulkhead.join("cgroup.controllers"), "cpu io memory pids\n").unwrap();
        place.check(&SHARED.share).unwrap();
        let group = place.put_pid("g", 77, SHARED, &[(8, 0)]).unwrap();
        let at = bulkhead.join("g");
        assert_eq!(read(&at, "cpu.max"), "20000 100000");
        assert_eq!(read(&at, "io.max"), "8:0 wbps=4096");
        assert_eq!(read(&at, "memory.max"), "5");
        assert_eq!(group.directories, [at]);
        // A file stands for the kernel's, of which each write is a command: the last one is seen.
        assert_eq!(read(&bulkhead, "cgroup.subtree_control"), "+io");

        let (within, _machine) = place.machine("m", &machine_share(), &[]).unwrap().unwrap();
        assert_eq!(read(&bulkhead, "cgroup.subtree_control"), "+cpu");
        assert_eq!(
            read(&bulkhead.join("m"), "cgroup.subtree_control"),
            "+memory +pids"
        );
        let group = within.put_pid("g", 78, SHARED, &[]).unwrap();
        assert_eq!(read(&bulkhead, "cgroup.subtree_control"), "+io");
        assert_eq!(read(&bulkhead.join("m"), "cgroup.subtree_control"), "+io");
        assert_eq!(group.directories, [bulkhead.join("m/g")]);
    }

    #[test]
    fn host_without_a_controller_is_found_before_anything_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let lacking = |place: &Place, share| place.check(share).unwrap_err().to_string();
        let cpu = HostShare {
            cpu_percent: Some(20),
            ..HostShare::default()
        };
        let separate = ["memory", "cpu"].map(|name| tree(dir.path(), name, Some(name), ""));
        let place = Place::among(&separate, Reach::Within);
        place.check(&cpu).unwrap();
        assert!(lacking(&place, &SHARED.share).contains("no blkio controller"));
        let none = Place::among(&separate[..1], Reach::Within);
        assert!(lacking(&none, &cpu).contains("no cpu controller"));
        none.check(&HostShare::default()).unwrap();
        let error = none.put_pid("g", 77, SHARED, &[]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);

        let unified = Place::among(&[tree(dir.path(), "unified", None, "")], Reach::Within);
        let controllers = dir.path().join("unified/bulkhead/cgroup.controllers");
        fs::write(controllers, "cpuset cpu memory pids\n").unwrap();
        unified.check(&cpu).unwrap();
        assert!(lacking(&unified, &SHARED.share).contains("no io controller"));
    }

    #[test]
    fn groups_that_nobody_has_on_record_are_swept_with_those_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let place = Place::among(&[tree(dir.path(), "cpu", Some("cpu"), "")], Reach::Within);
        let cpu = dir.path().join("cpu");
        fs::create_dir_all(cpu.join("bulkhead-m/bulkhead-g")).unwrap();
        fs::create_dir(cpu.join("bulkheads")).unwrap();
        fs::create_dir_all(cpu.join("bulkhead-busy/bulkhead-g")).unwrap();
        fs::write(cpu.join("bulkhead-busy/bulkhead-g/cgroup.procs"), "77").unwrap();
        place.sweep();
        assert!(!cpu.join("bulkhead-m").exists());
        // That of somebody else, and one that holds a process.
        assert!(cpu.join("bulkheads").exists() && cpu.join("service").exists());
        assert!(cpu.join("bulkhead-busy/bulkhead-g").exists());
    }
}
