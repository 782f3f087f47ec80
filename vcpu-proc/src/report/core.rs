//! An ELF core of a crashed guest, as debuggers read it.
//!
//! Notes: for each vCPU an NT_PRSTATUS, which gives gdb a thread with registers, and QEMU's note with
//! the system registers, which crash(8) and volatility know. Segments: guest memory once in the file,
//! described by virtual address as far as the first paging vCPU's tables map it, and by physical
//! address. The file is sparse: pages of zeros are not written. Memory is streamed through a small
//! buffer.
//!
//! Page tables are the guest's: the walk is bounded in tables and in segments, and what it finds is
//! only described where it lies within guest memory.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use kvm_bindings::{kvm_dtable, kvm_segment};
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestMemoryBackend, GuestMemoryRegion as _,
};

use super::VcpuState;
use super::mappings::{self, Run};

const HEADER_BYTES: u64 = 64;
const PROGRAM_HEADER_BYTES: u64 = 56;
const PAGE_BYTES: u64 = 4096;
const COPY_BYTES: usize = 256 << 10;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NT_PRSTATUS: u32 = 1;

/// Why no core was written.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// The file could not be written.
    #[error("core file: {0}")]
    Io(#[from] std::io::Error),
    /// Guest memory could not be read, which happens if it is backed by a file that is gone.
    #[error("core file: guest memory at {address:#x}: {source}")]
    Memory {
        /// Guest-physical address of the part.
        address: u64,
        /// What went wrong.
        source: vm_memory::GuestMemoryError,
    },
}

/// A part of guest memory and its place in the file.
#[derive(Clone, Copy, Debug)]
struct Region {
    start: u64,
    bytes: u64,
    offset: u64,
}

/// Writes the core of a stopped guest into `file`, an empty file open for writing.
///
/// # Errors
/// If the file or guest memory fails.
pub fn write<M: GuestMemoryBackend>(
    file: &File,
    vcpus: &[VcpuState],
    mem: &M,
) -> Result<(), CoreError> {
    let notes = notes(vcpus);
    let mut runs = vcpus
        .iter()
        .find_map(|vcpu| mappings::runs(&vcpu.sregs, mem))
        .unwrap_or_default();
    let regions = mem
        .iter()
        .map(|region| (region.start_addr().raw_value(), region.len()));
    let mut regions: Vec<Region> = regions
        .map(|(start, bytes)| Region {
            start,
            bytes,
            offset: 0,
        })
        .collect();
    // One program header each: the notes, the runs, the regions.
    runs.truncate(usize::from(u16::MAX) - 1 - 1 - regions.len());
    let headers = 1 + runs.len() + regions.len();
    let notes_offset = HEADER_BYTES + headers as u64 * PROGRAM_HEADER_BYTES;
    let mut offset = (notes_offset + notes.len() as u64).next_multiple_of(PAGE_BYTES);
    for region in &mut regions {
        region.offset = offset;
        offset = (offset + region.bytes).next_multiple_of(PAGE_BYTES);
    }
    let mut head = elf_header(u16::try_from(headers).unwrap_or(u16::MAX));
    program_header(&mut head, PT_NOTE, notes_offset, 0, 0, notes.len() as u64);
    for run in &runs {
        for region in &regions {
            if let Some(piece) = intersect(run, region) {
                let at = region.offset + (piece.physical - region.start);
                program_header(
                    &mut head,
                    PT_LOAD,
                    at,
                    piece.linear,
                    piece.physical,
                    piece.bytes,
                );
                break;
            }
        }
    }
    for region in &regions {
        program_header(
            &mut head,
            PT_LOAD,
            region.offset,
            region.start,
            region.start,
            region.bytes,
        );
    }
    head.extend_from_slice(&notes);
    file.write_all_at(&head, 0)?;
    for region in &regions {
        copy(file, mem, region)?;
    }
    file.set_len(offset)?;
    Ok(())
}

/// The part of `run` that begins in `region`.
fn intersect(run: &Run, region: &Region) -> Option<Run> {
    let into = run.physical.checked_sub(region.start)?;
    let room = region.bytes.checked_sub(into).filter(|room| *room > 0)?;
    Some(Run {
        bytes: run.bytes.min(room),
        ..*run
    })
}

/// Writes a region, leaving holes where it is zero.
fn copy<M: GuestMemoryBackend>(file: &File, mem: &M, region: &Region) -> Result<(), CoreError> {
    let mut buffer = vec![0; COPY_BYTES];
    let mut done = 0;
    while done < region.bytes {
        let left = usize::try_from(region.bytes - done).unwrap_or(usize::MAX);
        let (now, _) = buffer.split_at_mut(left.min(COPY_BYTES));
        let address = region.start + done;
        mem.read_slice(now, GuestAddress(address))
            .map_err(|source| CoreError::Memory { address, source })?;
        write_sparse(file, now, region.offset + done)?;
        done += now.len() as u64;
    }
    Ok(())
}

