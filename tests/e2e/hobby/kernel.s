# A kernel as hobbyists write their first one: 32-bit, booted by Multiboot, text on the serial port.
#
# Assembled with `--defsym MULTIBOOT=1` or 2, and with `--defsym END=` one of
#   0  says what the loader told it, and powers off through the ACPI sleep control port
#   1  prints lines of 64 bytes without end
#   2  computes a sine in ring 0, which no emulator of KVM's knows, and powers off
#   3  jumps to where neither memory nor a device is

        .code32
        .text
        .globl  _start

.if MULTIBOOT == 1
        .set    MAGIC, 0x1badb002
        .set    FLAGS, 3                # modules on page boundaries, memory information
        .align  4
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
.else
        .set    MAGIC, 0xe85250d6
        .align  8
header: .long   MAGIC, 0, header_end - header, -(MAGIC + (header_end - header))
        .word   0, 0                    # the end of the tags
        .long   8
header_end:
.endif

_start: movl    $stack_end, %esp
        movl    %eax, %ebp

.if END == 1
flood:  movl    $row, %esi
        call    print
        jmp     flood
.endif
.if END == 2
        fninit
        fldpi
        fsin
.endif
.if END == 3
        movl    $0xd8000000, %eax
        jmp     *%eax
.endif

        movl    $text_magic, %esi
        call    print
        call    print_hex
        movl    $text_cmdline, %esi
        call    print
        call    find_cmdline
        call    print
        movl    $text_module, %esi
        call    print
        call    find_module
        call    print
        movl    $text_end, %esi
        call    print
wait:   movw    $0x3fd, %dx             # until the transmitter has sent everything
        inb     %dx, %al
        testb   $0x40, %al
        jz      wait
        movw    $0x600, %dx             # sleep type 5, sleep enable
        movb    $0x34, %al
        outb    %al, %dx
stop:   hlt
        jmp     stop

# ESI = the command line; EBX = what the loader left.
find_cmdline:
.if MULTIBOOT == 1
        movl    16(%ebx), %esi
        ret
.else
        movl    $1, %ecx
        call    find_tag
        addl    $8, %esi
        ret
.endif

# ESI = the content of the first module, which ends with a zero byte.
find_module:
.if MULTIBOOT == 1
        movl    24(%ebx), %esi
        movl    (%esi), %esi
        ret
.else
        movl    $3, %ecx
        call    find_tag
        movl    8(%esi), %esi
        ret

# ESI = the first tag of type ECX.
find_tag:
        leal    8(%ebx), %esi
1:      cmpl    %ecx, (%esi)
        je      2f
        movl    4(%esi), %eax
        addl    $7, %eax
        andl    $~7, %eax
        addl    %eax, %esi
        jmp     1b
2:      ret
.endif

# Prints the text at ESI.
print:  movw    $0x3fd, %dx
1:      inb     %dx, %al
        testb   $0x20, %al
        jz      1b
        movb    (%esi), %al
        testb   %al, %al
        jz      2f
        movw    $0x3f8, %dx
        outb    %al, %dx
        incl    %esi
        jmp     print
2:      ret

# Prints EBP as eight hexadecimal digits.
print_hex:
        movl    $8, %ecx
        movl    $digits, %edi
1:      roll    $4, %ebp
        movl    %ebp, %eax
        andl    $15, %eax
        movb    digit_names(%eax), %al
        movb    %al, (%edi)
        incl    %edi
        loop    1b
        movl    $digits, %esi
        jmp     print

digit_names:    .ascii  "0123456789abcdef"
digits:         .asciz  "........"
text_magic:     .asciz  "hobby magic="
text_cmdline:   .asciz  " cmdline=["
text_module:    .asciz  "] module=["
text_end:       .asciz  "]\n"
row:            .asciz  "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.\n"

        .bss
        .skip   4096
stack_end:
