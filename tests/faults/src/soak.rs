//! Scenarios without end for a soak: every kind of fault is in each deck once, so that none is forgotten
//! however the dice fall. The same seed makes the same decks.

use crate::points::Point;
use crate::random::{ALWAYS, Dice, ON_MESSAGES, bare};
use crate::scenario::{
    Action, Deed, Disk, DiskPlace, Expect, Fault, Host, Link, Scenario, Step, Vm, Who, Work,
};
use std::collections::{BTreeMap, BTreeSet};

/// How long guests work in one scenario.
const SECONDS: u64 = 4;
/// When the first and the last fault comes, in milliseconds.
const FAULTS_MS: [u64; 2] = [250, 3300];
/// Heartbeats come once a second: a fault of one has to be due by then.
const BEATS_MS: u64 = 2300;
/// Kinds of device processes.
const DEVICES: [&str; 5] = ["blk", "console", "legacy", "rng", "vsock"];
/// Faults of one scenario that must leave guests unharmed.
const AT_ONCE: usize = 11;

/// What a fault is of, and what it does: the kind that a soak counts.
#[must_use]
pub fn kind_of(fault: &Fault) -> String {
    let of = match Point::named(&fault.point) {
        Some(Point::Message(..)) => "message",
        Some(Point::Api(..)) => "api",
        Some(Point::Call(..)) => "call",
        Some(Point::Process(_)) => "process",
        Some(Point::Window(_)) => "window",
        Some(Point::Clock(_)) => "clock",
        Some(Point::Guest) => "guest",
        Some(Point::Machine) => "machine",
        Some(Point::Broker) => "broker",
        Some(Point::Host) => "host",
        Some(Point::Network) => "network",
        Some(Point::Disk(_)) => "disk",
        None => "unknown",
    };
    let action = format!("{:?}", fault.action).to_lowercase();
    format!("{of}.{action}")
}

/// How often each kind was injected, from 0 for those that must be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally(BTreeMap<String, u64>);

impl Tally {
    /// Of every kind that a deck has, none yet.
    #[must_use]
    pub fn new() -> Self {
        let kinds = deck(0, 0).into_iter().flat_map(|scenario| scenario.fault);
        Self(kinds.map(|fault| (kind_of(&fault), 0)).collect())
    }

    /// A fault was injected so often.
    pub fn add(&mut self, fault: &Fault, times: u64) {
        *self.0.entry(kind_of(fault)).or_default() += times;
    }

    /// Kinds and numbers.
    #[must_use]
    pub const fn counts(&self) -> &BTreeMap<String, u64> {
        &self.0
    }

    /// Kinds that were injected fewer than `fewest` times.
    #[must_use]
    pub fn below(&self, fewest: u64) -> BTreeSet<&str> {
        let below = self.0.iter().filter(|(_, count)| **count < fewest);
        below.map(|(kind, _)| kind.as_str()).collect()
    }
}

/// Deck `number` of a seed.
#[must_use]
pub fn deck(seed: u64, number: u64) -> Vec<Scenario> {
    let mut dice = Dice::new(seed.wrapping_mul(0x1_0000_0001).wrapping_add(number));
    let name = |what: &str| format!("soak-{seed}-{number}-{what}");
    let mut harmless = harmless(&mut dice);
    shuffle(&mut harmless, &mut dice);
    let mut deck = Vec::new();
    for (faults, n) in harmless.chunks(AT_ONCE).zip(1..) {
        let mut made = scenario(name(&format!("unharmed-{n}")), dice.roll());
        made.vm = vec![vm("web", DiskPlace::Tmpfs), vm("db", DiskPlace::File)];
        made.vm[1].cpus = Some(2);
        made.step = steps(&mut dice);
        made.fault = faults.to_vec();
        deck.push(made);
    }
    deck.push(with_errors(name("errors"), &mut dice));
    deck.push(with_losses(name("lost"), &mut dice));
    deck.push(with_network(name("network"), &mut dice));
    deck
}

