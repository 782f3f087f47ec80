//! The value of `--net`: `user|network=NAME|tap=NAME|bridge=NAME[,publish=PORT:PORT]...[,mac=MAC][,mtu=N][,queues=N][,link=up|down][,name=N]
//! [,tenant=NAME][,address=IP]...[,vlan=N][,trunk=N]...[,bytes_per_s=SIZE][,bytes_burst=SIZE][,packets_per_s=N][,packets_burst=N]`.

use crate::escape::excerpt;
use crate::network::publish::NoPublish;
use crate::vm::spec::{NET_QUEUES_MAX, parse_mac};
use crate::vmfile::{DraftNet, Located, Place, Problem, nearest, parse_size};

const KEYS: [&str; 18] = [
    "user",
    "publish",
    "network",
    "tap",
    "bridge",
    "mac",
    "mtu",
    "queues",
    "link",
    "tenant",
    "address",
    "vlan",
    "trunk",
    "name",
    "bytes_per_s",
    "bytes_burst",
    "packets_per_s",
    "packets_burst",
];

/// Reads one `--net`.
///
/// # Errors
/// What was expected.
pub(super) fn parse_net(argument: &str) -> Result<DraftNet, Problem> {
    let place = Place::Option {
        option: "--net".to_owned(),
        value: argument.to_owned(),
    };
    let mut net = DraftNet::new(place.clone());
    for part in argument.split(',') {
        set(&mut net, part).map_err(|expectation| Problem {
            place: place.clone(),
            expectation,
        })?;
    }
    Ok(net)
}

