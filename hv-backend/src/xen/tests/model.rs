//! Xen, as far as the backend can see it: it owns page tables, checks what is put into them, and refuses.

use super::*;
use crate::xen::interface::{
    Entry, PAGE_SHIFT, PLACEMENT_SIGNATURE, PLACEMENT_VERSION, SharedInfo, event_channel, mmuext,
    uvmf,
};
use core::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

/// Frames of the guest.
pub(super) const PAGES: u32 = 256;

/// Where its memory is mapped whole.
pub(super) const LINEAR: u32 = 0xc000_0000;

/// Where Xen's list of the guest's frames lies.
pub(super) const TOP: u32 = 0xf580_0000;

/// The first entry of a page directory that Xen fills in, from [`TOP`] on. The guest's is not looked at.
const FIRST_OF_XENS: u32 = TOP >> 21 & 511;

/// The machine frame of frame 0; the others come behind it, from the last to the first.
const MACHINE: u32 = 0x1000;

/// A frame that a PC's screen has, in the machine and in the guest.
pub(super) const SCREEN: u32 = 0xb8;

/// The frames of the image, and of the granted memory behind it.
pub(super) const IMAGE: u32 = 0xd0;
pub(super) const OWN: u32 = IMAGE + 8;

/// The frames of the loader's lists, and of what Xen shares.
const LISTS: u32 = 0xf0;
const SHARED: u32 = 0xf2;

/// The machine frame of a frame.
pub(super) const fn machine_frame(frame: u32) -> u32 {
    if frame == SCREEN { SCREEN } else { MACHINE + PAGES - frame }
}

/// What the domain ended with.
pub(super) struct ShutDown(pub(super) u32);

/// Hypercalls as they came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Updates(usize),
    Operation(MmuExtOp),
    Multicall(Vec<u32>),
    Number(u32, [u32; 4]),
    Operate(u32, u32, Vec<u32>),
    Traps(Option<Vec<TrapInfo>>),
    Gdt(u32, u32),
}

#[derive(Default)]
pub(super) struct Model {
    memory: RefCell<BTreeMap<u32, u32>>,
    /// Frames that are not mapped writable where memory is mapped whole.
    pub(super) read_only: RefCell<BTreeSet<u32>>,
    /// Page tables that Xen has checked, by frame, with their level from 1 on.
    pub(super) checked: RefCell<BTreeMap<u32, u32>>,
    pub(super) made: RefCell<Vec<Made>>,
    /// What is said on the console.
    pub(super) said: RefCell<std::string::String>,
    /// Results to come before those that the model finds, of any hypercall but those that only look.
    pub(super) results: RefCell<Vec<i32>>,
    /// The most updates that are applied at once.
    pub(super) most: Cell<u32>,
    /// Whether a multicall's numbers are overwritten, as by a Xen for debugging.
    pub(super) overwrites: Cell<bool>,
    pub(super) tsc: Cell<u64>,
    pub(super) task_switched: Cell<bool>,
    pub(super) root: Cell<u32>,
    /// What happens while the domain waits.
    pub(super) wait: RefCell<Option<std::boxed::Box<dyn Fn()>>>,
    operations: RefCell<Vec<MmuExtOp>>,
}

impl Model {
    pub(super) fn new() -> Self {
        let model = Self { most: Cell::new(u32::MAX), tsc: Cell::new(1000), ..Self::default() };
        for frame in 0..PAGES {
            model.store(LINEAR + (LISTS << 12) + 4 * frame, machine_frame(frame));
            model.store(TOP + 4 * machine_frame(frame), frame);
        }
        model
    }

    pub(super) fn placement() -> Placement {
        Placement {
            signature: PLACEMENT_SIGNATURE,
            version: PLACEMENT_VERSION,
            image: IMAGE << 12,
            start_info: 0,
            shared_info: SHARED << 12,
            p2m: LISTS << 12,
            pages: PAGES,
            tables: (LISTS + 1) << 12,
            virtual_top: TOP,
        }
    }

    /// A backend that has taken over.
    pub(super) fn started(&self) -> std::boxed::Box<Xen> {
        let xen = zeroed();
        assert_eq!(self.start(&xen), Ok(()));
        self.made.borrow_mut().clear();
        xen
    }

    /// The same, with a page table in frame 3, of which all is Xen's by now.
    pub(super) fn with_table(&self) -> std::boxed::Box<Xen> {
        let xen = self.started();
        xen.allocate_page(self, 3, PageFlags::PT.bits(), (0, 0, 0));
        self.made.borrow_mut().clear();
        xen
    }

