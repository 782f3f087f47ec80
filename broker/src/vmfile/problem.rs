//! What is wrong with a VM file or an option, and where: file, line, column, key, value, expectation.

use crate::escape::{escaped, excerpt};
use std::fmt;

/// Longest part of a value that an error shows, in bytes.
const VALUE_BYTES_MAX: usize = 80;

/// Where a setting was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// In a VM file.
    File {
        /// The file as the user named it.
        file: String,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// The key with its section, such as `disk.path`; empty for the file as a whole.
        key: String,
        /// The value as it is written; empty when there is none.
        value: String,
    },
    /// In an option of the command line.
    Option {
        /// The option, such as `--disk`.
        option: String,
        /// Its value.
        value: String,
    },
    /// Nowhere: it is the default.
    Default {
        /// The setting.
        key: String,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File {
                file,
                line,
                column,
                key,
                value,
            } => {
                write!(f, "{}:{line}:{column}", escaped(file))?;
                if !key.is_empty() {
                    write!(f, ": {}", escaped(key))?;
                }
                if !value.is_empty() {
                    write!(f, " = {}", excerpt(value, VALUE_BYTES_MAX))?;
                }
                Ok(())
            }
            Self::Option { option, value } => {
                write!(f, "{option} {}", excerpt(value, VALUE_BYTES_MAX))
            }
            Self::Default { key } => write!(f, "{key} (default)"),
        }
    }
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{place}: {expectation}")]
pub struct Problem {
    /// Where.
    pub place: Place,
    /// What was expected; printable text.
    pub expectation: String,
}

/// A setting and where it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located<T> {
    /// The setting.
    pub value: T,
    /// Where it was made.
    pub place: Place,
}

impl<T> Located<T> {
    /// The problem that something else was expected here.
    pub fn problem(&self, expectation: impl Into<String>) -> Problem {
        Problem {
            place: self.place.clone(),
            expectation: expectation.into(),
        }
    }

    /// The same place with another value.
    pub fn with<U>(&self, value: U) -> Located<U> {
        Located {
            value,
            place: self.place.clone(),
        }
    }
}

/// Everything that was found wrong, in the order of the file; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{problem}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}
