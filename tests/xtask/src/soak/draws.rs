//! The second part of a soak: scenarios of the fault-injection harness that are drawn at random, in lanes
//! beside each other, with daemons of their own.

use crate::guest::Image;
use crate::{command, workspace};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

/// Programs of the harness at once.
const LANES: u64 = 2;

/// What the drawn scenarios have shown.
#[derive(Debug, Default, Serialize)]
pub(super) struct Draws {
    pub(super) runs: u64,
    pub(super) verified: u64,
    /// Scenarios in which something did not hold.
    pub(super) failed: Vec<String>,
    /// How often each kind of fault was injected.
    pub(super) injected: BTreeMap<String, u64>,
}

/// The last line of `bulkhead-fault soak --json`.
#[derive(Debug, Deserialize)]
struct Said {
    runs: u64,
    verified: u64,
    failed: Vec<String>,
    injected: BTreeMap<String, u64>,
}

impl Draws {
    fn add(&mut self, said: Said) {
        self.runs += said.runs;
        self.verified += said.verified;
        self.failed.extend(said.failed);
        for (kind, count) in said.injected {
            *self.injected.entry(kind).or_default() += count;
        }
    }
}

/// Where scenarios that fail are kept.
pub(super) fn kept() -> Result<PathBuf> {
    Ok(workspace::target_directory()?.join("soak"))
}

/// Draws for so many minutes.
pub(super) fn draw(binaries: &Path, seed: u64, minutes: u64) -> Result<Draws> {
    let kept = kept()?;
    std::fs::create_dir_all(&kept)?;
    let guest = Image::TestGuest.path()?;
    let lane = |lane: u64| {
        let mut soak = command::command(binaries.join("bulkhead-fault"));
        soak.args(["soak", "--json", "--fewest", "0"]);
        soak.args(["--minutes", &minutes.to_string()]);
        soak.args(["--seed", &(seed * LANES + lane).to_string()]);
        soak.arg("--output").arg(&kept);
        soak.env("BULKHEAD_BIN_DIR", binaries);
        soak.env("BULKHEAD_TEST_GUEST", &guest);
        soak.stdout(Stdio::piped()).spawn()
    };
    let mut lanes: Vec<Child> = (0..LANES).map(lane).collect::<std::io::Result<_>>()?;
    let outputs: Vec<_> = lanes.iter_mut().map(|lane| lane.stdout.take()).collect();
    let listening: Vec<_> = outputs
        .into_iter()
        .map(|output| std::thread::spawn(move || last_line(output.context("a lane's output")?)))
        .collect();
    let mut draws = Draws::default();
    for (listening, mut lane) in listening.into_iter().zip(lanes) {
        let last = listening.join().ok().context("a thread panicked")??;
        let ended = lane.wait()?;
        let said = serde_json::from_str(&last);
        draws.add(said.with_context(|| format!("bulkhead-fault soak: {ended}: {last:?}"))?);
    }
    Ok(draws)
}

/// The last line of a program that says much.
fn last_line(output: impl std::io::Read) -> Result<String> {
    let mut last = String::new();
    for line in BufReader::new(output).lines() {
        last = line?;
    }
    Ok(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_are_counted_together() {
        let text = r#"{"schema_version":1,"kind":"soak","seed":2,"runs":3,"verified":9,
            "failed":["a"],"injected":{"host.kill":2},"too_seldom":[]}"#;
        let mut draws = Draws::default();
        for _ in 0..2 {
            draws.add(serde_json::from_str(text).unwrap());
        }
        assert_eq!((draws.runs, draws.verified, draws.failed.len()), (6, 18, 2));
        assert_eq!(draws.injected["host.kill"], 4);
    }
}
