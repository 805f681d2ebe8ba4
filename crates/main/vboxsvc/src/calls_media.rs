//! The methods of IMedium that work on images: cloning, differencing, compacting, resizing, moving, UUIDs.
//!
//! Each runs on a thread of its own with the media it needs marked ([`Task`]), so that nobody else opens, closes or attaches them
//! meanwhile. The state's lock is not held while files are worked on.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums as api;
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::progress::Progress;
use main_api::server::CallTable;
use main_api::types::ObjRef;
use settings::DriveType;
use uuid::Uuid;
use vbox_types::{ByteSize, ResultCode};
use vd::{CreateOptions, Format, Ids, OpenMode, Variant};

use crate::attrs_global::with_medium;
use crate::calls::{check_key, medium_id, save_medium, save_registries, spawn};
use crate::machines::{absolute, users_of};
use crate::media::{Info, MediaPool, Medium, Phase, Task};
use crate::mirror::Mirror;
use crate::objects::Object;
use crate::svc::{Context, State, Svc};
use crate::view::gone;

pub(crate) fn add(t: &mut CallTable<Context>) {
    t.add(IMedium::SetProperties, |c, (names, values)| {
        if names.len() != values.len() {
            return Err(ApiError::invalid_arg("There must be a value for each property name"));
        }
        names.iter().try_for_each(|name| check_key(name))?;
        with_medium(c, |m| {
            for (name, value) in names.into_iter().zip(values) {
                match value.as_str() {
                    "" => m.properties.remove(&name),
                    _ => m.properties.insert(name, value),
                };
            }
        })?;
        save_medium(c)
    })
    .add(IMedium::SetIds, |c, (set_image, image, set_parent, parent)| {
        set_ids(c, set_image.then_some(image), set_parent.then_some(parent))
    })
    .add(IMedium::CreateDiffStorage, |c, (target, _variant)| create_diff(c, target_id(&target)?))
    .add(IMedium::CloneTo, |c, (target, variant, parent)| {
        clone_to(c, target_id(&target)?, None, &variant, medium_id(&parent)?)
    })
    .add(IMedium::ResizeAndCloneTo, |c, (target, size, variant, parent)| {
        clone_to(c, target_id(&target)?, Some(sectors(size)?), &variant, medium_id(&parent)?)
    })
    .add(IMedium::Compact, |c, ()| compact(c))
    .add(IMedium::Resize, |c, (size,)| resize(c, sectors(size)?))
    .add(IMedium::MoveTo, |c, (location,)| move_to(c, &location))
    .add(IMedium::Reset, |c, ()| reset(c));
}

fn target_id(target: &ObjRef<IMedium>) -> ApiResult<Uuid> {
    medium_id(target)?.ok_or_else(|| ApiError::invalid_arg("Argument aTarget is invalid (must not be NULL)"))
}

/// A size in whole sectors.
fn sectors(size: i64) -> ApiResult<u64> {
    let size = u64::try_from(size).ok().filter(|s| *s > 0);
    let size = size.ok_or_else(|| ApiError::invalid_arg("The medium size must be greater than zero"))?;
    Ok(size.next_multiple_of(512))
}

pub(crate) fn own(c: &Context) -> ApiResult<Uuid> {
    match c.object {
        Object::Medium(id) => Ok(id),
        _ => Err(gone()),
    }
}

fn not_supported(text: String) -> ApiError {
    ApiError::new(ResultCode::NotSupported, text).on("IMedium")
}

pub(crate) fn failed(what: &str, error: vd::Error) -> ApiError {
    use std::error::Error as _;
    let code = match &error {
        vd::Error::Cancelled { .. } => ResultCode::IprtError,
        vd::Error::Unsupported { .. } | vd::Error::NoSuchVariant { .. } => ResultCode::NotSupported,
        vd::Error::BadSize { .. } => ResultCode::InvalidArg,
        _ => ResultCode::FileError,
    };
    let already = if matches!(error, vd::Error::Exists { .. }) { " (VERR_ALREADY_EXISTS)" } else { "" };
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    ApiError::new(code, format!("{what}.\n{error}{cause}{already}")).on("IMedium")
}

