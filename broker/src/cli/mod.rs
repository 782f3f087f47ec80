//! The `bulkhead` command: reads the command line, hands over to the code that does the work, and
//! turns what comes back into text or JSON and an exit code.
//!
//! Nothing is decided here that an API would have to decide again. Only commands that work are
//! registered.

mod agent_command;
mod agent_target;
mod authority_command;
mod client_args;
mod console_command;
mod cp_command;
mod device_commands;
mod disk_arg;
mod doctor_command;
mod exec_command;
mod failure;
mod fault_command;
mod generate;
mod image_args;
mod image_command;
mod image_target;
mod machine_commands;
mod net_arg;
mod network_command;
mod paths;
mod policy_command;
mod policy_diff;
mod policy_learn;
mod run_args;
mod run_command;
mod run_session;
mod serve_command;
mod share_arg;
mod show_commands;

use clap::{Parser, Subcommand};
use machine_commands::Verb;
use std::process::ExitCode;

/// Version of the JSON objects that commands print.
const SCHEMA_VERSION: u32 = crate::api::SCHEMA_VERSION;

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
  bulkhead run has more of them; see bulkhead run --help. The code is never 1, but for bulkhead exec, whose
  code is that of the command in the guest.

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
    Serve(serve_command::ServeArgs),
    Create(Box<machine_commands::CreateArgs>),
    /// Start machines
    Start(machine_commands::Names),
    /// Press the power button of machines and wait until they are off
    ///
    /// When the time is over and the guest has not powered off, the command fails and the machine
    /// runs on, unless --force cuts its power.
    #[command(visible_alias = "shutdown")]
    Stop(machine_commands::StopArgs),
    /// Cut the power of machines
    Kill(machine_commands::Names),
    /// Stop machines as stop does, then start them
    Restart(machine_commands::StopArgs),
    /// Press the reset button of machines: they begin again at once, in new processes
    Reset(machine_commands::Names),
    /// Stop the processors of machines; memory is kept, nothing is written to disk
    ///
    /// This is what other tools call suspend.
    Pause(machine_commands::Names),
    /// Let the processors of paused machines run again
    Resume(machine_commands::Names),
    /// List machines
    #[command(visible_alias = "ps")]
    List(show_commands::ListArgs),
    Inspect(authority_command::InspectArgs),
    /// Show what the processes of machines have used
    Stats(machine_commands::Names),
    /// Show the events of a machine's life, or the output of its guest
    Logs(show_commands::LogsArgs),
    Console(console_command::ConsoleArgs),
    Exec(exec_command::ExecArgs),
    Cp(cp_command::CpArgs),
    /// Ask the agent inside a machine's guest
    #[command(subcommand)]
    Agent(agent_command::AgentCommand),
    /// Remove machines, with their logs and console history; disks stay
    Rm(machine_commands::RemoveArgs),
    /// Wait until machines have ended, and exit with the code that run would have
    Wait(machine_commands::Names),
    /// List, restart, upgrade, limit and change the devices of machines that run
    #[command(subcommand)]
    Device(device_commands::DeviceCommand),
    /// Make, show and remove virtual networks, and capture what passes there
    #[command(subcommand, visible_alias = "net")]
    Network(network_command::NetworkCommand),
    ShutdownHost(serve_command::ShutdownHostArgs),
    Doctor(doctor_command::DoctorArgs),
    /// Check, show, learn and compare what processes are granted
    #[command(subcommand)]
    Policy(policy_command::PolicyCommand),
    /// Make, inspect, convert and check disk images
    #[command(subcommand)]
    Image(image_args::ImageCommand),
    Fault(fault_command::FaultArgs),
    Completions(generate::CompletionsArgs),
    Man(generate::ManArgs),
}

/// The one command whose start counts: its guest waits for the command line to be read.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, max_term_width = 100)]
struct RunCli {
    #[command(subcommand)]
    command: RunAlone,
    #[command(flatten)]
    paths: paths::PathOptions,
}

#[derive(Debug, Subcommand)]
enum RunAlone {
    Run(Box<run_args::RunArgs>),
}

/// Reads the command line. Describing every command takes longer than reading one.
fn parse() -> Result<Cli, clap::Error> {
    if !is_run() {
        return Cli::try_parse();
    }
    RunCli::try_parse().map(|RunCli { command, paths }| {
        let RunAlone::Run(args) = command;
        Cli {
            command: Command::Run(args),
            paths,
        }
    })
}

fn is_run() -> bool {
    std::env::args_os().nth(1).is_some_and(|verb| verb == "run")
}

/// The program.
#[must_use]
pub fn main() -> ExitCode {
    if is_run() {
        crate::launch::hollow::begin();
    }
    let cli = match parse() {
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
        Command::Serve(args) => serve_command::serve(&args, &cli.paths),
        Command::Create(args) => machine_commands::create(&args, &cli.paths),
        Command::Start(names) => machine_commands::verb(Verb::Start, &names, &cli.paths),
        Command::Stop(args) => machine_commands::stop(&args, false, &cli.paths),
        Command::Kill(names) => machine_commands::verb(Verb::Kill, &names, &cli.paths),
        Command::Restart(args) => machine_commands::stop(&args, true, &cli.paths),
        Command::Reset(names) => machine_commands::verb(Verb::Reset, &names, &cli.paths),
        Command::Pause(names) => machine_commands::verb(Verb::Pause, &names, &cli.paths),
        Command::Resume(names) => machine_commands::verb(Verb::Resume, &names, &cli.paths),
        Command::List(args) => show_commands::list(&args, &cli.paths),
        Command::Inspect(args) => authority_command::run(&args, &cli.paths),
        Command::Stats(names) => show_commands::stats(&names, &cli.paths),
        Command::Logs(args) => show_commands::logs(&args, &cli.paths),
        Command::Console(args) => console_command::run(&args, &cli.paths),
        Command::Exec(args) => exec_command::run(&args, &cli.paths),
        Command::Cp(args) => cp_command::run(&args, &cli.paths),
        Command::Agent(command) => agent_command::run(&command, &cli.paths),
        Command::Rm(args) => machine_commands::remove(&args, &cli.paths),
        Command::Wait(names) => machine_commands::wait(&names, &cli.paths),
        Command::Device(command) => device_commands::run(&command, &cli.paths),
        Command::Network(command) => network_command::run(&command, &cli.paths),
        Command::ShutdownHost(args) => serve_command::shutdown_host(&args, &cli.paths),
        Command::Doctor(args) => doctor_command::run(&args, &cli.paths),
        Command::Policy(command) => policy_command::run(&command, &cli.paths),
        Command::Image(command) => image_command::run(&command, &cli.paths),
        Command::Fault(args) => fault_command::run(&args, &cli.paths),
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
