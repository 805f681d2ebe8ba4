//! The guest physical address space.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use arc_swap::ArcSwap;
use cpum::{ForcedActions, VcpuLink};
use parking_lot::{Mutex, RwLock};
use vbox_types::{GuestPhys, VcpuId};

use crate::memory::{CodeWrites, HostMemory, PAGE_SIZE};

/// A20 masked: address bit 20 reads as zero.
const A20_BIT: u64 = 1 << 20;

/// Why a physical access was refused.
#[derive(Debug, thiserror::Error)]
pub enum PhysError {
    #[error("no memory at guest physical address {0}")]
    NotMemory(GuestPhys),
    #[error("guest physical range at {0} of {1} bytes is not aligned to pages")]
    Unaligned(GuestPhys, u64),
}

/// A device's memory-mapped registers. Called on a vCPU's thread with no lock of PGM held.
pub trait MmioHandler: Send + Sync {
    /// Fills `data` from `offset` bytes into the region. `data` has 1 to 8 bytes, and does not reach past the region.
    fn mmio_read(&self, vcpu: VcpuId, offset: u64, data: &mut [u8]);
    /// Takes `data` at `offset` bytes into the region.
    fn mmio_write(&self, vcpu: VcpuId, offset: u64, data: &[u8]);
}

/// What an access reaches.
#[derive(Clone)]
pub enum Target {
    /// Host memory, from `offset` on.
    Memory { memory: Arc<HostMemory>, offset: u64 },
    /// Device registers; `offset` is the offset into the device's region.
    Mmio { handler: Arc<dyn MmioHandler>, offset: u64 },
    /// Nothing: reads give ones, writes are lost.
    Open,
}

impl Target {
    fn advance(&self, by: u64) -> Self {
        match self {
            Self::Memory { memory, offset } => Self::Memory { memory: memory.clone(), offset: offset + by },
            Self::Mmio { handler, offset } => Self::Mmio { handler: handler.clone(), offset: offset + by },
            Self::Open => Self::Open,
        }
    }
}

/// What lies in a mapped range.
#[derive(Clone)]
pub struct Backing {
    pub read: Target,
    pub write: Target,
    /// Writes to registers here may be held back and reach them together ([`Backing::posted`]).
    pub posted: bool,
}

impl Backing {
    /// Memory that is read and written.
    pub fn ram(memory: Arc<HostMemory>, offset: u64) -> Self {
        let target = Target::Memory { memory, offset };
        Self { read: target.clone(), write: target, posted: false }
    }

    /// Memory that is read; writes are lost.
    pub fn rom(memory: Arc<HostMemory>, offset: u64) -> Self {
        Self { read: Target::Memory { memory, offset }, write: Target::Open, posted: false }
    }

    /// Device registers.
    pub fn mmio(handler: Arc<dyn MmioHandler>) -> Self {
        let target = Target::Mmio { handler, offset: 0 };
        Self { read: target.clone(), write: target, posted: false }
    }

    /// Registers that writes do nothing to but change what is read later, from here or by other ways (video memory behind planes): an engine
    /// may hold writes back, in their order, until a vCPU does anything else that reaches a device, and then make them in any vCPU's name. Who
    /// looks from outside calls [`Pgm::take_posted`] first.
    pub fn posted(handler: Arc<dyn MmioHandler>) -> Self {
        Self { posted: true, ..Self::mmio(handler) }
    }
}

/// What an engine knows of the guest's doings that has not shown in memory and devices.
pub trait Backlog: Send + Sync {
    /// Makes the writes that were held back.
    fn take_posted(&self, pgm: &Pgm);
    /// Marks the pages of `memory` dirty that guest code has written since the last call; after the first, all that it may have written
    /// before. From then on writes are watched, which costs the guest something.
    fn collect_dirty(&self, memory: &HostMemory);
    /// Nobody asks for dirty pages of `memory` for now.
    fn forget_dirty(&self, memory: &HostMemory);
}

