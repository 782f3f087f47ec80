//! Control groups of a test's own.

use std::fs;
use std::path::{Path, PathBuf};

/// Control groups of a test's own, one in each hierarchy. Removed with it.
#[derive(Debug)]
pub struct Groups(Vec<PathBuf>);

impl Groups {
    /// In every hierarchy that is mounted and can be written; `name` tells them from other tests'.
    ///
    /// # Panics
    /// When there is no list of mounts.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let name = format!("test-of-bulkhead-{name}-{}", std::process::id());
        let mounts = fs::read_to_string("/proc/self/mounts").expect("a list of mounts");
        let of_groups = |line: &&str| line.split(' ').nth(2).unwrap_or("").starts_with("cgroup");
        let places = mounts.lines().filter(of_groups);
        let places = places.filter_map(|line| line.split(' ').nth(1));
        // Groups of cpuset are of no use before they are given something.
        let made = places
            .filter(|place| !place.contains("cpuset"))
            .map(|place| Path::new(place).join(&name));
        Self(made.filter(|at| fs::create_dir(at).is_ok()).collect())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts a process into each of them.
    ///
    /// # Panics
    /// When the kernel refuses.
    pub fn add(&self, pid: u32) {
        for group in &self.0 {
            fs::write(group.join("cgroup.procs"), pid.to_string()).expect("a process is moved");
        }
    }

    /// Kills every process in any of them, and what is below them, as a service manager ends a
    /// unit.
    pub fn kill(&self) {
        for group in &self.0 {
            // In the unified hierarchy of kernels that have it.
            let _all_at_once = fs::write(group.join("cgroup.kill"), "1");
            let mut below = vec![group.clone()];
            while let Some(group) = below.pop() {
                let pids = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                for pid in pids.lines().filter_map(|line| line.parse().ok()) {
                    super::kill(pid);
                }
                let entries = fs::read_dir(&group).into_iter().flatten().flatten();
                below.extend(
                    entries
                        .map(|entry| entry.path())
                        .filter(|path| path.is_dir()),
                );
            }
        }
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        for group in &self.0 {
            let _busy = fs::remove_dir(group);
        }
    }
}
