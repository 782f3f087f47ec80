//! From a birth to the end of the VM: set up, make the threads, lock them, run.
//!
//! Every thread, the control thread included, is locked before the first instruction of the guest
//! runs. No thread ever ends by itself: threads whose work is done sleep until the process ends,
//! so that nothing of ending a thread needs to be permitted.

use std::hash::RandomState;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, OnceLock};

use bulkhead_ipc::channel::Channel;
use bulkhead_ipc::platform::VCPUS_MAX;
use bulkhead_ipc::protocol::birth::VcpuConfig;
use bulkhead_ipc::shed;
use bulkhead_runtime::adoption::Adoption;
use vm_memory::GuestMemoryMmap;

use crate::control::Control;
use crate::crash::CrashScene;
use crate::ear::Ear;
use crate::gate::GateThread;
use crate::group::{Directive, Group};
use crate::irq::Lines;
use crate::kvm::Vm;
use crate::outbox::Outbox;
use crate::setup::{self, Groundwork, Machine, Resources, SetupError};
use crate::slot_news::News;

/// Stack of a vCPU or gate thread in bytes.
const STACK_BYTES: usize = 128 * 1024;

/// Puts the walls up. The implementation of the process is its runtime's; tests have their own.
pub trait Walls: Send + Sync + 'static {
    /// Locks the calling thread, which is of the kind `thread`: `main`, `vcpu` (`vcpu-quirks` where
    /// KVM is incomplete) or `gate`.
    ///
    /// # Errors
    /// Why it could not be locked; the process then ends.
    fn lock_thread(&self, thread: &'static str) -> Result<(), String>;

    /// Says that every thread is locked.
    ///
    /// # Errors
    /// Why the broker cannot be told; the process then ends.
    fn announce(&self) -> Result<(), String>;
}

