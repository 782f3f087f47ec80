//! Control messages as the harness sees them at their sender's `sendmsg`, and the name of the point
//! that each of them is.
//!
//! Every variant of every protocol enum has a name here: one that is added does not compile until it
//! has one, and a test reads the protocol files and compares.

use bulkhead_ipc::protocol::adopt::{Adopt, Adopted};
use bulkhead_ipc::protocol::birth::{Birth, Born};
use bulkhead_ipc::protocol::device::{FromDevice, ToDevice};
use bulkhead_ipc::protocol::switch::{FromSwitch, ToSwitch};
use bulkhead_ipc::protocol::vcpu::{FromVcpu, ToVcpu};
use serde::de::DeserializeOwned;

/// A boundary of the protocol: who talks to whom, and about what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Broker to a newborn.
    Birth,
    /// A newborn to its broker.
    Born,
    /// Broker to `vcpu`.
    ToVcpu,
    /// `vcpu` to the broker.
    FromVcpu,
    /// Broker to a device process.
    ToDevice,
    /// A device process to the broker.
    FromDevice,
    /// Broker to the switch of a network.
    ToSwitch,
    /// The switch of a network to the broker.
    FromSwitch,
    /// A new broker to a process that lives: its datagram.
    Adopt,
    /// The process's answer.
    Adopted,
}

impl Boundary {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Birth,
        Self::Born,
        Self::ToVcpu,
        Self::FromVcpu,
        Self::ToDevice,
        Self::FromDevice,
        Self::ToSwitch,
        Self::FromSwitch,
        Self::Adopt,
        Self::Adopted,
    ];

    /// Names of its messages, `BOUNDARY.MESSAGE`.
    #[must_use]
    pub const fn messages(self) -> &'static [&'static str] {
        match self {
            Self::Birth => BIRTH,
            Self::Born => BORN,
            Self::ToVcpu => TO_VCPU,
            Self::FromVcpu => FROM_VCPU,
            Self::ToDevice => TO_DEVICE,
            Self::FromDevice => FROM_DEVICE,
            Self::ToSwitch => TO_SWITCH,
            Self::FromSwitch => FROM_SWITCH,
            Self::Adopt => ADOPT,
            Self::Adopted => ADOPTED,
        }
    }

    /// Who sends, and who receives.
    #[must_use]
    pub const fn parties(self) -> (&'static str, &'static str) {
        match self {
            Self::Birth | Self::Adopt => ("broker", "process"),
            Self::Born | Self::Adopted => ("process", "broker"),
            Self::ToVcpu => ("broker", "vcpu"),
            Self::FromVcpu => ("vcpu", "broker"),
            Self::ToDevice => ("broker", "device"),
            Self::FromDevice => ("device", "broker"),
            Self::ToSwitch => ("broker", "switch"),
            Self::FromSwitch => ("switch", "broker"),
        }
    }

    /// Whether a broker sends it.
    #[must_use]
    pub fn is_brokers(self) -> bool {
        self.parties().0 == "broker"
    }

    /// Reads a packet and names it; `None` when it is no message of this boundary.
    #[must_use]
    pub fn name_of(self, bytes: &[u8]) -> Option<&'static str> {
        match self {
            Self::Birth => decode(bytes).map(|message| birth(&message)),
            Self::Born => decode(bytes).map(|message| born(&message)),
            Self::ToVcpu => decode(bytes).map(|message| to_vcpu(&message)),
            Self::FromVcpu => decode(bytes).map(|message| from_vcpu(&message)),
            Self::ToDevice => decode(bytes).map(|message| to_device(&message)),
            Self::FromDevice => decode(bytes).map(|message| from_device(&message)),
            Self::ToSwitch => decode(bytes).map(|message| to_switch(&message)),
            Self::FromSwitch => decode(bytes).map(|message| from_switch(&message)),
            Self::Adopt => decode(bytes).map(|message| adopt(&message)),
            Self::Adopted => decode(bytes).map(|message| adopted(&message)),
        }
    }
}

