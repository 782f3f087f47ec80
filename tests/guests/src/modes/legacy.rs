//! `legacy`: the devices that Linux probes before it trusts a PC: CMOS clock, 8250, i8042, 8254, and
//! the debug ports.

use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::time::Deadline;
use crate::sys::{irq, port, ring0};

const COM1: u16 = 0x3f8;
const COM1_GSI: u32 = 4;
const IER: u16 = COM1 + 1;
const IIR: u16 = COM1 + 2;
const LCR: u16 = COM1 + 3;
const MCR: u16 = COM1 + 4;
const LSR: u16 = COM1 + 5;
const MSR: u16 = COM1 + 6;
const SCR: u16 = COM1 + 7;
const RTC: u16 = 0x70;
const I8042_STATUS: u16 = 0x64;
const DEBUG_CONSOLE: u16 = 0xe9;
const PVPANIC: u16 = 0x505;
/// Where the 8254's channel 0 may be at the I/O APIC: pin 0 as KVM routes it, or pin 2 as on a PC.
const TIMER_GSIS: [u32; 2] = [0, 2];

/// Checks all of them.
pub fn run(_: &Machine) -> Result<(), Failure> {
    clock()?;
    registers()?;
    transmit_interrupts()?;
    timer()?;
    let i8042 = port::read_u8(I8042_STATUS);
    say!(
        "legacy.i8042 status={i8042:#04x} present={}",
        u8::from(i8042 != 0xff)
    );
    debug_console();
    let events = port::read_u8(PVPANIC);
    say!(
        "legacy.pvpanic events={events:#04x} present={}",
        u8::from(events != 0xff)
    );
    Ok(())
}

fn cmos(register: u8) -> u8 {
    port::write_u8(RTC, register);
    port::read_u8(RTC + 1)
}

/// Reads the clock when it is not being updated; year, month, day, hours, minutes, seconds.
fn time_of_day() -> [u32; 6] {
    while cmos(0x0a) & 0x80 != 0 {}
    let binary = cmos(0x0b) & 4 != 0;
    [9, 8, 7, 4, 2, 0].map(|register| {
        let value = u32::from(cmos(register));
        if binary {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        }
    })
}

fn clock() -> Result<(), Failure> {
    let [year, month, day, hours, minutes, seconds] = time_of_day();
    say!(
        "legacy.rtc time={:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{seconds:02}Z",
        2000 + year
    );
    let plausible =
        (1..=12).contains(&month) && (1..=31).contains(&day) && hours < 24 && minutes < 60;
    expect("rtc_plausible", u64::from(plausible), 1)?;
    let ticked = irq::sleep_until(Deadline::after_ms(3000), || time_of_day()[5] != seconds);
    expect("rtc_ticks", u64::from(ticked), 1)
}

/// What Linux's autoconfiguration does, without disturbing the line for long.
fn registers() -> Result<(), Failure> {
    for value in [0x55, 0xaa, 0x00, 0xff] {
        port::write_u8(SCR, value);
        expect("scratch", u64::from(port::read_u8(SCR)), u64::from(value))?;
    }
    let lcr = port::read_u8(LCR);
    port::write_u8(LCR, lcr | 0x80);
    let divisor = u16::from_le_bytes([port::read_u8(COM1), port::read_u8(IER)]);
    port::write_u8(COM1, 0x34);
    port::write_u8(IER, 0x12);
    let read_back = u16::from_le_bytes([port::read_u8(COM1), port::read_u8(IER)]);
    let [low, high] = divisor.to_le_bytes();
    port::write_u8(COM1, low);
    port::write_u8(IER, high);
    port::write_u8(LCR, 0x03);
    expect("divisor", u64::from(read_back), 0x1234)?;
    port::write_u8(IER, 0x0f);
    let enabled = port::read_u8(IER);
    port::write_u8(IER, 0);
    expect("interrupt_enable", u64::from(enabled), 0x0f)?;
    let fifo = fifo_bits();
    loopback()?;
    let (lsr, msr) = (port::read_u8(LSR), port::read_u8(MSR));
    expect("transmitter_empty", u64::from(lsr & 0x60), 0x60)?;
    say!(
        "legacy.uart scratch=1 divisor={divisor} fifo_bits={fifo:#04x} lsr={lsr:#04x} msr={msr:#04x}"
    );
    Ok(())
}

