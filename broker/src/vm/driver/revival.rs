//! From a dead device process to the next one, on the broker's side.
//!
//! ```text
//!   dead ── its disk is free (a lock on a new file description) ── the vCPU process has made the
//!     window ready and hands it over ── launched like the first one ── serves
//! ```
//!
//! Each step has a deadline, and none is waited for: the machine's other events go on.

use super::medium::Change;
use super::{GROUPS_AFTER, Machine};
use crate::launch::Before;
use crate::supervisor::state::Event;
use crate::vm::disk_hold::{Claimed, Unlocked};
use crate::vm::household::{DeviceWiring, LegacyWiring, Positions};
use crate::vm::resources::DiskFiles;
use crate::vm::session::{self as vm, RESTARTS_KEPT_MAX, Restart, RunError};
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::vcpu::ToVcpu;
use std::os::fd::OwnedFd;
use std::time::Duration;
use tokio::time::Instant;

/// How long the kernel may take to finish what a dead process has begun.
const FENCE_TIMEOUT: Duration = Duration::from_secs(20);
/// Pause between two looks at a disk that is not free.
const FENCE_POLL: Duration = Duration::from_millis(1);
/// Pause between two tries to take the lock of a disk that is in use already.
const LOCK_POLL: Duration = Duration::from_millis(10);
/// How long the vCPU process may take to make a window ready.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(5);

/// A process whose disk's lock is still that of its dead predecessor's ring.
#[derive(Debug)]
pub(super) struct LateLock {
    id: ProcId,
    unlocked: Unlocked,
    /// When to try again.
    look: Instant,
    until: Instant,
}

/// A process on its way.
#[derive(Debug)]
pub(super) struct Revival {
    id: ProcId,
    /// Of a virtio device; the legacy process has none.
    slot: Option<u8>,
    blame: bool,
    stage: Stage,
    until: Instant,
}

/// A program that is to follow another, or a disk, and has not served yet.
#[derive(Debug)]
pub(super) struct Trial {
    /// Who it was to replace.
    id: ProcId,
    /// What it was to follow, until it has failed.
    before: Option<Before>,
    /// The same of a disk that is to be another.
    pub(super) disk: Option<Change>,
    /// Why it has failed.
    failed: Option<String>,
}

impl Trial {
    pub(super) const fn of_disk(id: ProcId, change: Change) -> Self {
        Self {
            id,
            before: None,
            disk: Some(change),
            failed: None,
        }
    }

    pub(super) fn is_of(&self, id: ProcId) -> bool {
        (self.id.kind, self.id.index) == (id.kind, id.index)
    }
}

#[derive(Debug)]
enum Stage {
    /// Something of the dead process may still reach its disk; when to look again.
    Fencing(Instant),
    /// The vCPU process was asked for the window.
    Preparing(Option<Claimed>),
}

