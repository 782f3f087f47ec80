//! The loop of a virtio device process.
//!
//! ```text
//!   pass: driver changed? ── every queue drained ── settle ── call doorbell if asked for
//!     │ something was done: again (control channel every PASSES_BETWEEN_LOOKS)
//!     └ nothing: look for a while (spin) ── ask for kicks ── sleep in epoll
//! ```
//!
//! A busy queue makes no system call here: kicks are suppressed by event index until the loop is
//! about to sleep, and calls are made only when the gate asked.

use crate::control::{Control, Wishes};
use crate::device::{Device, DeviceFault, FIRST_TOKEN, Room};
use crate::queues::Queues;
use crate::spin::Spin;
use crate::wait::{WATCHED_MAX, Waiter, Woken};
use bulkhead_ipc::protocol::device::{FromDevice, Traffic};
use bulkhead_ipc::window::{DeviceState, Doorbells, Window};
use std::time::{Duration, Instant};

pub(crate) const TOKEN_KICK: u8 = 0;
pub(crate) const TOKEN_CONTROL: u8 = 1;

/// Requests of one queue in one pass, so that a ring that is filled as fast as it is emptied does
/// not keep the process from answering, or from hearing of a reset.
const REQUESTS_PER_PASS: u32 = 256;
/// Busy passes after which the other descriptors are looked at without sleeping.
const PASSES_BETWEEN_LOOKS: u32 = 1024;
/// Looks at the rings between two looks at the clock while spinning.
const LOOKS_PER_CLOCK: u32 = 32;
/// Shortest sleep of a device that rests: what the kernel's timer of epoll can.
const REST_MIN: Duration = Duration::from_millis(1);
/// Exit status after a fault.
const EXIT_FAULT: i32 = 71;

/// A device with everything it runs on.
#[derive(Debug)]
pub(crate) struct Server<D> {
    /// The device.
    pub(crate) device: D,
    window: Window,
    queues: Queues,
    doorbells: Doorbells,
    waiter: Waiter,
    control: Option<Control>,
    offered: u64,
    epoch: u64,
    spin: Spin,
    draining: bool,
    /// What was last said of it.
    at_once: bool,
    /// What the broker was last told.
    traffic: Traffic,
}

