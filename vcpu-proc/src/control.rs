//! The control thread: what the broker asks, what the legacy process requests, what vCPUs report.
//!
//! It is the only one that talks to the broker and the only one that directs and kicks vCPUs. It
//! sleeps in `ppoll`; it never waits for the broker or a device without a deadline, and what it
//! decides is decided in [`Lifecycle`].

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::legacy_page::RESET_REQUEST;
use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};
use bulkhead_runtime::adoption::Adoption;

use crate::crash::CrashScene;
use crate::ear::Ear;
use crate::group::{Directive, Ending, Group};
use crate::irq::Lines;
use crate::legacy_client::LegacyClient;
use crate::lifecycle::{Action, Event, Lifecycle};
use crate::outbox::Outbox;
use crate::ports::Ports;
use crate::slot_news::News;
use crate::virtio::VirtioBus;
use crate::wait;

/// How often vCPUs that are waited for are kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(10);
/// How long the broker may take to let go of a VM whose end it was told, and how often it is told again.
const UNHEARD: Duration = Duration::from_secs(1);
const TOLD_AGAIN_MAX: u32 = 5;
/// Messages of the broker that are heard before the others have their turn.
const MESSAGES_PER_TURN: usize = 16;

/// What the control thread holds.
#[derive(Debug)]
pub struct Control<'a> {
    /// From the broker.
    pub channel: &'a Channel,
    /// To the broker.
    pub outbox: Outbox<'a>,
    /// What is kept for later brokers.
    pub adoption: Option<Adoption>,
    /// The vCPUs as one.
    pub group: Arc<Group>,
    /// The legacy process.
    pub legacy: Arc<LegacyClient>,
    /// The device processes.
    pub virtio: Arc<VirtioBus>,
    /// Ports.
    pub ports: Arc<Ports>,
    /// Interrupt lines.
    pub lines: Lines,
    /// What a crash report is made from.
    pub scene: CrashScene,
    /// What the broker has been told of device processes.
    pub news: News,
    /// How often the legacy process is listened to.
    pub ear: Ear,
}

/// When the end of the VM is told again.
#[derive(Debug, Default)]
struct End {
    due: Option<Instant>,
    told: u32,
}

impl End {
    /// How long until it is, if the VM `has_ended`.
    fn next(&mut self, has_ended: bool, now: Instant) -> Option<Duration> {
        if !has_ended || self.told >= TOLD_AGAIN_MAX {
            return None;
        }
        let due = self.due.get_or_insert(now + UNHEARD);
        Some(due.saturating_duration_since(now))
    }

    /// Whether it is to be told again now.
    fn is_unheard(&mut self, now: Instant) -> bool {
        let is_due = self.due.is_some_and(|due| due <= now);
        if is_due {
            self.due = None;
            self.told += 1;
        }
        is_due
    }
}

