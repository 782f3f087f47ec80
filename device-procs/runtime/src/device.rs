//! What a virtio device is to the shell, and how its process runs from `main` to its end.
//!
//! A device author writes one type that implements [`Device`] and a `main` that calls [`run`].
//! Everything happens in one thread. A device never blocks: what it cannot do at once it does when
//! a descriptor that it watches has news.

use crate::birth::{Newborn, Stillbirth, live_out};
use crate::grants::Grants;
use crate::queues::{Chain, Kept, Queues, WindowMemory};
use crate::serve::Server;
use crate::spin::Spin;
use crate::sys;
use crate::wait::{SocketNews, Waiter, Watcher};
use bulkhead_ipc::device_kind::VirtioKind;
use bulkhead_ipc::protocol::birth::{DeviceConfig, DiskLimits, FdRole, KindConfig, UringGrant};
use bulkhead_ipc::protocol::device::FromDevice;
use bulkhead_ipc::protocol::device::Traffic;
use bulkhead_ipc::shared::Doorbell;
use bulkhead_ipc::window::{Doorbells, Window, WindowLayout};
use nix::errno::Errno;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

/// Why a device cannot go on. Its gate then sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum DeviceFault {
    /// The gate's half of a ring is nonsense.
    #[error("queue {index}: {cause}")]
    Ring {
        /// Which queue.
        index: usize,
        /// What is wrong with it.
        cause: virtio_queue::Error,
    },
    /// The gate has put a request that no gate makes.
    #[error("queue {index}: request {head} has impossible descriptors")]
    Chain {
        /// Which queue.
        index: usize,
        /// Its first descriptor.
        head: u16,
    },
    /// The kernel refused something that cannot fail in a sound process.
    #[error("{call}: {errno}")]
    Os {
        /// What.
        call: &'static str,
        /// Why.
        errno: Errno,
    },
    /// Something without which the process has no purpose is gone; a successor is given another.
    #[error("{what} has ended")]
    Ended {
        /// What.
        what: &'static str,
    },
}

/// What runs while a virtio device process looks for work: a vCPU, and the gate thread.
const VCPU_AND_GATE: usize = 2;

/// First token for descriptors of a device's own.
pub const FIRST_TOKEN: u8 = 8;

/// What a device has while it sets itself up.
#[derive(Debug)]
pub struct Setup<'a> {
    /// Its configuration.
    pub config: &'a DeviceConfig,
    /// Its descriptors, without the window and its doorbells.
    pub grants: &'a mut Grants,
    /// The io_uring operations that it may register.
    pub uring: &'a UringGrant,
    /// The window's memory.
    pub memory: WindowMemory,
    /// What it keeps for its successor, or has been left by its predecessor.
    pub kept: Kept,
    /// CPUs that the process may run on.
    pub cpus: usize,
    /// Counts the processes of this device, from 1.
    pub generation: u32,
    waiter: &'a Waiter,
}

impl<'a> Setup<'a> {
    /// What a device is given; `waiter` is what wakes it.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a process, put together in one place"
    )]
    pub const fn new(
        config: &'a DeviceConfig,
        grants: &'a mut Grants,
        uring: &'a UringGrant,
        memory: WindowMemory,
        kept: Kept,
        cpus: usize,
        generation: u32,
        waiter: &'a Waiter,
    ) -> Self {
        Self {
            config,
            grants,
            uring,
            memory,
            kept,
            cpus,
            generation,
            waiter,
        }
    }

    /// Has [`Device::on_event`] called with `token` (from [`FIRST_TOKEN`] on) whenever there is
    /// something new on `fd`.
    ///
    /// # Errors
    /// [`Stillbirth::Setup`] with the kernel's errno.
    pub fn watch(&self, fd: impl AsFd, token: u8) -> Result<(), Stillbirth> {
        self.waiter
            .watch(fd, token)
            .map_err(|e| Stillbirth::setup(format_args!("watching a descriptor: {e}")))
    }

    /// What has [`Device::on_socket`] called for sockets that the device is given while it serves.
    #[must_use]
    pub fn watcher(&self) -> Watcher {
        self.waiter.watcher()
    }
}

