//! The actor of one network: the only one who starts its switch, talks to it, and knows which cards are plugged in.
//!
//! ```text
//!   machines ── Patch ──▶ actor ── ToSwitch ──▶ bulkhead-switch ── ports ── bulkhead-net (of machines)
//!   verbs ───── Ask ────▶   │  ▲                      │
//!                           │  └──── Notice ──────────┘ leases, faults, its death
//!                           └─▶ leases on disk, view
//! ```
//!
//! There is a switch as long as a card is plugged in. When it dies another takes its place, each port gets another
//! generation, and the cards go on with it by themselves ([`bulkhead_ipc::port`]). Nothing here waits for a switch
//! without a deadline; what it says is believed of its own network alone.

use super::book::{self, Book};
use super::nest::{Nest, directory_of};
use crate::api::time::rfc3339;
use crate::api::{
    ApiError, Code, NetworkCounters, NetworkDetails, NetworkLease, NetworkPort, NetworkState,
    NetworkSummary, NetworkUplink, SCHEMA_VERSION,
};
use crate::launch::Launched;
use crate::launch::cgroup::Group;
use crate::network::Tap;
use crate::network::board::{FIRST_GENERATION, Patch, Plug};
use crate::network::card::Tenants;
use crate::network::spec::{NetworkSpec, UplinkSpec};
use crate::registry::NetworkRecord;
use crate::serve::Shared;
use crate::supervisor::driver::{NOTICES_CAPACITY, Notice, watch};
use crate::supervisor::fault;
use crate::supervisor::state::{Action, Event, Rule, Supervisor};
use crate::vm::spec::show_mac;
use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::port::stamp;
use bulkhead_ipc::protocol::switch::{FromSwitch, LEASES_MAX, PORTS_MAX, PortReport, ToSwitch};
use bulkhead_switch::Cause;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch as seen};
use tokio::time::Instant;

/// Number of the first uplink; machines' cards are below.
const UPLINKS_FROM: u16 = 240;
/// Longest birth that any policy may permit.
const BIRTH_MAX: Duration = Duration::from_secs(60);
/// How long a switch has to end when it is asked.
const END_WITHIN: Duration = Duration::from_secs(2);
/// When a switch that takes no more messages is told the rest.
const TELL_AGAIN: Duration = Duration::from_millis(5);
/// How long a switch may take to tell how its ports are.
const REPORT_WITHIN: Duration = Duration::from_secs(1);
/// When leases are written after they have changed.
const WRITE_AFTER: Duration = Duration::from_secs(1);
/// When leases that could not be written are tried again.
const WRITE_AGAIN: Duration = Duration::from_secs(30);
/// When a switch that could not be started is tried again.
const START_AGAIN: Duration = Duration::from_secs(5);
/// Requests that wait for a report.
const REPORTS_MAX: usize = 32;

type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What can be asked of a network.
#[derive(Debug)]
pub(super) enum Ask {
    /// Everything that is known of it.
    Show(oneshot::Sender<NetworkDetails>),
    /// Capture to a pipe.
    Capture(CaptureWish, OwnedFd, Reply<()>),
    /// End, unless a card is plugged in.
    Remove(Reply<()>),
}

/// What is to be captured.
#[derive(Debug, Clone, Copy)]
pub(in crate::serve) struct CaptureWish {
    pub(in crate::serve) port: Option<u16>,
    pub(in crate::serve) snap_bytes: u32,
    pub(in crate::serve) file_bytes: u64,
    pub(in crate::serve) within: Duration,
}

/// A machine's card.
#[derive(Debug)]
struct Card {
    plug: Plug,
    generation: u32,
    trouble: Option<String>,
}

/// A way out.
#[derive(Debug)]
struct Uplink {
    spec: UplinkSpec,
    tap: Option<Tap>,
    trouble: Option<String>,
}

/// A switch from its start to its end, and those that take its place.
#[derive(Debug)]
struct Life {
    supervisor: Supervisor,
    began: Instant,
    launched: Arc<Launched>,
    /// It was told of its ports.
    serves: bool,
    /// It was asked to end.
    ends: bool,
    group: Option<Group>,
}

