//! A denied system call in words: what it was, and which line of which policy file would allow it.
//!
//! Works on the texts of the policies when a denial has happened, so that lines are those of the
//! files as they are. The built-in files are named by their place in the source tree.

use crate::check::{self, PolicyError};
use crate::grant::{Grant, IO_URING, Part, STARTUP};
use crate::plan::Permit;
use crate::schema::{DenyEntry, Number, OverrideFile, Phase, PolicyFile};
use crate::{built_in, constants, decode, load, overrides, syscalls};
use bulkhead_ipc::ident::ProcKind;
use serde::{Deserialize, Serialize};
use std::fmt::{self, Write as _};
use std::path::Path;
use toml::Spanned;

/// A system call that the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied<'a> {
    /// The thread by its name in the policy; `None` in the start-up phase.
    pub thread: Option<&'a str>,
    /// System call number.
    pub number: u32,
    /// Its arguments.
    pub args: [u64; 6],
}

/// What is to be known about a denial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The call with its arguments, such as `openat(AT_FDCWD, 0x7f10, O_RDONLY)`.
    pub call: String,
    /// The thread by its name in the policy, or `start-up`.
    pub thread: String,
    /// The policy file.
    pub file: String,
    /// The line in it, from 1.
    pub line: usize,
    /// What that line is, or would have to be.
    pub what: String,
    /// Whether a policy could permit it at all.
    pub may_be_allowed: bool,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            call,
            thread,
            file,
            line,
            what,
            ..
        } = self;
        write!(
            f,
            "{call} is not granted to thread {thread}; {file}:{line}: {what}"
        )
    }
}

/// Explains a denial of a process of `kind` that runs under the built-in policy and the override
/// in `directory`. `descriptor` says what a descriptor of the process is.
///
/// # Errors
/// When a policy file has become unreadable since.
pub fn denial(
    kind: ProcKind,
    directory: Option<&Path>,
    denied: &Denied<'_>,
    descriptor: &dyn Fn(i32) -> Option<String>,
) -> Result<Explanation, PolicyError> {
    let (line, what, may_be_allowed, file) = place(kind, directory, denied)?;
    Ok(Explanation {
        call: decode::call(denied.number, &denied.args, descriptor),
        thread: denied.thread.unwrap_or("start-up").to_owned(),
        file,
        line,
        what,
        may_be_allowed,
    })
}

fn place(
    kind: ProcKind,
    directory: Option<&Path>,
    denied: &Denied<'_>,
) -> Result<(usize, String, bool, String), PolicyError> {
    let file = format!("policies/{kind}.toml");
    let text = built_in(kind);
    let parsed: PolicyFile = check::parse(&file, text)?;
    let none = Phase::default();
    let (section, phase) = match denied.thread {
        None => ("startup".to_owned(), &parsed.startup),
        Some(thread) => (
            format!("locked.{thread}"),
            parsed.locked.get(thread).unwrap_or(&none),
        ),
    };
    let Some(name) = syscalls::name(denied.number) else {
        let line = end_of(text, phase);
        let what = "no policy can name it: it is no system call of x86_64 Linux".to_owned();
        return Ok((line, what, false, file));
    };
    if let Some(taken) = taken_away(kind, directory, denied, name)? {
        return Ok(taken);
    }
    if denied.thread.is_some()
        && let Some(does) = check::never_after_lock(name)
    {
        let line = end_of(text, phase);
        let what = format!("no policy may grant {name} after lock, since it {does}");
        return Ok((line, what, false, file));
    }
    Ok(match phase.call.iter().find(|c| c.name.get_ref() == name) {
        Some(call) => {
            let what = match name {
                "ioctl" => format!("would allow it with this request code in [[{section}.call]]"),
                _ => format!("would allow it with this argument in [[{section}.call]]"),
            };
            (line_of(text, &call.name), what, true, file)
        }
        None => {
            let what = format!("[[{section}.call]] name = {name:?} here would allow it");
            (end_of(text, phase), what, true, file)
        }
    })
}

