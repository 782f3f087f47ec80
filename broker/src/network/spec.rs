//! What a virtual network is told to be: by its owner, in the registry, and as its switch hears it.

use super::card::{CardSpec, CardVlan};
use super::is_interface_name;
use crate::vm::spec::{NETWORK_NAME_RULE, NetSource, is_network_name};
use bulkhead_ipc::protocol::birth::Rate;
use bulkhead_ipc::protocol::switch::{
    IsolationTerms, PORT_NAME_BYTES_MAX, PortTerms, SubnetTerms, SwitchConfig, VlanTerms,
};
use bulkhead_switch::{NetworkSettings, Role, mac_of, terms};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Most uplinks of a network.
pub const UPLINKS_MAX: usize = 8;
/// The addresses of a network that is told nothing else.
pub const SUBNET_DEFAULT: &str = "10.87.0.0/24";
/// How long a lease holds unless something else is said, in seconds.
pub const LEASE_S_DEFAULT: u32 = 3600;
/// Longest IP packet unless something else is said.
pub const MTU_DEFAULT: u16 = 1500;

/// A virtual network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name.
    pub name: String,
    /// Longest IP packet in bytes.
    #[serde(default = "mtu")]
    pub mtu: u16,
    /// Addresses that are leased to its machines; without them it only switches.
    #[serde(default)]
    pub subnet: Option<SubnetSpec>,
    /// Domain of its machines' names.
    pub domain: String,
    /// DNS servers for other names, that machines are told of.
    #[serde(default)]
    pub dns: Vec<Ipv4Addr>,
    /// Whether its machines may talk to uplinks and the gateway alone.
    #[serde(default)]
    pub isolated: bool,
    /// VLAN of its machines, which their frames have at uplinks.
    #[serde(default)]
    pub vlan: Option<u16>,
    /// What each machine's card may send.
    #[serde(default)]
    pub limits: PortLimits,
    /// Ways out.
    #[serde(default)]
    pub uplinks: Vec<UplinkSpec>,
}

const fn mtu() -> u16 {
    MTU_DEFAULT
}

/// What a card may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortLimits {
    /// Bytes of frames.
    #[serde(default)]
    pub bytes: Option<Rate>,
    /// Frames.
    #[serde(default)]
    pub packets: Option<Rate>,
}

/// IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SubnetSpec {
    /// The switch's own, which answers DHCP and DNS and routes nothing.
    pub gateway: Ipv4Addr,
    /// Bits of the network part.
    pub prefix: u8,
    /// First address that is leased.
    pub first: Ipv4Addr,
    /// Last address that is leased.
    pub last: Ipv4Addr,
    /// Router that machines are told of: an address behind an uplink.
    #[serde(default)]
    pub router: Option<Ipv4Addr>,
    /// How long a lease holds in seconds.
    pub lease_s: u32,
}

/// A way out of a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UplinkSpec {
    /// A TAP interface of the host, which is made if it is not there.
    Tap(String),
    /// A TAP interface that is made and put into this bridge of the host.
    Bridge(String),
}

impl UplinkSpec {
    /// As network devices have it.
    #[must_use]
    pub fn source(&self) -> NetSource {
        match self {
            Self::Tap(name) => NetSource::Tap(name.clone()),
            Self::Bridge(name) => NetSource::Bridge(name.clone()),
        }
    }

    const fn interface(&self) -> &String {
        match self {
            Self::Tap(name) | Self::Bridge(name) => name,
        }
    }
}

impl SubnetSpec {
    /// The subnet `text`, such as `10.7.0.0/24`: its first address is the gateway's, the others are leased.
    ///
    /// # Errors
    /// What was expected.
    pub fn parse(text: &str) -> Result<Self, String> {
        let expected =
            || "expected a subnet such as 10.7.0.0/24, with a prefix of 8 to 29".to_owned();
        let (address, prefix) = text.split_once('/').ok_or_else(expected)?;
        let address: Ipv4Addr = address.parse().map_err(|_| expected())?;
        let prefix: u8 = prefix.parse().map_err(|_| expected())?;
        if !(8..=29).contains(&prefix) {
            return Err(expected());
        }
        let hosts = u32::MAX >> prefix;
        let network = u32::from(address);
        if network & hosts != 0 {
            return Err("expected the address of a network: its host bits are not zero".to_owned());
        }
        Ok(Self {
            gateway: (network + 1).into(),
            prefix,
            first: (network + 2).into(),
            last: (network + hosts - 1).into(),
            router: None,
            lease_s: LEASE_S_DEFAULT,
        })
    }
}

impl SubnetSpec {
    /// With the switch at `gateway`, and the longer run of addresses before or behind it leased.
    #[must_use]
    pub fn with_gateway(self, gateway: Ipv4Addr) -> Self {
        let hosts = u32::MAX.checked_shr(self.prefix.into()).unwrap_or(0);
        let network = u32::from(self.gateway) & !hosts;
        let (low, high) = (network + 1, network + hosts.saturating_sub(1));
        let at = u32::from(gateway);
        if !(low..=high).contains(&at) {
            // That it is outside is found when the network is checked.
            return Self { gateway, ..self };
        }
        let (first, last) = match at - low > high - at {
            true => (low, at - 1),
            false => (at + 1, high),
        };
        Self {
            gateway,
            first: first.into(),
            last: last.into(),
            ..self
        }
    }
}

