//! `<Machine>`, its snapshots and what is kept with each.

use super::Walk;
use super::shared::string_map;
use crate::model::*;
use crate::ostypes::OsType;
use crate::version::SettingsVersion as V;
use crate::words::*;
use crate::xml::{Archive, Outcome};

/// Snapshots below each other that VirtualBox accepts.
const SNAPSHOT_DEPTH_MAX: usize = 250;

/// `RecordingDestination::File`, the only one there is.
const DESTINATION_FILE: u32 = 1;

/// Screens that a recording can have.
const MAX_SCREENS: u32 = 64;

impl Walk {
    /// `<Machine>`.
    pub(super) fn machine(&mut self, a: &mut Archive<'_>, m: &mut MachineSettings) -> Outcome {
        let no_text = String::new;
        a.required("uuid", &mut m.uuid)?;
        a.required("name", &mut m.name)?;
        a.attribute("directoryIncludesUUID", &mut m.directory_includes_uuid, false)?;
        a.attribute("nameSync", &mut m.name_sync, true)?;
        a.always("OSType", &mut m.os_type, no_text())?;
        self.os = OsType::by_id(&m.os_type);
        a.attribute("stateKeyId", &mut m.state_key_id, no_text())?;
        a.attribute("stateKeyStore", &mut m.state_key_store, no_text())?;
        a.attribute("logKeyId", &mut m.log_key_id, no_text())?;
        a.attribute("logKeyStore", &mut m.log_key_store, no_text())?;
        path(a, "stateFile", &mut m.state_file)?;
        a.optional("currentSnapshot", &mut m.current_snapshot)?;
        path(a, "snapshotFolder", &mut m.snapshot_folder)?;
        a.attribute("currentStateModified", &mut m.current_state_modified, true)?;
        a.optional("lastStateChange", &mut m.last_state_change)?;
        a.attribute("aborted", &mut m.aborted, false)?;
        a.attribute("processPriority", &mut m.process_priority, ProcessPriority::Default)?;
        a.attribute("icon", &mut m.icon, no_text())?;

        description(a, &mut m.description)?;
        let teleporter = m.teleporter != Teleporter::default();
        a.child("Teleporter", |a| {
            a.attribute_if(teleporter, "enabled", &mut m.teleporter.enabled, false)?;
            a.attribute_if(teleporter, "port", &mut m.teleporter.port, 0)?;
            a.attribute_if(teleporter, "address", &mut m.teleporter.address, no_text())?;
            a.attribute_if(teleporter, "password", &mut m.teleporter.password, no_text())
        })?;
        self.media_registry(a, &mut m.media_registry)?;
        a.child("ExtraData", |a| string_map(a, "ExtraDataItem", &mut m.extra_data))?;
        if a.reading() {
            m.snapshot = None;
        }
        a.presence("Snapshot", m.snapshot.is_some(), |a| {
            self.snapshot(a, m.snapshot.get_or_insert_default(), 1)
        })?;
        self.check_current_snapshot(a, m)?;
        if a.reading() && !a.has_child("Hardware") {
            return Err(
                a.error("Required Machine/Hardware element is missing", "restore the file from a copy")
            );
        }
        a.child_if(true, "Hardware", |a| self.hardware(a, &mut m.hardware, &mut m.recording))?;
        self.outside_hardware(a, &mut m.hardware, &mut m.debugging, &mut m.autostart, &mut m.recording)?;
        self.groups(a, &mut m.groups)
    }

    fn check_current_snapshot(&self, a: &Archive<'_>, m: &MachineSettings) -> Outcome {
        if !a.reading() || m.snapshot.is_none() {
            return Ok(());
        }
        match m.current_snapshot {
            None => Err(a.error(
                "Snapshots present but required Machine/@currentSnapshot attribute is missing",
                "add the attribute with the UUID of the snapshot that the machine's disks continue",
            )),
            Some(uuid) if m.find_snapshot(uuid).is_none() => Err(a.error(
                "Snapshots present but none matches the UUID in the Machine/@currentSnapshot attribute",
                "set the attribute to the UUID of the snapshot that the machine's disks continue",
            )),
            Some(_) => Ok(()),
        }
    }

