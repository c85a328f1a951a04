//! Call sites: written as a kernel has them, and what a ROM may make of them.

#![expect(unsafe_code, reason = "UNSAFETY: writes code that the guest then executes")]

use crate::paging::{PAGE, SITE_FRAMES, Space, WRITE};
use crate::{harness, processor};
use core::sync::atomic::{AtomicBool, Ordering};
use vmi_abi::{Call, CallNumber, Ending};
use vmi_native_backend::binding::{SiteRule, is_short};
use x86::controlregs::Cr0;

/// CR0.WP.
pub(crate) const WRITE_PROTECT: u32 = Cr0::CR0_WRITE_PROTECT.bits() as u32;

/// The longest site: a direct call, and the longest filler behind it.
const LONGEST: usize = BRANCH_SIZE as usize + 3;

/// What kernels fill a site up with behind a direct call, and what only looks like that.
pub(crate) const FILLERS: [&[u8]; 9] = [
    &[NOP],
    &[OPERAND_SIZE, NOP],
    &[OPERAND_SIZE, OPERAND_SIZE, NOP],
    &MOV_ESI,
    &MOV_EAX,
    // NOPs as well, which stay as they are.
    &[0x0f, 0x1f, 0x00],
    &[0x8d, 0x76, 0x00],
    &[0xf3, 0x90],
    &[OPERAND_SIZE, 0x89, 0xf6],
];

/// `nop`, the prefix that makes it longer, and MOV of a register to itself.
const NOP: u8 = 0x90;
const OPERAND_SIZE: u8 = 0x66;
const MOV_ESI: [u8; 2] = [0x89, 0xf6];
const MOV_EAX: [u8; 2] = [0x8b, 0xc0];

/// `test eax, imm32`, which takes the place of a direct call whose distance nobody needs any more.
const TEST_EAX: u8 = 0xa9;

/// `call rel32`, `jmp rel32`, and the bytes of either.
const CALL: u8 = 0xe8;
const JUMP: u8 = 0xe9;
const BRANCH_SIZE: u32 = 5;

/// `call [disp32]`, `jmp [disp32]`, and the prefix that reads the pointer through SS.
const CALL_POINTER: [u8; 2] = [0xff, 0x15];
const JUMP_POINTER: [u8; 2] = [0xff, 0x25];
const THROUGH_SS: u8 = 0x36;

/// `ret`.
const RETURN: u8 = 0xc3;

/// Bytes that every processor sees changed as a whole.
const WORD: u32 = 8;

/// Offsets in the pages of call sites: pointer and site for the guest's own calls, the pointer of
/// calls under test, a jump to them, and where their sites begin.
const OWN_POINTER: u32 = 0;
const OWN_SITE: u32 = 64;
const POINTER: u32 = 128;
const OWN_JUMP: u32 = 160;
const SITES: u32 = 256;

/// Where a site is written, in bytes behind [`SITES`]; the pages' border is in reach.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) u32);

impl Place {
    /// The place of a site whose first so many bytes are the last of a page.
    pub(crate) const fn before_border(bytes: u32) -> Self {
        Self(PAGE - SITES - bytes)
    }
}

/// A call site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Site {
    /// Where it is entered: the prefix, if it has one.
    pub(crate) start: u32,
    /// Where the bytes that a ROM may change begin.
    address: u32,
    original: [u8; LONGEST],
    length: usize,
    /// Bytes of it that call or jump; a filler follows.
    branch: usize,
    /// What the pointer holds, if it has one.
    pointer: Option<u32>,
    /// What it calls is the code under test itself.
    proves: bool,
}

impl Site {
    fn new(place: Place, bytes: &[u8]) -> Self {
        let address = frames() + SITES + place.0;
        let mut original = [0; LONGEST];
        original[..bytes.len()].copy_from_slice(bytes);
        let length = bytes.len();
        Self {
            start: address,
            address,
            original,
            length,
            branch: length,
            pointer: None,
            proves: true,
        }
    }

    /// The same site, with a filler behind it.
    pub(crate) fn filled(mut self, filler: &[u8]) -> Self {
        let end = self.branch + filler.len();
        self.original[self.branch..end].copy_from_slice(filler);
        self.length = end;
        self
    }

    fn branch(place: Place, opcode: u8, target: u32) -> Self {
        let next = frames() + SITES + place.0 + BRANCH_SIZE;
        let [a, b, c, d] = target.wrapping_sub(next).to_le_bytes();
        Self::new(place, &[opcode, a, b, c, d])
    }

