//! `policy check|show|explain`: what processes are granted, in words.

use super::SCHEMA_VERSION;
use super::failure::{Failure, USAGE, print, print_json, printable};
use super::paths::{PathOptions, Paths};
use super::policy_diff::limits;
use bulkhead_ipc::ident::ProcKind;
use bulkhead_policies::plan::{Limits, PermittedRequest, Policy, Summary};
use bulkhead_policies::{compile, load, role_name};
use clap::{Args, Subcommand};
use serde::Serialize;
use std::fmt::Write;

/// Commands about policies.
#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Check the built-in policies and the operator's overrides, and compile their filters
    #[command(after_long_help = "Exit codes: 0 all policies are good, 2 one is not.")]
    Check(CommonArgs),
    /// Show what processes are granted, one line for each grant
    Show(KindArgs),
    /// Show every grant with its reason and its conditions
    Explain(KindArgs),
    Learn(super::policy_learn::LearnArgs),
    Diff(super::policy_diff::DiffArgs),
}

/// Options of all policy commands.
#[derive(Debug, Args)]
pub(super) struct CommonArgs {
    /// Accept overrides that grant more than the built-in policies
    #[arg(long)]
    pub(super) allow_looser_policy: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Options of commands about some or all kinds.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Overrides are read from policies.d/KIND.toml below the configuration directory.

Examples:
  bulkhead policy show
  bulkhead policy explain blk
  bulkhead policy show vcpu --json
")]
pub(super) struct KindArgs {
    /// Kind of process; all if missing
    #[arg(value_name = "KIND", value_parser = parse_kind, ignore_case = true)]
    kind: Option<ProcKind>,
    #[command(flatten)]
    common: CommonArgs,
}

fn parse_kind(text: &str) -> Result<ProcKind, String> {
    let found = ProcKind::ALL.into_iter().find(|kind| kind.name() == text);
    found.ok_or_else(|| {
        let names = ProcKind::ALL.map(ProcKind::name);
        format!("expected one of {}", names.join(", "))
    })
}

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    policies: Vec<PolicyReport>,
}

#[derive(Serialize)]
struct PolicyReport {
    kind: &'static str,
    purpose: String,
    sources: Vec<String>,
    permitted_requests: usize,
    filter_instructions: usize,
    fds: Vec<FdReport>,
    made: Vec<MadeReport>,
    namespaces: Vec<String>,
    landlock: Vec<String>,
    limits: Limits,
    locked: Vec<RequestReport>,
    startup: Vec<RequestReport>,
}

#[derive(Serialize)]
struct FdReport {
    role: String,
    is: String,
    access: String,
    min: u16,
    max: u16,
    why: String,
}

#[derive(Serialize)]
struct MadeReport {
    is: String,
    min: u16,
    max: u16,
    per_vcpu: bool,
    why: String,
}

#[derive(Serialize)]
struct RequestReport {
    name: String,
    threads: Vec<String>,
    conditions: Vec<String>,
    why: String,
}

/// Runs a policy command.
pub(super) fn run(command: &PolicyCommand, options: &PathOptions) -> Result<u8, Failure> {
    let (common, kind) = match command {
        PolicyCommand::Check(common) => (common, None),
        PolicyCommand::Show(args) | PolicyCommand::Explain(args) => (&args.common, args.kind),
        PolicyCommand::Learn(args) => return super::policy_learn::run(args, options),
        PolicyCommand::Diff(args) => return super::policy_diff::run(args, options),
    };
    let directory = Paths::new(options)?.policies();
    let mut reports = Vec::new();
    let mut text = String::new();
    for one in ProcKind::ALL {
        if kind.is_some_and(|kind| kind != one) {
            continue;
        }
        let policy = load(one, directory.as_deref(), common.allow_looser_policy)
            .map_err(|error| Failure::because(USAGE, "policy", &error))?;
        let filters = compile(&policy)
            .map_err(|error| Failure::because(USAGE, format!("policy {one}: filter"), &error))?;
        let locked = filters.locked.iter().map(|f| f.filter.bpf.len());
        let bytes: usize = locked.sum::<usize>() + filters.startup.bpf.len();
        let report = report(&policy, bytes / 8);
        match command {
            PolicyCommand::Check(_) => check_line(&mut text, &report),
            PolicyCommand::Show(_) => show(&mut text, &report),
            PolicyCommand::Explain(_) | PolicyCommand::Learn(_) | PolicyCommand::Diff(_) => {
                explain(&mut text, &report);
            }
        }
        reports.push(report);
    }
    if common.json {
        print_json(&Report {
            schema_version: SCHEMA_VERSION,
            policies: reports,
        })?;
    } else {
        print(text.trim_start_matches('\n'))?;
    }
    Ok(0)
}

