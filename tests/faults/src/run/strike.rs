//! Faults that have a time and not a message or call: of processes, machines, brokers, hosts, disks.

use super::{Machine, Run, keeper::Keeper};
use crate::disk::{DiskAction, DiskEvent, DiskOp, DiskRule};
use crate::hosts::Host;
use crate::inject::{Engine, guest, windows};
use crate::network::{FrameAction, FrameRule};
use crate::points::Point;
use crate::random::Planned;
use crate::scenario::{Action, Fault, Who};
use crate::who::Known;
use bulkhead_ipc::ident::ProcKind;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::io;
use std::time::{Duration, Instant};

/// How long a process may be missing, because another fault has just ended it.
const MISSING: Duration = Duration::from_secs(3);
/// Bytes of a window that are spoiled when a scenario names none.
const SPOILED: u64 = 64;

impl Run {
    /// Injects every fault that has a time, at its time.
    pub(super) fn strike_all(&self, plan: &[Planned], _keeper: &Keeper<'_>) {
        let timed = |planned: &&Planned| {
            Point::named(&planned.fault.point).is_some_and(|p| !p.is_reached() || is_disk(&p))
        };
        let mut faults: Vec<_> = plan.iter().filter(timed).collect();
        faults.sort_by_key(|planned| (planned.fault.at_ms, planned.id));
        for planned in faults {
            self.wait_until(Duration::from_millis(planned.fault.at_ms.unwrap_or(0)));
            if self.is_over() {
                return;
            }
            let Some(point) = Point::named(&planned.fault.point) else {
                continue;
            };
            if let Err(error) = self.strike(planned, &point) {
                let why = error.to_string();
                self.timeline
                    .note(format!("#{} not injected: {why}", planned.id));
                self.engine.rules().failed(planned.id, why);
            }
        }
    }

    fn host_named(&self, name: Option<&str>) -> Option<&Host> {
        match name {
            Some(name) => self.hosts.iter().find(|host| host.name == name),
            None => self.hosts.first(),
        }
    }

    fn strike(&self, planned: &Planned, point: &Point) -> io::Result<()> {
        let fault = &planned.fault;
        let lacking = |what: &str| io::Error::other(what.to_owned());
        let machine = self.machine(fault.vm.as_deref());
        let machine = machine.ok_or_else(|| lacking("there is no such machine"))?;
        let host = match &fault.host {
            Some(_) => self.host_named(fault.host.as_deref()),
            None => self.host_of(machine),
        };
        let host = host.ok_or_else(|| lacking("there is no such host"))?;
        match point {
            Point::Process(kind) => {
                let known = self.process(machine, kind.name(), fault)?;
                self.tell(planned, &format!("{}/{}", known.vm, known.id));
                self.engine.act_on(known.record.pid, planned)?;
            }
            Point::Window(kind) => {
                let what = self.spoil_window(machine, kind.name(), planned)?;
                self.tell(planned, &what);
            }
            Point::Clock(kind) => {
                let (pid, whom) = match kind {
                    Some(kind) => {
                        let known = self.process(machine, kind.name(), fault)?;
                        (known.record.pid, format!("{}/{}", known.vm, known.id))
                    }
                    None => (self.broker(host)?, host.name.clone()),
                };
                let by_ms = fault.jump_ms.unwrap_or(0);
                self.engine.jump(pid, by_ms)?;
                self.tell(planned, &format!("{whom}, by {by_ms} ms"));
            }
            Point::Guest => {
                let known = self.process(machine, "vcpu", fault)?;
                guest::nmi(known.record.pid)?;
                self.tell(planned, &machine.vm.name);
            }
            Point::Machine => {
                let processes = self.engine.directory.alive(Some(&machine.vm.name), None);
                self.tell(planned, &machine.vm.name);
                match fault.action {
                    Action::Starve => {
                        let pids: Vec<_> = processes.iter().map(|k| k.record.pid).collect();
                        self.engine.starve_for(&pids, planned.id, fault)?;
                    }
                    _ => self.engine.press(&processes, fault)?,
                }
            }
            Point::Broker => {
                let pid = self.broker(host)?;
                self.tell(planned, &host.name);
                self.engine.act_on(pid, planned)?;
            }
            Point::Host => self.kill_host(host, planned)?,
            Point::Disk(op) => return self.spoil_disk(machine, *op, fault),
            Point::Network => return self.spoil_network(planned),
            _ => return Err(lacking("this point has no time")),
        }
        self.engine.rules().done(planned.id);
        Ok(())
    }

