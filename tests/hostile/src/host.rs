//! The process that holds guest memory, taken over: it stands on the other side of every window, and on
//! the control channel where the broker learns how its machine is.
//!
//! It is locked as the control thread of `bulkhead-vcpu` is, which may do what any of its threads may to
//! devices and broker.

use crate::attack::{Method, burn, fill, noise};
use crate::calls;
use crate::edges::{below, edge16, edge32};
use crate::prey::BELLS;
use crate::prng::Prng;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::legacy_page::LEGACY_PAGE_BYTES;
use bulkhead_ipc::protocol::birth::{FdRole, KindConfig, VcpuConfig};
use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};
use bulkhead_ipc::shared::{Doorbell, SharedMemory};
use bulkhead_ipc::window::{DriverView, QueueLayout, Window, WindowLayout};
use bulkhead_policies::denied::Attempt;
use bulkhead_runtime::{Newborn, Stillbirth};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Between two rounds of most methods.
const PAUSE: Duration = Duration::from_millis(1);
/// Lies of one round.
const LIES: usize = 50;
/// Descriptors of one role at most.
const INDEXES: u16 = 16;
/// What is held and of no use here.
const REST: [FdRole; 5] = [
    FdRole::Kvm,
    FdRole::Kernel,
    FdRole::Initrd,
    FdRole::Core,
    FdRole::Input,
];

/// One device, seen from the gate's side.
#[derive(Debug)]
struct Victim {
    slot: u8,
    generation: u32,
    window: Window,
}

/// Everything that the process holds.
#[derive(Debug)]
pub(crate) struct Prey {
    victims: Vec<Victim>,
    page: SharedMemory,
    bells: Vec<Doorbell>,
    _rest: Vec<OwnedFd>,
}

impl Prey {
    pub(crate) fn take(newborn: &mut Newborn) -> Result<Self, Stillbirth> {
        let KindConfig::Vcpu(config) = newborn.config.clone() else {
            return Err(Stillbirth::setup("the birth message is not a vCPU group's"));
        };
        let victims = victims(newborn, &config)?;
        let grants = &mut newborn.grants;
        let page = grants.take(FdRole::LegacyPage, 0)?;
        let page = SharedMemory::map(page, LEGACY_PAGE_BYTES)?;
        let mut bells = Vec::new();
        let mut rest = Vec::new();
        for index in 0..INDEXES {
            for role in BELLS.into_iter().chain(REST) {
                if grants.has(role, index) {
                    let fd = grants.take(role, index)?;
                    if BELLS.contains(&role) {
                        bells.push(Doorbell::from(fd));
                    } else {
                        rest.push(fd);
                    }
                }
            }
        }
        Ok(Self {
            victims,
            page,
            bells,
            _rest: rest,
        })
    }

    fn ring_all(&self) {
        self.bells.iter().for_each(Doorbell::ring);
    }

    fn victim(&self, prng: &mut Prng) -> Option<&Victim> {
        self.victims.get(below(prng, self.victims.len()))
    }
}

fn victims(newborn: &mut Newborn, config: &VcpuConfig) -> Result<Vec<Victim>, Stillbirth> {
    let mut victims = Vec::new();
    for device in &config.devices {
        let bytes = usize::try_from(device.window_bytes).map_err(Stillbirth::setup)?;
        let layout =
            WindowLayout::of(device.kind, bytes, &device.queue_sizes).map_err(Stillbirth::setup)?;
        let fd = newborn.grants.take(FdRole::Window, device.slot.into())?;
        let window = Window::map(fd, layout)?;
        victims.push(Victim {
            slot: device.slot,
            generation: device.generation,
            window,
        });
    }
    Ok(victims)
}

pub(crate) fn run(
    method: Method,
    call: Option<&Attempt>,
    prey: &Prey,
    channel: &Channel,
    prng: &mut Prng,
) -> ! {
    let mut epoch = 1;
    for victim in &prey.victims {
        // A guest has to run before it can take anything over, with all its devices.
        while victim.window.published(0).is_none() {
            std::thread::park_timeout(PAUSE);
        }
        start(victim, u64::MAX, epoch);
    }
    prey.ring_all();
    if let Some(call) = call {
        calls::attempt(call)
    }
    loop {
        match method {
            Method::Scribble => scribble(prey, prng),
            Method::Rings => rings(prey, prng),
            Method::Publish => {
                epoch = restart_all(prey, epoch, prng);
            }
            Method::Ring => (0..10_000).for_each(|_| prey.ring_all()),
            Method::Fill => fill(&prey.bells),
            Method::Flood => flood(prey, channel, prng),
            Method::Lie => (0..LIES).for_each(|_| lie(prey, channel, prng)),
            Method::Burn => burn(),
            Method::Silent | Method::Calls => {}
        }
        match method {
            Method::Ring | Method::Burn => {}
            Method::Silent | Method::Calls => std::thread::park(),
            // A pause, so that devices and broker are given time to make a mistake.
            _ => std::thread::park_timeout(PAUSE),
        }
    }
}

