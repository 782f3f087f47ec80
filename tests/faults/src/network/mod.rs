//! The network of the hosts: each is a network namespace with one interface, whose frames the harness
//! carries to the others. Nothing of it reaches the machine's own networks.
//!
//! ```text
//!   namespace "left"                 harness                 namespace "right"
//!     net0 10.77.0.1/24 ── TAP ── relay, rules ── TAP ── net0 10.77.0.2/24
//! ```

mod link;
mod relay;
mod tap;

pub use link::{Link, LinkReport};
pub use relay::{FrameAction, FrameRule};

use nix::sched::{CloneFlags, setns};
use relay::Relay;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

/// The interface of a host.
const INTERFACE: &str = "net0";
/// Where `ip netns` has the namespaces.
const NAMESPACES: &str = "/run/netns";
/// Most hosts of a network: their number is the last byte of an address.
pub const HOSTS_MAX: usize = 100;

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// `ip` has failed or is missing.
    #[error("`ip {command}`: {what}")]
    Ip {
        /// Its arguments.
        command: String,
        /// What it said.
        what: String,
    },
    /// The kernel refused.
    #[error("network of the hosts: {what}: {cause}")]
    Os {
        /// What was being done.
        what: &'static str,
        /// Its error.
        cause: io::Error,
    },
}

/// A network namespace.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Whether it is to be removed.
    exists: bool,
}

impl Namespace {
    /// Runs `work` in the namespace: sockets that it opens and processes that it starts are in there.
    ///
    /// # Errors
    /// When the namespace cannot be entered; `work` has not run then.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        let namespace = File::open(self.path())?;
        std::thread::scope(|scope| {
            // Threads have networks of their own, and this one ends.
            let inside =
                scope.spawn(|| setns(&namespace, CloneFlags::CLONE_NEWNET).map(|()| work()));
            let done = inside.join();
            let done = done.map_err(|_| io::Error::other("a thread panicked"))?;
            done.map_err(io::Error::from)
        })
    }

    /// Its place in the file system.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(NAMESPACES).join(&self.name)
    }

    fn add(index: usize) -> Result<Self, NetworkError> {
        let name = format!("bhf{}-{index}", std::process::id());
        ip(&["netns", "add", &name])?;
        let last = u8::try_from(index + 1).unwrap_or(u8::MAX);
        Ok(Self {
            name,
            address: Ipv4Addr::new(10, 77, 0, last),
            exists: true,
        })
    }

    /// Its end of the interface, which is up when this returns.
    fn interface(&self) -> Result<File, NetworkError> {
        let os = |cause| NetworkError::Os {
            what: "a TAP interface",
            cause,
        };
        let tap = self
            .within(|| tap::open(INTERFACE))
            .map_err(os)?
            .map_err(os)?;
        let address = format!("{}/24", self.address);
        let inside = |arguments: &[&str]| {
            let arguments: Vec<&str> = ["-n", &self.name]
                .into_iter()
                .chain(arguments.iter().copied())
                .collect();
            ip(&arguments)
        };
        inside(&["link", "set", "lo", "up"])?;
        // Nobody speaks unless it is asked to.
        inside(&["link", "set", INTERFACE, "addrgenmode", "none"])?;
        inside(&["addr", "add", &address, "dev", INTERFACE])?;
        inside(&["link", "set", INTERFACE, "up"])?;
        Ok(tap)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::mem::take(&mut self.exists)
            && let Err(error) = ip(&["netns", "del", &self.name])
        {
            #[expect(clippy::print_stderr, reason = "who runs the harness must remove it")]
            {
                eprintln!("bulkhead-fault: error: {error}");
            }
        }
    }
}

/// Removes a namespace, from wherever.
pub fn remove(namespace: &std::path::Path) {
    let name = namespace.file_name().and_then(|name| name.to_str());
    if let Some(name) = name {
        let _gone = ip(&["netns", "del", name]);
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the harness makes networks with the tool that is made for it"
)]
fn ip(arguments: &[&str]) -> Result<(), NetworkError> {
    let failed = |what: String| NetworkError::Ip {
        command: arguments.join(" "),
        what,
    };
    let output = Command::new("ip").args(arguments).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}

/// The network of all hosts.
#[derive(Debug)]
pub struct Network {
    /// The relay goes first: it holds the interfaces.
    relay: Relay,
    namespaces: Vec<Arc<Namespace>>,
}

impl Network {
    /// Connects so many hosts, at most [`HOSTS_MAX`]. `made` is told of each namespace as soon as it is there.
    /// `hit` is told of the first frame that a rule hits, by the number of its fault.
    ///
    /// # Errors
    /// When a namespace or an interface cannot be made.
    pub fn connect(
        hosts: usize,
        made: impl Fn(&Namespace),
        hit: impl Fn(u32) + Send + 'static,
    ) -> Result<Self, NetworkError> {
        let mut namespaces = Vec::new();
        let mut taps = Vec::new();
        for index in 0..hosts.min(HOSTS_MAX) {
            let namespace = Namespace::add(index)?;
            made(&namespace);
            taps.push(namespace.interface()?);
            namespaces.push(Arc::new(namespace));
        }
        let relay = Relay::start(taps, hit).map_err(|cause| NetworkError::Os {
            what: "a relay of frames",
            cause,
        })?;
        Ok(Self { relay, namespaces })
    }

    /// The namespace of a host.
    #[must_use]
    pub fn namespace(&self, host: usize) -> Option<Arc<Namespace>> {
        self.namespaces.get(host).map(Arc::clone)
    }

    /// From now on frames are treated so, for the rule's time.
    pub fn add(&self, rule: FrameRule) {
        self.relay.add(rule);
    }

    /// How many frames have been carried.
    #[must_use]
    pub fn carried(&self) -> u64 {
        self.relay.carried()
    }
}