impl NetworkSpec {
    /// One of which only the name is told.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            mtu: MTU_DEFAULT,
            subnet: SubnetSpec::parse(SUBNET_DEFAULT).ok(),
            domain: format!("{name}.internal"),
            dns: Vec::new(),
            isolated: false,
            vlan: None,
            limits: PortLimits::default(),
            uplinks: Vec::new(),
        }
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// The field, its value and what was expected.
    pub fn check(&self) -> Result<(), String> {
        let name = crate::escape::excerpt(&self.name, 64);
        if !is_network_name(&self.name) {
            return Err(format!("name = {name}: expected {NETWORK_NAME_RULE}"));
        }
        let switch = NetworkSettings::from(&self.switch());
        switch.check().map_err(|error| error.to_string())?;
        let card = self.machine("m", [2; 6], &CardSpec::default(), None);
        let port = terms::port(&card, Role::Machine);
        port.check().map_err(|error| error.to_string())?;
        if self.vlan.is_some() && self.subnet.is_some() {
            return Err(
                "vlan: expected no subnet beside it, since the gateway serves the network without tags only"
                    .to_owned(),
            );
        }
        if self.vlan == Some(0) {
            return Err("vlan: expected a number from 1 to 4094".to_owned());
        }
        if self.uplinks.len() > UPLINKS_MAX {
            return Err(format!("uplinks: expected at most {UPLINKS_MAX}"));
        }
        for (n, uplink) in self.uplinks.iter().enumerate() {
            if !is_interface_name(uplink.interface()) {
                let interface = crate::escape::excerpt(uplink.interface(), 64);
                return Err(format!(
                    "uplinks[{n}] = {interface}: expected the name of a network interface"
                ));
            }
            if self.uplinks.iter().take(n).any(|other| other == uplink) {
                return Err(format!(
                    "uplinks[{n}]: expected one that it does not have already"
                ));
            }
        }
        Ok(())
    }

    /// What its switch is told at birth.
    #[must_use]
    pub fn switch(&self) -> SwitchConfig {
        SwitchConfig {
            mtu: self.mtu,
            subnet: self.subnet.map(|subnet| SubnetTerms {
                gateway: subnet.gateway,
                prefix: subnet.prefix,
                mac: mac_of(&self.name, "", 0).0,
                pool: (subnet.first, subnet.last),
                router: subnet.router,
                lease_s: subnet.lease_s,
            }),
            domain: self.domain.clone(),
            dns: self.dns.clone(),
        }
    }

    /// Whether a card may be plugged into it.
    ///
    /// # Errors
    /// The field, its value and what was expected.
    pub fn takes(&self, card: &CardSpec) -> Result<(), String> {
        if let Some(tenant) = card.tenant.as_ref().filter(|_| self.isolated) {
            return Err(format!(
                "tenant = {tenant}: expected none in an isolated network, where every machine is alone"
            ));
        }
        if let Some(vlan) = self.vlan.filter(|_| card.vlan != CardVlan::Network) {
            return Err(format!(
                "vlan, trunk: expected none in a network that is VLAN {vlan} as a whole"
            ));
        }
        let Some(subnet) = &self.subnet else {
            return Ok(());
        };
        let taken = [Some(subnet.gateway), subnet.router];
        let taken = card.addresses.iter().find(|address| {
            let taken = taken.iter().flatten().any(|taken| *address == taken);
            taken && card.vlan == CardVlan::Network
        });
        taken.map_or(Ok(()), |address| {
            Err(format!(
                "addresses = {address}: expected others than those of gateway and router"
            ))
        })
    }

    /// What its switch is told of a machine's card, whose tenant has the number `tenant`.
    #[must_use]
    pub fn machine(
        &self,
        name: &str,
        mac: [u8; 6],
        card: &CardSpec,
        tenant: Option<u32>,
    ) -> PortTerms {
        PortTerms {
            name: label(name),
            mac,
            addresses: card.addresses.clone(),
            vlan: card.vlan(self.vlan),
            isolation: match (self.isolated, tenant) {
                (true, _) => IsolationTerms::Alone,
                (false, Some(tenant)) => IsolationTerms::Tenant(tenant),
                (false, None) => IsolationTerms::Open,
            },
            guard: (true, true),
            bytes: self.limits.bytes,
            frames: self.limits.packets,
            storm: None,
        }
    }

    /// What its switch is told of an uplink. What comes from outside is not limited: what there is for everybody
    /// goes to each machine once.
    #[must_use]
    pub fn uplink(&self, n: usize) -> PortTerms {
        PortTerms {
            name: format!("uplink-{n}"),
            mac: [0; 6],
            addresses: Vec::new(),
            vlan: VlanTerms::Trunk(self.vlan.into_iter().collect()),
            isolation: IsolationTerms::Open,
            guard: (false, false),
            bytes: None,
            frames: None,
            storm: None,
        }
    }
}