/// What a gate says when the guest's driver has started the device.
fn start(victim: &Victim, features: u64, epoch: u64) {
    victim.window.set_driver(DriverView { features, epoch });
}

/// Random bytes, mostly where headers and rings are.
fn scribble(prey: &Prey, prng: &mut Prng) {
    let windows = prey.victims.iter().map(|victim| &victim.window.memory);
    for memory in windows.chain([&prey.page]) {
        for _ in 0..64 {
            let limit = match below(prng, 3) {
                0 => 0x2000,
                1 => 0x200,
                _ => memory.len(),
            };
            let at = below(prng, limit.min(memory.len() - 8));
            memory.write(at & !3, edge32(prng));
        }
    }
    prey.ring_all();
}

/// Requests that no driver half would make.
fn rings(prey: &Prey, prng: &mut Prng) {
    for victim in &prey.victims {
        let queues = &victim.window.layout.queues;
        if let Some(queue) = queues.get(below(prng, queues.len())) {
            for _ in 0..32 {
                craft(&victim.window, *queue, prng);
            }
        }
    }
    prey.ring_all();
}

/// A chain whose descriptors point, loop and end wherever checks go wrong, and an index that announces it,
/// or much more than there is.
fn craft(window: &Window, queue: QueueLayout, prng: &mut Prng) {
    let memory = &window.memory;
    let descriptors = usize::from(queue.descriptors);
    let first = below(prng, descriptors);
    for n in 0..=below(prng, 6) {
        let at = queue.desc_table + (first + n) % descriptors * 16;
        let address = match below(prng, 4) {
            0 => prng.draw(),
            1 => (memory.len() as u64).wrapping_sub(u64::from(edge16(prng))),
            _ => below(prng, memory.len()) as u64,
        };
        memory.write(at, address);
        memory.write(at + 8, edge32(prng));
        memory.write(at + 12, edge16(prng) & 7 | u16::from(below(prng, 2) == 0));
        let next = u16::try_from((first + n + 1) % descriptors).unwrap_or(0);
        let next = if below(prng, 4) == 0 {
            edge16(prng)
        } else {
            next
        };
        memory.write(at + 14, next);
    }
    // The header of a request, for devices that read one.
    let head = queue.heads + below(prng, usize::from(queue.slots)) * 64;
    memory.write(head, edge32(prng) % 16);
    memory.write(head + 8, prng.draw());
    let index = memory.load::<u16>(queue.avail_ring + 2, Ordering::Relaxed);
    let place = usize::from(index) % descriptors;
    let named = u16::try_from(first).unwrap_or(0);
    let named = if below(prng, 8) == 0 {
        edge16(prng)
    } else {
        named
    };
    memory.write(queue.avail_ring + 4 + 2 * place, named);
    let ahead = if below(prng, 50) == 0 {
        edge16(prng)
    } else {
        1
    };
    memory.store(
        queue.avail_ring + 2,
        index.wrapping_add(ahead),
        Ordering::Release,
    );
}

/// Resets and starts without a pause, with features that nobody offered. Returns the next epoch.
fn restart_all(prey: &Prey, epoch: u64, prng: &mut Prng) -> u64 {
    for n in 0..256 {
        for victim in &prey.victims {
            start(victim, prng.draw(), epoch.wrapping_add(n));
            if below(prng, 5000) == 0 {
                victim.window.initialise(edge32(prng));
            }
        }
        prey.ring_all();
    }
    epoch.wrapping_add(256 + u64::from(edge16(prng)))
}

