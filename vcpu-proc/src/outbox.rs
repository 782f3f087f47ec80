//! What the control thread has to tell the broker and could not yet: the broker is busy, or there is
//! none. Telling never waits, since the same thread raises the guest's interrupts.
//!
//! Bounded: beyond [`TEXT_BYTES_MAX`] of text, faults and reports are lost, the latest first, and their
//! number is logged. How the machine ended is never lost.

use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::protocol::vcpu::FromVcpu;
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::legacy_client::LegacyClient;
use crate::virtio::VirtioBus;

/// Most text that is kept in bytes: a whole crash report, and what the gates say besides.
const TEXT_BYTES_MAX: usize = 2 << 20;
/// What a message without text counts.
const PLAIN_BYTES: usize = 64;

/// The messages that wait, oldest first.
#[derive(Debug)]
pub struct Outbox<'a> {
    channel: &'a Channel,
    /// These lend the descriptors that go with some messages.
    bus: Option<Arc<VirtioBus>>,
    legacy: Option<Arc<LegacyClient>>,
    waiting: VecDeque<FromVcpu>,
    bytes: usize,
    lost: u64,
}

impl<'a> Outbox<'a> {
    /// Of messages for `channel`.
    #[must_use]
    pub const fn new(channel: &'a Channel) -> Self {
        Self {
            channel,
            bus: None,
            legacy: None,
            waiting: VecDeque::new(),
            bytes: 0,
            lost: 0,
        }
    }

    /// Descriptors that go with messages are those of `bus` and `legacy`.
    #[must_use]
    pub fn lending(self, bus: Arc<VirtioBus>, legacy: Arc<LegacyClient>) -> Self {
        Self {
            bus: Some(bus),
            legacy: Some(legacy),
            ..self
        }
    }

    /// Whether something waits for room in the channel.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Tells the broker now, or keeps the message for later.
    pub fn tell(&mut self, message: FromVcpu) {
        let bytes = PLAIN_BYTES + text_bytes(&message);
        if self.bytes + bytes > TEXT_BYTES_MAX && may_be_lost(&message) {
            self.lost += 1;
            if self.lost.is_power_of_two() {
                tracing::warn!(lost = self.lost, "no broker reads: messages are lost");
            }
            return;
        }
        self.bytes += bytes;
        self.waiting.push_back(message);
        self.flush();
    }

    /// Sends what there is room for.
    pub fn flush(&mut self) {
        while let Some(message) = self.waiting.front() {
            match self.channel.send(message, &self.lent(message)) {
                Err(ChannelError::Full) => return,
                Ok(()) | Err(ChannelError::Closed) => {}
                Err(error) => tracing::warn!(%error, "a message to the broker is lost"),
            }
            self.bytes -= PLAIN_BYTES + text_bytes(message);
            self.waiting.pop_front();
        }
    }
}

impl Outbox<'_> {
    /// The descriptors that go with a message.
    fn lent(&self, message: &FromVcpu) -> Vec<BorrowedFd<'_>> {
        let window = |slot| Some(self.bus.as_ref()?.descriptors(slot)?.to_vec());
        let page = || Some(self.legacy.as_ref()?.descriptors()?.to_vec());
        let lent = match message {
            FromVcpu::SlotPrepared { slot, .. } => window(*slot),
            FromVcpu::LegacyPrepared { .. } => page(),
            _ => None,
        };
        lent.unwrap_or_default()
    }
}

fn text_bytes(message: &FromVcpu) -> usize {
    match message {
        FromVcpu::DeviceFault { reason, .. }
        | FromVcpu::GuestFault { reason, .. }
        | FromVcpu::RequestGivenUp { reason, .. }
        | FromVcpu::LegacyFault { reason } => reason.len(),
        FromVcpu::Report { text } => text.len(),
        _ => 0,
    }
}

const fn may_be_lost(message: &FromVcpu) -> bool {
    matches!(
        message,
        FromVcpu::GuestFault { .. } | FromVcpu::Report { .. } | FromVcpu::Pong(_)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_ipc::protocol::vcpu::Outcome;

    fn report(n: usize) -> FromVcpu {
        FromVcpu::Report {
            text: format!("{n} {}", "x".repeat(40_000)),
        }
    }

    #[test]
    fn what_no_broker_reads_waits_in_order_and_the_outcome_is_never_lost() {
        let (broker, process) = Channel::pair().unwrap();
        let mut outbox = Outbox::new(&process);
        for n in 0..200 {
            outbox.tell(report(n));
        }
        outbox.tell(FromVcpu::Ended(Outcome::PowerOff));
        assert!(outbox.is_waiting());
        assert!(outbox.bytes <= TEXT_BYTES_MAX + 2 * PLAIN_BYTES);
        let mut heard = Vec::new();
        loop {
            match broker.try_recv::<FromVcpu>().unwrap() {
                Some((message, _)) => heard.push(message),
                None if outbox.is_waiting() => outbox.flush(),
                None => break,
            }
        }
        assert_eq!(heard.pop(), Some(FromVcpu::Ended(Outcome::PowerOff)));
        assert!(heard.len() >= 50, "{} reports are kept", heard.len());
        for (n, message) in heard.into_iter().enumerate() {
            assert_eq!(message, report(n));
        }
        assert_eq!(outbox.bytes, 0);
    }
}
