//! What the guest finds: processors, memory, ports, interrupt lines.

use std::time::{Duration, Instant};

use bulkhead_ipc::protocol::vcpu::{FromVcpu, Outcome, ToVcpu};

use crate::broker::{Plan, Vm, soon};
use crate::legacy::{CALL_ANSWER, Manners};

const HELLO: &str = "hello from ring 0\n";

#[test]
fn second_processor_starts() {
    let plan = Plan {
        vcpus: 2,
        ..Plan::of("aB")
    };
    let end = Vm::start(plan).end();
    assert_eq!(
        (end.outcome, end.output.as_str()),
        (Outcome::PowerOff, HELLO)
    );
}

#[test]
fn thirty_one_more_processors_start() {
    let plan = Plan {
        vcpus: 32,
        // '`' is 'A' + 31.
        ..Plan::of("a`")
    };
    let vm = Vm::start(plan);
    let walls = std::sync::Arc::clone(&vm.walls);
    let end = vm.end();
    assert_eq!(
        (end.outcome, end.output.as_str()),
        (Outcome::PowerOff, HELLO)
    );
    let locked = walls.locked.lock().unwrap();
    let count = |thread| {
        locked
            .iter()
            .filter(|name| name.starts_with(thread))
            .count()
    };
    assert_eq!((count("vcpu"), count("gate"), count("main")), (32, 1, 1));
}

#[test]
fn memory_goes_on_above_4_gib() {
    let plan = Plan {
        memory_bytes: 5 << 30,
        ..Plan::of("m")
    };
    let end = Vm::start(plan).end();
    assert_eq!(
        (end.outcome, end.output.as_str()),
        (Outcome::PowerOff, HELLO)
    );
}

#[test]
fn what_nobody_owns_reads_as_all_ones() {
    let vm = Vm::start(Plan::of("i"));
    vm.wait_for_output(5);
    assert_eq!(vm.output(), [0xff, 0xff, 0xff, 0b11, 0]);
    vm.send(&ToVcpu::Kill);
    vm.leave();
}

#[test]
fn power_button_sets_its_event_and_raises_line_9() {
    let vm = Vm::start(Plan::of("b"));
    vm.send(&ToVcpu::PowerButton);
    vm.wait_for_output(2);
    let output = vm.output();
    assert_eq!((output[0], output[1] & 2), (1, 2));
    vm.send(&ToVcpu::Kill);
    vm.leave();
}

#[test]
fn legacy_process_raises_its_line_and_answers_calls() {
    let vm = Vm::start(Plan::of("q"));
    vm.wait_for_output(1);
    assert_eq!(vm.output(), [CALL_ANSWER]);
    vm.send(&ToVcpu::Kill);
    vm.leave();
}

#[test]
fn call_to_a_silent_legacy_process_reads_as_all_ones_after_its_deadline() {
    let start = Instant::now();
    let plan = Plan {
        manners: Manners::Silent,
        ..Plan::of("l")
    };
    let end = Vm::start(plan).end();
    assert_eq!(end.outcome, Outcome::DebugExit(0xff));
    let faults = end.said.iter();
    let faults = faults.filter(|said| matches!(said, FromVcpu::LegacyFault { .. }));
    assert_eq!(faults.count(), 1, "it is told once: {:?}", end.said);
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(1), "{waited:?}");
    assert!(waited < Duration::from_secs(20), "{waited:?}");
}

#[test]
fn lying_legacy_process_is_given_up_at_once() {
    soon(Duration::from_secs(1), || {
        let plan = Plan {
            manners: Manners::Liar,
            ..Plan::of("p")
        };
        let end = Vm::start(plan).end();
        assert_eq!((end.outcome, end.output.as_str()), (Outcome::PowerOff, ""));
        assert!(matches!(end.said[..], [FromVcpu::LegacyFault { .. }, ..]));
    });
}

#[test]
fn lost_legacy_process_reads_as_all_ones_without_waiting() {
    soon(Duration::from_secs(1), || {
        let plan = Plan {
            manners: Manners::Silent,
            ..Plan::of("l")
        };
        let vm = Vm::start(plan);
        vm.send(&ToVcpu::LegacyLost);
        assert_eq!(vm.end().outcome, Outcome::DebugExit(0xff));
    });
}
