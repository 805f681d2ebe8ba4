//! `<Hardware>`, without network and storage.

use super::Walk;
use super::machine::video_capture;
use super::shared::{string_map, usb_filters};
use crate::model::*;
use crate::version::SettingsVersion as V;
use crate::words::*;
use crate::xml::{Archive, Hex, Outcome, Value};

/// Stands in the file for the host's default sound system; read only by versions that know no `useDefault`.
const DEFAULT_AUDIO_DRIVER: AudioDriver = AudioDriver::Alsa;

impl Walk {
    /// `<Hardware>`. Recordings stand in it before version 1.19, and are therefore handed in.
    pub(super) fn hardware(
        &mut self,
        a: &mut Archive<'_>,
        h: &mut Hardware,
        recording: &mut Recording,
    ) -> Outcome {
        let no_text = String::new;
        let default_version = if self.since(V::V1_7) { "2" } else { "1" };
        a.attribute("version", &mut h.version, default_version.into())?;
        a.optional("uuid", &mut h.uuid)?;
        a.child_if(true, "CPU", |a| self.cpu(a, &mut h.cpu))?;
        if a.reading() && !a.has_child("Memory") {
            return Err(a.error(
                "Required Memory/@RAMSize element/attribute is missing",
                "add <Memory RAMSize=\"…\"/>, in megabytes",
            ));
        }
        a.child_if(true, "Memory", |a| {
            a.required("RAMSize", &mut h.memory.ram_mb)?;
            a.attribute("PageFusion", &mut h.memory.page_fusion, false)
        })?;
        a.child("Firmware", |a| a.attribute("type", &mut h.firmware, Firmware::Bios))?;
        a.child("HID", |a| {
            a.attribute("Pointing", &mut h.pointing_hid, PointingHid::Ps2Mouse)?;
            a.attribute("Keyboard", &mut h.keyboard_hid, KeyboardHid::Ps2Keyboard)
        })?;
        a.flag("HPET", &mut h.hpet, false)?;
        a.child("Chipset", |a| a.attribute("type", &mut h.chipset, Chipset::Piix3))?;
        self.paravirt(a, h)?;
        a.child("Iommu", |a| a.attribute("type", &mut h.iommu, Iommu::None))?;
        boot_order(a, &mut h.boot_order)?;
        a.child("Display", |a| {
            let display = &mut h.display;
            a.attribute("controller", &mut display.controller, GraphicsController::VBoxVga)?;
            a.attribute("VRAMSize", &mut display.vram_mb, 8)?;
            a.attribute("monitorCount", &mut display.monitor_count, 1)?;
            a.attribute("accelerate3D", &mut display.accelerate_3d, false)?;
            a.attribute("accelerate2DVideo", &mut display.accelerate_2d_video, false)
        })?;
        if a.reading() {
            *recording = Recording::default();
            self.capture_in_hardware |= a.has_child("VideoCapture");
        }
        if !self.since(V::V1_19) && self.capture_in_hardware {
            video_capture(a, h.display.monitor_count, recording)?;
        }
        self.remote_display(a, &mut h.remote_display)?;
        bios(a, &mut h.bios, &mut h.nvram)?;
        a.child("TrustedPlatformModule", |a| {
            let write = h.tpm != Tpm::default();
            a.attribute_if(write, "type", &mut h.tpm.tpm_type, TpmType::None)?;
            a.attribute_if(write, "location", &mut h.tpm.location, no_text())
        })?;
        if !self.since(V::V1_9) && !a.reading() {
            self.drives_before_1_9(a, h)?;
        }
        self.usb(a, &mut h.usb)?;
        self.network(a, h)?;
        self.serial_ports(a, &mut h.serial_ports)?;
        parallel_ports(a, &mut h.parallel_ports)?;
        a.child_if(true, "AudioAdapter", |a| self.audio(a, &mut h.audio))?;
        rtc(a, &mut h.rtc_use_utc)?;
        a.child("SharedFolders", |a| {
            a.list("SharedFolder", &mut h.shared_folders, |a, folder| {
                a.required("name", &mut folder.name)?;
                a.required("hostPath", &mut folder.host_path)?;
                a.always("writable", &mut folder.writable, false)?;
                a.always("autoMount", &mut folder.auto_mount, false)?;
                a.attribute("autoMountPoint", &mut folder.auto_mount_point, no_text())
            })
        })?;
        a.child_if(true, "Clipboard", |a| {
            a.attribute("mode", &mut h.clipboard_mode, TransferMode::Disabled)?;
            a.attribute("fileTransfersEnabled", &mut h.clipboard_file_transfers, false)
        })?;
        a.child("DragAndDrop", |a| a.attribute("mode", &mut h.drag_and_drop_mode, TransferMode::Disabled))?;
        self.io(a, h)?;
        a.child("HostPci", |a| {
            a.child("Devices", |a| {
                a.list("Device", &mut h.host_pci, |a, device| {
                    a.required("host", &mut device.host_address)?;
                    a.required("guest", &mut device.guest_address)?;
                    a.always("name", &mut device.name, no_text())
                })
            })
        })?;
        a.child("EmulatedUSB", |a| a.flag("CardReader", &mut h.emulated_usb_card_reader, false))?;
        a.child("Frontend", |a| {
            a.child("Default", |a| a.attribute("type", &mut h.default_frontend, no_text()))
        })?;
        a.child("Guest", |a| a.attribute("memoryBalloonSize", &mut h.memory_balloon_mb, 0))?;
        a.child("GuestProperties", |a| {
            a.list("GuestProperty", &mut h.guest_properties, |a, property| {
                a.required("name", &mut property.name)?;
                a.always("value", &mut property.value, no_text())?;
                a.always("timestamp", &mut property.timestamp, 0)?;
                a.always("flags", &mut property.flags, no_text())
            })
        })?;
        if a.reading() {
            h.storage_controllers.clear();
        }
        if a.reading() || self.since(V::V1_17) {
            self.storage(a, h)?;
        }
        Ok(())
    }