/// Why a VM did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The VM could not be set up.
    #[error(transparent)]
    Setup(#[from] SetupError),
    /// A thread could not be made.
    #[error("{thread} thread: {source}")]
    Spawn {
        /// Its kind.
        thread: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// A thread could not be locked, or the broker not be told.
    #[error("{0}")]
    Walls(String),
}

/// What is left of a VM that has ended. A locked process leaves without dropping it: closing and
/// unmapping are not permitted any more, and the kernel does both.
#[derive(Debug)]
pub struct Remains {
    _vm: Arc<Vm>,
    _memory: GuestMemoryMmap,
    _lines: Lines,
    _scene: CrashScene,
    _adoption: Option<Adoption>,
}

/// Runs a VM to its end. Returns when the process has nothing more to do.
///
/// # Errors
/// When the VM did not start; once it runs, how it ends is told over `channel`.
pub fn run<W: Walls>(
    config: VcpuConfig,
    mut resources: Resources,
    channel: &Channel,
    walls: &Arc<W>,
) -> Result<Remains, StartError> {
    let adoption = resources.adoption.take();
    // The gate thread has time until there are gates: it does what takes the kernel long, and locks
    // itself. Nobody but the receivers below hears of it, and they are dropped when this fails.
    let starter = Arc::new(Starter::default());
    let (told, locked) = flume::bounded(usize::from(VCPUS_MAX) + 1);
    let (give_gates, gates_given) = flume::bounded::<GateThread>(1);
    let aside = |groundwork: Groundwork| {
        let (laid, result) = flume::bounded(1);
        let first = move || {
            let _awaited = laid.send(groundwork.lay());
        };
        let serve = move || {
            let served = gates_given.recv().map(GateThread::run);
            if let Ok(Err(error)) = served {
                tracing::error!(%error, "the gates have stopped");
            }
        };
        spawn("gate", walls, &told, &starter, first, serve)
            .map(|()| result)
            .map_err(|source| SetupError::Os {
                what: "gate thread",
                source,
            })
    };
    let Machine {
        vm,
        memory,
        loops,
        group,
        legacy,
        virtio,
        gates,
        ports,
        lines,
        loaded,
        kernel,
        core,
    } = setup::build(config, resources, aside)?;
    let _gate_thread_waits = give_gates.send(gates);
    let scene = CrashScene::new(memory.clone(), loaded, kernel, core);
    let threads = loops.len() + 1;
    starter.expect(loops.len() + 2, &group);
    for mut vcpu in loops {
        let kind = if vcpu.quirks.is_some() {
            "vcpu-quirks"
        } else {
            "vcpu"
        };
        let group = Arc::clone(&vcpu.group);
        let (join, index) = (Arc::clone(&group), vcpu.index);
        let run = move || {
            vcpu.run();
            group.leave(vcpu.scene());
            vcpu
        };
        spawn(kind, walls, &told, &starter, move || join.join(index), run).map_err(|source| {
            StartError::Spawn {
                thread: kind,
                source,
            }
        })?;
    }
    shed::start_up_code();
    // Hash tables of this thread take their seeds from here; the kernel is not asked after lock.
    let _seeded = RandomState::new();
    walls.lock_thread("main").map_err(StartError::Walls)?;
    starter.one_is_locked();
    for _ in 0..threads {
        let told = locked.recv().unwrap_or(Err(String::new()));
        told.map_err(StartError::Walls)?;
    }
    walls.announce().map_err(StartError::Walls)?;
    let mut control = Control {
        channel,
        outbox: Outbox::new(channel).lending(Arc::clone(&virtio), Arc::clone(&legacy)),
        adoption,
        group,
        legacy,
        virtio,
        ports,
        lines,
        scene,
        news: News::default(),
        ear: Ear::default(),
    };
    control.serve();
    Ok(Remains {
        _vm: vm,
        _memory: memory,
        _lines: control.lines,
        _scene: control.scene,
        _adoption: control.adoption,
    })
}

/// Lets the guest run when every thread is locked. The last one to lock itself does it, so that
/// nobody has to be woken for it.
#[derive(Debug, Default)]
struct Starter {
    /// Threads that have locked themselves, less those that there are.
    locked: AtomicIsize,
    group: OnceLock<Arc<Group>>,
}

impl Starter {
    /// There are `threads` in all, of which the vCPUs are not started yet.
    fn expect(&self, threads: usize, group: &Arc<Group>) {
        let _first = self.group.set(Arc::clone(group));
        self.count_on(threads);
    }

    fn one_is_locked(&self) {
        if self.count_one()
            && let Some(group) = self.group.get()
        {
            group.direct(Directive::Run);
        }
    }

    fn count_on(&self, threads: usize) {
        let threads = isize::try_from(threads).unwrap_or(isize::MAX);
        // The calling thread is one of them, so the count stays below zero here.
        self.locked.fetch_sub(threads, Ordering::AcqRel);
    }

    /// Returns whether this was the last of all threads.
    fn count_one(&self) -> bool {
        self.locked.fetch_add(1, Ordering::AcqRel) == -1
    }
}

type Told = flume::Sender<Result<(), String>>;

/// Makes a thread that does `first`, locks itself, and does the rest of its `life`.
fn spawn<W: Walls, T>(
    thread: &'static str,
    walls: &Arc<W>,
    told: &Told,
    starter: &Arc<Starter>,
    first: impl FnOnce() + Send + 'static,
    life: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<()> {
    let walls = Arc::clone(walls);
    let (told, starter) = (told.clone(), Arc::clone(starter));
    std::thread::Builder::new()
        .name(thread.to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            first();
            let done = walls.lock_thread(thread);
            let may_live = done.is_ok();
            if may_live {
                starter.one_is_locked();
            }
            let _heard = told.send(done);
            // Kept, since a locked thread can close and unmap nothing.
            let _remains = may_live.then(life);
            loop {
                std::thread::park();
            }
        })
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_runs_when_the_last_thread_is_locked_and_not_before() {
        // The gate thread may lock itself before the number of threads is known, or after.
        for early in [true, false] {
            let starter = Starter::default();
            if early {
                assert!(!starter.count_one());
            }
            starter.count_on(34);
            let left = if early { 33 } else { 34 };
            for n in 1..left {
                assert!(!starter.count_one(), "{n} of {left}");
            }
            assert!(starter.count_one());
            assert!(!starter.count_one(), "only once");
        }
    }
}
