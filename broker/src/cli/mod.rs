//! The `bulkhead` command: reads the command line, hands over to the code that does the work, and
//! turns what comes back into text or JSON and an exit code.
//!
//! Nothing is decided here that an API would have to decide again. Only commands that work are
//! registered.

mod disk_arg;
mod doctor_command;
mod failure;
mod generate;
mod image_command;
mod paths;
mod policy_command;
mod run_args;
mod run_command;
mod run_session;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Version of the JSON objects that commands print.
const SCHEMA_VERSION: u32 = 1;

/// Runs virtual machines in pieces
///
/// Every part of a virtual machine (its processors and memory, its serial port, each disk, …) runs in
/// a sandboxed process of its own. A part that is broken, or taken over by its guest, loses only
/// itself.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, max_term_width = 100, after_long_help = AFTER)]
#[command(subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    paths: paths::PathOptions,
}

const AFTER: &str = "\
Exit codes:
  0  success
  2  wrong usage or configuration
  4  the host lacks something; see bulkhead doctor
  6  the work could not be started or finished
  bulkhead run has more of them; see bulkhead run --help. The code is never 1.

Environment:
  BULKHEAD_CONFIG_DIR, BULKHEAD_STATE_DIR, BULKHEAD_RUNTIME_DIR, BULKHEAD_LIBEXEC_DIR
        as the options of the same name; an option wins
  XDG_CONFIG_HOME, XDG_STATE_HOME, XDG_RUNTIME_DIR, HOME
        where a user other than root keeps things

Examples:
  bulkhead doctor
        says whether this host can run machines, and how safely
  bulkhead run --kernel vmlinuz --disk root.img -m 512MiB
        runs a machine in this terminal
  bulkhead policy show blk
        shows everything that the process of a disk is granted
";

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run_args::RunArgs>),
    Doctor(doctor_command::DoctorArgs),
    /// Check and show what processes are granted
    #[command(subcommand)]
    Policy(policy_command::PolicyCommand),
    /// Make and inspect disk images
    #[command(subcommand)]
    Image(image_command::ImageCommand),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "run") {
        crate::launch::hollow::begin();
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are errors to clap, but not to the user.
            let code = if error.use_stderr() {
                failure::USAGE
            } else {
                0
            };
            let _unheard = error.print();
            return ExitCode::from(code);
        }
    };
    let done = match cli.command {
        Command::Run(args) => run_command::run(&args, &cli.paths),
        Command::Doctor(args) => doctor_command::run(&args),
        Command::Policy(command) => policy_command::run(&command, &cli.paths),
        Command::Image(command) => image_command::run(&command),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.report();
            ExitCode::from(failure.code)
        }
    }
}
