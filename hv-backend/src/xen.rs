//! The backend for Xen, as a 32-bit guest with paravirtualization.
//!
//! Here is what runs anywhere: which calls are served, and what is made of them. The hypercalls are behind the trait
//! [`Machine`]: `transport` makes them on 32-bit x86, a model of Xen answers them in the tests.
//!
//! **Nothing waits in a [`crate::Queue`].** What waits for Xen waits in Xen's own form, so that it is handed over where it lies:
//! entries of page tables as an array of `mmu_update`, the calls of a context switch as a multicall. The two lazy modes exclude each
//! other, and so do the two arrays: what goes into one flushes the other first. So Xen sees everything in the guest's order.
//!
//! **Interrupts** are off while a call does its work, in the byte that Xen looks at: [`Xen::uninterrupted`].
//!
//! **Refusals** are counted, in a word that the guest can read, and said on Xen's console. See [`Xen::flush`].

mod descriptors;
mod event;
mod frames;
pub mod interface;
mod machine;
mod pages;
mod time;
#[cfg(target_arch = "x86")]
mod transport;

pub use event::Delivery;
pub use machine::Machine;
#[cfg(target_arch = "x86")]
pub use transport::{Cpu, cpuid};

use crate::update::contains;
use crate::{ATTEMPTS, BASE_STEP, BASES, CallNumber, Reason, Refusal};
use core::cell::Cell;
use core::mem::{offset_of, size_of};
use core::sync::atomic::{
    AtomicU8, AtomicU32,
    Ordering::{Relaxed, SeqCst},
    compiler_fence,
};
use descriptors::Tables;
use frames::Frames;
use interface::{
    MmuExtOp, MmuUpdate, MulticallEntry, PAGE_SHIFT, PAGE_SIZE, PLACEMENT_SIZE, Placement,
    TrapInfo, VcpuInfo, VcpuTimeInfo, error, hypercall, sched, vcpu,
};
use static_assertions::const_assert_eq;
use time::Alarms;
use vmi_abi::flags::LazyMode;
use vmi_abi::number;

/// Bytes of memory for all that is remembered; the last page of them is the loader's [`Placement`].
pub const MEMORY: u32 = GDT_OFFSET + 2 * PAGE_SIZE + PLACEMENT_SIZE;

/// Where in that memory the table lies that Xen has for a GDT; behind it the one that it has for an LDT.
const GDT_OFFSET: u32 = 3 * PAGE_SIZE;
const LDT_OFFSET: u32 = GDT_OFFSET + PAGE_SIZE;

const_assert_eq!(MEMORY % PAGE_SIZE, 0);
const _: () = assert!(size_of::<Xen>() <= GDT_OFFSET as usize);

/// How many entries of page tables may wait: the knee of what they cost is at 16 to 32.
pub const BATCH: usize = 128;

/// How many calls of a context switch may wait.
pub const CALLS: usize = 16;

/// The most bytes that are said of a refusal.
const TEXT_LIMIT: usize = 64;

/// How many handlers are announced at once.
const TRAPS: usize = 32;

/// What of [`VcpuInfo`] is used, as memory that somebody else changes.
#[derive(Debug, Default)]
#[repr(C)]
struct Shared {
    pending: AtomicU8,
    mask: AtomicU8,
    pad: [u8; 2],
    selector: AtomicU32,
    cr2: AtomicU32,
    arch_pad: [u32; 5],
    time: [AtomicU32; size_of::<VcpuTimeInfo>() / 4],
}

const_assert_eq!(size_of::<Shared>(), size_of::<VcpuInfo>());
const_assert_eq!(offset_of!(Shared, pending), offset_of!(VcpuInfo, evtchn_upcall_pending));
const_assert_eq!(offset_of!(Shared, mask), offset_of!(VcpuInfo, evtchn_upcall_mask));
const_assert_eq!(offset_of!(Shared, selector), offset_of!(VcpuInfo, evtchn_pending_sel));
const_assert_eq!(offset_of!(Shared, cr2), offset_of!(VcpuInfo, cr2));
const_assert_eq!(offset_of!(Shared, time), offset_of!(VcpuInfo, time));

