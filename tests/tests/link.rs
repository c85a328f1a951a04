//! What kernels link: the object and the library as linkers see them, and the header as compilers do.

use anyhow::{Context, Result, ensure};
use iced_x86::Register;
use object::read::archive::ArchiveFile;
use object::{Object, ObjectSection, ObjectSymbol, SectionFlags, SymbolKind};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use vmi_abi::{
    Argument, CALLS_3_0, Call, Ending, Place, REVISION_3_0, REVISION_13_0, REVISION_13_3,
    Registers, RelocationType, Revision, number,
};
use vmi_native_backend::binding::SiteRule;
use xtask::build::Tools;
use xtask::c_header::{self, argument_type, is_function, is_linked};
use xtask::inspect::machine::{self, Code, Machine, Memory, Region, Stop};
use xtask::inspect::random::Random;
use xtask::inspect::source::SourceArgs;
use xtask::inspect::{HIGH_BASE, Rom, answers, verify};
use xtask::link::{self, Link};
use xtask::toolchain::{CCompilers, Findings, Linker};

/// The revisions that can be linked.
const REVISIONS: [Revision; 3] = [REVISION_3_0, REVISION_13_0, REVISION_13_3];

/// What all tests here use, built once.
struct Built {
    links: Vec<Link>,
    compilers: [CCompilers; 2],
    linker: Linker,
}

fn built() -> Result<&'static Built> {
    static BUILT: OnceLock<Result<Built, String>> = OnceLock::new();
    let build = || -> Result<Built> {
        let findings = Findings::gather();
        let tools = Tools::from_findings(&findings)?;
        let links = REVISIONS
            .into_iter()
            .map(|revision| link::build(&tools, revision))
            .collect::<Result<_>>()?;
        let compilers = [findings.gcc, findings.clang];
        let [gcc, clang] = compilers.map(|found| {
            found.map_err(anyhow::Error::msg).context("`cargo xtask setup` says how to get it")
        });
        Ok(Built { links, compilers: [gcc?, clang?], linker: tools.linker })
    };
    BUILT
        .get_or_init(|| build().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// Runs a command, and wants it to succeed and to say nothing.
fn quietly(command: &mut Command) -> Result<()> {
    let done = command.output().with_context(|| format!("{command:?}"))?;
    let said = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success() && said.is_empty(), "{command:?}: {}\n{said}", done.status);
    Ok(())
}

fn write(folder: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    std::fs::write(&path, text)?;
    Ok(path)
}

#[test]
fn the_object_holds_the_image_and_nothing_else() -> Result<()> {
    for link in &built()?.links {
        let bytes = std::fs::read(&link.object)?;
        let object = object::File::parse(&*bytes)?;
        assert!(object.sections().all(|section| section.relocations().next().is_none()));
        assert!(object.symbols().all(|symbol| !symbol.is_undefined()));
        let section = object.section_by_name(".text").context("the section")?;
        assert!(section.data()? == link.rom.image.bytes, "other bytes than the image's");
        assert!(section.align() >= 32);
        let note = object.section_by_name(".note.GNU-stack").context("the note")?;
        assert_eq!((note.size(), note.flags()), (0, SectionFlags::Elf { sh_flags: 0 }));
    }
    Ok(())
}

/// Where each symbol is, and how long.
fn symbols(link: &Link) -> Result<Vec<(String, usize, usize, SymbolKind)>> {
    let bytes = std::fs::read(&link.object)?;
    let object = object::File::parse(&*bytes)?;
    object
        .symbols()
        .filter(|symbol| symbol.is_global())
        .map(|symbol| {
            let place = (symbol.address() as usize, symbol.size() as usize);
            Ok((symbol.name()?.to_owned(), place.0, place.1, symbol.kind()))
        })
        .collect()
}

