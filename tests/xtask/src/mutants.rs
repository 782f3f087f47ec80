//! `cargo xtask mutants`: whether the fault-injection harness finds code that is broken on purpose.
//!
//! Responsible for: a copy of the tree in which one patch of `tests/faults/mutants/` after the other is
//! applied and built, and the scenario that the patch names as its finder, run against what was built by
//! the harness as it is. Programs as they are must hold in every one of these scenarios, and programs that
//! are broken must fail in theirs, within as many runs as fit into the smoke set's time.
//!
//! A patch begins with a line on what it breaks and one that names its finder:
//!
//! ```text
//! Flushes of the guest are answered and not carried out.
//! found-by: power-is-cut
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::{command, suite, workspace};

/// Where the patches are.
const PATCHES: &str = "tests/faults/mutants";
const SCENARIOS: &str = "tests/faults/scenarios";
/// Most runs of a scenario: each has a seed of its own.
const RUNS_MAX: u64 = 3;
/// How long looking for one mutant may take: what the whole smoke set takes.
const BUDGET: Duration = Duration::from_secs(90);
/// Exit codes of `bulkhead-fault run`.
const HELD: i32 = 0;
const FAILED: i32 = 10;
/// The packages whose programs can be broken.
const PACKAGES: [&str; 9] = [
    "bulkhead",
    "bulkhead-vcpu",
    "bulkhead-legacy",
    "bulkhead-console",
    "bulkhead-blk",
    "bulkhead-rng",
    "bulkhead-net",
    "bulkhead-vsock",
    "bulkhead-fs",
];

/// `cargo xtask mutants …`
#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Only those whose name contains this.
    only: Option<String>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// A patch that breaks something.
#[derive(Debug, PartialEq, Eq)]
struct Mutant {
    name: String,
    what: String,
    found_by: String,
    patch: PathBuf,
}

impl Mutant {
    fn parse(name: &str, patch: PathBuf, text: &str) -> Result<Self> {
        let mut head = text.lines().take_while(|line| !line.starts_with("diff "));
        let what = head.next().unwrap_or_default().to_owned();
        let found_by = head.find_map(|line| line.strip_prefix("found-by: "));
        let found_by = found_by.with_context(|| format!("{name}: expected a line `found-by: `"))?;
        ensure!(!what.is_empty(), "{name}: expected what it breaks");
        Ok(Self {
            name: name.to_owned(),
            what,
            found_by: found_by.trim().to_owned(),
            patch,
        })
    }
}

/// What became of a mutant.
#[derive(Debug, Serialize)]
struct Row {
    mutant: String,
    what: String,
    found_by: String,
    is_found: bool,
    runs: u64,
    seconds: f64,
    /// The first thing that did not hold.
    why: String,
}

#[derive(Debug, Serialize)]
struct Report {
    mutants: Vec<Row>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "| mutant | scenario | runs | seconds | what did not hold |"
        )?;
        writeln!(f, "|---|---|---|---|---|")?;
        for row in &self.mutants {
            let why = if row.is_found {
                &row.why
            } else {
                "**not found**"
            };
            writeln!(
                f,
                "| {} | {} | {} | {:.0} | {why} |",
                row.mutant, row.found_by, row.runs, row.seconds
            )?;
        }
        Ok(())
    }
}

/// Runs the check. Fails when a mutant is not found, or a scenario fails without one.
pub(crate) fn run(options: &Options) -> Result<()> {
    suite::require_kvm()?;
    let mutants = mutants(options.only.as_deref())?;
    ensure!(!mutants.is_empty(), "no patch in {PATCHES} has such a name");
    let harness = Harness::new()?;
    let tree = Tree::new()?;

    let sound = tree.build()?;
    let finders: BTreeSet<&str> = mutants.iter().map(|m| m.found_by.as_str()).collect();
    for finder in finders {
        eprintln!("== {finder}, nothing broken");
        let run = harness.run(finder, 0, &sound)?;
        ensure!(
            run.code == HELD,
            "nothing is broken, and {finder} fails:\n{}",
            run.said
        );
    }

    let mut rows = Vec::new();
    for mutant in &mutants {
        eprintln!("== {}: {}", mutant.name, mutant.what);
        let applied = tree.apply(mutant)?;
        let programs = tree.build()?;
        rows.push(look_for(mutant, &harness, &programs)?);
        applied.revert()?;
    }
    let report = Report { mutants: rows };
    if options.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{report}");
    }
    let lost = report.mutants.iter().filter(|row| !row.is_found);
    let lost: Vec<&str> = lost.map(|row| row.mutant.as_str()).collect();
    ensure!(lost.is_empty(), "not found: {}", lost.join(", "));
    Ok(())
}

