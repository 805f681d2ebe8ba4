//! The software TLB and the frames of host memory it points into.
//!
//! An entry holds one tag for each kind of access and the distance from guest linear to host address:
//!
//! ```text
//! entry = bank[(linear >> 12) & 1023]
//! linear ^ entry.read  <=  4096 - size     hit: page, permission and no page crossing in one compare
//! host address = linear + entry.delta
//! ```
//!
//! A tag that must not match holds the page number of a neighbouring index, which is never looked up here. Pages that need more
//! than a copy (device registers, pages with decoded code for writes, ROM for writes) get no tag and are served by the slow path.
//!
//! There is one bank of entries for each class of privilege ([`Bank`]); one of them is never filled, for times at which each
//! access must be looked at.
#![allow(unsafe_code)] // guest memory is reached by host pointers; only this module dereferences them

use std::alloc::Layout;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

use pgm::HostMemory;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::flags::Int;

/// Entries in a bank.
pub const ENTRIES: usize = 1024;
const PAGE: u64 = 0xfff;

/// The privilege that translations are kept for, as offset of the bank's first entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Bank {
    /// Supervisor, with SMAP in force if it is on.
    Supervisor = 0,
    User = ENTRIES,
    /// Supervisor with SMAP overridden by RFLAGS.AC.
    Override = 2 * ENTRIES,
    /// Never holds anything: each access takes the slow path.
    Slow = 3 * ENTRIES,
}

/// One translation. Generated code reads entries too.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Entry {
    pub read: u64,
    pub write: u64,
    pub exec: u64,
    /// What to add to a linear address in the page for the host address, modulo 2^64.
    pub delta: u64,
}

/// Bytes in front of the entries that belong to an engine which generates code: it reaches both from one base register.
pub const ENGINE_BYTES: usize = 4096 + (7 << 20);

/// What generated code works on.
#[repr(C, align(4096))]
struct Area {
    engine: [u8; ENGINE_BYTES],
    entries: [Entry; 4 * ENTRIES],
}

/// The area's place in memory, which never changes.
struct AreaBox(NonNull<Area>);

// SAFETY: the allocation belongs to this object alone.
unsafe impl Send for AreaBox {}

impl AreaBox {
    fn new() -> Self {
        // SAFETY: fresh private memory at an address of the kernel's choice; zeros are valid for the area's integers. What no
        // engine touches costs no memory.
        let area = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                size_of::<Area>(),
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        match area.ok().and_then(|area| NonNull::new(area.cast::<Area>())) {
            Some(area) => Self(area),
            None => std::alloc::handle_alloc_error(Layout::new::<Area>()),
        }
    }

    #[inline(always)]
    fn entries(&self) -> &[Entry; 4 * ENTRIES] {
        // SAFETY: the area lives as long as `self`; generated code runs only while its engine borrows the `Tlb` mutably.
        unsafe { &(*self.0.as_ptr()).entries }
    }

    #[inline(always)]
    fn entries_mut(&mut self) -> &mut [Entry; 4 * ENTRIES] {
        // SAFETY: as above.
        unsafe { &mut (*self.0.as_ptr()).entries }
    }
}

impl Drop for AreaBox {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `new` mapped.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), size_of::<Area>()) };
    }
}

/// A tag that matches no address looked up at `index`.
const fn no_tag(index: usize) -> u64 {
    ((index as u64 & (ENTRIES as u64 - 1)) ^ 1) << 12
}

/// A whole page of host memory behind a guest page. It is valid while the [`Frames`] that gave it keeps the memory.
#[derive(Clone, Copy, Debug)]
pub struct Frame {
    /// Host address of the page's first byte.
    host: u64,
    /// Index into [`Frames::memories`].
    memory: u32,
    /// Page number within the memory.
    page: u32,
    /// Writes reach the same bytes.
    pub writable: bool,
}

impl Frame {
    /// A number that names the host page, the same for all its guest addresses.
    pub fn key(self) -> u64 {
        self.host
    }
}

/// The memories that frames lie in, kept alive, and a cache of physical pages.
pub struct Frames {
    memories: Vec<Arc<HostMemory>>,
    cache: Box<[(u64, Option<Frame>)]>,
}

const FRAME_CACHE: usize = 2048;
const NO_PAGE: u64 = u64::MAX;

impl Default for Frames {
    fn default() -> Self {
        Self { memories: Vec::new(), cache: vec![(NO_PAGE, None); FRAME_CACHE].into() }
    }
}

