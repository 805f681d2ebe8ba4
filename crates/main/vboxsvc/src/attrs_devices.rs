//! The attributes of the objects below a machine: one line each.

use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::{ReadTable, WriteTable};
use main_api::types::ObjRef;
use settings as set;

use crate::limits;
use crate::mirror::Mirror;
use crate::objects::{Part, medium_path};
use crate::view::{View, gone, in_range};

/// The networks of cards that name none.
const DEFAULT_INTERNAL: &str = "intnet";
const DEFAULT_NAT_NETWORK: &str = "NatNetwork";

/// A way from a view to one of its parts' settings.
macro_rules! lens {
    ($read:ident, $write:ident, $ty:ty, $s:ident, $part:pat => $ref:expr, $mut:expr) => {
        fn $read(v: &View) -> ApiResult<&$ty> {
            let $s = &*v.settings;
            match &v.part {
                $part => $ref,
                _ => None,
            }
            .ok_or_else(gone)
        }

        fn $write(v: &mut View) -> ApiResult<&mut $ty> {
            let part = v.part.clone();
            let $s = v.edit();
            match &part {
                $part => $mut,
                _ => None,
            }
            .ok_or_else(gone)
        }
    };
}

lens!(nic, nic_mut, set::NetworkAdapter, s, Part::NetworkAdapter(i) | Part::NatEngine(i) =>
    s.hardware.network.get(*i), s.hardware.network.get_mut(*i));
lens!(serial, serial_mut, set::SerialPort, s, Part::SerialPort(i) =>
    s.hardware.serial_ports.get(*i), s.hardware.serial_ports.get_mut(*i));
lens!(parallel, parallel_mut, set::ParallelPort, s, Part::ParallelPort(i) =>
    s.hardware.parallel_ports.get(*i), s.hardware.parallel_ports.get_mut(*i));
lens!(audio, audio_mut, set::Audio, s, Part::AudioAdapter => Some(&s.hardware.audio), Some(&mut s.hardware.audio));
lens!(display, display_mut, set::Display, s, Part::GraphicsAdapter => Some(&s.hardware.display), Some(&mut s.hardware.display));
lens!(bios, bios_mut, set::Bios, s, Part::Bios => Some(&s.hardware.bios), Some(&mut s.hardware.bios));
lens!(vrde, vrde_mut, set::RemoteDisplay, s, Part::Vrde =>
    Some(&s.hardware.remote_display), Some(&mut s.hardware.remote_display));
lens!(usb, usb_mut, set::UsbController, s, Part::UsbController(name) =>
    s.hardware.usb.controllers.iter().find(|c| c.name == *name),
    s.hardware.usb.controllers.iter_mut().find(|c| c.name == *name));
lens!(filter, filter_mut, set::UsbDeviceFilter, s, Part::UsbFilter(i) =>
    s.hardware.usb.device_filters.get(*i), s.hardware.usb.device_filters.get_mut(*i));
lens!(controller, controller_mut, set::StorageController, s, Part::StorageController(name) =>
    s.hardware.storage_controller(name), s.hardware.storage_controller_mut(name));
lens!(folder, folder_mut, set::SharedFolder, s, Part::SharedFolder(name) =>
    s.hardware.shared_folders.iter().find(|f| f.name == *name),
    s.hardware.shared_folders.iter_mut().find(|f| f.name == *name));
lens!(group, group_mut, set::BandwidthGroup, s, Part::BandwidthGroup(name) =>
    s.hardware.bandwidth_groups.iter().find(|g| g.name == *name),
    s.hardware.bandwidth_groups.iter_mut().find(|g| g.name == *name));
lens!(screen, screen_mut, set::RecordingScreen, s, Part::RecordingScreen(i) =>
    s.recording.screens.get(*i), s.recording.screens.get_mut(*i));
lens!(debug, debug_mut, set::Debugging, s, Part::GuestDebug => Some(&s.debugging), Some(&mut s.debugging));
lens!(tpm, tpm_mut, set::Tpm, s, Part::Tpm => Some(&s.hardware.tpm), Some(&mut s.hardware.tpm));

