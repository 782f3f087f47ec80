//! DHCP (RFC 2131): what a client asks, and the server's answer. The server's decisions are
//! [`crate::gateway`]'s.

use crate::settings::Subnet;
use crate::wire::{Mac, bytes_at, ipv4_at, mac_at, put, u8_at, u16_at};
use std::net::Ipv4Addr;

pub(crate) const SERVER: u16 = 67;
pub(crate) const CLIENT: u16 = 68;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
const OPTIONS: usize = 240;
const OPTION_REQUESTED: u8 = 50;
const OPTION_KIND: u8 = 53;
const OPTION_SERVER: u8 = 54;
/// Options that are looked at.
const OPTIONS_MAX: usize = 128;
/// Shortest message that every client takes (BOOTP).
const MESSAGE_BYTES_MIN: usize = 300;

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Asks {
    Discover,
    Request,
    Release,
    Inform,
    /// Something that the server has nothing to say to.
    Other,
}

/// What a server says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Says {
    Offer,
    Ack,
    Nak,
}

/// A client's message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) asks: Asks,
    pub(crate) mac: Mac,
    /// The address that the client has already.
    pub(crate) has: Ipv4Addr,
    pub(crate) requested: Option<Ipv4Addr>,
    pub(crate) server: Option<Ipv4Addr>,
    pub(crate) wants_broadcast: bool,
    transaction: [u8; 4],
    flags: [u8; 2],
}

impl Request {
    /// From a datagram to the server. Messages of relays are none: a switch sees its clients itself.
    pub(crate) fn read(message: &[u8]) -> Option<Self> {
        let is_request = bytes_at::<3>(message, 0)? == [1, 1, 6];
        if !is_request || !ipv4_at(message, 24)?.is_unspecified() {
            return None;
        }
        if bytes_at(message, 236)? != COOKIE {
            return None;
        }
        let mut request = Self {
            asks: Asks::Other,
            mac: mac_at(message, 28)?,
            has: ipv4_at(message, 12)?,
            requested: None,
            server: None,
            wants_broadcast: u16_at(message, 10)? & 0x8000 != 0,
            transaction: bytes_at(message, 4)?,
            flags: bytes_at(message, 10)?,
        };
        let mut rest = message.get(OPTIONS..)?;
        for _ in 0..OPTIONS_MAX {
            let (option, len) = match (rest.first(), rest.get(1)) {
                (Some(0), _) => {
                    rest = rest.get(1..)?;
                    continue;
                }
                (Some(255) | None, _) => break,
                (Some(option), Some(len)) => (*option, usize::from(*len)),
                (Some(_), None) => return None,
            };
            let body = rest.get(2..2 + len)?;
            match option {
                OPTION_KIND => {
                    request.asks = match u8_at(body, 0)? {
                        1 => Asks::Discover,
                        3 => Asks::Request,
                        7 => Asks::Release,
                        8 => Asks::Inform,
                        _ => Asks::Other,
                    };
                }
                OPTION_REQUESTED => request.requested = Some(ipv4_at(body, 0)?),
                OPTION_SERVER => request.server = Some(ipv4_at(body, 0)?),
                _ => {}
            }
            rest = rest.get(2 + len..)?;
        }
        Some(request)
    }
}

/// What a client is told besides its address.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Offer<'a> {
    pub(crate) subnet: &'a Subnet,
    pub(crate) name: &'a str,
    pub(crate) domain: &'a str,
    pub(crate) dns: &'a [Ipv4Addr],
    pub(crate) mtu: u16,
}

