//! One request on its way: which step is next, decided from how the last one ended. Pure.
//!
//! ```text
//!   read: again for the rest while short ── answered
//!   write: the same ── committed ── (write through: sync) ── answered
//!   discard, write zeroes: for each range: punch or zero ── (not supported: write zeroes) ── as write
//! ```

use crate::backend::{Disk, Ended, Step};
use crate::request::{self, Geometry, Operation, RANGE_BYTES, Range, Status};
use bulkhead_runtime::{Queues, Span};
use nix::errno::Errno;

/// Tries of a step that the kernel asks to repeat, before it counts as failed.
const RETRIES_MAX: u8 = 16;

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// This is done.
    Step(Step),
    /// Everything is written; what that has changed of the image is committed before [`Job::committed`].
    Commit,
    /// The host's disk has no room; the same step is to be tried again later.
    Wait,
    /// The request is answered; this many data bytes were written to the window.
    Answer(Status, u32),
}

/// How a disk treats what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct How {
    /// Writes are made durable one by one: the driver does not flush.
    pub(crate) write_through: bool,
    /// A write that there is no room for waits; else it fails.
    pub(crate) waits_for_room: bool,
}

/// A request that the ring works on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    /// Queue it came from.
    pub(crate) queue: usize,
    /// Its name there.
    pub(crate) head: u16,
    /// Where its status goes.
    pub(crate) status_at: Span,
    operation: Operation,
    step: Step,
    /// Ranges of the request that have been begun.
    ranges_begun: u32,
    /// Bytes of the step that the ring has.
    asked: u64,
    how: How,
    retries: u8,
}

