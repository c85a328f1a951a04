//! The inspector's machine against the processor that this runs on: the same instruction from the
//! same registers and flags, with the same results and the same flags where the manuals define them.

#![cfg_attr(
    target_arch = "x86_64",
    expect(
        unsafe_code,
        reason = "UNSAFETY: the processor's own results are had only by executing the instruction"
    )
)]

#[cfg(not(target_arch = "x86_64"))]
#[test]
fn machine_and_processor_agree() {
    eprintln!("left out: this processor is not an x86-64 one");
}

#[cfg(target_arch = "x86_64")]
mod on_x86_64 {
    use iced_x86::code_asm::CodeAssembler;
    use iced_x86::{IcedError, Register};
    use xtask::inspect::machine::{Code, Machine, Memory, Registers, Stop, flags};
    use xtask::inspect::random::Random;

    /// States from which each instruction is executed.
    const STATES: u64 = 2500;

    const ALL: u32 = flags::ARITHMETIC;
    const NO_ADJUST: u32 = ALL & !flags::ADJUST;

    /// EAX, ECX, EDX and the arithmetic flags.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct State {
        eax: u32,
        ecx: u32,
        edx: u32,
        flags: u32,
    }

    struct Case {
        text: &'static str,
        native: fn(State) -> State,
        assemble: fn(&mut CodeAssembler) -> Result<(), IcedError>,
        /// The flags that the manuals define behind it, and whether a destination is defined.
        defined: fn(State) -> u32,
        /// Makes the state one from which the instruction does not fault and has a result.
        prepare: fn(State) -> State,
    }

    macro_rules! cases {
        ($( $text:literal, $name:ident($($argument:expr),*), $defined:expr, $prepare:expr; )*) => {
            [ $( Case {
                text: $text,
                native: |mut state: State| {
                    let mut flags = u64::from(state.flags);
                    // SAFETY: the instruction reads and writes EAX, ECX, EDX and arithmetic flags,
                    // all of which are operands; what is pushed is popped again, and the loaded
                    // flags hold no bit besides the arithmetic ones and the fixed one. A division
                    // is prepared so that it does not fault.
                    unsafe {
                        std::arch::asm!(
                            "push {flags}", "popfq", $text, "pushfq", "pop {flags}",
                            flags = inout(reg) flags,
                            inout("eax") state.eax, inout("ecx") state.ecx, inout("edx") state.edx,
                        );
                    }
                    state.flags = flags as u32 & ALL;
                    state
                },
                assemble: |a| a.$name($($argument),*),
                defined: $defined,
                prepare: $prepare,
            } ),* ]
        };
    }

    fn all(_: State) -> u32 {
        ALL
    }
    fn logic(_: State) -> u32 {
        NO_ADJUST
    }
    fn product(_: State) -> u32 {
        flags::CARRY | flags::OVERFLOW
    }
    fn none(_: State) -> u32 {
        0
    }
    fn only_carry(_: State) -> u32 {
        flags::CARRY | flags::ZERO
    }
    fn only_zero(_: State) -> u32 {
        flags::ZERO
    }
    /// A shift by CL: nothing changes for 0, OF is defined for 1 alone, AF never.
    fn shift(state: State) -> u32 {
        match state.ecx & 31 {
            0 => ALL,
            1 => NO_ADJUST,
            _ => NO_ADJUST & !flags::OVERFLOW,
        }
    }
    /// A rotation by CL leaves the other flags as they are.
    fn rotation(state: State) -> u32 {
        if state.ecx & 31 <= 1 { ALL } else { ALL & !flags::OVERFLOW }
    }
    fn any(state: State) -> State {
        state
    }
    fn not_zero(state: State) -> State {
        State { ecx: state.ecx | 0x100, ..state }
    }
    /// A dividend whose quotient fits.
    fn dividend(state: State) -> State {
        let ecx = state.ecx | 1;
        State { ecx, edx: state.edx % ecx, ..state }
    }
    fn signed_dividend(state: State) -> State {
        let ecx = if matches!(state.ecx, 0 | u32::MAX) { 7 } else { state.ecx };
        State { ecx, edx: (state.eax as i32 >> 31) as u32, ..state }
    }
    fn byte_dividend(state: State) -> State {
        let divisor = (state.ecx & 0xff) | 1;
        let high = ((state.eax >> 8) & 0xff) % divisor;
        State {
            ecx: (state.ecx & !0xff) | divisor,
            eax: (state.eax & !0xff00) | (high << 8),
            ..state
        }
    }

    fn cases() -> Vec<Case> {
        // Not for the whole module: the names of registers would hide those of variables.
        use iced_x86::code_asm::*;
        Vec::from(cases! {
            "add eax, ecx", add(eax, ecx), all, any;
            "adc eax, ecx", adc(eax, ecx), all, any;
            "sub eax, ecx", sub(eax, ecx), all, any;
            "sbb eax, ecx", sbb(eax, ecx), all, any;
            "cmp eax, ecx", cmp(eax, ecx), all, any;
            "add al, ch", add(al, ch), all, any;
            "adc ax, cx", adc(ax, cx), all, any;
            "sbb ah, dl", sbb(ah, dl), all, any;
            "sub dx, ax", sub(dx, ax), all, any;
            "and eax, ecx", and(eax, ecx), logic, any;
            "or ax, cx", or(ax, cx), logic, any;
            "xor al, dh", xor(al, dh), logic, any;
            "test ecx, edx", test(ecx, edx), logic, any;
            "inc eax", inc(eax), all, any;
            "dec cx", dec(cx), all, any;
            "inc dh", inc(dh), all, any;
            "neg eax", neg(eax), all, any;
            "neg cl", neg(cl), all, any;
            "not edx", not(edx), all, any;
            "bswap ecx", bswap(ecx), all, any;
            "shl eax, cl", shl(eax, cl), shift, any;
            "shr eax, cl", shr(eax, cl), shift, any;
            "sar eax, cl", sar(eax, cl), shift, any;
            "rol eax, cl", rol(eax, cl), rotation, any;
            "ror eax, cl", ror(eax, cl), rotation, any;
            "rcl eax, cl", rcl(eax, cl), rotation, any;
            "rcr eax, cl", rcr(eax, cl), rotation, any;
            "rol dx, cl", rol(dx, cl), rotation, any;
            "ror dl, cl", ror(dl, cl), rotation, any;
            "rcl dx, cl", rcl(dx, cl), rotation, any;
            "rcr dl, cl", rcr(dl, cl), rotation, any;
            "sar dx, cl", sar(dx, cl), |s| shift(s) & if s.ecx & 31 < 16 { ALL } else { !flags::CARRY }, any;
            "shl dl, cl", shl(dl, cl), |s| shift(s) & if s.ecx & 31 < 8 { ALL } else { !flags::CARRY }, any;
            "shr dx, cl", shr(dx, cl), |s| shift(s) & if s.ecx & 31 < 16 { ALL } else { !flags::CARRY }, any;
            "shld eax, edx, cl", shld(eax, edx, cl), shift, any;
            "shrd eax, edx, cl", shrd(eax, edx, cl), shift, any;
            "mul ecx", mul(ecx), product, any;
            "mul cl", mul(cl), product, any;
            "mul cx", mul(cx), product, any;
            "imul ecx", imul(ecx), product, any;
            "imul cl", imul(cl), product, any;
            "imul eax, ecx", imul_2(eax, ecx), product, any;
            "imul dx, cx, -7", imul_3(dx, cx, -7), product, any;
            "div ecx", div(ecx), none, dividend;
            "idiv ecx", idiv(ecx), none, signed_dividend;
            "div cl", div(cl), none, byte_dividend;
            "bt eax, ecx", bt(eax, ecx), only_carry, any;
            "bts eax, ecx", bts(eax, ecx), only_carry, any;
            "btr ax, cx", btr(ax, cx), only_carry, any;
            "btc eax, ecx", btc(eax, ecx), only_carry, any;
            "bsf eax, ecx", bsf(eax, ecx), only_zero, not_zero;
            "bsr eax, ecx", bsr(eax, ecx), only_zero, not_zero;
            "xchg eax, ecx", xchg(eax, ecx), all, any;
            "xadd eax, ecx", xadd(eax, ecx), all, any;
            "xadd al, dh", xadd(al, dh), all, any;
            "cmpxchg ecx, edx", cmpxchg(ecx, edx), all, any;
            "cmpxchg cl, dl", cmpxchg(cl, dl), all, any;
            "movsx eax, cl", movsx(eax, cl), all, any;
            "movzx edx, ch", movzx(edx, ch), all, any;
            "cdq", cdq(), all, any;
            "cwd", cwd(), all, any;
            "cwde", cwde(), all, any;
            "cbw", cbw(), all, any;
            "lahf", lahf(), all, any;
            "sahf", sahf(), all, any;
            "cmc", cmc(), all, any;
            "setle al", setle(al), all, any;
            "seta ch", seta(ch), all, any;
            "cmovl eax, edx", cmovl(eax, edx), all, any;
            "cmovbe ax, dx", cmovbe(ax, dx), all, any;
        })
    }

    fn in_machine(image: &[u8], state: State) -> State {
        const BASE: u32 = 0x1000;
        let code = Code::new(image, 10);
        let mut registers = Registers::default();
        registers.eip = BASE;
        registers.eflags = state.flags | flags::FIXED;
        registers.set(Register::EAX, state.eax);
        registers.set(Register::ECX, state.ecx);
        registers.set(Register::EDX, state.edx);
        let memory = Memory::new(image, BASE, Vec::new());
        let mut machine = Machine::new(&code, memory, registers, Random::new(0));
        assert_eq!(machine.run(1), Stop::Budget);
        assert_eq!(machine.registers.eip, BASE + image.len() as u32);
        let [eax, ecx, edx, ..] = machine.registers.general();
        State { eax, ecx, edx, flags: machine.registers.eflags & ALL }
    }

    /// Arbitrary words, and those at which something turns over.
    fn word(random: &mut Random) -> u32 {
        const CORNERS: [u32; 10] =
            [0, 1, 2, 0x7f, 0x80, 0xffff, 0x8000, 0x7fff_ffff, 0x8000_0000, u32::MAX];
        match random.below(4) {
            0 => CORNERS[random.below(CORNERS.len() as u32) as usize],
            1 => random.below(40),
            _ => random.word(),
        }
    }

    #[test]
    fn machine_and_processor_agree() {
        let mut compared = 0;
        for (seed, case) in cases().into_iter().enumerate() {
            let mut assembler = CodeAssembler::new(32).expect("32-bit code");
            (case.assemble)(&mut assembler).expect("an instruction that exists");
            let image = assembler.assemble(0x1000).expect("code that can be encoded");
            let mut random = Random::new(seed as u64);
            for _ in 0..STATES {
                let state = (case.prepare)(State {
                    eax: word(&mut random),
                    ecx: word(&mut random),
                    edx: word(&mut random),
                    flags: random.word() & ALL,
                });
                let mask = (case.defined)(state);
                let defined = |found: State| State { flags: found.flags & mask, ..found };
                let (native, ours) = ((case.native)(state), in_machine(&image, state));
                assert_eq!(defined(ours), defined(native), "{} from {state:x?}", case.text);
                compared += 1;
            }
        }
        assert!(compared >= 100_000, "{compared} cases");
    }
}
