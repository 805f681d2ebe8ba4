//! CPUs that come and go while the machine runs (`--cpu-hotplug on`).

use std::sync::Arc;
use std::time::{Duration, Instant};

use dev_pc::cpu_hotplug::CpuHotplug;
use dev_pc::fw_cfg::FwCfg;
use dev_pc::rtc::{self, Rtc};
use dev_pc::tables::{self, acpi::AcpiConfig};
use em::Em;
use parking_lot::Mutex;
use vbox_types::VcpuId;

/// For how long the guest may take to let a CPU go, as in VirtualBox.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a CPU stays where it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlugError {
    #[error("CPU {0} cannot be plugged in or out: the machine was started with {1} of them")]
    NoSuchCpu(u32, u32),
    #[error("CPU {0} is already attached")]
    Attached(u32),
    #[error("CPU {0} is not attached")]
    NotAttached(u32),
    #[error("It is not possible to detach CPU 0")]
    First,
    #[error("Hot-Remove was aborted because the CPU may still be used by the guest")]
    InUse,
}

/// The machine's CPUs as clients plug them.
pub struct Cpus {
    em: Arc<Em>,
    rtc: Arc<Mutex<Rtc>>,
    fw_cfg: Arc<Mutex<FwCfg>>,
    device: Arc<Mutex<CpuHotplug>>,
    acpi: AcpiConfig,
    /// One at a time.
    turn: Mutex<()>,
}

impl Cpus {
    /// `acpi` is what the machine's tables tell; those CPUs that are not there at the start are taken out of EM.
    pub fn new(
        em: Arc<Em>,
        rtc: Arc<Mutex<Rtc>>,
        fw_cfg: Arc<Mutex<FwCfg>>,
        device: Arc<Mutex<CpuHotplug>>,
        acpi: AcpiConfig,
    ) -> Self {
        let present = device.lock().present();
        for cpu in (0..acpi.cpus).filter(|cpu| present & 1 << cpu == 0) {
            em.set_present(VcpuId(cpu), false);
        }
        let cpus = Self { em, rtc, fw_cfg, device, acpi, turn: Mutex::default() };
        cpus.tell_firmware();
        cpus
    }

    /// What the BIOS counts, and hands on, when it starts next.
    fn tell_firmware(&self) {
        let present = self.device.lock().present();
        let count = present.count_ones();
        self.rtc.lock().set_cmos(rtc::CPUS, count.saturating_sub(1) as u8);
        let mut store = self.fw_cfg.lock();
        store.set_cpu_count(count as u16);
        tables::add_acpi(&mut store, &AcpiConfig { hotplug: Some(present), ..self.acpi.clone() });
    }

    fn check(&self, cpu: u32) -> Result<bool, PlugError> {
        if cpu >= self.acpi.cpus {
            return Err(PlugError::NoSuchCpu(cpu, self.acpi.cpus));
        }
        Ok(self.device.lock().present() & 1 << cpu != 0)
    }

    /// Puts a CPU in, and tells the guest.
    pub fn plug(&self, cpu: u32) -> Result<(), PlugError> {
        let _turn = self.turn.lock();
        if self.check(cpu)? {
            return Err(PlugError::Attached(cpu));
        }
        self.em.set_present(VcpuId(cpu), true);
        self.device.lock().plug(cpu);
        self.tell_firmware();
        tracing::info!(target: "em", "CPU {cpu} was plugged in");
        Ok(())
    }

    /// Has the guest let a CPU go, and takes it out. Where the guest keeps it, it stays.
    pub fn unplug(&self, cpu: u32) -> Result<(), PlugError> {
        let _turn = self.turn.lock();
        if !self.check(cpu)? {
            return Err(PlugError::NotAttached(cpu));
        }
        if cpu == 0 {
            return Err(PlugError::First);
        }
        self.device.lock().ask(cpu);
        let asked = Instant::now();
        while !self.device.lock().is_let_go(cpu) {
            if asked.elapsed() > PATIENCE {
                return Err(PlugError::InUse);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.em.set_present(VcpuId(cpu), false);
        self.device.lock().unplug(cpu);
        self.tell_firmware();
        tracing::info!(target: "em", "CPU {cpu} was unplugged");
        Ok(())
    }
}