/// Attributes that are fields: both tables get an entry.
macro_rules! fields {
    ($r:ident, $w:ident, $lens:ident, $lens_mut:ident; $($attr:path => $($field:ident).+;)*) => {$(
        $r.add_fallible($attr, |v: &View| $lens(v).map(|x| Mirror::to_api(&x.$($field).+)));
        $w.add($attr, |v: &mut View, value| {
            $lens_mut(v)?.$($field).+ = Mirror::from_api(value)?;
            Ok(())
        });
    )*};
}

pub(crate) fn add(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    network(r, w);
    ports(r, w);
    multimedia(r, w);
    firmware(r, w);
    usb_devices(r, w);
    storage(r, w);
    others(r, w);
}

fn network(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, nic, nic_mut;
        INetworkAdapter::AdapterType => adapter_type;
        INetworkAdapter::BridgedInterface => bridged_interface;
        INetworkAdapter::HostOnlyInterface => host_only_interface;
        INetworkAdapter::HostOnlyNetwork => host_only_network;
        INetworkAdapter::GenericDriver => generic_driver;
        INetworkAdapter::CloudNetwork => cloud_network;
        INetworkAdapter::CableConnected => cable_connected;
        INetworkAdapter::LineSpeed => line_speed;
        INetworkAdapter::PromiscModePolicy => promisc_policy;
        INetworkAdapter::TraceEnabled => trace_enabled;
        INetworkAdapter::TraceFile => trace_file;
        INetworkAdapter::BandwidthGroup => bandwidth_group;
        INATEngine::Network => nat.network;
        INATEngine::HostIP => nat.bind_ip;
        INATEngine::TFTPPrefix => nat.tftp_prefix;
        INATEngine::TFTPBootFile => nat.tftp_boot_file;
        INATEngine::TFTPNextServer => nat.tftp_next_server;
        INATEngine::DNSPassDomain => nat.dns_pass_domain;
        INATEngine::DNSProxy => nat.dns_proxy;
        INATEngine::DNSUseHostResolver => nat.dns_use_host_resolver;
        INATEngine::LocalhostReachable => nat.localhost_reachable;
        INATEngine::AliasLog => nat.alias_log;
        INATEngine::AliasProxyOnly => nat.alias_proxy_only;
        INATEngine::AliasUseSamePorts => nat.alias_use_same_ports;
    }
    r.add_fallible(INetworkAdapter::Slot, |v| nic(v).map(|n| n.slot))
        .add_fallible(INetworkAdapter::Enabled, |v| nic(v).map(|n| n.enabled))
        .add_fallible(INetworkAdapter::AttachmentType, |v| nic(v).map(|n| n.attachment.to_api()))
        .add_fallible(INetworkAdapter::MACAddress, |v| nic(v).map(|n| n.mac_address.clone()))
        .add_fallible(INetworkAdapter::InternalNetwork, |v| nic(v).map(|n| n.internal_network.clone()))
        .add_fallible(INetworkAdapter::NATNetwork, |v| nic(v).map(|n| n.nat_network.clone()))
        .add_fallible(INetworkAdapter::NATEngine, |v| {
            nic(v).map(|n| v.object(Part::NatEngine(n.slot as usize)))
        })
        .add_fallible(INetworkAdapter::BootPriority, |v| nic(v).map(|n| n.boot_priority))
        .add_fallible(INATEngine::ForwardBroadcast, |v| nic(v).map(|_| false))
        .add_fallible(INATEngine::Redirects, |v| nic(v).map(|n| n.nat.rules.iter().map(redirect).collect()));
    w.add(INetworkAdapter::Enabled, |v: &mut View, enabled| {
        let nic = nic_mut(v)?;
        nic.enabled = enabled;
        // Imported machines and old files have cards without one.
        if enabled && nic.mac_address.is_empty() {
            nic.mac_address = set::generate_mac_address();
        }
        Ok(())
    })
    .add(INetworkAdapter::AttachmentType, |v: &mut View, attachment| {
        let nic = nic_mut(v)?;
        nic.attachment = Mirror::from_api(attachment)?;
        // Networks of these kinds have a default.
        match nic.attachment {
            set::NetworkAttachment::Internal if nic.internal_network.is_empty() => {
                nic.internal_network = DEFAULT_INTERNAL.into();
            }
            set::NetworkAttachment::NatNetwork if nic.nat_network.is_empty() => {
                nic.nat_network = DEFAULT_NAT_NETWORK.into();
            }
            _ => {}
        }
        Ok(())
    })
    .add(INetworkAdapter::MACAddress, |v: &mut View, address| {
        nic_mut(v)?.mac_address = mac_address(&address)?;
        Ok(())
    })
    .add(INetworkAdapter::InternalNetwork, |v: &mut View, name: String| {
        // The empty name stands for the default network.
        nic_mut(v)?.internal_network = if name.is_empty() { DEFAULT_INTERNAL.into() } else { name };
        Ok(())
    })
    .add(INetworkAdapter::NATNetwork, |v: &mut View, name: String| {
        nic_mut(v)?.nat_network = if name.is_empty() { DEFAULT_NAT_NETWORK.into() } else { name };
        Ok(())
    })
    .add(INetworkAdapter::BootPriority, |v: &mut View, priority| {
        nic_mut(v)?.boot_priority = in_range("boot priority", priority, 0, 4, "")?;
        Ok(())
    })
    .add(INATEngine::ForwardBroadcast, |_: &mut View, forward| {
        if forward {
            let text = "Forwarding of broadcasts from the NAT engine is not possible";
            return Err(ApiError::new(vbox_types::ResultCode::NotSupported, text));
        }
        Ok(())
    });
}

