//! Every fault × every kind of process × what a machine goes through, as scenarios made from tables.
//!
//! A cell is a phase, a point that is reached in it and an action; what the guest may notice follows
//! from who is hit. Cells that cannot be are left out: a vCPU process has no successor, a process at
//! boot has no predecessor.

use crate::random::bare;
use crate::scenario::{
    Action, Deed, Disk, DiskPlace, Expect, Fault, Scenario, Step, Vm, Who, Work,
};
use bulkhead_ipc::ident::ProcKind;

/// What a machine goes through when the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It is started.
    Boot,
    /// Its guest works.
    Io,
    /// A device is restarted by the operator.
    Restart,
    /// A device is upgraded.
    Upgrade,
    /// Another broker takes over.
    BrokerRestart,
    /// It is shut down, by its guest or the operator.
    Shutdown,
}

impl Phase {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Boot,
        Self::Io,
        Self::Restart,
        Self::Upgrade,
        Self::BrokerRestart,
        Self::Shutdown,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Io => "io",
            Self::Restart => "restart",
            Self::Upgrade => "upgrade",
            Self::BrokerRestart => "broker-restart",
            Self::Shutdown => "shutdown",
        }
    }

    /// When a fault comes that is to hit what the operator does.
    const fn strike_ms(self) -> u64 {
        match self {
            // A process that is killed is soon gone.
            Self::Shutdown => AT_MS + 1,
            _ => AT_MS + 4,
        }
    }

    /// What the operator does for it.
    const fn deed(self) -> Option<Deed> {
        match self {
            Self::Restart => Some(Deed::RestartDevice),
            Self::Upgrade => Some(Deed::Upgrade),
            Self::BrokerRestart => Some(Deed::RestartBroker),
            Self::Shutdown => Some(Deed::Kill),
            Self::Boot | Self::Io => None,
        }
    }

    /// Messages that are sent in it, about a process of this kind, and which occurrence it is.
    fn messages(self, kind: ProcKind) -> Vec<(&'static str, Option<u64>)> {
        let is_vcpu = kind == ProcKind::Vcpu;
        let is_legacy = kind == ProcKind::Legacy;
        match (self, is_vcpu) {
            (Self::Boot, _) => vec![("birth.birth", Some(1)), ("born.locked", Some(1))],
            (Self::Io, true) => vec![
                ("to-vcpu.pause", Some(1)),
                ("from-vcpu.paused", Some(1)),
                ("to-vcpu.resume", Some(1)),
                ("from-vcpu.resumed", Some(1)),
            ],
            (Self::Io, false) => vec![("to-device.ping", None), ("from-device.pong", None)],
            (Self::Restart | Self::Upgrade, false) => {
                let mut messages = vec![
                    ("to-device.shutdown", Some(1)),
                    ("birth.birth", Some(2)),
                    ("born.locked", Some(2)),
                ];
                messages.extend(match is_legacy {
                    true => [
                        ("to-vcpu.prepare-legacy", Some(1)),
                        ("from-vcpu.legacy-prepared", Some(1)),
                        ("from-vcpu.legacy-serving", Some(1)),
                    ],
                    false => [
                        ("to-vcpu.prepare-slot", Some(1)),
                        ("from-vcpu.slot-prepared", Some(1)),
                        // Behind those of the four devices at boot.
                        ("from-vcpu.slot-serving", Some(5)),
                    ],
                });
                messages
            }
            (Self::BrokerRestart, _) => {
                vec![("adoption.adopt", Some(1)), ("adoption.adopted", Some(1))]
            }
            (Self::Shutdown, true) => vec![("from-vcpu.ended", Some(1))],
            (Self::Shutdown, false) => vec![("to-device.shutdown", Some(1))],
            (Self::Restart | Self::Upgrade, true) => Vec::new(),
        }
    }
}

