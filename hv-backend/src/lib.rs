//! The VMI calls as hypercalls: the half of the ROM that runs when the machine is not bare.
//!
//! Under a hypervisor an update of a page table or descriptor that traps costs thousands of cycles.
//! VMI lets the ROM collect updates and hand them over together.
//!
//! - [`detect`] tells who is there. It is a pure function over the CPUID instruction, so nested and hostile
//!   hypervisors are tests on the host too. The caller decides how the instruction is executed: a Xen PV guest sees
//!   Xen only through its forced-emulation prefix.
//! - [`Backend`] is the transport to one hypervisor; [`backends!`] makes the closed list from which `vmi_init`
//!   chooses once. [`reference::Reference`] is one, for the hypervisor that the tests run on.
//! - [`Queue`] holds the [updates](Update) of one processor that may wait.

#![no_std]

#[cfg(test)]
extern crate std;

mod backend;
mod queue;
pub mod reference;
mod update;
pub mod xen;

pub use backend::{Backend, Failure, InterruptMask, Reason, Refusal};
pub use queue::{ATTEMPTS, Batch, CHANGED, LinearMapping, Queue, Shown};
pub use update::{Role, Update};
pub use vmi_abi::CallNumber;

use core::ops::Range;

/// Bit of leaf 1's ECX that real processors keep clear and hypervisors set.
const HYPERVISOR: u32 = 1 << 31;

/// Leaves among which interfaces begin, one every [`BASE_STEP`], which is also the most that one may have.
const BASES: Range<u32> = 0x4000_0000..0x4001_0000;
const BASE_STEP: u32 = 0x100;

/// What [`detect`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detection {
    /// No hypervisor, or one that does not want to be seen.
    BareMetal,
    /// A hypervisor, but no interface with a signature and a highest leaf that make sense.
    Unnamed,
    /// A hypervisor's interface.
    Found(Hypervisor),
}

/// An interface that a hypervisor shows in CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hypervisor {
    /// Whose interface it is.
    pub vendor: Vendor,
    /// The signature as it was read from EBX, ECX and EDX.
    pub signature: [u8; 12],
    /// The first leaf of the interface.
    pub base: u32,
    /// The last leaf of the interface; never before `base`, never in the range of the next one.
    pub highest: u32,
}

/// Whose interface it is: known ones, and all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
#[expect(missing_docs, reason = "each is the hypervisor of its name")]
pub enum Vendor {
    Acrn,
    Bhyve,
    /// Microsoft's own, or the imitation of it that KVM and Xen show to Windows guests.
    HyperV,
    Jailhouse,
    Kvm,
    Parallels,
    Qnx,
    /// The hypervisor of [`reference`].
    Reference,
    /// QEMU's translator, without a hypervisor.
    Tcg,
    VirtualBox,
    VMware,
    Xen,
    /// A signature that is not in the list.
    Other,
}

impl Vendor {
    /// The vendor of a signature, without padding: sources disagree on some.
    fn of(text: &[u8]) -> Self {
        match text {
            b"ACRNACRNACRN" => Self::Acrn,
            b"bhyve bhyve" => Self::Bhyve,
            // The second is KVM's, but what follows the signature is laid out as Hyper-V's.
            b"Microsoft Hv" | b"Linux KVM Hv" => Self::HyperV,
            b"Jailhouse" => Self::Jailhouse,
            b"KVMKVMKVM" => Self::Kvm,
            // The second is the first with the bytes of each word reversed.
            b"prl hyperv" | b"lrpepyh  vr" => Self::Parallels,
            b"QNXQVMBSQG" => Self::Qnx,
            b"TCGTCGTCGTCG" => Self::Tcg,
            b"VBoxVBoxVBox" => Self::VirtualBox,
            b"VMwareVMware" => Self::VMware,
            b"XenVMMXenVMM" => Self::Xen,
            _ if text == reference::interface::SIGNATURE => Self::Reference,
            _ => Self::Other,
        }
    }

    /// How much an interface says about who is there: others imitate Hyper-V's in front of their own.
    const fn weight(self) -> u8 {
        match self {
            Self::Other => 0,
            Self::HyperV => 1,
            _ => 2,
        }
    }
}

/// Tells which hypervisor is there, from its CPUID leaves.
///
/// `cpuid` takes leaf and subleaf and answers EAX, EBX, ECX, EDX. It is asked for 257 leaves at most,
/// whatever it answers. Of several interfaces the one that says most about who is there wins, of
/// equal ones the first.
pub fn detect(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Detection {
    let [_, _, features, _] = cpuid(1, 0);
    if features & HYPERVISOR == 0 {
        return Detection::BareMetal;
    }
    BASES
        .step_by(BASE_STEP as usize)
        .filter_map(|base| interface(base, cpuid(base, 0)))
        .reduce(|best, next| if next.vendor.weight() > best.vendor.weight() { next } else { best })
        .map_or(Detection::Unnamed, Detection::Found)
}

/// The interface that begins at a leaf, if the leaf's registers can be the beginning of one.
///
/// A leaf that does not exist may read as any other: processors answer with the highest basic leaf.
fn interface(base: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Option<Hypervisor> {
    let mut signature = [0; 12];
    for (bytes, register) in signature.chunks_exact_mut(4).zip([ebx, ecx, edx]) {
        bytes.copy_from_slice(&register.to_le_bytes());
    }
    let text = text(&signature);
    if text.is_empty() || !text.iter().all(|byte| matches!(byte, b' '..=b'~')) {
        return None;
    }
    let vendor = Vendor::of(text);
    // Old versions of KVM leave EAX zero and have one leaf more.
    let highest = if vendor == Vendor::Kvm && eax == 0 { base + 1 } else { eax };
    let found = Hypervisor { vendor, signature, base, highest };
    (base..base + BASE_STEP).contains(&highest).then_some(found)
}

/// A signature without the NULs and blanks around it.
fn text(signature: &[u8; 12]) -> &[u8] {
    let is_text = |byte: &u8| !matches!(byte, 0 | b' ');
    let start = signature.iter().position(is_text).unwrap_or(0);
    let end = signature.iter().rposition(is_text).map_or(start, |last| last + 1);
    signature.get(start..end).unwrap_or_default()
}

#[cfg(test)]
mod tests;

/// The code of `docs/write-a-backend.md`, as a test.
#[cfg(doctest)]
#[doc = include_str!("../../docs/write-a-backend.md")]
struct WriteABackend;
