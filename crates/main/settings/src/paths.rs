//! Where settings live.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::model::SystemProperties;

/// Name of the installation's settings file in the configuration directory.
pub const GLOBAL_FILE: &str = "VirtualBox.xml";

/// Name of the folder below the home directory in which machines are created.
pub const MACHINE_FOLDER: &str = "VirtualBox VMs";

/// What decides where settings live. Taken from the process once, by [`Environment::of_process`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// `VBOX_USER_HOME`.
    pub vbox_user_home: Option<OsString>,
    /// `XDG_CONFIG_HOME`.
    pub xdg_config_home: Option<OsString>,
    /// `HOME`.
    pub home: Option<OsString>,
    /// The user's directory in the account database.
    pub account_home: Option<PathBuf>,
    /// Effective user id 0.
    pub root: bool,
    /// Against which a relative `VBOX_USER_HOME` is taken.
    pub current_directory: PathBuf,
}

/// There is no home directory to put settings in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no home directory: HOME is not set, and the account database names none; set VBOX_USER_HOME")]
pub struct NoHome;

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        let variable = |name: &str| std::env::var_os(name);
        let uid = rustix::process::geteuid();
        Self {
            vbox_user_home: variable("VBOX_USER_HOME"),
            xdg_config_home: variable("XDG_CONFIG_HOME"),
            home: variable("HOME"),
            account_home: account_home(uid.as_raw()),
            root: uid.is_root(),
            current_directory: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
        }
    }

    /// The user's home directory. For root the account database decides, so that `sudo` without `-H` does not
    /// leave root's files in a user's home; for others it is asked only when `HOME` is not set.
    pub fn home(&self) -> Result<PathBuf, NoHome> {
        let account = self.account_home.clone();
        let variable = self.home.clone().filter(|home| !home.is_empty()).map(PathBuf::from);
        let (first, second) = if self.root { (account, variable) } else { (variable, account) };
        first.or(second).ok_or(NoHome)
    }

    /// The configuration directory: `VBOX_USER_HOME`; else `~/.VirtualBox`, if that is a directory, because
    /// VirtualBox before 4.3 used it; else `VirtualBox` below `XDG_CONFIG_HOME` or `~/.config`.
    pub fn config_directory(&self) -> Result<PathBuf, NoHome> {
        self.config_directory_with(&|path| path.is_dir())
    }

    fn config_directory_with(&self, is_directory: &dyn Fn(&Path) -> bool) -> Result<PathBuf, NoHome> {
        if let Some(directory) = self.vbox_user_home.as_ref().filter(|d| !d.is_empty()) {
            return Ok(self.current_directory.join(directory));
        }
        let legacy = self.home().map(|home| home.join(".VirtualBox"));
        if let Ok(legacy) = legacy.as_ref() {
            if is_directory(legacy) {
                return Ok(legacy.clone());
            }
        }
        match self.xdg_config_home.as_ref().filter(|d| Path::new(d).is_absolute()) {
            Some(directory) => Ok(Path::new(directory).join("VirtualBox")),
            None => Ok(self.home()?.join(".config/VirtualBox")),
        }
    }

    /// The folder in which machines are created: the one set by `setproperty machinefolder`, else
    /// `~/VirtualBox VMs`.
    pub fn machine_folder(&self, properties: &SystemProperties) -> Result<PathBuf, NoHome> {
        // VirtualBox before 4.0 stored "Machines" for what was then the default.
        match properties.default_machine_folder.as_str() {
            "" | "Machines" => Ok(self.home()?.join(MACHINE_FOLDER)),
            folder => Ok(self.config_directory()?.join(folder)),
        }
    }
}

/// The directory of user `uid` in `/etc/passwd`. Network directories are not asked: the answer matters for root
/// only, who stands in the file.
fn account_home(uid: u32) -> Option<PathBuf> {
    home_in_passwd(&std::fs::read_to_string("/etc/passwd").ok()?, uid)
}

fn home_in_passwd(passwd: &str, uid: u32) -> Option<PathBuf> {
    passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let home = *fields.get(5)?;
        (fields[2].parse() == Ok(uid) && home.starts_with('/')).then(|| PathBuf::from(home))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Environment {
        Environment {
            home: Some("/home/ann".into()),
            account_home: Some("/home/account".into()),
            current_directory: "/srv".into(),
            ..Environment::default()
        }
    }

    fn config(environment: &Environment, existing: &[&str]) -> String {
        let found = environment.config_directory_with(&|path| existing.iter().any(|e| Path::new(e) == path));
        found.unwrap().display().to_string()
    }

    #[test]
    fn the_configuration_directory_follows_the_environment() {
        assert_eq!(config(&user(), &[]), "/home/ann/.config/VirtualBox");
        let xdg = Environment { xdg_config_home: Some("/x".into()), ..user() };
        assert_eq!(config(&xdg, &[]), "/x/VirtualBox");
        let relative_xdg = Environment { xdg_config_home: Some("x".into()), ..user() };
        assert_eq!(config(&relative_xdg, &[]), "/home/ann/.config/VirtualBox");
        let own = Environment { vbox_user_home: Some("/v".into()), ..xdg };
        assert_eq!(config(&own, &["/home/ann/.VirtualBox"]), "/v");
        let relative = Environment { vbox_user_home: Some("kit".into()), ..user() };
        assert_eq!(config(&relative, &[]), "/srv/kit");
    }

    #[test]
    fn an_existing_legacy_directory_is_kept() {
        assert_eq!(config(&user(), &["/home/ann/.VirtualBox"]), "/home/ann/.VirtualBox");
    }

    #[test]
    fn roots_home_comes_from_the_account_database() {
        let root = Environment { root: true, account_home: Some("/root".into()), ..user() };
        assert_eq!(
            root.machine_folder(&SystemProperties::default()).unwrap(),
            Path::new("/root/VirtualBox VMs")
        );
        assert_eq!(config(&root, &[]), "/root/.config/VirtualBox");
        assert_eq!(user().home().unwrap(), Path::new("/home/ann"));
        let nobody = Environment { home: None, account_home: None, ..user() };
        assert_eq!(nobody.home(), Err(NoHome));
    }

    #[test]
    fn the_machine_folder_can_be_set() {
        let folder = |set: &str| {
            let properties =
                SystemProperties { default_machine_folder: set.into(), ..SystemProperties::default() };
            user().machine_folder(&properties).unwrap().display().to_string()
        };
        assert_eq!(folder("/vms"), "/vms");
        assert_eq!(folder("Machines"), "/home/ann/VirtualBox VMs");
        assert_eq!(folder(""), "/home/ann/VirtualBox VMs");
    }

    #[test]
    fn the_account_database_is_read_by_user_id() {
        let passwd = "root:x:0:0:root:/root:/bin/bash\nbroken\nann:x:1000:1000::/home/ann:/bin/sh\n";
        assert_eq!(home_in_passwd(passwd, 1000), Some("/home/ann".into()));
        assert_eq!(home_in_passwd(passwd, 0), Some("/root".into()));
        assert_eq!(home_in_passwd(passwd, 7), None);
    }
}
