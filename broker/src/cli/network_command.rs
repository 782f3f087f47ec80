//! `bulkhead network`: virtual networks of the daemon.

use super::client_args::{ClientArgs, HostArgs};
use super::failure::{Failure, START, USAGE, print, print_json, printable};
use super::paths::PathOptions;
use super::show_commands::{row, table};
use crate::api::client::{Client, ClientError};
use crate::api::{Changed, Code, NetworkCounters, NetworkDetails, NetworkPort, NetworkSummary};
use crate::network::spec::{
    LEASE_S_DEFAULT, MTU_DEFAULT, NetworkSpec, PortLimits, SUBNET_DEFAULT, SubnetSpec, UplinkSpec,
};
use crate::vm::spec::{NETWORK_NAME_RULE, is_network_name};
use crate::vmfile::{parse_duration, parse_size, show_size};
use bulkhead_ipc::protocol::birth::Rate;
use clap::{Args, Subcommand};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

/// What is done with networks.
#[derive(Debug, Subcommand)]
pub(super) enum NetworkCommand {
    Create(Box<CreateArgs>),
    /// List networks
    List(ListArgs),
    /// Show a network: its cards, what they have carried, its leases and uplinks
    Show(ShowArgs),
    /// Remove networks that no machine is in
    Rm(RemoveArgs),
    Capture(CaptureArgs),
}

/// Make a network
///
/// Machines are plugged in with `--net network=NAME`, or `network = "NAME"` in `[[net]]` of the VM file. The network's
/// switch leases addresses (DHCP), knows the machines' names (DNS), holds each machine to its addresses, and routes
/// nothing: ways out are uplinks. A network that is there already and is the same is left alone.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  bulkhead network create lab
        machines in it find each other as web.lab.internal, and nobody else
  bulkhead network create lan --no-subnet --uplink bridge=br0
        machines in it are in the host's network behind br0
")]
pub(super) struct CreateArgs {
    /// Name of the network
    name: String,
    /// Its IPv4 addresses; the first is the switch's own
    #[arg(long, value_name = "CIDR", default_value = SUBNET_DEFAULT, value_parser = SubnetSpec::parse)]
    subnet: SubnetSpec,
    /// Neither DHCP nor DNS: the switch only switches
    #[arg(long, conflicts_with_all = ["subnet", "gateway", "range", "router", "lease", "dns", "domain"])]
    no_subnet: bool,
    /// The switch's own address [default: the first of the subnet]
    #[arg(long, value_name = "IP")]
    gateway: Option<Ipv4Addr>,
    /// Addresses that are leased [default: all on one side of the switch's own, the one with more]
    #[arg(long, value_name = "FIRST-LAST", value_parser = parse_range)]
    range: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Router that machines are told of: an address behind an uplink
    #[arg(long, value_name = "IP")]
    router: Option<Ipv4Addr>,
    /// How long an address is leased [default: 1h]
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    lease: Option<Duration>,
    /// DNS server for names outside of the network, that machines are told of; may be given several times
    #[arg(long, value_name = "IP")]
    dns: Vec<Ipv4Addr>,
    /// Domain of the machines' names [default: NAME.internal]
    #[arg(long)]
    domain: Option<String>,
    /// Largest packet in bytes
    #[arg(long, value_name = "BYTES", default_value_t = MTU_DEFAULT)]
    #[arg(value_parser = clap::value_parser!(u16).range(576..=9216))]
    mtu: u16,
    /// Machines may talk to uplinks and the switch alone, not to each other
    #[arg(long)]
    isolated: bool,
    /// VLAN of the machines at uplinks; needs --no-subnet
    #[arg(long, value_name = "ID", requires = "no_subnet")]
    vlan: Option<u16>,
    /// Way out: tap=NAME or bridge=NAME of the host; may be given several times
    #[arg(long = "uplink", value_name = "tap=NAME|bridge=NAME", value_parser = parse_uplink)]
    uplinks: Vec<UplinkSpec>,
    /// What each card may send in a second
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bytes_per_s: Option<u64>,
    /// What it may send at once after a time of rest [default: that of a second]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "bytes_per_s")]
    bytes_burst: Option<u64>,
    /// Packets that each card may send in a second
    #[arg(long, value_name = "N")]
    packets_per_s: Option<u64>,
    /// Packets at once after a time of rest [default: those of a second]
    #[arg(long, value_name = "N", requires = "packets_per_s")]
    packets_burst: Option<u64>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `show`.
#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Network
    #[arg(value_name = "NETWORK")]
    name: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// Options of `rm`.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// Network
    #[arg(value_name = "NETWORK", required = true)]
    names: Vec<String>,
    #[command(flatten)]
    client: ClientArgs,
}

