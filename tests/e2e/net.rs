//! Network devices: a guest on a TAP interface or a bridge is reached from the host, whatever becomes of the
//! processes that serve it.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::network::{self, Network};
use bulkhead_tests::{Daemon, Machine, kill};
use std::time::{Duration, Instant};

/// The number behind `key=` in a record of the guest.
fn number(text: &str, key: &str) -> u64 {
    let word = text
        .split_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
    let word = word.unwrap_or_else(|| panic!("no {key} in {text}"));
    match word.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
        None => word.parse().unwrap(),
    }
}

/// A guest that answers at 10.0.0.2 behind `tap0`, which is 10.0.0.1.
fn on_tap(network: &Network, cmdline: &str, net: &str, more: &[&str]) -> Machine {
    let cmdline = format!("mode=net seconds=100 {cmdline}");
    let net = format!("tap=tap0{net}");
    let arguments = [&["--net", &net], more].concat();
    let mut machine = Machine::test_guest(&cmdline, &arguments);
    machine.expect("BH net.ready");
    network.address("tap0", "10.0.0.1/24");
    machine
}

/// What the guest says of the data that it was given.
fn given(machine: &mut Machine, bytes: u64) -> String {
    network::give("10.0.0.2", bytes);
    machine.expect("BH net.sink ");
    let record = machine.expect("\n");
    assert_eq!(number(&record, "bytes"), bytes, "{record}");
    assert_eq!(number(&record, "wrong"), 0, "{record}");
    record
}

#[test]
fn guest_without_offloads_is_reached_and_its_interface_goes_with_it() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "size=3m", "", &[]);
    network::ping("10.0.0.2");
    for len in [1, 512, 1472] {
        network::echo("10.0.0.2", len);
    }
    // What the host sends by TCP is not cut and has no checksums: the device process does both.
    let record = given(&mut machine, 5_000_001);
    assert!(number(&record, "largest") <= 1514, "{record}");
    assert_eq!(number(&record, "spread"), 0, "{record}");
    assert_eq!(network::take("10.0.0.2"), 3 << 20);
    drop(machine);
    network.until_gone("tap0");
}

#[test]
fn large_segments_reach_a_guest_that_takes_them_uncut() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "size=3m offload=1", "", &[]);
    network::ping("10.0.0.2");
    let record = given(&mut machine, 20_000_000);
    println!("{record}");
    assert!(number(&record, "largest") > 4000, "{record}");
    assert!(number(&record, "spread") > 0, "{record}");
    assert_eq!(network::take("10.0.0.2"), 3 << 20);
}

#[test]
fn traffic_outlives_the_process_that_carries_it() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "size=30m offload=1", "", &[]);
    network::ping("10.0.0.2");
    let deaths = 3;
    let bytes = 200_000_000;
    std::thread::scope(|scope| {
        let giving = scope.spawn(move || network::give("10.0.0.2", bytes));
        let taking = scope.spawn(|| network::take("10.0.0.2"));
        for n in 1..=deaths {
            std::thread::sleep(Duration::from_millis(150));
            kill(machine.process("net"));
            machine.expect_restarts(n);
        }
        assert_eq!(taking.join().unwrap(), 30 << 20);
        giving.join().unwrap();
    });
    machine.expect("BH net.sink ");
    let record = machine.expect("\n");
    assert_eq!(number(&record, "bytes"), bytes, "{record}");
    assert_eq!(number(&record, "wrong"), 0, "{record}");
    network::ping("10.0.0.2");
}

