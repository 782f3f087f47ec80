//! `cp`: files between this host and a guest.

use super::SCHEMA_VERSION;
use super::agent_target::AgentTarget;
use super::failure::{Failure, START, USAGE, print_json};
use super::paths::PathOptions;
use crate::agent::AgentError;
use crate::console::attach::notice;
use crate::escape::escaped;
use crate::vmfile::{is_name, parse_size};
use bulkhead_agent::copy::{self, CopyError, HostEnd};
use bulkhead_agent::tree::{Limits, Plant, Walk};
use bulkhead_agent::wire::Wire;
use bulkhead_ipc::protocol::agent::{Ask, Copied, ENTRIES_MAX, Entry, FromAgent, ToAgent};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Copy files between this host and a machine's guest
///
/// One of SOURCE and DESTINATION is VM:PATH, the other a path of this host; a path of this host that
/// has a colon in it begins with ./ or /. If DESTINATION is a folder that exists, what is copied goes into
/// it. Each file gets its name when it is complete. Permissions are kept, owners, links and special files
/// are not. The guest agent (bulkhead-agent) has to run in the guest.
///
/// Whatever the guest sends, nothing is written outside of DESTINATION, and not more than the limits.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Exit codes:
  0  copied
  2  there is no such machine or file, or it is a folder and -r is missing
  4  no daemon answers
  6  something could not be read or written, or the agent does not answer

Examples:
  bulkhead cp site.tar web:/srv/
  bulkhead cp -r web:/var/log ./web-logs
")]
pub(super) struct CpArgs {
    /// What to copy
    source: OsString,
    /// Where to
    destination: OsString,
    /// Copy a folder with everything in it
    #[arg(short, long)]
    recursive: bool,
    /// Most bytes to take from a guest
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64GiB")]
    max_size: u64,
    /// Most files and folders to take from a guest
    #[arg(long, value_name = "N", default_value_t = ENTRIES_MAX)]
    max_files: u64,
    /// Print what was copied as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: AgentTarget,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Guest { vm: String, path: Vec<u8> },
    Host(PathBuf),
}

fn end_of(text: &OsStr) -> Result<End, Failure> {
    let bytes = text.as_bytes();
    let colon = bytes.iter().position(|&b| b == b':');
    let slash = bytes.iter().position(|&b| b == b'/').unwrap_or(bytes.len());
    let Some(colon) = colon.filter(|&colon| colon < slash) else {
        return Ok(End::Host(text.into()));
    };
    let (vm, path) = bytes.split_at(colon);
    let path = path.strip_prefix(b":").unwrap_or(path).to_vec();
    let vm = String::from_utf8_lossy(vm).into_owned();
    if !is_name(&vm) || path.is_empty() {
        let line = format!("{}: expected VM:PATH", escaped(bytes));
        return Err(Failure::new(USAGE, line));
    }
    Ok(End::Guest { vm, path })
}

/// The last part of a path, which a copy in a folder is called by.
fn name_of(path: &Path) -> Vec<u8> {
    let name = path.file_name().map(OsStr::as_bytes);
    name.unwrap_or_default().to_vec()
}

#[derive(Debug, Serialize)]
struct Shown {
    schema_version: u32,
    files: u64,
    folders: u64,
    bytes: u64,
    skipped: u64,
}

/// Runs `cp`.
pub(super) fn run(args: &CpArgs, options: &PathOptions) -> Result<u8, Failure> {
    let recursive = args.recursive;
    let copied = match (end_of(&args.source)?, end_of(&args.destination)?) {
        (End::Host(from), End::Guest { vm, path }) => {
            // Opened first: what is not there is not worth a connection.
            let walk = Walk::new(&from, recursive).map_err(|e| tree_failure(&e, recursive))?;
            let name = name_of(&std::path::absolute(&from).unwrap_or(from));
            let work = move |wire| put(wire, walk, path, name);
            args.target.with(&vm, options, work)?
        }
        (End::Guest { vm, path }, End::Host(to)) => {
            let limits = Limits {
                entries: args.max_files,
                bytes: args.max_size,
            };
            // The name is what this user has said, not what the guest says.
            let name = name_of(Path::new(OsStr::from_bytes(&path)));
            let work = move |wire| get(wire, path, recursive, &to, &name, limits);
            args.target.with(&vm, options, work)?
        }
        _ => {
            let line = "expected a path of this host and VM:PATH";
            return Err(Failure::new(USAGE, line));
        }
    };
    if copied.skipped > 0 && !args.json {
        let line = "what is neither a file nor a folder was left out";
        notice(&format!("bulkhead: {line}: {}", copied.skipped));
    }
    if args.json {
        print_json(&Shown {
            schema_version: SCHEMA_VERSION,
            files: copied.files,
            folders: copied.folders,
            bytes: copied.bytes,
            skipped: copied.skipped,
        })?;
    }
    Ok(0)
}

