/* From the boot loader to C, and from an interrupt to C and back. */

#include "vmi.h"

        .equ    multiboot_magic, 0x1badb002
        .equ    kernel_data, 0x10
        .section .multiboot, "a"
        .balign 4
        .long   multiboot_magic, 0, -multiboot_magic

/*
 * Flat segments, no paging, interrupts disabled; EBX: what the loader has to say. No privileged instruction is
 * executed here, nor anywhere else in this kernel: what has to be done is done by calls.
 */
        .text
        .globl  boot
boot:   movl    $stack_top, %esp
        movl    %ebx, %eax
        cld
        call    kernel
        ud2

/* Loads the segment registers from the kernel's own GDT. Changes EAX. */
        .globl  load_segments
load_segments:
        ljmp    $0x08, $1f
1:      movl    $kernel_data, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        xorl    %eax, %eax
        movl    %eax, %fs
        movl    %eax, %gs
        ret

/*
 * One entry for each vector, and its address in the table `entries`: the exceptions and IRQ 0, and behind them the
 * system call. The processor pushes an error code for some, for the others a zero stands in.
 */
        .altmacro
        .macro  entry vector
        .pushsection .rodata
        .long   entry_\vector
        .popsection
entry_\vector:
        .if     \vector != 8 && \vector != 17 && (\vector < 10 || \vector > 14)
        pushl   $0
        .endif
        pushl   $\vector
        jmp     common
        .endm

        .pushsection .rodata
        .balign 4
        .globl  entries
entries:
        .popsection
        .set    vector, 0
        .rept   33
        entry   %vector
        .set    vector, vector + 1
        .endr
        entry   128

/* struct frame of kernel.c is what lies on the stack now. */
common: pushal
        pushl   %ds
        pushl   %es
        movl    $kernel_data, %eax
        movl    %eax, %ds
        movl    %eax, %es
        cld
        movl    %esp, %eax
        call    interrupt

/* Goes on in the frame that EAX points to. */
        .globl  resume
resume: movl    %eax, %esp
        popl    %es
        popl    %ds
        popal
        addl    $8, %esp
/* The segment registers are the process's from here on: memory is reached through SS alone. */
        cmpl    $VMI_RELOCATION_CALL_REL, %ss:calls + VMI_CALLS_IRET_kind
        je      1f
        jmp     *%ss:calls + VMI_CALLS_IRET
1:      call    *%ss:calls + VMI_CALLS_IRET

        .bss
        .balign 4096
        .skip   8192
stack_top:

        .section .note.GNU-stack, "", @progbits
