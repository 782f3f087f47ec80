//! How a guest ends is told apart.

use bulkhead_ipc::protocol::vcpu::Outcome;

use crate::broker::{Plan, Vm};

fn outcome_of(cmdline: &'static str) -> Outcome {
    Vm::start(Plan::of(cmdline)).end().outcome
}

#[test]
fn power_off_comes_after_all_output() {
    let end = Vm::start(Plan::of("p")).end();
    assert_eq!(end.outcome, Outcome::PowerOff);
    assert_eq!(end.output, "hello from ring 0\n");
    assert_eq!(end.said, [], "there is nothing to report");
}

#[test]
fn triple_fault_is_told() {
    assert_eq!(outcome_of("t"), Outcome::TripleFault);
}

#[test]
fn guest_panic_is_told_and_a_loaded_crash_kernel_goes_on() {
    assert_eq!(outcome_of("g"), Outcome::GuestPanic);
    assert_eq!(outcome_of("c"), Outcome::PowerOff);
}

#[test]
fn debug_exit_gives_the_low_byte() {
    assert_eq!(outcome_of("d"), Outcome::DebugExit(0x2a));
}

#[test]
fn reset_register_and_keyboard_controller_reset() {
    assert_eq!(outcome_of("r"), Outcome::Reset);
    assert_eq!(outcome_of("k"), Outcome::Reset);
}