#[test]
fn every_call_with_native_code_has_a_name() -> Result<()> {
    for link in &built()?.links {
        let revision = link.rom.form.revision();
        let prefix = link::prefix(revision);
        let symbols = symbols(link)?;
        let length = link.rom.image.bytes.len();
        let rom = (format!("{prefix}_rom"), 0, length, SymbolKind::Data);
        assert!(symbols.contains(&rom), "{symbols:?}");
        for (_, call) in revision.calls() {
            let name = format!("{prefix}_{}", call.name);
            let found = symbols.iter().find(|(symbol, ..)| *symbol == name);
            assert_eq!(found.is_some(), revision.has_slots() || is_linked(call), "{name}");
            if let Some((_, offset, size, kind)) = found {
                assert!(*kind == SymbolKind::Text && *size > 0 && offset + size < length, "{name}");
            }
        }
    }
    Ok(())
}

/// A name leads to what `get_reloc` answers as long as no site may be rewritten; IRET's by a call.
#[test]
fn the_names_are_those_of_the_answers() -> Result<()> {
    let [link, ..] = &built()?.links[..] else { unreachable!("three were built") };
    let symbols = symbols(link)?;
    let table = answers(&Rom::parse(&link.rom.image.bytes)?, HIGH_BASE);
    let mut answered = 0;
    for call in CALLS_3_0 {
        let number = call.number.context("a number of 3.0")?;
        let answer = table.answer_of(number).context(call.name)?;
        if answer.kind == RelocationType::NONE {
            continue;
        }
        assert_eq!(answer.kind, RelocationType::CALL_REL, "{}", call.name);
        let name = match number {
            number::IRET => "vmi_native_IRET_by_call".to_owned(),
            _ => format!("vmi_native_{}", call.name),
        };
        let found = symbols.iter().find(|(symbol, ..)| *symbol == name).context(name)?;
        assert_eq!(answer.eip - HIGH_BASE, found.1 as u32, "{}", call.name);
        answered += 1;
    }
    assert_eq!(answered, 6);
    Ok(())
}

/// The rule is in the byte that has its name: another value there makes other answers.
#[test]
fn the_kernel_can_set_the_rule_for_sites() -> Result<()> {
    let [link, ..] = &built()?.links[..] else { unreachable!("three were built") };
    let symbols = symbols(link)?;
    let (_, place, ..) = symbols
        .iter()
        .find(|(symbol, ..)| symbol == "vmi_native_site_rule")
        .context("the rule's name")?;
    let mut bytes = link.rom.image.bytes.clone();
    assert_eq!(bytes[*place], SiteRule::Never as u8);
    bytes[*place] = SiteRule::Anywhere as u8;
    bytes[*place + 1] = bytes[*place + 1].wrapping_sub(SiteRule::Anywhere as u8);
    let rom = Rom::parse(&bytes)?;
    let table = answers(&rom, HIGH_BASE);
    let calls = CALLS_3_0.iter().filter_map(|call| table.answer_of(call.number?));
    assert_eq!(calls.filter(|answer| answer.kind == RelocationType::CALL_REL).count(), 21);
    let report = verify(&rom);
    assert!(report.is_clean(), "{:#?}", report.violations);
    Ok(())
}

#[test]
fn what_is_linked_is_clean_for_the_inspector() -> Result<()> {
    for link in &built()?.links {
        for path in [&link.object, &link.archive] {
            let found = SourceArgs::of_file(path).find()?;
            let [rom] = &found.roms[..] else { anyhow::bail!("{} ROMs", found.roms.len()) };
            assert!(rom.remarks.is_empty(), "{:?}", rom.remarks);
            let name = format!("{}_rom", link::prefix(link.rom.form.revision()));
            assert_eq!(rom.origin.symbol.as_deref(), Some(&*name));
            let report = verify(&rom.rom);
            assert!(report.is_clean(), "{:#?}", report.violations);
        }
    }
    Ok(())
}

