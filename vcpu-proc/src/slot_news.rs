//! What the broker is told of the device processes behind the gates: levels rather than edges, so that
//! nothing is lost when several things happen before anybody looks.

use bulkhead_ipc::protocol::vcpu::FromVcpu;

use crate::gate::{Attachment, Phase};
use crate::outbox::Outbox;
use crate::virtio::VirtioBus;

/// What has been told.
#[derive(Debug, Default)]
pub struct News {
    told: Vec<(u8, Attachment)>,
}

impl News {
    /// The broker asks for a slot to be prepared for a generation: that it is will be told, even again.
    pub(crate) fn forget(&mut self, slot: u8, generation: u32) {
        self.told
            .retain(|(number, told)| *number != slot || told.generation != generation);
    }

    /// Tells what has changed.
    pub(crate) fn tell(&mut self, outbox: &mut Outbox<'_>, bus: &VirtioBus) {
        for (slot, now) in bus.attachments() {
            let known = self.told.iter_mut().find(|(number, _)| *number == slot);
            match known {
                Some((_, told)) if *told == now => continue,
                Some((_, told)) => *told = now,
                None => self.told.push((slot, now)),
            }
            let Attachment {
                generation,
                phase,
                output_position,
                input_position,
            } = now;
            match phase {
                Phase::Prepared => outbox.tell(FromVcpu::SlotPrepared {
                    slot,
                    generation,
                    output_position,
                    input_position,
                }),
                Phase::Serving => outbox.tell(FromVcpu::SlotServing { slot, generation }),
                // Faults are told with their reasons.
                Phase::Starting | Phase::Broken | Phase::Lost => {}
            }
        }
    }
}