#[test]
fn machines_share_a_bridge_and_leave_it() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.bridge("br0", "10.0.0.1/24");
    let daemon = Daemon::start();
    for (name, ip) in [("web", "10.0.0.2"), ("db", "10.0.0.3")] {
        let cmdline = format!("mode=net seconds=1000 offload=1 ip={ip}");
        daemon.create_and_start(name, &cmdline, &["--net", "bridge=br0"]);
        daemon.until_output(name, "BH net.ready");
    }
    for ip in ["10.0.0.2", "10.0.0.3"] {
        network::ping(ip);
        network::give(ip, 1_000_000);
        assert_eq!(network::take(ip), 1 << 20);
    }
    let bridged = network.ip("-o link show master br0");
    assert!(
        bridged.contains("bh-web-0") && bridged.contains("bh-db-0"),
        "{bridged}"
    );
    daemon.good(&["kill", "db"]);
    network.until_gone("bh-db-0");
    network::echo("10.0.0.2", 100);
    let _same = daemon.good(&["inspect", "web", "--authority"]);
    // A device tells what it has done once a second.
    let deadline = Instant::now() + Duration::from_secs(20);
    let net = loop {
        let net = daemon.json(&["stats", "web"])["networks"][0].clone();
        if net["tx_bytes"].as_u64() > Some(1 << 20) || Instant::now() > deadline {
            break net;
        }
        std::thread::sleep(Duration::from_millis(200));
    };
    assert_eq!(net["device"], "net0");
    assert!(net["rx_packets"].as_u64().unwrap() > 10, "{net}");
    assert!(net["rx_bytes"].as_u64().unwrap() > 1_000_000, "{net}");
    assert!(net["tx_bytes"].as_u64().unwrap() > 1 << 20, "{net}");
    daemon.good(&["kill", "web"]);
    network.until_gone("bh-web-0");
}

#[test]
fn interface_stays_with_the_next_broker_and_ends_with_the_machine() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.bridge("br0", "10.0.0.1/24");
    let mut daemon = Daemon::start();
    daemon.create_and_start("web", "mode=net seconds=1000", &["--net", "bridge=br0"]);
    daemon.until_output("web", "BH net.ready");
    network::ping("10.0.0.2");
    let before = network.ip("-o link show dev bh-web-0");
    daemon.crash();
    // Nobody but the device process has the interface now.
    network::echo("10.0.0.2", 200);
    daemon.serve();
    daemon.until_state("web", "running");
    let first = daemon.process("web", "net");
    kill(first);
    network::echo("10.0.0.2", 300);
    assert_ne!(daemon.process("web", "net"), first);
    let index = |line: &str| line.split(':').next().map(str::to_owned);
    let after = network.ip("-o link show dev bh-web-0");
    assert_eq!(index(&before), index(&after), "it is the same interface");
    daemon.good(&["kill", "web"]);
    network.until_gone("bh-web-0");
}

#[test]
fn cable_is_pulled_out_and_plugged_in() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.bridge("br0", "10.0.0.1/24");
    let daemon = Daemon::start();
    let net = "bridge=br0,link=down";
    daemon.create_and_start("web", "mode=net seconds=1000", &["--net", net]);
    daemon.until_output("web", "link=0");
    let a_moment = Duration::from_millis(700);
    assert!(!network::echoed("10.0.0.2", 50, a_moment));
    let told = daemon.good(&["device", "link", "web/net0", "up"]);
    assert!(told.contains("web/net0: link up"), "{told}");
    daemon.until_output("web", "BH net.link up=1");
    network::echo("10.0.0.2", 50);
    daemon.good(&["device", "link", "web/net0", "down"]);
    daemon.until_output("web", "BH net.link up=0");
    assert!(!network::echoed("10.0.0.2", 50, a_moment));
    // The next process knows as well.
    kill(daemon.process("web", "net"));
    assert!(!network::echoed("10.0.0.2", 50, a_moment));
    daemon.good(&["device", "link", "web/net0", "up"]);
    network::echo("10.0.0.2", 50);
    daemon.fails(
        &["device", "link", "web/rng", "up"],
        2,
        "expected a network device",
    );
    daemon.good(&["kill", "web"]);
}

/// Bytes a second that the guest sends and takes.
fn rates(options: &str) -> (f64, f64) {
    let Some(network) = Network::enter() else {
        return (f64::INFINITY, f64::INFINITY);
    };
    let mut machine = on_tap(&network, "size=4m", options, &[]);
    network::ping("10.0.0.2");
    let begin = Instant::now();
    let bytes = network::take("10.0.0.2");
    let sends = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    given(&mut machine, bytes);
    let takes = begin.elapsed().as_secs_f64();
    (4_194_304.0 / sends, 4_194_304.0 / takes)
}

