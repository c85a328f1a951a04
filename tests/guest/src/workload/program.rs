//! Small programs, linked statically: their pages, and the page faults by which they get them, as Linux 2.6 serves them.
//!
//! Text and data are pages of a file, heap and stack are nobody's. A page that is written to gets a frame of its own, which a fork
//! shares until one of the two writes to it.

use super::kernel::Kernel;
use super::process::{Area, FILE_BITS, KERNEL, Memory, PAGE_BITS, Process, mark, set_word, word};
use super::{TOUCHED, reads, sees, writes};
use crate::paging::{ACCESSED, DIRTY, PAGE, PRESENT, Space, WRITE};
use crate::report::Problems;
use spin::Mutex;
use vmi_abi::flags::LazyMode;

/// A program's text, its data, its heap and its stack. The first three are in one table, short entries or long.
const TEXT: Area = Area { start: 0x0804_8000, pages: 12 };
const DATA: Area = Area { start: TEXT.start + TEXT.pages * PAGE, pages: 4 };
const HEAP: Area = Area { start: DATA.start + DATA.pages * PAGE, pages: 6 };
const STACK: Area = Area { start: 0xbfff_b000, pages: 4 };

/// A MiB that a big shell has besides, which it has written to.
pub(super) const MORE: Area = Area { start: 0x0900_0000, pages: 256 };

/// Frames for pages that are written to.
const FRAMES: usize = 48;

/// Page faults of one round.
const FAULTS: u32 = 20;

/// What the programs' pages are made of.
#[derive(Clone, Copy)]
struct Store {
    /// The first frame of the file: text and data.
    file: u32,
    /// The first of the other frames, and how many spaces have each.
    first: u32,
    users: [u8; FRAMES],
}

impl Store {
    /// The file's frame for a page, if it is one of the file's.
    fn page_of_file(&self, linear: u32) -> Option<u32> {
        let offset = linear - TEXT.start;
        (offset < (TEXT.pages + DATA.pages) * PAGE).then_some(self.file + offset)
    }

    /// How many spaces have a frame that is not the file's.
    fn users(&mut self, frame: u32) -> Option<&mut u8> {
        self.users.get_mut((frame.wrapping_sub(self.first) / PAGE) as usize)
    }

    /// A frame with what a page has: another frame's content, or nothing.
    fn take(&mut self, content: Option<u32>) -> u32 {
        let index = self.users.iter().position(|users| *users == 0).expect("a frame is left");
        self.users[index] = 1;
        let frame = self.first + index as u32 * PAGE;
        for index in 0..PAGE / 4 {
            set_word(frame, index, content.map_or(0, |content| word(content, index)));
        }
        frame
    }

    /// One more space, or one less, has the frames of a space.
    fn count(&mut self, process: Process, comes: bool) {
        for linear in [DATA, HEAP, STACK].into_iter().flat_map(Area::addresses) {
            if let Some(users) = frame_of(process, linear).and_then(|frame| self.users(frame)) {
                *users = if comes { *users + 1 } else { *users - 1 };
            }
        }
    }
}

/// The frame that a page leads to.
fn frame_of(process: Process, linear: u32) -> Option<u32> {
    let space = process.space;
    let is_there = |entry| space.load(entry) & PRESENT != 0;
    let entry = Some(space.directory_entry(linear)).filter(|entry| is_there(*entry));
    let entry = entry.map(|_| space.entry(linear)).filter(|entry| is_there(*entry));
    entry.map(|entry| space.load(entry) as u32 & !(PAGE - 1))
}

/// The second word of the frame that a page leads to.
fn written(process: Process, linear: u32) -> Option<u32> {
    frame_of(process, linear).map(|frame| word(frame, 1))
}

/// A process that starts programs.
pub(super) struct Shell {
    pub(super) process: Process,
    store: Store,
    /// The first frame of [`MORE`], if it is big.
    more: Option<u32>,
}

impl Shell {
    pub(super) fn new(
        kernel: Kernel,
        swapper: Space,
        memory: &mut Memory,
        more: Option<u32>,
    ) -> Self {
        let process = Process::new(kernel, swapper, memory);
        let file = memory.take(TEXT.pages + DATA.pages);
        let mut store = Store { file, first: memory.take(FRAMES as u32), users: [0; FRAMES] };
        for area in [TEXT, DATA, HEAP, STACK] {
            process.provide_table(area.start, memory);
            for linear in area.addresses() {
                let from_file = store.page_of_file(linear);
                let value = match from_file {
                    Some(frame) if area.start == TEXT.start => u64::from(frame) | FILE_BITS,
                    _ => u64::from(store.take(from_file)) | PAGE_BITS,
                };
                kernel.set(process.space.entry(linear), value, process.flags(linear));
            }
        }
        Self { process, store, more }
    }

