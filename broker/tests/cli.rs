//! The `bulkhead` command as scripts see it: output, errors and exit codes of the built program.
#![allow(
    clippy::disallowed_methods,
    clippy::tests_outside_test_module,
    reason = "an integration test starts the program under test"
)]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// A program that finds nothing of this host's user.
fn bulkhead(home: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(args)
        .env_clear()
        .env("HOME", home)
        .env("BULKHEAD_CONFIG_DIR", home.join("config"))
        .env("BULKHEAD_STATE_DIR", home.join("state"))
        .env("BULKHEAD_RUNTIME_DIR", home.join("run"))
        .current_dir(home)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A home with a kernel and two disks.
fn home() -> TempDir {
    let home = tempfile::tempdir().unwrap();
    for name in ["vmlinuz", "a.img", "b.img"] {
        fs::write(home.path().join(name), [0; 1024]).unwrap();
    }
    home
}

fn succeeds(home: &Path, args: &[&str]) -> String {
    let done = bulkhead(home, args);
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(0), "{args:?}: {error}");
    assert_eq!(error, "", "{args:?}");
    String::from_utf8(done.stdout).unwrap()
}

fn fails(home: &Path, args: &[&str], code: i32, message: &str) {
    let done = bulkhead(home, args);
    let error = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(code), "{args:?}: {error}");
    assert!(error.contains(message), "{args:?}: {error}");
    assert_eq!(done.stdout, b"", "{args:?}");
    assert!(!error.contains("panicked"), "{error}");
}

#[test]
fn help_explains_escapes_exit_codes_environment_and_examples() {
    let home = home();
    let help = succeeds(home.path(), &["run", "--help"]);
    for part in [
        "Ctrl-]",
        "Ctrl-A x",
        "124",
        "130",
        "BULKHEAD_STATE_DIR",
        "Examples:",
        "--print-config",
    ] {
        assert!(help.contains(part), "{part} is not in\n{help}");
    }
    let main = succeeds(home.path(), &["--help"]);
    for part in [
        "run",
        "doctor",
        "policy",
        "image",
        "completions",
        "man",
        "Exit codes:",
        "Examples:",
    ] {
        assert!(main.contains(part), "{part} is not in\n{main}");
    }
    let version = succeeds(home.path(), &["--version"]);
    assert_eq!(
        version,
        concat!("bulkhead ", env!("CARGO_PKG_VERSION"), "\n")
    );
}

#[test]
fn wrong_usage_exits_with_2_and_one_reason() {
    let home = home();
    for (args, message) in [
        (&["fly"][..], "unrecognized subcommand 'fly'"),
        (&["run", "--memry", "1GiB"], "--memory"),
        (&["run", "-m", "512"], "expected a size with a unit"),
        (&["run", "-c", "0"], "1..=32"),
        (
            &["run", "--timeout", "60"],
            "expected a duration with a unit",
        ),
        (&["run", "--escape", "x"], "expected a control key"),
        (
            &["run", "--console-size", "80"],
            "expected columns and rows",
        ),
        (
            &["run", "none.toml"],
            "none.toml:1:1: expected a readable VM file: No such file",
        ),
        (
            &["run", "."],
            "expected a readable VM file: it is a directory",
        ),
        (
            &["run", "--kernel", "none"],
            "--kernel none: expected a kernel image: No such file",
        ),
        (
            &["run", "--kernel", "."],
            "--kernel .: expected a kernel image, found a directory",
        ),
        (
            &["run", "--kernel", "vmlinuz", "--name", "a/b"],
            "--name a/b: expected 1 to 64 letters",
        ),
        (
            &["run", "--kernel", "vmlinuz", "-m", "8MiB"],
            "--memory 8MiB: expected at least 16MiB",
        ),
        (
            &["run", "--kernel", "vmlinuz", "-m", "1000TiB"],
            "that this host has available now",
        ),
        (
            &["run", "--kernel", "vmlinuz", "--disk", "a.img,readonyl"],
            "did you mean `readonly`?",
        ),
        (
            &[
                "run", "--kernel", "vmlinuz", "--disk", "a.img", "--disk", "./a.img",
            ],
            "--disk ./a.img: the same file is used at --disk a.img",
        ),
        (
            &["image", "info", "none"],
            "inspecting the image none: No such file",
        ),
        (
            &["image", "create", "a.img", "1MiB"],
            "making the image a.img: File exists",
        ),
        (
            &["image", "create", "c.img", "1KB"],
            "expected a multiple of 512",
        ),
        (
            &["image", "create", "c.img", "1MiB", "--format", "vdi"],
            "convert it with `bulkhead image convert --from vdi` first",
        ),
        (
            &["policy", "show", "gpu"],
            "expected one of vcpu, legacy, console, blk, rng",
        ),
        (&[], "Usage:"),
    ] {
        fails(home.path(), args, 2, message);
    }
    assert!(
        !home.path().join("state").exists(),
        "a failure left state behind"
    );
}

