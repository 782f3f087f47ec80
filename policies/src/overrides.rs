//! What an operator changes, in `policies.d/KIND.toml`: takes away system calls, operations and
//! room; adds system calls or room only when looser policies are allowed.

use crate::check::{self, PolicyError};
use crate::plan::{Limits, Policy};
use crate::schema::{DenyEntry, LimitsChange, OverrideFile};
use bulkhead_ipc::ident::ProcKind;
use std::path::Path;

/// Reads the override of `kind`: its path and text, if there is one.
///
/// # Errors
/// When the file exists and cannot be read.
pub fn read(
    kind: ProcKind,
    directory: Option<&Path>,
) -> Result<Option<(String, String)>, PolicyError> {
    let Some(directory) = directory else {
        return Ok(None);
    };
    let path = directory.join(format!("{}.toml", kind.name()));
    let file = path.display().to_string();
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some((file, text))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(fault(&file, "file", e.to_string())),
    }
}

fn fault(file: &str, key: &str, fault: impl Into<String>) -> PolicyError {
    PolicyError {
        file: file.to_owned(),
        line: None,
        key: key.to_owned(),
        fault: fault.into(),
    }
}

/// Applies the override `text` to `policy`.
///
/// # Errors
/// When it is malformed, denies what is not granted, or grants more without `allow_looser`.
pub fn apply(
    mut policy: Policy,
    file: &str,
    text: &str,
    allow_looser: bool,
) -> Result<Policy, PolicyError> {
    let change: OverrideFile = check::parse(file, text)?;
    if change.kind != policy.kind {
        let what = format!("is {}, expected {} in this file", change.kind, policy.kind);
        return Err(fault(file, "kind", what));
    }
    for (n, entry) in change.deny.iter().enumerate() {
        deny(&mut policy, file, &format!("deny[{n}]"), entry)?;
    }
    for name in &change.deny_opcode {
        let before = policy.opcodes.len();
        policy.opcodes.retain(|opcode| opcode.name != *name);
        if policy.opcodes.len() == before {
            return Err(fault(
                file,
                "deny_opcode",
                format!("{name} is not granted anyway"),
            ));
        }
    }
    let looser = |key: &str| {
        let what = "grants more than the built-in policy, expected less (or --allow-looser-policy)";
        Err(fault(file, key, what))
    };
    if let (Some(thread), false) = (change.allow.keys().next(), allow_looser) {
        return looser(&format!("allow.{thread}"));
    }
    for (name, phase) in &change.allow {
        let permits = check::extra_calls(file, text, name, phase)?;
        match policy.locked.iter_mut().find(|t| t.name == *name) {
            Some(thread) => thread.permits.extend(permits),
            None => {
                return Err(fault(
                    file,
                    &format!("allow.{name}"),
                    "is no thread of this kind",
                ));
            }
        }
    }
    let (limits, looser_key) = limits(&policy.limits, &change.limits);
    if let (Some(key), false) = (looser_key, allow_looser) {
        return looser(&format!("limits.{key}"));
    }
    policy.limits = limits;
    check::counts(file, &policy)?;
    policy.sources.push(file.to_owned());
    Ok(policy)
}

fn deny(policy: &mut Policy, file: &str, key: &str, entry: &DenyEntry) -> Result<(), PolicyError> {
    let name = entry.name.get_ref();
    let mut found = false;
    for thread in &mut policy.locked {
        if entry.thread.as_ref().is_some_and(|t| *t != thread.name) {
            continue;
        }
        for permit in &mut thread.permits {
            if permit.name != *name {
                continue;
            }
            if entry.request.is_empty() {
                found = true;
            } else {
                let before = permit.requests.len();
                permit.requests.retain(|r| !entry.request.contains(&r.name));
                found |= permit.requests.len() < before;
            }
        }
        let whole = entry.request.is_empty();
        thread.permits.retain(|p| {
            p.name != *name || (!whole && (p.name != "ioctl" || !p.requests.is_empty()))
        });
    }
    if found {
        return Ok(());
    }
    Err(fault(
        file,
        &format!("{key}.name"),
        format!("{name} is not granted anyway"),
    ))
}

/// The new limits, and the first that is looser than before.
fn limits(old: &Limits, change: &LimitsChange) -> (Limits, Option<&'static str>) {
    let mut new = *old;
    let mut looser = None;
    let mut note = |is: bool, key| {
        if is && looser.is_none() {
            looser = Some(key);
        }
    };
    if let Some(n) = change.open_files {
        note(n > old.open_files, "open_files");
        new.open_files = n;
    }
    if let Some(n) = change.tasks {
        note(n > old.tasks, "tasks");
        new.tasks = n;
    }
    if let Some(n) = change.memory {
        note(n.0 > old.memory_bytes, "memory");
        new.memory_bytes = n.0;
    }
    if let Some(n) = change.file_size {
        note(old.file_size_bytes.is_some_and(|o| n.0 > o), "file_size");
        new.file_size_bytes = Some(n.0);
    }
    if let Some(n) = change.address_space {
        let is = old.address_space_bytes.is_some_and(|o| n.0 > o);
        note(is, "address_space");
        new.address_space_bytes = Some(n.0);
    }
    (new, looser)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load;

    fn rng(text: &str, allow_looser: bool) -> Result<Policy, PolicyError> {
        let policy = load(ProcKind::Rng, None, false).unwrap();
        apply(policy, "rng.toml", text, allow_looser)
    }

    #[test]
    fn override_takes_away() {
        let before = load(ProcKind::Rng, None, false).unwrap();
        let text =
            "kind = \"rng\"\n[[deny]]\nname = \"clock_gettime\"\n[limits]\nopen_files = 16\n";
        let after = rng(text, false).unwrap();
        let count = |p: &Policy| p.locked_requests().len();
        assert_eq!(count(&after), count(&before) - 1);
        assert_eq!(after.limits.open_files, 16);
        assert_eq!(after.sources.len(), 2);
    }

    #[test]
    fn override_that_grants_more_needs_permission() {
        let call = "kind = \"rng\"\n[[allow.main.call]]\nname = \"getppid\"\nwhy = \"to see\"\n";
        assert_eq!(rng(call, false).unwrap_err().key, "allow.main");
        assert!(rng(call, true).is_ok());
        let room = "kind = \"rng\"\n[limits]\nmemory = \"1GiB\"\n";
        assert_eq!(rng(room, false).unwrap_err().key, "limits.memory");
        assert!(rng(room, true).is_ok());
    }

    #[test]
    fn looser_override_still_keeps_the_rules() {
        let text = "kind = \"rng\"\n[[allow.main.call]]\nname = \"socket\"\nwhy = \"to talk\"\n";
        let error = rng(text, true).unwrap_err();
        assert!(error.fault.contains("never permitted"), "{error}");
        assert_eq!(error.line, Some(3));
    }

    #[test]
    fn denying_what_is_not_granted_is_an_error() {
        let text = "kind = \"rng\"\n[[deny]]\nname = \"socket\"\n";
        assert_eq!(rng(text, false).unwrap_err().key, "deny[0].name");
    }

    #[test]
    fn unknown_key_is_named_with_its_line() {
        let error = rng("kind = \"rng\"\nallowed = 1\n", false).unwrap_err();
        assert_eq!(error.line, Some(2));
        assert!(error.fault.contains("allowed"), "{error}");
    }
}
