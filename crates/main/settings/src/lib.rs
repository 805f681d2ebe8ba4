//! The settings files of VirtualBox: machines (`.vbox`) and the installation (`VirtualBox.xml`).

pub mod model;
pub mod ostypes;
pub mod version;
pub mod words;

pub use model::*;
pub use ostypes::{OsFamily, OsType};
pub use version::SettingsVersion;
pub use words::*;