    /// What stands beside the hardware, in machines and snapshots alike.
    fn outside_hardware(
        &mut self,
        a: &mut Archive<'_>,
        hardware: &mut Hardware,
        debugging: &mut Debugging,
        autostart: &mut Autostart,
        recording: &mut Recording,
    ) -> Outcome {
        if !self.since(V::V1_17) || a.has_child("StorageControllers") {
            self.storage(a, hardware)?;
        }
        if a.reading() && !self.since(V::V1_9) {
            // These stood below the hardware, but belong to controllers that have just been read.
            a.child("Hardware", |a| self.drives_before_1_9(a, hardware))?;
        }
        self.debugging(a, debugging)?;
        let write = *autostart != Autostart::default();
        a.child("Autostart", |a| {
            a.attribute_if(write, "enabled", &mut autostart.enabled, false)?;
            a.attribute_if(write, "delay", &mut autostart.delay, 0)?;
            a.attribute_if(write, "autostop", &mut autostart.autostop, AutostopType::Disabled)
        })?;
        if self.since(V::V1_19) {
            self.recording(a, recording)
        } else if !self.capture_in_hardware {
            video_capture(a, hardware.display.monitor_count, recording)
        } else {
            Ok(())
        }
    }

    fn snapshot(&mut self, a: &mut Archive<'_>, s: &mut Snapshot, depth: usize) -> Outcome {
        if depth > SNAPSHOT_DEPTH_MAX {
            return Err(a.error(
                format!("Maximum snapshot tree depth of {SNAPSHOT_DEPTH_MAX} exceeded"),
                "delete some of the snapshots",
            ));
        }
        a.required("uuid", &mut s.uuid)?;
        a.required("name", &mut s.name)?;
        a.required("timeStamp", &mut s.timestamp)?;
        path(a, "stateFile", &mut s.state_file)?;
        description(a, &mut s.description)?;
        if a.reading() && !a.has_child("Hardware") {
            return Err(
                a.error("Required Snapshot/Hardware element is missing", "restore the file from a copy")
            );
        }
        a.child_if(true, "Hardware", |a| self.hardware(a, &mut s.hardware, &mut s.recording))?;
        self.outside_hardware(a, &mut s.hardware, &mut s.debugging, &mut s.autostart, &mut s.recording)?;
        a.child("Snapshots", |a| {
            a.list("Snapshot", &mut s.children, |a, child| self.snapshot(a, child, depth + 1))
        })
    }

    fn debugging(&mut self, a: &mut Archive<'_>, d: &mut Debugging) -> Outcome {
        let write = *d != Debugging::default();
        a.child("Debugging", |a| {
            a.child("Tracing", |a| {
                a.attribute_if(write, "enabled", &mut d.tracing_enabled, false)?;
                a.attribute_if(write, "allowTracingToAccessVM", &mut d.allow_tracing_to_access_vm, false)?;
                a.attribute_if(write, "config", &mut d.tracing_config, String::new())
            })?;
            let write = write && self.since(V::V1_19);
            a.child("GuestDebug", |a| {
                a.attribute_if(write, "provider", &mut d.guest_debug_provider, GuestDebugProvider::None)?;
                a.attribute_if(write, "io", &mut d.guest_debug_io, GuestDebugIo::None)?;
                a.attribute_if(write, "address", &mut d.guest_debug_address, String::new())?;
                a.attribute_if(write, "port", &mut d.guest_debug_port, 0)
            })
        })
    }

    fn groups(&mut self, a: &mut Archive<'_>, groups: &mut Vec<String>) -> Outcome {
        let mut list = if groups.iter().eq(["/"]) { Vec::new() } else { std::mem::take(groups) };
        a.child("Groups", |a| a.list("Group", &mut list, |a, group| a.required("name", group)))?;
        if list.is_empty() {
            list.push("/".into());
        }
        *groups = list;
        Ok(())
    }

    /// `<Recording>`, since version 1.19.
    fn recording(&mut self, a: &mut Archive<'_>, r: &mut Recording) -> Outcome {
        let mut named: Vec<_> =
            r.screens.iter().filter(|s| **s != RecordingScreen::new(s.id)).cloned().collect();
        a.child("Recording", |a| {
            a.attribute("enabled", &mut r.enabled, false)?;
            if !a.reading() && !named.is_empty() {
                a.write("screens", &(named.len() as u64));
            }
            a.list("Screen", &mut named, recording_screen)
        })?;
        if a.reading() {
            r.screens = Recording::default().screens;
            for screen in named {
                for id in r.screens.len() as u32..=screen.id {
                    r.screens.push(RecordingScreen::new(id));
                }
                let at = screen.id as usize;
                r.screens[at] = screen;
            }
        }
        Ok(())
    }
}

