//! The socket device: queue 0 receives (the guest offers buffers, which wait here for packets), queue 1
//! sends (each packet is heard and completed at once), queue 2 takes events.
//!
//! ```text
//!   listener ── accept ─┐                    ┌─ broker connects (Dial, Dialled)
//!                       Exchange ── sockets ─┘        epoll says which have news
//! ```
//!
//! The connections live and die with the process. A successor starts without any, tells the guest so with
//! the one event that there is, and says nothing else before the guest has taken that in, so that
//! what is new is not mistaken for what has ended.

use crate::client::Client;
use crate::dials::Dials;
use crate::exchange::Exchange;
use crate::packet::{HEADER_BYTES, PAYLOAD_BYTES_MAX};
use crate::request;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{DeviceOwn, FdRole};
use bulkhead_ipc::protocol::device::FromDevice;
use bulkhead_runtime::device::FIRST_TOKEN;
use bulkhead_runtime::socket::accept;
use bulkhead_runtime::wait::{SocketNews, Watcher};
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Setup, Stillbirth};
use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

const RECEIVE: usize = 0;
const SEND: usize = 1;
const EVENT: usize = 2;
const TOKEN_LISTENER: u8 = FIRST_TOKEN;
/// The one event: all connections have ended (virtio 1.2, section 5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = [0; 4];
/// How long nothing is said to a guest that does not take the event in.
const QUIET: Duration = Duration::from_millis(200);
/// Packets for the guest before the guest's own have their turn.
const PACKETS_PER_TURN: u32 = 64;
/// Connections that are taken before the others have their turn.
const ACCEPTED_PER_TURN: u32 = 64;
/// Pause when the kernel has nothing left for another connection.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);
/// Pause between two looks for what has waited for too long.
const EXPIRE_PAUSE: Duration = Duration::from_millis(20);

/// Whether the guest knows that the connections of a process before this one have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum News {
    /// There is nothing to know.
    None,
    /// It is still to be told; from then on it is left alone until the given time.
    Due(Instant),
    /// It was told. It had offered so many buffers for events, and will have again when it has taken
    /// this one in.
    Told(Instant, usize),
}

/// The device. Its state are connections, which nothing could carry over to another process; so there
/// is nothing to save.
#[derive(Debug)]
pub(crate) struct Sockets {
    listener: OwnedFd,
    watcher: Watcher,
    exchange: Exchange<Client>,
    /// Buffers for packets and for events, oldest first. The gate has no more slots than the queues
    /// were laid out for, which bounds them.
    receive: VecDeque<Chain>,
    event: VecDeque<Chain>,
    news: News,
    is_successor: bool,
    dials: Dials,
    /// When connections are to be taken although the listener has no news.
    accept_at: Option<Instant>,
    expire_at: Instant,
    payload: Box<[u8; PAYLOAD_BYTES_MAX]>,
}

impl Device for Sockets {
    const KIND: VirtioKind = VirtioKind::Vsock;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let &DeviceOwn::Vsock {
            guest_cid,
            generation,
            is_successor,
        } = &setup.config.own
        else {
            return Err(Stillbirth::setup("no configuration of a socket device"));
        };
        let listener = setup.grants.take(FdRole::Listener, 0)?;
        setup.watch(&listener, TOKEN_LISTENER)?;
        let slots = |queue| {
            let size = setup.config.queue_sizes.get(queue);
            VecDeque::with_capacity(size.copied().unwrap_or(0).into())
        };
        let now = Instant::now();
        Ok(Self {
            listener,
            watcher: setup.watcher(),
            exchange: Exchange::of_generation(guest_cid.into(), generation),
            receive: slots(RECEIVE),
            event: slots(EVENT),
            news: News::None,
            is_successor,
            dials: Dials::new(now),
            accept_at: None,
            expire_at: now,
            payload: Box::new([0; PAYLOAD_BYTES_MAX]),
        })
    }

    fn features(&self) -> u64 {
        // A device without features has stream sockets.
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        match queue {
            RECEIVE => self.receive.push_back(chain),
            EVENT => self.event.push_back(chain),
            _ => {
                if queue == SEND
                    && let Some((header, len)) = request::packet(&chain, queues, &mut self.payload)
                {
                    let behind = self.payload.get(..len).unwrap_or_default();
                    self.exchange.hear(&header, behind, Instant::now());
                }
                return queues.complete(queue, chain.head(), 0);
            }
        }
        Ok(())
    }

    fn settle(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        let now = Instant::now();
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept(now)?;
        }
        if self.expire_at <= now {
            self.exchange.expire(now);
            self.expire_at = now + EXPIRE_PAUSE;
        }
        self.tell_news(queues, now)?;
        if self.news != News::None {
            return Ok(false);
        }
        self.speak(queues, now)
    }

    fn on_event(&mut self, token: u8, _queues: &mut Queues) -> Result<(), DeviceFault> {
        if token == TOKEN_LISTENER {
            self.accept(Instant::now())?;
        }
        Ok(())
    }

    fn on_socket(&mut self, news: SocketNews, _queues: &mut Queues) -> Result<(), DeviceFault> {
        self.exchange
            .wake(news.number, news.hung_up, Instant::now());
        Ok(())
    }

    fn next_dial(&mut self) -> Option<FromDevice> {
        let now = Instant::now();
        if !self.exchange.wants_to_dial() || !self.dials.may_ask(now) {
            return None;
        }
        let dial = self.exchange.next_dial()?;
        self.dials.ask(dial.id, now);
        Some(FromDevice::Dial {
            id: dial.id,
            port: dial.port,
            asked_ms: since_boot_ms(),
        })
    }

    fn on_dialled(
        &mut self,
        id: u64,
        socket: Option<OwnedFd>,
        _queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        self.dials.answer(id);
        if self.exchange.dialled(id, socket.map(Client::from)) {
            self.watch(id)?;
        }
        Ok(())
    }

    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        if features.is_some() {
            if std::mem::take(&mut self.is_successor) {
                self.news = News::Due(Instant::now() + QUIET);
            }
            return Ok(());
        }
        // Who starts anew knows of no connection.
        self.is_successor = false;
        self.news = News::None;
        self.exchange.forget();
        for (queue, buffers) in [(RECEIVE, &mut self.receive), (EVENT, &mut self.event)] {
            for chain in buffers.drain(..) {
                queues.complete(queue, chain.head(), 0)?;
            }
        }
        Ok(())
    }

    fn wakes_in(&mut self) -> Option<Duration> {
        let expire = self.exchange.next_deadline();
        let expire = expire.map(|at| at.max(self.expire_at));
        let quiet = match self.news {
            News::None => None,
            News::Due(until) | News::Told(until, _) => Some(until),
        };
        let dial = self.exchange.wants_to_dial();
        let dial = dial.then(|| self.dials.next_chance());
        let all = [expire, quiet, dial, self.accept_at];
        let first = all.into_iter().flatten().min();
        first.map(|at| at.saturating_duration_since(Instant::now()))
    }

    fn is_at_once(&self) -> bool {
        true
    }
}