    /// All that it may have.
    fn areas(&self) -> [Area; 5] {
        [
            TEXT,
            DATA,
            HEAP,
            STACK,
            Area { pages: if self.more.is_some() { MORE.pages } else { 0 }, ..MORE },
        ]
    }

    /// What it has besides is its own again, as if it had run for long. It is the current process.
    pub(super) fn write_all(&self, memory: &mut Memory, problems: &mut Problems) {
        if let Some(frame) = self.more {
            self.process.map(MORE, frame, memory);
            self.process.kernel.flush();
            writes(MORE, MORE.pages, 0, None, problems);
        }
    }

    /// The end; another space is current.
    pub(super) fn exit(self, memory: &mut Memory) {
        self.process.empty(&self.areas(), memory);
        self.process.kernel.flush();
        self.process.free(memory);
    }

    /// Starts a program and waits for its end. What is written begins with a number.
    pub(super) fn start(
        &mut self,
        first: u32,
        swapper: Space,
        memory: &mut Memory,
        problems: &mut Problems,
    ) {
        let (shell, kernel) = (self.process, self.process.kernel);
        let (areas, more) = (self.areas(), self.more);
        // The pages of the text come again by page faults.
        let [_, copied @ ..] = &areas;
        let mut user = User { store: &mut self.store, memory, problems, process: shell, faults: 0 };

        let child = shell.fork(copied, swapper, user.memory);
        user.store.count(child, true);
        user.writes(STACK.page(3), first);
        user.writes(DATA.page(0), first + 1);
        let go_to = |process: Process| {
            kernel.lazily(LazyMode::CPU, || kernel.enter(process.space));
        };

        go_to(child);
        user.process = child;
        user.reads_file(TEXT.page(2));
        user.reads_file(TEXT.page(3));
        user.writes(STACK.page(3), first + 2);
        user.writes(DATA.page(1), first + 3);
        user.reads(HEAP.page(0), 0);
        user.reads(HEAP.page(1), 0);
        if let Some(frame) = more {
            sees(MORE, TOUCHED, frame, user.problems);
        }

        // Exec: the arguments are in the new stack before the space is entered, and move once the stack's place is known.
        let program = Process::new(kernel, swapper, user.memory);
        let [before, behind] = [2, 3].map(|page| STACK.page(page).start);
        program.provide_table(before, user.memory);
        let arguments = user.store.take(None);
        let value = u64::from(arguments) | PAGE_BITS;
        kernel.set(program.space.entry(before), value, program.flags(before));
        kernel.enter(program.space);
        user.store.count(child, false);
        child.empty(&areas, user.memory);
        child.free(user.memory);
        kernel.lazily(LazyMode::MMU, || {
            let value = kernel.get_and_clear(program.space.entry(before), program.flags(before));
            kernel.flush_page(before);
            kernel.set(program.space.entry(behind), value, program.flags(behind));
        });
        user.process = program;
        user.writes(DATA.page(3), first + 4);
        user.writes(STACK.page(3), first + 5);

        for page in [0, 1, 6, 7] {
            user.reads_file(TEXT.page(page));
        }
        user.reads_file(DATA.page(0));
        for (index, area) in
            [DATA.page(0), DATA.page(1), HEAP.page(0), HEAP.page(1), HEAP.page(2), STACK.page(2)]
                .into_iter()
                .enumerate()
        {
            user.writes(area, first + 6 + index as u32);
        }
        let of_program = [
            (DATA.page(3), 4),
            (STACK.page(3), 5),
            (DATA.page(0), 6),
            (DATA.page(1), 7),
            (HEAP.page(0), 8),
            (HEAP.page(1), 9),
            (HEAP.page(2), 10),
            (STACK.page(2), 11),
        ];
        user.landed("program", &of_program, first);

        user.store.count(program, false);
        program.empty(&areas, user.memory);
        kernel.flush();
        go_to(shell);
        program.free(user.memory);
        user.process = shell;
        user.writes(DATA.page(2), first + 12);
        user.writes(STACK.page(2), first + 13);
        if let Some(frame) = more {
            sees(MORE, TOUCHED, frame, user.problems);
        }
        let of_shell =
            [(STACK.page(3), 0), (DATA.page(0), 1), (DATA.page(2), 12), (STACK.page(2), 13)];
        user.landed("shell", &of_shell, first);
        // What the child and the program wrote is in their own pages.
        let others = [DATA.page(1).start, HEAP.page(0).start];
        let seen = others.map(|linear| written(shell, linear));
        if seen != [Some(0); 2] {
            user.problems.add(format_args!("the shell's pages hold {seen:x?}"));
        }
        let faults = user.faults;
        if faults != FAULTS {
            user.problems.add(format_args!("{faults} page faults, must be {FAULTS}"));
        }
        let file = self.store.file;
        for frame in (file..).step_by(PAGE as usize).take((TEXT.pages + DATA.pages) as usize) {
            if (word(frame, 0), word(frame, 1)) != (mark(frame), 0) {
                problems.add(format_args!("the file's frame {frame:#x} was written to"));
            }
        }
    }
}