#[test]
fn missing_programs_are_what_the_host_lacks() {
    let home = home();
    let empty = home.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let empty = empty.to_str().unwrap();
    fails(
        home.path(),
        &["run", "--libexec-dir", empty],
        4,
        "bulkhead-guest.elf is not in",
    );
    let args = ["run", "--kernel", "vmlinuz", "--libexec-dir", empty];
    fails(home.path(), &args, 4, "bulkhead-vcpu is not in");
}

#[test]
fn printed_config_is_a_vm_file_for_the_same_machine() {
    let home = home();
    let options = [
        "run",
        "--kernel",
        "vmlinuz",
        "--disk",
        "a.img,name=root,queues=2",
        "--disk",
        "b.img,readonly",
        "-m",
        "64MiB",
        "-c",
        "3",
        "--cmdline",
        "quiet \"x\"",
        "--console",
        "virtio",
        "--no-reboot",
        "--name",
        "web",
        "--print-config",
    ];
    let printed = succeeds(home.path(), &options);
    assert!(printed.contains("memory = \"64MiB\"") && printed.contains("on_reboot = \"destroy\""));
    // Elsewhere, and read from a file: the same again.
    let elsewhere = home.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("vm.toml"), &printed).unwrap();
    let again = succeeds(home.path(), &["run", "elsewhere/vm.toml", "--print-config"]);
    assert_eq!(again, printed);
    let changed = succeeds(
        home.path(),
        &[
            "run",
            "elsewhere/vm.toml",
            "-c",
            "4",
            "--ephemeral",
            "--print-config",
        ],
    );
    assert_eq!(
        changed,
        printed
            .replace("cpus = 3", "cpus = 4")
            .replace("ephemeral = false", "ephemeral = true")
    );
}

#[test]
fn vm_file_errors_name_the_place_and_are_all_shown() {
    let home = home();
    fs::write(
        home.path().join("vm.toml"),
        "[machine]\nmemroy = \"1GiB\"\ncpus = 99\n",
    )
    .unwrap();
    let done = bulkhead(home.path(), &["run", "vm.toml"]);
    let error = String::from_utf8(done.stderr).unwrap();
    assert_eq!(done.status.code(), Some(2));
    let lines: Vec<_> = error.lines().collect();
    assert_eq!(
        lines,
        [
            "bulkhead: error: vm.toml:2:1: machine.memroy = \"1GiB\": unknown key; did you mean `memory`?",
            "bulkhead: error: vm.toml:3:8: machine.cpus = 99: expected a whole number from 1 to 32",
        ]
    );
}

#[test]
fn built_in_guest_is_what_runs_without_a_kernel() {
    let home = home();
    let libexec = home.path().join("libexec");
    fs::create_dir(&libexec).unwrap();
    fs::write(libexec.join("bulkhead-guest.elf"), [1; 64]).unwrap();
    let libexec = libexec.to_str().unwrap();
    let printed = succeeds(
        home.path(),
        &["run", "--libexec-dir", libexec, "--print-config"],
    );
    assert!(printed.contains("bulkhead-guest.elf"), "{printed}");
}

