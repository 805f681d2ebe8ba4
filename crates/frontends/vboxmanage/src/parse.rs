//! From words to typed requests. Nothing here touches an object or a file.

pub mod appliance;
pub mod bandwidth;
pub mod control;
pub mod debug;
pub mod global;
pub mod guest;
pub mod machine;
pub mod medium;
pub mod medium_ops;
pub mod modifyvm;
pub mod networks;
pub mod storage;

use crate::usage::{Parsed, UsageError};

/// A command line, understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    CreateVm(machine::CreateVm),
    RegisterVm(machine::RegisterVm),
    UnregisterVm(machine::UnregisterVm),
    StartVm(machine::StartVm),
    ShowVmInfo(machine::ShowVmInfo),
    ModifyVm(modifyvm::ModifyVm),
    StorageCtl(storage::StorageCtl),
    StorageAttach(storage::StorageAttach),
    ControlVm(control::ControlVm),
    CreateMedium(medium::CreateMedium),
    CloseMedium(medium::CloseMedium),
    ShowMediumInfo(medium::ShowMediumInfo),
    ModifyMedium(medium_ops::ModifyMedium),
    CloneMedium(medium_ops::CloneMedium),
    MediumProperty(medium_ops::MediumProperty),
    ConvertFromRaw(medium_ops::ConvertFromRaw),
    MediumIo(medium_ops::MediumIo),
    EncryptMedium(medium_ops::EncryptMedium),
    CheckMediumPwd(medium_ops::CheckMediumPwd),
    List(global::List),
    GetExtraData(global::GetExtraData),
    SetExtraData(global::SetExtraData),
    SetProperty(global::SetProperty),
    Import(appliance::Import),
    Export(appliance::Export),
    CloneVm(appliance::CloneVm),
    GuestProperty(guest::GuestProperty),
    SharedFolder(guest::SharedFolder),
    DiscardState(guest::DiscardState),
    ExtPack(guest::ExtPack),
    DebugVm(debug::DebugVm),
    HostOnlyIf(networks::HostOnlyIf),
    HostOnlyNet(networks::HostOnlyNet),
    DhcpServer(networks::DhcpServer),
    NatNetwork(networks::NatNetwork),
    BandwidthCtl(bandwidth::BandwidthCtl),
}

/// A command of VirtualBox 7.0. `parse` is missing where there is nothing behind the command yet.
pub struct Command {
    pub name: &'static str,
    /// The command's section of the help, which old names share with the new one.
    pub topic: &'static str,
    pub parse: Option<fn(&[String]) -> Parsed<Request>>,
}

const fn command(name: &'static str, parse: fn(&[String]) -> Parsed<Request>) -> Command {
    Command { name, topic: name, parse: Some(parse) }
}

const fn old_name(
    name: &'static str,
    topic: &'static str,
    parse: fn(&[String]) -> Parsed<Request>,
) -> Command {
    Command { name, topic, parse: Some(parse) }
}

const fn missing(name: &'static str) -> Command {
    Command { name, topic: name, parse: None }
}

/// Every command, in VirtualBox's order.
pub static COMMANDS: &[Command] = &[
    command("list", global::list),
    command("showvminfo", machine::showvminfo),
    command("registervm", machine::registervm),
    command("unregistervm", machine::unregistervm),
    command("clonevm", appliance::clonevm),
    missing("movevm"),
    missing("encryptvm"),
    command("mediumproperty", medium_ops::mediumproperty),
    old_name("hdproperty", "mediumproperty", medium_ops::mediumproperty),
    command("createmedium", medium::createmedium),
    old_name("createhd", "createmedium", medium::createmedium),
    old_name("createvdi", "createmedium", medium::createmedium),
    command("modifymedium", medium_ops::modifymedium),
    old_name("modifyhd", "modifymedium", medium_ops::modifymedium),
    old_name("modifyvdi", "modifymedium", medium_ops::modifymedium),
    command("clonemedium", medium_ops::clonemedium),
    old_name("clonehd", "clonemedium", medium_ops::clonemedium),
    old_name("clonevdi", "clonemedium", medium_ops::clonemedium),
    command("encryptmedium", medium_ops::encryptmedium),
    command("checkmediumpwd", medium_ops::checkmediumpwd),
    command("createvm", machine::createvm),
    command("modifyvm", |words| modifyvm::parse(words).map(Request::ModifyVm)),
    command("startvm", machine::startvm),
    command("controlvm", control::controlvm),
    missing("unattended"),
    command("discardstate", guest::discardstate),
    missing("adoptstate"),
    missing("snapshot"),
    command("closemedium", medium::closemedium),
    command("storageattach", storage::storageattach),
    command("storagectl", storage::storagectl),
    command("showmediuminfo", medium::showmediuminfo),
    old_name("showhdinfo", "showmediuminfo", medium::showmediuminfo),
    old_name("showvdiinfo", "showmediuminfo", medium::showmediuminfo),
    command("mediumio", medium_ops::mediumio),
    command("getextradata", global::getextradata),
    command("setextradata", global::setextradata),
    command("setproperty", global::setproperty),
    missing("usbfilter"),
    command("sharedfolder", guest::sharedfolder),
    command("guestproperty", guest::guestproperty),
    missing("guestcontrol"),
    missing("metrics"),
    command("import", appliance::import),
    command("export", appliance::export),
    missing("signova"),
    command("hostonlyif", networks::hostonlyif),
    command("hostonlynet", networks::hostonlynet),
    command("dhcpserver", networks::dhcpserver),
    command("natnetwork", networks::natnetwork),
    command("extpack", guest::extpack),
    command("bandwidthctl", bandwidth::bandwidthctl),
    command("debugvm", debug::debugvm),
    command("convertfromraw", medium_ops::convertfromraw),
    old_name("convertdd", "convertfromraw", medium_ops::convertfromraw),
    missing("usbdevsource"),
    missing("cloudprofile"),
    missing("cloud"),
    missing("updatecheck"),
    missing("modifynvram"),
];

/// The command called `name`.
pub fn find_command(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// Takes the first free word as the operand, refuses a second one.
fn operand(slot: &mut Option<String>, word: String) -> Parsed<()> {
    if slot.is_some() {
        return Err(UsageError::invalid_parameter(&word));
    }
    *slot = Some(word);
    Ok(())
}

#[cfg(test)]
fn words(line: &str) -> Vec<String> {
    line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned).collect()
}
