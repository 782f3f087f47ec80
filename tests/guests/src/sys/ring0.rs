//! What runs in ring 0 (`boot.s`) and the calls to it.
//!
//! Every loop that is slow in ring 3 (a port or MMIO exit costs eight times as much there on
//! `kvm_pvm` hosts) or that must be privileged (`hlt`) is a service. Called by everything in `sys`
//! and by the benchmark modes.

use core::arch::{asm, global_asm};
use core::sync::atomic::{AtomicU64, Ordering};

global_asm!(include_str!("boot.s"), options(att_syntax));

unsafe extern "sysv64" {
    safe fn guest_service(argument0: u64, argument1: u64, service: u32) -> u32;
    static irq_counts: [AtomicU64; 64];
    static irq_total: AtomicU64;
}

const WRITE_SERIAL: u32 = 0;
const WRITE_MEMORY: u32 = 1;
const READ_PORT: u32 = 2;
const HALT_WHILE: u32 = 3;
const SET_INTERRUPTS: u32 = 4;
const IDLE: u32 = 5;
const PARK: u32 = 6;
const TRIPLE_FAULT: u32 = 7;
const TAKE_INTERRUPT: u32 = 8;

/// Writes bytes to COM1.
pub fn write_serial(bytes: &[u8]) {
    if !bytes.is_empty() {
        guest_service(bytes.as_ptr() as u64, bytes.len() as u64, WRITE_SERIAL);
    }
}

/// Writes zero to the 32-bit register at `address` ten times `tens` times.
pub fn write_memory(address: u64, tens: u64) {
    guest_service(address, tens.max(1), WRITE_MEMORY);
}

/// Reads the byte-wide port ten times `tens` times.
pub fn read_port(port: u16, tens: u64) {
    guest_service(u64::from(port), tens.max(1), READ_PORT);
}

/// Lets interrupts in (or not) while in ring 3.
pub fn set_interrupts(enabled: bool) {
    guest_service(u64::from(enabled), 0, SET_INTERRUPTS);
}

/// Number of interrupts seen since boot.
pub fn interrupts() -> u64 {
    // SAFETY: boot.s defines the counter; only the interrupt stubs write it, with single stores.
    unsafe { irq_total.load(Ordering::Acquire) }
}

/// Number of interrupts seen on one GSI since boot; 48 is the timer of the local APIC.
pub fn interrupts_of(gsi: u32) -> u64 {
    // SAFETY: boot.s defines the counters; only the interrupt stubs write them.
    let counts = unsafe { &irq_counts };
    counts
        .get(gsi as usize)
        .map_or(0, |count| count.load(Ordering::Acquire))
}

/// Sleeps until the number of interrupts is another than `seen`; returns at once if it is already.
pub fn halt_until_interrupt(seen: u64) {
    guest_service(&raw const irq_total as u64, seen, HALT_WHILE);
}

/// Reads the interrupt status at `address`, acknowledges it in the register behind, and returns it.
pub fn take_interrupt(address: u64) -> u32 {
    guest_service(address, 0, TAKE_INTERRUPT)
}

/// Sleeps for ever with interrupts on.
pub fn idle() -> ! {
    loop {
        guest_service(0, 0, IDLE);
    }
}

/// Stops this CPU for ever, deaf to interrupts.
pub fn park() -> ! {
    loop {
        guest_service(0, 0, PARK);
    }
}

/// Faults with no interrupt table, which shuts the CPU down.
pub fn triple_fault() -> ! {
    loop {
        guest_service(0, 0, TRIPLE_FAULT);
    }
}

/// Raises #GP in ring 3, which ends in the exception report.
pub fn fault() -> ! {
    loop {
        // SAFETY: ring 3 may not halt; the exception is reported and never returns here.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}
