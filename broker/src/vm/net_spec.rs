//! What a network device is to be, and what it is plugged into.

use super::spec::{SpecError, check_name, expect};
use crate::network::card::{CARD_RULE, CardSpec};
use crate::network::is_interface_name;
use crate::network::publish::Publish;
use bulkhead_ipc::protocol::birth::DiskLimits;
use serde::{Deserialize, Serialize};

/// Most pairs of queues of one network device.
pub const NET_QUEUES_MAX: u8 = 8;
/// Smallest and largest packet of a network device in bytes: what IPv4 needs, and what fits a frame.
pub const MTU_BYTES: (u16, u16) = (68, 65_521);
/// What the name of a virtual network is.
pub const NETWORK_NAME_RULE: &str = "the name of a network: 1 to 32 lower-case letters, digits or '-', of which '-' is neither first nor last";

/// Whether a virtual network can have this name.
#[must_use]
pub fn is_network_name(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    (1..=32).contains(&name.len())
        && name.bytes().all(plain)
        && !name.starts_with('-')
        && !name.ends_with('-')
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetSpec {
    /// Name in messages, as [`VmSpec::name`].
    pub name: String,
    /// What it is plugged into.
    pub source: NetSource,
    /// Its address.
    pub mac: [u8; 6],
    /// Largest packet that the guest is told of; `None` leaves it what it is.
    pub mtu: Option<u16>,
    /// Pairs of queues, 1 to [`NET_QUEUES_MAX`].
    pub queues: u8,
    /// Whether the cable is plugged in at the start.
    pub link_up: bool,
    /// What it may send in a second, and as much receive.
    pub limits: DiskLimits,
    /// What it is in its virtual network.
    #[serde(default)]
    pub card: CardSpec,
}

/// What a network device is plugged into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetSource {
    /// A TAP interface of the host, which is made if it is not there.
    Tap(String),
    /// A TAP interface that is made and put into this bridge of the host.
    Bridge(String),
    /// A virtual network of the daemon.
    Network(String),
    /// A program of the host that speaks for the guest (passt).
    User {
        /// Ports of the host that lead to the guest.
        publish: Vec<Publish>,
    },
}

impl NetSource {
    /// The network interface of the host that it names.
    const fn interface(&self) -> Option<&String> {
        match self {
            Self::Tap(name) | Self::Bridge(name) => Some(name),
            Self::Network(_) | Self::User { .. } => None,
        }
    }
}

/// A number of a name, the same on every host and for all time (FNV-1a).
fn number_of(name: &str, n: usize) -> u64 {
    let bytes = name.bytes().chain([0]).chain(n.to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

impl NetSpec {
    /// The address of network device `n` of machine `vm` unless it is given another one: locally
    /// administered, and the same whenever the machine is started.
    #[must_use]
    pub fn default_mac(vm: &str, n: usize) -> [u8; 6] {
        let [first, second, third, fourth, fifth, sixth, ..] = number_of(vm, n).to_le_bytes();
        [first & 0xfc | 0x02, second, third, fourth, fifth, sixth]
    }

    /// The TAP interface of this device, which is number `n` of machine `vm`.
    #[must_use]
    pub fn interface(&self, vm: &str, n: usize) -> String {
        match &self.source {
            NetSource::Tap(name) => name.clone(),
            NetSource::Bridge(_) | NetSource::Network(_) | NetSource::User { .. } => {
                let plain = format!("bh-{vm}-{n}");
                if is_interface_name(&plain) {
                    plain
                } else {
                    format!("bh{:09x}-{n}", number_of(vm, n) >> 28)
                }
            }
        }
    }

    /// Ports of the host that lead to the guest.
    #[must_use]
    pub fn published(&self) -> &[Publish] {
        match &self.source {
            NetSource::User { publish } => publish,
            NetSource::Tap(_) | NetSource::Bridge(_) | NetSource::Network(_) => &[],
        }
    }

    pub(super) fn check(&self, n: usize) -> Result<(), SpecError> {
        check_name(&format!("net[{n}].name"), &self.name)?;
        if let Some(interface) = self.source.interface() {
            expect(
                is_interface_name(interface),
                &format!("net[{n}]"),
                interface,
                "the name of a network interface: at most 15 letters, digits, '-', '_' or '.'",
            )?;
        }
        if let NetSource::Network(network) = &self.source {
            expect(
                is_network_name(network),
                &format!("net[{n}].network"),
                network,
                NETWORK_NAME_RULE,
            )?;
        }
        let is_in_network = matches!(self.source, NetSource::Network(_));
        let wrong = match self.card.check() {
            Err(wrong) => Some(wrong),
            Ok(()) if !is_in_network && !self.card.is_plain() => {
                Some(("network", "none".to_owned(), CARD_RULE))
            }
            Ok(()) => None,
        };
        if let Some((field, got, expected)) = wrong {
            expect(false, &format!("net[{n}].{field}"), got, expected)?;
        }
        if let NetSource::User { publish } = &self.source {
            for (at, port) in publish.iter().enumerate() {
                expect(
                    !is_published(port, publish.get(..at).unwrap_or_default()),
                    &format!("net[{n}].publish"),
                    port,
                    "each port of the host once",
                )?;
            }
        }
        if let NetSource::Network(_) | NetSource::User { .. } = &self.source {
            expect(
                self.queues == 1,
                &format!("net[{n}].queues"),
                self.queues,
                "1 in a network, and with user networking",
            )?;
        }
        expect(
            is_unicast(self.mac),
            &format!("net[{n}].mac"),
            show_mac(self.mac),
            "the address of one device, not of a group",
        )?;
        let (least, most) = MTU_BYTES;
        expect(
            self.mtu.is_none_or(|mtu| (least..=most).contains(&mtu)),
            &format!("net[{n}].mtu"),
            self.mtu.unwrap_or_default(),
            "68 to 65521",
        )?;
        expect(
            (1..=NET_QUEUES_MAX).contains(&self.queues),
            &format!("net[{n}].queues"),
            self.queues,
            "1 to 8",
        )
    }

    #[cfg(test)]
    pub(crate) fn for_test(source: NetSource) -> Self {
        Self {
            name: "net0".into(),
            source,
            mac: Self::default_mac("vm", 0),
            mtu: None,
            queues: 1,
            link_up: true,
            limits: DiskLimits::default(),
            card: CardSpec::default(),
        }
    }
}

/// Whether the host's port leads somewhere already.
#[must_use]
pub fn is_published(port: &Publish, before: &[Publish]) -> bool {
    before.iter().any(|other| other.collides(port))
}

/// Whether an address can be that of one device.
#[must_use]
pub fn is_unicast(mac: [u8; 6]) -> bool {
    let [first, ..] = mac;
    first & 1 == 0 && mac != [0; 6]
}

/// An address as it is written.
#[must_use]
pub fn show_mac(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// Reads an address.
///
/// # Errors
/// What was expected.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let byte = |part: &str| {
        let plain = part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        u8::from_str_radix(part, 16).ok().filter(|_| plain)
    };
    let bytes = text.split(':').map(byte).collect::<Option<Vec<_>>>();
    bytes
        .and_then(|bytes| bytes.try_into().ok())
        .filter(|mac| is_unicast(*mac))
        .ok_or_else(|| {
            "expected the address of one device, such as \"52:54:00:12:34:56\"".to_owned()
        })
}
