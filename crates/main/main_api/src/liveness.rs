//! The file by which the life of a VM process is known even when the service is not there to see it.
//!
//! `<configuration directory>/VMs/<uuid>.lock` is held with an exclusive `flock` by the VM process from before it
//! registers until it ends, in whatever way. Its content is one line, `<state> <pid> <seconds since 1970>`, written before
//! the state is told to the service. So a service that starts finds the truth:
//!
//! - the lock is held: the VM runs; its state is the line's, and the VM process will register again;
//! - the lock is free and the line says `PoweredOff`, `Saved` or `Aborted`: the VM ended in that way while no service ran;
//! - the lock is free and the line says anything else: the VM process died, and the machine is `Aborted`.
//!
//! The service removes the file when it has taken note of the end. Nothing of this is in the `.vbox` file, which
//! stays as VirtualBox writes it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use uuid::Uuid;
use vbox_types::MachineState;

use crate::enums::ApiEnum;

/// A line is padded to this length, so that one write replaces all of it.
const LINE: usize = 80;

/// What a liveness file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    pub state: MachineState,
    pub pid: u32,
    /// Seconds since 1970, when the state was entered.
    pub since: i64,
}

/// The file's path for machine `id`.
pub fn path(config_dir: &Path, id: Uuid) -> PathBuf {
    config_dir.join("VMs").join(format!("{id}.lock"))
}

/// The VM process's hold on its liveness file. Ends with the process.
#[derive(Debug)]
pub struct Held {
    file: File,
}

/// Why the file cannot be held.
#[derive(Debug)]
pub enum HoldError {
    /// Another VM process of the machine lives.
    Busy,
    Io(io::Error),
}

impl Held {
    /// Takes the liveness file of machine `id`.
    pub fn take(config_dir: &Path, id: Uuid) -> Result<Self, HoldError> {
        let path = path(config_dir, id);
        loop {
            if let Some(dir) = path.parent() {
                fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(HoldError::Io)?;
            }
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            let file = match options.open(&path) {
                Ok(file) => file,
                // The service has just removed the empty directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(HoldError::Io(error)),
            };
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(HoldError::Busy),
                Err(error) => return Err(HoldError::Io(error.into())),
            }
            // The service may have removed the file between open and lock; a lock on a removed file protects nothing.
            if same_file(&file, &path) {
                return Ok(Self { file });
            }
        }
    }

    /// Notes the state that the machine has entered.
    pub fn note(&self, state: MachineState) -> io::Result<()> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let line = format!("{} {} {since}", state.name(), std::process::id());
        let line = format!("{line:<width$}\n", width = LINE - 1);
        self.file.write_all_at(line.as_bytes(), 0)
    }
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

/// What the service finds out about a machine's VM process.
#[derive(Debug)]
pub enum Found {
    /// No liveness file: no VM process, and nothing to take note of.
    None,
    /// A VM process holds the file. `line` is `None` in the moment before its first note.
    Alive { file: File, line: Option<Line> },
    /// The VM process has ended. The file is locked for the caller, who removes it by [`remove`].
    Ended { file: File, line: Option<Line> },
}

/// Looks at the liveness file of machine `id`.
pub fn look(config_dir: &Path, id: Uuid) -> io::Result<Found> {
    let file = match OpenOptions::new().read(true).write(true).open(path(config_dir, id)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::None),
        Err(error) => return Err(error),
    };
    let held = match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => false,
        Err(rustix::io::Errno::WOULDBLOCK) => true,
        Err(error) => return Err(error.into()),
    };
    let line = read_line(&file);
    Ok(if held { Found::Alive { file, line } } else { Found::Ended { file, line } })
}

/// Waits until the VM process that holds `file` has ended and returns its last line. The file is then locked by `file`.
pub fn wait_for_end(file: &File) -> io::Result<Option<Line>> {
    loop {
        match flock(file, FlockOperation::LockExclusive) {
            Ok(()) => return Ok(read_line(file)),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes the file of a VM process that has ended.
pub fn remove(config_dir: &Path, id: Uuid) {
    let path = path(config_dir, id);
    let _ = fs::remove_file(&path);
    if let Some(dir) = path.parent() {
        // Fails while other VMs run, as it should.
        let _ = fs::remove_dir(dir);
    }
}

fn read_line(file: &File) -> Option<Line> {
    let mut buffer = [0; LINE];
    let length = file.read_at(&mut buffer, 0).ok()?;
    let text = std::str::from_utf8(&buffer[..length]).ok()?;
    let mut words = text.split_whitespace();
    Some(Line {
        state: <MachineState as ApiEnum>::from_name(words.next()?)?,
        pid: words.next()?.parse().ok()?,
        since: words.next()?.parse().ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_file_tells_the_state_and_a_free_one_the_end() {
        let dir = std::env::temp_dir().join(format!("boxwood-liveness-{}", std::process::id()));
        let id = Uuid::new_v4();
        assert!(matches!(look(&dir, id).unwrap(), Found::None));
        let held = Held::take(&dir, id).unwrap();
        held.note(MachineState::DeletingSnapshotPaused).unwrap();
        held.note(MachineState::Running).unwrap();
        assert!(matches!(Held::take(&dir, id), Err(HoldError::Busy)));
        let Found::Alive { line: Some(line), .. } = look(&dir, id).unwrap() else { panic!("not alive") };
        assert_eq!((line.state, line.pid), (MachineState::Running, std::process::id()));
        drop(held);
        let Found::Ended { line: Some(line), .. } = look(&dir, id).unwrap() else { panic!("not ended") };
        assert_eq!(line.state, MachineState::Running);
        remove(&dir, id);
        assert!(matches!(look(&dir, id).unwrap(), Found::None));
        fs::remove_dir_all(&dir).unwrap();
    }
}