/// `<VideoCapture>` from version 1.14 to 1.18: one set of values for all screens, and a bit for each screen that
/// is recorded.
pub(super) fn video_capture(a: &mut Archive<'_>, monitors: u32, r: &mut Recording) -> Outcome {
    a.presence("VideoCapture", *r != Recording::default(), |a| {
        a.attribute("enabled", &mut r.enabled, false)?;
        let mut bitmap =
            r.screens.iter().filter(|s| s.enabled && s.id < MAX_SCREENS).fold(0, |b, s| b | 1u64 << s.id);
        a.attribute("screens", &mut bitmap, 0)?;
        let mut first = r.screens.first().cloned().unwrap_or_else(|| RecordingScreen::new(0));
        let default = RecordingScreen::new(0);
        a.attribute("maxTime", &mut first.max_time_s, 0)?;
        a.attribute("options", &mut first.options, default.options)?;
        path(a, "file", &mut first.file)?;
        a.attribute("maxSize", &mut first.max_size_mb, 0)?;
        let size = (first.width, first.height) != (default.width, default.height);
        a.attribute_if(size, "horzRes", &mut first.width, default.width)?;
        a.attribute_if(size, "vertRes", &mut first.height, default.height)?;
        a.attribute("rate", &mut first.rate_kbps, default.rate_kbps)?;
        a.always("fps", &mut first.fps, default.fps)?;
        if a.reading() {
            r.screens = (0..monitors.clamp(1, MAX_SCREENS))
                .map(|id| RecordingScreen { id, enabled: bitmap >> id & 1 == 1, ..first.clone() })
                .collect();
        }
        Ok(())
    })
}

impl Default for RecordingScreen {
    fn default() -> Self {
        Self::new(0)
    }
}

fn recording_screen(a: &mut Archive<'_>, s: &mut RecordingScreen) -> Outcome {
    a.required("id", &mut s.id)?;
    if s.id >= MAX_SCREENS {
        return Err(a.error(
            format!("Invalid value {} in Recording/Screen/@id attribute", s.id),
            format!("write a number from 0 to {}", MAX_SCREENS - 1),
        ));
    }
    let default = RecordingScreen::new(s.id);
    a.always("enabled", &mut s.enabled, default.enabled)?;
    let mut features = match (s.video, s.audio) {
        (true, true) => "video audio",
        (true, false) => "video",
        (false, true) => "audio",
        (false, false) => "",
    }
    .to_owned();
    a.always("featuresEnabled", &mut features, "video".into())?;
    if a.reading() {
        let has = |word: &str| features.split_whitespace().any(|f| f.eq_ignore_ascii_case(word));
        (s.video, s.audio) = (has("video"), has("audio"));
    }
    a.attribute("maxTimeS", &mut s.max_time_s, 0)?;
    a.attribute_if(!s.options.is_empty(), "options", &mut s.options, default.options)?;
    let mut destination = DESTINATION_FILE;
    a.always("dest", &mut destination, DESTINATION_FILE)?;
    if destination != DESTINATION_FILE {
        return Err(a.error(
            format!("Not supported Recording/Screen/@dest attribute '{destination}'"),
            "write 1, which stands for a file",
        ));
    }
    path(a, "file", &mut s.file)?;
    a.attribute("maxSizeMB", &mut s.max_size_mb, 0)?;
    a.always("videoCodec", &mut s.video_codec, default.video_codec)?;
    a.attribute("videoDeadline", &mut s.video_deadline, default.video_deadline)?;
    a.attribute("videoRateCtlMode", &mut s.video_rate_control, default.video_rate_control)?;
    a.attribute("videoScalingMode", &mut s.video_scaling, default.video_scaling)?;
    let size = (s.width, s.height) != (default.width, default.height);
    a.attribute_if(size, "horzRes", &mut s.width, default.width)?;
    a.attribute_if(size, "vertRes", &mut s.height, default.height)?;
    a.attribute("rateKbps", &mut s.rate_kbps, default.rate_kbps)?;
    a.always("fps", &mut s.fps, default.fps)?;
    a.always("audioCodec", &mut s.audio_codec, default.audio_codec)?;
    a.attribute("audioDeadline", &mut s.audio_deadline, default.audio_deadline)?;
    a.attribute("audioRateCtlMode", &mut s.audio_rate_control, default.audio_rate_control)?;
    a.attribute("audioHz", &mut s.audio_hz, default.audio_hz)?;
    a.attribute("audioBits", &mut s.audio_bits, default.audio_bits)?;
    a.attribute("audioChannels", &mut s.audio_channels, default.audio_channels)
}

/// `<Description>`; some early builds wrote an attribute of that name.
fn description(a: &mut Archive<'_>, field: &mut String) -> Outcome {
    if a.reading() && !a.has_child("Description") {
        *field = a.read("Description")?.unwrap_or_default();
        return Ok(());
    }
    a.text_child("Description", field)
}

/// A path, left out if empty. Files from Windows hosts have backslashes.
fn path(a: &mut Archive<'_>, name: &str, field: &mut String) -> Outcome {
    a.attribute(name, field, String::new())?;
    if a.reading() && field.contains('\\') {
        *field = field.replace('\\', "/");
    }
    Ok(())
}
