//! `cargo xtask demo`: the main job, for somebody who sees Bulkhead for the first time.
//!
//! Boots the built-in guest with every device in a process of its own, shows its console and the
//! processes, and checks that the guest read the random nonce that was put on its disk a moment ago.
//! Then it kills the disk's process while the guest writes. The guest counts what it finds wrong.

mod death;
mod table;

use crate::process;
use crate::restart::Restart;
use crate::{command, suite};
use anyhow::{Context, Result, bail, ensure};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};
use table::Row;

const NONCE_BYTES: usize = 64;
/// How much of a line is shown: lines that break make a console hard to read.
const LINE_CHARS: usize = 104;
const DISK_BYTES: u64 = 16 << 20;
/// The guest verifies the disk from behind the nonce's sector on, sleeps while we look, and writes,
/// flushes and verifies while the disk's process is killed.
const ARGUMENTS: &str = "mode=hello,nonce,rng,legacy,blk,idle,blk-load seconds=2 sectors=4096";
/// Lines that may wait to be shown.
const LINES_CAPACITY: usize = 1024;
const KINDS: [&str; 5] = ["vcpu", "legacy", "console", "blk", "rng"];

/// Runs the demo.
pub(crate) fn run() -> Result<()> {
    suite::require_kvm()?;
    let binaries = suite::release_binaries()?;
    let directory = tempfile::Builder::new()
        .prefix("bulkhead-demo-")
        .tempdir()?;
    let disk = directory.path().join("disk.img");
    let nonce = make_disk(&disk)?;
    println!(
        "A disk of {} MiB now starts with this nonce:\n  {}\n  {}\n",
        DISK_BYTES >> 20,
        &nonce[..NONCE_BYTES],
        &nonce[NONCE_BYTES..]
    );

    let started = Instant::now();
    let mut machine = Running::start(&binaries, directory.path(), &disk)?;
    println!("The guest's console:");
    let mut seen = Seen::default();
    while let Ok(line) = machine.lines.recv() {
        match line {
            Line::Console(line) => {
                let ms = started.elapsed().as_secs_f64() * 1e3;
                println!("  {ms:>6.1} ms | {}", shortened(&line));
                seen.console(&line, &nonce);
                if line.starts_with("BH idle ") {
                    seen.rows = show_processes(machine.pid())?;
                } else if line.starts_with("BH blk-load.begin ") {
                    seen.victim = Some(death::kill_while_writing(machine.pid(), &disk)?);
                }
            }
            Line::Broker(line) => match (seen.victim, Restart::parse(&line)) {
                (Some(victim), Some(restart)) => {
                    death::show_successor(victim, &restart)?;
                    seen.restarts += 1;
                }
                _ => eprintln!("{line}"),
            },
        }
    }
    let status = machine.child.wait()?;
    let errors = seen.errors.context("the guest did not say how it went")?;
    seen.check(errors)?;
    ensure!(
        status.success() || errors > 0,
        "bulkhead ended with {status}"
    );
    println!(
        "\nThe guest read the nonce, verified its disk, and powered off. All of this took {:.1} s.",
        started.elapsed().as_secs_f64()
    );
    println!("guest errors: {errors}");
    ensure!(errors == 0, "the guest found errors");
    Ok(())
}

/// What comes out of `bulkhead run`.
enum Line {
    Console(String),
    Broker(String),
}

/// A `bulkhead run`. Dropped, it ends what was started, also after an error.
struct Running {
    child: Child,
    lines: Receiver<Line>,
}

impl Running {
    fn start(binaries: &Path, directory: &Path, disk: &Path) -> Result<Self> {
        let mut bulkhead = command::command(binaries.join("bulkhead"));
        bulkhead.env("BULKHEAD_STATE_DIR", directory.join("state"));
        bulkhead.env("BULKHEAD_RUNTIME_DIR", directory.join("run"));
        bulkhead.env("BULKHEAD_LIBEXEC_DIR", binaries);
        bulkhead.arg("run").arg("--disk").arg(disk);
        bulkhead.args(["-m", "128MiB", "-c", "2", "--timeout=50s"]);
        bulkhead.args(["--cmdline", ARGUMENTS]);
        bulkhead.stdout(Stdio::piped()).stderr(Stdio::piped());
        let (sender, lines) = sync_channel(LINES_CAPACITY);
        let child = bulkhead.spawn().context("cannot start bulkhead")?;
        let mut running = Self { child, lines };
        let output = running.child.stdout.take().context("no pipe")?;
        let errors = running.child.stderr.take().context("no pipe")?;
        pass_on(output, sender.clone(), Line::Console);
        pass_on(errors, sender, Line::Broker);
        Ok(running)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            process::end_tree(self.child.id(), Duration::from_secs(2));
            let _ended = self.child.wait();
        }
    }
}

