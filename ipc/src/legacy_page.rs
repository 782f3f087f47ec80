//! The page that `bulkhead-vcpu` shares with `bulkhead-legacy`.
//!
//! A port write without a visible side effect is *posted* to a ring; a register that can be read
//! without one is *mirrored*; anything else is a synchronous *call*. The order of one vCPU's
//! accesses is kept: a mirrored read of a register that a posted write may change, and every call,
//! happens after the ring has drained.
//!
//! ```text
//! 0x000 identity      0x040 mirrored registers     0x080 interrupt requests (device to vCPU)
//! 0x0c0 posted: producer   0x100 posted: consumer, sleeping flag   0x180 call slot
//! 0x1000 posted ring, 512 entries of 16 bytes
//! 0x3000 two places for the legacy process's state
//! ```
//!
//! After each step the legacy process leaves its state in one of two places and then says which, before
//! it reports the step as done. When it has died, the vCPU process reads that once, makes the page
//! as new with what is still to be done, and a successor goes on from there: each write and each call
//! has its effect once.
//!
//! vCPU threads take turns as the one producer and caller under a lock of their own process.
//! Numbers are little endian.

use crate::platform;
use crate::shared::{SharedError, SharedMemory};
use crate::sync::{Ordering, fence};
use nix::errno::Errno;
use nix::sys::uio::pwrite;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Size of the page in bytes.
pub const LEGACY_PAGE_BYTES: u64 = 0x4000;
/// Entries of the posted ring.
pub const POSTED_ENTRIES: u32 = 512;
/// Bit of the interrupt word that asks for a machine reset (i8042 command 0xfe).
pub const RESET_REQUEST: u32 = 1 << 31;

const OFFSET_GENERATION: usize = 0x08;
const OFFSET_SERVING: usize = 0x0c;
const OFFSET_MIRROR: usize = 0x40;
const OFFSET_INTERRUPTS: usize = 0x80;
const OFFSET_PRODUCER: usize = 0xc0;
const OFFSET_CONSUMER: usize = 0x100;
const OFFSET_SLEEPING: usize = 0x104;
const OFFSET_CALL_SEQ: usize = 0x180;
const OFFSET_CALL_PORT: usize = 0x184;
const OFFSET_CALL_SIZE: usize = 0x186;
const OFFSET_REPLY_SEQ: usize = 0x1c0;
const OFFSET_REPLY_VALUE: usize = 0x1c4;
const OFFSET_SAVED: usize = 0x200;
const OFFSET_POSTED: usize = 0x1000;
const OFFSET_STATE: usize = 0x3000;
const STATE_PLACE_BYTES: usize = 0x400;
const STATE_HEAD_BYTES: usize = 32;
/// Most bytes of a saved state.
pub const STATE_BYTES_MAX: usize = 512;
const ENTRY_BYTES: usize = 16;

/// How an access to a legacy port is carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Write: posted. The number of output stream bytes it produces is 1 for transmit registers.
    Post,
    /// Read: from mirror register `.0`, without waiting for posted writes.
    Mirror(u8),
    /// Read: from mirror register `.0`, after the posted writes have drained.
    MirrorAfterPosted(u8),
    /// Read: a call.
    Call,
}

/// Mirror register of the 8250's register `n` is `n`; the i8042 status register's is this.
pub const MIRROR_I8042_STATUS: u8 = 8;

/// Whether `port` belongs to the legacy process.
#[must_use]
pub const fn owns_port(port: u16) -> bool {
    matches!(port, 0x3f8..=0x3ff)
        || matches!(
            port,
            platform::RTC_PORT
                | 0x71
                | platform::I8042_DATA_PORT
                | platform::I8042_COMMAND_PORT
                | platform::DEBUG_CONSOLE_PORT
        )
}

/// How a read of `port` is carried out.
#[must_use]
pub const fn read_access(port: u16) -> Access {
    match port {
        // IER, LCR, MCR, MSR, SCR. Reading them has no side effect; IER is the divisor latch while
        // DLAB is set, and the legacy process mirrors whichever applies.
        0x3f9 => Access::MirrorAfterPosted(1),
        0x3fb => Access::MirrorAfterPosted(3),
        0x3fc => Access::MirrorAfterPosted(4),
        0x3fe => Access::MirrorAfterPosted(6),
        0x3ff => Access::MirrorAfterPosted(7),
        // LSR: the transmitter is always ready, since a full ring makes the writer wait.
        0x3fd => Access::Mirror(5),
        platform::I8042_COMMAND_PORT => Access::MirrorAfterPosted(MIRROR_I8042_STATUS),
        _ => Access::Call,
    }
}

