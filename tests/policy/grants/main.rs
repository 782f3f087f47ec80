//! Every grant of a request to the kernel is needed: each is used in a scenario, and without it that
//! scenario fails with a denial that names the grant's file and line. A grant that no scenario uses
//! fails the check.

#![allow(
    clippy::tests_outside_test_module,
    clippy::print_stdout,
    reason = "an integration test is a test module, and prints what it has measured"
)]

mod scenarios;
mod stage;

use bulkhead_ipc::host::host_needs_quirks;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::explain::grant_place;
use bulkhead_policies::grant::{Grant, IO_URING};
use bulkhead_policies::load;
use bulkhead_policies::plan::Policy;
use bulkhead_policies::schema::HostKvm;
use scenarios::{SCENARIOS, Scenario};
use stage::Stage;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The scenarios that use each grant, in their order.
type Uses = BTreeMap<(ProcKind, Grant), Vec<usize>>;

fn overrides_of(scenario: &Scenario) -> Vec<(ProcKind, String)> {
    let denied = scenario.denies.iter().map(|&(kind, thread, name)| {
        let text = format!("kind = \"{kind}\"\n\n[[deny]]\nname = {name:?}\nthread = {thread:?}\n");
        (kind, text)
    });
    let starved = scenario.starves.iter().map(|&(kind, descriptors)| {
        let text = format!("kind = \"{kind}\"\n\n[limits]\nopen_files = {descriptors}\n");
        (kind, text)
    });
    denied.chain(starved).collect()
}

/// Plays every scenario with all grants.
fn uses(here: HostKvm) -> Uses {
    let mut uses = Uses::new();
    for (n, scenario) in SCENARIOS.iter().enumerate() {
        if scenario
            .denies
            .is_some_and(|(kind, thread, _)| is_elsewhere(kind, thread, here))
        {
            continue;
        }
        let stage = Stage::new(scenario.clock, overrides_of(scenario), true);
        (scenario.play)(&stage);
        let mut new = 0;
        for (kind, grants) in stage.used() {
            for grant in grants {
                let by = uses.entry((kind, grant)).or_default();
                new += usize::from(by.is_empty());
                by.push(n);
            }
        }
        println!("{}: {new} grants that none before it used", scenario.name);
    }
    uses
}

/// Where the host's KVM is of another sort than `host`.
fn is_not(host: Option<HostKvm>, here: HostKvm) -> bool {
    host.is_some_and(|host| host != here)
}

fn is_elsewhere(kind: ProcKind, thread: &str, here: HostKvm) -> bool {
    let policy = load(kind, None, false).unwrap();
    let mut threads = policy.locked.iter();
    threads.any(|t| t.name == thread && is_not(t.host, here))
}

/// Whether only hosts of another sort, other builds, or starts that fail need the grant, as its policy
/// declares. Of starts that fail after something was mapped, that of the legacy process is played by its own
/// tests only: on no machine does it lack anything then.
fn is_declared(policy: &Policy, grant: &Grant, here: HostKvm) -> bool {
    let thread = policy.locked.iter().find(|t| t.name == grant.phase);
    let permits = thread.map_or(&policy.startup, |t| &t.permits);
    let permit = permits
        .iter()
        .find(|p| p.grants(&grant.phase).contains(grant));
    is_not(thread.and_then(|t| t.host), here)
        || is_not(permit.and_then(|p| p.host), here)
        || permit.is_some_and(|p| p.build.is_some() || p.on_failure)
}

fn named(kind: ProcKind, grant: &Grant) -> String {
    let (file, line) = grant_place(kind, grant).unwrap();
    format!("{file}:{line}: {grant}")
}

fn here() -> HostKvm {
    match host_needs_quirks(Path::new("/sys")) {
        true => HostKvm::Incomplete,
        false => HostKvm::Complete,
    }
}

