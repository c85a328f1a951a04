//! Hypervisors as tables of CPUID leaves.

use super::*;
use core::cell::Cell;
use proptest::prelude::*;

const XEN: &[u8; 12] = b"XenVMMXenVMM";
const KVM: &[u8; 12] = b"KVMKVMKVM\0\0\0";
const HYPER_V: &[u8; 12] = b"Microsoft Hv";
const FIRST: u32 = 0x4000_0000;
const SECOND: u32 = 0x4000_0100;

/// An interface's first leaf: EAX, EBX, ECX, EDX.
fn leaf(highest: u32, signature: &[u8; 12]) -> [u32; 4] {
    let word = |at: usize| u32::from_le_bytes(core::array::from_fn(|i| signature[at + i]));
    [highest, word(0), word(4), word(8)]
}

/// Detects on a machine with the hypervisor bit, these leaves, and `rest` wherever there is none.
fn on(leaves: &[(u32, [u32; 4])], rest: [u32; 4]) -> Detection {
    detect(|asked, _| match leaves.iter().find(|(number, _)| *number == asked) {
        Some((_, registers)) => *registers,
        None if asked == 1 => [0, 0, HYPERVISOR, 0],
        None => rest,
    })
}

/// Vendor and base of what is found where these interfaces are.
fn choice(first: (u32, &[u8; 12]), second: (u32, &[u8; 12])) -> (Vendor, u32) {
    let leaves = [first, second].map(|(base, signature)| (base, leaf(base + 4, signature)));
    let Detection::Found(found) = on(&leaves, [0; 4]) else { panic!("nothing found") };
    (found.vendor, found.base)
}

#[test]
fn every_known_signature_is_recognised_at_every_base() {
    let known = [
        (b"ACRNACRNACRN", Vendor::Acrn),
        (b"bhyve bhyve ", Vendor::Bhyve),
        (HYPER_V, Vendor::HyperV),
        (b"Linux KVM Hv", Vendor::HyperV),
        (b"Jailhouse\0\0\0", Vendor::Jailhouse),
        (KVM, Vendor::Kvm),
        (b"prl hyperv  ", Vendor::Parallels),
        (b" lrpepyh  vr", Vendor::Parallels),
        (b"QNXQVMBSQG\0\0", Vendor::Qnx),
        (b" QNXQVMBSQG ", Vendor::Qnx),
        (b"OpenVMIRefHv", Vendor::Reference),
        (b"TCGTCGTCGTCG", Vendor::Tcg),
        (b"VBoxVBoxVBox", Vendor::VirtualBox),
        (b"VMwareVMware", Vendor::VMware),
        (XEN, Vendor::Xen),
        (b"Somebody els", Vendor::Other),
    ];
    for (signature, vendor) in known {
        for base in (FIRST..=0x4000_ff00).step_by(0x100) {
            let highest = base + 5;
            let expected = Hypervisor { vendor, signature: *signature, base, highest };
            let detection = on(&[(base, leaf(highest, signature))], [0; 4]);
            assert_eq!(detection, Detection::Found(expected));
        }
    }
}

#[test]
fn without_the_hypervisor_bit_no_other_leaf_is_read() {
    let detection = detect(|asked, _| match asked {
        1 => [!0, !0, !HYPERVISOR, !0],
        _ => panic!("leaf {asked:#x} read"),
    });
    assert_eq!(detection, Detection::BareMetal);
}

#[test]
fn of_several_interfaces_the_one_that_nobody_imitates_wins() {
    // Xen and KVM in the clothes of Hyper-V, then KVM in those of Xen: a guest is to behave as on Xen.
    assert_eq!(choice((FIRST, HYPER_V), (SECOND, XEN)), (Vendor::Xen, SECOND));
    assert_eq!(choice((FIRST, HYPER_V), (SECOND, KVM)), (Vendor::Kvm, SECOND));
    assert_eq!(choice((FIRST, XEN), (SECOND, KVM)), (Vendor::Xen, FIRST));
    assert_eq!(choice((FIRST, HYPER_V), (SECOND, b"OpenVMIRefHv")), (Vendor::Reference, SECOND));
    // A known interface wins over an unknown one, on either side of it.
    assert_eq!(choice((FIRST, HYPER_V), (SECOND, b"Somebody els")), (Vendor::HyperV, FIRST));
    assert_eq!(choice((FIRST, b"Somebody els"), (SECOND, HYPER_V)), (Vendor::HyperV, SECOND));
}

