//! The calls that only revision 13.x has.

#![expect(non_snake_case, reason = "the specification's names")]
#![expect(unsafe_code, reason = "UNSAFETY: plays another processor that changes an entry")]

use super::memory::{
    ends_a_delay, fill_words, lacks_long_entries, long_arguments, mark_frames, on_a_live_entry,
    stores_long, stores_short, words, words_are,
};
use super::timer::long;
use crate::harness::Outcome;
use crate::paging::{Mode, PRESENT};
use crate::processor;
use crate::session::{Arguments, Session};
use spin::Mutex;
use vmi_abi::calls::SLOTS_13;
use vmi_abi::flags::DeferredFlags;
use vmi_abi::header::SLOT_SIZE;
use vmi_abi::{RelocationInfo, RelocationType};

pub(crate) fn Init(s: &mut Session) {
    s.each(|s| {
        let Outcome { after, .. } = s.call(Arguments::NONE);
        s.equal("EAX", after.registers.eax, 0);
    });
}

pub(crate) fn GetRelocationInfo(s: &mut Session) {
    s.each(|s| {
        for number in SLOTS_13.map(u32::from) {
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(number));
            let answer = RelocationInfo::from_registers(after.registers.eax, after.registers.edx);
            s.equal("the type's number", answer.kind.0.into(), RelocationType::CALL_REL.0.into());
            s.equal("the address", answer.eip.get(), s.rom.base + number * SLOT_SIZE as u32);
        }
        for number in [0, u32::from(*SLOTS_13.start()) - 1, u32::MAX] {
            let Outcome { after, .. } = s.call(Arguments::NONE.eax(number));
            s.equal(
                "the type's number for what is no call",
                after.registers.edx & 0xff,
                RelocationType::NONE.0.into(),
            );
        }
    });
}

pub(crate) fn INVD(s: &mut Session) {
    const HYPERVISOR: u32 = 1 << 31;
    if processor::cpuid(1, 0)[2] & HYPERVISOR == 0 {
        s.skipped = Some("on bare hardware it loses what the caches hold");
        return;
    }
    s.each(|s| {
        let wanted = fill_words(s);
        s.call(Arguments::NONE);
        words_are(s, &wanted);
    });
}

pub(crate) fn Pause(s: &mut Session) {
    s.each(|s| {
        s.call(Arguments::NONE);
    });
}

pub(crate) fn FlushDeferredCalls(s: &mut Session) {
    mark_frames();
    s.each(|s| {
        let (processor, tables) = (DeferredFlags::CPU.bits(), DeferredFlags::PT.bits());
        for flags in [0, processor, tables, processor | tables] {
            ends_a_delay(s, flags);
        }
    });
}

pub(crate) fn SetPxETwoArguments(s: &mut Session) {
    stores_short(s, &[0], |s, value, entry, _| {
        s.call(Arguments::NONE.eax(value).edx(entry));
    });
}

pub(crate) fn SetPxELongTwoArguments(s: &mut Session) {
    stores_long(s, &[0], |s, value, entry, _| {
        s.call(long_arguments(value, entry));
    });
}

/// Something that is done to an entry in one step: from its value to the call's result, and to the
/// new value.
type Step = fn(u64) -> (u64, u64);

/// Another processor, which changes an entry once while a traced call runs.
struct Other {
    entry: u32,
    changes: u64,
    /// Before which instruction; counts down to it.
    after: u32,
    done: bool,
}

static OTHER: Mutex<Other> = Mutex::new(Other { entry: 0, changes: 0, after: 0, done: false });

/// The most instructions of a call and its site between which the other processor acts.
const LONGEST: u32 = 20;

fn act() {
    let mut other = OTHER.lock();
    if other.done {
        return;
    }
    if other.after > 0 {
        other.after -= 1;
        return;
    }
    other.done = true;
    let entry = other.entry as *mut u64;
    // SAFETY: two words of the tests'.
    unsafe { entry.write_volatile(entry.read_volatile() ^ other.changes) };
}

