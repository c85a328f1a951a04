//! What Xen, the loader that places the image on Xen, the ROM and the guest agree on.
//!
//! The first part is ours: [`Placement`], which the loader leaves for the ROM. All else is Xen's interface to 32-bit guests
//! with paravirtualization, in numbers: facts of its public headers, as far as something here needs them. A pointer
//! in a structure of Xen's is the guest's linear address; a frame is a machine frame unless it says otherwise.

use bitflags::bitflags;
use core::mem::{offset_of, size_of};
use static_assertions::const_assert_eq;

/// Where the ROM finds Xen's structures, in the last [`PLACEMENT_SIZE`] bytes of the memory that it is granted.
///
/// All addresses are guest-physical. The guest maps everything they lead to at the same distance from the image as in
/// physical memory, so the ROM needs no other alias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Placement {
    /// [`PLACEMENT_SIGNATURE`].
    pub signature: u32,
    /// [`PLACEMENT_VERSION`].
    pub version: u32,
    /// The image's first byte.
    pub image: u32,
    /// The page with [`StartInfo`] that Xen gave the loader.
    pub start_info: u32,
    /// A page whose machine frame is Xen's [`SharedInfo`].
    pub shared_info: u32,
    /// The machine frames of the guest's frames: an array of `pages` words.
    pub p2m: u32,
    /// How many frames the guest has, from 0 on.
    pub pages: u32,
    /// One bit for each of those frames, set for what must stay read-only: page tables of all levels above all. Bit n is bit
    /// n mod 32 of word n / 32. Directly behind these words are as many others, with the bits of page directories and of page
    /// directory pointer tables.
    pub tables: u32,
    /// Where Xen's part of the linear address space begins.
    pub virtual_top: u32,
}

impl Placement {
    /// Whether the loader left it, and in a form that is known here.
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.signature == PLACEMENT_SIGNATURE && self.version == PLACEMENT_VERSION
    }
}

/// The bytes `VmiX`.
pub const PLACEMENT_SIGNATURE: u32 = u32::from_le_bytes(*b"VmiX");

/// The only version so far.
pub const PLACEMENT_VERSION: u32 = 1;

/// Bytes at the end of the granted memory in which the [`Placement`] lies, from their first one on.
pub const PLACEMENT_SIZE: u32 = PAGE_SIZE;

const_assert_eq!(size_of::<Placement>(), 36);

/// Bytes of a page.
pub const PAGE_SIZE: u32 = 4096;

/// Bits of an address within its page.
pub const PAGE_SHIFT: u32 = PAGE_SIZE.trailing_zeros();

/// A frame that is none, in the list of machine frames.
pub const INVALID_FRAME: u32 = u32::MAX;

/// The interrupt by which a 32-bit guest makes a hypercall: number in EAX, arguments in EBX, ECX, EDX, ESI, EDI; result in EAX.
pub const HYPERCALL_VECTOR: u8 = 0x82;

/// What a guest executes before CPUID, so that Xen answers: UD2, and a word that Xen knows.
pub const FORCED_EMULATION: [u8; 5] = [0x0f, 0x0b, b'x', b'e', b'n'];

/// The vector of the first interrupt that is no exception.
pub const FIRST_INTERRUPT: u32 = 32;

/// Where Xen's part of the linear address space begins, if it does not say otherwise.
pub const VIRTUAL_TOP: u32 = 0xf580_0000;

/// The ring that the guest's kernel runs in.
pub const KERNEL_RING: u16 = 1;

/// Xen's own flat segments, which every guest has beyond its own descriptors.
pub mod selector {
    /// Code of the kernel.
    pub const KERNEL_CODE: u16 = 0xe019;
    /// Data and stack of the kernel.
    pub const KERNEL_DATA: u16 = 0xe021;
    /// Code of a program.
    pub const USER_CODE: u16 = 0xe02b;
    /// Data and stack of a program.
    pub const USER_DATA: u16 = 0xe033;
}

/// Entries that a guest's own GDT can have: Xen's lie behind them.
pub const GDT_ENTRIES: u32 = 14 * DESCRIPTORS_IN_A_PAGE;

/// Descriptors in a page.
pub const DESCRIPTORS_IN_A_PAGE: u32 = PAGE_SIZE / 8;

