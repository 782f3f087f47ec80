//! Virtual networks: machines in one reach each other by address and by name, hold what they are held to, and lose no more
//! than frames when a process between them dies.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::network::{self, Network};
use bulkhead_tests::prng::Prng;
use bulkhead_tests::{Daemon, is_alive, kill};
use serde_json::Value;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

/// The word behind `key=` in the last record of the guest that begins with `record`.
fn told(daemon: &Daemon, vm: &str, record: &str, key: &str) -> String {
    let output = daemon.output_of(vm);
    let line = output.lines().rev().find(|line| line.contains(record));
    let line = line.unwrap_or_else(|| panic!("no {record} in {output}"));
    let word = line
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    word.unwrap_or_else(|| panic!("no {key} in {line}"))
        .to_owned()
}

/// A machine that serves data in `network`.
fn serve_in(daemon: &Daemon, network: &str, name: &str, more: &str) {
    let cmdline = format!("mode=net seconds=1000 {more}");
    let net = format!("network={network}");
    daemon.create_and_start(name, &cmdline, &["--net", &net]);
    daemon.until_output(name, "BH net.ready");
}

/// A machine that takes data in `network`, whose last record says what came of it.
fn ask_in(daemon: &Daemon, network: &str, name: &str, more: &str) {
    let cmdline = format!("mode=net-peer,idle {more}");
    let net = format!("network={network}");
    daemon.create_and_start(name, &cmdline, &["--net", &net]);
}

fn card<'a>(shown: &'a Value, machine: &str) -> &'a Value {
    let cards = shown["cards"].as_array().unwrap();
    let card = cards.iter().find(|card| card["machine"] == machine);
    card.unwrap_or_else(|| panic!("{machine} is not in {shown}"))
}

fn dropped(daemon: &Daemon, network: &str, machine: &str, cause: &str) -> u64 {
    let shown = daemon.json(&["network", "show", network]);
    let counters = &card(&shown, machine)["counters"];
    counters["dropped"][cause].as_u64().unwrap_or(0)
}

#[test]
fn machines_lease_addresses_and_reach_each_other_by_name() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    assert!(
        daemon
            .good(&["network", "create", "lab"])
            .contains("already")
    );
    daemon.fails(
        &["network", "create", "lab", "--isolated"],
        6,
        "another one",
    );
    assert_eq!(daemon.json(&["network", "list"])[0]["state"], "idle");
    serve_in(&daemon, "lab", "db", "ip=dhcp size=3m offload=1");
    let db = told(&daemon, "db", "net.lease", "ip");
    assert!(db.starts_with("10.87.0."), "{db}");
    ask_in(
        &daemon,
        "lab",
        "web",
        "ip=dhcp peer=db.lab.internal rounds=3",
    );
    daemon.until_output("web", "net-peer result=ok");
    assert_eq!(told(&daemon, "web", "net.name", "ip"), db);
    assert_eq!(told(&daemon, "web", "BH net-peer result", "reached"), "3");
    assert_eq!(
        told(&daemon, "web", "net.peer ", "bytes"),
        (3 << 20).to_string()
    );
    assert_eq!(told(&daemon, "web", "net.peer ", "wrong"), "0");
    assert_ne!(told(&daemon, "web", "net.lease", "ip"), db);
    let shown = daemon.json(&["network", "show", "lab"]);
    assert_eq!(card(&shown, "db")["address"], db.as_str());
    let sent = card(&shown, "db")["counters"]["bytes_in"].as_u64().unwrap();
    assert!(sent > 9 << 20, "{shown}");
    assert_eq!(shown["leases"].as_array().unwrap().len(), 2);
    daemon.fails(&["network", "rm", "lab"], 6, "used by");
    for machine in ["web", "db"] {
        daemon.good(&["kill", machine]);
        daemon.until_state(machine, "stopped");
    }
    let deadline = Instant::now() + PATIENCE;
    while daemon.json(&["network", "list"])[0]["state"] != "idle" {
        assert!(
            Instant::now() < deadline,
            "a switch is left: {}",
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    daemon.good(&["network", "rm", "lab"]);
    assert_eq!(daemon.json(&["network", "list"]), Value::Array(vec![]));
    daemon.fails(&["start", "db"], 2, "there is no network lab");
}

#[test]
fn networks_and_isolated_machines_are_apart() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "red"]);
    daemon.good(&["network", "create", "blue"]);
    daemon.good(&["network", "create", "cells", "--isolated", "--no-subnet"]);
    // The same addresses in both networks: they are others.
    serve_in(&daemon, "red", "server", "ip=dhcp");
    let server = told(&daemon, "server", "net.lease", "ip");
    let ask = format!("ip=dhcp peer={server} patience=3000");
    ask_in(&daemon, "blue", "stranger", &ask);
    daemon.until_output("stranger", "net-peer result=ok");
    assert_eq!(told(&daemon, "stranger", "net.peer ", "reached"), "0");
    ask_in(&daemon, "red", "friend", &ask);
    daemon.until_output("friend", "net-peer result=ok");
    assert_eq!(told(&daemon, "friend", "net.peer ", "reached"), "1");
    serve_in(&daemon, "cells", "one", "ip=10.0.0.2");
    ask_in(
        &daemon,
        "cells",
        "two",
        "ip=10.0.0.3 peer=10.0.0.2 patience=3000",
    );
    daemon.until_output("two", "net-peer result=ok");
    assert_eq!(told(&daemon, "two", "net.peer ", "reached"), "0");
}