/// What `variant` asks for in an image.
pub(crate) fn variant_of(variant: &[api::MediumVariant]) -> Variant {
    use api::MediumVariant as V;
    let has = |v| variant.contains(&v);
    match (has(V::Fixed), has(V::VmdkSplit2G)) {
        _ if has(V::Diff) => Variant::Differencing,
        _ if has(V::VmdkStreamOptimized) => Variant::StreamOptimized,
        _ if has(V::VmdkESX) => Variant::Esx,
        (true, true) => Variant::SplitFixed,
        (true, false) => Variant::Fixed,
        (false, true) => Variant::Split,
        (false, false) => Variant::Dynamic,
    }
}

/// The words for a variant, as clients see them.
pub(crate) fn variant_words(variant: Variant) -> Vec<api::MediumVariant> {
    use api::MediumVariant as V;
    match variant {
        Variant::Dynamic => vec![V::Standard],
        Variant::Fixed => vec![V::Fixed],
        Variant::Differencing => vec![V::Diff],
        Variant::Split => vec![V::VmdkSplit2G],
        Variant::SplitFixed => vec![V::VmdkSplit2G, V::Fixed],
        Variant::StreamOptimized => vec![V::VmdkStreamOptimized],
        Variant::Esx => vec![V::VmdkESX, V::Fixed],
    }
}

/// The variant of a new image, as near to the one asked for as its format has it. As with VirtualBox, formats without images that
/// grow make fixed ones; a variant of another format is an error.
pub(crate) fn creatable(format: Format, variant: &[api::MediumVariant]) -> ApiResult<Variant> {
    let wanted = variant_of(variant);
    if variant.contains(&api::MediumVariant::VmdkRawDisk) {
        return Err(not_supported(
            "Raw disk access is set up by 'createmedium --format=VMDK --variant=RawDisk --property RawDrive=DEVICE' alone"
                .into(),
        ));
    }
    if vd::can_create(format, wanted) {
        return Ok(wanted);
    }
    if vd::can_create(format, Variant::Dynamic) && wanted == Variant::Fixed {
        return Err(not_supported(format!(
            "Medium format '{format}' does not support fixed storage creation"
        )));
    }
    if !vd::can_create(format, Variant::Dynamic) {
        return Err(not_supported(format!(
            "Medium format '{format}' does not support dynamic storage creation"
        )));
    }
    Err(not_supported(format!("Medium format '{format}' has no images of the variant {wanted}")))
}

/// Runs `work` on a thread, with `tasks` marked before it and cleared after it. `end` takes its result into the state.
pub(crate) fn run<T: Send + 'static>(
    c: &Context,
    mut state: parking_lot::MutexGuard<'_, State>,
    description: String,
    cancelable: bool,
    tasks: Vec<(Uuid, Task)>,
    work: impl FnOnce(&Progress) -> ApiResult<T> + Send + 'static,
    end: impl FnOnce(&Svc, &mut State, T) -> ApiResult<()> + Send + 'static,
    undo: impl FnOnce(&mut State) + Send + 'static,
) -> ApiResult<ObjRef<IProgress>> {
    state.media.begin(&tasks)?;
    let progress = Arc::new(Progress::new(description, 1, cancelable));
    let path = state.add_progress(progress.clone());
    drop(state);
    let svc = c.svc.clone();
    spawn("medium", move || {
        let result = work(&progress);
        let mut state = svc.state.lock();
        state.media.end(&tasks);
        let outcome = match result {
            Ok(value) => end(&svc, &mut state, value),
            Err(error) => {
                undo(&mut state);
                Err(error)
            }
        };
        drop(state);
        progress.complete(outcome);
        svc.wake_main();
    })?;
    Ok(ObjRef::new(path))
}

