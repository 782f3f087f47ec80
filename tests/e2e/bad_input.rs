//! Bad input gets one clear line that names what is wrong, before any process is started.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_tests::{Ended, Machine};
use std::path::Path;

fn refused(arguments: &[&str], code: i32, words: &[&str]) -> Ended {
    let ended = Machine::run(arguments).wait();
    assert_eq!(ended.code, code, "{arguments:?}: {ended:?}");
    for word in words {
        assert!(
            ended.errors.contains(word),
            "{arguments:?}: no `{word}` in {}",
            ended.errors
        );
    }
    assert!(!ended.errors.contains("panicked"), "{ended:?}");
    ended
}

fn guest() -> String {
    bulkhead_tests::path("BULKHEAD_TEST_GUEST")
        .to_str()
        .unwrap()
        .to_owned()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn missing_kernel_is_named() {
    refused(&["--kernel", "/does/not/exist"], 2, &["/does/not/exist"]);
}

#[test]
fn truncated_kernel_is_a_failed_start_that_says_why() {
    let directory = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(guest()).unwrap();
    for keep in [3, 40, 100, 4096] {
        let kernel = directory.path().join("kernel");
        std::fs::write(&kernel, &bytes[..keep]).unwrap();
        refused(&["--kernel", text(&kernel)], 6, &["kernel"]);
    }
}

#[test]
fn empty_kernel_is_refused() {
    let kernel = tempfile::NamedTempFile::new().unwrap();
    refused(&["--kernel", text(kernel.path())], 2, &["empty"]);
}

#[test]
fn file_that_is_no_kernel_is_told_what_it_is_and_what_is_accepted() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = directory.path().join("kernel");
    std::fs::write(&kernel, b"QFI\xfb\0\0\0\x03 and so on").unwrap();
    refused(&["--kernel", text(&kernel)], 6, &["qcow2", "bzImage"]);
}

#[test]
fn initrd_larger_than_memory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let initrd = directory.path().join("initrd");
    std::fs::File::create(&initrd)
        .unwrap()
        .set_len(64 << 20)
        .unwrap();
    let arguments = [
        "--kernel",
        &guest(),
        "--initrd",
        text(&initrd),
        "-m",
        "32MiB",
    ];
    refused(&arguments, 2, &["initrd", "32MiB"]);
}

#[test]
fn directory_as_a_disk_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let disk = text(directory.path());
    refused(
        &["--kernel", &guest(), "--disk", disk],
        2,
        &[disk, "directory"],
    );
}

#[test]
fn two_writers_on_one_disk_are_refused() {
    let disk = bulkhead_tests::disk(1 << 20);
    let path = text(disk.path());
    refused(
        &["--kernel", &guest(), "--disk", path, "--disk", path],
        2,
        &[path],
    );
    let mut first = Machine::test_guest("mode=idle", &["--disk", path]);
    first.expect("BH idle ");
    let ended = Machine::run(["--kernel", &guest(), "--disk", path]).wait();
    assert!(matches!(ended.code, 2 | 6), "{ended:?}");
    assert!(ended.errors.contains(path), "{ended:?}");
}

#[test]
fn sizes_without_units_and_silly_counts_are_refused() {
    let guest = guest();
    refused(&["--kernel", &guest, "-m", "512"], 2, &["512"]);
    refused(&["--kernel", &guest, "-m", "1MiB"], 2, &["16MiB"]);
    refused(&["--kernel", &guest, "-c", "33"], 2, &["33", "32"]);
    refused(&["--kernel", &guest, "-m", "900TiB"], 2, &["memory"]);
}

#[test]
fn vm_file_errors_name_file_line_and_key() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("vm.toml");
    std::fs::write(&file, "name = \"a\"\n[machine]\nmemroy = \"64MiB\"\n").unwrap();
    refused(&[text(&file)], 2, &["vm.toml:3", "memroy", "memory"]);
}
