//! Work on images, done by `bulkhead-image` in its sandbox: the broker opens the files and reads none of them.

use crate::launch::users::UserRange;
use crate::launch::{Gift, LaunchError, Launched, Launcher};
use crate::supervisor::fault;
use bulkhead_ipc::adoption::bind_in;
use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::{Born, KindConfig};
use bulkhead_ipc::protocol::image::{FromImage, ImageConfig, ImageReport};
use bulkhead_policies::cache::Compiled;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long the process may take to be ready.
const BIRTH_PATIENCE: Duration = Duration::from_secs(20);
/// How long it may say nothing: a part of an image can be on a slow disk.
const SILENCE: Duration = Duration::from_secs(600);
/// How long a process that has closed its channel may take to end.
const LAST_WORDS: Duration = Duration::from_millis(200);
/// Most of its log that is shown when it dies.
const LOG_BYTES_MAX: usize = 2000;

/// Why work could not be done.
#[derive(Debug, thiserror::Error)]
pub enum WorkError {
    /// The policies are not usable.
    #[error("policy: {0}")]
    Policy(String),
    /// The process cannot be started.
    #[error("the process for the work cannot be started: {0}")]
    Start(String),
    /// It says why.
    #[error("{0}")]
    Failed(String),
    /// It has ended without a word, or says nothing.
    #[error("the process for the work was lost: {0}")]
    Lost(String),
    /// It is not done in time.
    #[error("it was not done after {0:?}")]
    Late(Duration),
}

/// Where things are.
#[derive(Debug)]
pub struct Place<'a> {
    /// Directory of the process binaries.
    pub binaries: &'a Path,
    /// Policy overrides.
    pub policies: Option<&'a Path>,
    /// Directory for sockets.
    pub runtime: &'a Path,
    /// Users of processes.
    pub users: UserRange,
}

/// What a process for work is started with.
#[derive(Debug)]
pub struct Shop<'a> {
    /// Starts processes.
    pub launcher: &'a mut Launcher,
    /// The policies in force.
    pub compiled: &'a Compiled,
    /// Policy overrides, for the explanation of a denial.
    pub policies: Option<&'a Path>,
    /// Directory for sockets.
    pub runtime: &'a Path,
    /// For whom, in logs.
    pub name: &'a str,
    /// When it has to be done; `None` for when it is.
    pub within: Option<Duration>,
}

/// A directory for the process's socket, which is gone afterwards.
struct Nook(PathBuf);

impl Nook {
    fn make(runtime: &Path) -> io::Result<Self> {
        // Machines of one daemon may have work done at the same time.
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let path = runtime.join(format!("work-{}-{number}", std::process::id()));
        fs::create_dir_all(runtime)?;
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Nook {
    fn drop(&mut self) {
        let _gone_or_not = fs::remove_dir_all(&self.0);
    }
}

/// A process that does not outlive the work.
struct Worker(Launched);

impl Drop for Worker {
    fn drop(&mut self) {
        let _dead_or_not = self.0.kill();
        let _reaped = waitpid(Pid::from_raw(self.0.pid), None);
    }
}

impl Worker {
    /// How it ended, if it has, or does within a moment.
    fn status(&self) -> Option<WaitStatus> {
        let pid = Pid::from_raw(self.0.pid);
        let until = Instant::now() + LAST_WORDS;
        loop {
            match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) if Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return None,
                Ok(status) => return Some(status),
            }
        }
    }

    fn lost(&self, error: &ChannelError, policies: Option<&Path>) -> WorkError {
        let status = self.status();
        if let Some(denial) = fault::denial(&self.0, policies) {
            return WorkError::Lost(format!("{denial}; {}", fault::describe(&self.0, status)));
        }
        if let Some(reason) = self.0.unborn() {
            return WorkError::Lost(reason);
        }
        let mut text = vec![0; LOG_BYTES_MAX];
        let log = self.0.log.try_clone().map(File::from);
        let n = log.and_then(|mut log| log.read(&mut text)).unwrap_or(0);
        let text = String::from_utf8_lossy(text.get(..n).unwrap_or_default());
        let how = fault::describe(&self.0, status);
        match text.trim() {
            "" => WorkError::Lost(format!("{how} ({error})")),
            said => WorkError::Lost(format!("{how} ({error}); it said: {said}")),
        }
    }
}

