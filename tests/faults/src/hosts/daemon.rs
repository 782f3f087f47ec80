//! One host: its broker, run under a filter that notifies, and the command line that talks to it.

use super::front::Front;
use crate::inject::Engine;
use crate::network::Namespace;
use crate::notify::{NotifyError, serve, spawn};
use bulkhead::api::SOCKET_NAME;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The programs of a host.
const PROGRAMS: [&str; 10] = [
    "bulkhead",
    "bulkhead-vcpu",
    "bulkhead-legacy",
    "bulkhead-console",
    "bulkhead-blk",
    "bulkhead-rng",
    "bulkhead-net",
    "bulkhead-vsock",
    "bulkhead-fs",
    "bulkhead-switch",
];
/// How long a broker may take until it serves.
const SERVING: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(4);

/// Why a host is not there.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Files or programs.
    #[error("host {host}: {what}: {cause}")]
    Io {
        /// Which host.
        host: String,
        /// What was being done.
        what: String,
        /// The kernel's error.
        cause: io::Error,
    },
    /// The broker could not be started.
    #[error(transparent)]
    Notify(#[from] NotifyError),
    /// The broker does not answer.
    #[error("host {0}: its broker does not serve:\n{1}")]
    Silent(String, String),
}

/// What a command did.
#[derive(Debug, Clone)]
pub struct Done {
    /// Its exit code; `None` when it had to be killed because it did not end, or a signal ended it.
    pub code: Option<i32>,
    /// Whether it had to be killed.
    pub is_overdue: bool,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

impl Done {
    /// Whether it succeeded.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.code == Some(0)
    }
}

/// Where a host is kept.
#[derive(Debug, Clone)]
pub struct Places {
    /// Everything of it.
    pub scratch: PathBuf,
    /// The programs that are copied.
    pub programs: PathBuf,
}

/// A host.
#[derive(Debug)]
pub struct Host {
    /// Its number.
    pub index: usize,
    /// Its name.
    pub name: String,
    scratch: PathBuf,
    calls: Vec<u32>,
    engine: Arc<Engine>,
    /// Where the operator's requests are looked at, if a plan has faults of them.
    front: Option<Front>,
    /// Its network, when it has one.
    namespace: Option<Arc<Namespace>>,
    broker: Mutex<Option<Child>>,
}

impl Host {
    /// The runtime directory of a host with this scratch directory.
    #[must_use]
    pub fn runtime_of(scratch: &Path) -> PathBuf {
        scratch.join("run")
    }

    /// Makes the directories of a host and copies its programs.
    ///
    /// # Errors
    /// When there is no room for them.
    pub fn new(
        index: usize,
        name: &str,
        places: &Places,
        calls: &[u32],
        engine: &Arc<Engine>,
        namespace: Option<Arc<Namespace>>,
    ) -> Result<Self, HostError> {
        let io = |what: &str| {
            let (host, what) = (name.to_owned(), what.to_owned());
            |cause| HostError::Io { host, what, cause }
        };
        let programs = places.scratch.join("programs");
        let folder = Self::folder_of(&places.scratch);
        for directory in [&programs, &folder, &places.scratch.join("etc")] {
            fs::create_dir_all(directory).map_err(io("making its directories"))?;
        }
        for program in PROGRAMS {
            let (from, to) = (places.programs.join(program), programs.join(program));
            let linked = fs::hard_link(&from, &to);
            let copied = linked.or_else(|_| fs::copy(&from, &to).map(|_| ()));
            copied.map_err(io(&format!("copying {}", from.display())))?;
        }
        let front = engine.rules().knows_api().then(|| {
            let daemon = Self::runtime_of(&places.scratch).join(SOCKET_NAME);
            Front::open(places.scratch.join("front.sock"), daemon, index, engine)
        });
        let front = front
            .transpose()
            .map_err(io("a socket before its broker's"))?;
        Ok(Self {
            index,
            name: name.to_owned(),
            scratch: places.scratch.clone(),
            calls: calls.to_vec(),
            engine: Arc::clone(engine),
            front,
            namespace,
            broker: Mutex::new(None),
        })
    }

