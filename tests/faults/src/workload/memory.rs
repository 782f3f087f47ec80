//! Memory: the test guest's mode `counter` verifies and changes all of its working memory, round after
//! round. What it finds wrong it says; what the checker adds is that the rounds go on, forward, over all of
//! the memory that was asked for.

use super::record::{Console, Record};
use super::{Checker, Verified};
use std::time::Duration;

const PAGE_BYTES: u64 = 4096;

/// The checker.
#[derive(Debug)]
pub struct Memory {
    seed: u64,
    pages: u64,
    console: Console,
    /// Rounds and cycles when they were last told in the present life.
    told: Option<(u64, u64)>,
    verified: u64,
}

impl Memory {
    /// For a guest with this seed that works on so many bytes.
    #[must_use]
    pub fn new(seed: u64, bytes: u64) -> Self {
        Self {
            seed,
            pages: bytes / PAGE_BYTES,
            console: Console::default(),
            told: None,
            verified: 0,
        }
    }

    fn begin(&mut self, record: &Record<'_>) {
        let found = &mut self.console.found;
        for (key, wanted) in [("pages", self.pages), ("seed", self.seed)] {
            let is = found.number(record, key);
            if is.is_some_and(|is: u64| is != wanted) {
                found.add(format!("the guest has {key}={is:?}, not {wanted}"));
            }
        }
        self.told = Some((0, 0));
    }

    fn round(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let value: u64 = found.number(record, "value")?;
        let bad: u64 = found.number(record, "bad_pages")?;
        if bad > 0 {
            found.add(format!("{bad} pages were not what the guest had written"));
        }
        let Some((rounds, cycles_before)) = self.told else {
            found.add("rounds before `counter`");
            return None;
        };
        // The end may repeat what was just told.
        let is_end = record.name == "counter.end";
        let cycles = match is_end {
            true => cycles_before,
            false => found.number(record, "cycles")?,
        };
        if value < rounds || (!is_end && (value == rounds || cycles <= cycles_before)) {
            found.add(format!(
                "{value} rounds after {cycles} cycles, {rounds} after {cycles_before}"
            ));
        }
        self.verified += value.saturating_sub(rounds);
        self.told = Some((value, cycles));
        Some(())
    }
}

impl Checker for Memory {
    fn record(&mut self, _: Duration, line: &str) {
        let Some(record) = self.console.take(line) else {
            return;
        };
        match record.name {
            "hello" => self.told = None,
            "counter" => self.begin(&record),
            "counter.round" | "counter.end" => {
                let _told = self.round(&record);
            }
            _ => {}
        }
    }

    fn finish(self: Box<Self>) -> Verified {
        Verified::new(self.verified, 0, self.console.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGIN: &str = "BH counter address=0x1ff000 pages=16 seed=5 seconds=3";

    fn verified(lines: &[&str]) -> Verified {
        let mut checker = Box::new(Memory::new(5, 64 << 10));
        for line in ["BH hello version=1 mode=counter"].iter().chain(lines) {
            checker.record(Duration::ZERO, line);
        }
        checker.finish()
    }

    fn round(value: u64, cycles: u64) -> String {
        format!("BH counter.round value={value} bad_pages=0 cycles={cycles}")
    }

    #[test]
    fn rounds_are_counted_over_all_lives() {
        let end = "BH counter.end value=7 bad_pages=0";
        let (first, second) = (round(3, 100), round(7, 200));
        let again = round(2, 50);
        let hello = "BH hello version=1 mode=counter";
        let found = verified(&[BEGIN, &first, &second, end, hello, BEGIN, &again]);
        assert!(found.held(), "{found:?}");
        assert_eq!(found.count, 9);
    }

    #[test]
    fn bad_transcripts_are_refused() {
        let (first, same) = (round(3, 100), round(3, 200));
        let (less, early) = (round(2, 200), round(4, 100));
        let bad: [(&[&str], &str); 9] = [
            (&[], "nothing was verified"),
            (&[BEGIN], "nothing was verified"),
            (&[&first], "before `counter`"),
            (&[BEGIN, &first, &same], "3 rounds after 200"),
            (&[BEGIN, &first, &less], "2 rounds after 200"),
            (&[BEGIN, &first, &early], "4 rounds after 100"),
            (
                &[BEGIN, "BH counter.round value=3 bad_pages=1 cycles=9"],
                "1 pages",
            ),
            (
                &[BEGIN, "BH counter.round value=3 bad_pages=0"],
                "no number `cycles`",
            ),
            (
                &["BH counter pages=15 seed=5", &first],
                "pages=Some(15), not 16",
            ),
        ];
        for (lines, text) in bad {
            let found = verified(lines);
            let told = found.errors.iter().any(|error| error.contains(text));
            assert!(told && !found.held(), "{lines:?}: {found:?}");
        }
    }
}