    /// `call target`.
    pub(crate) fn call(place: Place, target: u32) -> Self {
        Self::branch(place, CALL, target)
    }

    /// `jmp target`.
    pub(crate) fn jump(place: Place, target: u32) -> Self {
        Self::branch(place, JUMP, target)
    }

    /// The same site, with a jump to the target between: what is called is not the target.
    pub(crate) fn through_jump(
        place: Place,
        target: u32,
        by_pointer: bool,
        through_ss: bool,
    ) -> Self {
        let jump = frames() + OWN_JUMP;
        write(jump, &[JUMP]);
        write(jump + 1, &target.wrapping_sub(jump + BRANCH_SIZE).to_le_bytes());
        let site = if by_pointer {
            Self::pointer(place, jump, through_ss)
        } else {
            Self::call(place, jump)
        };
        Self { proves: false, ..site }
    }

    /// Five bytes that do nothing.
    pub(crate) fn nop(place: Place) -> Self {
        Self::new(place, &[0x0f, 0x1f, 0x44, 0x00, 0x00])
    }

    /// `call *pointer`; through SS where DS may be anybody's.
    pub(crate) fn pointer(place: Place, target: u32, through_ss: bool) -> Self {
        Self::through(place, CALL_POINTER, POINTER, target, through_ss)
    }

    /// `jmp *pointer`.
    pub(crate) fn jump_pointer(place: Place, target: u32, through_ss: bool) -> Self {
        Self::through(place, JUMP_POINTER, POINTER, target, through_ss)
    }

    fn through(
        place: Place,
        [first, second]: [u8; 2],
        pointer: u32,
        target: u32,
        through_ss: bool,
    ) -> Self {
        let [a, b, c, d] = (frames() + pointer).to_le_bytes();
        let mut site = Self::new(place, &[first, second, a, b, c, d]);
        site.pointer = Some(target);
        if through_ss {
            site.start -= 1;
        }
        site
    }

    /// Writes it, with a jump to `then` behind it.
    pub(crate) fn write(&self, then: u32) {
        self.write_alone();
        let jump = self.address + self.length as u32;
        write(jump, &[JUMP]);
        write(jump + 1, &then.wrapping_sub(jump + BRANCH_SIZE).to_le_bytes());
    }

    /// Writes it, with a return behind it.
    pub(crate) fn write_before_return(&self) {
        self.write_alone();
        write(self.address + self.length as u32, &[RETURN]);
    }

    /// Writes its first byte alone; whether another was there.
    ///
    /// Also if it was there already: QEMU, with a thread for each processor, may miss a store that comes
    /// while it translates, and goes on with code that nobody has written any more until the next store.
    pub(crate) fn put_back_first(&self) -> bool {
        let changed = self.bytes()[0] != self.original[0];
        write(self.address, &self.original[..1]);
        changed
    }

    fn write_alone(&self) {
        if let Some(target) = self.pointer {
            write(pointer_of(self), &target.to_le_bytes());
        }
        if self.start < self.address {
            write(self.start, &[THROUGH_SS]);
        }
        write(self.address, &self.original[..self.length]);
    }

    /// The bytes that are there now, and zeros behind them.
    pub(crate) fn bytes(&self) -> [u8; LONGEST] {
        let mut bytes = [0; LONGEST];
        for (index, byte) in bytes.iter_mut().take(self.length).enumerate() {
            // SAFETY: inside the pages of call sites; volatile, since the ROM changes them.
            *byte = unsafe { ((self.address as usize + index) as *const u8).read_volatile() };
        }
        bytes
    }

    /// Whether other bytes are there than were written.
    pub(crate) fn is_rewritten(&self) -> bool {
        self.bytes() != self.original
    }

    /// Whether its first instruction begins there. What a ROM has just rewritten it enters behind the
    /// prefix, which it does not know of.
    pub(crate) fn executes_at(&self, eip: u32) -> bool {
        eip == self.start || eip == self.address
    }

    /// Bytes of the longest piece, from the first on, that lies in one aligned word.
    fn in_a_word(&self) -> u32 {
        WORD - self.address % WORD
    }

    /// Where a call of it returns to.
    fn end(&self) -> u32 {
        self.address + self.branch as u32
    }

