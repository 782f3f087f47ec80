# A kernel for hosts whose KVM is incomplete: one instruction of each sort that takes a request of its own
# to complete, in ring 0 of 64-bit mode. Booted by Multiboot; powers off through the ACPI sleep control
# port when a trap has come behind the last one.

        .code32
        .text
        .globl  _start

        .align  4
        .long   0x1badb002, 0, -0x1badb002

_start: movl    $stack_end, %esp
        movl    $trap, %eax             # gate 1, debug traps
        movl    $idt + 16, %edi
        call    gate
        movl    $fault, %eax            # gate 14, page faults, where the breakpoint is set
        movl    $idt + 14 * 16, %edi
        call    gate
        lidt    idt_pointer
        lgdt    gdt_pointer
        movl    %cr4, %eax
        orl     $0x40220, %eax          # PAE, OSFXSR, OSXSAVE
        movl    %eax, %cr4
        movl    $level4, %eax
        movl    %eax, %cr3
        movl    $0xc0000080, %ecx       # EFER: LME, SCE
        rdmsr
        orl     $0x101, %eax
        wrmsr
        movl    %cr0, %eax
        andl    $~0xc, %eax
        orl     $0x80000001, %eax       # PG, PE; neither EM nor TS
        movl    %eax, %cr0
        movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        ljmp    $8, $long

# Makes the gate at EDI present and point at EAX.
gate:   movw    %ax, (%edi)
        movw    $8, 2(%edi)
        movw    $0x8e00, 4(%edi)
        shrl    $16, %eax
        movw    %ax, 6(%edi)
        ret

        .code64
long:   movl    $0xc0000082, %ecx       # LSTAR: a register write, then a breakpoint on gate 14
        movl    $fault, %eax
        xorl    %edx, %edx
        wrmsr
        movl    $control, %ebx          # the extended state, read and written
        fldcw   (%rbx)
        xorl    %ecx, %ecx              # XCR0, read and written
        xgetbv
        xsetbv
        pushfq                          # a trap behind an instruction that is completed
        orl     $0x100, (%rsp)
        popfq
        fldcw   (%rbx)
        nop
fault:  hlt
        jmp     fault

trap:   movw    $0x600, %dx             # sleep type 5, sleep enable
        movb    $0x34, %al
        outb    %al, %dx
stop:   hlt
        jmp     stop

        .align  8
gdt:    .quad   0
        .quad   0x00af9a000000ffff      # 64-bit code
        .quad   0x00cf92000000ffff      # data
gdt_pointer:
        .word   gdt_pointer - gdt - 1
        .long   gdt
control:
        .word   0x37f
        .align  16
idt:    .fill   15 * 16, 1, 0
idt_pointer:
        .word   15 * 16 - 1
        .long   idt

        .align  4096
level4: .long   level3 + 3, 0
        .fill   511, 8, 0
level3: .long   level2 + 3, 0
        .fill   511, 8, 0
level2: .long   0x83, 0                 # the first 2 MiB
        .fill   511, 8, 0
        .fill   4096, 1, 0
stack_end:
