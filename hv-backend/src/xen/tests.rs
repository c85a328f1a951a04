//! The backend on a model of Xen.

mod model;

use super::descriptors::TASK_SWITCHED;
use super::*;
use interface::{Entry, SharedInfo, TRAP_DISABLES_EVENTS, event_channel, mmuext};
use model::{LINEAR, Made, Model, OWN, PAGES, SCREEN, ShutDown, TOP, machine_frame, zeroed};
use proptest::prelude::*;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::string::ToString;
use std::vec::Vec;
use vmi_abi::flags::{AlarmFlags, PageFlags};

const MMU: LazyMode = LazyMode::MMU;
const CPU: LazyMode = LazyMode::CPU;
const OFF: LazyMode = LazyMode::OFF;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const GLOBAL: u64 = 1 << 8;

/// An entry that maps a frame, with bits.
const fn maps(frame: u32, bits: u64) -> u64 {
    (frame as u64) << 12 | bits
}

/// The same as Xen has it.
const fn machine(frame: u32, bits: u64) -> u64 {
    maps(machine_frame(frame), bits)
}

/// Where an entry of a table lies.
const fn at(table: u32, index: u32) -> u32 {
    LINEAR + (table << 12) + 8 * index
}

/// What a domain ends with, or that it goes on.
fn end(run: impl FnOnce()) -> Option<u32> {
    let payload = catch_unwind(AssertUnwindSafe(run)).err()?;
    Some(payload.downcast::<ShutDown>().expect("no other panic").0)
}

#[test]
fn xen_is_found_where_its_signature_is() {
    let leaf = |at, highest| {
        move |leaf: u32, _| {
            if leaf == at { [highest, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566e] } else { [0; 4] }
        }
    };
    assert!(Xen::is_there(leaf(0x4000_0000, 0x4000_0005)));
    assert!(Xen::is_there(leaf(0x4000_0300, 0x4000_0304)));
    assert!(!Xen::is_there(leaf(0x4000_0000, 0x4000_0100)));
    assert!(!Xen::is_there(leaf(0x4000_0000, 0)));
    assert!(!Xen::is_there(leaf(1, 0x4000_0005)));
    assert!(!Xen::is_there(|_, _| [0x4000_0005, 0x566e_6558, 0x6558_4d4d, 0x4d4d_566d]));
}

#[test]
fn it_takes_over_once_and_from_every_alias() {
    let model = Model::new();
    let xen = zeroed();
    let mut wrong = Model::placement();
    wrong.version += 1;
    assert_eq!(xen.start(&model, &wrong, 0, 0, 0, [0; 2]), Err(Unfit::NotPlaced));
    for refused in 0..5 {
        model.answer(&[&[0; 5][..refused], &[error::EPERM]].concat());
        // The first result is that of a question.
        let outcome = model.start(&xen);
        assert_eq!(outcome, if refused == 0 { Ok(()) } else { Err(Unfit::Refused) }, "{refused}");
        xen.chosen.set(0);
        model.results.borrow_mut().clear();
    }
    model.made.borrow_mut().clear();
    assert_eq!(model.start(&xen), Ok(()));
    assert_eq!((xen.chosen.get(), xen.cr3(&model)), (Xen::CHOSEN, 7 << 12));
    let made = model.taken();
    let offset = offset_of!(Xen, shared) as u32;
    let place = std::vec![machine_frame(OWN), 0, offset, 0];
    assert!(made.contains(&Made::Operate(hypercall::VCPU_OP, vcpu::REGISTER_VCPU_INFO, place)));
    assert!(made.contains(&Made::Operate(
        hypercall::EVENT_CHANNEL_OP,
        event_channel::UNMASK,
        std::vec![37]
    )));
    assert_eq!(model.start(&xen), Ok(()));
    let callbacks = Made::Number(hypercall::SET_CALLBACKS, [0xe019, 0x1111, 0xe019, 0x2222]);
    assert_eq!(model.taken()[1..], [callbacks], "nothing is bound or registered again");
}

#[test]
fn frames_are_translated_both_ways() {
    let model = Model::new();
    let xen = model.started();
    for frame in 0..PAGES {
        let found = xen.physical_to_machine(&model, frame);
        assert_eq!(found, machine_frame(frame));
        assert_eq!(xen.machine_to_physical(&model, found), frame);
    }
    assert_eq!(xen.physical_to_machine(&model, SCREEN), SCREEN);
    // A device's frames, beyond both lists, are the machine's.
    assert_eq!(xen.physical_to_machine(&model, 0xf_ee00), 0xf_ee00);
    assert_eq!(xen.machine_to_physical(&model, 0xf_ee00), 0xf_ee00);
    // Xen's list says what others made of their frames, too.
    model.store(TOP + 4 * 0x900, 5);
    assert_eq!(xen.machine_to_physical(&model, 0x900), 0x900);
}

