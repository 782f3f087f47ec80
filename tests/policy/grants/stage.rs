//! Where a scenario is played: under a follower that sees what is used, or without one grant.

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::grant::Grant;
use bulkhead_tests::Machine;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What was used, by kind.
pub(crate) type Used = BTreeMap<ProcKind, Vec<Grant>>;

/// The clock of the host, as the scenario's processes see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    AsItIs,
    /// As on hosts whose clock source the vDSO cannot read.
    WithoutVdso,
}

/// One play of one scenario.
#[derive(Debug)]
pub(crate) struct Stage {
    clock: Clock,
    is_followed: bool,
    /// Overrides for the scenario's machine.
    overrides: Vec<(ProcKind, String)>,
    own: tempfile::TempDir,
    seen: Mutex<Seen>,
}

/// What the play has shown so far.
#[derive(Debug, Default)]
struct Seen {
    /// Who was started, and what it says: open, since the file goes with the machine.
    machine: Option<(u32, File)>,
    /// What a broker inside of the test has heard.
    heard: String,
}

impl Stage {
    /// `learns` what is used; where clocks are as they are nothing is followed without need.
    pub(crate) fn new(clock: Clock, overrides: Vec<(ProcKind, String)>, learns: bool) -> Self {
        Self {
            clock,
            is_followed: learns || clock == Clock::WithoutVdso,
            overrides,
            own: tempfile::tempdir().unwrap(),
            seen: Mutex::default(),
        }
    }

    /// The policies with which its machine runs.
    pub(crate) fn policies(&self) -> PathBuf {
        self.own.path().join("policies.d")
    }

    /// Starts the test guest.
    pub(crate) fn guest(&self, cmdline: &str, more: &[&str]) -> Machine {
        let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
        let begin = ["--kernel", guest.to_str().unwrap(), "-m", "64MiB"];
        let about = ["--timeout=120s", "--cmdline", cmdline];
        self.run(&[&begin[..], &about[..], more].concat())
    }

    /// Starts `bulkhead run`. A scenario starts one machine.
    pub(crate) fn run(&self, arguments: &[&str]) -> Machine {
        self.verb(&[&["run"], arguments].concat())
    }

    /// Starts `bulkhead` with any command, instead.
    pub(crate) fn verb(&self, arguments: &[&str]) -> Machine {
        let scratch = tempfile::Builder::new()
            .prefix("bulkhead-test-")
            .tempdir()
            .unwrap();
        let errors = scratch.path().join("stderr");
        for directory in [self.policies(), scratch.path().join("etc/policies.d")] {
            fs::create_dir_all(&directory).unwrap();
            for (kind, text) in &self.overrides {
                fs::write(directory.join(format!("{kind}.toml")), text).unwrap();
            }
        }
        let clock = match self.clock {
            Clock::AsItIs => "as-it-is",
            Clock::WithoutVdso => "without-vdso",
        };
        let mut seen = self.seen.lock().unwrap();
        // What a second one uses would be taken for all that was used.
        assert!(seen.machine.is_none(), "a scenario starts one machine");
        let learnt = self.learnt();
        let before = [learnt.to_str().unwrap(), clock];
        let follower = Path::new(env!("CARGO_BIN_EXE_policy-follow"));
        let machine = match self.is_followed {
            true => Machine::followed(scratch, follower, &before, arguments),
            false => Machine::verb_in(scratch, arguments),
        };
        let errors = File::open(errors).unwrap();
        seen.machine = Some((machine.outermost(), errors));
        machine
    }

    fn learnt(&self) -> PathBuf {
        self.own.path().join("learnt")
    }

    /// What the play has used; its machine has ended.
    pub(crate) fn used(&self) -> Used {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Ok(bytes) = fs::read(self.learnt())
                && let Ok(used) = serde_json::from_slice(&bytes)
            {
                return used;
            }
            let said = self.said();
            assert!(Instant::now() < deadline, "nothing was learnt: {said}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What a broker inside of the test has heard.
    pub(crate) fn hear(&self, text: &str) {
        let mut seen = self.seen.lock().unwrap();
        seen.heard.push_str(text);
        seen.heard.push('\n');
    }

    /// All that was said so far.
    pub(crate) fn said(&self) -> String {
        let seen = self.seen.lock().unwrap();
        let mut said = Vec::new();
        if let Some((_, errors)) = &seen.machine {
            said.resize(1 << 20, 0);
            let length = errors.read_at(&mut said, 0).unwrap();
            said.truncate(length);
        }
        String::from_utf8_lossy(&said).into_owned() + &seen.heard
    }

    /// Ends the play.
    pub(crate) fn end(&self) {
        if let Some((pid, _)) = &self.seen.lock().unwrap().machine {
            bulkhead_tests::kill(*pid);
        }
    }
}
