//! `vmi.h`, the interface for kernels in C and C++, made from its declaration in `abi`.
//!
//! A call is a function of `regparm(3)` where its contract is just that. For the others, and for those
//! that change less than such a function may, the header has an inline function around the call
//! instruction that tells the compiler exactly what the contract says. What is the same for all calls is in
//! `c_header/helpers.h`.

use crate::reference;
use std::fmt::Write;
use std::mem::offset_of;
use vmi_abi::calls::SLOTS_13;
use vmi_abi::flags::{
    AlarmFlags, CycleCounter, DeferredFlags, EntryFlags, FlushFlags, LazyMode, PageFlags,
    RebootKind,
};
use vmi_abi::header::{
    LENGTH_UNIT, PCI_DEVICE, PCI_VENDOR, PciHeader, PnpHeader, ROM_SIGNATURE, RomHeader,
    SLOT_COUNT, SLOT_SIZE, VMI_SIGNATURE,
};
use vmi_abi::probe::{SCAN_AREA, SCAN_STEP};
use vmi_abi::state::{ApState, DescriptorTable};
use vmi_abi::{
    Answers, Argument, CALLS_3_0, CALLS_13, Call, Contract, Deferral, Ending, KEEP_SITE, Place,
    REVISION_3_0, REVISION_13_0, REVISION_13_3, Registers, RelocationInfo, RelocationType,
};
use vmi_native_backend::binding::{Bind, SiteRule, answer};
use zerocopy::little_endian::{U16, U32, U64};

/// The header's name.
pub const NAME: &str = "vmi.h";

/// The most columns of a line that this program breaks.
const COLUMNS: usize = 110;

/// A structure of the interface as C sees it.
pub struct Structure {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    meaning: &'static str,
    /// Its bytes.
    pub size: usize,
    /// Its fields in their order.
    pub fields: Vec<Field>,
}

