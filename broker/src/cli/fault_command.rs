//! `fault`: hands over to `bulkhead-fault`, which is a program of its own and no part of the product.

use super::failure::{Failure, HOST};
use super::paths::{PathOptions, Paths};
use clap::Args;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;

/// Inject faults into running machines, and judge what becomes of them
///
/// Runs bulkhead-fault of the directory of process binaries, with these arguments: run SCENARIO, points.
/// It starts a daemon of its own; machines of this host are left alone.
#[derive(Debug, Args)]
#[command(
    disable_help_flag = true,
    after_long_help = "\
Examples:
  bulkhead fault points
        lists the points at which faults can be injected
  bulkhead fault run scenario.toml --seed 7
        exits with 0 when everything held, 10 when not, 11 when nothing was shown
"
)]
pub(super) struct FaultArgs {
    /// Arguments of bulkhead-fault; --help shows them
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "ARGUMENT"
    )]
    arguments: Vec<OsString>,
}

/// Runs `fault`. Returns only when that is not possible.
pub(super) fn run(args: &FaultArgs, options: &PathOptions) -> Result<u8, Failure> {
    let program = Paths::new(options)?.fault_harness()?;
    #[expect(
        clippy::disallowed_methods,
        reason = "this program becomes another one; no process of a machine is started"
    )]
    let mut command = std::process::Command::new(&program);
    if let Some(directory) = program.parent() {
        command.env("BULKHEAD_LIBEXEC_DIR", directory);
    }
    let error = command.args(&args.arguments).exec();
    Err(Failure::because(HOST, program.display(), &error))
}
