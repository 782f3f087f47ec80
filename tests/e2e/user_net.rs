//! User networking: passt speaks for a guest with the host's own sockets. The services of the guest are reached at ports of the
//! host, the guest reaches those of others, and no passt is left behind.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::network::{self, Network, SOURCE, pattern};
use bulkhead_tests::{Daemon, Machine, is_alive, kill};
use std::fs;
use std::io::{self, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
const PUBLISHED: &str =
    "user,publish=127.0.0.1:2009:9,publish=127.0.0.1:2019:19,publish=2007:7/udp";
const BYTES: u64 = 3_000_001;

/// A host with a default route, which passt asks for.
fn host() -> Option<Network> {
    let network = Network::enter()?;
    network.bridge("away", "192.0.2.1/24");
    network.ip("route add default via 192.0.2.254");
    Some(network)
}

/// The passt that this process has started.
fn passt_of(broker: u32) -> u32 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let all = fs::read_dir("/proc").unwrap().flatten();
        let found = all.filter_map(|entry| {
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let field = |key: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(key))?;
                Some(line.trim().to_owned())
            };
            let is_its =
                field("PPid:")? == broker.to_string() && !field("State:")?.starts_with('Z');
            let pid = field("Pid:")?.parse().ok()?;
            (is_its && field("Name:")?.starts_with("passt")).then_some(pid)
        });
        if let [pid] = found.collect::<Vec<u32>>()[..] {
            return pid;
        }
        assert!(Instant::now() < deadline, "{broker} has not one passt");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn until_dead(pid: u32) {
    let deadline = Instant::now() + PATIENCE;
    while is_alive(pid) {
        assert!(Instant::now() < deadline, "process {pid} stays");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// passt takes connections for a guest that refuses them, because its one socket for a port is not closed yet: they are reset.
fn again<T>(mut transfer: impl FnMut() -> io::Result<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match transfer() {
            Ok(done) => return done,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn is_reached() {
    again(|| network::give_at("127.0.0.1:2009", BYTES));
    // Debian 12's passt opens no connection before its client has said something.
    let bytes = again(|| network::take_at("127.0.0.1:2019", b"!"));
    assert_eq!(bytes, 3 << 20);
    // Nor does it send datagrams back to the host's loopback, which is out of the guest's reach.
    assert!(network::echoed_at("192.0.2.1:2007", 1000, PATIENCE));
}

#[test]
fn published_services_are_reached_whatever_has_died() {
    let Some(_network) = host() else { return };
    let mut machine = Machine::test_guest(
        "mode=net seconds=1000 ip=dhcp size=3m",
        &["--net", PUBLISHED],
    );
    assert!(machine.expect("BH net.ready").contains("ip=10.0.2.15 "));
    is_reached();
    machine.expect("BH net.sink ");
    let record = machine.expect("\n");
    assert!(
        record.contains(&format!("bytes={BYTES} ")) && record.contains("wrong=0"),
        "{record}"
    );
    let broker = machine.pid();
    let first = passt_of(broker);
    kill(machine.process("net"));
    machine.expect_restarts(1);
    is_reached();
    let second = passt_of(broker);
    assert!(second != first && !is_alive(first));
    // The card's process is told by the end of its wire.
    kill(second);
    machine.expect_restarts(2);
    is_reached();
    let third = passt_of(broker);
    drop(machine);
    until_dead(third);
}

#[test]
fn guest_reaches_services_of_others_and_none_of_the_hosts_loopback() {
    let Some(_network) = host() else { return };
    let bytes = 2 << 20;
    let services = [("192.0.2.1", "yes"), ("127.0.0.1", "no")];
    for (address, _) in services {
        let listener = TcpListener::bind((address, SOURCE)).unwrap();
        std::thread::spawn(move || {
            let data: Vec<u8> = (0..bytes).map(pattern).collect();
            for client in listener.incoming() {
                // Whether all of it arrives is what the guest says.
                let _sent = client.and_then(|mut client| client.write_all(&data));
            }
        });
    }
    // The gateway is not the host, and nobody is at its loopback but the host itself.
    for (peer, reached) in [("192.0.2.1", 1), ("10.0.2.2", 0), ("127.0.0.1", 0)] {
        let cmdline = format!("mode=net-peer ip=dhcp peer={peer} rounds=1 patience=10000");
        let ended = Machine::test_guest(&cmdline, &["--net", "user"]).wait();
        let said = format!("net-peer result=ok rounds=1 reached={reached}");
        assert!(ended.console.contains(&said), "{peer}: {ended:?}");
        let all = ended.console.contains(&format!("bytes={bytes} "));
        assert_eq!(all, reached == 1, "{peer}: {ended:?}");
    }
}

#[test]
fn passt_stays_for_the_next_broker_and_ends_with_the_machine() {
    let Some(_network) = host() else { return };
    let mut daemon = Daemon::start();
    let cmdline = "mode=net seconds=1000 ip=dhcp size=3m";
    daemon.create_and_start("web", cmdline, &["--net", PUBLISHED]);
    daemon.until_output("web", "BH net.ready");
    let first = passt_of(daemon.pid());
    daemon.crash();
    is_reached();
    daemon.serve();
    daemon.until_state("web", "running");
    is_reached();
    assert!(is_alive(first));
    kill(daemon.process("web", "net"));
    until_dead(first);
    is_reached();
    let second = passt_of(daemon.pid());
    daemon.crash();
    daemon.serve();
    daemon.until_state("web", "running");
    daemon.good(&["kill", "web"]);
    daemon.until_state("web", "stopped");
    until_dead(second);
}

fn fails(net: &str, code: i32, said: &str) {
    let ended = Machine::test_guest("mode=hello", &["--net", net]).wait();
    assert_eq!(ended.code, code, "{net}: {ended:?}");
    assert!(ended.errors.contains(said), "{net}: {ended:?}");
}

#[test]
fn host_without_a_route_is_told_that_it_needs_one() {
    let Some(_network) = Network::enter() else {
        return;
    };
    fails("user", 4, "passt needs a default route of the host");
    fails("user,publish=80", 2, "expected [ADDRESS:]PORT:GUEST_PORT");
}

#[test]
fn port_that_is_taken_is_told() {
    let Some(_network) = host() else { return };
    let _taken = TcpListener::bind("127.0.0.1:2009").unwrap();
    fails(
        PUBLISHED,
        2,
        "publish 127.0.0.1:2009:9: another program has this port",
    );
}

#[test]
fn user_without_root_publishes_a_service() {
    let Some(_network) = host() else { return };
    let cmdline = "mode=net seconds=1000 ip=dhcp size=3m";
    let mut machine = Machine::run_as(60_606, &["--cmdline", cmdline, "--net", PUBLISHED]);
    machine.expect("BH net.ready");
    is_reached();
    let passt = passt_of(machine.pid());
    drop(machine);
    until_dead(passt);
}