/// The entry of the operator's override that takes the call away, if it was granted before.
fn taken_away(
    kind: ProcKind,
    directory: Option<&Path>,
    denied: &Denied<'_>,
    name: &str,
) -> Result<Option<(usize, String, bool, String)>, PolicyError> {
    let Some((file, text)) = overrides::read(kind, directory)? else {
        return Ok(None);
    };
    let granted = load(kind, None, false)?;
    let threads = granted.locked.iter();
    let locked = threads.filter(|t| denied.thread.is_none_or(|name| name == t.name));
    let mut permits = locked
        .flat_map(|t| &t.permits)
        .chain(granted.startup.iter().filter(|_| denied.thread.is_none()));
    if !permits.any(|p: &Permit| p.name == name && p.allows(&denied.args)) {
        return Ok(None);
    }
    let change: OverrideFile = check::parse(&file, &text)?;
    let phase = denied.thread.unwrap_or(STARTUP);
    let takes = |entry: &&DenyEntry| {
        entry.name.get_ref() == name
            && entry.thread.as_ref().is_none_or(|of| of == phase)
            && takes_these(entry, &denied.args)
    };
    let Some(entry) = change.deny.iter().find(takes) else {
        return Ok(None);
    };
    let mut what = format!("this [[deny]] of {name} takes it away");
    let grants = granted.grants_of(phase, denied.number, &denied.args);
    if let Some((file, line)) = grants.first().and_then(|grant| grant_place(kind, grant)) {
        // Writing to a string cannot fail.
        let _infallible = write!(what, ", which {file}:{line} grants");
    }
    Ok(Some((line_of(&text, &entry.name), what, true, file)))
}

/// Whether an entry takes a call with these arguments away, and not only others of its name.
fn takes_these(entry: &DenyEntry, args: &[u64; 6]) -> bool {
    let has = |index: u8, value: u32| {
        let arg = args.get(usize::from(index)).copied().unwrap_or(0);
        arg & 0xffff_ffff == u64::from(value)
    };
    let mut requests = entry.request.iter().filter_map(|r| constants::request(r));
    let mut values = entry.arg.iter().flat_map(|arg| {
        let numbers = arg.is.iter().flatten();
        numbers.filter_map(|number| Some((arg.index, value(number)?)))
    });
    (entry.request.is_empty() && entry.arg.is_empty())
        || requests.any(|code| has(1, code))
        || values.any(|(index, value)| has(index, value))
}

fn value(number: &Number) -> Option<u32> {
    match number {
        Number::Value(value) => Some(*value),
        Number::Name(name) => constants::flag(name).or_else(|| constants::request(name)),
    }
}

/// The built-in policy file that gives a grant, and the line in it, from 1.
#[must_use]
pub fn grant_place(kind: ProcKind, grant: &Grant) -> Option<(String, usize)> {
    let file = format!("policies/{kind}.toml");
    let text = built_in(kind);
    let parsed: PolicyFile = check::parse(&file, text).ok()?;
    let line = match grant.phase.as_str() {
        IO_URING => {
            let mut opcodes = parsed.io_uring.opcode.iter();
            let opcode = opcodes.find(|opcode| *opcode.name.get_ref() == grant.name)?;
            line_of(text, &opcode.name)
        }
        STARTUP => line_in(text, &parsed.startup, grant)?,
        thread => line_in(text, parsed.locked.get(thread)?, grant)?,
    };
    Some((file, line))
}

fn line_in(text: &str, phase: &Phase, grant: &Grant) -> Option<usize> {
    let mut calls = phase
        .call
        .iter()
        .filter(|call| *call.name.get_ref() == grant.name);
    calls.find_map(|call| match &grant.part {
        Part::Whole => Some(line_of(text, &call.name)),
        Part::Request(wanted) => {
            let mut requests = call.request.iter();
            let request = requests.find(|request| request.get_ref() == wanted)?;
            Some(line_of(text, request))
        }
        Part::Value { index, value: is } => {
            let arg = call.arg.iter().find(|arg| arg.index == *index)?;
            let mut values = arg.is.iter().flatten();
            let found = values.any(|number| value(number) == Some(*is));
            found.then(|| line_of(text, &call.name))
        }
    })
}

fn line_of(text: &str, name: &Spanned<String>) -> usize {
    check::line_of(text, &name.span())
}

