//! The methods. None ever returns: a process that gives up attacks nothing.

use crate::calls;
use crate::edges::{below, edge16, edge32};
use crate::prey::Prey;
use crate::prng::Prng;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::protocol::birth::Born;
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::shared::{Doorbell, SharedMemory};
use bulkhead_ipc::window::{DeviceState, QueueLayout, Window};
use bulkhead_policies::denied::Attempt;
use bulkhead_runtime::wait::Waiter;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How the process attacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// Random bytes all over everything shared.
    Scribble,
    /// Used rings, with a believable publication before: indexes, descriptors and lengths that lie.
    Rings,
    /// A storm of publications: configuration, features, state.
    Publish,
    /// Doorbells rung without a pause.
    Ring,
    /// Doorbells filled to the brim, again and again.
    Fill,
    /// The control socket: floods of messages with descriptors, and of messages of other protocols.
    Flood,
    /// The control socket: well-formed lies.
    Lie,
    /// System calls that its policy denies. Each ends it.
    Calls,
    /// Computes, and touches nothing: what a CPU costs that it takes.
    Burn,
    /// Nothing at all: never publishes, never reads, never answers.
    Silent,
}

/// Between two rounds of most methods.
const PAUSE: Duration = Duration::from_millis(1);
/// From a process's start to the call that ends it.
pub(crate) const BETWEEN_CALLS: Duration = Duration::from_millis(110);
/// Lies of one round.
const LIES: usize = 50;
/// Words that the legacy page must not get: a bit there asks for a reset of the machine, which the
/// keyboard controller may do at any time, and which would end the test.
const RESET_WORD: std::ops::Range<usize> = 0x80..0x84;

impl Method {
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "scribble" => Self::Scribble,
            "rings" => Self::Rings,
            "publish" => Self::Publish,
            "ring" => Self::Ring,
            "fill" => Self::Fill,
            "flood" => Self::Flood,
            "lie" => Self::Lie,
            "calls" => Self::Calls,
            "burn" => Self::Burn,
            "silent" => Self::Silent,
            _ => return None,
        })
    }
}

pub(crate) fn run(
    method: Method,
    call: Option<&Attempt>,
    prey: &mut Prey,
    channel: &Channel,
    prng: &mut Prng,
) -> ! {
    if !matches!(method, Method::Scribble | Method::Silent)
        && let Some(window) = &prey.window
    {
        window.publish(prey.features, &prey.config);
        prey.ring_all();
        // A guest has to run before it can take anything over.
        while window.driver().epoch.is_multiple_of(2) {
            let _woken = prey.waiter.sleep(Some(PAUSE));
        }
    }
    if let Some(call) = call {
        // Within the restarts that its policy allows.
        let born = Instant::now();
        while let Some(left) = BETWEEN_CALLS.checked_sub(born.elapsed()) {
            let _woken = prey.waiter.sleep(Some(left));
        }
        calls::attempt(call)
    }
    loop {
        port(method, prey, prng);
        match method {
            Method::Scribble => scribble(prey, prng),
            Method::Rings => rings(prey, prng),
            Method::Publish => publish(prey, prng),
            Method::Ring => (0..10_000).for_each(|_| prey.ring_all()),
            Method::Fill => fill(&prey.bells),
            Method::Flood => flood(prey, channel, prng),
            Method::Lie => (0..LIES).for_each(|_| lie(channel, prng)),
            Method::Burn => burn(),
            Method::Silent | Method::Calls => {}
        }
        if !matches!(method, Method::Ring | Method::Burn) {
            // A pause, so that gate and broker are given time to make a mistake.
            let pause = match method {
                Method::Silent | Method::Calls => Duration::from_secs(3600),
                _ => PAUSE,
            };
            // A descriptor that rings by itself cuts it short, which is as good.
            let _woken = prey.waiter.sleep(Some(pause));
        }
    }
}

/// Until the broker asks for a sign of life, as it does of everything that serves.
pub(crate) fn await_ping(channel: &Channel, waiter: &Waiter) {
    while let Ok(None) = channel.try_recv::<ToDevice>() {
        let _woken = waiter.sleep(Some(PAUSE));
    }
}

/// A millisecond or so of a CPU.
pub(crate) fn burn() {
    (0..1_000_000).for_each(|n| {
        std::hint::black_box(n);
    });
}

/// The port of a network card, if it has one.
fn port(method: Method, prey: &mut Prey, prng: &mut Prng) {
    let Some(port) = &mut prey.port else {
        return;
    };
    match method {
        Method::Scribble => port.scribble(prng),
        Method::Rings => {
            port.forge(prng);
            port.lie(prng);
        }
        Method::Publish => port.forge(prng),
        _ => {}
    }
}

fn scribble(prey: &Prey, prng: &mut Prng) {
    let windows = prey.window.iter().map(|window| &window.memory);
    for memory in windows.chain(&prey.pages) {
        for _ in 0..64 {
            let at = match below(prng, 3) {
                // Headers and rings are at the start.
                0 => below(prng, 0x2000.min(memory.len() - 8)),
                1 => below(prng, 0x200.min(memory.len() - 8)),
                _ => below(prng, memory.len() - 8),
            };
            if prey.window.is_some() || !RESET_WORD.contains(&(at & !3)) {
                memory.write(at & !3, edge32(prng));
            }
        }
    }
    prey.ring_all();
}