/// Passes lines on until there are none, or nobody wants them.
fn pass_on(from: impl Read + Send + 'static, to: SyncSender<Line>, as_line: fn(String) -> Line) {
    std::thread::spawn(move || {
        let lines = BufReader::new(from).lines().map_while(Result::ok);
        lines
            .map(as_line)
            .try_for_each(|line| to.send(line).map_err(drop))
    });
}

/// A line of the console as it fits beside the time.
fn shortened(line: &str) -> String {
    match line.char_indices().nth(LINE_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_owned(),
    }
}

#[derive(Default)]
struct Seen {
    nonce: bool,
    rows: Vec<Row>,
    /// The process that was killed.
    victim: Option<u32>,
    /// Processes that took another's place since.
    restarts: u32,
    /// Rounds of writing and verifying, that of the death included.
    rounds: u64,
    /// The guest's own count, once it is done.
    errors: Option<u64>,
}

impl Seen {
    fn console(&mut self, line: &str, nonce: &str) {
        self.nonce |= line.starts_with("BH nonce ") && line.contains(nonce);
        if let Some(rest) = line.strip_prefix("BH blk-load.end ") {
            self.rounds = value(rest, "rounds").unwrap_or(0);
        }
        if let Some(rest) = line.strip_prefix("BH done ") {
            self.errors = value(rest, "errors");
        }
    }

    /// Whether everything was there to be seen; a guest that counted `errors` may have stopped early.
    fn check(&self, errors: u64) -> Result<()> {
        ensure!(self.victim.is_some(), "nothing was killed");
        if errors == 0 {
            ensure!(self.nonce, "the guest did not read the nonce back");
            ensure!(self.rounds > 0, "the guest verified nothing");
            ensure!(self.restarts > 0, "nobody took the dead process's place");
        }
        for kind in KINDS {
            let row = self.rows.iter().find(|row| row.kind() == kind);
            let row = row.with_context(|| format!("there was no process of kind {kind}"))?;
            ensure!(
                row.is_confined(),
                "the process of kind {kind} was not confined"
            );
        }
        Ok(())
    }
}

/// The number of `key` in a record.
fn value(record: &str, key: &str) -> Option<u64> {
    let mut words = record.split_whitespace();
    let number = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='))?;
    number.parse().ok()
}

fn make_disk(path: &Path) -> Result<String> {
    let mut nonce = [0; NONCE_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut nonce)?;
    let mut file = File::create(path)?;
    file.set_len(DISK_BYTES)?;
    file.seek(SeekFrom::Start(0))?;
    file.write_all(&nonce)?;
    let mut hex = String::new();
    nonce
        .iter()
        .try_for_each(|byte| write!(hex, "{byte:02x}"))?;
    Ok(hex)
}

fn show_processes(root: u32) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for pid in process::tree(root).into_iter().skip(1) {
        rows.push(Row::measure(pid).with_context(|| format!("process {pid}"))?);
    }
    if rows.is_empty() {
        bail!("bulkhead has no processes");
    }
    println!(
        "\nThe processes of this virtual machine, as /proc and the kernel's seccomp filters show them"
    );
    println!(
        "(permitted: system calls and ioctl codes left to a thread; Landlock: what it denied when tried;"
    );
    println!("files: entries in its root directory):\n");
    println!("{}", Row::heading());
    let broker = fs::read_to_string(format!("/proc/{root}/smaps_rollup"))?;
    let pss = broker
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .unwrap_or("?");
    rows.iter().for_each(|row| println!("{}", row.text()));
    println!(
        "{root:>7} the broker, outside of every data path; PSS {}\n",
        pss.trim()
    );
    Ok(rows)
}