    /// The filler's first two bytes, if they lie in the site's page.
    fn filler(&self) -> Option<[u8; 2]> {
        let in_page = (1..PAGE - 1).contains(&(self.end() % PAGE));
        let [first, second] = [self.branch, self.branch + 1].map(|place| self.original[place]);
        (in_page && self.length > self.branch).then_some([first, second])
    }

    /// Whether a NOP of one byte is behind a direct call, perhaps with prefixes.
    fn has_nop(&self) -> bool {
        let filler = self.filler().filter(|_| self.original[0] == CALL);
        matches!(filler, Some([NOP, _] | [OPERAND_SIZE, NOP | OPERAND_SIZE]))
    }

    /// Whether what is behind the call is two bytes of another NOP, in one word.
    fn has_mov(&self) -> bool {
        let in_a_word = self.end() % WORD != WORD - 1;
        in_a_word && self.filler().is_some_and(|filler| [MOV_ESI, MOV_EAX].contains(&filler))
    }
}

/// The instructions of a short call, without what brings a call back.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Native {
    bytes: [u8; 3],
    length: usize,
}

impl Native {
    /// A call's, from the guest's own code; `None` if it is longer than a call of it.
    pub(crate) fn of(call: &Call, own: u32) -> Option<Self> {
        if !is_short(call) {
            return None;
        }
        let returns = call.contract.ending == Ending::Returns;
        // The guest calls its own IRET, which drops a return address first.
        let own = if call.number == Some(IRET) { own + DROPPING } else { own };
        let mut bytes = [0; 3];
        let mut length = 0;
        for byte in &mut bytes {
            // SAFETY: a routine of the guest's own, which is readable.
            let found = unsafe { ((own as usize + length) as *const u8).read_volatile() };
            let ends =
                if returns { found == RETURN } else { length > 0 && call.number == Some(IRET) };
            if ends {
                break;
            }
            *byte = found;
            length += 1;
        }
        Some(Self { bytes, length })
    }

    /// Their bytes.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// What a ROM that rewrites sites may make of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rewriting {
    /// The call's plain code, which leaves sites alone.
    pub(crate) plain: u32,
    native: Native,
    returns: bool,
    /// What the machine allows.
    rule: SiteRule,
}

/// What must stand at a site afterwards.
pub(crate) struct Wanted {
    pub(crate) bytes: [u8; LONGEST],
    /// The site does without the ROM.
    pub(crate) is_native: bool,
}

impl Rewriting {
    /// For a call whose native code is the guest's own; `None` for one that is not short.
    pub(crate) fn new(call: &Call, plain: u32, own: u32, rule: SiteRule) -> Option<Self> {
        let returns = call.contract.ending == Ending::Returns;
        Some(Self { plain, native: Native::of(call, own)?, returns, rule })
    }

    /// Whether the call comes back and is one instruction of one byte.
    pub(crate) fn is_one_byte(&self) -> bool {
        self.returns && self.native.length == 1
    }

    /// What must become of a site, from the rule alone.
    ///
    /// All of it changes at once, in one aligned word, unless there is only one processor: the
    /// native code, then a NOP, or a jump where a NOP would reach into the next word. If there is no
    /// room for that, CLI or STI goes to a NOP behind a direct call, and the call becomes a TEST. Any other
    /// direct call is led to the plain code, by its lowest byte alone.
    pub(crate) fn outcome(&self, site: &Site) -> Wanted {
        let mut bytes = site.original;
        let length = site.branch as u32;
        let native = self.native.bytes();
        let code = native.len() as u32;
        let (least, most) = if self.returns { (code + 2, length) } else { (code, code) };
        // Bytes before a return address in the first bytes of a page may be nobody's.
        let crosses = site.address / PAGE != (site.address + length - 1) / PAGE;
        let room = if self.rule == SiteRule::OneByte { 1 } else { site.in_a_word() };
        if self.rule == SiteRule::Never || crosses || !site.proves || site.original[0] == JUMP {
            return Wanted { bytes, is_native: false };
        }
        let rest = native.len()..site.branch;
        if self.rule == SiteRule::Anywhere || most <= room {
            bytes[..native.len()].copy_from_slice(native);
            if self.returns {
                bytes[rest.clone()].fill(OPERAND_SIZE);
                bytes[rest.end - 1] = if site.has_nop() { OPERAND_SIZE } else { NOP };
            }
            return Wanted { bytes, is_native: true };
        }
        if least <= room {
            bytes[..native.len()].copy_from_slice(native);
            if self.returns {
                bytes[rest.start] = 0xeb;
                bytes[rest.start + 1] = (rest.len() - 2) as u8;
            }
            return Wanted { bytes, is_native: true };
        }
        let behind = site.branch;
        if self.is_one_byte()
            && let [instruction] = native
            && (site.has_nop() || site.has_mov())
        {
            bytes[0] = TEST_EAX;
            bytes[behind] = *instruction;
            if site.has_mov() {
                bytes[behind + 1] = NOP;
            }
            return Wanted { bytes, is_native: true };
        }
        if bytes[0] == CALL {
            let distance = self.plain.wrapping_sub(site.end()).to_le_bytes();
            if distance[1..] == site.original[2..5] {
                bytes[1] = distance[0];
            }
        }
        Wanted { bytes, is_native: false }
    }
}

