//! The attributes of the objects that are no part of a machine.

use std::path::PathBuf;

use main_api::enums::{self as api, MachineState, SessionState};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::paths;
use main_api::server::{ReadTable, WriteTable};
use main_api::types::ObjRef;
use settings::{DriveType, OsType};
use vbox_types::{ResultCode, version};

use crate::host::{self, Cpus};
use crate::limits;
use crate::machines::{absolute, users_of};
use crate::media::Medium;
use crate::mirror::Mirror;
use crate::objects::{MachineRef, Object, medium_path, progress_path};
use crate::svc::{Context, Session};
use crate::view::gone;

pub(crate) fn reads() -> ReadTable<Context> {
    let mut t = ReadTable::default();
    virtual_box(&mut t);
    system_properties(&mut t);
    host_computer(&mut t);
    os_types(&mut t);
    media(&mut t);
    sessions(&mut t);
    crate::appliance::reads(&mut t);
    crate::calls_networks::reads(&mut t);
    t
}

fn virtual_box(t: &mut ReadTable<Context>) {
    t.add(IVirtualBox::Version, |_| version::VERSION.to_owned())
        .add(IVirtualBox::VersionNormalized, |_| version::VERSION.to_owned())
        .add(IVirtualBox::Revision, |_| version::REVISION)
        .add(IVirtualBox::PackageType, |_| "LINUX_64BITS_GENERIC".to_owned())
        .add(IVirtualBox::APIVersion, |_| version::API_VERSION.to_owned())
        .add(IVirtualBox::APIRevision, |_| 0)
        .add(IVirtualBox::HomeFolder, |c| c.svc.config_dir.display().to_string())
        .add(IVirtualBox::SettingsFilePath, |c| c.svc.config_dir.join("VirtualBox.xml").display().to_string())
        .add(IVirtualBox::Host, |_| ObjRef::new(paths::HOST))
        .add(IVirtualBox::SystemProperties, |_| ObjRef::new(paths::SYSTEM_PROPERTIES))
        .add(IVirtualBox::EventSource, |_| ObjRef::new(paths::EVENT_SOURCE))
        .add(IVirtualBox::Machines, |c| {
            let state = c.svc.state.lock();
            state.order.iter().map(|id| ObjRef::new(MachineRef::Registered(*id).path())).collect()
        })
        .add(IVirtualBox::MachineGroups, |c| {
            let state = c.svc.state.lock();
            let mut groups: Vec<String> =
                state.machines.values().flat_map(|m| m.settings.groups.iter().cloned()).collect();
            groups.push("/".into());
            groups.sort();
            groups.dedup();
            groups
        })
        .add(IVirtualBox::HardDisks, |c| images(c, DriveType::HardDisk))
        .add(IVirtualBox::DVDImages, |c| images(c, DriveType::Dvd))
        .add(IVirtualBox::FloppyImages, |c| images(c, DriveType::Floppy))
        .add(IVirtualBox::ProgressOperations, |c| {
            let state = c.svc.state.lock();
            let pending = state.progress.iter().filter(|(_, p)| p.outcome().is_none());
            pending.map(|(number, _)| ObjRef::new(progress_path(*number))).collect()
        })
        .add(IVirtualBox::GuestOSTypes, |_| OsType::all().iter().map(os_type_ref).collect());
}

fn images(c: &Context, kind: DriveType) -> Vec<ObjRef<IMedium>> {
    c.svc.state.lock().media.of_kind(kind).into_iter().map(|id| ObjRef::new(medium_path(id))).collect()
}

pub(crate) fn os_type_ref(os: &OsType) -> ObjRef<IGuestOSType> {
    ObjRef::new(format!("{}/{}", paths::GUEST_OS_TYPES, paths::escape(os.id)))
}

