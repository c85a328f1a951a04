//! The first and only program of a 64-bit Linux host: runs one 32-bit Linux guest under KVM, and says what KVM counted.
//!
//! `cargo xtask run --on kvm` packs it into an initramfs, with KVM's modules and the guest's files, and boots that in QEMU's
//! translator, which has AMD's SVM. So another hypervisor's shadow paging can be compared with the reference hypervisor's on the same
//! guest, on any machine. Nothing here wants the user's own `/dev/kvm`.
//!
//! The guest gets memory, KVM's own interrupt controllers and timer, a serial port, and the exit port of QEMU's debug-exit device. All
//! other ports read as ones. What it writes to the serial port goes to the host's console. When it writes to the exit port, KVM's
//! statistics follow in lines that begin with `kvm: `, and the same value ends QEMU.

#![expect(unsafe_code, reason = "UNSAFETY: port I/O, and memory given to KVM")]

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use memmap2::MmapMut;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Stdout, Write, stdout};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmi_hypervisor::linux::Kernel;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where the initramfs has things: modules in the order of their names, then the guest.
const MODULES: &str = "/modules";
const KERNEL: &str = "/guest/kernel";
const INITRD: &str = "/guest/initrd";
const LINE: &str = "/guest/line";

/// Parameters of KVM's modules: `NAME=WORDS` on the kernel's command line, behind ` -- `.
const PARAMETERS: &str = "parameters=";

/// The guest's memory: as much as it has on the reference hypervisor's machine.
const MEMORY: u64 = 512 << 20;

/// Conventional memory ends where the extended BIOS data area begins.
const CONVENTIONAL: u64 = 0x9_fc00;

/// Extended memory begins here.
const EXTENDED: u64 = 1 << 20;

/// The firmware's kind of memory that may be used.
const USABLE: u32 = 1;

/// The page of the kernel's parameters, and its command line.
const PARAMETER_PAGE: u32 = 0x9000;
const COMMAND_LINE: u32 = 0xa000;

/// Three pages below 4 GiB that KVM on Intel's processors wants; AMD's need none.
const TASK_STATE: usize = 0xfffb_d000;

/// The first serial port, eight ports and its interrupt line.
const SERIAL: std::ops::Range<u16> = 0x3f8..0x400;
const SERIAL_LINE: u32 = 4;

/// The debug-exit device, QEMU's and the guest's.
const EXIT_PORT: u16 = 0xf4;

/// What is written there if this program fails. QEMU's status: 79.
const FAILED: u8 = 0x27;

/// Interrupts of the serial port.
struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

type Port = Serial<Line, NoEvents, Stdout>;

fn main() {
    let value = match run() {
        Ok(value) => value,
        Err(error) => {
            println!("kvm: {error:#}");
            FAILED
        }
    };
    end(value)
}

/// Ends QEMU.
fn end(value: u8) -> ! {
    let _ = stdout().flush();
    // The console's last bytes leave the port.
    std::thread::sleep(std::time::Duration::from_millis(500));
    // SAFETY: asks for the right to use ports; nothing else changes.
    let allowed = unsafe {
        let result: i64;
        core::arch::asm!("syscall", inlateout("rax") 172_i64 => result, in("rdi") 3, out("rcx") _, out("r11") _);
        result
    };
    if allowed == 0 {
        // SAFETY: the exit device.
        unsafe { x86::io::outb(EXIT_PORT, value) };
    }
    println!("kvm: there is no exit device (iopl: {allowed})");
    loop {
        std::thread::park();
    }
}

/// Runs the guest to its end: what it wrote to the exit port.
fn run() -> Result<u8> {
    for (kind, place) in [("devtmpfs", "/dev"), ("debugfs", "/debug"), ("proc", "/proc")] {
        mount(None::<&str>, place, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {place}"))?;
    }
    load_modules()?;
    let kvm = Kvm::new().context("there is no KVM; has the processor SVM?")?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(TASK_STATE)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() })?;
    let mut memory = MmapMut::map_anon(MEMORY as usize)?;
    let region = kvm_userspace_memory_region {
        memory_size: MEMORY,
        userspace_addr: memory.as_mut_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the memory lives longer than the guest, and nothing of this program's lies in it.
    unsafe { vm.set_user_memory_region(region)? };
    let entry = load(&mut memory)?;
    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    enter_protected_mode(&vcpu, entry)?;
    let mut port = serial_port(&vm)?;
    let value = follow(&mut vcpu, &mut port)?;
    for (name, count) in statistics()? {
        println!("kvm: {name} {count}");
    }
    Ok(value)
}

