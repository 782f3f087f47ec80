//! `doctor`: what this host offers, how well it isolates machines from each other and from itself,
//! and a cure for each thing that is wrong.
//!
//! [`probe`] asks the kernel what no file says; everything else is read below a root directory that
//! tests replace. The checks decide purely and change nothing.

mod facilities;
mod isolation;
pub mod probe;
#[cfg(test)]
mod tests;
mod users;

use crate::launch::users::UserRange;
use probe::Probed;
use serde::Serialize;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, but something could be better or safer.
    Warn,
    /// Machines cannot run.
    Fail,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name, such as `kvm.device`.
    pub id: &'static str,
    /// How it went.
    pub status: Status,
    /// What was found; one line of printable text.
    pub found: String,
    /// What to do about it; empty if nothing.
    pub cure: String,
}

impl Check {
    fn ok(id: &'static str, found: impl Into<String>) -> Self {
        Self {
            id,
            status: Status::Ok,
            found: found.into(),
            cure: String::new(),
        }
    }

    fn warn(id: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            id,
            status: Status::Warn,
            found: found.into(),
            cure: cure.into(),
        }
    }

    fn fail(id: &'static str, found: impl Into<String>, cure: impl Into<String>) -> Self {
        Self {
            id,
            status: Status::Fail,
            found: found.into(),
            cure: cure.into(),
        }
    }
}

/// A host as its files show it, below a root directory.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Host {
    /// The host whose files are below `root`.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// The trimmed text of a file, given without leading slash.
    fn text(&self, path: &str) -> Option<String> {
        let text = fs::read_to_string(self.root.join(path)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A file that holds one number.
    fn number(&self, path: &str) -> Option<u64> {
        self.text(path)?.parse().ok()
    }

    fn exists(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    fn path(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }
}

/// Examines a host on which processes are to have `users`, or why that could not be read.
#[must_use]
pub fn examine<E: Display>(
    root: &Path,
    probed: &Probed,
    users: &Result<UserRange, E>,
) -> Vec<Check> {
    let host = Host::at(root);
    let mut checks = facilities::checks(&host, probed);
    checks.push(users::check(&host, probed, users));
    checks.extend(isolation::checks(&host, probed));
    checks
}
