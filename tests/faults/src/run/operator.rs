//! What the operator does, by the command line.

use super::{Machine, PATIENCE, Run};
use crate::hosts::{Done, Host};
use crate::scenario::{Deed, Expect, Step};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long `stop` waits for a guest.
const STOPPING: &str = "5s";

/// How long a second broker has to see that there is one.
const TWIN: Duration = Duration::from_secs(5);

/// How long a process that dies after an upgrade may be without a successor.
const SUCCESSOR: Duration = Duration::from_secs(2);

/// Device and inode of a file.
fn file_of(path: &std::path::Path) -> Option<(u64, u64)> {
    let about = std::fs::metadata(path).ok()?;
    Some((about.dev(), about.ino()))
}

/// The kind of process that serves a device with this name.
fn kind_of(device: &str) -> &str {
    match device {
        "console" | "legacy" | "rng" | "vsock" => device,
        _ if device.starts_with("share") => "fs",
        _ => "blk",
    }
}

impl Run {
    /// Does every step at its time.
    pub(super) fn operate(&self) {
        let mut steps: Vec<_> = self.scenario.step.iter().collect();
        steps.sort_by_key(|step| step.at_ms);
        for step in steps {
            self.wait_until(Duration::from_millis(step.at_ms));
            if self.is_over() {
                return;
            }
            let Some(machine) = self.machine(step.vm.as_deref()) else {
                continue;
            };
            if let Some(host) = self.host_of(machine) {
                self.do_step(host, machine, step);
            }
        }
    }

    /// Waits until a time after the guests worked.
    pub(super) fn wait_until(&self, time: Duration) {
        while self.timeline.now().is_none_or(|now| now < time) && !self.is_over() {
            let left = time.saturating_sub(self.timeline.now().unwrap_or_default());
            std::thread::sleep(left.min(Duration::from_millis(20)));
        }
    }

    fn do_step(&self, host: &Host, machine: &Machine, step: &Step) {
        let vm = machine.vm.name.as_str();
        let device = step.device.as_deref().unwrap_or("disk0");
        let target = format!("{vm}/{device}");
        self.timeline
            .note(format!("the operator: {:?} {target}", step.deed));
        let began = Instant::now();
        let done = match step.deed {
            Deed::RestartDevice => self.command(host, &["device", "restart", &target]),
            Deed::Upgrade => {
                if let Err(error) = host.replace_program(kind_of(device)) {
                    return self.error(format!("a new program: {error}"));
                }
                self.command(host, &["device", "upgrade", &target])
            }
            Deed::Twin => return self.twin(host),
            Deed::RestartBroker => return self.restart_broker(host),
            Deed::Pause => self.command(host, &["pause", vm]),
            Deed::Resume => self.command(host, &["resume", vm]),
            Deed::Reset => self.command(host, &["reset", vm]),
            Deed::Stop => {
                machine.is_ended.store(true, Ordering::SeqCst);
                let done = host.run(&["stop", vm, "--timeout", STOPPING], PATIENCE);
                match done.is_good() {
                    true => done,
                    // The guest does not listen.
                    false => self.command(host, &["kill", vm]),
                }
            }
            Deed::Kill => {
                machine.is_ended.store(true, Ordering::SeqCst);
                self.command(host, &["kill", vm])
            }
            Deed::Look => self.look(host, vm),
        };
        self.judge(machine, step, &done, began);
        if step.deed == Deed::Upgrade && done.is_good() {
            self.compare_program(host, machine, kind_of(device));
        }
    }

    /// After an upgrade the process runs what is on disk.
    fn compare_program(&self, host: &Host, machine: &Machine, kind: &str) {
        let vm = machine.vm.name.as_str();
        let until = Instant::now() + SUCCESSOR;
        let on_disk = file_of(&host.program(kind));
        loop {
            let alive = self.engine.directory.alive(Some(vm), None);
            let mut of_kind = alive.iter().filter(|known| known.id.kind.name() == kind);
            let newest = of_kind.next_back();
            let runs = newest.and_then(|known| {
                let program = format!("/proc/{}/exe", known.record.pid);
                file_of(std::path::Path::new(&program))
            });
            // One that has just died has a successor in a moment, and what is said of it.
            match (runs, &on_disk) {
                (Some(runs), Some(on_disk)) if runs == *on_disk => return,
                _ if self.is_over() || self.may_be_lost(machine) => return,
                (Some(_), _) if Instant::now() > until => {
                    let what = "was upgraded and runs another program than the one on disk";
                    return self.error(format!("{vm}/{kind} {what}"));
                }
                (None, _) if Instant::now() > until => return,
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    fn look(&self, host: &Host, vm: &str) -> Done {
        let _listed = self.command(host, &["list", "--json"]);
        let _used = self.command(host, &["stats", vm]);
        let about = self.command(host, &["inspect", vm, "--json"]);
        match self.machine(Some(vm)).and_then(|m| m.vm.network.as_deref()) {
            Some(network) if about.is_good() => self.command(host, &["network", "show", network]),
            _ => about,
        }
    }

    fn judge(&self, machine: &Machine, step: &Step, done: &Done, began: Instant) {
        let took = began.elapsed().as_millis();
        let vm = &machine.vm.name;
        if done.is_good() {
            return self
                .timeline
                .note(format!("{:?} of {vm} was done in {took} ms", step.deed));
        }
        let why = done.errors.trim();
        // Of a machine that is gone nothing can be asked.
        let has_ended = machine.vm.expect != Expect::Unharmed && why.contains("is stopped");
        if self.may_be_lost(machine) || has_ended {
            return self
                .timeline
                .note(format!("{:?} of {vm}: {why}", step.deed));
        }
        self.error(format!(
            "{:?} of {vm} failed after {took} ms: {why}",
            step.deed
        ));
    }

    /// Two brokers must never own a machine.
    fn twin(&self, host: &Host) {
        let done = host.run(&["serve"], TWIN);
        let why = done.errors.trim();
        if done.is_good() || done.is_overdue {
            return self.error(format!("a second broker of {} served: {why}", host.name));
        }
        self.timeline
            .note(format!("a second broker refused: {why}"));
    }

    fn restart_broker(&self, host: &Host) {
        let Some(pid) = host.pid() else { return };
        self.engine.expect_death(host.index, Duration::ZERO);
        let _dead = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let until = Instant::now() + PATIENCE;
        while host.pid() == Some(pid) {
            if Instant::now() > until {
                return self.error(format!("the broker of {} does not end", host.name));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