/// Loads KVM's modules.
fn load_modules() -> Result<()> {
    let words = fs::read_to_string("/proc/cmdline")?;
    let parameters: BTreeMap<&str, &str> = words
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix(PARAMETERS)?.split_once(':'))
        .collect();
    let mut files: Vec<_> = fs::read_dir(MODULES)?.collect::<Result<_, _>>()?;
    files.sort_by_key(fs::DirEntry::file_name);
    for file in files {
        let name = file.file_name().to_string_lossy().into_owned();
        let stem = name.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-');
        let words = parameters.get(stem.trim_end_matches(".ko")).copied().unwrap_or_default();
        finit_module(File::open(file.path())?, &CString::new(words)?, ModuleInitFlags::empty())
            .with_context(|| format!("the module {name} does not load"))?;
    }
    Ok(())
}

/// Puts the guest into memory: its entry.
fn load(memory: &mut [u8]) -> Result<u32> {
    let (file, initrd) = (fs::read(KERNEL)?, fs::read(INITRD)?);
    let line = fs::read_to_string(LINE)?;
    let kernel = Kernel::parse(&file).map_err(|error| anyhow::anyhow!("the guest: {error}"))?;
    let usable = [0..CONVENTIONAL, EXTENDED..MEMORY];
    let placed = kernel
        .place(usable.iter().cloned(), initrd.len() as u64)
        .and_then(|placement| {
            let map = usable.iter().map(|range| (range.clone(), USABLE));
            let page = kernel.parameters(&placement, &line, COMMAND_LINE, map)?;
            Ok((placement, page))
        })
        .map_err(|error| anyhow::anyhow!("the guest: {error}"));
    let (placement, page) = placed?;
    for (address, bytes) in [
        (placement.kernel, kernel.system),
        (placement.initrd.start, &initrd),
        (PARAMETER_PAGE, &page),
        (COMMAND_LINE, line.as_bytes()),
    ] {
        let start = address as usize;
        memory
            .get_mut(start..start + bytes.len())
            .context("the guest does not fit into its memory")?
            .copy_from_slice(bytes);
    }
    Ok(placement.kernel)
}

/// As the 32-bit boot protocol wants it: paging off, flat segments at 10h and 18h, interrupts off, the parameters by ESI.
fn enter_protected_mode(vcpu: &VcpuFd, entry: u32) -> Result<()> {
    const PROTECTED: u64 = 1;
    let mut special = vcpu.get_sregs()?;
    let flat = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    special.cr0 |= PROTECTED;
    special.cs = flat(0x10, 0xb);
    let data = flat(0x18, 0x3);
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    vcpu.set_sregs(&special)?;
    let registers =
        kvm_regs { rip: entry.into(), rsi: PARAMETER_PAGE.into(), rflags: 2, ..Default::default() };
    Ok(vcpu.set_regs(&registers)?)
}

fn serial_port(vm: &VmFd) -> Result<Port> {
    let line = EventFd::new(EFD_NONBLOCK)?;
    vm.register_irqfd(&line, SERIAL_LINE)?;
    Ok(Serial::new(Line(line), stdout()))
}

/// Lets the guest run until it writes to the exit port.
fn follow(vcpu: &mut VcpuFd, port: &mut Port) -> Result<u8> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(EXIT_PORT, data)) => {
                return data.first().copied().context("nothing written to the exit port");
            }
            Ok(VcpuExit::IoOut(at, data)) if SERIAL.contains(&at) => {
                for (offset, byte) in ((at - SERIAL.start) as u8..).zip(data) {
                    port.write(offset, *byte)
                        .map_err(|error| anyhow::anyhow!("the serial port: {error:?}"))?;
                }
            }
            Ok(VcpuExit::IoIn(at, data)) if SERIAL.contains(&at) => {
                for (offset, byte) in ((at - SERIAL.start) as u8..).zip(data) {
                    *byte = port.read(offset);
                }
            }
            // The clock's memory: it is not about to change.
            Ok(VcpuExit::IoIn(0x71, data)) => data.fill(0),
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
            Ok(other) => bail!("the guest ended: {other:?}"),
            Err(error) if matches!(error.errno(), 4 | 11) => {}
            Err(error) => bail!("KVM_RUN: {error}"),
        }
    }
}

/// What KVM counted of the only guest that there is.
fn statistics() -> Result<BTreeMap<String, u64>> {
    let mut counts = BTreeMap::new();
    for entry in fs::read_dir("/debug/kvm").context("KVM has no statistics")? {
        let entry = entry?;
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        if let (Ok(count), Ok(name)) = (text.trim().parse(), entry.file_name().into_string()) {
            counts.insert(name, count);
        }
    }
    Ok(counts)
}
