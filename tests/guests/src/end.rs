//! How the guest ends: `end=` on the command line, or a failing `isa-debug-exit` after errors.

use bulkhead_guest::acpi::Register;

use crate::machine::Machine;
use crate::report::{self, fail, say};
use crate::sys::{irq, phys, port, ring0};

/// `isa-debug-exit` value after an exception (process exit code 253 by QEMU's rule).
pub const EXCEPTION: u32 = 0x7e;
/// `isa-debug-exit` value after a panic of the guest's own code (251).
pub const PANIC: u32 = 0x7d;
/// `isa-debug-exit` value when errors were counted (249).
const ERRORS: u32 = 0x7c;
/// `isa-debug-exit` value when the way that `end=` names did nothing (247).
const NO_END: u32 = 0x7b;

const DEBUG_EXIT: u16 = 0xf4;
const PVPANIC: u16 = 0x505;
const I8042_COMMAND: u16 = 0x64;
const SLEEP_CONTROL: Register = Register::Port(0x600);
const RESET: Register = Register::Port(0x602);
/// SLP_EN and SLP_TYP 5.
const POWER_OFF: u8 = 0x20 | 5 << 2;

/// Prints `done` and ends as `end=` says; with errors always by `isa-debug-exit`.
pub fn finish(machine: &Machine) -> ! {
    let errors = report::errors();
    say!("done errors={errors}");
    if errors != 0 {
        debug_exit(ERRORS);
    }
    let (how, code) = match machine
        .args()
        .text("end")
        .unwrap_or("poweroff")
        .split_once(':')
    {
        Some((how, code)) => (how, code),
        None => (machine.args().text("end").unwrap_or("poweroff"), "0"),
    };
    let acpi = machine.acpi.as_ref();
    match how {
        "poweroff" => {
            write(
                acpi.and_then(|acpi| acpi.sleep_control)
                    .unwrap_or(SLEEP_CONTROL),
                POWER_OFF,
            );
        }
        "acpi-reset" => {
            let value = acpi.map_or(1, |acpi| acpi.reset_value);
            write(acpi.and_then(|acpi| acpi.reset).unwrap_or(RESET), value);
        }
        "debug" => debug_exit(code.parse().unwrap_or(0)),
        "reset" => port::write_u8(I8042_COMMAND, 0xfe),
        "panic" => port::write_u8(PVPANIC, 1),
        "triple" => ring0::triple_fault(),
        "hang" => hang(),
        "halt" => ring0::park(),
        "fault" => ring0::fault(),
        "assert" => panic!("end=assert was asked for"),
        _ => fail!("end", "kind=parameter key=end"),
    }
    // The VMM may need a moment to act on it.
    irq::sleep_ms(2000);
    say!("error mode=end kind=nothing_happened");
    fatal(NO_END)
}

/// Ends at once with a failing code, without trusting anything.
pub fn fatal(code: u32) -> ! {
    debug_exit(code)
}

fn debug_exit(code: u32) -> ! {
    port::write_u32(DEBUG_EXIT, code);
    ring0::park()
}

fn write(register: Register, value: u8) {
    match register {
        Register::Port(number) => port::write_u8(number, value),
        Register::Memory(address) => phys::write(address, value),
    }
}

/// Spins for ever with interrupts as they are, as a guest that has crashed in a loop.
fn hang() -> ! {
    loop {
        core::hint::spin_loop();
    }
}