#[test]
fn entries_wait_in_their_mode_and_are_xens_when_they_go() {
    let model = Model::new();
    let xen = model.with_table();
    xen.set_entry(&model, maps(9, 0x63 | GLOBAL), at(3, 5));
    assert_eq!(model.taken(), [Made::Updates(1)]);
    assert_eq!(model.entry(3, 5), machine(9, 0x63));
    xen.set_lazy_mode(&model, MMU);
    xen.set_entry(&model, maps(10, 0x8000_0000_0000_0063), at(3, 6));
    xen.set_entry(&model, maps(0xf_ee00, 0x13), at(3, 7));
    xen.set_entry(&model, maps(11, 0x62), at(3, 8));
    assert!(model.taken().is_empty());
    assert_eq!(model.entry(3, 6), 0);
    xen.set_lazy_mode(&model, MMU);
    assert!(model.taken().is_empty(), "entered twice");
    model.answer(&[]);
    xen.set_lazy_mode(&model, OFF);
    assert_eq!(model.taken(), [Made::Updates(3)]);
    assert_eq!(model.entry(3, 6), machine(10, 0x8000_0000_0000_0063));
    assert_eq!(model.entry(3, 7), maps(0xf_ee00, 0x13), "a device");
    assert_eq!(model.entry(3, 8), maps(11, 0x62), "not present: nothing to translate");
    xen.set_lazy_mode(&model, OFF);
    assert!(model.taken().is_empty() && xen.refusals.get() == 0);
}

#[test]
fn a_full_batch_goes_over_by_itself() {
    let model = Model::new();
    let xen = model.with_table();
    xen.set_lazy_mode(&model, MMU);
    for index in 0..BATCH as u32 + 3 {
        xen.set_entry(&model, maps(9, 0x63), at(3, index));
    }
    assert_eq!(model.taken(), [Made::Updates(BATCH)]);
    xen.invalidate(&model, 0x1000);
    let made = model.taken();
    assert_eq!(made[0], Made::Updates(3));
    assert!(matches!(
        made[1],
        Made::Operation(MmuExtOp { cmd: mmuext::INVLPG_LOCAL, arg1: 0x1000, .. })
    ));
    assert!((0..BATCH as u32 + 3).all(|index| model.entry(3, index) == machine(9, 0x63)));
}

#[test]
fn an_entry_is_found_where_a_slot_maps_it() {
    let model = Model::new();
    let xen = model.with_table();
    xen.set_linear_mapping(1, 0xf000_0000, 2, 30);
    xen.set_linear_mapping(9, 0xe000_0000, 2, 30);
    xen.allocate_page(&model, 31, PageFlags::PT.bits(), (0, 0, 0));
    xen.set_entry(&model, maps(9, 0x63), 0xf000_1010);
    assert_eq!(model.entry(31, 2), machine(9, 0x63));
    for nowhere in [0xf000_2000, 0xe000_0000, 0x1000] {
        let before = xen.refusals.get();
        xen.set_entry(&model, maps(9, 0x63), nowhere);
        assert_eq!(xen.refusals.get(), before + 1, "{nowhere:#x}");
    }
}

#[test]
fn what_is_refused_for_now_is_tried_again_and_nothing_is_lost() {
    let model = Model::new();
    let xen = model.with_table();
    model.most.set(2);
    xen.set_lazy_mode(&model, MMU);
    (0..7).for_each(|index| xen.set_entry(&model, maps(9 + index, 0x63), at(3, index)));
    xen.flush(&model);
    assert_eq!(model.taken(), [7, 5, 3, 1].map(Made::Updates));
    assert!((0..7).all(|index| model.entry(3, index) == machine(9 + index, 0x63)));
    assert_eq!(xen.refusals.get(), 0);
}

#[test]
fn what_is_refused_for_good_is_said_and_faults_and_the_rest_is_applied() {
    let model = Model::new();
    let xen = model.with_table();
    xen.set_lazy_mode(&model, MMU);
    (0..5).for_each(|index| xen.set_entry(&model, maps(9 + index, 0x63), at(3, index)));
    model.answer(&[0, 0, error::EINVAL]);
    xen.flush(&model);
    assert_eq!(model.taken(), [Made::Updates(5), Made::Updates(3)]);
    let entries = [0, 1, 2, 3, 4].map(|index| model.entry(3, index));
    let good = |index: u32| machine(9 + index, 0x63);
    assert_eq!(entries, [good(0), good(1), 0, good(3), good(4)]);
    assert_eq!(xen.refusals.get(), 1);
    let place = machine_frame(3) << 12 | 16;
    let said = std::format!("VMI ROM: call 39 at {place:08X}: Xen's status -022\n");
    assert_eq!(model.said.borrow().to_string(), said);
}

