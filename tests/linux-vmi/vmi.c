// SPDX-License-Identifier: GPL-2.0
/*
 * A client of VMI: finds the platform's ROM, and hands it the kernel's work on page tables, interrupts, and the ways back from them.
 *
 * A call that the ROM does not serve keeps the native code that stands in `vmi`, or at its sites, from the start.
 */
#include <linux/init.h>
#include <linux/mm.h>
#include <linux/percpu.h>
#include <linux/sched.h>
#include <linux/string.h>
#include <asm/io.h>
#include <asm/paravirt.h>
#include <linux/pgtable.h>
#include <asm/special_insns.h>
#include <asm/text-patching.h>
#include <asm/tlbflush.h>
#include <asm/unaligned.h>
#include <asm/vmi.h>
#include <asm/vmi_registers.h>
#include <asm/vmi_sites.h>

/* The numbers in revision 3.0 of calls that have no sites. */
enum {
	VMI_SET_CR2 = 16,
	VMI_SET_CR3 = 17,
	VMI_GET_CR2 = 20,
	VMI_GET_CR3 = 21,
	VMI_SET_PXE = IS_ENABLED(CONFIG_X86_PAE) ? 39 : 38,
	VMI_UPDATE_PXE = IS_ENABLED(CONFIG_X86_PAE) ? 41 : 40,
	VMI_ALLOCATE_PAGE = 44,
	VMI_RELEASE_PAGE = 45,
	VMI_INVAL_PAGE = 46,
	VMI_FLUSH_TLB = 47,
	VMI_SET_LINEAR_MAPPING = 48,
	VMI_SET_LAZY_MODE = 73,
};

/* Flags of entries and of pages: the level of the table, and what is known of the entry. */
#define VMI_PT			0x01
#define VMI_PD			0x02
#define VMI_PDP			0x04
#define VMI_CURRENT_AS		0x10
#define VMI_CLONE		0x20
#define VMI_LINEAR_MASK		0xfffff000

/* What FlushTLB flushes. */
#define VMI_TLB			1
#define VMI_GLOBAL		2

/* The lazy modes. */
enum { VMI_LAZY_NONE, VMI_LAZY_MMU, VMI_LAZY_CPU };

/* What get_reloc answers: EAX, and DL. */
enum { VMI_RELOCATION_NONE, VMI_RELOCATION_CALL, VMI_RELOCATION_JUMP };

struct vmi_rom {
	u16 rom_signature;
	u8 rom_length;
	u8 rom_entry[4];
	u8 pad;
	u32 vmi_signature;
	u8 minor;
	u8 major;
	u8 slots_and_reserved[2];
	u32 virtual_top;
	u16 reserved;
	u16 license;
	u16 pci_header;
	u16 pnp_header;
	u8 reserved_too[100];
	u8 init[8];
	u8 get_reloc[8];
} __packed;

static const struct vmi_rom *rom;
static bool is_off __initdata;

/* Native code. */

static void native_set_entry(pteval_t value, pte_t *entry, u32 flags)
{
	native_set_pte(entry, native_make_pte(value));
}

static void native_update_entry(pte_t *entry, u32 flags) {}
static void native_allocate(u32 pfn, u32 flags, u32 source, u32 start, u32 count) {}
static void native_release(u32 pfn, u32 flags) {}
static void native_set_lazy_mode(u32 mode) {}

static struct {
	void (*set_pxe)(pteval_t value, pte_t *entry, u32 flags);
	void (*update_pxe)(pte_t *entry, u32 flags);
	void (*allocate_page)(u32 pfn, u32 flags, u32 source, u32 start, u32 count);
	void (*release_page)(u32 pfn, u32 flags);
	void (*set_lazy_mode)(u32 mode);
	void (*flush_tlb)(u32 what);
} vmi __ro_after_init = {
	.set_pxe = native_set_entry,
	.update_pxe = native_update_entry,
	.allocate_page = native_allocate,
	.release_page = native_release,
	.set_lazy_mode = native_set_lazy_mode,
};

unsigned long (*vmi_get_cr2)(void) __ro_after_init = native_read_cr2;
void (*vmi_set_cr2)(unsigned long value) __ro_after_init = native_write_cr2;
unsigned long (*vmi_get_cr3)(void) __ro_after_init = __native_read_cr3;
void (*vmi_set_cr3)(unsigned long value) __ro_after_init = native_write_cr3;

/* Page tables. */

