//! `agent ping|stats|freeze|thaw|reidentify|poweroff|reboot`: what a guest's agent does for its host.

use super::SCHEMA_VERSION;
use super::agent_target::AgentTarget;
use super::failure::{Failure, START, USAGE, print, print_json};
use super::paths::PathOptions;
use crate::agent::{ANSWER_TIMEOUT, AgentError, SLOW_TIMEOUT, ask};
use crate::escape::escaped;
use crate::vmfile::{parse_duration, show_size};
use bulkhead_ipc::protocol::agent::{
    Ask, FREEZE_MS_MAX, FromAgent, Frozen, Mac, Outcome, Power, Reidentify, Stats, Step, What,
};
use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::time::Duration;

/// Bytes of randomness for a guest that is made another one.
const SEED_BYTES: usize = 64;

/// What to ask.
#[derive(Debug, Subcommand)]
pub(super) enum AgentCommand {
    /// Ask whether the agent answers
    #[command(after_long_help = "\
Examples:
  bulkhead agent ping web
")]
    Ping(Plain),
    /// Show memory, load, file systems, addresses and logins of a guest, as its agent tells them
    #[command(after_long_help = "\
Examples:
  bulkhead agent stats web --json
")]
    Stats(Plain),
    /// Freeze the file systems of a guest's disks, so that what is on the disks fits together
    ///
    /// Whoever writes in the guest waits until thaw, or until the time is over: they thaw by themselves then, and
    /// when the agent ends.
    #[command(after_long_help = "\
Exit codes:
  0  frozen
  2  there is no such machine
  4  no daemon answers, or no file system can be frozen
  6  they are frozen already, or the agent does not answer

Examples:
  bulkhead agent freeze web --timeout 30s
")]
    Freeze(FreezeArgs),
    /// Thaw what freeze has frozen
    #[command(after_long_help = "\
Examples:
  bulkhead agent thaw web
")]
    Thaw(Plain),
    /// Make a guest another one than that which its disks or its memory were copied from
    ///
    /// Only what is asked for is done; each step is reported, and may fail by itself.
    #[command(after_long_help = "\
Exit codes:
  0  every step was done, or there was nothing to do it to
  2  there is no such machine
  4  no daemon answers
  6  a step has failed, or the agent does not answer

Examples:
  bulkhead agent reidentify web2 --fresh --hostname web2
  bulkhead agent reidentify web2 --mac eth0=52:54:00:12:34:56
")]
    Reidentify(ReidentifyArgs),
    /// Have a guest shut down and power off
    #[command(after_long_help = "\
Whether the machine starts again is up to lifecycle.on_poweroff, as if the guest had done it by itself.

Examples:
  bulkhead agent poweroff web
")]
    Poweroff(PowerArgs),
    /// Have a guest shut down and start again
    #[command(after_long_help = "\
Examples:
  bulkhead agent reboot web
")]
    Reboot(PowerArgs),
}

/// A machine, and how to print.
#[derive(Debug, Args)]
pub(super) struct Plain {
    /// Machine
    #[arg(value_name = "VM")]
    name: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    target: AgentTarget,
}

/// Options of `agent freeze`.
#[derive(Debug, Args)]
pub(super) struct FreezeArgs {
    /// Time after which they thaw by themselves, at most 10m
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "60s")]
    timeout: Duration,
    #[command(flatten)]
    plain: Plain,
}

/// Options of `agent poweroff` and `agent reboot`.
#[derive(Debug, Args)]
pub(super) struct PowerArgs {
    /// Do not ask the guest's programs to end; what is in memory is written
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    plain: Plain,
}