/// All that is remembered on Xen. It lies at the start of the granted memory; zeroes are a state in which nothing is chosen.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Xen {
    /// Whether Xen is chosen, for `get_reloc`.
    chosen: Cell<u32>,
    /// The number of refusals so far, for the guest to read. It wraps.
    refusals: Cell<u32>,
    /// How many bytes of `updates` wait, and how many of `calls`, [`ONE_CALL`] for each: one comparison says whether anything does.
    waiting: Cell<u32>,
    /// How much of each, in the same form, may wait when one more comes that waits. That is the lazy mode.
    most: Cell<u32>,
    /// The linear address of the table with the last entry, and its machine address.
    last_table: Cell<u32>,
    last_place: Cell<u64>,
    frames: Frames,
    /// What Xen says to this virtual processor, and it to Xen, in a cache line of its own.
    shared: Aligned<Shared>,
    /// How many events there were for the guest: interrupts, and such as it looks for itself.
    woken: Cell<u32>,
    cr0: Cell<u32>,
    cr3: Cell<u32>,
    cr4: Cell<u32>,
    tables: Tables,
    alarms: Alarms,
    updates: [Cell<MmuUpdate>; BATCH],
    /// Whoever looks at the results of two calls at a time finds none here.
    no_call: Cell<MulticallEntry>,
    calls: [Cell<MulticallEntry>; CALLS],
    origins: [Origin; CALLS],
    traps: [Cell<TrapInfo>; TRAPS + 1],
    /// On the way through new tables: those above, and where it goes on in them.
    path: [Cell<(u32, u32)>; 2],
    /// The last refusal in words, for Xen's console.
    text: [Cell<u8>; TEXT_LIMIT],
}

/// What one of `calls` is made of: Xen may overwrite all of that but the result. As far from the next as calls are, so
/// one offset finds both.
#[derive(Debug, Default)]
#[repr(C, align(32))]
struct Origin {
    /// The number of the guest's call.
    number: Cell<u32>,
    /// What the call leads to, if it is an `mmuext_op`.
    operation: Cell<MmuExtOp>,
}

const_assert_eq!(size_of::<Origin>(), size_of::<MulticallEntry>());

/// Something that no other shares a cache line with, nor lies in two pages.
#[derive(Debug, Default)]
#[repr(C, align(64))]
struct Aligned<T>(T);

impl<T> core::ops::Deref for Aligned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// `XenVMMXenVMM` in EBX, ECX and EDX.
const SIGNATURE: [u32; 3] =
    [u32::from_le_bytes(*b"XenV"), u32::from_le_bytes(*b"MMXe"), u32::from_le_bytes(*b"nVMM")];

/// One entry in [`Xen::waiting`], and one call.
const ONE_UPDATE: u32 = size_of::<MmuUpdate>() as u32;
const ONE_CALL: u32 = (size_of::<MulticallEntry>() as u32) << 16;

/// [`Xen::most`] in the lazy modes: the last place of the array is for one that has all go over. 0 in none.
const MOST_UPDATES: u32 = (BATCH as u32 - 1) * ONE_UPDATE;
const MOST_CALLS: u32 = (CALLS as u32 - 1) * ONE_CALL;

/// Why the guest is left alone on a Xen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Nobody left a [`Placement`] of this version.
    NotPlaced,
    /// Xen refused something that everything else needs.
    Refused,
}

impl Xen {
    /// Where in the granted memory the first word says that Xen is chosen.
    pub const CHOSEN_OFFSET: usize = offset_of!(Self, chosen);

    /// Where the guest finds how many updates were refused so far, 32 bits.
    pub const REFUSALS_OFFSET: usize = offset_of!(Self, refusals);

    /// Where the byte lies that is not 0 while interrupts are off.
    pub const MASK_OFFSET: usize = offset_of!(Self, shared) + offset_of!(Shared, mask);

    /// Where the byte lies that is not 0 while an event is pending.
    pub const PENDING_OFFSET: usize = offset_of!(Self, shared) + offset_of!(Shared, pending);

    /// Where the word lies that is not 0 while something waits.
    pub const WAITING_OFFSET: usize = offset_of!(Self, waiting);

