//! User networking: a program of the host, passt, speaks for a guest with ordinary sockets. It needs no root and no
//! interface, and is how a service in a guest is reached where there is neither.
//!
//! passt is not Bulkhead's, and confines itself (namespaces, seccomp, no capabilities). There is one for each process of
//! a network card, at the other end of a pair of sockets: it ends when that process does, by itself, so that none is left
//! behind whatever dies. The broker knows it by its pid besides, on record, and kills one that would not end.
//!
//! The guest finds the addresses that other monitors have made usual: itself at 10.0.2.15, the gateway at 10.0.2.2. The gateway
//! does not lead to the host itself (`--no-map-gw`), and the card's process lets no packet to a loopback address pass: services on
//! the host's loopback are not the guest's.

use super::publish::{Publish, Transport};
use super::sys;
use crate::authority::status::field;
use crate::escape::escaped;
use crate::launch::cgroup::{Group, GroupLimits, Place};
use crate::remains;
use crate::vm::record::HelperRecord;
use crate::vm::session::RunError;
use crate::vm::spec::{HostShare, NetSpec};
use bulkhead_ipc::shared::sealed_memfd;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PROGRAM: &str = "passt";
/// Where the guest is, and its gateway.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const PREFIX: &str = "24";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The gateway's MAC address.
const GATEWAY_MAC: &str = "52:55:0a:00:02:02";
/// How long it may take until it serves, when the machine starts.
const READY_WITHIN: Duration = Duration::from_secs(10);
/// The same when the machine runs, which it holds up.
const READY_AGAIN_WITHIN: Duration = Duration::from_secs(2);
/// How long one that was killed may take to end.
const ENDED_WITHIN: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(1);
/// Room for what it says when it cannot start.
const LAST_WORDS_BYTES: u64 = 16 << 10;
/// Room for frames on their way, in bytes.
const SOCKET_BYTES: usize = 1 << 20;
/// Memory that it may use. It has tables of fixed size, of which it touches about 20 MiB.
const MEMORY_BYTES: u64 = 128 << 20;
/// Tasks that it may be.
const TASKS: u64 = 2;
/// Where name servers are told of, the usual place first. Where a resolver on the loopback answers for others, which a guest does not
/// reach, systemd says who they are in the second.
const RESOLVERS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
const RESOLVERS_BYTES_MAX: u64 = 64 << 10;
/// Name servers of each family that it is told of: it has room for four.
const NAME_SERVERS_MAX: usize = 3;
/// When the host runs out of memory it ends before a broker, as the machine's own processes do.
const OOM_SCORE_ADJUST: &str = "500";

/// A passt. Dropped, it is over.
#[derive(Debug)]
pub struct Passt {
    /// The card's end of the wire, until a process has it.
    wire: Option<OwnedFd>,
    record: HelperRecord,
    /// `None` for one that another broker has started.
    child: Option<Child>,
    group: Option<Group>,
}

/// Why there is none.
enum Failure {
    /// It could not be executed.
    Spawn(io::Error),
    /// The kernel refused what it is given.
    Os(io::Error),
    /// A port of the host cannot be published.
    Port(Publish, io::Error),
    /// It has ended, and said this.
    Refused(String),
    /// It did not come up in time.
    Late(Duration),
}

impl Passt {
    /// Starts one for a card that is about to be plugged in for the first time. Waits until it serves, and for ports that a dead
    /// one may still have.
    ///
    /// # Errors
    /// What is lacking, or wrong.
    pub fn start(spec: &NetSpec, publish: &[Publish]) -> Result<Self, RunError> {
        let until = Instant::now() + remains::LONGEST;
        loop {
            match start(spec, publish, READY_WITHIN) {
                Err(failure) if failure.is_of_taken_port() && Instant::now() < until => {
                    std::thread::sleep(super::POLL);
                }
                started => return started.map_err(|failure| failure.tell(&spec.name)),
            }
        }
    }

