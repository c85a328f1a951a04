//! Native code where the guest calls the ROM: how a call dissolves into the kernel.
//!
//! Some calls are no longer than the instruction that calls them. The first time such a call is
//! entered from a site in the kernel, [`rewrite_site`] puts the call's own instructions over the
//! site, and the kernel runs native code there from then on. `docs/site-rewriting.md` says what
//! makes that safe.

use crate::binding::{SHORT_PLAIN, SiteRule};
use core::mem::offset_of;
use x86::controlregs::Cr0;

/// Bytes that a short call's own instructions may have.
pub(super) const ROOM: u32 = 6;

/// From a short call's entry to where [`rewrite_site`] returns to.
///
/// There stand, with the bytes of each: a jump over the call, [`SHORT_PLAIN`]; the call itself, [`ROOM`]; PUSHFD and CLI, 1 each; CALL,
/// 5. Behind them are a TEST of EAX with a [`Record`], POPFD, and a jump back to the call itself. The TEST does nothing but hold the
/// record, so that whoever reads the image as code finds nothing else in it.
const RETURN: u32 = SHORT_PLAIN as u32 + ROOM + 1 + 1 + 5;
const RECORD: u32 = RETURN + 1;

/// The opcode of that TEST. It may also take the place of a direct call's, so that the distance is
/// the number that is tested.
pub(super) const HOLDER: u8 = 0xa9;

/// What [`rewrite_site`] is told about a call.
#[repr(C)]
pub(super) struct Record {
    /// Bytes of the call's own instructions.
    code: u8,
    /// Bytes of a site that must change at least: the instructions, and a jump over what is left of
    /// the site. Only the instructions where nothing comes back to the site.
    least: u8,
    /// Bytes between the plain entry and the instructions.
    skip: u8,
    /// Zero.
    unused: u8,
}

const _: () = assert!(size_of::<Record>() == size_of::<u32>());

/// Bytes of `call rel32`, and its opcode.
const DIRECT: u32 = 5;
const DIRECT_OPCODE: u8 = 0xe8;

/// Opcode and ModRM byte of `call [disp32]`, which has a byte more.
const INDIRECT_OPCODE: u16 = 0x15ff;

/// First byte of every shorter `call`, through a register or through memory behind one.
const SHORTER_OPCODE: u8 = 0xff;

/// `jmp rel8`: opcode, and bytes of the whole.
const SHORT_JUMP: u8 = 0xeb;

/// What an unused byte of a site is filled with: prefixes that change nothing, and a NOP behind them.
const OPERAND_SIZE: u8 = 0x66;
const NOP: u8 = 0x90;

/// Instructions of two bytes that do nothing, as kernels have them behind a site: a NOP with one of
/// these prefixes, the beginning of one with more of them, MOV of ESI and of EAX to itself.
const SHORT_NOP: u16 = u16::from_le_bytes([OPERAND_SIZE, NOP]);
const LONG_NOP: u16 = u16::from_le_bytes([OPERAND_SIZE, OPERAND_SIZE]);
const MOV_ESI: u16 = u16::from_le_bytes([0x89, 0xf6]);
const MOV_EAX: u16 = u16::from_le_bytes([0x8b, 0xc0]);

/// Bytes in a page of memory, and in a word that every processor sees changed as a whole.
const PAGE: u32 = 4096;
const WORD: u32 = 8;

/// What holds until POST, or the kernel that the image is linked into, has looked at the machine.
const RULE: SiteRule = if cfg!(feature = "linked") { SiteRule::Never } else { SiteRule::InAWord };

/// The bit in CR0 that protects read-only memory from the kernel.
const WRITE_PROTECT: u32 = Cr0::CR0_WRITE_PROTECT.bits().trailing_zeros();

/// What PUSHAD leaves on the stack.
const SAVED: u32 = 32;