    /// What the assembly in the image has to know of the state.
    pub const MOST_OFFSET: usize = offset_of!(Self, most);
    /// See [`Self::MOST_OFFSET`].
    pub const LAST_TABLE_OFFSET: usize = offset_of!(Self, last_table);
    /// See [`Self::MOST_OFFSET`].
    pub const LAST_PLACE_OFFSET: usize = offset_of!(Self, last_place);
    /// See [`Self::MOST_OFFSET`].
    pub const UPDATES_OFFSET: usize = offset_of!(Self, updates);
    /// See [`Self::MOST_OFFSET`].
    pub const CALLS_OFFSET: usize = offset_of!(Self, calls);
    /// See [`Self::MOST_OFFSET`].
    pub const NUMBERS_OFFSET: usize = offset_of!(Self, origins) + offset_of!(Origin, number);
    /// See [`Self::MOST_OFFSET`].
    pub const OPERATIONS_OFFSET: usize = offset_of!(Self, origins) + offset_of!(Origin, operation);
    /// See [`Self::MOST_OFFSET`].
    pub const CR0_OFFSET: usize = offset_of!(Self, cr0);
    /// See [`Self::MOST_OFFSET`].
    pub const CR3_OFFSET: usize = offset_of!(Self, cr3);
    /// See [`Self::MOST_OFFSET`].
    pub const GDT_BASE_OFFSET: usize = offset_of!(Self, tables) + Tables::GDT_BASE_OFFSET;
    /// See [`Self::MOST_OFFSET`].
    pub const GDT_FIRST_OFFSET: usize = offset_of!(Self, tables) + Tables::GDT_FIRST_OFFSET;
    /// See [`Self::MOST_OFFSET`].
    pub const GDT_PLACE_OFFSET: usize = offset_of!(Self, tables) + Tables::GDT_PLACE_OFFSET;
    /// See [`Self::MOST_OFFSET`].
    pub const CHANGING_OFFSET: usize = offset_of!(Self, tables) + Tables::CHANGING_OFFSET;
    /// See [`Self::MOST_OFFSET`].
    pub const TASK_STATE_OFFSET: usize = offset_of!(Self, tables) + Tables::TASK_STATE_OFFSET;
    /// Where the copy of the guest's GDT lies.
    pub const GDT_COPY_OFFSET: usize = GDT_OFFSET as usize;

    /// What [`Self::MOST_OFFSET`] is in a lazy mode. In none it is 0.
    #[must_use]
    pub const fn most(mode: LazyMode) -> u32 {
        match mode {
            LazyMode::MMU => MOST_UPDATES,
            LazyMode::CPU => MOST_CALLS,
            _ => 0,
        }
    }

    /// One call more, where [`Self::WAITING_OFFSET`] is.
    pub const ONE_CALL: u32 = ONE_CALL;
    /// One entry more.
    pub const ONE_UPDATE: u32 = ONE_UPDATE;

    /// See [`Self::MOST_OFFSET`].
    pub const PAGES_OFFSET: usize = offset_of!(Self, frames) + offset_of!(Frames, pages);
    /// See [`Self::MOST_OFFSET`].
    pub const P2M_OFFSET: usize = offset_of!(Self, frames) + offset_of!(Frames, p2m);
    /// See [`Self::MOST_OFFSET`].
    pub const TABLES_OFFSET: usize = offset_of!(Self, frames) + offset_of!(Frames, tables);

    /// The calls that are served by code of this backend.
    #[rustfmt::skip]
    pub const SERVED: &[CallNumber] = &[
        number::CPUID,
        number::SetGDT, number::SetLDT, number::SetIDT, number::SetTR,
        number::GetGDT, number::GetLDT, number::GetIDT, number::GetTR,
        number::WriteGDTEntry, number::WriteLDTEntry, number::WriteIDTEntry, number::UpdateKernelStack,
        number::SetCR0, number::SetCR2, number::SetCR3, number::SetCR4,
        number::GetCR0, number::GetCR2, number::GetCR3, number::GetCR4,
        number::SetDR, number::GetDR, number::CLTS,
        number::EnableInterrupts, number::DisableInterrupts, number::GetInterruptMask, number::SetInterruptMask,
        number::IRET, number::SYSEXIT, number::Halt, number::Reboot, number::Shutdown,
        number::SetPxELong, number::MachineToPhysical, number::PhysicalToMachine,
        number::AllocatePage, number::ReleasePage, number::InvalPage, number::FlushTLB,
        number::SetLinearMapping, number::SetIOPLMask,
        number::GetCycleFrequency, number::GetCycleCounter, number::SetAlarm, number::CancelAlarm,
        number::GetWallclockTime, number::WallclockUpdated,
        number::APICWrite, number::APICRead,
        number::SetLazyMode,
    ];

    /// The calls whose native instructions Xen emulates, and the notifications that tell Xen nothing.
    ///
    /// A guest that writes an entry of an announced table itself is trapped by Xen, which does it: UpdatePxELong has nothing left
    /// to tell. SetPxE and UpdatePxE are for tables without PAE, which Xen's guests cannot have.
    #[rustfmt::skip]
    pub const NATIVE: &[CallNumber] = &[
        number::WRMSR, number::RDMSR, number::RDTSC, number::WBINVD,
        number::UpdatePxELong,
        number::INL, number::INB, number::INW, number::INSL, number::INSB, number::INSW,
        number::OUTL, number::OUTB, number::OUTW, number::OUTSL, number::OUTSB, number::OUTSW,
        number::IODelay,
    ];

