//! `bulkhead.toml`: what may be used of the host. The daemon reads all of it; `run` and `doctor` read it for
//! the users of processes.

use crate::escape::excerpt;
use crate::launch::users::{UserRange, UsersError, pid_max};
use crate::vmfile::{meminfo_bytes, parse_size, show_size};
use serde::{Deserialize, Deserializer};
use std::io;
use std::path::{Path, PathBuf};

/// File name in the configuration directory.
pub const FILE_NAME: &str = "bulkhead.toml";
/// Largest file in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Most that a message repeats of a wrong range, in bytes.
const USERS_SHOWN_BYTES_MAX: usize = 64;
/// What the host keeps for itself at least, unless the file says otherwise.
const HOST_BYTES_MIN: u64 = 512 << 20;

/// The file is wrong.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("{path}: {cause}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        cause: io::Error,
    },
    /// It says something wrong.
    #[error("{path}: {reason}")]
    Wrong {
        /// Which file.
        path: PathBuf,
        /// Line, column and what was expected, on one line.
        reason: String,
    },
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// What machines may have together.
    pub host: HostSection,
    /// Counts and sizes.
    pub limits: LimitsSection,
}

/// `[host]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HostSection {
    /// Most guest memory of all running machines together; `None` for nine tenths of the host's.
    #[serde(deserialize_with = "size")]
    pub memory: Option<u64>,
    /// Whether a machine may be larger than the memory that is available when it starts.
    pub overcommit: bool,
    /// Users of processes.
    #[serde(deserialize_with = "users")]
    pub users: UserRange,
}

/// `[limits]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsSection {
    /// Most machines in the registry.
    pub machines: usize,
    /// Most requests that are served at a time; those that wait or follow count.
    pub connections: usize,
    /// Most attached consoles.
    pub consoles: usize,
    /// Most connections to guests that are passed through.
    pub sockets: usize,
    /// Bytes kept of each machine's log of events.
    #[serde(deserialize_with = "size")]
    pub log: Option<u64>,
}

/// Bytes kept of a log of events unless the file says otherwise.
pub const LOG_BYTES_DEFAULT: u64 = 1 << 20;

impl Default for LimitsSection {
    fn default() -> Self {
        Self {
            machines: 512,
            connections: 256,
            consoles: 64,
            sockets: 64,
            log: None,
        }
    }
}

fn size<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    let text = String::deserialize(from)?;
    parse_size(&text)
        .map(Some)
        .map_err(serde::de::Error::custom)
}

fn users<'de, D: Deserializer<'de>>(from: D) -> Result<UserRange, D::Error> {
    let text = String::deserialize(from)?;
    text.parse().map_err(|error: UsersError| {
        let shown = excerpt(&text, USERS_SHOWN_BYTES_MAX);
        serde::de::Error::custom(format!("host.users = \"{shown}\": {error}"))
    })
}

impl Config {
    /// Reads the file; one that is not there is empty.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn load(directory: &Path) -> Result<Self, ConfigError> {
        let path = directory.join(FILE_NAME);
        let read = || -> io::Result<String> {
            use std::io::Read;
            let mut text = String::new();
            let file = std::fs::File::open(&path)?;
            let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
            if read as u64 > FILE_BYTES_MAX {
                let limit = show_size(FILE_BYTES_MAX);
                return Err(io::Error::other(format!("it is larger than {limit}")));
            }
            Ok(text)
        };
        match read() {
            Ok(text) => Self::parse(&path, &text, pid_max()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(cause) => Err(ConfigError::Read { path, cause }),
        }
    }