    fn cpu(&mut self, a: &mut Archive<'_>, c: &mut Cpu) -> Outcome {
        a.attribute("count", &mut c.count, 1)?;
        a.attribute("executionCap", &mut c.execution_cap, 100)?;
        a.attribute("CpuIdPortabilityLevel", &mut c.portability_level, 0)?;
        let write = c.profile != "host" && !c.profile.is_empty();
        a.attribute_if(write, "CpuProfile", &mut c.profile, "host".into())?;
        a.attribute("hotplug", &mut c.hotplug, false)?;

        a.flag("HardwareVirtEx", &mut c.hw_virt, true)?;
        a.flag("HardwareVirtExNestedPaging", &mut c.nested_paging, true)?;
        a.flag("HardwareVirtExVPID", &mut c.vpid, true)?;
        a.flag("HardwareVirtExUX", &mut c.unrestricted_execution, true)?;
        a.flag_always("PAE", &mut c.pae, self.since(V::V1_9))?;
        a.child("IBPBOn", |a| {
            a.attribute("vmexit", &mut c.ibpb_on_vm_exit, false)?;
            a.attribute("vmentry", &mut c.ibpb_on_vm_entry, false)
        })?;
        a.flag("SpecCtrl", &mut c.spec_ctrl, false)?;
        a.flag("SpecCtrlByHost", &mut c.spec_ctrl_by_host, false)?;
        a.child("L1DFlushOn", |a| {
            a.attribute("scheduling", &mut c.l1d_flush_on_sched, true)?;
            a.attribute("vmentry", &mut c.l1d_flush_on_vm_entry, false)
        })?;
        a.child("MDSClearOn", |a| {
            a.attribute("scheduling", &mut c.mds_clear_on_sched, true)?;
            a.attribute("vmentry", &mut c.mds_clear_on_vm_entry, false)
        })?;
        a.flag("NestedHWVirt", &mut c.nested_hw_virt, false)?;
        a.flag("HardwareVirtExVirtVmsaveVmload", &mut c.virt_vmsave_vmload, true)?;
        a.child("LongMode", |a| {
            if a.reading() {
                c.long_mode = match a.read("enabled")? {
                    Some(true) => LongMode::Enabled,
                    Some(false) => LongMode::Disabled,
                    None => LongMode::Legacy,
                };
            } else if c.long_mode != LongMode::Legacy {
                a.write("enabled", &(c.long_mode == LongMode::Enabled));
            }
            Ok(())
        })?;
        a.flag("TripleFaultReset", &mut c.triple_fault_reset, false)?;
        a.flag("X2APIC", &mut c.x2apic, false)?;
        if c.x2apic {
            c.apic = true;
        } else {
            a.flag("APIC", &mut c.apic, true)?;
        }
        a.flag_always("HardwareVirtExLargePages", &mut c.large_pages, false)?;
        a.flag("HardwareVirtForce", &mut c.hw_virt_force, false)?;
        a.flag("HardwareVirtExUseNativeApi", &mut c.use_native_api, false)?;
        if a.reading() && a.has_child("SyntheticCpu") {
            let mut synthetic = false;
            a.flag("SyntheticCpu", &mut synthetic, false)?;
            c.portability_level = a.read("CpuIdPortabilityLevel")?.unwrap_or(u32::from(synthetic));
        }
        a.child("CpuTree", |a| {
            if !c.hotplug {
                c.plugged.clear();
                return Ok(());
            }
            a.list("Cpu", &mut c.plugged, |a, id| a.required("id", id))
        })?;
        a.child("CpuIdTree", |a| {
            a.list("CpuIdLeaf", &mut c.cpuid_leaves, |a, leaf| {
                a.required("id", &mut leaf.index)?;
                a.attribute("subleaf", &mut leaf.subleaf, 0)?;
                a.always("eax", &mut leaf.eax, 0)?;
                a.always("ebx", &mut leaf.ebx, 0)?;
                a.always("ecx", &mut leaf.ecx, 0)?;
                a.always("edx", &mut leaf.edx, 0)
            })
        })
    }

