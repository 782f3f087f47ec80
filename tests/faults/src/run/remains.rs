//! After a run: machines are removed, brokers ended, and nothing may be left.

use super::{PATIENCE, Run, keeper::Keeper};
use crate::hosts::Host;
use crate::inject::groups_of;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::time::{Duration, Instant};

/// How long remains may take to vanish.
const VANISHING: Duration = Duration::from_secs(10);

impl Run {
    /// Removes machines and ends brokers, and looks at what is left.
    pub(super) fn take_down(&self, keeper: &Keeper<'_>) {
        for machine in &self.machines {
            let Some(host) = self.host_of(machine) else {
                continue;
            };
            let name = machine.vm.name.as_str();
            let removed = host.run(&["rm", name], PATIENCE);
            if !removed.is_good() {
                self.error(format!("rm {name}: {}", removed.errors.trim()));
                let _forced = host.run(&["rm", "--force", name], PATIENCE);
            }
        }
        for (host, network) in self.networks() {
            let removed = host.run(&["network", "rm", network], PATIENCE);
            if !removed.is_good() {
                let why = removed.errors.trim();
                self.error(format!("network rm {network}: {why}"));
            }
        }
        for host in &self.hosts {
            keeper.compare(host);
            self.end_broker(host);
            self.look_for_remains(host);
        }
    }

    fn end_broker(&self, host: &Host) {
        let Some(pid) = host.pid() else {
            return self.error(format!("{} has no broker at the end", host.name));
        };
        let _dead = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let until = Instant::now() + PATIENCE;
        loop {
            match host.ended() {
                Some(status) if status.success() => return,
                Some(status) => {
                    return self.error(format!("the broker of {} ended with {status}", host.name));
                }
                None if Instant::now() > until => {
                    return self.error(format!("the broker of {} does not end", host.name));
                }
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn look_for_remains(&self, host: &Host) {
        let until = Instant::now() + VANISHING;
        loop {
            let left = self.remains(host);
            if left.is_empty() {
                return;
            }
            if Instant::now() > until {
                return left.into_iter().for_each(|what| self.error(what));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Everything of a host without machines and broker that should not be there.
    fn remains(&self, host: &Host) -> Vec<String> {
        let mut left = Vec::new();
        for pid in host.processes() {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let (name, state) = (name.trim().to_owned(), state_of(pid));
            left.push(format!("process {pid} ({name}, {state}) is left behind"));
        }
        let machines = fs::read_dir(host.runtime().join("vms"));
        for entry in machines.into_iter().flatten().flatten() {
            left.push(format!("{} is left behind", entry.path().display()));
        }
        for group in groups_of(&self.engine.directory.pids(host.index)) {
            left.push(format!("control group {} is left behind", group.display()));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let runtime = host.runtime();
        let ours = |line: &&str| {
            let place = line.split(' ').nth(1).unwrap_or_default();
            std::path::Path::new(place).starts_with(&runtime)
        };
        for line in mounts.lines().filter(ours) {
            left.push(format!("mount {line} is left behind"));
        }
        left
    }
}

/// The state letter of a process.
fn state_of(pid: i32) -> String {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(')').map(|(_, rest)| rest.trim_start());
    state.unwrap_or_default().chars().take(1).collect()
}