/// Options of `agent reidentify`.
#[derive(Debug, Args)]
pub(super) struct ReidentifyArgs {
    /// A new machine id, new SSH host keys, and randomness of this host
    #[arg(long)]
    fresh: bool,
    /// Host name
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// Machine id: 32 hexadecimal digits
    #[arg(long, value_name = "ID", value_parser = machine_id)]
    machine_id: Option<String>,
    /// Make SSH host keys anew
    #[arg(long)]
    ssh_host_keys: bool,
    /// Give the guest randomness of this host
    #[arg(long)]
    seed: bool,
    /// Hardware address of a network interface
    #[arg(long, value_name = "INTERFACE=MAC", value_parser = mac)]
    mac: Option<Mac>,
    #[command(flatten)]
    plain: Plain,
}

fn machine_id(text: &str) -> Result<String, String> {
    let hex = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
    hex.then(|| text.to_ascii_lowercase())
        .ok_or_else(|| "expected 32 hexadecimal digits".to_owned())
}

fn mac(text: &str) -> Result<Mac, String> {
    let wrong = || "expected INTERFACE=aa:bb:cc:dd:ee:ff".to_owned();
    let (interface, address) = text.split_once('=').ok_or_else(wrong)?;
    let byte = |text: &str| match text.len() {
        2 => u8::from_str_radix(text, 16).ok(),
        _ => None,
    };
    let bytes: Option<Vec<u8>> = address.split(':').map(byte).collect();
    let address = bytes.and_then(|bytes| <[u8; 6]>::try_from(bytes).ok());
    Ok(Mac {
        interface: interface.to_owned(),
        address: address.ok_or_else(wrong)?,
    })
}

/// Runs `agent`.
pub(super) fn run(command: &AgentCommand, options: &PathOptions) -> Result<u8, Failure> {
    match command {
        AgentCommand::Ping(plain) => {
            let FromAgent::Pong { agent, boot_id } = answer(plain, options, Ask::Ping)? else {
                return Err(AgentError::Nonsense.into());
            };
            let shown = json!({ "agent": agent, "boot_id": boot_id });
            let (agent, boot_id) = (escaped(&agent), escaped(&boot_id));
            say(plain, shown, &format!("agent {agent}, boot {boot_id}\n"))?;
        }
        AgentCommand::Stats(plain) => {
            let FromAgent::Stats(stats) = answer(plain, options, Ask::Stats)? else {
                return Err(AgentError::Nonsense.into());
            };
            say(plain, stats_json(&stats), &stats_text(&stats))?;
        }
        AgentCommand::Freeze(args) => freeze(args, options)?,
        AgentCommand::Thaw(plain) => {
            let FromAgent::Thawed(count) = answer(plain, options, Ask::Thaw)? else {
                return Err(AgentError::Nonsense.into());
            };
            let text = match count {
                0 => "nothing was frozen any more\n".to_owned(),
                n => format!("file systems thawed: {n}\n"),
            };
            say(plain, json!({ "thawed": count }), &text)?;
        }
        AgentCommand::Reidentify(args) => return reidentify(args, options),
        AgentCommand::Poweroff(args) => power(args, Power::Off, options)?,
        AgentCommand::Reboot(args) => power(args, Power::Reboot, options)?,
    }
    Ok(0)
}

fn answer(plain: &Plain, options: &PathOptions, question: Ask) -> Result<FromAgent, Failure> {
    let within = match question {
        Ask::Freeze { .. } | Ask::Thaw | Ask::Reidentify(_) => SLOW_TIMEOUT,
        _ => ANSWER_TIMEOUT,
    };
    let work = move |mut wire| Ok(ask(&mut wire, question, within)?);
    plain.target.with(&plain.name, options, work)
}

fn say(plain: &Plain, value: Value, text: &str) -> Result<(), Failure> {
    #[derive(Serialize)]
    struct Shown<'a> {
        schema_version: u32,
        name: &'a str,
        #[serde(flatten)]
        value: Value,
    }
    if plain.json {
        return print_json(&Shown {
            schema_version: SCHEMA_VERSION,
            name: &plain.name,
            value,
        });
    }
    print(text)
}