    /// Whether a call is one of [`Self::SERVED`].
    #[must_use]
    pub const fn is_served(call: CallNumber) -> bool {
        contains(Self::SERVED, call)
    }

    /// Whether a call is one of [`Self::NATIVE`].
    #[must_use]
    pub const fn is_native(call: CallNumber) -> bool {
        contains(Self::NATIVE, call)
    }

    /// Whether Xen's interface is in CPUID, as Xen answers it. [`crate::detect`] finds the same, and needs more of a guest's stack than
    /// a call may have.
    pub fn is_there(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> bool {
        BASES.step_by(BASE_STEP as usize).any(|base| {
            let [highest, ebx, ecx, edx] = cpuid(base, 0);
            [ebx, ecx, edx] == SIGNATURE && (base..base + BASE_STEP).contains(&highest)
        })
    }

    /// Takes over, once Xen is recognised. `image` is the linear address of the image's first byte, `own` that of this state;
    /// `callbacks` are where events and failures of Xen's own IRET arrive, both in the segment `code`.
    ///
    /// Again, from another alias of the image, it finds everything at that alias and keeps what it knew.
    ///
    /// # Errors
    ///
    /// What is missing. Nothing is chosen then.
    pub fn start(
        &self,
        machine: &impl Machine,
        placement: &Placement,
        image: u32,
        own: u32,
        code: u32,
        callbacks: [u32; 2],
    ) -> Result<(), Unfit> {
        if !placement.is_valid() {
            return Err(Unfit::NotPlaced);
        }
        let linear = image.wrapping_sub(placement.image);
        self.frames.start(machine, placement, linear, own);
        self.forget_table();
        let [event, failsafe] = callbacks;
        done(machine.hypercall(hypercall::SET_CALLBACKS, [code, event, code, failsafe]))?;
        if self.chosen.get() != 0 {
            return Ok(());
        }
        self.share(machine)?;
        self.start_time(machine)?;
        let (cr0, cr3, cr4) = machine.control();
        self.cr0.set(cr0);
        self.cr4.set(cr4);
        // The upper bits of a frame's number are in the lowest bits.
        let frame = cr3.rotate_right(PAGE_SHIFT);
        self.cr3.set(self.frames.own_frame(machine, frame) << PAGE_SHIFT);
        self.chosen.set(Self::CHOSEN);
        Ok(())
    }

    /// Lets Xen share what it has for each virtual processor here, and not in its own page.
    #[inline(never)]
    fn share(&self, machine: &impl Machine) -> Result<(), Unfit> {
        let there = self.frames.own.get() + offset_of!(Self, shared) as u32;
        let frame = self.frames.frame_of(there).ok_or(Unfit::NotPlaced)?;
        let frame = self.frames.machine_frame(machine, frame);
        // A word of 64 bits with the frame, the offset in it, and a word that is kept free.
        let mut place = [frame, 0, there % PAGE_SIZE, 0];
        done(machine.operate(hypercall::VCPU_OP, vcpu::REGISTER_VCPU_INFO, &mut place))
    }

    /// What `get_reloc` finds in the first word.
    pub const CHOSEN: u32 = 2;

    /// Runs a section that no event divides.
    #[inline(always)]
    pub fn uninterrupted<R>(&self, machine: &impl Machine, section: impl FnOnce() -> R) -> R {
        let were_off = self.shared.mask.load(Relaxed);
        self.shared.mask.store(1, Relaxed);
        compiler_fence(SeqCst);
        let result = section();
        compiler_fence(SeqCst);
        self.shared.mask.store(were_off, Relaxed);
        if were_off == 0 && self.shared.pending.load(Relaxed) != 0 {
            deliver(machine);
        }
        result
    }

    /// Turns interrupts off.
    pub fn disable(&self) {
        self.shared.mask.store(1, Relaxed);
    }

    /// Halt: Xen turns interrupts on and waits for one, in one step. It also comes back for what is none, such as a timer that is a
    /// little early.
    pub fn halt(&self, machine: &impl Machine) {
        self.disable();
        self.flush(machine);
        let before = self.woken.get();
        loop {
            let status = machine.hypercall(hypercall::SCHED_OP, [sched::BLOCK, 0, 0, 0]);
            let done = !self.expect(machine, number::Halt, 0, status);
            self.disable();
            if done || self.woken.get() != before {
                break;
            }
        }
        self.shared.mask.store(0, Relaxed);
        if self.shared.pending.load(Relaxed) != 0 {
            deliver(machine);
        }
    }

    /// GetCR2, the call by which a guest looks at a page fault: what waits may have mapped the address.
    pub fn cr2(&self, machine: &impl Machine) -> u32 {
        self.flush(machine);
        self.shared.cr2.load(Relaxed)
    }

    /// SetCR2.
    pub fn set_cr2(&self, value: u32) {
        self.shared.cr2.store(value, Relaxed);
    }

    /// SetLazyMode. As in [`crate::Queue::set_lazy_mode`].
    pub fn set_lazy_mode(&self, machine: &impl Machine, mode: LazyMode) {
        let most = Self::most(mode);
        if most != self.most.get() || most == 0 {
            self.flush(machine);
        }
        self.most.set(most);
    }

    /// Whether the guest is in this mode.
    #[inline(always)]
    fn is_in(&self, mode: LazyMode) -> bool {
        self.most.get() == Self::most(mode)
    }

    /// Hands over everything that waits.
    ///
    /// Xen stops at the first update that it refuses, and says how many it applied. What it refuses for now is tried again, [`ATTEMPTS`]
    /// times. What it refuses for good is counted and said, and the entry made not present instead: whoever uses it gets a page
    /// fault. All others are applied.
    #[inline]
    pub fn flush(&self, machine: &impl Machine) {
        if self.waiting.get() != 0 {
            self.drain(machine);
        }
    }

    /// What waits, which does no more: whoever asks hands it over, or has.
    #[inline(always)]
    fn take_waiting(&self) -> u32 {
        self.tables.changing.set(0);
        self.waiting.replace(0)
    }

    #[inline(never)]
    fn drain(&self, machine: &impl Machine) {
        let waiting = self.take_waiting();
        let updates = self.updates.get(..updates_in(waiting)).unwrap_or_default();
        let calls = self.calls.get(..calls_in(waiting)).unwrap_or_default();
        if !updates.is_empty() {
            self.update_all(machine, updates);
        }
        if !calls.is_empty() {
            self.check(machine, machine.multicall(calls), calls);
        }
    }

    /// Looks at what Xen said of a multicall of all that waits, which was made without this backend's code.
    pub fn made_all(&self, machine: &impl Machine, status: i32) {
        let waiting = self.take_waiting();
        let calls = self.calls.get(..calls_in(waiting)).unwrap_or_default();
        self.check(machine, status, calls);
    }

    /// Has updates applied, each.
    fn update_all(&self, machine: &impl Machine, mut updates: &[Cell<MmuUpdate>]) {
        let mut attempts = 0;
        while let Err(Refusal { applied, reason, status }) = apply(machine, updates) {
            updates = updates.get(applied..).unwrap_or_default();
            let Some(refused) = updates.first() else { break };
            attempts = if applied > 0 { 1 } else { attempts + 1 };
            let MmuUpdate { ptr, val } = refused.get();
            if reason == Reason::Transient && attempts < ATTEMPTS {
                continue;
            }
            self.refuse(machine, number::SetPxELong, ptr as u32, status);
            attempts = 0;
            if val == 0 {
                // Not even that: the guest's tables are not what it believes.
                machine.shut_down(sched::SHUTDOWN_CRASH);
            }
            refused.set(MmuUpdate { ptr, val: 0 });
        }
    }

    /// Looks at what came of a multicall: its own status, and its calls' results. Xen makes all of them, whatever each answers.
    fn check(&self, machine: &impl Machine, status: i32, calls: &[Cell<MulticallEntry>]) {
        if status < 0 {
            self.refuse(machine, number::SetLazyMode, 0, status);
            machine.shut_down(sched::SHUTDOWN_CRASH);
        }
        for (call, origin) in calls.iter().zip(&self.origins) {
            let result = call.get().result;
            if result < 0 {
                let call = CallNumber(origin.number.get());
                self.refuse(machine, call, 0, result);
                // An address space or a stack that the guest believes to be on is nothing to be wrong about.
                if call == number::SetCR3 || call == number::UpdateKernelStack {
                    machine.shut_down(sched::SHUTDOWN_CRASH);
                }
            }
        }
    }

    /// Makes a call at once, or lets it wait in the lazy mode of context switches.
    #[inline(always)]
    fn call(&self, machine: &impl Machine, op: u32, arguments: [u32; 4], number: CallNumber) {
        if self.is_in(LazyMode::CPU)
            && let Some(place) = self.calls.get(calls_in(self.waiting.get()))
        {
            let [a, b, c, d] = arguments;
            place.set(MulticallEntry { op, result: 0, args: [a, b, c, d, 0, 0] });
            self.called(machine, number);
        } else {
            let [a, b, c, d] = arguments;
            self.call_now(machine, op, a, b, c, d, number);
        }
    }

    #[inline(never)]
    #[expect(
        clippy::too_many_arguments,
        reason = "an array would lie on the stack on the frequent way, too"
    )]
    fn call_now(
        &self,
        machine: &impl Machine,
        op: u32,
        a: u32,
        b: u32,
        c: u32,
        d: u32,
        number: CallNumber,
    ) {
        self.flush(machine);
        self.expect(machine, number, a, machine.hypercall(op, [a, b, c, d]));
    }

    /// One call more waits, of this number. A full array goes over.
    #[inline(always)]
    fn called(&self, machine: &impl Machine, number: CallNumber) {
        let waiting = self.waiting.get();
        if let Some(origin) = self.origins.get(calls_in(waiting)) {
            origin.number.set(number.0);
        }
        let waiting = waiting + ONE_CALL;
        self.waiting.set(waiting);
        if calls_in(waiting) == CALLS {
            self.drain(machine);
        }
    }

    /// Counts and says a refusal, if it is one. Whether it is none.
    #[inline]
    fn expect(&self, machine: &impl Machine, call: CallNumber, address: u32, status: i32) -> bool {
        if status < 0 {
            self.refuse(machine, call, address, status);
        }
        status >= 0
    }

    /// Counts and says a refusal.
    #[cold]
    #[inline(never)]
    fn refuse(&self, machine: &impl Machine, call: CallNumber, address: u32, status: i32) {
        self.refusals.set(self.refusals.get().wrapping_add(1));
        let mut length = 0;
        let mut put = |byte| {
            if let Some(place) = self.text.get(length) {
                place.set(byte);
                length += 1;
            }
        };
        b"VMI ROM: call ".iter().for_each(|byte| put(*byte));
        digits(call.0, 10, 10, &mut put);
        b" at ".iter().for_each(|byte| put(*byte));
        digits(address, 0x1000_0000, 16, &mut put);
        b": Xen's status -".iter().for_each(|byte| put(*byte));
        digits(status.unsigned_abs(), 100, 10, &mut put);
        put(b'\n');
        machine.say(self.text.get(..length).unwrap_or_default());
    }
}

