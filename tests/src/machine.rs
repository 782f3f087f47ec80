//! One run of `bulkhead run`, from the outside.

use bulkhead::vm::adopt::{Orphan, orphans};
use bulkhead_ipc::output_ring::OutputReader;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// A `bulkhead run` that is being tested. Dropping it ends everything it started.
#[derive(Debug)]
pub struct Machine {
    child: Child,
    input: Option<ChildStdin>,
    output: Receiver<Vec<u8>>,
    seen: String,
    scratch: tempfile::TempDir,
    /// Whether the child is one that follows `bulkhead`.
    is_followed: bool,
}

/// How a machine ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code of `bulkhead run`; -1 when a signal ended it.
    pub code: i32,
    /// Everything on standard output: the guest's console.
    pub console: String,
    /// Everything on standard error.
    pub errors: String,
}

/// The processes of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Processes(Vec<(u32, String)>);

impl Processes {
    /// The pid of the one process of `kind`, such as `blk`.
    #[must_use]
    pub fn of(&self, kind: &str) -> Option<u32> {
        let name = format!("bulkhead-{kind}");
        self.0
            .iter()
            .find(|(_, comm)| *comm == name)
            .map(|(pid, _)| *pid)
    }

    /// The pids of all processes of `kind`, in the order in which they were started.
    #[must_use]
    pub fn all_of(&self, kind: &str) -> Vec<u32> {
        let name = format!("bulkhead-{kind}");
        let mut pids: Vec<u32> = self
            .0
            .iter()
            .filter(|(_, comm)| *comm == name)
            .map(|(pid, _)| *pid)
            .collect();
        pids.sort_unstable();
        pids
    }

    /// Kinds of all processes, sorted.
    #[must_use]
    pub fn kinds(&self) -> Vec<&str> {
        let strip = |comm: &'_ String| -> Option<usize> { comm.find('-').map(|at| at + 1) };
        let mut kinds: Vec<&str> = self
            .0
            .iter()
            .map(|(_, comm)| &comm[strip(comm).unwrap_or(0)..])
            .collect();
        kinds.sort_unstable();
        kinds
    }

    /// All pids.
    pub fn pids(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().map(|(pid, _)| *pid)
    }
}

impl Machine {
    /// Starts `bulkhead run` with `arguments`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn run<I, S>(arguments: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<std::ffi::OsStr>,
    {
        let scratch = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .expect("tempdir");
        let mut command = bulkhead(scratch.path());
        command.arg("run").args(arguments);
        Self::start(command, scratch)
    }

