//! Injecting: what the processes of all hosts ask before they act comes here, and what a plan says
//! about it is done.

mod calls;
mod clock;
pub mod guest;
mod messages;
mod processes;
mod rules;
pub mod windows;

pub use processes::{Starved, groups_of};
pub use rules::{Occurrence, Rules};

use crate::messages::{Boundary, decode};
use crate::notify::{Notification, thread_group};
use crate::points::{Point, When};
use crate::random::Planned;
use crate::scenario::{Fault, Scenario, Who};
use crate::timeline::Timeline;
use crate::who::{Directory, Known, socket_inode};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::adopt::Adopt;
use bulkhead_ipc::protocol::birth::Birth;
use bulkhead_policies::syscalls;
use messages::{Lanes, Packet};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Longest control message that is read.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;

/// What all faults of a run share.
#[derive(Debug)]
pub struct Engine {
    /// Who is who.
    pub directory: Directory,
    /// What happened.
    pub timeline: Arc<Timeline>,
    rules: Mutex<Rules>,
    lanes: Lanes,
    /// Runtime directories by host.
    runtimes: Vec<PathBuf>,
    /// How long each broker that was killed stays away.
    doomed: Mutex<BTreeMap<usize, Duration>>,
    /// Processes that a fault has killed.
    killed: Mutex<BTreeSet<i32>>,
    /// How often each message was seen.
    seen: Mutex<BTreeMap<String, u64>>,
    /// What was seen and must never be.
    wrongs: Mutex<Vec<String>>,
    /// How far the time of day of processes is off, in milliseconds.
    clocks: Mutex<BTreeMap<i32, i64>>,
    /// Threads that undo something.
    undoing: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

/// Whom a fault on a message can hit.
#[derive(Debug, Clone)]
struct Parties {
    sender: i32,
    receiver: Option<i32>,
    broker: Option<i32>,
}

impl Parties {
    fn of(&self, who: Option<Who>) -> Option<i32> {
        match who.unwrap_or(Who::Sender) {
            Who::Sender => Some(self.sender),
            Who::Receiver => self.receiver,
            Who::Broker => self.broker,
        }
    }
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    /// For a plan, on hosts with these runtime directories.
    #[must_use]
    pub fn new(plan: &[Planned], runtimes: Vec<PathBuf>, timeline: Arc<Timeline>) -> Arc<Self> {
        Arc::new(Self {
            directory: Directory::default(),
            timeline,
            rules: Mutex::new(Rules::new(plan)),
            lanes: Lanes::default(),
            runtimes,
            doomed: Mutex::default(),
            killed: Mutex::default(),
            seen: Mutex::default(),
            wrongs: Mutex::default(),
            clocks: Mutex::default(),
            undoing: Mutex::default(),
        })
    }

    /// The rules and how far they are.
    pub fn rules(&self) -> MutexGuard<'_, Rules> {
        locked(&self.rules)
    }

    /// How often each message and call point was reached.
    #[must_use]
    pub fn seen(&self) -> BTreeMap<String, u64> {
        locked(&self.seen).clone()
    }

    /// The calls that must notify for a plan.
    #[must_use]
    pub fn calls_of(plan: &[Planned]) -> Vec<u32> {
        // By their messages processes are known.
        let messages = syscalls::number("sendmsg");
        let points = plan.iter().filter_map(|p| Point::named(&p.fault.point));
        let calls = points.filter_map(|point| point.system_call());
        let calls: BTreeSet<u32> = calls.chain(messages).collect();
        calls.into_iter().collect()
    }

    /// A process waits for us before a system call.
    pub fn asked(self: &Arc<Self>, host: usize, notification: Notification) {
        let Some(pid) = thread_group(notification.thread) else {
            return notification.go_on();
        };
        if Some(notification.number) == syscalls::number("clock_gettime") {
            return clock::asked(self, pid, notification);
        }
        if Some(notification.number) == syscalls::number("sendmsg")
            && let Some((packet, message)) = self.message(host, pid, &notification)
        {
            return messages::seen(self, packet, message, notification);
        }
        calls::seen(self, host, pid, notification);
    }

    /// Reads the message that is about to be sent; `None` when it is no control message.
    fn message(
        &self,
        host: usize,
        pid: i32,
        notification: &Notification,
    ) -> Option<(Packet, Seen)> {
        let fd = i32::try_from(notification.arguments[0]).ok()?;
        let inode = socket_inode(pid, fd)?;
        let packet = Packet::read(notification, pid, fd, inode)?;
        let (boundary, known) = match self.directory.broker(host) == Some(pid) {
            true => self.a_brokers(host, inode, &packet)?,
            false => self.a_childs(pid, inode)?,
        };
        let name = boundary.name_of(&packet.bytes)?;
        if boundary == Boundary::Born {
            self.directory.said(pid, inode, name == "born.locked");
        }
        let broker = self.directory.broker(host);
        let parties = match boundary.is_brokers() {
            true => Parties {
                sender: pid,
                receiver: Some(known.record.pid),
                broker,
            },
            false => Parties {
                sender: pid,
                receiver: broker,
                broker,
            },
        };
        Some((
            packet,
            Seen {
                host,
                name,
                known,
                parties,
            },
        ))
    }

