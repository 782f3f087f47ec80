//! Interrupt controllers: the 8259s are masked, I/O APICs route GSI n to vector 32 + n of the first
//! CPU, the timer of the local APIC has vector 80. `boot.s` counts; nothing else happens there.

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{phys, port, ring0, time};

/// Registers of the local APIC of the CPU that asks.
pub const LAPIC: u64 = 0xfee0_0000;
const IOAPICS: [u64; 2] = [0xfec0_0000, 0xfec1_0000];
const IOAPIC_PINS: u32 = 24;
const TIMER_GSI: u32 = 48;
static READY: AtomicBool = AtomicBool::new(false);
/// How often the timer had fired when it was armed last, and one more; 0 while it is disarmed.
static ARMED: AtomicU64 = AtomicU64::new(0);

/// Turns the controllers on, once, with every line masked, and lets interrupts in.
pub fn start() {
    if READY.swap(true, Ordering::Relaxed) {
        return;
    }
    port::write_u8(0x21, 0xff);
    port::write_u8(0xa1, 0xff);
    phys::write::<u32>(LAPIC + 0xf0, 0x1ff);
    phys::write::<u32>(LAPIC + 0x350, 0x1_0000); // LINT0: no interrupts of the 8259s
    phys::write::<u32>(LAPIC + 0x3e0, 0xa); // the timer counts every 128 ns
    ring0::set_interrupts(true);
}

fn write_ioapic(gsi: u32, low: u32) {
    let base = IOAPICS[usize::from(gsi >= IOAPIC_PINS)];
    let register = 0x10 + 2 * (gsi % IOAPIC_PINS);
    phys::write::<u32>(base, register + 1);
    phys::write::<u32>(base + 0x10, (phys::read::<u32>(LAPIC + 0x20) >> 24) << 24);
    phys::write::<u32>(base, register);
    phys::write::<u32>(base + 0x10, low);
}

/// Lets one edge-triggered line through.
pub fn enable(gsi: u32) {
    start();
    write_ioapic(gsi, 32 + gsi);
}

/// Masks a line again.
pub fn disable(gsi: u32) {
    write_ioapic(gsi, 0x1_0000);
}

/// One interrupt of the local timer after so many milliseconds (at most 500 000).
pub fn arm_timer(milliseconds: u64) {
    start();
    ARMED.store(fired() + 1, Ordering::Relaxed);
    phys::write::<u32>(LAPIC + 0x320, 32 + TIMER_GSI);
    let ticks = milliseconds.min(500_000) * 1_000_000 / 128;
    phys::write::<u32>(
        LAPIC + 0x380,
        u32::try_from(ticks).unwrap_or(u32::MAX).max(1),
    );
}

/// Stops the local timer.
pub fn disarm_timer() {
    ARMED.store(0, Ordering::Relaxed);
    phys::write::<u32>(LAPIC + 0x380, 0);
}

/// How often the local timer has fired.
fn fired() -> u64 {
    ring0::interrupts_of(TIMER_GSI)
}

/// Really sleeps for so many milliseconds.
pub fn sleep_ms(milliseconds: u64) {
    start();
    let before = fired();
    arm_timer(milliseconds);
    loop {
        let seen = ring0::interrupts();
        if fired() != before {
            // What fired may have been a timer before.
            ARMED.store(0, Ordering::Relaxed);
            return;
        }
        ring0::halt_until_interrupt(seen);
    }
}

/// Sleeps, woken by any interrupt and at least every 20 ms, until `ready` or the deadline.
/// Says whether it became ready.
pub fn sleep_until(deadline: time::Deadline, mut ready: impl FnMut() -> bool) -> bool {
    start();
    loop {
        let seen = ring0::interrupts();
        if ready() {
            return true;
        }
        if deadline.passed() {
            return false;
        }
        // A timer that runs is soon enough, and arming one is dear in ring 3.
        if ARMED.load(Ordering::Relaxed) != fired() + 1 {
            arm_timer(20);
        }
        ring0::halt_until_interrupt(seen);
    }
}
