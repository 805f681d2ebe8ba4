//! The methods of IMachine and of the objects below it, storage apart.

use main_api::enums::{CPUPropertyType, DeviceType, HWVirtExPropertyType};
use main_api::error::{ApiError, ApiResult};
use main_api::idl::*;
use main_api::server::CallTable;
use main_api::types::ObjRef;
use settings::{self as set, BootDevice, Cpu, CpuIdLeaf, LongMode, OsType};
use vbox_types::ResultCode;

use crate::attrs_machine::log_folder;
use crate::calls::{check_key, medium_id, session_number};
use crate::limits;
use crate::mirror::Mirror;
use crate::objects::{MachineRef, Object, Part};
use crate::svc::{Context, Lock, State};
use crate::view::{View, gone, in_range};

/// The machine and the part of it that the call is for.
pub(crate) fn target(c: &Context) -> ApiResult<(MachineRef, Part)> {
    match &c.object {
        Object::Machine(reference, part) => Ok((*reference, part.clone())),
        _ => Err(gone()),
    }
}

/// Reads from the machine's settings.
pub(crate) fn look<T>(c: &Context, read: impl FnOnce(&View) -> ApiResult<T>) -> ApiResult<T> {
    let (reference, part) = target(c)?;
    let view = c.svc.state.lock().view(c.peer.id, reference, part)?;
    if let Some(error) = &view.meta.access_error {
        return Err(error.clone());
    }
    read(&view)
}

/// Changes the machine's settings while it is off.
pub(crate) fn edit<T>(
    c: &Context,
    change: impl FnOnce(&mut State, &mut View) -> ApiResult<T>,
) -> ApiResult<T> {
    edit_when(c, false, change)
}

/// Changes the machine's settings, also while it runs if `at_run_time`.
pub(crate) fn edit_when<T>(
    c: &Context,
    at_run_time: bool,
    change: impl FnOnce(&mut State, &mut View) -> ApiResult<T>,
) -> ApiResult<T> {
    let (reference, part) = target(c)?;
    c.svc.state.lock().edit(c.peer.id, reference, part, at_run_time, change)
}

pub(crate) fn add(t: &mut CallTable<Context>) {
    lifecycle(t);
    processor(t);
    parts(t);
    extra_data(t);
    devices(t);
}

fn lifecycle(t: &mut CallTable<Context>) {
    t.add(IMachine::LockMachine, |c, (session, lock)| {
        let (reference, _) = target(c)?;
        let id = c.svc.state.lock().resolve(c.peer.id, reference)?.id;
        c.svc.lock_machine(&c.peer, id, session_number(&session)?, lock)
    })
    .add(IMachine::LaunchVMProcess, |c, (session, name, environment)| {
        let (reference, _) = target(c)?;
        let id = c.svc.state.lock().resolve(c.peer.id, reference)?.id;
        let session = if name == "emergencystop" { 0 } else { session_number(&session)? };
        c.svc.launch(&c.peer, id, session, &name, &environment)
    })
    .add(IMachine::SaveSettings, |c, ()| c.svc.save_settings(&c.peer, target(c)?.0))
    .add(IMachine::DiscardSettings, |c, ()| {
        let (reference, _) = target(c)?;
        let mut state = c.svc.state.lock();
        state.check_mutable(c.peer.id, reference, true)?;
        let id = state.resolve(c.peer.id, reference)?.id;
        let machine = state.machine_mut(id)?;
        let committed = machine.settings.clone();
        if let Lock::Held(held) = &mut machine.lock {
            held.copy = committed;
        }
        Ok(())
    })
    .add(IMachine::ApplyDefaults, |c, (flags,)| {
        if !flags.is_empty() {
            return Err(ApiError::invalid_arg("There are no flags for the defaults of a machine"));
        }
        edit(c, |_, v| {
            let os = OsType::by_id(&v.settings.os_type).ok_or_else(|| {
                ApiError::invalid_arg(format!("Guest OS type '{}' is invalid", v.settings.os_type))
            })?;
            v.edit().apply_os_defaults(os);
            Ok(())
        })
    })
    .add(IMachine::Unregister, |c, (mode,)| {
        let (reference, _) = target(c)?;
        let id = c.svc.state.lock().resolve(c.peer.id, reference)?.id;
        c.svc.unregister(&c.peer, id, mode)
    })
    .add(IMachine::DeleteConfig, |c, (media,)| {
        let media = media.iter().filter_map(|m| medium_id(m).transpose()).collect::<ApiResult<Vec<_>>>()?;
        c.svc.delete_config(&c.peer, target(c)?.0, media)
    })
    .add(IMachine::CloneTo, |c, (clone, mode, options)| crate::clone::start(c, &clone, mode, &options))
    .add(IMachine::DiscardSavedState, |c, (remove,)| c.svc.discard_saved_state(&c.peer, target(c)?.0, remove))
    .add(IMachine::QueryLogFilename, |c, (index,)| {
        look(c, |v| {
            let name = if index == 0 { "VBox.log".to_owned() } else { format!("VBox.log.{index}") };
            let path = log_folder(&v.meta.settings_file).join(name);
            Ok(if path.exists() { path.display().to_string() } else { String::new() })
        })
    });
}

