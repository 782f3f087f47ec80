//! What a machine's card is in its virtual network: whose it is, which addresses it has, which VLANs.

use crate::vm::spec::is_network_name;
use bulkhead_ipc::protocol::switch::VlanTerms;
pub use bulkhead_switch::settings::is_vlan;
use bulkhead_switch::settings::{ADDRESSES_MAX, TRUNK_VLANS_MAX};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What the settings of a card are for.
pub const CARD_RULE: &str = "`network` beside `tenant`, `addresses`, `vlan` and `trunk`";
/// What the name of a tenant is.
pub const TENANT_RULE: &str = "the name of a tenant: 1 to 32 lower-case letters, digits or '-', of which '-' is neither first nor last";
/// What fixed addresses are.
pub const ADDRESSES_RULE: &str = "up to 16 IP addresses of one machine, each once";
/// What the number of a VLAN is.
pub const VLAN_RULE: &str = "a number from 1 to 4094";
/// What the VLANs of a trunk are.
pub const TRUNK_RULE: &str = "up to 64 numbers from 1 to 4094, each once; none means all";

/// A card's place in a virtual network.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CardSpec {
    /// Whose it is: it talks to cards of the same tenant only, and one without a tenant to those without.
    #[serde(default)]
    pub tenant: Option<String>,
    /// Addresses that it has without asking for a lease, at most [`ADDRESSES_MAX`]; the first of the subnet is what
    /// it is leased.
    #[serde(default)]
    pub addresses: Vec<IpAddr>,
    /// VLANs that its frames are in.
    #[serde(default)]
    pub vlan: CardVlan,
}

/// VLANs of a card.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum CardVlan {
    /// That of its network.
    #[default]
    Network,
    /// One, whose tag the machine does not see.
    Access(u16),
    /// Those named (none means all), with their tags, and the network without tags.
    Trunk(Vec<u16>),
}

impl CardVlan {
    /// The one that was named.
    #[must_use]
    pub const fn access(&self) -> Option<u16> {
        match self {
            Self::Access(vlan) => Some(*vlan),
            Self::Network | Self::Trunk(_) => None,
        }
    }

    /// Those that have their tags.
    #[must_use]
    pub const fn trunk(&self) -> Option<&Vec<u16>> {
        match self {
            Self::Trunk(vlans) => Some(vlans),
            Self::Network | Self::Access(_) => None,
        }
    }
}

/// Whether a trunk may have these VLANs.
#[must_use]
pub fn are_vlans(vlans: &[u16]) -> bool {
    vlans.len() <= TRUNK_VLANS_MAX && vlans.iter().all(|vlan| is_vlan(*vlan)) && is_each_once(vlans)
}

/// Whether a card may have these addresses.
#[must_use]
pub fn are_addresses(addresses: &[IpAddr]) -> bool {
    let of_one_machine = |address: &IpAddr| {
        let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
        !address.is_unspecified()
            && !address.is_multicast()
            && !address.is_loopback()
            && !is_broadcast
    };
    addresses.len() <= ADDRESSES_MAX
        && addresses.iter().all(of_one_machine)
        && is_each_once(addresses)
}

fn is_each_once<T: PartialEq>(all: &[T]) -> bool {
    let mut before = (0..).zip(all);
    before.all(|(n, one)| !all.get(..n).unwrap_or_default().contains(one))
}