/// Write what passes in a network to a pcapng file, until it is interrupted or over
#[derive(Debug, Args)]
pub(super) struct CaptureArgs {
    /// Network
    #[arg(value_name = "NETWORK")]
    name: String,
    /// File to write; - is standard output, for `wireshark -k -i -`
    #[arg(short = 'w', long, value_name = "FILE")]
    write: PathBuf,
    /// One port alone, by its number in `network show`
    #[arg(long, value_name = "N")]
    port: Option<u16>,
    /// Bytes of each frame that are kept
    #[arg(long, value_name = "BYTES", default_value_t = 65_535)]
    snap: u32,
    /// Size of the file
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64MiB")]
    size: u64,
    /// How long it goes on
    #[arg(long = "for", value_name = "TIME", value_parser = parse_duration, default_value = "1h")]
    within: Duration,
    #[command(flatten)]
    daemon: HostArgs,
}

fn parse_range(text: &str) -> Result<(Ipv4Addr, Ipv4Addr), String> {
    let expected = || "expected two addresses such as 10.7.0.10-10.7.0.99".to_owned();
    let (first, last) = text.split_once('-').ok_or_else(expected)?;
    let address = |text: &str| text.parse().map_err(|_| expected());
    Ok((address(first)?, address(last)?))
}

fn parse_uplink(text: &str) -> Result<UplinkSpec, String> {
    match text.split_once('=') {
        Some(("tap", name)) if !name.is_empty() => Ok(UplinkSpec::Tap(name.to_owned())),
        Some(("bridge", name)) if !name.is_empty() => Ok(UplinkSpec::Bridge(name.to_owned())),
        _ => Err("expected tap=NAME or bridge=NAME".to_owned()),
    }
}

/// Runs a command.
pub(super) fn run(command: &NetworkCommand, options: &PathOptions) -> Result<u8, Failure> {
    match command {
        NetworkCommand::Create(args) => create(args, options),
        NetworkCommand::List(args) => list(args, options),
        NetworkCommand::Show(args) => show(args, options),
        NetworkCommand::Rm(args) => remove(args, options),
        NetworkCommand::Capture(args) => capture(args, options),
    }
}

impl CreateArgs {
    fn spec(&self) -> NetworkSpec {
        let mut subnet = self.subnet;
        if let Some(gateway) = self.gateway {
            subnet = subnet.with_gateway(gateway);
        }
        if let Some((first, last)) = self.range {
            (subnet.first, subnet.last) = (first, last);
        }
        subnet.router = self.router;
        let lease = self.lease.map(|lease| lease.as_secs());
        subnet.lease_s = lease.map_or(LEASE_S_DEFAULT, |s| u32::try_from(s).unwrap_or(u32::MAX));
        let rate = |per_s: Option<u64>, burst: Option<u64>| {
            per_s.map(|per_s| Rate {
                per_s,
                burst: burst.unwrap_or(per_s),
            })
        };
        let new = NetworkSpec::new(&self.name);
        NetworkSpec {
            mtu: self.mtu,
            subnet: (!self.no_subnet).then_some(subnet),
            domain: self.domain.clone().unwrap_or(new.domain),
            dns: self.dns.clone(),
            isolated: self.isolated,
            vlan: self.vlan,
            limits: PortLimits {
                bytes: rate(self.bytes_per_s, self.bytes_burst),
                packets: rate(self.packets_per_s, self.packets_burst),
            },
            uplinks: self.uplinks.clone(),
            name: new.name,
        }
    }
}

fn create(args: &CreateArgs, options: &PathOptions) -> Result<u8, Failure> {
    let spec = args.spec();
    spec.check().map_err(|line| Failure::new(USAGE, line))?;
    let changed: Changed = args.client.talk(options, async |client| {
        Ok(client.post("/v1/networks", Some(&spec)).await?)
    })?;
    if args.client.json {
        print_json(&changed)?;
    } else {
        let what = match changed.changed {
            true => "created",
            false => "is there already",
        };
        print(&format!("{}: {what}\n", printable(&changed.name)))?;
    }
    Ok(0)
}

