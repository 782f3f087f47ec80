//! `bulkhead-legacy`: the devices of a PC that guests expect at fixed ports: the first serial port,
//! the CMOS clock, the keyboard controller, the debug console.
//!
//! It holds the console's output file, its input ring, and the page that it shares with the vCPUs.
#![forbid(unsafe_code)]

mod board;
mod calendar;
mod device;
mod keyboard;
mod rtc;
mod saved_state;
mod uart;

/// Runs the process from its birth to its end.
#[must_use]
pub fn run() -> std::process::ExitCode {
    device::run()
}

/// Runs a process that has received its birth message.
#[must_use]
pub fn live(newborn: bulkhead_runtime::Newborn) -> std::process::ExitCode {
    device::born(Ok(newborn))
}
