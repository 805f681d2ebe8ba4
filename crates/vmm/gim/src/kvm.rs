//! KVM's interface (Linux `Documentation/virt/kvm/x86/{cpuid,msr,hypercalls}.rst`).
//!
//! Offered: the per-vCPU clock, the wall clock, the kick that ends another vCPU's HLT (spin locks), the time that others had a vCPU's CPU
//! ("steal time"), and ends of interrupts by a bit in memory. Where the host's KVM runs the guest and has the local APICs, it sees to kick,
//! steal time and ends of interrupts, and the registers here are their saved state. Left out, and not announced: asynchronous page faults, calls
//! for TLB flushes and inter-processor interrupts; their registers fault.
//!
//! The clock's record says that time is 0 where the vCPU's counter stands at its offset from the VM-wide one, and how many nanoseconds a tick
//! has: a formula that holds from power-on to power-off and is the same on all vCPUs.

use cpum::CpuState;
use cpum::cpuid::Entry;
use cpum::state::gpr;
use ssm::{Error, Reader, Writer};
use tm::Nanos;
use vbox_types::Hz;

use crate::{Effect, HYPERVISOR, KvmFeatures, Setup, leaf, signature};

/// Bits of leaf 0x40000001 EAX.
mod feature {
    pub(super) const CLOCK: u32 = 1 << 0;
    /// Port 0x80 need not be written to wait.
    pub(super) const NOP_IO_DELAY: u32 = 1 << 1;
    pub(super) const CLOCK_NEW: u32 = 1 << 3;
    pub(super) const STEAL_TIME: u32 = 1 << 5;
    pub(super) const PV_EOI: u32 = 1 << 6;
    pub(super) const PV_UNHALT: u32 = 1 << 7;
    /// The clock's records say so where all vCPUs' clocks agree.
    pub(super) const CLOCK_STABLE: u32 = 1 << 24;
}

mod msr {
    pub(super) const WALL_CLOCK_OLD: u32 = 0x11;
    pub(super) const SYSTEM_TIME_OLD: u32 = 0x12;
    pub(super) const WALL_CLOCK: u32 = 0x4b56_4d00;
    pub(super) const SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub(super) const STEAL_TIME: u32 = 0x4b56_4d03;
    pub(super) const PV_EOI: u32 = 0x4b56_4d04;
}

/// Numbers of hypercalls, and their errors.
mod call {
    /// Polls for interrupts, which are taken at once here.
    pub(super) const POLL_IRQ: u64 = 1;
    pub(super) const KICK_CPU: u64 = 5;
    pub(super) const NOT_PERMITTED: i64 = -1;
    pub(super) const UNKNOWN: i64 = -1000;
}

/// SYSTEM_TIME, STEAL_TIME, PV_EOI: the record is kept up to date.
const ENABLED: u64 = 1;
/// Bits of STEAL_TIME and PV_EOI that are not part of the record's address.
const STEAL_LOW: u64 = 0x3f;
const PV_EOI_LOW: u64 = 3;
/// A vCPU's stolen time is not told more often.
const TELL_STOLEN: Nanos = 5_000_000;
/// Flag in the record: all vCPUs' clocks agree.
const STABLE: u8 = 1;
const NANOS_PER_SECOND: u64 = 1_000_000_000;

pub(crate) fn leaves(setup: &Setup) -> Vec<Entry> {
    use feature::*;
    let KvmFeatures { kick, end_of_interrupt, steal_time } = setup.kvm;
    let features = [
        (true, CLOCK | NOP_IO_DELAY | CLOCK_NEW),
        (steal_time, STEAL_TIME),
        (end_of_interrupt, PV_EOI),
        (kick, PV_UNHALT),
        (setup.stable_counter, CLOCK_STABLE),
    ];
    let features = features.iter().filter(|(has, _)| *has).fold(0, |all, (_, bits)| all | bits);
    vec![signature(HYPERVISOR, HYPERVISOR + 1, b"KVMKVMKVM\0\0\0"), leaf(HYPERVISOR + 1, features, 0, 0, 0)]
}

#[derive(Clone, Default)]
struct Vcpu {
    /// The SYSTEM_TIME register.
    system_time: u64,
    /// Version of the record written last.
    version: u32,
    /// The STEAL_TIME register and its record: version, time told, and when.
    steal_time: u64,
    stolen_version: u32,
    stolen: u64,
    told: Nanos,
    /// What the thread had waited when the time told was last added to. Not state: another process goes on from its own.
    waited: Option<u64>,
    /// The PV_EOI register.
    pv_eoi: u64,
}

