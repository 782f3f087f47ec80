//! A disk does as much in a second as it may, from the start or from the moment on at which that was changed,
//! whichever process serves it.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

use bulkhead_tests::{Daemon, Machine, disk, kill};
use std::time::Instant;

/// How many requests a guest with such a disk has made in a second.
fn requests_per_s(options: &str) -> f64 {
    let disk = disk(4 << 20);
    let argument = format!("{}{options}", disk.path().display());
    let load = "mode=blk-load seconds=3 qd=32 sectors=512 timeout=100";
    let mut machine = Machine::test_guest(load, &["--disk", &argument]);
    machine.expect("BH blk-load.begin");
    let begin = Instant::now();
    let ended = machine.wait();
    let elapsed = begin.elapsed().as_secs_f64();
    assert_eq!(ended.code, 0, "{ended:?}");
    let end = ended
        .console
        .lines()
        .find(|line| line.contains("blk-load.end"))
        .unwrap();
    let requests = end
        .split_whitespace()
        .find_map(|word| word.strip_prefix("requests="));
    requests.unwrap().parse::<f64>().unwrap() / elapsed
}

#[test]
fn disk_makes_as_many_requests_in_a_second_as_it_may() {
    let free = requests_per_s("");
    let limited = requests_per_s(",requests_per_s=100,requests_burst=10");
    println!("{free:.0} requests a second without a limit, {limited:.0} with one of 100");
    // What was allowed at once comes on top; so does what the test notices late.
    assert!(limited <= 120.0, "{limited}");
    assert!(free > 2.0 * limited, "{free} {limited}");
}

#[test]
fn disk_moves_as_many_bytes_in_a_second_as_it_may() {
    // 256 KiB are written and read again in each round, with a flush: two rounds a second.
    let limited = requests_per_s(",bytes_per_s=1MiB,bytes_burst=4KiB");
    let free = requests_per_s("");
    println!("{free:.0} requests a second without a limit, {limited:.0} with 1 MiB a second");
    assert!(free > 2.0 * limited, "{free} {limited}");
}

#[test]
fn limit_is_changed_while_the_machine_runs_and_holds_for_the_next_process() {
    let daemon = Daemon::start();
    let image = disk(4 << 20);
    let slow = format!(
        "{},requests_per_s=1,requests_burst=1",
        image.path().display()
    );
    let load = "mode=blk-load seconds=1 qd=32 sectors=512 timeout=300";
    daemon.create_and_start("web", load, &["--disk", &slow]);
    daemon.until_output("web", "BH blk-load.begin");
    assert!(!daemon.output_of("web").contains("blk-load.end"));
    let told = daemon.good(&[
        "device",
        "limit",
        "web/disk0",
        "--requests-per-s",
        "1000000",
    ]);
    assert!(
        told.contains("web/disk0: 1000000 requests a second (1000000 at once)"),
        "{told}"
    );
    // The one that was told dies; what it was started with would be one request a second.
    kill(daemon.process("web", "blk"));
    daemon.until_output("web", "BH blk-load.end");
    daemon.until_output("web", "BH done errors=0");
    // Until then the disk is its.
    daemon.until_state("web", "stopped");
    daemon.create_and_start("db", "mode=idle seconds=60", &["--disk", &slow]);
    daemon.fails(
        &["device", "limit", "db/rng"],
        2,
        "is a rng, expected a disk",
    );
    daemon.fails(&["device", "limit", "db/disk7"], 2, "has no device disk7");
    daemon.fails(
        &["device", "limit", "db/disk0", "--bytes-per-s", "100B"],
        2,
        "bytes_per_s: got 100, expected at least 4096",
    );
    let told = daemon.good(&["device", "limit", "db/disk0"]);
    assert!(told.contains("db/disk0: no limit"), "{told}");
    daemon.good(&["kill", "db"]);
}
