//! Carries requests out through the Main API and hands what there is to see to [`crate::print`].

mod appliance;
mod bandwidth;
mod control;
mod debug;
mod global;
mod guest;
mod machine;
mod medium;
mod medium_ops;
mod modifyvm;
mod networks;
mod storage;
mod vminfo;

use std::panic::Location;
use std::path::PathBuf;

use main_api::idl::{IMachine, IProgress};
use main_api::{ApiError, ApiResult, Client, Proxy};

use crate::global::{Global, SettingsPassword};
use crate::parse::Request;
use crate::parse::medium::MediumKind;
use crate::print;
use crate::print::error::Stderr;
use crate::{FAILURE, SUCCESS, SYNTAX};

/// Why a command failed.
pub(crate) enum Failure {
    /// The API refused: what was being done, and where.
    Api { error: ApiError, context: String, location: &'static Location<'static> },
    /// Something that is ours to say.
    Text(String),
    /// A command line that the machine's settings turn out not to allow.
    Syntax(String),
    /// Everything has been said.
    Silent,
}

pub(crate) type Done = Result<(), Failure>;

/// Adds to an error what was being done.
pub(crate) trait Context<T> {
    #[track_caller]
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T> Context<T> for ApiResult<T> {
    #[track_caller]
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Failure> {
        let location = Location::caller();
        self.map_err(|error| Failure::Api { error, context: context(), location })
    }
}

/// What a command works with.
pub(crate) struct Run<'a> {
    client: Client,
    stderr: &'a mut Stderr,
    detailed_progress: bool,
}

/// Carries out `request`; the exit status.
pub(crate) fn run(request: Request, global: &Global, stderr: &mut Stderr) -> u8 {
    if let Some(SettingsPassword::File(file)) = &global.settings_password {
        // No settings are encrypted with it, but a file that is not there is an error as ever.
        if let Err(error) = std::fs::File::open(file) {
            stderr.error(&format!("Cannot open file \"{file}\" ({error})"));
            return FAILURE;
        }
    }
    if let Request::ConvertFromRaw(request) = request {
        // Files alone: no service is started for it.
        return match medium_ops::convert_from_raw(request, stderr) {
            Ok(()) => SUCCESS,
            Err(failure) => {
                report(stderr, failure);
                FAILURE
            }
        };
    }
    let client = match Client::connect() {
        Ok(client) => client,
        Err(error) => {
            stderr.error("Failed to create the VirtualBox object!");
            stderr.error(&format!("{error}\nDetails: {}", error.details()));
            return FAILURE;
        }
    };
    let topic = topic(&request);
    let mut run = Run { client, stderr, detailed_progress: global.detailed_progress };
    match run.dispatch(request) {
        Ok(()) => SUCCESS,
        Err(Failure::Syntax(text)) => {
            run.stderr.logo();
            run.stderr.syntax(&text, &crate::help::usage(topic));
            SYNTAX
        }
        Err(failure) => {
            run.report(failure);
            FAILURE
        }
    }
}

/// The command's section of the help.
fn topic(request: &Request) -> &'static str {
    match request {
        Request::CreateVm(_) => "createvm",
        Request::RegisterVm(_) => "registervm",
        Request::UnregisterVm(_) => "unregistervm",
        Request::StartVm(_) => "startvm",
        Request::ShowVmInfo(_) => "showvminfo",
        Request::ModifyVm(_) => "modifyvm",
        Request::StorageCtl(_) => "storagectl",
        Request::StorageAttach(_) => "storageattach",
        Request::ControlVm(_) => "controlvm",
        Request::CreateMedium(_) => "createmedium",
        Request::CloseMedium(_) => "closemedium",
        Request::ShowMediumInfo(_) => "showmediuminfo",
        Request::ModifyMedium(_) => "modifymedium",
        Request::CloneMedium(_) => "clonemedium",
        Request::MediumProperty(_) => "mediumproperty",
        Request::ConvertFromRaw(_) => "convertfromraw",
        Request::MediumIo(_) => "mediumio",
        Request::EncryptMedium(_) => "encryptmedium",
        Request::CheckMediumPwd(_) => "checkmediumpwd",
        Request::List(_) => "list",
        Request::GetExtraData(_) => "getextradata",
        Request::SetExtraData(_) => "setextradata",
        Request::SetProperty(_) => "setproperty",
        Request::Import(_) => "import",
        Request::Export(_) => "export",
        Request::CloneVm(_) => "clonevm",
        Request::GuestProperty(_) => "guestproperty",
        Request::SharedFolder(_) => "sharedfolder",
        Request::DiscardState(_) => "discardstate",
        Request::ExtPack(_) => "extpack",
        Request::DebugVm(_) => "debugvm",
        Request::HostOnlyIf(_) => "hostonlyif",
        Request::HostOnlyNet(_) => "hostonlynet",
        Request::DhcpServer(_) => "dhcpserver",
        Request::NatNetwork(_) => "natnetwork",
        Request::BandwidthCtl(_) => "bandwidthctl",
    }
}

/// Tells the user.
fn report(stderr: &mut Stderr, failure: Failure) {
    match failure {
        Failure::Api { error, context, location } => stderr.api(&error, &context, location),
        Failure::Text(text) | Failure::Syntax(text) => stderr.error(&text),
        Failure::Silent => {}
    }
}

