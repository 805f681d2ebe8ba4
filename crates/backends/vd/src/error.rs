//! What can go wrong with an image file.

use std::path::PathBuf;

use uuid::Uuid;

use crate::format::{Format, Variant};
use crate::iscsi::SettingsError;

/// A failure, naming the file and, where there is one, the offset in it and the mend.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {action} '{path}'")]
    Host {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the iSCSI medium '{path}' cannot be reached as it is set up")]
    Settings {
        path: PathBuf,
        #[source]
        source: SettingsError,
    },
    #[error("'{path}' already exists; choose another name or remove it")]
    Exists { path: PathBuf },
    #[error("'{path}' is in use by another process; close it there first")]
    InUse { path: PathBuf },
    #[error("'{path}' is damaged at offset 0x{offset:x}: {what}; {mend}")]
    Damaged { path: PathBuf, offset: u64, what: String, mend: &'static str },
    #[error("'{path}' is not a {format} image: {what}")]
    WrongFormat { path: PathBuf, format: Format, what: String },
    #[error("'{path}' uses a feature that is not supported: {what}")]
    Unsupported { path: PathBuf, what: String },
    #[error("{format} images with the variant {variant} cannot be created")]
    NoSuchVariant { format: Format, variant: Variant },
    #[error("a {format} image of {size} bytes cannot be created: {why}")]
    BadSize { format: Format, size: u64, why: &'static str },
    #[error("'{path}' is a differencing image: its parent {{{parent}}} must be opened first")]
    ParentNeeded { path: PathBuf, parent: Uuid },
    #[error("'{path}' has the parent {{{expected}}}, but {{{found}}} was given")]
    WrongParent { path: PathBuf, expected: Uuid, found: Uuid },
    #[error(
        "the parent of '{path}' was changed after the differencing image was made: \
         its modification UUID is {{{found}}} instead of {{{expected}}}"
    )]
    ParentChanged { path: PathBuf, expected: Uuid, found: Uuid },
    #[error("'{path}' is opened read-only")]
    ReadOnly { path: PathBuf },
    #[error("the operation on '{path}' was cancelled")]
    Cancelled { path: PathBuf },
    #[error("range at byte {offset} of {len} bytes lies outside '{path}' of {size} bytes")]
    OutOfRange { path: PathBuf, offset: u64, len: u64, size: u64 },
}

impl Error {
    pub(crate) fn unsupported(path: &std::path::Path, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.to_owned(), what: what.into() }
    }
}

impl Error {
    /// A host failure doing `action` (a verb phrase: "read from") to the file at `path`.
    pub(crate) fn host(
        action: &'static str,
        path: impl Into<PathBuf>,
        source: impl Into<std::io::Error>,
    ) -> Self {
        Self::Host { action, path: path.into(), source: source.into() }
    }
}
