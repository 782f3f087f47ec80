//! Where things are: options first, then variables, then the customs of the system or the user.

use super::failure::{Failure, HOST, USAGE};
use clap::Args;
use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// File name of the built-in guest.
const BUILT_IN_GUEST: &str = "bulkhead-guest.elf";
/// The process whose presence marks the directory of the process binaries.
const MARK: &str = "bulkhead-vcpu";
/// The program that injects faults; it is installed for whoever tests.
const FAULT_HARNESS: &str = "bulkhead-fault";

/// Directories, as options of every command.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Directories")]
pub(super) struct PathOptions {
    /// Configuration [default: /etc/bulkhead; bulkhead below $XDG_CONFIG_HOME for other users]
    #[arg(long, global = true, value_name = "DIR", env = "BULKHEAD_CONFIG_DIR")]
    #[arg(hide_env_values = true)]
    config_dir: Option<PathBuf>,
    /// What outlives a run: console history, compiled filters [default: /var/lib/bulkhead; bulkhead
    /// below $XDG_STATE_HOME for other users]
    #[arg(long, global = true, value_name = "DIR", env = "BULKHEAD_STATE_DIR")]
    #[arg(hide_env_values = true)]
    state_dir: Option<PathBuf>,
    /// Sockets and locks [default: /run/bulkhead; bulkhead below $XDG_RUNTIME_DIR for other users]
    #[arg(long, global = true, value_name = "DIR", env = "BULKHEAD_RUNTIME_DIR")]
    #[arg(hide_env_values = true)]
    runtime_dir: Option<PathBuf>,
    /// Process binaries [default: the directory of this program, then /usr/libexec/bulkhead]
    #[arg(long, global = true, value_name = "DIR", env = "BULKHEAD_LIBEXEC_DIR")]
    #[arg(hide_env_values = true)]
    libexec_dir: Option<PathBuf>,
}

impl PathOptions {
    /// The same options for another invocation of this program.
    pub(super) fn as_arguments(&self) -> Vec<OsString> {
        let given = [
            ("--config-dir", &self.config_dir),
            ("--state-dir", &self.state_dir),
            ("--runtime-dir", &self.runtime_dir),
            ("--libexec-dir", &self.libexec_dir),
        ];
        let given = given.into_iter().filter_map(|(name, path)| {
            let path = path.as_ref()?;
            Some([OsString::from(name), path.clone().into_os_string()])
        });
        given.flatten().collect()
    }
}

/// What the defaults depend on.
#[derive(Debug, Clone, Default)]
struct User {
    is_root: bool,
    home: Option<PathBuf>,
    config: Option<PathBuf>,
    state: Option<PathBuf>,
    runtime: Option<PathBuf>,
}

impl User {
    fn current() -> Self {
        // The XDG specification has relative paths ignored.
        let path = |name: &str| {
            env::var_os(name)
                .map(PathBuf::from)
                .filter(|p| p.is_absolute())
        };
        Self {
            is_root: nix::unistd::geteuid().is_root(),
            home: path("HOME"),
            config: path("XDG_CONFIG_HOME"),
            state: path("XDG_STATE_HOME"),
            runtime: path("XDG_RUNTIME_DIR"),
        }
    }

    fn directory(&self, root: &str, xdg: Option<&PathBuf>, below_home: &str) -> Option<PathBuf> {
        if self.is_root {
            return Some(PathBuf::from(root));
        }
        xdg.cloned()
            .or_else(|| Some(self.home.as_ref()?.join(below_home)))
            .map(|base| base.join("bulkhead"))
    }
}

/// The directories of one invocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Paths {
    /// Configuration.
    pub(super) config: PathBuf,
    /// State.
    pub(super) state: PathBuf,
    /// Sockets and locks.
    pub(super) runtime: PathBuf,
    /// Candidates for the process binaries, best first.
    libexec: Vec<PathBuf>,
}

impl Paths {
    /// The directories that options, variables and defaults give.
    ///
    /// # Errors
    /// When a user other than root has neither $HOME nor the variable in question.
    pub(super) fn new(options: &PathOptions) -> Result<Self, Failure> {
        Self::for_user(options, &User::current())
    }

    fn for_user(options: &PathOptions, user: &User) -> Result<Self, Failure> {
        let lacking = |what: &str| {
            let line = format!("no place for {what}: $HOME is not set; give --{what}-dir");
            Failure::new(USAGE, line)
        };
        let config = options
            .config_dir
            .clone()
            .or_else(|| user.directory("/etc/bulkhead", user.config.as_ref(), ".config"))
            .ok_or_else(|| lacking("config"))?;
        let state = options
            .state_dir
            .clone()
            .or_else(|| user.directory("/var/lib/bulkhead", user.state.as_ref(), ".local/state"))
            .ok_or_else(|| lacking("state"))?;
        let runtime = options.runtime_dir.clone().unwrap_or_else(|| {
            match (&user.runtime, user.is_root) {
                (_, true) => PathBuf::from("/run/bulkhead"),
                (Some(base), _) => base.join("bulkhead"),
                // No login session: beside the state, which is this user's own as well.
                (None, _) => state.join("run"),
            }
        });
        // A directory that was asked for is the only one: nothing else may slip in.
        let libexec = match &options.libexec_dir {
            Some(chosen) => vec![chosen.clone()],
            None => {
                let program = env::current_exe().ok();
                let beside = program.as_deref().and_then(Path::parent);
                beside
                    .map(Path::to_owned)
                    .into_iter()
                    .chain([PathBuf::from("/usr/libexec/bulkhead")])
                    .collect()
            }
        };
        Ok(Self {
            config,
            state,
            runtime,
            libexec,
        })
    }

