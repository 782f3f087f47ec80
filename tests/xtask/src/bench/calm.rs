//! Whether others use the CPUs of this machine, for figures that are to be taken on a quiet one.
//!
//! Asked between two measurements, when nothing of the benchmark's own runs. It tells little of what happened
//! meanwhile, but what disturbs mostly lasts longer than one measurement.

use anyhow::{Context, Result, bail};
use std::fs;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long it is looked.
const LOOK: Duration = Duration::from_millis(500);
/// The share of all CPUs' time, in percent, that others may use.
const OTHERS_PERCENT: u64 = 10;
/// How long it may take until others leave the CPUs alone.
const PATIENCE: Duration = Duration::from_mins(30);

/// Returns once the machine is calm.
pub(super) fn wait() -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while !is_calm()? {
        if Instant::now() >= until {
            bail!("others have used the CPUs for {} s", PATIENCE.as_secs());
        }
    }
    Ok(())
}

/// Whether nearly all CPU time is idle now.
pub(super) fn is_calm() -> Result<bool> {
    let before = Ticks::now()?;
    sleep(LOOK);
    let after = Ticks::now()?;
    let all = after.all.saturating_sub(before.all);
    let idle = after.idle.saturating_sub(before.idle);
    Ok(all.saturating_sub(idle) * 100 <= all * OTHERS_PERCENT)
}

/// Time of all CPUs since the boot.
#[derive(Debug, PartialEq, Eq)]
struct Ticks {
    all: u64,
    idle: u64,
}

impl Ticks {
    fn now() -> Result<Self> {
        let stat = fs::read_to_string("/proc/stat")?;
        Self::parse(&stat).context("/proc/stat has no line of all CPUs")
    }

    /// Fields 4 and 5 are idle, the first eight are all: those behind them are parts of the first two.
    fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line
            .split_whitespace()
            .take(8)
            .map_while(|field| field.parse().ok())
            .collect();
        Some(Self {
            all: ticks.iter().sum(),
            idle: ticks.get(3)? + ticks.get(4)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_not_counted_twice() {
        let stat = "cpu  100 20 30 400 50 6 7 8 90 10\ncpu0 1 2 3 4 5 6 7 8 9 10\n";
        let expected = Ticks {
            all: 621,
            idle: 450,
        };
        assert_eq!(Ticks::parse(stat), Some(expected));
        assert_eq!(Ticks::parse("intr 5\n"), None);
    }
}