#[test]
fn what_is_refused_for_now_too_often_is_refused_for_good() {
    let model = Model::new();
    let xen = model.with_table();
    model.answer(&[error::ENOMEM; ATTEMPTS as usize]);
    xen.set_entry(&model, maps(9, 0x63), at(3, 0));
    assert_eq!(model.taken().len(), ATTEMPTS as usize + 1);
    assert_eq!((model.entry(3, 0), xen.refusals.get()), (0, 1));
    model.answer(&[error::EAGAIN; ATTEMPTS as usize - 1]);
    xen.set_entry(&model, maps(9, 0x63), at(3, 0));
    assert_eq!((model.entry(3, 0), xen.refusals.get()), (machine(9, 0x63), 1));
}

#[test]
fn where_not_even_nothing_can_be_put_the_domain_ends() {
    let model = Model::new();
    let xen = model.with_table();
    model.answer(&[error::EINVAL; 2]);
    let ended = end(|| xen.set_entry(&model, maps(9, 0x63), at(3, 0)));
    assert_eq!(ended, Some(sched::SHUTDOWN_CRASH));
}

/// A tree in ordinary memory: pointers in 20, a directory in 21, page tables in 22 and 23 that map everything, each other too.
fn tree(model: &Model) {
    model.write(20, 3, maps(21, PRESENT));
    model.write(21, 0, maps(22, 0x63));
    model.write(21, 1, maps(23, 0x63));
    for frame in 0..PAGES {
        model.write(22 + frame / 512, frame % 512, maps(frame, 0x63 | GLOBAL));
    }
}

#[test]
fn a_tree_becomes_tables_when_it_is_loaded() {
    let model = Model::new();
    let xen = model.started();
    tree(&model);
    xen.set_cr3(&model, 20 << 12);
    assert_eq!((xen.refusals.get(), model.root.get(), xen.cr3(&model)), (0, 20, 20 << 12));
    assert_eq!(*model.said.borrow(), "");
    for table in 20..24 {
        assert!(model.read_only.borrow().contains(&table));
        assert_eq!(model.entry(22, table), machine(table, 0x61), "mapped read-only");
    }
    assert_eq!(model.entry(20, 3), machine(21, PRESENT));
    assert_eq!(model.entry(21, 1), machine(23, 0x63), "leads on, so it stays writable");
    assert_eq!(model.entry(22, 40), machine(40, 0x63));

    // From now on a table is mapped read-only, whatever the guest asks for, and a directory leads on to new ones.
    xen.set_entry(&model, maps(23, 0x63), at(22, 100));
    assert_eq!(model.entry(22, 100), machine(23, 0x61));
    xen.allocate_page(&model, 24, PageFlags::PT.bits(), (0, 0, 0));
    xen.set_entry(&model, maps(24, 0x63), at(21, 2));
    assert_eq!(model.entry(21, 2), machine(24, 0x63));
    assert_eq!(xen.refusals.get(), 0);

    // Xen refuses what is not the domain's; whoever uses it gets a fault.
    xen.set_entry(&model, maps(0x9000, 0x63), at(22, 101));
    assert_eq!((model.entry(22, 101), xen.refusals.get()), (0, 1));
}

#[test]
fn what_was_copied_from_a_table_is_not_translated_again() {
    let model = Model::new();
    let xen = model.started();
    tree(&model);
    xen.set_cr3(&model, 20 << 12);
    // A second address space: all from the first, and a page of its own.
    for index in 0..512 {
        model.write(31, index, model.entry(21, index));
    }
    model.write(31, 9, maps(32, 0x63));
    model.write(30, 3, maps(31, PRESENT));
    xen.allocate_page(&model, 32, (PageFlags::PT | PageFlags::ZEROED).bits(), (0, 0, 0));
    xen.allocate_page(&model, 31, (PageFlags::PD | PageFlags::CLONE).bits(), (21, 0, 9));
    assert_eq!(model.entry(31, 0), machine(22, 0x63));
    assert_eq!(model.entry(31, 9), machine(32, 0x63));
    // What Xen left behind its part of the first directory is nobody's.
    xen.set_cr3(&model, 30 << 12);
    assert_eq!((xen.refusals.get(), model.root.get()), (0, 30));
}

#[test]
fn a_released_page_is_the_guests_again() {
    let model = Model::new();
    let xen = model.started();
    tree(&model);
    xen.set_cr3(&model, 20 << 12);
    // In use: Xen refuses, and it stays a table.
    xen.release_page(&model, 22, PageFlags::PT.bits());
    assert_eq!(xen.refusals.get(), 1);
    xen.set_entry(&model, maps(22, 0x63), at(23, 0));
    assert_eq!(model.entry(23, 0), machine(22, 0x61));

    xen.release_page(&model, 20, PageFlags::PDP.bits());
    xen.release_page(&model, 21, PageFlags::PD.bits());
    xen.release_page(&model, 22, PageFlags::PT.bits());
    assert_eq!(xen.refusals.get(), 1);
    assert_eq!(model.entry(20, 3), maps(21, PRESENT));
    assert_eq!(model.entry(21, 1), maps(23, 0x63));
    assert_eq!(model.entry(21, 430), 0, "Xen's own entry is gone");
    assert_eq!(model.entry(22, 40), maps(40, 0x63));
    // It is written to as memory, as the guest says, and can become a table again.
    model.made.borrow_mut().clear();
    xen.set_entry(&model, maps(41, 0x63 | GLOBAL), at(22, 40));
    assert_eq!((model.entry(22, 40), model.taken()), (maps(41, 0x63 | GLOBAL), Vec::new()));
    xen.allocate_page(&model, 22, PageFlags::PT.bits(), (0, 0, 0));
    assert_eq!(model.entry(22, 40), machine(41, 0x63));
    xen.release_page(&model, 60, PageFlags::PT.bits());
    assert_eq!(xen.refusals.get(), 1, "what is no table has nothing to release");
}

