//! What an operator changes, in `policies.d/KIND.toml`: takes away system calls, operations and
//! room; adds system calls or room only when looser policies are allowed.

use crate::check::{self, PolicyError};
use crate::constants;
use crate::grant::STARTUP;
use crate::plan::{Limits, Permit, Policy, Test};
use crate::schema::{DenyEntry, LimitsChange, Number, OverrideFile};
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
    let wrong = |(key, what)| fault(file, &format!("limits.{key}"), what);
    check::host_share(policy.kind, &limits).map_err(wrong)?;
    policy.limits = limits;
    check::counts(file, &policy)?;
    check::accepting(file, &policy)?;
    policy.sources.push(file.to_owned());
    Ok(policy)
}

fn deny(policy: &mut Policy, file: &str, key: &str, entry: &DenyEntry) -> Result<(), PolicyError> {
    let name = entry.name.get_ref();
    let values = values(file, key, entry)?;
    let part = |permit: &Permit| take(permit, name, &entry.request, &values);
    let mut found = false;
    let mut taken = Vec::new();
    for thread in &mut policy.locked {
        if entry.thread.as_ref().is_some_and(|t| *t != thread.name) {
            continue;
        }
        for permit in std::mem::take(&mut thread.permits) {
            let (left, lost) = part(&permit);
            thread.permits.extend(left);
            taken.extend(lost);
        }
    }
    found |= !taken.is_empty();
    match &entry.thread {
        // The thread loses it when it is locked. Its start-up keeps what it was permitted.
        Some(thread) if thread != STARTUP => policy.startup.extend(taken),
        _ => {
            for permit in std::mem::take(&mut policy.startup) {
                let (left, lost) = part(&permit);
                policy.startup.extend(left);
                found |= lost.is_some();
            }
        }
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

/// The values of arguments that an entry takes away.
fn values(file: &str, key: &str, entry: &DenyEntry) -> Result<Vec<(u8, u32)>, PolicyError> {
    let mut values = Vec::new();
    for arg in &entry.arg {
        let list = match (&arg.is, &arg.bits_clear, &arg.at_most) {
            (Some(list), None, None) => list,
            _ => {
                return Err(fault(
                    file,
                    &format!("{key}.arg"),
                    "expected is, and nothing else",
                ));
            }
        };
        for number in list {
            let value = match number {
                Number::Value(value) => Some(*value),
                Number::Name(name) => constants::flag(name),
            };
            let unknown = || fault(file, &format!("{key}.arg"), "has a name of no known number");
            values.push((arg.index, value.ok_or_else(unknown)?));
        }
    }
    Ok(values)
}

/// What is left of a permit, and what it has lost, when requests and values (all of it, if there are
/// none) are taken from the calls of `name`.
fn take(
    permit: &Permit,
    name: &str,
    requests: &[String],
    values: &[(u8, u32)],
) -> (Option<Permit>, Option<Permit>) {
    if permit.name != name {
        return (Some(permit.clone()), None);
    }
    if requests.is_empty() && values.is_empty() {
        return (None, Some(permit.clone()));
    }
    let (mut left, mut lost) = (permit.clone(), permit.clone());
    let mut any = false;
    if !requests.is_empty() {
        left.requests.retain(|r| !requests.contains(&r.name));
        lost.requests.retain(|r| requests.contains(&r.name));
        any |= !lost.requests.is_empty();
    }
    let mut empty = left.requests.is_empty() && !permit.requests.is_empty();
    for (left, lost) in left.conditions.iter_mut().zip(&mut lost.conditions) {
        let index = left.index;
        let (Test::Is(left), Test::Is(lost)) = (&mut left.test, &mut lost.test) else {
            continue;
        };
        if !values
            .iter()
            .any(|(i, value)| *i == index && left.contains(value))
        {
            continue;
        }
        left.retain(|value| !values.contains(&(index, *value)));
        lost.retain(|value| values.contains(&(index, *value)));
        any = true;
        empty |= left.is_empty();
    }
    match any {
        true => ((!empty).then_some(left), Some(lost)),
        false => (Some(permit.clone()), None),
    }
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
    let sizes = [
        ("file_size", &mut new.file_size_bytes, change.file_size),
        (
            "address_space",
            &mut new.address_space_bytes,
            change.address_space,
        ),
        (
            "disk_read_per_s",
            &mut new.disk_read_per_s,
            change.disk_read_per_s,
        ),
        (
            "disk_write_per_s",
            &mut new.disk_write_per_s,
            change.disk_write_per_s,
        ),
    ];
    for (key, limit, change) in sizes {
        note(replace(limit, change.map(|size| size.0)), key);
    }
    let counts = [
        ("cpu_percent", &mut new.cpu_percent, change.cpu_percent),
        (
            "disk_read_iops",
            &mut new.disk_read_iops,
            change.disk_read_iops,
        ),
        (
            "disk_write_iops",
            &mut new.disk_write_iops,
            change.disk_write_iops,
        ),
    ];
    for (key, limit, change) in counts {
        note(replace(limit, change), key);
    }
    (new, looser)
}

/// Replaces a limit that may be absent, which is the loosest: whether the new one is looser.
fn replace<T: Copy + PartialOrd>(limit: &mut Option<T>, change: Option<T>) -> bool {
    let Some(new) = change else {
        return false;
    };
    limit.replace(new).is_some_and(|old| new > old)
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
    fn processors_and_disks_may_be_limited_and_a_limit_not_raised() {
        let text = |kind: &str, limits: &str| format!("kind = \"{kind}\"\n[limits]\n{limits}\n");
        let blk = load(ProcKind::Blk, None, false).unwrap();
        assert_eq!(
            (blk.limits.cpu_percent, blk.limits.disk_write_iops),
            (None, None)
        );
        let with = |policy: &Policy, limits: &str, looser| {
            apply(policy.clone(), "blk.toml", &text("blk", limits), looser)
        };
        let all = "cpu_percent = 50\ndisk_read_per_s = \"8MiB\"\ndisk_write_per_s = \"4MiB\"\n\
            disk_read_iops = 200\ndisk_write_iops = 100\nfile_size = \"1MiB\"\n";
        let limited = with(&blk, all, false).unwrap();
        let l = &limited.limits;
        assert_eq!(
            (l.cpu_percent, l.disk_read_per_s),
            (Some(50), Some(8 << 20))
        );
        assert_eq!(
            (l.disk_write_per_s, l.file_size_bytes),
            (Some(4 << 20), Some(1 << 20))
        );
        assert_eq!(
            (l.disk_read_iops, l.disk_write_iops),
            (Some(200), Some(100))
        );
        // What is not named stays limited; nothing can take a limit away.
        assert_eq!(
            with(&limited, "tasks = 1", false)
                .unwrap()
                .limits
                .cpu_percent,
            Some(50)
        );
        for (key, tighter, looser) in [
            ("cpu_percent", "49", "51"),
            ("disk_read_per_s", "\"4MiB\"", "\"9MiB\""),
            ("disk_write_per_s", "\"4KiB\"", "\"8MiB\""),
            ("disk_read_iops", "1", "201"),
            ("disk_write_iops", "100", "101"),
        ] {
            assert!(with(&limited, &format!("{key} = {tighter}"), false).is_ok());
            let raised = format!("{key} = {looser}");
            let error = with(&limited, &raised, false).unwrap_err();
            assert_eq!(error.key, format!("limits.{key}"));
            assert!(error.fault.contains("grants more"), "{error}");
            assert!(with(&limited, &raised, true).is_ok());
        }
    }

    #[test]
    fn limits_that_cannot_be_are_named() {
        for (key, value, told) in [
            ("cpu_percent", "0", "is 0, expected 1 to 6400"),
            ("cpu_percent", "6401", "is 6401, expected 1 to 6400"),
            (
                "disk_read_per_s",
                "\"4095B\"",
                "is 4095, expected at least 4096",
            ),
            ("disk_write_iops", "0", "is 0, expected at least 1"),
        ] {
            let blk = load(ProcKind::Blk, None, false).unwrap();
            let text = format!("kind = \"blk\"\n[limits]\n{key} = {value}\n");
            let error = apply(blk, "blk.toml", &text, true).unwrap_err();
            assert_eq!(error.key, format!("limits.{key}"));
            assert!(error.fault.contains(told), "{error}");
        }
        let error = rng("kind = \"rng\"\n[limits]\ndisk_read_iops = 5\n", true).unwrap_err();
        assert_eq!(error.key, "limits.disk_read_iops");
        assert!(error.fault.contains("only blk has a disk"), "{error}");
    }

    #[test]
    fn looser_override_still_keeps_the_rules() {
        let text = "kind = \"rng\"\n[[allow.main.call]]\nname = \"socket\"\nwhy = \"to talk\"\n";
        let error = rng(text, true).unwrap_err();
        assert!(error.fault.contains("never permitted"), "{error}");
        assert_eq!(error.line, Some(3));
    }

    #[test]
    fn locked_thread_loses_a_call_that_its_start_up_keeps() {
        let text = "kind = \"rng\"\n[[deny]]\nname = \"write\"\nthread = \"main\"\n";
        let after = rng(text, false).unwrap();
        let write = crate::syscalls::number("write").unwrap();
        assert!(!after.permits("main", write, &[0; 6]));
        assert!(after.permits(STARTUP, write, &[0; 6]));
        let everywhere = "kind = \"rng\"\n[[deny]]\nname = \"write\"\n";
        assert!(
            !rng(everywhere, false)
                .unwrap()
                .permits(STARTUP, write, &[0; 6])
        );
    }

    #[test]
    fn single_value_of_an_argument_is_taken_away() {
        let text = "kind = \"rng\"\n[[deny]]\nname = \"fcntl\"\nthread = \"startup\"\n\
            arg = [{ index = 1, is = [\"F_DUPFD_CLOEXEC\"] }]\n";
        let after = rng(text, false).unwrap();
        let fcntl = crate::syscalls::number("fcntl").unwrap();
        let asks = |command: u64| after.permits(STARTUP, fcntl, &[5, command, 0, 0, 0, 0]);
        assert!(!asks(1030) && asks(1034));
        let odd = text.replace("is = [\"F_DUPFD_CLOEXEC\"]", "at_most = 7");
        assert_eq!(rng(&odd, false).unwrap_err().key, "deny[0].arg");
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