fn shuffle<T>(of: &mut [T], dice: &mut Dice) {
    for last in (1..of.len()).rev() {
        let with = dice.between(0, last as u64);
        of.swap(last, usize::try_from(with).unwrap_or(0));
    }
}

fn scenario(name: String, seed: u64) -> Scenario {
    Scenario {
        name,
        about: None,
        // As many bits as a number of TOML has.
        seed: seed >> 1,
        seconds: SECONDS,
        host: Vec::new(),
        link: Vec::new(),
        vm: Vec::new(),
        step: Vec::new(),
        fault: Vec::new(),
        random: None,
    }
}

fn vm(name: &str, on: DiskPlace) -> Vm {
    Vm {
        name: name.to_owned(),
        host: None,
        workload: Work::Blocks,
        cpus: None,
        network: None,
        disk: Some(Disk {
            size: "16MiB".to_owned(),
            on,
        }),
        expect: Expect::Unharmed,
    }
}

/// A fault of one of two machines at some moment.
fn at(point: &str, action: Action, dice: &mut Dice) -> Fault {
    let mut fault = bare(point, action);
    fault.at_ms = Some(dice.between(FAULTS_MS[0], FAULTS_MS[1]));
    fault.vm = dice.pick(&["web", "db"]).map(|&vm| vm.to_owned());
    let takes_time = matches!(
        action,
        Action::Stop
            | Action::Slow
            | Action::Starve
            | Action::Delay
            | Action::Shake
            | Action::Hang
            | Action::MemoryPressure
    );
    fault.ms = takes_time.then(|| dice.between(20, 300));
    match action {
        Action::Starve => fault.percent = Some(10),
        Action::Short | Action::Torn => fault.bytes = Some(dice.between(1, 511)),
        Action::Jump => {
            let by = i64::try_from(dice.between(1, 172_800_000)).unwrap_or(1);
            fault.jump_ms = Some(by - 86_400_000);
        }
        _ => {}
    }
    fault
}

fn message(action: Action, dice: &mut Dice) -> Fault {
    let is_done_to_it = !matches!(action, Action::Kill | Action::Stop);
    let points: Vec<&str> = ALWAYS.into_iter().collect();
    let mut point = *dice.pick(&points).unwrap_or(&ALWAYS[0]);
    // What happens to the message itself happens before it is sent.
    if is_done_to_it {
        point = point.trim_end_matches(":after");
    }
    let mut fault = at(point, action, dice);
    fault.at_ms = fault.at_ms.map(|ms| ms.min(BEATS_MS));
    if !is_done_to_it {
        fault.who = dice.pick(&[Who::Sender, Who::Receiver]).copied();
    }
    fault
}

/// Everything that a guest must not notice.
fn harmless(dice: &mut Dice) -> Vec<Fault> {
    let mut faults = Vec::new();
    for action in ON_MESSAGES {
        faults.push(message(action, dice));
    }
    for action in [Action::Kill, Action::Stop, Action::Slow, Action::Starve] {
        let kind = dice.pick(&DEVICES).copied().unwrap_or("blk");
        faults.push(at(&format!("process.{kind}"), action, dice));
    }
    for (call, action) in [
        (["pread64:before", "pwrite64:before"], Action::Short),
        (["pread64:before", "pwrite64:after"], Action::Delay),
        (["pwrite64:before", "pwrite64:after"], Action::Kill),
    ] {
        let call = dice.pick(&call).copied().unwrap_or("pread64:before");
        let mut fault = at(&format!("call.blk.{call}"), action, dice);
        // The other one's disk is read and written by a ring.
        fault.vm = Some("web".to_owned());
        faults.push(fault);
    }
    for action in [Action::Kill, Action::Stop, Action::Slow] {
        let mut fault = at("broker", action, dice);
        fault.vm = None;
        faults.push(fault);
    }
    // A request comes alone on its connection: there is no other to come first.
    let on_requests = ON_MESSAGES.into_iter();
    for action in on_requests.filter(|action| *action != Action::Reorder) {
        // Both are asked for all the time.
        let name = dice.pick(&["inspect", "output"]).copied();
        let name = name.unwrap_or("inspect");
        faults.push(at(&format!("api.{name}"), action, dice));
    }
    let mut shake = at("window.blk", Action::Shake, dice);
    shake.ms = Some(30);
    faults.push(shake);
    let kind = dice
        .pick(&["rng", "console", "vsock"])
        .copied()
        .unwrap_or("rng");
    let mut spoil = at(&format!("window.{kind}"), Action::Corrupt, dice);
    spoil.bytes = Some(512);
    faults.push(spoil);
    let kinds = ["vcpu", "blk", "console", "rng", "vsock", "broker"];
    let kind = dice.pick(&kinds).copied().unwrap_or("blk");
    faults.push(at(&format!("clock.{kind}"), Action::Jump, dice));
    let mut starve = at("machine", Action::Starve, dice);
    starve.percent = Some(30);
    faults.push(starve);
    faults
}