#[test]
fn json_is_one_object_that_begins_with_its_version() {
    let home = home();
    for args in [
        &["image", "info", "a.img", "--json"][..],
        &["image", "create", "new.img", "1MiB", "--json"],
        &["policy", "check", "--json"],
        &["policy", "show", "--json"],
        &["policy", "explain", "blk", "--json"],
    ] {
        let text = succeeds(home.path(), args);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["schema_version"], 1, "{text}");
        let first = text.trim_start_matches(['{', ' ', '\n']);
        assert!(first.starts_with("\"schema_version\""), "{text}");
    }
    let text = succeeds(home.path(), &["image", "info", "new.img", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(value["apparent_size"], 1 << 20);
    assert_eq!(value["allocated_size"], 0);
}

#[test]
fn doctor_exits_with_0_or_4_and_names_cures() {
    let home = home();
    let done = bulkhead(home.path(), &["doctor", "--json"]);
    let report: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let code = if report["status"] == "fail" { 4 } else { 0 };
    assert_eq!(done.status.code(), Some(code));
    let checks = report["checks"].as_array().unwrap();
    assert!(checks.len() > 15);
    for check in checks {
        let cured = !check["cure"].as_str().unwrap().is_empty();
        assert_eq!(cured, check["status"] != "ok", "{check}");
    }
    let text = bulkhead(home.path(), &["doctor"]).stdout;
    assert!(
        String::from_utf8(text)
            .unwrap()
            .contains("audit.cpu_vulnerabilities")
    );
}

#[test]
fn overrides_that_grant_more_are_refused() {
    let home = home();
    let overrides = home.path().join("config/policies.d");
    fs::create_dir_all(&overrides).unwrap();
    fs::write(overrides.join("blk.toml"), "nonsense = 1\n").unwrap();
    fails(home.path(), &["policy", "check"], 2, "blk.toml");
}

#[test]
fn policies_are_explained_with_reasons() {
    let home = home();
    let text = succeeds(home.path(), &["policy", "explain", "blk"]);
    assert!(
        text.contains("disk (file-or-block, read-write") && text.contains("io_uring(READ)"),
        "{text}"
    );
    let shown = succeeds(home.path(), &["policy", "show"]);
    for kind in ["vcpu:", "legacy:", "console:", "blk:", "rng:"] {
        assert!(shown.contains(kind), "{kind}");
    }
}

#[test]
fn completions_and_manual_pages_know_the_commands() {
    let home = home();
    for shell in ["bash", "zsh", "fish"] {
        let text = succeeds(home.path(), &["completions", shell]);
        assert!(
            text.contains("print-config") && text.contains("doctor"),
            "{shell}"
        );
    }
    assert!(succeeds(home.path(), &["man"]).contains(".TH bulkhead"));
    succeeds(home.path(), &["man", "pages"]);
    let page = fs::read_to_string(home.path().join("pages/bulkhead-run.1")).unwrap();
    assert!(page.contains("Ctrl\\-A x"), "{page}");
}

#[test]
fn closed_output_is_no_failure() {
    let home = home();
    let mut child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
        .args(["policy", "explain"])
        .env("BULKHEAD_CONFIG_DIR", home.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let done = child.wait_with_output().unwrap();
    assert_eq!((done.status.code(), done.stderr), (Some(0), vec![]));
}

#[test]
fn policies_are_compared_line_by_line() {
    let home = home();
    let same = succeeds(home.path(), &["policy", "diff"]);
    assert_eq!(same, "no difference\n");
    let overrides = home.path().join("config/policies.d");
    fs::create_dir_all(&overrides).unwrap();
    let text = "kind = \"rng\"\n[[deny]]\nname = \"read\"\n[limits]\nopen_files = 20\n";
    fs::write(overrides.join("rng.toml"), text).unwrap();
    let diff = succeeds(home.path(), &["policy", "diff"]);
    let expected = "rng:\n  - limit open_files 32\n  - main read\n  + limit open_files 20\n";
    assert_eq!(diff, expected);
    let file = overrides.join("rng.toml");
    let file = file.to_str().unwrap();
    assert_eq!(
        succeeds(home.path(), &["policy", "diff", "built-in", file]),
        expected
    );
    let json = succeeds(home.path(), &["policy", "diff", file, "built-in", "--json"]);
    assert!(json.contains("\"only_second\": [\n"), "{json}");
    assert!(json.contains("\"main read\""), "{json}");
    fails(
        home.path(),
        &["policy", "diff", "missing.toml"],
        2,
        "missing.toml",
    );
}
