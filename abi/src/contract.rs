//! What a call promises: the vocabulary in which [`crate::calls`] is written.

use crate::CallNumber;
use crate::header::SLOT_SIZE;
use bitflags::bitflags;

/// One call of the interface.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The specification's name.
    pub name: &'static str,
    /// Its number in revision 3.0; `None` for a call that only 13.x has.
    pub number: Option<CallNumber>,
    /// What it does, in a sentence.
    pub summary: &'static str,
    /// What caller and ROM owe each other.
    pub contract: Contract,
}

/// What caller and ROM owe each other in one call.
#[derive(Clone, Copy, Debug)]
pub struct Contract {
    /// Its slot in revision 13.x; `None` for a call that only 3.0 has.
    pub slot: Option<Slot>,
    /// What the caller passes, and where.
    pub arguments: &'static [Argument],
    /// Registers that hold a result on return.
    pub results: Registers,
    /// Registers, besides the results, that may be changed on return.
    pub clobbers: Registers,
    /// Which segment registers the call may use.
    pub segments: Segments,
    /// Whether the ROM may hold the update back.
    pub deferral: Deferral,
    /// The relocation types that a guest can live with.
    pub answers: Answers,
    /// How the clients that exist bind it.
    pub site: Site,
    /// How the call comes to its end.
    pub ending: Ending,
    /// Calls that must be answered all or not at all.
    pub group: Option<Group>,
}

impl Contract {
    /// The usual contract, GCC's `regparm(3)`; a row of [`crate::calls`] says where it differs.
    pub const STANDARD: Self = Self {
        slot: None,
        arguments: &[],
        results: Registers::empty(),
        clobbers: Registers::STANDARD,
        segments: Segments::Flat,
        deferral: Deferral::Never,
        answers: Answers::NONE.union(Answers::CALL_REL),
        site: Site::Pointer,
        ending: Ending::Returns,
        group: None,
    };

    /// Every register that may differ when the call returns.
    #[must_use]
    pub const fn may_change(&self) -> Registers {
        self.results.union(self.clobbers)
    }

    /// Words that the caller pushes and pops: the arguments that do not fit into registers.
    #[must_use]
    pub const fn stack_words(&self) -> u32 {
        let mut words = 0;
        let mut i = 0;
        while i < self.arguments.len() {
            words += match self.arguments[i].place {
                Place::Stack => 1,
                Place::StackPair => 2,
                _ => 0,
            };
            i += 1;
        }
        words
    }
}

/// A place in the slot table of revision 13.x.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// The slot's number: its code is at ROM base + 32 x number.
    pub number: u8,
    /// The least minor revision that has it.
    pub since_minor: u8,
}

impl Slot {
    /// Offset of its code in the image.
    #[must_use]
    pub const fn offset(self) -> usize {
        self.number as usize * SLOT_SIZE
    }

    /// A slot that every 13.x ROM has.
    #[must_use]
    pub const fn new(number: u8) -> Option<Self> {
        Some(Self { number, since_minor: 0 })
    }

    /// A slot that came with revision 13.3.
    #[must_use]
    pub const fn since_13_3(number: u8) -> Option<Self> {
        Some(Self { number, since_minor: 3 })
    }
}

/// One argument of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Argument {
    /// What it means.
    pub name: &'static str,
    /// Where the caller puts it.
    pub place: Place,
}

/// Where an argument travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// EAX.
    Eax,
    /// EDX.
    Edx,
    /// ECX.
    Ecx,
    /// ESI.
    Esi,
    /// EDI.
    Edi,
    /// 64 bits, the low half in EAX and the high half in EDX.
    EdxEax,
    /// 64 bits, the low half in EDX and the high half in ECX.
    EcxEdx,
    /// The next 32-bit word of the caller's stack; the first is at 4(%esp) on entry.
    Stack,
    /// The next two words of the caller's stack, the low half first.
    StackPair,
    /// The frame that the processor pops: IRET's.
    Frame,
}

bitflags! {
    /// A set of registers, the flags as one of them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Registers: u16 {
        /// EAX.
        const EAX = 1 << 0;
        /// ECX.
        const ECX = 1 << 1;
        /// EDX.
        const EDX = 1 << 2;
        /// EBX.
        const EBX = 1 << 3;
        /// ESP.
        const ESP = 1 << 4;
        /// EBP.
        const EBP = 1 << 5;
        /// ESI.
        const ESI = 1 << 6;
        /// EDI.
        const EDI = 1 << 7;
        /// The arithmetic flags of EFLAGS; IF, DF, TF, NT and IOPL change only where the call's meaning says so.
        const FLAGS = 1 << 8;

        /// What a `regparm(3)` function may change.
        const STANDARD = Self::EAX.bits() | Self::ECX.bits() | Self::EDX.bits() | Self::FLAGS.bits();
        /// A 64-bit result.
        const EDX_EAX = Self::EAX.bits() | Self::EDX.bits();
        /// What the instruction CPUID answers in.
        const CPUID = Self::EAX.bits() | Self::EBX.bits() | Self::ECX.bits() | Self::EDX.bits();
        /// Where a string of bytes that is read from a port ends.
        const EDI_ECX = Self::EDI.bits() | Self::ECX.bits();
        /// Where a string of bytes that is written to a port ends.
        const ESI_ECX = Self::ESI.bits() | Self::ECX.bits();
    }

    /// A set of relocation types.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Answers: u8 {
        /// The guest keeps its own native code.
        const NONE = 1 << 0;
        /// The guest calls the ROM.
        const CALL_REL = 1 << 1;
        /// The guest jumps to the ROM.
        const JUMP_REL = 1 << 2;
        /// The guest does nothing.
        const NOP = 1 << 3;
    }
}

impl Registers {
    /// No register, and no flag.
    pub const NONE: Self = Self::empty();
}

impl Answers {
    /// For a call that only tells the hypervisor something: nobody listening is an honest answer.
    pub const NOTIFICATION: Self = Self::NONE.union(Self::CALL_REL).union(Self::NOP);
    /// For a call that never returns to its site. Linux has no native code left to keep there.
    pub const TRANSFER: Self = Self::CALL_REL.union(Self::JUMP_REL);
    /// For every call of revision 13.3, whatever it may be answered in 3.0: Sanos stops at anything else.
    pub const SLOT: Self = Self::CALL_REL;
}

/// Which segment registers a call may rely on. CS and SS are always flat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segments {
    /// DS and ES are flat too.
    Flat,
    /// DS, ES, FS and GS belong to somebody else: memory only through CS or SS.
    StackOnly,
}

/// Whether an update may wait, and for what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deferral {
    /// Takes effect before the call returns.
    Never,
    /// May wait in lazy MMU mode, and wherever the call carries the DEFER flag.
    LazyMmu,
    /// May wait in lazy CPU mode.
    LazyCpu,
}

/// How the clients that exist reach a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Site {
    /// Linux writes a `call` or `jmp` over each of its sites; with NONE an indirect call to its own function stays.
    Patched,
    /// A function pointer, or a wrapper around one; with NONE the kernel's native function, or its inlined form, stays.
    Pointer,
    /// No client asks for it.
    Unused,
}

/// How a call comes to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It returns to its caller.
    Returns,
    /// It goes on in another context: IRET and SYSEXIT.
    Transfers,
    /// The machine or the processor is gone: Reboot and Shutdown.
    Stops,
}

/// Calls of which a guest takes all or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Calls 66 to 71: any answer but NONE to the first makes Linux use them all.
    Timer,
    /// APICWrite and APICRead.
    Apic,
}
