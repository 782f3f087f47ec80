//! What a scenario may say. Every error names file, line and key.

use super::schema::{Action, Disk, DiskPlace, Expect, Fault, Link, Scenario, Vm, Who, Work};
use crate::network::HOSTS_MAX;
use crate::points::{Point, can_be_short, kind_named};
use bulkhead_ipc::ident::ProcKind;
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::path::Path;

/// Longest workload in seconds.
const SECONDS_MAX: u64 = 3600;
/// Most faults of one scenario, drawn ones included.
const FAULTS_MAX: usize = 10_000;
/// Longest disk in bytes: the harness keeps one in memory.
const DISK_BYTES_MAX: u64 = 1 << 30;

/// Why a scenario cannot be run.
#[derive(Debug, thiserror::Error)]
pub enum ScenarioError {
    /// It cannot be read.
    #[error("{file}: {cause}")]
    Io {
        /// Which file.
        file: String,
        /// The kernel's error.
        cause: std::io::Error,
    },
    /// It is no TOML, or has keys that are not known.
    #[error("{file}:{line}: {what}")]
    Syntax {
        /// Which file.
        file: String,
        /// Which line, from 1.
        line: usize,
        /// What was expected.
        what: String,
    },
    /// A value that cannot be.
    #[error("{file}:{line}: {key}: {what}")]
    Value {
        /// Which file.
        file: String,
        /// The line at which the table begins that the key is in.
        line: usize,
        /// Which key.
        key: String,
        /// What was expected.
        what: String,
    },
}

