//! Data between machines of one virtual network: one serves a pattern, the other leases an address, asks for the first one's
//! and takes the pattern, connection after connection. Each connection brings all of it, and nothing of it is wrong.

use super::record::{Console, Record};
use super::{Checker, Verified};
use std::time::Duration;

/// Judges the machine that serves.
#[derive(Debug)]
pub struct Serving {
    bytes: u64,
    console: Console,
    whole: u64,
}

impl Serving {
    /// For streams of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            console: Console::default(),
            whole: 0,
        }
    }
}

impl Checker for Serving {
    fn record(&mut self, _: Duration, line: &str) {
        let Some(record) = self.console.take(line) else {
            return;
        };
        // Whoever takes may go away in the middle: that is his to judge.
        if record.name == "net.source" {
            let bytes: Option<u64> = self.console.found.number(&record, "bytes");
            self.whole += u64::from(bytes == Some(self.bytes));
        }
    }

    fn finish(self: Box<Self>) -> Verified {
        Verified::new(self.whole, 0, self.console.found)
    }
}

/// Judges the machine that takes.
#[derive(Debug)]
pub struct Taking {
    bytes: u64,
    console: Console,
    taken: u64,
}

impl Taking {
    /// For streams of so many bytes.
    #[must_use]
    pub fn new(bytes: u64) -> Self {
        Self {
            bytes,
            console: Console::default(),
            taken: 0,
        }
    }

    fn stream(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let reached: u64 = found.number(record, "reached")?;
        if reached == 0 {
            found.add("the machine that serves was not reached");
            return None;
        }
        let (bytes, wrong): (u64, u64) = (
            found.number(record, "bytes")?,
            found.number(record, "wrong")?,
        );
        if (bytes, wrong) == (self.bytes, 0) {
            self.taken += 1;
        } else {
            let expected = self.bytes;
            found.add(format!(
                "{bytes} bytes came, {wrong} of them wrong, instead of {expected}"
            ));
        }
        Some(())
    }
}

impl Checker for Taking {
    fn record(&mut self, _: Duration, line: &str) {
        let Some(record) = self.console.take(line) else {
            return;
        };
        match record.name {
            "net.peer" => {
                let _told = self.stream(&record);
            }
            "net.lease" | "net.name" if record.text("ip") == Some("none") => {
                self.console
                    .found
                    .add(format!("{} without an address", record.name));
            }
            _ => {}
        }
    }

    fn finish(self: Box<Self>) -> Verified {
        Verified::new(self.taken, 0, self.console.found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verified(mut checker: Box<dyn Checker>, lines: &[&str]) -> Verified {
        for line in ["BH hello version=1 mode=net"].iter().chain(lines) {
            checker.record(Duration::ZERO, line);
        }
        checker.finish()
    }

    fn taken(lines: &[&str]) -> Verified {
        verified(Box::new(Taking::new(9)), lines)
    }

    const SOUND: [&str; 4] = [
        "BH net.lease ip=10.87.0.2 prefix=24 server=10.87.0.1",
        "BH net.name name=db.lab.internal ip=10.87.0.3",
        "BH net.peer ip=10.87.0.3 reached=1 bytes=9 wrong=0",
        "BH net.peer ip=10.87.0.3 reached=1 bytes=9 wrong=0",
    ];

    #[test]
    fn whole_streams_are_counted_and_none_is_not_enough() {
        let sound = taken(&SOUND);
        assert!(sound.held() && sound.count == 2, "{sound:?}");
        assert!(!taken(&SOUND[..2]).held());
    }

    #[test]
    fn streams_that_are_short_wrong_or_not_there_are_found() {
        for wrong in [
            "BH net.peer ip=10.87.0.3 reached=1 bytes=8 wrong=0",
            "BH net.peer ip=10.87.0.3 reached=1 bytes=9 wrong=1",
            "BH net.peer ip=10.87.0.3 reached=0",
            "BH net.lease ip=none",
        ] {
            let lines = [&SOUND[..], &[wrong]].concat();
            assert!(!taken(&lines).held(), "{wrong}");
        }
    }

    #[test]
    fn server_has_served_whole_streams() {
        let served = |lines: &[&str]| verified(Box::new(Serving::new(9)), lines);
        let (cut, whole) = ("BH net.source bytes=4", "BH net.source bytes=9");
        assert!(!served(&[cut]).held());
        assert_eq!(served(&[cut, whole, whole]).count, 2);
    }
}
