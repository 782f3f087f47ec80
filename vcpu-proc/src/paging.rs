//! The guest's page tables, walked by the monitor.
//!
//! One walk serves two callers: the quirks layer, which reads and writes guest memory on behalf of
//! an instruction and needs the verdict that the processor would have given, and the crash report,
//! which prints every step. Tables are guest memory: each entry is read once, and an address that
//! leads outside of guest memory ends the walk with an error. Nothing here writes.

use kvm_bindings::kvm_sregs;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const CR0_WP: u64 = 1 << 16;
const CR0_PG: u64 = 1 << 31;
const CR4_PSE: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const EFER_LMA: u64 = 1 << 10;
const EFER_NXE: u64 = 1 << 11;
/// RFLAGS.AC, which opens user pages to the supervisor while SMAP is on.
const RFLAGS_AC: u64 = 1 << 18;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
/// Bits 51:12 of an entry, the largest physical address that any processor has.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Page-fault error code: the page was present.
pub const PF_PRESENT: u32 = 1;
/// Page-fault error code: the access was a write.
pub const PF_WRITE: u32 = 1 << 1;
/// Page-fault error code: the access came from ring 3.
pub const PF_USER: u32 = 1 << 2;
/// Page-fault error code: the access was an instruction fetch.
pub const PF_FETCH: u32 = 1 << 4;

/// How a linear address becomes a guest-physical one, by the control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Paging is off; the low 32 bits are the physical address.
    Off,
    /// Two levels of 32-bit entries, 4 MiB pages by CR4.PSE.
    Bits32,
    /// Three levels of 64-bit entries.
    Pae,
    /// Four levels.
    Level4,
    /// Five levels.
    Level5,
}

/// The part of the vCPU's state that decides a walk.
#[derive(Clone, Copy, Debug)]
pub struct Paging {
    /// The format of the tables.
    pub mode: Mode,
    cr0: u64,
    cr3: u64,
    cr4: u64,
    efer: u64,
    cpl: u8,
}

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// A data read.
    Read,
    /// A data write.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// One entry seen by a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// 5 is the PML5, 4 the PML4, 3 the PDPT, 2 the page directory, 1 the page table.
    pub level: u8,
    /// Where the entry is, guest-physical.
    pub entry_gpa: u64,
    /// Its value.
    pub entry: u64,
}

/// Where a linear address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The guest-physical address of the very byte.
    pub gpa: u64,
    /// Size of the page that maps it, in bytes.
    pub page_bytes: u64,
    /// Every level allows writes.
    pub writable: bool,
    /// Every level allows ring 3.
    pub user: bool,
    /// No level forbids execution.
    pub executable: bool,
}

/// Why a linear address leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The address does not fit the number of levels.
    #[error("linear address {linear:#x} is not canonical")]
    NotCanonical {
        /// The address.
        linear: u64,
    },
    /// An entry lacks its present bit.
    #[error("entry of level {level} is not present")]
    NotPresent {
        /// Level of the entry, 1 is the page table.
        level: u8,
    },
    /// A table lies outside of guest memory.
    #[error("table entry of level {level} at guest-physical {gpa:#x} is outside of guest memory")]
    OutsideMemory {
        /// Level of the entry.
        level: u8,
        /// Its guest-physical address.
        gpa: u64,
    },
}

impl Paging {
    /// Takes what a walk needs from the registers.
    #[must_use]
    pub fn new(sregs: &kvm_sregs) -> Self {
        let mode = if sregs.cr0 & CR0_PG == 0 {
            Mode::Off
        } else if sregs.efer & EFER_LMA != 0 {
            if sregs.cr4 & CR4_LA57 != 0 {
                Mode::Level5
            } else {
                Mode::Level4
            }
        } else if sregs.cr4 & CR4_PAE != 0 {
            Mode::Pae
        } else {
            Mode::Bits32
        };
        // The privilege level is the DPL of SS: CS.DPL may be lower in conforming segments.
        let cpl = if sregs.cr0 & 1 == 0 {
            0
        } else {
            sregs.ss.dpl & 3
        };
        Self {
            mode,
            cr0: sregs.cr0,
            cr3: sregs.cr3,
            cr4: sregs.cr4,
            efer: sregs.efer,
            cpl,
        }
    }

    /// The current privilege level.
    #[must_use]
    pub fn cpl(&self) -> u8 {
        self.cpl
    }

