//! The wire between a card and its network: it records what passes (`--nic-trace`), limits what the guest sends
//! (`--nic-bandwidth-group`), and keeps frames for others from the card (`--nic-promisc deny`).
//!
//! As with VirtualBox, bandwidth groups concern sending alone, the limit may be shared by several cards, and a card's address is the
//! one it last sent from.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use anyhow::{Context, Result};
use parking_lot::Mutex;
use pdm::connector::{NetDriver, NetPort};

use crate::limit::{Limit, Limits, Waiter};

/// Longest part of a frame that is recorded.
const SNAP_LEN: u32 = 0xffff;

/// A recording in the format of libpcap (`pcap-savefile(5)`), microseconds, Ethernet.
struct Trace {
    path: PathBuf,
    file: File,
}

impl Trace {
    fn create(path: &Path) -> Result<Self> {
        let record = || {
            let mut file = File::create(path)?;
            let mut header = Vec::new();
            header.extend(0xa1b2_c3d4u32.to_le_bytes());
            header.extend(2u16.to_le_bytes());
            header.extend(4u16.to_le_bytes());
            [0u32, 0, SNAP_LEN, 1].iter().for_each(|word| header.extend(word.to_le_bytes()));
            file.write_all(&header)?;
            std::io::Result::Ok(file)
        };
        let file = record().with_context(|| format!("cannot write the trace file \"{}\"", path.display()))?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn record(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let kept = frame.len().min(SNAP_LEN as usize);
        let words = [now.as_secs() as u32, now.subsec_micros(), kept as u32, frame.len() as u32];
        let mut record = Vec::with_capacity(16 + kept);
        words.iter().for_each(|word| record.extend(word.to_le_bytes()));
        record.extend_from_slice(&frame[..kept]);
        self.file.write_all(&record)
    }
}

/// What the wire does beside passing frames on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WireConfig {
    /// The file that gets every frame.
    pub trace: Option<PathBuf>,
    /// Name and bytes per second of the bandwidth group.
    pub group: Option<(String, u64)>,
    /// Whether the card may get frames for others.
    pub promiscuous: bool,
}

/// A card's wire.
pub struct Wire {
    port: Arc<dyn NetPort>,
    limits: Arc<Limits>,
    config: Mutex<WireConfig>,
    /// Frames are recorded or limited: the fields below are looked at.
    busy: AtomicBool,
    trace: Mutex<Option<Trace>>,
    limit: Mutex<Option<Arc<Limit>>>,
    promiscuous: AtomicBool,
    /// The card's address, in the lower 48 bits.
    address: AtomicU64,
    /// Frames of the packet that the network is offering, those that the card has taken already left out.
    cut: Mutex<Option<VecDeque<Vec<u8>>>>,
}

fn address(bytes: &[u8; 6]) -> u64 {
    let [a, b, c, d, e, f] = *bytes;
    u64::from_be_bytes([0, 0, a, b, c, d, e, f])
}

impl Wire {
    /// The wire of the card `port` with the address `mac`, without a network at its end.
    pub fn new(
        port: Arc<dyn NetPort>,
        mac: [u8; 6],
        config: &WireConfig,
        limits: &Arc<Limits>,
    ) -> Result<Arc<Self>> {
        let wire = Arc::new(Self {
            port,
            limits: limits.clone(),
            config: Mutex::default(),
            busy: AtomicBool::new(false),
            trace: Mutex::default(),
            limit: Mutex::default(),
            promiscuous: AtomicBool::new(false),
            address: AtomicU64::new(address(&mac)),
            cut: Mutex::default(),
        });
        wire.change(config)?;
        Ok(wire)
    }

    /// Takes over another configuration.
    pub fn change(&self, new: &WireConfig) -> Result<()> {
        let mut config = self.config.lock();
        if config.trace != new.trace {
            let trace = new.trace.as_deref().map(Trace::create).transpose()?;
            *self.trace.lock() = trace;
        }
        let limit = new.group.as_ref().map(|(name, rate)| self.limits.set(name, *rate));
        self.busy.store(new.trace.is_some() || limit.is_some(), Ordering::Release);
        *self.limit.lock() = limit;
        self.promiscuous.store(new.promiscuous, Ordering::Relaxed);
        *config = new.clone();
        Ok(())
    }

    /// The network as the card sees it: `driver`, at the other end of the wire.
    pub fn driver(self: &Arc<Self>, driver: Arc<dyn NetDriver>) -> Arc<dyn NetDriver> {
        // What another network was offering is gone.
        *self.cut.lock() = None;
        let waiter: Arc<dyn Waiter> = self.clone();
        Arc::new(Outlet { wire: self.clone(), waiter: Arc::downgrade(&waiter), driver })
    }