#[test]
fn the_library_has_an_index_and_no_dates() -> Result<()> {
    for link in &built()?.links {
        let bytes = std::fs::read(&link.archive)?;
        let archive = ArchiveFile::parse(&*bytes)?;
        let indexed = archive.symbols()?.context("an index")?.count();
        assert_eq!(indexed, link.symbols);
        let members: Vec<_> = archive.members().collect::<Result<_, _>>()?;
        let [member] = &members[..] else { anyhow::bail!("{} members", members.len()) };
        assert_eq!((member.date(), member.uid(), member.gid()), (Some(0), Some(0), Some(0)));
        assert!(member.data(&*bytes)? == std::fs::read(&link.object)?);
        // Built again it is the same.
        let tools = Tools::from_findings(&Findings::gather())?;
        link::build(&tools, link.rom.form.revision())?;
        assert!(std::fs::read(&link.archive)? == bytes, "other bytes when built again");
    }
    Ok(())
}

/// A value for an argument, other than that of any other argument.
fn value(position: usize) -> u64 {
    0x1122_3344_0000_1000 * (position as u64 + 1)
}

/// The variables of 32 bits that an argument comes from, with their values.
fn variables(position: usize, argument: &Argument) -> Vec<(String, u32)> {
    let value = value(position);
    let low = (format!("low_{position}"), value as u32);
    match argument.place {
        Place::Frame => Vec::new(),
        Place::EdxEax | Place::EcxEdx | Place::StackPair => {
            vec![low, (format!("high_{position}"), (value >> 32) as u32)]
        }
        _ => vec![low],
    }
}

/// An argument in C, made of its variables.
fn argument(call: &Call, position: usize, argument: &Argument) -> String {
    match argument_type(call, argument) {
        "vmi_u64 " => format!("((vmi_u64)high_{position} << 32 | low_{position})"),
        other => format!("({})low_{position}", other.trim_end()),
    }
}

/// Values that have nothing to do with a call, and are wanted again behind it.
const BESIDE: [(&str, u32); 4] =
    [("one", 0x101), ("two", 0x202), ("three", 0x303), ("four", 0x404)];

/// Where the frame for IRET lies.
const FRAME: u32 = STACK + 0x180;

/// How a call is made in C: by its prototype, or by its inline function.
fn expression(call: &Call, is_inline: bool) -> String {
    let arguments: Vec<String> = call
        .contract
        .arguments
        .iter()
        .enumerate()
        .map(|(position, declared)| match declared.place {
            Place::Frame => format!("(const void *){FRAME:#x}u"),
            _ => argument(call, position, declared),
        })
        .collect();
    let name = call.name;
    if !is_inline {
        return format!("vmi_native_{name}({})", arguments.join(", "));
    }
    let mut all = vec![format!("vmi_native_{name}")];
    if call.contract.ending == Ending::Transfers {
        all.push("VMI_RELOCATION_JUMP_REL".into());
    }
    all.extend(arguments);
    if call.number == Some(number::CPUID) {
        all.extend(["&a", "&b", "&c", "&d"].map(str::to_owned));
    }
    format!("vmi_{name}({})", all.join(", "))
}

/// Calls as the header lets C make them: by prototype and by inline function.
fn ways(call: &Call) -> Vec<bool> {
    let has_prototype = is_function(&call.contract);
    let has_inline = !has_prototype
        || (call.contract.ending == Ending::Returns
            && !call.contract.may_change().contains(Registers::STANDARD));
    [(has_prototype, false), (has_inline, true)]
        .into_iter()
        .filter_map(|(is_there, is_inline)| is_there.then_some(is_inline))
        .collect()
}

/// The name of a function that makes one call.
fn function(call: &Call, is_inline: bool) -> String {
    format!("{}_{}", if is_inline { "inline" } else { "plain" }, call.name)
}

