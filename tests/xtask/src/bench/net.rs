//! `net.*`: frames from one machine to another. Bulkhead's two are in a virtual network of a daemon's, as users make
//! one; QEMU's have a TAP interface each in one bridge of the kernel's, in a network of the benchmark's own.
//!
//! The guest program sends and counts by itself (mode `bench-net`) and sleeps while it waits, on both sides: it keeps a
//! number of frames on their way, and the receiver says what has come. Times are those of the sender's clock.
//!
//! `net.flood` and `net.storm` are the throughput beside a machine of another tenant that sends what it can, to one
//! machine that does not listen and to all of them; the peer is the same beside such a machine in another network, which
//! takes as much of the CPUs.
//!
//! `net.idle_*` is what the process of a switch costs whose [`IDLE_MACHINES`] machines have [`IDLE_CARDS`] cards each
//! and leave them alone.

use super::Print;
use super::cpu;
use super::figure::Figure;
use super::guest::{Bench, Vmm, text, value};
use super::memory::{IDLE, SETTLE};
use crate::daemon::{Daemon, Place};
use crate::{command, packages, process};
use anyhow::{Context, Result, anyhow, bail, ensure};
use bulkhead::api::{NetworkDetails, NetworkState};
use nix::sched::{CloneFlags, unshare};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

const SECONDS: u32 = 1;
/// Guest memory of Bulkhead's machines.
const MEMORY: &str = "128MiB";
const NETWORK: &str = "bench";
const OTHER_NETWORK: &str = "other";
/// How long a flood goes on: longer than any measurement beside it.
const FLOOD_S: u32 = 600;
/// What it sends; 50 machines of a network have addresses below this one.
const FLOOD: &str = "mode=bench-net op=flood ip=dhcp peer=10.87.0.250 qd=256 bs=64";
/// How long a guest may take to say that it answers.
const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);
const IDLE_MACHINES: usize = 10;
const IDLE_CARDS: usize = 10;
/// Address of a machine that is flooded.
const VICTIM: &str = "52:54:00:00:01:00";
const VHOST: &str = "/dev/vhost-net";

/// What is measured, with so many frames on their way.
struct Load {
    name: &'static str,
    unit: &'static str,
    arguments: &'static str,
    /// The figure, from counts and kHz of the sender's record.
    figure: fn(&str) -> Result<f64>,
}

const LOADS: [Load; 4] = [
    // One frame waits for the answer to the one before.
    Load {
        name: "net.rr_latency",
        unit: "us",
        arguments: "qd=1 bs=64",
        figure: median_us,
    },
    Load {
        name: "net.tput_64",
        unit: "pkt/s",
        arguments: "qd=256 bs=64",
        figure: |keys| per_second(keys, "frames"),
    },
    Load {
        name: "net.tput_1500",
        unit: "MB/s",
        arguments: "qd=128 bs=1500",
        figure: |keys| Ok(per_second(keys, "bytes")? / 1e6),
    },
    // What Linux makes of a stream whose segments are of 1460 bytes: 44 of them.
    Load {
        name: "net.tput_tso",
        unit: "MB/s",
        arguments: "qd=4 bs=64294",
        figure: |keys| Ok(per_second(keys, "bytes")? / 1e6),
    },
];

/// Who moves the frames between QEMU and its TAP interface.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// QEMU itself.
    Qemu,
    /// A thread of the kernel's.
    Vhost,
}

pub(super) fn run(bench: &Bench, print: &mut Print<'_>) -> Result<()> {
    if bench.has_peer() {
        packages::ensure(&["iproute2"])?;
        let is_root = nix::unistd::geteuid().is_root();
        ensure!(
            is_root,
            "only root can make QEMU's network; --no-peer leaves QEMU out"
        );
    }
    let host = Host::start(bench)?;
    all(bench, &host, Peer::Qemu, print)?;
    if bench.has_peer() && Path::new(VHOST).exists() {
        all(bench, &host, Peer::Vhost, print)?;
    }
    floods(bench, &host, print)?;
    idle(bench, &host, print)
}

/// What a machine costs its network that sends what it can.
fn floods(bench: &Bench, host: &Host, print: &mut Print<'_>) -> Result<()> {
    let load = &LOADS[2];
    for (name, is_storm) in [("net.flood", false), ("net.storm", true)] {
        let (mut beside, mut apart) = (Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            for (network, found) in [(NETWORK, &mut beside), (OTHER_NETWORK, &mut apart)] {
                let _flood = host.flood(network, is_storm)?;
                found.push((load.figure)(&host.between_machines(load)?)?);
            }
        }
        let figure = Figure::new(name, load.unit, beside, apart);
        print(figure.beside("flood in another network"))?;
    }
    Ok(())
}

