//! What a network and its ports are told to be. Whoever makes them checks them with [`NetworkSettings::check`]
//! and [`PortSettings::check`]; nothing of them comes from a frame.

use crate::Rate;
use crate::offload::Offload;
use crate::wire::Mac;
use std::net::{IpAddr, Ipv4Addr};

/// Longest label of a DNS name, and of a machine.
pub const NAME_BYTES_MAX: usize = 63;
/// Fixed addresses of one port.
pub const ADDRESSES_MAX: usize = 16;
/// VLANs of one trunk.
pub const TRUNK_VLANS_MAX: usize = 64;
/// Smallest MTU: what IPv4 demands.
pub const MTU_MIN: u16 = 576;
/// Largest MTU.
pub const MTU_MAX: u16 = 9216;

/// Settings that contradict themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SettingsError {
    /// Which field.
    pub field: &'static str,
    /// What it should be.
    pub expected: &'static str,
}

impl std::fmt::Display for SettingsError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: expected {}", self.field, self.expected)
    }
}

impl std::error::Error for SettingsError {}

fn ensure(holds: bool, field: &'static str, expected: &'static str) -> Result<(), SettingsError> {
    if holds {
        Ok(())
    } else {
        Err(SettingsError { field, expected })
    }
}

/// The IPv4 addresses of a network that has a gateway with services.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// The switch's own address: it answers ARP, echo, DHCP and DNS there, and routes nothing.
    pub gateway: Ipv4Addr,
    /// Bits of the network part, 8 to 30.
    pub prefix: u8,
    /// The gateway's Ethernet address.
    pub mac: Mac,
    /// First and last address that are leased.
    pub pool: (Ipv4Addr, Ipv4Addr),
    /// The router that machines are told of: an address behind an uplink.
    pub router: Option<Ipv4Addr>,
    /// How long a lease holds in seconds.
    pub lease_s: u32,
}

impl Subnet {
    /// The network mask.
    #[must_use]
    pub fn mask(&self) -> Ipv4Addr {
        let bits = u32::MAX
            .checked_shl(32 - u32::from(self.prefix.min(32)))
            .unwrap_or(0);
        bits.into()
    }

    /// Whether `address` is one of a machine here: in the network, and neither its first, last nor the
    /// gateway's.
    #[must_use]
    pub fn has(&self, address: Ipv4Addr) -> bool {
        let (address, mask) = (u32::from(address), u32::from(self.mask()));
        let network = u32::from(self.gateway) & mask;
        address & mask == network
            && address != network
            && address != (network | !mask)
            && address != u32::from(self.gateway)
    }

    fn check(&self) -> Result<(), SettingsError> {
        ensure(
            (8..=30).contains(&self.prefix),
            "prefix",
            "a number from 8 to 30",
        )?;
        ensure(self.mac.is_unicast(), "gateway mac", "a unicast address")?;
        let (first, last) = self.pool;
        let gateway_is_host = Self {
            gateway: first,
            ..*self
        }
        .has(self.gateway);
        ensure(
            first == self.gateway || gateway_is_host,
            "gateway",
            "an address of the subnet",
        )?;
        let pool = self.has(first) && self.has(last) && first <= last;
        let holds_gateway = (first..=last).contains(&self.gateway);
        ensure(
            pool && !holds_gateway,
            "pool",
            "addresses of the subnet without the gateway's",
        )?;
        ensure(
            self.router.is_none_or(|router| self.has(router)),
            "router",
            "an address of the subnet",
        )?;
        ensure(self.lease_s >= 60, "lease", "at least 60 seconds")
    }
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkSettings {
    /// Longest IP packet.
    pub mtu: u16,
    /// The services of the switch itself; without them it only switches.
    pub subnet: Option<Subnet>,
    /// The domain of its machines, such as `lab.internal`.
    pub domain: String,
    /// DNS servers for names outside of the domain, which machines are told of besides the gateway.
    pub dns: Vec<Ipv4Addr>,
}

impl NetworkSettings {
    /// Whether they make sense.
    ///
    /// # Errors
    /// [`SettingsError`] with the first field that does not.
    pub fn check(&self) -> Result<(), SettingsError> {
        ensure(
            (MTU_MIN..=MTU_MAX).contains(&self.mtu),
            "mtu",
            "a number from 576 to 9216",
        )?;
        let labels_are_good = self.domain.split('.').all(is_label);
        ensure(
            labels_are_good && self.domain.len() <= 128,
            "domain",
            "a DNS name",
        )?;
        ensure(self.dns.len() <= 4, "dns", "at most four servers")?;
        self.subnet.as_ref().map_or(Ok(()), Subnet::check)
    }
}

/// Whether `text` can be a label of a DNS name.
#[must_use]
pub fn is_label(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty()
        && text.len() <= NAME_BYTES_MAX
        && text.chars().all(inner)
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Whether a VLAN can have this number.
#[must_use]
pub fn is_vlan(vlan: u16) -> bool {
    (1..=4094).contains(&vlan)
}

/// What a port leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The network card of a machine.
    Machine,
    /// The world outside: a TAP, a bridge of the host, passt.
    Uplink,
}

/// Which VLANs a port has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vlan {
    /// One, whose tag the port never sees; 0 is the network without tags.
    Access(u16),
    /// Those named (none means all), with their tags, and the network without tags.
    Trunk(Vec<u16>),
}

