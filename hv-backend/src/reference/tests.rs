//! Which hypervisors are taken, and what is said of a failure.

use super::interface::{SIGNATURE, VERSION};
use super::*;
use crate::{Detection, Reason, Update, detect};
use proptest::prelude::*;
use std::string::String;

/// Leaves from the base of an interface on: EAX, EBX, ECX, EDX.
type Leaves = [[u32; 4]; 3];

const FEATURES: u32 = Features::PAGE_TABLES.union(Features::BATCH).bits();

fn good() -> Leaves {
    let word = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| SIGNATURE[at + i]));
    [
        [LEAF_GRANT, word(0), word(4), word(8)],
        [VERSION, FEATURES, BATCH_LIMIT, 0],
        [0x000d_4000, Reference::MEMORY, 0, 0],
    ]
}

/// What is made of a machine with these leaves.
fn on(leaves: Leaves) -> Result<Reference, Unfit> {
    let cpuid = |leaf: u32, _| match leaf.checked_sub(BASE) {
        Some(place) => leaves.get(place as usize).copied().unwrap_or_default(),
        None => [0, 0, 1 << 31, 0],
    };
    match detect(cpuid) {
        Detection::Found(hypervisor) => Reference::of(&hypervisor, cpuid),
        detection => panic!("{detection:?}"),
    }
}

/// The same with one register changed.
fn with(leaf: usize, register: usize, value: u32) -> Result<Reference, Unfit> {
    let mut leaves = good();
    leaves[leaf][register] = value;
    on(leaves)
}

#[test]
fn the_reference_hypervisor_is_taken() {
    let taken = on(good()).expect("nothing wrong");
    assert_eq!((taken.physical, taken.batches), (0x000d_4000, true));
    assert!(with(0, 0, LEAF_GRANT + 5).is_ok(), "more leaves");
    assert!(with(1, 0, VERSION + 7).is_ok(), "a later minor version");
    assert!(with(1, 1, u32::MAX).is_ok(), "features of later versions");
    assert!(with(2, 1, u32::MAX).is_ok(), "more memory");
}

#[test]
fn what_does_not_fit_is_left_to_native_code() {
    let refused = |leaf, register, value| with(leaf, register, value).err();
    assert_eq!(refused(0, 3, u32::from_le_bytes(*b"efHw")), Some(Unfit::Stranger));
    assert_eq!(refused(0, 0, LEAF_GRANT - 1), Some(Unfit::FewLeaves));
    for version in [0, VERSION - 1, VERSION + (1 << 16), u32::MAX] {
        assert_eq!(refused(1, 0, version), Some(Unfit::Version), "{version:#x}");
    }
    assert_eq!(refused(1, 1, Features::BATCH.bits()), Some(Unfit::NoPageTables));
    for address in [0, 0x000d_4004, 0x000d_4800] {
        assert_eq!(refused(2, 0, address), Some(Unfit::Grant), "{address:#x}");
    }
    for bytes in [0, Reference::MEMORY - 1] {
        assert_eq!(refused(2, 1, bytes), Some(Unfit::Grant), "{bytes}");
    }
}

#[test]
fn without_batches_nothing_is_told_late() {
    let late =
        |features: Features| with(1, 1, features.bits()).expect("nothing wrong").may_be_late();
    assert!(late(Features::all()));
    assert!(!late(Features::PAGE_TABLES | Features::LATE));
    assert!(!late(Features::PAGE_TABLES | Features::BATCH));
}

#[test]
fn only_what_is_told_late_lets_page_faults_be_quiet() {
    let quiet = |features: Features| with(1, 1, features.bits()).expect("nothing wrong").quiet;
    assert!(quiet(Features::all()));
    assert!(!quiet(Features::all() - Features::QUIET));
    assert!(!quiet(Features::all() - Features::LATE));
    assert!(!quiet(Features::all() - Features::BATCH));
}

#[test]
fn without_batches_nothing_waits() {
    let modes = [LazyMode::OFF, LazyMode::MMU, LazyMode::CPU, LazyMode(7)];
    let taken = on(good()).expect("nothing wrong");
    assert_eq!(modes.map(|mode| taken.lazy_mode(mode)), modes);
    let without = [with(1, 1, Features::PAGE_TABLES.bits()), with(1, 2, BATCH_LIMIT - 1)];
    for taken in without {
        let taken = taken.expect("batches are not needed");
        assert_eq!(modes.map(|mode| taken.lazy_mode(mode)), [LazyMode::OFF; 4]);
    }
    let flags = Reference::entry_flags(EntryFlags::all().bits());
    assert!(!Update::SetPxE(1, 2, flags).may_wait(LazyMode::OFF));
    assert_eq!(flags, (EntryFlags::all() - EntryFlags::DEFER).bits());
}

#[test]
fn an_interface_behind_another_one_is_found() {
    let hypervisor = Hypervisor {
        vendor: Vendor::Reference,
        signature: SIGNATURE,
        base: BASE + 0x100,
        highest: BASE + 0x102,
    };
    let taken = Reference::of(&hypervisor, |leaf, _| good()[(leaf - BASE - 0x100) as usize]);
    assert!(taken.is_ok());
}

#[test]
fn an_address_in_the_page_is_the_same_at_every_alias() {
    let taken = on(good()).expect("nothing wrong");
    for alias in [0x000d_4120_usize, 0xc00d_4120, 0xf7ff_f120] {
        assert_eq!(taken.physical(core::ptr::without_provenance::<u8>(alias)), 0x000d_4120);
    }
}

#[test]
fn a_failure_is_said_in_a_line() {
    let said = |update, status| {
        let failure = Failure { update, reason: Reason::Permanent, status, attempts: 1 };
        let mut text = String::new();
        describe(&failure, &mut |byte| text.push(byte.into()));
        assert!(text.len() + 9 <= TEXT_LIMIT as usize, "{text}");
        text
    };
    assert_eq!(
        said(Update::SetPxE(1, 0xc00a_1018, 0), Status::Busy as i32),
        "SetPxE at C00A1018: busy"
    );
    assert_eq!(said(Update::CLTS(), 5), "CLTS at 00000000: an unknown status");
    for status in Status::ALL {
        assert!(said(Update::UpdateKernelStack(0, 0), *status as i32).ends_with(status.text()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_taken_can_be_relied_on(base in 0..3_u32, highest: u32, leaves: [[u32; 4]; 2], near: bool) {
        // Noise, and noise close to what would be taken.
        let leaf = |place: usize| if near { core::array::from_fn(|i| good()[place + 1][i] ^ leaves[place][i] & 0x1_0003) } else { leaves[place] };
        let base = BASE + 0x100 * base;
        let hypervisor = Hypervisor {
            vendor: Vendor::Reference, signature: SIGNATURE, base, highest: base + highest % 4,
        };
        let taken = Reference::of(&hypervisor, |asked, _| leaf((asked - base - 1) as usize));
        let [[version, features, ..], [physical, granted, ..]] = [leaf(0), leaf(1)];
        let fits = hypervisor.highest >= base + 2 && version >> 16 == 1 && features & 1 != 0
            && physical % 4096 == 0 && physical != 0 && granted >= 4096;
        prop_assert_eq!(taken.is_ok(), fits);
    }
}
