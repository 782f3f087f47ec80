//! `policy learn`: the tightest policies under which a run would still have worked.

use super::failure::{Failure, START, USAGE, print};
use super::paths::{PathOptions, Paths};
use crate::learn::tracer::{self, Clock};
use crate::learn::{Learnt, write};
use bulkhead_policies::cache::Compiled;
use clap::Args;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// Print the tightest policies under which a run would still have worked
///
/// Starts `bulkhead run` with the given arguments, follows every system call of its sandboxed processes
/// as a debugger would, and prints the policies reduced to what was used. The filters remain in force
/// throughout: there is no permissive mode, so what is learnt is always a part of the policies. The
/// guest's console and all messages go to standard error.
///
/// A policy that was learnt from one run denies what only another run needs, such as writing a core
/// when a guest crashes. Learn from runs that do everything that your machines may do.
#[derive(Debug, Args)]
#[command(after_long_help = "\
The exit code is that of the run.

Examples:
  bulkhead policy learn -- --disk root.img --timeout 60s
  bulkhead policy learn --override --output /etc/bulkhead/policies.d -- vm.toml
")]
pub(super) struct LearnArgs {
    /// Print overrides that take away what was not used, instead of whole policies
    #[arg(long = "override")]
    denials: bool,
    /// Write KIND.toml files into this directory instead of printing
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Learn as on hosts whose clock the vDSO cannot read, where each look at a clock is a system call
    #[arg(long)]
    without_vdso: bool,
    /// Arguments of `bulkhead run`
    #[arg(last = true, value_name = "ARGUMENTS OF RUN")]
    arguments: Vec<OsString>,
}

/// Runs `policy learn`.
pub(super) fn run(args: &LearnArgs, options: &PathOptions) -> Result<u8, Failure> {
    let paths = Paths::new(options)?;
    let directory = paths.policies();
    let policies = Compiled::fresh(directory.as_deref(), false)
        .map_err(|error| Failure::because(USAGE, "policy", &error))?;
    let clock = match args.without_vdso {
        true => Clock::WithoutVdso,
        false => Clock::AsItIs,
    };
    let learnt = start(args, options)
        .and_then(|mut command| tracer::follow(&mut command, &policies, clock))
        .map_err(|error| Failure::because(START, "following a run", &error))?;
    if let Some(output) = &args.output {
        fs::create_dir_all(output)
            .map_err(|error| Failure::because(START, output.display(), &error))?;
    }
    let mut text = write::summary(&learnt);
    for (kind, used) in &learnt.used {
        let policy = match args.denials {
            true => write::denials(*kind, used)
                .map_err(|error| Failure::because(USAGE, "policy", &error))?,
            false => write::policy(*kind, used),
        };
        match &args.output {
            None => {
                // Writing to a string cannot fail.
                let _infallible = write!(text, "\n# --- {kind}.toml\n{policy}");
            }
            Some(output) => {
                let path = output.join(format!("{kind}.toml"));
                fs::write(&path, policy)
                    .map_err(|error| Failure::because(START, path.display(), &error))?;
            }
        }
    }
    print(&text)?;
    Ok(exit_code(&learnt))
}

fn exit_code(learnt: &Learnt) -> u8 {
    u8::try_from(learnt.exit_code).unwrap_or(START)
}

/// `bulkhead run` with the same directories.
#[expect(
    clippy::disallowed_methods,
    reason = "it starts this program again, outside of any sandbox, as a user would"
)]
fn start(args: &LearnArgs, options: &PathOptions) -> io::Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("run").args(options.as_arguments());
    command.args(&args.arguments);
    // Standard output is for the policies.
    let console = io::stderr().as_fd().try_clone_to_owned()?;
    command.stdout(Stdio::from(console));
    Ok(command)
}