    fn find(&self, name: &str) -> Option<PathBuf> {
        let mut candidates = self.libexec.iter().map(|dir| dir.join(name));
        candidates.find(|path| path.is_file())
    }

    fn searched(&self) -> String {
        let shown = self.libexec.iter().map(|p| p.display().to_string());
        shown.collect::<Vec<_>>().join(" or ")
    }

    /// The directory of the process binaries.
    ///
    /// # Errors
    /// Where they were looked for.
    pub(super) fn binaries(&self) -> Result<PathBuf, Failure> {
        let found = self.find(MARK);
        let directory = found.as_deref().and_then(Path::parent).map(Path::to_owned);
        directory.ok_or_else(|| {
            let searched = self.searched();
            let line = format!("{MARK} is not in {searched}; install it or give --libexec-dir");
            Failure::new(HOST, line)
        })
    }

    /// The built-in guest.
    ///
    /// # Errors
    /// Where it was looked for.
    pub(super) fn built_in_guest(&self) -> Result<PathBuf, Failure> {
        self.find(BUILT_IN_GUEST).ok_or_else(|| {
            let searched = self.searched();
            let line = format!(
                "neither a VM file nor --kernel is given, and the built-in guest \
                 {BUILT_IN_GUEST} is not in {searched}"
            );
            Failure::new(HOST, line)
        })
    }

    /// The program that injects faults.
    ///
    /// # Errors
    /// Where it was looked for.
    pub(super) fn fault_harness(&self) -> Result<PathBuf, Failure> {
        let beside = env::current_exe().ok();
        let beside = beside.and_then(|program| Some(program.parent()?.join(FAULT_HARNESS)));
        let beside = beside.filter(|path| path.is_file());
        self.find(FAULT_HARNESS).or(beside).ok_or_else(|| {
            let searched = self.searched();
            let line = format!("{FAULT_HARNESS} is not in {searched}; it is not installed");
            Failure::new(HOST, line)
        })
    }

    /// Policy overrides, if the operator has any.
    #[must_use]
    pub(super) fn policies(&self) -> Option<PathBuf> {
        let directory = self.config.join("policies.d");
        directory.is_dir().then_some(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn user() -> User {
        User {
            home: Some("/home/u".into()),
            ..User::default()
        }
    }

    #[test]
    fn root_has_the_system_directories() {
        let root = User {
            is_root: true,
            ..user()
        };
        let paths = Paths::for_user(&PathOptions::default(), &root).unwrap();
        assert_eq!(paths.config, Path::new("/etc/bulkhead"));
        assert_eq!(paths.state, Path::new("/var/lib/bulkhead"));
        assert_eq!(paths.runtime, Path::new("/run/bulkhead"));
    }

    #[test]
    fn others_have_their_own() {
        let paths = Paths::for_user(&PathOptions::default(), &user()).unwrap();
        assert_eq!(paths.config, Path::new("/home/u/.config/bulkhead"));
        assert_eq!(paths.state, Path::new("/home/u/.local/state/bulkhead"));
        let run = "/home/u/.local/state/bulkhead/run";
        assert_eq!(paths.runtime, Path::new(run));
        let xdg = User {
            runtime: Some("/run/user/7".into()),
            state: Some("/s".into()),
            ..user()
        };
        let paths = Paths::for_user(&PathOptions::default(), &xdg).unwrap();
        assert_eq!(paths.state, Path::new("/s/bulkhead"));
        assert_eq!(paths.runtime, Path::new("/run/user/7/bulkhead"));
        assert!(Paths::for_user(&PathOptions::default(), &User::default()).is_err());
    }

    #[test]
    fn chosen_directory_of_binaries_is_the_only_one() {
        let dir = tempfile::tempdir().unwrap();
        let options = PathOptions {
            libexec_dir: Some(dir.path().to_owned()),
            ..PathOptions::default()
        };
        let paths = Paths::for_user(&options, &user()).unwrap();
        assert_eq!(paths.binaries().unwrap_err().code, HOST);
        fs::write(dir.path().join(MARK), "").unwrap();
        assert_eq!(paths.binaries().unwrap(), dir.path());
        assert!(paths.built_in_guest().is_err());
    }
}
