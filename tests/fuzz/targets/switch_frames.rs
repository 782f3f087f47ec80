//! Any frames from the machines and the uplink of a network, with any offload headers: no frame reaches a machine
//! that its sender may not talk to, and none that arrives has another's Ethernet address.
#![no_main]

use bulkhead_switch::offload::Offload;
use bulkhead_switch::wire::Mac;
use bulkhead_switch::{
    Guard, Isolation, Limits, NetworkSettings, PortId, PortSettings, Ports, Role, Sent, Subnet,
    Switch, Vlan,
};
use libfuzzer_sys::fuzz_target;
use std::time::{Duration, Instant};

const GATEWAY: Mac = mac(0xfe);
const UPLINK: PortId = 5;

const fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

fn port(n: u8, isolation: Isolation) -> PortSettings {
    PortSettings {
        name: format!("m{n}"),
        role: if PortId::from(n) == UPLINK {
            Role::Uplink
        } else {
            Role::Machine
        },
        mac: mac(n),
        addresses: vec![[10, 0, 0, n].into()],
        vlan: if PortId::from(n) == UPLINK {
            Vlan::Trunk(vec![3])
        } else {
            Vlan::Access(0)
        },
        isolation,
        guard: Guard::FULL,
        offload: if n % 2 == 0 {
            Offload::ALL
        } else {
            Offload::default()
        },
        limits: Limits::default(),
    }
}

/// One frame comes; what goes is judged at once.
struct One {
    from: PortId,
    record: Option<Vec<u8>>,
}

impl Ports for One {
    fn receive(&mut self, port: PortId, to: &mut [u8]) -> Option<usize> {
        let record = self.record.take_if(|_| port == self.from)?;
        to[..record.len()].copy_from_slice(&record);
        Some(record.len())
    }

    fn send(&mut self, port: PortId, header: [u8; 12], frame: &[&[u8]]) -> Sent {
        let frame = frame.concat();
        let src = Mac(frame[6..12].try_into().unwrap());
        if src == GATEWAY {
            assert_eq!(port, self.from);
            return Sent::Yes;
        }
        assert_ne!(port, self.from);
        if self.from != UPLINK {
            assert_eq!(src.0[5], u8::try_from(self.from).unwrap());
            let partners = [self.from, port].iter().all(|p| matches!(p, 1 | 2));
            assert!(partners || port == UPLINK, "{} to {port}", self.from);
        }
        // Who does nothing himself gets nothing that is left to do.
        assert!(port % 2 == 0 || header[..10] == [0; 10]);
        Sent::Yes
    }
}

fuzz_target!(|data: &[u8]| {
    let network = NetworkSettings {
        mtu: 1500,
        subnet: Some(Subnet {
            gateway: [10, 0, 0, 254].into(),
            prefix: 24,
            mac: GATEWAY,
            pool: ([10, 0, 0, 100].into(), [10, 0, 0, 120].into()),
            router: None,
            lease_s: 600,
        }),
        domain: "lab.internal".to_owned(),
        dns: vec![],
    };
    let mut switch = Switch::new(network).unwrap();
    let mut now = Instant::now();
    let tenants = [
        Isolation::Tenant(1),
        Isolation::Tenant(1),
        Isolation::Tenant(2),
        Isolation::Alone,
        Isolation::Open,
    ];
    for (n, isolation) in (1..).zip(tenants) {
        switch.set_port(n.into(), port(n, isolation), now).unwrap();
    }
    let mut rest = data;
    while let Some((&[what, low, high], behind)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high]) % 2000).min(behind.len());
        let (piece, left) = behind.split_at(len);
        rest = left;
        let from = PortId::from(what % 5 + 1);
        let mut record = piece.to_vec();
        if what & 0x40 == 0 {
            record.splice(..0, [0; 12]);
        }
        if what & 0x80 == 0 && record.len() >= 24 {
            // Past the first check.
            record[18..24].copy_from_slice(&mac(what % 5 + 1).0);
        }
        let record = Some(record);
        let mut one = One { from, record };
        switch.pass(&[from], &mut one, now);
        now += Duration::from_millis(u64::from(low));
    }
    assert!(switch.leases(now).len() <= 21 + 5);
});