/// The field of a CPU property that is a plain switch.
fn cpu_switch(cpu: &mut Cpu, property: CPUPropertyType) -> Option<&mut bool> {
    use CPUPropertyType as P;
    Some(match property {
        P::PAE => &mut cpu.pae,
        P::TripleFaultReset => &mut cpu.triple_fault_reset,
        P::APIC => &mut cpu.apic,
        P::X2APIC => &mut cpu.x2apic,
        P::IBPBOnVMExit => &mut cpu.ibpb_on_vm_exit,
        P::IBPBOnVMEntry => &mut cpu.ibpb_on_vm_entry,
        P::HWVirt => &mut cpu.nested_hw_virt,
        P::SpecCtrl => &mut cpu.spec_ctrl,
        P::SpecCtrlByHost => &mut cpu.spec_ctrl_by_host,
        P::L1DFlushOnEMTScheduling => &mut cpu.l1d_flush_on_sched,
        P::L1DFlushOnVMEntry => &mut cpu.l1d_flush_on_vm_entry,
        P::MDSClearOnEMTScheduling => &mut cpu.mds_clear_on_sched,
        P::MDSClearOnVMEntry => &mut cpu.mds_clear_on_vm_entry,
        P::Null | P::LongMode => return None,
    })
}

fn hwvirt_switch(cpu: &mut Cpu, property: HWVirtExPropertyType) -> Option<&mut bool> {
    use HWVirtExPropertyType as P;
    Some(match property {
        P::Enabled => &mut cpu.hw_virt,
        P::VPID => &mut cpu.vpid,
        P::NestedPaging => &mut cpu.nested_paging,
        P::UnrestrictedExecution => &mut cpu.unrestricted_execution,
        P::LargePages => &mut cpu.large_pages,
        P::Force => &mut cpu.hw_virt_force,
        P::UseNativeApi => &mut cpu.use_native_api,
        P::VirtVmsaveVmload => &mut cpu.virt_vmsave_vmload,
        P::Null => return None,
    })
}

fn no_property() -> ApiError {
    ApiError::invalid_arg("Invalid CPU property type")
}

