//! `exec`: a command in a guest, as if it ran here.

use super::agent_target::AgentTarget;
use super::failure::Failure;
use super::paths::PathOptions;
use super::run_args::{EscapeKey, escape_key};
use crate::agent::AgentError;
use crate::agent::exec::{Ending, Streams, run as run_agent};
use crate::console::keys::Keys;
use bulkhead_ipc::protocol::agent::{Exec, Exit, FailureKind};
use clap::Args;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The command could not be run at all, or was lost.
const LOST: u8 = 125;
/// It was found and may not be executed.
const NOT_EXECUTABLE: u8 = 126;
/// It was not found.
const NOT_FOUND: u8 = 127;
/// What is added to the number of a signal.
const SIGNALLED: u8 = 128;
/// Exit code when nobody reads the output any more, as of a program that SIGPIPE ends.
const UNREAD: u8 = SIGNALLED + 13;
/// Exit code when the user leaves, as of a program that SIGINT ends.
const LEFT: u8 = SIGNALLED + 2;

/// Run a command in a machine's guest
///
/// The guest agent (bulkhead-agent) has to run in the guest. Streams are passed on, and the command is killed
/// when this program ends before it does. Without --terminal, what it writes cannot control a terminal
/// here: other characters than letters, line ends and tabs are shown escaped.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit codes:
  that of the command, or 128 and the number of the signal that has ended it
  2    wrong usage, or there is no such machine
  4    no daemon answers
  125  the command could not be run, or was lost: the machine does not run, its agent does not answer
  126  the command cannot be executed
  127  the command, its user or its directory was not found

Examples:
  bulkhead exec web -- uname -r
  bulkhead exec -it web -- sh
  bulkhead exec -i -u www-data -w /srv -e LANG=C web -- tar x < site.tar
")]
pub(super) struct ExecArgs {
    /// Pass standard input on
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal; with -i this one is raw meanwhile
    #[arg(short, long)]
    terminal: bool,
    /// Environment variable of the command; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Directory to run it in [default: the user's home]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<OsString>,
    /// User or uid, perhaps with :GROUP [default: that of the agent]
    #[arg(short, long, value_name = "USER")]
    user: Option<String>,
    /// Key that leaves and kills the command, with -it; such as ^T, or none
    #[arg(long, value_name = "KEY", default_value = "^]", value_parser = escape_key)]
    escape: EscapeKey,
    #[command(flatten)]
    target: AgentTarget,
    /// Machine
    #[arg(value_name = "VM")]
    name: String,
    /// Command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    #[arg(allow_hyphen_values = true)]
    command: Vec<OsString>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .filter(|(key, _)| !key.is_empty())
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .ok_or_else(|| "expected KEY=VALUE".to_owned())
}

/// Runs `exec`.
pub(super) fn run(args: &ExecArgs, options: &PathOptions) -> Result<u8, Failure> {
    let keys = Keys::leaving_with(args.escape.0);
    let (interactive, terminal) = (args.interactive, args.terminal);
    let bytes = |text: &OsString| text.as_bytes().to_vec();
    let variables = args.env.iter().map(|(k, v)| (k.clone(), v.clone()));
    let mut exec = Exec {
        argv: args.command.iter().map(bytes).collect(),
        env: variables
            .map(|(k, v)| (k.into_bytes(), v.into_bytes()))
            .collect(),
        cwd: args.workdir.clone().map(OsStringExt::into_vec),
        user: args.user.clone(),
        terminal: None,
        stdin: interactive,
    };
    let done = args.target.with(&args.name, options, move |wire| {
        let streams = Streams::standard(interactive, terminal, keys);
        let streams = streams.map_err(|e| Failure::because(LOST, "the standard streams", &e))?;
        exec.terminal = terminal.then(|| streams.terminal());
        // The terminal is put back before anything is said.
        Ok(run_agent(wire, exec, streams))
    });
    // Of the codes for failures of ours, only those that no command is likely to end with.
    match done.map_err(|mut failure| {
        failure.code = if failure.code == super::failure::START {
            LOST
        } else {
            failure.code
        };
        failure
    })? {
        Ok(ending) => Ok(code_of(ending)),
        Err(error) => {
            let code = code_of_error(&error);
            let mut failure = Failure::from(error);
            failure.code = code;
            Err(failure)
        }
    }
}

const fn code_of(ending: Ending) -> u8 {
    match ending {
        Ending::Exited(Exit::Status(status)) => status,
        Ending::Exited(Exit::Signal(signal)) => SIGNALLED.saturating_add(signal),
        Ending::Left => LEFT,
        Ending::Unread => UNREAD,
    }
}

const fn code_of_error(error: &AgentError) -> u8 {
    match error {
        AgentError::Refused(failure) => match failure.kind {
            FailureKind::NotFound => NOT_FOUND,
            FailureKind::Denied => NOT_EXECUTABLE,
            _ => LOST,
        },
        _ => LOST,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: ExecArgs,
    }

    #[test]
    fn options_of_the_command_are_its_own() {
        let words = ["exec", "-it", "web", "--", "ls", "-l", "--json", "-e"];
        let args = Cli::try_parse_from(words)
            .unwrap_or_else(|e| panic!("{e}"))
            .args;
        assert!(args.interactive && args.terminal);
        assert_eq!(args.command, ["ls", "-l", "--json", "-e"]);
        assert!(Cli::try_parse_from(["exec", "web"]).is_err());
        assert!(Cli::try_parse_from(["exec", "-e", "=x", "web", "--", "true"]).is_err());
    }

    #[test]
    fn codes_of_commands_are_passed_on() {
        assert_eq!(code_of(Ending::Exited(Exit::Status(3))), 3);
        assert_eq!(code_of(Ending::Exited(Exit::Signal(9))), 137);
    }
}
