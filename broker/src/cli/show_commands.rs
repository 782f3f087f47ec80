//! The commands about machines of a daemon that only look: `list`, `inspect`, `stats`, `logs`.

use super::client_args::ClientArgs;
use super::failure::{Failure, print, print_json, printable};
use super::machine_commands::{Names, conclude};
use super::paths::PathOptions;
use crate::api::client::{Client, Stream};
use crate::api::{Details, Stats, Summary};
use crate::escape::escaped;
use crate::vmfile::show_size;
use clap::{Args, ValueEnum};
use serde_json::Value;
use std::fmt::Write as _;

/// Options of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// One of the consoles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum ConsoleChoice {
    /// The serial port (ttyS0)
    Serial,
    /// The virtio console (hvc0)
    Virtio,
}

impl ConsoleChoice {
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Virtio => "virtio",
        }
    }
}

/// Options of `logs`.
#[derive(Debug, Args)]
pub(super) struct LogsArgs {
    /// Show what the guest has written to a console instead; bytes that are no text are escaped
    #[arg(long, value_name = "CONSOLE", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "serial")]
    console: Option<ConsoleChoice>,
    /// Go on as new events come
    #[arg(short, long, conflicts_with = "console")]
    follow: bool,
    /// Machine
    #[arg(value_name = "VM")]
    name: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Columns, each as wide as its widest cell.
pub(super) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| {
        let cells = rows.iter().filter_map(|row| row.get(n));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _infallible = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

pub(super) fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// Runs `list`.
pub(super) fn list(args: &ListArgs, options: &PathOptions) -> Result<u8, Failure> {
    let vms: Vec<Summary> = args
        .client
        .talk(options, async |client| Ok(client.get("/v1/vms").await?))?;
    if args.client.json {
        print_json(&vms)?;
        return Ok(0);
    }
    let mut rows = vec![row([
        "NAME",
        "STATE",
        "CPUS",
        "MEMORY",
        "AUTOSTART",
        "SINCE",
        "",
    ])];
    for vm in &vms {
        let (since, note) = match (&vm.started_at, &vm.last_run) {
            (Some(at), _) => (at.as_str(), ails(vm)),
            (None, Some(last)) => (last.ended_at.as_str(), last.ending.replace('_', " ")),
            (None, None) => (vm.created_at.as_str(), "never started".to_owned()),
        };
        let autostart = if vm.autostart { "yes" } else { "no" };
        let (cpus, memory) = (vm.vcpus.to_string(), show_size(vm.memory_bytes));
        let state = vm.state.word();
        rows.push(row([
            &vm.name, state, &cpus, &memory, autostart, since, &note,
        ]));
    }
    print(&table(&rows))?;
    Ok(0)
}

/// What is wrong with a machine that runs.
fn ails(vm: &Summary) -> String {
    let lost: Vec<_> = vm.degraded.iter().map(|d| printable(&d.device)).collect();
    let full: Vec<_> = vm.no_room.iter().map(|name| printable(name)).collect();
    let all = [("degraded", lost), ("no room on the host for", full)];
    let told = all.iter().filter(|(_, names)| !names.is_empty());
    let told: Vec<_> = told
        .map(|(what, names)| format!("{what}: {}", names.join(", ")))
        .collect();
    told.join("; ")
}

/// Runs `inspect`.
pub(super) fn inspect(names: &Names, options: &PathOptions) -> Result<u8, Failure> {
    let answers = names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            client.get::<Details>(&format!("/v1/vms/{name}")).await
        };
        names.each(&client, ask).await
    })?;
    conclude(names, answers, show_details)
}