/// Shows `vd`'s progress; `false` when someone has cancelled.
pub(crate) fn tell(progress: &Progress) -> impl FnMut(u64, u64) -> bool + '_ {
    |done, of| {
        progress.set((done as u128 * 100 / of.max(1) as u128) as u32, "");
        !progress.canceled()
    }
}

/// The marks for reading a medium with all below it.
fn reading(media: &MediaPool, id: Uuid) -> ApiResult<Vec<(Uuid, Task)>> {
    Ok(media.chain(id)?.into_iter().map(|m| (m, Task::Read)).collect())
}

/// The marks for writing a medium, for which those below it are read.
fn writing(media: &MediaPool, id: Uuid) -> ApiResult<Vec<(Uuid, Task)>> {
    let mut marks = reading(media, id)?;
    if let Some(own) = marks.last_mut() {
        own.1 = Task::Write;
    }
    Ok(marks)
}

fn check_no_children(state: &State, id: Uuid) -> ApiResult<()> {
    let children = state.media.children(id).len();
    if children == 0 {
        return Ok(());
    }
    let location = state.media.medium(id)?.location.display().to_string();
    Err(ApiError::new(
        ResultCode::ObjectInUse,
        format!("Medium '{location}' cannot be changed because it has {children} child media"),
    )
    .on("IMedium"))
}

fn not_created(medium: &Medium) -> ApiResult<()> {
    if medium.phase == Phase::NotCreated {
        return Ok(());
    }
    Err(ApiError::new(
        ResultCode::InvalidObjectState,
        format!("Storage for the medium '{}' is already created", medium.location.display()),
    )
    .on("IMedium"))
}

fn make_folder(location: &Path) -> ApiResult<()> {
    let Some(folder) = location.parent() else { return Ok(()) };
    std::fs::create_dir_all(folder)
        .map_err(|e| crate::machines::file_error("Could not create the directory", folder, &e).on("IMedium"))
}

fn clone_to(
    c: &Context,
    target: Uuid,
    size: Option<u64>,
    variant: &[api::MediumVariant],
    parent: Option<Uuid>,
) -> ApiResult<ObjRef<IProgress>> {
    let source = own(c)?;
    let state = c.svc.state.lock();
    let mut tasks = reading(&state.media, source)?;
    let files = state.media.images(source)?;
    let from = state.media.medium(source)?.location.display().to_string();
    let medium = state.media.medium(target)?;
    let (location, kind) = (medium.location.clone(), medium.kind);
    if target == source {
        return Err(ApiError::invalid_arg("A medium cannot be cloned to itself"));
    }
    if parent.is_some() {
        return Err(not_supported("Cloning to a differencing image is not supported".into()));
    }
    let description = format!("Creating clone medium '{}'", location.display());
    let what = format!("Could not create the clone medium '{}' of '{from}'", location.display());
    if medium.phase == Phase::There {
        crate::encryption::refuse(&state.media, source, "cloned to an existing one")?;
        crate::encryption::refuse(&state.media, target, "overwritten by a clone")?;
        tasks.extend(writing(&state.media, target)?.into_iter().filter(|(id, _)| *id == target));
        let into = state.media.images(target)?;
        let work = move |progress: &Progress| -> ApiResult<()> {
            let result = vd::open_chain(&files, OpenMode::ReadOnly).and_then(|source| {
                let target = vd::open_chain(&into, OpenMode::ReadWrite)?;
                let wanted = size.unwrap_or(source.size().0);
                if target.size().0 < wanted {
                    return Err(vd::Error::BadSize {
                        format: target.format(),
                        size: wanted,
                        why: "the existing image is smaller: resize it first",
                    });
                }
                vd::copy(&source, &target, &mut tell(progress))
            });
            result.map_err(|e| failed(&what, e))
        };
        let end = move |_: &Svc, state: &mut State, ()| -> ApiResult<()> {
            state.media.medium_mut(target)?.refresh();
            Ok(())
        };
        return run(c, state, description, true, tasks, work, end, |_| {});
    }
    not_created(medium)?;
    let format = Format::from_name(&medium.format).ok_or_else(gone)?;
    let options = CreateOptions {
        format,
        variant: creatable(format, variant)?,
        size: ByteSize(0),
        uuid: Some(target),
        comment: String::new(),
    };
    let grows = options.variant == Variant::Dynamic;
    let carried = crate::encryption::Carried::of(&state.media, source, format, grows)?;
    let is_encrypted = carried.is_some();
    let no_directory = variant.contains(&api::MediumVariant::NoCreateDir);
    let mut state = state;
    state.media.medium_mut(target)?.phase = Phase::Creating;
    let work = move |progress: &Progress| -> ApiResult<()> {
        if !no_directory {
            make_folder(&location)?;
        }
        let result = vd::open_chain(&files, OpenMode::ReadOnly).and_then(|source| {
            let own = source.size().0.next_multiple_of(512);
            let options = CreateOptions { size: ByteSize(size.unwrap_or(own).max(own)), ..options };
            let clone = if is_encrypted { vd::clone_encrypted } else { vd::clone };
            clone(&source, &location, &options, &mut tell(progress))
        });
        result.map(drop).map_err(|e| failed(&what, e))
    };
    let end = move |_: &Svc, state: &mut State, ()| {
        if let Some(carried) = carried {
            carried.put(state.media.medium_mut(target)?);
        }
        registered(state, target, kind)
    };
    run(c, state, description, true, tasks, work, end, move |state| {
        state.media.remove(target);
    })
}

