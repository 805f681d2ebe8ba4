//! What console clients can do with the running VM.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use em::RunState;
use main_api::enums::{GuestMonitorStatus, VMExecutionEngine};
use main_api::vm_process::{ConsoleBackend, ScreenResolution, VmProcess};
use main_api::{ApiError, ApiResult};
use parking_lot::{Condvar, Mutex};
use vbox_types::{MachineState, ResultCode, VcpuId};

use crate::config::MachineConfig;
use crate::cpus::PlugError;
use crate::engine::Kind;
use crate::keys::KeyError;
use crate::machine::Machine;
use crate::network::NicConfig;
use crate::stam::Baseline;
use crate::storage::ChangeError;
use crate::{registers, screenshot, stam};

/// How long a client that powers the machine down waits for the images to be flushed.
const DOWN_TIME: Duration = Duration::from_secs(60);

/// The console of one VM.
pub struct Console {
    machine: Arc<Machine>,
    process: Arc<VmProcess>,
    state: Mutex<MachineState>,
    changed: Condvar,
    started: Instant,
    baseline: Baseline,
}

impl Console {
    pub fn new(machine: Arc<Machine>, process: Arc<VmProcess>) -> Arc<Self> {
        Arc::new(Self {
            machine,
            process,
            state: Mutex::new(MachineState::Starting),
            changed: Condvar::new(),
            started: Instant::now(),
            baseline: Baseline::default(),
        })
    }

    /// EM's state has changed: tells everybody.
    pub fn run_state_changed(&self, state: RunState) {
        match state {
            RunState::Running => self.enter(MachineState::Running),
            RunState::Paused => self.enter(MachineState::Paused),
            RunState::Stuck => self.enter(MachineState::Stuck),
            RunState::PoweredOff => self.enter(MachineState::Stopping),
        }
    }

    /// The machine is off and its images are flushed.
    pub fn is_down(&self) {
        *self.state.lock() = MachineState::PoweredOff;
        self.changed.notify_all();
    }

    fn enter(&self, state: MachineState) {
        {
            let mut now = self.state.lock();
            if *now == state || *now == MachineState::PoweredOff {
                return;
            }
            *now = state;
        }
        self.changed.notify_all();
        if let Err(error) = self.process.set_state(state) {
            tracing::warn!(target: "console", %error, "the machine's state could not be stored");
        }
    }

    fn require(&self, allowed: &[MachineState]) -> ApiResult<()> {
        let state = *self.state.lock();
        if allowed.contains(&state) {
            return Ok(());
        }
        let words: Vec<_> = allowed.iter().map(|s| s.name()).collect();
        Err(ApiError::new(
            ResultCode::InvalidVmState,
            format!("Invalid machine state: {} (must be {})", state.name(), words.join(" or ")),
        ))
    }
}

const LIVE: &[MachineState] = &[MachineState::Running, MachineState::Paused, MachineState::Stuck];

fn unavailable(what: &str) -> ApiError {
    ApiError::new(ResultCode::NotSupported, format!("{what} is not available yet"))
}

impl ConsoleBackend for Console {
    fn state(&self) -> MachineState {
        *self.state.lock()
    }

    fn pause(&self) -> ApiResult<()> {
        self.require(&[MachineState::Running])?;
        self.machine.em().pause();
        self.machine.storage().suspended();
        Ok(())
    }

    fn resume(&self) -> ApiResult<()> {
        self.require(&[MachineState::Paused])?;
        if self.machine.storage().waits_for_key() {
            return Err(ApiError::new(
                ResultCode::VmError,
                "Could not resume the machine execution (VERR_VD_DEK_MISSING): the password of an encrypted disk is missing",
            ));
        }
        self.machine.em().resume();
        Ok(())
    }

    fn reset(&self) -> ApiResult<()> {
        self.require(LIVE)?;
        self.machine.em().reset();
        Ok(())
    }

    fn power_down(&self) -> ApiResult<()> {
        self.require(&[
            MachineState::Running,
            MachineState::Paused,
            MachineState::Stuck,
            MachineState::Starting,
        ])?;
        self.enter(MachineState::Stopping);
        self.machine.em().power_off();
        let limit = Instant::now() + DOWN_TIME;
        let mut state = self.state.lock();
        while *state != MachineState::PoweredOff {
            if self.changed.wait_until(&mut state, limit).timed_out() {
                return Err(ApiError::new(ResultCode::Timeout, "The machine takes too long to stop"));
            }
        }
        Ok(())
    }

    fn power_button(&self) -> ApiResult<()> {
        self.require(&[MachineState::Running, MachineState::Paused])?;
        if self.machine.press_power_button() {
            Ok(())
        } else {
            Err(ApiError::new(ResultCode::PdmError, "The machine has no ACPI: use --acpi on"))
        }
    }

    fn sleep_button(&self) -> ApiResult<()> {
        self.require(&[MachineState::Running, MachineState::Paused])?;
        if self.machine.press_sleep_button() {
            Ok(())
        } else {
            Err(ApiError::new(ResultCode::PdmError, "The machine has no ACPI: use --acpi on"))
        }
    }

