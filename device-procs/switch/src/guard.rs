//! Whether a machine says in a frame who it is: its Ethernet address, its IP addresses in packets, ARP and
//! neighbour discovery, and that it is neither router nor DHCP server.

use crate::bindings::Bindings;
use crate::settings::{PortSettings, Role, Subnet, Vlan};
use crate::wire::{
    Arp, ETHERNET_BYTES, Ethernet, Ipv4, Ipv6, Mac, PROTOCOL_ICMPV6, PROTOCOL_UDP, TYPE_ARP,
    TYPE_IPV4, TYPE_IPV6, bytes_at, ipv6_at, mac_at, ports, u8_at,
};
use crate::{Cause, PortId};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Instant;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DHCPV6_SERVER: u16 = 547;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
/// Messages of neighbour discovery.
const DISCOVERY: std::ops::RangeInclusive<u8> = 133..=137;
/// The first Ethertype; what is below is a length (IEEE 802.3, section 3.2.6).
const TYPES_FROM: u16 = 0x0600;
/// Options of a discovery message that are looked at.
const OPTIONS_MAX: usize = 16;

/// Where a frame came from.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub(crate) port: PortId,
    pub(crate) settings: &'a PortSettings,
    pub(crate) vlan: u16,
    pub(crate) subnet: Option<&'a Subnet>,
    pub(crate) now: Instant,
}

