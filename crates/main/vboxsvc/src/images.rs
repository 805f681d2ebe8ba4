//! Whole images: copies for clones, imports and exports.

use std::path::Path;
use std::sync::Arc;

use main_api::error::{ApiError, ApiResult};
use uuid::Uuid;
use vbox_types::ResultCode;

use crate::media::open_error;
use crate::svc::{State, Svc};

/// A chain of images, the base first.
pub(crate) type Chain = Vec<vd::Source>;

/// Opens the last image of the chain for reading, on top of the others.
pub(crate) fn open(chain: &Chain) -> ApiResult<Arc<vd::Image>> {
    vd::open_chain(chain, vd::OpenMode::ReadOnly).map_err(|e| {
        let path = chain.last().map(|image| image.path.as_path()).unwrap_or(Path::new(""));
        ApiError::new(ResultCode::FileError, open_error(path, &e)).on("IMedium")
    })
}

/// Keeps VMs from writing to the images of a chain while they are read.
pub(crate) struct Reading {
    svc: Arc<Svc>,
    key: Uuid,
}

impl Reading {
    /// Marks the media and those below them as read.
    pub(crate) fn start(svc: &Arc<Svc>, state: &mut State, media: &[Uuid]) -> ApiResult<Self> {
        let mut all = Vec::new();
        for id in media {
            let mut next = Some(*id);
            while let Some(id) = next.filter(|id| !all.contains(id)) {
                let medium = state.media.medium(id)?;
                if medium.users.values().any(|writes| *writes) {
                    return Err(ApiError::new(
                        ResultCode::InvalidObjectState,
                        format!("Medium '{}' is locked for writing", medium.location.display()),
                    )
                    .on("IMedium"));
                }
                all.push(id);
                next = medium.parent;
            }
        }
        let key = Uuid::new_v4();
        for id in all {
            state.media.medium_mut(id)?.users.insert(key, false);
        }
        Ok(Self { svc: svc.clone(), key })
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.svc.state.lock().media.unlock_for(self.key);
    }
}

/// A failure to make an image, with VirtualBox's words for it.
pub(crate) fn create_error(path: &Path, error: &vd::Error) -> ApiError {
    use std::error::Error as _;
    let already = if matches!(error, vd::Error::Exists { .. }) { " (VERR_ALREADY_EXISTS)" } else { "" };
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    ApiError::new(
        ResultCode::FileError,
        format!("Could not create the clone medium '{}'.\n{error}{cause}{already}", path.display()),
    )
    .on("IMedium")
}

/// The format that a file's extension stands for, if images of it can be made.
pub(crate) fn format_for(path: &Path) -> Option<vd::Format> {
    let extension = path.extension()?.to_string_lossy().to_ascii_lowercase();
    Some(match extension.as_str() {
        "vdi" => vd::Format::Vdi,
        "vmdk" => vd::Format::Vmdk,
        "vhd" => vd::Format::Vhd,
        _ => return None,
    })
}

/// The usual extension of a format's files.
pub(crate) fn extension(format: vd::Format) -> &'static str {
    match format {
        vd::Format::Vmdk => "vmdk",
        vd::Format::Vhd => "vhd",
        _ => "vdi",
    }
}
