/* --- Finding a ROM ------------------------------------------------------ */

/*
 * Whether a ROM of this revision begins here: the signatures, the major revision exactly, the minor one
 * or more, and a PCIR structure within the image. That is what Linux looks at, except for the licence:
 * Linux wants "GPL" or "GPL v2" where license_offs points to. A kernel may want what it likes.
 * At least 512 bytes must be readable.
 */
static VMI_INLINE int vmi_is_rom(const void *candidate, unsigned major, unsigned minor)
{
    const struct vmi_rom_header *rom = (const struct vmi_rom_header *)candidate;
    const vmi_u8 *bytes = (const vmi_u8 *)candidate;
    vmi_u32 length, at;

    if (rom->rom_signature != VMI_ROM_SIGNATURE || rom->vrom_signature != VMI_SIGNATURE
        || rom->api_version_maj != major || rom->api_version_min < minor)
        return 0;
    length = (vmi_u32)rom->rom_length * VMI_LENGTH_UNIT;
    at = rom->pci_header_offs;
    return length != 0 && at != 0 && at + sizeof(struct vmi_pci_header) <= length
        && bytes[at] == 'P' && bytes[at + 1] == 'C' && bytes[at + 2] == 'I' && bytes[at + 3] == 'R';
}

/*
 * The first ROM of this revision, or null. `area` is where the kernel has mapped the physical addresses
 * VMI_SCAN_START to VMI_SCAN_END. Where the ROM is found it is used: its mapping must stay.
 */
static VMI_INLINE const struct vmi_rom_header *vmi_find_rom(
    const void *area, unsigned major, unsigned minor)
{
    const vmi_u8 *start = (const vmi_u8 *)area;
    vmi_u32 at;

    for (at = 0; at < VMI_SCAN_END - VMI_SCAN_START; at += VMI_SCAN_STEP)
        if (vmi_is_rom(start + at, major, minor))
            return (const struct vmi_rom_header *)(const void *)(start + at);
    return (const struct vmi_rom_header *)0;
}

/* --- Asking a ROM of revision 3.0 --------------------------------------- */

/*
 * Prepares the ROM: in ring 0, with interrupts disabled, before anything is asked. 0 on success; any other
 * answer means that the ROM cannot be used. A hypervisor may return in another ring: look at CS afterwards.
 */
static VMI_INLINE vmi_u32 vmi_init(const struct vmi_rom_header *rom)
{
    return ((vmi_u32 (VMI_REGPARM *)(void))(vmi_address)rom->vmi_init)();
}

/* How a call is reached: VMI_CALL_..., or that with VMI_KEEP_SITE. */
static VMI_INLINE struct vmi_relocation_info vmi_get_reloc(
    const struct vmi_rom_header *rom, vmi_u32 call)
{
    struct vmi_relocation_info info = {0, 0, {0, 0, 0}};
    vmi_u64 answer = ((vmi_u64 (VMI_REGPARM *)(vmi_u32))(vmi_address)rom->get_reloc)(call);

    info.eip = (vmi_u32)answer;
    info.kind = (vmi_u8)(answer >> 32);
    return info;
}

/* The code of a slot in a ROM of revision 13.x: cast it to the call's type. */
static VMI_INLINE vmi_code vmi_13_slot(const struct vmi_rom_header *rom, unsigned slot)
{
    return (vmi_code)((vmi_address)rom + slot * VMI_13_SLOT_SIZE);
}

/* What stands for a call that is answered NOP. */
static VMI_INLINE VMI_REGPARM void vmi_nothing(void)
{
}

/*
 * The address that a call is bound to: the ROM's or, where it answers NONE, the kernel's own. `allowed` has a bit
 * for each kind of answer that the contract allows; *is_wrong becomes 1 if it is another one.
 */
static VMI_INLINE vmi_address vmi_resolve(
    const struct vmi_rom_header *rom, vmi_u32 call, unsigned allowed, vmi_address own, int *is_wrong)
{
    struct vmi_relocation_info info;

    if (!rom)
        return own;
    info = vmi_get_reloc(rom, call);
    if (info.kind > VMI_RELOCATION_NOP || !(allowed >> info.kind & 1))
        *is_wrong = 1;
    switch (info.kind) {
    case VMI_RELOCATION_CALL_REL:
    case VMI_RELOCATION_JUMP_REL:
        return info.eip;
    case VMI_RELOCATION_NOP:
        return (vmi_address)vmi_nothing;
    default:
        return own;
    }
}

/* --- Call sites --------------------------------------------------------- */

/*
 * Lets the linked-in calls put native instructions over the sites that they are called from, or not: one of
 * VMI_SITE_RULE_... It begins as NEVER, since no firmware runs the linked-in image to look at the
 * machine: the kernel decides. Set it before vmi_bind, which asks accordingly, and while the kernel's
 * text can be written.
 */
static VMI_INLINE void vmi_native_set_site_rule(vmi_u8 rule)
{
    volatile vmi_u8 *place = vmi_native_site_rule;

    place[1] = (vmi_u8)(place[1] + place[0] - rule); /* The sum of the image stays. */
    place[0] = rule;
}

/* --- What C has no call for --------------------------------------------- */

/*
 * `routine` is the address in a ROM or that of the linked-in routine. Each of these changes what its
 * contract gives away and nothing else, so the compiler keeps its values across the call.
 * `kind` is how IRET and SYSEXIT are reached: VMI_RELOCATION_CALL_REL or VMI_RELOCATION_JUMP_REL.
 */

