/* From the boot loader to C, and from an interrupt to C and back. */

#include "vmi.h"

        .equ    multiboot_magic, 0x1badb002
        .equ    kernel_data, 0x10
        .section .multiboot, "a"
        .balign 4
        .long   multiboot_magic, 0, -multiboot_magic

/*
 * Flat segments, no paging, interrupts disabled. No privileged instruction is executed here, nor anywhere else in
 * this kernel: what has to be done is done by calls.
 */
        .text
        .globl  boot
boot:   movl    $stack_top, %esp
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
 * An entry of 16 bytes for each vector up to the system call's pushes it. Exceptions are the end, so it does no harm
 * that the processor pushes an error code before some.
 */
        .balign 16
        .globl  entries
entries:
        .set    vector, 0
        .rept   128 + 1
        .balign 16
        pushl   $vector
        jmp     common
        .set    vector, vector + 1
        .endr

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
        addl    $4, %esp                /* The vector. */
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