/// A key and what is wrong with its value.
type Wrong = (&'static str, String);

impl Scenario {
    /// Reads a file.
    ///
    /// # Errors
    /// The first fault of it.
    pub fn load(path: &Path) -> Result<Self, ScenarioError> {
        let file = path.display().to_string();
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&file, &text),
            Err(cause) => Err(ScenarioError::Io { file, cause }),
        }
    }

    /// Reads a text.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn parse(file: &str, text: &str) -> Result<Self, ScenarioError> {
        let scenario: Self = toml::from_str(text).map_err(|error| ScenarioError::Syntax {
            file: file.to_owned(),
            line: error.span().map_or(1, |span| line_of(text, span.start)),
            what: error.message().to_owned(),
        })?;
        scenario.check(file, text)?;
        Ok(scenario)
    }

    fn check(&self, file: &str, text: &str) -> Result<(), ScenarioError> {
        let wrong = |line: usize, (key, what): Wrong| ScenarioError::Value {
            file: file.to_owned(),
            line,
            key: key.to_owned(),
            what,
        };
        self.check_whole()
            .map_err(|w| wrong(line_with(text, w.0), w))?;
        for (n, vm) in self.vm.iter().enumerate() {
            self.check_vm(vm)
                .map_err(|w| wrong(table(text, "vm", n), w))?;
        }
        for (n, link) in self.link.iter().enumerate() {
            self.check_link(link)
                .map_err(|w| wrong(table(text, "link", n), w))?;
        }
        for (n, step) in self.step.iter().enumerate() {
            let checked = self.check_name("vm", step.vm.as_deref());
            checked.map_err(|w| wrong(table(text, "step", n), w))?;
        }
        for (n, fault) in self.fault.iter().enumerate() {
            let checked = self.check_fault(fault);
            checked.map_err(|w| wrong(table(text, "fault", n), w))?;
        }
        Ok(())
    }

    fn check_whole(&self) -> Result<(), Wrong> {
        if self.name.is_empty() || self.name.contains('/') {
            return Err(("name", "expected a name without `/`".to_owned()));
        }
        if !(1..=SECONDS_MAX).contains(&self.seconds) {
            return Err(("seconds", format!("expected 1 to {SECONDS_MAX}")));
        }
        let hosts = self.host.iter();
        let names: BTreeSet<&str> = hosts.map(|host| host.name.as_str()).collect();
        if names.len() != self.host.len() || names.len() > HOSTS_MAX {
            let what = format!("expected at most {HOSTS_MAX}, with names of their own");
            return Err(("host", what));
        }
        if self.vm.is_empty() {
            return Err(("vm", "expected at least one machine".to_owned()));
        }
        let drawn = self.random.as_ref().map_or(0, |random| random.count);
        let drawn = usize::try_from(drawn).unwrap_or(usize::MAX);
        if self.fault.len().saturating_add(drawn) > FAULTS_MAX {
            return Err(("fault", format!("expected at most {FAULTS_MAX} faults")));
        }
        Ok(())
    }

    fn check_vm(&self, vm: &Vm) -> Result<(), Wrong> {
        let same = self.vm.iter().filter(|other| other.name == vm.name);
        if same.count() > 1 {
            return Err(("name", format!("`{}` is there twice", vm.name)));
        }
        self.check_name("host", vm.host.as_deref())?;
        if vm.network.is_none() && matches!(vm.workload, Work::Serve | Work::Take) {
            return Err(("network", "this workload needs one".to_owned()));
        }
        if vm.workload == Work::Take && self.server_of(vm).is_none() {
            let what = "expected a machine with workload = \"serve\" there".to_owned();
            return Err(("network", what));
        }
        match &vm.disk {
            Some(disk) => disk.bytes().map(|_| ()),
            None => Ok(()),
        }
    }

    /// The machine that serves in a machine's network.
    #[must_use]
    pub fn server_of(&self, vm: &Vm) -> Option<&Vm> {
        let same = |other: &&Vm| (&other.host, &other.network) == (&vm.host, &vm.network);
        let mut others = self.vm.iter().filter(same);
        others.find(|other| other.workload == Work::Serve)
    }

    fn check_name(&self, key: &'static str, name: Option<&str>) -> Result<(), Wrong> {
        let Some(name) = name else { return Ok(()) };
        let known = match key {
            "vm" => self.vm.iter().any(|vm| vm.name == name),
            _ => self.host.iter().any(|host| host.name == name),
        };
        match known {
            true => Ok(()),
            false => Err((key, format!("there is no {key} `{name}` in this scenario"))),
        }
    }

    fn check_fault(&self, fault: &Fault) -> Result<(), Wrong> {
        let Some(point) = Point::named(&fault.point) else {
            let what = format!("`{}`: see bulkhead fault points", fault.point);
            return Err(("point", what));
        };
        self.check_name("vm", fault.vm.as_deref())?;
        self.check_name("host", fault.host.as_deref())?;
        if !is_possible(&point, fault.action) {
            let what = format!("{:?} cannot be done at `{}`", fault.action, fault.point);
            return Err(("do", what));
        }
        let whens = [
            fault.nth,
            fault.at_ms,
            fault.between_ms.map(|[first, _]| first),
        ];
        if whens.iter().flatten().count() > 1 {
            let what = "expected one of nth, at_ms and between_ms".to_owned();
            return Err(("nth", what));
        }
        if fault.nth == Some(0) {
            return Err(("nth", "counts from 1".to_owned()));
        }
        if fault.nth.is_some() && !point.is_reached() {
            return Err(("nth", "this point has a time, not a number".to_owned()));
        }
        if !point.is_reached() && whens.iter().flatten().count() == 0 && fault.every_ms.is_none() {
            return Err(("at_ms", "this point needs a time".to_owned()));
        }
        if fault.between_ms.is_some_and(|[first, last]| first > last) {
            return Err(("between_ms", "the first is after the last".to_owned()));
        }
        if fault.every_ms == Some(0) {
            return Err(("every_ms", "expected more than 0".to_owned()));
        }
        if let Some(process) = &fault.process {
            check_process(process)?;
        }
        if point == Point::Host {
            self.check_host(fault)?;
        }
        if point == Point::Network {
            self.check_network(fault)?;
        }
        self.check_disk(&point, fault)?;
        check_parameters(fault)
    }

    /// Nothing of a machine outlives its host.
    fn check_host(&self, fault: &Fault) -> Result<(), Wrong> {
        let first = self.host.first().map(|host| &host.name);
        let host = fault.host.as_ref().or(first);
        let mut on_it = self
            .vm
            .iter()
            .filter(|vm| vm.host.as_ref().or(first) == host);
        match on_it.find(|vm| vm.expect != Expect::Lost) {
            None => Ok(()),
            Some(vm) => {
                let what = format!("`{}` of this host must have expect = \"lost\"", vm.name);
                Err(("vm", what))
            }
        }
    }

    /// Frames go from host to host, for a while.
    fn check_network(&self, fault: &Fault) -> Result<(), Wrong> {
        if self.host.len() < 2 {
            return Err(("point", "a network has at least two hosts".to_owned()));
        }
        if fault.ms.is_none() {
            return Err(("ms", "expected how long".to_owned()));
        }
        if fault.action == Action::Delay && fault.latency_ms.is_none() {
            return Err(("latency_ms", "expected how late each frame is".to_owned()));
        }
        match fault.who {
            Some(_) if fault.host.is_none() => {
                Err(("host", "expected the one that sends or receives".to_owned()))
            }
            Some(Who::Broker) => Err(("who", "expected sender or receiver".to_owned())),
            _ => Ok(()),
        }
    }

    fn check_link(&self, link: &Link) -> Result<(), Wrong> {
        for (key, name) in [("from", &link.from), ("to", &link.to)] {
            if !self.host.iter().any(|host| host.name == *name) {
                return Err((key, format!("there is no host `{name}` in this scenario")));
            }
        }
        if link.from == link.to {
            return Err(("to", "expected another host than `from`".to_owned()));
        }
        match self.link.iter().filter(|other| other.to == link.to).count() {
            1 => Ok(()),
            _ => Err(("to", format!("`{}` receives from another already", link.to))),
        }
    }

    fn check_disk(&self, point: &Point, fault: &Fault) -> Result<(), Wrong> {
        if !matches!(point, Point::Disk(_)) {
            return Ok(());
        }
        let about = |vm: &&Vm| fault.vm.as_ref().is_none_or(|name| *name == vm.name);
        let faulty = |vm: &Vm| vm.disk.as_ref().is_some_and(|d| d.on == DiskPlace::Faulty);
        match self.vm.iter().filter(about).any(faulty) {
            true => Ok(()),
            false => Err((
                "point",
                "no machine has a disk with on = \"faulty\"".to_owned(),
            )),
        }
    }
}

