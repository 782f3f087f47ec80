//! `button`: sleeps until the ACPI power button is pressed (generic event device of Bulkhead's
//! machine), so that a graceful stop can be tested. `timeout=` does not apply.

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::{irq, port, ring0};

const EVENTS: u16 = 0x604;
const GSI: u32 = 9;
const POWER_BUTTON: u8 = 1;

/// Whether it was pressed since this was asked last.
pub fn pressed() -> bool {
    let events = port::read_u8(EVENTS);
    events != 0xff && events & POWER_BUTTON != 0
}

/// Waits for it.
pub fn run(_: &Machine) -> Result<(), Failure> {
    irq::enable(GSI);
    // What happened before we listened is not taken for a press.
    port::read_u8(EVENTS);
    say!("button.ready");
    loop {
        let seen = ring0::interrupts();
        if pressed() {
            irq::disable(GSI);
            say!("button pressed=1 interrupts={}", ring0::interrupts_of(GSI));
            return Ok(());
        }
        ring0::halt_until_interrupt(seen);
    }
}
