//! The workloads of the fault-injection harness with the real `bulkhead`: what an undisturbed guest does is
//! accepted, also over a power cut, and what is spoilt is refused.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_faults::disk::{Cut, DiskAction, DiskOp, DiskRule, DiskRules, FaultyDisk};
use bulkhead_faults::workload::{Checker, Guests, Linux, Verified, Workload};
use bulkhead_tests::{Daemon, GuestMemory, Machine, kill, path};
use std::time::{Duration, Instant};

const SEED: u64 = 17;
const BLOCKS_BYTES: u64 = 4 << 20;
const FILES_BYTES: u64 = 16 << 20;
/// Ring 0 is emulated on some hosts.
const PATIENCE: Duration = Duration::from_secs(300);
/// Where the guest's working memory is, and not its image.
const WORKING_MEMORY: u64 = 8 << 20;

fn guests() -> Guests {
    Guests {
        test: path("BULKHEAD_TEST_GUEST"),
        linux: Some(Linux {
            kernel: path("BULKHEAD_TEST_LINUX_BZIMAGE"),
            initrd: path("BULKHEAD_TEST_LINUX_INITRD"),
            cmdline: bulkhead_tests::linux_cmdline(),
        }),
    }
}

fn arguments(work: Workload, seconds: u64, disk: Option<&FaultyDisk>) -> Vec<String> {
    let all = work.arguments(seconds, SEED, &guests(), None).unwrap();
    let mut all: Vec<String> = all.into_iter().map(|a| a.into_string().unwrap()).collect();
    if let Some(disk) = disk {
        all.push("--disk".into());
        all.push(disk.path().display().to_string());
    }
    all
}

fn disk_of(work: Workload, bytes: u64) -> FaultyDisk {
    let image = work.disk(bytes).unwrap();
    FaultyDisk::mount_image(image, DiskRules::new(), |_| {}).unwrap()
}

/// What a run said, and when.
type Transcript = Vec<(Duration, String)>;

/// Lets a guest work to its end, with its checker at its console, and `meddle` after each line.
fn run(
    work: Workload,
    disk: Option<&FaultyDisk>,
    mut meddle: impl FnMut(&Machine, &str),
) -> (Box<dyn Checker>, Transcript) {
    let mut machine = Machine::run(arguments(work, 3, disk));
    let (began, mut checker) = (Instant::now(), work.checker(SEED));
    let mut heard = Transcript::new();
    loop {
        let line = machine.expect("\n");
        let at = began.elapsed();
        checker.record(at, &line);
        if let Some(typed) = checker.typing(at) {
            machine.type_keys(&format!("{typed}\n"));
        }
        meddle(&machine, &line);
        let is_end = line.starts_with("BH done");
        heard.push((at, line));
        if is_end {
            break;
        }
    }
    let _ended = machine.wait();
    (checker, heard)
}

fn judged(work: Workload, heard: &Transcript) -> Box<dyn Checker> {
    let mut checker = work.checker(SEED);
    heard
        .iter()
        .for_each(|(at, line)| checker.record(*at, line));
    checker
}

fn accepted(checker: Box<dyn Checker>) {
    let found = checker.finish();
    assert!(found.held(), "{found:?}");
}

fn refused(checker: Box<dyn Checker>) {
    let found = checker.finish();
    assert!(!found.errors.is_empty(), "{found:?}");
}

#[test]
fn blocks_on_the_disk_are_what_was_flushed() {
    let disk = disk_of(Workload::Blocks, BLOCKS_BYTES);
    let (mut checker, heard) = run(Workload::Blocks, Some(&disk), |_, _| {});
    let mut image = disk.flushed_image();
    assert_eq!(image, disk.image());
    checker.image(&image);
    accepted(checker);

    let written = image.iter().position(|byte| *byte != 0).unwrap();
    image[written + 300] ^= 1;
    let mut checker = judged(Workload::Blocks, &heard);
    checker.image(&image);
    refused(checker);
}

#[test]
fn memory_that_somebody_else_writes_is_noticed() {
    let (checker, _) = run(Workload::Memory, None, |_, _| {});
    accepted(checker);
    let mut rounds = 0;
    let (checker, _) = run(Workload::Memory, None, |machine, line| {
        rounds += u32::from(line.starts_with("BH counter.round"));
        if rounds == 2 && line.starts_with("BH counter.round") {
            let pid = machine.processes().of("vcpu").unwrap();
            GuestMemory::of(pid, 64 << 20).spoil(WORKING_MEMORY);
        }
    });
    refused(checker);
}