fn freeze(args: &FreezeArgs, options: &PathOptions) -> Result<(), Failure> {
    let timeout = u32::try_from(args.timeout.as_millis()).ok();
    let timeout = timeout.filter(|ms| (1..=FREEZE_MS_MAX).contains(ms));
    let timeout_ms = timeout.ok_or_else(|| {
        let line = format!("--timeout {:?}: expected 1ms to 10m", args.timeout);
        Failure::new(USAGE, line)
    })?;
    let question = Ask::Freeze { timeout_ms };
    let FromAgent::Frozen(frozen) = answer(&args.plain, options, question)? else {
        return Err(AgentError::Nonsense.into());
    };
    let one = |one: &Frozen| json!({ "mount_point": one.mount_point, "refused": one.refused });
    let value: Vec<_> = frozen.iter().map(one).collect();
    let value = json!({ "file_systems": value, "timeout_ms": timeout_ms });
    let mut text = String::new();
    for one in &frozen {
        let mount_point = escaped(&one.mount_point);
        let _written = match &one.refused {
            None => writeln!(text, "{mount_point}: frozen"),
            Some(why) => writeln!(text, "{mount_point}: not frozen: {}", escaped(why)),
        };
    }
    say(&args.plain, value, &text)
}

fn power(args: &PowerArgs, how: Power, options: &PathOptions) -> Result<(), Failure> {
    let force = args.force;
    let question = Ask::Power { how, force };
    let FromAgent::Done = answer(&args.plain, options, question)? else {
        return Err(AgentError::Nonsense.into());
    };
    say(&args.plain, json!({ "begun": true }), "")
}

fn random<const N: usize>() -> Result<[u8; N], Failure> {
    crate::random::bytes().map_err(|error| Failure::because(START, "/dev/urandom", &error))
}

fn reidentify(args: &ReidentifyArgs, options: &PathOptions) -> Result<u8, Failure> {
    let mut wish = Reidentify {
        machine_id: args.machine_id.clone(),
        hostname: args.hostname.clone(),
        ssh_host_keys: args.ssh_host_keys || args.fresh,
        mac: args.mac.clone(),
        seed: None,
    };
    if args.fresh && wish.machine_id.is_none() {
        let bytes: [u8; 16] = random()?;
        let mut id = String::new();
        for byte in bytes {
            let _written = write!(id, "{byte:02x}");
        }
        wish.machine_id = Some(id);
    }
    if args.seed || args.fresh {
        wish.seed = Some(random::<SEED_BYTES>()?.to_vec());
    }
    if wish == Reidentify::default() {
        let line = "expected what to change: --fresh, --hostname, --machine-id, --ssh-host-keys, \
                    --seed or --mac";
        return Err(Failure::new(USAGE, line));
    }
    let question = Ask::Reidentify(wish);
    let FromAgent::Reidentified(steps) = answer(&args.plain, options, question)? else {
        return Err(AgentError::Nonsense.into());
    };
    let value: Vec<_> = steps.iter().map(step_json).collect();
    let mut text = String::new();
    for step in &steps {
        let _written = match &step.outcome {
            Outcome::Done => writeln!(text, "{}: done", word(step.what)),
            Outcome::Skipped(why) => writeln!(text, "{}: {}", word(step.what), escaped(why)),
            Outcome::Failed(why) => {
                writeln!(text, "{}: failed: {}", word(step.what), escaped(why))
            }
        };
    }
    say(&args.plain, json!({ "steps": value }), &text)?;
    let failed = |step: &Step| matches!(step.outcome, Outcome::Failed(_));
    Ok(if steps.iter().any(failed) { START } else { 0 })
}

const fn word(what: What) -> &'static str {
    match what {
        What::Seed => "seed",
        What::MachineId => "machine_id",
        What::Hostname => "hostname",
        What::SshHostKeys => "ssh_host_keys",
        What::Mac => "mac",
    }
}

fn step_json(step: &Step) -> Value {
    let (outcome, reason) = match &step.outcome {
        Outcome::Done => ("done", None),
        Outcome::Skipped(why) => ("skipped", Some(why)),
        Outcome::Failed(why) => ("failed", Some(why)),
    };
    json!({ "step": word(step.what), "outcome": outcome, "reason": reason })
}

