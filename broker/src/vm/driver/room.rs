//! Disks for which the host has no room, while their machine is paused for them.
//!
//! The disk's process keeps what it could not write and says so. Now and then it is told to try again, until
//! it says that everything has been written: whether there is room is the file system's to say.

use super::Machine;
use crate::vm::session::Event;
use crate::vm::spec::OnDiskFull;
use crate::vm::state::Input;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::device::ToDevice;
use std::time::Duration;
use tokio::time::Instant;

/// Pause between two tries.
const PAUSE: Duration = Duration::from_secs(1);

/// The disks, and when they are to try again.
#[derive(Debug, Default)]
pub(super) struct NoRoom {
    names: Vec<String>,
    again: Option<Instant>,
}

impl NoRoom {
    /// When [`Machine::try_again`] is wanted next.
    pub(super) const fn next_try(&self) -> Option<Instant> {
        self.again
    }
}

impl Machine<'_> {
    /// The process of a disk says that there is no room for what it writes.
    pub(super) fn lacks_room(&mut self, id: ProcId) {
        let waits = self.nursery.spec.lifecycle.on_disk_full == OnDiskFull::Pause;
        if id.kind != ProcKind::Blk || !waits || self.life.is_stopping() {
            return;
        }
        self.no_room.again = Some(Instant::now() + PAUSE);
        let name = self.name(id);
        if self.no_room.names.contains(&name) {
            return;
        }
        tracing::warn!(name, "the host has no room for what the guest writes");
        self.no_room.names.push(name.clone());
        self.note_no_room();
        self.tell.event(Event::NoRoom { name });
        self.inputs.push_back(Input::NoRoom);
    }

    /// Nothing that was written to the disk `name` waits for room.
    pub(super) fn has_room(&mut self, name: &str) {
        let before = self.no_room.names.len();
        self.no_room.names.retain(|other| other != name);
        if self.no_room.names.len() == before {
            return;
        }
        self.note_no_room();
        let name = name.to_owned();
        self.tell.event(Event::HasRoom { name });
        if self.no_room.names.is_empty() {
            self.no_room.again = None;
            self.inputs.push_back(Input::HasRoom);
        }
    }

    /// Has all disks that wait for room try again.
    pub(super) fn try_again(&mut self) {
        let members = self.household.members.iter();
        let waiting = members.filter(|m| {
            m.launched.id.kind == ProcKind::Blk && self.no_room.names.contains(&m.name)
        });
        let waiting: Vec<ProcId> = waiting.map(|m| m.launched.id).collect();
        self.no_room.again = (!self.no_room.names.is_empty()).then(|| Instant::now() + PAUSE);
        for id in waiting {
            self.send(id, &ToDevice::TryAgain);
        }
    }

    /// Goes on waiting for what the last broker of the machine waited for.
    pub(super) fn wait_on_for_room(&mut self) {
        let record = self.nursery.keeper.record();
        self.no_room.names.clone_from(&record.no_room);
        for name in self.no_room.names.clone() {
            self.tell.event(Event::NoRoom { name });
        }
        self.try_again();
    }

    /// Puts on record whether the owner has paused the machine.
    pub(super) fn note_pause(&mut self, wanted: bool) {
        if self.nursery.keeper.record().pause_wanted != wanted {
            let note = |record: &mut crate::vm::record::Record| record.pause_wanted = wanted;
            self.nursery.keeper.note(note);
        }
    }

    fn note_no_room(&mut self) {
        let names = self.no_room.names.clone();
        self.nursery.keeper.note(|record| record.no_room = names);
    }
}