    fn a_brokers(&self, host: usize, inode: u64, packet: &Packet) -> Option<(Boundary, Known)> {
        if packet.has_address() {
            let adopt = decode::<Adopt>(&packet.bytes)?;
            let known = self.directory.with_token(&adopt.token)?;
            return Some((Boundary::Adopt, known));
        }
        if let Some(known) = self.directory.at(inode) {
            let boundary = match known.id.kind {
                ProcKind::Vcpu => Boundary::ToVcpu,
                ProcKind::Switch => Boundary::ToSwitch,
                _ => Boundary::ToDevice,
            };
            return Some((boundary, known));
        }
        let birth = decode::<Birth>(&packet.bytes)?;
        let runtime = self.runtimes.get(host)?;
        let known = self.directory.born(host, runtime, inode, &birth)?;
        for other in self.directory.alive_beside(&known) {
            let vm = &known.vm;
            self.wrong(format!(
                "{vm}/{} is born while {vm}/{} is alive",
                known.id, other.id
            ));
        }
        Some((Boundary::Birth, known))
    }

    fn a_childs(&self, pid: i32, inode: u64) -> Option<(Boundary, Known)> {
        let known = self.directory.with_pid(pid)?;
        let boundary = match known.control {
            None => Boundary::Born,
            Some(control) if control != inode => Boundary::Adopted,
            Some(_) if !known.is_locked => Boundary::Born,
            Some(_) => match known.id.kind {
                ProcKind::Vcpu => Boundary::FromVcpu,
                ProcKind::Switch => Boundary::FromSwitch,
                _ => Boundary::FromDevice,
            },
        };
        Some((boundary, known))
    }

    /// Counts an occurrence and returns the faults that it has.
    pub fn meet(&self, occurrence: &Occurrence<'_>) -> Vec<Planned> {
        *locked(&self.seen)
            .entry(occurrence.name.to_owned())
            .or_default() += 1;
        let now = self.timeline.now();
        self.rules().meet(occurrence, now)
    }

    fn wrong(&self, what: String) {
        self.timeline.note(format!("ERROR {what}"));
        locked(&self.wrongs).push(what);
    }

    /// What was seen and must never be, whoever is hurt by it.
    #[must_use]
    pub fn wrongs(&self) -> Vec<String> {
        locked(&self.wrongs).clone()
    }

    /// SIGKILL for a process, which may be a broker.
    pub fn kill(&self, pid: i32, fault: &Fault) {
        self.doom(pid, fault);
        locked(&self.killed).insert(pid);
        let _dead = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }

    /// If it is a broker, its death is to be expected.
    fn doom(&self, pid: i32, fault: &Fault) {
        let hosts = 0..self.runtimes.len();
        let mut hosts = hosts.filter(|host| self.directory.broker(*host) == Some(pid));
        if let Some(host) = hosts.next() {
            let away = Duration::from_millis(fault.ms.unwrap_or(0));
            locked(&self.doomed).insert(host, away);
        }
    }

    /// The time of day of a process jumps.
    ///
    /// # Errors
    /// When it is gone, or reads its clocks in another way.
    pub fn jump(&self, pid: i32, by_ms: i64) -> std::io::Result<()> {
        clock::jump(self, pid, by_ms)
    }

    /// The broker of a host is about to be killed and stays away so long.
    pub fn expect_death(&self, host: usize, away: Duration) {
        locked(&self.doomed).insert(host, away);
    }

    /// Whether a fault has killed the broker of a host, and how long it stays away. Asked once.
    pub fn was_doomed(&self, host: usize) -> Option<Duration> {
        locked(&self.doomed).remove(&host)
    }

    /// Stops a process for a while; does not wait.
    pub fn stop_for(&self, pid: i32, time: Duration) {
        let target = Pid::from_raw(pid);
        let _dead = kill(target, Signal::SIGSTOP);
        std::thread::spawn(move || {
            std::thread::sleep(time);
            let _dead = kill(target, Signal::SIGCONT);
        });
    }
}

/// A control message that was seen.
#[derive(Debug, Clone)]
struct Seen {
    host: usize,
    name: &'static str,
    /// The process at the other end of the broker's channel.
    known: Known,
    parties: Parties,
}

impl Seen {
    fn occurrence<'a>(&'a self, when: When, name: &'a str, place: &'a str) -> Occurrence<'a> {
        Occurrence {
            point: Point::Message(self.name, when),
            name,
            host: self.host,
            vm: Some(&self.known.vm),
            process: Some(place),
            is_anonymous: false,
        }
    }
}

/// Names of hosts in the order of their numbers.
#[must_use]
pub fn host_names(scenario: &Scenario) -> Vec<String> {
    match scenario.host.is_empty() {
        true => vec!["host".to_owned()],
        false => scenario.host.iter().map(|host| host.name.clone()).collect(),
    }
}