    /// Starts `bulkhead run` with `arguments` as user and group `id`, who has no right but to open
    /// `/dev/kvm` and what is in the scratch folder. Without root this is who runs the test.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn run_as(id: u32, arguments: &[&str]) -> Self {
        if !nix::unistd::geteuid().is_root() {
            return Self::run(arguments);
        }
        let scratch = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .expect("tempdir");
        let binaries = install_for(id, scratch.path());
        let mut command = as_user(id, scratch.path());
        command
            .arg(binaries.join("bulkhead"))
            .arg("run")
            .args(arguments);
        command.env("BULKHEAD_LIBEXEC_DIR", &binaries);
        Self::start(command, scratch)
    }

    fn start(mut command: Command, scratch: tempfile::TempDir) -> Self {
        let errors = File::create(scratch.path().join("stderr")).expect("file for stderr");
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut child = command.spawn().expect("bulkhead starts");
        let input = child.stdin.take();
        let mut stdout = child.stdout.take().expect("a pipe");
        let (send, output) = sync_channel(1024);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                if send.send(buffer[..n].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            input,
            output,
            seen: String::new(),
            scratch,
            is_followed: false,
        }
    }

    /// As [`Machine::run`], started by `follower` with `arguments` in front of the command.
    ///
    /// # Panics
    /// When it cannot be started.
    #[expect(
        clippy::disallowed_methods,
        reason = "tests start the product as a user does"
    )]
    #[must_use]
    pub fn followed(
        scratch: tempfile::TempDir,
        follower: &Path,
        before: &[&str],
        arguments: &[&str],
    ) -> Self {
        let run = bulkhead(scratch.path());
        let mut command = Command::new(follower);
        command.args(before).arg(run.get_program());
        command.args(arguments);
        command.envs(run.get_envs().filter_map(|(k, v)| Some((k, v?))));
        let mut machine = Self::start(command, scratch);
        machine.is_followed = true;
        machine
    }

    /// As [`Machine::run`] with directories that are there already.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn run_in(scratch: tempfile::TempDir, arguments: &[&str]) -> Self {
        Self::verb_in(scratch, &[&["run"], arguments].concat())
    }

    /// As [`Machine::run_in`], of any other command of `bulkhead`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn verb_in(scratch: tempfile::TempDir, arguments: &[&str]) -> Self {
        let mut command = bulkhead(scratch.path());
        command.args(arguments);
        Self::start(command, scratch)
    }

    /// Starts the built test guest with `cmdline` and further arguments.
    #[must_use]
    pub fn test_guest(cmdline: &str, arguments: &[&str]) -> Self {
        let guest = super::path("BULKHEAD_TEST_GUEST");
        let mut all = vec!["--kernel".into(), guest.into_os_string()];
        all.extend(["--cmdline", cmdline, "-m", "64MiB", "--timeout=120s"].map(Into::into));
        all.extend(arguments.iter().map(Into::into));
        Self::run(all)
    }

    /// A file beside the machine's, which vanishes with it.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The size of the console history `name` on disk.
    ///
    /// # Panics
    /// When there is not exactly one.
    #[must_use]
    pub fn ring_bytes(&self, name: &str) -> u64 {
        let mut folders = vec![self.scratch.path().to_owned()];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                match entry.metadata() {
                    Ok(metadata) if metadata.is_dir() => folders.push(entry.path()),
                    Ok(metadata) if entry.file_name() == name => found.push(metadata.len()),
                    _ => {}
                }
            }
        }
        let [bytes] = found[..] else {
            panic!("{} rings are named {name}", found.len());
        };
        bytes
    }

    /// The pid of `bulkhead` itself.
    #[must_use]
    pub fn pid(&self) -> u32 {
        let child = self.child.id();
        match self.is_followed {
            // The one that follows has no other child.
            true => children(child).first().map_or(child, |(pid, _)| *pid),
            false => child,
        }
    }

    /// The pid of what was started: `bulkhead`, or what follows it.
    #[must_use]
    pub fn outermost(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the console has shown `text` (from where the last wait stopped), and returns all
    /// that came before it.
    ///
    /// # Panics
    /// When it does not come within `patience`.
    pub fn expect_within(&mut self, text: &str, patience: Duration) -> String {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(at) = self.seen.find(text) {
                let rest = self.seen.split_off(at + text.len());
                return std::mem::replace(&mut self.seen, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.output.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => panic!(
                    "no `{text}` on the console within {patience:?}\nconsole:\n{}\nstderr:\n{}",
                    self.seen,
                    self.errors()
                ),
            }
        }
    }

    /// What nobody has waited for yet, for whoever gives up.
    fn unseen(&self) -> String {
        let bytes = self.output.try_iter().flatten().collect::<Vec<_>>();
        format!("{}{}", self.seen, String::from_utf8_lossy(&bytes))
    }

    /// Takes what has been printed, so that whoever prints is not held up.
    fn gather(&mut self) {
        let bytes = self.output.try_iter().flatten().collect::<Vec<_>>();
        self.seen.push_str(&String::from_utf8_lossy(&bytes));
    }

    /// As [`Machine::expect_within`] two minutes.
    pub fn expect(&mut self, text: &str) -> String {
        self.expect_within(text, Duration::from_secs(120))
    }

    /// Types at the console.
    ///
    /// # Panics
    /// When the pipe is closed.
    pub fn type_keys(&mut self, keys: &str) {
        self.gather();
        let input = self.input.as_mut().expect("standard input is open");
        input
            .write_all(keys.as_bytes())
            .expect("bulkhead reads its standard input");
        input.flush().expect("bulkhead reads its standard input");
    }

    /// What `bulkhead` has said on standard error so far.
    #[must_use]
    pub fn errors(&self) -> String {
        fs::read_to_string(self.scratch.path().join("stderr")).unwrap_or_default()
    }

    /// Waits until standard error holds `text`.
    ///
    /// # Panics
    /// When it does not come within a minute.
    pub fn expect_error(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.errors().contains(text) {
            assert!(
                Instant::now() < deadline,
                "no `{text}` on stderr:\n{}",
                self.errors()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until `count` processes have taken another's place.
    ///
    /// # Panics
    /// When that does not come within a minute.
    pub fn expect_restarts(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while super::Restart::all(&self.errors()).len() < count {
            assert!(
                Instant::now() < deadline,
                "no {count} restarts on stderr:\n{}",
                self.errors()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The sandboxed processes of the machine as they are now.
    #[must_use]
    pub fn processes(&self) -> Processes {
        Processes(children(self.pid()))
    }

    /// The pid of the one process of `kind`, once it is locked: a guest may already run while its
    /// devices come up.
    ///
    /// # Panics
    /// When it is not there and locked within a minute.
    #[must_use]
    pub fn process(&self, kind: &str) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.processes().of(kind) {
                Some(pid) if is_locked(pid) => return pid,
                found => assert!(
                    Instant::now() < deadline,
                    "no locked process of kind {kind}: {found:?}\n{}\nconsole since the last wait:\n{}",
                    self.errors(),
                    self.unseen()
                ),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Kills `bulkhead` itself with SIGKILL, and waits until it is gone. Its machine lives on.
    ///
    /// # Panics
    /// When it is gone already.
    pub fn kill_broker(&mut self) {
        let broker = self.pid();
        self.signal(Signal::SIGKILL);
        match self.is_followed {
            // What follows waits for the machine as well.
            true => {
                while is_alive(broker) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            false => drop(self.child.wait()),
        }
    }

    /// The runtime directory of this `bulkhead`.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        self.scratch.path().join("run")
    }

    /// Waits until the record of the machine named `web` says that it is in `phase`.
    ///
    /// # Panics
    /// When that does not come within a minute.
    pub fn expect_phase(&self, phase: &str) {
        let record = self.runtime().join("vms/web/record");
        let wanted = format!("\"phase\":\"{phase}\"");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !fs::read_to_string(&record).is_ok_and(|text| text.contains(&wanted)) {
            assert!(Instant::now() < deadline, "not {phase}: {}", self.errors());
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The machines here that no broker owns.
    ///
    /// # Panics
    /// When the runtime directory cannot be read.
    #[must_use]
    pub fn orphans(&self) -> Vec<Orphan> {
        orphans(&self.runtime()).expect("the runtime directory")
    }

    /// What the guest has written to its serial port, as the history on disk has it, without
    /// anybody attached.
    ///
    /// # Panics
    /// When there is not exactly one machine's history.
    #[must_use]
    pub fn serial_history(&self) -> String {
        let rings = self.scratch.path().join("state/vms");
        let rings: Vec<_> = fs::read_dir(rings).expect("state").flatten().collect();
        let [ring] = &rings[..] else {
            panic!("{} machines have state here", rings.len());
        };
        let file = File::open(ring.path().join("serial.ring")).expect("a history");
        let mut reader = OutputReader::new(file).expect("a ring");
        let (mut all, mut buffer) = (Vec::new(), [0; 4096]);
        loop {
            let got = reader.read(&mut buffer).expect("a ring");
            all.extend_from_slice(&buffer[..got.bytes]);
            if got.bytes == 0 {
                return String::from_utf8_lossy(&all).into_owned();
            }
        }
    }

    /// Waits until the history of the serial port holds `text`.
    ///
    /// # Panics
    /// When it does not come within two minutes.
    pub fn expect_history(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            let history = self.serial_history();
            if history.contains(text) {
                return;
            }
            assert!(Instant::now() < deadline, "no `{text}` in:\n{history}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal to `bulkhead`.
    ///
    /// # Panics
    /// When it is gone.
    pub fn signal(&self, signal: Signal) {
        match self.pid() {
            // `bulkhead` has ended already; what followed it is about to.
            followed if self.is_followed && followed == self.child.id() => {}
            bulkhead => kill(pid(bulkhead), signal).expect("bulkhead is alive"),
        }
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not end within `patience`, or leaves processes behind.
    pub fn wait_within(mut self, patience: Duration) -> Ended {
        let before = self.processes();
        drop(self.input.take());
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            self.gather();
            if Instant::now() >= deadline {
                panic!(
                    "it does not end within {patience:?}\nconsole:\n{}\nstderr:\n{}",
                    self.seen,
                    self.errors()
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_secs(5)) {
            self.seen.push_str(&String::from_utf8_lossy(&bytes));
        }
        let left: String =
            before
                .pids()
                .filter(|pid| is_alive(*pid))
                .fold(String::new(), |mut text, pid| {
                    let _infallible = write!(text, " {pid}");
                    text
                });
        assert_eq!(left, "", "processes outlive their machine");
        Ended {
            code: status.code().unwrap_or(-1),
            console: std::mem::take(&mut self.seen),
            errors: self.errors(),
        }
    }

    /// As [`Machine::wait`]; what it leaves in its directories is kept.
    ///
    /// # Panics
    /// As [`Machine::wait_within`].
    #[must_use]
    pub fn wait_and_keep(mut self) -> (Ended, tempfile::TempDir) {
        let elsewhere = tempfile::tempdir().expect("tempdir");
        let scratch = std::mem::replace(&mut self.scratch, elsewhere);
        let mut ended = self.wait();
        ended.errors = fs::read_to_string(scratch.path().join("stderr")).unwrap_or_default();
        (ended, scratch)
    }

    /// Tries to start another machine with the same directories and waits for its end.
    ///
    /// # Panics
    /// When `bulkhead` cannot be started.
    #[must_use]
    pub fn another(&self, arguments: &[&str]) -> Ended {
        let guest = super::path("BULKHEAD_TEST_GUEST");
        let mut command = bulkhead(self.scratch.path());
        command.arg("run").arg("--kernel").arg(guest);
        command.args(["-m", "64MiB", "--timeout=60s", "--cmdline=mode=hello"]);
        let output = command.args(arguments).stdin(Stdio::null()).output();
        let output = output.expect("bulkhead starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ended {
            code: output.status.code().unwrap_or(-1),
            console: text(&output.stdout),
            errors: text(&output.stderr),
        }
    }

    /// As [`Machine::wait_within`] two minutes.
    #[must_use]
    pub fn wait(self) -> Ended {
        self.wait_within(Duration::from_secs(120))
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let processes = self.processes();
        if let Ok(None) = self.child.try_wait() {
            let _gone = kill(pid(self.pid()), Signal::SIGTERM);
            let deadline = Instant::now() + Duration::from_secs(3);
            while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(5));
            }
            let _killed = self.child.kill();
            let _reaped = self.child.wait();
        }
        for left in processes.pids().filter(|pid| is_alive(*pid)) {
            let _gone = kill(pid(left), Signal::SIGKILL);
        }
        // What a killed broker has left, by its record.
        bulkhead::serve::end_switches(&self.runtime());
        for orphan in orphans(&self.runtime()).into_iter().flatten() {
            for left in orphan.alive() {
                let _gone = kill(Pid::from_raw(left), Signal::SIGKILL);
            }
        }
    }
}

/// The living children of a process, each with its name.
fn children(parent: u32) -> Vec<(u32, String)> {
    let parent = parent.to_string();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        let Some((_, rest)) = stat.rsplit_once(')') else {
            continue;
        };
        let mut fields = rest.split_whitespace();
        let (state, ppid) = (fields.next(), fields.next());
        if ppid == Some(parent.as_str()) && state != Some("Z") {
            // The name in `stat` is cut to 15 bytes; the first argument is whole.
            let cmdline = fs::read_to_string(entry.path().join("cmdline"));
            let cmdline = cmdline.unwrap_or_default();
            let name = cmdline.split('\0').next().unwrap_or_default();
            found.push((pid, name.to_owned()));
        }
    }
    found
}

/// `bulkhead` with its directories under `scratch`.
#[expect(
    clippy::disallowed_methods,
    reason = "tests start the product as a user does"
)]
#[must_use]
pub fn bulkhead(scratch: &Path) -> Command {
    let binaries: PathBuf = super::path("BULKHEAD_BIN_DIR");
    let mut command = Command::new(binaries.join("bulkhead"));
    command.env("BULKHEAD_LIBEXEC_DIR", &binaries);
    directories(&mut command, scratch);
    command
}

fn directories(command: &mut Command, scratch: &Path) {
    command.env("BULKHEAD_STATE_DIR", scratch.join("state"));
    command.env("BULKHEAD_RUNTIME_DIR", scratch.join("run"));
    command.env("BULKHEAD_CONFIG_DIR", scratch.join("etc"));
}

/// Copies the binaries into `scratch`, since the build may be where user `id` cannot look, and gives it all
/// of `scratch`. Returns where they are.
pub(crate) fn install_for(id: u32, scratch: &Path) -> PathBuf {
    let binaries = scratch.join("bin");
    fs::create_dir(&binaries).expect("scratch folder");
    for entry in fs::read_dir(super::path("BULKHEAD_BIN_DIR")).expect("binaries") {
        let from = entry.expect("binaries").path();
        let name = from.file_name().and_then(|n| n.to_str()).unwrap_or("");
        if name.starts_with("bulkhead") && !name.ends_with(".d") {
            fs::copy(&from, binaries.join(name)).expect("scratch folder");
        }
    }
    let owner = format!("{id}:{id}");
    super::tool("chown", &["-R", &owner, &scratch.display().to_string()]);
    binaries
}

/// Executes what is appended as user and group `id`, whose `/dev/kvm` is one of its own: in a mount
/// namespace that ends with it, so that the host's stays as it is.
#[expect(
    clippy::disallowed_methods,
    reason = "tests start the product as a user does"
)]
pub(crate) fn as_user(id: u32, scratch: &Path) -> Command {
    const SCRIPT: &str = "set -e; id=$0; dir=$1; shift; mkdir -p \"$dir/dev\"; \
        mount -t tmpfs -o mode=755 tests \"$dir/dev\"; mknod \"$dir/dev/kvm\" c 10 232; \
        chown \"$id:$id\" \"$dir/dev/kvm\"; mount --bind \"$dir/dev/kvm\" /dev/kvm; \
        exec setpriv --reuid \"$id\" --regid \"$id\" --clear-groups --inh-caps=-all -- \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", SCRIPT, &id.to_string()]);
    command.arg(scratch);
    directories(&mut command, scratch);
    command.env_remove("XDG_RUNTIME_DIR");
    command
}

pub(crate) fn pid(pid: u32) -> Pid {
    Pid::from_raw(i32::try_from(pid).unwrap_or(i32::MAX))
}

/// Whether each thread has the filters of both phases.
fn is_locked(pid: u32) -> bool {
    let mut threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
        .peekable();
    threads.peek().is_some()
        && threads.all(|thread| {
            fs::read_to_string(thread.path().join("status")).is_ok_and(|status| {
                let line = |l: &str| l.strip_prefix("Seccomp_filters:")?.trim().parse().ok();
                status.lines().find_map(line) >= Some(2)
            })
        })
}

/// Whether there is a process of that number that is not dead.
#[must_use]
pub fn is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rsplit_once(')')
            .is_some_and(|(_, rest)| !rest.starts_with(" Z"))
    })
}