fn system_properties(t: &mut ReadTable<Context>) {
    type P = ISystemProperties;
    t.add(P::MinGuestRAM, |_| limits::MIN_RAM)
        .add(P::MaxGuestRAM, |_| limits::MAX_RAM)
        .add(P::MinGuestVRAM, |_| limits::MIN_VRAM)
        .add(P::MaxGuestVRAM, |_| limits::MAX_VRAM)
        .add(P::MinGuestCPUCount, |_| limits::MIN_CPUS)
        .add(P::MaxGuestCPUCount, |_| limits::MAX_CPUS)
        .add(P::MaxGuestMonitors, |_| limits::MAX_MONITORS)
        .add(P::InfoVDSize, |_| 2_199_023_255_040)
        .add(P::SerialPortCount, |_| limits::SERIAL_PORTS)
        .add(P::ParallelPortCount, |_| limits::PARALLEL_PORTS)
        .add(P::MaxBootPosition, |_| limits::BOOT_POSITIONS)
        .add(P::RawModeSupported, |_| false)
        .add(P::FreeDiskSpaceWarning, |_| 1024 * 1024 * 1024)
        .add(P::FreeDiskSpacePercentWarning, |_| 5)
        .add(P::FreeDiskSpaceError, |_| 4 * 1024 * 1024)
        .add(P::FreeDiskSpacePercentError, |_| 1)
        .add(P::DefaultAudioDriver, |_| api::AudioDriverType::Default)
        .add(P::DefaultAdditionsISO, |_| String::new())
        .add(P::ScreenShotFormats, |_| vec![api::BitmapFormat::PNG])
        .add(P::SupportedParavirtProviders, |_| {
            use api::ParavirtProvider as P;
            vec![P::None, P::Default, P::Legacy, P::Minimal, P::HyperV, P::KVM]
        })
        .add(P::DefaultMachineFolder, |c| {
            c.svc.state.lock().global.default_machine_folder().display().to_string()
        });
    macro_rules! properties {
        ($($attr:path => $field:ident;)*) => {$(
            t.add($attr, |c| c.svc.state.lock().global.settings.system_properties.$field.to_api());
        )*};
    }
    properties! {
        P::ExclusiveHwVirt => exclusive_hw_virt;
        P::LoggingLevel => logging_level;
        P::DefaultVRDEExtPack => default_vrde_ext_pack;
        P::LogHistoryCount => log_history_count;
        P::AutostartDatabasePath => autostart_database_path;
        P::DefaultFrontend => default_frontend;
        P::ProxyMode => proxy_mode;
        P::ProxyURL => proxy_url;
        P::LanguageId => language_id;
    }
    // Empty in the file stands for these.
    macro_rules! with_default {
        ($($attr:path => $field:ident, $default:literal;)*) => {$(
            t.add($attr, |c| {
                let stored = c.svc.state.lock().global.settings.system_properties.$field.clone();
                if stored.is_empty() { $default.to_owned() } else { stored }
            });
        )*};
    }
    with_default! {
        P::DefaultHardDiskFormat => default_hard_disk_format, "VDI";
        P::VRDEAuthLibrary => vrde_auth_library, "VBoxAuth";
        P::WebServiceAuthLibrary => web_service_auth_library, "VBoxAuth";
    }
}

fn host_computer(t: &mut ReadTable<Context>) {
    t.add(IHost::ProcessorCount, |_| host::present_cpus(Cpus::read().online))
        .add(IHost::ProcessorOnlineCount, |_| Cpus::read().online)
        .add(IHost::ProcessorCoreCount, |_| Cpus::read().cores)
        .add(IHost::ProcessorOnlineCoreCount, |_| Cpus::read().cores)
        .add(IHost::MemorySize, |_| host::memory().0)
        .add(IHost::MemoryAvailable, |_| host::memory().1)
        .add(IHost::OperatingSystem, |_| host::system().0)
        .add(IHost::OSVersion, |_| host::system().1)
        .add(IHost::UTCTime, |_| crate::svc::now_ms())
        .add(IHost::Acceleration3DAvailable, |_| false);
}

fn os(c: &Context) -> ApiResult<&'static OsType> {
    match c.object {
        Object::GuestOsType(os) => Ok(os),
        _ => Err(gone()),
    }
}