/// Reads a packet that is one message and nothing else.
#[must_use]
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Option<T> {
    let (message, rest) = postcard::take_from_bytes(bytes).ok()?;
    rest.is_empty().then_some(message)
}

/// The names of a boundary's messages, and the name of one of them, from one list.
macro_rules! names {
    ($table:ident, $name:ident, $type:ty, $($message:pat => $point:literal),+ $(,)?) => {
        const $table: &[&str] = &[$($point),+];
        const fn $name(message: &$type) -> &'static str {
            match message {
                $($message => $point),+
            }
        }
    };
}

names!(BIRTH, birth, Birth, Birth { .. } => "birth.birth");
names!(BORN, born, Born,
    Born::Locked { .. } => "born.locked",
    Born::Failed { .. } => "born.failed",
);
names!(TO_VCPU, to_vcpu, ToVcpu,
    ToVcpu::Kill => "to-vcpu.kill",
    ToVcpu::Ping(_) => "to-vcpu.ping",
    ToVcpu::Tell => "to-vcpu.tell",
    ToVcpu::PowerButton => "to-vcpu.power-button",
    ToVcpu::Pause => "to-vcpu.pause",
    ToVcpu::Resume => "to-vcpu.resume",
    ToVcpu::PrepareSlot { .. } => "to-vcpu.prepare-slot",
    ToVcpu::DeviceLost { .. } => "to-vcpu.device-lost",
    ToVcpu::PrepareLegacy { .. } => "to-vcpu.prepare-legacy",
    ToVcpu::LegacyLost => "to-vcpu.legacy-lost",
);
names!(FROM_VCPU, from_vcpu, FromVcpu,
    FromVcpu::Pong(_) => "from-vcpu.pong",
    FromVcpu::Paused => "from-vcpu.paused",
    FromVcpu::Resumed => "from-vcpu.resumed",
    FromVcpu::SlotPrepared { .. } => "from-vcpu.slot-prepared",
    FromVcpu::SlotServing { .. } => "from-vcpu.slot-serving",
    FromVcpu::RequestGivenUp { .. } => "from-vcpu.request-given-up",
    FromVcpu::DeviceFault { .. } => "from-vcpu.device-fault",
    FromVcpu::GuestFault { .. } => "from-vcpu.guest-fault",
    FromVcpu::LegacyPrepared { .. } => "from-vcpu.legacy-prepared",
    FromVcpu::LegacyServing { .. } => "from-vcpu.legacy-serving",
    FromVcpu::LegacyFault { .. } => "from-vcpu.legacy-fault",
    FromVcpu::Report { .. } => "from-vcpu.report",
    FromVcpu::Ended(_) => "from-vcpu.ended",
);
names!(TO_DEVICE, to_device, ToDevice,
    ToDevice::Shutdown => "to-device.shutdown",
    ToDevice::Ping(_) => "to-device.ping",
    ToDevice::Resize { .. } => "to-device.resize",
    ToDevice::TryAgain => "to-device.try-again",
    ToDevice::Limits(_) => "to-device.limits",
    ToDevice::Dialled { .. } => "to-device.dialled",
    ToDevice::Link(_) => "to-device.link",
);
names!(FROM_DEVICE, from_device, FromDevice,
    FromDevice::Pong(_) => "from-device.pong",
    FromDevice::Fault { .. } => "from-device.fault",
    FromDevice::NoRoom => "from-device.no-room",
    FromDevice::HasRoom => "from-device.has-room",
    FromDevice::Dial { .. } => "from-device.dial",
    FromDevice::Traffic(_) => "from-device.traffic",
);
names!(TO_SWITCH, to_switch, ToSwitch,
    ToSwitch::Shutdown => "to-switch.shutdown",
    ToSwitch::Ping(_) => "to-switch.ping",
    ToSwitch::Restore(_) => "to-switch.restore",
    ToSwitch::SetPort { .. } => "to-switch.set-port",
    ToSwitch::SetUplink { .. } => "to-switch.set-uplink",
    ToSwitch::RemovePort(_) => "to-switch.remove-port",
    ToSwitch::Capture { .. } => "to-switch.capture",
    ToSwitch::EndCapture => "to-switch.end-capture",
    ToSwitch::Report => "to-switch.report",
);
names!(FROM_SWITCH, from_switch, FromSwitch,
    FromSwitch::Pong(_) => "from-switch.pong",
    FromSwitch::Leased(_) => "from-switch.leased",
    FromSwitch::Refused { .. } => "from-switch.refused",
    FromSwitch::Broke { .. } => "from-switch.broke",
    FromSwitch::Ports(_) => "from-switch.ports",
    FromSwitch::Captured { .. } => "from-switch.captured",
);
names!(ADOPT, adopt, Adopt, Adopt { .. } => "adoption.adopt");
names!(ADOPTED, adopted, Adopted, Adopted { .. } => "adoption.adopted");

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn kebab(name: &str) -> String {
        let mut out = String::new();
        for (n, c) in name.chars().enumerate() {
            if c.is_uppercase() && n > 0 {
                out.push('-');
            }
            out.push(c.to_ascii_lowercase());
        }
        out
    }

    /// The variants of `pub enum NAME` in Rust text that rustfmt has formatted.
    fn variants(text: &str, name: &str) -> Vec<String> {
        let head = format!("pub enum {name} {{");
        let body = text.split_once(&head).expect(name).1;
        let body = body.split_once("\n}").unwrap().0;
        let first = |line: &str| {
            let line = line.strip_prefix("    ")?;
            let name: String = line.chars().take_while(char::is_ascii_alphabetic).collect();
            line.starts_with(|c: char| c.is_ascii_uppercase())
                .then_some(name)
        };
        body.lines().filter_map(first).collect()
    }

    #[test]
    fn every_message_of_the_protocol_files_is_a_point() {
        let protocol = concat!(env!("CARGO_MANIFEST_DIR"), "/../../ipc/src/protocol");
        let read = |file: &str| std::fs::read_to_string(format!("{protocol}/{file}")).unwrap();
        let mut expected: BTreeSet<String> = ["birth.birth", "adoption.adopt", "adoption.adopted"]
            .map(str::to_owned)
            .into();
        for (file, name, boundary) in [
            ("birth.rs", "Born", "born"),
            ("vcpu.rs", "ToVcpu", "to-vcpu"),
            ("vcpu.rs", "FromVcpu", "from-vcpu"),
            ("device.rs", "ToDevice", "to-device"),
            ("device.rs", "FromDevice", "from-device"),
            ("switch.rs", "ToSwitch", "to-switch"),
            ("switch.rs", "FromSwitch", "from-switch"),
        ] {
            let found = variants(&read(file), name);
            assert!(found.len() > 1, "{name}: {found:?}");
            expected.extend(found.iter().map(|v| format!("{boundary}.{}", kebab(v))));
        }
        let points = Boundary::ALL.iter().flat_map(|b| b.messages());
        let points: BTreeSet<String> = points.map(|&name| name.to_owned()).collect();
        assert_eq!(points, expected);
        // A file that is added is a boundary that nobody here knows. Work on images has nothing to do with
        // machines: whoever asked for it sees it fail. An agent is inside a guest, and its messages cross no
        // boundary of a host's processes.
        let mut files: Vec<_> = std::fs::read_dir(protocol)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(
            files,
            [
                "adopt.rs",
                "agent.rs",
                "birth.rs",
                "device.rs",
                "image.rs",
                "mod.rs",
                "switch.rs",
                "vcpu.rs"
            ]
        );
    }

    #[test]
    fn names_are_those_of_the_messages() {
        let bytes = postcard::to_stdvec(&ToVcpu::PrepareSlot {
            slot: 1,
            generation: 2,
            blame: false,
            fields_change: false,
        })
        .unwrap();
        assert_eq!(
            Boundary::ToVcpu.name_of(&bytes),
            Some("to-vcpu.prepare-slot")
        );
        assert_eq!(Boundary::ToVcpu.name_of(&[bytes, vec![0]].concat()), None);
    }
}
