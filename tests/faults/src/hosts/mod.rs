//! The hosts of a scenario: each a daemon with directories and programs of its own.

mod daemon;
mod front;

pub use daemon::{Done, Host, HostError, Places};
