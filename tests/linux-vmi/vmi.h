/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Memory by VMI, the paravirtualization interface whose calls a ROM of the platform serves.
 *
 * Page tables, address spaces, TLB and fault address are the ROM's business here, and what has a site in <asm/vmi_sites.h>. All else
 * stays native: this kernel wants ring 0.
 */
#ifndef _ASM_X86_VMI_H
#define _ASM_X86_VMI_H

#ifdef CONFIG_VMI

/* <asm/pgtable.h> takes these for its own, native ones. */
#define set_pte(entry, value)			vmi_set_pte(entry, value)
#define set_pte_atomic(entry, value)		vmi_set_pte_atomic(entry, value)
#define set_pmd(entry, value)			vmi_set_pmd(entry, value)
#define pte_clear(mm, address, entry)		vmi_pte_clear(mm, address, entry)
#define pmd_clear(entry)			vmi_pmd_clear(entry)
#ifdef CONFIG_X86_PAE
#define set_pud(entry, value)			vmi_set_pud(entry, value)
#endif

#define __HAVE_ARCH_ENTER_LAZY_MMU_MODE
#define arch_enter_lazy_mmu_mode()		vmi_enter_lazy_mmu()
#define arch_leave_lazy_mmu_mode()		vmi_leave_lazy()
#define arch_flush_lazy_mmu_mode()		vmi_flush_lazy_mmu()

#define __HAVE_ARCH_START_CONTEXT_SWITCH
#define arch_start_context_switch(previous)	vmi_start_context_switch(previous)
#define arch_end_context_switch(next)		vmi_end_context_switch(next)

#ifndef __ASSEMBLY__

struct mm_struct;
struct task_struct;

void vmi_set_pte(pte_t *entry, pte_t value);
void vmi_set_pte_at(struct mm_struct *mm, unsigned long address, pte_t *entry, pte_t value);
void vmi_set_pte_atomic(pte_t *entry, pte_t value);
void vmi_pte_clear(struct mm_struct *mm, unsigned long address, pte_t *entry);
void vmi_set_pmd(pmd_t *entry, pmd_t value);
void vmi_pmd_clear(pmd_t *entry);
void vmi_set_pud(pud_t *entry, pud_t value);

/* The kernel has changed an entry by itself. */
void vmi_update_pte(struct mm_struct *mm, unsigned long address, pte_t *entry);

void vmi_allocate_pte(unsigned long pfn);
void vmi_allocate_pmd(unsigned long pfn);
void vmi_allocate_pgd(unsigned long pfn, unsigned long source, unsigned long start, unsigned long count);
void vmi_release_pte(unsigned long pfn);
void vmi_release_pmd(unsigned long pfn);

void vmi_enter_lazy_mmu(void);
void vmi_leave_lazy(void);
void vmi_flush_lazy_mmu(void);
void vmi_start_context_switch(struct task_struct *previous);
void vmi_end_context_switch(struct task_struct *next);

#endif /* !__ASSEMBLY__ */
#endif /* CONFIG_VMI */
#endif /* _ASM_X86_VMI_H */