/// What an operator does meanwhile.
fn steps(dice: &mut Dice) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut step = |at_ms, deed, vm: &str, device: Option<&str>| {
        steps.push(Step {
            at_ms,
            deed,
            vm: Some(vm.to_owned()),
            device: device.map(str::to_owned),
        });
    };
    let at_ms = dice.between(FAULTS_MS[0], FAULTS_MS[1]);
    let vm = dice.pick(&["web", "db"]).copied().unwrap_or("web");
    let devices = ["disk0", "console", "legacy", "rng", "vsock"];
    let device = dice.pick(&devices).copied();
    match dice.between(0, 4) {
        0 => step(at_ms, Deed::RestartDevice, vm, device),
        1 => step(at_ms, Deed::Upgrade, vm, device),
        2 => {
            step(at_ms, Deed::Pause, vm, None);
            step(at_ms + dice.between(20, 300), Deed::Resume, vm, None);
        }
        3 => step(at_ms, Deed::RestartBroker, vm, None),
        _ => step(at_ms, Deed::Look, vm, None),
    }
    steps
}

/// Faults of which a guest is told.
fn with_errors(name: String, dice: &mut Dice) -> Scenario {
    let mut made = scenario(name, dice.roll());
    made.vm = vec![vm("web", DiskPlace::Tmpfs), vm("db", DiskPlace::Faulty)];
    // One's window is spoiled, and with it what the guest has in flight there.
    made.vm[0].expect = Expect::Harmed;
    made.vm[1].expect = Expect::Errors;
    let any = ["disk.read", "disk.write", "disk.flush"];
    for (points, action) in [
        (&any[..], Action::Error),
        (&any[..], Action::Delay),
        (&any[1..], Action::Hang),
        (&any[1..2], Action::Full),
        (&any[2..], Action::Lie),
    ] {
        let point = dice.pick(points).copied().unwrap_or("disk.write");
        let mut fault = at(point, action, dice);
        fault.vm = Some("db".to_owned());
        fault.at_ms = fault.at_ms.map(|ms| ms.min(BEATS_MS));
        made.fault.push(fault);
    }
    // After everything else: its guest says so and ends.
    let mut nmi = at("guest", Action::Nmi, dice);
    nmi.vm = Some("web".to_owned());
    nmi.at_ms = Some(dice.between(FAULTS_MS[1] + 50, FAULTS_MS[1] + 200));
    let call = dice.pick(&["pread64", "pwrite64"]).copied();
    let call = format!("call.blk.{}:before", call.unwrap_or("pread64"));
    let mut fail = at(&call, Action::Fail, dice);
    fail.errno = Some("EIO".to_owned());
    let mut spoil = at("window.blk", Action::Corrupt, dice);
    spoil.bytes = Some(512);
    for mut fault in [fail, spoil, nmi] {
        fault.vm = Some("web".to_owned());
        made.fault.push(fault);
    }
    made
}

