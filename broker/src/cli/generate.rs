//! Shell completions and manual pages, made from the command line's own description.

use super::failure::{Failure, START, print};
use clap::{Args, CommandFactory, ValueHint};
use clap_complete::Shell;
use std::path::{Path, PathBuf};

/// Write the completions of a shell to standard output
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bulkhead completions bash > /etc/bash_completion.d/bulkhead
  bulkhead completions zsh > /usr/share/zsh/site-functions/_bulkhead
  bulkhead completions fish > ~/.config/fish/completions/bulkhead.fish
")]
pub(super) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Write the manual pages
///
/// Without a directory, the page of bulkhead itself goes to standard output; with one, the pages of
/// all commands are written there as bulkhead.1, bulkhead-run.1 and so on.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bulkhead man | man -l -
  bulkhead man /usr/local/share/man/man1
")]
pub(super) struct ManArgs {
    /// Directory to write the pages to; made if missing
    #[arg(value_name = "DIR", value_hint = ValueHint::DirPath)]
    directory: Option<PathBuf>,
}

/// Writes the completions.
pub(super) fn completions(args: &CompletionsArgs) -> Result<u8, Failure> {
    let mut text = Vec::new();
    clap_complete::generate(
        args.shell,
        &mut super::Cli::command(),
        "bulkhead",
        &mut text,
    );
    print(&String::from_utf8_lossy(&text))?;
    Ok(0)
}

/// Writes the manual pages.
pub(super) fn man(args: &ManArgs) -> Result<u8, Failure> {
    let Some(directory) = &args.directory else {
        let mut text = Vec::new();
        clap_mangen::Man::new(super::Cli::command())
            .render(&mut text)
            .map_err(|error| Failure::because(START, "making the manual page", &error))?;
        print(&String::from_utf8_lossy(&text))?;
        return Ok(0);
    };
    write_pages(directory).map_err(|error| {
        let doing = format!("writing manual pages to {}", directory.display());
        Failure::because(START, doing, &error)
    })?;
    Ok(0)
}

fn write_pages(directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    let command = super::Cli::command().disable_help_subcommand(true);
    clap_mangen::generate_to(command, directory)
}
