//! Behind the walls of its policy the program does all that it is for.

use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};

use crate::broker::{Plan, Vm};

fn program(cmdline: &'static str, vcpus: u8) -> Plan {
    Plan {
        vcpus,
        program: true,
        ..Plan::of(cmdline)
    }
}

#[test]
fn guest_runs_behind_the_walls() {
    let end = Vm::start(program("p", 1)).end();
    assert_eq!(end.outcome, Outcome::PowerOff);
    assert_eq!(end.output, "hello from ring 0\n");
}

#[test]
fn narrower_walls_of_a_complete_kvm_suffice() {
    for (cmdline, outcome) in [
        ("aB", Outcome::PowerOff),
        ("q", Outcome::PowerOff),
        ("t", Outcome::TripleFault),
    ] {
        let end = Vm::start(Plan {
            complete_kvm: true,
            ..program(cmdline, 2)
        })
        .end();
        assert_eq!(end.outcome, outcome);
    }
    let vm = Vm::start(Plan {
        complete_kvm: true,
        ..program("x", 2)
    });
    vm.wait_for_output(10);
    vm.send(&ToVcpu::Pause);
    assert_eq!(vm.hear(), FromVcpu::Paused);
    vm.send(&ToVcpu::Resume);
    assert_eq!(vm.hear(), FromVcpu::Resumed);
    vm.send(&ToVcpu::Kill);
    assert_eq!(vm.end().outcome, Outcome::Killed);
}

#[test]
fn processors_start_behind_the_walls() {
    let end = Vm::start(program("a`", 32)).end();
    assert_eq!(end.outcome, Outcome::PowerOff);
}

#[test]
fn calls_interrupts_and_events_work_behind_the_walls() {
    let vm = Vm::start(program("q", 1));
    assert_eq!(vm.end().outcome, Outcome::PowerOff);
    let vm = Vm::start(program("b", 1));
    vm.send(&ToVcpu::PowerButton);
    assert_eq!(vm.end().outcome, Outcome::PowerOff);
}

#[test]
fn pause_and_kill_work_behind_the_walls() {
    let vm = Vm::start(program("x", 2));
    vm.wait_for_output(10);
    vm.send(&ToVcpu::Pause);
    assert_eq!(vm.hear(), FromVcpu::Paused);
    vm.send(&ToVcpu::Resume);
    assert_eq!(vm.hear(), FromVcpu::Resumed);
    vm.send(&ToVcpu::Kill);
    assert_eq!(vm.end().outcome, Outcome::Killed);
}
