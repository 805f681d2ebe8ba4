//! Making, registering, starting and showing machines.

use std::fs::File;
use std::io::{self, Read};
use std::panic::Location;

use main_api::enums::{CleanupMode, LockType};
use main_api::idl::{IConsole, IMachine, IMedium, IVirtualBox};
use main_api::{ApiError, ObjRef};
use vbox_types::ResultCode;
use zeroize::Zeroizing;

use super::{Context, Done, Failure, Run, absolute, not_available};
use crate::parse::machine::{
    CreateVm, Details, PasswordSource, RegisterVm, ShowVmInfo, StartVm, UnregisterVm,
};
use crate::print::fmt::Form;
use crate::print::vminfo;
use crate::{SUCCESS, print};

/// Reads the first line of a password file; `stdin` stands for standard input.
pub(super) fn read_password_file(file: &str) -> Result<String, Failure> {
    // Passwords are short; a wrong file need not be read as a whole.
    const LIMIT: u64 = 16 << 10;
    let mut text = Vec::new();
    let read = if file == "stdin" {
        io::stdin().take(LIMIT).read_to_end(&mut text)
    } else {
        let file = File::open(file)
            .map_err(|error| Failure::Text(format!("Cannot open password file '{file}' ({error})")))?;
        file.take(LIMIT).read_to_end(&mut text)
    };
    read.map_err(|error| Failure::Text(format!("Cannot read from password file '{file}' ({error})")))?;
    let line = text.split(|byte| matches!(byte, b'\n' | b'\r')).next().unwrap_or_default();
    String::from_utf8(line.to_vec())
        .map_err(|_| Failure::Text(format!("The password in file '{file}' is not valid UTF-8")))
}

/// Reads a password: the first line of a file, or of what is typed at the terminal, unseen, for `-`.
pub(super) fn read_password(file: &str, prompt: &str) -> Result<Zeroizing<String>, Failure> {
    if file != "-" {
        return read_password_file(file).map(Zeroizing::new);
    }
    print::stdout(prompt);
    let input = io::stdin();
    let before = rustix::termios::tcgetattr(&input).ok();
    if let Some(mut hidden) = before.clone() {
        hidden.local_modes.remove(rustix::termios::LocalModes::ECHO);
        let _ = rustix::termios::tcsetattr(&input, rustix::termios::OptionalActions::Now, &hidden);
    }
    let mut line = Zeroizing::new(String::new());
    let read = input.read_line(&mut line);
    if let Some(before) = before {
        let _ = rustix::termios::tcsetattr(&input, rustix::termios::OptionalActions::Now, &before);
    }
    print::stdout("\n");
    read.map_err(|error| Failure::Text(format!("Failed to read the password from the terminal ({error})")))?;
    Ok(Zeroizing::new(line.trim_end_matches(['\n', '\r']).to_owned()))
}

