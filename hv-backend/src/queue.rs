//! The update queue of one processor: updates wait in it until somebody could see that they are missing.
//!
//! **Order.** There is one queue for page tables, descriptors and registers, first in, first out. An update that may not
//! wait takes everything before it along. So the hypervisor sees all updates in the order in which the guest made them.
//!
//! **Visibility.** Every call that is no update is made through [`Queue::call`], which flushes for all calls but those that
//! [`Role`] knows to be indifferent. InvalPage, FlushTLB, AllocatePage and ReleasePage are updates that do not wait: one hypercall
//! carries them and what is before them. A page fault is seen as GetCR2, a flush on another processor as APICWrite: a backend that
//! does not serve APICWrite cannot know of the latter, and must treat updates as if they had no DEFER flag.
//!
//! **Late.** Where nobody but this processor has the guest's tables, and the hypervisor treats what it made of them as a processor
//! treats its TLB, more may wait: [`Queue::tell_late`]. Then the guest's memory holds each change of an entry before the update is
//! taken, and the update tells no more than that there is one. A change that allows more is found by the page fault of the first
//! use, in memory; one that allows less may be seen late, as with a TLB, until InvalPage, FlushTLB or SetCR3. AllocatePage and
//! ReleasePage wait with the entries, in the order of which they make sense; but a frame whose ReleasePage waits does not become a table
//! again before that is told, because what was made of the old table is known by its frame. Leaving the mode MMU and GetCR2 flush nothing
//! then, and SetCR3 in the mode CPU lets what is before it wait with it: leaving that mode is the load of CR3.
//!
//! **Quiet.** A hypervisor that leaves the guest its page faults does not find what became present. It shows in [`Queue::shown`] which frames
//! have tables that it has made something of. An entry of such a table that becomes present is told at once, or where the mode MMU is
//! left in which it did; GetCR2 flushes if an entry of them waits that the fault may come of, and a fault that comes again and again is put
//! before the hypervisor, so that none comes for ever. A table of which nothing was
//! made cannot be used before an entry of another table leads to it, so its entries wait as before. Where the map is clear all is as above.
//!
//! **Coalescing.** An update replaces the one *directly* before it if both are the same call for the same place. Nothing is
//! coalesced across a third update: with "clear A, set B, set A" neither of A's places in the order could be left
//! out without showing the hypervisor a state of the tables that the guest never made, such as a page that is mapped writable by A
//! while B makes it a page table. It is done at the flush, so that taking an update stays short.
//!
//! **Interrupts.** An interrupt may make calls of its own, also in the middle of a call. Each operation is therefore one section with
//! interrupts off, by the backend's hooks. Without them a flush cannot be made safe: between the moment when arguments are
//! loaded and the hypercall itself, a nested flush would either apply the same updates a second time, or return to
//! a handler that was promised that they are visible. The longest section is the flush of a full queue, so the capacity bounds it. A
//! queue that becomes full is flushed at once.
//!
//! **Failure.** What a hypervisor did not apply stays in the queue, in its place. Each refusal is counted and reported; then the
//! refused update is tried alone, and the rest goes on as a batch. What is refused for good, or [`ATTEMPTS`] times, stops the
//! guest: going on without it would let the guest believe in tables that are not there.
//!
//! What the queue cannot know is memory that the guest writes itself: an entry with an update that waits reads as before it, and must
//! not be written directly until a flush. That is the guest's part of the interface.

use crate::backend::{Backend, Failure, InterruptMask, Reason, Refusal};
use crate::reference::interface::{DIRECTORIES, MAP_WORDS, SHOWN_BYTES};
use crate::update::{Role, Update};
use core::cell::Cell;
use core::mem::offset_of;
use core::sync::atomic::{Ordering, compiler_fence};
use vmi_abi::flags::{EntryFlags, LazyMode};
use vmi_abi::{Call, number};

/// How many times in a row an update is tried before the guest is stopped.
pub const ATTEMPTS: u32 = 8;

