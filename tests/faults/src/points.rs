//! The named points: where faults can be injected.

use crate::api;
use crate::disk::DiskOp;
use crate::messages::Boundary;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::syscalls;
use serde::Serialize;
use std::collections::BTreeSet;

/// Calls by which a broker changes what lasts, starts processes and talks to them.
const BROKER_CALLS: &[&str] = &[
    "clone3",
    "fdatasync",
    "fsync",
    "ftruncate",
    "mkdirat",
    "openat",
    "pread64",
    "pwrite64",
    "read",
    "renameat",
    "unlinkat",
    "write",
];
/// Calls that the harness can make itself in the place of a process, so that something can happen
/// after them and a count can be short.
const TRANSFERS: &[&str] = &["pread64", "pwrite64", "read", "write"];
/// Calls on a descriptor and a number, which the harness can make too.
const ON_FILES: &[&str] = &["fdatasync", "fsync", "ftruncate"];

/// Before or after what the point is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Nothing of it has happened.
    Before,
    /// It has happened, and whoever did it does not know yet.
    After,
}

/// A point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Point {
    /// A control message.
    Message(&'static str, When),
    /// A request of the operator's to the broker.
    Api(&'static str, When),
    /// A system call of a process, of the broker without a kind.
    Call(Option<ProcKind>, &'static str, When),
    /// A process, at any time.
    Process(ProcKind),
    /// What a device process shares with the gate.
    Window(ProcKind),
    /// The time of day of a process, of the broker without a kind.
    Clock(Option<ProcKind>),
    /// The hardware that a guest sees.
    Guest,
    /// A machine.
    Machine,
    /// The broker.
    Broker,
    /// A host.
    Host,
    /// The network between the hosts.
    Network,
    /// A disk that the harness serves.
    Disk(DiskOp),
}

/// A line of `bulkhead fault points`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listed {
    /// Its name.
    pub point: String,
    /// Whose step it is.
    pub process: String,
    /// The step.
    pub step: String,
}

/// The names of the calls that the locked phase of `kind` is granted.
fn granted(kind: ProcKind) -> Vec<&'static str> {
    let Ok(policy) = bulkhead_policies::load(kind, None, false) else {
        return Vec::new();
    };
    let permits = policy.locked.iter().flat_map(|thread| &thread.permits);
    let names: BTreeSet<_> = permits
        .filter_map(|permit| syscalls::name(permit.number))
        .collect();
    names.into_iter().collect()
}

/// Whether the harness can make the call itself, on a duplicate of the descriptor.
#[must_use]
pub fn can_be_made(call: &str) -> bool {
    TRANSFERS.contains(&call) || ON_FILES.contains(&call)
}

/// Whether the call moves bytes, so that its count can be short.
#[must_use]
pub fn can_be_short(call: &str) -> bool {
    TRANSFERS.contains(&call)
}

/// Kinds of process that a scenario has: those of machines, and the switches of their networks.
const KINDS: [ProcKind; 9] = [
    ProcKind::Vcpu,
    ProcKind::Legacy,
    ProcKind::Console,
    ProcKind::Blk,
    ProcKind::Rng,
    ProcKind::Net,
    ProcKind::Vsock,
    ProcKind::Fs,
    ProcKind::Switch,
];
/// Kinds of process that have a window, or a page like one.
const WITH_WINDOW: [ProcKind; 7] = [
    ProcKind::Blk,
    ProcKind::Console,
    ProcKind::Rng,
    ProcKind::Fs,
    ProcKind::Net,
    ProcKind::Vsock,
    ProcKind::Legacy,
];

/// The kind with this name, of those that a scenario has.
#[must_use]
pub fn kind_named(name: &str) -> Option<ProcKind> {
    KINDS.into_iter().find(|kind| kind.name() == name)
}

/// Every point.
#[must_use]
pub fn all() -> Vec<Listed> {
    let listed = |point: String, process: &str, step: &str| Listed {
        point,
        process: process.to_owned(),
        step: step.to_owned(),
    };
    let mut points = Vec::new();
    for boundary in Boundary::ALL {
        let (from, to) = boundary.parties();
        for &name in boundary.messages() {
            for when in ["before", "after"] {
                let step = format!("{when} {from} sends it to {to}");
                points.push(listed(format!("{name}:{when}"), from, &step));
            }
        }
    }
    for name in api::names() {
        for (when, step) in [
            ("before", "before the broker gets the request"),
            ("after", "before the operator gets the answer"),
        ] {
            points.push(listed(format!("{name}:{when}"), "broker", step));
        }
    }
    let kinds = KINDS.map(|kind| (kind.name(), granted(kind)));
    let brokers = [("broker", BROKER_CALLS.to_vec())];
    for (kind, calls) in kinds.into_iter().chain(brokers) {
        for call in calls {
            points.push(listed(
                format!("call.{kind}.{call}:before"),
                kind,
                "before the kernel sees the call",
            ));
            if can_be_made(call) {
                points.push(listed(
                    format!("call.{kind}.{call}:after"),
                    kind,
                    "after the call has had its effect",
                ));
            }
        }
    }
    for kind in KINDS {
        points.push(listed(
            format!("process.{kind}"),
            kind.name(),
            "at any time",
        ));
    }
    for kind in WITH_WINDOW {
        points.push(listed(
            format!("window.{kind}"),
            kind.name(),
            "what it shares with vcpu",
        ));
    }
    for kind in KINDS.map(ProcKind::name).into_iter().chain(["broker"]) {
        points.push(listed(format!("clock.{kind}"), kind, "its time of day"));
    }
    points.push(listed(
        "guest".to_owned(),
        "guest",
        "what its hardware does",
    ));
    points.push(listed(
        "machine".to_owned(),
        "all of a machine",
        "at any time",
    ));
    points.push(listed("broker".to_owned(), "broker", "at any time"));
    points.push(listed("host".to_owned(), "all of a host", "at any time"));
    points.push(listed(
        "network".to_owned(),
        "hosts' network",
        "on the way from host to host",
    ));
    for op in ["read", "write", "flush"] {
        points.push(listed(
            format!("disk.{op}"),
            "host disk",
            "a request of a disk's process",
        ));
    }
    points
}

