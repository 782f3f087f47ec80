//! The control thread: what the broker asks, what the legacy process requests, what vCPUs report.
//!
//! It is the only one that talks to the broker and the only one that directs and kicks vCPUs. It
//! sleeps in `ppoll`; it never waits for the broker or a device without a deadline, and what it
//! decides is decided in [`Lifecycle`].

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::legacy_page::RESET_REQUEST;
use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};

use crate::crash::CrashScene;
use crate::group::{Directive, Ending, Group};
use crate::irq::Lines;
use crate::legacy_client::LegacyClient;
use crate::lifecycle::{Action, Event, Lifecycle};
use crate::ports::Ports;
use crate::virtio::VirtioBus;
use crate::wait;

/// How often vCPUs that are waited for are kicked again.
const KICK_AGAIN: Duration = Duration::from_millis(10);
/// How long a broker that does not read is waited for before a message to it is dropped.
const BROKER_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two attempts to send.
const SEND_AGAIN: Duration = Duration::from_millis(5);
/// Messages of the broker that are heard before the others have their turn.
const MESSAGES_PER_TURN: usize = 16;

/// What the control thread holds.
#[derive(Debug)]
pub struct Control<'a> {
    /// The broker.
    pub channel: &'a Channel,
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
}

impl Control<'_> {
    /// Serves while the guest runs, and returns when the process is to end.
    pub fn serve(&mut self) {
        let mut life = Lifecycle::default();
        let mut legacy_fault_told = false;
        loop {
            let again = life.is_waiting().then_some(KICK_AGAIN);
            let [broker, interrupts, wake, faults] = wait::any_readable(
                [
                    self.channel.as_fd(),
                    self.legacy.interrupt().as_fd(),
                    self.group.wake().as_fd(),
                    wait::lend(self.virtio.fault_bell()),
                ],
                again,
            );
            if wake {
                self.group.wake().take();
            }
            if faults {
                self.pass_faults_on();
            }
            if let Some(fault) = self.legacy.fault().filter(|_| !legacy_fault_told) {
                legacy_fault_told = true;
                let reason = fault.to_owned();
                send(self.channel, &FromVcpu::LegacyFault { reason });
            }
            let mut events = self.look_at_vcpus();
            if interrupts {
                events.extend(self.take_requests());
            }
            if broker {
                events.extend(self.listen());
            }
            for event in events {
                for action in life.step(event) {
                    if action == Action::Exit {
                        return;
                    }
                    self.act(action);
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

    fn take_requests(&self) -> Option<Event> {
        self.legacy.interrupt().take();
        let requests = self.legacy.take_requests();
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
                Ok(None) => break,
                Err(error) => {
                    if !matches!(error, ChannelError::Closed) {
                        tracing::error!(%error, "the broker talks nonsense");
                    }
                    events.push(Event::BrokerLost);
                    break;
                }
            }
        }
        events
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Direct(directive) => {
                if directive == Directive::Stop {
                    self.virtio.interrupt_waits();
                }
                self.group.direct(directive);
            }
            Action::Send(message) => send(self.channel, &message),
            Action::PressPowerButton => {
                self.ports.press_power_button();
                self.lines.raise_events();
            }
            Action::LoseDevice(slot) => self.virtio.device_lost(slot),
            Action::LoseLegacy => self.legacy.set_lost(),
            Action::Conclude(ending) => {
                self.pass_faults_on();
                let channel = self.channel;
                let vcpus = self.group.take_crashed();
                self.scene
                    .tell(&ending, &vcpus, &mut |message| send(channel, &message));
                send(channel, &FromVcpu::Ended(ending.outcome));
            }
            Action::Exit => {}
        }
    }

    fn pass_faults_on(&self) {
        let _rung = self.virtio.fault_bell().read();
        for fault in self.virtio.take_faults() {
            send(self.channel, &fault);
        }
    }
}

/// Sends a message; a broker that does not read for [`BROKER_PATIENCE`] misses it.
fn send(channel: &Channel, message: &FromVcpu) {
    let deadline = Instant::now() + BROKER_PATIENCE;
    loop {
        match channel.send(message, &[]) {
            Err(ChannelError::Full) if Instant::now() < deadline => wait::nap(SEND_AGAIN),
            Ok(()) | Err(ChannelError::Closed) => return,
            Err(error) => {
                tracing::warn!(%error, "a message to the broker is lost");
                return;
            }
        }
    }
}
