//! What a process says on descriptor 2: one JSON object a line, into a pipe that the broker reads.
//!
//! A guest may be able to make a device complain, so lines are bounded in length and number, text is
//! escaped, and a full pipe loses lines instead of holding the process up. How many were lost is
//! said with the next line that gets through. A subscriber of its own, since the general one costs
//! more memory than a device process.

use bulkhead_ipc::ident::ProcId;
use std::fmt::{self, Debug, Write as _};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line in bytes.
const LINE_BYTES_MAX: usize = 1024;
/// Lines that may be written at once.
const BURST: u32 = 20;
/// Time after which one more line may be written.
const REFILL: Duration = Duration::from_millis(200);

static NAME: OnceLock<(String, String)> = OnceLock::new();

/// Starts logging as process `id` of `vm`. Later calls change nothing.
pub fn start(id: ProcId, vm: &str) {
    if NAME.set((id.to_string(), vm.to_owned())).is_ok() {
        let _was_set = tracing::subscriber::set_global_default(Lines::default());
    }
}

/// Makes a panic say where it happened and end the process, without unwinding.
pub(crate) fn on_panic() {
    std::panic::set_hook(Box::new(|info| {
        line(&format!("panic: {info}"));
        crate::sys::leave(EXIT_PANIC);
    }));
}

/// Exit status of a process that panicked: 128 + SIGABRT.
const EXIT_PANIC: i32 = 134;

/// Writes one line that is no event: before [`start`], or on the way out.
pub fn line(text: &str) {
    let mut line = begin("ERROR", 0);
    push_field(&mut line, "message", text);
    let _written = end(line);
}

fn begin(level: &str, lost: u32) -> String {
    let mut line = String::with_capacity(LINE_BYTES_MAX);
    line.push_str("{\"level\":\"");
    line.push_str(level);
    line.push('"');
    if let Some((proc, vm)) = NAME.get() {
        push_field(&mut line, "proc", proc);
        push_field(&mut line, "vm", vm);
    }
    if lost > 0 {
        push_field(&mut line, "lines_lost", &lost.to_string());
    }
    line
}

/// Closes and writes the line; false when the pipe is full.
fn end(mut line: String) -> bool {
    line.push_str("}\n");
    write_all_or_nothing(line.as_bytes())
}

fn write_all_or_nothing(bytes: &[u8]) -> bool {
    // Shorter than PIPE_BUF, so a pipe takes all of it or nothing.
    nix::unistd::write(std::io::stderr(), bytes).is_ok()
}

fn push_field(line: &mut String, name: &str, value: &str) {
    // The name is a literal of the program; only values can be anything.
    let _infallible = write!(line, ",\"{name}\":\"");
    for c in value.chars() {
        // Room for one escape and the closing `"}` with its line end.
        if line.len() + 12 > LINE_BYTES_MAX {
            break;
        }
        match c {
            '"' | '\\' => line.extend(['\\', c]),
            ' '..='~' => line.push(c),
            _ => {
                let mut units = [0u16; 2];
                for unit in c.encode_utf16(&mut units) {
                    let _infallible = write!(line, "\\u{unit:04x}");
                }
            }
        }
    }
    line.push('"');
}

/// Lets [`BURST`] lines through at once and one more each [`REFILL`].
#[derive(Debug)]
struct Limit {
    tokens: u32,
    refilled: Option<Instant>,
    lost: u32,
}

impl Limit {
    /// Whether a line may be written at `now`.
    fn admit(&mut self, now: Instant) -> bool {
        let since = self
            .refilled
            .map_or(Duration::MAX, |at| now.saturating_duration_since(at));
        let more = u32::try_from(since.as_nanos() / REFILL.as_nanos()).unwrap_or(u32::MAX);
        if more > 0 {
            self.tokens = self.tokens.saturating_add(more).min(BURST);
            self.refilled = Some(now);
        }
        if self.tokens == 0 {
            self.lost = self.lost.saturating_add(1);
            return false;
        }
        self.tokens -= 1;
        true
    }
}

#[derive(Debug)]
struct Lines {
    limit: Mutex<Limit>,
}

impl Default for Lines {
    fn default() -> Self {
        Self {
            limit: Mutex::new(Limit {
                tokens: BURST,
                refilled: None,
                lost: 0,
            }),
        }
    }
}

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut limit = self.limit.lock().unwrap_or_else(PoisonError::into_inner);
        if !limit.admit(Instant::now()) {
            return;
        }
        let mut line = Fields(begin(event.metadata().level().as_str(), limit.lost));
        event.record(&mut line);
        if end(line.0) {
            limit.lost = 0;
        } else {
            limit.lost = limit.lost.saturating_add(1);
        }
    }

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

struct Fields(String);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        push_field(&mut self.0, field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        push_field(&mut self.0, field.name(), &Shown(value).to_string());
    }
}

struct Shown<'a>(&'a dyn Debug);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn guest_text_is_escaped() {
        let mut line = String::new();
        push_field(&mut line, "m", "a\"b\\c\u{1b}[2J\nü\u{1f600}");
        assert_eq!(line, r#","m":"a\"b\\c\u001b[2J\u000a\u00fc\ud83d\ude00""#);
    }

    #[test]
    fn flood_is_cut_to_the_burst_and_counted() {
        let mut limit = Limit {
            tokens: BURST,
            refilled: None,
            lost: 0,
        };
        let now = Instant::now();
        let admitted = (0..1000).filter(|_| limit.admit(now)).count();
        assert_eq!(admitted, 20);
        assert_eq!(limit.lost, 980);
        assert!(limit.admit(now + REFILL));
        assert!(!limit.admit(now + REFILL));
    }

    proptest! {
        #[test]
        fn lines_are_bounded_and_printable(texts in prop::collection::vec(".{0,400}", 1..6)) {
            let mut line = begin("WARN", 3);
            for text in &texts {
                push_field(&mut line, "message", text);
            }
            line.push_str("}\n");
            prop_assert!(line.len() <= LINE_BYTES_MAX + 6 * 20);
            prop_assert!(line.trim_end().bytes().all(|b| (0x20..0x7f).contains(&b)));
        }
    }
}