/// A file of C that holds the header against the declaration, and makes every call.
fn program() -> String {
    let mut text = String::from("#include \"vmi.h\"\n#include \"vmi.h\"\n");
    let mut lines = 0;
    // Before C11 an array of negative size is the only assertion.
    let mut assert = |text: &mut String, holds: String| {
        lines += 1;
        let _ = writeln!(text, "typedef char assertion_{lines}[({holds}) ? 1 : -1];");
    };
    for group in c_header::groups() {
        for (name, value) in group.numbers {
            assert(&mut text, format!("{name} == {value:#x}u"));
        }
    }
    for (number, call) in REVISION_3_0.calls() {
        assert(&mut text, format!("VMI_CALL_{} == {number}", call.name));
        assert(
            &mut text,
            format!("VMI_CALLS_{0} == __builtin_offsetof(struct vmi_calls, {0})", call.name),
        );
    }
    for call in ["IRET", "SYSEXIT"] {
        assert(
            &mut text,
            format!("VMI_CALLS_{call}_kind == __builtin_offsetof(struct vmi_calls, {call}_kind)"),
        );
    }
    for (slot, call) in REVISION_13_3.calls() {
        assert(&mut text, format!("VMI_13_SLOT_{} == {slot}", call.name));
    }
    for structure in c_header::structures() {
        let name = structure.name;
        let upper = name.to_uppercase();
        assert(
            &mut text,
            format!("sizeof(struct {name}) == {} && {upper}_SIZE == {0}", structure.size),
        );
        for field in structure.fields {
            assert(
                &mut text,
                format!(
                    "__builtin_offsetof(struct {name}, {0}) == {1} && {upper}_{0} == {1} && sizeof(((struct {name} *)0)->{0}) == {2}",
                    field.name, field.offset, field.size
                ),
            );
        }
    }
    for size in [1, 2, 4, 8] {
        assert(&mut text, format!("sizeof(vmi_u{}) == {size}", size * 8));
    }
    text.push_str("#define HIDE(name) __asm__ __volatile__(\"\" : \"+g\"(name))\n");
    text.push_str("#if defined(__cplusplus)\nextern \"C\" {\n#endif\n");
    for call in CALLS_3_0.iter().filter(|call| is_linked(call)) {
        for is_inline in ways(call) {
            let name = function(call, is_inline);
            let call_it = expression(call, is_inline);
            let made = match call.contract.results {
                Registers::EAX | Registers::EDX_EAX => format!("result = {call_it}"),
                results if results.is_empty() => call_it,
                _ => format!("{call_it}; result = (vmi_u64)(b ^ (c << 1)) << 32 | (a ^ (d << 1))"),
            };
            // The compiler knows none of the values, and has to bring all of them across the call.
            let variables: Vec<(String, u32)> = call
                .contract
                .arguments
                .iter()
                .enumerate()
                .flat_map(|(position, argument)| variables(position, argument))
                .chain(BESIDE.map(|(name, value)| (name.to_owned(), value)))
                .collect();
            let each = |write: &dyn Fn(&str, u32) -> String, between: &str| {
                let all = variables.iter().map(|(name, value)| write(name, *value));
                all.collect::<Vec<_>>().join(between)
            };
            let values = each(&|name, value| format!("{name} = {value:#x}u"), ", ");
            let hidden = each(&|name, _| format!("HIDE({name});"), " ");
            let wanted = each(&|name, value| format!("{name} == {value:#x}u"), " && ");
            let locals = if call.number == Some(number::CPUID) { ", a, b, c, d" } else { "" };
            let body = format!(
                "vmi_u64 result = 0; vmi_u32 {values}{locals}; {hidden} {made}; {hidden} return {wanted} ? result : ~result;"
            );
            let _ = writeln!(text, "vmi_u64 {name}(void);\nvmi_u64 {name}(void) {{ {body} }}");
        }
    }
    text.push_str(
        "struct vmi_calls calls;
vmi_u32 start(void);
vmi_u32 start(void)
{
    const struct vmi_rom_header *rom = vmi_find_rom((const void *)VMI_SCAN_START, 3, 0);
    if (!rom)
        rom = &vmi_native_rom;
    if (vmi_init(rom))
        return 1;
    vmi_native_set_site_rule(VMI_SITE_RULE_ANYWHERE);
    if (vmi_bind(&calls, rom))
        return 2;
    vmi_DisableInterrupts(calls.DisableInterrupts);
    calls.SetCR3(calls.GetCR3());
    vmi_IRET(calls.IRET, calls.IRET_kind, &calls);
}
#if defined(__cplusplus)
}
#endif
",
    );
    text
}

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Werror", "-pedantic"];

