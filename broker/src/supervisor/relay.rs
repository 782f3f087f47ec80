//! Passes the log lines of a process on to the broker's log: bounded, escaped, rate-limited.
//!
//! The process may have been taken over, so nothing in a line is believed but its text, and that
//! is made printable.

use crate::escape::excerpt;
use bulkhead_ipc::ident::ProcId;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest line in bytes; the rest of a longer one is dropped.
const LINE_BYTES_MAX: usize = 4096;
/// Lines that are passed on at once.
const BURST: u32 = 40;
/// Time after which one more line is passed on.
const REFILL: Duration = Duration::from_millis(100);

/// What a process writes: a JSON object, or anything.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    level: String,
    message: String,
    #[serde(flatten)]
    fields: BTreeMap<String, serde_json::Value>,
}

/// The log of one process.
#[derive(Debug)]
pub(super) struct Relay {
    id: ProcId,
    vm: String,
    partial: Vec<u8>,
    overlong: bool,
    tokens: u32,
    refilled: Instant,
    lost: u64,
}

impl Relay {
    pub(super) fn new(id: ProcId, vm: &str) -> Self {
        Self {
            id,
            vm: vm.to_owned(),
            partial: Vec::new(),
            overlong: false,
            tokens: BURST,
            refilled: Instant::now(),
            lost: 0,
        }
    }

    /// Takes bytes as they come out of the pipe.
    pub(super) fn take(&mut self, bytes: &[u8], now: Instant) {
        for piece in bytes.split_inclusive(|&b| b == b'\n') {
            let (piece, ended) = match piece {
                [start @ .., b'\n'] => (start, true),
                piece => (piece, false),
            };
            let room = LINE_BYTES_MAX - self.partial.len().min(LINE_BYTES_MAX);
            self.overlong |= piece.len() > room;
            self.partial.extend(piece.iter().take(room));
            if ended {
                self.emit(now);
            }
        }
    }

    /// The process is dead: what is left is its last line.
    pub(super) fn finish(&mut self, now: Instant) {
        if !self.partial.is_empty() {
            self.emit(now);
        }
        if self.lost > 0 {
            self.say(tracing::Level::WARN, "log lines were dropped", self.lost);
        }
    }

    fn emit(&mut self, now: Instant) {
        let line = std::mem::take(&mut self.partial);
        let overlong = std::mem::take(&mut self.overlong);
        let elapsed = now.saturating_duration_since(self.refilled);
        let more = u32::try_from(elapsed.as_millis() / REFILL.as_millis()).unwrap_or(u32::MAX);
        if more > 0 {
            self.tokens = self.tokens.saturating_add(more).min(BURST);
            self.refilled = now;
        }
        if self.tokens == 0 {
            self.lost += 1;
            return;
        }
        self.tokens -= 1;
        let (level, text) = read(&line);
        let text = match overlong {
            true => text + "...",
            false => text,
        };
        let lost = std::mem::take(&mut self.lost);
        self.say(level, &text, lost);
    }

    fn say(&self, level: tracing::Level, text: &str, lines_lost: u64) {
        let (vm, generation) = (self.vm.as_str(), self.id.generation);
        let proc = format!("{}{}", self.id.kind, self.id.index);
        macro_rules! say {
            ($level:ident) => {
                tracing::event!(
                    target: "bulkhead::process",
                    tracing::Level::$level,
                    vm,
                    proc,
                    generation,
                    lines_lost,
                    "{text}"
                )
            };
        }
        match level {
            tracing::Level::ERROR => say!(ERROR),
            tracing::Level::WARN => say!(WARN),
            tracing::Level::INFO => say!(INFO),
            _ => say!(DEBUG),
        }
    }
}

/// Level and printable text of a line.
fn read(line: &[u8]) -> (tracing::Level, String) {
    let Ok(parsed) = serde_json::from_slice::<Line>(line) else {
        return (tracing::Level::WARN, excerpt(line, LINE_BYTES_MAX));
    };
    let level = parsed.level.parse().unwrap_or(tracing::Level::WARN);
    let mut text = parsed.message;
    for (name, value) in parsed.fields {
        // Who it is, is known better here.
        if !matches!(name.as_str(), "vm" | "proc" | "generation" | "time") {
            let value = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            text.push_str(&format!(" {name}={value}"));
        }
    }
    (level, excerpt(&text, LINE_BYTES_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::ident::ProcKind;

    fn relay() -> Relay {
        let id = ProcId {
            kind: ProcKind::Blk,
            index: 0,
            generation: 1,
        };
        Relay::new(id, "vm")
    }

    #[test]
    fn lines_are_read_and_made_printable() {
        let line = br#"{"level":"INFO","proc":"vcpu0.1","vm":"x","message":"a\u001b[2J","n":3}"#;
        assert_eq!(
            read(line),
            (tracing::Level::INFO, "a\\x1b[2J n=3".to_owned())
        );
        assert_eq!(
            read(b"panic\x07"),
            (tracing::Level::WARN, "panic\\x07".to_owned())
        );
    }

    #[test]
    fn endless_line_takes_bounded_memory() {
        let mut r = relay();
        for _ in 0..100 {
            r.take(&[b'x'; 4096], Instant::now());
        }
        assert!(r.partial.len() <= LINE_BYTES_MAX && r.overlong);
        r.take(b"\nshort\n", Instant::now());
        assert!(r.partial.is_empty() && !r.overlong);
    }

    #[test]
    fn flood_is_counted_instead_of_passed_on() {
        let mut r = relay();
        let now = r.refilled;
        for _ in 0..100 {
            r.take(b"noise\n", now);
        }
        assert_eq!(r.lost, 60);
        r.take(b"later\n", now + REFILL);
        assert_eq!(r.lost, 0, "the next line says how many were lost");
    }
}