impl Run<'_> {
    fn dispatch(&mut self, request: Request) -> Done {
        match request {
            Request::CreateVm(request) => self.create_vm(request),
            Request::RegisterVm(request) => self.register_vm(request),
            Request::UnregisterVm(request) => self.unregister_vm(request),
            Request::StartVm(request) => self.start_vm(request),
            Request::ShowVmInfo(request) => self.show_vm_info(request),
            Request::ModifyVm(request) => self.modify_vm(request),
            Request::StorageCtl(request) => self.storage_ctl(request),
            Request::StorageAttach(request) => self.storage_attach(request),
            Request::ControlVm(request) => self.control_vm(request),
            Request::CreateMedium(request) => self.create_medium(request),
            Request::CloseMedium(request) => self.close_medium(request),
            Request::ShowMediumInfo(request) => self.show_medium_info(request),
            Request::ModifyMedium(request) => self.modify_medium(request),
            Request::CloneMedium(request) => self.clone_medium(request),
            Request::MediumProperty(request) => self.medium_property(request),
            Request::MediumIo(request) => self.medium_io(request),
            Request::EncryptMedium(request) => self.encrypt_medium(request),
            Request::CheckMediumPwd(request) => self.check_medium_password(request),
            Request::ConvertFromRaw(request) => medium_ops::convert_from_raw(request, self.stderr),
            Request::List(request) => self.list(request),
            Request::GetExtraData(request) => self.get_extra_data(request),
            Request::SetExtraData(request) => self.set_extra_data(request),
            Request::SetProperty(request) => self.set_property(request),
            Request::Import(request) => self.import(request),
            Request::Export(request) => self.export(request),
            Request::CloneVm(request) => self.clone_vm(request),
            Request::GuestProperty(request) => self.guest_property(request),
            Request::SharedFolder(request) => self.shared_folder(request),
            Request::DiscardState(request) => self.discard_state(request),
            Request::ExtPack(request) => self.ext_pack(request),
            Request::DebugVm(request) => self.debug_vm(request),
            Request::HostOnlyIf(request) => self.host_only_if(request),
            Request::HostOnlyNet(request) => self.host_only_net(request),
            Request::DhcpServer(request) => self.dhcp_server(request),
            Request::NatNetwork(request) => self.nat_network(request),
            Request::BandwidthCtl(request) => self.bandwidth_ctl(request),
        }
    }

    /// Tells the user.
    fn report(&mut self, failure: Failure) {
        report(self.stderr, failure);
    }

    /// Writes data. A broken pipe ends the command as a failure, without a word.
    fn print(&self, text: &str) -> Done {
        if print::stdout(text) == SUCCESS { Ok(()) } else { Err(Failure::Silent) }
    }

    /// A registered machine, by name or UUID.
    #[track_caller]
    fn find(&self, name: &str) -> Result<Proxy<IMachine>, Failure> {
        self.client
            .find_machine(name)
            .context(|| format!("FindMachine(Bstr(\"{name}\"), machine.asOutParam())"))
    }

    /// Draws the progress bar until the operation has ended; its error is the result.
    fn watch(&mut self, progress: &Proxy<IProgress>) -> ApiResult<()> {
        let detailed = self.detailed_progress;
        if !detailed {
            self.stderr.put("0%...");
        }
        let mut last = 0;
        let stderr = &mut *self.stderr;
        let result = progress.wait(|state| {
            if detailed {
                stderr.put(&print::progress::detailed(
                    state.operation,
                    state.operation_count,
                    &state.operation_description,
                    state.operation_percent,
                    state.percent,
                    -1,
                ));
            } else if !state.completed || state.result_code == 0 {
                stderr.put(&print::progress::steps(last, state.percent));
                last = last.max(state.percent);
            }
        });
        match &result {
            Ok(()) if detailed => {}
            Ok(()) => self.stderr.put("100%\n"),
            Err(error) if detailed => self.stderr.put(&format!("Progress state: {}\n", error.code_name())),
            Err(error) => self.stderr.put(&format!("{}\n", error.code_name())),
        }
        result
    }

    /// [`Self::watch`], with a sentence before the operation's error.
    #[track_caller]
    fn finish(&mut self, progress: &Proxy<IProgress>, context: &str, failed: &str) -> Done {
        let location = Location::caller();
        self.watch(progress).map_err(|error| {
            self.stderr.error(failed);
            Failure::Api { error, context: context.to_owned(), location }
        })
    }
}

/// `path` against the current directory. The service has another one.
fn absolute(path: &str) -> Result<String, Failure> {
    let text = |path: PathBuf| path.into_os_string().into_string().ok();
    std::path::absolute(path)
        .ok()
        .map(|path| clean(&path))
        .and_then(text)
        .ok_or_else(|| Failure::Text(format!("Cannot convert filename \"{path}\" to absolute path")))
}

/// Resolves `..` by text, as IPRT does, since the file need not exist.
fn clean(path: &std::path::Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            std::path::Component::ParentDir => {
                out.pop();
            }
            part => out.push(part),
        }
    }
    out
}

/// The device type of a kind of medium.
fn device_type(kind: MediumKind) -> main_api::enums::DeviceType {
    use main_api::enums::DeviceType;
    match kind {
        MediumKind::Disk => DeviceType::HardDisk,
        MediumKind::Dvd => DeviceType::DVD,
        MediumKind::Floppy => DeviceType::Floppy,
    }
}

/// The enumeration value called `name`, which the parser took from the same list of names.
fn named<T: main_api::enums::ApiEnum>(name: &str) -> Result<T, Failure> {
    T::from_name(name).ok_or_else(|| Failure::Text(format!("{} has no value '{name}'", T::TYPE_NAME)))
}

/// What to say of a part of VirtualBox that is not there yet.
fn not_available(what: &str) -> Failure {
    Failure::Text(format!("{what} is not available in this version of {}", print::PRODUCT))
}
