//! `bulkhead-switch`: the process of one virtual network.
//!
//! ```text
//!   loop: passes over the ports ([`Wires`]) ── leases told ── frames seen by others ── capture written
//!           └ nothing to do: sleep until a doorbell, an interface, the broker or a deadline
//! ```
//!
//! It is born with nothing. Every port comes from the broker while it serves, with its memory and doorbells, or with
//! a queue of an interface. A broker that is gone changes nothing. What a port does wrong costs that port; what the
//! broker says wrong is refused.

use crate::capture::{Capture, CaptureSettings};
use crate::leases::Lease;
use crate::settings::{NetworkSettings, PortSettings, Role};
use crate::switch::{BYTES_PER_TURN, FRAMES_PER_TURN, PortId, Switch};
use crate::terms;
use crate::wires::Wires;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::port::{Port, PortEnd};
use bulkhead_ipc::protocol::birth::KindConfig;
use bulkhead_ipc::protocol::switch::{
    FromSwitch, LEASES_MAX, LeaseTerms, PORT_FDS, PortReport, PortTerms, SwitchConfig, ToSwitch,
};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::adoption::Adoption;
use bulkhead_runtime::control::Control;
use bulkhead_runtime::wait::{SocketNews, Waiter, Watcher, Woken};
use bulkhead_runtime::{Newborn, Stillbirth, live_out};
use nix::errno::Errno;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

const TOKEN_CONTROL: u8 = 0;
/// What the pipe of a capture is called; ports are called by their numbers.
const CAPTURE: u64 = 1 << 32;
/// Messages that are looked at before the ports have their turn again.
const MESSAGES_PER_TURN: usize = 16;
/// Busy passes after which the other descriptors are looked at without sleeping.
const PASSES_BETWEEN_LOOKS: u32 = 32;
/// Whole turns after which that is done, so that who has slept is heard soon in a flood. Not after every
/// one: who sends much sends more when what it has sent meanwhile is taken in one go.
const TURNS_BETWEEN_LOOKS: u8 = 8;
/// Exit status when the kernel does not let it wait.
const EXIT_FAULT: i32 = 71;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> ExitCode {
    live_out(Newborn::receive(ProcKind::Switch), bear)
}

/// Runs a process that has received its birth message.
#[must_use]
pub fn live(newborn: Newborn) -> ExitCode {
    live_out(Ok(newborn), bear)
}

fn bear(mut newborn: Newborn) -> Result<i32, Stillbirth> {
    let prepared = prepare(&newborn);
    let (switch, waiter) = match prepared {
        Ok(prepared) => prepared,
        Err(cause) => newborn.fail(&cause),
    };
    let adoption = newborn.take_adoption();
    let (control, id) = newborn.lock()?;
    tracing::debug!(%id, "locked");
    let mut server = Server::of(switch, waiter, control, adoption);
    loop {
        if let Some(status) = server.turn(None) {
            return Ok(status);
        }
    }
}

fn prepare(newborn: &Newborn) -> Result<(Switch, Waiter), Stillbirth> {
    let KindConfig::Switch(config) = &newborn.config else {
        return Err(Stillbirth::setup("no network"));
    };
    let switch = Switch::new(NetworkSettings::from(config)).map_err(Stillbirth::setup)?;
    let waiter = Waiter::new().map_err(Stillbirth::setup)?;
    newborn.watch_brokers(&waiter, TOKEN_CONTROL)?;
    Ok((switch, waiter))
}

/// A port as the process sees it.
#[derive(Debug)]
struct Link {
    generation: u32,
    wakes: Wakes,
}

/// What tells that there is something new.
#[derive(Debug)]
enum Wakes {
    Bell(Doorbell),
    Tap(Arc<OwnedFd>),
}

/// Where a capture goes.
#[derive(Debug)]
struct Sink {
    pipe: OwnedFd,
    pending: Vec<u8>,
    written: usize,
    /// Nothing follows what is pending.
    finished: bool,
}

/// What the broker hears.
#[derive(Debug)]
struct Told {
    control: Control,
    /// Whether it has missed leases.
    behind: bool,
    /// Ports of which it was said that they are broken.
    broken: BTreeSet<(PortId, u32)>,
}

impl Told {
    /// Returns whether the message is on its way. A broker that does not read misses it.
    fn say(&self, message: &FromSwitch) -> bool {
        self.control.channel().send(message, &[]).is_ok()
    }