routines! {
    /// Puts a short call's instructions over the site that it was called from.
    ///
    /// In: on the stack where it returns to, the flags on entry, the site's return address;
    /// interrupts disabled. Uses SS alone. Out: if the site was rewritten, goes on there, with
    /// registers, flags and stack as they were before the call. Otherwise returns, with all
    /// registers kept.
    rewrite_site {
        "pushad",
        "mov ebp, esp",
        "mov esi, [ebp + {return_address}]",
        "mov edi, [ebp + {return_to_call}]",
        "sub edi, {returned}",

        // The bytes before the return address. They are there if they lie in its page: the
        // processor fetched the call's last byte from it.
        // ESI: end of the site. EDI: entry of the call. ECX: the site's length.
        "lea eax, [esi - 1]",
        "and eax, {page} - 1",
        "mov ecx, {direct}",
        "cmp eax, {direct} - 1",
        "jb 9f",
        "mov edx, ss:[esi - 4]",
        "movzx ebx, word ptr ss:[esi - 5]",
        "cmp bl, {direct_opcode}",
        "jne 2f",
        "lea eax, [esi + edx]",
        "jmp 3f",

        // Every other call that could end here begins with FF two, three, four or seven bytes
        // before: without that it is the one that begins with FF 15, and its pointer was just read.
        "2: inc ecx",
        "cmp eax, {direct}",
        "jb 9f",
        "movzx ebx, word ptr ss:[esi - 6]",
        "cmp bx, {indirect_opcode}",
        "jne 9f",
        "cmp dl, {shorter_opcode}",
        "je 9f",
        "cmp dh, {shorter_opcode}",
        "je 9f",
        "mov eax, edx",
        "shr eax, 16",
        "cmp al, {shorter_opcode}",
        "je 9f",
        "mov eax, ss:[edx]",
        "3: cmp eax, edi",
        "jne 9f",
        "push ebx",                             // [EBP - 4]: the opcode.
        "push edx",                             // [EBP - 8]: distance or pointer.

        // May sites be rewritten on this machine, and how?
        // The rule is a part of the instruction. POST sets it, and keeps the sum with the next byte.
        "4: mov edx, {rule}",
        ".globl site_rule",
        ".hidden site_rule",
        ".set site_rule, 4b + 1",
        "test dl, dl",
        "jz 9f",

        // How much of the site is to change: all of it, or as little as must.
        // EAX: bytes to change. EBX: bytes of code. DL: rule. ESI: the site.
        "movzx ebx, byte ptr ss:[edi + {record} + {code}]",
        "sub esi, ecx",
        "mov eax, ecx",
        "cmp bl, ss:[edi + {record} + {least}]",
        "jne 5f",
        "mov eax, ebx",
        "5: cmp dl, {one_byte}",
        "jne 50f",
        "cmp eax, 1",
        "jne 52f",
        "50: mov ecx, esi",
        "and ecx, {word} - 1",
        "push ecx",
        "add ecx, eax",
        "cmp ecx, {word}",
        "pop ecx",
        "jbe 6f",
        "cmp dl, {anywhere}",
        "jne 51f",
        // Nobody else runs code: the last eight bytes, which end with the site. They lie in its
        // page: a site that crosses a word does not lie in the page's first.
        "lea ecx, [esi + {word}]",
        "sub ecx, [ebp + {return_address}]",
        "jmp 6f",
        "51: movzx eax, byte ptr ss:[edi + {record} + {least}]",
        "push ecx",
        "add ecx, eax",
        "cmp ecx, {word}",
        "pop ecx",
        "jbe 6f",

        // No room in one word, or only one byte may change. A direct site of CLI or STI that a NOP
        // stands behind takes two changes, each right by itself: the NOP's first byte becomes the
        // instruction, which after a call does again what the call did, and when that is there the
        // call becomes a TEST. The site is entered again after each.
        "52: cmp byte ptr [ebp - 4], {direct_opcode}",
        "jne 9f",
        "dec bl",                               // What has one byte and comes back is CLI or STI.
        "jnz 56f",
        "movzx edx, byte ptr ss:[edi + {plain}]",
        "mov ecx, [ebp + {return_address}]",
        "call 20f",
        "je 54f",
        "cmp al, dl",
        "je 55f",
        "cmp ax, {mov_esi}",
        "je 53f",
        "cmp ax, {mov_eax}",
        "jne 56f",
        // Both of its bytes must change. Nobody executes it meanwhile: whoever calls and sees it
        // comes back behind it.
        "53: lea ebx, [ecx + 1]",
        "test bl, {word} - 1",
        "jz 56f",
        "add dword ptr [ebp + {return_address}], 2",
        "mov dh, {nop}",
        "xor dh, ah",
        "54: xor dl, al",
        "jmp 57f",
        "55: mov ecx, esi",
        "mov al, {direct_opcode}",
        "mov dl, {direct_opcode} ^ {holder}",
        "jmp 57f",

        // A site that calls directly can still call the plain entry: one byte says so, unless the
        // distance needs a carry.
        "56: lea ecx, [esi + 1]",
        "mov al, [ebp - 8]",
        "movzx edx, al",
        "add dl, {plain}",
        "jc 9f",
        "xor dl, al",

        // The word, and a copy of it that is changed.
        // ECX: where. AL: the byte that was found there. DL, DH: which bits of it and of the next one change.
        "57: mov ebx, ecx",
        "and ebx, -{word}",
        "sub ecx, ebx",
        "push esi",
        "push ebx",
        "push dword ptr ss:[ebx + 4]",
        "push dword ptr ss:[ebx]",
        "push dword ptr [esp + 4]",
        "push dword ptr [esp + 4]",
        "cmp al, [esp + ecx]",                  // Another processor was here first.
        "jne 9f",
        "xor [esp + ecx], dx",
        "jmp 8f",

        // The word, and a copy of it in which the site is changed.
        // EAX: bytes to change. EBX: bytes of code. ECX: the site's place in the word.
        "6: push esi",
        "mov edx, esi",
        "sub edx, ecx",
        "push edx",
        "push dword ptr ss:[edx + 4]",
        "push dword ptr ss:[edx]",
        "push dword ptr [esp + 4]",
        "push dword ptr [esp + 4]",
        "mov dl, [ebp - 4]",
        "cmp dl, [esp + ecx]",                  // Another processor was here first.
        "jne 9f",
        "lea edx, [esi + eax]",
        "sub edx, [ebp + {return_address}]",
        "neg edx",                              // EDX: bytes of the site that stay.
        "add ecx, esp",                         // ECX: where the site is in the copy.
        "add eax, ecx",                         // EAX: where the change ends.
        "movzx esi, byte ptr ss:[edi + {record} + {skip}]",
        "lea esi, [edi + esi + {plain}]",       // ESI: the code.
        "7: mov bh, ss:[esi]",
        "mov ss:[ecx], bh",
        "inc esi",
        "inc ecx",
        "dec bl",
        "jnz 7b",
        "cmp ecx, eax",
        "je 8f",                                // Nothing comes back to the rest.
        "test edx, edx",
        "jz 72f",
        "mov byte ptr ss:[ecx], {short_jump}",
        "mov ss:[ecx + 1], dl",
        "jmp 8f",
        "71: mov byte ptr ss:[ecx], {operand_size}",
        "inc ecx",
        "72: lea edx, [ecx + 1]",
        "cmp edx, eax",
        "jne 71b",
        // A NOP behind a direct call belongs to the site: the prefixes are that one's.
        "mov dl, {nop}",
        "cmp byte ptr [ebp - 4], {direct_opcode}",
        "jne 73f",
        "call 20f",
        "jne 73f",
        "mov dl, {operand_size}",
        "73: mov ss:[ecx], dl",

        // In: on the stack the changed word, the word as it was, its address, the site.
        "8: pop ebx",
        "pop ecx",
        "pop eax",
        "pop edx",
        "pop edi",
        "mov esi, cr0",
        "push esi",
        "btr esi, {write_protect}",
        "mov cr0, esi",
        "lock cmpxchg8b qword ptr ss:[edi]",
        "setz bl",                              // MOV to CR0 leaves the flags undefined.
        "pop esi",
        "mov cr0, esi",
        "test bl, bl",
        "jz 9f",                                // Another processor or an NMI was here first.
        "pop esi",
        "mov [ebp + {return_address}], esi",
        "mov esp, ebp",
        "popad",
        "add esp, 4",
        "popfd",
        "ret",

        "9: mov esp, ebp",
        "popad",
        "ret",

        // What comes behind the site: the kernel's next instruction, if it lies in the site's page.
        // Out: EAX: two bytes of it, or all ones; equal if it is a NOP, with or without prefixes.
        "20: mov eax, [ebp + {return_address}]",
        "inc eax",
        "test ax, {page} - 2",
        "jz 21f",
        "movzx eax, word ptr ss:[eax - 1]",
        "cmp al, {nop}",
        "je 22f",
        "cmp ax, {long_nop}",
        "je 22f",
        "cmp ax, {short_nop}",
        "jmp 22f",
        "21: or eax, -1",
        "22: ret",

        return_to_call = const SAVED,
        returned = const RETURN,
        return_address = const SAVED + 8,
        record = const RECORD,
        code = const offset_of!(Record, code),
        least = const offset_of!(Record, least),
        skip = const offset_of!(Record, skip),
        plain = const SHORT_PLAIN,
        page = const PAGE,
        word = const WORD,
        direct = const DIRECT,
        direct_opcode = const DIRECT_OPCODE,
        indirect_opcode = const INDIRECT_OPCODE,
        shorter_opcode = const SHORTER_OPCODE,
        short_jump = const SHORT_JUMP,
        operand_size = const OPERAND_SIZE,
        nop = const NOP,
        short_nop = const SHORT_NOP,
        long_nop = const LONG_NOP,
        mov_esi = const MOV_ESI,
        mov_eax = const MOV_EAX,
        holder = const HOLDER,
        write_protect = const WRITE_PROTECT,
        one_byte = const SiteRule::OneByte as u8,
        rule = const RULE as u8,
        anywhere = const SiteRule::Anywhere as u8,
    }
}
