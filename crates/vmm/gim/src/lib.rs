//! GIM, the guest interface manager: what guests find that know they run on a hypervisor (VirtualBox manual, 10.5).
//!
//! A provider consists of CPUID leaves from 0x40000000 on ([`Setup::cpuid`]) and, for KVM and Hyper-V, of registers and calls
//! ([`Gim`]). Time in every provider is the VM's virtual time: the time-stamp counter is derived from it, so that the formula a guest gets
//! needs no correction, neither after a pause nor from one vCPU to another.

pub mod debug;
mod hyperv;
mod kvm;
mod minimal;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use cpum::cpuid::{Entry, Leaf, Paravirt};
use cpum::{CpuState, VcpuLink};
use debug::{DebugInterface, Debugger};
use parking_lot::Mutex;
use pdm::Device;
use pdm::connector::SystemControl;
use pgm::Pgm;
use ssm::{Error, Reader, Saveable, Writer};
use tm::Clock;
use vbox_types::{GuestPhys, Hz, VcpuId};

/// Version of the saved state.
const VERSION: u32 = 3;
/// The first of the hypervisor's CPUID leaves.
const HYPERVISOR: u32 = 0x4000_0000;

/// The interface that a guest finds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// The hypervisor does not show.
    #[default]
    None,
    /// The frequencies of TSC and APIC timer.
    Minimal,
    /// Hyper-V's, for Windows.
    HyperV,
    /// KVM's, for Linux.
    Kvm,
}

impl Provider {
    /// The name that VBox.log shows, as VirtualBox spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "None",
            Self::Minimal => "Minimal",
            Self::HyperV => "HyperV",
            Self::Kvm => "KVM",
        }
    }

    /// Whether guests are to take the provider's clock rather than the bare time-stamp counter: the counter then is not announced as
    /// invariant, as VirtualBox never does.
    pub fn has_clock(self) -> bool {
        matches!(self, Self::HyperV | Self::Kvm)
    }
}

/// Parts of the KVM provider that need the engine's help, or are the host's KVM's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KvmFeatures {
    /// A hypercall ends another vCPU's HLT.
    pub kick: bool,
    /// An interrupt ends by a bit in memory.
    pub end_of_interrupt: bool,
    /// A vCPU learns for how long others had its CPU.
    pub steal_time: bool,
}

/// What a provider tells of the machine.
#[derive(Clone, Debug)]
pub struct Setup {
    pub provider: Provider,
    pub vcpus: u32,
    pub tsc_frequency: Hz,
    /// Rate at which the local APIC's timer counts before its divider.
    pub apic_frequency: Hz,
    pub x2apic: bool,
    /// Whether the engine brings hypercalls here. The host's KVM answers them itself.
    pub hypercalls: bool,
    /// What the KVM provider offers besides its clocks.
    pub kvm: KvmFeatures,
    /// Whether all vCPUs' time-stamp counters are the same at every moment, so that guests need not guard against steps back.
    pub stable_counter: bool,
    /// The Hyper-V provider's signature in CPUID; guests look for [`hyperv_vendor`].
    pub hyperv_vendor: [u8; 12],
    /// How guests of the Hyper-V provider reach a kernel debugger, if one is configured.
    pub debug: Option<DebugInterface>,
}

/// The signature of Microsoft's own hypervisor, which Linux wants to see. VirtualBox shows `VBoxVBoxVBox` unless configured otherwise, which
/// only Windows takes for Hyper-V.
pub const fn hyperv_vendor() -> [u8; 12] {
    *b"Microsoft Hv"
}

impl Setup {
    /// The leaves for `cpum::cpuid::Config`.
    pub fn cpuid(&self) -> Paravirt {
        match self.provider {
            Provider::None => Paravirt::None,
            Provider::Minimal => Paravirt::Shown(minimal::leaves(self)),
            Provider::HyperV => Paravirt::Shown(hyperv::leaves(self)),
            Provider::Kvm => Paravirt::Shown(kvm::leaves(self)),
        }
    }
}

