//! The switch of a virtual network that was taken over, or the process of a card in one. Other networks and other cards go on, and so
//! do the guests, the broker and the processes at the other ends. A switch that is found out is replaced; of a card
//! that is, the port carries nothing.

use super::{GROWTH_KIB, METHODS, resident_kib};
use bulkhead_tests::{Daemon, Programs, is_alive, kill};
use serde_json::Value;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// How long an attack goes on that nobody ends.
const ATTACK: Duration = Duration::from_secs(2);
/// Methods by which the broker finds a switch out: it floods, says what cannot be, or does not answer.
const FOUND_OUT: [&str; 3] = ["flood", "lie", "silent"];
/// Private memory of a switch with few ports at most, in KiB.
const SWITCH_KIB_MAX: u64 = 16_384;

fn until<T>(daemon: &Daemon, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: {}", daemon.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn show(daemon: &Daemon, network: &str) -> Value {
    daemon.json(&["network", "show", network])
}

/// Two machines that are nobody's enemy: one takes verified data from the other for as long as they live.
fn peers_in(daemon: &Daemon, network: &str) {
    let net = format!("network={network}");
    let serves = "mode=net seconds=1000 ip=dhcp size=8m offload=1";
    daemon.create_and_start("other", serves, &["--net", &net]);
    daemon.until_output("other", "BH net.ready");
    let takes =
        format!("mode=net-peer seconds=1000 ip=dhcp peer=other.{network}.internal offload=1");
    daemon.create_and_start("peer", &takes, &["--net", &net]);
    daemon.until_output("peer", "BH net.peer ");
}

/// How often data was taken, all of which was right.
fn taken(daemon: &Daemon) -> usize {
    let output = daemon.output_of("peer");
    // The last line may be half of one.
    let whole = output.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let streams = whole
        .lines()
        .filter(|line| line.starts_with("BH net.peer "));
    let streams: Vec<_> = streams.collect();
    for stream in &streams {
        assert!(
            stream.contains("reached=1") && stream.contains("wrong=0"),
            "{stream}"
        );
    }
    streams.len()
}

/// The peers have taken more, both machines run, and the switch between them is the one that it was.
fn peers_go_on(daemon: &Daemon, network: &str, switch: u32, before: usize) {
    until(daemon, "no data is taken any more", || {
        (taken(daemon) > before).then_some(())
    });
    for machine in ["other", "peer"] {
        assert_eq!(daemon.state_of(machine), "running");
    }
    assert_eq!(daemon.switch_of(network), switch);
    assert_eq!(show(daemon, network)["restarts"], 0);
}

fn nobody_grows(what: &str, daemon: &Daemon, before: u64, switch: u32) {
    let broker = resident_kib(daemon.pid()).unwrap();
    assert!(
        broker <= before + GROWTH_KIB,
        "{what}: the broker grew from {before} to {broker} KiB"
    );
    let switch = resident_kib(switch).unwrap();
    assert!(switch <= SWITCH_KIB_MAX, "{what}: {switch} KiB");
}

fn log_is_sound(what: &str, daemon: &Daemon) {
    let log = daemon.log();
    assert!(!log.contains('\u{1b}'), "{what}: {log:?}");
    assert!(!log.contains("panicked"), "{what}: {log}");
}

fn remove(daemon: &Daemon, machine: &str) {
    daemon.good(&["kill", machine]);
    daemon.until_state(machine, "stopped");
    daemon.good(&["rm", machine]);
}

#[test]
fn taken_over_switch_harms_nobody_else_and_its_successor_serves() {
    let programs = Programs::with("switch", "bulkhead-hostile");
    let daemon = Daemon::of(&programs);
    daemon.good(&["network", "create", "blue"]);
    peers_in(&daemon, "blue");
    let blue = daemon.switch_of("blue");
    let kib = resident_kib(daemon.pid()).unwrap();
    for (method, seed) in METHODS.into_iter().zip(1..) {
        let network = format!("hostile-{method}-{seed}-once");
        let net = format!("network={network}");
        daemon.good(&["network", "create", &network]);
        let waits = "mode=net seconds=1000 ip=dhcp patience=120000 size=1m";
        daemon.create_and_start("victim", waits, &["--net", &net]);
        let card = daemon.process("victim", "net");
        let before = taken(&daemon);
        if FOUND_OUT.contains(&method) {
            until(&daemon, method, || {
                let shown = show(&daemon, &network);
                (shown["restarts"].as_u64() > Some(0)).then_some(())
            });
        } else {
            let hostile = daemon.switch_of(&network);
            std::thread::sleep(ATTACK);
            assert!(is_alive(hostile), "{method}: {}", daemon.log());
            kill(hostile);
        }
        peers_go_on(&daemon, "blue", blue, before);
        nobody_grows(method, &daemon, kib, blue);
        // Its card's process has stood everything, and so has the guest.
        daemon.until_output("victim", "BH net.ready");
        assert_eq!(daemon.process("victim", "net"), card, "{method}");
        let takes = format!("mode=net-peer,idle ip=dhcp peer=victim.{network}.internal");
        daemon.create_and_start("friend", &takes, &["--net", &net]);
        daemon.until_output("friend", "BH net-peer result=ok rounds=1 reached=1");
        for machine in ["friend", "victim"] {
            remove(&daemon, machine);
        }
        daemon.good(&["network", "rm", &network]);
        log_is_sound(method, &daemon);
    }
}

#[test]
fn taken_over_card_costs_its_own_port_alone() {
    let programs = Programs::with("net", "bulkhead-hostile");
    let daemon = Daemon::of(&programs);
    daemon.good(&["network", "create", "lab"]);
    peers_in(&daemon, "lab");
    let switch = daemon.switch_of("lab");
    let kib = resident_kib(daemon.pid()).unwrap();
    for (method, seed) in METHODS.into_iter().zip(1..) {
        let name = format!("hostile-{method}-{seed}");
        let before = taken(&daemon);
        let sends = "mode=net seconds=1000 ip=10.87.0.9";
        daemon.create_and_start(&name, sends, &["--net", "network=lab"]);
        std::thread::sleep(ATTACK);
        peers_go_on(&daemon, "lab", switch, before);
        nobody_grows(method, &daemon, kib, switch);
        // Its guest may have ended by itself.
        let _ended_or_not = daemon.run(&["kill", &name]);
        daemon.good(&["rm", "--force", &name]);
        log_is_sound(method, &daemon);
    }
    // It was found out, and only it.
    let log = daemon.log();
    let broken = log
        .lines()
        .filter(|line| line.contains("a port carries nothing"));
    let broken: Vec<_> = broken.collect();
    assert!(!broken.is_empty(), "{log}");
    let peers = broken
        .iter()
        .filter(|line| line.contains("port=0 ") || line.contains("port=1 "));
    assert_eq!(peers.count(), 0, "{broken:?}");
    let before = taken(&daemon);
    peers_go_on(&daemon, "lab", switch, before);
}