/// A message under way.
#[derive(Debug)]
struct Letter {
    message: ToSwitch,
    fds: Vec<OwnedFd>,
}

/// What lists show.
#[derive(Debug, Clone, Copy)]
pub(super) struct View {
    pub(super) state: NetworkState,
    pub(super) ports: usize,
}

pub(super) struct Actor {
    shared: Arc<Shared>,
    record: NetworkRecord,
    view: seen::Sender<View>,
    /// Where switches are started; made when one is needed.
    nest: Option<Nest>,
    life: Option<Life>,
    generation: u32,
    restarts: u64,
    failure: Option<String>,
    cards: BTreeMap<u16, Card>,
    tenants: Tenants,
    uplinks: Vec<Uplink>,
    book: Book,
    letters: VecDeque<Letter>,
    tell_again: Option<Instant>,
    start_again: Option<Instant>,
    write_at: Option<Instant>,
    shows: Vec<oneshot::Sender<NetworkDetails>>,
    report_by: Option<Instant>,
    reports: BTreeMap<u16, PortReport>,
    capturing: bool,
    notices: mpsc::Sender<(ProcId, Notice)>,
}

impl Actor {
    pub(super) fn new(
        shared: Arc<Shared>,
        record: NetworkRecord,
        generation: u32,
        book: Book,
        view: seen::Sender<View>,
    ) -> (Self, mpsc::Receiver<(ProcId, Notice)>) {
        let (notices, heard) = mpsc::channel(NOTICES_CAPACITY);
        let uplinks = record.spec.uplinks.iter();
        let uplinks = uplinks.map(|spec| Uplink {
            spec: spec.clone(),
            tap: None,
            trouble: None,
        });
        let actor = Self {
            uplinks: uplinks.collect(),
            shared,
            record,
            view,
            nest: None,
            life: None,
            generation,
            restarts: 0,
            failure: None,
            cards: BTreeMap::new(),
            tenants: Tenants::default(),
            book,
            letters: VecDeque::new(),
            tell_again: None,
            start_again: None,
            write_at: None,
            shows: Vec::new(),
            report_by: None,
            reports: BTreeMap::new(),
            capturing: false,
            notices,
        };
        (actor, heard)
    }

    const fn spec(&self) -> &NetworkSpec {
        &self.record.spec
    }

    fn name(&self) -> &str {
        &self.record.spec.name
    }

    pub(super) async fn run(
        mut self,
        mut patches: mpsc::Receiver<Patch>,
        mut asked: mpsc::Receiver<Ask>,
        mut heard: mpsc::Receiver<(ProcId, Notice)>,
    ) {
        loop {
            let tick = self.life.as_ref().and_then(|life| {
                let next = life.supervisor.next_deadline()?;
                Some(life.began + next)
            });
            tokio::select! {
                patch = patches.recv() => match patch {
                    Some(patch) => self.patch(patch).await,
                    None => return,
                },
                ask = asked.recv() => match ask {
                    Some(Ask::Remove(reply)) => {
                        // Who was plugged in before counts.
                        while let Ok(patch) = patches.try_recv() {
                            self.patch(patch).await;
                        }
                        if self.remove(reply).await {
                            return;
                        }
                    }
                    Some(ask) => self.answer(ask),
                    None => return,
                },
                Some((id, notice)) = heard.recv() => self.notice(id, notice).await,
                () = sleep_until(tick) => self.supervise(Event::Tick).await,
                () = sleep_until(self.tell_again) => self.post(),
                () = sleep_until(self.start_again) => self.start().await,
                () = sleep_until(self.report_by) => self.show(),
                () = sleep_until(self.write_at) => self.write_leases().await,
            }
            self.view.send_replace(View {
                state: self.state(),
                ports: self.cards.len(),
            });
        }
    }

    fn state(&self) -> NetworkState {
        match &self.life {
            Some(life) if life.serves => NetworkState::Serving,
            Some(_) => NetworkState::Starting,
            None if self.failure.is_some() => NetworkState::Lost,
            None => NetworkState::Idle,
        }
    }

