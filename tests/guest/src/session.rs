//! One call under test: how it is bound, entered and held against its contract.

use crate::harness::{
    self, Context, DataSegments, Demand, Entry, FLAT, NOT_OURS, Outcome, Registers, return_point,
};
use crate::paging::Space;
use crate::report::Problems;
use crate::rom::Rom;
use crate::site::{self, Rewriting, Site};
use crate::{host, processor};
use core::fmt;
use vmi_abi::{Answers, Call, Ending, RelocationType, STACK_LIMIT, Segments};
use x86::bits32::eflags::EFlags;

/// Results of arithmetic.
const ARITHMETIC: u32 = EFlags::FLAGS_CF.bits()
    | EFlags::FLAGS_PF.bits()
    | EFlags::FLAGS_AF.bits()
    | EFlags::FLAGS_ZF.bits()
    | EFlags::FLAGS_SF.bits()
    | EFlags::FLAGS_OF.bits();

/// Flags that mean something to the kernel, or to the program it interrupted.
const CONTROL: u32 = EFlags::FLAGS_TF.bits()
    | INTERRUPT_FLAG
    | EFlags::FLAGS_DF.bits()
    | EFlags::FLAGS_IOPL3.bits()
    | EFlags::FLAGS_NT.bits()
    | EFlags::FLAGS_VM.bits()
    | EFlags::FLAGS_AC.bits()
    | EFlags::FLAGS_ID.bits();

/// IF.
pub(crate) const INTERRUPT_FLAG: u32 = EFlags::FLAGS_IF.bits();

/// The bit of EFLAGS that is always set.
pub(crate) const FIXED_FLAG: u32 = EFlags::FLAGS_A1.bits();

/// How the call site reaches the ROM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// `call *pointer`.
    Pointer,
    /// `call` or `jmp` to the code itself, written over the site; five bytes of NOP for NOP.
    Patched,
}

/// One way to enter a call.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Variant {
    pub(crate) form: Form,
    /// EFLAGS on entry.
    pub(crate) eflags: u32,
    /// Whether each instruction is observed.
    pub(crate) traced: bool,
}

/// The ways in which every call is entered. No interrupt line is open meanwhile.
const VARIANTS: [Variant; 6] = {
    const PLAIN: u32 = FIXED_FLAG;
    const BUSY: u32 = FIXED_FLAG
        | ARITHMETIC
        | INTERRUPT_FLAG
        | EFlags::FLAGS_NT.bits()
        | EFlags::FLAGS_AC.bits()
        | EFlags::FLAGS_ID.bits();
    [
        Variant { form: Form::Pointer, eflags: PLAIN, traced: false },
        Variant { form: Form::Pointer, eflags: BUSY, traced: false },
        Variant { form: Form::Patched, eflags: PLAIN, traced: false },
        Variant { form: Form::Patched, eflags: BUSY, traced: false },
        Variant { form: Form::Patched, eflags: PLAIN | EFlags::FLAGS_TF.bits(), traced: true },
        Variant { form: Form::Pointer, eflags: BUSY | EFlags::FLAGS_TF.bits(), traced: true },
    ]
};

/// What a caller passes. A register that it does not name holds anything.
#[derive(Clone, Copy, Default)]
pub(crate) struct Arguments {
    pub(crate) eax: Option<u32>,
    pub(crate) ecx: Option<u32>,
    pub(crate) edx: Option<u32>,
    pub(crate) esi: Option<u32>,
    pub(crate) edi: Option<u32>,
    pub(crate) stack: [u32; 9],
    pub(crate) stack_words: usize,
}

impl Arguments {
    pub(crate) const NONE: Self = Self {
        eax: None,
        ecx: None,
        edx: None,
        esi: None,
        edi: None,
        stack: [0; 9],
        stack_words: 0,
    };

    pub(crate) const fn eax(self, value: u32) -> Self {
        Self { eax: Some(value), ..self }
    }

    pub(crate) const fn ecx(self, value: u32) -> Self {
        Self { ecx: Some(value), ..self }
    }

    pub(crate) const fn edx(self, value: u32) -> Self {
        Self { edx: Some(value), ..self }
    }

    pub(crate) const fn esi(self, value: u32) -> Self {
        Self { esi: Some(value), ..self }
    }

    pub(crate) const fn edi(self, value: u32) -> Self {
        Self { edi: Some(value), ..self }
    }

