// Everything that runs in ring 0: the PVH entry, descriptor and page tables, interrupt and
// exception stubs, and a few services that ring 3 calls.
//
// Some hosts (kvm_pvm) interpret ring 0 at a few million instructions a second and know only the
// plain integer instructions, while ring 3 runs natively. So tables are constants in the image,
// the way from entry to ring 3 is about thirty instructions, and nothing here uses SSE, `syscall`,
// `int n` or any computed table. Ring 3 calls a service by executing `ud2` at `service_site`,
// because #UD is delivered correctly everywhere and `syscall` and `int 0x80` are not.
//
// AT&T syntax. Selectors are those of Linux.

.set KERNEL_CS, 0x10
.set KERNEL_DS, 0x18
.set USER_DS, 0x2b
.set USER_CS, 0x33
.set TSS_BOOT, 0x40             // the TSS of the first CPU
.set TSS_AP, 0x50               // those of the others, 16 bytes apart, filled in by modes/smp.rs
.set AP_MAX, 32
.set BOOT_BASE_HIGH, 0x20       // bits 31:16 of the address of .boot (linker.ld)
.set BOOTDATA_BASE_MIDDLE, 0x21 // bits 23:16 of the address of .bootdata

// ---- The note that makes the file a PVH kernel (XEN_ELFNOTE_PHYS32_ENTRY) ----------------------
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

// ---- Entry -------------------------------------------------------------------------------------
.section .boot, "ax", @progbits
boot_start:

// Switches a CPU from flat 32-bit protected mode to 64-bit mode on the static page tables.
.macro enter_long_mode target
    movl    $pml4, %eax
    movl    %eax, %cr3
    movl    $0x620, %eax            // PAE, OSFXSR, OSXMMEXCPT: ring 3 may use SSE
    movl    %eax, %cr4
    movl    $0xc0000080, %ecx       // EFER
    xorl    %edx, %edx
    movl    $0x100, %eax            // LME
    wrmsr
    movl    $0x80010033, %eax       // PG, WP, NE, ET, MP, PE
    movl    %eax, %cr0
    ljmpl   $KERNEL_CS, $\target
.endm

// Leaves for ring 3 with interrupts off. The stack is that of ring 0.
.macro enter_ring3 target
    pushq   $USER_DS
    pushq   %rax                    // RSP of ring 3
    pushq   $2
    pushq   $USER_CS
    pushq   $\target
    iretq
.endm

.code32
.globl pvh_entry
pvh_entry:
    movw    $0x3f8, %dx             // the first letter of the first record ("BH hello …")
    movb    $'B', %al
    outb    %al, %dx
    movl    %ebx, start_info_address
    lgdt    gdt_pointer
    enter_long_mode long_entry

.code64
long_entry:
    movl    $KERNEL_DS, %eax
    movl    %eax, %ss
    movl    $ring0_stack_top, %esp
    lidt    idt_pointer
    movl    $TSS_BOOT, %eax
    ltr     %ax
    movl    start_info_address, %edi
    movl    $(user_stack_top - 8), %eax
    enter_ring3 guest_main

// ---- The other CPUs ----------------------------------------------------------------------------
// Copied to a page below 1 MiB by modes/smp.rs; runs there in real mode after the start-up IPI.
.code16
.globl ap_trampoline, ap_trampoline_end
ap_trampoline:
    cli
    lgdtl   %cs:(ap_gdt_pointer - ap_trampoline)
    movl    $0x11, %eax
    movl    %eax, %cr0
    ljmpl   $0x08, $ap_protected
    .balign 4
ap_gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
ap_trampoline_end:

.code32
ap_protected:
    movl    $KERNEL_DS, %eax
    movl    %eax, %ds
    movl    %eax, %ss
    enter_long_mode ap_long

.code64
ap_long:
    movl    $1, %edi
    lock xaddl %edi, ap_started     // EDI: this CPU's index among the others
    cmpl    $AP_MAX, %edi
    jae     park
    movl    %edi, %eax
    shll    $4, %eax
    addl    $TSS_AP, %eax
    lidt    idt_pointer
    ltr     %ax
    movl    %edi, %eax
    movq    ap_ring0_stacks(,%rax,8), %rsp
    movq    ap_user_stacks(,%rax,8), %rax
    enter_ring3 guest_ap_main