    fn parse(path: &Path, text: &str, pid_max: u32) -> Result<Self, ConfigError> {
        let wrong = |reason: String| ConfigError::Wrong {
            path: path.to_owned(),
            reason,
        };
        let config: Self = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            let before = text.get(..at).unwrap_or("");
            let line = before.matches('\n').count() + 1;
            wrong(format!("line {line}: {}", error.message()))
        })?;
        let users = config.host.users;
        users
            .check(pid_max)
            .map_err(|error| wrong(format!("host.users = \"{users}\": {error}")))?;
        let limits = &config.limits;
        let counts = [
            ("machines", limits.machines, 1..=4096),
            ("connections", limits.connections, 8..=4096),
            ("consoles", limits.consoles, 1..=1024),
            ("sockets", limits.sockets, 1..=1024),
        ];
        for (key, value, range) in counts {
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                let expected = format!("expected {least} to {most}");
                return Err(wrong(format!("limits.{key} = {value}: {expected}")));
            }
        }
        let log = config.log_bytes();
        if !(8 << 10..=1 << 30).contains(&log) {
            let shown = show_size(log);
            return Err(wrong(format!(
                "limits.log = {shown}: expected 8KiB to 1GiB"
            )));
        }
        Ok(config)
    }

    /// Bytes kept of a log of events.
    #[must_use]
    pub fn log_bytes(&self) -> u64 {
        self.limits.log.unwrap_or(LOG_BYTES_DEFAULT)
    }

    /// Most guest memory of all machines together, on a host with `meminfo`.
    #[must_use]
    pub fn budget_bytes(&self, meminfo: &str) -> u64 {
        self.host.memory.unwrap_or_else(|| {
            let total = meminfo_bytes(meminfo, "MemTotal").unwrap_or(0);
            total.saturating_sub(HOST_BYTES_MIN.max(total / 10))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("b.toml"), text, 32768).map_err(|e| e.to_string())
    }

    #[test]
    fn missing_file_and_empty_file_are_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Config::load(dir.path()).unwrap(), Config::default());
        assert_eq!(parse("").unwrap(), Config::default());
    }

    #[test]
    fn budget_is_nine_tenths_of_the_host_or_what_the_file_says() {
        let config = Config::default();
        let total = |kib: u64| format!("MemTotal: {kib} kB\n");
        assert_eq!(config.budget_bytes(&total(10 << 20)), (9 << 30));
        assert_eq!(config.budget_bytes(&total(1 << 20)), 512 << 20);
        assert_eq!(config.budget_bytes(""), 0);
        let config = parse("[host]\nmemory = \"3GiB\"\n").unwrap();
        assert_eq!(config.budget_bytes(""), 3 << 30);
    }

    #[test]
    fn users_have_an_id_for_each_pid_of_the_host() {
        let config = parse("[host]\nusers = \"100000-132767\"\n").unwrap();
        assert_eq!(config.host.users, "100000-132767".parse().unwrap());
        assert_eq!(Config::default().host.users, UserRange::DEFAULT);
        let text = "[host]\nusers = \"100000-132767\"\n";
        let error = Config::parse(Path::new("b.toml"), text, 32769).unwrap_err();
        assert_eq!(
            error.to_string(),
            "b.toml: host.users = \"100000-132767\": holds 32768 ids, expected at least 32769, one for \
             each pid (kernel.pid_max): a process's id is FIRST + its pid"
        );
        // The default is for every kernel.
        let most = crate::launch::users::PID_MAX_MOST;
        assert!(Config::parse(Path::new("b.toml"), "", most).is_ok());
    }

    #[test]
    fn mistakes_are_told_with_their_place() {
        for (text, told) in [
            (
                "[host]\nmemroy = \"1GiB\"\n",
                "line 2: unknown field `memroy`",
            ),
            ("[host]\nmemory = 5\n", "line 2: invalid type: integer"),
            (
                "[limits]\nmachines = 0\n",
                "limits.machines = 0: expected 1 to 4096",
            ),
            (
                "[limits]\nlog = \"1KiB\"\n",
                "limits.log = 1KiB: expected 8KiB",
            ),
            (
                "[host]\nusers = \"100000\"\n",
                "line 2: host.users = \"100000\": expected FIRST-LAST, two decimal ids such as \
                 \"1879048192-1883242495\"",
            ),
            (
                "[host]\nusers = \"200000-100000\"\n",
                "line 2: host.users = \"200000-100000\": expected a last id that is not below the first",
            ),
            (
                "[host]\nusers = \"1-4194304\"\n",
                "line 2: host.users = \"1-4194304\": holds 65534, expected a range without 0, 65534",
            ),
            (
                "[host]\nusers = \"100000-132766\"\n",
                "host.users = \"100000-132766\": holds 32767 ids, expected at least 32768",
            ),
            ("[host]\nusers = 5\n", "line 2: invalid type: integer"),
            ("x", "line 1"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.starts_with("b.toml: ") && error.contains(told),
                "{error}"
            );
        }
    }
}