    fn power_button_handled(&self) -> ApiResult<bool> {
        Ok(self.machine.power_button_handled())
    }

    fn guest_entered_acpi_mode(&self) -> ApiResult<bool> {
        Ok(self.machine.acpi_enabled())
    }

    fn put_scancodes(&self, codes: &[u8]) -> ApiResult<usize> {
        self.require(LIVE)?;
        Ok(self.machine.put_scancodes(codes))
    }

    fn release_keys(&self) -> ApiResult<()> {
        self.require(LIVE)?;
        // Break codes of every key, with and without the 0xe0 prefix.
        let codes: Vec<u8> = (0x81..=0xd8).chain((0x81..=0xd8).flat_map(|code| [0xe0, code])).collect();
        self.machine.put_scancodes(&codes);
        Ok(())
    }

    fn mouse_absolute_supported(&self) -> bool {
        false
    }

    fn put_mouse_event(&self, dx: i32, dy: i32, dz: i32, _dw: i32, buttons: i32) -> ApiResult<()> {
        self.require(LIVE)?;
        self.machine.put_mouse_event(dx, dy, dz, buttons as u8);
        Ok(())
    }

    fn put_mouse_event_absolute(&self, _: i32, _: i32, _: i32, _: i32, _: i32) -> ApiResult<()> {
        Err(unavailable("An absolute pointing device"))
    }

    fn screen_resolution(&self, screen: u32) -> ApiResult<ScreenResolution> {
        self.require(LIVE)?;
        if screen != 0 {
            return Err(ApiError::new(ResultCode::InvalidArg, format!("There is no screen {screen}")));
        }
        let frame = self.machine.frame();
        Ok(ScreenResolution {
            width: frame.width,
            height: frame.height,
            bits_per_pixel: 32,
            x_origin: 0,
            y_origin: 0,
            status: GuestMonitorStatus::Enabled,
        })
    }

    fn take_screenshot_png(&self, screen: u32, width: u32, height: u32) -> ApiResult<Vec<u8>> {
        self.require(LIVE)?;
        if screen != 0 {
            return Err(ApiError::new(ResultCode::InvalidArg, format!("There is no screen {screen}")));
        }
        screenshot::png(&self.machine.frame(), width, height)
            .map_err(|error| ApiError::fail(format!("Could not take a screenshot ({error})")))
    }

    fn set_video_mode_hint(&self, _: u32, _: u32, _: u32, _: u32) -> ApiResult<()> {
        Err(unavailable("Changing the guest's video mode"))
    }

    fn execution_engine(&self) -> VMExecutionEngine {
        match self.machine.engine() {
            Kind::Kvm => VMExecutionEngine::NativeApi,
            Kind::Recompiler => VMExecutionEngine::Recompiler,
            Kind::Interpreter => VMExecutionEngine::Interpreter,
        }
    }

    fn statistics(&self, pattern: &str, with_descriptions: bool) -> ApiResult<String> {
        let samples = self.baseline.since(self.machine.statistics());
        Ok(stam::snapshot(&samples, pattern, with_descriptions))
    }

    fn reset_statistics(&self, pattern: &str) -> ApiResult<()> {
        self.baseline.reset(self.machine.statistics(), pattern);
        Ok(())
    }

    fn registers(&self, cpu: u32) -> ApiResult<Vec<(String, String)>> {
        self.require(LIVE)?;
        self.machine.em().look_at(VcpuId(cpu), registers::all).ok_or_else(|| no_cpu(cpu))
    }

    fn set_registers(&self, cpu: u32, values: &[(String, String)]) -> ApiResult<()> {
        self.require(LIVE)?;
        let set = |state: &mut cpum::CpuState| {
            // All or none.
            let mut new = state.clone();
            for (name, value) in values {
                registers::set(&mut new, name, value)?;
            }
            *state = new;
            Ok(())
        };
        let result = self.machine.em().change_state(VcpuId(cpu), set).ok_or_else(|| no_cpu(cpu))?;
        result.map_err(|text: String| ApiError::new(ResultCode::InvalidArg, text))
    }

    fn inject_nmi(&self) -> ApiResult<()> {
        self.require(LIVE)?;
        self.machine.inject_nmi();
        Ok(())
    }

    fn info(&self, name: &str, _args: &str) -> ApiResult<String> {
        let em = self.machine.em();
        match name {
            "help" => Ok("cpumguest  registers of the virtual CPUs
"
            .to_owned()),
            "cpumguest" => {
                let mut text = String::new();
                for cpu in 0.. {
                    let Some(all) = em.look_at(VcpuId(cpu), registers::all) else { break };
                    text += &format!(
                        "CPU {cpu}:
"
                    );
                    text.extend(all.iter().map(|(name, value)| format!("{name:14} = {value}\n")));
                }
                Ok(text)
            }
            _ => Err(ApiError::new(
                ResultCode::ObjectNotFound,
                format!("There is no information handler '{name}' ('help' lists them)"),
            )),
        }
    }

    fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    fn storage_changed(&self, force: bool, settings: &str, folder: &str) -> ApiResult<()> {
        let failed = |e: &dyn std::fmt::Display| ApiError::fail(format!("Cannot use the settings ({e})"));
        let document = settings::Document::parse(settings.as_bytes()).map_err(|e| failed(&e))?;
        let (settings, _) = settings::MachineSettings::load(&document).map_err(|e| failed(&e))?;
        let config = MachineConfig::from_settings(&settings, Path::new(folder))
            .map_err(|reasons| ApiError::new(ResultCode::NotSupported, reasons.join("; ")))?;
        self.machine.storage().change(&config, force).map_err(|error| match error {
            ChangeError::Locked => ApiError::new(
                ResultCode::PdmError,
                "Could not unmount the currently mounted media/drive: the guest has locked it (VERR_PDM_MEDIA_LOCKED)",
            ),
            ChangeError::NotWhileRunning => ApiError::new(ResultCode::InvalidVmState, error.to_string()),
            ChangeError::Failed(_) => ApiError::new(ResultCode::PdmError, error.to_string()),
        })
    }

    fn network_adapter_changed(&self, slot: u32, settings: &str) -> ApiResult<()> {
        // What the guest finds in its slots was settled at the start.
        let Some(nic) = self.machine.nics().iter().find(|n| u32::from(n.slot) == slot) else { return Ok(()) };
        let failed = |e: &dyn std::fmt::Display| ApiError::fail(format!("Cannot use the settings ({e})"));
        let document = settings::Document::parse(settings.as_bytes()).map_err(|e| failed(&e))?;
        let (settings, _) = settings::MachineSettings::load(&document).map_err(|e| failed(&e))?;
        let Some(adapter) = settings.hardware.network.get(slot as usize) else { return Ok(()) };
        let mut notes = Vec::new();
        let config = NicConfig::from_settings(&settings, adapter, self.machine.folder(), &mut notes)
            .map_err(ApiError::invalid_arg)?;
        for note in notes {
            tracing::info!(target: "console", "{note}");
        }
        let config = config.ok_or_else(|| {
            ApiError::new(
                ResultCode::NotSupported,
                format!("The new attachment of network adapter {} is not available yet", slot + 1),
            )
        })?;
        nic.change(&config).map_err(|e| ApiError::new(ResultCode::PdmError, format!("{e:#}")))
    }

    fn set_bandwidth(&self, group: &str, bytes_per_second: u64) -> ApiResult<()> {
        self.machine.storage().set_limit(group, bytes_per_second);
        Ok(())
    }

    fn plug_cpu(&self, cpu: u32, plugged: bool) -> ApiResult<()> {
        self.require(LIVE)?;
        let cpus = self.machine.cpus().ok_or_else(|| ApiError::invalid_arg("CPU hotplug is not enabled"))?;
        let done = if plugged { cpus.plug(cpu) } else { cpus.unplug(cpu) };
        done.map_err(|error| match error {
            PlugError::NoSuchCpu(..) | PlugError::First => ApiError::invalid_arg(error.to_string()),
            PlugError::Attached(_) => ApiError::new(ResultCode::ObjectInUse, error.to_string()),
            PlugError::NotAttached(_) => ApiError::not_found(error.to_string()),
            PlugError::InUse => ApiError::new(ResultCode::VmError, error.to_string()),
        })
    }

    fn add_encryption_password(&self, id: &str, password: &str, clear_on_suspend: bool) -> ApiResult<()> {
        self.require(LIVE)?;
        if id.is_empty() || password.is_empty() {
            return Err(ApiError::fail("The ID and password must be both valid"));
        }
        let added = self.machine.storage().add_password(id, password, clear_on_suspend);
        let goes_on = added.map_err(|error| match &error {
            KeyError::Exists => {
                ApiError::new(ResultCode::ObjectInUse, "A password with the given ID already exists")
            }
            KeyError::Wrong(id) => ApiError::new(
                ResultCode::PasswordIncorrect,
                format!(
                    "The provided password for ID \"{id}\" is not correct for at least one disk using this ID"
                ),
            ),
            KeyError::Store(cause) => ApiError::fail(format!("Failed to set the encryption key ({cause})")),
        })?;
        if goes_on && self.state() == MachineState::Paused {
            self.machine.em().resume();
        }
        Ok(())
    }

    fn remove_encryption_password(&self, id: &str) -> ApiResult<()> {
        if id.is_empty() {
            return Err(ApiError::fail("The ID must be valid"));
        }
        if self.machine.storage().remove_password(id) {
            return Ok(());
        }
        Err(ApiError::new(
            ResultCode::ObjectNotFound,
            format!("A password with the ID \"{id}\" does not exist"),
        ))
    }

    fn clear_encryption_passwords(&self) {
        self.machine.storage().clear_passwords();
    }

    fn set_execution_cap(&self, percent: u32) -> ApiResult<()> {
        let set = self.machine.em().set_execution_cap(percent);
        set.map_err(|e| ApiError::fail(format!("Cannot start the thread of the execution cap ({e})")))
    }
}

fn no_cpu(cpu: u32) -> ApiError {
    ApiError::new(ResultCode::InvalidArg, format!("There is no virtual CPU {cpu}"))
}