/// Has work done. `progress` is told how far it is, in bytes. Blocks until it is done.
///
/// # Errors
/// [`WorkError`]; what is half made is the caller's to remove.
pub fn run(
    place: &Place<'_>,
    config: ImageConfig,
    gifts: &[Gift<'_>],
    progress: impl FnMut(u64, u64),
) -> Result<ImageReport, WorkError> {
    let compiled = Compiled::fresh(place.policies, false);
    let compiled = compiled.map_err(|e| WorkError::Policy(e.to_string()))?;
    let launcher = Launcher::new(place.binaries, place.users);
    let shop = Shop {
        launcher: &mut launcher.map_err(|e| WorkError::Start(e.to_string()))?,
        compiled: &compiled,
        policies: place.policies,
        runtime: place.runtime,
        name: "image",
        within: None,
    };
    run_in(shop, config, gifts, progress)
}

/// As [`run`], by a broker that has everything at hand.
///
/// # Errors
/// As [`run`]; [`WorkError::Late`] when it is not done in time.
pub fn run_in(
    shop: Shop<'_>,
    config: ImageConfig,
    gifts: &[Gift<'_>],
    mut progress: impl FnMut(u64, u64),
) -> Result<ImageReport, WorkError> {
    let Some((policy, filters)) = shop.compiled.get(ProcKind::Image) else {
        return Err(WorkError::Policy("there is none for image".to_owned()));
    };
    let until = shop.within.map(|within| (Instant::now() + within, within));
    // How long to wait for it now, given how long it may say nothing.
    let patience = |most: Duration| match until {
        None => Ok(most),
        Some((until, within)) => match until.saturating_duration_since(Instant::now()) {
            Duration::ZERO => Err(WorkError::Late(within)),
            left => Ok(left.min(most)),
        },
    };
    let start = |e: &dyn std::fmt::Display| WorkError::Start(e.to_string());
    let launch = |e: LaunchError| start(&e);
    let nook = Nook::make(shop.runtime).map_err(|e| start(&e))?;
    let directory = File::open(&nook.0).map_err(|e| start(&e))?;
    let adoption = bind_in(directory.as_fd(), "s").map_err(|e| start(&e))?;
    let id = ProcId {
        kind: ProcKind::Image,
        index: 0,
        generation: 1,
    };
    let launched = shop.launcher.launch(id, policy, gifts, &adoption);
    let worker = Worker(launched.map_err(launch)?);
    let token = crate::random::bytes().map_err(|e| start(&e))?;
    let config = KindConfig::Image(config);
    let birth = worker.0.birth(shop.name.to_owned(), token, filters, config);
    worker.0.bear(&birth).map_err(|e| start(&e))?;
    let born = worker
        .0
        .control
        .recv_within::<Born>(patience(BIRTH_PATIENCE)?);
    match born {
        Ok((Born::Locked { .. }, _)) => {}
        Ok((Born::Failed { reason }, _)) => return Err(WorkError::Start(reason)),
        Err(error) => return Err(worker.lost(&error, shop.policies)),
    }
    loop {
        let heard = worker
            .0
            .control
            .recv_within::<FromImage>(patience(SILENCE)?);
        match heard {
            Ok((FromImage::Progress { done, total }, _)) => progress(done, total),
            Ok((FromImage::Done(report), _)) => return Ok(*report),
            Ok((FromImage::Failed { reason }, _)) => return Err(WorkError::Failed(reason)),
            Err(error) => {
                // Whether it was silent for too long is known when the time is over.
                patience(SILENCE)?;
                return Err(worker.lost(&error, shop.policies));
            }
        }
    }
}