    fn leases(&mut self, switch: &mut Switch, now: Instant) {
        let mut news = switch.take_lease_news(now);
        if news.is_empty() {
            return;
        }
        if self.behind {
            news = held(switch, now);
        }
        let news: Vec<_> = news.iter().map(LeaseTerms::from).collect();
        let mut parts = news.chunks(LEASES_MAX);
        self.behind = !parts.all(|part| self.say(&FromSwitch::Leased(part.to_vec())));
    }
}

/// The leases that hold.
fn held(switch: &Switch, now: Instant) -> Vec<Lease> {
    let mut leases = switch.leases(now);
    leases.retain(|lease| !lease.left.is_zero());
    leases
}

/// A switch that serves.
#[derive(Debug)]
pub struct Server {
    switch: Switch,
    wires: Wires,
    waiter: Waiter,
    watcher: Watcher,
    told: Told,
    adoption: Option<Adoption>,
    links: BTreeMap<PortId, Link>,
    sink: Option<Sink>,
    /// Since the last look at the other descriptors.
    passes: u32,
    frames: usize,
    /// Of the frames ([`Passed::cost`](crate::Passed::cost)).
    cost: i64,
}

impl Server {
    /// Of a process that was not born and that no later broker can find: its broker has the other end of
    /// `channel`.
    ///
    /// # Errors
    /// Why it cannot be.
    pub fn unborn(config: &SwitchConfig, channel: Channel) -> Result<Self, String> {
        let switch = Switch::new(NetworkSettings::from(config)).map_err(|e| e.to_string())?;
        let waiter = Waiter::new().map_err(|errno| errno.to_string())?;
        let watched = waiter.watch(&channel, TOKEN_CONTROL);
        watched.map_err(|errno| errno.to_string())?;
        Ok(Self::of(switch, waiter, channel.into(), None))
    }

    fn of(switch: Switch, waiter: Waiter, control: Control, adoption: Option<Adoption>) -> Self {
        Self {
            switch,
            wires: Wires::default(),
            watcher: waiter.watcher(),
            waiter,
            told: Told {
                control,
                behind: false,
                broken: BTreeSet::new(),
            },
            adoption,
            links: BTreeMap::new(),
            sink: None,
            passes: 0,
            frames: 0,
            cost: 0,
        }
    }

    /// Passes once over the ports and, if there is nothing to do or it is time to look, sleeps until there is something,
    /// for at most `longest` if given. Returns the exit status when it is told to end, or cannot go on.
    #[must_use]
    pub fn turn(&mut self, longest: Option<Duration>) -> Option<i32> {
        let now = Instant::now();
        let told = &mut self.told;
        let tell = |switch: &mut Switch| told.leases(switch, now);
        let (frames, cost) = self.wires.pass_and(&mut self.switch, now, tell);
        self.tell_faults();
        self.write_capture(now);
        let within = self.patience(now);
        self.passes += 1;
        self.frames += frames;
        self.cost = self.cost.saturating_add(cost);
        let busy = within == Some(Duration::ZERO);
        let is_time = self.passes >= PASSES_BETWEEN_LOOKS
            || self.cost >= i64::from(TURNS_BETWEEN_LOOKS) * BYTES_PER_TURN
            || self.frames >= usize::from(TURNS_BETWEEN_LOOKS) * FRAMES_PER_TURN;
        if busy && !is_time {
            return None;
        }
        (self.passes, self.frames, self.cost) = (0, 0, 0);
        match self.waiter.sleep(within.into_iter().chain(longest).min()) {
            Ok(woken) => (!self.attend(&woken)).then_some(0),
            Err(errno) => {
                tracing::error!(%errno, "the switch cannot wait");
                Some(EXIT_FAULT)
            }
        }
    }

    /// How long there is nothing to do unless somebody rings; `None` is for ever.
    fn patience(&mut self, now: Instant) -> Option<Duration> {
        let ports = self.wires.sleep(now);
        let captures = self.sink.as_ref().is_some_and(|sink| !sink.finished);
        let capture = self.switch.capture().filter(|_| captures);
        let capture = capture.map(|c| c.until().saturating_duration_since(now));
        ports.into_iter().chain(capture).min()
    }

    /// Returns whether to go on.
    fn attend(&mut self, woken: &Woken) -> bool {
        for news in &woken.sockets {
            self.wake(*news);
        }
        if woken.by(TOKEN_CONTROL) {
            loop {
                match self.listen() {
                    Heard::Everything => break,
                    Heard::Some => {}
                    Heard::Shutdown => return false,
                }
            }
        }
        true
    }