/// A process that uses its pages.
struct User<'a> {
    process: Process,
    store: &'a mut Store,
    memory: &'a mut Memory,
    problems: &'a mut Problems,
    faults: u32,
}

impl User<'_> {
    /// Reads a page that is the file's, or a copy of it.
    fn reads_file(&mut self, page: Area) {
        let frame = self.store.page_of_file(page.start).unwrap_or_default();
        self.reads(page, mark(frame));
    }

    /// Reads a page that begins with a number.
    fn reads(&mut self, page: Area, value: u32) {
        self.with_faults(false, |problems| {
            reads(page, page.pages, value, Some((0..KERNEL, serve)), problems);
        });
    }

    /// Writes a number to a page.
    fn writes(&mut self, page: Area, value: u32) {
        self.with_faults(true, |problems| {
            writes(page, page.pages, value, Some((0..KERNEL, serve)), problems);
        });
    }

    fn with_faults(&mut self, writes: bool, work: impl FnOnce(&mut Problems)) {
        let memory = core::mem::replace(self.memory, Memory::new());
        let (process, store, faults) = (self.process, *self.store, self.faults);
        *SERVED.lock() = Some(Served { process, store, memory, writes, faults });
        work(self.problems);
        if let Some(served) = SERVED.lock().take() {
            (*self.store, *self.memory, self.faults) = (served.store, served.memory, served.faults);
        }
    }

    /// Whether what was written is where the pages lead.
    fn landed(&mut self, who: &str, pages: &[(Area, u32)], first: u32) {
        for (page, offset) in pages {
            let found = written(self.process, page.start);
            if found != Some(first + offset) {
                self.problems.add(format_args!(
                    "{who}: the frame of {:#x} holds {found:x?}, must be {:#x}",
                    page.start,
                    first + offset
                ));
            }
        }
    }
}

/// What page faults are served from.
struct Served {
    process: Process,
    store: Store,
    memory: Memory,
    /// Whether the access is a store; an error code would say so.
    writes: bool,
    faults: u32,
}

static SERVED: Mutex<Option<Served>> = Mutex::new(None);

/// A page fault (`handle_mm_fault`).
fn serve(address: u32) {
    let mut served = SERVED.lock();
    let Some(served) = served.as_mut() else { return };
    let linear = Kernel::fault_address() & !(PAGE - 1);
    assert!(linear == address & !(PAGE - 1), "CR2 is {address:#x}, GetCR2 says {linear:#x}");
    served.faults += 1;
    assert!(served.faults <= 2 * FAULTS, "faults that are served come again: {address:#x}");
    served.provide(linear);
}

impl Served {
    fn provide(&mut self, linear: u32) {
        let Self { process, store, memory, writes, .. } = self;
        let (space, kernel) = (process.space, process.kernel);
        process.provide_table(linear, memory);
        let (entry, flags) = (space.entry(linear), process.flags(linear));
        let old = space.load(entry);
        if old & PRESENT == 0 {
            // `do_linear_fault`, `do_anonymous_page`
            let value = match store.page_of_file(linear) {
                Some(frame) if !*writes => u64::from(frame) | FILE_BITS,
                content => u64::from(store.take(content)) | PAGE_BITS,
            };
            kernel.set(entry, value, flags);
            return;
        }
        // `do_wp_page`
        assert!(*writes && old & WRITE == 0, "a fault on a page that is there: {linear:#x}");
        let frame = old as u32 & !(PAGE - 1);
        if store.users(frame).is_some_and(|users| *users == 1) {
            kernel.relax(entry, old | WRITE | ACCESSED | DIRTY, flags);
            kernel.flush_page(linear);
        } else {
            let copy = store.take(Some(frame));
            kernel.get_and_clear(entry, flags);
            kernel.flush_page(linear);
            kernel.set(entry, u64::from(copy) | PAGE_BITS, flags);
            if let Some(users) = store.users(frame) {
                *users -= 1;
            }
        }
    }
}
