//! The settings files of VirtualBox: machines (`.vbox`) and the installation (`VirtualBox.xml`).

pub mod error;
pub mod model;
pub mod ostypes;
pub mod version;
pub mod words;
pub mod xml;

pub use error::{ContentError, SettingsError};
pub use model::*;
pub use ostypes::{OsFamily, OsType};
pub use version::SettingsVersion;
pub use words::*;
pub use xml::Document;
