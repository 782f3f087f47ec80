//! The tightest policies of a run, as files.

use super::Learnt;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::check::PolicyError;
use bulkhead_policies::grant::{Grant, IO_URING, Part, STARTUP};
use bulkhead_policies::schema::{ArgCondition, Build, Call, HostKvm, Number, Phase, PolicyFile};
use bulkhead_policies::{built_in, constants, load};
use std::collections::BTreeSet;
use std::fmt::Write as _;

/// The built-in policy of `kind` without what was not used.
#[must_use]
pub fn policy(kind: ProcKind, used: &BTreeSet<Grant>) -> String {
    let text = built_in(kind);
    let Ok(parsed) = toml::from_str::<PolicyFile>(text) else {
        // A test reads every built-in policy.
        return text.to_owned();
    };
    let mut out = head(text);
    // Writing to a string cannot fail, so results are dropped below.
    for opcode in &parsed.io_uring.opcode {
        let name = opcode.name.get_ref();
        if is_used(used, IO_URING, name, &Part::Whole) {
            let _infallible = writeln!(
                out,
                "[[io_uring.opcode]]\nname = {name:?}\nwhy = {:?}\n",
                opcode.why
            );
        }
    }
    calls(&mut out, STARTUP, STARTUP, &parsed.startup, used);
    // In the order of the file, which the map does not keep.
    let mut threads: Vec<_> = parsed.locked.iter().collect();
    threads.sort_by_key(|(name, _)| text.find(&format!("[[locked.{name}.call]]")));
    for (thread, phase) in threads {
        calls(&mut out, &format!("locked.{thread}"), thread, phase, used);
    }
    out.truncate(out.trim_end().len());
    out.push('\n');
    out
}

/// An override that takes away what was not used: for `policies.d/KIND.toml`, in the place of one that
/// may be there.
///
/// # Errors
/// None for built-in policies that keep the rules.
pub fn denials(kind: ProcKind, used: &BTreeSet<Grant>) -> Result<String, PolicyError> {
    let mut out = format!("kind = \"{kind}\"\n");
    let mut opcodes = Vec::new();
    let mut rest = String::new();
    for grant in load(kind, None, false)?.grants() {
        if used.contains(&grant) {
            continue;
        }
        if grant.phase == IO_URING {
            opcodes.push(format!("{:?}", grant.name));
            continue;
        }
        let one = grant.denial(kind.name());
        let entry = one.split_once("\n\n").map_or("", |(_, entry)| entry);
        let _infallible = write!(rest, "\n{entry}");
    }
    if !opcodes.is_empty() {
        let _infallible = writeln!(out, "deny_opcode = [{}]", opcodes.join(", "));
    }
    Ok(out + &rest)
}

/// A few lines about a run, as comments.
#[must_use]
pub fn summary(learnt: &Learnt) -> String {
    let mut out = String::new();
    for (kind, used) in &learnt.used {
        let all = load(*kind, None, false).map_or(0, |policy| policy.grants().len());
        let _infallible = writeln!(out, "# {kind}: {} of {all} grants were used", used.len());
    }
    for (kind, phase, call) in &learnt.denied {
        let _infallible = writeln!(out, "# {kind}: denied in {phase}: {call}");
    }
    out
}

/// Everything in front of the grants of requests.
fn head(text: &str) -> String {
    let first = ["[[io_uring.opcode]]", "[[startup.call]]"];
    let end = first.iter().filter_map(|section| text.find(section)).min();
    let head = text.get(..end.unwrap_or(text.len())).unwrap_or(text);
    // Comments about the sections that follow are not true of what is left of them.
    let mut lines: Vec<&str> = head.lines().collect();
    while lines
        .last()
        .is_some_and(|line| line.is_empty() || line.starts_with('#'))
    {
        lines.pop();
    }
    lines.join("\n") + "\n\n"
}

fn is_used(used: &BTreeSet<Grant>, phase: &str, name: &str, part: &Part) -> bool {
    used.iter()
        .any(|g| g.phase == phase && g.name == name && g.part == *part)
}

fn calls(out: &mut String, section: &str, phase: &str, calls: &Phase, used: &BTreeSet<Grant>) {
    let left = calls.call.iter();
    let left: Vec<String> = left
        .filter_map(|call| one(section, phase, call, used))
        .collect();
    if let Some(host) = calls.host {
        let _infallible = writeln!(out, "[{section}]\n{}\n", host_line(host));
    } else if left.is_empty() {
        // A thread of which nothing was seen is still a thread of its kind.
        let _infallible = writeln!(out, "[{section}]\ncall = []\n");
    }
    for text in left {
        let _infallible = writeln!(out, "{text}");
    }
}

