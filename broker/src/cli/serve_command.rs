//! `serve` and `shutdown-host`.

use super::client_args::ClientArgs;
use super::failure::{Failure, START, USAGE, print, print_json};
use super::paths::{PathOptions, Paths};
use crate::api::{HostShutdown, HostShutdownVm};
use crate::serve::config::Config;
use crate::serve::{Places, serve as serve_host};
use crate::vmfile::parse_duration;
use clap::{Args, ValueEnum};
use std::io::IsTerminal;
use std::time::Duration;

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LogLevel {
    /// What went wrong
    Error,
    /// What may go wrong
    Warn,
    /// What was asked for and what happened
    Info,
    /// Everything
    Debug,
}

/// Serve this host: run machines in the background and keep them
///
/// Listens on bulkhead.sock in the runtime directory, for its own user and the members of the group
/// bulkhead. What may be used of the host is in bulkhead.toml of the configuration directory.
/// The other commands (create, start, list, …) are its clients.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Files:
  bulkhead.toml (configuration directory)
        [host] memory, overcommit, users; [limits] machines, connections, consoles, log
  registry.redb (state directory)
        which machines there are; one daemon at a time
  bulkhead.sock (runtime directory)
        the API: HTTP and JSON under /v1

Exit codes:
  0  ended by SIGTERM or SIGINT
  2  bulkhead.toml is wrong
  4  the host lacks something
  6  it could not start, for instance because another daemon runs
")]
pub(super) struct ServeArgs {
    /// How much is logged to standard error
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    log: LogLevel,
    /// Accept policy overrides that grant more than the built-in policies
    #[arg(long)]
    allow_looser_policy: bool,
}

/// Runs `serve`.
pub(super) fn serve(args: &ServeArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let config = Config::load(&paths.config).map_err(|e| Failure::because(USAGE, "", &e))?;
    log(args.log);
    let places = Places {
        binaries: paths.binaries()?,
        policies: paths.policies(),
        allow_looser_policy: args.allow_looser_policy,
        config: paths.config,
        state: paths.state,
        runtime: paths.runtime,
    };
    serve_host(places, config).map_err(|e| Failure::because(START, "serving", &e))?;
    Ok(0)
}

fn log(level: LogLevel) {
    let level = match level {
        LogLevel::Error => tracing::Level::ERROR,
        LogLevel::Warn => tracing::Level::WARN,
        LogLevel::Info => tracing::Level::INFO,
        LogLevel::Debug => tracing::Level::DEBUG,
    };
    // A second one cannot be there: nothing else of this program logs.
    let _only_one = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
}

/// End every machine because the host shuts down
///
/// Presses the power button of every machine and waits. When the deadline has passed, each VM file's
/// on_host_shutdown says what happens: "destroy" cuts the power, "restart" cuts it and starts the
/// machine again with the host, "preserve" does nothing. The daemon starts nothing any more.
/// The unit bulkhead-shutdown.service runs this before the host goes down.
#[derive(Debug, Args)]
pub(super) struct ShutdownHostArgs {
    /// How long the guests have to power off
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "90s")]
    deadline: Duration,
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs `shutdown-host`.
pub(super) fn shutdown_host(args: &ShutdownHostArgs, options: &PathOptions) -> Result<u8, Failure> {
    let how = HostShutdown {
        deadline_ms: u64::try_from(args.deadline.as_millis()).unwrap_or(u64::MAX),
    };
    let ended: Vec<HostShutdownVm> = args.client.talk(options, async |client| {
        Ok(client.post("/v1/host/shutdown", Some(&how)).await?)
    })?;
    if args.client.json {
        print_json(&ended)?;
    } else {
        for vm in &ended {
            print(&format!("{}: {}\n", vm.name, vm.outcome.replace('_', " ")))?;
        }
    }
    Ok(0)
}