/// Actions on messages, and whom they hit.
const ON_MESSAGES: [(Action, Option<Who>, bool); 13] = [
    (Action::Kill, Some(Who::Sender), false),
    (Action::Kill, Some(Who::Receiver), false),
    (Action::Kill, Some(Who::Sender), true),
    (Action::Kill, Some(Who::Receiver), true),
    (Action::Stop, Some(Who::Sender), false),
    (Action::Stop, Some(Who::Receiver), false),
    (Action::Drop, None, false),
    (Action::Delay, None, false),
    (Action::Duplicate, None, false),
    (Action::Reorder, None, false),
    (Action::Corrupt, None, false),
    (Action::Truncate, None, false),
    (Action::Stop, Some(Who::Receiver), true),
];
const ON_PROCESSES: [Action; 4] = [Action::Kill, Action::Stop, Action::Slow, Action::Starve];
/// When the operator acts, and faults with a time come.
const AT_MS: u64 = 500;
/// How long what takes a while takes.
const TIME_MS: u64 = 150;

/// A machine, and a scenario of it in a phase.
fn scenario(name: String, phase: Phase, kind: Option<ProcKind>, fault: Fault) -> Scenario {
    let device = match kind {
        Some(ProcKind::Blk) | None => "disk0".to_owned(),
        Some(ProcKind::Fs) => "share0".to_owned(),
        Some(kind) => kind.name().to_owned(),
    };
    let step = phase.deed().map(|deed| Step {
        at_ms: AT_MS,
        deed,
        vm: None,
        device: Some(device),
    });
    Scenario {
        name,
        about: None,
        seed: 1,
        seconds: 2,
        host: Vec::new(),
        link: Vec::new(),
        vm: vec![Vm {
            name: "web".to_owned(),
            host: None,
            workload: Work::Blocks,
            cpus: None,
            network: None,
            disk: None,
            expect: Expect::Unharmed,
        }],
        step: step.into_iter().collect(),
        fault: vec![fault],
        random: None,
    }
}

const fn step(at_ms: u64, deed: Deed) -> Step {
    Step {
        at_ms,
        deed,
        vm: None,
        device: None,
    }
}

fn in_words(fault: &Fault) -> String {
    let action = format!("{:?}", fault.action).to_lowercase();
    let who = fault.who.map_or(String::new(), |who| {
        format!("-{}", format!("{who:?}").to_lowercase())
    });
    let point = fault.point.replace([':', '.'], "-");
    format!("{action}{who}-{point}")
}

/// Scenarios of control messages.
fn of_messages(phase: Phase, kind: ProcKind, into: &mut Vec<Scenario>) {
    for (message, nth) in phase.messages(kind) {
        for (action, who, is_after) in ON_MESSAGES {
            let when = if is_after { "after" } else { "before" };
            let mut fault = bare(&format!("{message}:{when}"), action);
            fault.who = who;
            fault.nth = nth;
            fault.at_ms = nth.is_none().then_some(AT_MS);
            // What the vCPU process says about a slot is about one of its devices.
            if !message.contains("vcpu") || kind == ProcKind::Vcpu {
                fault.process = Some(format!("{kind}0"));
            }
            if matches!(action, Action::Stop | Action::Delay) {
                fault.ms = Some(TIME_MS);
            }
            let name = format!("{}-{kind}-{}", phase.name(), in_words(&fault));
            let mut made = scenario(name, phase, Some(kind), fault);
            made.vm[0].expect = expect(message, action, who, kind);
            if phase == Phase::Shutdown {
                // The guest powers off.
                made.step.clear();
            }
            if phase == Phase::Io && kind == ProcKind::Vcpu {
                made.step
                    .extend([step(AT_MS, Deed::Pause), step(AT_MS + 200, Deed::Resume)]);
            }
            // Who is not born, or does not go, is given up after ten seconds; its guest works on.
            let is_waited_for =
                !message.starts_with("to-device.ping") && !message.starts_with("from-device.pong");
            let is_lost = matches!(action, Action::Drop | Action::Corrupt | Action::Truncate);
            if is_waited_for && is_lost {
                made.seconds = 14;
            }
            into.push(made);
        }
    }
}