    fn is_for_others(&self, frame: &[u8]) -> bool {
        !self.promiscuous.load(Ordering::Relaxed)
            && frame
                .first_chunk::<6>()
                .is_some_and(|dst| dst[0] & 1 == 0 && address(dst) != self.address.load(Ordering::Relaxed))
    }

    fn record(&self, frame: &[u8]) {
        let mut trace = self.trace.lock();
        if let Some(Err(error)) = trace.as_mut().map(|trace| trace.record(frame))
            && let Some(trace) = trace.take()
        {
            tracing::warn!(target: "net", "the trace file \"{}\" ends here: {error}", trace.path.display());
        }
    }
}

impl NetPort for Wire {
    fn receive(&self, frame: &[u8]) -> bool {
        if self.is_for_others(frame) {
            return true;
        }
        let taken = self.port.receive(frame);
        if taken && self.busy.load(Ordering::Acquire) {
            self.record(frame);
        }
        taken
    }

    fn takes_packets(&self) -> bool {
        true
    }

    /// Cuts the packet for a card that takes none. One that the card refuses in the middle is offered again, and goes on where it was.
    fn receive_packet(&self, packet: &[u8], mss: u16) -> bool {
        let mut cut = self.cut.lock();
        if cut.is_none() && self.port.takes_packets() {
            if self.is_for_others(packet) {
                return true;
            }
            let taken = self.port.receive_packet(packet, mss);
            if taken && self.busy.load(Ordering::Acquire) {
                self.record(packet);
            }
            return taken;
        }
        let frames =
            cut.get_or_insert_with(|| ether::offload::frames(packet, mss).unwrap_or_default().into());
        while let Some(frame) = frames.front() {
            if !self.receive(frame) {
                return false;
            }
            frames.pop_front();
        }
        *cut = None;
        true
    }

    fn ready(&self) {
        self.port.ready();
    }

    fn set_link(&self, up: bool) {
        self.port.set_link(up);
    }
}

impl Waiter for Wire {
    fn go_on(&self) {
        self.port.ready();
    }
}

/// The card's end of the wire.
struct Outlet {
    wire: Arc<Wire>,
    waiter: Weak<dyn Waiter>,
    driver: Arc<dyn NetDriver>,
}

