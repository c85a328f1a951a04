//! The machine around the processor: interrupt controller, timer, local APIC, QEMU's exit.
//!
//! A host keeps interrupt controller and timer to itself. There IRQ 0 is the ROM's alarm, which is wired to it.

#![expect(unsafe_code, reason = "UNSAFETY: the calls of a ROM")]

use crate::host::{self, CALLS};
use crate::processor::{cpuid, halt_forever, has_cmpxchg8b, inb, outb, outl, rdtsc};
use crate::{paging, traps};
use vmi_abi::flags::{AlarmFlags, CycleCounter};
use vmi_native_backend::binding::SiteRule;

/// QEMU's `isa-debug-exit`: value v ends QEMU with status 2 v + 1.
const EXIT_PORT: u16 = 0xf4;

/// The 8259s' command and mask ports.
const MASTER_COMMAND: u16 = 0x20;
const MASTER_MASK: u16 = 0x21;
const SLAVE_COMMAND: u16 = 0xa0;
const SLAVE_MASK: u16 = 0xa1;

/// The 8254's first counter and its command port.
const TIMER_COUNTER: u16 = 0x40;
const TIMER_COMMAND: u16 = 0x43;

/// The vector of IRQ 0.
pub(crate) const IRQ_BASE: u8 = 0x20;

/// The port of an emulator's debug console. It answers its own number; nothing is there in a PC.
const DEBUG_PORT: u16 = 0xe9;

/// Ends QEMU, or stops the machine.
///
/// Who knows what a PC has at the exit port: only what has a debug console may have an exit.
pub(crate) fn exit(success: bool) -> ! {
    crate::console::drain();
    if inb(DEBUG_PORT) == DEBUG_PORT as u8 {
        outl(EXIT_PORT, if success { 0x10 } else { 0x11 });
    }
    halt_forever()
}

/// Waits for microseconds, or longer: an access to this port takes one on the ISA bus.
pub(crate) fn wait(microseconds: u32) {
    const POST_CODE: u16 = 0x80;
    (0..microseconds).for_each(|_| outb(POST_CODE, 0));
}

/// Sets the 8259s to vectors [`IRQ_BASE`] and up, every line masked.
fn initialize_interrupts() {
    for (command, mask, vector, cascade) in
        [(MASTER_COMMAND, MASTER_MASK, IRQ_BASE, 4), (SLAVE_COMMAND, SLAVE_MASK, IRQ_BASE + 8, 2)]
    {
        outb(command, 0x11); // Edge-triggered, cascaded, a fourth word follows.
        outb(mask, vector);
        outb(mask, cascade);
        outb(mask, 0x01);
        outb(mask, 0xff);
    }
}

/// The alarm that stands for IRQ 0: of the real cycles, wired to it, as it is without another flag.
const ALARM: u32 = CycleCounter::REAL.0;

/// Sets it, for so many milliseconds from now on.
fn set_alarm(milliseconds: u64, flags: AlarmFlags) {
    let cycles = CALLS.GetCycleFrequency() / 1000 * milliseconds;
    // SAFETY: handlers are there, and the guest has no other alarm.
    unsafe {
        let now = CALLS.GetCycleCounter(CycleCounter::REAL.0);
        CALLS.SetAlarm(ALARM | flags.bits(), now + cycles, cycles);
    }
}

/// The interrupt line at which an alarm arrives on a host that is wired to the local APIC's timer; `None` if it does not come.
pub(crate) fn line_of_alarm() -> Option<u32> {
    let before = traps::interrupts();
    set_alarm(0, AlarmFlags::WIRED_LVTT);
    wait_for_alarm();
    CALLS.EnableInterrupts();
    CALLS.DisableInterrupts();
    discard_interrupts();
    (traps::interrupts() == before + 1).then(traps::last_line)
}

/// Waits until an alarm that is due has come: nothing shows it.
fn wait_for_alarm() {
    let end = rdtsc() + CALLS.GetCycleFrequency() / 1000 * 5;
    while rdtsc() < end {
        core::hint::spin_loop();
    }
}

/// Lets only IRQ 0 through, or nothing.
pub(crate) fn enable_timer_line(enabled: bool) {
    if host::is_hosted() {
        return; // There is no line.
    }
    outb(MASTER_MASK, if enabled { 0xfe } else { 0xff });
}