/// A posted port write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Posted {
    /// The I/O port.
    pub port: u16,
    /// Access size in bytes: 1, 2 or 4.
    pub size: u8,
    /// The value, zero extended.
    pub value: u32,
    /// Position of this byte in the console output stream, when it is one.
    pub stream_position: u64,
}

/// A synchronous port read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// The I/O port.
    pub port: u16,
    /// Access size in bytes: 1, 2 or 4.
    pub size: u8,
}

/// How far a legacy process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Posted writes that are carried out.
    pub taken: u32,
    /// Calls that are answered.
    pub answered: u32,
    /// Answer to the last of them.
    pub reply: u32,
    /// Bytes of input that the guest has been given.
    pub input_position: u64,
}

/// What the vCPU process still wants of a legacy process that died.
#[derive(Debug)]
pub struct Unfinished<'a> {
    /// Posted writes so far.
    pub produced: u32,
    /// All of them that may still be in the ring; number `n` is at place `n` modulo the ring's size.
    pub posted: &'a [Posted],
    /// Calls so far.
    pub calls: u32,
    /// The last of them, if a vCPU waits for its answer.
    pub call: Option<Call>,
}

/// The mapped page. Each side uses its own half of the methods.
#[derive(Debug)]
pub struct LegacyPage {
    memory: SharedMemory,
}

/// Broker: writes the identity into a new page without mapping it, so that vCPU and legacy may start
/// in either order.
///
/// # Errors
/// The kernel's error.
pub fn stamp(page: BorrowedFd<'_>, generation: u32) -> Result<(), Errno> {
    pwrite(page, &generation.to_le_bytes(), 8).map(drop)
}

impl LegacyPage {
    /// Maps the page.
    ///
    /// # Errors
    /// As [`SharedMemory::map`].
    pub fn map(fd: OwnedFd) -> Result<Self, SharedError> {
        SharedMemory::map(fd, LEGACY_PAGE_BYTES).map(|memory| Self { memory })
    }

    /// Over modelled memory.
    #[cfg(all(test, loom))]
    pub(crate) const fn over(memory: SharedMemory) -> Self {
        Self { memory }
    }

