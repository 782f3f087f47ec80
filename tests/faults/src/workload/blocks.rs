//! Blocks: what the test guest has flushed is on the disk, whatever happened, and nothing is there that it
//! has not written.
//!
//! Places and contents of a round are functions of seed and round (`tests/guests/src/blocks.rs`); the guest
//! tells each round before its first write, each flush after it, and each request that was refused. So for
//! each sector there is one round that must be there at least, the last one that was flushed, and those that
//! may be there instead: later ones, and writes that were refused or whose flush was.

use super::record::{Console, Record};
use super::{Checker, Verified};
use crate::blocks::{self, Content, Extent};
use crate::pattern::SECTOR;
use std::collections::BTreeSet;
use std::time::Duration;

/// The round of a sector that none has written.
const BLANK: u64 = 0;

#[derive(Debug, Clone, Copy)]
struct Later {
    round: u64,
    /// A flush makes it certain.
    is_written: bool,
}

/// What a sector may hold.
#[derive(Debug, Default)]
struct Sector {
    /// The round that is there at least.
    base: u64,
    later: Vec<Later>,
}

impl Sector {
    fn write(&mut self, round: u64) {
        let is_written = true;
        match self.later.last_mut().filter(|last| last.round == round) {
            Some(last) => last.is_written = is_written,
            None => self.later.push(Later { round, is_written }),
        }
    }

    fn doubt(&mut self, round: Option<u64>) {
        let doubted = |later: &&mut Later| round.is_none_or(|round| later.round == round);
        let doubted = self.later.iter_mut().filter(doubted);
        doubted.for_each(|later| later.is_written = false);
    }

    fn flush(&mut self) {
        if let Some(at) = self.later.iter().rposition(|later| later.is_written) {
            self.base = self.later[at].round;
            self.later.drain(..=at);
        }
    }

    fn may_be(&self, round: u64) -> bool {
        round == self.base || self.later.iter().any(|later| later.round == round)
    }
}

/// The checker.
#[derive(Debug)]
pub struct Blocks {
    seed: u64,
    console: Console,
    sectors: Vec<Sector>,
    /// Those that are not settled.
    touched: BTreeSet<usize>,
    /// The last round that the present life has begun.
    round: Option<u64>,
    last: u64,
    refused_in_life: u64,
    refused: u64,
    verified: u64,
}

