//! Running the test guest under Bulkhead and under QEMU, the same way.

use super::calm;
use crate::daemon::Place;
use crate::guest::Image;
use crate::process;
use crate::{command, suite};
use anyhow::{Context, Result, bail, ensure};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a guest may take in all. Every mode used here ends by itself well before.
const GUEST_TIMEOUT_S: u64 = 60;
/// Guest memory in MiB.
pub(super) const MEMORY_MIB: u64 = 128;

/// Who runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vmm {
    /// The release build of this tree.
    Bulkhead,
    /// `qemu-system-x86_64 -M microvm`.
    Qemu,
    /// Bulkhead's parts without gates, walls and other processes; it always has a disk.
    Direct,
}

/// What the CPUs do besides what is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cpus {
    /// Nothing that the benchmark knows of.
    Free,
    /// Another machine of the benchmark's keeps all of them busy.
    Busy,
}

/// What all benchmarks share.
pub(super) struct Bench {
    /// Runs of each measurement.
    pub(super) runs: u32,
    peer: bool,
    calm: bool,
    binaries: PathBuf,
    guest: PathBuf,
    directory: tempfile::TempDir,
}

impl Bench {
    /// Builds what is measured.
    pub(super) fn prepare(runs: u32, peer: bool, calm: bool) -> Result<Self> {
        let binaries = suite::release_binaries()?;
        let guest = Image::TestGuest.path()?;
        let directory = tempfile::Builder::new()
            .prefix("bulkhead-bench-")
            .tempdir_in("/dev/shm")?;
        Ok(Self {
            runs,
            peer,
            calm,
            binaries,
            guest,
            directory,
        })
    }

    /// Those who run, in the order in which they take turns.
    pub(super) fn vmms(&self) -> &'static [Vmm] {
        if self.peer {
            &[Vmm::Bulkhead, Vmm::Qemu]
        } else {
            &[Vmm::Bulkhead]
        }
    }

    /// Whether QEMU runs, too.
    pub(super) const fn has_peer(&self) -> bool {
        self.peer
    }

    /// Where files on tmpfs may be put.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Measures `runs` times with each VMM in turns: first ours, then the peer's values.
    pub(super) fn alternate<T>(
        &self,
        measure: impl FnMut(Vmm) -> Result<T>,
    ) -> Result<(Vec<T>, Vec<T>)> {
        self.alternate_on(Cpus::Free, measure)
    }

    /// The same on CPUs that the benchmark itself may keep busy.
    pub(super) fn alternate_on<T>(
        &self,
        cpus: Cpus,
        mut measure: impl FnMut(Vmm) -> Result<T>,
    ) -> Result<(Vec<T>, Vec<T>)> {
        let (mut ours, mut peers) = (Vec::new(), Vec::new());
        for run in 0..=self.runs {
            let mut round = self.round(cpus, &mut measure)?.into_iter();
            // The first round warms caches, on disk too, and is not counted.
            if run > 0 {
                ours.extend(round.next());
                peers.extend(round);
            }
        }
        Ok((ours, peers))
    }

    /// Measures once with each, again if others used the CPUs and that matters.
    fn round<T>(&self, cpus: Cpus, measure: &mut impl FnMut(Vmm) -> Result<T>) -> Result<Vec<T>> {
        let matters = self.calm && cpus == Cpus::Free;
        loop {
            if matters {
                calm::wait()?;
            }
            let values = self.vmms().iter().map(|vmm| measure(*vmm));
            let values = values.collect::<Result<_>>()?;
            if !matters || calm::is_calm()? {
                return Ok(values);
            }
        }
    }

    /// The command that boots the guest with `arguments` on its command line.
    pub(super) fn command(&self, vmm: Vmm, arguments: &str, disk: Option<&Path>) -> Command {
        match vmm {
            Vmm::Bulkhead => self.bulkhead(arguments, disk, GUEST_TIMEOUT_S),
            Vmm::Qemu => self.qemu(arguments, disk),
            Vmm::Direct => self.direct(arguments, disk),
        }
    }

    /// Bulkhead alone, with a guest that runs for as long as it wants.
    pub(super) fn bulkhead(&self, arguments: &str, disk: Option<&Path>, timeout_s: u64) -> Command {
        let mut run = self.bulkhead_with(1, arguments, timeout_s);
        if let Some(disk) = disk {
            run.arg("--disk").arg(disk);
        }
        run
    }

    /// Another machine, for the time of a measurement, with as many vCPUs as there are CPUs.
    pub(super) fn neighbour(&self, arguments: &str, timeout_s: u64) -> Command {
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        self.bulkhead_with(cpus, arguments, timeout_s)
    }

    fn bulkhead_with(&self, cpus: usize, arguments: &str, timeout_s: u64) -> Command {
        let mut run = self.place().bulkhead();
        run.arg("run").arg("--kernel").arg(&self.guest);
        run.args(["--cmdline", arguments, "-c", &cpus.to_string()]);
        run.arg("-m").arg(format!("{MEMORY_MIB}MiB"));
        run.arg(format!("--timeout={timeout_s}s"));
        run
    }

    /// Where the programs are, with directories of the benchmark's own.
    pub(super) fn place(&self) -> Place {
        Place::new(&self.binaries, self.directory())
    }

    /// The test guest.
    pub(super) fn guest(&self) -> &Path {
        &self.guest
    }

    fn direct(&self, arguments: &str, disk: Option<&Path>) -> Command {
        let mut run = within_timeout();
        run.arg(self.binaries.join("bulkhead-direct"));
        run.arg("--kernel").arg(&self.guest);
        run.args(["--cmdline", arguments, "--memory-mib"]);
        run.arg(MEMORY_MIB.to_string());
        run.args(
            disk.into_iter()
                .flat_map(|disk| ["--disk".as_ref(), disk.as_os_str()]),
        );
        run
    }

    fn qemu(&self, arguments: &str, disk: Option<&Path>) -> Command {
        let mut run = within_timeout();
        run.args([
            "qemu-system-x86_64",
            "-M",
            "microvm,rtc=on,pit=on,pic=on,isa-serial=on",
            "-accel",
            "kvm",
        ]);
        // With a register that lists what the CPU is not vulnerable to, which `kvm_pvm` of some hosts does not
        // let it write, QEMU would not start. No guest of ours reads it.
        run.args(["-cpu", "host,arch-capabilities=off", "-smp", "1"]);
        run.args(["-m", &MEMORY_MIB.to_string()]);
        run.args(["-nodefaults", "-no-user-config", "-no-reboot", "-nographic"]);
        run.args([
            "-serial",
            "stdio",
            "-global",
            "virtio-mmio.force-legacy=false",
        ]);
        run.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        run.args([
            "-device",
            "virtio-rng-device",
            "-append",
            arguments,
            "-kernel",
        ]);
        run.arg(&self.guest);
        if let Some(disk) = disk {
            run.args(["-object", "iothread,id=io0", "-drive"]);
            run.arg(format!(
                "id=d0,if=none,format=raw,aio=io_uring,file={}",
                disk.display()
            ));
            run.args(["-device", "virtio-blk-device,drive=d0,iothread=io0"]);
        }
        run
    }

    /// Starts the guest with its serial port on a pipe.
    pub(super) fn start(&self, vmm: Vmm, arguments: &str, disk: Option<&Path>) -> Result<Running> {
        self.spawn(self.command(vmm, arguments, disk))
    }

    /// Starts a prepared command with the guest's serial port on a pipe.
    pub(super) fn spawn(&self, mut command: Command) -> Result<Running> {
        let log = self.directory().join("stderr");
        let errors = File::create(&log)?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let started = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot start {command:?}"))?;
        let output = child.stdout.take().context("no pipe")?;
        Ok(Running {
            child,
            output: BufReader::with_capacity(4096, output),
            started,
            log,
        })
    }
}

