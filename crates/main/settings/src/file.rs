//! Settings files on disk.
//!
//! A write must survive a crash or power cut at any moment: at each, the file under its name is whole, either
//! as it was or as it was to become, and never missing. The order is therefore
//!
//! 1. the new content into `<file>-tmp`, and from there to the disk;
//! 2. a second name for the old content, `<file>-prev-tmp`, which then takes the place of `<file>-prev`;
//! 3. `<file>-tmp` takes the place of `<file>`;
//! 4. the directory to the disk.
//!
//! VirtualBox moves the old file away before it moves the new one in; the names are its own.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::codec::Section;
use crate::error::SettingsError;
use crate::load::{self, LoadError};
use crate::model::{GlobalSettings, MachineSettings};
use crate::version::SettingsVersion;
use crate::xml::{Document, MAX_SIZE};

/// A machine's settings file.
pub type MachineFile = SettingsFile<MachineSettings>;

/// The installation's settings file, `VirtualBox.xml`.
pub type GlobalFile = SettingsFile<GlobalSettings>;

/// A settings file with the settings in it. Change `settings`, then [`save`](Self::save).
#[derive(Clone, Debug)]
pub struct SettingsFile<S> {
    path: PathBuf,
    document: Document,
    version: SettingsVersion,
    /// Where changes are made.
    pub settings: S,
}

/// What [`SettingsFile::save`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Whether anything was written; nothing is if nothing has changed.
    pub written: bool,
    /// The copy of the file in its old version, if the version rose and there was no such copy yet.
    pub backup: Option<PathBuf>,
}

#[allow(private_bounds)]
impl<S: Section + Clone + PartialEq> SettingsFile<S> {
    /// Reads the file at `path`.
    pub fn open(path: &Path) -> Result<Self, SettingsError> {
        let bytes = read(path)?;
        let content =
            |error| SettingsError::Content { path: path.to_owned(), error, previous: previous(path) };
        let document = Document::parse(&bytes).map_err(content)?;
        let (settings, version) = load::load(&document).map_err(|error| match error {
            LoadError::Content(error) => content(error),
            LoadError::Newer(version) => SettingsError::Newer { path: path.to_owned(), version },
        })?;
        Ok(Self { path: path.to_owned(), document, version, settings })
    }

    /// Writes a new file; it must not exist. Its directory must.
    pub fn create(path: &Path, settings: S) -> Result<Self, SettingsError> {
        let document = load::create(&settings).map_err(|error| SettingsError::Content {
            path: path.to_owned(),
            error,
            previous: None,
        })?;
        if path.symlink_metadata().is_ok() {
            let source = io::Error::from(io::ErrorKind::AlreadyExists);
            return Err(SettingsError::Io { action: "create", path: path.to_owned(), source });
        }
        replace_on_disk(path, document.to_text().as_bytes())?;
        let version = settings.lowest_version().max(SettingsVersion::V1_12);
        Ok(Self { path: path.to_owned(), document, version, settings })
    }

    /// Writes the settings if they have changed. On an error the file is as it was, and so is what a later
    /// attempt would write.
    pub fn save(&mut self) -> Result<Saved, SettingsError> {
        let mut document = self.document.clone();
        let applied = load::apply(&self.settings, &mut document).map_err(|error| match error {
            LoadError::Content(error) => {
                SettingsError::Content { path: self.path.clone(), error, previous: previous(&self.path) }
            }
            LoadError::Newer(version) => SettingsError::Newer { path: self.path.clone(), version },
        })?;
        if !applied.changed {
            return Ok(Saved { written: false, backup: None });
        }
        let backup = if applied.to > applied.from { self.back_up()? } else { None };
        replace_on_disk(&self.path, document.to_text().as_bytes())?;
        self.document = document;
        self.version = applied.to;
        Ok(Saved { written: true, backup })
    }

