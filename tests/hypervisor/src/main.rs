//! The reference hypervisor: runs one 32-bit guest on one virtual processor of AMD SVM.
//!
//! A multiboot loader starts it with the guest's kernel as a module, and perhaps an initramfs and a ROM as others. Guest-physical addresses are
//! the machine's; devices and interrupts are the guest's own. What the guest does not have is the hypervisor's memory.
//!
//! - [`boot`]: from the boot loader to Rust, in long mode; [`exceptions`], [`heap`], [`console`]: what a program needs,
//! - [`options`], [`multiboot`]: what was asked for, and what there is,
//! - [`machine`], [`loader`], [`place`]: memory, the guest in it, the ROM in it,
//! - [`svm`], [`vcpu`], [`canary`]: the processor's side,
//! - [`guest`]: the guest's registers and memory, and how it goes on after an exit,
//! - [`exits`], [`control`], [`cpuid`], [`msr`], [`ports`], [`acpi`], [`lend`]: what an exit needs,
//! - [`post`]: the ROM's entry; [`nested`]: tables for nested paging,
//! - [`record`], [`report`]: the last exits, the end.

#![cfg_attr(target_os = "none", no_std, no_main)]

#[cfg(target_os = "none")]
mod acpi;
#[cfg(target_os = "none")]
mod boot;
#[cfg(target_os = "none")]
mod canary;
#[cfg(target_os = "none")]
mod console;
#[cfg(target_os = "none")]
mod control;
#[cfg(target_os = "none")]
mod cpuid;
#[cfg(target_os = "none")]
mod exceptions;
#[cfg(target_os = "none")]
mod exits;
#[cfg(target_os = "none")]
mod guest;
#[cfg(target_os = "none")]
mod heap;
#[cfg(target_os = "none")]
mod lend;
#[cfg(target_os = "none")]
mod loader;
#[cfg(target_os = "none")]
mod machine;
#[cfg(target_os = "none")]
mod msr;
#[cfg(target_os = "none")]
mod multiboot;
#[cfg(target_os = "none")]
mod nested;
#[cfg(target_os = "none")]
mod options;
#[cfg(target_os = "none")]
mod place;
#[cfg(target_os = "none")]
mod ports;
#[cfg(target_os = "none")]
mod post;
#[cfg(target_os = "none")]
mod record;
#[cfg(target_os = "none")]
mod report;
#[cfg(target_os = "none")]
mod svm;
#[cfg(target_os = "none")]
mod vcpu;

/// Called by `boot` with what the loader left in EAX, EBX and CR0.
#[cfg(target_os = "none")]
extern "sysv64" fn main(magic: u32, information: u32, cr0: u32) -> ! {
    use console::line;
    use report::{Ending, give_up};

    console::initialize();
    exceptions::initialize();
    let loader = multiboot::Loader::of(magic, information);
    let options = options::Options::parse(loader.command_line());
    line!("{options}");
    let vmcb = vcpu::initialize();
    let quirks = canary::check(vmcb);
    line!("SVM is on; {quirks:?}");
    let mut machine = machine::Machine::new(&loader);

    let mut modules = loader.modules();
    let Some(kernel) = modules.next() else {
        give_up(
            Ending::BadArguments,
            format_args!("no guest: -initrd \"guest its command line,initramfs,the.rom\""),
        )
    };
    let (mut rom, mut initrd) = (None, None);
    for module in modules {
        let kind = if place::is_rom(module.bytes) { &mut rom } else { &mut initrd };
        if kind.replace(module).is_some() {
            give_up(
                Ending::BadArguments,
                format_args!("modules are a kernel, at most one initramfs and at most one ROM"),
            );
        }
    }
    match rom {
        Some(rom) => place::place(&mut machine, &rom),
        None if options.mode == options::Mode::Trap => {}
        None => give_up(Ending::BadArguments, format_args!("{options} wants a ROM as a module")),
    }
    let kernel = machine.keep(kernel);
    let initrd = initrd.map(|initrd| machine.keep(initrd));
    let mut guest = guest::Guest::new(vmcb, machine, options, quirks);
    if rom.is_some() {
        let (rom, grant) = (guest.machine.rom, guest.machine.grant);
        line!(
            "ROM at {:#x}, {:#x} bytes; granted {:#x} bytes",
            rom.guest,
            rom.length,
            grant.length
        );
        guest.run_post();
    }
    let entry = loader::load(&guest.machine, &loader, &kernel, initrd.as_ref());
    guest.run(entry, cr0)
}

#[cfg(not(target_os = "none"))]
fn main() {
    println!("the hypervisor is built by `cargo xtask build`");
}
