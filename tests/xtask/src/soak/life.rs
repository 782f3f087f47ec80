//! The machines of a soak: each is created, lives until its guest powers off, is judged and removed, and
//! the next one takes its place.

use super::report::Lived;
use crate::daemon::Place;
use anyhow::{Context, Result, ensure};
use bulkhead::api::State;
use std::fs::{self, File};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long one guest verifies.
const GUEST_S: u64 = 20;
/// How long it may take altogether, paused and slowed down by faults.
const LIFE_MAX: Duration = Duration::from_secs(15 * GUEST_S);
const DISK_BYTES: u64 = 8 << 20;
const POLL: Duration = Duration::from_millis(250);

/// Name of machine `number`; every life of it has the same.
pub(super) fn name(number: u64) -> String {
    format!("soak{number}")
}

pub(super) struct Lives<'a> {
    place: &'a Place,
    guest: &'a Path,
    seed: u64,
}

impl<'a> Lives<'a> {
    pub(super) const fn new(place: &'a Place, guest: &'a Path, seed: u64) -> Self {
        Self { place, guest, seed }
    }

    /// Lives as machine `number`, life after life, until it is over; the last life is lived to its end.
    pub(super) fn live(&self, number: u64, is_over: &AtomicBool) -> Result<Lived> {
        let mut lived = Lived::default();
        while !is_over.load(Ordering::Relaxed) {
            let seed = self.seed.wrapping_mul(1000) + lived.lives;
            self.one_life(&name(number), seed, &mut lived)
                .with_context(|| format!("{}, life {}", name(number), lived.lives))?;
        }
        Ok(lived)
    }

    fn one_life(&self, name: &str, seed: u64, lived: &mut Lived) -> Result<()> {
        let file = self.vm_file(name, seed)?;
        let file = file.to_str().context("a path that is not UTF-8")?;
        // Its daemon may die before it has created the machine, or before it says so: the same machine is
        // created once.
        self.place.insist(&["create", file])?;
        self.place.insist(&["start", name])?;
        let started = Instant::now();
        let ended = loop {
            let about = self.place.inspect(name)?.summary;
            if let (State::Stopped, Some(run)) = (about.state, about.last_run) {
                break run;
            }
            ensure!(
                started.elapsed() < LIFE_MAX,
                "the guest does not end: {}",
                self.place.log()
            );
            sleep(POLL);
        };
        let console = self.place.insist(&["logs", name, "--console"])?;
        lived.lives += 1;
        lived.rounds += number_in(&console, "BH beside.end", "rounds=").unwrap_or(0);
        lived.guest_errors += number_in(&console, "BH done", "errors=").unwrap_or(1);
        if ended.ending != "powered_off" {
            lived
                .deaths
                .push(format!("{name}: {}: {:?}", ended.ending, ended.message));
        }
        self.place.insist(&["rm", name])?;
        Ok(())
    }

    fn vm_file(&self, name: &str, seed: u64) -> Result<std::path::PathBuf> {
        let disk = self.place.directory().join(format!("{name}.img"));
        File::create(&disk)?.set_len(DISK_BYTES)?;
        let file = self.place.directory().join(format!("{name}.toml"));
        let text = format!(
            "name = {name:?}\n\
             [machine]\nmemory = \"64MiB\"\n\
             [boot]\nkernel = {:?}\n\
             cmdline = \"mode=beside seconds={GUEST_S} seed={seed} qd=16 timeout=120\"\n\
             [vsock]\n[[disk]]\npath = {disk:?}\n",
            self.guest
        );
        fs::write(&file, text)?;
        Ok(file)
    }
}

/// The number behind `key` in the last line of `console` that has `record`.
fn number_in(console: &str, record: &str, key: &str) -> Option<u64> {
    let line = console.lines().rev().find(|line| line.contains(record))?;
    line.split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_the_last_record() {
        let console = "BH beside.round n=1\nBH beside.end rounds=7 ms=20\nBH done errors=0\n";
        assert_eq!(number_in(console, "BH beside.end", "rounds="), Some(7));
        assert_eq!(number_in(console, "BH done", "errors="), Some(0));
        assert_eq!(number_in("", "BH done", "errors="), None);
    }
}
