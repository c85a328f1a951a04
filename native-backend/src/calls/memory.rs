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
    SetPxE, SetPxETwoArguments {
        "mov [edx], eax",
        "ret",
    }

    /// EDX:EAX value, ECX entry, stack flags -> EDX:EAX, the old value; changes ECX, flags.
    ///
    /// Two stores of 32 bits would let a table walk see half of a mapping, and another processor's
    /// accessed or dirty bit could fall between them: one locked exchange, repeated until the old
    /// value was the one read.
    SetPxELong, SetPxELongTwoArguments, SwapPxELongAtomic {
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

    /// EAX entry -> EAX.
    GetPxE {
        "mov eax, [eax]",
        "ret",
    }

    /// EAX value, EDX entry -> EAX, the old value. XCHG locks by itself.
    SwapPxE {
        "xchg [edx], eax",
        "ret",
    }

    /// EAX entry -> EDX:EAX; changes ECX, flags.
    ///
    /// Between two loads of 32 bits another processor could change the entry. The exchange reads all
    /// of it in one step: what it stores, if it stores, is what was there.
    GetPxELong {
        "push ebx",
        "push esi",
        "mov esi, eax",
        "mov ebx, eax",
        "mov ecx, edx",
        "lock cmpxchg8b [esi]",
        "pop esi",
        "pop ebx",
        "ret",
    }

    /// EAX entry -> EDX:EAX, the old value; changes ECX, flags.
    DeactivatePxELongAtomic {
        "push ebx",
        "push esi",
        "mov esi, eax",
        "xor ebx, ebx",
        "xor ecx, ecx",
        "mov eax, [esi]",
        "mov edx, [esi + 4]",
        "2: lock cmpxchg8b [esi]",
        "jnz 2b",
        "pop esi",
        "pop ebx",
        "ret",
    }

    /// EAX bit, EDX entry -> EAX, 1 if it was set; changes flags.
    ///
    /// For entries of both sizes: the instruction finds a bit beyond the first word by itself.
    TestAndSetPxEBit, TestAndSetPxELongBit {
        "lock bts [edx], eax",
        "setc al",
        "movzx eax, al",
        "ret",
    }

    /// EAX bit, EDX entry -> EAX, 1 if it was set; changes flags.
    TestAndClearPxEBit, TestAndClearPxELongBit {
        "lock btr [edx], eax",
        "setc al",
        "movzx eax, al",
        "ret",
    }

    /// Nobody to tell, and nothing held back: changes nothing. So for every notification.
    UpdatePxE, UpdatePxELong, AllocatePage, ReleasePage, SetLinearMapping, SetLazyMode, FlushDeferredCalls {
        "ret",
    }

    /// EAX frame -> EAX, the same.
    MachineToPhysical, PhysicalToMachine {
        "ret",
    }

    /// EAX flags; changes EAX, ECX, flags.
    ///
    /// Clearing CR4.PGE drops global translations too; interrupts stay out so that no handler meets
    /// a CR4 that is not the kernel's. Without global pages a reload of CR3 drops everything.
    FlushTLB {
        "test al, {global}",
        "jz 2f",
        "mov eax, cr4",
        "test al, {pge}",
        "jz 2f",
        "pushfd",
        "cli",
        "mov ecx, eax",
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
