//! A machine outlives its broker: its guest and the guest's I/O go on, whatever happens to the broker
//! and when, and nobody else may start a machine of its name meanwhile.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead::launch::users::UserRange;
use bulkhead::vm::session::{Command, EVENTS_CAPACITY, Ending, Finished, RunError};
use bulkhead::vm::take_over;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_tests::{Machine, disk};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;
use tokio::sync::mpsc;

#[test]
fn guest_and_its_verified_io_go_on_when_the_broker_is_killed() {
    let disk = disk(64 << 20);
    let path = disk.path().to_str().unwrap();
    let load = "mode=blk sectors=65536 qd=32 seed=5";
    let mut machine = Machine::test_guest(load, &["--disk", path, "--name=web"]);
    machine.expect("BH blk.refusals");
    let _rng = machine.process("rng");
    machine.kill_broker();
    let history = machine.serial_history();
    assert!(!history.contains("BH done"), "too late: {history}");
    machine.expect_history("BH done errors=0");

    let orphans = machine.orphans();
    let [orphan] = &orphans[..] else {
        panic!("{orphans:?}");
    };
    assert_eq!(orphan.record.spec.name, "web");
    let kinds: Vec<ProcKind> = orphan.record.processes.iter().map(|p| p.id.kind).collect();
    let all = [
        ProcKind::Vcpu,
        ProcKind::Legacy,
        ProcKind::Console,
        ProcKind::Rng,
        ProcKind::Blk,
    ];
    assert_eq!(kinds, all);
    // The vCPU process waits for a broker that hears how the guest ended.
    assert!(orphan.is_alive);
    assert_eq!(orphan.alive().len(), all.len());
}

/// This test as the next broker of the machine `web`, until that is over.
fn next_broker(machine: &Machine, commands: &[Command]) -> Result<Finished, RunError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let (commander, asked) = mpsc::channel(16);
    for command in commands {
        commander.try_send(command.clone()).unwrap();
    }
    let (events, mut heard) = mpsc::channel(EVENTS_CAPACITY);
    runtime.block_on(async {
        let listen = async { while heard.recv().await.is_some() {} };
        let directory = machine.runtime();
        let run = take_over(&directory, "web", None, UserRange::DEFAULT, asked, events);
        let (finished, ()) = tokio::join!(run, listen);
        finished
    })
}

fn loaded(disk: &NamedTempFile) -> Machine {
    let path = disk.path().to_str().unwrap();
    let load = "mode=blk sectors=65536 qd=32 seed=5";
    let mut machine = Machine::test_guest(load, &["--disk", path, "--name=web"]);
    machine.expect("BH blk.refusals");
    let _rng = machine.process("rng");
    // Until every process is locked a start would be undone.
    machine.expect_phase("running");
    machine
}

#[test]
fn next_broker_goes_on_with_the_machine_and_hears_how_it_ends() {
    let disk = disk(64 << 20);
    let mut machine = loaded(&disk);
    machine.kill_broker();
    let finished = next_broker(&machine, &[]).unwrap();
    assert_eq!(finished.ending, Ending::PoweredOff);
    assert_eq!(finished.degraded, []);
    assert!(machine.serial_history().contains("BH done errors=0"));
    assert_eq!(machine.orphans(), []);
    assert!(!machine.runtime().join("vms/web").exists());
}

#[test]
fn next_broker_replaces_the_disk_process_that_died_meanwhile_and_the_guest_sees_no_error() {
    let disk = disk(64 << 20);
    let mut machine = loaded(&disk);
    let blk = machine.process("blk");
    machine.kill_broker();
    kill(Pid::from_raw(i32::try_from(blk).unwrap()), Signal::SIGKILL).unwrap();
    let finished = next_broker(&machine, &[]).unwrap();
    assert_eq!(finished.ending, Ending::PoweredOff);
    assert_eq!(finished.restarts.len(), 1, "{finished:?}");
    assert!(machine.serial_history().contains("BH done errors=0"));
}

#[test]
fn next_broker_hears_of_an_end_that_nobody_has_heard_of() {
    let mut machine = Machine::test_guest("mode=idle seconds=1", &["--name=web"]);
    machine.expect("BH idle ");
    machine.expect_phase("running");
    machine.kill_broker();
    machine.expect_history("BH done errors=0");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let finished = next_broker(&machine, &[]).unwrap();
    assert_eq!(finished.ending, Ending::PoweredOff);
}

#[test]
fn next_broker_hears_of_vcpus_that_died_meanwhile() {
    let mut machine = Machine::test_guest("mode=idle", &["--name=web"]);
    machine.expect("BH idle ");
    machine.expect_phase("running");
    let vcpu = machine.process("vcpu");
    machine.kill_broker();
    kill(Pid::from_raw(i32::try_from(vcpu).unwrap()), Signal::SIGKILL).unwrap();
    let finished = next_broker(&machine, &[]).unwrap();
    assert!(
        matches!(finished.ending, Ending::Lost { .. }),
        "{finished:?}"
    );
    assert_eq!(machine.orphans(), []);
}

#[test]
fn machine_that_cannot_be_taken_over_stays_on_record_and_alive() {
    let mut machine = Machine::test_guest("mode=idle", &["--name=web"]);
    machine.expect("BH idle ");
    machine.expect_phase("running");
    machine.kill_broker();
    let ring = machine.scratch().join("state/vms/web/serial.ring");
    let aside = ring.with_extension("aside");
    std::fs::rename(&ring, &aside).unwrap();
    next_broker(&machine, &[]).unwrap_err();
    assert!(machine.orphans()[0].is_alive);
    std::fs::rename(&aside, &ring).unwrap();
    let finished = next_broker(&machine, &[Command::Kill]).unwrap();
    assert_eq!(finished.ending, Ending::Killed);
}

#[test]
fn machine_that_is_owned_is_not_taken_over_and_an_orphan_can_be_killed() {
    let mut machine = Machine::test_guest("mode=idle", &["--name=web"]);
    machine.expect("BH idle ");
    machine.expect_phase("running");
    let refused = next_broker(&machine, &[]).unwrap_err();
    let broker = machine.pid().to_string();
    assert!(refused.to_string().contains(&broker), "{refused}");
    machine.kill_broker();
    let finished = next_broker(&machine, &[Command::Kill]).unwrap();
    assert_eq!(finished.ending, Ending::Killed);
    assert_eq!(machine.orphans(), []);
}

#[test]
fn second_machine_of_the_name_is_refused_with_the_pid_of_the_first() {
    let mut machine = Machine::test_guest("mode=idle", &["--name=web"]);
    machine.expect("BH idle ");
    let broker = machine.pid().to_string();
    let refused = machine.another(&["--name=web"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.errors.contains(&broker), "{refused:?}");
    machine.kill_broker();
    let vcpu = machine.orphans()[0].record.processes[0].pid.to_string();
    let refused = machine.another(&["--name=web"]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.errors.contains(&vcpu), "{refused:?}");
    assert!(refused.errors.contains("bulkhead serve"), "{refused:?}");
}

#[test]
fn nothing_is_left_of_a_machine_that_has_ended() {
    let mut machine = Machine::test_guest("mode=idle seconds=1", &["--name=web", "--rm"]);
    machine.expect("BH idle ");
    let home = machine.runtime().join("vms/web");
    assert!(home.join("record").exists());
    machine.expect("BH done");
    let (ended, scratch) = machine.wait_and_keep();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!home.exists());
    assert!(!scratch.path().join("state/vms/web").exists());
}
