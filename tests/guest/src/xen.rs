//! Xen itself, beside VMI: a hypervisor's own interface stays usable for a guest that knows it.
//!
//! The guest writes to Xen's console and uses an event channel, past the ROM and without its knowledge, and then wants the ROM's own
//! interrupt to come as before.

#![expect(unsafe_code, reason = "UNSAFETY: hypercalls, and the page that Xen shares")]

mod costs;
mod interrupted;
mod refusal;

use crate::boot::PAGE_OFFSET;
use crate::host::{self, CALLS};
use crate::paging::Space;
use crate::report::{Problems, Report};
use crate::rom::Rom;
use crate::{command_line, devices, traps};
use core::arch::asm;
use core::fmt::Arguments;
use core::mem::offset_of;
use vmi_hv_backend::xen::interface::{
    FORCED_EMULATION, HYPERCALL_VECTOR, PLACEMENT_SIZE, Placement, SharedInfo, console,
    event_channel, hypercall,
};

/// What Xen answers to CPUID's leaf 40000000h.
const SIGNATURE: [u8; 12] = *b"XenVMMXenVMM";

/// The line that goes to Xen's console.
const LINE: &str = "vmi-guest: this line went past the ROM\n";

/// Whether Xen is below. The prefix means something to Xen alone, so this is for guests only that have a host.
fn is_there() -> bool {
    let (ebx, ecx, edx): (u32, u32, u32);
    // SAFETY: in a ring that is not 0 an invalid instruction is the host's first, and Xen lets CPUID follow. Another host raises an
    // exception, which ends the guest with a report.
    unsafe {
        asm!(
            "xchg ebx, edi",
            ".byte {0}, {1}, {2}, {3}, {4}",
            "cpuid",
            "xchg ebx, edi",
            const FORCED_EMULATION[0],
            const FORCED_EMULATION[1],
            const FORCED_EMULATION[2],
            const FORCED_EMULATION[3],
            const FORCED_EMULATION[4],
            inout("eax") 0x4000_0000 => _,
            inout("ecx") 0 => ecx,
            out("edx") edx,
            out("edi") ebx,
            options(nostack),
        );
    }
    let words = [ebx, ecx, edx].map(u32::to_le_bytes);
    words.as_flattened() == SIGNATURE
}

/// Entries of the GDT that nothing uses.
const UNUSED: [u32; 3] = [28, 29, 30];

/// The upper half of a data segment for ring 3, of some bytes: Xen changes the limit of one that is flat.
const USER_DATA: u32 = 0x0040_f200;

/// Makes a hypercall of up to three arguments.
fn call(number: u32, arguments: [u32; 3]) -> i32 {
    let result;
    // SAFETY: callers pass what Xen reads and writes.
    unsafe {
        asm!(
            "xchg ebx, edi",
            "int {vector}",
            "xchg ebx, edi",
            vector = const HYPERCALL_VECTOR,
            inlateout("eax") number => result,
            inout("edi") arguments[0] => _,
            in("ecx") arguments[1],
            in("edx") arguments[2],
        );
    }
    result
}

/// Makes an operation on event channels.
fn operate(command: u32, arguments: &mut [u32]) -> i32 {
    call(hypercall::EVENT_CHANNEL_OP, [command, arguments.as_mut_ptr() as u32, 0])
}

/// The ROM's memory, and what the loader has left in it for the ROM.
fn granted(rom: &Rom) -> Option<(u32, Placement)> {
    let grant = rom.grant()?;
    let placement = (PAGE_OFFSET + grant.end - PLACEMENT_SIZE) as *const Placement;
    // SAFETY: the memory that the ROM was granted is mapped.
    let placement = unsafe { placement.read_volatile() };
    placement.is_valid().then_some((PAGE_OFFSET + grant.start, placement))
}

/// Where the page that Xen shares is mapped, as the loader has told the ROM.
fn shared_info(rom: &Rom) -> Option<u32> {
    granted(rom).map(|(_, placement)| PAGE_OFFSET + placement.shared_info)
}

