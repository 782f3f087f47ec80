//! The gate thread: one epoll loop over the guest's kicks (ioeventfds), the devices' calls and the
//! commands of vCPU and control threads.
//!
//! ```text
//!   passes over all devices that rang ── anything done, or seen: again (a look at epoll now and then)
//!     └ nothing to do: watch the rings for a moment ── arm the doorbells ── sleep in epoll
//! ```
//!
//! Watching pays when the next request comes within the time that a wake-up takes (tens of
//! microseconds), and never while the device that is watched needs the very CPU that watching would burn.
//!
//! Doorbells are watched edge-triggered and never read, which saves a system call for each wake-up:
//! every ring makes an edge, and a peer that fills its eventfd only silences itself. One that rings for
//! nothing is found by its account ([`super::rings`]) and replaced; until the broker has ended it the
//! thread naps between its rings, so that it does not keep a CPU busy.

use super::Successor;
use super::device::{Fault, Gate, Pass};
use bulkhead_ipc::protocol::vcpu::FromVcpu;
use bulkhead_runtime::spin::Spin;
use flume::{Receiver, Sender};
use std::hint::spin_loop;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use virtio_queue::Queue;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

/// Commands that may wait for the gate thread.
pub(crate) const COMMANDS_MAX: usize = 64;
/// Faults that may wait for the control thread; more are dropped.
pub(crate) const FAULTS_MAX: usize = 64;
/// Of them, those that are kept free for faults of devices, which must not be dropped: the broker would
/// never replace the device. There is one at most of each, until the broker has had it prepared.
const DEVICE_FAULTS_RESERVED: usize = FAULTS_MAX / 2;
/// Faults that the guest of one device can cause at will, and that are reported.
const GUEST_FAULTS_REPORTED_MAX: u32 = 100;
/// How long the thread sleeps when nobody rang but processes that are to be replaced.
const NAP: Duration = Duration::from_micros(500);

/// Rounds without sleep after which epoll is looked at: the bells of those that are not watched ring there.
const ROUNDS_BETWEEN_LOOKS: u32 = 16;
/// Looks at the rings between two looks at the clock while watching.
const LOOKS_PER_CLOCK: u32 = 16;
const TOKEN_COMMAND: u64 = u64::MAX;
/// Set in the token of a device that its guest rings.
const TOKEN_GUEST: u64 = 1 << 32;

/// What other threads ask of the gate thread.
#[derive(Debug)]
pub(crate) enum Command {
    /// The guest wrote 0 to the status register.
    Reset { slot: u8 },
    /// The guest set DRIVER_OK.
    Activate {
        slot: u8,
        features: u64,
        queues: Vec<Option<Queue>>,
    },
    /// The device process is dead; this one follows.
    Prepare { slot: u8, successor: Successor },
    /// The device process is gone, and there is no other.
    Lost { slot: u8 },
    /// Leave.
    Stop,
}

/// Sends commands and wakes the thread.
#[derive(Debug, Clone)]
pub(crate) struct CommandSender {
    pub(crate) queue: Sender<Command>,
    pub(crate) bell: Arc<EventFd>,
    pub(crate) waits: Arc<AtomicBool>,
}

impl CommandSender {
    /// Sends a command. Waits while [`COMMANDS_MAX`] are pending, which the gate thread, never
    /// waiting for anybody itself, soon changes.
    pub(crate) fn send(&self, command: Command) {
        if self.queue.send(command).is_ok() {
            self.waits.store(true, Ordering::Release);
            let _already_rung = self.bell.write(1);
        }
    }
}

/// One device of the thread.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) slot: u8,
    pub(crate) gate: Gate,
    pub(crate) notify: Vec<EventFd>,
    pub(crate) ready: bool,
    pub(crate) guest_faults_reported: u32,
}

impl Served {
    /// Whether a fault is told to the broker, for which `waiting` ones wait already.
    fn may_report(&mut self, fault: &Fault, waiting: usize) -> bool {
        match fault {
            Fault::Device(_) => true,
            Fault::Guest(_) | Fault::GivenUp(_) => {
                self.guest_faults_reported = self.guest_faults_reported.saturating_add(1);
                self.guest_faults_reported <= GUEST_FAULTS_REPORTED_MAX
                    && waiting < FAULTS_MAX - DEVICE_FAULTS_RESERVED
            }
        }
    }
}

/// The gate thread's whole state; [`GateThread::run`] is its life.
#[derive(Debug)]
pub struct GateThread {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) devices: Vec<Served>,
    pub(crate) commands: Receiver<Command>,
    pub(crate) command_bell: Arc<EventFd>,
    pub(crate) commands_wait: Arc<AtomicBool>,
    pub(crate) faults: Sender<FromVcpu>,
    pub(crate) fault_bell: Arc<EventFd>,
    pub(crate) epoll: Epoll,
    pub(crate) spin: Spin,
    /// Whether vCPUs, this thread and a device process have a CPU each.
    pub(crate) parallel: bool,
}

impl GateThread {
    /// Registers all doorbells; before the thread is locked.
    pub(crate) fn register(&self) -> io::Result<()> {
        let add = |fd: &EventFd, token| {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
        };
        add(&self.command_bell, TOKEN_COMMAND)?;
        for (device, token) in self.devices.iter().zip(0u64..) {
            add(device.gate.call_bell(), token)?;
            for notify in &device.notify {
                add(notify, TOKEN_GUEST | token)?;
            }
        }
        Ok(())
    }

