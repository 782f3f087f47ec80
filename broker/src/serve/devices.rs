//! The devices of a machine: who serves them, and having another process do so.
//!
//! What is known comes from the events of the machine's run alone. That a device was upgraded is
//! believed when the process that serves it was started from the very file that is on disk.

use super::Shared;
use super::actor::{Ask, Vm};
use super::host::Host;
use super::routes::{Answer, Caller, Json, carried_out, json};
use super::view::View;
use crate::api::{
    ApiError, ChangeMedium, Code, Device, DeviceChanged, DeviceState, Devices, LimitDevice,
    Limited, LinkDevice, Linked, NetworkStats, ResizeDevice, SCHEMA_VERSION, State as Doing,
};
use crate::launch::program_path;
use crate::vm::record::Record;
use crate::vm::session::{Command, DiskChange, Event, ProgramFile};
use crate::vmfile::is_name;
use axum::Extension;
use axum::extract::{FromRequestParts, Path, State};
use axum::http::request::Parts;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::DiskLimits;
use bulkhead_ipc::protocol::device::{Direction, Traffic};
use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

/// How long it may take until another process serves: the run's own deadlines together are shorter.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(90);
/// Refused commands that are remembered for whoever gave them.
const REFUSALS_MAX: usize = 32;

/// What is known of the devices of a machine.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    devices: Vec<(ProcId, Device)>,
    /// Refused commands so far.
    refused: u64,
    /// The last ones: number, device, reason.
    refusals: VecDeque<(u64, String, String)>,
    traffic: Vec<Counted>,
}

/// What a network device has done within the present life of its machine.
#[derive(Debug, Clone, Copy)]
struct Counted {
    /// The process that counts now.
    id: ProcId,
    /// What those before it have done.
    before: Traffic,
    now: Traffic,
}

impl Known {
    /// Of a machine that begins, or is over.
    pub(super) fn clear(&mut self) {
        self.devices.clear();
        self.traffic.clear();
    }

    /// Of a machine that another broker has begun.
    pub(super) fn found(&mut self, record: &Record) {
        self.clear();
        for process in &record.processes {
            let (id, alive) = (process.id, process.is_alive());
            self.started(id, &process.name, process.pid, process.program.into());
            let Some(device) = self.served_by(id) else {
                continue;
            };
            (device.state, device.pid) = match alive {
                true => (DeviceState::Serving, Some(process.pid)),
                false => (DeviceState::Restarting, None),
            };
            device.version.clone_from(&process.version);
            device.restarts = id.generation.saturating_sub(1);
        }
    }

    fn place_of(&mut self, id: ProcId) -> Option<&mut (ProcId, Device)> {
        let same =
            |known: &&mut (ProcId, Device)| (known.0.kind, known.0.index) == (id.kind, id.index);
        self.devices.iter_mut().find(same)
    }

    /// The device, if its process is `id` and no later one.
    fn served_by(&mut self, id: ProcId) -> Option<&mut Device> {
        let place = self.place_of(id).filter(|place| place.0 == id)?;
        Some(&mut place.1)
    }

    fn named(&self, name: &str) -> Option<&Device> {
        let mut devices = self.devices.iter().map(|(_, device)| device);
        devices.find(|device| device.name == name)
    }

    fn started(&mut self, id: ProcId, name: &str, pid: i32, program: ProgramFile) {
        if id.kind == ProcKind::Vcpu {
            return;
        }
        let new = Device {
            kind: id.kind.name().to_owned(),
            name: name.to_owned(),
            pid: Some(pid),
            generation: id.generation,
            state: DeviceState::Starting,
            version: None,
            program,
            restarts: 0,
        };
        match self.place_of(id) {
            None => self.devices.push((id, new)),
            Some(place) => {
                let restarts = place.1.restarts;
                let state = DeviceState::Restarting;
                *place = (
                    id,
                    Device {
                        state,
                        restarts,
                        ..new
                    },
                );
            }
        }
    }