#[test]
fn nested_the_answer_is_that_of_whoever_executes_the_instruction() {
    // A PV guest of Xen inside KVM: plain CPUID is not trapped by Xen, the emulated one is Xen's.
    for (signature, vendor) in [(KVM, Vendor::Kvm), (XEN, Vendor::Xen)] {
        let detection = on(&[(FIRST, leaf(FIRST + 4, signature))], [0; 4]);
        assert!(matches!(detection, Detection::Found(found) if found.vendor == vendor));
    }
}

#[test]
fn a_highest_leaf_outside_the_interface_is_not_believed() {
    for highest in [0, 1, FIRST - 1, SECOND, 0x4000_ffff, 0x8000_0008, u32::MAX] {
        let liar = (FIRST, leaf(highest, XEN));
        assert_eq!(on(&[liar], [0; 4]), Detection::Unnamed, "{highest:#x}");
    }
    let old_kvm =
        Hypervisor { vendor: Vendor::Kvm, signature: *KVM, base: FIRST, highest: FIRST + 1 };
    assert_eq!(on(&[(FIRST, leaf(0, KVM))], [0; 4]), Detection::Found(old_kvm));
}

#[test]
fn a_signature_that_is_no_text_is_not_believed() {
    for signature in [&[0; 12], &[b' '; 12], &[0xff; 12], b"Xen\0MMXenVMM", b"XenVMM\x1b[2JXe"] {
        let detection = on(&[(FIRST, leaf(FIRST + 1, signature))], [0; 4]);
        assert_eq!(detection, Detection::Unnamed, "{signature:x?}");
    }
}

#[test]
fn leaves_that_read_as_the_highest_basic_one_are_no_interface() {
    assert_eq!(on(&[], [0x0000_0007, 0x0000_0340, 0x0000_0340, 0]), Detection::Unnamed);
    assert_eq!(on(&[], leaf(0x0000_000d, XEN)), Detection::Unnamed);
}

#[test]
fn an_endless_list_of_interfaces_comes_to_an_end() {
    let asked = Cell::new(0);
    let detection = detect(|number, _| {
        asked.set(asked.get() + 1);
        if number == 1 { [!0; 4] } else { leaf(number | 0xff, b"on and on...") }
    });
    assert_eq!(asked.get(), 257);
    assert!(matches!(
        detection,
        Detection::Found(Hypervisor { base: FIRST, highest: 0x4000_00ff, .. })
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_leaves_hold_what_is_found_can_be_relied_on(
        answers in prop::collection::vec((prop::array::uniform4(any::<u32>()), 0..4_u32), 1..8)
    ) {
        // Each leaf is a known signature, text, or noise, with a highest leaf near or far; none is asked twice with the same answer.
        let asked = Cell::new(0);
        let detection = detect(|number, _| {
            asked.set(asked.get() + 1);
            let ([eax, ebx, ecx, edx], kind) = answers[asked.get() % answers.len()];
            match kind {
                _ if number == 1 => [!0; 4],
                0 => leaf(number.wrapping_add(eax & 0x1ff), KVM),
                1 => leaf(eax, XEN),
                2 => [number | eax & 0xff, ebx & 0x7f7f_7f7f, ecx & 0x7f7f_7f7f, edx & 0x7f7f_7f7f],
                _ => [eax, ebx, ecx, edx],
            }
        });
        if let Detection::Found(Hypervisor { vendor, signature, base, highest }) = detection {
            prop_assert!(BASES.contains(&base) && base.is_multiple_of(BASE_STEP));
            prop_assert!((base..base + BASE_STEP).contains(&highest));
            let text = text(&signature);
            prop_assert!(text.iter().all(|byte| matches!(byte, b' '..=b'~')) && !text.is_empty());
            prop_assert_eq!(vendor, Vendor::of(text));
        } else {
            prop_assert_eq!(detection, Detection::Unnamed);
        }
    }
}