/// A port forwarding rule as `INATEngine::redirects` lists it.
fn redirect(rule: &set::NatRule) -> String {
    let protocol = match rule.protocol {
        set::NatProtocol::Udp => 0,
        set::NatProtocol::Tcp => 1,
    };
    format!(
        "{},{protocol},{},{},{},{}",
        rule.name, rule.host_ip, rule.host_port, rule.guest_ip, rule.guest_port
    )
}

/// Checks a network address, or makes one of VirtualBox's range (08:00:27) if `text` is empty.
pub(crate) fn mac_address(text: &str) -> ApiResult<String> {
    if text.is_empty() {
        return Ok(set::generate_mac_address());
    }
    let invalid = |why: &str| Err(ApiError::invalid_arg(format!("Invalid MAC address format: {why}")));
    if text.len() != 12 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return invalid("twelve hexadecimal digits are needed");
    }
    // Bit 0 of the first octet marks a multicast address, which no card may have.
    if u8::from_str_radix(&text[..2], 16).is_ok_and(|first| first & 1 != 0) {
        return invalid("it is a multicast address");
    }
    Ok(text.to_ascii_uppercase())
}

fn ports(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, serial, serial_mut;
        ISerialPort::Enabled => enabled;
        ISerialPort::HostMode => mode;
        ISerialPort::Server => server;
        ISerialPort::UartType => uart_type;
    }
    fields! { r, w, parallel, parallel_mut;
        IParallelPort::Enabled => enabled;
        IParallelPort::Path => path;
    }
    r.add_fallible(ISerialPort::Slot, |v| serial(v).map(|p| p.slot))
        .add_fallible(ISerialPort::IOAddress, |v| serial(v).map(|p| p.io_base))
        .add_fallible(ISerialPort::IRQ, |v| serial(v).map(|p| p.irq))
        .add_fallible(ISerialPort::Path, |v| serial(v).map(|p| p.path.clone()))
        .add_fallible(IParallelPort::Slot, |v| parallel(v).map(|p| p.slot))
        .add_fallible(IParallelPort::IOAddress, |v| parallel(v).map(|p| p.io_base))
        .add_fallible(IParallelPort::IRQ, |v| parallel(v).map(|p| p.irq));
    w.add(ISerialPort::IOAddress, |v: &mut View, address| {
        serial_mut(v)?.io_base = io_base(address)?;
        Ok(())
    })
    .add(ISerialPort::IRQ, |v: &mut View, irq| {
        serial_mut(v)?.irq = interrupt(irq)?;
        Ok(())
    })
    .add(ISerialPort::Path, |v: &mut View, path: String| {
        serial_mut(v)?.path = path;
        Ok(())
    })
    .add(IParallelPort::IOAddress, |v: &mut View, address| {
        parallel_mut(v)?.io_base = io_base(address)?;
        Ok(())
    })
    .add(IParallelPort::IRQ, |v: &mut View, irq| {
        parallel_mut(v)?.irq = interrupt(irq)?;
        Ok(())
    });
}

fn io_base(address: u32) -> ApiResult<u32> {
    if address > 0xffff {
        return Err(ApiError::invalid_arg(format!(
            "Invalid I/O port base address: {address:#x} (must be in range [0, 0xffff])"
        )));
    }
    Ok(address)
}