    /// What an event changes.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Started {
                id,
                name,
                pid,
                program,
                ..
            } => self.started(*id, name, *pid, *program),
            Event::Locked { id, program, .. } => {
                if let Some(device) = self.served_by(*id) {
                    device.version = Some(program.clone());
                    if device.state == DeviceState::Starting {
                        device.state = DeviceState::Serving;
                    }
                }
            }
            Event::AllLocked { .. } => {
                let devices = self.devices.iter_mut().map(|(_, device)| device);
                for device in devices.filter(|d| d.state == DeviceState::Starting) {
                    device.state = DeviceState::Serving;
                }
            }
            Event::Died { id, .. } => {
                if let Some(device) = self.served_by(*id) {
                    (device.state, device.pid) = (DeviceState::Restarting, None);
                }
            }
            Event::Restarted(restart) => {
                if let Some(device) = self.served_by(restart.id) {
                    device.state = DeviceState::Serving;
                    device.version = Some(restart.program.clone());
                    device.restarts = device.restarts.saturating_add(1);
                }
            }
            Event::Degraded { id, .. } => {
                if let Some(place) = self.place_of(*id) {
                    // The process that was lost may never have been started.
                    place.1.generation = id.generation;
                    (place.1.state, place.1.pid) = (DeviceState::Lost, None);
                    place.0 = *id;
                }
            }
            Event::Traffic { id, traffic } => self.count(*id, *traffic),
            Event::Refused { device, reason, .. } => {
                self.refused += 1;
                self.refusals.truncate(REFUSALS_MAX - 1);
                let refusal = (self.refused, device.clone(), reason.clone());
                self.refusals.push_front(refusal);
            }
            Event::Restarting { .. } => self.clear(),
            _ => {}
        }
    }

    /// Why a command about a device was refused, or undone, since `since` were.
    fn refusal(&self, device: &str, since: u64) -> Option<&str> {
        let mut later = self.refusals.iter().take_while(|(n, ..)| *n > since);
        let (_, _, reason) = later.find(|(_, name, _)| name == device)?;
        Some(reason)
    }

    fn count(&mut self, id: ProcId, now: Traffic) {
        let mut known = self.traffic.iter_mut();
        match known.find(|counted| counted.id.index == id.index) {
            None => self.traffic.push(Counted {
                id,
                before: Traffic::default(),
                now,
            }),
            Some(counted) => {
                if counted.id != id {
                    counted.before = sum(counted.before, counted.now);
                    counted.id = id;
                }
                counted.now = now;
            }
        }
    }

    /// What the network devices have done, as far as they have told; they do once a second.
    pub(super) fn networks(&self) -> Vec<NetworkStats> {
        let networks = self.devices.iter();
        let networks = networks.filter(|(id, _)| id.kind == ProcKind::Net);
        networks
            .map(|(id, device)| {
                let mut counted = self.traffic.iter();
                let counted = counted.find(|counted| counted.id.index == id.index);
                let all = counted.map(|counted| sum(counted.before, counted.now));
                NetworkStats::new(&device.name, all.unwrap_or_default())
            })
            .collect()
    }

    pub(super) fn list(&self) -> Vec<Device> {
        let devices = self.devices.iter().map(|(_, device)| device.clone());
        devices.collect()
    }
}

fn sum(a: Traffic, b: Traffic) -> Traffic {
    let both = |a: Direction, b: Direction| Direction {
        packets: a.packets.saturating_add(b.packets),
        bytes: a.bytes.saturating_add(b.bytes),
        dropped: a.dropped.saturating_add(b.dropped),
    };
    Traffic {
        received: both(a.received, b.received),
        sent: both(a.sent, b.sent),
    }
}

/// What a device was like when it was to be replaced.
struct Before {
    run: u64,
    device: Device,
    refused: u64,
}

impl Before {
    fn of(view: &View, name: &str) -> Result<Self, ApiError> {
        let (vm, known) = (&view.record.name, &view.devices);
        if !matches!(view.state, Doing::Running | Doing::Paused) {
            let line = format!(
                "{vm} is {}, so no device of it is served",
                view.state.word()
            );
            return Err(ApiError::new(Code::Conflict, line));
        }
        let device = known.named(name).ok_or_else(|| {
            let names = known.devices.iter().map(|(_, device)| device.name.as_str());
            let names = names.collect::<Vec<_>>().join(", ");
            let line = format!("{vm} has no device {name}, expected one of {names}");
            ApiError::new(Code::NotFound, line)
        })?;
        Ok(Self {
            run: view.run,
            device: device.clone(),
            refused: known.refused,
        })
    }