/// Hypercalls' numbers.
pub mod hypercall {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const SET_TRAP_TABLE: u32 = 0;
    pub const MMU_UPDATE: u32 = 1;
    pub const SET_GDT: u32 = 2;
    pub const STACK_SWITCH: u32 = 3;
    pub const SET_CALLBACKS: u32 = 4;
    pub const FPU_TASKSWITCH: u32 = 5;
    pub const SET_DEBUGREG: u32 = 8;
    pub const GET_DEBUGREG: u32 = 9;
    pub const UPDATE_DESCRIPTOR: u32 = 10;
    pub const MEMORY_OP: u32 = 12;
    pub const MULTICALL: u32 = 13;
    pub const UPDATE_VA_MAPPING: u32 = 14;
    pub const SET_TIMER_OP: u32 = 15;
    pub const XEN_VERSION: u32 = 17;
    pub const CONSOLE_IO: u32 = 18;
    pub const VM_ASSIST: u32 = 21;
    pub const IRET: u32 = 23;
    pub const VCPU_OP: u32 = 24;
    pub const MMUEXT_OP: u32 = 26;
    pub const SCHED_OP: u32 = 29;
    pub const CALLBACK_OP: u32 = 30;
    pub const EVENT_CHANNEL_OP: u32 = 32;
    pub const PHYSDEV_OP: u32 = 33;
}

/// Results of hypercalls below zero. All others that Xen has are refusals for good as well.
pub mod error {
    /// The guest may not.
    pub const EPERM: i32 = -1;
    /// There is no such thing.
    pub const ENOENT: i32 = -2;
    /// Xen has no memory for it now.
    pub const ENOMEM: i32 = -12;
    /// A pointer leads nowhere.
    pub const EFAULT: i32 = -14;
    /// The frame is in use otherwise: for Xen's page-table calls, not for now but as long as it is so.
    pub const EBUSY: i32 = -16;
    /// Not now.
    pub const EAGAIN: i32 = -11;
    /// An argument is wrong.
    pub const EINVAL: i32 = -22;
    /// The time for it is over.
    pub const ETIME: i32 = -62;
    /// No such hypercall.
    pub const ENOSYS: i32 = -38;
    /// It was interrupted, and can be made again.
    pub const ERESTART: i32 = -85;
}

/// `mmu_update(array of MmuUpdate, count, done: *u32, domain)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MmuUpdate {
    /// The entry's machine address; in its lowest two bits what is to be done.
    pub ptr: u64,
    /// The entry's new value.
    pub val: u64,
}

/// In [`MmuUpdate::ptr`]: set the entry.
pub const MMU_NORMAL_PT_UPDATE: u64 = 0;

/// In [`MmuUpdate::ptr`]: set the guest's frame of a machine frame.
pub const MMU_MACHPHYS_UPDATE: u64 = 1;

/// The domain that makes the call.
pub const DOMID_SELF: u32 = 0x7ff0;

/// `mmuext_op(array of MmuExtOp, count, done: *u32, domain)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MmuExtOp {
    /// One of [`mmuext`].
    pub cmd: u32,
    /// A frame, or a linear address.
    pub arg1: u32,
    /// A count, or a pointer.
    pub arg2: u32,
}

/// Commands of [`MmuExtOp`].
pub mod mmuext {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const PIN_L1_TABLE: u32 = 0;
    pub const PIN_L2_TABLE: u32 = 1;
    pub const PIN_L3_TABLE: u32 = 2;
    pub const UNPIN_TABLE: u32 = 4;
    pub const NEW_BASEPTR: u32 = 5;
    pub const TLB_FLUSH_LOCAL: u32 = 6;
    pub const INVLPG_LOCAL: u32 = 7;
    pub const TLB_FLUSH_ALL: u32 = 10;
    pub const INVLPG_ALL: u32 = 11;
    pub const FLUSH_CACHE: u32 = 12;
    pub const SET_LDT: u32 = 13;
}

/// `update_va_mapping(address, value low, value high, flags)`: flags.
pub mod uvmf {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const NONE: u32 = 0;
    pub const TLB_FLUSH: u32 = 1;
    pub const INVLPG: u32 = 2;
    /// On every processor, not only on this one.
    pub const ALL: u32 = 4;
}

bitflags! {
    /// What a page-table entry says, in its low bits.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Entry: u64 {
        /// It leads somewhere.
        const PRESENT = 1 << 0;
        /// It can be written to.
        const WRITABLE = 1 << 1;
        /// Programs can use it.
        const USER = 1 << 2;
        /// It was used.
        const ACCESSED = 1 << 5;
        /// It was written to.
        const DIRTY = 1 << 6;
        /// In a page directory: it leads to a large page.
        const LARGE = 1 << 7;
        /// The translation stays when CR3 is loaded.
        const GLOBAL = 1 << 8;
        /// The frame's address.
        const FRAME = 0x000f_ffff_ffff_f000;
        /// What is there is not to be executed.
        const NO_EXECUTE = 1 << 63;
    }
}

/// `set_trap_table(array of TrapInfo)`: ends with one whose address is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct TrapInfo {
    /// The vector.
    pub vector: u8,
    /// Bits 0 and 1: the outermost ring that may make it with INT. [`TRAP_DISABLES_EVENTS`].
    pub flags: u8,
    /// The handler's code selector.
    pub cs: u16,
    /// The handler.
    pub address: u32,
}

