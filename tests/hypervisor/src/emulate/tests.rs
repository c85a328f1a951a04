#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "UNSAFETY: the processor's own arithmetic, to compare with")
)]

use super::*;
use iced_x86::{Decoder, DecoderOptions};
use std::collections::BTreeMap;
use std::{vec, vec::Vec};

/// Two frames at linear 1000h and 2000h, physical 51000h and 80000h; what is elsewhere is not mapped, and 3000h is read-only.
#[derive(Default)]
struct Memory {
    bytes: BTreeMap<u64, u8>,
    stores: Vec<(u64, usize)>,
}

const FIRST: u64 = 0x5_1000;
const SECOND: u64 = 0x8_0000;
const THIRD: u64 = 0x9_0000;

impl Bus for Memory {
    fn translate(&mut self, linear: u32, access: Access) -> Result<u64, u32> {
        let offset = u64::from(linear & 0xfff);
        let write = if access.write { 2 } else { 0 };
        match linear >> 12 {
            1 => Ok(FIRST + offset),
            2 => Ok(SECOND + offset),
            3 if !access.write => Ok(THIRD + offset),
            3 => Err(1 | write),
            _ => Err(write),
        }
    }

    fn read(&mut self, physical: u64, size: usize) -> u64 {
        assert!(physical % 4096 + size as u64 <= 4096, "one frame");
        (0..size as u64).rev().fold(0, |value, offset| {
            value << 8 | u64::from(*self.bytes.get(&(physical + offset)).unwrap_or(&0))
        })
    }

    fn write(&mut self, physical: u64, size: usize, value: u64) {
        assert!(physical % 4096 + size as u64 <= 4096, "one frame");
        self.stores.push((physical, size));
        for (offset, byte) in value.to_le_bytes().into_iter().take(size).enumerate() {
            self.bytes.insert(physical + offset as u64, byte);
        }
    }
}

impl Memory {
    fn with(physical: u64, size: usize, value: u64) -> Self {
        let mut memory = Self::default();
        memory.write(physical, size, value);
        memory.stores.clear();
        memory
    }
}

fn run(code: &[u8], state: &mut State, memory: &mut Memory) -> Result<Next, Stop> {
    let instruction = Decoder::new(32, code, DecoderOptions::NONE).decode();
    assert!(!instruction.is_invalid() && instruction.len() == code.len(), "{code:02x?}");
    execute(&instruction, state, memory)
}

/// EBX = 1000h, the rest different from each other.
fn state() -> State {
    State {
        registers: [0x1234_5678, 3, 0x8765_4321, 0x1000, 0, 0, 0x2000, 0x1ff0],
        eflags: 2,
        ..State::default()
    }
}

#[test]
fn each_size_is_stored_and_nothing_else_changes() {
    for (code, size, value) in [
        (&[0x88, 0x03][..], 1, 0x78),                      // mov [ebx], al
        (&[0x88, 0x23], 1, 0x56),                          // mov [ebx], ah
        (&[0x66, 0x89, 0x03], 2, 0x5678),                  // mov [ebx], ax
        (&[0x89, 0x03], 4, 0x1234_5678),                   // mov [ebx], eax
        (&[0x0f, 0xc3, 0x03], 4, 0x1234_5678),             // movnti [ebx], eax
        (&[0xc7, 0x03, 0x67, 0, 0, 0x80], 4, 0x8000_0067), // mov dword ptr [ebx], 80000067h
        (&[0xa3, 0, 0x10, 0, 0], 4, 0x1234_5678),          // mov [1000h], eax
        (&[0x67, 0x89, 0x87, 0, 0x10], 4, 0x1234_5678),    // mov [bx + 1000h], eax
    ] {
        let mut registers = state();
        if code[0] == 0x67 {
            registers.registers[EBX] = 0xffff_0000;
        }
        let (before, mut memory) = (registers, Memory::default());
        assert_eq!(run(code, &mut registers, &mut memory), Ok(Next::Instruction), "{code:02x?}");
        assert_eq!(memory.stores, [(FIRST, size)], "{code:02x?}");
        assert_eq!(memory.read(FIRST, 8), value, "{code:02x?}");
        assert_eq!(registers, before, "{code:02x?}");
    }
}

