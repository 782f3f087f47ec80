//! The block device: takes requests, keeps them as jobs while the ring works on them, answers them.

use crate::backend::{self, Begun, Commit, Disk, TOKEN_COMMIT};
use crate::job::{How, Job, Next};
use crate::request::{self, Geometry, ID_BYTES, Operation, Parsed, Status};
use bulkhead_image::Use;
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{DeviceOwn, DiskLimits};
use bulkhead_runtime::device::FIRST_TOKEN;
use bulkhead_runtime::limits::Limiter;
use bulkhead_runtime::{Chain, Device, DeviceFault, Queues, Room, Setup, Span, Stillbirth};
use nix::errno::Errno;
use std::time::{Duration, Instant};

const F_SIZE_MAX: u64 = 1 << 1;
const F_SEG_MAX: u64 = 1 << 2;
const F_READ_ONLY: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_MQ: u64 = 1 << 12;
pub(crate) const F_DISCARD: u64 = 1 << 13;
pub(crate) const F_WRITE_ZEROES: u64 = 1 << 14;

const TOKEN_RING: u8 = FIRST_TOKEN;
/// Data bytes that are handed to the kernel at once. A disk in the page cache does its work inside of
/// the system call; the gate copies the last batch meanwhile, if it has a CPU for that.
const BATCH_BYTES: u32 = 256 * 1024;
/// The same where the device takes turns with the gate: fewer and longer ones.
const BATCH_BYTES_IN_TURNS: u32 = 512 * 1024;
/// CPUs that a vCPU, its gate and its device run on side by side.
const CPUS_SIDE_BY_SIDE: usize = 3;

/// The device. Public for programs of tests that have one thing done differently.
#[derive(Debug)]
pub struct Blk {
    disk: Disk,
    geometry: Geometry,
    config: Vec<u8>,
    id: [u8; ID_BYTES],
    offered: u64,
    how: How,
    limiter: Limiter,
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that wait for room.
    waiting: Vec<usize>,
    /// Jobs that have written everything, and are answered when the image is committed.
    uncommitted: Vec<usize>,
    /// Jobs that would change the image while it is being committed.
    held: Vec<usize>,
    /// Whether the host has no room for what is to be committed.
    commit_waits: bool,
    room: RoomTold,
    batch_bytes: u32,
    batch_bytes_max: u32,
    /// Whether the last requests were done when they had been handed to the kernel.
    at_once: bool,
}

/// What has been said of the room on the host's disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RoomTold {
    /// Nothing, or that there is some.
    There,
    /// That there is none.
    Lacking,
    /// Nothing since it was asked for.
    Asked,
}

impl Device for Blk {
    const KIND: VirtioKind = VirtioKind::Blk;

    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth> {
        let DeviceOwn::Blk {
            read_only,
            serial,
            waits_for_room,
            limits,
            ephemeral,
            layers,
            bytes_min,
        } = &setup.config.own
        else {
            return Err(Stillbirth::setup("no configuration of a disk"));
        };
        let (read_only, waits_for_room, bytes_min) = (*read_only, *waits_for_room, *bytes_min);
        let limiter = Limiter::new(limits, Instant::now());
        let how = match (read_only, *ephemeral) {
            (_, true) => Use::Scratch,
            (true, false) => Use::Read,
            (false, false) => Use::Write,
        };
        let layers = layers.clone();
        let mut id = [0; ID_BYTES];
        if serial.len() > ID_BYTES {
            return Err(Stillbirth::Field {
                field: "serial",
                got: format!("{} bytes long", serial.len()),
                expected: "at most 20 bytes",
            });
        }
        for (place, byte) in id.iter_mut().zip(serial.bytes()) {
            *place = byte;
        }
        let jobs: usize = setup
            .config
            .queue_sizes
            .iter()
            .map(|&s| usize::from(s))
            .sum();
        let entries = u32::try_from(jobs).map_err(Stillbirth::setup)?;
        let disk = Disk::open(&layers, how, bytes_min, entries, setup, TOKEN_RING)?;
        let offered = offered(setup.config.features, read_only);
        let mut config = setup.config.config.clone();
        config.resize(VirtioKind::Blk.config_bytes(), 0);
        Ok(Self {
            geometry: backend::geometry(disk.sectors(), read_only, offered, &config),
            disk,
            limiter,
            config,
            id,
            offered,
            how: How {
                write_through: false,
                waits_for_room,
            },
            jobs: vec![None; jobs],
            free: (0..jobs).rev().collect(),
            waiting: Vec::new(),
            uncommitted: Vec::new(),
            held: Vec::new(),
            commit_waits: false,
            room: RoomTold::There,
            batch_bytes: 0,
            batch_bytes_max: if setup.cpus < CPUS_SIDE_BY_SIDE {
                BATCH_BYTES_IN_TURNS
            } else {
                BATCH_BYTES
            },
            at_once: false,
        })
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn config(&self) -> Vec<u8> {
        let mut config = self.config.clone();
        for (place, byte) in config.iter_mut().zip(self.geometry.sectors.to_le_bytes()) {
            *place = byte;
        }
        config
    }

    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let name = (queue, chain.head());
        let Parsed {
            status_at,
            operation,
        } = request::parse(&chain, queues, &self.geometry);
        let Some(status_at) = status_at else {
            return queues.complete(queue, chain.head(), 0);
        };
        let operation = match operation {
            Ok(operation) => operation,
            Err(status) => return answer(name, status_at, status, 0, queues),
        };
        if let Operation::GetId { to } = operation {
            let written = queues.write(to, &self.id);
            let written = u32::try_from(written).unwrap_or(0);
            return answer(name, status_at, Status::Ok, written, queues);
        }
        if let Operation::Read { to: data, .. } | Operation::Write { from: data, .. } = operation {
            self.batch_bytes = self.batch_bytes.saturating_add(data.len());
            self.limiter.take(data.len().into());
        } else {
            self.limiter.take(0);
        }
        let (job, next) = Job::begin(name, status_at, operation, self.how, queues, &self.geometry);
        let Some(place) = self.free.pop() else {
            // More requests than slots: a gate that puts one twice. It gets one answer for each.
            return answer(name, status_at, Status::IoError, 0, queues);
        };
        self.go_on(place, job, next, queues)
    }

