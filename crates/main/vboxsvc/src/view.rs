//! A machine as a call sees it: one copy of its settings and what the service knows beside them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use main_api::enums::SessionState;
use main_api::error::{ApiError, ApiResult};
use main_api::types::ObjRef;
use settings::MachineSettings;
use vbox_types::{MachineState, ResultCode};

use crate::objects::{MachineRef, Part};

/// What a machine has beside its settings.
#[derive(Clone, Debug)]
pub(crate) struct Meta {
    pub(crate) state: MachineState,
    /// Milliseconds since 1970.
    pub(crate) last_state_change: i64,
    pub(crate) session_state: SessionState,
    pub(crate) session_name: String,
    pub(crate) session_pid: u32,
    pub(crate) settings_file: PathBuf,
    pub(crate) modified: bool,
    /// Why the settings file cannot be used.
    pub(crate) access_error: Option<ApiError>,
}

/// A copy of a machine's settings and one of its objects in them. Reads and writes go through this; a write's copy
/// takes the place of the machine's when the write has succeeded.
#[derive(Clone, Debug)]
pub(crate) struct View {
    pub(crate) machine: MachineRef,
    pub(crate) settings: Arc<MachineSettings>,
    pub(crate) part: Part,
    pub(crate) meta: Meta,
}

impl View {
    /// The settings to change.
    pub(crate) fn edit(&mut self) -> &mut MachineSettings {
        Arc::make_mut(&mut self.settings)
    }

    /// A reference to another part of the same machine.
    pub(crate) fn object<I>(&self, part: Part) -> ObjRef<I> {
        ObjRef::new(format!("{}{}", self.machine.path(), part.suffix()))
    }

    pub(crate) fn machine_folder(&self) -> &Path {
        self.meta.settings_file.parent().unwrap_or(Path::new("/"))
    }
}

/// The error for a part that has gone since its path was made.
pub(crate) fn gone() -> ApiError {
    ApiError::new(ResultCode::AccessDenied, "The object is not ready")
}

/// `value` if it lies in the range, else VirtualBox's complaint about `what`.
pub(crate) fn in_range(what: &str, value: u32, min: u32, max: u32, unit: &str) -> ApiResult<u32> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(ApiError::invalid_arg(format!(
        "Invalid {what}: {value}{unit} (must be in range [{min}, {max}]{unit})"
    )))
}