/// In an entry: present.
const PRESENT: u32 = 1;

/// Bytes of a page.
const PAGE_SIZE: u32 = 4096;

/// The page of a linear address.
const PAGE: u32 = !(PAGE_SIZE - 1);

/// How often a page fault comes again before the hypervisor is asked. A page that is read and then stored to has two, and a copy of its
/// space may follow.
const REPEATS: u32 = 2;

/// How changes are told late: where page faults tell of some, and where they may not.
const LATE: u32 = 1;
const QUIET: u32 = 2;

/// Which entries may be used at once: none in the mode MMU; outside of it those of the space that the guest is in, or perhaps any.
const NONE_USED: u32 = CURRENT_USED + 1;
const CURRENT_USED: u32 = EntryFlags::CURRENT_AS.bits();
const ANY_USED: u32 = 0;

/// The note of an update of an entry that the guest stored itself, with the present bit if it may have become present by that.
pub const CHANGED: u32 = 2;

/// Whether a test asked for a deliberate fault. Outside of tests there is none.
macro_rules! faulty {
    ($fault:ident $(if $condition:expr)?) => {{
        #[cfg(test)]
        let faulty = tests::Fault::$fault.is_on() $(&& $condition)?;
        #[cfg(not(test))]
        let faulty = false;
        faulty
    }};
}

/// A place where a test lets interrupts come.
macro_rules! step {
    ($backend:ident) => {
        #[cfg(test)]
        $backend.step();
    };
}

/// The updates of one processor that wait. It lies in memory that the caller provides; zeroes are an empty queue.
#[derive(Debug)]
#[repr(C)]
pub struct Queue<const CAPACITY: usize> {
    /// The number of refusals so far, for the guest to read. It wraps.
    failures: Cell<u32>,
    /// [`LazyMode`].
    mode: Cell<u32>,
    /// Not zero where changes may be told late: [`LATE`] or [`QUIET`].
    late: Cell<u32>,
    /// Entries wait whose CURRENT_AS, as a number, is less: [`NONE_USED`], [`CURRENT_USED`] or [`ANY_USED`].
    used_from: Cell<u32>,
    /// The linear address of the last page fault that the guest looked at, and how often it has come again in a row.
    fault: Cell<u32>,
    repeats: Cell<u32>,
    /// The guest's memory, as it has it mapped for good. Programs are below.
    memory: Cell<LinearMapping>,
    /// How many updates are in the queue.
    count: Cell<u32>,
    /// How many of them are applied already, from the front. Zero but for a flush, and after a stop.
    applied: Cell<u32>,
    /// Not zero once an update was refused for good.
    stopped: Cell<u32>,
    /// Which tables matter at once. The hypervisor stores it.
    shown: Shown,
    updates: [Cell<Update>; CAPACITY],
}

/// What a hypervisor shows that leaves the guest its page faults: which tables it has made something of.
#[derive(Debug)]
#[repr(C)]
pub struct Shown {
    /// Their frames, a bit for each remainder of their numbers.
    pub map: [Cell<u32>; MAP_WORDS],
    /// The directories that the processor walks, each with [`PRESENT`]; 0: none.
    pub directories: [Cell<u32>; DIRECTORIES],
}

const _: () = assert!(size_of::<Shown>() == SHOWN_BYTES as usize);

/// Linear addresses at which the guest maps physical memory and never anything else: slot 0 of SetLinearMapping.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct LinearMapping {
    /// The first of them.
    pub linear: u32,
    /// How many bytes.
    pub bytes: u32,
    /// The physical address of the first.
    pub physical: u32,
}

impl LinearMapping {
    const NOTHING: Self = Self { linear: 0, bytes: 0, physical: 0 };

    /// Of so many pages, the first of which is this frame.
    #[must_use]
    pub const fn of_pages(linear: u32, pages: u32, frame: u32) -> Self {
        const MOST: u32 = u32::MAX / PAGE_SIZE;
        let pages = if pages < MOST { pages } else { MOST };
        Self { linear, bytes: pages * PAGE_SIZE, physical: frame.wrapping_mul(PAGE_SIZE) }
    }