    fn paravirt(&mut self, a: &mut Archive<'_>, h: &mut Hardware) -> Outcome {
        let default = if self.since(V::V1_16) { ParavirtProvider::Default } else { ParavirtProvider::Legacy };
        let write = h.paravirt_provider != default || !h.paravirt_debug.is_empty();
        a.child("Paravirt", |a| {
            a.attribute_if(write, "provider", &mut h.paravirt_provider, default)?;
            a.attribute("debug", &mut h.paravirt_debug, String::new())
        })
    }

    fn remote_display(&mut self, a: &mut Archive<'_>, r: &mut RemoteDisplay) -> Outcome {
        let since_4_0 = self.since(V::V1_11);
        a.child("RemoteDisplay", |a| {
            a.attribute("enabled", &mut r.enabled, !self.since(V::V1_16))?;
            if !a.reading() && !since_4_0 {
                for (attribute, property) in OLD_REMOTE_DISPLAY {
                    if let Some(value) = r.properties.get(property) {
                        a.write(attribute, value);
                    }
                }
            }
            a.attribute("authType", &mut r.auth_type, AuthType::Null)?;
            let write = r.auth_timeout != 0 && r.auth_timeout != 5000;
            a.attribute_if(write, "authTimeout", &mut r.auth_timeout, 5000)?;
            a.attribute("allowMultiConnection", &mut r.allow_multi_connection, false)?;
            a.attribute("reuseSingleConnection", &mut r.reuse_single_connection, false)?;
            a.attribute("authLibrary", &mut r.auth_library, String::new())?;
            a.attribute("VRDEExtPack", &mut r.ext_pack, String::new())?;
            if a.reading() {
                a.child("VRDEProperties", |a| string_map(a, "Property", &mut r.properties))?;
                // What stood in attributes before version 1.11 gives way to properties.
                for (attribute, property) in OLD_REMOTE_DISPLAY {
                    if let Some(value) = a.read(attribute)? {
                        r.properties.entry(property.into()).or_insert(value);
                    }
                }
                if a.has_child("VideoChannel") {
                    video_channel(a, &mut r.properties)?;
                }
                return Ok(());
            }
            if since_4_0 {
                a.child("VRDEProperties", |a| string_map(a, "Property", &mut r.properties))
            } else if r.properties.contains_key("VideoChannel/Enabled") {
                video_channel(a, &mut r.properties)
            } else {
                Ok(())
            }
        })
    }