/// What a fault on a message may do to the guest.
fn expect(message: &str, action: Action, who: Option<Who>, kind: ProcKind) -> Expect {
    let from_vcpu = message.starts_with("from-vcpu");
    let to_vcpu = message.starts_with("to-vcpu");
    let with_vcpu = kind == ProcKind::Vcpu || from_vcpu || to_vcpu;
    let from_broker = to_vcpu || message.starts_with("birth") || message.ends_with("adopt");
    let hits_vcpu = match (action, who) {
        (Action::Kill, Some(Who::Sender)) => !from_broker,
        (Action::Kill, _) => from_broker,
        // Who talks nonsense, or does not say what it must, is killed.
        (Action::Corrupt | Action::Truncate | Action::Drop, _) => true,
        // These two are said once.
        (Action::Duplicate, _) => message.starts_with("birth") || message.starts_with("born"),
        _ => false,
    };
    match with_vcpu && hits_vcpu {
        true => Expect::Lost,
        false => Expect::Unharmed,
    }
}

/// Scenarios of whole processes.
fn of_processes(phase: Phase, kind: ProcKind, into: &mut Vec<Scenario>) {
    if phase == Phase::Boot {
        return;
    }
    for action in ON_PROCESSES {
        let mut fault = bare(&format!("process.{kind}"), action);
        // While the operator's command is under way.
        fault.at_ms = Some(phase.strike_ms());
        fault.ms = (action != Action::Kill).then_some(TIME_MS);
        let name = format!("{}-{kind}-{}", phase.name(), in_words(&fault));
        let mut made = scenario(name, phase, Some(kind), fault);
        if kind == ProcKind::Vcpu && action == Action::Kill {
            made.vm[0].expect = Expect::Lost;
        }
        into.push(made);
    }
}

/// Scenarios of clocks; without a kind, of the broker's.
fn of_clocks(phase: Phase, kind: Option<ProcKind>, into: &mut Vec<Scenario>) {
    if phase == Phase::Boot {
        return;
    }
    for (jump_ms, name) in [(86_400_000, "ahead"), (-86_400_000, "back")] {
        let of = kind.map_or("broker", ProcKind::name);
        let mut fault = bare(&format!("clock.{of}"), Action::Jump);
        fault.at_ms = Some(AT_MS - 50);
        fault.jump_ms = Some(jump_ms);
        let name = format!("{}-{}-{name}", phase.name(), in_words(&fault));
        into.push(scenario(name, phase, kind, fault));
    }
}

/// What a disk does, and what its guest is told.
const ON_DISKS: [(&str, Action, Expect); 9] = [
    ("disk.read", Action::Error, Expect::Errors),
    ("disk.write", Action::Error, Expect::Errors),
    ("disk.flush", Action::Error, Expect::Errors),
    ("disk.write", Action::Full, Expect::Errors),
    ("disk.write", Action::Delay, Expect::Unharmed),
    ("disk.flush", Action::Delay, Expect::Unharmed),
    ("disk.write", Action::Hang, Expect::Unharmed),
    ("disk.write", Action::Torn, Expect::Unharmed),
    ("disk.flush", Action::Lie, Expect::Unharmed),
];

/// Scenarios of the host's disk.
fn of_disks(phase: Phase, into: &mut Vec<Scenario>) {
    if matches!(phase, Phase::Boot | Phase::Shutdown) {
        return;
    }
    for (point, action, expect) in ON_DISKS {
        let mut fault = bare(point, action);
        fault.at_ms = Some(AT_MS - 20);
        fault.ms = matches!(action, Action::Delay | Action::Hang).then_some(TIME_MS);
        fault.bytes = (action == Action::Torn).then_some(700);
        let name = format!("{}-{}", phase.name(), in_words(&fault));
        let mut made = scenario(name, phase, Some(ProcKind::Blk), fault);
        made.vm[0].expect = expect;
        made.vm[0].disk = Some(Disk {
            size: "16MiB".to_owned(),
            on: DiskPlace::Faulty,
        });
        into.push(made);
    }
}