    /// The physical address of what is mapped there.
    #[inline(always)]
    const fn physical(&self, linear: u32) -> Option<u32> {
        let offset = linear.wrapping_sub(self.linear);
        if offset < self.bytes { Some(self.physical.wrapping_add(offset)) } else { None }
    }
}

impl<const CAPACITY: usize> Default for Queue<CAPACITY> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const CAPACITY: usize> Queue<CAPACITY> {
    /// Where in the queue the guest finds the number of refusals, 32 bits.
    pub const FAILURES_OFFSET: usize = offset_of!(Self, failures);

    /// An empty queue, not in a lazy mode.
    #[must_use]
    pub const fn new() -> Self {
        const { assert!(CAPACITY > 0 && CAPACITY <= u32::MAX as usize) };
        Self {
            failures: Cell::new(0),
            mode: Cell::new(LazyMode::OFF.0),
            late: Cell::new(0),
            used_from: Cell::new(0),
            fault: Cell::new(0),
            repeats: Cell::new(0),
            memory: Cell::new(LinearMapping::NOTHING),
            count: Cell::new(0),
            applied: Cell::new(0),
            stopped: Cell::new(0),
            shown: Shown {
                map: [const { Cell::new(0) }; MAP_WORDS],
                directories: [const { Cell::new(0) }; DIRECTORIES],
            },
            updates: [const { Cell::new(Update::ZERO) }; CAPACITY],
        }
    }

    /// Takes an update. When this returns it is visible, or it may wait and does.
    #[inline]
    pub fn submit(&self, backend: &impl Backend, update: Update) {
        self.uninterrupted(backend, || {
            self.submit_uninterrupted(backend, update, || self.drain(backend));
        });
    }

    /// [`Queue::submit`] where interrupts are off already. Where something has to go over it calls `flush`, which does
    /// [`Queue::flush`] in the caller's own way.
    ///
    /// This is the frequent case: it is compiled for each call by itself, and has one way for all that may wait.
    #[inline(always)]
    pub fn submit_uninterrupted(&self, backend: &impl Backend, update: Update, flush: impl Fn()) {
        let may_wait = || {
            let wrongly = faulty!(InvalPageWaits if update.call == number::InvalPage);
            let late = update.is_of_page() && self.is_late() && !self.begins_anew(&update);
            late || update.may_wait(LazyMode(self.mode.get()))
                || wrongly
                || faulty!(EverythingWaits)
        };
        // What was before SetCR3 is visible after it, even where SetCR3 itself may wait.
        if update.call == number::SetCR3
            && !self.is_late()
            && may_wait()
            && !faulty!(EntriesWaitBeyondSetCr3)
        {
            flush();
        }
        let behind = || {
            if !may_wait() {
                flush();
            }
        };
        self.take(backend, update, behind, &flush);
    }

    /// Whether a frame becomes a table whose end as one still waits to be told.
    #[inline(always)]
    fn begins_anew(&self, update: &Update) -> bool {
        let is_its_end =
            |other: Update| other.call == number::ReleasePage && other.address == update.address;
        update.call == number::AllocatePage
            && self.pending().iter().any(is_its_end)
            && !faulty!(BeginsAnewUntold)
    }

    /// From here on the guest's memory holds each change of an entry [there](Queue::physical) before its update is taken, and changes may
    /// be told late; `quiet`: the hypervisor may leave the guest its page faults. The kernel's own addresses begin with its memory.
    pub fn tell_late(&self, quiet: bool, memory: LinearMapping) {
        self.late.set(if quiet { QUIET } else { LATE });
        self.memory.set(memory);
        self.enter(self.lazy_mode());
    }