/// Calls of the C library while it makes a thread, with all signals blocked: the kernel kills the
/// process, and it cannot say why.
const SILENT: [&str; 3] = ["clone3", "set_robust_list", "rseq"];

/// Plays the shortest scenario of a grant without it. What was said is the error when it does not fail
/// for that reason.
fn fails_without(kind: ProcKind, grant: &Grant, by: &[usize]) -> Result<(), String> {
    let ends = grant.name == "exit_group";
    let reports = |s: &&Scenario| {
        s.denies
            .is_some_and(|(k, t, _)| k == kind && t == grant.phase)
    };
    let mut able = by
        .iter()
        .map(|&n| &SCENARIOS[n])
        .filter(|s| s.denies.is_none() || ends);
    let scenario = match ends {
        true => able.find(reports),
        false => able.next(),
    };
    let Some(scenario) = scenario else {
        return Err("it is used only where another is denied".to_owned());
    };
    let stage = Stage::new(scenario.clock, without(scenario, kind, grant), false);
    let (file, line) = grant_place(kind, grant).unwrap();
    let expected = match ends {
        // Its report ends with a call that is denied as well.
        true => "; it was killed by SIGSYS".to_owned(),
        _ if SILENT.contains(&grant.name.as_str()) => {
            "killed by SIGSYS for a system call that is not granted and that it could not report"
                .to_owned()
        }
        _ => format!("takes it away, which {file}:{line} grants"),
    };
    println!("{file}:{line}: without {grant}: {}", scenario.name);
    std::thread::scope(|scope| {
        let play = scope.spawn(|| (scenario.play)(&stage));
        let is_denied = || stage.said().contains(&expected);
        while !play.is_finished() && !is_denied() {
            std::thread::sleep(Duration::from_millis(10));
        }
        let denied = is_denied();
        if denied {
            stage.end();
        }
        let failed = play.join().is_err();
        // A ring refuses an operation and its process lives: the guest gets an error.
        if denied || is_denied() || (failed && grant.phase == IO_URING) {
            return Ok(());
        }
        let how = if failed { "fails" } else { "succeeds" };
        let name = scenario.name;
        Err(format!(
            "{name} {how} without `{expected}`:\n{}",
            stage.said()
        ))
    })
}

/// The overrides under which a scenario lacks a grant.
fn without(scenario: &Scenario, kind: ProcKind, grant: &Grant) -> Vec<(ProcKind, String)> {
    let mut overrides = overrides_of(scenario);
    let denial = grant.denial(kind.name());
    match overrides.iter_mut().find(|(of, _)| *of == kind) {
        Some((_, text)) => {
            let (_, entry) = denial.split_once("\n\n").unwrap();
            text.push('\n');
            text.push_str(entry);
        }
        None => overrides.push((kind, denial)),
    }
    overrides
}

#[test]
fn every_grant_is_used_and_its_scenario_fails_without_it() {
    let here = here();
    let uses = uses(here);
    let (mut redundant, mut elsewhere, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for kind in ProcKind::ALL {
        let policy = load(kind, None, false).unwrap();
        for grant in policy.grants() {
            match uses.get(&(kind, grant.clone())) {
                Some(by) => all.push((kind, grant, by.clone())),
                None if is_declared(&policy, &grant, here) => elsewhere.push(named(kind, &grant)),
                None => redundant.push(named(kind, &grant)),
            }
        }
    }
    println!(
        "{} grants are used; for other hosts and builds, by declaration:",
        all.len()
    );
    for grant in &elsewhere {
        println!("  {grant}");
    }
    assert!(
        redundant.is_empty(),
        "no scenario needs\n{}",
        redundant.join("\n")
    );
    let mut kept = Vec::new();
    for (kind, grant, by) in all {
        if let Err(said) = fails_without(kind, &grant, &by) {
            kept.push(format!("{}: {said}", named(kind, &grant)));
        }
    }
    assert!(
        kept.is_empty(),
        "scenarios work without\n{}",
        kept.join("\n")
    );
}
