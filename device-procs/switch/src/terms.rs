//! What the broker says of a network and its ports, as this library understands it. Whatever is wrong with it is found by
//! [`NetworkSettings::check`] and [`PortSettings::check`], which nobody leaves out: the switch takes nothing else.

use crate::leases::Lease;
use crate::offload::Offload;
use crate::settings::{
    Guard, Isolation, Limits, NetworkSettings, PortSettings, Role, Subnet, Vlan,
};
use crate::wire::Mac;
use bulkhead_ipc::protocol::switch::{
    IsolationTerms, LeaseTerms, PortTerms, SubnetTerms, SwitchConfig, VlanTerms,
};
use std::time::Duration;

impl From<&SwitchConfig> for NetworkSettings {
    fn from(config: &SwitchConfig) -> Self {
        Self {
            mtu: config.mtu,
            subnet: config.subnet.as_ref().map(Subnet::from),
            domain: config.domain.clone(),
            dns: config.dns.clone(),
        }
    }
}

impl From<&SubnetTerms> for Subnet {
    fn from(terms: &SubnetTerms) -> Self {
        Self {
            gateway: terms.gateway,
            prefix: terms.prefix,
            mac: Mac(terms.mac),
            pool: terms.pool,
            router: terms.router,
            lease_s: terms.lease_s,
        }
    }
}

/// A port in `role`. A card's process does everything for a driver that this cannot do itself, but for congestion
/// notification of large segments, which drivers are not offered.
#[must_use]
pub fn port(terms: &PortTerms, role: Role) -> PortSettings {
    let limits = Limits::default();
    PortSettings {
        name: terms.name.clone(),
        role,
        mac: Mac(terms.mac),
        addresses: terms.addresses.clone(),
        vlan: match &terms.vlan {
            VlanTerms::Access(vlan) => Vlan::Access(*vlan),
            VlanTerms::Trunk(vlans) => Vlan::Trunk(vlans.clone()),
        },
        isolation: match terms.isolation {
            IsolationTerms::Open => Isolation::Open,
            IsolationTerms::Tenant(tenant) => Isolation::Tenant(tenant),
            IsolationTerms::Alone => Isolation::Alone,
        },
        guard: Guard {
            mac: terms.guard.0,
            address: terms.guard.1,
        },
        offload: Offload {
            ecn: role == Role::Uplink,
            ..Offload::ALL
        },
        limits: Limits {
            bytes: terms.bytes,
            frames: terms.frames,
            storm: terms.storm.unwrap_or(limits.storm),
        },
    }
}

impl From<&LeaseTerms> for Lease {
    fn from(terms: &LeaseTerms) -> Self {
        Self {
            mac: Mac(terms.mac),
            address: terms.address,
            left: Duration::from_secs(terms.left_s.into()),
        }
    }
}

impl From<&Lease> for LeaseTerms {
    fn from(lease: &Lease) -> Self {
        Self {
            mac: lease.mac.0,
            address: lease.address,
            left_s: u32::try_from(lease.left.as_secs()).unwrap_or(u32::MAX),
        }
    }
}