    /// What [`Queue::tell_late`] began ends; nothing waits.
    pub fn tell_promptly(&self) {
        self.late.set(0);
        self.memory.set(LinearMapping::NOTHING);
        self.enter(self.lazy_mode());
    }

    /// The physical address of an entry of which may be told late.
    #[inline(always)]
    pub fn physical(&self, entry: u32) -> Option<u32> {
        self.memory.get().physical(entry)
    }

    /// Whether changes may be told late.
    #[inline(always)]
    #[must_use]
    pub fn is_late(&self) -> bool {
        self.late.get() != 0
    }

    /// What a hypervisor stores that leaves the guest its page faults.
    #[must_use]
    pub const fn shown(&self) -> &Shown {
        &self.shown
    }

    /// Whether the entry that an update tells of may be one of a table that matters at once.
    #[inline(always)]
    fn is_in_use(&self, update: &Update) -> bool {
        let frame = update.address / PAGE_SIZE;
        let is_shadowed =
            self.shown.map[frame as usize / 32 % MAP_WORDS].get() >> (frame % 32) & 1 != 0;
        let is_of_other_directory =
            || update.high & EntryFlags::PD.bits() != 0 && self.directory_maps(update).is_none();
        is_shadowed && !is_of_other_directory()
    }

    /// The first linear address that an entry is for, if it is one of a directory that the processor walks.
    fn directory_maps(&self, update: &Update) -> Option<u32> {
        let directory = update.address & PAGE | PRESENT;
        let gibibyte = self.shown.directories.iter().position(|shown| shown.get() == directory)?;
        let Place { index, shift, .. } = Place::of(update);
        Some((gibibyte as u32) << 30 | index << shift)
    }

    /// Whether an entry of such a table waits whose note has one of these bits, and that `concerns`.
    fn is_missed(&self, bits: u32, concerns: impl Fn(&Update) -> bool) -> bool {
        self.pending()
            .iter()
            .any(|update| update.low & bits != 0 && self.is_in_use(&update) && concerns(&update))
    }

    /// GetCR2: the guest looks at a page fault at this address, before it does anything about it.
    ///
    /// What it may come of is made visible. Told late, all of it is in memory but a load of CR3; where the processor found the fault
    /// without the hypervisor, an entry that waits may have caused it. What comes again and again there is for `reconsider`, which has the
    /// hypervisor look.
    #[inline(always)]
    pub fn fault(&self, backend: &impl Backend, linear: u32, reconsider: impl FnOnce()) {
        let is_same = self.fault.replace(linear) == linear;
        let repeats = if is_same { self.repeats.get().wrapping_add(1) } else { 0 };
        self.repeats.set(repeats);
        let matters = || {
            if !self.is_late() {
                return !faulty!(GetCR2DoesNotFlush);
            }
            let loads = self.lazy_mode() == LazyMode::CPU && !faulty!(FaultsOvertakeSetCr3);
            let may_cause = |update: &Update| may_translate(update, linear);
            loads || self.is_missed(!0, may_cause) && !faulty!(FaultsOvertakeEntries)
        };
        if matters() {
            self.flush(backend);
        }
        if repeats >= REPEATS && self.is_quiet() && !faulty!(FaultsComeForEver) {
            self.repeats.set(0);
            reconsider();
        }
    }

    /// Whether an entry is for a program's addresses in the current space: by the guest's flags, or by its place in a directory. There a
    /// kernel bears a page fault that its tables do not have: it finds nothing to do, and goes on.
    #[inline(always)]
    fn is_borne(&self, update: &Update) -> bool {
        let is_page = update.high & CURRENT_USED != 0;
        let linear = if is_page { Some(update.high) } else { self.directory_maps(update) };
        linear.is_some_and(|linear| linear < self.memory.get().linear || faulty!(KernelsBearAll))
    }

    /// Whether the hypervisor leaves the guest its page faults now.
    fn is_quiet(&self) -> bool {
        self.shown.map.iter().any(|word| word.get() != 0)
    }