fn interrupt(irq: u32) -> ApiResult<u32> {
    in_range("IRQ number", irq, 0, 255, "")
}

fn multimedia(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, audio, audio_mut;
        IAudioAdapter::Enabled => enabled;
        IAudioAdapter::EnabledIn => enabled_in;
        IAudioAdapter::EnabledOut => enabled_out;
        IAudioAdapter::AudioCodec => codec;
        IAudioAdapter::AudioDriver => driver;
    }
    r.add(IAudioSettings::Adapter, |v| v.object(Part::AudioAdapter));
    r.add_fallible(IAudioAdapter::AudioController, |v| audio(v).map(|a| a.controller.to_api()));
    w.add(IAudioAdapter::AudioController, |v: &mut View, value| {
        let audio = audio_mut(v)?;
        audio.controller = Mirror::from_api(value)?;
        // Each card has its own codec.
        audio.codec = audio.controller.default_codec();
        Ok(())
    });
    fields! { r, w, display, display_mut;
        IGraphicsAdapter::GraphicsControllerType => controller;
        IGraphicsAdapter::Accelerate3DEnabled => accelerate_3d;
        IGraphicsAdapter::Accelerate2DVideoEnabled => accelerate_2d_video;
    }
    r.add_fallible(IGraphicsAdapter::VRAMSize, |v| display(v).map(|d| d.vram_mb))
        .add_fallible(IGraphicsAdapter::MonitorCount, |v| display(v).map(|d| d.monitor_count));
    w.add(IGraphicsAdapter::VRAMSize, |v: &mut View, size| {
        display_mut(v)?.vram_mb = in_range("VRAM size", size, limits::MIN_VRAM, limits::MAX_VRAM, " MB")?;
        Ok(())
    })
    .add(IGraphicsAdapter::MonitorCount, |v: &mut View, count| {
        display_mut(v)?.monitor_count = in_range("monitor count", count, 1, limits::MAX_MONITORS, "")?;
        Ok(())
    });
    fields! { r, w, vrde, vrde_mut;
        IVRDEServer::Enabled => enabled;
        IVRDEServer::AuthType => auth_type;
        IVRDEServer::AuthTimeout => auth_timeout;
        IVRDEServer::AllowMultiConnection => allow_multi_connection;
        IVRDEServer::ReuseSingleConnection => reuse_single_connection;
        IVRDEServer::VRDEExtPack => ext_pack;
        IVRDEServer::AuthLibrary => auth_library;
    }
    r.add_fallible(IVRDEServer::VRDEProperties, |v| vrde(v).map(|d| d.properties.keys().cloned().collect()));
    r.add(IRecordingSettings::Enabled, |v| v.settings.recording.enabled)
        .add(IRecordingSettings::Screens, |v| {
            (0..v.settings.recording.screens.len()).map(|i| v.object(Part::RecordingScreen(i))).collect()
        })
        .add_fallible(IRecordingScreenSettings::Id, |v| screen(v).map(|s| s.id));
    w.add(IRecordingSettings::Enabled, |v: &mut View, enabled| {
        v.edit().recording.enabled = enabled;
        Ok(())
    });
    fields! { r, w, screen, screen_mut;
        IRecordingScreenSettings::Enabled => enabled;
        IRecordingScreenSettings::Filename => file;
        IRecordingScreenSettings::MaxTime => max_time_s;
        IRecordingScreenSettings::MaxFileSize => max_size_mb;
        IRecordingScreenSettings::Options => options;
        IRecordingScreenSettings::VideoWidth => width;
        IRecordingScreenSettings::VideoHeight => height;
        IRecordingScreenSettings::VideoRate => rate_kbps;
        IRecordingScreenSettings::VideoFPS => fps;
    }
}

