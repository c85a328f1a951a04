//! The functions that `vmi-abi` makes of the calls: whether each loads what its contract names, and takes its
//! result from where the contract has it.
//!
//! They are bound to code that records what it gets, and changes every register that the contract lets it.

#![expect(unsafe_code, reason = "UNSAFETY: code in assembly that stands for a ROM's")]

use crate::report;
use core::arch::naked_asm;
use vmi_abi::vmi::{Calls, Cpuid};
use vmi_abi::{
    CALLS_3_0, CallNumber, Contract, Place, Registers, RelocationInfo, RelocationType,
    for_each_call,
};

/// The registers that calls have to do with, in the order in which [`RECORD`] has them.
const REGISTERS: [Registers; 6] = [
    Registers::EAX,
    Registers::ECX,
    Registers::EDX,
    Registers::EBX,
    Registers::ESI,
    Registers::EDI,
];
const EAX: usize = 0;
const ECX: usize = 1;
const EDX: usize = 2;
const EBX: usize = 3;
const ESI: usize = 4;
const EDI: usize = 5;

/// What a call gets, and what it leaves.
#[derive(Clone, Copy)]
#[repr(C)]
struct Record {
    registers: [u32; 6],
    stack: [u32; 2],
    changes: [u32; 6],
    left: [u32; 6],
}

static mut RECORD: Record =
    Record { registers: [0; 6], stack: [0; 2], changes: [0; 6], left: [0; 6] };

/// Stands for the code of each call.
#[unsafe(naked)]
unsafe extern "C" fn recorder() {
    naked_asm!(
        "pushfd",
        "mov [{record}], eax",
        "mov [{record} + 4], ecx",
        "mov [{record} + 8], edx",
        "mov [{record} + 12], ebx",
        "mov [{record} + 16], esi",
        "mov [{record} + 20], edi",
        "push eax",
        "mov eax, [esp + 12]",
        "mov [{record} + 24], eax",
        "mov eax, [esp + 16]",
        "mov [{record} + 28], eax",
        "pop eax",
        "cmp dword ptr [{record} + 32], 0",
        "cmovne eax, [{record} + 56]",
        "cmp dword ptr [{record} + 36], 0",
        "cmovne ecx, [{record} + 60]",
        "cmp dword ptr [{record} + 40], 0",
        "cmovne edx, [{record} + 64]",
        "cmp dword ptr [{record} + 44], 0",
        "cmovne ebx, [{record} + 68]",
        "cmp dword ptr [{record} + 48], 0",
        "cmovne esi, [{record} + 72]",
        "cmp dword ptr [{record} + 52], 0",
        "cmovne edi, [{record} + 76]",
        "popfd",
        "ret",
        record = sym RECORD,
    )
}

/// What is passed as an argument, by its index, and what may come back.
trait Value {
    fn argument(index: u64) -> Self;
    fn came_from(self, left: [u32; 6]) -> bool;
}

impl Value for u32 {
    fn argument(index: u64) -> Self {
        u64::argument(index) as Self
    }
    fn came_from(self, left: [u32; 6]) -> bool {
        self == left[EAX]
    }
}

impl Value for u64 {
    fn argument(index: u64) -> Self {
        0x5a00_0000_a500_0000 + index * 0x1_0000_0001
    }
    fn came_from(self, left: [u32; 6]) -> bool {
        self == Self::from(left[EDX]) << 32 | Self::from(left[EAX])
    }
}

impl Value for Cpuid {
    fn argument(_: u64) -> Self {
        Self::default()
    }
    fn came_from(self, left: [u32; 6]) -> bool {
        [self.eax, self.ecx, self.edx, self.ebx] == [left[EAX], left[ECX], left[EDX], left[EBX]]
    }
}

impl Value for () {
    fn argument(_: u64) -> Self {}
    fn came_from(self, _: [u32; 6]) -> bool {
        true
    }
}

