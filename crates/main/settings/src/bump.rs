//! Which settings version can express which settings.
//!
//! A file keeps its version as long as that can express its settings. VirtualBox 7.0 means to do the same, but
//! a slip in its test for encrypted logs makes it raise every file it saves to 1.19; that is not followed.

use crate::model::*;
use crate::version::SettingsVersion as V;
use crate::words::*;

/// The lowest version that can express a machine's settings.
pub(crate) fn machine(m: &MachineSettings) -> V {
    let mut lowest = V::V1_10;
    let mut needs = |version: V, needed: bool| {
        if needed && version > lowest {
            lowest = version;
        }
    };
    let keys = [&m.state_key_id, &m.state_key_store, &m.log_key_id, &m.log_key_store];
    needs(V::V1_19, keys.iter().any(|key| !key.is_empty()));
    needs(V::V1_17, m.process_priority != ProcessPriority::Default);
    needs(V::V1_14, !m.icon.is_empty());
    needs(V::V1_13, m.directory_includes_uuid || !m.groups.iter().eq(["/"]));
    needs(V::V1_11, !m.media_registry.is_empty() || m.os_type == "JRockitVE");
    kept(&mut needs, &m.hardware, &m.debugging, &m.autostart, &m.recording);
    let mut snapshots: Vec<&Snapshot> = m.snapshot.as_deref().into_iter().collect();
    while let Some(s) = snapshots.pop() {
        kept(&mut needs, &s.hardware, &s.debugging, &s.autostart, &s.recording);
        snapshots.extend(&s.children);
    }
    lowest
}

/// The lowest version that can express the installation's settings.
pub(crate) fn global(g: &GlobalSettings) -> V {
    let needs = [
        (V::V1_19, !g.host_only_networks.is_empty()),
        (V::V1_18, !g.cloud_networks.is_empty()),
        (V::V1_16, !g.usb_device_sources.is_empty()),
        (V::V1_14, !g.nat_networks.is_empty()),
    ];
    needs.into_iter().find_map(|(version, needed)| needed.then_some(version)).unwrap_or(V::V1_10)
}

fn kept(needs: &mut impl FnMut(V, bool), h: &Hardware, d: &Debugging, autostart: &Autostart, r: &Recording) {
    let debugs_guest = d.guest_debug_provider != GuestDebugProvider::None
        || d.guest_debug_io != GuestDebugIo::None
        || !d.guest_debug_address.is_empty()
        || d.guest_debug_port != 0;
    needs(V::V1_19, debugs_guest || !fits_video_capture(r, h.display.monitor_count));
    needs(V::V1_14, *r != Recording::default());
    needs(V::V1_13, *d != Debugging::default() || *autostart != Autostart::default());

    needs(
        V::V1_19,
        h.iommu != Iommu::None || h.tpm != Tpm::default() || h.audio.driver == AudioDriver::Default,
    );
    needs(V::V1_19, !h.nvram.key_id.is_empty() || !h.nvram.key_store.is_empty());
    needs(V::V1_18, !h.nvram.path.is_empty() || !h.cpu.virt_vmsave_vmload);
    needs(V::V1_17, h.cpu.nested_hw_virt || h.cpu.use_native_api);
    needs(V::V1_17, h.shared_folders.iter().any(|folder| !folder.auto_mount_point.is_empty()));
    needs(V::V1_16, needs_5_1(&h.cpu) || !h.paravirt_debug.is_empty() || h.bios.apic_mode != ApicMode::Apic);
    needs(V::V1_15, h.paravirt_provider != ParavirtProvider::Legacy || h.cpu.portability_level != 0);
    needs(V::V1_15, !h.audio.properties.is_empty());
    needs(V::V1_14, !h.default_frontend.is_empty() || h.display.controller != GraphicsController::VBoxVga);
    needs(V::V1_14, h.cpu.long_mode != LongMode::Legacy);
    needs(V::V1_13, h.bandwidth_groups.iter().any(|group| group.max_bytes_per_sec % (1 << 20) != 0));
    needs(V::V1_12, !h.host_pci.is_empty() || h.emulated_usb_card_reader);
    needs(V::V1_11, h.audio.controller == AudioController::Hda || h.cpu.execution_cap != 100);
    needs(V::V1_11, !h.remote_display.ext_pack.is_empty() || !h.remote_display.auth_library.is_empty());
    let old_properties = ["TCP/Ports", "TCP/Address", "VideoChannel/Enabled", "VideoChannel/Quality"];
    needs(V::V1_11, h.remote_display.properties.keys().any(|key| !old_properties.contains(&key.as_str())));
    needs(V::V1_11, !h.bandwidth_groups.is_empty() || h.chipset == Chipset::Ich9);

    usb(needs, &h.usb);
    h.serial_ports.iter().for_each(|port| {
        needs(V::V1_17, port.uart_type != UartType::U16550A);
        needs(V::V1_15, port.mode == PortMode::Tcp);
    });
    h.network.iter().for_each(|adapter| network(needs, adapter));
    storage(needs, &h.storage_controllers);
}

