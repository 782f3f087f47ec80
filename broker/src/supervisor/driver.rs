//! Watches one process: its control channel, its log and its pidfd, as a task of the broker.
//!
//! A process that breaks the protocol is reported, not accommodated. Nothing here waits for a
//! process without a deadline, and a process that floods gets no more than its turn.

use super::allowance::Allowance;
use super::fault;
use super::relay::Relay;
use crate::escape::excerpt;
use crate::launch::Launched;
use bulkhead_ipc::channel::ChannelError;
use bulkhead_ipc::ident::{ProcId, ProcKind};
use bulkhead_ipc::protocol::PROTOCOL_VERSION;
use bulkhead_ipc::protocol::birth::Born;
use bulkhead_ipc::protocol::device::FromDevice;
use bulkhead_ipc::protocol::switch::FromSwitch;
use bulkhead_ipc::protocol::vcpu::FromVcpu;
use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::de::DeserializeOwned;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

/// Messages that are taken from one process before the others have their turn.
const MESSAGES_PER_TURN: usize = 32;
/// How long a process may live after it has closed its control channel.
const SILENCE: Duration = Duration::from_secs(1);
/// Longest version of a program that is shown, in bytes.
const VERSION_BYTES_MAX: usize = 32;
/// Notices that wait for the machine's driver.
pub const NOTICES_CAPACITY: usize = 64;

/// What a process said or what became of it.
#[derive(Debug)]
pub enum Notice {
    /// It is locked, with this Landlock ABI, and is of this version.
    Locked(u8, String),
    /// A device process said something.
    Device(FromDevice),
    /// The switch of a network said something.
    Switch(FromSwitch),
    /// The vCPU process said something, and attached descriptors.
    Vcpu(FromVcpu, Vec<OwnedFd>),
    /// It cannot start, or broke its protocol. It is still there.
    Broke(String),
    /// It is dead and reaped.
    Died {
        /// How, in words.
        reason: String,
        /// Whether SIGKILL ended it.
        killed: bool,
    },
}

/// One of the descriptors of a process, for the runtime's poller.
#[derive(Debug)]
struct Watched {
    fd: RawFd,
    /// Keeps the descriptor open.
    _owner: Arc<Launched>,
}

impl AsRawFd for Watched {
    fn as_raw_fd(&self) -> RawFd {
        self.fd
    }
}

type Notices = mpsc::Sender<(ProcId, Notice)>;

/// Starts to watch a process.
///
/// # Errors
/// When a descriptor cannot be polled.
pub fn watch(launched: &Arc<Launched>, vm: &str, notices: Notices) -> io::Result<()> {
    let poll = |fd: RawFd| {
        let watched = Watched {
            fd,
            _owner: Arc::clone(launched),
        };
        register(watched)
    };
    let watcher = Watcher {
        control: poll(launched.control.as_raw_fd())?,
        pidfd: poll(launched.pidfd.as_raw_fd())?,
        log: poll(launched.log.as_raw_fd())?,
        relay: Relay::new(launched.id, vm),
        launched: Arc::clone(launched),
        notices,
        said: Said {
            born: launched.is_adopted(),
            allowance: Allowance::of(launched.id.kind, Instant::now()),
        },
    };
    tokio::spawn(watcher.run());
    Ok(())
}

#[expect(
    unsafe_code,
    reason = "the poller wants a promise that the descriptor stays open"
)]
fn register(watched: Watched) -> io::Result<AsyncFd<Watched>> {
    // SAFETY: the descriptor belongs to a `Launched`, which `watched` keeps alive and unchanged.
    Ok(unsafe { AsyncFd::register_with_interest(watched, Interest::READABLE) }?)
}