    /// Starts one for the next process of a card, which is tried again when this fails.
    ///
    /// # Errors
    /// As [`Passt::start`].
    pub(crate) fn start_again(spec: &NetSpec, publish: &[Publish]) -> Result<Self, RunError> {
        let started = start(spec, publish, READY_AGAIN_WITHIN);
        started.map_err(|failure| failure.tell(&spec.name))
    }

    /// One that another broker has started.
    pub(crate) fn found(record: HelperRecord) -> Self {
        let group = (!record.groups.is_empty()).then(|| Group::known(record.groups.clone()));
        Self {
            wire: None,
            record,
            child: None,
            group,
        }
    }

    /// What a later broker must know of it.
    pub(crate) const fn record(&self) -> &HelperRecord {
        &self.record
    }

    /// The card's end of the wire, once.
    pub(crate) const fn take_wire(&mut self) -> Option<OwnedFd> {
        self.wire.take()
    }

    /// Puts it into a control group, unless it is in one. Returns whether there is something new to know of it.
    pub(crate) fn limit(&mut self, place: &Place, machine: &str) -> bool {
        if self.group.is_some() || self.child.is_none() {
            return false;
        }
        let HelperRecord { device, pid, .. } = &self.record;
        let name = format!("{machine}-{device}-{PROGRAM}-{pid}");
        let limits = GroupLimits {
            memory_bytes: MEMORY_BYTES,
            tasks: TASKS,
            share: HostShare::default(),
        };
        // It is not reaped before this is dropped, so the pid is its own.
        match place.put_pid(&name, *pid, limits, &[]) {
            Ok(group) => {
                self.record.groups = group.directories().to_vec();
                self.group = Some(group);
            }
            Err(error) => tracing::warn!(device, %error, "no control group for {PROGRAM}"),
        }
        self.group.is_some()
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // Its end of a wire that is closed is the end of it too.
        drop(self.wire.take());
        let Some(child) = &mut self.child else {
            self.record.kill();
            let until = Instant::now() + ENDED_WITHIN;
            while self.record.is_alive() && Instant::now() < until {
                std::thread::sleep(POLL);
            }
            return;
        };
        // Dead already is as good, and somebody else may have reaped it.
        let _killed = child.kill();
        let _status = child.wait();
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a program of the host, which the launcher does not know"
)]
fn start(spec: &NetSpec, publish: &[Publish], within: Duration) -> Result<Passt, Failure> {
    publish.iter().try_for_each(is_free)?;
    let os = |errno: nix::Error| Failure::Os(errno.into());
    let flags = SockFlag::SOCK_CLOEXEC;
    let (wire, other) =
        socketpair(AddressFamily::Unix, SockType::Stream, None, flags).map_err(os)?;
    for socket in [&wire, &other] {
        // The kernel gives what it permits.
        let _bounded = setsockopt(socket, sockopt::SndBuf, &SOCKET_BYTES);
    }
    fcntl(&wire, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).map_err(os)?;
    let mut wire = File::from(wire);
    wire.write_all(&introduction(spec.mac))
        .map_err(Failure::Os)?;
    // A file that cannot grow, so that nobody has to read what it says later on, or has to have room for it.
    let said = File::from(sealed_memfd("bulkhead-passt", LAST_WORDS_BYTES).map_err(os)?);
    let mut command = Command::new(PROGRAM);
    let wire_there = sys::hand_over(&mut command, &other).map_err(os)?;
    drop(other);
    command.args(["--fd", &wire_there.to_string()]);
    command.args(arguments(spec, publish, &name_servers()));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.stderr(said.try_clone().map_err(Failure::Os)?);
    // What is typed at the broker's terminal is not for it.
    command.process_group(0);
    let child = command.spawn().map_err(Failure::Spawn)?;
    // It has its end of the wire alone from here on.
    drop(command);
    let pid = i32::try_from(child.id()).unwrap_or(0);
    if let Err(error) = fs::write(format!("/proc/{pid}/oom_score_adj"), OOM_SCORE_ADJUST) {
        tracing::debug!(%error, "{PROGRAM} is spared as long as its broker when memory runs out");
    }
    let passt = Passt {
        wire: Some(wire.into()),
        record: HelperRecord::of(&spec.name, pid),
        child: Some(child),
        group: None,
    };
    wait(passt, said, within)
}