fn needs_5_1(cpu: &Cpu) -> bool {
    (cpu.profile != "host" && !cpu.profile.is_empty())
        || !cpu.apic
        || cpu.x2apic
        || cpu.ibpb_on_vm_exit
        || cpu.ibpb_on_vm_entry
        || cpu.spec_ctrl
        || cpu.spec_ctrl_by_host
        || !cpu.l1d_flush_on_sched
        || cpu.l1d_flush_on_vm_entry
        || !cpu.mds_clear_on_sched
        || cpu.mds_clear_on_vm_entry
        || cpu.cpuid_leaves.iter().any(|leaf| leaf.subleaf != 0)
}

/// Whether one `<VideoCapture>` can say it all: the same for every screen, and nothing new since 7.0.
fn fits_video_capture(r: &Recording, monitors: u32) -> bool {
    if *r == Recording::default() {
        return true;
    }
    let Some(first) = r.screens.first() else { return true };
    let plain = RecordingScreen::new(0);
    let as_before_7_0 = RecordingScreen {
        id: first.id,
        enabled: first.enabled,
        max_time_s: first.max_time_s,
        options: first.options.clone(),
        file: first.file.clone(),
        max_size_mb: first.max_size_mb,
        width: first.width,
        height: first.height,
        rate_kbps: first.rate_kbps,
        fps: first.fps,
        ..plain
    };
    *first == as_before_7_0
        && r.screens.len() == monitors.max(1) as usize
        && r.screens.iter().all(|s| *s == RecordingScreen { id: s.id, enabled: s.enabled, ..first.clone() })
}

fn usb(needs: &mut impl FnMut(V, bool), usb: &Usb) {
    needs(V::V1_15, usb.has(UsbControllerType::Xhci));
    let several = |kind| usb.controllers.iter().filter(|c| c.controller_type == kind).count() > 1;
    needs(V::V1_14, several(UsbControllerType::Ohci) || several(UsbControllerType::Ehci));
    needs(V::V1_14, usb.controllers.iter().any(|c| c.name != c.controller_type.as_str()));
}

fn network(needs: &mut impl FnMut(V, bool), n: &NetworkAdapter) {
    let attached = |to| n.attachment == to;
    needs(V::V1_19, n.enabled && attached(NetworkAttachment::Nat) && !n.nat.localhost_reachable);
    needs(V::V1_19, attached(NetworkAttachment::HostOnlyNetwork));
    needs(V::V1_18, attached(NetworkAttachment::Cloud));
    needs(V::V1_14, attached(NetworkAttachment::NatNetwork));
    needs(V::V1_12, n.promisc_policy != PromiscPolicy::Deny || !n.bandwidth_group.is_empty());
    let generic = !n.generic_driver.is_empty() || !n.generic_properties.is_empty();
    needs(V::V1_12, generic || attached(NetworkAttachment::Generic));
}

fn storage(needs: &mut impl FnMut(V, bool), controllers: &[StorageController]) {
    use StorageControllerType as C;
    for c in controllers {
        let is_ahci = c.controller_type == C::IntelAhci;
        needs(V::V1_18, matches!(c.controller_type, C::VirtioScsi | C::VirtioBlk));
        needs(V::V1_16, c.controller_type == C::Nvme);
        needs(V::V1_15, c.controller_type == C::Usb);
        needs(V::V1_15, c.attached.iter().any(|d| d.hot_pluggable != is_ahci));
        needs(V::V1_11, c.attached.iter().any(|d| !d.bandwidth_group.is_empty()) || !c.bootable);
        let same_bus = |other: &&StorageController| {
            other.bus() == c.bus()
                && (c.bus() != StorageBus::Scsi || other.controller_type == c.controller_type)
        };
        needs(V::V1_11, controllers.iter().filter(same_bus).count() > 1);
    }
}