pub(crate) struct State {
    /// The WALL_CLOCK register, one for the VM.
    wall_clock: u64,
    wall_version: u32,
    vcpus: Vec<Vcpu>,
    /// Fixed: what is offered.
    features: KvmFeatures,
}

/// How guests turn ticks into nanoseconds: `(ticks << shift) * multiplier >> 32`, with a right shift for negative ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    pub(crate) multiplier: u32,
    pub(crate) shift: i8,
}

impl Scale {
    /// The scale with all 32 bits of the multiplier in use.
    pub(crate) fn new(frequency: Hz) -> Self {
        let mut rate = u128::from(frequency.0.max(1));
        let mut shift = 0;
        while rate > 2 * u128::from(NANOS_PER_SECOND) {
            rate /= 2;
            shift -= 1;
        }
        while rate <= u128::from(NANOS_PER_SECOND) {
            rate *= 2;
            shift += 1;
        }
        // Computed from the exact frequency, not from the halved one.
        let ticks = u128::from(frequency.0.max(1));
        let numerator = u128::from(NANOS_PER_SECOND) << (32 + i32::from(-shift.min(0)));
        let denominator = ticks << shift.max(0);
        let multiplier = (numerator + denominator / 2) / denominator;
        Self { multiplier: u32::try_from(multiplier).unwrap_or(u32::MAX), shift }
    }
}

impl State {
    pub(crate) fn new(vcpus: usize, features: KvmFeatures) -> Self {
        Self { wall_clock: 0, wall_version: 0, vcpus: vec![Vcpu::default(); vcpus], features }
    }

    pub(crate) fn features(&self) -> KvmFeatures {
        self.features
    }

    /// Brings the vCPU's record of stolen time up to date, if that was not done a moment ago. `waited` tells for how long its thread has waited.
    pub(crate) fn tell_stolen(&mut self, vcpu: usize, now: Nanos, waited: &dyn Fn() -> u64) -> Effect {
        let Some(vcpu) = self.vcpus.get_mut(vcpu).filter(|v| v.steal_time & ENABLED != 0) else {
            return Effect::Nothing;
        };
        if now.saturating_sub(vcpu.told) < TELL_STOLEN && vcpu.waited.is_some() {
            return Effect::Nothing;
        }
        let total = waited();
        vcpu.stolen += vcpu.waited.map_or(0, |before| total.saturating_sub(before));
        vcpu.waited = Some(total);
        vcpu.told = now;
        vcpu.stolen_version = vcpu.stolen_version.wrapping_add(2);
        Effect::Stolen { at: vcpu.steal_time & !STEAL_LOW, version: vcpu.stolen_version, nanos: vcpu.stolen }
    }

    pub(crate) fn read_msr(&self, vcpu: usize, number: u32) -> Option<u64> {
        match number {
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => Some(self.wall_clock),
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => Some(self.vcpus.get(vcpu)?.system_time),
            msr::STEAL_TIME if self.features.steal_time => Some(self.vcpus.get(vcpu)?.steal_time),
            msr::PV_EOI if self.features.end_of_interrupt => Some(self.vcpus.get(vcpu)?.pv_eoi),
            _ => None,
        }
    }

    /// `tsc` is the counter's rate and whether it is the same on all vCPUs, `boot` the wall-clock time, in nanoseconds since 1970, at which virtual time was 0.
    pub(crate) fn write_msr(
        &mut self,
        cpu: &CpuState,
        number: u32,
        value: u64,
        tsc: (Hz, bool),
        boot: i64,
    ) -> Option<Effect> {
        match number {
            msr::WALL_CLOCK | msr::WALL_CLOCK_OLD => {
                self.wall_clock = value;
                self.wall_version = self.wall_version.wrapping_add(2);
                let boot = boot.max(0) as u64;
                let mut bytes = self.wall_version.to_le_bytes().to_vec();
                // Seconds have 32 bits in the record, and last until 2106.
                bytes.extend_from_slice(&((boot / NANOS_PER_SECOND) as u32).to_le_bytes());
                bytes.extend_from_slice(&((boot % NANOS_PER_SECOND) as u32).to_le_bytes());
                Some(Effect::Versioned { at: value, bytes })
            }
            msr::SYSTEM_TIME | msr::SYSTEM_TIME_OLD => {
                let vcpu = self.vcpus.get_mut(cpu.id as usize)?;
                vcpu.system_time = value;
                Some(vcpu.record(cpu.msr.tsc_offset, tsc))
            }
            // Bits 1 to 5 are reserved.
            msr::STEAL_TIME if self.features.steal_time && value & STEAL_LOW & !ENABLED == 0 => {
                let vcpu = self.vcpus.get_mut(cpu.id as usize)?;
                vcpu.steal_time = value;
                // The next entry tells, whenever the last one was.
                vcpu.told = 0;
                Some(Effect::Nothing)
            }
            msr::PV_EOI if self.features.end_of_interrupt && value & PV_EOI_LOW & !ENABLED == 0 => {
                self.vcpus.get_mut(cpu.id as usize)?.pv_eoi = value;
                Some(Effect::Nothing)
            }
            _ => None,
        }
    }