/// Scenarios of the broker, and of everything at once.
fn of_brokers(phase: Phase, into: &mut Vec<Scenario>) {
    if phase == Phase::Boot {
        return;
    }
    for (point, action) in [
        ("broker", Action::Kill),
        ("broker", Action::Stop),
        ("broker", Action::Slow),
        ("host", Action::Kill),
        ("machine", Action::Starve),
        ("machine", Action::MemoryPressure),
        ("guest", Action::Nmi),
    ] {
        let mut fault = bare(point, action);
        fault.at_ms = Some(phase.strike_ms());
        fault.ms = Some(TIME_MS);
        let name = format!("{}-{}", phase.name(), in_words(&fault));
        let mut made = scenario(name, phase, None, fault);
        if point == "host" || action == Action::MemoryPressure {
            made.vm[0].expect = Expect::Lost;
        }
        if point == "guest" {
            made.vm[0].expect = Expect::Errors;
        }
        into.push(made);
    }
}

/// What the operator asks for in a phase, and which time it is.
const fn requests(phase: Phase) -> &'static [(&'static str, Option<u64>)] {
    match phase {
        Phase::Boot => &[("api.create", Some(1)), ("api.start", Some(1))],
        Phase::Io => &[
            ("api.list", None),
            ("api.inspect", None),
            ("api.stats", Some(1)),
            ("api.output", None),
            ("api.pause", Some(1)),
            ("api.resume", Some(1)),
            ("api.reset", Some(1)),
        ],
        Phase::Restart => &[("api.restart-device", Some(1))],
        Phase::Upgrade => &[("api.upgrade-device", Some(1))],
        Phase::BrokerRestart => &[],
        // What is removed at the end is no matter of a fault any more.
        Phase::Shutdown => &[("api.kill", Some(1))],
    }
}

/// What happens to a request, and to its answer.
const ON_REQUESTS: [(Action, bool); 12] = [
    (Action::Kill, false),
    (Action::Stop, false),
    (Action::Drop, false),
    (Action::Delay, false),
    (Action::Duplicate, false),
    (Action::Corrupt, false),
    (Action::Truncate, false),
    (Action::Kill, true),
    (Action::Stop, true),
    (Action::Drop, true),
    (Action::Delay, true),
    (Action::Truncate, true),
];

/// Scenarios of what the operator asks for.
fn of_requests(phase: Phase, into: &mut Vec<Scenario>) {
    for (request, nth) in requests(phase) {
        for (action, is_after) in ON_REQUESTS {
            let when = if is_after { "after" } else { "before" };
            let mut fault = bare(&format!("{request}:{when}"), action);
            fault.nth = *nth;
            fault.at_ms = nth.is_none().then_some(AT_MS);
            if matches!(action, Action::Stop | Action::Delay) {
                fault.ms = Some(TIME_MS);
            }
            let name = format!("{}-{}", phase.name(), in_words(&fault));
            let mut made = scenario(name, phase, None, fault);
            let deeds: &[Deed] = match *request {
                "api.list" | "api.stats" => &[Deed::Look],
                "api.pause" | "api.resume" => &[Deed::Pause, Deed::Resume],
                "api.reset" => &[Deed::Reset],
                _ => &[],
            };
            for (deed, n) in deeds.iter().zip(0..) {
                made.step.push(step(AT_MS + 10 + 200 * n, *deed));
            }
            if *request == "api.reset" {
                made.vm[0].expect = Expect::Lost;
            }
            into.push(made);
        }
    }
}