/// Which mapping wins where several overlap: the later in this list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    /// RAM.
    Ram,
    /// ROM at fixed places.
    Rom,
    /// Base address registers of PCI functions.
    PciBar,
    /// Windows the chipset decides on: VGA, shadowed ROM areas (PAM).
    Chipset,
    /// I/O APIC, HPET, local APIC, TPM: always on top.
    Fixed,
}

/// Names a mapping, to move or remove it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MapHandle(u64);

struct Mapping {
    id: u64,
    start: u64,
    len: u64,
    layer: Layer,
    backing: Backing,
}

/// A stretch of address space with one backing.
#[derive(Clone)]
struct Piece {
    start: u64,
    /// First address past the piece.
    end: u64,
    backing: Backing,
}

/// What a page holds, for engines to cache. Pages not wholly covered by one backing are given as the piece that
/// covers the asked-for address; `len` says how far it reaches.
#[derive(Clone)]
pub struct PageView {
    pub read: Target,
    pub write: Target,
    /// Bytes from the asked-for address to the end of the piece.
    pub len: u64,
}

/// The whole space at one moment, for an engine that has the host's hypervisor map it.
#[derive(Clone)]
pub struct Layout(Arc<Vec<Piece>>);

impl Layout {
    /// Whether nothing was mapped, moved or removed between the two.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The mapped ranges in ascending order: first address, length, backing.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestPhys, u64, &Backing)> {
        self.0.iter().map(|p| (GuestPhys(p.start), p.end - p.start, &p.backing))
    }
}

/// The guest physical address space of one VM.
pub struct Pgm {
    mappings: Mutex<Mappings>,
    pieces: ArcSwap<Vec<Piece>>,
    a20: AtomicBool,
    epoch: AtomicU64,
    links: Vec<Arc<VcpuLink>>,
    /// The engine's, if it has one.
    backlog: RwLock<Option<Weak<dyn Backlog>>>,
}

#[derive(Default)]
struct Mappings {
    list: Vec<Mapping>,
    next_id: u64,
}

impl Pgm {
    /// An empty space whose translations are cached by the vCPUs behind `links`, in order of their ids.
    pub fn new(links: Vec<Arc<VcpuLink>>) -> Arc<Self> {
        CodeWrites::get().kick(&links);
        Arc::new(Self {
            mappings: Mutex::default(),
            pieces: ArcSwap::from_pointee(Vec::new()),
            a20: AtomicBool::new(true),
            epoch: AtomicU64::new(0),
            links,
            backlog: RwLock::new(None),
        })
    }

    /// Lays `backing` over `len` bytes from `start` on. Ranges are cut at 2^64.
    pub fn map(&self, start: GuestPhys, len: u64, layer: Layer, backing: Backing) -> MapHandle {
        let mut mappings = self.mappings.lock();
        let id = mappings.next_id;
        mappings.next_id += 1;
        mappings.list.push(Mapping { id, start: start.0, len, layer, backing });
        self.publish(&mappings);
        drop(mappings);
        self.shoot_down_all();
        MapHandle(id)
    }

    /// Takes a mapping away.
    pub fn unmap(&self, handle: MapHandle) {
        let mut mappings = self.mappings.lock();
        mappings.list.retain(|m| m.id != handle.0);
        self.publish(&mappings);
        drop(mappings);
        self.shoot_down_all();
    }

    /// Replaces what a mapping shows, keeping its place (shadowed ROM areas, VGA banks).
    pub fn set_backing(&self, handle: MapHandle, backing: Backing) {
        let mut mappings = self.mappings.lock();
        if let Some(mapping) = mappings.list.iter_mut().find(|m| m.id == handle.0) {
            mapping.backing = backing;
        }
        self.publish(&mappings);
        drop(mappings);
        self.shoot_down_all();
    }