    fn wake(&mut self, news: SocketNews) {
        match PortId::try_from(news.number) {
            Ok(id) => self.wires.wake(id),
            // Nobody reads any more.
            Err(_) if news.failed || news.hung_up => self.end_capture(),
            // There is room in the pipe: looked at in each turn.
            Err(_) => {}
        }
    }

    fn tell_faults(&mut self) {
        for (id, fault) in self.wires.faults() {
            let generation = self.links.get(&id).map_or(0, |link| link.generation);
            if self.told.broken.insert((id, generation)) {
                tracing::warn!(port = id, %fault, "the other end of a port breaks the protocol");
                let reason = fault.to_string();
                self.told.say(&FromSwitch::Broke {
                    id,
                    generation,
                    reason,
                });
            }
        }
    }

    /// Reads what the broker has sent. What is no message is dropped.
    fn listen(&mut self) -> Heard {
        if let Some(adoption) = &self.adoption {
            adoption.answer();
        }
        for _ in 0..MESSAGES_PER_TURN {
            match self.told.control.channel().try_recv::<ToSwitch>() {
                Ok(None) | Err(ChannelError::Closed) => return Heard::Everything,
                Ok(Some((ToSwitch::Shutdown, _))) => return Heard::Shutdown,
                Ok(Some((message, fds))) => self.hear(message, fds),
                Err(error) => tracing::error!(%error, "the broker sent what is no message"),
            }
        }
        Heard::Some
    }

    fn hear(&mut self, message: ToSwitch, fds: Vec<OwnedFd>) {
        let now = Instant::now();
        match message {
            // Heard by the caller.
            ToSwitch::Shutdown => {}
            ToSwitch::Ping(number) => {
                self.told.say(&FromSwitch::Pong(number));
            }
            ToSwitch::Restore(leases) => {
                let leases: Vec<Lease> = leases.iter().take(LEASES_MAX).map(Lease::from).collect();
                self.switch.restore_leases(&leases, now);
            }
            ToSwitch::SetPort {
                id,
                generation,
                terms,
            } => {
                let set = self.set_port(id, generation, &terms, fds, now);
                self.refuse_unless(set, id, generation);
            }
            ToSwitch::SetUplink {
                id,
                generation,
                terms,
            } => {
                let set = self.set_uplink(id, generation, &terms, fds, now);
                self.refuse_unless(set, id, generation);
            }
            ToSwitch::RemovePort(id) => self.remove(id),
            ToSwitch::Capture {
                port,
                snap_bytes,
                file_bytes,
                within_ms,
            } => {
                let settings = CaptureSettings {
                    port,
                    snap_bytes,
                    file_bytes,
                    within: Duration::from_millis(within_ms.min(CAPTURE_MS_MAX)),
                };
                self.capture(settings, fds, now);
            }
            ToSwitch::EndCapture => self.end_capture(),
            ToSwitch::Report => self.report(now),
        }
    }

    fn refuse_unless(&mut self, set: Result<(), String>, id: PortId, generation: u32) {
        if let Err(reason) = set {
            self.remove(id);
            self.told.say(&FromSwitch::Refused {
                id,
                generation,
                reason,
            });
        }
    }