    async fn patch(&mut self, patch: Patch) {
        match patch {
            Patch::In(plug) => self.plug_in(plug).await,
            Patch::Out(ticket) => {
                let mut cards = self.cards.iter();
                let Some(id) = cards.find(|(_, card)| card.plug.ticket == ticket) else {
                    return;
                };
                let id = *id.0;
                self.cards.remove(&id);
                self.reports.remove(&id);
                self.tell(ToSwitch::RemovePort(id), Vec::new());
                self.rest().await;
            }
        }
    }

    /// Pulls out cards of which nobody has said so, since too much else was being said.
    fn sweep(&mut self) {
        let gone = |card: &Card| card.plug.is_pulled_out();
        let gone = self.cards.iter().filter(|(_, card)| gone(card));
        let gone: Vec<u16> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            self.cards.remove(&id);
            self.reports.remove(&id);
            self.tell(ToSwitch::RemovePort(id), Vec::new());
        }
    }

    async fn plug_in(&mut self, plug: Plug) {
        self.sweep();
        let same = |card: &Card| (&card.plug.machine, card.plug.card) == (&plug.machine, plug.card);
        let mut cards = self.cards.iter();
        let own = cards.find(|(_, card)| same(card)).map(|(id, _)| *id);
        let mut free = (0..UPLINKS_FROM).filter(|id| !self.cards.contains_key(id));
        let Some(id) = own.or_else(|| free.next()) else {
            let (network, vm) = (self.name(), &plug.machine);
            tracing::error!(network, vm, "the network has no place for another card");
            return;
        };
        let card = Card {
            plug,
            generation: FIRST_GENERATION,
            trouble: None,
        };
        self.cards.insert(id, card);
        self.reports.remove(&id);
        if self.life.as_ref().is_some_and(|life| life.serves) {
            self.set_port(id);
            self.post();
        } else if self.life.is_none() {
            self.start().await;
        }
    }

    /// A network without cards needs no switch.
    async fn rest(&mut self) {
        if !self.cards.is_empty() {
            return;
        }
        self.start_again = None;
        self.failure = None;
        if let Some(life) = &mut self.life
            && !std::mem::replace(&mut life.ends, true)
        {
            life.serves = false;
            self.letters.clear();
            self.supervise(Event::End).await;
        }
    }

    /// Starts a switch, unless there is one.
    async fn start(&mut self) {
        self.start_again = None;
        if self.life.is_some() || self.cards.is_empty() {
            return;
        }
        self.open_uplinks().await;
        let began = Instant::now();
        let id = self.next_id();
        let (launched, rule) = match self.launch(id).await {
            Ok(launched) => launched,
            Err(reason) => return self.failed(reason),
        };
        let mut supervisor = Supervisor::new(END_WITHIN);
        supervisor.add(id, rule, began.elapsed());
        self.failure = None;
        self.life = Some(Life {
            supervisor,
            began,
            launched,
            serves: false,
            ends: false,
            group: None,
        });
    }

    fn failed(&mut self, reason: String) {
        let network = self.name();
        tracing::error!(network, reason, "the network has no switch");
        self.failure = Some(reason);
        self.start_again = Some(Instant::now() + START_AGAIN);
    }

    const fn next_id(&mut self) -> ProcId {
        self.generation = self.generation.saturating_add(1);
        ProcId {
            kind: ProcKind::Switch,
            index: 0,
            generation: self.generation,
        }
    }

    async fn open_uplinks(&mut self) {
        let (name, mtu) = (format!("net-{}", self.name()), self.spec().mtu);
        for (n, uplink) in self.uplinks.iter_mut().enumerate() {
            if uplink.tap.is_some() {
                continue;
            }
            let (whose, source) = (name.clone(), uplink.spec.source());
            let opened = crate::serve::blocking(move || {
                Tap::uplink(&whose, n, source, mtu)
                    .map_err(|error| ApiError::new(Code::Host, error.to_string()))
            });
            match opened.await {
                Ok(tap) => (uplink.tap, uplink.trouble) = (Some(tap), None),
                Err(error) => {
                    tracing::error!(network = name, uplink = n, %error, "no uplink");
                    uplink.trouble = Some(error.message);
                }
            }
        }
    }

    /// Launches a switch and watches it. Blocking parts are done on a thread for them.
    async fn launch(&mut self, id: ProcId) -> Result<(Arc<Launched>, Rule), String> {
        let nest = self.nest.take();
        let (places, users) = (self.shared.places.clone(), self.shared.config.host.users);
        let (name, config) = (self.name().to_owned(), self.spec().switch());
        let done = tokio::task::spawn_blocking(move || {
            let mut nest = match nest {
                Some(nest) => nest,
                None => match Nest::new(&places, users, &name) {
                    Ok(nest) => nest,
                    Err(reason) => return (None, Err(reason)),
                },
            };
            let launched = nest.launch(id, config);
            (Some(nest), launched)
        });
        let (nest, launched) = done.await.map_err(|error| error.to_string())?;
        self.nest = nest;
        let launched = Arc::new(launched?);
        let policy = self.nest.as_ref().and_then(Nest::policy);
        let rule = policy.map(|policy| Rule::of(policy, BIRTH_MAX));
        let rule = rule.ok_or_else(|| "there is no policy for a switch".to_owned())?;
        if let Err(error) = watch(&launched, self.name(), self.notices.clone()) {
            // Nobody would ever know of its end.
            let _already_dead = launched.kill();
            return Err(format!("it cannot be watched: {error}"));
        }
        tracing::info!(network = self.name(), proc = %id, pid = launched.pid, "a switch is started");
        Ok((launched, rule))
    }

    async fn supervise(&mut self, event: Event) {
        let Some(life) = &mut self.life else {
            return;
        };
        let now = life.began.elapsed();
        let mut actions: VecDeque<Action> = life.supervisor.step(event, now).into();
        while let Some(action) = actions.pop_front() {
            let more = self.act(action).await;
            if let (Some(event), Some(life)) = (more, &mut self.life) {
                let now = life.began.elapsed();
                actions.extend(life.supervisor.step(event, now));
            }
        }
    }

    /// Does what was decided. Returns what came of it.
    async fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::AllLocked => {}
            Action::Revive { id, reason, .. } => {
                tracing::warn!(network = self.name(), proc = %id, reason, "a switch is dead; the next one takes its place");
                return Some(self.revive(id).await);
            }
            Action::Revived { id, after, .. } => {
                self.restarts += 1;
                let after_us = after.as_micros();
                tracing::info!(network = self.name(), proc = %id, after_us, "frames pass again");
            }
            Action::Ping { number, .. } => self.tell_now(&ToSwitch::Ping(number)),
            Action::Ask(_) => self.tell_now(&ToSwitch::Shutdown),
            Action::Kill(_) => {
                if let Some(life) = &self.life {
                    // Already dead is as good; its pidfd says so.
                    let _killed = life.launched.kill();
                }
            }
            Action::StartFailed { reason, .. }
            | Action::Degraded { reason, .. }
            | Action::MachineLost { reason, .. } => {
                self.over();
                self.failed(reason);
            }
            Action::AllGone => {
                self.over();
                // A card may have been plugged in while the last one's switch ended.
                if self.cards.is_empty() {
                    self.uplinks.iter_mut().for_each(|uplink| uplink.tap = None);
                    Nest::forget(&directory_of(&self.shared.places.runtime, self.name()));
                } else {
                    // At once, unless it could not be started, or was given up.
                    self.start_again.get_or_insert_with(Instant::now);
                }
            }
        }
        None
    }

    async fn revive(&mut self, id: ProcId) -> Event {
        self.generation = self.generation.max(id.generation);
        self.silence();
        if let Some(life) = &mut self.life {
            life.serves = false;
            life.group = None;
        }
        match self.launch(id).await {
            Ok((launched, _)) => {
                if let Some(life) = &mut self.life {
                    life.launched = launched;
                }
                Event::Launched(id)
            }
            Err(reason) => Event::NotRevived {
                id,
                reason,
                hopeless: false,
            },
        }
    }

    /// There is no switch any more.
    fn over(&mut self) {
        self.silence();
        self.life = None;
    }

    /// What was to be said to a switch that is dead, and what it was doing.
    fn silence(&mut self) {
        self.letters.clear();
        self.tell_again = None;
        self.capturing = false;
        self.reports.clear();
        self.show();
    }

    async fn notice(&mut self, id: ProcId, notice: Notice) {
        let current = self.life.as_ref().map(|life| life.launched.id);
        if current != Some(id) {
            return;
        }
        match notice {
            Notice::Locked(..) => {
                self.supervise(Event::Locked(id)).await;
                self.bring_up();
                self.supervise(Event::Serving(id)).await;
                self.limit().await;
            }
            Notice::Broke(reason) => self.supervise(Event::Broke { id, reason }).await,
            Notice::Died { reason, killed } => {
                self.tell_of_denial();
                self.supervise(Event::Died { id, reason, killed }).await;
            }
            Notice::Switch(message) => self.hear(id, message).await,
            // It is of another kind.
            Notice::Device(_) | Notice::Vcpu(..) => {
                let reason = "says what a switch does not".to_owned();
                self.supervise(Event::Broke { id, reason }).await;
            }
        }
    }

    fn tell_of_denial(&self) {
        let policies = self.shared.places.policies.as_deref();
        let launched = self.life.as_ref().map(|life| &life.launched);
        if let Some(denial) = launched.and_then(|launched| fault::denial(launched, policies)) {
            tracing::error!(network = self.name(), %denial, "denied");
        }
    }

    async fn hear(&mut self, id: ProcId, message: FromSwitch) {
        match message {
            FromSwitch::Pong(number) => self.supervise(Event::Pong { id, number }).await,
            FromSwitch::Leased(leases) if leases.len() > LEASES_MAX => {
                let reason = format!("told {} leases at a time", leases.len());
                self.supervise(Event::Broke { id, reason }).await;
            }
            FromSwitch::Ports(ports) if ports.len() > PORTS_MAX => {
                let reason = format!("told of {} ports", ports.len());
                self.supervise(Event::Broke { id, reason }).await;
            }
            FromSwitch::Leased(leases) => {
                let cards: BTreeSet<_> = self.cards.values().map(|card| card.plug.mac).collect();
                if self.book.hear(&leases, |mac| cards.contains(mac)) {
                    self.write_at.get_or_insert(Instant::now() + WRITE_AFTER);
                }
            }
            FromSwitch::Refused {
                id,
                generation,
                reason,
            }
            | FromSwitch::Broke {
                id,
                generation,
                reason,
            } => self.trouble(id, generation, &reason),
            FromSwitch::Ports(ports) => {
                self.reports = ports.into_iter().map(|port| (port.id, port)).collect();
                self.show();
            }
            FromSwitch::Captured { missed } => {
                if missed > 0 && self.capturing {
                    tracing::warn!(
                        network = self.name(),
                        missed,
                        "frames are missing in a capture"
                    );
                }
                self.capturing = false;
            }
        }
    }

    fn trouble(&mut self, id: u16, generation: u32, reason: &str) {
        let card = self.cards.get_mut(&id);
        let card = card.filter(|card| card.generation == generation);
        let uplink = id.checked_sub(UPLINKS_FROM);
        let uplink = uplink.and_then(|n| self.uplinks.get_mut(usize::from(n)));
        let trouble = match (card, uplink) {
            (Some(card), _) => &mut card.trouble,
            (None, Some(uplink)) => &mut uplink.trouble,
            (None, None) => return,
        };
        // What is known already is not said again.
        if trouble.is_none() {
            let reason = fault::said(reason);
            tracing::warn!(
                network = self.record.spec.name,
                port = id,
                reason,
                "a port carries nothing"
            );
            *trouble = Some(reason);
        }
    }

    /// A switch that is locked is told everything, whether it is the first or follows another.
    fn bring_up(&mut self) {
        let Some(life) = &mut self.life else {
            return;
        };
        if life.ends {
            return;
        }
        life.serves = true;
        self.letters.clear();
        for leases in self.book.terms() {
            self.tell(ToSwitch::Restore(leases), Vec::new());
        }
        for n in 0..self.uplinks.len() {
            self.set_uplink(n);
        }
        let cards: Vec<u16> = self.cards.keys().copied().collect();
        for id in cards {
            self.set_port(id);
        }
        self.post();
    }

    /// Tells the switch of a card, in a generation of its port that no switch has had.
    fn set_port(&mut self, id: u16) {
        let spec = self.record.spec.clone();
        let tenant = |card: &Card| card.plug.card_spec.tenant.clone();
        let number = self.cards.get(&id).and_then(tenant).map(|name| {
            let present: Vec<_> = self.cards.values().filter_map(tenant).collect();
            self.tenants
                .number(&name, present.iter().map(String::as_str))
        });
        let Some(card) = self.cards.get_mut(&id) else {
            return;
        };
        card.trouble = None;
        card.generation = another_generation(card.generation);
        // A switch that was before may have filled them so that they would never ring again.
        let (_taken, _taken_too) = (card.plug.port.kick.take(), card.plug.port.call.take());
        let (plug, generation) = (&card.plug, card.generation);
        let made = plug.port.try_clone();
        let stamped = stamp(plug.port.memory.as_fd(), generation);
        let message = ToSwitch::SetPort {
            id,
            generation,
            terms: spec.machine(&plug.machine, plug.mac, &plug.card_spec, number),
        };
        match (made, stamped) {
            (Ok(port), Ok(())) => {
                let fds = vec![port.memory, port.kick.into(), port.call.into()];
                self.tell(message, fds);
            }
            (Err(error), _) => card.trouble = Some(error.to_string()),
            (_, Err(errno)) => card.trouble = Some(errno.to_string()),
        }
    }

    fn set_uplink(&mut self, n: usize) {
        let terms = self.spec().uplink(n);
        let Some(uplink) = self.uplinks.get_mut(n) else {
            return;
        };
        let queue = uplink.tap.as_ref().and_then(|tap| tap.queues.first());
        let Some(queue) = queue else {
            return;
        };
        match queue.try_clone() {
            Ok(queue) => {
                let id = UPLINKS_FROM + u16::try_from(n).unwrap_or(0);
                let generation = self.generation;
                let message = ToSwitch::SetUplink {
                    id,
                    generation,
                    terms,
                };
                self.tell(message, vec![queue]);
            }
            Err(error) => uplink.trouble = Some(error.to_string()),
        }
    }

    fn tell(&mut self, message: ToSwitch, fds: Vec<OwnedFd>) {
        if self.life.as_ref().is_some_and(|life| life.serves) {
            // A switch that does not read lets no more pile up than there are ports.
            self.letters
                .retain(|old| !makes_needless(&message, &old.message));
            self.letters.push_back(Letter { message, fds });
        }
    }

    fn tell_now(&self, message: &ToSwitch) {
        if let Some(life) = &self.life {
            // One that does not read is found out by its heartbeat, one that is gone by its pidfd.
            let _sent = life.launched.control.send(message, &[]);
        }
    }

    /// Sends what there is to say, as much as the switch takes.
    fn post(&mut self) {
        self.tell_again = None;
        let Some(life) = &self.life else {
            return;
        };
        while let Some(Letter { message, fds }) = self.letters.front() {
            let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
            match life.launched.control.send(message, &fds) {
                Err(ChannelError::Full) => {
                    self.tell_again = Some(Instant::now() + TELL_AGAIN);
                    return;
                }
                Ok(()) => {
                    self.letters.pop_front();
                }
                // Its death is told by its pidfd; what cannot be said at all is left out.
                Err(error) => {
                    let unsaid = self.letters.pop_front();
                    if let Some(ToSwitch::SetPort { id, .. }) = unsaid.map(|l| l.message)
                        && let Some(card) = self.cards.get_mut(&id)
                    {
                        card.trouble = Some(error.to_string());
                    }
                }
            }
        }
    }

    async fn limit(&mut self) {
        let (Some(nest), Some(life)) = (self.nest.take(), &mut self.life) else {
            return;
        };
        let launched = Arc::clone(&life.launched);
        let done = tokio::task::spawn_blocking(move || {
            let group = nest.limit(&launched);
            (nest, group)
        });
        if let Ok((nest, group)) = done.await {
            self.nest = Some(nest);
            match (group, &mut self.life) {
                (Ok(group), Some(life)) => life.group = group,
                (Err(error), _) => {
                    tracing::warn!(network = self.name(), %error, "no control group: only rlimits apply");
                }
                (Ok(_), None) => {}
            }
        }
    }

    async fn write_leases(&mut self) {
        self.write_at = None;
        let Some((directory, leases)) = self.book.news() else {
            return;
        };
        let written = tokio::task::spawn_blocking(move || book::write(&directory, &leases)).await;
        if let Ok(Err(error)) = written {
            tracing::warn!(network = self.name(), %error, "leases are not written");
            self.book.keep_news();
            self.write_at = Some(Instant::now() + WRITE_AGAIN);
        }
    }

    /// A caller that has gone away does not need its answer.
    fn answer(&mut self, ask: Ask) {
        match ask {
            Ask::Show(reply) => {
                let serves = self.life.as_ref().is_some_and(|life| life.serves);
                if !serves || self.shows.len() >= REPORTS_MAX {
                    let _answered = reply.send(self.details());
                    return;
                }
                self.shows.push(reply);
                if self.report_by.is_none() {
                    self.report_by = Some(Instant::now() + REPORT_WITHIN);
                    self.tell(ToSwitch::Report, Vec::new());
                    self.post();
                }
            }
            Ask::Capture(wish, pipe, reply) => {
                let _answered = reply.send(self.capture(wish, pipe));
            }
            // Answered by the loop, which it ends.
            Ask::Remove(_) => {}
        }
    }

    fn capture(&mut self, wish: CaptureWish, pipe: OwnedFd) -> Result<(), ApiError> {
        let conflict = |line: String| Err(ApiError::new(Code::Conflict, line));
        if !self.life.as_ref().is_some_and(|life| life.serves) {
            let word = self.state().word();
            return conflict(format!("{} is {word}: nothing passes there", self.name()));
        }
        if self.capturing {
            return conflict(format!("somebody captures {} already", self.name()));
        }
        let known = |id: u16| {
            let uplink = id.checked_sub(UPLINKS_FROM).map(usize::from);
            self.cards.contains_key(&id) || uplink.is_some_and(|n| n < self.uplinks.len())
        };
        if let Some(port) = wish.port.filter(|port| !known(*port)) {
            let line = format!("{} has no port {port}", self.name());
            return Err(ApiError::new(Code::NotFound, line));
        }
        let message = ToSwitch::Capture {
            port: wish.port,
            snap_bytes: wish.snap_bytes,
            file_bytes: wish.file_bytes,
            within_ms: u64::try_from(wish.within.as_millis()).unwrap_or(u64::MAX),
        };
        self.capturing = true;
        self.tell(message, vec![pipe]);
        self.post();
        Ok(())
    }

    /// Answers everybody who waits, with or without a report.
    fn show(&mut self) {
        self.report_by = None;
        if self.shows.is_empty() {
            return;
        }
        let details = self.details();
        for reply in self.shows.drain(..) {
            let _answered = reply.send(details.clone());
        }
    }

    /// Returns whether it is removed.
    async fn remove(&mut self, reply: Reply<()>) -> bool {
        self.sweep();
        if !self.cards.is_empty() {
            let machines: Vec<_> = self
                .cards
                .values()
                .map(|c| c.plug.machine.as_str())
                .collect();
            let line = format!("{} is used by {}", self.name(), machines.join(", "));
            let _answered = reply.send(Err(ApiError::new(Code::Conflict, line)));
            return false;
        }
        if let Some(life) = &self.life {
            // It carries nothing; its watcher reaps it.
            let _killed = life.launched.kill();
        }
        self.over();
        let directory = directory_of(&self.shared.places.runtime, self.name());
        let state = super::state_of(&self.shared.places, self.name());
        let cleared = tokio::task::spawn_blocking(move || {
            for directory in [directory, state] {
                let _gone_or_not = std::fs::remove_dir_all(directory);
            }
        });
        let _cleared = cleared.await;
        let _answered = reply.send(Ok(()));
        true
    }

    pub(super) fn summary(record: &NetworkRecord, view: View) -> NetworkSummary {
        let subnet = record.spec.subnet.map(|subnet| {
            let mask = u32::MAX.checked_shl(32 - u32::from(subnet.prefix));
            let network = u32::from(subnet.gateway) & mask.unwrap_or(0);
            format!("{}/{}", std::net::Ipv4Addr::from(network), subnet.prefix)
        });
        NetworkSummary {
            schema_version: SCHEMA_VERSION,
            name: record.spec.name.clone(),
            state: view.state,
            subnet,
            ports: view.ports,
            created_at: rfc3339(record.created_at_ms),
        }
    }

    fn details(&self) -> NetworkDetails {
        let view = View {
            state: self.state(),
            ports: self.cards.len(),
        };
        let leases: Vec<_> = self.book.current().collect();
        let counters = |id: u16| self.reports.get(&id).map(counters);
        let card = |(id, card): (&u16, &Card)| NetworkPort {
            port: *id,
            machine: card.plug.machine.clone(),
            card: card.plug.card,
            mac: show_mac(card.plug.mac),
            tenant: card.plug.card_spec.tenant.clone(),
            addresses: card.plug.card_spec.addresses.clone(),
            vlan: card.plug.card_spec.vlan.access(),
            trunk: card.plug.card_spec.vlan.trunk().cloned(),
            address: leases
                .iter()
                .find(|lease| lease.mac == card.plug.mac)
                .map(|lease| lease.address),
            connected: self.reports.get(id).is_some_and(|report| report.is_met),
            trouble: card.trouble.clone(),
            counters: counters(*id),
        };
        let uplink = |(id, uplink): (u16, &Uplink)| NetworkUplink {
            port: id,
            interface: match &uplink.spec {
                UplinkSpec::Tap(name) | UplinkSpec::Bridge(name) => name.clone(),
            },
            trouble: uplink.trouble.clone(),
            counters: counters(id),
        };
        let lease = |lease: &book::Kept| NetworkLease {
            mac: show_mac(lease.mac),
            address: lease.address,
            until: rfc3339(lease.until_ms),
        };
        NetworkDetails {
            summary: Self::summary(&self.record, view),
            spec: self.spec().clone(),
            pid: self.life.as_ref().map(|life| life.launched.pid),
            users: self.life.as_ref().and_then(|life| life.launched.users),
            generation: self.generation,
            restarts: self.restarts,
            failure: self.failure.clone(),
            cards: self.cards.iter().map(card).collect(),
            uplinks: (UPLINKS_FROM..).zip(&self.uplinks).map(uplink).collect(),
            leases: leases.iter().map(lease).collect(),
            capturing: self.capturing,
        }
    }
}

