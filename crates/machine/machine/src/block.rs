//! Joins image files (`vd`) to the storage controllers (`pdm`): every drive's medium is an image behind a queue with threads.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use vbox_types::ByteSize;
use vd::{Format, Image, KeyStore, KeyStoreError, OpenMode, Queue};

use crate::config::MediumConfig;

/// Threads for each image. One keeps the order of a guest that expects it from a disk without queueing; more help on hosts with
/// slow storage.
const THREADS: usize = 2;

/// An opened image as controllers see it.
pub struct ImageDriver {
    queue: Queue,
    gate: Option<Gate>,
}

/// Told when the guest asks for what is encrypted and the key is missing.
pub type KeyMissing = Arc<dyn Fn() + Send + Sync>;

/// Keeps requests to an encrypted image until its key is there.
struct Gate {
    key_id: String,
    store: KeyStore,
    missing: KeyMissing,
    state: Mutex<GateState>,
}

#[derive(Default)]
struct GateState {
    open: bool,
    /// The guest cannot go on before it is open.
    wanted: bool,
    held: Vec<(BlockOp, BlockDone)>,
}

impl ImageDriver {
    /// Opens the image that the settings name. An encrypted one waits for its password; `missing` is told when the guest does.
    pub fn open(medium: &MediumConfig, missing: KeyMissing) -> Result<Arc<Self>> {
        let path = &medium.path;
        let cannot = || format!("cannot open the medium \"{}\"", path.display());
        let mode = match medium {
            MediumConfig { read_only: true, .. } => OpenMode::ReadOnly,
            MediumConfig { shareable: true, .. } => OpenMode::Shareable,
            _ => OpenMode::ReadWrite,
        };
        let parents = medium.parents.iter().map(|(path, name)| Ok((path.clone(), format(path, name)?)));
        let parents = parents.collect::<Result<Vec<_>>>()?;
        let own = format(path, &medium.format)?;
        let image = match parents.is_empty() {
            true => Image::open(path, mode, own),
            false => vd::open_chain(&parents, OpenMode::ReadOnly)
                .and_then(|parent| Image::open_child(path, mode, own, parent)),
        };
        let image = image.with_context(cannot)?;
        let gate = match &medium.encryption {
            None => None,
            Some(encryption) => Some(Gate {
                key_id: encryption.key_id.clone(),
                store: KeyStore::decode(&encryption.key_store).with_context(cannot)?,
                missing,
                state: Mutex::default(),
            }),
        };
        Ok(Arc::new(Self { queue: Queue::new(image, THREADS)?, gate }))
    }

    /// The id of the password of an encrypted image.
    pub fn key_id(&self) -> Option<&str> {
        self.gate.as_ref().map(|gate| gate.key_id.as_str())
    }

    /// Whether requests would be carried out.
    pub fn is_open(&self) -> bool {
        self.gate.as_ref().is_none_or(|gate| gate.state.lock().open)
    }

    /// Whether the guest waits for the password.
    pub fn is_wanted(&self) -> bool {
        self.gate.as_ref().is_some_and(|gate| gate.state.lock().wanted)
    }

    /// Tries the password; takes a good while.
    pub fn try_password(&self, password: &str) -> Result<Option<vd::Dek>, KeyStoreError> {
        self.gate.as_ref().map(|gate| gate.store.unlock(password)).transpose()
    }

    /// Lets requests through, with those that have waited first.
    pub fn unlock(&self, dek: &vd::Dek) {
        let Some(gate) = &self.gate else { return };
        let mut state = gate.state.lock();
        self.queue.image().set_key(Some(dek));
        (state.open, state.wanted) = (true, false);
        for (op, done) in std::mem::take(&mut state.held) {
            self.start(op, done);
        }
    }

    /// Forgets the key; requests wait again. The guest must not run.
    pub fn lock(&self) -> Result<(), vd::Error> {
        let Some(gate) = &self.gate else { return Ok(()) };
        {
            let mut state = gate.state.lock();
            if !state.open {
                return Ok(());
            }
            (state.open, state.wanted) = (false, true);
        }
        let settled = self.settle();
        self.queue.image().set_key(None);
        settled
    }

    /// Requests that wait fail: the drive is taken away.
    pub fn give_up(&self) {
        let Some(gate) = &self.gate else { return };
        let held = std::mem::take(&mut gate.state.lock().held);
        for (_, done) in held {
            done(Err(BlockError::Io(std::io::Error::other("the disk was taken away"))));
        }
    }

