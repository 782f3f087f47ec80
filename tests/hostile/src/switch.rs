//! Plays the switch of a virtual network that a guest has taken over: it has the ports that its broker has given it, and the
//! channel to it. It answers, unless it attacks by not doing so, since one that is silent is soon replaced.

use crate::attack::{Method, burn, fill, noise};
use crate::edges::{below, edge16, edge32};
use crate::port::PortPrey;
use crate::prng::Prng;
use bulkhead_ipc::channel::{Channel, ChannelError};
use bulkhead_ipc::port::PortEnd;
use bulkhead_ipc::protocol::birth::Born;
use bulkhead_ipc::protocol::switch::{
    CAUSES, FromSwitch, LEASES_MAX, LeaseTerms, PORT_FDS, PORTS_MAX, PortReport, ToSwitch,
};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_runtime::wait::Waiter;
use bulkhead_runtime::{Newborn, Stillbirth};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Between two rounds of most methods.
const PAUSE: Duration = Duration::from_millis(1);
/// Between two lies: a switch may say so much for ever.
const BETWEEN_LIES: Duration = Duration::from_millis(25);
/// Of so many lies one is longer than a message may be.
const LIES_PER_LONG_ONE: usize = 100;
/// What a terminal would obey.
const ESCAPES: &str = "\u{1b}]0;taken over\u{7}\u{1b}[2J\r\n";

/// A port, and what was told of it.
#[derive(Debug)]
struct Held {
    generation: u32,
    mac: [u8; 6],
    prey: PortPrey,
}

/// Lives until it is killed.
pub(crate) fn run(
    method: Method,
    newborn: Newborn,
    prng: &mut Prng,
) -> Result<Infallible, Stillbirth> {
    let waiter = Waiter::new().map_err(Stillbirth::setup)?;
    newborn.watch_brokers(&waiter, 0)?;
    let (control, _id) = newborn.lock()?;
    let channel = control.channel();
    let mut ports = BTreeMap::new();
    loop {
        if method != Method::Silent {
            listen(channel, &mut ports);
        }
        let mut pause = PAUSE;
        match method {
            Method::Scribble => ports.values().for_each(|held| held.prey.scribble(prng)),
            Method::Rings | Method::Calls => {
                for held in ports.values_mut() {
                    held.prey.forge(prng);
                    held.prey.lie(prng);
                }
            }
            Method::Publish => ports.values_mut().for_each(|held| held.prey.forge(prng)),
            Method::Ring => {
                for _ in 0..10_000 {
                    ports.values().for_each(|held| held.prey.ring());
                }
                pause = Duration::ZERO;
            }
            Method::Fill => ports
                .values()
                .for_each(|held| fill(std::slice::from_ref(held.prey.bell()))),
            Method::Flood => flood(channel, &ports, prng),
            Method::Lie => {
                lie(channel, &ports, prng);
                pause = BETWEEN_LIES;
            }
            Method::Burn => {
                burn();
                pause = Duration::ZERO;
            }
            Method::Silent => pause = Duration::from_secs(3600),
        }
        let _woken = waiter.sleep(Some(pause));
    }
}

/// Takes ports, and shows that it lives. It does not end when it is asked to.
fn listen(channel: &Channel, ports: &mut BTreeMap<u16, Held>) {
    while let Ok(Some((message, fds))) = channel.try_recv::<ToSwitch>() {
        match message {
            ToSwitch::Ping(number) => {
                let _full = channel.send(&FromSwitch::Pong(number), &[]);
            }
            ToSwitch::SetPort {
                id,
                generation,
                terms,
            } => {
                let Ok([memory, _own, bell]) = <[OwnedFd; PORT_FDS]>::try_from(fds) else {
                    continue;
                };
                if let Ok(prey) = PortPrey::take(memory, PortEnd::Switch, Doorbell::from(bell)) {
                    let mac = terms.mac;
                    ports.insert(
                        id,
                        Held {
                            generation,
                            mac,
                            prey,
                        },
                    );
                }
            }
            ToSwitch::RemovePort(id) => {
                ports.remove(&id);
            }
            _ => {}
        }
    }
}

fn flood(channel: &Channel, ports: &BTreeMap<u16, Held>, prng: &mut Prng) {
    for _ in 0..1000 {
        let bells: Vec<_> = ports
            .values()
            .map(|held| held.prey.bell().as_fd())
            .collect();
        let sent = match below(prng, 3) {
            0 if below(prng, 200) == 0 => channel.send(&noise(prng), &bells),
            1 => channel.send(&FromSwitch::Pong(prng.draw()), &bells),
            _ => channel.send(&FromSwitch::Pong(prng.draw()), &[]),
        };
        if matches!(sent, Err(ChannelError::Full | ChannelError::Closed)) {
            return;
        }
    }
}

/// Leases of machines that are there and of others, of any addresses and for ever.
fn leases(ports: &BTreeMap<u16, Held>, count: usize, prng: &mut Prng) -> Vec<LeaseTerms> {
    let macs: Vec<_> = ports.values().map(|held| held.mac).collect();
    let lease = |_| LeaseTerms {
        mac: match macs.get(below(prng, 2 * macs.len())) {
            Some(mac) => *mac,
            None => edge_mac(prng),
        },
        address: match below(prng, 2) {
            0 => [10, 87, 0, low_byte(prng)].into(),
            _ => edge32(prng).into(),
        },
        left_s: edge32(prng),
    };
    (0..count).map(lease).collect()
}

fn low_byte(prng: &mut Prng) -> u8 {
    u8::try_from(prng.draw() & 0xff).unwrap_or(0)
}

fn edge_mac(prng: &mut Prng) -> [u8; 6] {
    let [.., a, b, c, d, e, f] = prng.draw().to_be_bytes();
    [a, b, c, d, e, f]
}

fn reports(count: usize, prng: &mut Prng) -> Vec<PortReport> {
    let report = |_| PortReport {
        id: edge16(prng),
        generation: edge32(prng),
        is_met: below(prng, 2) == 0,
        frames_in: u64::MAX,
        bytes_in: prng.draw(),
        frames_out: u64::MAX,
        bytes_out: prng.draw(),
        dropped: [u64::MAX; CAUSES],
    };
    (0..count).map(report).collect()
}

fn lie(channel: &Channel, ports: &BTreeMap<u16, Held>, prng: &mut Prng) {
    let (count, own) = (below(prng, 60), below(prng, ports.len()));
    let (id, generation) = match ports.iter().nth(own) {
        Some((id, held)) if below(prng, 2) == 0 => (*id, held.generation),
        _ => (edge16(prng), edge32(prng)),
    };
    let reason = ESCAPES.repeat(count);
    let long = below(prng, LIES_PER_LONG_ONE) == 0;
    let message = match below(prng, 6) {
        0 if long => FromSwitch::Leased(leases(ports, LEASES_MAX + 1, prng)),
        1 if long => FromSwitch::Ports(reports(PORTS_MAX + 1, prng)),
        2 if long => {
            let born = Born::Failed { reason };
            let _told = channel.send(&born, &[]);
            return;
        }
        0 | 1 => FromSwitch::Leased(leases(ports, count, prng)),
        2 => FromSwitch::Ports(reports(count, prng)),
        3 => FromSwitch::Captured { missed: u64::MAX },
        4 => FromSwitch::Refused {
            id,
            generation,
            reason,
        },
        _ => FromSwitch::Broke {
            id,
            generation,
            reason,
        },
    };
    let _told = channel.send(&message, &[]);
}