/// How many entries are in [`Xen::waiting`].
const fn updates_in(waiting: u32) -> usize {
    ((waiting & 0xffff) / ONE_UPDATE) as usize
}

/// How many calls are in [`Xen::waiting`].
const fn calls_in(waiting: u32) -> usize {
    (waiting / ONE_CALL) as usize
}

/// What a hypercall says that everything else needs.
///
/// # Errors
///
/// It is refused.
fn done(status: i32) -> Result<(), Unfit> {
    if status < 0 { Err(Unfit::Refused) } else { Ok(()) }
}

/// Says a number, from the digit of this weight on.
fn digits(value: u32, mut weight: u32, radix: u32, put: &mut impl FnMut(u8)) {
    while weight > 0 {
        let digit = (value / weight % radix) as u8;
        put(if digit < 10 { b'0' + digit } else { b'A' + digit - 10 });
        weight /= radix;
    }
}

/// Hands over updates, in one hypercall.
///
/// # Errors
///
/// How far Xen came, and why no further.
fn apply(machine: &impl Machine, updates: &[Cell<MmuUpdate>]) -> Result<(), Refusal> {
    let (status, done) = machine.mmu_update(updates);
    if status >= 0 && done as usize >= updates.len() {
        return Ok(());
    }
    let reason = match status {
        // It was done in part, without complaint: the rest can go on.
        0.. | error::EAGAIN | error::ENOMEM | error::ERESTART => Reason::Transient,
        _ => Reason::Permanent,
    };
    Err(Refusal { applied: (done as usize).min(updates.len()), reason, status })
}

/// Has Xen look for pending events: it does so on the way back from every hypercall. This one does nothing else.
#[cold]
#[inline(never)]
fn deliver(machine: &impl Machine) {
    machine.hypercall(hypercall::XEN_VERSION, [0; 4]);
}

#[cfg(test)]
mod tests;