impl Origin<'_> {
    /// Judges an untagged frame.
    pub(crate) fn judge(
        &self,
        ethernet: Ethernet,
        frame: &[u8],
        bindings: &mut Bindings,
    ) -> Result<(), Cause> {
        if !ethernet.src.is_unicast() || self.is_gateway(ethernet.src) {
            return Err(Cause::Mac);
        }
        if self.settings.role == Role::Uplink {
            return Ok(());
        }
        if self.settings.guard.mac && ethernet.src != self.settings.mac {
            return Err(Cause::Mac);
        }
        if !self.settings.guard.address {
            return Ok(());
        }
        let packet = frame.get(ETHERNET_BYTES..).unwrap_or_default();
        match ethernet.kind {
            TYPE_ARP => {
                let arp = Arp::read(packet).ok_or(Cause::Malformed)?;
                self.arp(ethernet, arp, bindings)
            }
            TYPE_IPV4 => {
                let ip = Ipv4::read(packet).ok_or(Cause::Malformed)?;
                self.ipv4(ip, bindings)
            }
            TYPE_IPV6 => {
                let ip = Ipv6::read(packet).ok_or(Cause::Malformed)?;
                self.ipv6(ethernet, ip, bindings)
            }
            // A length instead of a type: what is in there could be any of these, for whoever unpacks it.
            kind if kind < TYPES_FROM => Err(Cause::Malformed),
            _ => Ok(()),
        }
    }

    fn is_gateway(&self, mac: Mac) -> bool {
        self.subnet.is_some_and(|subnet| subnet.mac == mac)
    }

    fn arp(&self, ethernet: Ethernet, arp: Arp, bindings: &mut Bindings) -> Result<(), Cause> {
        if arp.sender != ethernet.src {
            return Err(Cause::Mac);
        }
        // Probes have no sender yet.
        let owns = arp.sender_ip.is_unspecified() || self.owns(arp.sender_ip.into(), bindings);
        if owns { Ok(()) } else { Err(Cause::Address) }
    }

    fn ipv4(&self, ip: Ipv4<'_>, bindings: &mut Bindings) -> Result<(), Cause> {
        let udp = (ip.protocol == PROTOCOL_UDP && ip.has_start)
            .then(|| ports(ip.payload))
            .flatten();
        if udp.is_some_and(|(from, _)| from == DHCP_SERVER) {
            return Err(Cause::Role);
        }
        let asks_for_a_lease = udp == Some((DHCP_CLIENT, DHCP_SERVER));
        if asks_for_a_lease && ip.src.is_unspecified() {
            return Ok(());
        }
        // Joins of multicast groups may have no sender yet either (RFC 3376, 4.2.13).
        if ip.src.is_unspecified() && ip.protocol == 2 && ip.dst.is_multicast() {
            return Ok(());
        }
        if self.owns(ip.src.into(), bindings) {
            Ok(())
        } else {
            Err(Cause::Address)
        }
    }

    fn ipv6(&self, ethernet: Ethernet, ip: Ipv6<'_>, bindings: &mut Bindings) -> Result<(), Cause> {
        if ip.has_start && ip.protocol == PROTOCOL_UDP {
            let (from, _) = ports(ip.payload).ok_or(Cause::Malformed)?;
            if from == DHCPV6_SERVER {
                return Err(Cause::Role);
            }
        }
        if ip.has_start && ip.protocol == PROTOCOL_ICMPV6 {
            let kind = u8_at(ip.payload, 0).ok_or(Cause::Malformed)?;
            if matches!(kind, ROUTER_ADVERTISEMENT | REDIRECT) {
                return Err(Cause::Role);
            }
            if DISCOVERY.contains(&kind) {
                // Fragments of these are not to be sent (RFC 6980), and could not be judged.
                if ip.is_fragment {
                    return Err(Cause::Malformed);
                }
                return self.discovery(ethernet, ip, kind, bindings);
            }
        }
        // Listeners of multicast groups report with no address before they have one.
        if ip.src.is_unspecified() && ip.protocol == PROTOCOL_ICMPV6 && ip.dst.is_multicast() {
            return Ok(());
        }
        if self.owns(ip.src.into(), bindings) {
            Ok(())
        } else {
            Err(Cause::Address)
        }
    }

    fn discovery(
        &self,
        ethernet: Ethernet,
        ip: Ipv6<'_>,
        kind: u8,
        bindings: &mut Bindings,
    ) -> Result<(), Cause> {
        let is_about_target = matches!(kind, NEIGHBOUR_SOLICITATION | NEIGHBOUR_ADVERTISEMENT);
        let options = if is_about_target { 24 } else { 8 };
        let claimed = match kind {
            NEIGHBOUR_ADVERTISEMENT => Some(ipv6_at(ip.payload, 8).ok_or(Cause::Malformed)?),
            // Who asks without an address wants the target for itself.
            NEIGHBOUR_SOLICITATION if ip.src.is_unspecified() => {
                Some(ipv6_at(ip.payload, 8).ok_or(Cause::Malformed)?)
            }
            _ => None,
        };
        let mut rest = ip.payload.get(options..).ok_or(Cause::Malformed)?;
        for _ in 0..OPTIONS_MAX {
            let Some([option, len]) = bytes_at::<2>(rest, 0) else {
                break;
            };
            let len = usize::from(len) * 8;
            let (Some(body), Some(behind)) = (rest.get(..len), rest.get(len..)) else {
                return Err(Cause::Malformed);
            };
            if len == 0 {
                return Err(Cause::Malformed);
            }
            if matches!(option, 1 | 2) && mac_at(body, 2) != Some(ethernet.src) {
                return Err(Cause::Mac);
            }
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(Cause::Malformed);
        }
        let source = (!ip.src.is_unspecified()).then_some(ip.src);
        for address in claimed.into_iter().chain(source) {
            if !self.owns(address.into(), bindings) {
                return Err(Cause::Address);
            }
        }
        Ok(())
    }

    /// Whether the machine may use the address.
    fn owns(&self, address: IpAddr, bindings: &mut Bindings) -> bool {
        let has_leases = self.subnet.is_some() && self.vlan == 0;
        match address {
            IpAddr::V4(address) => {
                let is_host = is_host_v4(address);
                if has_leases || self.has_fixed(|a| matches!(a, IpAddr::V4(_))) {
                    return is_host && bindings.has(self.vlan, address.into(), self.port, self.now);
                }
                is_host && bindings.claim(self.vlan, address.into(), self.port, self.now)
            }
            IpAddr::V6(address) => {
                let is_link_local = address.is_unicast_link_local();
                if !is_host_v6(address) {
                    return false;
                }
                // A card always makes itself an address of the link; with others told, it has those only.
                if !is_link_local && self.has_fixed(|a| matches!(a, IpAddr::V6(_))) {
                    return bindings.has(self.vlan, address.into(), self.port, self.now);
                }
                bindings.claim(self.vlan, address.into(), self.port, self.now)
            }
        }
    }

    fn has_fixed(&self, kind: impl Fn(&IpAddr) -> bool) -> bool {
        self.settings.addresses.iter().any(kind)
    }
}

fn is_host_v4(address: Ipv4Addr) -> bool {
    !(address.is_multicast()
        || address.is_broadcast()
        || address.is_unspecified()
        || address.is_loopback())
}

fn is_host_v6(address: Ipv6Addr) -> bool {
    !(address.is_multicast() || address.is_unspecified() || address.is_loopback())
}

/// The VLAN of the addresses that a port is told.
pub(crate) const fn home(vlan: &Vlan) -> u16 {
    match vlan {
        Vlan::Access(vlan) => *vlan,
        Vlan::Trunk(_) => 0,
    }
}