/// A new medium's file is there.
fn registered(state: &mut State, id: Uuid, kind: DriveType) -> ApiResult<()> {
    let medium = state.media.medium_mut(id)?;
    medium.phase = Phase::There;
    medium.refresh();
    state.emit(IEventSource::OnMediumRegistered, (id.to_string(), kind.to_api(), true));
    Ok(())
}

fn create_diff(c: &Context, target: Uuid) -> ApiResult<ObjRef<IProgress>> {
    let parent = own(c)?;
    let mut state = c.svc.state.lock();
    let base = state.media.medium(parent)?;
    if matches!(
        base.medium_type,
        settings::MediumType::Writethrough | settings::MediumType::Shareable | settings::MediumType::Readonly
    ) {
        return Err(ApiError::new(
            ResultCode::InvalidObjectState,
            format!("Medium type of '{}' is not suitable for differencing images", base.location.display()),
        )
        .on("IMedium"));
    }
    let medium = state.media.medium(target)?;
    not_created(medium)?;
    let format = Format::from_name(&medium.format).ok_or_else(gone)?;
    if !vd::can_create(format, Variant::Differencing) {
        return Err(not_supported(format!("Medium format '{format}' does not support differencing images")));
    }
    let location = medium.location.clone();
    let files = state.media.images(parent)?;
    let tasks = reading(&state.media, parent)?;
    let description = format!("Creating differencing medium storage unit '{}'", location.display());
    state.media.medium_mut(target)?.phase = Phase::Creating;
    let work = move |_: &Progress| -> ApiResult<()> {
        make_folder(&location)?;
        let what = format!("Could not create the differencing medium storage unit '{}'", location.display());
        let below = vd::open_chain(&files, OpenMode::ReadOnly);
        let made = below.and_then(|below| vd::create_child(&location, format, &below, Some(target)));
        made.map(drop).map_err(|e| failed(&what, e))
    };
    let end = move |svc: &Svc, state: &mut State, ()| adopt(svc, state, target, parent);
    run(c, state, description, false, tasks, work, end, move |state| {
        state.media.remove(target);
    })
}