    /// Words on the stack, the first at 4(%esp) on entry.
    pub(crate) fn stack(self, words: &[u32]) -> Self {
        let mut stack = [0; 9];
        stack[..words.len()].copy_from_slice(words);
        Self { stack, stack_words: words.len(), ..self }
    }
}

/// One call under test.
pub(crate) struct Session {
    pub(crate) space: Space,
    pub(crate) rom: Rom,
    pub(crate) call: &'static Call,
    /// Its number in the client's revision.
    pub(crate) number: u32,
    /// The ROM's answer.
    pub(crate) answer: RelocationType,
    /// The code that is called: the ROM's, or the guest's own where the ROM leaves it to the guest.
    /// `None` where the guest has none: nothing is called then.
    target: Option<u32>,
    pub(crate) variant: Variant,
    /// What the ROM makes of the site, if it answers with code that rewrites it.
    pub(crate) rewriting: Option<Rewriting>,
    /// Where call sites are written.
    pub(crate) place: site::Place,
    /// What is behind direct calls.
    pub(crate) filler: &'static [u8],
    /// A site is written once for each form and then entered again as it is.
    pub(crate) reuse: bool,
    /// Sites call a jump to the code under test, and so prove nothing.
    pub(crate) by_jump: bool,
    /// The site that is there.
    written: Option<Site>,
    /// The code under test is the plain one of a call that is answered with another.
    plain: bool,
    /// Pages that appear when the call touches them.
    pub(crate) demand: Option<Demand>,
    /// Called before each instruction of a traced call.
    pub(crate) watch: Option<fn()>,
    /// Why the call cannot be tried on this machine.
    pub(crate) skipped: Option<&'static str>,
    /// Rules broken so far.
    pub(crate) problems: Problems,
    /// Conditions checked so far.
    pub(crate) checks: u32,
    /// Most bytes of stack used below the return address.
    pub(crate) stack: u32,
    /// Most instructions executed in the ROM.
    pub(crate) instructions: u32,
    random: u32,
}

impl Session {
    pub(crate) fn new(
        space: Space,
        rom: Rom,
        (number, call): (u32, &'static Call),
        answer: RelocationType,
        target: Option<u32>,
    ) -> Self {
        Self {
            space,
            rom,
            call,
            number,
            answer,
            target,
            variant: VARIANTS[0],
            rewriting: None,
            place: site::Place::default(),
            filler: &[],
            reuse: false,
            by_jump: false,
            written: None,
            plain: false,
            demand: None,
            watch: None,
            skipped: None,
            problems: Problems::default(),
            checks: 0,
            stack: 0,
            instructions: 0,
            random: 0x9e37_79b9 ^ number.wrapping_mul(0x0100_0193),
        }
    }

    /// Runs a test in each way in which the call can be entered.
    pub(crate) fn each(&mut self, mut test: impl FnMut(&mut Self)) {
        for variant in VARIANTS {
            // A jump is patched in; the guest's own code is called through its pointer.
            let possible = match self.answer {
                RelocationType::JUMP_REL => Form::Patched,
                RelocationType::NONE => Form::Pointer,
                _ => self.rom.client.form().unwrap_or(variant.form),
            };
            // A filler is behind a direct call.
            let shows = self.filler.is_empty() || variant.form == Form::Patched;
            if possible == variant.form && shows {
                self.variant = variant;
                test(self);
            }
        }
    }

    /// A number to fill registers and memory with: the same in every run.
    pub(crate) fn random(&mut self) -> u32 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 17;
        self.random ^= self.random << 5;
        self.random
    }

    /// Notes a condition; `rule` says what must hold.
    pub(crate) fn expect(&mut self, holds: bool, rule: fmt::Arguments<'_>) {
        self.checks += 1;
        if !holds {
            self.problems.add(rule);
        }
    }

    /// Notes that two values must be equal.
    pub(crate) fn equal(&mut self, what: &str, found: u32, wanted: u32) {
        self.expect(found == wanted, format_args!("{what} is {found:#x}, must be {wanted:#x}"));
    }

    /// Calls, and holds what is left against the call's contract.
    pub(crate) fn call(&mut self, arguments: Arguments) -> Outcome {
        self.call_changing(arguments, 0)
    }

    /// The same for a call whose meaning is to change some of the control flags.
    pub(crate) fn call_changing(&mut self, arguments: Arguments, changing: u32) -> Outcome {
        let (before, outcome) = self.enter(arguments);
        if self.no_exception(&outcome) {
            self.keeps_contract(&before, &outcome, changing);
        }
        outcome
    }

