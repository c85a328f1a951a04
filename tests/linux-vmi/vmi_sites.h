/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Places where the kernel's own code may become a call into VMI's ROM: interrupts, and the ways back from them.
 *
 * A site has native code, with the length of a call by a pointer. vmi_init() puts a direct call and a NOP there if the ROM serves it.
 */
#ifndef _ASM_X86_VMI_SITES_H
#define _ASM_X86_VMI_SITES_H

#ifdef CONFIG_VMI

/* The calls' numbers in revision 3.0. */
#define VMI_ENABLE_INTERRUPTS	29
#define VMI_DISABLE_INTERRUPTS	30
#define VMI_GET_INTERRUPT_MASK	31
#define VMI_SET_INTERRUPT_MASK	32
#define VMI_IRET		33
#define VMI_SYSEXIT		34

/* A direct call, and the NOP behind it. */
#define VMI_CALL_SIZE		5
#define VMI_SITE_SIZE		6

#ifdef __ASSEMBLY__

/* Code that nothing follows: the rest of the room is never executed. */
.macro VMI_SITE call:req code:req
771:	\code
772:	.skip	VMI_SITE_SIZE - (772b - 771b), 0x90
	.pushsection .vmi_sites, "a"
	.long	771b, \call
	.popsection
.endm

#else

#include <linux/stringify.h>
#include <linux/types.h>

struct vmi_site {
	u32 address;
	u32 call;
} __packed;

extern const struct vmi_site __vmi_sites[], __vmi_sites_end[];

/* Code of as many bytes as a site has, with one NOP for its end. */
#define VMI_SITE(call, code)					\
	"771:\t" code "\n"					\
	".if . - 771b != " __stringify(VMI_SITE_SIZE) "\n"	\
	".error \"a site has its own length\"\n"		\
	".endif\n"						\
	".pushsection .vmi_sites, \"a\"\n"			\
	".long 771b, " __stringify(call) "\n"			\
	".popsection"

#define VMI_NOP_4	"; .byte 0x8d, 0x74, 0x26, 0x00"
#define VMI_NOP_5	"; .byte 0x3e, 0x8d, 0x74, 0x26, 0x00"

static __always_inline void vmi_enable_interrupts(void)
{
	asm volatile(VMI_SITE(VMI_ENABLE_INTERRUPTS, "sti" VMI_NOP_5) ::: "memory", "cc");
}

static __always_inline void vmi_disable_interrupts(void)
{
	asm volatile(VMI_SITE(VMI_DISABLE_INTERRUPTS, "cli" VMI_NOP_5) ::: "memory", "cc");
}

static __always_inline unsigned long vmi_get_interrupt_mask(void)
{
	unsigned long mask;

	asm volatile(VMI_SITE(VMI_GET_INTERRUPT_MASK, "pushf; pop %%eax" VMI_NOP_4)
		     : "=a" (mask) :: "memory", "cc");
	return mask;
}

static __always_inline void vmi_set_interrupt_mask(unsigned long mask)
{
	asm volatile(VMI_SITE(VMI_SET_INTERRUPT_MASK, "push %%eax; popf" VMI_NOP_4)
		     :: "a" (mask) : "memory", "cc");
}

#endif /* __ASSEMBLY__ */
#endif /* CONFIG_VMI */
#endif /* _ASM_X86_VMI_SITES_H */
