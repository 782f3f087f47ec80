//! How much a process may say: a few messages at once and one more now and then. A process that was
//! taken over could otherwise fill logs and keep the broker busy with its messages for ever.

use bulkhead_ipc::ident::ProcKind;
use bulkhead_ipc::protocol::device::DIALS_PER_S;
use std::time::{Duration, Instant};

/// Messages of a device process at once. It has little to say: that it is locked, that it failed.
const DEVICE_BURST: u32 = 16;
/// Messages of a vCPU process at once: its gates report a hundred faults for each of sixteen slots,
/// and a crash report comes in pieces.
const VCPU_BURST: u32 = 2048;
/// Messages of a socket device at once: what one has asked while it had no broker, as much as its channel
/// holds, is read by the next broker all at once.
const VSOCK_BURST: u32 = 512;
/// Messages of a switch at once: every port may be refused or broken, and every machine may take an address.
const SWITCH_BURST: u32 = 1024;
/// The same of a switch, whose machines can have it tell of a lease now and then.
const SWITCH_REFILL: Duration = Duration::from_millis(10);
/// Time after which one more message is allowed: the answers to what the owner does.
const REFILL: Duration = Duration::from_millis(100);
/// The same of a socket device, which asks for connections and answers besides.
const VSOCK_REFILL: Duration = Duration::from_millis(1000 / (DIALS_PER_S as u64 + 50));

/// What is left of it for one process.
#[derive(Debug)]
pub(super) struct Allowance {
    left: u32,
    burst: u32,
    refill: Duration,
    refilled: Instant,
}

impl Allowance {
    /// The whole allowance of a process of `kind` that starts `now`.
    pub(super) const fn of(kind: ProcKind, now: Instant) -> Self {
        let (burst, refill) = match kind {
            ProcKind::Vcpu => (VCPU_BURST, REFILL),
            ProcKind::Vsock => (VSOCK_BURST, VSOCK_REFILL),
            ProcKind::Switch => (SWITCH_BURST, SWITCH_REFILL),
            _ => (DEVICE_BURST, REFILL),
        };
        Self {
            left: burst,
            burst,
            refill,
            refilled: now,
        }
    }

    /// Counts a message that came at `now`. False when it is one too many.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.refilled);
        let more = u32::try_from(elapsed.as_millis() / self.refill.as_millis()).unwrap_or(u32::MAX);
        if more > 0 {
            self.left = self.left.saturating_add(more).min(self.burst);
            self.refilled = if self.left == self.burst {
                now
            } else {
                self.refilled + self.refill * more
            };
        }
        let Some(left) = self.left.checked_sub(1) else {
            return false;
        };
        self.left = left;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flood_is_noticed_and_answers_now_and_then_are_not_one() {
        let now = Instant::now();
        let mut device = Allowance::of(ProcKind::Blk, now);
        let taken = (0..1000).filter(|_| device.take(now)).count();
        assert_eq!(taken, DEVICE_BURST as usize);
        let mut patient = Allowance::of(ProcKind::Blk, now);
        assert!((1..1000).all(|n| patient.take(now + REFILL * n)));
    }

    #[test]
    fn socket_device_may_ask_for_as_many_connections_as_agreed() {
        use bulkhead_ipc::protocol::device::DIALS_MAX;
        let now = Instant::now();
        let mut device = Allowance::of(ProcKind::Vsock, now);
        assert!((0..DIALS_MAX).all(|_| device.take(now)));
        let second = Duration::from_secs(1);
        let asked = (0..60 * DIALS_PER_S).all(|n| device.take(now + second * n / DIALS_PER_S));
        assert!(asked);
        let mut flood = Allowance::of(ProcKind::Vsock, now);
        let taken = (0..100_000).filter(|n| flood.take(now + second * *n / 10_000));
        assert!(taken.count() < 4000);
    }

    #[test]
    fn vcpu_process_may_report_every_fault_that_its_gates_do() {
        let now = Instant::now();
        let mut vcpu = Allowance::of(ProcKind::Vcpu, now);
        assert!((0..16 * 100 + 100).all(|_| vcpu.take(now)));
    }
}
