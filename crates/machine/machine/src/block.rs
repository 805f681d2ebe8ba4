//! Joins image files (`vd`) to the storage controllers (`pdm`): every drive's medium is an image behind a queue with threads.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Weak};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use pdm::connector::{BlockDone, BlockDriver, BlockError, BlockOp};
use vbox_types::ByteSize;
use vd::{Format, Image, KeyStore, KeyStoreError, OpenMode, Queue, Source};

use crate::config::MediumConfig;
use crate::limit::{Limit, Waiter};

/// Threads for each image. One keeps the order of a guest that expects it from a disk without queueing; more help on hosts with
/// slow storage.
const THREADS: usize = 2;
/// For a disk behind a network, which carries out many requests at a time.
const NETWORK_THREADS: usize = 16;

/// An opened image as controllers see it.
pub struct ImageDriver {
    queue: Queue,
    gate: Option<Gate>,
    throttle: Option<Throttle>,
}

/// Keeps what a bandwidth group may not have yet.
struct Throttle {
    limit: Arc<Limit>,
    driver: Weak<dyn Waiter>,
    /// In the guest's order.
    held: Mutex<VecDeque<(BlockOp, BlockDone)>>,
}

/// The bytes that a request moves.
fn moved(op: &BlockOp) -> usize {
    match op {
        BlockOp::Read { buffer, .. } | BlockOp::Write { buffer, .. } => buffer.len(),
        BlockOp::Flush | BlockOp::Discard { .. } => 0,
    }
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
    /// Opens the image that the settings name, for a disk with this limit. An encrypted one waits for its password; `missing` is told
    /// when the guest does.
    pub fn open(medium: &MediumConfig, limit: Option<Arc<Limit>>, missing: KeyMissing) -> Result<Arc<Self>> {
        let path = &medium.path;
        let cannot = || format!("cannot open the medium \"{}\"", path.display());
        let mode = match medium {
            MediumConfig { read_only: true, .. } => OpenMode::ReadOnly,
            MediumConfig { shareable: true, .. } => OpenMode::Shareable,
            _ => OpenMode::ReadWrite,
        };
        let source = |path: &Path, name: &str| -> Result<Source> {
            let format = format(path, name)?;
            let target = medium.target.as_ref().filter(|_| format == Format::Iscsi);
            Ok(target.cloned().unwrap_or_else(|| (path.to_owned(), format).into()))
        };
        let parents = medium.parents.iter().map(|(path, name)| source(path, name));
        let parents = parents.collect::<Result<Vec<_>>>()?;
        let own = source(path, &medium.format)?;
        let parent =
            if parents.is_empty() { None } else { Some(vd::open_chain(&parents, OpenMode::ReadOnly)) };
        let image = parent.transpose().and_then(|parent| Image::open_source(&own, mode, parent));
        let image = image.with_context(cannot)?;
        image.set_cached(medium.host_cache);
        let threads = if medium.target.is_some() { NETWORK_THREADS } else { THREADS };
        let gate = match &medium.encryption {
            None => None,
            Some(encryption) => Some(Gate {
                key_id: encryption.key_id.clone(),
                store: KeyStore::decode(&encryption.key_store).with_context(cannot)?,
                missing,
                state: Mutex::default(),
            }),
        };
        let queue = Queue::new(image, threads)?;
        Ok(Arc::new_cyclic(|own: &Weak<Self>| {
            let throttle = limit.map(|limit| Throttle { limit, driver: own.clone(), held: Mutex::default() });
            Self { queue, gate, throttle }
        }))
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

    /// Starts a request, as soon as the disk's bandwidth group lets it.
    fn start(&self, op: BlockOp, done: BlockDone) {
        let Some(throttle) = self.throttle.as_ref().filter(|_| moved(&op) > 0) else {
            return self.carry_out(op, done);
        };
        throttle.held.lock().push_back((op, done));
        self.go_on();
    }

    fn carry_out(&self, op: BlockOp, done: BlockDone) {
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
        // The machine's time may stand still, and the limits with it.
        if let Some(throttle) = &self.throttle {
            let held = std::mem::take(&mut *throttle.held.lock());
            held.into_iter().for_each(|(op, done)| self.carry_out(op, done));
        }
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

impl Waiter for ImageDriver {
    fn go_on(&self) {
        let Some(Throttle { limit, driver, held }) = &self.throttle else { return };
        let mut held = held.lock();
        while !held.is_empty() && limit.is_open(driver) {
            let Some((op, done)) = held.pop_front() else { break };
            limit.charge(moved(&op));
            self.carry_out(op, done);
        }
    }
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
    use crate::limit::Limits;

    fn new_disk(name: &str) -> MediumConfig {
        let path = std::env::temp_dir().join(format!("boxwood-{name}-{}.vdi", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let options = vd::CreateOptions {
            format: Format::Vdi,
            variant: vd::Variant::Dynamic,
            size: ByteSize(4 << 20),
            uuid: None,
            comment: String::new(),
        };
        vd::create(&path, &options).unwrap();
        MediumConfig {
            path,
            format: "VDI".into(),
            parents: Vec::new(),
            target: None,
            read_only: false,
            shareable: false,
            host_cache: true,
            uuid: uuid::Uuid::nil(),
            encryption: None,
        }
    }

    #[test]
    fn disks_of_a_group_share_its_limit_and_a_pause_leaves_nothing_waiting() {
        let timers = tm::TimerQueue::new(tm::Clock::manual());
        let limits = Limits::new(&timers);
        let limit = limits.set("slow", 1 << 20);
        let media = [new_disk("limit-a"), new_disk("limit-b")];
        let open = |m| ImageDriver::open(m, Some(limit.clone()), Arc::new(|| {})).unwrap();
        let disks = [open(&media[0]), open(&media[1])];
        let done = Arc::new(AtomicU32::new(0));
        let submit = |number: usize, op| {
            let done = done.clone();
            let count = move |result: Result<_, _>| {
                assert!(Result::is_ok(&result));
                done.fetch_add(1, Ordering::SeqCst);
            };
            disks[number % 2].submit(op, Box::new(count));
        };
        // How many have been done once the queues have nothing to do.
        let settled = || {
            disks.iter().for_each(|disk| disk.queue.drain());
            done.load(Ordering::SeqCst)
        };
        for number in 0..40 {
            submit(number, BlockOp::Write { offset: number as u64 * 65536, buffer: vec![1; 65536] });
        }
        // A tenth of a second's share is there at the start, and the request that exhausts it passes whole.
        assert_eq!(settled(), 2);
        // What moves nothing does not wait.
        submit(0, BlockOp::Flush);
        assert_eq!(settled(), 3);
        for _ in 0..1000 {
            timers.clock().advance(1_000_000);
            timers.fire_due();
        }
        assert!((18..=20).contains(&settled()), "{}", settled());
        limits.set("slow", 0);
        timers.fire_due();
        assert_eq!(settled(), 41);
        limits.set("slow", 1);
        (0..4).for_each(|number| submit(number, BlockOp::Read { offset: 0, buffer: vec![0; 1 << 20] }));
        assert!(settled() < 45);
        disks.iter().for_each(|disk| disk.settle().unwrap());
        assert_eq!(settled(), 45);
        media.iter().for_each(|medium| std::fs::remove_file(&medium.path).unwrap());
    }

    #[test]
    fn requests_to_an_encrypted_disk_wait_for_its_password_and_then_are_carried_out() {
        let mut medium = new_disk("gate");
        let path = medium.path.clone();
        let dek = vd::Dek::random(vd::Algorithm::AesXts128).unwrap();
        let store = KeyStore::create(&dek, "open").unwrap();
        medium.encryption = Some(Encryption { key_id: "id".into(), key_store: store.encode() });
        let told = Arc::new(AtomicU32::new(0));
        let count = told.clone();
        let driver = ImageDriver::open(
            &medium,
            None,
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
