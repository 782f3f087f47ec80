//! Every file descriptor, system call and io_uring opcode that a policy grants says why.
//!
//! The schema in the `policies` package demands the key; this rule also refuses empty reasons, and
//! works on the text, so that it holds for files that no process loads yet.

use toml::Value;

use crate::workspace::SourceFile;

/// The key of the lists of system calls.
const CALLS: &str = "call";
/// The keys of all lists whose entries are grants.
const GRANTS: [&str; 3] = [CALLS, "opcode", "fd"];

/// Complaints about the policy files.
pub(super) fn check(files: &[SourceFile]) -> Vec<String> {
    files
        .iter()
        .filter(|file| is_policy(&file.path))
        .flat_map(check_policy)
        .collect()
}

fn is_policy(path: &str) -> bool {
    path.strip_prefix("policies/")
        .is_some_and(|name| !name.contains('/') && name.ends_with(".toml") && name != "Cargo.toml")
}

fn check_policy(file: &SourceFile) -> Vec<String> {
    let path = &file.path;
    let table = match file.text.parse::<toml::Table>() {
        Ok(table) => Value::Table(table),
        Err(error) => return vec![format!("{path}: {error}")],
    };
    let mut grants = Vec::new();
    find(&table, &mut grants);
    if !grants.iter().any(|(key, _)| *key == CALLS) {
        return vec![format!(
            "{path}: grants no system call, so no process could run under it"
        )];
    }
    let has_reason = |grant: &Value| {
        grant
            .get("why")
            .and_then(Value::as_str)
            .is_some_and(|why| !why.trim().is_empty())
    };
    let unexplained = grants.iter().filter(|(_, grant)| !has_reason(grant));
    let complain = |(key, grant): &(&str, &Value)| {
        format!(
            "{path}: no reason why for {key} {}",
            grant.to_string().replace('\n', " ")
        )
    };
    unexplained.map(complain).collect()
}

/// Collects every grant with the key of the list that it is in.
fn find<'a>(value: &'a Value, grants: &mut Vec<(&'a str, &'a Value)>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                match value {
                    Value::Array(entries) if GRANTS.contains(&key.as_str()) => {
                        grants.extend(entries.iter().map(|entry| (key.as_str(), entry)));
                    }
                    _ => find(value, grants),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| find(value, grants)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    const GOOD: &str = "[[locked.call]]\nname = \"read\"\nwhy = \"doorbells\"\n";

    fn complaints(text: &str) -> Vec<String> {
        check(&[file("policies/blk.toml", text)])
    }

    #[test]
    fn grants_with_reasons_are_fine() {
        assert!(complaints(GOOD).is_empty());
        assert!(complaints(&GOOD.replace("locked.", "locked.gate.")).is_empty());
    }

    #[test]
    fn a_grant_without_a_reason_is_named() {
        for text in [
            "[[startup.call]]\nname = \"mmap\"\n",
            "[[startup.call]]\nname = \"mmap\"\nwhy = \" \"\n",
            "[[io_uring.opcode]]\nname = \"mmap\"\n",
            "[[fd]]\nrole = \"mmap\"\n",
            "[startup]\ncall = [\"mmap\"]\n",
        ] {
            let complaints = complaints(&format!("{GOOD}{text}"));
            assert!(
                complaints.len() == 1 && complaints[0].contains("mmap"),
                "{complaints:?}"
            );
        }
    }

    #[test]
    fn a_policy_that_grants_nothing_is_suspicious() {
        assert_eq!(complaints("kind = \"blk\"\n").len(), 1);
        assert!(check(&[file("policies/Cargo.toml", "[package]\n")]).is_empty());
    }
}