/// Whether what was to be said means nothing any more once `new` is said.
fn makes_needless(new: &ToSwitch, old: &ToSwitch) -> bool {
    let port = |message: &ToSwitch| match message {
        ToSwitch::SetPort { id, .. } | ToSwitch::RemovePort(id) => Some(*id),
        _ => None,
    };
    match (port(new), port(old)) {
        (Some(new), Some(old)) => new == old,
        _ => matches!(
            (new, old),
            (ToSwitch::Report, ToSwitch::Report)
                | (ToSwitch::Capture { .. }, ToSwitch::Capture { .. })
        ),
    }
}

/// A generation that no switch could foretell: one that did could write in a port what its successor would believe.
fn another_generation(last: u32) -> u32 {
    let mut bytes = [0; 4];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    let next = match read {
        Ok(()) => u32::from_le_bytes(bytes),
        Err(_) => last.wrapping_add(1),
    };
    match next {
        next if next <= FIRST_GENERATION || next == last => last.wrapping_add(2).max(2),
        next => next,
    }
}

fn counters(report: &PortReport) -> NetworkCounters {
    let causes = Cause::ALL.iter().zip(report.dropped);
    let dropped = causes.filter(|(_, count)| *count > 0);
    NetworkCounters {
        frames_in: report.frames_in,
        bytes_in: report.bytes_in,
        frames_out: report.frames_out,
        bytes_out: report.bytes_out,
        dropped: dropped
            .map(|(cause, count)| (cause.name().to_owned(), count))
            .collect(),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
