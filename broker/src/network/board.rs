//! Where machines' network cards are plugged into virtual networks: between the machines' threads and the daemon, which
//! alone has networks.
//!
//! A machine makes a port (memory and two doorbells) for each process of a card and hands it to the network, which gives it
//! to its switch. Nothing here waits: a network that is busy refuses.

use super::card::CardSpec;
use super::spec::NetworkSpec;
use bulkhead_ipc::port::{PORT_BYTES, stamp};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::mpsc;

/// Name of the memory of ports.
pub const PORT_MEMORY: &str = "bulkhead-port";
/// Generation of a port that no switch has had yet.
pub const FIRST_GENERATION: u32 = 1;

/// Why a card is not in its network.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// Only the daemon has networks.
    #[error(
        "networks are the daemon's: have `bulkhead serve` run, and `bulkhead create` and `bulkhead start` the machine"
    )]
    NoDaemon,
    /// There is no such network.
    #[error("there is no network {0}: `bulkhead network create {0}` makes one")]
    NoNetwork(String),
    /// It takes no such card.
    #[error("the network {network} takes no such card: {reason}")]
    Card {
        /// The network.
        network: String,
        /// Which field, and what was expected.
        reason: String,
    },
    /// It takes nothing now.
    #[error("the network {0} is busy or being removed")]
    Busy(String),
    /// The kernel refused.
    #[error("a port cannot be made: {0}")]
    Os(#[from] io::Error),
}

/// What connects a card and a switch.
#[derive(Debug)]
pub struct PortFds {
    /// The memory of both rings.
    pub memory: OwnedFd,
    /// Wakes the switch.
    pub kick: Doorbell,
    /// Wakes the card.
    pub call: Doorbell,
}

impl PortFds {
    fn make() -> io::Result<Self> {
        let memory = sealed_memfd(PORT_MEMORY, PORT_BYTES)?;
        stamp(memory.as_fd(), FIRST_GENERATION)?;
        Ok(Self {
            memory,
            kick: Doorbell::new()?,
            call: Doorbell::new()?,
        })
    }

    /// Second descriptors of the same port.
    ///
    /// # Errors
    /// The kernel's.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            memory: self.memory.try_clone()?,
            kick: self.kick.try_clone()?,
            call: self.call.try_clone()?,
        })
    }
}

/// A card that is plugged in.
#[derive(Debug)]
pub struct Plug {
    /// Tells it from every other that was ever plugged in.
    pub ticket: u64,
    /// Name of the machine.
    pub machine: String,
    /// Which of the machine's cards.
    pub card: u16,
    /// The card's address.
    pub mac: [u8; 6],
    /// What it is in the network.
    pub card_spec: CardSpec,
    /// The port.
    pub port: PortFds,
    /// Dead when the card is pulled out.
    pub card_lives: Weak<()>,
}

impl Plug {
    /// Whether the card is pulled out.
    #[must_use]
    pub fn is_pulled_out(&self) -> bool {
        self.card_lives.strong_count() == 0
    }
}

/// What a network hears of machines.
#[derive(Debug)]
pub enum Patch {
    /// A card is plugged in, in the place of the one that the machine's card had before.
    In(Plug),
    /// It is pulled out.
    Out(u64),
}

#[derive(Debug, Default)]
struct Networks {
    all: Mutex<BTreeMap<String, (NetworkSpec, mpsc::Sender<Patch>)>>,
    tickets: AtomicU64,
}

/// The networks that there are. Without a daemon there are none.
#[derive(Debug, Clone, Default)]
pub struct Switchboard(Option<Arc<Networks>>);

/// It says nothing about the machine that has it.
impl PartialEq for Switchboard {
    fn eq(&self, _other: &Self) -> bool {
        true
    }
}

impl Eq for Switchboard {}

impl Switchboard {
    /// The daemon's.
    #[must_use]
    pub fn of_daemon() -> Self {
        Self(Some(Arc::default()))
    }

    /// There is this network; it hears by `patches`.
    pub fn add(&self, spec: &NetworkSpec, patches: mpsc::Sender<Patch>) {
        if let Some(networks) = &self.0 {
            let mut all = networks.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.insert(spec.name.clone(), (spec.clone(), patches));
        }
    }

    /// There is none any more.
    pub fn remove(&self, name: &str) {
        if let Some(networks) = &self.0 {
            let mut all = networks.all.lock().unwrap_or_else(PoisonError::into_inner);
            all.remove(name);
        }
    }