    /// Takes an update that tells late of a change: the guest's memory holds it, in the same section. Interrupts are off; `flush` as in
    /// [`Queue::submit_uninterrupted`].
    ///
    /// `update` has notes for the queue: in `low` the lower half of the new value, or [`CHANGED`], in `high` the guest's flags. `value`: what
    /// became of the entry, 0 where the guest lets it wait. Where it is present, and outside of the mode MMU, `settle` does [`Queue::settle`].
    #[inline(always)]
    pub fn submit_late(
        &self,
        backend: &impl Backend,
        update: Update,
        value: u32,
        settle: impl Fn(),
        flush: impl Fn(),
    ) {
        let behind = || {
            if update.high & CURRENT_USED >= self.used_from.get() {
                seldom();
                if value & PRESENT != 0 {
                    settle();
                }
            }
        };
        self.take(backend, update, behind, flush);
    }

    /// Flushes unless the update that was taken last may wait, which tells that an entry is present. Interrupts are off.
    ///
    /// Two kinds may not. Where the guest maps the page of its last page fault, it is about to use the page, and to be told at once costs no
    /// more than the next page fault. And where the hypervisor leaves the guest its page faults, there may be none to be told by, but those
    /// at a program's addresses, which the guest bears.
    pub fn settle(&self, backend: &impl Backend) {
        let last = self.count.get().wrapping_sub(1);
        let Some(update) = self.updates.get(last as usize).map(Cell::get) else { return };
        let is_about_to =
            update.high & CURRENT_USED != 0 && (update.high ^ self.fault.get()) & PAGE == 0;
        let is_owed = self.is_in_use(&update) && !self.is_borne(&update);
        if (is_about_to || is_owed) && !faulty!(PresentWaits) {
            self.drain(backend);
        }
    }

    /// Makes everything visible that waits.
    pub fn flush(&self, backend: &impl Backend) {
        self.uninterrupted(backend, || self.drain(backend));
    }

    /// Makes a call that is no update. What it could see, or show to somebody, is visible to its effect.
    ///
    /// Both happen in one section. An interrupt between them could leave an update waiting that the effect then overtakes:
    /// CLTS, and the interrupted code's SetCR0.
    #[inline(always)]
    pub fn call<R>(&self, backend: &impl Backend, call: &Call, effect: impl FnOnce() -> R) -> R {
        if Role::of(call) == Role::Flush { self.flushed(backend, effect) } else { effect() }
    }

    /// [`Queue::call`] for a call that is known to flush.
    #[inline(always)]
    pub fn flushed<R>(&self, backend: &impl Backend, effect: impl FnOnce() -> R) -> R {
        self.uninterrupted(backend, || {
            self.drain(backend);
            step!(backend);
            effect()
        })
    }

    /// Prepares for a call that does not come back, or that waits for interrupts: IRET, SYSEXIT, Halt, Shutdown, Reboot.
    #[inline(always)]
    pub fn before(&self, backend: &impl Backend, call: &Call) {
        self.call(backend, call, || ());
    }

    /// SetLazyMode. Modes exclude each other, so another mode leaves the old one, and leaving flushes. Off flushes in any
    /// case; told late, only leaving the mode CPU does. The same mode again changes nothing; an unknown mode lets nothing wait.
    pub fn set_lazy_mode(&self, backend: &impl Backend, mode: LazyMode) {
        self.uninterrupted(backend, || {
            let old = self.lazy_mode();
            let leaves = old != LazyMode::OFF && old != mode && !faulty!(OtherModeDoesNotFlush);
            let is_off = mode == LazyMode::OFF && !faulty!(LeavingDoesNotFlush);
            // Told late, what waits in the other modes is in memory.
            let is_due = !self.is_late() || old == LazyMode::CPU && !faulty!(SetCr3WaitsForEver);
            // That is not enough for what became present where nobody else sees the page fault.
            let is_missed = self.is_late()
                && self.used_from.get() == NONE_USED
                && mode != LazyMode::MMU
                && self.is_missed(PRESENT, |update| !self.is_borne(update))
                && !faulty!(PresentWaitsBeyondTheMode);
            if (leaves || is_off) && is_due || is_missed {
                self.drain(backend);
            }
            step!(backend);
            self.enter(mode);
        });
    }