#[test]
fn an_operand_in_two_pages_is_stored_to_both_or_to_none() {
    let mut registers = state();
    registers.registers[EBX] = 0x1ffd;
    let mut memory = Memory::default();
    assert_eq!(run(&[0x89, 0x03], &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!((memory.read(FIRST + 0xffd, 2), memory.read(FIRST + 0xfff, 1)), (0x5678, 0x34));
    assert_eq!(memory.read(SECOND, 1), 0x12);

    registers.registers[EBX] = 0x2ffe;
    let (before, mut memory) = (registers, Memory::default());
    let stop = run(&[0xf0, 0x83, 0x03, 0x01], &mut registers, &mut memory); // lock add dword ptr [ebx], 1
    assert_eq!(stop, Err(Stop::PageFault { linear: 0x3000, error: 3 }), "the fault of a store");
    assert!(memory.stores.is_empty());
    assert_eq!(registers, before);
}

#[test]
fn strings_go_one_step_at_a_time() {
    let mut registers = state();
    let mut memory = Memory::with(SECOND, 8, 0x1111_2222_3333_4444);
    let code = [0xf3, 0xa5]; // rep movsd
    for (left, next) in [(2, Next::Same), (1, Next::Same), (0, Next::Instruction)] {
        assert_eq!(run(&code, &mut registers, &mut memory), Ok(next));
        assert_eq!(registers.registers[ECX], left);
    }
    assert_eq!((registers.registers[ESI], registers.registers[EDI]), (0x200c, 0x1ffc));
    assert_eq!(memory.read(FIRST + 0xff0, 8), 0x1111_2222_3333_4444);
    assert_eq!(run(&code, &mut registers, &mut memory), Ok(Next::Instruction), "ECX is 0");
    assert_eq!(registers.registers[EDI], 0x1ffc);

    registers.eflags |= DIRECTION;
    assert_eq!(run(&[0xab], &mut registers, &mut memory), Ok(Next::Instruction)); // stosd
    assert_eq!(registers.registers[EDI], 0x1ff8);
    assert_eq!(memory.read(FIRST + 0xffc, 4), 0x1234_5678);
}

#[test]
fn bits_of_a_register_reach_beyond_the_operand_and_those_of_an_immediate_do_not() {
    let mut registers = state();
    registers.registers[EBX] = 0x1004;
    registers.registers[EAX] = -31i32 as u32;
    let mut memory = Memory::default();
    assert_eq!(run(&[0x0f, 0xab, 0x03], &mut registers, &mut memory), Ok(Next::Instruction)); // bts [ebx], eax
    assert_eq!((memory.read(FIRST, 8), registers.eflags & CARRY), (2, 0));
    assert_eq!(run(&[0x0f, 0xb3, 0x03], &mut registers, &mut memory), Ok(Next::Instruction)); // btr [ebx], eax
    assert_eq!((memory.read(FIRST, 8), registers.eflags & CARRY), (0, CARRY));
    let code = [0x0f, 0xba, 0x3b, 33]; // btc dword ptr [ebx], 33
    assert_eq!(run(&code, &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!((memory.read(FIRST, 8), registers.eflags & CARRY), (2 << 32, 0));
}

#[test]
fn exchanges_compare_and_store() {
    let cmpxchg = [0xf0, 0x0f, 0xb1, 0x13]; // lock cmpxchg [ebx], edx
    let mut registers = state();
    let mut memory = Memory::with(FIRST, 4, 0x1234_5678);
    assert_eq!(run(&cmpxchg, &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!((memory.read(FIRST, 4), registers.eflags & ZERO), (0x8765_4321, ZERO));
    assert_eq!(registers.registers[EAX], 0x1234_5678);
    assert_eq!(run(&cmpxchg, &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!((memory.read(FIRST, 4), registers.eflags & ZERO), (0x8765_4321, 0));
    assert_eq!(registers.registers[EAX], 0x8765_4321);

    let mut registers = state();
    let mut memory = Memory::with(FIRST, 8, 0x8765_4321_1234_5678);
    let cmpxchg8b = [0xf0, 0x0f, 0xc7, 0x0b]; // lock cmpxchg8b [ebx]
    assert_eq!(run(&cmpxchg8b, &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!(memory.read(FIRST, 8), 3 << 32 | 0x1000);
    assert_eq!((memory.stores.clone(), registers.eflags), (vec![(FIRST, 8)], 2 | ZERO));
    assert_eq!(run(&cmpxchg8b, &mut registers, &mut memory), Ok(Next::Instruction));
    assert_eq!((registers.registers[EAX], registers.registers[EDX]), (0x1000, 3));
    assert_eq!(registers.eflags, 2);

    let mut registers = state();
    let mut memory = Memory::with(FIRST, 4, 5);
    assert_eq!(run(&[0x87, 0x03], &mut registers, &mut memory), Ok(Next::Instruction)); // xchg [ebx], eax
    assert_eq!((memory.read(FIRST, 4), registers.registers[EAX]), (0x1234_5678, 5));
    assert_eq!(run(&[0x0f, 0xc1, 0x03], &mut registers, &mut memory), Ok(Next::Instruction)); // xadd [ebx], eax
    assert_eq!((memory.read(FIRST, 4), registers.registers[EAX]), (0x1234_567d, 0x1234_5678));
}

#[test]
fn what_is_not_known_is_said_to_be_and_changes_nothing() {
    for code in
        [&[0xdb, 0x1b][..], &[0x0f, 0x29, 0x03], &[0x50], &[0xd1, 0x23], &[0x8c, 0x1b], &[0x6d]]
    {
        let mut registers = state();
        let (before, mut memory) = (registers, Memory::default());
        assert_eq!(run(code, &mut registers, &mut memory), Err(Stop::Unknown), "{code:02x?}");
        assert_eq!((registers, memory.stores.len()), (before, 0), "{code:02x?}");
    }
}

/// Values with all kinds of carries.
const VALUES: [u32; 14] = [
    0,
    1,
    2,
    0xf,
    0x10,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0x8000,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
];

/// Every arithmetic instruction gives the processor's own results and flags.
#[cfg(target_arch = "x86_64")]
#[test]
fn arithmetic_is_the_processors() {
    let mut compared = 0;
    /// One instruction: its name, what stands behind the operand, its code, the operand's type, register class and modifier, and
    /// the flags that it defines.
    macro_rules! compare {
        ($name:literal, $behind:literal, $code:expr, $type:ty, $class:ident, $modifier:literal, $defined:expr) => {
            for (a, b) in VALUES.iter().flat_map(|a| VALUES.map(|b| (*a, b))) {
                for carry in [0, CARRY] {
                    let (mut value, source) = (a as $type, b as $type);
                    let mut flags = u64::from(2 | carry);
                    // SAFETY: two registers, and the flags through the stack.
                    unsafe {
                        core::arch::asm!(
                            "push {flags}",
                            "popfq",
                            concat!($name, " {value", $modifier, "}", $behind, " # {source", $modifier, "}"),
                            "pushfq",
                            "pop {flags}",
                            flags = inout(reg) flags,
                            value = inout($class) value,
                            source = in($class) source,
                        );
                    }
                    let size = size_of::<$type>();
                    let mut registers = state();
                    registers.eflags = 2 | carry;
                    registers.registers[EAX] = b;
                    let mut memory = Memory::with(FIRST, 4, a.into());
                    let code: &[u8] = &$code;
                    run(code, &mut registers, &mut memory).expect($name);
                    let found = (memory.read(FIRST, size), registers.eflags & $defined);
                    let wanted = (u64::from(value), flags as u32 & $defined);
                    assert_eq!(found, wanted, "{} {size}: {a:x} {b:x} {carry}", $name);
                    compared += 1;
                }
            }
        };
    }
    macro_rules! two_operands {
        ($( $name:literal $code:literal $defined:expr; )*) => {$(
            compare!($name, ", {source}", [$code, 0x03], u8, reg_byte, "", $defined);
            compare!($name, ", {source:x}", [0x66, $code + 1, 0x03], u16, reg, ":x", $defined);
            compare!($name, ", {source:e}", [$code + 1, 0x03], u32, reg, ":e", $defined);
        )*};
    }
    macro_rules! one_operand {
        ($( $name:literal $code:literal $modrm:literal; )*) => {$(
            compare!($name, "", [$code, $modrm], u8, reg_byte, "", ARITHMETIC);
            compare!($name, "", [0x66, $code + 1, $modrm], u16, reg, ":x", ARITHMETIC);
            compare!($name, "", [$code + 1, $modrm], u32, reg, ":e", ARITHMETIC);
        )*};
    }
    // AF is not defined after the logical ones.
    two_operands! {
        "add" 0x00 ARITHMETIC;
        "or" 0x08 ARITHMETIC & !AUXILIARY;
        "adc" 0x10 ARITHMETIC;
        "sbb" 0x18 ARITHMETIC;
        "and" 0x20 ARITHMETIC & !AUXILIARY;
        "sub" 0x28 ARITHMETIC;
        "xor" 0x30 ARITHMETIC & !AUXILIARY;
    }
    one_operand! {
        "inc" 0xfe 0x03;
        "dec" 0xfe 0x0b;
        "not" 0xf6 0x13;
        "neg" 0xf6 0x1b;
    }
    assert_eq!(compared, 11 * 3 * 2 * VALUES.len() * VALUES.len());
}
