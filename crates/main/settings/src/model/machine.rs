//! A machine: what a `.vbox` file describes.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use super::hardware::Hardware;
use super::shared::{MediaRegistry, StringMap};
use crate::ostypes::{OsFamily, OsType};
use crate::words::*;

/// Everything that a machine's settings file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineSettings {
    pub uuid: Uuid,
    pub name: String,
    /// The folder's name ends in the UUID, and follows it when the machine is renamed.
    pub directory_includes_uuid: bool,
    /// The folder is renamed with the machine.
    pub name_sync: bool,
    pub description: String,
    /// Id of the guest OS type, such as `Debian_64`.
    pub os_type: String,
    /// Saved state, relative to the machine folder or absolute; empty if there is none.
    pub state_file: String,
    pub state_key_id: String,
    pub state_key_store: String,
    pub log_key_id: String,
    pub log_key_store: String,
    pub current_snapshot: Option<Uuid>,
    pub snapshot_folder: String,
    /// The machine differs from its current snapshot.
    pub current_state_modified: bool,
    /// Time of the last change of state; `None` if the file does not say.
    pub last_state_change: Option<Timestamp>,
    /// The machine's process died while the machine ran.
    pub aborted: bool,
    pub process_priority: ProcessPriority,
    /// A PNG picture in base64, as the file has it.
    pub icon: String,
    pub teleporter: Teleporter,
    pub media_registry: MediaRegistry,
    pub extra_data: StringMap,
    /// The first snapshot, which holds all others.
    pub snapshot: Option<Box<Snapshot>>,
    pub hardware: Hardware,
    pub debugging: Debugging,
    pub autostart: Autostart,
    pub recording: Recording,
    /// Never empty; `/` alone is the default.
    pub groups: Vec<String>,
}

impl Default for MachineSettings {
    fn default() -> Self {
        Self {
            uuid: Uuid::nil(),
            name: String::new(),
            directory_includes_uuid: false,
            name_sync: true,
            description: String::new(),
            os_type: String::new(),
            state_file: String::new(),
            state_key_id: String::new(),
            state_key_store: String::new(),
            log_key_id: String::new(),
            log_key_store: String::new(),
            current_snapshot: None,
            snapshot_folder: String::new(),
            current_state_modified: true,
            last_state_change: None,
            aborted: false,
            process_priority: ProcessPriority::default(),
            icon: String::new(),
            teleporter: Teleporter::default(),
            media_registry: MediaRegistry::default(),
            extra_data: StringMap::new(),
            snapshot: None,
            hardware: Hardware::default(),
            debugging: Debugging::default(),
            autostart: Autostart::default(),
            recording: Recording::default(),
            groups: vec!["/".into()],
        }
    }
}

impl MachineSettings {
    /// The snapshot `uuid`, at any depth.
    pub fn find_snapshot(&self, uuid: Uuid) -> Option<&Snapshot> {
        let mut queue: Vec<&Snapshot> = self.snapshot.as_deref().into_iter().collect();
        while let Some(snapshot) = queue.pop() {
            if snapshot.uuid == uuid {
                return Some(snapshot);
            }
            queue.extend(&snapshot.children);
        }
        None
    }

    /// The provider that the guest finds: `Default` and `Legacy` go by its operating system.
    pub fn effective_paravirt_provider(&self) -> ParavirtProvider {
        let os = OsType::by_id(&self.os_type);
        match self.hardware.paravirt_provider {
            ParavirtProvider::Default => os.map_or(ParavirtProvider::None, OsType::paravirt_provider),
            ParavirtProvider::Legacy if os.is_some_and(|os| os.family == OsFamily::MacOs) => {
                ParavirtProvider::Minimal
            }
            ParavirtProvider::Legacy => ParavirtProvider::None,
            set => set,
        }
    }
}

/// A point in time, in whole seconds since 1970, written as `2009-07-10T11:54:03Z`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// The time on the host's clock.
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Self(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0.div_euclid(86_400), self.0.rem_euclid(86_400));
        let (year, month, day) = civil_from_days(days);
        write!(
            f,
            "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
            second / 3600,
            second / 60 % 60,
            second % 60
        )
    }
}

/// Text that is not a point in time of the form `2009-07-10T11:54:03Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a time of the form 2009-07-10T11:54:03Z")]
pub struct NotATimestamp;

impl FromStr for Timestamp {
    type Err = NotATimestamp;

    fn from_str(text: &str) -> Result<Self, NotATimestamp> {
        let bytes = text.as_bytes();
        let shape = b"dddd-dd-ddTdd:dd:ddZ";
        let fits = bytes.len() == shape.len()
            && bytes.iter().zip(shape).all(|(b, s)| if *s == b'd' { b.is_ascii_digit() } else { b == s });
        if !fits {
            return Err(NotATimestamp);
        }
        let number = |from: usize, to: usize| -> i64 {
            bytes[from..to].iter().fold(0, |sum, digit| sum * 10 + i64::from(digit - b'0'))
        };
        let (year, month, day) = (number(0, 4), number(5, 7), number(8, 10));
        let (hour, minute, second) = (number(11, 13), number(14, 16), number(17, 19));
        let days = days_from_civil(year, month, day);
        if civil_from_days(days) != (year, month, day) || hour > 23 || minute > 59 || second > 59 {
            return Err(NotATimestamp);
        }
        Ok(Self(days * 86_400 + hour * 3600 + minute * 60 + second))
    }
}