// ---- Exceptions --------------------------------------------------------------------------------
// Every exception but the service call is fatal and is reported by `guest_exception` in ring 3.
.macro exception_stub vector, has_error=0
    .balign 16
exception_\vector:
    .if \has_error == 0
    pushq   $0
    .endif
    pushq   $\vector
    jmp     exception_common
.endm

exception_common:
    popq    %rdi                    // vector
    popq    %rsi                    // error code
    popq    %rdx                    // RIP
    popq    %rcx                    // CS
    popq    %r9                     // RFLAGS, replaced by RSP
    popq    %r9
    movq    %cr2, %r8
    movl    $(exception_stack_top - 8), %eax
    enter_ring3 guest_exception

exception_stub 0
exception_stub 1
exception_stub 2
exception_stub 3
exception_stub 4
exception_stub 5
exception_stub 7
exception_stub 8, 1
exception_stub 9
exception_stub 10, 1
exception_stub 11, 1
exception_stub 12, 1
exception_stub 13, 1
exception_stub 14, 1
exception_stub 16
exception_stub 17, 1
exception_stub 18
exception_stub 19

    .balign 16
exception_6:
    cmpq    $service_site, (%rsp)
    je      service_call
    pushq   $0
    pushq   $6
    jmp     exception_common

// ---- Interrupts --------------------------------------------------------------------------------
// GSI n arrives at vector 32 + n and is counted; what it means is found out by ring 3.
.macro interrupt_stub number
    .balign 16
interrupt_\number:
    incq    irq_counts + 8 * \number
    jmp     interrupt_common
.endm

interrupt_common:
    incq    irq_total
    pushq   %rax
    movl    $0xfee000b0, %eax       // end of interrupt
    movl    $0, (%rax)
    popq    %rax
interrupt_spurious:
    iretq

.altmacro
.set number, 0
.rept 49                            // 48 GSIs, then the LAPIC timer
    interrupt_stub %number
    .set number, number + 1
.endr
.noaltmacro

// ---- Services ----------------------------------------------------------------------------------
// `guest_service(argument0, argument1, service)`: the only place that ring 0 serves.
.globl guest_service
guest_service:
    movl    %edx, %eax
service_site:
    ud2
    ret

service_call:
    addq    $2, (%rsp)
    cmpl    $SERVICE_COUNT, %eax
    jae     park
    jmpq    *service_table(,%rax,8)

// RDI: bytes, RSI: how many (not 0), to COM1. A byte costs a seventh of what it costs in ring 3.
service_write_serial:
    movl    %esi, %ecx
    movq    %rdi, %rsi
    movl    $0x3f8, %edx
    cld
1:  lodsb
    outb    %al, %dx
    decl    %ecx
    jnz     1b
    iretq

// RDI: address of a 32-bit register, RSI: how many times to write zero to it ten times.
service_write_memory:
1:  .rept 10
    movl    $0, (%rdi)
    .endr
    decq    %rsi
    jnz     1b
    iretq

// RDI: port, RSI: how many times to read it ten times.
service_read_port:
    movl    %edi, %edx
1:  .rept 10
    inb     %dx, %al
    .endr
    decq    %rsi
    jnz     1b
    iretq

// RDI: address of a counter, RSI: value; sleeps until an interrupt has changed it.
service_halt_while:
    cli
    cmpq    %rsi, (%rdi)
    jne     1f
    sti
    hlt
    jmp     service_halt_while
1:  iretq

// RDI: whether ring 3 goes on with interrupts enabled.
service_set_interrupts:
    andl    $1, %edi
    shll    $9, %edi
    andl    $~0x200, 16(%rsp)
    orl     %edi, 16(%rsp)
    iretq

// RDI: address of a virtio device's interrupt status; returns it, after writing it to the register behind unless it
// is 0.
service_take_interrupt:
    movl    (%rdi), %eax
    testl   %eax, %eax
    jz      1f
    movl    %eax, 4(%rdi)
1:  iretq

service_idle:
    sti
    hlt
    jmp     service_idle

park:
service_park:
    cli
    hlt
    jmp     park

service_triple_fault:
    lidt    idt_pointer_none
    ud2

