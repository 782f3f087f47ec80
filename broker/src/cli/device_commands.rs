//! `device list`, `device restart`, `device upgrade`, `device limit`, `device link`, `device resize`,
//! `device medium`.

use super::client_args::ClientArgs;
use super::failure::{Failure, printable};
use super::machine_commands::{Names, side_by_side, tell};
use super::paths::PathOptions;
use super::show_commands::{row, table};
use crate::api::client::{Client, ClientError};
use crate::api::{
    BackingFile, ChangeMedium, Device, DeviceChanged, Devices, LimitDevice, Limited, LinkDevice,
    Linked, ResizeDevice,
};
use crate::vmfile::{is_name, parse_format, parse_size, show_size};
use bulkhead_ipc::protocol::birth::ImageFormat;
use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use std::path::PathBuf;

/// What to do with devices.
#[derive(Debug, Subcommand)]
pub(super) enum DeviceCommand {
    /// List the devices of machines and the processes that serve them
    ///
    /// For each device: its name and kind, the pid and generation of its process, whether it is served,
    /// the version of the process's program, and how often another process has taken over since the
    /// machine was started. A device that is lost answers its guest with errors until it is
    /// restarted; one that is restarting lets its guest wait.
    #[command(after_long_help = LIST_EXAMPLES)]
    List(Names),
    /// Have devices served by other processes; their guests see a delay
    ///
    /// The process that serves the device finishes what it is doing and goes, and another one takes its
    /// place with the same program. A device that is lost because its processes died too often gets
    /// another one, and starts with a clean record.
    #[command(after_long_help = RESTART_EXAMPLES)]
    Restart(RestartArgs),
    /// Have devices served by the programs that are on disk now; their guests see a delay
    ///
    /// As restart, with the program in the directory of process binaries. A device that is served by
    /// that very file already is left alone. A program that does not come to serve is given up: the
    /// one before it is started again, and the command fails and says so. Without a device, all
    /// devices of a machine are upgraded, one after the other. bulkhead-vcpu and the broker stay as they are.
    #[command(after_long_help = UPGRADE_EXAMPLES)]
    Upgrade(UpgradeArgs),
    /// Change what disks and network devices may do in a second, at once and until their machines end
    ///
    /// A device that has done so much waits; nothing fails. For a network device the limits hold for each
    /// direction by itself. What is not given is not limited, so that no option at
    /// all takes every limit away. A VM file says what holds from the start: limits of [[disk]] and [[net]].
    #[command(after_long_help = LIMIT_EXAMPLES)]
    Limit(LimitArgs),
    /// Grow a disk while its machine runs
    ///
    /// The image is grown, and the guest is told that its disk is larger: Linux says so in its log, and file systems
    /// on it can be grown then. For raw and qcow2 images, and for block devices that have grown. A disk is
    /// never made smaller while its machine runs.
    #[command(after_long_help = RESIZE_EXAMPLES)]
    Resize(ResizeArgs),
    /// Change the medium of a disk while its machine runs
    ///
    /// The guest sees a disk with another size and other contents, as if it had been pulled out and another one
    /// put in its place: unmount what is on it first. This holds until the machine ends; the VM file stays as it is.
    /// A medium that cannot be served is taken back.
    #[command(after_long_help = MEDIUM_EXAMPLES)]
    Medium(MediumArgs),
    /// Plug the cable of network devices in, or pull it out, until their machines end
    ///
    /// The guest sees it at once. What it sends while the cable is out is lost, and so is what is sent to it.
    #[command(after_long_help = LINK_EXAMPLES)]
    Link(LinkArgs),
}

const RESIZE_EXAMPLES: &str = "\
Exit codes:
  0  the disk has that size, or a qcow2 image a larger one
  2  there is no such machine or disk
  6  a machine does not run, or the disk cannot be grown, or a raw one is larger

Examples:
  bulkhead device resize web/disk0 20GiB
";

const MEDIUM_EXAMPLES: &str = "\
Exit codes:
  0  the disk is made of these files
  2  there is no such machine or disk
  6  a machine does not run, or the files cannot be had or served; the disk is what it was

Examples:
  bulkhead device medium web/cd0 second.img
  bulkhead device medium web/disk1 data.qcow2 --format qcow2 --backing base.img:raw
";

const LIST_EXAMPLES: &str = "\
Examples:
  bulkhead device list web
  bulkhead device list web db --json
";

const RESTART_EXAMPLES: &str = "\
Exit codes:
  0  all are served by another process
  2  there is no such machine or device
  6  a machine does not run, or a device could not be served again

