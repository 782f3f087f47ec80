//! Hobby kernels boot by both versions of Multiboot, and what they do wrong costs the host nothing.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Ended, Machine};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// What the kernel of `hobby/kernel.s` does.
#[derive(Debug, Clone, Copy)]
enum End {
    PowerOff = 0,
    Flood = 1,
    Sine = 2,
    WildJump = 3,
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests assemble a kernel as its author would"
)]
fn tool(program: &str, arguments: &[&str]) {
    let output = std::process::Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|e| panic!("{program}: {e}; `cargo xtask test` installs it"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

fn kernel(directory: &TempDir, version: u8, end: End) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("e2e/hobby/kernel.s");
    let object = directory.path().join("kernel.o");
    let kernel = directory.path().join("kernel.elf");
    let (object_text, kernel_text) = (object.to_str().unwrap(), kernel.to_str().unwrap());
    let version = format!("MULTIBOOT={version}");
    let end = format!("END={}", end as u8);
    let source = source.to_str().unwrap();
    let defines = ["--32", "--defsym", &version, "--defsym", &end];
    let arguments = [&defines[..], &["-o", object_text, source]].concat();
    tool("as", &arguments);
    let place = ["-m", "elf_i386", "-N", "-Ttext=0x100000", "-e", "_start"];
    tool(
        "ld",
        &[&place[..], &["-o", kernel_text, object_text]].concat(),
    );
    kernel
}

fn boots(version: u8, magic: &str) {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(&directory, version, End::PowerOff);
    let module = directory.path().join("module");
    std::fs::write(&module, "content of a module\0").unwrap();
    let ended = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "--initrd",
        module.to_str().unwrap(),
        "--cmdline=colour=blue quiet",
        "-m",
        "32MiB",
        "--timeout=60s",
    ])
    .wait();
    assert_eq!(ended.code, 0, "{ended:?}");
    let line = ended.console.lines().find(|line| line.contains("hobby"));
    let line = line.unwrap_or_else(|| panic!("{ended:?}"));
    for part in [
        format!("hobby magic={magic}"),
        "colour=blue quiet".to_owned(),
        "module=[content of a module]".to_owned(),
    ] {
        assert!(line.contains(&part), "no `{part}` in {line}");
    }
}

#[test]
fn multiboot_1_kernel_boots_and_powers_off() {
    boots(1, "2badb002");
}

#[test]
fn multiboot_2_kernel_boots_and_powers_off() {
    boots(2, "36d76289");
}

#[test]
fn serial_flood_fills_its_ring_and_no_more() {
    const CAPACITY: u64 = 16 << 10;
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(&directory, 1, End::Flood);
    let mut machine = Machine::run([
        "--kernel",
        kernel.to_str().unwrap(),
        "-m",
        "32MiB",
        "--timeout=120s",
        "--console-history=16KiB",
    ]);
    let row = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.\n";
    // Well past the point where the ring begins anew.
    for _ in 0..3 * CAPACITY / row.len() as u64 {
        machine.expect(row);
    }
    assert_eq!(machine.ring_bytes("serial.ring"), CAPACITY + 4096);
    machine.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(machine.wait().code, 12);
}

fn crash(end: End) -> Ended {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(&directory, 1, end);
    let kernel = kernel.to_str().unwrap();
    Machine::run(["--kernel", kernel, "-m", "32MiB", "--timeout=60s"]).wait()
}

#[test]
fn instruction_that_kvm_cannot_run_is_an_outcome_of_its_own() {
    let ended = crash(End::Sine);
    if Path::new("/sys/module/kvm_pvm").exists() {
        assert_eq!(ended.code, 16, "{ended:?}");
        assert!(ended.errors.contains("fsin"), "{ended:?}");
    } else {
        assert_eq!(ended.code, 0, "{ended:?}");
    }
}

#[test]
fn jump_to_nowhere_is_explained() {
    let ended = crash(End::WildJump);
    // KVM either gives up or raises an exception, which this kernel does not handle.
    assert!(matches!(ended.code, 10 | 16), "{ended:?}");
    assert!(ended.errors.contains("rip 00000000d8000000"), "{ended:?}");
}