fn flood(prey: &Prey, channel: &Channel, prng: &mut Prng) {
    for _ in 0..1000 {
        let noise = noise(prng);
        let fds: Vec<_> = prey.bells.iter().take(4).map(AsFd::as_fd).collect();
        let text = "\u{1b}[2Jflood\r\n".repeat(below(prng, 60));
        let sent = match below(prng, 4) {
            // Ends the machine, so not at once.
            0 if below(prng, 20_000) == 0 => channel.send(&noise, &fds),
            1 => channel.send(&FromVcpu::Pong(prng.draw()), &fds),
            2 => channel.send(&FromVcpu::Report { text }, &[]),
            _ => channel.send(
                &FromVcpu::GuestFault {
                    slot: edge8(prng),
                    reason: text,
                },
                &[],
            ),
        };
        if matches!(sent, Err(ChannelError::Full | ChannelError::Closed)) {
            return;
        }
    }
}

fn edge8(prng: &mut Prng) -> u8 {
    edge16(prng).to_le_bytes()[0]
}

/// Answers to what was asked and to what was not, none of them true. Only that the machine has ended is
/// not said: it would be believed, as it must be.
fn lie(prey: &Prey, channel: &Channel, prng: &mut Prng) {
    while let Ok(Some((message, _))) = channel.try_recv::<ToVcpu>() {
        answer_wrongly(prey, channel, &message, prng);
    }
    let Some(victim) = prey.victim(prng) else {
        return;
    };
    let slot = if below(prng, 4) == 0 {
        edge8(prng)
    } else {
        victim.slot
    };
    let generation = match below(prng, 3) {
        0 => edge32(prng),
        1 => victim.generation,
        _ => victim.generation.wrapping_add(1),
    };
    let reason = "\u{1b}]0;taken over\u{7}\r\n".repeat(below(prng, 40));
    let lie = match below(prng, 9) {
        0 => FromVcpu::Pong(prng.draw()),
        1 => FromVcpu::Paused,
        2 => FromVcpu::Resumed,
        3 => FromVcpu::SlotServing { slot, generation },
        4 => FromVcpu::RequestGivenUp { slot, reason },
        // Devices are killed for it, so not often: they are to be attacked.
        5 if below(prng, 500) == 0 => FromVcpu::DeviceFault { slot, reason },
        6 => FromVcpu::LegacyServing { generation },
        7 if below(prng, 500) == 0 => FromVcpu::LegacyFault { reason },
        _ => FromVcpu::Report { text: reason },
    };
    let _told = channel.send(&lie, &[]);
    prepared(prey, channel, slot, generation, prng);
}

fn answer_wrongly(prey: &Prey, channel: &Channel, message: &ToVcpu, prng: &mut Prng) {
    match *message {
        ToVcpu::Ping(number) => {
            // Believable, so that the attack goes on.
            let _told = channel.send(&FromVcpu::Pong(number), &[]);
        }
        ToVcpu::PrepareSlot {
            slot, generation, ..
        } => prepared(prey, channel, slot, generation, prng),
        ToVcpu::PrepareLegacy { generation } => {
            let answer = FromVcpu::LegacyPrepared {
                generation,
                output_position: prng.draw(),
                input_position: u64::from(edge32(prng)),
            };
            let _told = channel.send(&answer, &wrong_descriptors(prey, prng));
        }
        ToVcpu::Kill => {
            let _told = channel.send(&FromVcpu::Ended(Outcome::Killed), &[]);
        }
        ToVcpu::Tell
        | ToVcpu::PowerButton
        | ToVcpu::Pause
        | ToVcpu::Resume
        | ToVcpu::DeviceLost { .. }
        | ToVcpu::LegacyLost => {}
    }
}

/// A window that is none, doorbells that are, positions at the end of the world.
fn prepared(prey: &Prey, channel: &Channel, slot: u8, generation: u32, prng: &mut Prng) {
    let answer = FromVcpu::SlotPrepared {
        slot,
        generation,
        output_position: *prng.pick(&[0, 1, u64::MAX, u64::MAX - 1, 1 << 63]),
        input_position: *prng.pick(&[0, 1, u64::MAX, u64::MAX - 1, 1 << 63]),
    };
    let _told = channel.send(&answer, &wrong_descriptors(prey, prng));
}

fn wrong_descriptors<'a>(prey: &'a Prey, prng: &mut Prng) -> Vec<BorrowedFd<'a>> {
    let bells = prey.bells.iter().map(AsFd::as_fd);
    bells.take(below(prng, 6)).collect()
}
