//! Everything that the seed decides, before anything is started: the same seed is the same faults at
//! the same points.

use crate::messages::Boundary;
use crate::scenario::{Action, DiskPlace, Family, Fault, Scenario, Who};
use serde::Serialize;

/// SplitMix64: small, and the same everywhere for ever.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    /// Of a seed.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number from `first` to `last`.
    pub fn between(&mut self, first: u64, last: u64) -> u64 {
        let span = last.saturating_sub(first).saturating_add(1);
        first + self.roll() % span.max(1)
    }

    /// One of several; `None` of none.
    pub fn pick<'a, T>(&mut self, of: &'a [T]) -> Option<&'a T> {
        let len = u64::try_from(of.len()).ok().filter(|&len| len > 0)?;
        of.get(usize::try_from(self.roll() % len).ok()?)
    }
}

/// A fault with nothing left to decide.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Number in the plan, from 1.
    pub id: u32,
    /// What and where; `between_ms` and `every_ms` have become `at_ms`.
    #[serde(flatten)]
    pub fault: Fault,
    /// Seed of what the fault itself draws: bits, bytes.
    #[serde(skip)]
    pub seed: u64,
}

/// The whole plan of a scenario.
#[must_use]
pub fn plan(scenario: &Scenario, seed: u64) -> Vec<Planned> {
    let mut dice = Dice::new(seed);
    let mut faults = Vec::new();
    for fault in &scenario.fault {
        settle(fault, &mut dice, &mut faults);
    }
    if let Some(random) = &scenario.random {
        for _ in 0..random.count {
            if let Some(fault) = draw(scenario, &random.families, &mut dice) {
                settle(&fault, &mut dice, &mut faults);
            }
        }
    }
    let number = |n: usize| u32::try_from(n + 1).unwrap_or(u32::MAX);
    let planned = faults.into_iter().enumerate().map(|(n, mut fault)| {
        // As many bits as a number of TOML has.
        let drawn = dice.roll() >> 1;
        let seed = *fault.seed.get_or_insert(drawn);
        Planned {
            id: number(n),
            fault,
            seed,
        }
    });
    planned.collect()
}

/// Decides when a fault happens.
fn settle(fault: &Fault, dice: &mut Dice, into: &mut Vec<Fault>) {
    let mut fault = fault.clone();
    if let Some([first, last]) = fault.between_ms.take() {
        fault.at_ms = Some(dice.between(first, last));
    }
    let Some(every) = fault.every_ms.take() else {
        if fault.at_ms.is_none() && fault.nth.is_none() {
            fault.nth = Some(1);
        }
        return into.push(fault);
    };
    let first = fault.at_ms.unwrap_or(every);
    for n in 0..fault.times.take().unwrap_or(1) {
        let mut one = fault.clone();
        one.at_ms = Some(first + n * every);
        into.push(one);
    }
}

/// A fault without parameters.
#[must_use]
pub fn bare(point: &str, action: Action) -> Fault {
    Fault {
        point: point.to_owned(),
        action,
        vm: None,
        process: None,
        host: None,
        nth: None,
        at_ms: None,
        between_ms: None,
        every_ms: None,
        times: None,
        ms: None,
        errno: None,
        bytes: None,
        who: None,
        sectors: None,
        seed: None,
        percent: None,
        jump_ms: None,
        latency_ms: None,
    }
}

/// Heartbeats go on for as long as a machine lives: these points are always reached.
pub const ALWAYS: [&str; 4] = [
    "to-device.ping:before",
    "to-device.ping:after",
    "from-device.pong:before",
    "from-device.pong:after",
];
/// What can be done to a message, or to who sends or gets it.
pub const ON_MESSAGES: [Action; 8] = [
    Action::Kill,
    Action::Stop,
    Action::Drop,
    Action::Delay,
    Action::Duplicate,
    Action::Reorder,
    Action::Corrupt,
    Action::Truncate,
];
const DEVICES: [&str; 5] = ["blk", "console", "legacy", "rng", "vsock"];
const ON_PROCESSES: [Action; 4] = [Action::Kill, Action::Stop, Action::Slow, Action::Starve];
/// Calls of a disk in memory that are made all the time, and what a process must stand.
const CALLS: [(&str, Action); 6] = [
    ("call.blk.pread64:before", Action::Delay),
    ("call.blk.pread64:before", Action::Short),
    ("call.blk.pwrite64:before", Action::Short),
    ("call.blk.pwrite64:before", Action::Kill),
    ("call.blk.pwrite64:after", Action::Kill),
    ("call.blk.epoll_wait:before", Action::Delay),
];

