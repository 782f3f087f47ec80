//! What VM files say of network devices.

use super::tests::around;
use super::*;
use crate::network::card::CardVlan;
use crate::vm::spec::{NetSource, NetSpec};
use std::fs;

#[test]
fn network_devices_have_names_addresses_and_queues_of_their_own() {
    let home = tempfile::tempdir().unwrap();
    fs::write(home.path().join("k"), [0; 512]).unwrap();
    let read = |nets: &str| {
        let text = format!("name = \"web\"\n[boot]\nkernel = \"k\"\n{nets}");
        parse("f", home.path(), &text).and_then(|draft| check(draft, &around()))
    };
    let nets = "[[net]]\ntap = \"tap0\"\n[[net]]\nbridge = \"br0\"\nmac = \"52:54:00:00:00:01\"\n";
    let spec = read(nets).unwrap();
    let [first, second] = &spec.nets[..] else {
        panic!("{:?}", spec.nets);
    };
    assert_eq!(
        (first.name.as_str(), second.name.as_str()),
        ("net0", "net1")
    );
    assert_eq!(first.mac, NetSpec::default_mac("web", 0));
    assert_ne!(first.mac, NetSpec::default_mac("web", 1));
    assert_eq!(first.mac[0] & 3, 2, "locally administered, of one device");
    assert_eq!(second.mac, [0x52, 0x54, 0, 0, 0, 1]);
    assert_eq!(first.interface("web", 0), "tap0");
    assert_eq!(second.interface("web", 1), "bh-web-1");
    // Two cards may be in one network.
    let both = read("[[net]]\nnetwork = \"lab\"\n[[net]]\nnetwork = \"lab\"\n").unwrap();
    assert_eq!(both.nets[1].source, NetSource::Network("lab".into()));
    let cards = "[[net]]\nnetwork = \"lab\"\ntenant = \"acme\"\naddresses = [\"10.0.0.5\", \"fd00::5\"]\nvlan = 7\n\
                 [[net]]\nnetwork = \"lab\"\ntrunk = [7, 8]\n";
    let cards = read(cards).unwrap().nets;
    assert_eq!(cards[0].card.tenant.as_deref(), Some("acme"));
    assert_eq!(cards[0].card.addresses.len(), 2);
    assert_eq!(cards[0].card.vlan, CardVlan::Access(7));
    assert_eq!(cards[1].card.vlan, CardVlan::Trunk(vec![7, 8]));
    let user = "[[net]]\nuser = true\npublish = [\"8080:80\", \"127.0.0.1:53:53/udp\"]\n";
    let ports = ["8080:80", "127.0.0.1:53:53/udp"].map(|port| port.parse().unwrap());
    let publish = Vec::from(ports);
    assert_eq!(
        read(user).unwrap().nets[0].source,
        NetSource::User { publish }
    );
    let long = second.interface("a-machine-with-a-long-name", 1);
    assert!(crate::network::is_interface_name(&long), "{long}");
    for (nets, wanted) in [
        ("[[net]]\nuser = false\n", "expected one of `user`"),
        (
            "[[net]]\ntap = \"a\"\ntenant = \"acme\"\n",
            "expected `network` beside",
        ),
        (
            "[[net]]\nnetwork = \"a\"\ntenant = \"Acme\"\n",
            "the name of a tenant",
        ),
        (
            "[[net]]\nnetwork = \"a\"\naddresses = [\"10.0.0\"]\n",
            "IP addresses",
        ),
        (
            "[[net]]\nnetwork = \"a\"\naddresses = [\"224.0.0.1\"]\n",
            "IP addresses",
        ),
        ("[[net]]\nnetwork = \"a\"\nvlan = 4095\n", "from 1 to 4094"),
        (
            "[[net]]\nnetwork = \"a\"\ntrunk = [0]\n",
            "numbers from 1 to 4094",
        ),
        (
            "[[net]]\nnetwork = \"a\"\ntrunk = [7]\nvlan = 7\n",
            "no `vlan` beside it",
        ),
        (
            "[[net]]\nuser = true\npublish = [\"80\"]\n",
            "expected [ADDRESS:]PORT:GUEST_PORT",
        ),
        (
            "[[net]]\nuser = true\npublish = [\"80:80\", \"[::1]:80:81\"]\n",
            "expected each port of the host once",
        ),
        (
            "[[net]]\nuser = true\npublish = [\"80:80\"]\n[[net]]\nuser = true\npublish = [\"80:81\"]\n",
            "expected each port of the host once",
        ),
        (
            "[[net]]\ntap = \"a\"\npublish = [\"80:80\"]\n",
            "expected only beside `user = true`",
        ),
        (
            "[[net]]\nuser = true\nqueues = 2\n",
            "expected 1 in a network, and with user networking",
        ),
        (
            "[[net]]\n",
            "expected one of `user`, `network`, `tap` and `bridge`",
        ),
        (
            "[[net]]\ntap = \"a\"\nbridge = \"b\"\n",
            "expected one of `user`, `network`, `tap` and `bridge`",
        ),
        (
            "[[net]]\nnetwork = \"a\"\ntap = \"b\"\n",
            "expected one of `user`, `network`, `tap` and `bridge`",
        ),
        (
            "[[net]]\nnetwork = \"Lab\"\n",
            "expected the name of a network: 1 to 32",
        ),
        (
            "[[net]]\nnetwork = \"lab\"\nqueues = 2\n",
            "expected 1 in a network, and with user networking",
        ),
        (
            "[[net]]\ntap = \"a/b\"\n",
            "expected the name of a network interface",
        ),
        (
            "[[net]]\ntap = \"a\"\n[[net]]\ntap = \"a\"\n",
            "an interface that no other device has",
        ),
        ("[[net]]\ntap = \"a\"\nmtu = 67\n", "expected 68 to 65521"),
        (
            "[[net]]\ntap = \"a\"\nmac = \"ff:ff:ff:ff:ff:ff\"\n",
            "the address of one device",
        ),
        ("[[net]]\ntap = \"a\"\nqueues = 9\n", "queues"),
        ("[[net]]\ntap = \"a\"\nlink = \"on\"\n", "link"),
        (
            "[[net]]\ntap = \"a\"\nlimits = { packets_burst = 3 }\n",
            "expected packets_per_s beside it",
        ),
    ] {
        let problems = read(nets).unwrap_err().to_string();
        assert!(problems.contains(wanted), "{nets}: {problems}");
    }
}
