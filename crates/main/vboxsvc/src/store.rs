//! The settings files that the service owns, with errors in the API's form.

use std::error::Error as _;
use std::path::{Path, PathBuf};

use main_api::error::{ApiError, ApiResult};
use settings::{Environment, GlobalFile, GlobalSettings, MachineFile, MachineSettings, SettingsError};
use vbox_types::ResultCode;

/// A settings file's failure with VirtualBox's code for it.
fn api_error(error: &SettingsError) -> ApiError {
    let code = match error {
        SettingsError::Content { .. } => ResultCode::XmlError,
        _ => ResultCode::FileError,
    };
    let cause = error.source().map(|s| format!(" ({s})")).unwrap_or_default();
    ApiError::new(code, format!("{error}{cause}"))
}

/// A machine's settings file.
pub(crate) struct MachineStore {
    path: PathBuf,
    /// None before the first save of a new machine.
    file: Option<MachineFile>,
}

impl MachineStore {
    pub(crate) fn open(path: &Path) -> ApiResult<(Self, MachineSettings)> {
        let file = MachineFile::open(path).map_err(|e| api_error(&e))?;
        let settings = file.settings.clone();
        Ok((Self { path: path.to_owned(), file: Some(file) }, settings))
    }

    /// A file that is to be made by the first save; one that is there by then is replaced.
    pub(crate) fn create(path: &Path) -> Self {
        Self { path: path.to_owned(), file: None }
    }

    /// Writes the settings if they differ from the file's.
    pub(crate) fn save(&mut self, settings: &MachineSettings) -> ApiResult<()> {
        match &mut self.file {
            Some(file) => {
                let before = std::mem::replace(&mut file.settings, settings.clone());
                match file.save() {
                    Ok(_) => Ok(()),
                    Err(error) => {
                        file.settings = before;
                        Err(api_error(&error))
                    }
                }
            }
            None => {
                if let Some(folder) = self.path.parent() {
                    std::fs::create_dir_all(folder).map_err(|e| {
                        ApiError::new(
                            ResultCode::FileError,
                            format!("Could not create the directory '{}' ({e})", folder.display()),
                        )
                    })?;
                }
                // The client asked for the overwriting when it created the machine.
                if self.path.is_file() {
                    let _ = std::fs::remove_file(&self.path);
                }
                self.file =
                    Some(MachineFile::create(&self.path, settings.clone()).map_err(|e| api_error(&e))?);
                Ok(())
            }
        }
    }

    /// The file has been moved.
    pub(crate) fn moved_to(&mut self, path: &Path) {
        self.path = path.to_owned();
        if let Some(file) = &mut self.file {
            file.moved_to(path);
        }
    }
}

/// Settings as the text of a settings file.
pub(crate) fn machine_text(settings: &MachineSettings) -> ApiResult<String> {
    let document = settings.to_document().map_err(|e| ApiError::new(ResultCode::XmlError, e.to_string()))?;
    Ok(document.to_text())
}

/// `VirtualBox.xml`.
pub(crate) struct GlobalStore {
    file: GlobalFile,
    environment: Environment,
}

impl std::ops::Deref for GlobalStore {
    type Target = GlobalFile;

    fn deref(&self) -> &GlobalFile {
        &self.file
    }
}

impl GlobalStore {
    /// Opens `VirtualBox.xml`, making it if there is none.
    pub(crate) fn open(config_dir: &Path) -> ApiResult<Self> {
        let path = config_dir.join("VirtualBox.xml");
        let file = match GlobalFile::open(&path) {
            // A file that was lost while its copy is there is for its owner to restore, not for us to replace.
            Err(SettingsError::Missing { previous: None, .. }) => {
                GlobalFile::create(&path, GlobalSettings::fresh())
            }
            other => other,
        };
        Ok(Self { file: file.map_err(|e| api_error(&e))?, environment: Environment::of_process() })
    }

    /// Changes the settings and writes them; on failure they are as before.
    pub(crate) fn edit(&mut self, change: impl FnOnce(&mut GlobalSettings)) -> ApiResult<()> {
        let before = self.file.settings.clone();
        change(&mut self.file.settings);
        if let Err(error) = self.file.save() {
            self.file.settings = before;
            return Err(api_error(&error));
        }
        Ok(())
    }

    pub(crate) fn default_machine_folder(&self) -> PathBuf {
        let properties = &self.file.settings.system_properties;
        self.environment.machine_folder(properties).unwrap_or_else(|_| PathBuf::from("/"))
    }
}
