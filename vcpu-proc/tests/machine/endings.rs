//! How a guest ends is told apart, and a crash is described.

use std::io::{Read, Seek};

use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome};

use crate::broker::{End, Plan, Vm};

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

fn report_of(end: &End) -> String {
    let piece = |said: &FromVcpu| match said {
        FromVcpu::Report { text } => text.clone(),
        other => panic!("{other:?}"),
    };
    end.said.iter().map(piece).collect()
}

#[test]
fn crash_is_described_with_every_vcpu_and_a_core() {
    for program in [false, true] {
        let core = tempfile::tempfile().unwrap();
        let end = Vm::start(Plan {
            vcpus: 2,
            core: Some(core.try_clone().unwrap()),
            program,
            ..Plan::of("g")
        })
        .end();
        assert_eq!(end.outcome, Outcome::GuestPanic);
        let report = report_of(&end);
        assert!(report.contains("panicked on vCPU 0"), "{report}");
        assert!(
            report.contains("vCPU 0\n") && report.contains("vCPU 1\n"),
            "{report}"
        );
        assert!(report.ends_with("the core file is complete\n"), "{report}");
        let mut magic = [0; 4];
        (&core).rewind().unwrap();
        (&core).read_exact(&mut magic).unwrap();
        assert_eq!(&magic, b"\x7fELF");
        assert!(core.metadata().unwrap().len() > 64 << 20);
    }
}

#[test]
fn triple_fault_is_described_behind_the_walls() {
    let end = Vm::start(Plan {
        program: true,
        ..Plan::of("t")
    })
    .end();
    assert_eq!(end.outcome, Outcome::TripleFault);
    assert!(report_of(&end).contains("triple fault on vCPU 0"));
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
