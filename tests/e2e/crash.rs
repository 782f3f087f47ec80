//! A crash is explained on standard error, and kept in a core that a debugger opens.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::Machine;

#[test]
fn triple_fault_is_explained() {
    let ended = Machine::test_guest("mode=hello end=triple", &[]).wait();
    assert_eq!(ended.code, 10);
    for part in ["RIP", "CR3", "GDT", "IDT"] {
        assert!(
            ended.errors.to_uppercase().contains(part),
            "no {part} in:\n{}",
            ended.errors
        );
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests look at cores as a developer does"
)]
fn gdb(core: &str, commands: &[&str]) -> String {
    let mut gdb = std::process::Command::new("gdb");
    gdb.args(["--batch", "--nx"]);
    for command in commands {
        gdb.args(["-ex", command]);
    }
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let output = gdb.arg(guest).arg(core).output();
    let output = output.unwrap_or_else(|e| panic!("gdb: {e}; `cargo xtask test` installs it"));
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn core_of_a_crashed_guest_is_opened_by_gdb() {
    let directory = tempfile::tempdir().unwrap();
    let core = directory.path().join("core");
    let core = core.to_str().unwrap();
    let cmdline = "mode=hello end=triple";
    let ended = Machine::test_guest(cmdline, &["-c", "2", "--core", core]).wait();
    assert_eq!(ended.code, 10, "{ended:?}");
    let commands = ["info threads", "x/1i $rip", "compare-sections .text"];
    let shown = gdb(core, &commands);
    for part in [
        "* 1    LWP 1",
        "  2    LWP 2",
        "<service_triple_fault+8>:\tud2",
        // The guest's memory is in the core as its file had it.
        "Section .text, range",
        "matched.",
    ] {
        assert!(shown.contains(part), "no `{part}` in\n{shown}");
    }
    assert!(!shown.contains("MIS-MATCHED"), "{shown}");
}