impl Vlan {
    /// Whether frames of `vlan` may be here, and whether they have a tag here.
    #[must_use]
    pub fn carries(&self, vlan: u16) -> Option<bool> {
        match self {
            Self::Access(own) => (*own == vlan).then_some(false),
            Self::Trunk(_) if vlan == 0 => Some(false),
            Self::Trunk(vlans) => (vlans.is_empty() || vlans.contains(&vlan)).then_some(true),
        }
    }
}

/// Which other machines a machine may talk to. Everybody may talk to uplinks and to the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isolation {
    /// All that are open.
    Open,
    /// Those of the same tenant.
    Tenant(u32),
    /// None.
    Alone,
}

/// What a machine is held to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// It sends with its card's Ethernet address only.
    pub mac: bool,
    /// It sends with its own IP addresses only: fixed ones, its lease, and those that it was the first to
    /// claim where there are no leases.
    pub address: bool,
}

impl Guard {
    /// Everything.
    pub const FULL: Self = Self {
        mac: true,
        address: true,
    };
}

/// What a machine may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes; frames beyond wait in the machine's ring.
    pub bytes: Option<Rate>,
    /// Frames; those beyond wait in the machine's ring.
    pub frames: Option<Rate>,
    /// Frames to everybody or nobody known; those beyond are dropped.
    pub storm: Rate,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            bytes: None,
            frames: None,
            storm: Rate {
                per_s: 1000,
                burst: 2000,
            },
        }
    }
}

/// A port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSettings {
    /// Name of the machine, also in DNS, or of the uplink.
    pub name: String,
    /// What it leads to.
    pub role: Role,
    /// The Ethernet address of the machine's card.
    pub mac: Mac,
    /// Addresses that the machine has whether or not it asks for a lease; the first IPv4 address of the
    /// subnet is what it is leased.
    pub addresses: Vec<IpAddr>,
    /// Its VLANs.
    pub vlan: Vlan,
    /// Whom it may talk to.
    pub isolation: Isolation,
    /// What it is held to. Nothing of it holds for uplinks.
    pub guard: Guard,
    /// What its receiver does itself.
    pub offload: Offload,
    /// What it may send.
    pub limits: Limits,
}