static u32 flags_of(struct mm_struct *mm, unsigned long address, u32 level)
{
	if (mm != current->active_mm && mm != &init_mm)
		return level;
	return level | VMI_CURRENT_AS | (address & VMI_LINEAR_MASK);
}

void vmi_set_pte(pte_t *entry, pte_t value)
{
	vmi.set_pxe(native_pte_val(value), entry, VMI_PT);
}

void vmi_set_pte_at(struct mm_struct *mm, unsigned long address, pte_t *entry, pte_t value)
{
	vmi.set_pxe(native_pte_val(value), entry, flags_of(mm, address, VMI_PT));
}

void vmi_set_pte_atomic(pte_t *entry, pte_t value)
{
	native_set_pte_atomic(entry, value);
	vmi.update_pxe(entry, VMI_PT);
}

void vmi_pte_clear(struct mm_struct *mm, unsigned long address, pte_t *entry)
{
	vmi.set_pxe(0, entry, flags_of(mm, address, VMI_PT));
}

void vmi_set_pmd(pmd_t *entry, pmd_t value)
{
	vmi.set_pxe(pmd_val(value), (pte_t *)entry, VMI_PD);
}

void vmi_pmd_clear(pmd_t *entry)
{
	vmi.set_pxe(0, (pte_t *)entry, VMI_PD);
}

#ifdef CONFIG_X86_PAE
void vmi_set_pud(pud_t *entry, pud_t value)
{
	vmi.set_pxe(pud_val(value), (pte_t *)entry, VMI_PDP);
}
#endif

void vmi_update_pte(struct mm_struct *mm, unsigned long address, pte_t *entry)
{
	vmi.update_pxe(entry, flags_of(mm, address, VMI_PT));
}

void vmi_allocate_pte(unsigned long pfn)
{
	vmi.allocate_page(pfn, VMI_PT, 0, 0, 0);
}

void vmi_allocate_pmd(unsigned long pfn)
{
	vmi.allocate_page(pfn, VMI_PD, 0, 0, 0);
}

void vmi_allocate_pgd(unsigned long pfn, unsigned long source, unsigned long start, unsigned long count)
{
	vmi.allocate_page(pfn, VMI_PD | VMI_CLONE, source, start, count);
}

void vmi_release_pte(unsigned long pfn)
{
	vmi.release_page(pfn, VMI_PT);
}

void vmi_release_pmd(unsigned long pfn)
{
	vmi.release_page(pfn, VMI_PD);
}

/* Lazy modes: each processor is in one at a time, and a context switch may come in the middle of the other. */

static DEFINE_PER_CPU(u32, lazy_mode);

static void set_lazy_mode(u32 mode)
{
	this_cpu_write(lazy_mode, mode);
	vmi.set_lazy_mode(mode);
}

void vmi_enter_lazy_mmu(void)
{
	set_lazy_mode(VMI_LAZY_MMU);
}

void vmi_leave_lazy(void)
{
	set_lazy_mode(VMI_LAZY_NONE);
}

void vmi_flush_lazy_mmu(void)
{
	unsigned long flags;

	local_irq_save(flags);
	if (this_cpu_read(lazy_mode) == VMI_LAZY_MMU) {
		vmi_leave_lazy();
		vmi_enter_lazy_mmu();
	}
	local_irq_restore(flags);
}

void vmi_start_context_switch(struct task_struct *previous)
{
	if (this_cpu_read(lazy_mode) == VMI_LAZY_MMU) {
		vmi_leave_lazy();
		set_ti_thread_flag(task_thread_info(previous), TIF_LAZY_MMU_UPDATES);
	}
	set_lazy_mode(VMI_LAZY_CPU);
}

void vmi_end_context_switch(struct task_struct *next)
{
	vmi_leave_lazy();
	if (test_and_clear_ti_thread_flag(task_thread_info(next), TIF_LAZY_MMU_UPDATES))
		vmi_enter_lazy_mmu();
}

/* The TLB. */

static void flush_tlb_user(void)
{
	vmi.flush_tlb(VMI_TLB);
}

static void flush_tlb_kernel(void)
{
	vmi.flush_tlb(VMI_TLB | VMI_GLOBAL);
}

/* The ROM. */

bool vmi_is_code(unsigned long address)
{
	unsigned long start = (unsigned long)rom;

	return rom && address + PAGE_SIZE > start && address < start + rom->rom_length * 512;
}