/// A field of a [`Structure`].
pub struct Field {
    /// Its name.
    pub name: &'static str,
    /// Where it lies.
    pub offset: usize,
    /// Its bytes.
    pub size: usize,
    /// Its type, and how many of them an array has.
    kind: (&'static str, Option<usize>),
}

/// A type of the interface that C has as well.
trait InC {
    /// The type's name, and how many an array has.
    const KIND: (&'static str, Option<usize>);
}

impl InC for u8 {
    const KIND: (&'static str, Option<usize>) = ("vmi_u8", None);
}
impl InC for U16 {
    const KIND: (&'static str, Option<usize>) = ("vmi_u16", None);
}
impl InC for U32 {
    const KIND: (&'static str, Option<usize>) = ("vmi_u32", None);
}
impl InC for U64 {
    const KIND: (&'static str, Option<usize>) = ("vmi_u64", None);
}
impl InC for RelocationType {
    const KIND: (&'static str, Option<usize>) = ("vmi_u8", None);
}
impl<const N: usize> InC for [u8; N] {
    const KIND: (&'static str, Option<usize>) = ("vmi_u8", Some(N));
}

/// A field by the function that reads it, which knows its type.
fn field<S, T: InC>(name: &'static str, offset: usize, _: fn(&S) -> &T) -> Field {
    Field { name, offset, size: size_of::<T>(), kind: T::KIND }
}

/// A structure with all of its fields: the pattern does not compile if one is left out.
macro_rules! structure {
    ($name:literal, $meaning:literal, $type:ident { $($field:ident),* $(,)? }) => {{
        let _ = |$type { $($field: _),* }: $type| ();
        Structure {
            name: $name,
            meaning: $meaning,
            size: size_of::<$type>(),
            fields: vec![ $( field(stringify!($field), offset_of!($type, $field), |value: &$type| &value.$field), )* ],
        }
    }};
}

/// The structures of the interface.
#[must_use]
pub fn structures() -> Vec<Structure> {
    vec![
        structure!(
            "vmi_rom_header",
            "The start of a ROM. Revision 13.x uses the first 32 bytes alike; its slots begin at 80h.",
            RomHeader {
                rom_signature,
                rom_length,
                rom_entry,
                padding_1,
                vrom_signature,
                api_version_min,
                api_version_maj,
                jump_slots,
                reserved_1,
                virtual_top,
                reserved_2,
                license_offs,
                pci_header_offs,
                pnp_header_offs,
                padding_2,
                reserved_3,
                vmi_init,
                get_reloc,
            }
        ),
        structure!(
            "vmi_pci_header",
            "The PCIR structure, at pci_header_offs.",
            PciHeader {
                signature,
                vendor,
                device,
                device_list,
                length,
                revision,
                class_code,
                image_length,
                version_minor,
                version_major,
                code_type,
                indicator,
                runtime_length,
            }
        ),
        structure!(
            "vmi_pnp_header",
            "The $PnP structure, at pnp_header_offs if that is not 0.",
            PnpHeader {
                signature,
                revision,
                length,
                next,
                reserved,
                checksum,
                device_id,
                manufacturer,
                product,
                class_code,
                indicators,
                boot_connection_vector,
                disconnect_vector,
                bootstrap_entry_vector,
                reserved_2,
                static_resources,
            }
        ),
        structure!(
            "vmi_relocation_info",
            "What get_reloc answers: the address in EAX, the kind in DL.",
            RelocationInfo { eip, kind, reserved }
        ),
        structure!(
            "vmi_descriptor_table",
            "What SetGDT, SetIDT, GetGDT and GetIDT point to. The limit is the table's bytes less one.",
            DescriptorTable { limit, base }
        ),
        structure!(
            "vmi_ap_state",
            "The state in which SetInitialAPState lets a processor begin.",
            ApState {
                cr0,
                cr2,
                cr3,
                cr4,
                efer,
                eip,
                eflags,
                eax,
                ebx,
                ecx,
                edx,
                esp,
                ebp,
                esi,
                edi,
                cs,
                ss,
                ds,
                es,
                fs,
                gs,
                ldtr,
                gdtr_limit,
                gdtr_base,
                idtr_base,
                idtr_limit,
                padding,
            }
        ),
    ]
}

/// Numbers that belong together.
pub struct Group {
    /// What they are.
    meaning: &'static str,
    /// The names, complete, and the values.
    pub numbers: Vec<(String, u32)>,
}

/// A group whose names begin alike.
fn group(meaning: &'static str, start: &str, numbers: &[(&str, u32)]) -> Group {
    let numbers =
        numbers.iter().map(|(name, value)| (format!("VMI_{start}{name}"), *value)).collect();
    Group { meaning, numbers }
}

/// A group of the flags of a set, with more of the kind.
fn flags<F: bitflags::Flags<Bits = u32>>(
    meaning: &'static str,
    start: &str,
    more: &[(&str, u32)],
) -> Group {
    let numbers: Vec<(&str, u32)> = F::FLAGS
        .iter()
        .map(|flag| (flag.name(), flag.value().bits()))
        .chain(more.iter().copied())
        .collect();
    group(meaning, start, &numbers)
}

/// Every number of the interface.
#[must_use]
pub fn groups() -> Vec<Group> {
    let numbers: Vec<(&str, u32)> =
        REVISION_3_0.calls().map(|(number, call)| (call.name, number)).collect();
    let slots: Vec<(&str, u32)> =
        REVISION_13_3.calls().map(|(number, call)| (call.name, number)).collect();
    vec![
        group(
            "Signatures and units of a ROM.",
            "",
            &[
                ("ROM_SIGNATURE", ROM_SIGNATURE.into()),
                ("SIGNATURE", VMI_SIGNATURE),
                ("LENGTH_UNIT", LENGTH_UNIT as u32),
                ("PCI_VENDOR", PCI_VENDOR.into()),
                ("PCI_DEVICE", PCI_DEVICE.into()),
            ],
        ),
        group(
            "Physical addresses at which ROMs lie, and the boundary on which each begins.",
            "SCAN_",
            &[("START", SCAN_AREA.start), ("END", SCAN_AREA.end), ("STEP", SCAN_STEP)],
        ),
        group("Numbers of the calls in revision 3.0, for get_reloc.", "CALL_", &numbers),
        group(
            "With a call's number: code that never changes the site that it is called from. A ROM that does not know \
             the bit answers NONE; ask again without it.",
            "",
            &[("KEEP_SITE", KEEP_SITE)],
        ),
        group(
            "How a call is reached: what get_reloc answers.",
            "RELOCATION_",
            &[
                ("NONE", RelocationType::NONE.0.into()),
                ("CALL_REL", RelocationType::CALL_REL.0.into()),
                ("JUMP_REL", RelocationType::JUMP_REL.0.into()),
                ("NOP", RelocationType::NOP.0.into()),
            ],
        ),
        group(
            "Slots of the calls in revision 13.x. Those from 85 on came with 13.3.",
            "13_SLOT_",
            &slots,
        ),
        group(
            "The table of slots in revision 13.x.",
            "13_",
            &[
                ("SLOT_SIZE", SLOT_SIZE as u32),
                ("SLOT_COUNT", SLOT_COUNT as u32),
                ("FIRST_SLOT", u32::from(*SLOTS_13.start())),
                ("LAST_SLOT", u32::from(*SLOTS_13.end())),
            ],
        ),
        flags::<EntryFlags>(
            "SetPxE, SetPxELong, UpdatePxE, UpdatePxELong: the level of the entry, whether it belongs to the current \
             address space (the flags then hold the linear address that it maps, in bits 12 to 31), and whether the \
             update may wait.",
            "ENTRY_",
            &[],
        ),
        flags::<PageFlags>(
            "AllocatePage, ReleasePage: the level of the table, and what is in it. PAE_13 is PAE in revision 13.x.",
            "PAGE_",
            &[("PAE_13", PageFlags::PAE_13)],
        ),
        flags::<FlushFlags>("FlushTLB: translations that are not global, and all.", "FLUSH_", &[]),
        flags::<DeferredFlags>("FlushDeferredCalls of revision 13.x.", "13_DEFERRED_", &[]),
        flags::<AlarmFlags>(
            "SetAlarm, CancelAlarm: above the number of the counter.",
            "ALARM_",
            &[("COUNTER_MASK", AlarmFlags::COUNTER_MASK)],
        ),
        group(
            "SetLazyMode: which updates may wait. OFF makes all of them visible.",
            "LAZY_",
            &[("OFF", LazyMode::OFF.0), ("MMU", LazyMode::MMU.0), ("CPU", LazyMode::CPU.0)],
        ),
        group(
            "GetCycleCounter, and the counters of alarms.",
            "CYCLES_",
            &[
                ("REAL", CycleCounter::REAL.0),
                ("AVAILABLE", CycleCounter::AVAILABLE.0),
                ("STOLEN", CycleCounter::STOLEN.0),
            ],
        ),
        group(
            "Reboot: the processor, or the machine.",
            "REBOOT_",
            &[("SOFT", RebootKind::SOFT.0), ("HARD", RebootKind::HARD.0)],
        ),
        group(
            "Which call sites the linked-in calls may rewrite: none; by one byte at a time, where an emulator runs several \
             processors; within an aligned word of eight bytes, with several processors; all, with one processor.",
            "SITE_RULE_",
            &[
                ("NEVER", SiteRule::Never as u32),
                ("ONE_BYTE", SiteRule::OneByte as u32),
                ("IN_A_WORD", SiteRule::InAWord as u32),
                ("ANYWHERE", SiteRule::Anywhere as u32),
            ],
        ),
    ]
}

/// The header.
#[must_use]
pub fn text() -> String {
    let mut text = String::from(HEAD);
    for group in groups() {
        comment(&mut text, group.meaning);
        let width = group.numbers.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in group.numbers {
            let value = if value < 100 { value.to_string() } else { format!("{value:#x}") };
            line(&mut text, format_args!("#define {name:<width$} {value}"));
        }
        text.push('\n');
    }
    text.push_str(
        "/* --- Offsets in structures, and their sizes -------------------------------- */\n\n",
    );
    for structure in structures() {
        let name = structure.name.to_uppercase();
        let width = structure.fields.iter().map(|field| field.name.len()).max().unwrap_or(0).max(4);
        for field in &structure.fields {
            line(&mut text, format_args!("#define {name}_{:<width$} {}", field.name, field.offset));
        }
        line(&mut text, format_args!("#define {name}_{:<width$} {}\n", "SIZE", structure.size));
    }
    comment(
        &mut text,
        "Offsets in struct vmi_calls: the address that each call is bound to, and behind them how IRET and SYSEXIT \
         are reached.",
    );
    let width = CALLS_3_0.iter().map(|call| call.name.len()).max().unwrap_or(0);
    for (number, call) in REVISION_3_0.calls() {
        line(&mut text, format_args!("#define VMI_CALLS_{:<width$} {}", call.name, number * 4));
    }
    for (name, number) in kinds().zip(CALLS_3_0.len()..) {
        line(&mut text, format_args!("#define VMI_CALLS_{name:<width$} {}", number * 4));
    }

    text.push_str(TYPES);
    for structure in structures() {
        write_structure(&mut text, &structure);
    }
    text.push_str(
        "/* --- The calls, and the linked-in routines ---------------------------------- */\n\n",
    );
    comment(
        &mut text,
        "A call's type is that of a function where C can call it, and vmi_code where only assembly can: for those, and \
         for those that change less than a function may, there is an inline function vmi_... below. Arguments and \
         results name their registers; [4] is the word at 4(%esp) on entry. The linked-in routines need \
         libvmi_native.a; they leave the sites alone that they are called from.",
    );
    text.push('\n');
    for call in all_calls() {
        write_call(&mut text, call);
    }
    write_images(&mut text);
    write_table(&mut text);
    text.push_str(HELPERS);
    for call in all_calls().filter(|call| !is_function(&call.contract) || is_narrow(&call.contract))
    {
        write_wrapper(&mut text, call);
    }
    write_bind(&mut text);
    text.push_str(TAIL);
    text
}

const HEAD: &str = "\
/*
 * vmi.h: the Virtual Machine Interface for kernels of 32-bit x86.
 *
 * Generated by `cargo xtask build --link` from the declaration of the interface. Do not edit.
 *
 * For C from C89 on and C++ from C++98 on, by GCC and Clang, without any other header. Assemblers that use the
 * C preprocessor get the numbers and offsets. The code to link is libvmi_native.a.
 *
 * A kernel finds a ROM (vmi_find_rom), prepares it (vmi_init) and binds all calls (vmi_bind): to the ROM's code, or
 * to the linked-in routines where the ROM answers NONE or there is no ROM.
 *
 * MIT OR GPL-2.0-only
 */
#ifndef VMI_H
#define VMI_H

#if !defined(__i386__)
#error \"the interface is for 32-bit x86\"
#endif

/* --- Numbers ---------------------------------------------------------------- */

";

const TYPES: &str = "
#if !defined(__ASSEMBLER__)

typedef __UINT8_TYPE__ vmi_u8;
typedef __UINT16_TYPE__ vmi_u16;
typedef __UINT32_TYPE__ vmi_u32;
/* Before C99 and C++11 there is no standard type of 64 bits. */
typedef unsigned int vmi_u64 __attribute__((__mode__(__DI__)));

/* A linear address as a number. */
typedef __UINTPTR_TYPE__ vmi_address;

/* Code that C cannot call by itself. */
typedef void (*vmi_code)(void);

/* How a call gets its arguments: in EAX, EDX and ECX, then on the stack. */
#define VMI_REGPARM __attribute__((__regparm__(3)))
#define VMI_INLINE __inline__ __attribute__((__unused__))

#if defined(__cplusplus)
extern \"C\" {
#endif

/* --- Structures ------------------------------------------------------------- */

";

const HELPERS: &str = include_str!("c_header/helpers.h");

const TAIL: &str = "
#if defined(__cplusplus)
}
#endif

#endif /* !__ASSEMBLER__ */

#endif /* VMI_H */
";

/// Every call: those of 3.0 by their numbers, then those that only 13.x has by their slots.
pub fn all_calls() -> impl Iterator<Item = &'static Call> {
    CALLS_3_0.iter().chain(CALLS_13.iter().flatten().copied().filter(|call| call.number.is_none()))
}

/// Whether the object of revision 3.0 has a routine for a call.
#[must_use]
pub fn is_linked(call: &Call) -> bool {
    call.number.is_some() && answer(call, Bind::Call).0.has_address()
}

/// Whether a call is a function of `regparm(3)`.
#[must_use]
pub fn is_function(contract: &Contract) -> bool {
    // What is free: EAX, EDX, ECX in this order, then the stack.
    let mut free: &[Place] = &[Place::Eax, Place::Edx, Place::Ecx];
    let fits = contract.arguments.iter().all(|argument| {
        let (taken, wanted) = match argument.place {
            Place::EdxEax | Place::EcxEdx | Place::StackPair if free.len() >= 2 => {
                let pair = if free[0] == Place::Eax { Place::EdxEax } else { Place::EcxEdx };
                (2, pair)
            }
            Place::EdxEax | Place::EcxEdx | Place::StackPair => (free.len(), Place::StackPair),
            _ => (1.min(free.len()), free.first().copied().unwrap_or(Place::Stack)),
        };
        free = &free[taken..];
        argument.place == wanted
    });
    let results = [Registers::empty(), Registers::EAX, Registers::EDX_EAX];
    fits && contract.ending != Ending::Transfers
        && results.contains(&contract.results)
        && Registers::STANDARD.contains(contract.clobbers)
}

/// Whether a call leaves registers alone that a function may change.
fn is_narrow(contract: &Contract) -> bool {
    contract.ending == Ending::Returns && !contract.may_change().contains(Registers::STANDARD)
}

/// The type that C gives to an argument.
#[must_use]
pub fn argument_type(call: &Call, argument: &Argument) -> &'static str {
    match (argument.place, argument.name) {
        (Place::EdxEax | Place::EcxEdx | Place::StackPair, _) => "vmi_u64 ",
        (_, "table") if call.name.starts_with("Set") => "const struct vmi_descriptor_table *",
        (_, "buffer") => "struct vmi_descriptor_table *",
        (_, "state") => "const struct vmi_ap_state *",
        (_, "table" | "entry" | "destination") => "void *",
        (_, "source") | (Place::Frame, _) => "const void *",
        _ => "vmi_u32 ",
    }
}

/// The type of a call's result.
fn result_type(contract: &Contract) -> &'static str {
    match contract.results {
        Registers::EAX => "vmi_u32",
        Registers::EDX_EAX => "vmi_u64",
        _ => "void",
    }
}

/// The name of an argument in C, which takes some words for itself.
fn parameter(argument: &Argument) -> &'static str {
    match argument.name {
        "register" => "which_register",
        name => name,
    }
}

/// The parameters of a call.
fn parameters(call: &Call) -> Vec<String> {
    let typed =
        |argument: &Argument| format!("{}{}", argument_type(call, argument), parameter(argument));
    call.contract.arguments.iter().map(typed).collect()
}

/// Parameters as C lists them.
fn list(parameters: &[String]) -> String {
    if parameters.is_empty() { "void".into() } else { parameters.join(", ") }
}

/// The fields that say how the calls are reached that do not return to their site.
fn kinds() -> impl Iterator<Item = String> {
    transfers().map(|call| format!("{}_kind", call.name))
}

fn transfers() -> impl Iterator<Item = &'static Call> {
    CALLS_3_0.iter().filter(|call| call.contract.ending == Ending::Transfers)
}

/// Adds a line. Writing to a string cannot fail.
fn line(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    let _ = writeln!(text, "{arguments}");
}

/// Adds a comment, broken into lines. A line break in it stays.
fn comment(text: &mut String, words: &str) {
    let mut lines = Vec::new();
    for paragraph in words.lines() {
        let mut last = String::new();
        for word in paragraph.split_whitespace() {
            if last.len() + word.len() > COLUMNS - 4 {
                lines.push(std::mem::take(&mut last));
            }
            if !last.is_empty() {
                last.push(' ');
            }
            last.push_str(word);
        }
        lines.push(last);
    }
    match &lines[..] {
        [single] => line(text, format_args!("/* {single} */")),
        _ => {
            text.push_str("/*\n");
            for words in lines {
                line(text, format_args!(" * {words}"));
            }
            text.push_str(" */\n");
        }
    }
}

fn write_structure(text: &mut String, structure: &Structure) {
    comment(text, structure.meaning);
    line(text, format_args!("struct {} {{", structure.name));
    for Field { name, kind: (kind, count), offset, .. } in &structure.fields {
        let count = count.map(|count| format!("[{count}]")).unwrap_or_default();
        let field = format!("{kind:<7} {name}{count};");
        line(text, format_args!("    {field:<36} /* {offset:3} */"));
    }
    text.push_str("} __attribute__((__packed__));\n\n");
}

/// What a call does, its registers, its type and the linked-in routine.
fn write_call(text: &mut String, call: &Call) {
    let Call { name, contract, .. } = call;
    let mut words = match (call.number, contract.slot) {
        (Some(number), Some(slot)) => format!("{name}, {} (13.x: {}).", number.0, slot.number),
        (Some(number), None) => format!("{name}, {}.", number.0),
        (None, slot) => {
            format!("{name} (13.x only: {}).", slot.map_or(0, |slot| slot.number))
        }
    };
    let _ = write!(words, " {}", reference::summary(call));
    let mut facts = Vec::new();
    if !contract.arguments.is_empty() {
        facts.push(format!("in: {}", reference::arguments(contract.arguments)));
    }
    if !contract.results.is_empty() {
        facts.push(match contract.results {
            Registers::EDX_EAX => "out: EDX:EAX".to_owned(),
            results => format!("out: {}", reference::registers(results)),
        });
    }
    let clobbers = contract.clobbers.difference(contract.results);
    if contract.ending == Ending::Returns && !clobbers.is_empty() {
        facts.push(format!("changes: {}", reference::registers(clobbers)));
    }
    match contract.deferral {
        Deferral::Never => {}
        Deferral::LazyMmu => facts.push("may wait in lazy MMU mode".into()),
        Deferral::LazyCpu => facts.push("may wait in lazy CPU mode".into()),
    }
    if !facts.is_empty() {
        let _ = write!(words, "\n{}", facts.join("; "));
    }
    comment(text, &words);

    if is_function(contract) {
        let (result, parameters) = (result_type(contract), parameters(call));
        let typedef = format!("typedef {result} (VMI_REGPARM *vmi_{name}_fn)");
        declaration(text, &typedef, &parameters, ";");
        if is_linked(call) {
            let routine = format!("extern VMI_REGPARM {result} vmi_native_{name}");
            declaration(text, &routine, &parameters, ";");
        }
    } else {
        line(text, format_args!("typedef vmi_code vmi_{name}_fn;"));
        if is_linked(call) {
            line(text, format_args!("extern void vmi_native_{name}(void);"));
        }
    }
    text.push('\n');
}

/// What else the libraries define.
fn write_images(text: &mut String) {
    comment(
        text,
        "IRET for a site that calls: a return address lies above the frame. vmi_native_IRET is for a site that jumps.",
    );
    text.push_str("extern void vmi_native_IRET_by_call(void);\n\n");
    comment(
        text,
        "The linked-in ROM: vmi_init and get_reloc work as in any other. Then the rule for call sites, a byte of an \
         instruction, and the byte that keeps the sum of the image.",
    );
    text.push_str("extern const struct vmi_rom_header vmi_native_rom;\n");
    text.push_str("extern vmi_u8 vmi_native_site_rule[2];\n\n");
    comment(text, "The linked-in ROMs of revision 13.x, in libraries of their own.");
    for revision in [REVISION_13_0, REVISION_13_3] {
        let prefix = crate::link::prefix(revision);
        line(text, format_args!("extern const struct vmi_rom_header {prefix}_rom;"));
    }
    text.push('\n');
}

fn write_table(text: &mut String) {
    comment(
        text,
        "What each call is bound to. Null: the ROM does not serve it, and there is no linked-in routine. The kinds are \
         VMI_RELOCATION_CALL_REL or VMI_RELOCATION_JUMP_REL.",
    );
    text.push_str("struct vmi_calls {\n");
    for call in CALLS_3_0 {
        line(text, format_args!("    vmi_{0}_fn {0};", call.name));
    }
    for name in kinds() {
        line(text, format_args!("    vmi_u32 {name};"));
    }
    text.push_str("};\n\n");
}

/// A register's letter in a constraint of inline assembly, and its name.
const LETTERS: [(Registers, char, &str); 6] = [
    (Registers::EAX, 'a', "eax"),
    (Registers::EBX, 'b', "ebx"),
    (Registers::ECX, 'c', "ecx"),
    (Registers::EDX, 'd', "edx"),
    (Registers::ESI, 'S', "esi"),
    (Registers::EDI, 'D', "edi"),
];

/// The register of an argument that has one to itself.
fn register(place: Place) -> Registers {
    match place {
        Place::Eax => Registers::EAX,
        Place::Edx => Registers::EDX,
        Place::Ecx => Registers::ECX,
        Place::Esi => Registers::ESI,
        Place::Edi => Registers::EDI,
        Place::EdxEax | Place::EcxEdx | Place::Stack | Place::StackPair | Place::Frame => {
            Registers::empty()
        }
    }
}

/// A call in inline assembly, with the registers of its contract.
fn write_wrapper(text: &mut String, call: &Call) {
    let Call { name, contract, .. } = call;
    if contract.ending == Ending::Transfers {
        return write_transfer(text, call);
    }
    let result = result_type(contract);
    // Several results go where the caller says.
    let is_many = !contract.results.is_empty() && result == "void";
    let mut outputs = Vec::new();
    let mut inputs = vec!["\"rm\"(routine)".to_owned()];
    let mut clobbers = vec!["\"memory\"", "\"cc\""];
    let mut wants = vec![format!("vmi_{name}_fn routine")];
    wants.extend(parameters(call));
    if contract.results == Registers::EDX_EAX {
        outputs.push("\"=A\"(result)".to_owned());
    }
    for (which, letter, register_name) in LETTERS {
        let argument = contract.arguments.iter().find(|argument| register(argument.place) == which);
        let is_result = contract.results.contains(which);
        if is_many && is_result {
            wants.push(format!("vmi_u32 *{register_name}"));
            outputs.push(format!("\"={letter}\"(*{register_name})"));
            inputs
                .extend(argument.map(|argument| format!("\"{letter}\"({})", parameter(argument))));
        } else if is_result && contract.results == Registers::EAX {
            outputs.push("\"=a\"(result)".to_owned());
            inputs.extend(argument.map(|argument| format!("\"a\"({})", parameter(argument))));
        } else if let Some(argument) = argument {
            if contract.may_change().contains(which) {
                outputs.push(format!("\"+{letter}\"({})", parameter(argument)));
            } else {
                inputs.push(format!("\"{letter}\"({})", parameter(argument)));
            }
        } else if contract.clobbers.contains(which) && !is_result {
            clobbers.push(match which {
                Registers::EAX => "\"eax\"",
                Registers::ECX => "\"ecx\"",
                _ => "\"edx\"",
            });
        }
    }
    let routine = outputs.len();
    comment(text, &reference::summary(call));
    declaration(text, &format!("static VMI_INLINE {result} vmi_{name}"), &wants, "\n{");
    if result != "void" {
        line(text, format_args!("    {result} result;\n"));
    }
    line(
        text,
        format_args!(
            "    __asm__ __volatile__(\"call *%{routine}\"\n                         :{}\n                         : {}\n                         : {});",
            outputs.iter().map(|output| format!(" {output}")).collect::<Vec<_>>().join(","),
            inputs.join(", "),
            clobbers.join(", "),
        ),
    );
    if result != "void" {
        text.push_str("    return result;\n");
    }
    text.push_str("}\n\n");
}

/// The head of a function, in two lines if one is too long.
fn declaration(text: &mut String, start: &str, parameters: &[String], end: &str) {
    let parameters = list(parameters);
    let gap = if start.len() + parameters.len() + 3 > COLUMNS { "\n    " } else { "" };
    line(text, format_args!("{start}({gap}{parameters}){end}"));
}

/// A call that goes on elsewhere. `kind` is how the routine wants to be reached.
fn write_transfer(text: &mut String, call: &Call) {
    let Call { name, contract, .. } = call;
    let mut wants = vec![format!("vmi_{name}_fn routine"), "vmi_u32 kind".to_owned()];
    wants.extend(parameters(call));
    let mut before = "";
    let mut inputs = vec!["\"r\"(routine)".to_owned()];
    for argument in contract.arguments {
        match LETTERS.iter().find(|(which, ..)| *which == register(argument.place)) {
            Some((_, letter, _)) => inputs.push(format!("\"{letter}\"({})", parameter(argument))),
            None => {
                before = "movl %1, %%esp; ";
                inputs.push(format!("\"r\"({})", parameter(argument)));
            }
        }
    }
    let inputs = inputs.join(", ");
    comment(text, &reference::summary(call));
    declaration(
        text,
        &format!("__attribute__((__noreturn__)) static VMI_INLINE void vmi_{name}"),
        &wants,
        "\n{",
    );
    line(
        text,
        format_args!(
            "    if (kind == VMI_RELOCATION_JUMP_REL)\n        __asm__ __volatile__(\"{before}jmp *%0\" : : {inputs} : \"memory\");\n    \
             else\n        __asm__ __volatile__(\"{before}call *%0\" : : {inputs} : \"memory\");\n    __builtin_unreachable();\n}}\n"
        ),
    );
}

/// Binds all calls.
fn write_bind(text: &mut String) {
    comment(
        text,
        "Binds every call of revision 3.0: to what the ROM answers, and where it answers NONE to the linked-in routine. \
         `rom` is a ROM that vmi_init has prepared, or null for none; vmi_native_rom is one like any other, and may \
         rewrite call sites if the kernel lets it. The result is 0, or 1 if the ROM gave an answer that the interface does \
         not allow: then it should not be used. A pointer that is bound may be changed only as long as it has not \
         been called through: the site may look at it no more.",
    );
    text.push_str(
        "static VMI_INLINE int vmi_bind(struct vmi_calls *calls, const struct vmi_rom_header *rom)\n{\n    int is_wrong = 0;\n\n",
    );
    for call in CALLS_3_0 {
        let name = call.name;
        let own =
            if is_linked(call) { format!("(vmi_address)vmi_native_{name}") } else { "0".into() };
        line(
            text,
            format_args!(
                "    calls->{name} = (vmi_{name}_fn)vmi_resolve(\n        rom, VMI_CALL_{name}, {:#x}, {own}, &is_wrong);",
                call.contract.answers.bits(),
            ),
        );
    }
    for call in transfers() {
        line(
            text,
            format_args!(
                "    calls->{0}_kind = rom && vmi_get_reloc(rom, VMI_CALL_{0}).kind == VMI_RELOCATION_CALL_REL\n        \
                 ? VMI_RELOCATION_CALL_REL : VMI_RELOCATION_JUMP_REL;",
                call.name
            ),
        );
    }
    text.push_str("    return is_wrong;\n}\n");
}

// The kinds of answers are the bits of their set.
const _: () = {
    assert!(Answers::NONE.bits() == 1 << RelocationType::NONE.0);
    assert!(Answers::CALL_REL.bits() == 1 << RelocationType::CALL_REL.0);
    assert!(Answers::JUMP_REL.bits() == 1 << RelocationType::JUMP_REL.0);
    assert!(Answers::NOP.bits() == 1 << RelocationType::NOP.0);
};