    pub(super) fn start(&self, xen: &Xen) -> Result<(), Unfit> {
        let at = |frame: u32| LINEAR + (frame << 12);
        xen.start(self, &Self::placement(), at(IMAGE), at(OWN), 0xe019, [0x1111, 0x2222])
    }

    /// Has the next results be these.
    pub(super) fn answer(&self, results: &[i32]) {
        self.results.borrow_mut().extend(results.iter().rev());
    }

    fn result(&self) -> Option<i32> {
        self.results.borrow_mut().pop().filter(|status| *status < 0)
    }

    pub(super) fn taken(&self) -> Vec<Made> {
        std::mem::take(&mut self.made.borrow_mut())
    }

    fn note(&self, made: Made) {
        self.made.borrow_mut().push(made);
    }

    pub(super) fn entry(&self, table: u32, index: u32) -> u64 {
        let address = LINEAR + (table << 12) + 8 * index;
        u64::from(self.load(address)) | u64::from(self.load(address + 4)) << 32
    }

    /// As the guest writes an entry of a page that is no table yet.
    pub(super) fn write(&self, table: u32, index: u32, entry: u64) {
        let address = LINEAR + (table << 12) + 8 * index;
        self.store(address, entry as u32);
        self.store(address + 4, (entry >> 32) as u32);
    }

    fn poke(&self, table: u32, index: u32, entry: u64) {
        let address = LINEAR + (table << 12) + 8 * index;
        self.memory.borrow_mut().insert(address, entry as u32);
        self.memory.borrow_mut().insert(address + 4, (entry >> 32) as u32);
    }

    /// The word of what Xen shares for a port.
    pub(super) fn event_word(offset: usize, port: u32) -> u32 {
        LINEAR + (SHARED << 12) + offset as u32 + 4 * (port / 32)
    }

    pub(super) fn wall_clock(&self, version: u32, seconds: u32, nanoseconds: u32) {
        let base = LINEAR + (SHARED << 12);
        self.store(base + offset_of!(SharedInfo, wc_version) as u32, version);
        self.store(base + offset_of!(SharedInfo, wc_sec) as u32, seconds);
        self.store(base + offset_of!(SharedInfo, wc_nsec) as u32, nanoseconds);
    }

    /// The guest's frame of a machine frame, if it is the domain's.
    fn own(frame: u64) -> Option<u32> {
        (0..PAGES).find(|own| u64::from(machine_frame(*own)) == frame)
    }

    /// Whether an entry may be in a table of a level.
    fn judge(&self, level: u32, entry: u64) -> i32 {
        if entry & 1 == 0 {
            return 0;
        }
        let Some(target) = Self::own((entry & Entry::FRAME.bits()) >> PAGE_SHIFT) else {
            return error::EPERM;
        };
        if entry & Entry::GLOBAL.bits() != 0 || entry & 1 << 62 != 0 {
            return error::EINVAL;
        }
        if level > 1 {
            return self.check(target, level - 1);
        }
        let is_table = self.checked.borrow().contains_key(&target);
        if is_table && entry & Entry::WRITABLE.bits() != 0 { error::EBUSY } else { 0 }
    }

    /// Checks a page table and what it leads to.
    fn check(&self, table: u32, level: u32) -> i32 {
        if let Some(known) = self.checked.borrow().get(&table) {
            return if *known == level { 0 } else { error::EINVAL };
        }
        if !self.read_only.borrow().contains(&table) {
            return error::EBUSY;
        }
        self.checked.borrow_mut().insert(table, level);
        let entries = [512, FIRST_OF_XENS, 4][level as usize - 1];
        let bad = (0..entries).map(|index| self.judge(level, self.entry(table, index)));
        let status = bad.into_iter().find(|status| *status < 0).unwrap_or(0);
        if status < 0 {
            self.checked.borrow_mut().remove(&table);
        } else if level == 2 {
            // What is Xen's in the last directory.
            (FIRST_OF_XENS..512).for_each(|index| self.poke(table, index, 0x7777_7063));
        }
        status
    }

    /// Forgets a table and what it leads to.
    fn forget(&self, table: u32) {
        let level = self.checked.borrow_mut().remove(&table);
        if let Some(level @ 2..) = level {
            for index in 0..if level == 3 { 4 } else { FIRST_OF_XENS } {
                let entry = self.entry(table, index);
                if entry & 1 != 0
                    && let Some(next) = Self::own((entry & Entry::FRAME.bits()) >> 12)
                {
                    self.forget(next);
                }
            }
        }
    }