/// Whether the host has room for what is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// It has none: requests wait for [`Device::try_again`].
    Lacking,
    /// It has: nothing waits any more.
    There,
}

/// A virtio device.
pub trait Device: Sized {
    /// What it is.
    const KIND: VirtioKind;

    /// Takes its grants and sets itself up. Runs in the start-up phase.
    ///
    /// # Errors
    /// [`Stillbirth`] when a grant or the configuration is not usable.
    fn start(setup: &mut Setup<'_>) -> Result<Self, Stillbirth>;

    /// Feature bits that it can serve; only those that its configuration offers count.
    fn features(&self) -> u64;

    /// Its configuration image; of it only the fields count that the device alone knows.
    fn config(&self) -> Vec<u8>;

    /// A request of queue `queue`. The device completes it now or keeps it.
    ///
    /// # Errors
    /// [`DeviceFault`] when the device cannot go on; never for a bad request.
    fn on_request(
        &mut self,
        queue: usize,
        chain: Chain,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault>;

    /// Called after each batch of requests, and again as long as it returns true. Submits what the
    /// batch has prepared and completes what is done.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn settle(&mut self, queues: &mut Queues) -> Result<bool, DeviceFault> {
        let _nothing_kept = queues;
        Ok(false)
    }

    /// Whether what has been prepared should be settled before more requests are taken, so that the
    /// gate has something to do meanwhile.
    fn is_full(&self) -> bool {
        false
    }

    /// There is something new on the descriptor watched under `token`.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn on_event(&mut self, token: u8, queues: &mut Queues) -> Result<(), DeviceFault> {
        let _nothing_watched = (token, queues);
        Ok(())
    }

    /// There is something new on a socket that it watches.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn on_socket(&mut self, news: SocketNews, queues: &mut Queues) -> Result<(), DeviceFault> {
        let _no_sockets = (news, queues);
        Ok(())
    }

    /// The next connection that it wants of the broker: [`FromDevice::Dial`]. Called after each
    /// [`Device::settle`] until there is none.
    fn next_dial(&mut self) -> Option<FromDevice> {
        None
    }

    /// What became of the connection that was asked for under `id`: a socket when somebody was reached.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn on_dialled(
        &mut self,
        id: u64,
        socket: Option<OwnedFd>,
        queues: &mut Queues,
    ) -> Result<(), DeviceFault> {
        let _never_asked = (id, socket, queues);
        Ok(())
    }

    /// The driver has negotiated `features`, or (`None`) was reset. Requests that wait for something
    /// other than I/O in progress are given back on a reset.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn on_driver(&mut self, features: Option<u64>, queues: &mut Queues) -> Result<(), DeviceFault> {
        let _nothing_kept = (features, queues);
        Ok(())
    }

    /// The terminal has a new size. Returns whether the configuration has changed.
    fn on_resize(&mut self, columns: u16, rows: u16) -> bool {
        let _no_terminal = (columns, rows);
        false
    }

    /// The cable is plugged in, or pulled out. Returns whether the configuration has changed.
    fn on_link(&mut self, up: bool) -> bool {
        let _no_cable = up;
        false
    }

    /// What it has done, for devices that count it.
    fn traffic(&self) -> Option<Traffic> {
        None
    }

    /// How long it may sleep at most before it wants [`Device::settle`] to be called although nothing has
    /// happened. Called before going to sleep.
    fn wakes_in(&mut self) -> Option<Duration> {
        None
    }

    /// It may do so much in a second from now on.
    fn on_limits(&mut self, limits: &DiskLimits) {
        let _unlimited = limits;
    }

    /// How long it takes no requests, for it has done as much as it may. Called before each request and
    /// before going to sleep, so it must be cheap.
    fn rests(&mut self) -> Option<Duration> {
        None
    }

    /// Does again what the host had no room for.
    ///
    /// # Errors
    /// As [`Device::on_request`].
    fn try_again(&mut self, queues: &mut Queues) -> Result<(), DeviceFault> {
        let _never_lacks_room = queues;
        Ok(())
    }

    /// Whether the host has room for what is written, when that is to be told. Called after each
    /// [`Device::settle`].
    fn room_news(&mut self) -> Option<Room> {
        None
    }

    /// Whether the last requests were done as soon as they were looked at, so that more of them at a time would
    /// not make the device faster.
    fn is_at_once(&self) -> bool {
        false
    }

    /// Whether the device, which is about to sleep, has to be woken by the next request of a queue. Without it, that
    /// request is found when something else wakes the device.
    fn wants_kicks(&self, queue: usize) -> bool {
        let _all_of_them = queue;
        true
    }

    /// Whether [`Device::settle`] would find something new. Called while looking for work before
    /// going to sleep, so it must be cheap.
    fn has_news(&self) -> bool {
        false
    }

    /// Requests whose I/O is in progress and must end before the process does. What waits for room is left
    /// to its successor.
    fn in_flight(&self) -> usize {
        0
    }
}