impl Frames {
    /// Forgets all frames and the translations made from them; no copy of a frame may be used any more.
    pub fn clear(&mut self, tlb: &mut Tlb) {
        tlb.flush(false);
        self.cache.fill((NO_PAGE, None));
        self.memories.clear();
    }

    /// The frame at physical page address `physical`, if it is memory all over; `resolve` is asked when it is not known.
    #[inline]
    pub fn frame(&mut self, physical: u64, resolve: impl FnOnce(u64) -> pgm::PageView) -> Option<Frame> {
        let page = physical & !PAGE;
        let slot = (page >> 12) as usize % FRAME_CACHE;
        if self.cache[slot].0 == page {
            return self.cache[slot].1;
        }
        let frame = self.make(&resolve(page));
        self.cache[slot] = (page, frame);
        frame
    }

    fn make(&mut self, view: &pgm::PageView) -> Option<Frame> {
        let pgm::Target::Memory { memory, offset } = &view.read else { return None };
        let whole = view.len > PAGE
            && offset & PAGE == 0
            && offset.checked_add(PAGE + 1).is_some_and(|end| end <= memory.len());
        if !whole {
            return None;
        }
        let writable = matches!(&view.write, pgm::Target::Memory { memory: m, offset: o }
            if Arc::ptr_eq(m, memory) && o == offset);
        let index = self.memories.iter().position(|m| Arc::ptr_eq(m, memory)).unwrap_or_else(|| {
            self.memories.push(memory.clone());
            self.memories.len() - 1
        });
        Some(Frame {
            host: memory.base().expose_provenance() as u64 + offset,
            memory: index as u32,
            page: (offset >> 12) as u32,
            writable,
        })
    }

    /// The memory a frame lies in and its page number there.
    pub fn memory(&self, frame: Frame) -> (&Arc<HostMemory>, u64) {
        (&self.memories[frame.memory as usize], frame.page.into())
    }

    /// The host address of an offset in a page, valid as long as translations to it are.
    pub fn host_address(&self, frame: Frame, offset: u64) -> u64 {
        frame.host + (offset & PAGE)
    }

    /// Whether code was decoded from the frame, so that writes must be noted.
    pub fn has_code(&self, frame: Frame) -> bool {
        let (memory, page) = self.memory(frame);
        memory.code_page(page).is_some_and(|c| c.has_code())
    }

    /// Notes a write of `len` bytes at `offset` in the page, made through a pointer; true if it hit decoded code.
    pub fn note_write(&self, frame: Frame, offset: u64, len: u64) -> bool {
        let (memory, page) = self.memory(frame);
        // The bytes must be visible before the code map is looked at: decoding marks first and reads then.
        fence(Ordering::SeqCst);
        let generation = || memory.code_page(page).map(|c| c.generation());
        let before = generation();
        memory.note_write((page << 12) + offset, len);
        before != generation()
    }