    fn update(&self, update: MmuUpdate) -> i32 {
        let Some(table) = Self::own(update.ptr >> PAGE_SHIFT) else { return error::EPERM };
        let index = (update.ptr as u32 & 0xfff) / 8;
        let level = self.checked.borrow().get(&table).copied();
        let status = level.map_or(0, |level| self.judge(level, update.val));
        if status == 0 {
            self.poke(table, index, update.val);
        }
        status
    }

    fn operation(&self, operation: MmuExtOp) -> i32 {
        let own = || Self::own(operation.arg1.into());
        match operation.cmd {
            mmuext::PIN_L3_TABLE => own().map_or(error::EPERM, |table| self.check(table, 3)),
            mmuext::UNPIN_TABLE => match own() {
                Some(table) if self.checked.borrow().contains_key(&table) => {
                    self.forget(table);
                    0
                }
                _ => error::EINVAL,
            },
            mmuext::NEW_BASEPTR => match own() {
                Some(table) if self.checked.borrow().get(&table) == Some(&3) => {
                    self.root.set(table);
                    0
                }
                _ => error::EINVAL,
            },
            _ => 0,
        }
    }

    fn number(&self, number: u32, arguments: [u32; 4]) -> i32 {
        let [a, b, c, d] = arguments;
        match number {
            hypercall::MEMORY_OP => (MACHINE + PAGES) as i32,
            hypercall::UPDATE_VA_MAPPING => {
                assert_eq!(d, uvmf::INVLPG | uvmf::ALL);
                let entry = u64::from(b) | u64::from(c) << 32;
                let frame = (a - LINEAR) >> 12;
                assert_eq!(Self::own((entry & Entry::FRAME.bits()) >> 12), Some(frame));
                if entry & Entry::WRITABLE.bits() == 0 {
                    self.read_only.borrow_mut().insert(frame);
                } else if self.checked.borrow().contains_key(&frame) {
                    return error::EBUSY;
                } else {
                    self.read_only.borrow_mut().remove(&frame);
                }
                0
            }
            hypercall::UPDATE_DESCRIPTOR => {
                let Some(table) = Self::own(u64::from(b) << 20 | u64::from(a >> 12)) else {
                    return error::EPERM;
                };
                // A system descriptor, or one for ring 0, is none that Xen takes.
                if d & 1 << 15 != 0 && (d & 1 << 12 == 0 || d >> 13 & 3 == 0) {
                    return error::EINVAL;
                }
                self.poke(table, (a & 0xfff) / 8, u64::from(d) << 32 | u64::from(c));
                0
            }
            hypercall::SCHED_OP => {
                if let Some(wait) = self.wait.borrow().as_ref() {
                    wait();
                }
                0
            }
            hypercall::FPU_TASKSWITCH => {
                self.task_switched.set(a != 0);
                0
            }
            _ => 0,
        }
    }
}

/// A backend as it lies in zeroed memory.
pub(super) fn zeroed() -> std::boxed::Box<Xen> {
    std::boxed::Box::new(Xen {
        chosen: Cell::default(),
        refusals: Cell::default(),
        waiting: Cell::default(),
        most: Cell::default(),
        last_table: Cell::default(),
        last_place: Cell::default(),
        frames: Frames::default(),
        shared: Aligned::default(),
        woken: Cell::default(),
        cr0: Cell::default(),
        cr3: Cell::default(),
        cr4: Cell::default(),
        tables: Tables::default(),
        alarms: Alarms::default(),
        updates: [const { Cell::new(MmuUpdate { ptr: 0, val: 0 }) }; BATCH],
        no_call: Cell::default(),
        calls: [const { Cell::new(MulticallEntry { op: 0, result: 0, args: [0; 6] }) }; CALLS],
        origins: Default::default(),
        traps: [const { Cell::new(TrapInfo { vector: 0, flags: 0, cs: 0, address: 0 }) };
            TRAPS + 1],
        path: Default::default(),
        text: [const { Cell::new(0) }; TEXT_LIMIT],
    })
}

impl Machine for Model {
    fn load(&self, address: u32) -> u32 {
        assert!(address.is_multiple_of(4) && address >= LINEAR, "{address:#x}");
        self.memory.borrow().get(&address).copied().unwrap_or(0)
    }

    fn store(&self, address: u32, value: u32) {
        assert!(address.is_multiple_of(4), "{address:#x}");
        let frame = address.wrapping_sub(LINEAR) >> 12;
        assert!(!self.read_only.borrow().contains(&frame), "a page fault at {address:#x}");
        self.memory.borrow_mut().insert(address, value);
    }

    fn store_long(&self, address: u32, value: u64) {
        self.store(address, value as u32);
        self.store(address + 4, (value >> 32) as u32);
    }

    fn clear_bits(&self, address: u32, bits: u32) -> u32 {
        let old = self.load(address);
        self.store(address, old & !bits);
        old
    }

    fn set_bits(&self, address: u32, bits: u32) -> u32 {
        let old = self.load(address);
        self.store(address, old | bits);
        old
    }

    fn hypercall(&self, number: u32, arguments: [u32; 4]) -> i32 {
        self.note(Made::Number(number, arguments));
        self.result().unwrap_or_else(|| self.number(number, arguments))
    }

    fn operate(&self, number: u32, command: u32, words: &mut [u32]) -> i32 {
        self.note(Made::Operate(number, command, words.to_vec()));
        if number == hypercall::EVENT_CHANNEL_OP && command == event_channel::BIND_VIRQ {
            words[2] = 37;
        }
        self.result().unwrap_or(0)
    }

    fn mmu_update(&self, updates: &[Cell<MmuUpdate>]) -> (i32, u32) {
        self.note(Made::Updates(updates.len()));
        for (done, update) in (0..).zip(updates) {
            let status = if done == self.most.get() { Some(error::EAGAIN) } else { self.result() };
            let status = status.unwrap_or_else(|| self.update(update.get()));
            if status < 0 {
                return (status, done);
            }
        }
        (0, updates.len() as u32)
    }

    fn mmuext_op(&self, operation: MmuExtOp) -> i32 {
        self.note(Made::Operation(operation));
        self.result().unwrap_or_else(|| self.operation(operation))
    }

    fn multicall(&self, calls: &[Cell<MulticallEntry>]) -> i32 {
        self.note(Made::Multicall(calls.iter().map(|call| call.get().op).collect()));
        for call in calls {
            let MulticallEntry { op, args, .. } = call.get();
            let [a, b, c, d, ..] = args;
            let status = self.result().unwrap_or_else(|| match op {
                hypercall::MMUEXT_OP => self.operation(self.operations.borrow()[a as usize]),
                _ => self.number(op, [a, b, c, d]),
            });
            let made = MulticallEntry { op, result: status, args };
            let over = MulticallEntry { op: 0xaaaa_aaaa, result: status, args: [0xaaaa_aaaa; 6] };
            call.set(if self.overwrites.get() { over } else { made });
        }
        0
    }

    /// The operation is found by its number among those that were asked for.
    fn mmuext_arguments(&self, operation: &Cell<MmuExtOp>) -> [u32; 6] {
        self.operations.borrow_mut().push(operation.get());
        [self.operations.borrow().len() as u32 - 1, 1, 0, interface::DOMID_SELF, 0, 0]
    }

    fn set_trap_table(&self, traps: Option<&[Cell<TrapInfo>]>) -> i32 {
        let traps = traps.map(|traps| {
            let traps = traps.iter().map(Cell::get);
            traps.take_while(|trap| trap.address != 0).collect()
        });
        self.note(Made::Traps(traps));
        self.result().unwrap_or(0)
    }

    fn set_gdt(&self, frame: u32, entries: u32) -> i32 {
        self.note(Made::Gdt(frame, entries));
        let table = Self::own(frame.into()).expect("a frame of the domain");
        assert!(self.read_only.borrow().contains(&table), "Xen wants its tables read-only");
        for index in 0..512 {
            let high = (self.entry(table, index) >> 32) as u32;
            assert!(high & 1 << 15 == 0 || high & 1 << 12 != 0 && high >> 13 & 3 != 0);
        }
        self.result().unwrap_or(0)
    }

    fn time_stamp(&self) -> u64 {
        self.tsc.get()
    }

    fn stack_selector(&self) -> u32 {
        0xe021
    }

    fn control(&self) -> (u32, u32, u32) {
        let root = machine_frame(7);
        let switched = u32::from(self.task_switched.get()) << 3;
        (0x8000_0033 | switched, root.rotate_left(12), 0x20)
    }

    fn say(&self, text: &[Cell<u8>]) {
        self.said.borrow_mut().extend(text.iter().map(|byte| char::from(byte.get())));
    }

    fn shut_down(&self, reason: u32) -> ! {
        std::panic::panic_any(ShutDown(reason))
    }
}