    fn usb(&mut self, a: &mut Archive<'_>, usb: &mut Usb) -> Outcome {
        if a.reading() {
            usb.controllers.clear();
            usb.device_filters.clear();
            if self.version <= V::V1_14 && a.has_child("USBController") {
                return a.child("USBController", |a| {
                    let mut ohci = false;
                    let mut ehci = false;
                    a.attribute("enabled", &mut ohci, false)?;
                    a.attribute("enabledEhci", &mut ehci, false)?;
                    let kinds = [(ohci, UsbControllerType::Ohci), (ehci, UsbControllerType::Ehci)];
                    for (_, kind) in kinds.into_iter().filter(|(enabled, _)| *enabled) {
                        usb.controllers
                            .push(UsbController { name: kind.as_str().into(), controller_type: kind });
                    }
                    usb_filters(a, &mut usb.device_filters, false)
                });
            }
        } else if !self.since(V::V1_14) {
            return a.child("USBController", |a| {
                a.write("enabled", &usb.has(UsbControllerType::Ohci));
                a.write("enabledEhci", &usb.has(UsbControllerType::Ehci));
                usb_filters(a, &mut usb.device_filters, false)
            });
        }
        a.child("USB", |a| {
            a.child("Controllers", |a| {
                a.list("Controller", &mut usb.controllers, |a, controller| {
                    a.required("name", &mut controller.name)?;
                    a.required("type", &mut controller.controller_type)
                })
            })?;
            a.child("DeviceFilters", |a| usb_filters(a, &mut usb.device_filters, false))
        })
    }

    /// The port in a slot that the file does not name.
    fn unnamed_serial_port(&self, slot: u32) -> SerialPort {
        let enabled = self.os.is_some_and(|os| slot < os.serial_ports());
        SerialPort { enabled, ..SerialPort::new(slot) }
    }

    fn serial_ports(&mut self, a: &mut Archive<'_>, ports: &mut [SerialPort; 4]) -> Outcome {
        let mut named: Vec<_> =
            ports.iter().filter(|p| **p != self.unnamed_serial_port(p.slot)).cloned().collect();
        a.child("UART", |a| {
            a.list("Port", &mut named, |a, p| {
                a.required("slot", &mut p.slot)?;
                a.required("enabled", &mut p.enabled)?;
                hex(a, "IOBase", &mut p.io_base)?;
                a.required("IRQ", &mut p.irq)?;
                let connects = matches!(p.mode, PortMode::HostPipe | PortMode::Tcp);
                a.attribute_if(connects, "server", &mut p.server, false)?;
                a.attribute_if(p.mode != PortMode::Disconnected, "path", &mut p.path, String::new())?;
                a.required("hostMode", &mut p.mode)?;
                a.attribute("uartType", &mut p.uart_type, UartType::U16550A)
            })
        })?;
        if a.reading() {
            *ports = std::array::from_fn(|slot| self.unnamed_serial_port(slot as u32));
            place(a, "UART", ports, named, |port| port.slot)?;
        }
        Ok(())
    }

    fn audio(&mut self, a: &mut Archive<'_>, audio: &mut Audio) -> Outcome {
        a.attribute("controller", &mut audio.controller, AudioController::Ac97)?;
        a.attribute("codec", &mut audio.codec, audio.controller.default_codec())?;
        if a.reading() {
            // Unknown sound systems are no reason to refuse the machine: the host's default is taken.
            let driver: Option<String> = a.read("driver")?;
            audio.driver = match driver {
                Some(word) => AudioDriver::from_text(&word).unwrap_or(AudioDriver::Default),
                None => AudioDriver::Null,
            };
            if a.read("useDefault")?.unwrap_or(false) {
                audio.driver = AudioDriver::Default;
            }
        } else if audio.driver == AudioDriver::Default {
            a.write("useDefault", &true);
            a.write("driver", &DEFAULT_AUDIO_DRIVER);
        } else {
            a.write("driver", &audio.driver);
        }
        let enabled_default = !self.since(V::V1_16);
        let write = audio.enabled || enabled_default;
        a.attribute_if(write, "enabled", &mut audio.enabled, enabled_default)?;
        a.attribute("enabledIn", &mut audio.enabled_in, !self.since(V::V1_17))?;
        a.attribute("enabledOut", &mut audio.enabled_out, !self.since(V::V1_17))?;
        string_map(a, "Property", &mut audio.properties)
    }

