//! A machine outlives its broker: its guest and the guest's I/O go on, whatever happens to the broker
//! and when, and nobody else may start a machine of its name meanwhile.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_tests::Machine;
use tempfile::NamedTempFile;

fn disk(bytes: u64) -> NamedTempFile {
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(bytes).unwrap();
    disk
}

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