    /// Copies the file as it stands to `<name>-<version>.<ext>`, as VirtualBox does before it raises a version.
    /// An existing copy is left alone.
    fn back_up(&self) -> Result<Option<PathBuf>, SettingsError> {
        let backup = backup_path(&self.path, &load::version_text(&self.document));
        let mut file = match fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&backup) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(None),
            Err(source) => return Err(SettingsError::Io { action: "create", path: backup, source }),
        };
        let written = file.write_all(self.document.to_text().as_bytes()).and_then(|()| file.sync_all());
        match written {
            Ok(()) => Ok(Some(backup)),
            Err(source) => {
                // A half-written copy would pass for a whole one at the next attempt.
                let _ = fs::remove_file(&backup);
                Err(SettingsError::Io { action: "write", path: backup, source })
            }
        }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Says that the file is somewhere else now: the caller has moved it.
    pub fn moved_to(&mut self, path: &Path) {
        self.path = path.to_owned();
    }

    /// The version that the file has on disk.
    pub fn version(&self) -> SettingsVersion {
        self.version
    }

    /// The document as it stands on disk.
    pub fn document(&self) -> &Document {
        &self.document
    }
}

impl GlobalSettings {
    /// The settings of a fresh installation.
    pub fn fresh() -> Self {
        Self { dhcp_servers: vec![crate::model::DhcpServer::host_only_default()], ..Self::default() }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, SettingsError> {
    let error = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => SettingsError::Missing { path: path.to_owned(), previous: previous(path) },
        _ => SettingsError::Io { action: "read", path: path.to_owned(), source },
    };
    let file = fs::File::open(path).map_err(error)?;
    let size = file.metadata().map_err(error)?.len();
    if size > MAX_SIZE {
        return Err(SettingsError::TooLarge { path: path.to_owned(), size, limit: MAX_SIZE });
    }
    let mut bytes = Vec::with_capacity(size as usize);
    // The file may grow while it is read; the parser refuses what is too long.
    file.take(MAX_SIZE + 1).read_to_end(&mut bytes).map_err(error)?;
    Ok(bytes)
}

/// `path` with `suffix` after its name.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The copy that the last write left beside `path`, if there is one.
fn previous(path: &Path) -> Option<PathBuf> {
    let real = path.canonicalize();
    let previous = with_suffix(real.as_deref().unwrap_or(path), "-prev");
    previous.is_file().then_some(previous)
}

/// Where the file goes that is about to be raised from `version`: `X.vbox` of version `1.14-linux` to
/// `X-1.14-linux.vbox`.
fn backup_path(path: &Path, version: &str) -> PathBuf {
    let version: String = version
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-') { c } else { '_' })
        .collect();
    let extension = path.extension().filter(|e| *e == "xml" || *e == "vbox").map(|e| e.to_owned());
    let stem = if extension.is_some() { path.with_extension("") } else { path.to_owned() };
    let mut backup = with_suffix(&stem, &format!("-{version}."));
    backup.as_mut_os_string().push(extension.unwrap_or_else(|| "xml".into()));
    backup
}

/// The steps of a write, so that tests can cut the power between them.
trait Steps {
    /// Creates or empties a file, and brings `bytes` to the disk. The mode is that of `like`, if that exists.
    fn write(&self, path: &Path, bytes: &[u8], like: &Path) -> io::Result<()>;
    fn exists(&self, path: &Path) -> bool;
    /// A second name for a file; a copy of it where the file system has no hard links.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Moves a file over whatever was there.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn sync_directory(&self, directory: &Path) -> io::Result<()>;
}

/// Puts `bytes` in the place of what `path` names; behind a symbolic link, where the link points.
fn replace_on_disk(path: &Path, bytes: &[u8]) -> Result<(), SettingsError> {
    match path.canonicalize() {
        Ok(real) => replace(&Disk, &real, bytes),
        Err(_) => replace(&Disk, path, bytes),
    }
}

fn replace(steps: &impl Steps, path: &Path, bytes: &[u8]) -> Result<(), SettingsError> {
    let temporary = with_suffix(path, "-tmp");
    let previous = with_suffix(path, "-prev");
    let next_previous = with_suffix(path, "-prev-tmp");
    let failed = |action: &'static str, path: &Path| {
        let path = path.to_owned();
        move |source| SettingsError::Io { action, path, source }
    };
    let result = (|| {
        steps.write(&temporary, bytes, path).map_err(failed("write", &temporary))?;
        if steps.exists(path) {
            if steps.exists(&next_previous) {
                steps.remove(&next_previous).map_err(failed("remove", &next_previous))?;
            }
            steps.link(path, &next_previous).map_err(failed("link", &next_previous))?;
            steps.rename(&next_previous, &previous).map_err(failed("rename", &next_previous))?;
            if steps.exists(&next_previous) {
                // A rename does nothing between two names of one file, which they are if a crash came after
                // this step of the last write.
                steps.remove(&next_previous).map_err(failed("remove", &next_previous))?;
            }
        }
        steps.rename(&temporary, path).map_err(failed("replace", path))
    })();
    if result.is_err() {
        let _ = steps.remove(&temporary);
        return result;
    }
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    steps.sync_directory(directory).map_err(failed("sync", directory))
}