/// Faults that may end a machine, or do.
fn with_losses(name: String, dice: &mut Dice) -> Scenario {
    let mut made = scenario(name, dice.roll());
    made.vm = vec![vm("web", DiskPlace::Faulty), vm("db", DiskPlace::Tmpfs)];
    for vm in &mut made.vm {
        vm.expect = Expect::Lost;
    }
    let mut put = |point: &str, action, vm: &str, [first, last]: [u64; 2], dice: &mut Dice| {
        let mut fault = at(point, action, dice);
        fault.at_ms = Some(dice.between(first, last));
        fault.vm = Some(vm.to_owned());
        made.fault.push(fault);
    };
    put("process.vcpu", Action::Kill, "db", [200, 500], dice);
    put("machine", Action::MemoryPressure, "web", [300, 500], dice);
    put("disk.write", Action::Torn, "web", [600, 700], dice);
    put("host", Action::Kill, "web", [750, 900], dice);
    made
}

/// Faults of the network between two hosts.
fn with_network(name: String, dice: &mut Dice) -> Scenario {
    let mut made = scenario(name, dice.roll());
    let hosts = ["left", "right"].map(str::to_owned);
    made.host = hosts.clone().map(|name| Host { name }).to_vec();
    let [from, to] = hosts;
    made.link = vec![Link { from, to }];
    made.vm = vec![vm("web", DiskPlace::Tmpfs), vm("db", DiskPlace::File)];
    made.vm[1].host = Some("right".to_owned());
    for action in [
        Action::Drop,
        Action::Delay,
        Action::Duplicate,
        Action::Reorder,
        Action::Corrupt,
        Action::Partition,
    ] {
        let mut fault = bare("network", action);
        fault.at_ms = Some(dice.between(FAULTS_MS[0], BEATS_MS));
        fault.ms = Some(dice.between(100, 500));
        fault.host = dice.pick(&["left", "right"]).map(|&host| host.to_owned());
        let has_share = !matches!(action, Action::Partition | Action::Delay);
        fault.percent = has_share
            .then(|| u8::try_from(dice.between(10, 60)).ok())
            .flatten();
        fault.latency_ms = (action == Action::Delay).then(|| dice.between(5, 60));
        made.fault.push(fault);
    }
    let mut kill = bare("broker", Action::Kill);
    kill.host = Some("right".to_owned());
    kill.at_ms = Some(dice.between(FAULTS_MS[0], FAULTS_MS[1]));
    made.fault.push(kill);
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_deck_has_passes_the_check_of_what_is_written() {
        for number in 0..200 {
            for scenario in deck(number % 3, number) {
                let text = toml::to_string(&scenario).unwrap();
                Scenario::parse("soak.toml", &text).unwrap();
            }
        }
    }

    #[test]
    fn every_deck_has_every_kind_and_every_family_and_action_there_is() {
        let kinds = |number| {
            let faults = deck(1, number).into_iter().flat_map(|s| s.fault);
            faults.map(|fault| kind_of(&fault)).collect::<BTreeSet<_>>()
        };
        let all = kinds(0);
        for number in 1..50 {
            assert_eq!(kinds(number), all);
        }
        assert_eq!(Tally::new().counts().len(), all.len());
        let mut possible = BTreeSet::new();
        for listed in crate::points::all() {
            let point = Point::named(&listed.point).unwrap();
            for action in Action::ALL {
                if crate::scenario::is_possible(&point, action) {
                    possible.insert(kind_of(&bare(&listed.point, action)));
                }
            }
        }
        assert_eq!(all, possible);
    }

    #[test]
    fn same_seed_makes_the_same_decks() {
        assert_eq!(deck(1, 2), deck(1, 2));
        assert_ne!(deck(1, 2), deck(1, 3));
        assert_ne!(deck(1, 2), deck(2, 2));
    }

    #[test]
    fn kinds_that_came_too_seldom_are_told() {
        let mut tally = Tally::new();
        assert!(tally.below(1).contains("host.kill"));
        tally.add(&bare("host", Action::Kill), 20);
        assert!(!tally.below(20).contains("host.kill"));
        assert!(tally.below(21).contains("host.kill"));
    }
}
