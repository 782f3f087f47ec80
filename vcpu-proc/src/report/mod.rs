//! What is printed and written when a guest crashes: on a triple fault, a guest panic, or an error of
//! KVM that nobody can complete.
//!
//! [`collect`] takes a snapshot of each stopped vCPU; [`crash_report`] and [`core`] turn snapshots and
//! guest memory into text and into an ELF core, without KVM. Both read hostile data: page tables may
//! loop or point anywhere, descriptors may be nonsense, symbol names come from a file. Nothing here
//! panics on them, output is bounded, and what is printed is numbers, disassembly and escaped names,
//! never bytes that a guest chose.
//!
//! Takes KVM_GET_{REGS, SREGS, MSRS}; for symbols `fcntl(F_DUPFD_CLOEXEC)`, `lseek` and `read` on the
//! kernel's file; for a core `pwrite64` and `ftruncate` on the file it is given.

mod code;
pub mod core;
mod descriptors;
mod mappings;
mod symbols;
#[cfg(test)]
mod tests;

use std::fmt::Write as _;

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::GuestMemoryBackend;

pub use self::symbols::{SymbolError, Symbols};
use crate::paging::{Paging, Step};

/// One vCPU as it stood when the guest crashed.
#[derive(Clone, Copy, Debug, Default)]
pub struct VcpuState {
    /// Number of the vCPU.
    pub index: u8,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, tables, control registers.
    pub sregs: kvm_sregs,
    /// MSR_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
}

/// Takes the snapshot of a vCPU that is not running and will not run again.
///
/// # Errors
/// If KVM refuses its registers.
pub fn collect(vcpu: &mut VcpuFd, index: u8) -> Result<VcpuState, kvm_ioctls::Error> {
    use crate::quirks::ops::{VcpuOps as _, read_msr};
    const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
    Ok(VcpuState {
        index,
        regs: vcpu.regs()?,
        sregs: vcpu.sregs()?,
        kernel_gs_base: read_msr(vcpu, MSR_KERNEL_GS_BASE)?.unwrap_or(0),
    })
}

/// Writes the report of a crash.
///
/// `reason` is the monitor's own sentence. `symbols` are those of the kernel file, where it is an ELF
/// that has any.
#[must_use]
pub fn crash_report<M: GuestMemoryBackend>(
    reason: &str,
    vcpus: &[VcpuState],
    mem: &M,
    symbols: Option<&Symbols>,
) -> String {
    let mut out = format!("guest crashed: {}\n", escaped(reason));
    for vcpu in vcpus {
        let report = VcpuReport {
            vcpu,
            mem,
            symbols,
            paging: Paging::new(&vcpu.sregs),
        };
        // Writing to a string does not fail.
        let _ = report.write(&mut out);
    }
    out
}

/// Text of unknown origin, safe for a terminal and a log, and of bounded length.
pub(crate) fn escaped(text: &str) -> String {
    const CHARS_MAX: usize = 256;
    let mut out = String::with_capacity(text.len().min(CHARS_MAX));
    for character in text.chars().take(CHARS_MAX) {
        if character == ' ' || character.is_ascii_graphic() {
            out.push(character);
        } else {
            out.extend(character.escape_default());
        }
    }
    if text.chars().nth(CHARS_MAX).is_some() {
        out.push_str("...");
    }
    out
}

/// One vCPU's part of the report.
struct VcpuReport<'a, M> {
    vcpu: &'a VcpuState,
    mem: &'a M,
    symbols: Option<&'a Symbols>,
    paging: Paging,
}

