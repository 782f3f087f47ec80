//! A legacy process made of one thread: an honest one that records, and ones that misbehave.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_ipc::legacy_page::{LegacyPage, RESET_REQUEST};
use bulkhead_ipc::shared::Doorbell;
use bulkhead_vcpu::wait;

/// What calls are answered with.
pub(crate) const CALL_ANSWER: u8 = 0xc1;

/// How the legacy process behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Manners {
    /// Does its work.
    Honest,
    /// Never looks at anything.
    Silent,
    /// Claims to have done more than there was.
    Liar,
}

/// The process's ends of the boundary, and what came out of it.
#[derive(Debug)]
pub(crate) struct Legacy {
    pub(crate) page: LegacyPage,
    pub(crate) kick: Doorbell,
    pub(crate) interrupt: Doorbell,
    pub(crate) reply: Doorbell,
    pub(crate) output: Arc<Mutex<Vec<u8>>>,
    pub(crate) stop: Arc<AtomicBool>,
}

impl Legacy {
    pub(crate) fn serve(self, manners: Manners) {
        const LSR: u8 = 5;
        self.page.set_mirror(LSR, 0x60);
        if manners == Manners::Liar {
            self.page.set_consumed(5000);
        }
        if manners != Manners::Honest {
            return;
        }
        let (mut taken, mut calls) = (0u32, 0u32);
        loop {
            // Looked at first: what was posted before it was set is carried out below.
            let last = self.stop.load(Ordering::Acquire);
            while let Some(write) = self.page.take_posted(taken) {
                match (write.port, write.value) {
                    (0x3f8 | 0xe9, byte) => {
                        let mut output = self.output.lock().unwrap();
                        assert_eq!(write.stream_position, output.len() as u64);
                        output.push(u8::try_from(byte).unwrap());
                    }
                    (0x3f9, 2) => self.request(1 << 4),
                    (0x64, 0xfe) => self.request(RESET_REQUEST),
                    _ => {}
                }
                taken = taken.wrapping_add(1);
                self.page.set_consumed(taken);
            }
            if let Some((number, _call)) = self.page.take_call(calls) {
                calls = number;
                self.page.answer(number, CALL_ANSWER.into());
                self.reply.ring();
            }
            if last {
                return;
            }
            if self.page.may_sleep(taken, calls) {
                if wait::readable(self.kick.as_fd(), Duration::from_millis(100)) {
                    self.kick.take();
                }
                self.page.set_awake();
            }
        }
    }

    fn request(&self, bits: u32) {
        self.page.request(bits);
        self.interrupt.ring();
    }
}