/// Tries a call on an entry in memory. It does what `step` says, to nothing but the entry, and in one
/// step: whatever another processor does to the entry meanwhile comes before or after it.
fn in_one_step(s: &mut Session, long_entry: bool, step: Step, call: fn(&mut Session, u32) -> u64) {
    let changes = if long_entry { 0x8000_0040_0000_0020 } else { 0x20 };
    let times = if s.variant.traced { LONGEST } else { 2 };
    for after in 0..times {
        let mut wanted = fill_words(s);
        let entry = words().wrapping_add(2) as u32;
        let value = |words: &[u32; 8]| match long_entry {
            true => u64::from(words[3]) << 32 | u64::from(words[2]),
            false => u64::from(words[2]),
        };
        let before = value(&wanted);
        if s.variant.traced {
            *OTHER.lock() = Other { entry, changes, after, done: false };
            s.watch = Some(act);
        }
        let result = call(s, entry);
        s.watch = None;
        let acted = core::mem::replace(&mut OTHER.lock().done, false);
        // SAFETY: the words of the entry.
        let (low, high) = unsafe {
            (words().wrapping_add(2).read_volatile(), words().wrapping_add(3).read_volatile())
        };
        wanted[2] = low;
        if long_entry {
            wanted[3] = high;
        }
        let found = (result, value(&wanted));
        words_are(s, &wanted);
        let alone = step(before);
        let holds = if acted {
            found == step(before ^ changes) || found == (alone.0, alone.1 ^ changes)
        } else {
            found == alone
        };
        let (result, now) = found;
        s.expect(
            holds,
            format_args!(
                "{before:#x} became {now:#x}, the result is {result:#x}, another processor changed it: {acted}"
            ),
        );
    }
}

/// EAX.
fn short(outcome: &Outcome) -> u64 {
    u64::from(outcome.after.registers.eax)
}

pub(crate) fn GetPxE(s: &mut Session) {
    s.each(|s| {
        in_one_step(
            s,
            false,
            |value| (value, value),
            |s, entry| short(&s.call(Arguments::NONE.eax(entry))),
        );
    });
}

pub(crate) fn GetPxELong(s: &mut Session) {
    if lacks_long_entries(s) {
        return;
    }
    s.each(|s| {
        in_one_step(
            s,
            true,
            |value| (value, value),
            |s, entry| long(&s.call(Arguments::NONE.eax(entry))),
        );
    });
}

/// What the exchanges put into an entry.
const NEW: u64 = 0x8000_0012_3456_7067;

pub(crate) fn SwapPxE(s: &mut Session) {
    const SHORT: u64 = NEW & 0xffff_ffff;
    stores_short(s, &[0], |s, value, entry, _| {
        s.call(Arguments::NONE.eax(value).edx(entry));
    });
    s.each(|s| {
        in_one_step(
            s,
            false,
            |value| (value, SHORT),
            |s, entry| short(&s.call(Arguments::NONE.eax(SHORT as u32).edx(entry))),
        );
    });
}

pub(crate) fn SwapPxELongAtomic(s: &mut Session) {
    stores_long(s, &[0], |s, value, entry, _| {
        s.call(long_arguments(value, entry));
    });
    if s.skipped.is_none() {
        s.each(|s| {
            in_one_step(
                s,
                true,
                |value| (value, NEW),
                |s, entry| long(&s.call(long_arguments(NEW, entry))),
            );
        });
    }
}

pub(crate) fn DeactivatePxELongAtomic(s: &mut Session) {
    if lacks_long_entries(s) {
        return;
    }
    s.each(|s| {
        in_one_step(
            s,
            true,
            |value| (value, 0),
            |s, entry| long(&s.call(Arguments::NONE.eax(entry))),
        );
        on_a_live_entry(s, Mode::Pae, false, |s, entry| {
            s.call(Arguments::NONE.eax(entry));
        });
    });
}

/// The bits of the entry that is tried: those of the lowest byte's ends, one that another processor
/// changes too, and the highest.
macro_rules! test_bits {
    ($s:ident, $long:literal, $mode:ident, $maps:literal, |$value:ident, $mask:ident| $new:expr; $($bit:literal)*) => {
        $s.each(|s| {
            $( in_one_step(
                s,
                $long,
                |$value| {
                    let $mask = 1_u64 << $bit;
                    (u64::from($value & $mask != 0), $new)
                },
                |s, entry| {
                    // Any value but 0 says that the bit was set.
                    u64::from(short(&s.call(Arguments::NONE.eax($bit).edx(entry))) != 0)
                },
            ); )*
            on_a_live_entry(s, Mode::$mode, $maps, |s, entry| {
                s.call(Arguments::NONE.eax(PRESENT.trailing_zeros()).edx(entry));
            });
        })
    };
}

pub(crate) fn TestAndSetPxEBit(s: &mut Session) {
    test_bits!(s, false, NonPae, true, |value, mask| value | mask; 0 5 6 31);
}

pub(crate) fn TestAndClearPxEBit(s: &mut Session) {
    test_bits!(s, false, NonPae, false, |value, mask| value & !mask; 0 5 6 31);
}

pub(crate) fn TestAndSetPxELongBit(s: &mut Session) {
    test_bits!(s, true, Pae, true, |value, mask| value | mask; 0 5 6 38 63);
}

pub(crate) fn TestAndClearPxELongBit(s: &mut Session) {
    test_bits!(s, true, Pae, false, |value, mask| value & !mask; 0 5 6 38 63);
}
