//! `smp`: starts every other CPU that the MADT lists (INIT, start-up IPI, a real-mode trampoline).
//! Each gets to ring 3, checks in, and adds to a counter that all share. `busy` then keeps them all running.

use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::machine::Machine;
use crate::report::{Failure, expect, fail, say};
use crate::sys::irq::{self, LAPIC};
use crate::sys::time::{self, Deadline};
use crate::sys::{phys, ring0};

/// Where the real-mode code is copied to.
const TRAMPOLINE: u64 = 0x8000;
const APS_MAX: usize = 32;
const FIRST_TSS: u64 = 0x50;
const TSS_LEN: u64 = 104;
const STACK: usize = 16384;
const ICR_LOW: u64 = 0x300;
const ICR_HIGH: u64 = 0x310;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;
/// How often each CPU adds 1.
const ADDITIONS: u64 = 100_000;

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static gdt: u8;
    static ap_started: AtomicU32;
    static ap_ring0_stacks: [AtomicU64; APS_MAX];
    static ap_user_stacks: [AtomicU64; APS_MAX];
}

static CHECKED_IN: AtomicU32 = AtomicU32::new(0);
static TOTAL: AtomicU64 = AtomicU64::new(0);
/// Whether CPUs that have checked in go on.
static BUSY: AtomicBool = AtomicBool::new(false);
static APIC_IDS: [AtomicU32; APS_MAX] = [const { AtomicU32::new(u32::MAX) }; APS_MAX];

/// Ring 3 of the other CPUs, each on its own stack.
#[unsafe(no_mangle)]
extern "sysv64" fn guest_ap_main(index: u64) -> ! {
    if let Some(id) = APIC_IDS.get(index as usize) {
        id.store(phys::read::<u32>(LAPIC + 0x20) >> 24, Ordering::Relaxed);
    }
    for _ in 0..ADDITIONS {
        TOTAL.fetch_add(1, Ordering::Relaxed);
    }
    CHECKED_IN.fetch_add(1, Ordering::AcqRel);
    while BUSY.load(Ordering::Relaxed) {
        work();
    }
    ring0::park()
}

/// Starts them all, adds while they add, and waits for every one.
pub fn run(machine: &Machine) -> Result<(), Failure> {
    let ids = machine
        .acpi
        .as_ref()
        .map_or(&[][..], |acpi| acpi.apic_ids());
    let own = phys::read::<u32>(LAPIC + 0x20) >> 24;
    let others = || {
        ids.iter()
            .map(|id| u32::from(*id))
            .filter(|id| *id != own)
            .take(APS_MAX)
    };
    irq::start();
    prepare();
    others().for_each(|id| send(id, INIT));
    irq::sleep_ms(10);
    let mut started = 0;
    for id in others() {
        if start_one(id) {
            started += 1;
        } else {
            fail!("smp", "kind=timeout what=start apic_id={id}");
        }
    }
    for _ in 0..ADDITIONS {
        TOTAL.fetch_add(1, Ordering::Relaxed);
    }
    let all_in = || CHECKED_IN.load(Ordering::Acquire) == started;
    let done = irq::sleep_until(Deadline::after_ms(10_000), all_in);
    for (index, id) in APIC_IDS.iter().take(started as usize).enumerate() {
        say!(
            "smp.cpu index={} apic_id={}",
            index + 1,
            id.load(Ordering::Relaxed)
        );
    }
    let total = TOTAL.load(Ordering::Relaxed);
    say!(
        "smp listed={} started={} total={total}",
        ids.len(),
        started + 1
    );
    if !done {
        return Err(Failure::Timeout("check_in"));
    }
    expect("total", total, u64::from(started + 1) * ADDITIONS)?;
    expect("started", u64::from(started) + 1, ids.len().max(1) as u64)
}

/// Starts them all, and keeps each running in ring 3 for `seconds=`, or for ever.
pub fn busy(machine: &Machine) -> Result<(), Failure> {
    let seconds = machine.number("seconds", 0)?;
    let khz = time::khz();
    BUSY.store(true, Ordering::Relaxed);
    let started = run(machine);
    if started.is_ok() {
        say!("busy seconds={seconds}");
        let start = time::cycles();
        let cycles = seconds.saturating_mul(1000 * khz);
        while seconds == 0 || time::cycles() - start < cycles {
            work();
        }
    }
    BUSY.store(false, Ordering::Relaxed);
    started
}

/// Something to do: a hint that this is a waiting loop would have a hypervisor take the CPU away.
fn work() {
    for n in 0..1000 {
        core::hint::black_box(n);
    }
}

/// Copies the trampoline, and gives every CPU a task state and two stacks.
fn prepare() {
    CHECKED_IN.store(0, Ordering::Relaxed);
    TOTAL.store(0, Ordering::Relaxed);
    // SAFETY: boot.s defines it; no other CPU runs yet.
    unsafe { ap_started.store(0, Ordering::Relaxed) };
    let start = &raw const ap_trampoline as u64;
    let len = &raw const ap_trampoline_end as u64 - start;
    for offset in 0..len {
        phys::write(TRAMPOLINE + offset, phys::read::<u8>(start + offset));
    }
    for index in 0..APS_MAX {
        let ring0_stack = phys::allocate(4096);
        let user_stack = phys::allocate(STACK);
        let tss = phys::allocate(4096);
        let ring0_top = ring0_stack.address + ring0_stack.len as u64;
        tss.write(4, ring0_top);
        tss.write(102, TSS_LEN as u16); // no I/O bitmap: no port I/O
        let base = tss.address;
        let low = (TSS_LEN - 1) | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
        let descriptor = &raw const gdt as u64 + FIRST_TSS + 16 * index as u64;
        phys::write(descriptor, low);
        phys::write(descriptor + 8, base >> 32);
        // SAFETY: boot.s defines the arrays; no other CPU runs yet.
        unsafe { ap_ring0_stacks[index].store(ring0_top, Ordering::Relaxed) };
        let user_top = user_stack.address + STACK as u64 - 8;
        // SAFETY: as above.
        unsafe { ap_user_stacks[index].store(user_top, Ordering::Relaxed) };
    }
}

fn send(id: u32, command: u32) {
    phys::write::<u32>(LAPIC + ICR_HIGH, id << 24);
    phys::write::<u32>(LAPIC + ICR_LOW, command);
}

/// Sends the start-up IPI, a second time if the first has no effect.
fn start_one(id: u32) -> bool {
    // SAFETY: boot.s defines it; started CPUs only add to it.
    let started = || unsafe { ap_started.load(Ordering::Acquire) };
    let before = started();
    (0..2).any(|_| {
        send(id, STARTUP | (TRAMPOLINE >> 12) as u32);
        irq::sleep_until(Deadline::after_ms(500), || started() != before)
    })
}