/// Whether the arguments came to where the contract has them.
fn arrived(contract: &Contract, Record { registers, stack, .. }: &Record) -> bool {
    let mut stack = stack.iter();
    (0..).zip(contract.arguments).all(|(index, argument)| {
        let value = u64::argument(index);
        let (low, high) = (Some(value as u32), Some((value >> 32) as u32));
        let in_register = |register: usize| Some(registers[register]);
        match argument.place {
            Place::Eax => in_register(EAX) == low,
            Place::Ecx => in_register(ECX) == low,
            Place::Edx => in_register(EDX) == low,
            Place::Esi => in_register(ESI) == low,
            Place::Edi => in_register(EDI) == low,
            Place::EdxEax => (in_register(EAX), in_register(EDX)) == (low, high),
            Place::EcxEdx => (in_register(EDX), in_register(ECX)) == (low, high),
            Place::Stack => stack.next().copied() == low,
            Place::StackPair => (stack.next().copied(), stack.next().copied()) == (low, high),
            Place::Frame => false,
        }
    })
}

macro_rules! functions {
    (
        revision_3_0 { $(
            #[doc = $summary:literal]
            $name:ident = $number:literal => Contract {
                $(slot: $slot:expr,)?
                $(arguments: args![$($argument:ident: $place:ident),*],)?
                $(results: $results:expr,)?
                $(clobbers: $clobbers:expr,)?
                $(segments: $segments:expr,)?
                $(deferral: $deferral:expr,)?
                $(answers: $answers:expr,)?
                $(site: $site:expr,)?
                $(ending: Ending::$ending:ident,)?
                $(group: $group:expr,)?
                ..Contract::STANDARD
            }
        )* }
        only_13 { $($old:tt)* }
    ) => {
        /// Makes a call, and says whether its result came back.
        ///
        /// # Safety
        ///
        /// The calls are bound to [`recorder`].
        unsafe fn make(calls: &Calls, number: CallNumber, left: [u32; 6]) -> bool {
            let mut indices = 0..;
            match number.0 {
                $( $number => function!(calls, indices, left, $name [$($($argument)*)?] $($ending)?), )*
                _ => false,
            }
        }
    };
}

/// One call. Those that go on elsewhere come to nothing that could be looked at here.
macro_rules! function {
    ($calls:ident, $indices:ident, $left:ident, $name:ident $arguments:tt Transfers) => {
        true
    };
    ($calls:ident, $indices:ident, $left:ident, $name:ident [] $($ending:ident)?) => {
        $calls.$name().came_from($left)
    };
    ($calls:ident, $indices:ident, $left:ident, $name:ident [$($argument:ident)*] $($ending:ident)?) => {{
        // In the order in which the arguments are written.
        $( let $argument = Value::argument($indices.next().unwrap_or_default()); )*
        // SAFETY: the recorder makes nothing of its arguments.
        unsafe { $calls.$name($($argument),*) }.came_from($left)
    }};
}

for_each_call!(functions);

/// Checks each function; ends the guest at the first that is wrong.
pub(crate) fn check() {
    let calls = Calls::new();
    let code = |_| Some(recorder as *const () as u32);
    let none = |_| RelocationInfo::from_registers(0, RelocationType::NONE.0.into());
    // SAFETY: the recorder changes only what the contract of the call lets it.
    let bound = unsafe { calls.bind(none, code) };
    let mut left: [u32; 6] = core::array::from_fn(|index| 0x1357_0000 + index as u32);
    for (number, call) in (0..).map(CallNumber).zip(CALLS_3_0) {
        left = left.map(|value| value.rotate_left(3) + number.0);
        let record = &raw mut RECORD;
        // SAFETY: the record is this function's and the recorder's.
        let (came_back, seen) = unsafe {
            let may_change = call.contract.may_change();
            (*record).changes = REGISTERS.map(|register| may_change.contains(register).into());
            (*record).left = left;
            let came_back = make(&calls, number, left);
            (came_back, record.read_volatile())
        };
        let transfers = call.contract.ending == vmi_abi::Ending::Transfers;
        if bound.is_err() || !came_back || !(transfers || arrived(&call.contract, &seen)) {
            report::abandon(format_args!("vmi_abi::vmi::Calls::{} breaks its contract", call.name));
        }
    }
}
