//! Calls that a ROM of revision 3.0 answers NONE, and that a slot of revision 13.x must serve.
//!
//! A guest of 13.x enters a slot without asking, and Sanos stops unless every call has code. The native
//! backend keeps no state and knows no clock but the time-stamp counter, so most of the timer says that
//! there is nothing to tell; none of it claims to have done what it has not.

use vmi_abi::flags::CycleCounter;

routines! {
    /// -> EDX:EAX, 0; changes flags.
    ///
    /// The frequency is not known: to measure it takes a second clock and time. 0 is no frequency
    /// that a counter could have, so a guest can tell.
    GetCycleFrequency {
        "xor eax, eax",
        "xor edx, edx",
        "ret",
    }

    /// EAX counter -> EDX:EAX; changes flags.
    ///
    /// Nobody takes time away: the real and the available cycles are the processor's own, the stolen
    /// ones are 0. Any other counter reads as 0.
    GetCycleCounter {
        "cmp eax, {available}",
        "ja 2f",
        "rdtsc",
        "ret",
        "2: xor eax, eax",
        "xor edx, edx",
        "ret",
        available = const CycleCounter::AVAILABLE.0,
    }

    /// Ignores all arguments and changes nothing: an alarm would need a device, and those are the
    /// guest's. None ever arrives, and CancelAlarm says that none was armed.
    SetAlarm {
        "ret",
    }

    /// EAX flags -> EAX, 0: it was not armed; changes flags.
    CancelAlarm {
        "xor eax, eax",
        "ret",
    }

    /// -> EDX:EAX, 0; changes flags.
    ///
    /// The time is not known: the clock with the battery is the guest's device, and may be in use.
    GetWallclockTime {
        "xor eax, eax",
        "xor edx, edx",
        "ret",
    }

    /// -> EAX, 0: a wall clock that does not go is not set either; changes flags.
    WallclockUpdated {
        "xor eax, eax",
        "ret",
    }

    /// EAX register's linear address, EDX value; changes nothing.
    ///
    /// Revision 13.x names a register by its linear address, so wherever the guest mapped its local
    /// APIC, it is memory. (Linux of 3.0 passes an offset, which says nothing about that.)
    APICWrite {
        "mov [eax], edx",
        "ret",
    }

    /// EAX register's linear address -> EAX.
    APICRead {
        "mov eax, [eax]",
        "ret",
    }
}

const _: () = assert!(CycleCounter::REAL.0 < CycleCounter::AVAILABLE.0);