/// The file of a new differencing medium is there: it goes on record where its base is.
fn adopt(svc: &Svc, state: &mut State, child: Uuid, parent: Uuid) -> ApiResult<()> {
    state.media.medium_mut(child)?.parent = Some(parent);
    registered(state, child, DriveType::HardDisk)?;
    let base = state.media.chain(parent)?.first().copied().unwrap_or(parent);
    let owners = state.media.medium(base)?.registries.clone();
    state.media.medium_mut(child)?.registries = owners.clone();
    save_registries(svc, state, &owners)
}

/// Makes a differencing image on `parent` in `folder` at once, for a medium that must not be written itself.
pub(crate) fn implicit_diff(svc: &Svc, state: &mut State, parent: Uuid, folder: &Path) -> ApiResult<Uuid> {
    let base = state.media.medium(parent)?;
    let own = Format::from_name(&base.format).ok_or_else(gone)?;
    let format = if vd::can_create(own, Variant::Differencing) { own } else { Format::Vdi };
    // Children of immutable media start anew with each start of the machine.
    let auto_reset = base.medium_type == settings::MediumType::Immutable;
    let id = Uuid::new_v4();
    let extension = format.name().to_lowercase();
    let location = folder.join(format!("{{{id}}}.{extension}"));
    let tasks = reading(&state.media, parent)?;
    state.media.begin(&tasks)?;
    let files = state.media.images(parent)?;
    let made = make_folder(&location).and_then(|()| {
        let below = vd::open_chain(&files, OpenMode::ReadOnly);
        let made = below.and_then(|below| vd::create_child(&location, format, &below, Some(id)));
        let what = format!("Could not create the differencing medium storage unit '{}'", location.display());
        made.map_err(|e| failed(&what, e))
    });
    state.media.end(&tasks);
    made?;
    let mut medium = Medium::new(id, DriveType::HardDisk, location, format.name());
    medium.auto_reset = auto_reset;
    state.media.insert(medium);
    adopt(svc, state, id, parent)?;
    Ok(id)
}

/// Makes the differencing image show its parent again.
pub(crate) fn reset_diff(state: &mut State, id: Uuid) -> ApiResult<()> {
    let medium = state.media.medium(id)?;
    let Some(parent) = medium.parent else {
        return Err(ApiError::new(
            ResultCode::NotSupported,
            format!("Medium type of '{}' is not differencing", medium.location.display()),
        )
        .on("IMedium"));
    };
    let location = medium.location.clone();
    let format = Format::from_name(&medium.format).ok_or_else(gone)?;
    check_no_children(state, id)?;
    let tasks = writing(&state.media, id)?;
    let files = state.media.images(parent)?;
    state.media.begin(&tasks)?;
    let new = location.with_extension(format!("{}.new", Uuid::new_v4().simple()));
    let made = vd::open_chain(&files, OpenMode::ReadOnly)
        .and_then(|below| vd::create_child(&new, format, &below, Some(id)));
    let what = format!("Could not reset the differencing medium storage unit '{}'", location.display());
    let made = made.map_err(|e| failed(&what, e)).and_then(|_| {
        std::fs::rename(&new, &location)
            .map_err(|e| crate::machines::file_error(&what, &location, &e).on("IMedium"))
    });
    state.media.end(&tasks);
    if made.is_err() {
        // Ours, if it is there at all.
        let _ = std::fs::remove_file(&new);
    }
    made?;
    state.media.medium_mut(id)?.refresh();
    Ok(())
}

fn reset(c: &Context) -> ApiResult<ObjRef<IProgress>> {
    let id = own(c)?;
    let mut state = c.svc.state.lock();
    let description =
        format!("Resetting differencing medium '{}'", state.media.medium(id)?.location.display());
    reset_diff(&mut state, id)?;
    let progress = Arc::new(Progress::new(description, 1, false));
    let path = state.add_progress(progress.clone());
    progress.complete(Ok(()));
    Ok(ObjRef::new(path))
}