impl CardSpec {
    /// Whether nothing is told of it.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        self == &Self::default()
    }

    /// Whether it makes sense.
    ///
    /// # Errors
    /// The field, its value, and what was expected.
    pub fn check(&self) -> Result<(), (&'static str, String, &'static str)> {
        if let Some(tenant) = self.tenant.as_ref().filter(|name| !is_network_name(name)) {
            return Err(("tenant", tenant.clone(), TENANT_RULE));
        }
        if !are_addresses(&self.addresses) {
            return Err(("addresses", format!("{:?}", self.addresses), ADDRESSES_RULE));
        }
        match &self.vlan {
            CardVlan::Access(vlan) if !is_vlan(*vlan) => Err(("vlan", vlan.to_string(), VLAN_RULE)),
            CardVlan::Trunk(vlans) if !are_vlans(vlans) => {
                Err(("trunk", format!("{vlans:?}"), TRUNK_RULE))
            }
            _ => Ok(()),
        }
    }

    /// As its switch hears it, in a network whose VLAN is `of_network`.
    #[must_use]
    pub fn vlan(&self, of_network: Option<u16>) -> VlanTerms {
        match &self.vlan {
            CardVlan::Network => VlanTerms::Access(of_network.unwrap_or(0)),
            CardVlan::Access(vlan) => VlanTerms::Access(*vlan),
            CardVlan::Trunk(vlans) => VlanTerms::Trunk(vlans.clone()),
        }
    }
}

/// Numbers of the tenants of one network.
#[derive(Debug, Default)]
pub struct Tenants(BTreeMap<String, u32>);

impl Tenants {
    /// The number of `tenant`, which no other has that is `present`.
    pub fn number<'a>(&mut self, tenant: &str, present: impl Iterator<Item = &'a str>) -> u32 {
        if let Some(number) = self.0.get(tenant) {
            return *number;
        }
        let present: Vec<_> = present.collect();
        self.0.retain(|name, _| present.contains(&name.as_str()));
        let taken: Vec<_> = self.0.values().copied().collect();
        let number = (0..).find(|number| !taken.contains(number)).unwrap_or(0);
        self.0.insert(tenant.to_owned(), number);
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_named() {
        let field = |card: CardSpec| card.check().map_err(|(field, ..)| field);
        let plain = CardSpec::default();
        assert!(plain.is_plain());
        assert_eq!(field(plain.clone()), Ok(()));
        let tenant = |name: &str| CardSpec {
            tenant: Some(name.to_owned()),
            ..CardSpec::default()
        };
        assert_eq!(field(tenant("acme-1")), Ok(()));
        for wrong in ["", "Acme", "-a", "a b"] {
            assert_eq!(field(tenant(wrong)), Err("tenant"), "{wrong}");
        }
        let addresses = |all: &[&str]| CardSpec {
            addresses: all.iter().map(|one| one.parse().unwrap()).collect(),
            ..CardSpec::default()
        };
        assert_eq!(field(addresses(&["10.0.0.5", "fd00::5"])), Ok(()));
        for wrong in [
            "0.0.0.0",
            "224.0.0.1",
            "127.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
        ] {
            assert_eq!(field(addresses(&[wrong])), Err("addresses"), "{wrong}");
        }
        assert_eq!(field(addresses(&["10.0.0.5"; 2])), Err("addresses"));
        let vlan = |vlan| CardSpec {
            vlan,
            ..CardSpec::default()
        };
        assert_eq!(field(vlan(CardVlan::Access(4094))), Ok(()));
        assert_eq!(field(vlan(CardVlan::Access(0))), Err("vlan"));
        assert_eq!(field(vlan(CardVlan::Trunk(vec![]))), Ok(()));
        assert_eq!(field(vlan(CardVlan::Trunk(vec![7, 7]))), Err("trunk"));
        assert_eq!(field(vlan(CardVlan::Trunk(vec![4095]))), Err("trunk"));
        let many = (1..=65).collect();
        assert_eq!(field(vlan(CardVlan::Trunk(many))), Err("trunk"));
    }

    #[test]
    fn tenants_that_are_there_have_numbers_of_their_own() {
        let mut tenants = Tenants::default();
        assert_eq!(tenants.number("a", [].into_iter()), 0);
        assert_eq!(tenants.number("b", ["a"].into_iter()), 1);
        assert_eq!(tenants.number("a", ["a", "b"].into_iter()), 0);
        // Whoever is gone leaves its number to others.
        assert_eq!(tenants.number("c", ["b"].into_iter()), 0);
        assert_eq!(tenants.number("b", ["b", "c"].into_iter()), 1);
    }
}
