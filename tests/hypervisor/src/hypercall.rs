//! What a guest asks for with VMMCALL, checked and done: `docs/reference-hypervisor.md`.

#[cfg(test)]
mod tests;

use crate::memory::{FRAME, Memory, Place};
use crate::shadow::Shadow;
use crate::walk::{Level, Mode, PRESENT, Registers, find};
use core::mem::size_of;
use vmi_abi::number;
use vmi_hv_backend::reference::interface::{Counters, Hypercall, PHYSICAL, SHOWN_BYTES, Status};
use vmi_hv_backend::{CallNumber, Update};

/// The most bytes of the text of [`Hypercall::Stop`].
pub const TEXT_LIMIT: u32 = 1024;

/// Page faults that reach the guest without an exit.
///
/// That begins at the end of a batch which leaves nothing waiting in the guest: then the shadow has all that the guest's tables have. It ends
/// whenever somebody is not sure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quiet {
    /// The guest-physical address of the map that the guest wants to have, once it has asked.
    map: Option<u32>,
    /// Whether the map has something set.
    is_shown: bool,
    /// Whether page faults are quiet now.
    pub now: bool,
}

impl Quiet {
    /// Whether updates lie in the memory that has the map: only what waits in the queue does, all of it.
    const fn has_all(&self, updates: u32) -> bool {
        matches!(self.map, Some(map) if map / FRAME as u32 == updates / FRAME as u32)
    }
}

/// What a hypercall is carried out on.
#[derive(Debug)]
pub struct Machine<'a, 'pool, M, H> {
    /// The shadow page tables. None with nested paging: the caller then flushes the TLB behind each [`Machine::call`].
    pub shadow: Option<&'a mut Shadow<'pool>>,
    /// The guest's registers. CR3 may change; the shadow is told of it here, the processor is not.
    pub registers: &'a mut Registers,
    /// The guest's memory.
    pub memory: &'a M,
    /// Whether a guest-physical frame number is the hypervisor's.
    pub is_hidden: H,
    /// The most updates of one hypercall.
    pub limit: u32,
    /// What the guest may read; updates and refusals are counted here.
    pub counters: &'a mut Counters,
    /// None where page faults are never quiet.
    pub quiet: Option<&'a mut Quiet>,
}

/// A hypercall's registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The number.
    pub eax: u32,
    /// The first argument.
    pub ebx: u32,
    /// The second argument.
    pub ecx: u32,
    /// The ring that it was made in.
    pub cpl: u8,
}

/// What has to be done about a hypercall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest goes on behind VMMCALL, with these in EAX and EDX.
    Return(Status, u32),
    /// The guest ends with a text, all of it readable with [`Memory::read`].
    Stop {
        /// Guest-physical address.
        address: u32,
        /// Bytes.
        bytes: u32,
    },
}

impl<M: Memory, H: Fn(u64) -> bool> Machine<'_, '_, M, H> {
    /// Carries out a hypercall.
    #[must_use]
    pub fn call(&mut self, call: Call) -> Outcome {
        let Call { eax, ebx, ecx, cpl } = call;
        if cpl != 0 {
            return Outcome::Return(Status::NotPrivileged, 0);
        }
        match Hypercall::of(eax) {
            None => Outcome::Return(Status::UnknownHypercall, 0),
            Some(Hypercall::Apply) => {
                let (status, applied) = self.apply_array(ebx, ecx);
                self.settle(ebx, status);
                Outcome::Return(status, applied)
            }
            Some(Hypercall::BeQuiet) => Outcome::Return(self.be_quiet(ebx, ecx), 0),
            Some(Hypercall::Reconsider) => Outcome::Return(self.reconsider(ebx), 0),
            Some(Hypercall::ReadCounters) => {
                let (status, written) = self.read_counters(ebx, ecx);
                Outcome::Return(status, written)
            }
            Some(Hypercall::Stop) if ecx > TEXT_LIMIT => Outcome::Return(Status::TooLong, 0),
            Some(Hypercall::Stop) if !self.has(ebx, ecx, 1, is_readable) => {
                Outcome::Return(Status::BadBuffer, 0)
            }
            Some(Hypercall::Stop) => Outcome::Stop { address: ebx, bytes: ecx },
        }
    }

    fn be_quiet(&mut self, address: u32, bytes: u32) -> Status {
        let is_good = bytes == SHOWN_BYTES
            && address % FRAME as u32 <= FRAME as u32 - SHOWN_BYTES
            && self.has(address, bytes, 4, is_writable);
        match &mut self.quiet {
            None => Status::UnknownHypercall,
            Some(_) if bytes == 0 => {
                self.be_loud();
                self.quiet.as_deref_mut().map(core::mem::take);
                if let Some(shadow) = &mut self.shadow {
                    shadow.disown();
                }
                Status::Done
            }
            Some(_) if !is_good => Status::BadBuffer,
            Some(quiet) => {
                **quiet = Quiet { map: Some(address), is_shown: true, now: false };
                self.show_map();
                if let Some(shadow) = &mut self.shadow {
                    shadow.adopt(self.registers, self.memory);
                }
                Status::Done
            }
        }
    }