/// A descriptor of ours for the runtime's poller.
///
/// # Errors
/// When it cannot be polled.
#[expect(
    unsafe_code,
    reason = "the poller wants a promise that the descriptor stays open"
)]
pub(crate) fn readable(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the poller owns the descriptor, which nothing else can close or change.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

struct Watcher {
    launched: Arc<Launched>,
    control: AsyncFd<Watched>,
    pidfd: AsyncFd<Watched>,
    log: AsyncFd<Watched>,
    relay: Relay,
    notices: Notices,
    said: Said,
}

/// What the process has said so far.
struct Said {
    born: bool,
    allowance: Allowance,
}

/// What a turn at the control channel found.
enum Turn {
    Drained,
    More,
    Closed,
}

impl Watcher {
    async fn run(mut self) {
        let mut listening = true;
        let mut logging = true;
        let mut closed_at: Option<tokio::time::Instant> = None;
        loop {
            let patience = async {
                match closed_at {
                    Some(at) => tokio::time::sleep_until(at + SILENCE).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                ready = self.control.readable(), if listening => {
                    let Ok(mut ready) = ready else { listening = false; continue };
                    let turn = Self::listen(&self.launched, &self.notices, &mut self.said).await;
                    match turn {
                        Turn::Drained => ready.clear_ready(),
                        Turn::More => tokio::task::yield_now().await,
                        Turn::Closed => {
                            listening = false;
                            closed_at = Some(tokio::time::Instant::now());
                        }
                    }
                }
                ready = self.log.readable(), if logging => {
                    let Ok(mut ready) = ready else { logging = false; continue };
                    match read_log(&self.launched, &mut self.relay) {
                        Read::Some => tokio::task::yield_now().await,
                        Read::Nothing => ready.clear_ready(),
                        Read::End => logging = false,
                    }
                }
                ready = self.pidfd.readable() => {
                    if ready.is_ok() {
                        drop(ready);
                        return self.bury().await;
                    }
                }
                () = patience => {
                    closed_at = None;
                    let what = "closed its control channel".to_owned();
                    self.tell(Notice::Broke(what)).await;
                }
            }
        }
    }

    async fn tell(&self, notice: Notice) {
        // Nobody listens any more only when the machine's driver is gone.
        let _sent = self.notices.send((self.launched.id, notice)).await;
    }

    async fn listen(launched: &Launched, notices: &Notices, said: &mut Said) -> Turn {
        for _ in 0..MESSAGES_PER_TURN {
            let heard = match (said.born, launched.id.kind) {
                (false, _) => hear(launched, |message, _| first(message, &mut said.born)),
                (true, ProcKind::Vcpu) => hear(launched, Notice::Vcpu),
                (true, ProcKind::Switch) => hear(launched, |message, _| Notice::Switch(message)),
                (true, _) => hear(launched, |message, _| Notice::Device(message)),
            };
            let notice = match heard {
                Ok(Some(notice)) => notice,
                Ok(None) => return Turn::Drained,
                Err(ChannelError::Closed) => return Turn::Closed,
                Err(error) => Notice::Broke(format!("broke its protocol: {error}")),
            };
            if !said.allowance.take(Instant::now()) {
                let flood = "sends more messages than it can have to say".to_owned();
                let _sent = notices.send((launched.id, Notice::Broke(flood))).await;
                return Turn::Closed;
            }
            let _sent = notices.send((launched.id, notice)).await;
        }
        Turn::More
    }

    /// The process is dead: takes what it has left behind, then reaps it.
    async fn bury(mut self) {
        while matches!(
            Self::listen(&self.launched, &self.notices, &mut self.said).await,
            Turn::More
        ) {}
        while matches!(read_log(&self.launched, &mut self.relay), Read::Some) {}
        self.relay.finish(Instant::now());
        let status = reap(&self.launched);
        let killed = matches!(status, Some(WaitStatus::Signaled(_, Signal::SIGKILL, _)));
        let reason = fault::describe(&self.launched, status);
        self.tell(Notice::Died { reason, killed }).await;
    }
}

fn hear<T: DeserializeOwned>(
    launched: &Launched,
    notice: impl FnOnce(T, Vec<OwnedFd>) -> Notice,
) -> Result<Option<Notice>, ChannelError> {
    let heard = launched.control.try_recv::<T>()?;
    Ok(heard.map(|(message, descriptors)| notice(message, descriptors)))
}

fn first(message: Born, born: &mut bool) -> Notice {
    match message {
        Born::Locked {
            version: PROTOCOL_VERSION,
            landlock_abi,
            program,
        } => {
            *born = true;
            Notice::Locked(landlock_abi, excerpt(&program, VERSION_BYTES_MAX))
        }
        Born::Locked { version, .. } => Notice::Broke(format!(
            "speaks protocol version {version}, expected {PROTOCOL_VERSION}"
        )),
        Born::Failed { reason } => Notice::Broke(fault::said(&reason)),
    }
}

enum Read {
    Some,
    Nothing,
    End,
}

fn read_log(launched: &Launched, relay: &mut Relay) -> Read {
    let mut bytes = [0u8; 4096];
    match nix::unistd::read(&launched.log, &mut bytes) {
        Ok(0) => Read::End,
        Ok(n) => {
            relay.take(bytes.get(..n).unwrap_or_default(), Instant::now());
            Read::Some
        }
        Err(nix::errno::Errno::EINTR) => Read::Some,
        Err(nix::errno::Errno::EAGAIN) => Read::Nothing,
        Err(_) => Read::End,
    }
}

fn reap(launched: &Launched) -> Option<WaitStatus> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG;
    waitid(Id::PIDFd(launched.pidfd.as_fd()), flags).ok()
}