    /// Calls without judging.
    pub(crate) fn enter(&mut self, arguments: Arguments) -> (Context, Outcome) {
        let registers = Registers {
            eax: arguments.eax.unwrap_or_else(|| self.random()),
            ecx: arguments.ecx.unwrap_or_else(|| self.random()),
            edx: arguments.edx.unwrap_or_else(|| self.random()),
            ebx: self.random(),
            ebp: self.random(),
            esi: arguments.esi.unwrap_or_else(|| self.random()),
            edi: arguments.edi.unwrap_or_else(|| self.random()),
        };
        let stack = &arguments.stack[..arguments.stack_words];
        let context = Context {
            registers,
            esp: harness::entry_esp(stack.len()),
            eflags: self.variant.eflags,
            segments: self.segments(),
        };
        let site = self.write_site();
        let again = site.is_rewritten();
        let outcome = harness::run(&Entry {
            context,
            stack,
            target: site.start,
            by_call: self.is_called(),
            code: self.rom.code(),
            watch: self.watch,
            demand: self.demand.clone(),
        });
        if self.measures_stack()
            && outcome.after.eflags & INTERRUPT_FLAG == 0
            && outcome.trap.is_none()
        {
            self.stack = self.stack.max(outcome.stack_used);
        }
        // What it takes to rewrite a site is paid once for each, and few sites cannot be rewritten.
        if again || (self.rewriting.is_none() && !self.plain) {
            self.instructions = self.instructions.max(outcome.instructions);
        }
        self.judge_site(site, again && outcome.instructions > 0);
        (context, outcome)
    }

    /// Whether nothing but the call uses its stack: no exception is part of the plan.
    pub(crate) fn measures_stack(&self) -> bool {
        !self.variant.traced && self.demand.is_none()
    }

    /// The data segments that the call finds.
    pub(crate) fn segments(&self) -> DataSegments {
        match self.call.contract.segments {
            Segments::Flat => FLAT,
            Segments::StackOnly => NOT_OURS,
        }
    }

    /// Whether a return address is pushed. Nobody calls a slot that does not come back.
    pub(crate) fn is_called(&self) -> bool {
        let has_slots = self.rom.client.revision().has_slots();
        self.answer != RelocationType::JUMP_REL
            && !(has_slots && self.call.contract.ending == Ending::Transfers)
    }

    /// Notes an exception; `true` when there was none.
    pub(crate) fn no_exception(&mut self, outcome: &Outcome) -> bool {
        let Some(trap) = outcome.trap else {
            self.checks += 1;
            return true;
        };
        let (vector, eip, error) = (trap.frame.vector, trap.frame.eip, trap.frame.error);
        let place = match eip.checked_sub(self.rom.base) {
            Some(offset) if offset < self.rom.length => offset,
            _ => eip,
        };
        self.expect(
            false,
            format_args!(
                "exception {vector} (error {error:#x}, address {:#x}) at {place:#x} instead of a return",
                trap.address
            ),
        );
        false
    }

    /// Holds what a returning call left against its contract.
    fn keeps_contract(&mut self, before: &Context, outcome: &Outcome, changing: u32) {
        let after = &outcome.after;
        self.equal("ESP after the return", after.esp, before.esp);
        self.keeps_registers(&before.registers, &after.registers);
        self.keeps_segments(before.segments, after.segments);
        let may_change = self.call.contract.may_change();
        let mut watched = CONTROL & !changing;
        if !may_change.contains(vmi_abi::Registers::FLAGS) {
            watched |= ARITHMETIC;
        }
        if self.variant.traced {
            watched &= !EFlags::FLAGS_TF.bits();
        }
        let changed = (before.eflags ^ after.eflags) & watched;
        self.expect(
            changed == 0,
            format_args!(
                "EFLAGS {:#x} became {:#x}: bits {changed:#x} must be kept",
                before.eflags, after.eflags
            ),
        );
        // A host delivers an interrupt by code of the ROM's, between the call and the handler.
        let is_interrupted = host::is_hosted() && after.eflags & INTERRUPT_FLAG != 0;
        self.expect(
            outcome.stack_used <= STACK_LIMIT || !self.measures_stack() || is_interrupted,
            format_args!("{} bytes of stack used, {STACK_LIMIT} are allowed", outcome.stack_used),
        );
        self.expect(
            !outcome.caller_stack_changed,
            format_args!("the caller's stack above the arguments was changed"),
        );
    }