impl PortSettings {
    /// Whether they make sense.
    ///
    /// # Errors
    /// [`SettingsError`] with the first field that does not.
    pub fn check(&self) -> Result<(), SettingsError> {
        ensure(is_label(&self.name), "name", "a label of a DNS name")?;
        ensure(
            self.role == Role::Uplink || self.mac.is_unicast(),
            "mac",
            "a unicast address",
        )?;
        ensure(
            self.addresses.len() <= ADDRESSES_MAX,
            "addresses",
            "at most 16",
        )?;
        let vlans_are_good = match &self.vlan {
            Vlan::Access(vlan) => *vlan == 0 || is_vlan(*vlan),
            Vlan::Trunk(vlans) => {
                vlans.len() <= TRUNK_VLANS_MAX && vlans.iter().all(|vlan| is_vlan(*vlan))
            }
        };
        ensure(vlans_are_good, "vlan", "numbers from 1 to 4094")?;
        let rates = [self.limits.bytes, self.limits.frames];
        let rates = rates.into_iter().flatten().chain([self.limits.storm]);
        ensure(
            rates
                .into_iter()
                .all(|rate| rate.per_s > 0 && rate.burst > 0),
            "limits",
            "rates above zero",
        )
    }

    /// Whether frames may pass between this port and `other`, VLANs aside.
    #[must_use]
    pub fn may_talk_to(&self, other: &Self) -> bool {
        match (self.role, other.role) {
            // They may lead to the same place, and frames would go round for ever.
            (Role::Uplink, Role::Uplink) => return false,
            (Role::Uplink, _) | (_, Role::Uplink) => return true,
            (Role::Machine, Role::Machine) => {}
        }
        match (self.isolation, other.isolation) {
            (Isolation::Open, Isolation::Open) => true,
            (Isolation::Tenant(own), Isolation::Tenant(others)) => own == others,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet() -> Subnet {
        Subnet {
            gateway: Ipv4Addr::new(10, 1, 2, 1),
            prefix: 24,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            pool: (Ipv4Addr::new(10, 1, 2, 10), Ipv4Addr::new(10, 1, 2, 200)),
            router: None,
            lease_s: 3600,
        }
    }

    #[test]
    fn subnet_that_contradicts_itself_is_refused() {
        assert_eq!(subnet().check(), Ok(()));
        let field = |subnet: Subnet| subnet.check().unwrap_err().field;
        let pool = |a: [u8; 4], b: [u8; 4]| Subnet {
            pool: (a.into(), b.into()),
            ..subnet()
        };
        assert_eq!(field(pool([10, 1, 2, 1], [10, 1, 2, 9])), "pool");
        assert_eq!(field(pool([10, 1, 2, 9], [10, 1, 2, 8])), "pool");
        assert_eq!(field(pool([10, 1, 2, 9], [10, 1, 2, 255])), "pool");
        let outside = Subnet {
            gateway: Ipv4Addr::new(10, 1, 3, 1),
            ..subnet()
        };
        assert_eq!(field(outside), "gateway");
        assert_eq!(
            field(Subnet {
                prefix: 31,
                ..subnet()
            }),
            "prefix"
        );
        let router = Some(Ipv4Addr::new(10, 9, 9, 9));
        assert_eq!(field(Subnet { router, ..subnet() }), "router");
    }

    #[test]
    fn tenants_are_apart_and_everybody_reaches_uplinks() {
        let port = |role, isolation| PortSettings {
            name: "m".to_owned(),
            role,
            mac: Mac([2; 6]),
            addresses: Vec::new(),
            vlan: Vlan::Access(0),
            isolation,
            guard: Guard::FULL,
            offload: Offload::default(),
            limits: Limits::default(),
        };
        let machine = |isolation| port(Role::Machine, isolation);
        let uplink = port(Role::Uplink, Isolation::Alone);
        let (a, b) = (machine(Isolation::Tenant(1)), machine(Isolation::Tenant(2)));
        let (open, alone) = (machine(Isolation::Open), machine(Isolation::Alone));
        assert!(a.may_talk_to(&a) && open.may_talk_to(&open));
        for (x, y) in [(&a, &b), (&a, &open), (&alone, &alone), (&alone, &open)] {
            assert!(!x.may_talk_to(y) && !y.may_talk_to(x));
        }
        for x in [&a, &b, &open, &alone] {
            assert!(x.may_talk_to(&uplink) && uplink.may_talk_to(x));
        }
        assert!(!uplink.may_talk_to(&uplink), "frames would go round");
    }
}