    /// Plugs card number `card` of `machine` into a network, with a port of its own.
    ///
    /// # Errors
    /// [`PlugError`].
    pub fn plug(
        &self,
        network: &str,
        machine: &str,
        card: u16,
        mac: [u8; 6],
        card_spec: &CardSpec,
    ) -> Result<Plugged, PlugError> {
        let networks = self.0.as_ref().ok_or(PlugError::NoDaemon)?;
        let port = PortFds::make()?;
        let life = Arc::new(());
        let ticket = networks.tickets.fetch_add(1, Ordering::Relaxed);
        let plug = Plug {
            ticket,
            machine: machine.to_owned(),
            card,
            mac,
            card_spec: card_spec.clone(),
            port: port.try_clone()?,
            card_lives: Arc::downgrade(&life),
        };
        // Told before the network can be taken away, so that it knows of every card then.
        let all = networks.all.lock().unwrap_or_else(PoisonError::into_inner);
        let there = all.get(network);
        let (spec, patches) = there.ok_or_else(|| PlugError::NoNetwork(network.to_owned()))?;
        spec.takes(card_spec).map_err(|reason| PlugError::Card {
            network: network.to_owned(),
            reason,
        })?;
        let told = patches.try_send(Patch::In(plug));
        told.map_err(|_| PlugError::Busy(network.to_owned()))?;
        Ok(Plugged {
            port,
            ticket,
            patches: patches.clone(),
            _life: life,
        })
    }
}

/// A card's place in a network. Dropped, it is pulled out.
#[derive(Debug)]
pub struct Plugged {
    /// The port.
    pub port: PortFds,
    ticket: u64,
    patches: mpsc::Sender<Patch>,
    _life: Arc<()>,
}

impl Drop for Plugged {
    fn drop(&mut self) {
        // A network that is gone has no ports; one that is as busy as that finds out by [`Plug::is_pulled_out`].
        let _told = self.patches.try_send(Patch::Out(self.ticket));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::port::generation_of;

    #[test]
    fn card_is_plugged_in_with_a_port_of_its_own_and_out_again() {
        let (tell, mut heard) = mpsc::channel(4);
        let board = Switchboard::of_daemon();
        board.add(&NetworkSpec::new("lab"), tell);
        let first = board
            .plug("lab", "web", 0, [2; 6], &CardSpec::default())
            .unwrap();
        let second = board
            .plug("lab", "web", 0, [2; 6], &CardSpec::default())
            .unwrap();
        drop(first);
        let Some(Patch::In(one)) = heard.blocking_recv() else {
            panic!("nothing was plugged in");
        };
        let Some(Patch::In(two)) = heard.blocking_recv() else {
            panic!("nothing was plugged in");
        };
        assert!(one.is_pulled_out() && !two.is_pulled_out());
        let out = heard.blocking_recv();
        assert!(
            matches!(out, Some(Patch::Out(ticket)) if ticket == one.ticket),
            "{out:?}"
        );
        assert_ne!(one.ticket, two.ticket);
        assert_eq!(
            (two.machine.as_str(), two.card, two.mac),
            ("web", 0, [2; 6])
        );
        assert_eq!(generation_of(two.port.memory.as_fd()), Ok(FIRST_GENERATION));
        two.port.call.ring();
        assert!(second.port.call.take() && !second.port.kick.take());
    }

    #[test]
    fn missing_networks_and_daemons_are_told() {
        let board = Switchboard::of_daemon();
        let error = board
            .plug("lab", "web", 0, [2; 6], &CardSpec::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("bulkhead network create lab"), "{error}");
        let alone = Switchboard::default();
        let error = alone
            .plug("lab", "web", 0, [2; 6], &CardSpec::default())
            .unwrap_err()
            .to_string();
        assert!(error.contains("bulkhead serve"), "{error}");
        let (tell, heard) = mpsc::channel(1);
        board.add(&NetworkSpec::new("lab"), tell);
        let _first = board
            .plug("lab", "web", 0, [2; 6], &CardSpec::default())
            .unwrap();
        assert!(matches!(
            board.plug("lab", "web", 1, [2; 6], &CardSpec::default()),
            Err(PlugError::Busy(_))
        ));
        let taken = CardSpec {
            addresses: vec!["10.87.0.1".parse().unwrap()],
            ..CardSpec::default()
        };
        let error = board.plug("lab", "web", 1, [2; 6], &taken).unwrap_err();
        assert!(error.to_string().contains("addresses"), "{error}");
        board.remove("lab");
        assert!(matches!(
            board.plug("lab", "web", 1, [2; 6], &CardSpec::default()),
            Err(PlugError::NoNetwork(_))
        ));
        drop(heard);
    }
}