#[test]
fn the_header_is_c_and_cxx_of_every_standard() -> Result<()> {
    let Built { links, compilers, .. } = built()?;
    let folder = tempfile::tempdir()?;
    let source = write(folder.path(), "program", &program())?;
    let include = links[0].header.parent().context("a folder")?;
    for compiler in compilers {
        let c = ["c89", "c99", "c11", "c17", "c2x"].map(|standard| (compiler.c(), "c", standard));
        let cxx = ["c++98", "c++11", "c++14", "c++17", "c++20"]
            .map(|standard| (compiler.cxx(), "c++", standard));
        for (mut command, language, standard) in c.into_iter().chain(cxx) {
            command.args(WARNINGS).args(["-O1", "-c", "-x", language]);
            command.arg(format!("-std={standard}")).arg("-I").arg(include);
            quietly(command.arg("-o").arg(folder.path().join("program.o")).arg(&source))?;
        }
    }
    Ok(())
}

/// What the page shows is what compiles.
#[test]
fn the_page_compiles() -> Result<()> {
    let Built { links, compilers, .. } = built()?;
    let page = std::fs::read_to_string(xtask::workspace().join("docs/linking.md"))?;
    let block = |language: &str| {
        let (_, rest) = page.split_once(&format!("```{language}\n")).context("a block")?;
        rest.split_once("```").map(|(code, _)| code).context("its end")
    };
    let folder = tempfile::tempdir()?;
    let assembly = format!(
        "#include \"vmi.h\"\n{}\n.section .note.GNU-stack, \"\", @progbits\n",
        block("asm")?
    );
    let sources =
        [write(folder.path(), "page.c", block("c")?)?, write(folder.path(), "page.S", &assembly)?];
    let include = links[0].header.parent().context("a folder")?;
    for compiler in compilers {
        for source in &sources {
            let mut command = compiler.c();
            command.args(WARNINGS).args(["-O2", "-c", "-I"]).arg(include);
            quietly(command.arg("-o").arg(folder.path().join("page.o")).arg(source))?;
        }
    }
    Ok(())
}

#[test]
fn assembly_gets_the_numbers() -> Result<()> {
    let Built { links, compilers, .. } = built()?;
    let folder = tempfile::tempdir()?;
    let text = "#include \"vmi.h\"\n movl $VMI_CALL_SetLazyMode, %eax\n \
                jmp *%ss:calls + VMI_CALLS_IRET\n movzwl VMI_ROM_HEADER_license_offs(%eax), %eax\n\
                .section .note.GNU-stack, \"\", @progbits\n";
    let source = write(folder.path(), "numbers.S", text)?;
    let include = links[0].header.parent().context("a folder")?;
    for compiler in compilers {
        let mut command = compiler.c();
        command.args(["-c", "-I"]).arg(include);
        quietly(command.arg("-o").arg(folder.path().join("numbers.o")).arg(&source))?;
    }
    Ok(())
}

