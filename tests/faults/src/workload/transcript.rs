//! Console transcript: the guest prints numbered lines and sends back what is typed, numbered as well. Each
//! line comes exactly once and in order, both ways.

use super::record::{Console, Record};
use super::{Checker, Verified};
use crate::prng;
use std::collections::VecDeque;
use std::time::Duration;

/// Between two lines that are typed.
const TYPE_EVERY: Duration = Duration::from_millis(100);
/// A line that was typed so long before the end has to have come back.
const GRACE: Duration = Duration::from_secs(3);

/// The checker, which also says what is to be typed.
#[derive(Debug)]
pub struct Transcript {
    seed: u64,
    console: Console,
    /// Whether the guest reads.
    is_open: bool,
    printed: u64,
    echoed: u64,
    /// Typed and not come back yet, with the time.
    typed: VecDeque<(Duration, String)>,
    typed_count: u64,
    last_typed: Option<Duration>,
    now: Duration,
    /// Lines and echoes over all lives.
    verified: [u64; 2],
}

impl Transcript {
    /// Types lines that this seed draws.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            console: Console::default(),
            is_open: false,
            printed: 0,
            echoed: 0,
            typed: VecDeque::new(),
            typed_count: 0,
            last_typed: None,
            now: Duration::ZERO,
            verified: [0; 2],
        }
    }

    fn new_life(&mut self) {
        self.is_open = false;
        (self.printed, self.echoed) = (0, 0);
        // What a guest had not read when it ended is lost with it.
        self.typed.clear();
    }

    fn line(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let number: u64 = found.number(record, "n")?;
        if number == self.printed {
            self.verified[0] += 1;
        } else {
            found.add(format!("line {number} instead of {}", self.printed));
        }
        self.printed = number + 1;
        Some(())
    }

    fn echo(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let number: u64 = found.number(record, "n")?;
        let text = record.text("text").unwrap_or_default();
        if number != self.echoed {
            found.add(format!("echo {number} instead of {}", self.echoed));
        }
        self.echoed = number + 1;
        match self.typed.front() {
            Some((_, typed)) if typed == text => {
                self.typed.pop_front();
                self.verified[1] += 1;
            }
            Some((_, typed)) => {
                found.add(format!("`{text}` comes back where `{typed}` was typed"));
                // Go on behind it, if it was typed at all.
                if let Some(at) = self.typed.iter().position(|(_, typed)| typed == text) {
                    self.typed.drain(..=at);
                }
            }
            None => found.add(format!("`{text}` comes back, and nothing was typed")),
        }
        Some(())
    }

    fn end(&mut self, record: &Record<'_>) -> Option<()> {
        self.is_open = false;
        let found = &mut self.console.found;
        for (key, seen) in [("lines", self.printed), ("echoed", self.echoed)] {
            let counted: u64 = found.number(record, key)?;
            if counted != seen {
                found.add(format!(
                    "the guest counts {counted} {key}, {seen} were seen"
                ));
            }
        }
        self.unanswered();
        Some(())
    }

    /// What should have come back and has not.
    fn unanswered(&mut self) {
        let now = self.now;
        let is_late = |(at, _): &&(Duration, String)| *at + GRACE < now;
        for (_, typed) in self.typed.iter().filter(is_late) {
            self.console
                .found
                .add(format!("`{typed}` never comes back"));
        }
        self.typed.clear();
    }
}

impl Checker for Transcript {
    fn record(&mut self, at: Duration, line: &str) {
        self.now = at;
        let Some(record) = self.console.take(line) else {
            return;
        };
        let _told = match record.name {
            "hello" => {
                self.new_life();
                None
            }
            "serial.begin" => {
                self.is_open = true;
                None
            }
            "serial.line" => self.line(&record),
            "serial.echo" => self.echo(&record),
            "serial.end" => self.end(&record),
            _ => None,
        };
    }

    fn typing(&mut self, at: Duration) -> Option<String> {
        let is_due = self.last_typed.is_none_or(|last| last + TYPE_EVERY <= at);
        if !self.is_open || !is_due {
            return None;
        }
        let number = self.typed_count;
        let line = format!("typed.{number}.{:x}", prng::at(self.seed, number));
        self.typed_count += 1;
        self.last_typed = Some(at);
        self.typed.push_back((at, line.clone()));
        Some(line)
    }

