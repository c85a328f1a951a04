//! Port input and output.
//!
//! The string forms count on DF = 0 and flat DS and ES, as the interface promises. A narrow read
//! is widened without touching the flags, so that all of EAX is a result.

/// A port that nothing but POST cards listens to. An access takes an ISA cycle, about a microsecond.
pub(super) const DELAY_PORT: u8 = 0x80;

routines! {
    /// EDX port -> EAX.
    INL {
        "in eax, dx",
        "ret",
    }

    /// EDX port -> EAX.
    INB {
        "in al, dx",
        "movzx eax, al",
        "ret",
    }

    /// EDX port -> EAX.
    INW {
        "in ax, dx",
        "movzx eax, ax",
        "ret",
    }

    /// EDX port, EDI destination, ECX count; changes EDI, ECX.
    INSL {
        "rep insd",
        "ret",
    }

    /// EDX port, EDI destination, ECX count; changes EDI, ECX.
    INSB {
        "rep insb",
        "ret",
    }

    /// EDX port, EDI destination, ECX count; changes EDI, ECX.
    INSW {
        "rep insw",
        "ret",
    }

    /// EAX value, EDX port.
    OUTL {
        "out dx, eax",
        "ret",
    }

    /// EAX value, EDX port.
    OUTB {
        "out dx, al",
        "ret",
    }

    /// EAX value, EDX port.
    OUTW {
        "out dx, ax",
        "ret",
    }

    /// EDX port, ESI source, ECX count; changes ESI, ECX.
    OUTSL {
        "rep outsd",
        "ret",
    }

    /// EDX port, ESI source, ECX count; changes ESI, ECX.
    OUTSB {
        "rep outsb",
        "ret",
    }

    /// EDX port, ESI source, ECX count; changes ESI, ECX.
    OUTSW {
        "rep outsw",
        "ret",
    }

    /// Nothing in, nothing out.
    IODelay {
        "out {port}, al",
        "ret",
        port = const DELAY_PORT,
    }
}
