//! What a run has used of its policies is learnt without weakening them, and is enough for the next run.

#![allow(
    clippy::tests_outside_test_module,
    reason = "an integration test is a test module"
)]

use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::grant::{Grant, IO_URING, Part};
use bulkhead_policies::{check, load};
use bulkhead_tests::bulkhead;
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Learns from a run of the test guest; returns what the command has printed.
fn learn(scratch: &Path, options: &[&str], disk: &str, cmdline: &str) -> String {
    let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
    let folder = scratch.join("shared");
    fs::create_dir_all(&folder).unwrap();
    let mut data = vec![0; 3 << 19];
    bulkhead_tests::pattern::fill(1, 0, &mut data);
    fs::write(folder.join("kept"), data).unwrap();
    let share = format!("{},readonly", folder.display());
    let mut learn = bulkhead(scratch);
    learn
        .args(["policy", "learn", "--output"])
        .arg(scratch.join("learnt"));
    learn.args(options).arg("--").arg("--kernel").arg(guest);
    learn.args([
        "-m",
        "64MiB",
        "--timeout=120s",
        "--vsock",
        "--disk",
        disk,
        "--share",
        &share,
        "--cmdline",
        cmdline,
    ]);
    let done = learn.output().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(0), "{errors}");
    assert!(errors.contains("BH done errors=0"), "the console: {errors}");
    String::from_utf8(done.stdout).unwrap()
}

fn disk(scratch: &Path) -> String {
    let path = scratch.join("disk.img");
    let file = fs::File::create(&path).unwrap();
    file.set_len(1 << 20).unwrap();
    path.to_str().unwrap().to_owned()
}

fn grants(scratch: &Path, kind: ProcKind) -> BTreeSet<Grant> {
    let text = fs::read_to_string(scratch.join(format!("learnt/{kind}.toml"))).unwrap();
    let policy = check::policy("learnt", &text, kind).unwrap();
    policy.grants().into_iter().collect()
}

#[test]
fn what_is_learnt_is_what_the_run_did_and_a_part_of_the_policy() {
    // On a file system that is no memory, so that the disk is served by a ring.
    let scratch = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let read_only = format!("{},readonly", disk(scratch.path()));
    let told = learn(
        scratch.path(),
        &[],
        &read_only,
        "mode=blk,rng,share-refused",
    );
    assert!(
        told.contains("grants were used") && !told.contains("denied"),
        "{told}"
    );
    for kind in ProcKind::OF_EVERY_MACHINE {
        let all: BTreeSet<Grant> = load(kind, None, false)
            .unwrap()
            .grants()
            .into_iter()
            .collect();
        let learnt = grants(scratch.path(), kind);
        assert!(learnt.is_subset(&all) && learnt != all, "{kind}");
    }
    let has = |kind, phase: &str, name: &str| {
        grants(scratch.path(), kind).contains(&Grant {
            phase: phase.to_owned(),
            name: name.to_owned(),
            part: Part::Whole,
        })
    };
    assert!(has(ProcKind::Rng, "main", "read"));
    assert!(has(ProcKind::Blk, "main", "io_uring_enter"));
    assert!(has(ProcKind::Blk, IO_URING, "READ"));
    // Nothing was written to a disk that cannot be written.
    assert!(!has(ProcKind::Blk, IO_URING, "WRITE"));
    assert!(!has(ProcKind::Blk, IO_URING, "FALLOCATE"));
}

#[test]
fn run_works_under_what_was_learnt_from_it_and_another_does_not() {
    let scratch = tempfile::tempdir().unwrap();
    let disk = disk(scratch.path());
    learn(scratch.path(), &["--override"], &disk, "mode=rng,legacy");
    let policies = scratch.path().join("etc/policies.d");
    fs::create_dir_all(policies.parent().unwrap()).unwrap();
    // The one kind whose run is the same every time: no waits that may or may not happen.
    fs::create_dir(&policies).unwrap();
    let learnt = scratch.path().join("learnt/rng.toml");
    fs::copy(learnt, policies.join("rng.toml")).unwrap();
    let run = |cmdline: &str| {
        let guest = bulkhead_tests::path("BULKHEAD_TEST_GUEST");
        let mut run = bulkhead(scratch.path());
        run.arg("run").arg("--kernel").arg(guest);
        let done = run.args(["-m", "64MiB", "--timeout=120s", "--cmdline", cmdline]);
        let done = done.output().unwrap();
        String::from_utf8_lossy(&done.stderr).into_owned()
    };
    assert_eq!(run("mode=rng"), "");
    fs::remove_dir_all(scratch.path().join("learnt")).unwrap();
    learn(scratch.path(), &["--override"], &disk, "mode=hello");
    let learnt = scratch.path().join("learnt/rng.toml");
    fs::copy(learnt, policies.join("rng.toml")).unwrap();
    // The guest that only said hello never asked for entropy.
    let errors = run("mode=rng timeout=1");
    assert!(errors.contains("(entropy), "), "{errors}");
    assert!(
        errors.contains("this [[deny]] of read takes it away"),
        "{errors}"
    );
}
