//! The vCPU threads as one: what they are told to do, and what they tell back.
//!
//! The control thread gives a directive and kicks; a vCPU thread obeys when KVM_RUN returns as
//! interrupted, because then no access of its guest is half done. Nothing here waits for anybody
//! but for the control thread's next directive.
//!
//! ```text
//!             Hold ------> Run <----> Hold
//!               \           |
//!                `------> Stop      (for good)
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use bulkhead_ipc::protocol::vcpu::Outcome;
use bulkhead_ipc::shared::Doorbell;

use crate::kick::{Kick, ThreadId};
use crate::kvm::ImmediateExit;
use crate::report::VcpuState;

/// What vCPU threads are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Directive {
    /// Complete what is pending and wait.
    Hold,
    /// Run the guest.
    Run,
    /// Complete what is pending and end the thread.
    Stop,
}

/// How the guest ended, as the vCPU saw it that noticed first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// What to tell the broker.
    pub outcome: Outcome,
    /// The vCPU that noticed.
    pub vcpu: u8,
    /// More about it, for the crash report; one line, may be empty.
    pub detail: String,
}

#[derive(Debug)]
struct State {
    directive: Directive,
    holding: usize,
    stopped: usize,
    crashed: Vec<VcpuState>,
    ending: Option<Ending>,
}

#[derive(Debug)]
struct Member {
    immediate_exit: ImmediateExit,
    thread: OnceLock<ThreadId>,
}

/// The vCPU threads of the VM.
#[derive(Debug)]
pub struct Group {
    members: Box<[Member]>,
    kick: Kick,
    state: Mutex<State>,
    changed: Condvar,
    stopping: AtomicBool,
    wake: Doorbell,
}

impl Group {
    /// A group with one member for each of `flags`, told to hold. `wake` tells the control thread
    /// that it has to look.
    #[must_use]
    pub fn new(flags: Vec<ImmediateExit>, kick: Kick, wake: Doorbell) -> Self {
        let member = |immediate_exit| Member {
            immediate_exit,
            thread: OnceLock::new(),
        };
        Self {
            members: flags.into_iter().map(member).collect(),
            kick,
            state: Mutex::new(State {
                directive: Directive::Hold,
                holding: 0,
                stopped: 0,
                crashed: Vec::new(),
                ending: None,
            }),
            changed: Condvar::new(),
            stopping: AtomicBool::new(false),
            wake,
        }
    }

    /// Control thread: changes the directive. A stop is final.
    pub fn direct(&self, directive: Directive) {
        let mut state = self.state();
        if state.directive != Directive::Stop {
            state.directive = directive;
            self.stopping
                .store(directive == Directive::Stop, Ordering::Release);
        }
        drop(state);
        self.changed.notify_all();
        if directive != Directive::Run {
            self.kick();
        }
    }

    /// Control thread: makes every vCPU look at the directive. Repeated until they all have, since
    /// a signal may arrive just before a thread starts to wait for a peer.
    pub fn kick(&self) {
        for member in &self.members {
            member.immediate_exit.set(true);
            if let Some(thread) = member.thread.get() {
                self.kick.thread(*thread);
            }
        }
    }

    /// Whether every vCPU holds, with nothing of its guest half done.
    #[must_use]
    pub fn all_hold(&self) -> bool {
        self.state().holding == self.members.len()
    }

    /// Whether every vCPU thread has left its loop.
    #[must_use]
    pub fn all_stopped(&self) -> bool {
        self.state().stopped == self.members.len()
    }

    /// How the guest ended, if it has.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.state().ending.clone()
    }

    /// What the vCPUs looked like when the guest crashed, in order.
    #[must_use]
    pub fn take_crashed(&self) -> Vec<VcpuState> {
        let mut crashed = std::mem::take(&mut self.state().crashed);
        crashed.sort_by_key(|vcpu| vcpu.index);
        crashed
    }

    /// The doorbell of the control thread.
    #[must_use]
    pub fn wake(&self) -> &Doorbell {
        &self.wake
    }

    /// Whether waits for peers are to be given up: the VM is over.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// vCPU thread: makes itself known. Called before it looks at a directive.
    pub fn join(&self, vcpu: u8) {
        if let Some(member) = self.members.get(usize::from(vcpu)) {
            let _first = member.thread.set(ThreadId::current());
        }
    }

    /// vCPU thread, after KVM_RUN was interrupted and before the first one: waits while the
    /// directive is to hold. Returns whether it held, and whether to go on.
    #[must_use]
    pub fn obey(&self, vcpu: u8) -> (bool, bool) {
        // Cleared before the directive is read: whoever sets it afterwards has changed the
        // directive before.
        if let Some(member) = self.members.get(usize::from(vcpu)) {
            member.immediate_exit.set(false);
        }
        let mut state = self.state();
        let held = state.directive == Directive::Hold;
        if held {
            state.holding += 1;
            if state.holding == self.members.len() {
                self.wake.ring();
            }
            while state.directive == Directive::Hold {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            state.holding -= 1;
        }
        (held, state.directive == Directive::Run)
    }

    /// vCPU thread: the guest has ended. The first one to say so is believed.
    pub fn end(&self, ending: Ending) {
        self.state().ending.get_or_insert(ending);
        self.wake.ring();
    }

    /// vCPU thread, after [`Group::end`]: waits until the control thread has told all to stop.
    pub fn wait_for_stop(&self) {
        let mut state = self.state();
        while state.directive != Directive::Stop {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// vCPU thread: has left its loop. If the guest crashed it gives what its vCPU looked like.
    pub fn leave(&self, crashed: Option<VcpuState>) {
        let mut state = self.state();
        state.crashed.extend(crashed);
        state.stopped += 1;
        if state.stopped == self.members.len() {
            self.wake.ring();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
