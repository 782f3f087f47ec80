//! `policy diff`: what one policy grants and another does not.

use super::SCHEMA_VERSION;
use super::failure::{Failure, USAGE, print, print_json, printable};
use super::paths::{PathOptions, Paths};
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::check::{self, PolicyError};
use bulkhead_policies::plan::{Condition, Limits, Permit, Policy};
use bulkhead_policies::{load, overrides, role_name};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

/// Compare what policies grant
///
/// A side is `built-in`, `overrides` (the built-in policies with those of policies.d), a directory of
/// overrides, or a file: a whole policy, or an override of the built-in one. Without sides, the
/// built-in policies are compared with the operator's overrides.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Lines with - are granted by the first side alone, lines with + by the second alone. The exit code is 0
whether they differ or not.

Examples:
  bulkhead policy diff
  bulkhead policy diff built-in blk.toml
  bulkhead policy diff monday/vcpu.toml tuesday/vcpu.toml --json
")]
pub(super) struct DiffArgs {
    /// First side
    #[arg(default_value = "built-in", value_name = "A")]
    first: String,
    /// Second side
    #[arg(default_value = "overrides", value_name = "B")]
    second: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    differences: Vec<Differences>,
}

#[derive(Serialize)]
struct Differences {
    kind: &'static str,
    only_first: Vec<String>,
    only_second: Vec<String>,
}

/// Runs `policy diff`.
pub(super) fn run(args: &DiffArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let fails = |error: PolicyError| Failure::because(USAGE, "policy diff", &error);
    let first = side(&args.first, &paths).map_err(fails)?;
    let second = side(&args.second, &paths).map_err(fails)?;
    let mut differences = Vec::new();
    for kind in ProcKind::ALL {
        let of = |side: &[Policy]| {
            let policy = side.iter().find(|policy| policy.kind == kind);
            policy.map(granted)
        };
        // A file has one kind; the others are not compared.
        let (Some(first), Some(second)) = (of(&first), of(&second)) else {
            continue;
        };
        if first != second {
            differences.push(Differences {
                kind: kind.name(),
                only_first: first.difference(&second).cloned().collect(),
                only_second: second.difference(&first).cloned().collect(),
            });
        }
    }
    if args.json {
        print_json(&Report {
            schema_version: SCHEMA_VERSION,
            differences,
        })?;
        return Ok(0);
    }
    let mut text = String::new();
    // Writing to a string cannot fail.
    for Differences {
        kind,
        only_first,
        only_second,
    } in &differences
    {
        let _infallible = writeln!(text, "{kind}:");
        let signed = |sign| move |line: &String| format!("  {sign} {}\n", printable(line));
        text.extend(only_first.iter().map(signed('-')));
        text.extend(only_second.iter().map(signed('+')));
    }
    if text.is_empty() {
        text.push_str("no difference\n");
    }
    print(&text)?;
    Ok(0)
}

/// The policies of a side.
fn side(name: &str, paths: &Paths) -> Result<Vec<Policy>, PolicyError> {
    let all = |directory: Option<&Path>| {
        let kinds = ProcKind::ALL.into_iter();
        // A comparison must show what is looser, whatever may be run.
        kinds.map(|kind| load(kind, directory, true)).collect()
    };
    match name {
        "built-in" => return all(None),
        "overrides" => return all(paths.policies().as_deref()),
        _ => {}
    }
    let path = Path::new(name);
    if path.is_dir() {
        return all(Some(path));
    }
    let unreadable = |fault: String| PolicyError {
        file: name.to_owned(),
        line: None,
        key: "file".to_owned(),
        fault,
    };
    let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let kind = text.lines().find_map(|line| {
        let value = line.strip_prefix("kind")?.trim_start().strip_prefix('=')?;
        let value = value.trim().trim_matches('"');
        ProcKind::ALL.into_iter().find(|kind| kind.name() == value)
    });
    let kind = kind.ok_or_else(|| unreadable("expected kind = \"…\" in a line".to_owned()))?;
    // Only a whole policy says what its processes are for.
    let is_whole = text.lines().any(|line| line.starts_with("purpose"));
    let policy = match is_whole {
        true => check::policy(name, &text, kind),
        false => overrides::apply(load(kind, None, false)?, name, &text, true),
    }?;
    Ok(vec![policy])
}