fn processor(t: &mut CallTable<Context>) {
    t.add(IMachine::GetCPUProperty, |c, (property,)| {
        look(c, |v| {
            let mut cpu = v.settings.hardware.cpu.clone();
            if property == CPUPropertyType::LongMode {
                return Ok(match cpu.long_mode {
                    LongMode::Enabled => true,
                    LongMode::Disabled => false,
                    LongMode::Legacy => OsType::by_id(&v.settings.os_type).is_some_and(OsType::is_64bit),
                });
            }
            cpu_switch(&mut cpu, property).map(|on| *on).ok_or_else(no_property)
        })
    })
    .add(IMachine::SetCPUProperty, |c, (property, value)| {
        edit(c, |_, v| {
            let cpu = &mut v.edit().hardware.cpu;
            if property == CPUPropertyType::LongMode {
                cpu.long_mode = if value { LongMode::Enabled } else { LongMode::Disabled };
                return Ok(());
            }
            *cpu_switch(cpu, property).ok_or_else(no_property)? = value;
            // An x2APIC is an APIC.
            if property == CPUPropertyType::X2APIC && value {
                cpu.apic = true;
            }
            Ok(())
        })
    })
    .add(IMachine::GetHWVirtExProperty, |c, (property,)| {
        look(c, |v| {
            let mut cpu = v.settings.hardware.cpu.clone();
            hwvirt_switch(&mut cpu, property).map(|on| *on).ok_or_else(no_property)
        })
    })
    .add(IMachine::SetHWVirtExProperty, |c, (property, value)| {
        edit(c, |_, v| {
            *hwvirt_switch(&mut v.edit().hardware.cpu, property).ok_or_else(no_property)? = value;
            Ok(())
        })
    })
    .add(IMachine::GetEffectiveParavirtProvider, |c, ()| {
        look(c, |v| Ok(v.settings.effective_paravirt_provider().to_api()))
    })
    .add(IMachine::GetCPUIDLeafByOrdinal, |c, (ordinal,)| {
        look(c, |v| {
            let leaf = v.settings.hardware.cpu.cpuid_leaves.get(ordinal as usize);
            let leaf = leaf.ok_or_else(|| ApiError::invalid_arg("There are no more CPUID leaves"))?;
            Ok((leaf.index, leaf.subleaf, leaf.eax, leaf.ebx, leaf.ecx, leaf.edx))
        })
    })
    .add(IMachine::SetCPUIDLeaf, |c, (index, subleaf, eax, ebx, ecx, edx)| {
        // Ranges that processors, and VirtualBox's settings, know.
        if !matches!(index, 0..=0x20 | 0x8000_0000..=0x8000_0020) {
            return Err(ApiError::invalid_arg(format!("CpuId override leaf {index:#x} is out of range")));
        }
        edit(c, |_, v| {
            let leaves = &mut v.edit().hardware.cpu.cpuid_leaves;
            leaves.retain(|l| (l.index, l.subleaf) != (index, subleaf));
            leaves.push(CpuIdLeaf { index, subleaf, eax, ebx, ecx, edx });
            leaves.sort_by_key(|l| (l.index, l.subleaf));
            Ok(())
        })
    })
    .add(IMachine::RemoveCPUIDLeaf, |c, (index, subleaf)| {
        edit(c, |_, v| {
            let any = subleaf == u32::MAX;
            v.edit().hardware.cpu.cpuid_leaves.retain(|l| l.index != index || (!any && l.subleaf != subleaf));
            Ok(())
        })
    })
    .add(IMachine::RemoveAllCPUIDLeaves, |c, ()| {
        edit(c, |_, v| {
            v.edit().hardware.cpu.cpuid_leaves.clear();
            Ok(())
        })
    })
    .add(IMachine::HotPlugCPU, |c, (cpu,)| plug(c, cpu, true))
    .add(IMachine::HotUnplugCPU, |c, (cpu,)| plug(c, cpu, false))
    .add(IMachine::GetCPUStatus, |c, (id,)| {
        look(c, |v| {
            let cpu = &v.settings.hardware.cpu;
            if id >= cpu.count {
                return Err(ApiError::invalid_arg(format!(
                    "CPU id exceeds number of possible CPUs [0:{}]",
                    cpu.count - 1
                )));
            }
            Ok(!cpu.hotplug || id == 0 || cpu.plugged.contains(&id))
        })
    })
    .add(IMachine::GetBootOrder, |c, (position,)| {
        look(c, |v| {
            let index = boot_index(position)?;
            Ok(v.settings.hardware.boot_order[index].to_api())
        })
    })
    .add(IMachine::SetBootOrder, |c, (position, device)| {
        let index = boot_index(position)?;
        if device == DeviceType::USB {
            return Err(ApiError::new(
                ResultCode::NotImpl,
                "Booting from USB device is currently not supported",
            ));
        }
        let device = BootDevice::from_api(device)
            .map_err(|_| ApiError::invalid_arg(format!("Invalid boot device: {device:?}")))?;
        edit(c, |_, v| {
            v.edit().hardware.boot_order[index] = device;
            Ok(())
        })
    });
}

