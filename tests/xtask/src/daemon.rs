//! A `bulkhead serve` of a task's own, and the commands that talk to it.

use crate::{command, process};
use anyhow::{Context, Result, bail, ensure};
use bulkhead::api::{Details, Summary};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// How long a daemon may take to answer, on a machine that is busy with its guests.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(2);

/// Where a daemon and its clients find everything.
#[derive(Clone)]
pub(crate) struct Place {
    binaries: PathBuf,
    directory: PathBuf,
}

impl Place {
    /// Below `directory`, with the programs in `binaries`.
    pub(crate) fn new(binaries: &Path, directory: &Path) -> Self {
        Self {
            binaries: binaries.to_owned(),
            directory: directory.to_owned(),
        }
    }

    /// Where files of a machine may be put.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// `bulkhead`, to be given its arguments.
    pub(crate) fn bulkhead(&self) -> Command {
        let mut bulkhead = command::command(self.binaries.join("bulkhead"));
        bulkhead.env("BULKHEAD_STATE_DIR", self.directory.join("state"));
        bulkhead.env("BULKHEAD_RUNTIME_DIR", self.directory.join("run"));
        bulkhead.env("BULKHEAD_CONFIG_DIR", self.directory.join("etc"));
        bulkhead.env("BULKHEAD_LIBEXEC_DIR", &self.binaries);
        bulkhead
    }

    /// Runs a command, and returns what it printed.
    pub(crate) fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.bulkhead().args(arguments).output()?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "bulkhead {arguments:?}: {}: {}",
            output.status,
            errors.trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The same, again and again while it fails: its daemon may have been killed.
    pub(crate) fn insist(&self, arguments: &[&str]) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.run(arguments) {
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => sleep(Duration::from_millis(50)),
                done => return done,
            }
        }
    }

    /// What `inspect` says of a machine.
    pub(crate) fn inspect(&self, name: &str) -> Result<Details> {
        let text = self.insist(&["inspect", name, "--json"])?;
        serde_json::from_str(&text).with_context(|| text)
    }

    /// What its daemons have said on standard error.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.directory.join("serve.log")).unwrap_or_default()
    }
}

/// A daemon. Dropping it ends it with all its machines.
pub(crate) struct Daemon {
    place: Place,
    child: Child,
}

impl Daemon {
    /// Starts one and waits until it answers.
    pub(crate) fn start(place: &Place) -> Result<Self> {
        let mut daemon = Self {
            place: place.clone(),
            child: serve(place)?,
        };
        daemon.until_it_answers()?;
        Ok(daemon)
    }

    /// Its pid.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it without a warning and starts the next one. Returns the time from the kill to the first
    /// answer.
    pub(crate) fn replace(&mut self) -> Result<Duration> {
        let killed = Instant::now();
        self.kill()?;
        self.start_again()?;
        self.until_it_answers()?;
        Ok(killed.elapsed())
    }

    /// Kills it without a warning. Until the next one is started nobody owns its machines.
    pub(crate) fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Starts the next one after [`Self::kill`], and does not wait for it.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        self.child = serve(&self.place)?;
        Ok(())
    }

    fn until_it_answers(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while self.place.run(&["list"]).is_err() {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() >= deadline {
                bail!("the daemon does not answer: {}", self.place.log());
            }
            sleep(POLL);
        }
        Ok(())
    }

    /// Its machines are not all its children, since they outlive daemons.
    fn end_machines(&mut self) -> Result<()> {
        if self.child.try_wait()?.is_some() {
            self.child = serve(&self.place)?;
            self.until_it_answers()?;
        }
        let machines: Vec<Summary> = serde_json::from_str(&self.place.run(&["list", "--json"])?)?;
        for machine in machines {
            self.place.run(&["kill", &machine.name])?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Err(error) = self.end_machines() {
            eprintln!("warning: machines may be left: {error:#}");
        }
        process::end_tree(self.child.id(), Duration::from_secs(2));
        let _reaped = self.child.wait();
    }
}

fn serve(place: &Place) -> Result<Child> {
    let log = File::options()
        .append(true)
        .create(true)
        .open(place.directory.join("serve.log"))?;
    let mut serve = place.bulkhead();
    serve.arg("serve").stdout(Stdio::null()).stderr(log);
    serve.spawn().context("cannot start bulkhead serve")
}