    fn child(&self) -> MutexGuard<'_, Option<Child>> {
        self.broker.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its runtime directory.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        Self::runtime_of(&self.scratch)
    }

    fn folder_of(scratch: &Path) -> PathBuf {
        scratch.join("folder")
    }

    /// A folder that its machines share. It is not beside their disks, since those are on a file system of the
    /// harness, which is not one whose folders can be shared.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        Self::folder_of(&self.scratch)
    }

    /// Where its programs are.
    #[must_use]
    pub fn programs(&self) -> PathBuf {
        self.scratch.join("programs")
    }

    /// Where the program of processes of a kind is.
    #[must_use]
    pub fn program(&self, kind: &str) -> PathBuf {
        self.programs().join(format!("bulkhead-{kind}"))
    }

    #[expect(
        clippy::disallowed_methods,
        reason = "the harness drives the real program as a user would"
    )]
    fn bulkhead(&self) -> Command {
        let mut command = Command::new(self.programs().join("bulkhead"));
        command.env("BULKHEAD_STATE_DIR", self.scratch.join("state"));
        command.env("BULKHEAD_RUNTIME_DIR", self.runtime());
        command.env("BULKHEAD_CONFIG_DIR", self.scratch.join("etc"));
        command.env("BULKHEAD_LIBEXEC_DIR", self.programs());
        if let Some(front) = &self.front {
            command.env("BULKHEAD_HOST", front.path());
        }
        command.stdin(Stdio::null());
        command
    }

    /// The history of a machine's serial port as it is on disk, with the inode that names it: each start
    /// makes a new one. It stays readable when it is removed.
    #[must_use]
    pub fn serial_history(&self, vm: &str) -> Option<(u64, File)> {
        let path = self.scratch.join("state/vms").join(vm);
        let file = File::open(path.join("serial.ring")).ok()?;
        let inode = file.metadata().ok()?.ino();
        Some((inode, file))
    }

    /// What its brokers have said on standard error.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.join("serve.log")).unwrap_or_default()
    }

    /// Starts a broker and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve(&self) -> Result<(), HostError> {
        let io = |cause| HostError::Io {
            host: self.name.clone(),
            what: "serve.log".to_owned(),
            cause,
        };
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.scratch.join("serve.log"))
            .map_err(io)?;
        let mut command = self.bulkhead();
        command.arg("serve").stdout(Stdio::null()).stderr(log);
        let (index, engine) = (self.index, Arc::clone(&self.engine));
        let start = || {
            spawn(&mut command, &self.calls, move |listener, pid| {
                engine.directory.set_broker(index, pid);
                std::thread::spawn(move || {
                    serve(listener, |notification| engine.asked(index, notification));
                });
            })
        };
        let child = match &self.namespace {
            Some(namespace) => namespace.within(start).map_err(io)??,
            None => start()?,
        };
        *self.child() = Some(child);
        let until = Instant::now() + SERVING;
        while !self.run(&["list"], Duration::from_secs(2)).is_good() {
            // A fault may have ended it again: whoever watches sees to that.
            if self.is_down() {
                return Ok(());
            }
            if Instant::now() > until {
                return Err(HostError::Silent(self.name.clone(), self.log()));
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Whether no broker runs.
    fn is_down(&self) -> bool {
        match self.child().as_mut() {
            Some(child) => !matches!(child.try_wait(), Ok(None)),
            None => true,
        }
    }

    /// The broker's end, once it has come.
    pub fn ended(&self) -> Option<ExitStatus> {
        let mut child = self.child();
        let status = child.as_mut()?.try_wait().ok().flatten()?;
        *child = None;
        drop(child);
        self.engine.directory.no_broker(self.index);
        Some(status)
    }

    /// The broker's pid.
    #[must_use]
    pub fn pid(&self) -> Option<i32> {
        let child = self.child();
        i32::try_from(child.as_ref()?.id()).ok()
    }

    /// Runs a command to its end, which must come within `patience`.
    #[must_use]
    pub fn run(&self, arguments: &[&str], patience: Duration) -> Done {
        let mut command = self.bulkhead();
        command.args(arguments);
        finish(command, patience)
    }

    /// A client at a machine's console, whose standard input is what is typed.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn console(&self, vm: &str) -> io::Result<Child> {
        let mut command = self.bulkhead();
        command.args(["console", vm, "--console", "serial", "--escape", "none"]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        command.spawn()
    }

    /// Puts a new file in the place of a program, as a package manager does.
    ///
    /// # Errors
    /// When there is no room.
    pub fn replace_program(&self, kind: &str) -> io::Result<()> {
        let place = self.program(kind);
        let new = self.programs().join("new");
        fs::copy(&place, &new)?;
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
        fs::rename(&new, &place)
    }

    /// Every process that runs one of the host's programs, its broker included.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        let programs = self.programs();
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let ours = |pid: &i32| {
            let program = fs::read_link(format!("/proc/{pid}/exe"));
            program.is_ok_and(|program| program.starts_with(&programs))
        };
        pids.filter(ours).collect()
    }

    /// Removes a machine's runtime remains and processes, whatever has become of its broker.
    pub fn sweep(&self) {
        for pid in self.processes() {
            let pid = nix::unistd::Pid::from_raw(pid);
            let _dead = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        if let Some(mut child) = self.child().take() {
            let _reaped = child.wait();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.sweep();
    }
}

/// Runs a command whose output is short.
fn finish(mut command: Command, patience: Duration) -> Done {
    let failed = |error: io::Error| Done {
        code: None,
        is_overdue: false,
        output: String::new(),
        errors: error.to_string(),
    };
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return failed(error),
    };
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    let reading = |pipe: Option<Box<dyn io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = pipe.map(|mut pipe| io::Read::read_to_end(&mut pipe, &mut bytes));
            // What was read before an error is shown.
            let _cut = read;
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = reading(out.take().map(|pipe| Box::new(pipe) as _));
    let errors = reading(err.take().map(|pipe| Box::new(pipe) as _));
    let until = Instant::now() + patience;
    let mut is_overdue = false;
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Some(status),
            Err(_) => break None,
            Ok(None) if Instant::now() > until => {
                is_overdue = true;
                let _dead = child.kill();
                break child.wait().ok();
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    Done {
        code: status.and_then(|status| status.code()),
        is_overdue,
        output: output.join().unwrap_or_default(),
        errors: errors.join().unwrap_or_default(),
    }
}
