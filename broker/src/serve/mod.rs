//! `bulkhead serve`: the broker of a host.
//!
//! ```text
//!   socket ──▶ http ──▶ routes ──▶ verbs ──ask──▶ actor (one a machine) ──▶ machine thread: vm::run
//!                                    ▲               │        │
//!                                    └──── view ◀────┘        └──▶ registry, journal, consoles
//! ```
//!
//! Responsible for: which machines there are ([`crate::registry`]), who may ask for what over the
//! socket, and keeping every machine's life in one place, its actor. It must never wait for one
//! machine while another wants something, and must not end machines by ending itself.
//!
//! Invariants: every channel, body and count is bounded; a change is on disk before it is carried
//! out; the daemon's lock files make two daemons on one directory impossible.
//!
//! Called by the command line's `serve`; nothing here but [`config`] is touched by `run`.

mod actor;
mod attach;
mod budget;
pub mod config;
mod consoles;
mod devices;
mod host;
mod http;
mod journal;
mod life;
mod lock;
mod machine;
mod network;
mod networks;
mod notify;
mod orphans;
mod routes;
mod shutdown;
mod stats;
mod stream;
mod verbs;
mod view;
mod vsock;

use crate::api::{ApiError, Code};
use crate::launch::cgroup::{Place, Reach};
use crate::launch::users::UserRange;
use crate::network::board::Switchboard;
use crate::registry::{Registry, RegistryError};
use crate::vm::session::RunOptions;
use budget::Budget;
use config::Config;
use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use lock::Lock;
pub use network::end_switches;

/// Threads for work that blocks: the registry, files that machines name, `/proc`.
const BLOCKING_THREADS: usize = 8;

/// Where things are.
#[derive(Debug, Clone)]
pub struct Places {
    /// Configuration.
    pub config: PathBuf,
    /// State.
    pub state: PathBuf,
    /// Sockets and locks.
    pub runtime: PathBuf,
    /// Process binaries.
    pub binaries: PathBuf,
    /// Policy overrides.
    pub policies: Option<PathBuf>,
    /// Whether overrides may grant more than the built-in policies.
    pub allow_looser_policy: bool,
}

impl Places {
    /// A machine's rings and logs.
    fn vm_state(&self, name: &str) -> PathBuf {
        self.state.join("vms").join(name)
    }

    fn run_options(
        &self,
        name: &str,
        id: &str,
        users: UserRange,
        networks: Switchboard,
    ) -> RunOptions {
        RunOptions {
            binaries: self.binaries.clone(),
            policies: self.policies.clone(),
            allow_looser_policy: self.allow_looser_policy,
            cache: Some(self.state.join("cache")),
            state: self.vm_state(name),
            runtime: self.runtime.clone(),
            core: None,
            reach: Reach::Outside,
            reboot: true,
            id: Some(id.to_owned()),
            users,
            networks,
        }
    }
}

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Another daemon has the directory.
    #[error("{what} is in use by another bulkhead serve{holder}")]
    InUse {
        /// Which file.
        what: PathBuf,
        /// Who, if it said so.
        holder: String,
    },
    /// The registry cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The kernel refused something.
    #[error("{what}: {cause}")]
    Os {
        /// What was being done.
        what: String,
        /// What the kernel said.
        cause: io::Error,
    },
}

fn os(what: impl Into<String>) -> impl FnOnce(io::Error) -> ServeError {
    move |cause| ServeError::Os {
        what: what.into(),
        cause,
    }
}

/// What every actor needs.
#[derive(Debug)]
struct Shared {
    places: Places,
    config: Config,
    registry: Arc<Registry>,
    budget: Arc<Budget>,
    /// Where machines' cards are plugged into networks.
    networks: Switchboard,
}

impl Shared {
    /// Works with the registry on a thread that may block.
    async fn registry<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Registry) -> Result<T, RegistryError> + Send + 'static,
    ) -> Result<T, RegistryError> {
        let registry = Arc::clone(&self.registry);
        let done = tokio::task::spawn_blocking(move || work(&registry)).await;
        done.unwrap_or_else(|lost| {
            let cause = io::Error::other(lost.to_string());
            Err(RegistryError::Storage(redb::Error::Io(cause)))
        })
    }
}

/// Does work that blocks on a thread for it.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|lost| Err(ApiError::new(Code::Internal, lost.to_string())))
}

/// Makes a directory that only this user can enter.
fn make_private(directory: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o700).create(directory)
}

/// Serves until it is told to end, by SIGTERM or SIGINT. Machines run on.
///
/// # Errors
/// When it cannot start.
pub fn serve(places: Places, config: Config) -> Result<(), ServeError> {
    // Whatever is made from here on is for this user alone, unless it is given away on purpose.
    nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
    make_private(&places.state).map_err(os(places.state.display().to_string()))?;
    let _state_lock = Lock::take(&places.state.join("serve.lock"))?;
    let listener = http::Socket::bind(&places.runtime)?;
    let registry = Registry::open(&places.state.join(crate::registry::FILE_NAME))?;
    if let Some(lacking) = config.host.users.lacking() {
        tracing::warn!("{lacking}");
    }
    Place::find(Reach::Outside).sweep();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(os("the event loop"))?;
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let shared = Arc::new(Shared {
        budget: Budget::new(config.budget_bytes(&meminfo)),
        registry: Arc::new(registry),
        networks: Switchboard::of_daemon(),
        places,
        config,
    });
    runtime.block_on(async {
        let host = host::Host::load(shared).await?;
        http::serve(listener, host).await
    })
    // Machine threads are not waited for: their machines outlive this program.
}