/// Whether `name`, which is started in `network`, reaches the server at `peer`.
fn reaches(daemon: &Daemon, network: &str, name: &str, peer: &str) -> bool {
    ask_in(daemon, network, name, &format!("{peer} patience=3000"));
    daemon.until_output(name, "net-peer result=ok");
    told(daemon, name, "net.peer ", "reached") != "0"
}

#[test]
fn tenants_and_vlans_of_one_network_are_apart() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    serve_in(
        &daemon,
        "lab,tenant=red,address=10.87.0.50",
        "red",
        "ip=dhcp",
    );
    assert_eq!(told(&daemon, "red", "net.lease", "ip"), "10.87.0.50");
    let ask = "ip=dhcp peer=10.87.0.50";
    assert!(reaches(&daemon, "lab,tenant=red", "friend", ask));
    assert!(!reaches(&daemon, "lab,tenant=blue", "stranger", ask));
    assert!(!reaches(&daemon, "lab", "nobodys", ask));
    let shown = daemon.json(&["network", "show", "lab"]);
    assert_eq!(card(&shown, "red")["tenant"], "red");
    assert_eq!(card(&shown, "red")["addresses"][0], "10.87.0.50");
    // The next switch is told the same.
    kill(daemon.switch_of("lab"));
    assert!(reaches(&daemon, "lab,tenant=red", "another-friend", ask));
    assert!(!reaches(
        &daemon,
        "lab,tenant=blue",
        "another-stranger",
        ask
    ));
    serve_in(
        &daemon,
        "lab,vlan=7,address=10.1.0.2",
        "seven",
        "ip=10.1.0.2",
    );
    let ask = "ip=10.1.0.3 peer=10.1.0.2";
    let same = "lab,vlan=7,address=10.1.0.3";
    assert!(reaches(&daemon, same, "inside", ask));
    let other = "lab,vlan=8,address=10.1.0.3";
    assert!(!reaches(&daemon, other, "outside", ask));
    assert!(!reaches(&daemon, "lab,address=10.1.0.3", "untagged", ask));
    daemon.good(&["network", "create", "cells", "--isolated", "--no-subnet"]);
    let create = |name, net| {
        daemon.create(name, "mode=idle", &["--net", net]);
        daemon.fails(&["start", name], 2, "takes no such card");
    };
    create("tenant-of-cells", "network=cells,tenant=red");
    create("gateway", "network=lab,address=10.87.0.1");
}

#[test]
fn machine_sends_in_nobody_elses_name() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    serve_in(&daemon, "lab", "db", "ip=dhcp");
    let db = told(&daemon, "db", "net.lease", "ip");
    // An address that it was not leased.
    let ask = format!("ip=10.87.0.77 peer={db} patience=3000");
    ask_in(&daemon, "lab", "thief", &ask);
    daemon.until_output("thief", "net-peer result=ok");
    assert_eq!(told(&daemon, "thief", "net.peer ", "reached"), "0");
    assert!(dropped(&daemon, "lab", "thief", "spoofed_address") > 0);
    // Another card's Ethernet address.
    ask_in(&daemon, "lab", "liar", "ip=dhcp foreign=1 patience=3000");
    daemon.until_output("liar", "net-peer result=ok");
    assert_eq!(told(&daemon, "liar", "net.lease", "ip"), "none");
    assert!(dropped(&daemon, "lab", "liar", "spoofed_mac") > 0);
    assert_eq!(dropped(&daemon, "lab", "db", "spoofed_mac"), 0);
}