#[test]
fn a_root_that_xen_refuses_ends_the_domain() {
    let model = Model::new();
    let xen = model.started();
    model.write(20, 3, maps(21, PRESENT));
    model.write(21, 0, maps(22, 0x63));
    model.write(22, 0, maps(0x9000, 0x63));
    let ended = end(|| xen.set_cr3(&model, 20 << 12));
    assert_eq!(ended, Some(sched::SHUTDOWN_CRASH));
    assert_eq!(xen.refusals.get(), 2, "the table, and the register");
}

/// Descriptors: a segment, of ring 0 or 3.
const CODE: [u32; 2] = [0x0000_ffff, 0x00cf_9a00];
const DATA: [u32; 2] = [0x0000_ffff, 0x00cf_f200];
/// A task state segment at C0005000h, an LDT at C0006000h of 16 bytes.
const TASK: [u32; 2] = [0x5000_0067, 0xc000_8900];
const LOCAL: [u32; 2] = [0x6000_000f, 0xc000_8200];

const GDT: u32 = LINEAR + 0x4000;

fn descriptor(model: &Model, table: u32, index: u32, [low, high]: [u32; 2]) {
    model.store(table + 8 * index, low);
    model.store(table + 8 * index + 4, high);
}

fn with_tables(model: &Model) -> std::boxed::Box<Xen> {
    let xen = model.started();
    for (index, found) in [[0; 2], CODE, DATA, TASK, LOCAL].into_iter().enumerate() {
        descriptor(model, GDT, index as u32, found);
    }
    xen.set_gdt(model, GDT, 6 * 8 - 1);
    model.store(LINEAR + 0x5004, 0xc000_e000);
    assert_eq!(model.taken().last(), Some(&Made::Gdt(machine_frame(OWN + 3), 512)));
    xen.set_task(model, 0x18);
    let stack = Made::Number(hypercall::STACK_SWITCH, [0xe021, 0xc000_e000, 0, 0]);
    assert_eq!(model.taken().last(), Some(&stack));
    xen
}

/// A descriptor of the copy that Xen has.
fn copied(model: &Model, copy: u32, index: u32) -> u64 {
    model.entry(OWN + copy / PAGE_SIZE, index)
}

const fn long([low, high]: [u32; 2]) -> u64 {
    (high as u64) << 32 | low as u64
}

#[test]
fn xen_gets_a_copy_of_the_descriptors_that_it_takes() {
    let model = Model::new();
    let xen = with_tables(&model);
    let copy = |index| copied(&model, GDT_OFFSET, index);
    assert_eq!(copy(1), long([CODE[0], CODE[1] | 1 << 13]), "of the kernel's ring");
    assert_eq!(copy(2), long(DATA));
    assert_eq!([copy(3), copy(4), copy(5)], [0; 3], "no system descriptor");
    assert_eq!((xen.gdt(), xen.task()), ((GDT, 47), 0x18));
    assert_eq!(model.entry(4, 3), long(TASK), "the guest's own is as it wrote it");

    // An entry of the live table, of another one, and the table anew.
    xen.write_gdt_entry(&model, GDT, 5, CODE[0], CODE[1]);
    assert_eq!((copy(5), model.entry(4, 5)), (long([CODE[0], CODE[1] | 1 << 13]), long(CODE)));
    xen.write_gdt_entry(&model, LINEAR + 0x8000, 5, DATA[0], DATA[1]);
    assert_eq!((copy(5), model.entry(8, 5)), (long([CODE[0], CODE[1] | 1 << 13]), long(DATA)));
    xen.set_gdt(&model, LINEAR + 0x8000, 0xffff);
    assert_eq!([copy(1), copy(2), copy(5)], [0, 0, long(DATA)]);
    xen.set_gdt(&model, GDT, 6 * 8 - 1);
    assert_eq!([copy(2), copy(3)], [long(DATA), 0]);
    assert_eq!(xen.refusals.get(), 0);
}