impl Blocks {
    /// For a guest with this seed, and a disk of zeroes.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            console: Console::default(),
            sectors: Vec::new(),
            touched: BTreeSet::new(),
            round: None,
            last: BLANK,
            refused_in_life: 0,
            refused: 0,
            verified: 0,
        }
    }

    fn begin(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let sectors: usize = found.number(record, "sectors")?;
        let first: u64 = found.number(record, "first")?;
        if found.number(record, "seed") != Some(self.seed) {
            found.add("the guest has another seed");
        }
        if self.sectors.is_empty() {
            self.sectors.resize_with(sectors, Sector::default);
        } else if self.sectors.len() != sectors {
            found.add(format!("{sectors} sectors, not {}", self.sectors.len()));
        }
        // The guest has read the disk and goes on behind the last round that it found.
        let certain = self.sectors.iter().map(|sector| sector.base).max();
        let certain = certain.unwrap_or(BLANK);
        if first <= certain || first > self.last + 1 {
            let last = self.last;
            found.add(format!(
                "the guest finds round {} on its disk: {certain} was flushed, {last} begun",
                first.wrapping_sub(1)
            ));
        }
        self.round = first.checked_sub(1);
        self.last = self.last.max(first.saturating_sub(1));
        Some(())
    }

    fn begin_round(&mut self, record: &Record<'_>) -> Option<()> {
        let round: u64 = self.console.found.number(record, "round")?;
        let before = self.round.replace(round);
        if before.map(|before| before + 1) != Some(round) {
            let after = before.map_or("nothing".to_owned(), |r| format!("round {r}"));
            self.console
                .found
                .add(format!("round {round} after {after}"));
        }
        self.last = self.last.max(round);
        let sectors = self.sectors.len() as u64;
        if sectors == 0 {
            return None;
        }
        for extent in blocks::extents(self.seed, round, sectors) {
            for at in self.places(extent)? {
                self.sectors[at].write(round);
                self.touched.insert(at);
            }
        }
        Some(())
    }

    fn places(&mut self, Extent { sector, count }: Extent) -> Option<std::ops::Range<usize>> {
        let end = sector
            .checked_add(count)
            .and_then(|end| end.try_into().ok());
        let end: Option<usize> = end.filter(|end| *end <= self.sectors.len());
        if end.is_none() {
            let sectors = self.sectors.len();
            let error = format!("{count} sectors at {sector} of {sectors}");
            self.console.found.add(error);
        }
        Some(sector.try_into().ok()?..end?)
    }

    fn flushed(&mut self, record: &Record<'_>) -> Option<()> {
        let found = &mut self.console.found;
        let round: u64 = found.number(record, "round")?;
        let refused: u64 = found.number(record, "refused")?;
        if self.round != Some(round) {
            found.add(format!(
                "round {round} is flushed, {:?} was begun",
                self.round
            ));
        }
        if refused != self.refused_in_life {
            let seen = self.refused_in_life;
            found.add(format!("{refused} requests were refused, {seen} were told"));
        }
        for at in &self.touched {
            self.sectors[*at].flush();
        }
        self.touched
            .retain(|at| !self.sectors[*at].later.is_empty());
        Some(())
    }

    fn refused(&mut self, record: &Record<'_>) -> Option<()> {
        self.refused += 1;
        self.refused_in_life += 1;
        let found = &mut self.console.found;
        let round = found.number(record, "round")?;
        let (sector, count) = (
            found.number(record, "sector")?,
            found.number(record, "count")?,
        );
        match record.text("op") {
            Some("write") => {
                for at in self.places(Extent { sector, count })? {
                    self.sectors[at].doubt(Some(round));
                }
            }
            Some("flush") => self.doubt_everything(),
            Some("read") => {}
            other => found.add(format!("a refused {other:?}")),
        }
        Some(())
    }

    /// What was not flushed has become uncertain for ever.
    fn doubt_everything(&mut self) {
        for at in &self.touched {
            self.sectors[*at].doubt(None);
        }
    }

    fn judge(&mut self, at: usize, data: &[u8]) {
        let sector = &mut self.sectors[at];
        let round = match blocks::content(self.seed, at as u64, data) {
            Content::Blank => BLANK,
            Content::Round(round) => round,
            Content::Foreign => {
                let error = format!("sector {at} holds what nobody has ever written there");
                return self.console.found.add(error);
            }
        };
        let base = sector.base;
        if !sector.may_be(round) {
            let what = match round {
                _ if round > self.last => "which had not begun",
                _ if round < base => "which is older",
                _ => "which did not write there",
            };
            let error = format!("sector {at}: round {base} was flushed, {round} is there, {what}");
            return self.console.found.add(error);
        }
        self.verified += u64::from(base != BLANK);
        // From now on this is what is there.
        sector.base = round;
        sector.later.clear();
    }
}

impl Checker for Blocks {
    fn record(&mut self, _: Duration, line: &str) {
        let Some(record) = self.console.take(line) else {
            return;
        };
        let _told = match record.name {
            "hello" => {
                self.round = None;
                self.refused_in_life = 0;
                self.doubt_everything();
                None
            }
            "blocks.begin" => self.begin(&record),
            "blocks.round" => self.begin_round(&record),
            "blocks.flushed" => self.flushed(&record),
            "blocks.refused" => self.refused(&record),
            _ => None,
        };
    }

    fn image(&mut self, bytes: &[u8]) {
        if bytes.len() / SECTOR < self.sectors.len() {
            let error = format!("an image of {} bytes is too short", bytes.len());
            self.console.found.add(error);
        }
        let used = self.sectors.len().min(bytes.len() / SECTOR);
        for (at, data) in bytes.chunks_exact(SECTOR).enumerate() {
            match at < used {
                true => self.judge(at, data),
                false if data.iter().all(|byte| *byte == 0) => {}
                false => self
                    .console
                    .found
                    .add(format!("sector {at} is none of the guest's")),
            }
        }
        self.touched.clear();
    }

    fn finish(self: Box<Self>) -> Verified {
        Verified::new(self.verified, self.refused, self.console.found)
    }
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
