//! `cargo xtask demo`: the main job, for somebody who sees Bulkhead for the first time.
//!
//! Boots the built-in guest with every device in a process of its own, shows its console and the
//! processes, and checks that the guest read the random nonce that was put on its disk a moment ago.

mod table;

use crate::process;
use crate::{command, suite};
use anyhow::{Context, Result, bail, ensure};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use table::Row;

const NONCE_BYTES: usize = 64;
/// How much of a line is shown: lines that break make a console hard to read.
const LINE_CHARS: usize = 104;
const DISK_BYTES: u64 = 16 << 20;
/// The guest verifies the disk from behind the nonce's sector on, then sleeps while we look.
const ARGUMENTS: &str = "mode=hello,nonce,rng,legacy,blk,idle seconds=2 sectors=4096";
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

    let mut bulkhead = command::command(binaries.join("bulkhead"));
    bulkhead.env("BULKHEAD_STATE_DIR", directory.path().join("state"));
    bulkhead.env("BULKHEAD_RUNTIME_DIR", directory.path().join("run"));
    bulkhead.env("BULKHEAD_LIBEXEC_DIR", &binaries);
    bulkhead.arg("run").arg("--disk").arg(&disk);
    bulkhead.args([
        "-m",
        "128MiB",
        "-c",
        "2",
        "--timeout=50s",
        "--cmdline",
        ARGUMENTS,
    ]);
    bulkhead.stdout(Stdio::piped());
    let started = Instant::now();
    let mut guard = Guard(bulkhead.spawn().context("cannot start bulkhead")?);
    let pid = guard.0.id();
    let output = guard.0.stdout.take().context("no pipe")?;

    println!("The guest's console:");
    let mut seen = Seen::default();
    for line in BufReader::new(output).lines() {
        let line = line?;
        println!(
            "  {:>6.1} ms | {}",
            started.elapsed().as_secs_f64() * 1e3,
            shortened(&line)
        );
        if line.starts_with("BH idle ") {
            seen.rows = show_processes(pid)?;
        }
        seen.nonce |= line.starts_with("BH nonce ") && line.contains(&nonce);
        seen.done |= line.starts_with("BH done ") && line.contains("errors=0");
    }
    let status = guard.0.wait()?;
    ensure!(status.success(), "bulkhead ended with {status}");
    seen.check()?;
    println!(
        "\nThe guest read the nonce, verified its disk, and powered off. All of this took {:.1} s.",
        started.elapsed().as_secs_f64()
    );
    Ok(())
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
    done: bool,
    rows: Vec<Row>,
}

impl Seen {
    fn check(&self) -> Result<()> {
        ensure!(self.nonce, "the guest did not read the nonce back");
        ensure!(self.done, "the guest did not report success");
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

fn make_disk(path: &std::path::Path) -> Result<String> {
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
        "(permitted: system calls and ioctl codes left to a thread; files: entries in its root):\n"
    );
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

/// Ends what was started, also after an error.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            process::end_tree(self.0.id(), Duration::from_secs(2));
            let _ended = self.0.wait();
        }
    }
}
