//! A guest boots in processes of its own, and each way it can end has its own exit code.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::Machine;
use nix::sys::signal::Signal;
use std::fs;

#[test]
fn guest_boots_and_powers_off() {
    let ended = Machine::test_guest("mode=hello", &[]).wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
    assert!(ended.console.contains("bad_tables=0"), "{ended:?}");
}

#[test]
fn run_without_a_kernel_boots_the_built_in_guest() {
    let nothing: [&str; 0] = [];
    let ended = Machine::run(nothing).wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.console.starts_with("BH hello "), "{ended:?}");
    assert!(ended.console.contains("BH done errors=0"), "{ended:?}");
}

#[test]
fn every_part_of_a_machine_is_a_process_of_its_own() {
    let mut machine = Machine::test_guest("mode=idle", &[]);
    machine.expect("BH idle ");
    for kind in ["console", "legacy", "rng", "vcpu"] {
        let _pid = machine.process(kind);
    }
    assert_eq!(
        machine.processes().kinds(),
        ["console", "legacy", "rng", "vcpu"]
    );
    machine.signal(Signal::SIGINT);
    let ended = machine.wait();
    assert_eq!(ended.code, 130, "{ended:?}");
}

#[test]
fn every_process_keeps_the_nice_value_of_the_run() {
    // Of this thread alone, which the machine inherits.
    let thread = nix::unistd::gettid().to_string();
    bulkhead_tests::tool("renice", &["-n", "5", "-p", &thread]);
    let mut machine = Machine::test_guest("mode=idle", &[]);
    machine.expect("BH idle ");
    let processes = machine.processes();
    for pid in processes.pids() {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let (_, fields) = stat.rsplit_once(") ").unwrap();
        assert_eq!(fields.split(' ').nth(16), Some("5"), "{stat}");
    }
    machine.signal(Signal::SIGINT);
    assert_eq!(machine.wait().code, 130);
}

#[test]
fn each_ending_has_its_exit_code() {
    for (end, code) in [
        ("poweroff", 0),
        ("panic", 8),
        ("triple", 10),
        ("debug:3", 7),
        ("debug:0", 1),
        ("reset", 0),
        ("acpi-reset", 0),
    ] {
        let cmdline = format!("mode=hello end={end}");
        let ended = Machine::test_guest(&cmdline, &["--no-reboot"]).wait();
        assert_eq!(ended.code, code, "end={end}: {ended:?}");
    }
}

#[test]
fn reset_starts_the_machine_again() {
    let mut machine = Machine::test_guest("mode=hello end=reset", &[]);
    for _ in 0..3 {
        machine.expect("BH hello ");
    }
    machine.signal(Signal::SIGTERM);
    assert_eq!(machine.wait().code, 12, "the user cut the power");
}

#[test]
fn hanging_guest_times_out() {
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let guest = guest.to_str().unwrap();
    let ended = Machine::run([
        "--kernel",
        guest,
        "--cmdline",
        "mode=hello end=hang",
        "-m",
        "32MiB",
        "--timeout",
        "3s",
    ])
    .wait();
    assert_eq!(ended.code, 124, "{ended:?}");
}

#[test]
fn guests_have_from_one_to_thirty_two_cpus() {
    for cpus in ["1", "2", "32"] {
        let ended = Machine::test_guest("mode=smp", &["-c", cpus]).wait();
        assert_eq!(ended.code, 0, "{ended:?}");
        let line = format!("BH smp listed={cpus} started={cpus}");
        assert!(ended.console.contains(&line), "{ended:?}");
    }
}

#[test]
fn guests_have_from_sixteen_megabytes_to_beyond_four_gigabytes() {
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let guest = guest.to_str().unwrap();
    for (memory, beyond) in [("16MiB", false), ("6GiB", true)] {
        let ended =
            Machine::run(["--kernel", guest, "--cmdline", "mode=hello", "-m", memory]).wait();
        assert_eq!(ended.code, 0, "{memory}: {ended:?}");
        let high = ended.console.contains("BH hello.memory start=0x100000000");
        let high = high || ended.console.contains("start=4294967296");
        assert_eq!(high, beyond, "{memory}: {ended:?}");
    }
}

/// The host's pool of huge pages, as large as a test needs it. It goes with the test.
struct Pool(String);

impl Pool {
    const FILE: &str = "/proc/sys/vm/nr_hugepages";

    fn of(pages: u32) -> Self {
        let pool = Self(fs::read_to_string(Self::FILE).unwrap());
        fs::write(Self::FILE, pages.to_string()).unwrap();
        let got = fs::read_to_string(Self::FILE).unwrap();
        assert_eq!(got.trim(), pages.to_string(), "the host has no such pages");
        pool
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _written = fs::write(Self::FILE, &self.0);
    }
}

#[test]
fn reserved_huge_pages_are_taken_from_the_pool_or_refused() {
    let options = ["--hugepages=reserved"];
    {
        let _pool = Pool::of(40);
        let mut machine = Machine::test_guest("mode=idle seconds=1", &options);
        machine.expect("BH idle ");
        let maps = fs::read_to_string(format!("/proc/{}/smaps", machine.process("vcpu"))).unwrap();
        let huge = maps.matches("KernelPageSize:     2048 kB").count();
        assert!(huge >= 1, "{maps}");
        assert_eq!(machine.wait().code, 0);
    }
    let _pool = Pool::of(0);
    let ended = Machine::test_guest("mode=idle seconds=1", &options).wait();
    assert_eq!(ended.code, 2, "{ended:?}");
    assert!(ended.errors.contains("pool of huge pages"), "{ended:?}");
}

#[test]
fn lost_vcpu_process_is_its_own_outcome() {
    let mut machine = Machine::test_guest("mode=idle", &[]);
    machine.expect("BH idle ");
    // The broker starts devices when it has heard that the vCPUs are locked; until then their loss
    // would be a failed start.
    let _rng = machine.process("rng");
    let vcpu = machine.process("vcpu");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(vcpu).unwrap());
    nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    assert_eq!(machine.wait().code, 14);
}