impl Job {
    /// Begins an operation other than GET_ID.
    pub(crate) fn begin(
        (queue, head): (usize, u16),
        status_at: Span,
        operation: Operation,
        how: How,
        queues: &Queues,
        disk: &Geometry,
    ) -> (Self, Next) {
        let mut job = Self {
            queue,
            head,
            status_at,
            operation,
            step: Step::Sync(0),
            ranges_begun: 0,
            asked: 0,
            how,
            retries: 0,
        };
        let next = match operation {
            Operation::Read { at, to } => job.go(Step::Read { at, to }),
            Operation::Write { at, from } => job.go(Step::Write { at, from }),
            Operation::Flush => job.go(Step::Sync(0)),
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                job.next_range(queues, disk)
            }
            Operation::GetId { .. } => Next::Answer(Status::Unsupported, 0),
        };
        (job, next)
    }

    /// The ring has been given `bytes` bytes of the step.
    pub(crate) const fn in_ring(&mut self, bytes: u64) {
        self.asked = bytes;
    }

    /// What the ring's result for the step means.
    pub(crate) fn ended(
        &self,
        result: Result<u32, Errno>,
        backend: &Disk,
        queues: &Queues,
    ) -> Ended {
        match self.step {
            Step::Read { to, .. } => {
                let asked = u32::try_from(self.asked).unwrap_or(u32::MAX);
                backend.after_read(result, to.part(0, asked), queues)
            }
            Step::Punch { .. } | Step::Zero { .. } => Ended {
                result: result.map(|_| self.asked),
            },
            Step::Write { .. } | Step::WriteZeroes { .. } | Step::Sync(_) => Ended {
                result: result.map(u64::from),
            },
        }
    }

    /// Decides what comes after a step.
    pub(crate) fn advance(
        &mut self,
        ended: Ended,
        files_written: usize,
        queues: &Queues,
        disk: &Geometry,
    ) -> Next {
        let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        match (self.step, ended.result) {
            (step, Err(Errno::EINTR | Errno::EAGAIN)) if self.retries < RETRIES_MAX => {
                self.retries += 1;
                self.go(step)
            }
            (step, Err(Errno::ENOSPC | Errno::EDQUOT))
                if self.how.waits_for_room && step.takes_room() =>
            {
                Next::Wait
            }
            (Step::Read { at, to }, Ok(n)) if n > 0 => match to.part(narrow(n), u32::MAX) {
                rest if rest.is_empty() => Next::Answer(Status::Ok, self.data_bytes()),
                to => self.go(Step::Read { at: at + n, to }),
            },
            (Step::Write { at, from }, Ok(n)) if n > 0 => match from.part(narrow(n), u32::MAX) {
                rest if rest.is_empty() => Next::Commit,
                from => self.go(Step::Write { at: at + n, from }),
            },
            (Step::Sync(n), Ok(_)) if n + 1 < files_written => self.go(Step::Sync(n + 1)),
            (Step::Sync(_), Ok(_)) => Next::Answer(Status::Ok, 0),
            (Step::Punch { at, bytes }, Ok(n)) if n > 0 => match bytes.saturating_sub(n) {
                0 => self.next_range(queues, disk),
                bytes => self.go(Step::Punch { at: at + n, bytes }),
            },
            (Step::Zero { at, bytes }, Ok(n)) if n > 0 => match bytes.saturating_sub(n) {
                0 => self.next_range(queues, disk),
                bytes => self.go(Step::Zero { at: at + n, bytes }),
            },
            (Step::Punch { at, bytes } | Step::Zero { at, bytes }, Err(Errno::EOPNOTSUPP)) => {
                if matches!(self.operation, Operation::Discard { .. }) {
                    // A discard is advice; this file system does not take it.
                    self.next_range(queues, disk)
                } else {
                    self.go(Step::WriteZeroes { at, bytes })
                }
            }
            (Step::WriteZeroes { at, bytes }, Ok(n)) if n > 0 => match bytes.saturating_sub(n) {
                0 => self.next_range(queues, disk),
                bytes => self.go(Step::WriteZeroes { at: at + n, bytes }),
            },
            (step, Err(Errno::EACCES)) => {
                let operation = step.operation();
                tracing::error!(
                    operation,
                    "the kernel denies an operation of the ring: not granted"
                );
                Next::Answer(Status::IoError, 0)
            }
            // An error, or an end of the file before the end of the disk.
            _ => Next::Answer(Status::IoError, 0),
        }
    }

    /// What comes after the image's changes are committed, or why that failed.
    pub(crate) const fn committed(&mut self, result: Result<(), Errno>) -> Next {
        match result {
            Err(_) => Next::Answer(Status::IoError, 0),
            Ok(()) if self.how.write_through => self.go(Step::Sync(0)),
            Ok(()) => Next::Answer(Status::Ok, 0),
        }
    }

    /// The step that was last begun, to be done again.
    pub(crate) const fn again(&self) -> Next {
        Next::Step(self.step)
    }

    const fn go(&mut self, step: Step) -> Next {
        self.step = step;
        Next::Step(step)
    }

    const fn data_bytes(&self) -> u32 {
        match self.operation {
            Operation::Read { to, .. } => to.len(),
            _ => 0,
        }
    }

    fn next_range(&mut self, queues: &Queues, disk: &Geometry) -> Next {
        let (ranges, discard) = match self.operation {
            Operation::Discard { ranges } => (ranges, true),
            Operation::WriteZeroes { ranges } => (ranges, false),
            _ => return Next::Answer(Status::IoError, 0),
        };
        while self.ranges_begun < ranges.len() / RANGE_BYTES {
            let index = self.ranges_begun;
            self.ranges_begun += 1;
            let range = match request::range(ranges, index, discard, queues, disk) {
                Ok(range) => range,
                Err(status) => return Next::Answer(status, 0),
            };
            match range {
                Range { bytes: 0, .. } => {}
                Range {
                    at,
                    bytes,
                    unmap: true,
                } => return self.go(Step::Punch { at, bytes }),
                Range { at, bytes, .. } => return self.go(Step::Zero { at, bytes }),
            }
        }
        Next::Commit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{GuestAddress, GuestMemoryMmap};

    const DISK: Geometry = Geometry {
        sectors: 1024,
        read_only: false,
        discard_sectors_max: 0,
        zeroes_sectors_max: 0,
    };

    /// What becomes of an operation whose first step fails with `errno`.
    fn after(operation: Operation, errno: Errno, how: How) -> Next {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 4096)]).unwrap();
        let queues = Queues::over(memory, 4096, Vec::new());
        let status_at = Span::default();
        let (mut job, _) = Job::begin((0, 0), status_at, operation, how, &queues, &DISK);
        let ended = Ended { result: Err(errno) };
        job.advance(ended, 1, &queues, &DISK)
    }

    #[test]
    fn write_without_room_waits_where_the_disk_does() {
        let write = Operation::Write {
            at: 0,
            from: Span::default(),
        };
        let read = Operation::Read {
            at: 0,
            to: Span::default(),
        };
        let failed = Next::Answer(Status::IoError, 0);
        let waits = How {
            waits_for_room: true,
            ..How::default()
        };
        for errno in [Errno::ENOSPC, Errno::EDQUOT] {
            assert_eq!(after(write, errno, waits), Next::Wait);
            assert_eq!(after(write, errno, How::default()), failed);
            assert_eq!(after(read, errno, waits), failed);
            // What a synchronisation was for is lost; the next one would only seem to succeed.
            assert_eq!(after(Operation::Flush, errno, waits), failed);
        }
        assert_eq!(after(write, Errno::EIO, waits), failed);
    }
}
