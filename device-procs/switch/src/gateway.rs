//! The switch's own address: ARP, echo, DHCP and DNS. It answers whoever asked, at the port where he asked, and
//! routes nothing.

use crate::PortId;
use crate::bindings::Bindings;
use crate::checksum;
use crate::dhcp::{self, Asks, Offer, Says};
use crate::dns::{self, Directory};
use crate::guard::Origin;
use crate::leases::Leases;
use crate::settings::{NetworkSettings, PortSettings, Role, Subnet};
use crate::wire::{
    Arp, ETHERNET_BYTES, Ethernet, IPV4_BYTES, Ipv4, Mac, PROTOCOL_ICMP, PROTOCOL_UDP, TYPE_ARP,
    TYPE_IPV4, UDP_BYTES, bytes_at, ports, put, u8_at, u16_at,
};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

const ICMP_ECHO: u8 = 8;
const ICMP_ECHO_REPLY: u8 = 0;
const ARP_REQUEST: u16 = 1;

/// What became of a frame.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Handled {
    /// It is not for the gateway alone: it goes its way.
    Passed,
    /// It was, and this goes back to its port.
    Answered(Vec<u8>),
    /// It was, and there is nothing to say.
    Silent,
    /// It was, and there is no such service.
    Unserved,
}

/// What the services work on while they answer one frame.
pub(crate) struct Services<'a> {
    pub(crate) settings: &'a NetworkSettings,
    pub(crate) ports: &'a BTreeMap<PortId, PortSettings>,
    pub(crate) leases: &'a mut Leases,
    pub(crate) bindings: &'a mut Bindings,
    /// Whether the frame's checksum was not made yet.
    pub(crate) unchecked: bool,
}

/// A datagram with its addresses.
struct Datagram<'a> {
    from: (Ipv4Addr, u16),
    to: (Ipv4Addr, u16),
    payload: &'a [u8],
}

