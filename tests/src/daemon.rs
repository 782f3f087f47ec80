//! A `bulkhead serve` of a test's own, and the commands that talk to it.

use super::machine::{as_user, bulkhead, install_for, is_alive, pid};
use super::programs::Programs;
use bulkhead::vm::adopt::orphans;
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the rest of a line may take to come.
const LINE_TAKES: Duration = Duration::from_secs(1);

/// A daemon with directories of its own. Dropping it ends its machines and removes everything.
#[derive(Debug)]
pub struct Daemon {
    child: Option<Child>,
    scratch: tempfile::TempDir,
    arguments: Vec<String>,
    /// The user that runs it and its clients, and where that user's programs are; `None` for the caller.
    user: Option<(u32, PathBuf)>,
}

/// What a command did.
#[derive(Debug)]
pub struct Done {
    /// Exit code; -1 when a signal ended it.
    pub code: i32,
    /// Standard output.
    pub output: String,
    /// Standard error.
    pub errors: String,
}

impl Daemon {
    /// Starts a daemon and waits until it serves.
    #[must_use]
    pub fn start() -> Self {
        Self::configured("")
    }

    /// Starts a daemon whose machines and networks are made of `programs`.
    #[must_use]
    pub fn of(programs: &Programs) -> Self {
        let mut daemon = Self::start();
        daemon.end(Signal::SIGTERM);
        daemon.serve_with(&["--libexec-dir", programs.argument()]);
        daemon.serve();
        daemon
    }

    /// Starts a daemon whose `bulkhead.toml` is `config`.
    ///
    /// # Panics
    /// When it does not serve within a minute.
    #[must_use]
    pub fn configured(config: &str) -> Self {
        let scratch = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .expect("tempdir");
        let etc = scratch.path().join("etc");
        fs::create_dir(&etc).expect("a directory");
        fs::write(etc.join("bulkhead.toml"), config).expect("a file");
        let mut daemon = Self {
            child: None,
            scratch,
            arguments: Vec::new(),
            user: None,
        };
        daemon.serve();
        daemon
    }

    /// Starts a daemon as user `id`, who has nothing of root. Where the caller is not root, that is the
    /// caller.
    ///
    /// # Panics
    /// When it does not serve within a minute.
    #[must_use]
    pub fn start_as(id: u32) -> Self {
        if !nix::unistd::geteuid().is_root() {
            return Self::start();
        }
        let scratch = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .expect("tempdir");
        let binaries = install_for(id, scratch.path());
        let mut daemon = Self {
            child: None,
            scratch,
            arguments: Vec::new(),
            user: Some((id, binaries)),
        };
        daemon.serve();
        daemon
    }

    /// Where the programs are.
    #[must_use]
    pub fn programs(&self) -> PathBuf {
        let own = self.user.as_ref().map(|(_, binaries)| binaries.clone());
        own.unwrap_or_else(|| super::path("BULKHEAD_BIN_DIR"))
    }

    /// `bulkhead` as the daemon's user runs it.
    fn bulkhead(&self) -> Command {
        let Some((id, binaries)) = &self.user else {
            return bulkhead(self.scratch.path());
        };
        let mut command = as_user(*id, self.scratch.path());
        command.arg(binaries.join("bulkhead"));
        command.env("BULKHEAD_LIBEXEC_DIR", binaries);
        command
    }

