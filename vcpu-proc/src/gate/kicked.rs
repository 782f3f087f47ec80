//! Kicks that the vCPU which makes them serves itself, where the way of a request would otherwise begin with waking the
//! gate thread ([`VirtioKind::is_served_at_kick`]).
//!
//! A gate belongs to whoever has its lock: the gate thread, or one of these. A vCPU never waits for it, and does not take
//! it from the gate thread that waits: several vCPUs could keep it for ever by turns. When it does not get the gate, or
//! when something is left to do, it rings for the gate thread as an ioeventfd would have.

use super::device::Gate;
use bulkhead_ipc::device_kind::VirtioKind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

/// A gate that several threads may serve, one at a time.
#[derive(Debug, Clone)]
pub(crate) struct SharedGate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Whether the gate thread waits for it.
    wanted: AtomicBool,
    gate: Mutex<Gate>,
}

impl SharedGate {
    pub(crate) fn new(gate: Gate) -> Self {
        let wanted = AtomicBool::new(false);
        let gate = Mutex::new(gate);
        Self(Arc::new(Shared { wanted, gate }))
    }

    /// For the gate thread alone. Waits for whoever has it, which is for no longer than a few requests take for each vCPU.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Gate> {
        let Shared { wanted, gate } = &*self.0;
        match gate.try_lock() {
            Ok(gate) => gate,
            Err(TryLockError::Poisoned(gate)) => gate.into_inner(),
            Err(TryLockError::WouldBlock) => {
                wanted.store(true, Ordering::Release);
                let gate = gate.lock().unwrap_or_else(PoisonError::into_inner);
                wanted.store(false, Ordering::Release);
                gate
            }
        }
    }

    /// For a vCPU thread. None while somebody else has it, or waits for it.
    fn try_lock(&self) -> Option<MutexGuard<'_, Gate>> {
        if self.0.wanted.load(Ordering::Acquire) {
            return None;
        }
        match self.0.gate.try_lock() {
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
    bells: Vec<Option<Arc<EventFd>>>,
}

impl Kicks {
    pub(crate) fn new(
        kind: VirtioKind,
        gate: SharedGate,
        memory: GuestMemoryMmap,
        notify: &[Arc<EventFd>],
    ) -> Self {
        let bells = notify.iter().enumerate();
        let bells =
            bells.map(|(queue, bell)| kind.is_served_at_kick(queue).then(|| Arc::clone(bell)));
        Self {
            gate,
            memory,
            bells: bells.collect(),
        }
    }

    /// The guest kicks a queue. Never waits.
    pub(crate) fn kick(&self, queue: usize) {
        let Some(bell) = self.bells.get(queue).and_then(Option::as_deref) else {
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