/// The real file system.
struct Disk;

impl Steps for Disk {
    fn write(&self, path: &Path, bytes: &[u8], like: &Path) -> io::Result<()> {
        let mode = fs::metadata(like).map_or(0o600, |m| m.permissions().mode() & 0o777);
        // A left-over of a crash may have any mode, or be a link.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()
    }

    fn exists(&self, path: &Path) -> bool {
        path.symlink_metadata().is_ok()
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        if fs::hard_link(from, to).is_ok() {
            return Ok(());
        }
        let bytes = fs::read(from)?;
        self.write(to, &bytes, from)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        fs::File::open(directory)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::rc::Rc;

    use super::*;

    /// A file system that stops working after a number of steps, as a machine without power does. Names count
    /// at once; content only once it was brought to the disk, which `write` does as its last act.
    #[derive(Default)]
    struct PowerCut {
        files: RefCell<BTreeMap<PathBuf, Rc<str>>>,
        left: Cell<usize>,
        taken: RefCell<Vec<String>>,
        /// The directory as it was last brought to the disk, and what was done to it since: a name that went, one that came, and of what.
        synced: RefCell<BTreeMap<PathBuf, Rc<str>>>,
        since: RefCell<Vec<(Option<PathBuf>, Option<PathBuf>, Rc<str>)>>,
    }

    impl PowerCut {
        fn note(&self, gone: Option<&Path>, new: Option<&Path>, content: &Rc<str>) {
            self.since.borrow_mut().push((gone.map(Into::into), new.map(Into::into), content.clone()));
        }

        /// The directories that the disk may hold: any of the changes since the last sync may be missing.
        fn directories(&self) -> Vec<BTreeMap<PathBuf, Rc<str>>> {
            let since = self.since.borrow();
            let one = |mask: u32| {
                let mut names = self.synced.borrow().clone();
                for (_, (gone, new, content)) in since.iter().enumerate().filter(|(i, _)| mask & 1 << i != 0)
                {
                    gone.as_ref().map(|name| names.remove(name));
                    new.as_ref().map(|name| names.insert(name.clone(), content.clone()));
                }
                names
            };
            (0..1 << since.len()).map(one).collect()
        }

        fn step(&self, what: &str, path: &Path) -> io::Result<()> {
            let left = self.left.get().checked_sub(1).ok_or(io::ErrorKind::Other)?;
            self.left.set(left);
            self.taken.borrow_mut().push(format!("{what} {}", path.display()));
            Ok(())
        }

        fn content(&self, path: &str) -> Option<Rc<str>> {
            self.files.borrow().get(Path::new(path)).cloned()
        }
    }

    impl Steps for PowerCut {
        fn write(&self, path: &Path, bytes: &[u8], _like: &Path) -> io::Result<()> {
            self.step("create", path)?;
            self.files.borrow_mut().insert(path.into(), "".into());
            self.step("write half of", path)?;
            let text = std::str::from_utf8(bytes).unwrap();
            self.files.borrow_mut().insert(path.into(), text[..text.len() / 2].into());
            self.step("sync", path)?;
            let content: Rc<str> = text.into();
            // What a name stands for that came before its content was there can be of no file that counts.
            self.note(None, Some(path), &content);
            self.files.borrow_mut().insert(path.into(), content);
            Ok(())
        }

        fn exists(&self, path: &Path) -> bool {
            self.files.borrow().contains_key(path)
        }

        fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step("link", to)?;
            let content = self.files.borrow()[from].clone();
            self.note(None, Some(to), &content);
            assert!(
                self.files.borrow_mut().insert(to.into(), content).is_none(),
                "link over {}",
                to.display()
            );
            Ok(())
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.step("rename", to)?;
            let mut files = self.files.borrow_mut();
            let content = files[from].clone();
            if files.get(to).is_some_and(|there| Rc::ptr_eq(there, &content)) {
                return Ok(());
            }
            files.remove(from);
            self.note(Some(from), Some(to), &content);
            files.insert(to.into(), content);
            Ok(())
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.step("remove", path)?;
            if let Some(content) = self.files.borrow_mut().remove(path) {
                self.note(Some(path), None, &content);
            }
            Ok(())
        }

        fn sync_directory(&self, directory: &Path) -> io::Result<()> {
            self.step("sync directory", directory)?;
            self.since.borrow_mut().clear();
            self.synced.replace(self.files.borrow().clone());
            Ok(())
        }
    }