    /// Checks that the contract's registers, and no others, were changed.
    pub(crate) fn keeps_registers(&mut self, before: &Registers, after: &Registers) {
        use vmi_abi::Registers as Set;
        let may_change = self.call.contract.may_change();
        for (name, register, before, after) in [
            ("EAX", Set::EAX, before.eax, after.eax),
            ("ECX", Set::ECX, before.ecx, after.ecx),
            ("EDX", Set::EDX, before.edx, after.edx),
            ("EBX", Set::EBX, before.ebx, after.ebx),
            ("EBP", Set::EBP, before.ebp, after.ebp),
            ("ESI", Set::ESI, before.esi, after.esi),
            ("EDI", Set::EDI, before.edi, after.edi),
        ] {
            if !may_change.contains(register) {
                self.expect(
                    before == after,
                    format_args!("{name} {before:#x} became {after:#x}: it must be kept"),
                );
            }
        }
    }

    /// Checks DS, ES, FS and GS.
    pub(crate) fn keeps_segments(&mut self, before: DataSegments, after: DataSegments) {
        self.expect(
            before == after,
            format_args!("data segments {before:x?} became {after:x?}: they must be kept"),
        );
    }

    /// Writes the call site of the current variant, unless it is to be used again.
    pub(crate) fn write_site(&mut self) -> Site {
        let target = self.target();
        let through_ss = self.call.contract.segments == Segments::StackOnly;
        let wanted = match (self.variant.form, self.answer) {
            (form, RelocationType::CALL_REL) if self.by_jump => {
                Site::through_jump(self.place, target, form == Form::Pointer, through_ss)
            }
            (Form::Pointer, _) if !self.is_called() => {
                Site::jump_pointer(self.place, target, through_ss)
            }
            (Form::Pointer, _) => Site::pointer(self.place, target, through_ss),
            (Form::Patched, RelocationType::NOP) => Site::nop(self.place),
            (Form::Patched, _) if !self.is_called() => Site::jump(self.place, target),
            (Form::Patched, _) => Site::call(self.place, target).filled(self.filler),
        };
        if !self.reuse || self.written != Some(wanted) {
            wanted.write(return_point as *const () as u32);
        }
        self.written = Some(wanted);
        wanted
    }

    /// Holds what the ROM made of the site against what it may make of it.
    fn judge_site(&mut self, site: Site, again: bool) {
        let Some(rewriting) = self.rewriting else {
            self.expect(!site.is_rewritten(), format_args!("the site was changed: {site:x?}"));
            return;
        };
        let wanted = rewriting.outcome(&site);
        let found = site.bytes();
        self.expect(
            found == wanted.bytes,
            format_args!("the site became {found:02x?}, must become {:02x?}", wanted.bytes),
        );
        self.expect(
            !(again && wanted.is_native),
            format_args!("native code at the site, and the ROM was entered all the same"),
        );
        self.expect(processor::cr0() & site::WRITE_PROTECT != 0, format_args!("CR0.WP is lost"));
    }

    /// Whether the interface allows the ROM's answer for this call.
    pub(crate) fn judge_answer(&mut self) {
        let has_slots = self.rom.client.revision().has_slots();
        let allowed = if has_slots { Answers::SLOT } else { self.call.contract.answers };
        let answer = self.answer;
        self.expect(
            answer.as_answers().is_some_and(|answer| allowed.contains(answer)),
            format_args!(
                "{answer:?} is not one of the answers that a guest can live with: {allowed:?}"
            ),
        );
    }

    /// Whether there is code to call, reached in a way that the guest knows.
    pub(crate) fn is_testable(&self) -> bool {
        let known = match self.answer {
            // A jump to a call that returns has no way back.
            RelocationType::JUMP_REL => self.call.contract.ending != Ending::Returns,
            answer => answer.name().is_some(),
        };
        known && self.target.is_some()
    }

    /// Whether the last call was entered there.
    pub(crate) fn is_site(&self, eip: u32) -> bool {
        self.written.is_some_and(|site| site.executes_at(eip))
    }

    /// Goes on with code that leaves its sites alone.
    pub(crate) fn use_plain(&mut self, plain: u32) {
        self.target = Some(plain);
        self.rewriting = None;
        self.plain = true;
    }

    /// The site of the last call, if the ROM has put native code there.
    pub(crate) fn native_site(&self) -> Option<Site> {
        let (site, rewriting) = (self.written?, self.rewriting?);
        rewriting.outcome(&site).is_native.then_some(site)
    }

    /// Where the code under test lies.
    pub(crate) fn target(&self) -> u32 {
        self.target.unwrap_or(0)
    }
}
