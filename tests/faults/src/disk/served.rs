//! What the file system serves: the model, the rules, and the operations that wait.

use super::model::{Cut, Model};
use super::rules::Request;
use super::{Access, DiskAction, DiskEvent, DiskOp, DiskRules};
use fuser::{Errno, ReplyData, ReplyEmpty, ReplyWrite};
use std::borrow::Cow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// An operation, and whom to answer.
pub(super) enum Job<'a> {
    Read(u32, ReplyData),
    Write(Cow<'a, [u8]>, ReplyWrite),
    Zero(u64, ReplyEmpty),
    Flush(ReplyEmpty),
}

impl Job<'_> {
    fn request(&self, offset: u64) -> Request {
        let (op, bytes) = match self {
            Self::Read(bytes, _) => (DiskOp::Read, u64::from(*bytes)),
            Self::Write(data, _) => (DiskOp::Write, data.len() as u64),
            Self::Zero(bytes, _) => (DiskOp::Write, *bytes),
            Self::Flush(_) => (DiskOp::Flush, 0),
        };
        Request { op, offset, bytes }
    }

    fn into_owned(self) -> Job<'static> {
        match self {
            Self::Read(bytes, reply) => Job::Read(bytes, reply),
            Self::Write(data, reply) => Job::Write(data.into_owned().into(), reply),
            Self::Zero(bytes, reply) => Job::Zero(bytes, reply),
            Self::Flush(reply) => Job::Flush(reply),
        }
    }

    fn fail(self, error: Errno) {
        match self {
            Self::Read(_, reply) => reply.error(error),
            Self::Write(_, reply) => reply.error(error),
            Self::Zero(_, reply) | Self::Flush(reply) => reply.error(error),
        }
    }
}

/// Which opening of the file asks, and for which place.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker {
    pub(super) handle: u64,
    pub(super) offset: u64,
}

struct Waiting {
    /// When it is answered; `None` while it hangs.
    due: Option<Instant>,
    asker: Asker,
    job: Job<'static>,
}

pub(super) struct State {
    pub(super) model: Model,
    pub(super) rules: DiskRules,
    pub(super) log: Option<Vec<Access>>,
    waiting: Vec<Waiting>,
    handles: u64,
    /// Openings up to this one were there when the power was cut.
    dead_handles: u64,
    is_closed: bool,
}

impl State {
    pub(super) fn hung(&self) -> usize {
        self.waiting.iter().filter(|w| w.due.is_none()).count()
    }

    fn is_dead(&self, handle: u64) -> bool {
        self.is_closed || handle <= self.dead_handles
    }

    /// What is to be answered now, in the order in which it was put aside.
    fn due(&mut self, now: Instant) -> Vec<Waiting> {
        let is_due = |w: &mut Waiting| w.due.is_some_and(|due| due <= now);
        self.waiting.extract_if(.., is_due).collect()
    }
}

pub(super) struct Served {
    began: Instant,
    state: Mutex<State>,
    changed: Condvar,
    tell: Box<dyn Fn(DiskEvent) + Send + Sync>,
}

