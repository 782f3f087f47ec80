//! What the broker asks is done, whatever the guest does meanwhile.

use std::time::Duration;

use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};

use crate::broker::{Plan, Vm, soon};
use crate::legacy::Manners;

#[test]
fn kill_stops_spinning_and_halted_guests() {
    for cmdline in ["s", "h", "x"] {
        for vcpus in [1, 2] {
            let vm = Vm::start(Plan {
                vcpus,
                ..Plan::of(cmdline)
            });
            vm.send(&ToVcpu::Kill);
            assert_eq!(vm.end().outcome, Outcome::Killed, "{cmdline} {vcpus}");
        }
    }
}

#[test]
fn kill_does_not_wait_for_a_silent_legacy_process() {
    soon(Duration::from_millis(800), || {
        let vm = Vm::start(Plan {
            manners: Manners::Silent,
            ..Plan::of("x")
        });
        std::thread::sleep(Duration::from_millis(50));
        vm.send(&ToVcpu::Kill);
        assert_eq!(vm.end().outcome, Outcome::Killed);
    });
}

#[test]
fn broker_that_dies_is_succeeded_and_the_machine_goes_on() {
    let mut vm = Vm::start(Plan {
        program: true,
        ..Plan::of("x")
    });
    for _ in 0..50 {
        let so_far = vm.output().len();
        vm.change_broker();
        vm.wait_for_output(so_far + 10);
        vm.send(&ToVcpu::Ping(42));
        assert_eq!(vm.hear(), FromVcpu::Pong(42));
    }
    vm.send(&ToVcpu::Kill);
    assert_eq!(vm.end().outcome, Outcome::Killed);
}

#[test]
fn next_broker_hears_what_the_last_one_did_not() {
    let mut vm = Vm::start(Plan {
        program: true,
        ..Plan::of("p")
    });
    std::thread::sleep(Duration::from_millis(100));
    vm.change_broker();
    assert_eq!(vm.end().outcome, Outcome::PowerOff);
}

#[test]
fn ping_is_answered_while_the_guest_spins() {
    let vm = Vm::start(Plan::of("s"));
    vm.send(&ToVcpu::Ping(42));
    assert_eq!(vm.hear(), FromVcpu::Pong(42));
    vm.send(&ToVcpu::Kill);
    assert_eq!(vm.end().outcome, Outcome::Killed);
}

#[test]
fn paused_guest_does_nothing_until_it_is_resumed() {
    let vm = Vm::start(Plan {
        vcpus: 2,
        ..Plan::of("x")
    });
    vm.wait_for_output(10);
    for _ in 0..20 {
        vm.send(&ToVcpu::Pause);
        assert_eq!(vm.hear(), FromVcpu::Paused);
        // What was posted before is still carried out.
        let so_far = vm.settled_output();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(vm.output().len(), so_far);
        vm.send(&ToVcpu::Resume);
        assert_eq!(vm.hear(), FromVcpu::Resumed);
        vm.wait_for_output(so_far + 10);
    }
    vm.send(&ToVcpu::Kill);
    let end = vm.end();
    assert_eq!(end.outcome, Outcome::Killed);
    assert!(end.output.bytes().all(|byte| byte == b'x'));
}

#[test]
fn pause_before_the_first_instruction_and_kill_while_paused() {
    let vm = Vm::start(Plan::of("h"));
    vm.send(&ToVcpu::Pause);
    assert_eq!(vm.hear(), FromVcpu::Paused);
    vm.send(&ToVcpu::Pause);
    assert_eq!(
        vm.hear(),
        FromVcpu::Paused,
        "asking again is answered again"
    );
    vm.send(&ToVcpu::Kill);
    assert_eq!(vm.end().outcome, Outcome::Killed);
}