#[test]
fn an_ldt_is_found_by_its_descriptor() {
    let model = Model::new();
    let xen = with_tables(&model);
    descriptor(&model, LINEAR + 0x6000, 1, DATA);
    xen.set_ldt(&model, 0x20);
    let copy = LINEAR + (OWN << 12) + LDT_OFFSET;
    let set = |arg1, arg2| Made::Operation(MmuExtOp { cmd: mmuext::SET_LDT, arg1, arg2 });
    assert_eq!(model.taken().last(), Some(&set(copy, 512)));
    assert_eq!((copied(&model, LDT_OFFSET, 1), xen.ldt()), (long(DATA), 0x20));
    xen.write_ldt_entry(&model, LINEAR + 0x6000, 0, DATA[0], DATA[1]);
    assert_eq!(copied(&model, LDT_OFFSET, 0), long(DATA));
    xen.set_ldt(&model, 0);
    assert_eq!(model.taken().last(), Some(&set(0, 0)));
    assert_eq!(xen.ldt(), 0);
}

#[test]
fn a_context_switch_is_one_multicall() {
    let model = Model::new();
    let xen = with_tables(&model);
    tree(&model);
    xen.set_cr3(&model, 20 << 12);
    for (overwrites, kind) in [(false, [0x1111, DATA[1]]), (true, [0x2222, DATA[1]])] {
        model.overwrites.set(overwrites);
        model.made.borrow_mut().clear();
        xen.set_lazy_mode(&model, CPU);
        xen.set_cr3(&model, 20 << 12);
        xen.update_kernel_stack(&model, 0xc000_f000);
        for index in [1, 2, 5] {
            xen.write_gdt_entry(&model, GDT, index, kind[0], kind[1]);
        }
        xen.clear_task_switched(&model);
        assert!(model.taken().is_empty());
        xen.set_lazy_mode(&model, OFF);
        use hypercall::*;
        let entry = UPDATE_DESCRIPTOR;
        let calls = [MMUEXT_OP, STACK_SWITCH, entry, entry, entry, FPU_TASKSWITCH];
        assert_eq!(model.taken(), [Made::Multicall(calls.to_vec())]);
    }
    assert_eq!(model.load(LINEAR + 0x5004), 0xc000_f000, "in the task state segment, too");
    assert_eq!(xen.refusals.get(), 0);
}

#[test]
fn a_descriptor_that_is_there_already_costs_nothing() {
    let model = Model::new();
    let xen = with_tables(&model);
    model.made.borrow_mut().clear();
    xen.set_lazy_mode(&model, CPU);
    let write = |index, [low, high]: [u32; 2]| xen.write_gdt_entry(&model, GDT, index, low, high);
    write(1, CODE);
    write(2, [DATA[0], DATA[1] | 1 << 8]);
    assert_eq!(xen.waiting.get(), 0, "as it is, but for having been used");
    // There and back: the second is what Xen has, and not what it will have.
    write(2, CODE);
    write(2, DATA);
    write(1, CODE);
    xen.set_lazy_mode(&model, OFF);
    let two = std::vec![hypercall::UPDATE_DESCRIPTOR; 2];
    assert_eq!(model.taken(), [Made::Multicall(two)]);
    assert_eq!(copied(&model, GDT_OFFSET, 2), long(DATA));
    write(2, DATA);
    assert!(model.taken().is_empty());
}

#[test]
fn a_call_of_a_context_switch_that_is_refused_is_counted() {
    let model = Model::new();
    let xen = with_tables(&model);
    model.overwrites.set(true);
    xen.set_lazy_mode(&model, CPU);
    xen.write_gdt_entry(&model, GDT, 1, DATA[0], DATA[1]);
    xen.clear_task_switched(&model);
    model.answer(&[error::EINVAL]);
    xen.set_lazy_mode(&model, OFF);
    assert_eq!(xen.refusals.get(), 1);
    // Which stack or address space the guest is on is nothing to be wrong about.
    xen.set_lazy_mode(&model, CPU);
    xen.clear_task_switched(&model);
    xen.update_kernel_stack(&model, 0xc000_f000);
    model.answer(&[0, error::EINVAL]);
    assert_eq!(end(|| xen.set_lazy_mode(&model, OFF)), Some(sched::SHUTDOWN_CRASH));
}

#[test]
fn updates_keep_their_order_across_modes() {
    let model = Model::new();
    let xen = with_tables(&model);
    xen.allocate_page(&model, 3, PageFlags::PT.bits(), (0, 0, 0));
    model.made.borrow_mut().clear();
    xen.set_lazy_mode(&model, MMU);
    xen.set_entry(&model, maps(9, 0x63), at(3, 0));
    xen.write_gdt_entry(&model, GDT, 1, DATA[0], DATA[1]);
    assert!(matches!(
        model.taken()[..],
        [Made::Updates(1), Made::Number(hypercall::UPDATE_DESCRIPTOR, _)]
    ));
    xen.set_entry(&model, maps(9, 0x63), at(3, 1));
    xen.set_lazy_mode(&model, CPU);
    assert_eq!(model.taken(), [Made::Updates(1)]);
    xen.clear_task_switched(&model);
    xen.set_entry(&model, maps(9, 0x63), at(3, 2));
    assert!(matches!(model.taken()[..], [Made::Multicall(_), Made::Updates(1)]));
    xen.clear_task_switched(&model);
    assert_eq!(xen.cr2(&model), 0);
    assert!(matches!(model.taken()[..], [Made::Multicall(_)]), "a page fault's call flushes");
    for _ in 0..CALLS {
        xen.clear_task_switched(&model);
    }
    assert!(matches!(model.taken()[..], [Made::Multicall(_)]), "as many as there is room for");
    assert_eq!(xen.waiting.get(), 0);
}