#[test]
fn a_program_links_against_the_library_and_nothing_else() -> Result<()> {
    let Built { links, compilers, linker } = built()?;
    let folder = tempfile::tempdir()?;
    let source = write(folder.path(), "program.c", &program())?;
    let include = links[0].header.parent().context("a folder")?;
    for compiler in compilers {
        let object = folder.path().join("program.o");
        let mut command = compiler.c();
        command.args(["-O2", "-fno-pic", "-c", "-I"]).arg(include);
        quietly(command.arg("-o").arg(&object).arg(&source))?;
        let program = folder.path().join("program");
        let mut command = Command::new(&linker.path);
        command.args(["-m", "elf_i386", "--fatal-warnings", "-e", "start", "-o"]).arg(&program);
        quietly(command.arg(&object).arg(&links[0].archive))?;
        let bytes = std::fs::read(&program)?;
        let linked = object::File::parse(&*bytes)?;
        assert!(linked.symbols().all(|symbol| symbol.name() == Ok("") || !symbol.is_undefined()));
        // The image got there whole.
        let image = &links[0].rom.image.bytes;
        assert!(bytes.windows(image.len()).any(|window| window == image));
    }
    Ok(())
}

/// Where the program lies, its stack, and the first of the addresses that stand for routines.
const BASE: u32 = 0x10_0000;
const STACK: u32 = 0x8000;
const ROUTINES: u32 = 0xf000_0000;

/// Where the program returns to.
const CALLER: u32 = 0xe000_0000;

/// What the program's own registers hold while it makes its call.
const KEPT: [(Register, u32); 4] = [
    (Register::EBX, 0xb0b0_b0b0),
    (Register::EBP, 0xb1b1_b1b1),
    (Register::ESI, 0xb2b2_b2b2),
    (Register::EDI, 0xb3b3_b3b3),
];

/// Each call is executed: what C passes is where the contract wants it, the results come back, and the
/// compiler counts on nothing that the call may change.
#[test]
fn compiled_calls_keep_the_contract() -> Result<()> {
    let Built { links, compilers, linker } = built()?;
    let folder = tempfile::tempdir()?;
    let source = write(folder.path(), "program.c", &program())?;
    let include = links[0].header.parent().context("a folder")?;
    let mut executed = 0;
    for compiler in compilers {
        for level in ["-O0", "-O2", "-Os"] {
            let object = folder.path().join("program.o");
            let mut command = compiler.c();
            command.args([level, "-fno-pic", "-mno-sse", "-c", "-I"]).arg(include);
            quietly(command.arg("-o").arg(&object).arg(&source))?;
            let program = folder.path().join("program");
            let mut command = Command::new(&linker.path);
            command.args(["-m", "elf_i386", "-e", "0", "-Ttext"]).arg(format!("{BASE:#x}"));
            for (place, call) in CALLS_3_0.iter().enumerate() {
                let address = ROUTINES + 16 * place as u32;
                command.arg(format!("--defsym=vmi_native_{}={address:#x}", call.name));
            }
            command.args(["--defsym=vmi_native_rom=0", "--defsym=vmi_native_site_rule=0", "-o"]);
            quietly(command.arg(&program).arg(&object))?;
            let bytes = std::fs::read(&program)?;
            let linked = object::File::parse(&*bytes)?;
            let text = linked.section_by_name(".text").context("code")?.data()?;
            let code = Code::new(text, 1_000_000);
            for (place, call) in CALLS_3_0.iter().enumerate().filter(|(_, call)| is_linked(call)) {
                for is_inline in ways(call) {
                    let name = function(call, is_inline);
                    let symbol = linked.symbols().find(|symbol| symbol.name() == Ok(&name));
                    let start = symbol.context(name.clone())?.address() as u32;
                    execute(call, &code, text, start, ROUTINES + 16 * place as u32)
                        .with_context(|| format!("{name} {level} by {compiler}"))?;
                    executed += 1;
                }
            }
        }
    }
    assert_eq!(executed, 2 * 3 * (65 + 7));
    Ok(())
}

/// A register that changes in a call to something that nobody counts on.
const CHANGED: u32 = 0xdead_0000;