    /// Notes a lazy mode. Told late, MMU is none: all waits outside of it too, and what may not wait does not wait in it.
    fn enter(&self, mode: LazyMode) {
        let is_lazy = mode == LazyMode::MMU;
        self.mode.set(if self.is_late() && is_lazy { LazyMode::OFF } else { mode }.0);
        self.used_from.set(match self.late.get() {
            _ if is_lazy => NONE_USED,
            QUIET => ANY_USED,
            _ => CURRENT_USED,
        });
    }

    /// The lazy mode in which updates wait.
    #[inline(always)]
    #[must_use]
    pub fn lazy_mode(&self) -> LazyMode {
        LazyMode(self.mode.get())
    }

    /// The updates that wait, oldest first.
    #[must_use]
    pub fn pending(&self) -> Batch<'_> {
        self.batch(self.applied.get(), self.count.get())
    }

    /// How many refusals there were.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures.get()
    }

    /// Whether an update was refused for good. Nothing is applied any more; it and all behind it are still pending.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.stopped.get() != 0
    }

    /// Runs a section that no interrupt of this processor divides.
    #[inline(always)]
    fn uninterrupted<R>(&self, backend: &impl Backend, section: impl FnOnce() -> R) -> R {
        let mask = self.begin(backend);
        let result = section();
        self.end(backend, mask);
        result
    }

    /// Begins such a section.
    #[inline(always)]
    fn begin(&self, backend: &impl Backend) -> InterruptMask {
        if faulty!(InterruptsStayOn) {
            return InterruptMask(0);
        }
        let mask = backend.disable_interrupts();
        compiler_fence(Ordering::SeqCst);
        mask
    }

    /// Ends it.
    #[inline(always)]
    fn end(&self, backend: &impl Backend, mask: InterruptMask) {
        if faulty!(InterruptsStayOn) {
            return;
        }
        compiler_fence(Ordering::SeqCst);
        backend.set_interrupt_mask(mask);
    }

    /// Puts an update behind all others, and does what comes `behind` it; the last one for which there is room has all flushed. There always
    /// is room for one; only a queue that is stopped stays full.
    #[inline(always)]
    fn take(
        &self,
        _backend: &impl Backend,
        update: Update,
        behind: impl FnOnce(),
        flush: impl Fn(),
    ) {
        step!(_backend);
        let count = self.count.get();
        // One comparison for the frequent case.
        let leaves_room = self.updates.get(..CAPACITY - 1);
        if let Some(place) = leaves_room.and_then(|updates| updates.get(count as usize)) {
            self.put(_backend, place, count, update);
            behind();
        } else {
            if let Some(place) = self.updates.get(count as usize) {
                self.put(_backend, place, count, update);
            }
            if !faulty!(FullQueueDrops) {
                flush();
            }
        }
    }

    #[inline(always)]
    fn put(&self, _backend: &impl Backend, place: &Cell<Update>, count: u32, update: Update) {
        step!(_backend);
        place.set(update);
        step!(_backend);
        self.count.set(count.wrapping_add(1));
        #[cfg(test)]
        if let Some(before) = self.updates.get(count.wrapping_sub(1) as usize)
            && faulty!(SwapsNeighbours)
        {
            place.swap(before);
        }
    }

    /// Leaves out what the update directly behind it replaces.
    fn coalesce(&self) {
        let mut kept: u32 = 0;
        for place in self.batch(0, self.count.get()).0 {
            let update = place.get();
            let same = |place: &&Cell<Update>| update.replaces(&place.get());
            let last = self.updates.get(kept.wrapping_sub(1) as usize);
            #[cfg(test)]
            let last = match self.batch(0, kept).0.iter().find(same) {
                Some(found) if faulty!(CoalescesAcrossOthers) => Some(found),
                _ => last,
            };
            if let Some(last) = last.filter(same) {
                last.set(update);
            } else if let Some(next) = self.updates.get(kept as usize) {
                next.set(update);
                kept = kept.wrapping_add(1);
            }
        }
        self.count.set(kept);
    }

    /// Hands over everything that waits. Interrupts are off.
    #[inline(never)]
    fn drain(&self, backend: &impl Backend) {
        let mut attempts = 0;
        if self.is_stopped() && !faulty!(GoesOnAfterStop) {
            return;
        }
        self.coalesce();
        loop {
            let first = self.applied.get();
            let pending = self.pending();
            if pending.is_empty() {
                break;
            }
            let alone = attempts > 0 && !faulty!(RetriesAsBatch);
            let batch = if alone { self.batch(first, first.wrapping_add(1)) } else { pending };
            step!(backend);
            let Err(refusal) = backend.apply(batch) else {
                step!(backend);
                self.applied.set(first.wrapping_add(batch.len() as u32));
                attempts = 0;
                continue;
            };
            // No transport is believed to have applied more than it was given.
            let applied = refusal.applied.min(batch.len());
            let gone = applied;
            #[cfg(test)]
            let gone = tests::Fault::gone(gone, batch.len());
            self.applied.set(first.wrapping_add(gone as u32));
            self.failures.set(self.failures.get().wrapping_add(1));
            // A transport that applied everything, and complains all the same, has no update to blame.
            let Some(refused) = batch.0.get(applied) else {
                attempts = 0;
                continue;
            };
            attempts = if applied > 0 { 1 } else { attempts + 1 };
            let Refusal { reason, status, .. } = refusal;
            let failure = Failure { update: refused.get(), reason, status, attempts };
            if reason != Reason::Transient || attempts == ATTEMPTS {
                self.stopped.set(1);
                return backend.stop(&failure);
            }
            backend.report(&failure);
        }
        self.applied.set(0);
        self.count.set(0);
    }

    fn batch(&self, first: u32, end: u32) -> Batch<'_> {
        Batch(self.updates.get(first as usize..end as usize).unwrap_or_default())
    }
}

