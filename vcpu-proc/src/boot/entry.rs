//! The state of the boot vCPU at its first instruction, one variant for each boot protocol.
//!
//! A pure description: [`Entry::apply`] changes register structures that the caller read from KVM
//! and will set again. The descriptor and page tables that the registers point to are written by
//! the loader before.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use super::error::BootError;
use super::guest::Guest;
use super::layout;

/// How the boot vCPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The 64-bit Linux boot protocol: long mode, 4 GiB identity-mapped, RSI the zero page.
    Linux64 {
        /// First instruction.
        rip: u64,
        /// Guest-physical address of `boot_params`.
        rsi: u64,
    },
    /// The 32-bit Linux boot protocol: protected mode without paging, ESI the zero page.
    Linux32 {
        /// First instruction.
        rip: u32,
        /// Guest-physical address of `boot_params`.
        rsi: u32,
    },
    /// PVH: 32-bit protected mode without paging, EBX the start info.
    Pvh32 {
        /// First instruction.
        rip: u32,
        /// Guest-physical address of `hvm_start_info`.
        rbx: u32,
    },
    /// Multiboot 1 or 2: 32-bit protected mode without paging, EAX the magic, EBX the information.
    Multiboot {
        /// First instruction.
        rip: u32,
        /// The magic number that tells the kernel which of the two it is.
        rax: u32,
        /// Guest-physical address of the information structure.
        rbx: u32,
    },
}

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
const TASK_LIMIT: u32 = 0x67;
const GDT_ENTRIES: usize = 6;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// Bit 1 of RFLAGS is always set; interrupts are off.
const RFLAGS_INITIAL: u64 = 2;

impl Entry {
    /// Address of the first instruction.
    pub fn rip(&self) -> u64 {
        match *self {
            Self::Linux64 { rip, .. } => rip,
            Self::Linux32 { rip, .. } | Self::Pvh32 { rip, .. } | Self::Multiboot { rip, .. } => {
                rip.into()
            }
        }
    }

    /// Changes the registers of a vCPU that KVM has just reset into the state that the boot
    /// protocol demands. `regs` is overwritten; of `sregs` only what the protocols name.
    pub fn apply(&self, sregs: &mut kvm_sregs, regs: &mut kvm_regs) {
        let long = matches!(self, Self::Linux64 { .. });
        let code = code_segment(long);
        let data = data_segment();
        sregs.cs = code;
        sregs.ds = data;
        sregs.es = data;
        sregs.fs = data;
        sregs.gs = data;
        sregs.ss = data;
        sregs.tr = task_segment();
        sregs.gdt = kvm_dtable {
            base: layout::GDT,
            limit: GDT_LIMIT,
            ..Default::default()
        };
        sregs.idt = kvm_dtable::default();
        sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION_TYPE;
        sregs.cr3 = 0;
        sregs.cr4 = 0;
        sregs.efer = 0;
        if long {
            sregs.cr0 |= CR0_PAGING;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer = EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
        }
        *regs = kvm_regs {
            rflags: RFLAGS_INITIAL,
            rip: self.rip(),
            ..Default::default()
        };
        match *self {
            Self::Linux64 { rsi, .. } => {
                regs.rsi = rsi;
                regs.rsp = layout::STACK_TOP;
            }
            Self::Linux32 { rsi, .. } => regs.rsi = rsi.into(),
            Self::Pvh32 { rbx, .. } => regs.rbx = rbx.into(),
            Self::Multiboot { rax, rbx, .. } => {
                regs.rax = rax.into();
                regs.rbx = rbx.into();
            }
        }
    }

    /// Writes the descriptor table and, for long mode, the page tables.
    pub(super) fn write_tables(&self, guest: &Guest<'_>) -> Result<(), BootError> {
        let long = matches!(self, Self::Linux64 { .. });
        let gdt: [u64; GDT_ENTRIES] = [
            0,
            0,
            descriptor(&code_segment(long)),
            descriptor(&data_segment()),
            descriptor(&task_segment()),
            0,
        ];
        guest.write(layout::GDT, &bytes_of(&gdt))?;
        if long {
            write_identity_map(guest)?;
        }
        Ok(())
    }
}

#[expect(clippy::cast_possible_truncation, reason = "6 entries of 8 bytes")]
const GDT_LIMIT: u16 = (GDT_ENTRIES * 8 - 1) as u16;

/// Maps the first 4 GiB to themselves with pages of 2 MiB.
fn write_identity_map(guest: &Guest<'_>) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const PAGE: u64 = 0x1000;
    let directory_pointers = layout::PAGE_TABLES + PAGE;
    let directories = directory_pointers + PAGE;
    let mut tables = vec![0u64; 6 * 512];
    for (index, slot) in tables.iter_mut().enumerate() {
        let index = index as u64;
        *slot = match (index / 512, index % 512) {
            (0, 0) => directory_pointers | PRESENT_WRITABLE,
            (1, entry @ 0..4) => (directories + entry * PAGE) | PRESENT_WRITABLE,
            (2.., _) => ((index - 1024) << 21) | LARGE | PRESENT_WRITABLE,
            _ => 0,
        };
    }
    guest.write(layout::PAGE_TABLES, &bytes_of(&tables))
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn code_segment(long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: CODE_SELECTOR,
        type_: 0b1011, // execute, read, accessed
        present: 1,
        s: 1,
        l: u8::from(long),
        db: u8::from(!long),
        g: 1,
        ..Default::default()
    }
}

fn data_segment() -> kvm_segment {
    kvm_segment {
        selector: DATA_SELECTOR,
        type_: 0b0011, // read, write, accessed
        l: 0,
        db: 1,
        ..code_segment(false)
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: TASK_LIMIT,
        selector: TASK_SELECTOR,
        type_: 0b1011, // 32-bit or 64-bit TSS, busy
        present: 1,
        ..Default::default()
    }
}

/// The descriptor that loads `segment`.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_every_flat_gdt() {
        assert_eq!(descriptor(&code_segment(true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code_segment(false)), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data_segment()), 0x00cf_9300_0000_ffff);
    }

    #[test]
    fn a_multiboot_kernel_starts_in_flat_protected_mode_without_paging() {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        Entry::Multiboot {
            rip: 0x10_0000,
            rax: 0x2bad_b002,
            rbx: 0x1_0000,
        }
        .apply(&mut sregs, &mut regs);
        assert_eq!(sregs.cr0 & (CR0_PAGING | CR0_PROTECTED), CR0_PROTECTED);
        assert_eq!(
            (sregs.cs.base, sregs.cs.limit, sregs.cs.db),
            (0, u32::MAX, 1)
        );
        assert_eq!(
            (regs.rip, regs.rax, regs.rbx),
            (0x10_0000, 0x2bad_b002, 0x1_0000)
        );
        assert_eq!(regs.rflags & 1 << 9, 0, "interrupts are off");
    }

    #[test]
    fn a_linux_kernel_starts_in_long_mode_with_the_zero_page_in_rsi() {
        let (mut sregs, mut regs) = (kvm_sregs::default(), kvm_regs::default());
        Entry::Linux64 {
            rip: 0x100_0000,
            rsi: layout::ZERO_PAGE,
        }
        .apply(&mut sregs, &mut regs);
        assert_eq!(sregs.efer, EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE);
        assert_eq!((sregs.cs.l, sregs.cs.db, sregs.cs.selector), (1, 0, 0x10));
        assert_eq!((regs.rip, regs.rsi), (0x100_0000, layout::ZERO_PAGE));
    }
}