#[test]
fn clocks_agree_with_the_outside_and_a_step_between_them_is_noticed() {
    let (checker, heard) = run(Workload::Clock, None, |_, _| {});
    accepted(checker);
    let middle = heard[heard.len() / 2].0;
    let second = Duration::from_secs(1);
    let early =
        |(at, line): &(Duration, String)| (*at + second * u32::from(*at < middle), line.clone());
    let late =
        |(at, line): &(Duration, String)| (*at + second * u32::from(*at > middle), line.clone());
    refused(judged(Workload::Clock, &heard.iter().map(late).collect()));
    let mut jump: Transcript = heard.iter().map(early).collect();
    jump.retain(|(at, _)| *at < middle || *at > middle + second / 2);
    refused(judged(Workload::Clock, &jump));
}

#[test]
fn console_carries_each_line_once_both_ways() {
    let (checker, mut heard) = run(Workload::Transcript, None, |_, _| {});
    accepted(checker);
    let at = heard
        .iter()
        .rposition(|(_, line)| line.starts_with("BH serial.line"));
    heard.remove(at.unwrap());
    refused(judged(Workload::Transcript, &heard));
}

/// A host that dies while its guest works, comes back, and has the guest work on to its end.
struct Host {
    daemon: Daemon,
    disk: FaultyDisk,
    checker: Box<dyn Checker>,
    /// How much of the console the checker knows.
    told: usize,
}

impl Host {
    fn boot(work: Workload, bytes: u64, seconds: u64) -> Self {
        let host = Self {
            daemon: Daemon::start(),
            disk: disk_of(work, bytes),
            checker: work.checker(SEED),
            told: 0,
        };
        let all = arguments(work, seconds, Some(&host.disk));
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        host.daemon
            .good(&[&["create", "--name", "web"], &all[..]].concat());
        host.daemon.good(&["start", "web"]);
        host
    }

    fn until(&self, text: &str, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.daemon.output_of("web").matches(text).count() < count {
            assert!(
                Instant::now() < deadline,
                "{}",
                self.daemon.output_of("web")
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn tell_checker(&mut self) {
        let output = self.daemon.output_of("web");
        for line in output[self.told.min(output.len())..].lines() {
            self.checker.record(Duration::ZERO, line);
        }
        self.told = output.len();
    }

    /// Everything of the host ends at once, and its power with it.
    fn die(&mut self, cut: Cut) {
        let mut pids = self.daemon.pids();
        pids.extend(self.daemon.crash());
        pids.into_iter()
            .filter(|pid| bulkhead_tests::is_alive(*pid))
            .for_each(kill);
        self.disk.power_cut_as(cut);
        self.daemon.serve();
        self.tell_checker();
        self.checker.image(&self.disk.image());
    }

    fn work_to_the_end(&mut self) {
        self.daemon.good(&["start", "web"]);
        let waited = self.daemon.run(&["wait", "web"]);
        assert_eq!(waited.code, 0, "{}", self.daemon.output_of("web"));
        // The console of a machine that is started again begins anew.
        self.told = 0;
        self.tell_checker();
        self.checker.image(&self.disk.image());
    }

    fn end(self) -> Verified {
        self.checker.finish()
    }
}

/// Flushes are lies from now on.
fn lies() -> DiskRule {
    DiskRule::always(DiskOp::Flush, DiskAction::Lie)
}

#[test]
fn flushed_blocks_survive_a_power_cut() {
    for cut in [Cut::Everything, Cut::Seeded(SEED)] {
        let mut host = Host::boot(Workload::Blocks, BLOCKS_BYTES, 2);
        host.until("BH blocks.flushed", 10);
        host.die(cut);
        host.work_to_the_end();
        let found = host.end();
        assert!(found.held(), "{found:?}");
    }
}

#[test]
fn blocks_that_a_disk_only_said_to_have_flushed_are_missed() {
    let mut host = Host::boot(Workload::Blocks, BLOCKS_BYTES, 60);
    host.until("BH blocks.flushed", 5);
    host.disk.add(lies()).unwrap();
    let flushed = host
        .daemon
        .output_of("web")
        .matches("BH blocks.flushed")
        .count();
    host.until("BH blocks.flushed", flushed + 5);
    host.die(Cut::Everything);
    let found = host.end();
    assert!(
        found.errors.iter().any(|e| e.contains("which is older")),
        "{found:?}"
    );
}

#[test]
fn synchronised_files_survive_a_power_cut() {
    let mut host = Host::boot(Workload::Files, FILES_BYTES, 20);
    // A slow host gets no further than to the second one within that time.
    host.until("bh.files current", 1);
    host.die(Cut::Everything);
    host.work_to_the_end();
    let found = host.end();
    assert!(found.held(), "{found:?}");
}

#[test]
fn files_that_a_disk_only_said_to_have_kept_are_missed() {
    let mut host = Host::boot(Workload::Files, FILES_BYTES, 60);
    host.until("bh.files current", 1);
    host.disk.add(lies()).unwrap();
    let done = host
        .daemon
        .output_of("web")
        .matches("bh.files current")
        .count();
    host.until("bh.files current", done + 3);
    host.die(Cut::Everything);
    let found = host.end();
    assert!(
        found.errors.iter().any(|e| e.contains("synchronised")),
        "{found:?}"
    );
}