fn leaf(number: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> Entry {
    Entry { leaf: number, subleaf: None, value: Leaf { eax, ebx, ecx, edx } }
}

/// A signature leaf: the highest leaf and twelve characters.
fn signature(number: u32, highest: u32, name: &[u8; 12]) -> Entry {
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    leaf(number, highest, word(0), word(4), word(8))
}

/// What the providers work with.
pub struct Wiring {
    pub pgm: Arc<Pgm>,
    pub clock: Arc<Clock>,
    pub links: Vec<Arc<VcpuLink>>,
    /// Coordinated universal time as the guest shall see it, in nanoseconds since 1970.
    pub utc: Box<dyn Fn() -> i64 + Send + Sync>,
    pub control: Arc<dyn SystemControl>,
    /// The CPUs' vendor is AMD, so that hypercalls are VMMCALL.
    pub amd: bool,
    /// The guest has told that it has crashed, and how. Called on a vCPU's thread.
    pub crashed: Box<dyn Fn(&Crash) + Send + Sync>,
    /// Nanoseconds for which the calling thread waited for a CPU; `None` where the engine tells guests of stolen time itself.
    pub stolen: Option<Box<dyn Fn() -> u64 + Send + Sync>>,
    /// The kernel debugger, where [`Setup::debug`] offers one.
    pub debugger: Option<Arc<dyn Debugger>>,
}

/// The parameters by which a guest tells how it has crashed. From Windows they are those of its stop error: the code comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash(pub [u64; 5]);

impl fmt::Display for Crash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p0, p1, p2, p3, p4] = self.0;
        write!(
            f,
            "HyperV: the guest says that it has crashed: P0=0x{p0:x} P1=0x{p1:x} P2=0x{p2:x} P3=0x{p3:x} P4=0x{p4:x}"
        )
    }
}

/// Crashes that are taken note of between two resets: a guest that has crashed has no more to say.
const MOST_CRASHES: u32 = 8;

enum State {
    Kvm(kvm::State),
    HyperV(hyperv::State),
}

/// The registers and calls of a provider.
pub struct Gim {
    wiring: Wiring,
    tsc_frequency: Hz,
    stable: bool,
    state: Mutex<State>,
    /// Since the last reset.
    crashes: AtomicU32,
}

impl Gim {
    /// `None` for providers that consist of CPUID leaves only.
    pub fn new(setup: &Setup, wiring: Wiring) -> Option<Arc<Self>> {
        let state = match setup.provider {
            Provider::None | Provider::Minimal => return None,
            Provider::HyperV => {
                let debug = setup.debug.zip(wiring.debugger.clone());
                let vcpus = wiring.links.len();
                let debug = debug.map(|(interface, debugger)| debug::State::new(vcpus, interface, debugger));
                State::HyperV(hyperv::State::new(vcpus, debug))
            }
            Provider::Kvm => State::Kvm(kvm::State::new(wiring.links.len(), setup.kvm)),
        };
        let (tsc_frequency, stable) = (setup.tsc_frequency, setup.stable_counter);
        Some(Arc::new(Self {
            wiring,
            tsc_frequency,
            stable,
            state: Mutex::new(state),
            crashes: AtomicU32::new(0),
        }))
    }

    /// The unit that is reset and saved.
    pub fn device(self: &Arc<Self>) -> Arc<Mutex<dyn Device>> {
        Arc::new(Mutex::new(Unit(self.clone())))
    }

    /// The debugger has sent something.
    pub fn debugger_spoke(&self) {
        if let State::HyperV(state) = &*self.state.lock()
            && let Some(debug) = state.debug()
        {
            debug.tell_pending(&self.wiring.pgm);
        }
    }

    /// Applies what the core of a provider asks for.
    fn apply(&self, effect: Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Page { at, bytes } => self.wiring.pgm.write(GuestPhys(at), &bytes),
            Effect::Versioned { at, bytes } => {
                // A reader on another vCPU must see an odd version whenever the rest may be half written.
                let mut odd = bytes.clone();
                let version = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                odd[..4].copy_from_slice(&version.wrapping_sub(1).to_le_bytes());
                self.wiring.pgm.write(GuestPhys(at), &odd[..4]);
                fence(Ordering::SeqCst);
                self.wiring.pgm.write(GuestPhys(at + 4), &bytes[4..]);
                fence(Ordering::SeqCst);
                self.wiring.pgm.write(GuestPhys(at), &bytes[..4]);
            }
            Effect::Stolen { at, version, nanos } => {
                // As above; here the version stands behind the value.
                let pgm = &self.wiring.pgm;
                pgm.write(GuestPhys(at + 8), &version.wrapping_sub(1).to_le_bytes());
                fence(Ordering::SeqCst);
                pgm.write(GuestPhys(at), &nanos.to_le_bytes());
                fence(Ordering::SeqCst);
                pgm.write(GuestPhys(at + 8), &version.to_le_bytes());
            }
            Effect::Kick(vcpu) => {
                if let Some(link) = self.wiring.links.get(vcpu as usize) {
                    link.kick();
                }
            }
            Effect::Yield => std::thread::yield_now(),
            Effect::Crashed(crash) => {
                if self.crashes.fetch_add(1, Ordering::Relaxed) < MOST_CRASHES {
                    tracing::warn!(target: "gim", "{crash}");
                    (self.wiring.crashed)(&crash);
                }
            }
            Effect::Reset => {
                self.wiring.control.request(pdm::connector::SystemRequest::Reset);
            }
        }
    }
}

