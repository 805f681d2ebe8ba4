//! The settings files of VirtualBox: machines (`.vbox`) and the installation (`VirtualBox.xml`).
//!
//! ```no_run
//! # fn main() -> Result<(), settings::SettingsError> {
//! let mut file = settings::MachineFile::open("/vm/x/x.vbox".as_ref())?;
//! file.settings.hardware.memory.ram_mb = 2048;
//! file.save()?;
//! # Ok(())
//! # }
//! ```
//!
//! A file is read into a document tree that keeps every byte ([`xml`]), and from there into typed values
//! ([`model`]). Saving writes the typed values out twice, as they were read and as they are now, and merges only the
//! difference into the document; what is not ours stays as it stood. One description per element (`codec`) serves
//! reading and writing, with the defaults of each settings version. The file's version rises only if it cannot
//! express the settings (`bump`), and then a copy of the old file stays beside it ([`file`]).

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