fn all(bench: &Bench, host: &Host, peer: Peer, print: &mut Print<'_>) -> Result<()> {
    for load in &LOADS {
        let (ours, peers) = bench.alternate(|vmm| {
            let keys = match vmm {
                Vmm::Qemu => in_own_network(|| between_qemus(bench, load, peer))?,
                _ => host.between_machines(load)?,
            };
            (load.figure)(&keys)
        })?;
        let figure = |name: String| Figure::new(name, load.unit, ours, peers);
        print(match peer {
            Peer::Qemu => figure(load.name.to_owned()),
            Peer::Vhost => figure(format!("{}_vhost", load.name)).beside("qemu-microvm, vhost-net"),
        })?;
    }
    Ok(())
}

/// Measures a switch that has nothing to do.
#[expect(clippy::cast_precision_loss, reason = "KiB of one process")]
fn idle(bench: &Bench, host: &Host, print: &mut Print<'_>) -> Result<()> {
    let _machines = (0..IDLE_MACHINES)
        .map(|number| host.machine(&format!("idle{number}"), "mode=idle", IDLE_CARDS))
        .collect::<Result<Vec<_>>>()?;
    let switch = host.switch(IDLE_MACHINES * IDLE_CARDS)?;
    sleep(SETTLE);
    let (mut percent, mut kib) = (Vec::new(), Vec::new());
    for _ in 0..bench.runs {
        percent.push(cpu::watch(switch, IDLE).all * 100.0);
        kib.push(process::pss_kib(switch, u64::MAX)?.0 as f64);
    }
    print(Figure::new("net.idle_cpu", "%", percent, Vec::new()))?;
    print(Figure::new("net.idle_memory", "KiB", kib, Vec::new()))
}

/// The figure of one frame at a time: half of the round trips took no longer.
#[expect(clippy::cast_precision_loss, reason = "cycles of a second")]
fn median_us(keys: &str) -> Result<f64> {
    Ok(value(keys, "gap_median")? as f64 * 1e3 / value(keys, "tsc_khz")? as f64)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one second are far below 2^52"
)]
fn per_second(keys: &str, key: &str) -> Result<f64> {
    let seconds = value(keys, "cycles")? as f64 / (value(keys, "tsc_khz")? as f64 * 1e3);
    Ok(value(keys, key)? as f64 / seconds)
}

fn answering(ip: &str) -> String {
    format!("mode=bench-net op=answer ip={ip}")
}

/// `ready` is the record of the one that answers.
fn sending(load: &Load, ip: &str, ready: &str) -> Result<String> {
    let (peer, mac) = (text(ready, "ip")?, text(ready, "mac")?);
    Ok(format!(
        "mode=bench-net op=send ip={ip} peer={peer} mac={mac} {} seconds={SECONDS}",
        load.arguments
    ))
}

/// A daemon with a network.
struct Host {
    place: Place,
    _daemon: Daemon,
    kernel: String,
}

impl Host {
    fn start(bench: &Bench) -> Result<Self> {
        let place = bench.place();
        let daemon = Daemon::start(&place)?;
        place.run(&["network", "create", NETWORK])?;
        place.run(&["network", "create", OTHER_NETWORK])?;
        Ok(Self {
            place,
            _daemon: daemon,
            kernel: bench.guest().display().to_string(),
        })
    }

    /// A machine that floods `network`, and its victim, if it is not everybody.
    fn flood(&self, network: &str, is_storm: bool) -> Result<[Machine<'_>; 2]> {
        let net = format!("network={network},tenant=flood");
        let victim = format!("{net},mac={VICTIM}");
        let victim = self.machine_in("victim", "mode=idle", &[&victim])?;
        let mac = if is_storm {
            "ff:ff:ff:ff:ff:ff"
        } else {
            VICTIM
        };
        let flood = format!("{FLOOD} mac={mac} seconds={FLOOD_S}");
        let floods = self.machine_in("floods", &flood, &[&net])?;
        let until = Instant::now() + PATIENCE;
        while floods.record("bench-net.flood")?.is_none() {
            ensure!(Instant::now() < until, "the guest does not flood");
            sleep(POLL);
        }
        Ok([floods, victim])
    }

    /// The sender's last record.
    fn between_machines(&self, load: &Load) -> Result<String> {
        let answers = self.machine("answers", &answering("dhcp"), 1)?;
        let until = Instant::now() + PATIENCE;
        let ready = loop {
            if let Some(ready) = answers.record("bench-net.ready")? {
                break ready;
            }
            ensure!(Instant::now() < until, "the guest does not answer");
            sleep(POLL);
        };
        let sends = self.machine("sends", &sending(load, "dhcp", &ready)?, 1)?;
        let waited = self.place.run(&["wait", &sends.name]);
        // An error that a guest reports says more than how its machine has ended.
        answers.record("bench-net.ready")?;
        let keys = sends.record("bench-net.end")?;
        waited.and_then(|_| keys.context("no frames came"))
    }