/// The first frame on the wire, in the guest's name: who has the gateway? A passt that has never heard of its guest sends to all stations
/// of the wire what comes from outside, and Linux takes no such packet. A guest that runs already would have to send
/// something first.
fn introduction(mac: [u8; 6]) -> Vec<u8> {
    const EVERYBODY: [u8; 6] = [0xff; 6];
    const ARP: [u8; 2] = [8, 6];
    /// Ethernet, IPv4, the lengths of their addresses, a request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let (guest, gateway) = (GUEST.octets(), GATEWAY.octets());
    let ethernet = [EVERYBODY.as_slice(), &mac, &ARP];
    let frame = [
        ethernet.concat().as_slice(),
        &REQUEST,
        &mac,
        &guest,
        &[0; 6],
        &gateway,
    ]
    .concat();
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX);
    [&length.to_be_bytes(), frame.as_slice()].concat()
}

/// Until it serves: the last that it does before is to give up most system calls, in addition to those that this process has
/// given up.
fn wait(mut passt: Passt, mut said: File, within: Duration) -> Result<Passt, Failure> {
    let until = Instant::now() + within;
    let own = filters("/proc/thread-self/status").unwrap_or(0);
    let status = format!("/proc/{}/status", passt.record.pid);
    while let Some(child) = &mut passt.child {
        if child.try_wait().map_err(Failure::Os)?.is_some() {
            return Err(Failure::Refused(last_words(&mut said)));
        }
        if filters(&status).is_some_and(|filters| filters > own) {
            break;
        }
        if Instant::now() > until {
            return Err(Failure::Late(within));
        }
        std::thread::sleep(POLL);
    }
    Ok(passt)
}

/// Number of system call filters of a thread.
fn filters(status: &str) -> Option<usize> {
    let status = fs::read_to_string(status).ok()?;
    field(&status, "Seccomp_filters")?.parse().ok()
}

/// Whether a port of the host is free. passt itself would share one for datagrams with others, and be content with one family of
/// addresses.
fn is_free(publish: &Publish) -> Result<(), Failure> {
    let at = |address: IpAddr| {
        let at = SocketAddr::new(address, publish.port);
        match publish.transport {
            Transport::Tcp => TcpListener::bind(at).map(drop),
            Transport::Udp => UdpSocket::bind(at).map(drop),
        }
    };
    let bound = match publish.address {
        Some(address) => at(address),
        // A socket at all addresses of IPv6 is at those of IPv4 as well.
        None => at(Ipv6Addr::UNSPECIFIED.into()).or_else(|error| match error.kind() {
            io::ErrorKind::AddrInUse | io::ErrorKind::PermissionDenied => Err(error),
            _ => at(Ipv4Addr::UNSPECIFIED.into()),
        }),
    };
    bound.map_err(|error| Failure::Port(publish.clone(), error))
}

/// What it is started with.
fn arguments(spec: &NetSpec, publish: &[Publish], name_servers: &[IpAddr]) -> Vec<String> {
    let mut all = vec!["--foreground", "--quiet", "--no-map-gw"];
    all.extend(["--netmask", PREFIX, "--mac-addr", GATEWAY_MAC]);
    let mut all: Vec<_> = all.into_iter().map(str::to_owned).collect();
    let mut add = |option: &str, value: String| all.extend([option.to_owned(), value]);
    add("--address", GUEST.to_string());
    add("--gateway", GATEWAY.to_string());
    if let Some(mtu) = spec.mtu {
        add("--mtu", mtu.to_string());
    }
    for server in name_servers {
        add("--dns", server.to_string());
    }
    for (transport, option) in [
        (Transport::Tcp, "--tcp-ports"),
        (Transport::Udp, "--udp-ports"),
    ] {
        let mut ports = publish
            .iter()
            .filter(|p| p.transport == transport)
            .peekable();
        if ports.peek().is_none() {
            // Else it would publish what the other transport has.
            add(option, "none".to_owned());
        }
        for Publish {
            address,
            port,
            guest_port,
            ..
        } in ports
        {
            let at = address.map_or_else(String::new, |address| format!("{address}/"));
            add(option, format!("{at}{port}:{guest_port}"));
        }
    }
    all
}