    /// Starts `serve` (again) and waits until it answers.
    ///
    /// # Panics
    /// When it does not within a minute, or one runs already.
    pub fn serve(&mut self) {
        assert!(self.child.is_none(), "a daemon runs already");
        let log = File::options()
            .append(true)
            .create(true)
            .open(self.scratch.path().join("serve.log"))
            .expect("a log");
        let mut command = self.bulkhead();
        command.arg("serve").args(&self.arguments);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().expect("bulkhead starts"));
        let deadline = Instant::now() + PATIENCE;
        while self.run(&["list"]).code != 0 {
            assert!(Instant::now() < deadline, "no answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Arguments of `serve` from its next start on.
    pub fn serve_with(&mut self, arguments: &[&str]) {
        self.arguments = arguments.iter().map(|&a| a.to_owned()).collect();
    }

    /// The daemon's own directory.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The state directory.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    /// The runtime directory.
    #[must_use]
    pub fn runtime(&self) -> PathBuf {
        self.scratch.path().join("run")
    }

    /// What the daemon has said on standard error.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("serve.log")).unwrap_or_default()
    }

    /// The daemon's pid.
    ///
    /// # Panics
    /// When it does not run.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("a daemon runs").id()
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn run(&self, arguments: &[&str]) -> Done {
        let mut command = self.bulkhead();
        let output = command.args(arguments).stdin(Stdio::null()).output();
        let output = output.expect("bulkhead starts");
        Done {
            code: output.status.code().unwrap_or(-1),
            output: String::from_utf8_lossy(&output.stdout).into_owned(),
            errors: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Starts a command that is waited for later.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn begin(&self, arguments: &[&str]) -> Child {
        let mut command = self.bulkhead();
        let command = command.args(arguments).stdin(Stdio::piped());
        let command = command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("bulkhead starts")
    }

    /// Runs a command that must succeed, and returns what it printed.
    ///
    /// # Panics
    /// When it fails.
    pub fn good(&self, arguments: &[&str]) -> String {
        let done = self.run(arguments);
        assert_eq!(done.code, 0, "{arguments:?}: {done:?}\n{}", self.log());
        done.output
    }

    /// Runs a command that must fail with `code` and a message that holds `text`.
    ///
    /// # Panics
    /// When it does not.
    pub fn fails(&self, arguments: &[&str], code: i32, text: &str) {
        let done = self.run(arguments);
        assert_eq!(done.code, code, "{arguments:?}: {done:?}");
        assert!(done.errors.contains(text), "no `{text}` in {done:?}");
    }

    /// As [`Daemon::good`] with `--json`, parsed.
    ///
    /// # Panics
    /// When it fails or prints no JSON.
    #[must_use]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let text = self.good(&[arguments, &["--json"]].concat());
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("{arguments:?}: {e}: {text}"))
    }

    /// Creates a machine of the test guest.
    pub fn create(&self, name: &str, cmdline: &str, more: &[&str]) {
        let guest = super::path("BULKHEAD_TEST_GUEST");
        let guest = guest.to_str().expect("a UTF-8 path");
        let all = ["create", "--name", name, "--kernel", guest, "-m", "64MiB"];
        self.good(&[&all, &["--cmdline", cmdline][..], more].concat());
    }

    /// Creates and starts a machine of the test guest.
    pub fn create_and_start(&self, name: &str, cmdline: &str, more: &[&str]) {
        self.create(name, cmdline, more);
        self.good(&["start", name]);
    }

    /// The pid of the switch of `network`, once it serves.
    ///
    /// # Panics
    /// When it does not within a minute.
    #[must_use]
    pub fn switch_of(&self, network: &str) -> u32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let shown = self.json(&["network", "show", network]);
            if let (Some(pid), Some("serving")) = (shown["pid"].as_u64(), shown["state"].as_str()) {
                return u32::try_from(pid).expect("a pid");
            }
            assert!(Instant::now() < deadline, "{shown}: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What `inspect` says of a machine.
    #[must_use]
    pub fn inspect(&self, name: &str) -> Value {
        self.json(&["inspect", name])
    }

    /// The state of a machine.
    #[must_use]
    pub fn state_of(&self, name: &str) -> String {
        text(&self.inspect(name)["state"])
    }

    /// Waits until a machine is in `state`.
    ///
    /// # Panics
    /// When it is not within a minute.
    pub fn until_state(&self, name: &str, state: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.state_of(name);
            if found == state {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{name} is {found}, not {state}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The pid of a machine's process of `kind`. One that follows another may be on its way.
    ///
    /// # Panics
    /// When there is none within some seconds.
    #[must_use]
    pub fn process(&self, name: &str, kind: &str) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let about = self.inspect(name);
            let processes = about["processes"].as_array().expect("an array");
            let found = processes.iter().find(|p| p["kind"] == kind);
            if let Some(pid) = found.and_then(|p| p["pid"].as_u64()) {
                return u32::try_from(pid).expect("a pid");
            }
            assert!(Instant::now() < deadline, "no {kind}: {about}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The pids of all processes of all machines.
    ///
    /// # Panics
    /// When the daemon does not answer.
    #[must_use]
    pub fn pids(&self) -> Vec<u32> {
        let list = self.json(&["list"]);
        let names = list.as_array().expect("an array").iter();
        let names: Vec<_> = names.map(|vm| text(&vm["name"])).collect();
        let mut pids = Vec::new();
        for name in names {
            let about = self.inspect(&name);
            let processes = about["processes"].as_array().cloned().unwrap_or_default();
            let of = processes.iter().filter_map(|p| p["pid"].as_u64());
            pids.extend(of.filter_map(|pid| u32::try_from(pid).ok()));
        }
        pids
    }

    /// What a machine's guest has written to its serial port, as `logs --console` shows it.
    #[must_use]
    pub fn output_of(&self, name: &str) -> String {
        self.good(&["logs", name, "--console"])
    }

    /// Waits until the guest has written `part`, and the rest of that line if there is one.
    ///
    /// # Panics
    /// When it has not within two minutes.
    pub fn until_output(&self, name: &str, part: &str) {
        let deadline = Instant::now() + 2 * PATIENCE;
        let mut begun = None;
        loop {
            let output = self.output_of(name);
            if let Some((_, rest)) = output.split_once(part) {
                // A prompt has no end.
                let begun = begun.get_or_insert_with(Instant::now);
                if rest.contains('\n') || begun.elapsed() > LINE_TAKES {
                    return;
                }
            }
            assert!(Instant::now() < deadline, "no `{part}` in:\n{output}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The names of the events in a machine's log.
    ///
    /// # Panics
    /// When a line is no JSON.
    #[must_use]
    pub fn events_of(&self, name: &str) -> Vec<String> {
        let lines = self.good(&["logs", name, "--json"]);
        let event = |line: &str| {
            let value: Value = serde_json::from_str(line).expect("a JSON line");
            assert_eq!(value["schema_version"], 1, "{line}");
            text(&value["event"])
        };
        lines.lines().map(event).collect()
    }

    /// Sends bytes to the socket and returns what comes back until the daemon closes.
    ///
    /// # Panics
    /// When there is no socket.
    #[must_use]
    pub fn raw(&self, bytes: &[u8]) -> String {
        let mut socket =
            UnixStream::connect(self.runtime().join("bulkhead.sock")).expect("a socket");
        let patience = Some(Duration::from_secs(30));
        socket.set_read_timeout(patience).expect("a time-out");
        // The daemon may have had enough before it has read everything.
        let _cut = socket.write_all(bytes);
        let mut answer = Vec::new();
        let _cut = socket.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Ends the daemon with a signal and waits for its end.
    ///
    /// # Panics
    /// When it does not run or does not end.
    pub fn end(&mut self, signal: Signal) -> Option<i32> {
        kill(pid(self.pid()), signal).expect("it is alive");
        self.gone()
    }

    /// Waits for the end of a daemon that something has ended.
    ///
    /// # Panics
    /// When it does not run or does not end.
    pub fn gone(&mut self) -> Option<i32> {
        let mut child = self.child.take().expect("a daemon runs");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = child.try_wait().expect("a child") {
                return status.code();
            }
            assert!(Instant::now() < deadline, "serve does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Kills the daemon as nothing can prepare for. Returns every process that it had started and
    /// that was alive, whether or not it was on record.
    ///
    /// # Panics
    /// When it does not run.
    pub fn crash(&mut self) -> Vec<u32> {
        let broker = self.pid();
        // It stands still while its processes are counted.
        kill(pid(broker), Signal::SIGSTOP).expect("it is alive");
        let children = children_of(broker);
        self.end(Signal::SIGKILL);
        children
    }

    fn clean_up(&mut self) {
        if self.child.is_some() {
            self.end(Signal::SIGKILL);
        }
        bulkhead::serve::end_switches(&self.runtime());
        // Without a broker, by their records; newborns that have none end by themselves.
        for orphan in orphans(&self.runtime()).into_iter().flatten() {
            orphan.record.kill_all();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
        self.clean_up();
    }
}

/// The processes that `parent` has started and that are alive.
fn children_of(parent: u32) -> Vec<u32> {
    let parent = parent.to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_child = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let fields = stat
            .rsplit_once(')')
            .map(|(_, rest)| rest.split_whitespace());
        fields.and_then(|mut fields| fields.nth(1)) == Some(parent.as_str())
    };
    pids.filter(is_child).filter(|pid| is_alive(*pid)).collect()
}

/// The text of a JSON string.
fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
