//! Time by the time-stamp counter. Its frequency comes from CPUID, else from the local timer.

use core::arch::x86_64::{__cpuid, _rdtsc};
use core::sync::atomic::{AtomicU64, Ordering};

use super::{irq, phys};

/// Assumed for time-outs while nothing has needed the real frequency.
const ASSUMED_KHZ: u64 = 2_500_000;
static TSC_KHZ: AtomicU64 = AtomicU64::new(0);

/// Cycles since some moment.
pub fn cycles() -> u64 {
    // SAFETY: every x86_64 CPU has it and CR4.TSD is clear.
    unsafe { _rdtsc() }
}

/// The frequency according to CPUID (leaf 0x15, else the hypervisor's 0x4000_0010), 0 if unknown.
pub fn khz_from_cpuid() -> u64 {
    if __cpuid(0).eax >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000;
        }
    }
    let hypervisor = __cpuid(1).ecx & (1 << 31) != 0;
    if hypervisor && __cpuid(0x4000_0000).eax >= 0x4000_0010 {
        return u64::from(__cpuid(0x4000_0010).eax);
    }
    0
}

/// The frequency in kHz; measures it for 50 ms when CPUID does not tell.
pub fn khz() -> u64 {
    let known = TSC_KHZ.load(Ordering::Relaxed);
    if known != 0 {
        return known;
    }
    let khz = match khz_from_cpuid() {
        0 => khz_from_timer().unwrap_or(ASSUMED_KHZ),
        khz => khz,
    };
    TSC_KHZ.store(khz, Ordering::Relaxed);
    khz
}

/// Counts cycles while the timer of the local APIC counts 50 ms down. It runs at 1 GHz under KVM,
/// divided by 128 here. (The 8254 would do as well, but not every VMM has its gate at port 0x61.)
fn khz_from_timer() -> Option<u64> {
    const TICK_NS: u64 = 128;
    const MEASURED_MS: u64 = 50;
    irq::arm_timer(100 * MEASURED_MS);
    let (first, start) = timer_and_cycles();
    let last = first.checked_sub(MEASURED_MS * 1_000_000 / TICK_NS)?;
    let (ticks, cycles) = loop {
        let (remaining, now) = timer_and_cycles();
        if remaining <= last {
            break (first - remaining, now - start);
        }
        if now - start > ASSUMED_KHZ * 1000 {
            return None;
        }
    };
    irq::disarm_timer();
    Some(cycles * 1_000_000 / (ticks * TICK_NS))
}

/// What the timer has left, and the cycles at that moment: of several looks the one that was interrupted least.
fn timer_and_cycles() -> (u64, u64) {
    const LOOKS: usize = 8;
    let look = |_| {
        let before = cycles();
        let remaining = u64::from(phys::read::<u32>(irq::LAPIC + 0x390));
        (cycles() - before, remaining, before)
    };
    let looks = core::array::from_fn::<_, LOOKS, _>(look);
    let best = looks.iter().min_by_key(|(took, ..)| *took);
    best.map_or((0, 0), |(took, remaining, before)| {
        (*remaining, before + took / 2)
    })
}

/// A moment after which waiting has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline(u64);

impl Deadline {
    /// So many milliseconds from now.
    pub fn after_ms(milliseconds: u64) -> Deadline {
        let khz = match TSC_KHZ.load(Ordering::Relaxed) {
            0 => ASSUMED_KHZ,
            khz => khz,
        };
        Deadline(cycles().saturating_add(milliseconds.saturating_mul(khz)))
    }

    /// Whether it has passed.
    pub fn passed(&self) -> bool {
        cycles() > self.0
    }
}