    /// The memfd, to be handed to the legacy process's successor.
    #[cfg(not(loom))]
    #[must_use]
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.memory.descriptor()
    }

    /// vCPU: writes the identity before the legacy process is told of the page.
    pub fn initialise(&self, generation: u32) {
        self.memory
            .store(OFFSET_GENERATION, generation, Ordering::Release);
    }

    /// Legacy: whether this is the page of `generation`.
    #[must_use]
    pub fn is_generation(&self, generation: u32) -> bool {
        self.memory
            .load::<u32>(OFFSET_GENERATION, Ordering::Acquire)
            == generation
    }

    /// vCPU: makes the page of a dead process ready for its successor, which goes on from `progress` and
    /// `state` with what is unfinished. Nothing else of what the dead one wrote is left.
    pub fn renew(
        &self,
        generation: u32,
        unfinished: &Unfinished<'_>,
        progress: Progress,
        state: &[u8],
    ) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let pages = usize::try_from(LEGACY_PAGE_BYTES).unwrap_or(0) / ZEROES.len();
        for page in 0..pages {
            self.memory.copy_in(page * ZEROES.len(), &ZEROES);
        }
        let mut number = progress.taken;
        while number != unfinished.produced {
            let place = (number % POSTED_ENTRIES) as usize;
            if let Some(write) = unfinished.posted.get(place) {
                self.put_posted(place, *write);
            }
            number = number.wrapping_add(1);
        }
        self.memory
            .store(OFFSET_PRODUCER, unfinished.produced, Ordering::Relaxed);
        self.set_consumed(progress.taken);
        if let Some(call) = unfinished.call {
            self.memory.write(OFFSET_CALL_PORT, call.port);
            self.memory.write(OFFSET_CALL_SIZE, call.size);
        }
        self.memory
            .store(OFFSET_CALL_SEQ, unfinished.calls, Ordering::Relaxed);
        self.answer(progress.answered, progress.reply);
        self.save(1, progress, state);
        self.initialise(generation);
    }

    /// Legacy: leaves its progress and `state` (at most [`STATE_BYTES_MAX`] bytes) for a successor, as
    /// number `number`, counted from 1.
    pub fn save(&self, number: u32, progress: Progress, state: &[u8]) {
        let at = state_place(number);
        let len = state.len().min(STATE_BYTES_MAX);
        self.memory.write(at, progress.taken);
        self.memory.write(at + 4, progress.answered);
        self.memory.write(at + 8, progress.reply);
        self.memory.write(at + 12, u32::try_from(len).unwrap_or(0));
        self.memory.write(at + 16, progress.input_position);
        self.memory
            .copy_in(at + STATE_HEAD_BYTES, state.get(..len).unwrap_or_default());
        self.memory.store(OFFSET_SAVED, number, Ordering::Release);
    }

    /// The last progress and state that were left, as the process claims. `None` when there are none.
    #[must_use]
    pub fn saved(&self) -> Option<(Progress, Vec<u8>)> {
        let number = self.memory.load::<u32>(OFFSET_SAVED, Ordering::Acquire);
        if number == 0 {
            return None;
        }
        let at = state_place(number);
        let progress = Progress {
            taken: self.memory.read(at),
            answered: self.memory.read(at + 4),
            reply: self.memory.read(at + 8),
            input_position: self.memory.read(at + 16),
        };
        let len = usize::try_from(self.memory.read::<u32>(at + 12)).unwrap_or(usize::MAX);
        let mut state = vec![0; len.min(STATE_BYTES_MAX)];
        self.memory.copy_out(at + STATE_HEAD_BYTES, &mut state);
        Some((progress, state))
    }

    /// Legacy: its registers are mirrored and it serves. The caller rings the interrupt doorbell.
    pub fn set_serving(&self, generation: u32) {
        self.memory
            .store(OFFSET_SERVING, generation, Ordering::Release);
    }

    /// vCPU: the generation that serves, as the process claims.
    #[must_use]
    pub fn serving(&self) -> u32 {
        self.memory.load(OFFSET_SERVING, Ordering::Acquire)
    }

    fn put_posted(&self, place: usize, write: Posted) {
        let at = OFFSET_POSTED + place * ENTRY_BYTES;
        self.memory.write(at, write.port);
        self.memory.write(at + 2, write.size);
        self.memory.write(at + 4, write.value);
        self.memory.write(at + 8, write.stream_position);
    }

    /// vCPU: a mirrored register.
    #[must_use]
    pub fn mirror(&self, register: u8) -> u8 {
        self.memory.load(
            OFFSET_MIRROR + usize::from(register % 64),
            Ordering::Acquire,
        )
    }

    /// Legacy: updates a mirrored register.
    pub fn set_mirror(&self, register: u8, value: u8) {
        self.memory.store(
            OFFSET_MIRROR + usize::from(register % 64),
            value,
            Ordering::Release,
        );
    }

    /// Legacy: asks for an edge on interrupt line `gsi` (0 to 30), or [`RESET_REQUEST`]. The caller
    /// rings the interrupt doorbell.
    pub fn request(&self, bits: u32) {
        self.memory
            .set_bits(OFFSET_INTERRUPTS, bits, Ordering::Release);
    }

    /// vCPU: takes all requests. Bits that the platform does not give the legacy process are
    /// dropped by the caller.
    #[must_use]
    pub fn take_requests(&self) -> u32 {
        self.memory.take_bits(OFFSET_INTERRUPTS, Ordering::Acquire)
    }

    /// Legacy: the next posted write, given how many have been taken so far in this generation.
    #[must_use]
    pub fn take_posted(&self, taken: u32) -> Option<Posted> {
        if self.memory.load::<u32>(OFFSET_PRODUCER, Ordering::Acquire) == taken {
            return None;
        }
        let at = OFFSET_POSTED + (taken % POSTED_ENTRIES) as usize * ENTRY_BYTES;
        Some(Posted {
            port: self.memory.read(at),
            size: self.memory.read(at + 2),
            value: self.memory.read(at + 4),
            stream_position: self.memory.read(at + 8),
        })
    }

    /// Legacy: reports that `taken` posted writes are done, with everything they change mirrored.
    pub fn set_consumed(&self, taken: u32) {
        self.memory.store(OFFSET_CONSUMER, taken, Ordering::Release);
    }

    /// Legacy: announces that it is about to sleep. Returns false when there is something to do, in
    /// which case it must not sleep. `calls` is the number of calls answered.
    #[must_use]
    pub fn may_sleep(&self, taken: u32, calls: u32) -> bool {
        self.memory.store(OFFSET_SLEEPING, 1u32, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let idle = self.memory.load::<u32>(OFFSET_PRODUCER, Ordering::Relaxed) == taken
            && self.memory.load::<u32>(OFFSET_CALL_SEQ, Ordering::Relaxed) == calls;
        if !idle {
            self.set_awake();
        }
        idle
    }

    /// Legacy: is awake and will look at ring and call slot by itself.
    pub fn set_awake(&self) {
        self.memory.store(OFFSET_SLEEPING, 0u32, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    /// vCPU: the legacy process's count of posted writes that it has carried out. Hostile.
    #[must_use]
    pub fn consumed(&self) -> u32 {
        self.memory.load(OFFSET_CONSUMER, Ordering::Acquire)
    }

    /// vCPU: posts a write as number `produced` (the count so far). The caller has made sure that
    /// fewer than [`POSTED_ENTRIES`] are outstanding. Returns whether the kick doorbell must be rung.
    #[must_use]
    pub fn post(&self, produced: u32, write: Posted) -> bool {
        self.put_posted((produced % POSTED_ENTRIES) as usize, write);
        self.memory
            .store(OFFSET_PRODUCER, produced.wrapping_add(1), Ordering::Release);
        self.must_kick()
    }

    /// vCPU: places call number `seq`. Returns whether the kick doorbell must be rung.
    #[must_use]
    pub fn call(&self, seq: u32, call: Call) -> bool {
        self.memory.write(OFFSET_CALL_PORT, call.port);
        self.memory.write(OFFSET_CALL_SIZE, call.size);
        self.memory.store(OFFSET_CALL_SEQ, seq, Ordering::Release);
        self.must_kick()
    }

    /// vCPU: the answer to call `seq`, once it is there.
    #[must_use]
    pub fn reply(&self, seq: u32) -> Option<u32> {
        (self.memory.load::<u32>(OFFSET_REPLY_SEQ, Ordering::Acquire) == seq)
            .then(|| self.memory.load(OFFSET_REPLY_VALUE, Ordering::Relaxed))
    }

    /// Legacy: the outstanding call, given the number of the last one answered.
    #[must_use]
    pub fn take_call(&self, answered: u32) -> Option<(u32, Call)> {
        let seq = self.memory.load::<u32>(OFFSET_CALL_SEQ, Ordering::Acquire);
        if seq == answered {
            return None;
        }
        let call = Call {
            port: self.memory.read(OFFSET_CALL_PORT),
            size: self.memory.read(OFFSET_CALL_SIZE),
        };
        Some((seq, call))
    }

    /// Legacy: answers call `seq`. The caller rings the reply doorbell.
    pub fn answer(&self, seq: u32, value: u32) {
        self.memory
            .store(OFFSET_REPLY_VALUE, value, Ordering::Relaxed);
        self.memory.store(OFFSET_REPLY_SEQ, seq, Ordering::Release);
    }

    fn must_kick(&self) -> bool {
        fence(Ordering::SeqCst);
        self.memory.load::<u32>(OFFSET_SLEEPING, Ordering::Relaxed) != 0
    }
}

const fn state_place(number: u32) -> usize {
    OFFSET_STATE + (number % 2) as usize * STATE_PLACE_BYTES
}

const _: () = assert!(STATE_HEAD_BYTES + STATE_BYTES_MAX <= STATE_PLACE_BYTES);

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;
    use crate::shared::sealed_memfd;

    fn page() -> LegacyPage {
        LegacyPage::map(sealed_memfd("l", LEGACY_PAGE_BYTES).unwrap()).unwrap()
    }

    #[test]
    fn posted_writes_arrive_in_order_around_the_ring() {
        let p = page();
        for n in 0..3 * POSTED_ENTRIES {
            let w = Posted {
                port: 0x3f8,
                size: 1,
                value: n,
                stream_position: u64::from(n),
            };
            let _kick = p.post(n, w);
            assert_eq!(p.take_posted(n), Some(w));
            assert_eq!(p.take_posted(n + 1), None);
            p.set_consumed(n + 1);
            assert_eq!(p.consumed(), n + 1);
        }
    }

    #[test]
    fn sleeping_consumer_is_kicked_and_awake_one_is_not() {
        let p = page();
        let w = Posted {
            port: 0x3f8,
            size: 1,
            value: 0,
            stream_position: 0,
        };
        assert!(p.may_sleep(0, 0));
        assert!(p.post(0, w), "it sleeps");
        assert!(!p.may_sleep(0, 0), "there is work");
        assert!(!p.post(1, w), "it is awake");
    }

    #[test]
    fn call_is_answered_by_number() {
        let p = page();
        let call = Call {
            port: 0x71,
            size: 1,
        };
        let _kick = p.call(1, call);
        assert_eq!(p.take_call(0), Some((1, call)));
        assert_eq!(p.reply(1), None);
        p.answer(1, 0x26);
        assert_eq!(p.reply(1), Some(0x26));
        assert_eq!(p.take_call(1), None);
    }

    fn byte(n: u32) -> Posted {
        Posted {
            port: 0x3f8,
            size: 1,
            value: n,
            stream_position: n.into(),
        }
    }

    #[test]
    fn successor_finds_what_is_unfinished_and_nothing_else() {
        let p = page();
        let posted: Vec<Posted> = (0..POSTED_ENTRIES).map(byte).collect();
        let progress = Progress {
            taken: 3,
            answered: 1,
            reply: 0x26,
            input_position: 9,
        };
        p.save(1, Progress::default(), b"older");
        p.save(2, progress, b"state");
        let (claimed, state) = p.saved().unwrap();
        assert_eq!((claimed, &state[..]), (progress, &b"state"[..]));
        p.memory.copy_in(0, &[0xee; 4096]);
        let unfinished = Unfinished {
            produced: 5,
            posted: &posted,
            calls: 2,
            call: Some(Call {
                port: 0x71,
                size: 1,
            }),
        };
        p.renew(7, &unfinished, claimed, &state);
        assert!(p.is_generation(7));
        assert_eq!(p.saved().unwrap(), (progress, b"state".to_vec()));
        assert_eq!((p.consumed(), p.serving(), p.take_requests()), (3, 0, 0));
        assert_eq!(p.take_posted(3), Some(byte(3)));
        assert_eq!(p.take_posted(4), Some(byte(4)));
        assert_eq!(p.take_posted(5), None);
        assert_eq!(p.reply(1), Some(0x26), "an answer that nobody has seen yet");
        assert_eq!(p.take_call(1).map(|(number, _)| number), Some(2));
    }

    #[test]
    fn lies_about_a_saved_state_stay_inside_of_the_page() {
        let p = page();
        assert!(p.saved().is_none());
        for number in [1, 2, u32::MAX] {
            p.memory.store(OFFSET_SAVED, number, Ordering::Release);
            p.memory.write(state_place(number) + 12, u32::MAX);
            assert_eq!(p.saved().unwrap().1.len(), STATE_BYTES_MAX);
        }
    }

    #[test]
    fn requests_are_taken_once() {
        let p = page();
        p.request(1 << 4);
        p.request(RESET_REQUEST);
        assert_eq!(p.take_requests(), 1 << 4 | RESET_REQUEST);
        assert_eq!(p.take_requests(), 0);
    }

    #[test]
    fn every_owned_port_has_a_read_rule_and_foreign_ports_none() {
        assert!(owns_port(0x3f8) && owns_port(0x71) && owns_port(0x64) && owns_port(0xe9));
        assert!(!owns_port(0x3f7) && !owns_port(0x61) && !owns_port(0xf4) && !owns_port(0x600));
        assert_eq!(read_access(0x3fd), Access::Mirror(5));
        assert_eq!(read_access(0x3f8), Access::Call);
        assert_eq!(read_access(0x3fa), Access::Call);
    }
}