impl Machine<'_> {
    /// Begins to put `id` in the place of the generation before it.
    pub(super) fn revive(&mut self, id: ProcId, blame: bool) {
        let dead = self.household.in_place_of(id);
        let dead = dead.map(|member| (member.launched.id, member.slot));
        if let Some((dead, _)) = dead {
            self.nursery.keeper.home().forget(dead);
        }
        let Some((_, slot)) = dead else {
            return self.not_revived(id, "was never there".to_owned(), true);
        };
        // The next broker must not ask for this generation again: that it was asked for is seen by
        // nobody but the vCPU process.
        self.nursery.keeper.note(|record| {
            record.generation = record.generation.max(id.generation);
        });
        self.revivals.push(Revival {
            id,
            slot,
            blame,
            stage: Stage::Fencing(Instant::now()),
            until: Instant::now() + FENCE_TIMEOUT,
        });
        self.push_revivals();
    }

    /// When [`Machine::push_revivals`] is wanted next.
    pub(super) fn next_push(&self) -> Option<Instant> {
        let wanted = self.revivals.iter().map(|revival| match revival.stage {
            Stage::Fencing(look) => look,
            Stage::Preparing(_) => revival.until,
        });
        let late = self.unlocked.iter().map(|late| late.look);
        wanted.chain(late).min()
    }

    /// Takes the locks of disks whose last process's ring has gone.
    fn lock_late(&mut self, now: Instant) {
        for mut late in std::mem::take(&mut self.unlocked) {
            if late.look > now {
                self.unlocked.push(late);
                continue;
            }
            if self.household.member(late.id).is_none() {
                // Another generation has the disk by now.
                continue;
            }
            let fault = match late.unlocked.lock() {
                Ok(true) => continue,
                Ok(false) if late.until > now => {
                    late.look = now + LOCK_POLL;
                    self.unlocked.push(late);
                    continue;
                }
                Ok(false) => "is locked by somebody else".to_owned(),
                Err(error) => format!("cannot be locked: {error}"),
            };
            let reason = format!("its disk {fault}");
            self.supervise(Event::Broke {
                id: late.id,
                reason,
            });
        }
    }

    /// Goes on with whatever can go on.
    pub(super) fn push_revivals(&mut self) {
        let now = Instant::now();
        self.lock_late(now);
        for mut revival in std::mem::take(&mut self.revivals) {
            let failed = match &mut revival.stage {
                Stage::Fencing(look) if *look > now => None,
                Stage::Fencing(look) => match self.household.claim_disk(revival.id) {
                    Ok(None) if revival.until <= now => Some((
                        format!(
                            "cannot be fenced: its disk is still in use after {FENCE_TIMEOUT:?}"
                        ),
                        true,
                    )),
                    Ok(None) => {
                        *look = now + FENCE_POLL;
                        None
                    }
                    Ok(Some(_)) if self.put_medium(revival.id) => {
                        *look = now;
                        None
                    }
                    Ok(Some(disk)) => {
                        revival.stage = Stage::Preparing(disk);
                        revival.until = now + PREPARE_TIMEOUT;
                        let generation = revival.id.generation;
                        self.tell_vcpu(&match revival.slot {
                            Some(slot) => ToVcpu::PrepareSlot {
                                slot,
                                generation,
                                blame: revival.blame,
                                fields_change: self.disk_may_change(revival.id),
                            },
                            None => ToVcpu::PrepareLegacy { generation },
                        });
                        None
                    }
                    Err(error) => Some((format!("its disk cannot be opened again: {error}"), true)),
                },
                Stage::Preparing(_) if revival.until <= now => Some((
                    "the vCPU process does not make its window ready".to_owned(),
                    false,
                )),
                Stage::Preparing(_) => None,
            };
            match failed {
                None => self.revivals.push(revival),
                Some((reason, hopeless)) => self.not_revived(revival.id, reason, hopeless),
            }
        }
    }

    fn not_revived(&mut self, id: ProcId, reason: String, hopeless: bool) {
        self.supervise(Event::NotRevived {
            id,
            reason,
            hopeless,
        });
    }

    /// The vCPU process hands a window over.
    pub(super) fn prepared(
        &mut self,
        slot: Option<u8>,
        generation: u32,
        positions: Positions,
        descriptors: Vec<OwnedFd>,
    ) {
        let wanted = self.revivals.iter().position(|revival| {
            let preparing = matches!(revival.stage, Stage::Preparing(_));
            preparing && (revival.slot, revival.id.generation) == (slot, generation)
        });
        // One that was not asked for, or too late.
        let Some(place) = wanted else { return };
        let Revival { id, stage, .. } = self.revivals.swap_remove(place);
        let Stage::Preparing(disk) = stage else {
            return;
        };
        let (disk, unlocked) = disk.map(|d| (d.files, d.unlocked)).unzip();
        let disk = disk.as_ref();
        let launched = match slot {
            Some(_) => self.launch_device(id, descriptors, disk, positions),
            None => self.launch_legacy(id, descriptors, positions),
        };
        match launched.and_then(|()| self.watch(id)) {
            Ok(()) => {
                self.unlocked
                    .extend(unlocked.flatten().map(|unlocked| LateLock {
                        id,
                        unlocked,
                        look: Instant::now() + LOCK_POLL,
                        until: Instant::now() + FENCE_TIMEOUT,
                    }));
                self.supervise(Event::Launched(id));
            }
            Err(error) => {
                if let Some(member) = self.household.member(id) {
                    // Not watched, so nobody would ever know of its end.
                    let _already_dead = member.launched.kill();
                }
                self.not_revived(id, error.to_string(), false);
            }
        }
    }

    fn launch_device(
        &mut self,
        id: ProcId,
        descriptors: Vec<OwnedFd>,
        disk: Option<&DiskFiles>,
        positions: Positions,
    ) -> Result<(), RunError> {
        let descriptors = <[OwnedFd; 3]>::try_from(descriptors).map_err(|_| unexpected(id))?;
        let wiring = DeviceWiring::from(descriptors);
        wiring.silence();
        let size = self.size;
        self.household
            .launch_again(&mut self.nursery, id, &wiring, disk, positions, size)
    }

    fn launch_legacy(
        &mut self,
        id: ProcId,
        descriptors: Vec<OwnedFd>,
        positions: Positions,
    ) -> Result<(), RunError> {
        let descriptors = <[OwnedFd; 4]>::try_from(descriptors).map_err(|_| unexpected(id))?;
        let wiring = LegacyWiring::from(descriptors);
        wiring.silence();
        self.household
            .launch_legacy_again(&mut self.nursery, id, &wiring, positions)
    }

    /// The device is served again.
    pub(super) fn revived(&mut self, id: ProcId, reason: String, after: Duration) {
        self.groups_at = Some(Instant::now() + GROUPS_AFTER);
        let Some(member) = self.household.in_place_of(id) else {
            return;
        };
        let restart = Restart {
            id,
            name: member.name.clone(),
            pid: member.launched.pid,
            program: String::new(),
            reason,
            after,
        };
        match member.version.clone() {
            Some(program) => self.tell_restart(restart, program),
            None => member.restart = Some(restart),
        }
    }

    /// A process has told which version it is, be it before or after it was seen to serve.
    pub(super) fn learn_version(&mut self, id: ProcId, program: String) {
        let Some(member) = self.household.in_place_of(id) else {
            return;
        };
        member.version = Some(program.clone());
        self.nursery.keeper.learn(id, program.clone());
        if let Some(restart) = member.restart.take() {
            self.tell_restart(restart, program);
        }
    }

    fn tell_restart(&mut self, restart: Restart, program: String) {
        let restart = Restart { program, ..restart };
        if self.replaced.len() >= RESTARTS_KEPT_MAX {
            self.replaced.pop_front();
        }
        self.replaced.push_back(restart.clone());
        self.tell.event(vm::Event::Restarted(restart));
    }

    /// The owner wants another process for a device, with the program that is on disk now if `renew`.
    pub(super) fn replace(&mut self, name: &str, renew: bool) {
        let command = if renew { "upgrade" } else { "restart" };
        let refuse = |reason: String| vm::Event::Refused {
            device: name.to_owned(),
            command: format!("{command} {name}"),
            reason,
        };
        let mut members = self.household.members.iter();
        let member = members.find(|m| m.name == name && m.launched.id.kind != ProcKind::Vcpu);
        let Some(id) = member.map(|m| m.launched.id) else {
            let names = self.household.members.iter().map(|m| m.name.as_str());
            let names = names.filter(|&name| name != "vcpu").collect::<Vec<_>>();
            let reason = format!(
                "there is no such device, expected one of {}",
                names.join(", ")
            );
            return self.tell.event(refuse(reason));
        };
        let current = self.supervisor.current(id).unwrap_or(id);
        if !self.supervisor.can_replace(current) {
            let reason = "it is being replaced, or the machine is starting or ending".to_owned();
            return self.tell.event(refuse(reason));
        }
        if renew {
            match self.nursery.launcher.renew_program(current) {
                Ok(before) => self.trials.push(Trial {
                    id: current,
                    before: Some(before),
                    disk: None,
                    failed: None,
                }),
                Err(error) => return self.tell.event(refuse(error.to_string())),
            }
        }
        self.supervise(Event::Replace(current));
    }

    /// A process is to follow as generation `id`. If it is not the first one of a program on trial, that
    /// one has failed, and the program before it is the one again.
    pub(super) fn take_back(&mut self, id: ProcId, reason: &str) {
        let Some(place) = self.trials.iter().position(|trial| trial.is_of(id)) else {
            return;
        };
        let mut trial = self.trials.swap_remove(place);
        let first = trial.id.generation.saturating_add(1);
        if id.generation > first && trial.failed.is_none() {
            tracing::warn!(proc = %id, reason, "what is new does not serve: what was before it is taken");
            if let Some(before) = trial.before.take() {
                self.nursery.launcher.revert_program(trial.id, before);
            }
            if let Some(change) = trial.disk.as_mut() {
                self.take_disk_back(id, change);
            }
            trial.failed = Some(reason.to_owned());
        }
        self.trials.push(trial);
    }

    /// The device is served again, or is `lost`.
    pub(super) fn end_trial(&mut self, id: ProcId, lost: Option<&str>) {
        let Some(place) = self.trials.iter().position(|trial| trial.is_of(id)) else {
            return;
        };
        let trial = self.trials.swap_remove(place);
        let reason = match (lost, trial.failed) {
            (None, None) => return,
            (None, Some(failed)) if trial.disk.is_some() => {
                format!(
                    "the disk is what it was, since what it was to be cannot be served: {failed}"
                )
            }
            (None, Some(failed)) => format!(
                "the program on disk does not serve, and the one before it was taken again: {failed}"
            ),
            (Some(lost), _) => format!("the device is lost: {lost}"),
        };
        if let Some(before) = trial.before {
            self.nursery.launcher.revert_program(trial.id, before);
        }
        let device = self.name(id);
        self.tell.event(vm::Event::Refused {
            command: format!("upgrade {device}"),
            device,
            reason,
        });
    }

    /// The machine ends, and what has not served yet is no program for its next life.
    pub(super) fn end_trials(&mut self) {
        for trial in std::mem::take(&mut self.trials) {
            if let Some(before) = trial.before {
                self.nursery.launcher.revert_program(trial.id, before);
            }
        }
    }
}

fn unexpected(id: ProcId) -> RunError {
    RunError::Start {
        who: id.to_string(),
        reason: "the vCPU process hands over something else than what it is to share".to_owned(),
    }
}