fn os_types(t: &mut ReadTable<Context>) {
    macro_rules! hints {
        ($($attr:path => $method:ident;)*) => {$( t.add_fallible($attr, |c| Ok(os(c)?.$method())); )*};
    }
    macro_rules! mirrored {
        ($($attr:path => $method:ident;)*) => {$( t.add_fallible($attr, |c| Ok(os(c)?.$method().to_api())); )*};
    }
    type T = IGuestOSType;
    hints! {
        T::Is64Bit => is_64bit;
        T::RecommendedIOAPIC => recommended_ioapic;
        T::RecommendedVirtEx => recommended_hw_virt;
        T::RecommendedRAM => recommended_ram_mb;
        T::RecommendedVRAM => recommended_vram_mb;
        T::RecommendedPAE => recommended_pae;
        T::RecommendedUSBHID => recommended_usb_hid;
        T::RecommendedHPET => recommended_hpet;
        T::RecommendedUSBTablet => recommended_usb_tablet;
        T::RecommendedRTCUseUTC => recommended_rtc_use_utc;
        T::RecommendedFloppy => recommended_floppy;
        T::RecommendedUSB => recommended_usb;
        T::RecommendedUSB3 => recommended_usb3;
        T::RecommendedTFReset => recommended_tf_reset;
        T::RecommendedX2APIC => recommended_x2apic;
        T::RecommendedCPUCount => recommended_cpus;
        T::RecommendedSecureBoot => recommended_secure_boot;
        T::RecommendedWDDMGraphics => recommended_wddm_graphics;
    }
    mirrored! {
        T::RecommendedGraphicsController => recommended_graphics;
        T::AdapterType => network_adapter;
        T::RecommendedDVDStorageController => dvd_controller;
        T::RecommendedHDStorageController => hard_disk_controller;
        T::RecommendedFirmware => recommended_firmware;
        T::RecommendedChipset => recommended_chipset;
        T::RecommendedAudioController => audio_controller;
        T::RecommendedAudioCodec => audio_codec;
        T::RecommendedTpm => recommended_tpm;
    }
    t.add_fallible(T::FamilyId, |c| Ok(os(c)?.family.id().to_owned()))
        .add_fallible(T::FamilyDescription, |c| Ok(os(c)?.family.description().to_owned()))
        .add_fallible(T::Id, |c| Ok(os(c)?.id.to_owned()))
        .add_fallible(T::Description, |c| Ok(os(c)?.description.to_owned()))
        .add_fallible(T::RecommendedHDD, |c| Ok(os(c)?.recommended_disk_size().to_api()))
        .add_fallible(T::RecommendedDVDStorageBus, |c| Ok(os(c)?.dvd_controller().bus().to_api()))
        .add_fallible(T::RecommendedHDStorageBus, |c| Ok(os(c)?.hard_disk_controller().bus().to_api()))
        .add_fallible(T::Recommended2DVideoAcceleration, |c| os(c).map(|_| false))
        .add_fallible(T::Recommended3DAcceleration, |c| os(c).map(|_| false))
        .add_fallible(T::RecommendedIommuType, |c| os(c).map(|_| api::IommuType::None));
}

/// Works on the medium that the context names.
pub(crate) fn with_medium<T>(c: &Context, work: impl FnOnce(&mut Medium) -> T) -> ApiResult<T> {
    let Object::Medium(id) = c.object else { return Err(gone()) };
    Ok(work(c.svc.state.lock().media.medium_mut(id)?))
}

/// The medium's file, looked at once if it never was.
fn looked_at(medium: &mut Medium) {
    if medium.info.is_none() && medium.last_error.is_empty() {
        medium.refresh();
    }
}

