//! Two instructions that the host's processor carries out itself on behalf of the guest.
#![allow(unsafe_code, reason = "cmpxchg16b on guest memory, and rdrand")]

use std::arch::x86_64::_rdrand64_step;
use std::arch::{asm, is_x86_feature_detected};

use vm_memory::bitmap::Bitmap as _;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// A random number of the processor; `None` on processors without, or whose source has run dry.
pub(super) fn random() -> Option<u64> {
    const TRIES: usize = 32;
    if !is_x86_feature_detected!("rdrand") {
        return None;
    }
    (0..TRIES).find_map(|_| {
        let mut value = 0;
        // SAFETY: the processor has the instruction.
        let good = unsafe { _rdrand64_step(&mut value) } == 1;
        good.then_some(value)
    })
}

/// Replaces the 16 bytes at `gpa` by `new` if they are `old`; gives what they were. `None` if they are
/// not aligned, not guest memory, or the processor lacks the instruction.
pub(super) fn exchange_16<M: GuestMemoryBackend>(
    mem: &M,
    gpa: u64,
    old: u128,
    new: u128,
) -> Option<u128> {
    let slice = mem.get_slice(GuestAddress(gpa), 16).ok()?;
    let guard = slice.ptr_guard_mut();
    let target = guard.as_ptr().cast::<u128>();
    if !target.is_aligned() || !is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    // SAFETY: the processor has the instruction; the slice is 16 bytes of guest memory, mapped while
    // `mem` lives and aligned as checked, and guest memory is only ever accessed by atomic or
    // volatile operations.
    let seen = unsafe { exchange(target, old, new) };
    slice.bitmap().mark_dirty(0, 16);
    Some(seen)
}

/// Written as assembly because the compiler's intrinsic ends in a library call that is not linked.
///
/// # Safety
/// The processor has the instruction; `target` is valid for atomic access and aligned to 16 bytes.
unsafe fn exchange(target: *mut u128, old: u128, new: u128) -> u128 {
    let [old_low, old_high] = halves(old);
    let [new_low, new_high] = halves(new);
    let (seen_low, seen_high): (u64, u64);
    // SAFETY: as the caller promises. RBX, which the compiler keeps for itself, is put back.
    unsafe {
        asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") target,
            inout("rsi") new_low => _,
            in("rcx") new_high,
            inout("rax") old_low => seen_low,
            inout("rdx") old_high => seen_high,
            options(nostack),
        );
    }
    u128::from(seen_high) << 64 | u128::from(seen_low)
}

/// The lower and the upper word.
pub(super) fn halves(value: u128) -> [u64; 2] {
    let bytes = value.to_le_bytes();
    let (words, _) = bytes.as_chunks::<8>();
    let mut halves = [0; 2];
    for (half, word) in halves.iter_mut().zip(words) {
        *half = u64::from_le_bytes(*word);
    }
    halves
}