/// What is no name is not put into a path.
fn checked(name: &str) -> Result<&str, Failure> {
    if is_network_name(name) {
        return Ok(name);
    }
    let name = printable(name);
    Err(Failure::new(
        USAGE,
        format!("{name}: expected {NETWORK_NAME_RULE}"),
    ))
}

fn list(args: &ListArgs, options: &PathOptions) -> Result<u8, Failure> {
    let networks: Vec<NetworkSummary> = args.client.talk(options, async |client| {
        Ok(client.get("/v1/networks").await?)
    })?;
    if args.client.json {
        print_json(&networks)?;
        return Ok(0);
    }
    let mut rows = vec![row(["NAME", "STATE", "SUBNET", "CARDS", "CREATED"])];
    for network in &networks {
        rows.push(row([
            &network.name,
            network.state.word(),
            network.subnet.as_deref().unwrap_or("-"),
            &network.ports.to_string(),
            &network.created_at,
        ]));
    }
    print(&table(&rows))?;
    Ok(0)
}

fn show(args: &ShowArgs, options: &PathOptions) -> Result<u8, Failure> {
    let path = format!("/v1/networks/{}", checked(&args.name)?);
    let network: NetworkDetails = args
        .client
        .talk(options, async |client| Ok(client.get(&path).await?))?;
    match args.client.json {
        true => print_json(&network)?,
        false => print(&shown(&network))?,
    }
    Ok(0)
}

fn shown(network: &NetworkDetails) -> String {
    let summary = &network.summary;
    let mut about = vec![
        row(["name", &summary.name]),
        row(["state", summary.state.word()]),
        row(["subnet", summary.subnet.as_deref().unwrap_or("none")]),
    ];
    if let Some(subnet) = network.spec.subnet {
        let range = format!("{}-{}", subnet.first, subnet.last);
        about.push(row(["gateway", &subnet.gateway.to_string()]));
        about.push(row(["leased", &range]));
    }
    about.push(row(["domain", &printable(&network.spec.domain)]));
    if network.spec.isolated {
        about.push(row(["isolated", "yes"]));
    }
    if let Some(vlan) = network.spec.vlan {
        about.push(row(["vlan", &vlan.to_string()]));
    }
    if let Some(pid) = network.pid {
        let switch = format!("pid {pid}, generation {}", network.generation);
        about.push(row(["switch", &switch]));
    }
    if let Some(failure) = &network.failure {
        about.push(row(["failure", &printable(failure)]));
    }
    let mut text = table(&about);
    let head = [
        "PORT", "AT", "ADDRESS", "MAC", "TENANT", "VLAN", "IN", "OUT", "DROPPED", "",
    ];
    let mut ports = vec![row(head)];
    for card in &network.cards {
        let at = format!("{}/{}", card.machine, card.card);
        let leased = card.address.map(|address| address.to_string());
        let given = card.addresses.first().map(ToString::to_string);
        let address = leased.or(given);
        let vlan = vlans(card);
        let trouble = card.trouble.as_deref().map(printable);
        let [to, from, dropped] = carried(card.counters.as_ref());
        ports.push(row([
            &card.port.to_string(),
            &at,
            address.as_deref().unwrap_or("-"),
            &card.mac,
            card.tenant.as_deref().unwrap_or("-"),
            &vlan,
            &to,
            &from,
            &dropped,
            &trouble.unwrap_or_default(),
        ]));
    }
    for uplink in &network.uplinks {
        let trouble = uplink.trouble.as_deref().map(printable);
        let [to, from, dropped] = carried(uplink.counters.as_ref());
        ports.push(row([
            &uplink.port.to_string(),
            &uplink.interface,
            "-",
            "-",
            "-",
            "-",
            &to,
            &from,
            &dropped,
            &trouble.unwrap_or_default(),
        ]));
    }
    if ports.len() > 1 {
        text.push('\n');
        text.push_str(&table(&ports));
    }
    if !network.leases.is_empty() {
        let mut leases = vec![row(["LEASED", "TO", "UNTIL"])];
        for lease in &network.leases {
            let (address, until) = (lease.address.to_string(), printable(&lease.until));
            leases.push(row([&address, &lease.mac, &until]));
        }
        text.push('\n');
        text.push_str(&table(&leases));
    }
    text
}