    fn reconsider(&mut self, linear: u32) -> Status {
        if self.quiet.is_none() {
            return Status::UnknownHypercall;
        }
        self.be_loud();
        if let Some(shadow) = &mut self.shadow {
            shadow.invalidate_page(self.registers, self.memory, linear);
        }
        Status::Done
    }

    /// Page faults are reported until a batch ends that has all.
    fn be_loud(&mut self) {
        if let Some(quiet) = &mut self.quiet {
            quiet.now = false;
        }
        self.show_map();
    }

    /// Decides behind a batch whether page faults are quiet. After a refusal something may still wait.
    pub(crate) fn settle(&mut self, updates: u32, status: Status) {
        let (Some(quiet), Some(shadow)) = (&mut self.quiet, &mut self.shadow) else { return };
        quiet.now = quiet.has_all(updates)
            && status == Status::Done
            && self.counters.refusals == 0
            && shadow.complete(self.registers, self.memory);
        self.show_map();
    }

    /// Stores the map, clear where page faults are not quiet.
    fn show_map(&mut self) {
        let (Some(quiet), Some(shadow)) = (&mut self.quiet, &self.shadow) else { return };
        let Some(address) = quiet.map.filter(|_| quiet.now || quiet.is_shown) else { return };
        quiet.is_shown = quiet.now;
        let mut words = [0; SHOWN_BYTES as usize / 4];
        if quiet.now {
            let directories = Shadow::directories(self.registers, self.memory);
            let shown = shadow.map().chain(directories);
            words.iter_mut().zip(shown).for_each(|(word, value)| *word = value);
        }
        for (address, word) in (u64::from(address)..).step_by(4).zip(words) {
            // What was memory when the guest asked is memory.
            let _ = self.store(address, 4, word.into());
        }
    }

    /// Applies updates in their order until one is refused. Tells why, and how many were applied.
    pub fn apply(&mut self, updates: impl IntoIterator<Item = Update>) -> (Status, u32) {
        let mut applied = 0;
        for update in updates {
            if let Err(status) = self.apply_one(&update) {
                self.counters.refusals += 1;
                return (status, applied);
            }
            self.counters.updates += 1;
            applied += 1;
        }
        (Status::Done, applied)
    }

    fn apply_array(&mut self, address: u32, count: u32) -> (Status, u32) {
        if count > self.limit {
            return (Status::TooLong, 0);
        }
        let bytes = count.saturating_mul(size_of::<Update>() as u32);
        if !self.has(address, bytes, 4, is_readable) {
            return (Status::BadBuffer, 0);
        }
        // An update may change the array itself, so each is read at its turn.
        let memory = self.memory;
        self.apply((0..count).map(|i| {
            let update = u64::from(address) + u64::from(i) * size_of::<Update>() as u64;
            let [call, address, low, high, flags] =
                [0, 4, 8, 12, 16].map(|field| memory.read(update + field, 4).unwrap_or(0) as u32);
            Update { call: CallNumber(call), address, low, high, flags }
        }))
    }

    fn read_counters(&mut self, address: u32, bytes: u32) -> (Status, u32) {
        let fitting = bytes.min(size_of::<Counters>() as u32) & !7;
        if !self.has(address, fitting, 8, is_writable) {
            return (Status::BadBuffer, 0);
        }
        if let Some(shadow) = &self.shadow {
            self.counters.shadowed = shadow.shadowed;
        }
        let values = self.counters.values();
        for (i, value) in values.into_iter().take(fitting as usize / 8).enumerate() {
            // What was memory a moment ago is memory.
            let _ = self.store(u64::from(address) + i as u64 * 8, 8, value);
        }
        (Status::Done, fitting)
    }

    /// Whether a range of guest-physical memory is aligned, below 4 GiB, and of a kind.
    fn has(&self, address: u32, bytes: u32, alignment: u32, kind: impl Fn(Place) -> bool) -> bool {
        let (start, end) = (u64::from(address), u64::from(address) + u64::from(bytes));
        let mut frames = start / FRAME..end.div_ceil(FRAME);
        let is_there = bytes == 0 || frames.all(|frame| kind(self.memory.place(frame)));
        address.is_multiple_of(alignment) && end <= 1 << 32 && is_there
    }

