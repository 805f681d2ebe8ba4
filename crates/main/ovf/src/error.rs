//! What can be wrong with a package.

use std::io;
use std::path::PathBuf;

/// Why a package cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("appliance file must have .ovf or .ova extension")]
    Extension,
    #[error("could not {what} '{path}'")]
    Host { what: &'static str, path: PathBuf, source: io::Error },
    #[error("'{path}' does not contain an .ovf-file")]
    NoDescriptor { path: PathBuf },
    #[error("error reading \"{name}\": {text}")]
    Xml { name: String, text: String },
    #[error("{0}")]
    Content(String),
    #[error("the file name \"{0}\" leads out of the package")]
    Climbs(String),
    #[error("the package has no file \"{0}\"")]
    Missing(String),
    #[error("\"{name}\" has {size} bytes; at most {limit} are read")]
    TooLarge { name: String, size: u64, limit: u64 },
    #[error("error reading the manifest \"{name}\", line {line}: {text}")]
    Manifest { name: String, line: usize, text: &'static str },
    #[error("digest mismatch (VERR_NOT_EQUAL): {0}")]
    Digest(String),
}

impl Error {
    pub(crate) fn host(what: &'static str, path: &std::path::Path, source: io::Error) -> Self {
        Self::Host { what, path: path.to_owned(), source }
    }

    pub(crate) fn content(text: impl Into<String>) -> Self {
        Self::Content(text.into())
    }
}
