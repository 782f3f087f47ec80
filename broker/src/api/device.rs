//! The devices of a machine, and the processes that serve them.

use crate::escape::escaped;
use crate::vm::session::{Medium, ProgramFile};
use crate::vm::spec::{BackingSpec, FILES_MAX, FileSpec};
use bulkhead_ipc::protocol::birth::{DiskLimits, ImageFormat, Rate};
use bulkhead_ipc::protocol::device::{Direction, Traffic};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Whether a device is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceState {
    /// Its first process comes up; what the guest asks for waits.
    Starting,
    /// It is.
    Serving,
    /// Its process is dead and the next one comes up; what the guest asks for waits.
    Restarting,
    /// It has no process any more and answers everything with errors, until it is restarted.
    Lost,
}

impl DeviceState {
    /// The word for it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Serving => "serving",
            Self::Restarting => "restarting",
            Self::Lost => "lost",
        }
    }
}

/// A device of a machine that runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Kind, such as `blk`.
    pub kind: String,
    /// Name in the VM file, or the kind's.
    pub name: String,
    /// The process that serves it.
    pub pid: Option<i32>,
    /// Counts its processes, from 1.
    pub generation: u32,
    /// Whether it is served.
    pub state: DeviceState,
    /// Version of its program, as the process says; `None` until it has.
    pub version: Option<String>,
    /// Its program, as the host knows it.
    pub program: ProgramFile,
    /// How often another process has taken the place of one, within the present life of the machine.
    pub restarts: u32,
}

/// `GET /v1/vms/NAME/devices`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Devices {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Whose.
    pub name: String,
    /// Its devices; none when it does not run.
    pub devices: Vec<Device>,
}

/// What `POST /v1/vms/NAME/devices/DEVICE/restart` and `/upgrade` answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceChanged {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The machine.
    pub name: String,
    /// Whether another process serves the device now.
    pub changed: bool,
    /// The device before.
    pub old: Device,
    /// The device now.
    pub new: Device,
}

/// Body of `POST /v1/vms/NAME/devices/DEVICE/limit`: what a disk or a network device (in each direction) may do in a second
/// from now on, until the machine ends. What is left out is not limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitDevice {
    /// Bytes read and written, at least 4096.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_s: Option<u64>,
    /// Bytes at once after a time of rest; those of a second when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_burst: Option<u64>,
    /// Requests of any kind, or packets, at least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_s: Option<u64>,
    /// Requests at once after a time of rest; those of a second when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_burst: Option<u64>,
}

impl LimitDevice {
    /// The limits that are meant.
    ///
    /// # Errors
    /// The field, its value and what was expected.
    pub fn limits(&self) -> Result<DiskLimits, String> {
        let rate = |name: &str, per_s: Option<u64>, burst: Option<u64>, least: u64| {
            for (part, value) in [("per_s", per_s), ("burst", burst)] {
                if let Some(value) = value.filter(|value| *value < least) {
                    return Err(format!(
                        "{name}_{part}: got {value}, expected at least {least}"
                    ));
                }
            }
            match (per_s, burst) {
                (None, Some(burst)) => Err(format!(
                    "{name}_burst: got {burst}, expected {name}_per_s beside it"
                )),
                (per_s, burst) => Ok(per_s.map(|per_s| Rate {
                    per_s,
                    burst: burst.unwrap_or(per_s),
                })),
            }
        };
        Ok(DiskLimits {
            bytes: rate("bytes", self.bytes_per_s, self.bytes_burst, 4096)?,
            requests: rate("requests", self.requests_per_s, self.requests_burst, 1)?,
        })
    }
}

impl From<DiskLimits> for LimitDevice {
    fn from(limits: DiskLimits) -> Self {
        Self {
            bytes_per_s: limits.bytes.map(|rate| rate.per_s),
            bytes_burst: limits.bytes.map(|rate| rate.burst),
            requests_per_s: limits.requests.map(|rate| rate.per_s),
            requests_burst: limits.requests.map(|rate| rate.burst),
        }
    }
}

/// Body of `POST /v1/vms/NAME/devices/DEVICE/resize`: what a disk is grown to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDevice {
    /// In bytes, a multiple of 512.
    pub bytes: u64,
}

/// Body of `POST /v1/vms/NAME/devices/DEVICE/medium`: what a disk is made of from now on, until the machine
/// ends. All paths are absolute.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeMedium {
    /// The image or block device.
    pub path: PathBuf,
    /// Its format: `raw`, `qcow2` or `vmdk`.
    pub format: ImageFormat,
    /// The images below it, the one next to it first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<BackingFile>,
    /// The files with the data of a VMDK image.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extents: Vec<PathBuf>,
}

/// An image below another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
}

impl ChangeMedium {
    /// The medium that is meant.
    ///
    /// # Errors
    /// The field, its value and what was expected.
    pub fn medium(self) -> Result<Medium, String> {
        let below = self.backing.iter().map(|below| &below.path);
        let mut paths = std::iter::once(&self.path)
            .chain(below)
            .chain(&self.extents);
        if let Some(path) = paths.find(|path| !path.is_absolute()) {
            let path = escaped(path.as_os_str().as_encoded_bytes());
            return Err(format!("path: got {path}, expected an absolute path"));
        }
        if 1 + self.backing.len() + self.extents.len() > FILES_MAX {
            return Err(format!(
                "files: got {}, expected at most {FILES_MAX}",
                1 + self.backing.len() + self.extents.len()
            ));
        }
        let below = |BackingFile { path, format }| BackingSpec { path, format };
        Ok(Medium {
            path: self.path,
            format: self.format,
            extents: self
                .extents
                .into_iter()
                .map(|path| FileSpec { path })
                .collect(),
            backing: self.backing.into_iter().map(below).collect(),
        })
    }
}

/// What `POST /v1/vms/NAME/devices/DEVICE/limit` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limited {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The machine.
    pub name: String,
    /// The disk or network device.
    pub device: String,
    /// What it may do now.
    pub limits: LimitDevice,
}

/// Body of `POST /v1/vms/NAME/devices/DEVICE/link`: whether the cable of a network device is plugged in from now
/// on, until the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinkDevice {
    /// Whether it is.
    pub up: bool,
}

/// What `POST /v1/vms/NAME/devices/DEVICE/link` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Linked {
    /// [`super::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// The machine.
    pub name: String,
    /// The network device.
    pub device: String,
    /// Whether its cable is plugged in.
    pub up: bool,
}

/// What a network device has done within the present life of its machine; a second old at most. A frame that the
/// host cuts up for the guest, or the other way round, is one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStats {
    /// Name in the VM file.
    pub device: String,
    /// Frames that the guest was given.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames for the guest that got lost here.
    pub rx_dropped: u64,
    /// Frames that the guest has sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that got lost here.
    pub tx_dropped: u64,
}

impl NetworkStats {
    /// Of a device with these counters.
    #[must_use]
    pub fn new(device: &str, traffic: Traffic) -> Self {
        let Traffic { received, sent } = traffic;
        let parts = |d: Direction| (d.packets, d.bytes, d.dropped);
        let (rx_packets, rx_bytes, rx_dropped) = parts(received);
        let (tx_packets, tx_bytes, tx_dropped) = parts(sent);
        Self {
            device: device.to_owned(),
            rx_packets,
            rx_bytes,
            rx_dropped,
            tx_packets,
            tx_bytes,
            tx_dropped,
        }
    }
}
