//! A serial port that is always ready to send, on standard output. It is no part of what is measured.

use anyhow::Result;
use bulkhead_ipc::legacy_page::{self, LEGACY_PAGE_BYTES, LegacyPage};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_runtime::wait::Waiter;
use bulkhead_vcpu::setup::LegacyFds;
use std::io::Write;
use std::os::fd::AsFd;

/// Of the one process there ever is.
pub(crate) const GENERATION: u32 = 1;

const TRANSMIT_PORT: u16 = 0x3f8;
/// Its place among the mirrored registers.
const LINE_STATUS: u8 = 5;
/// Holding register and shift register are empty.
const READY: u8 = 0x60;
/// What ports without a device read as.
const NOTHING: u32 = 0xff;

/// The side of the devices.
#[derive(Debug)]
pub(crate) struct Serial {
    page: LegacyPage,
    kick: Doorbell,
    reply: Doorbell,
}

/// Both sides of the boundary.
pub(crate) fn connect() -> Result<(Serial, LegacyFds)> {
    let page = sealed_memfd("legacy", LEGACY_PAGE_BYTES)?;
    legacy_page::stamp(page.as_fd(), GENERATION)?;
    let (kick, reply) = (Doorbell::new()?, Doorbell::new()?);
    let fds = LegacyFds {
        page: page.try_clone()?,
        kick: kick.try_clone()?.into(),
        interrupt: Doorbell::new()?.into(),
        reply: reply.try_clone()?.into(),
    };
    let page = LegacyPage::map(page)?;
    Ok((Serial { page, kick, reply }, fds))
}

impl Serial {
    /// Serves for ever.
    pub(crate) fn serve(&self) -> Result<()> {
        let waiter = Waiter::new()?;
        waiter.watch(&self.kick, 0)?;
        self.page.set_mirror(LINE_STATUS, READY);
        self.page.set_serving(GENERATION);
        let mut output = std::io::stdout().lock();
        let (mut taken, mut answered) = (0u32, 0);
        loop {
            while let Some(write) = self.page.take_posted(taken) {
                taken = taken.wrapping_add(1);
                if write.port == TRANSMIT_PORT {
                    output.write_all(&write.value.to_le_bytes()[..1])?;
                }
                self.page.set_consumed(taken);
            }
            output.flush()?;
            if let Some((seq, _)) = self.page.take_call(answered) {
                answered = seq;
                self.page.answer(seq, NOTHING);
                self.reply.ring();
            }
            if self.page.may_sleep(taken, answered) {
                waiter.sleep(None)?;
                self.page.set_awake();
            }
        }
    }
}
