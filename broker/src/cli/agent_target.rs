//! Which guest agent a command talks to, and how it gets there.

use super::client_args::HostArgs;
use super::failure::{Failure, HOST, START, USAGE};
use super::paths::PathOptions;
use crate::agent::{AgentError, connect};
use crate::escape::escaped;
use bulkhead_agent::wire::Wire;
use bulkhead_ipc::protocol::agent::FailureKind;
use clap::{Args, ValueHint};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The way to the agent.
#[derive(Debug, Clone, Args)]
pub(super) struct AgentTarget {
    #[command(flatten)]
    daemon: HostArgs,
    /// Unix socket of the machine's vsock device, for machines of `bulkhead run`: no daemon is asked
    #[arg(long, value_name = "PATH", value_hint = ValueHint::FilePath)]
    socket: Option<PathBuf>,
}

impl AgentTarget {
    /// Connects to the agent in the machine `name` and has `work` done with it, on a thread that may block.
    pub(super) fn with<T: Send + 'static>(
        &self,
        name: &str,
        options: &PathOptions,
        work: impl FnOnce(Wire) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        if !crate::vmfile::is_name(name) {
            let line = format!("{}: there is no such machine", escaped(name));
            return Err(Failure::new(USAGE, line));
        }
        if let Some(path) = &self.socket {
            let stream = UnixStream::connect(path).map_err(|error| {
                Failure::because(HOST, format!("--socket {}", path.display()), &error)
            })?;
            return work(connect(stream)?);
        }
        self.daemon.talk(options, async |client| {
            let attached = client.vsock(name).await?;
            let stream = UnixStream::from(attached.socket);
            // Meanwhile this thread passes bytes on between that socket and the daemon's.
            let done = tokio::task::spawn_blocking(move || work(connect(stream)?)).await;
            done.unwrap_or_else(|lost| Err(Failure::because(START, "the command", &lost)))
        })
    }
}

impl From<AgentError> for Failure {
    fn from(error: AgentError) -> Self {
        let code = match &error {
            AgentError::Refused(refused) => match refused.kind {
                FailureKind::NotFound | FailureKind::Invalid => USAGE,
                FailureKind::Unsupported => HOST,
                FailureKind::Denied | FailureKind::Busy | FailureKind::Other => START,
            },
            _ => START,
        };
        Self::because(code, "", &error)
    }
}
