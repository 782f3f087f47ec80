//! Exit codes, and errors as the user sees them: one readable line each, with the chain of causes.

use crate::escape::escaped;
use crate::vmfile::Problems;
use std::error::Error;
use std::fmt;
use std::io::{self, Write};

/// Usage or configuration is wrong.
pub(super) const USAGE: u8 = 2;
/// The host lacks something.
pub(super) const HOST: u8 = 4;
/// Starting failed, or the work could not be done.
pub(super) const START: u8 = 6;

/// Why a command failed, and the code to exit with.
#[derive(Debug)]
pub(super) struct Failure {
    /// Exit code; never 1.
    pub(super) code: u8,
    lines: Vec<String>,
}

impl Failure {
    /// A failure with one line.
    pub(super) fn new(code: u8, line: impl Into<String>) -> Self {
        Self {
            code,
            lines: vec![line.into()],
        }
    }

    /// With what else has failed; its exit code stays.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.lines.extend(other.lines);
        self
    }

    /// A failure with several lines.
    pub(super) fn lines<'a>(code: u8, lines: impl Iterator<Item = &'a str>) -> Self {
        Self {
            code,
            lines: lines.map(str::to_owned).collect(),
        }
    }

    /// A failure with an error and its causes on one line, after what was being done.
    pub(super) fn because(code: u8, doing: impl fmt::Display, error: &dyn Error) -> Self {
        let mut line = doing.to_string();
        let mut cause = Some(error);
        while let Some(error) = cause {
            let text = error.to_string();
            if !line.ends_with(&text) {
                if !line.is_empty() {
                    line.push_str(": ");
                }
                line.push_str(&text);
            }
            cause = error.source();
        }
        Self::new(code, line)
    }

    /// Writes the error to standard error.
    pub(super) fn report(&self) {
        let mut text = String::new();
        for line in &self.lines {
            text.push_str("bulkhead: error: ");
            text.push_str(&printable(&line.replace('\n', " ")));
            text.push('\n');
        }
        // Nobody is left to tell when this fails.
        let _unheard = io::stderr().write_all(text.as_bytes());
    }
}

/// Text without control characters; other letters of the user's language stay.
pub(super) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.push_str(&escaped(c.encode_utf8(&mut [0; 4])).to_string());
        } else {
            out.push(c);
        }
    }
    out
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Self {
        Self {
            code: USAGE,
            lines: problems.0.iter().map(ToString::to_string).collect(),
        }
    }
}

/// Writes text to standard output. A reader that has gone away is no failure.
pub(super) fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Failure::because(
            START,
            "writing to standard output",
            &error,
        )),
        _ => Ok(()),
    }
}

/// Writes one JSON object to standard output.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    print_text(serde_json::to_string_pretty(value))
}

/// Writes one JSON object of several to standard output, on a line of its own.
pub(super) fn print_json_line(value: &impl serde::Serialize) -> Result<(), Failure> {
    print_text(serde_json::to_string(value))
}

fn print_text(text: serde_json::Result<String>) -> Result<(), Failure> {
    let text = text.map_err(|error| Failure::because(START, "writing JSON", &error))?;
    print(&(harmless(&text) + "\n"))
}

/// JSON whose strings, some of which are a guest's, control no terminal. JSON itself asks that of the first 32
/// characters only.
fn harmless(json: &str) -> String {
    let mut text = String::with_capacity(json.len());
    for c in json.chars() {
        match c {
            '\u{7f}'..='\u{9f}' => text.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn causes_follow_on_one_line() {
        let error = Outer(io::Error::other("inner"));
        let failure = Failure::because(START, "doing it", &error);
        assert_eq!(failure.lines, ["doing it: outer: inner"]);
    }

    #[test]
    fn json_controls_no_terminal_and_says_the_same() {
        let said = "caf\u{e9}\u{1b}[2J\u{9b}31m\u{7f}\n";
        let text = harmless(&serde_json::to_string(said).unwrap());
        assert!(!text.chars().any(char::is_control), "{text:?}");
        assert_eq!(serde_json::from_str::<String>(&text).unwrap(), said);
    }

    #[test]
    fn control_characters_are_shown_and_letters_kept() {
        assert_eq!(printable("caf\u{e9}\x1b[2J"), "caf\u{e9}\\x1b[2J");
        assert_eq!(printable("\u{9b}"), "\\xc2\\x9b");
    }
}