impl Run<'_> {
    pub(super) fn create_vm(&mut self, request: CreateVm) -> Done {
        if !request.cipher.is_empty() || !request.password_id.is_empty() || request.password.is_some() {
            return Err(not_available("The encryption of machines"));
        }
        let vbox = self.client.virtual_box();
        let flags = request.uuid.map(|uuid| format!("UUID={uuid}")).unwrap_or_default();
        let group = request.groups.first().cloned().unwrap_or_default();
        let folder =
            if request.base_folder.is_empty() { String::new() } else { absolute(&request.base_folder)? };
        let name = request.name;
        let file = vbox
            .call(IVirtualBox::ComposeMachineFilename, (name.clone(), group, flags.clone(), folder))
            .context(|| format!("ComposeMachineFilename({name})"))?;
        let machine = vbox
            .call(
                IVirtualBox::CreateMachine,
                (
                    file,
                    name.clone(),
                    request.groups,
                    request.os_type,
                    flags,
                    String::new(),
                    String::new(),
                    String::new(),
                ),
            )
            .context(|| format!("CreateMachine({name})"))?;
        let machine = self.client.at(machine);
        machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        if request.default {
            machine
                .call(IMachine::ApplyDefaults, (String::new(),))
                .context(|| "ApplyDefaults(bstrDefaultFlags.raw())".to_owned())?;
            machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
        }
        // Read before it is registered, since the object ends with that.
        let id = machine.read(IMachine::Id).context(|| "COMGETTER(Id)".to_owned())?;
        let file =
            machine.read(IMachine::SettingsFilePath).context(|| "COMGETTER(SettingsFilePath)".to_owned())?;
        let mut registered = "";
        if request.register {
            vbox.call(IVirtualBox::RegisterMachine, (machine.reference(),))
                .context(|| "RegisterMachine(machine)".to_owned())?;
            registered = " and registered";
        }
        self.print(&format!(
            "Virtual machine '{name}' is created{registered}.\nUUID: {id}\nSettings file: '{file}'\n"
        ))
    }

    pub(super) fn register_vm(&mut self, request: RegisterVm) -> Done {
        let password = match request.password {
            None => String::new(),
            Some(PasswordSource::File(file)) => read_password_file(&file.to_string_lossy())?,
            Some(PasswordSource::Terminal) => read_password_file("stdin")?,
        };
        let vbox = self.client.virtual_box();
        let file = absolute(&request.file)?;
        let machine = vbox.call(IVirtualBox::OpenMachine, (file.clone(), password)).context(|| {
            format!("OpenMachine(Bstr(\"{file}\"), Bstr(strPassword).raw(), machine.asOutParam())")
        })?;
        vbox.call(IVirtualBox::RegisterMachine, (machine,)).context(|| "RegisterMachine(machine)".to_owned())
    }

    pub(super) fn unregister_vm(&mut self, request: UnregisterVm) -> Done {
        let machine = self.find(&request.vm)?;
        let mode = if request.delete_all {
            CleanupMode::DetachAllReturnHardDisksAndVMRemovable
        } else {
            CleanupMode::DetachAllReturnHardDisksOnly
        };
        // The machine's object leaves the service's list with this call; what comes after needs its own reference.
        let media = machine
            .call(IMachine::Unregister, (mode,))
            .context(|| "Unregister(CleanupMode_DetachAllReturnHardDisksOnly)".to_owned())?;
        if request.delete || request.delete_all {
            let progress = machine.call(IMachine::DeleteConfig, (media,)).context(|| {
                "DeleteConfig(ComSafeArrayAsInParam(aMedia), pProgress.asOutParam())".to_owned()
            })?;
            let progress = self.client.at(progress);
            return self.finish(&progress, "DeleteConfig(aMedia)", "Machine delete failed");
        }
        for medium in media {
            // Another machine may use it; then it stays known.
            let _ = self.client.at::<IMedium>(medium).call(IMedium::Close, ());
        }
        Ok(())
    }

    pub(super) fn start_vm(&mut self, request: StartVm) -> Done {
        // Machines are not encrypted here; their disks may be.
        let password = match (request.password_id, request.password) {
            (Some(id), Some(source)) => {
                let file = match &source {
                    PasswordSource::File(file) => file.to_string_lossy().into_owned(),
                    PasswordSource::Terminal => "-".to_owned(),
                };
                Some((id, read_password(&file, "Enter password:")?))
            }
            _ => None,
        };
        // The VM's window, if it has one, opens where this command was given.
        let mut environment = Vec::new();
        for name in ["DISPLAY", "XAUTHORITY"] {
            if let Ok(value) = std::env::var(name) {
                environment.push(format!("{name}={value}"));
            }
        }
        environment.extend(request.environment);
        let mut failed = false;
        for vm in &request.vms {
            let started =
                self.start_one(vm, &request.front_end, &environment).and_then(|()| match &password {
                    Some((id, password)) => self.add_password(vm, id, password),
                    None => Ok(()),
                });
            if let Err(failure) = started {
                self.report(failure);
                failed = true;
            }
        }
        if failed { Err(Failure::Silent) } else { Ok(()) }
    }

    /// Gives a running machine the password of its encrypted disks.
    fn add_password(&mut self, vm: &str, id: &str, password: &str) -> Done {
        let machine = self.find(vm)?;
        let session = self
            .client
            .lock_machine(&machine, LockType::Shared)
            .context(|| "LockMachine(a->session, LockType_Shared)".to_owned())?;
        let console = session.console().context(|| "COMGETTER(Console)(console.asOutParam())".to_owned())?;
        let args = (id.to_owned(), password.to_owned(), false);
        console.call(IConsole::AddEncryptionPassword, args).context(|| {
            "AddEncryptionPassword(Bstr(pszPasswordId).raw(), Bstr(strPassword).raw(), FALSE)".to_owned()
        })
    }

    fn start_one(&mut self, vm: &str, front_end: &str, environment: &[String]) -> Done {
        let machine = self.find(vm)?;
        let session = self.client.create_session().context(|| "CreateSession()".to_owned())?;
        let progress = machine
            .call(
                IMachine::LaunchVMProcess,
                (session.reference(), front_end.to_owned(), environment.to_vec()),
            )
            .context(|| {
                "LaunchVMProcess(a->session, sessionType.raw(), ComSafeArrayAsInParam(aBstrEnv), \
                 progress.asOutParam())"
                    .to_owned()
            })?;
        // An emergency stop has no progress.
        let Some(progress) = progress.non_null() else { return Ok(()) };
        self.print(&format!("Waiting for VM \"{vm}\" to power on...\n"))?;
        let location = Location::caller();
        self.client.at(progress).wait(|_| {}).map_err(|error| Failure::Api {
            error,
            context: "LaunchVMProcess(progress)".to_owned(),
            location,
        })?;
        self.print(&format!("VM \"{vm}\" has been successfully started.\n"))
    }

    pub(super) fn show_vm_info(&mut self, request: ShowVmInfo) -> Done {
        let machine = self.find(&request.vm)?;
        let form = match request.details {
            Details::Standard | Details::Full => Form::Human,
            Details::MachineReadable => Form::Machine,
            Details::Log(index) => {
                let file = machine
                    .call(IMachine::QueryLogFilename, (index,))
                    .context(|| format!("ReadLog({index})"))?;
                return show_log(&file).context(|| format!("ReadLog({index})"))?;
            }
        };
        let vm = self.vm_info(&machine, true).context(|| "showVMInfo()".to_owned())?;
        self.print(&vminfo::show(&vm, form))
    }
}

/// Copies a log file to standard output, without carriage returns.
fn show_log(file: &str) -> Result<Done, ApiError> {
    let fail = |error: io::Error| {
        ApiError::new(ResultCode::FileError, format!("Could not read log file '{file}' ({error})"))
            .on("IMachine")
    };
    let mut log = File::open(file).map_err(fail)?;
    let mut chunk = vec![0; 1 << 20];
    loop {
        let count = log.read(&mut chunk).map_err(fail)?;
        if count == 0 {
            return Ok(Ok(()));
        }
        let mut text = chunk[..count].to_vec();
        text.retain(|byte| *byte != b'\r');
        if print::stdout_bytes(&text) != SUCCESS {
            return Ok(Err(Failure::Silent));
        }
    }
}

/// A reference of a machine, spelt out where types need help.
pub(super) type MachineRef = ObjRef<IMachine>;
