//! Running machines.

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use main_api::client::wait_until_unlocked;
use main_api::enums::*;
use main_api::idl::*;
use main_api::{ApiResult, Proxy, Session};

use super::modifyvm::nic;
use super::{Context, Done, Failure, Run, not_available};
use crate::parse::control::{Action, ControlVm};
use crate::parse::modifyvm::Change;
use crate::scancode::{self, Typist};

/// A pause after each scan code: guests lose keys that come faster.
const KEY_PAUSE: Duration = Duration::from_millis(10);
/// Greatest size of a file that is typed.
const MAX_TYPED: u64 = 64 << 10;
/// How long a machine that is off may take to give its lock back, so that the next command can have it.
const UNLOCK_LIMIT: Duration = Duration::from_secs(5);
/// How long a VM process whose connection broke off may take to be known as ended.
const END_LIMIT: Duration = Duration::from_secs(10);

impl Run<'_> {
    pub(super) fn control_vm(&mut self, request: ControlVm) -> Done {
        let machine = self.find(&request.vm)?;
        if let Action::Unavailable(verb) = request.action {
            return Err(not_available(&format!("The command 'controlvm {verb}'")));
        }
        let state = machine.read(IMachine::State).context(|| "COMGETTER(State)".to_owned())?;
        if !state.is_online() {
            return Err(Failure::Text(format!("Machine '{}' is not currently running.", request.vm)));
        }
        let session = self
            .client
            .lock_machine(&machine, LockType::Shared)
            .context(|| "LockMachine(a->session, LockType_Shared)".to_owned())?;
        if let Action::Change { changes, enabled_nic } = request.action {
            return self.change_running(&session, changes, enabled_nic);
        }
        let console = session.console().context(|| "COMGETTER(Console)(console.asOutParam())".to_owned())?;
        match request.action {
            Action::Pause => console.call(IConsole::Pause, ()).context(|| "Pause()".to_owned()),
            Action::Resume => console.call(IConsole::Resume, ()).context(|| "Resume()".to_owned()),
            Action::Reset => console.call(IConsole::Reset, ()).context(|| "Reset()".to_owned()),
            Action::AcpiPowerButton => {
                console.call(IConsole::PowerButton, ()).context(|| "PowerButton()".to_owned())
            }
            Action::AcpiSleepButton => {
                console.call(IConsole::SleepButton, ()).context(|| "SleepButton()".to_owned())
            }
            Action::PowerOff => {
                let progress = console
                    .call(IConsole::PowerDown, ())
                    .context(|| "PowerDown(progress.asOutParam())".to_owned())?;
                let progress = console.at(progress);
                self.power_off(&machine, &session, &progress)
            }
            Action::KeyboardPutScancodes(codes) => type_codes(&keyboard(&console)?, &codes),
            Action::KeyboardPutStrings(texts) => type_codes(&keyboard(&console)?, &scancode::strings(&texts)),
            Action::KeyboardPutFile(file) => {
                let codes = file_codes(&file)?;
                type_codes(&keyboard(&console)?, &codes)
            }
            Action::ScreenshotPng { file, screen } => screenshot(&console, &file, screen),
            Action::VideoModeHint(hint) => {
                let (x, y) = hint.origin.unwrap_or_default();
                display(&console)?
                    .call(
                        IDisplay::SetVideoModeHint,
                        (
                            hint.screen,
                            hint.enabled,
                            hint.origin.is_some(),
                            x,
                            y,
                            hint.width,
                            hint.height,
                            hint.bits_per_pixel,
                            true,
                        ),
                    )
                    .context(|| format!("SetVideoModeHint({}, {})", hint.width, hint.height))
            }
            Action::AddEncPassword { id, password, remove_on_suspend } => {
                let password = super::machine::read_password(&password, "Enter password:")?;
                console
                    .call(IConsole::AddEncryptionPassword, (id, password.to_string(), remove_on_suspend))
                    .context(|| {
                        "AddEncryptionPassword(bstrPwId.raw(), Bstr(strPassword).raw(), fRemoveOnSuspend)"
                            .to_owned()
                    })
            }
            Action::RemoveEncPassword(id) => console
                .call(IConsole::RemoveEncryptionPassword, (id,))
                .context(|| "RemoveEncryptionPassword(bstrPwId.raw())".to_owned()),
            Action::RemoveAllEncPasswords => console
                .call(IConsole::ClearAllEncryptionPasswords, ())
                .context(|| "ClearAllEncryptionPasswords()".to_owned()),
            Action::Change { .. } | Action::Unavailable(_) => Ok(()),
        }
    }

    fn change_running(&mut self, session: &Session, changes: Vec<Change>, enabled_nic: Option<u32>) -> Done {
        let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
        if let Some(slot) = enabled_nic {
            let adapter = nic(&machine, slot)?;
            if !adapter.read(INetworkAdapter::Enabled).context(|| "COMGETTER(Enabled)".to_owned())? {
                return Err(Failure::Text(format!(
                    "The NIC {} is currently disabled and thus its settings can't be changed.",
                    slot + 1
                )));
            }
        }
        for change in changes {
            self.apply(&machine, change)?;
        }
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())
    }

    /// Waits until the machine is off. The VM process may end before it has answered for the last time.
    fn power_off(
        &mut self,
        machine: &Proxy<IMachine>,
        session: &Session,
        progress: &Proxy<IProgress>,
    ) -> Done {
        match self.watch(progress) {
            Ok(()) => {}
            Err(error) if error.is_connection_lost() && ended_well(machine).unwrap_or(false) => {}
            Err(error) => {
                self.stderr.error("Failed to power off machine.");
                return Err(error).context(|| "PowerDown(progress)".to_owned());
            }
        }
        let _ = session.unlock();
        // A lock that stays is the next command's to complain about.
        let _ = wait_until_unlocked(machine, UNLOCK_LIMIT);
        Ok(())
    }
}