fn firmware(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, bios, bios_mut;
        IBIOSSettings::LogoFadeIn => logo_fade_in;
        IBIOSSettings::LogoFadeOut => logo_fade_out;
        IBIOSSettings::LogoDisplayTime => logo_display_time;
        IBIOSSettings::LogoImagePath => logo_image_path;
        IBIOSSettings::BootMenuMode => boot_menu_mode;
        IBIOSSettings::ACPIEnabled => acpi;
        IBIOSSettings::IOAPICEnabled => ioapic;
        IBIOSSettings::APICMode => apic_mode;
        IBIOSSettings::TimeOffset => time_offset;
        IBIOSSettings::PXEDebugEnabled => pxe_debug;
        IBIOSSettings::SMBIOSUuidLittleEndian => smbios_uuid_little_endian;
    }
    fields! { r, w, tpm, tpm_mut;
        ITrustedPlatformModule::Type => tpm_type;
        ITrustedPlatformModule::Location => location;
    }
    fields! { r, w, debug, debug_mut;
        IGuestDebugControl::DebugProvider => guest_debug_provider;
        IGuestDebugControl::DebugIoProvider => guest_debug_io;
        IGuestDebugControl::DebugAddress => guest_debug_address;
        IGuestDebugControl::DebugPort => guest_debug_port;
    }
    r.add(INvramStore::NonVolatileStorageFile, |v| {
        let path = &v.settings.hardware.nvram.path;
        if path.is_empty() {
            return v.meta.settings_file.with_extension("nvram").display().to_string();
        }
        v.machine_folder().join(path).display().to_string()
    });
}

fn usb_devices(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, usb, usb_mut;
        IUSBController::Name => name;
    }
    r.add_fallible(IUSBController::Type, |v| usb(v).map(|c| c.controller_type.to_api()))
        .add_fallible(IUSBController::USBStandard, |v| {
            usb(v).map(|c| match c.controller_type {
                set::UsbControllerType::Ohci => 0x0101,
                set::UsbControllerType::Ehci => 0x0200,
                set::UsbControllerType::Xhci => 0x0300,
            })
        })
        .add(IUSBDeviceFilters::DeviceFilters, |v| {
            (0..v.settings.hardware.usb.device_filters.len()).map(|i| v.object(Part::UsbFilter(i))).collect()
        });
    fields! { r, w, filter, filter_mut;
        IUSBDeviceFilter::Name => name;
        IUSBDeviceFilter::Active => active;
        IUSBDeviceFilter::VendorId => vendor_id;
        IUSBDeviceFilter::ProductId => product_id;
        IUSBDeviceFilter::Revision => revision;
        IUSBDeviceFilter::Manufacturer => manufacturer;
        IUSBDeviceFilter::Product => product;
        IUSBDeviceFilter::SerialNumber => serial_number;
        IUSBDeviceFilter::Port => port;
        IUSBDeviceFilter::Remote => remote;
        IUSBDeviceFilter::MaskedInterfaces => masked_interfaces;
    }
}

fn attachment(v: &View) -> ApiResult<&set::AttachedDevice> {
    let Part::Attachment(name, port, device) = &v.part else { return Err(gone()) };
    let controller = v.settings.hardware.storage_controller(name).ok_or_else(gone)?;
    controller.attached.iter().find(|a| a.port == *port && a.device == *device).ok_or_else(gone)
}