// ---- Tables ------------------------------------------------------------------------------------
.section .bootdata, "aw", @progbits
bootdata_start:
.globl gdt
gdt:
    .quad   0
    .quad   0x00cf9b000000ffff      // 0x08 32-bit code (entry of the other CPUs)
    .quad   0x00af9b000000ffff      // 0x10 64-bit code
    .quad   0x00cf93000000ffff      // 0x18 data
    .quad   0
    .quad   0x00cff3000000ffff      // 0x28 ring 3 data
    .quad   0x00affb000000ffff      // 0x30 ring 3 64-bit code
    .quad   0
    .word   tss_end - tss - 1       // 0x40 TSS
    .word   tss - bootdata_start
    .byte   BOOTDATA_BASE_MIDDLE, 0x89, 0, 0
    .quad   0
    .fill   2 * AP_MAX, 8, 0        // 0x50 TSSs of the other CPUs
gdt_end:

gdt_pointer:
    .word   gdt_end - gdt - 1
    .long   gdt
    .balign 8
idt_pointer:
    .word   idt_end - idt - 1
    .quad   idt
    .balign 8
idt_pointer_none:
    .word   0
    .quad   0

    .balign 8
.globl start_info_address, ap_started
start_info_address:
    .long   0
ap_started:
    .long   0

service_table:
    .quad   service_write_serial
    .quad   service_write_memory
    .quad   service_read_port
    .quad   service_halt_while
    .quad   service_set_interrupts
    .quad   service_idle
    .quad   service_park
    .quad   service_triple_fault
    .quad   service_take_interrupt
.set SERVICE_COUNT, 9

.macro gate handler
    .word   \handler - boot_start
    .word   KERNEL_CS
    .byte   0, 0x8e
    .word   BOOT_BASE_HIGH
    .quad   0
.endm
.macro no_gate
    .quad   0, 0
.endm
.macro exception_gate number
    gate    exception_\number
.endm
.macro interrupt_gate number
    gate    interrupt_\number
.endm

    .balign 16
idt:
.altmacro
.set number, 0
.rept 15
    exception_gate %number
    .set number, number + 1
.endr
    no_gate
.set number, 16
.rept 4
    exception_gate %number
    .set number, number + 1
.endr
.rept 12
    no_gate
.endr
.set number, 0
.rept 49
    interrupt_gate %number
    .set number, number + 1
.endr
.noaltmacro
.rept 174
    no_gate
.endr
    gate    interrupt_spurious
idt_end:

// The I/O permission bitmap is all zero: ring 3 does port I/O itself. (IOPL 3 would do elsewhere,
// but an emulated `iretq` drops it.)
    .balign 16
tss:
    .long   0
    .quad   ring0_stack_top
    .fill   88, 1, 0
    .word   0
    .word   tss_bitmap - tss
tss_bitmap:
    .fill   8192, 1, 0
    .byte   0xff
tss_end:

// 4 GiB mapped one to one with 2 MiB pages, writable and open to ring 3; uncached from the start
// of the MMIO hole. Accessed and dirty are set, so that nobody writes the tables later.
.set TABLE, 0x27                    // present, writable, user, accessed
.set LARGE, 0xe7                    // the same, dirty, 2 MiB
.set UNCACHED, 0x10
    .balign 4096
.globl pml4, pdpt
pml4:
    .quad   pdpt + TABLE
    .fill   511, 8, 0
pdpt:
    .quad   page_directories + TABLE
    .quad   page_directories + 0x1000 + TABLE
    .quad   page_directories + 0x2000 + TABLE
    .quad   page_directories + 0x3000 + TABLE
    .fill   508, 8, 0
page_directories:
.set address, 0
.rept 0xd0000000 / 0x200000
    .quad   address + LARGE
    .set address, address + 0x200000
.endr
.rept 0x30000000 / 0x200000
    .quad   address + LARGE + UNCACHED
    .set address, address + 0x200000
.endr

// ---- Memory without contents -------------------------------------------------------------------
.section .bss.boot, "aw", @nobits
    .balign 4096
.globl irq_counts, irq_total, ap_ring0_stacks, ap_user_stacks
irq_counts:
    .fill   64, 8, 0
irq_total:
    .quad   0
ap_ring0_stacks:
    .fill   AP_MAX, 8, 0
ap_user_stacks:
    .fill   AP_MAX, 8, 0
    .balign 4096
    .fill   4096, 1, 0
ring0_stack_top:
    .fill   16384, 1, 0
exception_stack_top:
    .fill   131072, 1, 0
user_stack_top:

.text
