//! Kicks that the vCPU which makes them serves itself, where the way of a request would otherwise begin with waking the
//! gate thread ([`VirtioKind::is_served_at_kick`]).
//!
//! A gate belongs to whoever has its lock: the gate thread, or one of these. A vCPU never waits for it. When
//! somebody else has the gate, or when something is left to do, it rings for the gate thread as an ioeventfd would have.

use super::device::Gate;
use bulkhead_ipc::device_kind::VirtioKind;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// A gate that several threads may serve, one at a time.
#[derive(Debug, Clone)]
pub(crate) struct SharedGate(Arc<Mutex<Gate>>);

impl SharedGate {
    pub(crate) fn new(gate: Gate) -> Self {
        Self(Arc::new(Mutex::new(gate)))
    }

    /// Waits for whoever has it, which is for no longer than a few requests take.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Gate> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Gate>> {
        match self.0.try_lock() {
            Ok(gate) => Some(gate),
            Err(TryLockError::Poisoned(gate)) => Some(gate.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// The kicks of one device that reach its vCPU threads.
#[derive(Debug)]
pub(crate) struct Kicks {
    gate: SharedGate,
    memory: GuestMemoryMmap,
    /// What rings for the gate thread, of each queue whose kicks are served here.
    bells: Vec<Option<EventFd>>,
}

impl Kicks {
    pub(crate) fn new(
        kind: VirtioKind,
        gate: SharedGate,
        memory: GuestMemoryMmap,
        notify: &[EventFd],
    ) -> std::io::Result<Self> {
        let bell = |(queue, bell): (usize, &EventFd)| {
            let here = kind.is_served_at_kick(queue);
            here.then(|| bell.try_clone()).transpose()
        };
        let bells = notify.iter().enumerate().map(bell);
        Ok(Self {
            gate,
            memory,
            bells: bells.collect::<Result<_, _>>()?,
        })
    }

    /// The guest kicks a queue. Never waits.
    pub(crate) fn kick(&self, queue: usize) {
        let Some(bell) = self.bells.get(queue).and_then(Option::as_ref) else {
            return;
        };
        let left = match self.gate.try_lock() {
            Some(mut gate) => gate.kicked(&self.memory),
            None => true,
        };
        if left {
            let _already_rung = bell.write(1);
        }
    }
}
