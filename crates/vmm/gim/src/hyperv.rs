//! Hyper-V's interface (Hypervisor Top Level Functional Specification 6.0b), as far as Windows and Linux profit from it.
//!
//! Offered: the reference time counter and the page that computes it from the time-stamp counter, frequency registers, virtual processor
//! index, reset register, crash registers, the hypercall page with the one call for long spin waits, relaxed timing; a kernel debugger's
//! connection where one is configured ([`debug`]). Left out, and not announced: synthetic interrupt controller and timers, APIC registers as
//! MSRs, VMBus. The VP assist page's register keeps its value, since guests set it unasked; the page's contents stay zero, which means that
//! no EOI may be left out.

use cpum::CpuState;
use cpum::cpuid::Entry;
use cpum::state::gpr;
use ssm::{Error, Reader, Writer};
use tm::Nanos;
use vbox_types::Hz;

use crate::{Crash, Effect, HYPERVISOR, Setup, Wiring, debug, leaf, signature};

/// The local APIC timers count nanoseconds.
pub(crate) const APIC_FREQUENCY: Hz = Hz(1_000_000_000);
/// Reference time counts in steps of 100 ns.
const NANOS_PER_STEP: u64 = 100;
const STEPS_PER_SECOND: u128 = 10_000_000;

mod msr {
    pub(super) const GUEST_OS_ID: u32 = 0x4000_0000;
    pub(super) const HYPERCALL: u32 = 0x4000_0001;
    pub(super) const VP_INDEX: u32 = 0x4000_0002;
    pub(super) const RESET: u32 = 0x4000_0003;
    pub(super) const TIME_REF_COUNT: u32 = 0x4000_0020;
    pub(super) const REFERENCE_TSC: u32 = 0x4000_0021;
    pub(super) const TSC_FREQUENCY: u32 = 0x4000_0022;
    pub(super) const APIC_FREQUENCY: u32 = 0x4000_0023;
    pub(super) const VP_ASSIST: u32 = 0x4000_0073;
    pub(super) const CRASH_P0: u32 = 0x4000_0100;
    pub(super) const CRASH_P4: u32 = 0x4000_0104;
    pub(super) const CRASH_CTL: u32 = 0x4000_0105;
}

/// Leaf 0x40000003 EAX: which registers there are.
mod privilege {
    pub(super) const TIME_REF_COUNT: u32 = 1 << 1;
    pub(super) const HYPERCALL: u32 = 1 << 5;
    pub(super) const VP_INDEX: u32 = 1 << 6;
    pub(super) const RESET: u32 = 1 << 7;
    pub(super) const REFERENCE_TSC: u32 = 1 << 9;
    pub(super) const FREQUENCY: u32 = 1 << 11;
}

/// Leaf 0x40000003 EDX.
mod feature {
    pub(super) const FREQUENCY: u32 = 1 << 8;
    pub(super) const CRASH: u32 = 1 << 10;
}

/// Leaf 0x40000004 EAX: what guests are advised to do.
mod hint {
    pub(super) const RESET_BY_MSR: u32 = 1 << 4;
    /// A CPU may be late for its watchdogs.
    pub(super) const RELAXED_TIMING: u32 = 1 << 5;
    pub(super) const X2APIC: u32 = 1 << 8;
}

/// Spins on a lock before a guest says so (leaf 0x40000004 EBX); all ones means never.
const SPINS: u32 = 0xfff;
/// Build and version that leaf 0x40000002 shows: those of Windows Server 2016, the oldest that current guests know.
const VERSION: (u32, u32) = (14_393, 10 << 16);

const ENABLED: u64 = 1;
/// HYPERCALL: the register cannot be changed any more.
const LOCKED: u64 = 2;
const PAGE: u64 = !0xfff;
/// CRASH_CTL: the guest has crashed, and P0 to P4 tell how.
const NOTIFY: u64 = 1 << 63;

/// Calls and their results.
mod call {
    pub(super) const NOTIFY_LONG_SPIN_WAIT: u16 = 8;
    pub(super) const SUCCESS: u64 = 0;
    pub(super) const INVALID_CODE: u64 = 2;
}

