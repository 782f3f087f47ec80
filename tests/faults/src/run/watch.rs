//! Watches a guest: what it says goes to its checker and the time line, and its machine's state is
//! asked for until it has ended.

use super::{Machine, Run, tell_guest};
use crate::scenario::Expect;
use crate::timeline::{Part, Timeline};
use crate::workload::{Checker, Verified, Workload};
use serde_json::Value;
use std::io::Write;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How often a guest's console is read.
const POLL: Duration = Duration::from_millis(40);

/// A guest that is watched.
pub(super) struct Watched<'a> {
    run: &'a Run,
    machine: &'a Machine,
    works: AtomicBool,
    is_done: AtomicBool,
    is_over: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    checker: Option<Box<dyn Checker>>,
    /// Bytes of the console that were read.
    position: usize,
    /// Whether the guest has said that it is done, and with how many errors.
    done: Option<u64>,
    /// How often it was started again.
    starts: u32,
}

impl<'a> Watched<'a> {
    pub(super) fn new(run: &'a Run, machine: &'a Machine) -> Self {
        let checker = Workload::from(machine.vm.workload).checker(run.seed);
        Self {
            run,
            machine,
            works: AtomicBool::new(false),
            is_done: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
            inner: Mutex::new(Inner {
                checker: Some(checker),
                position: 0,
                done: None,
                starts: 0,
            }),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn name(&self) -> &str {
        &self.machine.vm.name
    }

    /// Whether the guest's workload has begun.
    pub(super) fn works(&self) -> bool {
        self.works.load(Ordering::SeqCst) || self.is_done()
    }

    /// Whether its machine has ended.
    pub(super) fn is_done(&self) -> bool {
        self.is_done.load(Ordering::SeqCst) || self.machine.is_unborn.load(Ordering::SeqCst)
    }

    /// Nobody waits for it any more.
    pub(super) fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// Until its machine has ended.
    pub(super) fn watch(&self) {
        let mut console = None;
        let types = self.run.keeps_consoles();
        while !self.is_over.load(Ordering::SeqCst) && !self.is_done() {
            self.read(false);
            self.ask();
            if types && self.works() {
                self.type_in(&mut console);
            }
            std::thread::sleep(POLL);
        }
        if let Some(mut console) = console {
            let _dead = console.kill();
            let _reaped = console.wait();
        }
    }

    /// Reads what is new on the console.
    fn read(&self, is_final: bool) {
        let Some(host) = self.run.host_of(self.machine) else {
            return;
        };
        // A broker that is away or stopped is asked again.
        let read = host.run(&["logs", self.name(), "--console"], Duration::from_secs(2));
        if !read.is_good() {
            return;
        }
        let mut inner = self.inner();
        let unheard = std::mem::take(&mut *self.machine.unheard());
        if !unheard.is_empty() {
            let at = self.run.timeline.now().unwrap_or_default();
            // Devices that never came are an error of that start, and its guest may tell so.
            for line in unheard
                .lines()
                .filter(|line| !line.starts_with("BH error "))
            {
                self.hear(&mut inner, at, line);
            }
            // What its power was cut at is on its disk.
            inner.position = 0;
        }
        // A machine that was started again may begin with an empty console.
        if read.output.len() < inner.position {
            inner.position = 0;
        }
        let new = read.output.get(inner.position..).unwrap_or_default();
        let at = self.run.timeline.now().unwrap_or_default();
        for line in new.split_inclusive('\n') {
            // The last line may be half of one, which is shown as if it were whole.
            let is_last = inner.position + line.len() >= read.output.len();
            if is_last && !is_final {
                self.begins(line);
                break;
            }
            inner.position += line.len();
            self.hear(&mut inner, at, line.trim_end());
        }
    }

    /// Whether a line says that the guest's work has begun.
    fn begins(&self, line: &str) {
        let is_record = line.starts_with("BH ") && !line.starts_with("BH hello");
        if is_record && line.len() > 8 || line.starts_with("bh.files ") {
            self.works.store(true, Ordering::SeqCst);
        }
    }

    fn hear(&self, inner: &mut Inner, at: Duration, line: &str) {
        tell_guest(&self.run.timeline, self.name(), line);
        self.begins(line);
        if let Some(errors) = line.strip_prefix("BH done errors=") {
            inner.done = errors.trim().parse().ok();
        }
        if let Some(checker) = &mut inner.checker {
            checker.record(at, line);
        }
    }

    /// Asks for the machine's state.
    fn ask(&self) {
        let Some(host) = self.run.host_of(self.machine) else {
            return;
        };
        let about = host.run(&["inspect", self.name(), "--json"], Duration::from_secs(2));
        let Ok(about) = serde_json::from_str::<Value>(&about.output) else {
            return;
        };
        let state = about["state"].as_str().unwrap_or_default();
        let has_run = !about["last_run"].is_null();
        if !matches!(state, "stopped" | "crashed" | "failed" | "ended") || !has_run {
            return;
        }
        // What it said last: nothing is added any more.
        self.read(true);
        let last = &about["last_run"];
        let how = last["ending"].as_str().unwrap_or("unknown");
        self.ended(how, last);
    }

    fn ended(&self, how: &str, last: &Value) {
        let mut inner = self.inner();
        // A guest that says nothing at all is its checker's concern.
        let is_whole = inner.done.unwrap_or(0) == 0 && how == "powered_off";
        let was_ended = self.machine.is_ended.load(Ordering::SeqCst);
        let lost = self.run.may_be_lost(self.machine);
        if !is_whole && lost && !was_ended && inner.starts < 5 && inner.done.is_none() {
            // It was lost, as was to be expected: its work begins again, on the disk as it is.
            inner.starts += 1;
            if let Some(checker) = &mut inner.checker {
                show_disk(self.run, self.machine, checker.as_mut());
            }
            // Its console begins anew.
            inner.position = 0;
            drop(inner);
            self.run.timeline.note(format!(
                "{} was lost ({how}); it is started again",
                self.name()
            ));
            return self.run.start(self.machine);
        }
        drop(inner);
        let done = self.inner().done;
        let is_explained = matches!(self.machine.vm.expect, Expect::Errors | Expect::Harmed);
        // Its process may be lost as well when its guest is done.
        let is_done = lost && done == Some(0);
        if !(is_whole || was_ended || is_explained || is_done) {
            self.run.error(format!(
                "{} ended with {how} (errors of the guest: {done:?}): {last}",
                self.name()
            ));
        }
        self.is_done.store(true, Ordering::SeqCst);
    }

    /// Types what the checker wants typed.
    fn type_in(&self, console: &mut Option<Child>) {
        let at = self.run.timeline.now().unwrap_or_default();
        let mut inner = self.inner();
        let line = inner
            .checker
            .as_mut()
            .and_then(|checker| checker.typing(at));
        drop(inner);
        let (Some(line), Some(host)) = (line, self.run.host_of(self.machine)) else {
            return;
        };
        if console.is_none() {
            match host.console(self.name()) {
                Ok(child) => *console = Some(child),
                Err(error) => self
                    .run
                    .error(format!("the console of {}: {error}", self.name())),
            }
        }
        let input = console.as_mut().and_then(|child| child.stdin.as_mut());
        if let Some(Err(error)) = input.map(|input| writeln!(input, "{line}")) {
            self.run
                .error(format!("typing to {}: {error}", self.name()));
        }
    }

    /// What the checker says, of the console and of the disk.
    pub(super) fn verdict(self) -> (String, u64) {
        let name = self.name().to_owned();
        let (run, machine) = (self.run, self.machine);
        let inner = self.inner.into_inner();
        let inner = inner.unwrap_or_else(PoisonError::into_inner);
        let Some(mut checker) = inner.checker else {
            return (name, 0);
        };
        show_disk(run, machine, checker.as_mut());
        let Verified {
            count,
            refused,
            errors,
            told,
        } = checker.finish();
        let expect = machine.vm.expect;
        let refused = (refused > 0).then(|| format!("{refused} requests were refused"));
        let is_explained = matches!(expect, Expect::Errors | Expect::Harmed);
        let told = told.into_iter().chain(refused);
        let told = told.map(|error| (error, is_explained));
        let errors = errors.into_iter();
        let errors = errors.map(|error| (error, expect == Expect::Harmed));
        for (error, is_explained) in told.chain(errors) {
            match is_explained {
                true => run.timeline.note(format!("{name}: {error}")),
                false => run.error(format!("{name}: {error}")),
            }
        }
        // Who ended it did not wait for its work.
        let was_ended = machine.is_ended.load(Ordering::SeqCst);
        (name, if was_ended { count.max(1) } else { count })
    }
}

/// Shows a machine's disk to its checker.
fn show_disk(run: &Run, machine: &Machine, checker: &mut dyn Checker) {
    let image = match &machine.disk {
        Some(disk) => Ok(disk.image()),
        None => std::fs::read(&machine.image),
    };
    match image {
        Ok(image) => checker.image(&image),
        Err(error) => run.error(format!("the disk of {}: {error}", machine.vm.name)),
    }
}

/// Puts an event of a broker's log on the time line, at the time that the broker gives.
pub(super) fn tell_event(timeline: &Timeline, vm: &str, line: &str) {
    let Ok(Value::Object(mut event)) = serde_json::from_str(line) else {
        return;
    };
    let name = event.remove("event");
    let name = name.as_ref().and_then(Value::as_str).unwrap_or_default();
    let at = event.get("time").and_then(Value::as_str).and_then(moment);
    for key in ["schema_version", "number", "time", "vm"] {
        event.remove(key);
    }
    let about = match event.is_empty() {
        true => Value::Null,
        false => Value::Object(event),
    };
    let what = format!("{vm}: {name}");
    match at {
        Some(at) => timeline.put(at, Part::Broker, what, None, about),
        None => timeline.tell(Part::Broker, what, about),
    }
}

/// The moment that a time of day is: of today, as the log has it.
fn moment(time: &str) -> Option<std::time::Instant> {
    let clock = time.split_once('T')?.1.strip_suffix('Z')?;
    let mut parts = clock.split(':');
    let mut next = || parts.next()?.parse::<f64>().ok();
    let then = next()? * 3600.0 + next()? * 60.0 + next()?;
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .ok()?;
    let now = now.as_secs_f64() % 86400.0;
    // A run does not last a day.
    let ago = (now - then).rem_euclid(86400.0);
    std::time::Instant::now().checked_sub(Duration::from_secs_f64(ago))
}