/// The message of the server to `request`; an answer without `address` tells no lease.
pub(crate) fn answer(
    request: &Request,
    says: Says,
    address: Option<Ipv4Addr>,
    offer: &Offer<'_>,
) -> Vec<u8> {
    let mut message = vec![0; OPTIONS];
    put(&mut message, 0, &[2, 1, 6, 0]);
    put(&mut message, 4, &request.transaction);
    put(&mut message, 10, &request.flags);
    if says != Says::Nak {
        put(&mut message, 12, &request.has.octets());
        let yours = address.unwrap_or(Ipv4Addr::UNSPECIFIED);
        put(&mut message, 16, &yours.octets());
        put(&mut message, 20, &offer.subnet.gateway.octets());
    }
    put(&mut message, 28, &request.mac.0);
    put(&mut message, 236, &COOKIE);
    let mut option = |code: u8, body: &[u8]| {
        let body = body.get(..body.len().min(255)).unwrap_or_default();
        message.push(code);
        message.push(u8::try_from(body.len()).unwrap_or(0));
        message.extend_from_slice(body);
    };
    let kind = match says {
        Says::Offer => 2,
        Says::Ack => 5,
        Says::Nak => 6,
    };
    option(OPTION_KIND, &[kind]);
    option(OPTION_SERVER, &offer.subnet.gateway.octets());
    if says != Says::Nak {
        if address.is_some() {
            let lease = offer.subnet.lease_s;
            option(51, &lease.to_be_bytes());
            option(58, &(lease / 2).to_be_bytes());
            option(59, &(lease / 8 * 7).to_be_bytes());
        }
        option(1, &offer.subnet.mask().octets());
        if let Some(router) = offer.subnet.router {
            option(3, &router.octets());
        }
        let servers = std::iter::once(&offer.subnet.gateway).chain(offer.dns);
        let servers: Vec<u8> = servers.flat_map(|server| server.octets()).collect();
        option(6, &servers);
        option(12, offer.name.as_bytes());
        option(15, offer.domain.as_bytes());
        option(26, &offer.mtu.to_be_bytes());
    }
    message.push(255);
    message.resize(message.len().max(MESSAGE_BYTES_MIN), 0);
    message
}

#[cfg(test)]
pub(crate) mod testing {
    //! A client, as far as tests need one.
    use super::*;

    /// A client's message with options.
    pub(crate) fn ask(mac: Mac, kind: u8, has: Ipv4Addr, options: &[(u8, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; OPTIONS];
        put(&mut message, 0, &[1, 1, 6, 0, 9, 8, 7, 6]);
        put(&mut message, 12, &has.octets());
        put(&mut message, 28, &mac.0);
        put(&mut message, 236, &COOKIE);
        message.extend([OPTION_KIND, 1, kind]);
        for (code, body) in options {
            message.extend([*code, u8::try_from(body.len()).unwrap()]);
            message.extend(*body);
        }
        message.push(255);
        message
    }

    /// Kind, address and options of the server's message.
    pub(crate) fn told(message: &[u8]) -> (u8, Ipv4Addr, BTreeMap<u8, Vec<u8>>) {
        assert_eq!(message[..8], [2, 1, 6, 0, 9, 8, 7, 6]);
        assert_eq!(message[236..240], COOKIE);
        assert!(message.len() >= MESSAGE_BYTES_MIN);
        let (mut options, mut rest) = (BTreeMap::new(), &message[OPTIONS..]);
        while rest[0] != 255 {
            let len = usize::from(rest[1]);
            let twice = options.insert(rest[0], rest[2..2 + len].to_vec());
            assert_eq!(twice, None);
            rest = &rest[2 + len..];
        }
        let address = ipv4_at(message, 16).unwrap();
        (options[&OPTION_KIND][0], address, options)
    }

    use std::collections::BTreeMap;
}

#[cfg(test)]
mod tests {
    use super::testing::{ask, told};
    use super::*;
    use proptest::prelude::*;

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    fn subnet() -> Subnet {
        Subnet {
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            prefix: 20,
            mac: Mac([2; 6]),
            router: Some(Ipv4Addr::new(10, 0, 0, 2)),
            lease_s: 3600,
            pool: (Ipv4Addr::new(10, 0, 0, 3), Ipv4Addr::new(10, 0, 0, 9)),
        }
    }

