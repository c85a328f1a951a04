//! Clocks and alarms.
//!
//! The cycles are those of the time-stamp counter. Xen says in the page that it shares how they become nanoseconds of its system
//! time, in which its timer is set.

use super::interface::{RunState, SharedInfo, VcpuTimeInfo, error, event_channel, hypercall, vcpu};
use super::machine::Machine;
use super::{Unfit, Xen, done};
use core::cell::Cell;
use core::mem::offset_of;
use core::sync::atomic::Ordering::Relaxed;
use vmi_abi::flags::{AlarmFlags, CycleCounter};
use vmi_abi::number;

/// Counters that have an alarm.
const COUNTERS: usize = 2;

/// The vector at which IRQ 0 arrives: of an alarm that is wired to it, since Xen's guests have no interrupt controller to ask.
pub(super) const IRQ_0_VECTOR: u32 = 0x20;

/// The offset of the local APIC's register for the vector of its timer.
const TIMER_VECTOR: u32 = 0x320;

const NANOSECONDS: u64 = 1_000_000_000;

/// What is to come.
#[derive(Clone, Copy, Debug, Default)]
struct Alarm {
    /// In cycles of its counter. 0: none.
    expiry: u64,
    /// 0: once.
    period: u64,
    flags: u32,
    /// Not zero from when it came until the guest's handler runs.
    is_due: u32,
}

/// Alarms, and what else belongs to time.
#[derive(Debug, Default)]
#[repr(C)]
pub(super) struct Alarms {
    /// The port of Xen's timer.
    pub(super) port: Cell<u32>,
    /// What the guest wrote to [`TIMER_VECTOR`].
    vector: Cell<u32>,
    /// The version of the wall clock that the guest has seen.
    wall_clock: Cell<u32>,
    pub(super) run_state: Cell<RunState>,
    /// The cycles in which this processor waited for a real one, and of how many nanoseconds they were made.
    stolen: Cell<u64>,
    stolen_time: Cell<u64>,
    alarms: [Cell<Alarm>; COUNTERS],
}

/// One reading of the page that Xen shares.
#[derive(Clone, Copy, Debug)]
struct Scale {
    stamp: u64,
    system_time: u64,
    multiplier: u32,
    shift: i8,
}

impl Scale {
    /// Nanoseconds of so many cycles.
    const fn nanoseconds(self, cycles: u64) -> u64 {
        let cycles = if self.shift < 0 {
            cycles >> self.shift.unsigned_abs()
        } else {
            cycles << self.shift.unsigned_abs()
        };
        let multiplier = self.multiplier as u64;
        ((cycles >> 32).wrapping_mul(multiplier))
            .wrapping_add(((cycles & 0xffff_ffff) * multiplier) >> 32)
    }

    /// Cycles of less than four seconds.
    const fn cycles_of_less(self, nanoseconds: u64) -> u64 {
        // Xen's multiplier is not 0.
        let Some(cycles) = (nanoseconds << 32).checked_div(self.multiplier as u64) else {
            return 0;
        };
        if self.shift < 0 {
            cycles << self.shift.unsigned_abs()
        } else {
            cycles >> self.shift.unsigned_abs()
        }
    }

    /// The system time at a reading of the counter.
    const fn system_time_at(self, stamp: u64) -> u64 {
        if stamp >= self.stamp {
            self.system_time.wrapping_add(self.nanoseconds(stamp - self.stamp))
        } else {
            self.system_time.saturating_sub(self.nanoseconds(self.stamp - stamp))
        }
    }
}

const fn long([low, high]: [u32; 2]) -> u64 {
    (high as u64) << 32 | low as u64
}

