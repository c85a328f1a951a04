/* SPDX-License-Identifier: GPL-2.0 */
/* Control registers of paging that VMI's ROM serves; apart from <asm/vmi.h>, since they are read before there are page tables. */
#ifndef _ASM_X86_VMI_REGISTERS_H
#define _ASM_X86_VMI_REGISTERS_H

#ifdef CONFIG_VMI

/* The ROM's calls; native code where it has none, and before there is one. */
extern unsigned long (*vmi_get_cr2)(void);
extern void (*vmi_set_cr2)(unsigned long value);
extern unsigned long (*vmi_get_cr3)(void);
extern void (*vmi_set_cr3)(unsigned long value);

void __init vmi_init(void);

/* Whether the ROM's code is there: it has to stay executable. */
bool vmi_is_code(unsigned long address);

#else

static inline void vmi_init(void) {}
static inline bool vmi_is_code(unsigned long address) { return false; }

#endif
#endif /* _ASM_X86_VMI_REGISTERS_H */