    /// Walks to `linear`, showing every entry to `see`.
    ///
    /// # Errors
    /// Where the address leads nowhere.
    pub fn walk<M: GuestMemoryBackend>(
        &self,
        mem: &M,
        linear: u64,
        mut see: impl FnMut(Step),
    ) -> Result<Mapping, WalkError> {
        let (top, root) = match self.mode {
            Mode::Off => {
                return Ok(Mapping {
                    gpa: linear & 0xffff_ffff,
                    page_bytes: 4096,
                    writable: true,
                    user: true,
                    executable: true,
                });
            }
            Mode::Bits32 => return self.walk_bits32(mem, linear & 0xffff_ffff, see),
            Mode::Pae => (3, self.cr3 & 0xffff_ffe0),
            Mode::Level4 => (4, self.cr3 & FRAME),
            Mode::Level5 => (5, self.cr3 & FRAME),
        };
        let linear = if self.mode == Mode::Pae {
            linear & 0xffff_ffff
        } else {
            linear
        };
        if !self.is_canonical(linear) {
            return Err(WalkError::NotCanonical { linear });
        }
        let mut mapping = Mapping {
            gpa: 0,
            page_bytes: 0,
            writable: true,
            user: true,
            executable: true,
        };
        let mut table = root;
        let mut level: u8 = top;
        loop {
            let shift = 12 + 9 * (u32::from(level) - 1);
            let mask = if self.mode == Mode::Pae && level == 3 {
                3
            } else {
                0x1ff
            };
            let entry_gpa = table + ((linear >> shift) & mask) * 8;
            let entry: u64 =
                mem.read_obj(GuestAddress(entry_gpa))
                    .map_err(|_| WalkError::OutsideMemory {
                        level,
                        gpa: entry_gpa,
                    })?;
            see(Step {
                level,
                entry_gpa,
                entry,
            });
            if entry & PRESENT == 0 {
                return Err(WalkError::NotPresent { level });
            }
            // The four PAE pointers have no permission bits.
            if !(self.mode == Mode::Pae && level == 3) {
                mapping.writable &= entry & WRITABLE != 0;
                mapping.user &= entry & USER != 0;
                mapping.executable &= self.efer & EFER_NXE == 0 || entry & NO_EXECUTE == 0;
            }
            let large = entry & LARGE != 0 && (level == 2 || (level == 3 && top > 3));
            if level == 1 || large {
                let offset_mask = (1_u64 << shift) - 1;
                mapping.gpa = (entry & FRAME & !offset_mask) | (linear & offset_mask);
                mapping.page_bytes = 1 << shift;
                return Ok(mapping);
            }
            table = entry & FRAME;
            level -= 1;
        }
    }

    fn walk_bits32<M: GuestMemoryBackend>(
        &self,
        mem: &M,
        linear: u64,
        mut see: impl FnMut(Step),
    ) -> Result<Mapping, WalkError> {
        let mut read = |level: u8, entry_gpa: u64| {
            let entry: u32 =
                mem.read_obj(GuestAddress(entry_gpa))
                    .map_err(|_| WalkError::OutsideMemory {
                        level,
                        gpa: entry_gpa,
                    })?;
            let entry = u64::from(entry);
            see(Step {
                level,
                entry_gpa,
                entry,
            });
            if entry & PRESENT == 0 {
                Err(WalkError::NotPresent { level })
            } else {
                Ok(entry)
            }
        };
        let pde = read(2, (self.cr3 & 0xffff_f000) + (linear >> 22) * 4)?;
        if pde & LARGE != 0 && self.cr4 & CR4_PSE != 0 {
            let high = ((pde >> 13) & 0xff) << 32;
            return Ok(Mapping {
                gpa: high | (pde & 0xffc0_0000) | (linear & 0x3f_ffff),
                page_bytes: 4 << 20,
                writable: pde & WRITABLE != 0,
                user: pde & USER != 0,
                executable: true,
            });
        }
        let pte = read(1, (pde & 0xffff_f000) + ((linear >> 12) & 0x3ff) * 4)?;
        Ok(Mapping {
            gpa: (pte & 0xffff_f000) | (linear & 0xfff),
            page_bytes: 4096,
            writable: pde & pte & WRITABLE != 0,
            user: pde & pte & USER != 0,
            executable: true,
        })
    }

    /// Whether the number of levels in use can express `linear`.
    #[must_use]
    pub fn is_canonical(&self, linear: u64) -> bool {
        let upper = match self.mode {
            Mode::Level4 => linear >> 47,
            Mode::Level5 => linear >> 56,
            Mode::Off | Mode::Bits32 | Mode::Pae => return true,
        };
        let all = if self.mode == Mode::Level4 {
            0x1_ffff
        } else {
            0xff
        };
        upper == 0 || upper == all
    }

    /// Walks to `linear` and asks whether the current privilege level may do `access` there.
    ///
    /// # Errors
    /// The error code of the page fault that the processor would raise, or `None` where it would
    /// raise a general-protection (or stack) fault instead.
    pub fn access<M: GuestMemoryBackend>(
        &self,
        mem: &M,
        linear: u64,
        access: Access,
        rflags: u64,
    ) -> Result<Mapping, Option<u32>> {
        let mut code = match access {
            Access::Read => 0,
            Access::Write => PF_WRITE,
            Access::Fetch if self.efer & EFER_NXE != 0 || self.cr4 & CR4_SMEP != 0 => PF_FETCH,
            Access::Fetch => 0,
        };
        let from_user = self.cpl == 3;
        if from_user {
            code |= PF_USER;
        }
        let mapping = match self.walk(mem, linear, |_| ()) {
            Ok(mapping) => mapping,
            Err(WalkError::NotCanonical { .. }) => return Err(None),
            Err(WalkError::NotPresent { .. } | WalkError::OutsideMemory { .. }) => {
                return Err(Some(code));
            }
        };
        if self.mode == Mode::Off {
            return Ok(mapping);
        }
        let supervisor_on_user_page = !from_user && mapping.user;
        let allowed = match access {
            _ if from_user && !mapping.user => false,
            Access::Fetch => {
                mapping.executable && !(supervisor_on_user_page && self.cr4 & CR4_SMEP != 0)
            }
            _ if supervisor_on_user_page && self.cr4 & CR4_SMAP != 0 && rflags & RFLAGS_AC == 0 => {
                false
            }
            Access::Read => true,
            Access::Write => mapping.writable || (!from_user && self.cr0 & CR0_WP == 0),
        };
        if allowed {
            Ok(mapping)
        } else {
            Err(Some(code | PF_PRESENT))
        }
    }
}
