//! Faults on whole processes and machines: they are killed, stand still, get little of a CPU, or no
//! more memory than they have.

use super::Engine;
use crate::random::Planned;
use crate::scenario::{Action, Fault};
use crate::who::Known;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a slowed process runs and stands still in turn.
const DUTY: Duration = Duration::from_millis(5);
/// Period of a CPU quota in microseconds.
const PERIOD_US: u64 = 20_000;
/// Memory that a machine may still take under memory pressure.
const SPARE_BYTES: u64 = 64 << 10;

/// A process in a group of its own with little of a CPU. Dropping it puts it back.
#[derive(Debug)]
pub struct Starved {
    group: PathBuf,
    /// Pids, and the groups that they were in.
    from: Vec<(i32, PathBuf)>,
}

/// Where the hierarchy of the `cpu` controller is mounted.
fn cpu_hierarchy() -> io::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    let found = fields.find_map(|mut fields| {
        let place = fields.nth(1)?;
        let kind = fields.next()?;
        let options = fields.next()?;
        let has_cpu = options.split(',').any(|option| option == "cpu");
        (kind == "cgroup" && has_cpu).then(|| PathBuf::from(place))
    });
    found.ok_or_else(|| io::Error::other("there is no cpu hierarchy of cgroup v1"))
}

impl Starved {
    /// Gives processes `percent` of one CPU together.
    ///
    /// # Errors
    /// When there is no cgroup that could do that.
    pub fn begin(pids: &[i32], percent: u8, name: &str) -> io::Result<Self> {
        let hierarchy = cpu_hierarchy()?;
        let group = hierarchy.join(name);
        fs::create_dir(&group)?;
        let mut starved = Self {
            group,
            from: Vec::new(),
        };
        let quota = (PERIOD_US * u64::from(percent)) / 100;
        let set = |file: &str, value: u64| fs::write(starved.group.join(file), value.to_string());
        set("cpu.cfs_period_us", PERIOD_US)?;
        set("cpu.cfs_quota_us", quota)?;
        let mut dead = io::Error::other("there is no process");
        for &pid in pids {
            // One of several may just have died.
            let moved = group_of(pid, &hierarchy).and_then(|from| {
                fs::write(starved.group.join("cgroup.procs"), pid.to_string())?;
                Ok(from)
            });
            match moved {
                Ok(from) => starved.from.push((pid, from)),
                Err(error) => dead = error,
            }
        }
        match starved.from.is_empty() {
            true => Err(dead),
            false => Ok(starved),
        }
    }
}

impl Drop for Starved {
    fn drop(&mut self) {
        for (pid, from) in &self.from {
            // It may be dead.
            let _gone = fs::write(from.join("cgroup.procs"), pid.to_string());
        }
        // Threads of the dead are there for a moment.
        let until = Instant::now() + Duration::from_secs(2);
        while fs::remove_dir(&self.group).is_err() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The group of a process in the hierarchy of the `cpu` controller.
fn group_of(pid: i32, hierarchy: &Path) -> io::Result<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = groups.lines().find_map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        let is_cpu = controllers.split(',').any(|name| name == "cpu");
        is_cpu.then(|| path.trim_start_matches('/').to_owned())
    });
    let path = path.ok_or_else(|| io::Error::other("the process is in no cpu group"))?;
    Ok(hierarchy.join(path))
}

/// The control groups that brokers have made for processes with these pids, in every hierarchy: the
/// pid ends their names.
#[must_use]
pub fn groups_of(pids: &[i32]) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let of_groups = |line: &&str| {
        line.split(' ')
            .nth(2)
            .is_some_and(|k| k.starts_with("cgroup"))
    };
    let places = mounts.lines().filter(of_groups);
    let places = places.filter_map(|line| line.split(' ').nth(1));
    let mut found = Vec::new();
    for place in places {
        let all = Path::new(place).join("bulkhead");
        for entry in fs::read_dir(all).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let pid = name.rsplit_once('-').and_then(|(_, pid)| pid.parse().ok());
            if pid.is_some_and(|pid| pids.contains(&pid)) {
                found.push(entry.path());
            }
        }
    }
    found
}

