//! `modifymedium`, `clonemedium`, `mediumproperty`, `convertfromraw` and `mediumio`. The last two work on the files themselves.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::*;
use main_api::idl::*;
use main_api::{ObjRef, Proxy};
use vbox_types::{ByteSize, ResultCode};
use vd::{CreateOptions, Format, Image, KeyStore, OpenMode, Source, Variant};

use super::machine::read_password;
use super::{Context, Done, Failure, Run, absolute, device_type, named};
use crate::parse::medium::MediumKind;
use crate::parse::medium_ops::{
    CheckMediumPwd, CloneMedium, ConvertFromRaw, EncryptMedium, IoAction, MediumIo, MediumProperty,
    ModifyMedium, PropertyAction,
};
use crate::print::error::Stderr;
use crate::print::hex::HexDump;

const MIB: u64 = 1 << 20;
/// Bytes that are read from an image at a time.
const PIECE: u64 = 128 << 10;

/// The property of an encrypted base medium with its key.
pub(super) const KEY_STORE: &str = "CRYPT/KeyStore";

/// How a medium of the kind is opened to be changed.
fn access(kind: MediumKind) -> AccessMode {
    if kind == MediumKind::Dvd { AccessMode::ReadOnly } else { AccessMode::ReadWrite }
}

/// The values of `MediumVariant` for the parser's names.
pub(super) fn variants(names: Vec<&'static str>) -> Result<Vec<MediumVariant>, Failure> {
    if names.is_empty() {
        return Ok(vec![MediumVariant::Standard]);
    }
    names.into_iter().map(named).collect()
}

fn text(error: &vd::Error) -> String {
    use std::error::Error as _;
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    format!("{error}{cause}")
}