/// Deaths in the middle of one transfer, at most.
const DEATHS: u32 = 12;

#[test]
fn transfer_outlives_switch_and_card() {
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    serve_in(&daemon, "lab", "db", "ip=dhcp size=100m offload=1");
    let db = told(&daemon, "db", "net.lease", "ip");
    ask_in(
        &daemon,
        "lab",
        "web",
        &format!("ip=dhcp peer={db} offload=1 rounds=2"),
    );
    daemon.until_output("web", "net.lease");
    let first = daemon.switch_of("lab");
    let mut deaths = 0;
    let mut last = first;
    while !daemon.output_of("web").contains("net-peer result=ok") {
        match deaths % 3 {
            _ if deaths == DEATHS => {}
            0 | 1 => {
                kill(last);
                let deadline = Instant::now() + PATIENCE;
                while daemon.switch_of("lab") == last {
                    assert!(
                        Instant::now() < deadline,
                        "no other switch: {}",
                        daemon.log()
                    );
                    std::thread::sleep(Duration::from_millis(10));
                }
                last = daemon.switch_of("lab");
                assert!(!is_alive(first));
            }
            _ => kill(daemon.process("db", "net")),
        }
        deaths = (deaths + 1).min(DEATHS);
        std::thread::sleep(Duration::from_millis(150));
    }
    println!("{deaths} deaths");
    assert!(deaths > 3, "{deaths}");
    assert_eq!(told(&daemon, "web", "BH net-peer result", "reached"), "2");
    assert_eq!(
        told(&daemon, "web", "net.peer ", "bytes"),
        (100 << 20).to_string()
    );
    assert_eq!(told(&daemon, "web", "net.peer ", "wrong"), "0");
    let shown = daemon.json(&["network", "show", "lab"]);
    assert!(shown["restarts"].as_u64() > Some(1), "{shown}");
    // What was leased is known to the last switch.
    assert_eq!(card(&shown, "db")["address"], db.as_str());
}

#[test]
fn network_outlives_its_daemon() {
    let mut daemon = Daemon::start();
    daemon.good(&["network", "create", "lab"]);
    serve_in(&daemon, "lab", "db", "ip=dhcp size=200m offload=1");
    let db = told(&daemon, "db", "net.lease", "ip");
    let ask = format!("ip=dhcp peer={db} offload=1");
    ask_in(&daemon, "lab", "web", &ask);
    daemon.until_output("web", "net.lease");
    let old = daemon.switch_of("lab");
    daemon.crash();
    std::thread::sleep(Duration::from_millis(300));
    assert!(is_alive(old), "it ended with its daemon");
    daemon.serve();
    assert_ne!(daemon.switch_of("lab"), old);
    assert!(!is_alive(old));
    for machine in ["db", "web"] {
        daemon.until_state(machine, "running");
    }
    daemon.until_output("web", "net-peer result=ok");
    assert_eq!(
        told(&daemon, "web", "net.peer ", "bytes"),
        (200 << 20).to_string()
    );
    assert_eq!(told(&daemon, "web", "net.peer ", "wrong"), "0");
    let shown = daemon.json(&["network", "show", "lab"]);
    assert_eq!(card(&shown, "db")["address"], db.as_str(), "{shown}");
}

