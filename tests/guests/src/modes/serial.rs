//! `serial`: numbered lines on the serial port for `seconds=`, and each line that is typed sent back.
//! What happens to the process behind the port meanwhile must not show.

use bulkhead_guest::record::Escaped;

use crate::machine::Machine;
use crate::report::{Failure, say};
use crate::sys::time::Deadline;
use crate::sys::{irq, port};

const COM1: u16 = 0x3f8;
const LSR: u16 = COM1 + 5;
const MCR: u16 = COM1 + 4;
const SCR: u16 = COM1 + 7;
const DATA_READY: u8 = 1;
/// DTR, RTS, OUT2: a driver that is there.
const READY: u8 = 0x0b;
const LINE_MAX: usize = 160;
/// Lines typed that are looked for between two lines printed.
const LOOKS: usize = 64;

/// Prints and echoes.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let seconds = machine.number("seconds", 5)?;
    let interval_ms = machine.number("interval", 0)?;
    port::write_u8(MCR, READY);
    say!("serial.begin seconds={seconds}");
    let end = Deadline::after_ms(seconds.saturating_mul(1000));
    let mut line = [0_u8; LINE_MAX];
    let (mut len, mut printed, mut echoed) = (0, 0_u64, 0_u64);
    while !end.passed() {
        say!("serial.line n={printed}");
        // A register that must come back as it was left, whoever serves it.
        let mark = printed.to_le_bytes()[0];
        port::write_u8(SCR, mark);
        for _ in 0..LOOKS {
            if port::read_u8(LSR) & DATA_READY == 0 {
                break;
            }
            let byte = port::read_u8(COM1);
            if byte != b'\n' && byte != b'\r' {
                line[len.min(LINE_MAX - 1)] = byte;
                len = (len + 1).min(LINE_MAX);
                continue;
            }
            say!("serial.echo n={echoed} text={}", Escaped(&line[..len]));
            echoed += 1;
            len = 0;
        }
        crate::report::expect("scratch", port::read_u8(SCR).into(), mark.into())?;
        printed += 1;
        if interval_ms > 0 {
            irq::sleep_ms(interval_ms);
        }
    }
    say!("serial.end lines={printed} echoed={echoed}");
    Ok(())
}