impl Run<'_> {
    fn opened(&self, medium: &str, kind: MediumKind, access: AccessMode) -> Result<Proxy<IMedium>, Failure> {
        let medium = self.open_medium(medium, device_type(kind), access, false)?;
        Ok(self.client.at(medium))
    }

    pub(super) fn modify_medium(&mut self, request: ModifyMedium) -> Done {
        let medium = self.opened(&request.medium, request.kind, access(request.kind))?;
        if let Some((bytes, true)) = request.resize {
            self.check_size(&medium, bytes)?;
        }
        if let Some(name) = request.medium_type {
            let wanted = named(name)?;
            if medium.read(IMedium::Type).context(|| "COMGETTER(Type)(&enmCurrMediumType)".to_owned())?
                != wanted
            {
                medium
                    .write(IMedium::Type, wanted)
                    .context(|| "COMSETTER(Type)(enmMediumType)".to_owned())?;
            }
        }
        if let Some(on) = request.auto_reset {
            medium.write(IMedium::AutoReset, on).context(|| "COMSETTER(AutoReset)(AutoReset)".to_owned())?;
        }
        if !request.properties.is_empty() {
            medium.call(IMedium::SetProperties, request.properties.into_iter().unzip()).context(|| {
                "SetProperties(ComSafeArrayAsInParam(mediumPropNames), ComSafeArrayAsInParam(mediumPropValues))"
                    .to_owned()
            })?;
        }
        if request.compact {
            let progress =
                medium.call(IMedium::Compact, ()).context(|| "Compact(pProgress.asOutParam())".to_owned())?;
            let progress = self.client.at(progress);
            self.finish(&progress, "Compact()", "Failed to compact medium")?;
        }
        if let Some((bytes, _)) = request.resize {
            let size = i64::try_from(bytes)
                .map_err(|_| Failure::Text(format!("A medium of {bytes} bytes is too big")))?;
            let progress = medium
                .call(IMedium::Resize, (size,))
                .context(|| "Resize(cbResize, pProgress.asOutParam())".to_owned())?;
            let progress = self.client.at(progress);
            self.finish(&progress, "Resize(cbResize)", "Failed to resize medium")?;
        }
        if let Some(to) = request.move_to {
            let directory = if to.ends_with('/') { "/" } else { "" };
            let to = absolute(&to)? + directory;
            let progress = medium
                .call(IMedium::MoveTo, (to.clone(),))
                .context(|| format!("MoveTo(Bstr(\"{to}\").raw(), pProgress.asOutParam())"))?;
            let progress = self.client.at(progress);
            self.finish(&progress, "MoveTo()", "Failed to move medium")?;
            let id = medium.read(IMedium::Id).context(|| "COMGETTER(Id)(uuid.asOutParam())".to_owned())?;
            self.print(&format!("Move medium with UUID {id} finished\n"))?;
        }
        if let Some(location) = request.location {
            let location = absolute(&location)?;
            medium
                .write(IMedium::Location, location.clone())
                .context(|| format!("COMSETTER(Location)(Bstr(\"{location}\").raw())"))?;
            let id = medium.read(IMedium::Id).context(|| "COMGETTER(Id)(uuid.asOutParam())".to_owned())?;
            self.print(&format!("Set new location of medium with UUID {id} finished\n"))?;
        }
        if let Some(description) = request.description {
            medium
                .write(IMedium::Description, description)
                .context(|| "COMSETTER(Description)(Bstr(pszNewLocation).raw())".to_owned())?;
            self.print("Medium description has been changed.\n")?;
        }
        Ok(())
    }

    /// A new size so much larger than the old one was meant to be in bytes.
    fn check_size(&self, medium: &Proxy<IMedium>, bytes: u64) -> Done {
        medium.call(IMedium::RefreshState, ()).context(|| "RefreshState(&state)".to_owned())?;
        let now = medium.read(IMedium::LogicalSize).context(|| "COMGETTER(LogicalSize)".to_owned())?;
        let now = u64::try_from(now).unwrap_or(0);
        if bytes <= now.saturating_mul(1000) {
            return Ok(());
        }
        let megabytes = |bytes: u64| format!("{}.{}", bytes / MIB, bytes % MIB / (MIB / 10));
        Err(Failure::Text(format!(
            "Error: Attempt to resize the medium from {} MB to {} MB. Use --resizebyte if this is intended!",
            megabytes(now),
            megabytes(bytes)
        )))
    }

    pub(super) fn clone_medium(&mut self, request: CloneMedium) -> Done {
        let kind = device_type(request.kind);
        let source = self.opened(&request.source, request.kind, AccessMode::ReadOnly)?;
        let (target, format) = if request.existing {
            let target = self.opened(&request.target, request.kind, access(request.kind))?;
            target.call(IMedium::RefreshState, ()).context(|| "RefreshState(&state)".to_owned())?;
            let format = target
                .read(IMedium::Format)
                .context(|| "COMGETTER(Format)(format.asOutParam())".to_owned())?;
            (target, format)
        } else {
            let mut format = request.format;
            if format.is_empty() {
                // The source's, if images of it can be made.
                let own = source.read(IMedium::Format).context(|| "COMGETTER(MediumFormat)".to_owned())?;
                let known = Format::from_name(&own);
                let made =
                    |f: &Format| vd::can_create(*f, Variant::Dynamic) || vd::can_create(*f, Variant::Fixed);
                format = known.filter(made).map_or(String::new(), |_| own);
            }
            let file = absolute(&request.target)?;
            let target = self
                .client
                .virtual_box()
                .call(IVirtualBox::CreateMedium, (format.clone(), file.clone(), access(request.kind), kind))
                .context(|| format!("CreateMedium(Bstr(\"{file}\").raw(), pMedium.asOutParam())"))?;
            (self.client.at(target), format)
        };
        let variant = variants(request.variant)?;
        let none = ObjRef::null();
        let progress = match request.resize {
            Some(bytes) => {
                let size = i64::try_from(bytes)
                    .map_err(|_| Failure::Text(format!("A medium of {bytes} bytes is too big")))?;
                source
                    .call(IMedium::ResizeAndCloneTo, (target.reference(), size, variant, none))
                    .context(|| "ResizeAndCloneTo(pDstMedium, cbResize, l_variants, NULL)".to_owned())?
            }
            None => source.call(IMedium::CloneTo, (target.reference(), variant, none)).context(|| {
                "CloneTo(pDstMedium, ComSafeArrayAsInParam(l_variants), NULL, pProgress.asOutParam())"
                    .to_owned()
            })?,
        };
        let progress = self.client.at(progress);
        self.finish(&progress, "CloneTo(pDstMedium)", "Failed to clone medium")?;
        let id = target.read(IMedium::Id).context(|| "COMGETTER(Id)(uuid.asOutParam())".to_owned())?;
        self.print(&format!("Clone medium created in format '{format}'. UUID: {id}\n"))
    }

    pub(super) fn medium_property(&mut self, request: MediumProperty) -> Done {
        let medium = self.opened(&request.medium, request.kind, access(request.kind))?;
        let name = request.name;
        match request.action {
            PropertyAction::Set(value) => medium
                .call(IMedium::SetProperty, (name.clone(), value.clone()))
                .context(|| format!("SetProperty(Bstr(\"{name}\").raw(), Bstr(\"{value}\").raw())")),
            PropertyAction::Get => {
                medium.call(IMedium::RefreshState, ()).context(|| "RefreshState(&state)".to_owned())?;
                let value = medium
                    .call(IMedium::GetProperty, (name.clone(),))
                    .context(|| format!("GetProperty(Bstr(\"{name}\").raw(), strVal.asOutParam())"))?;
                self.print(&format!("{name}={value}\n"))
            }
            PropertyAction::Delete => medium
                .call(IMedium::SetProperty, (name.clone(), String::new()))
                .context(|| format!("SetProperty(Bstr(\"{name}\").raw(), Bstr().raw())")),
        }
    }

    pub(super) fn medium_io(&mut self, request: MediumIo) -> Done {
        let password = match &request.password_file {
            Some(file) => Some(read_password(file, "Enter encryption password:")?),
            None => None,
        };
        let writes = request.action == IoAction::FormatFat;
        let mode = if writes { AccessMode::ReadWrite } else { AccessMode::ReadOnly };
        let medium = self.opened(&request.medium, request.kind, mode)?;
        let base = medium.object(IMedium::Base).context(|| "COMGETTER(Base)".to_owned())?;
        let (names, values) = base
            .call(IMedium::GetProperties, (String::new(),))
            .context(|| "OpenForIO(fWritable, bstrPassword.raw(), rPtrMediumIO.asOutParam())".to_owned())?;
        let store = names.iter().zip(values).find_map(|(name, value)| (name == KEY_STORE).then_some(value));
        let key = match (store, password) {
            (None, None) => None,
            (None, Some(_)) => {
                return Err(Failure::Text("Password given for unencrypted medium".to_owned()));
            }
            (Some(_), None) => return Err(Failure::Text("Password needed for encrypted medium".to_owned())),
            (Some(store), Some(password)) => {
                let key = KeyStore::decode(&store).and_then(|store| store.unlock(&password));
                Some(key.map_err(|e| Failure::Text(format!("Cannot open '{}': {e}", request.medium)))?)
            }
        };
        let images = self.chain(medium)?;
        let mode = if writes { OpenMode::ReadWrite } else { OpenMode::ReadOnly };
        let image = vd::open_chain(&images, mode).map_err(|e| Failure::Text(text(&e)))?;
        image.set_key(key.as_ref());
        match request.action {
            IoAction::FormatFat => vd::format_fat(&image).map_err(|e| Failure::Text(text(&e))),
            IoAction::Cat { hex, offset, size, output } => {
                if offset >= image.size().0 {
                    self.stderr.put(&format!(
                        "VBoxManage: warning: Specified offset ({offset:#x}) is beyond the end of the medium ({:#x})\n",
                        image.size().0
                    ));
                }
                to_output(output, |out| cat(&image, hex, offset, size, out))
            }
            IoAction::Stream { output, format, variant } => {
                let variant = variants(variant)?;
                let packed = variant.contains(&MediumVariant::VmdkStreamOptimized);
                if !format.eq_ignore_ascii_case("VMDK") || !packed {
                    return Err(Failure::Text(
                        "Only the format VMDK with the variant Stream can be streamed".to_owned(),
                    ));
                }
                let id = uuid::Uuid::new_v4();
                let name = output.clone().unwrap_or_else(|| "stream.vmdk".to_owned());
                to_output(output, |out| {
                    vd::write_stream_optimized(&image, out, &name, id, &mut |_, _| true)
                        .map(drop)
                        .map_err(|e| io::Error::other(text(&e)))
                })
            }
        }
    }

    pub(super) fn encrypt_medium(&mut self, request: EncryptMedium) -> Done {
        let read = |file: &Option<String>, prompt: &str| match file {
            None => Ok(String::new()),
            Some(file) => read_password(file, prompt).map(|password| password.to_string()),
        };
        let new = read(&request.new_password, "Enter new password:")?;
        let old = read(&request.old_password, "Enter old password:")?;
        let medium = self.opened(&request.medium, MediumKind::Disk, AccessMode::ReadWrite)?;
        let progress = medium
            .call(IMedium::ChangeEncryption, (old, request.cipher, new, request.new_password_id))
            .context(|| {
                "ChangeEncryption(Bstr(strPasswordOld).raw(), Bstr(pszCipher).raw(), Bstr(strPasswordNew).raw(), \
                 Bstr(pszNewPasswordId).raw(), progress.asOutParam())"
                    .to_owned()
            })?;
        let progress = self.client.at(progress);
        self.finish(&progress, "ChangeEncryption()", "Failed to encrypt hard disk")
    }

    pub(super) fn check_medium_password(&mut self, request: CheckMediumPwd) -> Done {
        let password = read_password(&request.password, "Enter password:")?;
        let medium = self.opened(&request.medium, MediumKind::Disk, AccessMode::ReadWrite)?;
        medium
            .call(IMedium::CheckEncryptionPassword, (password.to_string(),))
            .context(|| "CheckEncryptionPassword(Bstr(strPassword).raw())".to_owned())?;
        self.print("The given password is correct\n")
    }

    /// The images of a medium and of those below it, the base first.
    fn chain(&self, medium: Proxy<IMedium>) -> Result<Vec<Source>, Failure> {
        let mut images = Vec::new();
        let mut next = Some(medium);
        while let Some(medium) = next {
            let all = medium.attributes().context(|| "COMGETTER(Location)".to_owned())?;
            let read = |attribute| all.read(attribute).context(|| "COMGETTER(Location)".to_owned());
            let (location, name) = (read(IMedium::Location)?, read(IMedium::Format)?);
            let format = Format::from_name(&name)
                .ok_or_else(|| Failure::Text(format!("'{location}' is of the unknown format '{name}'")))?;
            images.push(match format {
                Format::Iscsi => {
                    let properties = medium
                        .call(IMedium::GetProperties, (String::new(),))
                        .context(|| "GetProperties(Bstr().raw())".to_owned())?;
                    let find = |name: &str| properties.0.iter().position(|known| known == name);
                    let property = |name: &str| properties.1.get(find(name)?).map(String::as_str);
                    Source::iscsi(Path::new(&location), property).map_err(|e| Failure::Text(text(&e)))?
                }
                _ => (PathBuf::from(location), format).into(),
            });
            let parent = all.read(IMedium::Parent).context(|| "COMGETTER(Parent)".to_owned())?;
            next = parent.non_null().map(|parent| self.client.at(parent));
        }
        images.reverse();
        Ok(images)
    }
}

