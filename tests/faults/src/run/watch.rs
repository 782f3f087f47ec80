//! Watches a guest: what it says goes to its checker and the time line, and its machine's state is
//! asked for until it has ended.

use super::{Machine, Run, tell_guest};
use crate::scenario::Expect;
use crate::timeline::{Part, Timeline};
use crate::workload::{Checker, Verified, Workload};
use serde_json::Value;
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
    /// The last line, when it may not be whole.
    last: Option<String>,
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
                last: None,
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
        while !self.is_over.load(Ordering::SeqCst) && !self.is_done() {
            self.read();
            self.ask();
            std::thread::sleep(POLL);
        }
    }

    /// Reads what is new on the console.
    fn read(&self) {
        let Some(host) = self.run.host_of(self.machine) else {
            return;
        };
        // A broker that is away or stopped is asked again.
        let read = host.run(&["logs", self.name(), "--console"], Duration::from_secs(2));
        if !read.is_good() {
            return;
        }
        let mut inner = self.inner();
        // A machine that was started again may begin with an empty console.
        if read.output.len() < inner.position {
            inner.position = 0;
        }
        let new = read.output.get(inner.position..).unwrap_or_default();
        let at = self.run.timeline.now().unwrap_or_default();
        for line in new.split_inclusive('\n') {
            // The last line may be half of one, which is shown as if it were whole.
            let is_last = inner.position + line.len() >= read.output.len();
            if is_last && inner.last.as_deref() != Some(line) {
                inner.last = Some(line.to_owned());
                break;
            }
            inner.position += line.len();
            self.hear(&mut inner, at, line.trim_end());
        }
    }

    fn hear(&self, inner: &mut Inner, at: Duration, line: &str) {
        tell_guest(&self.run.timeline, self.name(), line);
        if line.starts_with("BH ") && line.contains(".begin") || line.contains("login:") {
            self.works.store(true, Ordering::SeqCst);
        }
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
        self.read();
        self.read();
        let last = &about["last_run"];
        let how = last["ending"].as_str().unwrap_or("unknown");
        self.ended(how, last);
    }

    fn ended(&self, how: &str, last: &Value) {
        let mut inner = self.inner();
        let is_whole = inner.done == Some(0) && how == "powered_off";
        let was_ended = self.machine.is_ended.load(Ordering::SeqCst);
        let lost = self.run.may_be_lost(self.machine);
        if !is_whole && lost && !was_ended && inner.starts < 5 && inner.done.is_none() {
            // It was lost, as was to be expected: its work begins again, on the disk as it is.
            inner.starts += 1;
            // The console begins anew. The checker goes on: it knows what the disk has to hold.
            (inner.position, inner.last) = (0, None);
            drop(inner);
            self.run.timeline.note(format!(
                "{} was lost ({how}); it is started again",
                self.name()
            ));
            return self.run.start(self.machine);
        }
        drop(inner);
        let harmless = is_whole || was_ended || self.machine.vm.expect == Expect::Errors;
        if !harmless {
            let done = self.inner().done;
            self.run.error(format!(
                "{} ended with {how} (errors of the guest: {done:?}): {last}",
                self.name()
            ));
        }
        self.is_done.store(true, Ordering::SeqCst);
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
        let image = match &machine.disk {
            Some(disk) => Ok(disk.image()),
            None => std::fs::read(&machine.image),
        };
        match image {
            Ok(image) => checker.image(&image),
            Err(error) => run.error(format!("the disk of {name}: {error}")),
        }
        let Verified {
            count,
            refused,
            mut errors,
        } = checker.finish();
        if refused > 0 {
            errors.push(format!("{refused} requests of the guest were refused"));
        }
        let explained = machine.vm.expect == Expect::Errors;
        for error in errors {
            match explained {
                true => run.timeline.note(format!("{name}: {error}")),
                false => run.error(format!("{name}: {error}")),
            }
        }
        // Who ended it did not wait for its work.
        let was_ended = machine.is_ended.load(Ordering::SeqCst);
        (name, if was_ended { count.max(1) } else { count })
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