/// What a register or call brings about outside the provider's state.
#[derive(Debug, PartialEq, Eq)]
enum Effect {
    Nothing,
    /// Bytes for guest memory that nobody else reads yet.
    Page {
        at: u64,
        bytes: Vec<u8>,
    },
    /// A record that begins with an even version.
    Versioned {
        at: u64,
        bytes: Vec<u8>,
    },
    /// The record of stolen time: the time, and an even version.
    Stolen {
        at: u64,
        version: u32,
        nanos: u64,
    },
    /// The vCPU's HLT ends.
    Kick(u32),
    /// The vCPU spins: others may need its host CPU.
    Yield,
    Crashed(Crash),
    Reset,
}

impl em::Gim for Gim {
    fn read_msr(&self, vcpu: VcpuId, msr: u32) -> Option<u64> {
        match &*self.state.lock() {
            State::Kvm(state) => state.read_msr(vcpu.index(), msr),
            State::HyperV(state) => {
                let frequencies = (self.tsc_frequency, hyperv::APIC_FREQUENCY);
                state.read_msr(vcpu.index(), msr, self.wiring.clock.now(), frequencies)
            }
        }
    }

    fn write_msr(&self, cpu: &CpuState, msr: u32, value: u64) -> bool {
        let effect = match &mut *self.state.lock() {
            State::Kvm(state) => {
                let boot = (self.wiring.utc)().saturating_sub_unsigned(self.wiring.clock.now());
                state.write_msr(cpu, msr, value, (self.tsc_frequency, self.stable), boot)
            }
            State::HyperV(state) => {
                state.write_msr(cpu.id as usize, msr, value, (self.tsc_frequency, self.stable), &self.wiring)
            }
        };
        match effect {
            Some(effect) => {
                self.apply(effect);
                true
            }
            None => false,
        }
    }

    fn hypercall(&self, cpu: &mut CpuState) -> bool {
        let effect = match &mut *self.state.lock() {
            State::Kvm(_) => Some(kvm::hypercall(cpu)),
            State::HyperV(state) => state.hypercall(cpu, &self.wiring),
        };
        match effect {
            Some(effect) => {
                self.apply(effect);
                true
            }
            None => false,
        }
    }

    fn tsc_moved(&self, cpu: &CpuState) {
        let effect = match &mut *self.state.lock() {
            State::Kvm(state) => state.tsc_moved(cpu, (self.tsc_frequency, self.stable)),
            // One page serves all vCPUs: Hyper-V's guests leave the counter alone.
            State::HyperV(_) => Effect::Nothing,
        };
        self.apply(effect);
    }

    fn about_to_run(&self, vcpu: VcpuId) {
        let Some(stolen) = &self.wiring.stolen else { return };
        let effect = match &mut *self.state.lock() {
            State::Kvm(state) => state.tell_stolen(vcpu.index(), self.wiring.clock.now(), stolen),
            State::HyperV(_) => Effect::Nothing,
        };
        self.apply(effect);
    }
}

/// The provider as a unit of the machine.
struct Unit(Arc<Gim>);

impl Device for Unit {
    fn reset(&mut self) {
        let vcpus = self.0.wiring.links.len();
        match &mut *self.0.state.lock() {
            State::Kvm(state) => *state = kvm::State::new(vcpus, state.features()),
            State::HyperV(state) => *state = state.fresh(),
        }
        self.0.crashes.store(0, Ordering::Relaxed);
        for link in &self.0.wiring.links {
            link.take_kick();
        }
    }
}

impl Saveable for Unit {
    fn unit_name(&self) -> &'static str {
        match &*self.0.state.lock() {
            State::Kvm(_) => "gim-kvm",
            State::HyperV(_) => "gim-hyperv",
        }
    }

    fn unit_version(&self) -> u32 {
        VERSION
    }

    fn save(&self, out: &mut Writer) {
        match &*self.0.state.lock() {
            State::Kvm(state) => state.save(out),
            State::HyperV(state) => state.save(out),
        }
    }

    fn load(&mut self, mut input: Reader<'_>) -> Result<(), Error> {
        ssm::check_version(&input, VERSION)?;
        let vcpus = self.0.wiring.links.len();
        let mut state = self.0.state.lock();
        let loaded = match &*state {
            State::Kvm(old) => State::Kvm(kvm::State::load(&mut input, vcpus, old.features())?),
            State::HyperV(old) => State::HyperV(old.load(&mut input)?),
        };
        input.finish()?;
        *state = loaded;
        Ok(())
    }
}