impl Xen {
    /// Binds Xen's timer, and stops its periodic one, which nobody asked for.
    #[inline(never)]
    pub(super) fn start_time(&self, machine: &impl Machine) -> Result<(), Unfit> {
        done(machine.hypercall(hypercall::VCPU_OP, [vcpu::STOP_PERIODIC_TIMER, 0, 0, 0]))?;
        let here = self.frames.own.get() + offset_of!(Self, alarms) as u32;
        let mut place = [here + offset_of!(Alarms, run_state) as u32, 0];
        done(machine.operate(hypercall::VCPU_OP, vcpu::REGISTER_RUNSTATE, &mut place))?;
        let mut binding = [event_channel::VIRQ_TIMER, 0, 0];
        done(machine.operate(hypercall::EVENT_CHANNEL_OP, event_channel::BIND_VIRQ, &mut binding))?;
        let [.., port] = binding;
        self.alarms.port.set(port);
        done(machine.operate(hypercall::EVENT_CHANNEL_OP, event_channel::UNMASK, &mut [port]))
    }

    #[inline(never)]
    fn scale(&self) -> Scale {
        let word =
            |offset: usize| self.shared.time.get(offset / 4).map_or(0, |word| word.load(Relaxed));
        let pair = |offset| long([word(offset), word(offset + 4)]);
        loop {
            let version = word(offset_of!(VcpuTimeInfo, version));
            core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
            let shift = word(offset_of!(VcpuTimeInfo, tsc_shift)) as u8;
            let scale = Scale {
                stamp: pair(offset_of!(VcpuTimeInfo, tsc_timestamp)),
                system_time: pair(offset_of!(VcpuTimeInfo, system_time)),
                multiplier: word(offset_of!(VcpuTimeInfo, tsc_to_system_mul)),
                shift: shift.cast_signed(),
            };
            core::sync::atomic::fence(core::sync::atomic::Ordering::Acquire);
            if version & 1 == 0 && version == word(offset_of!(VcpuTimeInfo, version)) {
                return scale;
            }
        }
    }

    /// GetCycleFrequency.
    pub fn frequency(&self) -> u64 {
        self.scale().cycles_of_less(NANOSECONDS)
    }

    /// GetCycleCounter.
    pub fn counter(&self, machine: &impl Machine, counter: u32) -> u64 {
        match CycleCounter(counter) {
            CycleCounter::REAL => machine.time_stamp(),
            CycleCounter::AVAILABLE => machine.time_stamp().wrapping_sub(self.stolen()),
            CycleCounter::STOLEN => self.stolen(),
            _ => 0,
        }
    }

    /// Cycles in which this processor waited for a real one.
    fn stolen(&self) -> u64 {
        let [_, waiting, _, off_line] = self.alarms.run_state.get().time;
        let time = long(waiting).wrapping_add(long(off_line));
        loop {
            let more = time.saturating_sub(self.alarms.stolen_time.get()).min(NANOSECONDS);
            if more == 0 {
                return self.alarms.stolen.get();
            }
            let cycles = self.scale().cycles_of_less(more);
            self.alarms.stolen.set(self.alarms.stolen.get().wrapping_add(cycles));
            self.alarms.stolen_time.set(self.alarms.stolen_time.get() + more);
        }
    }

    /// SetAlarm. A counter without alarms has none.
    pub fn set_alarm(&self, machine: &impl Machine, flags: u32, expiry: u64, period: u64) {
        let counter = flags & AlarmFlags::COUNTER_MASK;
        let Some(place) = self.alarms.alarms.get(counter as usize) else { return };
        let repeats = flags & AlarmFlags::PERIODIC.bits() != 0;
        let period = if repeats { period } else { 0 };
        // 0 says that there is none; the time for it is over all the same.
        place.set(Alarm { expiry: expiry.max(1), period, flags, is_due: 0 });
        self.set_timer(machine);
    }

    /// CancelAlarm.
    pub fn cancel_alarm(&self, machine: &impl Machine, flags: u32) -> u32 {
        let counter = flags & AlarmFlags::COUNTER_MASK;
        let Some(place) = self.alarms.alarms.get(counter as usize) else { return 0 };
        let was_armed = place.replace(Alarm::default()).expiry != 0;
        self.set_timer(machine);
        was_armed.into()
    }

    /// When an alarm comes, in system time; never 0. What is stolen from now on makes one of available cycles later: then it is set
    /// anew.
    fn time_of(&self, scale: Scale, alarm: &Alarm) -> u64 {
        let counter = CycleCounter(alarm.flags & AlarmFlags::COUNTER_MASK);
        let later = if counter == CycleCounter::AVAILABLE { self.stolen() } else { 0 };
        scale.system_time_at(alarm.expiry.saturating_add(later)).max(1)
    }