fn show_details(vm: &Details) -> String {
    let about = &vm.summary;
    let mut rows = vec![
        row(["name", &about.name]),
        row(["id", &about.id]),
        row(["state", about.state.word()]),
        row(["created", &about.created_at]),
    ];
    if let Some(at) = &about.started_at {
        rows.push(row(["started", at]));
    }
    if let Some(last) = &about.last_run {
        let word = last.ending.replace('_', " ");
        let message = last.message.as_deref().map(printable).unwrap_or_default();
        let line = format!("{word} (exit code {}) {message}", last.exit_code);
        rows.push(row(["last run", line.trim_end()]));
        rows.push(row(["ended", &last.ended_at]));
    }
    if let Some(vsock) = &vm.vsock {
        let line = format!("cid {} at {}", vsock.cid, printable(&vsock.path));
        rows.push(row(["vsock", &line]));
    }
    for lost in &about.degraded {
        let line = format!("{}: {}", printable(&lost.device), printable(&lost.reason));
        rows.push(row(["degraded", &line]));
    }
    for name in &about.no_room {
        rows.push(row([
            "no room",
            &format!("on the host for {}", printable(name)),
        ]));
    }
    for denial in &vm.denials {
        let (process, said) = (printable(&denial.process), printable(&denial.said));
        let line = format!("{process} ({}): {said}", printable(&denial.name));
        rows.push(row(["denied", &line]));
    }
    let mut text = table(&rows);
    if !vm.processes.is_empty() {
        let mut rows = vec![row(["PID", "KIND", "NAME", "GENERATION", "LOCKED"])];
        for process in &vm.processes {
            let (pid, generation) = (process.pid.to_string(), process.generation.to_string());
            let locked = if process.locked { "yes" } else { "no" };
            let name = printable(&process.name);
            rows.push(row([&pid, &process.kind, &name, &generation, locked]));
        }
        text = format!("{text}\n{}", table(&rows));
    }
    let file: Vec<_> = vm.vm_file.lines().map(printable).collect();
    format!("{text}\n{}\n", file.join("\n"))
}

/// Runs `stats`.
pub(super) fn stats(names: &Names, options: &PathOptions) -> Result<u8, Failure> {
    let answers = names.client.talk(options, async |client| {
        let ask = |client: Client, name: String| async move {
            client.get::<Stats>(&format!("/v1/vms/{name}/stats")).await
        };
        names.each(&client, ask).await
    })?;
    conclude(names, answers, show_stats)
}

fn show_stats(stats: &Stats) -> String {
    let kib = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), |b| (b >> 10).to_string());
    let ms = |us: u64| (us / 1000).to_string();
    let mut rows = vec![row([
        "PID",
        "KIND",
        "NAME",
        "RESTARTS",
        "CPU ms",
        "PSS KiB",
        "READ KiB",
        "WRITTEN KiB",
    ])];
    for p in &stats.processes {
        let (pid, restarts) = (p.process.pid.to_string(), p.restarts.to_string());
        rows.push(row([
            &pid,
            &p.process.kind,
            &printable(&p.process.name),
            &restarts,
            &ms(p.cpu_time_us),
            &kib(p.pss_bytes),
            &kib(p.read_bytes),
            &kib(p.written_bytes),
        ]));
    }
    let up = stats.uptime_ms.map(|ms| format!(", up {} s", ms / 1000));
    let head = format!(
        "{}: {}{}, CPU {} ms, PSS {} KiB\n",
        stats.name,
        stats.state.word(),
        up.unwrap_or_default(),
        ms(stats.cpu_time_us),
        stats.pss_bytes >> 10
    );
    let mut text = head;
    if !stats.processes.is_empty() {
        text += &table(&rows);
    }
    if !stats.networks.is_empty() {
        let heading = [
            "NETWORK",
            "RX packets",
            "RX KiB",
            "RX dropped",
            "TX packets",
            "TX KiB",
            "TX dropped",
        ];
        let rows = stats.networks.iter().map(|net| {
            let numbers = [
                net.rx_packets,
                net.rx_bytes >> 10,
                net.rx_dropped,
                net.tx_packets,
                net.tx_bytes >> 10,
                net.tx_dropped,
            ];
            let numbers = numbers.map(|n| n.to_string());
            let [a, b, c, d, e, f] = numbers.each_ref().map(String::as_str);
            row([&printable(&net.device), a, b, c, d, e, f])
        });
        let rows: Vec<_> = std::iter::once(row(heading)).chain(rows).collect();
        text += &table(&rows);
    }
    text
}

