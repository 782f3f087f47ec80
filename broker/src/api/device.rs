//! The devices of a machine, and the processes that serve them.

use crate::vm::session::ProgramFile;
use serde::{Deserialize, Serialize};

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