Examples:
  bulkhead device restart web/disk0
  bulkhead device restart web/console web/rng
";

const UPGRADE_EXAMPLES: &str = "\
Exit codes:
  0  all are served by the programs that are on disk
  2  there is no such machine or device
  6  a machine does not run, or a program does not serve and the one before it was taken again

Examples:
  bulkhead device upgrade web
        upgrades all devices of a machine
  bulkhead device upgrade web/disk0 --json
        tells version and program of the process before and of the one now
";

const LIMIT_EXAMPLES: &str = "\
Exit codes:
  0  the limits hold
  2  there is no such machine or disk
  6  a machine does not run

Examples:
  bulkhead device limit web/disk0 --bytes-per-s 100MiB --requests-per-s 2000
  bulkhead device limit web/disk0
        no limit any more
";

const LINK_EXAMPLES: &str = "\
Exit codes:
  0  the cables are as wanted
  2  there is no such machine or network device
  6  a machine does not run

Examples:
  bulkhead device link web/net0 down
  bulkhead device link web/net0 up
";

/// A device of a machine, or all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    vm: String,
    device: Option<String>,
}

fn target(text: &str) -> Result<Target, String> {
    let (vm, device) = match text.split_once('/') {
        Some((vm, device)) => (vm, Some(device)),
        None => (text, None),
    };
    if !is_name(vm) || !device.is_none_or(is_name) {
        return Err("expected VM/DEVICE".to_owned());
    }
    Ok(Target {
        vm: vm.to_owned(),
        device: device.map(str::to_owned),
    })
}

fn one_device(text: &str) -> Result<Target, String> {
    target(text).and_then(|target| match &target.device {
        Some(_) => Ok(target),
        None => Err(format!("expected VM/DEVICE, such as {text}/disk0")),
    })
}

/// Options of `device restart`.
#[derive(Debug, Args)]
pub(super) struct RestartArgs {
    /// Device
    #[arg(value_name = "VM/DEVICE", required = true, value_parser = one_device)]
    targets: Vec<Target>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `device upgrade`.
#[derive(Debug, Args)]
pub(super) struct UpgradeArgs {
    /// Device, or a machine for all of its devices
    #[arg(value_name = "VM[/DEVICE]", required = true, value_parser = target)]
    targets: Vec<Target>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `device limit`.
#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// Disk or network device
    #[arg(value_name = "VM/DEVICE", required = true, value_parser = one_device)]
    targets: Vec<Target>,
    /// Bytes read and written, sent or received a second, such as 100MiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bytes_per_s: Option<u64>,
    /// Bytes at once after a time of rest [default: those of a second]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "bytes_per_s")]
    bytes_burst: Option<u64>,
    /// Requests a second; packets of a network device
    #[arg(long, alias = "packets-per-s", value_name = "N")]
    requests_per_s: Option<u64>,
    /// Requests at once after a time of rest [default: those of a second]
    #[arg(
        long,
        alias = "packets-burst",
        value_name = "N",
        requires = "requests_per_s"
    )]
    requests_burst: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `device resize`.