impl Sockets {
    /// Takes the connections that clients have made, some at a time.
    fn accept(&mut self, now: Instant) -> Result<(), DeviceFault> {
        self.accept_at = None;
        for _ in 0..ACCEPTED_PER_TURN {
            match accept(&self.listener) {
                Ok(Some(stream)) => {
                    if let Some(id) = self.exchange.accept(stream.into(), now) {
                        self.watch(id)?;
                    }
                }
                Ok(None) => return Ok(()),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    self.accept_at = Some(now + ACCEPT_AGAIN);
                    return Ok(());
                }
            }
        }
        // The listener has no news of those that have waited all the time.
        self.accept_at = Some(now);
        Ok(())
    }

    /// Watches the socket of connection `id`, unless that has ended already.
    fn watch(&self, id: u64) -> Result<(), DeviceFault> {
        let Some(stream) = self.exchange.stream(id).and_then(Client::socket) else {
            return Ok(());
        };
        self.watcher
            .watch(stream, id)
            .map_err(|errno: Errno| DeviceFault::Os {
                call: "epoll_ctl",
                errno,
            })
    }

    /// Tells the guest that its connections have ended with the process before this one.
    fn tell_news(&mut self, queues: &mut Queues, now: Instant) -> Result<(), DeviceFault> {
        if let News::Due(_) = self.news
            && let Some(chain) = self.event.pop_front()
        {
            let offered = self.event.len() + 1;
            let written = request::fill(&chain, queues, &[&TRANSPORT_RESET]);
            queues.complete(EVENT, chain.head(), written)?;
            self.news = News::Told(now + QUIET, offered);
        }
        let heard = match self.news {
            News::None => false,
            News::Due(until) => until <= now,
            News::Told(until, offered) => until <= now || self.event.len() >= offered,
        };
        if heard {
            self.news = News::None;
        }
        Ok(())
    }

    /// Gives the guest what there is for it, as far as it has offered buffers. Returns whether there
    /// was anything.
    fn speak(&mut self, queues: &mut Queues, now: Instant) -> Result<bool, DeviceFault> {
        let mut said = false;
        for _ in 0..PACKETS_PER_TURN {
            let Some(&chain) = self.receive.front() else {
                return Ok(said);
            };
            let Some(room) = request::room(&chain).checked_sub(HEADER_BYTES) else {
                // Nothing fits.
                self.receive.pop_front();
                queues.complete(RECEIVE, chain.head(), 0)?;
                continue;
            };
            let room = room.min(self.payload.len());
            let to = self.payload.get_mut(..room).unwrap_or_default();
            let Some(header) = self.exchange.say(to, now) else {
                return Ok(said);
            };
            let len = usize::try_from(header.len).unwrap_or(0);
            let payload = self.payload.get(..len).unwrap_or_default();
            let written = request::fill(&chain, queues, &[&header.encode(), payload]);
            self.receive.pop_front();
            queues.complete(RECEIVE, chain.head(), written)?;
            said = true;
        }
        Ok(said)
    }
}

/// Milliseconds since the host's start, on the clock that the broker has too.
fn since_boot_ms() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME);
    now.map_or(0, |now| {
        u64::try_from(Duration::from(now).as_millis()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