fn set(net: &mut DraftNet, text: &str) -> Result<(), String> {
    let place = net.place.clone();
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    let words = || {
        Some(Located {
            value: value.to_owned(),
            place: place.clone(),
        })
    };
    let number = || {
        let value = value.parse().ok().filter(|n| *n > 0);
        let value = value.ok_or_else(|| format!("{key}: expected a number from 1 on"))?;
        let place = place.clone();
        Ok::<_, String>(Some(Located { value, place }))
    };
    let size = || {
        let wrong = |e| format!("{key}={}: {e}", excerpt(value, 20));
        let value = parse_size(value).map_err(wrong)?;
        let place = place.clone();
        Ok::<_, String>(Some(Located { value, place }))
    };
    match key {
        "user" if text == key => net.user = Some(Located { value: true, place }),
        "publish" => {
            let port = value
                .parse()
                .map_err(|e: NoPublish| format!("publish={}: {e}", excerpt(value, 40)))?;
            let ports = net.publish.get_or_insert_with(|| Located {
                value: Vec::new(),
                place,
            });
            ports.value.push(port);
        }
        "network" => net.network = words(),
        "tenant" => net.tenant = words(),
        "address" => {
            let address = value.parse();
            let expected = |_| format!("address={}: expected an IP address", excerpt(value, 40));
            let address = address.map_err(expected)?;
            let all = net.addresses.get_or_insert_with(|| Located {
                value: Vec::new(),
                place,
            });
            all.value.push(address);
        }
        "vlan" => net.vlan = number()?,
        "trunk" => {
            let trunk = net.trunk.get_or_insert_with(|| Located {
                value: Vec::new(),
                place,
            });
            // Without a number it has all.
            if text != key {
                let expected = |_| format!("trunk={}: expected a number", excerpt(value, 20));
                trunk.value.push(value.parse().map_err(expected)?);
            }
        }
        "tap" => net.tap = words(),
        "bridge" => net.bridge = words(),
        "name" => net.name = words(),
        "mac" => {
            let value = parse_mac(value).map_err(|e| format!("mac={}: {e}", excerpt(value, 20)))?;
            net.mac = Some(Located { value, place });
        }
        "mtu" => net.mtu = number()?,
        "queues" => {
            let n = value.parse().ok();
            let n = n.filter(|n| (1..=NET_QUEUES_MAX).contains(n));
            let value = n.ok_or_else(|| format!("queues: expected 1 to {NET_QUEUES_MAX}"))?;
            net.queues = Some(Located { value, place });
        }
        "link" => {
            let value = match value {
                "up" => true,
                "down" => false,
                _ => return Err("link: expected `up` or `down`".to_owned()),
            };
            net.link = Some(Located { value, place });
        }
        "bytes_per_s" => net.limits.bytes_per_s = size()?,
        "bytes_burst" => net.limits.bytes_burst = size()?,
        "packets_per_s" => net.limits.requests_per_s = number()?,
        "packets_burst" => net.limits.requests_burst = number()?,
        _ => {
            let hint = nearest(key, KEYS).map_or_else(
                || format!("expected one of {}", KEYS.join(", ")),
                |near| format!("did you mean `{near}`?"),
            );
            return Err(format!("unknown option `{}`; {hint}", excerpt(text, 40)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_vm_file() {
        let text = "bridge=br0,mac=52:54:00:12:34:56,mtu=9000,queues=4,link=down,name=lan,\
                    bytes_per_s=1MiB,bytes_burst=2MiB,packets_per_s=100,packets_burst=7";
        let net = parse_net(text).unwrap();
        assert_eq!(net.bridge.unwrap().value, "br0");
        assert_eq!(net.mac.unwrap().value, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert_eq!(
            (net.mtu.unwrap().value, net.queues.unwrap().value),
            (9000, 4)
        );
        assert!(!net.link.unwrap().value);
        assert_eq!(net.name.unwrap().value, "lan");
        assert_eq!(net.limits.bytes_per_s.unwrap().value, 1 << 20);
        assert_eq!(net.limits.requests_burst.unwrap().value, 7);
        assert_eq!(parse_net("tap=tap0").unwrap().tap.unwrap().value, "tap0");
        let net = parse_net("user,publish=8080:80,publish=[::1]:53:53/udp").unwrap();
        let ports = net.publish.unwrap().value;
        let shown: Vec<_> = ports.iter().map(ToString::to_string).collect();
        assert!(net.user.unwrap().value && shown == ["8080:80", "[::1]:53:53/udp"]);
        let network = parse_net("network=lab").unwrap().network;
        assert_eq!(network.unwrap().value, "lab");
        let text = "network=lab,tenant=acme,address=10.0.0.5,address=fd00::5,trunk=7,trunk=8";
        let net = parse_net(text).unwrap();
        assert_eq!(net.tenant.unwrap().value, "acme");
        assert_eq!(net.addresses.unwrap().value.len(), 2);
        assert_eq!(net.trunk.unwrap().value, [7, 8]);
        let net = parse_net("network=lab,vlan=7").unwrap();
        assert_eq!(net.vlan.unwrap().value, 7);
        let net = parse_net("network=lab,trunk").unwrap();
        assert_eq!(net.trunk.unwrap().value, [0_u16; 0]);
    }

    #[test]
    fn wrong_options_are_named() {
        for (text, wanted) in [
            ("user=no", "unknown option `user=no`"),
            (
                "user,publish=80",
                "publish=80: expected [ADDRESS:]PORT:GUEST_PORT",
            ),
            ("tab=tap0", "unknown option `tab=tap0`; did you mean `tap`?"),
            (
                "tap=a,mac=01:00:5e:00:00:01",
                "expected the address of one device",
            ),
            (
                "tap=a,mac=1:2:3:4:5:6",
                "expected the address of one device",
            ),
            ("tap=a,queues=9", "queues: expected 1 to 8"),
            ("tap=a,link=yes", "link: expected `up` or `down`"),
            (
                "tap=a,packets_per_s=0",
                "packets_per_s: expected a number from 1 on",
            ),
            ("tap=a,", "unknown option ``"),
        ] {
            let problem = parse_net(text).unwrap_err();
            assert!(problem.expectation.contains(wanted), "{text}: {problem}");
        }
    }
}