fn check_process(name: &str) -> Result<(), Wrong> {
    let digits = name.trim_start_matches(|c: char| c.is_ascii_alphabetic());
    let kind = name.strip_suffix(digits).unwrap_or(name);
    let known = kind_named(kind).is_some() && digits.parse::<u16>().is_ok();
    match known {
        true => Ok(()),
        false => Err((
            "process",
            format!("`{name}`: expected a kind and a number, as blk0"),
        )),
    }
}

fn check_parameters(fault: &Fault) -> Result<(), Wrong> {
    let takes_time = matches!(
        fault.action,
        Action::Stop
            | Action::Slow
            | Action::Starve
            | Action::MemoryPressure
            | Action::Delay
            | Action::Shake
            | Action::Hang
    );
    if takes_time && fault.ms.is_none() {
        return Err(("ms", "expected how long".to_owned()));
    }
    if fault.action == Action::Fail && fault.errno().is_none() {
        return Err(("errno", "expected the name of an error, as EIO".to_owned()));
    }
    if matches!(fault.action, Action::Short | Action::Torn) && fault.bytes.is_none() {
        return Err(("bytes", "expected how many".to_owned()));
    }
    if fault.action == Action::Jump && fault.jump_ms.is_none() {
        return Err(("jump_ms", "expected by how much".to_owned()));
    }
    // The kernel's smallest quota is a twentieth of the period that is used.
    let least = if fault.action == Action::Starve { 5 } else { 1 };
    if fault.percent.is_some_and(|p| !(least..=100).contains(&p)) {
        return Err(("percent", format!("expected {least} to 100")));
    }
    Ok(())
}

/// What can be done at a point.
#[must_use]
pub fn is_possible(point: &Point, action: Action) -> bool {
    use crate::disk::DiskOp;
    use crate::points::When;
    match point {
        Point::Message(_, when) => match action {
            Action::Kill | Action::Stop => true,
            Action::Drop
            | Action::Delay
            | Action::Duplicate
            | Action::Reorder
            | Action::Corrupt
            | Action::Truncate => *when == When::Before,
            _ => false,
        },
        Point::Api(_, when) => match action {
            Action::Kill | Action::Stop | Action::Drop | Action::Delay | Action::Truncate => true,
            Action::Duplicate | Action::Corrupt => *when == When::Before,
            _ => false,
        },
        Point::Call(_, call, when) => match action {
            Action::Kill | Action::Delay => true,
            Action::Fail => *when == When::Before,
            Action::Short => *when == When::Before && can_be_short(call),
            _ => false,
        },
        Point::Process(_) => matches!(
            action,
            Action::Kill | Action::Stop | Action::Slow | Action::Starve
        ),
        Point::Window(ProcKind::Legacy) => action == Action::Corrupt,
        Point::Window(_) => matches!(action, Action::Corrupt | Action::Shake),
        Point::Clock(_) => action == Action::Jump,
        Point::Guest => action == Action::Nmi,
        Point::Machine => matches!(action, Action::MemoryPressure | Action::Starve),
        Point::Broker => matches!(action, Action::Kill | Action::Stop | Action::Slow),
        Point::Host => action == Action::Kill,
        Point::Network => matches!(
            action,
            Action::Drop
                | Action::Delay
                | Action::Duplicate
                | Action::Reorder
                | Action::Corrupt
                | Action::Partition
        ),
        Point::Disk(op) => match action {
            Action::Error | Action::Delay | Action::Hang => true,
            Action::Full | Action::Torn => *op == DiskOp::Write,
            Action::Lie => *op == DiskOp::Flush,
            _ => false,
        },
    }
}