/// Runs `work` on a new file, or on standard output.
fn to_output(output: Option<String>, work: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Done {
    match output.filter(|name| name != "-") {
        Some(name) => {
            let opened = File::create(&name)
                .map_err(|e| Failure::Text(format!("Error opening '{name}' for writing: {e}")))?;
            let mut out = io::BufWriter::new(opened);
            work(&mut out)
                .and_then(|()| out.flush())
                .map_err(|e| Failure::Text(format!("Error writing to '{name}': {e}")))
        }
        None => {
            let mut out = io::BufWriter::new(io::stdout().lock());
            work(&mut out).and_then(|()| out.flush()).map_err(|e| match e.kind() {
                // A reader that has seen enough.
                io::ErrorKind::BrokenPipe => Failure::Silent,
                _ => Failure::Text(format!("Error writing to 'stdout': {e}")),
            })
        }
    }
}

fn cat(image: &Arc<Image>, hex: bool, offset: u64, size: u64, out: &mut dyn Write) -> io::Result<()> {
    let end = offset.saturating_add(size).min(image.size().0);
    let mut dump = HexDump::new(end);
    let mut at = offset;
    let mut buffer = vec![0; PIECE as usize];
    while at < end {
        let count = (end - at).min(PIECE) as usize;
        image.read(at, &mut buffer[..count]).map_err(|e| io::Error::other(text(&e)))?;
        if hex {
            out.write_all(dump.lines(at, &buffer[..count]).as_bytes())?;
        } else {
            out.write_all(&buffer[..count])?;
        }
        at += count as u64;
    }
    Ok(())
}

/// `convertfromraw`, which asks the service for nothing.
pub(super) fn convert_from_raw(request: ConvertFromRaw, stderr: &mut Stderr) -> Done {
    let ConvertFromRaw { source, target, size, format, variant, uuid } = request;
    stderr.put(&format!("Converting from raw image file=\"{source}\" to file=\"{target}\"...\n"));
    let (input, size): (Box<dyn Read>, u64) = match size {
        Some(size) => (Box::new(io::stdin().lock()), size),
        None => {
            let opened = File::open(&source).and_then(|file| {
                let mut file = file;
                // Devices, too, tell their length so.
                let size = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
                io::Seek::rewind(&mut file)?;
                Ok((file, size))
            });
            let (file, size) =
                opened.map_err(|e| Failure::Text(format!("Cannot open file \"{source}\": {e}")))?;
            (Box::new(file), size)
        }
    };
    let variant = variants(variant)?;
    let fixed = variant.contains(&MediumVariant::Fixed);
    let shape = if fixed { "fixed" } else { "dynamic" };
    stderr.put(&format!("Creating {shape} image with size {size} bytes ({}MB)...\n", size.div_ceil(MIB)));
    let cannot = |why: String| Failure::Text(format!("Cannot create the disk image \"{target}\": {why}"));
    let format =
        Format::from_name(&format).ok_or_else(|| cannot(format!("the format '{format}' is not known")))?;
    let has = |v| variant.contains(&v);
    let options = CreateOptions {
        format,
        variant: match () {
            () if has(MediumVariant::VmdkStreamOptimized) => Variant::StreamOptimized,
            () if has(MediumVariant::VmdkSplit2G) && fixed => Variant::SplitFixed,
            () if has(MediumVariant::VmdkSplit2G) => Variant::Split,
            () if has(MediumVariant::VmdkESX) => Variant::Esx,
            // Raw images have one kind only.
            () if fixed || format == Format::Raw => Variant::Fixed,
            () => Variant::Dynamic,
        },
        size: ByteSize(size.next_multiple_of(512)),
        uuid,
        comment: format!("Converted image from {source}"),
    };
    let path = Path::new(&target);
    if options.variant == Variant::StreamOptimized {
        // It is written from an image, which standard input is not.
        if source == "stdin" {
            return Err(cannot("a stream-optimized image cannot be made from standard input".to_owned()));
        }
        return Image::open(Path::new(&source), OpenMode::ReadOnly, Format::Raw)
            .and_then(|image| vd::clone(&image, path, &options, &mut |_, _| true))
            .map(drop)
            .map_err(|e| cannot(text(&e)));
    }
    vd::create(path, &options).map_err(|e| cannot(text(&e)))?;
    let result = fill(path, format, input, size);
    if result.is_err() {
        // A part of an image is of no use.
        let _ = vd::delete(path, format);
    }
    result
}

fn fill(path: &Path, format: Format, mut input: Box<dyn Read>, size: u64) -> Done {
    let failed = |e: vd::Error| {
        Failure::Text(format!("Failed to write to disk image \"{}\": {}", path.display(), text(&e)))
    };
    let image = Image::open(path, OpenMode::ReadWrite, format).map_err(failed)?;
    let mut buffer = vec![0; MIB as usize];
    let mut at = 0;
    while at < size {
        let wanted = (size - at).min(MIB) as usize;
        let mut count = 0;
        while count < wanted {
            match input.read(&mut buffer[count..wanted]) {
                Ok(0) => break,
                Ok(more) => count += more,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Failure::Text(format!("Cannot read the raw image: {e}"))),
            }
        }
        if count == 0 {
            // Less than was announced: the rest is zeros, as with VirtualBox.
            break;
        }
        image.write(at, &buffer[..count]).map_err(failed)?;
        at += count as u64;
    }
    image.flush().map_err(failed)
}