fn write_sparse(file: &File, bytes: &[u8], offset: u64) -> std::io::Result<()> {
    let is_zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let page_bytes = usize::try_from(PAGE_BYTES).unwrap_or(4096);
    let mut at = offset;
    // Runs of pages that are all zero or all not, each run in one write.
    for run in bytes
        .chunks(page_bytes)
        .collect::<Vec<_>>()
        .chunk_by(|a, b| is_zero(a) == is_zero(b))
    {
        let len: usize = run.iter().map(|page| page.len()).sum();
        if run.first().is_some_and(|page| !is_zero(page)) {
            let start = usize::try_from(at - offset).unwrap_or(0);
            file.write_all_at(bytes.get(start..start + len).unwrap_or_default(), at)?;
        }
        at += len as u64;
    }
    Ok(())
}

fn elf_header(program_headers: u16) -> Vec<u8> {
    const ET_CORE: u16 = 4;
    const EM_X86_64: u16 = 62;
    let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
    out.resize(16, 0);
    out.extend_from_slice(&ET_CORE.to_le_bytes());
    out.extend_from_slice(&EM_X86_64.to_le_bytes());
    out.extend_from_slice(&1_u32.to_le_bytes());
    // Entry, program headers, section headers.
    for word in [0, HEADER_BYTES, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, program_headers, 0, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    out
}

fn program_header(
    out: &mut Vec<u8>,
    kind: u32,
    offset: u64,
    linear: u64,
    physical: u64,
    bytes: u64,
) {
    const READ_WRITE_EXECUTE: u32 = 7;
    let flags = if kind == PT_LOAD {
        READ_WRITE_EXECUTE
    } else {
        0
    };
    out.extend_from_slice(&kind.to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    for word in [offset, linear, physical, bytes, bytes, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
}

fn notes(vcpus: &[VcpuState]) -> Vec<u8> {
    let mut out = Vec::new();
    for vcpu in vcpus {
        note(&mut out, b"CORE\0", NT_PRSTATUS, &prstatus(vcpu));
    }
    for vcpu in vcpus {
        note(&mut out, b"QEMU\0", 0, &qemu_state(vcpu));
    }
    out
}

fn note(out: &mut Vec<u8>, name: &[u8], kind: u32, body: &[u8]) {
    for len in [name.len(), body.len()] {
        out.extend_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
    }
    out.extend_from_slice(&kind.to_le_bytes());
    for part in [name, body] {
        out.extend_from_slice(part);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// Linux' `struct elf_prstatus`. The thread number is the vCPU's, counted from 1.
fn prstatus(vcpu: &VcpuState) -> Vec<u8> {
    const PID_OFFSET: usize = 32;
    const REGISTERS_OFFSET: usize = 112;
    const BYTES: usize = 336;
    let (r, s) = (&vcpu.regs, &vcpu.sregs);
    let mut out = vec![0; PID_OFFSET];
    out.extend_from_slice(&(u32::from(vcpu.index) + 1).to_le_bytes());
    out.resize(REGISTERS_OFFSET, 0);
    let segment = |segment: &kvm_segment| u64::from(segment.selector);
    let no_system_call = u64::MAX;
    for word in [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        no_system_call,
        r.rip,
        segment(&s.cs),
        r.rflags,
        r.rsp,
        segment(&s.ss),
        s.fs.base,
        s.gs.base,
        segment(&s.ds),
        segment(&s.es),
        segment(&s.fs),
        segment(&s.gs),
    ] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.resize(BYTES, 0);
    out
}

/// QEMU's `QEMUCPUState`, version 1.
fn qemu_state(vcpu: &VcpuState) -> Vec<u8> {
    const VERSION: u32 = 1;
    const BYTES: u32 = 440;
    let (r, s) = (&vcpu.regs, &vcpu.sregs);
    let mut out = Vec::new();
    out.extend_from_slice(&VERSION.to_le_bytes());
    out.extend_from_slice(&BYTES.to_le_bytes());
    for word in [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rsp, r.rbp, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15, r.rip, r.rflags,
    ] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    for segment in [&s.cs, &s.ds, &s.es, &s.fs, &s.gs, &s.ss, &s.ldt, &s.tr] {
        let flags = u32::from(segment.type_ & 15) << 8
            | u32::from(segment.s & 1) << 12
            | u32::from(segment.dpl & 3) << 13
            | u32::from(segment.present & 1) << 15
            | u32::from(segment.avl & 1) << 20
            | u32::from(segment.l & 1) << 21
            | u32::from(segment.db & 1) << 22
            | u32::from(segment.g & 1) << 23;
        qemu_segment(
            &mut out,
            u32::from(segment.selector),
            segment.limit,
            flags,
            segment.base,
        );
    }
    for kvm_dtable { base, limit, .. } in [s.gdt, s.idt] {
        qemu_segment(&mut out, 0, u32::from(limit), 0, base);
    }
    for word in [s.cr0, 0, s.cr2, s.cr3, s.cr4, vcpu.kernel_gs_base] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    debug_assert_eq!(out.len(), 440, "the size that it names");
    out
}

fn qemu_segment(out: &mut Vec<u8>, selector: u32, limit: u32, flags: u32, base: u64) {
    for word in [selector, limit, flags, 0] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&base.to_le_bytes());
}
