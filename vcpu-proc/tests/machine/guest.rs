//! A guest in assembler. It is entered in long mode at 1 MiB and does what the first byte of its
//! command line says; what it has to tell it writes to COM1.

use std::fs::File;
use std::io::{Seek, Write};

const LOAD_ADDRESS: u64 = 0x10_0000;

// Data of the guest: counter of started processors at 0x60ff0; its real-mode code at 0x60000.
std::arch::global_asm!(
    r#"
    .pushsection .rodata.bulkhead_test_guest, "a"
    .global bulkhead_test_guest
    .global bulkhead_test_guest_end
bulkhead_test_guest:
    cld
    mov     al, byte ptr [0x20000]      # first byte of the command line
    cmp     al, 'p'
    je      10f
    cmp     al, 't'
    je      20f
    cmp     al, 'g'
    je      30f
    cmp     al, 'c'
    je      35f
    cmp     al, 'd'
    je      40f
    cmp     al, 'r'
    je      50f
    cmp     al, 'k'
    je      60f
    cmp     al, 'h'
    je      70f
    cmp     al, 's'
    je      80f
    cmp     al, 'a'
    je      90f
    cmp     al, 'm'
    je      100f
    cmp     al, 'i'
    je      110f
    cmp     al, 'b'
    je      120f
    cmp     al, 'x'
    je      130f
    cmp     al, 'q'
    je      140f
    cmp     al, 'l'
    je      150f
    ud2

10: # Says hello by one string instruction and powers off.
    lea     rsi, [rip + 15f]
    lea     rcx, [rip + 16f]
    sub     rcx, rsi
    mov     edx, 0x3f8
    rep outsb
11: mov     edx, 0x600
    mov     al, 0x34
    out     dx, al
12: hlt
    jmp     12b
15: .ascii  "hello from ring 0\n"
16:

20: # Triple fault: an exception without a descriptor table.
    lidt    [rip + 25f]
    ud2
25: .quad   0, 0

30: mov     edx, 0x505                  # panic
    mov     al, 1
    out     dx, al
    jmp     12b

35: mov     edx, 0x505                  # crash kernel loaded: goes on, then powers off
    mov     al, 2
    out     dx, al
    jmp     10b

40: mov     edx, 0xf4                   # debug exit
    mov     eax, 0x1234002a
    out     dx, eax
    jmp     12b

50: mov     edx, 0x602                  # ACPI reset
    mov     al, 1
    out     dx, al
    jmp     12b

60: mov     al, 0xfe                    # keyboard controller reset
    out     0x64, al
    jmp     12b

70: hlt                                 # for ever
    jmp     70b

80: pause                               # spins for ever
    jmp     80b

90: # Starts all other processors; each counts itself. Waits for as many as the digit says.
    lea     rsi, [rip + 95f]
    mov     edi, 0x60000
    lea     rcx, [rip + 96f]
    sub     rcx, rsi
    rep movsb
    mov     dword ptr [0x60ff0], 0
    mov     ebx, 0xfee00300
    mov     dword ptr [rbx], 0xc4500    # INIT to all but this
    mov     ecx, 100000
91: pause
    dec     ecx
    jnz     91b
    mov     dword ptr [rbx], 0xc4660    # SIPI, page 0x60
92: pause
    movzx   eax, byte ptr [0x20001]     # how many, as a letter from 'A'
    sub     eax, 'A'
    cmp     dword ptr [0x60ff0], eax
    jb      92b
    jmp     10b
    .code16
95: lock inc dword ptr cs:[0xff0]
97: cli
    hlt
    jmp     97b
96:
    .code64

100: # Maps 4 GiB to 5 GiB by a directory at 0x50000, and fills the last page of memory.
    mov     rax, 0x100000083
    mov     edi, 0x50000
    mov     ecx, 512
101: mov    qword ptr [rdi], rax
    add     rax, 0x200000
    add     rdi, 8
    dec     ecx
    jnz     101b
    mov     qword ptr [0xa020], 0x50003 # fifth entry of the directory pointers
    mov     rax, cr3
    mov     cr3, rax
    mov     rdi, 0x100000000
    mov     rax, 0x5a5a1234
    mov     qword ptr [rdi], rax
    cmp     qword ptr [rdi], rax
    jne     102f
    cmp     qword ptr [0], rax          # not an alias of low memory
    je      102f
    jmp     10b
102: ud2

110: # Tells what nobody owns: byte 0x3e0, word 0xcf8, MMIO in the hole; then pvpanic's events.
    mov     edx, 0x3e0
    in      al, dx
    mov     edx, 0x3f8
    out     dx, al
    mov     edx, 0xcf8
    in      eax, dx
    mov     edx, 0x3f8
    out     dx, al
    mov     eax, 0xd8000000
    mov     dword ptr [rax], 1
    mov     eax, dword ptr [rax]
    out     dx, al
    mov     edx, 0x505
    in      al, dx
    mov     edx, 0x3f8
    out     dx, al
    mov     edx, 0x600
    in      al, dx
    mov     edx, 0x3f8
    out     dx, al
    jmp     11b

120: # Waits for the power button, tells the event byte and whether line 9 was raised.
    mov     edx, 0x604
121: in     al, dx
    test    al, al
    jz      121b
    mov     edx, 0x3f8
    out     dx, al
    mov     al, 0x0a                    # read the interrupt request register
    out     0xa0, al
122: in     al, 0xa0
    test    al, 2
    jz      122b
    out     dx, al
    jmp     11b

130: # Prints for ever, one byte an exit.
    mov     edx, 0x3f8
131: mov    al, 'x'
    out     dx, al
    jmp     131b

140: # Asks the legacy process for an edge on line 4 and waits for it; tells what a call reads.
    mov     edx, 0x3f9
    mov     al, 2
    out     dx, al
    mov     al, 0x0a
    out     0x20, al
141: in     al, 0x20
    test    al, 0x10
    jz      141b
    mov     edx, 0x3fa
    in      al, dx
    mov     edx, 0x3f8
    out     dx, al
    jmp     11b

150: # Reads a register of the legacy process that takes a call, tells it to the debug exit.
    mov     edx, 0x3fa
    in      al, dx
    out     0xf4, al
    jmp     12b
bulkhead_test_guest_end:
    .popsection
"#
);

unsafe extern "C" {
    static bulkhead_test_guest: u8;
    static bulkhead_test_guest_end: u8;
}

/// The guest as an ELF file.
pub(crate) fn kernel() -> File {
    let start = &raw const bulkhead_test_guest;
    let end = &raw const bulkhead_test_guest_end;
    // SAFETY: both symbols delimit one read-only object of this program.
    let code = unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) };
    let mut elf = Vec::new();
    let headers = 64 + 56u64;
    elf.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    for half in [2u16, 62] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    elf.extend_from_slice(&1u32.to_le_bytes());
    for word in [LOAD_ADDRESS, 64, 0] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(&0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend_from_slice(&half.to_le_bytes());
    }
    for word in [1u32, 7] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    let length = code.len() as u64;
    for word in [headers, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 0x1000] {
        elf.extend_from_slice(&word.to_le_bytes());
    }
    elf.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&elf).unwrap();
    file.rewind().unwrap();
    file
}
