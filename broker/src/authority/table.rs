//! What was measured, for people.

use super::Authority;
use super::filters::Thread;
use super::graph::{Graph, Sort, Thing};
use crate::escape::escaped;
use std::collections::BTreeMap;
use std::fmt::Write as _;

const NOT_MEASURABLE: &str = "not measurable here";

/// A paragraph for each process.
#[must_use]
pub fn text(authority: &Authority) -> String {
    let graph = Graph::of(authority);
    let mut out = String::new();
    // Writing to a string cannot fail, so results are dropped below.
    for process in &authority.processes {
        let status = &process.status;
        let _infallible = writeln!(
            out,
            "{}  pid {}  user {}  group {}",
            process.name, process.pid, status.uid, status.gid
        );
        let own: Vec<&str> = status
            .namespaces
            .iter()
            .filter(|(_, namespace)| !namespace.is_readers)
            .map(|(name, _)| *name)
            .collect();
        line(&mut out, "namespaces", &own.join(" "));
        let root = status.root_entries.map_or_else(
            || format!("root directory {NOT_MEASURABLE}"),
            |entries| format!("root directory with {entries} entries"),
        );
        let caps = match status.capabilities {
            0 => "no capabilities".to_owned(),
            some => format!("capabilities {some:#x}"),
        };
        let gains = if status.may_gain_privileges {
            "may gain privileges"
        } else {
            "no new privileges"
        };
        let landlock = process.landlock.map_or_else(
            || format!("Landlock {NOT_MEASURABLE}"),
            |landlock| format!("Landlock denies {landlock}"),
        );
        line(
            &mut out,
            "confined",
            &format!("{root}, {caps}, {gains}, {landlock}"),
        );
        line(&mut out, "permitted", &threads(&process.threads));
        if process.descriptors.is_none() {
            line(&mut out, "descriptors", NOT_MEASURABLE);
        }
        for (with, what) in reaches(&graph, &process.name) {
            line(&mut out, &with, &what);
        }
        match &process.memory {
            None => line(&mut out, "memory", NOT_MEASURABLE),
            Some(memory) => line(
                &mut out,
                "memory",
                &format!("{} KiB private", memory.private_bytes >> 10),
            ),
        }
        out.push('\n');
    }
    out
}

fn line(out: &mut String, title: &str, text: &str) {
    let text = escaped(text);
    let _infallible = writeln!(out, "    {title:<12}  {text}");
}

fn threads(threads: &[Thread]) -> String {
    let shown = threads.iter().map(|thread| {
        let name = &thread.name;
        match (&thread.permitted, thread.filters) {
            (_, 0) => format!("{name}: everything"),
            (Some(permitted), _) => format!("{name}: {} requests", permitted.len()),
            (None, filters) => format!("{name}: {filters} filters, {NOT_MEASURABLE}"),
        }
    });
    shown.collect::<Vec<_>>().join("; ")
}

/// What a process reaches: alone, and with each other process.
fn reaches(graph: &Graph, process: &str) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    for (processes, things) in graph.bundles() {
        if !processes.contains(&process) {
            continue;
        }
        let others: Vec<&str> = processes.into_iter().filter(|p| *p != process).collect();
        let title = match others.as_slice() {
            [] => "reaches".to_owned(),
            others => format!("with {}", others.join(", ")),
        };
        rows.push((title, in_words(&things, process)));
    }
    rows
}

/// Things in words; doorbells, which are all alike, as their number.
pub(super) fn in_words(things: &[&Thing], process: &str) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut words = Vec::new();
    for thing in things {
        let plural = match thing.sort {
            Sort::Doorbell => "doorbells",
            Sort::Pipe => "pipes",
            Sort::Socket if !thing.label.starts_with("listening") => "sockets",
            _ => {
                let reach = thing.reached_by.iter().find(|r| r.process == process);
                let access = reach.map_or("", |reach| &reach.access);
                words.push(format!("{} ({access})", thing.label));
                continue;
            }
        };
        *counts.entry(plural).or_default() += 1;
    }
    words.extend(counts.iter().map(|(name, count)| format!("{count} {name}")));
    words.join(", ")
}