    fn tell(&self, planned: &Planned, whom: &str) {
        let what = format!(
            "{:?} at {} ({whom})",
            planned.fault.action, planned.fault.point
        );
        self.engine.timeline.injected(planned.id, what);
    }

    /// The newest process of a machine that a fault is about; one that is being replaced is waited for.
    fn process(&self, machine: &Machine, kind: &str, fault: &Fault) -> io::Result<Known> {
        let until = Instant::now() + MISSING;
        let owner = match kind == ProcKind::Switch.name() {
            true => machine.vm.network.as_deref(),
            false => Some(machine.vm.name.as_str()),
        };
        let owner = owner.ok_or_else(|| io::Error::other("the machine is in no network"))?;
        loop {
            let alive = self.engine.directory.alive(Some(owner), Some(machine.host));
            let mut wanted = alive.into_iter().filter(|known| {
                known.id.kind.name() == kind
                    && known.is_locked
                    && fault.process.as_ref().is_none_or(|p| *p == known.place())
            });
            if let Some(known) = wanted.next_back() {
                return Ok(known);
            }
            if Instant::now() > until || self.is_over() {
                return Err(io::Error::other(format!("no {kind} process was alive")));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn broker(&self, host: &Host) -> io::Result<i32> {
        let until = Instant::now() + MISSING;
        loop {
            if let Some(pid) = host.pid() {
                return Ok(pid);
            }
            if Instant::now() > until {
                return Err(io::Error::other("there was no broker"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Power cut: everything of a host at once, and what its disks had not flushed.
    fn kill_host(&self, host: &Host, planned: &Planned) -> io::Result<()> {
        let broker = self.broker(host)?;
        let away = Duration::from_millis(planned.fault.ms.unwrap_or(0));
        self.tell(planned, &host.name);
        self.engine.expect_death(host.index, away);
        // It starts nothing more while its processes are counted.
        let _dead = kill(Pid::from_raw(broker), Signal::SIGSTOP);
        for pid in host.processes() {
            let _dead = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let here = |machine: &&Machine| machine.host == host.index;
        for machine in self.machines.iter().filter(here) {
            if let Some(disk) = &machine.disk {
                disk.power_cut();
            }
        }
        Ok(())
    }

    /// Spoils the window of a process; says which, and how much. One that is just ending has none any more.
    fn spoil_window(&self, machine: &Machine, kind: &str, planned: &Planned) -> io::Result<String> {
        let fault = &planned.fault;
        let until = Instant::now() + MISSING;
        loop {
            let known = self.process(machine, kind, fault)?;
            let (pid, of) = (known.record.pid, format!("{}/{}", known.vm, known.id));
            let done = if fault.action == Action::Shake {
                let time = Duration::from_millis(fault.ms.unwrap_or(0));
                let shaken = windows::shake(pid, &known.queue_sizes, time, planned.seed);
                shaken.and_then(|times| match times {
                    0 => Err(io::Error::other("nothing stood in its used ring")),
                    times => Ok(format!("{of}, {times} times")),
                })
            } else {
                let bytes = fault.bytes.unwrap_or(SPOILED);
                let spoiled = windows::spoil(pid, bytes, planned.seed);
                spoiled.map(|whole| format!("{of}, {bytes} of {whole} bytes"))
            };
            match done {
                Err(_) if Instant::now() < until && !self.is_over() => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                done => return done,
            }
        }
    }

    /// Gives the hosts' network a rule; the first frame that it hits is told.
    fn spoil_network(&self, planned: &Planned) -> io::Result<()> {
        let fault = &planned.fault;
        let Some(network) = &self.network else {
            return Err(io::Error::other("the hosts have no network"));
        };
        let host = self
            .host_named(fault.host.as_deref())
            .map(|host| host.index);
        let host = host.filter(|_| fault.host.is_some());
        let action = match fault.action {
            Action::Delay => {
                FrameAction::Delay(Duration::from_millis(fault.latency_ms.unwrap_or(0)))
            }
            Action::Duplicate => FrameAction::Duplicate,
            Action::Reorder => FrameAction::Reorder,
            Action::Corrupt => FrameAction::Corrupt,
            _ => FrameAction::Lose,
        };
        let way = fault.who.filter(|_| fault.action != Action::Partition);
        let percent = fault.percent.filter(|_| fault.action != Action::Partition);
        network.add(FrameRule {
            fault: planned.id,
            action,
            percent: percent.unwrap_or(100),
            from: host.filter(|_| way == Some(Who::Sender)),
            to: host.filter(|_| way == Some(Who::Receiver)),
            beside: host.filter(|_| way.is_none()),
            until: Instant::now() + Duration::from_millis(fault.ms.unwrap_or(0)),
            seed: planned.seed,
        });
        Ok(())
    }

    /// Gives a disk a rule; the disk tells when it was met.
    fn spoil_disk(&self, machine: &Machine, op: DiskOp, fault: &Fault) -> io::Result<()> {
        let Some(disk) = &machine.disk else {
            return Err(io::Error::other("the harness does not serve this disk"));
        };
        let time = Duration::from_millis(fault.ms.unwrap_or(0));
        let rule = DiskRule {
            op,
            sectors: fault.sectors.map(|[first, last]| first..last + 1),
            nth: fault.nth.unwrap_or(1),
            after: Duration::ZERO,
            times: Some(fault.times.unwrap_or(1)),
            action: disk_action(fault),
        };
        disk.add(rule).map_err(io::Error::other)?;
        if fault.action == Action::Hang {
            // What hangs is let go when its time is over.
            std::thread::sleep(time);
            if !disk.until_hung(MISSING) {
                return Err(io::Error::other("nothing was asked of the disk"));
            }
            disk.let_go();
        }
        Ok(())
    }
}

fn is_disk(point: &Point) -> bool {
    matches!(point, Point::Disk(_))
}

fn disk_action(fault: &Fault) -> DiskAction {
    let time = Duration::from_millis(fault.ms.unwrap_or(0));
    match fault.action {
        Action::Full => DiskAction::Full,
        Action::Delay => DiskAction::Delay(time),
        Action::Hang => DiskAction::Hang,
        Action::Torn => DiskAction::Torn {
            bytes: fault.bytes.unwrap_or(0),
        },
        Action::Lie => DiskAction::Lie,
        _ => DiskAction::Error,
    }
}

/// A frame has met a rule of the network for the first time.
pub(super) fn frame_fault(engine: &Engine, id: u32) {
    let is_it = |planned: &Planned, _: &Point| planned.id == id;
    let Some(planned) = engine.rules().pending(is_it) else {
        return;
    };
    engine.rules().done(id);
    let fault = &planned.fault;
    let host = fault.host.as_deref().unwrap_or("all hosts");
    let what = format!("{:?} at {} ({host})", fault.action, fault.point);
    engine.timeline.injected(id, what);
}

/// A disk has injected a fault.
pub(super) fn disk_fault(engine: &Engine, vm: &str, event: &DiskEvent) {
    let is_it = |planned: &Planned, point: &Point| {
        *point == Point::Disk(event.op)
            && planned.fault.vm.as_deref().is_none_or(|name| name == vm)
            && disk_action(&planned.fault) == event.action
    };
    let Some(planned) = engine.rules().pending(is_it) else {
        return;
    };
    engine.rules().done(planned.id);
    let sector = event.offset / 512;
    engine.timeline.injected(
        planned.id,
        format!(
            "{:?} at {} ({vm}, sector {sector}, {} bytes)",
            planned.fault.action, planned.fault.point, event.bytes
        ),
    );
}