fn draw(scenario: &Scenario, families: &[Family], dice: &mut Dice) -> Option<Fault> {
    const ALL: [Family; 4] = [
        Family::Message,
        Family::Process,
        Family::Call,
        Family::Broker,
    ];
    let families = if families.is_empty() { &ALL } else { families };
    let vm = dice.pick(&scenario.vm)?;
    let last_ms = (scenario.seconds * 1000).saturating_sub(500).max(400);
    let at_ms = dice.between(200, last_ms);
    let mut fault = match *dice.pick(families)? {
        Family::Message => message(dice)?,
        Family::Process => {
            let kind = dice.pick(&DEVICES)?;
            bare(&format!("process.{kind}"), *dice.pick(&ON_PROCESSES)?)
        }
        Family::Call => {
            let in_memory = vm.disk.as_ref().is_none_or(|d| d.on == DiskPlace::Tmpfs);
            let (point, action) = match in_memory {
                true => dice.pick(&CALLS)?,
                false => &("call.blk.epoll_wait:before", Action::Delay),
            };
            bare(point, *action)
        }
        Family::Disk => match dice.roll() % 3 {
            0 => bare("disk.read", Action::Delay),
            1 => bare("disk.write", Action::Delay),
            _ => bare("disk.flush", Action::Delay),
        },
        Family::Broker => bare("broker", Action::Kill),
        Family::Host => bare("host", Action::Kill),
    };
    // A heartbeat comes once a second, and a guest may be done a little early.
    let last_beat = (scenario.seconds * 1000).saturating_sub(1700).max(200);
    let is_message = Boundary::ALL.iter().any(|b| {
        let mut names = b.messages().iter();
        names.any(|name| fault.point.starts_with(name))
    });
    fault.at_ms = Some(if is_message {
        at_ms.min(last_beat)
    } else {
        at_ms
    });
    if !matches!(fault.point.as_str(), "broker" | "host") {
        fault.vm = Some(vm.name.clone());
    }
    let takes_time = [Action::Stop, Action::Slow, Action::Starve, Action::Delay];
    if takes_time.contains(&fault.action) {
        fault.ms = Some(dice.between(20, 400));
    }
    match fault.action {
        Action::Starve => fault.percent = Some(10),
        Action::Short => fault.bytes = Some(dice.between(1, 511)),
        _ => {}
    }
    Some(fault)
}

/// A fault on a heartbeat.
fn message(dice: &mut Dice) -> Option<Fault> {
    let point = *dice.pick(&ALWAYS)?;
    // What happens to the message itself happens before it is sent.
    let actions = match point.ends_with(":after") {
        true => &ON_MESSAGES[..2],
        false => &ON_MESSAGES[..],
    };
    let action = *dice.pick(actions)?;
    let mut fault = bare(point, action);
    if matches!(action, Action::Kill | Action::Stop) {
        fault.who = Some(*dice.pick(&[Who::Sender, Who::Receiver, Who::Broker])?);
    }
    Some(fault)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scenario(text: &str) -> Scenario {
        toml::from_str(text).unwrap()
    }

    const DRAWN: &str = "name = \"d\"\nvm = [{ name = \"a\", workload = \"blocks\" }]\n\
        [[fault]]\npoint = \"process.blk\"\ndo = \"kill\"\nbetween_ms = [100, 900]\n\
        [random]\ncount = 30\n";

    #[test]
    fn same_seed_draws_the_same_and_another_does_not() {
        let scenario = scenario(DRAWN);
        let plans = [1, 1, 2].map(|seed| plan(&scenario, seed));
        assert_eq!(plans[0].len(), 31);
        assert_eq!(plans[0], plans[1]);
        assert_ne!(plans[0], plans[2]);
        let at = plans[0][0].fault.at_ms.unwrap();
        assert!((100..=900).contains(&at));
    }

    #[test]
    fn what_is_drawn_passes_the_check_of_what_is_written() {
        for seed in 0..50 {
            let mut scenario = scenario(DRAWN);
            scenario.fault = plan(&scenario, seed).into_iter().map(|p| p.fault).collect();
            scenario.random = None;
            let text = toml::to_string(&scenario).unwrap();
            Scenario::parse("drawn.toml", &text).unwrap();
        }
    }

    #[test]
    fn every_ms_becomes_several_moments() {
        let text = "name = \"d\"\nvm = [{ name = \"a\", workload = \"blocks\" }]\n\
            [[fault]]\npoint = \"process.blk\"\ndo = \"kill\"\nevery_ms = 300\ntimes = 3\n";
        let at: Vec<_> = plan(&scenario(text), 1)
            .iter()
            .map(|planned| planned.fault.at_ms)
            .collect();
        assert_eq!(at, [Some(300), Some(600), Some(900)]);
    }
}
