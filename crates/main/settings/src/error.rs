//! What can go wrong with a settings file, in words that say how to mend it.

use std::io;
use std::path::PathBuf;

use crate::version::SettingsVersion;

/// A place in a settings file whose content is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{what}; {mend}", place(*line, *column))]
pub struct ContentError {
    /// Counted from 1; 0 for content that was built in memory.
    pub line: u32,
    /// Counted from 1, in characters.
    pub column: u32,
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub mend: String,
}

impl ContentError {
    pub(crate) fn new(line: u32, column: u32, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { line, column, what: what.into(), mend: mend.into() }
    }
}

fn place(line: u32, column: u32) -> String {
    if line == 0 { String::new() } else { format!("(line {line}, column {column}) -- ") }
}

/// Why a settings file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried: "read", "create", "rename" …
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("Error in {} {error}{}", path.display(), previous_hint(previous))]
    Content {
        path: PathBuf,
        error: ContentError,
        /// The copy that the last successful write left, if there is one.
        previous: Option<PathBuf>,
    },
    #[error("settings file {} does not exist{}", path.display(), previous_hint(previous))]
    Missing {
        path: PathBuf,
        /// The copy that the last successful write left, if there is one.
        previous: Option<PathBuf>,
    },
    #[error(
        "settings file {} has version {version}, which is newer than {}, the newest this program knows; it was left untouched: open it with the VirtualBox that wrote it",
        path.display(), SettingsVersion::NEWEST
    )]
    Newer { path: PathBuf, version: String },
    #[error("settings file {} is {size} bytes long, more than the {limit} bytes that are read; this is not a settings file", path.display())]
    TooLarge { path: PathBuf, size: u64, limit: u64 },
}

fn previous_hint(previous: &Option<PathBuf>) -> String {
    match previous {
        Some(previous) => format!(
            "; {} holds the settings before the last change: if they are what you want, copy that file over this one",
            previous.display()
        ),
        None => String::new(),
    }
}