pub(crate) fn leaves(setup: &Setup) -> Vec<Entry> {
    use privilege as p;
    let privileges =
        p::TIME_REF_COUNT | p::HYPERCALL | p::VP_INDEX | p::RESET | p::REFERENCE_TSC | p::FREQUENCY;
    let spins = if setup.hypercalls { SPINS } else { u32::MAX };
    let x2apic = if setup.x2apic { hint::X2APIC } else { 0 };
    let (debugging, debugger) = setup.debug.map_or((0, 0), |_| (debug::PRIVILEGE, debug::FEATURES));
    let service = setup.debug.is_some_and(|debug| debug.service);
    let last = if service { debug::LAST_LEAF } else { HYPERVISOR + 6 };
    let mut all = vec![
        signature(HYPERVISOR, last, &setup.hyperv_vendor),
        leaf(HYPERVISOR + 1, u32::from_le_bytes(*b"Hv#1"), 0, 0, 0),
        leaf(HYPERVISOR + 2, VERSION.0, VERSION.1, 0, 0),
        leaf(HYPERVISOR + 3, privileges, debugging, 0, feature::FREQUENCY | feature::CRASH | debugger),
        leaf(HYPERVISOR + 4, hint::RESET_BY_MSR | hint::RELAXED_TIMING | x2apic, spins, 0, 0),
        leaf(HYPERVISOR + 5, setup.vcpus, setup.vcpus, 0, 0),
        leaf(HYPERVISOR + 6, 0, 0, 0, 0),
    ];
    if service {
        all.extend(debug::service_leaves());
    }
    all
}

pub(crate) struct State {
    guest_os_id: u64,
    hypercall: u64,
    reference_tsc: u64,
    /// Counts the changes of the reference page; 0 would tell guests not to use it.
    sequence: u32,
    vp_assist: Vec<u64>,
    crash: [u64; 5],
    debug: Option<debug::State>,
}

impl State {
    pub(crate) fn new(vcpus: usize, debug: Option<debug::State>) -> Self {
        Self {
            guest_os_id: 0,
            hypercall: 0,
            reference_tsc: 0,
            sequence: 0,
            vp_assist: vec![0; vcpus],
            crash: [0; 5],
            debug,
        }
    }

    /// As after a reset of the machine.
    pub(crate) fn fresh(&self) -> Self {
        Self::new(self.vp_assist.len(), self.debug.as_ref().map(debug::State::fresh))
    }

    pub(crate) fn debug(&self) -> Option<&debug::State> {
        self.debug.as_ref()
    }

    pub(crate) fn read_msr(
        &self,
        vcpu: usize,
        number: u32,
        now: Nanos,
        (tsc, apic): (Hz, Hz),
    ) -> Option<u64> {
        Some(match number {
            msr::GUEST_OS_ID => self.guest_os_id,
            msr::HYPERCALL => self.hypercall,
            msr::VP_INDEX => vcpu as u64,
            msr::RESET => 0,
            msr::TIME_REF_COUNT => now / NANOS_PER_STEP,
            msr::REFERENCE_TSC => self.reference_tsc,
            msr::TSC_FREQUENCY => tsc.0,
            msr::APIC_FREQUENCY => apic.0,
            msr::VP_ASSIST => *self.vp_assist.get(vcpu)?,
            msr::CRASH_P0..=msr::CRASH_P4 => self.crash[(number - msr::CRASH_P0) as usize],
            // What may be written to it.
            msr::CRASH_CTL => NOTIFY,
            _ => return self.debug.as_ref()?.read_msr(vcpu, number),
        })
    }

    pub(crate) fn write_msr(
        &mut self,
        vcpu: usize,
        number: u32,
        value: u64,
        tsc: (Hz, bool),
        wiring: &Wiring,
    ) -> Option<Effect> {
        match number {
            msr::GUEST_OS_ID => {
                tracing::info!(target: "gim", "HyperV: the guest's identity is 0x{value:016x}");
                self.guest_os_id = value;
                if value == 0 {
                    self.hypercall &= !ENABLED;
                }
                Some(Effect::Nothing)
            }
            msr::HYPERCALL => {
                if self.hypercall & LOCKED != 0 {
                    return Some(Effect::Nothing);
                }
                // Calls need a guest that has introduced itself.
                self.hypercall = if self.guest_os_id == 0 { value & !ENABLED } else { value };
                Some(if self.hypercall & ENABLED == 0 {
                    Effect::Nothing
                } else {
                    Effect::Page { at: value & PAGE, bytes: call_page(wiring.amd) }
                })
            }
            msr::RESET if value & 1 != 0 => Some(Effect::Reset),
            msr::RESET => Some(Effect::Nothing),
            msr::REFERENCE_TSC => {
                self.reference_tsc = value;
                Some(self.reference_page(tsc))
            }
            msr::VP_ASSIST => {
                *self.vp_assist.get_mut(vcpu)? = value;
                Some(if value & ENABLED == 0 {
                    Effect::Nothing
                } else {
                    Effect::Page { at: value & PAGE, bytes: vec![0; 0x1000] }
                })
            }
            msr::CRASH_P0..=msr::CRASH_P4 => {
                self.crash[(number - msr::CRASH_P0) as usize] = value;
                Some(Effect::Nothing)
            }
            msr::CRASH_CTL if value & NOTIFY != 0 => Some(Effect::Crashed(Crash(self.crash))),
            msr::CRASH_CTL => Some(Effect::Nothing),
            _ => self.debug.as_mut()?.write_msr(&wiring.pgm, vcpu, number, value).map(|()| Effect::Nothing),
        }
    }