const IRET: CallNumber = vmi_abi::number::IRET;

/// Bytes of the instruction with which the guest's own IRET drops the return address.
const DROPPING: u32 = 4;

/// Whether the pages of call sites are read-only.
static PROTECTED: AtomicBool = AtomicBool::new(false);

/// Makes the pages of call sites read-only, or writable again.
pub(crate) fn protect(space: Space, read_only: bool) {
    PROTECTED.store(read_only, Ordering::Relaxed);
    for page in 0..2 {
        let linear = frames() + page * PAGE;
        let entry = space.entry(linear);
        let bits = space.load(entry);
        space.store(entry, if read_only { bits & !WRITE } else { bits | WRITE });
        processor::invlpg(linear);
    }
}

/// The site of the guest's own calls, which calls a function and then jumps to the point of return.
pub(crate) fn own_site(target: u32) -> u32 {
    let place = Place(OWN_SITE.wrapping_sub(SITES));
    let site = Site::through(place, CALL_POINTER, OWN_POINTER, target, true);
    site.write(harness::return_point as *const () as u32);
    site.start
}

/// A piece of code in the pages of call sites, written from its start to its end.
pub(crate) struct Area {
    code: u32,
    pointer: u32,
}

impl Area {
    /// An empty one; there is only one at a time.
    pub(crate) fn new() -> Self {
        const CODE: u32 = PAGE;
        // Below a page's last 256 bytes: an address with a byte FFh in it could be another call's
        // opcode, and a ROM leaves the site alone.
        const POINTERS: u32 = PAGE - 512;
        Self { code: frames() + CODE, pointer: frames() + POINTERS }
    }

    /// Where the next byte goes.
    pub(crate) fn here(&self) -> u32 {
        self.code
    }

    /// Appends bytes.
    pub(crate) fn append(&mut self, bytes: &[u8]) {
        write(self.code, bytes);
        self.code += bytes.len() as u32;
    }

    /// Appends a direct call or jump.
    pub(crate) fn append_branch(&mut self, opcode: u8, target: u32) {
        self.append(&[opcode]);
        self.append(&target.wrapping_sub(self.code + BRANCH_SIZE - 1).to_le_bytes());
    }

    /// Appends a call through a pointer of its own.
    pub(crate) fn append_pointer_call(&mut self, target: u32) {
        write(self.pointer, &target.to_le_bytes());
        self.append(&CALL_POINTER);
        self.append(&self.pointer.to_le_bytes());
        self.pointer += 4;
    }
}

fn frames() -> u32 {
    (&raw mut SITE_FRAMES) as u32
}

/// The pointer that a site reads.
fn pointer_of(site: &Site) -> u32 {
    let [_, _, a, b, c, d, ..] = site.original;
    u32::from_le_bytes([a, b, c, d])
}

/// Writes into the pages of call sites.
///
/// Write protection is lifted only where it matters: a processor may drop its translations with
/// CR0.WP, and a call that has to drop them would have nothing left to do.
fn write(address: u32, bytes: &[u8]) {
    let cr0 = PROTECTED.load(Ordering::Relaxed).then(processor::cr0);
    if let Some(cr0) = cr0 {
        processor::set_cr0(cr0 & !WRITE_PROTECT);
    }
    for (index, byte) in bytes.iter().enumerate() {
        let place = (address as *mut u8).wrapping_add(index);
        // SAFETY: inside the pages of call sites, which nobody executes now.
        unsafe { place.write_volatile(*byte) };
    }
    if let Some(cr0) = cr0 {
        processor::set_cr0(cr0);
    }
}
