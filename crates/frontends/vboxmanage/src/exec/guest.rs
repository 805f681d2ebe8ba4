//! Guest properties, shared folders, saved states, extension packs.

use std::time::{Duration, Instant};

use main_api::enums::LockType;
use main_api::idl::*;
use main_api::{Proxy, Session};

use super::{Context, Done, Failure, Run, absolute};
use crate::parse::guest::{DiscardState, Enumerate, ExtPack, GuestProperty, SharedFolder};
use crate::print::guest::{Property, property_table};

impl Run<'_> {
    /// The machine under a shared lock, which also reaches it while it runs.
    pub(super) fn shared(&self, vm: &str) -> Result<(Session, Proxy<IMachine>), Failure> {
        let machine = self.find(vm)?;
        let session = self
            .client
            .lock_machine(&machine, LockType::Shared)
            .context(|| "LockMachine(a->session, LockType_Shared)".to_owned())?;
        let machine = session.machine().context(|| "COMGETTER(Machine)".to_owned())?;
        Ok((session, machine))
    }

    pub(super) fn guest_property(&mut self, request: GuestProperty) -> Done {
        match request {
            GuestProperty::Get { vm, name, verbose } => {
                let machine = self.find(&vm)?;
                let (value, timestamp, flags) = machine
                    .call(IMachine::GetGuestProperty, (name.clone(),))
                    .context(|| format!("GetGuestProperty({name})"))?;
                let mut text = match value.as_str() {
                    "" => "No value set!\n".to_owned(),
                    value => format!("Value: {value}\n"),
                };
                if verbose && !value.is_empty() {
                    text += &format!("Timestamp: {timestamp}\nFlags: {flags}\n");
                }
                self.print(&text)
            }
            GuestProperty::Set { vm, name, value, flags } => {
                let (session, machine) = self.shared(&vm)?;
                match flags {
                    Some(flags) => machine
                        .call(IMachine::SetGuestProperty, (name, value, flags))
                        .context(|| "SetGuestProperty()".to_owned())?,
                    None => machine
                        .call(IMachine::SetGuestPropertyValue, (name, value))
                        .context(|| "SetGuestPropertyValue()".to_owned())?,
                }
                session.unlock().context(|| "UnlockMachine()".to_owned())
            }
            GuestProperty::Delete { vm, name } => {
                let (session, machine) = self.shared(&vm)?;
                machine
                    .call(IMachine::DeleteGuestProperty, (name,))
                    .context(|| "DeleteGuestProperty()".to_owned())?;
                session.unlock().context(|| "UnlockMachine()".to_owned())
            }
            GuestProperty::Enumerate(request) => self.enumerate(&request),
            GuestProperty::Wait { vm, patterns, timeout, fail } => {
                self.wait_property(&vm, &patterns, timeout, fail)
            }
        }
    }

    fn enumerate(&mut self, request: &Enumerate) -> Done {
        let machine = self.find(&request.vm)?;
        let (names, values, times, flags) = machine
            .call(IMachine::EnumerateGuestProperties, (request.patterns.clone(),))
            .context(|| "EnumerateGuestProperties()".to_owned())?;
        let all = names.into_iter().zip(values).zip(times.into_iter().zip(flags));
        let mut all: Vec<Property> = all
            .map(|((name, value), (timestamp, flags))| Property { name, value, timestamp, flags })
            .collect();
        if request.sort {
            all.sort_by(|a, b| a.name.cmp(&b.name));
        }
        self.print(&property_table(&all, request))
    }

    /// Waits for a change of a property that one of the patterns names.
    fn wait_property(&mut self, vm: &str, patterns: &str, timeout: Option<u32>, fail: bool) -> Done {
        let machine = self.find(vm)?;
        let context = || "EnumerateGuestProperties()".to_owned();
        let read = || {
            let (names, values, times, flags) =
                machine.call(IMachine::EnumerateGuestProperties, (patterns.to_owned(),))?;
            let all = names.into_iter().zip(values).zip(times.into_iter().zip(flags));
            Ok(all.map(|((n, v), (t, f))| (n, v, t, f)).collect::<Vec<_>>())
        };
        let before = read().context(context)?;
        let limit = timeout.map(|ms| Instant::now() + Duration::from_millis(ms.into()));
        loop {
            let now = read().context(context)?;
            let new = now.iter().find(|p| !before.contains(p));
            let gone = before.iter().find(|p| !now.iter().any(|n| n.0 == p.0));
            if let Some((name, value, _, flags)) = new {
                return self.print(&format!("Name: {name}, value: {value}, flags: {flags}\n"));
            }
            if let Some((name, ..)) = gone {
                return self.print(&format!("Property {name} was deleted\n"));
            }
            if limit.is_some_and(|end| Instant::now() >= end) {
                if fail {
                    return Err(Failure::Text(
                        "Time out or interruption while waiting for a notification.".into(),
                    ));
                }
                self.stderr
                    .put("VBoxManage: warning: Time out or interruption while waiting for a notification.\n");
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    pub(super) fn shared_folder(&mut self, request: SharedFolder) -> Done {
        match request {
            // What lives only as long as the VM would be kept by its process; none serves folders to the guest yet.
            SharedFolder::Add { vm, transient: true, .. }
            | SharedFolder::Remove { vm, transient: true, .. } => {
                self.find(&vm)?;
                Err(super::not_available("A transient shared folder"))
            }
            SharedFolder::Add { vm, name, host_path, read_only, automount, mount_point, .. } => {
                let path = absolute(&host_path)?;
                let (session, machine) = self.shared(&vm)?;
                machine
                    .call(IMachine::CreateSharedFolder, (name, path, !read_only, automount, mount_point))
                    .context(|| "CreateSharedFolder()".to_owned())?;
                machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
                session.unlock().context(|| "UnlockMachine()".to_owned())
            }
            SharedFolder::Remove { vm, name, .. } => {
                let (session, machine) = self.shared(&vm)?;
                machine
                    .call(IMachine::RemoveSharedFolder, (name,))
                    .context(|| "RemoveSharedFolder(Bstr(pszName).raw())".to_owned())?;
                machine.call(IMachine::SaveSettings, ()).context(|| "SaveSettings()".to_owned())?;
                session.unlock().context(|| "UnlockMachine()".to_owned())
            }
        }
    }

    pub(super) fn discard_state(&mut self, request: DiscardState) -> Done {
        let (session, machine) = self.shared(&request.vm)?;
        machine
            .call(IMachine::DiscardSavedState, (true,))
            .context(|| "DiscardSavedState(true)".to_owned())?;
        session.unlock().context(|| "UnlockMachine()".to_owned())
    }

    pub(super) fn ext_pack(&mut self, request: ExtPack) -> Done {
        match request {
            ExtPack::Install => Err(super::not_available("The installation of extension packs")),
            ExtPack::Uninstall(name) => {
                Err(Failure::Text(format!("No extension pack by the name '{name}' was found")))
            }
            ExtPack::Cleanup => self.print("Successfully performed extension pack cleanup\n"),
        }
    }
}