impl Point {
    /// The point that a scenario names; `:before` may be left out.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        let (base, when) = match name.rsplit_once(':') {
            Some((base, "before")) => (base, When::Before),
            Some((base, "after")) => (base, When::After),
            Some(_) => return None,
            None => (name, When::Before),
        };
        let has_moments = Self::message(base, when)
            .or_else(|| Self::call(base, when))
            .or_else(|| Self::api(base, when));
        if has_moments.is_some() || name.contains(':') {
            return has_moments;
        }
        match base.split_once('.') {
            None => match base {
                "guest" => Some(Self::Guest),
                "machine" => Some(Self::Machine),
                "broker" => Some(Self::Broker),
                "host" => Some(Self::Host),
                "network" => Some(Self::Network),
                _ => None,
            },
            Some(("process", kind)) => kind_named(kind).map(Self::Process),
            Some(("window", kind)) => kind_named(kind)
                .filter(|kind| WITH_WINDOW.contains(kind))
                .map(Self::Window),
            Some(("clock", "broker")) => Some(Self::Clock(None)),
            Some(("clock", kind)) => kind_named(kind).map(|kind| Self::Clock(Some(kind))),
            Some(("disk", "read")) => Some(Self::Disk(DiskOp::Read)),
            Some(("disk", "write")) => Some(Self::Disk(DiskOp::Write)),
            Some(("disk", "flush")) => Some(Self::Disk(DiskOp::Flush)),
            Some(_) => None,
        }
    }

    fn message(base: &str, when: When) -> Option<Self> {
        let mut names = Boundary::ALL.iter().flat_map(|b| b.messages());
        let name = names.find(|&&name| name == base)?;
        Some(Self::Message(name, when))
    }

    fn api(base: &str, when: When) -> Option<Self> {
        let name = api::names().find(|&name| name == base)?;
        Some(Self::Api(name, when))
    }

    fn call(base: &str, when: When) -> Option<Self> {
        let (kind, call) = base.strip_prefix("call.")?.split_once('.')?;
        let (kind, calls) = match kind {
            "broker" => (None, BROKER_CALLS.to_vec()),
            kind => (Some(kind_named(kind)?), granted(kind_named(kind)?)),
        };
        let call = calls.into_iter().find(|&name| name == call)?;
        let possible = when == When::Before || can_be_made(call);
        possible.then_some(Self::Call(kind, call, when))
    }

    /// The number of the system call at which the harness sees the point.
    #[must_use]
    pub fn system_call(&self) -> Option<u32> {
        match self {
            Self::Message(..) => syscalls::number("sendmsg"),
            Self::Call(_, call, _) => syscalls::number(call),
            Self::Clock(_) => syscalls::number("clock_gettime"),
            _ => None,
        }
    }

    /// Whether it is reached again and again, and not a thing that is there all the time.
    #[must_use]
    pub fn is_reached(&self) -> bool {
        matches!(
            self,
            Self::Message(..) | Self::Api(..) | Self::Call(..) | Self::Disk(_)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_point_can_be_named() {
        let points = all();
        assert!(points.len() > 150, "{}", points.len());
        for listed in points {
            assert!(Point::named(&listed.point).is_some(), "{}", listed.point);
        }
        for wrong in [
            "to-vcpu.pong",
            "call.blk.execve",
            "process.gpu",
            "window.vcpu",
            "host:after",
        ] {
            assert_eq!(Point::named(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn every_kind_of_a_machine_is_one_of_a_scenario() {
        assert!(
            ProcKind::OF_MACHINES
                .iter()
                .all(|kind| KINDS.contains(kind))
        );
    }

    #[test]
    fn every_call_of_every_policy_is_a_point() {
        for kind in KINDS {
            let policy = bulkhead_policies::load(kind, None, false).unwrap();
            for permit in policy.locked.iter().flat_map(|thread| &thread.permits) {
                let name = format!("call.{kind}.{}:before", permit.name);
                assert!(Point::named(&name).is_some(), "{name}");
            }
        }
    }
}