    fn set_port(
        &mut self,
        id: PortId,
        generation: u32,
        terms: &PortTerms,
        fds: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<(), String> {
        let fds = <[OwnedFd; PORT_FDS]>::try_from(fds);
        let [memory, own, other] = fds.map_err(|fds| expected(PORT_FDS, fds.len()))?;
        let port = Port::map(memory, PortEnd::Switch, generation).map_err(|e| e.to_string())?;
        let own = Doorbell::from(own);
        self.admit(id, terms::port(terms, Role::Machine), &own, now)?;
        let wakes = Wakes::Bell(own);
        self.links.insert(id, Link { generation, wakes });
        self.wires.attach(id, port, Doorbell::from(other));
        Ok(())
    }

    fn set_uplink(
        &mut self,
        id: PortId,
        generation: u32,
        terms: &PortTerms,
        fds: Vec<OwnedFd>,
        now: Instant,
    ) -> Result<(), String> {
        let [tap] = <[OwnedFd; 1]>::try_from(fds).map_err(|fds| expected(1, fds.len()))?;
        self.admit(id, terms::port(terms, Role::Uplink), &tap, now)?;
        let tap = Arc::new(tap);
        let wakes = Wakes::Tap(Arc::clone(&tap));
        self.links.insert(id, Link { generation, wakes });
        self.wires.attach_tap(id, tap);
        Ok(())
    }

    /// Makes a port known, in the place of one of the same number, and has what wakes it watched.
    fn admit(
        &mut self,
        id: PortId,
        settings: PortSettings,
        waker: impl AsFd,
        now: Instant,
    ) -> Result<(), String> {
        self.forget(id);
        let set = self.switch.set_port(id, settings, now);
        set.map_err(|e| e.to_string())?;
        let watched = self.watcher.watch_input(waker, id.into());
        watched.map_err(|errno| errno.to_string())
    }

    fn remove(&mut self, id: PortId) {
        self.forget(id);
        self.switch.detach(id);
    }

    /// Lets go of what carries a port. Others have its descriptors as well, so it is not forgotten by itself.
    fn forget(&mut self, id: PortId) {
        self.wires.detach(id);
        self.told.broken.retain(|(port, _)| *port != id);
        let Some(link) = self.links.remove(&id) else {
            return;
        };
        let forgotten = match &link.wakes {
            Wakes::Bell(bell) => self.watcher.forget(bell),
            Wakes::Tap(tap) => self.watcher.forget(tap.as_ref()),
        };
        if let Err(errno) = forgotten {
            tracing::warn!(port = id, %errno, "a port stays watched");
        }
    }

    fn report(&mut self, now: Instant) {
        // A broker that asks may be one that has missed something.
        let leases: Vec<_> = held(&self.switch, now)
            .iter()
            .map(LeaseTerms::from)
            .collect();
        for part in leases.chunks(LEASES_MAX) {
            self.told.say(&FromSwitch::Leased(part.to_vec()));
        }
        let mut ports = Vec::with_capacity(self.links.len());
        for (id, counters) in self.switch.counters() {
            ports.push(PortReport {
                id,
                generation: self.links.get(&id).map_or(0, |link| link.generation),
                is_met: self.wires.is_met(id),
                frames_in: counters.frames_in,
                bytes_in: counters.bytes_in,
                frames_out: counters.frames_out,
                bytes_out: counters.bytes_out,
                dropped: counters.dropped,
            });
        }
        self.told.say(&FromSwitch::Ports(ports));
    }

    fn capture(&mut self, settings: CaptureSettings, fds: Vec<OwnedFd>, now: Instant) {
        self.end_capture();
        let Ok([pipe]) = <[OwnedFd; 1]>::try_from(fds) else {
            return;
        };
        if let Err(errno) = self.watcher.watch(&pipe, CAPTURE) {
            tracing::warn!(%errno, "a capture has nowhere to go");
            return;
        }
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let capture = Capture::new(settings, now, wall.unwrap_or_default());
        self.switch.set_capture(Some(capture));
        self.sink = Some(Sink {
            pipe,
            pending: Vec::new(),
            written: 0,
            finished: false,
        });
    }

    /// Writes as much of a capture as there is room for.
    fn write_capture(&mut self, now: Instant) {
        let (Some(sink), Some(capture)) = (&mut self.sink, self.switch.capture()) else {
            return;
        };
        loop {
            if sink.written == sink.pending.len() {
                sink.written = 0;
                sink.pending = match sink.finished {
                    true => Vec::new(),
                    false if capture.is_over(now) => {
                        sink.finished = true;
                        capture.finish()
                    }
                    false => capture.take(),
                };
                if sink.pending.is_empty() {
                    break;
                }
            }
            let rest = sink.pending.get(sink.written..).unwrap_or_default();
            match nix::unistd::write(&sink.pipe, rest) {
                Ok(n) => sink.written += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => {
                    sink.finished = true;
                    break;
                }
            }
        }
        if sink.finished {
            self.end_capture();
        }
    }

    /// Ends the capture that goes on, whether or not all of it was written.
    fn end_capture(&mut self) {
        let Some(mut sink) = self.sink.take() else {
            return;
        };
        if let Some(mut capture) = self.switch.set_capture(None) {
            if !sink.finished && sink.written == sink.pending.len() {
                sink.pending = capture.finish();
                // What has no room now is cut: whoever reads was told the end by the end.
                let _written_or_not = nix::unistd::write(&sink.pipe, &sink.pending);
            }
            let missed = capture.missed();
            self.told.say(&FromSwitch::Captured { missed });
        }
        let _closed_anyway = self.watcher.forget(&sink.pipe);
    }
}

/// Longest capture in milliseconds: a day.
const CAPTURE_MS_MAX: u64 = 24 * 3600 * 1000;

/// What a turn at the control channel found.
enum Heard {
    Everything,
    Some,
    Shutdown,
}

fn expected(count: usize, got: usize) -> String {
    format!("came with {got} descriptors, expected {count}")
}

#[cfg(test)]
#[path = "process_tests.rs"]
mod tests;