fn rings(prey: &Prey, prng: &mut Prng) {
    match &prey.window {
        Some(window) => {
            let queues = &window.layout.queues;
            if let Some(queue) = queues.get(below(prng, queues.len())) {
                lie_in_used_ring(&window.memory, *queue, prng);
            }
        }
        None => scribble(prey, prng),
    }
    prey.ring_all();
}

/// One lie, of a kind that a careless driver half would believe.
fn lie_in_used_ring(memory: &SharedMemory, queue: QueueLayout, prng: &mut Prng) {
    let index = memory.load::<u16>(queue.used_ring + 2, Ordering::Relaxed);
    let avail = memory.load::<u16>(queue.avail_ring + 2, Ordering::Relaxed);
    let place = usize::from(index) % usize::from(queue.descriptors);
    let element = queue.used_ring + 4 + 8 * place;
    match below(prng, 6) {
        // A head in flight, with more bytes than it has.
        0 => {
            memory.write(element, u32::from(edge16(prng) % queue.descriptors) & !3);
            memory.write(element + 4, edge32(prng));
            memory.store(
                queue.used_ring + 2,
                index.wrapping_add(1),
                Ordering::Release,
            );
        }
        // A descriptor that heads nothing.
        1 => {
            memory.write(element, edge32(prng));
            memory.write(element + 4, 0u32);
            memory.store(
                queue.used_ring + 2,
                index.wrapping_add(1),
                Ordering::Release,
            );
        }
        // The same request twice.
        2 => {
            let before = usize::from(index.wrapping_sub(1)) % usize::from(queue.descriptors);
            let again = memory.read::<u64>(queue.used_ring + 4 + 8 * before);
            memory.write(element, again);
            memory.store(
                queue.used_ring + 2,
                index.wrapping_add(1),
                Ordering::Release,
            );
        }
        // More than was ever asked.
        3 => memory.store(
            queue.used_ring + 2,
            avail.wrapping_add(edge16(prng)),
            Ordering::Release,
        ),
        // Backwards.
        4 => memory.store(
            queue.used_ring + 2,
            index.wrapping_sub(1),
            Ordering::Release,
        ),
        // The gate's own half: what it wrote must not be believed when it is read again.
        _ => {
            let at = queue.desc_table + below(prng, 16 * usize::from(queue.descriptors) / 8) * 8;
            memory.write(at, prng.draw());
            memory.write(queue.avail_ring + 4 + 2 * place, edge16(prng));
            memory.write(queue.avail_ring + 2, edge16(prng));
        }
    }
}

fn publish(prey: &Prey, prng: &mut Prng) {
    let Some(window) = &prey.window else {
        return scribble(prey, prng);
    };
    for _ in 0..256 {
        let mut config = prey.config.clone();
        let at = below(prng, config.len());
        if let Some(byte) = config.get_mut(at) {
            *byte = u8::try_from(prng.draw() & 0xff).unwrap_or(0);
        }
        window.publish(prng.draw(), &config);
        tell_state(window, prng);
        prey.ring_all();
    }
}

/// Mostly that all is well, or the attack would be over.
fn tell_state(window: &Window, prng: &mut Prng) {
    if below(prng, 100_000) == 0 {
        window.set_device_state(DeviceState::Failed);
    }
}

/// Fills doorbells, so that whoever rings one finds it full.
pub(crate) fn fill(bells: &[Doorbell]) {
    for bell in bells {
        // Full already is as good.
        let _full = bell.eventfd().write(u64::MAX - 1);
    }
}

/// A message that is none.
pub(crate) fn noise(prng: &mut Prng) -> Vec<u8> {
    (0..below(prng, 600))
        .map(|n| u8::try_from(n % 251).unwrap_or(0))
        .collect()
}

fn flood(prey: &Prey, channel: &Channel, prng: &mut Prng) {
    for _ in 0..1000 {
        let noise = noise(prng);
        let fds: Vec<_> = prey.bells.iter().map(AsFd::as_fd).collect();
        let sent = match below(prng, 3) {
            0 => channel.send(&noise, &fds),
            1 => channel.send(&FromDevice::Pong(prng.draw()), &fds),
            _ => channel.send(&FromDevice::Pong(prng.draw()), &[]),
        };
        if matches!(sent, Err(ChannelError::Full | ChannelError::Closed)) {
            return;
        }
    }
}

fn lie(channel: &Channel, prng: &mut Prng) {
    let _told = match below(prng, 4) {
        0 => channel.send(&FromDevice::Pong(prng.draw()), &[]),
        1 => channel.send(
            &Born::Locked {
                version: 77,
                landlock_abi: 255,
                program: "\u{1b}[2J".repeat(200),
            },
            &[],
        ),
        2 => channel.send(
            &FromDevice::Dial {
                id: prng.draw(),
                port: edge32(prng),
                asked_ms: prng.draw(),
            },
            &[],
        ),
        _ => channel.send(
            &FromDevice::Fault {
                reason: "\u{1b}]0;taken over\u{7}\r\n".repeat(below(prng, 40)),
            },
            &[],
        ),
    };
}