/// Runs a device process from its birth to its end.
#[must_use]
pub fn run<D: Device>() -> ExitCode {
    live_out(Newborn::receive(D::KIND.proc_kind()), life::<D>)
}

/// Runs a device process that has received its birth message.
#[must_use]
pub fn live<D: Device>(newborn: Newborn) -> ExitCode {
    live_out(Ok(newborn), life::<D>)
}

fn life<D: Device>(newborn: Newborn) -> Result<i32, Stillbirth> {
    let mut server = bear::<D>(newborn)?;
    // Before anything of it is dropped, for which a locked process has no call.
    sys::leave(server.run())
}

fn bear<D: Device>(mut newborn: Newborn) -> Result<Server<D>, Stillbirth> {
    let parts = match prepare::<D>(&mut newborn) {
        Ok(parts) => parts,
        Err(cause) => newborn.fail(&cause),
    };
    let spin = Spin::beside(VCPU_AND_GATE, newborn.cpus);
    let waiter = parts.waiter;
    newborn.watch_brokers(&waiter, crate::serve::TOKEN_CONTROL)?;
    let (control, id) = newborn.lock()?;
    tracing::debug!(%id, "locked");
    Ok(Server::new(
        parts.device,
        parts.window,
        parts.queues,
        parts.doorbells,
        waiter,
        Some(control),
        parts.offered,
        spin,
    ))
}

struct Prepared<D> {
    device: D,
    window: Window,
    queues: Queues,
    doorbells: Doorbells,
    waiter: Waiter,
    offered: u64,
}

fn prepare<D: Device>(newborn: &mut Newborn) -> Result<Prepared<D>, Stillbirth> {
    let KindConfig::Device(config) = &newborn.config else {
        return Err(Stillbirth::setup("no device configuration"));
    };
    let grants = &mut newborn.grants;
    let bytes = usize::try_from(config.window_bytes).map_err(Stillbirth::setup)?;
    let layout =
        WindowLayout::of(config.kind, bytes, &config.queue_sizes).map_err(Stillbirth::setup)?;
    let window_fd = grants.take(FdRole::Window, 0)?;
    let queues = Queues::map(window_fd.try_clone().map_err(Stillbirth::setup)?, &layout)?;
    let window = Window::map(window_fd, layout)?;
    if !window.is_generation(newborn.id.generation) {
        return Err(Stillbirth::Field {
            field: "window",
            got: "of another generation".to_owned(),
            expected: "this process's own",
        });
    }
    let doorbells = Doorbells {
        kick: Doorbell::from(grants.take(FdRole::Kick, 0)?),
        call: Doorbell::from(grants.take(FdRole::Call, 0)?),
    };
    let waiter = Waiter::new().map_err(Stillbirth::setup)?;
    waiter
        .watch(&doorbells.kick, crate::serve::TOKEN_KICK)
        .map_err(Stillbirth::setup)?;
    let (memory, cpus) = (queues.memory(), newborn.cpus);
    let kept = Kept::of(&queues, &window.layout);
    let generation = newborn.id.generation;
    let mut setup = Setup::new(
        config,
        grants,
        &newborn.uring,
        memory,
        kept,
        cpus,
        generation,
        &waiter,
    );
    let device = D::start(&mut setup)?;
    Ok(Prepared {
        device,
        window,
        queues,
        doorbells,
        offered: config.features,
        waiter,
    })
}
