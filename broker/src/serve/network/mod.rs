//! The daemon's virtual networks: which there are, and the verbs on them. Each has an actor ([`actor`]).

mod actor;
mod book;
mod nest;

pub use nest::end_switches;

use super::actor::registry_error;
use super::{Places, ServeError, Shared};
use crate::api::time::now_ms;
use crate::api::{ApiError, Code, NetworkDetails, NetworkState, NetworkSummary};
use crate::network::Tap;
use crate::network::board::Patch;
use crate::network::spec::NetworkSpec;
use crate::registry::NetworkRecord;
use actor::{Actor, Ask, View};
use book::Book;
use nest::{Predecessor, directory_of};
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot, watch};

pub(super) use actor::CaptureWish;

/// Most networks of a host.
const NETWORKS_MAX: usize = 256;
/// Cards that may be on their way into a network or out of it.
const PATCHES_CAPACITY: usize = 1024;
/// Questions that may wait for one network.
const ASKS_CAPACITY: usize = 32;

/// A network's state on disk.
fn state_of(places: &Places, name: &str) -> PathBuf {
    places.state.join("networks").join(name)
}

/// A network, for those who ask.
#[derive(Debug)]
struct Network {
    record: NetworkRecord,
    asks: mpsc::Sender<Ask>,
    /// By which machines plug their cards in.
    patches: mpsc::Sender<Patch>,
    view: watch::Receiver<View>,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Networks {
    shared: Arc<Shared>,
    all: Mutex<BTreeMap<String, Arc<Network>>>,
    /// Networks are made and removed one after the other.
    changing: tokio::sync::Mutex<()>,
}

fn no_network(name: &str) -> ApiError {
    let name = crate::escape::excerpt(name, 64);
    ApiError::new(Code::NotFound, format!("there is no network {name}"))
}

impl Networks {
    /// Knows every network of the registry. Switches that an earlier daemon has started are heard and ended: the machines'
    /// cards find their way to others.
    pub(super) async fn load(shared: Arc<Shared>) -> Result<Self, ServeError> {
        let records = shared.registry(|registry| registry.networks()).await?;
        let networks = Self {
            all: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            shared,
        };
        for record in records {
            networks.know(record).await;
        }
        Ok(networks)
    }

    async fn know(&self, record: NetworkRecord) -> Arc<Network> {
        let name = record.spec.name.clone();
        let places = &self.shared.places;
        let (directory, state) = (
            directory_of(&places.runtime, &name),
            state_of(places, &name),
        );
        let subnet = record.spec.subnet;
        let found = tokio::task::spawn_blocking(move || {
            let predecessor = Predecessor::end(&directory);
            let mut book = Book::open(&state, subnet);
            // Whose cards they are is not known yet.
            book.hear(&predecessor.leases, |_| true);
            (predecessor.generation, book)
        });
        let (generation, book) = found.await.unwrap_or_default();
        let (patch, patches) = mpsc::channel(PATCHES_CAPACITY);
        let (asks, asked) = mpsc::channel(ASKS_CAPACITY);
        let (view, seen) = watch::channel(View {
            state: NetworkState::Idle,
            ports: 0,
        });
        let shared = Arc::clone(&self.shared);
        let (actor, heard) = Actor::new(shared, record.clone(), generation, book, view);
        tokio::spawn(actor.run(patches, asked, heard));
        self.shared.networks.add(&record.spec, patch.clone());
        let network = Arc::new(Network {
            record,
            asks,
            patches: patch,
            view: seen,
        });
        self.all().insert(name, Arc::clone(&network));
        network
    }

    fn all(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Network>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn network(&self, name: &str) -> Result<Arc<Network>, ApiError> {
        self.all()
            .get(name)
            .cloned()
            .ok_or_else(|| no_network(name))
    }

    /// Every network, by name.
    pub(super) fn list(&self) -> Vec<NetworkSummary> {
        let all = self.all();
        let summary = |network: &Arc<Network>| {
            let view = *network.view.borrow();
            Actor::summary(&network.record, view)
        };
        all.values().map(summary).collect()
    }

    /// Makes a network; one that is there already and is the same is left alone. Returns whether it was made.
    pub(super) async fn create(&self, spec: NetworkSpec) -> Result<bool, ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        let wrong = |reason: String| ApiError::new(Code::Configuration, reason);
        spec.check().map_err(wrong)?;
        if let Ok(network) = self.network(&spec.name) {
            if network.record.spec == spec {
                return Ok(false);
            }
            let line = format!(
                "there is a network {} already, and it is another one",
                spec.name
            );
            return Err(ApiError::new(Code::Conflict, line));
        }
        if self.all().len() >= NETWORKS_MAX {
            let line = format!("there are {NETWORKS_MAX} networks already");
            return Err(ApiError::new(Code::Limit, line));
        }
        let tried = spec.clone();
        super::blocking(move || try_uplinks(&tried)).await?;
        let record = NetworkRecord {
            spec,
            created_at_ms: now_ms(),
        };
        let new = record.clone();
        let added = self
            .shared
            .registry(move |registry| registry.add_network(&new));
        added.await.map_err(registry_error)?;
        self.know(record).await;
        Ok(true)
    }

    /// Everything that is known of a network.
    pub(super) async fn show(&self, name: &str) -> Result<NetworkDetails, ApiError> {
        let network = self.network(name)?;
        let (reply, answer) = oneshot::channel();
        let sent = network.asks.send(Ask::Show(reply)).await;
        sent.map_err(|_| no_network(name))?;
        answer.await.map_err(|_| no_network(name))
    }

    /// Captures to a pipe until it is over.
    pub(super) async fn capture(
        &self,
        name: &str,
        wish: CaptureWish,
        pipe: OwnedFd,
    ) -> Result<(), ApiError> {
        let network = self.network(name)?;
        let (reply, answer) = oneshot::channel();
        let sent = network.asks.send(Ask::Capture(wish, pipe, reply)).await;
        sent.map_err(|_| no_network(name))?;
        answer.await.map_err(|_| no_network(name))?
    }

    /// Removes a network that no machine is in.
    pub(super) async fn remove(&self, name: &str) -> Result<(), ApiError> {
        let _one_at_a_time = self.changing.lock().await;
        let network = self.network(name)?;
        // From here on nothing is plugged in.
        self.shared.networks.remove(name);
        let (reply, answer) = oneshot::channel();
        let sent = network.asks.send(Ask::Remove(reply)).await;
        let removed = match sent {
            Ok(()) => answer.await.unwrap_or(Ok(())),
            // Nobody serves it any more.
            Err(_) => Ok(()),
        };
        if removed.is_err() {
            let spec = &network.record.spec;
            self.shared.networks.add(spec, network.patches.clone());
        }
        removed?;
        self.all().remove(name);
        let gone = name.to_owned();
        let removed = self
            .shared
            .registry(move |registry| registry.remove_network(&gone));
        let removed = removed.await;
        if removed.is_err() {
            // It is on record, so it is there.
            self.know(network.record.clone()).await;
        }
        removed.map_err(registry_error)
    }
}

/// Uplinks that cannot be had are better told now than when the first machine starts.
fn try_uplinks(spec: &NetworkSpec) -> Result<(), ApiError> {
    for (n, uplink) in spec.uplinks.iter().enumerate() {
        let opened = Tap::uplink(&format!("net-{}", spec.name), n, uplink.source(), spec.mtu);
        opened.map_err(|error| ApiError::new(Code::Host, error.to_string()))?;
    }
    Ok(())
}
