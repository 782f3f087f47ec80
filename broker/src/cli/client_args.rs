//! What every command that talks to a daemon has: where the daemon is, and an event loop.

use super::failure::{Failure, START, USAGE};
use super::paths::{PathOptions, Paths};
use crate::api::client::{Client, ClientError};
use clap::Args;

/// Which daemon.
#[derive(Debug, Clone, Args)]
pub(super) struct HostArgs {
    /// Socket of the daemon: unix:///PATH or /PATH [default: bulkhead.sock in the runtime directory]
    #[arg(
        long,
        value_name = "SOCKET",
        env = "BULKHEAD_HOST",
        hide_env_values = true
    )]
    host: Option<String>,
}

/// Which daemon, and how to print.
#[derive(Debug, Clone, Args)]
pub(super) struct ClientArgs {
    #[command(flatten)]
    pub(super) daemon: HostArgs,
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl ClientArgs {
    /// Talks to the daemon.
    pub(super) fn talk<T>(
        &self,
        options: &PathOptions,
        work: impl AsyncFnOnce(Client) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        self.daemon.talk(options, work)
    }
}

impl HostArgs {
    /// The client of the daemon that is meant.
    fn client(&self, options: &PathOptions) -> Result<Client, Failure> {
        match &self.host {
            Some(host) => Client::of_host(host)
                .map_err(|e| Failure::new(USAGE, format!("--host {host}: {e}"))),
            None => Ok(Client::of_runtime(&Paths::new(options)?.runtime)),
        }
    }

    /// Talks to the daemon.
    pub(super) fn talk<T>(
        &self,
        options: &PathOptions,
        work: impl AsyncFnOnce(Client) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let client = self.client(options)?;
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Failure::because(START, "starting the event loop", &error))?
            .block_on(work(client))
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        // A VM file may have several problems, one a line.
        Self::lines(error.exit_code(), error.to_string().lines())
    }
}