    /// What has become of it, once something has.
    fn outcome(&self, view: &View) -> Option<Result<Device, ApiError>> {
        let (name, known) = (&self.device.name, &view.devices);
        let conflict = |what: String| {
            let line = format!("{}/{name}: {what}", view.record.name);
            Some(Err(ApiError::new(Code::Conflict, line)))
        };
        if view.run != self.run || !matches!(view.state, Doing::Running | Doing::Paused) {
            return conflict("the machine has ended or begun again meanwhile".to_owned());
        }
        let now = known.named(name)?;
        if let Some(reason) = known.refusal(name, self.refused) {
            // That a program was taken back is told a moment before the one before it is seen to serve.
            let is_on_its_way =
                matches!(now.state, DeviceState::Starting | DeviceState::Restarting);
            return if is_on_its_way {
                None
            } else {
                conflict(reason.to_owned())
            };
        }
        let is_later = now.generation > self.device.generation;
        match now.state {
            DeviceState::Serving if is_later => Some(Ok(now.clone())),
            DeviceState::Lost if is_later || self.device.state != DeviceState::Lost => {
                let lost = view.degraded.iter().find(|lost| lost.device == *name);
                conflict(lost.map_or("it is lost".to_owned(), |lost| lost.reason.clone()))
            }
            _ => None,
        }
    }
}

impl Vm {
    /// Has another process serve a device.
    async fn restart_device(&self, name: &str) -> Result<DeviceChanged, ApiError> {
        let _one_at_a_time = self.replacing.lock().await;
        let before = Before::of(&self.view.borrow(), name)?;
        let new = self
            .replace_device(&before, Command::RestartDevice(name.to_owned()))
            .await?;
        Ok(self.device_changed(true, before.device, new))
    }

    /// Has a device served by the program that is on disk now, unless it is already.
    async fn upgrade_device(
        &self,
        shared: &Arc<Shared>,
        name: &str,
    ) -> Result<DeviceChanged, ApiError> {
        let _one_at_a_time = self.replacing.lock().await;
        let before = Before::of(&self.view.borrow(), name)?;
        let old = before.device.clone();
        if old.state == DeviceState::Serving && old.program == on_disk(shared, &old).await? {
            return Ok(self.device_changed(false, old.clone(), old));
        }
        let new = self
            .replace_device(&before, Command::UpgradeDevice(name.to_owned()))
            .await?;
        if new.program != on_disk(shared, &old).await? {
            let vm = &self.view.borrow().record.name;
            let line = format!("{vm}/{name}: the program on disk was replaced once more meanwhile");
            return Err(ApiError::new(Code::Conflict, line));
        }
        Ok(self.device_changed(true, old, new))
    }

    async fn replace_device(&self, before: &Before, by: Command) -> Result<Device, ApiError> {
        self.ask(|reply| Ask::Command(by, reply)).await?;
        let what = format!("has no other process for {}", before.device.name);
        let served = |view: &View| before.outcome(view);
        self.wait_until(REPLACE_TIMEOUT, &what, served).await?
    }

    /// Plugs the cable of a network device in or pulls it out.
    async fn link_device(&self, name: &str, up: bool) -> Result<Linked, ApiError> {
        let device = Before::of(&self.view.borrow(), name)?.device;
        let vm = self.view.borrow().record.name.clone();
        if device.kind != ProcKind::Net.name() {
            let line = format!(
                "{vm}/{name} is a {}, expected a network device",
                device.kind
            );
            return Err(ApiError::new(Code::BadRequest, line));
        }
        let command = Command::LinkDevice {
            device: name.to_owned(),
            up,
        };
        self.ask(|reply| Ask::Command(command, reply)).await?;
        Ok(Linked {
            schema_version: SCHEMA_VERSION,
            name: vm,
            device: name.to_owned(),
            up,
        })
    }

    /// Changes what a disk or network device may do in a second.
    async fn limit_device(&self, name: &str, limits: DiskLimits) -> Result<Limited, ApiError> {
        let device = Before::of(&self.view.borrow(), name)?.device;
        let vm = self.view.borrow().record.name.clone();
        if ![ProcKind::Blk, ProcKind::Net]
            .map(ProcKind::name)
            .contains(&device.kind.as_str())
        {
            let line = format!(
                "{vm}/{name} is a {}, expected a disk or a network device",
                device.kind
            );
            return Err(ApiError::new(Code::BadRequest, line));
        }
        let command = Command::LimitDevice {
            device: name.to_owned(),
            limits,
        };
        self.ask(|reply| Ask::Command(command, reply)).await?;
        Ok(Limited {
            schema_version: SCHEMA_VERSION,
            name: vm,
            device: name.to_owned(),
            limits: limits.into(),
        })
    }

