//! Files: a shell script in the small Linux creates, renames, removes and synchronises files in an ext4, and
//! tells each step before and after. What it said to have synchronised must be there after a power cut.
//!
//! Step `i` writes a file under another name, synchronises it, renames it to `fI` and synchronises the
//! directory; then the same over the file `current`, which holds `i`; then it removes `f(I-20)`. So a file is
//! there whole or not at all, and `current` holds a whole number that is not older than what was told.
//!
//! The terminal of Linux keeps lines for a while. Of a guest that did not get to its end, a few steps may
//! have been done that were never told.

use super::record::Findings;
use super::{Checker, Guests, Verified, WorkloadError};
use crate::prng;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// So many files are there at a time.
const KEPT: u64 = 20;
/// Lines of a file.
const LINES: u64 = 40;
/// So many steps may be done and not told, when the guest was cut off.
const UNTOLD_MAX: u64 = 8;

/// What is in the root directory of a disk.
pub type Tree = BTreeMap<String, Vec<u8>>;

/// An ext4 without files, of so many bytes.
pub(super) fn disk(bytes: u64) -> Result<Vec<u8>, WorkloadError> {
    let image = tempfile::NamedTempFile::new()?;
    image.as_file().set_len(bytes)?;
    let outcome = tool("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), image.path()])?;
    if outcome.code != Some(0) {
        return Err(WorkloadError::Tool(outcome.text));
    }
    Ok(fs::read(image.path())?)
}

fn mark(seed: u64) -> String {
    format!("{:x}", prng::mix(seed))
}

/// What file `fI` holds.
fn contents(seed: u64, step: u64) -> Vec<u8> {
    let mark = mark(seed);
    let line = |n: u64| format!("{step} {n} {mark}\n");
    (0..LINES).map(line).collect::<String>().into_bytes()
}

fn script(seconds: u64, seed: u64) -> String {
    let mark = mark(seed);
    format!(
        "cd /mnt; say() {{ echo bh.files $*; }}; i=0; [ -e current ] && read -r i <current; say start $i; \
         read -r u x </proc/uptime; end=$((${{u%%.*}}+{seconds})); \
         while read -r u x </proc/uptime; [ ${{u%%.*}} -lt $end ]; do \
         i=$((i+1)); say begin $i; j=0; \
         while [ $j -lt {LINES} ]; do echo $i $j {mark}; j=$((j+1)); done >new && \
         sync new && mv -f new f$i && sync . && say created $i || say refused $i; \
         echo $i >next && sync next && mv -f next current && sync . && say current $i || say refused $i; \
         if [ $i -gt {KEPT} ]; then r=$((i-{KEPT})); rm -f f$r && sync . && say removed $r || say refused $r; fi; \
         done; cd /; umount /mnt && say end $i"
    )
}

pub(super) fn arguments(
    seconds: u64,
    seed: u64,
    guests: &Guests,
) -> Result<Vec<OsString>, WorkloadError> {
    let linux = guests.linux.as_ref().ok_or(WorkloadError::NoLinux)?;
    let script = script(seconds, seed);
    let fast = &linux.cmdline;
    let cmdline = format!("{fast} console=ttyS0 quiet bh.mount=/dev/vda bh.run=\"{script}\"");
    let mut arguments: Vec<OsString> = vec!["--kernel".into(), linux.kernel.clone().into()];
    arguments.extend(["--initrd".into(), linux.initrd.clone().into()]);
    arguments.extend(["--cmdline".into(), cmdline.into()]);
    arguments.extend(["-m".into(), "96MiB".into()]);
    Ok(arguments)
}

/// The checker.
#[derive(Debug)]
pub struct Files {
    seed: u64,
    found: Findings,
    /// Steps of which these things were told; 0 for none.
    begun: u64,
    created: u64,
    current: u64,
    removed: u64,
    is_ended: bool,
    refused: u64,
    verified: u64,
}

impl Files {
    /// For a guest with this seed, and a disk without files.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            found: Findings::default(),
            begun: 0,
            created: 0,
            current: 0,
            removed: 0,
            is_ended: false,
            refused: 0,
            verified: 0,
        }
    }

    /// Steps that may have been done and not told.
    const fn untold(&self) -> u64 {
        if self.is_ended { 0 } else { UNTOLD_MAX }
    }

    fn start(&mut self, step: u64) {
        self.is_ended = false;
        let (least, most) = (self.current, self.begun + UNTOLD_MAX);
        if !(least..=most).contains(&step) {
            self.found.add(format!(
                "the guest finds step {step}: {least} was synchronised, {} begun",
                self.begun
            ));
        }
        self.begun = self.begun.max(step);
    }

    fn told(&mut self, what: &str, step: u64) {
        let (last, wanted) = match what {
            "begin" => (&mut self.begun, None),
            "created" => (&mut self.created, Some(self.begun)),
            "current" => (&mut self.current, Some(self.begun)),
            "removed" => (&mut self.removed, self.begun.checked_sub(KEPT)),
            "end" => {
                self.is_ended = true;
                return;
            }
            "refused" => {
                self.refused += 1;
                return;
            }
            _ => return self.found.add(format!("bh.files {what} {step}")),
        };
        if wanted.is_some_and(|wanted| wanted != step) {
            let error = format!("{what} {step} while step {wanted:?} is done");
            return self.found.add(error);
        }
        *last = step.max(*last);
    }

    /// Judges what is in the root directory.
    fn judge(&mut self, tree: &Tree) {
        let least = (self.removed + 1).max(1);
        // What follows the last file that is told to be gone may be gone as well, if a step was not told.
        let maybe_gone = (self.begun + self.untold()).saturating_sub(KEPT);
        for step in least.max(maybe_gone + 1)..=self.created {
            match tree.get(&format!("f{step}")) {
                Some(_) => self.verified += 1,
                None => self
                    .found
                    .add(format!("f{step} was synchronised and is lost")),
            }
        }
        let most = self.begun + self.untold();
        for (name, bytes) in tree {
            match name.as_str() {
                // Half done, whatever it holds.
                "new" | "next" | "lost+found" => {}
                "current" => self.judge_current(bytes, most),
                name => self.judge_file(name, bytes, most),
            }
        }
        if self.current > 0 && !tree.contains_key("current") {
            self.found.add("`current` was synchronised and is lost");
        }
    }

    fn judge_current(&mut self, bytes: &[u8], most: u64) {
        let text = std::str::from_utf8(bytes).ok();
        let step: Option<u64> = text.and_then(|t| t.strip_suffix('\n')?.parse().ok());
        match step {
            Some(step) if (self.current..=most).contains(&step) => self.verified += 1,
            Some(step) => self.found.add(format!(
                "`current` holds {step}: {} was synchronised, {} begun",
                self.current, self.begun
            )),
            None => self.found.add(format!("`current` holds {bytes:?}")),
        }
    }

    fn judge_file(&mut self, name: &str, bytes: &[u8], most: u64) {
        let step = name.strip_prefix('f').and_then(|n| n.parse::<u64>().ok());
        let Some(step) = step.filter(|step| (1..=most).contains(step)) else {
            return self.found.add(format!("nobody has made {name}"));
        };
        if step <= self.removed {
            self.found.add(format!("{name} was removed and is there"));
        }
        if bytes != contents(self.seed, step) {
            let bytes = bytes.len();
            self.found
                .add(format!("{name} does not hold its {bytes} bytes"));
        }
    }
}