/// Whether the entry that an update tells of may be one of those that a linear address is translated by: the guest says that it is, or it has
/// the index that one of them has.
const fn may_translate(update: &Update, linear: u32) -> bool {
    if update.high & CURRENT_USED != 0 {
        return (update.high ^ linear) & PAGE == 0;
    }
    let Place { index, entries, shift } = Place::of(update);
    index == linear >> 12 & (entries - 1) || index == linear >> shift & (entries - 1)
}

/// Where an entry lies in its table.
struct Place {
    index: u32,
    /// How many the table has.
    entries: u32,
    /// If it is a directory: the bits of a linear address below its index, so one entry is for 4 MiB, or for 2 where it has 64 bits.
    shift: u32,
}

impl Place {
    const fn of(update: &Update) -> Self {
        let offset = update.address % PAGE_SIZE;
        if update.call.0 == number::UpdatePxELong.0 {
            Self { index: offset / 8, entries: 512, shift: 21 }
        } else {
            Self { index: offset / 4, entries: 1024, shift: 22 }
        }
    }
}

/// What is behind this is not the frequent case, and two comparisons are not to become one computation there.
#[cold]
#[inline]
const fn seldom() {}

/// Updates in the order in which they are to be applied.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a>(&'a [Cell<Update>]);

impl<'a> Batch<'a> {
    /// How many there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The updates.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Update> + use<'a> {
        self.0.iter().map(Cell::get)
    }

    /// The first update, for a hypervisor that reads the batch where it lies.
    #[must_use]
    pub const fn as_ptr(&self) -> *const Update {
        self.0.as_ptr().cast()
    }
}

#[cfg(test)]
mod tests;
