//! Devices under test: a gate in the same process with the device run by hand ([`Rig`]), or the real
//! program born as the broker would ([`process`]).

mod gate;
pub mod process;

pub use gate::{Answer, Gate};

use crate::birth::Stillbirth;
use crate::device::{Device, DeviceFault, Setup};
use crate::grants::Grants;
use crate::queues::{Kept, Queues};
use crate::serve::Server;
use crate::spin::Spin;
use crate::wait::Waiter;
use bulkhead_ipc::protocol::birth::{DeviceConfig, FdRole, UringGrant};
use bulkhead_ipc::window::{Doorbells, Window};
use std::ops::{Deref, DerefMut};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A device and its gate.
#[derive(Debug)]
pub struct Rig<D> {
    server: Server<D>,
    gate: Gate,
}

impl<D> Deref for Rig<D> {
    type Target = Gate;

    fn deref(&self) -> &Gate {
        &self.gate
    }
}

impl<D> DerefMut for Rig<D> {
    fn deref_mut(&mut self) -> &mut Gate {
        &mut self.gate
    }
}

#[expect(
    clippy::missing_panics_doc,
    clippy::unwrap_used,
    reason = "a test that cannot set itself up fails"
)]
impl<D: Device> Rig<D> {
    /// Starts a device with the given descriptors and publishes its configuration.
    ///
    /// # Errors
    /// What the device says.
    pub fn new(
        config: &DeviceConfig,
        held: Vec<(FdRole, u16, OwnedFd)>,
        uring: &UringGrant,
    ) -> Result<Self, Stillbirth> {
        let gate = Gate::new(D::KIND, config.window_bytes, &config.queue_sizes);
        let (fd, kick, call) = gate.device_fds();
        let layout = gate.window.layout.clone();
        let queues = Queues::map(fd.try_clone().unwrap(), &layout).unwrap();
        let window = Window::map(fd, layout.clone()).unwrap();
        let waiter = Waiter::new().unwrap();
        waiter.watch(&kick, crate::serve::TOKEN_KICK).unwrap();
        let mut grants = Grants::of(held);
        let memory = queues.memory();
        let kept = Kept::of(&queues, &layout);
        let mut setup = Setup::new(config, &mut grants, uring, memory, kept, 1, 1, &waiter);
        let device = D::start(&mut setup)?;
        grants.finish()?;
        let server = Server::new(
            device,
            window,
            queues,
            Doorbells { kick, call },
            waiter,
            None,
            config.features,
            Spin::new(Duration::ZERO),
        );
        server.publish();
        Ok(Self { server, gate })
    }

    /// The device.
    pub const fn device(&mut self) -> &mut D {
        &mut self.server.device
    }

    /// Publishes again after a change.
    pub fn publish(&self) {
        self.server.publish();
    }

    /// Runs the device until it has nothing to do and no I/O in progress.
    ///
    /// # Errors
    /// The device's fault.
    pub fn run(&mut self) -> Result<(), DeviceFault> {
        loop {
            while self.server.pass()? {}
            if self.server.device.in_flight() == 0 {
                self.server.sleep(Some(Duration::ZERO))?;
                if !self.server.pass()? {
                    return Ok(());
                }
            } else {
                self.server.sleep(Some(Duration::from_millis(100)))?;
            }
        }
    }
}
