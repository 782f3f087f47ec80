//! `inspect VM --authority`: what the processes of a machine can reach, measured and compared.

use super::SCHEMA_VERSION;
use super::failure::{Failure, START, USAGE, print, print_json};
use super::machine_commands::Names;
use super::paths::{PathOptions, Paths};
use super::show_commands;
use crate::api::client::ClientError;
use crate::api::{Code, Details, NetworkDetails, NetworkSummary};
use crate::authority::compare::{Difference, differences};
use crate::authority::graph::Graph;
use crate::authority::{Authority, Subject, measure, svg, table};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_policies::cache::Compiled;
use clap::Args;
use serde::Serialize;

/// Show everything that is known of machines
///
/// With `--authority`, shows what each process of one machine can reach: its files, devices, shared
/// memory and doorbells, what it may ask of the kernel, and what surrounds it. The switches of the virtual
/// networks that the machine is in are measured with them. All of this is measured
/// from the kernel, and compared with what the policies grant. Any difference is an error.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit codes of --authority: 0 every process reaches what its policy grants and nothing else, 6 one differs.
What the kernel does not tell is shown as 'not measurable here': without root, what filters permit.

Examples:
  bulkhead inspect web
  bulkhead inspect web --authority
  bulkhead inspect web --authority --svg > web.svg
")]
pub(super) struct InspectArgs {
    #[command(flatten)]
    names: Names,
    /// Measure what the processes of one machine can reach, and compare it with the policies
    #[arg(long)]
    authority: bool,
    /// Print the authority graph for Graphviz
    #[arg(long, requires = "authority", conflicts_with_all = ["svg", "json"])]
    dot: bool,
    /// Print the authority graph as a picture
    #[arg(long, requires = "authority", conflicts_with = "json")]
    svg: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    schema_version: u32,
    name: &'a str,
    #[serde(flatten)]
    authority: &'a Authority,
    graph: &'a Graph,
    differences: &'a [Difference],
}

/// Runs `inspect`.
pub(super) fn run(args: &InspectArgs, options: &PathOptions) -> Result<u8, Failure> {
    if !args.authority {
        return show_commands::inspect(&args.names, options);
    }
    let name = args.names.only("--authority")?;
    let (vm, networks) = args.names.client.talk(options, async |client| {
        let vm: Details = client.get(&format!("/v1/vms/{name}")).await?;
        let all: Vec<NetworkSummary> = client.get("/v1/networks").await?;
        let mut networks: Vec<NetworkDetails> = Vec::new();
        for network in all.iter().filter(|network| network.ports > 0) {
            let path = format!("/v1/networks/{}", network.name);
            match client.get(&path).await {
                Ok(network) => networks.push(network),
                // It was removed meanwhile.
                Err(ClientError::Api(error)) if error.code == Code::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok((vm, networks))
    })?;
    let mut subjects = subjects(&vm);
    if subjects.is_empty() {
        return Err(Failure::new(START, format!("{name} has no processes")));
    }
    subjects.extend(switches(name, &networks));
    let paths = Paths::new(options)?;
    let policies = Compiled::fresh(paths.policies().as_deref(), true)
        .map_err(|error| Failure::because(USAGE, "policy", &error))?;
    let authority =
        measure(&subjects).map_err(|error| Failure::because(START, "measuring", &error))?;
    let found = differences(&authority, &policies);
    let graph = Graph::of(&authority);
    if args.names.client.json {
        print_json(&Report {
            schema_version: SCHEMA_VERSION,
            name,
            authority: &authority,
            graph: &graph,
            differences: &found,
        })?;
    } else if args.dot {
        print(&graph.dot())?;
    } else if args.svg {
        print(&svg::render(&graph))?;
    } else {
        print(&table::text(&authority))?;
    }
    if found.is_empty() {
        return Ok(0);
    }
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    Err(Failure::lines(START, lines.iter().map(String::as_str)))
}

fn subjects(vm: &Details) -> Vec<Subject> {
    let subject = |process: &crate::api::Process| {
        let kind = ProcKind::ALL
            .into_iter()
            .find(|kind| kind.name() == process.kind)?;
        Some(Subject {
            id: Some(ProcId {
                kind,
                index: process.index,
                generation: process.generation,
            }),
            pid: process.pid,
            users: process.users,
        })
    };
    vm.processes.iter().filter_map(subject).collect()
}

/// The switches of the networks that machine `name` is in, with numbers in the order of the networks: each is the only one
/// of its own.
fn switches(name: &str, networks: &[NetworkDetails]) -> Vec<Subject> {
    let is_in = |network: &&NetworkDetails| network.cards.iter().any(|card| card.machine == name);
    let subject = |(index, network): (u16, &NetworkDetails)| {
        Some(Subject {
            id: Some(ProcId {
                kind: ProcKind::Switch,
                index,
                generation: network.generation,
            }),
            pid: network.pid?,
            users: network.users,
        })
    };
    let own = networks.iter().filter(is_in);
    (0..).zip(own).filter_map(subject).collect()
}