/// What is left of one entry, if anything was used.
fn one(section: &str, phase: &str, call: &Call, used: &BTreeSet<Grant>) -> Option<String> {
    let name = call.name.get_ref();
    let mut text = format!("[[{section}.call]]\nname = {name:?}\n");
    let mut listed = false;
    if !call.request.is_empty() {
        listed = true;
        let was = |r: &&String| is_used(used, phase, name, &Part::Request((*r).clone()));
        let requests = call.request.iter().map(toml::Spanned::get_ref);
        let requests: Vec<&String> = requests.filter(was).collect();
        if requests.is_empty() {
            return None;
        }
        let _infallible = writeln!(text, "request = {requests:?}");
    }
    let mut conditions = Vec::new();
    for arg in &call.arg {
        let Some(values) = &arg.is else {
            conditions.push(bound(arg));
            continue;
        };
        listed = true;
        let index = arg.index;
        let was = |number: &&Number| {
            value(number)
                .is_some_and(|value| is_used(used, phase, name, &Part::Value { index, value }))
        };
        let values: Vec<String> = values.iter().filter(was).map(number).collect();
        if values.is_empty() {
            return None;
        }
        conditions.push(format!(
            "{{ index = {index}, is = [{}] }}",
            values.join(", ")
        ));
    }
    if !listed && !is_used(used, phase, name, &Part::Whole) {
        return None;
    }
    if !conditions.is_empty() {
        let _infallible = writeln!(text, "arg = [{}]", conditions.join(", "));
    }
    if let Some(host) = call.host {
        let _infallible = writeln!(text, "{}", host_line(host));
    }
    if let Some(Build::Debug) = call.build {
        text.push_str("build = \"debug\"\n");
    }
    if call.on_failure {
        text.push_str("on_failure = true\n");
    }
    let _infallible = writeln!(text, "why = {:?}", call.why);
    Some(text)
}

fn host_line(host: HostKvm) -> String {
    let name = match host {
        HostKvm::Complete => "complete",
        HostKvm::Incomplete => "incomplete",
    };
    format!("host = {name:?}")
}

/// A condition that is no list of values.
fn bound(arg: &ArgCondition) -> String {
    let index = arg.index;
    match (&arg.bits_clear, &arg.at_most) {
        (Some(bits), _) => format!("{{ index = {index}, bits_clear = {} }}", number(bits)),
        (None, most) => {
            let most = most.as_ref().map_or_else(|| "0".to_owned(), number);
            format!("{{ index = {index}, at_most = {most} }}")
        }
    }
}

fn number(number: &Number) -> String {
    match number {
        Number::Value(value) => value.to_string(),
        Number::Name(name) => format!("{name:?}"),
    }
}

fn value(number: &Number) -> Option<u32> {
    match number {
        Number::Value(value) => Some(*value),
        Number::Name(name) => constants::flag(name).or_else(|| constants::request(name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulkhead_policies::{check, overrides};

    #[test]
    fn policy_of_everything_grants_what_the_built_in_one_does() {
        for kind in ProcKind::ALL {
            let whole = load(kind, None, false).unwrap();
            let used: BTreeSet<Grant> = whole.grants().into_iter().collect();
            let text = policy(kind, &used);
            let mut again = check::policy("learnt", &text, kind).unwrap();
            again.sources = whole.sources.clone();
            assert_eq!(again, whole);
            assert_eq!(
                denials(kind, &used).unwrap(),
                format!("kind = \"{kind}\"\n")
            );
        }
    }

    #[test]
    fn policy_of_nothing_is_one_still() {
        for kind in ProcKind::ALL {
            let text = policy(kind, &BTreeSet::new());
            let nothing = check::policy("learnt", &text, kind).unwrap();
            assert_eq!(nothing.grants(), []);
        }
    }

    #[test]
    fn both_forms_of_a_part_grant_that_part() {
        for kind in ProcKind::ALL {
            let whole = load(kind, None, false).unwrap();
            let all = whole.grants();
            let used: BTreeSet<Grant> = all.iter().step_by(2).cloned().collect();
            let learnt = check::policy("learnt", &policy(kind, &used), kind).unwrap();
            assert_eq!(learnt.grants().into_iter().collect::<BTreeSet<_>>(), used);
            let text = denials(kind, &used).unwrap();
            let tighter = overrides::apply(whole, "o.toml", &text, false).unwrap();
            let mut left = tighter.grants();
            // What locked threads lose their start-up keeps.
            left.retain(|grant| all.contains(grant));
            assert_eq!(left.into_iter().collect::<BTreeSet<_>>(), used, "{kind}");
        }
    }
}
