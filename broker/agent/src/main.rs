//! `bulkhead-agent`, the program.

use bulkhead_agent::serve::{self, Place, freeze};
use bulkhead_ipc::protocol::agent::{AGENT_PORT, FREEZE_MS_MAX};
use std::io::Write;
use std::process::ExitCode;

const USAGE: u8 = 2;
const START: u8 = 6;

const HELP: &str = "\
Does for the host of this guest what only somebody inside can do

Usage: bulkhead-agent [--port PORT | --unix PATH]

It listens on a vsock port (10240), for the host alone, and stays in the foreground. Have it started by
systemd (bulkhead-agent.service), or by busybox's init with this line in /etc/inittab:
  ::respawn:/usr/sbin/bulkhead-agent

Options:
  --port PORT  Vsock port
  --unix PATH  Listen on a Unix socket instead, for tests outside of a guest: whoever connects says
               CONNECT and the port first; file systems, identity and power are left alone
  --help       Print this
  --version    Print the version
";

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    let place = match words.as_slice() {
        [] => Place::Vsock(AGENT_PORT),
        ["--port", port] => match port.parse() {
            Ok(port) => Place::Vsock(port),
            Err(_) => return usage(&format!("--port {port}: expected a number")),
        },
        ["--unix", path] => Place::Unix(path.into()),
        [freeze::GUARD, ms] => return freeze::guard(ms.parse().unwrap_or(FREEZE_MS_MAX)),
        ["--help" | "-h"] => return say(HELP),
        ["--version" | "-V"] => {
            return say(&format!("bulkhead-agent {}\n", env!("CARGO_PKG_VERSION")));
        }
        _ => return usage("unknown arguments; see --help"),
    };
    let Err(error) = serve::serve(&place);
    serve::log(&format!("cannot listen: {error}"));
    ExitCode::from(START)
}

fn usage(line: &str) -> ExitCode {
    serve::log(line);
    ExitCode::from(USAGE)
}

fn say(text: &str) -> ExitCode {
    // Nobody is left to tell when this fails.
    let _unheard = std::io::stdout().write_all(text.as_bytes());
    ExitCode::SUCCESS
}