    fn settle(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        self.batch_bytes = 0;
        self.disk.submit().map_err(|errno| DeviceFault::Os {
            call: "io_uring_enter",
            errno,
        })?;
        let in_ring = self.in_ring();
        if in_ring > 0 {
            self.at_once = self.disk.count_done() == in_ring;
        }
        let mut busy = false;
        while let Some(done) = self.disk.done() {
            busy = true;
            if done.token == TOKEN_COMMIT {
                self.disk.synced(done.result);
                continue;
            }
            let place = usize::try_from(done.token).unwrap_or(usize::MAX);
            if let Some(mut job) = self.take(place) {
                let ended = job.ended(done.result, &self.disk, queues);
                let next = job.advance(ended, self.disk.files_written(), queues, &self.geometry);
                self.go_on(place, job, next, queues)?;
            }
        }
        if !self.commit_waits {
            busy |= self.commit(queues)?;
        }
        Ok(busy)
    }

    fn on_limits(&mut self, limits: &DiskLimits) {
        self.limiter.change(limits, Instant::now());
    }

    fn rests(&mut self) -> Option<Duration> {
        if !self.limiter.limits() {
            return None;
        }
        self.limiter.wait(Instant::now())
    }

    fn is_full(&self) -> bool {
        self.batch_bytes >= self.batch_bytes_max
    }

    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        // A driver that does not flush expects what is written to be durable.
        self.how.write_through = features.is_some_and(|f| f & F_FLUSH == 0);
        if features.is_some() {
            return Ok(());
        }
        // Nobody wants what waited for room any more.
        let mut unwanted = std::mem::take(&mut self.waiting);
        if std::mem::take(&mut self.commit_waits) {
            unwanted.append(&mut self.uncommitted);
            unwanted.append(&mut self.held);
        }
        for place in unwanted {
            if let Some(job) = self.take(place) {
                self.go_on(place, job, Next::Answer(Status::IoError, 0), queues)?;
            }
        }
        Ok(())
    }

    fn try_again(&mut self, queues: &mut Queues) -> Result<(), DeviceFault> {
        self.room = RoomTold::Asked;
        self.commit_waits = false;
        let waiting = std::mem::take(&mut self.waiting);
        self.go_on_again(waiting, queues)
    }

    fn room_news(&mut self) -> Option<Room> {
        let lacks = self.commit_waits || !self.waiting.is_empty();
        let told = match self.room {
            RoomTold::There | RoomTold::Asked if lacks => RoomTold::Lacking,
            // What is tried again may still fail.
            RoomTold::Asked if self.in_flight() == 0 => RoomTold::There,
            _ => return None,
        };
        self.room = told;
        Some(match told {
            RoomTold::Lacking => Room::Lacking,
            _ => Room::There,
        })
    }

    fn has_news(&self) -> bool {
        self.disk.count_done() > 0 || self.disk.has_unsubmitted()
    }

    fn is_at_once(&self) -> bool {
        self.at_once
    }

    fn in_flight(&self) -> usize {
        let waits = self.waiting.len() + self.held_up();
        self.jobs.len() - self.free.len() - waits
    }
}

