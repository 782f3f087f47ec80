//! Ports of the host that lead to a guest: `[ADDRESS:]PORT:GUEST_PORT[/tcp|udp]`, as container engines write them.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

/// How it is written.
pub const PUBLISH_RULE: &str = "[ADDRESS:]PORT:GUEST_PORT[/tcp|udp], such as \"8080:80\" or \"127.0.0.1:2222:22/tcp\", \
                                an IPv6 address in brackets, ports from 1 to 65535";

/// What goes to a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Transport {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port of the host that leads to one of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address that it is at; `None` for all.
    pub address: Option<IpAddr>,
    /// The host's port.
    pub port: u16,
    /// The guest's port.
    pub guest_port: u16,
    /// What goes there.
    pub transport: Transport,
}

impl Publish {
    /// Whether both want the same port of the host.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let is_everywhere = |p: &Self| p.address.is_none_or(|address| address.is_unspecified());
        let everywhere = is_everywhere(self) || is_everywhere(other);
        (self.port, self.transport) == (other.port, other.transport)
            && (everywhere || self.address == other.address)
    }
}

/// What is no [`Publish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {PUBLISH_RULE}")]
pub struct NoPublish;

impl FromStr for Publish {
    type Err = NoPublish;

    fn from_str(text: &str) -> Result<Self, NoPublish> {
        let (ports, transport) = match text.rsplit_once('/') {
            None => (text, Transport::Tcp),
            Some((ports, "tcp")) => (ports, Transport::Tcp),
            Some((ports, "udp")) => (ports, Transport::Udp),
            Some(_) => return Err(NoPublish),
        };
        let (rest, guest_port) = ports.rsplit_once(':').ok_or(NoPublish)?;
        let (address, port) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, port)) => (Some(parse_address(address)?), port),
        };
        Ok(Self {
            address,
            port: parse_port(port)?,
            guest_port: parse_port(guest_port)?,
            transport,
        })
    }
}

fn parse_port(text: &str) -> Result<u16, NoPublish> {
    let plain = text.bytes().all(|b| b.is_ascii_digit());
    let port = text.parse().ok().filter(|port| plain && *port > 0);
    port.ok_or(NoPublish)
}

fn parse_address(text: &str) -> Result<IpAddr, NoPublish> {
    let inside = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
    let address = match inside {
        Some(v6) => v6.parse().map(IpAddr::V6),
        None => text.parse().map(IpAddr::V4),
    };
    address.map_err(|_| NoPublish)
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            None => {}
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
        }
        let transport = match self.transport {
            Transport::Tcp => "",
            Transport::Udp => "/udp",
        };
        write!(f, "{}:{}{transport}", self.port, self.guest_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(text: &str) -> Result<Publish, NoPublish> {
        text.parse()
    }

    #[test]
    fn ports_are_written_as_container_engines_do() {
        for (text, shown) in [
            ("8080:80", "8080:80"),
            ("8080:80/tcp", "8080:80"),
            ("53:5353/udp", "53:5353/udp"),
            ("127.0.0.1:2222:22", "127.0.0.1:2222:22"),
            ("[::1]:2222:22/udp", "[::1]:2222:22/udp"),
        ] {
            assert_eq!(read(text).unwrap().to_string(), shown);
        }
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:65536",
            "+80:80",
            "80:80/sctp",
            "80:80/",
            "::1:80:80",
            "1.2.3:80:80",
            "localhost:80:80",
            "[127.0.0.1]:80:80",
            "80-90:80-90",
            " 80:80",
        ] {
            assert_eq!(read(text), Err(NoPublish), "{text}");
        }
    }

    #[test]
    fn one_port_leads_to_one_place() {
        let collide = |a, b| read(a).unwrap().collides(&read(b).unwrap());
        assert!(collide("80:80", "80:81") && collide("127.0.0.1:80:80", "80:81"));
        assert!(collide("0.0.0.0:80:80", "127.0.0.1:80:80"));
        assert!(!collide("80:80", "80:80/udp") && !collide("80:80", "81:80"));
        assert!(!collide("127.0.0.1:80:80", "127.0.0.2:80:80"));
    }

    proptest! {
        #[test]
        fn what_is_shown_reads_back_the_same(
            address in prop::option::of(any::<IpAddr>()), port in 1u16.., guest_port in 1u16.., is_udp: bool,
        ) {
            let transport = if is_udp { Transport::Udp } else { Transport::Tcp };
            let publish = Publish { address, port, guest_port, transport };
            prop_assert_eq!(read(&publish.to_string()), Ok(publish));
        }

        #[test]
        fn no_text_is_too_strange(text in "[0-9a-f:.\\[\\]/tcpud]{0,30}") {
            if let Ok(publish) = read(&text) {
                prop_assert_eq!(read(&publish.to_string()), Ok(publish));
            }
        }
    }
}