fn vlans(card: &NetworkPort) -> String {
    match (card.vlan, &card.trunk) {
        (Some(vlan), _) => vlan.to_string(),
        (None, None) => "-".to_owned(),
        (None, Some(trunk)) if trunk.is_empty() => "all".to_owned(),
        (None, Some(trunk)) => {
            let all: Vec<_> = trunk.iter().map(ToString::to_string).collect();
            all.join(",")
        }
    }
}

/// What came from a port, what went there, and what was dropped for which cause.
fn carried(counters: Option<&NetworkCounters>) -> [String; 3] {
    let Some(counters) = counters else {
        return ["-", "-", "-"].map(str::to_owned);
    };
    let side = |frames: u64, bytes: u64| format!("{frames} ({})", show_size(bytes));
    let dropped = counters.dropped.iter();
    let dropped: Vec<_> = dropped
        .map(|(cause, count)| format!("{}={count}", printable(cause)))
        .collect();
    let dropped = match dropped.is_empty() {
        true => "0".to_owned(),
        false => dropped.join(","),
    };
    [
        side(counters.frames_in, counters.bytes_in),
        side(counters.frames_out, counters.bytes_out),
        dropped,
    ]
}

fn remove(args: &RemoveArgs, options: &PathOptions) -> Result<u8, Failure> {
    let names = args.names.iter().map(|name| checked(name));
    let names = names.collect::<Result<Vec<_>, _>>()?;
    let answers = args.client.talk(options, async |client| {
        let mut answers = Vec::new();
        for name in names {
            let path = format!("/v1/networks/{name}");
            answers.push(match client.delete::<Changed>(&path).await {
                Err(ClientError::Api(error)) if error.code == Code::NotFound => Ok(Changed {
                    schema_version: crate::api::SCHEMA_VERSION,
                    name: name.to_owned(),
                    changed: false,
                    state: None,
                }),
                other => other,
            });
        }
        Ok(answers)
    })?;
    // One that cannot be removed keeps none of the others.
    let (mut removed, mut failure) = (Vec::new(), None::<Failure>);
    for answer in answers {
        match answer {
            Ok(changed) => removed.push(changed),
            Err(error) => {
                failure = Some(match failure.take() {
                    Some(first) => first.and(error.into()),
                    None => error.into(),
                });
            }
        }
    }
    if !args.client.json {
        for changed in &removed {
            let what = match changed.changed {
                true => "removed",
                false => "is not there",
            };
            print(&format!("{}: {what}\n", printable(&changed.name)))?;
        }
    } else if let ([one], [_]) = (removed.as_slice(), args.names.as_slice()) {
        print_json(one)?;
    } else {
        print_json(&removed)?;
    }
    failure.map_or(Ok(0), Err)
}