    /// Gives a disk another size or medium.
    async fn change_disk(&self, name: &str, change: DiskChange) -> Result<DeviceChanged, ApiError> {
        let _one_at_a_time = self.replacing.lock().await;
        let before = Before::of(&self.view.borrow(), name)?;
        let kind = &before.device.kind;
        if *kind != ProcKind::Blk.name() {
            let vm = &self.view.borrow().record.name;
            let line = format!("{vm}/{name} is a {kind}, expected a disk");
            return Err(ApiError::new(Code::BadRequest, line));
        }
        let device = name.to_owned();
        let command = Command::ChangeDisk { device, change };
        let new = self.replace_device(&before, command).await?;
        Ok(self.device_changed(true, before.device, new))
    }

    fn device_changed(&self, changed: bool, old: Device, new: Device) -> DeviceChanged {
        DeviceChanged {
            schema_version: SCHEMA_VERSION,
            name: self.view.borrow().record.name.clone(),
            changed,
            old,
            new,
        }
    }
}

/// The program of a device's kind that is on disk now.
async fn on_disk(shared: &Arc<Shared>, device: &Device) -> Result<ProgramFile, ApiError> {
    let kind = ProcKind::ALL.into_iter().find(|k| k.name() == device.kind);
    let kind = kind.ok_or_else(|| ApiError::new(Code::Internal, "a device of no kind"))?;
    let path = program_path(&shared.places.binaries, kind);
    super::blocking(move || {
        let about = std::fs::metadata(&path).map_err(|error| {
            ApiError::new(Code::Host, format!("program {}: {error}", path.display()))
        })?;
        Ok((about.dev(), about.ino()).into())
    })
    .await
}

/// The machine and the device in a path.
pub(super) struct Named(String, String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let names = Path::<(String, String)>::from_request_parts(parts, state).await;
        match names {
            Ok(Path((vm, _))) if !is_name(&vm) => Err(ApiError::no_machine(&vm)),
            Ok(Path((vm, device))) if is_name(&device) => Ok(Self(vm, device)),
            Ok(Path((vm, device))) => {
                let device = crate::escape::excerpt(&device, 64);
                let line = format!("{vm} has no device {device}");
                Err(ApiError::new(Code::NotFound, line))
            }
            Err(_) => Err(ApiError::new(Code::BadRequest, "the names are not UTF-8")),
        }
    }
}

/// `GET /v1/vms/NAME/devices`.
pub(super) async fn list(
    State(host): State<Arc<Host>>,
    super::routes::Name(name): super::routes::Name,
) -> Answer {
    let vm = host.vm(&name).await?;
    let devices = vm.view.borrow().devices.list();
    json(&Devices {
        schema_version: SCHEMA_VERSION,
        name,
        devices,
    })
}

/// `POST /v1/vms/NAME/devices/DEVICE/restart`.
pub(super) async fn restart(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(vm = name, device, user = caller.0, "restart device");
    json(&carried_out(async move { vm.restart_device(&device).await }).await?)
}

/// `POST /v1/vms/NAME/devices/DEVICE/upgrade`.
pub(super) async fn upgrade(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(vm = name, device, user = caller.0, "upgrade device");
    let work = async move { vm.upgrade_device(&host.shared, &device).await };
    json(&carried_out(work).await?)
}

/// `POST /v1/vms/NAME/devices/DEVICE/limit`.
pub(super) async fn limit(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
    Json(wish): Json<LimitDevice>,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(vm = name, device, user = caller.0, "limit device");
    let limits = wish
        .limits()
        .map_err(|e| ApiError::new(Code::BadRequest, e))?;
    json(&carried_out(async move { vm.limit_device(&device, limits).await }).await?)
}

/// `POST /v1/vms/NAME/devices/DEVICE/resize`.
pub(super) async fn resize(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
    Json(wish): Json<ResizeDevice>,
) -> Answer {
    let vm = host.vm(&name).await?;
    let bytes = wish.bytes;
    tracing::info!(vm = name, device, bytes, user = caller.0, "resize device");
    let change = DiskChange::Size { bytes };
    json(&carried_out(async move { vm.change_disk(&device, change).await }).await?)
}

/// `POST /v1/vms/NAME/devices/DEVICE/medium`.
pub(super) async fn medium(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
    Json(wish): Json<ChangeMedium>,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(vm = name, device, user = caller.0, "change medium");
    let medium = wish.medium();
    let medium = medium.map_err(|e| ApiError::new(Code::BadRequest, e))?;
    let change = DiskChange::Medium(medium);
    json(&carried_out(async move { vm.change_disk(&device, change).await }).await?)
}

