//! What was injected, and what every part did, in one order.

use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Most entries that are kept: a guest may talk for an hour.
const ENTRIES_MAX: usize = 100_000;

/// Who did something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Part {
    /// The harness injected a fault.
    Injected,
    /// The harness did something else: what a scenario says, or what follows from a fault.
    Harness,
    /// A broker wrote an event to a machine's log.
    Broker,
    /// A guest said something.
    Guest,
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Entry {
    /// Milliseconds since the guests worked; negative before.
    pub at_ms: i64,
    /// Who.
    pub part: Part,
    /// What.
    pub what: String,
    /// Number of the fault in the plan.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<u32>,
    /// Details.
    #[serde(skip_serializing_if = "Value::is_null")]
    pub about: Value,
}

/// The time line of a run.
#[derive(Debug)]
pub struct Timeline {
    began: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    zero: Option<Instant>,
    /// With their time since the beginning.
    entries: Vec<(Duration, Entry)>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            began: Instant::now(),
            inner: Mutex::new(Inner {
                zero: None,
                entries: Vec::new(),
            }),
        }
    }
}

impl Timeline {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// The guests work: from now on times are counted.
    pub fn zero(&self) {
        self.inner().zero = Some(Instant::now());
    }

    /// Time since the guests worked, if they do.
    #[must_use]
    pub fn now(&self) -> Option<Duration> {
        self.inner().zero.map(|zero| zero.elapsed())
    }

    /// Something that was done.
    pub fn tell(&self, part: Part, what: impl Into<String>, about: Value) {
        self.put(Instant::now(), part, what.into(), None, about);
    }

    /// Something that the harness did or saw.
    pub fn note(&self, what: impl Into<String>) {
        self.tell(Part::Harness, what, Value::Null);
    }

    /// A fault that was injected.
    pub fn injected(&self, fault: u32, what: impl Into<String>) {
        self.put(
            Instant::now(),
            Part::Injected,
            what.into(),
            Some(fault),
            Value::Null,
        );
    }

    /// Something that was done at a time that somebody else has taken.
    pub fn put(&self, at: Instant, part: Part, what: String, fault: Option<u32>, about: Value) {
        let mut inner = self.inner();
        if inner.entries.len() < ENTRIES_MAX {
            let entry = Entry {
                at_ms: 0,
                part,
                what,
                fault,
                about,
            };
            inner
                .entries
                .push((at.saturating_duration_since(self.began), entry));
        }
    }

    /// Everything, in order.
    #[must_use]
    pub fn entries(&self) -> Vec<Entry> {
        let inner = self.inner();
        let zero = inner
            .zero
            .map_or(Duration::ZERO, |zero| zero.duration_since(self.began));
        let millis = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        let mut entries = inner.entries.clone();
        entries.sort_by_key(|(at, _)| *at);
        let placed = entries.into_iter().map(|(at, entry)| Entry {
            at_ms: millis(at) - millis(zero),
            ..entry
        });
        placed.collect()
    }
}

impl Entry {
    /// As a line of text.
    #[must_use]
    pub fn in_words(&self) -> String {
        let part = match self.part {
            Part::Injected => "FAULT  ",
            Part::Harness => "harness",
            Part::Broker => "broker ",
            Part::Guest => "guest  ",
        };
        let number = self.fault.map_or(String::new(), |n| format!("#{n} "));
        let about = match &self.about {
            Value::Null => String::new(),
            about => format!(" {about}"),
        };
        format!("{:>8} ms  {part}  {number}{}{about}", self.at_ms, self.what)
    }

    /// As an object of `--json`.
    #[must_use]
    pub fn as_json(&self) -> Value {
        let mut object = json!({ "kind": "event" });
        if let (Some(object), Ok(Value::Object(entry))) =
            (object.as_object_mut(), serde_json::to_value(self))
        {
            object.extend(entry);
        }
        object
    }
}