    pub fn read<T: Cell>(&self, frame: Frame, offset: u64) -> T {
        assert!(offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps.
        unsafe { load(frame.host + offset) }
    }

    pub fn write<T: Cell>(&self, frame: Frame, offset: u64, value: T) {
        assert!(frame.writable && offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps, and which may be written.
        unsafe { store(frame.host + offset, value) }
    }

    /// Copies bytes out of a page.
    pub fn read_bytes(&self, frame: Frame, offset: u64, out: &mut [u8]) {
        assert!(offset + out.len() as u64 <= PAGE + 1);
        // SAFETY: as in `read`; `out` is host memory that guests do not share.
        unsafe { std::ptr::copy_nonoverlapping(pointer(frame.host + offset), out.as_mut_ptr(), out.len()) }
    }

    /// Copies bytes into a page. The caller notes the write.
    pub fn write_bytes(&self, frame: Frame, offset: u64, data: &[u8]) {
        assert!(frame.writable && offset + data.len() as u64 <= PAGE + 1);
        // SAFETY: as in `write`; `data` is host memory that guests do not share.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), pointer(frame.host + offset), data.len()) }
    }

    /// Copies `len` bytes between pages, element after element upwards as REP MOVS does where they overlap.
    pub fn copy(&self, to: Frame, to_offset: u64, from: Frame, from_offset: u64, len: u64, element: u64) {
        assert!(to.writable && to_offset + len <= PAGE + 1 && from_offset + len <= PAGE + 1);
        let (dst, src) = (to.host + to_offset, from.host + from_offset);
        if dst.wrapping_sub(src) >= len {
            // SAFETY: both ranges lie in pages that `self` keeps. The destination does not start inside the source, so a
            // copy with memmove semantics equals the ascending one.
            unsafe { std::ptr::copy(pointer(src), pointer(dst), len as usize) }
        } else {
            let mut at = 0;
            while at < len {
                // SAFETY: `at` stays below `len`, a multiple of the element size, so both elements lie inside the ranges.
                unsafe {
                    match element {
                        1 => store(dst + at, load::<u8>(src + at)),
                        2 => store(dst + at, load::<u16>(src + at)),
                        4 => store(dst + at, load::<u32>(src + at)),
                        _ => store(dst + at, load::<u64>(src + at)),
                    }
                }
                at += element;
            }
        }
    }

    /// Fills `count` elements with a value (REP STOS).
    pub fn fill<T: Cell>(&self, frame: Frame, offset: u64, value: T, count: u64) {
        assert!(frame.writable && offset + count * T::BYTES as u64 <= PAGE + 1);
        let at = frame.host + offset;
        if T::BYTES == 1 || value.bytes_equal() {
            // SAFETY: inside the frame's page.
            unsafe { std::ptr::write_bytes(pointer(at), value.low_byte(), count as usize * T::BYTES) }
        } else {
            for i in 0..count {
                // SAFETY: inside the frame's page, as asserted.
                unsafe { store(at + i * T::BYTES as u64, value) }
            }
        }
    }

    /// Atomically replaces `old` by `new` at an offset; otherwise gives what is there.
    pub fn compare_exchange<T: Cell>(&self, frame: Frame, offset: u64, old: T, new: T) -> Result<(), T> {
        assert!(frame.writable && offset + T::BYTES as u64 <= PAGE + 1);
        // SAFETY: inside the frame's page, whose memory `self` keeps, and which may be written.
        unsafe { T::cas(frame.host + offset, old, new) }
    }

    /// As [`Frames::compare_exchange`] for 16 aligned bytes.
    pub fn compare_exchange_16(&self, frame: Frame, offset: u64, old: u128, new: u128) -> Result<(), u128> {
        assert!(frame.writable && offset + 16 <= PAGE + 1 && offset.is_multiple_of(16));
        // SAFETY: inside the frame's page, aligned to 16 bytes.
        unsafe { cas_16(frame.host + offset, old, new) }
    }
}

/// An integer that guest memory holds.
pub trait Cell: Int {
    /// Compares and exchanges at a host address.
    ///
    /// # Safety
    /// The address is valid for reads and writes of the type; it need not be aligned.
    #[doc(hidden)]
    unsafe fn cas(address: u64, old: Self, new: Self) -> Result<(), Self>;

    fn low_byte(self) -> u8 {
        self.to_u64() as u8
    }

    /// All bytes are the same.
    fn bytes_equal(self) -> bool {
        let repeated = u64::from(self.low_byte()).wrapping_mul(0x0101_0101_0101_0101);
        T64::mask(Self::BITS) & repeated == self.to_u64()
    }
}

struct T64;
impl T64 {
    const fn mask(bits: u32) -> u64 {
        u64::MAX >> (64 - bits)
    }
}

macro_rules! cell {
    ($($t:ty, $atomic:ty, $reg:tt, $a:tt, $d:literal;)*) => { $(
        impl Cell for $t {
            #[inline(always)]
            unsafe fn cas(address: u64, old: Self, new: Self) -> Result<(), Self> {
                let p: *mut $t = pointer(address).cast();
                if p.is_aligned() {
                    // SAFETY: valid by the caller's promise, aligned as just checked; guest memory is only reached by copies.
                    let cell = unsafe { <$atomic>::from_ptr(p) };
                    return cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst).map(|_| ());
                }
                let found: $t;
                // SAFETY: valid by the caller's promise. The processor locks operands that are not aligned, too.
                unsafe {
                    std::arch::asm!(
                        concat!("lock cmpxchg [{p}], {new", $d, "}"),
                        p = in(reg) p,
                        new = in($reg) new,
                        inout($a) old => found,
                        options(nostack),
                    );
                }
                if found == old { Ok(()) } else { Err(found) }
            }
        }
    )* };
}
cell! {
    u8, AtomicU8, reg_byte, "al", "";
    u16, AtomicU16, reg, "ax", ":x";
    u32, AtomicU32, reg, "eax", ":e";
    u64, AtomicU64, reg, "rax", ":r";
}

/// # Safety
/// The address is valid for reads and writes of 16 bytes and aligned to 16.
unsafe fn cas_16(address: u64, old: u128, new: u128) -> Result<(), u128> {
    let (mut lo, mut hi) = (old as u64, (old >> 64) as u64);
    // SAFETY: valid and aligned by the caller's promise; rbx is preserved around its use.
    unsafe {
        std::arch::asm!(
            "xchg {b}, rbx",
            "lock cmpxchg16b [{p}]",
            "mov rbx, {b}",
            p = in(reg) address,
            b = inout(reg) new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") lo,
            inout("rdx") hi,
            options(nostack),
        );
    }
    let found = u128::from(hi) << 64 | u128::from(lo);
    if found == old { Ok(()) } else { Err(found) }
}

#[inline(always)]
fn pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// # Safety
/// The address is valid for reads of `T`.
#[inline(always)]
unsafe fn load<T: Copy>(address: u64) -> T {
    // SAFETY: valid by the caller's promise. Volatile: other vCPUs change guest memory at any time, and each guest access is
    // one host access.
    unsafe { std::ptr::read_volatile(pointer(address).cast::<Unaligned<T>>()).0 }
}

/// # Safety
/// The address is valid for writes of `T`.
#[inline(always)]
unsafe fn store<T: Copy>(address: u64, value: T) {
    // SAFETY: as in `load`.
    unsafe { std::ptr::write_volatile(pointer(address).cast::<Unaligned<T>>(), Unaligned(value)) }
}

/// What the hot part of an entry leaves out.
#[derive(Clone, Copy, Default)]
struct Meta {
    live: bool,
    global: bool,
    /// Linear page address.
    page: u64,
}

/// The translations of one vCPU.
pub struct Tlb {
    area: AreaBox,
    meta: Box<[Meta]>,
    /// Indexes of live entries, so that a flush costs what was filled.
    live: Vec<u16>,
    losses: u64,
}

impl Default for Tlb {
    fn default() -> Self {
        let mut area = AreaBox::new();
        for (i, entry) in area.entries_mut().iter_mut().enumerate() {
            *entry = Entry::none(i);
        }
        Self { area, meta: vec![Meta::default(); 4 * ENTRIES].into(), live: Vec::new(), losses: 0 }
    }
}

impl Entry {
    /// The host address of a linear address in the page.
    #[inline(always)]
    const fn host(&self, linear: u64) -> u64 {
        linear.wrapping_add(self.delta)
    }