/// In [`TrapInfo::flags`]: events are masked on the way to the handler, as behind an interrupt gate.
pub const TRAP_DISABLES_EVENTS: u8 = 4;

/// `multicall(array of MulticallEntry, count)`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MulticallEntry {
    /// The hypercall's number. A Xen for debugging overwrites all but the result.
    pub op: u32,
    /// Its result.
    pub result: i32,
    /// Its arguments.
    pub args: [u32; 6],
}

/// `sched_op(command, argument)`.
pub mod sched {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const YIELD: u32 = 0;
    /// Unmasks events and waits for one, in one step.
    pub const BLOCK: u32 = 1;
    /// Ends the domain. Argument: pointer to a word with the reason.
    pub const SHUTDOWN: u32 = 2;

    pub const SHUTDOWN_POWEROFF: u32 = 0;
    pub const SHUTDOWN_REBOOT: u32 = 1;
    pub const SHUTDOWN_CRASH: u32 = 3;
}

/// `event_channel_op(command, argument)`.
pub mod event_channel {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    /// Argument: virtual interrupt, virtual processor, port (which is answered).
    pub const BIND_VIRQ: u32 = 1;
    /// Argument: physical interrupt, flags, port (which is answered).
    pub const BIND_PIRQ: u32 = 2;
    /// Argument: port.
    pub const CLOSE: u32 = 3;
    /// Argument: port.
    pub const SEND: u32 = 4;
    /// Argument: virtual processor, port (which is answered).
    pub const BIND_IPI: u32 = 7;
    /// Argument: port.
    pub const UNMASK: u32 = 9;

    pub const VIRQ_TIMER: u32 = 0;
    pub const VIRQ_DEBUG: u32 = 1;
    pub const VIRQ_CONSOLE: u32 = 2;
}

/// `vcpu_op(command, processor, argument)`.
pub mod vcpu {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    /// Argument: the address of a [`super::RunState`], of 64 bits.
    pub const REGISTER_RUNSTATE: u32 = 5;
    pub const STOP_PERIODIC_TIMER: u32 = 7;
    /// Argument: the frame, of 64 bits, the offset in it, 0.
    pub const REGISTER_VCPU_INFO: u32 = 10;
}

/// `physdev_op(command, argument)`.
pub mod physdev {
    /// Argument: pointer to a word with the level, 0 to 3.
    pub const SET_IOPL: u32 = 6;
    /// Argument: pointer to a word with the physical interrupt.
    pub const EOI: u32 = 12;
}

/// `memory_op(command, argument)`.
pub mod memory {
    /// Answers the machine's last frame.
    pub const MAXIMUM_RAM_PAGE: u32 = 2;
    /// Argument: pointer to [`super::MachphysMapping`].
    pub const MACHPHYS_MAPPING: u32 = 12;
    /// Argument: pointer to the number of entries and the address of the buffer. The memory that the guest may use.
    pub const MEMORY_MAP: u32 = 9;
    /// The same for the machine's memory.
    pub const MACHINE_MEMORY_MAP: u32 = 10;
}

/// Where machine frames are turned into the guest's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct MachphysMapping {
    /// The linear address of an array of words, one for each machine frame. It is where Xen's hole begins.
    pub v_start: u32,
    /// Its end.
    pub v_end: u32,
    /// The highest machine frame that it has.
    pub max_mfn: u32,
}

/// `console_io(command, bytes, buffer)`.
pub mod console {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const WRITE: u32 = 0;
    pub const READ: u32 = 1;
}

/// `vm_assist(command, type)`.
pub mod vm_assist {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const ENABLE: u32 = 0;
    pub const PAE_EXTENDED_CR3: u32 = 3;
    /// EFLAGS of the guest show IOPL, and IRET sets it.
    pub const ARCHITECTURAL_IOPL: u32 = 4;
}

/// What Xen gives a guest when it starts.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct StartInfo {
    /// `xen-`, the version, the platform.
    pub magic: [u8; 32],
    /// The pages of the domain.
    pub nr_pages: u32,
    /// The machine address of [`SharedInfo`].
    pub shared_info: u32,
    /// [`start_flags`].
    pub flags: u32,
    /// Frame of the page shared with the store.
    pub store_mfn: u32,
    /// Event channel to the store.
    pub store_evtchn: u32,
    /// Of dom0: offset of the description of the screen. Of others: the console's frame.
    pub console_info_offset: u32,
    /// Of dom0: its bytes. Of others: the console's event channel.
    pub console_info_size: u32,
    /// The linear address of the top page table.
    pub pt_base: u32,
    /// How many frames of page tables there are, from that address on.
    pub nr_pt_frames: u32,
    /// The linear address of the list of the machine frames of the domain's frames.
    pub mfn_list: u32,
    /// The linear address of the module.
    pub mod_start: u32,
    /// Its bytes.
    pub mod_len: u32,
    /// The command line, ended by a NUL.
    pub cmd_line: [u8; 1024],
    /// The first of the frames that hold the list of machine frames.
    pub first_p2m_pfn: u32,
    /// How many there are.
    pub nr_p2m_frames: u32,
}