fn compact(c: &Context) -> ApiResult<ObjRef<IProgress>> {
    let id = own(c)?;
    let state = c.svc.state.lock();
    let mut files = state.media.images(id)?;
    let tasks = writing(&state.media, id)?;
    let medium = state.media.medium(id)?;
    let description = format!("Compacting medium '{}'", medium.location.display());
    let what = format!("Could not compact medium '{}'", medium.location.display());
    let work = move |progress: &Progress| -> ApiResult<()> {
        let Some(vd::Source { path, format, .. }) = files.pop() else { return Err(gone()) };
        let parent = if files.is_empty() { None } else { Some(vd::open_chain(&files, OpenMode::ReadOnly)) };
        let done = parent.transpose().and_then(|p| vd::compact(&path, format, p, &mut tell(progress)));
        done.map_err(|e| failed(&what, e))
    };
    run(c, state, description, true, tasks, work, refreshed(id), |_| {})
}

/// Looks at the file again.
fn refreshed(id: Uuid) -> impl FnOnce(&Svc, &mut State, ()) -> ApiResult<()> {
    move |_, state, ()| {
        state.media.medium_mut(id)?.refresh();
        Ok(())
    }
}

fn resize(c: &Context, size: u64) -> ApiResult<ObjRef<IProgress>> {
    let id = own(c)?;
    let mut state = c.svc.state.lock();
    check_no_children(&state, id)?;
    state.media.medium_mut(id)?.refresh();
    let mut files = state.media.images(id)?;
    let tasks = writing(&state.media, id)?;
    let medium = state.media.medium(id)?;
    let location = medium.location.display().to_string();
    if medium.info.as_ref().is_some_and(|i| i.variant.is_fixed()) {
        // The new part would have to hold encrypted zeros.
        crate::encryption::refuse(&state.media, id, "resized")?;
    }
    if medium.info.as_ref().is_some_and(|Info { logical_size, .. }| *logical_size > size) {
        return Err(not_supported(format!("Shrinking is not yet supported for medium '{location}'")));
    }
    let description = format!("Resizing medium '{location}'");
    let what = format!("Could not resize medium '{location}'");
    let work = move |progress: &Progress| -> ApiResult<()> {
        let Some(vd::Source { path, format, .. }) = files.pop() else { return Err(gone()) };
        let parent = if files.is_empty() { None } else { Some(vd::open_chain(&files, OpenMode::ReadOnly)) };
        let done = parent
            .transpose()
            .and_then(|p| vd::resize(&path, format, p, ByteSize(size), &mut tell(progress)));
        done.map_err(|e| failed(&what, e))
    };
    run(c, state, description, true, tasks, work, refreshed(id), |_| {})
}

/// Where a medium goes that is to be moved to `to`: into a directory under its own name, or to a file whose name gets the
/// extension that it has.
fn destination(from: &Path, to: PathBuf, directory: bool) -> PathBuf {
    let name = from.file_name().unwrap_or_default();
    if directory || to.is_dir() {
        return to.join(name);
    }
    match (from.extension(), to.extension()) {
        (Some(extension), given) if given != Some(extension) => {
            let mut name = to.file_name().unwrap_or_default().to_owned();
            name.push(".");
            name.push(extension);
            to.with_file_name(name)
        }
        _ => to,
    }
}

fn move_to(c: &Context, location: &str) -> ApiResult<ObjRef<IProgress>> {
    let id = own(c)?;
    let to = absolute(location)?;
    let state = c.svc.state.lock();
    let medium = state.media.medium(id)?;
    let from = medium.location.clone();
    let to = destination(&from, to, location.ends_with('/'));
    let format = Format::from_name(&medium.format).ok_or_else(gone)?;
    if let Some(other) = state.media.at_location(medium.kind, &to) {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!("A medium '{}' with UUID {{{other}}} is in the media registry already", to.display()),
        )
        .on("IMedium"));
    }
    let tasks = vec![(id, Task::Write)];
    let description = format!("Moving medium '{}' to '{}'", from.display(), to.display());
    let what = format!("Could not move medium '{}'", from.display());
    let target = to.clone();
    let work = move |_: &Progress| -> ApiResult<()> {
        vd::rename(&from, &target, format).map_err(|e| failed(&what, e))
    };
    let end = move |svc: &Svc, state: &mut State, ()| -> ApiResult<()> {
        state.media.relocate(id, to);
        let medium = state.media.medium_mut(id)?;
        medium.refresh();
        let owners = medium.registries.clone();
        save_registries(svc, state, &owners)
    };
    run(c, state, description, false, tasks, work, end, |_| {})
}