impl<D: Device> Server<D> {
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of a process, put together in one place"
    )]
    pub(crate) fn new(
        device: D,
        window: Window,
        queues: Queues,
        doorbells: Doorbells,
        waiter: Waiter,
        control: Option<Control>,
        offered: u64,
        spin: Spin,
    ) -> Self {
        Self {
            device,
            window,
            queues,
            doorbells,
            waiter,
            control,
            offered,
            epoch: 0,
            spin,
            draining: false,
            at_once: false,
            traffic: Traffic::default(),
        }
    }

    /// Serves until told to end. Returns the exit status.
    pub(crate) fn run(&mut self) -> i32 {
        self.publish();
        match self.serve() {
            Ok(()) => 0,
            Err(fault) => {
                let reason = fault.to_string();
                tracing::error!(%reason, "the device cannot go on");
                self.window.set_device_state(DeviceState::Failed);
                self.doorbells.call.ring();
                if let Some(control) = &self.control {
                    control.say(&FromDevice::Fault { reason });
                }
                EXIT_FAULT
            }
        }
    }

    /// Says in the window what the device is; the gate is called.
    pub(crate) fn publish(&self) {
        let features = self.device.features() & self.offered;
        self.window.publish(features, &self.device.config());
        self.doorbells.call.ring();
    }

    fn serve(&mut self) -> Result<(), DeviceFault> {
        let mut passes = 0u32;
        loop {
            if self.pass()? {
                passes += 1;
                if passes.is_multiple_of(PASSES_BETWEEN_LOOKS) {
                    self.sleep(Some(Duration::ZERO))?;
                }
            } else if self.draining && self.device.in_flight() == 0 {
                return Ok(());
            } else if let Some(rest) = self.rest() {
                self.sleep(Some(rest))?;
            } else if !self.look() && !self.ask_for_kicks()? {
                let within = self.device.wakes_in();
                let asleep = Instant::now();
                self.sleep(within)?;
                self.spin.slept(asleep.elapsed());
            }
        }
    }

    /// Does everything there is to do now. Returns whether there was anything.
    pub(crate) fn pass(&mut self) -> Result<bool, DeviceFault> {
        self.notice_driver()?;
        let mut busy = false;
        for index in 0..self.queues.len() {
            let mut budget = REQUESTS_PER_PASS;
            while budget > 0
                && !self.draining
                && !self.device.is_full()
                && self.device.rests().is_none()
                && let Some(chain) = self.queues.pop(index)?
            {
                // Whoever started the queue did so before it put the request.
                self.notice_driver()?;
                self.device.on_request(index, chain, &mut self.queues)?;
                budget -= 1;
                busy = true;
            }
        }
        if busy {
            self.give_back_leftovers()?;
        }
        busy |= self.device.settle(&mut self.queues)?;
        if let Some(room) = self.device.room_news() {
            self.tell_of_room(room);
        }
        self.ask_for_connections()?;
        let at_once = self.device.is_at_once();
        if std::mem::replace(&mut self.at_once, at_once) != at_once {
            self.window.set_at_once(at_once);
        }
        if self.queues.call_needed()? {
            self.doorbells.call.ring();
        }
        Ok(busy)
    }

    fn ask_for_connections(&mut self) -> Result<(), DeviceFault> {
        while let Some(dial) = self.device.next_dial() {
            let asked = self.control.as_ref().is_some_and(|c| c.ask(&dial));
            if let (false, FromDevice::Dial { id, .. }) = (asked, dial) {
                self.device.on_dialled(id, None, &mut self.queues)?;
            }
        }
        Ok(())
    }

    fn tell_of_room(&self, room: Room) {
        if let Some(control) = &self.control {
            control.say(&match room {
                Room::Lacking => FromDevice::NoRoom,
                Room::There => FromDevice::HasRoom,
            });
        }
    }

    /// A request that was put before the guest's reset may be taken after the reset was noticed.
    /// The gate starts no queue before it is back, so the device is told of the reset again. What
    /// was put after a new start is seen together with that start.
    fn give_back_leftovers(&mut self) -> Result<(), DeviceFault> {
        self.notice_driver()?;
        if self.epoch.is_multiple_of(2) {
            self.device.on_driver(None, &mut self.queues)?;
        }
        Ok(())
    }

    fn notice_driver(&mut self) -> Result<(), DeviceFault> {
        let driver = self.window.driver();
        if driver.epoch == self.epoch {
            return Ok(());
        }
        let was_running = self.epoch % 2 == 1;
        self.epoch = driver.epoch;
        let running = driver.epoch % 2 == 1;
        if was_running && running {
            // The reset in between was over before it was seen.
            self.device.on_driver(None, &mut self.queues)?;
        }
        let features = running.then_some(driver.features & self.offered);
        self.device.on_driver(features, &mut self.queues)
    }

    /// How long to sleep although there may be requests. What is done meanwhile wakes the device.
    fn rest(&mut self) -> Option<Duration> {
        let rest = self.device.rests().filter(|_| !self.draining)?;
        (!self.device.has_news()).then_some(rest.max(REST_MIN))
    }

    /// Looks for work for as long as the spin budget says.
    fn look(&self) -> bool {
        let budget = self.spin.budget();
        if budget.is_zero() || self.draining {
            return false;
        }
        let start = Instant::now();
        loop {
            for _ in 0..LOOKS_PER_CLOCK {
                if self.queues.any_waiting() || self.device.has_news() {
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() >= budget {
                return false;
            }
        }
    }

    /// Returns whether there is something to do, so that the loop must not sleep.
    fn ask_for_kicks(&mut self) -> Result<bool, DeviceFault> {
        let wanted = |queue| self.device.wants_kicks(queue);
        let waiting = self.queues.ask_for_kicks(wanted)? && !self.draining;
        Ok(waiting || self.device.has_news() || self.window.driver().epoch != self.epoch)
    }

    pub(crate) fn sleep(&mut self, within: Option<Duration>) -> Result<(), DeviceFault> {
        let woken = self.waiter.sleep(within);
        let woken = woken.map_err(|errno| DeviceFault::Os {
            call: "epoll_wait",
            errno,
        })?;
        self.attend(woken)
    }

    fn attend(&mut self, woken: Woken) -> Result<(), DeviceFault> {
        if woken.by(TOKEN_CONTROL) {
            while self.listen()? {}
        }
        for token in (FIRST_TOKEN..).take(WATCHED_MAX) {
            if woken.by(token) {
                self.device.on_event(token, &mut self.queues)?;
            }
        }
        for news in woken.sockets {
            self.device.on_socket(news, &mut self.queues)?;
        }
        Ok(())
    }

    /// Returns whether there may be more to hear.
    fn listen(&mut self) -> Result<bool, DeviceFault> {
        let Some(control) = &self.control else {
            return Ok(false);
        };
        let Wishes {
            shutdown,
            resize,
            try_again,
            limits,
            dialled,
            link,
            pinged,
            more,
        } = control.listen();
        if pinged
            && let Some(traffic) = self.device.traffic()
            && std::mem::replace(&mut self.traffic, traffic) != traffic
        {
            control.say(&FromDevice::Traffic(traffic));
        }
        if let Some(limits) = limits {
            self.device.on_limits(&limits);
        }
        self.draining |= shutdown;
        for (id, socket) in dialled {
            self.device.on_dialled(id, socket, &mut self.queues)?;
        }
        if try_again && !self.draining {
            self.device.try_again(&mut self.queues)?;
        }
        if let Some((columns, rows)) = resize
            && self.device.on_resize(columns, rows)
        {
            self.publish();
        }
        if let Some(up) = link
            && self.device.on_link(up)
        {
            self.publish();
        }
        Ok(more && !shutdown)
    }
}