    #[test]
    fn what_a_client_asks_is_understood_wherever_it_ends() {
        let wanted = Ipv4Addr::new(10, 0, 0, 30);
        let server = Ipv4Addr::new(10, 0, 0, 1);
        let options: [(u8, &[u8]); 5] = [
            (0x3d, &[1, 2, 3]),
            (OPTION_REQUESTED, &wanted.octets()),
            (55, &[1, 3, 6]),
            (OPTION_SERVER, &server.octets()),
            (12, b"web"),
        ];
        let mut message = ask(MAC, 3, Ipv4Addr::UNSPECIFIED, &options);
        message[10] = 0x80;
        // Padding between options.
        message.splice(240..240, [0, 0, 0]);
        let request = Request::read(&message).unwrap();
        assert_eq!((request.asks, request.mac), (Asks::Request, MAC));
        assert_eq!(
            (request.requested, request.server),
            (Some(wanted), Some(server))
        );
        assert!(request.wants_broadcast && request.has.is_unspecified());
        for len in 0..message.len() - 1 {
            let _cut = Request::read(&message[..len]);
        }
    }

    #[test]
    fn long_addresses_relays_and_answers_are_no_requests() {
        let message = ask(MAC, 1, Ipv4Addr::UNSPECIFIED, &[]);
        assert!(Request::read(&message).is_some());
        // An address length of 200 is what other parsers do not survive.
        for (at, value) in [(2, 200), (2, 16), (1, 7), (0, 2), (24, 10), (236, 0)] {
            let mut other = message.clone();
            other[at] = value;
            assert_eq!(Request::read(&other), None, "{at} {value}");
        }
    }

    #[test]
    fn client_is_told_everything_that_it_needs() {
        let request = Request::read(&ask(MAC, 1, Ipv4Addr::UNSPECIFIED, &[])).unwrap();
        let subnet = subnet();
        let offer = Offer {
            subnet: &subnet,
            name: "web",
            domain: "lab.internal",
            dns: &[Ipv4Addr::new(9, 9, 9, 9)],
            mtu: 1400,
        };
        let address = Ipv4Addr::new(10, 0, 0, 5);
        let (kind, yours, options) = told(&answer(&request, Says::Offer, Some(address), &offer));
        assert_eq!((kind, yours), (2, address));
        let expected: [(u8, &[u8]); 10] = [
            (1, &[255, 255, 240, 0]),
            (3, &[10, 0, 0, 2]),
            (6, &[10, 0, 0, 1, 9, 9, 9, 9]),
            (12, b"web"),
            (15, b"lab.internal"),
            (26, &[0x05, 0x78]),
            (51, &[0, 0, 0x0e, 0x10]),
            (OPTION_SERVER, &[10, 0, 0, 1]),
            (58, &[0, 0, 0x07, 0x08]),
            (59, &[0, 0, 0x0c, 0x4e]),
        ];
        for (code, body) in expected {
            assert_eq!(options[&code], body, "option {code}");
        }
        let (kind, yours, options) = told(&answer(&request, Says::Nak, Some(address), &offer));
        assert_eq!((kind, yours, options.len()), (6, Ipv4Addr::UNSPECIFIED, 2));
        let (kind, yours, options) = told(&answer(&request, Says::Ack, None, &offer));
        assert_eq!((kind, yours), (5, Ipv4Addr::UNSPECIFIED));
        assert!(!options.contains_key(&51), "no lease was asked for");
    }

    proptest! {
        #[test]
        fn random_messages_never_panic(
            head in prop::collection::vec(any::<u8>(), 240), options in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut message = head;
            put(&mut message, 0, &[1, 1, 6]);
            put(&mut message, 24, &[0; 4]);
            put(&mut message, 236, &COOKIE);
            message.extend(options);
            let Some(request) = Request::read(&message) else { return Ok(()) };
            let subnet = subnet();
            let offer = Offer { subnet: &subnet, name: "web", domain: "lab.internal", dns: &[], mtu: 1500 };
            let bytes = answer(&request, Says::Ack, Some(Ipv4Addr::new(10, 0, 0, 5)), &offer);
            prop_assert_eq!(&bytes[4..8], &message[4..8]);
            prop_assert_eq!(&bytes[28..34], &message[28..34]);
        }
    }
}