fn boot_index(position: u32) -> ApiResult<usize> {
    in_range("boot position", position, 1, limits::BOOT_POSITIONS, "").map(|p| p as usize - 1)
}

/// Plugs a CPU in or out, of a running VM first: where that fails the settings stay.
fn plug(c: &Context, id: u32, plugged: bool) -> ApiResult<()> {
    let check = |cpu: &Cpu| {
        if !cpu.hotplug {
            return Err(ApiError::invalid_arg("CPU hotplug is not enabled"));
        }
        if id >= cpu.count {
            return Err(ApiError::invalid_arg(format!(
                "CPU id exceeds number of possible CPUs [0:{}]",
                cpu.count - 1
            )));
        }
        match (id == 0 || cpu.plugged.contains(&id), plugged) {
            (true, true) => {
                Err(ApiError::new(ResultCode::ObjectInUse, format!("CPU {id} is already attached")))
            }
            (false, false) => Err(ApiError::not_found(format!("CPU {id} is not attached"))),
            (true, false) if id == 0 => Err(ApiError::invalid_arg("It is not possible to detach CPU 0")),
            _ => Ok(()),
        }
    };
    let (reference, _) = target(c)?;
    if let Some((vm, settings)) = c.svc.running_vm(c.peer.id, reference)? {
        check(&settings.hardware.cpu)?;
        vm.call(main_api::paths::ROOT, IVMProcess::CPUChange, (id, plugged))?;
    }
    edit_when(c, true, |_, v| {
        check(&v.settings.hardware.cpu)?;
        let cpu = &mut v.edit().hardware.cpu;
        cpu.plugged.retain(|p| *p != id);
        if plugged {
            cpu.plugged.push(id);
            cpu.plugged.sort_unstable();
        }
        Ok(())
    })
}