    /// Sets Xen's timer for the next alarm, or stops it.
    fn set_timer(&self, machine: &impl Machine) {
        let scale = self.scale();
        let armed = self.alarms.alarms.iter().map(Cell::get).filter(|alarm| alarm.expiry != 0);
        let next = armed.map(|alarm| self.time_of(scale, &alarm)).min().unwrap_or(0);
        let halves = [next as u32, (next >> 32) as u32, 0, 0];
        let status = machine.hypercall(hypercall::SET_TIMER_OP, halves);
        // Xen says so of a time that is over, and makes the event at once.
        if status != error::ETIME {
            self.expect(machine, number::SetAlarm, 0, status);
        }
    }

    /// Xen's timer came: notes which alarms are due, and sets it for the next.
    pub(super) fn expire(&self, machine: &impl Machine) {
        for place in &self.alarms.alarms {
            let mut alarm = place.get();
            if alarm.expiry == 0 {
                continue;
            }
            // In the units of Xen's timer, for that is not to seem early.
            let scale = self.scale();
            if scale.system_time_at(machine.time_stamp()) < self.time_of(scale, &alarm) {
                continue;
            }
            let now = self.counter(machine, alarm.flags & AlarmFlags::COUNTER_MASK);
            alarm.is_due = 1;
            // Those that were missed are one.
            alarm.expiry = match now.saturating_sub(alarm.expiry).checked_div(alarm.period) {
                Some(missed) => alarm.expiry + (missed + 1) * alarm.period,
                None => 0,
            };
            place.set(alarm);
        }
        self.set_timer(machine);
    }

    /// The vector of an alarm that is due, once, and whether another one is.
    pub(super) fn due(&self) -> Option<(u32, bool)> {
        let mut due = self.alarms.alarms.iter().filter(|alarm| alarm.get().is_due != 0);
        let place = due.next()?;
        let alarm = place.get();
        place.set(Alarm { is_due: 0, ..alarm });
        let is_wired = alarm.flags & AlarmFlags::WIRED_LVTT.bits() != 0;
        let vector = if is_wired { self.alarms.vector.get() & 0xff } else { IRQ_0_VECTOR };
        Some((vector, due.next().is_some()))
    }

    /// APICWrite, as far as alarms need it: the vector of the timer.
    pub fn write_apic(&self, machine: &impl Machine, register: u32, value: u32) {
        self.flush(machine);
        if register & 0xfff == TIMER_VECTOR {
            self.alarms.vector.set(value);
        }
    }

    /// APICRead, as far as alarms need it.
    pub fn read_apic(&self, register: u32) -> u32 {
        if register & 0xfff == TIMER_VECTOR { self.alarms.vector.get() } else { 0 }
    }

    /// GetWallclockTime.
    pub fn wall_clock(&self, machine: &impl Machine) -> u64 {
        let word = |offset| machine.load(self.frames.shared_info.get().wrapping_add(offset as u32));
        let start = loop {
            let version = word(offset_of!(SharedInfo, wc_version));
            let seconds = long([
                word(offset_of!(SharedInfo, wc_sec)),
                word(offset_of!(SharedInfo, wc_sec_hi)),
            ]);
            let nanoseconds = word(offset_of!(SharedInfo, wc_nsec));
            if version & 1 == 0 && version == word(offset_of!(SharedInfo, wc_version)) {
                break seconds.wrapping_mul(NANOSECONDS).wrapping_add(nanoseconds.into());
            }
        };
        start.wrapping_add(self.scale().system_time_at(machine.time_stamp()))
    }

    /// WallclockUpdated: whether it was set since it was asked last.
    pub fn wall_clock_updated(&self, machine: &impl Machine) -> u32 {
        let there = self.frames.shared_info.get() + offset_of!(SharedInfo, wc_version) as u32;
        let version = machine.load(there);
        let old = self.alarms.wall_clock.replace(version);
        (old != version && old != 0).into()
    }
}