    fn io(&mut self, a: &mut Archive<'_>, h: &mut Hardware) -> Outcome {
        a.child("IO", |a| {
            a.child("IoCache", |a| {
                a.attribute("enabled", &mut h.io_cache.enabled, true)?;
                a.attribute("size", &mut h.io_cache.size_mb, 5)
            })?;
            a.child("BandwidthGroups", |a| {
                a.list("BandwidthGroup", &mut h.bandwidth_groups, |a, group| {
                    a.required("name", &mut group.name)?;
                    a.required("type", &mut group.group_type)?;
                    if a.reading() {
                        let megabytes = a.read::<u64>("maxMbPerSec")?.unwrap_or(0).saturating_mul(1 << 20);
                        group.max_bytes_per_sec = a.read("maxBytesPerSec")?.unwrap_or(megabytes);
                    } else if self.since(V::V1_13) {
                        a.write("maxBytesPerSec", &group.max_bytes_per_sec);
                    } else {
                        a.write("maxMbPerSec", &(group.max_bytes_per_sec >> 20));
                    }
                    Ok(())
                })
            })
        })
    }
}

/// Attributes of `<RemoteDisplay>` before version 1.11, and the properties that they have become.
const OLD_REMOTE_DISPLAY: [(&str, &str); 2] = [("port", "TCP/Ports"), ("netAddress", "TCP/Address")];

fn video_channel(a: &mut Archive<'_>, properties: &mut StringMap) -> Outcome {
    a.child("VideoChannel", |a| {
        let stored = properties
            .get("VideoChannel/Enabled")
            .is_some_and(|v| v.eq_ignore_ascii_case("true") || v == "1");
        let mut enabled = stored;
        let quality = properties.get("VideoChannel/Quality").and_then(|v| v.parse().ok());
        let mut quality: u32 = quality.unwrap_or(75);
        a.always("enabled", &mut enabled, false)?;
        a.always("quality", &mut quality, 75)?;
        if a.reading() {
            let quality = quality.clamp(10, 100).to_string();
            properties.entry("VideoChannel/Enabled".into()).or_insert(enabled.to_string());
            properties.entry("VideoChannel/Quality".into()).or_insert(quality);
        }
        Ok(())
    })
}

fn hex(a: &mut Archive<'_>, name: &str, field: &mut u32) -> Outcome {
    let mut number = Hex(*field);
    a.required(name, &mut number)?;
    *field = number.0;
    Ok(())
}

/// Puts the ports that a file names where they belong.
fn place<T>(
    a: &Archive<'_>,
    what: &str,
    ports: &mut [T],
    named: Vec<T>,
    slot: impl Fn(&T) -> u32,
) -> Outcome {
    let mut seen = vec![false; ports.len()];
    for port in named {
        let at = slot(&port) as usize;
        match seen.get_mut(at) {
            Some(seen) if !*seen => *seen = true,
            Some(_) => {
                return Err(a.error(
                    format!("Invalid value {at} in {what}/Port/@slot attribute: value is not unique"),
                    "give each port a slot of its own",
                ));
            }
            None => {
                return Err(a.error(
                    format!("Invalid value {at} in {what}/Port/@slot attribute"),
                    format!("write a number from 0 to {}", ports.len() - 1),
                ));
            }
        }
        ports[at] = port;
    }
    Ok(())
}

