//! One policy file for each rule, named for its fault: each is refused, and the error names the key.
//! Every file is a complete policy of `rng` but for that one fault.
#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::check;
use std::fs;
use std::path::Path;

#[test]
fn each_fault_is_refused_with_file_and_key() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/rejected");
    let mut count = 0;
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let text = fs::read_to_string(&path).unwrap();
        let name = path.file_name().unwrap().to_str().unwrap();
        let first = text.lines().next().unwrap();
        let key = first.strip_prefix("# key: ").unwrap();
        let error = check::policy(name, &text, ProcKind::Rng).expect_err(name);
        assert_eq!(error.key, key, "{error}");
        assert!(error.to_string().starts_with(name), "{error}");
        count += 1;
    }
    assert!(count >= 40, "only {count} files were found");
}

#[test]
fn faults_in_calls_and_descriptors_name_their_line() {
    let text = include_str!("rejected/socket-after-lock.toml");
    let error = check::policy("p.toml", text, ProcKind::Rng).unwrap_err();
    let line = text.lines().nth(error.line.unwrap() - 1).unwrap();
    assert_eq!(line, "name = \"socket\"");
}

#[test]
fn vcpu_thread_may_make_twenty_requests_also_where_kvm_is_incomplete() {
    let built_in = include_str!("../vcpu.toml");
    let with = |names: &[&str]| {
        let mut text = built_in.to_owned();
        for name in names {
            text +=
                &format!("\n[[locked.vcpu-quirks.call]]\nname = \"{name}\"\nwhy = \"a test\"\n");
        }
        check::policy("vcpu.toml", &text, ProcKind::Vcpu)
    };
    let count = |policy: &bulkhead_policies::Policy| {
        let threads = policy.summary().per_thread;
        let quirks = threads.into_iter().find(|(name, _)| name == "vcpu-quirks");
        quirks.unwrap().1
    };
    let spare = ["getuid", "getgid", "getppid", "geteuid", "getegid"];
    let now = count(&with(&[]).unwrap());
    let (fits, one_more) = (20 - now, 21 - now);
    assert_eq!(count(&with(&spare[..fits]).unwrap()), 20);
    let error = with(&spare[..one_more]).unwrap_err();
    assert_eq!(error.key, "locked.vcpu-quirks");
}