#[test]
fn limits_hold_in_each_direction() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let (sends, takes) = rates(",bytes_per_s=1MiB,bytes_burst=64KiB");
    let (sends_free, takes_free) = rates("");
    println!(
        "sends {sends:.0} of {sends_free:.0}, takes {takes:.0} of {takes_free:.0} bytes a second"
    );
    for (limited, free) in [(sends, sends_free), (takes, takes_free)] {
        // Frames have headers, so that less than the limit is data.
        assert!(limited < 1.1 * 1_048_576.0, "{limited}");
        assert!(limited > 0.4 * 1_048_576.0, "{limited}");
        assert!(free > 2.0 * limited, "{free} {limited}");
    }
}

#[test]
fn limit_is_changed_while_the_machine_runs() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.bridge("br0", "10.0.0.1/24");
    let daemon = Daemon::start();
    let net = "bridge=br0,packets_per_s=20,packets_burst=1";
    daemon.create_and_start("web", "mode=net seconds=1000", &["--net", net]);
    daemon.until_output("web", "BH net.ready");
    network::ping("10.0.0.2");
    let forty = || {
        let begin = Instant::now();
        for _ in 0..40 {
            network::echo("10.0.0.2", 64);
        }
        begin.elapsed()
    };
    assert!(forty() > Duration::from_millis(1500));
    daemon.good(&["device", "limit", "web/net0", "--packets-per-s", "100000"]);
    assert!(forty() < Duration::from_millis(1500));
    daemon.good(&["kill", "web"]);
}

#[test]
fn largest_packet_is_that_of_the_vm_file() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "", ",mtu=700", &[]);
    let shown = network.ip("-o link show dev tap0");
    assert!(shown.contains(" mtu 700 "), "{shown}");
    let record = given(&mut machine, 100_000);
    assert!(number(&record, "largest") <= 714, "{record}");
}

#[test]
fn several_pairs_of_queues_carry_frames() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "pairs=4 size=2m offload=1", ",queues=4", &[]);
    network::ping("10.0.0.2");
    for _ in 0..40 {
        network::echo("10.0.0.2", 100);
    }
    let record = given(&mut machine, 4_000_000);
    let pairs = number(&record, "pairs");
    assert!(
        pairs.count_ones() > 1,
        "frames came through pairs {pairs:#b}"
    );
    assert_eq!(network::take("10.0.0.2"), 2 << 20);
    // The driver has told the dead process how many it uses, and does not tell the next.
    kill(machine.process("net"));
    machine.expect_restarts(1);
    given(&mut machine, 4_000_000);
}

#[test]
fn driver_that_wants_one_pair_of_several_gets_all_frames_in_it() {
    let Some(network) = Network::enter() else {
        return;
    };
    let mut machine = on_tap(&network, "pairs=1", ",queues=4", &[]);
    for _ in 0..20 {
        network::echo("10.0.0.2", 100);
    }
    let record = given(&mut machine, 1_000_000);
    assert_eq!(number(&record, "pairs"), 1);
}

#[test]
fn persistent_interface_is_used_and_left() {
    let Some(network) = Network::enter() else {
        return;
    };
    network.ip("tuntap add dev tap0 mode tap");
    let machine = on_tap(&network, "", "", &[]);
    network::ping("10.0.0.2");
    let twice = ["--net", "tap=tap0"];
    let second = Machine::test_guest("mode=hello", &twice).wait();
    assert_eq!(second.code, 2, "{second:?}");
    assert!(
        second.errors.contains("tap0 is in use by another process"),
        "{second:?}"
    );
    drop(machine);
    assert!(network.interfaces().contains(&"tap0".to_owned()));
}

#[test]
fn what_the_host_lacks_is_said() {
    let Some(_network) = Network::enter() else {
        return;
    };
    for (net, code, said) in [
        ("bridge=br9", 2, "there is no bridge br9"),
        ("tap=lo", 2, "lo is no TAP interface"),
        ("tap=tap%d", 2, "expected the name of a network interface"),
        (
            "mac=52:54:00:00:00:01",
            2,
            "expected one of `user`, `network`, `tap` and `bridge`",
        ),
    ] {
        let ended = Machine::test_guest("mode=hello", &["--net", net]).wait();
        assert_eq!(ended.code, code, "{net}: {ended:?}");
        assert!(ended.errors.contains(said), "{net}: {ended:?}");
    }
}