    const fn none(index: usize) -> Self {
        Self { read: no_tag(index), write: no_tag(index), exec: no_tag(index), delta: 0 }
    }
}

/// Index of a linear address in a bank.
#[inline(always)]
fn slot(bank: Bank, linear: u64) -> usize {
    (bank as usize | (linear >> 12) as usize & (ENTRIES - 1)) & (4 * ENTRIES - 1)
}

impl Tlb {
    /// Where the engine's bytes start ([`ENGINE_BYTES`], zeroed at first); the entries of all banks follow. The place never changes.
    pub fn area(&mut self) -> NonNull<u8> {
        self.area.0.cast()
    }

    /// Reads, if a translation allows.
    #[inline(always)]
    pub fn read<T: Cell>(&self, bank: Bank, linear: u64) -> Option<T> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.read;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return None;
        }
        // SAFETY: a read tag stands only in entries filled from a frame, and the whole access lies in its page. The entry is
        // dropped before the frame's memory is.
        Some(unsafe { load(e.host(linear)) })
    }

    /// Writes, if a translation allows.
    #[inline(always)]
    pub fn write<T: Cell>(&self, bank: Bank, linear: u64, value: T) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return false;
        }
        // SAFETY: as in `read`; a write tag stands only for frames that may be written.
        unsafe { store(e.host(linear), value) };
        true
    }

    /// Whether a write of up to a page's size would hit.
    #[inline(always)]
    pub fn writable(&self, bank: Bank, linear: u64, size: u64) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        size <= PAGE + 1 && linear ^ e.write <= PAGE + 1 - size
    }

    /// Replaces a value by `change` of it, if a translation allows.
    #[inline(always)]
    pub fn update<T: Cell>(&self, bank: Bank, linear: u64, change: impl FnOnce(T) -> T) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return false;
        }
        let address = e.host(linear);
        // SAFETY: as in `write`; what can be written can be read.
        unsafe { store(address, change(load(address))) };
        true
    }

    /// Atomic compare-exchange, if a translation allows.
    #[inline(always)]
    pub fn compare_exchange<T: Cell>(
        &self,
        bank: Bank,
        linear: u64,
        old: T,
        new: T,
    ) -> Option<Result<(), T>> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.write;
        if offset > PAGE + 1 - T::BYTES as u64 {
            return None;
        }
        // SAFETY: as in `write`.
        Some(unsafe { T::cas(e.host(linear), old, new) })
    }

    /// Whether code at `linear` may be fetched by a translation made before; gives the frame's key plus the offset.
    #[inline(always)]
    pub fn fetch(&self, bank: Bank, linear: u64) -> Option<u64> {
        let e = &self.area.entries()[slot(bank, linear)];
        let offset = linear ^ e.exec;
        (offset <= PAGE).then(|| e.host(linear))
    }

    /// Whether a translation for reads, or for writes, is there.
    pub fn holds(&self, bank: Bank, linear: u64, write: bool) -> bool {
        let e = &self.area.entries()[slot(bank, linear)];
        (if write { e.write } else { e.read }) == linear & !PAGE
    }

    /// The host address of a page that may be written.
    pub fn host_page(&self, bank: Bank, page: u64) -> Option<u64> {
        let e = &self.area.entries()[slot(bank, page)];
        (e.write == page).then(|| e.host(page))
    }

    /// Whether the translation of code at `linear` is global.
    pub fn is_global(&self, bank: Bank, linear: u64) -> bool {
        let index = slot(bank, linear);
        self.meta[index].live && self.meta[index].global
    }

    /// Counts what took translations away.
    pub fn losses(&self) -> u64 {
        self.losses
    }

    /// Enters a translation of `linear`'s page for one kind of access.
    pub fn fill(&mut self, bank: Bank, linear: u64, frame: Frame, global: bool, kind: crate::paging::Kind) {
        if bank == Bank::Slow {
            return;
        }
        let index = slot(bank, linear);
        let page = linear & !PAGE;
        let delta = frame.host.wrapping_sub(page);
        let meta = &mut self.meta[index];
        let entry = &mut self.area.entries_mut()[index];
        if !meta.live || meta.page != page || entry.delta != delta {
            if !meta.live {
                self.live.push(index as u16);
            }
            *meta = Meta { live: true, global, page };
            *entry = Entry { delta, ..Entry::none(index) };
        }
        meta.global &= global;
        match kind {
            crate::paging::Kind::Read => entry.read = page,
            crate::paging::Kind::Write if frame.writable => {
                entry.write = page;
                entry.read = page;
            }
            crate::paging::Kind::Write => {}
            crate::paging::Kind::Fetch => entry.exec = page,
        }
    }

    fn clear_entry(entries: &mut [Entry; 4 * ENTRIES], meta: &mut [Meta], index: usize) {
        entries[index] = Entry::none(index);
        meta[index].live = false;
    }

    /// Drops all translations, or all but global ones.
    pub fn flush(&mut self, keep_global: bool) {
        self.losses += 1;
        let Self { area, meta, live, .. } = self;
        let entries = area.entries_mut();
        live.retain(|&index| {
            let index = index as usize;
            if keep_global && meta[index].global {
                return true;
            }
            Self::clear_entry(entries, meta, index);
            false
        });
    }

    /// Drops the translations of one page.
    pub fn flush_page(&mut self, linear: u64) {
        self.losses += 1;
        for bank in [Bank::Supervisor, Bank::User, Bank::Override] {
            let index = slot(bank, linear);
            let page = linear & !PAGE;
            if self.meta[index].live && self.meta[index].page == page {
                // The index stays in `live`; the entry is dead and harmless there.
                self.area.entries_mut()[index] = Entry::none(index);
                self.meta[index].page = NO_PAGE;
            }
        }
    }

    /// Takes the write permission from all translations to a frame.
    pub fn drop_writes(&mut self, frame: Frame) {
        self.losses += 1;
        let Self { area, meta, live, .. } = self;
        let entries = area.entries_mut();
        for &index in &*live {
            let index = index as usize;
            let entry = &mut entries[index];
            if entry.host(meta[index].page) == frame.host {
                entry.write = no_tag(index);
            }
        }
    }
}
