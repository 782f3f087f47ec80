//! A device gets guest memory directly in a program of the benchmarks alone: no program that users run has
//! the code for it.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use std::fs;

/// In the name of everything that does without gates, and so in the symbols of a program that has it.
const MARK: &[u8] = b"ungated";

fn has_mark(program: &str) -> bool {
    let path = bulkhead_tests::path("BULKHEAD_BIN_DIR").join(program);
    let bytes = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    bytes.windows(MARK.len()).any(|window| window == MARK)
}

#[test]
fn no_program_but_that_of_the_benchmark_can_do_without_gates() {
    for program in [
        "bulkhead",
        "bulkhead-vcpu",
        "bulkhead-blk",
        "bulkhead-console",
        "bulkhead-legacy",
        "bulkhead-rng",
        "bulkhead-net",
        "bulkhead-vsock",
        "bulkhead-fs",
    ] {
        assert!(!has_mark(program), "{program}");
    }
    assert!(has_mark("bulkhead-direct"), "the mark is not what it was");
}