    fn finish(mut self: Box<Self>) -> Verified {
        self.unanswered();
        let [lines, echoes] = self.verified;
        if echoes == 0 && lines > 0 {
            self.console.found.add("nothing that was typed came back");
        }
        Verified::new(lines + echoes, 0, self.console.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guest that sends back what is typed, with whatever the test does to its lines.
    fn session(spoil: impl FnOnce(&mut Vec<String>)) -> Verified {
        let mut checker = Box::new(Transcript::new(3));
        let mut lines = vec![
            "BH hello version=1".to_owned(),
            "BH serial.begin seconds=5".to_owned(),
        ];
        assert_eq!(checker.typing(Duration::ZERO), None, "nobody reads yet");
        for line in &lines {
            checker.record(Duration::ZERO, line);
        }
        lines.clear();
        for n in 0..20 {
            lines.push(format!("BH serial.line n={n}"));
            let typed = checker.typing(TYPE_EVERY * n).unwrap();
            lines.push(format!("BH serial.echo n={n} text={typed}"));
        }
        lines.push("BH serial.end lines=20 echoed=20".to_owned());
        lines.push("BH done errors=0".to_owned());
        spoil(&mut lines);
        for line in lines {
            checker.record(Duration::from_secs(60), &line);
        }
        checker.finish()
    }

    fn refuses(spoil: impl FnOnce(&mut Vec<String>), text: &str) {
        let found = session(spoil);
        let told = found.errors.iter().any(|error| error.contains(text));
        assert!(told && !found.held(), "no `{text}`: {found:?}");
    }

    #[test]
    fn each_line_once_both_ways_is_accepted() {
        let found = session(|_| {});
        assert!(found.held(), "{found:?}");
        assert_eq!(found.count, 40);
    }

    #[test]
    fn nothing_printed_or_nothing_typed_is_refused() {
        assert!(!Box::new(Transcript::new(1)).finish().held());
        let mut checker = Box::new(Transcript::new(1));
        checker.record(Duration::ZERO, "BH hello version=1");
        checker.record(Duration::ZERO, "BH serial.line n=0");
        assert_eq!(
            checker.finish().errors,
            ["nothing that was typed came back"]
        );
    }

    #[test]
    fn lines_lost_doubled_or_swapped_are_refused() {
        let lost = |lines: &mut Vec<String>| drop(lines.remove(4));
        refuses(lost, "line 3 instead of 2");
        refuses(
            |lines| lines.insert(4, lines[4].clone()),
            "line 2 instead of 3",
        );
        refuses(|lines| lines.swap(4, 6), "line 3 instead of 2");
        refuses(|lines| lines.truncate(10), "never comes back");
        refuses(|lines| drop(lines.remove(38)), "20 lines, 19 were seen");
    }

    #[test]
    fn echoes_lost_doubled_swapped_or_changed_are_refused() {
        refuses(|lines| drop(lines.remove(5)), "echo 3 instead of 2");
        refuses(
            |lines| lines.insert(5, lines[5].clone()),
            "echo 2 instead of 3",
        );
        let other = |lines: &mut Vec<String>| lines[5] = "BH serial.echo n=2 text=typed.2.5".into();
        refuses(other, "`typed.2.5` comes back where");
        refuses(|lines| drop(lines.remove(39)), "20 echoed, 19 were seen");
        let last = "BH serial.echo n=20 text=typed.20.1";
        refuses(
            |lines| lines.insert(40, last.into()),
            "and nothing was typed",
        );
    }

    #[test]
    fn line_in_parts_is_refused() {
        refuses(
            |lines| lines[4] = "BH serial.li".into(),
            "line 3 instead of 2",
        );
        refuses(|lines| lines[4] = "erial.line n=2".into(), "no record");
    }

    #[test]
    fn what_was_typed_at_the_very_end_need_not_come_back() {
        let mut checker = Box::new(Transcript::new(3));
        checker.record(Duration::ZERO, "BH hello version=1");
        checker.record(Duration::ZERO, "BH serial.begin seconds=5");
        let first = checker.typing(Duration::ZERO).unwrap();
        let _late = checker.typing(Duration::from_secs(9)).unwrap();
        checker.record(
            Duration::from_secs(10),
            &format!("BH serial.echo n=0 text={first}"),
        );
        checker.record(Duration::from_secs(10), "BH serial.line n=0");
        assert!(checker.finish().held());
    }

    #[test]
    fn next_life_begins_anew() {
        let mut checker = Box::new(Transcript::new(3));
        for seconds in [0, 10] {
            let at = Duration::from_secs(seconds);
            checker.record(at, "BH hello version=1");
            checker.record(at, "BH serial.begin seconds=5");
            checker.record(at, "BH serial.line n=0");
            let typed = checker.typing(at).unwrap();
            checker.record(at, &format!("BH serial.echo n=0 text={typed}"));
            let _lost = checker.typing(at + TYPE_EVERY).unwrap();
        }
        assert!(checker.finish().held());
    }
}