#[test]
fn uplink_leads_to_the_host_and_what_passes_is_captured() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.bridge("br0", "10.0.0.1/24");
    let daemon = Daemon::start();
    daemon.fails(
        &[
            "network",
            "create",
            "lan",
            "--no-subnet",
            "--uplink",
            "bridge=br9",
        ],
        4,
        "no bridge br9",
    );
    daemon.good(&[
        "network",
        "create",
        "lan",
        "--no-subnet",
        "--uplink",
        "bridge=br0",
    ]);
    serve_in(&daemon, "lan", "web", "ip=10.0.0.2 size=2m offload=1");
    network::ping("10.0.0.2");
    let file = daemon.scratch().join("lan.pcapng");
    let capture = ["net", "capture", "lan", "-w", file.to_str().unwrap()];
    let mut capturing = daemon.begin(&capture);
    let deadline = Instant::now() + PATIENCE;
    while std::fs::metadata(&file).map_or(0, |about| about.len()) == 0 {
        assert!(Instant::now() < deadline, "nothing is captured");
        std::thread::sleep(Duration::from_millis(10));
    }
    daemon.fails(&capture, 6, "captures lan already");
    network::echo("10.0.0.2", 1000);
    network::give("10.0.0.2", 3_000_000);
    assert_eq!(network::take("10.0.0.2"), 2 << 20);
    kill(capturing.id());
    let _reaped = capturing.wait();
    let mut bytes = Vec::new();
    let mut captured = std::fs::File::open(&file).unwrap();
    captured.read_to_end(&mut bytes).unwrap();
    let pattern: Vec<u8> = (0..1000).map(network::pattern).collect();
    let seen = bytes.windows(pattern.len()).filter(|part| *part == pattern);
    assert!(seen.count() >= 4, "asked and answered, in and out");
    // The next switch has the same way out.
    kill(daemon.switch_of("lan"));
    network::echo("10.0.0.2", 500);
    assert!(
        network
            .ip("-o link show master br0")
            .contains("bh-net-lan-0")
    );
    daemon.good(&["kill", "web"]);
    network.until_gone("bh-net-lan-0");
}

/// Where a process has mapped the ports of a network.
fn ports_of(pid: u32) -> Vec<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let ports = maps.lines().filter(|line| line.contains("bulkhead-port"));
    ports
        .map(|line| u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn garbage_in_the_ports_of_a_network_harms_no_other() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can write into processes");
        return;
    }
    let daemon = Daemon::start();
    daemon.good(&["network", "create", "red"]);
    daemon.good(&["network", "create", "blue"]);
    serve_in(&daemon, "red", "victim", "ip=dhcp offload=1");
    serve_in(&daemon, "blue", "other", "ip=dhcp size=50m offload=1");
    let other = told(&daemon, "other", "net.lease", "ip");
    ask_in(
        &daemon,
        "blue",
        "peer",
        &format!("ip=dhcp peer={other} offload=1 rounds=2"),
    );
    let (red, blue) = (daemon.switch_of("red"), daemon.switch_of("blue"));
    // What a switch could do to its cards, and a card to its switch: positions, generations and lengths of anything.
    let memory = std::fs::File::options()
        .write(true)
        .open(format!("/proc/{red}/mem"))
        .unwrap();
    let ports = ports_of(red);
    assert_eq!(ports.len(), 1);
    let mut random = Prng::new(7);
    let mut writes = 0;
    while !daemon.output_of("peer").contains("net-peer result=ok") || writes < 2000 {
        let at = ports[0] + random.below(0x1100 / 8) * 8;
        let word = match random.below(3) {
            0 => random.below(4096),
            1 => u64::MAX - random.below(64),
            _ => random.below(u64::MAX),
        };
        memory.write_all_at(&word.to_le_bytes(), at).unwrap();
        writes += 1;
        if writes % 100 == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    assert_eq!(told(&daemon, "peer", "BH net-peer result", "reached"), "2");
    assert_eq!(told(&daemon, "peer", "net.peer ", "wrong"), "0");
    assert_eq!(daemon.switch_of("blue"), blue);
    for machine in ["victim", "other"] {
        assert_eq!(daemon.state_of(machine), "running");
    }
    // The next switch finds ports that are sound.
    kill(red);
    ask_in(&daemon, "red", "friend", "ip=dhcp peer=victim.red.internal");
    daemon.until_output("friend", "net-peer result=ok");
    assert_eq!(told(&daemon, "friend", "net.peer ", "reached"), "1");
}

#[test]
fn machine_without_a_daemon_is_told_that_it_needs_one() {
    let machine = bulkhead_tests::Machine::test_guest("mode=net", &["--net", "network=lab"]);
    machine.expect_error("net[0].network = \"lab\"");
    machine.expect_error("bulkhead serve");
}
