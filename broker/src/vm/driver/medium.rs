//! Another size or another medium for a disk of a running machine.
//!
//! The disk's process finishes what it is doing and goes, and its successor serves what the owner wants; the
//! guest is told that its disk has changed. What does not come to serve is taken back: the next
//! process has the disk as it was.

use super::Machine;
use super::revival::Trial;
use crate::vm::disk_hold::DiskHold;
use crate::vm::resources;
use crate::vm::session::{self as vm, DiskChange};
use crate::vm::spec::DiskSpec;
use crate::vmfile::show_size;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::birth::ImageFormat;

/// A disk that is to change, or has changed and does not serve yet.
#[derive(Debug)]
pub(super) struct Change {
    /// The files that its next process is to have, unless they are the same.
    next: Option<DiskHold>,
    /// Those that it had, once the next ones are in their place.
    before: Option<DiskHold>,
    /// What the record said of it.
    record: Option<DiskSpec>,
}

impl Machine<'_> {
    /// The owner wants a disk to have another size or medium.
    pub(super) fn change_disk(&mut self, name: &str, change: &DiskChange) {
        if let Err(reason) = self.try_change(name, change) {
            self.tell.event(vm::Event::Refused {
                device: name.to_owned(),
                command: format!("{} {name}", change.verb()),
                reason,
            });
        }
    }

    fn try_change(&mut self, name: &str, change: &DiskChange) -> Result<(), String> {
        let mut members = self.household.members.iter();
        let id = members
            .find(|m| m.name == name && m.launched.id.kind == ProcKind::Blk)
            .map(|m| m.launched.id)
            .ok_or("there is no such disk")?;
        let current = self.supervisor.current(id).unwrap_or(id);
        if !self.supervisor.can_replace(current) {
            return Err("it is being replaced, or the machine is starting or ending".to_owned());
        }
        let record = self.nursery.keeper.record();
        let known = record.changed_disk(name).cloned();
        let mut disks = self.nursery.spec.disks.iter();
        let at_start = disks.find(|disk| disk.name == name).cloned();
        let now = known.clone().or(at_start).ok_or("there is no such disk")?;
        if now.ephemeral {
            return Err("it is ephemeral: its changes belong to the medium that it has".to_owned());
        }
        let (spec, next) = match change {
            DiskChange::Size { bytes } => (self.grown(current, now, *bytes)?, None),
            DiskChange::Medium(medium) => {
                let spec = medium.in_place_of(&now);
                spec.check(0).map_err(|error| error.to_string())?;
                let options = &self.nursery.keeper.record().options;
                let files = resources::disk_files(&spec, options);
                let files = files.map_err(|error| error.to_string())?;
                let hold = DiskHold::new(&spec, &files);
                (spec, Some(hold.map_err(|error| error.to_string())?))
            }
        };
        self.note_disk(name, Some(spec));
        let change = Change {
            next,
            before: None,
            record: known,
        };
        self.trials.push(Trial::of_disk(current, change));
        self.supervise(crate::supervisor::state::Event::Replace(current));
        Ok(())
    }

    /// The disk with at least `bytes` bytes. A raw image has them when this returns; of any other only its
    /// process knows the size.
    fn grown(&mut self, id: ProcId, now: DiskSpec, bytes: u64) -> Result<DiskSpec, String> {
        if bytes == 0 || !bytes.is_multiple_of(512) {
            return Err(format!("size: got {bytes}, expected a multiple of 512"));
        }
        if now.read_only || now.shareable {
            let how = if now.read_only {
                "read only"
            } else {
                "shared with other machines"
            };
            return Err(format!(
                "it is {how}: its size is not this machine's to change"
            ));
        }
        match now.format {
            ImageFormat::Vmdk => {
                return Err("only raw and qcow2 images grow; convert it first".to_owned());
            }
            ImageFormat::Raw => {
                let hold = self.household.disk_hold(id.index);
                let hold = hold.and_then(|hold| hold.as_ref());
                let hold = hold.ok_or("its image is not there any more")?;
                let has = hold.grow(bytes).map_err(|error| error.to_string())?;
                if has > bytes {
                    return Err(format!(
                        "it has {}, and a disk is not made smaller while its machine runs",
                        show_size(has)
                    ));
                }
            }
            ImageFormat::Qcow2 => {}
        }
        Ok(DiskSpec {
            bytes_min: bytes,
            ..now
        })
    }

    /// Puts on record what a disk is now; `None` where it is what it was at the start.
    fn note_disk(&mut self, name: &str, disk: Option<DiskSpec>) {
        self.nursery.keeper.note(|record| {
            record.changed_disks.retain(|known| known.name != name);
            record.changed_disks.extend(disk);
        });
    }

    /// Whether the next process of `id` may have another disk than the one before.
    pub(super) fn disk_may_change(&self, id: ProcId) -> bool {
        let name = self.name(id);
        let changed = self.nursery.keeper.record().changed_disk(&name).is_some();
        let mut trials = self.trials.iter();
        changed || trials.any(|trial| trial.is_of(id) && trial.disk.is_some())
    }

    /// The last process of a disk cannot reach it any more: puts the next medium in its place. Returns whether
    /// there was one.
    pub(super) fn put_medium(&mut self, id: ProcId) -> bool {
        let mut trials = self.trials.iter_mut().filter(|trial| trial.is_of(id));
        let change = trials.find_map(|trial| trial.disk.as_mut());
        let place = self.household.disk_hold(id.index);
        let Some((change, place)) = change.zip(place) else {
            return false;
        };
        let Some(next) = change.next.take() else {
            return false;
        };
        change.before = place.replace(next);
        true
    }

    /// What a disk was changed to does not serve: it is again what it was.
    pub(super) fn take_disk_back(&mut self, id: ProcId, change: &mut Change) {
        let name = self.name(id);
        self.note_disk(&name, change.record.take());
        change.next = None;
        if let Some(before) = change.before.take()
            && let Some(place) = self.household.disk_hold(id.index)
        {
            *place = Some(before);
        }
    }
}
