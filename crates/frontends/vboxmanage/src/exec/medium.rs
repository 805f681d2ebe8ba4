//! Media by themselves.

use std::fs::File;
use std::io::Read;

use main_api::enums::*;
use main_api::idl::*;
use main_api::{ApiResult, ObjRef, Proxy};
use vbox_types::ResultCode;

use super::{Context, Done, Failure, Run, absolute, device_type};
use crate::parse::medium::{
    CloseMedium, CreateMedium, MediumKind, MediumSource, PropertyValue, ShowMediumInfo,
};
use crate::print;
use crate::print::medium::{MediumInfo, Parent, User};

/// Greatest size of a file that holds a property's value.
const MAX_PROPERTY_FILE: u64 = 16 << 20;

impl Run<'_> {
    pub(super) fn create_medium(&mut self, request: CreateMedium) -> Done {
        let size = match request.source {
            MediumSource::Size(size) => size,
            MediumSource::Parent(parent) => {
                let variant = super::medium_ops::variants(request.variant)?;
                let file = absolute(&request.file)?;
                let id = self.create_diff(&parent, request.format, file, variant)?;
                return self.print(&format!("Medium created. UUID: {id}\n"));
            }
        };
        let size =
            i64::try_from(size).map_err(|_| Failure::Text(format!("A medium of {size} bytes is too big")))?;
        let access =
            if request.kind == MediumKind::Dvd { AccessMode::ReadOnly } else { AccessMode::ReadWrite };
        let file = absolute(&request.file)?;
        let medium = self
            .client
            .virtual_box()
            .call(
                IVirtualBox::CreateMedium,
                (request.format, file.clone(), access, device_type(request.kind)),
            )
            .context(|| format!("CreateMedium(Bstr(\"{file}\").raw(), pMedium.asOutParam())"))?;
        let medium = self.client.at(medium);
        for (name, value) in request.properties {
            let value = property_value(value)?;
            medium
                .call(IMedium::SetProperty, (name.clone(), value))
                .context(|| format!("SetProperty(Bstr(\"{name}\").raw())"))?;
        }
        let variant = super::medium_ops::variants(request.variant)?;
        let progress = medium.call(IMedium::CreateBaseStorage, (size, variant)).context(|| {
            "CreateBaseStorage(size, ComSafeArrayAsInParam(l_variants), pProgress.asOutParam())".to_owned()
        })?;
        let progress = self.client.at(progress);
        self.finish(&progress, "CreateBaseStorage(size)", "Failed to create medium")?;
        let id = medium.read(IMedium::Id).context(|| "COMGETTER(Id)(uuid.asOutParam())".to_owned())?;
        self.print(&format!("Medium created. UUID: {id}\n"))
    }

    pub(super) fn close_medium(&mut self, request: CloseMedium) -> Done {
        let access =
            if request.kind == MediumKind::Dvd { AccessMode::ReadOnly } else { AccessMode::ReadWrite };
        let medium = self.open_medium(&request.medium, device_type(request.kind), access, false)?;
        let medium = self.client.at(medium);
        if request.delete {
            let progress = medium
                .call(IMedium::DeleteStorage, ())
                .context(|| "DeleteStorage(pProgress.asOutParam())".to_owned())?;
            let progress = self.client.at(progress);
            self.finish(&progress, "DeleteStorage()", "Failed to delete medium")?;
        }
        match medium.call(IMedium::Close, ()) {
            // With its storage gone, the medium may have left the registry already.
            Err(error)
                if request.delete
                    && (error.is(ResultCode::ObjectNotFound) || error.is(ResultCode::AccessDenied)) =>
            {
                Ok(())
            }
            done => done.context(|| "Close()".to_owned()),
        }
    }

    pub(super) fn show_medium_info(&mut self, request: ShowMediumInfo) -> Done {
        let kind = device_type(request.kind);
        let medium = self.open_medium(&request.medium, kind, AccessMode::ReadOnly, false)?;
        let medium = self.client.at(medium);
        let parent = medium.read(IMedium::Parent).context(|| "COMGETTER(Parent)".to_owned())?;
        let parent = match parent.non_null() {
            None => Parent::Base,
            Some(parent) => {
                Parent::Id(self.client.at(parent).read(IMedium::Id).context(|| "COMGETTER(Id)".to_owned())?)
            }
        };
        let info = self.medium_info(&medium, Some(parent)).context(|| "RefreshState()".to_owned())?;
        self.print(&print::medium::show(&info, true))
    }

    /// The media and, below each, those that depend on it.
    pub(super) fn media(
        &self,
        media: &[ObjRef<IMedium>],
        parent: Option<&Parent>,
        text: &mut String,
    ) -> ApiResult<()> {
        for reference in media {
            let medium = self.client.at(reference.clone());
            let info = self.medium_info(&medium, parent.cloned())?;
            text.push_str(&print::medium::show(&info, true));
            text.push('\n');
            let children = medium.read(IMedium::Children)?;
            self.media(&children, Some(&Parent::Id(info.id)), text)?;
        }
        Ok(())
    }

    /// The short blocks of all media of a kind, in one round trip.
    pub(super) fn short_media(&self, kind: DeviceType) -> ApiResult<String> {
        let support = self.client.at::<IClientSupport>(ObjRef::new(main_api::paths::ROOT));
        let (ids, parents, states, types, locations, formats, sizes, encrypted) =
            support.call(IClientSupport::ListMedia, (kind,))?;
        let mut text = String::new();
        let rest = parents.into_iter().zip(states).zip(types).zip(locations).zip(formats).zip(sizes);
        for ((id, rest), encrypted) in ids.into_iter().zip(rest).zip(encrypted) {
            let (((((parent, state), kind_of), location), format), logical_size) = rest;
            let parent = match kind {
                DeviceType::HardDisk if parent.is_empty() => Some(Parent::Base),
                DeviceType::HardDisk => Some(Parent::Id(parent)),
                _ => None,
            };
            let info = MediumInfo {
                id,
                parent,
                state,
                access_error: String::new(),
                description: String::new(),
                kind: kind_of,
                auto_reset: false,
                location,
                format,
                variant: Vec::new(),
                logical_size,
                size: 0,
                properties: Vec::new(),
                users: Vec::new(),
                children: Vec::new(),
                encryption: encrypted.then(Default::default),
            };
            text.push_str(&print::medium::show(&info, false));
            text.push('\n');
        }
        Ok(text)
    }

    fn medium_info(&self, medium: &Proxy<IMedium>, parent: Option<Parent>) -> ApiResult<MediumInfo> {
        let state = medium.call(IMedium::RefreshState, ())?;
        let all = medium.attributes()?;
        let (mut users, mut children, mut properties) = (Vec::new(), Vec::new(), Vec::new());
        for id in all.read(IMedium::MachineIds)? {
            users.push(self.user(medium, id)?);
        }
        for child in all.read(IMedium::Children)? {
            children.push(self.client.at(child).read(IMedium::Id)?);
        }
        // A format without properties may answer with an error; then there is nothing to show.
        if let Ok((names, values)) = medium.call(IMedium::GetProperties, (String::new(),)) {
            properties = names.into_iter().zip(values).collect();
        }
        Ok(MediumInfo {
            id: all.read(IMedium::Id)?,
            parent,
            state,
            access_error: all.read(IMedium::LastAccessError)?,
            description: all.read(IMedium::Description)?,
            kind: all.read(IMedium::Type)?,
            auto_reset: all.read(IMedium::AutoReset)?,
            location: all.read(IMedium::Location)?,
            format: all.read(IMedium::Format)?,
            variant: all.read(IMedium::Variant)?,
            logical_size: all.read(IMedium::LogicalSize)?,
            size: all.read(IMedium::Size)?,
            users,
            children,
            encryption: medium.call(IMedium::GetEncryptionSettings, ()).map_or_else(
                // What is wrong with its key store does not make it another medium.
                |error| (!error.is(ResultCode::NotSupported)).then(Default::default),
                Some,
            ),
            properties,
        })
    }

    fn user(&self, medium: &Proxy<IMedium>, id: String) -> ApiResult<User> {
        let machine = self.client.find_machine(&id)?;
        let name = machine.read(IMachine::Name)?;
        let ids = medium.call(IMedium::GetSnapshotIds, (id.clone(),))?;
        let mut snapshots = Vec::new();
        // The machine itself is in the list under its own id.
        if ids.iter().any(|snapshot| *snapshot != id) {
            let tree = machine.tree()?;
            let mut open = Vec::new();
            let current = tree.read(&machine.reference(), IMachine::CurrentSnapshot)?;
            if let Some(mut root) = current.non_null() {
                while let Some(parent) = tree.read(&root, ISnapshot::Parent)?.non_null() {
                    root = parent;
                }
                open.push(root);
            }
            while let Some(snapshot) = open.pop() {
                let id = tree.read(&snapshot, ISnapshot::Id)?;
                if ids.contains(&id) {
                    snapshots.push((tree.read(&snapshot, ISnapshot::Name)?, id));
                }
                open.extend(tree.read(&snapshot, ISnapshot::Children)?);
            }
        }
        Ok(User { name, id, snapshots })
    }
}

fn property_value(value: PropertyValue) -> Result<String, Failure> {
    let file = match value {
        PropertyValue::Text(text) => return Ok(text),
        PropertyValue::File(file) => file,
    };
    let fail = |error| Failure::Text(format!("Cannot open replacement value file '{file}': {error}"));
    let mut bytes = Vec::new();
    File::open(&file)
        .and_then(|opened| opened.take(MAX_PROPERTY_FILE + 1).read_to_end(&mut bytes))
        .map_err(fail)?;
    if bytes.len() as u64 > MAX_PROPERTY_FILE {
        return Err(Failure::Text(format!("Replacement value file '{file}' is to big, max 16MiB")));
    }
    String::from_utf8(bytes)
        .map_err(|_| Failure::Text(format!("Replacement value file '{file}' is not valid UTF-8")))
}