fn parts(t: &mut CallTable<Context>) {
    t.add(IMachine::GetNetworkAdapter, |c, (slot,)| {
        look(c, |v| {
            let count = v.settings.hardware.network.len();
            if slot as usize >= count {
                let text = format!("No network adapter in slot {slot} (total {count} adapters)");
                return Err(ApiError::invalid_arg(text));
            }
            Ok(v.object(Part::NetworkAdapter(slot as usize)))
        })
    })
    .add(IMachine::GetSerialPort, |c, (slot,)| {
        look(c, |v| Ok(v.object(Part::SerialPort(slot_index(slot, limits::SERIAL_PORTS)?))))
    })
    .add(IMachine::GetParallelPort, |c, (slot,)| {
        look(c, |v| Ok(v.object(Part::ParallelPort(slot_index(slot, limits::PARALLEL_PORTS)?))))
    })
    .add(IMachine::AddUSBController, |c, (name, kind)| {
        let kind = set::UsbControllerType::from_api(kind)?;
        edit(c, |_, v| {
            let usb = &mut v.edit().hardware.usb;
            if usb.controllers.iter().any(|c| c.name == name) {
                return Err(ApiError::new(
                    ResultCode::ObjectInUse,
                    format!("USB controller named '{name}' already exists"),
                ));
            }
            let present = usb.controllers.iter().filter(|c| c.controller_type == kind).count();
            if present >= limits::MAX_USB_CONTROLLERS_OF_A_KIND as usize {
                return Err(ApiError::invalid_arg("Too many USB controllers of this type"));
            }
            usb.controllers.push(set::UsbController { name: name.clone(), controller_type: kind });
            Ok(v.object(Part::UsbController(name)))
        })
    })
    .add(IMachine::RemoveUSBController, |c, (name,)| {
        edit(c, |_, v| {
            let controllers = &mut v.edit().hardware.usb.controllers;
            let before = controllers.len();
            controllers.retain(|c| c.name != name);
            if controllers.len() == before { Err(no_usb_controller(&name)) } else { Ok(()) }
        })
    })
    .add(IMachine::GetUSBControllerByName, |c, (name,)| {
        look(c, |v| {
            let part = Part::UsbController(name.clone());
            if part.exists(&v.settings) { Ok(v.object(part)) } else { Err(no_usb_controller(&name)) }
        })
    })
    .add(IMachine::GetUSBControllerCountByType, |c, (kind,)| {
        let kind = set::UsbControllerType::from_api(kind)?;
        look(c, |v| {
            Ok(v.settings.hardware.usb.controllers.iter().filter(|c| c.controller_type == kind).count()
                as u32)
        })
    })
    .add(IMachine::CreateSharedFolder, |c, (name, host_path, writable, auto_mount, auto_mount_point)| {
        if name.is_empty() || name.contains(['/', '\\']) {
            return Err(ApiError::invalid_arg(format!("Shared folder name '{name}' is invalid")));
        }
        if !host_path.starts_with('/') {
            return Err(ApiError::invalid_arg(format!("Shared folder path '{host_path}' is not absolute")));
        }
        edit_when(c, true, |_, v| {
            let folders = &mut v.edit().hardware.shared_folders;
            if folders.iter().any(|f| f.name == name) {
                return Err(ApiError::new(
                    ResultCode::ObjectInUse,
                    format!("Shared folder named '{name}' already exists"),
                ));
            }
            folders.push(set::SharedFolder { name, host_path, writable, auto_mount, auto_mount_point });
            Ok(())
        })
    })
    .add(IMachine::RemoveSharedFolder, |c, (name,)| {
        edit_when(c, true, |_, v| {
            let folders = &mut v.edit().hardware.shared_folders;
            let before = folders.len();
            folders.retain(|f| f.name != name);
            if folders.len() == before {
                return Err(ApiError::not_found(format!("Could not find a shared folder named '{name}'")));
            }
            Ok(())
        })
    });
}

fn slot_index(slot: u32, count: u32) -> ApiResult<usize> {
    if slot < count {
        return Ok(slot as usize);
    }
    Err(ApiError::invalid_arg(format!("Argument aSlot is invalid (must be in range [0, {}])", count - 1)))
}

fn no_usb_controller(name: &str) -> ApiError {
    ApiError::not_found(format!("Could not find a USB controller named '{name}'"))
}

fn extra_data(t: &mut CallTable<Context>) {
    t.add(IMachine::GetExtraDataKeys, |c, ()| {
        look(c, |v| Ok(v.settings.extra_data.keys().cloned().collect()))
    })
    .add(IMachine::GetExtraData, |c, (key,)| {
        look(c, |v| Ok(v.settings.extra_data.get(&key).cloned().unwrap_or_default()))
    })
    .add(IMachine::SetExtraData, |c, (key, value)| {
        check_key(&key)?;
        let (reference, _) = target(c)?;
        let mut state = c.svc.state.lock();
        let machine = state.resolve(c.peer.id, reference)?;
        if let Some(error) = &machine.access_error {
            return Err(error.clone());
        }
        let id = machine.id;
        if state.machines.contains_key(&id) {
            return c.svc.set_machine_extra_data(&mut state, id, &key, &value);
        }
        state.edit(c.peer.id, reference, Part::Machine, false, |_, v| {
            match value.as_str() {
                "" => v.edit().extra_data.remove(&key),
                _ => v.edit().extra_data.insert(key, value),
            };
            Ok(())
        })
    });
}

fn nic(v: &mut View) -> ApiResult<&mut set::NetworkAdapter> {
    let (Part::NetworkAdapter(slot) | Part::NatEngine(slot)) = v.part else { return Err(gone()) };
    v.edit().hardware.network.get_mut(slot).ok_or_else(gone)
}