/// The files of limit and usage of a process's memory group.
fn memory_files(pid: i32) -> Option<(PathBuf, PathBuf)> {
    let pairs = [
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ("memory.max", "memory.current"),
    ];
    groups_of(&[pid]).iter().find_map(|group| {
        let of = |(limit, usage): (&str, &str)| (group.join(limit), group.join(usage));
        pairs.map(of).into_iter().find(|(limit, _)| limit.exists())
    })
}

impl Engine {
    /// Does to a process what a fault says.
    ///
    /// # Errors
    /// When it cannot be done.
    pub fn act_on(self: &Arc<Self>, pid: i32, planned: &Planned) -> io::Result<()> {
        let fault = &planned.fault;
        let time = Duration::from_millis(fault.ms.unwrap_or(0));
        match fault.action {
            Action::Kill => self.kill(pid, fault),
            Action::Stop => self.stop_for(pid, time),
            Action::Slow => self.slow_for(pid, time),
            Action::Starve => self.starve_for(&[pid], planned.id, fault)?,
            _ => return Err(io::Error::other("no fault of a process")),
        }
        Ok(())
    }

    /// Stops and continues a process in turn, for a while.
    pub fn slow_for(self: &Arc<Self>, pid: i32, time: Duration) {
        std::thread::spawn(move || {
            let until = Instant::now() + time;
            let target = Pid::from_raw(pid);
            while Instant::now() < until && kill(target, Signal::SIGSTOP).is_ok() {
                std::thread::sleep(DUTY);
                let _dead = kill(target, Signal::SIGCONT);
                std::thread::sleep(DUTY);
            }
        });
    }

    /// Gives processes little of a CPU, for a while.
    ///
    /// # Errors
    /// As [`Starved::begin`].
    pub fn starve_for(&self, pids: &[i32], id: u32, fault: &Fault) -> io::Result<()> {
        let name = format!("bulkhead-fault-{}-{id}", std::process::id());
        let starved = Starved::begin(pids, fault.percent.unwrap_or(10), &name)?;
        let time = Duration::from_millis(fault.ms.unwrap_or(0));
        self.until_end(time, move || drop(starved));
        Ok(())
    }

    /// Limits the memory of a machine's processes to what they use, for a while.
    ///
    /// # Errors
    /// When the processes have no groups with such a limit.
    pub fn press(&self, processes: &[Known], fault: &Fault) -> io::Result<()> {
        let mut limits = Vec::new();
        for known in processes {
            let Some((limit, usage)) = memory_files(known.record.pid) else {
                continue;
            };
            let before = fs::read_to_string(&limit)?;
            let usage = fs::read_to_string(&usage)?;
            let usage = usage.trim().parse::<u64>().map_err(io::Error::other)?;
            // Rounded down by the kernel: what is in use cannot be taken away without swap.
            if fs::write(&limit, (usage + SPARE_BYTES).to_string()).is_ok() {
                limits.push((limit, before));
            }
        }
        if limits.is_empty() {
            return Err(io::Error::other("its processes have no memory limit"));
        }
        let time = Duration::from_millis(fault.ms.unwrap_or(0));
        self.until_end(time, move || {
            for (limit, before) in limits {
                // The process and its group may be gone.
                let _gone = fs::write(limit, before.trim());
            }
        });
        Ok(())
    }

    /// Undoes something after a while.
    fn until_end(&self, time: Duration, undo: impl FnOnce() + Send + 'static) {
        let undone = std::thread::spawn(move || {
            std::thread::sleep(time);
            undo();
        });
        super::locked(&self.undoing).push(undone);
    }

    /// Waits until everything that lasts a while is over.
    pub fn settle(&self) {
        let undoing = std::mem::take(&mut *super::locked(&self.undoing));
        for thread in undoing {
            let _panicked = thread.join();
        }
    }
}
