//! Every system call and io_uring opcode that a policy grants says why.
//!
//! The schema in the `policies` package demands the key; this rule also refuses empty reasons, and
//! works on the text, so that it holds for files that no process loads yet.

use toml::Value;

use crate::workspace::SourceFile;

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
    if grants.is_empty() {
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
    unexplained
        .map(|(name, _)| format!("{path}: no reason why for {name}"))
        .collect()
}

/// A name to complain about, and the entry that must have a `why`.
type Grant<'a> = (String, &'a Value);

/// Collects every entry below a key that lists system calls or opcodes.
fn find<'a>(value: &'a Value, grants: &mut Vec<Grant<'a>>) {
    match value {
        Value::Table(table) => {
            for (key, value) in table {
                if key.contains("syscall") || key.contains("opcode") {
                    entries(key, value, grants);
                } else {
                    find(value, grants);
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| find(value, grants)),
        _ => {}
    }
}

/// Collects the entries of such a list, which may be split by phase or thread.
fn entries<'a>(name: &str, value: &'a Value, grants: &mut Vec<Grant<'a>>) {
    match value {
        Value::Array(values) => {
            let names = values
                .iter()
                .map(|value| value.to_string().replace('\n', " "));
            grants.extend(names.zip(values));
        }
        Value::Table(table)
            if table
                .values()
                .all(|value| value.is_table() || value.is_array()) =>
        {
            table
                .iter()
                .for_each(|(name, value)| entries(name, value, grants));
        }
        _ => grants.push((name.to_owned(), value)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::file;
    use super::*;

    fn complaints(text: &str) -> Vec<String> {
        check(&[file("policies/blk.toml", text)])
    }

    #[test]
    fn grants_with_reasons_are_fine() {
        assert!(
            complaints("[[locked.syscall]]\nname = \"read\"\nwhy = \"doorbells\"\n").is_empty()
        );
        assert!(complaints("[syscalls.locked]\nread = { why = \"doorbells\" }\n").is_empty());
    }

    #[test]
    fn a_grant_without_a_reason_is_named() {
        for text in [
            "[[syscalls]]\nname = \"read\"\n",
            "[[syscalls]]\nname = \"read\"\nwhy = \" \"\n",
            "syscalls = [\"read\"]\n",
            "[syscalls.locked]\nread = {args = 1}\n",
            "[uring]\nopcodes = [{ name = \"read\" }, { name = \"write\", why = \"data\" }]\n",
        ] {
            let complaints = complaints(text);
            assert!(
                complaints.len() == 1 && complaints[0].contains("read"),
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