/// The name that a policy file uses for a value.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).ok();
    let text = value.as_ref().and_then(|v| v.as_str()).unwrap_or("?");
    text.to_owned()
}

fn requests(requests: Vec<PermittedRequest>) -> Vec<RequestReport> {
    let report = |request: PermittedRequest| RequestReport {
        name: request.name,
        threads: request.threads,
        conditions: request.when,
        why: printable(&request.why),
    };
    requests.into_iter().map(report).collect()
}

fn report(policy: &Policy, filter_instructions: usize) -> PolicyReport {
    let summary: Summary = policy.summary();
    let fds = summary.fds.iter().map(|fd| FdReport {
        role: role_name(fd.role),
        is: word(&fd.is),
        access: word(&fd.access),
        min: fd.min,
        max: fd.max,
        why: printable(&fd.why),
    });
    let made = policy.made.iter().map(|made| MadeReport {
        is: word(&made.is),
        min: made.min,
        max: made.max,
        per_vcpu: made.per_vcpu,
        why: printable(&made.why),
    });
    PolicyReport {
        kind: policy.kind.name(),
        purpose: printable(&summary.purpose),
        sources: summary.sources,
        permitted_requests: summary.requests.len(),
        filter_instructions,
        fds: fds.collect(),
        made: made.collect(),
        namespaces: policy.namespaces.iter().map(word).collect(),
        landlock: policy.landlock.iter().map(word).collect(),
        limits: policy.limits,
        locked: requests(summary.requests),
        startup: requests(summary.startup),
    }
}

// Writing to a string cannot fail, so results are dropped below.

fn check_line(out: &mut String, report: &PolicyReport) {
    let _infallible = writeln!(
        out,
        "{:<8} ok   {:>3} permitted requests, {:>4} filter instructions, from {}",
        report.kind,
        report.permitted_requests,
        report.filter_instructions,
        printable(&report.sources.join(", ")),
    );
}

fn heading(out: &mut String, report: &PolicyReport) {
    let _infallible = write!(
        out,
        "\n{}: {}\n  from        {}\n  namespaces  {}\n  landlock    denies {}\n",
        report.kind,
        report.purpose,
        printable(&report.sources.join(", ")),
        report.namespaces.join(", "),
        report.landlock.join(", "),
    );
}

fn show(out: &mut String, report: &PolicyReport) {
    heading(out, report);
    for fd in &report.fds {
        let _infallible = writeln!(
            out,
            "  descriptor  {} ({}, {}, {} to {})",
            fd.role, fd.is, fd.access, fd.min, fd.max
        );
    }
    for made in &report.made {
        let _infallible = writeln!(out, "  makes       {}", made_line(made));
    }
    for limit in limits(&report.limits) {
        let _infallible = writeln!(out, "  limit       {limit}");
    }
    for request in &report.locked {
        let threads = request.threads.join(", ");
        let _infallible = writeln!(out, "  request     {} [{threads}]", request.name);
    }
}

fn made_line(made: &MadeReport) -> String {
    let each = if made.per_vcpu { " for each vCPU" } else { "" };
    format!("{} ({} to {}{each})", made.is, made.min, made.max)
}

fn explain(out: &mut String, report: &PolicyReport) {
    heading(out, report);
    out.push_str("\n  It is born with these descriptors:\n");
    for fd in &report.fds {
        let _infallible = writeln!(
            out,
            "    {} ({}, {}, {} to {})\n        {}",
            fd.role, fd.is, fd.access, fd.min, fd.max, fd.why
        );
    }
    out.push_str("\n  It makes these for itself while it starts:\n");
    for made in &report.made {
        let _infallible = writeln!(out, "    {}\n        {}", made_line(made), made.why);
    }
    out.push_str(
        "\n  It has these limits (bytes, counts, percent of one processor, each second):\n",
    );
    for limit in limits(&report.limits) {
        let _infallible = writeln!(out, "    {limit}");
    }
    let lists = [
        (
            "Once it has locked itself, it may ask the kernel for",
            &report.locked,
        ),
        ("While it starts, it may also ask for", &report.startup),
    ];
    for (title, requests) in lists {
        let _infallible = writeln!(out, "\n  {title}:");
        for request in requests {
            let threads = match request.threads.as_slice() {
                [] => String::new(),
                threads => format!(" [{}]", threads.join(", ")),
            };
            let _infallible = writeln!(out, "    {}{threads}", request.name);
            for condition in &request.conditions {
                let _infallible = writeln!(out, "        if {condition}");
            }
            if !request.why.is_empty() {
                let _infallible = writeln!(out, "        {}", request.why);
            }
        }
    }
}