    fn start(&self, op: BlockOp, done: BlockDone) {
        let op = match op {
            BlockOp::Read { offset, buffer } => vd::Op::Read { offset, buffer },
            BlockOp::Write { offset, buffer } => vd::Op::Write { offset, buffer },
            BlockOp::Flush => vd::Op::Flush,
            BlockOp::Discard { offset, len } => vd::Op::Discard { offset, len },
        };
        self.queue.submit(op, Box::new(|result| done(result.map_err(block_error))));
    }

    /// Waits for what the guest asked for and makes all of it durable.
    pub fn settle(&self) -> Result<(), vd::Error> {
        self.queue.drain();
        if self.queue.image().is_read_only() { Ok(()) } else { self.queue.image().flush() }
    }
}

/// The format that is on record for a file; a file without one is looked at.
fn format(path: &Path, name: &str) -> Result<Format> {
    match Format::from_name(name) {
        Some(format) => Ok(format),
        None if name.is_empty() => {
            vd::probe(path).with_context(|| format!("cannot open the medium \"{}\"", path.display()))
        }
        None => anyhow::bail!(
            "the medium \"{}\" is of the format {name}, which is not known: convert it to VDI or a raw image",
            path.display()
        ),
    }
}

fn block_error(error: vd::Error) -> BlockError {
    tracing::warn!(target: "vd", "{:#}", anyhow::Error::new(error).context("a request of the guest failed"));
    BlockError::Io(std::io::Error::other("the image reported an error"))
}

impl BlockDriver for ImageDriver {
    fn size(&self) -> ByteSize {
        self.queue.image().size()
    }

    fn is_read_only(&self) -> bool {
        self.queue.image().is_read_only()
    }

    fn submit(&self, op: BlockOp, done: BlockDone) {
        if let Some(gate) = &self.gate {
            let mut state = gate.state.lock();
            if !state.open {
                state.wanted = true;
                state.held.push((op, done));
                drop(state);
                (gate.missing)();
                return;
            }
        }
        self.start(op, done);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;
    use crate::config::Encryption;

    #[test]
    fn requests_to_an_encrypted_disk_wait_for_its_password_and_then_are_carried_out() {
        let path = std::env::temp_dir().join(format!("boxwood-gate-{}.vdi", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let options = vd::CreateOptions {
            format: Format::Vdi,
            variant: vd::Variant::Dynamic,
            size: ByteSize(4 << 20),
            uuid: None,
            comment: String::new(),
        };
        vd::create(&path, &options).unwrap();
        let dek = vd::Dek::random(vd::Algorithm::AesXts128).unwrap();
        let store = KeyStore::create(&dek, "open").unwrap();
        let medium = MediumConfig {
            path: path.clone(),
            format: "VDI".into(),
            parents: Vec::new(),
            read_only: false,
            shareable: false,
            uuid: uuid::Uuid::nil(),
            encryption: Some(Encryption { key_id: "id".into(), key_store: store.encode() }),
        };
        let told = Arc::new(AtomicU32::new(0));
        let count = told.clone();
        let driver = ImageDriver::open(
            &medium,
            Arc::new(move || {
                count.fetch_add(1, Ordering::SeqCst);
            }),
        )
        .unwrap();
        assert_eq!((driver.key_id(), driver.is_open(), driver.is_wanted()), (Some("id"), false, false));
        let (send, got) = mpsc::channel();
        let submit = |op| {
            let send = send.clone();
            driver.submit(op, Box::new(move |result| send.send(result.is_ok()).unwrap()));
        };
        submit(BlockOp::Write { offset: 0, buffer: vec![5; 4096] });
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
        assert_eq!((told.load(Ordering::SeqCst), driver.is_wanted()), (1, true));
        assert!(matches!(driver.try_password("shut"), Err(KeyStoreError::WrongPassword)));
        let key = driver.try_password("open").unwrap().unwrap();
        driver.unlock(&key);
        assert!(
            got.recv_timeout(Duration::from_secs(10)).unwrap() && driver.is_open() && !driver.is_wanted()
        );
        // Paused with the password taken away: nothing is read in the meantime.
        driver.lock().unwrap();
        submit(BlockOp::Read { offset: 0, buffer: vec![0; 4096] });
        assert!(got.recv_timeout(Duration::from_millis(50)).is_err());
        driver.give_up();
        assert!(!got.recv_timeout(Duration::from_secs(10)).unwrap());
        drop(driver);
        let image = Image::open(&path, OpenMode::ReadOnly, Format::Vdi).unwrap();
        let mut sector = [0; 512];
        image.read(0, &mut sector).unwrap();
        assert!(sector != [5; 512] && sector != [0; 512]);
        image.set_key(Some(&dek));
        image.read(0, &mut sector).unwrap();
        assert_eq!(sector, [5; 512]);
        std::fs::remove_file(&path).unwrap();
    }
}