/// Runs `logs`.
pub(super) fn logs(args: &LogsArgs, options: &PathOptions) -> Result<u8, Failure> {
    let name = escaped(&args.name);
    if !crate::vmfile::is_name(&args.name) {
        let line = format!("{name}: there is no such machine");
        return Err(Failure::new(super::failure::USAGE, line));
    }
    args.client
        .talk(options, async |client| match args.console {
            Some(console) => {
                let path = format!("/v1/vms/{}/output?console={}", args.name, console.word());
                let mut stream = client.stream(&path).await?;
                output(args, console, &mut stream).await
            }
            None => {
                let path = format!("/v1/vms/{}/events?follow={}", args.name, args.follow);
                let mut stream = client.stream(&path).await?;
                events(args.client.json, &mut stream).await
            }
        })?;
    Ok(0)
}

async fn events(json: bool, stream: &mut Stream) -> Result<(), Failure> {
    let mut rest = Vec::new();
    while let Some(bytes) = stream.next().await? {
        rest.extend_from_slice(&bytes);
        while let Some(at) = rest.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = rest.drain(..=at).collect();
            let line = String::from_utf8_lossy(&line);
            print(&match json {
                true => line.into_owned(),
                false => show_event(&line),
            })?;
        }
    }
    Ok(())
}

/// One event for people: time, event, and the rest as `key=value`.
fn show_event(line: &str) -> String {
    let Ok(Value::Object(event)) = serde_json::from_str::<Value>(line) else {
        return printable(line.trim_end()) + "\n";
    };
    let text = |key: &str| event.get(key).and_then(Value::as_str).unwrap_or("-");
    let mut out = format!("{} {}", printable(text("time")), printable(text("event")));
    let told = ["schema_version", "number", "time", "vm", "event"];
    for (key, value) in event
        .iter()
        .filter(|(key, _)| !told.contains(&key.as_str()))
    {
        let value = match value {
            Value::Null => continue,
            Value::String(text) if !text.contains(' ') => text.clone(),
            other => other.to_string(),
        };
        let _infallible = write!(out, " {}={}", printable(key), printable(&value));
    }
    out + "\n"
}

#[derive(serde::Serialize)]
struct Output<'a> {
    schema_version: u32,
    name: &'a str,
    console: &'static str,
    /// Lines as they would be shown.
    text: String,
}

/// The guest's output, a line at a time, with everything that is no plain text escaped.
async fn output(
    args: &LogsArgs,
    console: ConsoleChoice,
    stream: &mut Stream,
) -> Result<(), Failure> {
    let mut bytes = Vec::new();
    while let Some(piece) = stream.next().await? {
        bytes.extend_from_slice(&piece);
    }
    let text = lines_of(&bytes);
    match args.client.json {
        false => print(&text),
        true => print_json(&Output {
            schema_version: super::SCHEMA_VERSION,
            name: &args.name,
            console: console.word(),
            text,
        }),
    }
}

/// Escapes everything but line ends and tabs. A line that is still on its way has no end yet.
fn lines_of(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.split_inclusive(|&b| b == b'\n') {
        let whole = line.strip_suffix(b"\n");
        let line = whole.unwrap_or(line);
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut cells = line.split(|&b| b == b'\t');
        if let Some(first) = cells.next() {
            let _infallible = write!(text, "{}", escaped(first));
        }
        for cell in cells {
            let _infallible = write!(text, "\t{}", escaped(cell));
        }
        if whole.is_some() {
            text.push('\n');
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_of_the_guest_is_text_and_nothing_else() {
        let shown = lines_of(b"a\tb\r\n\x1b[2Jx\xff\n\nlast");
        assert_eq!(shown, "a\tb\n\\x1b[2Jx\\xff\n\nlast");
        assert_eq!(lines_of(b"a\n"), "a\n");
        assert_eq!(lines_of(b""), "");
    }

    #[test]
    fn events_are_shown_on_one_line_without_control_characters() {
        let line = r#"{"schema_version":1,"number":3,"time":"T","vm":"v","event":"device_lost","reason":"it \u001b[2J died","pid":7,"message":null}"#;
        assert_eq!(
            show_event(line),
            "T device_lost pid=7 reason=\"it \\u001b[2J died\"\n"
        );
        assert_eq!(show_event("x\x1b"), "x\\x1b\n");
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [row(["A", "B"]), row(["long", "x"])];
        assert_eq!(table(&rows), "A     B\nlong  x\n");
    }
}
