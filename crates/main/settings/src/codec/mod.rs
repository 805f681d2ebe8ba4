//! How the typed settings stand in XML, for reading and writing at once (see [`crate::xml::Archive`]), in every
//! version from 1.7 (read) or 1.10 (written) on. Names, order and defaults are those of VirtualBox 7.0.

mod global;
mod hardware;
mod machine;
mod network;
mod shared;
mod storage;

use crate::model::{GlobalSettings, MachineSettings};
use crate::ostypes::OsType;
use crate::version::SettingsVersion;
use crate::xml::{Archive, Outcome};

/// A walk through the settings of one file.
#[derive(Clone, Copy)]
pub(crate) struct Walk {
    version: SettingsVersion,
    /// The machine's guest OS type, which decides what network cards and ports are that the file does not name.
    os: Option<&'static OsType>,
    /// Before version 1.19 `<VideoCapture>` stands below the hardware, where VirtualBox 4.3 to 6.0 have it, and not
    /// beside it, where 6.1 and 7.0 look for it. A file that has one keeps it where it is.
    capture_in_hardware: bool,
}

impl Walk {
    pub(crate) fn new(version: SettingsVersion) -> Self {
        Self { version, os: None, capture_in_hardware: false }
    }

    /// The walk that raises to `version` what this one has read.
    pub(crate) fn raised_to(self, version: SettingsVersion) -> Self {
        Self { version, ..self }
    }

    /// Whether the file is at least of this version.
    fn since(&self, version: SettingsVersion) -> bool {
        self.version >= version
    }
}

/// Settings that a file holds below its root element.
pub(crate) trait Section: Default {
    /// The element below the root.
    const ELEMENT: &'static str;

    fn walk(&mut self, walk: &mut Walk, archive: &mut Archive<'_>) -> Outcome;

    /// The lowest version that can express the settings.
    fn lowest_version(&self) -> SettingsVersion;
}

impl Section for MachineSettings {
    const ELEMENT: &'static str = "Machine";

    fn walk(&mut self, walk: &mut Walk, archive: &mut Archive<'_>) -> Outcome {
        walk.machine(archive, self)
    }

    fn lowest_version(&self) -> SettingsVersion {
        crate::bump::machine(self)
    }
}

impl Section for GlobalSettings {
    const ELEMENT: &'static str = "Global";

    fn walk(&mut self, walk: &mut Walk, archive: &mut Archive<'_>) -> Outcome {
        walk.global(archive, self)
    }

    fn lowest_version(&self) -> SettingsVersion {
        crate::bump::global(self)
    }
}