impl Blk {
    fn take(&mut self, place: usize) -> Option<Job> {
        self.jobs.get_mut(place).and_then(Option::take)
    }

    fn keep(&mut self, place: usize, job: Job) {
        if let Some(slot) = self.jobs.get_mut(place) {
            *slot = Some(job);
        }
    }

    /// Jobs that wait for room because the image cannot be committed.
    const fn held_up(&self) -> usize {
        if self.commit_waits {
            self.uncommitted.len() + self.held.len()
        } else {
            0
        }
    }

    /// Jobs that the ring has.
    const fn in_ring(&self) -> usize {
        let elsewhere = self.waiting.len() + self.uncommitted.len() + self.held.len();
        self.jobs.len() - self.free.len() - elsewhere
    }

    /// Commits what has changed of the image, and answers those who waited for that. Returns whether
    /// anything was answered.
    fn commit(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        if !self.disk.is_changed() {
            return Ok(false);
        }
        let result = match self.disk.commit() {
            Commit::Waits => {
                self.disk.submit().map_err(|errno| DeviceFault::Os {
                    call: "io_uring_enter",
                    errno,
                })?;
                return Ok(false);
            }
            Commit::Failed(Errno::ENOSPC | Errno::EDQUOT) if self.how.waits_for_room => {
                self.commit_waits = true;
                return Ok(false);
            }
            Commit::Failed(errno) => {
                tracing::error!(%errno, "what was written could not be put in its place");
                Err(errno)
            }
            Commit::Done => Ok(()),
        };
        let answered = !self.uncommitted.is_empty() || !self.held.is_empty();
        for place in std::mem::take(&mut self.uncommitted) {
            if let Some(mut job) = self.take(place) {
                let next = job.committed(result);
                self.go_on(place, job, next, queues)?;
            }
        }
        let held = std::mem::take(&mut self.held);
        self.go_on_again(held, queues)?;
        Ok(answered)
    }

    fn go_on_again(&mut self, places: Vec<usize>, queues: &mut Queues) -> Result<(), DeviceFault> {
        for place in places {
            if let Some(job) = self.take(place) {
                let next = job.again();
                self.go_on(place, job, next, queues)?;
            }
        }
        Ok(())
    }

    fn go_on(
        &mut self,
        place: usize,
        mut job: Job,
        mut next: Next,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        loop {
            match next {
                Next::Step(step) => match self.disk.begin(step, place as u64, queues) {
                    Begun::Ended(ended) => {
                        self.at_once = true;
                        let files = self.disk.files_written();
                        next = job.advance(ended, files, queues, &self.geometry);
                    }
                    Begun::InRing(bytes) => {
                        job.in_ring(bytes);
                        self.keep(place, job);
                        return Ok(());
                    }
                    Begun::Held => {
                        self.held.push(place);
                        self.keep(place, job);
                        return Ok(());
                    }
                },
                Next::Commit if self.disk.is_changed() => {
                    self.uncommitted.push(place);
                    self.keep(place, job);
                    return Ok(());
                }
                Next::Commit => next = job.committed(Ok(())),
                Next::Wait => {
                    self.waiting.push(place);
                    self.keep(place, job);
                    return Ok(());
                }
                Next::Answer(status, written) => {
                    self.free.push(place);
                    let name = (job.queue, job.head);
                    return answer(name, job.status_at, status, written, queues);
                }
            }
        }
    }
}

fn answer(
    (queue, head): (usize, u16),
    status_at: Span,
    status: Status,
    data_written: u32,
    queues: &mut Queues,
) -> Result<(), DeviceFault> {
    queues.write(status_at, &[status.byte()]);
    queues.complete(queue, head, data_written + 1)
}

/// The features that make sense for the disk.
fn offered(by_policy: u64, read_only: bool) -> u64 {
    let always = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | F_MQ;
    let own = if read_only {
        F_READ_ONLY
    } else {
        F_DISCARD | F_WRITE_ZEROES
    };
    by_policy & (always | own)
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "image_tests.rs"]
mod image_tests;