impl Services<'_> {
    /// Looks at an untagged frame of the network without tags.
    pub(crate) fn handle(
        &mut self,
        origin: &Origin<'_>,
        ethernet: Ethernet,
        frame: &[u8],
    ) -> Handled {
        let Some(subnet) = origin.subnet else {
            return Handled::Passed;
        };
        let is_own = ethernet.dst == subnet.mac;
        if !is_own && ethernet.dst != Mac::BROADCAST {
            return Handled::Passed;
        }
        let packet = frame.get(ETHERNET_BYTES..).unwrap_or_default();
        let not_served = if is_own {
            Handled::Unserved
        } else {
            Handled::Passed
        };
        match ethernet.kind {
            TYPE_ARP => match Arp::read(packet) {
                Some(arp) if arp.operation == ARP_REQUEST && arp.target_ip == subnet.gateway => {
                    Handled::Answered(arp_reply(subnet, arp))
                }
                _ => not_served,
            },
            TYPE_IPV4 => match Ipv4::read(packet) {
                Some(ip) if !ip.is_fragment => {
                    self.ipv4(origin, subnet, ethernet, packet, ip, not_served)
                }
                _ => not_served,
            },
            _ => not_served,
        }
    }

    fn ipv4(
        &mut self,
        origin: &Origin<'_>,
        subnet: &Subnet,
        ethernet: Ethernet,
        packet: &[u8],
        ip: Ipv4<'_>,
        not_served: Handled,
    ) -> Handled {
        let header = packet.get(..ip.header_bytes).unwrap_or_default();
        let is_for_us = ip.dst == subnet.gateway;
        let datagram = (ip.protocol == PROTOCOL_UDP)
            .then(|| Datagram::read(&ip))
            .flatten();
        let is_dhcp = datagram
            .as_ref()
            .is_some_and(|d| d.to.1 == dhcp::SERVER && (is_for_us || d.to.0.is_broadcast()));
        if !is_for_us && !is_dhcp {
            return not_served;
        }
        if checksum::fold(checksum::add(0, header)) != 0 {
            return Handled::Unserved;
        }
        match (ip.protocol, datagram) {
            (PROTOCOL_ICMP, _) => echo(subnet, ethernet, ip),
            (PROTOCOL_UDP, Some(datagram)) => {
                let has_checksum = u16_at(ip.payload, 6) != Some(0) && !self.unchecked;
                let whole = ip.payload.get(..UDP_BYTES + datagram.payload.len());
                let whole = whole.unwrap_or_default();
                if has_checksum && !checksum::is_right(ip.src, ip.dst, PROTOCOL_UDP, whole) {
                    return Handled::Unserved;
                }
                self.datagram(origin, subnet, ethernet, &datagram)
            }
            _ => Handled::Unserved,
        }
    }

    fn datagram(
        &mut self,
        origin: &Origin<'_>,
        subnet: &Subnet,
        ethernet: Ethernet,
        datagram: &Datagram<'_>,
    ) -> Handled {
        match datagram.to.1 {
            // An uplink's clients have servers of their own.
            dhcp::SERVER if origin.settings.role == Role::Uplink => Handled::Passed,
            dhcp::SERVER if datagram.from.1 == dhcp::CLIENT => {
                self.dhcp(origin, subnet, ethernet, datagram)
            }
            dns::PORT => {
                let directory = Names {
                    asker: origin.settings,
                    settings: self.settings,
                    subnet,
                    ports: self.ports,
                    bindings: self.bindings,
                };
                match dns::answer(datagram.payload, &directory) {
                    Some(answer) => {
                        let back = (ethernet.src, datagram.from.0, datagram.from.1);
                        Handled::Answered(udp(subnet, dns::PORT, back, &answer))
                    }
                    None => Handled::Silent,
                }
            }
            _ => Handled::Unserved,
        }
    }

    fn dhcp(
        &mut self,
        origin: &Origin<'_>,
        subnet: &Subnet,
        ethernet: Ethernet,
        datagram: &Datagram<'_>,
    ) -> Handled {
        let Some(request) = dhcp::Request::read(datagram.payload) else {
            return Handled::Unserved;
        };
        if request.mac != ethernet.src {
            return Handled::Unserved;
        }
        let Some((says, address)) = self.decide(origin, subnet, &request) else {
            return Handled::Silent;
        };
        let offer = Offer {
            subnet,
            name: &origin.settings.name,
            domain: &self.settings.domain,
            dns: &self.settings.dns,
            mtu: self.settings.mtu,
        };
        let answer = dhcp::answer(&request, says, address, &offer);
        let everybody = says == Says::Nak || request.wants_broadcast;
        let ip = match (everybody, address) {
            (true, _) => Ipv4Addr::BROADCAST,
            (false, Some(address)) => address,
            (false, None) => request.has,
        };
        let mac = if everybody {
            Mac::BROADCAST
        } else {
            ethernet.src
        };
        let back = (mac, ip, dhcp::CLIENT);
        Handled::Answered(udp(subnet, dhcp::SERVER, back, &answer))
    }

    /// What the server says to a request (RFC 2131, section 4.3), and the address that it is about.
    fn decide(
        &mut self,
        origin: &Origin<'_>,
        subnet: &Subnet,
        request: &dhcp::Request,
    ) -> Option<(Says, Option<Ipv4Addr>)> {
        if request
            .server
            .is_some_and(|server| server != subnet.gateway)
        {
            return None;
        }
        match request.asks {
            Asks::Inform => return Some((Says::Ack, None)),
            Asks::Release => {
                self.leases.confirm(request.mac, origin.now);
                return None;
            }
            Asks::Other => return None,
            Asks::Discover | Asks::Request => {}
        }
        let own_card = request.mac == origin.settings.mac;
        let mut told = origin.settings.addresses.iter();
        let fixed = told.find_map(|address| match address {
            IpAddr::V4(address) if own_card && subnet.has(*address) => Some(*address),
            _ => None,
        });
        let address = self.leases.address(
            subnet,
            request.mac,
            origin.port,
            fixed,
            origin.now,
            |address| is_free(self.ports, subnet, address),
        )?;
        if request.asks == Asks::Discover {
            return Some((Says::Offer, Some(address)));
        }
        let wanted = if request.has.is_unspecified() {
            request.requested
        } else {
            Some(request.has)
        };
        if wanted != Some(address) {
            return Some((Says::Nak, None));
        }
        let lease = Duration::from_secs(subnet.lease_s.into());
        self.leases.confirm(request.mac, origin.now + lease);
        self.bindings
            .fix(origin.vlan, address.into(), origin.port, origin.now);
        Some((Says::Ack, Some(address)))
    }
}

/// Whether an address of the subnet is nobody's by other means than a lease.
fn is_free(ports: &BTreeMap<PortId, PortSettings>, subnet: &Subnet, address: Ipv4Addr) -> bool {
    let address = IpAddr::from(address);
    subnet.router.map(IpAddr::from) != Some(address)
        && !ports.values().any(|port| port.addresses.contains(&address))
}

/// The names that a machine may know: those of the machines that it may talk to, and its own.
struct Names<'a> {
    asker: &'a PortSettings,
    settings: &'a NetworkSettings,
    subnet: &'a Subnet,
    ports: &'a BTreeMap<PortId, PortSettings>,
    bindings: &'a Bindings,
}

/// The gateway's own name.
const GATEWAY: &str = "gateway";

impl Names<'_> {
    fn machines(&self) -> impl Iterator<Item = (PortId, &PortSettings)> {
        let known = self.ports.iter().filter(|(_, port)| {
            let own = port.name == self.asker.name && port.mac == self.asker.mac;
            port.role == Role::Machine && (own || port.may_talk_to(self.asker))
        });
        known.map(|(id, port)| (*id, port))
    }
}