#[test]
fn handlers_are_announced() {
    let model = Model::new();
    let xen = model.started();
    let idt = LINEAR + 0x7000;
    let gate = |vector: u32, kind: u32| {
        descriptor(&model, idt, vector, [0x0061_1000 + vector, 0xc010_0000 | kind])
    };
    (0..40).for_each(|vector| gate(vector, 0x8e00));
    gate(3, 0xef00);
    gate(5, 0x8500);
    gate(6, 0x0e00);
    gate(41, 0x8e00);
    xen.set_idt(&model, idt, 41 * 8 - 1);
    let made = model.taken();
    let [Made::Traps(Some(first)), Made::Traps(Some(second))] = &made[..] else {
        panic!("{made:?}")
    };
    let traps: Vec<_> = first.iter().chain(second).copied().collect();
    let expected: Vec<u8> = (0..40).filter(|vector| ![5, 6].contains(vector)).collect();
    assert_eq!(traps.iter().map(|trap| trap.vector).collect::<Vec<_>>(), expected);
    let trap = |vector, flags| TrapInfo {
        vector,
        flags,
        cs: 0x61,
        address: 0xc010_1000 + u32::from(vector),
    };
    assert_eq!(traps[0], trap(0, 1 | TRAP_DISABLES_EVENTS), "the kernel's ring may INT");
    assert_eq!(traps[3], trap(3, 3), "a trap gate for everybody");
    assert_eq!(xen.idt(), (idt, 41 * 8 - 1));

    xen.write_idt_entry(&model, idt, 39, 0x0061_2000, 0xc020_8e00);
    let made = model.taken();
    assert!(
        matches!(&made[..], [Made::Traps(Some(one))] if one[0].address == 0xc020_2000 && one.len() == 1)
    );
    xen.write_idt_entry(&model, LINEAR + 0x9000, 39, 0x0061_2000, 0xc020_8e00);
    assert!(model.taken().is_empty(), "another table");

    // A table without one of those is set as a whole, at a moment without any.
    xen.set_idt(&model, idt, 40 * 8 - 1);
    assert!(matches!(&model.taken()[..], [Made::Traps(Some(_)), Made::Traps(Some(_))]));
    xen.set_idt(&model, idt, 39 * 8 - 1);
    assert!(matches!(&model.taken()[..], [Made::Traps(None), ..]));
}

#[test]
fn the_task_switched_flag_is_xens_and_the_rest_is_remembered() {
    let model = Model::new();
    let xen = model.started();
    assert_eq!(xen.cr0(&model), 0x8000_0033);
    xen.set_cr0(&model, 0x8001_003b);
    assert!(model.task_switched.get());
    assert_eq!(xen.cr0(&model), 0x8001_003b);
    // Xen clears it when it tells the guest that the coprocessor is needed.
    model.task_switched.set(false);
    assert_eq!(xen.cr0(&model), 0x8001_0033);
    xen.set_cr0(&model, 0x8001_003b);
    xen.clear_task_switched(&model);
    assert_eq!((xen.cr0(&model) & TASK_SWITCHED, model.task_switched.get()), (0, false));
    xen.set_cr4(&model, 0x6f0);
    xen.set_cr2(0x1234);
    assert_eq!((xen.cr4(), xen.cr2(&model)), (0x6f0, 0x1234));
}

#[test]
fn what_became_pending_is_asked_for_when_interrupts_are_on_again() {
    let model = Model::new();
    let xen = model.started();
    let asks = Made::Number(hypercall::XEN_VERSION, [0; 4]);
    for (were_off, pending, delivers) in [(0, 0, false), (0, 1, true), (1, 1, false), (1, 0, false)]
    {
        xen.shared.mask.store(were_off, Relaxed);
        xen.uninterrupted(&model, || {
            assert_eq!(xen.shared.mask.load(Relaxed), 1);
            xen.shared.pending.store(pending, Relaxed);
        });
        assert_eq!(xen.shared.mask.load(Relaxed), were_off);
        assert_eq!(model.taken().contains(&asks), delivers);
    }
}