fn stats_json(stats: &Stats) -> Value {
    let load = stats.load_hundredths.map(|load| f64::from(load) / 100.0);
    let file_systems = stats.file_systems.iter().map(|one| {
        json!({
            "mount_point": one.mount_point,
            "source": one.source,
            "type": one.kind,
            "bytes": one.bytes,
            "available_bytes": one.available_bytes,
        })
    });
    let file_systems = file_systems.collect::<Vec<_>>();
    json!({
        "hostname": stats.hostname,
        "kernel": stats.kernel,
        "uptime_ms": stats.uptime_ms,
        "load": load,
        "memory_bytes": stats.memory_bytes,
        "available_bytes": stats.available_bytes,
        "swap_bytes": stats.swap_bytes,
        "swap_free_bytes": stats.swap_free_bytes,
        "file_systems": file_systems,
        "addresses": stats.addresses.iter().map(|one| {
            json!({ "interface": one.interface, "address": one.address })
        }).collect::<Vec<_>>(),
        "users": stats.users.iter().map(|one| {
            json!({ "name": one.name, "terminal": one.terminal, "since_s": one.since_s })
        }).collect::<Vec<_>>(),
    })
}

fn stats_text(stats: &Stats) -> String {
    let mut text = String::new();
    let mut line = |key: &str, value: String| {
        let _written = writeln!(text, "{key:<12} {value}");
    };
    line("host name", escaped(&stats.hostname).to_string());
    line("kernel", escaped(&stats.kernel).to_string());
    line("up", format!("{} s", stats.uptime_ms / 1000));
    let load = stats
        .load_hundredths
        .map(|n| format!("{}.{:02}", n / 100, n % 100));
    line("load", load.join(" "));
    let mib = |bytes: u64| format!("{} MiB", bytes >> 20);
    let (all, free) = (mib(stats.memory_bytes), mib(stats.available_bytes));
    line("memory", format!("{all}, {free} available"));
    if stats.swap_bytes > 0 {
        let (all, free) = (mib(stats.swap_bytes), mib(stats.swap_free_bytes));
        line("swap", format!("{all}, {free} free"));
    }
    for one in &stats.file_systems {
        let (point, kind) = (escaped(&one.mount_point), escaped(&one.kind));
        let free = mib(one.available_bytes);
        let size = show_size(one.bytes);
        line(
            "file system",
            format!("{point} ({kind}) {size}, {free} available"),
        );
    }
    for one in &stats.addresses {
        let (interface, address) = (escaped(&one.interface), escaped(&one.address));
        line("address", format!("{interface} {address}"));
    }
    for one in &stats.users {
        line(
            "login",
            format!("{} at {}", escaped(&one.name), escaped(&one.terminal)),
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_ids_are_checked_before_a_guest_hears_of_them() {
        let good = mac("eth0=52:54:00:aB:01:ff").unwrap();
        assert_eq!(good.address, [0x52, 0x54, 0, 0xab, 1, 0xff]);
        for wrong in [
            "eth0",
            "eth0=1:2:3",
            "eth0=52:54:00:12:34:5g",
            "e=52:54:00:12:34:56:78",
        ] {
            assert!(mac(wrong).is_err(), "{wrong}");
        }
        assert_eq!(machine_id(&"A".repeat(32)).unwrap(), "a".repeat(32));
        assert!(machine_id("abc").is_err());
    }

    #[test]
    fn what_a_guest_says_of_itself_cannot_control_a_terminal() {
        let stats = Stats {
            hostname: "\x1b]0;evil\x07".to_owned(),
            ..Stats::default()
        };
        let text = stats_text(&stats);
        assert!(text.contains("\\x1b]0;evil\\x07"), "{text}");
        assert!(!text.chars().any(|c| c.is_control() && c != '\n'));
    }
}