/// A command that ends with the guest's time.
fn within_timeout() -> Command {
    let mut run = command::command("timeout");
    run.args(["-k", "1", &GUEST_TIMEOUT_S.to_string()]);
    run
}

/// A guest that runs. Dropping it ends it.
pub(super) struct Running {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    started: Instant,
    log: PathBuf,
}

impl Running {
    /// The pid of the VMM (the broker's, for Bulkhead).
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the VMM still runs.
    pub(super) fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Time from just before exec to the first byte of the guest, in milliseconds.
    pub(super) fn first_byte_ms(&mut self) -> Result<f64> {
        let mut byte = [0];
        let got = self.output.read(&mut byte)?;
        let elapsed = self.started.elapsed();
        ensure!(got == 1 && byte == *b"B", "no output: {}", self.errors());
        Ok(elapsed.as_secs_f64() * 1e3)
    }

    /// Reads up to the record `BH <name> …` and returns when it came, with its keys.
    pub(super) fn record(&mut self, name: &str) -> Result<(Instant, String)> {
        let mut line = Vec::new();
        loop {
            line.clear();
            if self.output.read_until(b'\n', &mut line)? == 0 {
                bail!(
                    "the guest ended before its record `{name}`: {}",
                    self.errors()
                );
            }
            let text = String::from_utf8_lossy(&line);
            let mut words = text.trim().splitn(3, ' ');
            let (tag, kind, rest) = (words.next(), words.next(), words.next());
            if tag == Some("BH") && kind == Some("error") {
                bail!("the guest reports: {text}");
            }
            // The first byte may have been read already.
            if matches!(tag, Some("BH" | "H")) && kind == Some(name) {
                return Ok((Instant::now(), rest.unwrap_or_default().to_owned()));
            }
        }
    }

    /// Waits for the end of a guest that ends by itself, and returns the VMM's exit code.
    pub(super) fn finish(mut self) -> Result<Option<i32>> {
        let mut rest = Vec::new();
        self.output.read_to_end(&mut rest)?;
        Ok(self.child.wait()?.code())
    }

    /// What the VMM has said on standard error so far.
    pub(super) fn errors(&self) -> String {
        std::fs::read_to_string(&self.log)
            .unwrap_or_default()
            .trim()
            .to_owned()
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

/// The number that is the value of `key` in a record's keys.
pub(super) fn value(keys: &str, key: &str) -> Result<u64> {
    let text = text(keys, key)?;
    text.parse()
        .with_context(|| format!("`{key}` is no number in `{keys}`"))
}

/// The value of `key` in a record's keys.
pub(super) fn text<'a>(keys: &'a str, key: &str) -> Result<&'a str> {
    keys.split_ascii_whitespace()
        .find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
        .with_context(|| format!("no `{key}` in `{keys}`"))
}