/// The host's name servers that a guest can reach, if they are not those that passt finds by itself.
fn name_servers() -> Vec<IpAddr> {
    let read = |path: &str| {
        let mut text = String::new();
        let file = File::open(path).and_then(|file| {
            let mut file = file.take(RESOLVERS_BYTES_MAX);
            file.read_to_string(&mut text)
        });
        file.map(|_| text).unwrap_or_default()
    };
    let [usual, behind] = RESOLVERS.map(|path| reachable(&read(path)));
    if usual.is_empty() { behind } else { Vec::new() }
}

/// The first name servers of a `resolv.conf` that are not on the loopback.
fn reachable(resolvers: &str) -> Vec<IpAddr> {
    let servers = resolvers.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let is_server = words.next() == Some("nameserver");
        let server: IpAddr = words.next().filter(|_| is_server)?.parse().ok()?;
        Some(server).filter(|server| !server.is_loopback() && !server.is_unspecified())
    });
    let (v4, v6): (Vec<_>, Vec<_>) = servers.partition(IpAddr::is_ipv4);
    let first = |all: Vec<IpAddr>| all.into_iter().take(NAME_SERVERS_MAX);
    first(v4).chain(first(v6)).collect()
}

/// The last line that it has written for people.
fn last_words(said: &mut File) -> String {
    let mut bytes = Vec::new();
    if said
        .rewind()
        .and_then(|()| said.read_to_end(&mut bytes))
        .is_err()
    {
        bytes.clear();
    }
    let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(text);
    let complains = |line: &&str| !line.starts_with("Failed to send") && !line.trim().is_empty();
    let last = text.lines().rfind(complains).unwrap_or("nothing");
    escaped(last.trim().as_bytes()).to_string()
}

impl Failure {
    /// Whether somebody has a port, perhaps one who is just ending.
    fn is_of_taken_port(&self) -> bool {
        match self {
            Self::Port(_, cause) => cause.kind() == io::ErrorKind::AddrInUse,
            Self::Refused(said) => said.contains("Failed to bind"),
            Self::Spawn(_) | Self::Os(_) | Self::Late(_) => false,
        }
    }

