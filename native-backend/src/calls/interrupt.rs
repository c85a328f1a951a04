//! The interrupt flag, and the ways out of the kernel.
//!
//! Linux patches these over its call sites, where every register is alive: nothing but the flags
//! may change, and GetInterruptMask's result. DS, ES, FS and GS may belong to the user already.

use x86::bits32::eflags::EFlags;

/// IOPL in EFLAGS.
const IOPL: u32 = EFlags::FLAGS_IOPL3.bits();

short_routines! {
    /// Changes nothing but IF.
    EnableInterrupts { "sti"; "ret" }

    /// Changes nothing but IF.
    DisableInterrupts { "cli"; "ret" }

    /// -> EAX, an EFLAGS image.
    GetInterruptMask { "pushfd", "pop eax"; "ret" }

    /// EAX, an EFLAGS image as GetInterruptMask answered it; changes flags.
    ///
    /// POPF loads all of the image, as the native code of every kernel here does: a caller that
    /// makes up the other bits gets what it asked for.
    SetInterruptMask { "push eax", "popfd"; "ret" }

    /// A return address lies above the frame: for a site that calls.
    IRET_by_call { ["lea esp, [esp + 4]"] "iretd" }

    /// EDX EIP, ECX ESP. The shadow of STI lets no interrupt in between. A return address is left behind with the stack.
    SYSEXIT { "sti", "sysexit" }
}

routines! {
    /// The frame is on top of the stack: for a site that jumps.
    IRET {
        "iretd",
    }

    /// Waits with interrupts enabled. The shadow of STI: one that is pending ends the wait.
    Halt {
        "sti",
        "hlt",
        "ret",
    }

    /// EAX, an EFLAGS image; changes EAX, ECX, flags.
    SetIOPLMask {
        "pushfd",
        "pop ecx",
        "and eax, {iopl}",
        "and ecx, {not_iopl}",
        "or ecx, eax",
        "push ecx",
        "popfd",
        "ret",
        iopl = const IOPL,
        not_iopl = const !IOPL,
    }
}