/// A bit of one of the lists in that page.
#[derive(Clone, Copy)]
struct Bit {
    word: *mut u32,
    mask: u32,
}

impl Bit {
    fn of(shared_info: u32, list: usize, port: u32) -> Self {
        let word = shared_info + list as u32 + port / 32 * 4;
        Self { word: word as *mut u32, mask: 1 << (port % 32) }
    }

    fn is_set(self) -> bool {
        // SAFETY: a word of the page; volatile, as it is Xen's too.
        unsafe { self.word.read_volatile() & self.mask != 0 }
    }

    fn clear(self) {
        // SAFETY: as above. One instruction, for Xen sets other bits.
        unsafe { asm!("lock and [{}], {}", in(reg) self.word, in(reg) !self.mask) };
    }
}

/// Notes a rule, unless it holds.
type Expect<'a> = dyn FnMut(bool, Arguments<'_>) + 'a;

/// Tries both, where Xen is below.
pub(crate) fn run(report: &mut Report, space: Space, rom: Rom) {
    if !is_there() {
        return;
    }
    let mut point = |what: &str, work: &mut dyn FnMut(&mut Expect<'_>)| {
        let mut problems = Problems::default();
        work(&mut |holds, rule| {
            if !holds {
                problems.add(rule);
            }
        });
        report.point(format_args!("{what}"), &problems);
    };
    point("Xen's console and an event channel, beside the ROM", &mut |expect| {
        let arguments = [console::WRITE, LINE.len() as u32, LINE.as_ptr() as u32];
        let status = call(hypercall::CONSOLE_IO, arguments);
        expect(status == 0, format_args!("Xen's console answers {status}"));
        match shared_info(&rom) {
            Some(page) => use_channel(page, expect),
            None => expect(false, format_args!("nobody has said where Xen's shared page is")),
        }
    });
    point("page-table entries that Xen refuses", &mut |expect| refusal::run(space, &rom, expect));
    point("page-table entries while interrupts come", &mut |expect| {
        interrupted::entries(space, expect);
    });
    point("context switches while interrupts come", &mut |expect| interrupted::switches(expect));
    if command_line::has("costs") {
        costs::count(space);
    }
}

/// Sends an event to itself, and looks for it.
fn use_channel(page: u32, expect: &mut Expect<'_>) {
    let mut binding = [0, 0];
    let status = operate(event_channel::BIND_IPI, &mut binding);
    expect(status == 0, format_args!("Xen binds no channel: {status}"));
    let port = binding[1];
    let pending = Bit::of(page, offset_of!(SharedInfo, evtchn_pending), port);
    let mask = Bit::of(page, offset_of!(SharedInfo, evtchn_mask), port);
    mask.clear();
    for _ in 0..2 {
        let before = traps::interrupts();
        let status = operate(event_channel::SEND, &mut [port]);
        expect(status == 0, format_args!("Xen sends no event: {status}"));
        expect(pending.is_set(), format_args!("the event is not pending"));
        // What is pending comes to the ROM, which has no vector for it and leaves it to the guest.
        CALLS.EnableInterrupts();
        CALLS.DisableInterrupts();
        expect(pending.is_set(), format_args!("the event is lost"));
        let others = traps::interrupts() - before;
        expect(others == 0, format_args!("{others} interrupts came with the event"));
        pending.clear();
        let status = operate(event_channel::UNMASK, &mut [port]);
        expect(status == 0, format_args!("Xen does not unmask the channel: {status}"));
    }
    let status = operate(event_channel::CLOSE, &mut [port]);
    expect(status == 0, format_args!("Xen does not close the channel: {status}"));

    let before = traps::interrupts();
    devices::make_timer_pending();
    host::set_interrupt_flag(u32::MAX);
    host::set_interrupt_flag(0);
    devices::discard_interrupts();
    let timer = traps::interrupts() - before;
    expect(timer == 1, format_args!("{timer} timer interrupts came after that, not one"));
}
