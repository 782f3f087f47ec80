//! A gate for tests of devices: the driver half of the shadow virtqueues in the same process, and
//! the device run by hand, one pass at a time. Framing is that of the real gate.

use crate::birth::Stillbirth;
use crate::device::{Device, DeviceFault, Setup};
use crate::grants::Grants;
use crate::queues::Queues;
use crate::serve::Server;
use crate::spin::Spin;
use crate::wait::Waiter;
use bulkhead_ipc::device_kind::{Framing, POSITION_BYTES, TAIL_OFFSET};
use bulkhead_ipc::protocol::birth::{DeviceConfig, FdRole, UringGrant};
use bulkhead_ipc::ring::{PageRange, RequestLayout, ShadowDriver, Span, WindowPages};
use bulkhead_ipc::shared::{Doorbell, sealed_memfd};
use bulkhead_ipc::window::{
    DATA_PAGE_BYTES, DeviceState, Doorbells, DriverView, Published, Window, WindowLayout,
};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// A completed request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// The slot that [`Rig::submit`] returned.
    pub slot: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
    /// All writable bytes of the request as they are now, tail last.
    pub bytes: Vec<u8>,
}

#[derive(Debug)]
struct Placed {
    pages: Option<PageRange>,
    data: (usize, usize),
    tail: (usize, usize),
}