fn devices(t: &mut CallTable<Context>) {
    t.add(INetworkAdapter::GetProperty, |c, (key,)| {
        look(c, |v| {
            let value = nic(&mut v.clone())?.generic_properties.get(&key).cloned();
            value.ok_or_else(|| ApiError::not_found(format!("Property '{key}' does not exist")))
        })
    })
    .add(INetworkAdapter::SetProperty, |c, (key, value)| {
        check_key(&key)?;
        edit_when(c, true, |_, v| {
            let properties = &mut nic(v)?.generic_properties;
            match value.as_str() {
                "" => properties.remove(&key),
                _ => properties.insert(key, value),
            };
            Ok(())
        })
    })
    .add(INetworkAdapter::GetProperties, |c, ()| {
        look(c, |v| {
            let properties = nic(&mut v.clone())?.generic_properties.clone();
            Ok(properties.into_iter().unzip())
        })
    })
    .add(INATEngine::GetNetworkSettings, |c, ()| {
        look(c, |v| {
            let mut v = v.clone();
            let nat = &nic(&mut v)?.nat;
            Ok((nat.mtu, nat.sock_snd, nat.sock_rcv, nat.tcp_snd, nat.tcp_rcv))
        })
    })
    .add(INATEngine::SetNetworkSettings, |c, (mtu, sock_snd, sock_rcv, tcp_snd, tcp_rcv)| {
        edit(c, |_, v| {
            let nat = &mut nic(v)?.nat;
            // 0 leaves a value as it is.
            let set = |field: &mut u32, value: u32| {
                if value != 0 {
                    *field = value;
                }
            };
            set(&mut nat.mtu, mtu);
            set(&mut nat.sock_snd, sock_snd);
            set(&mut nat.sock_rcv, sock_rcv);
            set(&mut nat.tcp_snd, tcp_snd);
            set(&mut nat.tcp_rcv, tcp_rcv);
            Ok(())
        })
    })
    .add(INATEngine::AddRedirect, |c, (name, protocol, host_ip, host_port, guest_ip, guest_port)| {
        let protocol = set::NatProtocol::from_api(protocol)?;
        if guest_port == 0 {
            return Err(ApiError::invalid_arg("The guest port of a NAT rule must not be 0"));
        }
        edit_when(c, true, |_, v| {
            let rules = &mut nic(v)?.nat.rules;
            let name = match name.is_empty() {
                true => format!("{}_{host_port}_{guest_port}", set::Word::as_str(protocol)),
                false => name,
            };
            if rules.iter().any(|r| r.name == name) {
                return Err(ApiError::invalid_arg("A NAT rule of this name already exists"));
            }
            let same =
                |r: &&set::NatRule| (r.protocol, r.host_port, &r.host_ip) == (protocol, host_port, &host_ip);
            if host_port != 0 && rules.iter().any(|r| same(&r)) {
                return Err(ApiError::invalid_arg(
                    "A NAT rule for this host port and this host IP already exists",
                ));
            }
            rules.push(set::NatRule { name, protocol, host_ip, host_port, guest_ip, guest_port });
            rules.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(())
        })
    })
    .add(INATEngine::RemoveRedirect, |c, (name,)| {
        edit_when(c, true, |_, v| {
            let rules = &mut nic(v)?.nat.rules;
            let before = rules.len();
            rules.retain(|r| r.name != name);
            if rules.len() == before {
                return Err(ApiError::invalid_arg(format!("There is no NAT rule named '{name}'")));
            }
            Ok(())
        })
    })
    .add(IVRDEServer::GetVRDEProperty, |c, (key,)| {
        look(c, |v| Ok(v.settings.hardware.remote_display.properties.get(&key).cloned().unwrap_or_default()))
    })
    .add(IVRDEServer::SetVRDEProperty, |c, (key, value)| {
        check_key(&key)?;
        edit_when(c, true, |_, v| {
            let properties = &mut v.edit().hardware.remote_display.properties;
            match value.as_str() {
                "" => properties.remove(&key),
                _ => properties.insert(key, value),
            };
            Ok(())
        })
    })
    .add(IUSBDeviceFilters::CreateDeviceFilter, |c, (position, name)| {
        edit(c, |_, v| {
            let filters = &mut v.edit().hardware.usb.device_filters;
            let index = (position as usize).min(filters.len());
            filters.insert(index, set::UsbDeviceFilter { name, ..Default::default() });
            Ok(v.object(Part::UsbFilter(index)))
        })
    })
    .add(IUSBDeviceFilters::RemoveDeviceFilter, |c, (position,)| {
        edit(c, |_, v| {
            let filters = &mut v.edit().hardware.usb.device_filters;
            let index = position as usize;
            if index >= filters.len() {
                return Err(ApiError::invalid_arg(if filters.is_empty() {
                    "The USB device filter list is empty".to_owned()
                } else {
                    format!("Invalid position: {position} (must be in range [0, {}])", filters.len() - 1)
                }));
            }
            filters.remove(index);
            Ok(())
        })
    })
    .add(IBandwidthControl::CreateBandwidthGroup, |c, (name, kind, limit)| {
        let group_type = set::BandwidthGroupType::from_api(kind)?;
        let max_bytes_per_sec = u64::from_api(limit)?;
        edit(c, |_, v| {
            let groups = &mut v.edit().hardware.bandwidth_groups;
            if groups.iter().any(|g| g.name == name) {
                return Err(ApiError::new(
                    ResultCode::ObjectInUse,
                    format!("Bandwidth group named '{name}' already exists"),
                ));
            }
            groups.push(set::BandwidthGroup { name, group_type, max_bytes_per_sec });
            Ok(())
        })
    })
    .add(IBandwidthControl::DeleteBandwidthGroup, |c, (name,)| {
        edit(c, |_, v| {
            let hw = &mut v.edit().hardware;
            if !hw.bandwidth_groups.iter().any(|g| g.name == name) {
                return Err(no_group(&name));
            }
            let used = hw.network.iter().any(|n| n.bandwidth_group == name)
                || hw
                    .storage_controllers
                    .iter()
                    .any(|c| c.attached.iter().any(|a| a.bandwidth_group == name));
            if used {
                return Err(ApiError::new(
                    ResultCode::ObjectInUse,
                    format!("The bandwidth group '{name}' is still in use"),
                ));
            }
            hw.bandwidth_groups.retain(|g| g.name != name);
            Ok(())
        })
    })
    .add(IBandwidthControl::GetBandwidthGroup, |c, (name,)| {
        look(c, |v| {
            let part = Part::BandwidthGroup(name.clone());
            if part.exists(&v.settings) { Ok(v.object(part)) } else { Err(no_group(&name)) }
        })
    })
    .add(IBandwidthControl::GetAllBandwidthGroups, |c, ()| {
        look(c, |v| {
            let groups = v.settings.hardware.bandwidth_groups.iter();
            Ok(groups.map(|g| v.object(Part::BandwidthGroup(g.name.clone()))).collect())
        })
    })
    .add(IRecordingSettings::GetScreenSettings, |c, (screen,)| {
        let monitors = look(c, |v| Ok(v.settings.hardware.display.monitor_count))?;
        if screen >= monitors.max(1) {
            return Err(ApiError::invalid_arg(format!("Invalid screen ID {screen}")));
        }
        let exists = look(c, |v| Ok((screen as usize) < v.settings.recording.screens.len()))?;
        if !exists {
            edit_when(c, true, |_, v| {
                let screens = &mut v.edit().recording.screens;
                for id in screens.len()..=screen as usize {
                    screens.push(set::RecordingScreen::new(id as u32));
                }
                Ok(())
            })?;
        }
        look(c, |v| {
            Ok::<ObjRef<IRecordingScreenSettings>, _>(v.object(Part::RecordingScreen(screen as usize)))
        })
    });
}

fn no_group(name: &str) -> ApiError {
    ApiError::not_found(format!("Could not find a bandwidth group named '{name}'"))
}