impl NetDriver for Outlet {
    fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
        let wire = &self.wire;
        if let Some(src) = frame.get(6..).and_then(<[u8]>::first_chunk::<6>) {
            wire.address.store(address(src), Ordering::Relaxed);
        }
        if !wire.busy.load(Ordering::Acquire) {
            return self.driver.send(frame);
        }
        let limit = wire.limit.lock().clone();
        if limit.as_ref().is_some_and(|limit| !limit.is_open(&self.waiter)) {
            return Err(frame);
        }
        let len = frame.len();
        let copy = wire.trace.lock().is_some().then(|| frame.clone());
        self.driver.send(frame)?;
        if let Some(limit) = limit {
            limit.charge(len);
        }
        if let Some(frame) = copy {
            wire.record(&frame);
        }
        Ok(())
    }

    fn resume(&self) {
        self.driver.resume();
    }

    fn takes_packets(&self) -> bool {
        self.driver.takes_packets()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tm::{Clock, TimerQueue};

    const SECOND: u64 = 1_000_000_000;

    const MAC: [u8; 6] = [8, 0, 0x27, 1, 2, 3];

    #[derive(Default)]
    struct Ends {
        sent: Mutex<Vec<Vec<u8>>>,
        received: AtomicU64,
        ready: AtomicU64,
        /// Frames that are refused before one is taken again.
        refusals: AtomicU64,
        whole: AtomicBool,
    }

    impl NetPort for Ends {
        fn receive(&self, _frame: &[u8]) -> bool {
            let refuse = |left: u64| left.checked_sub(1);
            if self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refuse).is_ok() {
                return false;
            }
            self.received.fetch_add(1, Ordering::Relaxed);
            true
        }
        fn takes_packets(&self) -> bool {
            self.whole.load(Ordering::Relaxed)
        }
        fn ready(&self) {
            self.ready.fetch_add(1, Ordering::Relaxed);
        }
        fn set_link(&self, _up: bool) {}
    }

    impl NetDriver for Ends {
        fn send(&self, frame: Vec<u8>) -> Result<(), Vec<u8>> {
            self.sent.lock().push(frame);
            Ok(())
        }
        fn resume(&self) {}
    }

    fn frame(dst: [u8; 6], src: [u8; 6], len: usize) -> Vec<u8> {
        let mut frame = [dst, src].concat();
        frame.resize(len, 7);
        frame
    }

    struct Bench {
        ends: Arc<Ends>,
        wire: Arc<Wire>,
        driver: Arc<dyn NetDriver>,
        timers: Arc<TimerQueue>,
    }

    fn bench(config: &WireConfig) -> Bench {
        let ends = Arc::new(Ends::default());
        let timers = TimerQueue::new(Clock::manual());
        let wire = Wire::new(ends.clone(), MAC, config, &Limits::new(&timers)).unwrap();
        let driver = wire.driver(ends.clone());
        Bench { ends, wire, driver, timers }
    }

    #[test]
    fn a_group_lets_its_rate_pass_on_average() {
        let rate = 1_000_000;
        let bench = bench(&WireConfig { group: Some(("g".into(), rate)), ..WireConfig::default() });
        // Ten seconds, always with something to send.
        let mut bytes = 0;
        for _ in 0..10_000 {
            while bench.driver.send(frame([0xff; 6], MAC, 1000)).is_ok() {
                bytes += 1000;
            }
            bench.timers.clock().advance(SECOND / 1000);
            bench.timers.fire_due();
        }
        let expected = 10 * rate + rate / 10;
        assert!((expected - 2000..=expected + 2000).contains(&bytes), "{bytes} bytes");
        assert!(bench.ends.ready.load(Ordering::Relaxed) > 1000);
        // Without a limit nothing waits.
        bench.wire.change(&WireConfig { group: Some(("g".into(), 0)), ..WireConfig::default() }).unwrap();
        assert!((0..1000).all(|_| bench.driver.send(frame([0xff; 6], MAC, 1000)).is_ok()));
    }

    #[test]
    fn frames_for_others_are_kept_from_the_card_unless_it_may_have_them() {
        let bench = bench(&WireConfig::default());
        let count = |dst| {
            let before = bench.ends.received.load(Ordering::Relaxed);
            assert!(bench.wire.receive(&frame(dst, [2; 6], 60)));
            bench.ends.received.load(Ordering::Relaxed) - before
        };
        assert_eq!((count(MAC), count([0xff; 6]), count([1, 0, 0x5e, 0, 0, 1]), count([4; 6])), (1, 1, 1, 0));
        // The address is the one that the card sends from.
        bench.driver.send(frame([0xff; 6], [4; 6], 60)).unwrap();
        assert_eq!((count(MAC), count([4; 6])), (0, 1));
        bench.wire.change(&WireConfig { promiscuous: true, ..WireConfig::default() }).unwrap();
        assert_eq!((count(MAC), count([4; 6])), (1, 1));
    }

    #[test]
    fn packets_are_cut_for_cards_that_take_frames_and_go_on_where_they_were_refused() {
        let bench = bench(&WireConfig::default());
        let mut packet = frame(MAC, [2; 6], 54);
        packet.splice(12..54, [0x08, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0]);
        packet.resize(54 + 5000, 7);
        packet[46] = 5 << 4;
        let received = || bench.ends.received.load(Ordering::Relaxed);
        bench.ends.refusals.store(1, Ordering::Relaxed);
        assert!(!bench.wire.receive_packet(&packet, 1460));
        assert!(bench.wire.receive_packet(&packet, 1460));
        assert_eq!(received(), 4);
        bench.ends.whole.store(true, Ordering::Relaxed);
        assert!(bench.wire.receive_packet(&packet, 1460));
        assert_eq!(received(), 5);
    }

    #[test]
    fn a_trace_has_a_header_and_every_frame() {
        let folder = std::env::temp_dir().join(format!("boxwood-trace-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("nic.pcap");
        let bench = bench(&WireConfig { trace: Some(path.clone()), ..WireConfig::default() });
        bench.driver.send(frame([0xff; 6], MAC, 60)).unwrap();
        assert!(bench.wire.receive(&frame(MAC, [2; 6], 100)));
        bench.wire.change(&WireConfig::default()).unwrap();
        assert!(bench.wire.receive(&frame(MAC, [2; 6], 100)));
        let bytes = std::fs::read(&path).unwrap();
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4), word(16), word(20)), (0xa1b2_c3d4, 0x0004_0002, SNAP_LEN, 1));
        assert_eq!((word(32), word(36)), (60, 60));
        assert_eq!(bytes[40..100], frame([0xff; 6], MAC, 60));
        assert_eq!((word(108), bytes.len()), (100, 24 + 16 + 60 + 16 + 100));
        std::fs::remove_dir_all(&folder).unwrap();
        let missing = WireConfig { trace: Some(path), ..WireConfig::default() };
        assert!(bench.wire.change(&missing).unwrap_err().to_string().contains("nic.pcap"));
    }
}
