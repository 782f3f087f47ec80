//! What a vCPU answers to CPUID.
//!
//! Starts from what KVM supports on the host and describes the machine: one package, one thread a
//! core, vCPU `n` with APIC id `n`, no performance counters. Pure: the run loop gives the result to
//! KVM_SET_CPUID2. Hosts whose KVM is incomplete take more away
//! ([`crate::quirks::filter_cpuid`]).

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 0xb and 0x1f levels.
const LEVEL_THREAD: u32 = 1;
const LEVEL_CORE: u32 = 2;

/// The answers of vCPU `vcpu_index` in a machine of `vcpus`.
///
/// `supported` is KVM_GET_SUPPORTED_CPUID's answer. The TSC-deadline timer, which KVM does not list there
/// because it needs the in-kernel APIC, is added: machines always have that APIC.
///
/// # Panics
/// Never for the at most 256 entries that KVM gives: a [`CpuId`] of a few more entries always fits.
#[must_use]
pub fn base_cpuid(supported: &CpuId, vcpu_index: u8, vcpus: u8) -> CpuId {
    let apic_id = u32::from(vcpu_index);
    let cores = u32::from(vcpus.max(1));
    // Bits of an APIC id that number the cores.
    let core_bits = cores.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::with_capacity(supported.as_slice().len() + 6);
    let mut topology_leaves = [false; 2];
    for entry in supported.as_slice() {
        match entry.function {
            0xb => topology_leaves[0] = true,
            0x1f => topology_leaves[1] = true,
            _ => {
                let mut entry = *entry;
                describe(&mut entry, apic_id, cores, core_bits);
                entries.push(entry);
            }
        }
    }
    for (leaf, present) in [0xb, 0x1f].into_iter().zip(topology_leaves) {
        if present {
            entries.extend(topology(leaf, apic_id, cores, core_bits));
        }
    }
    // The order of entries has no meaning; sorted, lists can be compared.
    entries.sort_by_key(|entry| (entry.function, entry.index));
    entries.truncate(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
    CpuId::from_entries(&entries).unwrap_or_else(|_| supported.clone())
}

fn describe(entry: &mut kvm_cpuid_entry2, apic_id: u32, cores: u32, core_bits: u32) {
    match entry.function {
        1 => {
            entry.ecx |= HYPERVISOR | TSC_DEADLINE;
            let addressable = 1 << core_bits;
            entry.ebx = entry.ebx & 0xffff | addressable << 16 | apic_id << 24;
            if cores > 1 {
                entry.edx |= HYPER_THREADING;
            } else {
                entry.edx &= !HYPER_THREADING;
            }
        }
        // Deterministic cache parameters: the last level is everybody's, the others a core's own.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let last = (1 << core_bits) - 1;
            let sharing = if level >= 3 { last } else { 0 };
            let package = if entry.function == 4 { last << 26 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | package;
        }
        // Performance counters.
        0xa | 0x8000_0022 => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
        0x8000_0008 if entry.ecx & 0xf0ff != 0 => {
            entry.ecx = entry.ecx & !0xf0ff | (cores - 1) | core_bits << 12;
        }
        0x8000_001e => {
            entry.eax = apic_id;
            entry.ebx = apic_id & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// The levels of leaf 0xb or 0x1f: one thread a core, all cores in one package, the end.
fn topology(leaf: u32, apic_id: u32, cores: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |index: u32, shift: u32, count: u32, kind: u32| kvm_cpuid_entry2 {
        function: leaf,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: index | kind << 8,
        edx: apic_id,
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, core_bits, cores, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> CpuId {
        let leaf = |function, index, eax, ebx, ecx, edx| kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        };
        CpuId::from_entries(&[
            leaf(0, 0, 0x1f, 0, 0, 0),
            leaf(1, 0, 0x806f8, 0x1704_0800, 0x7ffa_3203, 0x1f8b_fbff),
            leaf(4, 0, 0xfc00_4121, 0x02c0_003f, 0x3f, 0),
            leaf(4, 3, 0xfc1f_c163, 0x0380_003f, 0x1bfff, 4),
            leaf(0xa, 0, 0x0830_0802, 0, 0, 0x603),
            leaf(0xb, 0, 1, 2, 0x100, 23),
            leaf(0x1f, 0, 1, 2, 0x100, 23),
        ])
        .expect("seven entries")
    }

    fn get(cpuid: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found = cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == function && e.index == index);
        *found.expect("the leaf is there")
    }

    #[test]
    fn apic_id_is_the_vcpu_index_in_every_leaf_that_tells_it() {
        for index in [0, 1, 31] {
            let cpuid = base_cpuid(&host(), index, 32);
            assert_eq!(get(&cpuid, 1, 0).ebx >> 24, u32::from(index));
            for leaf in [0xb, 0x1f] {
                for level in 0..3 {
                    assert_eq!(get(&cpuid, leaf, level).edx, u32::from(index));
                }
            }
        }
    }

    #[test]
    fn topology_describes_one_package_of_single_threaded_cores() {
        let cpuid = base_cpuid(&host(), 2, 6);
        assert_eq!(
            get(&cpuid, 1, 0).ebx >> 16 & 0xff,
            8,
            "addressable ids, a power of two"
        );
        assert_eq!((get(&cpuid, 0xb, 0).eax, get(&cpuid, 0xb, 0).ebx), (0, 1));
        assert_eq!((get(&cpuid, 0xb, 1).eax, get(&cpuid, 0xb, 1).ebx), (3, 6));
        assert_eq!(get(&cpuid, 0xb, 2).ebx, 0);
        assert_eq!(
            get(&cpuid, 4, 0).eax >> 14 & 0xfff,
            0,
            "level 1 is a core's own"
        );
        assert_eq!(
            get(&cpuid, 4, 3).eax >> 14 & 0xfff,
            7,
            "level 3 is shared by all"
        );
        assert_eq!(get(&cpuid, 4, 3).eax >> 26, 7);
    }

    #[test]
    fn a_single_vcpu_has_no_hyper_threading_flag() {
        assert_eq!(
            get(&base_cpuid(&host(), 0, 1), 1, 0).edx & HYPER_THREADING,
            0
        );
        assert_ne!(
            get(&base_cpuid(&host(), 0, 2), 1, 0).edx & HYPER_THREADING,
            0
        );
    }

    #[test]
    fn hypervisor_bit_is_set_and_performance_counters_are_absent() {
        let cpuid = base_cpuid(&host(), 0, 1);
        assert_ne!(get(&cpuid, 1, 0).ecx & HYPERVISOR, 0);
        assert_eq!(get(&cpuid, 0xa, 0).eax, 0);
    }
}
