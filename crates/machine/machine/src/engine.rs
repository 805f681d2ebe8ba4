//! Which engine runs a machine, and why.

use std::io;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use cpum::cpuid::FeatureBit;
use dev_pc::rtc::WallClock;
use em::{Engine, VmContext};
use pdm::connector::BlockDriver;
use tm::{Clock, TimerQueue};
use vbox_types::{Hz, VcpuId};

use crate::config::{EngineChoice, MachineConfig};
use crate::host;

/// The engine of one machine.
pub enum Backend {
    Kvm(Box<nem_kvm::Host>),
    Recompiler {
        why: String,
    },
    Interpreter {
        why: String,
    },
    /// One that a tool brings along.
    Bench(Box<dyn Bench>),
}

/// Makes a controller's medium of an image.
pub type Between = Arc<dyn Fn(Arc<dyn BlockDriver>) -> Arc<dyn BlockDriver> + Send + Sync>;

/// What a tool brings along to run a machine in its own way: engine, virtual time, and when requests to media complete.
pub trait Bench: Send {
    /// The features that the engine has.
    fn features(&self) -> Vec<FeatureBit>;
    /// The clock that virtual time follows. If it is a manual one the bench moves it and fires the timers.
    fn clock(&self) -> Arc<Clock>;
    fn tsc_frequency(&self) -> Hz;
    /// Nanoseconds since 1970 when the machine starts.
    fn utc(&self) -> i64;
    /// What stands between controllers and media.
    fn between(&self) -> Between;
    /// One engine for each vCPU.
    fn engines(
        self: Box<Self>,
        context: &Arc<VmContext>,
        timers: &Arc<TimerQueue>,
    ) -> io::Result<Vec<Box<dyn Engine>>>;
}

/// What clients ask of the engine that a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Kvm,
    Recompiler,
    Interpreter,
}

impl Backend {
    /// Takes the engine that the settings name; left to itself, KVM where it is usable and the recompiler elsewhere.
    pub fn choose(config: &MachineConfig) -> Result<Self> {
        match config.engine {
            EngineChoice::Kvm => match nem_kvm::Host::probe() {
                Ok(host) => Ok(Self::Kvm(Box::new(host))),
                Err(why) => Err(anyhow!(
                    "the machine is set up to run on VT-x or AMD-V only (--vm-execution-engine), and that is not possible: {why}"
                )),
            },
            EngineChoice::Default => Ok(Self::default_here()),
            EngineChoice::Software => Ok(Self::Recompiler {
                why: "hardware virtualization is switched off for this machine; --hwvirtex on allows it"
                    .into(),
            }),
            EngineChoice::Recompiler => Ok(Self::Recompiler { why: CHOSEN.into() }),
            EngineChoice::Interpreter => Ok(Self::Interpreter { why: CHOSEN.into() }),
        }
    }

    /// The engine of this kind, for a machine that runs already.
    pub fn of(kind: Kind) -> Result<Self> {
        const CHANGED: &str = "changed while the machine runs";
        Ok(match kind {
            Kind::Kvm => Self::Kvm(Box::new(nem_kvm::Host::probe()?)),
            Kind::Recompiler => Self::Recompiler { why: CHANGED.into() },
            Kind::Interpreter => Self::Interpreter { why: CHANGED.into() },
        })
    }

    /// The engine of machines that leave the choice to us.
    pub fn default_here() -> Self {
        match nem_kvm::Host::probe() {
            Ok(host) => Self::Kvm(Box::new(host)),
            Err(why) => Self::Recompiler { why: why.to_string() },
        }
    }

    pub fn kind(&self) -> Kind {
        match self {
            Self::Kvm(_) => Kind::Kvm,
            Self::Recompiler { .. } => Kind::Recompiler,
            Self::Interpreter { .. } | Self::Bench(_) => Kind::Interpreter,
        }
    }

    /// The engine in one sentence: what it is and what it uses of the host, or why it is not KVM.
    pub fn describe(&self) -> String {
        match self {
            Self::Kvm(host) => format!("KVM ({})", host.describe()),
            Self::Recompiler { why } => format!("recompiler (software): {why}"),
            Self::Interpreter { why } => format!("interpreter (software): {why}"),
            Self::Bench(_) => "a bench's own".into(),
        }
    }

    /// The CPU features that guests may have. KVM's are cut to those that the software engines have too, so that a guest can go on
    /// under any engine.
    pub fn features(&self) -> Vec<FeatureBit> {
        let all = iem::features::cpuid_features();
        match self {
            Self::Kvm(host) => host.features(&all),
            Self::Recompiler { .. } | Self::Interpreter { .. } => all,
            Self::Bench(bench) => bench.features(),
        }
    }

    /// What the guest finds if the settings give it virtualization of its own.
    pub fn nested(&self, config: &MachineConfig) -> Result<Option<nem_kvm::Nested>> {
        if !config.nested_hw_virt {
            return Ok(None);
        }
        let found = match self {
            Self::Kvm(_) if !config.ioapic => Err("it needs local APICs; use --ioapic on".into()),
            Self::Kvm(host) => host.nested(),
            _ => Err(format!(
                "it is there under KVM only, and the machine's engine is the {}",
                self.describe()
            )),
        };
        found.map(Some).map_err(|why| {
            anyhow!(
                "the guest cannot have hardware virtualization itself: {why}; or use --nested-hw-virt off"
            )
        })
    }

    /// Whether hypercalls reach our own provider.
    pub fn has_hypercalls(&self) -> bool {
        !matches!(self, Self::Kvm(_))
    }