/// Whether the machine is, or soon will be, powered off.
fn ended_well(machine: &Proxy<IMachine>) -> ApiResult<bool> {
    let end = Instant::now() + END_LIMIT;
    loop {
        let state = machine.read(IMachine::State)?;
        if !state.is_online() {
            return Ok(state == MachineState::PoweredOff);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn keyboard(console: &Proxy<IConsole>) -> Result<Proxy<IKeyboard>, Failure> {
    console.object(IConsole::Keyboard).context(|| "COMGETTER(Keyboard)(pKeyboard.asOutParam())".to_owned())
}

fn display(console: &Proxy<IConsole>) -> Result<Proxy<IDisplay>, Failure> {
    console.object(IConsole::Display).context(|| "COMGETTER(Display)(pDisplay.asOutParam())".to_owned())
}

fn type_codes(keyboard: &Proxy<IKeyboard>, codes: &[u8]) -> Done {
    for code in codes {
        keyboard
            .call(IKeyboard::PutScancode, (i32::from(*code),))
            .context(|| format!("PutScancode({code:#04x})"))?;
        std::thread::sleep(KEY_PAUSE);
    }
    Ok(())
}

fn file_codes(name: &str) -> Result<Vec<u8>, Failure> {
    let file = File::open(name).map_err(|e| Failure::Text(format!("Cannot open file '{name}': {e}.")))?;
    let mut text = Vec::new();
    file.take(MAX_TYPED + 1)
        .read_to_end(&mut text)
        .map_err(|e| Failure::Text(format!("Cannot read file '{name}': {e}.")))?;
    if text.len() as u64 > MAX_TYPED {
        return Err(Failure::Text(format!("File size is greater than {MAX_TYPED}: '{name}'.")));
    }
    let mut typist = Typist::default();
    typist.put(&text);
    Ok(typist.finish())
}

fn screenshot(console: &Proxy<IConsole>, name: &str, screen: u32) -> Done {
    let display = display(console)?;
    let (width, height, ..) = display
        .call(IDisplay::GetScreenResolution, (screen,))
        .context(|| format!("GetScreenResolution({screen})"))?;
    let picture =
        display
            .call(IDisplay::TakeScreenShotToArray, (screen, width, height, BitmapFormat::PNG))
            .context(|| format!("TakeScreenShotToArray({screen}, {width}, {height}, BitmapFormat_PNG)"))?;
    let mut file =
        File::create(name).map_err(|e| Failure::Text(format!("Failed to create file '{name}' ({e}).")))?;
    file.write_all(&picture.0)
        .map_err(|e| Failure::Text(format!("Failed to write screenshot to file '{name}' ({e}).")))
}