fn parallel_ports(a: &mut Archive<'_>, ports: &mut [ParallelPort; 2]) -> Outcome {
    let mut named: Vec<_> = ports.iter().filter(|p| **p != ParallelPort::new(p.slot)).cloned().collect();
    a.child("LPT", |a| {
        a.list("Port", &mut named, |a, p| {
            a.required("slot", &mut p.slot)?;
            a.required("enabled", &mut p.enabled)?;
            hex(a, "IOBase", &mut p.io_base)?;
            a.required("IRQ", &mut p.irq)?;
            a.attribute("path", &mut p.path, String::new())
        })
    })?;
    if a.reading() {
        *ports = ParallelPort::slots();
        place(a, "LPT", ports, named, |port| port.slot)?;
    }
    Ok(())
}

fn boot_order(a: &mut Archive<'_>, order: &mut [BootDevice; 4]) -> Outcome {
    let mut list: Vec<(u32, BootDevice)> = Vec::new();
    if !a.reading() && *order != Hardware::DEFAULT_BOOT_ORDER {
        list = (1..).zip(*order).collect();
    }
    let given = a.has_child("Boot");
    a.child("Boot", |a| {
        a.list("Order", &mut list, |a, (position, device)| {
            a.required("position", position)?;
            a.required("device", device)
        })
    })?;
    if !a.reading() {
        return Ok(());
    }
    *order = if given { [BootDevice::None; 4] } else { Hardware::DEFAULT_BOOT_ORDER };
    let mut seen = [false; 4];
    for (position, device) in list {
        let at = (position as usize).wrapping_sub(1);
        if at >= order.len() {
            return Err(a.error(
                format!("Invalid value '{position}' in Boot/Order/@position: must be greater than 0 and less than 5"),
                "number the devices from 1 to 4",
            ));
        }
        if std::mem::replace(&mut seen[at], true) {
            return Err(a.error(
                format!("Invalid value '{position}' in Boot/Order/@position: value is not unique"),
                "give each device a position of its own",
            ));
        }
        order[at] = device;
    }
    Ok(())
}

fn bios(a: &mut Archive<'_>, b: &mut Bios, nvram: &mut Nvram) -> Outcome {
    a.child("BIOS", |a| {
        a.flag("ACPI", &mut b.acpi, true)?;
        a.flag("IOAPIC", &mut b.ioapic, false)?;
        a.child("APIC", |a| a.attribute("mode", &mut b.apic_mode, ApicMode::Apic))?;
        let write =
            !b.logo_fade_in || !b.logo_fade_out || b.logo_display_time != 0 || !b.logo_image_path.is_empty();
        a.child("Logo", |a| {
            a.attribute_if(write, "fadeIn", &mut b.logo_fade_in, true)?;
            a.attribute_if(write, "fadeOut", &mut b.logo_fade_out, true)?;
            a.attribute_if(write, "displayTime", &mut b.logo_display_time, 0)?;
            a.attribute("imagePath", &mut b.logo_image_path, String::new())
        })?;
        a.child("BootMenu", |a| a.attribute("mode", &mut b.boot_menu_mode, BootMenuMode::MessageAndMenu))?;
        a.child("TimeOffset", |a| a.attribute("value", &mut b.time_offset, 0))?;
        a.flag("PXEDebug", &mut b.pxe_debug, false)?;
        a.child("NVRAM", |a| {
            a.attribute("path", &mut nvram.path, String::new())?;
            a.attribute("keyId", &mut nvram.key_id, String::new())?;
            a.attribute("keyStore", &mut nvram.key_store, String::new())
        })?;
        a.flag("SmbiosUuidLittleEndian", &mut b.smbios_uuid_little_endian, false)?;
        a.flag("AutoSerialNumGen", &mut b.auto_serial_num_gen, false)
    })
}

fn rtc(a: &mut Archive<'_>, utc: &mut bool) -> Outcome {
    a.child("RTC", |a| {
        if a.reading() {
            *utc = a.read::<String>("localOrUTC")?.is_some_and(|word| word == "UTC");
        } else if *utc {
            a.write("localOrUTC", &"UTC".to_owned());
        }
        Ok(())
    })
}