fn storage(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    r.add_fallible(IStorageController::Name, |v| controller(v).map(|c| c.name.clone()))
        .add_fallible(IStorageController::MaxDevicesPerPortCount, |v| {
            controller(v).map(|c| limits::max_devices_per_port(c.bus()))
        })
        .add_fallible(IStorageController::MinPortCount, |v| controller(v).map(|c| limits::min_ports(c.bus())))
        .add_fallible(IStorageController::MaxPortCount, |v| controller(v).map(|c| limits::max_ports(c.bus())))
        .add_fallible(IStorageController::Instance, |v| controller(v).map(|c| c.instance))
        .add_fallible(IStorageController::PortCount, |v| controller(v).map(|c| c.port_count))
        .add_fallible(IStorageController::Bus, |v| controller(v).map(|c| c.bus().to_api()))
        .add_fallible(IStorageController::ControllerType, |v| {
            controller(v).map(|c| c.controller_type.to_api())
        })
        .add_fallible(IStorageController::UseHostIOCache, |v| controller(v).map(|c| c.use_host_io_cache))
        .add_fallible(IStorageController::Bootable, |v| controller(v).map(|c| c.bootable))
        .add_fallible(IMediumAttachment::Medium, |v| {
            attachment(v).map(|a| a.image.map_or_else(ObjRef::null, |id| ObjRef::new(medium_path(id))))
        })
        .add_fallible(IMediumAttachment::Controller, |v| match &v.part {
            Part::Attachment(name, ..) => Ok(name.clone()),
            _ => Err(gone()),
        })
        .add_fallible(IMediumAttachment::Port, |v| attachment(v).map(|a| a.port))
        .add_fallible(IMediumAttachment::Device, |v| attachment(v).map(|a| a.device))
        .add_fallible(IMediumAttachment::Type, |v| attachment(v).map(|a| a.drive.to_api()))
        .add_fallible(IMediumAttachment::Passthrough, |v| attachment(v).map(|a| a.pass_through))
        .add_fallible(IMediumAttachment::TemporaryEject, |v| attachment(v).map(|a| a.temp_eject))
        .add_fallible(IMediumAttachment::IsEjected, |v| {
            attachment(v).map(|a| a.ejected && a.image.is_none() && v.meta.state.is_online())
        })
        .add_fallible(IMediumAttachment::NonRotational, |v| attachment(v).map(|a| a.non_rotational))
        .add_fallible(IMediumAttachment::Discard, |v| attachment(v).map(|a| a.discard))
        .add_fallible(IMediumAttachment::HotPluggable, |v| attachment(v).map(|a| a.hot_pluggable))
        .add_fallible(IMediumAttachment::BandwidthGroup, |v| {
            attachment(v).map(|a| a.bandwidth_group.clone())
        });
    w.add(IStorageController::Name, |v: &mut View, name: String| {
        if v.settings.hardware.storage_controllers.iter().any(|c| c.name == name) {
            return Err(ApiError::new(
                vbox_types::ResultCode::ObjectInUse,
                format!("Storage controller named '{name}' already exists"),
            ));
        }
        controller_mut(v)?.name = name;
        Ok(())
    })
    .add(IStorageController::UseHostIOCache, |v: &mut View, on| {
        controller_mut(v)?.use_host_io_cache = on;
        Ok(())
    })
    .add(IStorageController::Instance, |v: &mut View, instance| {
        controller_mut(v)?.instance = instance;
        Ok(())
    })
    .add(IStorageController::PortCount, |v: &mut View, count| {
        let c = controller_mut(v)?;
        let (min, max) = (limits::min_ports(c.bus()), limits::max_ports(c.bus()));
        c.port_count = in_range("port count", count, min, max, "")?;
        Ok(())
    })
    .add(IStorageController::ControllerType, |v: &mut View, kind| {
        let c = controller_mut(v)?;
        let new = set::StorageControllerType::from_api(kind)?;
        if new.bus() != c.bus() {
            return Err(ApiError::invalid_arg(format!(
                "Invalid controller type {} for the bus {}",
                new.as_str(),
                c.bus().as_str()
            )));
        }
        c.controller_type = new;
        Ok(())
    });
}

fn others(r: &mut ReadTable<View>, w: &mut WriteTable<View>) {
    fields! { r, w, folder, folder_mut;
        ISharedFolder::Writable => writable;
        ISharedFolder::AutoMount => auto_mount;
        ISharedFolder::AutoMountPoint => auto_mount_point;
    }
    r.add_fallible(ISharedFolder::Name, |v| folder(v).map(|f| f.name.clone()))
        .add_fallible(ISharedFolder::HostPath, |v| folder(v).map(|f| f.host_path.clone()))
        .add_fallible(ISharedFolder::Accessible, |v| {
            folder(v).map(|f| std::path::Path::new(&f.host_path).is_dir())
        });
    fields! { r, w, group, group_mut;
        IBandwidthGroup::MaxBytesPerSec => max_bytes_per_sec;
    }
    r.add_fallible(IBandwidthGroup::Name, |v| group(v).map(|g| g.name.clone()))
        .add_fallible(IBandwidthGroup::Type, |v| group(v).map(|g| g.group_type.to_api()))
        .add(IBandwidthControl::NumGroups, |v| v.settings.hardware.bandwidth_groups.len() as u32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_are_checked_and_made() {
        assert_eq!(mac_address("0800273f1a2b").unwrap(), "0800273F1A2B");
        assert!(mac_address("").unwrap().starts_with("080027"));
        for bad in ["0800273f1a2", "08:00:27:3f:1a:2b", "0900273f1a2b", "0800273f1a2g"] {
            assert!(mac_address(bad).is_err(), "{bad}");
        }
    }
}