/// The patches, by name.
fn mutants(only: Option<&str>) -> Result<Vec<Mutant>> {
    let mut mutants = Vec::new();
    for entry in fs::read_dir(workspace::root().join(PATCHES))? {
        let path = entry?.path();
        let Some(name) = path.file_stem().and_then(|stem| stem.to_str()) else {
            continue;
        };
        if only.is_none_or(|part| name.contains(part)) {
            let text = fs::read_to_string(&path)?;
            mutants.push(Mutant::parse(name, path.clone(), &text)?);
        }
    }
    mutants.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(mutants)
}

/// Runs the finder until it finds the mutant, or its runs or its time are over.
fn look_for(mutant: &Mutant, harness: &Harness, programs: &Path) -> Result<Row> {
    let begin = Instant::now();
    let mut row = Row {
        mutant: mutant.name.clone(),
        what: mutant.what.clone(),
        found_by: mutant.found_by.clone(),
        is_found: false,
        runs: 0,
        seconds: 0.0,
        why: String::new(),
    };
    while !row.is_found && row.runs < RUNS_MAX && begin.elapsed() < BUDGET {
        let run = harness.run(&mutant.found_by, row.runs, programs)?;
        row.runs += 1;
        row.is_found = run.code == FAILED;
        let mut lines = run.said.lines();
        let why = lines.find_map(|line| line.strip_prefix("error: "));
        row.why = why.unwrap_or_default().replace('|', "/");
    }
    row.seconds = begin.elapsed().as_secs_f64();
    Ok(row)
}

/// What a run of a scenario said.
struct Run {
    code: i32,
    said: String,
}

/// The harness as it is, with its guests.
struct Harness {
    program: PathBuf,
    environment: Vec<(&'static str, PathBuf)>,
    /// Keeps the copies.
    _directory: tempfile::TempDir,
}

impl Harness {
    fn new() -> Result<Self> {
        let mut build = command::cargo();
        build.args(["build", "--package", "bulkhead-faults", "--bins"]);
        command::run(&mut build)?;
        let built = workspace::target_directory()?;
        let built = built.join("x86_64-unknown-linux-gnu/debug/bulkhead-fault");
        let directory = tempfile::Builder::new()
            .prefix("bulkhead-mutants-")
            .tempdir()?;
        let program = directory.path().join("bulkhead-fault");
        fs::copy(&built, &program).with_context(|| built.display().to_string())?;
        Ok(Self {
            program,
            environment: suite::images(false)?,
            _directory: directory,
        })
    }

    /// Runs a shipped scenario with its seed and `more`.
    fn run(&self, scenario: &str, more: u64, programs: &Path) -> Result<Run> {
        let file = workspace::root().join(SCENARIOS);
        let file = file.join(format!("{scenario}.toml"));
        let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let about: toml::Table = toml::from_str(&text)?;
        let seed = about.get("seed").and_then(toml::Value::as_integer);
        let seed = seed.unwrap_or(1).unsigned_abs() + more;
        let mut run = command::command(&self.program);
        run.args(["run", "--no-shrink", "--seed", &seed.to_string()]);
        run.arg(&file).stderr(Stdio::inherit());
        run.env("BULKHEAD_BIN_DIR", programs);
        run.env("BULKHEAD_TEST_LINUX_CMDLINE", suite::LINUX_CMDLINE.trim());
        run.envs(self.environment.iter().map(|(name, path)| (name, path)));
        let output = run.output()?;
        let code = output.status.code().context("the harness was killed")?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        eprintln!("   {}", said.lines().last().unwrap_or_default());
        Ok(Run { code, said })
    }
}

/// A copy of the tree that can be broken. It stays in the target directory, so that the next check builds
/// only what has changed.
struct Tree {
    source: PathBuf,
    target: PathBuf,
}

impl Tree {
    fn new() -> Result<Self> {
        let directory = workspace::target_directory()?.join("mutants");
        let tree = Self {
            source: directory.join("source"),
            target: directory.join("target"),
        };
        let files = workspace::source_files()?;
        for file in &files {
            let place = tree.source.join(&file.path);
            // What has not changed is not touched: cargo goes by times.
            if fs::read(&place).is_ok_and(|there| there == file.text.as_bytes()) {
                continue;
            }
            let parent = place.parent().context("a file has a directory")?;
            fs::create_dir_all(parent)?;
            fs::write(&place, &file.text).with_context(|| place.display().to_string())?;
        }
        Ok(tree)
    }

