//! While a machine is paused its guest writes nothing. Whatever a process that was taken over does then,
//! nothing in all of guest memory changes but the buffers of requests that it still holds, of
//! which there are fewer and fewer.

use super::{MEMORY_BYTES, beside_others, disk_with_canary};
use bulkhead_tests::{Daemon, GuestMemory, Programs};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};

/// Methods that go on for as long as their process lives.
const METHODS: [&str; 5] = ["scribble", "rings", "publish", "ring", "fill"];
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(300);
/// Looks in a row at which all memory is the same.
const LOOKS: usize = 4;
/// How long a hostile process may hold back what it has been asked.
const PATIENCE: Duration = Duration::from_secs(60);

fn all_of(memory: &GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; MEMORY_BYTES];
    assert!(memory.read(0, &mut bytes), "the guest is gone");
    bytes
}

/// Places that differ.
fn differences(was: &[u8], is: &[u8]) -> Vec<usize> {
    let pairs = was.iter().zip(is).enumerate();
    let changed = pairs.filter(|(_, (was, is))| was != is);
    changed.map(|(at, _)| at).take(16).collect()
}

fn paused_beside(kind: &str) {
    let programs = Programs::with(kind, "bulkhead-hostile");
    let mut daemon = Daemon::start();
    daemon.end(Signal::SIGTERM);
    daemon.serve_with(&["--libexec-dir", programs.argument()]);
    daemon.serve();
    for method in METHODS {
        let _others = beside_others();
        let name = format!("hostile-{method}-1");
        let disks = [disk_with_canary(), disk_with_canary()];
        let paths = disks.each_ref().map(|disk| disk.path().to_str().unwrap());
        let more = ["--vsock", "--disk", paths[0], "--disk", paths[1]];
        daemon.create_and_start(&name, "mode=beside fill=1 seconds=100 disk=1", &more);
        let memory = GuestMemory::of(daemon.process(&name, "vcpu"), MEMORY_BYTES);
        if kind == "legacy" {
            std::thread::sleep(Duration::from_secs(1));
        } else {
            daemon.until_output(&name, "BH beside.round ");
        }
        daemon.good(&["pause", &name]);
        let deadline = Instant::now() + PATIENCE;
        let (mut was, mut same, mut looks) = (all_of(&memory), 0, 0);
        while same < LOOKS {
            std::thread::sleep(PAUSE);
            let is = all_of(&memory);
            looks += 1;
            same = if is == was { same + 1 } else { 0 };
            assert!(
                Instant::now() < deadline,
                "{kind} {method}: memory goes on changing, at {:x?}\n{}",
                differences(&was, &is),
                daemon.log()
            );
            was = is;
        }
        println!(
            "{kind} {method}: not a byte of {MEMORY_BYTES} changed for {LOOKS} of {looks} looks"
        );
        assert_eq!(daemon.state_of(&name), "paused");
        daemon.good(&["kill", &name]);
        daemon.good(&["rm", &name]);
    }
}

#[test]
fn memory_of_a_paused_machine_stands_still_beside_a_taken_over_rng() {
    paused_beside("rng");
}

#[test]
fn memory_of_a_paused_machine_stands_still_beside_a_taken_over_vsock() {
    paused_beside("vsock");
}

#[test]
fn memory_of_a_paused_machine_stands_still_beside_a_taken_over_console() {
    paused_beside("console");
}

#[test]
fn memory_of_a_paused_machine_stands_still_beside_a_taken_over_legacy() {
    paused_beside("legacy");
}

#[test]
fn memory_of_a_paused_machine_stands_still_beside_a_taken_over_blk() {
    paused_beside("blk");
}
