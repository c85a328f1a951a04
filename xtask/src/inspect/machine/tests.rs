//! Programs whose results are known.

use super::{Code, Machine, Memory, Region, Registers, Stop, flags};
use crate::inspect::random::Random;
use iced_x86::code_asm::*;
use iced_x86::{IcedError, Register};

const STACK: u32 = 0x8000;

/// Runs a program that ends in HLT with interrupts disabled; EAX, ECX, EDX, EBX and EFLAGS.
#[track_caller]
fn run(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> ([u32; 4], u32) {
    let mut assembler = CodeAssembler::new(32).expect("32-bit code");
    write(&mut assembler).expect("instructions that exist");
    assembler.hlt().expect("an instruction");
    let image = assembler.assemble(0).expect("code that can be encoded");
    let code = Code::new(&image, 10_000);
    let stack = Region { name: "stack", base: STACK, bytes: vec![0; 0x400], writable: true };
    let mut registers = Registers::default();
    registers.eip = 0x10_0000;
    registers.set(Register::ESP, STACK + 0x200);
    let memory = Memory::new(&image, 0x10_0000, vec![stack]);
    let mut machine = Machine::new(&code, memory, registers, Random::new(1));
    machine.flat = vec![0];
    assert_eq!(machine.run(1000), Stop::Halted, "{:?}", machine.trace);
    assert_eq!(machine.trace.breaches, []);
    let [a, c, d, b, ..] = machine.registers.general();
    ([a, c, d, b], machine.registers.eflags)
}

macro_rules! program {
    ($( $name:ident $( ( $($argument:expr),* ) )? ;)*) => {
        run(|a| { $( a.$name($($($argument),*)?)?; )* Ok(()) })
    };
}

#[test]
fn multiplication_and_division() {
    let (r, f) = program! { mov(eax, 0x8000_0000u32); mov(ecx, 6); mul(ecx); };
    assert_eq!((r[0], r[2]), (0, 3));
    assert_ne!(f & flags::CARRY, 0);
    let (r, _) = program! { mov(eax, -7); cdq; mov(ecx, 2); idiv(ecx); };
    assert_eq!((r[0] as i32, r[2] as i32), (-3, -1));
    let (r, _) = program! { mov(eax, 1000); mov(cl, 7); div(cl); };
    assert_eq!(r[0], 0x068e);
    let (r, f) = program! { mov(ecx, -3); imul_3(eax, ecx, 5); };
    assert_eq!(r[0] as i32, -15);
    assert_eq!(f & flags::OVERFLOW, 0);
    let (r, _) = program! { mov(ax, 300); mov(cx, 300); imul_2(ax, cx); };
    assert_eq!(r[0], 90000 & 0xffff);
}

#[test]
fn bits() {
    let (r, f) =
        program! { mov(eax, 0x10); bts(eax, 1); bsf(ecx, eax); bsr(edx, eax); bt(eax, 4); };
    assert_eq!(r[..3], [0x12, 1, 4]);
    assert_ne!(f & flags::CARRY, 0);
    // A register may index beyond the operand in memory, in both directions.
    let (r, _) = program! { push(0); push(0); mov(ecx, 33); bts(dword_ptr(esp), ecx); mov(eax, dword_ptr(esp + 4)); };
    assert_eq!(r[0], 2);
    let (r, _) = program! {
        push(0); push(0); lea(edx, ptr(esp + 4)); mov(ecx, -1); bts(dword_ptr(edx), ecx); mov(eax, dword_ptr(esp));
    };
    assert_eq!(r[0], 0x8000_0000);
    let (r, _) = program! { mov(eax, 0x1234_5678); bswap(eax); mov(ecx, 0xf000_0000u32); mov(edx, 1); shld(edx, ecx, 4); };
    assert_eq!((r[0], r[2]), (0x7856_3412, 0x1f));
    let (r, _) = program! { mov(al, -128); movsx(ecx, al); movzx(edx, al); cbw; cwde; };
    assert_eq!(r[..3], [0xffff_ff80, 0xffff_ff80, 0x80]);
}

#[test]
fn exchanges() {
    let (r, f) = program! {
        push(2); push(1); mov(eax, 1); mov(edx, 2); mov(ebx, 7); mov(ecx, 8); cmpxchg8b(qword_ptr(esp));
        pop(eax); pop(edx);
    };
    assert_eq!((r[0], r[2]), (7, 8));
    assert_ne!(f & flags::ZERO, 0);
    let (r, f) =
        program! { push(5); mov(eax, 4); mov(ecx, 9); cmpxchg(dword_ptr(esp), ecx); pop(edx); };
    assert_eq!((r[0], r[2]), (5, 5));
    assert_eq!(f & flags::ZERO, 0);
    let (r, _) =
        program! { push(5); mov(eax, 4); xadd(dword_ptr(esp), eax); pop(ecx); xchg(ecx, eax); };
    assert_eq!(r[..2], [9, 5]);
}

#[test]
fn the_stack() {
    let (r, _) =
        program! { mov(eax, 1); mov(ecx, 2); pushad; xor(eax, eax); xor(ecx, ecx); popad; };
    assert_eq!(r[..2], [1, 2]);
    let (r, _) = program! { mov(ebp, 3); enter(8, 0); mov(dword_ptr(ebp - 4), 6); mov(eax, dword_ptr(esp + 4)); leave; mov(ecx, ebp); };
    assert_eq!(r[..2], [6, 3]);
    let (r, _) = program! { mov(eax, esp); push(esp); pop(ecx); push(-1); pop(edx); };
    assert_eq!((r[0], r[2]), (r[1], u32::MAX));
    let (r, f) = program! { stc; pushfd; clc; pop(eax); push(eax); popfd; lahf; };
    assert_eq!(r[0] & 0x101, 0x101);
    assert_ne!(f & flags::CARRY, 0);
}

#[test]
fn strings() {
    let (r, _) = program! {
        sub(esp, 32); mov(edi, esp); mov(eax, 0x5a5a_5a5a); mov(ecx, 4); db(&[0xf3, 0xab]); mov(edx, edi); sub(edx, esp);
        mov(eax, dword_ptr(esp + 12));
    };
    assert_eq!(r[..3], [0x5a5a_5a5a, 0, 16]);
    let (r, f) = program! {
        push(0x0041_4243); mov(edi, esp); xor(eax, eax); mov(ecx, 9); db(&[0xf2, 0xae]); mov(eax, edi); sub(eax, esp);
        cmp(eax, 4);
    };
    assert_eq!(r[..2], [4, 5]);
    assert_ne!(f & flags::ZERO, 0);
    let (r, _) =
        program! { push(1); push(2); mov(esi, esp); lodsd; mov(edx, eax); std; lodsd; cld; };
    assert_eq!((r[0], r[2]), (1, 2));
    let (r, _) = program! { mov(ecx, 0); db(&[0xf3, 0xaa]); mov(eax, ecx); };
    assert_eq!(r[0], 0);
}

#[test]
fn loops_and_conditions() {
    let (r, _) = run(|a| {
        let mut again = a.create_label();
        a.xor(eax, eax)?;
        a.mov(ecx, 5)?;
        a.set_label(&mut again)?;
        a.add(eax, ecx)?;
        a.loop_(again)
    });
    assert_eq!(r[..2], [15, 0]);
    let (r, _) =
        program! { mov(eax, -1); cmp(eax, 1); setl(cl); seta(dl); mov(ebx, 9); cmovl(eax, ebx); };
    assert_eq!((r[0], r[1] & 0xff, r[2] & 0xff), (9, 1, 1));
}

#[test]
fn the_system() {
    let (r, _) =
        program! { mov(eax, 0x77); mov(cr2, eax); mov(ecx, cr2); mov(dr3, ecx); mov(edx, dr3); };
    assert_eq!(r[1..3], [0x77, 0x77]);
    let (r, _) = program! { mov(ecx, 0x174); mov(eax, 1); mov(edx, 2); wrmsr; xor(eax, eax); xor(edx, edx); rdmsr; };
    assert_eq!((r[0], r[2]), (1, 2));
    let (r, _) = program! { sub(esp, 8); mov(dword_ptr(esp), 0x1234_0fff); lgdt(fword_ptr(esp)); sgdt(fword_ptr(esp)); pop(eax); };
    assert_eq!(r[0], 0x1234_0fff);
}