impl Directory for Names<'_> {
    fn addresses(&self, name: &str) -> Option<Vec<IpAddr>> {
        if name == GATEWAY {
            return Some(vec![self.subnet.gateway.into()]);
        }
        let mut addresses = None;
        for (id, _) in self
            .machines()
            .filter(|(_, port)| port.name.eq_ignore_ascii_case(name))
        {
            let is_routed =
                |address: &IpAddr| !matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
            addresses
                .get_or_insert_with(Vec::new)
                .extend(self.bindings.of(0, id).filter(is_routed));
        }
        addresses
    }

    fn name_of(&self, address: IpAddr) -> Option<String> {
        if address == self.subnet.gateway {
            return Some(GATEWAY.to_owned());
        }
        let owner = self.bindings.owner(0, address)?;
        let mut machines = self.machines();
        let (_, port) = machines.find(|(id, _)| *id == owner)?;
        Some(port.name.to_ascii_lowercase())
    }

    fn domain(&self) -> &str {
        &self.settings.domain
    }

    fn is_local(&self, address: IpAddr) -> bool {
        matches!(address, IpAddr::V4(address) if self.subnet.has(address))
    }

    fn has_others(&self) -> bool {
        !self.settings.dns.is_empty()
    }
}

impl<'a> Datagram<'a> {
    fn read(ip: &Ipv4<'a>) -> Option<Self> {
        let (from, to) = ports(ip.payload)?;
        let len = usize::from(u16_at(ip.payload, 4)?);
        let payload = ip.payload.get(UDP_BYTES..len)?;
        Some(Self {
            from: (ip.src, from),
            to: (ip.dst, to),
            payload,
        })
    }
}

fn ethernet_header(subnet: &Subnet, dst: Mac, kind: u16) -> Vec<u8> {
    let mut frame = Vec::with_capacity(640);
    frame.extend_from_slice(&dst.0);
    frame.extend_from_slice(&subnet.mac.0);
    frame.extend_from_slice(&kind.to_be_bytes());
    frame
}

fn arp_reply(subnet: &Subnet, arp: Arp) -> Vec<u8> {
    let mut frame = ethernet_header(subnet, arp.sender, TYPE_ARP);
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend_from_slice(&subnet.mac.0);
    frame.extend_from_slice(&subnet.gateway.octets());
    frame.extend_from_slice(&arp.sender.0);
    frame.extend_from_slice(&arp.sender_ip.octets());
    frame
}

/// An IPv4 packet of the gateway in a frame.
fn ipv4(subnet: &Subnet, dst: (Mac, Ipv4Addr), protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = ethernet_header(subnet, dst.0, TYPE_IPV4);
    let len = u16::try_from(IPV4_BYTES + payload.len()).unwrap_or(u16::MAX);
    let [l0, l1] = len.to_be_bytes();
    // No options, no fragments, 64 hops.
    frame.extend_from_slice(&[0x45, 0, l0, l1, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
    frame.extend_from_slice(&subnet.gateway.octets());
    frame.extend_from_slice(&dst.1.octets());
    let sum = checksum::fold(checksum::add(
        0,
        frame.get(ETHERNET_BYTES..).unwrap_or_default(),
    ));
    put(&mut frame, ETHERNET_BYTES + 10, &sum.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn udp(subnet: &Subnet, from: u16, (mac, ip, to): (Mac, Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
    let len = u16::try_from(UDP_BYTES + payload.len()).unwrap_or(u16::MAX);
    let mut datagram = Vec::with_capacity(UDP_BYTES + payload.len());
    for number in [from, to, len, 0] {
        datagram.extend_from_slice(&number.to_be_bytes());
    }
    datagram.extend_from_slice(payload);
    let sum = checksum::transport(subnet.gateway.into(), ip.into(), PROTOCOL_UDP, &datagram);
    put(&mut datagram, 6, &sum.to_be_bytes());
    ipv4(subnet, (mac, ip), PROTOCOL_UDP, &datagram)
}

fn echo(subnet: &Subnet, ethernet: Ethernet, ip: Ipv4<'_>) -> Handled {
    let is_echo = u8_at(ip.payload, 0) == Some(ICMP_ECHO) && bytes_at::<8>(ip.payload, 0).is_some();
    if !is_echo || checksum::fold(checksum::add(0, ip.payload)) != 0 {
        return Handled::Unserved;
    }
    let mut message = ip.payload.to_vec();
    put(&mut message, 0, &[ICMP_ECHO_REPLY, 0, 0, 0]);
    let sum = checksum::fold(checksum::add(0, &message));
    put(&mut message, 2, &sum.to_be_bytes());
    let back = (ethernet.src, ip.src);
    Handled::Answered(ipv4(subnet, back, PROTOCOL_ICMP, &message))
}
