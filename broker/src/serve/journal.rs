//! The events of a machine's life as JSON lines, in two files of bounded size: the older is thrown
//! away when the newer is full. What cannot be written is counted and told in the next line that
//! can: a full disk costs the log, never the machine.

use crate::api::SCHEMA_VERSION;
use crate::api::time::{now_ms, rfc3339};
use serde::Serialize;
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use tokio::sync::broadcast;

/// Lines that a follower may be behind before it loses the oldest.
const FOLLOWERS_LINES: usize = 256;
/// Longest line in bytes; longer events lose their text.
const LINE_BYTES_MAX: usize = 4096;

/// One line with its number, which grows.
#[derive(Debug, Clone)]
pub(super) struct Line {
    pub(super) number: u64,
    pub(super) text: String,
}

#[derive(Serialize)]
struct Object<'a> {
    schema_version: u32,
    number: u64,
    time: String,
    vm: &'a str,
    event: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lines_lost_before: Option<u64>,
    #[serde(flatten)]
    about: &'a Value,
}

/// The log of one machine.
#[derive(Debug)]
pub(super) struct Journal {
    directory: PathBuf,
    vm: String,
    bytes_max: u64,
    file: Option<(File, u64)>,
    number: u64,
    lost: u64,
    followers: broadcast::Sender<Line>,
}

fn newer(directory: &Path) -> PathBuf {
    directory.join("events.jsonl")
}

fn older(directory: &Path) -> PathBuf {
    directory.join("events.1.jsonl")
}

impl Journal {
    /// The log in `directory`, which is made at the first event.
    pub(super) fn new(directory: PathBuf, vm: &str, bytes_max: u64) -> Self {
        let number = last_number(&directory);
        Self {
            directory,
            vm: vm.to_owned(),
            bytes_max,
            file: None,
            number,
            lost: 0,
            followers: broadcast::channel(FOLLOWERS_LINES).0,
        }
    }

    /// Lines from now on.
    pub(super) fn follow(&self) -> broadcast::Receiver<Line> {
        self.followers.subscribe()
    }

    /// Writes an event: its name and what else there is to say, an object.
    pub(super) fn event(&mut self, event: &str, about: Value) {
        self.number += 1;
        let line = |about: &Value| {
            let object = Object {
                schema_version: SCHEMA_VERSION,
                number: self.number,
                time: rfc3339(now_ms()),
                vm: &self.vm,
                event,
                lines_lost_before: (self.lost > 0).then_some(self.lost),
                about,
            };
            // Plain data with string keys can always be written.
            serde_json::to_string(&object).unwrap_or_default() + "\n"
        };
        let mut text = line(&about);
        if text.len() > LINE_BYTES_MAX {
            text = line(&json!({ "too_long": true }));
        }
        match self.append(text.as_bytes()) {
            Ok(()) => self.lost = 0,
            Err(error) => {
                self.lost += 1;
                self.file = None;
                if self.lost.is_power_of_two() {
                    let (vm, lost) = (&self.vm, self.lost);
                    tracing::warn!(%vm, lost, %error, "events cannot be written");
                }
            }
        }
        let number = self.number;
        // Nobody follows most of the time.
        let _followers = self.followers.send(Line { number, text });
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            self.file = Some(open(&self.directory)?);
        }
        let Some((file, bytes)) = &mut self.file else {
            return Ok(());
        };
        let after = *bytes + line.len() as u64;
        if after > self.bytes_max / 2 && *bytes > 0 {
            fs::rename(newer(&self.directory), older(&self.directory))?;
            self.file = None;
            return self.append(line);
        }
        // A line that did not fit on the disk is ended, so that the next one is whole.
        match file.write(line)? {
            n if n == line.len() => *bytes = after,
            n => {
                let _best_effort = file.set_len(*bytes);
                let missing = line.len() - n;
                return Err(io::Error::other(format!("{missing} bytes did not fit")));
            }
        }
        Ok(())
    }
}

fn open(directory: &Path) -> io::Result<(File, u64)> {
    super::make_private(directory)?;
    let mut options = OpenOptions::new();
    let options = options.append(true).create(true).mode(0o600);
    let file = options.open(newer(directory))?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

/// Everything that is kept of the log in `directory`.
///
/// # Errors
/// The disk's.
pub(super) fn read(directory: &Path, bytes_max: u64) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    for path in [older(directory), newer(directory)] {
        match File::open(&path) {
            Ok(file) => {
                file.take(bytes_max).read_to_end(&mut text)?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(text)
}

/// The number of the last line, so that numbers go on after a restart of the daemon.
fn last_number(directory: &Path) -> u64 {
    let last_of = |path: PathBuf| {
        let text = fs::read(path).ok()?;
        let mut lines = text.rsplit(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines.find_map(number)
    };
    last_of(newer(directory))
        .or_else(|| last_of(older(directory)))
        .unwrap_or(0)
}

/// The number of a line.
pub(super) fn number(line: &[u8]) -> Option<u64> {
    let value: Value = serde_json::from_slice(line).ok()?;
    value.get("number")?.as_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(directory: &Path) -> Vec<Value> {
        let text = read(directory, u64::MAX).unwrap();
        let lines = text.split(|&b| b == b'\n').filter(|line| !line.is_empty());
        lines.map(|l| serde_json::from_slice(l).unwrap()).collect()
    }

    #[test]
    fn log_is_bounded_and_keeps_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::new(dir.path().join("vm"), "web", 8192);
        for n in 0..500 {
            journal.event("started", json!({ "pid": n }));
        }
        let directory = dir.path().join("vm");
        let size = |path: PathBuf| fs::metadata(path).unwrap().len();
        let total = size(newer(&directory)) + size(older(&directory));
        assert!(total <= 8192, "{total}");
        let kept = lines(&directory);
        assert!(kept.len() > 30);
        assert_eq!(kept.last().unwrap()["pid"], 499);
        let numbers: Vec<_> = kept.iter().map(|l| l["number"].as_u64().unwrap()).collect();
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1));
        let mut again = Journal::new(directory.clone(), "web", 8192);
        again.event("ended", json!({}));
        assert_eq!(lines(&directory).last().unwrap()["number"], 501);
    }

    #[test]
    fn each_line_begins_with_its_version_and_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::new(dir.path().into(), "web", 1 << 20);
        let mut follower = journal.follow();
        journal.event("fault", json!({ "reason": "x".repeat(10_000) }));
        let line = follower.try_recv().unwrap();
        assert!(
            line.text.starts_with("{\"schema_version\":1,"),
            "{}",
            line.text
        );
        assert!(line.text.len() <= LINE_BYTES_MAX && line.text.contains("too_long"));
        assert_eq!(line.number, 1);
    }

    #[test]
    fn lines_that_could_not_be_written_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("vm");
        fs::write(&place, "not a directory").unwrap();
        let mut journal = Journal::new(place.clone(), "web", 8192);
        journal.event("started", json!({}));
        journal.event("locked", json!({}));
        fs::remove_file(&place).unwrap();
        journal.event("ended", json!({}));
        let kept = lines(&place);
        assert_eq!((kept.len(), &kept[0]["lines_lost_before"]), (1, &json!(2)));
    }
}