    fn write(disk: &PowerCut, text: &str, steps: usize) -> bool {
        disk.left.set(steps);
        replace(disk, Path::new("/m/x.vbox"), text.as_bytes()).is_ok()
    }

    #[test]
    fn at_every_cut_the_file_is_whole_and_the_next_write_succeeds() {
        let mut cuts = 0;
        for steps in 0.. {
            let disk = PowerCut::default();
            assert!(write(&disk, "first", usize::MAX) && write(&disk, "second", usize::MAX));
            let done = write(&disk, "third", steps);
            let file = disk.content("/m/x.vbox").expect("the file is never missing");
            let previous = disk.content("/m/x.vbox-prev").expect("its copy is never missing");
            assert!(["second", "third"].contains(&&*file), "after {:?}: {file}", disk.taken.borrow());
            assert!(["first", "second"].contains(&&*previous), "after {:?}: {previous}", disk.taken.borrow());
            assert!(write(&disk, "fourth", usize::MAX), "after {steps} steps");
            assert_eq!(disk.content("/m/x.vbox").as_deref(), Some("fourth"));
            assert_eq!(disk.content("/m/x.vbox-prev"), Some(file));
            assert_eq!(
                disk.files.borrow().len(),
                2,
                "left over after {steps} steps: {:?}",
                disk.files.borrow()
            );
            if done {
                break;
            }
            cuts += 1;
        }
        assert!(cuts >= 7, "only {cuts} cuts tried");
    }

    #[test]
    fn whatever_of_the_directory_a_cut_loses_the_file_is_whole() {
        let mut tried = 0;
        for steps in 0.. {
            let disk = PowerCut::default();
            assert!(write(&disk, "first", usize::MAX) && write(&disk, "second", usize::MAX));
            let done = write(&disk, "third", steps);
            for names in disk.directories() {
                let file = names.get(Path::new("/m/x.vbox")).expect("the file is never missing");
                assert!(["second", "third"].contains(&&**file), "after {:?}: {names:?}", disk.taken.borrow());
                assert!(!done || &**file == "third", "what was saved is lost: {names:?}");
                tried += 1;
            }
            if done {
                break;
            }
        }
        assert!(tried >= 30, "only {tried} states tried");
    }

    #[test]
    fn a_cut_during_the_first_write_leaves_nothing_or_the_whole_file() {
        for steps in 0..10 {
            let disk = PowerCut::default();
            write(&disk, "first", steps);
            assert!(disk.content("/m/x.vbox").is_none_or(|text| &*text == "first"));
        }
    }

    #[test]
    fn backups_are_named_as_virtualbox_names_them() {
        let name = |path: &str, version: &str| backup_path(Path::new(path), version).display().to_string();
        assert_eq!(name("/m/A B.vbox", "1.14-linux"), "/m/A B-1.14-linux.vbox");
        assert_eq!(name("/c/VirtualBox.xml", "1.12-windows"), "/c/VirtualBox-1.12-windows.xml");
        assert_eq!(name("/m/odd", "1.14-linux"), "/m/odd-1.14-linux.xml");
        assert_eq!(name("/m/x.y.vbox", "1.14-/../../e"), "/m/x.y-1.14-_.._.._e.vbox");
    }
}