/// Calls of the disk's process and of the broker, and what must be stood.
const ON_CALLS: [(&str, Action, Option<&str>, Expect); 14] = [
    (
        "call.blk.pread64:before",
        Action::Short,
        None,
        Expect::Unharmed,
    ),
    (
        "call.blk.pwrite64:before",
        Action::Short,
        None,
        Expect::Unharmed,
    ),
    (
        "call.blk.pwrite64:before",
        Action::Fail,
        Some("EIO"),
        Expect::Errors,
    ),
    (
        "call.blk.pwrite64:before",
        Action::Fail,
        Some("ENOSPC"),
        Expect::Unharmed,
    ),
    (
        "call.blk.pread64:before",
        Action::Fail,
        Some("EIO"),
        Expect::Errors,
    ),
    (
        "call.blk.pwrite64:before",
        Action::Kill,
        None,
        Expect::Unharmed,
    ),
    (
        "call.blk.pwrite64:after",
        Action::Kill,
        None,
        Expect::Unharmed,
    ),
    (
        "call.blk.epoll_wait:before",
        Action::Fail,
        Some("EINTR"),
        Expect::Unharmed,
    ),
    (
        "call.console.epoll_wait:before",
        Action::Delay,
        None,
        Expect::Unharmed,
    ),
    (
        "call.legacy.epoll_wait:before",
        Action::Delay,
        None,
        Expect::Unharmed,
    ),
    (
        "call.rng.epoll_wait:before",
        Action::Delay,
        None,
        Expect::Unharmed,
    ),
    (
        "call.broker.clone3:before",
        Action::Fail,
        Some("EAGAIN"),
        Expect::Unharmed,
    ),
    (
        "call.broker.fdatasync:before",
        Action::Delay,
        None,
        Expect::Unharmed,
    ),
    (
        "call.broker.renameat:before",
        Action::Kill,
        None,
        Expect::Unharmed,
    ),
];

fn of_calls(into: &mut Vec<Scenario>) {
    for (point, action, errno, expect) in ON_CALLS {
        let mut fault = bare(point, action);
        let is_brokers = point.starts_with("call.broker");
        fault.nth = is_brokers.then_some(2);
        fault.at_ms = (!is_brokers).then_some(AT_MS);
        fault.errno = errno.map(str::to_owned);
        fault.ms = (action == Action::Delay).then_some(TIME_MS);
        fault.bytes = (action == Action::Short).then_some(300);
        let phase = if is_brokers { Phase::Boot } else { Phase::Io };
        let errno = errno.map_or(String::new(), |e| format!("-{}", e.to_lowercase()));
        let name = format!("{}-{}{errno}", phase.name(), in_words(&fault));
        let mut made = scenario(name, phase, None, fault);
        made.vm[0].expect = expect;
        into.push(made);
    }
}

/// Every scenario of the matrix.
#[must_use]
pub fn all() -> Vec<Scenario> {
    let mut scenarios = Vec::new();
    for phase in Phase::ALL {
        for kind in ProcKind::OF_EVERY_MACHINE {
            of_messages(phase, kind, &mut scenarios);
            let devices_alone = matches!(phase, Phase::Restart | Phase::Upgrade);
            if !(devices_alone && kind == ProcKind::Vcpu) {
                of_processes(phase, kind, &mut scenarios);
                of_clocks(phase, Some(kind), &mut scenarios);
            }
        }
        of_clocks(phase, None, &mut scenarios);
        of_brokers(phase, &mut scenarios);
        of_disks(phase, &mut scenarios);
        of_requests(phase, &mut scenarios);
    }
    of_calls(&mut scenarios);
    for kind in ["blk", "console", "rng", "vsock", "fs", "legacy"] {
        let mut fault = bare(&format!("window.{kind}"), Action::Corrupt);
        fault.at_ms = Some(AT_MS);
        fault.bytes = Some(4096);
        let name = format!("io-{}", in_words(&fault));
        let mut made = scenario(name, Phase::Io, None, fault);
        // The window of a disk holds what the guest writes and reads.
        made.vm[0].expect = match kind {
            "blk" | "legacy" => Expect::Harmed,
            _ => Expect::Unharmed,
        };
        scenarios.push(made);
    }
    for phase in Phase::ALL {
        of_waits(phase, &mut scenarios);
        of_windows(phase, &mut scenarios);
    }
    scenarios
}