impl Served {
    pub(super) fn new(
        model: Model,
        rules: DiskRules,
        tell: Box<dyn Fn(DiskEvent) + Send + Sync>,
    ) -> Self {
        Self {
            began: Instant::now(),
            state: Mutex::new(State {
                model,
                rules,
                log: None,
                waiting: Vec::new(),
                handles: 0,
                dead_handles: 0,
                is_closed: false,
            }),
            changed: Condvar::new(),
            tell,
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file is opened once more.
    pub(super) fn open(&self) -> u64 {
        let mut state = self.state();
        state.handles += 1;
        state.handles
    }

    /// Does and answers an operation, or has it wait.
    pub(super) fn serve(&self, asker: Asker, job: Job<'_>) {
        let request = job.request(asker.offset);
        let at = self.began.elapsed();
        let mut state = self.state();
        if state.is_dead(asker.handle) {
            drop(state);
            return job.fail(Errno::EIO);
        }
        let Some(action) = state.rules.decide(&request, at) else {
            return perform(state, asker, job, None);
        };
        drop(state);
        (self.tell)(DiskEvent {
            at,
            op: request.op,
            offset: request.offset,
            bytes: request.bytes,
            handle: asker.handle,
            action,
        });
        match action {
            DiskAction::Error => job.fail(Errno::EIO),
            DiskAction::Full => job.fail(Errno::ENOSPC),
            DiskAction::Delay(delay) => self.put_aside(Some(delay), asker, job),
            DiskAction::Hang => self.put_aside(None, asker, job),
            DiskAction::Torn { .. } | DiskAction::Lie => {
                perform(self.state(), asker, job, Some(action));
            }
        }
    }

    fn put_aside(&self, delay: Option<Duration>, asker: Asker, job: Job<'_>) {
        let due = delay.map(|delay| Instant::now() + delay);
        let job = job.into_owned();
        let mut state = self.state();
        // The power may have gone, or the disk, since this was decided.
        if state.is_dead(asker.handle) {
            drop(state);
            return job.fail(Errno::EIO);
        }
        state.waiting.push(Waiting { due, asker, job });
        self.changed.notify_all();
    }

    /// Answers what waits, each when its time has come, until the disk is closed.
    pub(super) fn answer_in_time(&self) {
        let mut state = self.state();
        loop {
            let now = Instant::now();
            let due = state.due(now);
            if !due.is_empty() {
                drop(state);
                for Waiting { asker, job, .. } in due {
                    perform(self.state(), asker, job, None);
                }
                state = self.state();
                continue;
            }
            if state.is_closed {
                return;
            }
            let next = state.waiting.iter().filter_map(|w| w.due).min();
            let pause = next.map_or(Duration::MAX, |due| due.saturating_duration_since(now));
            let waited = self.changed.wait_timeout(state, pause);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    pub(super) fn let_go(&self) -> usize {
        let mut state = self.state();
        let now = Instant::now();
        let mut count = 0;
        for waiting in state.waiting.iter_mut().filter(|w| w.due.is_none()) {
            waiting.due = Some(now);
            count += 1;
        }
        self.changed.notify_all();
        count
    }

    pub(super) fn until_hung(&self, patience: Duration) -> bool {
        let none_hangs = |state: &mut State| state.hung() == 0;
        let waited = self
            .changed
            .wait_timeout_while(self.state(), patience, none_hangs);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.hung() > 0
    }

    pub(super) fn power_cut(&self, cut: Cut) {
        let mut state = self.state();
        state.dead_handles = state.handles;
        state.model.power_cut(cut);
        let lost = std::mem::take(&mut state.waiting);
        drop(state);
        lost.into_iter().for_each(|w| w.job.fail(Errno::EIO));
    }

    /// What waits is answered, and everything that comes later is refused.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.is_closed = true;
        state.rules.clear();
        let waiting = std::mem::take(&mut state.waiting);
        self.changed.notify_all();
        drop(state);
        waiting.into_iter().for_each(|w| w.job.fail(Errno::EIO));
    }
}

/// Does an operation now, and answers it when nobody waits for the state.
fn perform(
    mut state: MutexGuard<'_, State>,
    Asker { handle, offset }: Asker,
    job: Job<'_>,
    action: Option<DiskAction>,
) {
    if state.is_dead(handle) {
        drop(state);
        return job.fail(Errno::EIO);
    }
    let op = job.request(offset).op;
    let access = Access { handle, op, offset };
    state.log.iter_mut().for_each(|log| log.push(access));
    match job {
        Job::Read(bytes, reply) => {
            let data = state.model.read(offset, bytes.into()).to_vec();
            drop(state);
            reply.data(&data);
        }
        Job::Write(data, reply) => {
            let torn = match action {
                Some(DiskAction::Torn { bytes }) => Some(bytes),
                _ => None,
            };
            let done = state.model.write(offset, &data, torn);
            drop(state);
            match (done, u32::try_from(data.len())) {
                (Ok(()), Ok(bytes)) => reply.written(bytes),
                _ => reply.error(Errno::EFBIG),
            }
        }
        Job::Zero(bytes, reply) => {
            let done = state.model.zero(offset, bytes);
            drop(state);
            match done {
                Ok(()) => reply.ok(),
                Err(_) => reply.error(Errno::EFBIG),
            }
        }
        Job::Flush(reply) => {
            if action != Some(DiskAction::Lie) {
                state.model.flush();
            }
            drop(state);
            reply.ok();
        }
    }
}