#[derive(Debug, Args)]
pub(super) struct ResizeArgs {
    /// Disk
    #[arg(value_name = "VM/DEVICE", value_parser = one_device)]
    target: Target,
    /// What it is to grow to, such as 20GiB
    #[arg(value_name = "SIZE", value_parser = parse_size)]
    bytes: u64,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `device link`.
#[derive(Debug, Args)]
pub(super) struct LinkArgs {
    /// Network device
    #[arg(value_name = "VM/DEVICE", value_parser = one_device)]
    target: Target,
    /// Whether the cable is plugged in
    state: LinkState,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `device medium`.
#[derive(Debug, Args)]
pub(super) struct MediumArgs {
    /// Disk
    #[arg(value_name = "VM/DEVICE", value_parser = one_device)]
    target: Target,
    /// Image file or block device
    #[arg(value_name = "PATH", value_parser = absolute)]
    path: PathBuf,
    /// Its format: raw, qcow2 or vmdk
    #[arg(long, default_value = "raw", value_parser = parse_format)]
    format: ImageFormat,
    /// Image below it, the next one first
    #[arg(long, value_name = "PATH:FORMAT", value_parser = backing)]
    backing: Vec<BackingFile>,
    /// File with data of a VMDK image, in the order of its descriptor
    #[arg(long, value_name = "PATH", value_parser = absolute)]
    extent: Vec<PathBuf>,
    #[command(flatten)]
    client: ClientArgs,
}

fn absolute(path: &str) -> Result<PathBuf, String> {
    std::path::absolute(path).map_err(|error| error.to_string())
}

fn backing(text: &str) -> Result<BackingFile, String> {
    let (path, format) = text.rsplit_once(':').ok_or("expected PATH:FORMAT")?;
    Ok(BackingFile {
        path: absolute(path)?,
        format: parse_format(format)?,
    })
}

fn resize(args: &ResizeArgs, options: &PathOptions) -> Result<u8, Failure> {
    let wish = ResizeDevice { bytes: args.bytes };
    another_disk("resize", &args.target, &wish, &args.client, options)
}

fn medium(args: &MediumArgs, options: &PathOptions) -> Result<u8, Failure> {
    let wish = ChangeMedium {
        path: args.path.clone(),
        format: args.format,
        backing: args.backing.clone(),
        extents: args.extent.clone(),
    };
    another_disk("medium", &args.target, &wish, &args.client, options)
}

fn another_disk(
    verb: &str,
    target: &Target,
    wish: &(impl Serialize + Sync),
    client: &ClientArgs,
    options: &PathOptions,
) -> Result<u8, Failure> {
    let answer = client.talk(options, async |client| {
        let device = target.device.as_deref().unwrap_or_default();
        let path = format!("/v1/vms/{}/devices/{device}/{verb}", target.vm);
        Ok(client.post::<DeviceChanged>(&path, Some(wish)).await)
    })?;
    tell(client.json.then_some(true), vec![answer], |changed| {
        changed.iter().map(show_change).collect()
    })
}

/// Whether a cable is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum LinkState {
    /// It is
    Up,
    /// It is not
    Down,
}

fn link(args: &LinkArgs, options: &PathOptions) -> Result<u8, Failure> {
    let wish = LinkDevice {
        up: args.state == LinkState::Up,
    };
    let targets = [args.target.clone()];
    let answers = args.client.talk(options, async |client| {
        let ask = |target: Target| {
            let client = client.clone();
            async move {
                let device = target.device.unwrap_or_default();
                let path = format!("/v1/vms/{}/devices/{device}/link", target.vm);
                client.post::<Linked>(&path, Some(&wish)).await
            }
        };
        Ok(side_by_side(&targets, ask).await)
    })?;
    tell(args.client.json.then_some(true), answers, |linked| {
        let show = |linked: &Linked| {
            let state = if linked.up { "up" } else { "down" };
            format!(
                "{}/{}: link {state}\n",
                linked.name,
                printable(&linked.device)
            )
        };
        linked.iter().map(show).collect()
    })
}

fn limit(args: &LimitArgs, options: &PathOptions) -> Result<u8, Failure> {
    let wish = LimitDevice {
        bytes_per_s: args.bytes_per_s,
        bytes_burst: args.bytes_burst,
        requests_per_s: args.requests_per_s,
        requests_burst: args.requests_burst,
    };
    let answers = args.client.talk(options, async |client| {
        let ask = |target: Target| {
            let client = client.clone();
            async move {
                let device = target.device.unwrap_or_default();
                let path = format!("/v1/vms/{}/devices/{device}/limit", target.vm);
                client.post::<Limited>(&path, Some(&wish)).await
            }
        };
        Ok(side_by_side(&args.targets, ask).await)
    })?;
    let single = matches!(args.targets.as_slice(), [_]);
    tell(args.client.json.then_some(single), answers, |limited| {
        limited.iter().map(show_limits).collect()
    })
}

fn show_limits(limited: &Limited) -> String {
    let limits = &limited.limits;
    let size = |bytes: Option<u64>| bytes.map(show_size);
    let number = |n: Option<u64>| n.map(|n| n.to_string());
    let rate = |what: &str, per_s: Option<String>, burst: Option<String>| {
        let (per_s, burst) = per_s.zip(burst)?;
        Some(format!("{per_s} {what} a second ({burst} at once)"))
    };
    let said = [
        rate(
            "read and written",
            size(limits.bytes_per_s),
            size(limits.bytes_burst),
        ),
        rate(
            "requests",
            number(limits.requests_per_s),
            number(limits.requests_burst),
        ),
    ];
    let said: Vec<_> = said.into_iter().flatten().collect();
    let said = match said.is_empty() {
        true => "no limit".to_owned(),
        false => said.join(", "),
    };
    format!("{}/{}: {said}\n", limited.name, printable(&limited.device))
}

/// Runs `device`.
pub(super) fn run(command: &DeviceCommand, options: &PathOptions) -> Result<u8, Failure> {
    match command {
        DeviceCommand::List(names) => list(names, options),
        DeviceCommand::Restart(args) => change("restart", &args.targets, &args.client, options),
        DeviceCommand::Upgrade(args) => change("upgrade", &args.targets, &args.client, options),
        DeviceCommand::Limit(args) => limit(args, options),
        DeviceCommand::Resize(args) => resize(args, options),
        DeviceCommand::Medium(args) => medium(args, options),
        DeviceCommand::Link(args) => link(args, options),
    }
}

async fn devices(client: Client, vm: String) -> Result<Devices, ClientError> {
    client.get(&format!("/v1/vms/{vm}/devices")).await
}

fn list(names: &Names, options: &PathOptions) -> Result<u8, Failure> {
    let answers = names
        .client
        .talk(options, async |client| names.each(&client, devices).await)?;
    tell(names.json(), answers, show_devices)
}

fn show_devices(machines: &[Devices]) -> String {
    let heading = [
        "VM",
        "DEVICE",
        "KIND",
        "PID",
        "GENERATION",
        "STATE",
        "VERSION",
        "RESTARTS",
    ];
    let mut rows = vec![row(heading)];
    for machine in machines {
        for device in &machine.devices {
            let pid = device.pid.map_or("-".to_owned(), |pid| pid.to_string());
            rows.push(row([
                &machine.name,
                &printable(&device.name),
                &device.kind,
                &pid,
                &device.generation.to_string(),
                device.state.word(),
                &version(device),
                &device.restarts.to_string(),
            ]));
        }
    }
    table(&rows)
}

fn version(device: &Device) -> String {
    let version = device.version.as_deref();
    version.map_or("-".to_owned(), printable)
}

/// Has devices served by other processes.
fn change(
    verb: &'static str,
    targets: &[Target],
    client: &ClientArgs,
    options: &PathOptions,
) -> Result<u8, Failure> {
    let (answers, single) = client.talk(options, async |client| {
        let single = matches!(targets, [one] if one.device.is_some());
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for target in targets {
            match each_device(&client, target).await {
                Ok(devices) => found.extend(devices),
                Err(error) => missing.push(Err(error)),
            }
        }
        let ask = |(vm, device): (String, String)| {
            let client = client.clone();
            async move {
                let path = format!("/v1/vms/{vm}/devices/{device}/{verb}");
                client.post::<DeviceChanged>(&path, None::<&()>).await
            }
        };
        let mut answers = side_by_side(&found, ask).await;
        answers.extend(missing);
        Ok((answers, single))
    })?;
    tell(client.json.then_some(single), answers, |changed| {
        changed.iter().map(show_change).collect()
    })
}

/// The devices that a target names.
async fn each_device(
    client: &Client,
    target: &Target,
) -> Result<Vec<(String, String)>, ClientError> {
    let vm = &target.vm;
    if let Some(device) = &target.device {
        return Ok(vec![(vm.clone(), device.clone())]);
    }
    let known = devices(client.clone(), vm.clone()).await?;
    if known.devices.is_empty() {
        let line = format!("{vm} does not run, so it has no devices");
        let error = crate::api::ApiError::new(crate::api::Code::Conflict, line);
        return Err(error.into());
    }
    let names = known.devices.into_iter().map(|device| device.name);
    Ok(names.map(|name| (vm.clone(), name)).collect())
}

fn show_change(changed: &DeviceChanged) -> String {
    let (old, new) = (&changed.old, &changed.new);
    let name = format!("{}/{}", changed.name, printable(&new.name));
    if !changed.changed {
        let version = version(new);
        return format!("{name}: is served by the program on disk already (version {version})\n");
    }
    let pid = |device: &Device| device.pid.map_or("none".to_owned(), |pid| pid.to_string());
    format!(
        "{name}: process {} (generation {}, version {}) now, {} (generation {}, version {}) before\n",
        pid(new),
        new.generation,
        version(new),
        pid(old),
        old.generation,
        version(old),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_a_machine_and_a_device_of_it() {
        let web = |device: Option<&str>| Target {
            vm: "web".to_owned(),
            device: device.map(str::to_owned),
        };
        assert_eq!(target("web"), Ok(web(None)));
        assert_eq!(target("web/disk0"), Ok(web(Some("disk0"))));
        assert_eq!(one_device("web/disk0"), Ok(web(Some("disk0"))));
        for wrong in ["", "/", "web/", "/disk0", "web/a/b", "web/../x", "a b"] {
            assert!(target(wrong).is_err(), "{wrong}");
            assert!(one_device(wrong).is_err(), "{wrong}");
        }
        assert!(one_device("web").unwrap_err().contains("web/disk0"));
    }
}
