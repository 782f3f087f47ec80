//! `clock`: tells what time the guest's clocks show, for a host that compares them with its own.

use crate::machine::Machine;
use crate::report::{Failure, fail, say};
use crate::sys::{irq, port, time};

const RTC: u16 = 0x70;

/// Tells the time every `interval=` milliseconds for `seconds=`.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seconds = machine.number("seconds", 5)?;
    let interval_ms = machine.number("interval", 50)?.max(1);
    let khz = time::khz();
    say!("clock.begin khz={khz} interval={interval_ms} seconds={seconds}");
    let (start, mut before, mut number) = (time::cycles(), 0, 0_u64);
    loop {
        let rtc = time_of_day();
        let cycles = time::cycles();
        if cycles < before {
            fail!("clock", "kind=backward before={before} now={cycles}");
        }
        before = cycles;
        say!("clock.tick n={number} cycles={cycles} rtc={rtc}");
        number += 1;
        if seconds != 0 && cycles.wrapping_sub(start) / khz >= seconds.saturating_mul(1000) {
            break;
        }
        irq::sleep_ms(interval_ms);
    }
    say!("clock.end ticks={number}");
    Ok(())
}

fn cmos(register: u8) -> u8 {
    port::write_u8(RTC, register);
    port::read_u8(RTC + 1)
}

/// Seconds since midnight by the CMOS clock, read when it does not change.
fn time_of_day() -> u32 {
    let read = || {
        while cmos(0x0a) & 0x80 != 0 {}
        let binary = cmos(0x0b) & 4 != 0;
        [4, 2, 0].map(|register| {
            let value = u32::from(cmos(register));
            match binary {
                true => value,
                false => (value >> 4) * 10 + (value & 15),
            }
        })
    };
    let mut shown = read();
    loop {
        let again = read();
        if again == shown {
            let [hours, minutes, seconds] = shown;
            return (hours * 60 + minutes) * 60 + seconds;
        }
        shown = again;
    }
}