    /// The page from which guests compute reference time: `(tsc * scale >> 64) + offset`.
    fn reference_page(&mut self, (tsc, stable): (Hz, bool)) -> Effect {
        if self.reference_tsc & ENABLED == 0 {
            return Effect::Nothing;
        }
        // 0 and all ones mean that the page is not to be used, and guests read the counter's register instead.
        self.sequence = self.sequence % 0xffff_fffe + 1;
        // Below 10 MHz the scale would not fit; no CPU counts so slowly.
        let scale = (STEPS_PER_SECOND << 64) / u128::from(tsc.0.max(10_000_001));
        let mut bytes = vec![0; 24];
        let sequence = if stable { self.sequence } else { 0 };
        bytes[..4].copy_from_slice(&sequence.to_le_bytes());
        bytes[8..16].copy_from_slice(&(scale as u64).to_le_bytes());
        Effect::Page { at: self.reference_tsc & PAGE, bytes }
    }

    /// A hypercall: input value in RCX and result in RAX in 64-bit code, in EDX:EAX otherwise; where the parameters are in RDX and R8, or
    /// EBX:ECX and EDI:ESI. `None`: not possible now.
    pub(crate) fn hypercall(&mut self, cpu: &mut CpuState, wiring: &Wiring) -> Option<Effect> {
        /// The parameters are in registers.
        const FAST: u64 = 1 << 16;
        if self.hypercall & ENABLED == 0 || cpu.cpl() != 0 || !cpu.is_protected() {
            return None;
        }
        let wide = cpu.is_64bit();
        let pair = |wide_in: usize, high: usize, low: usize| {
            let half = |register: usize| cpu.gpr[register] & 0xffff_ffff;
            if wide { cpu.gpr[wide_in] } else { half(high) << 32 | half(low) }
        };
        let value = pair(gpr::RCX, gpr::RDX, gpr::RAX);
        let parameters = debug::Parameters {
            fast: value & FAST != 0,
            input: pair(gpr::RDX, gpr::RBX, gpr::RCX),
            output: pair(gpr::R8, gpr::RDI, gpr::RSI),
        };
        let code = value as u16;
        let mut debug = |code| self.debug.as_mut()?.call(&wiring.pgm, cpu.id as usize, code, parameters);
        let (result, effect) = match code {
            call::NOTIFY_LONG_SPIN_WAIT => (call::SUCCESS, Effect::Yield),
            _ => (debug(code).unwrap_or(call::INVALID_CODE), Effect::Nothing),
        };
        cpu.gpr[gpr::RAX] = result;
        if !wide {
            cpu.gpr[gpr::RDX] = 0;
        }
        Some(effect)
    }

    pub(crate) fn save(&self, out: &mut Writer) {
        let Self { guest_os_id, hypercall, reference_tsc, sequence, vp_assist, crash, debug } = self;
        out.put_u64(*guest_os_id);
        out.put_u64(*hypercall);
        out.put_u64(*reference_tsc);
        out.put_u32(*sequence);
        for value in vp_assist.iter().chain(crash) {
            out.put_u64(*value);
        }
        out.put_bool(debug.is_some());
        if let Some(debug) = debug {
            debug.save(out);
        }
    }

    /// A saved state for this machine.
    pub(crate) fn load(&self, input: &mut Reader<'_>) -> Result<Self, Error> {
        let vcpus = self.vp_assist.len();
        Ok(Self {
            guest_os_id: input.take_u64()?,
            hypercall: input.take_u64()?,
            reference_tsc: input.take_u64()?,
            sequence: input.take_u32()?,
            vp_assist: (0..vcpus).map(|_| input.take_u64()).collect::<Result<_, Error>>()?,
            crash: [
                input.take_u64()?,
                input.take_u64()?,
                input.take_u64()?,
                input.take_u64()?,
                input.take_u64()?,
            ],
            debug: match (input.take_bool()?, &self.debug) {
                (false, None) => None,
                (true, Some(debug)) => Some(debug.load(input)?),
                (saved, _) => {
                    let with = if saved { "with" } else { "without" };
                    return Err(input.invalid(format!("Hyper-V {with} a debugger (--paravirt-debug)")));
                }
            },
        })
    }
}

/// The page that guests call: the vendor's instruction and a return.
fn call_page(amd: bool) -> Vec<u8> {
    let mut page = vec![0xcc; 0x1000];
    let code: [u8; 4] = if amd { [0x0f, 0x01, 0xd9, 0xc3] } else { [0x0f, 0x01, 0xc1, 0xc3] };
    page[..4].copy_from_slice(&code);
    page
}