#[test]
fn a_wait_ends_with_an_event_and_with_nothing_else() {
    let model = Model::new();
    let xen: &'static Xen = std::boxed::Box::leak(model.started());
    let waits = std::rc::Rc::new(Cell::new(0));
    let counted = waits.clone();
    *model.wait.borrow_mut() = Some(std::boxed::Box::new(move || {
        counted.set(counted.get() + 1);
        if counted.get() == 3 {
            xen.woken.set(xen.woken.get() + 1);
        }
    }));
    xen.halt(&model);
    assert_eq!((waits.get(), xen.shared.mask.load(Relaxed)), (3, 0));
    let block = Made::Number(hypercall::SCHED_OP, [sched::BLOCK, 0, 0, 0]);
    assert_eq!(model.taken(), [0; 3].map(|_| block.clone()));
    // One that Xen refuses is no wait at all.
    model.answer(&[error::EINVAL]);
    xen.halt(&model);
    assert_eq!((waits.get(), xen.refusals.get()), (3, 1));
}

/// Has the page say that a cycle is so many nanoseconds, times 2^32 and shifted.
fn scale(xen: &Xen, multiplier: u32, shift: i8) {
    xen.shared.time[2].store(1000, Relaxed);
    xen.shared.time[4].store(5_000_000, Relaxed);
    xen.shared.time[6].store(multiplier, Relaxed);
    xen.shared.time[7].store(shift.cast_unsigned().into(), Relaxed);
}

const HALF: u32 = 1 << 31;

fn timers(model: &Model) -> Vec<u64> {
    let timer = |made| match made {
        Made::Number(hypercall::SET_TIMER_OP, [low, high, ..]) => {
            Some(u64::from(high) << 32 | u64::from(low))
        }
        _ => None,
    };
    model.taken().into_iter().filter_map(timer).collect()
}

/// Makes Xen's timer event pending, and takes what comes.
fn timer_event(model: &Model, xen: &Xen) -> u32 {
    model.store(Model::event_word(offset_of!(SharedInfo, evtchn_pending), 37), 1 << 5);
    xen.shared.selector.store(1 << 1, Relaxed);
    xen.shared.pending.store(1, Relaxed);
    xen.next_event(model).address
}

#[test]
fn clocks_are_xens() {
    let model = Model::new();
    let xen = model.started();
    scale(&xen, HALF, 0);
    assert_eq!(xen.frequency(), 2_000_000_000);
    scale(&xen, HALF, -1);
    assert_eq!(xen.frequency(), 4_000_000_000);
    scale(&xen, HALF, 2);
    assert_eq!(xen.frequency(), 500_000_000);
    model.tsc.set(3000);
    assert_eq!([0, 1, 2, 3].map(|counter| xen.counter(&model, counter)), [3000, 3000, 0, 0]);
    // Two and a half seconds on the list of those that wait, half a second off line.
    let stolen = [[0; 2], [2_500_000_000, 0], [0; 2], [500_000_000, 0]];
    xen.alarms.run_state.set(interface::RunState { time: stolen, ..Default::default() });
    assert_eq!(xen.counter(&model, 2), 1_500_000_000);
    assert_eq!(xen.counter(&model, 1), 3000_u64.wrapping_sub(1_500_000_000));
    model.wall_clock(2, 100, 7);
    assert_eq!(xen.wall_clock(&model), 100_000_000_007 + 5_000_000 + 4000);
    assert_eq!(xen.wall_clock_updated(&model), 0, "the first look");
    assert_eq!(xen.wall_clock_updated(&model), 0);
    model.wall_clock(4, 200, 7);
    assert_eq!([(); 2].map(|()| xen.wall_clock_updated(&model)), [1, 0]);
}

#[test]
fn an_alarm_comes_at_its_vector_once_or_again() {
    let model = Model::new();
    let xen = model.started();
    let idt = LINEAR + 0x7000;
    descriptor(&model, idt, 0x20, [0x0061_2222, 0xc000_8e00]);
    descriptor(&model, idt, 0x31, [0x0061_3333, 0xc000_8e00]);
    xen.set_idt(&model, idt, 0x7ff);
    scale(&xen, HALF, 0);
    model.made.borrow_mut().clear();

    xen.set_alarm(&model, 0, 3000, 0);
    assert_eq!(timers(&model), [5_001_000]);
    model.tsc.set(3000);
    assert_eq!(timer_event(&model, &xen), 0xc000_2222);
    assert_eq!((timers(&model), xen.woken.get()), (std::vec![0], 1), "no other is armed");
    assert_eq!((timer_event(&model, &xen), xen.woken.get()), (0, 1), "it comes once");
    assert_eq!(xen.cancel_alarm(&model, 0), 0);

    // Every 100 cycles; what is missed is one.
    xen.write_apic(&model, 0x320, 0x31);
    let flags = (AlarmFlags::PERIODIC | AlarmFlags::WIRED_LVTT).bits() | 1;
    model.made.borrow_mut().clear();
    xen.set_alarm(&model, flags, 3100, 100);
    model.tsc.set(3350);
    assert_eq!(timer_event(&model, &xen), 0xc000_3333);
    assert_eq!(timers(&model), [5_001_050, 5_001_200]);
    assert_eq!(timer_event(&model, &xen), 0);
    assert_eq!(xen.cancel_alarm(&model, 1), 1);
    assert_eq!((xen.cancel_alarm(&model, 1), xen.cancel_alarm(&model, 9)), (0, 0));
    model.tsc.set(4000);
    assert_eq!(timer_event(&model, &xen), 0);

    // Two at once: the second stays pending, and needs no event of its own.
    xen.set_alarm(&model, 0, 4100, 0);
    xen.set_alarm(&model, flags, 4100, 0);
    model.tsc.set(4200);
    assert_eq!(timer_event(&model, &xen), 0xc000_2222);
    assert_eq!(xen.shared.pending.load(Relaxed), 1);
    assert_eq!(xen.next_event(&model).address, 0xc000_3333);
    assert_eq!(xen.shared.pending.load(Relaxed), 0);
}

