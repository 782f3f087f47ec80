//! Errors of the API: a stable code for programs, a line for people, an exit code for commands.

use super::SCHEMA_VERSION;
use serde::{Deserialize, Serialize};

/// What kind of error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Code {
    /// The request makes no sense.
    BadRequest,
    /// The VM file is wrong.
    Configuration,
    /// There is no such machine, device or path.
    NotFound,
    /// It cannot be done in the machine's present state.
    Conflict,
    /// It was not done in time.
    TimedOut,
    /// The host lacks something for it.
    Host,
    /// A limit of the host's configuration is reached.
    Limit,
    /// The machine could not be started.
    Start,
    /// The registry could not be read or written.
    Registry,
    /// The daemon is at its limit, or going down.
    Unavailable,
    /// The daemon failed.
    Internal,
}

impl Code {
    /// The HTTP status.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::Configuration => 422,
            Self::TimedOut => 504,
            Self::Host | Self::Start | Self::Internal => 500,
            Self::Limit | Self::Registry => 507,
            Self::Unavailable => 503,
        }
    }

    /// The exit code of a command that gets it.
    #[must_use]
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::BadRequest | Self::Configuration | Self::NotFound => 2,
            Self::Host | Self::Limit | Self::Unavailable => 4,
            Self::Conflict | Self::Start | Self::Registry | Self::Internal => 6,
            Self::TimedOut => 124,
        }
    }
}

/// An error as it travels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// What kind.
    pub code: Code,
    /// One line, or several where a VM file has several problems; free of control characters but
    /// line breaks.
    pub message: String,
}

impl ApiError {
    /// An error with a message.
    #[must_use]
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            schema_version: SCHEMA_VERSION,
            code,
            message: message.into(),
        }
    }

    /// There is no machine of that name.
    #[must_use]
    pub fn no_machine(name: &str) -> Self {
        let name = crate::escape::excerpt(name, 64);
        Self::new(Code::NotFound, format!("there is no machine {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_travel_with_version_first_and_no_exit_code_is_one() {
        let error = ApiError::no_machine("a\x1b");
        let text = serde_json::to_string(&error).unwrap();
        assert!(text.starts_with("{\"schema_version\":1,\"code\":\"not_found\""));
        assert!(text.contains("no machine a\\\\x1b"), "{text}");
        assert_eq!(serde_json::from_str::<ApiError>(&text).unwrap(), error);
        let codes = [
            Code::BadRequest,
            Code::Configuration,
            Code::NotFound,
            Code::Conflict,
            Code::TimedOut,
            Code::Host,
            Code::Limit,
            Code::Start,
            Code::Registry,
            Code::Unavailable,
            Code::Internal,
        ];
        for code in codes {
            assert!(code.exit_code() > 1 && code.status() >= 400);
        }
    }
}