/// The line behind the last entry of a phase, where one more would be put.
fn end_of(text: &str, phase: &Phase) -> usize {
    let from = phase
        .call
        .last()
        .map_or(1, |call| line_of(text, &call.name));
    let behind = text.lines().skip(from);
    from + 1 + behind.take_while(|line| !line.trim().is_empty()).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn explained(kind: ProcKind, thread: Option<&str>, name: &str, args: [u64; 6]) -> Explanation {
        let number = syscalls::number(name).unwrap();
        let denied = Denied {
            thread,
            number,
            args,
        };
        denial(kind, None, &denied, &|_| None).unwrap()
    }

    fn line(kind: ProcKind, number: usize) -> &'static str {
        built_in(kind).lines().nth(number - 1).unwrap_or("")
    }

    #[test]
    fn call_that_nobody_may_grant_is_said_to_be_one() {
        let told = explained(ProcKind::Blk, Some("main"), "openat", [0; 6]);
        assert!(!told.may_be_allowed);
        assert!(told.what.contains("opens files"), "{told}");
        assert_eq!(told.file, "policies/blk.toml");
    }

    #[test]
    fn line_is_where_a_new_entry_would_be_put() {
        for (kind, thread) in [
            (ProcKind::Rng, Some("main")),
            (ProcKind::Vcpu, Some("gate")),
            (ProcKind::Vcpu, Some("main")),
            (ProcKind::Blk, None),
        ] {
            let told = explained(kind, thread, "getppid", [0; 6]);
            let section = thread.map_or("startup".to_owned(), |t| format!("locked.{t}"));
            assert!(told.what.contains(&format!("[[{section}.call]]")), "{told}");
            assert_eq!(line(kind, told.line).trim(), "", "{told}");
            assert!(line(kind, told.line - 1).starts_with("why = "), "{told}");
        }
    }

    #[test]
    fn call_with_another_argument_points_at_the_entry_itself() {
        let told = explained(
            ProcKind::Vcpu,
            Some("vcpu"),
            "ioctl",
            [9, 0xaeb7, 0, 0, 0, 0],
        );
        assert!(told.call.contains("KVM_SMI"), "{told}");
        assert_eq!(line(ProcKind::Vcpu, told.line), "name = \"ioctl\"");
        assert!(told.what.contains("[[locked.vcpu.call]]"), "{told}");
        let told = explained(ProcKind::Blk, None, "mmap", [0, 1, 7, 2, 0, 0]);
        assert_eq!(line(ProcKind::Blk, told.line), "name = \"mmap\"");
    }

    #[test]
    fn each_grant_has_a_line_of_its_own_sort() {
        for kind in ProcKind::ALL {
            for grant in load(kind, None, false).unwrap().grants() {
                let (file, number) = grant_place(kind, &grant).unwrap();
                assert_eq!(file, format!("policies/{kind}.toml"));
                let part = match &grant.part {
                    Part::Request(request) => format!("\"{request}\""),
                    _ => format!("name = \"{}\"", grant.name),
                };
                let line = line(kind, number);
                assert!(line.contains(&part), "{grant}: {line}");
            }
        }
    }

    #[test]
    fn entry_that_takes_another_value_of_a_call_is_not_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = "kind = \"vcpu\"\n[[deny]]\nname = \"ioctl\"\nrequest = [\"KVM_IRQFD\"]\n\
                    [[deny]]\nname = \"ioctl\"\nrequest = [\"KVM_RUN\"]\n";
        std::fs::write(dir.path().join("vcpu.toml"), text).unwrap();
        let denied = Denied {
            thread: Some("vcpu"),
            number: syscalls::number("ioctl").unwrap(),
            args: [9, 0xae80, 0, 0, 0, 0],
        };
        let told = denial(ProcKind::Vcpu, Some(dir.path()), &denied, &|_| None).unwrap();
        assert!(
            told.file.ends_with("/vcpu.toml") && told.line == 6,
            "{told}"
        );
    }

    #[test]
    fn entry_of_an_override_that_takes_a_call_away_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let text = "kind = \"rng\"\n\n[[deny]]\nname = \"read\"\n";
        std::fs::write(dir.path().join("rng.toml"), text).unwrap();
        let number = syscalls::number("read").unwrap();
        let mut denied = Denied {
            thread: Some("main"),
            number,
            args: [0; 6],
        };
        let told = denial(ProcKind::Rng, Some(dir.path()), &denied, &|_| None).unwrap();
        assert!(told.file.ends_with("/rng.toml") && told.line == 4, "{told}");
        let (_, granted) = told.what.rsplit_once(", which policies/rng.toml:").unwrap();
        let granted = granted.strip_suffix(" grants").unwrap().parse().unwrap();
        assert_eq!(line(ProcKind::Rng, granted), "name = \"read\"", "{told}");
        denied.number = syscalls::number("getppid").unwrap();
        let told = denial(ProcKind::Rng, Some(dir.path()), &denied, &|_| None).unwrap();
        assert_eq!(told.file, "policies/rng.toml");
    }
}