fn set_ids(c: &Context, image: Option<String>, parent: Option<String>) -> ApiResult<()> {
    let id = own(c)?;
    let parse = |text: &str| {
        Uuid::try_parse(text.trim_start_matches('{').trim_end_matches('}'))
            .map_err(|_| ApiError::invalid_arg(format!("Invalid UUID '{text}'")))
    };
    let image = match image.as_deref() {
        Some("") => Some(Uuid::new_v4()),
        Some(text) => Some(parse(text)?),
        None => None,
    };
    let parent = match parent.as_deref() {
        Some("") => Some(Uuid::nil()),
        Some(text) => Some(parse(text)?),
        None => None,
    };
    let mut state = c.svc.state.lock();
    if !users_of(&state, id).is_empty() {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            "The UUIDs of a medium that is attached to a machine cannot be changed",
        )
        .on("IMedium"));
    }
    check_no_children(&state, id)?;
    if let Some(taken) = image.filter(|new| *new != id && state.media.find(*new).is_some()) {
        return Err(ApiError::new(
            ResultCode::ObjectInUse,
            format!("A medium with UUID {{{taken}}} exists already"),
        ));
    }
    let parent_modification = match parent.and_then(|p| state.media.find(p)) {
        Some(p) => vd::info(&p.location, Format::from_name(&p.format)).ok().and_then(|i| i.modification_uuid),
        None => None,
    };
    let tasks = vec![(id, Task::Write)];
    state.media.begin(&tasks)?;
    let medium = state.media.medium(id)?;
    let (location, kind) = (medium.location.clone(), medium.kind);
    let format = Format::from_name(&medium.format).ok_or_else(gone)?;
    let ids = Ids { uuid: image, parent, parent_modification, ..Ids::default() };
    // CDs and floppies have no UUIDs in their files.
    let done = if kind == DriveType::HardDisk { vd::set_ids(&location, format, &ids) } else { Ok(()) };
    state.media.end(&tasks);
    match done {
        // The registry alone knows such a medium's UUID.
        Err(vd::Error::Unsupported { .. }) if parent.is_none() => {}
        other => other
            .map_err(|e| failed(&format!("Could not change the UUIDs of '{}'", location.display()), e))?,
    }
    if let Some(mut medium) = state.media.remove(id) {
        medium.id = image.unwrap_or(id);
        if let Some(parent) = parent {
            medium.parent = Some(parent).filter(|p| !p.is_nil());
        }
        medium.refresh();
        state.media.insert(medium);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_keep_their_name_in_a_directory_and_their_extension_elsewhere() {
        let from = Path::new("/a/d.vdi");
        let to = |to: &str, directory| destination(from, to.into(), directory).display().to_string();
        assert_eq!(to("/nowhere", true), "/nowhere/d.vdi");
        assert_eq!(to("/nowhere/e.vdi", false), "/nowhere/e.vdi");
        assert_eq!(to("/nowhere/e", false), "/nowhere/e.vdi");
        assert_eq!(to("/nowhere/e.img", false), "/nowhere/e.img.vdi");
    }

    #[test]
    fn every_variant_has_words_that_name_it() {
        for variant in [
            Variant::Dynamic,
            Variant::Fixed,
            Variant::Differencing,
            Variant::Split,
            Variant::SplitFixed,
            Variant::StreamOptimized,
            Variant::Esx,
        ] {
            assert_eq!(variant_of(&variant_words(variant)), variant);
        }
    }
}