fn capture(args: &CaptureArgs, options: &PathOptions) -> Result<u8, Failure> {
    let name = checked(&args.name)?;
    if args.write.as_os_str() == "-" && std::io::stdout().is_terminal() {
        // What guests have sent could be sequences that control it.
        let line = "--write -: expected a pipe or a file as standard output, not a terminal";
        return Err(Failure::new(USAGE, line));
    }
    let mut path = format!(
        "/v1/networks/{name}/capture?snap={}&bytes={}&seconds={}",
        args.snap,
        args.size,
        args.within.as_secs().max(1)
    );
    if let Some(port) = args.port {
        path.push_str(&format!("&port={port}"));
    }
    args.daemon.talk(options, async |client: Client| {
        let mut stream = client.stream(&path).await?;
        // Made when the daemon has said yes: what was there before is not lost for nothing.
        let mut out: Box<dyn Write> = match args.write.to_str() {
            Some("-") => Box::new(std::io::stdout()),
            _ => Box::new(
                File::create(&args.write)
                    .map_err(|error| Failure::because(START, args.write.display(), &error))?,
            ),
        };
        while let Some(piece) = stream.next().await? {
            let written = out.write_all(&piece).and_then(|()| out.flush());
            match written {
                Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => return Ok(0),
                Err(error) => {
                    return Err(Failure::because(START, args.write.display(), &error));
                }
                Ok(()) => {}
            }
        }
        Ok(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{NetworkLease, NetworkState, SCHEMA_VERSION};
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(subcommand)]
        command: NetworkCommand,
    }

    fn spec(words: &str) -> Result<NetworkSpec, String> {
        let words = ["network", "create"].into_iter().chain(words.split(' '));
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        let NetworkCommand::Create(args) = line.command else {
            return Err("another command".to_owned());
        };
        let spec = args.spec();
        spec.check().map(|()| spec)
    }

    #[test]
    fn network_is_what_its_options_say() {
        assert_eq!(spec("lab").unwrap(), NetworkSpec::new("lab"));
        let text = "lab --subnet 10.1.0.0/16 --range 10.1.2.0-10.1.3.0 --gateway 10.1.0.9 --router 10.1.0.1 \
                    --lease 10m --dns 1.1.1.1 --dns 9.9.9.9 --domain lab.test --mtu 9000 --isolated \
                    --uplink tap=tap7 --uplink bridge=br0 --bytes-per-s 1MiB --packets-per-s 100 --packets-burst 7";
        let full = spec(text).unwrap();
        let subnet = full.subnet.unwrap();
        assert_eq!(subnet.first, Ipv4Addr::new(10, 1, 2, 0));
        assert_eq!((subnet.lease_s, full.dns.len(), full.mtu), (600, 2, 9000));
        assert_eq!(full.limits.bytes.unwrap().burst, 1 << 20);
        assert_eq!(full.limits.packets.unwrap().burst, 7);
        assert_eq!(full.uplinks[1], UplinkSpec::Bridge("br0".into()));
        let pool = |gateway: &str| {
            let subnet = spec(&format!("lab --gateway {gateway}")).unwrap().subnet;
            subnet.map(|subnet| (subnet.first.octets()[3], subnet.last.octets()[3]))
        };
        assert_eq!(pool("10.87.0.254"), Some((1, 253)));
        assert_eq!(pool("10.87.0.100"), Some((101, 254)));
        let tagged = spec("lab --no-subnet --vlan 7").unwrap();
        assert_eq!((tagged.vlan, tagged.subnet), (Some(7), None));
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for (words, wanted) in [
            ("lab --no-subnet --subnet 10.0.0.0/24", "cannot be used"),
            ("lab --no-subnet --domain x", "cannot be used"),
            ("lab --vlan 7", "--no-subnet"),
            ("lab --mtu 300", "576..=9216"),
            ("lab --gateway 10.88.0.1", "gateway"),
            ("lab --uplink br0", "expected tap=NAME"),
            ("lab --range 10.0.0.1", "expected two addresses"),
            ("lab --range 10.87.0.1-10.87.0.9", "pool"),
            ("Lab", "name = Lab"),
            ("lab --packets-burst 3", "--packets-per-s"),
        ] {
            let error = spec(words).unwrap_err();
            assert!(error.contains(wanted), "{words}: {error}");
        }
    }

    #[test]
    fn table_tells_what_each_port_has_carried_and_nothing_controls_the_terminal() {
        let counters = NetworkCounters {
            frames_in: 3,
            bytes_in: 2048,
            dropped: [("spoofed_mac".to_owned(), 9)].into(),
            ..NetworkCounters::default()
        };
        let text = shown(&NetworkDetails {
            summary: NetworkSummary {
                schema_version: SCHEMA_VERSION,
                name: "lab".into(),
                state: NetworkState::Serving,
                subnet: Some("10.87.0.0/24".into()),
                ports: 1,
                created_at: String::new(),
            },
            spec: NetworkSpec::new("lab"),
            pid: Some(7),
            users: None,
            generation: 2,
            restarts: 1,
            failure: None,
            cards: vec![NetworkPort {
                port: 0,
                machine: "web".into(),
                card: 0,
                mac: "52:54:00:00:00:01".into(),
                tenant: Some("acme".into()),
                addresses: vec![],
                vlan: None,
                trunk: Some(vec![7, 8]),
                address: Some(Ipv4Addr::new(10, 87, 0, 5)),
                connected: true,
                trouble: Some("\u{1b}[2J".into()),
                counters: Some(counters),
            }],
            uplinks: vec![],
            leases: vec![NetworkLease {
                mac: "52:54:00:00:00:02".into(),
                address: Ipv4Addr::new(10, 87, 0, 6),
                until: "2030-01-01T00:00:00Z".into(),
            }],
            capturing: false,
        });
        assert!(text.contains("10.87.0.6"), "{text}");
        assert!(
            text.contains("web/0") && text.contains("10.87.0.5"),
            "{text}"
        );
        assert!(text.contains("acme") && text.contains("7,8"), "{text}");
        assert!(
            text.contains("spoofed_mac=9") && text.contains("3 (2KiB)"),
            "{text}"
        );
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
