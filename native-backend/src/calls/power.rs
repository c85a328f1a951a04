//! The end of the machine, or of one processor.

use super::port::DELAY_PORT;
use vmi_abi::flags::RebootKind;

/// The reset control register of PCI chipsets since Intel's PIIX.
const RESET_CONTROL: u16 = 0xcf9;

/// In [`RESET_CONTROL`]: reset the machine, not only the processor.
const RESET_MACHINE: u8 = 0x02;

/// In [`RESET_CONTROL`]: a change from 0 to 1 resets.
const RESET_NOW: u8 = 0x04;

/// The keyboard controller's command and status port.
const KEYBOARD_CONTROL: u8 = 0x64;

/// In the keyboard controller's status: it has not read the last command yet.
const KEYBOARD_BUSY: u8 = 0x02;

/// The keyboard controller's command that pulses the reset line.
const KEYBOARD_RESET: u8 = 0xfe;

/// System control port A of the PS/2.
const SYSTEM_CONTROL: u8 = 0x92;

/// In [`SYSTEM_CONTROL`]: a change from 0 to 1 resets the processor.
const FAST_RESET: u8 = 0x01;

/// Accesses to [`DELAY_PORT`] before the next way is tried: some 50 ms.
const PATIENCE: u32 = 50_000;

long_routines! {
    /// EAX kind; does not return.
    ///
    /// Four ways, each given time to work before the next: a soft reset begins with those that
    /// reset the processor (keyboard controller, system control port), a hard one with the
    /// chipset's, which resets the machine. The last always works: an exception without a table
    /// of handlers shuts the processor down, which a PC answers by resetting it.
    Reboot {
        "cli",
        "cmp eax, {soft}",
        "je 3f",
        "call 4f",
        "3: call 5f",
        "call 6f",
        "call 4f",
        "push 0",
        "push 0",
        "lidt [esp]",
        "int3",

        // The chipset's reset control: first the kind, then the edge. Changes EAX, ECX, EDX.
        "4: mov edx, {reset_control}",
        "mov al, {reset_machine}",
        "out dx, al",
        "or al, {reset_now}",
        "out dx, al",
        "jmp 8f",

        // The keyboard controller, once it listens. Changes EAX, ECX.
        "5: mov ecx, {patience}",
        "2: in al, {keyboard_control}",
        "test al, {keyboard_busy}",
        "loopnz 2b",
        "mov al, {keyboard_reset}",
        "out {keyboard_control}, al",
        "jmp 8f",

        // The system control port: an edge on its lowest bit. Changes EAX, ECX.
        "6: in al, {system_control}",
        "and al, {not_fast_reset}",
        "out {system_control}, al",
        "or al, {fast_reset}",
        "out {system_control}, al",

        // Time for a reset to arrive. Changes ECX.
        "8: mov ecx, {patience}",
        "7: out {delay_port}, al",
        "loop 7b",
        "ret",

        soft = const RebootKind::SOFT.0,
        reset_control = const RESET_CONTROL,
        reset_machine = const RESET_MACHINE,
        reset_now = const RESET_NOW,
        patience = const PATIENCE,
        keyboard_control = const KEYBOARD_CONTROL,
        keyboard_busy = const KEYBOARD_BUSY,
        keyboard_reset = const KEYBOARD_RESET,
        system_control = const SYSTEM_CONTROL,
        fast_reset = const FAST_RESET,
        not_fast_reset = const !FAST_RESET,
        delay_port = const DELAY_PORT,
    }
}

routines! {
    /// Does not return: what cannot be masked (an NMI) finds the processor halted again.
    Shutdown {
        "cli",
        "2: hlt",
        "jmp 2b",
    }
}