    fn apply_one(&mut self, update: &Update) -> Result<(), Status> {
        let &Update { address, low, high, flags, .. } = update;
        match update.call {
            number::SetPxE => self.set_entry(address, 4, low.into()),
            number::SetPxELong => {
                self.set_entry(address, 8, u64::from(high) << 32 | u64::from(low))
            }
            number::UpdatePxE => self.entry_changed(address, 4, flags),
            number::UpdatePxELong => self.entry_changed(address, 8, flags),
            number::AllocatePage | number::ReleasePage => {
                if !is_readable(self.memory.place(address.into())) {
                    return Err(Status::BadAddress);
                }
                let frame = u64::from(address);
                match &mut self.shadow {
                    Some(shadow) if update.call == number::AllocatePage => {
                        shadow.announce(frame);
                        // It may have been one before, without an end.
                        shadow.written(self.registers, self.memory, frame * FRAME, FRAME as usize);
                    }
                    Some(shadow) => shadow.release(frame),
                    None => {}
                }
                Ok(())
            }
            number::InvalPage => {
                if let Some(shadow) = &mut self.shadow {
                    shadow.invalidate_page(self.registers, self.memory, address);
                }
                Ok(())
            }
            number::FlushTLB => {
                // Global pages go with the others: that is allowed, and `flags` may ask for it.
                let _ = flags;
                if let Some(shadow) = &mut self.shadow {
                    shadow.flush();
                }
                Ok(())
            }
            number::SetCR3 => {
                let loaded = Registers { cr3: low, ..*self.registers };
                if !is_readable(self.memory.place(loaded.root() / FRAME)) {
                    return Err(Status::BadValue);
                }
                *self.registers = loaded;
                if let Some(shadow) = &mut self.shadow {
                    shadow.load(self.registers, self.memory);
                }
                Ok(())
            }
            _ => Err(Status::BadCall),
        }
    }

    /// The guest-physical address of an entry in the guest's memory, looked up as things are now.
    fn entry(&self, linear: u32, size: u32) -> Result<u64, Status> {
        if !linear.is_multiple_of(size) {
            return Err(Status::BadAddress);
        }
        let found = find(self.registers, self.memory, linear).map_err(|_| Status::BadAddress)?;
        self.readable(found.physical, size)
    }

    /// A guest-physical address, if an entry can be there.
    fn readable(&self, physical: u64, size: u32) -> Result<u64, Status> {
        let is_one = physical.is_multiple_of(size.into())
            && is_readable(self.memory.place(physical / FRAME));
        if is_one { Ok(physical) } else { Err(Status::BadAddress) }
    }

    fn set_entry(&mut self, linear: u32, size: u32, value: u64) -> Result<(), Status> {
        let physical = self.entry(linear, size)?;
        if !is_writable(self.memory.place(physical / FRAME)) {
            return Err(Status::BadAddress);
        }
        if !self.may_hold(physical, size, value) {
            return Err(Status::BadValue);
        }
        self.store(physical, size as usize, value)
    }

    fn entry_changed(&mut self, address: u32, size: u32, flags: u32) -> Result<(), Status> {
        let physical = if flags & PHYSICAL == 0 {
            self.entry(address, size)?
        } else {
            self.readable(address.into(), size)?
        };
        if let Some(shadow) = &mut self.shadow {
            shadow.written(self.registers, self.memory, physical, size as usize);
        }
        Ok(())
    }

    fn store(&mut self, physical: u64, size: usize, value: u64) -> Result<(), Status> {
        if !self.memory.write(physical, size, value) {
            return Err(Status::BadAddress);
        }
        if let Some(shadow) = &mut self.shadow {
            shadow.written(self.registers, self.memory, physical, size);
        }
        Ok(())
    }

    /// Whether a page table may hold a value there: at each level that the guest uses the table at, or, where it is announced
    /// and not in use yet, as an entry that maps a page of 4 KiB.
    fn may_hold(&self, physical: u64, size: u32, value: u64) -> bool {
        let Some(shadow) = &self.shadow else { return true };
        let (frame, mode) = (physical / FRAME, self.registers.mode());
        let pointers = self.registers.root();
        let holds_pointers = self.registers.has_paging()
            && mode.pae
            && (pointers..pointers + 32).contains(&physical);
        let mut uses =
            shadow.uses(frame).chain(holds_pointers.then_some((Level::Pointers, mode))).peekable();
        let unused = uses.peek().is_none() && shadow.is_announced(frame);
        uses.chain(unused.then_some((Level::Table, mode)))
            .all(|(level, mode)| self.may_hold_as(level, mode, physical, size, value))
    }

    fn may_hold_as(&self, level: Level, mode: Mode, physical: u64, size: u32, value: u64) -> bool {
        let is_good = |entry: u64| {
            entry & PRESENT == 0
                || !mode.has_reserved(level, entry) && {
                    let first = mode.frame(level, entry);
                    !(first..first + mode.frames(level, entry)).any(&self.is_hidden)
                }
        };
        match (mode.entry_size(), size) {
            (8, 4) => {
                // Half an entry: the other half stays.
                let old = mode.read(self.memory, physical & !7);
                let shift = physical % 8 * 8;
                is_good(old & !(0xffff_ffff << shift) | value << shift)
            }
            (4, 8) => is_good(value & 0xffff_ffff) && is_good(value >> 32),
            _ => is_good(value),
        }
    }
}

/// What a hypercall may read.
fn is_readable(place: Place) -> bool {
    matches!(place, Place::Memory(_) | Place::ReadOnly(_))
}

/// What a hypercall may write.
fn is_writable(place: Place) -> bool {
    matches!(place, Place::Memory(_))
}