fn media(t: &mut ReadTable<Context>) {
    type M = IMedium;
    t.add_fallible(M::Id, |c| with_medium(c, |m| m.id.to_string()))
        .add_fallible(M::Description, |c| with_medium(c, |m| m.description.clone()))
        .add_fallible(M::State, |c| {
            with_medium(c, |m| {
                looked_at(m);
                m.state()
            })
        })
        .add_fallible(M::Variant, |c| {
            with_medium(c, |m| {
                looked_at(m);
                match m.info.as_ref().map(|i| i.variant) {
                    Some(variant) if m.kind == DriveType::HardDisk => {
                        crate::calls_media::variant_words(variant)
                    }
                    _ => vec![api::MediumVariant::Standard],
                }
            })
        })
        .add_fallible(M::Location, |c| with_medium(c, |m| m.location.display().to_string()))
        .add_fallible(M::Name, |c| with_medium(c, |m| m.name()))
        .add_fallible(M::DeviceType, |c| with_medium(c, |m| m.kind.to_api()))
        .add_fallible(M::HostDrive, |c| with_medium(c, |_| false))
        .add_fallible(M::Size, |c| {
            with_medium(c, |m| {
                // A dynamic image grows while it is used.
                m.refresh();
                m.info.as_ref().map_or(0, |i| i.size.to_api())
            })
        })
        .add_fallible(M::Format, |c| with_medium(c, |m| m.format.clone()))
        .add_fallible(M::Type, |c| with_medium(c, |m| m.medium_type.to_api()))
        .add_fallible(M::ReadOnly, |c| with_medium(c, |m| m.kind == DriveType::Dvd))
        .add_fallible(M::LogicalSize, |c| {
            with_medium(c, |m| {
                looked_at(m);
                m.info.as_ref().map_or(0, |i| i.logical_size.to_api())
            })
        })
        .add_fallible(M::AutoReset, |c| with_medium(c, |m| m.auto_reset))
        .add_fallible(M::LastAccessError, |c| with_medium(c, |m| m.last_error.clone()))
        .add_fallible(M::Parent, |c| {
            with_medium(c, |m| m.parent.map_or_else(ObjRef::null, |p| ObjRef::new(medium_path(p))))
        })
        .add_fallible(M::Children, |c| {
            let Object::Medium(id) = c.object else { return Err(gone()) };
            let state = c.svc.state.lock();
            Ok(state.media.children(id).into_iter().map(|m| ObjRef::new(medium_path(m))).collect())
        })
        .add_fallible(M::Base, |c| {
            let Object::Medium(mut id) = c.object else { return Err(gone()) };
            let state = c.svc.state.lock();
            while let Some(parent) = state.media.medium(id)?.parent {
                id = parent;
            }
            Ok(ObjRef::new(medium_path(id)))
        })
        .add_fallible(M::MachineIds, |c| {
            let Object::Medium(id) = c.object else { return Err(gone()) };
            let state = c.svc.state.lock();
            Ok(users_of(&state, id).iter().map(ToString::to_string).collect())
        });
}

/// Works on the session that the context names.
fn with_session<T>(c: &Context, work: impl FnOnce(&mut Session) -> T) -> ApiResult<T> {
    let Object::Session(number) = c.object else { return Err(gone()) };
    let mut state = c.svc.state.lock();
    Ok(work(state.sessions.get_mut(&number).ok_or_else(gone)?))
}

fn sessions(t: &mut ReadTable<Context>) {
    t.add_fallible(ISession::State, |c| with_session(c, |s| s.state))
        .add_fallible(ISession::Type, |c| with_session(c, |s| s.kind))
        .add_fallible(ISession::Name, |c| with_session(c, |s| s.name.clone()))
        .add_fallible(ISession::Machine, |c| {
            let Object::Session(number) = c.object else { return Err(gone()) };
            if with_session(c, |s| s.state)? != SessionState::Locked {
                return Err(ApiError::new(
                    ResultCode::Unexpected,
                    "The session is not locked (session state: Unlocked)",
                ));
            }
            Ok(ObjRef::new(MachineRef::Session(number).path()))
        });
}