/// `POST /v1/vms/NAME/devices/DEVICE/link`.
pub(super) async fn link(
    State(host): State<Arc<Host>>,
    Extension(caller): Extension<Caller>,
    Named(name, device): Named,
    Json(wish): Json<LinkDevice>,
) -> Answer {
    let vm = host.vm(&name).await?;
    tracing::info!(
        vm = name,
        device,
        up = wish.up,
        user = caller.0,
        "link device"
    );
    json(&carried_out(async move { vm.link_device(&device, wish.up).await }).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::session::Restart;

    fn blk(generation: u32) -> ProcId {
        ProcId {
            kind: ProcKind::Blk,
            index: 0,
            generation,
        }
    }

    fn started(generation: u32, inode: u64) -> Event {
        Event::Started {
            id: blk(generation),
            name: "disk0".into(),
            pid: 100 + i32::try_from(generation).unwrap(),
            program: (1, inode).into(),
            users: None,
        }
    }

    fn locked(generation: u32) -> Event {
        Event::Locked {
            id: blk(generation),
            after: Duration::ZERO,
            landlock_abi: 6,
            program: "1.0".into(),
        }
    }

    fn died(generation: u32) -> Event {
        Event::Died {
            id: blk(generation),
            name: "disk0".into(),
            reason: "killed".into(),
        }
    }

    fn restarted(generation: u32) -> Event {
        Event::Restarted(Restart {
            id: blk(generation),
            name: "disk0".into(),
            pid: 0,
            program: "1.0".into(),
            reason: String::new(),
            after: Duration::ZERO,
        })
    }

    /// A machine with one disk, whose first process is `inode` 7.
    fn running() -> View {
        let mut view = View::new(crate::registry::VmRecord {
            name: "web".into(),
            id: String::new(),
            vm_file: String::new(),
            vcpus: 1,
            memory_bytes: 0,
            autostart: false,
            created_at_ms: 0,
            desired: crate::registry::Desired::Running,
            start_with_host: false,
            last: None,
        });
        view.state = Doing::Running;
        after(&mut view, &[started(1, 7), locked(1)]);
        view
    }

    fn after(view: &mut View, events: &[Event]) {
        events.iter().for_each(|event| view.devices.apply(event));
    }

    #[test]
    fn device_is_replaced_when_the_next_process_serves_and_not_before() {
        let mut view = running();
        let before = Before::of(&view, "disk0").unwrap();
        for event in [died(1), started(2, 8), locked(2)] {
            assert!(before.outcome(&view).is_none(), "before {event:?}");
            after(&mut view, &[event]);
        }
        assert_eq!(view.devices.list()[0].state, DeviceState::Restarting);
        after(&mut view, &[restarted(2)]);
        let new = before.outcome(&view).unwrap().unwrap();
        assert_eq!((new.generation, new.restarts, new.program.inode), (2, 1, 8));
    }

    #[test]
    fn return_of_the_old_program_is_no_upgrade() {
        let mut view = running();
        let before = Before::of(&view, "disk0").unwrap();
        let refused = Event::Refused {
            device: "disk0".into(),
            command: "upgrade disk0".into(),
            reason: "the program on disk does not serve".into(),
        };
        after(&mut view, &[died(1), started(2, 8), died(2), started(3, 7)]);
        after(&mut view, &[locked(3), refused]);
        assert!(before.outcome(&view).is_none(), "nothing serves yet");
        after(&mut view, &[restarted(3)]);
        let error = before.outcome(&view).unwrap().unwrap_err();
        assert!(error.message.contains("does not serve"), "{error}");
        // It is nobody else's business.
        let before = Before::of(&view, "disk0").unwrap();
        assert!(before.outcome(&view).is_none());
    }

    #[test]
    fn lost_device_is_no_answer_until_it_is_lost_again() {
        let mut view = running();
        let lost = |generation| Event::Degraded {
            id: blk(generation),
            name: "disk0".into(),
            reason: "dies too often".into(),
        };
        after(&mut view, &[died(1), lost(1)]);
        let before = Before::of(&view, "disk0").unwrap();
        assert!(before.outcome(&view).is_none());
        after(&mut view, &[lost(2)]);
        assert!(before.outcome(&view).unwrap().is_err());
    }

    #[test]
    fn refusals_are_bounded() {
        let mut view = running();
        for n in 0..1000 {
            after(
                &mut view,
                &[Event::Refused {
                    device: format!("d{n}"),
                    command: String::new(),
                    reason: String::new(),
                }],
            );
        }
        assert_eq!(view.devices.refusals.len(), REFUSALS_MAX);
        assert!(view.devices.refusal("d999", 999).is_some());
    }
}
