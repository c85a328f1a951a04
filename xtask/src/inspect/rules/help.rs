//! Why each rule matters and how to mend what breaks it, for those who get a verdict and not our sources.

use super::Rule;

impl Rule {
    /// What goes wrong on a real machine when it is broken.
    #[must_use]
    pub const fn reason(self) -> &'static str {
        match self {
            Self::Length => {
                "The firmware copies and sums as many bytes as the length byte says; a wrong one takes foreign \
                 bytes for code or cuts code off."
            }
            Self::Signature => {
                "Firmware and guests scan memory for these signatures and pass over everything else."
            }
            Self::Checksum => "The firmware ignores an option ROM whose bytes do not add up to 0.",
            Self::Revision => {
                "A guest matches the major revision exactly and passes over a ROM of another one."
            }
            Self::License => "Linux uses a ROM only with a licence string that it knows.",
            Self::PciHeader => {
                "Linux refuses a ROM without this structure; firmware takes the image's length from it."
            }
            Self::PnpHeader => {
                "Firmware ignores a broken structure and may then not run the 16-bit entry in time; Linux prints its strings."
            }
            Self::VirtualTop => {
                "A hole that starts too low collides with the memory that the kernel maps on machines with 896 MB or more."
            }
            Self::PostEntry => {
                "The BIOS calls offset 3 with a far call at start-up; what is no code there stops the machine."
            }
            Self::Init => {
                "The guest calls vmi_init first; a failure disables the ROM, a lost register corrupts the kernel's start."
            }
            Self::GetReloc => {
                "Linux asks several thousand times during a boot, in the middle of its own code."
            }
            Self::Answer => {
                "A guest binds whatever is answered: an answer that it cannot live with is a crash at the first use."
            }
            Self::Constancy => {
                "Linux asks again for every call site and every module; another answer leaves sites that disagree."
            }
            Self::Group => {
                "A guest that finds the first call of a group answered uses all of them, and calls what is not there."
            }
            Self::Register => {
                "At a patched site the compiler keeps values in every register; a lost one corrupts whatever ran there."
            }
            Self::Flags => {
                "A wrong interrupt flag hangs the guest or lets an interrupt in where none may come; other flags belong to the caller."
            }
            Self::StackBalance => {
                "The caller takes the next word of its stack for something else and returns to a wild address."
            }
            Self::StackUse => {
                "The stack is the guest's and small; an interrupt writes below ESP at any time."
            }
            Self::Ending => {
                "A transfer that returns, or a function that does not, leaves the guest where it has no code to go on."
            }
            Self::ImageStore => {
                "After start-up the firmware write-protects the ROM: the store is dropped silently, or faults."
            }
            Self::Memory => {
                "Other memory belongs to the guest, and nobody promised that it is mapped."
            }
            Self::Segment => {
                "In these calls DS, ES, FS and GS may hold a program's segments: the access faults or goes astray."
            }
            Self::Vector => {
                "No guest saves x87, MMX or SSE state around a call: a program's registers are corrupted."
            }
            Self::Code => "The processor executes what lies there: data, or nothing at all.",
            Self::Base => {
                "The ROM runs at its physical address, at a linear alias and in a copy: an absolute address is wrong in all but one."
            }
            Self::Effect => "The guest believes that the call has done what it is for.",
            Self::Site => {
                "Other text is the kernel's own; another processor may execute the site, or an interrupt come, at any moment."
            }
            Self::Slot => {
                "A guest of 13.x enters every slot without asking, and may write over its neighbour: what is not in the \
                 call's own slot is then another call, or nothing."
            }
            Self::Copy => {
                "Guests of 13.0 copy the first 4 KiB of the ROM to memory of their own and run the copy: what lies \
                 behind is not there."
            }
            Self::Undecided => {
                "A part of the contract is not known to be kept. It is said here so that nobody takes silence for a pass."
            }
        }
    }

    /// How to mend it.
    #[must_use]
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::Length => {
                "Pad the image to a multiple of 512 bytes and set the byte at offset 2 to that many units."
            }
            Self::Signature => "Put 55 AA at offset 0 and cVmi at offset 8.",
            Self::Checksum => {
                "Recompute the last byte so that all bytes add up to 0 modulo 256, as the last step of the build."
            }
            Self::Revision => "Set the bytes at offsets 12 and 13 to the revision that is served.",
            Self::License => {
                "Let offset 22 point to GPL or GPL v2 with a NUL behind it, if that is the licence."
            }
            Self::PciHeader => {
                "Let offset 24 point to a PCIR structure of 24 bytes with the same length as the header."
            }
            Self::PnpHeader => {
                "Let offset 26 point to a $PnP structure whose bytes add up to 0, or make it 0."
            }
            Self::VirtualTop => {
                "Reserve nothing (0), or less, so that the field is F8800000h or higher."
            }
            Self::PostEntry => {
                "Put 16-bit code there: a far return, or a jump to an entry that ends in one."
            }
            Self::Init => "Return 0 in EAX and keep EBX, EBP, ESI, EDI, the segments and EFLAGS.",
            Self::GetReloc => {
                "Compare the number with the table's end, answer NONE beyond it, and change only EAX, EDX, ECX and flags."
            }
            Self::Answer => {
                "Answer one of the types that the call's row allows; where there is no honest code, NONE."
            }
            Self::Constancy => {
                "Compute the answer from the number and the place of the code alone."
            }
            Self::Group => "Answer all calls of the group, or NONE to all of them.",
            Self::Register => {
                "Save and restore the register, or do without it; calls 29 to 32 change nothing but flags and a result."
            }
            Self::Flags => {
                "Set the interrupt flag to what the call is for, and save and restore all other flags of the system."
            }
            Self::StackBalance => "Pop what was pushed, and end in a plain RET: the caller pops.",
            Self::StackUse => {
                "Move ESP before storing, keep buffers small, write only what was pushed."
            }
            Self::Ending => {
                "End in RET, IRET, SYSEXIT or a wait, as the call asks; IRET reached by a call drops the return address first."
            }
            Self::ImageStore => {
                "Keep state in memory of the guest's or of the hypervisor, never in the image."
            }
            Self::Memory => "Touch only the stack, the image and what the arguments point to.",
            Self::Segment => "Override with SS: or CS:, or use the stack through ESP and EBP.",
            Self::Vector => {
                "Compile with these units disabled, and use general registers in assembly."
            }
            Self::Code => "Mend the branch, or pad with code that cannot be reached.",
            Self::Base => {
                "Compute addresses from where the code runs (call to the next instruction, pop), each time."
            }
            Self::Effect => {
                "Do it, or answer NONE, so that the guest keeps its own code; a slot of 13.x must do it."
            }
            Self::Site => {
                "Compare the bytes in the page of the return address; with interrupts off and CR0.WP clear, change \
                 one aligned word of 8 bytes by LOCK CMPXCHG8B; put CR0 back. Otherwise leave the site alone."
            }
            Self::Slot => {
                "Put code of at most 32 bytes that ends in RET into the slot, or a jump to free slots behind the last call."
            }
            Self::Copy => {
                "Keep code and tables of the slots within the first 4 KiB, and reach them relative to where the code runs."
            }
            Self::Undecided => {
                "Review this code by hand; simpler code that the inspector can follow is decided by itself."
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_is_explained_in_sentences() {
        for rule in Rule::ALL {
            for text in [rule.meaning(), rule.reason(), rule.remedy()] {
                assert!(text.ends_with('.') && !text.contains("  "), "{rule}: {text}");
            }
        }
    }
}