pub(crate) fn writes() -> WriteTable<Context> {
    let mut t = WriteTable::default();
    crate::calls_networks::writes(&mut t);
    macro_rules! properties {
        ($($attr:path => $field:ident;)*) => {$(
            t.add($attr, |c: &mut Context, value| {
                let value = Mirror::from_api(value)?;
                c.svc.state.lock().global.edit(|g| g.system_properties.$field = value)
            });
        )*};
    }
    type P = ISystemProperties;
    properties! {
        P::ExclusiveHwVirt => exclusive_hw_virt;
        P::LoggingLevel => logging_level;
        P::VRDEAuthLibrary => vrde_auth_library;
        P::WebServiceAuthLibrary => web_service_auth_library;
        P::DefaultVRDEExtPack => default_vrde_ext_pack;
        P::LogHistoryCount => log_history_count;
        P::AutostartDatabasePath => autostart_database_path;
        P::DefaultFrontend => default_frontend;
        P::ProxyMode => proxy_mode;
        P::ProxyURL => proxy_url;
        P::LanguageId => language_id;
    }
    t.add(P::DefaultMachineFolder, |c: &mut Context, folder: String| {
        // The empty text stands for VirtualBox's own default.
        let folder = if folder.is_empty() { PathBuf::new() } else { absolute(&folder)? };
        let folder = folder.display().to_string();
        c.svc.state.lock().global.edit(|g| g.system_properties.default_machine_folder = folder)
    })
    .add(P::DefaultHardDiskFormat, |c: &mut Context, format: String| {
        if vd::Format::from_name(&format).is_none() && !format.is_empty() {
            return Err(ApiError::invalid_arg(format!("Unknown hard disk format '{format}'")));
        }
        c.svc.state.lock().global.edit(|g| g.system_properties.default_hard_disk_format = format)
    })
    .add(P::DefaultAdditionsISO, |_: &mut Context, _: String| {
        Err(ApiError::new(ResultCode::NotImpl, "The image of the Guest Additions cannot be chosen"))
    })
    .add(ISession::Name, |c: &mut Context, name: String| with_session(c, |s| s.name = name))
    .add(IMedium::Description, |c: &mut Context, text: String| {
        with_medium(c, |m| m.description = text)?;
        crate::calls::save_medium(c)
    })
    .add(IMedium::AutoReset, |c: &mut Context, on: bool| {
        with_medium(c, |m| m.auto_reset = on)?;
        crate::calls::save_medium(c)
    })
    .add(IMedium::Type, |c: &mut Context, kind: api::MediumType| {
        let kind = settings::MediumType::from_api(kind)?;
        let Object::Medium(id) = c.object else { return Err(gone()) };
        {
            let state = c.svc.state.lock();
            let users = users_of(&state, id).len();
            let indirect = matches!(kind, settings::MediumType::Immutable | settings::MediumType::MultiAttach);
            let now = state.media.medium(id)?;
            if now.medium_type != kind && (indirect && users > 0 || !state.media.children(id).is_empty()) {
                let text = format!(
                    "Cannot change the type of medium '{}' because it is attached to {users} virtual machines or has child media",
                    now.location.display()
                );
                return Err(ApiError::new(ResultCode::InvalidObjectState, text));
            }
        }
        with_medium(c, |m| {
            looked_at(m);
            if m.kind != DriveType::HardDisk {
                let text = format!(
                    "Cannot change the type of medium '{}' because it is a removable medium",
                    m.location.display()
                );
                return Err(ApiError::new(ResultCode::InvalidObjectState, text));
            }
            if m.parent.is_some() {
                let text = format!(
                    "Cannot change the type of medium '{}' because it is a differencing medium",
                    m.location.display()
                );
                return Err(ApiError::new(ResultCode::InvalidObjectState, text));
            }
            let fixed = m.info.as_ref().is_some_and(|i| i.variant.is_fixed());
            if kind == settings::MediumType::Shareable && !fixed {
                let text = format!(
                    "Cannot change type for medium '{}' to 'Shareable' since it is a dynamic medium storage unit",
                    m.location.display()
                );
                return Err(ApiError::invalid_arg(text));
            }
            m.medium_type = kind;
            Ok(())
        })??;
        crate::calls::save_medium(c)
    })
    .add(IMedium::Location, |c: &mut Context, location: String| crate::calls::move_medium(c, &location));
    t
}

/// Machine states for IVirtualBox::getMachineStates.
pub(crate) fn machine_state(c: &Context, machine: &ObjRef<IMachine>) -> MachineState {
    let reference = match crate::objects::parse(machine.path()) {
        Some(Object::Machine(reference, _)) => reference,
        _ => return MachineState::Null,
    };
    c.svc.state.lock().resolve(c.peer.id, reference).map_or(MachineState::Null, |m| m.state)
}