fn execute(call: &Call, code: &Code<'_>, text: &[u8], start: u32, routine: u32) -> Result<()> {
    let stack = Region { name: "stack", base: STACK, bytes: vec![0; 0x400], writable: true };
    let mut registers = machine::Registers::default();
    registers.eip = start;
    for (register, value) in KEPT {
        registers.set(register, value);
    }
    registers.set(Register::ESP, STACK + 0x200);
    let mut memory = Memory::new(text, BASE, vec![stack]);
    memory.regions[0].bytes[0x200..0x204].copy_from_slice(&CALLER.to_le_bytes());
    let mut machine = Machine::new(code, memory, registers, Random::new(1));
    machine.flat = vec![0];
    machine.stack_top = STACK + 0x400;
    ensure!(machine.run(10_000) == Stop::Left, "no call: {:?}", machine.trace.last);
    ensure!(machine.registers.eip == routine, "a call of {:#x}", machine.registers.eip);

    let get = |register| u64::from(machine.registers.get(register));
    let esp = machine.registers.get(Register::ESP);
    let word = |offset| machine.memory.regions[0].number(esp + offset, 4).context("the stack");
    let mut above = 4;
    for (position, argument) in call.contract.arguments.iter().enumerate() {
        let wanted = value(position);
        let (found, is_pair) = match argument.place {
            Place::Eax => (get(Register::EAX), false),
            Place::Edx => (get(Register::EDX), false),
            Place::Ecx => (get(Register::ECX), false),
            Place::Esi => (get(Register::ESI), false),
            Place::Edi => (get(Register::EDI), false),
            Place::EdxEax => (get(Register::EDX) << 32 | get(Register::EAX), true),
            Place::EcxEdx => (get(Register::ECX) << 32 | get(Register::EDX), true),
            Place::Stack => {
                above += 4;
                (word(above - 4)?, false)
            }
            Place::StackPair => {
                above += 8;
                (word(above - 4)? << 32 | word(above - 8)?, true)
            }
            Place::Frame => {
                ensure!(esp == FRAME, "the frame is at {esp:#x}");
                continue;
            }
        };
        let wanted = if is_pair { wanted } else { u64::from(wanted as u32) };
        ensure!(found == wanted, "{}: {found:#x} instead of {wanted:#x}", argument.name);
    }
    if call.contract.ending != Ending::Returns {
        return Ok(());
    }

    // The routine: changes all that it may, and returns.
    let places = machine::registers::GENERAL;
    let general = [
        Register::EAX,
        Register::ECX,
        Register::EDX,
        Register::EBX,
        Register::ESP,
        Register::EBP,
        Register::ESI,
        Register::EDI,
    ];
    let back = word(0)? as u32;
    for (place, (register, (_, which))) in general.into_iter().zip(places).enumerate() {
        if call.contract.may_change().contains(which) {
            machine.registers.set(register, CHANGED + place as u32);
        }
    }
    machine.registers.set(Register::ESP, esp + 4);
    machine.registers.eip = back;
    if back != CALLER {
        ensure!(machine.run(10_000) == Stop::Left, "no return: {:?}", machine.trace.last);
    }
    ensure!(machine.registers.eip == CALLER, "a return to {:#x}", machine.registers.eip);
    for (register, value) in KEPT {
        ensure!(machine.registers.get(register) == value, "{register:?} is lost");
    }
    ensure!(machine.registers.get(Register::ESP) == STACK + 0x204, "the stack is not level");
    let (a, c, d, b) = (CHANGED, CHANGED + 1, CHANGED + 2, CHANGED + 3);
    let (low, high) = match call.contract.results {
        results if results.is_empty() => (0, 0),
        Registers::EAX => (a, 0),
        Registers::EDX_EAX => (a, d),
        _ => (a ^ (d << 1), b ^ (c << 1)),
    };
    let found = (machine.registers.get(Register::EAX), machine.registers.get(Register::EDX));
    ensure!(found == (low, high), "the result is {found:#x?}");
    Ok(())
}