    fn tell(self, device: &str) -> RunError {
        let host = |lacks: String| RunError::Host {
            lacks: format!("network device {device}: {lacks}"),
        };
        match self {
            Self::Spawn(cause) if cause.kind() == io::ErrorKind::NotFound => host(format!(
                "{PROGRAM} is not installed; user networking needs it (Debian: apt install {PROGRAM})"
            )),
            Self::Spawn(cause) => host(format!("{PROGRAM} cannot be executed: {cause}")),
            Self::Os(cause) => host(format!("a wire to {PROGRAM}: {cause}")),
            Self::Port(publish, cause) => {
                let why = match cause.kind() {
                    io::ErrorKind::AddrInUse => "another program has this port of the host",
                    io::ErrorKind::AddrNotAvailable => "that is no address of this host",
                    io::ErrorKind::PermissionDenied => "ports of this number need root",
                    _ => "it cannot be had",
                };
                RunError::Configuration(format!(
                    "network device {device}: publish {publish}: {why}: {cause}"
                ))
            }
            Self::Refused(said) if said.contains("interface not usable") => host(format!(
                "{PROGRAM} needs a default route of the host; it says: {said}"
            )),
            Self::Refused(said) => host(format!("{PROGRAM} does not start; it says: {said}")),
            Self::Late(within) => host(format!("{PROGRAM} does not come up within {within:?}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::spec::NetSource;

    #[test]
    fn arguments_say_what_is_published_and_nothing_else_is() {
        let publish: Vec<Publish> = ["8080:80", "127.0.0.1:2222:22", "[::1]:53:5353/udp"]
            .map(|text| text.parse().unwrap())
            .into();
        let mut spec = NetSpec::for_test(NetSource::User {
            publish: Vec::new(),
        });
        let servers = ["192.0.2.53".parse().unwrap()];
        let all = arguments(&spec, &publish, &servers).join(" ");
        assert!(
            all.contains(" --address 10.0.2.15 --gateway 10.0.2.2 "),
            "{all}"
        );
        assert!(
            all.starts_with("--foreground --quiet --no-map-gw "),
            "{all}"
        );
        assert!(
            all.ends_with(
                " --dns 192.0.2.53 --tcp-ports 8080:80 --tcp-ports 127.0.0.1/2222:22 --udp-ports ::1/53:5353"
            ),
            "{all}"
        );
        spec.mtu = Some(1400);
        let all = arguments(&spec, &[], &[]).join(" ");
        assert!(
            all.ends_with(" --mtu 1400 --tcp-ports none --udp-ports none"),
            "{all}"
        );
    }

    #[test]
    fn ports_that_others_have_are_told_with_the_cause() {
        let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let publish = |text: String| text.parse::<Publish>().unwrap();
        for address in ["127.0.0.1:", ""] {
            let failure = is_free(&publish(format!("{address}{port}:53/udp"))).unwrap_err();
            assert!(failure.is_of_taken_port());
            let said = failure.tell("net0").to_string();
            assert!(said.contains("another program has this port"), "{said}");
        }
        drop(taken);
        assert!(is_free(&publish(format!("{port}:53/udp"))).is_ok());
        let failure = is_free(&publish("198.51.100.1:2000:22".to_owned())).unwrap_err();
        let said = failure.tell("net0").to_string();
        assert!(
            said.contains("publish 198.51.100.1:2000:22: that is no address of this host"),
            "{said}"
        );
    }

    #[test]
    fn guest_is_introduced_by_a_whole_frame() {
        let frame = introduction([2, 1, 2, 3, 4, 5]);
        assert_eq!(frame.len(), 4 + 42);
        assert_eq!(frame[..4], [0, 0, 0, 42]);
        assert_eq!(
            frame[4 + 22..],
            [
                2, 1, 2, 3, 4, 5, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2
            ]
        );
    }

    #[test]
    fn name_servers_on_the_loopback_are_no_guests() {
        let text = "# one\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n nameserver 192.0.2.1 \nnameserver x\n";
        assert_eq!(reachable(text), ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert!(reachable("nameserver").is_empty() && reachable("nameserver 0.0.0.0").is_empty());
        let many: String = (1..9)
            .map(|n| format!("nameserver 192.0.2.{n}\n"))
            .collect();
        assert_eq!(reachable(&many).len(), NAME_SERVERS_MAX);
    }

    #[test]
    fn last_words_are_what_is_for_people() {
        let mut said = tempfile::tempfile().unwrap();
        let words = |said: &mut File, text: &str| {
            use std::io::Write;
            said.rewind().unwrap();
            said.write_all(text.as_bytes()).unwrap();
            last_words(said)
        };
        assert_eq!(words(&mut said, ""), "nothing");
        let text = "Failed to send 56 bytes to syslog\nFailed to bind any port for '-t 1:2', exiting\x1b\n\n\0\0";
        let last = words(&mut said, text);
        assert_eq!(last, "Failed to bind any port for '-t 1:2', exiting\\x1b");
        assert!(Failure::Refused(last).is_of_taken_port());
    }
}