    /// Builds the programs, and returns their directory.
    fn build(&self) -> Result<PathBuf> {
        let mut build = command::cargo();
        build.current_dir(&self.source).args(["build", "--bins"]);
        for package in PACKAGES {
            build.args(["--package", package]);
        }
        build.arg("--target-dir").arg(&self.target);
        command::run(&mut build)?;
        Ok(self.target.join("x86_64-unknown-linux-gnu/debug"))
    }

    fn apply<'a>(&'a self, mutant: &'a Mutant) -> Result<Applied<'a>> {
        self.git_apply(mutant, &[])
            .with_context(|| format!("{} does not fit the code any more", mutant.name))?;
        Ok(Applied {
            tree: self,
            mutant,
            is_there: true,
        })
    }

    fn git_apply(&self, mutant: &Mutant, options: &[&str]) -> Result<()> {
        let mut apply = command::command("git");
        apply.current_dir(&self.source).arg("apply").args(options);
        apply.arg(&mutant.patch);
        // It is a directory as any other, and no part of the repository around it.
        let above = self.source.parent().unwrap_or(&self.source);
        apply.env("GIT_CEILING_DIRECTORIES", above);
        command::run(&mut apply)
    }
}

/// A mutant in the tree; dropping it takes it out.
struct Applied<'a> {
    tree: &'a Tree,
    mutant: &'a Mutant,
    is_there: bool,
}

impl Applied<'_> {
    fn revert(mut self) -> Result<()> {
        self.take_out()
    }

    fn take_out(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.is_there) {
            return Ok(());
        }
        self.tree.git_apply(self.mutant, &["--reverse"])
    }
}

impl Drop for Applied<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.take_out() {
            eprintln!("error: {error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patch_says_what_it_breaks_and_who_finds_it() {
        let text = "Breaks it.\nfound-by: it-is-broken\n\ndiff --git a/x b/x\nfound-by: no\n";
        let mutant = Mutant::parse("m", PathBuf::new(), text).unwrap();
        assert_eq!(mutant.what, "Breaks it.");
        assert_eq!(mutant.found_by, "it-is-broken");
        for text in [
            "Breaks it.\ndiff --git a/x b/x\nfound-by: no\n",
            "",
            "\nfound-by: x\n",
        ] {
            Mutant::parse("m", PathBuf::new(), text).unwrap_err();
        }
    }

    #[test]
    fn what_was_not_found_is_told() {
        let row = |is_found| Row {
            mutant: "m".to_owned(),
            what: "w".to_owned(),
            found_by: "s".to_owned(),
            is_found,
            runs: 1,
            seconds: 1.4,
            why: "data".to_owned(),
        };
        let report = Report {
            mutants: vec![row(true), row(false)],
        };
        let text = report.to_string();
        assert!(text.contains("| m | s | 1 | 1 | data |"), "{text}");
        assert!(text.contains("**not found**"), "{text}");
    }

    #[test]
    fn every_patch_fits_the_code_and_names_a_scenario() {
        let root = workspace::root();
        let mutants = mutants(None).unwrap();
        assert!(mutants.len() >= 10, "{}", mutants.len());
        for mutant in mutants {
            let scenario = format!("{SCENARIOS}/{}.toml", mutant.found_by);
            assert!(
                root.join(&scenario).is_file(),
                "{}: {scenario}",
                mutant.name
            );
            let mut check = command::command("git");
            check.current_dir(&root).args(["apply", "--check"]);
            command::output(check.arg(&mutant.patch)).unwrap();
        }
    }
}