/// Bits 7:6 of IIR tell whether there is a FIFO (0xc0 for a 16550A).
fn fifo_bits() -> u8 {
    port::write_u8(IIR, 0x01);
    let bits = port::read_u8(IIR) & 0xc0;
    port::write_u8(IIR, 0x00);
    bits
}

fn loopback() -> Result<(), Failure> {
    let mcr = port::read_u8(MCR);
    port::write_u8(MCR, 0x1a);
    let status = port::read_u8(MSR) & 0xf0;
    let deadline = Deadline::after_ms(1000);
    port::write_u8(COM1, 0x5a);
    let mut ready = false;
    while !ready && !deadline.passed() {
        ready = port::read_u8(LSR) & 1 != 0;
    }
    let byte = port::read_u8(COM1);
    port::write_u8(MCR, mcr);
    expect("loopback_ready", u64::from(ready), 1)?;
    expect("loopback_byte", u64::from(byte), 0x5a)?;
    // RTS and OUT2 come back as CTS and DCD; Linux tells an 8250 from nothing by this.
    expect("loopback_modem_status", u64::from(status), 0x90)
}

/// Sends one record with a byte for each transmit interrupt.
fn transmit_interrupts() -> Result<(), Failure> {
    const TEXT: &[u8] = b"BH legacy.tx text=sent-byte-by-byte-on-interrupts\n";
    irq::enable(COM1_GSI);
    let start = ring0::interrupts_of(COM1_GSI);
    port::write_u8(MCR, 0x0b);
    port::write_u8(IER, 0x02);
    let mut causes = 0_u64;
    let mut result = Ok(());
    for (byte, count) in TEXT.iter().zip(1..) {
        let arrived = || ring0::interrupts_of(COM1_GSI) - start >= count;
        if !irq::sleep_until(Deadline::after_ms(2000), arrived) {
            result = Err(Failure::Timeout("transmit_interrupt"));
            break;
        }
        causes += u64::from(port::read_u8(IIR) & 0x0f == 0x02);
        port::write_u8(COM1, *byte);
    }
    port::write_u8(IER, 0);
    irq::disable(COM1_GSI);
    let seen = ring0::interrupts_of(COM1_GSI) - start;
    if result.is_err() {
        ring0::write_serial(b"\n");
    }
    say!(
        "legacy.tx_interrupts bytes={} interrupts={seen} causes={causes}",
        TEXT.len()
    );
    result?;
    expect("transmit_causes", causes, TEXT.len() as u64)
}

/// A hundred interrupts a second for a third of a second.
fn timer() -> Result<(), Failure> {
    const DIVISOR: u16 = 11932;
    let count = || -> u64 { TIMER_GSIS.map(ring0::interrupts_of).iter().sum() };
    TIMER_GSIS.into_iter().for_each(irq::enable);
    let start = count();
    let [low, high] = DIVISOR.to_le_bytes();
    port::write_u8(0x43, 0x34);
    port::write_u8(0x40, low);
    port::write_u8(0x40, high);
    irq::sleep_ms(330);
    // One shot, far away: quiet again.
    port::write_u8(0x43, 0x30);
    port::write_u8(0x40, 0xff);
    port::write_u8(0x40, 0xff);
    TIMER_GSIS.into_iter().for_each(irq::disable);
    let ticks = count() - start;
    say!("legacy.pit ticks={ticks} expected=33");
    if !(20..=45).contains(&ticks) {
        fail!(
            "legacy",
            "kind=wrong what=pit_ticks got={ticks} expected=33"
        );
    }
    Ok(())
}

/// Where the port reads as itself there is a debug console; what is written to it is one record.
fn debug_console() {
    let present = port::read_u8(DEBUG_CONSOLE) == 0xe9;
    say!("legacy.debug_console present={}", u8::from(present));
    if present {
        for byte in b"BH legacy.e9 text=written-to-port-0xe9\n" {
            port::write_u8(DEBUG_CONSOLE, *byte);
        }
    }
}