/// Whether IRQ 0 waits to be delivered.
pub(crate) fn timer_pending() -> bool {
    outb(MASTER_COMMAND, 0x0a); // The next read answers the request register.
    inb(MASTER_COMMAND) & 1 != 0
}

/// Tells the controller that an interrupt was handled.
pub(crate) fn end_of_interrupt(line: u8) {
    if host::is_hosted() {
        return; // Nobody waits for it.
    }
    if line >= 8 {
        outb(SLAVE_COMMAND, 0x20);
    }
    outb(MASTER_COMMAND, 0x20);
}

/// Takes a pending interrupt from the controller, as the processor would.
pub(crate) fn acknowledge_interrupt() {
    outb(MASTER_COMMAND, 0x0c); // Poll: the next read acknowledges.
    inb(MASTER_COMMAND);
    end_of_interrupt(0);
}

/// Raises IRQ 0 once, after so many cycles of the 8254.
fn start_timer(cycles: u16) {
    let [low, high] = cycles.to_le_bytes();
    outb(TIMER_COMMAND, 0x30); // Counter 0, both bytes, interrupt on terminal count.
    outb(TIMER_COUNTER, low);
    outb(TIMER_COUNTER, high);
}

/// Raises IRQ 0 every few milliseconds.
pub(crate) fn start_ticking() {
    if host::is_hosted() {
        return set_alarm(5, AlarmFlags::PERIODIC);
    }
    let [low, high] = 5000_u16.to_le_bytes();
    outb(TIMER_COMMAND, 0x34); // Counter 0, both bytes, rate generator.
    outb(TIMER_COUNTER, low);
    outb(TIMER_COUNTER, high);
}

/// Raises IRQ 0 and waits until the controller has it. Without interrupts it stays pending.
///
/// `false` when the machine has no such timer.
pub(crate) fn make_timer_pending() -> bool {
    discard_interrupts();
    if host::is_hosted() {
        set_alarm(0, AlarmFlags::empty());
        wait_for_alarm();
        return true;
    }
    start_timer(100);
    (0..1_000_000).any(|_| timer_pending())
}

/// Stops the timer, masks all lines and forgets what is pending: the state to start from.
pub(crate) fn discard_interrupts() {
    if host::is_hosted() {
        // SAFETY: changes nothing but the alarm.
        unsafe { CALLS.CancelAlarm(ALARM) };
        return;
    }
    outb(TIMER_COMMAND, 0x30); // Without a count the counter stands, and its line is low.
    initialize_interrupts(); // The first command word clears the request register.
}

/// What a ROM may do to call sites on this machine, as the guest sees it.
pub(crate) fn site_rule() -> SiteRule {
    const HYPERVISOR: u32 = 1 << 31;
    match processors() {
        _ if !has_cmpxchg8b() => SiteRule::Never,
        Some(1) => SiteRule::Anywhere,
        _ if cpuid(1, 0)[2] & HYPERVISOR != 0 => SiteRule::OneByte,
        _ => SiteRule::InAWord,
    }
}

/// Processors that the firmware's table of the MultiProcessor Specification lists, enabled or not,
/// times what CPUID says that each may hold; `None` without such a table.
pub(crate) fn processors() -> Option<u32> {
    let [_, ebx, _, edx] = cpuid(1, 0);
    let each = if edx & 1 << 28 != 0 { ebx >> 16 & 0xff } else { 1 };
    Some(listed_processors()? * each.max(1))
}

/// Processors in the table: the first of each package, or all of them.
fn listed_processors() -> Option<u32> {
    const POINTER_SIZE: usize = 16;
    const TABLE_HEADER: usize = 44;
    const PROCESSOR: u8 = 0;
    const PROCESSOR_SIZE: usize = 20;
    let firmware = paging::firmware();
    let pointer = firmware.chunks_exact(POINTER_SIZE).find(|chunk| {
        chunk.starts_with(b"_MP_")
            && chunk.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)) == 0
    })?;
    let number =
        |bytes: &[u8]| bytes.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
    let table = number(&pointer[4..8]).checked_sub(paging::FIRMWARE)? as usize;
    let table = firmware.get(table..).filter(|table| table.starts_with(b"PCMP"))?;
    let count = number(table.get(34..36)?);
    let mut entries = table.get(TABLE_HEADER..)?;
    let mut processors = 0;
    while processors < count && entries.first() == Some(&PROCESSOR) {
        processors += 1;
        entries = entries.get(PROCESSOR_SIZE..)?;
    }
    Some(processors)
}