impl Fault {
    /// The error that it is about.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        let name = self.errno.as_deref()?;
        let known = (1..134).map(Errno::from_raw);
        known
            .filter(|errno| *errno != Errno::UnknownErrno)
            .find(|errno| format!("{errno:?}") == name)
    }
}

impl Disk {
    /// Its size in bytes.
    ///
    /// # Errors
    /// What was expected.
    pub fn bytes(&self) -> Result<u64, Wrong> {
        let digits = self
            .size
            .trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = self.size.strip_prefix(digits).unwrap_or_default();
        let shift = match unit {
            "" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            _ => 64,
        };
        let bytes = digits
            .parse::<u64>()
            .ok()
            .and_then(|n| n.checked_mul(1u64.checked_shl(shift)?));
        bytes
            .filter(|bytes| (512..=DISK_BYTES_MAX).contains(bytes) && bytes.is_multiple_of(512))
            .ok_or_else(|| ("disk.size", format!("`{}`: expected as 16MiB", self.size)))
    }
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.get(..at).unwrap_or(text);
    before.matches('\n').count() + 1
}

/// The line that sets `key` at the top.
fn line_with(text: &str, key: &str) -> usize {
    let at = text
        .lines()
        .position(|line| line.trim_start().starts_with(key));
    at.map_or(1, |at| at + 1)
}

/// The line of the N-th `[[name]]`.
fn table(text: &str, name: &str, n: usize) -> usize {
    let head = format!("[[{name}]]");
    let mut lines = text.lines().enumerate();
    let mut heads = lines.by_ref().filter(|(_, line)| line.trim() == head);
    heads.nth(n).map_or(1, |(at, _)| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "name = \"x\"\n[[vm]]\nname = \"a\"\nworkload = \"blocks\"\n[[fault]]\n";

    fn error(fault: &str) -> String {
        let error = Scenario::parse("s.toml", &format!("{HEAD}{fault}\n")).unwrap_err();
        error.to_string()
    }

    #[test]
    fn errors_name_file_line_and_key() {
        for (fault, expected) in [
            (
                "point = \"nowhere\"\ndo = \"kill\"",
                "s.toml:5: point: `nowhere`",
            ),
            ("point = \"host\"\ndo = \"kill\"", "s.toml:5: at_ms: "),
            (
                "point = \"host\"\ndo = \"drop\"\nat_ms = 1",
                "s.toml:5: do: Drop",
            ),
            (
                "point = \"host\"\ndo = \"kill\"\nnth = 1",
                "s.toml:5: nth: ",
            ),
            (
                "point = \"process.blk\"\ndo = \"stop\"\nat_ms = 1",
                "s.toml:5: ms: ",
            ),
            (
                "point = \"disk.read\"\ndo = \"error\"",
                "s.toml:5: point: no machine",
            ),
            (
                "point = \"call.blk.write\"\ndo = \"fail\"",
                "s.toml:5: errno: ",
            ),
            (
                "point = \"call.blk.write\"\ndo = \"fail\"\nerrno = \"EWHAT\"",
                "s.toml:5: errno: ",
            ),
            (
                "point = \"host\"\ndo = \"kill\"\nwhen = 1",
                "s.toml:8: unknown field `when`",
            ),
            (
                "point = \"process.blk\"\ndo = \"starve\"\nat_ms = 1\nms = 9\npercent = 4",
                "s.toml:5: percent: expected 5 to 100",
            ),
            (
                "point = \"network\"\ndo = \"partition\"\nat_ms = 1\nms = 9",
                "s.toml:5: point: a network has",
            ),
            (
                "point = \"host\"\ndo = \"explode\"",
                "s.toml:7: unknown variant `explode`",
            ),
            (
                "point = \"host\"\ndo = \"kill\"\nat_ms = 1\nvm = \"b\"",
                "s.toml:5: vm: there is no vm `b`",
            ),
            (
                "point = \"born.locked\"\ndo = \"kill\"\nprocess = \"disk\"",
                "s.toml:5: process: `disk`",
            ),
        ] {
            let error = error(fault);
            assert!(error.starts_with(expected), "{fault}: {error}");
        }
    }

    #[test]
    fn errors_of_the_kernel_have_their_names() {
        let mut fault = crate::random::bare("call.blk.pwrite64", Action::Fail);
        for (name, errno) in [("EIO", Errno::EIO), ("ENOSPC", Errno::ENOSPC)] {
            fault.errno = Some(name.to_owned());
            assert_eq!(fault.errno(), Some(errno));
        }
    }
}