    /// What the KVM provider offers besides its clocks, on a machine with or without local APICs.
    pub fn kvm_features(&self, local_apics: bool) -> gim::KvmFeatures {
        match self {
            Self::Kvm(host) if local_apics => {
                let nem_kvm::Paravirt { kick, end_of_interrupt, steal_time } = host.paravirt();
                gim::KvmFeatures { kick, end_of_interrupt, steal_time }
            }
            // What a bench does must not depend on the host.
            Self::Kvm(_) | Self::Bench(_) => gim::KvmFeatures::default(),
            Self::Recompiler { .. } | Self::Interpreter { .. } => {
                gim::KvmFeatures { kick: true, end_of_interrupt: false, steal_time: true }
            }
        }
    }

    /// Whether the vCPUs' time-stamp counters are the same at every moment.
    pub fn has_stable_counter(&self) -> bool {
        match self {
            Self::Kvm(host) => host.has_stable_counter(),
            Self::Recompiler { .. } | Self::Interpreter { .. } | Self::Bench(_) => true,
        }
    }

    /// The rate of the guest's time-stamp counter.
    pub fn tsc_frequency(&self, config: &MachineConfig) -> Hz {
        match self {
            Self::Kvm(host) => {
                if let Some(wanted) = config.tsc.filter(|hz| *hz != host.tsc_frequency()) {
                    tracing::warn!(target: "tm", "the time-stamp counter keeps the host's rate under KVM: {wanted} is not possible");
                }
                host.tsc_frequency()
            }
            // At the host's own rate reading the counter costs least.
            Self::Recompiler { .. } => {
                config.tsc.or_else(|| rem::counter::rate().map(Hz)).unwrap_or_else(host::tsc_frequency)
            }
            Self::Interpreter { .. } => config.tsc.unwrap_or_else(host::tsc_frequency),
            Self::Bench(bench) => bench.tsc_frequency(),
        }
    }

    /// The guest's wall clock when it starts.
    pub fn wall_clock(&self, config: &MachineConfig) -> WallClock {
        match self {
            Self::Bench(bench) => {
                let utc = bench.utc();
                Box::new(move || utc)
            }
            _ => host::wall_clock(config),
        }
    }

    /// What stands between controllers and media, if anything does.
    pub fn between(&self) -> Option<Between> {
        match self {
            Self::Bench(bench) => Some(bench.between()),
            _ => None,
        }
    }

    /// The clock that virtual time follows.
    pub fn clock(&self) -> Arc<Clock> {
        match self {
            Self::Kvm(host) => host.clock(),
            Self::Recompiler { .. } => match rem::counter::rate() {
                Some(hz) => Clock::from_counter(hz, Box::new(rem::counter::read)),
                None => Clock::new(),
            },
            Self::Interpreter { .. } => Clock::new(),
            Self::Bench(bench) => bench.clock(),
        }
    }

    /// One engine for each vCPU.
    pub fn engines(self, context: &Arc<VmContext>, timers: &Arc<TimerQueue>) -> Result<Vec<Box<dyn Engine>>> {
        let software = |make: &dyn Fn(VcpuId) -> io::Result<Box<dyn Engine>>| {
            (0..context.links.len() as u32).map(|id| make(VcpuId(id))).collect::<io::Result<Vec<_>>>()
        };
        match self {
            Self::Kvm(host) => host.engines(context).context("cannot prepare KVM's virtual CPUs"),
            Self::Recompiler { .. } => software(&|id| Ok(Box::new(rem::Rem::new(context.clone(), id)?)))
                .context("cannot prepare the recompiler"),
            Self::Interpreter { .. } => software(&|id| Ok(Box::new(iem::Iem::new(context.clone(), id)?)))
                .context("cannot prepare the interpreter"),
            Self::Bench(bench) => bench.engines(context, timers).context("cannot prepare the bench's engine"),
        }
    }
}

const CHOSEN: &str = "the machine is set up so (--vm-execution-engine)";

#[cfg(test)]
mod tests {
    use vbox_types::ByteSize;

    use super::*;

    #[test]
    fn a_machine_without_hardware_virtualization_gets_the_recompiler_and_its_reason() {
        let mut config = MachineConfig::bare("test", ByteSize::mib(16));
        config.engine = EngineChoice::Software;
        let backend = Backend::choose(&config).unwrap();
        assert_eq!(backend.kind(), Kind::Recompiler);
        assert!(backend.describe().contains("--hwvirtex on"));
    }

    #[test]
    fn virtualization_for_the_guest_is_refused_on_software_engines_with_their_reason_and_a_mend() {
        let mut config = MachineConfig::bare("test", ByteSize::mib(16));
        config.engine = EngineChoice::Software;
        let backend = Backend::choose(&config).unwrap();
        assert!(backend.nested(&config).unwrap().is_none());
        config.nested_hw_virt = true;
        let text = backend.nested(&config).unwrap_err().to_string();
        for part in ["recompiler", "--hwvirtex on", "--nested-hw-virt off"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn where_kvm_is_not_usable_the_default_falls_back_and_the_explicit_choice_fails_with_the_same_reason() {
        let Err(why) = nem_kvm::Host::probe() else {
            eprintln!("skipped: this host has a usable KVM");
            return;
        };
        let mut config = MachineConfig::bare("test", ByteSize::mib(16));
        assert!(Backend::choose(&config).unwrap().describe().contains(&why.to_string()));
        config.engine = EngineChoice::Kvm;
        let Err(error) = Backend::choose(&config) else { panic!("KVM is not usable, and was taken") };
        assert!(error.to_string().contains(&why.to_string()));
    }
}