/// A device and its gate.
#[derive(Debug)]
pub struct Rig<D> {
    server: Server<D>,
    window: Window,
    bells: Doorbells,
    drivers: Vec<ShadowDriver>,
    pages: WindowPages,
    placed: HashMap<(usize, u16), Placed>,
    epoch: u64,
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
        let layout = WindowLayout::new(config.window_bytes as usize, &config.queue_sizes).unwrap();
        let fd = sealed_memfd("window", layout.bytes as u64).unwrap();
        let window = Window::map(fd.try_clone().unwrap(), layout.clone()).unwrap();
        window.initialise(1);
        let bells = Doorbells {
            kick: Doorbell::new().unwrap(),
            call: Doorbell::new().unwrap(),
        };
        let queues = Queues::map(fd.try_clone().unwrap(), &layout).unwrap();
        let waiter = Waiter::new().unwrap();
        waiter.watch(&bells.kick, 0).unwrap();
        let mut grants = Grants::of(held);
        let mut setup = Setup::new(config, &mut grants, uring, queues.memory(), &waiter);
        let device = D::start(&mut setup)?;
        grants.finish()?;
        let device_bells = Doorbells {
            kick: bells.kick.try_clone().unwrap(),
            call: bells.call.try_clone().unwrap(),
        };
        let device_window = Window::map(fd, layout.clone()).unwrap();
        let server = Server::new(
            device,
            device_window,
            queues,
            device_bells,
            waiter,
            None,
            config.features,
            Spin::new(Duration::ZERO),
        );
        server.publish();
        Ok(Self {
            server,
            window,
            bells,
            drivers: layout
                .queues
                .iter()
                .map(|&q| ShadowDriver::new(q))
                .collect(),
            pages: WindowPages::new(layout.data_pages),
            placed: HashMap::new(),
            epoch: 0,
        })
    }

    /// The device.
    pub const fn device(&mut self) -> &mut D {
        &mut self.server.device
    }

    /// The window, for tests that write nonsense into it.
    #[must_use]
    pub const fn window(&self) -> &Window {
        &self.window
    }

    /// What the device has published.
    #[must_use]
    pub fn published(&self) -> Published {
        assert_eq!(self.window.device_state(), DeviceState::Ready);
        self.window.published(0).unwrap()
    }

    /// Publishes again after a change.
    pub fn publish(&self) {
        self.server.publish();
    }

    /// The guest's driver starts with these features.
    pub fn start_driver(&mut self, features: u64) {
        self.epoch = (self.epoch + 1) | 1;
        let epoch = self.epoch;
        self.window.set_driver(DriverView { features, epoch });
    }

    /// The guest resets the device.
    pub fn reset_driver(&mut self) {
        self.epoch = (self.epoch + 2) & !1;
        let (features, epoch) = (0, self.epoch);
        self.window.set_driver(DriverView { features, epoch });
    }

    /// Puts a request into a queue as the gate would: `readable` is what the guest wrote (without a
    /// stream position), `writable` the bytes that it offers. `None` when nothing more fits.
    pub fn submit(
        &mut self,
        queue: usize,
        position: Option<u64>,
        readable: &[u8],
        writable: usize,
    ) -> Option<u16> {
        let Framing {
            head_bytes,
            tail_bytes,
            positioned,
        } = D::KIND.framing(queue);
        assert_eq!(positioned, position.is_some());
        let driver = self.drivers.get_mut(queue).unwrap();
        let slot = driver.next_slot()?;
        let (head, data) = readable.split_at(usize::from(head_bytes).min(readable.len()));
        let tail = usize::from(tail_bytes).min(writable);
        let into = writable - tail;
        let into_at = data.len().next_multiple_of(DATA_PAGE_BYTES);
        let need = if into > 0 { into_at + into } else { data.len() };
        let pages = if need > 0 {
            Some(self.pages.take(need)?)
        } else {
            None
        };
        let start = self.window.layout.data + pages.map_or(0, PageRange::offset);
        let head_at = driver.head_offset(slot);
        let memory = &self.window.memory;
        let mut front = Vec::new();
        front.extend(position.map(u64::to_le_bytes).into_iter().flatten());
        assert!(position.is_none() || front.len() == POSITION_BYTES);
        front.extend_from_slice(head);
        memory.slice(head_at, front.len()).copy_from(&front);
        memory.slice(start, data.len()).copy_from(data);
        let mut layout = RequestLayout::default();
        let mut push = |offset, len: usize, writable| {
            let len = u32::try_from(len).unwrap();
            layout.push(Span {
                offset,
                len,
                writable,
            });
        };
        push(head_at, front.len(), false);
        push(start, data.len(), false);
        push(start + into_at, into, true);
        push(head_at + TAIL_OFFSET, tail, true);
        memory
            .slice(start + into_at, into)
            .copy_from(&vec![0xa5u8; into]);
        memory
            .slice(head_at + TAIL_OFFSET, tail)
            .copy_from(&[0xa5u8; 32][..tail]);
        assert_eq!(driver.submit(memory, &layout), slot);
        let place = Placed {
            pages,
            data: (start + into_at, into),
            tail: (head_at + TAIL_OFFSET, tail),
        };
        self.placed.insert((queue, slot), place);
        Some(slot)
    }

    /// Puts a request with spans of the test's own choice into a queue.
    pub fn submit_raw(&mut self, queue: usize, layout: &RequestLayout) -> u16 {
        let driver = self.drivers.get_mut(queue).unwrap();
        driver.submit(&self.window.memory, layout)
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

    /// Completions of a queue since the last call, oldest first.
    pub fn answers(&mut self, queue: usize) -> Vec<Answer> {
        let mut answers = Vec::new();
        let driver = self.drivers.get_mut(queue).unwrap();
        while let Some(done) = driver.complete(&self.window.memory).unwrap() {
            let mut bytes = Vec::new();
            if let Some(place) = self.placed.remove(&(queue, done.slot)) {
                for (at, len) in [place.data, place.tail] {
                    let from = bytes.len();
                    bytes.resize(from + len, 0);
                    self.window
                        .memory
                        .slice(at, len)
                        .copy_to(&mut bytes[from..]);
                }
                if let Some(pages) = place.pages {
                    self.pages.give(pages);
                }
            }
            answers.push(Answer {
                slot: done.slot,
                written: done.written,
                bytes,
            });
        }
        answers
    }

    /// Whether the device has called since the last question.
    #[must_use]
    pub fn was_called(&self) -> bool {
        self.bells.call.take()
    }
}