const_assert_eq!(size_of::<StartInfo>(), 1112);
const_assert_eq!(offset_of!(StartInfo, pt_base), 60);
const_assert_eq!(offset_of!(StartInfo, cmd_line), 80);

/// [`StartInfo::flags`].
pub mod start_flags {
    #![expect(missing_docs, reason = "each is Xen's name for it")]

    pub const PRIVILEGED: u32 = 1 << 0;
    pub const INITIAL_DOMAIN: u32 = 1 << 1;
    /// The module is a list of modules, as of multiboot.
    pub const MULTIBOOT_MODULE: u32 = 1 << 2;
    /// `mod_start` is a frame of the guest's.
    pub const MODULE_IS_A_FRAME: u32 = 1 << 3;
}

/// Time, of one virtual processor. Odd versions are being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C, align(4))]
pub struct VcpuTimeInfo {
    /// Counts up before and after every change.
    pub version: u32,
    /// Not used.
    pub pad0: u32,
    /// The time-stamp counter at the last change, low half first.
    pub tsc_timestamp: [u32; 2],
    /// The nanoseconds since the machine started, then; low half first.
    pub system_time: [u32; 2],
    /// Nanoseconds in a (shifted) tick, times 2^32.
    pub tsc_to_system_mul: u32,
    /// How many bits a difference of ticks is shifted to the left, before it is multiplied; negative to the right.
    pub tsc_shift: i8,
    /// Not used.
    pub flags: u8,
    /// Not used.
    pub pad1: [u8; 2],
}

const_assert_eq!(size_of::<VcpuTimeInfo>(), 32);

/// What Xen and one virtual processor share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct VcpuInfo {
    /// Not zero if an event is pending.
    pub evtchn_upcall_pending: u8,
    /// Not zero if no event may come: the guest's interrupt flag, the other way round.
    pub evtchn_upcall_mask: u8,
    /// Not used.
    pub pad: [u8; 2],
    /// Which words of [`SharedInfo::evtchn_pending`] have a bit.
    pub evtchn_pending_sel: u32,
    /// The address of the last page fault.
    pub cr2: u32,
    /// Not used.
    pub arch_pad: [u32; 5],
    /// Time.
    pub time: VcpuTimeInfo,
}

const_assert_eq!(size_of::<VcpuInfo>(), 64);
const_assert_eq!(offset_of!(VcpuInfo, time), 32);

/// How a virtual processor spent its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct RunState {
    /// One of the four states below, by its index.
    pub state: u32,
    /// When it entered it, in system time, low half first.
    pub entered: [u32; 2],
    /// The nanoseconds spent running, waiting for a processor, blocked, and off line, each low half first.
    pub time: [[u32; 2]; 4],
}

const_assert_eq!(size_of::<RunState>(), 44);

/// Virtual processors that [`SharedInfo`] has room for.
pub const LEGACY_MAX_VCPUS: usize = 32;

/// The page that Xen shares with the guest.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct SharedInfo {
    /// Each virtual processor's own.
    pub vcpu_info: [VcpuInfo; LEGACY_MAX_VCPUS],
    /// A bit for each port: an event is pending.
    pub evtchn_pending: [u32; 32],
    /// A bit for each port: its events do not interrupt.
    pub evtchn_mask: [u32; 32],
    /// Counts up before and after every change of the next two.
    pub wc_version: u32,
    /// Seconds from 1970 to the time when the machine started.
    pub wc_sec: u32,
    /// And nanoseconds.
    pub wc_nsec: u32,
    /// Facts for tools outside of the guest.
    pub arch: [u32; 6],
    /// The upper half of the seconds.
    pub wc_sec_hi: u32,
}

const_assert_eq!(offset_of!(SharedInfo, evtchn_pending), 2048);
const_assert_eq!(offset_of!(SharedInfo, evtchn_mask), 2176);
const_assert_eq!(offset_of!(SharedInfo, wc_sec), 2308);
const_assert_eq!(offset_of!(SharedInfo, wc_sec_hi), 2340);

/// Ports that 32-bit guests have.
pub const PORTS: u32 = 1024;

const_assert_eq!(size_of::<MmuUpdate>(), 16);
const_assert_eq!(size_of::<MmuExtOp>(), 12);
const_assert_eq!(size_of::<TrapInfo>(), 8);
const_assert_eq!(size_of::<MulticallEntry>(), 32);