#[test]
fn events_of_the_guests_own_stay_pending_for_it() {
    let model = Model::new();
    let xen = model.started();
    let pending = Model::event_word(offset_of!(SharedInfo, evtchn_pending), 70);
    let mask = Model::event_word(offset_of!(SharedInfo, evtchn_mask), 70);
    model.store(pending, 1 << 6 | 1 << 7);
    model.store(mask, 1 << 7);
    xen.shared.selector.store(1 << 2, Relaxed);
    xen.shared.pending.store(1, Relaxed);
    assert_eq!((xen.next_event(&model), xen.woken.get()), (Delivery::default(), 1));
    assert_eq!((model.load(pending), model.load(mask)), (1 << 6 | 1 << 7, 1 << 6 | 1 << 7));
    assert_eq!((xen.shared.pending.load(Relaxed), xen.shared.selector.load(Relaxed)), (0, 0));
}

#[test]
fn a_handler_is_entered_in_the_kernels_ring() {
    let model = Model::new();
    let xen = model.started();
    descriptor(&model, LINEAR + 0x7000, 13, [0x0060_2222, 0xc000_8e00]);
    xen.set_idt(&model, LINEAR + 0x7000, 0x7ff);
    assert_eq!(xen.delivery(&model, 13), Some(Delivery { address: 0xc000_2222, selector: 0x61 }));
    assert_eq!(xen.delivery(&model, 14), None);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn cycles_and_nanoseconds_agree(multiplier in HALF.., shift in -4..4_i8, nanoseconds in 0..1_u64 << 50) {
        let model = Model::new();
        let xen = model.started();
        scale(&xen, multiplier, shift);
        // What an alarm is set to, from cycles made of nanoseconds, is those nanoseconds within a cycle or two in 2^31.
        let rate = xen.frequency();
        let cycles = (u128::from(nanoseconds) * u128::from(rate) / 1_000_000_000) as u64;
        model.made.borrow_mut().clear();
        xen.set_alarm(&model, 0, 1000 + cycles, 0);
        let set = timers(&model)[0] - 5_000_000;
        prop_assert!(set.abs_diff(nanoseconds) <= 64 + (nanoseconds >> 26), "{set} for {nanoseconds}");
    }

    #[test]
    fn whatever_xen_refuses_all_else_is_applied(
        entries in prop::collection::vec((0..512_u32, 4..PAGES), 1..300),
        results in prop::collection::vec(prop_oneof![4 => Just(0), 1 => Just(error::EAGAIN), 1 => Just(error::EINVAL)], 0..400),
        most in 1..9_u32,
    ) {
        let model = Model::new();
        let xen = model.with_table();
        model.most.set(most);
        xen.set_lazy_mode(&model, MMU);
        // No entry twice, so that each has one value to have in the end; and no refusal of what is not present.
        let entries: std::collections::BTreeMap<_, _> = entries.into_iter().collect();
        let (mut refused, mut again) = (false, 0);
        let results: Vec<i32> = results.into_iter().map(|result| {
            // So often in a row, for now may be for good: the model's own stop in front of them counts as well.
            let is_refused = result == error::EINVAL || result == error::EAGAIN && again + 2 == ATTEMPTS;
            let result = if refused && is_refused { 0 } else { result };
            refused = result != 0 && (refused || is_refused);
            again = if result == error::EAGAIN && !is_refused { again + 1 } else { 0 };
            result
        }).collect();
        model.answer(&results);
        for (index, frame) in &entries {
            xen.set_entry(&model, maps(*frame, PRESENT | WRITABLE), at(3, *index));
        }
        xen.set_lazy_mode(&model, OFF);
        let refused = entries.iter().filter(|(index, frame)| {
            let there = model.entry(3, **index);
            assert!(there == 0 || there == machine(**frame, PRESENT | WRITABLE));
            there == 0
        });
        prop_assert_eq!(refused.count(), xen.refusals.get() as usize);
        prop_assert_eq!(xen.waiting.get(), 0);
        prop_assert_eq!(Entry::PRESENT.bits(), PRESENT);
    }
}