    fn machine(&self, name: &str, cmdline: &str, cards: usize) -> Result<Machine<'_>> {
        let net = format!("network={NETWORK}");
        self.machine_in(name, cmdline, &vec![net.as_str(); cards])
    }

    /// A machine with these cards.
    fn machine_in(&self, name: &str, cmdline: &str, cards: &[&str]) -> Result<Machine<'_>> {
        let about = ["create", "--name", name, "--kernel", &self.kernel];
        let nets: Vec<&str> = cards.iter().flat_map(|&net| ["--net", net]).collect();
        let machine = Machine {
            place: &self.place,
            name: name.to_owned(),
        };
        let guest = ["-m", MEMORY, "--cmdline", cmdline];
        self.place.run(&[&about[..], &guest, &nets].concat())?;
        self.place.run(&["start", name])?;
        Ok(machine)
    }

    /// The pid of the switch, once it has met so many cards.
    fn switch(&self, ports: usize) -> Result<u32> {
        let until = Instant::now() + PATIENCE;
        loop {
            let text = self.place.run(&["network", "show", NETWORK, "--json"])?;
            let network: NetworkDetails = serde_json::from_str(&text)?;
            let is_serving = network.summary.state == NetworkState::Serving;
            if let Some(pid) = network.pid.filter(|_| is_serving)
                && network.cards.iter().filter(|card| card.connected).count() == ports
            {
                return Ok(u32::try_from(pid)?);
            }
            ensure!(Instant::now() < until, "no switch of {ports} cards: {text}");
            sleep(POLL);
        }
    }
}

/// A machine of the daemon's. Dropped, it is removed.
struct Machine<'a> {
    place: &'a Place,
    name: String,
}

impl Machine<'_> {
    /// The keys of a record, if it was written.
    fn record(&self, name: &str) -> Result<Option<String>> {
        let output = self.place.run(&["logs", &self.name, "--console"])?;
        if let Some(error) = output.lines().find(|line| line.starts_with("BH error")) {
            bail!("the guest reports: {error}");
        }
        let lines = output.split_inclusive('\n');
        // The last may still be on its way.
        let whole = lines.filter_map(|line| line.strip_suffix('\n'));
        let mut records = whole.filter_map(|line| line.strip_prefix("BH ")?.split_once(' '));
        let found = records.find(|(kind, _)| *kind == name);
        Ok(found.map(|(_, keys)| keys.to_owned()))
    }
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.place.run(&["rm", "--force", &self.name]) {
            eprintln!("warning: a machine may be left: {error:#}");
        }
    }
}

/// The sender's last record.
fn between_qemus(bench: &Bench, load: &Load, peer: Peer) -> Result<String> {
    for words in ["link add bridge0 type bridge", "link set bridge0 up"] {
        ip(words)?;
    }
    let machine = |number: u8, arguments: &str| {
        let tap = format!("tap{number}");
        ip(&format!("tuntap add {tap} mode tap"))?;
        ip(&format!("link set {tap} master bridge0 up"))?;
        let mut qemu = bench.command(Vmm::Qemu, &format!("{arguments} end=debug:0"), None);
        plug_in(&mut qemu, &tap, number, peer);
        bench.spawn(qemu)
    };
    let mut answers = machine(0, &answering("10.0.0.2"))?;
    let (_, ready) = answers.record("bench-net.ready")?;
    let mut sends = machine(1, &sending(load, "10.0.0.3", &ready)?)?;
    let (_, keys) = sends.record("bench-net.end")?;
    let _exit_code = sends.finish()?;
    Ok(keys)
}

fn plug_in(qemu: &mut Command, tap: &str, number: u8, peer: Peer) {
    let vhost = if peer == Peer::Vhost { "on" } else { "off" };
    qemu.arg("-netdev").arg(format!(
        "tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}"
    ));
    qemu.arg("-device").arg(format!(
        "virtio-net-device,netdev=net,mac=52:54:00:00:00:{number:02x}"
    ));
}

/// Runs `work` in a network that nobody else is in. It vanishes with the last process that was started there, however
/// this one ends.
fn in_own_network<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        // Threads have networks of their own, and this one ends.
        let inside = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
            work()
        });
        inside.join().map_err(|_| anyhow!("a thread panicked"))?
    })
}

fn ip(words: &str) -> Result<()> {
    command::output(command::command("ip").args(words.split(' '))).map(drop)
}