    fn publish(&self, mappings: &Mappings) {
        let mut cuts: Vec<u64> = Vec::with_capacity(mappings.list.len() * 2);
        for m in &mappings.list {
            if m.len > 0 {
                cuts.push(m.start);
                cuts.push(m.start.saturating_add(m.len));
            }
        }
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces = Vec::new();
        for pair in cuts.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let top = mappings
                .list
                .iter()
                .filter(|m| m.start <= start && end <= m.start.saturating_add(m.len))
                .max_by_key(|m| (m.layer, m.id));
            if let Some(m) = top {
                let by = start - m.start;
                let Backing { read, write, posted } = &m.backing;
                let backing = Backing { read: read.advance(by), write: write.advance(by), posted: *posted };
                pieces.push(Piece { start, end, backing });
            }
        }
        self.pieces.store(Arc::new(pieces));
    }

    /// What is mapped now, without the A20 gate.
    pub fn layout(&self) -> Layout {
        Layout(self.pieces.load_full())
    }

    /// Opens or closes the A20 gate.
    pub fn set_a20(&self, enabled: bool) {
        if self.a20.swap(enabled, Ordering::SeqCst) != enabled {
            self.shoot_down_all();
        }
    }

    pub fn a20(&self) -> bool {
        self.a20.load(Ordering::SeqCst)
    }

    /// The address on the bus, with the A20 gate applied.
    pub fn bus_address(&self, address: GuestPhys) -> GuestPhys {
        if self.a20() { address } else { GuestPhys(address.0 & !A20_BIT) }
    }

    /// What `address` reaches for reads and for writes. The A20 gate is applied: it is the CPU's view.
    pub fn resolve(&self, address: GuestPhys) -> PageView {
        self.resolve_bus(self.bus_address(address))
    }

    /// As [`Pgm::resolve`], for bus masters, which the gate does not concern.
    fn resolve_bus(&self, address: GuestPhys) -> PageView {
        let pieces = self.pieces.load();
        let index = pieces.partition_point(|p| p.end <= address.0);
        match pieces.get(index) {
            Some(p) if p.start <= address.0 => {
                let by = address.0 - p.start;
                PageView {
                    read: p.backing.read.advance(by),
                    write: p.backing.write.advance(by),
                    len: p.end - address.0,
                }
            }
            next => PageView {
                read: Target::Open,
                write: Target::Open,
                len: next.map_or(u64::MAX, |p| p.start) - address.0,
            },
        }
    }

    /// Reads as a bus master does: memory where there is memory, ones elsewhere (device registers are not reached).
    pub fn read(&self, address: GuestPhys, out: &mut [u8]) {
        self.chunks(address, out.len(), |view, range| {
            let out = &mut out[range];
            match &view.read {
                Target::Memory { memory, offset } if memory.read(*offset, out) => {}
                _ => out.fill(0xff),
            }
        });
    }

    /// Writes as a bus master does; what hits no memory is lost.
    pub fn write(&self, address: GuestPhys, data: &[u8]) {
        self.chunks(address, data.len(), |view, range| {
            if let Target::Memory { memory, offset } = &view.write {
                memory.write(*offset, &data[range]);
            }
        });
    }

    fn chunks(&self, address: GuestPhys, len: usize, mut each: impl FnMut(PageView, std::ops::Range<usize>)) {
        let mut done = 0;
        while done < len {
            let view = self.resolve_bus(address.wrapping_add(done as u64));
            let count = view.len.clamp(1, (len - done) as u64) as usize;
            each(view, done..done + count);
            done += count;
        }
    }

    /// The memory and offset behind `address`, if reads reach memory.
    pub fn memory_at(&self, address: GuestPhys) -> Option<(Arc<HostMemory>, u64)> {
        match self.resolve(address).read {
            Target::Memory { memory, offset } => Some((memory, offset)),
            _ => None,
        }
    }

    /// Introduces what an engine keeps to itself, until it is dropped.
    pub fn set_backlog(&self, backlog: Weak<dyn Backlog>) {
        *self.backlog.write() = Some(backlog);
    }

    fn backlog(&self) -> Option<Arc<dyn Backlog>> {
        self.backlog.read().as_ref()?.upgrade()
    }

    /// Has registers take the writes that an engine has held back for them. Not to be called with a device's lock held.
    pub fn take_posted(&self) {
        if let Some(backlog) = self.backlog() {
            backlog.take_posted(self);
        }
    }

    /// Nobody will call [`Pgm::take_dirty`] for `memory` for now.
    pub fn forget_dirty(&self, memory: &HostMemory) {
        if let Some(backlog) = self.backlog() {
            backlog.forget_dirty(memory);
        }
    }

    /// Returns and clears `memory`'s dirty pages (one bit each), after dropping writable translations so that later
    /// writes are seen again. Not to be called with a lock held that a vCPU may want.
    pub fn take_dirty(&self, initiator: Option<VcpuId>, memory: &HostMemory) -> Vec<u64> {
        if let Some(backlog) = self.backlog() {
            backlog.collect_dirty(memory);
        }
        let bits = memory.take_dirty();
        if bits.iter().any(|&word| word != 0) {
            self.shoot_down(initiator);
        }
        bits
    }

    /// The number of shoot-downs so far. A vCPU whose cached translations are younger than the latest one is clean.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Asks every vCPU to drop its translations, without waiting: each does before its next block of guest code. Good for map
    /// changes, where the vCPU that made the change flushes at the end of its instruction.
    pub fn shoot_down_all(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        for link in &self.links {
            link.raise(ForcedActions::TLB_FLUSH);
        }
    }

    /// Makes every vCPU but `initiator` drop its cached translations, and waits until none can use an old one.
    /// `initiator`, the calling vCPU if it is one, counts as outside guest code meanwhile and must look at its own pending
    /// actions before it uses a cached translation again.
    pub fn shoot_down(&self, initiator: Option<VcpuId>) {
        let mut busy = Vec::new();
        let own = initiator.and_then(|id| self.links.get(id.index()));
        let was_in_guest = own.is_some_and(|link| link.is_in_guest());
        if let Some(own) = own {
            own.leave_guest();
        }
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        for (index, link) in self.links.iter().enumerate() {
            if initiator.is_some_and(|id| id.index() == index) {
                continue;
            }
            link.raise(ForcedActions::TLB_FLUSH);
            busy.push(link);
        }
        let mut spins = 0u32;
        for link in busy {
            while link.is_in_guest() && link.flushed_epoch() < epoch {
                spins += 1;
                if spins.is_multiple_of(64) {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
        }
        if was_in_guest && let Some(own) = own {
            own.enter_guest();
        }
    }

    /// Copies `data` into memory for firmware loading and tests; an error if a byte of it would be lost.
    pub fn load(&self, address: GuestPhys, data: &[u8]) -> Result<(), PhysError> {
        let mut result = Ok(());
        self.chunks(address, data.len(), |view, range| match &view.write {
            Target::Memory { memory, offset } => {
                memory.write(*offset, &data[range]);
            }
            _ => result = Err(PhysError::NotMemory(address.wrapping_add(range.start as u64))),
        });
        result
    }

    /// Checks that a range can be mapped page by page.
    pub fn check_aligned(start: GuestPhys, len: u64) -> Result<(), PhysError> {
        if start.0.is_multiple_of(PAGE_SIZE) && len.is_multiple_of(PAGE_SIZE) {
            Ok(())
        } else {
            Err(PhysError::Unaligned(start, len))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vbox_types::ByteSize;

    fn memory(fill: u8) -> Arc<HostMemory> {
        let mem = Arc::new(HostMemory::new("test", ByteSize(2 * PAGE_SIZE)).unwrap());
        mem.write(0, &vec![fill; 2 * PAGE_SIZE as usize]);
        mem
    }

    fn byte(pgm: &Pgm, at: u64) -> u8 {
        let mut b = [0];
        pgm.read(GuestPhys(at), &mut b);
        b[0]
    }

    #[test]
    fn the_upper_layer_hides_the_lower_until_it_goes() {
        let pgm = Pgm::new(vec![]);
        pgm.map(GuestPhys(0), 0x2000, Layer::Ram, Backing::ram(memory(1), 0));
        let bar = pgm.map(GuestPhys(0x800), 0x1000, Layer::PciBar, Backing::ram(memory(2), 0));
        assert_eq!(
            [byte(&pgm, 0x7ff), byte(&pgm, 0x800), byte(&pgm, 0x17ff), byte(&pgm, 0x1800)],
            [1, 2, 2, 1]
        );
        pgm.unmap(bar);
        assert_eq!(byte(&pgm, 0x800), 1);
    }

    #[test]
    fn rom_keeps_what_it_holds_and_unmapped_space_reads_ones() {
        let pgm = Pgm::new(vec![]);
        pgm.map(GuestPhys(0x1000), 0x1000, Layer::Rom, Backing::rom(memory(3), 0));
        pgm.write(GuestPhys(0x1000), &[9]);
        assert_eq!(byte(&pgm, 0x1000), 3);
        assert_eq!(byte(&pgm, 0x5000), 0xff);
        assert!(pgm.load(GuestPhys(0x1000), &[9]).is_err());
    }

    #[test]
    fn a_copy_runs_across_pieces() {
        let pgm = Pgm::new(vec![]);
        pgm.map(GuestPhys(0), 0x1000, Layer::Ram, Backing::ram(memory(1), 0));
        pgm.map(GuestPhys(0x1000), 0x1000, Layer::Ram, Backing::ram(memory(2), 0));
        let mut out = [0; 4];
        pgm.read(GuestPhys(0xffe), &mut out);
        assert_eq!(out, [1, 1, 2, 2]);
    }

    #[test]
    fn a_closed_a20_gate_wraps_the_second_megabyte() {
        let pgm = Pgm::new(vec![]);
        pgm.map(GuestPhys(0), 0x1000, Layer::Ram, Backing::ram(memory(7), 0));
        pgm.set_a20(false);
        assert!(matches!(pgm.resolve(GuestPhys(0x10_0000)).read, Target::Memory { .. }));
        pgm.set_a20(true);
        assert!(matches!(pgm.resolve(GuestPhys(0x10_0000)).read, Target::Open));
    }

    #[test]
    fn pages_and_writes_that_an_engine_keeps_to_itself_come_when_they_are_asked_for() {
        #[derive(Default)]
        struct Engine(Mutex<Vec<&'static str>>);
        impl Backlog for Engine {
            fn take_posted(&self, pgm: &Pgm) {
                pgm.write(GuestPhys(0), &[7]);
                self.0.lock().push("posted");
            }
            fn collect_dirty(&self, memory: &HostMemory) {
                memory.mark_dirty(1);
                self.0.lock().push("dirty");
            }
            fn forget_dirty(&self, _: &HostMemory) {
                self.0.lock().push("forget");
            }
        }
        let pgm = Pgm::new(vec![]);
        let mem = memory(0);
        pgm.map(GuestPhys(0), 0x2000, Layer::Ram, Backing::ram(mem.clone(), 0));
        mem.take_dirty();
        let engine = Arc::new(Engine::default());
        let shown: Weak<dyn Backlog> = Arc::downgrade(&(engine.clone() as Arc<dyn Backlog>));
        pgm.set_backlog(shown);
        assert_eq!(pgm.take_dirty(None, &mem), [0b10]);
        pgm.take_posted();
        assert_eq!(byte(&pgm, 0), 7);
        assert_eq!(pgm.take_dirty(None, &mem), [0b11]);
        pgm.forget_dirty(&mem);
        assert_eq!(*engine.0.lock(), ["dirty", "posted", "dirty", "forget"]);
        drop(engine);
        pgm.take_posted();
        assert_eq!(pgm.take_dirty(None, &mem), [0]);
    }

    #[test]
    fn a_shoot_down_waits_for_a_running_vcpu() {
        let link = Arc::new(VcpuLink::default());
        let pgm = Pgm::new(vec![link.clone()]);
        link.enter_guest();
        let worker = std::thread::spawn({
            let (link, pgm) = (link.clone(), pgm.clone());
            move || {
                while !link.pending().contains(ForcedActions::TLB_FLUSH) {
                    std::thread::yield_now();
                }
                link.take(ForcedActions::TLB_FLUSH);
                link.acknowledge_flush(pgm.epoch());
            }
        });
        pgm.shoot_down(None);
        assert_eq!(link.flushed_epoch(), 1);
        worker.join().unwrap();
    }
}