impl Control<'_> {
    /// Serves while the guest runs, and returns when the process is to end.
    pub fn serve(&mut self) {
        let mut life = Lifecycle::default();
        let mut end = End::default();
        loop {
            let again = life.is_waiting().then_some(KICK_AGAIN);
            let deaf = self.ear.closed(Instant::now);
            let unheard = end.next(life.has_ended(), Instant::now());
            let again = again.into_iter().chain(deaf).chain(unheard).min();
            let wake = self.group.wake().as_fd();
            let interrupt = match deaf {
                Some(_) => wake,
                None => self.legacy.interrupt().as_fd(),
            };
            let [broker, new_broker, interrupts, wake, faults] = wait::any_ready(
                [
                    (self.channel.as_fd(), self.outbox.is_waiting()),
                    // There is always one in a process that was born.
                    (self.adoption.as_ref().map_or(wake, AsFd::as_fd), false),
                    (interrupt, false),
                    (wake, false),
                    (wait::lend(self.virtio.fault_bell()), false),
                ],
                again,
            );
            if new_broker && let Some(adoption) = &self.adoption {
                adoption.answer();
            }
            if wake {
                self.group.wake().take();
            }
            if faults {
                self.pass_faults_on();
            }
            if let Some(fault) = self.legacy.take_fault() {
                let reason = fault.to_owned();
                self.outbox.tell(FromVcpu::LegacyFault { reason });
            }
            let mut events = self.look_at_vcpus();
            if end.is_unheard(Instant::now()) {
                events.push(Event::Unheard);
            }
            if interrupts && deaf.is_none() {
                events.extend(self.take_requests());
            }
            if broker {
                self.outbox.flush();
                events.extend(self.listen());
            }
            let mut events = VecDeque::from(events);
            while let Some(event) = events.pop_front() {
                for action in life.step(event) {
                    if action == Action::Exit {
                        return;
                    }
                    events.extend(self.act(action));
                }
            }
            if life.is_waiting() {
                self.group.kick();
            }
        }
    }

    /// Levels rather than edges: the lifecycle ignores what it knows already.
    fn look_at_vcpus(&self) -> Vec<Event> {
        let mut events = Vec::new();
        events.extend(self.group.ending().map(Event::GuestEnded));
        if self.group.all_hold() {
            events.push(Event::AllHold);
        }
        if self.group.all_stopped() {
            events.push(Event::AllStopped);
        }
        events
    }

    fn take_requests(&mut self) -> Option<Event> {
        self.legacy.interrupt().take();
        self.ear.heard(self.legacy.accesses(), Instant::now);
        if let Some(generation) = self.legacy.take_service() {
            self.outbox.tell(FromVcpu::LegacyServing { generation });
        }
        let requests = self.legacy.take_requests();
        self.raise(requests)
    }

    fn raise(&self, requests: u32) -> Option<Event> {
        self.lines.raise_legacy(requests);
        (requests & RESET_REQUEST != 0).then(|| {
            Event::GuestEnded(Ending {
                outcome: Outcome::Reset,
                vcpu: 0,
                detail: String::new(),
            })
        })
    }

    fn listen(&self) -> Vec<Event> {
        let mut events = Vec::new();
        for _ in 0..MESSAGES_PER_TURN {
            match self.channel.try_recv::<ToVcpu>() {
                Ok(Some((message, _))) => events.push(Event::Message(message)),
                // The far end is kept here, so it closes with this process.
                Ok(None) | Err(ChannelError::Closed) => break,
                Err(error) => tracing::error!(%error, "the broker sent what is no message"),
            }
        }
        events
    }

    /// Returns what comes of it at once.
    fn act(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Direct(directive) => {
                if directive == Directive::Stop {
                    self.virtio.interrupt_waits();
                }
                self.group.direct(directive);
            }
            Action::Send(message) => self.outbox.tell(message),
            Action::PressPowerButton => {
                self.ports.press_power_button();
                self.lines.raise_events();
            }
            Action::PrepareSlot(slot, successor) => {
                self.news.forget(slot, successor.generation);
                self.virtio.prepare_slot(slot, successor);
                self.news.tell(&mut self.outbox, &self.virtio);
            }
            Action::LoseDevice(slot) => self.virtio.device_lost(slot),
            Action::PrepareLegacy(generation) => {
                let prepared = self.legacy.prepare(generation)?;
                self.outbox.tell(FromVcpu::LegacyPrepared {
                    generation: prepared.generation,
                    output_position: prepared.output_position,
                    input_position: prepared.input_position,
                });
                return self.raise(prepared.requests);
            }
            Action::LoseLegacy => self.legacy.set_lost(),
            Action::Conclude(ending) => {
                self.pass_faults_on();
                let vcpus = self.group.take_crashed();
                let outbox = &mut self.outbox;
                self.scene
                    .tell(&ending, &vcpus, &mut |message| outbox.tell(message));
                self.outbox.tell(FromVcpu::Ended(ending.outcome));
            }
            Action::Exit => {}
        }
        None
    }

    fn pass_faults_on(&mut self) {
        let _rung = self.virtio.fault_bell().read();
        self.news.tell(&mut self.outbox, &self.virtio);
        for fault in self.virtio.take_faults() {
            self.outbox.tell(fault);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn end_is_told_again_a_few_times_and_then_no_more() {
        let mut end = End::default();
        let mut now = Instant::now();
        assert_eq!(end.next(false, now), None);
        assert!(!end.is_unheard(now));
        for _ in 0..TOLD_AGAIN_MAX {
            assert_eq!(end.next(true, now), Some(UNHEARD));
            assert!(!end.is_unheard(now));
            now += UNHEARD;
            assert!(end.is_unheard(now));
        }
        assert_eq!(end.next(true, now), None);
        assert!(!end.is_unheard(now + UNHEARD));
    }
}