    /// Serves the gates until [`Command::Stop`] or an epoll failure (a bug; the VM then ends).
    ///
    /// # Errors
    /// The kernel's error from `epoll_wait`.
    pub fn run(mut self) -> io::Result<()> {
        let mut rounds = 0u32;
        loop {
            if self.commands_wait.swap(false, Ordering::AcqRel) && !self.take_commands() {
                return Ok(());
            }
            if !self.serve() && !self.watch() {
                let for_device = self.waits_for_device();
                if !self.arm() {
                    let asleep = Instant::now();
                    self.look(-1)?;
                    if !for_device {
                        self.spin.slept(asleep.elapsed());
                    }
                    rounds = 0;
                    continue;
                }
            }
            rounds += 1;
            if rounds >= ROUNDS_BETWEEN_LOOKS {
                rounds = 0;
                self.look(0)?;
            }
        }
    }

    /// One pass over each device that rang. Returns whether any of them did something.
    fn serve(&mut self) -> bool {
        let mut busy = false;
        for device in self.devices.iter_mut().filter(|d| d.ready) {
            busy |= device.gate.pass(&self.memory) == Pass::Again;
            if device.gate.take_news() {
                let _already_rung = self.fault_bell.write(1);
            }
            for fault in device.gate.take_faults() {
                if device.may_report(&fault, self.faults.len())
                    && self.faults.try_send(to_message(device.slot, fault)).is_ok()
                {
                    let _already_rung = self.fault_bell.write(1);
                }
            }
        }
        busy
    }

    /// The devices that rang and whose drivers are likely to be waiting.
    fn watched(&self) -> impl Iterator<Item = &Gate> {
        let rang = self.devices.iter().filter(|d| d.ready);
        rang.map(|d| &d.gate).filter(|gate| gate.is_latency_bound())
    }

    /// Whether a device process is at work that a driver is likely to be waiting for.
    fn waits_for_device(&self) -> bool {
        self.watched().any(Gate::waits_for_device)
    }

    /// Watches the rings for as long as it has paid lately. Returns whether something came.
    fn watch(&self) -> bool {
        let budget = self.spin.budget();
        if budget.is_zero() || self.watched().next().is_none() {
            return false;
        }
        if !self.parallel && self.waits_for_device() {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                let command = self.commands_wait.load(Ordering::Relaxed);
                if command || self.watched().any(|gate| gate.has_work(&self.memory)) {
                    return true;
                }
                spin_loop();
            }
            if start.elapsed() >= budget {
                return false;
            }
        }
    }

    /// Asks everybody to ring. Returns whether there is something to do already.
    fn arm(&mut self) -> bool {
        for device in self.devices.iter_mut().filter(|d| d.ready) {
            device.ready = device.gate.arm(&self.memory);
        }
        self.devices.iter().any(|d| d.ready)
    }

    /// Takes note of who rang, waiting up to `timeout_ms` (-1 for ever).
    fn look(&mut self, timeout_ms: i32) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 32];
        let n = match self.epoll.wait(timeout_ms, &mut events) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(e) => return Err(e),
        };
        let mut worth_it = n == 0;
        for event in events.iter().take(n) {
            worth_it |= self.note(event.data());
        }
        if !worth_it && timeout_ms != 0 {
            std::thread::park_timeout(NAP);
        }
        Ok(())
    }

    /// Takes note of one ring. Returns whether it was worth waking up for.
    fn note(&mut self, token: u64) -> bool {
        if token == TOKEN_COMMAND {
            // It only wakes; what it announces is in `commands_wait`.
            return true;
        }
        let index = usize::try_from(token & !TOKEN_GUEST).ok();
        let Some(device) = index.and_then(|index| self.devices.get_mut(index)) else {
            return false;
        };
        let worth_it = token & TOKEN_GUEST != 0 || device.gate.rung();
        device.ready |= worth_it;
        worth_it
    }

    /// Carries out what was asked. False when the thread is to leave.
    fn take_commands(&mut self) -> bool {
        while let Ok(command) = self.commands.try_recv() {
            let slot = match &command {
                Command::Reset { slot }
                | Command::Activate { slot, .. }
                | Command::Prepare { slot, .. }
                | Command::Lost { slot } => *slot,
                Command::Stop => return false,
            };
            let Some(device) = self.devices.iter_mut().find(|d| d.slot == slot) else {
                continue;
            };
            device.ready = true;
            match command {
                Command::Reset { .. } => device.gate.reset(),
                Command::Activate {
                    features, queues, ..
                } => {
                    device.gate.activate(&self.memory, features, queues);
                }
                Command::Prepare { successor, .. } => {
                    device.gate.prepare(&self.memory, successor);
                }
                Command::Lost { .. } => device.gate.lost(),
                Command::Stop => return false,
            }
        }
        true
    }
}

fn to_message(slot: u8, fault: Fault) -> FromVcpu {
    match fault {
        Fault::Guest(reason) => FromVcpu::GuestFault { slot, reason },
        Fault::Device(reason) => FromVcpu::DeviceFault { slot, reason },
        Fault::GivenUp(reason) => FromVcpu::RequestGivenUp { slot, reason },
    }
}