impl Checker for Files {
    fn record(&mut self, _: Duration, line: &str) {
        // The kernel may have begun a line of its own.
        let Some((_, said)) = line.trim_end().split_once("bh.files ") else {
            let trouble = ["EXT4-fs error", "I/O error", "Kernel panic", "cannot mount"];
            if trouble.iter().any(|text| line.contains(text)) {
                self.refused += 1;
            }
            return;
        };
        let step = said
            .split_once(' ')
            .and_then(|(what, step)| Some((what, step.parse().ok()?)));
        match step {
            Some(("start", step)) => self.start(step),
            Some((what, step)) => self.told(what, step),
            None => self.found.add(format!("no step: {line:?}")),
        }
    }

    fn image(&mut self, bytes: &[u8]) {
        match tree(bytes) {
            Ok(tree) => self.judge(&tree),
            Err(error) => self.found.add(error.to_string()),
        }
    }

    fn finish(self: Box<Self>) -> Verified {
        Verified::new(self.verified, self.refused, self.found)
    }
}

struct Outcome {
    code: Option<i32>,
    text: String,
}

#[expect(
    clippy::disallowed_methods,
    reason = "the host's own tools judge a file system"
)]
fn tool(program: &str, arguments: &[&Path]) -> Result<Outcome, WorkloadError> {
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new(program)
        .args(arguments)
        .env("PATH", format!("{path}:/usr/sbin:/sbin"))
        .output()
        .map_err(|error| WorkloadError::Tool(format!("{program}: {error}")))?;
    let [said, wrong] =
        [output.stdout, output.stderr].map(|b| String::from_utf8_lossy(&b).into_owned());
    Ok(Outcome {
        code: output.status.code(),
        text: format!("{program}: {} {}", said.trim(), wrong.trim()),
    })
}

/// The files of an ext4 as it comes up after a power cut: its journal is replayed, and nothing else may be
/// wrong with it.
fn tree(bytes: &[u8]) -> Result<Tree, WorkloadError> {
    let scratch = tempfile::tempdir()?;
    let (image, files) = (scratch.path().join("image"), scratch.path().join("files"));
    fs::write(&image, bytes)?;
    fs::create_dir(&files)?;
    let repaired = tool("e2fsck", &["-f".as_ref(), "-p".as_ref(), &image])?;
    let clean = tool("e2fsck", &["-f".as_ref(), "-n".as_ref(), &image])?;
    if !matches!(repaired.code, Some(0 | 1)) || clean.code != Some(0) {
        return Err(WorkloadError::Tool(repaired.text));
    }
    let dump = format!("rdump / {}", files.display());
    let dumped = tool("debugfs", &["-R".as_ref(), dump.as_ref(), &image])?;
    if dumped.code != Some(0) {
        return Err(WorkloadError::Tool(dumped.text));
    }
    let mut tree = Tree::new();
    for entry in fs::read_dir(&files)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let bytes = match entry.file_type()?.is_file() {
            true => fs::read(entry.path())?,
            false => Vec::new(),
        };
        tree.insert(name, bytes);
    }
    Ok(tree)
}

#[cfg(test)]
#[path = "files_tests.rs"]
mod tests;
