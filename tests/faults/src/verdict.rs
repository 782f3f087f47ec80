//! What a run has shown.

use crate::random::Planned;
use crate::timeline::Entry;
use serde::Serialize;
use serde_json::{Value, json};

/// In a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Everything that must hold did.
    Held,
    /// Something did not.
    Failed,
    /// Nothing was verified, or a fault was never injected: the run shows nothing.
    NothingVerified,
}

impl Verdict {
    /// The exit code.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Held => 0,
            Self::Failed => 10,
            Self::NothingVerified => 11,
        }
    }

    /// As it is printed.
    #[must_use]
    pub const fn in_words(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Failed => "failed",
            Self::NothingVerified => "nothing verified",
        }
    }
}

/// A run that is over.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The scenario's name.
    pub name: String,
    /// The seed.
    pub seed: u64,
    /// What did not hold.
    pub errors: Vec<String>,
    /// How many things the checkers verified, by machine.
    pub verified: Vec<(String, u64)>,
    /// Faults that were injected, and how often.
    pub injected: Vec<(Planned, u64)>,
    /// Faults that were not, and why.
    pub missing: Vec<(Planned, String)>,
    /// The time line.
    pub entries: Vec<Entry>,
}

impl Outcome {
    /// The verdict.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        if !self.errors.is_empty() {
            return Verdict::Failed;
        }
        let nothing = self.verified.iter().any(|(_, count)| *count == 0);
        if nothing || self.verified.is_empty() || !self.missing.is_empty() {
            return Verdict::NothingVerified;
        }
        Verdict::Held
    }

    /// As an object of `--json`, without the time line.
    #[must_use]
    pub fn as_json(&self) -> Value {
        let injected = self.injected.iter().map(|(planned, times)| {
            json!({ "id": planned.id, "point": planned.fault.point,
                "do": planned.fault.action, "vm": planned.fault.vm,
                "process": planned.fault.process, "times": times })
        });
        let missing = self.missing.iter().map(|(planned, why)| {
            json!({ "id": planned.id, "point": planned.fault.point,
                "do": planned.fault.action, "why": why })
        });
        let verified = self
            .verified
            .iter()
            .map(|(vm, count)| json!({ "vm": vm, "count": count }));
        json!({
            "kind": "verdict",
            "scenario": self.name,
            "seed": self.seed,
            "verdict": self.verdict(),
            "errors": self.errors,
            "verified": verified.collect::<Vec<_>>(),
            "injected": injected.collect::<Vec<_>>(),
            "not_injected": missing.collect::<Vec<_>>(),
        })
    }

    /// As lines of text, with the time line.
    #[must_use]
    pub fn in_words(&self) -> String {
        let mut text = String::new();
        for entry in &self.entries {
            text += &format!("{}\n", entry.in_words());
        }
        for (planned, why) in &self.missing {
            let (id, point) = (planned.id, &planned.fault.point);
            text += &format!(
                "not injected: #{id} {:?} at {point}: {why}\n",
                planned.fault.action
            );
        }
        for error in &self.errors {
            text += &format!("error: {error}\n");
        }
        let counts = self
            .verified
            .iter()
            .map(|(vm, count)| format!("{vm} {count}"));
        text += &format!(
            "{}: {} (seed {}, {} faults injected, verified: {})\n",
            self.name,
            self.verdict().in_words(),
            self.seed,
            self.injected.iter().map(|(_, times)| times).sum::<u64>(),
            counts.collect::<Vec<_>>().join(", "),
        );
        text
    }
}
