//! Page tables and the translation caches.
//!
//! Hardware walks the tables in memory, so a store is all that an update needs and a notification
//! has nobody to reach. Frame numbers of the guest are those of the machine.

use vmi_abi::flags::FlushFlags;
use x86::controlregs::Cr4;

short_routines! {
    /// EAX linear address.
    InvalPage { "invlpg [eax]"; "ret" }
}

routines! {
    /// EAX value, EDX entry, ECX flags; changes nothing.
    SetPxE {
        "mov [edx], eax",
        "ret",
    }

    /// EDX:EAX value, ECX entry, stack flags; changes EAX, ECX, EDX, flags.
    ///
    /// Two stores of 32 bits would let a table walk see half of a mapping, and another processor's
    /// accessed or dirty bit could fall between them: one locked exchange, repeated until the old
    /// value was the one read.
    SetPxELong {
        "push ebx",
        "push esi",
        "mov esi, ecx",
        "mov ebx, eax",
        "mov ecx, edx",
        "mov eax, [esi]",
        "mov edx, [esi + 4]",
        "2: lock cmpxchg8b [esi]",
        "jnz 2b",
        "pop esi",
        "pop ebx",
        "ret",
    }

    /// Nobody to tell: changes nothing. So for every notification.
    UpdatePxE {
        "ret",
    }

    /// EAX frame -> EAX, the same.
    MachineToPhysical {
        "ret",
    }

    /// EAX flags; changes EAX, ECX, flags.
    ///
    /// Clearing CR4.PGE drops global translations too; interrupts stay out so that no handler meets
    /// a CR4 that is not the kernel's. Without global pages a reload of CR3 drops everything.
    FlushTLB {
        "test al, {global}",
        "jz 2f",
        "mov ecx, cr4",
        "test cl, {pge}",
        "jz 2f",
        "pushfd",
        "cli",
        "mov eax, ecx",
        "and al, {not_pge}",
        "mov cr4, eax",
        "mov cr4, ecx",
        "popfd",
        "ret",
        "2: mov eax, cr3",
        "mov cr3, eax",
        "ret",
        global = const FlushFlags::GLOBAL.bits(),
        pge = const PGE,
        not_pge = const !PGE,
    }
}

/// CR4.PGE, in the register's low byte.
const PGE: u8 = Cr4::CR4_ENABLE_GLOBAL_PAGES.bits() as u8;

pub use MachineToPhysical as PhysicalToMachine;
pub use UpdatePxE as AllocatePage;
pub use UpdatePxE as ReleasePage;
pub use UpdatePxE as SetLazyMode;
pub use UpdatePxE as SetLinearMapping;
pub use UpdatePxE as UpdatePxELong;
