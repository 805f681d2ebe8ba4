//! The settings files of VirtualBox: machines (`.vbox`) and the installation (`VirtualBox.xml`).

mod bump;
mod codec;
pub mod error;
pub mod file;
mod load;
pub mod model;
mod new;
pub mod ostypes;
pub mod paths;
pub mod version;
pub mod words;
pub mod xml;

pub use error::{ContentError, SettingsError};
pub use file::{GlobalFile, MachineFile, Saved, SettingsFile};
pub use load::{Applied, LoadError};
pub use model::*;
pub use new::generate_mac_address;
pub use ostypes::{OsFamily, OsType};
pub use paths::Environment;
pub use version::SettingsVersion;
pub use words::*;
pub use xml::Document;
