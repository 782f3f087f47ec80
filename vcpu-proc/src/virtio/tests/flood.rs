//! Doorbells that are rung for nothing, and faults in numbers.

use super::succession::running;
use super::*;

impl Machine {
    /// Rings until the gate has had enough.
    fn flood(&mut self) -> String {
        self.wait("the gate to have had enough", |m| {
            m.call.ring();
            match m.bus.take_faults().pop() {
                Some(FromVcpu::DeviceFault { reason, .. }) => Some(reason),
                _ => None,
            }
        })
    }

    /// Starts the device and has its guest offer what is not in its memory.
    fn break_the_protocol(&mut self) {
        self.start();
        self.describe(0, u64::MAX - 8, 16, 0, 0);
        self.offer(0);
        self.wait("DEVICE_NEEDS_RESET", |m| {
            (m.get(0x70) & 0x40 != 0).then_some(())
        });
    }
}

#[test]
fn device_that_rings_without_a_pause_is_replaced_and_its_requests_are_not_lost() {
    let mut m = running();
    m.offer_request(0, 512, false);
    let _has_it = m.device_pop();
    let reason = m.flood();
    assert!(reason.contains("doorbell"), "{reason}");
    // It goes on until it is dead: nobody hears of it twice.
    for _ in 0..10_000 {
        m.call.ring();
    }
    assert!(m.bus.take_faults().is_empty());
    m.succeed(2, false);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
    // Whoever comes next is as free to ring as the first one was, and no freer.
    m.flood();
}

#[test]
fn device_that_floods_before_it_has_published_is_replaced() {
    let mut m = Machine::new();
    m.flood();
    m.succeed(2, false);
    m.start();
    m.offer_request(0, 512, false);
    assert_eq!(m.complete_one(), 0);
    assert_eq!(m.used(), (0, 1));
}

#[test]
fn device_that_rings_for_each_completion_and_each_start_is_honest() {
    let mut m = running();
    for round in 0..2000u16 {
        m.offer_request(0, 512, false);
        assert_eq!(m.complete_one(), 0);
        assert_eq!(m.used(), (0, 1));
        if round.is_multiple_of(4) {
            m.start();
            m.call.ring();
            m.call.ring();
        }
    }
    assert_eq!(format!("{:?}", m.bus.take_faults()), "[]");
}

#[test]
fn guest_cannot_use_up_the_reports_of_its_devices_faults() {
    let mut m = running();
    // More than are ever told, so that the last ones are not.
    for _ in 0..150 {
        m.break_the_protocol();
        let _heard = m.bus.take_faults();
    }
    m.start();
    m.window.set_device_state(DeviceState::Failed);
    m.call.ring();
    assert!(matches!(m.wait_fault(), FromVcpu::DeviceFault { .. }));
}

#[test]
fn guest_faults_that_nobody_takes_leave_room_for_those_of_devices() {
    let mut m = running();
    for _ in 0..80 {
        m.break_the_protocol();
    }
    m.start();
    m.window.set_device_state(DeviceState::Failed);
    m.call.ring();
    m.wait("the fault of the device", |m| {
        let mut faults = m.bus.take_faults().into_iter();
        faults.find(|fault| matches!(fault, FromVcpu::DeviceFault { .. }))
    });
}
