//! The host's side of network devices: TAP interfaces, opened on behalf of the processes that serve them, ports of
//! virtual networks ([`board`]), and programs that speak for guests ([`passt`]).
//!
//! An interface that the broker makes is not persistent: the kernel removes it with its last descriptor, so that
//! none is left behind whatever dies. The broker keeps descriptors besides those of the process, so that the
//! interface, and its place in a bridge, outlive one process and are there for the next.

pub mod board;
pub mod card;
pub mod passt;
pub mod publish;
pub mod spec;
mod sys;

use crate::remains;
use crate::vm::session::RunError;
use crate::vm::spec::{NetSource, NetSpec};
use board::{Plugged, Switchboard};
use bulkhead_ipc::protocol::birth::DiskLimits;
use card::CardSpec;
use nix::errno::Errno;
use passt::Passt;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

/// What makes TAP interfaces.
const TUN: &str = "/dev/net/tun";
/// Longest name of a network interface in bytes.
pub const INTERFACE_BYTES_MAX: usize = 15;
/// How often it is looked whether a dead process's interface is free.
const POLL: Duration = Duration::from_millis(10);

/// Whether an interface can have this name. `%` would be a pattern to the kernel.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    (1..=INTERFACE_BYTES_MAX).contains(&name.len())
        && name.bytes().all(plain)
        && !matches!(name, "." | "..")
}

/// What a network card is plugged into.
#[derive(Debug)]
pub enum Hold {
    /// An interface of the host.
    Tap(Tap),
    /// A virtual network.
    Port(Plugged),
    /// A program that speaks for the guest.
    User(Passt),
}

impl Hold {
    /// Has network device `n` of machine `vm` plugged in; `again` in a machine that runs.
    ///
    /// # Errors
    /// What is lacking, or wrong.
    pub fn open(
        vm: &str,
        n: usize,
        spec: &NetSpec,
        networks: &Switchboard,
        again: bool,
    ) -> Result<Self, RunError> {
        let network = match &spec.source {
            NetSource::Network(network) => network,
            NetSource::User { publish } if again => {
                return Passt::start_again(spec, publish).map(Self::User);
            }
            NetSource::User { publish } => return Passt::start(spec, publish).map(Self::User),
            NetSource::Tap(_) | NetSource::Bridge(_) => {
                return Tap::open(vm, n, spec).map(Self::Tap);
            }
        };
        let card = u16::try_from(n).unwrap_or(u16::MAX);
        let plugged = networks.plug(network, vm, card, spec.mac, &spec.card);
        plugged.map(Self::Port).map_err(|error| {
            RunError::Configuration(format!("net[{n}].network = \"{network}\": {error}"))
        })
    }
}

/// The queues of a TAP interface.
#[derive(Debug)]
pub struct Tap {
    /// One descriptor for each queue.
    pub queues: Vec<OwnedFd>,
    /// Whether the kernel cuts large UDP datagrams.
    pub cuts_udp: bool,
}

impl Tap {
    /// Opens what network device `n` of machine `vm` is plugged into, or makes it. Waits a moment for an
    /// interface that a dead process still has.
    ///
    /// # Errors
    /// What is lacking, or wrong.
    pub fn open(vm: &str, n: usize, spec: &NetSpec) -> Result<Self, RunError> {
        let until = Instant::now() + remains::LONGEST;
        let interface = spec.interface(vm, n);
        loop {
            match open(&interface, spec) {
                Err(Fault {
                    errno: Errno::EBUSY,
                    ..
                }) if Instant::now() < until => std::thread::sleep(POLL),
                Err(fault) => return Err(fault.tell(&interface, spec)),
                Ok(tap) => return Ok(tap),
            }
        }
    }

    /// Opens what uplink `n` of `name` is, or makes it, as for a network device.
    ///
    /// # Errors
    /// What is lacking, or wrong.
    pub fn uplink(name: &str, n: usize, source: NetSource, mtu: u16) -> Result<Self, RunError> {
        let spec = NetSpec {
            name: name.to_owned(),
            source,
            mac: [0; 6],
            mtu: Some(mtu),
            queues: 1,
            link_up: true,
            limits: DiskLimits::default(),
            card: CardSpec::default(),
        };
        Self::open(name, n, &spec)
    }