fn tree_failure(error: &bulkhead_agent::tree::TreeError, recursive: bool) -> Failure {
    use bulkhead_agent::tree::TreeError;
    use bulkhead_ipc::protocol::agent::FailureKind;
    let code = match error.kind() {
        FailureKind::NotFound | FailureKind::Invalid => USAGE,
        _ => START,
    };
    let hint = match error {
        TreeError::Folder(_) if !recursive => "; -r copies it with everything in it",
        _ => "",
    };
    Failure::new(code, format!("{error}{hint}"))
}

fn failure(error: CopyError) -> Failure {
    match error {
        CopyError::Tree(error) => tree_failure(&error, true),
        error => AgentError::from(error).into(),
    }
}

fn put(mut wire: Wire, mut walk: Walk, path: Vec<u8>, name: Vec<u8>) -> Result<Copied, Failure> {
    let ask = ToAgent::Ask(Ask::Put { path, name });
    wire.send(&ask).map_err(AgentError::from)?;
    let bar = Bar::new();
    copy::send::<HostEnd>(&mut wire, &mut walk, |entry| bar.show(entry)).map_err(failure)?;
    wire.send(&ToAgent::End).map_err(AgentError::from)?;
    loop {
        match wire.receive(copy::COPY_TIMEOUT).map_err(AgentError::from)? {
            FromAgent::CopyRoom(_) => {}
            FromAgent::Copied(copied) => return Ok(copied),
            FromAgent::Failed(failure) => return Err(AgentError::Refused(failure).into()),
            _ => return Err(AgentError::Nonsense.into()),
        }
    }
}

fn get(
    mut wire: Wire,
    path: Vec<u8>,
    recursive: bool,
    to: &Path,
    name: &[u8],
    limits: Limits,
) -> Result<Copied, Failure> {
    let plant = Plant::new(to, name, limits).map_err(|e| tree_failure(&e, true))?;
    let ask = ToAgent::Ask(Ask::Get { path, recursive });
    wire.send(&ask).map_err(AgentError::from)?;
    let bar = Bar::new();
    copy::receive::<HostEnd>(&mut wire, plant, |entry| bar.show(entry)).map_err(failure)
}

/// How far a copy is, on a terminal.
struct Bar(Option<ProgressBar>);

impl Bar {
    fn new() -> Self {
        let shown = std::io::stderr().is_terminal();
        Self(shown.then(|| {
            let bar = ProgressBar::new_spinner();
            let style = ProgressStyle::with_template(
                "{spinner} {binary_bytes} ({binary_bytes_per_sec}) {wide_msg}",
            );
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        }))
    }

    fn show(&self, entry: &Entry) {
        let Some(bar) = &self.0 else { return };
        match entry {
            Entry::Data(bytes) => bar.inc(u64::try_from(bytes.len()).unwrap_or(0)),
            Entry::File { name, .. } | Entry::Folder { name, .. } => {
                bar.set_message(escaped(name).to_string());
            }
            Entry::Leave | Entry::FileEnd | Entry::Skipped { .. } => {}
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colons_before_a_slash_divide_machine_and_path() {
        let end = |text: &str| end_of(OsStr::new(text));
        let guest = |vm: &str, path: &str| End::Guest {
            vm: vm.into(),
            path: path.into(),
        };
        assert_eq!(end("web:/srv/a:b").unwrap(), guest("web", "/srv/a:b"));
        assert_eq!(end("web:x").unwrap(), guest("web", "x"));
        for host in ["./web:x", "/web:x", "a/b:c", "file"] {
            assert_eq!(end(host).unwrap(), End::Host(host.into()));
        }
        for wrong in [":x", "web:", "-x:y", "a b:c"] {
            assert!(end(wrong).is_err(), "{wrong}");
        }
    }
}