/// The Gregorian date `days` after 1970-01-01. Years are counted from March, so that the leap day comes last.
fn civil_from_days(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

/// The days from 1970-01-01 to the Gregorian date, for any month and day of two digits.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = year - i64::from(month <= 2);
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let march_month = (month + 9).rem_euclid(12);
    let day_of_year = (153 * march_month + 2) / 5 + day - 1;
    era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468
}

/// `<Teleporter>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Teleporter {
    pub enabled: bool,
    pub port: u32,
    pub address: String,
    pub password: String,
}

/// A snapshot and the snapshots taken after it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    pub uuid: Uuid,
    pub name: String,
    pub timestamp: Timestamp,
    /// Saved state of the machine; empty if it was off.
    pub state_file: String,
    pub description: String,
    pub hardware: Box<Hardware>,
    pub debugging: Debugging,
    pub autostart: Autostart,
    pub recording: Recording,
    pub children: Vec<Snapshot>,
}

/// `<Debugging>`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Debugging {
    pub tracing_enabled: bool,
    pub allow_tracing_to_access_vm: bool,
    pub tracing_config: String,
    pub guest_debug_provider: GuestDebugProvider,
    pub guest_debug_io: GuestDebugIo,
    pub guest_debug_address: String,
    pub guest_debug_port: u32,
}

/// `<Autostart>`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Autostart {
    pub enabled: bool,
    /// Seconds.
    pub delay: u32,
    pub autostop: AutostopType,
}

/// `<Recording>`, before version 1.19 `<VideoCapture>`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recording {
    pub enabled: bool,
    /// By screen number, which is each entry's `id`; the first screen is always there.
    pub screens: Vec<RecordingScreen>,
}

impl Default for Recording {
    fn default() -> Self {
        Self { enabled: false, screens: vec![RecordingScreen::new(0)] }
    }
}

/// How one screen is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RecordingScreen {
    pub id: u32,
    pub enabled: bool,
    pub video: bool,
    pub audio: bool,
    /// Seconds; 0 for no limit.
    pub max_time_s: u32,
    pub options: String,
    /// Empty for a file named after the machine.
    pub file: String,
    /// Megabytes; 0 for no limit.
    pub max_size_mb: u32,
    pub video_codec: RecordingVideoCodec,
    /// Main API numbers (`RecordingCodecDeadline` and so on), as the file has them.
    pub video_deadline: u32,
    pub video_rate_control: u32,
    pub video_scaling: u32,
    pub width: u32,
    pub height: u32,
    /// Kilobits per second.
    pub rate_kbps: u32,
    pub fps: u32,
    pub audio_codec: RecordingAudioCodec,
    pub audio_deadline: u32,
    pub audio_rate_control: u32,
    pub audio_hz: u32,
    pub audio_bits: u32,
    pub audio_channels: u32,
}

impl RecordingScreen {
    /// The settings of a screen that the file does not mention.
    pub fn new(id: u32) -> Self {
        Self {
            id,
            enabled: id == 0,
            video: true,
            audio: false,
            max_time_s: 0,
            options: "vc_enabled=true,ac_enabled=false,ac_profile=med".into(),
            file: String::new(),
            max_size_mb: 0,
            video_codec: RecordingVideoCodec::Vp8,
            video_deadline: 0,
            video_rate_control: 2,
            video_scaling: 0,
            width: 1024,
            height: 768,
            rate_kbps: 512,
            fps: 25,
            audio_codec: RecordingAudioCodec::OggVorbis,
            audio_deadline: 0,
            audio_rate_control: 2,
            audio_hz: 22_050,
            audio_bits: 16,
            audio_channels: 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_are_read_as_they_are_written() {
        for text in
            ["1970-01-01T00:00:00Z", "2009-07-10T11:54:03Z", "2024-02-29T23:59:59Z", "2100-03-01T00:00:00Z"]
        {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
        }
        assert_eq!("2001-09-09T01:46:40Z".parse(), Ok(Timestamp(1_000_000_000)));
        assert_eq!(Timestamp(-1).to_string(), "1969-12-31T23:59:59Z");
    }

    #[test]
    fn dates_that_do_not_exist_are_refused() {
        for text in
            ["2023-02-29T00:00:00Z", "2023-13-01T00:00:00Z", "2023-00-10T00:00:00Z", "2023-01-01T24:00:00Z"]
        {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
        assert!("2023-01-01 10:00:00".parse::<Timestamp>().is_err());
    }
}