    /// Over descriptors that a living process has.
    #[must_use]
    pub fn found(queues: Vec<OwnedFd>) -> Option<Self> {
        let cuts_udp = sys::set_offloads(queues.first()?).ok()?;
        Some(Self { queues, cuts_udp })
    }
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fault {
    what: What,
    errno: Errno,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Device,
    Attach,
    Headers,
    Mtu,
    Up,
    Bridge,
}

impl Fault {
    fn tell(self, interface: &str, spec: &NetSpec) -> RunError {
        let name = &spec.name;
        let because = self.errno.desc();
        let host = |lacks: String| RunError::Host {
            lacks: format!("network device {name}: {lacks}"),
        };
        let wrong =
            |what: String| RunError::Configuration(format!("network device {name}: {what}"));
        let denied = matches!(self.errno, Errno::EPERM | Errno::EACCES);
        match (self.what, &spec.source) {
            (What::Device, _) => host(format!(
                "{TUN} cannot be opened: {because}; it comes with the kernel module tun"
            )),
            (What::Attach, NetSource::Tap(_)) if denied => host(format!(
                "the TAP interface {interface} cannot be used without root unless it is there and yours: \
                 `ip tuntap add dev {interface} mode tap user $USER` as root makes one{}",
                if spec.queues > 1 {
                    " (with multi_queue)"
                } else {
                    ""
                }
            )),
            (_, NetSource::Bridge(bridge)) if denied => host(format!(
                "a TAP interface in the bridge {bridge} can only be made by root (CAP_NET_ADMIN): \
                 have root make one, put it into the bridge, and name it with `tap`"
            )),
            (What::Attach, _) if self.errno == Errno::EBUSY => wrong(format!(
                "the TAP interface {interface} is in use by another process"
            )),
            (What::Attach, _) if self.errno == Errno::EINVAL => wrong(format!(
                "{interface} is no TAP interface that could have {} queues (a persistent one is made with \
                 `multi_queue` for more than one)",
                spec.queues
            )),
            (What::Bridge, NetSource::Bridge(bridge))
                if matches!(self.errno, Errno::ENODEV | Errno::EOPNOTSUPP | Errno::ENXIO) =>
            {
                wrong(format!("there is no bridge {bridge} on this host"))
            }
            (what, _) => {
                let what = match what {
                    What::Device | What::Attach => "be used",
                    What::Headers => "carry checksums and large segments (IFF_VNET_HDR)",
                    What::Mtu => "have this MTU",
                    What::Up => "be brought up",
                    What::Bridge => "be put into the bridge",
                };
                host(format!(
                    "the TAP interface {interface} cannot {what}: {because}"
                ))
            }
        }
    }
}

fn open(interface: &str, spec: &NetSpec) -> Result<Tap, Fault> {
    let fault = |what| move |errno| Fault { what, errno };
    let mut queues = Vec::new();
    for _ in 0..spec.queues.max(1) {
        queues.push(attach(interface, spec.queues > 1)?);
    }
    let mut cuts_udp = false;
    for queue in &queues {
        sys::set_header_bytes(queue).map_err(fault(What::Headers))?;
        cuts_udp = sys::set_offloads(queue).map_err(fault(What::Headers))?;
    }
    let about = sys::Interface::named(interface).map_err(fault(What::Device))?;
    if let Some(mtu) = spec.mtu {
        about.set_mtu(mtu).map_err(fault(What::Mtu))?;
    }
    if let NetSource::Bridge(bridge) = &spec.source {
        match about.put_into(bridge) {
            // It is in it already.
            Ok(()) | Err(Errno::EBUSY) => {}
            Err(errno) => return Err(fault(What::Bridge)(errno)),
        }
    }
    about.bring_up().map_err(fault(What::Up))?;
    Ok(Tap { queues, cuts_udp })
}

/// One queue of the interface. The interface is made if it is not there.
fn attach(interface: &str, several: bool) -> Result<OwnedFd, Fault> {
    let fault = |what| move |errno| Fault { what, errno };
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(TUN);
    let file: File = opened.map_err(|error: io::Error| {
        let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
        fault(What::Device)(errno)
    })?;
    let queue = OwnedFd::from(file);
    match sys::attach(&queue, interface, several) {
        // A persistent one may have been made for several queues though one is wanted.
        Err(Errno::EINVAL) if !several => sys::attach(&queue, interface, true),
        attached => attached,
    }
    .map_err(fault(What::Attach))?;
    Ok(queue)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_read_differently_are_none() {
        for good in ["tap0", "bh-web-0", "a", "vnet12.7", "x_1"] {
            assert!(is_interface_name(good), "{good}");
        }
        for bad in [
            "",
            "tap%d",
            "a/b",
            "a b",
            ".",
            "..",
            "sixteen-letters-",
            "tap\0",
            "tàp",
        ] {
            assert!(!is_interface_name(bad), "{bad}");
        }
    }

    #[test]
    fn faults_say_what_helps() {
        let spec = NetSpec::for_test(NetSource::Tap("tap7".into()));
        let tell = |what, errno, spec: &NetSpec| Fault { what, errno }.tell("tap7", spec);
        let denied = tell(What::Attach, Errno::EPERM, &spec);
        assert_eq!(denied.exit_code(), 4);
        assert!(
            denied
                .to_string()
                .contains("ip tuntap add dev tap7 mode tap user"),
            "{denied}"
        );
        let busy = tell(What::Attach, Errno::EBUSY, &spec);
        assert_eq!(busy.exit_code(), 2);
        let bridged = NetSpec::for_test(NetSource::Bridge("br7".into()));
        let none = tell(What::Bridge, Errno::ENODEV, &bridged).to_string();
        assert!(none.contains("no bridge br7"), "{none}");
        let denied = tell(What::Attach, Errno::EPERM, &bridged).to_string();
        assert!(denied.contains("CAP_NET_ADMIN"), "{denied}");
        let missing = tell(What::Device, Errno::ENOENT, &spec).to_string();
        assert!(missing.contains("/dev/net/tun"), "{missing}");
    }
}
