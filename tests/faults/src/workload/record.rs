//! What guests say: records of the test guest (`tests/guests/README.md`), and what every checker makes of
//! them.

use std::str::FromStr;

/// So many errors are kept; the rest is counted.
const ERRORS_MAX: usize = 20;
/// How a life of the test guest begins.
const HELLO: &str = "BH hello version=";

/// `BH <name> key=value …`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Record<'a> {
    pub(super) name: &'a str,
    fields: &'a str,
}

impl<'a> Record<'a> {
    pub(super) fn parse(line: &'a str) -> Option<Self> {
        let rest = line.trim_end().strip_prefix("BH ")?;
        let (name, fields) = rest.split_once(' ').unwrap_or((rest, ""));
        let is_field = |word: &str| word.split_once('=').is_some_and(|(key, _)| !key.is_empty());
        let is_whole = !name.is_empty() && fields.split_ascii_whitespace().all(is_field);
        is_whole.then_some(Self { name, fields })
    }

    /// Whether it is whole, if its end can tell.
    fn is_whole(&self) -> bool {
        let tells = matches!(
            self.name,
            "blocks.round" | "blocks.flushed" | "blocks.refused"
        );
        !tells || self.text("whole") == Some("1")
    }

    pub(super) fn text(&self, key: &str) -> Option<&'a str> {
        let mut words = self.fields.split_ascii_whitespace();
        words
            .find_map(|word| word.split_once('=').filter(|(k, _)| *k == key))
            .map(|(_, value)| value)
    }
}

/// What was found to be wrong.
#[derive(Debug, Default)]
pub(super) struct Findings {
    errors: Vec<String>,
    more: usize,
    /// Exceptions that the guest has told of: it was not to get any.
    told: Vec<String>,
}

impl Findings {
    pub(super) fn add(&mut self, error: impl Into<String>) {
        match self.errors.len() < ERRORS_MAX {
            true => self.errors.push(error.into()),
            false => self.more += 1,
        }
    }

    /// A number that a record has to have.
    pub(super) fn number<T: FromStr>(&mut self, record: &Record<'_>, key: &str) -> Option<T> {
        let number = record.text(key).and_then(|value| value.parse().ok());
        if number.is_none() {
            self.add(format!("`{}` has no number `{key}`", record.name));
        }
        number
    }

    /// Something that the guest tells of and that a fault may explain.
    fn tell(&mut self, error: &str) {
        if self.told.len() < ERRORS_MAX {
            self.told.push(error.to_owned());
        }
    }

    /// What is wrong, and what the guest has told of that a fault may explain.
    pub(super) fn into_errors(mut self) -> (Vec<String>, Vec<String>) {
        if self.more > 0 {
            self.errors.push(format!("and {} more", self.more));
        }
        (self.errors, self.told)
    }
}

/// The console of a test guest. A guest that is started again begins with a new `hello`; the line that its
/// predecessor had begun may stand before it.
#[derive(Debug, Default)]
pub(super) struct Console {
    pub(super) found: Findings,
    lives: u64,
    /// A line that is no whole record, which only the end of a life explains.
    half: Option<String>,
}

impl Console {
    /// The record of a line. What the guest itself found wrong is an error, and so is a line that is none
    /// of its records.
    pub(super) fn take<'a>(&mut self, line: &'a str) -> Option<Record<'a>> {
        let line = line.trim_end();
        let line = line.find(HELLO).map_or(line, |at| &line[at..]);
        if let Some(half) = self.half.take().filter(|_| !line.starts_with(HELLO)) {
            self.found.add(format!("no record: {half:?}"));
        }
        if line.is_empty() {
            return None;
        }
        let Some(record) = Record::parse(line).filter(Record::is_whole) else {
            self.half = Some(line.to_owned());
            return None;
        };
        match record.name {
            "hello" => self.lives += 1,
            "error" | "panic" => self.found.add(line),
            "exception" => self.found.tell(line),
            _ => {}
        }
        if self.lives == 0 {
            self.found.add(format!("before the first `hello`: {line}"));
        }
        Some(record)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_has_a_name_and_fields() {
        let record = Record::parse("BH clock.tick n=3 rtc=\r\n").unwrap();
        assert_eq!(record.name, "clock.tick");
        assert_eq!(
            (record.text("n"), record.text("rtc")),
            (Some("3"), Some(""))
        );
        assert_eq!(record.text("cycles"), None);
        for line in [
            "BH",
            "BH ",
            "BHx hello",
            "BH clock.tick n",
            "clock.tick n=3",
            "BH a =3",
        ] {
            assert_eq!(Record::parse(line), None, "{line}");
        }
    }

    #[test]
    fn errors_of_the_guest_and_lines_that_are_no_records_are_found() {
        let mut console = Console::default();
        console.take("BH hello version=1 mode=x");
        console.take("BH error mode=x kind=data");
        console.take("BH panic file=a line=1");
        console.take("BH exception vector=2 error=0x0");
        console.take("kind=data sector=5");
        console.take("");
        let (found, told) = console.found.into_errors();
        assert_eq!((found.len(), told.len()), (3, 1));
    }

    #[test]
    fn half_a_line_before_a_new_life_is_nobodys_fault() {
        let mut console = Console::default();
        console.take("BH hello version=1 mode=x");
        let record = console
            .take("BH clock.tiBH hello version=1 mode=x")
            .unwrap();
        assert_eq!((record.name, console.lives), ("hello", 2));
        console.take("BH blocks.flushed round=1");
        console.take("BH hello version=1 mode=x");
        console.take("BH clock.ti n");
        assert!(console.found.into_errors().0.is_empty());
    }

    #[test]
    fn half_a_line_within_a_life_is_an_error() {
        let mut console = Console::default();
        console.take("BH hello version=1 mode=x");
        console.take("BH blocks.flushed round=1");
        console.take("BH blocks.round round=13 whole=1");
        assert_eq!(console.found.into_errors().0.len(), 1);
    }

    #[test]
    fn output_that_begins_in_the_middle_is_an_error() {
        let mut console = Console::default();
        console.take("BH clock.tick n=3");
        assert_eq!(console.found.into_errors().0.len(), 1);
    }

    #[test]
    fn errors_without_end_are_counted() {
        let mut found = Findings::default();
        (0..100).for_each(|n| found.add(n.to_string()));
        let (errors, _) = found.into_errors();
        assert_eq!(errors.len(), ERRORS_MAX + 1);
        assert_eq!(errors.last().unwrap(), "and 80 more");
    }
}
