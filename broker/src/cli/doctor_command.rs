//! `doctor`.

use super::SCHEMA_VERSION;
use super::failure::{Failure, HOST, print, print_json};
use super::paths::{PathOptions, Paths};
use crate::doctor::probe::Probed;
use crate::doctor::{Check, Status, examine};
use crate::serve::config::Config;
use clap::Args;
use serde::Serialize;
use std::fmt::Write;
use std::path::Path;

/// Check what this host offers and how well it isolates machines
///
/// Each line is one check: what was found and, where something is wrong or could be better, a cure.
/// Nothing is changed.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit codes:
  0  machines can run here, perhaps with warnings
  4  the host lacks something; the lines marked FAIL say what

Examples:
  bulkhead doctor
  bulkhead doctor --json | jq '.checks[] | select(.status != \"ok\")'
")]
pub(super) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    schema_version: u32,
    status: Status,
    checks: Vec<Check>,
}

/// Runs `doctor`.
pub(super) fn run(args: &DoctorArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let users = Config::load(&paths.config).map(|config| config.host.users);
    let checks = examine(Path::new("/"), &Probed::running_kernel(), &users);
    let worst = checks.iter().map(|check| check.status).max();
    let status = worst.unwrap_or(Status::Ok);
    if args.json {
        print_json(&Report {
            schema_version: SCHEMA_VERSION,
            status,
            checks,
        })?;
    } else {
        print(&table(&checks))?;
    }
    Ok(if status == Status::Fail { HOST } else { 0 })
}

fn table(checks: &[Check]) -> String {
    let mut out = String::new();
    for check in checks {
        let word = match check.status {
            Status::Ok => "ok  ",
            Status::Warn => "WARN",
            Status::Fail => "FAIL",
        };
        // Writing to a string cannot fail.
        let _infallible = writeln!(out, "{word}  {:<26} {}", check.id, check.found);
        if !check.cure.is_empty() {
            let _infallible = writeln!(out, "      {:<26} cure: {}", "", check.cure);
        }
    }
    out
}
