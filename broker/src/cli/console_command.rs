//! `console`: this terminal at a machine of the daemon.

use super::client_args::ClientArgs;
use super::failure::{Failure, START, USAGE};
use super::paths::PathOptions;
use super::run_args::{EscapeKey, escape_key};
use super::show_commands::ConsoleChoice;
use crate::api::client::Client;
use crate::console::attach::{Streams, UserEvent, attach, notice};
use crate::console::keys::Keys;
use crate::console::link::Remote;
use crate::escape::escaped;
use clap::Args;
use tokio::sync::mpsc;

/// What the user may do before it is dealt with.
const EVENTS_CAPACITY: usize = 16;

/// Attach this terminal to a machine's console
///
/// Every key goes to the guest except Ctrl-], which leaves; the machine runs on. Several terminals
/// may be attached. One that is too slow loses the oldest output, and is told how much.
#[derive(Debug, Args)]
#[command(after_long_help = "\
If standard input is not a terminal, its bytes go to the guest as they are.

Exit codes:
  0  left, or the machine has ended
  2  there is no such machine
  4  no daemon answers
  6  the machine is not running

Examples:
  bulkhead console web
  bulkhead console web --history --escape ^T
")]
pub(super) struct ConsoleArgs {
    /// Machine
    #[arg(value_name = "VM")]
    name: String,
    /// Console [default: as the VM file says]
    #[arg(long, value_name = "CONSOLE")]
    console: Option<ConsoleChoice>,
    /// Show the kept output first
    #[arg(long)]
    history: bool,
    /// Key that leaves, such as ^T, or none
    #[arg(long, value_name = "KEY", default_value = "^]", value_parser = escape_key)]
    escape: EscapeKey,
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs `console`.
pub(super) fn run(args: &ConsoleArgs, options: &PathOptions) -> Result<u8, Failure> {
    if !crate::vmfile::is_name(&args.name) {
        let line = format!("{}: there is no such machine", escaped(&args.name));
        return Err(Failure::new(USAGE, line));
    }
    args.client
        .talk(options, async |client| live(args, &client).await)?;
    Ok(0)
}

async fn live(args: &ConsoleArgs, client: &Client) -> Result<(), Failure> {
    let console = args.console.map(ConsoleChoice::word);
    let attached = client.console(&args.name, console, args.history).await?;
    let failed = |error| Failure::because(START, "attaching the console", &error);
    let (tell, mut told) = mpsc::channel(EVENTS_CAPACITY);
    let streams = Streams::standard().map_err(failed)?;
    let keys = Keys::leaving_with(args.escape.0);
    let link = Remote::new(attached.socket);
    let attachment = attach(link, streams, keys, move |event| {
        if !matches!(event, UserEvent::Resize { .. }) {
            // One that does not fit follows one that ends it.
            let _told = tell.try_send(event);
        }
    })
    .map_err(failed)?;
    let event = told.recv().await;
    let _summary = attachment.finish();
    if event == Some(UserEvent::Over) {
        notice(&format!("bulkhead: the console of {} is closed", args.name));
    }
    Ok(())
}