static bool __init is_served(const struct vmi_rom *candidate)
{
	const char *license = (const char *)candidate + candidate->license;

	if (candidate->rom_signature != 0xaa55 || candidate->vmi_signature != 0x696d5663)
		return false;
	if (candidate->major != 3 || !candidate->pci_header)
		return false;
	if (!candidate->license || (strcmp(license, "GPL") && strcmp(license, "GPL v2"))) {
		pr_warn("VMI: the licence of the ROM at %#lx is not the GPL\n", __pa(candidate));
		return false;
	}
	return true;
}

static const struct vmi_rom __init *find_rom(void)
{
	unsigned long base;

	for (base = 0xc0000; base < 0xe0000; base += 2048) {
		const struct vmi_rom *candidate = isa_bus_to_virt(base);

		if (is_served(candidate))
			return candidate;
	}
	return NULL;
}

/* How the ROM serves a call, and by which code. */
static u8 __init relocation(u32 call, u32 *code)
{
	u64 (*get_reloc)(u32 call) = (void *)rom->get_reloc;
	u64 answer = get_reloc(call);

	*code = answer;
	return answer >> 32;
}

/* The call's code, or null where the ROM leaves it to the kernel. */
static void __init *served(u32 call)
{
	u32 code;

	return relocation(call, &code) == VMI_RELOCATION_CALL ? (void *)code : NULL;
}

/* Nothing else runs yet, and the kernel's text is still writable. */
static void __init patch_site(const struct vmi_site *site)
{
	u8 code[VMI_SITE_SIZE] = { [VMI_CALL_SIZE ... VMI_SITE_SIZE - 1] = 0x90 };
	u32 target;

	switch (relocation(site->call, &target)) {
	case VMI_RELOCATION_CALL:
		code[0] = CALL_INSN_OPCODE;
		break;
	case VMI_RELOCATION_JUMP:
		code[0] = JMP32_INSN_OPCODE;
		break;
	default:
		return;
	}
	put_unaligned(target - (site->address + VMI_CALL_SIZE), (u32 *)&code[1]);
	text_poke_early((void *)site->address, code, sizeof(code));
}

#define BIND(pointer, call)						\
	do {								\
		void *code = served(call);				\
		if (code)						\
			(pointer) = code;				\
	} while (0)

void __init vmi_init(void)
{
	void (*set_linear_mapping)(u32 slot, u32 start, u32 pages, u32 pfn);
	u32 (*init)(void);
	const struct vmi_site *site;
	unsigned long flags;

	if (!is_off)
		rom = find_rom();
	if (!rom)
		return;
	init = (void *)rom->init;
	local_irq_save(flags);
	if (init()) {
		pr_err("VMI: the ROM at %#lx failed to initialize\n", __pa(rom));
		rom = NULL;
		goto out;
	}
	BIND(vmi_get_cr2, VMI_GET_CR2);
	BIND(vmi_set_cr2, VMI_SET_CR2);
	BIND(vmi_get_cr3, VMI_GET_CR3);
	BIND(vmi_set_cr3, VMI_SET_CR3);
	BIND(vmi.set_pxe, VMI_SET_PXE);
	BIND(vmi.update_pxe, VMI_UPDATE_PXE);
	BIND(vmi.allocate_page, VMI_ALLOCATE_PAGE);
	BIND(vmi.release_page, VMI_RELEASE_PAGE);
	BIND(vmi.set_lazy_mode, VMI_SET_LAZY_MODE);
	BIND(pv_ops.mmu.flush_tlb_one_user, VMI_INVAL_PAGE);
	BIND(vmi.flush_tlb, VMI_FLUSH_TLB);
	if (vmi.flush_tlb) {
		pv_ops.mmu.flush_tlb_user = flush_tlb_user;
		pv_ops.mmu.flush_tlb_kernel = flush_tlb_kernel;
	}
	for (site = __vmi_sites; site < __vmi_sites_end; site++)
		patch_site(site);
	set_linear_mapping = served(VMI_SET_LINEAR_MAPPING);
	if (set_linear_mapping)
		set_linear_mapping(0, PAGE_OFFSET, MAXMEM >> PAGE_SHIFT, 0);
	pv_info.name = "vmi";
	pr_info("VMI: the ROM at %#lx serves revision 3.%u\n", __pa(rom), rom->minor);
out:
	local_irq_restore(flags);
}

static int __init parse_vmi(char *word)
{
	if (!word || strcmp(word, "off"))
		return -EINVAL;
	is_off = true;
	return 0;
}
early_param("vmi", parse_vmi);