/// What happens to the call in which a process waits, and whether it can go on.
const ON_WAITS: [(Action, Option<&str>, bool); 4] = [
    (Action::Fail, Some("EINTR"), true),
    (Action::Fail, Some("EIO"), false),
    (Action::Delay, None, true),
    (Action::Kill, None, false),
];

/// Scenarios of the call in which each kind of process waits.
fn of_waits(phase: Phase, into: &mut Vec<Scenario>) {
    if matches!(phase, Phase::Boot | Phase::Shutdown) {
        return;
    }
    for kind in ProcKind::OF_EVERY_MACHINE {
        let is_vcpu = kind == ProcKind::Vcpu;
        if is_vcpu && matches!(phase, Phase::Restart | Phase::Upgrade) {
            continue;
        }
        let call = if is_vcpu { "ppoll" } else { "epoll_wait" };
        for (action, errno, goes_on) in ON_WAITS {
            let mut fault = bare(&format!("call.{kind}.{call}:before"), action);
            fault.at_ms = Some(AT_MS);
            fault.errno = errno.map(str::to_owned);
            fault.ms = (action == Action::Delay).then_some(TIME_MS);
            let errno = errno.map_or(String::new(), |e| format!("-{}", e.to_lowercase()));
            let name = format!("{}-wait-{}{errno}", phase.name(), in_words(&fault));
            let mut made = scenario(name, phase, Some(kind), fault);
            if is_vcpu && !goes_on {
                made.vm[0].expect = Expect::Lost;
            }
            into.push(made);
        }
    }
}

/// Scenarios of windows while processes follow each other, and of windows that change.
fn of_windows(phase: Phase, into: &mut Vec<Scenario>) {
    if matches!(phase, Phase::Boot | Phase::Shutdown) {
        return;
    }
    for (kind, action) in [
        (ProcKind::Blk, Action::Corrupt),
        (ProcKind::Blk, Action::Shake),
        (ProcKind::Console, Action::Corrupt),
        (ProcKind::Rng, Action::Corrupt),
        (ProcKind::Vsock, Action::Corrupt),
        (ProcKind::Legacy, Action::Corrupt),
    ] {
        let mut fault = bare(&format!("window.{kind}"), action);
        fault.at_ms = Some(phase.strike_ms());
        let shakes = action == Action::Shake;
        fault.ms = shakes.then_some(30);
        fault.bytes = (!shakes).then_some(2048);
        let name = format!("{}-while-{}", phase.name(), in_words(&fault));
        let mut made = scenario(name, phase, Some(kind), fault);
        if action == Action::Corrupt && matches!(kind, ProcKind::Blk | ProcKind::Legacy) {
            made.vm[0].expect = Expect::Harmed;
        }
        into.push(made);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_cell_is_a_scenario_that_can_be_run_and_has_a_name_of_its_own() {
        let scenarios = all();
        let mut names = BTreeSet::new();
        for scenario in &scenarios {
            assert!(names.insert(scenario.name.clone()), "{}", scenario.name);
            let text = toml::to_string(scenario).unwrap();
            Scenario::parse("matrix", &text).unwrap();
        }
        for phase in Phase::ALL {
            for kind in ProcKind::OF_EVERY_MACHINE {
                let devices_alone =
                    matches!(phase, Phase::Restart | Phase::Upgrade) && kind == ProcKind::Vcpu;
                let head = format!("{}-{kind}-", phase.name());
                let is_there = names.iter().any(|name| name.starts_with(&head));
                assert!(is_there || devices_alone, "{head}");
            }
        }
        assert!(scenarios.len() > 300, "{}", scenarios.len());
    }
}
