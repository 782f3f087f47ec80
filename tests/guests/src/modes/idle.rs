//! `idle`: sleeps in `hlt`, for ever or for `seconds=`, so that the host can measure what an idle
//! VM costs.

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::{irq, ring0};

/// Sleeps.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seconds = machine.number("seconds", 0)?;
    irq::start();
    say!("idle seconds={seconds}");
    if seconds == 0 {
        ring0::idle();
    }
    let before = ring0::interrupts();
    irq::sleep_ms(seconds.saturating_mul(1000));
    say!("idle.end interrupts={}", ring0::interrupts() - before);
    Ok(())
}
