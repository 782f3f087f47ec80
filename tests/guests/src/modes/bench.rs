//! `bench-mmio` and `bench-legacy`: how long one exit takes that ring 0 sees, for a virtio register
//! and for a register of the serial port.

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::{ring0, time};
use crate::virtio::mmio::{self, reg};

const COUNT: u64 = 20_000;
const COM1_LSR: u16 = 0x3fd;

fn measure(name: &str, count: u64, access: impl Fn(u64)) {
    let tens = count.div_ceil(10);
    // Measured now if CPUID does not tell: nothing may come between the loop and its last record.
    let khz = time::khz();
    access(10);
    say!("{name}.begin count={}", tens * 10);
    let start = time::cycles();
    access(tens);
    let cycles = time::cycles() - start;
    say!(
        "{name}.end count={} cycles={cycles} tsc_khz={khz}",
        tens * 10
    );
}

/// Writes DriverFeaturesSel of the first device `count=` times: what is read need not be an exit.
pub fn mmio(machine: &Machine) -> Result<(), Failure> {
    let device = mmio::each(machine, Some).ok_or(Failure::NoDevice { id: 0, index: 0 })?;
    let count = machine.number("count", COUNT)?;
    measure("bench-mmio", count, |tens| {
        ring0::write_memory(device.base + reg::DRIVER_FEATURES_SEL, tens)
    });
    Ok(())
}

/// Reads COM1's line status `count=` times.
pub fn legacy(machine: &Machine) -> Result<(), Failure> {
    let count = machine.number("count", COUNT)?;
    measure("bench-legacy", count, |tens| {
        ring0::read_port(COM1_LSR, tens)
    });
    Ok(())
}