impl<M: GuestMemoryBackend> VcpuReport<'_, M> {
    fn write(&self, out: &mut String) -> std::fmt::Result {
        let (r, s) = (&self.vcpu.regs, &self.vcpu.sregs);
        writeln!(out, "\nvCPU {}", self.vcpu.index)?;
        writeln!(
            out,
            "  rip {:016x}  rflags {:016x}{}",
            r.rip,
            r.rflags,
            self.symbol(r.rip)
        )?;
        for row in [
            [
                ("rax", r.rax),
                ("rbx", r.rbx),
                ("rcx", r.rcx),
                ("rdx", r.rdx),
            ],
            [
                ("rsi", r.rsi),
                ("rdi", r.rdi),
                ("rbp", r.rbp),
                ("rsp", r.rsp),
            ],
            [("r8 ", r.r8), ("r9 ", r.r9), ("r10", r.r10), ("r11", r.r11)],
            [
                ("r12", r.r12),
                ("r13", r.r13),
                ("r14", r.r14),
                ("r15", r.r15),
            ],
            [
                ("cr0", s.cr0),
                ("cr2", s.cr2),
                ("cr3", s.cr3),
                ("cr4", s.cr4),
            ],
            [
                ("cr8", s.cr8),
                ("efer", s.efer),
                ("apic", s.apic_base),
                ("kgs", self.vcpu.kernel_gs_base),
            ],
        ] {
            let cells = row.map(|(name, value)| format!("{name} {value:016x}"));
            writeln!(out, "  {}", cells.join("  "))?;
        }
        writeln!(
            out,
            "  {:?} paging, ring {}",
            self.paging.mode,
            self.paging.cpl()
        )?;
        for (name, segment) in [
            ("cs", &s.cs),
            ("ss", &s.ss),
            ("ds", &s.ds),
            ("es", &s.es),
            ("fs", &s.fs),
            ("gs", &s.gs),
            ("tr", &s.tr),
            ("ldt", &s.ldt),
        ] {
            write_segment(out, name, segment)?;
        }
        descriptors::write_gdt(out, &s.gdt, &self.paging, self.mem)?;
        descriptors::write_idt(out, &s.idt, &self.paging, self.mem, &|linear| {
            self.symbol(linear)
        })?;
        let linear_rip = self.linear_rip();
        self.write_walk(out, "cr2", s.cr2)?;
        self.write_walk(out, "rip", linear_rip)?;
        code::write(out, self, linear_rip)?;
        self.write_stack(out)
    }

    fn code_bits(&self) -> u32 {
        use crate::paging::Mode;
        let s = &self.vcpu.sregs;
        match (self.paging.mode, s.cs.l, s.cs.db) {
            (Mode::Level4 | Mode::Level5, 1, _) => 64,
            (_, _, 0) => 16,
            _ => 32,
        }
    }

    fn linear_rip(&self) -> u64 {
        let rip = self.vcpu.regs.rip;
        if self.code_bits() == 64 {
            rip
        } else {
            self.vcpu.sregs.cs.base.wrapping_add(rip) & 0xffff_ffff
        }
    }

    /// The symbol at an address, with a blank before it; nothing if there is none.
    fn symbol(&self, linear: u64) -> String {
        self.symbols
            .and_then(|symbols| symbols.lookup(linear))
            .map(|(name, offset)| format!("  <{}+{offset:#x}>", escaped(&name)))
            .unwrap_or_default()
    }

    fn write_walk(&self, out: &mut String, name: &str, linear: u64) -> std::fmt::Result {
        let mut steps = String::new();
        let walked = self.paging.walk(
            self.mem,
            linear,
            |Step {
                 level,
                 entry_gpa,
                 entry,
             }| {
                let _ = write!(steps, "\n    level {level}: {entry:016x} at {entry_gpa:#x}");
            },
        );
        write!(out, "  page walk of {name} {linear:016x}:{steps}\n    ")?;
        match walked {
            Ok(to) => writeln!(
                out,
                "guest-physical {:#x}, page of {} KiB, {}{}{}",
                to.gpa,
                to.page_bytes >> 10,
                if to.user { "user" } else { "supervisor" },
                if to.writable {
                    ", writable"
                } else {
                    ", read-only"
                },
                if to.executable {
                    ", executable"
                } else {
                    ", not executable"
                },
            ),
            Err(error) => writeln!(out, "{error}"),
        }
    }

    fn write_stack(&self, out: &mut String) -> std::fmt::Result {
        const WORDS: u64 = 16;
        let long = self.code_bits() == 64;
        let base = if long { 0 } else { self.vcpu.sregs.ss.base };
        let bytes = if long { 8 } else { 4 };
        let top = base.wrapping_add(self.vcpu.regs.rsp);
        writeln!(out, "  stack")?;
        for slot in 0..WORDS {
            let linear = top.wrapping_add(slot * bytes);
            let mut word = [0; 8];
            let wanted = word.iter_mut().take(if long { 8 } else { 4 });
            for (offset, byte) in (0..).zip(wanted) {
                let Some(value) = self.byte(linear.wrapping_add(offset)) else {
                    return writeln!(out, "    {linear:016x}: unreadable");
                };
                *byte = value;
            }
            let value = u64::from_le_bytes(word);
            writeln!(out, "    {linear:016x}: {value:016x}{}", self.symbol(value))?;
        }
        Ok(())
    }

    /// One byte at a linear address, as the supervisor sees it.
    fn byte(&self, linear: u64) -> Option<u8> {
        read_linear(&self.paging, self.mem, linear).map(|[byte]| byte)
    }
}

/// Reads bytes at a linear address, whatever the permissions are.
fn read_linear<M: GuestMemoryBackend, const N: usize>(
    paging: &Paging,
    mem: &M,
    linear: u64,
) -> Option<[u8; N]> {
    use vm_memory::{Bytes as _, GuestAddress};
    let mut bytes = [0; N];
    for (offset, byte) in (0_u64..).zip(bytes.iter_mut()) {
        let mapping = paging.walk(mem, linear.wrapping_add(offset), |_| ()).ok()?;
        *byte = mem.read_obj(GuestAddress(mapping.gpa)).ok()?;
    }
    Some(bytes)
}

fn write_segment(out: &mut String, name: &str, segment: &kvm_segment) -> std::fmt::Result {
    let kind = match (segment.unusable, segment.s, segment.type_ >> 3) {
        (1, _, _) => "unusable",
        (_, 0, _) => "system",
        (_, _, 1) => "code",
        _ => "data",
    };
    writeln!(
        out,
        "  {name:3} {:04x}  base {:016x}  limit {:08x}  dpl {}  type {:x}{}{}  {kind}",
        segment.selector,
        segment.base,
        segment.limit,
        segment.dpl,
        segment.type_,
        if segment.l == 1 { "  64-bit" } else { "" },
        if segment.present == 1 {
            ""
        } else {
            "  not present"
        },
    )
}