    pub(crate) fn tsc_moved(&mut self, cpu: &CpuState, tsc: (Hz, bool)) -> Effect {
        self.vcpus.get_mut(cpu.id as usize).map_or(Effect::Nothing, |v| v.record(cpu.msr.tsc_offset, tsc))
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let Self { wall_clock, wall_version, vcpus, features: _ } = self;
        out.put_u64(*wall_clock);
        out.put_u32(*wall_version);
        for vcpu in vcpus {
            let Vcpu { system_time, version, steal_time, stolen_version, stolen, told, waited: _, pv_eoi } =
                vcpu;
            out.put_u64(*system_time);
            out.put_u32(*version);
            out.put_u64(*steal_time);
            out.put_u32(*stolen_version);
            out.put_u64(*stolen);
            out.put_u64(*told);
            out.put_u64(*pv_eoi);
        }
    }

    pub(crate) fn load(input: &mut Reader<'_>, vcpus: usize, features: KvmFeatures) -> Result<Self, Error> {
        let (wall_clock, wall_version) = (input.take_u64()?, input.take_u32()?);
        let vcpus = (0..vcpus)
            .map(|_| {
                Ok(Vcpu {
                    system_time: input.take_u64()?,
                    version: input.take_u32()? & !1,
                    steal_time: input.take_u64()?,
                    stolen_version: input.take_u32()? & !1,
                    stolen: input.take_u64()?,
                    told: input.take_u64()?,
                    waited: None,
                    pv_eoi: input.take_u64()?,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { wall_clock, wall_version: wall_version & !1, vcpus, features })
    }
}

impl Vcpu {
    /// The record for a vCPU whose counter is `offset` ahead of the VM-wide one.
    fn record(&mut self, offset: u64, (tsc, stable): (Hz, bool)) -> Effect {
        if self.system_time & ENABLED == 0 {
            return Effect::Nothing;
        }
        self.version = self.version.wrapping_add(2);
        let scale = Scale::new(tsc);
        let mut bytes = Vec::with_capacity(32);
        bytes.extend_from_slice(&self.version.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&offset.to_le_bytes());
        bytes.extend_from_slice(&0u64.to_le_bytes());
        bytes.extend_from_slice(&scale.multiplier.to_le_bytes());
        bytes.push(scale.shift as u8);
        bytes.push(if stable { STABLE } else { 0 });
        bytes.extend_from_slice(&[0; 2]);
        Effect::Versioned { at: self.system_time & !ENABLED, bytes }
    }
}

/// A hypercall: number in RAX, arguments in RBX, RCX, RDX, RSI, result in RAX; outside 64-bit code their low halves.
pub(crate) fn hypercall(cpu: &mut CpuState) -> Effect {
    let wide = cpu.is_64bit();
    let argument = |register: usize| if wide { cpu.gpr[register] } else { cpu.gpr[register] & 0xffff_ffff };
    let (result, effect) = match argument(gpr::RAX) {
        _ if cpu.cpl() != 0 => (call::NOT_PERMITTED, Effect::Nothing),
        call::POLL_IRQ => (0, Effect::Nothing),
        // RCX names the vCPU by its APIC id, which is its number.
        call::KICK_CPU => (0, Effect::Kick(argument(gpr::RCX) as u32)),
        _ => (call::UNKNOWN, Effect::Nothing),
    };
    cpu.gpr[gpr::RAX] = if wide { result as u64 } else { u64::from(result as u32) };
    effect
}