/// Everything that a policy grants, a line each.
fn granted(policy: &Policy) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    for fd in &policy.fds {
        let (role, is) = (role_name(fd.role), word(&fd.is));
        let (access, held) = (word(&fd.access), word(&fd.held));
        lines.insert(format!(
            "descriptor {role} ({is}, {access}, {} to {}, held {held})",
            fd.min, fd.max
        ));
    }
    for made in &policy.made {
        let each = if made.per_vcpu { " for each vCPU" } else { "" };
        let is = word(&made.is);
        lines.insert(format!("makes {is} ({} to {}{each})", made.min, made.max));
    }
    for control in &policy.speculation {
        lines.insert(format!("speculation control {}", word(control)));
    }
    requests(&mut lines, "startup", &policy.startup);
    for thread in &policy.locked {
        requests(&mut lines, &thread.name, &thread.permits);
    }
    for opcode in &policy.opcodes {
        lines.insert(format!("io_uring {}", opcode.name));
    }
    lines.extend(
        limits(&policy.limits)
            .into_iter()
            .map(|line| format!("limit {line}")),
    );
    lines
}

/// A line for each limit.
pub(super) fn limits(limits: &Limits) -> Vec<String> {
    let Limits {
        open_files,
        locked_memory_bytes,
        stack_bytes,
        file_size_bytes,
        file_size_of_disk,
        address_space_bytes,
        memory_bytes,
        plus_guest_memory,
        tasks,
        plus_vcpus,
        oom_score_adj,
        cpu_percent,
        disk_read_per_s,
        disk_write_per_s,
        disk_read_iops,
        disk_write_iops,
    } = *limits;
    let unlimited = |value: Option<u64>| value.map_or("none".to_owned(), |n| n.to_string());
    let count = |value: Option<u32>| unlimited(value.map(u64::from));
    vec![
        format!("open_files {open_files}"),
        format!("locked_memory {locked_memory_bytes}"),
        format!("stack {stack_bytes}"),
        format!(
            "file_size {}, of its disk: {file_size_of_disk}",
            unlimited(file_size_bytes)
        ),
        format!("address_space {}", unlimited(address_space_bytes)),
        format!("memory {memory_bytes}, plus guest memory: {plus_guest_memory}"),
        format!("tasks {tasks}, plus vCPUs: {plus_vcpus}"),
        format!("oom_score_adj {oom_score_adj}"),
        format!("cpu_percent {}", count(cpu_percent)),
        format!("disk_read_per_s {}", unlimited(disk_read_per_s)),
        format!("disk_write_per_s {}", unlimited(disk_write_per_s)),
        format!("disk_read_iops {}", count(disk_read_iops)),
        format!("disk_write_iops {}", count(disk_write_iops)),
    ]
}

/// A line for each system call, request code, or value of an argument.
fn requests(lines: &mut BTreeSet<String>, phase: &str, permits: &[Permit]) {
    for permit in permits {
        let bounds = permit.conditions.iter().filter(|c| !c.is_list());
        let bounds: String = bounds.map(|c| format!(" if {}", c.in_words())).collect();
        let values: Vec<(u8, u32)> = permit
            .conditions
            .iter()
            .flat_map(Condition::values)
            .collect();
        for name in permit.request_names() {
            if values.is_empty() {
                lines.insert(format!("{phase} {name}{bounds}"));
            }
            for (index, value) in &values {
                lines.insert(format!(
                    "{phase} {name}{bounds} if argument {index} is {value}"
                ));
            }
        }
    }
}

/// The name that a policy file uses for a value.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    let text = value.as_ref().and_then(|v| v.as_str()).unwrap_or("?");
    text.to_owned()
}