impl Run<'_> {
    /// A differencing image on a medium; its id.
    pub(super) fn create_diff(
        &mut self,
        parent: &str,
        format: String,
        file: String,
        variant: Vec<MediumVariant>,
    ) -> Result<String, Failure> {
        let parent = self.opened(parent, MediumKind::Disk, AccessMode::ReadWrite)?;
        let medium = self
            .client
            .virtual_box()
            .call(
                IVirtualBox::CreateMedium,
                (format, file.clone(), AccessMode::ReadWrite, DeviceType::HardDisk),
            )
            .context(|| format!("CreateMedium(Bstr(\"{file}\").raw(), pMedium.asOutParam())"))?;
        let medium = self.client.at(medium);
        let progress =
            parent.call(IMedium::CreateDiffStorage, (medium.reference(), variant)).context(|| {
                "CreateDiffStorage(pMedium, ComSafeArrayAsInParam(l_variants), pProgress.asOutParam())"
                    .to_owned()
            })?;
        let progress = self.client.at(progress);
        self.finish(&progress, "CreateDiffStorage(pMedium)", "Failed to create medium")?;
        medium.read(IMedium::Id).context(|| "COMGETTER(Id)(uuid.asOutParam())".to_owned())
    }

    /// Gives a medium, or its parent's place in it, another UUID.
    pub(super) fn set_ids(
        medium: &Proxy<IMedium>,
        image: Option<String>,
        parent: Option<String>,
    ) -> Result<(), Failure> {
        let args = (image.is_some(), image.unwrap_or_default(), parent.is_some(), parent.unwrap_or_default());
        match medium.call(IMedium::SetIds, args) {
            Err(error) if error.is(ResultCode::ObjectNotFound) => {
                Err(Failure::Text("Cannot set the UUIDs of the medium: it is not known any more".to_owned()))
            }
            done => {
                done.context(|| "SetIds(fSetNewUuid, newUuid, fSetNewParentUuid, newParentUuid)".to_owned())
            }
        }
    }
}