/// The name of a machine as DNS can have it.
#[must_use]
pub fn label(machine: &str) -> String {
    let plain = machine.chars().take(PORT_NAME_BYTES_MAX);
    let plain: String = plain
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    match plain.trim_matches('-') {
        "" => "machine".to_owned(),
        label => label.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnet_has_a_gateway_and_leases_the_rest() {
        let subnet = SubnetSpec::parse("10.7.0.0/24").unwrap();
        assert_eq!(subnet.gateway, Ipv4Addr::new(10, 7, 0, 1));
        assert_eq!(subnet.first, Ipv4Addr::new(10, 7, 0, 2));
        assert_eq!(subnet.last, Ipv4Addr::new(10, 7, 0, 254));
        for wrong in [
            "10.7.0.1/24",
            "10.7.0.0",
            "10.7.0.0/30",
            "10.0.0.0/7",
            "x/24",
            "10.7.0.0/x",
        ] {
            assert!(SubnetSpec::parse(wrong).is_err(), "{wrong}");
        }
        for prefix in 8..=29 {
            let text = format!("10.0.0.0/{prefix}");
            let spec = NetworkSpec {
                subnet: Some(SubnetSpec::parse(&text).unwrap()),
                ..NetworkSpec::new("lab")
            };
            spec.check().unwrap();
        }
    }

    #[test]
    fn contradictions_are_named() {
        NetworkSpec::new("lab").check().unwrap();
        let wrong = |change: fn(&mut NetworkSpec), word: &str| {
            let mut spec = NetworkSpec::new("lab");
            change(&mut spec);
            let error = spec.check().unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        wrong(|spec| spec.name = "Lab".into(), "name = Lab");
        wrong(|spec| spec.mtu = 100, "mtu");
        wrong(|spec| spec.domain = "no domain".into(), "domain");
        wrong(|spec| spec.vlan = Some(7), "no subnet beside it");
        wrong(|spec| (spec.vlan, spec.subnet) = (Some(4095), None), "vlan");
        wrong(|spec| (spec.vlan, spec.subnet) = (Some(0), None), "vlan");
        wrong(
            |spec| spec.uplinks = vec![UplinkSpec::Tap("a/b".into())],
            "uplinks[0]",
        );
        wrong(
            |spec| spec.uplinks = vec![UplinkSpec::Tap("a".into()); 2],
            "uplinks[1]",
        );
        wrong(
            |spec| {
                if let Some(subnet) = &mut spec.subnet {
                    subnet.last = Ipv4Addr::new(10, 1, 1, 1);
                }
            },
            "pool",
        );
        wrong(
            |spec| spec.limits.packets = Some(Rate { per_s: 0, burst: 1 }),
            "limits",
        );
    }

    #[test]
    fn cards_that_contradict_their_network_are_refused() {
        let lab = NetworkSpec::new("lab");
        let card = CardSpec {
            tenant: Some("acme".into()),
            addresses: vec!["10.87.0.9".parse().unwrap()],
            vlan: CardVlan::Access(7),
        };
        lab.takes(&card).unwrap();
        let terms = lab.machine("m", [2; 6], &card, Some(3));
        assert_eq!(terms.isolation, IsolationTerms::Tenant(3));
        assert_eq!(terms.vlan, VlanTerms::Access(7));
        let refused = |network: &NetworkSpec, card: &CardSpec, word: &str| {
            let error = network.takes(card).unwrap_err();
            assert!(error.contains(word), "{error}");
        };
        let isolated = NetworkSpec {
            isolated: true,
            ..lab.clone()
        };
        refused(&isolated, &card, "tenant = acme");
        let tagged = NetworkSpec {
            vlan: Some(5),
            subnet: None,
            ..lab.clone()
        };
        refused(&tagged, &card, "VLAN 5");
        let gateway = CardSpec {
            addresses: vec!["10.87.0.1".parse().unwrap()],
            ..CardSpec::default()
        };
        refused(&lab, &gateway, "addresses = 10.87.0.1");
    }

    #[test]
    fn names_of_machines_become_labels() {
        for (name, wanted) in [
            ("web", "web"),
            ("a.b_c", "a-b-c"),
            ("x.", "x"),
            ("_", "machine"),
        ] {
            assert_eq!(label(name), wanted);
        }
        assert_eq!(label(&"a".repeat(80)).len(), 63);
    }

    #[test]
    fn what_is_kept_is_read_back() {
        let mut spec = NetworkSpec::new("lab");
        spec.uplinks = vec![UplinkSpec::Bridge("br0".into())];
        spec.limits.bytes = Some(Rate { per_s: 5, burst: 6 });
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<NetworkSpec>(&text).unwrap(), spec);
        let short = r#"{"name":"lab","domain":"lab.internal"}"#;
        let short: NetworkSpec = serde_json::from_str(short).unwrap();
        assert_eq!((short.mtu, short.subnet), (1500, None));
        assert!(serde_json::from_str::<NetworkSpec>(r#"{"nmae":"lab"}"#).is_err());
    }
}
