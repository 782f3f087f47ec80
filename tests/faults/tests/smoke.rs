//! The smoke set: every shipped scenario, and a sample of the matrix. `cargo xtask test` runs it.

use bulkhead_faults::matrix;
use bulkhead_faults::random::plan;
use bulkhead_faults::run::{Setting, run};
use bulkhead_faults::scenario::Scenario;
use bulkhead_faults::verdict::{Outcome, Verdict};
use bulkhead_faults::workload::{Guests, Linux};
use std::path::{Path, PathBuf};

/// Of the matrix, each so many-th scenario is run.
const SAMPLE: usize = 61;

fn path(variable: &str) -> PathBuf {
    let path = std::env::var_os(variable).map(PathBuf::from);
    path.unwrap_or_else(|| panic!("{variable} is not set; run `cargo xtask test`"))
}

fn setting() -> Setting {
    Setting {
        programs: path("BULKHEAD_BIN_DIR"),
        guests: Guests {
            test: path("BULKHEAD_TEST_GUEST"),
            linux: Linux::from_environment(),
        },
    }
}

fn outcome(scenario: &Scenario) -> Outcome {
    let plan = plan(scenario, scenario.seed);
    run(scenario, scenario.seed, &plan, &setting()).unwrap()
}

fn holds(scenario: &Scenario) -> Outcome {
    let outcome = outcome(scenario);
    assert_eq!(outcome.verdict(), Verdict::Held, "{}", outcome.in_words());
    outcome
}

fn shipped(name: &str) -> Scenario {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    Scenario::load(&directory.join(format!("{name}.toml"))).unwrap()
}

macro_rules! shipped {
    ($($test:ident: $name:literal),+ $(,)?) => {
        $(#[test]
        fn $test() {
            holds(&shipped($name));
        })+

        #[test]
        fn every_shipped_scenario_is_run() {
            let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
            let mut run = vec![$($name.to_owned()),+, "drawn".to_owned(), "guest-gets-an-nmi".to_owned(), "clock-of-a-guest-steps".to_owned()];
            let entries = std::fs::read_dir(directory).unwrap();
            let mut there: Vec<String> = entries
                .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
                .collect();
            run.sort();
            there.sort();
            assert_eq!(run, there);
        }
    };
}

shipped! {
    blk_dies_while_its_successor_is_born: "blk-dies-while-its-successor-is-born",
    broker_dies_again_and_again: "broker-dies-again-and-again",
    new_broker_finds_the_dying: "new-broker-finds-the-dying",
    messages_go_astray: "messages-go-astray",
    messages_of_a_switch_go_astray: "messages-of-a-switch-go-astray",
    switch_dies_at_its_messages: "switch-dies-at-its-messages",
    broker_dies_as_it_talks_to_a_switch: "broker-dies-as-it-talks-to-a-switch",
    system_calls_fall_short: "system-calls-fall-short",
    programs_are_replaced: "programs-are-replaced",
    requests_get_lost: "requests-get-lost",
    network_is_bad: "network-is-bad",
    broker_dies_while_it_asks: "broker-dies-while-it-asks",
    disk_gives_errors: "disk-gives-errors",
    disk_is_broken: "disk-is-broken",
    power_is_cut: "power-is-cut",
    little_to_run_on: "little-to-run-on",
    windows_are_spoiled: "windows-are-spoiled",
    time_of_day_jumps: "time-of-day-jumps",
    two_brokers_never_serve: "two-brokers",
    old_write_never_lands_late: "old-write-never-lands-late",
    console_goes_on_where_it_was: "console-goes-on-where-it-was",
    legacy_is_late: "legacy-is-late",
    memory_stays_what_it_is: "memory-stays-what-it-is",
    files_survive: "files-survive",
    window_of_a_disk_is_spoiled: "window-of-a-disk-is-spoiled",
    window_changes_while_it_is_read: "window-changes-while-it-is-read",
    requests_in_flight_outlive_their_process: "requests-in-flight-outlive-their-process",
}

#[test]
fn same_seed_injects_the_same_at_the_same_points() {
    let drawn = shipped("drawn");
    let injected = [(), ()].map(|()| {
        let outcome = holds(&drawn);
        let faults = outcome.injected.iter();
        let faults = faults.map(|(planned, times)| (planned.clone(), *times));
        faults.collect::<Vec<_>>()
    });
    assert_eq!(injected[0].len(), 8);
    assert_eq!(injected[0], injected[1]);
}

#[test]
fn sample_of_the_matrix_holds() {
    for scenario in matrix::all().iter().step_by(SAMPLE) {
        holds(scenario);
    }
}

#[test]
fn fault_that_never_comes_shows_nothing() {
    let text = "name = \"never\"\nseconds = 1\n[[vm]]\nname = \"web\"\nworkload = \"blocks\"\n\
        [[fault]]\npoint = \"to-vcpu.device-lost\"\ndo = \"drop\"\n";
    let outcome = outcome(&Scenario::parse("never.toml", text).unwrap());
    assert_eq!(outcome.verdict(), Verdict::NothingVerified);
    assert_eq!(outcome.missing.len(), 1);
}

#[test]
fn loss_of_a_machine_that_must_be_unharmed_fails() {
    let text = "name = \"lost\"\nseconds = 2\n[[vm]]\nname = \"web\"\nworkload = \"blocks\"\n\
        [[fault]]\npoint = \"process.vcpu\"\ndo = \"kill\"\nat_ms = 300\n";
    let outcome = outcome(&Scenario::parse("lost.toml", text).unwrap());
    assert_eq!(outcome.verdict(), Verdict::Failed);
}

#[test]
fn disk_that_has_lied_is_found_out_by_a_power_cut() {
    let text = "name = \"lie\"\nseconds = 3\n[[vm]]\nname = \"web\"\nworkload = \"blocks\"\nexpect = \"lost\"\n\
        disk = { size = \"16MiB\", on = \"faulty\" }\n\
        [[fault]]\npoint = \"disk.flush\"\ndo = \"lie\"\nat_ms = 300\ntimes = 1000\n\
        [[fault]]\npoint = \"host\"\ndo = \"kill\"\nat_ms = 1500\n";
    let outcome = outcome(&Scenario::parse("lie.toml", text).unwrap());
    assert_eq!(outcome.verdict(), Verdict::Failed);
}

#[test]
fn partition_of_the_hosts_is_a_silence_between_them() {
    let outcome = holds(&shipped("network-is-bad"));
    let told = outcome
        .entries
        .iter()
        .find(|e| e.what.contains("silence of"));
    let told = &told.unwrap().what;
    let silence = told
        .split("silence of ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next());
    let silence: u64 = silence.unwrap().parse().unwrap();
    assert!(silence >= 700, "{told}");
}

/// Whether the time line of a run has `part`.
fn tells(outcome: &Outcome, part: &str) -> bool {
    outcome
        .entries
        .iter()
        .any(|entry| entry.what.contains(part))
}

#[test]
fn guest_that_gets_an_nmi_sees_it() {
    let outcome = holds(&shipped("guest-gets-an-nmi"));
    assert!(
        tells(&outcome, "exception vector=2"),
        "{}",
        outcome.in_words()
    );
}

#[test]
fn step_of_a_clock_is_seen_by_its_guest() {
    let outcome = holds(&shipped("clock-of-a-guest-steps"));
    assert!(
        tells(&outcome, "the CMOS clock is 36"),
        "{}",
        outcome.in_words()
    );
}
